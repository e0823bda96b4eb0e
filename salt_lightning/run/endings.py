"""How the processes of a run end: with the one that started them, after a signal to one of them, after an error."""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing import connection, parent_process
from multiprocessing.process import BaseProcess
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_info
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from salt_lightning import errors

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


def stop_with_launcher() -> None:
    """Stops this rank, which Lightning forked or spawned, when the process that waits for it is gone: torch's own tie
    is a SIGINT, which jobs in the background ignore."""
    _handle(signal.SIG_DFL, signal.SIGTERM, signal.SIGHUP)  # a handler in Python could not run while torch connects
    launcher, parent = parent_process(), os.getppid()
    assert launcher is not None
    # If it was forked, later ranks hold the other end of what is_alive looks at. Otherwise the parent may be a server.
    _after(lambda: os.getppid() == parent and launcher.is_alive(), _stop)


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


_ASKED_S: list[float] = []  # when this process, which waits for its ranks, was asked to stop


def stop_as_by_ctrl_c() -> None:
    """Makes SIGTERM and SIGHUP in a process that waits for its ranks do what Ctrl-C does: they save first. Those that
    follow within 10 s are part of the same request, also while the callbacks' on_exception runs."""
    own = os.getpid()
    _ASKED_S.clear()

    def interrupt(number: int, frame: Any) -> None:
        if os.getpid() != own:  # a rank that was just forked
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        _ASKED_S.append(time.monotonic())
        if len(_ASKED_S) == 1 or _ASKED_S[-1] > _ASKED_S[0] + 10.0:
            raise KeyboardInterrupt(number)

    _handle(interrupt, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _handle(handler: Any, *numbers: int) -> None:
    """Sets the handler of each signal that is not ignored: nohup ignores SIGHUP, a job in the background SIGINT."""
    for number in numbers if threading.current_thread() is threading.main_thread() else ():
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@contextmanager
def raised_here(verb: str | None = None) -> Iterator[None]:
    """Raises an error of a rank that Lightning forked or spawned, which comes as a traceback's text, as if it had been
    raised by the block. Others than those with a remedy stay as they are. `verb` None is fit."""
    try:
        yield
        return
    except ProcessExitedException as error:
        why = "perhaps for lack of memory" if error.signal_name == "SIGKILL" else "its output may say why"
        how = f"was ended by {error.signal_name}" if error.signal_name else f"ended with exit code {error.exit_code}"
        cause: Exception = OSError(f"process {error.error_index} {how}, {why}; {errors.going_on(verb)}")
    except ProcessRaisedException as error:
        if not (found := errors.of_process(str(error))):
            raise
        cause = found
    raise cause  # outside: the traceback would become its context


def leave_at_exit() -> None:
    """Destroys gloo's process group at exit after success: its threads would sometimes abort the process."""
    atexit.register(_leave)  # Lightning does it for NCCL


def _leave() -> None:
    if _backend() == "gloo":
        dist.destroy_process_group()


def _backend() -> str | None:
    return dist.get_backend() if dist.is_available() and dist.is_initialized() else None


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
