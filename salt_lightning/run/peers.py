"""The processes of a run: which one this is, how they find each other, and what is said where one is lost."""

import atexit
import os
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.plugins.environments import KubeflowEnvironment, LightningEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_only

from salt_lightning.errors import ConfigError, printable_lines
from salt_lightning.run import slurm

_SLACK_S = 2.0  # where torch itself ends the wait it has more to say
_STARTER = "SALT_LIGHTNING_STARTER"  # the process that starts the others of its node, in their environment
_GRACE_S = 30.0  # after a good end the first process may go a little before the others


def rank() -> int:
    """Of this process, as far as it knows one."""
    return getattr(rank_zero_only, "rank", 0)


def say_once(message: str) -> None:
    """Says it on stderr, where one process speaks for all."""
    if rank() == 0:
        print(printable_lines(message), file=sys.stderr)


def writes_elsewhere() -> bool:
    """Whether torchrun or srun has started this process beside a first one, which alone writes and prints."""
    by_torchrun = TorchElasticEnvironment.detect() and TorchElasticEnvironment().global_rank() > 0
    return by_torchrun or (slurm.tasks() > 1 and os.environ.get("SLURM_PROCID", "0") != "0")


def require_place(trainer: pl.Trainer) -> None:
    """Raises ConfigError where what started this process, and the trainer, do not mean the same processes."""
    # With one device Lightning overlooks that torchrun has started several processes: each would train alone.
    started = TorchElasticEnvironment().world_size() if TorchElasticEnvironment.detect() else None
    if started is None:
        environment = trainer._accelerator_connector.cluster_environment
        connects = not isinstance(trainer.strategy, SingleDeviceStrategy)
        slurm.require_processes(environment, trainer.num_devices, trainer.num_nodes, connects)
        _require_told_place(trainer, environment)
    elif started != trainer.num_devices * trainer.num_nodes:
        raise ConfigError(
            f"--trainer.devices {trainer.num_devices} times --trainer.num_nodes {trainer.num_nodes} is not the number "
            f"of processes that torchrun has started, {started}"
        )


def _require_told_place(trainer: pl.Trainer, environment: Any) -> None:
    """Raises ConfigError where an operator's variables give this process another place than it has: Lightning reads
    them under torchrun alone, and each of its processes would train by itself, as the first."""
    told, rank = os.environ.get("WORLD_SIZE") or "1", os.environ.get("RANK")
    if told in ("0", "1") or rank is None or type(environment) not in (LightningEnvironment, KubeflowEnvironment):
        return
    if trainer.num_nodes > 1 and "NODE_RANK" in os.environ:  # told by the user, who may start several a node
        return
    # those that Lightning starts have inherited the RANK of the one that starts them
    is_there = rank == str(trainer.global_rank) or "LOCAL_RANK" in os.environ
    if told != str(trainer.world_size) or not is_there:
        raise ConfigError(
            f"RANK {rank} and WORLD_SIZE {told} are set, as by an operator of Kubernetes, but this would be process "
            f"{trainer.global_rank} of {trainer.world_size}: start it by torchrun, or with NODE_RANK=$RANK before the "
            f"command and --trainer.num_nodes {told}; unset both where it is to train alone"
        )


def loss_of_others(rank: int, why: str, verb: str | None = None) -> str:
    """What a process says whose others have ended or no longer answer, in a fit or another verb."""
    if "EADDRINUSE" in why:
        return f"\nerror: MASTER_PORT {os.environ.get('MASTER_PORT')} is taken by another process; choose another one"
    remedy = "then the same command" if verb in ("predict", "validate", "test") else "go on with --ckpt_path last"
    return (
        f"\nerror: process {rank} has lost the others ({why.splitlines()[0][:200]}); what ended them stands in their "
        f"output; {remedy}"
    )


def limit_connecting(strategy: Any, verb: str | None = None) -> None:
    """Ends the process where connecting takes longer than the strategy's time-out: torch tries again after it."""
    if (limit := getattr(strategy, "_timeout", None)) is not None:
        strategy.setup_environment = partial(_connect, strategy, limit.total_seconds(), verb)


def _connect(strategy: Any, limit_s: float, verb: str | None) -> None:
    def give_up() -> None:  # the main thread is within torch, where no exception reaches it
        why = f"no connection within the strategy's time-out of {limit_s:g} s"
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
    """Whether it says that another process ended or no longer answers. gloo has no class of its own for that."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def leave_at_exit() -> None:
    """After a good end: gloo's threads, left to themselves, abort a process at its exit now and then."""
    atexit.register(_leave)  # of NCCL Lightning takes care


def _leave() -> None:
    if _backend() == "gloo":
        dist.destroy_process_group()


def _backend() -> str | None:
    return dist.get_backend() if dist.is_available() and dist.is_initialized() else None


def end_with_starter(verb: str | None = None) -> None:
    """Lets a process that Lightning has started end with the one that did: over NCCL nothing else would tell of its
    death, and the rest would hold their GPUs until the time-out."""
    starter = os.getppid()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[_STARTER] = str(os.getpid())
    elif os.environ.get(_STARTER) == str(starter):
        threading.Thread(target=_end_after, args=(starter, verb), daemon=True).start()


def _end_after(starter: int, verb: str | None) -> None:
    while os.getppid() == starter:
        time.sleep(1.0)
    time.sleep(_GRACE_S)
    why = "the process that has started this one is gone"
    print(loss_of_others(rank(), why, verb), file=sys.stderr, flush=True)
    os._exit(1)


def await_stop(processes: Sequence[BaseProcess]) -> None:
    """Lets processes that this one has started, and that train instead of it, save and end after its Ctrl-C.

    They may have had that too, as all of a terminal or a notebook's kernel have: a SIGTERM after it changes nothing.
    None are known while they are being started: the rest of a start ends with this process.
    """
    if not processes:  # for nothing one would wait for ever
        return
    for process in processes:
        process.terminate()
    connection.wait([process.sentinel for process in processes])
    for process in processes:  # an end that is not for all leaves the others waiting for it
        process.join(_GRACE_S)


_ABANDONED = False  # the others, by this process


def abandon(trainer: pl.Trainer) -> None:
    """For a process that ends with an error, perhaps alone: over NCCL its end must not wait for the others.

    They wait for it, in a collective that it never joins, and Lightning's teardown and exit wait for them in turn: to
    move tensors or to empty the allocator takes a device that has done all, and to destroy a process group takes all
    its ranks. No launcher would see an end before the time-out.
    """
    global _ABANDONED
    if trainer.world_size > 1 and _backend() == "nccl":
        _ABANDONED = True
        trainer._teardown = lambda: None  # type: ignore[method-assign]


def end_abandoned(end: int | BaseException) -> None:
    """Where `abandon` was called, ends the process: with an exit code, or as what was raised would end it."""
    if not _ABANDONED:
        return
    code = end.code if isinstance(end, SystemExit) else end
    number = (code or 0) if isinstance(code, int | None) else 1
    try:
        if isinstance(code, BaseException):
            sys.excepthook(type(code), code, code.__traceback__)
        elif not isinstance(code, int | None):  # a message, which Python prints at such an exit
            print(code, file=sys.stderr)
        atexit.unregister(_destroy_dist_connection)
        atexit._run_exitfuncs()
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed before
            stream.flush()
    finally:  # a full or broken stream keeps nothing either
        os._exit(number)  # at an ordinary end torch would abort the process group, which may wait as well
