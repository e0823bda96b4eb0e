"""Sharded checkpoints of real FSDP2, read by one process; which ones are refused."""

import errno
import gc
import io
import os
import shutil
import struct
import sys
import tracemalloc
import zipfile
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from conftest import ALWAYS
from safetensors import safe_open
from torch.distributed.checkpoint.metadata import MetadataIndex
from transformers import AutoModelForCausalLM

from salt_lightning import cli
from salt_lightning.errors import ConfigError
from salt_lightning.hugging_face.spec import ModelSpec
from salt_lightning.models import load_pretrained, read_checkpoint
from salt_lightning.storage import damage, pieces, shards

SCRIPT = Path(__file__).parent / "sharded_run.py"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Folder with step-00000001.ckpt/, written by two processes, and whole.pt, the same weights gathered."""
    out = tmp_path_factory.mktemp("sharded")
    done = forked.run([sys.executable, SCRIPT, out])
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved / "step-00000001.ckpt", tmp_path / "step-00000001.ckpt"))


def write_table(folder: Path, table) -> None:
    """Like an attacker: with the right checksum."""
    data = pieces.dump(table)
    (folder / "pieces.json").write_bytes(data)
    shards.forget()
    meta = torch.load(folder / "meta.pt", weights_only=True)
    torch.save({**meta, shards._DIGEST: shards._digest(data)}, folder / "meta.pt")


def test_every_tensor_is_the_one_that_was_gathered(saved):
    path = saved / "step-00000001.ckpt"
    assert (path / "__0_0.distcp").exists()  # the premises: two ranks, pieces of different sizes
    assert (path / "__1_0.distcp").exists()
    table = shards.table_of(path)
    chunks = table.state_dict_metadata["state_dict.student.model.model.embed_tokens.weight"].chunks
    assert [tuple(chunk.sizes) for chunk in chunks] == [(33, 32), (32, 32)]
    checkpoint = read_checkpoint(str(path), "CKPT")
    assert checkpoint["global_step"] == 1
    read, whole = checkpoint["state_dict"], torch.load(saved / "whole.pt", weights_only=True)
    assert [name.removeprefix("student.model.") for name in read] == list(whole)
    for name, tensor in whole.items():
        found = read[f"student.model.{name}"]
        assert torch.equal(found, tensor)
        assert found.dtype == tensor.dtype
        assert read.on_meta(f"student.model.{name}").shape == tensor.shape


def test_a_byte_that_changes_in_any_piece_is_found(copy, monkeypatch):
    """With more threads than cores, so that each thread has some pieces."""
    monkeypatch.setattr(damage, "num_cores", lambda: 3)
    assert damage.of(copy) is None
    shards.forget()
    places = shards.table_of(copy).storage_data
    assert gc.isenabled()  # not while it is read
    seen = 0
    for key, place in places.items():
        file = copy / place.relative_path
        content = file.read_bytes()
        changed = bytearray(content)
        with zipfile.ZipFile(io.BytesIO(content[place.offset :][: place.length])) as piece:
            headers = [info.header_offset for info in piece.infolist() if info.filename.endswith("/data/0")]
        if not headers:  # a rank's part of a tensor may be empty
            continue
        header = place.offset + headers[0]
        name, extra = struct.unpack("<2H", content[header + 26 :][:4])
        changed[header + 30 + name + extra] ^= 1  # the tensor's first byte
        file.write_bytes(changed)
        assert damage.of(copy).startswith(f"{place.relative_path}, {key.fqn}: "), place
        file.write_bytes(content)
        seen += 1
    assert seen > 20


def test_the_look_for_damage_opens_each_file_for_some_threads_and_not_for_each_piece(saved, monkeypatch):
    """256 ranks that each open 256 files for each of 900 tensors keep a network file system busy for many minutes."""
    opened: list[str] = []

    def counted(path, mode):
        opened.append(path.name)
        return open(path, mode)

    monkeypatch.setattr(damage, "open", counted, raising=False)
    for threads in (1, 8):
        opened.clear()
        monkeypatch.setattr(damage, "num_cores", lambda threads=threads: threads)
        assert damage.of(saved / "step-00000001.ckpt") is None
        assert sorted(opened) == sorted(["__0_0.distcp", "__1_0.distcp"] * max(1, threads // 2) + ["meta.pt"])


@pytest.mark.parametrize("parts", [1, 2, 5, 200])
def test_parts_of_the_look_for_damage_are_of_about_equal_size_and_together_all_of_it(saved, parts):
    """More parts than pieces, too: some are empty then. Laid end to end, so that a process reads a file or a few."""
    places = shards.table_of(saved / "step-00000001.ckpt").storage_data
    shared = [[place for _, place in damage._part_of(places, part, parts)] for part in range(parts)]
    assert list(chain(*shared)) == sorted(places.values(), key=lambda place: (place.relative_path, place.offset))
    lengths = [place.length for place in places.values()]
    assert max(sum(place.length for place in part) for part in shared) < sum(lengths) / parts + max(lengths)


def test_a_changed_byte_is_found_in_one_part_of_the_look(copy, saved):
    weight = read_checkpoint(str(copy), "CKPT")["state_dict"]["student.model.model.norm.weight"]
    path = copy / "__1_0.distcp"
    content = path.read_bytes()
    at = content.index(weight.numpy().tobytes()[-16:])
    path.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    found = [damage.of(copy, part, 3) for part in range(3)]
    assert sorted(found, key=bool) == [None, None, damage.of(copy)]


def test_the_look_for_damage_holds_no_piece_in_memory(tmp_path):
    with open(tmp_path / "two", "wb") as file:
        torch.save(torch.zeros(8, 1 << 20), file)
        start = file.tell()
        torch.save(torch.zeros(8, 1 << 20), file)
        place = SimpleNamespace(offset=start, length=file.tell() - start)
    tracemalloc.start()
    try:
        assert damage._changed(tmp_path / "two", [("", place)]) is None
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < place.length / 4
    cut = SimpleNamespace(offset=start + 1, length=place.length - 1)
    assert damage._changed(tmp_path / "two", [("", place), ("second: ", cut)]) == "second: cut off or damaged"


def test_a_sharded_checkpoint_is_a_teacher(saved):
    spec = ModelSpec(path=str(saved / "step-00000001.ckpt"))
    teacher = load_pretrained(spec, "teacher", torch.float32)
    whole = torch.load(saved / "whole.pt", weights_only=True)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in teacher.state_dict().items())


def test_it_is_exported_by_one_process(saved, tmp_path):
    assert cli.main(["export", str(saved / "step-00000001.ckpt"), str(tmp_path / "out")]) == 0
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    whole = torch.load(saved / "whole.pt", weights_only=True)
    own = AutoModelForCausalLM.from_config(model.config)
    own.load_state_dict(whole)
    ids_BT = torch.arange(8)[None]
    assert torch.equal(model.eval()(ids_BT).logits, own.eval()(ids_BT).logits)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert len(file.keys()) == len(whole) - 1  # tied: once


def test_an_export_of_half_a_checkpoint_is_one_line(copy, tmp_path, capsys):
    (copy / "__1_0.distcp").unlink()
    assert cli.main(["export", str(copy), str(tmp_path / "out")]) == 2
    said = f"error: export: CKPT {copy} is not a whole checkpoint of this project (__1_0.distcp is missing)"
    assert capsys.readouterr().err.split("\n") == ["", f"{said}; give one of RUN/checkpoints/step-*.ckpt", ""]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["meta.pt", "pieces.json", "__0_0.distcp", "__1_0.distcp"])
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_file_that_is_not_whole_is_named(copy, name, how):
    (copy / name).unlink()
    if how == "empty":
        (copy / name).touch()
    with pytest.raises(ConfigError) as caught:
        read_checkpoint(str(copy), "--ckpt_path")
    message = str(caught.value)
    assert message.startswith(f"--ckpt_path {copy}")
    assert name in message or "(EOFError)" in message
    assert "\n" not in message


def test_a_folder_of_something_else_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"CKPT .* is not a whole checkpoint of this project \(meta.pt is missing\)"):
        read_checkpoint(str(tmp_path), "CKPT")


def test_a_damaged_piece_is_named(copy):
    table = shards.table_of(copy)
    name = "student.model.model.norm.weight"
    info = table.storage_data[MetadataIndex(f"state_dict.{name}", [0])]
    data = bytearray((copy / info.relative_path).read_bytes())
    data[info.offset : info.offset + 4] = b"junk"
    (copy / info.relative_path).write_bytes(data)
    tensors = read_checkpoint(str(copy), "CKPT")["state_dict"]
    with pytest.raises(ConfigError, match=rf"{copy} is damaged: state_dict.{name} cannot be read"):
        tensors[name]


def test_a_table_that_leaves_elements_out_is_refused(copy):
    table = shards.table_of(copy)
    table.state_dict_metadata["state_dict.student.model.model.embed_tokens.weight"].chunks.pop()
    write_table(copy, table)
    with pytest.raises(ConfigError, match=r"\(pieces.json cannot be read: pieces that do not fill their tensor\)"):
        read_checkpoint(str(copy), "CKPT")


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        ("torch.float64", r"norm.weight cannot be read \(\(16,\) torch.float32 instead of \(16,\) torch.float64\)"),
        ("torch.Tensor", r"\(pieces.json cannot be read: a tensor without dtype\)"),
    ],
)
def test_a_table_of_another_type_is_refused(copy, dtype, said):
    table = shards.table_of(copy)
    name = "student.model.model.norm.weight"
    table.state_dict_metadata[f"state_dict.{name}"].properties.dtype = dtype
    write_table(copy, table)
    with pytest.raises(ConfigError, match=said):
        read_checkpoint(str(copy), "CKPT")["state_dict"][name]


def write(path: Path) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        settings = {"student": {"config": {"hidden_size": 8}}}
        shards.write({**ALWAYS, "state_dict": {"a": torch.arange(100)}, "hyper_parameters": settings}, path)
    finally:
        torch.distributed.destroy_process_group()


def test_a_checkpoint_without_our_table_is_told_from_a_damaged_one(tmp_path):
    write(path := tmp_path / "step-00000001.ckpt")
    (path / "pieces.json").unlink()
    assert damage.of(path) == "pieces.json is missing; if an earlier commit wrote it, export it with that"
    (path / ".metadata").unlink()
    assert damage.of(path) == "pieces.json is missing"


def test_no_flipped_bit_of_the_table_goes_unseen(tmp_path):
    path = tmp_path / "step-00000001.ckpt"
    write(path)
    assert damage.of(path) is None
    data = (path / "pieces.json").read_bytes()
    for at in range(0, len(data), 7):
        (path / "pieces.json").write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        assert damage.of(path), at
    (path / "pieces.json").write_bytes(b"[" * (1 << 20))
    assert damage.of(path) == "pieces.json cannot be read: it has changed since it was written"
    (path / "pieces.json").write_bytes(data)
    assert set(shards.load(path)) == {*ALWAYS, "hyper_parameters", "state_dict", "optimizer"}


@pytest.mark.parametrize("name", ["meta.pt", "pieces.json", "__0_0.distcp", "__1_0.distcp"])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_file_that_the_storage_does_not_give_is_no_damage(copy, name, number, monkeypatch):
    def opened(path, *args, **kwargs):
        if Path(path).name == name:
            raise OSError(number, os.strerror(number), str(path))
        return open(path, *args, **kwargs)

    for reader in (shards, damage, io):
        monkeypatch.setattr(reader, "open", opened, raising=False)
    shards.forget()
    with pytest.raises(OSError, match=rf"cannot be read \({os.strerror(number)}\); nothing was changed, try again$"):
        damage.of(copy)
