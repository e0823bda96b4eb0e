"""Several sources read in fixed shares, regardless of their length: --data.source_weights.

Like order.py, a pure function of the position; S sources, P turns of a cycle (CYCLE).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from salt_lightning.batches.order import Order, rows_at, scatter, side
from salt_lightning.batches.row_set import RowSet
from salt_lightning.errors import ConfigError, few, refuse

SETTING = "--data.source_weights"
CYCLE = 10_000  # rows in which each source gets its exact share; shares are multiples of 1 / CYCLE
_OTHERS = "--data.source_column", "--data.source_per_file", "--data.examples"


def weight_problems(weights: Sequence[float] | None, entries: Sequence[str], others: Sequence[Any]) -> list[str]:
    """What is wrong with the weights of the entries of --data.source; `others`: the values of _OTHERS."""
    also = [name for name, given in zip(_OTHERS, others, strict=True) if given]
    if weights is None or not entries:  # no source at all is another problem
        return []
    fits = len(weights) == len(entries) and all(0 < w < math.inf for w in weights)
    checks = (
        (fits, f"must be a number above 0 for each of the {len(entries)} entries of --data.source, or null"),
        (len(entries) <= CYCLE, f"supports at most {CYCLE} entries of --data.source"),
        (len(set(entries)) == len(entries), "with an entry of --data.source twice; name it once, with more weight"),
        (not also, f"weights the entries of --data.source; leave out {', '.join(also)}, or the weights (null)"),
    )
    return [f"{SETTING} {weights!r} {wanted}" for good, wanted in checks if not good]


@dataclass(frozen=True)
class Shares:
    """The share of the rows read that comes from each source, regardless of its length.

    A share is a multiple of 1 / CYCLE, and at least that.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]  # above 0, in any unit
    starts: tuple[int, ...]  # the first row of each source, then the number of rows; each source has at least one row
    skipped: tuple[int, ...] = ()  # tokens of each source before its first row: part of a row of the source before it
    begin: int = 0  # the position from which these shares apply
    past: tuple[tuple[int, int, dict[str, int]], ...] = ()  # others before: first position, end, turns of each source
    alike: int = 0  # rows read while there were no shares

    @property
    def rows_S(self) -> np.ndarray:
        """Rows of each source."""
        return np.diff(self.starts)

    @property
    def cuts(self) -> dict[str, list[int]]:
        """What decides the order of each source's text: the tokens skipped, and the number of rows."""
        return dict(zip(self.names, map(list, zip(self.skipped, self.rows_S.tolist(), strict=True)), strict=True))

    @cached_property
    def turns_S(self) -> np.ndarray:
        """Rows of each source in a cycle: at least one, else by largest remainders, exact for the decimals typed."""
        weights = [Fraction(str(weight)) for weight in self.weights]
        unit = CYCLE / sum(weights)
        exact = [unit * weight for weight in weights]
        while min(exact) < 1:
            exact = [max(turns, Fraction(1)) for turns in exact]
            large = sum(turns for turns in exact if turns > 1)
            left = CYCLE - sum(turns == 1 for turns in exact)
            exact = [turns * left / large if turns > 1 else turns for turns in exact]
        turns = [math.floor(turns) for turns in exact]
        for s in sorted(range(len(turns)), key=lambda s: turns[s] - exact[s])[: CYCLE - sum(turns)]:
            turns[s] += 1
        return np.array(turns)

    @property
    def cycle(self) -> tuple[np.ndarray, np.ndarray]:
        """The source of each turn, and the turn's number within that source, from 0."""
        return _cycle(tuple(self.turns_S.tolist()))

    def reads(self, count: int) -> np.ndarray:
        """Rows of each source among the first `count`; counts only positions with shares."""
        by_name = dict.fromkeys(self.names, 0)
        now = dict(zip(self.names, self.turns_S.tolist(), strict=True))
        for begin, end, turns in (*self.past, (self.begin, count, now)):
            cycles, rest = divmod(max(0, min(end, count) - begin), CYCLE)
            sources = _cycle(tuple(turns.values()))[0][:rest]
            rows_S = cycles * np.array([*turns.values()]) + np.bincount(sources, minlength=len(turns))
            by_name |= {name: by_name.get(name, 0) + rows for name, rows in zip(turns, rows_S.tolist(), strict=True)}
        return np.array([by_name[name] for name in self.names])


@cache  # tens of milliseconds, and a start asks several times
def _cycle(turns: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Shares.cycle of sources with these numbers of turns.

    Turn j of n may come from floor(j P / n) on, and must come before ceil((j + 1) P / n). Of the turns that may come,
    the one with the earliest deadline is next: all meet theirs, and no source is ever a whole row ahead or behind (the
    chairman assignment problem, Tijdeman 1980).
    """
    turns_S, done_S = np.array(turns), np.zeros(len(turns), np.int64)
    source_P, number_P = np.empty(CYCLE, np.int64), np.empty(CYCLE, np.int64)
    for turn in range(CYCLE):
        may_S = done_S * CYCLE < (turn + 1) * turns_S
        until_S = -(-(done_S + 1) * CYCLE // turns_S)
        s = int(np.where(may_S, until_S, CYCLE + 1).argmin())
        source_P[turn], number_P[turn] = s, done_S[s]
        done_S[s] += 1
    return source_P, number_P


def shares_of(names: list[str], weights: list[float], tokens: list[int], block_size: int) -> Shares:
    """The shares of sources that lie one after the other in the stream; a row belongs to the source it begins in.

    `tokens`: where each source begins in the stream, then the end of the stream.

    Raises:
        ConfigError: two sources share a name, or one is not longer than a row.
    """
    if len(names) != len(weights):
        raise ConfigError(
            f"{SETTING}: entries of --data.source share a name (distinct ones: {few(names)}); rename a folder"
        )
    sizes = {name: end - start for name, (start, end) in zip(names, pairwise(tokens), strict=True)}
    refuse(
        f"{SETTING}: {name!r} has {size} training tokens (held-out text excluded), not more than one row of "
        f"--data.block_size {block_size}; add text, lower --data.val_fraction, or leave it out"
        for name, size in sizes.items()
        if size <= block_size
    )
    starts = [-(-start // block_size) for start in tokens[:-1]]
    skipped = tuple(row * block_size - start for row, start in zip(starts, tokens[:-1], strict=True))
    num_rows = -(-(tokens[-1] - 1) // block_size)  # as PackedRows.num_rows
    return Shares(tuple(names), tuple(weights), (*starts, num_rows), skipped)


class Mixture:
    """An order that draws from several sources in fixed shares, each source in an order of its own.

    In any run of consecutive rows, each source is less than two rows off its share. A selection chooses by one score
    from all rows; each source reads those of its own, so it does not change the shares. `whole`: the order of all rows
    if there were no shares.
    """

    def __init__(self, shares: Shares, whole: Order) -> None:
        self.shares, self._selects = shares, whole.kept is not None
        self._source_P, self._number_P = shares.cycle
        self._before_S, self._starts_S = shares.reads(shares.begin), np.array(shares.starts[:-1])
        seeds_S = scatter(np.array([whole.seed])) + np.array(list(map(_number, shares.names)), np.uint64)
        self._of_S = np.array([seeds_S, shares.rows_S, [side(int(rows)) for rows in shares.rows_S]], np.uint64)
        self.orders, mask_R = [], None if whole.kept is None else whole.kept.mask_R
        reads_S = shares.reads(whole.phase1)
        for seed, (start, end), reads in zip(seeds_S, pairwise(shares.starts), reads_S, strict=True):
            own = None if mask_R is None else RowSet(mask_R[start:end])
            self.orders.append(Order(int(seed), end - start, own, int(reads), whole.unread_first))

    def __call__(self, position: np.ndarray) -> np.ndarray:
        cycle, turn = np.divmod(position - self.shares.begin, CYCLE)
        source = self._source_P[turn]
        number = self._before_S[source] + cycle * self.shares.turns_S[source] + self._number_P[turn]
        starts = self._starts_S[source]
        if not self._selects:
            return starts + rows_at(number, *self._of_S[:, source])
        rows = np.empty_like(position)
        for s in np.unique(source):
            rows[source == s] = self.orders[s](number[source == s])
        return starts + rows

    @property
    def fingerprint(self) -> str:
        """Hash of the shares, what was read before them, and what phase 1 reads of each source."""
        told = [self.shares.turns_S.tolist(), self.shares.starts, [order.fingerprint for order in self.orders]]
        if self.shares.begin:
            told.append([self.shares.begin, *self._before_S.tolist()])
        return hashlib.blake2b(repr(told).encode(), digest_size=10).hexdigest()


def _number(name: str) -> int:
    """Of a source, for its order: it must not change where the list of sources does."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "little")


def make_order(shares: Shares | None, whole: Order) -> Order | Mixture:
    """The order of a run's rows: all read equally often, unless there are shares."""
    return whole if shares is None else Mixture(shares, whole)
