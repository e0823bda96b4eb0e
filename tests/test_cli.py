"""The command line as users see it: help, configs, and one line for each common error."""

import fcntl
import gc
import logging
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import warnings
from contextlib import nullcontext, suppress
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import lightning.pytorch as pl
import pytest
import ranks
import torch
import yaml
from conftest import arguments, built, error_of, run, scalars, write_corpus
from jsonargparse import Namespace
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.callbacks.progress import tqdm_progress
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only
from transformers.utils.logging import enable_progress_bar, is_progress_bar_enabled, warning_once

import salt_lightning
from salt_lightning import cli
from salt_lightning.__main__ import _imported
from salt_lightning.checkpoint import newest
from salt_lightning.command import wrong_names
from salt_lightning.command.command_line import configs_first
from salt_lightning.command.parser import _WORDS
from salt_lightning.command.quiet import silence_libraries
from salt_lightning.command.settings import wrong_trainer_settings
from salt_lightning.run import progress_bar
from salt_lightning.run.peers import limit_threads
from salt_lightning.text import processes

ROOT = Path(__file__).parents[1]
OVERLAYS = {"ddp.yaml", "fsdp.yaml", "fsdp1.yaml"}  # for another config: tests/test_parallel.py
CONFIGS = sorted(path for path in ROOT.glob("configs/**/*.yaml") if path.name not in OVERLAYS)
NAMES = [str(path.relative_to(ROOT)) for path in CONFIGS]
BASES = {
    "controls": "salt_ds.yaml",
    "tasks": "sft.yaml",
    "cpu.yaml": "salt.yaml",
    "gap.yaml": "salt.yaml",
    "hub.yaml": "salt.yaml",
}  # overlays, and their base configs


def test_help_shows_every_setting_and_verb(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in ("fit", "validate", "test", "compare", "export"):
        assert verb in text
    assert cli.main(["fit", "--help"]) == 0
    text = capsys.readouterr().out
    for key in (
        "--run", "--kd.weight", "--kd.steps", "--kd.anneal_steps", "--kd.shape", "--kd.allow_change", "--ckpt_path",
        "--model.student.path", "--model.student.config", "--model.teacher.revision", "--model.teacher_temperature",
        "--model.optim.warmup_steps", "--model.compile", "--data.source", "--data.tokenizer", "--data.val_fraction",
        "--checkpoint.every_n_steps", "--checkpoint.at_steps", "--data.examples.prompt", "--answers.choices",
    ):  # fmt: skip
        assert key in text, key
    assert "Optimizer steps with a teacher" in text  # the docstrings are the help


REFUSED = {
    "accumulate_grad_batches": 2, "barebones": True, "check_val_every_n_epoch": 2, "default_root_dir": "x",
    "enable_checkpointing": False, "fast_dev_run": True, "limit_train_batches": 3, "max_epochs": 2,
    "overfit_batches": 2,
}  # fmt: skip


def test_from_python_paths_and_numbers_may_be_given_and_no_error_of_settings_is_an_exit(settings, tmp_path, capsys):
    """In a notebook's cell a SystemExit is an error of its own, and it ends a sweep."""
    run, short = tmp_path / "run", ["--trainer.max_steps", 3, "--trainer.val_check_interval", 3]
    assert cli.main(["fit", *arguments(settings, {"kd.weight": 0.0}), "--run", run, *short]) == 0
    assert cli.main(["compare", run, "--out", tmp_path]) == 0
    assert cli.main(["export", newest(run / "checkpoints"), tmp_path / "exported"]) == 0
    capsys.readouterr()
    assert cli.main(["fit", "--trainer.max_stepz", 3]) == 2
    sizes = settings["model.student.config"] | {"head_dim": None}
    none = ["--checkpoint.export", None, "--data.isolate_documents", True, "--model.student.config", sizes]
    assert cli.main(["fit", *arguments(settings, {"kd.weight": 0.0}), "--run", tmp_path / "none", *none]) == 0
    written = yaml.safe_load((tmp_path / "none/config.yaml").read_text())
    assert written["checkpoint"]["export"] is written["model"]["student"]["config"]["head_dim"] is None
    assert "did you mean --trainer.max_steps?" in error_of(capsys)


def test_help_says_what_this_project_does(capsys):
    assert cli.main(["fit", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in REFUSED:
        assert re.search(rf"--trainer.{name} \S+ Cannot be set in this project: ", text), name
    assert "--ckpt_path CKPT_PATH A checkpoint (.ckpt), or last: the newest undamaged checkpoint in the run's" in text
    assert not re.search("Default: ``|known subclasses", text)  # Lightning's: other than those here
    assert not re.findall(r"--(?:run|model|data|kd|checkpoint|answers)[\w.]* [A-Z_]\S* \(", text)  # with no word on it
    assert text.index("The model to train") < text.index("--kd.weight") < text.index("--trainer.strategy")
    assert re.match(r"usage: \S+ fit \[--config FILE\]... \[--SETTING VALUE\]... Trains a student", text)
    assert len(wrong_trainer_settings(Namespace(**REFUSED))) == len(REFUSED)
    assert len(wrong_trainer_settings(Namespace(val_check_interval=0.0))) == 1
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(pl.Trainer, "trainer")
    assert {name for name in _WORDS if "." in name} <= {action.dest for action in parser._actions}  # no other names


def test_names_of_other_tools_are_answered_with_settings_that_exist(capsys):
    assert cli.main(["fit", "--help"]) == 0
    ours = set(re.findall(r"--[\w.]+", capsys.readouterr().out))
    texts = " ".join(wrong_names._CALLED)
    assert {name.rstrip(".") for name in re.findall(r"--[\w.]+", texts)} <= ours
    assert len(wrong_names._INSTEAD) == sum(map(len, wrong_names._CALLED.values()))  # no name has two answers


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("learning_rate", "use --model.optim.lr"),
        ("per-device-train-batch-size", "use --data.global_batch_size, of all devices together, and"),
        ("train.max_tokens", "use --trainer.max_steps: tokens / ("),
        ("trainer.save_steps", "use --checkpoint.every_n_steps"),
        ("kd.loss", "the KD loss is the forward KL over"),
        ("trust_remote_code", "use --model.student.trust_remote_code or --model.teacher.trust_remote_code"),
        ("model.attn_implementation", "use --model.student.attention or --model.teacher.attention"),
        ("model.teacher.model_name_or_path", "use --model.teacher.path"),
        ("teacher.torch_dtype", "use --model.teacher.dtype"),
        ("torch_dtype", "use --trainer.precision"),
        # the group is left out, or another
        ("at_steps", "did you mean --checkpoint.at_steps?"),
        ("model.lr", "did you mean --model.optim.lr?"),
        ("keep", "did you mean --checkpoint.keep?"),
        ("teacher.path", "did you mean --model.teacher.path?"),
        # misspelt, although the last part is another tool's
        ("dta.seed", "did you mean --data.seed?"),
        ("model.techer.dtype", "did you mean --model.teacher.dtype?"),
        ("model.optim.beta", "did you mean --model.optim.beta"),
        ("answers.max_tokens", "did you mean --answers.max_new_tokens?"),
        # nearest to one that cannot be set
        (
            "trainer.limit_train_batch",
            ", and --trainer.limit_train_batches cannot be set here: use --trainer.max_steps",
        ),
        ("trainer.min_epoch", ", and --trainer.min_epochs cannot be set here: use --trainer.min_steps"),
        ("model.hidden_size", "use --model.student.config.hidden_size"),
        ("model.student.n_embd", "use --model.student.config.hidden_size"),
        ("model.teacher.hidden_size", "(see --help)"),
        ("eval.max_iters", "(see --help)"),
        ("kd.los", "(see --help)"),
    ],
)
def test_a_name_that_is_no_setting_is_answered(typed, answer, capsys):
    assert cli.main(["fit", f"--{typed}", "1"]) == 2
    said = rf"error: --{typed}: there is no such setting(; | )?{re.escape(answer)}"
    assert re.match(said, error_of(capsys))


def test_the_setting_that_was_meant_is_not_missing_as_well(settings, capsys):
    own = {"data.source": "x", "kd.weight": 0.5, "kd.steps": 6}
    words = [word for word in arguments(settings, own) if not word.startswith("--data.source")]
    assert cli.main(["fit", *words, "--train_file=x", "--teacher_model=x"]) == 2
    line = error_of(capsys)
    assert line.count("; ") == 3, line  # of two problems


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_every_config_parses_and_builds(path, tmp_path, monkeypatch):
    below = BASES.get(path.name) or BASES.get(path.parent.name)
    base = [f"--config={ROOT / 'configs' / below}"] if below else []
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    command = built(*base, f"--config={path}", "--trainer.accelerator=cpu", f"--run={tmp_path}")
    if path.name == "score.yaml":  # for predict
        assert command.model.has_teacher
        return
    command.model.optim_spec.check(command.trainer.max_steps)
    schedule = next(c.schedule for c in command.trainer.callbacks if isinstance(c, cli.KDScheduleCallback))
    assert (schedule.weight > 0) == command.model.has_teacher
    assert command.trainer.max_steps % command.trainer.val_check_interval == 0  # the last step is validated
    assert (schedule.steps or 0) < command.trainer.max_steps


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda path: path.name)
def test_every_config_opens_with_a_header(path):
    lines = path.read_text().splitlines()
    for line, key in zip(lines, ("Trains|Scores|Overlay", "Command", "Hardware", "Expected"), strict=False):
        assert re.match(f"# ({key}):", line), line


@pytest.mark.parametrize("folder", ["configs", "configs/demo"])
def test_the_methods_differ_in_nothing_but_the_method(folder):
    configs = {m: yaml.safe_load((ROOT / folder / f"{m}.yaml").read_text()) for m in ("baseline", "salt", "rkd")}
    for config in configs.values():
        del config["run"], config["kd"]
        config["model"].pop("teacher", None)
    assert configs["baseline"] == configs["salt"] == configs["rkd"]


def test_the_installed_command_is_the_same(tmp_path):
    """Of `python cli.py`, the test on a terminal runs the imports too."""
    installed, wrong = Path(sys.executable).parent / "salt-lightning", ["fit", "--kd.wieght", "1"]
    if not installed.exists():
        pytest.skip("the package is not installed")
    for done in (
        forked.run([sys.executable, ROOT / "cli.py", *wrong], cwd=tmp_path),
        subprocess.run([installed, *wrong], capture_output=True, text=True, cwd=tmp_path),
    ):
        assert done.returncode == 2
        assert re.fullmatch(r"\n(error: --.*\n)+", done.stderr), done.stderr


@pytest.mark.parametrize("command", [[str(ROOT / "cli.py")], ["-m", "salt_lightning"]], ids=str)
def test_an_interrupt_while_the_libraries_are_imported_leaves_no_traceback(command):
    import_times = [sys.executable, "-X", "importtime"]  # a line for each module that has been imported
    with subprocess.Popen([*import_times, *command, "fit"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "torch." in line)
        process.send_signal(signal.SIGINT)
        said += process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in said


def test_compare_starts_without_the_libraries_of_training(tmp_path):
    imports = [sys.executable, "-X", "importtime", str(ROOT / "cli.py"), "compare", str(tmp_path / "none")]
    done = subprocess.run(imports, capture_output=True, text=True)
    *loaded, _, said = done.stderr.splitlines()
    assert done.returncode == 2
    assert said == f"error: compare: RUN {tmp_path}/none is not a folder; give a run's own folder, e.g. runs/salt"
    assert {line.split()[-1].partition(".")[0] for line in loaded} & {"torch", "lightning", "transformers"} == set()


def test_a_python_that_takes_text_for_ascii_says_so():
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, str(ROOT / "cli.py"), "compare", "l\u00e4ufe"]
    done = subprocess.run(command, capture_output=True, text=True, env=ascii_only)
    assert done.returncode == 2
    assert re.fullmatch("error: Python takes files and names for .*; set PYTHONUTF8=1\n", done.stderr)
    done = subprocess.run(command, capture_output=True, text=True, env=ascii_only | {"PYTHONUTF8": "1"})
    assert "l\u00e4ufe is not a folder" in done.stderr
    asked = "import os; from salt_lightning.__main__ import main; main(); print(os.environ['PYTHONUTF8'])"
    command = [sys.executable, "-X", "utf8", "-c", asked, "compare", "none"]
    done = subprocess.run(command, capture_output=True, text=True, env=ascii_only)
    assert done.stdout == "1\n"  # so that ranks, which Lightning starts without the option, are not refused


@pytest.mark.skipif(torch.cuda.is_available(), reason="that is the GPU")
@pytest.mark.parametrize("accelerator", ["auto", "cpu"])
def test_a_run_on_the_cpu_that_was_not_asked_for_is_said(settings, tmp_path, capsys, accelerator):
    own = {"trainer.accelerator": accelerator, "trainer.devices": 1, "trainer.max_steps": 4, "kd.weight": 0.0}
    own |= {"run": str(tmp_path / "run"), "model.optim.warmup_steps": 2}
    run(["fit", *arguments(settings, own)])
    said = f"device: the CPU, since torch {torch.__version__} finds no GPU (--trainer.accelerator auto); "
    assert (said in capsys.readouterr().err) == (accelerator == "auto")


def test_another_progress_bar_takes_the_place_of_ours(settings, tmp_path, capsys):
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "trainer.enable_progress_bar": True,
           "trainer.max_steps": 2, "trainer.val_check_interval": 2}  # fmt: skip
    assert cli.main(["fit", *arguments(settings, own), "--trainer.callbacks+=TQDMProgressBar"]) == 0
    assert "Epoch 0: 100%" in capsys.readouterr().out  # ours says steps


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--trainer.logger=CometLogger", "CometLogger: "),
        ("--trainer.callbacks+=BatchSizeFinder", "batch_size"),
    ],
)
def test_what_lightning_refuses_is_one_line(settings, tmp_path, capsys, setting, message):
    if "Comet" in setting and find_spec("comet_ml"):
        pytest.skip("it is installed")
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0}
    assert cli.main(["fit", *arguments(settings, own), setting]) == 2
    assert message in error_of(capsys)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--model.optim.lr=1,5", "--model.optim.lr 1,5 must be a finite number"),
        ("--trainer.max_steps=x", "--trainer.max_steps x must be a whole number"),
        ("--model.optim.lrr=1", "--model.optim.lrr"),
        ("--config={run: 010}", "010 reads as 8 in YAML"),
    ],
)
def test_a_config_is_printed_only_if_all_that_was_given_can_be_read(typed, said, capsys):
    assert run(["fit", "--kd.weight", "0", "--print_config", typed]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "Traceback" not in err
    assert said in err
    for asks in ("--print_config", "--print_config=skip_default"):
        assert run(["fit", "--kd.weight", "0.25", asks]) == 0
        assert "weight: 0.25" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "asked", "code", "said"),
    [
        ([], "--version", 0, f"salt_lightning {salt_lightning.__version__}\n"),
        (["-OO"], "fit", 2, "error: -OO (PYTHONOPTIMIZE=2) removes docstrings, which transformers' models need"),
    ],
)
def test_what_is_said_before_anything_is_imported(options, asked, code, said):
    """transformers reads its own docstrings, and would blame the config."""
    command = [sys.executable, *options, "-m", "salt_lightning", asked]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, (done.stdout + done.stderr).startswith(said)) == (code, True), done.stderr


def test_garbage_is_collected_after_the_imports_but_not_among_them():
    gc.unfreeze()
    assert _imported() is cli.main
    assert gc.isenabled()
    assert gc.get_freeze_count() > 100_000


CPU = torch.device("cpu")


class Odd(pl.Callback):
    def __init__(self, device: Any = CPU) -> None:
        pass


def test_an_argument_that_is_no_text_is_named(settings, tmp_path, capsys):
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0}
    assert cli.main(["fit", *arguments(settings, own), f"--trainer.callbacks+={__name__}.Odd"]) == 2
    assert "--trainer.*: an argument of a class cannot be written into config.yaml, perhaps a def" in error_of(capsys)


class Mode(StrEnum):
    CAREFUL = "slowly"


class Chosen(pl.Callback):
    def __init__(self, mode: Mode = Mode.CAREFUL) -> None:
        self.mode = mode


def test_an_enumeration_is_written_as_it_is_read(settings, tmp_path, capsys):
    """Lightning gives a Timer's interval, which has the type str, a member as its default."""
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0}
    timer = ["--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:01:00:00"]
    chosen = [f"--trainer.callbacks+={__name__}.Chosen"]
    assert cli.main(["fit", *arguments(settings, own), *timer, *chosen]) == 0, capsys.readouterr().err
    file = tmp_path / "run/config.yaml"
    first, second = yaml.safe_load(file.read_text())["trainer"]["callbacks"][:2]
    assert (first["init_args"]["interval"], second["init_args"]["mode"]) == ("step", "CAREFUL")
    assert cli.main(["fit", "--config", file, "--run", tmp_path / "again"]) == 0


class StartsOthers(pl.Callback):
    """Starts a command in another thread, then in this one."""

    def __init__(self, words: list[str]) -> None:
        self.words, self.codes = words, []

    def on_train_start(self, *_):
        thread = threading.Thread(target=lambda: self.codes.append(cli.main(self.words)))
        thread.start()
        thread.join()
        self.codes.append(cli.main(self.words))


def test_a_run_in_a_second_thread_is_refused(settings, teacher, tmp_path, capsys):
    """Its seeds would be those of the first: no run would be what it is alone. One within the other may be."""
    looked_at = {key: value for key, value in settings.items() if key.startswith(("data.", "trainer."))}
    others = StartsOthers(["validate", *arguments(looked_at, {"run": str(tmp_path / "other"), "ckpt_path": teacher})])
    fit = ["fit", *arguments(settings, {"run": str(tmp_path / "run"), "kd.weight": 0.0})]
    assert ranks.run(fit, others) == 0
    assert others.codes == [2, 0]
    assert "error: another thread of this process is in main([...]), and two runs in one" in capsys.readouterr().err
    others.on_train_start()
    assert others.codes == [2, 0, 0, 0]


def test_a_run_inside_autocast_is_refused(tmp_path, capsys):
    with torch.autocast("cpu", torch.bfloat16):
        assert cli.main(["fit", "--run", str(tmp_path / "run")]) == 2
    said = "error: main([...]) is called inside torch.autocast, which would keep casts of old weights; call it outside"
    assert error_of(capsys) == said


def test_a_run_outside_the_main_thread_says_that_no_signal_saves_it(settings, tmp_path, caplog):
    codes = []
    fit = ["fit", *arguments(settings, {"run": str(tmp_path / "run"), "kd.weight": 0.0})]
    thread = threading.Thread(target=lambda: codes.append(cli.main(fit)))
    thread.start()
    thread.join()
    assert codes == [0]
    assert "not in the main thread: a signal (Ctrl-C, SIGTERM) will end this run without a save" in caplog.text


def test_an_exit_that_a_cluster_tool_asks_for_is_not_swallowed(settings, tmp_path):
    """submitit's handler queues the job again, then exits; with a plain return, the job would count as done."""

    def leave(*_):
        sys.exit(144)

    leaves = pl.callbacks.LambdaCallback(on_train_batch_end=leave)
    with pytest.raises(SystemExit, match="144"):
        ranks.run(["fit", *arguments(settings, {"run": str(tmp_path / "run"), "kd.weight": 0.0})], leaves)


def test_early_stopping_acts_at_validations_after_every_micro_batch(settings, tmp_path, capsys):
    """Lightning takes an interval of one micro-batch for one epoch, whose end is the run's."""
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "trainer.val_check_interval": 1}
    stops = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/ce", "mode": "max", "patience": 1}}
    assert cli.main(["fit", *arguments(settings, own, {"trainer.callbacks": [stops]})]) == 0, capsys.readouterr().err
    assert sorted(scalars(tmp_path / "run")["val/ce"]) == [1, 2]


@pytest.mark.parametrize(
    ("fails", "begun", "ends"), [(None, False, [0]), ("nan", False, [1]), ("own", False, [1]), (None, True, [])]
)
def test_a_wandb_run_ends_with_its_command(settings, tmp_path, monkeypatch, fails, begun, ends):
    """A stand-in for the package, which the tests do not need: its current run, and the codes with which runs ended."""
    ended = []
    wandb = SimpleNamespace(run="the host's" if begun else None)
    wandb.finish = lambda exit_code: (ended.append(exit_code), setattr(wandb, "run", None))
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def begin(*_):
        wandb.run = wandb.run or "ours"
        if fails == "own":
            raise LookupError

    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0} | ({"model.optim.lr": 1e30} if fails == "nan" else {})
    begins = pl.callbacks.LambdaCallback(on_train_start=begin)
    with pytest.raises(LookupError) if fails == "own" else nullcontext():
        assert ranks.run(["fit", *arguments(settings, own)], begins) == (1 if fails else 0)
    assert ended == ends


def test_a_second_thread_may_compare_and_export(settings, teacher, tmp_path):
    others = StartsOthers(["export", teacher, str(tmp_path / "hf")])
    fit = ["fit", *arguments(settings, {"run": str(tmp_path / "run"), "kd.weight": 0.0})]
    assert ranks.run(fit, others) == 0
    assert others.codes == [0, 2]  # the second finds the folder of the first


def test_ctrl_c_while_it_loads_leaves_no_traceback(tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), "fit"], stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():  # seconds of imports are still to come
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 128 + signal.SIGINT


def test_a_folder_of_text_files_and_a_pretrained_student(settings, tmp_path, capsys):
    """The other road: txt files, a Hugging Face folder as teacher and as student to go on from, another tokenizer."""
    from families import tiny

    texts = tmp_path / "texts"
    texts.mkdir()
    for number, line in enumerate(write_corpus(tmp_path / "c.jsonl").read_text().splitlines()):
        (texts / f"{number}.txt").write_text(yaml.safe_load(line)["text"])
    tiny("qwen3", vocab_size=320, max_position_embeddings=64).model.save_pretrained(tmp_path / "student")
    tiny("gpt2", seed=1, vocab_size=320, max_position_embeddings=64).model.save_pretrained(tmp_path / "teacher")
    own = {
        "run": str(tmp_path / "run"), "data.source": str(texts), "model.student.path": str(tmp_path / "student"),
        "model.teacher.path": str(tmp_path / "teacher"), "kd.steps": 6,
        "kd.allow_untrained": True,
    }  # fmt: skip
    fewer = {k: v for k, v in settings.items() if k != "model.student.config"}
    said, logger = [], logging.getLogger("transformers.modeling_utils")
    logger.addHandler(keep := logging.Handler())
    keep.emit = lambda record: said.append(record.getMessage())
    warning_once.cache_clear()
    assert cli.main(["fit", *arguments(fewer, own)]) == 0
    logger.removeHandler(keep)
    assert not said  # gpt2 asks for a mask where a row ends with its token for padding
    assert cli.main(["fit", *arguments(fewer, own, {"ckpt_path": "last"})]) == 0  # a finished run: nothing to do
    assert cli.main(["validate", *arguments({k: v for k, v in fewer.items() if not k.startswith("checkpoint")},
                                            {"run": own["run"], "ckpt_path": "last"})]) == 0  # fmt: skip


def test_the_progress_bar_shows_loss_weight_and_speed(settings, teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.ProgressBar, "LOG_S", 0.0)
    own = {"run": str(tmp_path / "run"), "model.teacher.path": teacher, "kd.steps": 6, "kd.weight": 0.5,
           "data.micro_batch_size": 2, "trainer.enable_progress_bar": True, "checkpoint.at_steps": [6]}  # fmt: skip
    assert cli.main(["fit", *arguments(settings, own)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"loss=\d\.\d{3}, val_ce=\d\.\d{3}, tok/s=[\d,]+, kd_weight=0\.5\] ", out)
    (tmp_path / "run/checkpoints/step-00000012.ckpt").unlink()
    assert cli.main(["fit", *arguments(settings, own, {"ckpt_path": "last"})]) == 0
    for shown, first in ((out, 0), (capsys.readouterr().out, 6)):  # optimizer steps, where a step has 4 micro-batches
        counts = set(re.findall(r"step (\d+/\S+) \[", shown))
        assert counts == {f"{step}/12" for step in range(first, 13)}


def test_a_notebooks_bar_has_a_length_and_is_drawn_as_in_a_terminal(settings, tmp_path, capsys, monkeypatch):
    """Its widget is drawn in place, where text of a log would stay; but each bar of a validation would stay too."""

    class Widget(progress_bar.Tqdm):
        __module__ = "tqdm.notebook"

        def reset(self, total=None):
            self.length = total
            super().reset(total)

    monkeypatch.setattr(progress_bar, "Tqdm", Widget)
    monkeypatch.setattr(tqdm_progress, "Tqdm", Widget)
    monkeypatch.setattr(cli.ProgressBar, "TERMINAL_S", 0.0)
    lengths = []
    monkeypatch.setattr(cli.ProgressBar, "on_train_end", lambda bar, *_: lengths.append(bar.train_progress_bar.length))
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "trainer.enable_progress_bar": True}
    assert cli.main(["fit", *arguments(settings, own)]) == 0
    out = capsys.readouterr().out
    assert lengths == [12]
    assert {f"{step}/12" for step in range(1, 13)} <= set(re.findall(r"step (\d+/\S+) \[", out))
    assert "Validation" not in out


def test_a_bar_in_a_log_shows_steps_per_second_and_nothing_from_another_process(capsys):
    """Lightning disables the bars of all processes but the first, and closes them as it does the others."""
    bar, shown = cli.ProgressBar(), []
    for change in (bar.enable, bar.disable):
        change()
        lines = bar.init_test_tqdm()
        lines.total, lines.n, lines.start_t = 4, 2, time.time() - 1000
        lines.refresh()
        lines.close()
        shown.append(capsys.readouterr().out)
    assert re.fullmatch(r"Testing: .*\| 2/4 \[16:4\d<16:4\d, +0\.00it/s\]\n", shown[0])  # not 500 s/it
    assert shown[1] == ""
    others = bar.init_sanity_tqdm(), bar.init_predict_tqdm()  # Lightning's own trainer has the first
    assert {type(other) for other in others} == {progress_bar._Lines}


def test_what_is_typed_wins_over_files_wherever_it_stands(tmp_path):
    for number in (1, 2):
        (tmp_path / f"{number}.yaml").write_text(
            f"trainer: {{max_steps: {number}}}\ndata: {{block_size: {number + 7}}}"
        )
    first, second = (f"--config={tmp_path}/{number}.yaml" for number in (1, 2))
    line = ["fit", "--trainer.max_steps", "5", first, "--kd.weight=0", "--config", "x.yaml", "--run=x"]
    moved = ["fit", first, "--config=x.yaml", "--trainer.max_steps", "5", "--kd.weight=0", "--run=x"]
    assert configs_first(line) == moved
    moved = ["fit", "--config=x.yaml", "--config=y=1", "--run=x", "--config"]
    assert configs_first(["fit", "--run=x", "-cx.yaml", "-c=y=1", "--config"]) == moved
    made = build("--trainer.max_steps=5", first, second, "--kd.weight=0", f"--run={tmp_path}")
    assert (made.trainer.max_steps, made.datamodule.block_size) == (5, 9)


def test_a_home_is_one_in_every_path(settings, teacher, tmp_path, monkeypatch):
    """A shell only expands it in `--run ~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(teacher, tmp_path / "teacher.ckpt")
    own = {"kd.weight": 0.5, "kd.steps": 6, "model.teacher.path": "~/teacher.ckpt", "run": "~/run",
           "checkpoint.export": "~/out", "checkpoint.folder": "~/saved"}  # fmt: skip
    assert cli.main(["fit", *arguments(settings, own)]) == 0
    for made in ("run/config.yaml", "out/model.safetensors", "saved/step-00000012.ckpt"):
        assert (tmp_path / made).exists()


def test_an_empty_folder_of_the_users_stays(settings, tmp_path):
    (tmp_path / "run").mkdir()
    assert cli.main(["fit", *arguments(settings, {"run": str(tmp_path / "run"), "data.source": "no/*"})]) == 2
    assert list((tmp_path / "run").iterdir()) == []


def test_torch_starts_no_more_threads_than_a_container_may_run(tmp_path, capsys, monkeypatch):
    """With 16 threads in the time of one CPU, a step took 7 times as long."""
    (tmp_path / "cpu.max").write_text("200000 100000")
    monkeypatch.setattr(processes._cgroups, "__defaults__", (tmp_path, tmp_path / "none"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    before = torch.get_num_threads()
    try:
        start = cli._start
        seen: list[int] = []
        monkeypatch.setattr(cli, "_start", lambda *_: sys.exit(seen.append(torch.get_num_threads())))
        for given, threads, expected in (("32", 3, 3), (None, 3, 2), (None, 1, 1)):
            monkeypatch.setenv("OMP_NUM_THREADS", given or "")
            if not given:
                monkeypatch.delenv("OMP_NUM_THREADS")
            torch.set_num_threads(threads)
            assert cli.main([]) == 0
            assert seen.pop() == expected
            assert torch.get_num_threads() == threads  # for a process that continues
        monkeypatch.setattr(cli, "_start", start)
        (tmp_path / "cpu.max").write_text("400000 100000")
        torch.set_num_threads(3)
        build(f"--run={tmp_path}", "--trainer.strategy=ddp", "--trainer.devices=2")
        _set_num_threads_if_needed(2)  # in each process that Lightning starts
        assert torch.get_num_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        limit_threads(9)  # more processes than CPUs
        assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (1, "1")
    finally:
        torch.set_num_threads(before)


def test_a_log_file_holds_few_drawings_of_the_progress_bar(settings, teacher, tmp_path, capsys):
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.5, "kd.steps": 4, "model.teacher.path": teacher,
           "trainer.enable_progress_bar": True}  # fmt: skip
    assert cli.main(["fit", *arguments(settings, own)]) == 0
    out = capsys.readouterr().out
    assert "\r" not in out  # a collector of logs passes on whole lines
    # before a message (4: the teacher leaves), at 6 and the second 12 after a validation
    assert re.findall(r"^step (\d+)/12 \[.*\] +\d+%$", out, re.MULTILINE) == ["1", "4", "6", "12", "12"]
    assert "val_ce=" in out
    logged = scalars(tmp_path / "run")["train/loss"]
    for step, loss in re.findall(r"^step (\d+)/12 \[.*loss=(\d\.\d{3})", out, re.MULTILINE):
        assert loss == f"{logged[int(step)]:.3f}"
    assert not {"Validation", "Epoch"} & set(re.findall(r"\w+", out))


def test_an_interval_longer_than_the_run_validates_at_its_end(settings, tmp_path):
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "trainer.val_check_interval": 1000}
    assert cli.main(["fit", *arguments(settings, own)]) == 0
    assert sorted(scalars(tmp_path / "run")["val/ce"]) == [12]


def test_validate_needs_a_checkpoint_and_takes_its_sizes(settings, teacher, tmp_path, capsys):
    fewer = {k: v for k, v in settings.items() if not k.startswith("checkpoint")}
    own = {"run": str(tmp_path / "run")}
    assert cli.main(["validate", *arguments(fewer, own)]) == 2
    assert "validate needs --ckpt_path" in error_of(capsys)
    for verb, limit in (("validate", "limit_val_batches"), ("test", "limit_test_batches")):
        none = {f"trainer.{limit}": 0}
        assert cli.main([verb, *arguments(fewer, own, {"ckpt_path": teacher}, none)]) == 2
        assert f"--trainer.{limit} 0: {verb} would measure nothing; leave it out, or set it to null" in error_of(capsys)
    assert cli.main(["validate", *arguments(fewer, own, {"ckpt_path": teacher})]) == 0  # half as wide as `settings`
    assert "val/ce" in capsys.readouterr().out


def test_no_name_reaches_the_terminal_as_it_is(settings, tmp_path, capsys, caplog):
    (tmp_path / "text").mkdir()
    write_corpus(tmp_path / "text/a.jsonl")
    (tmp_path / "text/\x1b[31mred.bin").touch()
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "data.source": str(tmp_path / "text")}
    assert run(["fit", *arguments(settings, own)]) == 0
    assert run(["fit", "--kd.shape", "\x1b[31mblue"]) == 2
    said = "".join((*capsys.readouterr(), caplog.text))
    assert "\\x1b[31mred.bin" in said
    assert "\\x1b[31mblue" in said
    assert "\x1b" not in said


def test_files_of_a_folder_that_are_left_out_are_named(settings, tmp_path, caplog):
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_corpus(folder / "train_a.jsonl")
    write_corpus(folder / "other.jsonl", 5)
    (folder / "a.txt").write_text("text")
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "data.source": str(folder), "trainer.max_steps": 6}
    assert cli.main(["fit", *arguments(settings, own)]) == 0
    assert "left out" in caplog.text
    assert "a.txt" in caplog.text


def build(*args):
    return built(f"--config={ROOT / 'configs/baseline.yaml'}", "--trainer.accelerator=cpu", *args)


@pytest.mark.parametrize(
    ("args", "model_seed", "data_seed"),
    [
        (["--seed_everything=5"], 5, 5),
        (["--seed_everything=5", "--data.seed=7"], 5, 7),
        (["--seed_everything=5", "--model.seed=7"], 7, 5),
    ],
)
def test_one_seed_for_all_unless_given_apart(args, model_seed, data_seed, tmp_path):
    built = build(*args, f"--run={tmp_path}")
    assert (built.model.hparams["seed"], built.datamodule.seed) == (model_seed, data_seed)


def test_callbacks_of_the_user_come_beside_ours(tmp_path):
    timer = '[{"class_path": "lightning.pytorch.callbacks.Timer"}]'
    built = build(f"--run={tmp_path}", f"--trainer.callbacks={timer}", "--trainer.enable_progress_bar=true")
    names = [type(callback).__name__ for callback in built.trainer.callbacks]
    assert sorted(names) == ["AnswerTest", "KDScheduleCallback", "ProgressBar", "RunCheckpoint", "Timer"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.ckpt", None, "does not exist"),
        ("t.ckpt", b"half", "is not a whole checkpoint"),
        ("folder", None, "does not exist"),
    ],
)
def test_a_missing_or_broken_teacher_is_named_before_the_text_is_read(
    settings, tmp_path, capsys, name, content, message
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    own = {"run": str(tmp_path / "run"), "data.cache_dir": str(tmp_path / "cache"), "kd.steps": 6,
           "model.teacher.path": str(tmp_path / name)}  # fmt: skip
    assert run(["fit", *arguments(settings, own)]) == 2
    assert f"{name} {message}" in error_of(capsys)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("verb", ["fit", "check", "predict"])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"data.val_fraction": 0.5}, "was trained with another tokenizer than --data.tokenizer"),
        ({"data.block_size": 64}, "max_position_embeddings 32 is smaller than --data.block_size 64"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_the_text_is_tokenized(
    settings, teacher, tmp_path, capsys, verb, other, message
):
    """Which takes hours of a large text: all it takes is a tokenizer."""
    own = {"run": str(tmp_path / "run"), "data.cache_dir": str(tmp_path / "cache"), "model.teacher.path": teacher}
    if verb == "predict":
        own = {k: v for k, v in (settings | own).items() if k.startswith(("data.", "run", "model.teacher"))}
    code = run([verb, *arguments({} if verb == "predict" else settings, own | other)])
    shown = capsys.readouterr()
    assert code == (1 if verb == "check" else 2), shown
    assert f"--model.teacher.path {teacher}" in re.sub(r"\s+", " ", shown.out + shown.err)
    assert message in re.sub(r"\s+", " ", shown.out + shown.err)
    assert not list((tmp_path / "cache").rglob("tokens.bin"))


def test_models_that_do_not_fit_text_of_the_cache_are_refused_too(settings, teacher, tmp_path, capsys):
    own = {"data.cache_dir": str(tmp_path / "cache"), "data.val_fraction": 0.5, "trainer.max_steps": 2,
           "trainer.val_check_interval": 2}  # fmt: skip
    assert run(["fit", *arguments(settings, own | {"run": str(tmp_path / "a"), "kd.weight": 0.0})]) == 0
    taught = {"run": str(tmp_path / "b"), "model.teacher.path": teacher, "kd.steps": 1}
    assert run(["fit", *arguments(settings, own | taught)]) == 2
    assert "was trained with another tokenizer than --data.tokenizer" in error_of(capsys)


@pytest.mark.parametrize("name", ["overfit_batches", "fast_dev_run"])
def test_a_few_micro_batches_are_no_run(settings, tmp_path, capsys, name):
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, f"trainer.{name}": 1, "model.optim.warmup_steps": 2}
    assert run(["fit", *arguments(settings, own)]) == 2
    said = error_of(capsys)
    assert f"--trainer.{name} 1" in said
    assert "--model.optim.warmup_steps" not in said  # which fits into max_steps, and not into a micro-batch


def test_nothing_is_validated_without_a_checkpoint(settings, tmp_path, capsys):
    own = {k: v for k, v in settings.items() if not k.startswith("checkpoint.")}
    assert run(["validate", *arguments(own, {"run": str(tmp_path / "typo"), "ckpt_path": "last"})]) == 2
    assert re.search(r"no checkpoint in .*typo/checkpoints; check --run .*typo", error_of(capsys))


def test_validate_needs_no_teacher_says_what_it_found_and_leaves_the_runs_config(settings, tmp_path, capsys):
    own = {"run": str(tmp_path / "run"), "trainer.max_steps": 2, "trainer.val_check_interval": 2}
    assert cli.main(["fit", *arguments(settings, own, {"kd.weight": 0.0})]) == 0
    config = (tmp_path / "run/config.yaml").read_text()
    fewer = {k: v for k, v in settings.items() if not k.startswith(("checkpoint.", "model."))}
    capsys.readouterr()
    assert cli.main(["validate", *arguments(fewer, own, {"ckpt_path": "last"})]) == 0
    assert (tmp_path / "run/config.yaml").read_text() == config
    found = scalars(tmp_path / "run/validate")
    head, _, *lines = (line for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    said = dict(line.replace(" ", "").strip("|").split("|") for line in lines)
    assert head.split() == ["|", "metric", "|", "step", "2", "|"]
    assert list(said) == ["val/ce", "val/accuracy", "val/bits_per_byte", "val/perplexity", "val/tokens"]
    for tag, value in said.items():
        (logged,) = found[tag].values()
        assert value == format(logged, ",.0f" if tag == "val/tokens" else ".4f")


def test_one_callback_without_a_list_is_taken_as_lightning_takes_it(tmp_path):
    built = build(f"--run={tmp_path}", "--trainer.callbacks=lightning.pytorch.callbacks.Timer")
    assert "Timer" in [type(callback).__name__ for callback in built.trainer.callbacks]


@pytest.mark.parametrize("form", ["{}", '[{{"class_path": "{}"}}]'])
def test_a_plugin_of_the_user_is_used(tmp_path, form):
    plugin = form.format("lightning.pytorch.plugins.environments.LightningEnvironment")
    build(f"--run={tmp_path}", f"--trainer.plugins={plugin}")


def test_a_pattern_without_quotes_is_explained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.jsonl").touch()
    assert run(["fit", "--data.source", "a.jsonl", "b.jsonl"]) == 2
    assert "unrecognized arguments: b.jsonl; put a glob in quotes, 'my_text/*.jsonl'" in error_of(capsys)
    assert run(["fit", "-V"]) == 2
    assert error_of(capsys).endswith("unrecognized arguments: -V")


def test_the_command_goes_by_the_name_that_started_it(capsys, monkeypatch):
    """Not so another program that calls it: `python -m pytest` has a __main__.py, too."""
    ours = "python -m salt_lightning"
    for argv, name in (
        (["/usr/bin/salt-lightning", "fit"], "salt-lightning"), (["x/salt_lightning/__main__.py"], ours),
        (["x/pytest/__main__.py"], "cli.py"), (["cli.py"], "cli.py"), ([], "cli.py"),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", argv)
        assert run(["compare", "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: {name} compare"), argv


def test_a_command_in_python_leaves_the_warnings_as_they_were(capsys):
    before = list(warnings.filters)
    assert cli.main(["fit", "--kd.steps=x"]) == 2
    assert warnings.filters == before


def test_on_a_terminal_messages_stand_on_lines_of_their_own(settings, tmp_path):
    """They come while a bar is drawn, which has no end of line."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 110, 0, 0))
    own = {"run": str(tmp_path / "run"), "trainer.enable_progress_bar": True, "kd.weight": 0.0}
    process = subprocess.Popen(
        [sys.executable, ROOT / "cli.py", "fit", *arguments(settings, own)], stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # Linux: the other end is closed
        while data := os.read(ours, 1 << 16):
            shown += data
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert "12/12" in text  # the premise: bars are drawn
    before = text[: text.index("`Trainer.fit` stopped")]
    assert before.endswith(("\r", "\n"))
    assert before.splitlines()[-1].strip() == ""  # the bar is gone from where the message stands
    last = text.replace("\r", "\n").split("\n")
    assert [line for line in last if line.strip()][-1].startswith("done: step 12, val/ce ")


def test_a_command_in_python_leaves_the_process_as_it_was(settings, tmp_path, monkeypatch):
    """Loggers, threads and their hook, which a notebook's own models and later commands go on with."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = ("huggingface_hub", "transformers.modeling_utils", "lightning.pytorch.utilities.rank_zero")

    def state() -> list[object]:
        loggers = [(logger.level, logger.filters[:]) for logger in map(logging.getLogger, names)]
        return [*loggers, threading.excepthook, torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")]

    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 + processes.num_cores())
    for name in names:  # what commands in this process have left before there was this test
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
    try:
        before = state()
        for code, args in (
            (0, ["fit", *arguments(settings, {"run": str(tmp_path / "run"), "kd.weight": 0.0})]),
            (2, ["fit", *arguments(settings, {"run": str(tmp_path / "run"), "data.block_size": 0})]),
            (2, ["compare", str(tmp_path / "none")]),
        ):
            assert cli.main(args) == code, args
            assert state() == before
    finally:
        torch.set_num_threads(threads)


def test_of_what_every_process_would_say_the_first_one_alone_does(monkeypatch):
    """Reading weights has a bar of transformers' own; Lightning puts the rank before a line of each other process."""
    log = logging.getLogger("lightning.fabric.utilities.seed")
    try:
        enable_progress_bar()  # an earlier test of this process may have been another rank's
        for rank in (0, 1):
            monkeypatch.setattr(rank_zero_only, "rank", rank)
            silence_libraries()
            assert is_progress_bar_enabled() == (rank == 0)
        for text in ("Seed set to 0", "[rank: 1] Seed set to 0", "[rank: 12] an error"):
            record = logging.LogRecord(log.name, logging.INFO, "", 0, text, (), None)
            assert bool(log.filter(record)) == ("error" in text)
    finally:
        enable_progress_bar()
