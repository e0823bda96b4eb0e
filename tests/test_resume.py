"""A run stopped anywhere and resumed equals a run never stopped, bit for bit: weights and logged values."""

import csv
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import forked
import lightning.pytorch as pl
import pytest
import ranks
import torch
import torch.distributed as dist
import yaml
from conftest import CLOCK, StopAt, alive, arguments, error_of, scalars, weights, write_corpus
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from salt_lightning import KDScheduleCallback, ModelSpec, OptimSpec, SALTDataModule, SALTModule, cli
from salt_lightning.comparison import lineage
from salt_lightning.errors import ConfigError, of_machine
from salt_lightning.fit import alike
from salt_lightning.fit.restart import replace_lost_start
from salt_lightning.hugging_face.folders import config_hash, sample_hash
from salt_lightning.models import read_checkpoint
from salt_lightning.run import event_log, run_lock
from salt_lightning.run.event_log import log_settings
from salt_lightning.run.run_folder import earlier_configs
from salt_lightning.run.runlog import read_run
from salt_lightning.teacher.probe import Probe

RAMP = {"kd.weight": 0.667, "kd.steps": 8, "kd.anneal_steps": 4, "kd.shape": "linear"}  # phase 1 ends at 8 of 12


@pytest.fixture
def fit(settings, teacher, monkeypatch):
    """fit(run, stop_at=None, **overrides) -> exit code; stops by a real SIGTERM in the middle of step `stop_at`."""

    def run_fit(run: Path, stop_at: int | None = None, **overrides) -> int:
        extra = [StopAt(stop_at)] if stop_at else []
        original = cli.SALTCLI.instantiate_trainer

        def with_stop(self, **kwargs):
            trainer = original(self, **kwargs)
            trainer.callbacks.extend(extra)
            return trainer

        own = {"run": str(run), "model.teacher.path": teacher, **RAMP}
        with monkeypatch.context() as patch:
            patch.setattr(cli.SALTCLI, "instantiate_trainer", with_stop)
            return cli.main(["fit", *arguments(settings, own, overrides)])

    return run_fit


def assert_same(run: Path, other: Path, step: int = 12) -> None:
    name = f"checkpoints/step-{step:08d}.ckpt"
    for key, tensor in weights(run / name).items():
        assert torch.equal(tensor, weights(other / name)[key]), key
    ours, theirs = scalars(run), scalars(other)
    assert ours.keys() == theirs.keys()
    for tag in ours.keys() - CLOCK:
        assert ours[tag] == theirs[tag], tag


VARIANTS = {
    "plain": {},
    "accumulation": {"data.micro_batch_size": 2},
    "two workers": {"data.num_workers": 2},
    "dropout": {
        "model.student.family": "gpt2",
        "model.student.config": {"n_embd": 32, "n_layer": 2, "n_head": 4},
        "data.micro_batch_size": 4,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_in_each_phase_equals_never_stopped(fit, tmp_path, variant):
    overrides = VARIANTS[variant]
    assert fit(tmp_path / "whole", **overrides) == 0
    stops = [2, 6, 10] if variant != "two workers" else [6]  # in the constant part, in the ramp, after the teacher
    for number, stop in enumerate(stops):
        resumed = {"ckpt_path": "last"} if number else {}
        assert fit(tmp_path / "broken", stop_at=stop, **overrides, **resumed) == 128 + signal.SIGTERM
        assert (tmp_path / f"broken/checkpoints/step-{stop:08d}.ckpt").exists()
    assert fit(tmp_path / "broken", ckpt_path="last", **overrides) == 0
    assert_same(tmp_path / "broken", tmp_path / "whole")
    values = scalars(tmp_path / "whole")
    assert sorted(values["train/loss"]) == list(range(1, 13))  # the premise: every step is compared
    assert sorted(values["val/ce"]) == [6, 12]
    assert sorted(values["train/kd"]) == list(range(1, 9))  # the teacher's only while w > 0


def test_stopped_where_a_validation_is_due(fit, tmp_path):
    """The save waits for the step's validation, so after the resume that is neither repeated nor missing."""
    assert fit(tmp_path / "whole") == 0
    assert fit(tmp_path / "broken", stop_at=6) == 128 + signal.SIGTERM
    assert sorted(scalars(tmp_path / "broken")["val/ce"]) == [6]
    assert fit(tmp_path / "broken", ckpt_path="last") == 0
    assert_same(tmp_path / "broken", tmp_path / "whole")


def test_across_an_epoch_of_the_data(fit, tmp_path, caplog):
    small = {"data.global_batch_size": 64, "data.micro_batch_size": 64, "trainer.max_steps": 8, "kd.steps": 6}
    assert fit(tmp_path / "whole", **small) == 0
    rows = int(re.search(r"data: (\d+) rows", caplog.text)[1])
    assert 64 * 3 < rows < 64 * 7  # the premise: the resumed part wraps around
    assert fit(tmp_path / "broken", stop_at=3, **small) == 128 + signal.SIGTERM
    assert fit(tmp_path / "broken", ckpt_path="last", **small) == 0
    assert_same(tmp_path / "broken", tmp_path / "whole", step=8)


def test_phase_2_resumes_without_the_teacher(fit, tmp_path, teacher):
    """The teacher is no longer needed, not even its file."""
    gone = tmp_path / "teacher.ckpt"
    shutil.copy(teacher, gone)
    with_copy = {"model.teacher.path": str(gone)}
    assert fit(tmp_path / "whole", **with_copy) == 0
    assert fit(tmp_path / "broken", stop_at=9, **with_copy) == 128 + signal.SIGTERM
    gone.unlink()
    assert fit(tmp_path / "broken", ckpt_path="last", **with_copy) == 0
    assert_same(tmp_path / "broken", tmp_path / "whole")


def test_phase_2_resumes_beside_a_teacher_of_other_token_ids(fit, tmp_path, teacher):
    """It is not loaded any more, so nobody asks what it means by a token id; in phase 1 it is refused."""
    from families import tiny

    folder = tmp_path / "teacher"
    tiny("llama", vocab_size=320, max_position_embeddings=32).model.save_pretrained(folder)
    shutil.copytree(Path(teacher).parents[1] / "tokenizer", folder, dirs_exist_ok=True)
    rules = json.loads((folder / "tokenizer.json").read_text())
    vocab = rules["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    assert fit(tmp_path / "whole") == 0
    assert fit(tmp_path / "broken", stop_at=9) == 128 + signal.SIGTERM
    other = {"model.teacher.path": str(folder), "data.cache_dir": str(tmp_path / "cache")}  # asked before tokenizing
    assert fit(tmp_path / "broken", ckpt_path="last", **other) == 0
    assert_same(tmp_path / "broken", tmp_path / "whole")
    assert fit(tmp_path / "other", **other) == 2


def test_another_accumulation_goes_on_at_the_same_step(fit, tmp_path):
    assert fit(tmp_path / "whole") == 0
    assert fit(tmp_path / "broken", stop_at=5) == 128 + signal.SIGTERM
    assert fit(tmp_path / "broken", ckpt_path="last", **{"data.micro_batch_size": 2}) == 0
    ours, theirs = scalars(tmp_path / "broken"), scalars(tmp_path / "whole")
    assert sorted(ours["train/loss"]) == list(range(1, 13))
    # the same gradient up to fp32 rounding of the sum, through 7 steps of a rate of 3e-3
    assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=2e-4)


@pytest.mark.parametrize("relative", [False, True])
def test_a_run_goes_on_without_the_weights_that_it_started_from(
    settings, teacher, tmp_path, capsys, caplog, relative, monkeypatch
):
    """And says so; its config.yaml still names them. models/start could be a name on the hub."""
    start = Path("models/start") if relative else tmp_path / "models/start"
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", teacher, str(start)]) == 0
    own = {"model.student.path": str(start), "model.student.config": {}, "kd.weight": 0.0, "checkpoint.at_steps": [5]}
    assert cli.main(["fit", *arguments(settings, own, {"run": str(tmp_path / "whole")})]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    (tmp_path / "broken/checkpoints/step-00000012.ckpt").unlink()
    shutil.rmtree(start)
    broken = {**own, "run": str(tmp_path / "broken")}
    assert cli.main(["check", *arguments(settings, broken, {"ckpt_path": "last"})]) == 0
    assert cli.main(["fit", *arguments(settings, broken, {"ckpt_path": "last"})]) == 0
    assert_same(tmp_path / "broken", tmp_path / "whole")
    from_checkpoint = tmp_path / "broken/checkpoints/step-00000005.ckpt"
    assert f"--model.student.path {start} is gone: the student is built from the checkpoint, {from_checkpoint}" in (
        caplog.text
    )
    assert f"path: {start}" in (tmp_path / "broken/config.yaml").read_text()
    assert cli.main(["fit", *arguments(settings, own, {"run": str(tmp_path / "new")})]) == 2
    gone = ": no such folder here; the hub is offline" if relative else " does not exist"
    assert f"--model.student.path {start}{gone}" in error_of(capsys)


def test_a_start_that_is_gone_from_the_hub_takes_its_revision_with_it():
    """A path with a revision would be refused."""
    module = SimpleNamespace(student_spec=ModelSpec(path="nobody/nowhere", revision="v1"))
    replace_lost_start(module, "runs/x/checkpoints/step-00000001.ckpt")
    assert module.student_spec == ModelSpec(path="runs/x/checkpoints/step-00000001.ckpt")


def test_kill_9_then_last(settings, teacher, tmp_path):
    """A real process, a real SIGKILL at a moment of nobody's choosing."""
    own = {"model.teacher.path": teacher, **RAMP, "checkpoint.every_n_steps": 1, "trainer.max_steps": 40,
           "trainer.val_check_interval": 20, "kd.steps": 30}  # fmt: skip
    assert cli.main(["fit", *arguments(settings, own, {"run": str(tmp_path / "whole")})]) == 0
    command = ["fit", *arguments(settings, own)]
    command = [*command, f"--run={tmp_path / 'broken'}", "--ckpt_path=last"]
    folder = tmp_path / "broken/checkpoints"
    for wanted in (3, 17):
        process = forked.Popen(
            [sys.executable, "-c", "import sys; from salt_lightning.cli import main; sys.exit(main())", *command],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while not list(folder.glob(f"step-{wanted:08d}.ckpt")):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert cli.main(["fit", *arguments(settings, own, {"run": str(tmp_path / "broken"), "ckpt_path": "last"})]) == 0
    assert_same(tmp_path / "broken", tmp_path / "whole", step=40)


def test_a_moved_runs_own_config_does_not_start_anew_in_the_old_place(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = {"kd.weight": 0.0, "run": "runs/a", "trainer.max_steps": 2}
    assert cli.main(["fit", *arguments(settings, own)]) == 0
    Path("runs/a").rename("b")
    again = ["fit", "--config=b/config.yaml", "--trainer.max_steps=4", "--ckpt_path=last"]
    assert cli.main(again) == 2
    said = (
        "no checkpoint in runs/a/checkpoints, where b/config.yaml says that the run is, but there are some beside that"
    )
    assert f"{said} file, so the run was moved; give --run b" in error_of(capsys)
    assert cli.main([*again, "--run=b"]) == 0
    assert Path("b/checkpoints/step-00000004.ckpt").exists()
    assert cli.main([*again, "--run=new"]) == 0  # another run with the settings of this one


def test_sigterm_ends_the_first_process_of_a_container_before_it_trains(settings, tmp_path):
    """There the kernel drops signals without a handler, and Python has none while it imports and prepares text."""
    contained = ["unshare", "-rpf", "--mount-proc", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*contained, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces of processes here")
    args = arguments(settings, {"run": str(tmp_path / "run"), "kd.weight": 0.0})
    cli_py = Path(__file__).parents[1] / "cli.py"
    outer = subprocess.Popen([*contained, sys.executable, str(cli_py), "fit", *args])
    try:
        time.sleep(1.5)
        first = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text())
        os.kill(first, signal.SIGTERM)
        assert outer.wait(120) == 128 + signal.SIGTERM
    finally:
        outer.kill()
        outer.wait()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_the_whole_process_group(settings, tmp_path, number, slurm):
    """What a terminal does on Ctrl-C and a cluster on SIGTERM or, under SLURM, SIGUSR1 or the requeue_signal that was
    asked for: loader workers get it too."""
    of_slurm = number in (signal.SIGUSR1, signal.SIGUSR2)
    asked = slurm(SLURM_ARRAY_JOB_ID="70", SLURM_ARRAY_TASK_ID="3") if of_slurm else None
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "data.num_workers": 2, "trainer.max_steps": 100_000,
           "data.micro_batch_size": 2, "trainer.val_check_interval": 100_000, "checkpoint.keep": 2}  # fmt: skip
    if number == signal.SIGUSR2:
        environment = "lightning.pytorch.plugins.environments.SLURMEnvironment"
        own["trainer.plugins"] = {"class_path": environment, "init_args": {"requeue_signal": "SIGUSR2"}}
    process = forked.Popen(
        [sys.executable, "-c", "import sys; from salt_lightning.cli import main; sys.exit(main())", "fit",
         *arguments(settings, own)],
        start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not len(scalars(tmp_path / "run").get("train/loss", {})) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    step = int(re.search(rf"stopped by {number.name} at step (\d+), saved", out)[1])
    assert (tmp_path / f"run/checkpoints/step-{step:08d}.ckpt").exists()
    assert "Traceback" not in err
    assert err.count(f"{number.name}: saving after this step") == 1  # no worker has heard it
    assert asked is None or asked() == ["requeue 70_3"]


def test_a_run_whose_folder_is_removed_ends_with_one_line_also_with_workers(settings, tmp_path):
    """They are killed at exit, and torch would raise an error for each in a handler of the signal that says so."""
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "data.num_workers": 2, "trainer.max_steps": 100_000,
           "trainer.val_check_interval": 100_000}  # fmt: skip
    process = forked.Popen(
        [sys.executable, "-c", "import sys; from salt_lightning.cli import main; sys.exit(main())", "fit",
         *arguments(settings, own)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not len(scalars(tmp_path / "run").get("train/loss", {})) and time.monotonic() < deadline:
        time.sleep(0.2)
    while (tmp_path / "run").exists():
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    err = process.communicate(timeout=60)[1].strip().splitlines()
    assert process.returncode == 1
    assert err[-1].endswith("; was its folder removed? Otherwise choose another folder")
    assert not [line for line in err if "Traceback" in line]


@pytest.mark.parametrize(
    ("sent", "apart_s", "saved"),
    [([15, 15], 0, True), ([15, 15], 11, False), ([2, 15], 11, True), ([2, 15, 15], 0, True),
     ([2, 15, 15], 11, False), ([15, 2], 0, False), ([2, 2], 0, False)],
)  # fmt: skip
def test_several_signals_may_be_one_request(settings, tmp_path, monkeypatch, capsys, sent, apart_s, saved):
    """SLURM at a job's limit, and torchrun to its workers, send SIGTERM twice. SLURM sends one after SIGUSR1, a
    service manager after Ctrl-C. The same one later, and Ctrl-C, is impatience."""

    class Told(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            if trainer.global_step == 2:
                begin_s = time.monotonic()
                for i, number in enumerate(sent):
                    now_s = begin_s + i * apart_s
                    monkeypatch.setattr("salt_lightning.checkpoint.time.monotonic", lambda now_s=now_s: now_s)
                    os.kill(os.getpid(), number)

    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "checkpoint.every_n_steps": None}
    handler = signal.getsignal(signal.SIGINT)  # Lightning ignores Ctrl-C from there on
    try:
        assert ranks.run(["fit", *arguments(settings, own)], Told()) == 128 + sent[0 if saved else -1]
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (tmp_path / "run/checkpoints/step-00000003.ckpt").exists() == saved
    out, err = capsys.readouterr()
    assert (f"stopped by {signal.Signals(sent[0]).name} at step 3, saved" in out) == saved
    assert saved or err.strip().splitlines()[-1] == f"stopped by {signal.Signals(sent[-1]).name}"


def test_ctrl_c_in_a_validation_ends_in_one_line(fit, settings, tmp_path, capsys, monkeypatch):
    assert fit(tmp_path / "run", stop_at=3) == 128 + signal.SIGTERM

    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)  # another thread may have been given it: this one hears of it soon

    monkeypatch.setattr(SALTModule, "validation_step", interrupted)
    own = {"run": str(tmp_path / "run"), "ckpt_path": "last"}
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        assert cli.main(["validate", *arguments(settings, own)]) == 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err.strip().splitlines()[-1] == "stopped by SIGINT"


def test_another_schedule_is_refused_unless_allowed(fit, tmp_path, capsys):
    assert fit(tmp_path / "run", stop_at=3) == 128 + signal.SIGTERM
    assert fit(tmp_path / "run", ckpt_path="last", **{"kd.steps": 10}) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: the KD schedule differs from the checkpoint's: --kd.steps 10 (checkpoint: 8)")
    assert "--kd.allow_change true" in message
    assert fit(tmp_path / "run", ckpt_path="last", **{"kd.steps": None, "kd.anneal_steps": 0, "kd.shape": "step"}) == 2
    assert "--kd.steps null (checkpoint: 8)" in capsys.readouterr().err
    changed = {"kd.steps": 10, "kd.allow_change": True, "ckpt_path": "last"}
    assert fit(tmp_path / "run", **changed) == 0
    assert sorted(scalars(tmp_path / "run")["train/kd"])[-1] == 10


def test_what_the_teacher_has_cost_stays_counted_under_another_schedule(fit, tmp_path):
    assert fit(tmp_path / "run", stop_at=6) == 128 + signal.SIGTERM
    a_step = scalars(tmp_path / "run")["train/flops_teacher_total"][6] / 6
    fewer = {"kd.steps": 4, "kd.anneal_steps": 2, "kd.allow_change": True, "ckpt_path": "last"}
    assert fit(tmp_path / "run", stop_at=9, **fewer) == 128 + signal.SIGTERM
    assert scalars(tmp_path / "run")["train/flops_teacher_total"][9] == 6 * a_step  # 6 steps had the teacher, not 4
    more = {"kd.steps": 11, "kd.allow_change": True, "ckpt_path": "last"}
    assert fit(tmp_path / "run", **more) == 0
    assert scalars(tmp_path / "run")["train/flops_teacher_total"][12] == 8 * a_step  # and 9 and 10, but not 6 to 8


def test_another_batch_counts_on_from_the_checkpoints_totals(fit, settings, tmp_path, caplog):
    model = {"model.student.config": {**settings["model.student.config"], "max_position_embeddings": 32}}
    larger = {"data.global_batch_size": 16, "data.block_size": 16, **model}
    assert fit(tmp_path / "run", stop_at=3, **model) == 128 + signal.SIGTERM
    counted = scalars(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "twice")
    assert fit(tmp_path / "run", ckpt_path="last", **larger) == 0
    for change in ("--data.global_batch_size 16 (checkpoint: 8)", "--data.block_size 16 (checkpoint: 32)"):
        assert change in caplog.text
    again = "; rows of another --data.block_size are in another order, so text may be read again"
    assert f"data: step 4 continues with row 49 of the order{again}" in caplog.text  # 24 rows of 32 are 48 of 16
    assert "data: 12 steps read 192 rows of" in caplog.text  # 3 x 8 x 32 / 16 and 9 x 16
    assert fit(tmp_path / "fresh", **larger) == 0  # what a step of the new settings costs
    found, fresh = scalars(tmp_path / "run"), scalars(tmp_path / "fresh")
    assert found["train/tokens"] == {step: 256.0 * step for step in range(1, 13)}  # 8 x 32 and 16 x 16
    for who in ("student", "teacher"):
        tag = f"train/flops_{who}_total"
        for step in range(4, 13):
            assert found[tag][step] == pytest.approx(counted[tag][3] + fresh[tag][step] - fresh[tag][3], rel=1e-6)
    assert found["train/flops_student_total"][12] != pytest.approx(fresh["train/flops_student_total"][12], rel=1e-6)
    assert fit(tmp_path / "twice", stop_at=7, ckpt_path="last", **larger) == 128 + signal.SIGTERM
    assert fit(tmp_path / "twice", ckpt_path="last", **larger) == 0
    assert_same(tmp_path / "twice", tmp_path / "run")


def test_another_end_of_the_run_moves_the_rate_and_that_is_said(fit, tmp_path, caplog):
    assert fit(tmp_path / "run", stop_at=6) == 128 + signal.SIGTERM
    assert fit(tmp_path / "run", ckpt_path="last", stop_at=8) == 128 + signal.SIGTERM
    assert "the learning rate continues" not in caplog.text
    assert fit(tmp_path / "run", ckpt_path="last", **{"trainer.max_steps": 20}) == 0
    was, now = (OptimSpec(lr=3e-3, warmup_steps=2).lr_at(8, steps) for steps in (12, 20))
    assert f"continues from step 8 at {now:.3g} instead of {was:.3g}: " in caplog.text
    assert scalars(tmp_path / "run")["train/lr"][9] == pytest.approx(now)


def test_starts_under_the_same_settings_leave_one_config(fit, tmp_path):
    elsewhere = {"checkpoint.folder": str(tmp_path / "elsewhere")}
    for stop_at in (3, 6, 9):
        assert fit(tmp_path / "run", ckpt_path="last", stop_at=stop_at, **elsewhere) == 128 + signal.SIGTERM
    assert [file.name for file in (tmp_path / "run").glob("config*")] == ["config.yaml"]


def test_a_closed_terminal_saves_unless_it_is_to_be_ignored(fit_with, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may have been started by nohup
    try:
        assert fit_with(tmp_path / "run", StopAt(3, signal.SIGHUP)) == 128 + signal.SIGHUP
        assert (tmp_path / "run/checkpoints/step-00000003.ckpt").exists()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        assert fit_with(tmp_path / "nohup", StopAt(3, signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("stream", ["full", "pipe"])
def test_a_stream_that_breaks_ends_no_run(stream, fit_with, tmp_path, monkeypatch, capsys):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as pipe, open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full if stream == "full" else pipe)
        assert fit_with(tmp_path / "run", **{"trainer.enable_progress_bar": True}) == 0
    reason = {"full": "No space left on device", "pipe": "Broken pipe"}[stream]
    assert capsys.readouterr().err.count(f"stdout cannot be written ({reason}): continuing without it") == 1


def test_streams_that_were_closed_before(tmp_path):
    code = "import sys; sys.stdout = None; from salt_lightning.cli import main; sys.exit(main(['compare', 'none']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)


RAISES = """
import sys
from salt_lightning.batches.rows import Loader

class Broken:
    def __getitem__(self, index):
        raise RuntimeError("stack expects each tensor to be equal size")

loader = Loader(Broken(), 5, lambda: 0)
loader.num_workers = 1
kept = []
for batch in loader: pass
"""


def test_what_a_loader_worker_raises_is_shown_and_ends_the_process(tmp_path):
    done = subprocess.run([sys.executable, "-c", RAISES], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "stack expects each tensor to be equal size" in done.stderr
    assert of_machine(RuntimeError("Caught RuntimeError in DataLoader worker process 0.")) is None


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        (None, "halve --data.micro_batch_size .*, or set --model.activation_checkpointing true, and continue with"),
        ("predict", r"halve --data.micro_batch_size \(the result stays the same\) and run the same command again"),
        ("export", "; free some memory and run the same command again"),
    ],
)
def test_what_to_do_without_memory_depends_on_the_command(verb, said):
    assert re.search(said, of_machine(MemoryError("no memory"), verb))
    assert of_machine(MemoryError(), verb).startswith(("out of memory; halve", "out of memory; free"))


class KillWorker(Callback):
    def on_train_batch_end(self, *args) -> None:
        for child in multiprocessing.active_children():
            child.kill()


def test_a_loader_worker_that_is_killed_is_one_line(fit_with, tmp_path, capsys):
    many = {"data.num_workers": 1, "trainer.max_steps": 200}
    assert fit_with(tmp_path / "run", KillWorker(), **many) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: a data loading process was killed, .* \(DataLoader worker .*--ckpt_path last$", said)


def test_going_back_leaves_the_other_branch_aside(fit, tmp_path, caplog):
    often = {"checkpoint.every_n_steps": 4, "checkpoint.keep": None}
    assert fit(tmp_path / "run", **often) == 0
    folder = tmp_path / "run/checkpoints"
    first = str(folder / "step-00000004.ckpt")
    (folder / "step-00000012.ckpt.aside").mkdir()  # from an earlier time under FSDP2
    assert (
        fit(tmp_path / "run", ckpt_path=first, stop_at=6, **{**often, "model.optim.lr": 1e-3}) == 128 + signal.SIGTERM
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-00000004.ckpt", "step-00000006.ckpt", "step-00000008.ckpt.aside", "step-00000012.ckpt.aside"]  # fmt: skip
    assert f"{folder}/step-00000012.ckpt is after step 4, where this run resumes: set aside as" in caplog.text
    assert fit(tmp_path / "run", ckpt_path="last", **{**often, "model.optim.lr": 1e-3}) == 0
    assert max(v for step, v in scalars(tmp_path / "run")["train/lr"].items() if step > 4) <= 1e-3  # one branch


def test_explicit_values_win_over_the_checkpoint_and_say_so(fit, tmp_path, capsys):
    assert fit(tmp_path / "run", stop_at=3) == 128 + signal.SIGTERM
    assert fit(tmp_path / "run", ckpt_path="last", **{"model.optim.lr": 1e-4, "model.seed": "null"}) == 0
    said = capsys.readouterr().err
    assert "--model.optim.lr 0.0001 (checkpoint: 0.003): the given value is used" in said
    assert "--model.seed" not in said  # it is still that of --seed_everything
    assert fit(tmp_path / "other", stop_at=3, **{"model.seed": 5}) == 128 + signal.SIGTERM
    assert fit(tmp_path / "other", ckpt_path="last", **{"model.seed": "null"}) == 0
    assert "--model.seed 0 (checkpoint: 5): the given value is used" in capsys.readouterr().err
    assert max(v for step, v in scalars(tmp_path / "run")["train/lr"].items() if step > 3) <= 1e-4


def test_a_family_beside_a_path_is_not_said_to_be_used(fit, tmp_path, teacher, capsys):
    """A run's config.yaml has the default, llama, also for weights of another family."""
    from families import tiny

    start = tmp_path / "start"
    tiny("qwen3", vocab_size=320, max_position_embeddings=32).model.save_pretrained(start)
    shutil.copytree(Path(teacher).parents[1] / "tokenizer", start, dirs_exist_ok=True)
    own = {"model.student.path": str(start), "model.student.config": {}, "model.student.family": "llama"}
    assert fit(tmp_path / "run", stop_at=3, **own) == 128 + signal.SIGTERM
    assert fit(tmp_path / "run", ckpt_path="last", **own, **{"model.optim.lr": 1e-4}) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "given value is used" in line]
    assert said == ["--model.optim.lr 0.0001 (checkpoint: 0.003): the given value is used"]


def test_only_what_validate_uses_is_said_to_be_used(fit, settings, tmp_path, capsys):
    assert fit(tmp_path / "run", stop_at=3) == 128 + signal.SIGTERM
    other = {"model.optim.lr": 1e-4, "model.student.attention": "eager", "model.logits_budget_gib": 1.0}
    own = {"run": str(tmp_path / "run"), "ckpt_path": "last"}
    assert cli.main(["validate", *arguments(settings, own, other)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "given value is used" in line]
    assert said == ["--model.logits_budget_gib 1.0 (checkpoint: 2.0): the given value is used"]


def test_values_not_given_come_from_the_checkpoint(fit, settings, teacher, tmp_path):
    """The second command does not give lr."""
    assert fit(tmp_path / "run", stop_at=3) == 128 + signal.SIGTERM
    fewer = {key: value for key, value in settings.items() if not key.startswith("model.")}
    again = {**RAMP, "run": str(tmp_path / "run"), "model.teacher.path": teacher, "ckpt_path": "last"}
    assert cli.main(["fit", *arguments(fewer, again)]) == 0
    assert fit(tmp_path / "whole") == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:You.re using the WeightAveraging callback")
def test_averaged_weights_go_on_with_what_averages_them_alone(fit, tmp_path, capsys):
    ema = {"trainer.callbacks": [{"class_path": "EMAWeightAveraging", "init_args": {"decay": 0.9}}]}
    assert fit(tmp_path / "run", stop_at=6, **ema) == 128 + signal.SIGTERM
    assert fit(tmp_path / "run", ckpt_path="last") == 2
    assert "resume with that callback (--trainer.callbacks EMAWeightAveraging)" in error_of(capsys)
    assert fit(tmp_path / "run", ckpt_path="last", **ema) == 0
    assert fit(tmp_path / "whole", **ema) == 0
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert cli.main(["export", str(tmp_path / "run/checkpoints/step-00000012.ckpt"), str(tmp_path / "hf")]) == 0
    assert "- weights averaged by: EMAWeightAveraging" in (tmp_path / "hf/README.md").read_text().splitlines()


@pytest.mark.filterwarnings("ignore:You.re using the WeightAveraging callback")
def test_an_early_end_saves_what_was_trained_and_no_average(fit_with, tmp_path):
    class End(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 5:
                self.trained = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
                trainer.should_stop = True

    end, averages = End(), {"class_path": "EMAWeightAveraging", "init_args": {"decay": 0.9}}
    assert fit_with(tmp_path / "run", end, **{"trainer.callbacks": [averages]}) == 0
    saved = read_checkpoint(str(tmp_path / "run" / "checkpoints" / "step-00000005.ckpt"), "x")
    assert all(torch.equal(saved["current_model_state"][name], end.trained[name]) for name in end.trained)
    assert not all(torch.equal(saved["state_dict"][name], end.trained[name]) for name in end.trained)


def test_another_student_is_refused_by_its_settings(fit, settings, tmp_path, capsys):
    assert fit(tmp_path / "run", stop_at=3) == 128 + signal.SIGTERM
    wider = {**settings["model.student.config"], "intermediate_size": 128}
    assert fit(tmp_path / "run", ckpt_path="last", **{"model.student.config": wider}) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    change = "--model.student.config.intermediate_size 128 (checkpoint: 64)"
    remedy = "use the checkpoint's values, or start a new --run from its weights with --model.student.path CHECKPOINT"
    assert message == f"error: the checkpoint holds another student: {change}; {remedy}"


def test_another_students_path_is_refused_by_that_path(fit, teacher, tmp_path, capsys):
    """Its sizes cannot be set."""
    run, given = tmp_path / "run", {"ckpt_path": "last", "model.student.config": {}}
    assert fit(run, stop_at=3) == 128 + signal.SIGTERM
    assert fit(run, **given, **{"model.student.path": teacher}) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        f"the checkpoint holds another student than --model.student.path {teacher}: --model.student.config." in message
    )
    assert message.endswith("; leave that out (null), or choose another --run to train it")
    assert fit(run, ckpt_path="last") == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_positions_that_follow_the_rows_are_named_by_these(fit, settings, tmp_path, capsys, family):
    own = {"model.student.family": family, "model.student.config": {"hidden_size": 32, "num_hidden_layers": 1,
                                                                    "num_attention_heads": 4}}  # fmt: skip
    assert fit(tmp_path / "run", stop_at=3, **own) == 128 + signal.SIGTERM
    assert fit(tmp_path / "run", ckpt_path="last", **own, **{"data.block_size": 16}) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the checkpoint holds another student: --data.block_size 16 (checkpoint: 32); use the" in message


def test_a_run_that_is_under_way_is_left_alone(fit, settings, tmp_path, capsys, caplog, monkeypatch):
    """By real processes: the lock is of a process, and free when it dies, whatever its workers do."""
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "data.num_workers": 2, "trainer.max_steps": 100_000,
           "trainer.val_check_interval": 100_000, "checkpoint.every_n_steps": 1, "checkpoint.keep": 2}  # fmt: skip
    process = forked.Popen(
        [sys.executable, "-c", "import sys; from salt_lightning.cli import main; sys.exit(main())", "fit",
         *arguments(settings, own)],
        start_new_session=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("run/checkpoints/step-*.ckpt")) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert process.poll() is None  # it said why on stderr
        who = f"process {process.pid} on {socket.gethostname()}"
        assert fit(tmp_path / "run", ckpt_path="last") == 2
        said = f"error: --run {tmp_path}/run: {who} is using it; wait until it ends, or choose another folder"
        assert capsys.readouterr().err.strip().splitlines()[-1] == said
        assert cli.main(["predict", f"--run={tmp_path / 'run'}"]) == 2
        assert capsys.readouterr().err.strip().splitlines()[-1] == said
        monkeypatch.setattr("salt_lightning.run.run_lock.socket.gethostname", lambda: "another")
        monkeypatch.setattr(
            "salt_lightning.run.run_lock._OTHER_MACHINE_S", 0.5
        )  # such locks may be those of a dead machine
        assert fit(tmp_path / "run", ckpt_path="last") == 2
        assert f"waiting for {who}" in caplog.text
        assert said in capsys.readouterr().err
    finally:
        process.kill()  # its workers live on for some seconds
        process.wait()
    assert fit(tmp_path / "run", ckpt_path="last", **{"kd.weight": 0.0, "trainer.max_steps": 1}) == 2
    assert "--trainer.max_steps 1; for a shorter run" in capsys.readouterr().err  # the lock was free


class SeesLock(Callback):
    def on_train_start(self, trainer, pl_module):
        self.seen = (Path(trainer.default_root_dir) / ".lock").exists()


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("RANK", "auto"), ("LOCAL_RANK", "auto"), ("NODE_RANK", "auto"), ("SLURM_PROCID", "auto"), ("RANK", "ddp")],
)
def test_a_variable_left_by_another_job_makes_no_other_rank(
    name, strategy, fit_with, tmp_path, capsys, monkeypatch, caplog
):
    """The run would have neither log nor lock. Lightning reads the rank when it is imported."""
    monkeypatch.setattr(rank_zero_only, "rank", int(name != "NODE_RANK"))
    lock = SeesLock()
    own = {"trainer.max_steps": 2, "trainer.val_check_interval": 2, "trainer.strategy": strategy, "trainer.devices": 1}
    with patch.dict(os.environ, {name: "1"}):  # afterwards as before: Lightning leaves variables and a process group
        assert fit_with(tmp_path / "run", lock, **own) == 0
    if dist.is_initialized():
        dist.destroy_process_group()
    assert lock.seen
    assert scalars(tmp_path / "run")["train/loss"].keys() == {1, 2}
    assert "data: 2 steps read" in caplog.text
    assert capsys.readouterr().out.splitlines()[-1].startswith("done: step 2")


def test_a_variable_in_the_name_of_a_run_stays_in_it(fit_with, tmp_path, monkeypatch):
    monkeypatch.setenv("here", "there")
    run = tmp_path / "a$here~"
    assert fit_with(run, **{"trainer.max_steps": 2, "trainer.val_check_interval": 2}) == 0
    assert scalars(run)["train/loss"].keys() == {1, 2}
    assert not (tmp_path / "athere~").exists()


def hold(run: Path, held: Any, until: Any) -> None:
    with run_lock.held(run):
        held.set()
        until.wait(60)


@pytest.mark.parametrize("where", ["here", "another boot or container", "another host"])
def test_a_lock_of_a_machine_that_may_be_dead_is_waited_for(tmp_path, where, monkeypatch, caplog):
    """A pod keeps its hostname when its machine dies and it starts anew on another, or beside the old one."""
    fork = multiprocessing.get_context("fork")
    held, until = fork.Event(), fork.Event()
    (tmp_path / ".lock").write_text("of one that was killed\n" * 9)
    process = fork.Process(target=hold, args=(tmp_path, held, until))
    process.start()
    assert held.wait(30)
    if where == "another host":
        monkeypatch.setattr("salt_lightning.run.run_lock.socket.gethostname", lambda: "another")
    lines = (tmp_path / ".lock").read_text().split("\n")
    assert lines[1] == f"process {process.pid} on {socket.gethostname()}" or where == "another host"
    assert len(lines) == 2
    assert lines[0] == run_lock._machine() != ("" if sys.platform == "linux" else None)
    if where == "another boot or container":
        monkeypatch.setattr("salt_lightning.run.run_lock._machine", lambda: "0d5b")
    monkeypatch.setattr("salt_lightning.run.run_lock.time.sleep", lambda _: (until.set(), process.join()))
    waited = where.startswith("another")
    refused = pytest.raises(ConfigError, match=rf" {process.pid} on \S+ is using it; wait")
    with nullcontext() if waited else refused, run_lock.held(tmp_path):
        pass
    assert (f"waiting for {lines[1]}, at most 120 s" in caplog.text) == waited
    until.set()
    process.join()


def test_a_checkpoint_folder_of_several_runs_is_used_by_one_at_a_time(fit, tmp_path, capsys):
    """Each would replace and remove the checkpoints of the other, and both would end well."""
    fork = multiprocessing.get_context("fork")
    held, until = fork.Event(), fork.Event()
    shared = {"checkpoint.folder": str(tmp_path / "shared")}
    process = fork.Process(target=hold, args=(tmp_path / "shared", held, until))
    process.start()
    assert held.wait(30)
    assert fit(tmp_path / "run", **shared) == 2
    who = f"process {process.pid} on {socket.gethostname()}"
    said = f"--checkpoint.folder {tmp_path}/shared: {who} is using it; wait until it ends, or choose another folder"
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"error: {said}"
    assert [file.name for file in tmp_path.iterdir()] == ["shared"]
    until.set()
    process.join()
    assert fit(tmp_path / "run", **shared, stop_at=3) == 128 + signal.SIGTERM
    assert [file.name for file in (tmp_path / "shared").iterdir()] == ["step-00000003.ckpt"]
    capsys.readouterr()
    assert fit(tmp_path / "other", **shared) == 2
    said = f"error: --checkpoint.folder {tmp_path}/shared already contains a run; continue it with --ckpt_path last, or"
    assert said in capsys.readouterr().err
    begun = f"step-00000003.ckpt; it may be another run's: --run {tmp_path}/other has no config.yaml"
    assert fit(tmp_path / "other", ckpt_path="last", **shared, stop_at=4) == 128 + signal.SIGTERM
    assert begun in capsys.readouterr().err
    assert fit(tmp_path / "other", ckpt_path="last", **shared, stop_at=5) == 128 + signal.SIGTERM
    assert "another run" not in capsys.readouterr().err


def test_a_link_to_the_checkpoints_of_another_run_is_not_a_run_that_has_begun(fit, tmp_path, capsys):
    assert fit(tmp_path / "run", stop_at=3) == 128 + signal.SIGTERM
    own = tmp_path / "other/checkpoints"
    own.parent.mkdir()
    own.symlink_to(tmp_path / "run/checkpoints")
    capsys.readouterr()
    assert fit(tmp_path / "other") == 2
    assert f"error: --checkpoint.folder {own} already contains a run; continue it with" in capsys.readouterr().err
    assert fit(tmp_path / "other", ckpt_path="last", stop_at=4) == 128 + signal.SIGTERM
    assert f"it may be another run's: --run {tmp_path}/other has no config.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("linked", [False, True])
def test_the_checkpoints_of_a_run_are_not_used_by_another_fit(fit, tmp_path, capsys, linked):
    """A YAML may give the folder within one run to another, or links of both lead to one."""
    fork = multiprocessing.get_context("fork")
    held, until = fork.Event(), fork.Event()
    own = tmp_path / "run/checkpoints"
    if linked:
        own.parent.mkdir()
        own.symlink_to(tmp_path / "scratch")
    process = fork.Process(target=hold, args=(tmp_path / "scratch" if linked else own, held, until))
    process.start()
    assert held.wait(30)
    assert fit(tmp_path / "run") == 2
    said = f"error: --checkpoint.folder {own}: process {process.pid} on {socket.gethostname()} is using it; wait until"
    assert said in capsys.readouterr().err
    until.set()
    process.join()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks_is_said(tmp_path, number, monkeypatch, caplog):
    def lockf(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("salt_lightning.run.run_lock.fcntl.lockf", lockf)
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)), run_lock.held(tmp_path / "run"):
            pass
        return
    with pytest.raises(KeyboardInterrupt) as stopped, run_lock.held(tmp_path / "run"):
        raise KeyboardInterrupt
    assert stopped.value.__context__ is None  # there, the exit code looks for a Ctrl-C
    assert f"run: its file system has no locks ({os.strerror(number)}); do not start another fit" in caplog.text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_lock_of_another_user_is_no_missing_lock(tmp_path, number, monkeypatch, caplog):
    (tmp_path / ".lock").write_text("process 7 on here")

    def deny(path, *args, **how):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(run_lock, "open", deny, raising=False)
    refused = pytest.raises(
        ConfigError, match=rf"^--run {tmp_path}: \.lock belongs to another user, .* wait until it ends"
    )
    with nullcontext() if number == errno.EROFS else refused, run_lock.held(tmp_path):
        pass
    assert caplog.text == ""
    assert (tmp_path / ".lock").exists()


def test_a_run_is_not_started_twice_in_one_folder(fit, tmp_path, capsys):
    assert fit(tmp_path / "run", stop_at=3) == 128 + signal.SIGTERM
    assert fit(tmp_path / "run") == 2
    assert "already contains a run; continue it with --ckpt_path last" in capsys.readouterr().err


def test_last_without_a_checkpoint_starts_and_says_so(fit, tmp_path, capsys):
    assert fit(tmp_path / "new", ckpt_path="last", **{"trainer.max_steps": 8, "trainer.val_check_interval": 8}) == 0
    assert "starting at step 0" in capsys.readouterr().err


def test_a_run_whose_checkpoints_are_in_another_folder_is_not_started_again(fit, tmp_path, capsys):
    run, there = tmp_path / "run", tmp_path / "there"
    folder = {"checkpoint.folder": str(there)}
    assert fit(run, stop_at=3, **folder) == 128 + signal.SIGTERM
    capsys.readouterr()
    assert fit(run, ckpt_path="last") == 2
    said = (
        f"no checkpoint in {run}/checkpoints, but those of --run {run} are in {there}; set --checkpoint.folder {there}"
    )
    assert said in capsys.readouterr().err
    assert fit(run) == 2
    said = (
        f"--run {run} already contains a run; continue it with --ckpt_path last --checkpoint.folder {there}, or choose"
    )
    assert said in capsys.readouterr().err
    assert fit(run, stop_at=5, ckpt_path="last", **folder) == 128 + signal.SIGTERM  # as advised
    shutil.move(there, run / "checkpoints")
    capsys.readouterr()
    assert fit(run, ckpt_path="last", **folder) == 2
    assert f"but those of --run {run} are in {run}/checkpoints; set" in capsys.readouterr().err
    own = str(run / "checkpoints/step-00000003.ckpt")
    assert fit(run, ckpt_path=own, **folder) == 0
    assert "resuming from there" not in capsys.readouterr().err  # it is one of its own


def test_a_truncated_checkpoint_is_named(fit, tmp_path, capsys, caplog):
    assert fit(tmp_path / "run", stop_at=3) == 128 + signal.SIGTERM
    path = tmp_path / "run/checkpoints/step-00000003.ckpt"
    path.write_bytes(path.read_bytes()[:5000])
    assert fit(tmp_path / "run", ckpt_path="last") == 2  # no silent start at step 0
    assert any(said.startswith(f"{path} is skipped: cut off, damaged") for said in caplog.messages)
    assert "every checkpoint in" in capsys.readouterr().err
    assert fit(tmp_path / "run", ckpt_path=str(path)) == 2
    assert f"{path} is not a whole checkpoint" in capsys.readouterr().err


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_not_called_damaged(tmp_path, monkeypatch):
    """As by a run that trains on, whose newest checkpoint somebody else validates."""
    from salt_lightning.command import resume

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000002.ckpt").touch()

    def replaced(path: Path) -> str:
        path.rename(path.with_name("step-00000004.ckpt"))
        return "is gone"

    monkeypatch.setattr(resume, "_damage", replaced)
    with pytest.raises(ConfigError, match=r"^--ckpt_path last: the run that trains in .* has replaced its checkpoints"):
        resume.resolve("last", Namespace(run=str(tmp_path)), "validate")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, settings, capsys):
    import pickle

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(Evil()))
    torch.save({"state_dict": Evil()}, tmp_path / "evil2.ckpt")
    for name in ("evil.ckpt", "evil2.ckpt"):
        code = cli.main(["fit", *arguments(settings, {"run": str(tmp_path / "r"), "kd.weight": 0.0,
                                                       "ckpt_path": str(tmp_path / name)})])  # fmt: skip
        assert code == 2
        assert "is not a whole checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_another_tokenizer_is_refused_on_resume(fit, settings, tmp_path, capsys, caplog):
    """The text changed, so the tokenizer that is trained on it changed: same size, other ids."""
    text = tmp_path / "text.jsonl"
    shutil.copy(settings["data.source"], text)
    baseline = {"kd.weight": 0.0, "kd.steps": "null", "kd.anneal_steps": 0, "kd.shape": "step"}
    assert fit(tmp_path / "run", stop_at=3, **baseline, **{"data.source": str(text)}) == 128 + signal.SIGTERM
    with open(text, "a") as out:
        out.write('{"text": "' + "zebra quagga " * 400 + '"}\n')
    capsys.readouterr()
    caplog.clear()
    assert fit(tmp_path / "run", ckpt_path="last", **baseline, **{"data.source": str(text)}) == 2
    assert "trained with another tokenizer than --data.tokenizer gives" in capsys.readouterr().err
    evaluate = {k: v for k, v in settings.items() if not k.startswith(("checkpoint", "kd", "model"))}
    other = {"run": str(tmp_path / "run"), "ckpt_path": "last", "data.source": str(text)}
    assert cli.main(["validate", *arguments(evaluate, other)]) == 2
    assert "trained with another tokenizer than --data.tokenizer gives" in capsys.readouterr().err
    assert "tokenized" not in caplog.text  # which may take hours
    # what the message says helps: the run's own tokenizer; that the text is another is said
    own = {"data.source": str(text), "data.tokenizer": str(tmp_path / "run/tokenizer"), "ckpt_path": "last"}
    assert fit(tmp_path / "run", **baseline, **own) == 0
    # one Trainer may evaluate both: while it prepares the text, it still names the checkpoint of the call before
    assert fit(tmp_path / "other", **baseline, **{"data.source": str(text)}) == 0
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    for run in (tmp_path / "run", tmp_path / "other"):
        last = sorted((run / "checkpoints").glob("*.ckpt"))[-1]
        own = {"tokenizer": str(run / "tokenizer"), "cache_dir": str(run / "cache")}
        data = SALTDataModule(str(text), block_size=settings["data.block_size"], val_fraction=0.1, **own)
        trainer.validate(SALTModule.load_from_checkpoint(last), datamodule=data, ckpt_path=last, verbose=False)


def test_a_refused_resume_leaves_the_run_as_it_is(fit, tmp_path):
    """What was logged after its checkpoint too: a resume's mark in the log would void it."""
    assert fit(tmp_path / "run", stop_at=3) == 128 + signal.SIGTERM
    assert fit(tmp_path / "run", stop_at=6, ckpt_path="last") == 128 + signal.SIGTERM

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    before = files()
    old = {"ckpt_path": str(tmp_path / "run/checkpoints/step-00000003.ckpt"), "kd.steps": 10}
    assert fit(tmp_path / "run", **old) == 2
    assert files() == before


def test_a_shorter_run_than_the_checkpoint_is_refused(fit, tmp_path, capsys):
    assert fit(tmp_path / "run", stop_at=10) == 128 + signal.SIGTERM
    assert fit(tmp_path / "run", ckpt_path="last", **{"trainer.max_steps": 9}) == 2
    assert "--trainer.max_steps 9: the checkpoint is already at step 10" in capsys.readouterr().err


def test_a_run_that_ends_early_is_saved_and_says_so(fit, tmp_path, monkeypatch, caplog):
    """Whoever sets should_stop: a time limit, another callback."""
    monkeypatch.setattr(StopAt, "on_before_backward", stop_softly)
    assert fit(tmp_path / "run", stop_at=5) == 0
    assert (tmp_path / "run/checkpoints/step-00000005.ckpt").exists()
    said = "step 5 of 12: the run has ended early, by a limit of time or data or by a callback; it is saved"
    assert said in caplog.text
    caplog.clear()
    monkeypatch.undo()
    assert fit(tmp_path / "run", ckpt_path="last") == 0
    assert "has ended early" not in caplog.text


def test_a_least_number_of_steps_holds_no_run_that_is_told_to_stop(fit, tmp_path):
    """With min_steps Lightning requires a whole epoch, which is the whole run."""
    assert fit(tmp_path / "run", stop_at=3, **{"trainer.min_steps": 9}) == 128 + signal.SIGTERM
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000003.ckpt"]


def test_a_least_number_of_steps_lets_a_run_end_after_it(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(StopAt, "on_before_backward", stop_softly)
    assert fit(tmp_path / "run", stop_at=3, **{"trainer.min_steps": 9}) == 0
    assert (tmp_path / "run/checkpoints/step-00000009.ckpt").exists()


def test_a_run_without_time_left_is_refused(fit, tmp_path, capsys):
    """Lightning's timer goes on from the checkpoint's: the run would end at once, without a word."""
    long = {"trainer.max_steps": 4000, "trainer.val_check_interval": 4000, "trainer.max_time": "00:00:00:01"}
    assert fit(tmp_path / "run", **long) == 0
    capsys.readouterr()
    assert fit(tmp_path / "run", ckpt_path="last", **long) == 2
    assert "--trainer.max_time 0:00:01 counts over all starts of a run, and this run has" in capsys.readouterr().err
    step = max(int(path.stem.removeprefix("step-")) for path in (tmp_path / "run/checkpoints").glob("*.ckpt"))
    more = {**long, "trainer.max_time": "00:01:00:00", "ckpt_path": "last"}
    assert fit(tmp_path / "run", stop_at=step + 2, **more) == 128 + signal.SIGTERM
    # Lightning would warn of the timer's state, which only another limit needs
    assert fit(tmp_path / "run", stop_at=step + 4, **{**more, "trainer.max_time": None}) == 128 + signal.SIGTERM


def stop_softly(self, trainer, pl_module, loss):
    trainer.should_stop = trainer.global_step + 1 >= self.step


def test_without_a_logger_a_run_still_lives_in_its_folder(fit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quiet = {"trainer.logger": False}
    assert fit(tmp_path / "run", stop_at=3, **quiet) == 128 + signal.SIGTERM
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoints", "config.yaml", "tokenizer"]
    assert fit(tmp_path / "run", ckpt_path="last", **quiet) == 0


def test_other_loggers_write_beside_the_run_s_own(settings, tmp_path):
    """As CSV: the settings once, the same curves, and a kill loses nothing from before the last save."""

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 6 and (file := tmp_path / "csv" / "metrics.csv").exists():
                self.rows = list(csv.DictReader(file.read_text().splitlines()))

    look, run = Look(), tmp_path / "run"
    to_csv = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": None, "version": "csv"}}
    own = {"run": str(run), "kd.weight": 0.0, "trainer.logger": [to_csv], "checkpoint.every_n_steps": 6,
           "model.optim.lr": 0.0025}  # fmt: skip
    assert ranks.run(["fit", *arguments(settings, own)], look) == 0
    assert max(int(row["step"]) for row in look.rows) == 6
    rows = list(csv.DictReader((tmp_path / "csv" / "metrics.csv").read_text().splitlines()))
    logged = scalars(run)
    for tag in ("train/ce", "train/loss", "val/ce"):
        assert {int(row["step"]): float(row[tag]) for row in rows if row[tag]} == pytest.approx(logged[tag])
    told = yaml.safe_load((tmp_path / "csv" / "hparams.yaml").read_text())
    assert (told["model.optim.lr"], told["kd.weight"], told["model.seed"]) == (0.0025, 0.0, 0)
    assert told["model.student.config.hidden_size"] == 32
    assert told["data.source"] == settings["data.source"]
    page = b"".join(path.read_bytes() for path in run.glob("*tfevents*"))
    assert b"_hparams_/session_start_info" in page
    assert b"model.optim.lr" in page


def test_a_board_of_one_s_own_takes_the_place_of_the_run_s(fit, settings, tmp_path):
    """It treats values logged by a killed start the same way."""
    place = {"save_dir": str(tmp_path), "name": "board", "version": ""}
    own = {"trainer.logger": [{"class_path": "TensorBoardLogger", "init_args": place}]}
    assert fit(tmp_path / "run", stop_at=6, **own) == 128 + signal.SIGTERM
    assert fit(tmp_path / "run", ckpt_path="last", **own) == 0
    assert not list((tmp_path / "run").glob("*tfevents*"))
    files = sorted((tmp_path / "board").glob("*tfevents*"), key=lambda path: path.stat().st_mtime)
    starts = [[e.step for e in EventFileLoader(str(file)).Load() if e.HasField("session_log")] for file in files]
    assert starts == [[1], [7]]
    looked_at = {"ckpt_path": str(tmp_path / "run/checkpoints/step-00000006.ckpt"), "run": str(tmp_path / "run"), **own}
    plain = {key: value for key, value in settings.items() if key.startswith(("data.", "trainer."))}
    assert cli.main(["validate", *arguments(plain, looked_at)]) == 0
    page = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [event.step for event in page.Scalars("train/ce")] == [*range(1, 13)]  # an evaluation removes nothing


def test_a_tracker_that_refuses_the_settings_ends_no_run():
    class Refusing(CSVLogger):
        def log_hyperparams(self, params):
            raise KeyError("changed")

    with pytest.warns(UserWarning, match="Refusing did not accept the settings: 'changed'"):
        log_settings([Refusing("unused")], {"model.optim.lr": 0.1})


def test_killed_runs_leave_no_loader_workers(settings, tmp_path):
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "data.num_workers": 2, "trainer.max_steps": 100_000,
           "trainer.val_check_interval": 100_000, "checkpoint.every_n_steps": 5, "checkpoint.keep": 2}  # fmt: skip
    process = forked.Popen(
        [sys.executable, "-c", "import sys; from salt_lightning.cli import main; sys.exit(main())", "fit",
         *arguments(settings, own)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run/checkpoints").glob("*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 3  # torch's own look at the parent comes every 5 s, if at all
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in workers if alive(pid)] == []


def test_death_in_a_validation_loses_no_validation(settings, teacher, tmp_path):
    """A checkpoint says that the validation of its step is done: so there is none before it is."""

    class Die(Callback):
        def on_validation_start(self, trainer, pl_module):
            raise RuntimeError("died")

    own = {"model.teacher.path": teacher, **RAMP, "checkpoint.every_n_steps": 3}
    assert cli.main(["fit", *arguments(settings, own, {"run": str(tmp_path / "whole")})]) == 0
    args = arguments(settings, own, {"run": str(tmp_path / "broken")})
    with pytest.raises(RuntimeError, match="died"):
        ranks.run(["fit", *args], Die())
    assert [p.name for p in (tmp_path / "broken/checkpoints").iterdir()] == ["step-00000003.ckpt"]
    assert cli.main(["fit", *args, "--ckpt_path=last"]) == 0
    assert_same(tmp_path / "broken", tmp_path / "whole")


DIE_AFTER_SAVE = """
import os, sys
from pathlib import Path
from lightning.pytorch.callbacks import Callback
from salt_lightning import cli

class Die(Callback):
    def on_train_batch_end(self, trainer, *args):  # after RunCheckpoint's
        if Path(trainer.default_root_dir, "checkpoints/step-00000003.ckpt").exists():
            os._exit(9)

original = cli.SALTCLI.instantiate_trainer

def with_death(self, **kwargs):
    trainer = original(self, **kwargs)
    trainer.callbacks.append(Die())
    return trainer

cli.SALTCLI.instantiate_trainer = with_death
sys.exit(cli.main())
"""


def test_what_was_logged_before_a_save_survives_a_kill_right_after_it(settings, tmp_path):
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "checkpoint.every_n_steps": 3}
    done = forked.run([sys.executable, "-c", DIE_AFTER_SAVE, "fit", *arguments(settings, own)])
    assert done.returncode == 9
    assert sorted(scalars(tmp_path / "run")["train/loss"]) == [1, 2, 3]


@pytest.mark.parametrize(
    ("every", "kept", "advice"),
    [
        (3, [3], "{run}/checkpoints/step-00000003.ckpt is good: resume from it (--ckpt_path last), with a lower"),
        (
            2,
            [2, 4],
            "{run}/checkpoints/step-00000002.ckpt is good: resume from it (--ckpt_path {run}/checkpoints/step-00000",
        ),
        (
            4,
            [4],
            "No checkpoint in {run}/checkpoints is from before that step: start again in another --run, with a lower",
        ),
    ],
)
def test_a_bad_state_is_never_saved(settings, tmp_path, monkeypatch, capsys, every, kept, advice):
    """Nothing is logged, so nothing is read, between the step that goes wrong and the save. The weights of step 4 give
    step 5 its loss, so they are no place to resume from."""

    class Break(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 4:
                pl_module.student.head.weight.data.fill_(float("nan"))

    original = cli.SALTCLI.instantiate_trainer

    def breaking(self, **kwargs):
        trainer = original(self, **kwargs)
        trainer.callbacks.insert(0, Break())
        return trainer

    monkeypatch.setattr(cli.SALTCLI, "instantiate_trainer", breaking)
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "checkpoint.every_n_steps": every, "trainer.max_steps": 100,
           "trainer.log_every_n_steps": 50, "trainer.val_check_interval": 50}  # fmt: skip
    assert cli.main(["fit", *arguments(settings, own)]) == 1
    error = capsys.readouterr().err
    assert "train/loss is not finite at step 5, which read rows " in error
    assert advice.format(run=tmp_path / "run") in error
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == [f"step-{k:08d}.ckpt" for k in kept]


def test_the_tensorboard_page_shows_each_step_once(settings, tmp_path):
    """Steps 4 and 5 were logged after the checkpoint of step 3, by a start that died: the later values count."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Die(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 5:
                raise RuntimeError("died")

    args = [
        "fit",
        *arguments(settings, {"run": str(tmp_path / "run"), "kd.weight": 0.0, "checkpoint.every_n_steps": 3}),
    ]
    with pytest.raises(RuntimeError, match="died"):
        ranks.run(args, Die())
    time.sleep(1.1)  # event files are named by the second
    assert cli.main([*args, "--ckpt_path=last", "--model.optim.lr=1e-4"]) == 0
    page = EventAccumulator(str(tmp_path / "run"))
    page.Reload()
    assert [event.step for event in page.Scalars("train/lr")] == list(range(1, 13))
    assert all(event.value <= 1e-4 for event in page.Scalars("train/lr") if event.step > 3)


def test_a_stop_before_a_validation_is_saved_before_it(fit_with, tmp_path, caplog):
    class Look(Callback):
        saved = None

        def on_validation_start(self, trainer, pl_module):
            if trainer.global_step == 6 and self.saved is None:
                self.saved = (tmp_path / "run" / "checkpoints" / "step-00000006.ckpt").exists()
                os.kill(os.getpid(), signal.SIGTERM)

    look = Look()
    assert fit_with(tmp_path / "run", look, StopAt(6), **{"trainer.val_check_interval": 3}) == 128 + signal.SIGTERM
    assert look.saved
    caplog.clear()
    look = Look()
    assert fit_with(tmp_path / "again", look, **{"trainer.val_check_interval": 3}) == 128 + signal.SIGTERM
    assert "SIGTERM: saving after this validation and this step" in caplog.text


@pytest.mark.parametrize("own", [{"trainer.max_steps": 6}, {"kd.stop_margin": 9.0, "kd.min_steps": 6, "kd.steps": 12}])
def test_a_validation_that_ends_the_run_or_kd_comes_before_the_save_of_a_stop(fit, tmp_path, monkeypatch, own):
    saved = []
    monkeypatch.setattr(
        Probe, "read", lambda *_: saved.append((tmp_path / "run/checkpoints/step-00000006.ckpt").exists()) or {}
    )
    more = {"kd.steps": 6, "kd.anneal_steps": 0, "kd.shape": "step", "trainer.val_check_interval": 6, **own}
    fit(tmp_path / "run", stop_at=6, **more)
    assert saved == [False]


def test_last_is_not_an_older_checkpoint_than_that_of_another_folder(fit, tmp_path, capsys):
    """The run went on in another folder, from one of its own checkpoints, which are still there."""
    run, there = tmp_path / "run", tmp_path / "there"
    assert fit(run, stop_at=3) == 128 + signal.SIGTERM
    old, folder = str(run / "checkpoints/step-00000003.ckpt"), {"checkpoint.folder": str(there)}
    assert fit(run, stop_at=5, ckpt_path=old, **folder) == 128 + signal.SIGTERM
    capsys.readouterr()
    assert fit(run) == 2
    assert f"continue it with --ckpt_path last --checkpoint.folder {there}, or" in capsys.readouterr().err
    assert fit(run, ckpt_path="last") == 2
    said = f"last: {old} is not the newest of --run {run}, which are in {there}; set --checkpoint.folder {there}, or "
    assert said in capsys.readouterr().err
    assert fit(run, stop_at=4, ckpt_path=old) == 128 + signal.SIGTERM  # as advised: it goes on from there
    assert fit(run, stop_at=6, ckpt_path="last") == 128 + signal.SIGTERM
    newest = {"ckpt_path": str(there / "step-00000005.ckpt"), "checkpoint.folder": str(tmp_path / "back")}
    assert fit(run, stop_at=6, **newest) == 128 + signal.SIGTERM
    shutil.move(tmp_path / "back/step-00000006.ckpt", run / "checkpoints/step-00000009.ckpt")  # of another branch
    assert fit(run, stop_at=6, **newest) == 128 + signal.SIGTERM
    assert fit(run, stop_at=7, **{**newest, "ckpt_path": "last"}) == 128 + signal.SIGTERM


def test_last_of_a_copied_run_does_not_go_on_in_the_folder_of_the_first(fit, tmp_path):
    """Its config.yaml names that, with newer checkpoints by now."""
    first, copied = tmp_path / "first", tmp_path / "copied"
    own = {"checkpoint.folder": str(first / "checkpoints")}
    assert fit(first, stop_at=3, **own) == 128 + signal.SIGTERM
    shutil.copytree(first, copied)
    assert fit(first, stop_at=5, ckpt_path="last", **own) == 128 + signal.SIGTERM
    assert fit(copied, stop_at=4, ckpt_path="last") == 128 + signal.SIGTERM
    assert (copied / "checkpoints/step-00000004.ckpt").exists()


@pytest.mark.parametrize("ckpt_path", ["last", None])
def test_a_copy_without_checkpoints_is_not_sent_to_those_of_the_first_run(fit, tmp_path, capsys, ckpt_path):
    """Trained there, the first run's would be replaced."""
    first, copied, place = tmp_path / "first", tmp_path / "copied", tmp_path / "place"
    assert fit(first, stop_at=3, **{"checkpoint.folder": str(place)}) == 128 + signal.SIGTERM
    shutil.copytree(first, copied)
    given = {"ckpt_path": ckpt_path} if ckpt_path else {}
    assert fit(first, **given) == 2
    assert f"--checkpoint.folder {place}" in capsys.readouterr().err
    assert fit(copied, stop_at=4, **given) == 128 + signal.SIGTERM
    assert str(place) not in capsys.readouterr().err
    assert (copied / "checkpoints/step-00000004.ckpt").exists()


@pytest.mark.parametrize("resumed", [False, True])
def test_a_config_beside_weights_is_said_not_to_be_used(fit, teacher, tmp_path, capsys, resumed):
    """Also a dropout, at which training could go on."""
    start = {"model.student.path": teacher, "model.student.config": {}}
    unused = {"model.student.config": {"attention_dropout": 0.3}, "model.student.family": "gpt2"}
    said, family = (
        "--model.student.config is not used: the sizes ",
        "--model.student.family is not used: the model type",
    )
    assert fit(tmp_path / "run", stop_at=3, **{**start, **({} if resumed else unused)}) == 128 + signal.SIGTERM
    printed = capsys.readouterr().err
    assert (said in printed) == (family in printed) != resumed
    assert fit(tmp_path / "run", stop_at=5, ckpt_path="last", **{**start, **unused}) == 128 + signal.SIGTERM
    assert said in capsys.readouterr().err
    assert fit(tmp_path / "run", stop_at=6, ckpt_path="last", **start) == 128 + signal.SIGTERM
    assert said not in capsys.readouterr().err


def test_a_dropout_given_for_the_first_time_is_said_and_recorded(fit, tmp_path, caplog):
    """The config of a family need not name it, so that a start that gives it has a setting more than the one before."""
    assert fit(tmp_path / "run", stop_at=3) == 128 + signal.SIGTERM
    given = {"model.student.config.attention_dropout": 0.1}
    assert fit(tmp_path / "run", stop_at=5, ckpt_path="last", **given) == 128 + signal.SIGTERM
    said = "continuing with --model.student.config.attention_dropout 0.1 (checkpoint: 0.0): the steps that follow are"
    assert said in caplog.text
    (change,) = read_run(tmp_path / "run", "run").changes.items()
    assert change == (3, {"model.student.config.attention_dropout": (0.0, 0.1)})
    caplog.clear()
    assert fit(tmp_path / "run", ckpt_path="last", **given) == 0
    assert "computed differently" not in caplog.text
    assert len(earlier_configs(tmp_path / "run")) == 1


def test_other_data_than_the_checkpoints_is_said(fit, tmp_path, caplog):
    assert fit(tmp_path / "run", stop_at=3) == 128 + signal.SIGTERM
    assert fit(tmp_path / "run", stop_at=5, ckpt_path="last") == 128 + signal.SIGTERM
    assert "other data than the checkpoint's" not in caplog.text
    assert fit(tmp_path / "run", ckpt_path="last", **{"data.seed": 5}) == 0
    assert "continuing with other data than the checkpoint's: --data.seed 5 (checkpoint: 0)" in caplog.text
    assert "data: with another --data.seed the rows are in another order, so they may be read again" in caplog.text
    assert "held-out" not in caplog.text


def test_other_settings_of_steps_than_the_checkpoints_are_said(fit, teacher, tmp_path, caplog):
    assert fit(tmp_path / "run", stop_at=3) == 128 + signal.SIGTERM
    assert fit(tmp_path / "run", stop_at=5, ckpt_path="last", **{"trainer.precision": "32"}) == 128 + signal.SIGTERM
    assert "computed differently" not in caplog.text
    own = {"trainer.gradient_clip_val": 0.5, "trainer.precision": "bf16-mixed"}
    assert fit(tmp_path / "run", stop_at=7, ckpt_path="last", **own) == 128 + signal.SIGTERM
    said = "--trainer.precision bf16-mixed (checkpoint: 32-true), --trainer.gradient_clip_val 0.5 (checkpoint: 1.0)"
    assert f"continuing with {said}: the steps that follow are computed differently" in caplog.text
    shutil.copytree(Path(teacher).parents[1], tmp_path / "other")
    own |= {"model.optim.beta2": 0.5, "model.teacher.path": str(tmp_path / "other/checkpoints" / Path(teacher).name)}
    own |= {"model.teacher_temperature": 2.0, "kd.steps": 10, "kd.allow_change": True}
    assert fit(tmp_path / "run", stop_at=9, ckpt_path="last", **own) == 128 + signal.SIGTERM
    said = "--model.optim.beta2 0.5 (checkpoint: 0.95), --model.teacher_temperature 2.0 (checkpoint: 1.0): the steps"
    assert f"continuing with {said} that follow are computed" in caplog.text  # a copy of the teacher changes no step
    caplog.clear()
    first, other = (tmp_path / f"{name}/checkpoints/{Path(teacher).name}" for name in ("other", "run"))
    shutil.copy(max(other.parent.glob("*.ckpt")), first)  # other weights in its place
    assert fit(tmp_path / "run", stop_at=10, ckpt_path="last", **own) == 128 + signal.SIGTERM
    said = f"--model.teacher.weights {sample_hash(first)} (checkpoint: {sample_hash(Path(teacher))}): the steps that"
    assert f"continuing with {said}" in caplog.text
    caplog.clear()
    own |= {"model.teacher_temperature": 4.0, "kd.steps": 9}
    assert fit(tmp_path / "run", ckpt_path="last", **own) == 0
    assert "computed differently" not in caplog.text  # there is no teacher any more
    newest = read_checkpoint(str(max(other.parent.glob("*.ckpt"))), "x")
    assert newest["trainer"]["--model.teacher.weights"] == sample_hash(first)  # the card names it


def test_sources_with_weights_resume_to_the_bit_and_other_weights_are_said(fit, teacher, tmp_path, corpus, caplog):
    second = write_corpus(tmp_path / "second.jsonl", 60, seed=5)
    own = {"data.source": [str(corpus), str(second)], "data.source_weights": [1, 2]}
    own["data.tokenizer"] = str(Path(teacher).parents[1] / "tokenizer")
    assert fit(tmp_path / "whole", **own) == 0
    assert fit(tmp_path / "run", stop_at=5, **own) == 128 + signal.SIGTERM
    assert fit(tmp_path / "run", ckpt_path="last", **own) == 0
    assert "other data than the checkpoint's" not in caplog.text
    assert_same(tmp_path / "whole", tmp_path / "run")
    assert fit(tmp_path / "other", stop_at=5, **own) == 128 + signal.SIGTERM
    assert (
        fit(tmp_path / "other", ckpt_path="last", **{**own, "data.source_weights": [0.25, 0.5]}, stop_at=7)
        == 128 + signal.SIGTERM
    )
    assert "other data than the checkpoint's" not in caplog.text  # the same shares
    assert fit(tmp_path / "other", ckpt_path="last", **{**own, "data.source_weights": [2, 2]}) == 0
    said = (
        "continuing with other data than the checkpoint's: --data.source_weights [2.0, 2.0] (checkpoint: [0.25, 0.5])\n"
    )
    assert said in caplog.text


def test_the_log_tells_what_was_read_before_sources_had_weights(fit, teacher, tmp_path, corpus, caplog):
    """One of them is new: nothing of it was read before."""
    second = write_corpus(tmp_path / "second.jsonl", 60, seed=5)
    own = {"data.source": [str(corpus)], "data.tokenizer": str(Path(teacher).parents[1] / "tokenizer")}
    assert fit(tmp_path / "run", stop_at=5, **own) == 128 + signal.SIGTERM
    own |= {"data.source": [str(corpus), str(second)], "data.source_weights": [1, 3]}
    assert fit(tmp_path / "run", ckpt_path="last", **own) == 0
    past = "data: 12 steps read 96 rows, 40 of them while sources had no weights; of the others "
    web, code = re.search(past + r"\w+ ([\d.]+)% \(.* epochs of \d+ rows\), \w+ ([\d.]+)% ", caplog.text).groups()
    assert float(web) + float(code) == pytest.approx(100, abs=0.11)
    assert float(web) == pytest.approx(25, abs=100 * 2 / 56)  # two rows off by the weights


def test_other_held_out_text_than_the_checkpoints_is_said(fit, tmp_path, caplog):
    assert fit(tmp_path / "run", stop_at=3) == 128 + signal.SIGTERM
    assert fit(tmp_path / "run", stop_at=5, ckpt_path="last", **{"data.val_rows": 2}) == 128 + signal.SIGTERM
    assert "continuing with other data than the checkpoint's: other held-out text or rows" in caplog.text


def test_documents_that_see_each_other_from_here_on_are_said(fit, tmp_path, caplog):
    assert fit(tmp_path / "run", stop_at=3) == 128 + signal.SIGTERM
    assert fit(tmp_path / "run", ckpt_path="last", **{"data.isolate_documents": False}) == 0
    assert "--data.isolate_documents false (checkpoint: true)" in caplog.text


def test_a_config_of_another_run_gives_its_settings_and_no_seed(fit, tmp_path, capsys):
    """Nor its checkpoint, without a word: a start that went on has written the one that it went on from."""
    assert fit(tmp_path / "s0", stop_at=3) == 128 + signal.SIGTERM
    assert fit(tmp_path / "s0", ckpt_path="last") == 0
    assert "resuming from there" not in capsys.readouterr().err
    config = yaml.safe_load((tmp_path / "s0" / "config.yaml").read_text())
    assert (config["seed_everything"], config["model"]["seed"], config["data"]["seed"]) == (0, None, None)
    copy = ["fit", "--config", str(tmp_path / "s0" / "config.yaml"), "--seed_everything", "1"]
    assert cli.main([*copy, "--run", str(tmp_path / "on"), "--trainer.max_steps", "13"]) == 0
    named = f"--ckpt_path {config['ckpt_path']}: resuming from there, not from a checkpoint of --run {tmp_path / 'on'}"
    assert named in capsys.readouterr().err
    assert cli.main([*copy, "--run", str(tmp_path / "s1"), "--ckpt_path", "null"]) == 0
    assert fit(tmp_path / "other", seed_everything=1) == 0
    assert_same(tmp_path / "s1", tmp_path / "other")


def test_a_teacher_in_a_folder_that_computes_otherwise_is_said(fit, teacher, tmp_path, caplog, capsys):
    """Its weights stay the same. Where the folder lies, and that its code is trusted again, changes nothing."""
    folder, moved = tmp_path / "hf", tmp_path / "moved"
    assert cli.main(["export", teacher, str(folder)]) == 0
    own = {"model.teacher.path": str(folder), "model.teacher.trust_remote_code": True}
    assert fit(tmp_path / "run", stop_at=2, **own) == 128 + signal.SIGTERM
    folder.rename(moved)
    own["model.teacher.path"] = str(moved)
    assert fit(tmp_path / "run", stop_at=4, ckpt_path="last", **own) == 128 + signal.SIGTERM
    assert "computed differently" not in caplog.text
    assert "trust_remote_code" not in capsys.readouterr().err
    config, before = json.loads((moved / "config.json").read_text()), config_hash(moved)
    (moved / "config.json").write_text(json.dumps(config | {"transformers_version": "6", "use_cache": False}))
    assert config_hash(moved) == before
    (moved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    assert fit(tmp_path / "run", stop_at=6, ckpt_path="last", **own) == 128 + signal.SIGTERM
    changed = f"config.json or code of --model.teacher.path {config_hash(moved)} (checkpoint: {before}): the steps that"
    assert f"continuing with {changed}" in caplog.text


def test_other_training_text_of_as_many_tokens_is_said(fit, corpus, teacher, tmp_path, caplog):
    text = tmp_path / "text.jsonl"
    text.write_bytes(corpus.read_bytes())
    own = {"data.source": str(text), "data.val_source": str(corpus)}
    own["data.tokenizer"] = str(Path(teacher).parents[1] / "tokenizer")
    assert fit(tmp_path / "run", stop_at=3, **own) == 128 + signal.SIGTERM
    text.write_text("".join(f"{line}\n" for line in reversed(text.read_text().splitlines())))
    assert fit(tmp_path / "run", stop_at=5, ckpt_path="last", **own) == 128 + signal.SIGTERM
    assert "continuing with other data than the checkpoint's: other training text (--data.source)\n" in caplog.text
    again = "data: step 4 begins with the first row of this text; what other text had, too, may be read again\n"
    assert again in caplog.text
    assert "data: 9 of 12 steps read 72 rows of " in caplog.text
    caplog.clear()
    assert fit(tmp_path / "run", stop_at=7, ckpt_path="last", **own) == 128 + signal.SIGTERM
    assert "data: step 6 continues with row 17 of the order\n" in caplog.text
    assert "data: 9 of 12 steps read 72 rows of " in caplog.text


@pytest.mark.parametrize("stop_at", [5, None])
def test_other_text_is_read_from_its_first_row_on(fit_with, corpus, teacher, tmp_path, stop_at):
    """As by a run that begins with it, also after a stop."""
    read = defaultdict(list)

    class Read(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            read[trainer.default_root_dir, trainer.global_step] += [row.tobytes() for row in batch["input_ids"].numpy()]

    text, (whole, changed) = tmp_path / "text.jsonl", (tmp_path / "whole", tmp_path / "changed")
    text.write_text("".join(f"{line}\n" for line in reversed(corpus.read_text().splitlines())))
    own = {"data.val_source": str(corpus), "data.tokenizer": str(Path(teacher).parents[1] / "tokenizer")}
    assert fit_with(whole, Read(), **own, **{"data.source": str(text)}) == 0
    assert fit_with(changed, StopAt(3), **own) == 128 + signal.SIGTERM
    own |= {"data.source": str(text), "ckpt_path": "last"}
    if stop_at:
        assert fit_with(changed, StopAt(stop_at), Read(), **own) == 128 + signal.SIGTERM
    assert fit_with(changed, Read(), **own) == 0
    assert [read[str(changed), step] for step in range(3, 12)] == [read[str(whole), step] for step in range(9)]


@pytest.mark.parametrize(("ended", "told"), [(None, True), (8, True), (4, False)])
def test_a_teacher_that_a_validation_has_sent_away_is_not_compared(ended, told):
    trainer = pl.Trainer(callbacks=[KDScheduleCallback(0.5, 10, stop_margin=0.1)], accelerator="cpu", logger=False)
    now = {"optim": {}, "teacher": {"path": "a"}, "teacher_temperature": 2.0}
    before = {
        "global_step": 6,
        "kd_stop_step": ended,
        "trainer": {},
        "hyper_parameters": {**now, "teacher_temperature": 1.0},
    }
    said = alike.other_steps(before, trainer, now)
    assert bool(said) == told


def test_what_held_before_a_change_of_settings_stays_beside_the_run(fit_with, tmp_path):
    """compare and the model card report it. A start that changes nothing leaves nothing."""
    run, on = tmp_path / "run", {"ckpt_path": "last", "checkpoint.keep": None, "checkpoint.every_n_steps": 3}
    assert fit_with(run, **on, **{"trainer.max_steps": 6}) == 0
    assert fit_with(run, StopAt(9), **on, **{"trainer.max_steps": 12, "model.optim.lr": 5e-4}) == 128 + signal.SIGTERM
    assert fit_with(run, **on, **{"trainer.max_steps": 12}) == 0
    changes = read_run(run, "run").changes
    assert list(changes) == [6, 9]
    assert changes[6] == {"model.optim.lr": (3e-3, 5e-4), "trainer.max_steps": (6, 12)}
    assert list(changes[9]) == ["model.optim.lr"]
    back = {**on, "ckpt_path": str(run / "checkpoints/step-00000003.ckpt"), "model.optim.lr": 2e-4}
    assert fit_with(run, **back, **{"trainer.max_steps": 6}) == 0
    assert read_run(run, "run").changes == {3: {"model.optim.lr": (3e-3, 2e-4)}}  # later values are dropped
    assert fit_with(run, **{**back, "model.optim.lr": 1e-4}, **{"trainer.max_steps": 6}) == 0
    assert read_run(run, "run").changes == {3: {"model.optim.lr": (3e-3, 1e-4)}}
    (run / "config.yaml").write_text("a: [")
    assert fit_with(run, **on, **{"trainer.max_steps": 7}) == 0
    assert list(read_run(run, "run").changes) == [3]


def test_a_branch_that_is_requeued_still_comes_from_its_trunk(fit_with, tmp_path):
    trunk, branch = tmp_path / "trunk", tmp_path / "branch"
    assert fit_with(trunk, **{"checkpoint.at_steps": [2, 6]}) == 0
    start = str(trunk / "checkpoints/step-00000006.ckpt")
    own = {"model.optim.lr": 1e-3, "checkpoint.keep": 1}
    assert fit_with(branch, StopAt(7), **own, ckpt_path=start) == 128 + signal.SIGTERM
    assert fit_with(branch, StopAt(8), **own, ckpt_path=start) == 128 + signal.SIGTERM  # its own checkpoint is not used
    assert fit_with(branch, StopAt(9), **own, ckpt_path="last") == 128 + signal.SIGTERM
    assert fit_with(branch, **own, ckpt_path="last") == 0
    assert [step for step, _ in read_run(branch, "b").earlier] == [8]
    run = lineage.whole(read_run(branch, "b"))
    assert (run.began, run.changes) == (0, {6: {"model.optim.lr": (3e-3, 1e-3)}})
    assert list(run.val_ce.steps) == [6, 12]
    # checkpoints that the trunk keeps for good are not the branch's
    assert read_checkpoint(str(branch / "checkpoints/step-00000012.ckpt"), "test")["kept_steps"] == [12]


def test_settings_are_kept_when_a_run_changes_after_it_was_resumed(fit, tmp_path, monkeypatch):
    """config.yaml names the checkpoint that `last` has found, which is the run's own, also where it was moved."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    assert fit(run, stop_at=7, **{"checkpoint.every_n_steps": 3}) == 128 + signal.SIGTERM
    assert fit(run, stop_at=9, ckpt_path="last", **{"checkpoint.every_n_steps": 3}) == 128 + signal.SIGTERM
    run.rename(moved)
    assert fit(moved, ckpt_path=str(moved / "checkpoints/step-00000003.ckpt"), **{"model.optim.lr": 1e-5}) == 0
    assert [step for step, _ in earlier_configs(moved)] == [3]
    monkeypatch.chdir(tmp_path)
    branch = tmp_path / "scratch/moved"
    start = Path("moved/checkpoints/step-00000003.ckpt")  # ends like the branch's own folder
    assert fit(branch, stop_at=7, ckpt_path=str(start), **{"model.optim.lr": 1e-5}) == 128 + signal.SIGTERM
    assert fit(branch, stop_at=8, ckpt_path="last", **{"model.optim.lr": 1e-5}) == 128 + signal.SIGTERM
    assert [step for step, _ in earlier_configs(branch)] == [7]
    assert read_run(moved, "moved").changes[3] == {"model.optim.lr": (3e-3, 1e-5)}


def test_a_test_of_weights_that_a_later_start_has_replaced_is_void(fit, fit_with, tmp_path):
    run = tmp_path / "run"
    assert fit(run, **{"checkpoint.at_steps": [6, 9]}) == 0
    for step in (9, 12, 6):
        at = {"ckpt_path": str(run / f"checkpoints/step-{step:08d}.ckpt"), "data.tokenizer": str(run / "tokenizer")}
        assert fit_with(run, verb="test", **at) == 0
    assert list(read_run(run, "run").curves["test/ce"].steps) == [6, 9, 12]
    assert fit(run, ckpt_path=str(run / "checkpoints/step-00000009.ckpt"), **{"model.optim.lr": 1e-4}) == 0
    assert list(read_run(run, "run").curves["test/ce"].steps) == [6, 9]
    page = EventAccumulator(str(run / "test")).Reload()
    assert sorted({event.step for event in page.Scalars("test/ce")}) == [6, 9]
    assert fit_with(run, verb="test", ckpt_path="last", **{"data.tokenizer": str(run / "tokenizer")}) == 0
    assert list(read_run(run, "run").curves["test/ce"].steps) == [6, 9, 12]
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with patch.object(event_log, "SummaryWriter", side_effect=full), pytest.warns(UserWarning, match="5 are void"):
        event_log.void_tests(run / "test", 5)


def test_a_run_is_not_continued_from_another_runs_checkpoint(fit, tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    assert fit(run, stop_at=4) == fit(other, stop_at=4, **{"seed_everything": 1}) == 128 + signal.SIGTERM
    (there,) = (other / "checkpoints").glob("*.ckpt")
    before = (run / "config.yaml").read_bytes()
    assert fit(run, ckpt_path=str(there)) == 2
    said = f"error: --ckpt_path {there} is of another run than --run {run}, which contains one already; choose another"
    assert said in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before
    (tmp_path / "link").symlink_to(other)
    assert fit(other, stop_at=6, ckpt_path=str(tmp_path / "link/checkpoints" / there.name), seed_everything=1) == 143
    shutil.copytree(other, tmp_path / "backup/other")
    backup = tmp_path / "backup/other/checkpoints/step-00000006.ckpt"
    assert fit(other, stop_at=8, ckpt_path=str(backup), seed_everything=1) == 143
    copied = shutil.copytree(there, tmp_path / there.name) if there.is_dir() else shutil.copy(there, tmp_path)
    assert fit(other, ckpt_path=str(copied), seed_everything=1) == 0  # a copy elsewhere may be its own
    assert fit(tmp_path / "new", ckpt_path=str(other / "checkpoints/step-00000012.ckpt"), seed_everything=1) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "done: step 12, no step left to train"


@pytest.mark.parametrize(("step", "is_late"), [(5, False), (6, True)])
def test_a_margin_that_comes_too_late_to_act_is_said(fit, tmp_path, caplog, step, is_late):
    """After the validation of step 6, the next is that of step 12, where the run ends."""
    own = {"kd.steps": 10, "kd.allow_change": True, "checkpoint.at_steps": [5, 6]}
    assert fit(tmp_path / "run", stop_at=7, **own) == 128 + signal.SIGTERM
    again = {**own, "ckpt_path": str(tmp_path / f"run/checkpoints/step-{step:08}.ckpt"), "kd.stop_margin": -99.0}
    assert fit(tmp_path / "run", stop_at=8, **again) == 128 + signal.SIGTERM
    said = "--kd.stop_margin -99.0 has no effect any more: there is no validation left before step 10, where the"
    assert (said in caplog.text) == is_late


def test_a_boundary_that_no_longer_holds_is_said(fit, tmp_path, caplog):
    own = {"kd.stop_margin": 99.0, "kd.steps": 10, "kd.anneal_steps": 2, "kd.shape": "linear",
           "trainer.val_check_interval": 3, "checkpoint.at_steps": [8]}  # fmt: skip
    run = tmp_path / "run"
    assert fit(run, **own) == 0
    stop = int(read_run(run, "run").last("probe/stop_step"))
    assert read_run(run, "run").kd_steps == stop < 8
    again = {**own, "kd.stop_margin": -99.0, "kd.allow_change": True}
    assert fit(run, ckpt_path=str(run / "checkpoints/step-00000008.ckpt"), **again) == 0
    assert f"; the end of KD that was found, step {stop}, no longer holds" in caplog.text
    found = read_run(run, "run")
    assert [steps for steps, _ in found.taught] == [stop, 10]
