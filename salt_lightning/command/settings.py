"""Checks settings before anything is read: reports all that cannot work, each on a line that a user can act on."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.accelerators import AcceleratorRegistry

from salt_lightning.batches.mixture import weight_problems
from salt_lightning.errors import NOT_A_NAME, ConfigError, one_line

GROUPS = (
    *("model", "model.student", "model.student.config", "model.teacher", "model.teacher.config", "model.optim"),
    *("data", "data.keep", "data.examples", "kd", "checkpoint", "answers", "trainer"),
)
# what identifies a run: a change of one of these makes it another run
IDENTITY = (
    *("model.student.", "model.teacher.", "kd.", "data.source", "data.val_source", "data.tokenizer", "data.vocab_size"),
    *("data.block_size", "data.selection", "data.keep."),
)


_PATHS = (
    *("run", "ckpt_path", "checkpoint.folder", "checkpoint.export", "model.student.path", "model.teacher.path"),
    *("data.tokenizer", "data.selection", "data.difficulty", "data.cache_dir"),
)


def as_yaml(value: object) -> str:
    """A value, or Python's word for one, as it is typed: null, true, false."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def typed(value: object) -> str:
    """A word of a command line, given in Python."""
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, default=str)
    return value if isinstance(value, str) else as_yaml(value)


def refuse_loops(name: str, value: str) -> None:
    """Raises ConfigError if the value of a setting, as typed, is a YAML list or mapping that contains itself."""
    if not re.search(r"[&\[{]", value):
        return
    try:
        with suppress(yaml.YAMLError):  # the parser reports it, if it reads the value as YAML
            json.dumps(yaml.safe_load(value), default=str, skipkeys=True)
    except (RecursionError, ValueError) as error:
        if isinstance(error, RecursionError) or "Circular" in str(error):  # else, e.g., a date that no calendar has
            raise ConfigError(f"--{name} {value}: settings contain themselves, or are nested too deeply") from error


def seed_or_global(seed: int | None, unset: int | None = None) -> int:
    """The seed; if None or `unset` (a stand-in for None), Lightning's seed_everything, or 0.

    That may run after the constructors; in processes that Lightning starts, it is set before.
    """
    return int(os.environ.get("PL_GLOBAL_SEED") or 0) if seed in (None, unset) else seed


def local_paths(config: Namespace) -> list[str]:
    """Expands ~: a shell does it for `--run ~/x`, but not for `--run=~/x` or in a file. Sources do it themselves.
    Returns problems with paths that cannot be used."""
    paths = {name: path for name in _PATHS if isinstance(path := config.get(name), str)}
    wrong = {name: said for name, path in paths.items() if (said := wrong_path(path))}
    for name in paths.keys() - wrong.keys():
        config[name] = os.path.expanduser(paths[name])
    return [f"--{name} {paths[name]} {said}" for name, said in wrong.items()]


def wrong_seed(config: Namespace) -> list[str]:
    """Seeds that torch or numpy would not take."""
    bits, wrong = {"seed_everything": 32, "model.seed": 63}, []
    for name, seed in ((name, config.get(name)) for name in bits):
        fits = type(seed) is int and 0 <= seed < 1 << bits[name]  # True is an int, too
        if not fits and not (name == "model.seed" and seed is None):
            wrong.append(f"--{name} {as_yaml(seed)} must be a whole number from 0 to {(1 << bits[name]) - 1}")
    return wrong


def wrong_path(path: str | Path) -> str:
    """What is wrong with the name of a local file or folder; empty if nothing is.

    An address such as s3://bucket would become a local folder named s3:, and a variable that no shell expands one named
    $HOME. Libraries cannot write to a name that is not UTF-8.
    """
    if re.match(r"[a-zA-Z][\w+.-]+:/", str(path)):  # as a Path, it is s3:/bucket; a single letter is a drive
        return "is an address; give a local folder, e.g. one where that storage is mounted"
    if (variable := re.search(r"\$\{[^}]*\}?|\$[A-Z_]{2,}", str(path))) and not os.path.exists(path):
        return f"has {variable[0]}, which only a shell replaces, not in a file or single quotes; give the folder itself"
    if os.path.expanduser(path).startswith("~"):
        return "begins with ~, but there is no such user; give the folder itself"
    if str(path).encode(errors="replace").decode() != str(path):
        return NOT_A_NAME
    return ""


def wrong_groups(config: Namespace) -> list[str]:
    """Groups of settings that are not mappings, e.g. an empty `model:` in a file."""
    wrong = {name: as_yaml(config[name]) for name in GROUPS if not isinstance(config.get(name, {}), Namespace | dict)}
    remedy = "must be a mapping of its settings; leave it out for the defaults"
    return [f"--{name} {value} {remedy}" for name, value in wrong.items()]


def wrong_teacher(config: Namespace) -> list[str]:
    """Sizes of a fresh model, given for the teacher, which is always loaded."""
    sizes = config.model.teacher.config
    return [f"--model.teacher.config {sizes}: the sizes come from --model.teacher.path; leave it out"] if sizes else []


def checkpoints(config: Namespace) -> Path:
    """The folder of a run's checkpoints."""
    return Path((config.get("checkpoint") or {}).get("folder") or Path(config.run) / "checkpoints")


def held(config: Namespace, verb: str | None) -> list[tuple[str, Path]]:
    """(setting, folder) of each folder that no other fit or predict may use while this verb does."""
    if verb not in ("fit", "predict") or not config.run:
        return []
    run, place = Path(config.run), checkpoints(config)
    # also the folder within a run's own: another's YAML may name that, or links of both lead to one
    apart = verb == "fit" and not same_place(place, run)
    return [("--run", run)] + ([("--checkpoint.folder", place)] if apart else [])


# verb -> folders in that of the run, which it writes into
_WRITES = {"fit": ("", "checkpoints"), "predict": ("", "scores"), "validate": ("validate",), "test": ("test",)}


def same_place(one: Path | str, other: Path | str) -> bool:
    """Whether two paths are of one folder, which need not exist, also through links."""
    return os.path.realpath(one) == os.path.realpath(other)


def wrong_folders(config: Namespace, verb: str) -> list[str]:
    """Folders that cannot be written: a run would fail only at its first checkpoint, or at its end."""
    of, run = config.get("checkpoint") or {}, config.run
    parts = [part for part in _WRITES[verb] if run and not (part == "checkpoints" and of.get("folder"))]
    folders = [("run", run, Path(run, part)) for part in parts]
    folders += [(f"checkpoint.{name}", of[name], Path(of[name])) for name in ("folder", "export") if of.get(name)]
    wrong: dict[str, str] = {} if run else {"run": "--run '' is empty; give a folder"}
    also = f", with --ckpt_path {config.ckpt_path}" if "" not in parts and config.get("ckpt_path") else ""
    for name, typed, folder in folders:
        where = folder.absolute()
        # not Path's methods, which raise if the folder around it may not be read; lexists, as no folder can be made in
        # place of a link, e.g. to one that a scratch disk has lost
        there = next(path for path in (where, *where.parents) if os.path.lexists(path))
        if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
            kind = "is a link that leads to no folder" if os.path.islink(there) else "is not a folder"
            why = "cannot be written" if os.path.isdir(there) else kind
            wrong.setdefault(name, f"--{name} {typed}: {there} {why}; choose another folder{also}")
    settings = Path(run, "config.yaml")
    if verb == "fit" and run and os.path.exists(settings) and not os.access(settings, os.R_OK):
        wrong["config.yaml"] = (
            f"--run {run}: {settings} cannot be read, and so the run's settings until now would be lost; ask its owner "
            "for the right to read it, or branch off into another --run with --ckpt_path CHECKPOINT"
        )
    return [*wrong.values()]


_MOST_DEVICES = 1 << 20
_PRECISIONS = ("32", "32-true", "bf16", "bf16-mixed", "bf16-true")


def _is_part(limit: Any) -> bool:
    """Whether a limit of batches leaves some out: 1 is one, 1.0 is all."""
    return limit not in (None, 1.0) or isinstance(limit, int)


# Lightning's settings that cannot be set -> the values that do nothing (limits: see _is_part); why not; what instead
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "accumulate_grad_batches": (
        (None, 1),
        " follows from --data.global_batch_size, --data.micro_batch_size and the number of ranks; leave it out",
    ),
    "barebones": ((None, False), ": a run without log and checkpoint leaves nothing; leave it out"),
    "check_val_every_n_epoch": (
        (None, 1),
        ": a run is one Lightning epoch; use --trainer.val_check_interval (optimizer steps)",
    ),
    "default_root_dir": ((None, ""), ": use --run"),
    "enable_checkpointing": ((None, True), ": use --checkpoint.every_n_steps null to save only at the end"),
    "fast_dev_run": (
        (None, False),
        " counts micro-batches and leaves no log or checkpoint; use the verb `check` with the same settings, or a "
        "small --trainer.max_steps in a separate --run",
    ),
    "limit_predict_batches": ((), " would leave rows without scores; use a small --data.source"),
    "limit_train_batches": (
        (),
        ", which overfit_batches and fast_dev_run also set, counts micro-batches; use --trainer.max_steps",
    ),
    "max_epochs": ((None, -1), ": a run is counted in steps; use --trainer.max_steps"),
    "min_epochs": ((None, 0), ": a run is counted in steps; use --trainer.min_steps"),  # in a fit 0, see set_cadence
    "overfit_batches": ((None, 0), ": use a small --data.source instead"),
}


def in_brief(refused: str) -> str:
    """What to do instead of a refused setting, or why it is refused if it only is to be left out."""
    why = REFUSED[refused][1]
    parts = (f"it{why}" if why.startswith(" ") else why.lstrip(": ")).split("; ")
    return parts[0] if parts[-1] == "leave it out" else parts[-1]


def _typed(value: Any) -> str:
    """A setting as it was typed: typing caches unions, so what else was imported decides between 5 and 5.0."""
    return as_yaml(int(value) if isinstance(value, float) and value.is_integer() else value)


def wrong_counts(trainer: Mapping[str, Any] | Namespace) -> list[str]:
    """Lightning's settings that cannot be set, or that count micro-batches, while a run counts optimizer steps."""
    given = [(name, trainer.get(name), *told) for name, told in REFUSED.items()]
    wrong = [
        f"--trainer.{name} {_typed(value)}{why}"
        for name, value, idle, why in given
        if (_is_part(value) if name.startswith("limit_") else value not in idle)
    ]
    wrong += [
        f"--trainer.{name} {_typed(count)} counts micro-batches, so what is measured would depend on "
        "--data.micro_batch_size and the number of devices; use --data.val_rows, or 0 for none (null undoes it)"
        for name in ("limit_val_batches", "limit_test_batches")
        if _is_part(count := trainer.get(name)) and count != 0
    ]
    interval = trainer.get("val_check_interval")
    steps, share = isinstance(interval, int) and interval >= 1, isinstance(interval, float) and 0 < interval <= 1
    if interval is not None and not steps and not share:
        wrong.append(
            f"--trainer.val_check_interval {interval} must be optimizer steps (1 or more), or a share of the run (0..1)"
        )
    return wrong


def wrong_precision(asked: Any) -> list[str]:
    """A precision that no run supports, such as fp16, which needs scaled gradients; None: Lightning's default."""
    if asked is None or str(asked) in _PRECISIONS:
        return []
    return [f"--trainer.precision {asked or repr(asked)} must be {' or '.join(_PRECISIONS)}"]


def wrong_accelerator(trainer: Namespace) -> list[str]:
    """Devices that do not exist here; checked before the trainer is created, which would look for them."""
    wrong = []
    for name, every in (("devices", -1), ("num_nodes", 1)):
        # also a number given as text: Lightning makes a list of that length
        number = str(trainer.get(name))
        if re.fullmatch(r"-?\d+", number) and int(number) != every and not 1 <= int(number) <= _MOST_DEVICES:
            wanted = f"must be from 1 to {_MOST_DEVICES}{', or auto for all' if every < 0 else ''}"
            wrong.append(f"--trainer.{name} {number} {wanted}")
    asked = trainer.get("accelerator")
    kinds = ("cuda", "mps") if asked == "gpu" else (asked,)
    known = [AcceleratorRegistry[kind]["accelerator"] for kind in kinds if kind in AcceleratorRegistry]
    if known and not any(kind.is_available() for kind in known):
        wrong.append(
            f"--trainer.accelerator {asked}: torch {torch.__version__} finds no such device here; use auto, which "
            "takes what there is, or cpu (to check a run for another machine: check --check.memory_gib 24)"
        )
    return wrong


def wrong_clipping(limit: float | None) -> list[str]:
    """What is wrong with a limit of gradients: a negative one would turn them around."""
    good = limit is None or limit >= 0
    return [] if good else [f"--trainer.gradient_clip_val {limit} must be 0 or more (0 or null: off)"]


_LIMITS = {"validate": "limit_val_batches", "test": "limit_test_batches"}


def wrong_trainer_settings(trainer: Namespace, verb: str = "fit") -> list[str]:
    """Lightning's settings that would break a run late, or change what a step is."""
    every = trainer.get("log_every_n_steps")
    wrong = wrong_counts(trainer) + wrong_precision(trainer.get("precision"))
    if every is not None and every < 1:
        wrong.append(f"--trainer.log_every_n_steps {every} must be at least 1")
    if trainer.get(limit := _LIMITS.get(verb, "")) == 0:
        wrong.append(f"--trainer.{limit} 0: {verb} would measure nothing; leave it out, or set it to null")
    wrong += wrong_clipping(trainer.get("gradient_clip_val"))
    return wrong


def of_lightning(error: Exception, trainer: Namespace, wrong: Iterable[str]) -> str:
    """The message for an error of Lightning's trainer, which names a setting only in its text.

    If that setting is already in `wrong`, its message there: Lightning's may advise values that are refused here.
    """
    if found := re.search(r"values for CheckpointIO|checkpoint_io (set through both)", str(error)):
        return (
            f"--trainer.{'strategy' if found[1] else 'plugins'}: another CheckpointIO is not supported: it would write "
            "without checksums; leave it out"
        )
    given = {key: value for key, value in vars(trainer).items() if value is not None}
    text = str(error).replace("Timer(duration=", "Timer(max_time=")
    named = sorted((at.start(), key) for key in given if (at := re.search(rf"\b{key}\b", text)))
    setting = f"--trainer.{named[0][1]} {as_yaml(given[named[0][1]])}" if named else "--trainer"
    ours = (said for said in wrong if said.startswith((f"{setting} ", f"{setting}:")))
    return next(ours, f"{setting}: {one_line(error)}")


# Lightning's package of classes -> the setting of its trainer that takes one or some of them
_TAKES = {
    "callbacks": "callbacks", "loggers": "logger", "plugins": "plugins", "profilers": "profiler",
    "strategies": "strategy",
}  # fmt: skip


def of_classes(error: Exception) -> list[str]:
    """The problems in an error of jsonargparse about classes that the user named and that cannot be made."""
    text = str(error)
    if ours := re.findall(r"(?m)^\s*- (--.+)$", text):  # ConfigErrors that it caught
        return [problem for joined in ours for problem in re.split(r"; (?=--)", joined)]
    package = re.search(r"Subtypes: .*?\blightning\.pytorch\.(\w+)\.", text)
    # the first that is still a Namespace: those before it in a list were made
    asked = re.search(r"Given value: .*?Namespace\(class_path='(?:\w+\.)*(\w+)'", text)
    if not package or package[1] not in _TAKES or not asked:
        return [one_line(text)]
    tried = re.findall(r"(?m)^ +- (?:Problem with given class_path '\S+':\n\s+)?(.+)$", text)
    causes = dict.fromkeys(cause for cause in tried if not _NO_CAUSE.match(cause))
    return [f"--trainer.{_TAKES[package[1]]} {asked[1]}: {cause}" for cause in causes] or [one_line(text)]


# How jsonargparse says that one of the types of a setting was not meant, and what it lists below that
_NO_CAUSE = re.compile(
    r"Expected a <class |Not a valid subclass |Does not validate |a class path \(str\)$|a dict with(out class_path| "
    r"class_path| parameters)|Import path \S+ does not correspond to a subclass "
)


def wrong_data(data: Any) -> list[str]:
    """Every setting of a SALTDataModule that is out of range."""
    vocab_fits = data.tokenizer_name != "train" or 257 <= data.trained_vocab_size < 2**31
    share_fits = bool(data.val_source) or 0 < data.val_fraction < 1
    one_source = not (data.source_per_file and data.source_column)
    checks = [
        ("source", data.source, data.source, "names no text; give a file, folder, glob or hub data set"),
        ("tokenizer", data.tokenizer_name, data.tokenizer_name, "must be 'train', a folder or a hub name"),
        ("vocab_size", data.trained_vocab_size, vocab_fits, "must be 257 or more, and below 2**31"),
        ("block_size", data.block_size, 2 <= data.block_size < 2**31, "must be 2 or more, and below 2**31"),
        ("val_fraction", data.val_fraction, share_fits, "must be between 0 and 1, unless --data.val_source is given"),
        ("val_rows", data.val_rows, data.val_rows is None or data.val_rows >= 1, "must be 1 or more, or null"),
        ("text_column", data.text_column, bool(data.text_column) and all(data.text_column), "names no column"),
        ("source_per_file", True, one_source, "and --data.source_column both define sources; give one of them"),
    ]  # fmt: skip
    at_least = {"global_batch_size": 1, "micro_batch_size": 1, "seed": 0, "prepare_workers": 0, "num_workers": 0}
    for name, least in at_least.items():
        value, bits = getattr(data, name), 63 if name == "seed" else 31
        checks.append((name, value, least <= value < 2**bits, f"must be {least} or more, and below 2**{bits}"))
    others = data.source_column, data.source_per_file, data.examples.given
    weights = weight_problems(data.source_weights, data.source, others)
    return weights + [f"--data.{name}: {value!r} {wanted}" for name, value, good, wanted in checks if not good]
