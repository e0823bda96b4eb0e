"""One fit or predict at a time in a run's folder: two would mix their logs and remove each other's checkpoints."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EAGAIN, EEXIST, ENOTDIR, EPERM, EROFS
from pathlib import Path
from typing import IO

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from salt_lightning.errors import ConfigError, printable
from salt_lightning.text.journal import NO_LOCKS

_NAME = ".lock"
# A network file system may take that long to notice that a machine has died with its locks (NFSv4: 90 s).
_OTHER_MACHINE_S = 120.0


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Hold the folder, made if it is not there, and removed again where the block leaves nothing in it.

    The system frees it when the process dies, whatever its workers do: such locks are not inherited.

    Raises:
        ConfigError: another process holds it; one of another machine is waited for first.
    """
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    try:
        file = _lock(run)
    except OSError as error:
        _say_unlocked(run, error)
        _remove_empty(made)
        yield
        return
    try:
        yield
    finally:
        (run / _NAME).unlink(missing_ok=True)
        file.close()
        _remove_empty(made)


def _say_unlocked(run: Path, error: OSError) -> None:
    """What it means that the folder cannot be locked; nothing where it cannot be written at all, which others say."""
    if error.errno in NO_LOCKS:
        (run / _NAME).unlink(missing_ok=True)
        rank_zero_info(
            f"--run {run}: its file system has no locks ({error.strerror}); start no other fit or predict there before "
            "this one ends"
        )
    elif error.errno in (EACCES, EPERM) and os.path.exists(run / _NAME):
        raise ConfigError(
            f"--run {run}: {_NAME} belongs to another user, whose fit or predict works there or was killed; wait for "
            "its end, remove that file if there is none, or choose another folder"
        ) from error
    elif error.errno not in (EROFS, EACCES, EPERM, EEXIST, ENOTDIR):
        raise OSError(error.errno, error.strerror, str(run / _NAME)) from error


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # something is in it
        for folder in folders:
            folder.rmdir()


def _lock(run: Path) -> IO[str]:
    path, end_s = run / _NAME, time.monotonic() + _OTHER_MACHINE_S
    said = False
    while True:
        run.mkdir(parents=True, exist_ok=True)
        try:
            file = open(path, "a+")  # noqa: SIM115 (the caller closes it)
        except FileNotFoundError:  # its last owner has just removed the folder
            continue
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            boot, _, owner = (printable(line) for line in file.read().rpartition("\n"))
            file.close()
            if error.errno not in (EACCES, EAGAIN):
                raise
            # another boot: another machine has this name, as a pod keeps its own wherever it starts anew
            here = owner.endswith(f" on {socket.gethostname()}") and boot in ("", _boot())
            owner = owner or "another process"
            if here or time.monotonic() > end_s:
                raise ConfigError(
                    f"--run {run}: {owner} works there; wait for its end, or choose another folder"
                ) from error
            if not said:
                rank_zero_info(f"--run {run}: waiting for {owner}, at most {_OTHER_MACHINE_S:g} s")
            said = True
            time.sleep(1.0)
            continue
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate(0)
                file.write(f"{_boot()}\nprocess {os.getpid()} on {socket.gethostname()}")
                file.flush()
                return file
        file.close()  # its last owner has removed it: others may have locked a new file of that name


def _boot() -> str:
    """What Linux calls this start of this machine; nothing elsewhere."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
