"""The words of a command line and the files of its --config, before jsonargparse reads them."""

import json
import os
import re
import sys
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from salt_lightning.command.settings import refuse_loops
from salt_lightning.command.wrong_names import no_such
from salt_lightning.errors import ConfigError, one_line, raised, refuse

CLASSES = r"trainer\.(?:strategy|callbacks|logger|plugins|profiler)"  # they take a class with its own settings


def given_in(args: list[str]) -> Iterator[tuple[str, str]]:
    """(name, value as typed) of each setting of a command line and its files."""
    for file in files_in(args):
        yield from _leaves(yaml.safe_load(text_of(file)), "")
    for name, value in typed_in(args):
        leaves = [(name, value)]
        if re.fullmatch(rf"{CLASSES}\+?", name):
            with suppress(yaml.YAMLError, ValueError):  # the parser will refuse it
                leaves = _leaves(yaml.safe_load(value), name)
        yield from leaves


def typed_in(args: list[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of each setting of a command line that has a value."""
    for word, following in pairwise([*args, "--"]):
        name, joined, value = word.partition("=")
        if name.startswith("--") and (joined or not following.startswith("--")):
            yield name.removeprefix("--"), value if joined else following


def _leaves(value: Any, name: str) -> list[tuple[str, str]]:
    name = re.sub(rf"^({CLASSES})\+$", r"\1", name)  # errors do not tell what is appended from what is set
    if isinstance(value, dict) and value:
        return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list) and re.fullmatch(CLASSES, name):
        return [leaf for inner in value for leaf in _leaves(inner, name)]
    return [(name, value if isinstance(value, str) else json.dumps(value, default=str, skipkeys=True))]


def check_configs(args: list[str], known: list[str]) -> list[str]:
    """Reads every `--config FILE` of a command line, whose settings are `known`. Returns problems with unknown empty
    groups, which jsonargparse ignores.

    Raises:
        ConfigError: a file is missing, a folder, or not a YAML mapping in UTF-8; it has a setting twice, of which
            YAML would silently take the last; or a value of the command line contains itself.
    """
    ignored: list[str] = []
    looks = [partial(_check_config, file, known, ignored) for file in dict.fromkeys(files_in(args))]
    looks += [
        partial(look, *typed) for typed in typed_in(args) for look in (refuse_loops, partial(_check_group, known))
    ]
    if wrong := raised(looks):
        refuse([*wrong, *ignored])
    return ignored


def _check_group(known: list[str], name: str, value: str) -> None:
    """For a group of settings, jsonargparse reads a file of that name, whatever it is."""
    if not any(setting.startswith(f"{name}.") for setting in known) or not os.path.exists(value):
        return
    try:
        if not os.path.isdir(value) and not os.path.isfile(value):  # a pipe: reading would wait
            raise ConfigError(no_mapping(f"--{name}", value, known))
        with suppress(OSError), open(value, "rb") as file:  # of a checkpoint, the beginning is enough
            getincrementaldecoder("utf-8")().decode(file.read(1 << 16))
    except UnicodeDecodeError as error:
        raise ConfigError(no_mapping(f"--{name}", value, known)) from error


def no_mapping(name: str, value: str, known: Iterable[str]) -> str:
    """The error about a value of a group, which has the `known` settings among others."""
    remedy = "leave it out for the defaults"
    if (first := re.match(r"{?\s*(\w+):\S", value)) and f"{name.removeprefix('--')}.{first[1]}" in known:
        remedy = "put a space after each colon"
    elif name in ("--model", "--model.student", "--model.teacher"):
        path = f"{'--model.student' if name == '--model' else name}.path"
        remedy = f"for a checkpoint, a folder or a hub name, use {path}"
    elif name == "--data":
        remedy = "for files, a folder or a hub data set, use --data.source"
    if name in ("--model", "--data"):
        remedy += "; classes of your own are used in Python (docs/extending.md)"
    return f"{name} {value} must be a mapping of its settings (see --help); {remedy}"


def misread(args: list[str], given: Namespace) -> list[str]:
    """Problems with typed values that YAML has read as comments, and so as null, or as other numbers, also within; and
    with names within a mapping that jsonargparse would drop, or read as text, or with which it would drop what else is
    in that."""
    found = given[given.subcommand] if given.get("subcommand") else given
    typed = [*typed_in(args)]
    comments = [
        f"--{name} {value!r} is a comment in YAML, so it reads as null; give null, or a value"
        for name, value in typed
        if value.lstrip().startswith("#") and name in found and found[name] is None
    ]
    within = [
        f"--{name} {value}: a dotted name sets only the first level of a mapping; give the whole "
        f"--{top} '{{NAME: VALUE, ...}}'"
        for name, value in typed
        for top in accumulate(name.split("."), "{}.{}".format)
        for upper in [top.rpartition(".")[0]]
        if top != name and isinstance(found.get(upper), dict)
    ]
    replaced = [
        f"--{name} {value}: the mapping --{tops[-1]} that follows replaces it; put {last}: {value} into "
        + (f"its {upper.removeprefix(f'{tops[-1]}.')}" if upper != tops[-1] else "that")
        for name, value in typed
        for upper, _, last in [name.rpartition(".")]
        if isinstance(now := found.get(upper), dict) and last not in now
        if (tops := [top for top, _ in typed if name.startswith(f"{top}.")])
    ]
    numbers = [
        f"--{name}: {said}"
        for name, value in typed
        if (name in found or value.startswith(("[", "{"))) and not isinstance(found.get(name), str)
        for _, said in _other_numbers(_scalars(value))
    ]
    return comments + within + replaced + numbers


_OTHER = re.compile(r"[-+]?(0[0-7_]+|[\d_]+(:[0-5]?\d)+(\.[\d_]*)?)")  # numbers in base 8 and parts of 60, in YAML


def _scalars(text: str) -> list[Any]:
    """YAML's events of single values and keys; none of text that is no YAML."""
    with suppress(yaml.YAMLError):
        return [event for event in yaml.parse(text) if isinstance(event, yaml.ScalarEvent)]
    return []


def _other_numbers(scalars: Iterable[Any]) -> Iterator[tuple[int, str]]:
    """(line, problem) of each number that YAML reads as another one than it seems to be."""
    for scalar in scalars:
        if not scalar.implicit[0] or not _OTHER.fullmatch(value := scalar.value):
            continue
        read = yaml.safe_load(value)
        if isinstance(read, int | float) and (":" in value or int(value.replace("_", "")) != read):
            remedy = "write a number without colons or zeros before it, and text in quotes"
            yield scalar.start_mark.line + 1, f"{value} reads as {read} in YAML; {remedy}"


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
            files.append(f"--config={os.path.expanduser(value)}")  # a shell expands ~ only at the start of a word
    verb = 1 if rest and not rest[0].startswith("-") else 0
    return [*rest[:verb], *files, *rest[verb:]]


def files_in(args: list[str]) -> list[str]:
    """The files, or settings in braces, of a command line from `configs_first`."""
    return [word.removeprefix("--config=") for word in args if word.startswith("--config=")]


def text_of(file: str) -> str:
    return file if _is_inline(file) else Path(file).read_text(encoding="utf-8")


def _is_inline(file: str) -> bool:
    """Whether it is not the name of a file, but settings in braces."""
    return file.lstrip().startswith("{")


def _check_config(path: str, known: list[str], ignored: list[str]) -> None:
    setting = f"--config {path}"
    if not _is_inline(path) and not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "a pipe or a device, which cannot be read again"
        what = f"is {kind}" if os.path.exists(path) else "does not exist"
        raise ConfigError(f"{setting} {what}; give a YAML file (those in configs/ come with the repository)")
    try:
        text = text_of(path)
        node = yaml.compose(text, yaml.SafeLoader)
        scalars = _scalars(text)
        yaml.safe_load(text)  # for tags and values that do not suit theirs
        keys = list(_keys(node, ""))
    except RecursionError as error:
        raise ConfigError(f"{setting}: settings contain themselves, or are nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{setting} is not UTF-8 text; give a YAML file in UTF-8, e.g. configs/salt.yaml") from error
    except (yaml.YAMLError, ValueError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        if tag := re.search(r"constructor for the tag '(.*)'", str(problem)):
            typed = tag[1].replace("tag:yaml.org,2002:", "!!")
            raise ConfigError(f"{setting}{where}: tags such as {typed} are not supported; remove them") from error
        starts = re.match("expected alphabetic|found (character|undefined alias)", str(problem))
        begins = re.search(r"[*&@%`]", text[max(mark.index - 1, 0) : mark.index + 1]) if mark and starts else None
        remedy = f"; put a value that begins with {begins[0]} in quotes" if begins else ""
        raise ConfigError(f"{setting}{where}: not valid YAML ({one_line(problem)}){remedy}") from error
    if zeros := [scalar for scalar in scalars if "\0" in scalar.value]:  # jsonargparse would take it for a file name
        raise ConfigError(f"{setting}, line {zeros[0].start_mark.line + 1}: a value contains a zero byte; remove it")
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{setting} is not a mapping of settings; write lines such as 'run: runs/mine'")
    empty = [
        (key.start_mark.line + 1, f"{key.value} is empty; indent its settings below it, or remove it")
        for key, value in node.value
        if value.tag.endswith(":null") and any(name.startswith(f"{key.value}.") for name in known)
    ]
    ignored += [no_such(name, known) for name in _empty(node, "") if not _means(name, known)]
    found = sorted([*empty, *_twice(keys), *_other_numbers(scalars)])
    refuse(f"{setting}, line {line}: {problem}" for line, problem in found)


def _means(name: str, known: list[str]) -> bool:
    """Whether it is a setting, a group of settings, or part of a setting's value."""
    groups = {setting.rpartition(".")[0] for setting in known if not setting.endswith(".help")}
    parents = {name[:i] for i, letter in enumerate(name) if letter == "."}
    return name in known or name in groups or bool(parents & (set(known) - groups))


def _empty(node: Any, prefix: str) -> list[str]:
    """Dotted names of the keys that hold an empty mapping."""
    found = []
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        own = getattr(key, "value", "")
        name = prefix.removesuffix(".") if own == "<<" else f"{prefix}{own}"
        empty = value.tag.endswith(":null") or (isinstance(value, yaml.MappingNode) and not value.value)
        found += [name] if empty else _empty(value, f"{name}.")
    return found


def _twice(keys: list[tuple[str, str, int]]) -> Iterator[tuple[int, str]]:
    """(line, problem) of each key that occurs twice, with and without a +, or both dotted and within its group; one
    would be lost."""
    names = {name for name, *_ in keys}
    seen: set[str] = set()
    for name, own, line in keys:
        plain = name.removesuffix("+")
        if name in seen and own != "<<":
            yield line, f"{name} is set twice; remove one"
        elif {plain, f"{plain}+"} & seen and own != "<<":
            yield line, f"{plain} and {plain}+ are both set; put all into one of them"
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


def without(args: list[str], wrong: list[str]) -> list[str]:
    """A command line without these settings and those below them, typed or in its files; without all of a list of
    classes, if it is the setting of one."""
    wrong = [re.sub(r"^(trainer\.(?:callbacks|logger|plugins))\..*", r"\1", name) for name in wrong]
    kept, name, drops = [], "", False
    for word in args:
        typed, joined, value = word.partition("=")
        if begins := word.startswith("--"):
            name = typed.removeprefix("--")
            drops = _is_below(name, wrong)
        value = value if begins else word
        if begins and name == "config":
            word = f"--config={_flow(_kept(yaml.safe_load(text_of(value)), '', wrong))}"
        elif value.lstrip().startswith("{"):
            with suppress(yaml.YAMLError, ValueError):  # ValueError: of a date that does not exist
                whole = yaml.safe_load(value)
                if (left := _kept(whole, f"{name}.", wrong)) != whole:  # else as typed: {question} is a template
                    word = f"{word.removesuffix(value)}{_flow(left)}"
        if not drops:
            kept.append(word)
        drops = drops and begins and not joined  # the next word is its value
    return kept


def _flow(mapping: Any) -> str:
    return yaml.safe_dump(mapping, default_flow_style=True, width=sys.maxsize)


def _kept(value: Any, prefix: str, wrong: list[str]) -> Any:
    if not isinstance(value, dict):
        return value
    below = {key: f"{prefix}{key}" for key in value}
    kept = {key: _kept(value[key], f"{name}.", wrong) for key, name in below.items() if not _is_below(name, wrong)}
    # what is emptied here would be another error
    return {key: each for key, each in kept.items() if each != {} or value[key] == {}}


def _is_below(name: str, others: list[str]) -> bool:
    return any(f"{name.replace('+', '')}.".startswith(f"{other}.") for other in others)
