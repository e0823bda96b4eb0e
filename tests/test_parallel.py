"""One device, DDP and FSDP2 train the same: real processes on a CPU (gloo), with the real command."""

import contextlib
import fnmatch
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import forked
import pyarrow.parquet as pq
import pytest
import ranks
import torch
from conftest import arguments, built, error_of, scalars
from lightning.fabric.plugins.environments import KubeflowEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from salt_lightning import cli, parallel
from salt_lightning.checkpoint import newest
from salt_lightning.errors import ConfigError
from salt_lightning.hugging_face.folders import sample_hash
from salt_lightning.models import CausalLM, read_checkpoint
from salt_lightning.run import peers
from salt_lightning.storage import damage, shards

ROOT = Path(__file__).parents[1]
FSDP2 = {"config": str(ROOT / "configs/fsdp.yaml"), "trainer.precision": "32-true", "trainer.devices": 2}
DDP = {"config": str(ROOT / "configs/ddp.yaml"), "trainer.devices": 2}
FSDP1 = {"config": str(ROOT / "configs/fsdp1.yaml"), "trainer.precision": "32-true", "trainer.devices": 2,
         "kd.probe_gradients": False}  # fmt: skip
STEPS, SAVED = 20, 5
UNTIED = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
          "tie_word_embeddings": False}  # fmt: skip
SAVED_NAME = f"checkpoints/step-{SAVED:08d}.ckpt"
EXPERTS = {"kd.weight": 0.0, "checkpoint.at_steps": [6], "data.micro_batch_size": 4,
           "model.student.family": "qwen3_moe", "model.student.config": {
               **UNTIED, "num_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 4}}  # fmt: skip
VARIANTS = {  # name -> its settings; names with "untied" are compared with the untied run on one device
    "ddp": {**DDP, "trainer.enable_progress_bar": True},
    "fsdp": FSDP2,
    "fsdp replicas": {**FSDP2, "trainer.strategy.replicas": 2},
    "ddp untied": {**DDP, "model.student.config": UNTIED},
    "fsdp untied": {
        **FSDP2,
        "model.student.config": UNTIED,
        "trainer.strategy.shard_teacher": False,
        "trainer.strategy.save_distributed_checkpoint": False,
        "model.activation_checkpointing": True,
    },
}
PLAIN = {"kd.weight": 0.0, "trainer.max_steps": 4, "data.micro_batch_size": 4}
DISKS = {  # name -> settings and what else a job has, of two processes whose runs are on disks of their own
    "apart": (FSDP2, {"code": 2}),
    "mount": (FSDP2, {"code": 1, "blind": True}),
    "copy": (DDP, {}),
}


@pytest.fixture(scope="module")
def judge(settings, teacher, tmp_path_factory) -> Path:
    """The teacher's run, after `validate` on one device."""
    run = tmp_path_factory.mktemp("judge") / "run"
    assert cli.main(["validate", *looked_at(settings, run, teacher)]) == 0
    return run


def of_data(settings, own: dict[str, object]) -> list[str]:
    return arguments({k: v for k, v in settings.items() if k.startswith(("data.", "trainer."))}, own)


def looked_at(settings, run, checkpoint, **own) -> list[str]:
    return of_data(settings, {**own, "run": str(run), "ckpt_path": str(checkpoint)})


@pytest.fixture(scope="module")
def salt(settings, teacher, judge) -> dict[str, object]:
    """Both phases and a ramp, with effective clipping; two micro-batches with uneven masks on each of two ranks.

    The validation of step 8 finds the boundary: a ramp to step 12. The validation of step 4 is too early.
    """
    return {
        **settings, "model.teacher.path": teacher, "kd.weight": 0.667, "kd.steps": 16, "kd.anneal_steps": 4,
        "kd.shape": "linear", "kd.stop_margin": 9.0, "kd.min_steps": 5, "kd.probe_gradients": True,
        "trainer.max_steps": STEPS, "trainer.val_check_interval": 4, "data.micro_batch_size": 2,
        "trainer.gradient_clip_val": 0.4, "checkpoint.at_steps": [SAVED], "data.difficulty": str(judge),
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(salt, settings, teacher, tmp_path_factory) -> Path:
    """A folder of runs: `one` and `one untied` with one process; VARIANTS and resumes with two, in a single launch."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, own in {"one": {}, "one untied": {"model.student.config": UNTIED}}.items():
        args = ["fit", *arguments(salt, {"run": str(folder / name)}, own)]
        assert ranks.run(args, ranks.Spy(folder / f"{name}.spy")) == 0
    elsewhere = folder / "node 1" / "/".join(Path(teacher).parts[-3:])  # so far, nothing tells it from the teacher
    elsewhere.parent.mkdir(parents=True)
    shutil.copy(folder / "one" / SAVED_NAME, elsewhere)
    taught = {**FSDP2, "model.teacher.path": str(folder / "fsdp" / SAVED_NAME)}
    jobs = VARIANTS | {
        "fsdp again": {**FSDP2, "ckpt_path": str(folder / "fsdp" / SAVED_NAME)},
        "fsdp from one": {**FSDP2, "ckpt_path": str(folder / "one" / SAVED_NAME)},
        "fsdp taught by shards": taught,
        "fsdp1": FSDP1,
        "fsdp1 from one": {**FSDP1, "ckpt_path": str(folder / "one" / SAVED_NAME)},
    }
    for rank in "01":
        (folder / "disk" / rank).mkdir(parents=True)
    ranks.launch(
        [
            {"args": ["fit", *arguments(salt, own, {"run": str(folder / name)})]}
            | ({} if "fsdp1" in name else {"spy": str(folder / f"{name}.spy")})
            for name, own in jobs.items()
        ]
        + [
            {"args": ["validate", *looked_at(settings, folder / f"judge {name}", path, **own)]}
            for name, path, own in (("ddp", teacher, DDP), ("fsdp", folder / "fsdp" / SAVED_NAME, FSDP2))
        ]
        + [
            {
                "args": ["fit", *arguments(salt, DDP, {"run": str(folder / "unlike")})],
                "args of 1": arguments({"kd.steps": 15, "data.seed": 1, "ckpt_path": str(folder / "one" / SAVED_NAME)}),
                "code": 2,
            },
            {
                "args": ["fit", *arguments(salt, FSDP2, {"run": str(folder / "unlike mesh")})],
                "args of 1": arguments({"trainer.strategy.replicas": 2}),
                "code": 2,
            },
            {
                "args": ["fit", *arguments(salt, DDP, {"run": str(folder / "unlike teacher")})],
                "args of 1": arguments({"model.teacher.path": str(elsewhere)}),
                "code": 2,
            },
        ]
        + [
            {
                "args": ["fit", *arguments(settings, EXPERTS, FSDP2, {"run": str(folder / "experts")})],
                "args of 1": arguments({"data.source": str(folder / "not listed by each rank/*.jsonl")}),
            }
        ]
        + [
            {
                "args": ["fit", *arguments(settings, PLAIN, own, {"run": name})],
                "disks": str(folder / "disk"),
                **more,
            }
            for name, (own, more) in DISKS.items()
        ]
        + [
            {
                "args": ["predict", *of_data(settings, {**DDP, "run": "scores", "model.teacher.path": teacher})],
                "disks": str(folder / "disk"),
                "code": 2,
            }
        ]
        + [{"args": ["fit", *arguments(salt, DDP, {"run": str(folder / "bad")})], "spoil": [1, 5], "code": 1}],
        folder,
    )
    for name, own in {
        "one from fsdp": {"ckpt_path": str(folder / "fsdp" / SAVED_NAME)},
        "one from fsdp1": {"ckpt_path": str(folder / "fsdp1" / SAVED_NAME)},
        "one from fsdp untied": {
            "ckpt_path": str(folder / "fsdp untied" / SAVED_NAME),
            "model.student.config": UNTIED,
        },
        "one taught by shards": {"model.teacher.path": taught["model.teacher.path"]},
    }.items():
        assert cli.main(["fit", *arguments(salt, {"run": str(folder / name)}, own)]) == 0
    assert cli.main(["validate", *looked_at(settings, folder / "judge one", folder / "fsdp" / SAVED_NAME)]) == 0
    return folder


def spied(runs: Path, name: str, rank: int = 0) -> dict:
    return torch.load(f"{runs / name}.spy.{rank}", weights_only=True)


def one_of(name: str) -> str:
    return "one untied" if "untied" in name else "one"


# A loss of about 5.7 has an ulp of 4.8e-7; sums of 256 tokens over two ranks differ only in their order.
SAME_LOSS = 4 * 4.8e-7


@pytest.mark.timeout(900)  # this one waits for `runs`: a minute, but more than the usual 300 s on a busy machine
def test_a_folder_that_not_all_processes_see_is_refused_before_the_first_step_or_at_a_save(runs):
    """Sharded checkpoints lacked a part, and the run ended as if nothing was wrong."""
    lines, disk = (runs / "out.0").read_text().splitlines(), runs / "disk/0"
    wrong = "--run {}: process 1 does not see what process 0 writes there; give a folder that all nodes share"
    assert f"error: {wrong.format('apart')}, since each process writes a part of every checkpoint" in lines
    assert not (disk / "apart").exists()
    lost = re.compile(
        r"error: mount/checkpoints/step-00000004.ckpt cannot be written \(\[Errno 2\] not there, though a process has "
        r"written it; do all nodes see the same folder\?: '__1_\w+\.distcp'\); was its folder removed\? Otherwise "
        "choose another folder"
    )
    assert len(list(filter(lost.fullmatch, lines))) == 1
    assert os.listdir(disk / "mount/checkpoints") == [".step-00000004.ckpt.tmp"]
    said = f"{wrong.format('copy')}, or copy a checkpoint to all of them before you resume from it"
    assert len([line for line in lines if line.endswith(said)]) == 1
    assert (disk / "copy/checkpoints/step-00000004.ckpt").is_file()
    assert not (runs / "disk/1/copy/checkpoints").exists()
    assert f"error: {wrong.format('scores')}, since each writes shards of scores" in lines
    assert not (disk / "scores/scores.json").exists()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_losses_in_both_phases(runs, name):
    ours, theirs = scalars(runs / name), scalars(runs / one_of(name))
    assert ours.keys() == theirs.keys()
    assert sorted(theirs["train/loss"]) == list(range(1, STEPS + 1))
    assert sorted(theirs["train/kd"]) == list(range(1, 13))
    assert sorted(theirs["val/ce"]) == sorted(theirs["val/ce/hard"]) == [4, 8, 12, 16, 20]
    assert min(theirs["train/grad_norm"].values()) < 0.4 < max(theirs["train/grad_norm"].values())  # clipping bites
    for tag in ("loss", "ce", "kd", "grad_norm", "kl", "gap"):
        assert ours[f"train/{tag}"] == pytest.approx(theirs[f"train/{tag}"], abs=SAME_LOSS, rel=0), tag
    for tag in ("val/ce", "val/ce/easy", "val/ce/medium", "val/ce/hard", "val/bits_per_byte", "val/accuracy"):
        assert ours[tag] == pytest.approx(theirs[tag], abs=SAME_LOSS, rel=0), tag
    assert ours["train/flops_teacher_total"] == theirs["train/flops_teacher_total"]


def test_replicas_exchange_gradients_with_the_last_micro_batch_of_a_step(runs):
    """Until then, torch keeps its sums, which are no gradients yet."""
    assert spied(runs, "fsdp replicas")["reduced"] == [False, True] * STEPS
    assert spied(runs, "fsdp")["reduced"] == [True, True] * STEPS


def test_each_rank_and_step_has_random_numbers_of_its_own(runs):
    assert len({seed for rank in (0, 1) for seed in spied(runs, "ddp", rank)["seeds"]}) == 2 * STEPS


def test_a_cache_that_the_first_rank_alone_has_made_reaches_the_others():
    """Own code may make one in its first forward, that of the check, which the others leave out."""
    sent, layouts = [], []

    def of_rank(first: bool):
        def broadcast(layout):
            layouts.append(layout)
            return layouts[0]

        return SimpleNamespace(is_global_zero=first, root_device=torch.device("cpu"), broadcast=broadcast)

    whole, empty = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2, device="meta"))
    whole[0].register_buffer("cache", torch.arange(3.0), persistent=False)
    with patch.object(parallel.dist, "broadcast", lambda tensor, _: sent.append(tensor)):
        parallel._receive(whole, of_rank(True))
    with patch.object(parallel.dist, "broadcast", lambda tensor, _: tensor.copy_(sent.pop(0))):
        parallel._receive(empty, of_rank(False))
    assert torch.equal(empty[0].cache, torch.arange(3.0))
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in empty.state_dict().items())


@pytest.mark.parametrize("name", ["fsdp1", "fsdp1 from one", "one from fsdp1"])
def test_fsdp1_trains_the_same_and_its_files_are_those_of_one_device(runs, name):
    """Forced to run on a CPU: everything except the GPUs' streams and copies."""
    ours, theirs = scalars(runs / name), scalars(runs / "one")
    first = 1 if name == "fsdp1" else SAVED + 1
    for tag in ("train/loss", "train/kd", "train/grad_norm", "val/ce", "val/ce/hard"):
        assert ours[tag] == pytest.approx({s: v for s, v in theirs[tag].items() if s >= first}, abs=SAME_LOSS, rel=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_probes_and_the_same_boundary(runs, name):
    ours, theirs = scalars(runs / name, ("probe/",)), scalars(runs / one_of(name), ("probe/",))
    assert ours.keys() == theirs.keys()
    assert ours["probe/stop_step"] == theirs["probe/stop_step"] == {8: 12}
    assert sorted(theirs["probe/gap"]) == sorted(theirs["probe/grad_cosine"]) == [4, 8]
    assert ours["probe/gap"] == pytest.approx(theirs["probe/gap"], abs=SAME_LOSS, rel=0)
    # a token where both models nearly tie may fall either way; the cosine is of sums that differ by about 1e-6
    assert ours["probe/student_better"] == pytest.approx(theirs["probe/student_better"], abs=2e-3)
    assert ours["probe/grad_cosine"] == pytest.approx(theirs["probe/grad_cosine"], abs=1e-5)


def test_the_loss_of_each_document_is_the_same_on_ranks(runs, judge):
    for many, one in ((runs / "judge ddp", judge), (runs / "judge fsdp", runs / "judge one")):
        ours, theirs = (pq.read_table(run / "validate" / "documents.parquet").to_pydict() for run in (many, one))
        assert ours["tokens"] == theirs["tokens"]
        assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-5)


def test_a_loss_that_is_not_finite_on_one_rank_is_named_with_its_rows(runs):
    """The second micro-batch of step 3 on rank 1: the fourth of its step."""
    *_, error = (line for line in (runs / "out.0").read_text().splitlines() if line.startswith("error: "))
    rows = re.search(r"spoiled rows \[(\d+), (\d+)\]", (runs / "out.1").read_text())
    assert error.startswith(f"error: train/loss is not finite at step 3, which read rows {rows[1]} ("), error
    assert f", {rows[2]} (" in error


def test_a_rank_with_other_settings_is_named_before_the_first_step(runs, teacher):
    """Another strategy is, before the ranks wait for each other: with another mesh they would never meet."""
    lines = (runs / "out.0").read_text().splitlines()
    assert [line for line in lines if line.startswith("error: process 1")] == [
        f"error: process 1 differs from process 0: --ckpt_path 'one/{SAVED_NAME}' (process 0: None), "
        "--data.seed 1 (process 0: 0), --kd.steps 15 (process 0: 16); start all with the same command and version, and "
        "let all of them see the same files",
        "error: process 1 differs from process 0: --trainer.strategy FSDP2 with replicas 2 (process 0: FSDP2 with "
        "replicas 1); start all with the same command and version",
        f"error: process 1 differs from process 0: --model.teacher.weights '{sample_hash(runs / 'one' / SAVED_NAME)}' "
        f"(process 0: '{sample_hash(Path(teacher))}'); start all with the same command and version, and let all of "
        "them see the same files",
    ]


@pytest.mark.parametrize("name", VARIANTS)
def test_ranks_share_the_rows_of_a_step(runs, name):
    """Together they read what one device reads, micro-batch by micro-batch."""
    by_rank = [spied(runs, name, rank)["rows"] for rank in (0, 1)]
    assert [rows for pair in zip(*by_rank, strict=True) for rows in pair] == spied(runs, one_of(name))["rows"]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_gradients_in_both_phases(runs, name):
    labels = [spied(runs, name, rank)["labels"] for rank in (0, 1)]
    assert any(a != b for a, b in zip(*labels, strict=True))  # the premise: a mean per rank would be different
    ours, theirs = spied(runs, name)["gradients"], spied(runs, one_of(name))["gradients"]
    for step in (0, 1, 11, 12, STEPS - 1):
        assert ours[step].keys() == theirs[step].keys()
        for key, gradient in theirs[step].items():
            # 1.2e-7 per rounding, about 10 in a chain of sums; later steps start from weights that differ by as much
            atol = (1e-6 if step == 0 else 1e-5) * gradient.abs().max().item()
            assert torch.allclose(ours[step][key], gradient, rtol=0, atol=atol), (step, key)


def test_the_teacher_is_sharded_or_whole_and_leaves_every_rank(runs):
    for name in VARIANTS:
        assert all(spied(runs, name, rank)["teacher_has_left"] for rank in (0, 1)), name
    sizes = {name: [spied(runs, name, rank)["teacher_bytes"] for rank in (0, 1)] for name in VARIANTS}
    assert sizes["ddp"] == sizes["fsdp untied"]  # whole on each, as requested
    assert sizes["fsdp"] == [sizes["ddp"][0] // 2] * 2
    ours, theirs = scalars(runs / "fsdp taught by shards"), scalars(runs / "one taught by shards")
    assert ours["train/kd"] == pytest.approx(theirs["train/kd"], abs=SAME_LOSS, rel=0)
    assert theirs["train/kd"] != scalars(runs / "one")["train/kd"]


def test_resumed_on_other_ranks(runs):
    """With the same ranks, bit for bit; with others, the same rows, and the same numbers up to rounding."""
    same, again = read_checkpoint(last(runs / "fsdp"), "x"), read_checkpoint(last(runs / "fsdp again"), "x")
    assert all(torch.equal(tensor, again["state_dict"][name]) for name, tensor in same["state_dict"].items())
    assert all(torch.equal(tensor, again["optimizer"][name]) for name, tensor in same["optimizer"].items())
    for name in ("fsdp again", "fsdp from one", "one from fsdp", "one from fsdp untied"):
        ours, theirs = scalars(runs / name), scalars(runs / one_of(name))
        for tag in ("train/loss", "train/kd", "train/grad_norm"):
            after = {step: value for step, value in theirs[tag].items() if step > SAVED}
            assert ours[tag] == pytest.approx(after, abs=SAME_LOSS, rel=0), (name, tag)


def last(run: Path) -> str:
    return str(run / f"checkpoints/step-{STEPS:08d}.ckpt")


def test_both_forms_of_a_checkpoint_hold_the_same(runs):
    folder, file = (read_checkpoint(last(runs / name), "x") for name in ("fsdp", "one"))
    assert {k: tuple(s) for k, s in folder["state_dict"].shapes.items()} == {
        k: tuple(t.shape) for k, t in file["state_dict"].items()
    }
    for name, tensor in file["state_dict"].items():
        assert torch.allclose(folder["state_dict"][name], tensor, rtol=0, atol=1e-6), name
    ours, theirs = shards.optimizer_states(folder)[0], file["optimizer_states"][0]
    assert ours["state"].keys() == theirs["state"].keys()
    assert ours["param_groups"] == theirs["param_groups"]
    assert len(list(Path(last(runs / "fsdp")).glob("*.distcp"))) == 2  # a file per rank
    assert folder.keys() - {"optimizer", "param_groups"} == file.keys() - {"optimizer_states"}


# --------------------------------------------------- folders that are not whole


@pytest.fixture
def folder(runs, tmp_path) -> Path:
    """A run's checkpoints at steps 5 and 12, to be damaged."""
    shutil.copytree(runs / "fsdp" / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints" / f"step-{STEPS:08d}.ckpt")
    return tmp_path / "checkpoints"


DAMAGES = {
    "meta.pt is missing": lambda newest: (newest / "meta.pt").unlink(),
    "pieces.json is missing": lambda newest: (newest / "pieces.json").unlink(),
    "__1_* is missing": lambda newest: next(newest.glob("__1_*")).unlink(),
    "__0_* is cut off": lambda newest: os.truncate(next(newest.glob("__0_*")), 1000),
    "pieces.json cannot be read": lambda newest: os.truncate(newest / "pieces.json", 100),
}


@pytest.mark.parametrize("as_folder", [True, False])
def test_an_optimizer_that_keeps_numbers_is_refused_under_fsdp2(as_folder):
    """They would be lost in a checkpoint of tensors."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))])
    optimizer.state[optimizer.param_groups[0]["params"][0]] |= {"momentum": torch.zeros(2), "step": 3}
    with pytest.raises(ConfigError, match="^SGD keeps step as numbers; under FSDP2, whose checkpoints hold tensors, "):
        parallel.FSDP2(save_distributed_checkpoint=as_folder).optimizer_state(optimizer)


def test_files_of_two_saves_are_not_taken_for_one(folder):
    """As an interrupted copy leaves them, over a checkpoint of the same model: each file alone is as it was written."""
    old, new = folder / "step-00000005.ckpt", folder / "step-00000012.ckpt"
    before = {name: tensor.clone() for name, tensor in read_checkpoint(str(new), "CKPT")["state_dict"].items()}
    for file in old.glob("*.distcp"):
        shutil.copy(file, new)
    after = read_checkpoint(str(new), "CKPT")["state_dict"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("meta.pt", "pieces.json"):
        shutil.copy(new / name, old)
    assert re.fullmatch(r"__0_\w{8}_0.distcp is missing", str(damage.of(old)))


@pytest.mark.parametrize("reason", DAMAGES)
def test_an_incomplete_folder_is_passed_over_by_name_or_refused(folder, reason, caplog):
    whole, damaged = folder / "step-00000005.ckpt", folder / "step-00000012.ckpt"
    assert newest(folder) == damaged
    names = os.listdir(damaged)
    DAMAGES[reason](damaged)
    if "*" in reason:
        pattern, _, what = reason.partition(" ")
        reason = f"{next(name for name in names if fnmatch.fnmatch(name, pattern))} {what}"
    assert newest(folder) == whole
    assert f"{damaged} is skipped: {reason}" in caplog.text
    with pytest.raises(ConfigError, match=f"--ckpt_path {damaged} is not a whole checkpoint.*{re.escape(reason)}"):
        read_checkpoint(str(damaged), "--ckpt_path")


def test_what_a_killed_save_leaves_is_passed_over_by_name(folder, caplog):
    (folder / "step-00000012.ckpt").rename(folder / ".step-00000012.ckpt.tmp")
    assert newest(folder) == folder / "step-00000005.ckpt"
    assert ".step-00000012.ckpt.tmp was never finished and is skipped" in caplog.text


def test_a_folder_cannot_run_code(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    for name in ("meta.pt", "pieces.json"):
        copy = tmp_path / f"copy{name}"
        shutil.copytree(folder / "step-00000005.ckpt", copy)
        (copy / name).write_bytes(pickle.dumps(Evil(), protocol=2))
        with pytest.raises(ConfigError, match="is not a whole checkpoint of this project"):
            read_checkpoint(str(copy), "--ckpt_path")
    assert not (tmp_path / "ran").exists()


def test_old_folders_are_removed_whole(folder):
    shards.remove(folder / "step-00000005.ckpt")
    assert [path.name for path in folder.iterdir()] == ["step-00000012.ckpt"]


def test_another_model_is_refused_by_its_first_weights():
    ours = {"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(())}
    saved = {"a": torch.zeros(2, 5), "b": torch.zeros(4), "d": torch.zeros(1)}
    with pytest.raises(ConfigError, match=r"3 of its weights differ: a 2 x 3 \(checkpoint: 2 x 5\), c .*d none"):
        parallel.check_same_model(ours, saved, "x.ckpt holds another student")


def test_under_fsdp2_experts_that_do_not_divide_are_split_inside(settings, runs, fit_with):
    """Three over two devices: split by the first dimension, one device would hold twice as much as the other."""
    saved = runs / "experts/checkpoints/step-00000006.ckpt"
    found = shards.table_of(saved).state_dict_metadata
    pieces = {
        name: [chunk.sizes.numel() for chunk in info.chunks] for name, info in found.items() if "experts." in name
    }
    whole = [sizes for name, sizes in pieces.items() if not name.endswith(".step")]
    assert len(whole) == 3 * 4  # weights and AdamW's two states, of two layers
    assert all(len(sizes) == 2 and sizes[0] == sizes[1] for sizes in whole)
    assert fit_with(runs / "experts of one", **EXPERTS) == 0
    assert fit_with(runs / "experts on", **EXPERTS, ckpt_path=str(saved)) == 0
    losses = [scalars(runs / name)["val/ce"][12] for name in ("experts of one", "experts", "experts on")]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)  # gradients summed in another order


# ------------------------------------------------------------ the command as typed


def start(settings: dict, own: dict, script: Path = ROOT / "cli.py", **env: str) -> subprocess.Popen:
    """`python cli.py fit ...` as a user types it: Lightning starts the second process, unless `env` says otherwise."""
    keys = {**settings, "kd.weight": 0.0, **FSDP2, **own}
    return forked.Popen(
        [sys.executable, str(script), "fit", *arguments(keys)],
        env=os.environ | env,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def child_of(process: subprocess.Popen, run: Path) -> int:
    """The second rank's process id, once the run has saved its first checkpoint."""
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/step-*.ckpt")):
        assert process.poll() is None, end(process)[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    names = (b"cli.py", b"forked.py")  # the second one's own, or that of the first, which has forked it
    return next(int(c) for c in children if any(n in Path(f"/proc/{c}/cmdline").read_bytes() for n in names))


ENDLESS = {"trainer.max_steps": 100_000, "trainer.val_check_interval": 100_000, "trainer.log_every_n_steps": 3,
           "checkpoint.every_n_steps": 4, "checkpoint.keep": 2, "data.micro_batch_size": 4}  # fmt: skip


def end(process: subprocess.Popen, limit_s: float = 60) -> tuple[int, str]:
    """Exit code and output; kills all processes of the run that are left."""
    try:
        output, _ = process.communicate(timeout=limit_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def test_a_signal_to_one_rank_stops_all_after_the_same_step(settings, tmp_path):
    """In a job with one pod, both inherit its RANK and would each believe to be the first."""
    own = {**ENDLESS, "run": str(tmp_path / "run")}
    process = start(settings, own, **ALONE)
    child = child_of(process, tmp_path / "run")
    os.kill(child, signal.SIGTERM)
    code, output = end(process)
    assert code == 128 + signal.SIGTERM, output
    step = int(re.search(r"stopped by SIGTERM at step (\d+), saved", output)[1])
    assert step % 3 == 0  # a logged step
    path = newest(tmp_path / "run/checkpoints")
    assert path.name == f"step-{step:08d}.ckpt"
    assert len(list(path.glob("*.distcp"))) == 2
    assert output.count("stopped by SIGTERM") == 1
    assert "Traceback" not in output
    more = {**own, "trainer.max_steps": step + 1, "trainer.val_check_interval": step + 1, "ckpt_path": "last"}
    assert cli.main(["fit", *arguments(settings, {"kd.weight": 0.0}, more)]) == 0  # on one device


def test_each_node_of_a_stopped_run_says_so_by_its_exit_code(settings, tmp_path):
    """With 0, Kubernetes takes a pod's work for done, and does not start it again beside the first one."""
    own = {**ENDLESS, **DDP, "run": str(tmp_path / "run"), "trainer.devices": 1, "trainer.num_nodes": 2}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    nodes = [start(settings, own, **place, NODE_RANK=str(rank), LOCAL_RANK="0") for rank in range(2)]
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoints/step-*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    nodes[1].send_signal(signal.SIGTERM)
    (code, first), (other, second) = map(end, nodes)
    assert (code, other) == (143, 143), first + second
    assert "stopped by SIGTERM at step" in first
    assert "stopped by" not in second


def test_a_dead_rank_ends_the_others(settings, tmp_path):
    process = start(settings, {**ENDLESS, "run": str(tmp_path / "run")})
    os.kill(child_of(process, tmp_path / "run"), signal.SIGKILL)
    code, output = end(process)
    assert code == 1
    assert output.count("error: process 0 has lost the others (") == 1
    assert "Traceback" not in output


ALONE_OVER_NCCL = """
import atexit, sys, time
from lightning.fabric.utilities import distributed
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
distributed._destroy_dist_connection = DDPStrategy.teardown = lambda *_: time.sleep(600)
sys.path[:0] = [{tests!r}]
import ranks
from salt_lightning.run import endings
endings._backend = lambda: "nccl"
endings._destroy_dist_connection = distributed._destroy_dist_connection  # imported before
atexit.register(distributed._destroy_dist_connection)

class Fails(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 2:
            raise RuntimeError("CUDA out of memory")

sys.exit(ranks.run(sys.argv[1:], Fails()))
"""


def test_the_error_of_one_rank_ends_all_where_teardown_and_exit_would_wait(settings, tmp_path):
    """As with NCCL, where a rank that leaves and the others wait for each other."""
    script = tmp_path / "alone.py"
    script.write_text(ALONE_OVER_NCCL.format(tests=str(ROOT / "tests")))
    process = start(settings, {**ENDLESS, **DDP, "run": str(tmp_path / "run")}, script=script)
    code, output = end(process)
    assert code in (1, -signal.SIGKILL), output  # by its own knowledge, or by Lightning's
    assert "error: out of memory (" in output


def test_many_fits_of_a_process_are_compiled(monkeypatch):
    """They all compile the same function of transformers."""
    lm = CausalLM(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=64, **UNTIED)), "student")
    monkeypatch.setattr(lm.backbone, "compile", lambda **_: None)
    for limit, kept in ((8, 64), (100, 100)):
        with torch._dynamo.config.patch(recompile_limit=limit):
            parallel._compile(lm, None, in_blocks=False)
            assert torch._dynamo.config.recompile_limit == kept


STARTED = """
import os, subprocess, sys, time
from salt_lightning.run import endings, peers
endings._GRACE_S = 0.1
if peers._STARTER not in os.environ:
    env = {**os.environ, peers._STARTER: str(os.getpid())}
    print(subprocess.Popen([sys.executable, *sys.argv], env=env).pid, flush=True)
    time.sleep(float(sys.argv[1]))
    sys.exit()
time.sleep(float(sys.argv[2]))  # imports
peers.end_with_starter("predict")
assert peers._STARTER not in os.environ  # for what this process may start
print("started", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("lasts", [("600", "0"), ("0", "2")])
def test_processes_end_with_the_one_that_started_them_even_if_it_ended_before_they_could_look(tmp_path, lasts):
    (tmp_path / "started.py").write_text(STARTED)
    command = [sys.executable, str(tmp_path / "started.py"), *lasts]
    process = forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    said = [process.stdout.readline() for _ in range(2)]
    assert "started\n" in said
    process.kill()
    output = end(process)[1]
    assert "the process that started this one is gone" in output
    assert "run the same command again" in output  # a predict has no --ckpt_path last


AGENT = """
import os, signal, subprocess, sys, time
if "TORCHELASTIC_RUN_ID" not in os.environ:
    env = {**os.environ, "TORCHELASTIC_RUN_ID": "x"}
    print(subprocess.Popen([sys.executable, *sys.argv], env=env).pid, flush=True)
    time.sleep(600)
from salt_lightning.run import peers
signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))
for _ in range(2):  # two commands of one process
    peers.end_with_starter(None)
import threading
print("watched by", sum("starter" in thread.name for thread in threading.enumerate()), flush=True)
time.sleep(600)
"""


def test_a_rank_of_torchrun_is_told_to_stop_when_its_agent_is_gone(tmp_path):
    (tmp_path / "agent.py").write_text(AGENT)
    process = forked.Popen([sys.executable, str(tmp_path / "agent.py")], stdout=subprocess.PIPE, text=True,
                           stderr=subprocess.STDOUT, start_new_session=True,
                           env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    said = [process.stdout.readline() for _ in range(2)]
    assert "watched by 1\n" in said
    process.kill()
    assert "told to stop" in end(process)[1]


def test_only_the_processes_that_lightning_starts_are_told_who_has_started_them(settings, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(
        DDPStrategy, "setup_environment", lambda *_: told.append(os.environ.get(peers._STARTER)) or 1 / 0
    )
    monkeypatch.setattr(
        _SubprocessScriptLauncher, "_call_children_scripts", lambda *_: told.append(os.environ.get(peers._STARTER))
    )
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "data.micro_batch_size": 4, **DDP}
    with patch.dict(os.environ):
        with pytest.raises(ZeroDivisionError):
            cli.main(["fit", *arguments(settings, own)])
        assert told == [str(os.getpid()), None]
        # a later command of this process must not take itself for one of them
        monkeypatch.setattr(_SubprocessScriptLauncher, "_call_children_scripts", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli.main(["fit", *arguments(settings, own)])
        assert peers._STARTER not in os.environ


ENDS = """
import os, sys
from salt_lightning.run import endings
endings.end_abandoned(7)  # nobody was abandoned
endings._ABANDONED = True
for end in (3, SystemExit(4), SystemExit(), SystemExit("said so"), ValueError("as raised")):
    if not (child := os.fork()):
        print("written")
        if isinstance(end, ValueError):
            sys.stdout = None  # as where it was closed before
        endings.end_abandoned(end)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr, flush=True)
"""


def test_an_abandoning_process_ends_as_it_would_have():
    command, env = [sys.executable, "-c", ENDS], {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    done = forked.run(command, env=env, timeout=60)
    assert done.stderr.splitlines() == ["3", "4", "0", "said so", "1", "ValueError: as raised", "1"]
    assert done.stdout.splitlines() == ["written"] * 4  # also what stood in a buffer


DIES_CONNECTED = """
import datetime, os, sys
from salt_lightning import cli
from salt_lightning.run import peers

compare = peers.require_same_strategy
def compare_or_die(strategy):
    if os.environ.get("LOCAL_RANK") == "1":
        os._exit(0)
    peers._COMPARING = datetime.timedelta(seconds=1)
    compare(strategy)

peers.require_same_strategy = compare_or_die
sys.exit(cli.main())
"""


def test_a_rank_that_dies_once_connected_is_not_waited_for_until_the_timeout(settings, tmp_path):
    """The store that they share does not see it."""
    (tmp_path / "cli.py").write_text(DIES_CONNECTED)
    own = {"run": str(tmp_path / "run"), "data.micro_batch_size": 4, **DDP}
    code, output = end(start(settings, own, tmp_path / "cli.py", PYTHONPATH=str(ROOT)))
    assert code == 1
    assert "error: process 0 has lost the others (the others, once connected, did not say which strategy" in output


def test_a_rank_that_nobody_joins_ends_at_the_time_out(settings, tmp_path):
    """torch alone pauses after it and tries a second time."""
    limit_s, nobody = 6.0, {"LOCAL_RANK": "0", "NODE_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    own = {"run": str(tmp_path / "run"), "trainer.strategy.timeout_minutes": limit_s / 60, "data.micro_batch_size": 4}
    own |= {"trainer.devices": 1, "trainer.num_nodes": 2}
    process = start(settings, own, **nobody, MASTER_PORT="9")  # of the discard service: nobody listens
    seen_s, lines = {}, []
    for line in process.stdout:
        seen_s[line.split(":")[0].strip()] = time.monotonic()
        lines.append(line)
    assert end(process)[0] == 1
    assert limit_s <= seen_s["error"] - seen_s["Initializing distributed"] < limit_s + peers._SLACK_S + 3
    place, why = lines[-1].split(" (", 1)
    assert place == (
        "error: process 1 has not reached all others at MASTER_ADDR 127.0.0.1, MASTER_PORT 9, which is on each node "
        "the node itself"
    )
    assert "time" in why  # torch's words, or ours
    assert why.endswith(
        "); their output says why they ended, unless they were started with other values of these or of "
        "--trainer.num_nodes, or the same NODE_RANK; continue with --ckpt_path last\n"
    )


_WATCHED = """
import atexit, sys, time
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
_ChildProcessObserver.__init__.__defaults__ = (0.01,)  # s between two looks, instead of 5
atexit.register(time.sleep, 1)
from salt_lightning.cli import main
sys.exit(main())
"""


def test_an_error_of_all_ranks_is_one_line(settings, tmp_path):
    """Though the first kills the second, and Lightning then kills the first if it sees that before the end."""
    (tmp_path / "cli.py").write_text(_WATCHED)
    own = {"run": str(tmp_path / "run"), "data.block_size": 10**6, "data.micro_batch_size": 2}
    process = start(settings, own, tmp_path / "cli.py", PYTHONPATH=str(ROOT))
    code, output = end(process)
    assert code == 2
    assert output.count("error: ") == 1
    assert "training tokens do not fill one row of --data.block_size 1000000" in output
    assert "Traceback" not in output


# ------------------------------------------------------------------- refusals

PRECISIONS = "--trainer.precision {} must be 32 or 32-true or bf16 or bf16-mixed or bf16-true"
REFUSED = {
    "ranks that are forked": (
        {"trainer.strategy": "ddp_notebook"},
        "--trainer.strategy DDPStrategy that starts ranks by fork is not supported; use ddp, in a notebook with "
        "!python cli.py fit",
    ),
    "ranks that are spawned": (
        {"trainer.strategy": {"class_path": "DDPStrategy", "init_args": {"start_method": "spawn"}}},
        "--trainer.strategy DDPStrategy that starts ranks by spawn is not supported; use ddp, in a notebook with "
        "!python cli.py fit",
    ),
    "fsdp on a cpu": (
        {"trainer.strategy": "fsdp"},
        "--trainer.strategy fsdp (FSDP1) needs GPUs; use --config configs/fsdp.yaml (FSDP2), which also runs on CPUs",
    ),
    "replicas": (
        {**FSDP2, "trainer.strategy.replicas": 3, "trainer.devices": 4},
        "--trainer.strategy.replicas 3 does not fit 4 devices (--trainer.devices times --trainer.num_nodes); use one "
        "of 1, 2, 4",
    ),
    "a time-out below 0": (
        {**FSDP2, "trainer.strategy.timeout_minutes": -1, "data.block_size": 0},
        "--trainer.strategy.timeout_minutes -1 must be from 0.01 to 1000000; --data.block_size: 0 must be 2 or more, "
        "and below 2**31",
    ),
    "a time-out of 0": (
        {**FSDP2, "trainer.strategy.timeout_minutes": 0.0},
        "--trainer.strategy.timeout_minutes 0 must be from 0.01 to 1000000",
    ),
    "a time-out that no clock can count": (
        {**FSDP2, "trainer.strategy.timeout_minutes": 1e15},
        "--trainer.strategy.timeout_minutes 1e+15 must be from 0.01 to 1000000",
    ),
    "precision": (
        {**FSDP2, "trainer.precision": "16-true"},
        PRECISIONS.format("16-true"),
    ),
    "precision that Lightning refuses": (
        {**FSDP2, "trainer.precision": "64-true"},
        PRECISIONS.format("64-true"),
    ),
    "precision for which Lightning names others": (
        {**FSDP2, "trainer.precision": "16-mixed", "data.block_size": 0},
        PRECISIONS.format("16-mixed") + "; --data.block_size: 0 must be 2 or more, and below 2**31",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case, settings, tmp_path, capsys):
    own, message = REFUSED[case]
    fits = {"kd.weight": 0.0, "run": str(tmp_path / "run"), "data.micro_batch_size": 2}
    assert cli.main(["fit", *arguments(settings, fits, own)]) == 2
    assert error_of(capsys) == f"error: {message}"
    assert not (tmp_path / "run").exists()


class OwnDDP(DDPStrategy):
    """A user's own."""


class Asks(DDPStrategy):
    def __init__(self, what) -> None:
        super().__init__()


def own_ddp() -> DDPStrategy:
    return OwnDDP()


@pytest.mark.parametrize("made", [OwnDDP, own_ddp])
def test_a_class_of_your_own_is_a_strategy(made, settings, tmp_path):
    path = {"class_path": f"{__name__}.{made.__name__}"}
    own = {"trainer.strategy": path, "trainer.devices": 2, "data.micro_batch_size": 4, "kd.weight": 0.0}
    args = arguments(settings, own, {"run": str(tmp_path / "run")})
    assert cli.main(["check", *args]) == 0  # a fit here would leave its process group


def test_names_of_strategies_that_work_are_let_through(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # for FSDP1
    names = [name for name in StrategyRegistry if name.startswith(("ddp", "fsdp"))]
    assert len(names) > 10
    for name in ("auto", "AUTO", "DDP", "single_device", *names):  # Lightning ignores case
        parallel.require_supported(name)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("fsdp2", parallel.FSDP2), ("FSDP2", parallel.FSDP2), ("salt_lightning.parallel.FSDP2", parallel.FSDP2)),
        *(("DDPStrategy", DDPStrategy), (f"{__name__}.OwnDDP", OwnDDP)),
    ],
)
def test_a_strategy_by_its_name_alone(name, kind):
    words = ("--data.source", "x", "--trainer.strategy", name, "--trainer.accelerator", "cpu")
    assert type(built(*words).trainer.strategy) is kind


@pytest.mark.parametrize(
    "name", ["XLAStrategy", "xla", f"{__name__}.Asks", "ends.Strategy", "fails.Strategy", "os.path.join"]
)
def test_a_name_alone_that_cannot_be_built_is_refused_beside_what_else_is_wrong(
    name, settings, tmp_path, capsys, monkeypatch
):
    (tmp_path / "ends.py").write_text("raise SystemExit(3)")
    (tmp_path / "fails.py").write_text("1 +")
    monkeypatch.syspath_prepend(tmp_path)
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "trainer.strategy": name, "data.block_size": 0}
    assert cli.main(["fit", *arguments(settings, own)]) == 2
    shown = re.escape(name.rpartition(".")[2])
    said = rf"^error: --trainer.strategy \S*{shown} is not supported; use .*; --data.block_size: 0 must be"
    assert re.search(said, error_of(capsys))


def test_processes_of_srun_that_would_each_train_alone_are_refused(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    one = {"kd.weight": 0.0, "run": str(tmp_path / "run"), "trainer.devices": 1}
    assert cli.main(["fit", *arguments(settings, one)]) == 2
    said = "times --trainer.num_nodes 1 is not the number of processes that srun started, 2; start that many with srun"
    assert said in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")  # as salloc has it
    monkeypatch.setenv("SLURM_TASK_PID", str(os.getpid()))
    for devices in (1, 2):
        assert cli.main(["fit", *arguments(settings, {**one, "trainer.devices": devices})]) == 2
        assert "srun started 2 processes in a job named interactive, which Lightning" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_TASK_PID", "1")  # srun --pty bash: one of its tasks is the shell
    assert cli.main(["fit", *arguments(settings, one)]) == 0


def test_slurm_without_srun_is_refused_where_it_would_wait(settings, tmp_path, capsys, monkeypatch, slurm):
    two = {"kd.weight": 0.0, "run": str(tmp_path / "run"), "trainer.devices": 2, **DDP}
    slurm(SLURM_NTASKS="2")
    assert cli.main(["fit", *arguments(settings, two)]) == 2
    assert "error: You set `--ntasks=2` in your SLURM bash script" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")  # a batch script
    assert cli.main(["fit", *arguments(settings, two)]) == 2
    assert "that srun started, 1; start it with srun, or leave out --ntasks" in capsys.readouterr().err
    assert cli.main(["fit", *arguments(settings, {**two, "trainer.devices": 1})]) == 2
    assert "--trainer.devices 1: You set `devices=1` in Lightning" in capsys.readouterr().err
    monkeypatch.delenv("SLURM_NODEID")  # salloc's shell
    assert cli.main(["fit", *arguments(settings, two)]) == 2
    said = "this shell has the variables of SLURM's job 77, but no SLURM_NODEID; start the command with srun"
    assert said in capsys.readouterr().err
    monkeypatch.setenv("SLURM_NODEID", "0")
    alone = {**two, "trainer.strategy": "auto", "trainer.devices": 1}
    assert cli.main(["fit", *arguments(settings, alone)]) == 0


@pytest.mark.parametrize(
    ("why", "verb", "said"),
    [
        ("[c10d] EADDRINUSE, address already in use", "fit", "MASTER_PORT 29 is taken by another process"),
        ("gloo/transport: closed", "fit", "continue with --ckpt_path last"),
        ("gloo/transport: closed", "--config=c.yaml", "continue with --ckpt_path last"),
        ("Gloo connectFullMesh failed with ... Connection refused, remote=[127.0.1.1]:2", "fit", "GLOO_SOCKET_IFNAME"),
        ("gloo/transport: closed", "predict", "their output says why they ended; run the same command again"),
    ],
)
def test_what_a_rank_without_the_others_says(why, verb, said, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29")
    assert said in peers.loss_of_others(1, why, verb)
    monkeypatch.setattr(peers, "_nodes", 2)  # as while it connects
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    not_met = peers.loss_of_others(1, why, verb)
    assert said.split("; ")[-1] in not_met
    assert "at MASTER_ADDR nowhere.invalid, MASTER_PORT 29, a name that this host does not know (" in not_met or (
        "is taken" in said
    )
    monkeypatch.setattr(peers, "_nodes", 1)  # on one host its own address is no mistake
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    told = peers.loss_of_others(1, why.replace("127.0.1.1", "10.0.0.2"), verb)
    assert "the node itself" not in told
    assert "GLOO_SOCKET_IFNAME" not in told


@pytest.mark.parametrize(
    ("variables", "elsewhere"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "0"}, False),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "1"}, True),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, True),
        ({"RANK": "1", "SLURM_PROCID": "1"}, False),  # left by another job
    ],
)
def test_one_process_of_a_launcher_checks_and_exports(variables, elsewhere, monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert peers.writes_elsewhere() == elsewhere


@pytest.mark.parametrize("own", [{**DDP, "trainer.devices": 4}, {"trainer.devices": 1}], ids=["four", "one"])
def test_another_number_of_processes_than_asked_for_is_refused(own, settings, tmp_path, capsys, monkeypatch):
    started = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2",
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"}  # fmt: skip
    for name, value in started.items():  # what torchrun sets
        monkeypatch.setenv(name, value)
    assert cli.main(["fit", *arguments(settings, {"kd.weight": 0.0, "run": str(tmp_path / "run")}, own)]) == 2
    error = capsys.readouterr().err
    assert f"--trainer.devices {own['trainer.devices']} times --trainer.num_nodes 1 is not the number of proc" in error
    assert "torchrun started, 2; make them equal" in error


FIRST, SECOND, ALONE = ({"WORLD_SIZE": size, "RANK": rank} for size, rank in (("2", "0"), ("2", "1"), ("1", "0")))
MANY = {"strategy": "ddp", "num_nodes": 2}
PLACES = {  # an operator's variables, the Trainer's settings, and the place that this process would have
    "nothing but the variables": (FIRST, {}, "0 of 1"),
    "of the second": (SECOND, {}, "0 of 1"),
    "as many, without the rank": (SECOND, MANY, "0 of 2"),
    "one device, with the rank": ({**SECOND, "NODE_RANK": "1"}, {}, "0 of 1"),
    "processes of one's own": ({**SECOND, "LOCAL_RANK": "1"}, {}, "0 of 1"),
    "another number": ({**FIRST, "WORLD_SIZE": "3"}, MANY, "0 of 2"),
    "Kubeflow's, one device": (SECOND, {"plugins": KubeflowEnvironment()}, "0 of 1"),
    "with the rank": ({**SECOND, "NODE_RANK": "1"}, MANY, None),
    "with the rank, several a node": ({**FIRST, "NODE_RANK": "0"}, {**MANY, "devices": 2}, None),
    "Kubeflow's": (SECOND, {**MANY, "plugins": KubeflowEnvironment()}, None),
    "one process": (ALONE, {}, None),
    "no number of processes": ({"WORLD_SIZE": "0", "RANK": "0"}, {}, None),
    "a child of Lightning's": ({**FIRST, "LOCAL_RANK": "1", "NODE_RANK": "0"}, {"strategy": "ddp", "devices": 2}, None),
}


@pytest.mark.parametrize("case", PLACES)
def test_the_variables_of_an_operator_that_lightning_does_not_read_are_refused(case, monkeypatch):
    variables, told, place = PLACES[case]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    trainer = Trainer(**{"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, **told})
    if place is None:
        return parallel.check(trainer)
    size = variables["WORLD_SIZE"]
    said = (
        f"RANK {variables['RANK']} and WORLD_SIZE {size} are set, .* but this would be process {place}; start it with"
    )
    with pytest.raises(
        ConfigError, match=f"^{said} torchrun, or put NODE_RANK=.* --trainer.num_nodes {size}, or unset"
    ):
        parallel.check(trainer)


def test_the_variable_of_a_service_is_no_port(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "tcp://10.0.0.1:29500")
    told = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    parallel.check(Trainer(devices=1, **told))
    for devices in (1, 2):  # a process group of one has a port, too
        with pytest.raises(ConfigError, match=r"^MASTER_PORT tcp://10.0.0.1:29500 is not a port number: .*unset it$"):
            parallel.check(Trainer(devices=devices, strategy="ddp", **told))


def test_a_local_rank_left_over_in_the_environment_is_refused(monkeypatch):
    """Lightning would index the devices by it, or wait for processes that nobody starts."""
    told = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(
        ConfigError, match=r"^LOCAL_RANK 1 is set, but must be 0 or more and below --trainer.devices 1; "
    ):
        parallel.check(Trainer(devices=1, strategy="ddp", **told))
    with pytest.raises(ConfigError, match=r"^LOCAL_RANK 1 is set, so .* MASTER_PORT, which is not set; unset LOCAL_R"):
        parallel.check(Trainer(devices=2, strategy="ddp", **told))
    parallel.check(Trainer(devices=1, **told))
    monkeypatch.setenv("LOCAL_RANK", "0")
    parallel.check(Trainer(devices=1, strategy="ddp", **told))  # a group of one waits for nobody
    monkeypatch.setenv("LOCAL_RANK", "-1")
    with pytest.raises(ConfigError, match=r"^LOCAL_RANK -1 is set, but must be 0 or more and below --trainer.devices"):
        parallel.check(Trainer(devices=2, strategy="ddp", **told))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("MASTER_PORT", "29501")  # as of processes that Lightning, or a script, has started
    parallel.check(Trainer(devices=2, strategy="ddp", **told))


def test_other_strategies_are_refused_by_name(monkeypatch):
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

    class OnCPU(FSDPStrategy):
        """Lightning refuses its own on a CPU."""

    with pytest.raises(ConfigError, match="ModelParallelStrategy is not supported; use auto, ddp, "):
        parallel.check(pl.Trainer(strategy=ModelParallelStrategy(), accelerator="cpu", devices=2, logger=False))
    trainer = pl.Trainer(strategy=OnCPU(state_dict_type="sharded"), accelerator="cpu", devices=2, logger=False)
    averaging = [pl.callbacks.EMAWeightAveraging()]
    averaged = pl.Trainer(strategy=OnCPU(), accelerator="cpu", devices=2, logger=False, callbacks=averaging)
    with pytest.raises(
        ConfigError, match="callbacks EMAWeightAveraging copies whole models, but .* shards them; use ddp"
    ):
        parallel.check(averaged)
    with pytest.raises(ConfigError, match="state_dict_type sharded is not supported"):
        parallel.check(trainer)
    trainer = pl.Trainer(strategy=OnCPU(), accelerator="cpu", devices=2, logger=False)
    parallel.check(trainer, str(ROOT / "cli.py"))
    with pytest.raises(ConfigError, match=r"is a folder of shards, which .* \(FSDP1\) cannot read"):
        parallel.check(trainer, str(ROOT))
    monkeypatch.setattr(OnCPU, "root_device", torch.device("cuda", 0))
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    with pytest.raises(ConfigError, match="on 2 GPUs needs NCCL"):
        parallel.check(trainer)


# -------------------------------------------------------------------- one device


@pytest.fixture
def lm() -> CausalLM:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=64, **UNTIED)
    return CausalLM(AutoModelForCausalLM.from_config(config), "student").train()


def gradients(lm: CausalLM) -> tuple[list[torch.Tensor], int]:
    """Gradients of a step, and how often the first block's MLP ran."""
    calls = []
    hook = parallel.blocks(lm)[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    lm.zero_grad()
    hidden_ND, head_VD, _ = lm(torch.arange(16)[None] % 64, torch.arange(16)[None])
    (hidden_ND @ head_VD.T).logsumexp(-1).mean().backward()
    hook.remove()
    return [p.grad.clone() for p in lm.parameters()], len(calls)


def test_activations_are_computed_again_and_give_the_same_gradients(lm):
    keys = list(lm.state_dict())
    stored, once = gradients(lm)
    parallel.recompute_activations(lm)
    recomputed, twice = gradients(lm)
    assert (once, twice) == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(stored, recomputed, strict=True))
    assert list(lm.state_dict()) == keys


def test_a_model_without_blocks_of_transformers_kind_is_refused(lm):
    lm.model.model.layers = torch.nn.ModuleList()
    with pytest.raises(
        ConfigError, match="--model.student: LlamaForCausalLM has no transformers blocks.*--trainer.strategy ddp"
    ):
        parallel.blocks(lm)


def test_names_of_wrapped_weights_are_plain():
    name = "student._fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.mlp.weight"
    assert parallel.plain_name(name) == "student.model.layers.0.mlp.weight"


@pytest.mark.parametrize("name", ["fsdp", "fsdp1", "ddp"])
def test_overlays_change_the_strategy_alone(name):
    import yaml

    overlay = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
    assert overlay.keys() == {"trainer"}
    assert overlay["trainer"].keys() <= {"strategy", "precision"}
