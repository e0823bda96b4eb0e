"""Renders comparisons and evaluations as JSON and as Markdown that is readable as text; computes no results."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from salt_lightning.comparison.results import Comparison, Group, Row
from salt_lightning.errors import padded, printable, width_of
from salt_lightning.run.curves import THIRDS

UNITS = ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
COUNTS = re.compile(r"\w+/(tokens|examples)")  # tags of validate and test, fully matched: a source may be called tokens
MOST_PARTS = 12  # columns of a table that is still readable as text


def flop_unit(flops: float) -> tuple[float, str]:
    """The largest unit that is not above `flops`: its size and name."""
    return next((unit for unit in UNITS if flops >= unit[0]), (1.0, "FLOP"))


def number(value: float | None, form: str) -> str:
    """`value` in a format, or '-' if it is unknown."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def plain(text: str) -> str:
    """Text from files and settings on one line of Markdown, without HTML or images."""
    return printable(text).replace("<", "&lt;").replace("![", r"!\[")


def cell(text: str) -> str:
    return plain(text).replace("|", r"\|")


def table(columns: dict[str, list[str]], text: tuple[str, ...] = ()) -> str:
    """A Markdown table, padded to be readable as text; columns named in `text` are aligned left, numbers right."""
    lines = [[cell(text) for text in line] for line in (columns, *zip(*columns.values(), strict=True))]
    widths = [max(width_of(cells[i]) for cells in lines) for i in range(len(columns))]

    def line(cells: list[str]) -> str:
        return f"| {' | '.join(map(padded, cells, widths, (name in text for name in columns)))} |"

    rule = (f"{'-' * (width + 1)}{'-' if name in text else ':'}" for width, name in zip(widths, columns, strict=True))
    return "\n".join([line(lines[0]), f"|{'|'.join(rule)}|", *map(line, lines[1:])])


def narrowed(text: str, width: int) -> str:
    """A Markdown text with the rows and columns of its tables exchanged where they are wider than `width` columns
    and narrower that way."""

    def narrow(found: re.Match[str]) -> str:
        lines = found[0].splitlines()
        names, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
        if width_of(lines[0]) <= width or any(len(row) != len(names) for row in rows):  # a name with a |
            return found[0]
        first, *others = zip(names, *rows, strict=True)
        head = list(dict.fromkeys(first))
        columns = {name: [other[i] for other in others] for i, name in enumerate(head)}
        turned = table(columns, text=(head[0],))
        is_narrower = len(head) == len(first) and width_of(turned.partition("\n")[0]) < width_of(lines[0])
        return turned if is_narrower else found[0]

    return re.sub(r"^\|.*\|(?:\n\|.*\|){2,}$", narrow, text, flags=re.MULTILINE)


def evaluation(metrics: Mapping[str, Any]) -> str:
    """A table of what validate or test logged: `val/ce` etc., as numbers or tensors with one element, and `step`."""
    values = {name: float(value) for name, value in metrics.items()}
    step = f"step {values.pop('step', 0):.0f}"
    # the five metrics of all text before those of its parts
    names = sorted(values, key=lambda name: (name.count("/") > 1, "ce" not in name.split("/"), name))
    shown = [format(values[name], ",.0f" if COUNTS.fullmatch(name) else ".4f") for name in names]
    return table({"metric": names, step: shown}, text=("metric",))


@np.errstate(invalid="ignore")  # inf - inf, in runs that diverged
def markdown(comparison: Comparison) -> str:
    """The whole report: runs, seeds, equal points, changed settings."""
    final = number(comparison.reference_val_ce, ".4f")
    seeds = next((g.n for g in comparison.groups if comparison.reference in g.runs), 1)
    whose = f"mean of the {seeds} seeds of {comparison.reference}" if seeds > 1 else comparison.reference
    which = "final" if comparison.reference_is_over else "not finished, latest"
    reference = f"Reference: {whose}, {which} validation CE {final}."
    parts = [
        "# Comparison",
        "\n".join([plain(reference), *(f"Note: {plain(note)}." for note in comparison.notes)]),
        _runs_table(comparison),
        _parts_table(comparison.rows),
        _answers_table(comparison.rows),
        _seeds_table(comparison.groups),
        _reach_table(comparison.groups),
        _equal_table(comparison),
        _changes(comparison.groups),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _runs_table(comparison: Comparison) -> str:
    rows = comparison.rows
    scale, unit = flop_unit(max((r.student_flops for r in rows if not math.isnan(r.student_flops)), default=0.0))

    def cells(form: str, value: Callable[[Row], float]) -> list[str]:
        return [number(value(row), form) for row in rows]

    form = ".1f" if max(row.steps for row in rows) < 100 else ".0f"  # else two shares would be of one step
    reached = zip(cells(form, lambda r: r.reached_step), cells(".1%", lambda r: r.reached_steps_share), strict=True)
    columns = {
        "run": [row.run for row in rows],
        "method": [row.method for row in rows],
        "step": [f"{row.steps} of {row.max_steps}" if row.running else f"{row.steps}" for row in rows],
        "val CE": cells(".4f", lambda r: r.val_ce),
        "to ref.": cells("+z.4f", lambda r: r.difference),
        "accuracy": cells(".2%", lambda r: r.accuracy),
        "bits/byte": cells(".4f", lambda r: r.bits_per_byte),
        "test CE": cells(".4f", lambda r: r.last.get("test/ce", math.nan)),
        "reaches ref. at": [step if step == "-" else f"{step} ({share})" for step, share in reached],
        "of its FLOPs": cells(".1%", lambda r: r.reached_flops_share),
        "seconds": cells(".0f", lambda r: r.seconds),
        "teacher s": cells(".0f", lambda r: r.teacher_seconds),
        f"student {unit}": cells(".3f", lambda r: r.student_flops / scale),
        f"teacher {unit}": cells(".3f", lambda r: r.teacher_flops / scale),
    }
    if set(columns["test CE"]) == {"-"}:
        del columns["test CE"]
    apart = [line for row in rows if (line := _apart(row, scale, unit))]
    return "\n".join([table(columns, text=("run", "method")), *(["", *apart] if apart else [])])


def _apart(row: Row, scale: float, unit: str) -> str:
    """What a run cost besides its own FLOPs, and its shares of the reference's cost with that included."""
    costs = {
        "its teacher's own training": (row.teacher_training_flops, row.teacher_training_seconds),
        "the scoring of its rows": (row.scoring_flops, row.scoring_seconds),
    }
    known = [
        f"{name} {flops / scale:.3f} {unit}" + ("" if math.isnan(seconds) else f" ({seconds:.0f} s)")
        for name, (flops, seconds) in costs.items()
        if not math.isnan(flops)
    ]
    if not known:
        return ""
    shares = {
        "FLOPs": row.reached_flops_share_with_teacher_training,
        "seconds": row.reached_seconds_share_with_teacher_training,
    }
    at = " and ".join(f"{share:.1%} of its {name}" for name, share in shares.items() if not math.isnan(share))
    reached = f"; with that, it reaches the reference's loss at {at}" if at else ""
    return f"- {plain(row.run)}: not included above: {' and '.join(known)}{reached}."


def _seeds_table(groups: list[Group]) -> str:
    if all(group.n <= 1 for group in groups):
        under_way = [group.label for group in groups if not group.n]
        if len(under_way) == len(groups):
            return "No run has reached its last step (n = 0), so there is no mean over seeds and no spread."
        but = f", and no finished run of {plain(', '.join(under_way))} (n = 0)" if under_way else ""
        return f"One seed per experiment (n = 1){but}: the spread between seeds is unknown."

    def each(form: str, values: Callable[[Group], Iterable[float]]) -> list[str]:
        return [", ".join(number(value, form) for value in values(group)) or "-" for group in groups]

    columns = {
        "experiment": [g.label for g in groups],
        "n": [f"{g.n} (no spread)" if g.n == 1 else f"{g.n}" for g in groups],
        "mean CE": [number(g.mean, ".4f") for g in groups],
        "std": [number(g.std, ".4f") for g in groups],
        "min to max": [
            f"{min(g.val_ce):.4f} to {max(g.val_ce):.4f}" if g.n > 1 and not math.isnan(g.mean) else "-" for g in groups
        ],
        "to ref.": [number(g.difference, "+z.4f") for g in groups],
        "CE of each": each(".4f", lambda g: g.val_ce),
        "to ref. of its seed": each("+z.4f", lambda g: g.paired_differences.values()),
    }
    return "## Seeds\n\n" + table(columns, text=("experiment",))


def _parts_table(rows: list[Row]) -> str:
    """CE by third and source, if few enough for a table; compare.json has them all."""
    known = {tag for row in rows for tag, value in row.last.items() if not math.isnan(value)}
    parts = sorted((tag for tag in known if tag.startswith("val/ce/")), key=_third_first)
    if not parts or len(parts) > MOST_PARTS:
        return ""
    columns = {"run": [row.run for row in rows]}
    for tag in parts:
        name = tag.removeprefix("val/ce/")
        columns[tag if name in columns else name] = [number(row.last.get(tag), ".4f") for row in rows]
    return "## Final validation CE by part\n\n" + table(columns, text=("run",))


def _answers_table(rows: list[Row]) -> str:
    """Accuracy of the answers in `test`, next to that of always giving the most frequent one, and of guessing."""
    kinds = (  # with the heading of what the most frequent answer gets, which differs between the two
        ("exact match", "test/exact_match", "the commonest answer's"),
        ("choice accuracy", "test/choice_accuracy", "the majority's"),
    )
    tested = [row for row in rows if not all(math.isnan(row.last.get(tag, math.nan)) for _, tag, _ in kinds)]
    if not tested:
        return ""
    columns = {"run": [row.run for row in tested]}
    columns["examples"] = [number(row.last.get("test/examples"), ",.0f") for row in tested]
    for name, tag, of_most in kinds:
        share, low, high, most = (
            [number(row.last.get(tag + end), ".1%") for row in tested] for end in ("", "_low", "_high", "_majority")
        )
        if set(share) != {"-"}:
            columns[f"{name} (95%)"] = [f"{s} ({a} to {b})" for s, a, b in zip(share, low, high, strict=True)]
            columns[of_most] = most
    chance = [number(row.last.get("test/choice_accuracy_chance"), ".1%") for row in tested]
    if set(chance) != {"-"}:
        columns["chance"] = chance
    return "## Answers of the test\n\n" + table(columns, text=("run",))


def _third_first(tag: str) -> tuple[int, str]:
    name = tag.rpartition("/")[2]
    return (THIRDS.index(name) if name in THIRDS else len(THIRDS)), tag


def _mean_std(values: list[float], form: str) -> str:
    """Mean (std), or '-' if any value is unknown: a mean of the others would mislead."""
    if not values or any(math.isnan(value) for value in values):
        return "-"
    spread = f" ({number(float(np.std(values, ddof=1)), form)})" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{spread}"


def _reach_table(groups: list[Group]) -> str:
    """Where the seeds reach the reference's loss: mean (std), and each."""
    if all(group.n <= 1 for group in groups):
        return ""
    shares: dict[str, Callable[[Group], list[float]]] = {
        "of its steps": lambda g: g.reached_steps_share,
        "of its FLOPs": lambda g: g.reached_flops_share,
        "with teacher training and scoring": lambda g: g.reached_flops_share_with_teacher_training,
        "of its seconds": lambda g: g.reached_seconds_share,
    }
    columns = {"experiment": [group.label for group in groups]}
    for name, share in shares.items():
        each = [", ".join(number(value, ".1%") for value in share(group)) for group in groups]
        means = [_mean_std(share(group), ".1%") for group in groups]
        columns[name] = [
            mean if group.n < 2 else f"{mean}: {own}" for group, mean, own in zip(groups, means, each, strict=True)
        ]
    return (
        "## Where the seeds reach the reference's loss\n\nShares of the reference's cost; mean (std): each seed.\n\n"
        + table(columns, text=("experiment",))
    )


def _equal_table(comparison: Comparison) -> str:
    names = [row.run for row in comparison.rows if any(row.run in ce for _, ce in comparison.equal.values())]
    if not names:
        return ""
    seeds = [group for group in comparison.groups if group.n > 1]
    columns = {"run": [*names, *(f"{group.label}, n = {group.n}: mean (std)" for group in seeds)]}
    for axis, (end, ce) in comparison.equal.items():
        scale, unit = flop_unit(end) if axis == "FLOPs" else (1.0, axis)
        form = ",.3f" if axis == "FLOPs" else ",.1f" if axis == "seconds" and end < 100 else ",.0f"
        between = comparison.between[axis]
        means = [(_mean_std(group.equal[axis], ".4f"), not {*group.runs}.isdisjoint(between)) for group in seeds]
        cells = [*((number(ce.get(name), ".4f"), name in between) for name in names), *means]
        columns[f"at {end / scale:{form}} {unit}"] = [
            f"~{cell}" if is_line and cell != "-" else cell for cell, is_line in cells
        ]
    line = "\n\n~: linear interpolation between two validations." if any(comparison.between.values()) else ""
    running = {row.running for row in comparison.rows if row.run in names}
    who = "all finished runs" if len(running) > 1 else "all"
    reference = comparison.equal["steps"][1].get(comparison.reference, math.nan)
    if who != "all" and not comparison.reference_is_over and not math.isnan(reference):
        who += " and the reference"
    return f"## Validation CE at the last point that {who} have reached\n\n" + table(columns, text=("run",)) + line


def _changes(groups: list[Group]) -> str:
    lines, text = [], partial(json.dumps, default=str, ensure_ascii=False)  # writes dates as text
    for group in groups:
        told = [f"`{key}` {text(before)} -> {text(now)}" for key, (before, now) in group.changed.items()]
        if told:
            lines.append(plain(f"- {group.label}: {', '.join(told)}"))
    return "\n".join(["## Settings that differ from the reference", "", *lines]) if lines else ""


def json_text(comparison: Comparison) -> str:
    """The comparison as JSON, with each run's folder, settings and validations; unknown numbers are null."""
    tree = {name: value for name, value in vars(comparison).items() if name != "runs"}
    tree["rows"], tree["groups"] = ([asdict(item) for item in tree[name]] for name in ("rows", "groups"))
    for row, run in zip(tree["rows"], comparison.runs, strict=True):
        curves = {tag: curve for tag, curve in run.curves.items() if tag.startswith("val/")}
        row |= {"folder": str(run.path), "settings": run.config}
        row["curves"] = {tag: {"steps": c.steps.tolist(), "values": c.values.tolist()} for tag, c in curves.items()}
    return json.dumps(_null_for_nan(tree), indent=2, allow_nan=False, default=str) + "\n"  # a setting may be a date


def _null_for_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _null_for_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_null_for_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
