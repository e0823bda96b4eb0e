"""The cost of a training step with `cli.py fit`: KD step, plain step, hand-written loops, and memory.

    python benchmarks/step.py --sizes 124m 350m       one GPU; skips what is not done after 8 minutes (--deadline)
    python benchmarks/step.py --boundary --sizes 124m the plain phase after a boundary and BASELINE, alternately
    python benchmarks/step.py --loops hand            only the loop that compiles nothing more: half the time of a size
    python benchmarks/step.py --tiny                  any CPU, seconds: shows that it runs

Each size runs in its own process, whose output goes to stderr. Blocks of KD and plain steps alternate, and after each
plain block every hand-written loop takes a turn of a few steps, all within one fit, so that drift of the GPU cancels.
The first round of blocks and turns compiles and is not counted. A step's time is the mean of its block or turn (in a
fit including logged steps and waiting for data); `plain / ...` is the mean of the ratios of each plain block to the
turn after it. The 95% intervals come from the blocks, or from these ratios. If `host ms` comes near a step's time, the
host is the limit. The claim is the ratios, not the times.
The teacher's weights are random: they do not affect the cost of a step. `paper` is configs/paper_2.8b.yaml with one
micro-batch per step; `2.8b` is the same pair without activation checkpointing, with weights in bf16.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
import yaml
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.initialization import no_init_weights
from transformers.integrations.sdpa_attention import sdpa_attention_forward

sys.path.insert(0, str(Path(__file__).parents[1]))
from head_loss import Case, full_loss, liger, naive, named

from salt_lightning import cli, flops, models
from salt_lightning.batches.rows import document_borders
from salt_lightning.checkpoint import RunCheckpoint
from salt_lightning.head import chunked_head
from salt_lightning.hugging_face.spec import ModelSpec
from salt_lightning.models import CausalLM, build_fresh, from_config
from salt_lightning.text.journal import whole

BLOCKS = 8  # KD and plain, alternating; after each plain block a turn of every hand-written loop
LOOP_STEPS = 60  # of each hand-written loop, at most
PLAIN_WAYS = ("hand", "full_logits", "transformers")
LOOPS = (*PLAIN_WAYS, "kd_hand", "kd_full", "kd_chunks", "kd_liger")
FITS = 4  # fits with a boundary, and the same number of BASELINE
WEIGHT = 0.667
T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36)  # for 1, 2 ... degrees of freedom


@dataclass(frozen=True)
class Pair:
    """Student and teacher as (width, layers), vocabulary, rows per step, and what the student needs to fit on a GPU.

    `steps`: the length of a block of steps with or without the teacher; shorter if a step takes long.
    """

    student: tuple[int, int]
    teacher: tuple[int, int]
    vocab: int = 50304
    rows: int = 8
    block: int = 1024
    precision: str = "bf16-mixed"
    steps: int = 100
    config: str | None = None  # a config file for the student, instead of its width and layers
    head_dim: int = 64


PAIRS = {
    "124m": Pair((768, 12), (512, 8)),
    "350m": Pair((1024, 24), (768, 18)),
    "1.3b": Pair((2048, 24), (1536, 20), steps=40, head_dim=128),
    "2.8b": Pair((2560, 28), (2048, 19), vocab=256000, precision="bf16-true", steps=30, head_dim=128),
    "paper": Pair((2560, 28), (2048, 19), vocab=256000, steps=20, config="configs/paper_2.8b.yaml", head_dim=128),
    "tiny": Pair((64, 2), (32, 2), vocab=512, rows=2, block=64, precision="32-true", steps=6),
}


def sizes(width: int, layers: int, vocab: int, head_dim: int = 64) -> dict[str, Any]:
    """A llama config with an MLP of 8/3 of the width; heads of 64 as in GPT-2, or of 128 as is usual above 1B."""
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": max(1, width // head_dim),
        "intermediate_size": -(-width * 8 // 3 // 64) * 64, "vocab_size": vocab, "tie_word_embeddings": True,
    }  # fmt: skip


class Alternate(pl.Callback):
    """Removes the teacher or puts it back every `block` steps, and times each optimizer step.

    After each plain block the hand-written loops take a turn; then it calls `done` with itself and the module.
    """

    def __init__(
        self, block: int, skip: int, done: Callable[[Alternate, Any], None], loops: Sequence[str] = LOOPS
    ) -> None:
        self.block, self.skip, self.done, self.wanted = block, skip, done, loops
        self.loops: Loops | None = None
        self.batches: deque[Any] = deque(maxlen=8)
        self.marks: list[Any] = []
        self.waits_s: list[float] = []  # for data, up to each mark
        self.host_s: list[float] = []  # when the host came to each mark
        self.kinds: list[str] = []
        self.peaks: dict[str, float] = {}
        self._teacher: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._teacher = self._teacher or pl_module.teacher
        taught = (trainer.global_step // self.block) % 2 == 0
        if trainer.global_step % self.block == 0:  # off the GPU: in the plain phase there is no teacher on it
            self._teacher.to(pl_module.device if taught else "cpu")
        pl_module.__dict__["teacher"] = self._teacher if taught else None
        self.batches.append(batch)
        if not taught:
            pl_module.kd_weight.zero_()
        if trainer.global_step % self.block == self.skip and pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._mark(trainer, pl_module)
        if taught and trainer.global_step and trainer.global_step % self.block == 0:
            self._turn(trainer, pl_module)  # counts as part of the next step, which `skip` leaves out
        self.kinds.append("kd" if taught else "plain")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pl_module.__dict__["teacher"] = self._teacher  # KDScheduleCallback refuses to begin a step without it

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        # Not after the step: a logged step resets the peak (SALTModule._log_step).
        if trainer.global_step % self.block >= self.skip and pl_module.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
            self.peaks[self.kinds[-1]] = max(peak, self.peaks.get(self.kinds[-1], 0))

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._mark(trainer, pl_module)
        pl_module.__dict__["teacher"] = self._teacher.to(pl_module.device)
        self._turn(trainer, pl_module)

    def _turn(self, trainer: pl.Trainer, module: Any) -> None:
        self.milliseconds = spans(self.marks)
        done = partial(self.done, self, module)
        if self.loops is None:
            done()
            self.loops = Loops(module, trainer.optimizers[0], list(self.batches), self.wanted)
        self.loops.take_turn(max(3, min(self.block, LOOP_STEPS) // (BLOCKS // 2)), done)

    def _mark(self, trainer: pl.Trainer, module: Any) -> None:
        self.marks.append(mark(module.device))
        self.host_s.append(time.perf_counter())
        self.waits_s.append(trainer.datamodule.data_wait_s)  # type: ignore[attr-defined]

    def counted(self, kind: str) -> list[range]:
        """The steps of each block of a kind, without those that compile or refill caches."""
        starts = range(0, len(self.milliseconds), self.block)
        ends = (min(start + self.block, len(self.milliseconds)) for start in starts)
        found = [range(a + self.skip, b) for a, b in zip(starts, ends, strict=True) if self.kinds[a] == kind]
        found = [block for block in found if block]
        return found[1:] if len(found) > 2 else found

    def blocks(self, kind: str) -> list[float]:
        """Mean step of each block of a kind in ms."""
        return [statistics.mean(self.milliseconds[step] for step in block) for block in self.counted(kind)]

    def host_ms(self, kind: str) -> float:
        """The host's own time for a step: the median, since it waits for the GPU only in the steps that are logged."""
        steps = [step for block in self.counted(kind) for step in block]
        return 1e3 * statistics.median(self.host_s[step + 1] - self.host_s[step] for step in steps)

    def wait_share(self) -> float:
        """How much of the counted steps' time the host waited for data."""
        steps = [step for kind in ("kd", "plain") for block in self.counted(kind) for step in block]
        waited_s = sum(self.waits_s[step + 1] - self.waits_s[step] for step in steps)
        return 1e3 * waited_s / sum(self.milliseconds[step] for step in steps)


class After(pl.Callback):
    """Times the optimizer steps from step `first` on, and finds their peak memory."""

    def __init__(self, first: int) -> None:
        self.first, self.marks, self.peak = first, [], 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.first and pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if trainer.global_step >= self.first:
            self.marks.append(mark(pl_module.device))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        if trainer.global_step >= self.first and pl_module.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() / 2**30)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.marks.append(mark(pl_module.device))
        self.milliseconds = statistics.mean(spans(self.marks))


def mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def spans(marks: list[Any]) -> list[float]:
    if not isinstance(marks[0], float):
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    return [1e3 * (b - a) for a, b in itertools.pairwise(marks)]


def interval(blocks: list[float]) -> float:
    """Half the width of the 95% interval of the blocks' mean, by Student's t."""
    freedom = min(len(blocks) - 1, len(T_975))
    if not freedom or math.isnan(sum(blocks)):
        return math.nan
    return T_975[freedom - 1] * statistics.stdev(blocks) / math.sqrt(len(blocks))


def write_text(path: Path, num_documents: int) -> None:
    """Writes text with enough different words for a tokenizer; its content does not affect times."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(20000)]
    with open(path, "w", encoding="utf-8") as out:
        for _ in range(num_documents):
            out.write(json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(50, 1500)))}) + "\n")


def save_model(size: tuple[int, int], vocab: int, block: int, folder: Path, head_dim: int = 64) -> None:
    """Saves a model with random weights as a Hugging Face folder."""
    config = sizes(*size, vocab, head_dim) | {"max_position_embeddings": block}
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    # on a CPU, torch 2.11 draws bf16 four times slower than fp32: two minutes for 1.5B
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        build_fresh(ModelSpec(config=config, dtype=dtype), None, 0).save_pretrained(folder)


def settings_of(name: str, folder: Path) -> dict[str, Any]:
    """Settings of a fit of one size; also writes its text and teacher."""
    pair = PAIRS[name]
    text = folder / "text.jsonl"
    if not text.exists():
        write_text(text, 200 if name == "tiny" else 6000)
    on_gpu = torch.cuda.is_available()
    settings = {
        "data.source": text, "data.cache_dir": folder / "cache", "data.vocab_size": min(8192, pair.vocab),
        "data.block_size": pair.block, "data.global_batch_size": pair.rows, "data.micro_batch_size": pair.rows,
        "data.num_workers": 2, "trainer.precision": pair.precision, "trainer.accelerator": "gpu" if on_gpu else "cpu",
        "trainer.limit_val_batches": 0, "trainer.enable_progress_bar": "false", "model.compile": json.dumps(on_gpu),
        "kd.weight": WEIGHT, "kd.allow_untrained": "true", "model.teacher.path": folder / name / "teacher",
        "model.optim.warmup_steps": 0, "model.optim.lr": 1e-4,  # a config's warm-up is longer than these runs
    }  # fmt: skip
    if pair.config is None:
        settings["model.student.config"] = json.dumps(sizes(*pair.student, pair.vocab, pair.head_dim))
    else:
        settings["config"] = config = Path(__file__).parents[1] / pair.config
        student = yaml.safe_load(config.read_text())["model"]["student"]["config"]
        settings["model.student.config"] = json.dumps(student | {"vocab_size": pair.vocab})  # replaced as a whole
    if pair.precision == "bf16-true":
        settings["model.student.dtype"] = "bfloat16"
    save_model(pair.teacher, pair.vocab, pair.block, folder / name / "teacher", pair.head_dim)
    return settings


def boundary(name: str, folder: Path, save: Callable[[dict[str, Any]], None]) -> None:
    """Alternates fits of a few steps with a teacher and a block without it, and fits of BASELINE; saves after each
    pair."""
    pair, settings = PAIRS[name], settings_of(name, folder)
    first = min(20, pair.steps)
    own = {"trainer.max_steps": first + pair.steps, "kd.steps": first // 2}
    found: dict[str, list[After]] = {"after": [], "baseline": []}
    for turn in range(2 if name == "tiny" else FITS):
        if pair.config is not None:
            torch.compiler.reset()  # with activation checkpointing each fit compiles anew; after eight, Dynamo gives up
        for kind in list(found)[:: 1 if turn % 2 == 0 else -1]:  # so that drift of the GPU cancels
            found[kind].append(After(first))
            without = {"kd.weight": 0.0} if kind == "baseline" else {}
            run_fit(settings | own | without | {"run": folder / name / f"{kind}{turn}"}, [found[kind][-1]])
        after, baseline = ([seen.milliseconds for seen in each] for each in found.values())
        ratios = [a / b for a, b in zip(after, baseline, strict=True)]
        save({
            "size": name, "after_ms": statistics.mean(after), "baseline_ms": statistics.mean(baseline),
            "ratio": statistics.mean(ratios), "interval": interval(ratios), "pairs": len(ratios),
            **{f"{kind}_gib": max(seen.peak for seen in each) for kind, each in found.items()},
        })  # fmt: skip


def measure(name: str, folder: Path, loops: Sequence[str], save: Callable[[dict[str, Any]], None]) -> None:
    """Measures one size: a teacher, and the alternating run by command line; saves what is known after each round."""
    pair, settings = PAIRS[name], settings_of(name, folder)
    settings |= {"run": folder / name / "student", "trainer.max_steps": pair.steps * BLOCKS, "kd.steps": "null"}

    def done(alternate: Alternate, module: Any) -> None:
        save(result_of(name, alternate, module))

    run_fit(settings, [Alternate(pair.steps, min(10, pair.steps // 3), done, loops)])


def result_of(name: str, alternate: Alternate, module: Any) -> dict[str, Any]:
    kd, plain = alternate.blocks("kd"), alternate.blocks("plain")
    forward = module.meter.forward_flops
    tokens = PAIRS[name].rows * PAIRS[name].block
    student_flops, teacher_flops = flops.student_flops(forward["student"], tokens), forward["teacher"] * tokens
    result = {
        "size": ", ".join([name, *slow_paths(module)]),
        "kd_ms": statistics.mean(kd), "plain_ms": statistics.mean(plain), "tokens": tokens,
        "kd_interval": interval(kd), "plain_interval": interval(plain),
        "flop_ratio": 1 + teacher_flops / student_flops, "student_flops": student_flops,
        "peak_kd_gib": alternate.peaks.get("kd", math.nan), "peak_plain_gib": alternate.peaks.get("plain", math.nan),
        "wait_share": alternate.wait_share(),
        "kd_host_ms": alternate.host_ms("kd"), "plain_host_ms": alternate.host_ms("plain"),
    }  # fmt: skip
    for kind, turns in alternate.loops.milliseconds.items() if alternate.loops else ():
        if not turns:  # it has not had its first turn
            continue
        turns = turns[-len(plain) :]  # those after the counted plain blocks
        ratios = [a / b for a, b in zip(plain, turns, strict=True)]
        result |= {f"{kind}_ms": statistics.mean(turns), f"plain_to_{kind}": statistics.mean(ratios)}
        result[f"plain_to_{kind}_interval"] = interval(ratios)
    return result


def slow_paths(module: Any) -> list[str]:
    """What a run on a GPU does without, so that its times are not taken for those of the fast path."""
    if not torch.cuda.is_available():
        return []
    masked = module.student.apart != "packed" and "bf16" in module.trainer.precision
    rows = "without the Triton row pass" if chunked_head._triton_rows() is None else ""
    return list(filter(None, (rows, "with an attention mask" if masked else "")))


@contextmanager
def whole_heads() -> Iterator[None]:
    """Does not cut a teacher's head to the tokenizer's ids: the tokenizer is small here, to be trained quickly."""
    with patch.object(CausalLM, "num_ids", property(lambda lm: None, lambda lm, ids: None)):
        yield


@contextmanager
def drawn_on_gpu() -> Iterator[None]:
    """Draws fresh students on the GPU if there is one: on the CPU, 2.8B take minutes."""

    def fresh(*args: Any) -> Any:
        with torch.device("cuda"):
            model = build_fresh(*args).cpu()
        torch.cuda.empty_cache()
        return model

    with patch.object(models, "build_fresh", fresh) if torch.cuda.is_available() else nullcontext():
        yield


def run_fit(settings: dict[str, Any], callbacks: list[pl.Callback]) -> Any:
    """Runs `cli.py fit` in this process; returns its module. With callbacks it saves no checkpoint: 16 GB for 1.3b."""
    kept: list[Any] = []

    class Observed(cli.SALTCLI):
        def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
            trainer = super().instantiate_trainer(**kwargs)
            own: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
            own[:] = [c for c in own if not (callbacks and isinstance(c, RunCheckpoint))] + callbacks
            return trainer

        def before_fit(self) -> None:
            super().before_fit()
            kept.append(self.model)

    original, cli.SALTCLI = cli.SALTCLI, Observed  # type: ignore[misc]
    try:
        with whole_heads(), drawn_on_gpu():
            code = cli.main(["fit", *(f"--{key}={value}" for key, value in settings.items())])
    finally:
        cli.SALTCLI = original  # type: ignore[misc]
    if code != 0:
        raise SystemExit(code)
    return kept[0]


def chunks(case: Case) -> torch.Tensor:
    """Like torchtune: the model's logits in bf16, the loss in eight chunks of tokens, each in fp32."""
    s_NV, t_NV = case.hidden_ND @ case.head_VD.T, case.teacher_hidden_NE @ case.teacher_head_VE.T
    parts = zip(s_NV.chunk(8), t_NV.chunk(8), case.labels_N.chunk(8), strict=True)
    losses = [full_loss(s.float(), t.float(), replace(case, labels_N=labels)) for s, t, labels in parts]
    return torch.stack(losses).mean()


def transformers_loss(student: CausalLM, recompute: bool) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """transformers' own model with its own loss, compiled as a whole; called with ids_BT and shifted labels_BT.

    It holds the student's own Parameters, so it needs no memory for weights and no second optimizer. Its attention is
    transformers' sdpa, causal over whole rows: documents see each other. As it comes, a compiled model builds a mask of
    T x T at every step, which keeps sdpa from flash attention; a registered mask function that builds none is faster.
    """
    AttentionInterface.register("causal_sdpa", sdpa_attention_forward)
    AttentionMaskInterface.register("causal_sdpa", lambda *_, **__: None)
    own = student.model
    with own.device, no_init_weights():  # not on meta: rotary frequencies are in no state dict
        model = from_config(deepcopy(own.config), dtype=own.dtype, attn_implementation="causal_sdpa").train()
    model.load_state_dict(own.state_dict(keep_vars=True), assign=True)
    if recompute:  # the name in newer versions of transformers, and in older ones
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()

    def loss(ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids_BT, labels=labels_BT, shift_labels=labels_BT, use_cache=False).loss

    return torch.compile(loss, dynamic=False) if own.device.type == "cuda" else loss


def whole_rows(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch as if each row were one document; its labels stay."""
    positions_BT = torch.arange(batch["positions"].shape[1]).expand(batch["positions"].shape).contiguous()
    cu_seqlens = torch.from_numpy(document_borders(positions_BT.numpy()))
    device = batch["positions"].device
    return batch | {"positions": positions_BT.to(device), "cu_seqlens": cu_seqlens.to(device)}


class Loops:
    """Hand-written loops over the model, optimizer and batches of a fit, in its process, between its steps.

    Plain: `hand`, our loss without Lightning; `full_logits`, compiled cross-entropy over all logits at once, behind the
    same compiled model; `transformers`, its own model and loss. KD: `kd_hand`, our loss; `kd_full`, all logits of both
    models, compiled, as in scripts on top of Hugging Face; `kd_chunks`; `kd_liger`. `milliseconds`: the mean step of
    each turn. A loop that does not fit, fails, or computes another loss has NaN from then on.
    """

    def __init__(
        self, module: Any, optimizer: torch.optim.Optimizer, batches: list[dict[str, Any]], wanted: Sequence[str]
    ) -> None:
        self.module, self.optimizer, self.batches = module, optimizer, batches
        self.student, self.teacher, self.device = module.student, module.teacher, module.device
        self.low = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.in_fit = module.trainer.precision_plugin.train_step_context  # in another global state all compiles anew

        def full_plain(hidden_ND: Any, head_VD: Any, labels_N: Any) -> Any:
            return cross_entropy((hidden_ND @ head_VD.T).float(), labels_N)

        full_kd = naive
        if self.device.type == "cuda":
            full_plain, full_kd = torch.compile(full_plain), torch.compile(naive, dynamic=False)
        # None: our own loss, or see _check
        losses: dict[str, Any] = {
            "full_logits": full_plain, "kd_full": full_kd, "kd_chunks": chunks, "kd_liger": liger,
        }  # fmt: skip
        self.ways: dict[str, Any] = {kind: losses.get(kind) for kind in LOOPS if kind in wanted}
        self.milliseconds: dict[str, list[float]] = {kind: [] for kind in self.ways}
        self.turns = 0
        self.failed: set[str] = set()

    def take_turn(self, steps: int, done: Callable[[], None]) -> None:
        """Each loop makes a few steps, every second time in the opposite order; then calls `done`.

        In the first turn each is checked and compiles, which together takes minutes, in which the deadline may pass. So
        there it calls `done` after each.
        """
        of_next_step = self.module.kd_weight.clone()
        self.module.kd_weight.fill_(WEIGHT)
        self.optimizer.zero_grad(set_to_none=True)  # the fit does so later, when it needs gradients
        for kind in list(self.ways)[:: 1 if self.turns % 2 == 0 else -1]:
            if self.turns == 0:
                self._attempt(kind, self._check)
            self.milliseconds[kind].append(self._attempt(kind, partial(self._run, steps=steps)))
            if self.turns == 0:
                done()
        self.turns += 1
        self.module.kd_weight.copy_(of_next_step)
        done()

    def _attempt(self, kind: str, call: Callable[[str], float]) -> float:
        """Calls for a loop that has not failed; leaves no memory of it to the next one and to the fit."""
        found = math.nan
        if kind not in self.failed:
            try:
                found = call(kind)
            except Exception as error:
                print(f"{kind}: {named(error)}", file=sys.stderr)
                self.failed.add(kind)
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                gc.collect()  # tracebacks and compiled modules are in cycles
                torch.cuda.empty_cache()
        return found

    def _check(self, kind: str) -> float:
        """Returns the loop's loss; raises ValueError if it or its gradient is not ours. 16-bit logits explain less than
        these tolerances. The loss alone would not show wrong labels: the models know little more than frequencies."""
        batch = self.batches[0]
        if kind == "transformers":
            self.ways[kind] = transformers_loss(self.student, self.module.hparams["activation_checkpointing"])
        # transformers' model does not see where documents end
        alike = whole_rows(batch) if kind == "transformers" else batch
        same_as, own_grad_D, entropy = self._values(alike, "kd_hand" if kind.startswith("kd") else "hand")
        found, grad_D, _ = self._values(batch, kind)
        if kind == "kd_liger":  # its soft term is the KL, which has the same gradient
            same_as -= WEIGHT * entropy
        off = ((grad_D - own_grad_D).norm() / own_grad_D.norm()).item()
        if not (abs(found - same_as) <= 0.02 * same_as and off <= 0.1):
            raise ValueError(f"computes {found:.4f}, ours is {same_as:.4f}; gradients differ by {off:.1%}")
        return found

    def _values(self, batch: dict[str, Any], kind: str) -> tuple[float, torch.Tensor, float]:
        """A loop's loss, its gradient for the last norm's weights, and the teacher's entropy in nats per token."""
        out = self._loss_on(batch, kind)
        loss = getattr(out, "loss", out)  # our loss comes with its sums
        loss.backward()
        norm_D = [p for p in self.student.parameters() if p.ndim == 1][-1]
        grad_D = norm_D.grad.float().clone()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item(), grad_D, 0.0 if out is loss else (out.teacher_entropy_sum / out.tokens).item()

    def _run(self, kind: str, steps: int) -> float:
        """Milliseconds per step of a turn, without the first steps, which refill caches."""
        marks = []
        for number in range(steps):
            marks.append(mark(self.device))
            loss = self._loss_on(self.batches[number % len(self.batches)], kind)
            getattr(loss, "loss", loss).backward()
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        marks.append(mark(self.device))
        return statistics.mean(spans(marks)[steps // 3 :])

    def _loss_on(self, batch: dict[str, Any], kind: str) -> Any:
        inputs, teacher_out = (batch["input_ids"], batch["positions"]), None
        with self.in_fit():
            if kind == "transformers":
                torch.set_default_dtype(torch.float32)  # as in its own loop; the fit's context, around this, resets it
                return self.ways[kind](batch["input_ids"], batch["labels"])
            if kind.startswith("kd"):
                with torch.no_grad():
                    teacher_out = self.teacher(*inputs, cu_seqlens=batch["cu_seqlens"])
            then = partial(self._head_loss, kind, batch["labels"].flatten(), teacher_out)
            return self.student(*inputs, then, batch["cu_seqlens"])

    def _head_loss(self, kind: str, labels_N: Any, teacher_out: Any, *own: Any) -> Any:
        if self.ways.get(kind) is None:
            return self.module.step_loss(labels_N, teacher_out, (labels_N >= 0).sum().float(), *own)
        torch.set_default_dtype(torch.float32)  # for a rival's sums, as above
        hidden_ND, head_VD = (t.to(self.low) for t in own[:2])
        if teacher_out is None:
            return self.ways[kind](hidden_ND, head_VD, labels_N)
        th, tw = (t.to(self.low) for t in teacher_out[:2])
        return self.ways[kind](Case(hidden_ND, head_VD, labels_N, th, tw, WEIGHT))


def matrix_rates() -> tuple[float, float]:
    """FLOP/s of bf16 products of 8192 cubed, in a burst and after two seconds: clocks fall under load."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for count in (30, 1500, 200):
        marks = []
        for _ in range(count):
            marks.append(mark(a.device))
            a @ b
        marks.append(mark(a.device))
        rates.append(2 * 8192**3 / (statistics.median(spans(marks)[5:]) / 1e3))
    return rates[0], rates[2]


def heading() -> str:
    return (
        "| size | KD ms | plain ms | KD / plain | FLOP ratio | x ideal | plain / hand loop | plain / full logits | "
        "plain / transformers | KD with full logits, chunks, Liger / ours | MFU relative to the matrix rate under "
        "load, in a burst (TFLOP/s), the vendor's peak | tokens/s KD / plain | loader wait | "
        "host ms KD / plain | peak GiB KD / plain |\n|---" + "|---:" * 14 + "|"
    )


def line(measured: dict[str, Any]) -> str:
    r = defaultdict(lambda: math.nan, measured)
    fastest = min(r["plain_ms"], r["full_logits_ms"]) if r["full_logits_ms"] > 0 else r["plain_ms"]
    ratio = r["kd_ms"] / fastest
    rate = r["student_flops"] / (r["plain_ms"] / 1e3)
    used = [f"{rate / r[peak]:.1%} of {r[peak] / 1e12:.0f}" for peak in ("steady", "burst", "peak")]
    loops = " | ".join(f"{r[f'plain_to_{way}']:.3f} ± {r[f'plain_to_{way}_interval']:.3f}" for way in PLAIN_WAYS)
    rivals = ", ".join(f"{r[f'kd_{way}_ms'] / r['kd_hand_ms']:.2f}" for way in ("full", "chunks", "liger"))
    return (
        f"| {r['size']} | {r['kd_ms']:.2f} ± {r['kd_interval']:.2f} "
        f"| {r['plain_ms']:.2f} ± {r['plain_interval']:.2f} "
        f"| {ratio:.3f} | {r['flop_ratio']:.3f} | {ratio / r['flop_ratio']:.3f} "
        f"| {loops} | {rivals} "
        f"| {', '.join(used)} | {1e3 * r['tokens'] / r['kd_ms']:,.0f} / {1e3 * r['tokens'] / r['plain_ms']:,.0f} "
        f"| {r['wait_share']:.2%} | {r['kd_host_ms']:.2f} / {r['plain_host_ms']:.2f} "
        f"| {r['peak_kd_gib']:.2f} / {r['peak_plain_gib']:.2f} |"
    )


BOUNDARY_HEADING = (
    "| size | plain step after the boundary, ms | BASELINE step, ms | ratio, 95% | peak GiB after it / BASELINE |\n"
    "|---|---:|---:|---:|---:|"
)


def boundary_line(r: dict[str, Any]) -> str:
    return (
        f"| {r['size']} | {r['after_ms']:.2f} | {r['baseline_ms']:.2f} "
        f"| {r['ratio']:.4f} ± {r['interval']:.4f} ({r['pairs']} pairs) "
        f"| {r['after_gib']:.2f} / {r['baseline_gib']:.2f} |"
    )


def line_of(size: str, folder: Path, left_s: float, at_boundary: bool, loops: Sequence[str]) -> str:
    """Measures a size in a separate process, so that its memory is free for the next; returns the table's line."""
    target = folder / f"{size}.json"
    command = [sys.executable, __file__, "--sizes", size, "--json", str(target), *["--boundary"] * at_boundary]
    command += ["--loops", *loops]
    try:
        subprocess.run(command, check=True, stdout=sys.stderr, timeout=left_s)
    except subprocess.TimeoutExpired:
        if not target.exists():
            return f"| {size} | skipped: the deadline has passed |"
    except subprocess.CalledProcessError as error:
        return f"| {size} | FAILED with exit code {error.returncode} |"
    return (boundary_line if at_boundary else line)(json.loads(target.read_text()))


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=PAIRS, default=["124m", "350m"])
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights, on any machine")
    parser.add_argument(
        "--boundary", action="store_true", help="compare the plain phase after a boundary with BASELINE"
    )
    parser.add_argument("--loops", nargs="*", choices=LOOPS, default=LOOPS, help="only these hand-written loops")
    parser.add_argument("--deadline", type=float, default=480, help="seconds after which the current run is stopped")
    parser.add_argument(
        "--json", type=Path, help="measure one size and write its result here, with its files beside it"
    )
    args = parser.parse_args()
    if args.json:
        on_gpu = torch.cuda.is_available()
        burst, steady = matrix_rates() if on_gpu else (math.nan, math.nan)
        peak = flops.peak_of(torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16, 1) or math.nan
        rates = {"burst": burst, "steady": steady, "peak": peak}

        def save(result: dict[str, Any]) -> None:
            with whole(args.json) as file:  # the deadline can pass at any time
                file.write(json.dumps(result | rates).encode())

        if args.boundary:
            boundary(args.sizes[0], args.json.parent, save)
        else:
            measure(args.sizes[0], args.json.parent, args.loops, save)
        return
    print(f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, torch {torch.__version__}\n")
    print(BOUNDARY_HEADING if args.boundary else heading(), flush=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for size in ["tiny"] if args.tiny else args.sizes:
            left_s = args.deadline - (time.monotonic() - start)
            print(line_of(size, Path(folder), left_s, args.boundary, args.loops), flush=True)


if __name__ == "__main__":
    main()
