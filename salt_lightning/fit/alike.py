"""What must be the same in all processes of a run, and what of it a checkpoint records for a later start to compare.

Nothing else would notice: a process with another setting, text or checkpoint than the others would silently train
something else with them, or wait for messages that they never send.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

import salt_lightning
from salt_lightning.command.settings import as_yaml
from salt_lightning.errors import ConfigError, few
from salt_lightning.hugging_face.folders import config_hash, sample_hash
from salt_lightning.hugging_face.spec import DROPOUT, ModelSpec
from salt_lightning.models import check_path
from salt_lightning.schedule import kd_callbacks
from salt_lightning.storage.kinds import VERSION, plain

# What affects results, or when processes communicate.
_TRAINER = (
    *("max_steps", "precision", "gradient_clip_val", "accumulate_grad_batches", "val_check_interval"),
    *("limit_train_batches", "limit_val_batches", "num_sanity_val_steps", "log_every_n_steps"),
)
_STRATEGY = ("replicas", "shard_teacher", "_save_distributed_checkpoint")
_KD = ("allow_change", "allow_untrained", "probe_gradients")
_CHECKPOINT = ("every_n_steps", "at_steps", "keep")
TEACHER_WEIGHTS = "--model.teacher.weights"
TEACHER = TEACHER_WEIGHTS, "config.json or code of --model.teacher.path"
_DATA = ("micro_batch_size", "val_rows", "tokenizer_fingerprint")


def identity(data: Any) -> dict[str, Any]:
    """What determines which rows a step reads; `data` is a SALTDataModule or None."""
    settings = ["seed", "global_batch_size", "block_size", "num_train_tokens", "isolate_documents"]
    fingerprints = [f"{name}_fingerprint" for name in ("train", "selection", "difficulty")]
    found = {f"--data.{name}": getattr(data, name, 0) for name in settings + fingerprints}
    return found | {"--data.held_out": str(getattr(data, "held_out", ""))}


def of_trainer(trainer: pl.Trainer) -> dict[str, Any]:
    """What determines a step besides its rows, rate and loss, as a checkpoint records it."""
    settings = _of(trainer, ("precision", "gradient_clip_val"))
    return {**{f"--trainer.{name}": value for name, value in settings.items()}, "torch": str(torch.__version__)}


# SALTModule's hyperparameters; others are a subclass's own
_OURS = {
    *("student", "teacher", "teacher_temperature", "optim", "compile", "activation_checkpointing", "accuracy"),
    *("logits_budget_gib", "seed"),
}


def _of_models(settings: Mapping[str, Any], taught: bool) -> dict[str, Any]:
    """The same of a module's hyperparameters, besides the rate, of which others tell."""
    found = {f"optim.{name}": settings["optim"].get(name) for name in ("weight_decay", "beta1", "beta2", "eps")}
    of_student = (settings.get("student") or {}).get("config") or {}
    found |= {f"student.config.{name}": of_student[name] for name in DROPOUT if name in of_student}
    if taught:
        teacher = settings.get("teacher") or {}
        path = teacher.get("path")
        found |= {"teacher.path": path and _end(str(path)), "teacher.revision": teacher.get("revision")}
    names = ("accuracy", "teacher_temperature") if taught else ("accuracy",)
    found |= {name: settings[name] for name in names if name in settings}
    own = {name: value for name, value in settings.items() if name not in _OURS}
    of_own = {f"hyperparameter {name}": value for name, value in _flat(plain(own)) if isinstance(value, _PLAIN)}
    return {f"--model.{name}": value for name, value in found.items()} | of_own


def _teacher(trainer: pl.Trainer) -> ModelSpec:
    return getattr(trainer.lightning_module, "teacher_spec", ModelSpec())


def of_teacher(teacher: ModelSpec) -> dict[str, str]:
    """Which weights, config and code a teacher has that was checked, as far as it can be told, by the names in TEACHER:
    the commit of a hub name, or hashes."""
    path = Path(str(teacher.path))
    found = (teacher.commit,) if teacher.commit else (sample_hash(path), config_hash(path))
    return {name: value for name, value in zip(TEACHER, found, strict=False) if value}


def other_steps(checkpoint: Mapping[str, Any], trainer: pl.Trainer, hparams: Mapping[str, Any]) -> str | None:
    """A message if a resumed run computes steps differently than before."""
    step, found = checkpoint["global_step"], checkpoint.get("kd_stop_step")  # the callback has not read it yet
    taught = any(kd.schedule.is_taught(step) for kd in kd_callbacks(trainer)) and (found is None or step < found)
    before = {**checkpoint["trainer"], **_of_models(checkpoint["hyper_parameters"], taught)}
    now = of_trainer(trainer) | _of_models(hparams, taught)
    if taught:
        with suppress(ConfigError):  # loading says what is wrong
            check_path(_teacher(trainer), "teacher")
        teacher = of_teacher(_teacher(trainer))
        now |= teacher
        if teacher and teacher == {name: before[name] for name in TEACHER if name in before}:  # in another place
            now = {name: value for name, value in now.items() if not name.startswith("--model.teacher.")}
    other = [
        f"{name} {as_yaml(now[name])} (checkpoint: {as_yaml(before[name])})"
        for name in now
        if before.get(name, now[name]) != now[name]
    ]
    return f"continuing with {', '.join(other)}: the steps that follow are computed differently" if other else None


def about(data: Any, trainer: pl.Trainer, optim: Any) -> dict[str, Any]:
    """What a checkpoint records about its run, for a later start to compare and a model card to show."""
    tokenizer, text = getattr(data, "tokenizer_fingerprint", None), getattr(data, "text", {})
    stretches = [asdict(stretch) for stretch in getattr(data, "stretches", ())]
    text_of = {"tokenizer": tokenizer, "data": identity(data), "text": text, "stretches": stretches}
    weights = getattr(trainer.lightning_module, "_teacher_weights", {})
    of_run = {"trainer": of_trainer(trainer) | weights, "max_steps": trainer.max_steps}
    of_run |= {"optim_class": type(optim).__name__, "module_class": type(trainer.lightning_module).__name__}
    return {**text_of, **of_run, VERSION: salt_lightning.__version__}


def of_fit(module: Any, data: Any) -> dict[str, Any]:
    """What determines a fit of a SALTModule in this process, by the name of the setting.

    Only the last part of a path counts, as nodes have their own disks; of a checkpoint's path its run, too. Of the
    callbacks, only ours: others may exist only on the first process.
    """
    trainer = module.trainer
    savers = [callback for callback in trainer.callbacks if hasattr(callback, "at_steps")]
    parts = {
        "--model": dict(module.hparams),
        "--trainer": _of(trainer, _TRAINER),
        "--trainer.strategy": {"class_path": type(trainer.strategy).__name__, **_of(trainer.strategy, _STRATEGY)},
        "--kd": [{**callback.settings, **_of(callback, _KD)} for callback in kd_callbacks(trainer)],
        "--checkpoint": [_of(saver, _CHECKPOINT) for saver in savers],
        "--data": _of(data, _DATA),
        "--ckpt_path": trainer.ckpt_path,
    }
    found = {name: value for name, value in _flat(plain(parts)) if isinstance(value, _PLAIN)}
    found |= {name: _end(path) for name, path in found.items() if name.endswith("path") and isinstance(path, str)}
    return found | {"code": _code(), "torch": str(torch.__version__)} | identity(data)


_TOLD = re.compile(r"--(model|kd|data\.(?!\w+_fingerprint|held_out)|trainer\.(max_steps|precision|gradient_clip_val))")


def told(settings: Mapping[str, Any], data: Any) -> dict[str, Any]:
    """The entries of `of_fit` that a table of runs is sorted by, the text that is read, and how its rows are chosen."""
    text = {"data.source": few(getattr(data, "text", {}).get("source", ()))}
    if selection := getattr(data, "selection", None):
        text |= {"data.selection": str(selection), **{f"data.keep.{k}": v for k, v in asdict(data.keep).items()}}
    return {name[2:]: value for name, value in settings.items() if _TOLD.match(name)} | text


def _end(path: str) -> str:
    parts = Path(path).parts
    return "/".join(parts[-3:] if path.endswith(".ckpt") else parts[-1:])


_PLAIN = int | float | str | bool | None  # others, such as sets and functions, print differently in each process


def _of(holder: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name.removeprefix("_"): getattr(holder, name, None) for name in names}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted names; entries of a list by index, unless there is only one."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value)) if len(value) > 1 or not value else value[0]
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


@cache
def _code() -> str:
    files = sorted(Path(salt_lightning.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def require(trainer: pl.Trainer, found: Mapping[str, Any]) -> None:
    """Compares the values of each process with those of the first. Collective.

    Raises:
        ConfigError: on all processes; names one that differs, and its values.
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
                f"process {process} differs from process 0: {differs}; start all with the same command and version, "
                "and let all of them see the same files"
            )
