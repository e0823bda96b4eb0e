"""The report of scores: histogram, share of zeros, examples of rows, how much k matters. Text and a figure."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from salt_lightning.batches.order import scatter
from salt_lightning.comparison.figure import COLOURS, REFERENCE_COLOUR
from salt_lightning.comparison.report import table
from salt_lightning.errors import printable, writing
from salt_lightning.selection import LESS_CHANCE, MUCH_CHANCE, KeepRule, chance, kept_mask, kept_rows, row_scores
from salt_lightning.teacher.scores import NO_LABEL, Scores

KS = (5, 10, 20, 50)
EXAMPLES = 3
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # also of a text's direction
_CHARS = 400


def write(scores: Scores, rule: KeepRule, decode: Callable[[int], str]) -> tuple[Path, Path]:
    """Writes report.md and report.png into the folder of the scores, which must be complete; returns the two files.

    `rule` decides which rows would be kept; the report uses its k and `masked`. `decode`: row number -> its text.
    """
    of_k = {k: row_scores(scores, k, rule.masked) for k in sorted({*KS, rule.k})}
    kept = {k: kept_mask(score_R, replace(rule, k=k)) for k, score_R in of_k.items()}
    text, image = scores.run / "report.md", scores.run / "report.png"
    parts = [
        "# Scores of the training rows",
        _summary(scores, of_k[rule.k], kept[rule.k], rule),
        "![Histogram of the scores](report.png)",
        _by_k(of_k, rule),
        _overlap(kept, of_k, rule),
        _examples(scores, of_k[rule.k], rule, decode),
    ]
    with writing(scores.run / "report.*", "run the same command again: all shards are kept"):
        text.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        _figure(of_k[rule.k], kept[rule.k], rule).savefig(image, dpi=160)
    return text, image


def _summary(scores: Scores, score_R: np.ndarray, kept: np.ndarray, rule: KeepRule) -> str:
    teacher = scores.manifest.get("teacher", {})
    name = f"{teacher.get('path')}" + (f" at {teacher['revision']}" if teacher.get("revision") else "")
    zeros, inside = np.mean(score_R == 0), score_R[kept]
    low, middle, high = np.quantile(score_R, (0.1, 0.5, 0.9))
    by_chance = chance(score_R, kept)
    remark = (
        f"- **{by_chance:.0%} of the rows kept have the same score as rows left out**: chance decides between them. "
        f"Use {LESS_CHANCE}."
    )
    return "\n".join(
        [
            f"- {len(score_R)} rows of {scores.scored.block_size} tokens, scored by {name} "
            f"({scores.scored.precision}; {scores.flops_said}).",
            f"- S(x), k {rule.k}, tokens outside the top k: {rule.masked}. Share of rows that score 0: "
            f"{zeros:.1%}. Mean {score_R.mean():.4f}; 10%, 50%, 90% quantiles: {low:.4f}, {middle:.4f}, "
            f"{high:.4f}; highest {score_R.max():.4f}.",
            f"- The rule {rule.name} keeps {len(inside)} rows ({len(inside) / len(score_R):.1%}), "
            f"S {inside.min():.4f} to {inside.max():.4f}.",
            *([remark] if by_chance > 0.01 and rule.order != "random" else []),
        ]
    )


def _by_k(of_k: dict[int, np.ndarray], rule: KeepRule) -> str:
    columns = {
        "k": [str(k) for k in of_k],
        "score 0": [f"{np.mean(s == 0):.1%}" for s in of_k.values()],
        "mean S": [f"{s.mean():.4f}" for s in of_k.values()],
        "highest S": [f"{s.max():.4f}" for s in of_k.values()],
    }
    return f"## Other values of k (masked: {rule.masked})\n\n" + table(columns)


def _overlap(kept: dict[int, np.ndarray], of_k: dict[int, np.ndarray], rule: KeepRule) -> str:
    columns = {"kept by both": [f"k = {k}" for k in kept]}
    # the same lots for every k: equal, but not by score
    drawn = {k for k in kept if chance(of_k[k], kept[k]) > MUCH_CHANCE}
    for k in kept:
        columns[f"k = {k}"] = [
            "-" if {k, other} & drawn else f"{kept[k][mask_R].mean():.1%}" for other, mask_R in kept.items()
        ]
    note = "\n\n-: most of the rows kept have the same score as rows left out." if drawn else ""
    return f"## Rows that two values of k both keep ({rule.order})\n\n" + table(columns, text=("kept by both",)) + note


def _examples(scores: Scores, score_R: np.ndarray, rule: KeepRule, decode: Callable[[int], str]) -> str:
    lines = ["## Examples"]
    for which in ("highest", "middle", "lowest"):
        lines.append(f"### {which.capitalize()} scores")
        rows = kept_rows(score_R, KeepRule(rows=min(EXAMPLES, len(score_R)), order=which))
        for row in rows[np.lexsort((scatter(rows), -score_R[rows]))]:
            shard, within = divmod(int(row), scores.scored.shard_rows)
            nll_RT, rank_RT = scores.read(shard)
            labelled_T = rank_RT[within] != NO_LABEL
            top = float(np.mean(rank_RT[within][labelled_T] < rule.k)) if labelled_T.any() else 0.0
            ce = float(nll_RT[within][labelled_T].mean()) if labelled_T.any() else 0.0
            text = " ".join(decode(int(row)).split())[:_CHARS].replace("`", "'")
            text = _CONTROLS.sub(lambda found: printable(found[0]), text)
            lines.append(
                f"Row {row}: S {score_R[row]:.4f}, mean loss {ce:.4f}, {top:.0%} within the top {rule.k}\n\n    {text}"
            )
    return "\n\n".join(lines)


def _figure(score_R: np.ndarray, kept: np.ndarray, rule: KeepRule) -> Figure:
    fig = Figure(figsize=(7, 3.6), layout="constrained")
    ax = fig.subplots()
    above = score_R[score_R > 0]
    if not len(above):
        ax.text(0.5, 0.5, f"all {len(score_R)} rows score 0", ha="center", va="center")
        ax.set_axis_off()
        return fig
    edges = np.linspace(0, float(np.quantile(above, 0.999)), 61).tolist()
    in_view = [np.clip(values[values > 0], None, edges[-1]) for values in (score_R, score_R[kept])]
    ax.hist(in_view[0], edges, color=REFERENCE_COLOUR, alpha=0.35, label=f"all {len(score_R)} rows")
    ax.hist(in_view[1], edges, color=COLOURS[1], alpha=0.8, label=f"kept: {np.count_nonzero(kept)}, {rule.order}")
    ax.plot([], [], " ", label=f"at 0, not shown: {np.mean(score_R == 0):.1%} of all")
    ax.set_xlabel(f"S(x): median loss of a row's tokens, {rule.masked} outside the top {rule.k} (nats)")
    ax.set_ylabel("rows")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return fig
