"""Errors meant for the user: a line for each problem, no traceback (cli.main catches them)."""

import argparse
import errno
import os
import re
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A setting, a file or a combination of them is wrong.

    The message names the setting as typed, its value, what is allowed and what to do.
    """

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems = list(map(printable, problems))
        super().__init__("; ".join(self.problems))


def refuse(wrong: Iterable[str]) -> None:
    """Raises one ConfigError that lists all problems; does nothing if there are none."""
    if problems := list(wrong):
        raise ConfigError(*problems)


def wrong_kinds(takes: Callable[..., Any], given: Mapping[str, Any], prefix: str) -> list[str]:
    """Problems with `given` arguments of a wrong type: in a call from Python, nothing else checks them. Those without
    an annotation are skipped; `prefix` comes before each name in the message, e.g. --kd."""
    wanted = {name: hint for name, hint in _hints(takes).items() if name in given}
    return [
        f"{prefix}{name} {given[name]!r} must be {_kind_said(hint)}"
        for name, hint in wanted.items()
        if not _is_of(given[name], hint)
    ]


_hints = cache(get_type_hints)  # cached: some specs are created at every step


def _is_of(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_is_of(value, each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list | tuple | range) and all(_is_of(each, get_args(hint)[0]) for each in value)
    if hint in _NUMBERS:  # numpy's too
        return isinstance(value, _NUMBERS[hint]) and not isinstance(value, bool)
    if hint is bool:
        return type(value).__name__ == "bool"  # Python's or numpy's
    if hint is str:
        return isinstance(value, str | os.PathLike)
    return not isinstance(hint, type) or isinstance(value, hint)


_NUMBERS: dict[Any, type] = {int: Integral, float: Real}
_SAID = {int: "a whole number", float: "a number", str: "a string", bool: "True or False", NoneType: "None"}


def _kind_said(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return f"a list (each entry {_kind_said(get_args(hint)[0])})"
    return _SAID.get(hint) or " or ".join(map(_kind_said, get_args(hint))) or f"of class {hint.__name__}"


def once(messages: Iterable[str]) -> list[str]:
    """The messages, without those that are part of an earlier one."""
    kept: list[str] = []
    for message in messages:
        if not any(message in earlier for earlier in kept):
            kept.append(message)
    return kept


def of_others(messages: Iterable[str], settled: Iterable[str]) -> list[str]:
    """Drops problems that name a setting of `settled`: it was reset to its default, which the user did not give."""
    named = re.compile("|".join(rf"--{re.escape(name)}(?!\w)" for name in settled) or r"(?!)")
    return [each for each in messages if not named.search(each)]


def raised(looks: Iterable[Callable[[], object]]) -> list[str]:
    """The problems of the ConfigErrors that the calls raise."""
    said: list[str] = []
    for look in looks:
        try:
            look()
        except ConfigError as error:
            said += error.problems
    return said


def printable(text: str) -> str:
    """The text on one line, with control characters escaped: file names and data may contain any of them."""
    return "".join(c if c.isprintable() or c in _SPELLING else c.encode("unicode_escape").decode() for c in text)


_SPELLING = "\u200c\u200d\u3000"  # joiners, as in Persian and Hindi words and in emoji, and the space of Japanese


def printable_lines(text: str) -> str:
    """Like `printable`, but keeps line breaks, for text whose lines are our own."""
    return "\n".join(map(printable, text.split("\n")))


def width_of(text: str) -> int:
    """Columns of a terminal: two for a wide character (CJK), none for a mark on another one or what follows the first
    part of a Korean syllable."""
    shown = [c for c in text if unicodedata.category(c) not in ("Mn", "Me", "Cf") and not "\u1160" <= c <= "\u11ff"]
    return len(shown) + sum(unicodedata.east_asian_width(c) in "WF" for c in shown)


def padded(text: str, width: int, left: bool) -> str:
    """The text with spaces up to this width, behind it (`left`) or before it."""
    fill = " " * (width - width_of(text))
    return text + fill if left else fill + text


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host ran out of memory."""
    # not all devices raise torch.OutOfMemoryError, which is a RuntimeError, too
    said = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    typed = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # compare imports no torch
    return typed or (isinstance(error, RuntimeError) and any(text in str(error) for text in said))


_READING, _APART = ("predict", "validate", "test"), ("check", "export", "compare")  # verbs; others are fit's options


def going_on(verb: str | None) -> str:
    """The remedy for a command that was cut off; `verb` None is fit."""
    return "run the same command again" if verb in _READING + _APART else "continue with --ckpt_path last"


def of_machine(error: BaseException, verb: str | None = None) -> str | None:
    """The message for an error of a `verb` (None: fit) that the machine caused, with a remedy; None: not one that a
    user can fix."""
    again, why = going_on(verb), one_line(error, 200)
    if is_out_of_memory(error):
        why = f" ({why})" if why else ""  # Python's own error says nothing
        if verb in _APART:
            return f"out of memory{why}; free some memory and {again}"
        more = "" if verb in _READING else ", or set --model.activation_checkpointing true,"
        return f"out of memory{why}; halve --data.micro_batch_size (the result stays the same){more} and {again}"
    if "DataLoader worker (pid" in str(error):  # it was killed; an exception raised in a worker reads differently
        return (
            f"a data loading process was killed, usually for lack of memory ({why}); use fewer --data.num_workers, and "
            f"{again}"
        )
    if "unable to allocate shared memory" in str(error):
        return f"/dev/shm is too small ({why}); make it larger, or set --data.num_workers 0, and {again}"
    if "can't start new thread" in str(error):
        return f"the limit of threads is reached (ulimit -u, or the pids limit of a container); raise it and {again}"
    of_compiler = type(error).__module__.startswith(("torch._inductor", "torch._dynamo"))
    if of_compiler and "No space left" in str(error):
        return (
            "torch.compile has no room for the code that it writes; make room in the temporary folder (TMPDIR, or set "
            f"TORCHINDUCTOR_CACHE_DIR to another), and {again}"
        )
    if of_compiler and "failed to map" in str(error):
        return (
            "torch.compile cannot load the code that it writes, because its folder is mounted noexec; set "
            f"TORCHINDUCTOR_CACHE_DIR (or TMPDIR) to another folder, and {again}"
        )
    if "Early stopping conditioned on metric" in str(error):  # of a source that has no held-out text
        return f"--trainer.callbacks EarlyStopping: {why}; monitor val/ce"
    if "no kernel image" in str(error):
        return f"this torch build does not support this GPU ({why}); install one that does"
    return None


def failed_write(path: os.PathLike[str], reason: str, number: int | None, again: str = "try again") -> OSError:
    """The error to raise for a failed write, e.g. on a full disk, with a remedy.

    `path`: the intended file, not its temporary name. `number`: the errno of the system's reason, if there is one.
    `again`: what to do once the problem is fixed.
    """
    remedy = f"fix that and {again}"
    if number == errno.ENOENT:
        remedy = "was its folder removed? Otherwise choose another folder"
    elif number == errno.ELOOP:
        remedy = "a link is not followed there; remove it"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
        remedy = "choose another folder"
    elif number in (None, errno.ENOSPC, errno.EDQUOT):
        remedy = f"is the disk full? Make room and {again}"
    return OSError(f"{path} cannot be written ({reason}); {remedy}")


@contextmanager
def writing(path: os.PathLike[str], again: str = "try again") -> Iterator[None]:
    """Turns an OSError of the block, which writes `path`, into `failed_write`."""
    try:
        yield
    except OSError as error:
        raise failed_write(path, error.strerror or first_line(error), error.errno, again) from error


class MachineError(ConfigError):
    """Not a wrong setting: the same command may succeed. The exit code is that of a failed run."""

    exit_code = 1


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite; the last checkpoint is still good."""


NOT_A_NAME = f"is not valid {sys.getfilesystemencoding().upper()}; give another name"


def program() -> str:
    """The command as it was installed or started, for messages that name another one to run."""
    started = next(iter(getattr(sys, "argv", ())), "")  # there may be none in an embedded Python
    if started.endswith(os.path.join("salt_lightning", "__main__.py")):
        return "python -m salt_lightning"
    return "salt-lightning" if os.path.basename(started) == "salt-lightning" else "cli.py"


class VerbParser(argparse.ArgumentParser):
    """Argument parser of a verb that needs no trainer: an error is one line, without the usage text."""

    def __init__(self, verb: str, description: str) -> None:
        super().__init__(prog=f"{program()} {verb}", description=description)

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        if odd := [word for word in args if re.search("[\ud800-\udfff]", word)]:  # bytes that are no text
            self.error(f"{odd[0]} {NOT_A_NAME}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog.split()[-1]}: {message}")


def say(error: Exception) -> int:
    """Prints the error, each of its problems on a line; returns the exit code of the process: 2 for wrong settings, 1
    for other errors."""
    message = str(error) if isinstance(error, ConfigError | NonFiniteLossError) else one_line(error)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    lines = error.problems if isinstance(error, ConfigError) else [message]
    print(file=sys.stderr)  # ends the line of a progress bar
    for line in lines:
        print(f"error: {printable(line)}", file=sys.stderr)
    return error.exit_code if isinstance(error, ConfigError) else 1


def exit_code(stop: BaseException, in_python: bool) -> int:
    """The exit code after a Ctrl-C, or in Python after the parser's SystemExit; raises any other `stop` again, such as
    that of a cluster tool's own signal handler."""
    # Lightning turns a Ctrl-C in validate and test, and a second one in fit, into an exit with code 1
    cause = stop.__context__ if isinstance(stop, SystemExit) else stop
    if isinstance(cause, KeyboardInterrupt):
        number = signal.Signals(cause.args[0]) if cause.args else signal.SIGINT
        print(f"\nstopped by {number.name}", file=sys.stderr)
        return 128 + number
    code = getattr(stop, "code", None) or 0
    if in_python and code in (0, 2):  # the parser has printed its help or error; the caller continues
        return code
    raise stop


def require_length(max_steps: Any) -> None:
    """Raises ConfigError if a trainer's max_steps is not a number of optimizer steps, e.g. Lightning's -1."""
    if not isinstance(max_steps, Integral) or max_steps < 1:
        raise ConfigError(
            f"--trainer.max_steps: {max_steps} is not a valid run length; give a number of optimizer steps"
        )


class Stopped(RuntimeError):
    """A signal stopped the work; finished parts are kept, and the same command continues."""

    def __init__(self, number: signal.Signals, message: str) -> None:
        super().__init__(message)
        self.number = number


def first_line(error: BaseException) -> str:
    """The first line of the error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException | str, limit: int = 400) -> str:
    """The whole message on one line, cut to `limit` characters."""
    return re.sub(r"[^\S\u3000]+", " ", str(error)).strip()[:limit]  # the space of Japanese may be in a name


def counted(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"


def few(names: Iterable[object]) -> str:
    """The first three of the names, which may be many, on one line."""
    shown = list(map(str, names))
    return ", ".join(map(printable, shown[:3])) + (" ..." if len(shown) > 3 else "")
