"""Results of the verb compare.

NaN means "unknown" in every number here; it is shown as '-' and is null in the JSON file.
"""

from dataclasses import dataclass
from typing import Any

from salt_lightning.run.runlog import Run


@dataclass
class Row:
    """One run in the table. Shares are relative to the reference's steps, FLOPs (student and teacher) and seconds.

    Other costs are kept apart: its teacher's training, and the scoring of the rows for a selection.
    """

    run: str
    method: str
    seed: int | None
    running: bool
    steps: int
    max_steps: int | None
    val_step: float
    val_ce: float
    difference: float  # to the reference's mean
    accuracy: float
    bits_per_byte: float
    reached_step: float  # where validation CE first falls to the reference's
    reached_steps_share: float
    reached_flops_share: float
    reached_flops_share_with_teacher_training: float  # and with the scoring for a selection
    reached_seconds_share: float
    reached_seconds_share_with_teacher_training: float  # likewise
    seconds: float
    teacher_seconds: float  # of `seconds`, in the teacher's forward
    student_flops: float
    teacher_flops: float
    teacher_training_flops: float
    teacher_training_seconds: float
    scoring_flops: float
    scoring_seconds: float
    last: dict[str, float]  # every val/, test/ and probe/ tag


@dataclass
class Group:
    """The seeds of one experiment. Numbers are of the `n` finished runs, in order; std divides by n - 1."""

    label: str
    runs: list[str]
    n: int
    val_ce: list[float]
    mean: float
    std: float
    difference: float
    paired_differences: dict[str, float]  # seed -> difference to the reference's run of that seed; NaN without one
    reached_steps_share: list[float]
    reached_flops_share: list[float]
    reached_flops_share_with_teacher_training: list[float]
    reached_seconds_share: list[float]
    equal: dict[str, list[float]]  # axis -> CE of each at the point that all finished runs have reached
    changed: dict[str, tuple[Any, Any]]  # setting -> (the reference's, this one's)


@dataclass
class Comparison:
    """All results of `compare`; `runs` keeps the curves for the figure."""

    reference: str
    reference_val_ce: float
    reference_is_over: bool  # whether that is a final loss, or that of a reference under way
    rows: list[Row]
    groups: list[Group]
    equal: dict[str, tuple[float, dict[str, float]]]  # axis -> (where, run -> validation CE there)
    between: dict[str, list[str]]  # axis -> runs that were not validated there: interpolated
    notes: list[str]
    other_text: list[str]  # runs that were validated on other text than the reference
    runs: list[Run]
