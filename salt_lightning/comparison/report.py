"""Renders comparisons and evaluations as Markdown that is readable as text, JSON and a figure; computes no results."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from salt_lightning.comparison.results import Comparison, Group, Row
from salt_lightning.errors import padded, printable, width_of
from salt_lightning.run.curves import THIRDS
from salt_lightning.run.runlog import Run

UNITS = ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
# After Okabe and Ito: distinguishable with any kind of color vision. Orange and sky blue are darker, for white paper.
REFERENCE_COLOUR = "#444444"
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#9A6A00", "#3A93C9")
STYLES: tuple[Any, ...] = ("-", ":", "-.", (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1)))
LEAVES, DASHES = "a teacher leaves", (0, (4, 3))
# In grey, the colors are hardly distinguishable, so the style changes with each: up to five are told apart by it alone.
# As 5 and 6 have no common divisor, there are 30 looks.
LOOKS = [(STYLES[i % len(STYLES)], COLOURS[i % len(COLOURS)]) for i in range(len(STYLES) * len(COLOURS))]
COUNTS = re.compile(r"\w+/(tokens|examples)")  # tags of validate and test, fully matched: a source may be called tokens
MOST_PARTS = 12  # columns of a table that is still readable as text
FIRST_SHOWN = 0.25  # the figure cuts off the fall in this first share of the steps, which would flatten the rest


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
        return (
            turned if len(head) == len(first) and width_of(turned.partition("\n")[0]) < width_of(lines[0]) else found[0]
        )

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
    is_over = not any(row.running for row in comparison.rows if row.run == comparison.reference)
    reference = f"Reference: {whose}, {'final' if is_over else 'not finished, latest'} validation CE {final}."
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

    reached = zip(cells(".0f", lambda r: r.reached_step), cells(".1%", lambda r: r.reached_steps_share), strict=True)
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
        "min to max": [f"{min(g.val_ce):.4f} to {max(g.val_ce):.4f}" if g.n > 1 else "-" for g in groups],
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
        columns[tag.removeprefix("val/ce/")] = [number(row.last.get(tag), ".4f") for row in rows]
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
    spread = f" ({np.std(values, ddof=1):{form}})" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{spread}"


def _reach_table(groups: list[Group]) -> str:
    """Where the seeds reach the reference's loss: mean (std), and each."""
    if all(group.n <= 1 for group in groups):
        return ""
    shares: dict[str, Callable[[Group], list[float]]] = {
        "of its steps": lambda g: g.reached_steps_share,
        "of its FLOPs": lambda g: g.reached_flops_share,
        "with the teacher's training": lambda g: g.reached_flops_share_with_teacher_training,
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
    is_running = {row.running for row in comparison.rows if row.run in names}
    who = "all finished runs" if len(is_running) > 1 else "all"
    return f"## Validation CE at the last point that {who} have reached\n\n" + table(columns, text=("run",)) + line


def _changes(groups: list[Group]) -> str:
    lines, text = [], partial(json.dumps, default=str)  # writes dates as text
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


def figure(comparison: Comparison) -> Figure:
    """Validation CE over steps and over FLOPs of student and teacher, one color per experiment.

    A dashed line in that color marks where a teacher leaves; a dot marks where a run reaches the reference's loss,
    with the share of the reference's steps or FLOPs.
    """
    fig = Figure(figsize=(12, max(4.2, 1.0 + 0.22 * len(comparison.groups))), layout="constrained")
    axes = fig.subplots(1, 2, sharey=True)
    of_groups = {name for group in comparison.groups for name in group.runs} - set(comparison.other_text)
    runs = [run for run in comparison.runs if run.name in of_groups]
    validated = [run for run in runs if len(run.val_ce.steps)]
    most = max((run.flops(run.val_ce.steps[-1]) for run in validated), default=0.0)
    scale, unit = flop_unit(most)
    for ax, axis, divisor, label in (
        (axes[0], "steps", 1.0, "optimizer steps"),
        (axes[1], "FLOPs", scale, f"{unit} of student and teacher"),
    ):
        _panel(ax, comparison, axis, divisor)
        ax.set_xlabel(label)
    axes[0].set_ylabel("validation CE (nats per token)")
    if validated:
        axes[0].set_ylim(*_shown_range(validated))
        legend = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
        if legend.pop(LEAVES, None):  # one entry for the lines of all colors
            legend[LEAVES] = Line2D([], [], color=REFERENCE_COLOUR, lw=0.8, ls=DASHES)
        fig.legend(
            list(legend.values()),
            list(legend),
            loc="outside right upper",  # covers no curve
            title="final validation CE",
            alignment="left",
            frameon=False,
        )
    return fig


def _panel(ax: Axes, comparison: Comparison, axis: str, divisor: float) -> None:
    def x_of(run: Run, steps: Sequence[float] | np.ndarray) -> np.ndarray:
        return run.axis(axis, np.asarray(steps)) / divisor

    runs = {run.name: run for run in comparison.runs}
    rows = {row.run: row for row in comparison.rows}
    level = comparison.reference_val_ce
    ax.axhline(level, color=REFERENCE_COLOUR, lw=0.6, label="final CE of the reference")
    methods = {row.method for row in comparison.rows}
    # these look the same in every figure, whatever else is in it
    known = {method: look for method, look in zip(("SALT step", "RKD"), LOOKS[:2], strict=True) if method in methods}
    others = cycle([look for look in LOOKS if look not in known.values()])
    noted: list[tuple[float, str, str]] = []
    width = 1.0 if any(len(group.runs) > 1 for group in comparison.groups) else 2.0
    for group in comparison.groups:
        shown = [runs[name] for name in group.runs if name not in comparison.other_text]
        if not shown:
            continue
        is_reference = comparison.reference in group.runs
        method = rows[shown[0].name].method
        if is_reference:
            style, colour = "-", REFERENCE_COLOUR
        else:
            style, colour = known.pop(method) if method in known else next(others)
        named = printable(group.label).replace("$", r"\$")  # else it would be a formula
        label = f"{named}  {number(group.mean, '.3f')}" + (f"  (n = {group.n})" if group.n > 1 else "")
        for run in shown:
            point = "." if len(run.val_ce.steps) == 1 else ""  # a line would not be visible
            xs, ys = x_of(run, run.val_ce.steps), run.val_ce.values
            ax.plot(xs, ys, marker=point, color=colour, ls=style, lw=width, label=label)
            label = "_"  # one legend entry for all seeds
            row = rows[run.name]
            if not is_reference and not math.isnan(row.reached_step):
                (x,) = x_of(run, [row.reached_step])
                share = row.reached_steps_share if axis == "steps" else row.reached_flops_share
                ax.plot(x, level, "o", color=colour, ms=5)
                if len(group.runs) == 1:
                    noted.append((x, number(share, ".0%"), colour))
        first = shown[0]
        if 0 < first.kd_steps < (first.max_steps or math.inf):
            (x,) = x_of(first, [first.kd_steps])
            ax.axvline(x, color=colour, lw=0.8, ls=DASHES, label=LEAVES)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlim(left=0)
    lines, right = 0, math.inf
    for x, text, colour in sorted(noted, reverse=True):  # from the right: of two close ones, the left goes lower
        lines = lines + 1 if right - x < 0.08 * ax.get_xlim()[1] else 0
        right, off = x, (-4, -4 - 11 * lines)
        ax.annotate(text, (x, level), off, textcoords="offset points", ha="right", va="top", color=colour, fontsize=9)


def _shown_range(runs: list[Run]) -> tuple[float, float]:
    known = [(run.val_ce, np.isfinite(run.val_ce.values)) for run in runs]  # a diverged run has none
    curves = [(ce.steps[is_known], ce.values[is_known]) for ce, is_known in known if is_known.any()]
    if not curves:
        return 0.0, 1.0
    cut = FIRST_SHOWN * max(steps[-1] for steps, _ in curves)
    top = max(float(np.interp(cut, steps, values)) for steps, values in curves)
    bottom = min(float(values.min()) for _, values in curves)
    return bottom - 0.05 * (top - bottom), max(top, bottom + 1e-3)
