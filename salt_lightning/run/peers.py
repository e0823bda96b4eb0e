"""The processes of a run: which one this is, how they connect, and what to report when one is lost."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import KubeflowEnvironment, LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only

from salt_lightning.errors import ConfigError, few, going_on, printable_lines, writing
from salt_lightning.run import endings, slurm
from salt_lightning.text.processes import num_cores

_SLACK_S = 2.0  # lets torch end the wait first, with a better message
_STARTER = "SALT_LIGHTNING_STARTER"  # variable for the processes that Lightning starts: the one that starts them
_COMPARING = timedelta(minutes=5)  # or the strategy's timeout, if that is shorter
UNSEEN_S = 90.0  # a client of NFS may believe for a minute that what another has written is not there


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
    refuse_forks(trainer)
    # With one device, Lightning does not notice that torchrun started several processes: each would train alone.
    started = TorchElasticEnvironment().world_size() if TorchElasticEnvironment.detect() else None
    if started is None:
        environment = trainer._accelerator_connector.cluster_environment
        connects = not isinstance(trainer.strategy, SingleDeviceStrategy)
        slurm.require_processes(environment, trainer.num_devices, trainer.num_nodes, connects)
        if connects:
            _require_port()
            _require_local_rank(trainer, environment)
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


def refuse_forks(trainer: pl.Trainer) -> None:
    """Raises ConfigError if Lightning forks or spawns ranks, as auto does on several GPUs in a notebook: they end, log
    and hold their run in other ways. In Python it comes as the traceback of a rank: nothing runs before they do."""
    if (how := getattr(trainer.strategy, "_start_method", "popen")) != "popen":
        raise ConfigError(
            f"--trainer.strategy {type(trainer.strategy).__name__} that starts ranks by {how} is not supported; use "
            "ddp, in a notebook with !python cli.py fit"
        )


def _require_local_rank(trainer: pl.Trainer, environment: Any) -> None:
    """Raises ConfigError if a LOCAL_RANK, perhaps left over from another command, is no device's, or says that somebody
    else starts the other processes, which could not find this one."""
    local_rank, devices = os.environ.get("LOCAL_RANK"), trainer.num_devices
    if type(environment) is not LightningEnvironment or local_rank is None:
        return
    remedy = "unset LOCAL_RANK, and all processes are started from here, or start them with torchrun"
    if not 0 <= int(local_rank) < devices:
        raise ConfigError(
            f"LOCAL_RANK {local_rank} is set, but must be 0 or more and below --trainer.devices {devices}; {remedy}"
        )
    if trainer.world_size > 1 and "MASTER_PORT" not in os.environ:
        raise ConfigError(
            f"LOCAL_RANK {local_rank} is set, so the other processes are to be started by somebody else, but they meet "
            f"at MASTER_PORT, which is not set; {remedy}"
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


def seems_first() -> bool:
    """Whether nothing says, before the processes are connected, that this is not the first of them."""
    # processes that Lightning starts inherit RANK from an operator, and take it for their own
    return rank() == 0 and all(os.environ.get(name, "0") == "0" for name in ("NODE_RANK", "LOCAL_RANK"))


def _take_first_place() -> None:
    """Makes a process that trains alone the first, whatever rank variables were left in its environment: another would
    neither log nor lock its run."""
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK") if not seems_first() else ():
        os.environ.pop(name, None)
    rank_zero_only.rank = 0  # type: ignore[attr-defined]


def loss_of_others(rank: int, why: str, verb: str | None = None) -> str:
    """The message of a process that lost the others, because they ended or no longer answer; `verb` None is fit."""
    if "EADDRINUSE" in why:
        return f"\nerror: MASTER_PORT {os.environ.get('MASTER_PORT')} is taken by another process; choose another one"
    remedy, first = going_on(verb), why.splitlines()[0][:200]
    if "connectFullMesh" in why and "remote=[127." in why:  # gloo tells the others the address of this host's name
        remedy += (
            "; if they are on several hosts, whose names may resolve to 127.*, which others cannot reach, set "
            "GLOO_SOCKET_IFNAME to the network interface, such as eth0"
        )
    has, unless = "lost the others", ""
    if _nodes is not None:
        has = f"not reached all others at {_meeting_place(_nodes)}"
    if (_nodes or 1) > 1:
        unless = (
            ", unless they were started with other values of these or of --trainer.num_nodes, or the same NODE_RANK"
        )
    return f"\nerror: process {rank} has {has} ({first}); their output says why they ended{unless}; {remedy}"


_nodes: int | None = None  # of the run, while this process connects to the others


def _meeting_place(nodes: int) -> str:
    address = os.environ.get("MASTER_ADDR", "")
    said = f"MASTER_ADDR {address}, MASTER_PORT {os.environ.get('MASTER_PORT')}"
    if nodes > 1 and address.startswith("127."):
        return f"{said}, which is on each node the node itself"
    try:
        socket.getaddrinfo(address, None)
    except OSError:
        return f"{said}, a name that this host does not know"
    return said


def expect_others(trainer: pl.Trainer, verb: str | None) -> None:
    """Called before Lightning starts the other processes of this node, or connects to them."""
    strategy: Any = trainer.strategy
    if trainer.world_size == 1:
        _take_first_place()
    if strategy.launcher is not None:  # it starts them
        limit_threads(trainer.num_devices)
    if (limit := getattr(strategy, "_timeout", None)) is not None:
        strategy.setup_environment = partial(_connect, trainer, limit.total_seconds(), verb)
    end_with_starter(verb)
    if isinstance(strategy.launcher, _SubprocessScriptLauncher) and "LOCAL_RANK" not in os.environ:
        start = strategy.launcher._call_children_scripts
        strategy.launcher._call_children_scripts = partial(_start_others, start)  # type: ignore[method-assign]


def _start_others(start: Callable[[], None]) -> None:
    """Tells the processes that Lightning starts by whom, and nothing else that this one may start."""
    os.environ[_STARTER] = str(os.getpid())
    try:
        start()
    finally:
        del os.environ[_STARTER]


def _connect(trainer: pl.Trainer, limit_s: float, verb: str | None) -> None:
    """Ends the process if connecting takes longer than the strategy's timeout: torch would try again after it."""
    global _nodes
    strategy: Any = trainer.strategy
    _nodes = trainer.num_nodes

    def give_up() -> None:  # the main thread is inside torch, where no exception reaches it
        threading.Timer(5.0, os._exit, (1,)).start()  # looking up a name may take long
        why = f"no connection within the strategy's timeout of {limit_s:g} s"
        print(loss_of_others(strategy.global_rank, why, verb), file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(limit_s + _SLACK_S, give_up)
    timer.daemon = True
    timer.start()
    try:
        type(strategy).setup_environment(strategy)
        _nodes = None
        require_same_strategy(strategy)
    finally:
        timer.cancel()


_comparisons = count()


def require_same_strategy(strategy: Any) -> None:
    """Compares the strategy of each connected process with that of the first, once per strategy. Collective.

    Before any other message: under another strategy, a process would wait forever for what the others never send.

    Raises:
        ConfigError: on all processes; names one that differs.
        torch.distributed.DistError: the others do not answer within the strategy's timeout, or 5 minutes.
    """
    if not dist.is_initialized() or getattr(strategy, "is_compared", False):
        return
    strategy.is_compared = True
    store, world, place = dist.distributed_c10d._get_default_store(), dist.get_world_size(), dist.get_rank()
    prefix = f"salt/strategy/{next(_comparisons)}"
    replicas = getattr(strategy, "replicas", None)
    mine = type(strategy).__name__ + (f" with replicas {replicas}" if replicas else "")
    store.set(f"{prefix}/{place}", mine)
    first = store.get(f"{prefix}/0").decode()
    if mine != first:
        store.set(
            f"{prefix}/other", f"process {place} differs from process 0: --trainer.strategy {mine} (process 0: {first})"
        )
    store.add(f"{prefix}/seen", 1)
    # the store outlives those that die now
    end_s = time.monotonic() + min(strategy._timeout, _COMPARING).total_seconds()
    while store.add(f"{prefix}/seen", 0) < world:
        if time.monotonic() > end_s:
            raise dist.DistError("the others, once connected, did not say which strategy they have")
        time.sleep(0.01)
    if store.check([f"{prefix}/other"]):
        raise ConfigError(f"{store.get(f'{prefix}/other').decode()}; start all with the same command and version")


def not_shared(trainer: pl.Trainer, folder: Path) -> str | None:
    """Which processes do not see what the first one writes in a folder; None if all do. Collective, unless the trainer
    is only looked at, as by `check`.

    Raises:
        OSError: the folder cannot be written.
    """
    if trainer.world_size == 1 or not dist.is_initialized():
        return None
    mark = folder / f".seen-{uuid4().hex}"
    if trainer.is_global_zero:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(".seen-*"):  # by a start that was killed
                left.unlink()
            mark.touch()
    try:
        seen = folder / trainer.strategy.broadcast(mark.name)
        end_s = time.monotonic() + UNSEEN_S
        while not (sees := os.path.exists(seen)) and time.monotonic() < end_s:
            time.sleep(0.1)
        all_see: list[bool] = [False] * trainer.world_size
        dist.all_gather_object(all_see, sees)
    finally:
        mark.unlink(missing_ok=True)  # of other ranks, there is none
    if blind := [str(process) for process, sees in enumerate(all_see) if not sees]:
        return f"process {few(blind)} does not see what process 0 writes there"
    return None


def has_lost_others(error: BaseException) -> bool:
    """Whether the error means that another process ended or no longer answers."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)  # gloo has no error class for that


def end_with_starter(verb: str | None) -> None:
    """Ends a process with the one that started it: over NCCL nothing else reports that end, and the others would hold
    their GPUs until the timeout. A rank of torchrun saves first, and so it can: all are still there."""
    if starter := os.environ.pop(_STARTER, None):  # not for commands that this process may start
        why = "the process that started this one is gone"
        endings.end_with_starter(int(starter), lambda: loss_of_others(rank(), why, verb))
    elif TorchElasticEnvironment.detect():
        endings.stop_with_agent()
