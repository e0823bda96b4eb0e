"""Read compressed files: .gz, .bz2, .xz, .zst, each of one or more streams."""

import bz2
import gzip
import io
import lzma
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import IO, Any

_ZST = b"\x28\xb5\x2f\xfd"
_BEGIN = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0", ".zst": _ZST, ".zstd": _ZST}
SUFFIXES = tuple(_BEGIN)


def misnamed(file: str) -> str:
    """The suffix of a compressed file whose first bytes say that it is none; empty if it is one, or cannot be read."""
    suffix = os.path.splitext(file)[1].lower()
    with suppress(OSError), open(file, "rb") as content:
        return suffix if not content.read(6).startswith(_BEGIN.get(suffix, b"")) else ""
    return ""


_READ = 1 << 17  # bytes at once


def unpacked(disk: IO[bytes], suffix: str) -> IO[bytes]:
    """The content of an open file whose name ends with one of `SUFFIXES`; any other file as it is.

    Raises (also during reading):
        EOFError, OSError, and errors of the format: the file is cut off, damaged, or followed by something else.
        ImportError: .zst without its package.
    """
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=disk, mode="rb")  # type: ignore[return-value]
    if suffix.startswith(".zst"):
        return _zstd().open(disk, "rb")
    of_xz = partial(lzma.LZMADecompressor, lzma.FORMAT_XZ)  # in the older .lzma format, zeros are an empty file
    begin: dict[str, Callable[[], Any]] = {".bz2": bz2.BZ2Decompressor, ".xz": of_xz}
    return io.BufferedReader(_Streams(disk, begin[suffix]), _READ) if suffix in begin else disk


def _zstd() -> Any:
    with suppress(ImportError):
        return import_module("compression.zstd")  # of Python 3.14 and later
    return import_module("backports.zstd")


class _Streams(io.RawIOBase):
    """Streams one after the other. Python's own readers take a damaged later stream for the end of the file."""

    def __init__(self, disk: IO[bytes], begin: Callable[[], Any]) -> None:
        self._disk, self._begin, self._stream = disk, begin, begin()
        self._is_between = False  # a whole stream has just ended

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            packed = b""
            if self._stream.eof:
                packed, self._stream, self._is_between = self._stream.unused_data, self._begin(), True
            elif self._stream.needs_input:
                packed = self._disk.read(_READ)
                if not packed and self._is_between:
                    return 0
                if not packed:
                    raise EOFError("it ends in the middle of a stream")
            if self._is_between:
                packed = packed.lstrip(b"\0")  # padding
                if not packed:
                    continue
                self._is_between = False
            data = self._stream.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)
