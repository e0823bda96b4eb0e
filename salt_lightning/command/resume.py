"""Which checkpoint --ckpt_path means."""

from pathlib import Path

from jsonargparse import Namespace

from salt_lightning.checkpoint import newest
from salt_lightning.command import settings
from salt_lightning.errors import ConfigError
from salt_lightning.run.peers import say_once
from salt_lightning.run.run_folder import saved


def resolve(path: str, config: Namespace, subcommand: str) -> Path | None:
    """`last` is the newest checkpoint of the run's folder; without one a fit starts at step 0, and says so."""
    folder = settings.checkpoints(config)
    if path != "last":
        elsewhere = Path(path).absolute().parent != folder.absolute()
        if subcommand == "fit" and elsewhere:  # as a config.yaml that was copied names it
            say_once(f"--ckpt_path {path}: going on from there, not from a checkpoint of --run {config.run}")
        return Path(path)
    found = newest(folder)
    if found is None and saved(folder):
        raise ConfigError(
            f"--ckpt_path last: every checkpoint in {folder} is damaged (see above); start anew in another --run, or "
            "bring back a copy"
        )
    if found is None and subcommand != "fit":
        raise ConfigError(f"--ckpt_path last: no checkpoint in {folder}; is --run {config.run} right?")
    say_once(f"--ckpt_path last: {found or f'no checkpoint in {config.run}, starting at step 0'}")
    return found
