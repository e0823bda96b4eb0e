"""Draws a comparison: validation CE of each run over steps and over FLOPs; computes no results."""

import math
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from salt_lightning.comparison.report import flop_unit, number
from salt_lightning.comparison.results import Comparison, Group
from salt_lightning.run.runlog import Run

# After Okabe and Ito: distinguishable with any kind of color vision. Orange and sky blue are darker, for white paper.
REFERENCE_COLOUR = "#444444"
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#9A6A00", "#3A93C9")
STYLES: tuple[Any, ...] = ("-", ":", "-.", (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1)))
LEAVES, DASHES = "a teacher leaves", (0, (4, 3))
# In grey, the colors are hardly distinguishable, so the style changes with each: up to five are told apart by it alone.
# As 5 and 6 have no common divisor, there are 30 looks.
LOOKS = [(STYLES[i % len(STYLES)], COLOURS[i % len(COLOURS)]) for i in range(len(STYLES) * len(COLOURS))]
FIRST_SHOWN = 0.25  # the figure cuts off the fall in this first share of the steps, which would flatten the rest
DIVERGED = 2.0  # and a run that is then, or ends, above this many times its first loss
LEAST_SHOWN = 0.05  # nats per token
LONGEST_NAME, HEAD = 60, 20  # letters: the legend takes its place from the panels
FIRST_LINE, LINE = 4, 11  # points below the reference's loss: where runs reach it, one line for each of close ones


def draw(comparison: Comparison) -> Figure:
    """Validation CE over steps and over FLOPs of student and teacher, one color per experiment.

    A dashed line in that color marks where a teacher leaves; a dot marks where a run reaches the reference's loss,
    with the share of the reference's steps or FLOPs.
    """
    height = max(4.2, 1.0 + 0.22 * len(comparison.groups))  # inches
    fig = Figure(figsize=(12, height), layout="constrained")
    axes = fig.subplots(1, 2, sharey=True)
    validated = [run for _, runs in _shown(comparison) for run in runs if len(run.val_ce.steps)]
    costs = [run.flops(run.val_ce.steps[-1]) for run in validated]
    scale, unit = flop_unit(max((cost for cost in costs if not math.isnan(cost)), default=0.0))
    num_lines = max(_panel(axes[0], comparison, "steps", 1.0), _panel(axes[1], comparison, "FLOPs", scale))
    axes[0].set_xlabel("optimizer steps")
    axes[1].set_xlabel(f"{unit} of student and teacher")
    axes[0].set_ylabel("validation CE (nats per token)")
    if validated:
        bottom, top = _shown_range(validated)
        if num_lines:  # so that they are above the axis
            share = min(0.5, (FIRST_LINE + LINE * num_lines) / (72 * (height - 0.8)))  # of the panel's height
            bottom = min(bottom, (comparison.reference_val_ce - share * top) / (1 - share))
        axes[0].set_ylim(bottom, top)
        axes[0].ticklabel_format(axis="y", useOffset=False)
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


def _panel(ax: Axes, comparison: Comparison, axis: str, divisor: float) -> int:
    """Draws one of the two; returns the lines of notes below the reference's loss."""

    def x_of(run: Run, step: float) -> float:
        return float(run.axis(axis, np.array([step]))[0]) / divisor

    level = comparison.reference_val_ce
    if math.isfinite(level):
        which = "final" if comparison.reference_is_over else "latest"
        ax.axhline(level, color=REFERENCE_COLOUR, lw=0.6, label=f"{which} CE of the reference")
    rows = {row.run: row for row in comparison.rows}
    names = _shortened([group.label for group in comparison.groups])
    width = 1.0 if any(len(group.runs) > 1 for group in comparison.groups) else 2.0
    noted: list[tuple[float, str, str]] = []
    for (group, runs), (style, colour) in zip(_shown(comparison), _looks(comparison), strict=True):
        named = names[group.label].replace("$", r"\$")  # else it would be a formula
        label = f"{named}  {number(group.mean, '.3f')}" + (f"  (n = {group.n})" if group.n > 1 else "")
        for run in runs:
            point = "." if len(run.val_ce.steps) == 1 else ""  # a line would not be visible
            xs, ys = run.axis(axis, run.val_ce.steps) / divisor, run.val_ce.values
            ax.plot(xs, ys, marker=point, color=colour, ls=style, lw=width, label=label)
            label = "_"  # one legend entry for all seeds
            row = rows[run.name]
            if comparison.reference not in group.runs and not math.isnan(row.reached_step):
                x = x_of(run, row.reached_step)
                share = row.reached_steps_share if axis == "steps" else row.reached_flops_share
                ax.plot(x, level, "o", color=colour, ms=5)
                if len(group.runs) == 1 and not math.isnan(share):
                    noted.append((x, number(share, ".0%"), colour))
        first = runs[0]
        if 0 < first.kd_steps < (first.max_steps or math.inf):
            ax.axvline(x_of(first, first.kd_steps), color=colour, lw=0.8, ls=DASHES, label=LEAVES)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlim(left=0)
    return _note(ax, level, noted)


def _shown(comparison: Comparison) -> list[tuple[Group, list[Run]]]:
    """The experiments with runs that validated on the reference's text, and these runs."""
    runs = {run.name: run for run in comparison.runs if run.name not in comparison.other_text}
    of_groups = [(group, [runs[name] for name in group.runs if name in runs]) for group in comparison.groups]
    return [(group, shown) for group, shown in of_groups if shown]


def _looks(comparison: Comparison) -> list[tuple[Any, str]]:
    """Line style and color of each experiment; the first of SALT and of RKD look the same in every figure."""
    methods = {row.run: row.method for row in comparison.rows}
    own = zip(("SALT step", "RKD"), LOOKS[:2], strict=True)
    known = {method: look for method, look in own if method in methods.values()}
    others, looks = cycle([look for look in LOOKS if look not in known.values()]), []
    for group, (first, *_) in _shown(comparison):
        if comparison.reference in group.runs:
            looks.append(("-", REFERENCE_COLOUR))
        else:
            method = methods[first.name]
            looks.append(known.pop(method) if method in known else next(others))
    return looks


def _note(ax: Axes, level: float, noted: list[tuple[float, str, str]]) -> int:
    """Writes notes (x, text, color) below the reference's loss; returns their lines."""
    lines, most, right = 0, 0, math.inf
    for x, text, colour in sorted(noted, reverse=True):  # from the right: of two close ones, the left goes lower
        lines = lines + 1 if right - x < 0.08 * ax.get_xlim()[1] else 0
        most, right, off = max(most, lines + 1), x, (-4, -FIRST_LINE - LINE * lines)
        ax.annotate(text, (x, level), off, textcoords="offset points", ha="right", va="top", color=colour, fontsize=9)
    return most


def _shortened(names: list[str]) -> dict[str, str]:
    """Long names without most of what they begin and end with in common; of one alone, the middle is left out."""
    long = [name for name in names if len(name) > LONGEST_NAME]
    start, end = map(_common, (long, [name[::-1] for name in long]))
    if len(long) == 1:
        start, end = len(long[0]) - HEAD, 0

    def shorter(name: str) -> str:
        head = name[: min(start, HEAD)] + "…" * (start > HEAD)
        tail = name[start:]
        return head + (tail if len(tail) <= LONGEST_NAME - HEAD else tail[: len(tail) - end] + "…")

    return {name: shorter(name) if name in long else name for name in names}


def _common(names: list[str]) -> int:
    """How many letters all begin with."""
    differ = (at for at, letters in enumerate(zip(*names, strict=False)) if len(set(letters)) > 1)
    return next(differ, min(map(len, names), default=0))


def _shown_range(runs: list[Run]) -> tuple[float, float]:
    known = [(run.val_ce, np.isfinite(run.val_ce.values)) for run in runs]  # a diverged run has none
    curves = [(ce.steps[is_known], ce.values[is_known]) for ce, is_known in known if is_known.any()]
    if not curves:
        return 0.0, 1.0
    cut = FIRST_SHOWN * max(steps[-1] for steps, _ in curves)
    bottom = min(float(values.min()) for _, values in curves)
    tops = [(float(np.interp(cut, steps, values)), steps[0]) for steps, values in curves]
    usual = [each for each, (_, v) in zip(tops, curves, strict=True) if max(each[0], v[-1]) <= DIVERGED * v[0]]
    top, begins = max(usual or tops)
    shown = max(top - bottom, LEAST_SHOWN)
    above = 0.05 if begins >= cut else 0.0  # the highest is a point, which is not to be cut off
    return bottom - 0.05 * shown, bottom + (1 + above) * shown
