"""A folder that takes long to make: one process makes it, others wait, and after a kill the next one continues.

.NAME.lock         locked by the process that makes the folder; the system unlocks it when that process dies
.NAME.partial/     the folder while it is made
    journal.json   what is certainly on the disk; without it, the folder is made from scratch
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

NO_LOCKS = (ENOLCK, EOPNOTSUPP, ENOSYS)  # the file system has no locks
_JOURNAL = "journal.json"


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """Replace a file atomically: readers see the whole old or the whole new content, whoever else writes it."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")  # not its process ID: in containers all are 1
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def no_link(path: str, flags: int) -> int:
    """Opens a lock for `open`: it is emptied and written, so it must not be a link to somebody's file."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_json(path: Path, data: Any) -> None:
    with whole(path) as file:
        file.write(json.dumps(data, indent=1).encode())


@dataclass(frozen=True)
class Unfinished:
    """A folder that only this process is making."""

    path: Path
    lock: Path
    owner: str

    def journal(self) -> dict[str, Any]:
        """The journal of the previous process; empty if there is none, or it cannot be read."""
        with suppress(FileNotFoundError, ValueError, RecursionError):
            found = json.loads((self.path / _JOURNAL).read_bytes())
            return found if isinstance(found, dict) else {}
        return {}

    def write_journal(self, state: dict[str, Any]) -> None:
        """Record what is on the disk; it must be there already."""
        self.check_owned()
        write_json(self.path / _JOURNAL, state)

    def forget(self) -> None:
        """Delete the journal, so that nothing is resumed."""
        (self.path / _JOURNAL).unlink(missing_ok=True)

    def is_owned(self) -> bool:
        """Whether the lock has kept others away; on some network file systems it works only within one machine."""
        return self.lock.exists() and self.lock.read_text() == self.owner

    def check_owned(self) -> None:
        if not self.is_owned():
            raise OSError(ENOLCK, f"no file locks between machines, and {_who(self.lock)} also writes there")


@contextmanager
def making(folder: Path) -> Iterator[Unfinished | None]:
    """Make `folder`: the `with` block fills an unfinished one, which is then renamed. None: it already exists.

    If the block raises, the unfinished folder stays if it has a journal. Waits while another process makes it.

    Raises:
        OSError: the folder cannot be written, or a process of another machine writes there in spite of the lock.
    """
    partial, lock = folder.parent / f".{folder.name}.partial", folder.parent / f".{folder.name}.lock"
    unfinished = Unfinished(partial, lock, f"process {os.getpid()} on {socket.gethostname()} ({uuid4().hex})")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(unfinished):
        if folder.exists():
            yield None
            return
        if not unfinished.journal():
            shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(exist_ok=True)
            yield unfinished
            unfinished.check_owned()
            os.replace(partial, folder)
            (folder / _JOURNAL).unlink(missing_ok=True)  # only now: a kill before this loses nothing
        finally:
            if unfinished.is_owned() and not (partial / _JOURNAL).exists():
                shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(unfinished: Unfinished) -> Iterator[None]:
    """Hold the lock, whose file names the owner."""
    file = _lock(unfinished.lock)
    try:
        unfinished.lock.write_text(unfinished.owner)
        yield
    finally:
        if unfinished.is_owned():
            unfinished.lock.unlink()
        fcntl.flock(file, fcntl.LOCK_UN)  # closing does not unlock while a forked child has it open
        file.close()


def _lock(path: Path) -> IO[str]:
    while True:
        file = open(path, "a", opener=no_link)  # noqa: SIM115 (the caller closes it)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                from lightning.pytorch.utilities.rank_zero import rank_zero_info  # here: compare imports no lightning

                rank_zero_info(f"waiting for {_who(path)}, which is preparing the same data in {path.parent}")
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            file.close()
            raise OSError(ENOLCK if error.errno in NO_LOCKS else error.errno, error.strerror) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # its last owner removed it: another process may hold a new file of that name


def _who(path: Path) -> str:
    text = path.read_text() if path.exists() else ""
    return text.rpartition(" (")[0] or "another process"
