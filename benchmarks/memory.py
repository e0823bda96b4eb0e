"""The estimate of `cli.py check` compared with the memory of real short runs, in both phases.

    python benchmarks/memory.py --sizes 124m 350m            one GPU; a minute or two for each size, 1.3b alone
    python benchmarks/memory.py --cpu                        CPU, some minutes: many settings, small models
    python benchmarks/memory.py --cpu --sizes ddp fsdp2      only these
    python benchmarks/memory.py --tiny                       any CPU, seconds: shows that it runs

Runs `cli.py fit` with a teacher of about half the student's size, one process per row, or two that train together: then
the first one's memory is measured. The measure is torch.cuda.max_memory_allocated on a GPU, and torch's memory profiler
on a CPU. Both cover the steps after the first, which creates AdamW's state.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from head_loss import allocated

from benchmarks.step import PAIRS, run_fit, sizes, write_text
from salt_lightning import memory, parallel
from salt_lightning.hugging_face.spec import fresh_config
from salt_lightning.models import CausalLM, load_pretrained

SMALL = {"student": (256, 4), "teacher": (128, 3), "vocab": 4096, "rows": 4, "block": 256}
EXPERTS = {
    "family": "qwen3_moe",
    "more": {"moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2},
}
ROWS: dict[str, dict[str, Any]] = {
    name: {"student": PAIRS[name].student, "teacher": PAIRS[name].teacher, "vocab": PAIRS[name].vocab, "block": 1024,
           "rows": rows, "precision": "bf16-mixed", "compile": True}
    for name, rows in (("124m", 32), ("350m", 16), ("1.3b", 8))
}  # fmt: skip
ROWS |= {f"{name}, eager": {**ROWS[name], "compile": False} for name in ("124m", "350m", "1.3b")}
ROWS |= {f"{name}, recomputed": {**ROWS[name], "recompute": True} for name in ("124m", "350m", "1.3b")}
CPU: dict[str, dict[str, Any]] = {
    "fp32": SMALL,
    "fp32, compiled": {**SMALL, "compile": True},
    "fp32, recomputed": {**SMALL, "recompute": True},
    "fp32, recomputed, compiled": {**SMALL, "recompute": True, "compile": True},
    "bf16": {**SMALL, "precision": "bf16-mixed"},
    "bf16, compiled": {**SMALL, "precision": "bf16-mixed", "compile": True},
    "bf16, recomputed": {**SMALL, "precision": "bf16-mixed", "recompute": True},
    "bf16, recomputed, compiled": {**SMALL, "precision": "bf16-mixed", "recompute": True, "compile": True},
    "fp32, 16 rows": {**SMALL, "rows": 16},
    "fp32, 16 rows, compiled": {**SMALL, "rows": 16, "compile": True},
    "bf16, 16 rows, compiled": {**SMALL, "rows": 16, "precision": "bf16-mixed", "compile": True},
    "fp32, accumulation 2": {**SMALL, "accumulate": 2},
    "fp32, accumulation 2, compiled": {**SMALL, "accumulate": 2, "compile": True},
    "fp32, untied": {**SMALL, "tied": False},
    "fp32, gpt2": {**SMALL, "family": "gpt2"},
    "fp32, experts": {**SMALL, **EXPERTS},
    "bf16, experts": {**SMALL, **EXPERTS, "precision": "bf16-mixed"},
    "bf16, experts, compiled": {**SMALL, **EXPERTS, "precision": "bf16-mixed", "compile": True},
    "fp32, wide and deep": {**SMALL, "student": (512, 8), "teacher": (256, 6)},
    "fp32, wide and deep, compiled": {**SMALL, "student": (512, 8), "teacher": (256, 6), "compile": True},
}
DEEP: dict[str, Any] = {**SMALL, "student": (512, 8), "teacher": (256, 6), "devices": 2}
FSDP2: dict[str, Any] = {"trainer.strategy": "salt_lightning.parallel.FSDP2"}
HYBRID = {**FSDP2, "trainer.strategy.replicas": 2}
CPU |= {
    "ddp": {**DEEP, "settings": {"trainer.strategy": "ddp"}},
    "ddp, accumulation 2": {**DEEP, "settings": {"trainer.strategy": "ddp"}, "accumulate": 2},
    "fsdp2": {**DEEP, "settings": FSDP2},
    "fsdp2, bf16": {**DEEP, "settings": FSDP2, "precision": "bf16-mixed"},
    "fsdp2, bf16, recomputed": {**DEEP, "settings": FSDP2, "precision": "bf16-mixed", "recompute": True},
    "fsdp2, accumulation 2": {**DEEP, "settings": FSDP2, "accumulate": 2},
    "fsdp2, untied": {**DEEP, "settings": FSDP2, "tied": False},
    "fsdp2, 2 replicas": {**DEEP, "settings": HYBRID},
    "fsdp2, 2 replicas, accumulation 2": {**DEEP, "settings": HYBRID, "accumulate": 2},
    "fsdp2, 2 replicas, recomputed": {**DEEP, "settings": HYBRID, "recompute": True},
    "fsdp2, 2 replicas, recomputed, accumulation 2": {**DEEP, "settings": HYBRID, "recompute": True, "accumulate": 2},
    "fsdp2, whole teacher": {**DEEP, "settings": {**FSDP2, "trainer.strategy.shard_teacher": "false"}},
}
TINY = {"student": (128, 3), "teacher": (64, 2), "vocab": 512, "rows": 8, "block": 128}


class Measured(pl.Callback):
    """Finds the peak of the optimizer steps in bytes, with and without the teacher."""

    def __init__(self) -> None:
        # with the teacher or not; start and end in ns; bytes at the start
        self.steps: list[tuple[bool, int, int, int]] = []
        self.peaks: dict[bool, int] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        gc.collect()  # what is left of the start, in cycles
        self._taught, self._since, self._held = pl_module.teacher is not None, time.time_ns(), held(pl_module, batch)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        if trainer.global_step < 2:
            return
        if pl_module.device.type == "cuda":
            now = torch.cuda.max_memory_allocated()
            self.peaks[self._taught] = max(now, self.peaks.get(self._taught, 0))
        else:
            self.steps.append((self._taught, self._since, time.time_ns(), self._held))

    def read(self, profile: Any, sharded: bool) -> None:
        """Finds the peaks in the allocations that a CPU profile recorded.

        `sharded`: a profile does not see what gloo's threads free, so it drifts from step to step; what was held at a
        step's start is counted instead. So a peak is too high by what they have freed since, and too low by the shard
        of the teacher's root, which stays gathered.
        """
        drifts = dict.fromkeys(range(len(self.steps)), 0)
        for at_ns, now in allocated(profile):
            for number, (taught, since, until, at_start) in enumerate(self.steps):
                if at_ns <= since and sharded:
                    drifts[number] = now - at_start
                if since <= at_ns <= until:
                    self.peaks[taught] = max(now - drifts[number], self.peaks.get(taught, 0))


def held(module: Any, batch: dict[str, torch.Tensor]) -> int:
    """Bytes of the tensors that exist between two steps, on this device."""
    tensors: list[torch.Tensor] = [*batch.values()]
    for model in filter(None, (module.student, module.teacher)):
        tensors += [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    for state in module.optimizers().optimizer.state.values():
        tensors += state.values()
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


def measure(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    text = folder / "text.jsonl"
    if not text.exists():
        write_text(text, 600 if on_gpu else 300)  # a fit reads at most 9 steps of 32,768 tokens
    accumulate, family, devices = row.get("accumulate", 1), row.get("family", "llama"), row.get("devices", 1)
    common = {
        "data.source": text, "data.cache_dir": folder / "cache", "data.vocab_size": min(row["vocab"], 8192),
        "data.block_size": row["block"], "data.micro_batch_size": row["rows"],
        "data.global_batch_size": row["rows"] * accumulate * devices, "data.prepare_workers": 0 if on_gpu else 1,
        "trainer.accelerator": "gpu" if on_gpu else "cpu", "trainer.precision": row.get("precision", "32-true"),
        "trainer.limit_val_batches": 0, "trainer.enable_progress_bar": "false", "trainer.log_every_n_steps": 100,
        "checkpoint.every_n_steps": "null", "model.student.family": family, "trainer.devices": devices,
        **row.get("settings", {}),
    }  # fmt: skip

    def config(size: tuple[int, int]) -> str:
        plain = sizes(*size, row["vocab"]) | {"tie_word_embeddings": row.get("tied", True)}
        plain |= row.get("more", {})
        return json.dumps({k: v for k, v in plain.items() if family != "gpt2" or k != "intermediate_size"})

    own = {
        "run": folder / "teacher",
        "trainer.max_steps": 1,
        "kd.weight": 0,
        "model.student.config": config(row["teacher"]),
    }
    run_fit(common | own, [])
    measured = Measured()
    own = {
        "run": folder / "student", "trainer.max_steps": 8, "kd.steps": 4, "kd.allow_untrained": "true",
        "model.student.config": config(row["student"]), "model.compile": json.dumps(row.get("compile", False)),
        "model.activation_checkpointing": json.dumps(row.get("recompute", False)),
        "model.teacher.path": folder / "teacher/checkpoints/step-00000001.ckpt",
    }  # fmt: skip
    if on_gpu:
        module = run_fit(common | own, [measured])
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            module = run_fit(common | own, [measured])
        measured.read(profile, isinstance(module.trainer.strategy, parallel.FSDP2))
    start_s = time.process_time()
    estimates = estimate(module, row["rows"], "cuda" if on_gpu else "cpu")
    return {
        "estimates": [p.total for p in estimates], "measured": [measured.peaks[True], measured.peaks[False]],
        "estimate_s": time.process_time() - start_s,
    }  # fmt: skip


def estimate(module: Any, rows: int, device: str) -> list[memory.Peak]:
    data = module.trainer.datamodule
    with torch.device("meta"):
        student = CausalLM(AutoModelForCausalLM.from_config(fresh_config(module.student_spec, data)), "student")
    spec = module.teacher_spec
    teacher = CausalLM(load_pretrained(spec, "teacher", module.compute_dtype, empty=True), "teacher")
    student.apart = teacher.apart = module.student.apart
    return memory.Fit(module, student, teacher, device).peaks(rows)


def measured_apart(name: str, folder: str, limit_s: float) -> tuple[int, str, str]:
    """Measures a row in processes of its own, so that its memory is free for the next: exit code, output, errors.

    After `limit_s` it is told to end, so that torchrun ends its processes, too, and TimeoutExpired is raised.
    """
    devices = (CPU | ROWS)[name].get("devices")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"] if devices else []
    command = [sys.executable, *launch, __file__, "--one", name, folder]
    env = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if name in CPU else {})}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env) as process:
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.communicate()
            raise
    return process.returncode, out, err


def line(name: str, result: dict[str, Any]) -> str:
    cells = []
    for estimate, measured in zip(result["estimates"], result["measured"], strict=True):
        cells += [f"{estimate / 2**20:,.1f}", f"{measured / 2**20:,.1f}", f"{estimate / measured:.3f}"]
    return f"| {name} | {' | '.join(cells)} | {result['estimate_s']:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=[*ROWS, *CPU], metavar="ROW", help="only these rows")
    parser.add_argument("--cpu", action="store_true", help="many settings with small models")
    parser.add_argument("--tiny", action="store_true", help="one model of a few thousand weights")
    parser.add_argument("--one", nargs=2, help="measure the row of this name in this folder and print its result")
    parser.add_argument("--deadline", type=float, default=540, help="seconds after which the current run is stopped")
    args = parser.parse_args()
    deadline_s = time.monotonic() + args.deadline
    if args.one:
        result = measure((CPU | ROWS)[args.one[0]], Path(args.one[1]))
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(result))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}; MiB\n")
    print("| run | with teacher: estimate | measured | ratio | without: estimate | measured | ratio | CPU s |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    if args.tiny:
        with tempfile.TemporaryDirectory() as folder:
            print(line("tiny", measure(TINY, Path(folder))))
        return
    for name in args.sizes or (CPU if args.cpu else ("124m", "350m", "1.3b")):
        left_s = max(1.0, deadline_s - time.monotonic())
        try:
            with tempfile.TemporaryDirectory() as folder:
                code, out, err = measured_apart(name, folder, left_s)
        except subprocess.TimeoutExpired:
            print(f"| {name} | skipped: the deadline has passed |", flush=True)
            continue
        failed = f"| {name} | FAILED |\n{err[-1500:]}"
        print(failed if code else line(name, json.loads(out.splitlines()[-1])), flush=True)


if __name__ == "__main__":
    main()
