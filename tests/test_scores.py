"""Scores on disk: whole shards or none, and never those that belong to something else."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from salt_lightning.errors import ConfigError
from salt_lightning.teacher.scores import NO_LABEL, RANK_CAP, Scored, Scores

SCORED = Scored("rows", "tokens", num_rows=10, block_size=4, isolate_documents=True, teacher="t", precision="p")


@pytest.fixture
def scores(tmp_path, monkeypatch):
    monkeypatch.setattr("salt_lightning.teacher.scores._SHARD_TOKENS", 16)
    scores = Scores.create(tmp_path / "run", SCORED, {})
    for shard in range(3):
        size = (len(scores.rows(shard)), 4)
        scores.write(shard, np.full(size, shard + 0.5, np.float32), np.full(size, shard))
    return scores


def test_shards_have_a_million_tokens_and_are_never_too_many():
    assert replace(SCORED, num_rows=10**4, block_size=1024).shard_rows == 1024
    large = replace(SCORED, num_rows=10**9, block_size=1024)
    assert large.num_shards <= 4096
    assert large.num_shards * large.shard_rows >= 10**9 > (large.num_shards - 1) * large.shard_rows
    assert replace(SCORED, num_rows=3, block_size=1 << 21).shard_rows == 1
    assert replace(SCORED, num_rows=300, block_size=64).shard_rows == 300  # an empty batch takes as long as any other


def test_what_is_written_is_read(tmp_path):
    scores = Scores.create(tmp_path, replace(SCORED, num_rows=2), {})
    nll = np.array([[0.1, 0, 2.5, 0.3], [1, 2, 3, 0]], np.float32)
    scores.write(0, nll, np.array([[0, -1, 70_000, 65_534], [9, 10, 65_533, -1]]))
    read, ranks = scores.read(0)
    assert np.array_equal(read, nll)
    assert ranks.tolist() == [[0, NO_LABEL, RANK_CAP, RANK_CAP], [9, 10, 65_533, NO_LABEL]]
    table = pq.read_table(scores.path(0))  # anybody can read them
    assert table["row"].to_pylist() == [0, 1]
    assert str(table.schema.field("nll").type) == "fixed_size_list<element: float>[4]"


def test_the_last_shard_is_shorter(scores):
    assert [scores.rows(shard).tolist() for shard in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert scores.read(2)[0].shape == (2, 4)


def test_missing_shards_are_known_and_the_rest_of_a_kill_is_swept(scores):
    assert scores.missing() == []
    scores.path(1).unlink()
    left = scores.run / "scores" / ".00000001.parquet.99.tmp"
    left.write_bytes(b"half")
    (scores.run / "scores" / "all.parquet").touch()  # somebody's own
    again = Scores.create(scores.run, SCORED, {})
    assert again.missing() == [1]
    assert not left.exists()


def test_a_folder_without_a_shard_holds_nothing_back(scores):
    """For example, of a predict with the wrong text that was stopped early."""
    for shard in range(3):
        scores.path(shard).unlink()
    left = scores.run / "scores" / ".00000000.parquet.99.tmp"
    left.write_bytes(b"half")
    other = replace(SCORED, rows="x", num_rows=7)
    assert Scores.create(scores.run, other, {}).scored == other
    assert Scores(scores.run, "--run").scored == other
    assert not left.exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rows": "x"}, "--data.source"),
        ({"rows": "x", "num_rows": 11}, "--data.source"),
        ({"num_rows": 11}, "--data.source"),
        ({"tokenizer": "x"}, "--data.tokenizer"),
        ({"block_size": 8, "num_rows": 5}, "--data.block_size"),
        ({"isolate_documents": False}, "--data.isolate_documents"),
        ({"teacher": "x"}, "--model.teacher.path"),
        ({"precision": "x"}, "--model.teacher.dtype"),
        ({"teacher": "x", "precision": "x"}, "--model.teacher.dtype"),  # its hash is of the cast weights
    ],
)
def test_scores_of_something_else_are_refused(scores, change, named):
    with pytest.raises(
        ConfigError, match=f"--run .*holds scores that do not fit {named} ?[^;]*; choose another --run"
    ) as error:
        Scores.create(scores.run, replace(SCORED, **change), {})
    assert ("another number of rows" in str(error.value)) == ([*change] == ["num_rows"])
    used = Scores(scores.run, "--data.selection")
    if set(change) <= {"teacher", "precision"}:
        used.require(replace(SCORED, teacher="", precision=""))
    else:
        with pytest.raises(ConfigError, match=f"--data.selection .*{named}.*score this data with `cli.py predict`"):
            used.require(replace(SCORED, teacher="", precision="", **change))


def test_the_folder_or_its_manifest_may_be_given(scores, tmp_path):
    assert Scores(scores.run / "scores.json", "--data.selection").scored == SCORED
    with pytest.raises(ConfigError, match=r"--data.selection: .*scores.json does not exist; give the folder of a run"):
        Scores(tmp_path / "nothing", "--data.selection")
    there = json.loads((scores.run / "scores.json").read_text())
    none = [{"num_rows": 0}, {"block_size": 0}]
    for odd in ({}, {"num_rows": "12"}, {"block_size": True}, *none, {"teacher": None}, {"block_size": 4.0}):
        (scores.run / "scores.json").write_text(json.dumps(there | {"scored": there["scored"] | odd} if odd else {}))
        named = next((f" odd values for {name}" for name in odd if odd not in none), "")
        with pytest.raises(
            ConfigError, match=rf"is not a manifest of scores \(.*{named}.*\); delete it and run the same predict again"
        ):
            Scores(scores.run, "--data.selection")


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "swapped", "foreign"])
def test_a_damaged_or_foreign_shard_is_named(scores, damage):
    path = scores.path(1)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        column = pq.read_metadata(path).row_group(0).column(1)
        data[column.data_page_offset + column.total_compressed_size - 1] ^= 0x55
        path.write_bytes(data)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("no parquet at all")
    elif damage == "swapped":
        path.write_bytes(scores.path(0).read_bytes())
    else:
        other = Scores.create(scores.run.parent / "other", replace(SCORED, teacher="other"), {})
        other.write(1, np.zeros((4, 4), np.float32), np.zeros((4, 4)))
        path.write_bytes(other.path(1).read_bytes())
    reason = "from other scores" if damage in ("swapped", "foreign") else "damaged"
    with pytest.raises(ConfigError, match=f"00000001.parquet is {reason}.*; delete it and run the same predict again"):
        scores.read(1)


def test_every_flipped_byte_of_the_values_is_found(scores):
    """Page checksums; only bytes of the file's own structure may also make it unreadable or change nothing."""
    path = scores.path(0)
    whole = path.read_bytes()
    expected = scores.read(0)
    silent = []
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 0x01
        path.write_bytes(flipped)
        try:
            found = scores.read(0)
        except ConfigError:
            continue
        if not all(map(np.array_equal, found, expected)):
            silent.append(at)
    assert silent == []
