"""Checkpoint files: which one is `last`, what a failed write leaves, which ones are kept."""

import errno
import os
import random
import re
import shutil
import signal
import stat
import zipfile
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from pickle import PicklingError
from types import SimpleNamespace

import pytest
import ranks
import torch
from conftest import ALWAYS, StopAt, arguments, built, error_of
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment

import salt_lightning
from salt_lightning import ModelSpec, SALTDataModule, SALTModule, cli
from salt_lightning.checkpoint import AtomicCheckpointIO, RunCheckpoint, newest
from salt_lightning.errors import ConfigError
from salt_lightning.run.run_folder import is_over, saved
from salt_lightning.storage import damage, shards


def save(path: Path, **more) -> None:
    """Writes a minimal checkpoint."""
    settings = {"student": {"config": {"hidden_size": 1}}}
    torch.save({**ALWAYS, "state_dict": {}, "hyper_parameters": settings, **more}, path)


def test_last_is_the_highest_step(tmp_path):
    assert newest(tmp_path) is None
    for name in (
        "step-00000009.ckpt",
        "step-00000120.ckpt",
        "step-00000030.ckpt",
        ".step-00000999.ckpt.1.tmp",
        "x.ckpt",
    ):
        save(tmp_path / name)
    assert newest(tmp_path) == tmp_path / "step-00000120.ckpt"


@pytest.mark.parametrize("how", ["cut off", "a byte flipped", "empty", "other contents"])
def test_a_damaged_file_is_passed_over_by_name(tmp_path, how, caplog):
    files = [tmp_path / f"step-{step:08d}.ckpt" for step in (1, 2)]
    for file in files:
        save(file, x=torch.arange(1000))
    content = bytearray(files[1].read_bytes())
    place = content.index(torch.arange(1000).numpy().tobytes()) + 4321
    if how == "a byte flipped":
        content[place] ^= 1
    else:
        del content[place if how == "cut off" else 0 :]
    files[1].write_bytes(content)
    if how == "other contents":
        torch.save({"x": 1}, files[1])
    assert newest(tmp_path) == files[0]
    assert f"{files[1]} is skipped: " in caplog.text


def test_a_name_in_a_checkpoint_forges_no_line_of_the_log(tmp_path, caplog):
    save(file := tmp_path / "step-00000001.ckpt")
    assert newest(tmp_path, lambda path: "a\nerror: b\x1b[31m is missing") is None
    assert f"{file} is skipped: a\\nerror: b\\x1b[31m is missing" in caplog.text


def fails(number: int):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


def cannot_map(*args, **kwargs):
    raise RuntimeError("unable to mmap 1234 bytes from file <x.ckpt>: Cannot allocate memory (12)")


FAULTS = {  # what fails, how, and what it says
    "a stale handle": (zipfile.io, "open", fails(errno.ESTALE), errno.ESTALE),
    "no rights": (zipfile.io, "open", fails(errno.EACCES), errno.EACCES),
    "a disk that fails while the directory is read": (zipfile, "_EndRecData", fails(errno.EIO), errno.EIO),
    "a disk that fails while the checksums are computed": (zipfile.ZipExtFile, "read", fails(errno.EIO), errno.EIO),
    "no memory to map it": (torch.UntypedStorage, "from_file", cannot_map, errno.ENOMEM),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_storage_does_not_give_is_no_damage(tmp_path, fault, monkeypatch, caplog):
    """The run would go on from an older checkpoint, and set aside the whole one after it."""
    for step in (1, 2):
        save(tmp_path / f"step-{step:08d}.ckpt", x=torch.arange(1000))
    owner, name, failing, number = FAULTS[fault]
    monkeypatch.setattr(owner, name, failing)
    said = rf"/step-00000002.ckpt cannot be read \({os.strerror(number)}\); nothing was changed, try again$"
    with pytest.raises(OSError, match=said):
        newest(tmp_path)
    assert "skipped" not in caplog.text
    monkeypatch.undo()
    assert newest(tmp_path) == tmp_path / "step-00000002.ckpt"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "is the disk full? Make room and continue with --ckpt_path last"),
        (errno.EDQUOT, "is the disk full? Make room and continue with --ckpt_path last"),
        (errno.EIO, "fix that and continue with --ckpt_path last"),
        (errno.ESTALE, "fix that and continue with --ckpt_path last"),
        (errno.EROFS, "choose another folder"),
    ],
)
@pytest.mark.parametrize("what", ["fsync", "replace"])
def test_a_save_that_fails_names_the_file_and_what_helps(tmp_path, number, remedy, what, monkeypatch):
    monkeypatch.setattr(os, what, fails(number))
    with pytest.raises(OSError, match=re.escape(f"{tmp_path}/x.ckpt cannot be written ([Errno {number}] ")) as caught:
        AtomicCheckpointIO().save_checkpoint({"x": torch.arange(10)}, tmp_path / "x.ckpt")
    assert str(caught.value).endswith(f"; {remedy}")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EIO])
def test_folders_that_cannot_be_synced_end_no_run(tmp_path, number, monkeypatch):
    synced, files = os.fsync, []

    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        files.append(descriptor)
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    path = tmp_path / "x.ckpt"
    failing = pytest.raises(OSError, match=f"{path} cannot be written") if number == errno.EIO else nullcontext()
    with failing:
        AtomicCheckpointIO().save_checkpoint({"x": torch.arange(10)}, path)
    assert len(files) == 1
    assert torch.load(path)["x"].tolist() == list(range(10))


@pytest.mark.parametrize("options", [["--ckpt_path", "last"], []], ids=["going on", "new"])
def test_a_folder_of_checkpoints_that_cannot_be_listed_is_not_an_empty_one(
    tmp_path, settings, options, monkeypatch, capsys
):
    folder, listed = tmp_path / "run" / "checkpoints", os.listdir
    folder.mkdir(parents=True)
    save(folder / "step-00000002.ckpt")
    folder.chmod(0)  # root may list it all the same
    deny = fails(errno.EACCES)
    monkeypatch.setattr(os, "listdir", lambda path=".": deny() if Path(path) == folder else listed(path))
    assert cli.main(["fit", *arguments(settings, {"run": str(tmp_path / "run"), "kd.weight": 0.0}), *options]) == 2
    folder.chmod(0o700)
    said = f"error: {folder} cannot be listed (Permission denied); choose a folder that you may read"
    assert error_of(capsys) == said
    assert listed(tmp_path / "run") == ["checkpoints"]


def test_a_folder_that_the_storage_does_not_list_is_no_empty_one(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "listdir", fails(errno.EIO))
    with pytest.raises(OSError, match=r"cannot be listed \(Input/output error\); nothing was changed, try again"):
        saved(tmp_path)


def test_no_flipped_bit_goes_unnoticed_and_changes_something(tmp_path):
    """Anywhere in the file: in tensors, the pickle, the zip's headers or its directory at the end."""
    path, rng = tmp_path / "step-00000001.ckpt", random.Random(0)
    save(path, x=torch.arange(100), step=3)
    content, found, harmless = path.read_bytes(), Counter(), 0
    directory = content.index(b"PK\x01\x02")
    places = [*rng.sample(range(directory), 200), *range(directory, len(content))]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        reason = damage.of(path)
        found[reason] += 1
        if reason:
            assert reason in [damage.of(path, part, 3) for part in range(3)], place
        if reason is None:  # dates, attributes, padding
            harmless += 1
            loaded = torch.load(path, weights_only=True)
            assert torch.equal(loaded["x"], torch.arange(100)), place
            assert loaded["step"] == 3
    assert 0 < harmless < 0.75 * len(places), found
    at = content.index(torch.arange(100).numpy().tobytes()) + 8
    path.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    shared = [damage.of(path, part, 3) for part in range(3)]  # each reads other entries
    assert sorted(shared, key=bool) == [None, None, damage.of(path)]


def test_an_entry_that_is_marked_as_a_folder_is_damage(tmp_path):
    """torch would take what its memory happens to hold for the entry."""
    path = tmp_path / "step-00000001.ckpt"
    save(path, x=torch.arange(100))
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at + 38] ^= 0x10  # the external attributes in the zip format's central directory
    path.write_bytes(content)
    assert damage.of(path).endswith("in it is marked as a folder")
    assert damage.in_bytes(path).endswith("in it is marked as a folder")


@pytest.mark.parametrize("name", ["state_dict", "hyper_parameters", "global_step", "data", "text", "tokenizer"])
def test_a_file_without_what_every_checkpoint_has_is_no_whole_one(name, teacher, tmp_path):
    held = torch.load(teacher, weights_only=True)
    torch.save({key: value for key, value in held.items() if key != name}, tmp_path / "step-00000020.ckpt")
    assert damage.of(tmp_path / "step-00000020.ckpt") == "other contents"


def test_a_fit_goes_on_from_a_whole_checkpoint_alone(settings, tmp_path, capsys):
    weights = ModelCheckpoint(tmp_path / "own", "weights", save_weights_only=True, every_n_train_steps=12)
    assert ranks.run(["fit", *arguments(settings, {"kd.weight": 0.0, "run": str(tmp_path / "run")})], weights) == 0
    again = {"ckpt_path": str(tmp_path / "own" / "weights.ckpt"), "run": str(tmp_path / "again")}
    assert cli.main(["fit", *arguments(settings, {"kd.weight": 0.0}, again)]) == 2
    assert "this checkpoint contains only weights, as with ModelCheckpoint's save_weights_only; use" in error_of(capsys)
    looked_at = {key: value for key, value in settings.items() if key.startswith(("data.", "trainer."))}
    assert cli.main(["validate", *arguments(looked_at, again)]) == 0


@pytest.mark.parametrize("turned", [False, True])
def test_a_checkpoint_has_the_score_of_its_own_validation(settings, tmp_path, turned):
    own = {key.removeprefix("data."): value for key, value in settings.items() if key.startswith("data.")}
    best = ModelCheckpoint(tmp_path / "best", monitor="val/ce", mode="max")  # the first is the worst, and so the best
    callbacks = [best, RunCheckpoint(every_n_steps=2, keep=None)]
    trainer = Trainer(
        max_steps=4, val_check_interval=2, callbacks=callbacks[::-1] if turned else callbacks,
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False,
    )  # fmt: skip
    student = ModelSpec(config=settings["model.student.config"])
    trainer.fit(SALTModule(student), SALTDataModule(**own))
    held = torch.load(tmp_path / "checkpoints/step-00000002.ckpt", weights_only=True)
    (state,) = (state for name, state in held["callbacks"].items() if name.startswith("ModelCheckpoint"))
    assert list(state["best_k_models"]) == [best.best_model_path]


def test_a_fit_goes_on_from_what_a_newer_version_records(settings, teacher, tmp_path):
    held, path = torch.load(teacher, weights_only=True), tmp_path / "other" / "checkpoints" / "step-00000020.ckpt"
    path.parent.mkdir(parents=True)
    torch.save({**held, "data": {**held["data"], "--data.future": 1}}, path)
    own = {key: value for key, value in settings.items() if key.startswith(("data.", "trainer."))}
    own |= {"ckpt_path": str(path), "kd.weight": 0.0, "trainer.max_steps": held["global_step"] + 2}
    assert cli.main(["fit", *arguments(own, {"run": str(tmp_path / "run"), "trainer.val_check_interval": 1.0})]) == 0


def test_another_version_s_checkpoint_serves_for_all_but_going_on(settings, teacher, tmp_path, capsys):
    """As versions before the totals wrote them: models as good as any."""
    held, path = torch.load(teacher, weights_only=True), tmp_path / "old" / "checkpoints" / "step-00000020.ckpt"
    path.parent.mkdir(parents=True)
    lacking = ("totals", "totals_before", "max_steps", "salt_lightning_version")
    torch.save({key: value for key, value in held.items() if key not in lacking}, path)
    assert cli.main(["export", str(path), str(tmp_path / "out")]) == 0
    taught = {"run": str(tmp_path / "run"), "model.teacher.path": str(path), "trainer.max_steps": 2}
    assert cli.main(["fit", *arguments(settings, taught)]) == 0
    looked_at = {key: value for key, value in settings.items() if key.startswith(("data.", "trainer."))}
    assert cli.main(["validate", *arguments(looked_at, {"ckpt_path": str(path), "run": str(tmp_path / "look")})]) == 0
    capsys.readouterr()
    assert cli.main(["fit", *arguments(looked_at, {"run": str(tmp_path / "old"), "ckpt_path": "last"})]) == 2
    said = (
        "lacks max_steps, totals, totals_before, as if from another version of this project (it names None, this is 0."
    )
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert held["salt_lightning_version"] == salt_lightning.__version__


def flipped(whole: str, path: Path) -> Path:
    """A copy of a checkpoint with another bit in a weight."""
    content = bytearray(Path(whole).read_bytes())
    weight = torch.load(whole, weights_only=True)["state_dict"]["student.model.model.norm.weight"]
    content[content.index(weight.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    return path


def test_damage_late_in_a_large_tensor_is_found(tmp_path):
    """A checksum is compared at the end of a tensor, which is read in parts of 1 MiB."""
    path = tmp_path / "step-00000001.ckpt"
    AtomicCheckpointIO().save_checkpoint({"x": torch.arange(3 << 18, dtype=torch.int32)}, path)
    assert damage.in_bytes(path) is None
    damage.trust(path)
    content = bytearray(path.read_bytes())
    content[content.index((600_000).to_bytes(4, "little") + (600_001).to_bytes(4, "little"))] ^= 1
    path.write_bytes(content)
    assert "data/0 has changed since it was written" in damage.in_bytes(path)
    assert not damage.is_trusted(path)  # it is the same file, written again


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "load"])
def test_a_damaged_file_is_refused_from_python_too(settings, teacher, tmp_path, verb):
    chosen = flipped(teacher, tmp_path / "chosen.ckpt")
    setting, load = "load_from_checkpoint:", partial(SALTModule.load_from_checkpoint, chosen)
    if verb != "load":
        own = built(*arguments(settings, {"run": str(tmp_path / "run"), "kd.weight": 0.0}))
        setting, load = "ckpt_path", partial(getattr(own.trainer, verb), own.model, own.datamodule, ckpt_path=chosen)
    with pytest.raises(ConfigError, match=rf"^{setting} \S+/chosen.ckpt is damaged \("):
        load()


@pytest.mark.parametrize("kind", ["objects", "older format"])
def test_from_python_other_contents_are_no_damage(teacher, tmp_path, kind):
    saved = {**torch.load(teacher, weights_only=True), "mine": Path("x") if kind == "objects" else 1}
    torch.save(saved, tmp_path / "x.ckpt", _use_new_zipfile_serialization=kind == "objects")
    module = SALTModule.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=kind != "objects")
    assert torch.equal(module.student.head.weight, saved["state_dict"]["student.model.lm_head.weight"])
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        module.load_from_checkpoint(tmp_path / "x.ckpt")


def test_the_command_looks_for_damage_once(settings, teacher, tmp_path, monkeypatch):
    looks, look = [], damage.of
    monkeypatch.setattr(damage, "of", lambda path, *part: looks.append(path) or look(path, *part))
    for chosen in (teacher, str(shutil.copy(teacher, tmp_path / "copy.ckpt"))):
        assert cli.main(["validate", *arguments(settings, {"run": str(tmp_path / "run"), "ckpt_path": chosen})]) == 0
    assert looks == [Path(teacher), tmp_path / "copy.ckpt"]


def test_a_damaged_file_that_was_chosen_is_refused(settings, teacher, tmp_path, capsys):
    flipped(teacher, tmp_path / "chosen.ckpt")
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "ckpt_path": str(tmp_path / "chosen.ckpt")}
    assert cli.main(["fit", *arguments(settings, own)]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"error: --ckpt_path {tmp_path / 'chosen.ckpt'} is damaged (")
    assert not (tmp_path / "run").exists()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path, files = tmp_path / "step-00000001.ckpt", AtomicCheckpointIO()
    files.save_checkpoint({"x": torch.ones(3)}, path)
    with pytest.raises((AttributeError, PicklingError), match="local object"):  # by version of Python
        files.save_checkpoint({"x": torch.zeros(3), "bad": lambda: None}, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert torch.equal(files.load_checkpoint(path)["x"], torch.ones(3))


def test_a_failed_write_without_a_message_is_told_by_its_kind(tmp_path):
    with (
        pytest.raises(OSError, match=r"x.ckpt cannot be written \(TimeoutError\); "),
        shards.writing(tmp_path / "x.ckpt"),
    ):
        raise TimeoutError


def test_newest_boundary_and_chosen_steps_are_kept(settings, teacher, tmp_path):
    own = {"run": str(tmp_path / "run"), "model.teacher.path": teacher, "kd.steps": 5, "checkpoint.every_n_steps": 1,
           "checkpoint.keep": 2, "checkpoint.at_steps": [3]}  # fmt: skip
    assert cli.main(["fit", *arguments(settings, own)]) == 0
    assert steps_in(tmp_path) == [3, 5, 10, 11, 12]  # asked for, the boundary, the two newest regular ones, the end


def steps_in(tmp_path):
    return sorted(int(p.stem.removeprefix("step-")) for p in (tmp_path / "run/checkpoints").iterdir())


def test_what_a_start_has_kept_for_good_a_later_one_keeps(settings, teacher, tmp_path):
    """Another run may use one of them as its teacher."""
    own = {"run": str(tmp_path / "run"), "model.teacher.path": teacher, "kd.steps": 5, "checkpoint.every_n_steps": 1,
           "checkpoint.keep": 1}  # fmt: skip
    assert cli.main(["fit", *arguments(settings, own, {"checkpoint.at_steps": [3], "trainer.max_steps": 8})]) == 0
    changed = {"kd.steps": 10, "kd.allow_change": True, "ckpt_path": "last"}
    assert cli.main(["fit", *arguments(settings, own, changed)]) == 0
    assert steps_in(tmp_path) == [3, 5, 8, 10, 11, 12]


def test_a_start_that_keeps_fewer_removes_none_of_one_that_kept_all(fit_with, tmp_path):
    often = {"checkpoint.every_n_steps": 2, "trainer.val_check_interval": 100_000}
    assert fit_with(tmp_path / "run", **often, **{"checkpoint.keep": None, "trainer.max_steps": 6}) == 0
    fewer = {"checkpoint.keep": 1, "ckpt_path": "last"}
    for last in (11, 15):  # also the one after that knows
        assert fit_with(tmp_path / "run", **often, **fewer, **{"trainer.max_steps": last}) == 0
    assert steps_in(tmp_path) == [2, 4, 6, 11, 14, 15]


@pytest.mark.parametrize("setting", ["every_n_steps", "keep"])
def test_settings_below_one_are_refused(setting):
    with pytest.raises(ConfigError, match=f"--checkpoint.{setting} 0 must be at least 1"):
        RunCheckpoint(**{setting: 0})


def test_an_export_that_exists_is_refused_before_the_first_step(tmp_path):
    saver = RunCheckpoint(export=str(tmp_path))
    with pytest.raises(ConfigError, match="--checkpoint.export .* exists already"):
        saver.setup(Trainer(max_steps=1, accelerator="cpu", logger=False, default_root_dir=tmp_path), None, "fit")


def test_loading_runs_no_code_even_when_asked_to(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return ((tmp_path / "ran").touch, ())

    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("on_gpu", [True, False])
def test_ranks_beside_gpus_share_the_pages_of_a_checkpoint(tmp_path, on_gpu, monkeypatch):
    """On a CPU the optimizer would write to them."""
    path, state = tmp_path / "x.ckpt", torch.full((1000,), 7.0)
    AtomicCheckpointIO().save_checkpoint({"x": state}, path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    loaded = AtomicCheckpointIO().load_checkpoint(path)["x"]
    assert torch.equal(loaded, state)
    mapped = [line.split("-") for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    spans = [(int(first, 16), int(rest.split()[0], 16)) for first, rest, *_ in mapped]
    assert any(first <= loaded.data_ptr() < end for first, end in spans) == on_gpu


def test_the_command_saves_and_loads_by_it(fit_with, tmp_path):
    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            used.append(type(trainer.strategy.checkpoint_io))

    used = []
    assert fit_with(tmp_path / "run", Look(), **{"trainer.max_steps": 2, "trainer.val_check_interval": 2}) == 0
    assert used == [AtomicCheckpointIO]


def test_a_fit_leaves_the_signal_handlers_as_they_were(fit_with, tmp_path):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert fit_with(tmp_path / "run", **{"trainer.max_steps": 2, "trainer.val_check_interval": 2}) == 0
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_sigterm_outside_of_training_stops_at_once(fit_with, tmp_path, capsys):
    """Lightning's own handler ends a first step with a traceback, and a test with exit code 0 and no result."""

    class Term(Callback):
        def on_validation_batch_start(self, trainer, *_):
            os.kill(os.getpid(), signal.SIGTERM)

        on_test_batch_start = on_validation_batch_start

    handler = signal.getsignal(signal.SIGINT)  # Lightning ignores Ctrl-C from here on
    try:
        assert fit_with(tmp_path / "run", Term(), **{"trainer.num_sanity_val_steps": 1}) == 128 + signal.SIGTERM
        assert not list(tmp_path.glob("run/checkpoints/*"))
        assert fit_with(tmp_path / "run") == 0
        for verb in ("validate", "test"):
            assert fit_with(tmp_path / "run", Term(), verb=verb, ckpt_path="last") == 128 + signal.SIGTERM
            assert capsys.readouterr().err.strip().splitlines()[-1] == "stopped by SIGTERM"
    finally:
        signal.signal(signal.SIGINT, handler)


def test_only_whole_names_are_checkpoints(tmp_path):
    for name in ("step-00000012.ckpt", "step-00000012.ckpt.aside", ".step-00000013.ckpt", "step-.ckpt", "last.ckpt"):
        (tmp_path / name).touch()
    assert saved(tmp_path) == [(12, tmp_path / "step-00000012.ckpt")]
    assert [is_over(tmp_path / "step-00000012.ckpt", steps) for steps in (11, 12, 13, -1)] == [True, True, False, False]


@pytest.mark.parametrize("queue", ["there", "warns", "refuses", "missing"])
def test_slurm_s_signal_outside_of_training_queues_the_job_again(fit_with, tmp_path, capsys, caplog, slurm, queue):
    class Requeue(Callback):
        def on_validation_batch_start(self, trainer, *_):
            os.kill(os.getpid(), signal.SIGUSR1)

    asked = slurm(queue=queue)
    handler = signal.getsignal(signal.SIGINT)  # Lightning ignores Ctrl-C from here on
    try:
        assert fit_with(tmp_path / "run", Requeue(), **{"trainer.num_sanity_val_steps": 1}) == 128 + signal.SIGUSR1
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err.strip().splitlines()[-1] == "stopped by SIGUSR1"
    assert asked() == ([] if queue == "missing" else ["requeue 77"])
    done = queue in ("there", "warns")
    assert ("SLURM job 77: requeued" in caplog.text) == done
    assert ("requeue it by hand: scontrol requeue 77" in caplog.text) == (not done)
    assert ("job may not be requeued" in caplog.text) == (queue == "refuses")
    assert not list(tmp_path.glob("run/**/*.ckpt"))


@pytest.mark.parametrize(
    ("own", "number", "stops"),
    [({"requeue_signal": "SIGUSR2"}, signal.SIGUSR2, True), ({"auto_requeue": False}, signal.SIGUSR1, False)],
)
def test_slurm_s_signal_is_the_one_that_was_asked_for(fit_with, tmp_path, slurm, own, number, stops):
    asked, heard = slurm(), []
    before = signal.signal(number, lambda *_: heard.append(number))
    plugin = {"class_path": "lightning.pytorch.plugins.environments.SLURMEnvironment", "init_args": own}
    try:
        code = fit_with(tmp_path / "run", StopAt(3, number), **{"trainer.plugins": plugin})
    finally:
        signal.signal(number, before)
    assert (code, heard) == ((128 + number, []) if stops else (0, [number]))
    assert asked() == (["requeue 77"] if stops else [])


def test_the_first_ctrl_c_of_a_rank_is_no_second_one():
    """If another rank was told first, the ranks are about to save together; this one must not leave."""
    checkpoint, trainer = RunCheckpoint(), SimpleNamespace(world_size=2, validating=False)
    checkpoint.stopped_by = signal.SIGINT  # as the ranks agreed
    checkpoint._stop_after_step(trainer, signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        checkpoint._stop_after_step(trainer, signal.SIGINT, None)


def test_a_signal_that_comes_while_the_ranks_agree_stops_no_rank_alone():
    """The others received 0: this rank would wait alone in its save until the time-out."""
    checkpoint = RunCheckpoint()

    def reduce(number, reduce_op):
        checkpoint.stopped_by = signal.SIGTERM  # the handler runs as soon as the reduction returns
        return number

    assert [checkpoint._is_told_to_stop(one_of_two(reduce)) for _ in range(2)] == [False, True]


def one_of_two(reduce):
    """The trainer of a rank whose strategy has this `reduce`."""
    connector = SimpleNamespace(cluster_environment=SLURMEnvironment())
    strategy = SimpleNamespace(root_device="cpu", reduce=reduce)
    return SimpleNamespace(
        world_size=2, global_step=4, log_every_n_steps=1, strategy=strategy, _accelerator_connector=connector
    )


@pytest.mark.parametrize("others", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, None])
def test_the_signal_to_requeue_prevails_over_what_another_rank_got(others):
    """SLURM's SIGTERM after it is the same request, but may come first to another rank."""
    sent = []
    trainer = one_of_two(lambda number, reduce_op: (sent.append(number), torch.stack(sent).max())[1])
    told = [RunCheckpoint(), RunCheckpoint()]
    for checkpoint, number in zip(told, (others, signal.SIGUSR1), strict=True):
        checkpoint.stopped_by = number
    for checkpoint in (*told, told[0]):  # the first knows of the second's only in its second turn
        checkpoint._is_told_to_stop(trainer)
    assert [checkpoint.stopped_by for checkpoint in told] == [signal.SIGUSR1] * 2
