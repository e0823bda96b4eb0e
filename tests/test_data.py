"""Rows, their order, the loaders, and the data module in a trainer."""

import ast
import ctypes
import errno
import gc
import json
import logging
import mmap
import multiprocessing
import os
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from reference import packed_rows

from salt_lightning import preflight
from salt_lightning.batches.order import Order, row_at
from salt_lightning.batches.rows import (
    IGNORE,
    NO_ROW,
    EvalBatches,
    Loader,
    PackedRows,
    ShardBatches,
    TrainBatches,
    _start_method,
    text_ids,
)
from salt_lightning.data import SALTDataModule
from salt_lightning.errors import ConfigError
from salt_lightning.fit.cadence import accumulation
from salt_lightning.selection import KeepRule
from salt_lightning.text.token_files import Block, SplitWriter, TokenFiles, no_counts, sealed
from salt_lightning.text.tokenizer import num_ids, tokenizer_fingerprint

EOS = 0


# --- order ---


@settings(max_examples=60)
@given(num_rows=st.integers(1, 700), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**20))
def test_every_epoch_is_a_permutation(num_rows, seed, epoch):
    rows = row_at(epoch * num_rows + np.arange(num_rows), seed, num_rows)
    assert sorted(rows.tolist()) == list(range(num_rows))


def test_order_is_the_same_for_ever():
    # Golden values: a change reorders every resumed run. Change them only with a new major version.
    assert row_at(np.arange(8), 0, 10).tolist() == [6, 1, 3, 0, 2, 5, 9, 8]
    far = row_at(np.array([0, 1, 2, 10**9, 10**15]), 7, 10**9).tolist()
    assert far == [29034874, 490811151, 799699231, 950846372, 147046970]


def test_order_differs_by_epoch_and_seed():
    first = row_at(np.arange(100), 3, 100)
    assert (first != row_at(100 + np.arange(100), 3, 100)).mean() > 0.9
    assert (first != row_at(np.arange(100), 4, 100)).mean() > 0.9
    both = row_at(np.arange(50, 150), 3, 100)  # a step may span two epochs
    assert both[:50].tolist() == first[50:].tolist()


def test_order_mixes():
    n = 10_007
    rows = row_at(np.arange(n), 1, n)
    # For a random permutation: correlation with the position 0 +- 1/sqrt(n), distance between neighbors
    # n/3 +- n/sqrt(18 n).
    assert abs(np.corrcoef(np.arange(n), rows)[0, 1]) < 4 / np.sqrt(n)
    assert abs(np.abs(np.diff(rows)).mean() - n / 3) < 4 * n / np.sqrt(18 * n)
    # For one position, the row over many epochs is uniform: chi-squared with 99 degrees of freedom, 5 sigma.
    row = row_at(np.arange(0, 20_000 * 100, 100), 1, 100)
    chi = ((np.bincount(row, minlength=100) - 200) ** 2 / 200).sum()
    assert abs(chi - 99) < 5 * np.sqrt(2 * 99)


def test_order_of_a_billion_rows_costs_nothing():
    rows = row_at(np.arange(10**12, 10**12 + 4096), 0, 10**9)
    assert len(set(rows.tolist())) > 4090
    assert rows.min() >= 0
    assert rows.max() < 10**9


# --- rows ---


def token_files(folder: Path, docs: list[list[int]], byte_counts=None, sources=None) -> TokenFiles:
    """A prepared folder with these documents (EOS added) as validation split."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = SplitWriter(folder / "val", "uint16", no_counts())
    byte_counts = byte_counts or [[1] * len(doc) for doc in docs]
    ids = [np.array([*doc, EOS], np.uint16) for doc in docs]
    counts = [np.array([*count, 0], np.int32) for count in byte_counts]
    lengths = np.array([len(doc) for doc in ids])
    lots = np.zeros(len(docs))
    writer.add(Block(np.concatenate(ids), lengths, [], lots, np.concatenate(counts)), sources or [0] * len(docs))
    writer.close()
    manifest = {"dtype": "uint16", "tokenizer": {"eos_id": EOS}, "sources": ["a", "b", "c"]}
    (folder / "manifest.json").write_text(json.dumps(sealed({**manifest, "splits": {"val": writer.entry()}})))
    return TokenFiles(folder, "val")


def test_packing_by_hand(tmp_path):
    packed = PackedRows(token_files(tmp_path, [[11, 12], [13, 14, 15], [16]]), 4, True)
    # stream: 11 12 E | 13 14 15 E | 16 E
    batch = packed.build(np.arange(2))
    assert packed.num_rows == 2  # the ninth token, an EOS, needs no row
    assert batch["input_ids"].tolist() == [[11, 12, EOS, 13], [14, 15, EOS, 16]]
    assert batch["labels"].tolist() == [[12, EOS, IGNORE, 14], [15, EOS, IGNORE, EOS]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]
    assert packed.label_counts(np.arange(2)).tolist() == [3, 3]
    wide = PackedRows(packed.files, 5, False)
    batch = wide.build(np.array([1, NO_ROW]))
    assert batch["input_ids"].tolist() == [[15, EOS, 16, EOS, EOS], [EOS] * 5]
    assert batch["labels"].tolist() == [[EOS, IGNORE, EOS, IGNORE, IGNORE], [IGNORE] * 5]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert [text_ids(packed, 1), text_ids(wide, 1)] == [[14, 15, EOS, 16], [15, EOS, 16]]  # without what fills it up


@settings(max_examples=80)
@given(data=st.data(), width=st.integers(2, 12), isolate=st.booleans())
def test_rows_against_the_definition(data, width, isolate, tmp_path_factory):
    docs = data.draw(st.lists(st.lists(st.integers(1, 60_000), min_size=1, max_size=20), min_size=1, max_size=12))
    counts = [[data.draw(st.integers(0, 300)) for _ in doc] for doc in docs]
    sources = [data.draw(st.integers(0, 2)) for _ in docs]
    packed = PackedRows(token_files(tmp_path_factory.mktemp("rows") / "x", docs, counts, sources), width, isolate)
    expected = packed_rows(docs, counts, sources, width, isolate, EOS)
    assert packed.num_rows == len(expected)
    rows = np.arange(packed.num_rows)[::-1].copy()
    batch = packed.build(rows)
    batch |= packed.origins(batch)
    for name in expected[0]:
        assert batch[name].tolist() == [expected[row][name] for row in rows], name
        assert batch[name].dtype == np.int64
    assert packed.label_counts(rows).tolist() == (batch["labels"] != IGNORE).sum(1).tolist()


def some_rows(folder: Path, num_rows: int = 37, width: int = 8) -> PackedRows:
    rng = np.random.default_rng(0)
    docs = [rng.integers(1, 500, size).tolist() for size in rng.integers(1, 20, 200)]
    packed = PackedRows(token_files(folder, docs), width, True)
    packed.num_rows = num_rows  # a prime, so that no size divides it
    return packed


@pytest.mark.parametrize(("world", "accumulate"), [(w, a) for w in (1, 2, 4) for a in (1, 2, 4)])
def test_a_step_reads_the_same_rows_for_any_ranks_and_accumulation(world, accumulate, tmp_path):
    packed, size = some_rows(tmp_path), 16
    whole = TrainBatches(packed, Order(5, packed.num_rows), (size, size), (0, 1), size.__mul__)
    micro = size // (world * accumulate)
    ranks = [
        TrainBatches(packed, Order(5, packed.num_rows), (size, micro), (rank, world), size.__mul__)
        for rank in range(world)
    ]
    assert {rank.accumulate for rank in ranks} == {accumulate}
    for step in range(6):  # 96 positions: two and a half epochs
        parts = [rank[step * accumulate + m] for m in range(accumulate) for rank in ranks]
        rows = np.concatenate([part["rows"] for part in parts])
        assert rows.tolist() == whole[step]["rows"].tolist()
        assert {len(part["rows"]) for part in parts} == {micro}
        labels = sum((part["labels"] != IGNORE).sum() for part in parts)
        assert {int(part["step_tokens"]) for part in parts} == {labels}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_reads_every_row_once_in_batches_of_one_shape(world, tmp_path):
    packed = some_rows(tmp_path)
    ranks = [EvalBatches(packed, np.arange(37), 4, (rank, world)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    batches = [rank[i] for rank in ranks for i in range(len(rank))]
    assert {batch["labels"].shape for batch in batches} == {(4, 8)}
    seen = np.concatenate([batch["rows"] for batch in batches])
    assert sorted(seen[seen != NO_ROW].tolist()) == list(range(37))
    assert ranks[-1][0]["rows"][:2].tolist() == [world - 1, 2 * world - 1]
    for batch in batches:
        assert (batch["labels"][batch["rows"] == NO_ROW] == IGNORE).all()
        assert (batch["bytes"][batch["labels"] == IGNORE] == 0).all()


def test_the_documents_of_rows_are_those_of_their_tokens(tmp_path):
    packed = some_rows(tmp_path)
    owner_N = np.repeat(np.arange(packed.files.num_documents), np.diff(packed.files.doc_ends, prepend=0))
    width = packed.block_size
    for rows in (np.array([r]) for r in range(packed.num_rows)):
        assert packed.documents(rows).tolist() == sorted({*owner_N[rows[0] * width : (rows[0] + 1) * width].tolist()})
    assert packed.documents(np.array([], np.int64)).tolist() == []
    assert packed.first_documents(every := np.arange(packed.num_rows)).tolist() == owner_N[every * width].tolist()


@pytest.mark.parametrize("micro", [1, 4, 5, 11])
def test_shards_are_read_whole_whatever_the_batch(micro, tmp_path):
    """37 rows in shards of 10: the last has 7 rows and no batch beyond them. Without shards there is an empty batch."""
    packed = some_rows(tmp_path)
    packed.num_rows = 37
    for shards, rows in (([1, 3], [*range(10, 20), *range(30, 37)]), ([2], list(range(20, 30))), ([], [])):
        batches = ShardBatches(packed, shards, (10, micro), company=True)
        assert len(batches) == max(1, sum(-(-(7 if shard == 3 else 10) // micro) for shard in shards))
        seen = [batches[i]["rows"] for i in range(len(batches))]
        assert {len(batch) for batch in seen} == {micro}
        assert [row for batch in seen for row in batch if row != NO_ROW] == rows
        if len(shards) == 2:
            assert seen[-(-10 // micro)][0] == 30  # no batch spans two shards
    assert len(ShardBatches(packed, [], (10, micro))) == 0


def test_token_files_that_cannot_be_mapped_are_named(tmp_path, monkeypatch):
    files = token_files(tmp_path, [[1, 2, 3]])

    def fail(*args, **kwargs):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr("mmap.mmap", fail)
    said = rf"^--data.cache_dir: \S+/tokens.bin cannot be mapped into memory \({os.strerror(errno.ENODEV)}\); choose"
    with pytest.raises(ConfigError, match=said):
        _ = files.tokens


def resident(array: np.ndarray) -> np.ndarray:
    """Whether each page of a mapped file is in memory (mincore)."""
    pages = (ctypes.c_ubyte * -(-array.nbytes // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), pages) == 0
    return np.frombuffer(pages, np.uint8) % 2 == 1


def test_text_that_is_not_in_memory_is_read_a_step_ahead_and_no_more_than_its_rows(tmp_path):
    """With the system's read-ahead, each row of a random order reads 128 KiB or more."""
    width, size = 1024, 8
    packed = PackedRows(token_files(tmp_path, [[1] * 999] * 8000), width, True)  # 16 MB
    packed.label_counts(np.arange(2))  # opens them; the ends of documents are small, and read as usual
    tokens = packed.files.tokens
    fd = os.open(packed.files.folder / "tokens.bin", os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    if resident(tokens).any():
        pytest.skip("this file system keeps files in memory")
    order = Order(5, packed.num_rows)
    batches = TrainBatches(packed, order, (size, size // 2), (1, 2), size.__mul__)
    for step in range(3):
        batches[step]
        own = order(np.arange(size * (step + 2)))
        own = own.reshape(step + 2, 2, size // 2)[:, 1].ravel()  # of this rank, up to the next step
        pages = {
            page
            for row in own
            for page in range(row * width * 2 // mmap.PAGESIZE, ((row + 1) * width * 2 + 1) // mmap.PAGESIZE + 1)
        }
        until = time.monotonic() + 10
        while set(np.flatnonzero(resident(tokens)).tolist()) < pages and time.monotonic() < until:
            time.sleep(0.01)  # it is read in the background
        assert set(np.flatnonzero(resident(tokens)).tolist()) == pages


def test_token_files_travel_closed(tmp_path):
    import pickle

    packed = some_rows(tmp_path)
    packed.build(np.arange(2))
    assert len(pickle.dumps(packed)) < 5000
    assert (
        pickle.loads(pickle.dumps(packed)).build(np.arange(2))["labels"] == packed.build(np.arange(2))["labels"]
    ).all()


# --- the data module alone ---

WORDS = ["alpha", "beta", "gamma", "日本", "😀", "delta\n"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    rng = np.random.default_rng(2)
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    with open(path, "w") as out:
        for i in range(300):
            words = " ".join(rng.choice(WORDS, rng.integers(1, 40)))
            out.write(json.dumps({"text": f"{i} {words}", "kind": "odd" if i % 2 else "even"}) + "\n")
    return path


@pytest.fixture
def make(text):
    def make(**changes) -> SALTDataModule:
        given = {
            "source": str(text),
            "vocab_size": 300,
            "block_size": 16,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "val_fraction": 0.1,
            "cache_dir": str(text.parent / "cache"),
            "prepare_workers": 1,
        }
        return SALTDataModule(**{**given, **changes})

    return make


def ready(data: SALTDataModule, stage: str = "fit") -> SALTDataModule:
    data.prepare_data()
    data.setup(stage)
    return data


def test_a_vocabulary_is_read_once_until_it_grows(make, monkeypatch):
    """Every save stores its fingerprint."""
    tokenizer, asked = ready(make()).tokenizer, []
    of_vocabulary = type(tokenizer).get_vocab
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: asked.append(self) or of_vocabulary(self))
    before = [(tokenizer_fingerprint(tokenizer), num_ids(tokenizer)) for _ in range(3)]
    assert len(set(before)) == 1
    assert len(asked) <= 1
    tokenizer.add_tokens(["a word that it does not have"])
    assert num_ids(tokenizer) == before[0][1] + 1
    assert tokenizer_fingerprint(tokenizer) != before[0][0]


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        SALTDataModule(
            vocab_size=10, block_size=1, val_fraction=1.0, val_rows=0, global_batch_size=0,
            micro_batch_size=0, seed=-1, prepare_workers=-1, num_workers=-1, tokenizer="train",
        )  # fmt: skip
    message = str(caught.value)
    names = "source vocab_size block_size val_fraction val_rows global_batch_size micro_batch_size seed"
    assert [part.split(":")[0] for part in message.split("; --")] == [
        ("--data." if i == 0 else "data.") + name
        for i, name in enumerate([*names.split(), "prepare_workers", "num_workers"])
    ]
    assert "\n" not in message
    with pytest.raises(ConfigError, match="--data.keep.k 5 needs --data.selection, the folder of a run of"):
        SALTDataModule(source="no/such/file", keep=KeepRule(k=5)).prepare_data()  # before any text is read
    SALTDataModule(source="a/file/that/is/not/there", val_source="x", val_fraction=0.0, tokenizer="y", vocab_size=0)


def test_without_a_trainer(make):
    data = ready(make(source_column="kind"))
    assert data.vocab_size == len(data.tokenizer) == 300
    assert len(data.tokenizer_fingerprint) == 20
    assert sorted(data.source_names) == ["even", "odd"]
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 2 * -(-data.num_train_rows // 8)
    rows = torch.cat([batch["rows"] for batch in batches])[: data.num_train_rows]
    assert sorted(rows.tolist()) == list(range(data.num_train_rows))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batches[0].items()} == {
        "input_ids": (torch.int64, (4, 16)),
        "labels": (torch.int64, (4, 16)),
        "positions": (torch.int64, (4, 16)),
        "rows": (torch.int64, (4,)),
        "step_tokens": (torch.int64, ()),
        "cu_seqlens": (torch.int32, (9,)),
    }
    assert set(data.val_dataloader().batches[0]) == {
        "input_ids",
        "labels",
        "positions",
        "rows",
        "bytes",
        "documents",
        "sources",
    }


def test_validation_bytes_are_those_of_the_text(make):
    data = ready(make())
    total = sum(int(batch["bytes"].sum()) for batch in data.val_dataloader())
    files = data._eval.files
    first = files.token_bytes[np.concatenate([[0], files.doc_ends[:-1]])].sum()  # no label: nothing precedes it
    assert total == files.manifest["splits"]["val"]["text_bytes"] - first


def test_sources_of_labels(make, text):
    data = ready(make(source_column="kind"))
    documents = [json.loads(line) for line in text.read_text().splitlines()]
    starts = {document["text"][:4]: document["kind"] for document in documents}
    checked = 0
    for batch in data.val_dataloader():
        for ids, sources, positions in zip(batch["input_ids"], batch["sources"], batch["positions"], strict=True):
            for i in (positions == 0).nonzero().flatten().tolist()[1:]:
                kind = starts.get(data.tokenizer.decode(ids[i:].tolist())[:4])
                if kind and sources[i] != -1:
                    assert data.source_names[sources[i]] == kind
                    checked += 1
    assert checked > 10


def test_val_rows_are_evenly_spaced(make):
    data = ready(make(val_rows=5))
    every = ready(make())._eval.num_rows
    rows = torch.cat([batch["rows"] for batch in data.val_dataloader()])
    assert rows[rows != NO_ROW].tolist() == [i * every // 5 for i in range(5)]
    assert ready(make(val_rows=10**6))._eval_rows().tolist() == list(range(every))


def test_samples_are_from_all_over_and_end_when_they_have_enough_labels(make, monkeypatch):
    held_out = ready(make())
    every = held_out._eval.num_rows
    seen = []
    monkeypatch.setattr(
        held_out._eval, "build", lambda rows, build=held_out._eval.build: seen.append(rows) or build(rows)
    )
    batches = list(held_out.samples(1))
    labels = [int((batch["labels"] >= 0).sum()) for batch in batches]
    assert sum(labels[:-1]) < 512 <= sum(labels)
    assert len({int(rows[0]) for rows in seen}) == len(batches) < every
    assert seen != sorted(seen)
    seen.clear()
    monkeypatch.setattr(preflight, "ENOUGH_LABELS", 10**9)
    assert [len(batch["labels"]) for batch in held_out.samples(3)] == [3] * -(-every // 3)
    assert {*np.concatenate(seen).tolist()} == {*range(every)}
    assert all(np.diff(rows % every).max() >= every // 4 for rows in seen if rows[0] < rows[-1])
    [batch] = held_out.samples(2 * every)  # rows repeat
    assert len(batch["labels"]) == 2 * every


def test_validation_and_test_text_of_their_own(make, tmp_path):
    (tmp_path / "val.txt").write_text("validation text")
    (tmp_path / "test.txt").write_text("test text")
    data = ready(make(val_source=str(tmp_path / "val.txt"), test_source=str(tmp_path / "test.txt")))
    assert data._train.files.num_documents == 300
    for stage, expected in (
        ("fit", "validation text"),
        ("validate", "validation text"),
        ("test", "test text"),
    ):
        data.setup(stage)
        ids = torch.cat([batch["input_ids"].flatten() for batch in data.test_dataloader()]).tolist()
        assert data.tokenizer.decode(ids[: ids.index(data.tokenizer.eos_token_id)]) == expected
        assert data.source_names == [expected.split()[0][:3] if stage != "test" else "test"]
    shared = ready(make(test_source=None), "test")
    assert shared._eval.files.num_documents < 60  # the validation documents


def test_predict_reads_the_training_rows_in_order(make):
    data = ready(make(), "predict")
    rows = torch.cat([batch["rows"] for batch in data.predict_dataloader()])
    assert rows[rows != NO_ROW].tolist() == list(range(data.num_train_rows))


def test_isolation_changes_positions_only(make):
    apart, together = (ready(make(isolate_documents=flag)).train_dataloader().batches[0] for flag in (True, False))
    assert (together["positions"] == np.arange(16)).all()
    assert (apart["positions"] != together["positions"]).any()
    assert (apart["labels"] == together["labels"]).all()


def test_workers_change_neither_batches_nor_the_random_state(make):
    state = torch.get_rng_state()
    data = {workers: ready(make(num_workers=workers)) for workers in (0, 2)}
    here, there = (list(module.train_dataloader()) for module in data.values())
    assert len(here) == len(there) > 20
    for one, other in zip(here, there, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(sys.platform != "linux", reason="others have their own default")
@pytest.mark.parametrize(
    ("default", "chosen", "used"),
    [
        ("fork", None, "fork"),
        ("forkserver", None, "fork"),
        ("forkserver", "forkserver", "fork"),
        ("fork", "spawn", None),
    ],
)
def test_workers_are_forked_unless_the_user_has_set_another_way(default, chosen, used, monkeypatch):
    """Python 3.14's default is forkserver; asking for it may set it, so it is not taken for the user's."""
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: [default, "spawn"])
    monkeypatch.setattr("multiprocessing.get_start_method", lambda allow_none: chosen)
    assert _start_method() == used


@pytest.mark.skipif(sys.platform != "linux", reason="others have their own default")
def test_a_spawned_process_forks_its_workers():
    """Its own way is not one that the user has set."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_start_method) == "fork"


@pytest.mark.parametrize("why", ["Resource temporarily unavailable", "daemonic processes are not allowed to have ch"])
def test_workers_that_cannot_be_started_are_one_line(make, monkeypatch, why):
    def no_more():
        raise OSError(errno.EAGAIN, why)

    loader = ready(make(num_workers=1)).train_dataloader()
    if why.startswith("Resource"):
        monkeypatch.setattr("os.fork", no_more)
    else:
        monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # as in a Pool
    with pytest.raises(
        ConfigError, match=rf"^--data.num_workers: cannot start a process \({why}.*\); use 0, which starts none$"
    ):
        next(iter(loader))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_without_dev_shm_nothing_is_left_half_built(make, monkeypatch):
    """torch's iterator would print a traceback when it is deleted."""

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    loader = ready(make(num_workers=1)).train_dataloader()
    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", read_only)
    with pytest.raises(
        ConfigError, match=r"^--data.num_workers: cannot start a process \(Read-only file system\); use 0"
    ):
        next(iter(loader))
    gc.collect()


def test_wait_counts_the_loading_and_not_the_training():
    class Slow:
        def __getitem__(self, index):
            time.sleep(0.02)
            return {"rows": np.array([index]), "positions": np.zeros((1, 1), np.int64)}

    loader = Loader(Slow(), 5, lambda: 2)
    for batch in loader:
        assert batch["rows"].item() in (2, 3, 4)
        time.sleep(0.1)
    assert 3 * 0.02 <= loader.wait_s < 3 * 0.02 + 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"block_size": 10**6},
            r"^--data.source: \d+ training tokens do not fill one row of --data.block_size 1000000",
        ),
        ({"val_fraction": 1e-6}, r"^--data.val_fraction: 1e-06 left none of 300 documents for validation"),
        (
            {"global_batch_size": 9},
            r"^--data.global_batch_size: 9 rows do not divide into micro-batches of 4",
        ),
    ],
)
def test_what_setup_refuses(changes, message, make):
    with pytest.raises(ConfigError, match=message):
        ready(make(**changes))


@pytest.mark.parametrize("tokenizer", ["train", "ready"])
def test_one_text_file_without_held_out_text_is_refused_before_work(make, tmp_path, tokenizer):
    """It is one document, which no val_fraction can part; tokenizing it may take hours."""
    (text := tmp_path / "book.txt").write_text("Once upon a time. " * 2000)
    name = str(make_tokenizer(make)) if tokenizer == "ready" else tokenizer
    data = make(source=str(text), tokenizer=name, val_fraction=0.05, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"^--data.val_fraction: 0.05 left none of 1 documents .* --data.val_source$"):
        data.prepare_data()
    assert not list(tmp_path.glob("cache/*"))


def test_setup_before_prepare_data_says_so(make, tmp_path):
    with pytest.raises(ConfigError, match=r"--data.cache_dir: .* holds no prepared text: prepare_data\(\) has not run"):
        make(cache_dir=str(tmp_path), tokenizer=str(make_tokenizer(make))).setup("fit")


def make_tokenizer(make) -> Path:
    data = make()
    data.prepare_data()
    return Path(data.tokenizer.name_or_path)


def test_a_data_module_that_is_used_again_trains_its_tokenizer_on_the_new_text(make, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some words of the first text " * 40)
    data = ready(make(source=str(text), val_fraction=0.0, val_source=str(text)))
    text.write_text("zebras quietly fix jumbled vowels " * 40)
    fresh = ready(make(source=str(text), val_fraction=0.0, val_source=str(text)))
    assert ready(data).tokenizer_fingerprint == fresh.tokenizer_fingerprint


def test_tokenizer_from_a_folder(make):
    folder = make_tokenizer(make)
    data = ready(make(tokenizer=str(folder)))
    assert data.tokenizer_fingerprint == ready(make()).tokenizer_fingerprint


def test_data_imports_no_training_code():
    package = Path(__file__).parents[1] / "salt_lightning"
    of_data = {*(package / "text").glob("*.py"), *(package / "batches").glob("*.py")}
    of_data |= {package / name for name in ("errors.py", "preflight.py", "fit/cadence.py", "command/settings.py")}
    allowed = {path.stem for path in of_data} | {"difficulty", "kinds", "row_pass", "schedule", "scores", "selection"}
    for path in (*of_data, package / "data.py"):
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        for node in imports:
            parts = (node.module or "").split(".")
            if parts[0] == "salt_lightning":  # of the package or of one of its folders, or of a file
                from_folder = (package / "/".join(parts[1:])).is_dir()
                assert {alias.name for alias in node.names} <= allowed if from_folder else parts[-1] in allowed


# --- with a trainer ---


class Toy(pl.LightningModule):
    """Learns one number; records which rows each optimizer step read, and when it was validated."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.rows: dict[int, list[int]] = {}
        self.validated: list[int] = []

    def training_step(self, batch, index):
        self.rows.setdefault(self.global_step, []).extend(batch["rows"].tolist())
        return (self.weight - batch["labels"].float().mean()) ** 2

    def validation_step(self, batch, index):
        if index == 0:
            self.validated.append(self.global_step)

    test_step = validation_step

    def predict_step(self, batch, index):
        self.validation_step(batch, index)
        return batch["rows"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def trainer(folder: Path, **changes) -> pl.Trainer:
    given = {
        "max_steps": 12,
        "val_check_interval": 4,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return pl.Trainer(**{**given, **changes})


def expected_rows(data: SALTDataModule, steps: range, size: int = 8) -> dict[int, list[int]]:
    return {s: row_at(s * size + np.arange(size), data.seed, data.num_train_rows).tolist() for s in steps}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("micro", [8, 4, 2])
def test_fit_reads_the_order_and_validates_at_optimizer_steps(micro, workers, make, tmp_path):
    data, toy = make(micro_batch_size=micro, num_workers=workers), Toy()
    run = trainer(tmp_path)
    run.fit(toy, datamodule=data)
    assert run.accumulate_grad_batches == data.accumulate == 8 // micro
    assert toy.rows == expected_rows(data, range(12))
    assert toy.validated == [4, 8, 12]
    assert run.global_step == 12
    assert data.data_wait_s > 0


def test_setup_twice_converts_once(make, tmp_path):
    data, toy = make(micro_batch_size=2), Toy()
    run = trainer(tmp_path)
    data.trainer = run
    ready(data)
    run.fit(toy, datamodule=data)
    run.fit_loop.epoch_loop.max_steps = 16
    run.fit(toy, datamodule=data)
    assert toy.validated == [4, 8, 12, 16]
    assert toy.rows == expected_rows(data, range(16))


@pytest.mark.parametrize(
    ("interval", "steps"),
    [(1, list(range(1, 13))), (5, [5, 10]), (0.25, [3, 6, 9, 12]), (1.0, [12]), (100, [12]), (12, [12])],
)
def test_validation_interval(interval, steps, make, tmp_path):
    toy = Toy()
    trainer(tmp_path, val_check_interval=interval).fit(toy, datamodule=make())
    assert toy.validated == steps


def test_validation_interval_of_no_epoch(make, tmp_path):
    toy = Toy()
    trainer(tmp_path, check_val_every_n_epoch=None, val_check_interval=5).fit(toy, datamodule=make())
    assert toy.validated == [5, 10]


def test_resume_goes_on_with_the_next_row(make, tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if index == 9:  # the second micro-batch of the fifth step
                trainer.save_checkpoint(tmp_path / "5.ckpt")

    trainer(tmp_path, callbacks=[Save()]).fit(Toy(), datamodule=make(micro_batch_size=4))
    data, toy = make(micro_batch_size=4, num_workers=2), Toy()
    assert ready(data).num_train_rows < 60 * 8  # a new epoch begins in between
    again = trainer(tmp_path, max_steps=60)
    again.fit(toy, datamodule=data, ckpt_path=tmp_path / "5.ckpt", weights_only=True)
    assert toy.rows == expected_rows(data, range(5, 60))
    assert toy.validated == list(range(8, 61, 4))


def test_one_pass_over_all_rows_is_one_epoch_of_data(make, tmp_path):
    data, toy = make(), Toy()
    num_rows = ready(data).num_train_rows
    trainer(tmp_path, max_steps=2 * num_rows // 8, limit_val_batches=0).fit(toy, datamodule=data)
    flat = [row for step in sorted(toy.rows) for row in toy.rows[step]]
    assert sorted(flat[:num_rows]) == list(range(num_rows))
    assert flat[:num_rows] != flat[num_rows : 2 * num_rows]


def test_the_other_verbs(make, tmp_path):
    data, run, toy = make(), trainer(tmp_path), Toy()
    run.validate(toy, datamodule=data, verbose=False)
    run.test(toy, datamodule=data, verbose=False)
    run.predict(toy, datamodule=data, return_predictions=False)
    assert toy.validated == [0, 0, 0]
    assert run.accumulate_grad_batches == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate_grad_batches": 2}, r"^--trainer.accumulate_grad_batches 2 follows from --data.global_batch_size"),
        (
            {"max_steps": -1, "max_epochs": 1},
            r"^--trainer.max_steps: -1 is not a valid run length; give a number of optimizer steps$",
        ),
        ({"limit_train_batches": 5}, r"^--trainer.limit_train_batches 5, which .*; use --trainer.max_steps$"),
        (
            {"fast_dev_run": True},
            r"^--trainer.limit_train_batches 1, which overfit_batches and fast_dev_run also set, ",
        ),
        (
            {"overfit_batches": 2},
            r"^--trainer.limit_train_batches 2, which overfit_batches and fast_dev_run also set, ",
        ),
    ],
)
def test_trainer_settings_that_are_refused(changes, message, make, tmp_path):
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, **changes).fit(Toy(), datamodule=make())


def test_sizes_that_do_not_divide_name_the_nearest():
    assert accumulation(64, 8, 4) == 2
    with pytest.raises(ConfigError) as caught:
        accumulation(64, 6, 4)
    assert str(caught.value) == (
        "--data.global_batch_size: 64 rows do not divide into micro-batches of 6 (--data.micro_batch_size) "
        "on 4 devices; use 48 or 72, or --data.micro_batch_size 4 or 8"
    )
    with pytest.raises(ConfigError, match=r"2 rows .* on 3 devices; use 3$"):
        accumulation(2, 1, 3)
    with pytest.raises(ConfigError, match=r"10 rows .* on 4 devices; use 8 or 12$"):  # no micro-batch divides
        accumulation(10, 1, 4)


def test_the_log_says_how_often_the_text_is_read(make, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        data = make()
        trainer(tmp_path, max_steps=30, val_check_interval=30).fit(Toy(), datamodule=data)
    text, reads = [record.message for record in caplog.records if record.message.startswith("data:")]
    rows = data.num_train_rows
    assert reads == f"data: 30 steps read 240 rows of {rows}: {240 / rows:.2f} epochs"
    assert text.startswith(f"data: {rows} rows of 16 tokens, from {data.num_train_tokens} tokens")
