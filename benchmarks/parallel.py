"""One device = DDP = FSDP2 = FSDP1, in real `cli.py fit` processes: losses, gradient norms, validation, resume.

    python benchmarks/parallel.py --processes 4       CPUs (gloo), some minutes
    python benchmarks/parallel.py --gpu               one GPU: FSDP2 and FSDP1, two processes on it over gloo, memory

Prints a Markdown table of the largest differences from one device over the run. Times mean nothing here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.strategies import fsdp as fabric_fsdp
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.strategies import fsdp as pytorch_fsdp
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from salt_lightning.parallel import FSDP2

ROOT = Path(__file__).parents[1]
STEPS, BOUNDARY, SAVED = 20, 12, 5
LIMIT_S = 75 if torch.cuda.is_available() else 500  # per run; torchrun may wait for a name server
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
FSDP2_CONFIG = [f"--config={ROOT}/configs/fsdp.yaml"]
DDP = [f"--config={ROOT}/configs/ddp.yaml"]


def resume(run: str) -> str:
    return f"--ckpt_path=FOLDER/{run}/checkpoints/step-{SAVED:08d}.ckpt"


UNTIED = [f"--model.student.config={json.dumps({**SIZES, 'tie_word_embeddings': False})}"]


class FSDP1OnCPU(FSDPStrategy):
    """FSDP1, only for this check: Lightning refuses its own class on CPUs, but not a subclass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fabric_fsdp._get_full_state_dict_context = pytorch_fsdp._get_full_state_dict_context = _full_state


class FSDP2OverGloo(FSDP2):
    """FSDP2 for two processes on one GPU: NCCL needs one GPU for each."""

    def _setup_distributed(self) -> None:
        self._process_group_backend = "gloo"
        super()._setup_distributed()
        # If the group is bound to a GPU, torch splits it for a mesh as with NCCL and copies its options; gloo's refuse.
        dist.group.WORLD.bound_device_id = None


@contextmanager
def _full_state(module: Any, world_size: int, rank0_only: bool = True) -> Iterator[None]:
    """Lightning's context without the offload to the CPU, which crashes if the weights are already there."""
    kind = StateDictType.FULL_STATE_DICT
    weights = FullStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only)
    optimizer = FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only)
    with FullyShardedDataParallel.state_dict_type(module, kind, weights, optimizer):
        yield


def write_text(path: Path) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 6))) for _ in range(60)]
    with open(path, "w", encoding="utf-8") as out:
        for _ in range(300):
            out.write(json.dumps({"text": " ".join(rng.choices(words, k=rng.choice([3, 10, 40, 120])))}) + "\n")


def command(folder: Path, run: str, own: list[str]) -> list[str]:
    on_gpu = torch.cuda.is_available()
    return [
        "fit", f"--run={folder / run}", f"--data.source={folder}/text.jsonl", f"--data.cache_dir={folder}/cache",
        "--data.vocab_size=400", "--data.block_size=32", "--data.global_batch_size=16", "--data.micro_batch_size=2",
        "--data.val_fraction=0.1", f"--model.student.config={json.dumps({**SIZES, 'tie_word_embeddings': True})}",
        "--model.optim.lr=1e-3", "--model.optim.warmup_steps=2", f"--trainer.max_steps={STEPS}",
        "--trainer.val_check_interval=10", "--trainer.log_every_n_steps=1", "--trainer.gradient_clip_val=0.5",
        f"--trainer.accelerator={'gpu' if on_gpu else 'cpu'}", "--trainer.enable_progress_bar=false",
        f"--checkpoint.at_steps=[{SAVED}]", *own,
    ]  # fmt: skip


def execute(folder: Path, run: str, own: list[str], nodes: int = 1, processes: int = 1) -> str | None:
    """Runs a fit with Lightning's launcher, or with torchrun on this many nodes. Returns the reason of a failure."""
    args = [a.replace("FOLDER", str(folder)) for a in command(folder, run, own)]
    paths = filter(None, (str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    starts = [[sys.executable, str(ROOT / "cli.py"), *args, f"--trainer.devices={processes}"]]
    if nodes > 1:
        starts = [
            [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--node_rank={node}",
             f"--nproc_per_node={processes}", "--master_addr=127.0.0.1", "--master_port=29731", "--",
             str(ROOT / "cli.py"), *args, f"--trainer.num_nodes={nodes}", f"--trainer.devices={processes}"]
            for node in range(nodes)
        ]  # fmt: skip
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(s, env=env, start_new_session=True, **pipes) for s in starts]
    outputs, late, end_s = [], "", time.monotonic() + LIMIT_S
    try:
        outputs = [process.communicate(timeout=max(1, end_s - time.monotonic()))[0] for process in started]
    except subprocess.TimeoutExpired:
        late = f"stopped after {LIMIT_S} s\n"
    finally:
        for process in started:
            with suppress(ProcessLookupError):  # the whole session, with the processes that it started
                os.killpg(process.pid, signal.SIGKILL)
    if late:
        outputs = [process.communicate()[0] for process in started]
    return late + "\n".join(map(reason, outputs)) if any(p.returncode for p in started) else None


def reason(output: str) -> str:
    """The errors in the output of a failed run, and its end: torchrun appends its own traceback after the errors."""
    named = re.compile(r"(\[rank\d+\]: )?(error: |[\w.]+(Error|Exception): )")
    told = [line for line in output.splitlines() if named.match(line)]
    return "\n".join([*told[:5], output[-1500:]])


def logged(run: Path) -> dict[str, dict[int, float]]:
    values: dict[str, dict[int, float]] = {}
    for file in sorted(run.glob("events.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if not value.tag.startswith(("train/", "val/")):  # the run's settings, as text
                    continue
                values.setdefault(value.tag, {})[event.step] = make_ndarray(value.tensor).item()
    return values


def row(folder: Path, run: str, reference: str) -> str:
    ours, theirs = logged(folder / run), logged(folder / reference)
    cells = []
    for tag in ("train/loss", "train/kd", "train/grad_norm", "val/ce"):
        shared = ours.get(tag, {}).keys() & theirs.get(tag, {}).keys()  # none if the other failed
        cells.append(f"{max(abs(ours[tag][s] - theirs[tag][s]) for s in shared):.1e}" if shared else "-")
    steps = sorted(ours["train/loss"])
    memory = [ours.get("train/peak_memory_gib", {}).get(step) for step in (2, STEPS)]
    shown = " / ".join("-" if m is None else f"{m:.3f}" for m in memory)
    return f"| {run} | {steps[0]} to {steps[-1]} | {' | '.join(cells)} | {shown} |"


def variants(n: int) -> list[tuple[str, str, list[str], int, int]]:
    """Name, run it is compared with, its settings, nodes, processes per node."""
    fsdp = [*FSDP2_CONFIG, "--trainer.precision=32-true"]
    resumed = [*fsdp, resume(f"FSDP2 {n}")]
    replicas, whole = "--trainer.strategy.replicas=2", "--trainer.strategy.shard_teacher=false"
    single = "--trainer.strategy.save_distributed_checkpoint=false"
    fsdp1 = ["--config=FOLDER/fsdp1.yaml"]  # a class can only be named in YAML
    return [
        (f"DDP {n}", "one device", DDP, 1, n),
        (f"FSDP2 {n}", "one device", fsdp, 1, n),
        ("FSDP2 1", "one device", fsdp, 1, 1),
        (f"FSDP2 {n}, 2 replicas (hybrid)", "one device", [*fsdp, replicas], 1, n),
        (f"FSDP2 {n}, whole teacher on each rank, single file", "one device", [*fsdp, whole, single], 1, n),
        (f"FSDP2 {n}, activations recomputed", "one device", [*fsdp, "--model.activation_checkpointing=true"], 1, n),
        (f"FSDP2 {n}, compiled", "one device", [*fsdp, "--model.compile=true"], 1, n),
        (f"FSDP2 {n}, untied head", "one device, untied head", [*fsdp, *UNTIED], 1, n),
        (f"FSDP2 2 nodes x {n // 2} (torchrun)", "one device", fsdp, 2, n // 2),
        (f"FSDP2 {n} resumed on one device", "one device", [resume(f"FSDP2 {n}")], 1, 1),
        (f"FSDP2 {n} resumed on {n // 2}", "one device", resumed, 1, n // 2),
        (f"FSDP2 {n} resumed on {n}", f"FSDP2 {n}", resumed, 1, n),
        (f"one device resumed on FSDP2 {n}", "one device", [*fsdp, resume("one device")], 1, n),
        (f"FSDP1 {n}", "one device", fsdp1, 1, n),
        (f"one device resumed on FSDP1 {n}", "one device", [*fsdp1, resume("one device")], 1, n),
    ]


def gpu_variants() -> list[tuple[str, str, list[str], int, int]]:
    mixed, two = "--trainer.precision=bf16-mixed", "2 processes on one GPU, gloo"
    return [
        ("one device, bf16-mixed", "one device", [mixed], 1, 1),
        ("FSDP2 1", "one device", [*FSDP2_CONFIG, "--trainer.precision=32-true"], 1, 1),
        ("FSDP2 1, bf16-mixed", "one device, bf16-mixed", FSDP2_CONFIG, 1, 1),
        ("FSDP1 1", "one device", ["--trainer.strategy=fsdp"], 1, 1),
        ("FSDP1 1, bf16-mixed", "one device, bf16-mixed", ["--trainer.strategy=fsdp", mixed], 1, 1),
        (f"FSDP2, {two}", "one device", ["--config=FOLDER/gloo.yaml", "--trainer.precision=32-true"], 2, 1),
        (f"DDP, {two}", "one device", ["--config=FOLDER/ddp_gloo.yaml"], 2, 1),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4, help="number of CPU processes, an even number")
    parser.add_argument("--gpu", action="store_true", help="one GPU instead of several CPU processes")
    parser.add_argument("--only", default="", help="only runs whose names begin with this, e.g. FSDP1")
    parser.add_argument(
        "--deadline", type=float, default=math.inf, help="seconds after which no further run is started"
    )
    args, begin_s = parser.parse_args(), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "text.jsonl")
        ddp = "{class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {process_group_backend: gloo}}"
        for file, strategy in (
            ("fsdp1", "{class_path: parallel.FSDP1OnCPU}"),
            ("gloo", "{class_path: parallel.FSDP2OverGloo}"),
            ("ddp_gloo", ddp),
        ):
            (folder / f"{file}.yaml").write_text(f"trainer: {{strategy: {strategy}}}")
        small = json.dumps({**SIZES, "hidden_size": 32, "tie_word_embeddings": True})
        failed = execute(folder, "teacher", ["--kd.weight=0", f"--model.student.config={small}", "--seed_everything=7"])
        teacher = f"--model.teacher.path={folder}/teacher/checkpoints/step-{STEPS:08d}.ckpt"
        salt = [
            teacher,
            "--kd.allow_untrained=true",
            f"--kd.steps={BOUNDARY}",
            "--kd.anneal_steps=4",
            "--kd.shape=linear",
        ]
        failed = failed or execute(folder, "one device", salt)
        chosen = [
            way for way in (gpu_variants() if args.gpu else variants(args.processes)) if way[0].startswith(args.only)
        ]
        if any(reference == "one device, untied head" for _, reference, *_ in chosen):
            failed = failed or execute(folder, "one device, untied head", [*salt, *UNTIED])
        if failed:
            sys.exit(failed)
        print("| run | steps | loss | KD | gradient norm | val CE | peak GiB with / without teacher |")
        print("|---|---|--:|--:|--:|--:|--:|")
        for run, reference, own, nodes, processes in chosen:
            if time.monotonic() - begin_s > args.deadline:
                print(f"| {run} | skipped: the deadline has passed |", flush=True)
                continue
            failed = execute(folder, run, [*salt, *own], nodes, processes)
            print(f"| {run} | FAILED |\n{failed}" if failed else row(folder, run, reference), flush=True)


if __name__ == "__main__":
    main()
