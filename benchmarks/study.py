"""Does SALT pay? A queue of real `cli.py fit` runs (cells), completed over as many short starts as it takes.

    export CORPUS=.../train.jsonl.xz               documents with id, source and text; valid.jsonl.xz beside it
    python benchmarks/study.py plan                what is left, most important first, with minutes
    python benchmarks/study.py run --minutes 25    the next cells that fit into 25 minutes; repeat until none is left
    python benchmarks/study.py report              tables (Markdown) and figures of the results so far

Each finished cell is a line of STATE/results.jsonl and is not run again. A killed one continues with `--ckpt_path
last` if WORK still exists. WORK (prepared text, checkpoints) may be lost between starts. STATE is all that the other
cells need: results, curves, losses of documents, scores of rows, exported teachers and students (a cell reads those
that its settings name). Split it by `tar c STATE | split -b 15M - state.tar.`, restore it by `cat state.tar.* | tar x`.

One source of the corpus is never trained on: an eighth of it is validated on at the end, as `val/ce/ood`. This is a
separate run of `cli.py validate`, so that `val/ce`, the main figure, contains none of it, and compare can be used.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from study_report import report

from salt_lightning import cli, export, selection
from salt_lightning.comparison.report import table
from salt_lightning.models import read_checkpoint
from salt_lightning.run.runlog import read_run
from salt_lightning.teacher.scores import Scores

ROOT = Path(__file__).parents[1]
Record = dict[str, Any]
Settings = dict[str, Any]

# ------------------------------------------------------------ what is studied

SEEDS = (0, 1, 2)  # named before the first run; none is dropped
OOD_SOURCE, OOD_SHARE = "speeches", 8
OMEGA, KD_SHARE = 0.667, 0.2
EARLY = 0.125  # share of the teacher's steps: the checkpoint that scores rows for SALT_DS
UNIGRAM = 0.02  # share of the steps after which a teacher knows little but how often tokens occur
MAX_EPOCHS = 4.0
_STOP_S = 40  # for a cell that is asked to stop: a step, perhaps its compilation, and a save
MORE = "ROW[@RATE][-wSHARE][-fSHARE]-sSEED (w: warm-up, as a share of the full steps; f: length of the run)"
GAP: Settings = {"kd.stop_margin": 0.0}  # KD ends when the student has caught up, between 5% and 60% of the steps
# Fine-tuning of BASELINE's and SALT's main students, on top of configs/sft.yaml; the files are in $TASKS.
SFT_RATE = 3e-4
SFT: dict[str, Settings] = {
    "asdiv": {"data.source": "asdiv.jsonl", "trainer.max_steps": 40},
    "boolq": {
        "data.source": "boolq_train.jsonl", "data.test_source": "boolq_validation.jsonl", "trainer.max_steps": 250,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """One scale of the whole study. Models are (width, layers); rates are BASELINE's candidates, in ascending order."""

    student: tuple[int, int]
    teacher: tuple[int, int]
    weak: tuple[int, int]
    large: tuple[int, int]
    large_teacher: tuple[int, int]
    vocab: int
    steps: int
    rows: int  # per optimizer step
    block: int
    val_every: int
    rates: tuple[float, ...]
    large_rates: tuple[float, ...]
    tokens_per_s: tuple[float, float]  # student and large student, for the plan; corrected by measured times
    start_s: float
    val_rows: int | None = None
    keep_one_in: int = 1  # keep one in this many documents of the corpus
    seeds: tuple[int, ...] = SEEDS
    teacher_seed: int = 17  # of all teachers
    shares: tuple[float, ...] = (0.7, 0.8, 0.9)  # f
    long_teacher: int = 0  # another teacher, trained for this many times the steps; 0: the text is too short for it
    fixed: Settings = field(default_factory=dict)


SIZES = {
    # 15.2M and 40.0M parameters; teachers 7.4M, 3.9M (weak) and 20.4M
    "gpu": Size(
        student=(320, 8), teacher=(256, 4), weak=(160, 4), large=(512, 10), large_teacher=(384, 8),
        vocab=16384, steps=5000, rows=64, block=512, val_every=250,
        rates=(1e-3, 2e-3, 4e-3, 8e-3), large_rates=(5e-4, 1e-3, 2e-3, 4e-3),
        tokens_per_s=(1.2e6, 0.55e6), start_s=45.0,
        fixed={"trainer.precision": "bf16-mixed", "model.compile": True, "checkpoint.every_n_steps": 2000},
    ),
    # 0.7M and 1.6M parameters; teachers 0.4M, 0.2M (weak) and 0.8M
    "cpu": Size(
        student=(96, 3), teacher=(64, 2), weak=(32, 2), large=(160, 3), large_teacher=(96, 4),
        vocab=4096, steps=400, rows=8, block=128, val_every=50, val_rows=128, keep_one_in=32,
        rates=(1e-3, 2e-3, 4e-3, 8e-3), large_rates=(5e-4, 1e-3, 2e-3, 4e-3),
        tokens_per_s=(8e3, 4e3), start_s=5.0, long_teacher=4,
        fixed={"trainer.accelerator": "cpu", "checkpoint.every_n_steps": 100},
    ),
    # only shows that it runs
    "tiny": Size(
        student=(32, 1), teacher=(16, 1), weak=(8, 1), large=(32, 2), large_teacher=(32, 1),
        vocab=300, steps=10, rows=4, block=32, val_every=2, val_rows=16, seeds=(0, 1), shares=(0.5, 0.8),
        rates=(15e-3, 3e-2, 1.0), large_rates=(4e-3, 3e-2, 1.0), tokens_per_s=(1e4, 1e4), start_s=1.0, long_teacher=2,
        fixed={"trainer.accelerator": "cpu", "data.prepare_workers": 1},
    ),
}  # fmt: skip
SIZES["cpu-long"] = replace(
    SIZES["cpu"], steps=1600, val_every=200, rates=(1e-3, 2e-3, 4e-3), large_rates=(5e-4, 1e-3, 2e-3),
    fixed=SIZES["cpu"].fixed | {"checkpoint.every_n_steps": 400},
)  # fmt: skip
# 5.8M parameters, teacher 2.6M: does the gain last when the student grows?
SIZES["cpu-wide"] = replace(
    SIZES["cpu-long"], student=(256, 6), teacher=(192, 4), weak=(96, 4), large=(320, 8), large_teacher=(256, 4),
    tokens_per_s=(1.5e3, 0.8e3),
)  # fmt: skip
# 9.0 tokens per parameter, each read at most once: does the gain of the short runs last?
SIZES["cpu-epoch"] = replace(
    SIZES["cpu-long"], steps=6400, val_every=400, val_rows=512, keep_one_in=8, rates=(2e-3, 4e-3, 8e-3),
    fixed=SIZES["cpu"].fixed | {"checkpoint.every_n_steps": 800},
)  # fmt: skip
# 5.8M parameters at 6,400 steps: does --kd.stop_margin 0 still end below BASELINE after 70% of the steps, in the mean
# of seeds 0 and 1, at the rate (2e-3, a warm-up of 20%) that was the best of the size at 1,600 steps? Written down
# before any of these runs.
SIZES["cpu-wide-epoch"] = replace(
    SIZES["cpu-epoch"], tokens_per_s=SIZES["cpu-wide"].tokens_per_s, rates=(1e-3, 2e-3, 4e-3),
    **{name: getattr(SIZES["cpu-wide"], name) for name in ("student", "teacher", "weak", "large", "large_teacher")},
)  # fmt: skip


def model(width: int, layers: int) -> Settings:
    """A llama config with heads of 64 (32 if narrow) and an MLP of 8/3 of the width."""
    return {
        "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // (64 if width >= 256 else 32)),
        "intermediate_size": -(-width * 8 // 3 // 16) * 16, "tie_word_embeddings": True,
    }  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run: a row of a table, with one seed."""

    row: str
    seed: int
    part: str  # sweep | teacher | score | main | reached | half rate | one seed | large | best | sft | more
    settings: Settings
    needs: tuple[str, ...] = ()
    first: Settings | None = None  # settings that differ in a first part, which ends at its own trainer.max_steps
    about: str = ""  # the row that a "best" row repeats

    @property
    def name(self) -> str:
        return f"{self.row}-s{self.seed}"


class Study:
    """The queue of one size, as far as the results so far determine it, and the paths of its files."""

    def __init__(self, size: str, state: Path, work: Path, more: Iterable[str] = ()) -> None:
        self.size_name, self.size, self.state, self.work, self.more = size, SIZES[size], state, work, tuple(more)
        self.results = state / "results.jsonl"
        self.done: dict[str, Record] = {}
        if self.results.exists():
            self.done = {r["cell"]: r for r in map(json.loads, self.results.read_text().splitlines())}

    # ----------------------------------------------------------------- the queue

    def cells(self) -> list[Cell]:
        """All cells, most important first. A rate that is not decided yet is 0."""
        size, s0 = self.size, self.size.seeds[0]
        main, rate = self._sweep("baseline", size.student, size.rates)
        wide, wide_rate = self._sweep("large-baseline", size.large, size.large_rates)
        rows, tuned = self._rows(rate), tuple(cell.name for cell in main)
        ready = (*tuned, self._name("teacher"))
        scored = (*ready, self._name("score"))
        base = f"baseline-lr{rate:g}"
        cells = [*main, self._teacher("teacher", size.teacher, rate, tuned)]
        for seed, row in itertools.product(size.seeds, (base, "salt", "rkd")):
            if (row, seed) != (base, s0):
                cells.append(Cell(row, seed, "main", rows[row], tuned if row == base else ready))
        cells.append(self._score(ready))
        for seed, row in itertools.product(size.seeds, ("salt-ds", "random")):
            cells.append(Cell(row, seed, "main", rows[row], scored))
        for seed, f in itertools.product(size.seeds, size.shares):
            cells.append(Cell(f"salt-f{f:g}", seed, "reached", self._shortened(rows["salt"], f), ready))
        # At half the rate: does SALT only repair a rate that is too close to the limit?
        for seed, (row, settings) in itertools.product(size.seeds, self._half(rows, rate).items()):
            if (row, seed) not in {(cell.row, cell.seed) for cell in cells}:  # the sweep has one
                cells.append(Cell(row, seed, "half rate", settings, ready))
        cells += [Cell(f"baseline-f{f:g}", s0, "reached", self._shortened(rows[base], f), tuned) for f in size.shares]
        cells.append(self._teacher("weak", size.weak, rate, tuned))
        cells.append(self._teacher("unigram", size.teacher, rate, tuned, UNIGRAM))
        if size.long_teacher:
            cells.append(self._teacher("long", size.teacher, rate, tuned, size.long_teacher))
        for row in rows:
            if row not in {cell.row for cell in cells}:
                cells.append(self._single(row, s0, rows[row], ready))
        cells += [*wide, self._teacher("large-teacher", size.large_teacher, wide_rate, tuple(c.name for c in wide))]
        large = {"model.student.config": model(*size.large), "model.optim.lr": wide_rate}
        salt = rows["salt"] | large | {"model.teacher.path": self._path("teachers/large-teacher")}
        for seed in size.seeds:
            if seed != s0:
                name = f"large-baseline-lr{wide_rate:g}"
                cells.append(Cell(name, seed, "large", self._base(large), tuple(c.name for c in wide)))
            cells.append(Cell("large-salt", seed, "large", salt, (*ready, self._name("large-teacher"))))
        # The best SALT setting on the first seed, unless it is that of the main rows, is measured on the other seeds.
        tried = [c for c in cells if c.part == "one seed" and "model.teacher.path" in c.settings and c.first is None]
        names = (f"salt-s{s0}", *(c.name for c in tried))
        known = [self.done[name] for name in names if name in self.done]
        best = min(known, key=lambda r: r["val/ce"])["row"] if len(known) == len(names) else ""
        if best != "salt":
            for seed, f in itertools.product(size.seeds[1:], size.shares):
                settings = self._shortened(rows[best or "salt"], f)
                cells.append(Cell(f"best-f{f:g}", seed, "best", settings, (*scored, *names), about=best))
        for seed, task, row in itertools.product(size.seeds, SFT, (base, "salt")):
            student = f"{row}-s{seed}"
            needs = (*tuned, student)
            cells.append(Cell(f"sft-{task}-{row}", seed, "sft", self._tuning(task, student), needs))
        names, slower = {cell.name for cell in cells}, {"model.optim.lr": wide_rate / 2}
        rows |= self._half(rows, rate) | {"large-salt": salt, "large-half-lr-salt": salt | slower}
        rows["large-half-lr-baseline"] = self._base(large | slower)
        return cells + [self._asked(name, rows, ready) for name in dict.fromkeys(self.more) if name not in names]

    def _single(self, row: str, seed: int, settings: Settings, ready: tuple[str, ...]) -> Cell:
        """A cell of an experiment other than the main rows."""
        own = tuple(self._name(kind) for kind in ("weak", "unigram", "long") if row.startswith(f"{kind}-teacher"))
        own += (self._name("large-teacher"),) if row.startswith("large-") else ()
        scored = (self._name("score"),) if "data.selection" in settings else ()
        first = self._stretch(settings["model.optim.lr"]) if row.startswith("high-lr") else None
        return Cell(row, seed, "one seed", settings, (*ready, *scored, *own), first)

    def _asked(self, name: str, rows: dict[str, Settings], ready: tuple[str, ...]) -> Cell:
        """A cell of --more: an experiment of the plan with another seed, rate, warm-up or length."""
        found = re.fullmatch(r"(.+?)(?:@(\d*\.?\d+))?(?:-w(\d*\.?\d+))?(?:-f(\d*\.?\d+))?-s(\d+)", name)
        row, rate, warm, share, seed = found.groups() if found else ("", "", "", "", "")
        too_warm = warm and float(warm) > float(share or 1)
        if row not in rows or too_warm or (share and row.startswith("high-lr")):
            raise SystemExit(f"--more {name}: {MORE}, ROW one of {', '.join(rows)}")
        settings = rows[row] | ({"model.optim.lr": float(rate)} if rate else {})
        settings |= {"model.optim.warmup_steps": self._at(float(warm))} if warm else {}
        cell = self._single(row, int(seed), self._shortened(settings, float(share)) if share else settings, ready)
        return replace(cell, row=name.removesuffix(f"-s{seed}"), part="more")

    def _sweep(self, row: str, shape: tuple[int, int], rates: tuple[float, ...]) -> tuple[list[Cell], float]:
        """BASELINE's candidate cells on the first seed, and the best rate (0: undecided).

        If the best is the lowest or highest candidate, another is added beyond it, at most twice.
        """

        def known() -> dict[float, float]:
            names = {rate: f"{row}-lr{rate:g}-s{self.size.seeds[0]}" for rate in rates}
            return {rate: self.done[name]["val/ce"] for rate, name in names.items() if name in self.done}

        for _ in range(2):
            losses = known()
            best = min(losses, key=losses.__getitem__, default=0.0)
            if len(losses) < len(rates) or best not in (rates[0], rates[-1]):
                break
            rates = (rates[0] / 2, *rates) if best == rates[0] else (*rates, rates[-1] * 2)
        losses = known()
        cells = [
            Cell(f"{row}-lr{rate:g}", self.size.seeds[0], "sweep",
                 self._base({"model.student.config": model(*shape), "model.optim.lr": rate}))
            for rate in rates
        ]  # fmt: skip
        return cells, min(losses, key=losses.__getitem__) if len(losses) == len(rates) else 0.0

    def _base(self, more: Settings) -> Settings:
        size, corpus = self.size, self.work / "corpus"
        return {
            "model.student.config": model(*size.student), "model.optim.warmup_steps": self._at(0.05),
            "kd.weight": 0.0, "kd.steps": 0,
            "data.source": str(corpus / "train.jsonl"), "data.val_source": str(corpus / "valid.jsonl"),
            "data.source_column": "source", "data.vocab_size": size.vocab, "data.block_size": size.block,
            "data.global_batch_size": size.rows, "data.micro_batch_size": size.rows, "data.val_rows": size.val_rows,
            "data.cache_dir": str(self.work / "cache"), "trainer.max_steps": size.steps,
            "trainer.val_check_interval": size.val_every, "trainer.enable_progress_bar": False, **size.fixed, **more,
        }  # fmt: skip

    def _rows(self, rate: float) -> dict[str, Settings]:
        """Settings of every experiment at the main size, by name. 'salt' is the step at 20%, omega .667, T 1."""
        base = self._base({"model.optim.lr": rate})
        taught = {"kd.weight": OMEGA, "model.teacher.path": self._path("teachers/teacher")}
        salt = {**base, **taught, "kd.steps": self._at(KD_SHARE)}
        # A ramp from 10% to 30% of the steps has the same area as the step at 20%.
        ramp = {**salt, "kd.steps": self._at(0.3), "kd.anneal_steps": self._at(0.2)}
        zeros = self.done.get(self._name("score"), {}).get("zero_share", 0.0)
        chosen = {
            "data.selection": self._path("scores"), "data.keep.fraction": 0.5,
            # If more than half of all rows score 0, the score cannot choose half of the rows.
            "data.keep.masked": "drop" if zeros > 0.5 else "zero",
        }  # fmt: skip
        more: Settings = {"kd.steps": self._at(0.4), "kd.weight": 0.9}
        long: Settings = {"model.teacher.path": self._path("teachers/long")}
        rows = {
            f"baseline-lr{rate:g}": base,
            "rkd": {**base, **taught, "kd.steps": None},
            "salt": salt,
            "salt-ds": {**salt, **chosen},
            "random": {**salt, **chosen, "data.keep.order": "random"},
            "kd-10": {**salt, "kd.steps": self._at(0.1)},
            "kd-40": {**salt, "kd.steps": self._at(0.4)},
            "linear": {**ramp, "kd.shape": "linear"},
            "linear-ratio": {**ramp, "kd.shape": "linear_ratio"},
            "cosine": {**ramp, "kd.shape": "cosine"},
            "omega-0.3": {**salt, "kd.weight": 0.3},
            "omega-0.9": {**salt, "kd.weight": 0.9},
            "T-2": {**salt, "model.teacher_temperature": 2.0},
            "weak-teacher": {**salt, "model.teacher.path": self._path("teachers/weak")},
            # a control: are soft targets enough, whatever they say?
            "unigram-teacher": {**salt, "model.teacher.path": self._path("teachers/unigram")},
            "without-kd": {**base, **chosen, "kd.steps": self._at(KD_SHARE)},
            "gap": {**salt, **GAP, "kd.min_steps": self._at(0.05), "kd.steps": self._at(0.6)},
            "high-lr-baseline": {**base, "kd.steps": self._at(KD_SHARE)},
            "high-lr-salt": salt,
            "more-kd": {**salt, **more},
        }
        if self.size.long_teacher:
            taught_long = {**salt, **long}
            rows |= {"long-teacher": taught_long, "long-teacher-more-kd": {**taught_long, **more},
                     "long-teacher-rkd": {**taught_long, "kd.steps": None}}  # fmt: skip
        return rows

    @staticmethod
    def _half(rows: dict[str, Settings], rate: float) -> dict[str, Settings]:
        half: Settings = {"model.optim.lr": rate / 2}
        names = {f"baseline-lr{rate / 2:g}": f"baseline-lr{rate:g}", "half-lr-salt": "salt"}
        return {row: rows[full] | half for row, full in names.items()}

    def _stretch(self, rate: float) -> Settings:
        """Twice the rate, constant, until KD ends, then the usual curve: two fits, so no extra setting is needed."""
        return {"model.optim.lr": 2 * rate, "model.optim.schedule": "wsd", "model.optim.decay_steps": 0,
                "trainer.max_steps": self._at(KD_SHARE)}  # fmt: skip

    def _shortened(self, settings: Settings, f: float) -> Settings:
        """A complete run of f x the steps: lengths shrink in proportion, except the warm-up, which serves the start."""
        lengths = ("kd.steps", "kd.anneal_steps", "kd.min_steps", "trainer.max_steps")
        short = {key: max(1, round(f * settings[key])) for key in lengths if settings.get(key)}
        every = max(1, round(f * self.size.val_every))
        short["trainer.max_steps"] = round(f * self.size.steps / every) * every  # so that the last step is validated
        return {**settings, **short, "trainer.val_check_interval": every}

    def _teacher(self, row: str, shape: tuple[int, int], rate: float, needs: tuple[str, ...], times: float = 1) -> Cell:
        steps = self._at(times)
        more: Settings = {"model.student.config": model(*shape), "model.optim.lr": rate, "trainer.max_steps": steps}
        if times < 1:
            more |= {"model.optim.warmup_steps": 0, "trainer.val_check_interval": steps}
        early = {"checkpoint.at_steps": [self._at(EARLY)]} if row == "teacher" else {}
        return Cell(row, self.size.teacher_seed, "teacher", self._base(more | early), needs)

    def _score(self, needs: tuple[str, ...]) -> Cell:
        base = self._base({})
        names = ("data.", "trainer.accelerator", "trainer.precision", "trainer.enable", "model.compile")
        settings = {key: value for key, value in base.items() if key.startswith(names)}
        settings |= {"model.teacher.path": self._path("teachers/early"), "data.micro_batch_size": self.size.rows}
        return Cell("score", self.size.teacher_seed, "score", settings, needs)

    def _tuning(self, task: str, student: str) -> Settings:
        size, path = self.size, self._path(f"students/{student}")
        tasks = Path(os.environ.get("TASKS", "TASKS"))
        files = {key: str(tasks / value) for key, value in SFT[task].items() if key.startswith("data.")}
        fixed = {"trainer.precision": "32-true", "model.compile": False, **size.fixed}
        return {
            "config": [str(ROOT / "configs" / name) for name in ("sft.yaml", f"tasks/{task}.yaml")],
            "model.student.path": path, "data.tokenizer": path, "model.optim.lr": SFT_RATE, "kd.steps": 0,
            "data.block_size": size.block, "data.cache_dir": str(self.work / "cache"),
            "trainer.val_check_interval": 10, "trainer.enable_progress_bar": False, **fixed, **SFT[task], **files,
        }  # fmt: skip

    def _name(self, row: str) -> str:
        return f"{row}-s{self.size.teacher_seed}"

    def _at(self, share: float) -> int:
        return max(1, round(share * self.size.steps))

    def _path(self, name: str) -> str:
        return str(self.state / name)

    def minutes(self, cell: Cell) -> float:
        """The expected minutes of a cell: the plan's estimate, corrected by the times of finished cells."""
        ratios = [r["wall_s"] / r["planned_s"] for r in self.done.values() if r["part"] not in ("score", "sft")]
        return self.planned_s(cell) * (statistics.median(ratios) if len(ratios) > 2 else 1.0) / 60

    def planned_s(self, cell: Cell) -> float:
        size, settings = self.size, cell.settings
        if cell.part in ("score", "sft"):
            return 4 * size.start_s
        speed = size.tokens_per_s["large" in cell.row]
        steps = settings["trainer.max_steps"]
        taught = (settings["kd.steps"] or steps) / steps if settings["kd.weight"] else 0.0
        speed *= 2.0 if cell.part == "teacher" else 1.0
        tokens = steps * size.rows * size.block
        return size.start_s * (1 + 0.5 * (taught > 0)) + tokens / speed * (1 + 0.4 * taught)

    # ------------------------------------------------------------------ one start

    def run(self, minutes: float, only: str) -> int:
        """Runs cells until none that is ready fits into the time; returns how many failed."""
        deadline = time.monotonic() + 60 * minutes
        failed: set[str] = set()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        for folder in (self.state, self.work):
            self._require_own(folder)
        while (cell := self._next(deadline, only, failed)) is not None:
            print(f"{time.strftime('%H:%M:%S')} {cell.name}: {self.minutes(cell):.1f} minutes expected", flush=True)
            record = self._in_child(cell, deadline)
            if record is None and time.monotonic() > deadline:
                print(f"{cell.name} is out of time; the next start continues it", flush=True)
                break
            if record is None:
                failed.add(cell.name)
                continue
            with open(self.results, "a") as out:
                out.write(json.dumps(record) + "\n")
            self.done[cell.name] = record
            if cell.part == "sweep":
                self._forget_students()
            print(f"{time.strftime('%H:%M:%S')} {cell.name}: {self._short(record)}", flush=True)
        left = [cell for cell in self.cells() if cell.name not in self.done]
        print(f"{len(left)} cells left, {sum(map(self.minutes, left)):.0f} minutes; failed: {sorted(failed) or 'none'}")
        return len(failed)

    def _require_own(self, folder: Path) -> None:
        """Ends the program if another teacher's results or runs are in the folder; creates it if missing."""
        seed, file = str(self.size.teacher_seed), folder / "teacher-seed"
        there = file.read_text() if file.exists() else "17" if folder.is_dir() and any(folder.iterdir()) else seed
        if there != seed:
            raise SystemExit(f"{folder} has cells with the teacher of seed {there}; give other --state and --work")
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(seed)

    def _next(self, deadline: float, only: str, failed: set[str]) -> Cell | None:
        left_s = deadline - time.monotonic()
        for cell in self.cells():
            ready = all(name in self.done for name in cell.needs) and cell.name not in self.done
            if ready and cell.name not in failed and re.search(only, cell.name) and 60 * self.minutes(cell) < left_s:
                return cell
        return None

    def _forget_students(self) -> None:
        """Deletes the exported students of rates that were not chosen."""
        _, rate = self._sweep("baseline", self.size.student, self.size.rates)
        for path in (self.state / "students").glob("baseline-lr*") if rate else ():
            if not path.name.startswith(f"baseline-lr{rate:g}-"):
                shutil.rmtree(path)

    @staticmethod
    def _short(record: Record) -> str:
        return ", ".join(f"{key} {record[key]:.4f}" for key in ("val/ce", "test/ce", "zero_share") if key in record)

    def _in_child(self, cell: Cell, deadline: float) -> Record | None:
        """Runs a cell in a fork of this process, which has imported everything and computed nothing."""
        run = self.work / "runs" / cell.name
        run.mkdir(parents=True, exist_ok=True)
        began_s, target = time.monotonic(), run / "record.json"
        child = multiprocessing.get_context("fork").Process(target=_child, args=(self, cell, run))
        child.start()
        try:
            child.join(max(1.0, deadline - time.monotonic()))
        finally:  # out of time, or asked to stop: the run saves a checkpoint, and the next start continues it
            child.terminate()
            child.join(_STOP_S)
            if child.is_alive():  # in a compilation: its last checkpoint is what it has
                child.kill()
                child.join()
        if child.exitcode != 0 or not target.exists():
            print(f"{cell.name} did not finish (exit code {child.exitcode}); its output ends:", file=sys.stderr)
            print("\n".join((run / "log.txt").read_text(errors="replace").splitlines()[-5:]), file=sys.stderr)
            return None
        record = json.loads(target.read_text())
        return record | {"wall_s": time.monotonic() - began_s, "planned_s": self.planned_s(cell)}

    def perform(self, cell: Cell, run: Path) -> Record:
        """Runs a cell in this process; returns its result."""
        told, kept = json.dumps(derive(self.work / "corpus", self.size.keep_one_in)), self.state / "corpus.json"
        if kept.exists() and kept.read_text() != told:
            raise SystemExit(f"$CORPUS is not the text of {self.state}; use another --state and --work")
        kept.write_text(told)
        record: Record = {
            "cell": cell.name, "part": cell.part, "row": cell.row, "seed": cell.seed, "about": cell.about,
            "settings": cell.settings, "first": cell.first,
            "commit": commit(), "card": card(), "date": time.strftime("%Y-%m-%d"),
            "versions": {name: version(name) for name in ("torch", "lightning", "transformers")},
        }  # fmt: skip
        if cell.part == "score":
            return record | self._scores(cell)
        if cell.first:
            self._fit(cell, run, {**cell.settings, **cell.first})
        final = self._fit(cell, run, cell.settings)
        if cell.part == "sft":
            return record | self._tested(cell, run, final)
        record |= self._measured(cell, run, final)
        if cell.part == "teacher":
            for step, name in ((cell.settings["trainer.max_steps"], cell.row), (self._at(EARLY), "early")):
                if name != "early" or cell.row == "teacher":
                    self._export(run / f"checkpoints/step-{step:08d}.ckpt", self.state / "teachers" / name)
        if cell.row == "salt" or cell.row.startswith("baseline-lr"):
            self._export(final, self.state / "students" / cell.name)
        curves = self.state / "curves" / cell.name
        shutil.rmtree(curves, ignore_errors=True)
        curves.mkdir(parents=True)
        for path in (*run.glob("*tfevents*"), run / "config.yaml"):
            shutil.copy(path, curves)
        return record

    def _fit(self, cell: Cell, run: Path, settings: Settings) -> Path:
        """Runs a fit to its end, from its newest checkpoint if there is one; returns the last checkpoint."""
        final = run / f"checkpoints/step-{settings['trainer.max_steps']:08d}.ckpt"
        if not final.exists():
            args = ["fit", *arguments(settings), f"--run={run}", f"--seed_everything={cell.seed}"]
            _call([*args, "--ckpt_path=last"] if any(run.glob("checkpoints/*.ckpt")) else args)
        return final

    def _measured(self, cell: Cell, run: Path, final: Path) -> Record:
        log, steps = read_run(run, cell.name), cell.settings["trainer.max_steps"]
        unique = read_checkpoint(str(final), "study")["data"]["--data.num_train_tokens"]
        epochs = steps * self.size.rows * self.size.block / unique
        assert epochs <= MAX_EPOCHS, f"{epochs:.2f} epochs of the text"
        keys = ("model.student", "data.", "trainer.accelerator", "trainer.precision", "trainer.enable")
        looked = {key: value for key, value in cell.settings.items() if key.startswith(keys)}
        for text in (
            "valid",
            "ood",
        ):  # the folder `validate` ends up with the second; the first one's losses by document are kept
            source = {"data.val_source": str(self.work / f"corpus/{text}.jsonl")}
            _call(["validate", *arguments(looked | source), f"--run={run}", f"--ckpt_path={final}"])
            if text == "valid":
                (self.state / "documents").mkdir(exist_ok=True)
                shutil.copy(run / "validate/documents.parquet", self.state / f"documents/{cell.name}.parquet")
        return {
            **{tag: log.last(tag) for tag in log.curves if tag.startswith("val/")},
            "val/ce/ood": read_run(run / "validate", "ood").last("val/ce"),
            "curve": [[int(s), float(ce)] for s, ce in zip(log.val_ce.steps, log.val_ce.values, strict=True)],
            "steps": steps, "unique_tokens": unique, "epochs": epochs, "seconds": log.total("train/time_s", steps),
            "flops_student": log.total("train/flops_student_total", steps),
            "flops_teacher": log.total("train/flops_teacher_total", steps),
        }  # fmt: skip

    def _tested(self, cell: Cell, run: Path, final: Path) -> Record:
        _call(["test", *arguments(cell.settings), f"--run={run}", f"--ckpt_path={final}"])
        log = read_run(run / "test", cell.name)
        return {tag: log.last(tag) for tag in log.curves if tag.startswith("test/")}

    def _export(self, checkpoint: Path, target: Path) -> None:
        """Exports in the dtype that the model will compute in as a teacher: bf16 if the run does."""
        shutil.rmtree(target, ignore_errors=True)
        bf16 = "bf16" in str(self.size.fixed.get("trainer.precision"))
        export.export(checkpoint, target, torch.bfloat16 if bf16 else None)

    def _scores(self, cell: Cell) -> Record:
        """Scores rows with the early teacher, and keeps only what a selection reads: S of each row."""
        run, kept = self.work / "runs/scores", self.state / "scores"
        _call(["predict", *arguments(cell.settings), f"--run={run}"])
        found = Scores(run, "study")
        s_R = {masked: selection.row_scores(found, 10, masked) for masked in ("zero", "drop")}
        (kept / "scores").mkdir(parents=True, exist_ok=True)
        shutil.copy(run / "scores.json", kept)
        for path in (run / "scores").glob("S-*.parquet"):
            shutil.copy(path, kept / "scores")
        return {"zero_share": float(np.mean(s_R["zero"] == 0)), "scoring_flops": found.manifest["scoring_flops"]}


def _child(study: Study, cell: Cell, run: Path) -> None:
    with open(run / "log.txt", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    record = study.perform(cell, run)
    (run / "record.json").write_text(json.dumps(record))


def _call(args: list[str]) -> None:
    print("python cli.py", *args, flush=True)
    if code := cli.main(args):
        raise SystemExit(code)


def arguments(settings: Settings) -> list[str]:
    configs = [f"--config={path}" for path in settings.get("config", [])]
    rest = {key: value for key, value in settings.items() if key != "config"}
    return configs + [f"--{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in rest.items()]


def commit() -> str:
    """The commit of this code; $COMMIT if this is not a git checkout."""
    if given := os.environ.get("COMMIT"):
        return given
    if shutil.which("git") is None:
        return "unknown"
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False).stdout
    return head.strip() + ("+" if dirty else "") if head else "unknown"


def card() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} in use"


# ------------------------------------------------------------------ the corpus


def derive(folder: Path, keep_one_in: int) -> dict[str, Any]:
    """Writes train.jsonl and valid.jsonl without the held-out source, and ood.jsonl from it, once; returns facts."""
    facts = folder / "corpus.json"
    if facts.exists():
        return json.loads(facts.read_text())
    if not os.environ.get("CORPUS"):
        raise SystemExit(
            "set CORPUS to train.jsonl(.xz), documents with id, source and text, with valid.jsonl(.xz) beside it"
        )
    train = Path(os.environ["CORPUS"])
    valid = train.with_name(train.name.replace("train", "valid"))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    told: dict[str, Any] = {"corpus": {}, "files": {}}
    for path in (train, valid):
        told["corpus"][path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path.read_bytes())}
    choose: dict[str, tuple[Path, Callable[[dict[str, str]], bool]]] = {
        "train": (train, lambda d: d["source"] != OOD_SOURCE and _lot(d["id"]) % keep_one_in == 0),
        "valid": (valid, lambda d: d["source"] != OOD_SOURCE),
        "ood": (train, lambda d: d["source"] == OOD_SOURCE and _lot(d["id"]) % OOD_SHARE == 0),
    }
    for name, (path, wanted) in choose.items():
        documents, sources = 0, {}
        with open(unfinished / f"{name}.jsonl", "wb") as out:
            for line in _lines(path):
                document = json.loads(line)
                if wanted(document):
                    out.write(line)
                    documents += 1
                    size = len(document["text"].encode())
                    sources[document["source"]] = sources.get(document["source"], 0) + size
        told["files"][name] = {"documents": documents, "text_bytes": sources}
    (unfinished / "corpus.json").write_text(json.dumps(told, indent=1))
    unfinished.rename(folder)
    return told


def _lines(path: Path) -> Iterator[bytes]:
    with lzma.open(path) if path.suffix == ".xz" else open(path, "rb") as file:
        yield from file


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _lot(name: str) -> int:
    return int(_sha256(name.encode())[:8], 16)


def plan(study: Study) -> str:
    left = [cell for cell in study.cells() if cell.name not in study.done]
    minutes = [study.minutes(cell) for cell in left]
    return table({
        "cell": [c.name for c in left], "part": [c.part for c in left], "minutes": [f"{m:.1f}" for m in minutes],
        "total": [f"{t:.0f}" for t in itertools.accumulate(minutes)],
    }, text=("cell", "part"))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["plan", "run", "report"])
    parser.add_argument("--size", choices=SIZES, default="gpu")
    parser.add_argument(
        "--minutes", type=float, default=1440, help="run: minutes of this start; a cell that does not fit waits"
    )
    parser.add_argument("--only", default="", help="run: only cells whose name matches this regular expression")
    parser.add_argument("--seeds", type=int, help="seeds 0 to SEEDS - 1 instead of 0 to 2; with --only for some rows")
    parser.add_argument("--teacher-seed", type=int, help="of another teacher than 17, with a STATE and WORK of its own")
    parser.add_argument("--more", nargs="+", default=(), metavar="CELL", help=f"additional cells: {MORE}")
    parser.add_argument("--state", type=Path, help="folder kept between starts (runs/study-SIZE)")
    parser.add_argument("--work", type=Path, help="folder that may be lost between starts (cache/study-SIZE)")
    args = parser.parse_args()
    state, work = args.state or Path(f"runs/study-{args.size}"), args.work or Path(f"cache/study-{args.size}")
    study = Study(args.size, state, work, args.more)
    if args.seeds:  # to repeat a row that looks certain on seeds not seen before
        study.size = replace(study.size, seeds=tuple(range(args.seeds)))
    if args.teacher_seed is not None:
        study.size = replace(study.size, teacher_seed=args.teacher_seed)
    if args.verb == "run":
        return 1 if study.run(args.minutes, args.only) else 0
    print({"plan": plan, "report": report}[args.verb](study))
    return 0


if __name__ == "__main__":
    sys.exit(main())
