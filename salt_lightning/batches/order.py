"""The row at each position of a run: a pure function of position, seed and selection.

There is no list of rows in memory and no state to save.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from salt_lightning.batches.row_set import RowSet

_ROUNDS = 8
_AT_ONCE = 1 << 16  # positions at a time, to bound memory


def row_at(position: np.ndarray, seed: int, num_rows: int) -> np.ndarray:
    """The row at each position of the endless training order: every pass is a new permutation of all rows.

    A Feistel network over pairs (left, right) of numbers below ceil(sqrt(num_rows)) permutes a square of at
    least num_rows cells; cells past the end are sent through again until they land inside (cycle walking).
    So 10^9 rows need no memory. Positions (int64) count over the whole run: pass = position // num_rows.
    """
    return rows_at(position, *(np.full(position.shape, n, np.uint64) for n in (seed, num_rows, side(num_rows))))


def side(num_rows: int) -> int:
    """Of the square in `row_at`."""
    return math.isqrt(num_rows - 1) + 1


def rows_at(position: np.ndarray, seeds: np.ndarray, num_rows: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """`row_at` where each position (int64) is of an order of its own (uint64)."""
    number, cell = np.divmod(position.astype(np.uint64), num_rows)
    keys = _mix(_mix(seeds) + number)
    todo = np.ones(cell.shape, bool)
    while todo.any():
        cell[todo] = _feistel(cell[todo], keys[todo], sides[todo])
        todo = cell >= num_rows
    return cell.astype(np.int64)


def _feistel(cell: np.ndarray, keys: np.ndarray, sides: np.ndarray) -> np.ndarray:
    left, right = np.divmod(cell, sides)
    for number in range(_ROUNDS):
        left, right = right, (left + _mix(keys + right + np.uint64(number << 56)) % sides) % sides
    return left * sides + right


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele et al. 2014): every input bit reaches every output bit; uint64 wraps around."""
    mixed: Any = values + np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@dataclass(frozen=True, eq=False)
class Order:
    """The row at each position of the run: a pure function, independent of what was read before.

    Without `kept`, every pass is a permutation of all rows. With it (SALT_DS, arXiv 2410.18779), the first
    `phase1` positions read passes over `kept` only, later ones read all rows. `unread_first`: rows that phase 1
    has read come back only after all others; otherwise phase 2 reads at each position what a run without selection
    reads there.
    """

    seed: int
    num_rows: int  # of the training split
    kept: RowSet | None = None  # by a selection; one bit per training row, and as much again for `unread_first`
    phase1: int = 0  # positions (rows read) in phase 1
    unread_first: bool = True

    def __call__(self, position: np.ndarray) -> np.ndarray:
        if self.kept is None:
            return row_at(position, self.seed, self.num_rows)
        rows, selected = np.empty_like(position), position < self.phase1
        if selected.any():
            rows[selected] = self.kept.nth(row_at(position[selected], self.seed, len(self.kept)))
        rows[~selected] = self._of_all(position[~selected])
        return rows

    def _of_all(self, position: np.ndarray) -> np.ndarray:
        """The rows of phase 2."""
        if not self.unread_first:
            return row_at(position, self.seed, self.num_rows)
        position, num_unread = position - self.phase1, self.num_unread
        rows, unread = np.empty_like(position), position < num_unread
        if unread.any():
            rows[unread] = self._read.nth_other(row_at(position[unread], self.seed, num_unread))
        rows[~unread] = row_at(position[~unread] - num_unread, self.seed, self.num_rows)
        return rows

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what phase 1 reads and how phase 2 continues; "none" without a selection."""
        if self.kept is None:
            return "none"
        hashed = hashlib.blake2b(digest_size=10)
        for rows in self.kept.chunks():
            hashed.update(rows.tobytes())
        hashed.update(f"{self.phase1} {self.unread_first}".encode())
        return hashed.hexdigest()

    @property
    def num_unread(self) -> int:
        """Number of rows that phase 1 does not read."""
        return self.num_rows - len(self._read)

    @property
    def repeats(self) -> float:
        """How often phase 1 reads a kept row on average."""
        assert self.kept is not None
        return self.phase1 / len(self.kept) if len(self.kept) else math.inf if self.phase1 else 0.0

    @cached_property
    def _read(self) -> RowSet:
        """The rows that phase 1 reads. Cached, since this takes seconds for many rows."""
        assert self.kept is not None
        if self.phase1 >= len(self.kept):
            return self.kept
        chosen = np.zeros(len(self.kept), bool)
        for first in range(0, self.phase1, _AT_ONCE):
            positions = np.arange(first, min(first + _AT_ONCE, self.phase1))
            chosen[row_at(positions, self.seed, len(self.kept))] = True
        read_R = self.kept.mask_R
        read_R[self.kept.mask_R] = chosen
        return RowSet(read_R)


def scatter(numbers: np.ndarray) -> np.ndarray:
    """A fixed pseudorandom uint64 for each number, all distinct."""
    return _mix(numbers.astype(np.uint64))
