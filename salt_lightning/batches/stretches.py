"""The rows that a run has read before each step, if its batch size, row length or shares changed at a resume.

It is still a pure function of the step and of the stretches that make up the run, which the checkpoint stores.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from salt_lightning.batches.mixture import CYCLE, Shares
from salt_lightning.errors import ConfigError, few


@dataclass(frozen=True)
class Stretch:
    """From optimizer step `step` (from 0) on, each step reads `rows` rows of `block_size`, in the shares `turns`."""

    step: int
    rows: int  # --data.global_batch_size
    block_size: int  # --data.block_size
    turns: dict[str, int] | None  # of each source in a cycle of mixture.py; None: all rows are read equally often
    text: str = ""  # its fingerprint, if all rows are read equally often: rows read of other text do not count


Stretches = tuple[Stretch, ...]


def one_stretch(rows: int, block_size: int, shares: Shares | None, text: str = "") -> Stretches:
    """The stretches of a new run. `text`: the fingerprint of what it reads."""
    if shares is None:
        return (Stretch(0, rows, block_size, None, text),)
    return (Stretch(0, rows, block_size, dict(zip(shares.names, shares.turns_S.tolist(), strict=True))),)


def rows_before(stretches: Stretches, step: int) -> int:
    """Number of rows, of the last stretch's length, that a run has read of its text before an optimizer step."""
    tokens = sum(steps * stretch.rows * stretch.block_size for stretch, steps in _of_text(stretches, step))
    return tokens // stretches[-1].block_size


def steps_of(stretches: Stretches, max_steps: int) -> tuple[int, int]:
    """How many of a run's steps read the text of its last stretch, and all of them."""
    return sum(steps for _, steps in _of_text(stretches, max_steps)), max_steps


def _of_text(stretches: Stretches, step: int) -> Iterator[tuple[Stretch, int]]:
    """The stretches that read the last one's text, and the steps of each before `step`."""
    ends = [*(stretch.step for stretch in stretches[1:]), step]
    for stretch, end in zip(stretches, ends, strict=True):
        if not stretch.text or stretches[-1].text in ("", stretch.text):
            yield stretch, max(0, min(end, step) - stretch.step)


def go_on(checkpoint: Mapping[str, Any], begun: Stretches) -> Stretches:
    """The stretches of a run that resumes from a checkpoint with the settings of `begun`.

    Raises:
        ConfigError: the checkpoint's stretches are impossible.
    """
    step, (now,) = checkpoint["global_step"], begun
    past = [stretch for stretch in _of_checkpoint(checkpoint, now) if stretch.step < step]
    if past and replace(past[-1], step=now.step) == now:
        return tuple(past)
    return (*past, replace(now, step=step if past else 0))


def _of_checkpoint(checkpoint: Mapping[str, Any], now: Stretch) -> Stretches:
    if not checkpoint["stretches"]:  # of the user's own loader: as if these settings had applied from the start
        return (now,)
    try:
        # older checkpoints do not record it
        text = {"text": checkpoint["data"].get("--data.train_fingerprint", "") if now.text else ""}
        found = tuple(Stretch(**text | each) for each in checkpoint["stretches"])
        steps = [stretch.step for stretch in found]
        turns = [[*stretch.turns.values()] for stretch in found if stretch.turns is not None]
        good = steps[0] == 0 and steps == sorted(set(steps)) and steps[-1] <= checkpoint["global_step"]
        sizes = [size for stretch in found for size in (stretch.rows, stretch.block_size)]
        good = good and all(0 < size < 1 << 31 for size in sizes)
        good = good and all(min(each) > 0 and sum(each) == CYCLE for each in turns)
    except (TypeError, IndexError, ValueError):
        good = False
    if not good:
        raise ConfigError(
            "the checkpoint's record of the rows read is impossible: it is damaged, or of another version of this "
            "project; use another one, or that version"
        )
    return found


def where(stretches: Stretches, checkpoint: Mapping[str, Any], cuts: Mapping[str, list[int]]) -> str:
    """Message: the row with which a run continues; what may come again, also as sources have other `cuts` now."""
    step, before = checkpoint["global_step"], checkpoint["text"].get("cuts", {})
    if (read := rows_before(stretches, step)) == 0 < step:
        return f"step {step + 1} begins with the first row of this text; what other text had, too, may be read again"
    said = f"step {step + 1} continues with row {read + 1} of the order"
    if len({stretch.turns is None for stretch in stretches}) > 1:
        said += "; with and without --data.source_weights the orders differ, so rows may be read again"
    if len({stretch.block_size for stretch in stretches}) > 1:
        said += "; rows of another --data.block_size are in another order, so text may be read again"
    elif other := [name for name, cut in cuts.items() if list(before.get(name, cut)) != cut]:
        said += (
            f"; {few(other)}: in other rows than before, since its text or that of a source beside it has changed, so "
            "text may be read again"
        )
    new = cuts.keys() - before.keys()
    if back := sorted(name for name in new if any(name in (stretch.turns or ()) for stretch in stretches[:-1])):
        said += (
            f"; {few(back)}: back, so it continues after its rows that were read before; if it has changed since then, "
            "text may be read again"
        )
        new -= {*back}
    if new and before.keys() - cuts.keys():
        said += f"; {few(sorted(new))}: new or renamed, so it begins with its first row"
    return said


def with_past(shares: Shares, stretches: Stretches) -> Shares:
    """The shares of the last stretch, together with the earlier ones."""
    past, begin, alike = list[tuple[int, int, dict[str, int]]](), 0, 0
    for before, after in pairwise(stretches):
        if before.turns != after.turns:
            end = rows_before(stretches, after.step)
            if before.turns is None:
                alike += end - begin
            else:
                past.append((begin, end, before.turns))
            begin = end
    return replace(shares, begin=begin, past=tuple(past), alike=alike)
