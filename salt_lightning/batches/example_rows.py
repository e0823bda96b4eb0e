"""Rows of whole fine-tuning examples, with labels only at their responses.

B rows of a batch · T tokens of a row (block_size)
"""

from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from salt_lightning.batches.rows import IGNORE, NO_ROW, Part, Rows
from salt_lightning.errors import ConfigError
from salt_lightning.text.token_files import TokenFiles


def pack(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose which examples share a row of `size` tokens: best fit, longest first, ties in their order; longer ones are
    left out. Returns numbers of examples, row after row, and where each row begins in them (one more than rows)."""
    rows: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(size + 1)]  # rows by the tokens left in them
    spaces: list[int] = []  # sorted: numbers of free tokens that some row has
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        if length > size:
            continue
        if (place := bisect_left(spaces, length)) < len(spaces):
            space = spaces[place]
            row = with_space[space].pop()
            if not with_space[space]:
                del spaces[place]
        else:
            space, row = size, len(rows)
            rows.append([])
        rows[row].append(example)
        if left := space - length:
            if not with_space[left]:
                insort(spaces, left)
            with_space[left].append(row)
    starts = np.cumsum([0, *map(len, rows)])
    return np.array([example for row in rows for example in row], np.int64), starts


class ExampleRows(Rows):
    """Rows of `block_size` tokens that hold whole examples, filled up with EOS without labels.

    An example longer than a row is left out: cut off, it would lose its answer or part of its question.
    """

    def __init__(self, files: TokenFiles, block_size: int, isolate_documents: bool) -> None:
        super().__init__(files, block_size, isolate_documents)
        self._starts = np.concatenate([[0], files.doc_ends[:-1]]) if files.num_documents else files.doc_ends
        lengths = files.doc_ends - self._starts
        self._packed, self._row_starts = pack(lengths, block_size)
        self.num_rows = len(self._row_starts) - 1
        self.num_left_out = files.num_documents - len(self._packed)
        self.size = {"documents": len(self._packed), "tokens": int(lengths[self._packed].sum())}
        self.fill = self.size["tokens"] / max(1, self.num_rows * block_size)
        # An example begins with BOS or its prompt, so every learned token has one before it that predicts it.
        learned = np.add.reduceat(files.learned, self._starts, dtype=np.int64)
        counts = np.concatenate([[0], np.cumsum(learned[self._packed])])
        self._label_counts = np.diff(counts[self._row_starts])

    def length_of(self, share: float) -> int:
        """The least block size that holds this share of all examples."""
        return int(np.quantile(self.files.doc_ends - self._starts, share, method="higher"))

    def label_counts(self, rows: np.ndarray) -> np.ndarray:
        return self._label_counts[rows]

    @property
    def examples(self) -> np.ndarray:
        """Sorted numbers of the examples that are in a row."""
        return np.sort(self._packed)

    def prompt_and_response(self, example: int) -> tuple[list[int], list[int]]:
        """Ids of everything before the last response, and of that response with its EOS."""
        start, stop = self._starts[example], self.files.doc_ends[example]
        asked = np.flatnonzero(self.files.learned[start:stop] == 0)[-1] + 1
        ids = self.files.tokens[start:stop].tolist()
        return ids[:asked], ids[asked:]

    def _parts(self, rows: np.ndarray) -> Iterator[list[Part]]:
        for row in rows.tolist():
            examples = [] if row == NO_ROW else self._packed[self._row_starts[row] : self._row_starts[row + 1]].tolist()
            starts, stops = self._starts[examples], self.files.doc_ends[examples]
            places = np.cumsum([0, *(stops - starts)])
            yield list(zip(places.tolist(), examples, starts.tolist(), stops.tolist(), strict=False))

    def _labels(self, start: int, stop: int) -> np.ndarray:
        tokens, learned = self.files.tokens[start:stop], self.files.learned[start:stop]
        return np.where(learned, tokens.astype(np.int64), IGNORE)


def open_examples(setting: str, files: TokenFiles, block_size: int, isolate_documents: bool) -> ExampleRows:
    """The rows of prepared examples; logs how they are packed, and raises ConfigError if none is left or fits a row."""
    rows = ExampleRows(files, block_size, isolate_documents)
    if not files.num_documents:
        raise ConfigError(
            f"--data.val_fraction: none of the examples in --data.{setting} is left for {files.folder.name}; "
            "change it, or give --data.val_source"
        )
    if not rows.num_rows:
        raise ConfigError(
            f"--data.block_size: none of the {files.num_documents} examples for {files.folder.name} in "
            f"--data.{setting} fits a row of {block_size} tokens; raise it"
        )
    rank_zero_info(
        f"--data.{setting} ({'training' if files.folder.name == 'train' else 'held out'}): {len(rows.examples)} "
        f"examples in {rows.num_rows} rows, {rows.fill:.1%} filled; {rows.num_left_out} are longer than "
        f"--data.block_size {block_size} and left out"
    )
    return rows
