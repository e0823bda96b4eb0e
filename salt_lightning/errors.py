"""The errors a user is meant to see: one line, no traceback (cli.main catches them)."""

import argparse
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A setting, a file or a combination of them is wrong.

    The message names the setting as typed, its value, what is allowed and what to do.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def refuse(wrong: Iterable[str]) -> None:
    """Raises ConfigError with all that is wrong; nothing where nothing is."""
    if said := "; ".join(wrong):
        raise ConfigError(said)


def wrong_kinds(takes: Callable[..., Any], given: Mapping[str, Any], prefix: str) -> list[str]:
    """Arguments that are of no kind that a function or a class takes: from Python, nobody else looks at them.

    Args:
        takes: what its annotations say; names without one are passed over.
        given: values by name.
        prefix: of the settings that the names are.
    """
    wanted = {name: hint for name, hint in _hints(takes).items() if name in given}
    return [
        f"{prefix}{name} {given[name]!r} must be {_kind_said(hint)}"
        for name, hint in wanted.items()
        if not _is_of(given[name], hint)
    ]


_hints = cache(get_type_hints)  # some specs are made at every step


def _is_of(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_is_of(value, each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list | tuple | range) and all(_is_of(each, get_args(hint)[0]) for each in value)
    if hint in _NUMBERS:  # numpy's, too
        return isinstance(value, _NUMBERS[hint]) and not isinstance(value, bool)
    if hint is bool:
        return type(value).__name__ == "bool"  # Python's, and numpy's
    if hint is str:
        return isinstance(value, str | os.PathLike)
    return not isinstance(hint, type) or isinstance(value, hint)


_NUMBERS: dict[Any, type] = {int: Integral, float: Real}
_SAID = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", NoneType: "None"}


def _kind_said(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return f"a list (each entry {_kind_said(get_args(hint)[0])})"
    return _SAID.get(hint) or " or ".join(map(_kind_said, get_args(hint))) or f"of class {hint.__name__}"


def once(messages: Iterable[str]) -> list[str]:
    """Those that no earlier one holds already."""
    kept: list[str] = []
    for message in messages:
        if not any(message in earlier for earlier in kept):
            kept.append(message)
    return kept


def of_others(messages: Iterable[str], settled: Iterable[str]) -> list[str]:
    """Problems without those that name a setting which stands at its default by now: nobody has asked for that."""
    named = re.compile("|".join(rf"--{re.escape(name)}(?!\w)" for name in settled) or r"(?!)")
    parts = (re.split(r"; (?=--)", message) for message in messages)
    kept = ("; ".join(part for part in problems if not named.search(part)) for problems in parts)
    return [said for said in kept if said]


def raised(looks: Iterable[Callable[[], object]]) -> list[str]:
    """What each of them refuses."""
    said = []
    for look in looks:
        try:
            look()
        except ConfigError as error:
            said.append(str(error))
    return said


def printable(text: str) -> str:
    """One line that does nothing to a terminal: a file's name may hold line ends, and text any escape sequence."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """The same of a text whose lines are ours."""
    return "\n".join(map(printable, text.split("\n")))


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device, or of the host."""
    import torch  # not above: compare speaks through this file, too, and torch takes seconds

    # libraries and the allocators of CPUs and of MPS have no type of error for it
    said = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    typed = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return typed or (isinstance(error, RuntimeError) and any(text in str(error) for text in said))


def of_machine(error: BaseException) -> str | None:
    """What to do about an error of the machine that a run is on; None: none that a user could do something about."""
    if is_out_of_memory(error):
        return (
            f"out of memory ({one_line(error, 200)}); halve --data.micro_batch_size (the result stays the same), or "
            "set --model.activation_checkpointing true, and go on with --ckpt_path last"
        )
    if "DataLoader worker (pid" in str(error):  # not what one of them has raised
        return (
            f"a process that loads data was killed, as it happens for want of memory ({one_line(error, 200)}); give "
            "fewer --data.num_workers, and go on with --ckpt_path last"
        )
    if "no kernel image" in str(error):
        return f"this torch has no code for this card ({one_line(error, 200)}); install a build of torch that has"
    return None


def failed_write(path: os.PathLike[str], reason: str, number: int | None, again: str = "do it again") -> OSError:
    """What is said of a write that failed, as on a full disk.

    Args:
        path: what was to be there, whatever it was called while it was made.
        reason: what the system said.
        number: its errno, where there is one.
        again: how to go on when that is mended.
    """
    remedy = f"mend that and {again}"
    if number in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
        remedy = "choose another folder"
    elif number in (None, errno.ENOSPC, errno.EDQUOT):
        remedy = f"is the disk full? Make room and {again}"
    return OSError(f"{path} cannot be written ({reason}); {remedy}")


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite; the last checkpoint is still good."""


def of_process(traceback: str) -> Exception | None:
    """The error of ours that another process has ended with; None: it is none of them."""
    name, _, message = traceback.rstrip().rpartition("\n")[2].partition(": ")
    kinds = {f"{kind.__module__}.{kind.__name__}": kind for kind in (ConfigError, NonFiniteLossError)}
    return kinds[name](message) if name in kinds else None


class VerbParser(argparse.ArgumentParser):
    """Arguments of a verb that needs no trainer: what is wrong with them is one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog.split()[-1]}: {message}")


def say(error: Exception) -> int:
    """Prints the error as one line; returns the exit code of the process: 2 for one of the settings, 1 for others."""
    message = str(error) if isinstance(error, ConfigError | NonFiniteLossError) else one_line(error)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    print(f"\nerror: {printable(message)}", file=sys.stderr)  # on a line of its own, after a progress bar
    return 2 if isinstance(error, ConfigError) else 1


def exit_code(stop: BaseException, in_python: bool) -> int:
    """What ends the command by a KeyboardInterrupt or a SystemExit; one that says something else is raised again."""
    # Lightning makes an exit with code 1 of a Ctrl-C in validate and test, and of a second one in fit
    cause = stop.__context__ if isinstance(stop, SystemExit) else stop
    if isinstance(cause, KeyboardInterrupt):
        number = signal.Signals(cause.args[0]) if cause.args else signal.SIGINT
        print(f"\nstopped by {number.name}", file=sys.stderr)
        return 128 + number
    code = getattr(stop, "code", None) or 0
    if in_python and isinstance(code, int):  # of a parser, which has spoken: a caller has more to do
        return code
    raise stop


def require_length(max_steps: Any) -> None:
    """Raises ConfigError where a trainer's max_steps is no number of optimizer steps, as Lightning's -1."""
    if not isinstance(max_steps, Integral) or max_steps < 1:
        raise ConfigError(f"--trainer.max_steps: {max_steps} is no length of a run; give optimizer steps")


class Stopped(RuntimeError):
    """A signal ended the work; what was done is kept, and the same command goes on with the rest."""

    def __init__(self, number: signal.Signals, message: str) -> None:
        super().__init__(message)
        self.number = number


def first_line(error: BaseException) -> str:
    """The error's message, cut to one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException | str, limit: int = 400) -> str:
    """The whole message as one line, cut to so many characters."""
    return " ".join(str(error).split())[:limit]


def few(names: Iterable[object]) -> str:
    """The first three of a list that may be long."""
    shown = list(map(str, names))
    return ", ".join(shown[:3]) + (" ..." if len(shown) > 3 else "")
