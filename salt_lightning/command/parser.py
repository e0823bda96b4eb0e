"""The command-line parser: a problem is one line with the setting as typed, its value and what is allowed."""

import argparse
import ast
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, ClassVar

import yaml
from jsonargparse import DefaultHelpFormatter, Namespace, get_loader, set_loader, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from salt_lightning.command.command_line import (
    CLASSES,
    check_configs,
    configs_first,
    given_in,
    misread,
    no_mapping,
    without,
)
from salt_lightning.command.settings import GROUPS, REFUSED, as_yaml, in_brief, wrong_precision
from salt_lightning.command.wrong_names import no_such
from salt_lightning.errors import ConfigError, program, raised, refuse

_TYPES = {
    "int": "a whole number",
    "float": "a finite number",
    "PositiveFloat": "a finite number above 0",
    "bool": "true or false",
    "str": "text",
    "dict": "a mapping",
    "NoneType": "null",
    "timedelta": "a time as H:MM:SS",
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
# Lightning lets jsonargparse fetch an address that is given for a group of settings or for a class.
set_parsing_settings(config_read_mode_fsspec_enabled=False)


class Parser(LightningArgumentParser):
    """Reports errors on a line each, without the usage text of some 70 lines."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # No abbreviations: --trainer.max_step would be taken for max_steps.
        super().__init__(
            *args, **{"allow_abbrev": False, "formatter_class": HelpFormatter, "prog": program(), **kwargs}
        )
        # argparse would take -1e-3 for an option
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)

    given: ClassVar[list[tuple[str, str]]] = []  # (name, value) of each setting as typed
    _one_by_one = False
    _class_name = ""  # of the class whose settings this parses

    def add_class_arguments(self, theclass: Any, *args: Any, **kwargs: Any) -> list[str]:
        self._class_name = theclass.__name__
        return super().add_class_arguments(theclass, *args, **kwargs)

    @classmethod
    def remember(cls, args: list[str]) -> None:
        """For errors, before parsing: jsonargparse changes the working directory while it reads a file."""
        cls.given = []
        with suppress(yaml.YAMLError, ValueError):  # e.g. a date that does not exist
            cls.given = list(given_in(args))

    def error(self, message: str, ex: Exception | None = None) -> Any:
        asked = getattr(ex, "subcommand_parser", None) or self
        known, others = [action.dest for action in asked._actions], list[str]()
        if "run" not in known:  # this parses the settings of one class
            raise Unreadable(explain(message, known, self.given, self._class_name))
        said = explain(message, known)
        if asked._one_by_one:
            raise ConfigError(said)
        alone = [f"--{name}={value}" for name, value in self.given if _ALONE.fullmatch(f"--{name}")]
        asked._one_by_one = True  # jsonargparse stops at the first error, so parse the others one by one
        try:
            others = raised(partial(asked.parse_args, [word], defaults=False) for word in alone)
        finally:
            asked._one_by_one = False
        raise Unreadable(*dict.fromkeys([said, *others]))


class Unreadable(SystemExit):
    """Settings that cannot be read. Not an Exception: jsonargparse would take one for a wrong class, and say less."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@contextmanager
def readable() -> Iterator[None]:
    """Turns Unreadable into ConfigError."""
    try:
        yield
    except Unreadable as error:
        raise ConfigError(*error.problems) from None
    except UnicodeDecodeError as error:  # jsonargparse has read the file that a value of a group names
        raise ConfigError(
            "a file is named where a mapping of settings belongs (model, model.teacher, data, kd ...), and it is not "
            "text; for a checkpoint, use --model.teacher.path or --model.student.path"
        ) from error


def parse(parsers: Sequence[LightningArgumentParser], args: list[str]) -> tuple[Namespace, Namespace, list[str]]:
    """The settings of a command line; those given in it; the problems with those that cannot be read, left out of both.

    The first of the parsers parses; the others are those of its verbs.

    Raises:
        ConfigError: lists the problems, if the rest cannot be read either; or there is no verb.
    """
    if (rest := [word for word in args if not _PRINTS.fullmatch(word)]) != args:  # would exit before others are read
        refuse(parse(parsers, rest)[2])
    args = configs_first(args)
    if (verbs := parsers[0]._subcommands_action) and (not args or args[0].startswith("-")) and args[:1] not in _HELP:
        raise ConfigError(f"a verb comes first, one of {', '.join(verbs.choices)}; then its settings")
    ignored = check_configs(args, [action.dest for parser in parsers for action in parser._actions])
    Parser.remember(args)
    parser, problems = parsers[0], list[str]()
    with readable():
        while True:  # leaving out some may show others
            try:
                config, given = parser.parse_args(args), parser.parse_args(args, defaults=False)
                return config, given, ignored + problems + misread(args, given) + _nulls(config, parser)
            except Unreadable as error:
                if problems and _NO_MAPPING in str(error):  # of a file named in a file: no longer beside it
                    raise Unreadable(*ignored, *problems) from None
                problems += error.problems
                left = without(args, _begun(error.problems))
                if left == args:
                    raise Unreadable(*dict.fromkeys(ignored + problems)) from None
                args = left
                Parser.remember(args)


_HELP = (["-h"], ["--help"])
_PRINTS = re.compile(r"--print_config(=.*)?", re.DOTALL)


def named(problems: Iterable[str]) -> set[str]:
    """The settings that the problems begin with or suggest."""
    return {
        name for each in problems for name in re.findall(r"(?:^|did you mean |no such setting; use )--([\w.]+)", each)
    }


def _begun(problems: Iterable[str]) -> list[str]:
    """The settings that the problems begin with."""
    return [setting[1] for each in problems if (setting := re.match(r"--([\w.]+)", each))]


_NO_MAPPING = " must be a mapping of its settings"


_VERBS = {
    "fit": "Trains a student: BASELINE, SALT, RKD or SALT_DS, depending on the settings; also fine-tunes.",
    "validate": "Measures a checkpoint's losses on the validation text; for a teacher, also each document's loss.",
    "test": "Does the same on the test text; for a fine-tuned student, also checks its answers.",
    "predict": "For SALT_DS: writes the teacher's loss and rank of every training token, and a report of the scores.",
}
# Beginnings of Lightning's descriptions of its trainer's methods, which jsonargparse cuts in the middle.
_OF_TRAINER = ("Perform one evaluation", "Runs the full", "Run inference")
_TRAINER = "Customize every aspect of training via flags"  # Lightning's title of its trainer's settings


# Help texts where Lightning's own are not true here.
_WORDS = {
    **{f"trainer.{name}": f"Cannot be set in this project: {in_brief(name)}." for name in REFUSED},
    "config": "YAML file of settings. Later files win over earlier ones, and command-line options win over all files.",
    "seed_everything": "Seed of initial weights, dropout and data order, unless --model.seed or --data.seed is given.",
    "ckpt_path": "A checkpoint (.ckpt), or last: the newest undamaged checkpoint in the run's folder.",
    "trainer.strategy": "auto, ddp, fsdp2, fsdp (FSDP1), or a class.",
    "trainer.logger": "Trackers in addition to TensorBoard in the run's folder, which compare reads. false: no log.",
    "trainer.gradient_clip_algorithm": "norm; clipping by value is not supported.",
    "trainer.gradient_clip_val": "Largest gradient norm of an optimizer step; null: no clipping.",
    "trainer.num_sanity_val_steps": "Validation batches before the first step.",
    "trainer.max_steps": "Optimizer steps of the run.",
    "trainer.precision": "32-true or bf16-mixed. bf16-true also keeps the weights in bf16, which trains worse.",
    "trainer.val_check_interval": "Optimizer steps between validations (a whole number), or a share of the run (0..1).",
    "trainer.log_every_n_steps": "Log every so many optimizer steps.",
    "weights_only": "Not used: a checkpoint is never unpickled.",
    "trainer.limit_test_batches": "0: no test. Other limits: use --data.val_rows.",
    "trainer.limit_val_batches": "0: no validation. Other limits: use --data.val_rows.",
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


def explain(message: str, known: list[str], given: Iterable[tuple[str, str]] = (), class_name: str = "") -> str:
    """Rewrites an error of jsonargparse as one line in the user's terms, with the nearest of the known settings.

    `given`: for an error in the settings of the class `class_name`, (name, value) of what was typed; its parser knows
    only last parts.
    """
    line = " ".join(message.split())
    if line.endswith(" value:"):
        line += " ''"
    if not line.endswith(" <class 'str'> Given value: None"):  # else, None was typed, which YAML reads as text
        line = re.sub(r" value: (None|True|False)$", lambda m: f" value: {as_yaml(m[1])}", line)
    if found := re.match(r"Parser key \"([^\"]+)\"(\S*): (.*)", line):
        name, rest = f"--{_prefix(found[1], given, line)}{found[1]}{found[2]}", found[3]
        below = re.escape(name.removeprefix("--"))  # the error is within a mapping
        if inner := re.match(rf"Unable to load config .*? - (Parser key \"{below}\..*)", rest):
            return explain(inner[1], known, given, class_name)
        part = re.search(r"NestedArg\(key='([^']+)', val='?(.*?)'?\)", rest)
        if part and not re.fullmatch(f"--{CLASSES}", name):
            return f"{name}.{part[1]}: there is no such setting, as {name} is no group of them"
        if part:
            said = f"{name}.{part[1]} {part[2]} is a setting of a class, but {name} names no class"
            example = ", e.g. FSDP2 for fsdp2, DDPStrategy for ddp" if name == "--trainer.strategy" else ""
            return f"{said}; give the class name{example}"
        if (asked := re.search(r"Given value: ?(\S*)$", rest)) and name == "--trainer.precision":
            return wrong_precision(asked[1])[0]  # Lightning's list has values that no run supports
        if union := re.search(r"Subtypes: [\[(](.*?)[\])] Errors:.*Given value: (.*)$", rest):
            if misplaced := _misplaced(name, union[2]):
                return misplaced
            return f"{_must_be(name, union[2], _type_names(union[1]))}{_why_no_class(name, rest)}"
        if union := re.search(r" Given value: (.*)$", rest):
            return f"{name} {union[1]} is not one of the allowed values (see --help)"
        if dotted := re.search(r"Got value: Namespace\((\w+)=", rest):  # on the command line, this works
            last = name.rpartition(".")[2]
            return f"{name}.{dotted[1]}: in a file, indent {dotted[1]} below {last}:, instead of joining them by a dot"
        if single := re.match(r"Expected an? (.*?)\. Got value: (.*)$", rest):
            return _must_be(name, single[2], _type_names(single[1]))
        if group := re.match(r"Unable to load config ['\"](.*?)['\"] - ", rest):
            return no_mapping(name, group[1], known)
        return f"{name}: {rest}"
    wrong = re.search(r"(?:^Group '(.+)' )?does not accept option '([^']+)'|unrecognized arguments: --([^\s=]+)", line)
    if wrong:
        return no_such(f"{wrong[1]}.{wrong[2]}" if wrong[1] else wrong[2] or wrong[3], known)
    if (lacking := re.match(r"the following arguments are required: (\w+)(.*)", line)) and lacking[1] != "subcommand":
        of_class = (name for name, value in given if value.rpartition(".")[2] == class_name)
        name = next(of_class, "trainer.*").removesuffix(".class_path")
        others = [value for each, value in given if each.removesuffix(".class_path") == name]
        where = f"as --{name}.init_args.{lacking[1]}"
        if others and others[-1].rpartition(".")[2] != class_name:  # in a list, that is a setting of the last class
            where = f"in the list, below init_args of {class_name}"
        return f"--{name} {class_name} requires {lacking[1]}{lacking[2]}; give it {where}"
    if other := re.match(r"Option '([^']+)' is not accepted", line):
        if prefix := _prefix(other[1], given, line):
            own = [name for name in known if name.rpartition(".")[2] != "help"]
            if not own:  # none belong to the type itself, for which a mapping without the right keys is taken
                return _below_init_args(*_holder(other[1], given) or (prefix.rstrip("."), ()))
            return no_such(other[1], own, prefix)
        return f"a class of --trainer.* has no argument {other[1]}"
    if line.startswith("unrecognized arguments: ") and any(map(os.path.isfile, words := line.split()[2:])):
        configs = all(word.endswith((".yaml", ".yml")) for word in words)
        glob = "put a glob in quotes, 'my_text/*.jsonl', or the shell expands it to several words"
        line += f"; {'give each file as --config FILE' if configs else glob}"
    return line


def _prefix(last: str, given: Iterable[tuple[str, str]], line: str) -> str:
    """What was typed before the last part of the name of a class's setting; "" if it was not typed like that.

    If several classes have such a setting, the one whose value the error (`line`) gives.
    """
    part = re.compile(rf"({CLASSES}\.(?:.*\.)?){re.escape(last)}(?:\.|$)")
    found = [(at[1], value) for name, value in given if (at := part.match(name))]
    return max(found, key=lambda each: line.endswith(f" value: {each[1]}"))[0] if found else ""


def _misplaced(name: str, value: str) -> str:
    """What is wrong with the form of a class, or of one in a list; empty if that is right, or no class is meant.

    `value`: as Python writes it.
    """
    if not re.fullmatch(f"--{CLASSES}", name):
        return ""
    with suppress(ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: nested very deeply
        whole = ast.parse(value, mode="eval").body
        parts = whole.elts if isinstance(whole, ast.List) else [whole]
        for given in (ast.literal_eval(part) for part in parts if isinstance(part, ast.Dict)):  # others were read
            if given.keys() - _OF_A_CLASS or "class_path" not in given:
                return _below_init_args(name, given)
            if not isinstance(own := given.get("init_args", {}), dict):
                return f"{name}.init_args {as_yaml(own)} must be a mapping of the settings of {given['class_path']}"
    return ""


_OF_A_CLASS = {"class_path", "init_args", "dict_kwargs"}


def _holder(last: str, given: Iterable[tuple[str, str]]) -> tuple[str, dict[str, None]] | None:
    """The first setting with misplaced keys among those that take a class, perhaps inside another, and were given with
    the part `last`; all its keys."""
    found: dict[str, dict[str, None]] = {}
    typed = {name for name, _ in given if re.match(CLASSES, name)}
    for parts in (name.split(".") for name, _ in given if name in typed):
        for i in range(2, len(parts)):
            found.setdefault(".".join(parts[:i]), {})[parts[i]] = None
    holders = ((name, keys) for name, keys in found.items() if f"{name}.{last}" in typed and keys.keys() - _OF_A_CLASS)
    return next((each for each in holders if each[0].rpartition(".")[2] not in _OF_A_CLASS), None)


def _below_init_args(name: str, keys: Iterable[str]) -> str:
    """Tells how a class is given. `keys`: all that the mapping of the setting `name` has, in their order."""
    name = f"--{name.removeprefix('--')}"
    wrong = [f"{name}.{key}" for key in keys if key not in _OF_A_CLASS]
    return f"{', '.join(wrong) or name}: give a class as class_path: NAME, with its settings below init_args"


def _why_no_class(name: str, rest: str) -> str:
    """Why a name is not one of a class, if the setting takes a class and the error (`rest`) has it; else empty."""
    if not re.match(f"--{CLASSES}", name):
        return ""
    if problem := re.search(r"Problem with given class_path '[^']+': (.*?) (?:- |Given value)", rest):
        return f": {problem[1]}"
    if absent := re.search(r"Expected a dot import path string: ([A-Za-z_][\w.]*)([ (])", rest):
        if absent[2] == "(":  # as in Python
            return f"; give a class as class_path: {absent[1]}, with its settings below init_args"
        one = "one such as WandbLogger, or " if name == "--trainer.logger" else ""
        return f"; no class {absent[1]} is installed; give {one}its full name, package.module.Class"
    return ""


def _must_be(name: str, value: str, types: str) -> str:
    remedy = ""
    value = re.sub(r"Namespace\(class_path='([^']*)'(?:, init_args=Namespace\([^()]*\))?\)", r"'\1'", value)  # was read
    if name == "--seed_everything":
        types = "a whole number"  # its type has true and false, too, which are refused
    if name == "--trainer.max_time":  # text of another form is refused later
        types = "DD:HH:MM:SS in quotes, a mapping such as {hours: 12}, or null"
    if "text" in types and "number" not in types and re.fullmatch(r"true|false|inf|nan|[-+\d.e]+", value):
        or_null = value == "false" and types.endswith("null")  # a language, no, or nothing
        remedy = f"; in a file, put it in quotes{', or give null for none' if or_null else ''}"
    elif "list of texts" in types and value.startswith("["):
        remedy = "; put each entry in quotes (in YAML, yes, no and 1 are no texts)"
    elif types.endswith("mapping") and value.startswith("{"):
        remedy = ", '{NAME: VALUE, ...}', in quotes and with a space after each colon"
    return f"{name} {value} must be {types}{remedy}"


def _type_names(text: str) -> str:
    """`<class 'int'>, <class 'NoneType'>` -> "a whole number or null"."""
    literals = re.findall(r"'([^']*)'", text) if "Literal" in text else []
    classes = re.findall(r"<class '(?:\w+\.)*(\w+)'>", text)
    lists = re.findall(r"(?:list|List|Sequence)\[(\w+)\]", text)
    names = [name for name in literals if name not in classes] + [_TYPES.get(name, name) for name in classes]
    names += [f"a list of {_TYPES.get(name, name).removeprefix('a ')}s" for name in lists]
    return " or ".join(dict.fromkeys(names)) or text


def _nulls(config: Namespace, parser: LightningArgumentParser) -> list[str]:
    """Problems with settings that are null in a file: there, jsonargparse takes null for any of them. Groups and seeds
    are looked at elsewhere."""
    wrong, apart = [], {*GROUPS, "seed_everything"}
    if verb := config.get("subcommand"):
        config, parser = config[verb], parser._subcommands_action._name_parser_map[verb]  # type: ignore[union-attr]
    for action in parser._actions:
        name = action.dest
        if name not in apart and name in config and config[name] is None and action.default is not None:
            try:
                parser._check_value_key(action, None, name, None)
            except TypeError as error:
                wrong.append(explain(str(error), []))
    return wrong


# --- all problems at once ---

# Matches settings that can be parsed alone: not those, nor those that stop the parser.
_ALONE = re.compile(rf"--(?!config\b|print_config|help|{CLASSES}\b)([\w.]+)")


_STAND_INS = {"data.source": "."}  # for settings whose default is refused, too


def to_defaults(problems: Iterable[str], settings: Namespace, parser: LightningArgumentParser) -> set[str]:
    """Resets each setting that begins a problem to its default; returns those that it changed.

    For a setting of a class, resets the one that names the class.
    """
    found = [re.sub(rf"^({CLASSES})\..*", r"\1", name) for name in _begun(problems)]
    defaults = parser.get_defaults() if found else Namespace()
    good = {name: _STAND_INS.get(name, defaults[name]) for name in found if name in settings and name in defaults}
    changed = {name for name, value in good.items() if settings[name] != value}
    for name in changed:
        settings[name] = good[name]
    return changed
