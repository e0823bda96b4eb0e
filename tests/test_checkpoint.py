"""Files on disk: which one is `last`, what a failed write leaves, which are kept."""

import pytest
import torch
from conftest import arguments

from salt_lightning import cli
from salt_lightning.checkpoint import AtomicCheckpointIO, RunCheckpoint, newest
from salt_lightning.errors import ConfigError


def test_last_is_the_highest_step(tmp_path):
    assert newest(tmp_path) is None
    for name in (
        "step-00000009.ckpt",
        "step-00000120.ckpt",
        "step-00000030.ckpt",
        ".step-00000999.ckpt.1.tmp",
        "x.ckpt",
    ):
        (tmp_path / name).touch()
    assert newest(tmp_path) == tmp_path / "step-00000120.ckpt"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path, files = tmp_path / "step-00000001.ckpt", AtomicCheckpointIO()
    files.save_checkpoint({"x": torch.ones(3)}, path)
    with pytest.raises(AttributeError, match="local object"):
        files.save_checkpoint({"x": torch.zeros(3), "bad": lambda: None}, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert torch.equal(files.load_checkpoint(path)["x"], torch.ones(3))


def test_newest_boundary_and_chosen_steps_are_kept(settings, teacher, tmp_path):
    own = {"run": str(tmp_path / "run"), "model.teacher.path": teacher, "kd.steps": 5, "checkpoint.every_n_steps": 1,
           "checkpoint.keep": 2, "checkpoint.at_steps": [3]}  # fmt: skip
    assert cli.main(["fit", *arguments(settings, own)]) == 0
    steps = sorted(int(p.stem.removeprefix("step-")) for p in (tmp_path / "run/checkpoints").iterdir())
    assert steps == [3, 5, 10, 11, 12]  # asked for, the boundary, the two newest regular ones, the end


@pytest.mark.parametrize("setting", ["every_n_steps", "keep"])
def test_settings_below_one_are_refused(setting):
    with pytest.raises(ConfigError, match=f"--checkpoint.{setting} 0 must be at least 1"):
        RunCheckpoint(**{setting: 0})
