"""What a reader of a comparison has to know besides its numbers: a sentence each, without its full stop."""

import math
import os
from typing import Any

import numpy as np

from salt_lightning import lineage
from salt_lightning.runlog import Run, changes_said


def remarks(
    silent: list[Run], runs: list[Run], students: list[Run], repeated: dict[str, str], reference: Run
) -> list[str]:
    """All of them.

    Args:
        silent: runs without a value in their logs.
        runs: the others.
        students: of these, what is compared: no teacher of another one, no repetition.
        repeated: names of runs that repeat another, and that one's.
        reference: what the students are compared with.
    """
    notes = [what for run in (*silent, *runs) for what in run.damaged]
    notes += [
        f"{run.name} has logged nothing that compare reads (its own event files) and is left out" for run in silent
    ]
    notes += [f"{run.name} is at step {run.steps_done} of {run.max_steps}" for run in runs if run.running]
    notes += [
        f"{run.name} was last validated at step {run.val_ce.steps[-1]} of {run.steps_done}: val CE is of that step"
        for run in runs
        if not run.running and len(run.val_ce.steps) and run.val_ce.steps[-1] < run.steps_done
    ]
    notes += [f"{run.name} has no validation yet" for run in runs if not len(run.val_ce.steps)]
    notes += [
        f"{run.name} repeats {repeated[run.name]} (same settings, same seed), which alone is counted"
        for run in runs
        if run.name in repeated
    ]
    notes += [note for run in runs for note in _beginning(run)]
    notes += [f"{run.name} has no config.yaml: its method is not known" for run in runs if not run.config]
    notes += _lost_teachers(runs, reference)
    return notes + _other_text(students, reference) + _tests(runs)


def _beginning(run: Run) -> list[str]:
    notes = []
    if run.began > 0:
        notes.append(
            f"{run.name} has no log before step {run.began}, and the run that it went on from is not found: where it "
            "reaches a loss may not be known"
        )
    if start := run.config.get("model.student.path"):
        notes.append(f"{run.name} began with the weights of {start}: what those took is not counted")
    return notes + [f"{run.name} went on {said}" for said in changes_said(run)]


def _lost_teachers(runs: list[Run], reference: Run) -> list[str]:
    """A run may be the teacher of another that names it by a path where it does not lie any more."""
    notes = []
    for run in runs:
        path = str(run.config.get("model.teacher.path") or "")
        if run.kd_steps > 0 and path.endswith(".ckpt") and lineage.teacher_run(run, runs) is None:
            others = [o.name for o in runs if o.kd_steps == 0 and o is not reference and not lineage.same_model(o, run)]
            if others:
                notes.append(
                    f"the teacher of {run.name}, {path}, lies in none of these runs. If it is {' or '.join(others)}, "
                    "which has another model, that one's cost is missing here"
                )
    return notes


# --- which text a loss is of ---


_ROUNDING = 1e-5  # TensorBoard keeps seven digits of each loss


def _text(run: Run, kind: str) -> tuple[float, float]:
    """Tokens and bytes that the last val or test loss is of."""
    ce, tokens, bits = (run.last(f"{kind}/{name}") for name in ("ce", "tokens", "bits_per_byte"))
    return tokens, ce * tokens / (bits * math.log(2) or math.nan)


def _same_text(a: Run, b: Run, kind: str) -> bool | None:
    """None: not known."""
    (tokens, size), (other_tokens, other_size) = _text(a, kind), _text(b, kind)
    if math.isnan(tokens + other_tokens):
        return None
    return tokens == other_tokens and (
        math.isnan(size + other_size) or math.isclose(size, other_size, rel_tol=_ROUNDING)
    )


def _other_text(students: list[Run], reference: Run) -> list[str]:
    notes = []
    for run in students:
        counts = run.curves.get("val/tokens")
        if counts is not None and (where := np.flatnonzero(np.diff(counts.values))).size:
            at = where[-1]
            notes.append(
                f"{run.name} was validated on other text from step {counts.steps[at + 1]} on "
                f"({counts.values[at + 1]:,.0f} tokens, before {counts.values[at]:,.0f})"
            )
        same = _same_text(run, reference, "val")
        if same is False:
            (tokens, size), (there, other_size) = _text(run, "val"), _text(reference, "val")
            if math.isclose(size, other_size, rel_tol=_ROUNDING):
                what, so = "in other tokens", "bits per byte can be compared, CE can not"
            else:
                what, so = "on other text", "their losses are no comparison"
            notes.append(
                f"{run.name} was validated {what} than {reference.name} ({tokens:,.0f}, there {there:,.0f}): {so}"
            )
        elif same is None and run.config and reference.config and (keys := _other_settings(run, reference)):
            here = _measured_on(run)
            said = ", ".join(f"{key} {run.config.get(key, here[key])}" for key in keys[:3])
            notes.append(f"{run.name} was perhaps validated on other tokens than {reference.name} ({said})")
    return notes


def _tests(runs: list[Run]) -> list[str]:
    tested = [run for run in runs if "test/ce" in run.curves]
    notes = []
    for run in tested:
        step = int(run.curves["test/ce"].steps[-1])
        if step != run.steps_done:
            notes.append(f"the test CE of {run.name} is of step {step}, not of step {run.steps_done}")
        if _same_text(run, tested[0], "test") is False:
            notes.append(f"the test CE of {run.name} is of other text than that of {tested[0].name}")
    return notes


def _measured_on(run: Run) -> dict[str, Any]:
    """Settings with another of which a loss is one of other tokens; None: nothing can be said."""
    config = run.config

    def files(name: str) -> list[str]:
        return sorted(
            os.path.normpath(str(v)) for k, v in config.items() if k.rstrip("0123456789") in (name, f"{name}.")
        )

    apart = config.get("data.val_source") is not None or "data.val_source.0" in config
    trained = config.get("data.tokenizer") == "train"  # or given by the path of a run that has trained the same
    names = ("data.val_rows", "data.block_size", "data.isolate_documents", "data.text_column")
    return {
        **{name: config.get(name) for name in names},
        "data.val_source" if apart else "data.source": files("data.val_source" if apart else "data.source"),
        "data.val_fraction": None if apart else config.get("data.val_fraction"),
        "data.tokenizer": None if trained else config.get("data.tokenizer"),
        "data.vocab_size": config.get("data.vocab_size") if trained else None,
        "trainer.limit_val_batches": config.get("trainer.limit_val_batches") or 1.0,
    }


_EITHER = ("data.tokenizer", "data.vocab_size")  # known of one of the runs alone they tell nothing


def _other_settings(run: Run, reference: Run) -> list[str]:
    here, there = _measured_on(run), _measured_on(reference)
    return [
        key
        for key, value in here.items()
        if value != there.get(key) and not (key in _EITHER and None in (value, there.get(key)))
    ]
