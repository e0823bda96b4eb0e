"""What all processes of a run must have alike.

Nothing else would notice: a process with another setting, text or checkpoint than the others trains something else with
them in silence, or waits for what they do not send.
"""

import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from salt_lightning.errors import ConfigError, few
from salt_lightning.schedule import kd_callbacks

_TRAINER = (
    *("max_steps", "precision", "gradient_clip_val", "accumulate_grad_batches", "val_check_interval"),
    *("limit_val_batches", "log_every_n_steps"),
)
_CHECKPOINT = ("every_n_steps", "at_steps", "keep", "export")  # of a RunCheckpoint
_DATA = ("micro_batch_size", "val_rows", "isolate_documents", "tokenizer_fingerprint")


def identity(data: Any) -> dict[str, Any]:
    """What decides which rows a step reads; of a SALTDataModule, or None."""
    settings = ["seed", "global_batch_size", "block_size", "num_train_tokens"]
    fingerprints = [f"{name}_fingerprint" for name in ("train", "selection", "difficulty")]
    found = {f"--data.{name}": getattr(data, name, 0) for name in settings + fingerprints}
    return found | {"--data.held_out": str(getattr(data, "held_out", ""))}


def of_fit(module: Any, data: Any) -> dict[str, Any]:
    """What decides what a fit of a SALTModule does, as this process has it; by the settings that say it."""
    trainer = module.trainer
    parts = {
        "--model": dict(module.hparams),
        "--trainer": {name: getattr(trainer, name, None) for name in _TRAINER},
        "--trainer.strategy": type(trainer.strategy).__name__,
        "--trainer.callbacks": [type(callback).__name__ for callback in trainer.callbacks],
        "--kd": [callback.settings for callback in kd_callbacks(trainer)],
        "--checkpoint": [{n: getattr(c, n) for n in _CHECKPOINT} for c in trainer.callbacks if hasattr(c, "at_steps")],
        "--data": {name: getattr(data, name, None) for name in _DATA},
        "--ckpt_path": trainer.ckpt_path and str(trainer.ckpt_path),
        "the code of salt_lightning": _code(),
        "torch": torch.__version__,
    }
    return dict(_flat(parts)) | identity(data)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted names; of a list of dictionaries there is one, or none."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        for each in value:
            yield from _flat(each, name)
    else:
        yield name, value


@cache
def _code() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def require(trainer: pl.Trainer, found: Mapping[str, Any]) -> None:
    """Compares the values of each process with the first one's. Collective.

    Raises:
        ConfigError: on all of them, naming a process that has others, and which.
    """
    if trainer.world_size == 1:
        return
    mine = {name: repr(value) for name, value in found.items()}
    first = trainer.strategy.broadcast(mine)
    names = [name for name in first.keys() | mine.keys() if mine.get(name) != first.get(name)]
    others = [f"{name} {mine.get(name)} (process 0: {first.get(name)})" for name in sorted(names)]
    said: list[str] = [""] * trainer.world_size
    dist.all_gather_object(said, few(others))
    for process, differs in enumerate(said):
        if differs:
            raise ConfigError(
                f"process {process} is not like process 0: {differs}; start all with the same command and version, and "
                "let them see the same files"
            )
