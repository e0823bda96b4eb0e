"""Progress of the preparation: one line, redrawn on a terminal, otherwise logged every 30 seconds."""

import os
import sys
from dataclasses import dataclass
from typing import TextIO

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tqdm import tqdm

from salt_lightning.errors import counted

_TERMINAL_S, _LOG_S = 0.5, 30.0


@dataclass(frozen=True)
class Done:
    """What is prepared at some time."""

    time_s: float
    documents: int
    tokens: int | None  # None: nothing is tokenized
    text_bytes: int
    read_bytes: int  # of the input files, compressed as they are


def progress_line(start: Done, now: Done, total_bytes: int, doing: str = "tokenizing") -> str:
    """Counts, rates since `start`, and the time left unless the input's size is unknown (0)."""
    seconds = max(now.time_s - start.time_s, 1e-9)
    line = f"{_short(now.documents)} documents ({_short((now.documents - start.documents) / seconds)}/s), "
    if now.tokens is not None and start.tokens is not None:
        line += f"{_short(now.tokens)} tokens ({_short((now.tokens - start.tokens) / seconds)}/s), "
    line += f"{(now.text_bytes - start.text_bytes) / seconds / 1e6:.1f} MB/s"
    if total_bytes:
        share = min(1.0, now.read_bytes / total_bytes)
        left_s = seconds * (total_bytes - now.read_bytes) / max(1, now.read_bytes - start.read_bytes)
        line = f"{share:.0%}, {line}, {tqdm.format_interval(max(0.0, left_s))} left"
    return f"{doing}: {line}"


def summary_line(start: Done, now: Done) -> str:
    """What was done, and the rate since `start`."""
    seconds = max(now.time_s - start.time_s, 1e-9)
    text_rate = (now.text_bytes - start.text_bytes) / seconds
    before = counted(start.documents, "document")
    resumed = f", resumed after {before} of a stopped preparation" if start.documents else ""
    return (
        f"tokenized {counted(now.documents, 'document')}, {now.tokens} tokens, {now.text_bytes / 1e6:.1f} MB of text "
        f"in {seconds:.1f} s ({text_rate / 1e6:.1f} MB/s){resumed}"
    )


def _short(number: float) -> str:
    return tqdm.format_sizeof(number) if number >= 1000 else f"{number:.0f}"


def is_terminal(stream: TextIO) -> bool:
    """Whether a line there can be drawn again in place: TERM=dumb means that it cannot, or shall not."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class Progress:
    """Shows or logs the line."""

    def __init__(self, total_bytes: int, start: Done, doing: str = "tokenizing") -> None:
        self._start, self._total_bytes, self._doing = start, total_bytes, doing
        self._on_terminal = is_terminal(sys.stderr)
        self._said_s = start.time_s
        self._bar = tqdm(bar_format="{desc}", disable=not self._on_terminal, leave=False)

    def update(self, now: Done) -> None:
        if now.time_s - self._said_s >= (_TERMINAL_S if self._on_terminal else _LOG_S):
            self._said_s = now.time_s
            line = progress_line(self._start, now, self._total_bytes, self._doing)
            if self._on_terminal:
                self._bar.set_description_str(line)
            else:
                rank_zero_info(line)

    def close(self) -> None:
        self._bar.close()
