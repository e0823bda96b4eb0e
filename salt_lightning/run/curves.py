"""Reads what a run has logged from its TensorBoard event files."""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from salt_lightning.errors import printable

CUMULATIVE = (
    "train/tokens",
    "train/time_s",
    "train/teacher_time_s",
    "train/flops_student_total",
    "train/flops_teacher_total",
)
# The name of an interrupted copy of an event file, perhaps beside the file: it goes on after the start's number.
_PART = re.compile(r"\.\d+\.\d+\.start-\d+\D")
THIRDS = ("easy", "medium", "hard")  # of the documents, by a teacher's loss: val/ce/easy, ...
_FRAME_BYTES = 16  # in addition to a record's content: its length in 8 bytes, and a checksum of each


@dataclass(frozen=True, eq=False)
class Curve:
    """A logged scalar over optimizer steps, in order."""

    steps: np.ndarray
    values: np.ndarray

    def totals_at(self, at: np.ndarray) -> np.ndarray:
        """A cumulative scalar at these steps: 0 at step 0, linear between points, then growing at its mean rate."""
        steps, values = np.append(0, self.steps), np.append(0.0, self.values)
        rate = values[-1] / steps[-1] if steps[-1] > 0 else 0.0
        return np.interp(at, steps, values) + np.maximum(0.0, at - steps[-1]) * rate


def start_number(file: Path) -> int:
    """The number of the start of the run that wrote an event file, from its name, counted from 1; 0: not known."""
    found = re.search(r"\.start-(\d{1,9})$", file.name)
    return int(found[1]) if found else 0


def _in_order(files: Iterable[Path]) -> list[Path]:
    """Sorts by start; a file without a number (from another logger) belongs to the start before it by name."""
    highest, placed = 0, []
    for file in sorted(files, key=lambda file: file.name):
        number = start_number(file)
        highest = max(highest, number)
        placed.append((number or highest, file.name, file))
    return [file for *_, file in sorted(placed)]


def read_curves(folder: Path, apart: bool = False) -> tuple[dict[str, Curve], tuple[str, ...]]:
    """The curves, and messages about files that could not be read to their end: only if no later start began
    before the last step read, and so logged the rest again.

    Files are read in the order in which they were written, whatever the machines' clocks said: if a step was logged
    twice, the later value wins. `apart`: all values of a step are from one file, the last that has that step, as each
    `test` writes its own.
    """
    points: dict[str, dict[int, float]] = {}
    damaged: list[tuple[int, str]] = []
    files = (file for file in folder.glob("*tfevents*") if file.is_file() and not _PART.search(file.name))
    for file in _in_order(files):
        size, read, step = file.stat().st_size, 0, 0  # size before reading: a running run may append
        own: dict[str, dict[int, float]] = {}
        # TensorBoard's raw loader silently ends at a record that is cut off or fails its checksum; its EventAccumulator
        # would keep only a sample of the points.
        with suppress(DecodeError, OverflowError, MemoryError, PermissionError):  # a forged length or content
            for record in RawEventFileLoader(str(file)).Load():
                event = Event.FromString(record)
                if event.session_log.status == SessionLog.START:
                    damaged = [(last, said) for last, said in damaged if last <= event.step - 1]
                    _void([*points.values(), *own.values()], event.step)
                _follow(own, event)
                read, step = read + len(record) + _FRAME_BYTES, max(step, event.step)
        if apart:
            again = {step for curve in own.values() for step in curve}
            points = {tag: {s: v for s, v in curve.items() if s not in again} for tag, curve in points.items()}
        for tag, curve in own.items():
            points.setdefault(tag, {}).update(curve)
        if read < size:
            closed = not os.access(file, os.R_OK)
            rest = "this user may not read it" if closed else "the rest is damaged or still being written"
            damaged.append((step, f"{printable(str(file))} could be read up to step {step}: {rest}"))
    ordered = {tag: sorted(curve.items()) for tag, curve in points.items() if curve}
    curves = {tag: Curve(*map(np.array, zip(*curve, strict=True))) for tag, curve in ordered.items()}
    return curves, tuple(said for _, said in damaged)


def _void(curves: Iterable[dict[int, float]], since: int) -> None:
    """A resume: values after its checkpoint are void."""
    for curve in curves:
        for step in [s for s in curve if s >= since]:
            del curve[step]


def _follow(points: dict[str, dict[int, float]], event: Event) -> None:
    for value in event.summary.value:
        if value.tag in CUMULATIVE or value.tag.startswith(("val/", "test/", "probe/")):
            points.setdefault(value.tag, {})[event.step] = value.simple_value
