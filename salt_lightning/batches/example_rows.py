"""Rows of whole fine-tuning examples, with labels only at their responses.

B rows of a batch · T tokens of a row (block_size)
"""

from bisect import bisect_left, insort

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from salt_lightning.batches.rows import IGNORE, NO_ROW, Batch, with_sources
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


class ExampleRows:
    """Rows of `block_size` tokens that hold whole examples, filled up with EOS without labels.

    An example longer than a row is left out: cut off, it would lose its answer or part of its question.
    """

    def __init__(self, files: TokenFiles, block_size: int, isolate_documents: bool) -> None:
        self.files, self.block_size, self.isolate_documents = files, block_size, isolate_documents
        self._starts = np.concatenate([[0], files.doc_ends[:-1]]) if files.num_documents else files.doc_ends
        lengths = files.doc_ends - self._starts
        self._packed, self._row_starts = pack(lengths, block_size)
        self.num_rows = len(self._row_starts) - 1
        self.num_left_out = files.num_documents - len(self._packed)
        self.size = {"documents": len(self._packed), "tokens": int(lengths[self._packed].sum())}  # in the rows
        self.fill = self.size["tokens"] / max(1, self.num_rows * block_size)
        # An example begins with BOS or its prompt, so every learned token has one before it that predicts it.
        learned = np.add.reduceat(files.learned, self._starts, dtype=np.int64)
        counts = np.concatenate([[0], np.cumsum(learned[self._packed])])
        self._label_counts = np.diff(counts[self._row_starts])

    def length_of(self, share: float) -> int:
        """The least block size that holds this share of all examples."""
        return int(np.quantile(self.files.doc_ends - self._starts, share, method="higher"))

    def documents(self, rows: np.ndarray) -> np.ndarray:
        """The examples in these rows."""
        parts = (self._packed[self._row_starts[row] : self._row_starts[row + 1]] for row in rows)
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def label_counts(self, rows: np.ndarray) -> np.ndarray:
        """Labels of each row."""
        return self._label_counts[rows]

    def expect(self, rows: np.ndarray) -> None:
        """Nothing: examples are few, and soon in memory."""

    def build(self, rows: np.ndarray) -> Batch:
        """Inputs, labels and positions of these rows, B x T; a NO_ROW is all EOS, without labels."""
        width = self.block_size
        ids_BT = np.full((len(rows), width), self.files.eos_id, np.int64)
        labels_BT = np.full((len(rows), width), IGNORE, np.int64)
        positions_BT = np.tile(np.arange(width), (len(rows), 1))
        for b, row in enumerate(rows):
            end = 0
            for place, start, stop in self._places(row):
                end = place + stop - start
                tokens, learned = self.files.tokens[start:stop], self.files.learned[start:stop]
                ids_BT[b, place:end] = tokens
                labels_BT[b, place : end - 1] = np.where(learned[1:], tokens[1:].astype(np.int64), IGNORE)
                if self.isolate_documents:
                    positions_BT[b, place:end] = np.arange(end - place)
            if self.isolate_documents:
                positions_BT[b, end:] = np.arange(width - end)
        return {"input_ids": ids_BT, "labels": labels_BT, "positions": positions_BT, "rows": rows}

    def origins(self, batch: Batch) -> Batch:
        """UTF-8 bytes of each label token (0 if ignored), its example and that one's source (-1 if ignored)."""
        labels_BT = batch["labels"]
        bytes_BT, documents_BT = np.zeros_like(labels_BT), np.full_like(labels_BT, -1)
        for b, row in enumerate(batch["rows"]):
            for place, start, stop in self._places(row):
                end = place + stop - start - 1
                bytes_BT[b, place:end] = self.files.token_bytes[start + 1 : stop]
                documents_BT[b, place:end] = np.searchsorted(self._starts, start)
        return with_sources(self.files, labels_BT, bytes_BT, documents_BT)

    def first_documents(self, rows: np.ndarray) -> np.ndarray:
        """The example at the start of each row."""
        return self._packed[self._row_starts[rows]]

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

    def _places(self, row: int) -> list[tuple[int, int, int]]:
        """(place in the row, start and stop in the files) of each example in a row."""
        if row == NO_ROW:
            return []
        examples = self._packed[self._row_starts[row] : self._row_starts[row + 1]]
        starts, stops = self._starts[examples], self.files.doc_ends[examples]
        places = np.cumsum([0, *(stops - starts)])[:-1]
        return list(zip(places.tolist(), starts.tolist(), stops.tolist(), strict=True))


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
