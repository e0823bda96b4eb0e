"""Lets one fit or predict at a time use a run's folder, and one fit a checkpoint folder.

Two would mix logs, and replace and remove each other's checkpoints.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EAGAIN, EEXIST, ENOTDIR, EPERM, EROFS
from pathlib import Path
from stat import S_ISDIR
from typing import IO

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from salt_lightning.errors import ConfigError, failed_write, printable
from salt_lightning.text.journal import NO_LOCKS, no_link

_NAME = ".lock"
# A network file system may take this long to notice that a machine with locks has died (NFSv4: 90 s).
_OTHER_MACHINE_S = 120.0


@contextmanager
def held(run: Path, setting: str = "--run") -> Iterator[None]:
    """Locks the folder that `setting` names; creates it if missing, and removes it again if the block leaves it empty.

    The system frees the lock when the process dies, whatever its workers do: such locks are not inherited.

    Raises:
        ConfigError: another process holds the lock; waits first if that is on another machine.
    """
    made = [folder for folder in (run, *run.parents) if not os.path.exists(folder)]
    file = None
    try:
        file = _lock(run, f"{setting} {run}")
    except OSError as error:
        _say_unlocked(run, f"{setting} {run}", error)
        _remove_empty(made)
    try:  # not inside the except block, whose error would become the context of all that follow
        yield
    finally:
        if file is not None:
            with suppress(OSError):  # it may be another user's, in a folder that only lets owners remove
                (run / _NAME).unlink()
            file.close()
            _remove_empty(made)


def _say_unlocked(run: Path, named: str, error: OSError) -> None:
    """Reports that the folder cannot be locked; silent if it cannot be written at all, which others report."""
    if error.errno in NO_LOCKS:
        with suppress(OSError):
            (run / _NAME).unlink()
        rank_zero_info(
            f"{named}: its file system has no locks ({error.strerror}); do not start another fit or predict there "
            "before this one ends"
        )
    elif error.errno in (EACCES, EPERM) and os.path.exists(run / _NAME):
        raise ConfigError(
            f"{named}: {_NAME} belongs to another user, whose fit or predict is running there or was killed; wait "
            "until it ends, remove that file if none is running, or choose another folder"
        ) from error
    elif error.errno not in (EROFS, EACCES, EPERM, EEXIST, ENOTDIR):
        raise failed_write(run / _NAME, error.strerror or str(error), error.errno) from error


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # it is not empty
        for folder in folders:
            folder.rmdir()


def _lock(run: Path, named: str) -> IO[str]:
    """The locked file; waits for a holder on another machine, which may have died unnoticed."""
    path, end_s = run / _NAME, time.monotonic() + _OTHER_MACHINE_S
    said = False
    while True:
        if (file := _open(path)) is None:
            continue
        try:
            _take(file)
        except _Held as other:
            file.close()
            if other.here or time.monotonic() > end_s:
                raise ConfigError(
                    f"{named}: {other} is using it; wait until it ends, or choose another folder"
                ) from other
            if not said:
                rank_zero_info(f"{named}: waiting for {other}, at most {_OTHER_MACHINE_S:g} s")
            said = True
            time.sleep(1.0)
            continue
        except OSError:
            file.close()
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate(0)
                file.write(f"{_machine()}\nprocess {os.getpid()} on {socket.gethostname()}")
                file.flush()
                return file
        file.close()  # the last owner has removed it: others may have locked a new file with this name


def _open(path: Path) -> IO[str] | None:
    """The file, created with its folder if missing; None if the folder's last owner was just removing either."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        with suppress(FileNotFoundError):
            if not S_ISDIR(os.lstat(error.filename).st_mode):
                raise
        return None
    try:
        return open(path, "a+", opener=no_link)
    except FileNotFoundError:
        if path.is_symlink():  # to nothing
            raise
        return None


class _Held(Exception):
    """Somebody else has the lock; the text says who, `here` whether certainly on this machine."""

    def __init__(self, file: IO[str]) -> None:
        file.seek(0)
        boot, _, owner = (printable(line) for line in file.read().rpartition("\n"))
        # another machine or container may have this name, e.g. a pod, which keeps its name when it is restarted
        self.here = owner.endswith(f" on {socket.gethostname()}") and boot == _machine()
        super().__init__(owner or "another process")


def _take(file: IO[str]) -> None:
    """Locks the file.

    Raises:
        _Held: another process has it.
        OSError: the file system has no locks.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (EACCES, EAGAIN):
            raise
        raise _Held(file) from error


def _machine() -> str:
    """Linux's boot ID of this machine, and the namespace of process IDs of this container; empty on other systems."""
    with suppress(OSError):
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot_id} {os.readlink('/proc/self/ns/pid')}"
    return ""
