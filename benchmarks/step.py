"""What a training step costs, through `cli.py fit`: KD against plain, against a hand-written loop, and memory.

    python benchmarks/step.py --sizes 124m 350m       one GPU; what is not done after 8 minutes (--deadline) is left out
    python benchmarks/step.py --tiny                  any CPU, seconds: shows that it runs

One process a size, whose own output goes to stderr. Blocks of KD and plain steps alternate, so that drift of the card
cancels; a step's time is the median over all blocks, its 95% interval comes from the medians of the blocks. Ratios are
the claim, not times. The teacher's weights are random: what a step costs does not depend on them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parents[1]))
from head_loss import named

from salt_lightning import cli, flops
from salt_lightning.checkpoint import RunCheckpoint
from salt_lightning.models import build_fresh
from salt_lightning.spec import ModelSpec

BLOCKS = 8  # KD and plain in turn
T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36)  # of 1, 2 ... degrees of freedom


@dataclass(frozen=True)
class Pair:
    """Student and teacher (width, layers), vocabulary, rows of a step; what the student needs to fit a card.

    `steps`: of a block of steps with or without the teacher; fewer where a step takes long.
    """

    student: tuple[int, int]
    teacher: tuple[int, int]
    vocab: int = 50304
    rows: int = 8
    block: int = 1024
    precision: str = "bf16-mixed"
    steps: int = 100


PAIRS = {
    "124m": Pair((768, 12), (512, 8)),
    "350m": Pair((1024, 24), (768, 18)),
    "1.3b": Pair((2048, 24), (1536, 20), steps=20),
    "2.8b": Pair((2560, 28), (2048, 19), vocab=256000, precision="bf16-true", steps=20),
    "tiny": Pair((64, 2), (32, 2), vocab=512, rows=2, block=64, precision="32-true", steps=6),
}


def sizes(width: int, layers: int, vocab: int) -> dict[str, Any]:
    """A llama of GPT-2's proportions: heads of 64, an MLP of 8/3 of the width."""
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": max(1, width // 64),
        "intermediate_size": -(-width * 8 // 3 // 64) * 64, "vocab_size": vocab, "tie_word_embeddings": True,
    }  # fmt: skip


class Alternate(pl.Callback):
    """Takes the teacher away and brings it back every `block` steps, and times each optimizer step."""

    def __init__(self, block: int, skip: int) -> None:
        self.block, self.skip = block, skip
        self.marks: list[Any] = []
        self.kinds: list[str] = []
        self.peaks: dict[str, float] = {}
        self._teacher: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._teacher = self._teacher or pl_module.teacher
        taught = (trainer.global_step // self.block) % 2 == 0
        pl_module.__dict__["teacher"] = self._teacher if taught else None
        if not taught:
            pl_module.kd_weight.zero_()
        if trainer.global_step % self.block == self.skip and pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.kinds.append("kd" if taught else "plain")
        self.marks.append(mark(pl_module.device))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        # Not after the step: a logged one starts the peak anew (SALTModule._log_step).
        if trainer.global_step % self.block >= self.skip and pl_module.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
            self.peaks[self.kinds[-1]] = max(peak, self.peaks.get(self.kinds[-1], 0))

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.marks.append(mark(pl_module.device))
        self.milliseconds = spans(self.marks)
        pl_module.__dict__["teacher"] = self._teacher

    def blocks(self, kind: str) -> list[float]:
        """Median step of each block of a kind, ms, without the steps that compile or refill."""
        found = []
        for start in range(0, len(self.milliseconds), self.block):
            block = self.milliseconds[start : start + self.block][self.skip :]
            if self.kinds[start] == kind and block:
                found.append(statistics.median(block))
        return found[1:] if len(found) > 2 else found


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
    """Half width of the 95% interval of the mean of blocks, by Student's t."""
    freedom = min(len(blocks) - 1, len(T_975))
    return T_975[freedom - 1] * statistics.stdev(blocks) / math.sqrt(len(blocks)) if freedom else math.nan


def write_text(path: Path, num_documents: int) -> None:
    """Text with enough different words for a tokenizer; what it says does not matter for time."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(20000)]
    with open(path, "w", encoding="utf-8") as out:
        for _ in range(num_documents):
            out.write(json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(50, 1500)))}) + "\n")


def save_model(size: tuple[int, int], vocab: int, block: int, folder: Path) -> None:
    """A model of random weights as a Hugging Face folder."""
    config = sizes(*size, vocab) | {"max_position_embeddings": block}
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    build_fresh(ModelSpec(config=config, dtype=dtype), None, 0).save_pretrained(folder)


def measure(name: str, folder: Path) -> dict[str, Any]:
    """One size: a teacher, the alternating run through the command line, the loops beside it."""
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
        "run": folder / name / "student", "trainer.max_steps": pair.steps * BLOCKS, "kd.weight": 0.667,
        "kd.allow_untrained": "true", "model.teacher.path": folder / name / "teacher",
        "model.student.config": json.dumps(sizes(*pair.student, pair.vocab)),
    }  # fmt: skip
    if pair.precision == "bf16-true":
        settings["model.student.dtype"] = "bfloat16"
    save_model(pair.teacher, pair.vocab, pair.block, folder / name / "teacher")
    alternate = Alternate(pair.steps, skip=min(10, pair.steps // 3))
    module = run_fit(settings, [alternate])
    kd, plain = alternate.blocks("kd"), alternate.blocks("plain")
    loops = own_loops(module, pair, min(pair.steps, 60))
    forward = module.meter.forward_flops
    tokens = pair.rows * pair.block
    student_flops, teacher_flops = flops.student_flops(forward["student"], tokens), forward["teacher"] * tokens
    wait_s = module.trainer.datamodule.data_wait_s
    return {
        "size": name, "kd_ms": statistics.median(kd), "plain_ms": statistics.median(plain),
        "kd_interval": interval(kd), "plain_interval": interval(plain), **loops,
        "flop_ratio": 1 + teacher_flops / student_flops, "student_flops": student_flops,
        "peak_kd_gib": alternate.peaks.get("kd", math.nan), "peak_plain_gib": alternate.peaks.get("plain", math.nan),
        "wait_share": 1e3 * wait_s / sum(alternate.milliseconds),
    }  # fmt: skip


def run_fit(settings: dict[str, Any], callbacks: list[pl.Callback]) -> Any:
    """`cli.py fit` in this process; returns its module. With callbacks it saves no checkpoint: of 1.3b it is 16 GB."""
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
        code = cli.main(["fit", *(f"--{key}={value}" for key, value in settings.items())])
    finally:
        cli.SALTCLI = original  # type: ignore[misc]
    if code != 0:
        raise SystemExit(code)
    return kept[0]


def own_loops(module: Any, pair: Pair, steps: int) -> dict[str, float]:
    """Hand-written loops over the same compiled student in the same process, ms a step.

    `hand`: our plain loss, no Lightning. `full_logits`: compiled cross-entropy over all logits at once. nan where
    it does not fit, or fails.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # a fit leaves its module on the CPU
    student = module.student.to(device).train()
    loader = module.trainer.datamodule.train_dataloader()
    loader.start = lambda: 0
    batches = [{k: v.to(device) for k, v in batch.items()} for batch, _ in zip(loader, range(8), strict=False)]
    optimizer = module.optim_spec.build(student.named_parameters())
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=pair.precision == "bf16-mixed", cache_enabled=False)

    def full(hidden_ND: Any, head_VD: Any, labels_N: Any) -> Any:
        return cross_entropy((hidden_ND @ head_VD.to(hidden_ND.dtype).T).float(), labels_N)

    full = torch.compile(full) if device.type == "cuda" else full

    def step(batch: dict[str, Any], kind: str) -> None:
        labels_N = batch["labels"].flatten()

        def hand(h: Any, w: Any, b: Any) -> Any:
            return module._loss(h, w, labels_N).loss

        def full_logits(h: Any, w: Any, b: Any) -> Any:
            return full(h.to(torch.bfloat16) if device.type == "cuda" else h, w, labels_N)

        then = hand if kind == "hand" else full_logits
        with mixed:
            loss = student(batch["input_ids"], batch["positions"], then, batch["cu_seqlens"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    result = {}
    for kind in ("hand", "full_logits"):
        try:
            marks = []
            for number in range(steps):
                marks.append(mark(device))
                step(batches[number % len(batches)], kind)
            marks.append(mark(device))
            result[f"{kind}_ms"] = statistics.median(spans(marks)[min(10, steps // 3) :])
        except Exception as error:
            print(f"{kind}: {named(error)}", file=sys.stderr)
            result[f"{kind}_ms"] = math.nan
    return result


def matrix_rate() -> float:
    """FLOP/s of a bf16 product of 8192 cubed: the ceiling that this card really has."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    marks = []
    for _ in range(30):
        marks.append(mark(a.device))
        a @ b
    marks.append(mark(a.device))
    return 2 * 8192**3 / (statistics.median(spans(marks)[5:]) / 1e3)


def line(r: dict[str, Any]) -> str:
    fastest = min(r["plain_ms"], r["full_logits_ms"]) if r["full_logits_ms"] > 0 else r["plain_ms"]
    ratio = r["kd_ms"] / fastest
    return (
        f"| {r['size']} | {r['kd_ms']:.2f} ± {r['kd_interval']:.2f} "
        f"| {r['plain_ms']:.2f} ± {r['plain_interval']:.2f} "
        f"| {ratio:.3f} | {r['flop_ratio']:.3f} | {ratio / r['flop_ratio']:.3f} "
        f"| {r['plain_ms'] / r['hand_ms']:.3f} | {r['plain_ms'] / r['full_logits_ms']:.3f} "
        f"| {r['student_flops'] / (r['plain_ms'] / 1e3) / r['rate']:.1%} of {r['rate'] / 1e12:.0f} "
        f"| {r['wait_share']:.2%} | {r['peak_kd_gib']:.2f} / {r['peak_plain_gib']:.2f} |"
    )


def line_of(size: str, folder: Path, left_s: float) -> str:
    """Of a process of its own: the memory of one size must not stay for the next."""
    target = folder / f"{size}.json"
    command = [sys.executable, __file__, "--sizes", size, "--json", str(target)]
    try:
        subprocess.run(command, check=True, stdout=sys.stderr, timeout=left_s)
    except subprocess.TimeoutExpired:
        return f"| {size} | left out: the deadline has passed |"
    except subprocess.CalledProcessError as error:
        return f"| {size} | FAILED with exit code {error.returncode} |"
    return line(json.loads(target.read_text()))


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=PAIRS, default=["124m", "350m"])
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights, on any machine")
    parser.add_argument("--deadline", type=float, default=480, help="seconds after which what runs is stopped")
    parser.add_argument("--json", type=Path, help="measure one size and write its result here, beside its files")
    args = parser.parse_args()
    if args.json:
        result = measure(args.sizes[0], args.json.parent)
        result["rate"] = matrix_rate() if torch.cuda.is_available() else math.nan
        args.json.write_text(json.dumps(result))
        return
    print(f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, torch {torch.__version__}\n")
    print(
        "| size | KD ms | plain ms | KD / plain | FLOP ratio | x ideal | plain / hand loop | plain / full logits |"
        " MFU of the measured matrix rate, TFLOP/s | loader wait | peak GiB KD / plain |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        flush=True,
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for size in ["tiny"] if args.tiny else args.sizes:
            print(line_of(size, Path(folder), args.deadline - (time.monotonic() - start)), flush=True)


if __name__ == "__main__":
    main()
