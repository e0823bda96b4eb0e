"""stdout and stderr that never end a run: they may be closed, full, or unable to show a file's name."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


def open_streams() -> None:
    """For a command's own process: opens what was closed before it began, to nothing, so that no other file gets its
    number; and escapes what a stream's encoding lacks, as in a file name, instead of raising."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(number, "w"))
        elif getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure"):
            with suppress(OSError, ValueError):  # closed, or another file has got its number since it was opened
                stream.reconfigure(errors="backslashreplace")


class _Steady:
    """A stream that goes silent when its reader is gone or its disk is full, so that this does not end the run."""

    def __init__(self, stream: Any, expected: type[OSError] | tuple[()]) -> None:
        self._stream, self._expected = stream, expected

    def __getattr__(self, name: str) -> Any:
        if name == "_stream":  # a copy has no stream yet
            raise AttributeError(name)
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, function: Callable[..., object], *args: str) -> None:
        try:
            function(*args)
        except OSError as error:
            with open(os.devnull, "w") as nothing, suppress(OSError):  # for its buffer too, if it has a file
                os.dup2(nothing.fileno(), self._stream.fileno())
            if self is sys.stdout and not isinstance(error, self._expected):
                print(f"stdout cannot be written ({error.strerror}): continuing without it", file=sys.stderr)


@contextmanager
def steady_streams(expected: type[OSError] | tuple[()] = ()) -> Iterator[None]:
    """Makes this process's stdout and stderr steady; says so if stdout cannot be written, except for `expected`."""
    before = sys.stdout, sys.stderr
    # None where it was closed before
    sys.stdout, sys.stderr = (stream and _Steady(stream, expected) for stream in before)
    try:
        yield
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        sys.stdout, sys.stderr = before
