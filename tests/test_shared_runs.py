"""What people of one group leave each other: runs and files of another user, with real permissions."""

import ctypes
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from conftest import arguments

from salt_lightning import cli
from salt_lightning.data import SALTDataModule
from salt_lightning.errors import ConfigError
from salt_lightning.run import run_lock
from salt_lightning.run.run_folder import saved
from salt_lightning.storage import shards
from salt_lightning.teacher.scores import Scored, Scores
from salt_lightning.text.sources import Hub, resolve

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
OWNER = 65534


@pytest.fixture
def without_rights(capfd):
    """without_rights(call) -> what a call returns and prints in a process that has root's files, but none of its rights
    to those of others."""

    def run_call(call: Callable[[], object]) -> tuple[int, str]:
        capfd.readouterr()
        child = os.fork()
        if child == 0:
            code = 99
            try:
                header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
                assert ctypes.CDLL(None).capset(header, sets) == 0  # no capability is effective, or permitted
                logging.getLogger("lightning.pytorch").addHandler(logging.StreamHandler(sys.stderr))
                code = int(call() or 0)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status, "".join(capfd.readouterr())

    return run_call


def give(path: Path, mode: int, files: int = 0o644) -> None:
    """Makes a folder, or a file, another user's."""
    for each in (path, *path.rglob("*")):
        os.chown(each, OWNER, OWNER)
        each.chmod(mode if each.is_dir() else files)


@pytest.fixture(scope="module")
def run_of_six(settings, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("shared") / "run"
    own = {"run": str(run), "kd.weight": 0.0, "trainer.max_steps": 6, "checkpoint.every_n_steps": 2}
    assert cli.main(["fit", *arguments(settings, own)]) == 0
    return run


@pytest.fixture
def run(run_of_six, tmp_path) -> Path:
    """A run of another user, whose folders all may write."""
    shutil.copytree(run_of_six, tmp_path / "run")
    give(tmp_path / "run", 0o777)
    return tmp_path / "run"


@pytest.fixture
def resume(settings, run, without_rights) -> Callable[[int], tuple[int, str]]:
    given = {"run": str(run), "kd.weight": 0.0, "trainer.max_steps": 8}

    def resume_run(step: int) -> tuple[int, str]:
        words = ["--ckpt_path", str(run / f"checkpoints/step-{step:08d}.ckpt")]
        return without_rights(lambda: cli.main(["fit", *arguments(settings, given), *words]))

    return resume_run


def test_a_run_of_another_user_goes_on_where_folders_may_be_written(resume, run):
    (run / ".config.tmp-until").touch()  # of a start of the owner that was killed
    (run / ".config.tmp-until").chmod(0o600)
    code, out = resume(6)
    assert code == 0, out
    assert [step for step, _ in saved(run / "checkpoints")] == [2, 4, 6, 8]
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 8
    assert (run / "config.until-00000006.yaml").exists()
    assert not list(run.glob(".config*"))
    assert (run / "tokenizer" / "tokenizer.json").stat().st_uid == OWNER  # equal files stay


@pytest.mark.parametrize("part", ["config.yaml", "checkpoints", ".", "tokenizer"])
def test_what_may_not_be_touched_is_refused_and_nothing_changes(part, resume, run):
    if part == "tokenizer":  # other words, which cannot be written: known only when they are
        (run / "tokenizer" / "tokenizer_config.json").write_text("{}")
    (run / part).chmod(0o600 if part == "config.yaml" else 0o755)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, out = resume(6 if part == "tokenizer" else 4)
    said = {
        "config.yaml": f"error: --run {run}: {run}/config.yaml cannot be read, and so the run's settings until now ",
        "checkpoints": f"error: --run {run}: {run}/checkpoints cannot be written; choose another folder",
        ".": f"error: --run {run}: {run} cannot be written; choose another folder",
        "tokenizer": f"error: {run} cannot be written (",
    }
    assert code == (1 if part == "tokenizer" else 2)
    assert out.strip().splitlines()[-1].startswith(said[part]), out
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and ".start-2" not in path.name}
    assert after == before
    assert part == "tokenizer" or not list(run.glob("*.start-2"))  # which would void what was logged after step 4


def test_a_checkpoint_of_another_user_that_cannot_be_removed_is_named_and_no_error(without_rights, tmp_path):
    (tmp_path / "step-00000002.ckpt").mkdir()
    (tmp_path / "step-00000002.ckpt" / "__0_0.distcp").write_bytes(b"x")
    give(tmp_path, 0o755)
    tmp_path.chmod(0o777)
    code, out = without_rights(lambda: shards.remove(tmp_path / "step-00000002.ckpt"))
    (left,) = tmp_path.glob(".step-00000002.ckpt.old.*.old")  # under a name that no other needs
    assert (code, left.is_dir()) == (0, True)
    assert f"{left} cannot be removed (Permission denied); it takes room until its owner removes it" in out
    tmp_path.chmod(0o755)

    def twice():
        for _ in range(2):
            shards.remove(left)

    code, out = without_rights(twice)
    assert (code, out.count("cannot be removed (Permission denied)")) == (0, 1)


def test_a_lock_that_cannot_be_removed_ends_no_run(without_rights, tmp_path):
    (tmp_path / ".lock").touch()
    give(tmp_path, 0o777, 0o666)
    tmp_path.chmod(0o1777)  # only owners remove

    def hold():
        with run_lock.held(tmp_path):
            print("held")

    code, out = without_rights(hold)
    assert (code, out) == (0, "held\n")


@pytest.mark.parametrize(
    "pattern", ["g/**/*.jsonl", "g/**", "g/*/*.jsonl", "g/two/*.jsonl", "g/two/x.json*", "g/*/x.jsonl"]
)
def test_a_glob_leaves_out_no_folder_that_may_not_be_read(pattern, without_rights, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "g" / name).mkdir(parents=True)
        (tmp_path / "g" / name / "x.jsonl").write_text('{"text": "a"}\n')
    give(tmp_path, 0o755)

    def find():
        try:
            print(len(resolve("--data.source", [str(tmp_path / pattern)], Hub())[0].files))
        except ConfigError as error:
            print(error)

    assert without_rights(find) == (0, "1\n" if "two" in pattern else "2\n")
    (tmp_path / "g" / "two").chmod(0o700)
    _, out = without_rights(find)
    said = f"--data.source: cannot read the folder '{tmp_path}/g/two': Permission denied; grant access"
    assert out.startswith(said)
    (tmp_path / "g" / "two").chmod(0o711)  # a file of a known name may be read
    _, out = without_rights(find)
    assert out == "2\n" if pattern.endswith("/x.jsonl") else out.startswith(said)


def test_text_that_another_user_prepares_or_was_killed_preparing_is_named(settings, without_rights, tmp_path):
    own = {"run": str(tmp_path / "run"), "data.cache_dir": str(tmp_path / "cache"), "kd.weight": 0.0}
    data = SALTDataModule(settings["data.source"], vocab_size=300, val_fraction=0.1, cache_dir=str(tmp_path / "cache"))
    data.prepare_data()
    (made,) = (path.parent for path in (tmp_path / "cache").glob("*/manifest.json"))
    lock = made.with_name(f".{made.name}.lock")
    shutil.rmtree(made)
    lock.touch()
    give(tmp_path / "cache", 0o777)
    code, out = without_rights(lambda: cli.main(["fit", *arguments(settings, own)]))
    assert code == 2
    assert f"error: --data.cache_dir: {lock} belongs to another user, who is preparing the same text or was " in out


def test_a_closed_log_is_named_and_the_others_are_compared(without_rights, run, run_of_six, tmp_path):
    (log,) = run.glob("*tfevents*")
    log.chmod(0o600)
    code, out = without_rights(lambda: cli.main(["compare", str(run_of_six), str(run), "--out", str(tmp_path)]))
    assert code == 0, out
    assert f"{log} could be read up to step 0: this user may not read it" in out


def test_scores_that_cannot_be_listed_are_not_taken_for_none(without_rights, tmp_path):
    """As none, they would be scored again, or lack shards for ever."""
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores.json").write_text(json.dumps({"scored": asdict(Scored("a", "b", 10, 4, True))}))
    give(tmp_path, 0o755)

    def look():
        try:
            print(Scores(tmp_path, "--data.selection").missing())
        except ConfigError as error:
            print(error)

    assert without_rights(look) == (0, "[0]\n")
    (tmp_path / "scores").chmod(0o700)
    _, out = without_rights(look)
    assert out.startswith(
        f"--data.selection: {tmp_path}/scores cannot be listed (Permission denied); let its owner run"
    )
