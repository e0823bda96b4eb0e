"""Fuzzing: random text, files, settings and runs through the real library, compared with references in plain Python.

    python benchmarks/fuzz.py                          the full campaign; about an hour on two busy cores
    python benchmarks/fuzz.py --only documents --cases 500 --seed 3

    documents   text -> files of any kind -> tokens -> packed rows -> batches, each step compared with its definition
    broken      files of random or corrupted bytes: either text, or a one-line error
    killed      preparation killed anywhere and continued with other workers: the bytes of an undisturbed one
    settings    constructors with random values: either the object works, or one line names a wrong value
    commands    random command lines and YAML: parsed, or a one-line error
    steps       `fit` of one or two steps of tiny models with random settings: finite values, or a one-line error

The strategies and properties are defined here; tests/test_fuzz.py runs a small share of them, always the same cases.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import lzma
import math
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from bz2 import compress as bz2
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hypothesis import HealthCheck, Phase, assume, given, note, reject, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import arguments, scalars
from reference import packed_rows

from salt_lightning import KDScheduleCallback, ModelSpec, OptimSpec, SALTDataModule, SALTModule, cli
from salt_lightning.batches.order import Order
from salt_lightning.batches.row_set import RowSet
from salt_lightning.batches.rows import IGNORE, NO_ROW, EvalBatches, PackedRows, TrainBatches
from salt_lightning.checkpoint import RunCheckpoint
from salt_lightning.errors import ConfigError
from salt_lightning.schedule import KDSchedule
from salt_lightning.selection import KeepRule, kept_rows
from salt_lightning.text import documents as documents_module
from salt_lightning.text import prepare as prepare_module
from salt_lightning.text import tokenizer as tokenizer_module
from salt_lightning.text.documents import Corpus
from salt_lightning.text.prepare import prepare_tokens
from salt_lightning.text.sources import Hub, resolve
from salt_lightning.text.token_files import SplitWriter, TokenFiles, verify

CASES = {"documents": 4000, "broken": 1500, "killed": 400, "settings": 6000, "commands": 800, "steps": 600}
EOS = "<|endoftext|>"

# --- text, and the files that hold it ---

PIECES = [
    "", " ", "a", "Z9", "é", "€", "😀", "日本", "e\u0301", "\0", "\n", "\r", "\r\n", "\t", "\u2028", "\u0085", "\x1c",
    "\ufeff", "\u200f", EOS, '"', "\\", "{}", "\uffff", "\U0010ffff", "the teacher ", "x = 1;\n",
]  # fmt: skip
HALVES = [
    "\ud800",
    "\udbff",
    "\udc00",
    "\udfff",
]  # halves of surrogate pairs: JSON may contain them, UTF-8 and Arrow may not


def texts(halves: bool) -> SearchStrategy[str]:
    """Any Unicode; troublesome characters more often than by chance; repeats up to some hundred thousand characters."""
    characters = st.characters(exclude_categories=()) if halves else st.characters(codec="utf-8")
    mixed = st.lists(st.sampled_from(PIECES + HALVES * halves), max_size=30).map("".join)
    long = st.builds(str.__mul__, st.sampled_from(["ab ", "x", "日本 ", "\n", "1 2", "😀"]), st.integers(100, 3000))
    enormous = st.builds(str.__mul__, st.sampled_from(["word ", "日"]), st.integers(10_000, 30_000))
    return st.integers(0, 1999).flatmap(
        lambda lot: (
            enormous if lot == 7 else long if lot % 20 == 1 else mixed if lot % 2 else st.text(characters, max_size=60)
        )
    )


@dataclass(frozen=True)
class File:
    """A file of documents; `rows` are (text or None, source)."""

    kind: str  # "text" | "jsonl" | "parquet"
    name: str
    rows: list[tuple[str | None, Any]]
    style: random.Random  # draws what does not matter: line ends, other fields, order of keys ...

    def write(self, folder: Path, columns: tuple[str, str]) -> None:
        content = {"text": self._text, "jsonl": self._jsonl, "parquet": self._parquet}[self.kind](columns)
        pack = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2}.get(Path(self.name).suffix.lower(), bytes)
        (folder / self.name).write_bytes(pack(content))

    def _text(self, columns: tuple[str, str]) -> bytes:
        return self.rows[0][0].encode()

    def _jsonl(self, columns: tuple[str, str]) -> bytes:
        draw, lines = self.style, []
        for text, source in self.rows:
            pairs = [(columns[0], text), (columns[1], source), ("n", draw.choice([1, 0.5, None, [{"a": []}]]))]
            draw.shuffle(pairs)
            ascii_only = bool(draw.randrange(2)) or any(
                h in json.dumps([text, source], ensure_ascii=False) for h in _HALF
            )
            lines += [
                json.dumps(dict(pairs), ensure_ascii=ascii_only),
                *[draw.choice(["", " \t"])] * (draw.random() < 0.1),
            ]
        end = draw.choice(["\n", "\n", "\r\n"])
        bom = "\ufeff" if draw.random() < 0.1 else ""
        return (bom + end.join(lines) + end * draw.randrange(2)).encode()

    def _parquet(self, columns: tuple[str, str]) -> bytes:
        draw, rows = self.style, self.rows
        kind = draw.choice([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
        table = pa.table(
            {
                "n": pa.array(range(len(rows))),
                columns[0]: pa.array([text for text, _ in rows], pa.string()).cast(kind),
                columns[1]: pa.array([source for _, source in rows], pa.string()),
            }
        )
        out = io.BytesIO()
        pq.write_table(
            table, out, row_group_size=draw.choice([1, 3, 1000]), compression=draw.choice(["none", "snappy", "zstd"])
        )
        return out.getvalue()

    def documents(self, own_source: str | None) -> list[tuple[str, str]]:
        """The expected documents, by definition. `own_source`: the source's name if there is no column of sources."""
        found = []
        for text, source in self.rows:
            if self.kind == "text":
                text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
            if text is not None and text.strip():
                of_column = "" if source is None else " ".join(str(source).split())
                named = own_source if own_source is not None else of_column or "(none)"
                found.append((whole_characters(text), whole_characters(named)))
        return found


_HALF = [chr(code) for code in range(0xD800, 0xE000)]


def whole_characters(text: str) -> str:
    """Joins JSON's two escapes of a surrogate pair into one character; replaces an unpaired half by a question mark."""
    joined = re.sub(
        "[\ud800-\udbff][\udc00-\udfff]", lambda m: m[0].encode("utf-16", "surrogatepass").decode("utf-16"), text
    )
    return re.sub("[\ud800-\udfff]", "?", joined)


NAMES = st.one_of(
    st.sampled_from(["a", "train", "test", "x[1]", "b*", "ü", "a.b", "with space", "日本", "-", "%s", "c\nd", "{}"]),
    st.text(st.characters(codec="utf-8", exclude_characters="/\0."), min_size=1, max_size=8),
)


@st.composite
def files(draw: Any, number: int, columns_alike: bool) -> File:
    kind = draw(st.sampled_from(["text", "jsonl", "jsonl", "parquet"]))
    halves = kind == "jsonl"
    source = st.one_of(st.none(), texts(halves).map(lambda t: t[:20]), *([st.integers(0, 3)] if halves else []))
    pair = st.tuples(st.one_of(st.none(), texts(halves), texts(halves)), source)
    if columns_alike:
        pair = pair.map(lambda p: (p[0], p[0]))
    if kind == "text":
        text = draw(texts(False).filter(lambda t: t.count("\0") * 10 <= len(t)))  # more would be refused
        rows, suffixes = [(text, None)], ["", ".txt", ".md", ".TXT", ".txt.gz", ".txt.xz", ".bz2"]
    else:
        rows = draw(st.lists(pair, max_size=8))
        suffixes = (
            [".jsonl", ".json", ".ndjson", ".JSONL", ".jsonl.gz", ".jsonl.xz", ".json.bz2"] if halves else [".parquet"]
        )
    name = f"{number}{draw(NAMES)}{draw(st.sampled_from(suffixes))}"
    return File(kind, name, rows, random.Random(draw(st.integers(0, 2**16))))


@dataclass(frozen=True)
class Case:
    """All inputs of one preparation."""

    files: list[File]
    how: str  # files named one by one ("each"), or by a "glob" or as a "folder" if all are of one kind
    columns: tuple[str, str]
    by_column: bool
    tokenizer: str
    val_fraction: float
    workers: int
    raw_chars: int
    piece_chars: int
    block_size: int
    isolate: bool
    batch: tuple[int, int, int]  # micro-batch, ranks, accumulation
    seed: int


@st.composite
def cases(draw: Any) -> Case:
    columns = draw(st.sampled_from([("text", "source"), ("a.b", "ü"), ("", "text"), ("text", "text")]))
    by_column = draw(st.booleans())
    alike = columns[0] == columns[1]
    return Case(
        [draw(files(i, alike)) for i in range(draw(st.integers(1, 4)))],
        draw(st.sampled_from(["each", "each", "glob", "folder"])),
        columns,
        by_column,
        draw(st.sampled_from(["bytes", "merges"])),
        draw(st.sampled_from([0.0, 0.0, 0.05, 0.5, 0.9, 1.0])),
        draw(st.integers(1, 2)),
        draw(st.sampled_from([1, 60, 1 << 19])),
        draw(st.sampled_from([7, 100, 1 << 20])),
        draw(st.integers(2, 40)),
        draw(st.booleans()),
        draw(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))),
        draw(st.integers(0, 2**32)),
    )


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text can be decoded: without merges ("bytes"), or with some."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=257 if name == "bytes" else 400,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.pre_tokenizer, made.decoder = words, decoders.ByteLevel()
    made.train_from_iterator(["the teacher reads what the student wrote, 日本 x = 1;\n" * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=EOS)


@contextlib.contextmanager
def constants(**values: tuple[Any, Any]) -> Iterator[None]:
    """Sets module constants within the context: NAME=(module, value)."""
    before = {name: getattr(module, name) for name, (module, _) in values.items()}
    try:
        for name, (module, value) in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, (module, _) in values.items():
            setattr(module, name, before[name])


# --- documents ---


def laid_out(case: Case, folder: Path) -> tuple[Corpus, list[tuple[str, str]]]:
    """Writes the case's files; returns their corpus and the expected documents, in order."""
    folder.mkdir()
    for file in case.files:
        file.write(folder, case.columns)
    if (
        case.how == "each"
        or case.by_column
        or len({file.kind for file in case.files}) > 1
        or case.files[0].kind != "text"
    ):
        entries, order = [str(folder / file.name) for file in case.files], case.files
        names = [_short_name(file, case.files, folder) for file in order]
    else:
        entries = [str(folder / "*" if case.how == "glob" else folder)]
        order = sorted(case.files, key=lambda file: str(folder / file.name))
        names = [folder.name] * len(order)
    groups = resolve("--data.source", entries, Hub())
    corpus = Corpus("--data.source", groups, case.columns[0], case.columns[1] if case.by_column else None)
    expected = []
    for file, name in zip(order, names, strict=True):
        own = None if case.by_column and file.kind != "text" else name
        expected += file.documents(own)
    return corpus, expected


def _short_name(file: File, all_files: list[File], folder: Path) -> str:
    short = [other.name.split(".")[0] for other in all_files]
    name = file.name.split(".")[0]
    return name if short.count(name) == 1 else str(folder / file.name)


def is_held_out(text: str, fraction: float) -> bool:
    """The definition: 53 bits of the text's hash, as a number in [0, 1), are below the fraction."""
    return (int.from_bytes(blake2b(text.encode(), digest_size=16).digest()[:8], "little") >> 11) / 2**53 < fraction


def check_documents(case: Case, folder: Path) -> None:
    try:
        corpus, expected = laid_out(case, folder / "text")
    except ConfigError as error:
        assert_one_line(error, "holds no text: its files")
        assert any(path.stat().st_size == 0 for path in (folder / "text").iterdir())
        return
    words = tokenizer(case.tokenizer)
    tuned = constants(_RAW_CHARS=(documents_module, case.raw_chars), _PIECE_CHARS=(tokenizer_module, case.piece_chars))
    try:
        with tuned:
            prepared = prepare_tokens(corpus, words, case.val_fraction, folder / "cache", case.workers)
    except ConfigError as error:
        assert_one_line(error, "no document with text")
        assert not expected
        return
    assert expected, "text out of nothing"
    verify(prepared)
    for split in ("train", "val"):
        of_split = [pair for pair in expected if is_held_out(pair[0], case.val_fraction) == (split == "val")]
        docs = check_tokens(TokenFiles(prepared, split), of_split, words)
        check_rows(case, TokenFiles(prepared, split), docs)


Docs = list[tuple[list[int], list[int] | None, int]]  # ids without EOS, bytes of each, index of the source


def check_tokens(written: TokenFiles, expected: list[tuple[str, str]], words: PreTrainedTokenizerFast) -> Docs:
    """Checks that every text comes back once, in order, with its EOS, source and bytes."""
    assert written.num_documents == len(expected)
    assert written.num_tokens == (int(written.doc_ends[-1]) if len(expected) else 0)
    start, found = 0, []
    for (text, source), end, index in zip(
        expected, written.doc_ends.tolist(), written.doc_sources.tolist(), strict=True
    ):
        ids = written.tokens[start:end].tolist()
        assert ids[-1] == written.eos_id
        assert written.eos_id not in ids[:-1]
        assert words.decode(ids[:-1]) == text
        assert written.manifest["sources"][index] == source
        widths = written.token_bytes[start:end].tolist() if written.folder.name == "val" else None
        if widths is not None:
            assert widths[-1] == 0
            assert sum(widths) == len(text.encode())
            assert min(widths) >= 0
        found.append((ids[:-1], widths[:-1] if widths else None, index))
        start = end
    return found


def check_rows(case: Case, written: TokenFiles, docs: Docs) -> None:
    """Checks rows against the definition, counts against the rows, orders, and how ranks share a step."""
    packed = PackedRows(written, case.block_size, case.isolate)
    widths = [bytes_of if bytes_of is not None else [0] * len(ids) for ids, bytes_of, _ in docs]
    expected = packed_rows(
        [ids for ids, _, _ in docs],
        widths,
        [source for _, _, source in docs],
        case.block_size,
        case.isolate,
        written.eos_id,
    )
    assert packed.num_rows == len(expected)
    if not expected:
        return
    rows = np.arange(len(expected))
    batch = packed.build(rows)
    if written.folder.name == "val":
        batch |= packed.origins(batch)
    for name in batch.keys() & expected[0].keys():
        assert batch[name].tolist() == [row[name] for row in expected], name
    labels = [sum(label != IGNORE for label in row["labels"]) for row in expected]
    assert packed.label_counts(rows).tolist() == labels
    order = check_order(case, len(expected))
    micro, world, accumulate = case.batch
    sizes, global_batch = (micro * world * accumulate, micro), micro * world * accumulate
    for step in (0, 1 + case.seed % 3):
        read, total = [], 0
        for rank in range(world):
            batches = TrainBatches(packed, order, sizes, (rank, world), sizes[0].__mul__)
            parts = [batches[step * accumulate + part] for part in range(accumulate)]
            read += [row for part in parts for row in part["rows"].tolist()]
            total += sum(int((part["labels"] != IGNORE).sum()) for part in parts)
            assert len({int(part["step_tokens"]) for part in parts}) == 1
        assert total == int(parts[0]["step_tokens"])
        assert sorted(read) == sorted(order(step * global_batch + np.arange(global_batch)).tolist())
    seen: list[int] = []
    for rank in range(world):
        held = EvalBatches(packed, rows, micro, (rank, world))
        seen += [row for i in range(len(held)) for row in held.rows_NB[i].tolist() if row != NO_ROW]
    assert sorted(seen) == rows.tolist()


def check_order(case: Case, num_rows: int) -> Order:
    """Checks that a pass reads each row once, and with a selection: phase 1 kept rows, phase 2 the unread first."""
    draw = random.Random(case.seed)
    order = Order(case.seed, num_rows)
    two = order(np.arange(2 * num_rows)).tolist()
    assert sorted(two[:num_rows]) == sorted(two[num_rows:]) == list(range(num_rows))
    kept = sorted(draw.sample(range(num_rows), draw.randint(1, num_rows)))
    phase1, unread_first = draw.randint(0, 2 * len(kept)), draw.random() < 0.5
    selected = Order(case.seed, num_rows, RowSet(np.isin(np.arange(num_rows), kept)), phase1, unread_first)
    rows = selected(np.arange(phase1 + 2 * num_rows)).tolist()
    one_pass = min(phase1, len(kept))
    assert len(set(rows[:one_pass])) == one_pass
    assert set(rows[:phase1]) <= set(kept)
    if unread_first:
        unread = set(range(num_rows)) - set(rows[:phase1])
        assert sorted(rows[phase1 : phase1 + len(unread)]) == sorted(unread)
        rest = rows[phase1 + len(unread) : phase1 + len(unread) + num_rows]
        assert sorted(rest[:num_rows]) == list(range(num_rows))[: len(rest)] or len(rest) < num_rows
    else:
        assert rows[phase1:] == order(np.arange(phase1, phase1 + 2 * num_rows)).tolist()
    return draw.choice([order, selected])


def assert_one_line(error: ConfigError, *wanted: str) -> None:
    message = str(error)
    assert len(message.splitlines()) == 1, message
    assert len(message) < 2000, message
    assert re.search(r"--(data|model|kd|checkpoint|trainer|run|ckpt_path)\b", message), message
    for part in wanted:
        assert part in message, message


# --- broken files ---


@st.composite
def broken(draw: Any) -> tuple[str, bytes]:
    """A file name and content that need not match."""
    suffix = draw(
        st.sampled_from(
            ["", ".txt", ".jsonl", ".json.gz", ".jsonl.xz", ".jsonl.bz2", ".txt.gz", ".parquet", ".zip", ".zst"]
        )
    )
    if draw(st.integers(0, 3)) == 0:
        return f"x{suffix}", draw(st.binary(max_size=200))
    file = draw(files(0, False))
    with tempfile.TemporaryDirectory() as folder:
        file.write(Path(folder), ("text", "source"))
        content = bytearray((Path(folder) / file.name).read_bytes())
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        how = draw(st.sampled_from(["flip", "cut", "insert", "drop"]))
        if how == "cut":
            del content[place:]
        elif how == "drop":
            del content[place : place + draw(st.integers(1, 20))]
        elif how == "insert":
            content[place:place] = draw(
                st.one_of(st.binary(min_size=1, max_size=8), st.just(b"[" * 5000), st.just(b"9" * 5000))
            )
        elif content:
            content[place] ^= draw(st.integers(1, 255))
    own = re.sub(r"^.*?(\.|$)", r"\1", file.name) if draw(st.booleans()) else suffix
    return f"x{own}", bytes(content)


def check_broken(case: tuple[str, bytes], folder: Path) -> None:
    name, content = case
    (folder / name).write_bytes(content)
    try:
        corpus = Corpus("--data.source", resolve("--data.source", [str(folder / name)], Hub()))
        prepared = prepare_tokens(corpus, tokenizer("bytes"), 0.5, folder / "cache", 1)
    except ConfigError as error:
        assert_one_line(error)
        assert not list((folder / "cache").glob("*")) if (folder / "cache").exists() else True, "something was left"
        return
    verify(prepared)
    for split in ("train", "val"):
        written = TokenFiles(prepared, split)
        tokenizer("bytes").decode(written.tokens.tolist())
        PackedRows(written, 8, True).build(np.arange(PackedRows(written, 8, True).num_rows))


# --- killed preparations ---


def check_killed(case: tuple[Case, int, bool], folder: Path) -> None:
    one, call, in_journal = case
    try:
        corpus, expected = laid_out(one, folder / "text")
    except ConfigError:
        reject()
    assume(expected)
    words = tokenizer(one.tokenizer)
    with constants(
        _RAW_CHARS=(documents_module, 30),
        _PIECE_CHARS=(tokenizer_module, one.piece_chars),
        _JOURNAL_S=(prepare_module, 0.0),
        _CHARS_PER_WORKER=(prepare_module, 30),
    ):
        whole = prepare_tokens(corpus, words, one.val_fraction, folder / "undisturbed", 1)
        arguments = (corpus, words, one.val_fraction, folder / "cache", one.workers)
        child = multiprocessing.get_context("fork").Process(
            target=_prepare_and_die, args=(call, in_journal, *arguments)
        )
        child.start()
        child.join(60)
        assert child.exitcode is not None
        again = prepare_tokens(*arguments[:-1], 3 - one.workers)
    assert _contents(again) == _contents(whole)
    assert [path.name for path in (folder / "cache").iterdir()] == [again.name]


def _prepare_and_die(call: int, in_journal: bool, *arguments: Any) -> None:
    """Like prepare_tokens, but the process dies at the n-th block or journal entry, before or after writing it."""
    owner, name = (prepare_module, "write_json") if in_journal else (SplitWriter, "add")
    original, calls = getattr(owner, name), []

    def dying(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            if call % 2:
                original(*args)
            os._exit(9)
        return original(*args)

    setattr(owner, name, dying)
    prepare_tokens(*arguments)
    os._exit(0)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- settings of constructors ---

NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 10, 257, 1 << 20, 10**12, 1 << 63, -(1 << 63), 1 << 64]), st.integers(-5, 100)
)
REALS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 0.5, -1.0, 1e-300, 1e300, math.inf, -math.inf, math.nan, 0, 1, 2]),
    st.floats(0, 1),
)
STRINGS = st.one_of(
    st.sampled_from(["", "train", "a/b", "no/*.txt", "x.ckpt", "~", ".", "\0", "a\nb"]), st.text(max_size=5)
)


def values(annotation: str) -> SearchStrategy[Any]:
    """Valid and invalid values of a setting's type; now and then one of another type, as YAML allows."""
    choices = re.findall(r"'(\w+)'", annotation)
    kinds = {"int": NUMBERS, "float": REALS, "str": STRINGS, "bool": st.booleans()}
    found = [kinds[kind] for kind in kinds if re.search(rf"\b{kind}\b", annotation)]
    found += [st.sampled_from([*choices, "other"])] * bool(choices) + [st.none()] * ("None" in annotation)
    return st.one_of(found)


def own_types(cls: type) -> dict[str, str]:
    import inspect

    hints = inspect.signature(cls).parameters
    return {name: _spelled(parameter.annotation) for name, parameter in hints.items()}


def _spelled(annotation: Any) -> str:
    text = (
        annotation
        if isinstance(annotation, str)
        else annotation.__name__
        if isinstance(annotation, type)
        else str(annotation)
    )
    return {
        "Shape": "'step' 'linear' 'linear_ratio' 'cosine'",
        "Masked": "'zero' 'drop'",
        "Which": "'highest' 'lowest' 'middle' 'random'",
    }.get(text, text)


SCHEMAS: dict[str, type] = {
    "kd": KDScheduleCallback,
    "model.optim": OptimSpec,
    "data.keep": KeepRule,
    "data": SALTDataModule,
    "checkpoint": RunCheckpoint,
    "model": SALTModule,
}
NOT_DRAWN = {"keep", "student", "teacher", "optim", "at_steps", "config"}


@st.composite
def constructed(draw: Any) -> tuple[str, dict[str, Any]]:
    group = draw(st.sampled_from(list(SCHEMAS)))
    types = {name: kind for name, kind in own_types(SCHEMAS[group]).items() if name not in NOT_DRAWN}
    chosen = draw(st.lists(st.sampled_from(sorted(types)), unique=True, max_size=6))
    return group, {name: draw(values(types[name])) for name in chosen}


def check_settings(case: tuple[str, dict[str, Any]], folder: Path) -> None:
    group, given = case
    needed = {"data": {"source": "x.txt"}, "model": {"student": ModelSpec(config={"hidden_size": 8})}}.get(group, {})
    try:
        made = SCHEMAS[group](**{**needed, **given})
    except ConfigError as error:
        assert_one_line(error)
        named = set(re.findall(rf"--{group}\.(\w+)", str(error)))
        assert named & set(given), given
        return
    WORKS.get(group, lambda made, given: None)(made, given)


def _schedule_works(made: KDScheduleCallback, given: dict[str, Any]) -> None:
    schedule: KDSchedule = made.schedule
    end = 50 if schedule.steps is None else schedule.steps
    around = sorted({max(0, step) for at in (0, end, end - schedule.anneal_steps) for step in range(at - 2, at + 3)})
    weights = [schedule(step) for step in around]
    assert all(0.0 <= weight <= schedule.weight for weight in weights), (schedule, weights)
    assert weights == sorted(weights, reverse=True), (schedule, weights)
    if schedule.steps is not None:
        assert schedule(schedule.steps) == schedule(schedule.steps + 10**12) == 0.0
    assert schedule.kd_steps(7) == sum(schedule(step) > 0 for step in range(7)) or 0 < schedule.weight < 1e-290


def _rate_works(made: OptimSpec, given: dict[str, Any]) -> None:
    for max_steps in (1, 7, 1000):
        try:
            made.check(max_steps)
        except ConfigError as error:
            assert_one_line(error, "--trainer.max_steps")
            continue
        rates = [made.lr_at(step, max_steps) for step in sorted({0, 1, max_steps // 2, max_steps - 1, max_steps})]
        assert all(math.isfinite(rate) and 0 <= rate <= made.lr * (1 + 1e-9) for rate in rates), (made, rates)
        assert all(math.isfinite(getattr(made, field.name)) for field in fields(made) if field.type == "float")


def _rule_works(made: KeepRule, given: dict[str, Any]) -> None:
    for scores in (np.zeros(1), np.arange(10.0), np.tile([0.0, 2.5, 0.0], 30)):
        try:
            kept = kept_rows(scores, made)
        except ConfigError as error:
            assert_one_line(error, "--data.keep.")
            continue
        wanted = made.rows or max(1, round(made.fraction * len(scores)))
        assert len(set(kept.tolist())) == len(kept) == wanted
        assert kept.tolist() == sorted(kept.tolist())
        assert kept[0] >= 0
        assert kept[-1] < len(scores)


def _data_works(made: SALTDataModule, given: dict[str, Any]) -> None:
    from salt_lightning.data import accumulation

    assert Order(made.seed, 10)(np.arange(10)).tolist() != []
    for world in (1, 3, 8):
        try:
            times = accumulation(made.global_batch_size, made.micro_batch_size, world)
        except ConfigError as error:
            assert_one_line(error, "--data.global_batch_size", "--data.micro_batch_size")
            continue
        assert times * made.micro_batch_size * world == made.global_batch_size


def _module_works(made: SALTModule, given: dict[str, Any]) -> None:
    spec = made.hparams
    assert 0 < spec["teacher_temperature"] < math.inf
    assert 0 < spec["logits_budget_gib"] < math.inf
    assert spec["accuracy"] in ("accurate", "fast")


WORKS: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "kd": _schedule_works,
    "model.optim": _rate_works,
    "data.keep": _rule_works,
    "data": _data_works,
    "model": _module_works,
}


# --- command lines ---

LITERALS = st.one_of(
    NUMBERS.map(str), REALS.map(str), STRINGS, st.booleans().map(str), st.none().map(lambda _: "null"),
    st.sampled_from(["[]", "{}", "[1, 2]", "{a: 1}", "{class_path: os.system}", "*", "&a [*a]", "1e9", "'"]),
    st.just("!!python/object/apply:os.getcwd []"),
)  # fmt: skip


def dotted() -> list[str]:
    found = []
    for group, cls in SCHEMAS.items():
        found += [f"{group}.{name}" for name in own_types(cls) if name != "keep"]
    for model in ("student", "teacher"):
        found += [f"model.{model}.{field.name}" for field in fields(ModelSpec)]
    trainer = [
        "max_steps",
        "precision",
        "devices",
        "strategy",
        "callbacks",
        "logger",
        "gradient_clip_val",
        "val_check_interval",
    ]
    return [*found, "run", "seed_everything", "ckpt_path", *(f"trainer.{name}" for name in trainer)]


@st.composite
def commands(draw: Any) -> tuple[list[tuple[str, str]], str | None]:
    """Settings as flags, and a YAML file: of any text, or of settings."""
    keys = st.one_of(
        st.sampled_from(dotted()), st.sampled_from(dotted()), st.text(st.characters(codec="ascii"), max_size=6)
    )
    flags = draw(st.lists(st.tuples(keys, LITERALS), max_size=4))
    tree = st.dictionaries(
        st.sampled_from(["model", "data", "kd", "trainer", "run", "x"]),
        st.one_of(LITERALS, st.dictionaries(st.sampled_from(["seed", "source", "steps", "student", "y"]), LITERALS)),
    )
    text = draw(st.one_of(st.none(), st.none(), texts(False), tree.map(yaml.safe_dump), tree.map(lambda t: f"{t}")))
    return flags, text


def check_commands(case: tuple[list[tuple[str, str]], str | None], folder: Path) -> None:
    flags, text = case
    args = [f"--{key}={value}" for key, value in flags]
    assume(not any("\0" in arg for arg in args))  # a shell cannot pass it
    if text is not None:
        (folder / "x.yaml").write_bytes(text.encode())
        args.insert(0, f"--config={folder / 'x.yaml'}")
    # a fit that cannot start: everything up to the text is checked
    args += [f"--run={folder / 'run'}", "--data.source=no/such/*.txt", "--trainer.accelerator=cpu"]
    code, err = called(["fit", *args], folder)
    assert code in (1, 2), (code, err)
    assert_one_error(err)


def called(args: list[str], folder: Path) -> tuple[int, str]:
    """Runs the real command in this process; returns exit code and error output."""
    err, before = io.StringIO(), os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            return cli.main(args), err.getvalue()
    except SystemExit as stop:  # jsonargparse's own way out
        return int(stop.code or 0), err.getvalue()
    finally:
        os.chdir(before)


def assert_one_error(err: str) -> None:
    problems = re.search(r"(?:^error: .{6,}\n)+\Z", err, re.MULTILINE)  # a line each, and nothing after them
    assert problems, err
    assert err.count("error: ", 0, problems.start()) == 0, err


# --- runs of one or two steps ---

LLAMA = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
FAMILIES = {
    "llama": LLAMA,
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "gpt_neox": LLAMA,
    "qwen3": {**LLAMA, "num_key_value_heads": 1, "head_dim": 8},
    "phi": LLAMA,
    "opt": {**LLAMA, "ffn_dim": 24, "word_embed_proj_dim": 16},
}  # fmt: skip


def often(good: list[Any], rare: list[Any]) -> SearchStrategy[Any]:
    """One of the good values, or in one of twelve cases a rare one."""
    return st.integers(0, 11).flatmap(lambda lot: st.sampled_from(rare if lot == 5 and rare else good))


OPTIONS: dict[str, SearchStrategy[Any]] = {
    "trainer.max_steps": st.integers(1, 2),
    "trainer.val_check_interval": often([1, 2, 5, 0.5, 1.0], [0, 2.5]),
    "trainer.log_every_n_steps": often([1, 2, 50], [0]),
    "trainer.precision": often(["32-true", "bf16-mixed", "bf16-true"], ["8"]),
    "trainer.gradient_clip_val": often([0.0, 1.0, 1e-6, "null"], [-1.0]),
    "data.block_size": often([2, 3, 8, 17, 32], [1, 4096]),
    "data.global_batch_size": often([1, 2, 4, 6], [5, 0]),
    "data.micro_batch_size": often([1, 2], [4]),
    "data.val_fraction": often([0.3, 0.5, 0.9], [1e-9, 0.0, 1.0]),
    "data.val_rows": often(["null", 1, 3], [0]),
    "data.seed": st.integers(0, 2**40),
    "data.isolate_documents": st.booleans(),
    "data.num_workers": often([0], [1]),
    "data.source_column": often(["null"], ["kind", "missing"]),
    "model.compile": st.just(False),
    "model.activation_checkpointing": st.booleans(),
    "model.accuracy": st.sampled_from(["accurate", "fast"]),
    "model.logits_budget_gib": often([2.0, 1e-9, 1e-4], [0.0]),
    "model.teacher_temperature": often([1.0, 0.1, 4.0], [0.0]),
    "model.optim.lr": often([1e-3, 0.1, 1e-9], [-1.0]),
    "model.optim.schedule": st.sampled_from(["cosine", "wsd"]),
    "model.optim.warmup_steps": often([0, 1], [3]),
    "model.optim.decay_steps": often(["null", 0, 1], [2]),
    "model.optim.weight_decay": often([0.0, 0.1], []),
    "model.optim.min_lr_ratio": st.floats(0, 1),
    "model.student.dtype": often(["null", "float32"], ["bfloat16"]),
    "model.student.attention": often(["null", "sdpa", "eager"], ["none_such"]),
    "kd.weight": often([0.0, 0.667, 1.0], [1.5]),
    "kd.steps": often(["null", 0, 1, 2], [3]),
    "kd.anneal_steps": often([0, 0, 1], [2]),
    "kd.shape": often(["step"], ["linear", "linear_ratio", "cosine"]),
    "checkpoint.every_n_steps": often(["null", 1, 2], [0]),
    "checkpoint.keep": often(["null", 1], []),
    "seed_everything": often([0, 1, 2**31], []),
}


@st.composite
def runs(draw: Any) -> tuple[dict[str, Any], list[tuple[str, Any]], str]:
    """Settings, documents, and the kind of teacher, if any."""
    chosen = draw(st.lists(st.sampled_from(sorted(OPTIONS)), unique=True, min_size=2, max_size=14))
    given = {name: draw(OPTIONS[name]) for name in chosen}
    family = draw(st.sampled_from(sorted(FAMILIES)))
    given |= {"model.student.family": family, "model.student.config": FAMILIES[family]}
    kinds = st.sampled_from(["web", "a/b", "\ud800", "c\nd", "", None, "ü", "\0"])
    docs = draw(st.lists(st.tuples(texts(True).map(lambda text: text[:2000]), kinds), min_size=1, max_size=30))
    return given, docs, draw(st.sampled_from(["ckpt", "folder", "none"]))


@cache
def equipment() -> dict[str, str]:
    """Makes a tokenizer, and a teacher as our checkpoint and as a Hugging Face folder; returns their paths."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    tokenizer("merges").save_pretrained(folder / "tokenizer")
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": f"the teacher {i}"}) + "\n" for i in range(200)))
    small = {"kd.weight": 0.0, "data.source": str(folder / "x.jsonl"), "data.val_fraction": 0.5, "data.block_size": 64}
    code, err = called(["fit", *arguments(base(folder), small)], folder)
    assert code == 0, err
    checkpoint = folder / "run/checkpoints/step-00000001.ckpt"
    code, err = called(["export", str(checkpoint), str(folder / "exported")], folder)
    assert code == 0, err
    return {"tokenizer": str(folder / "tokenizer"), "ckpt": str(checkpoint), "folder": str(folder / "exported")}


def base(folder: Path) -> dict[str, Any]:
    return {
        "run": str(folder / "run"),
        "model.student.config": FAMILIES["llama"],
        "data.tokenizer": str(folder / "tokenizer"),
        "data.source": str(folder / "text.jsonl"),
        "data.cache_dir": str(folder / "cache"),
        "data.block_size": 16,
        "data.global_batch_size": 2,
        "data.micro_batch_size": 1,
        "data.val_fraction": 0.5,
        "data.prepare_workers": 1,
        "trainer.max_steps": 1,
        "trainer.val_check_interval": 1,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": False,
    }


def check_steps(case: tuple[dict[str, Any], list[tuple[str, Any]], str], folder: Path) -> None:
    given, docs, teacher = case
    tools = equipment()
    with open(folder / "text.jsonl", "w") as out:
        out.writelines(json.dumps({"text": text, "kind": kind}) + "\n" for text, kind in docs)
    own = {"data.tokenizer": tools["tokenizer"], "kd.weight": 0.0 if teacher == "none" else 0.5}
    if teacher != "none":
        own["model.teacher.path"] = tools[teacher]
    whole = base(folder) | own | given
    code, err = called(["fit", *arguments(whole)], folder)
    note(err[-3000:])
    if code == 0:
        logged = scalars(folder / "run")
        assert logged["train/loss"], "no loss"
        assert all(math.isfinite(value) for curve in logged.values() for value in curve.values()), logged
        assert (folder / f"run/checkpoints/step-{int(whole['trainer.max_steps']):08d}.ckpt").is_file()
        assert "error" not in err
    else:
        assert code == 2, (code, err)
        assert_one_error(err)
        assert not list((folder / "run").glob("checkpoints/*"))


# --- the campaign ---

PARTS: dict[str, tuple[SearchStrategy[Any], Callable[[Any, Path], None]]] = {
    "documents": (cases(), check_documents),
    "broken": (broken(), check_broken),
    "killed": (st.tuples(cases(), st.integers(1, 12), st.booleans()), check_killed),
    "settings": (constructed(), check_settings),
    "commands": (commands(), check_commands),
    "steps": (runs(), check_steps),
}


def property_of(
    part: str, num_cases: int, number: int | None, shrink: bool = False
) -> tuple[Callable[[], None], list[int]]:
    """A function that tries a property on `num_cases` cases, and the list that counts them.

    With `number` None the cases are always the same.
    """
    strategy, check = PARTS[part]
    tried: list[int] = []

    @settings(
        max_examples=num_cases,
        derandomize=number is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, *[Phase.shrink] * shrink],
    )
    @given(case=strategy)
    def try_one(case: Any) -> None:
        tried.append(1)
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        try:
            check(case, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    return (try_one if number is None else seed(number)(try_one)), tried


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS), action="append")
    parser.add_argument("--cases", type=int, help="number of cases of each part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shrink", action="store_true", help="reduce a failing case to its smallest form, which takes minutes"
    )
    args = parser.parse_args()
    failed = 0
    for part in args.only or PARTS:
        began, left, count, number = time.monotonic(), args.cases or CASES[part], 0, args.seed
        while left > 0:
            try_all, tried = property_of(part, min(left, 100), number, args.shrink)
            try:
                try_all()
            except Exception:
                failed += 1
                print(f"--- {part}, seed {number}\n{traceback.format_exc()[-6000:]}", flush=True)
            print(f"{part}: {count + len(tried)} cases", file=sys.stderr, flush=True)
            count, left, number = count + len(tried), left - 100, number + 1
        print(f"| {part} | {count} | {time.monotonic() - began:.0f} | {failed} failed so far |", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
