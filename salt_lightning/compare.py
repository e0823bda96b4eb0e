"""The verb `compare`: reads several runs' logs and writes a table, a JSON file and a figure (comparison/)."""

import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from salt_lightning.comparison import figure, lineage, report
from salt_lightning.comparison.remarks import other_text, remarks
from salt_lightning.comparison.results import Comparison, Group, Row
from salt_lightning.errors import ConfigError, VerbParser, printable, printable_lines, writing
from salt_lightning.run.runlog import AXES, ROUNDING, Run, read_run
from salt_lightning.text.journal import whole


@dataclass(frozen=True)
class Goal:
    """The reference's final validation CE, and the steps, FLOPs (student and teacher) and seconds to get there."""

    over: bool  # whether it is final, not that of a reference under way
    ce: float
    steps: float
    flops: float
    seconds: float


def first_reach(steps: np.ndarray, values: np.ndarray, level: float) -> float:
    """The first step at which `values`, linear between its points, is at or below `level`, up to the rounding of a
    run that is stopped and resumed on other devices; NaN if never."""
    below = np.flatnonzero(values <= level + ROUNDING)
    if not len(below):
        return math.nan
    i = below[0]
    if i == 0 or not math.isfinite(values[i - 1]):
        return float(steps[i])
    share = min(1.0, (values[i - 1] - level) / (values[i - 1] - values[i]))
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def compare(runs: Sequence[str | Path], out: str | Path, baseline: str | None = None) -> Comparison:
    """Compares runs and writes compare.md, compare.json and compare.png into `out`.

    Args:
        runs: the runs' folders.
        out: folder for the three files; created if missing.
        baseline: name or path of the reference run; default: the first BASELINE, preferably finished, of the same
            model as the runs with a teacher, and with settings that never changed.

    Raises:
        ConfigError: a path is not a folder (compare's own output files are skipped), no run has logged anything, or
            `baseline` is not among the runs that have.
    """
    folders = list({os.path.abspath(path): Path(os.path.normpath(path)) for path in runs}.values())
    folders = [path for path in folders if not (path.name in _WRITTEN and path.is_file())] or folders
    named = [read_run(path, name) for path, name in zip(folders, _names(folders), strict=True)]
    comparison, out = evaluate([lineage.whole(run, named) for run in named], baseline), Path(out)
    link = "\n![Validation CE over steps and over FLOPs](compare.png)\n"
    text, data, drawing = report.markdown(comparison), report.json_text(comparison), figure.draw(comparison)
    with writing(out / "compare.*"):
        out.mkdir(parents=True, exist_ok=True)
        # replaced, not written through: by default the folder is that of the runs, perhaps somebody else's
        for name, content in (("compare.md", text + link), ("compare.json", data)):
            with whole(out / name) as file:
                file.write(content.encode())
        with whole(out / "compare.png") as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # a warning for each letter that the font lacks
            drawing.savefig(file, format="png", dpi=160)
    return comparison


def _names(folders: list[Path]) -> list[str]:
    """The shortest path endings that distinguish the runs."""
    parts = [folder.absolute().parts for folder in folders]
    depth = next(d for d in range(1, 99) if len({p[-d:] for p in parts}) == len(parts))
    return [printable("/".join(p[-depth:])) for p in parts]


_WRITTEN = ("compare.md", "compare.json", "compare.png")
_ROUNDING = 1e-6  # TensorBoard keeps seven digits
_Equal = dict[str, tuple[float, dict[str, float]]]  # as in Comparison
_OF_RUNS = ("*/config.yaml", "**/*tfevents*")  # signs of a run somewhere below a named folder


@np.errstate(invalid="ignore")  # inf - inf, in runs that diverged
def evaluate(runs: list[Run], baseline: str | None = None) -> Comparison:
    """Computes the numbers of `compare`. The reference's are means over the finished runs with its settings."""
    silent = [run for run in runs if not run.curves]
    runs = [run for run in runs if run.curves]
    if not runs:
        raise _nothing_logged(silent)
    teachers_of = {run.name: lineage.teacher_runs(run, runs) for run in runs}
    teachers = {teacher.name for found in teachers_of.values() for teacher in found.values() if teacher is not None}
    named = None if baseline is None else _named(runs, baseline)
    teachers -= _also_baselines(runs, teachers_of, teachers)
    students = [run for run in runs if run.name not in teachers] or runs
    repeated = _repeated(students, named)
    students = [run for run in students if run.name not in repeated]
    reference, notes = (named, []) if named is not None else _reference(students)
    apart = [run.name for run in runs if other_text(run, reference, "val")]  # not compared with the rest
    alike = [run for run in students if run.variant == reference.variant and run.name not in apart]
    seeds = [run for run in alike if run.finished] or [reference]
    goal = _goal(seeds)
    goals = {run.name: replace(goal, ce=math.nan) if run.name in apart else goal for run in runs}
    rows = [_row(run, run.name in teachers, teachers_of[run.name], goals[run.name]) for run in runs]
    experiments = _experiments(students)
    notes += remarks(silent, runs, experiments, repeated, reference, teachers_of)
    others = [run for run in runs if run not in seeds and run.name not in repeated and len(run.val_ce.steps)]
    firsts = {run.name: run.val_ce.steps[0] for run in others}
    if at_once := [row.run for row in rows if row.reached_step == firsts.get(row.run, math.nan)]:
        notes.append(f"the reference's loss was reached by the first validation, or earlier: {', '.join(at_once)}")
    equal, between = _equal_points([run for run in students if run.name not in apart], None if goal.over else reference)
    groups = _groups(experiments, {row.run: row for row in rows}, reference, seeds, apart, equal)
    return Comparison(reference.name, goal.ce, goal.over, rows, groups, equal, between, notes, apart, runs)


def _nothing_logged(runs: list[Run]) -> ConfigError:
    """The error for folders without a value; names the runs that are below them."""
    paths = ", ".join(str(run.path) for run in runs)
    below = {p.parent for run in runs for each in _OF_RUNS for p in run.path.glob(each)}
    inside = sorted(str(folder) for folder in below if folder.name not in ("validate", "test"))  # a run's evaluations
    more = f" and {len(inside) - 6} more" if len(inside) > 6 else ""
    example = f": {' '.join(inside[:6])}{more}" if inside else ", e.g. runs/salt"
    why = "".join(f" ({what})" for run in runs for what in run.damaged)
    return ConfigError(
        f"compare: RUN {paths}: no TensorBoard event file with a value in it{why}; give a run's own folder{example}"
    )


def _goal(seeds: list[Run]) -> Goal:
    """The means over the reference's seeds."""
    steps = float(np.mean([run.val_ce.steps[-1] if len(run.val_ce.steps) else math.nan for run in seeds]))
    steps = steps or math.nan  # validated before its first step alone: no cost to take a share of
    ce = float(np.mean([run.last("val/ce") for run in seeds]))
    return Goal(
        over=any(run.finished for run in seeds),
        ce=ce if math.isfinite(ce) else math.nan,  # no loss is compared with infinity
        steps=steps,
        flops=float(np.mean([run.flops(steps) for run in seeds])),
        seconds=float(np.mean([run.total("train/time_s", steps) for run in seeds])),
    )


def _experiments(students: list[Run]) -> list[list[Run]]:
    """Runs that differ in the seed alone, in the order of their first ones."""
    experiments: list[list[Run]] = []
    for run in students:
        same: list[Run] = next((group for group in experiments if group[0].variant == run.variant), [])
        if not same:
            experiments.append(same)
        same.append(run)
    return experiments


def _also_baselines(runs: list[Run], teachers_of: dict[str, dict[str, Run | None]], teachers: set[str]) -> set[str]:
    """Those that taught, or scored the rows of, runs of their own model and length, so that they are what these runs
    are to be compared with, too: seeds of another BASELINE, or if no other is given."""
    others = [run for run in runs if run.is_plain and run.name not in teachers]
    pairs = [(teacher, run) for run in runs for teacher in teachers_of[run.name].values() if teacher is not None]
    return {
        teacher.name
        for teacher, run in pairs
        if teacher.is_plain
        and lineage.same_model(teacher, run)
        and teacher.steps_done == run.steps_done
        and (not others or any(run.variant == teacher.variant and run.seeds != teacher.seeds for run in others))
    }


def _named(runs: list[Run], baseline: str) -> Run:
    """The run that --baseline names."""
    wanted = os.path.abspath(_path(baseline))
    for run in runs:
        if printable(baseline) == run.name or wanted == os.path.abspath(run.path):
            return run
    names = ", ".join(run.name for run in runs)
    raise ConfigError(
        f"compare: --baseline {baseline} is not among the runs that logged something; choose one of {names}"
    )


def _reference(students: list[Run]) -> tuple[Run, list[str]]:
    plain = [run for run in students if run.is_plain]
    taught = [run for run in students if run.kd_steps > 0]

    def doubts(run: Run) -> tuple[bool, bool, bool]:
        """Not finished or diverged; perhaps an unrecognized teacher; settings that changed on the way."""
        unlike = not any(lineage.same_model(run, other) for other in taught)
        return not run.finished or not math.isfinite(run.last("val/ce")), unlike, bool(run.changes)

    if plain:
        return min(plain, key=doubts), []
    return students[0], [f"no BASELINE among the runs: {students[0].name}, the first of the students, is the reference"]


def _repeated(students: list[Run], named: Run | None) -> dict[str, str]:
    """Maps runs with the same settings and seeds as another, so no second sample, to that other run, by name.

    The run named as the reference takes precedence, then finished runs.
    """
    repeated: dict[str, str] = {}
    firsts: list[Run] = []
    known = [run for run in students if run.seeds]
    for run in sorted(known, key=lambda run: (run is not named, not run.finished, run.began)):
        first = next((other for other in firsts if (other.seeds, other.variant) == (run.seeds, run.variant)), None)
        if first is None:
            firsts.append(run)
        else:
            repeated[run.name] = first.name
    return repeated


def _row(run: Run, is_teacher: bool, teachers: dict[str, Run | None], goal: Goal) -> Row:
    ce, done = run.val_ce, run.steps_done
    reached = first_reach(ce.steps, ce.values, goal.ce)
    if (run.began > 0 or run.measured_since) and len(ce.steps) and reached == ce.steps[0]:
        reached = math.nan  # perhaps reached before its log, or the validations on this text, begin
    reached_flops, reached_s = run.flops(reached), run.total("train/time_s", reached)
    training, scoring = lineage.training(run, teachers), lineage.scoring(run)
    by_others = run.kd_steps > 0 or bool(run.lost) or (bool(run.scores) and bool(teachers))
    besides = ([training] if by_others else []) + ([scoring] if run.scores else [])
    # NaN if a part is unknown, or there is none
    flops_besides, s_besides = map(sum, zip(*besides, strict=True)) if besides else (math.nan, math.nan)
    return Row(
        run=run.name,
        method="TEACHER" if is_teacher else run.method,
        seed=run.seed,
        running=run.running,
        steps=done,
        max_steps=run.max_steps,
        val_step=float(ce.steps[-1]) if len(ce.steps) else math.nan,
        val_ce=run.last("val/ce"),
        # a final loss is no match for the loss of an earlier step
        difference=run.last("val/ce") - goal.ce if goal.over and not run.running else math.nan,
        accuracy=run.last("val/accuracy"),
        bits_per_byte=run.last("val/bits_per_byte"),
        reached_step=reached,
        reached_steps_share=reached / goal.steps,
        reached_flops_share=reached_flops / goal.flops,
        reached_flops_share_with_teacher_training=(reached_flops + flops_besides) / goal.flops,
        reached_seconds_share=reached_s / goal.seconds,
        reached_seconds_share_with_teacher_training=(reached_s + s_besides) / goal.seconds,
        seconds=run.total("train/time_s", done),
        teacher_seconds=run.total("train/teacher_time_s", done),
        student_flops=run.total("train/flops_student_total", done),
        teacher_flops=run.total("train/flops_teacher_total", done),
        teacher_training_flops=training[0],
        teacher_training_seconds=training[1],
        scoring_flops=scoring[0],
        scoring_seconds=scoring[1],
        last={tag: run.last(tag) for tag in sorted(run.curves) if not tag.startswith("train/")},
    )


def _groups(
    experiments: list[list[Run]],
    rows: dict[str, Row],
    reference: Run,
    seeds: list[Run],
    apart: list[str],
    equal: _Equal,
) -> list[Group]:
    labels = _labels([members[0] for members in experiments])
    by_seed = {run.sample: run.last("val/ce") for run in seeds if run.seeds}
    groups = []
    for members in experiments:
        finished = [run for run in members if run.finished]
        done = [run for run in finished if run.name not in apart] or finished
        ce = [run.last("val/ce") for run in done]
        known = [run for run in done if not math.isnan(rows[run.name].difference)]  # the others: on other text
        pairs = {
            run.sample: run.last("val/ce") - by_seed.get(run.sample, math.nan) if run in known else math.nan
            for run in done
            if run not in seeds
        }
        groups.append(
            Group(
                label=labels[members[0].name],
                runs=[run.name for run in members],
                n=len(done),
                val_ce=ce,
                mean=float(np.mean(ce)) if ce else math.nan,
                std=float(np.std(ce, ddof=1)) if len(ce) > 1 else math.nan,
                difference=float(np.mean([rows[run.name].difference for run in done])) if ce else math.nan,
                paired_differences={} if all(map(math.isnan, pairs.values())) else pairs,
                reached_steps_share=[rows[run.name].reached_steps_share for run in done],
                reached_flops_share=[rows[run.name].reached_flops_share for run in done],
                reached_flops_share_with_teacher_training=[
                    rows[run.name].reached_flops_share_with_teacher_training for run in done
                ],
                reached_seconds_share=[rows[run.name].reached_seconds_share for run in done],
                equal={axis: [ce.get(run.name, math.nan) for run in done] for axis, (_, ce) in equal.items()},
                changed=_changed(reference, members[0]),
            )
        )
    return groups


def _labels(firsts: list[Run]) -> dict[str, str]:
    """The method of each experiment, by its first run. Several of one method are distinguished by one or two settings,
    if these are words or numbers, else by that run's name."""
    labels = {}
    for method in {run.method for run in firsts}:
        alike = [run for run in firsts if run.method == method]
        keys = sorted({key for run in alike for key in _changed(alike[0], run)})
        words = [str(run.deciding.get(key, "not set")) for key in keys for run in alike]
        brief = 0 < len(keys) <= 2 and all(re.fullmatch(r"[\w.+-]+", word) for word in (*keys, *words))
        for run in alike:
            settings = ", ".join(f"{'.'.join(key.split('.')[-2:])} {run.deciding[key]}" for key in keys if brief)
            labels[run.name] = printable(method if len(alike) == 1 else f"{method} ({settings or run.name})")
    return labels


def _changed(reference: Run, run: Run) -> dict[str, tuple[Any, Any]]:
    """Settings in which an experiment differs from the reference, as set; empty if either has no config.yaml."""
    if not (reference.config and run.config):
        return {}
    there, here = reference.variant, run.variant
    differ = [key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key)]
    pairs = {key: tuple(r.deciding.get(key, r.config.get(key)) for r in (reference, run)) for key in differ}
    return {key: (before, now) for key, (before, now) in pairs.items() if before != now or key in there.keys() & here}


def _equal_points(students: list[Run], begun: Run | None) -> tuple[_Equal, dict[str, list[str]]]:
    """Validation CE of each run at the furthest point that all finished runs have reached, along each of AXES; and a
    reference that has only `begun`.

    Also says which values are interpolated linearly between two validations. NaN where a run has not come so far.
    """
    equal, between = {}, {}
    finished = {run.name for run in students if run.finished}
    for axis in AXES:
        lines = {run.name: (run.axis(axis, run.val_ce.steps), run.val_ce.values) for run in students}
        lines = {name: line for name, line in lines.items() if len(line[0]) and np.isfinite(line[0]).all()}
        if lines:
            ends = [lines[name][0][-1] for name in finished & lines.keys() or lines]
            if begun is not None and begun.name in lines:
                so_far = lines[begun.name][0][-1]  # unless that is before another run's first validation
                ends += [so_far] if so_far >= max(x[0] for x, _ in lines.values()) else []
            end = float(min(ends))
            ce = {n: float(np.interp(end, x, y, left=math.nan, right=math.nan)) for n, (x, y) in lines.items()}
            equal[axis] = (end, ce)
            there = {name: bool(np.isclose(x, end, rtol=_ROUNDING, atol=0).any()) for name, (x, _) in lines.items()}
            between[axis] = [name for name, value in ce.items() if not math.isnan(value) and not there[name]]
    return equal, between


def _path(typed: str) -> Path:
    return Path(os.path.expanduser(typed))


def main(argv: list[str]) -> int:
    """`compare RUN RUN ... [--out DIR] [--baseline RUN]`: prints the table, writes the files."""
    parser = VerbParser("compare", description="Table and figure of several runs, finished or running.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=_path, help="a run's folder, e.g. runs/salt")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=_path,
        help="folder for compare.md, .json and .png (default: the runs' common parent)",
    )
    parser.add_argument(
        "--baseline",
        metavar="RUN",
        help="the reference run (default: the first BASELINE, finished runs before others)",
    )
    args = parser.parse_args(argv)
    common = os.path.commonpath([path.absolute().parent for path in args.runs])
    out = args.out if args.out is not None else Path(os.path.relpath(common))
    comparison = compare(args.runs, out, args.baseline)
    text, on_terminal = report.markdown(comparison), getattr(sys.stdout, "isatty", bool)()  # a notebook's may have none
    shown = report.narrowed(text, shutil.get_terminal_size().columns) if on_terminal else text
    print(printable_lines(shown))
    print(printable(f"written: {out / 'compare.md'}, {out / 'compare.json'}, {out / 'compare.png'}"))
    return 0
