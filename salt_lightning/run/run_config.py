"""A run's settings on disk: config.yaml of this start, and the configs of earlier starts with other settings.

config.yaml                   settings of the newest start
config.until-00000040.yaml    settings up to step 40, where the run was resumed with others
"""

import filecmp
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.cli import SaveConfigCallback
from lightning_utilities.core.enums import StrEnum

from salt_lightning.command.settings import IDENTITY, same_place
from salt_lightning.errors import ConfigError, one_line
from salt_lightning.hugging_face.old_names import save_tokenizer
from salt_lightning.run.event_log import void_tests
from salt_lightning.run.run_folder import changed, earlier_configs, read_config, same_setting, saved, step_named
from salt_lightning.storage import shards


class SaveRunConfig(SaveConfigCallback):
    """Writes config and tokenizer into the run's folder at the first step: a refused start changes nothing."""

    _written = False

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Does nothing: checkpoint, teacher and disk may still be refused."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero and not self._written:
            self._written = True
            run = Path(trainer.default_root_dir)
            with shards.writing(run):
                run.mkdir(parents=True, exist_ok=True)
                self._write(trainer, run)

    def _write(self, trainer: pl.Trainer, run: Path) -> None:
        with TemporaryDirectory(prefix=".config.", dir=run) as made:
            new = Path(made, "config.yaml")
            try:
                self.parser.save(_as_text(self.config), new, skip_none=False, overwrite=True, multifile=False)
            except (TypeError, ValueError) as error:  # a callback has an argument that YAML cannot express
                raise ConfigError(
                    "--trainer.*: an argument of a class cannot be written into config.yaml, perhaps a default that is "
                    f"an object; give it as text or a number ({one_line(error)})"
                ) from error
            # first what may fail: in another user's run, its settings must stay as they are
            _keep_tokenizer(trainer.datamodule.tokenizer, Path(made, "tokenizer"), run)  # type: ignore[attr-defined]
            set_aside(run, trainer.global_step, read_config(new))
            void_tests(run / "test", trainer.global_step)
            os.replace(new, run / "config.yaml")


def _as_text(value: Any) -> Any:
    """Settings with plain text for Lightning's enumerations, such as the default of a Timer's interval, which has the
    type str; jsonargparse itself writes the name of a member where a type says so."""
    if isinstance(value, Namespace):
        return Namespace(**_as_text(vars(value)))
    if isinstance(value, dict):
        return {key: _as_text(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_as_text(each) for each in value]
    return value.value if isinstance(value, StrEnum) else value


def _keep_tokenizer(tokenizer: Any, made: Path, run: Path) -> None:
    """Writes the tokenizer's files, except those that are there already: others may be reading them, or own them."""
    save_tokenizer(tokenizer, made)
    for file in (path for path in made.rglob("*") if path.is_file()):
        kept = run / "tokenizer" / file.relative_to(made)
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not kept.exists() or not filecmp.cmp(file, kept, shallow=False):
            os.replace(file, kept)


def set_aside(run: Path, step: int, now: dict[str, Any]) -> None:
    """Keeps the settings that applied until `step`, if they differ from those that the start at `step` writes.

    Also keeps them if they name another run's checkpoint, from which this run was resumed.
    """
    later = [path for until, path in earlier_configs(run) if until >= step]  # of starts that this one replaces
    held, kept = [*later, run / "config.yaml"][0], run / f"config.until-{step:08d}.yaml"
    was = readable(held)
    first = _begun_elsewhere(was, run)
    if step > first and (changed(was, now) or first):
        if held != kept:
            (run / ".config.tmp-until").unlink(missing_ok=True)  # perhaps of another user, who was killed
            shutil.copy(held, run / ".config.tmp-until")
            os.replace(run / ".config.tmp-until", kept)
        later = [path for path in later if path != kept]
    for path in later:
        path.unlink()


def _begun_elsewhere(settings: dict[str, Any], run: Path) -> int:
    """The step of another run's checkpoint from which these settings applied first; 0: they went on in this run."""
    path = Path(settings.get("ckpt_path") or "last")
    named = Path(settings.get("checkpoint.folder") or Path(settings.get("run") or run, "checkpoints"))
    own = any(same_place(path.parent, folder) for folder in (named, run / "checkpoints"))
    moved = not path.parent.exists() and same_setting(os.path.normpath(path.parent), os.path.normpath(named))
    return 0 if own or moved else step_named(path.name) or 0


def other_places(run: Path, checkpoints: Path) -> Path | None:
    """Where a run has checkpoints, if not in `checkpoints`: another start had another --checkpoint.folder."""
    there = (place for place in (_newest_place(run), run / "checkpoints") if place and saved(place))
    return next((place for place in there if not same_place(place, checkpoints)), None)


def newer_place(run: Path, checkpoints: Path) -> Path | None:
    """Where a run's newest start saved its checkpoints, if that is elsewhere, and some are newer than `checkpoints`."""
    if (place := _newest_place(run)) is None or same_place(place, checkpoints):
        return None
    there, here = saved(place), saved(checkpoints)
    return place if there and there[-1][0] > here[-1][0] else None


def _newest_place(run: Path) -> Path | None:
    """Where a run's newest start saved its checkpoints; None: its config.yaml names the place of another run, of which
    this is a copy."""
    config = readable(run / "config.yaml")
    origin = Path(str(config.get("run") or run))
    if os.path.exists(origin / "config.yaml") and not same_place(origin, run):
        return None
    return Path(str(config.get("checkpoint.folder") or run / "checkpoints"))


def may_be_anothers(run: Path, checkpoints: Path) -> bool:
    """Whether nothing says that the checkpoints are this run's: no settings beside them, and another folder than its
    own, perhaps by a link, which several runs may have."""
    within = os.path.realpath(checkpoints) == os.path.join(os.path.realpath(run), "checkpoints")
    return not within and not os.path.exists(run / "config.yaml")


def taken(run: Path, checkpoints: Path, now: dict[str, Any]) -> list[str]:
    """Problems with a new run with the settings `now` (flat) in a folder that contains another run."""
    here = saved(checkpoints)
    left = newer_place(run, checkpoints) if here else other_places(run, checkpoints)
    if here or left:
        there = f" --checkpoint.folder {left}" if left else ""
        named = f"--checkpoint.folder {checkpoints}" if here and may_be_anothers(run, checkpoints) else f"--run {run}"
        return [f"{named} already contains a run; continue it with --ckpt_path last{there}, or choose another folder"]
    before = readable(run / "config.yaml")
    kept = (key for key in before if key.startswith(IDENTITY) and key in now and now[key] != before[key])
    if not (others := [f"--{key} {before[key]} (here {now[key]})" for key in kept][:3]):
        return []
    return [
        f"--run {run} has the logs of another run, whose config.yaml has {', '.join(others)}; choose another folder, "
        "or remove this one"
    ]


def readable(file: Path) -> dict[str, Any]:
    """The settings in a file of a run's folder; empty if missing, invalid or damaged, which must not end a run."""
    try:
        return read_config(file)
    except (ConfigError, OSError):
        return {}
