"""Notes that a comparison needs besides its numbers: one sentence each, without the full stop."""

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from salt_lightning.comparison import lineage
from salt_lightning.errors import few
from salt_lightning.run.run_folder import small_text
from salt_lightning.run.runlog import CONTEXT, ROUNDING, Run, changes_said, differ


def remarks(
    silent: list[Run],
    runs: list[Run],
    experiments: list[list[Run]],
    repeated: dict[str, str],
    reference: Run,
    teachers_of: dict[str, dict[str, Run | None]],
) -> list[str]:
    """All notes on a comparison.

    `silent`: runs without a value in their logs; `runs`: the others. `experiments`: the compared runs, the seeds of an
    experiment together, without teachers and repetitions. `repeated`: name of a repetition -> name of the first.
    `teachers_of`: name of a run -> its `lineage.teacher_runs`.
    """
    notes = [what for run in (*silent, *runs) for what in run.damaged]
    notes += [
        f"{run.name} is left out: no values in its own TensorBoard event files, the only ones that compare reads"
        for run in silent
    ]
    notes += [
        f"{run.name} is at step {run.steps_done} of {run.max_steps}"
        + (", without its last validation" if run.unvalidated else "")
        for run in runs
        if run.running
    ]
    notes += [
        f"{run.name} was last validated at step {run.val_ce.steps[-1]} of {run.steps_done}: val CE is from that step"
        for run in runs
        if not run.running and len(run.val_ce.steps) and run.val_ce.steps[-1] < run.steps_done
    ]
    notes += [
        f"{run.name} has no validation{' yet' if run.running else ''}" for run in runs if not len(run.val_ce.steps)
    ]
    notes += [
        f"the last validation CE of {run.name} is {run.val_ce.values[-1]}: it diverged"
        for run in runs
        if not np.isfinite(run.val_ce.values[-1:]).all()
    ]
    by_name = {run.name: run for run in runs}
    notes += [
        f"{run.name} repeats {repeated[run.name]} (same seeds, and no setting differs that affects results), "
        f"so only the latter is counted{_yet_differs(run, by_name[repeated[run.name]])}"
        for run in runs
        if run.name in repeated
    ]
    notes += [note for run in runs for note in _beginning(run)]
    notes += [f"{run.name} has no config.yaml: its method is not known" for run in runs if not run.config]
    comparable = [
        [run for run in group if run.finished and not other_text(run, reference, "val")] for group in experiments
    ]
    notes += _better(comparable, reference)
    taught = [(run, *of) for run in runs if run.kd_steps > 0 or run.scores for of in teachers_of[run.name].items()]
    notes += _lost_teachers(taught, runs, reference) + _taught_teachers(taught)
    notes += [
        f"the scores that {run.name} selected rows by, {path}, are gone: the cost of scoring is unknown"
        for run in runs
        for path in lineage.lost_scores(run)
    ]
    once = [run for run in runs if run.name not in repeated]
    return notes + _other_text(once, reference) + _tests(runs)


def _yet_differs(run: Run, first: Run) -> str:
    ours, theirs = run.val_ce, first.val_ce
    same_step = run.finished and first.finished and ours.steps[-1:] == theirs.steps[-1:]
    if not same_step or math.isclose(ours.values[-1], theirs.values[-1], rel_tol=ROUNDING):
        return ""
    return (
        f"; yet its val CE is {ours.values[-1]:.4f}, there {theirs.values[-1]:.4f}: a file behind its settings (text, "
        "teacher, scores) or a library has changed, or the device rounds differently from run to run"
    )


def _beginning(run: Run) -> list[str]:
    notes = []
    if run.began > 0:
        where = "the step at which it reaches a loss may be unknown"
        if run.lost:
            where = "its earlier settings and losses, and the cost of its teachers, are unknown"
        lost = f", and the run that it resumed from was not found ({run.lost})" if run.lost else ""
        notes.append(f"{run.name} has no log before step {run.began}{lost}: {where}")
    if start := run.config.get("model.student.path"):
        notes.append(f"{run.name} started from the weights of {start}: the cost of training those is not counted")
    return notes + [f"{run.name} continued {said}" for said in changes_said(run)]


def _better(experiments: list[list[Run]], reference: Run) -> list[str]:
    """Names the best BASELINE on as much of the same text, if not the reference: e.g. with another learning rate.

    Each entry of `experiments` has the finished runs (seeds) of one.
    """
    seeds = next((group for group in experiments if reference in group), [])
    gains = {}
    for group in experiments:
        if group and group is not seeds and _could_be(group[0], reference):
            of_all = {run.sample for run in seeds}
            samples = {run.sample for run in group}  # if the reference has all of them, they are compared alone
            here = [run.last("val/ce") for run in seeds if run.sample in samples or not samples <= of_all]
            there = [run.last("val/ce") for run in group]
            gains[group[0].name] = float(np.mean(here) - np.mean(there)) if here else math.nan
    best = max((name for name, gain in gains.items() if gain > ROUNDING), key=lambda name: gains[name], default=None)
    if best is None or not reference.is_plain:
        return []
    return [
        f"{best}, a BASELINE of the same model that has read as much, ends {gains[best]:.4f} below the "
        f"reference; compare with the better one: --baseline {best}"
    ]


def _could_be(run: Run, reference: Run) -> bool:
    """Whether a run is a BASELINE that has trained the same model on as many tokens of the same text."""
    text, other = ({k: v for k, v in r.config.items() if k.startswith("data.source")} for r in (run, reference))
    read = [each.last("train/tokens") for each in (run, reference)]
    same = lineage.same_model(run, reference) and text == other and not other_text(run, reference, "val")
    return same and math.isclose(*read, rel_tol=0.01) and run.is_plain and run.began == 0 and not run.changes


_Taught = list[tuple[Run, str, Run | None]]  # a run, the path of a teacher of it, and the run that holds that


def _lost_teachers(taught: _Taught, runs: list[Run], reference: Run) -> list[str]:
    """Teachers whose run is not among these, so the cost of training them is not counted."""
    students: dict[str, list[str]] = {}
    for run, path, teacher in taught:
        if path.endswith(".ckpt") and teacher is None:
            students.setdefault(path, []).append(run.name)
    notes = []
    for path, names in students.items():
        others = [o.name for o in runs if o.kd_steps == 0 and o is not reference and _may_be(o, names, runs)]
        who, which = f"the teacher of {few(names)}, {path},", " or ".join(others)
        folder = Path(path).parent.parent
        if os.path.exists(path) and Path(path).parent.name == "checkpoints":  # else not in its run's folder
            notes.append(f"{who} is in none of these runs; to count its own training, name {folder} too")
        elif others:  # it was moved, and one of these may have trained it
            notes.append(
                f"{who} is in none of these runs; if it is from {which}, which has another model, the cost of that run "
                "is missing here"
            )
        else:
            notes.append(f"{who} is in none of these runs: the cost of its training is unknown")
    return notes


def _taught_teachers(taught: _Taught) -> list[str]:
    """Teachers that had a teacher themselves, whose training is in no figure of their students; of those that only a
    model card describes, also the ones that began with other weights."""
    students: dict[tuple[str, str], dict[str, None]] = {}  # (teacher, what is not counted) -> names
    for run, path, teacher in taught:
        if teacher is None:
            left_out, name = lineage.left_out_by_card(run, path), path
        else:
            left_out, name = [lineage.TAUGHT] * bool(teacher.kd_steps > 0 or teacher.scores), teacher.name
        for what in left_out:
            students.setdefault((name, what), {})[run.name] = None
    return [f"{name}, the teacher of {few(names)}, {what}" for (name, what), names in students.items()]


def _may_be(run: Run, taught: list[str], runs: list[Run]) -> bool:
    """Whether a run may have trained the teacher of others: it has another model, and started from scratch."""
    students = [other for other in runs if other.name in taught]
    return not run.config.get("model.student.path") and not any(lineage.same_model(run, s) for s in students)


# --- which text a loss was measured on ---


_FIRST_TOKENS = 0.02  # the first token of a document, which differs between tokenizers, is not counted


def _text(run: Run, kind: str) -> tuple[float, float]:
    """Tokens and bytes of the text that the last val or test loss was measured on."""
    return next(reversed(run.measured(kind).values()), (math.nan, math.nan))


def other_text(a: Run, b: Run, kind: str) -> bool:
    """Whether the last losses of two runs were measured on different text or tokens, as far as the logs show."""
    return differ(_text(a, kind), _text(b, kind))


def _other_text(runs: list[Run], reference: Run) -> list[str]:
    notes = []
    for run in runs:
        if since := run.text_since:
            counts = [tokens for step, (tokens, _) in run.measured("val").items() if step <= since]
            notes.append(
                f"{run.name} was validated on other text from step {since} on "
                f"({counts[-1]:,.0f} tokens, before that {counts[-2]:,.0f}): its losses before that are left out"
            )
        if run.measured_since > run.text_since:
            notes.append(
                f"{run.name} was validated with more or less context from step {run.measured_since} on: its losses "
                "before that are left out"
            )
        if other_text(run, reference, "val"):
            (tokens, size), (there, other_size) = _text(run, "val"), _text(reference, "val")
            rounding = ROUNDING if _words(run) == _words(reference) else _FIRST_TOKENS
            if math.isclose(size, other_size, rel_tol=rounding):
                what, so = "in other tokens", "bits per byte can be compared, CE cannot"
            else:
                what, so = "on other text", "their losses cannot be compared"
            notes.append(
                f"{run.name} was validated {what} than {reference.name} "
                f"({tokens:,.0f} tokens, there {there:,.0f}): {so}"
            )
        elif unlike := _other_context(run, reference):
            said = ", ".join(f"--{k} {run.config.get(k)} (there {reference.config.get(k)})" for k in unlike)
            notes.append(
                f"{run.name} was validated with {said}: the same model has another loss with less or more context"
            )
    return notes


def _other_context(run: Run, reference: Run) -> list[str]:
    """The settings by which two runs' last losses had more or less context; none if one has no config.yaml."""
    if "val/ce" not in run.curves or not run.config or not reference.config:
        return []
    return [name for name in CONTEXT if run.config.get(name) != reference.config.get(name)]


def _words(run: Run) -> list[Any]:
    """What tells whether two runs have one tokenizer: its file in the run's folder, or else the settings."""
    with suppress(OSError, ValueError):
        return [small_text(run.path / "tokenizer/tokenizer.json")]
    return [run.config.get(f"data.{name}") for name in ("tokenizer", "vocab_size")]


def _tests(runs: list[Run]) -> list[str]:
    tested = [run for run in runs if "test/ce" in run.curves]
    notes = []
    for run in tested:
        step = int(run.curves["test/ce"].steps[-1])
        if step != run.steps_done:
            notes.append(f"the test CE of {run.name} is from step {step}, not from step {run.steps_done}")
        if other_text(run, tested[0], "test"):
            notes.append(f"the test CE of {run.name} is from other text than that of {tested[0].name}")
    return notes
