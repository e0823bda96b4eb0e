"""A subset of many rows as one bit per row: a list of row numbers would take 8 bytes each, in every process."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np

_BLOCK_BYTES = 16  # each block also stores how many rows come before it: another half bit per row
_BLOCK_ROWS = 8 * _BLOCK_BYTES
_CHUNK_BLOCKS = 1 << 11  # unpacked at a time, to bound memory


class RowSet:
    """A set of rows out of `0 .. num_rows - 1`: those for which `mask_R` is true."""

    def __init__(self, mask_R: np.ndarray) -> None:
        self.num_rows = len(mask_R)
        packed = np.packbits(mask_R)
        self._bits = np.zeros((-(-len(packed) // _BLOCK_BYTES), _BLOCK_BYTES), np.uint8)
        self._bits.reshape(-1)[: len(packed)] = packed
        counts = np.concatenate([[0], *(np.unpackbits(part, axis=1).sum(1) for part in self._parts())])
        self._before = np.cumsum(counts, dtype=np.int64)  # rows of the set before each block

    def __len__(self) -> int:
        return int(self._before[-1])

    @property
    def mask_R(self) -> np.ndarray:
        return np.unpackbits(self._bits.reshape(-1), count=self.num_rows).view(bool)

    def chunks(self) -> Iterator[np.ndarray]:
        """The row numbers in ascending order, int64, in chunks."""
        for i, part in enumerate(self._parts()):
            yield np.flatnonzero(np.unpackbits(part)) + i * _CHUNK_BLOCKS * _BLOCK_ROWS

    def nth(self, number: np.ndarray) -> np.ndarray:
        """The `number`-th (from 0) of the rows in the set."""
        return _find(self._bits, self._before, number)

    def nth_other(self, number: np.ndarray) -> np.ndarray:
        """The `number`-th (from 0) of the rows not in the set."""
        return _find(self._bits, self._others_before, number, flip=True)

    @cached_property
    def _others_before(self) -> np.ndarray:
        return np.arange(len(self._before)) * _BLOCK_ROWS - self._before

    def _parts(self) -> Iterator[np.ndarray]:
        return (self._bits[i : i + _CHUNK_BLOCKS] for i in range(0, len(self._bits), _CHUNK_BLOCKS))


def _find(bits: np.ndarray, before: np.ndarray, number: np.ndarray, flip: bool = False) -> np.ndarray:
    """The position of the `number`-th set bit, or with `flip` of the `number`-th bit that is not set."""
    block = np.searchsorted(before, number, side="right") - 1
    bits_NB = np.unpackbits(~bits[block] if flip else bits[block], axis=1)
    nth_N1 = (number - before[block])[:, None]
    return block * _BLOCK_ROWS + np.argmax(np.cumsum(bits_NB, axis=1, dtype=np.uint8) > nth_N1, axis=1)
