"""What surrounds a command: streams that are closed, full or ASCII, folders that are gone or of another user."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from conftest import arguments

from salt_lightning.errors import ConfigError
from salt_lightning.run import run_lock
from salt_lightning.run.run_folder import saved
from salt_lightning.text.token_files import TokenFiles, require_readable

CLI = Path(__file__).parents[1] / "cli.py"


def command(*args: object, env: dict[str, str] | None = None, **streams) -> subprocess.CompletedProcess:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    own = {**os.environ, "PYTHONPATH": str(CLI.parent), **(env or {})}
    return subprocess.run([sys.executable, CLI, *map(str, args)], env=own, timeout=120, **pipes)


@pytest.fixture
def run(teacher, tmp_path) -> Path:
    (tmp_path / "ünï").symlink_to(Path(teacher).parents[1])
    return tmp_path / "ünï"


def test_names_that_stdout_cannot_show_are_escaped(run, tmp_path):
    done = command("compare", run, "--out", tmp_path / "ü", env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"| \\xfcn\\xef " in done.stdout
    assert done.stdout.rstrip().endswith(b"\\xfc/compare.png")
    assert (tmp_path / "ü" / "compare.md").exists()


def test_a_full_disk_behind_stdout_does_not_end_a_comparison(run, tmp_path):
    with open("/dev/full", "w") as full:
        done = command("compare", run, "--out", tmp_path, stdout=full)
    assert done.returncode == 0
    assert done.stderr == b"stdout cannot be written (No space left on device): continuing without it\n"
    assert (tmp_path / "compare.png").exists()


def test_no_folder_for_a_list_of_fonts_is_no_message(run, tmp_path):
    done = command("compare", run, "--out", tmp_path, env={"MPLCONFIGDIR": "/proc/nowhere"})
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_crash_in_a_library_tells_where_it_was(tmp_path):
    crash = "cli.main = lambda: os.kill(os.getpid(), signal.SIGSEGV)"
    code = f"import os, signal\nfrom salt_lightning import __main__, cli\n{crash}\n__main__.main()"
    done = forked.run([sys.executable, "-c", code], cwd=tmp_path)
    assert done.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in done.stderr
    assert "in main" in done.stderr


@pytest.mark.parametrize("verb", ["fit", "compare"])
def test_a_current_folder_that_is_gone_is_called_so(verb, tmp_path):
    (tmp_path / "gone").mkdir()
    code = f'cd "$0" && rmdir "$0" && exec "$@" {verb}'
    done = subprocess.run(["sh", "-c", code, tmp_path / "gone", sys.executable, CLI],
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(CLI.parent)})  # fmt: skip
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"error: the current folder has been removed; cd to one that exists\n"


def test_a_fit_without_any_open_stream_is_whole(settings, tmp_path):
    """Without care, the first files that it opens would be its stdout and stderr."""
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "trainer.max_steps": 3, "trainer.val_check_interval": 3}
    words = [sys.executable, str(CLI), "fit", *arguments(settings, own, {"trainer.enable_progress_bar": True})]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words], capture_output=True, timeout=120)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")
    assert [step for step, _ in saved(tmp_path / "run" / "checkpoints")] == [3]


# --- folders of another user ---


@pytest.fixture
def closed():
    """A folder that only root can enter, in one that all can."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        inner = Path(folder, "inner")
        (inner / "feb2").mkdir(parents=True)
        (inner / "feb2" / "manifest.json").write_text("{}")
        inner.chmod(0o700)
        yield inner


def refused(function: Callable[..., object], *args: object) -> str:
    """The ConfigError of a call by a user without rights."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        try:
            function(*args)
        except ConfigError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with open(read, "rb") as said:
        return said.read().decode()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_what_another_user_may_not_read_is_a_setting(closed):
    told = f"--data.cache_dir: {closed} may not be read by this user; let its owner run chmod -R a+rX on it, or"
    assert refused(require_readable, closed).startswith(told)
    assert refused(require_readable, closed / "feb2").startswith(told)
    closed.chmod(0o755)
    (closed / "feb2").chmod(0o700)
    assert refused(TokenFiles, closed / "feb2", "train").startswith(told.replace(str(closed), f"{closed}/feb2"))
    said = refused(saved, closed / "feb2")
    assert said.endswith(" cannot be listed (Permission denied); choose a folder that you may read")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_run_below_a_folder_of_another_user_is_left_to_the_check_of_settings(closed):
    def enter():
        with run_lock.held(closed / "run"):
            raise ConfigError("reached")

    assert refused(enter) == "reached"
