"""One of several processes that run the real command, once for each job in a file; test_parallel.py starts them.

LOCAL_RANK=... WORLD_SIZE=... python tests/ranks.py JOBS.json
"""

import faulthandler
import gc
import json
import os
import socket
import subprocess
import sys
import weakref
from contextlib import chdir, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import forked
import torch
from lightning.pytorch.callbacks import Callback

sys.path.insert(0, str(Path(__file__).parents[1]))
import parsers

from salt_lightning import cli
from salt_lightning.run import peers


class Spy(Callback):
    """Records each step's gradients, each micro-batch's rows and labels, and whether the teacher is freed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.rows: list[list[int]] = []
        self.labels: list[int] = []
        self.reduced: list[bool] = []
        self.seeds: list[int] = []
        self.teacher: list[Any] = []
        self.teacher_bytes, self.teacher_has_left = 0, False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append(batch["rows"].tolist())
        self.labels.append(int((batch["labels"] != -100).sum()))
        if pl_module.teacher is not None and not self.teacher:
            teacher = pl_module.teacher
            getattr(teacher, "reshard", lambda: None)()  # the check before the first step left its root unsharded
            self.teacher = [weakref.ref(teacher), *map(weakref.ref, teacher.parameters())]
            self.teacher_bytes = sum(getattr(p, "_local_tensor", p).nbytes for p in teacher.parameters())

    def on_after_backward(self, trainer, pl_module):
        self.reduced.append(all(p.grad is not None for p in pl_module.student.parameters()))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seeds.append(torch.initial_seed())
        named = pl_module.named_parameters()
        whole = {n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for n, p in named}
        self.gradients.append({name: gradient.clone() for name, gradient in whole.items()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.teacher and pl_module.teacher is None:
            gc.collect()
            assert [ref() for ref in self.teacher if ref() is not None] == []
            self.teacher, self.teacher_has_left = [], True

    def on_train_end(self, trainer, pl_module):
        names = ("gradients", "rows", "labels", "seeds", "reduced", "teacher_has_left", "teacher_bytes")
        seen = {name: getattr(self, name) for name in names}
        torch.save(seen, f"{self.path}.{trainer.global_rank}")


class Spoil(Callback):
    """Makes one rank's weights infinite from one of its micro-batches on, and prints that micro-batch's rows."""

    def __init__(self, rank: int, batch: int) -> None:
        self.rank, self.batch = rank, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.global_rank, batch_idx) == (self.rank, self.batch):
            pl_module.student.head.weight.data[3] = float("inf")
            print("spoiled rows", batch["rows"].tolist())


def run(args: list[str], *callbacks: Callback) -> int:
    """Runs the command `args` in this process, with callbacks besides its own."""
    original = cli.SALTCLI.instantiate_trainer

    def with_callbacks(self, **kwargs):
        trainer = original(self, **kwargs)
        trainer.callbacks.extend(callbacks)
        return trainer

    cli.SALTCLI.instantiate_trainer = with_callbacks
    try:
        return cli.main(args)
    finally:
        cli.SALTCLI.instantiate_trainer = original


def force_fsdp1() -> None:
    """Allows FSDP1 over gloo, which Lightning and this project refuse on CPUs.

    For a file FSDP1 copies gathered weights from the GPU to the CPU, then frees them on the GPU; on a CPU there is no
    copy, so it would free the result.
    """
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
    from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, FullyShardedDataParallel

    from salt_lightning import parallel

    def given(cls: type, name: str, value: Any) -> None:
        original = cls.__init__
        cls.__init__ = lambda self, *args, **kwargs: original(self, *args, **{**kwargs, name: value})

    given(FullyShardedDataParallel, "device_id", torch.device("cpu"))
    given(FullStateDictConfig, "offload_to_cpu", False)
    given(FullOptimStateDictConfig, "offload_to_cpu", False)
    _AcceleratorConnector._check_strategy_and_fallback = lambda self: None
    parallel.require_supported = lambda asked: None


def launch(jobs: list[dict[str, Any]], folder: Path, world: int = 2) -> None:
    """Runs the jobs one after the other in `world` processes; raises with the output of the first that failed.

    The first process is forked, which saves its imports. The others are new: their sets have other orders.
    """
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world),
           "NODE_RANK": "0"}  # fmt: skip
    outputs = [folder / f"out.{rank}" for rank in range(world)]
    processes = []
    for rank, output in enumerate(outputs):
        with open(output, "w") as out:
            command, own = [sys.executable, __file__, str(file)], {**env, "LOCAL_RANK": str(rank)}
            start = subprocess.Popen if rank else forked.Popen
            processes.append(start(command, env=own, stdout=out, stderr=out))
    try:
        codes = [process.wait(600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * world, f"exit codes {codes}\n" + "\n".join(output.read_text()[-4000:] for output in outputs)


if __name__ == "__main__":
    faulthandler.enable()  # as the command does, and
    gc.freeze()
    peers.UNSEEN_S = cli.FIRST_RANK_S = 1.0  # here no process's end ends the others
    parsers.keep()
    is_forced = False  # only once a job needs it
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if not is_forced and any("fsdp1.yaml" in argument for argument in job["args"]):
            is_forced = True
            force_fsdp1()
        callbacks = [Spy(Path(job["spy"]))] if "spy" in job else [Spoil(*job["spoil"])] if "spoil" in job else []
        own = chdir(f"{job['disks']}/{os.environ['LOCAL_RANK']}") if "disks" in job else nullcontext()
        # as if a node lost its mount of the folder after the start
        look = mock.patch.object(peers, "not_shared", return_value=None) if job.get("blind") else nullcontext()
        with own, look:
            code = run(job["args"] + job.get(f"args of {os.environ['LOCAL_RANK']}", []), *callbacks)
        expected = job.get("code", 0)
        if code != expected and not (code == 0 and int(os.environ["LOCAL_RANK"])):
            sys.exit(f"exit code {code} instead of {expected}: {job['args']}")
