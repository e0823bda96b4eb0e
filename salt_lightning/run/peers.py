"""The processes of a run: which one this is, how they connect, and what to report when one is lost."""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import KubeflowEnvironment, LightningEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_only

from salt_lightning.errors import ConfigError, printable_lines
from salt_lightning.run import slurm
from salt_lightning.text.processes import num_cores

_SLACK_S = 2.0  # lets torch end the wait first, with a better message
_STARTER = "SALT_LIGHTNING_STARTER"  # environment variable: the process that started the others of its node
_GRACE_S = 30.0  # after success, the first process may end a little before the others


def rank() -> int:
    """This process's rank, as far as it is known."""
    return getattr(rank_zero_only, "rank", 0)


def say_once(message: str) -> None:
    """Prints the message on stderr, on the first rank only."""
    if rank() == 0:
        print(printable_lines(message), file=sys.stderr)


def writes_elsewhere() -> bool:
    """Whether torchrun or srun started this process as another than the first, which alone writes and prints."""
    by_torchrun = TorchElasticEnvironment.detect() and TorchElasticEnvironment().global_rank() > 0
    return by_torchrun or (slurm.tasks() > 1 and os.environ.get("SLURM_PROCID", "0") != "0")


def limit_threads(started: int = 1) -> None:
    """Keeps torch from starting more threads than a container's CPU limit, which it does not see. `started`: processes
    that share it."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    threads = max(1, num_cores() // started)
    if threads < torch.get_num_threads():
        torch.set_num_threads(threads)
    if started > 1:  # otherwise Lightning does the same with the machine's CPUs
        os.environ["OMP_NUM_THREADS"] = str(threads)


def require_place(trainer: pl.Trainer) -> None:
    """Raises ConfigError if the launcher and the trainer disagree about the processes."""
    # With one device, Lightning does not notice that torchrun started several processes: each would train alone.
    started = TorchElasticEnvironment().world_size() if TorchElasticEnvironment.detect() else None
    if started is None:
        environment = trainer._accelerator_connector.cluster_environment
        connects = not isinstance(trainer.strategy, SingleDeviceStrategy)
        slurm.require_processes(environment, trainer.num_devices, trainer.num_nodes, connects)
        if connects:
            _require_port()
        _require_told_place(trainer, environment)
    elif started != trainer.num_devices * trainer.num_nodes:
        raise ConfigError(
            f"--trainer.devices {trainer.num_devices} times --trainer.num_nodes {trainer.num_nodes} is not the number "
            f"of processes that torchrun started, {started}; make them equal"
        )


def _require_port() -> None:
    port = os.environ.get("MASTER_PORT", "0")
    if not port.isdecimal():
        raise ConfigError(
            f"MASTER_PORT {port} is not a port number: Kubernetes sets it so for a Service named master; set it to a "
            "free port, or unset it"
        )


def _require_told_place(trainer: pl.Trainer, environment: Any) -> None:
    """Raises ConfigError if an operator's variables give this process another rank than it has: Lightning reads them
    only under torchrun, so each process would train alone, as the first."""
    told, rank = os.environ.get("WORLD_SIZE") or "1", os.environ.get("RANK")
    if told in ("0", "1") or rank is None or type(environment) not in (LightningEnvironment, KubeflowEnvironment):
        return
    if trainer.num_nodes > 1 and "NODE_RANK" in os.environ:  # set by the user, who may start several per node
        return
    # processes that Lightning starts inherit the RANK of the one that starts them
    is_there = rank == str(trainer.global_rank) or "LOCAL_RANK" in os.environ
    if told != str(trainer.world_size) or not is_there:
        raise ConfigError(
            f"RANK {rank} and WORLD_SIZE {told} are set, as by an operator of Kubernetes, but this would be process "
            f"{trainer.global_rank} of {trainer.world_size}; start it with torchrun, or put NODE_RANK=$RANK before "
            f"the command and add --trainer.num_nodes {told}, or unset both variables if it is to train alone"
        )


def loss_of_others(rank: int, why: str, verb: str | None = None) -> str:
    """The message of a process that lost the others, because they ended or no longer answer; `verb` None is fit."""
    if "EADDRINUSE" in why:
        return f"\nerror: MASTER_PORT {os.environ.get('MASTER_PORT')} is taken by another process; choose another one"
    remedy = (
        "run the same command again" if verb in ("predict", "validate", "test") else "continue with --ckpt_path last"
    )
    return (
        f"\nerror: process {rank} has lost the others ({why.splitlines()[0][:200]}); their output says why they ended; "
        f"{remedy}"
    )


def expect_others(trainer: pl.Trainer, verb: str | None = None) -> None:
    """Called before Lightning starts the other processes of this node, or connects to them."""
    if trainer.strategy.launcher is not None:  # it starts them
        limit_threads(trainer.num_devices)
    limit_connecting(trainer.strategy, verb)
    end_with_starter(verb)


def limit_connecting(strategy: Any, verb: str | None = None) -> None:
    """Ends the process if connecting takes longer than the strategy's timeout: torch would try again after it."""
    if (limit := getattr(strategy, "_timeout", None)) is not None:
        strategy.setup_environment = partial(_connect, strategy, limit.total_seconds(), verb)


def _connect(strategy: Any, limit_s: float, verb: str | None) -> None:
    def give_up() -> None:  # the main thread is inside torch, where no exception reaches it
        why = f"no connection within the strategy's timeout of {limit_s:g} s"
        print(loss_of_others(strategy.global_rank, why, verb), file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(limit_s + _SLACK_S, give_up)
    timer.daemon = True
    timer.start()
    try:
        type(strategy).setup_environment(strategy)
    finally:
        timer.cancel()


def has_lost_others(error: BaseException) -> bool:
    """Whether the error means that another process ended or no longer answers. gloo has no error class for that."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def leave_at_exit() -> None:
    """Destroys gloo's process group at exit after success: its threads would sometimes abort the process."""
    atexit.register(_leave)  # Lightning does it for NCCL


def _leave() -> None:
    if _backend() == "gloo":
        dist.destroy_process_group()


def _backend() -> str | None:
    return dist.get_backend() if dist.is_available() and dist.is_initialized() else None


def end_with_starter(verb: str | None = None) -> None:
    """Ends a process that Lightning started when its starter ends: over NCCL nothing else reports that, and the others
    would hold their GPUs until the timeout."""
    starter = os.getppid()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[_STARTER] = str(os.getpid())
    elif os.environ.get(_STARTER) == str(starter):
        threading.Thread(target=_end_after, args=(starter, verb), daemon=True).start()


def _end_after(starter: int, verb: str | None) -> None:
    while os.getppid() == starter:
        time.sleep(1.0)
    time.sleep(_GRACE_S)
    why = "the process that started this one is gone"
    print(loss_of_others(rank(), why, verb), file=sys.stderr, flush=True)
    os._exit(1)


def await_stop(processes: Sequence[BaseProcess]) -> None:
    """After Ctrl-C, lets the processes that this one started, and that train instead of it, save and end.

    They may have received it too, as all processes of a terminal or a notebook's kernel do: another SIGTERM does no
    harm. While they are being started none are known; those end with this process.
    """
    if not processes:  # waiting for an empty list would never end
        return
    for process in processes:
        process.terminate()
    connection.wait([process.sentinel for process in processes])
    for process in processes:  # if only some end, the others wait for them
        process.join(_GRACE_S)
    # a process that ends before it resets its handlers dies of the SIGTERM, after its save
    failed = [str(i) for i, each in enumerate(processes) if each.exitcode not in (0, -signal.SIGTERM)]
    if failed:  # Lightning, which would pass on their errors, no longer listens
        print(
            f"\nerror: process {' and '.join(failed)} failed while it stopped; the last step may not be saved: see the "
            "newest checkpoint",
            file=sys.stderr,
        )


_ABANDONED = False  # this process has abandoned the others


def abandon(trainer: pl.Trainer) -> None:
    """Lets a process that ends with an error, perhaps alone, end without waiting for the others, over NCCL.

    They wait for it in a collective that it never joins, and Lightning's teardown would wait for them in turn: moving
    tensors or emptying the allocator waits for the device, and destroying a process group needs all its ranks. No
    launcher would see the end before the timeout.
    """
    global _ABANDONED
    if trainer.world_size > 1 and _backend() == "nccl":
        _ABANDONED = True
        trainer._teardown = lambda: None  # type: ignore[method-assign]


def end_abandoned(end: int | BaseException) -> None:
    """If `abandon` was called, ends the process, with an exit code or as the raised exception would."""
    if not _ABANDONED:
        return
    code = end.code if isinstance(end, SystemExit) else end
    number = (code or 0) if isinstance(code, int | None) else 1
    try:
        if isinstance(code, BaseException):
            sys.excepthook(type(code), code, code.__traceback__)
        elif not isinstance(code, int | None):  # a message, which Python prints at exit
            print(code, file=sys.stderr)
        atexit.unregister(_destroy_dist_connection)
        atexit._run_exitfuncs()
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed before
            stream.flush()
    finally:  # also if a stream is full or broken
        os._exit(number)  # an ordinary exit would let torch abort the process group, which may wait too
