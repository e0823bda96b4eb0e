"""Where a run comes from: the run that it resumed from, its teachers' runs, the scores of its rows. NaN: unknown."""

import json
import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from salt_lightning.comparison.report import UNITS
from salt_lightning.errors import ConfigError
from salt_lightning.run.curves import CUMULATIVE, Curve
from salt_lightning.run.run_folder import small_text, step_named
from salt_lightning.run.runlog import Run, read_run

TAUGHT = "had a teacher too: the cost of training that one is not counted"  # said after a teacher's name


def _named(run: Run, setting: str) -> set[Path]:
    """Possible locations of the path in a run's setting, if set, with links resolved."""
    return {place.resolve() for place in _places(run, str(run.config.get(setting) or ""))}


def _places(run: Run, path: str) -> list[Path]:
    """Possible locations of a path from a run's settings, likeliest first. A relative one starts where the run's own
    path does; if it is not there, or that is not known, it may start here, or at any parent of the run."""
    if not path:
        return []
    folder, own = Path(os.path.abspath(run.path)), str(run.config.get("run") or "/")
    bases = [Path.cwd(), *folder.parents]
    home = [] if os.path.isabs(own) else [base for base in bases if os.path.normpath(base / own) == str(folder)]
    first, *others = (Path(os.path.normpath(base / path)) for base in (*home, *bases))
    is_there = first.exists() or (first.suffix == ".ckpt" and first.parent.exists())  # it may be removed by now
    return [first] if home and is_there else [first, *others]


def whole(run: Run, named: Sequence[Run] = ()) -> Run:
    """A run with the log of the runs that it resumed from put before its own; `lost` is set if one is not found.

    `named`: where to look for the others, too, as their checkpoints may be in a separate folder.
    """
    joined = _joined(run, named)
    of_lineage = {*CUMULATIVE, "probe/stop_step"}  # these stay valid, logged again or not
    return replace(joined, curves={tag: c for tag, c in joined.curves.items() if tag in run.curves.keys() | of_lineage})


def _joined(run: Run, named: Sequence[Run], generations: int = 9) -> Run:
    """The same with all that the others have logged. `generations`: how many runs to follow back."""
    if run.began == 0 or run.origin == "last":
        return run
    parent = _parent(run, named) if generations else None
    if parent is None:
        own = {(run.path / "checkpoints").resolve(), *_named(run, "checkpoint.folder")}
        is_own = any(place.parent.resolve() in own for place in _places(run, run.origin))
        return run if is_own else replace(run, lost=run.origin)
    return _behind(_joined(parent, named, generations - 1), run)


def _parent(run: Run, named: Sequence[Run]) -> Run | None:
    """The run whose checkpoint this one started from: a folder with settings and a log."""

    def is_trunk(other: Run) -> bool:
        return bool(other.config and other.curves) and other.path.resolve() != run.path.resolve()

    for checkpoint in _places(run, run.origin):
        folder, before = checkpoint.parent.resolve(), checkpoint.parent.parent  # RUN/checkpoints/step-N.ckpt
        there = [other for other in named if folder in _named(other, "checkpoint.folder")]
        there += [other for other in named if other.path.resolve() == before.resolve()]
        if not any(map(is_trunk, there)):
            with suppress(ConfigError):  # the user has not named this folder
                there.append(read_run(before, run.name))
        for other in filter(is_trunk, there):
            return other
    return None


def _behind(parent: Run, run: Run) -> Run:
    """A run with the log and settings of its parent put before its own."""
    curves = dict(run.curves)
    for tag, there in parent.curves.items():
        until = there.steps <= run.began  # the parent may have continued after that
        if until.any():
            steps, values = there.steps[until], there.values[until]
            if tag in run.curves:
                steps = np.concatenate([steps, run.curves[tag].steps])
                values = np.concatenate([values, run.curves[tag].values])
            curves[tag] = Curve(steps, values)
    config, before_it = parent.settings_until(run.began)
    trunk = (*parent.trunk, (run.began, parent.path.resolve()))
    earlier = (*before_it, (run.began, config), *run.earlier)
    return replace(run, curves=curves, earlier=earlier, trunk=trunk, lost=parent.lost)


def teacher_runs(run: Run, runs: list[Run]) -> dict[str, Run | None]:
    """Maps the path of each teacher that a run has learned from, or that has scored its rows, to the given run that
    holds or has exported it; None: none does."""
    now = str(run.config.get("model.teacher.path") or "")
    moved = "" if now in run.teachers else now  # the teacher's new path, if it was moved after KD
    found = {path: _trained(run, path, runs) or _trained(run, moved, runs) for path in run.teachers}
    found = found if run.taught or not run.selected else {}  # a control: its rows were selected, but nobody taught it
    for scorer in _scorers(run):
        there = set(_places(run, scorer))
        if not _holds(run, there) and not any(there & set(_places(run, path)) for path in found):
            found[scorer] = _trained(run, scorer, runs)
    return found


def _trained(run: Run, path: str, runs: list[Run]) -> Run | None:
    others = [(other, _holdings(other)) for other in runs if other is not run]
    places = [place.resolve() for place in _places(run, path)]
    return next((other for place in places for other, held in others if _is_in(place, held)), None)


def _holds(run: Run, there: set[Path]) -> bool:
    """Whether a run has saved or exported what is at one of these places."""
    held = _holdings(run)
    return any(_is_in(place.resolve(), held) for place in there)


def _holdings(run: Run) -> tuple[set[Path], set[Path]]:
    """The folders in which a run saves, and those that it has exported."""
    return {run.path.resolve(), *_named(run, "checkpoint.folder")}, _named(run, "checkpoint.export")


def _is_in(place: Path, held: tuple[set[Path], set[Path]]) -> bool:
    return place in held[1] or any(place.is_relative_to(folder) for folder in held[0])


def same_model(a: Run, b: Run) -> bool:
    """Whether two runs train the same model, by the settings that both give: a checkpoint brings all of its own."""
    shared = [key for key in a.config.keys() & b.config.keys() if key.startswith("model.student.")]
    return all(a.config[key] == b.config[key] for key in shared)


def training(run: Run, teachers: dict[str, Run | None]) -> tuple[float, float]:
    """FLOPs and seconds to train `teacher_runs`, with their own scoring, but not what training their own teachers
    cost. Each step of a teacher's run counts once, also if several checkpoints, or branches of it, have taught; not if
    `run` is a branch of it, with that step.

    The step is in a checkpoint's name, or in an exported teacher's card; otherwise, it is the last one.
    """
    if run.lost or not teachers:
        return math.nan, math.nan
    of_run = {folder: until for until, folder in run.trunk}
    furthest: dict[Path, tuple[int, int, Run]] = {}  # a run's folder -> its first and last step that teachers needed
    scored: dict[str, dict[str, Any]] = {}
    flops = seconds = 0.0
    for path, teacher in teachers.items():
        if teacher is None:
            flops, seconds = flops + _card_flops(run, path), math.nan
            continue
        step = step_named(path)
        step = _card_step(run, path) if step is None else step
        done = teacher.steps_done if step is None else min(step, teacher.steps_done)
        scored |= _scores(teacher)
        start = 0
        for until, folder in (*teacher.trunk, (done, teacher.path.resolve())):
            start, end = max(start, of_run.get(folder, 0)), min(until, done)
            if end > furthest.get(folder, (0, start))[1]:
                furthest[folder] = start, end, teacher
            start = end
    for start, end, teacher in furthest.values():
        flops += teacher.flops(end) - (teacher.flops(start) if start else 0)
        seconds += teacher.total("train/time_s", end) - (teacher.total("train/time_s", start) if start else 0)
    for place in scored.keys() - _scores(run).keys():  # its own are counted by themselves
        flops, seconds = flops + _cost(scored[place], "scoring_flops"), seconds + _cost(scored[place], "scoring_s")
    return flops, seconds


def _card_flops(run: Run, path: str) -> float:
    """FLOPs of an exported teacher's training, from its model card: student, teacher and scoring."""
    found = re.findall(r"^- FLOPs of (?:the student|the teacher|scoring): ([\d.e+]+) (\w+)", _card(run, path), re.M)
    sizes = {unit: size for size, unit in UNITS} | {"FLOP": 1.0}
    with suppress(ValueError):
        if len(found) == 3 and all(unit in sizes for _, unit in found):
            return sum(float(value) * sizes[unit] for value, unit in found)
    return math.nan


def left_out_by_card(run: Run, path: str) -> list[str]:
    """What the cost of an exported teacher that its model card gives does not contain: to be said after its name."""
    card = _card(run, path)
    if math.isnan(_card_flops(run, path)):
        return []
    left_out = []
    if re.search(r"^- teacher: |^- FLOPs of scoring: (?!0 FLOP)", card, re.M):
        left_out.append(TAUGHT)
    if start := re.search(r"^- started from: (.+)", card, re.M):
        said = re.sub(r"\\([\\<\[`])", r"\1", start[1])  # as the card's list escapes it
        left_out.append(f"started from the weights of {said}: the cost of training those is not counted")
    return left_out


def _card_step(run: Run, path: str) -> int | None:
    """The step that an exported teacher was at, from its model card."""
    found = re.search(r"^- steps: (\d[\d,]{0,15})", _card(run, path), re.M)
    return int(found[1].replace(",", "")) if found else None


def _card(run: Run, path: str) -> str:
    """An exported teacher's model card, or nothing."""
    for place in _places(run, path):
        with suppress(OSError, ValueError):
            return small_text(place / "README.md")
    return ""


def scoring(run: Run) -> tuple[float, float]:
    """FLOPs and seconds of the predict runs that scored a run's rows; NaN if there is none, or one is gone."""
    found = _scores(run).values()
    flops, seconds = (sum(_cost(about, key) for about in found) for key in ("scoring_flops", "scoring_s"))
    return (flops, seconds) if found else (math.nan, math.nan)


def lost_scores(run: Run) -> list[str]:
    """The selections of a run whose scores are gone."""
    return [place for place, about in _scores(run).items() if not about]


def _cost(about: dict[str, Any], key: str) -> float:
    with suppress(ValueError, TypeError):
        return float(about.get(key, math.nan))
    return math.nan


def _scorers(run: Run) -> list[str]:
    """Paths of the teachers that scored a run's rows, as far as the scores are there."""
    found = [about.get("teacher") for about in _scores(run).values()]
    return [path for each in found if isinstance(each, dict) and (path := str(each.get("path") or ""))]


def _scores(run: Run) -> dict[str, dict[str, Any]]:
    """Where the scores of a run's selections are -> what scores.json says; nothing, if they are gone."""
    found: dict[str, dict[str, Any]] = {}
    for selection in run.scores:
        manifests = [place / "scores.json" if place.is_dir() else place for place in _places(run, selection)]
        for manifest in manifests:
            about = _read_scores(manifest)
            if about:
                found[str(manifest.resolve())] = about
                break
        else:
            found[selection] = {}
    return found


def _read_scores(manifest: Path) -> dict[str, Any]:
    if manifest.name == "scores.json":
        with suppress(OSError, ValueError, RecursionError):
            about = json.loads(small_text(manifest))
            return about if isinstance(about, dict) else {}
    return {}
