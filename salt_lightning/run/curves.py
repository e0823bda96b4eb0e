"""What a run has logged, read back from TensorBoard's event files."""

import math
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
THIRDS = ("easy", "medium", "hard")  # of the documents, by a teacher's loss: val/ce/easy, ...
_FRAME_BYTES = 16  # around the content of a record: its length in 8 bytes, and the checksums of both


@dataclass(frozen=True, eq=False)
class Curve:
    """A logged scalar over optimizer steps, in order."""

    steps: np.ndarray
    values: np.ndarray

    def total_at(self, step: float, end: float = math.inf) -> float:
        """A cumulative scalar: 0 at step 0, linear between points, then on at its mean rate until `end`."""
        steps, values = np.append(0, self.steps), np.append(0.0, self.values)
        beyond = max(0.0, min(step, end) - steps[-1])
        rate = values[-1] / steps[-1] if steps[-1] > 0 else 0.0
        return float(np.interp(step, steps, values) + beyond * rate)


def start_number(file: Path) -> int:
    """Which start of the run wrote an event file, by the end of its name, from 1; 0: not known."""
    found = re.search(r"\.start-(\d{1,9})$", file.name)
    return int(found[1]) if found else 0


def _in_order(files: Iterable[Path]) -> list[Path]:
    """By start; a file without a number, as other loggers write it, belongs to the start before it, by its name."""
    highest, placed = 0, []
    for file in sorted(files, key=lambda file: file.name):
        number = start_number(file)
        highest = max(highest, number)
        placed.append((number or highest, file.name, file))
    return [file for *_, file in sorted(placed)]


def read_curves(folder: Path) -> tuple[dict[str, Curve], tuple[str, ...]]:
    """The curves, and of each file that holds more than could be read up to which step it was read.

    In the order in which it was written, whatever the clocks of the machines said: of a step logged twice the later
    one wins.
    """
    points: dict[str, dict[int, float]] = {}
    damaged = []
    for file in _in_order(file for file in folder.glob("*tfevents*") if file.is_file()):
        size, read, step = file.stat().st_size, 0, 0  # before it is read: a run under way may write on
        # TensorBoard's raw loader, which ends without a word at a record that is cut off or fails its checksum; its
        # EventAccumulator keeps a sample of the points alone.
        with suppress(DecodeError, OverflowError, MemoryError):  # of a length or a content that was made up
            for record in RawEventFileLoader(str(file)).Load():
                event = Event.FromString(record)
                _follow(points, event)
                read, step = read + len(record) + _FRAME_BYTES, max(step, event.step)
        if read < size:
            rest = "the rest is damaged, or still being written"
            damaged.append(f"{printable(str(file))} could be read up to step {step}: {rest}")
    ordered = {tag: sorted(curve.items()) for tag, curve in points.items() if curve}
    return {tag: Curve(*map(np.array, zip(*curve, strict=True))) for tag, curve in ordered.items()}, tuple(damaged)


def _follow(points: dict[str, dict[int, float]], event: Event) -> None:
    if event.session_log.status == SessionLog.START:  # a resume: what came after its checkpoint is void
        for curve in points.values():
            for step in [s for s in curve if s >= event.step]:
                del curve[step]
    for value in event.summary.value:
        if value.tag in CUMULATIVE or value.tag.startswith(("val/", "test/", "probe/")):
            points.setdefault(value.tag, {})[event.step] = value.simple_value
