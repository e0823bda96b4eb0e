"""Finds the checkpoint that --ckpt_path means, and which of its settings apply."""

import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from salt_lightning.checkpoint import newest
from salt_lightning.command import settings
from salt_lightning.errors import ConfigError, few
from salt_lightning.hugging_face.spec import settings_without_code
from salt_lightning.models import read_checkpoint
from salt_lightning.run.meeting import divide, gather
from salt_lightning.run.peers import UNSEEN_S, say_once
from salt_lightning.run.run_config import may_be_anothers, newer_place, other_places, readable
from salt_lightning.run.run_folder import earlier_configs, flat, same_setting, saved
from salt_lightning.storage import damage, shards

_EVALUATED = ("compile", "logits_budget_gib")  # the model settings that validate and test use


def resolve(path: str, config: Namespace, subcommand: str) -> Path | None:
    """The checkpoint's path; `last` is the newest one in the run's folder, or None if fit is to start at step 0."""
    if subcommand == "predict":
        raise ConfigError(
            f"--ckpt_path {path}: predict scores with the teacher; give it as --model.teacher.path, and leave out "
            "--ckpt_path (null, if a config.yaml sets it)"
        )
    folder = settings.checkpoints(config)
    if not path:
        raise ConfigError("--ckpt_path '' is empty; give a .ckpt file, or last, or leave it out")
    if path != "last":
        elsewhere = not any(
            settings.same_place(Path(path).parent, own) for own in (folder, Path(config.run, "checkpoints"))
        )
        if subcommand == "fit" and elsewhere and saved(folder) and _is_of_another(Path(path), Path(config.run)):
            raise ConfigError(
                f"--ckpt_path {path} is of another run than --run {config.run}, which contains one already; choose "
                "another --run, or one of its own checkpoints"
            )
        if subcommand == "fit" and elsewhere and Path(path).exists():  # e.g. named by a copied config.yaml
            say_once(f"--ckpt_path {path}: resuming from there, not from a checkpoint of --run {config.run}")
        return Path(path)
    gather()  # the first process may have waited for another start's last save
    there = _seen_by_all(folder)
    found = newest(folder, _damage)
    if found is not None:
        if newer := newer_place(Path(config.run), folder):
            raise ConfigError(
                f"--ckpt_path last: {found} is not the newest of --run {config.run}, which are in {newer}; set "
                f"--checkpoint.folder {newer}, or give that file as --ckpt_path"
            )
        unknown = subcommand == "fit" and may_be_anothers(Path(config.run), folder)
        of_another = f"; it may be another run's: --run {config.run} has no config.yaml" if unknown else ""
        say_once(f"--ckpt_path last: {found}{of_another}")
        return found
    if there != saved(folder):
        raise ConfigError(
            f"--ckpt_path last: the run that trains in {folder} has replaced its checkpoints while they were read; try "
            "again, or name one that it keeps (--checkpoint.at_steps)"
        )
    if there:
        raise ConfigError(
            f"--ckpt_path last: every checkpoint in {folder} is damaged (see above); start anew in another --run, or "
            "restore a copy"
        )
    if left := other_places(Path(config.run), folder):
        anew = ", or choose another --run to start anew" if subcommand == "fit" else ""
        raise ConfigError(
            f"--ckpt_path last: no checkpoint in {folder}, but those of --run {config.run} are in {left}; set "
            f"--checkpoint.folder {left}{anew}"
        )
    if subcommand != "fit":
        raise ConfigError(f"--ckpt_path last: no checkpoint in {folder}; check --run {config.run}")
    if moved := _moved(config):
        raise ConfigError(
            f"--ckpt_path last: no checkpoint in {folder}, where {moved} says that the run is, but there are some "
            f"beside that file, so the run was moved; give --run {moved.parent}, or leave out --ckpt_path to start anew"
        )
    say_once(f"--ckpt_path last: no checkpoint in {folder}, starting at step 0")
    return None


def _seen_by_all(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run. Raises ConfigError if its processes go on to see different newest ones: those that have
    one would wait long for the others to look into it."""
    for _ in range(int(UNSEEN_S)):
        there = saved(folder)
        newest_of = gather(there[-1][1].name if there else "none")
        if len(set(newest_of)) < 2:
            return there
        time.sleep(1.0)
    named = few(sorted(set(newest_of)))
    raise ConfigError(
        f"--ckpt_path last: the processes see different newest checkpoints in {folder}: {named}; give a folder that "
        "all nodes share, or copy the newest checkpoint to all of them"
    )


def _moved(config: Namespace) -> Path | None:
    """The given config.yaml of a run with checkpoints that is not where this config says."""
    for file in map(Path, map(str, config.get("config") or ())):
        with suppress(ConfigError, OSError):  # of another's folder
            if (
                not settings.same_place(file.parent, config.run)
                and readable(file).get("run") == config.run
                and saved(file.parent / "checkpoints")
            ):
                return file
    return None


def _is_of_another(path: Path, run: Path) -> bool:
    """Whether a checkpoint is in the folder of another run, from which this one did not begin (a requeued start names
    that again), and which is no copy of this one."""
    configs = [readable(file) for file in (*(file for _, file in earlier_configs(run)), run / "config.yaml")]
    begun = [Path(str(config.get("ckpt_path") or "last")).parent for config in configs]
    there, here = (readable(folder / "config.yaml").get("run") for folder in (path.parent.parent, run))
    known = any(settings.same_place(path.parent, folder) for folder in (*begun, run / "checkpoints"))
    return bool(there) and not same_setting(there, here) and not known


def _damage(path: Path) -> str | None:
    """Like damage.of. Processes of a run that see the same file, not copies on their own disks, share the reading."""
    if (reason := divide(damage.identity(path), partial(damage.of, path))) is None:
        damage.trust(path)
    return reason


def settings_held(path: Path, subcommand: str, given: Namespace, seed: int, proved: bool) -> dict[str, Any]:
    """The module's settings in a checkpoint; reports those that the user's settings, `given`, replace.

    `seed`: what a null --model.seed means.

    Raises:
        ConfigError: the checkpoint is damaged (not checked if `proved`), or is not what the subcommand needs.
    """
    checkpoint = read_checkpoint(str(path), "--ckpt_path")
    if subcommand == "fit":
        shards.require_whole(checkpoint)
    held = settings_without_code(checkpoint["hyper_parameters"], path)
    if not proved and (reason := _damage(path)):
        raise ConfigError(f"--ckpt_path {path} is damaged ({reason}); use an older one, or last, which finds one")
    before = flat(checkpoint["hyper_parameters"])  # as saved: what would run code counts only if it is given again
    for key, now in sorted(vars(given.as_flat()).items()):
        if subcommand != "fit" and key not in _EVALUATED:
            continue
        if key == "seed" and now is None:
            now = seed
        if key == "student.family" and given.get("student.path"):
            continue  # the family is that of the path
        if now != before.get(key, now) and not isinstance(now, dict) and key != "student.path":
            was = settings.as_yaml(before[key])
            say_once(f"--model.{key} {settings.as_yaml(now)} (checkpoint: {was}): the given value is used")
    held.pop("seed", None)  # follows --seed_everything
    return held
