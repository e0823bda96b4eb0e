"""Documents -> tokens -> files: formats, errors, bytes per token, the cache and its failures."""

import errno
import gzip
import io
import json
import logging
import lzma
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import alive
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from salt_lightning.data import SALTDataModule
from salt_lightning.errors import ConfigError, MachineError, say
from salt_lightning.hugging_face.token_ids import emitted_ids
from salt_lightning.text import documents, journal, parse, prepare, processes, progress
from salt_lightning.text import tokenizer as tokenizer_module
from salt_lightning.text.documents import Corpus, read_raw, utf8
from salt_lightning.text.encoder import token_bytes
from salt_lightning.text.examples import Examples
from salt_lightning.text.journal import making
from salt_lightning.text.parse import lots
from salt_lightning.text.prepare import look_inside, prepare_tokenizer, prepare_tokens, token_folder, tokenizer_folder
from salt_lightning.text.progress import Done, Progress, progress_line, summary_line
from salt_lightning.text.sources import Group, Hub, resolve
from salt_lightning.text.token_files import Block, SplitWriter, TokenFiles, no_counts, sealed, verify
from salt_lightning.text.tokenizer import (
    beginning,
    beginnings,
    changed_words,
    in_pieces,
    load_tokenizer,
    pieces,
    rules_fingerprint,
    spelled_ids,
    tokenizer_fingerprint,
)

TEXTS = [
    "The first document.\nIt has two lines.",
    "Zweites Dokument: äöü ß €",
    "third 😀😀 日本語",
    "x = [1, 2]\n\tend",
]


def byte_tokenizer(vocab: int = 256, gap: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: ids are bytes, so any text comes back; EOS is the last id.

    `gap`: no token has an id between those of the bytes and EOS.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    rest = {"<|endoftext|>": vocab} if gap else {f"<unused{i}>": i for i in range(256, vocab)}
    words = {letter: i for i, letter in enumerate(letters)} | rest
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def write_jsonl(path: Path, rows: list, opener=open) -> Path:
    with opener(path, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def corpus_of(*sources: str | Path, hub: Hub | None = None, **columns: str | bool) -> Corpus:
    entries = [str(source) for source in sources]
    return Corpus("--data.source", resolve("--data.source", entries, hub or Hub()), **columns)


def stored(folder: Path, split: str, tokenizer) -> list[tuple[str, str]]:
    """(text, source) of every document in a prepared split."""
    files = TokenFiles(folder, split)
    starts = [0, *files.doc_ends[:-1]]
    found = []
    for start, end, source in zip(starts, files.doc_ends, files.doc_sources, strict=True):
        assert files.tokens[end - 1] == files.eos_id
        assert (files.tokens[start : end - 1] != files.eos_id).all()
        found.append((tokenizer.decode(files.tokens[start : end - 1].tolist()), files.manifest["sources"][source]))
    return found


# --- formats ---


def texts_folder(folder: Path) -> list[str]:
    for i, text in enumerate(TEXTS):
        file = folder / "books" / ("part" if i % 2 else ".") / f"{i}.{['txt', 'md', 'py', 'rst'][i]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / "books" / ".hidden").write_text("hidden")
    (folder / "books" / "__pycache__").mkdir()
    (folder / "books" / "__pycache__" / "x.pyc").write_bytes(b"\xff\xfe")
    return [str(folder / "books")]


def texts_glob(folder: Path) -> list[str]:
    texts_folder(folder)
    (folder / "books" / "other.csv").write_text("not,this")
    return [str(folder / "books" / "**" / "[0-9].*")]


def jsonl(folder: Path) -> list[str]:
    return [str(write_jsonl(folder / "books.jsonl", [{"id": i, "text": t} for i, t in enumerate(TEXTS)]))]


def jsonl_with_changing_fields(folder: Path) -> list[str]:
    rows: list[dict] = [{"text": text, f"only{i}": i} for i, text in enumerate(TEXTS)]
    rows[1:1] = [{"text": None}, {"text": "  \n"}, {"text": ""}]
    return [str(write_jsonl(folder / "books.jsonl", rows))]


def jsonl_gz(folder: Path) -> list[str]:
    return [str(write_jsonl(folder / "books.jsonl.gz", [{"text": t} for t in TEXTS], gzip.open))]


def jsonl_xz_named_json(folder: Path) -> list[str]:
    return [str(write_jsonl(folder / "books.json.xz", [{"text": t} for t in TEXTS], lzma.open))]


def texts_of_windows(folder: Path) -> list[str]:
    for i, text in enumerate(TEXTS):
        (folder / "books").mkdir(exist_ok=True)
        (folder / "books" / f"{i}.txt.gz").write_bytes(gzip.compress(text.replace("\n", "\r\n").encode()))
    return [str(folder / "books")]


def parquet(folder: Path) -> list[str]:
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), folder / "books.parquet", row_group_size=2)
    return [str(folder / "books.parquet")]


def brackets_in_a_name(folder: Path) -> list[str]:
    (folder / "books1").mkdir()
    write_jsonl(folder / "books1" / "a1.jsonl", [{"text": "not this one"}])
    (folder / "books").mkdir()
    return [str(write_jsonl(folder / "books" / "a[1].jsonl", [{"text": t} for t in TEXTS]).parent)]


def hub_layout(folder: Path) -> list[str]:
    (folder / "books" / "data").mkdir(parents=True)
    for split, texts in (("train", TEXTS), ("validation", ["held out"])):
        pq.write_table(pa.table({"text": texts}), folder / "books" / "data" / f"{split}-00000-of-00001.parquet")
    (folder / "books" / "notes.txt").write_text("not this")
    return [str(folder / "books")]


FORMATS = [
    texts_folder, texts_glob, texts_of_windows, jsonl, jsonl_with_changing_fields, jsonl_gz, jsonl_xz_named_json,
    parquet, brackets_in_a_name, hub_layout,
]  # fmt: skip


@pytest.mark.parametrize("layout", FORMATS)
def test_every_format_gives_the_same_documents(layout, tmp_path):
    tokenizer = byte_tokenizer()
    folder = prepare_tokens(corpus_of(*layout(tmp_path)), tokenizer, 0.0, tmp_path / "cache", 1)
    found = stored(folder, "train", tokenizer)
    assert sorted(text for text, _ in found) == sorted(TEXTS)
    assert {source for _, source in found} == {"books"}
    assert TokenFiles(folder, "val").num_tokens == 0


def test_list_of_sources_keeps_their_order_and_names(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = write_jsonl(tmp_path / "a" / "same.jsonl", [{"text": "one"}])
    second = write_jsonl(tmp_path / "b" / "same.jsonl", [{"text": "two"}])
    (tmp_path / "other.txt").write_text("three")
    tokenizer = byte_tokenizer()
    corpus = corpus_of(second, first, tmp_path / "*.txt", tmp_path / "other.txt")
    found = stored(prepare_tokens(corpus, tokenizer, 0.0, tmp_path / "cache", 1), "train", tokenizer)
    expected = [("two", str(second)), ("one", str(first)), ("three", tmp_path.name), ("three", "other")]
    assert found == expected


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_source_column(kind, tmp_path):
    rows = [{"body": text, "kind": source} for text, source in zip(TEXTS, ["web", "code", "web", None], strict=True)]
    path = tmp_path / f"x.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    tokenizer = byte_tokenizer()
    corpus = corpus_of(path, text_column="body", source_column="kind")
    found = stored(prepare_tokens(corpus, tokenizer, 0.0, tmp_path / "cache", 1), "train", tokenizer)
    assert found == list(zip(TEXTS, ["web", "code", "web", "(none)"], strict=True))


def test_hub_data_set_is_read_by_name_and_split(tmp_path):
    (name,) = hub_layout(tmp_path)
    group = Group("books", "hub", hub_name=name, hub=Hub(split="validation"))
    rows = [raw.rows for raw in read_raw(Corpus("--data.source", (group,)))]
    assert rows == [["held out"]]
    part = Group("books", "hub", hub_name=name, hub=Hub(split="train[1:3]"))
    assert [raw.rows for raw in read_raw(Corpus("--data.source", (part,)))] == [TEXTS[1:3]]
    with pytest.raises(ConfigError, match=r"--data.text_column: no column 'body' in .*; there are: text$"):
        list(read_raw(Corpus("--data.source", (group,), text_column="body")))


def test_hub_name_is_tried_where_no_file_matches():
    assert resolve("--data.source", ["owner/name"], Hub("test", "en", "abc")) == (
        Group("name", "hub", hub_name="owner/name", hub=Hub("test", "en", "abc")),
    )


def test_text_that_spells_the_end_token_is_text(tmp_path):
    text = "before <|endoftext|> after"
    write_jsonl(tmp_path / "x.jsonl", [{"text": text}])
    tokenizer = byte_tokenizer()
    folder = prepare_tokens(corpus_of(tmp_path / "x.jsonl"), tokenizer, 0.0, tmp_path / "cache", 1)
    assert stored(folder, "train", tokenizer) == [(text, "x")]


def test_a_tokenizer_that_is_set_to_cut_and_to_pad_does_neither(tmp_path):
    (tmp_path / "x.txt").write_text("more than four")
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=20)
    folder = prepare_tokens(corpus_of(tmp_path / "x.txt"), tokenizer, 0.0, tmp_path / "cache", 1)
    assert stored(folder, "train", tokenizer) == [("more than four", "x")]


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a\\ud800b"}\n')
    tokenizer = byte_tokenizer()
    for fraction, split in ((0.0, "train"), (1.0, "val")):
        folder = prepare_tokens(corpus_of(tmp_path / "x.jsonl"), tokenizer, fraction, tmp_path / "cache", 1)
        assert stored(folder, split, tokenizer) == [("a?b", "x")]


def bos_tokenizer(marks: str) -> PreTrainedTokenizerFast:
    """Like Llama 3's and Gemma's: `marks` are put around every text."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    known = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<|endoftext|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(marks, special_tokens=known)
    return tokenizer


@pytest.mark.parametrize("marks", ["<s> $A", "<s> $A <|endoftext|>"])
def test_documents_begin_as_the_tokenizer_begins_a_text(tmp_path, marks):
    write_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in ("ab", "", "é<s>", "c")])
    tokenizer, cache = bos_tokenizer(marks), tmp_path / "cache"
    files = TokenFiles(prepare_tokens(corpus_of(tmp_path / "x.jsonl"), tokenizer, 1.0, cache, 1), "val")
    ends = [0, *files.doc_ends.tolist()]
    texts = [tokenizer.decode(files.tokens[a:b].tolist()) for a, b in pairwise(ends)]
    assert texts == ["<s>ab<|endoftext|>", "<s>é<s><|endoftext|>", "<s>c<|endoftext|>"]  # the second <s> is text
    bos = tokenizer.bos_token_id
    assert np.flatnonzero(files.tokens == bos).tolist() == ends[:-1]
    assert np.add.reduceat(files.token_bytes, ends[:-1]).tolist() == [2, 5, 1]
    assert files.token_bytes[files.tokens == bos].tolist() == [0, 0, 0]
    assert emitted_ids(tokenizer)[bos] == "<s>"
    assert bos not in emitted_ids(byte_tokenizer())


def letters_only(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of four letters, that puts <s> before every text; its model has <s> and </s> among its words."""
    words = {"<s>": 0, "</s>": 1, "[?]": 2, **{letter: 3 + i for i, letter in enumerate("ACGT")}}
    model = {
        "word level": lambda: models.WordLevel(words, unk_token="[?]"),
        "word piece": lambda: models.WordPiece(words, unk_token="[?]"),
        "no unknown": lambda: models.WordLevel(words),
        "whole words": lambda: models.BPE(words, [], ignore_merges=True),
    }[kind]()
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    unknown = {} if kind == "no unknown" else {"unk_token": "[?]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **unknown)


@pytest.mark.parametrize(
    ("kind", "ids"),
    [("word level", [0, 3, 2, 5, 1]), ("word piece", [0, 3, 2, 5, 1]), ("whole words", [0, 3, 5, 1])],
)
def test_a_special_token_that_is_spelled_out_is_text_to_every_model(tmp_path, kind, ids):
    write_jsonl(tmp_path / "x.jsonl", [{"text": "A </s> G"}])
    tokenizer = letters_only(kind)
    assert tokenizer("A </s> G").input_ids == [0, 3, 1, 5]  # premise
    files = TokenFiles(prepare_tokens(corpus_of(tmp_path / "x.jsonl"), tokenizer, 1.0, tmp_path / "cache", 1), "val")
    assert files.tokens.tolist() == ids


def test_a_special_token_that_is_also_a_letter_stays_what_it_was(tmp_path):
    """Hidden, it would vanish from the text, or end the command where nothing is left for unknown words."""
    tokenizer = letters_only("whole words")
    tokenizer.add_special_tokens({"pad_token": "T"})
    assert spelled_ids(tokenizer) == [0, 1]
    assert spelled_ids(letters_only("no unknown")) == []
    assert spelled_ids(letters_only("word piece")) == [0, 1]
    bert = letters_only("word piece")
    bert.backend_tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # which cuts at each < and >
    assert spelled_ids(bert) == []
    merging = models.BPE({"<": 0, "e": 1, "<e": 2, "<eos>": 3, "o": 4}, [("<", "e")], ignore_merges=True)
    assert spelled_ids(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(merging), eos_token="<eos>")) == [3]
    words = {"<": 0, "eos": 1, "<eos": 2, "<eosx": 3, "x": 4}
    part = models.BPE(words, [("<", "eos"), ("<eos", "x")], ignore_merges=True)
    assert spelled_ids(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(part), eos_token="<eos")) == []
    write_jsonl(tmp_path / "x.jsonl", [{"text": "A T"}])
    files = TokenFiles(prepare_tokens(corpus_of(tmp_path / "x.jsonl"), tokenizer, 1.0, tmp_path / "cache", 1), "val")
    assert files.tokens.tolist() == [0, 3, 6, 1]


def test_text_with_other_special_tokens_has_another_place_in_the_cache(tmp_path):
    """Though tokenizer.json is the same: the token for unknown text may be named beside it, and is not hidden then."""
    corpus, backend = (
        corpus_of(write_jsonl(tmp_path / "x.jsonl", [{"text": "A"}])),
        letters_only("whole words")._tokenizer,
    )
    backend.add_special_tokens(["[?]"])
    plain, named = (
        PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **unknown)
        for unknown in ({}, {"unk_token": "[?]"})
    )
    assert named.backend_tokenizer.to_str() == plain.backend_tokenizer.to_str()
    assert (spelled_ids(plain), spelled_ids(named)) == ([0, 1, 2], [0, 1])  # premise
    assert token_folder(corpus, named, 0.0, tmp_path) != token_folder(corpus, plain, 0.0, tmp_path)


def test_a_tokenizer_that_knows_no_word_of_english(tmp_path):
    """What it puts before a text is found without one, and no word that it drops is told as changed."""
    write_jsonl(tmp_path / "x.jsonl", [{"text": "A G"}])
    tokenizer = letters_only("no unknown")
    files = TokenFiles(prepare_tokens(corpus_of(tmp_path / "x.jsonl"), tokenizer, 1.0, tmp_path / "cache", 1), "val")
    assert files.tokens.tolist() == [0, 3, 5, 1]
    whole = letters_only("whole words")
    whole.backend_tokenizer.decoder = decoders.Fuse()
    assert changed_words(whole) == []
    assert beginning(whole) == [0]


@pytest.mark.parametrize(
    ("vocab", "gap", "dtype"), [(65535, False, "uint16"), (65536, False, "uint32"), (65536, True, "uint32")]
)
def test_ids_take_two_bytes_where_they_fit(vocab, gap, dtype, tmp_path):
    (tmp_path / "x.txt").write_text("abc")
    tokenizer = byte_tokenizer(vocab, gap)
    assert tokenizer.eos_token_id == vocab
    files = TokenFiles(prepare_tokens(corpus_of(tmp_path / "x.txt"), tokenizer, 0.0, tmp_path / "cache", 1), "train")
    assert files.tokens.dtype == dtype
    assert files.tokens[-1] == vocab


# --- errors: one line that names the cause ---


LATIN_1 = "gut\nschön".encode("latin-1")
CUT_OFF = gzip.compress(b'{"text": "abc"}\n' * 9, mtime=0)[:-9]
OTHER_COLUMNS = b'{"id": 1, "content": "x"}\n'
BAD_FILES = [
    (
        "x.jsonl",
        b'{"text": " "}\n{"text": null}\n\n',
        r"--data.source: no document with text in \S+x.jsonl; check the files and --data.text_column",
    ),
    (
        "x.jsonl",
        OTHER_COLUMNS,
        r"--data.text_column: no column 'text' in .*/x.jsonl: line 1; there are: id, content; use -",
    ),
    (
        "x.jsonl",
        b'{"text": 17}\n',
        r"--data.text_column: 'text' of .*/x.jsonl: line 1 holds int, not text; name a column with text; u",
    ),
    ("x.jsonl", b'["text"]\n', r"""--data.source: .*x.jsonl: line 1 is not a JSON object but '\["text"\]"""),
    ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"--data.source: .*x.jsonl: line 2 is not UTF-8 text"),
    ("x.jsonl", b"[" * 200_000, r"--data.source: .*x.jsonl: line 1 is not JSON \(.*(recursion|Stack overflow)"),
    (
        "x.jsonl",
        b'{"text": "a"}\n\n{"text": "b"\n',
        r"--data.source: .*x.jsonl: line 3 is not JSON \(Expecting ','",
    ),
    ("x.txt", b" \n", r"--data.source: no document with text in \S+/x.txt; check the files$"),
    ("x.txt", LATIN_1, r"--data.source: .*x.txt: line 2 is not UTF-8 text"),
    ("x.txt", "a text".encode("utf-16-le"), r"--data.source: \S+/x.txt has a NUL in more than 1 of 10 bytes, .*; conv"),
    (
        "x.jsonl.gz",
        CUT_OFF,
        r".*x.jsonl.gz: cannot be read \(.*\); get a whole copy of it, or leave it out of",
    ),
    (
        "x.jsonl.gz",
        b'{"text": "a"}',
        r".*x.jsonl.gz: cannot be read .*; its first bytes are not those of a .gz file; ren",
    ),
    (
        "x.parquet",
        b"PAR1 no",
        r"--data.source: .*x.parquet: cannot be read \(.*\); get a whole copy of it, or leave it",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_input_is_one_clear_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        prepare_tokens(corpus_of(tmp_path / name), byte_tokenizer(), 0.0, tmp_path / "cache", 1)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("examples", [Examples(), Examples(prompt="{text}", response="b")])
def test_a_row_of_a_table_without_text_is_found_behind_other_files_and_rows(examples, tmp_path):
    for name, rows in {"a": ["text"], "b": [None] * 299 + [[1]]}.items():
        pq.write_table(pa.table({"text": rows}), tmp_path / f"{name}.parquet")
    corpus = replace(corpus_of(tmp_path), examples=examples)
    with pytest.raises(ConfigError, match=rf"^--data.*{tmp_path}/b.parquet: row 300( holds list, not text; name a|$)"):
        prepare_tokens(corpus, byte_tokenizer(), 0.0, tmp_path / "cache", 1)


def test_a_text_with_few_nuls_is_text_and_one_with_many_can_be_left_out(tmp_path, caplog):
    texts = {"a": "\0" + "x" * 9, "b": "\0" + "x" * 8}  # one in ten, and one in nine
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    with caplog.at_level(logging.INFO):
        folder = prepare_tokens(corpus_of(tmp_path, skip_bad_lines=True), byte_tokenizer(), 0.0, tmp_path / "cache", 1)
    assert [text for text, _ in stored(folder, "train", byte_tokenizer())] == [texts["a"]]
    assert f"1 bad line left out (--data.bad_lines skip), first {tmp_path}/b.txt has a NUL in more than" in caplog.text


CUT = "x\n" * 32767 + "x\u00e9\n"  # the last character lies on both sides of the 64 KiB that are looked at


@pytest.mark.parametrize("text", [("\0" * 200 + "\n" + "x" * 3000), CUT, CUT.replace("\n", " ")])
def test_a_text_whose_beginning_is_no_text_alone_is_not_refused_by_it(text, tmp_path):
    (tmp_path / "a.txt").write_bytes(text.encode())
    look_inside({"source": corpus_of(tmp_path)}, lambda _: tmp_path / "none", 1)


def test_bytes_that_are_no_text_are_found_beforehand_on_any_line_of_a_short_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x\n" * 9 + b"\xff\n")
    with pytest.raises(ConfigError, match=r"^--data.source: \S+/a.txt: line 10 is not UTF-8 text"):
        look_inside({"source": corpus_of(tmp_path)}, lambda _: tmp_path / "none", 1)


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_bad_line_is_found_behind_other_files_and_tasks(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_RAW_CHARS", 200)
    good, bad = b'{"text": "abc"}\n', b'{"text": "ab\xff"}\n'
    for i in range(20):  # 16 bytes a line: several files in one task, and several tasks in one file
        (tmp_path / f"{i:02}.{suffix}").write_bytes(good * i + (bad if i == 17 else good))
    with pytest.raises(ConfigError, match=rf"^--data.source: .*/17.{suffix}: line 18 is not UTF-8 text"):
        prepare_tokens(corpus_of(tmp_path), byte_tokenizer(), 0.0, tmp_path / "cache", 1)


@pytest.mark.parametrize("folders_too", [False, True])
def test_empty_files_and_folders_alone_are_named(folders_too, tmp_path):
    (tmp_path / "x.txt").touch()
    (tmp_path / "folder").mkdir()
    name, message = ("fol*", "matches only folders, no file; ") if folders_too else ("x.txt", "holds no text: its fil")
    with pytest.raises(ConfigError, match=rf"^--data.source: '{re.escape(str(tmp_path / name))}' {message}"):
        corpus_of(tmp_path / name)


def test_bad_lines_are_left_out_and_counted(tmp_path, monkeypatch, caplog):
    """Beside what is refused otherwise: the good lines, as if the bad ones had never been there; also after a kill."""
    good = [json.dumps({"text": f"text {i} " * 10 + "<|endoftext|>"}).encode() for i in range(45)]
    bad = [b'{"text": "cut', b"[1]", b'{"text": "\xff"}', b'{"body": "x"}', b'{"text": 1}', b"["]
    lines = [line for i, line in enumerate(good) for line in ([bad[i // 7], line] if i % 7 == 6 else [line])]
    (tmp_path / "good").mkdir()
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "good" / "x.jsonl").write_bytes(b"\n".join(good))
    (tmp_path / "y.txt").write_bytes(LATIN_1)
    first = f"{tmp_path}/x.jsonl: line 7 is not JSON (Invalid control character at)"
    small_steps(monkeypatch)
    tokenizer, corpus = byte_tokenizer(), corpus_of(tmp_path / "x.jsonl", tmp_path / "y.txt", skip_bad_lines=True)
    cache = tmp_path / "cache"

    def run():
        die_at("add", 4)
        prepare_tokens(corpus, tokenizer, 0.0, cache, 2)

    child = in_fork(run)
    child.join(timeout=30)
    assert child.exitcode == -signal.SIGKILL
    with caplog.at_level(logging.INFO):
        folder = prepare_tokens(corpus, tokenizer, 0.0, cache, 2)
        assert prepare_tokens(corpus, tokenizer, 0.0, cache, 2) == folder
    assert "resumed after" in caplog.text
    said = f"--data.source: 7 bad lines left out (--data.bad_lines skip), first {first}"
    assert [record.message for record in caplog.records].count(said) == 2  # each time, also from the cache
    assert "without text" not in caplog.text  # such are another kind
    assert TokenFiles(folder, "train").manifest["spelled"]["train"]["<|endoftext|>"] == 45
    expected = prepare_tokens(corpus_of(tmp_path / "good" / "x.jsonl"), tokenizer, 0.0, tmp_path / "other", 1)
    manifests = [json.loads((f / "manifest.json").read_text()) for f in (folder, expected)]
    assert [m["skipped"] for m in manifests] == [{"lines": 7, "first": first}, {"lines": 0, "first": ""}]
    assert stored(folder, "train", tokenizer) == stored(expected, "train", tokenizer)
    assert len(stored(folder, "train", tokenizer)) == 45
    refusing = corpus_of(tmp_path / "x.jsonl", tmp_path / "y.txt")
    assert token_folder(refusing, tokenizer, 0.0, cache) != folder
    with pytest.raises(
        ConfigError, match=re.escape(f"--data.source: {first}; write one object per line, or use --data")
    ):
        prepare_tokens(refusing, tokenizer, 0.0, cache, 1)


def test_where_every_line_is_bad_the_first_is_named(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"body": "x"}] * 3)
    message = (
        r"^--data.source: no document with text in \S+: 3 bad lines left out .*: no column 'text' in .*line 1; there"
    )
    for prepare_it in (
        lambda corpus: prepare_tokens(corpus, byte_tokenizer(), 0.0, tmp_path / "cache", 1),
        lambda corpus: prepare_tokenizer(corpus, 300, 0.0, tmp_path / "cache"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare_it(corpus_of(path, skip_bad_lines=True))


def test_a_byte_order_mark_is_no_fault(tmp_path):
    """In each file: both are read in one task."""
    for name in "xy":
        (tmp_path / f"{name}.jsonl").write_bytes(f'\ufeff{{"text": "{name * 3}"}}\n'.encode())
    tokenizer = byte_tokenizer()
    folder = prepare_tokens(corpus_of(tmp_path / "?.jsonl"), tokenizer, 0.0, tmp_path / "cache", 1)
    assert [text for text, _ in stored(folder, "train", tokenizer)] == ["xxx", "yyy"]


@pytest.mark.parametrize("source", ["no/such/*.txt", "no/such/folder/x", "corpus.jsonl", "text.md"])
def test_source_that_matches_nothing(source):
    with pytest.raises(ConfigError, match=f"^--data.source: '{re.escape(source)}' matches no file; give a file"):
        corpus_of(source)


@pytest.mark.parametrize("where", ["text", "source", "messages"])
def test_a_row_of_parquet_that_is_no_utf8_is_named_and_can_be_left_out(where, tmp_path, monkeypatch):
    """pyarrow checks no text that it reads: a wrong write leaves such rows in files that are whole."""
    monkeypatch.setattr(documents, "_RAW_CHARS", 60)
    monkeypatch.setattr(documents, "_TABLE_ROWS", 3)
    good = [f"text {i}" for i in range(20)]
    spoilt = pa.array([b"ab\xff" if i == 16 else text.encode() for i, text in enumerate(good)]).view(pa.string())
    columns = {"text": good, "source": ["s"] * 20, where: spoilt}
    options = {"source_column": "source"}
    if where == "messages":
        roles = pa.array(["user", "assistant"] * 10)
        turns = pa.StructArray.from_arrays([roles, spoilt], ["role", "content"])
        columns["messages"] = pa.ListArray.from_arrays(pa.array(range(0, 21, 2), pa.int32()), turns)
        columns |= {"text": good[:10], "source": ["s"] * 10}
        options |= {"examples": Examples(messages="messages")}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    corpus = corpus_of(tmp_path / "x.parquet", **options)
    row = 9 if where == "messages" else 17
    said = rf"^--data.source: {tmp_path}/x.parquet: row {row} is not UTF-8 text; fix that row, .* skip"
    with pytest.raises(ConfigError, match=said):
        [parse.documents(raw, corpus) for raw in read_raw(corpus)]
    corpus = replace(corpus, skip_bad_lines=True)
    read = [parse.documents(raw, corpus) for raw in read_raw(corpus)]
    assert sum(len(kept) for kept, _ in read) == len(columns["text"]) - 1
    assert [(s.lines, s.first) for _, s in read if s.lines] == [
        (1, f"{tmp_path}/x.parquet: row {row} is not UTF-8 text")
    ]
    if where == "text":
        assert [text for kept, _ in read for text, _ in kept] == good[:16] + good[17:]


def test_columns_of_parquet(tmp_path):
    pq.write_table(pa.table({"id": [1], "content": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"^--data.text_column: no column 'text' in .*; there are: id, content$"):
        list(read_raw(corpus_of(tmp_path / "x.parquet")))
    with pytest.raises(ConfigError, match=r"^--data.source_column: no column 'url' in .*; there are: id, content$"):
        list(read_raw(corpus_of(tmp_path / "x.parquet", text_column="content", source_column="url")))


def test_bad_input_is_found_while_the_tokenizer_is_trained(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text"\n')
    with pytest.raises(ConfigError, match=r"x.jsonl: line 2 is not JSON"):
        prepare_tokenizer(corpus_of(path), 300, 0.0, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_unknown_split_of_a_folder(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"^--data.split: no split 'dev' in '.*books'; there are: train, validation \(from its file names",
    ):
        corpus_of(*hub_layout(tmp_path), hub=Hub(split="dev"))


def test_hub_out_of_reach():
    expected = r"^--data.source: cannot read owner/name: .*; it is not a local file, folder or glob match either$"
    with pytest.raises(ConfigError, match=expected) as caught:
        list(read_raw(corpus_of("owner/name")))
    assert "\n" not in str(caught.value)


def test_too_many_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_SOURCES", 2)
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "url": i} for i in range(3)])
    with pytest.raises(ConfigError, match=r"^--data.source_column: 'url' has more than 2 values"):
        prepare_tokens(corpus_of(path, source_column="url"), byte_tokenizer(), 0.0, tmp_path / "cache", 1)
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", [{"text": "a"}]) for i in range(3)]
    monkeypatch.setattr(documents, "MAX_SOURCES", 2)
    with pytest.raises(ConfigError, match=r"^--data.source: 3 sources, more than 2 \(each entry is one;"):
        corpus_of(*paths)


# --- splits and workers ---


def many(tmp_path: Path, count: int = 400) -> Path:
    rng = random.Random(1)
    words = ["alpha", "beta", "gamma", "日本", "😀", "delta\n"]
    rows = [{"text": " ".join(rng.choices(words, k=rng.randint(1, 30))), "n": i} for i in range(count)]
    return write_jsonl(tmp_path / "many.jsonl", rows + rows[:50])


def test_split_is_drawn_by_the_text(tmp_path):
    tokenizer = byte_tokenizer()
    corpus = corpus_of(many(tmp_path))
    folder = prepare_tokens(corpus, tokenizer, 0.2, tmp_path / "cache", 1)
    train, val = ([text for text, _ in stored(folder, split, tokenizer)] for split in ("train", "val"))
    assert len(train) + len(val) == 450
    assert not set(train) & set(val)  # 50 documents are there twice
    # 20% of 400 distinct documents: 80, spread sqrt(400 * .2 * .8) = 8
    assert 80 - 5 * 8 < len(set(val)) < 80 + 5 * 8
    everything = prepare_tokens(corpus, tokenizer, 1.0, tmp_path / "cache", 1)
    assert TokenFiles(everything, "train").num_documents == 0
    assert {lots(utf8(text))[0] < 0.2 for text in val} == {True}


def test_number_of_processes_changes_nothing(tmp_path, monkeypatch):
    corpus, tokenizer = corpus_of(many(tmp_path)), byte_tokenizer()
    one = TokenFiles(prepare_tokens(corpus, tokenizer, 0.1, tmp_path / "one", 1), "val").manifest
    monkeypatch.setattr(documents, "_RAW_CHARS", 500)
    three = TokenFiles(prepare_tokens(corpus, tokenizer, 0.1, tmp_path / "three", 3), "val").manifest
    assert one == three  # with checksums of all files
    assert one["splits"]["train"]["documents"] > 300


# --- bytes per token ---


def reference_bytes(text: str, tokens: list[str]) -> list[int]:
    """By definition, for byte-level tokens: the tokens that end with a part of a character divide its bytes, the later
    ones getting what is left over; without such tokens, it belongs to the one that contains it."""
    ends = list(accumulate(len(token) for token in tokens))  # byte-level: one letter per byte
    counts, start = [0] * len(tokens), 0
    for character in text:
        size = len(character.encode())
        stop = start + size
        owners = [i for i, end in enumerate(ends) if start < end <= stop]
        owners = owners or [next(i for i, end in enumerate(ends) if end > stop)]
        for number, owner in enumerate(owners):
            counts[owner] += size * (number + 1) // len(owners) - size * number // len(owners)
        start = stop
    assert start == ends[-1]
    return counts


@given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("aé€😀 \n")), min_size=1, max_size=40))
def test_bytes_of_tokens_against_the_definition(text):
    tokenizer = byte_tokenizer().backend_tokenizer
    tokenizer.encode_special_tokens = True
    encoding = tokenizer.encode(text, add_special_tokens=False)
    counts = token_bytes(text, encoding.offsets)
    assert counts.tolist() == reference_bytes(text, encoding.tokens)
    assert token_bytes(text, encoding.offsets, encoding.tokens).tolist() == [len(each) for each in encoding.tokens]
    assert token_bytes(text, encoding.offsets, [*encoding.tokens, "x"]).tolist() == counts.tolist()
    assert counts.sum() == len(text.encode())


def test_bytes_where_a_tokenizer_drops_text():
    assert token_bytes("東京", [(0, 1)] * 3 + [(1, 2)] * 2).tolist() == [1, 1, 1, 1, 2]
    assert token_bytes("東", [(0, 0), (0, 1), (0, 0), (0, 1), (1, 1)]).tolist() == [0, 1, 0, 2, 0]  # marks have none
    # tokens "b" and "d" of "aäb cd€": what lies before a token's end counts for it, the rest for the last
    assert token_bytes("aäb cd€", [(2, 3), (5, 6)]).tolist() == [1 + 2 + 1, 1 + 1 + 1 + 3]
    assert token_bytes("xyz", [(0, 2), (0, 1), (2, 3)]).tolist() == [2, 0, 1]  # ends that decrease
    edges = "\x7f\x80\u07ff\u0800\uffff\U00010000"  # where UTF-8 needs a byte more
    assert token_bytes(edges, [(i, i + 1) for i in range(6)]).tolist() == [1, 2, 2, 3, 3, 4]


def test_bytes_of_a_split_are_the_bytes_of_its_texts(tmp_path):
    corpus, cache = corpus_of(many(tmp_path)), tmp_path / "cache"
    tokenizer = load_tokenizer(str(prepare_tokenizer(corpus, 270, 1e-9, cache)))
    files = TokenFiles(prepare_tokens(corpus, tokenizer, 1.0, cache, 2), "val")
    sizes = np.add.reduceat(files.token_bytes, [0, *files.doc_ends[:-1]])
    texts = [text for text, _ in stored(files.folder.parent, "val", tokenizer)]
    assert sizes.tolist() == [len(text.encode()) for text in texts]
    assert sizes.sum() == files.manifest["splits"]["val"]["text_bytes"]
    assert (files.token_bytes[files.doc_ends - 1] == 0).all()  # EOS
    # premise: an emoji is spread over several tokens somewhere
    offsets = [each.offsets for each in tokenizer.backend_tokenizer.encode_batch(texts)]
    assert any(one == other for each in offsets for one, other in pairwise(each))


def test_bytes_of_half_a_character_are_its_own(tmp_path):
    """A tokenizer of bytes merges the first two of the three of a Chinese character."""
    rng = random.Random(0)
    texts = ["".join(chr(0x4E00 + rng.randrange(300)) for _ in range(4)) for _ in range(200)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus, cache = corpus_of(str(tmp_path / "t.jsonl")), tmp_path / "cache"
    tokenizer = load_tokenizer(str(prepare_tokenizer(corpus, 270, 1e-9, cache)))
    files = TokenFiles(prepare_tokens(corpus, tokenizer, 1.0, cache, 1), "val")
    letters = [len(token) * (token != tokenizer.eos_token) for token in tokenizer.convert_ids_to_tokens(files.tokens)]
    assert 2 in letters
    assert files.token_bytes.tolist() == letters


# --- tokenizers ---


def test_trained_tokenizer_is_a_folder_for_transformers(tmp_path):
    corpus = corpus_of(many(tmp_path))
    folder = prepare_tokenizer(corpus, 270, 0.1, tmp_path / "cache")
    tokenizer = load_tokenizer(str(folder))
    assert len(tokenizer) == 270
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|endoftext|>"
    anything = "\x00 ünï©ode 😀\n\n\t\r"
    assert tokenizer.decode(tokenizer(anything, add_special_tokens=False)["input_ids"]) == anything
    again = prepare_tokenizer(corpus, 270, 0.1, tmp_path / "elsewhere")
    assert (again / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(load_tokenizer(str(again)))
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(byte_tokenizer())


def test_words_keep_their_vowel_signs_and_text_its_bytes(tmp_path):
    """GPT-2's rule, which cuts at each sign, makes at least seven tokens of the second word, however frequent it is."""
    words = ["हिन्दी", "विद्यालय", "กรุงเทพ", "မြန်မာ", "it's", "e\u0301te\u0301"]
    text = " ".join(words)
    rows = [json.dumps({"text": f"{text} {i}\r\n\t x₂  {text}"}) for i in range(50)]
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    corpus = corpus_of(tmp_path / "x.jsonl")
    tokenizer = load_tokenizer(str(prepare_tokenizer(corpus, 800, 0.0, tmp_path / "cache")))
    assert [len(tokenizer.encode(f" {word}", add_special_tokens=False)) for word in words] == [1, 1, 1, 1, 2, 1]
    odd = f"{text}\n\n  a\u0301b 12३ \u0000🙂‍↕️ '\u0301 {text} "
    assert tokenizer.decode(tokenizer.encode(odd, add_special_tokens=False)) == odd


def test_tokenizer_does_not_read_validation_documents(tmp_path):
    marked = [f"zq{i} " * 30 for i in range(40)]
    val = [text for text in marked if lots(utf8(text))[0] < 0.3]
    assert val
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in [*val, "plain words"]])
    assert lots(b"plain words")[0] >= 0.3
    for fraction, seen in ((0.3, False), (0.0, True)):
        tokenizer = load_tokenizer(str(prepare_tokenizer(corpus_of(path), 400, fraction, tmp_path / "cache")))
        assert any("zq" in token for token in tokenizer.get_vocab()) == seen


def test_a_tokenizer_is_trained_on_a_sample_of_all_of_a_large_text(tmp_path, monkeypatch):
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [{"text": f"{n}{i} " * 5} for i in range(400)]) for n in "ab"]
    corpus = corpus_of(*files)
    monkeypatch.setattr(tokenizer_module, "_TRAINING_BYTES", corpus.num_bytes() // 4)
    texts = list(tokenizer_module._training_texts(corpus, 0.0))
    for name in "ab":  # a quarter of each, and five standard deviations
        assert abs(sum(text.startswith(name) for text in texts) - 100) < 5 * 9


def test_samples_of_held_out_text_are_from_all_over_it():
    """Of two sources by turns, in documents of 100 tokens."""
    files = SimpleNamespace(
        doc_ends=100 * np.arange(1, 101), doc_sources=np.arange(100) % 2, manifest={"sources": ["a", "b"]}
    )
    for source, (_, at) in enumerate(beginnings(files)):
        docs, counts = np.unique(at // 100, return_counts=True)
        assert (docs % 2 == source).all()
        assert (docs.min(), docs.max() > 90, set(counts.tolist())) == (source, True, {100})


def test_a_document_that_leaves_no_token_leaves_nothing(tmp_path):
    tokenizer = letters_only("word level")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("T", "")
    write_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in "TAG"])
    files = TokenFiles(prepare_tokens(corpus_of(tmp_path / "x.jsonl"), tokenizer, 1.0, tmp_path / "cache", 1), "val")
    assert files.doc_lots.tolist() == [lots(letter)[0] for letter in (b"A", b"G")]
    assert files.manifest["splits"]["val"]["text_bytes"] == 2


def test_tokenizer_without_end_token_is_refused(tmp_path):
    tokenizer = byte_tokenizer()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match=r"^--data.tokenizer: '.*bare' has no eos_token"):
        load_tokenizer(str(tmp_path / "bare"))


def test_a_tokenizer_that_is_no_json_is_converted_first(tmp_path):
    (tmp_path / "tokenizer.model").write_text("not read without its package")
    with pytest.raises(ConfigError, match=r"; give what AutoTokenizer's save_pretrained makes of it with the packages"):
        load_tokenizer(str(tmp_path))


def test_missing_tokenizer_is_one_line():
    with pytest.raises(ConfigError, match=r"^--data.tokenizer: cannot load 'nobody/nowhere'") as caught:
        load_tokenizer("nobody/nowhere")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("acme/words@", "'acme/words@' lacks a name before the @ or a revision after it"),
        ("@v1", "'@v1' lacks a name before the @"),
        (
            "acme/words@v9",
            "cannot load 'acme/words@v9' (no such folder here; the hub is offline (HF_HUB_OFFLINE), and "
            "its cache here has no tokenizer of acme/words at v9)",
        ),
        ("acme/words", "its cache here has no tokenizer of acme/words at main)"),
    ],
)
def test_a_tokenizer_that_the_hubs_cache_lacks_is_named(name, said, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=f"{re.escape(said)}.*; give a folder, hub name or train$"):
        load_tokenizer(name)


# --- sizes of documents ---


@given(st.text(alphabet=st.sampled_from("ab .\n\tä日😀1'"), max_size=400))
def test_parts_of_an_enormous_document_are_the_document(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "_PIECE_CHARS", 40)
        parts = list(pieces(text))
    assert "".join(parts) == text
    assert all(0 < len(part) <= 40 for part in parts) or parts == [""]


def test_documents_are_encoded_in_batches_of_one_size(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_PIECE_CHARS", 40)
    docs = [(b"ten bytes.", 0.0, "x")] * 11
    assert [len(batch) for batch in in_pieces(docs)] == [4, 4, 3]


CL100K = (  # GPT-4, Llama 3 and Qwen: punctuation includes the line breaks after it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def bpe(texts: list[str], split: pre_tokenizers.PreTokenizer | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, words] if split else [words])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("rules", [None, pre_tokenizers.Split(Regex(CL100K), "isolated")], ids=["gpt2", "cl100k"])
def test_an_enormous_document_has_the_ids_of_the_whole(rules, split, tmp_path, monkeypatch):
    rng = random.Random(0)
    words = [" alpha", " beta", ", gamma", "\n\n\n", " 日本", "😀", "\tdelta();", "'s", "  12", " 345", "}\n", ");\n\n"]
    texts = ["".join(rng.choices(words, k=9000)), "short one", "".join(rng.choices(words, k=4000)), "a" * 3000]
    corpus = corpus_of(write_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in texts]))
    tokenizer, fraction = bpe(texts, rules), float(split == "val")
    whole = TokenFiles(prepare_tokens(corpus, tokenizer, fraction, tmp_path / "cache", 1), split)
    monkeypatch.setattr(tokenizer_module, "_PIECE_CHARS", 1000)
    assert len(list(pieces(texts[0]))) > 30
    parts = TokenFiles(prepare_tokens(corpus, tokenizer, fraction, tmp_path / "other", 1), split)
    np.testing.assert_array_equal(parts.doc_ends[:3], whole.doc_ends[:3])
    np.testing.assert_array_equal(parts.tokens[: whole.doc_ends[2]], whole.tokens[: whole.doc_ends[2]])
    # without a space it is cut anyway, and stays one document with the same text
    assert [text for text, _ in stored(parts.folder.parent, split, tokenizer)] == texts
    if split == "val":
        np.testing.assert_array_equal(parts.token_bytes[: whole.doc_ends[2]], whole.token_bytes[: whole.doc_ends[2]])


def test_many_tiny_documents_and_blank_lines_make_no_larger_tasks(tmp_path):
    lines = [b'{"text": "%d"}\n' % (i % 7) if i % 2 else b"\n" for i in range(200_000)]
    (tmp_path / "x.jsonl").write_bytes(b"".join(lines))
    (tmp_path / "blank.txt").write_bytes(b" \n" * 100)
    corpus = corpus_of(tmp_path / "x.jsonl", tmp_path / "blank.txt")
    assert max(raw.size for raw in read_raw(corpus)) < 2 * documents._RAW_CHARS
    files = TokenFiles(prepare_tokens(corpus, byte_tokenizer(), 0.0, tmp_path / "cache", 1), "train")
    assert files.num_documents == 100_000
    assert files.num_tokens == 200_000
    assert (np.diff(files.doc_ends) == 2).all()


# --- how far it is ---


def test_line_of_progress_by_hand():
    start = Done(100.0, documents=10, tokens=501_000, text_bytes=4_000_000, read_bytes=1_000)
    now = Done(110.0, documents=1_510, tokens=2_501_000, text_bytes=24_000_000, read_bytes=3_000)
    line = "tokenizing: 30%, 1.51k documents (150/s), 2.50M tokens (200k/s), 2.0 MB/s, 00:35 left"
    assert progress_line(start, now, 10_000) == line  # 2000 of 9000 bytes in 10 s
    assert progress_line(start, now, 0) == line.replace(" 30%,", "").replace(", 00:35 left", "")  # a hub tells no size
    read = Done(start.time_s, start.documents, None, start.text_bytes, start.read_bytes)
    line = progress_line(read, Done(now.time_s, now.documents, None, now.text_bytes, now.read_bytes), 10_000, "reading")
    assert line.startswith("reading: 30%, ")
    assert "tokens" not in line
    assert summary_line(start, now) == (
        "tokenized 1510 documents, 2501000 tokens, 24.0 MB of text in 10.0 s (2.0 MB/s), "
        "resumed after 10 documents of a stopped preparation"
    )


def test_a_terminal_shows_one_line_that_is_gone_in_the_end(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    start, soon, later = (Done(100.0 + s, int(10 * s), int(100 * s), int(1e6 * s), int(1e3 * s)) for s in (0, 0.4, 0.6))
    progress = Progress(1000, start)
    before = screen.getvalue()
    progress.update(soon)
    assert screen.getvalue() == before  # twice a second
    progress.update(later)
    line = progress_line(start, later, 1000)
    assert screen.getvalue().endswith(f"\r{line}")
    progress.close()
    assert screen.getvalue().rpartition(line)[2] == f"\r{' ' * len(line)}\r"


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.xz", "parquet", "txt"])
def test_progress_reaches_the_end_of_what_is_read(suffix, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "text"
    folder.mkdir()
    texts = [f"{i} {random.Random(i).random()} " * 40 for i in range(300)]
    for part in range(4):
        rows, file = texts[part::4], folder / f"{part}.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.table({"text": rows}), file)
        elif suffix == "txt":
            file.write_text("".join(rows))
        else:
            write_jsonl(file, [{"text": text} for text in rows], lzma.open if suffix.endswith("xz") else open)
    monkeypatch.setattr(progress, "_LOG_S", 0.0)
    monkeypatch.setattr(documents, "_RAW_CHARS", 5000)
    corpus = corpus_of(folder / f"0.{suffix}", folder / f"[1-3].{suffix}")
    with caplog.at_level(logging.INFO):
        folder = prepare_tokens(corpus, byte_tokenizer(), 0.1, tmp_path / "cache", 1)
    *lines, last = [record.message for record in caplog.records]
    shares = [int(re.match(r"tokenizing: (\d+)%, .* tokens .* left$", line)[1]) for line in lines]
    assert shares == sorted(shares)
    assert shares[0] <= 26
    assert shares[-1] == 100
    splits = TokenFiles(folder, "val").manifest["splits"]
    totals = [splits["train"][name] + splits["val"][name] for name in ("documents", "tokens")]
    assert last.startswith("tokenized {} documents, {} tokens, ".format(*totals))


# --- the cache ---


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_prepared_once(tmp_path, monkeypatch):
    corpus, cache = corpus_of(many(tmp_path)), tmp_path / "cache"
    tokenizer = load_tokenizer(str(prepare_tokenizer(corpus, 300, 0.1, cache)))
    prepare_tokens(corpus, tokenizer, 0.1, cache, 1)
    before = stamps(cache)
    for name in ("ordered_map", "in_child"):  # tokenizing or training again would call them
        monkeypatch.setattr(prepare, name, None)
    prepare_tokenizer(corpus, 300, 0.1, cache)
    prepare_tokens(corpus, load_tokenizer(str(tokenizer_folder(corpus, 300, 0.1, cache))), 0.1, cache, 1)
    assert stamps(cache) == before
    assert len(list(cache.iterdir())) == 2


def test_fingerprint_follows_every_input(tmp_path):
    path = many(tmp_path)
    cache, tokenizer = tmp_path / "cache", byte_tokenizer()
    seen = [token_folder(corpus_of(path), tokenizer, 0.1, cache)]
    assert token_folder(corpus_of(path), byte_tokenizer(), 0.1, cache) == seen[0]
    seen.append(token_folder(corpus_of(path), tokenizer, 0.2, cache))
    seen.append(token_folder(corpus_of(path), byte_tokenizer(257), 0.1, cache))
    lower = byte_tokenizer()  # same vocabulary, other ids for the same text
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert tokenizer_fingerprint(lower) == tokenizer_fingerprint(tokenizer)
    seen.append(token_folder(corpus_of(path), lower, 0.1, cache))
    seen.append(token_folder(corpus_of(path, text_column="n"), tokenizer, 0.1, cache))
    seen.append(token_folder(corpus_of(path, source_column="n"), tokenizer, 0.1, cache))
    seen.append(token_folder(corpus_of(path, path), tokenizer, 0.1, cache))
    hubs = [Hub(), Hub("test"), Hub(subset="en"), Hub(revision="abc")]
    groups = [Group("x", "hub", hub_name="owner/name", hub=hub) for hub in hubs]
    seen += [token_folder(Corpus("--data.source", (group,)), tokenizer, 0.1, cache) for group in groups]
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    seen.append(token_folder(corpus_of(path), tokenizer, 0.1, cache))
    stamp = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() + b"\n")
    os.utime(path, ns=(0, stamp))
    seen.append(token_folder(corpus_of(path), tokenizer, 0.1, cache))
    assert len(set(seen)) == len(seen)
    assert tokenizer_folder(corpus_of(path), 300, 0.1, cache) != tokenizer_folder(corpus_of(path), 301, 0.1, cache)


@pytest.mark.parametrize("how", ["longer", "gone", "of equal size"])
def test_file_that_changes_meanwhile_is_refused(how, tmp_path, monkeypatch):
    path, other, read = many(tmp_path), write_jsonl(tmp_path / "other.jsonl", [{"text": "abc"}]), prepare.read_raw

    def read_and_change(corpus):
        yield from read(corpus)
        if how == "gone":
            path.unlink()
        elif how == "of equal size":
            path.write_bytes(path.read_bytes().swapcase())
        else:
            with open(path, "a") as out:
                out.write('{"text": "late"}\n')

    monkeypatch.setattr(prepare, "read_raw", read_and_change)
    monkeypatch.setattr(prepare, "_JOURNAL_S", 0.0)
    with pytest.raises(ConfigError, match=r"^--data.source: files changed while they were read: \S*/many.jsonl; start"):
        prepare_tokens(corpus_of(other, path), byte_tokenizer(), 0.1, tmp_path / "cache", 1)
    assert list((tmp_path / "cache").iterdir()) == []


def test_file_that_changes_while_the_tokenizer_is_trained_is_named(tmp_path, monkeypatch):
    path, train = many(tmp_path), prepare.in_child

    def train_and_change(*args):
        train(*args)
        path.write_text('{"text": "other"}\n')

    monkeypatch.setattr(prepare, "in_child", train_and_change)
    with pytest.raises(ConfigError, match=r"^--data.source: files changed while they were read: \S*/many.jsonl; start"):
        prepare_tokenizer(corpus_of(path), 300, 0.1, tmp_path / "cache")
    assert list((tmp_path / "cache").glob("tokenizer-*")) == []


def test_a_prepared_folder_under_the_name_of_another_text_is_refused(tmp_path):
    cache = tmp_path / "cache"
    first, second = (write_jsonl(tmp_path / f"{text}.jsonl", [{"text": text}] * 3) for text in ("one", "two"))
    theirs = prepare_tokens(corpus_of(first), byte_tokenizer(), 0.0, cache, 1)
    ours = token_folder(corpus_of(second), byte_tokenizer(), 0.0, cache)
    shutil.copytree(theirs, ours)
    with pytest.raises(ConfigError, match=rf"{ours}/manifest.json belongs to {theirs.name}; delete {ours} to"):
        prepare_tokens(corpus_of(second), byte_tokenizer(), 0.0, cache, 1)


# --- killed, and started again ---


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def prepare_many(path: Path, cache: Path, workers: int = 2) -> Path:
    return prepare_tokens(corpus_of(path), byte_tokenizer(), 0.1, cache, workers)


def in_fork(function, *args) -> multiprocessing.Process:
    child = multiprocessing.get_context("fork").Process(target=function, args=args)
    child.start()
    return child


def small_steps(monkeypatch) -> None:
    """About 40 tasks, two or three at a time, and a journal entry after each."""
    monkeypatch.setattr(documents, "_RAW_CHARS", 500)
    monkeypatch.setattr(prepare, "_CHARS_PER_WORKER", 500)
    monkeypatch.setattr(prepare, "_JOURNAL_S", 0.0)


def die_at(function: str, call: int, pids=None) -> None:
    """In a child process: SIGKILL at the n-th call, after its block is written but before the journal entry."""
    owner = {"add": SplitWriter, "entry": SplitWriter, "write_json": prepare}[function]
    original, calls = getattr(owner, function), []

    def wrapped(self, *args):
        calls.append(1)
        if len(calls) == call:
            if function == "add":
                original(self, *args)
                self.sync()
            if pids is not None:
                pids.put(list_children())
                time.sleep(0.2)  # the queue sends in a thread
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args)

    setattr(owner, function, wrapped)


def list_children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def test_killed_anywhere_it_goes_on_to_the_same_files(tmp_path, monkeypatch, caplog):
    path, cache = many(tmp_path), tmp_path / "cache"
    expected = contents(prepare_many(path, tmp_path / "other"))  # in large steps
    small_steps(monkeypatch)

    def killed(function: str, call: int) -> dict:
        def run():
            die_at(function, call)
            prepare_many(path, cache)

        child = in_fork(run)
        child.join(timeout=30)
        assert child.exitcode == -signal.SIGKILL
        assert not [file.name for file in cache.iterdir() if file.name[0] != "."]  # nothing looks finished
        return json.loads(next(cache.glob(".*.partial/journal.json")).read_text())

    # in the text, twice; when all is written, before the checksums; behind them
    raws = [killed(*point)["num_raws"] for point in (("add", 9), ("add", 12), ("entry", 2), ("write_json", 1))]
    assert 3 < raws[0] < 12 < raws[1] < raws[2] == raws[3]  # the second had 12 calls, so went on from the first
    with caplog.at_level(logging.INFO):
        folder = prepare_many(path, cache)
    assert contents(folder) == expected
    assert list(cache.iterdir()) == [folder]
    assert re.search(r"tokenized 450 documents, .* resumed after 450 documents of a stopped preparation", caplog.text)


def test_kill_before_the_first_journal_and_no_worker_stays(tmp_path):
    path, cache = many(tmp_path), tmp_path / "cache"
    pids = multiprocessing.get_context("fork").Queue()

    def run():
        documents._RAW_CHARS = 500
        die_at("add", 3, pids)
        prepare_many(path, cache)

    child = in_fork(run)
    workers = pids.get(timeout=30)
    child.join(timeout=30)
    assert child.exitcode == -signal.SIGKILL
    assert len(workers) == 2
    deadline = time.time() + 10
    while any(alive(pid) for pid in workers) and time.time() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if alive(pid)]  # they end with their parent process
    folder = prepare_many(path, cache)
    assert list(cache.iterdir()) == [folder]
    assert TokenFiles(folder, "train").num_documents > 300


def stop_after(adds: int, monkeypatch) -> None:
    add, calls = SplitWriter.add, []

    def stop(self, *block):
        calls.append(1)
        if len(calls) > adds:
            raise KeyboardInterrupt
        add(self, *block)

    monkeypatch.setattr(SplitWriter, "add", stop)


def other_version(partial: Path, monkeypatch) -> None:
    monkeypatch.setattr(prepare, "version", lambda name: "0")


def shorter_file(partial: Path, monkeypatch) -> None:
    os.truncate(partial / "train" / "tokens.bin", 10)


def other_values(column: str):
    def change(partial: Path, monkeypatch) -> None:
        file = partial.parents[1] / "hub" / "data" / "train.parquet"
        values = pq.read_table(file).to_pydict()
        pq.write_table(pa.table(values | {column: ["other"] * 3 + values[column][3:]}), file)

    return change


@pytest.mark.parametrize(
    ("accident", "goes_on"),
    [(None, True), *((bad, False) for bad in (other_version, shorter_file, other_values("text"), other_values("of")))],
)
def test_a_journal_that_does_not_fit_is_not_followed(accident, goes_on, tmp_path, monkeypatch, caplog):
    (tmp_path / "hub" / "data").mkdir(parents=True)
    rows = pa.table({"text": [f"{i} " * 20 for i in range(900)], "of": ["one"] * 900})
    pq.write_table(rows, tmp_path / "hub" / "data" / "train.parquet")
    group = Group("x", "hub", hub_name=str(tmp_path / "hub"))  # its text may change and its fingerprint does not
    corpus, cache = Corpus("--data.source", (group,), source_column="of"), tmp_path / "cache"
    small_steps(monkeypatch)
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(KeyboardInterrupt):
            prepare_tokens(corpus, byte_tokenizer(), 0.1, cache, 1)
    (partial,) = cache.iterdir()
    if accident:
        accident(partial, monkeypatch)
    with caplog.at_level(logging.INFO):
        folder = prepare_tokens(corpus, byte_tokenizer(), 0.1, cache, 1)
    assert ("resumed after" in caplog.text) == goes_on
    assert contents(folder) == contents(prepare_tokens(corpus, byte_tokenizer(), 0.1, tmp_path / "other", 1))


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize("problem", [ValueError("bad data"), OSError(5, "Input/output error")])
def test_what_is_done_is_kept_where_the_same_text_may_still_be_read(hub, problem, tmp_path, monkeypatch, caplog):
    (tmp_path / "x" / "data").mkdir(parents=True)
    file = tmp_path / "x" / "data" / "train.parquet"
    pq.write_table(pa.table({"text": [f"{i} " * 20 for i in range(900)]}), file)
    group = Group("x", "hub", hub_name=str(tmp_path / "x")) if hub else Group("x", "parquet", (str(file),))
    corpus, cache, of_table, calls = Corpus("--data.source", (group,)), tmp_path / "cache", documents._of_table, []

    def fail(*args):
        calls.append(1)
        if len(calls) > 7:
            raise problem
        return of_table(*args)

    small_steps(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(documents, "_of_table", fail)
        with pytest.raises(ConfigError, match=f"^--data.source: .*{re.escape(str(problem))}") as caught:
            prepare_tokens(corpus, byte_tokenizer(), 0.1, cache, 1)
        assert "\n" not in str(caught.value)
    is_kept = hub or isinstance(problem, OSError)
    assert [file.suffix for file in cache.iterdir()] == [".partial"] * is_kept
    with caplog.at_level(logging.INFO):
        prepare_tokens(corpus, byte_tokenizer(), 0.1, cache, 1)
    assert ("resumed after" in caplog.text) == is_kept


def test_what_is_done_is_kept_when_a_worker_is_killed(tmp_path, monkeypatch, caplog):
    path, cache, encode = many(tmp_path), tmp_path / "cache", prepare.Encoder.__call__

    def die(self, raw):
        if raw.place(0)[1] > 300:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, raw)

    small_steps(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(prepare.Encoder, "__call__", die)
        with pytest.raises(ConfigError, match="^--data.prepare_workers: a tokenizing process was killed"):
            prepare_many(path, cache)
    with caplog.at_level(logging.INFO):
        prepare_many(path, cache)
    assert "resumed after" in caplog.text


@pytest.mark.parametrize("first_dies", [False, True])
def test_second_process_waits_for_the_first_or_takes_over(first_dies, tmp_path, monkeypatch, caplog):
    path, cache = many(tmp_path), tmp_path / "cache"
    expected = contents(prepare_many(path, tmp_path / "other"))
    small_steps(monkeypatch)
    fork = multiprocessing.get_context("fork")
    written, go = fork.Event(), fork.Event()

    def first():
        add, calls = SplitWriter.add, []

        def pause(self, *block):
            calls.append(1)
            if len(calls) == 10:
                written.set()
                go.wait(timeout=30)
            add(self, *block)

        SplitWriter.add = pause
        prepare_many(path, cache)

    child = in_fork(first)
    assert written.wait(timeout=30)
    messages = []

    def proceed(message):  # once this process waits
        messages.append(message)
        if first_dies:
            child.kill()
        else:
            go.set()

    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero.rank_zero_info", proceed)
    with caplog.at_level(logging.INFO):
        folder = prepare_many(path, cache)
    child.join(timeout=30)
    assert child.exitcode == (-signal.SIGKILL if first_dies else 0)
    assert re.match(
        rf"waiting for process {child.pid} on \S+, which is preparing the same data in .*cache$", messages[0]
    )
    assert ("resumed after" in caplog.text) == first_dies
    assert contents(folder) == expected
    assert list(cache.iterdir()) == [folder]


CGROUPS = {  # files under /sys/fs/cgroup, /proc/self/cgroup -> of 8 CPUs
    "version 2, a container's": ({"cpu.max": "150000 100000"}, "0::/\n", 2),
    "version 2, half a CPU": ({"cpu.max": "50000 100000"}, "0::/\n", 1),
    "version 2, no limit": ({"cpu.max": "max 100000"}, "0::/\n", 8),
    "version 2, of a level above": ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b\n", 3),
    "version 2, the strictest level": ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "20 10"}, "0::/a/b\n", 2),
    "version 2, of another": ({"c/cpu.max": "300000 100000"}, "0::/a/b\n", 8),
    "version 1": ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "3:cpu:/k\n0::/\n", 4),
    "version 1, no limit": ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "1:cpu:/\n", 8),
    "version 1, of a level above": (
        {"cpu/a/cpu.cfs_quota_us": "200000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
        "3:cpuacct,cpu:/a/b\n",
        2,
    ),
    "version 1, of another": (
        {"cpu/c/cpu.cfs_quota_us": "200000\n", "cpu/c/cpu.cfs_period_us": "100000\n"},
        "3:cpu,cpuacct:/a/b\n",
        8,
    ),
    "both": (
        {"cpu/a/cpu.cfs_quota_us": "20", "cpu/a/cpu.cfs_period_us": "10", "cpu.max": "3 1"},
        "1:cpu:/a\n0::/\n",
        2,
    ),
    "more than there are": ({"cpu.max": "9900000 100000"}, "0::/\n", 8),
    "none": ({}, None, 8),
}


@pytest.mark.parametrize("case", CGROUPS)
def test_processes_are_as_many_as_the_cpus_that_a_container_is_granted(case, tmp_path, monkeypatch):
    files, own, expected = CGROUPS[case]
    limit(tmp_path, monkeypatch, files, own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert processes.num_cores() == expected


def limit(tmp_path, monkeypatch, files: dict[str, str], own: str | None) -> None:
    """Puts these files in place of the machine's cgroups."""
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    if own is not None:
        (tmp_path / "own").write_text(own)
    monkeypatch.setattr(processes._cgroups, "__defaults__", (tmp_path / "fs", tmp_path / "own"))


@pytest.mark.parametrize(
    ("files", "own", "mib"),
    [
        ({"memory.max": f"{64 << 20}\n"}, "0::/\n", 64),
        ({"a/memory.max": f"{48 << 20}\n", "a/b/memory.max": "max\n"}, "0::/a/b\n", 48),
        ({"memory/memory.limit_in_bytes": f"{32 << 20}\n"}, "4:memory:/k\n0::/\n", 32),
        ({"memory/a/memory.limit_in_bytes": f"{32 << 20}\n"}, "4:memory:/a/b\n0::/\n", 32),
        ({"memory/c/memory.limit_in_bytes": f"{32 << 20}\n"}, "4:memory:/a/b\n0::/\n", None),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory.max": "max\n"}, "0::/\n", None),
        ({}, None, None),
    ],
)
def test_memory_is_what_a_container_is_granted(files, own, mib, tmp_path, monkeypatch):
    limit(tmp_path, monkeypatch, files, own)
    machine = int(re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[1]) << 10
    assert processes.memory_bytes() == (machine if mib is None else mib << 20)


@pytest.mark.parametrize("what", ["process", "thread"])
def test_if_some_workers_cannot_start_the_others_end(what, monkeypatch):
    """As with a container's limit on processes, which counts threads: the command waited for them forever."""
    fork, start, calls = os.fork, threading.Thread.start, []

    def fork_once() -> int:
        calls.append(1)
        if len(calls) > 1:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return fork()

    def start_none(thread: threading.Thread) -> None:
        if "ThreadPoolExecutor" in thread.name:
            raise RuntimeError("can't start new thread")
        start(thread)

    if what == "process":
        monkeypatch.setattr(os, "fork", fork_once)
    else:
        monkeypatch.setattr(threading.Thread, "start", start_none)
    tasks = iter([SimpleNamespace(size=1)])
    before = set(multiprocessing.active_children())  # workers of a loader that an earlier test has left
    with pytest.raises(ConfigError, match="cannot start a process .* use 1, which starts none"):
        next(processes.ordered_map(len, tasks, 3, 10))
    assert set(multiprocessing.active_children()) <= before


def test_two_processes_at_once(tmp_path):
    path, cache, barrier = many(tmp_path), tmp_path / "cache", multiprocessing.get_context("fork").Barrier(2)

    def run():
        barrier.wait()
        prepare_many(path, cache)

    children = [in_fork(run) for _ in range(2)]
    for child in children:
        child.join(timeout=60)
    assert [child.exitcode for child in children] == [0, 0]
    tokenizer = byte_tokenizer()
    folder = token_folder(corpus_of(path), tokenizer, 0.1, cache)
    assert list(cache.iterdir()) == [folder]
    assert len(stored(folder, "train", tokenizer)) + len(stored(folder, "val", tokenizer)) == 450


def test_files_written_by_the_first_processes_of_two_containers_are_whole(tmp_path):
    """Both have process ID 1, as both writers here have one ID."""
    with journal.whole(tmp_path / "file") as one:
        one.write(b"one" * 1000)
        with journal.whole(tmp_path / "file") as two:
            two.write(b"two")
        assert (tmp_path / "file").read_bytes() == b"two"
    assert (tmp_path / "file").read_bytes() == b"one" * 1000
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_who_waited_for_a_lock_file_that_was_removed_waits_for_the_new_one(tmp_path):
    path = tmp_path / ".x.lock"
    old = journal._lock(path)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(journal._lock, path)
        time.sleep(0.3)
        path.unlink()  # as its owner does at the end
        new = journal._lock(path)  # a third process was first
        old.close()
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.5)
        new.close()
        waiting.result(timeout=30).close()


def test_a_lock_that_does_not_reach_another_machine_is_noticed(tmp_path):
    def other_machine():
        with making(tmp_path / "x") as unfinished:
            unfinished.lock.write_text("process 7 on node2 (abc)")
            yield unfinished

    expected = "no file locks between machines, and process 7 on node2 also writes there"
    generator = other_machine()
    with pytest.raises(OSError, match=expected):
        next(generator).write_journal({})
    with pytest.raises(OSError, match=expected):
        list(generator)  # nor does the folder get its name
    assert {file.name for file in tmp_path.iterdir()} == {".x.lock", ".x.partial"}  # the other's, left alone


def test_a_lock_that_another_machine_removed_is_noticed(tmp_path):
    expected = "no file locks between machines, and another process also writes there"
    with pytest.raises(OSError, match=expected), making(tmp_path / "x") as unfinished:
        unfinished.lock.unlink()
    assert {file.name for file in tmp_path.iterdir()} == {".x.partial"}


@pytest.mark.parametrize("train", [True, False])
def test_cache_folder_that_cannot_be_written(train, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match=r"^--data.cache_dir: \S*/cache cannot be written \(File exists\)"):
        train_or_encode(train, many(tmp_path), tmp_path / "cache")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        Path(folder).chmod(0o755)
        path, cache = many(Path(folder)), Path(folder) / "cache"
        prepare_tokens(corpus_of(path), byte_tokenizer(), 0.5, cache, 1)
        for name in [*cache.rglob("*"), cache]:
            name.chmod(0o555)
        child = in_fork(write_protected, train, path, cache)
        child.join(timeout=30)
        assert child.exitcode == 0
        cache.chmod(0o755)


def write_protected(train: bool, path: Path, cache: Path) -> None:
    if os.getuid() == 0:
        os.setuid(65534)  # permissions do not hold root off
    prepare_tokens(corpus_of(path), byte_tokenizer(), 0.5, cache, 1)  # what is prepared needs no writing
    with pytest.raises(ConfigError, match=r"^--data.cache_dir: \S+ cannot be written \(Permission denied\)"):
        train_or_encode(train, path, cache)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("what", ["fcntl.flock", "os.replace"])
def test_no_locks_is_said_of_locks_alone(tmp_path, number, what, monkeypatch):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(f"salt_lightning.text.journal.{what}", fail)
    locks = what == "fcntl.flock" or number == errno.ENOLCK
    problem = "is on a file system without file locks" if locks else "cannot be written"
    with pytest.raises(ConfigError, match=rf"cache {problem} \({os.strerror(number)}\)"):
        prepare_tokens(corpus_of(many(tmp_path)), byte_tokenizer(), 0.5, tmp_path / "cache", 1)


KEPT = "the same --data.cache_dir keeps all but about the last 10 s of work"


def test_full_disk_is_one_line_and_what_is_done_is_kept(tmp_path, monkeypatch, caplog):
    path, cache = many(tmp_path), tmp_path / "cache"
    expected = contents(prepare_many(path, tmp_path / "other"))
    small_steps(monkeypatch)

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(expected["train/tokens.bin"]) // 2,) * 2)
        message = rf"^--data.cache_dir: \S+ cannot be written \(File too large\); .* start again; {KEPT}$"
        with pytest.raises(ConfigError, match=message):
            prepare_many(path, cache)

    child = in_fork(run)
    child.join(timeout=30)
    assert child.exitcode == 0
    with caplog.at_level(logging.INFO):
        assert contents(prepare_many(path, cache)) == expected
    assert "resumed after" in caplog.text


def test_text_that_will_not_fit_the_disk_is_refused_while_there_is_room(tmp_path, monkeypatch, caplog):
    path, cache = many(tmp_path), tmp_path / "cache"
    expected = contents(prepare_many(path, tmp_path / "other"))
    size = sum(map(len, expected.values()))
    small_steps(monkeypatch)
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=size // 4))
        message = (
            r"^--data.cache_dir: \S+ cannot be written \(the rest of the text needs about \S+ MiB, but \S+ MiB are"
        )
        with pytest.raises(ConfigError, match=message) as refused:
            prepare_many(path, cache)
    needed, free = (float(number) for number in re.findall(r"(\S+) MiB", str(refused.value)))
    assert size / 3 < needed * 2**20 < 3 * size  # 2 bytes a token, in val 6: no sample is further off
    assert free == pytest.approx(size // 4 / 2**20, rel=5e-3)  # three digits
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * size))
    with caplog.at_level(logging.INFO):
        assert contents(prepare_many(path, cache)) == expected
    assert "resuming in" in caplog.text


def test_full_disk_while_a_trained_tokenizer_is_saved(tmp_path):
    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with pytest.raises(
            ConfigError, match=r"^--data.cache_dir: \S+ cannot be written \(File too large.* start again$"
        ):
            train_or_encode(True, path, tmp_path / "cache")

    path = many(tmp_path)
    child = in_fork(run)
    child.join(timeout=30)
    assert child.exitcode == 0
    assert list((tmp_path / "cache").iterdir()) == []


@dataclass
class Sized:
    number: int
    size: int


def negative(task: Sized) -> int:
    time.sleep(0.01 * (task.number % 3 == 0))  # others overtake it
    return -task.number


@pytest.mark.parametrize(("size", "most"), [(1, 10), (4, 3), (100, 3)])
def test_tasks_under_way_are_bounded_and_their_results_in_order(size, most, tmp_path):
    taken = []

    def tasks():
        for number in range(40):
            taken.append(number)
            yield Sized(number, size)

    for count, (task, result) in enumerate(processes.ordered_map(negative, tasks(), 2, max_size=10)):
        assert (task.number, result) == (count, -count)
        assert len(taken) - count == min(most, 40 - count)  # this one is still locked


@pytest.mark.parametrize("train", [True, False])
def test_killed_child_is_one_line(train, tmp_path, monkeypatch):
    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(prepare, "train_tokenizer", die)
    monkeypatch.setattr(prepare.Encoder, "__call__", die)
    said = {
        True: "tokenizer: the process .*was killed.*, which starts none$",
        False: f"prepare_workers: a tokenizing process was killed.* start again; {KEPT}$",
    }
    with pytest.raises(MachineError, match=f"^--data.{said[train]}") as raised:
        train_or_encode(train, many(tmp_path), tmp_path / "cache")
    assert say(raised.value) == 1  # a scheduler may try again
    assert list((tmp_path / "cache").iterdir()) == []


def test_where_no_process_can_be_started_one_setting_needs_none(tmp_path, monkeypatch):
    def no_more():
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr("os.fork", no_more)
    path, cache = many(tmp_path), tmp_path / "cache"
    for train in (True, False):
        with pytest.raises(
            ConfigError, match=r"^--data.prepare_workers: cannot start a process \(Resource .*1, which starts none"
        ):
            train_or_encode(train, path, cache)
    corpus = corpus_of(path)
    tokenizer = load_tokenizer(str(prepare_tokenizer(corpus, 300, 0.1, cache, 1)))
    alone = prepare_tokens(corpus, tokenizer, 0.1, cache, 1)
    monkeypatch.undo()
    other = load_tokenizer(str(prepare_tokenizer(corpus, 300, 0.1, tmp_path / "others")))
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(other)
    in_two = prepare_tokens(corpus, other, 0.1, tmp_path / "others", 2)
    names = sorted(file.relative_to(alone) for file in alone.rglob("*") if file.is_file())
    assert names == sorted(file.relative_to(in_two) for file in in_two.rglob("*") if file.is_file())
    assert all((alone / name).read_bytes() == (in_two / name).read_bytes() for name in names)


def train_or_encode(train: bool, path: Path, cache: Path) -> None:
    if train:
        prepare_tokenizer(corpus_of(path), 300, 0.1, cache)
    else:
        prepare_tokens(corpus_of(path), byte_tokenizer(), 0.1, cache, 2)


@pytest.mark.parametrize("train", [True, False])
def test_interrupt_ends_at_once_and_leaves_nothing(train, tmp_path):
    fork = multiprocessing.get_context("fork")
    started = fork.Event()

    def endless(*args):
        started.set()
        time.sleep(60)

    def run():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell starts jobs with it ignored
        prepare.train_tokenizer = prepare.Encoder.__call__ = endless
        try:
            train_or_encode(train, path, cache)
        except KeyboardInterrupt:
            os._exit(77)

    path, cache = many(tmp_path), tmp_path / "cache"
    child = fork.Process(target=run)
    child.start()
    assert started.wait(timeout=30)
    time.sleep(0.3)
    (os.kill if train else os.killpg)(child.pid, signal.SIGINT)  # Ctrl-C in a terminal reaches the whole group
    child.join(timeout=20)
    assert child.exitcode == 77
    assert list(cache.iterdir()) == []


def test_each_of_several_interrupts_ends_the_workers_at_once():
    """While tasks and results larger than a pipe are under way. Python's own pool often waited for good."""
    fork = multiprocessing.get_context("fork")

    def half_mib(task):
        time.sleep(0.01)
        return bytes(1 << 19)

    def run(started):
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tasks = (SimpleNamespace(size=1, content=bytes(1 << 19)) for _ in range(10_000))
        try:
            for _ in processes.ordered_map(half_mib, tasks, 3, 9):
                started.set()
        except KeyboardInterrupt:
            sys.exit(77)

    for attempt in range(10):
        started = fork.Event()
        child = in_fork(run, started)
        assert started.wait(timeout=30)
        time.sleep(0.01 * attempt)
        os.killpg(child.pid, signal.SIGINT)
        child.join(timeout=10)
        child.kill()
        assert child.exitcode == 77, attempt


@pytest.mark.parametrize("train", [True, False])
def test_an_interrupt_that_the_run_ignores_does_not_end_its_workers(train, tmp_path):
    """As in a script's background job: the children died of it, and a lack of memory was named as the cause."""
    started = multiprocessing.get_context("fork").Event()

    def slow(function):
        def call(*args):
            started.set()
            time.sleep(0.5)
            return function(*args)

        return call

    def run():
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        prepare.train_tokenizer, prepare.Encoder.__call__ = map(slow, (train_tokenizer, prepare.Encoder.__call__))
        train_or_encode(train, path, tmp_path / "cache")

    path, train_tokenizer = many(tmp_path), prepare.train_tokenizer
    child = in_fork(run)
    assert started.wait(timeout=30)
    os.killpg(child.pid, signal.SIGINT)
    child.join(timeout=60)
    assert child.exitcode == 0


# --- checks ---


FILES = ["tokens.bin", "doc_ends.bin", "doc_sources.bin", "doc_lots.bin", "token_bytes.bin"]


@pytest.mark.parametrize("name", FILES)
def test_truncated_or_foreign_file_is_refused_by_name(name, tmp_path):
    folder = prepare_tokens(corpus_of(many(tmp_path)), byte_tokenizer(), 0.5, tmp_path / "cache", 1)
    file = folder / "val" / name
    verify(folder)
    file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
    for check in (lambda: TokenFiles(folder, "val"), lambda: verify(folder)):
        with pytest.raises(
            ConfigError,
            match=rf"^--data.cache_dir: .*/val/{name} has the right size, but other content than was written; del",
        ):
            check()
    size = file.stat().st_size
    for other in (size + 1, size - 1):
        os.truncate(file, other)
        said = f"/val/{name} has {other} bytes instead of {size}; delete"
        with pytest.raises(ConfigError, match=f"^--data.cache_dir: .*{said}"):
            TokenFiles(folder, "val")
    file.unlink()
    with pytest.raises(ConfigError, match=rf"/val/{name} is missing; delete"):
        TokenFiles(folder, "val")
    TokenFiles(folder, "train")


def large_split(folder: Path) -> None:
    """A prepared folder of 5 MB."""
    folder.mkdir()
    ids = np.arange(2_500_000).astype(np.uint16)
    writer = SplitWriter(folder / "train", "uint16", no_counts())
    writer.add(Block(ids, np.array([len(ids)]), ["x"], np.zeros(1), None, len(ids)), [0])
    writer.sync()
    writer.close()
    manifest = {"dtype": "uint16", "tokenizer": {"eos_id": 0}, "splits": {"train": writer.entry()}}
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))


@pytest.mark.parametrize("start", [0.0, 0.33, 0.9, 0.99])
def test_part_of_a_large_file_that_is_missing_is_found_at_opening(start, tmp_path):
    large_split(tmp_path / "x")
    TokenFiles(tmp_path / "x", "train")
    with open(tmp_path / "x" / "train" / "tokens.bin", "r+b") as file:
        file.seek(int(start * 5_000_000))
        file.write(bytes(min(400_000, 5_000_000 - file.tell())))  # pages lie 329 KB apart
    with pytest.raises(ConfigError, match=r"/train/tokens.bin has the right size, but other content than was written"):
        TokenFiles(tmp_path / "x", "train")


def test_one_wrong_byte_of_a_large_file_is_found_by_reading_it_all(tmp_path):
    large_split(tmp_path / "x")
    verify(tmp_path / "x")
    with open(tmp_path / "x" / "train" / "tokens.bin", "r+b") as file:
        file.seek(100_000)  # behind the first page of 65536 bytes, before the second
        file.write(b"!")
    TokenFiles(tmp_path / "x", "train")
    with pytest.raises(ConfigError, match=r"^--data.cache_dir: .*/train/tokens.bin is not as it was written; delete"):
        verify(tmp_path / "x")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"splits": {}}', None])
def test_manifest_that_was_changed_is_refused(content, tmp_path):
    folder = prepare_tokens(corpus_of(many(tmp_path)), byte_tokenizer(), 0.5, tmp_path / "cache", 1)
    file = folder / "manifest.json"
    file.write_bytes(file.read_bytes().replace(b'"eos_id": 256', b'"eos_id": 255') if content is None else content)
    for check in (lambda: TokenFiles(folder, "val"), lambda: verify(folder)):
        with pytest.raises(ConfigError, match=r"^--data.cache_dir: .*/manifest.json is not as it was written; delete"):
            check()


def test_manifest_says_where_the_tokens_come_from(tmp_path):
    path, tokenizer = many(tmp_path), byte_tokenizer()
    folder = prepare_tokens(corpus_of(path), tokenizer, 0.5, tmp_path / "cache", 1)
    manifest = TokenFiles(folder, "val").manifest
    assert manifest["inputs"][2][0][2] == [[str(path), path.stat().st_size, path.stat().st_mtime_ns]]
    assert manifest["tokenizer"]["fingerprint"] == tokenizer_fingerprint(tokenizer)
    assert manifest["tokenizer"]["rules"] == rules_fingerprint(tokenizer)
    assert set(manifest["versions"]) == {"tokenizers", "transformers", "datasets", "numpy"}


def test_unprepared_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^--data.cache_dir: .* holds no prepared text"):
        TokenFiles(tmp_path, "train")


def test_learning_a_tokenizer_says_how_far_it_is(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("salt_lightning.text.progress._LOG_S", 0.0)
    rows = [json.dumps({"text": f"document number {n} " * 20}) for n in range(30)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    corpus = tmp_path / "text.jsonl"
    data = SALTDataModule(str(corpus), vocab_size=280, cache_dir=str(tmp_path / "cache"), prepare_workers=1)
    with caplog.at_level("INFO"):
        data.prepare_data()
    assert re.search(r"reading for the tokenizer: 100%, 30 documents \(\d[^t]*MB/s, 00:00 left", caplog.text)
    assert re.search(r"tokenizer: read 30 documents; training on 0\.0 MB", caplog.text)
    assert re.search(r"tokenizer: trained a BPE of 280 in \d+\.\d s", caplog.text)
