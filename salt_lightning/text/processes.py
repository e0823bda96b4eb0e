"""Worker processes that end silently with their parent."""

import math
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeVar

from salt_lightning.errors import ConfigError

_FORK = get_context("fork")  # spawned workers would run the user's script again


class Task(Protocol):
    size: int  # of its content in memory


T = TypeVar("T", bound=Task)
R = TypeVar("R")


def ordered_map(
    function: Callable[[T], R], tasks: Iterator[T], workers: int, max_size: int
) -> Generator[tuple[T, R], None, None]:
    """(task, result) in the order of the tasks. Tasks under way have a total size of about `max_size`, or are at most
    as many as the workers. One worker: this process does the work.

    Raises:
        BrokenProcessPool: a worker was killed.
        ConfigError: no worker can be started.
    """
    if workers == 1:
        yield from ((task, function(task)) for task in tasks)
        return
    pending: deque[tuple[T, Future]] = deque()
    size = 0
    with starting():
        started = ProcessPoolExecutor(workers, _FORK, _start_worker, (function,))
    with started as pool:
        try:
            for task in tasks:
                with starting(), _all_or_none(pool):
                    pending.append((task, pool.submit(_work, task)))
                size += task.size
                while size >= max_size and len(pending) > workers:
                    size -= pending[0][0].size
                    yield _first(pending)
            while pending:
                yield _first(pending)
        finally:
            for _, future in pending:
                future.cancel()


@contextmanager
def _all_or_none(pool: ProcessPoolExecutor) -> Iterator[None]:
    """If only some of the pool's processes start, or not its thread, which counts as one, kills them: nothing would end
    them, and Python waits for them."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        for child in (pool._processes or {}).values():
            child.kill()
        thread: Any = pool._executor_manager_thread
        if thread is None or thread.ident is not None:
            raise
        pool._executor_manager_thread = None  # type: ignore[assignment]  # not started, so it cannot be joined
        raise OSError(str(error)) from error


def _first(pending: deque[tuple[T, Future]]) -> tuple[T, R]:
    task, future = pending.popleft()
    return task, future.result()


_FUNCTION: Callable[[Any], Any] | None = None  # one per worker process


def _start_worker(function: Callable[[Any], Any] | None = None) -> None:
    global _FUNCTION
    _FUNCTION = function
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: die silently, the parent reports it
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # otherwise a killed parent leaves its workers waiting forever


def _work(task: Any) -> Any:
    assert _FUNCTION is not None
    return _FUNCTION(task)


def in_child(function: Callable[..., None], *args: Any) -> None:
    """Call a function in a process of its own; its exceptions are raised here."""
    receiver, sender = _FORK.Pipe(duplex=False)
    child = _FORK.Process(target=_call, args=(sender, function, args))
    with starting():
        child.start()
    sender.close()
    try:
        error = receiver.recv()
    except EOFError:
        error = ConfigError(
            "--data.tokenizer: the process that trained it was killed, perhaps for lack of memory; use "
            "--data.prepare_workers 1, which starts none"
        )
    finally:
        child.kill()
        child.join()
        receiver.close()
    if error is not None:
        raise error


def _call(sender: Connection, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    _start_worker()
    try:
        function(*args)
        sender.send(None)
    except Exception as error:
        sender.send(error)


def num_cores() -> int:
    """CPUs that this process may use: a container sees all CPUs of the machine, but may have the time of a few."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([allowed, *(max(1, math.ceil(quota)) for quota in _quotas())])


def memory_bytes() -> int:
    """Memory that this process may use: a container sees all of the machine's, but may have a part of it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    mounted, *levels = _cgroups()
    for file in (mounted / "memory/memory.limit_in_bytes", *(folder / "memory.max" for folder in levels)):
        with suppress(OSError, ValueError):  # "max": no limit
            limits.append(int(file.read_text()))
    return min(limits)


def _quotas() -> Iterator[float]:
    """CPU limits of Linux cgroups."""
    mounted, *levels = _cgroups()
    with suppress(OSError, ValueError):
        quota_us, period_us = (float((mounted / f"cpu/cpu.cfs_{n}_us").read_text()) for n in ("quota", "period"))
        if quota_us > 0:  # -1: no limit
            yield quota_us / period_us
    for folder in levels:
        with suppress(OSError, ValueError):  # "max": no limit
            quota_us, period_us = map(float, (folder / "cpu.max").read_text().split())
            yield quota_us / period_us


def _cgroups(mounted: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """Folders with limits of Linux cgroups: of version 1 where a container mounts its own; then each level of 2."""
    level = Path()
    with suppress(OSError):
        level = Path(own.read_text().rpartition("0::/")[2].strip())
    return [mounted, *(mounted / folder for folder in (level, *level.parents))]


@contextmanager
def starting(setting: str = "--data.prepare_workers", none: int = 1) -> Iterator[None]:
    """Wrap code that starts processes. `none`: the value of `setting` that starts none.

    Python 3.12 warns about forks beside threads; it is ignored, as our children use only tokenizers and numpy.

    Raises:
        ConfigError: no process can be started.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            yield
    except OSError as error:  # no more processes are allowed, or no semaphores: /dev/shm is missing or read-only
        raise ConfigError(
            f"{setting}: cannot start a process ({error.strerror or error}); use {none}, which starts none"
        ) from error
