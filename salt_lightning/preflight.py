"""What is looked at before the first step: findings, and the rules that `check` and `fit` share.

Functions of figures; module, data and checkpoints refuse a run for an error.
"""

import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from salt_lightning.errors import ConfigError, few, printable

Level = Literal["ok", "note", "warning", "error"]
GOOD_EPOCHS = 4.0  # repeated text is worth nearly as much as new text up to here (arXiv 2305.16264)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        level: ok, note (worth knowing), warning (probably not meant), error (a fit is refused, or fails).
        about: what was looked at, in two words.
        said: the figures.
        remedy: what to do, with the setting as typed.
    """

    level: Level
    about: str
    said: str
    remedy: str = ""

    def require(self) -> None:
        """For a fit: raises ConfigError where it is an error, says a note or a warning, and nothing of the rest."""
        told = "; ".join(filter(None, (self.said, self.remedy)))
        if self.level == "error":
            raise ConfigError(told)
        if self.level != "ok":
            rank_zero_info(f"{self.level}: {self.about}: {told}")


def rows(available: int, needed: int, max_steps: int, alike: bool = True) -> Finding:
    """Rows of the training text against those that the run reads; `alike`: all its steps read as many."""
    epochs = needed / available
    said = f"{max_steps} steps read {needed} rows of {available}: {epochs:.2f} epochs"
    if epochs <= GOOD_EPOCHS:
        return Finding("ok", "rows", said)
    enough = int(GOOD_EPOCHS * available * max_steps / needed)
    fewer = f", or --trainer.max_steps {enough}" if enough and alike else ""
    return Finding("warning", "rows", said, f"beyond {GOOD_EPOCHS:g} epochs text teaches ever less: add text{fewer}")


def shares(names: Iterable[str], read_S: np.ndarray, rows_S: np.ndarray, all_of: tuple[int, int]) -> Finding:
    """Of each source with a weight of its own its name, the rows that the run reads, and those that there are.

    `all_of`: the steps of the run, and the rows that it reads, also while there were no weights.
    """
    max_steps, total = all_of
    sources = list(zip(map(printable, names), read_S.tolist(), rows_S.tolist(), strict=True))
    told = (f"{name} {read / total:.1%} ({read / rows:.2f} epochs of {rows} rows)" for name, read, rows in sources)
    said = f"{max_steps} steps read {total} rows: {', '.join(told)}"
    if not (worn := [name for name, read, rows in sources if read > GOOD_EPOCHS * rows]):
        return Finding("ok", "rows", said)
    remedy = f"beyond {GOOD_EPOCHS:g} epochs text teaches ever less: add to {few(worn)}, or lower its weight"
    return Finding("warning", "rows", said, remedy)


def unread_text(sources: list[tuple[str, float, float]]) -> Finding | None:
    """Of each source of held-out text its name, the share of its bytes that a tokenizer has no token for, and the
    share that its tokens decode to. None: next to none, and next to all."""
    name, unknown, _ = max(sources, key=lambda source: source[1])
    if unknown >= 0.001:
        where = _of(name, sources)
        said = f"{unknown:.1%} of {where} is unknown to --data.tokenizer: all of it counts as one easy token"
        remedy = "no loss and no bits per byte can be compared; take a byte-level one"
        return Finding("warning", "unknown tokens", said, remedy)
    name, _, kept = min(sources, key=lambda source: source[2])
    if kept < 0.9:
        where = _of(name, sources)
        said = f"the tokens of {where} decode to {kept:.0%} of its bytes: --data.tokenizer drops the others"
        return Finding("warning", "lost text", said, "the student never sees them; take a byte-level one")
    return None


def _of(name: str, sources: list[Any]) -> str:
    return f"the held-out text of {name}" if len(sources) > 1 else "the held-out text"


def changed_text(words: list[tuple[str, str]]) -> Finding | None:
    """`words`: some of those that a tokenizer makes others of, with these. None: it has none."""
    if not words:
        return None
    said = ", ".join(f"{word!r} becomes {other!r}" for word, other in words)
    remedy = "no bits per byte can be compared with those of a tokenizer that keeps text as it is"
    return Finding("note", "changed text", f"--data.tokenizer does not keep all letters: {said}", remedy)


def large_share(held_out: int, longest: int, training: int, fraction: float) -> Finding | None:
    """Tokens drawn for validation, of its longest document, left for training; the share that was asked for. None:
    about that."""
    share = held_out / (held_out + training)
    if share <= fraction + max(0.1, 2 * fraction):
        return None
    said = (
        f"--data.val_fraction {fraction} of the documents has drawn {share:.0%} of the tokens (the longest document "
        f"{longest / held_out:.0%} of these; equal ones stay together)"
    )
    return Finding("warning", "held-out text", said, "split long documents into several, or give --data.val_source")


def unwatched(sources: list[str]) -> Finding | None:
    """`sources`: those with training text of which validation reads no document. None: there are none."""
    if not sources:
        return None
    said = f"no document of {few(sources)} is validated, so there is no val/ce of it"
    return Finding("note", "sources", said, "raise --data.val_fraction or --data.val_rows, or give --data.val_source")


def seen_in_training(names: list[str]) -> Finding | None:
    """`names`: files or splits that are training text and held-out text at once. None: none are."""
    if not names:
        return None
    said = f"{len(names)} of the held-out files are training text too ({few(names)})"
    return Finding(
        "warning", "held-out text", said, "losses on them say nothing of new text; take them out of --data.source"
    )


@dataclass(frozen=True)
class TeacherLoss:
    """Cross-entropies on the same tokens of the run's own text, nats.

    Args:
        teacher: of the teacher; in check also of a student before its first step.
        uniform: of one that knows nothing, ln(rows of its head).
        counts: of one that knows how often each token occurs in the training text and nothing of its context.
        tokens: how many they are.
        untrained: of a student before its first step; None: not measured.
    """

    teacher: float
    uniform: float
    counts: float
    tokens: int
    untrained: float | None = None


def teacher(loss: TeacherLoss, path: str, allowed: bool) -> Finding:
    """Whether a teacher has learned anything of this text.

    Weights that do not depend on the text (random, zeroed, made for other token ids) give ln(V) or more in the mean,
    since -log is convex. What any model learns first, within some hundred steps, is the counts of tokens. A teacher
    that has not come a tenth of the way from ln(V) to these has learned nothing: on real text that is 0.3 nats, many
    times the sampling error of an untrained model (about 0.5 / sqrt(tokens)), and an early teacher is far below it.
    """
    nothing = loss.uniform if loss.untrained is None else min(loss.uniform, loss.untrained)
    least = nothing - (nothing - loss.counts) / 10
    said = f"{loss.teacher:.2f} nats on {loss.tokens} tokens of validation text; ln(V) {loss.uniform:.2f}"
    if loss.untrained is not None:
        said += f", a student not trained {loss.untrained:.2f}"
    said += f", counts of tokens alone {loss.counts:.2f}"
    if not loss.teacher <= least:
        return Finding(
            "note" if allowed else "error",
            "teacher CE",
            f"--model.teacher.path {path} knows nothing of this text: {said}",
            "its weights are not trained, damaged, or belong to another tokenizer: give a trained one with its own "
            "--data.tokenizer, or --kd.allow_untrained true for a control",
        )
    if loss.teacher > loss.counts:
        remedy = "a teacher this weak holds the student back: train it longer, or on text like this"
        return Finding("warning", "teacher CE", said, remedy)
    return Finding("ok", "teacher CE", said)


def disk(folder: Path, weight_bytes: int, most: int) -> Finding:
    """Checkpoints (weights and AdamW's two states) against the free space of the run's folder.

    Args:
        folder: where they go; need not exist yet.
        weight_bytes: of the student's parameters.
        most: checkpoints that lie there at once.
    """
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    # what is there gives way, but for what another branch has left
    there = (file for file in folder.glob("**/*") if file.is_file() and ".aside" not in str(file.relative_to(folder)))
    free = shutil.disk_usage(parent).free + sum(file.stat().st_size for file in there)
    size = 3 * weight_bytes
    fitting = free // size - 1  # a new one is whole before an old one goes
    said = f"{size_said(size)} each, {most} at once, {size_said(free)} free in {folder}"
    if most <= fitting:
        return Finding("ok", "checkpoints", said)
    return Finding(
        "error",
        "checkpoints",
        f"checkpoints do not fit: {said}",
        f"there is room for {max(fitting, 0)} and the one being written: free some, set --checkpoint.folder to a "
        "larger disk, or lower --checkpoint.keep and --checkpoint.at_steps",
    )


def size_said(size: float) -> str:
    """Bytes, for messages."""
    return f"{size / 2**30:.3g} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.3g} MiB"


def listed(findings: list[Finding], width: int) -> str:
    """The findings, one after the other, with what is wrong in capitals, and a sum at the end."""
    about = max(len(f.about) for f in findings)
    wrap = partial(textwrap.wrap, width=width, break_long_words=False, break_on_hyphens=False)
    lines: list[str] = []
    for finding in findings:
        mark = finding.level.upper() if finding.level in ("warning", "error") else finding.level
        indent = " " * (len("warning") + about + 4)
        first = f"{mark:<7}  {finding.about:<{about}}  "
        lines += wrap(first + finding.said, subsequent_indent=indent)
        if finding.remedy:
            lines += wrap("-> " + finding.remedy, initial_indent=indent, subsequent_indent=indent + "   ")
    errors, warnings = (sum(f.level == level for f in findings) for level in ("error", "warning"))
    end = "fit would stop or fail" if errors else "fit can start"
    return "\n".join([*lines, "", f"{_plural(errors, 'error')}, {_plural(warnings, 'warning')}: {end}"])


def _plural(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"
