"""How the processes of a run end: with the one that started them, after a signal to one of them, after an error."""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_info

_GRACE_S = 30.0  # after success, the first process may end a little before the others; after an error, in all


def end_with_starter(starter: int, message: Callable[[], str]) -> None:
    """Ends this process some time after the one that started it, with a message."""

    def give_up() -> None:
        time.sleep(_GRACE_S)
        print(message(), file=sys.stderr, flush=True)
        os._exit(1)

    _after(lambda: os.getppid() == starter, give_up)


@cache  # for all commands of this process
def stop_with_agent() -> None:
    """Stops this process when torchrun's agent is gone, as a SIGTERM does: fit saves after the next logged step."""
    agent = os.getppid()
    _after(lambda: os.getppid() == agent, _stop)


def _after(is_there: Callable[[], bool], end: Callable[[], object]) -> None:
    def watch() -> None:
        while is_there():
            time.sleep(1.0)
        end()

    threading.Thread(target=watch, name="starter", daemon=True).start()


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    with suppress(OSError):  # whoever read it may be gone, too
        rank_zero_info("the process that started this one is gone")


def leave_at_exit() -> None:
    """Destroys gloo's process group at exit after success: its threads would sometimes abort the process."""
    atexit.register(_leave)  # Lightning does it for NCCL


def _leave() -> None:
    if _backend() == "gloo":
        dist.destroy_process_group()


def _backend() -> str | None:
    return dist.get_backend() if dist.is_available() and dist.is_initialized() else None


def end_started(launcher: Any) -> None:
    """Kills the processes that this one started, on an error that is still to be reported.

    Lightning's observer, a thread that looks every 5 s, would find them dead and kill this process, too, perhaps before
    the report. So it is left nobody to look at, and this process has longer to end by itself.
    """
    if isinstance(launcher, _SubprocessScriptLauncher) and launcher.procs:
        watched, launcher.procs = launcher.procs, list(launcher.procs)
        watched.clear()
        timer = threading.Timer(_GRACE_S, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    for process in getattr(launcher, "procs", ()):
        process.kill()


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
