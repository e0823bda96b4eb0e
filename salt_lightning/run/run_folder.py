"""What lies in a run's folder: its checkpoints by step, its settings, and in what two of these differ."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from salt_lightning.errors import ConfigError, few, one_line


def step_named(path: str) -> int | None:
    """The optimizer step in the name of a run's checkpoint; None: another name."""
    found = re.fullmatch(r"step-(\d+)\.ckpt", Path(path).name)
    return int(found[1]) if found else None


def saved(folder: Path) -> list[tuple[int, Path]]:
    """Optimizer step and path of each checkpoint of a run, oldest first; none where there is no such folder.

    Raises:
        OSError: it is there and cannot be listed: a new run would start beside its checkpoints (glob says nothing).
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise OSError(f"{folder} cannot be listed ({error.strerror}); nothing was changed, try again") from error
    return sorted((step, folder / name) for name in names if (step := step_named(name)) is not None)


def is_over(ckpt_path: Any, max_steps: int) -> bool:
    """Whether a checkpoint is the last one of a run of so many steps."""
    return (step_named(str(ckpt_path or "")) or 0) >= max_steps > 0


def small_text(file: Path) -> str:
    """What a regular file holds, of 16 MiB at most: the folder may be a stranger's.

    Raises:
        ValueError: it is none, larger, or no UTF-8.
    """
    if not file.is_file() or file.stat().st_size > 1 << 24:
        raise ValueError("no file, or of more than 16 MiB")
    return file.read_text(encoding="utf-8")


def earlier_configs(run: Path) -> list[tuple[int, Path]]:
    """(step, file of the settings until there) of a run that went on under other settings, in order."""
    found = ((re.fullmatch(r"config\.until-(\d+)\.yaml", path.name), path) for path in run.glob("config.until-*.yaml"))
    return sorted((int(match[1]), path) for match, path in found if match)


def read_config(file: Path) -> dict[str, Any]:
    """The settings of a run, by dotted names.

    Raises:
        ConfigError: it is no YAML, or holds no settings.
    """
    try:
        config = yaml.safe_load(small_text(file))  # no tag makes an object
        if not isinstance(config, (dict, type(None))):
            raise yaml.YAMLError("it holds no settings")
        settings = flat(config or {})
        seeds = {key for key in ("model.seed", "data.seed") if key in settings and settings[key] is None}
        settings |= dict.fromkeys(seeds, settings.get("seed_everything"))
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:  # YAML's own are of many
        raise ConfigError(f"{file} is not YAML: {one_line(error)}") from error  # kinds, as in `!!int x`
    odd = [key for key in _NUMBERS if not isinstance(settings.get(key), (int, float, type(None)))]
    odd += [key for key, value in settings.items() if _is_odd(value)]
    if odd:
        raise ConfigError(f"{file}: no run has such a value of {few(odd)}")
    return settings


_NUMBERS = ("kd.steps", "kd.weight", "kd.anneal_steps", "kd.stop_margin")


def _is_odd(value: Any) -> bool:
    return (isinstance(value, str) and "\0" in value) or (isinstance(value, int) and value.bit_length() > 64)


def flat(tree: dict[str, Any] | list[Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    found: dict[str, Any] = {}
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, (dict, list)) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


# Of settings, what is trained or measured. No run goes on with another tokenizer, by whatever name it is given.
_DECIDES = re.compile(
    r"model\.(student\.config|teacher|optim|accuracy)|kd\.(?!allow|probe)|trainer\.(max_steps|gradient_clip_val|precision)"
    r"|data\.(?!\w+_workers|cache_dir|micro_batch_size|tokenizer|vocab_size)|seed_everything"
)


def changed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that both know, and that decide what is trained or measured: (before, now) where they differ."""
    was, is_now = _gathered(before), _gathered(now)
    return {k: (was[k], is_now[k]) for k in sorted(was.keys() & is_now.keys()) if not same_setting(was[k], is_now[k])}


def same_setting(was: Any, now: Any) -> bool:
    """Also the same path, once from the root and once from where a command was given."""
    if isinstance(was, str) and isinstance(now, str) and was.startswith("/") != now.startswith("/"):
        whole, part = sorted((was, now), key=lambda path: not path.startswith("/"))
        return whole.endswith(f"/{os.path.normpath(part)}")
    return was == now


def _gathered(settings: dict[str, Any]) -> dict[str, Any]:
    """With lists as one value, one of a single entry as that."""
    lists: dict[str, list[Any]] = {}
    for key, value in settings.items():
        if _DECIDES.match(key):
            lists.setdefault(re.sub(r"\.\d+$", "", key), []).append(value)
    return {key: values[0] if len(values) == 1 else values for key, values in lists.items()}
