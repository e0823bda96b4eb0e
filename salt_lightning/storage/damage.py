"""Checks that a checkpoint is as it was written, by reading every byte in several threads."""

import errno
import io
import operator
import os
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from salt_lightning.storage import shards
from salt_lightning.text.processes import num_cores

_THREADS = 8  # per rank, so several times that on a node
_whole: set[str] = set()  # identities of the checkpoints that this process knows to be whole


def identity(path: Path) -> str:
    """Differs from that of any other checkpoint, and of this one once its file, of a folder the table, has changed."""
    try:
        found = (path / shards.META if path.is_dir() else path).stat()
    except OSError:
        return f"{path.name} cannot be read"
    return f"{path.name} {found.st_ino} {found.st_ctime_ns}"


def trust(path: Path) -> None:
    """Notes that a checkpoint was found undamaged, so that a Trainer which loads it does not look again."""
    _whole.add(identity(path))


def is_trusted(path: Path) -> bool:
    return identity(path) in _whole


def of(path: Path, part: int = 0, parts: int = 1) -> str | None:
    """Why a checkpoint, file or folder, is not as it was written, in a few words; None if it is. Reads all of it, or
    one of `parts` of about equal size, e.g. of one process each.

    torch.save writes zip archives with a CRC-32 of each tensor, which torch.load does not check.
    """
    try:
        shards.load(path)
    except shards.DamageError as error:
        return str(error)
    return in_bytes(path, part, parts)


def in_bytes(path: Path, part: int = 0, parts: int = 1) -> str | None:
    """Like `of`, whatever the checkpoint contains, e.g. another model: whether its bytes are those written."""
    threads = min(num_cores(), _THREADS)
    looks: list[Callable[[], str | None]]
    if path.is_dir():
        looks = [partial(_changed, path / shards.META, [(f"{shards.META}: ", None)])]
        pieces: dict[str, list[tuple[str, Any]]] = {}  # by file: opening it per piece takes minutes on a network
        for key, info in _part_of(shards.table_of(path).storage_data, part, parts):
            pieces.setdefault(info.relative_path, []).append((f"{info.relative_path}, {key.fqn}: ", info))
        shares = -(-threads // max(1, len(pieces)))
        for name, places in pieces.items():
            looks += [partial(_changed, path / name, places[first::shares]) for first in range(shares)]
    else:
        own = range(part, parts * threads, parts)
        looks = [partial(_changed, path, [("", None)], slice(first, None, parts * threads)) for first in own]
    with ThreadPoolExecutor(threads) as pool:  # zlib releases the GIL
        return next(filter(None, pool.map(operator.call, looks)), None)


def _part_of(places: Mapping[Any, Any], part: int, parts: int) -> list[tuple[Any, Any]]:
    """The pieces whose last byte lies in this part of all files laid end to end: those of one file, or of a few."""
    ordered = sorted(places.items(), key=lambda item: (item[1].relative_path, item[1].offset))
    ends = list(accumulate(info.length for _, info in ordered))
    return [
        item for item, end in zip(ordered, ends, strict=True) if max(0, end - 1) * parts // max(1, ends[-1]) == part
    ]


def _changed(path: Path, archives: list[tuple[str, Any]], entries: slice = slice(None)) -> str | None:
    """The first entry with changed bytes in the `archives` of a file; for each a prefix for the message and its place
    in the file (None: all of it)."""
    where = archives[0][0] if archives else ""
    try:
        with open(path, "rb") as whole:
            for where, place in archives:
                file = _Part(whole, place.offset, place.length) if place else whole
                with zipfile.ZipFile(file) as files:
                    shards.require_stored_entries(files)
                    for info in files.infolist()[entries]:
                        try:
                            with files.open(info) as entry:
                                while entry.read(1 << 20):
                                    pass
                        except zipfile.BadZipFile:
                            return f"{where}{info.filename} has changed since it was written"
    except shards.DamageError as error:
        return f"{where}{error}"
    except Exception as error:  # a damaged archive raises errors of any kind
        shards.require_answer(path, error)
        return f"{where}cut off or damaged"
    return None


class _Part(io.RawIOBase):
    """A part of a file as a file of its own, without reading it into memory: a piece can have gigabytes."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file = file
        self._start, self._length, self._at = start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        at = offset + (0, self._at, self._length)[whence]
        if at < 0:
            raise OSError(errno.EINVAL, "before the beginning")
        self._at = at
        return at

    def readinto(self, buffer: Any, /) -> int:
        self._file.seek(self._start + self._at)
        left = max(0, self._length - self._at)
        count = self._file.readinto(memoryview(buffer)[:left])
        self._at += count
        return count
