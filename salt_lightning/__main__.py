"""The command `salt-lightning`, and `python cli.py`: what can go wrong before salt_lightning.cli is there to say it."""

import os
import signal
import sys

from salt_lightning import __version__


def main() -> int:
    """Runs the command line of this process; returns its exit code, that of cli.main."""
    if os.name == "nt":
        raise SystemExit("error: Windows alone is not supported; use WSL 2, or another Linux")
    if os.getpid() == 1:  # of a container: the kernel drops what the first process does not handle
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    if sys.argv[1:] == ["--version"]:
        print(f"salt_lightning {__version__}")
        return 0
    try:
        if sys.argv[1:2] == ["compare"]:
            return _compare(sys.argv[2:])
        if sys.flags.optimize > 1:
            raise SystemExit("error: -OO (PYTHONOPTIMIZE=2) takes docstrings away, which transformers' models need")
        from salt_lightning.cli import main as run
    except KeyboardInterrupt:  # the imports take seconds
        return 130
    except ModuleNotFoundError as missing:
        raise SystemExit(
            f"error: {missing.name} is not installed for this Python: `. .venv/bin/activate` (which `make demo` "
            "makes), or `pip install -e .`"
        ) from None
    except OSError as error:  # torch's compiler makes a folder as it is imported
        raise SystemExit(
            f"error: {error}; let TMPDIR, and TORCHINDUCTOR_CACHE_DIR where it is set, name folders that can be written"
        ) from None
    return run()


def _compare(args: list[str]) -> int:
    """Reads logs alone: without torch and Lightning, whose imports would be nearly all of its time."""
    from salt_lightning.compare import main as compare
    from salt_lightning.errors import ConfigError, say

    try:
        code = compare(args)
        print(end="", flush=True)
        return code
    except BrokenPipeError:  # of `compare ... | head`, after its files were written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would fail at the exit
        return 0
    except (ConfigError, OSError) as error:
        return say(error)


if __name__ == "__main__":
    raise SystemExit(main())
