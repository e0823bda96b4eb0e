"""The commands `salt-lightning` and `python cli.py`: reports what can fail before salt_lightning.cli is imported."""

import atexit
import gc
import os
import signal
import sys
from collections.abc import Callable

from salt_lightning import __version__


def main() -> int:
    """Runs the command line of this process; returns the exit code of cli.main."""
    if os.name == "nt":
        raise SystemExit("error: Windows is not supported; use WSL 2, or Linux")
    if os.getpid() == 1:  # in a container: the kernel ignores signals that process 1 does not handle
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    if sys.argv[1:] == ["--version"]:
        print(f"salt_lightning {__version__}")
        return 0
    try:
        if sys.argv[1:2] == ["compare"]:
            return _compare(sys.argv[2:])
        _require_ranks()
        if sys.flags.optimize > 1:
            raise SystemExit("error: -OO (PYTHONOPTIMIZE=2) removes docstrings, which transformers' models need")
        run = _imported()
    except KeyboardInterrupt:  # the imports take seconds
        return 130
    except ModuleNotFoundError as missing:
        raise SystemExit(
            f"error: {missing.name} is not installed for this Python; run `. .venv/bin/activate` (`make demo` creates "
            "it), or `pip install -e .`"
        ) from None
    except OSError as error:  # torch's compiler creates a folder when it is imported
        raise SystemExit(
            f"error: {error}; set TMPDIR (and TORCHINDUCTOR_CACHE_DIR, if you use it) to a folder that can be written"
        ) from None
    return run()


def _require_ranks() -> None:
    """Lightning reads them while it is imported. A batch script that exports a variable of SLURM's tasks outside srun
    leaves one empty."""
    told = {name: os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")}
    if wrong := [f"{name} {value!r}" for name, value in told.items() if not value.isdecimal()]:
        raise SystemExit(
            f"error: {', '.join(wrong)} in the environment is no rank (0, 1, ...); unset it, or start the processes "
            "with torchrun or srun, which set it"
        )


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

    try:
        code = compare(args)
        print(end="", flush=True)
        return code
    except BrokenPipeError:  # of `compare ... | head`, after its files were written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the rest of the output would fail at exit
        return 0
    except (ConfigError, OSError) as error:
        return say(error)


if __name__ == "__main__":
    raise SystemExit(main())
