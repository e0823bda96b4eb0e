"""Worker processes that end silently with their parent; the cores and the memory that they may use."""

import itertools
import math
import os
import signal
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from salt_lightning.errors import ConfigError, MachineError

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
    # A thread for each worker keeps it busy while this one writes. Workers end first, so no thread waits for one.
    with ThreadPoolExecutor(workers) as threads, _children(workers, _serve, function) as connections:
        idle: SimpleQueue[Connection] = SimpleQueue()
        for connection in connections:
            idle.put(connection)
        for task in tasks:
            with starting():
                try:
                    pending.append((task, threads.submit(_ask, idle, task)))
                except RuntimeError as error:  # a thread counts as a process where their number is limited
                    raise OSError(str(error)) from error
            size += task.size
            while size >= max_size and len(pending) > workers:
                size -= pending[0][0].size
                yield _first(pending)
        while pending:
            yield _first(pending)


def _first(pending: deque[tuple[T, Future]]) -> tuple[T, R]:
    task, future = pending.popleft()
    return task, future.result()


def _ask(idle: "SimpleQueue[Connection]", task: Any) -> Any:
    connection = idle.get()  # there are as many as threads
    try:
        return _answer(connection, task)
    finally:
        idle.put(connection)


def _answer(connection: Connection, task: Any) -> Any:
    """What `_serve` returns at the other end; raises what it raises, or BrokenProcessPool if it has been killed."""
    answer = None
    with suppress(EOFError, OSError):
        connection.send(task)
        answer = connection.recv()
    if answer is None:  # not raised from the error: its frames hold a buffer that Python 3.13 cannot collect in silence
        raise BrokenProcessPool("a worker was killed")
    result, error = answer
    if error is not None:
        raise error
    return result


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    while True:
        task = connection.recv()
        result, failed = None, None
        try:
            result = function(task)
        except Exception as error:
            error.add_note(traceback.format_exc())  # a pickled one has no traceback
            failed = error
        connection.send((result, failed))


@contextmanager
def _children(count: int, target: Callable[..., None], *args: Any) -> Iterator[list[Connection]]:
    """Processes that run `target(connection, *args)`, and the other ends. However the block is left, they are killed.

    Ctrl-C reaches a terminal's whole process group, but only this process may act on it: it may ignore it, and a child
    that dies by itself looks as if it was killed. So they are forked with the signal blocked, and keep it so.
    """
    children: list[BaseProcess] = []
    connections: list[Connection] = []
    try:
        for _ in range(count):
            with starting():
                ours, theirs = _FORK.Pipe()
                connections.append(ours)
                children.append(_FORK.Process(target=_run, args=(target, theirs, *args), daemon=True))
                before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                try:
                    children[-1].start()
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
                theirs.close()  # or a killed child would not end the connection
        yield connections
    finally:
        started = [child for child in children if child.pid is not None]
        for child in started:
            child.kill()
        for child in started:
            child.join()


def _run(target: Callable[..., None], connection: Connection, *args: Any) -> None:
    try:
        threading.Thread(target=end_with_parent, daemon=True).start()
    except RuntimeError:  # no more threads are allowed; the parent sees the end, and says so
        os._exit(1)
    with suppress(EOFError):  # of a parent that was interrupted before it knew this child
        target(connection, *args)


def end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # otherwise a killed parent leaves its workers waiting forever


def in_child(function: Callable[..., None], *args: Any) -> None:
    """Call a function in a process of its own; its exceptions are raised here."""
    with _children(1, _serve, lambda _: function(*args)) as (connection,):
        try:
            _answer(connection, None)
        except BrokenProcessPool as killed:
            raise MachineError(
                "--data.tokenizer: the process that trained it was killed, perhaps for lack of memory; use "
                "--data.prepare_workers 1, which starts none"
            ) from killed


def num_cores() -> int:
    """CPUs that this process may use: a container sees all CPUs of the machine, but may have the time of a few."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([allowed, *(max(1, math.ceil(quota)) for quota in _quotas())])


def memory_bytes() -> int:
    """Memory that this process may use: a container sees all of the machine's, but may have a part of it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder, name in itertools.product(_cgroups("memory"), ("memory.limit_in_bytes", "memory.max")):
        with suppress(OSError, ValueError):  # "max": no limit
            limits.append(int((folder / name).read_text()))
    return min(limits)


def _quotas() -> Iterator[float]:
    """CPU limits of Linux cgroups."""
    for folder in _cgroups("cpu"):
        with suppress(OSError, ValueError):
            quota_us, period_us = (float((folder / f"cpu.cfs_{n}_us").read_text()) for n in ("quota", "period"))
            if quota_us > 0:  # -1: no limit
                yield quota_us / period_us
        with suppress(OSError, ValueError):  # "max": no limit
            quota_us, period_us = map(float, (folder / "cpu.max").read_text().split())
            yield quota_us / period_us


def _cgroups(
    controller: str, mounted: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[Path]:
    """Folders with limits of a controller of Linux cgroups, versions 1 and 2: this process's and those above it."""
    levels = {controller: Path(), "": Path()}  # "": version 2, which has one folder for all controllers
    with suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, names, path = line.split(":", 2)
            levels |= {name: Path(path.strip("/")) for name in names.split(",") if name in levels}
    # a container may mount its own at the top, and read the path from outside
    return [mounted / name / folder for name, level in levels.items() for folder in (level, *level.parents)]


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
    # no more processes are allowed; no semaphores (/dev/shm is missing or read-only); or this is a daemon of a pool
    except (OSError, AssertionError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{setting}: cannot start a process ({why}); use {none}, which starts none") from error
