"""Source settings and compressed files: no text may be silently missed or read twice."""

import bz2
import glob
import gzip
import io
import json
import lzma
import os
import re
import string
import sys
import tarfile
import zipfile
from contextlib import nullcontext

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_corpus
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from salt_lightning.data import SALTDataModule
from salt_lightning.errors import ConfigError
from salt_lightning.preflight import large_share, unwatched
from salt_lightning.text.documents import Corpus, read_raw
from salt_lightning.text.examples import Examples
from salt_lightning.text.parse import documents, lots
from salt_lightning.text.sources import Group, Hub, resolve

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd.compress, "zstd": zstd.compress}


def lines(*numbers: int) -> bytes:
    return b"".join(
        json.dumps({"text": f"document {i}, " + "and so on, " * (i % 50)}).encode() + b"\n" for i in numbers
    )


def read(*entries, hub: Hub = Hub(), **options) -> list[str]:  # noqa: B008 (frozen)
    """The texts of jsonl files, or the whole content of other files, in order."""
    corpus = Corpus("--data.source", resolve("--data.source", list(map(str, entries)), hub), **options)
    rows = [row for raw in read_raw(corpus) for row in raw.rows]
    return [json.loads(row)["text"] if row.startswith(b"{") else row.decode() for row in rows]


def texts(data: bytes) -> list[str]:
    return [json.loads(line)["text"] for line in data.splitlines()]


# --- packed files ---


@pytest.mark.parametrize("kind", PACK)
def test_all_streams_of_a_packed_file_are_read(kind, tmp_path):
    """As written by pbzip2, pixz and concatenation."""
    path, parts = tmp_path / f"x.jsonl.{kind}", [lines(*range(40)), b"", lines(*range(40, 20_000)), lines(7)]
    path.write_bytes(b"".join(map(PACK[kind], parts)))
    assert read(path) == texts(b"".join(parts))


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("damage", ["cut off", "header of the second stream", "something behind", "body"])
def test_a_damaged_packed_file_is_refused_by_name(kind, damage, tmp_path):
    first, second = (PACK[kind](lines(*numbers)) for numbers in (range(40), range(40, 80)))
    damaged = {
        "cut off": first + second[:-9],
        "header of the second stream": first + bytes([second[0], second[1] ^ 16]) + second[2:],
        "something behind": first + second + b"something else",
        "body": first + second[: len(second) // 2] + bytes([second[len(second) // 2] ^ 255]) * 9
        + second[len(second) // 2 + 9 :],
    }  # fmt: skip
    (tmp_path / f"x.jsonl.{kind}").write_bytes(damaged[damage])
    with pytest.raises(ConfigError, match=rf"^--data.source: .*x.jsonl.{kind}: cannot be read \("):
        read(tmp_path / f"x.jsonl.{kind}")


@pytest.mark.parametrize("kind", ["bz2", "xz"])
def test_zeros_may_pad_a_packed_file(kind, tmp_path):
    (tmp_path / f"x.jsonl.{kind}").write_bytes(PACK[kind](lines(1)) + bytes(8) + PACK[kind](lines(2)) + bytes(1 << 18))
    assert read(tmp_path / f"x.jsonl.{kind}") == texts(lines(1, 2))


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_zeros_alone_are_no_packed_file(kind, tmp_path):
    """A download may allocate its file first."""
    (tmp_path / f"x.jsonl.{kind}").write_bytes(bytes(5000))
    with pytest.raises(ConfigError, match=rf"^--data.source: .*x.jsonl.{kind}: cannot be read \("):
        read(tmp_path / f"x.jsonl.{kind}")


@given(st.lists(st.integers(0, 3000), max_size=4), st.sampled_from(["bz2", "xz"]))
def test_streams_of_any_length(tmp_path_factory, sizes, kind):
    path, parts = tmp_path_factory.mktemp("packed") / f"x.txt.{kind}", [os.urandom(size).hex() for size in sizes]
    path.write_bytes(b"".join(PACK[kind](part.encode()) for part in parts) or PACK[kind](b""))
    assert "".join(read(path)) == "".join(parts)


# --- folders, splits, links ---


def test_the_texts_of_a_folder_are_read_in_order_of_their_names(tmp_path):
    for name in "dbhaicgfe":  # most file systems list them in another order
        (tmp_path / f"{name}.txt").write_text(name)
    assert read(tmp_path) == sorted("dbhaicgfe")


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_linked_folder_is_read_or_named(suffix, tmp_path, caplog):
    for name, data in (("mine", lines(1)), ("elsewhere", lines(2))):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"x.{suffix}").write_bytes(data)
    (tmp_path / "mine" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine" / "more" / "back").symlink_to(tmp_path / "mine")  # a loop ends
    with caplog.at_level("INFO"):
        found = read(tmp_path / "mine")
    if suffix == "txt":
        assert sorted(found) == sorted(texts(lines(1, 2)))
    else:  # of folders as on the hub, which does not follow links
        assert found == texts(lines(1))
        assert "reads 1 of 2 files; left out: more/x.jsonl" in caplog.text


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_link_that_leads_nowhere_is_refused(suffix, tmp_path):
    (tmp_path / f"x.{suffix}").write_bytes(lines(1))
    (tmp_path / f"y.{suffix}").symlink_to(tmp_path / "never fetched")
    for source in (tmp_path, tmp_path / f"*.{suffix}", tmp_path / "**" / "*", tmp_path / f"y.{suffix}"):
        with pytest.raises(ConfigError, match=rf"^--data.source: .*y.{suffix} is a broken symbolic link; fetch its"):
            read(source)


def test_a_snapshot_in_the_hub_s_cache_is_read(tmp_path):
    """Its files are links to blobs outside of it."""
    snapshot = tmp_path / "datasets--owner--name" / "snapshots" / "0123abc"
    (snapshot / "data").mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    for split, data in (("train", lines(1)), ("test", lines(2))):
        (snapshot.parents[1] / "blobs" / split).write_bytes(data)
        (snapshot / "data" / f"{split}.jsonl").symlink_to(f"../../../blobs/{split}")
    assert read(snapshot) == texts(lines(1))
    assert read(f"{snapshot}:test") == texts(lines(2))


def test_a_link_to_a_folder_beside_it_is_not_left_out(tmp_path, caplog):
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "x.jsonl").write_bytes(lines(1))
    (tmp_path / "a").symlink_to(tmp_path / "z")
    with caplog.at_level("INFO"):
        assert read(tmp_path) == texts(lines(1))
    assert "left out" not in caplog.text


@pytest.mark.parametrize("name", ["link", "link:train", "link/data", "link/data:train"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_folder_below_a_link_is_read(suffix, name, tmp_path, caplog):
    (tmp_path / "real" / "data").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    file = tmp_path / "real" / "data" / f"x.{suffix}"
    if suffix == "jsonl":
        file.write_bytes(lines(1))
    else:
        pq.write_table(pa.table({"text": texts(lines(1))}), file)
    with caplog.at_level("INFO"):
        (group,) = resolve("--data.source", [str(tmp_path / name)], Hub())
    assert [os.path.realpath(found) for found in group.files] == [os.path.realpath(file)]
    assert caplog.text == ""  # no file is outside, or left out


def test_a_linked_folder_may_not_name_files_outside_of_it(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "x.jsonl").write_bytes(lines(1))
    (tmp_path / "y.jsonl").write_bytes(lines(2))
    (tmp_path / "real" / "README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: ../y.jsonl\n---\n")
    with pytest.raises(ConfigError, match=r"README.md of '.*link' names '.*y.jsonl', which is outside that folder"):
        read(tmp_path / "link")


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "more").mkdir()
    (tmp_path / "x.txt").write_text("a")
    scandir = os.scandir

    def refuse(path):  # root may read all
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        ConfigError, match="^--data.source: cannot read the folder '.*more': Permission denied; grant access"
    ):
        read(tmp_path)


def test_a_split_of_a_local_folder_is_that_of_files(tmp_path, caplog):
    """Not of a data set: whether it has changed, or is training text too, can be told."""
    for split, data in (("train", lines(1)), ("validation", lines(2, 3))):
        (tmp_path / f"{split}.jsonl").write_bytes(data)
    assert read(f"{tmp_path}:validation") == texts(lines(2, 3))
    (group,) = resolve("--data.source", [f"{tmp_path}:validation"], Hub())
    assert group.files == (str(tmp_path / "validation.jsonl"),)
    (whole,) = resolve("--data.source", [str(tmp_path)], Hub())
    assert Corpus("", (whole,)).shared_with(Corpus("", resolve("", [f"{tmp_path}:train"], Hub()))) == [
        str(tmp_path / "train.jsonl")
    ]
    with pytest.raises(
        ConfigError, match="^--data.source: '.*:test': no split 'test' in .*; there are: train, validation"
    ):
        read(f"{tmp_path}:test")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "x.txt").write_text("a")
    with pytest.raises(ConfigError, match="^--data.source: '.*plain:test': .* holds plain text, which has no splits"):
        read(f"{tmp_path / 'plain'}:test")


@pytest.mark.parametrize("again", ["pattern", "link", "hard link"])
def test_files_that_are_read_twice_are_named(again, tmp_path, caplog):
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(1))
    if again == "link":
        (tmp_path / "y.jsonl").symlink_to(path)
    if again == "hard link":
        (tmp_path / "y.jsonl").hardlink_to(path)
    with caplog.at_level("INFO"):
        assert read(path, tmp_path / "*.jsonl") == texts(lines(1)) * (2 if again == "pattern" else 3)
    assert f"1 of the files are read more than once (e.g. {path})" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        read(tmp_path / "x*.jsonl")
    assert "more than once" not in caplog.text


def test_what_has_no_effect_or_is_no_text_is_said(tmp_path, caplog):
    (tmp_path / "x.txt").write_text("a")
    with caplog.at_level("INFO"):
        read(tmp_path, hub=Hub(split="test"))
    assert "holds plain text, which has no splits; 'test' has no effect" in caplog.text


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # datasets 4.0 leaves the table open
@pytest.mark.parametrize(("name", "between"), [("x.csv", ","), ("x.tsv", "\t"), ("x.csv.gz", ",")])
def test_a_table_is_refused_with_what_converts_it(name, between, tmp_path):
    table = f'id{between}text\n007{between}"a ""b"",\nc"\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(table) if name.endswith(".gz") else table)
    with pytest.raises(ConfigError, match=rf"--data.source: {tmp_path}/{name} is a table, .* narrower glob") as refused:
        read(tmp_path)
    remedy = re.search(r"datasets.*parquet'\)", str(refused.value))[0].replace("FILE", repr(str(tmp_path / name)))
    eval(remedy.replace("x.parquet", str(tmp_path / "x.parquet")), {"datasets": datasets})
    assert pq.read_table(tmp_path / "x.parquet")["text"].to_pylist() == ['a "b",\nc']
    named, suffix = re.search(r"replace (\.\w+) by (\.\w+)", str(refused.value)).groups()
    (tmp_path / name).rename(renamed := tmp_path / name.replace(named, suffix))
    assert read(renamed) == [table.decode()]


def test_token_ids_of_other_tools_are_said_to_be_that(tmp_path):
    for name in ("train.bin", "corpus.idx", "tokens.npy"):
        (tmp_path / name).write_bytes(np.arange(50_000, 50_100, dtype=np.uint16).tobytes())
        corpus = Corpus("--data.source", resolve("--data.source", [str(tmp_path / name)], Hub()))
        with pytest.raises(
            ConfigError, match=r"is not UTF-8 text; if it holds token ids, give the text that they were"
        ):
            documents(next(iter(read_raw(corpus))), corpus)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (["input_ids", "attention_mask"], r" \(these are token ids, of which only the text can be read\)"),
        (["chunks", "config", "updated_at"], r" \(these are token ids"),
        (["input_ids", "content"], "content(?!.*token ids)"),
        (["prompt", "completion"], r"; for fine-tuning, --data.examples names the columns instead"),
        (["messages"], r"; for fine-tuning, --data.examples names"),
        (["content"], "content(?!.*fine-tuning)"),
    ],
)
def test_columns_that_are_no_text_are_said_to_be_what_they_are(columns, said, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(dict.fromkeys(columns, "x")) + "\n")
    corpus = Corpus("--data.source", resolve("--data.source", [str(tmp_path / "x.jsonl")], Hub()))
    with pytest.raises(ConfigError, match=rf"no column 'text' in .*there are: .*{said}"):
        documents(next(iter(read_raw(corpus))), corpus)


def test_what_names_part_of_a_data_set_has_no_effect_on_files(tmp_path, caplog):
    (tmp_path / "x.txt").write_text("a")
    with caplog.at_level("INFO"):
        read(tmp_path / "x.txt")
        assert caplog.text == ""
        for named in (tmp_path / "x.txt", tmp_path / "*.txt"):
            read(named, hub=Hub(subset="x", revision="v9"))
            assert f"{named} names files, so --data.subset and --data.revision cannot take effect" in caplog.text


@pytest.mark.parametrize("named", ["owner/name", "owner/name:validation", "nothing/*.txt"])
def test_what_names_part_of_a_data_set_is_silent_where_there_are_no_files(named, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO"), nullcontext() if named.startswith("owner") else pytest.raises(ConfigError):
        resolve("--data.source", [named], Hub(subset="x", revision="v9"))
    assert "cannot take effect" not in caplog.text


@pytest.mark.parametrize(
    ("entry", "name", "expected"),
    [
        ("acme/web", "web", Hub("test", "en", "abc")),
        ("acme/web:train", "web:train", Hub("train", "en", "abc")),
        ("acme/web:train[:10]", "web:train", Hub("train[:10]", "en", "abc")),
        ("acme/web:2023.de:train+test", "web:2023.de:train+test", Hub("train+test", "2023.de", "abc")),
        ("acme/web:de:train[1:]", "web:de:train", Hub("train[1:]", "de", "abc")),
        ("acme/web:de:", "web:de:", Hub("test", "de", "abc")),
        ("acme/web@v2", "web", Hub("test", "en", "v2")),
        ("acme/web@refs/convert/parquet:de:train", "web:de:train", Hub("train", "de", "refs/convert/parquet")),
    ],
)
def test_an_entry_names_its_part_of_a_hub_data_set(entry, name, expected, tmp_path, monkeypatch):
    """So that a mixture can hold several subsets and revisions; what an entry leaves open, the settings say."""
    monkeypatch.chdir(tmp_path)
    groups = resolve("--data.source", [entry, "acme/x"], Hub("test", "en", "abc"))
    assert groups[0] == Group(name, "hub", hub_name="acme/web", hub=expected)
    assert groups[1].hub == Hub("test", "en", "abc")
    assert groups[0].hub.rows() == {"train[:10]": ("train", 0, 10), "train[1:]": ("train", 1, None)}.get(
        expected.split, (expected.split, 0, None)
    )
    twice = resolve("--data.source", [entry, f"other/{entry.partition('/')[2]}"], Hub())
    assert [group.name for group in twice] == [entry, f"other/{entry.partition('/')[2]}"]


@pytest.mark.parametrize(
    "part", ["train[:10%]", "train[-5:]", "train[:5]+test", "train[5]", "train[:5", "train[:0]", "train[5:3]"]
)
def test_a_slice_that_cannot_be_read_is_refused_before_the_hub_is_asked(part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for entry, hub in ((f"acme/web:{part}", Hub()), ("acme/web", Hub(part))):
        with pytest.raises(ConfigError, match=r"^--data.source: 'train.* is no slice that can be read; a slice counts"):
            resolve("--data.source", [entry], hub)


def test_the_text_column_may_differ_from_source_to_source(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "1", "code": "x"}\n{"code": "2", "content": "x"}\n{"text": null}\n')
    rows = {"other": ["x"] * 3, "content": ["3", "4", None], "text": [None, "5", None]}
    pq.write_table(pa.table(rows), tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text('{"other": "x"}\n')

    def read_all(*files: str) -> list[str]:
        groups = resolve("--data.source", [str(tmp_path / file) for file in files], Hub())
        corpus = Corpus("--data.source", groups, ["text", "code", "content"])
        return [text for raw in read_raw(corpus) for text, _ in documents(raw, corpus)[0]]

    assert read_all("a.jsonl", "b.parquet") == ["1", "2", "3", "5"]
    said = r"^--data.text_column: no column 'text or code or content' in .*c.jsonl: line 1; there are: other"
    with pytest.raises(ConfigError, match=said):
        read_all("c.jsonl")


def test_jsonlines_are_lines(tmp_path):
    (tmp_path / "x.jsonlines.gz").write_bytes(gzip.compress(lines(1, 2)))
    assert read(tmp_path / "x.jsonlines.gz") == texts(lines(1, 2))


def write_files(folder, *names: str) -> list[str]:
    """Files of the given names with one document each: their own name."""
    for name in names:
        file, line = folder / name, json.dumps({"text": name}).encode()
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix.lower() == ".parquet":
            pq.write_table(pa.table({"text": [name]}), file)
        else:
            file.write_bytes(PACK.get(file.suffix.lower().removeprefix("."), bytes)(line))
    return sorted(names)


def found(source, hub: Hub = Hub()) -> list[str]:  # noqa: B008 (frozen)
    """The texts of the jsonl or parquet files that a source names, sorted."""
    (group,) = resolve("--data.source", [str(source)], hub)
    if group.kind == "jsonl":
        return sorted(read(*group.files))
    assert group.kind == "parquet"
    return sorted(text for file in group.files for text in pq.read_table(file)["text"].to_pylist())


@pytest.mark.parametrize(
    "names",
    [
        ["a.jsonl", "b.jsonlines", "c.JSONL", "sub/d.Jsonl.GZ", "sub/e.NDJSON", "sub/f.jsonl.GZ"],
        ["a.jsonlines"],
        ["A.PARQUET", "b.parquet"],
    ],
)
@pytest.mark.parametrize("folder", ["books", "books [x]", "books?*"])
def test_a_folder_reads_what_a_glob_reads(folder, names, tmp_path, caplog):
    expected = write_files(tmp_path / folder, *names)
    notes = write_files(tmp_path / folder, "LICENSE", "run.py")  # which do not make it a folder of plain text
    with caplog.at_level("INFO"):
        assert found(tmp_path / folder) == expected
    assert f"reads {len(names)} of {len(names) + 2} files; left out: LICENSE, run.py" in caplog.text
    for name in notes:
        (tmp_path / folder / name).unlink()
    assert sorted(resolve("", [f"{glob.escape(str(tmp_path / folder))}/**/*"], Hub())[0].files) == sorted(
        resolve("", [str(tmp_path / folder)], Hub())[0].files
    )


@pytest.mark.parametrize("folder", ["books", "[books]"])
@pytest.mark.parametrize("suffix", ["jsonl", "JSONL", "jsonlines.gz", "parquet", "Parquet"])
def test_the_splits_of_a_folder_do_not_depend_on_its_path_or_suffixes(suffix, folder, tmp_path):
    write_files(tmp_path / folder, f"train-train.{suffix}", f"more/val-1.{suffix}", f"other.{suffix}")
    assert found(tmp_path / folder) == [f"train-train.{suffix}"]
    assert found(f"{tmp_path / folder}:validation") == [f"more/val-1.{suffix}"]
    assert found(tmp_path / folder, Hub(split="validation")) == [f"more/val-1.{suffix}"]
    (group,) = resolve("--data.source", [f"{tmp_path / folder}:validation"], Hub())
    assert group.name == f"{folder}:validation"
    with pytest.raises(ConfigError, match=r"no split 'test' in .*; there are: train, validation \("):
        found(f"{tmp_path / folder}:test")


@pytest.mark.parametrize("folder", ["books", "[books]"])
@pytest.mark.parametrize("suffix", ["jsonl", "JSONL"])
def test_the_more_common_kind_of_a_folder_is_read(suffix, folder, tmp_path):
    write_files(tmp_path / folder, f"a.{suffix}", "b.parquet", "c.parquet")
    assert found(tmp_path / folder) == ["b.parquet", "c.parquet"]
    write_files(tmp_path / folder, "1.txt", "2.txt", "3.txt")
    with pytest.raises(ConfigError, match="holds .* files but more plain text files; choose with a glob"):
        found(tmp_path / folder)


def test_a_folder_with_brackets_in_its_path_and_a_description_is_refused_by_name(tmp_path):
    write_files(tmp_path / "d [x]", "a.jsonl", "b.jsonl")
    for card, hub in (("", Hub(subset="x")), ("---\nconfigs:\n- config_name: x\n  data_files: a.jsonl\n---\n", Hub())):
        (tmp_path / "d [x]" / "README.md").write_text(card)
        with pytest.raises(ConfigError, match=r"^--data.source: '.*/d \[x\]' has brackets, .*; rename the folder, or"):
            found(tmp_path / "d [x]", hub)
    (tmp_path / "d [x]" / "README.md").write_text("---\nlicense: mit\n---\n")  # describes no files
    assert found(tmp_path / "d [x]") == ["a.jsonl", "b.jsonl"]


def test_a_description_decides_which_new_suffixes_are_read(tmp_path, caplog):
    write_files(tmp_path, "a.jsonl", "b.JSONL")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: '*'\n---\n")
    with caplog.at_level("INFO"):
        assert found(tmp_path) == ["a.jsonl"]
    assert "left out: README.md, b.JSONL" in caplog.text


@pytest.mark.parametrize("name", ["x.tar", "x.jsonl.tar.gz", "x.TGZ", "x.tar.xz", "x.txt.tar.zst", "x.tbz2", "x.zip"])
def test_an_archive_is_refused_and_not_read_as_one_document(name, tmp_path):
    """A tar file of text is valid UTF-8."""
    (tmp_path / "a.txt").write_text("text")
    if name == "x.zip":
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.write(tmp_path / "a.txt", "a.txt")
    else:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(tmp_path / "a.txt", "a.txt")
        kind = {".tar": "", ".TGZ": "gz", ".tbz2": "bz2"}.get((tmp_path / name).suffix, name.rpartition(".")[2])
        (tmp_path / name).write_bytes(PACK.get(kind, bytes)(packed.getvalue()))
    for source in (tmp_path / name, tmp_path, tmp_path / "*"):
        with pytest.raises(
            ConfigError, match=rf"^--data.source: \S+/{name} is an archive of files, which is not read; u"
        ):
            read(source)


def test_two_columns_of_one_name_are_refused(tmp_path):
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"^--data.text_column: .*x.parquet has several columns named 'text'; rename"):
        read(tmp_path / "x.parquet")


@pytest.mark.parametrize(("value", "name"), [(None, "(none)"), ("", "(none)"), ("a\n b\tc ", "a b c")])
def test_a_source_s_name_fits_a_tag_and_a_table(value, name, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}", "from": value}) + "\n" for i in range(400)))
    data = SALTDataModule(
        str(path), source_column="from", vocab_size=300, block_size=32, cache_dir=str(tmp_path / "cache"),
        val_fraction=0.1, global_batch_size=8,
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    assert data.source_names == [name]


def test_thousands_of_files_are_looked_for_once(tmp_path, monkeypatch):
    write_corpus(tmp_path / "x.jsonl")
    data = SALTDataModule(str(tmp_path), vocab_size=300, block_size=32, cache_dir=str(tmp_path.parent / "cache"))
    calls = []
    monkeypatch.setattr("salt_lightning.data.resolve", lambda *args: calls.append(args) or resolve(*args))
    data.prepare_data()
    data.setup("fit")
    assert len(calls) == 1
    rows = data.num_train_rows
    write_corpus(tmp_path / "y.jsonl", seed=9)
    data.prepare_data()
    data.setup("fit")
    assert data.num_train_rows > rows  # in a second fit, after more text was added


def test_a_folder_is_listed_twice_and_not_for_each_way_to_name_a_split(tmp_path, monkeypatch):
    """Listing 5,000 files sends 5,000 requests to a network file system."""
    for i in range(3):
        write_corpus(tmp_path / f"part-{i}.jsonl")
    listed, scandir = [], os.scandir

    def counted(path="."):
        listed.append(str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)
    for _ in range(2):  # files added in between are seen
        (group,) = resolve("--data.source", [str(tmp_path)], Hub())
        write_corpus(tmp_path / "part-3.jsonl")
    assert len(group.files) == 4
    assert listed.count(str(tmp_path)) == 4


def test_a_folder_is_read_without_a_home(tmp_path, monkeypatch):
    """In a container, HOME may be unset, and is / for a user without an entry in /etc/passwd."""
    (tmp_path / "a.jsonl").write_bytes(lines(1, 2))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/none")
    assert read(tmp_path) == texts(lines(1, 2))


def test_of_many_entries_that_match_nothing_the_first_are_named():
    with pytest.raises(ConfigError) as error:
        resolve("--data.source", [f"none{n}.txt" for n in range(7)], Hub())
    *named, last = error.value.problems
    assert [said.split(";")[0] for said in named] == [f"--data.source: 'none{n}.txt' matches no file" for n in range(5)]
    assert last == "--data.source: 2 more of its entries cannot be read"


def test_a_folder_of_several_subsets_asks_for_one(tmp_path):
    """By the card of a hub data set."""
    for number, name in enumerate(("zh", "th")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_bytes(lines(number))
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("zh", "th"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    said = r"available configs: \['zh', 'th'\]: --data.subset NAME, or NAME in the source, owner/name:NAME:train$"
    with pytest.raises(ConfigError, match=said):
        read(tmp_path)
    assert read(tmp_path, hub=Hub(subset="th")) == texts(lines(1))
    assert read(f"{tmp_path}:zh:train", hub=Hub(subset="th")) == texts(lines(0))
    names = [group.name for group in resolve("", [f"{tmp_path}:{name}:train" for name in ("zh", "th")], Hub())]
    assert names == [f"{tmp_path.name}:zh:train", f"{tmp_path.name}:th:train"]
    with pytest.raises(ConfigError, match="no split 'dev' in .*; there are: train"):
        read(f"{tmp_path}:zh:dev")
    for part in ("[:2]", "[1:2]", "[10:]", "[:10%]", "[-2:-1]"):
        with pytest.raises(ConfigError, match="has a slice, which only hub data sets can have; name the split alone"):
            read(f"{tmp_path}:train{part}")


def test_colons_and_hub_names_in_local_paths(tmp_path, monkeypatch):
    (tmp_path / "owner/name:12:30").mkdir(parents=True)
    (tmp_path / "owner/name").mkdir()
    (tmp_path / "owner/name:12:30/a.jsonl").write_bytes(lines(1))
    monkeypatch.chdir(tmp_path)
    assert read("owner/name:12:30/*.jsonl") == read("owner/name:12:30") == texts(lines(1))
    for entry in ("owner/name@v1", "owner/name@v1:en:train", "owner/name:", "owner/notes:10:30.jsonl"):
        with pytest.raises(ConfigError, match=f"'{entry}' matches no file; give a file"):
            resolve("--data.source", [entry], Hub())


def test_revisions_and_slices_of_a_data_set_are_not_the_same_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [["a/b@v1:train"], ["a/b@v2:train"], ["a/b:train[:9]"], ["a/b:train[9:]"]]
    corpora = [Corpus("--data.source", resolve("--data.source", each, Hub())) for each in names]
    shared = [one.shared_with(other) for one in corpora for other in corpora]
    assert shared == [entry if entry is other else [] for entry in names for other in names]


# --- tokenizers that do not fit the text ---


def words_of(path) -> dict[str, int]:
    words = {word for line in path.read_text().splitlines() for word in json.loads(line)["text"].split()}
    return {word: i for i, word in enumerate(sorted(words))}


def ready(path, tokenizer, tmp_path, **settings) -> SALTDataModule:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = path if isinstance(path, list) else str(path)
    data = SALTDataModule(
        source, tokenizer=str(tmp_path / "tokenizer"), block_size=32, global_batch_size=8, val_fraction=0.1,
        cache_dir=str(tmp_path / "cache"), prepare_workers=1, **settings,
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    return data


def test_ids_with_a_gap_count_up_to_the_largest(tmp_path):
    path = write_corpus(tmp_path / "x.jsonl")
    words = {**words_of(path), "<unk>": 998, "<eos>": 999}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    assert len(fast) < 999
    assert ready(path, fast, tmp_path).vocab_size == 1000


def test_a_tokenizer_without_a_word_for_the_text_is_one_line(tmp_path):
    path = write_corpus(tmp_path / "x.jsonl")
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="<gone>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    with pytest.raises(ConfigError, match=r"^--data.tokenizer: cannot encode the text of --data.source \(.*UNK"):
        ready(path, fast, tmp_path)


def test_a_tokenizer_that_drops_text_is_found_out(tmp_path):
    path = write_corpus(tmp_path / "x.jsonl")
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate("abcdefgh")} | {"<eos>": 8}, []))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    (found,) = ready(path, fast, tmp_path).doubts()
    assert found.about == "lost text"
    kept = int(re.match(r"the tokens of the held-out text decode to (\d\d)% of its bytes", found.said)[1])
    assert kept < 50  # letters from a to h; spaces put between them would make it 75


def english(**special) -> PreTrainedTokenizerFast:
    """A tokenizer of only English letters and words; any run of other characters becomes one <unk>."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<unk>", "<eos>", *string.printable])}, [],
                                     unk_token=special.get("unk_token", "<unk>"), fuse_unk=True))  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<eos>", "unk_token": "<unk>"} | special)


def write_texts(path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i in range(60) for text in texts))
    return str(path)


CHINESE = "狐狸跳过了懒狗" * 40


def test_unknown_text_is_found_in_any_source_and_at_any_place(tmp_path):
    """English comes first, and more of it than a sample holds."""
    files = [
        write_texts(tmp_path / "en.jsonl", "the quick brown fox " * 2000),
        write_texts(tmp_path / "zh.jsonl", CHINESE),
    ]
    (found,) = ready(files, english(), tmp_path).doubts()
    assert found.about == "unknown tokens"
    assert re.match(r"9\d\.\d% of the held-out text of zh is unknown to --data.tokenizer", found.said)


def test_unknown_text_is_weighed_by_its_bytes(tmp_path):
    """Of the tokens one in 2,000 is unknown, of the bytes about a third: it stands for a whole run."""
    data = ready(write_texts(tmp_path / "x.jsonl", "the quick brown fox " * 100 + CHINESE), english(), tmp_path)
    assert np.mean(data.held_out_files.tokens == 0) < 0.001
    (found,) = data.doubts()
    share = len(CHINESE.encode()) / (len(CHINESE.encode()) + 2000)
    assert float(re.match(r"(\d\d\.\d)% of the held-out text is unknown", found.said)[1]) == pytest.approx(
        100 * share, abs=0.5
    )


def test_an_unknown_token_that_is_eos_too_is_found_out(tmp_path):
    tokenizer = english(unk_token="<eos>")
    (found,) = ready(write_texts(tmp_path / "x.jsonl", "a fox " + CHINESE), tokenizer, tmp_path).doubts()
    assert found.about == "unknown tokens"


def test_special_tokens_spelled_out_are_text_to_a_unigram_too(tmp_path):
    """They are in its own vocabulary, with a low cost."""
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.Unigram([(w, 0.0) for w in special] + [(c, -3.0) for c in "</s>unk the fox"], 0))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.add_tokens(["<x0>", "<x1>"], special_tokens=True)  # as T5 has them
    fast.add_tokens(["<code>"])
    assert set(fast("the fox</s>").input_ids) & {1, 2}
    data = ready(write_texts(tmp_path / "x.jsonl", "the fox</s> <s> <unk> the fox <code>"), fast, tmp_path)
    ids = data._train.files.tokens
    assert np.isin(ids, fast.convert_tokens_to_ids(["<unk>", "<x0>", "<x1>"])).sum() == (ids == 0).sum()
    assert (ids == fast.convert_tokens_to_ids("<code>")).sum() == data._train.files.num_documents
    assert np.isin(ids, [1, 2]).sum() == data._train.files.num_documents  # each one's EOS
    assert fast.decode(ids[: data._train.files.doc_ends[0] - 1]).replace(" ", "").startswith("thefox</s><s><unk>thefox")


def test_letters_that_a_tokenizer_changes_are_told(tmp_path):
    """As BERT's uncased: as many bytes or nearly, so no text is lost."""
    tokenizer = english()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # without one nothing says how its tokens read
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    (found,) = ready(write_texts(tmp_path / "x.jsonl", "The Quick Brown Fox"), tokenizer, tmp_path).doubts()
    assert (found.level, found.about) == ("note", "changed text")
    assert "'Paris' becomes 'paris', 'été' becomes 'ete'" in found.said
    tokenizer.backend_tokenizer.normalizer = normalizers.NFD()
    assert ready(write_texts(tmp_path / "x.jsonl", "The Quick Brown Fox"), tokenizer, tmp_path).doubts() == []


def test_what_a_test_looks_at_is_not_measured_by_the_training_text(tmp_path):
    """From Python: a fit, then a test of the same data object with other test files."""
    test = write_texts(tmp_path / "test.jsonl", "a test")
    files = [write_texts(tmp_path / f"{name}.jsonl", f"the quick brown fox {name}") for name in "abc"]
    data = ready(files, english(), tmp_path, test_source=[test])
    data.setup("test")
    assert data.doubts() == []


def test_a_source_that_no_validation_figure_watches_is_told(tmp_path):
    rare = next(t for t in map(str, range(99)) if lots(t.encode())[0] >= 0.1)
    (tmp_path / "rare.jsonl").write_text(json.dumps({"text": rare}))
    files = [write_texts(tmp_path / "much.jsonl", "the quick brown fox"), str(tmp_path / "rare.jsonl")]
    (found,) = ready(files, english(), tmp_path).doubts()
    assert (found.level, found.said) == ("note", "validation reads no document of rare, so there is no val/ce for it")
    assert unwatched(["a", "b"]).said == "validation reads no document of a, b, so there is no val/ce for them"


@pytest.mark.parametrize("own", [{}, {"examples": Examples(prompt="{text}", response="{text}")}])
def test_a_source_outside_of_the_rows_that_validation_reads_is_told(own, tmp_path):
    files = [write_texts(tmp_path / f"{name}.jsonl", f"fox {name}") for name in "ab"]
    assert ready(files, english(), tmp_path, **own).doubts() == []
    (found,) = ready(files, english(), tmp_path, val_rows=1, **own).doubts()  # of more than one
    assert re.match("validation reads no document of [ab], so there is no val/ce for it", found.said)


@pytest.mark.parametrize("held_out", [True, False])
def test_one_document_that_is_nearly_all_is_named_where_it_is_held_out(held_out, tmp_path):
    path = write_corpus(tmp_path / "x.jsonl")
    long = next(t for i in range(99) if (lots((t := f"{i} " + "long " * 9000).encode())[0] < 0.1) == held_out)
    with path.open("a") as out:
        out.write(json.dumps({"text": long}) + "\n")
    data = SALTDataModule(
        str(path), block_size=32, global_batch_size=8, val_fraction=0.1, vocab_size=300, prepare_workers=1,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    found = [finding.said for finding in data.doubts()]
    assert len(found) == held_out
    said = r"--data.val_fraction 0.1 of the documents took \d\d% of the tokens \(the longest document is 9\d% of"
    assert not held_out or re.match(said, found[0])


@pytest.mark.parametrize("fraction", [0.1, 0.34, 0.5, 0.9])
def test_a_share_far_above_the_one_asked_for_is_told(fraction):
    assert large_share(999, 900, 1, fraction).level == "warning"
    assert large_share(int(1000 * fraction), 9, 1000 - int(1000 * fraction), fraction) is None


@pytest.mark.parametrize("name", ["pipe", "pipe:train", "folder", "./pipe", "./folder"])
def test_what_exists_here_is_not_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    """An empty folder or a pipe may have a name that a hub data set may have too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe:train")
    what = "matches only folders, no file" if "folder" in name else "is not a regular file"
    with pytest.raises(ConfigError, match=rf"^--data.source: '{name}' {what}; give a file"):
        resolve("--data.source", [name], Hub())
    (group,) = resolve("--data.source", ["owner/other"], Hub())
    assert (group.kind, group.hub_name) == ("hub", "owner/other")


@pytest.mark.parametrize("name", ["text", "json:train", "stories"])
def test_a_name_without_an_owner_is_not_looked_up_on_the_hub(name):
    """`datasets` takes "text" for every .txt in the working directory."""
    with pytest.raises(ConfigError, match=rf"^--data.source: '{name}' matches no file; give .* 'owner/name', "):
        resolve("--data.source", [name], Hub())


def test_every_table_is_looked_into_before_the_first_is_read(tmp_path):
    """What the last of a thousand files lacks would be found after hours."""
    for name, column in {"a": "text", "b": "words", "c": "text", "d": "text"}.items():
        pq.write_table(pa.table({column: ["some text"] * 50}), tmp_path / f"{name}.parquet")
    (tmp_path / "d.parquet").write_bytes((tmp_path / "d.parquet").read_bytes()[:-9])
    own = {"tokenizer": "train", "cache_dir": str(tmp_path / "cache"), "prepare_workers": 1}
    named = {name: str(tmp_path / f"[{name}].parquet") for name in ("ab", "cd")}
    with pytest.raises(ConfigError) as refused:
        SALTDataModule(source=named["ab"], val_source=named["cd"], **own).prepare_data()
    assert re.search(r"--data.text_column: no column 'text' in .*b\.parquet; there are: words", str(refused.value))
    assert re.search(r"--data.val_source: .*d\.parquet: cannot be read \(.*\); get a whole copy", str(refused.value))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("bad_lines", ["refuse", "skip"])
def test_the_first_line_of_every_file_is_parsed_before_the_first_is_read(bad_lines, tmp_path):
    for name, line in {"a": '{"text": "a"}', "b": '{"words": "b"}', "c": "", "d": '{"text": "d"}'}.items():
        (tmp_path / f"{name}.jsonl").write_text(f"{line}\n" + '{"text": "more"}\n' * 50)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines(*range(99)))[:9])
    own = {"tokenizer": "train", "cache_dir": str(tmp_path / "cache"), "prepare_workers": 1, "bad_lines": bad_lines}
    named = {name: str(tmp_path / f"[{name}].jsonl*") for name in ("ab", "cd")}
    with pytest.raises(ConfigError) as refused:
        SALTDataModule(source=named["ab"], val_source=named["cd"], **own).prepare_data()
    lacks = re.search(
        r"--data.text_column: no column 'text' in .*b\.jsonl: line 1; there are: words", str(refused.value)
    )
    assert bool(lacks) == (bad_lines == "refuse")
    assert re.search(r"--data.val_source: .*d\.jsonl\.gz: cannot be read \(.*\); get a whole copy", str(refused.value))
    assert not (tmp_path / "cache").exists()
