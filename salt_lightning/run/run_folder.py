"""The contents of a run's folder: its checkpoints by step, its settings, and how two settings differ."""

import math
import os
import re
from pathlib import Path
from typing import Any

import yaml

from salt_lightning.errors import ConfigError, few, one_line


def step_named(path: str) -> int | None:
    """The optimizer step in a checkpoint's file name; None: not the name of a run's checkpoint."""
    found = re.fullmatch(r"step-(\d{1,18})\.ckpt", Path(path).name)
    return int(found[1]) if found else None


def saved(folder: Path) -> list[tuple[int, Path]]:
    """Optimizer step and path of each checkpoint of a run, by step; empty if the folder does not exist.

    Raises:
        OSError: the folder exists but cannot be listed: a new run would start beside its checkpoints (glob is silent).
        ConfigError: it may not be read.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError as error:
        raise ConfigError(f"{folder} cannot be listed ({error.strerror}); choose a folder that you may read") from error
    except OSError as error:
        raise OSError(f"{folder} cannot be listed ({error.strerror}); nothing was changed, try again") from error
    return sorted((step, folder / name) for name in names if (step := step_named(name)) is not None)


def interval_steps(interval: float, max_steps: int) -> int:
    """Steps between validations, at least 1, for an interval in steps (a whole number) or as a share of the run."""
    if isinstance(interval, int):
        return interval
    return max(1, int(round(interval * max_steps, 6)))  # 0.29 * 100 is 28.999999999999996


def is_over(ckpt_path: Any, max_steps: int) -> bool:
    """Whether a checkpoint is the last one of a run of `max_steps` steps."""
    return (step_named(str(ckpt_path or "")) or 0) >= max_steps > 0


def small_text(file: Path) -> str:
    """The text of a regular file of at most 16 MiB: the folder may be untrusted.

    Raises:
        ValueError: it is not a regular file, larger, or not UTF-8.
    """
    if not file.is_file() or file.stat().st_size > 1 << 24:
        raise ValueError("not a file, or larger than 16 MiB")
    return file.read_text(encoding="utf-8")


def earlier_configs(run: Path) -> list[tuple[int, Path]]:
    """(step, file with the settings until that step) of a run that was resumed with other settings, in order."""
    found = ((re.fullmatch(r"config\.until-(\d+)\.yaml", path.name), path) for path in run.glob("config.until-*.yaml"))
    return sorted((int(match[1]), path) for match, path in found if match)


def read_config(file: Path) -> dict[str, Any]:
    """The settings of a run, by dotted names: seeds that are null as --seed_everything gives them, 32 as 32-true.

    Raises:
        ConfigError: the file is not YAML, or contains no settings.
    """
    try:
        config = yaml.safe_load(small_text(file))  # safe: no tag creates an object
        if not isinstance(config, (dict, type(None))):
            raise yaml.YAMLError("it contains no settings")
        settings = flat(config or {})
        seeds = {key for key in ("model.seed", "data.seed") if key in settings and settings[key] is None}
        settings |= dict.fromkeys(seeds, settings.get("seed_everything"))
        by_plugin = any(key.startswith("trainer.plugins.") for key in settings)
        if settings.get("trainer.precision", 0) in (None, 32, "32") and not by_plugin:
            settings["trainer.precision"] = "32-true"  # which they mean
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:  # YAML raises many kinds
        raise ConfigError(f"{file} is not YAML: {one_line(error)}") from error  # e.g. for `!!int x`
    odd = [key for key in _NUMBERS if not isinstance(settings.get(key), (int, float, type(None)))]
    odd += [key for key in _SCALARS if not _is_scalar(settings.get(key))]
    odd += [key for key, value in settings.items() if _is_odd(value)]
    if odd:
        raise ConfigError(f"{file}: no run writes such values for {few(odd)}; restore the run's own file")
    return settings


_NUMBERS = ("kd.steps", "kd.weight", "kd.anneal_steps", "kd.stop_margin")
_SCALARS = ("trainer.val_check_interval", "seed_everything", "model.seed", "data.seed")


def _is_scalar(value: Any) -> bool:
    return math.isfinite(value) if isinstance(value, float) else isinstance(value, (int, str, type(None)))


def _is_odd(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" in value or value.encode(errors="replace").decode() != value
    return isinstance(value, int) and value.bit_length() > 63


def flat(tree: dict[str, Any] | list[Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    found: dict[str, Any] = {}
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, (dict, list)) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


_SHOWN = re.compile(r"trainer\.(enable_progress_bar|enable_model_summary|logger|callbacks$)")
_CALLBACK = re.compile(r"(trainer\.callbacks(?:\.\d+)?\.)class_path")
_WATCHERS = {
    *("LearningRateMonitor", "DeviceStatsMonitor", "ModelSummary", "RichModelSummary", "ThroughputMonitor"),
    *("ProgressBar", "RichProgressBar", "TQDMProgressBar"),
}


def without_watchers(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without those that only show and log a run: loggers, bars, and Lightning's watching callbacks."""
    callbacks = [(at[1], str(name).rpartition(".")[2]) for k, name in settings.items() if (at := _CALLBACK.match(k))]
    watchers = tuple(prefix for prefix, name in callbacks if name in _WATCHERS)
    others = [prefix for prefix, name in callbacks if name not in _WATCHERS]

    def numbered_anew(key: str) -> str:
        for i, prefix in enumerate(others):
            if key.startswith(prefix):
                return f"trainer.callbacks.{i}.{key.removeprefix(prefix)}"
        return key

    return {numbered_anew(k): v for k, v in settings.items() if not (_SHOWN.match(k) or k.startswith(watchers))}


# Settings that decide what is trained or measured. No run continues with another tokenizer, whatever its name.
_DECIDES = re.compile(
    r"model\.(student\.(config|dtype)|teacher|optim|accuracy)|kd\.(?!allow|probe)|trainer\.(max_steps|gradient_clip_val|precision)"
    r"|data\.(?!\w+_workers|cache_dir|micro_batch_size|tokenizer|vocab_size)|seed_everything"
)


_UNSET = {"model.student.config.attention_dropout": 0.0}  # families' default; a config need not name it


def changed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(before, now) of the settings that decide what is trained or measured, are in both, and differ."""
    was, is_now = _gathered(before), _gathered(now)
    return {k: (was[k], is_now[k]) for k in sorted(was.keys() & is_now.keys()) if not same_setting(was[k], is_now[k])}


def same_setting(was: Any, now: Any) -> bool:
    """Whether two values are equal; an absolute path and the same path relative to a working directory are."""
    if isinstance(was, str) and isinstance(now, str) and was.startswith("/") != now.startswith("/"):
        whole, part = sorted((was, now), key=lambda path: not path.startswith("/"))
        return whole.endswith(f"/{os.path.normpath(part)}")
    return was == now


def _gathered(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with each list as one value; a list of one entry becomes that entry."""
    lists: dict[str, list[Any]] = {}
    started = bool(settings.get("model.student.path"))  # from weights that bring their own config
    for key, value in settings.items():
        if _DECIDES.match(key) and not (started and key.startswith("model.student.config")):
            lists.setdefault(re.sub(r"\.\d+$", "", key), []).append(value)
    if any(key.startswith("trainer.callbacks") for key in settings):
        lists["trainer.callbacks"] = _callbacks(settings) or [None]
    found = {key: values[0] if len(values) == 1 else values for key, values in lists.items()}
    return {**_UNSET, **found} if found and not started else found


def _callbacks(settings: dict[str, Any]) -> list[str]:
    """Class and arguments of each callback that may change a run's weights; a path in them is a run's own."""
    named: dict[str, list[str]] = {}
    for key, value in without_watchers(settings).items():
        at = re.match(r"trainer\.callbacks\.(?:(\d+)\.)?(class_path|init_args\.(.+))$", key)
        if at and value is not None:
            said = str(value).rpartition(".")[2] if at[2] == "class_path" else f"{at[3]}={value}"
            named.setdefault(at[1] or "0", []).extend([said] if "/" not in said else [])
    found = [parts for _, parts in sorted(named.items()) if parts]
    return [" ".join(parts) for parts in found if not {"Timer", "ModelCheckpoint"} & set(parts)]
