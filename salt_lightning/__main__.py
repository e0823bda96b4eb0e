"""The commands `salt-lightning` and `python cli.py`: reports what can fail before salt_lightning.cli is imported."""

import atexit
import faulthandler
import gc
import locale
import logging
import os
import signal
import sys
from collections.abc import Callable

from salt_lightning import __version__
from salt_lightning.command.streams import open_streams, steady_streams


def main() -> int:
    """Runs the command line of this process; returns the exit code of cli.main."""
    open_streams()
    faulthandler.enable(2)  # else a process that crashes in a library's code ends without a word
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where it keeps a list of fonts, at each import
    if os.getpid() == 1:  # in a container: the kernel ignores signals that process 1 does not handle
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    if sys.argv[1:] == ["--version"]:
        with steady_streams():
            print(f"salt_lightning {__version__}")
        return 0
    if wrong := _wrong_start():
        return _refuse(wrong)
    if sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"  # -X utf8, too, for the processes that Lightning starts
    try:
        if sys.argv[1:2] == ["compare"]:
            return _compare(sys.argv[2:])
        if wrong := _wrong_ranks():
            return _refuse(wrong)
        run = _imported()
    except KeyboardInterrupt:  # the imports take seconds
        return 130
    except ModuleNotFoundError as missing:
        return _refuse(
            f"{missing.name} is not installed for this Python; run `. .venv/bin/activate` (`make demo` creates it), or "
            "`pip install -e .`"
        )
    except OSError as error:  # torch's compiler creates a folder when it is imported
        return _refuse(
            f"{error}; set TMPDIR (and TORCHINDUCTOR_CACHE_DIR, if you use it) to a folder that can be written"
        )
    return run()


def _refuse(why: str) -> int:
    print(f"error: {why}", file=sys.stderr)
    return 2


def _wrong_start() -> str:
    if os.name == "nt":
        return "Windows is not supported; use WSL 2, or Linux"
    if sys.flags.optimize > 1:
        return "-OO (PYTHONOPTIMIZE=2) removes docstrings, which transformers' models need"
    if (encoding := locale.getpreferredencoding(False)).lower() not in ("utf-8", "utf8"):
        # libraries would read settings in it, and write them, so that a prompt would be trained as other letters
        return f"Python takes files and names for {encoding} here, but settings and texts are UTF-8; set PYTHONUTF8=1"
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the current folder has been removed; cd to one that exists"
    return ""


def _wrong_ranks() -> str:
    """Lightning reads them while it is imported. A batch script that exports a variable of SLURM's tasks outside srun
    leaves one empty."""
    told = {name: os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")}
    if wrong := [f"{name} {value!r}" for name, value in told.items() if not value.isdecimal()]:
        return (
            f"{', '.join(wrong)} in the environment is no rank (0, 1, ...); unset it, or start the processes with "
            "torchrun or srun, which set it"
        )
    return ""


def _imported() -> Callable[[], int]:
    """cli.main. What the imports create stays until the end: searching it for garbage takes a seventh of their time,
    and more time later, e.g. when the teacher leaves."""
    gc.disable()
    try:
        from salt_lightning.cli import main
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # triton lists at exit what was not collected
        gc.enable()
    return main


def _compare(args: list[str]) -> int:
    """Runs compare without importing torch and Lightning, which would take most of its time."""
    from salt_lightning.compare import main as compare
    from salt_lightning.errors import ConfigError, say

    with steady_streams(expected=BrokenPipeError):  # of `compare ... | head`, after its files were written
        try:
            return compare(args)
        except (ConfigError, OSError) as error:
            return say(error)


if __name__ == "__main__":
    sys.exit(main())
