"""Checks before the first step: findings, and the rules that `check` and `fit` share.

Functions of numbers, and of free space in `disk`; module, data and checkpoints refuse a run if one gives an error.
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

from salt_lightning.errors import ConfigError, counted, few, printable

Level = Literal["ok", "note", "warning", "error"]
ENOUGH_LABELS = 512  # to judge a model by: the standard error of a trained one's CE is about 0.1 nats
_MOST_SOURCES = 20  # named with how often they are read
GOOD_EPOCHS = 4.0  # repeated text is worth nearly as much as new text up to here (arXiv 2305.16264)
_WORN_OUT = f"beyond {GOOD_EPOCHS:g} epochs text teaches less and less: add"


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    level: Level  # note: worth knowing; warning: probably not intended; error: a fit is refused, or would fail
    about: str  # what was checked, in two words
    said: str  # the result, with its numbers
    remedy: str = ""  # what to do, with the setting as typed

    def require(self) -> None:
        """For a fit: raises ConfigError for an error, prints a note or warning, and is silent if ok."""
        told = "; ".join(filter(None, (self.said, self.remedy)))
        if self.level == "error":
            raise ConfigError(told)
        if self.level != "ok":
            rank_zero_info(f"{self.level}: {self.about}: {told}")


def phases(taught: int, max_steps: int, anneal_steps: int, unused: str) -> Finding:
    """Tells how many steps have a teacher. `anneal_steps`: of them, the ramp; `unused`: settings without effect."""
    if not taught:
        return Finding("ok", "phases", f"no teacher{unused and f': {unused}'}")
    said = f"teacher in {taught} of {max_steps} steps ({taught / max_steps:.0%})"
    if anneal_steps:
        said += f", its weight falls in the last {anneal_steps} of them"
    if taught == max_steps:
        return Finding(
            "note", "phases", f"{said}; it never leaves (RKD)", f"for SALT, --kd.steps {max_steps // 5} or so"
        )
    if taught > max_steps / 2:
        return Finding("note", "phases", f"{said}; more than half: a teacher that stays too long does harm")
    return Finding("ok", "phases", said)


def rows(available: int, needed: int, of_steps: tuple[int, int], alike: bool = True) -> Finding:
    """Compares the rows of the training text with those that the run reads. `alike`: every step reads equally many.

    `of_steps`: the steps that read this text, and all steps.
    """
    (reading, max_steps), epochs = of_steps, needed / available
    steps = f"{max_steps} steps" if reading == max_steps else f"{reading} of {max_steps} steps"
    said = f"{steps} read {needed} rows of {available}: {epochs:.2f} epochs"
    if epochs <= GOOD_EPOCHS:
        return Finding("ok", "rows", said)
    enough = int(GOOD_EPOCHS * available * max_steps / needed)
    fewer = f", or --trainer.max_steps {enough}" if enough and alike else ""
    return Finding("warning", "rows", said, f"{_WORN_OUT} text{fewer}")


def shares(names: Iterable[str], read_S: np.ndarray, rows_S: np.ndarray, all_of: tuple[int, int, int]) -> Finding:
    """Checks how often each source with a weight is read: its name, the rows that the run reads, the rows it has.

    `all_of`: the steps of the run, the rows that it reads, and how many of these while sources had no weights.
    """
    max_steps, total, before = all_of
    sources = list(zip(map(printable, names), read_S.tolist(), rows_S.tolist(), strict=True))
    shown, others = sources, ""
    if len(sources) > _MOST_SOURCES:
        by_epochs = sorted(sources, key=lambda source: -source[1] / source[2])
        shown, (_, most, rows), (_, least, of) = by_epochs[:_MOST_SOURCES], by_epochs[_MOST_SOURCES], by_epochs[-1]
        others = f", {len(sources) - len(shown)} others ({least / of:.2f} to {most / rows:.2f} epochs)"
    told = (
        f"{name} {read / max(1, total - before):.1%} ({read / rows:.2f} epochs of {rows} rows)"
        for name, read, rows in shown
    )
    past = f", {before} of them while sources had no weights; of the others" if before else ":"
    said = f"{max_steps} steps read {total} rows{past} {', '.join(told)}{others}"
    if total > GOOD_EPOCHS * rows_S.sum():
        return Finding("warning", "rows", said, f"{_WORN_OUT} text")
    if not (worn := [name for name, read, rows in sources if read > GOOD_EPOCHS * rows]):
        return Finding("ok", "rows", said)
    return Finding("warning", "rows", said, f"{_WORN_OUT} to {few(worn)}, or lower its weight")


def unread_text(sources: list[tuple[str, float, float]]) -> Finding | None:
    """Warns if the tokenizer loses held-out text. Each source: its name, the share of its bytes without a token, and
    the share that its tokens decode to. None: nearly nothing is lost."""
    name, unknown, _ = max(sources, key=lambda source: source[1])
    if unknown >= 0.001:
        where = _of(name, sources)
        said = f"{unknown:.1%} of {where} is unknown to --data.tokenizer: all of it becomes the same easy token"
        remedy = "neither losses nor bits per byte can be compared; use a byte-level tokenizer"
        return Finding("warning", "unknown tokens", said, remedy)
    name, _, kept = min(sources, key=lambda source: source[2])
    if kept < 0.9:
        where = _of(name, sources)
        said = f"the tokens of {where} decode to {kept:.0%} of its bytes: --data.tokenizer drops the rest"
        return Finding("warning", "lost text", said, "the student never sees that; use a byte-level tokenizer")
    return None


def _of(name: str, sources: list[Any]) -> str:
    return f"the held-out text of {name}" if len(sources) > 1 else "the held-out text"


def changed_text(words: list[tuple[str, str]]) -> Finding | None:
    """Notes words that a tokenizer changes. `words`: pairs of a word and what it becomes. None: no such words."""
    if not words:
        return None
    said = ", ".join(f"{word!r} becomes {other!r}" for word, other in words)
    remedy = "bits per byte cannot be compared with those of a tokenizer that keeps text unchanged"
    return Finding("note", "changed text", f"--data.tokenizer does not keep all letters: {said}", remedy)


def of_training(rows: Any) -> list[Finding]:
    """Warns of marks of an end that the training text spells out, and of many examples that do not fit a row.

    `rows`: the training rows (batches/), or None.
    """
    if rows is None:
        return []
    found = [
        Finding(
            "warning" if times > 0.001 * rows.files.num_documents else "note", "end of text",
            f"{end!r} is spelled out {times} times in {counted(rows.files.num_documents, 'training document')}: read "
            "as plain text, not as an end, so what it separates counts as one document",
            "split the text there, and remove it at the end of documents (docs/own-data.md)",
        )
        for end, times in rows.files.manifest.get("spelled", {}).get("train", {}).items()
        if times
    ]  # fmt: skip
    left_out, examples = getattr(rows, "num_left_out", 0), rows.files.num_documents
    if left_out > 0.1 * examples:
        said = f"{left_out} of {examples} training examples are longer than --data.block_size {rows.block_size} tokens"
        remedy = f"they are left out; a --data.block_size of {rows.length_of(0.95)} holds 95% of them"
        found.append(Finding("warning", "examples", said, remedy))
    return found


def marks_as_text(literals: Iterable[tuple[str, str]], tokenizer: Any) -> Finding | None:
    """Warns of special tokens that plain templates spell out. `literals`: pairs of a setting and what it writes."""
    marks = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    long = [mark for mark in marks if len(mark) > 2]  # a line break may be one
    found = {mark: setting for setting, text in literals for mark in long if mark in text}
    if not found:
        return None
    said = ", ".join(f"--data.{setting} writes {mark!r}" for mark, setting in found.items())
    remedy = "leave out EOS, which ends each example; for other marks use --data.examples.messages and a chat template"
    return Finding("warning", "special tokens", f"{said}: characters here, not a special token", remedy)


def of_split(train: Any, held_out: Any, read_V: np.ndarray, fraction: float) -> list[Finding | None]:
    """Warns if validation took far more than `fraction` of the text, and notes sources that it reads nothing of.

    `train`, `held_out`: rows (batches/) of the same text; `read_V`: the held-out rows that are read.
    """
    files, trained_on = held_out.files, train.files.doc_sources
    longest = int(np.diff(files.doc_ends, prepend=0).max(initial=0))
    found = [large_share(files.num_tokens, longest, train.files.num_tokens, fraction)]
    if len(trained_on) < 1 << 24:  # more would take too long
        read = files.doc_sources[held_out.documents(read_V)]
        found.append(unwatched([files.manifest["sources"][source] for source in np.setdiff1d(trained_on, read)]))
    return found


def large_share(held_out: int, longest: int, training: int, fraction: float) -> Finding | None:
    """Warns if validation took a far larger share than `fraction`. Tokens: drawn for validation, in its longest
    document, left for training. None: about `fraction`."""
    share = held_out / (held_out + training)
    if share <= min(fraction + max(0.1, 2 * fraction), (1 + fraction) / 2):
        return None
    said = (
        f"--data.val_fraction {fraction} of the documents took {share:.0%} of the tokens (the longest document is "
        f"{longest / held_out:.0%} of these; equal documents stay together)"
    )
    return Finding("warning", "held-out text", said, "split long documents into several, or give --data.val_source")


def unwatched(sources: list[str]) -> Finding | None:
    """Notes `sources` that have training text but no validation document. None: there are none."""
    if not sources:
        return None
    them = "it" if len(sources) == 1 else "them"
    said = f"validation reads no document of {few(sources)}, so there is no val/ce for {them}"
    return Finding("note", "sources", said, "raise --data.val_fraction or --data.val_rows, or give --data.val_source")


def seen_in_training(
    names: list[str], documents: int, share: float, are_examples: bool = False, is_over: bool = False
) -> Finding | None:
    """Tells what is both training and held-out text. None: nothing is.

    `names`: files or splits that are both. `documents`: number of held-out documents with an equal one in the training
    text (of examples, an equal prompt); `share`: theirs of the held-out tokens; `is_over`: the training is.
    """
    if not (names or documents):
        return None
    what = "examples", "have a prompt of the training text, perhaps with another response"
    what = what if are_examples else ("documents", "are also training text, word for word")
    said = f"{documents} held-out {what[0]} ({share:.1%} of the tokens) {what[1]}"
    if names:
        said = f"{len(names)} of the held-out files are also training text ({few(names)})"
    remedy = (
        "remove them from --data.source, or hold out a share of it (--data.val_fraction), which never parts equal ones"
    )
    remedy = "give other held-out text, for what was learned stays learned" if is_over else remedy
    grave = bool(names or share > 0.01)
    return Finding(
        "warning" if grave else "note", "held-out text", said, f"losses on them say little about new text; {remedy}"
    )


@dataclass(frozen=True)
class TeacherLoss:
    """Cross-entropies in nats on the same tokens of the run's own text."""

    teacher: float  # in check also that of a student before its first step
    uniform: float  # of a uniform guess, ln(rows of the head)
    counts: float  # of a model that knows how often each token occurs in the training text, but uses no context
    tokens: int  # their number
    untrained: float | None = None  # of a student before its first step; None: not measured
    error: float = 0.0  # standard error of the teacher's, from the spread of its tokens


def teacher(loss: TeacherLoss, path: str, allowed: bool) -> Finding:
    """Checks whether a teacher has learned anything about this text.

    Weights that do not depend on the text (random, zeroed, made for other token ids) give ln(V) or more on average,
    since -log is convex. What any model learns first, within some hundred steps, is the counts of tokens. A teacher
    that has not covered a tenth of the way from ln(V) to those has learned nothing: on real text that is 0.3 nats, and
    an early teacher is far below it. Twice the standard error is allowed, at most 1 nat: of an untrained model it is
    small (about 0.5 / sqrt(tokens)), and a trained one is not refused for a few hard tokens.
    """
    nothing = loss.uniform if loss.untrained is None else min(loss.uniform, loss.untrained)
    least = nothing - (nothing - loss.counts) / 10
    said = f"{loss.teacher:.2f} nats on {loss.tokens} tokens of this text; ln(V) {loss.uniform:.2f}"
    if loss.untrained is not None:
        said += f", untrained student {loss.untrained:.2f}"
    said += f", token counts alone {loss.counts:.2f}"
    if not loss.teacher - min(2 * loss.error, 1.0) <= least:
        return Finding(
            "note" if allowed else "error",
            "teacher CE",
            f"--model.teacher.path {path} knows nothing about this text: {said}",
            "its weights are untrained, damaged, or for another tokenizer: use a trained teacher with its own "
            "--data.tokenizer, or --kd.allow_untrained true for a control",
        )
    if loss.teacher > loss.counts:
        remedy = "a teacher this weak holds the student back: train it longer, or on text like this"
        return Finding("warning", "teacher CE", said, remedy)
    return Finding("ok", "teacher CE", said)


def disk(folder: Path, size: int, most: int) -> Finding:
    """Checks that checkpoints of `size` bytes fit into the free space of their folder, which need not exist yet.
    `most`: the largest number of them at once."""
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    # existing files are replaced, except those set aside from another branch
    there = (file for file in folder.glob("**/*") if file.is_file() and ".aside" not in str(file.relative_to(folder)))
    free = shutil.disk_usage(parent).free + sum(file.stat().st_size for file in there)
    fitting = free // size - 1  # a new one is complete before an old one is removed
    said = f"{size_said(size)} each, {most} at once, {size_said(free)} free in {folder}"
    if most <= fitting:
        return Finding("ok", "checkpoints", said)
    return Finding(
        "error",
        "checkpoints",
        f"checkpoints do not fit: {said}",
        f"there is room for {max(fitting, 0)} and the one being written: free some space (in the folder itself, delete "
        "checkpoints that earlier starts have kept), set --checkpoint.folder to a larger disk, or use a smaller "
        "--checkpoint.keep and fewer --checkpoint.at_steps",
    )


def size_said(size: float) -> str:
    """Bytes, for messages."""
    return f"{size / 2**30:.3g} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.3g} MiB"


def once_each(findings: list[Finding]) -> list[Finding]:
    """The findings without errors that earlier ones have told."""
    kept: list[Finding] = []
    for finding in findings:
        if finding.level != "error" or finding.said not in {each.said for each in kept}:
            kept.append(finding)
    return kept


def listed(findings: list[Finding], width: int) -> str:
    """The findings as text, warnings and errors in capitals, with a count of them at the end."""
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
    return "\n".join([*map(printable, lines), "", f"{counted(errors, 'error')}, {counted(warnings, 'warning')}: {end}"])
