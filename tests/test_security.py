"""Hostile files: checkpoint, tokenizer, model folder, config, text. None may run code or reach outside.

Each plants a call that creates a file, `ran`, which must not appear.
"""

import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import sys
import tracemalloc
import zipfile
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import ALWAYS, add_table, arguments, error_of, write_corpus
from test_prepare import byte_tokenizer, corpus_of, prepare_many, stored
from test_sources import PACK
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from salt_lightning import ModelSpec, SALTDataModule, SALTModule, cli, export, preflight
from salt_lightning.errors import ConfigError, one_line, printable
from salt_lightning.hugging_face.token_ids import check_fit
from salt_lightning.models import build, load_pretrained, read_checkpoint
from salt_lightning.run import run_lock
from salt_lightning.run.run_folder import read_config, step_named
from salt_lightning.storage import damage, pieces, shards
from salt_lightning.storage.kinds import plain
from salt_lightning.text import documents, journal
from salt_lightning.text.documents import read_raw
from salt_lightning.text.prepare import prepare_tokens
from salt_lightning.text.sources import Hub, resolve
from salt_lightning.text.token_files import TokenFiles, sealed, verify
from salt_lightning.text.tokenizer import EOS, load_tokenizer, rules_fingerprint

CPU = torch.device("cpu")


class Touch:
    """Unpickling it runs a program that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def ran(tmp_path):
    """The file that hostile code would create; checked at the end of each test."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


def run(verb: str, *args: str) -> int:
    return cli.main([verb, *args])


def refused(capsys, *args: str) -> str:
    """The error by which a command ends."""
    assert run(*args) == 2
    return error_of(capsys)


# --- checkpoints ---


def with_program(path: Path, teacher: str, where: str, ran: Path) -> Path:
    """A checkpoint with a program in it, as a separate file."""
    saved = torch.load(teacher, weights_only=True)
    if where == "optimizer":
        saved["optimizer_states"][0]["state"] = Touch(ran)
    elif where == "alone":
        saved = Touch(ran)
    else:
        saved[where] = Touch(ran)
    if where == "bare pickle":
        path.write_bytes(pickle.dumps(saved, protocol=2))
    else:
        torch.save(saved, path)
    return path


PLACES = ["state_dict", "hyper_parameters", "optimizer", "callbacks", "alone", "bare pickle"]


@pytest.mark.parametrize("place", PLACES)
def test_a_checkpoint_that_is_a_program(place, settings, teacher, ran, tmp_path, capsys):
    evil = with_program(tmp_path / "evil.ckpt", teacher, place, ran)
    small = arguments(settings, {"run": str(tmp_path / "run"), "kd.weight": 0.5, "kd.steps": 2})
    assert "is not a whole checkpoint of this project" in refused(capsys, "fit", *small, f"--ckpt_path={evil}")
    assert "--model.teacher.path" in refused(capsys, "fit", *small, f"--model.teacher.path={evil}")
    assert "--ckpt_path" in refused(capsys, "validate", *small, f"--ckpt_path={evil}")
    assert "export: CKPT" in refused(capsys, "export", str(evil), str(tmp_path / "out"))
    with pytest.raises((pickle.UnpicklingError, ConfigError)):
        SALTModule.load_from_checkpoint(evil)


NO_RANKS = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@NO_RANKS
@pytest.mark.parametrize("name", ["meta.pt", "pieces.json", "__0_0.distcp"])
def test_a_sharded_checkpoint_with_a_program_in_one_file(name, ran, tmp_path):
    folder = sharded(tmp_path / "step-00000001.ckpt")
    if name == "pieces.json":
        (folder / name).write_bytes(pickle.dumps(Touch(ran)))
    elif name == "meta.pt":
        torch.save({"hyper_parameters": {"student": Touch(ran)}}, folder / name)
    else:  # instead of its tensor
        piece = io.BytesIO()
        torch.save(Touch(ran), piece)
        (folder / name).write_bytes(piece.getvalue())
        table = shards.table_of(folder)
        for place in table.storage_data.values():
            place.offset, place.length = 0, len(piece.getvalue())
        (folder / pieces.FILE).write_bytes(pieces.dump(table))
    reason = {
        "meta.pt": "meta.pt: cut off, damaged, or another kind of file",
        "pieces.json": "pieces.json cannot be read",
    }
    with pytest.raises(ConfigError, match=reason.get(name, r"state_dict.a cannot be read \(UnpicklingError\)")):
        dict(read_checkpoint(str(folder), "CKPT")["state_dict"])


def sharded(folder: Path, file: str = "") -> Path:
    """A checkpoint folder of one rank. `file`: the name of the tensor file in its table."""
    from torch.distributed import checkpoint as dcp

    folder.mkdir(parents=True)
    dcp.save({"state_dict.a": torch.ones(200)}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    add_table(folder)
    torch.save({**ALWAYS, "hyper_parameters": {"student": {"config": {"hidden_size": 8}}}}, folder / "meta.pt")
    if file:
        table = shards.table_of(folder)
        for place in table.storage_data.values():
            place.relative_path = file
        (folder / pieces.FILE).write_bytes(pieces.dump(table))
    return folder


@NO_RANKS
@pytest.mark.parametrize("file", ["../other/__0_0.distcp", "{absolute}", "sub/../../other/__0_0.distcp", ".."])
def test_a_sharded_checkpoint_that_names_a_file_elsewhere(file, tmp_path):
    other = sharded(tmp_path / "other") / "__0_0.distcp"
    folder = sharded(tmp_path / "x.ckpt", file.format(absolute=other))
    (folder / "sub").mkdir()
    with pytest.raises(ConfigError, match="lies outside of the folder"):
        read_checkpoint(str(folder), "CKPT")


@NO_RANKS
def test_removing_a_checkpoint_that_is_a_link_leaves_what_it_leads_to(tmp_path):
    there = sharded(tmp_path / "there")
    (tmp_path / "step-00000001.ckpt").symlink_to(there)
    shards.remove(tmp_path / "step-00000001.ckpt")
    assert (there / "meta.pt").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


ITSELF: list[object] = []
ITSELF.append(ITSELF)
MANY: list[object] = [1]
for _ in range(45):
    MANY = [MANY, MANY]
SPEC = {"path": None, "revision": None, "family": "llama", "config": {"hidden_size": 8}, "dtype": None}
WEIGHT = "student.model.model.norm.weight"
NONSENSE = {  # content of a checkpoint -> what the error says
    "a list in itself": ({"text": {"x": ITSELF}}, "contain themselves"),
    "a list many times over": ({"hyper_parameters": {"student": SPEC, "x": MANY}}, "contain themselves"),
    "a text for a step": ({"global_step": "3"}, "other contents"),
    "an endless step": ({"global_step": 10**300}, "other contents"),
    "a number for text": ({"text": 5}, "other contents"),
    "a number for a source": ({"text": {"source": [5]}}, "other contents"),
    "text for weights": ({"text": {"weights": "ab"}}, "other contents"),
    "a list for totals": ({"totals": [1]}, "other contents"),
    "other totals": ({"totals": {"x": 1}}, "other contents"),
    "text for a total": ({"totals_before": {"tokens": "x"}}, "other contents"),
    "text for a count": ({"data": {"--data.num_train_tokens": "x"}}, "other contents"),
    "text for a schedule": ({"kd_schedule": "x"}, "other contents"),
    "text for a weight": ({"kd_schedule": {"weight": "x"}}, "other contents"),
    "another setting": ({"hyper_parameters": {"student": {**SPEC, "x": 1}}}, "other contents"),
    "a number for a path": ({"hyper_parameters": {"student": SPEC, "teacher": {"path": 5}}}, "other contents"),
    "no temperature": (
        {"hyper_parameters": {"student": SPEC, "teacher_temperature": None, "logits_budget_gib": 1.0}},
        "other contents",
    ),
    "a number for rates": ({"lr_schedulers": 5}, "other contents"),
    "text for loops": ({"loops": "x"}, "other contents"),
    "text for weights of the model": ({"state_dict": {WEIGHT: "x"}}, "not a plain tensor"),
    "numbers for names": ({"state_dict": {1: torch.ones(2)}}, "AttributeError"),
    "sparse": ({"state_dict": {WEIGHT: torch.ones(2).to_sparse()}}, "not a plain tensor"),
    "no values": ({"state_dict": {WEIGHT: torch.ones(2, device="meta")}}, "not a plain tensor"),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_plain_data_of_other_kinds_is_one_line(what, teacher, tmp_path, capsys):
    content, said = NONSENSE[what]
    torch.save({**torch.load(teacher, weights_only=True), **content}, tmp_path / "evil.ckpt")
    line = refused(capsys, "export", str(tmp_path / "evil.ckpt"), str(tmp_path / "out"))
    assert "is not a whole checkpoint of this project" in line
    assert said in line


def test_what_python_callers_write_is_no_nonsense(teacher, tmp_path):
    saved = torch.load(teacher, weights_only=True)
    saved["text"]["weights"], saved["text"]["documents"] = (7, 0.3), None
    saved["kd_schedule"] |= {"steps": 20.0, "shape": "my own", "slope": [1]}
    saved["data"] |= {"--data.seed": 1.5}
    saved |= {"time_s": torch.tensor(1.5), "of a subclass": [0] * ((1 << 22) + 1)}
    saved["callbacks"]["Mine"] = {"state": 1 << 127, ("a", 1): {torch.float32}}
    saved["hyper_parameters"]["of a subclass"] = {"x": [torch.ones(2).to_sparse()]}
    torch.save(saved, tmp_path / "mine.ckpt")
    assert read_checkpoint(str(tmp_path / "mine.ckpt"), "CKPT")["kd_schedule"]["slope"] == [1]


def test_a_list_that_contains_itself_stops_no_save():
    state: list = []
    state.append(state)
    assert plain({"callbacks": state})["callbacks"]


def compressed(path: Path) -> Path:
    """The same archive with compressed members."""
    whole = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return path


def test_a_compressed_checkpoint_is_refused(teacher, settings, tmp_path, capsys):
    """Mapped, its bytes are taken for weights; unpacked, a few MB take many GB."""
    evil = compressed(Path(shutil.copy(teacher, tmp_path / "evil.ckpt")))
    for args in (
        ["export", str(evil), str(tmp_path / "out")],
        ["validate", *arguments(settings), f"--ckpt_path={evil}"],
    ):
        assert "in it is compressed" in refused(capsys, *args)


@NO_RANKS
@pytest.mark.parametrize("name", ["meta.pt", "__0_0.distcp"])
def test_a_compressed_part_of_a_sharded_checkpoint_is_refused(name, tmp_path):
    folder = sharded(tmp_path / "x.ckpt")
    compressed(folder / name)
    table = shards.table_of(folder)
    for place in table.storage_data.values():
        place.length = (folder / "__0_0.distcp").stat().st_size
    (folder / pieces.FILE).write_bytes(pieces.dump(table))
    assert "is compressed" in str(damage.of(folder))
    with pytest.raises(ConfigError, match="is compressed"):
        dict(read_checkpoint(str(folder), "CKPT")["state_dict"])


@NO_RANKS
def test_a_compressed_part_is_not_unpacked_before_it_is_refused(tmp_path, monkeypatch):
    folder = sharded(tmp_path / "x.ckpt")
    compressed(folder / "meta.pt")
    unpacked: list = []
    monkeypatch.setattr(torch, "load", lambda *args, **_: unpacked.append(args))
    assert "is compressed" in str(damage.of(folder))
    assert unpacked == []


def two_in_one(good: bytes, evil: bytes) -> bytes:
    """An archive that zipfile takes for `good` and torch for `evil`: torch starts at the place that the end states, and
    zipfile right before the end."""

    def parts(archive: bytes) -> tuple[bytes, bytes]:
        size, start = struct.unpack("<2L", archive[-10:-2])
        return archive[:start], archive[start : start + size]

    (good_body, good_list), (evil_body, evil_list) = parts(good), parts(evil)
    entry, shift = 0, len(evil_body) - len(good_body)
    while entry < len(good_list):  # zipfile adds how far the end is from where it states that the list is
        name, extra, comment = struct.unpack("<3H", good_list[entry + 28 : entry + 34])
        (at,) = struct.unpack("<L", good_list[entry + 42 : entry + 46])
        good_list = good_list[: entry + 42] + struct.pack("<L", at + shift) + good_list[entry + 46 :]
        entry += 46 + name + extra + comment
    end = good[-22:-10] + struct.pack("<2L", len(evil_list), len(evil_body)) + b"\0\0"
    return evil_body + evil_list + good_body + good_list + end


def test_an_archive_with_two_lists_of_entries_is_refused(tmp_path):
    """What was looked at would not be what torch reads."""
    archives = []
    for kind, text in ((zipfile.ZIP_STORED, b"good"), (zipfile.ZIP_DEFLATED, random.Random(0).randbytes(1000))):
        with zipfile.ZipFile(file := io.BytesIO(), "w", kind) as archive:
            archive.writestr("x/data.pkl", text)
        archives.append(file.getvalue())
    both = two_in_one(*archives)
    with zipfile.ZipFile(io.BytesIO(both)) as archive:
        assert archive.read("x/data.pkl") == b"good"
    with pytest.raises(zipfile.BadZipFile, match="another list of entries"):
        shards.require_stored(io.BytesIO(both))
    shards.require_stored(io.BytesIO(archives[0]))


@pytest.mark.parametrize("name", ["checkpoints/step-00000009.ckpt", ".out.0123456789abcdef0123456789abcdef.tmp"])
def test_a_pipe_is_not_waited_for(name, teacher, tmp_path, capsys):
    """In place of a checkpoint, or of what a killed export left."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    source = teacher if name.startswith(".") else str(tmp_path / name)
    code = run("export", source, str(tmp_path / "out"))
    assert (code, "is not a whole checkpoint" in capsys.readouterr().err) == (
        (0, False) if source == teacher else (2, True)
    )


def test_links_that_somebody_left_are_not_written_through(teacher, tmp_path):
    """By default compare writes beside the runs, perhaps somebody else's; a lock is emptied and written."""
    victim = tmp_path / "bashrc"
    victim.write_text("mine")
    for name in ("compare.md", "compare.json", "compare.png", ".lock", ".data.lock"):
        (tmp_path / name).symlink_to(victim)
    shutil.copytree(Path(teacher).parents[1], tmp_path / "run")
    assert run("compare", str(tmp_path / "run")) == 0
    assert (tmp_path / "compare.md").read_text().startswith("# Comparison")
    with pytest.raises(OSError, match="cannot be written"), run_lock.held(tmp_path):
        pass
    with pytest.raises(OSError, match="symbolic links"), journal.making(tmp_path / "data"):
        pass
    assert victim.read_text() == "mine"


def with_size(table: Metadata, size: list[int], in_pieces: bool = False) -> None:
    for tensor in table.state_dict_metadata.values():
        tensor.size = torch.Size(size)
        for piece in tensor.chunks if in_pieces else ():
            piece.sizes = tensor.size


def with_place(table: Metadata, **where: object) -> None:
    for place in table.storage_data.values():
        vars(place).update(where)


def with_chunks(table: Metadata, times: int) -> None:
    for tensor in table.state_dict_metadata.values():
        tensor.chunks *= times


TABLES = {
    "a size below 0": (lambda table: with_size(table, [-1]), "outside of its tensor"),
    "more than its pieces": (lambda table: with_size(table, [300]), "do not fill"),
    "a piece beyond the tensor": (lambda table: with_size(table, [7]), "outside of its tensor"),
    "an endless size": (lambda table: with_size(table, [1 << 62], True), "more elements than its files contain"),
    "more than there is": (lambda table: with_size(table, [1 << 36], True), "more elements than its files contain"),
    "a place before the file": (lambda table: with_place(table, offset=-5), "without a valid place"),
    "a length below 0": (lambda table: with_place(table, length=-5), "without a valid place"),
    "text for a place": (lambda table: with_place(table, offset="5"), "without a valid place"),
    "a number for a name": (lambda table: with_place(table, relative_path=5), "without a valid place"),
    "a line break in a name": (lambda table: with_place(table, relative_path="a\nerror: forged"), "impossible name"),
    "a name that no file has": (lambda table: with_place(table, relative_path="a" * 5000), "impossible name"),
    "a tensor without pieces": (lambda table: with_chunks(table, 0), "do not fill"),
    "a piece twice": (lambda table: with_chunks(table, 2), "do not fill"),
}


@NO_RANKS
@pytest.mark.parametrize("what", TABLES)
def test_a_table_of_a_sharded_checkpoint_with_impossible_numbers(what, tmp_path):
    folder, (change, said) = sharded(tmp_path / "x.ckpt"), TABLES[what]
    table = shards.table_of(folder)
    change(table)
    (folder / pieces.FILE).write_bytes(pieces.dump(table))
    with pytest.raises(ConfigError, match=rf"is not a whole checkpoint .*{said}"):
        dict(read_checkpoint(str(folder), "CKPT")["state_dict"])


@NO_RANKS
def test_a_program_that_comes_after_the_look_does_not_run(ran, tmp_path):
    """Between the look into a folder and the load of its tensors, its owner swaps a piece and the table."""
    folder, piece = sharded(tmp_path / "x.ckpt"), io.BytesIO()
    read_checkpoint(str(folder), "CKPT")
    torch.save(Touch(ran), piece)
    (folder / "__0_0.distcp").write_bytes(piece.getvalue())
    table = shards.table_of(folder)
    with_place(table, offset=0, length=len(piece.getvalue()))
    (folder / pieces.FILE).write_bytes(pieces.dump(table))
    with pytest.raises(CheckpointException, match="Weights only load failed"):
        shards.load_into({"state_dict": {"a": torch.zeros(200)}}, folder)


@NO_RANKS
def test_a_sparse_piece_of_a_sharded_checkpoint(tmp_path):
    folder, piece = sharded(tmp_path / "x.ckpt"), io.BytesIO()
    torch.save(torch.ones(200).to_sparse(), piece)
    (folder / "__0_0.distcp").write_bytes(piece.getvalue())
    table = shards.table_of(folder)
    with_place(table, offset=0, length=len(piece.getvalue()))
    (folder / pieces.FILE).write_bytes(pieces.dump(table))
    with pytest.raises(ConfigError, match="state_dict.a cannot be read .*not a plain tensor"):
        dict(read_checkpoint(str(folder), "CKPT")["state_dict"])


def code_folder(folder: Path, ran: Path, **config: object) -> Path:
    """A model folder that names its own code for everything that transformers loads."""
    folder.mkdir(exist_ok=True)
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\n")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    auto = {"auto_map": {name: ["evil.C", "evil.C"] if name == "AutoTokenizer" else "evil.C" for name in names}}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", **auto, **config}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", **auto}))
    return folder


def test_a_checkpoint_cannot_ask_for_code(settings, teacher, ran, tmp_path, capsys, monkeypatch):
    """Its settings name a folder with code, and say that this code is trusted."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever says yes to everything
    evil = code_folder(tmp_path / "evil", ran)
    saved = torch.load(teacher, weights_only=True)
    for model in ("student", "teacher"):
        saved["hyper_parameters"][model] |= {"path": str(evil), "trust_remote_code": True}
    torch.save(saved, tmp_path / "evil.ckpt")
    small = arguments(settings, {"run": str(tmp_path / "run"), "model.student.config": "{}"})
    assert "needs model code that comes with it" in refused(
        capsys, "validate", *small, f"--ckpt_path={tmp_path / 'evil.ckpt'}"
    )
    with pytest.raises(ConfigError, match="needs model code that comes with it"):
        SALTModule.load_from_checkpoint(tmp_path / "evil.ckpt")


@pytest.mark.parametrize("family", ["llama", "t5"])  # t5 is no causal model: the code would be all there is
def test_a_student_whose_settings_name_code(family, teacher, ran, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    evil = code_folder(tmp_path / "evil", ran)
    saved = torch.load(teacher, weights_only=True)
    saved["hyper_parameters"]["student"]["family"] = family
    saved["hyper_parameters"]["student"]["config"]["auto_map"] = {"AutoModelForCausalLM": f"{evil}--evil.C"}
    torch.save(saved, tmp_path / "evil.ckpt")
    code = run("export", str(tmp_path / "evil.ckpt"), str(tmp_path / "out"))
    assert code == (0 if family == "llama" else 2)
    assert "Traceback" not in capsys.readouterr().err
    assert code == 2 or "auto_map" not in (tmp_path / "out/config.json").read_text()  # nor names it to others


KERNELS = [
    {"_attn_implementation": "evil/kernel"},
    {"attn_implementation": "paged|evil/kernel"},
    {"_attn_implementation": {"": "evil/kernel"}},
    {"text_config": {"_attn_implementation": "evil/kernel"}},
]


@pytest.mark.parametrize("asked", [{"transformers_weights": "evil.bin"}, *KERNELS], ids=str)
def test_a_config_that_asks_for_compiled_code_or_other_weights(
    asked, settings, teacher, model_folder, tmp_path, capsys
):
    said = "names other files of weights" if "transformers_weights" in asked else "compiled code of the hub"
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, **asked}))
    for empty in (False, True):
        with pytest.raises(ConfigError, match=f"--model.teacher.path .*{said}"):
            load_pretrained(ModelSpec(path=str(model_folder)), "teacher", torch.float32, empty)
    saved = torch.load(teacher, weights_only=True)
    saved["hyper_parameters"]["student"]["config"] |= asked
    torch.save(saved, tmp_path / "evil.ckpt")
    assert said in refused(capsys, "export", str(tmp_path / "evil.ckpt"), str(tmp_path / "out"))
    assert said in refused(capsys, "validate", *arguments(settings), f"--ckpt_path={tmp_path / 'evil.ckpt'}")
    with pytest.raises(ConfigError, match=said):
        SALTModule.load_from_checkpoint(tmp_path / "evil.ckpt")


def test_a_checkpoint_cannot_ask_for_compiled_code(teacher, settings, tmp_path):
    """Its attention counts as not said; what the user types does not."""
    saved = torch.load(teacher, weights_only=True)
    for model in ("student", "teacher"):
        saved["hyper_parameters"][model]["attention"] = "evil/kernel"
    torch.save(saved, tmp_path / "evil.ckpt")
    module = SALTModule.load_from_checkpoint(tmp_path / "evil.ckpt")
    assert (module.student_spec.attention, module.teacher_spec.attention) == (None, None)
    small = arguments(settings, {"run": str(tmp_path / "run"), "model.student.config": "{}"})
    assert run("validate", *small, f"--ckpt_path={tmp_path / 'evil.ckpt'}") == 0
    assert ModelSpec(attention="owner/kernel").attention == "owner/kernel"


NAMES = [{"architectures": 5}, {"architectures": [5]}, {"model_type": []}, {"model_type": {}}]


@pytest.mark.parametrize("names", NAMES, ids=str)
def test_a_config_whose_names_are_none(names, model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, **names}))
    with pytest.raises(ConfigError, match="config.json's model_type or architectures are not names"):
        load_pretrained(ModelSpec(path=str(model_folder)), "teacher", torch.float32)


PROGRAM = {"class_path": "evil_module.C", "init_args": {}}
HYPER_PARAMETERS = {
    "of Lightning": {"_class_path": "evil_module.C"},
    "an instantiator": {"_instantiator": "evil_module.C"},
    "module": PROGRAM,
    "student": {"student": PROGRAM},
    "student by name": {"student": "evil_module.C"},
    "a student's setting": {"student": {"config": {"rope_parameters": [PROGRAM]}}},
    "optim": {"optim": PROGRAM},
    "teacher by name": {"teacher": "evil_module.C"},
    "optim by name": {"optim": "evil_module.C"},
}


@pytest.mark.parametrize("where", HYPER_PARAMETERS)
def test_a_checkpoint_cannot_name_a_class(where, settings, teacher, ran, tmp_path, capsys, monkeypatch):
    (tmp_path / "evil_module.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass C: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    saved = torch.load(teacher, weights_only=True)
    for key, value in HYPER_PARAMETERS[where].items():
        if isinstance(value, dict) and "config" in value:
            saved["hyper_parameters"][key]["config"] |= value["config"]
        else:
            saved["hyper_parameters"][key] = value
    torch.save(saved, tmp_path / "evil.ckpt")
    small = arguments(settings, {"run": str(tmp_path / "run"), "kd.weight": 0.0})
    refused(capsys, "validate", *small, f"--ckpt_path={tmp_path / 'evil.ckpt'}")
    refused(capsys, "fit", *small, f"--ckpt_path={tmp_path / 'evil.ckpt'}")
    with suppress(ConfigError, TypeError, ValueError):  # from Python a setting of no meaning is left out
        SALTModule.load_from_checkpoint(tmp_path / "evil.ckpt")
    assert "evil_module" not in sys.modules


# --- model and tokenizer folders ---


@pytest.fixture(scope="module")
def exported(teacher, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("models") / "teacher"
    assert cli.main(["export", teacher, str(target)]) == 0
    return target


@pytest.fixture
def model_folder(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "model"))


@pytest.mark.parametrize("beside", [True, False])
def test_a_pickle_beside_or_instead_of_safetensors(beside, model_folder, ran):
    torch.save(Touch(ran), model_folder / "pytorch_model.bin")
    torch.save(Touch(ran), model_folder / "optimizer.pt")
    spec = ModelSpec(path=str(model_folder))
    if beside:
        load_pretrained(spec, "teacher", torch.float32)
        return
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"--model.teacher.path .* has no weights: .*pickles are not read"):
        load_pretrained(spec, "teacher", torch.float32)


@pytest.mark.parametrize("file", ["evil.bin", "../evil.bin", "{absolute}"])
def test_an_index_that_names_a_pickle_or_a_file_elsewhere(file, model_folder, ran):
    place = file.format(absolute=model_folder.parent / "evil.bin")
    torch.save(Touch(ran), model_folder / place)
    from safetensors import safe_open

    with safe_open(model_folder / "model.safetensors", "pt") as weights:
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights.keys(), place)}
    (model_folder / "model.safetensors").unlink()
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="--model.teacher.path"):
        load_pretrained(ModelSpec(path=str(model_folder)), "teacher", torch.float32)


def test_an_index_that_names_weights_elsewhere(model_folder):
    from safetensors import safe_open

    with safe_open(model_folder / "model.safetensors", "pt") as weights:
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights.keys(), "../elsewhere.safetensors")}
    (model_folder / "model.safetensors").rename(model_folder.parent / "elsewhere.safetensors")
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ConfigError, match=r"--model.teacher.path .*'../elsewhere.safetensors', which lies outside of the folder"
    ):
        load_pretrained(ModelSpec(path=str(model_folder)), "teacher", torch.float32)


def test_a_model_folder_with_code(ran, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    evil = code_folder(tmp_path / "evil", ran)
    for empty in (False, True):
        with pytest.raises(ConfigError, match=r"--model.teacher.path .* needs model code that comes with it"):
            load_pretrained(ModelSpec(path=str(evil)), "teacher", torch.float32, empty)
    with pytest.raises(ConfigError, match=r"--data.tokenizer: cannot load"):
        load_tokenizer(str(evil))


def test_a_known_model_whose_folder_has_code_too(model_folder, ran, tmp_path, monkeypatch):
    """transformers' own classes are taken; of its tokenizer too, where it is compared with the data's."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    config = json.loads((model_folder / "config.json").read_text())
    words = json.loads((model_folder / "tokenizer_config.json").read_text())
    code_folder(model_folder, ran, **config)
    evil = json.loads((model_folder / "tokenizer_config.json").read_text())
    (model_folder / "tokenizer_config.json").write_text(json.dumps({**words, "auto_map": evil["auto_map"]}))
    data = SALTDataModule("x", tokenizer=str(model_folder), block_size=8)
    spec = ModelSpec(path=str(model_folder))
    build(spec, "teacher", data, torch.float32, CPU)
    assert check_fit(spec, "teacher", data)[0]
    export._write_tokenizer(load_tokenizer(str(model_folder)), tmp_path / "out")
    assert "auto_map" not in (tmp_path / "out/tokenizer_config.json").read_text()
    (model_folder / "tokenizer_config.json").write_text(json.dumps(evil))
    with pytest.raises(ConfigError, match=r"--model.teacher.path .*: its tokenizer cannot be loaded"):
        check_fit(spec, "teacher", data)


@pytest.mark.parametrize("damage", ["code", "cut"])
def test_the_tokenizer_beside_a_checkpoint(damage, settings, teacher, ran, tmp_path, monkeypatch):
    """It is read to show which tokens differ, or whether they do: of anybody's checkpoint."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    data = SALTDataModule(settings["data.source"], vocab_size=300, cache_dir=str(tmp_path / "cache"), block_size=16)
    data.prepare_data()
    data.setup("fit")
    saved = torch.load(teacher, weights_only=True)
    path = tmp_path / "run/checkpoints/step-00000001.ckpt"
    path.parent.mkdir(parents=True)
    torch.save({**saved, "tokenizer": "another"}, path)
    folder = path.parent.parent / "tokenizer"
    if damage == "code":
        code_folder(folder, ran)
    else:
        folder.mkdir()
        (folder / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ConfigError, match=rf"^--model.teacher.path {path}: its tokenizer cannot be loaded"):
        check_fit(ModelSpec(path=str(path)), "teacher", data)


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "added_tokens_file", "special_tokens_map_file"])
def test_a_tokenizer_that_names_a_file_elsewhere(key, model_folder, ran, tmp_path):
    """Its own files are read, or it is refused; what it names is neither run nor shown."""
    (tmp_path / "secret").write_text("top secret")
    config = json.loads((model_folder / "tokenizer_config.json").read_text())
    before = load_tokenizer(str(model_folder)).get_vocab()
    (model_folder / "tokenizer_config.json").write_text(json.dumps({**config, key: str(tmp_path / "secret")}))
    with suppress(ConfigError):
        assert load_tokenizer(str(model_folder)).get_vocab() == before


def test_a_tokenizer_that_pads_and_cuts_by_itself(model_folder):
    """Otherwise it would decide how many ids a text has; the ids themselves stay the same."""
    before = rules_fingerprint(load_tokenizer(str(model_folder)))
    rules = json.loads((model_folder / "tokenizer.json").read_text())
    kind = {"pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": EOS}
    rules["padding"] = {"strategy": {"Fixed": 1 << 20}, "direction": "Right", **kind}
    rules["truncation"] = {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (model_folder / "tokenizer.json").write_text(json.dumps(rules))
    tokenizer = load_tokenizer(str(model_folder))
    assert 1 < len(tokenizer.backend_tokenizer.encode("a frozen teacher helps").ids) < 100
    assert rules_fingerprint(tokenizer) == before


def test_what_a_checkpoint_says_stays_text_in_the_model_card(teacher, tmp_path):
    evil = "x\n\n# Run this\n\\<script>alert(1)</script> ![](http://evil/x.png) `y`"
    saved = torch.load(teacher, weights_only=True)
    saved["hyper_parameters"]["teacher"]["path"] = evil
    saved["totals"]["taught_steps"] = 1
    saved["text"]["source"] = [evil]
    torch.save(saved, tmp_path / "evil.ckpt")
    assert run("export", str(tmp_path / "evil.ckpt"), str(tmp_path / "out")) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    told = r"x\n\n# Run this\n\\\<script>alert(1)\</script> !\[](http://evil/x.png) \`y\`"
    assert [line for line in card.splitlines() if "script" in line] == [
        f"- teacher: {told}",
        f"- training text: {told}",
    ]


# --- settings ---


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['touch {ran}']", "run: !!python/name:os.system"])
def test_yaml_with_tags(text, settings, ran, tmp_path, capsys):
    (tmp_path / "evil.yaml").write_text(text.format(ran=ran))
    refused(capsys, "fit", *arguments(settings), f"--config={tmp_path / 'evil.yaml'}")
    assert run("fit", *arguments(settings), f"--model.student.config={text.format(ran=ran)}") == 2


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system ['touch {ran}']", "a: &a [*a]", "- 1", "[" * 5000, b"\xff".decode("latin-1")],
    ids=["tag", "loop", "list", "deep", "bytes"],
)
def test_a_run_whose_config_is_hostile(text, teacher, ran, tmp_path, capsys):
    bad = Path(shutil.copytree(Path(teacher).parents[1], tmp_path / "bad"))
    (bad / "config.yaml").write_bytes(text.format(ran=ran).encode("latin-1"))
    assert "is not YAML" in refused(capsys, "compare", str(bad), f"--out={tmp_path}")
    refused(capsys, "export", str(bad / "checkpoints/step-00000020.ckpt"), str(tmp_path / "out"))


@pytest.mark.parametrize(
    "odd",
    [
        *("seed_everything: {}", "trainer: {val_check_interval: .nan}"),
        *("trainer: {val_check_interval: .inf}", "kd: {steps: 18446744073709551615}", 'run: "\\ud800"'),
    ],
)
def test_a_run_whose_settings_no_run_has(odd, tmp_path):
    (tmp_path / "config.yaml").write_text(odd)
    with pytest.raises(ConfigError, match="no run writes such values for"):
        read_config(tmp_path / "config.yaml")


def test_a_step_that_no_checkpoint_has():
    assert step_named(f"step-{'9' * 5000}.ckpt") is None  # more digits than int() takes


def test_what_a_run_says_forges_no_line_of_a_comparison(teacher, tmp_path):
    odd = {
        "a": {"student": {"path": "x\ntouch ran; return\n\x1b]0;y\x07<img src=x>![](y)"}},
        "b": {"teacher": {"path": "t"}, "kd": {"weight": 0.5, "shape": "z | <script>\n| a | $\\frac{$"}},
    }
    for name, settings in odd.items():
        bad = Path(shutil.copytree(Path(teacher).parents[1], tmp_path / name))
        config = yaml.safe_load((bad / "config.yaml").read_text())
        for group in (config, config["model"]):
            for key in group.keys() & settings.keys():
                group[key] |= settings[key]
        (bad / "config.yaml").write_text(json.dumps(config))
    assert run("compare", str(tmp_path / "a"), str(tmp_path / "b")) == 0
    text = (tmp_path / "compare.md").read_text()
    assert not re.search(r"^(touch|\| a \|)|\x1b|<(script|img)|!\[\]", text, re.MULTILINE)
    assert r"the weights of x\ntouch ran; return\n\x1b]0;y\x07&lt;img src=x>!\[](y):" in text
    assert r"z \| &lt;script>\n\| a \| $\frac{$" in text


def test_a_config_may_name_classes_and_is_trusted(settings, tmp_path, capsys, monkeypatch):
    """What SECURITY.md says of --config: it imports, as a program does. Only what it asks for is made."""
    (tmp_path / "some_module.py").write_text(
        "class NoCallback:\n    def __init__(self):\n        raise SystemExit(99)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "x.yaml").write_text("trainer:\n  callbacks:\n  - class_path: some_module.NoCallback\n")
    refused(capsys, "fit", *arguments(settings), f"--config={tmp_path / 'x.yaml'}")  # imported, and no Callback
    monkeypatch.delitem(sys.modules, "some_module", raising=False)
    for section in ("data", "kd", "checkpoint"):
        (tmp_path / "x.yaml").write_text(f"{section}:\n  class_path: some_module.NoCallback\n")
        refused(capsys, "fit", *arguments(settings), f"--config={tmp_path / 'x.yaml'}")
        assert "some_module" not in sys.modules


# --- text ---


def test_a_data_folder_that_names_files_elsewhere(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    (tmp_path / "secret.jsonl").write_text('{"text": "top secret"}\n')
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "books-secret.jsonl").write_text('{"text": "top secret"}\n')
    for place in ("../secret.jsonl", "../books-secret.jsonl", str(tmp_path / "secret.jsonl")):
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {place}\n---\n")
        with pytest.raises(ConfigError, match=r"README.md of '.*books' names '.*secret.jsonl', which is outside"):
            corpus_of(folder)


class Asked(BaseHTTPRequestHandler):
    """A server that notes who asks."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


REMOTE = {
    "text": "data_files: {url}",
    "a list": "data_files: [a.jsonl, {url}]",
    "by split": "data_files: [{{split: train, path: [{url}]}}]",
    "a mapping": "data_files: {{train: {url}}}",
    "a chain": "data_files: simplecache::{url}",
    "a member of an archive": "data_files: zip://x.jsonl::{url}",
    "a folder": "data_dir: {url}",
}


@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("how", REMOTE)
def test_a_data_folder_that_names_an_address(how, file, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Asked) as server:
        server.asked = []
        Thread(target=server.serve_forever, daemon=True).start()
        entry = REMOTE[how].format(url=f"http://127.0.0.1:{server.server_port}/x.jsonl")
        text, fence = f"configs:\n- config_name: default\n  {entry}\n", "---\n" * (file == "README.md")
        (tmp_path / file).write_text(fence + text + fence)
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
        with pytest.raises(
            ConfigError, match=r"--data.source: the README.md of .* names '.*http://127.*', which is no"
        ):
            corpus_of(tmp_path)
        assert server.asked == []
        server.shutdown()


def test_links_out_of_a_data_folder_are_said(tmp_path, caplog):
    (tmp_path / "secret.txt").write_text("top secret")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("b")
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "link.txt").symlink_to("a.txt")
    corpus_of(folder)
    assert "links to files outside it" not in caplog.text
    (folder / "secret.txt").symlink_to("../secret.txt")
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    corpus_of(folder)
    assert re.search(r"--data.source: 2 files of \S+books are links to files outside it \(e.g. \S+\)", caplog.text)


FORGED = "a\nwarning: forged\x1b[2J"


def test_a_file_s_name_forges_no_line_of_the_log(tmp_path, caplog):
    rows, texts = tmp_path / "rows", tmp_path / "texts"
    rows.mkdir()
    texts.mkdir()
    (rows / "a.jsonl").write_text('{"text": "a"}')
    (rows / f"{FORGED}.md").write_text("not read")
    (texts / f"{FORGED}.txt").symlink_to(rows / f"{FORGED}.md")
    bad, text = tmp_path / f"{FORGED}.jsonl", tmp_path / f"{FORGED}.txt"
    bad.write_text('{"text": "cut')
    text.write_text("a,b")
    with caplog.at_level("INFO"):
        corpus = corpus_of(rows, texts, bad, bad, text, skip_bad_lines=True)
        resolve("--data.source", [str(text)], Hub(subset="x"))
        prepare_tokens(corpus, byte_tokenizer(), 0.0, tmp_path / "cache", 1)
    said = [record.getMessage() for record in caplog.records]
    for part in ("left out: ", "links to files", "more than once", "names files", "bad lines left"):
        (line,) = (line for line in said if part in line)
        assert "a\\nwarning: forged\\x1b[2J" in line
        assert line.isprintable()


@pytest.mark.parametrize("finding", [preflight.seen_in_training([FORGED], 1, 0.5), preflight.unwatched([FORGED])])
def test_a_name_forges_no_line_of_a_finding(finding):
    assert finding.said.isprintable()


def test_letters_that_a_language_needs_can_be_copied_from_a_message():
    """Of Persian and Japanese, and an emoji."""
    name = "\u0645\u06cc\u200c\u0631\u0648\u0645 \u65b0\u3000\u898f \U0001f468\u200d\U0001f469"
    assert printable(name) == one_line(f" {name}\n") == name
    assert printable("\u202e\u200f\ufeff\u200b\n") == "\\u202e\\u200f\\ufeff\\u200b\\n"


def test_the_links_of_the_hubs_cache_are_its_own(tmp_path, caplog):
    blobs, snapshot = tmp_path / "datasets--x" / "blobs", tmp_path / "datasets--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "123").write_text('{"text": "a"}\n')
    (snapshot / "a.jsonl").symlink_to("../../blobs/123")
    corpus_of(snapshot)
    assert "links to files outside it" not in caplog.text


def test_a_data_folder_with_a_script(tmp_path, ran):
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "books.py").write_text(f"open({str(ran)!r}, 'w')")
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ConfigError, match=r"--data.source: cannot read the folder .* scripts are no longer supported"):
        corpus_of(folder)


def test_parquet_with_a_pickle_in_its_schema(ran, tmp_path):
    """As Arrow once stored Python's own types (CVE-2023-47248)."""
    names = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    metadata = {**names, b"ARROW:extension:metadata": pickle.dumps(Touch(ran))}
    field = pa.field("text", pa.string(), metadata=metadata)
    pq.write_table(pa.table([pa.array(["a"])], schema=pa.schema([field])), tmp_path / "x.parquet")
    prepared = prepare_tokens(corpus_of(tmp_path / "x.parquet"), byte_tokenizer(), 0.0, tmp_path / "cache", 1)
    assert stored(prepared, "train", byte_tokenizer()) == [("a", "x")]


BOMBS = {
    "deep": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep beside the text": b'{"n": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b', "text": "a"}',
    "enormous number": b'{"text": "a", "n": ' + b"9" * 100_000 + b"}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_json_bombs_are_one_line(bomb, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(BOMBS[bomb])
    with pytest.raises(ConfigError, match=r"x.jsonl: line 1 is not JSON"):
        prepare_tokens(corpus_of(tmp_path / "x.jsonl"), byte_tokenizer(), 0.0, tmp_path / "cache", 1)


@pytest.mark.parametrize("kind", PACK)
def test_a_decompression_bomb_takes_no_more_memory_than_a_document_may(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_MAX_BYTES", 1 << 20)
    path = tmp_path / f"x.jsonl.{kind}"
    path.write_bytes(PACK[kind](b'{"text": "' + b"a" * (64 << 20)))
    assert path.stat().st_size < 1 << 17
    tracemalloc.start()  # it does not see what a library of C holds, but what it hands out
    with pytest.raises(ConfigError, match=r"longer than 1 MiB; split it"):
        next(read_raw(corpus_of(path)))
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


# --- the cache ---


def test_a_cache_whose_manifest_makes_pointers_of_bytes(tmp_path):
    folder = prepare_many(write_corpus(tmp_path / "x.jsonl", 20), tmp_path / "cache", 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["checksum"]
    (folder / "manifest.json").write_text(json.dumps(sealed({**manifest, "dtype": "object"})))
    with pytest.raises(ConfigError, match=r"manifest.json is not as it was written"):
        TokenFiles(folder, "train")


@pytest.mark.parametrize(
    "journal", [b"[]", b"[1]", b"\xff", b"{", b"[" * 100_000, b'{"origin": "x", "path": "../../x"}']
)
def test_a_journal_that_is_hostile_is_not_followed(journal, tmp_path):
    path = write_corpus(tmp_path / "x.jsonl", 20)
    whole = prepare_many(path, tmp_path / "whole", 1)
    partial = tmp_path / "cache" / f".{whole.name}.partial"
    partial.mkdir(parents=True)
    (partial / "journal.json").write_bytes(journal)
    verify(prepare_many(path, tmp_path / "cache", 1))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [whole.name]
