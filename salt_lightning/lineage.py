"""Where a run comes from: the run that it goes on from, its teacher's run, the scores of its rows. NaN: not known."""

from __future__ import annotations

import json
import math
import os
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from salt_lightning.errors import ConfigError
from salt_lightning.report import UNITS
from salt_lightning.runlog import Curve, Run, read_run


def places(run: Run, path: str) -> list[Path]:
    """Where a path of a run's settings may lie: a relative one may count from any parent."""
    return [Path(os.path.normpath(base / path)) for base in (Path.cwd(), *run.path.absolute().parents)]


def read(path: Path, name: str, generations: int = 9) -> Run:
    """A run; one that went on from another folder's checkpoint with that one's log up to there, where it is found.

    Raises:
        ConfigError: no such folder, or an unreadable config.yaml.
    """
    run = read_run(path, name)
    if run.began == 0 or generations == 0:
        return run
    for checkpoint in places(run, str(run.config.get("ckpt_path") or "")):
        before = checkpoint.parent.parent  # RUN/checkpoints/step-N.ckpt
        if re.fullmatch(r"step-\d+\.ckpt", checkpoint.name) and before.is_dir() and before.resolve() != path.resolve():
            try:
                curves = dict(read(before, name, generations - 1).curves)
            except ConfigError:  # a folder that nobody has named
                return run
            for tag, curve in run.curves.items():
                if (there := curves.get(tag)) is not None:
                    until = there.steps <= run.began  # it may have gone on itself
                    parts = zip((there.steps[until], there.values[until]), (curve.steps, curve.values), strict=True)
                    curve = Curve(*map(np.concatenate, parts))
                curves[tag] = curve
            return replace(run, curves={tag: c for tag, c in curves.items() if tag in run.curves})
    return run


def teacher_run(run: Run, runs: list[Run]) -> Run | None:
    """The given run in whose folder the teacher lies, or which has exported it."""
    path = run.config.get("model.teacher.path")
    there = {place.resolve() for place in places(run, str(path))} if path else set()
    for other in runs:
        export = other.config.get("checkpoint.export")
        exported = {place.resolve() for place in places(other, str(export))} if export else set()
        inside = any(place.is_relative_to(other.path.resolve()) for place in there)
        if other is not run and (inside or there & exported):
            return other
    return None


def taught_steps(run: Run, teacher: Run) -> int:
    """Optimizer steps of the checkpoint that teaches, which its name tells; an exported one is taken for the last."""
    named = re.search(r"step-(\d+)\.ckpt$", str(run.config["model.teacher.path"]).rstrip("/"))
    return min(int(named[1]), teacher.steps_done) if named else teacher.steps_done


def card_flops(run: Run) -> float:
    """What the model card of an exported teacher says of its training: student, teacher and scoring."""
    path = run.config.get("model.teacher.path")
    for place in places(run, str(path)) if path else []:
        with suppress(OSError, UnicodeDecodeError):
            said = (place / "README.md").read_text(encoding="utf-8")
            found = re.findall(r"^- FLOPs of (?:the student|the teacher|scoring): ([\d.e+]+) (\w+)", said, re.M)
            sizes = {unit: size for size, unit in UNITS} | {"FLOP": 1.0}
            if len(found) == 3 and all(unit in sizes for _, unit in found):
                return sum(float(value) * sizes[unit] for value, unit in found)
    return math.nan


def scoring(run: Run) -> dict[str, Any]:
    """The manifest of the predict run that `data.selection` names; empty without a selection, or where it is gone."""
    for place in places(run, str(run.config.get("data.selection") or "")):
        manifest = place / "scores.json" if place.is_dir() else place
        if run.selected and manifest.is_file() and manifest.name == "scores.json":
            with suppress(json.JSONDecodeError):
                return json.loads(manifest.read_text())
    return {}


def scoring_flops(run: Run) -> float:
    return float(scoring(run).get("scoring_flops", math.nan))
