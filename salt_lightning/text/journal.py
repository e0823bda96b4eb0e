"""A folder that takes long to make: one process makes it, another waits, and a killed one's successor goes on.

.NAME.lock         locked by the process that makes the folder; the system unlocks it when that process has died
.NAME.partial/     the folder while it is made
    journal.json   what of it is surely on the disk; without it there is nothing to go on from
NAME/              complete
"""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from lightning.pytorch.utilities.rank_zero import rank_zero_info

NO_LOCKS = (ENOLCK, EOPNOTSUPP, ENOSYS)  # of a file system without them
_JOURNAL = "journal.json"


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """Under the name is the old content or the new one, whole, whatever happens and whoever else writes it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    with whole(path) as file:
        file.write(json.dumps(data, indent=1).encode())


@dataclass(frozen=True)
class Unfinished:
    """A folder in the making, held by this process alone."""

    path: Path
    lock: Path
    owner: str

    def journal(self) -> dict[str, Any]:
        """What the process before this one wrote; empty if there is nothing, or nothing that can be read."""
        with suppress(FileNotFoundError, ValueError, RecursionError):
            found = json.loads((self.path / _JOURNAL).read_bytes())
            return found if isinstance(found, dict) else {}
        return {}

    def write_journal(self, state: dict[str, Any]) -> None:
        """Say what is on the disk. It must be there already."""
        self.check_owned()
        write_json(self.path / _JOURNAL, state)

    def forget(self) -> None:
        """There is nothing to go on from."""
        (self.path / _JOURNAL).unlink(missing_ok=True)

    def is_owned(self) -> bool:
        """The lock held other processes off. On some network file systems it does so within one machine alone."""
        return self.lock.exists() and self.lock.read_text() == self.owner

    def check_owned(self) -> None:
        if not self.is_owned():
            raise OSError(ENOLCK, f"no file locks between machines, and {_who(self.lock)} also writes there")


@contextmanager
def making(folder: Path) -> Iterator[Unfinished | None]:
    """Make `folder`: the block fills the unfinished one, which takes its name at the end. None: it is there.

    Where the block raises, the unfinished folder stays if it has a journal. Waits while another process makes it.

    Raises:
        OSError: nothing can be written there, or another machine's process writes there in spite of the lock.
    """
    partial, lock = folder.parent / f".{folder.name}.partial", folder.parent / f".{folder.name}.lock"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(lock) as owner:
        if folder.exists():
            yield None
            return
        unfinished = Unfinished(partial, lock, owner)
        if not unfinished.journal():
            shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(exist_ok=True)
            yield unfinished
            unfinished.check_owned()
            os.replace(partial, folder)
            (folder / _JOURNAL).unlink(missing_ok=True)  # only now: a kill before it costs nothing
        finally:
            if unfinished.is_owned() and not (partial / _JOURNAL).exists():
                shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[str]:
    """Hold the lock; what the file then says of its owner."""
    owner = f"process {os.getpid()} on {socket.gethostname()} ({uuid4().hex})"
    file = _lock(path)
    try:
        path.write_text(owner)
        yield owner
    finally:
        if path.exists() and path.read_text() == owner:
            path.unlink()
        fcntl.flock(file, fcntl.LOCK_UN)  # closing would not do while a forked child has it open, too
        file.close()


def _lock(path: Path) -> IO[str]:
    while True:
        file = open(path, "a")  # noqa: SIM115 (the caller closes it)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                rank_zero_info(f"waiting for {_who(path)}, which is preparing the same data in {path.parent}")
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            file.close()
            raise OSError(ENOLCK if error.errno in NO_LOCKS else error.errno, error.strerror) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # its last owner has removed it: others may have locked a new file of that name


def _who(path: Path) -> str:
    text = path.read_text() if path.exists() else ""
    return text.rpartition(" (")[0] or "another process"
