"""The command line's parser: its errors are one line, with the setting as typed, the value and what is allowed."""

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, ClassVar

import yaml
from jsonargparse import DefaultHelpFormatter, Namespace, get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from salt_lightning.errors import ConfigError, one_line, printable, raised

_TYPES = {
    "int": "a whole number",
    "float": "a finite number",
    "bool": "true or false",
    "str": "text",
    "dict": "a mapping",
    "NoneType": "null",
}


class HelpFormatter(DefaultHelpFormatter):
    """Without the classes that a setting would take, some of which are in no use here."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return re.sub(r",? ?known subclasses: [^)]*", "", super()._get_help_string(action))


_load_yaml = get_loader("yaml")


def _load(text: str) -> Any:
    """YAML, but that a value which begins with # is that text: a comment would be read as null, and so in silence."""
    value = _load_yaml(text)
    return text if value is None and text.lstrip().startswith("#") and "\n" not in text else value


set_loader("yaml", _load, (yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """Errors are one line: the usage text of some 70 lines would bury them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # No abbreviations: --trainer.max_step would be taken for max_steps.
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": HelpFormatter, **kwargs})

    typed: ClassVar[list[str]] = []  # the command line
    _one_by_one = False

    def error(self, message: str, ex: Exception | None = None) -> Any:
        asked = getattr(ex, "subcommand_parser", None) or self
        known = [action.dest for action in asked._actions]
        said = explain(message, known)
        if asked._one_by_one:
            raise ConfigError(said)
        asked._one_by_one, others = True, list[str]()
        if "run" in known:  # else it is the parser of a class's own settings
            with suppress(yaml.YAMLError):  # jsonargparse stops at the first
                others = raised(partial(asked.parse_args, [f"--{name}={value}"]) for name, value in _given(self.typed))
        sys.stderr.write(f"error: {printable('; '.join(dict.fromkeys([said, *others])))}\n")
        raise SystemExit(2)


_VERBS = {
    "fit": "Trains a student: BASELINE, SALT, RKD or SALT_DS, by the settings; also fine-tuning.",
    "validate": "Losses of a checkpoint on the validation text; of a teacher, also the loss of each document.",
    "test": "The same on the test text; of a fine-tuned student, what it generates and chooses.",
    "predict": "SALT_DS: the teacher's loss and rank of every training token, and a report of the scores.",
}
# How Lightning's trainer describes its methods, cut in the middle.
_OF_TRAINER = ("Perform one evaluation", "Runs the full", "Run inference")
_TRAINER = "Customize every aspect of training via flags"  # Lightning's title of its trainer's settings
_REFUSED = "Not to be set in this project"
# Where Lightning's own words are not true here.
_WORDS = {
    "config": "YAML file of settings. Of several the later one wins, and what is typed wins over all.",
    "seed_everything": "Of initial weights, dropout and order, unless --model.seed or --data.seed is given.",
    "ckpt_path": "A checkpoint (.ckpt), or last: the newest one of the run's folder that is not damaged.",
    "trainer.strategy": "auto, ddp, fsdp (FSDP1), or FSDP2 by --config configs/fsdp.yaml.",
    "trainer.logger": "Trackers beside TensorBoard in the run's folder, which compare reads. false: nothing.",
    "trainer.gradient_clip_val": "Largest norm of the gradient of an optimizer step; null clips nothing.",
    "trainer.num_sanity_val_steps": "Validation batches before the first step.",
    "trainer.max_steps": "Optimizer steps of the run.",
    "trainer.precision": "32-true, bf16-mixed or bf16-true.",
    "trainer.val_check_interval": "Optimizer steps between validations (a whole number), or a share of the run (0..1).",
    "trainer.log_every_n_steps": "Optimizer steps between two logged ones.",
    "weights_only": "Not used: a checkpoint is never unpickled.",
    "trainer.accumulate_grad_batches": f"{_REFUSED}: it follows from --data.global_batch_size.",
    "trainer.barebones": f"{_REFUSED}: it would leave no log and no checkpoint.",
    "trainer.check_val_every_n_epoch": f"{_REFUSED}: use --trainer.val_check_interval.",
    "trainer.default_root_dir": f"{_REFUSED}: use --run.",
    "trainer.enable_checkpointing": f"{_REFUSED}: use --checkpoint.*.",
    "trainer.fast_dev_run": f"{_REFUSED}: use the verb check, or few --trainer.max_steps.",
    "trainer.limit_train_batches": f"{_REFUSED}: use --trainer.max_steps.",
    "trainer.max_epochs": f"{_REFUSED}: use --trainer.max_steps.",
    "trainer.overfit_batches": f"{_REFUSED}: use a small --data.source.",
}


def reword(action: argparse.Action, parsers: dict[str, LightningArgumentParser]) -> None:
    """Says in `--help` what Lightning's verbs (`action` lists them) and settings do in this project."""
    for verb in action._choices_actions:  # type: ignore[attr-defined]
        verb.help = _VERBS.get(verb.dest, verb.help)
    for verb, parser in parsers.items():
        parser.description = _VERBS[verb]
        for setting in parser._actions:
            setting.help = _WORDS.get(setting.dest, setting.help)
            if setting.dest.endswith(".help"):  # they work, and fill a page
                setting.help = argparse.SUPPRESS
            elif setting.dest.startswith("trainer."):  # Lightning's texts name its own defaults, not those here
                setting.help = re.sub(r"\s*Default: ``[^`]*``\.?$", "", setting.help or "")
        parser.prog = parser.prog.replace(" [options]", "")
        parser.usage = "%(prog)s [--config FILE]... [--SETTING VALUE]..."  # all of them would be 120 lines
        groups: list[Any] = parser._action_groups  # type: ignore[assignment]
        for group in groups:
            if (group.title or "").startswith(_OF_TRAINER):
                group.title = f"What {verb} itself takes"
        groups.sort(key=lambda group: group.title == _TRAINER)  # Lightning's own come last


def explain(message: str, known: list[str]) -> str:
    """What jsonargparse says, on one line and as a user would say it; with the nearest of the known settings."""
    line = " ".join(message.split())
    if found := re.match(r"Parser key \"([^\"]+)\"(\S*): (.*)", line):
        name, rest = f"--{found[1]}{found[2]}", found[3]
        if part := re.search(r"NestedArg\(key='([^']+)', val='?(.*?)'?\)", rest):
            said = f"{name}.{part[1]} {part[2]} is a setting of a class, and {name} names none"
            example = ", e.g. --trainer.strategy DDPStrategy for ddp" if name == "--trainer.strategy" else ""
            return f"{said}; give the class itself{example}"
        if union := re.search(r"Subtypes: [\[(](.*?)[\])] Errors:.*Given value: (.*)$", rest):
            return f"{name} {union[2]} must be {_type_names(union[1])}{_why_no_class(name, union[2], rest)}"
        if union := re.search(r" Given value: (.*)$", rest):
            return f"{name} {union[1]} is none of the values allowed here (see --help)"
        if single := re.match(r"Expected an? (.*?)\. Got value: (.*)$", rest):
            return f"{name} {single[2]} must be {_type_names(single[1])}"
        if group := re.match(r"Unable to load config ['\"](.*?)['\"] - ", rest):
            return f"{name} {group[1]} must be a mapping of its settings (see --help); leave it out for the defaults"
        return f"{name}: {rest}"
    wrong = re.search(r"does not accept option '([^']+)'|unrecognized arguments: --([^\s=]+)", line)
    if wrong:
        return _no_such(wrong[1] or wrong[2], known)
    if (lacking := re.match(r"the following arguments are required: (\w+)$", line)) and lacking[1] != "subcommand":
        return f"a class of --trainer.* requires {lacking[1]}: give it as .init_args.{lacking[1]}"
    if other := re.match(r"Option '([^']+)' is not accepted", line):
        return f"a class of --trainer.* does not take {other[1]}"
    if line.startswith("unrecognized arguments: "):
        line += "; a pattern of files goes in quotes, 'my_text/*.jsonl', or the shell makes several words of it"
    return line


def _no_such(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"--{name}: there is no such setting{f'; did you mean --{near[0]}?' if near else ' (see --help)'}"


def _why_no_class(name: str, value: str, rest: str) -> str:
    """What is wrong with a value that names a class, where the setting takes one; else nothing."""
    if not re.match(r"--trainer\.(logger|callbacks|plugins)\b", name) or not re.fullmatch(r"[A-Za-z_][\w.]*", value):
        return ""
    problem = re.search(r"Problem with given class_path '[^']+': (.*?) - ", rest)
    return f": {problem[1]}" if problem else "; no such class is installed here (in full: package.module.Class)"


def _type_names(text: str) -> str:
    """`<class 'int'>, <class 'NoneType'>` -> "a whole number or null"."""
    literals = re.findall(r"'([^']*)'", text) if "Literal" in text else []
    classes = re.findall(r"<class '(?:\w+\.)*(\w+)'>", text)
    lists = re.findall(r"(?:list|List|Sequence)\[(\w+)\]", text)
    names = [name for name in literals if name not in classes] + [_TYPES.get(name, name) for name in classes]
    names += [f"a list of {_TYPES.get(name, name).removeprefix('a ')}s" for name in lists]
    return " or ".join(dict.fromkeys(names)) or text


# --- all that is wrong at once ---

# Settings that take a class, whose own are nothing without it, and those that stop the parser.
_ALONE = re.compile(r"--(?!config\b|print_config|help|trainer\.(strategy|callbacks|logger|plugins|profiler)\b)([\w.]+)")


def _given(args: list[str]) -> list[tuple[str, str]]:
    """(name, value as typed) of each setting of a command line and its files, as far as it has a meaning alone."""
    found = []
    for file in _values(args):
        text = file if file.lstrip().startswith("{") else Path(file).read_text(encoding="utf-8")
        found += _leaves(yaml.safe_load(text), "")
    return [(name, value) for name, value in [*found, *_typed(args)] if _ALONE.fullmatch(f"--{name}")]


def _typed(args: list[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of each setting of a command line that has its value."""
    for word, following in pairwise([*args, "--"]):
        name, joined, value = word.partition("=")
        if name.startswith("--") and (joined or not following.startswith("--")):
            yield name.removeprefix("--"), value if joined else following


def _leaves(value: Any, name: str) -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{name}.{key}" if name else str(key))]
    return [(name, value if isinstance(value, str) else json.dumps(value, default=str))]


def to_defaults(said: str, settings: Namespace, parser: LightningArgumentParser) -> dict[str, Any]:
    """Gives each setting that begins a problem of `said` its default, and says which, where it had another value."""
    defaults = parser.get_defaults()
    names = [name for name in re.findall(r"(?:^|; )--([\w.]+)", said) if name in settings and name in defaults]
    changed = {name: defaults[name] for name in names if settings[name] != defaults[name]}
    for name, default in changed.items():
        settings[name] = default
    return changed


# --- the files of --config, before jsonargparse reads them ---


def check_configs(args: list[str], known: list[str]) -> None:
    """Reads every `--config FILE` of a command line, whose settings are `known`.

    Raises:
        ConfigError: a file that is missing or a folder, no text, no YAML, no mapping, or has a setting twice, of which
            YAML would take the last in silence, or an unknown group with nothing in it, which jsonargparse passes over.
    """
    for value in _values(args):
        if not value.lstrip().startswith("{"):  # settings themselves instead of a file
            try:
                _check_config(value, known)
            except RecursionError as error:
                raise ConfigError(f"--config {value}: settings contain themselves, or are nested too deep") from error


def require_no_comments(args: list[str], given: Namespace) -> None:
    """Raises ConfigError where YAML has taken a value that was typed for a comment, and so for null."""
    for name, value in _typed(args):
        if value.lstrip().startswith("#") and name in given and given[name] is None:
            raise ConfigError(f"--{name} {value!r} reads as a comment, so as null; say null, or what it should be")


def configs_first(args: list[str]) -> list[str]:
    """A command line with its files moved ahead: what is typed wins, wherever it stands; of files the later one wins.

    jsonargparse takes a file's settings over what was typed before it.
    """
    files: list[str] = []
    rest: list[str] = []
    words = iter(args)
    for word in words:
        if word in ("--config", "-c"):
            value = list(islice(words, 1))
            (files if value else rest).extend([word, *value])
        else:
            (files if word.startswith(_JOINED) else rest).append(word)
    verb = 1 if rest and not rest[0].startswith("-") else 0
    return [*rest[:verb], *files, *rest[verb:]]


_JOINED = ("--config=", "-c")  # -cFILE and -c=FILE, too


def _values(args: list[str]) -> list[str]:
    joined = [re.sub(r"^(--config=|-c=?)", "", word) for word in args if word.startswith(_JOINED) and word != "-c"]
    apart = [value for arg, value in pairwise(args) if arg in ("--config", "-c")]
    return joined + apart


def _check_config(path: str, known: list[str]) -> None:
    setting = f"--config {path}"
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise ConfigError(f"{setting} {what}; give a YAML file (those in configs/ come with the repository)")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        node = yaml.compose(text, yaml.SafeLoader)
        zeros = [token for token in yaml.scan(text) if "\0" in getattr(token, "value", "")]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{setting} is not UTF-8 text, so no YAML file; give one, e.g. configs/salt.yaml") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{setting}{where}: no YAML ({one_line(problem)})") from error
    if zeros:  # jsonargparse would take it for the name of a file
        raise ConfigError(f"{setting}, line {zeros[0].start_mark.line + 1}: a zero byte is no setting; remove it")
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{setting} is no mapping of settings; write lines such as 'run: runs/mine'")
    for key, value in node.value:
        if value.tag.endswith(":null") and any(name.startswith(f"{key.value}.") for name in known):
            where = f"{setting}, line {key.start_mark.line + 1}"
            raise ConfigError(f"{where}: {key.value} is empty; indent its settings below it, or remove it")
    for line, problem in _twice(node):
        raise ConfigError(f"{setting}, line {line}: {problem}")
    if unknown := [name for name in _empty(node, "") if not _means(name, known)]:
        raise ConfigError("; ".join(_no_such(name, known) for name in unknown))


def _means(name: str, known: list[str]) -> bool:
    """Whether it is a setting, a group of them, or lies in the value of one."""
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


def _twice(node: Any) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) of each key that is there already, or whose group is, of which one would be lost."""
    keys = list(_keys(node, ""))
    names = {name for name, *_ in keys}
    seen = set()
    for name, own, line in keys:
        if name in seen and own != "<<":
            yield line, f"{name} stands there twice; leave one"
        seen.add(name)
        groups = [name[: len(name) - len(own) + i] for i, letter in enumerate(own) if letter == "."]
        if group := next((group for group in groups if group in names), None):
            yield line, f"{name} stands beside {group}, a mapping; write it into that"


def _keys(node: Any, prefix: str) -> Iterator[tuple[str, str, int]]:
    """(dotted name, the key itself, line) of each, in order."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        own = str(getattr(key, "value", ""))
        yield f"{prefix}{own}", own, key.start_mark.line + 1
        if own != "<<":  # what it brings in may be there already
            yield from _keys(value, f"{prefix}{own}.")
