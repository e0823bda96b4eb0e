"""The command-line parser: an error is one line with the setting as typed, its value and what is allowed."""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import yaml
from jsonargparse import DefaultHelpFormatter, Namespace, get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from salt_lightning.command.settings import as_yaml, refuse_loops, wrong_precision
from salt_lightning.command.wrong_names import no_such
from salt_lightning.errors import ConfigError, one_line, problems_of, raised, refuse

_TYPES = {
    "int": "a whole number",
    "float": "a finite number",
    "PositiveFloat": "a finite number above 0",
    "bool": "true or false",
    "str": "text",
    "dict": "a mapping",
    "NoneType": "null",
}


class HelpFormatter(DefaultHelpFormatter):
    """Leaves out the lists of known subclasses, some of which this project does not use."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return re.sub(r",? ?known subclasses: [^)]*", "", super()._get_help_string(action))


_load_yaml = get_loader("yaml")


def _load(text: str) -> Any:
    """Reads YAML, but keeps a value that begins with # as text: YAML would silently read a comment, so null."""
    value = _load_yaml(text)
    return text if value is None and text.lstrip().startswith("#") and "\n" not in text else value


set_loader("yaml", _load, (yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """Reports errors on one line, without the usage text of some 70 lines."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # No abbreviations: --trainer.max_step would be taken for max_steps.
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": HelpFormatter, **kwargs})

    given: ClassVar[list[tuple[str, str]]] = []  # (name, value) of each setting as typed
    _one_by_one = False

    @classmethod
    def remember(cls, args: list[str]) -> None:
        """For errors, before parsing: jsonargparse changes the working directory while it reads a file."""
        cls.given = []
        with suppress(yaml.YAMLError, ValueError):  # e.g. a date that does not exist
            cls.given = list(_given(args))

    def error(self, message: str, ex: Exception | None = None) -> Any:
        asked = getattr(ex, "subcommand_parser", None) or self
        known, others = [action.dest for action in asked._actions], list[str]()
        if "run" not in known:  # this parses the settings of one class
            raise Unreadable(explain(message, known, self.given))
        said = explain(message, known)
        if asked._one_by_one:
            raise ConfigError(said)
        alone = [f"--{name}={value}" for name, value in self.given if _ALONE.fullmatch(f"--{name}")]
        asked._one_by_one = True  # jsonargparse stops at the first error, so parse the others one by one
        try:
            others = raised(partial(asked.parse_args, [word], defaults=False) for word in alone)
        finally:
            asked._one_by_one = False
        raise Unreadable("; ".join(dict.fromkeys([said, *others])))


class Unreadable(SystemExit):
    """Settings that cannot be read. Not an Exception: jsonargparse would take one for a wrong class, and say less."""


@contextmanager
def readable() -> Iterator[None]:
    """Turns Unreadable into ConfigError."""
    try:
        yield
    except Unreadable as error:
        raise ConfigError(str(error)) from None


def parse(parsers: Sequence[LightningArgumentParser], args: list[str]) -> tuple[Namespace, Namespace, list[str]]:
    """The settings of a command line; those given in it; the problems with those that cannot be read, left out of both.

    The first of the parsers parses; the others are those of its verbs.

    Raises:
        ConfigError: lists the problems, if the rest cannot be read either.
    """
    args = configs_first(args)
    check_configs(args, [action.dest for parser in parsers for action in parser._actions])
    Parser.remember(args)
    parser, problems = parsers[0], list[str]()
    with readable():
        try:
            config = parser.parse_args(args)
        except Unreadable as error:
            problems = problems_of(str(error))
            args = _without(args, _begun(str(error)))
            try:
                config = parser.parse_args(args)
            except Unreadable:
                raise error from None
        given = parser.parse_args(args, defaults=False)
    return config, given, problems + _comments(args, given)


def named(problems: Iterable[str]) -> set[str]:
    """The settings that the problems begin with or suggest."""
    return {
        name for each in problems for name in re.findall(r"(?:^|did you mean |no such setting; use )--([\w.]+)", each)
    }


def _begun(said: str) -> list[str]:
    """The settings that the problems of a message begin with."""
    return re.findall(r"(?:^|; )--([\w.]+)", said)


def _without(args: list[str], wrong: list[str]) -> list[str]:
    """A command line without these settings and those below them, typed or in its files."""
    kept, drops = [], False
    for word in args:
        name, _, value = word.partition("=")
        if name.startswith("--"):
            drops = _is_below(name.removeprefix("--"), wrong)
        if word.startswith("--config="):
            left = _kept(yaml.safe_load(_text(value)), "", wrong)
            word = f"--config={yaml.safe_dump(left, default_flow_style=True, width=sys.maxsize)}"
        if not drops:
            kept.append(word)
    return kept


def _kept(value: Any, prefix: str, wrong: list[str]) -> Any:
    if not isinstance(value, dict):
        return value
    below = {key: f"{prefix}{key}" for key in value}
    return {key: _kept(value[key], f"{name}.", wrong) for key, name in below.items() if not _is_below(name, wrong)}


def _is_below(name: str, others: list[str]) -> bool:
    return any(f"{name}.".startswith(f"{other}.") for other in others)


_VERBS = {
    "fit": "Trains a student: BASELINE, SALT, RKD or SALT_DS, depending on the settings; also fine-tunes.",
    "validate": "Measures a checkpoint's losses on the validation text; for a teacher, also each document's loss.",
    "test": "Does the same on the test text; for a fine-tuned student, also checks its answers.",
    "predict": "For SALT_DS: writes the teacher's loss and rank of every training token, and a report of the scores.",
}
# Beginnings of Lightning's descriptions of its trainer's methods, which jsonargparse cuts in the middle.
_OF_TRAINER = ("Perform one evaluation", "Runs the full", "Run inference")
_TRAINER = "Customize every aspect of training via flags"  # Lightning's title of its trainer's settings
_REFUSED = "Cannot be set in this project"
# Help texts where Lightning's own are not true here.
_WORDS = {
    "config": "YAML file of settings. Later files win over earlier ones, and command-line options win over all files.",
    "seed_everything": "Seed of initial weights, dropout and data order, unless --model.seed or --data.seed is given.",
    "ckpt_path": "A checkpoint (.ckpt), or last: the newest undamaged checkpoint in the run's folder.",
    "trainer.strategy": "auto, ddp, fsdp2, fsdp (FSDP1), or a class.",
    "trainer.logger": "Trackers in addition to TensorBoard in the run's folder, which compare reads. false: no log.",
    "trainer.gradient_clip_algorithm": "norm; clipping by value is not supported.",
    "trainer.gradient_clip_val": "Largest gradient norm of an optimizer step; null: no clipping.",
    "trainer.num_sanity_val_steps": "Validation batches before the first step.",
    "trainer.max_steps": "Optimizer steps of the run.",
    "trainer.precision": "32-true, bf16-mixed or bf16-true.",
    "trainer.val_check_interval": "Optimizer steps between validations (a whole number), or a share of the run (0..1).",
    "trainer.log_every_n_steps": "Log every so many optimizer steps.",
    "weights_only": "Not used: a checkpoint is never unpickled.",
    "trainer.accumulate_grad_batches": f"{_REFUSED}: it follows from --data.global_batch_size.",
    "trainer.barebones": f"{_REFUSED}: it would leave no log and no checkpoint.",
    "trainer.check_val_every_n_epoch": f"{_REFUSED}: use --trainer.val_check_interval.",
    "trainer.default_root_dir": f"{_REFUSED}: use --run.",
    "trainer.enable_checkpointing": f"{_REFUSED}: use --checkpoint.*.",
    "trainer.fast_dev_run": f"{_REFUSED}: use the verb check, or few --trainer.max_steps.",
    "trainer.limit_predict_batches": f"{_REFUSED}: use a small --data.source.",
    "trainer.limit_train_batches": f"{_REFUSED}: use --trainer.max_steps.",
    "trainer.max_epochs": f"{_REFUSED}: use --trainer.max_steps.",
    "trainer.min_epochs": f"{_REFUSED}: use --trainer.min_steps.",
    "trainer.overfit_batches": f"{_REFUSED}: use a small --data.source.",
}


def reword(action: argparse.Action, parsers: dict[str, LightningArgumentParser]) -> None:
    """Makes `--help` say what Lightning's verbs (`action` lists them) and settings do in this project."""
    for verb in action._choices_actions:  # type: ignore[attr-defined]
        verb.help = _VERBS.get(verb.dest, verb.help)
    for verb, parser in parsers.items():
        parser.description = _VERBS[verb]
        for setting in parser._actions:
            setting.help = _WORDS.get(setting.dest, setting.help)
            if setting.dest.endswith(".help"):  # these options work, but fill a page
                setting.help = argparse.SUPPRESS
            elif setting.dest.startswith("trainer."):  # Lightning's texts name its own defaults, not ours
                setting.help = re.sub(r"\s*Default: ``[^`]*``\.?$", "", setting.help or "")
        parser.prog = parser.prog.replace(" [options]", "")
        parser.usage = "%(prog)s [--config FILE]... [--SETTING VALUE]..."  # listing all settings would take 120 lines
        groups: list[Any] = parser._action_groups  # type: ignore[assignment]
        for group in groups:
            if (group.title or "").startswith(_OF_TRAINER):
                group.title = f"Options of {verb} itself"
        groups.sort(key=lambda group: group.title == _TRAINER)  # Lightning's own settings come last


def explain(message: str, known: list[str], given: Iterable[tuple[str, str]] = ()) -> str:
    """Rewrites an error of jsonargparse as one line in the user's terms, with the nearest of the known settings.

    `given`: for an error in the settings of a class, (name, value) of what was typed; its parser knows only last parts.
    """
    line = re.sub(r" value: (None|True|False)$", lambda m: f" value: {as_yaml(m[1])}", " ".join(message.split()))
    if found := re.match(r"Parser key \"([^\"]+)\"(\S*): (.*)", line):
        name, rest = f"--{_prefix(found[1], given, line)}{found[1]}{found[2]}", found[3]
        if part := re.search(r"NestedArg\(key='([^']+)', val='?(.*?)'?\)", rest):
            said = f"{name}.{part[1]} {part[2]} is a setting of a class, but {name} names no class"
            example = ", e.g. FSDP2 for fsdp2, DDPStrategy for ddp" if name == "--trainer.strategy" else ""
            return f"{said}; give the class name{example}"
        if (asked := re.search(r"Given value: ?(\S*)$", rest)) and name == "--trainer.precision":
            return wrong_precision(asked[1])[0]  # Lightning's list has values that no run supports
        if union := re.search(r"Subtypes: [\[(](.*?)[\])] Errors:.*Given value: (.*)$", rest):
            return f"{name} {union[2]} must be {_type_names(union[1])}{_why_no_class(name, union[2], rest)}"
        if union := re.search(r" Given value: (.*)$", rest):
            return f"{name} {union[1]} is not one of the allowed values (see --help)"
        if single := re.match(r"Expected an? (.*?)\. Got value: (.*)$", rest):
            return f"{name} {single[2]} must be {_type_names(single[1])}"
        if group := re.match(r"Unable to load config ['\"](.*?)['\"] - ", rest):
            return f"{name} {group[1]} must be a mapping of its settings (see --help); leave it out for the defaults"
        return f"{name}: {rest}"
    wrong = re.search(r"does not accept option '([^']+)'|unrecognized arguments: --([^\s=]+)", line)
    if wrong:
        return no_such(wrong[1] or wrong[2], known)
    if (lacking := re.match(r"the following arguments are required: (\w+)(.*)", line)) and lacking[1] != "subcommand":
        return f"a class of --trainer.* requires {lacking[1]}{lacking[2]}; give it as .init_args.{lacking[1]}"
    if other := re.match(r"Option '([^']+)' is not accepted", line):
        if prefix := _prefix(other[1], given, line):
            return no_such(other[1], [name for name in known if name != "help"], prefix)
        return f"a class of --trainer.* has no argument {other[1]}"
    if line.startswith("unrecognized arguments: "):
        line += "; put a glob in quotes, 'my_text/*.jsonl', or the shell expands it to several words"
    return line


def _prefix(last: str, given: Iterable[tuple[str, str]], line: str) -> str:
    """What was typed before the last part of the name of a class's setting; "" if it was not typed like that.

    If several classes have such a setting, the one whose value the error (`line`) gives.
    """
    found = [(name, value) for name, value in given if re.match(rf"{_CLASSES}\.", name) and name.endswith(f".{last}")]
    return max(found, key=lambda each: line.endswith(f" value: {each[1]}"))[0].removesuffix(last) if found else ""


def _why_no_class(name: str, value: str, rest: str) -> str:
    """What is wrong with a value that names a class, if the setting takes a class; else an empty string."""
    if not re.match(r"--trainer\.(logger|callbacks|plugins)\b", name) or not re.fullmatch(r"[A-Za-z_][\w.]*", value):
        return ""
    problem = re.search(r"Problem with given class_path '[^']+': (.*?) - ", rest)
    return f": {problem[1]}" if problem else "; no such class is installed; give its full name, package.module.Class"


def _type_names(text: str) -> str:
    """`<class 'int'>, <class 'NoneType'>` -> "a whole number or null"."""
    literals = re.findall(r"'([^']*)'", text) if "Literal" in text else []
    classes = re.findall(r"<class '(?:\w+\.)*(\w+)'>", text)
    lists = re.findall(r"(?:list|List|Sequence)\[(\w+)\]", text)
    names = [name for name in literals if name not in classes] + [_TYPES.get(name, name) for name in classes]
    names += [f"a list of {_TYPES.get(name, name).removeprefix('a ')}s" for name in lists]
    return " or ".join(dict.fromkeys(names)) or text


# --- all problems at once ---

_CLASSES = r"trainer\.(?:strategy|callbacks|logger|plugins|profiler)"  # they take a class with its own settings
# Matches settings that can be parsed alone: not those, nor those that stop the parser.
_ALONE = re.compile(rf"--(?!config\b|print_config|help|{_CLASSES}\b)([\w.]+)")


def _given(args: list[str]) -> Iterator[tuple[str, str]]:
    """(name, value as typed) of each setting of a command line and its files."""
    for file in _files(args):
        yield from _leaves(yaml.safe_load(_text(file)), "")
    for name, value in _typed(args):
        leaves = [(name, value)]
        if re.fullmatch(_CLASSES, name):
            with suppress(yaml.YAMLError, ValueError):  # the parser will refuse it
                leaves = _leaves(yaml.safe_load(value), name)
        yield from leaves


def _typed(args: list[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of each setting of a command line that has a value."""
    for word, following in pairwise([*args, "--"]):
        name, joined, value = word.partition("=")
        if name.startswith("--") and (joined or not following.startswith("--")):
            yield name.removeprefix("--"), value if joined else following


def _leaves(value: Any, name: str) -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list) and re.fullmatch(_CLASSES, name):
        return [leaf for inner in value for leaf in _leaves(inner, name)]
    return [(name, value if isinstance(value, str) else json.dumps(value, default=str, skipkeys=True))]


def to_defaults(said: str, settings: Namespace, parser: LightningArgumentParser) -> set[str]:
    """Resets each setting that begins a problem of `said` to its default; returns those that it changed.

    For a setting of a class, resets the one that names the class.
    """
    found = [re.sub(rf"^({_CLASSES})\..*", r"\1", name) for name in _begun(said)]
    defaults = parser.get_defaults() if found else Namespace()
    names = [name for name in found if name in settings and name in defaults]
    changed = {name for name in names if settings[name] != defaults[name]}
    for name in changed:
        settings[name] = defaults[name]
    return changed


# --- the files of --config, before jsonargparse reads them ---


def check_configs(args: list[str], known: list[str]) -> None:
    """Reads every `--config FILE` of a command line, whose settings are `known`.

    Raises:
        ConfigError: a file is missing, a folder, or not a YAML mapping in UTF-8; it has a setting twice, of which
            YAML would silently take the last; it has an unknown empty group, which jsonargparse ignores; or a value of
            the command line contains itself.
    """
    files = [value for value in _files(args) if not value.lstrip().startswith("{")]  # others contain settings
    looks = [partial(_check_config, file, known) for file in dict.fromkeys(files)]
    refuse(raised([*looks, *(partial(refuse_loops, *typed) for typed in _typed(args))]))


def _comments(args: list[str], given: Namespace) -> list[str]:
    """Problems with typed values that YAML has read as comments, and so as null."""
    found = given[given.subcommand] if given.get("subcommand") else given
    return [
        f"--{name} {value!r} is a comment in YAML, so it reads as null; give null, or a value"
        for name, value in _typed(args)
        if value.lstrip().startswith("#") and name in found and found[name] is None
    ]


def configs_first(args: list[str]) -> list[str]:
    """A command line with its files first, as --config=FILE: typed settings win wherever they stand, and later files
    win. In jsonargparse, a file wins over settings typed before it.
    """
    files: list[str] = []
    rest: list[str] = []
    words = iter(args)
    for word in words:
        apart = word in ("--config", "-c")
        joined = re.match(r"(?:--config=|-c=?)(.+)", word, re.DOTALL)
        value = next(words, None) if apart else joined and joined[1]
        if value is None:
            rest.append(word)
        else:
            files.append(f"--config={value}")
    verb = 1 if rest and not rest[0].startswith("-") else 0
    return [*rest[:verb], *files, *rest[verb:]]


def _files(args: list[str]) -> list[str]:
    """The files, or settings in braces, of a command line from `configs_first`."""
    return [word.removeprefix("--config=") for word in args if word.startswith("--config=")]


def _text(file: str) -> str:
    return file if file.lstrip().startswith("{") else Path(file).read_text(encoding="utf-8")


def _check_config(path: str, known: list[str]) -> None:
    setting = f"--config {path}"
    if not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "a pipe or a device, which cannot be read again"
        what = f"is {kind}" if os.path.exists(path) else "does not exist"
        raise ConfigError(f"{setting} {what}; give a YAML file (those in configs/ come with the repository)")
    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, yaml.SafeLoader)
        zeros = [token for token in yaml.scan(text) if "\0" in getattr(token, "value", "")]
        yaml.safe_load(text)  # for tags and values that do not suit theirs
        keys = list(_keys(node, ""))
    except RecursionError as error:
        raise ConfigError(f"{setting}: settings contain themselves, or are nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{setting} is not UTF-8 text; give a YAML file, e.g. configs/salt.yaml") from error
    except (yaml.YAMLError, ValueError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        if tag := re.search(r"constructor for the tag '(.*)'", str(problem)):
            typed = tag[1].replace("tag:yaml.org,2002:", "!!")
            raise ConfigError(f"{setting}{where}: tags such as {typed} are not supported; remove them") from error
        raise ConfigError(f"{setting}{where}: not valid YAML ({one_line(problem)})") from error
    if zeros:  # jsonargparse would take it for a file name
        raise ConfigError(f"{setting}, line {zeros[0].start_mark.line + 1}: a value contains a zero byte; remove it")
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{setting} is not a mapping of settings; write lines such as 'run: runs/mine'")
    empty = [
        (key.start_mark.line + 1, f"{key.value} is empty; indent its settings below it, or remove it")
        for key, value in node.value
        if value.tag.endswith(":null") and any(name.startswith(f"{key.value}.") for name in known)
    ]
    unknown = [no_such(name, known) for name in _empty(node, "") if not _means(name, known)]
    refuse([*(f"{setting}, line {line}: {problem}" for line, problem in sorted([*empty, *_twice(keys)])), *unknown])


def _means(name: str, known: list[str]) -> bool:
    """Whether it is a setting, a group of settings, or part of a setting's value."""
    groups = {setting.rpartition(".")[0] for setting in known if not setting.endswith(".help")}
    parents = {name[:i] for i, letter in enumerate(name) if letter == "."}
    return name in known or name in groups or bool(parents & (set(known) - groups))


def _empty(node: Any, prefix: str) -> list[str]:
    """Dotted names of the keys that hold an empty mapping."""
    found = []
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        name = f"{prefix}{getattr(key, 'value', '')}"
        empty = value.tag.endswith(":null") or (isinstance(value, yaml.MappingNode) and not value.value)
        found += [name] if empty else _empty(value, f"{name}.")
    return found


def _twice(keys: list[tuple[str, str, int]]) -> Iterator[tuple[int, str]]:
    """(line, problem) of each key that occurs twice, or both dotted and within its group; one would be lost."""
    names = {name for name, *_ in keys}
    seen = set()
    for name, own, line in keys:
        if name in seen and own != "<<":
            yield line, f"{name} is set twice; remove one"
        seen.add(name)
        groups = [name[: len(name) - len(own) + i] for i, letter in enumerate(own) if letter == "."]
        if group := next((group for group in groups if group in names), None):
            yield line, f"{name} is given in addition to the mapping {group}; move it into that mapping"


def _keys(node: Any, prefix: str) -> Iterator[tuple[str, str, int]]:
    """(dotted name, the key itself, line) of each key, in order."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        own = str(getattr(key, "value", ""))
        yield f"{prefix}{own}", own, key.start_mark.line + 1
        if own != "<<":  # merged keys may repeat others
            yield from _keys(value, f"{prefix}{own}.")
