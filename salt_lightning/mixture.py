"""Several sources read in fixed shares, however long they are: --data.source_weights.

A pure function of the position, as order.py; S sources, P turns of a cycle.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from salt_lightning.errors import refuse
from salt_lightning.order import Order, scatter

SETTING = "--data.source_weights"
CYCLE = 10_000  # rows in which each source has its share to the row; a share is as fine as that


def problems(weights: Sequence[float] | None, entries: Sequence[str], others: bool) -> list[str]:
    """What is wrong with the weights of the entries of a source setting; others: sources are something else."""
    if weights is None:
        return []
    fits = len(weights) == len(entries) and all(0 < weight < math.inf for weight in weights)
    checks = (
        (fits, f"must be a number above 0 for each of the {len(entries)} entries of --data.source"),
        (len(set(entries)) == len(entries), "and an entry of --data.source twice: name it once, with more weight"),
        (not others, "is of the entries of --data.source: leave out --data.source_column, source_per_file, examples"),
    )
    return [f"{SETTING} {weights!r} {wanted}" for good, wanted in checks if not good]


@dataclass(frozen=True)
class Shares:
    """How much of what is read comes from each source, however long it is.

    Args:
        names: of the sources.
        weights: above 0, in any unit.
        starts: the first row of each source, and last the number of rows.

    Raises:
        ConfigError: a source without a row.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    starts: tuple[int, ...]

    def __post_init__(self) -> None:
        empty = [name for name, rows in zip(self.names, self.rows_S, strict=True) if not rows]
        refuse(f"{SETTING}: no training row begins in {name!r}; give more text, or leave it out" for name in empty)

    @property
    def rows_S(self) -> np.ndarray:
        """Rows of each source."""
        return np.diff(self.starts)

    @cached_property
    def turns_S(self) -> np.ndarray:
        """Rows of each source in a cycle: at least one, else by largest remainders."""
        exact_S = np.array(self.weights) / math.fsum(self.weights) * CYCLE
        while (exact_S < 1).any():
            exact_S = np.maximum(exact_S, 1)
            large_S = exact_S > 1
            exact_S[large_S] *= (CYCLE - (~large_S).sum()) / exact_S[large_S].sum()
        turns_S = np.floor(exact_S).astype(np.int64)
        turns_S[np.argsort(turns_S - exact_S, kind="stable")[: CYCLE - turns_S.sum()]] += 1
        return turns_S


class Mixture:
    """An order that draws from several sources in fixed shares, from each in an order of its own.

    Every source comes round at even distances, so that each optimizer step has its share, to within a few rows.
    A selection's rows are read source by source, so it leaves the shares as they are. Arguments as of `Order`.
    """

    def __init__(
        self,
        shares: Shares,
        seed: int,
        kept: np.ndarray | None = None,
        phase1: int = 0,
        unread_first: bool = True,
    ) -> None:
        self.shares = shares
        turns_S = shares.turns_S
        # of turn j of n the middle lies at (j + 1/2) / n of the cycle
        place_P = np.concatenate([(np.arange(n) + 0.5) / n for n in turns_S])
        turn_P = np.argsort(place_P, kind="stable")
        self._source_P = np.repeat(np.arange(len(turns_S)), turns_S)[turn_P]
        self._number_P = np.concatenate([np.arange(n) for n in turns_S])[turn_P]
        seeds_S = scatter(np.array([seed])) + np.arange(1, len(turns_S) + 1, dtype=np.uint64)
        self._orders = []
        for s, (start, end) in enumerate(pairwise(shares.starts)):
            own = None if kept is None else kept[np.searchsorted(kept, start) : np.searchsorted(kept, end)] - start
            reads = int(self.reads(phase1)[s])
            self._orders.append(Order(int(seeds_S[s]), end - start, own, reads, unread_first))

    def __call__(self, position: np.ndarray) -> np.ndarray:
        cycle, turn = np.divmod(position, CYCLE)
        source = self._source_P[turn]
        rows = np.empty_like(position)
        for s in np.unique(source):
            of_s = source == s
            number = cycle[of_s] * self.shares.turns_S[s] + self._number_P[turn[of_s]]
            rows[of_s] = self.shares.starts[s] + self._orders[s](number)
        return rows

    def reads(self, count: int) -> np.ndarray:
        """Rows of each source among the first `count`."""
        cycles, turns = divmod(count, CYCLE)
        turns_S = self.shares.turns_S
        return cycles * turns_S + np.bincount(self._source_P[:turns], minlength=len(turns_S))

    @property
    def fingerprint(self) -> str:
        """Hash of the shares, and of what phase 1 reads of each source."""
        told = [self.shares.turns_S.tolist(), self.shares.starts, [order.fingerprint for order in self._orders]]
        return hashlib.blake2b(repr(told).encode(), digest_size=10).hexdigest()

    @property
    def num_unread(self) -> int:
        """How many rows phase 1 does not read."""
        return sum(order.num_unread for order in self._orders)

    @property
    def repeats(self) -> dict[str, float]:
        """How often phase 1 reads a kept row of each source on average."""
        return {name: order.repeats[""] for name, order in zip(self.shares.names, self._orders, strict=True)}


def make_order(
    shares: Shares | None,
    seed: int,
    num_rows: int,
    kept: np.ndarray | None = None,
    phase1: int = 0,
    unread_first: bool = True,
) -> Order | Mixture:
    """The order of a run's rows, all read alike unless there are shares."""
    if shares is None:
        return Order(seed, num_rows, kept, phase1, unread_first)
    return Mixture(shares, seed, kept, phase1, unread_first)
