"""Rows of tokens: cut from the stream, and batched in the order of order.py.

    B rows of a micro-batch · T tokens of a row (block_size) · G rows of an optimizer step

The stream of a split is all its documents, each followed by EOS. Row r reads tokens [rT, (r+1)T) and
predicts the next token of each, but nothing after a document's EOS. Which rows step s reads is a pure
function of (seed, selection, shares, s): there is no state to save, and ranks, workers, accumulation and
a resume do not change it.
"""

import atexit
import multiprocessing
import signal
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from salt_lightning.batches.mixture import Mixture
from salt_lightning.batches.order import Order
from salt_lightning.errors import ConfigError
from salt_lightning.head.row_pass import IGNORE
from salt_lightning.text.processes import end_with_parent, starting
from salt_lightning.text.token_files import TokenFiles, nothing_held_out

Batch = dict[str, np.ndarray]  # int64
NO_ROW = -1  # fills up the last evaluation batch: a row without labels
_COUNTED_TOKENS = 1 << 24

# --- rows ---


Part = tuple[int, int, int, int]  # of a row: place in it, document, and start and stop in the files


class Rows:
    """Rows of one split: documents, or parts of them, filled up with EOS without labels."""

    num_rows: int
    size: dict[str, int]  # documents and tokens in the rows

    def __init__(self, files: TokenFiles, block_size: int, isolate_documents: bool) -> None:
        self.files, self.block_size, self.isolate_documents = files, block_size, isolate_documents

    def label_counts(self, rows: np.ndarray) -> np.ndarray:
        """Labels of each row, without building it."""
        raise NotImplementedError

    def expect(self, rows: np.ndarray) -> None:
        """Has the system read these rows in the background, where that helps."""

    def build(self, rows: np.ndarray) -> Batch:
        """Inputs, labels and positions of these rows, B x T; a NO_ROW is all EOS, without labels."""
        width = self.block_size
        ids_BT = np.full((len(rows), width), self.files.eos_id, np.int64)
        labels_BT = np.full((len(rows), width), IGNORE, np.int64)
        positions_BT = np.tile(np.arange(width), (len(rows), 1))
        for b, parts in enumerate(self._parts(rows)):
            end = 0
            for place, document, start, stop in parts:
                end = place + stop - start
                ids_BT[b, place:end] = self.files.tokens[start:stop]
                labels = self._labels(*self._labelled(document, start, stop))
                labels_BT[b, place : place + len(labels)] = labels
                if self.isolate_documents:
                    positions_BT[b, place:end] = np.arange(end - place)
            if self.isolate_documents:
                positions_BT[b, end:] = np.arange(width - end)
        return {"input_ids": ids_BT, "labels": labels_BT, "positions": positions_BT, "rows": rows}

    def origins(self, batch: Batch) -> Batch:
        """UTF-8 bytes of each label token (0 if ignored), its document and that one's source (-1 if ignored)."""
        labels_BT = batch["labels"]
        bytes_BT, documents_BT = np.zeros_like(labels_BT), np.full_like(labels_BT, -1)
        for b, parts in enumerate(self._parts(batch["rows"])):
            for place, document, start, stop in parts:
                counts = self.files.token_bytes[slice(*self._labelled(document, start, stop))]
                bytes_BT[b, place : place + len(counts)] = counts
                documents_BT[b, place : place + len(counts)] = document
        ignored_BT = labels_BT == IGNORE
        bytes_BT[ignored_BT], documents_BT[ignored_BT] = 0, -1
        sources_BT = np.where(documents_BT < 0, -1, self.files.doc_sources[documents_BT])
        return {"bytes": bytes_BT, "documents": documents_BT, "sources": sources_BT.astype(np.int64)}

    def documents(self, rows: np.ndarray) -> np.ndarray:
        """The documents with a token in these rows, row after row."""
        return np.array([document for parts in self._parts(rows) for _, document, *_ in parts], np.int64)

    def first_documents(self, rows: np.ndarray) -> np.ndarray:
        """The document at the start of each row."""
        return np.array([parts[0][1] for parts in self._parts(rows)])

    def _parts(self, rows: np.ndarray) -> Iterator[list[Part]]:
        """The parts of each row; none of a NO_ROW."""
        raise NotImplementedError

    def _labelled(self, document: int, start: int, stop: int) -> tuple[int, int]:
        """Start and stop in the files of a part's labels, the one place where they are shifted: the next token of each,
        but nothing after a document's EOS, where another document comes."""
        return start + 1, min(stop + 1, int(self.files.doc_ends[document]))

    def _labels(self, start: int, stop: int) -> np.ndarray:
        return self.files.tokens[start:stop]


def text_ids(rows: Rows, row: int) -> list[int]:
    """The row's tokens without the EOS that fill it up or end it."""
    ids_T = rows.build(np.array([row]))["input_ids"][0]
    return ids_T[: len(np.trim_zeros(ids_T - rows.files.eos_id, "b"))].tolist()


def require_text(files: TokenFiles, split: str, block_size: int | None, val_fraction: float) -> None:
    """Raises ConfigError if a split has no text, or too little for a row (`block_size` None: checked elsewhere)."""
    tokens = files.num_tokens
    if split == "train" and block_size and tokens < block_size:
        raise ConfigError(
            f"--data.source: {tokens} training tokens do not fill one row of --data.block_size "
            f"{block_size}; add text or shorten the rows"
        )
    if split == "val" and tokens == 0:
        num_documents = files.manifest["splits"]["train"]["documents"]
        raise nothing_held_out(val_fraction, num_documents)


class PackedRows(Rows):
    """Rows of `block_size` tokens cut from the stream of one split."""

    def __init__(self, files: TokenFiles, block_size: int, isolate_documents: bool) -> None:
        super().__init__(files, block_size, isolate_documents)
        self.size = {"documents": files.num_documents, "tokens": files.num_tokens}
        # The stream's last token is an EOS, which predicts nothing, so it needs no row of its own.
        self.num_rows = -(-(files.num_tokens - 1) // block_size)

    def label_counts(self, rows: np.ndarray) -> np.ndarray:
        """Labels of each row, without building it: its tokens minus the documents that end in it."""
        starts, low, high = self._ends(rows)
        return np.minimum(self.block_size, self.files.num_tokens - starts) - (high - low)

    def expect(self, rows: np.ndarray) -> None:
        self.files.expect(rows * self.block_size, self.block_size + 1)

    def _parts(self, rows: np.ndarray) -> Iterator[list[Part]]:
        for row, start, low, high in zip(*(n.tolist() for n in (rows, *self._ends(rows))), strict=True):
            stop = min(start + self.block_size, self.files.num_tokens)
            cuts = [start, *self.files.doc_ends[low:high].tolist()]
            cuts += [stop] if cuts[-1] < stop else []  # within a document
            parts = [(a - start, low + i, a, b) for i, (a, b) in enumerate(pairwise(cuts))]
            yield [] if row == NO_ROW else parts

    def source_tokens(self, names: list[str]) -> list[int]:
        """Where each source begins in the stream, if they lie one after the other, then the end of the stream."""
        place_S, sources_D = [names.index(name) for name in self.files.manifest["sources"]], self.files.doc_sources
        first = (bisect_left(sources_D, i, key=lambda source: place_S[source]) for i in range(len(names)))
        return [*(int(self.files.doc_ends[d - 1]) if d else 0 for d in first), self.files.num_tokens]

    def _ends(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Start of each row, and the range of documents that end in it, after its start and up to its stop."""
        starts = rows * self.block_size
        low, high = np.searchsorted(self.files.doc_ends, np.stack([starts, starts + self.block_size]), side="right")
        return starts, low, high


_MOST_SAMPLES = 64


def spread(packed: Rows, size: int, labels: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of `size` rows from all over, until they have so many labels, or all rows were in one; rows repeat if
    there are fewer. Packed examples may have a few labels a row."""
    found, count = 0, -(-packed.num_rows // size)
    for first in np.random.default_rng(0).permutation(count)[:_MOST_SAMPLES]:
        batch = packed.build((first + np.arange(size) * count) % packed.num_rows)
        yield as_tensors(batch)
        found += int((batch["labels"] != IGNORE).sum())
        if found >= labels:
            return


def counts_nll(tokens: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean -log p of labels in nats, where p is the frequency of a token in a stream; ignored labels do not count."""
    labels = labels_N[labels_N != IGNORE]
    counts_V = np.bincount(tokens[:_COUNTED_TOKENS], minlength=int(labels.max()) + 1)
    counts_V += 1  # a token that has not occurred yet may still do so
    return float(-np.log(counts_V[labels] / counts_V.sum()).mean())


# --- batches (as arrays, which come from worker processes several times faster than tensors) ---


class TrainBatches(Dataset):
    """Micro-batch i of one rank, counted over the whole run: step i // accumulate, part i % accumulate.

    `before`: number of rows read before a step.
    """

    def __init__(
        self,
        packed: Rows,
        order: Order | Mixture,
        sizes: tuple[int, int],
        place: tuple[int, int],
        before: Callable[[int], int],
    ) -> None:
        self.packed, self.order = packed, order
        self.before = before
        self.global_batch, self.micro_batch = sizes
        self.rank, self.world = place
        self.accumulate = self.global_batch // (self.micro_batch * self.world)
        self._step = (-1, np.zeros(0, np.int64), np.zeros((), np.int64))  # the last one asked for
        self._next = (-1, np.zeros(0, np.int64))  # the one after it

    def __getitem__(self, index: int) -> Batch:
        step, part = divmod(index, self.accumulate)
        if step != self._step[0]:
            rows = self._next[1] if step == self._next[0] else self._rows(step)
            if get_worker_info() is None:  # workers are ahead of the step anyway
                self._next = (step + 1, self._rows(step + 1))
            self._step = (step, rows, np.array(self.packed.label_counts(rows).sum()))
        _, rows, step_tokens = self._step
        first = (part * self.world + self.rank) * self.micro_batch
        return {**self.packed.build(rows[first : first + self.micro_batch]), "step_tokens": step_tokens}

    def _rows(self, step: int) -> np.ndarray:
        """All rows of a step; those of this rank are read from now on, so that they are there when they are built."""
        rows = self.order(self.before(step) + np.arange(self.global_batch))
        self.packed.expect(rows.reshape(self.accumulate, self.world, self.micro_batch)[:, self.rank].ravel())
        return rows


class EvalBatches(Dataset):
    """Rows in order, every world-th for this rank; all batches have the same shape, all ranks the same number.

    With `thirds_D` (the third of each document), batches contain the third of each label.
    """

    def __init__(
        self,
        packed: Rows,
        rows: np.ndarray,
        micro_batch: int,
        place: tuple[int, int],
        thirds_D: np.ndarray | None = None,
    ) -> None:
        rank, world = place
        self.packed, self.thirds_D = packed, thirds_D
        num_batches = -(-len(rows) // (micro_batch * world))
        filled = np.full(num_batches * micro_batch * world, NO_ROW, np.int64)
        filled[: len(rows)] = rows
        self.rows_NB = filled[rank::world].reshape(num_batches, micro_batch)

    def __len__(self) -> int:
        return len(self.rows_NB)

    def __getitem__(self, index: int) -> Batch:
        batch = self.packed.build(self.rows_NB[index])
        batch |= self.packed.origins(batch)
        if self.thirds_D is not None:
            batch["thirds"] = np.where(batch["documents"] < 0, -1, self.thirds_D[batch["documents"]])
        return batch


class ShardBatches(Dataset):
    """Rows of whole shards in order, for scoring: shard s holds rows [s * size, (s + 1) * size).

    No batch spans two shards: the last one of a shard is filled up with NO_ROW. Each rank scores with a whole teacher
    and waits for no other, so it has only the batches of its own shards. If it has none and others have some
    (`company`), it gets one batch without rows, since Lightning refuses a rank without batches.
    """

    def __init__(self, packed: Rows, shards: list[int], sizes: tuple[int, int], company: bool = False) -> None:
        self.packed, (self.shard_rows, self.micro_batch) = packed, sizes
        starts = (np.array([shard, shard + 1]) * self.shard_rows for shard in shards)
        firsts = [np.arange(start, min(stop, packed.num_rows), self.micro_batch) for start, stop in starts]
        if company and not firsts:
            firsts = [np.array([packed.num_rows])]
        self.firsts = np.concatenate([np.zeros(0, np.int64), *firsts])  # the first row of each batch

    def __len__(self) -> int:
        return len(self.firsts)

    def __getitem__(self, index: int) -> Batch:
        first = self.firsts[index]
        rows = first + np.arange(self.micro_batch)
        stop = min((first // self.shard_rows + 1) * self.shard_rows, self.packed.num_rows)
        return self.packed.build(np.where(rows < stop, rows, NO_ROW))


Batches = TrainBatches | EvalBatches | ShardBatches


# --- loading ---


def document_borders(positions_BT: np.ndarray) -> np.ndarray:
    """Where documents begin in the concatenated rows, then the end, int32. Each row's start counts as a beginning."""
    begins_BT = positions_BT == 0
    begins_BT[:, 0] = True
    return np.append(np.flatnonzero(begins_BT), positions_BT.size).astype(np.int32)


def as_tensors(arrays: Batch) -> dict[str, torch.Tensor]:
    """A batch for the models; adds `cu_seqlens`, which cannot be computed on a GPU without a synchronization."""
    arrays = {**arrays, "cu_seqlens": document_borders(arrays["positions"])}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Loader:
    """Batches from number `start()` on, as tensors; counts the seconds that training waited for them.

    It is not a DataLoader: Lightning re-creates those with its own samplers, but leaves other iterables
    alone, whatever trainer.use_distributed_sampler says.
    """

    def __init__(self, batches: Batches, length: int, start: Callable[[], int], pin_memory: bool = False) -> None:
        self.batches, self.length, self.start, self.pin_memory = batches, length, start, pin_memory
        self.num_workers = 0
        self.wait_s = 0.0
        # Of this name, so that Lightning ends its workers, also after an error. The garbage collector would close their
        # queues first, so that they would hear of no end, wait 5 s for each, and leave it.
        self._iterator: Any = None

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        began = time.perf_counter()
        self._iterator = self._arrays(range(self.start(), self.length))
        for arrays in self._iterator:
            batch = as_tensors(arrays)
            if self.pin_memory:
                batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
            self.wait_s += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    def _arrays(self, indices: range) -> Iterator[Batch]:
        if not self.num_workers:
            return map(self.batches.__getitem__, indices)
        # A separate generator: DataLoader would draw from the global one, before the model does.
        loader = DataLoader(
            self.batches,
            batch_size=None,
            sampler=indices,
            num_workers=self.num_workers,
            multiprocessing_context=_start_method(),
            collate_fn=_as_is,
            worker_init_fn=_leave_signals_to_the_parent,
            generator=torch.Generator(),
        )
        with starting("--data.num_workers", none=0):
            # without /dev/shm this fails, and the loader would leave a half-built iterator, which prints a traceback
            multiprocessing.get_context(_start_method()).Queue().close()
            iterator: Any = iter(loader)
        _WORKERS.update(iterator._workers)
        return iterator

    def state_dict(self) -> dict[str, Any]:
        """Empty: the position follows from the step. Lightning warns about loaders without this method."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def _start_method() -> str | None:
    """On Linux "fork", in place of Python's own default: 3.14's imports everything anew in each worker, and runs a
    user's script that has no guard. None: what the user has set. A spawned process has "spawn" set for it."""
    own, spawned = multiprocessing.get_all_start_methods()[0], multiprocessing.parent_process() is not None
    chosen = multiprocessing.get_start_method(allow_none=True) or own
    return "fork" if sys.platform == "linux" and (spawned or chosen == own) else None


_WORKERS: WeakSet = WeakSet()


@atexit.register
def _end_workers() -> None:
    """Kill workers that are left after an error: they ignore the signal with which multiprocessing would end them."""
    if _WORKERS and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise, in the middle of another exit
    for worker in _WORKERS:
        worker.kill()


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignore Ctrl-C and a cluster's signals, which reach all processes: the parent still needs its step's batches."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()  # a killed parent cannot end us


def _as_is(batch: Any) -> Any:
    return batch
