"""Converts optimizer steps for Lightning, which counts micro-batches: accumulation, validation, phase 1, time."""

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    SpikeDetection,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from salt_lightning.command.settings import wrong_clipping, wrong_counts
from salt_lightning.errors import ConfigError, few, refuse, require_length
from salt_lightning.schedule import interval_steps, kd_callbacks
from salt_lightning.storage.kinds import plain

# What the user gave the trainer, before `setup` overwrites it with micro-batches (setup may run twice).
_CADENCE: "WeakKeyDictionary[Trainer, tuple[int, int | float | None]]" = WeakKeyDictionary()


def set_cadence(trainer: Trainer, accumulation: int) -> None:
    """Sets the trainer's accumulation, and converts its validation interval (steps or a share) to micro-batches.

    An interval longer than the run is cut to the run: Lightning would refuse it, or never validate.

    Raises:
        ConfigError: the trainer has its own accumulation or limit, or no run length.
    """
    accumulate, interval = _CADENCE.setdefault(
        trainer, plain((trainer.accumulate_grad_batches, getattr(trainer, "val_check_interval", None)))
    )
    limits = {name: getattr(trainer, name) for name in ("limit_train_batches", "check_val_every_n_epoch")}
    refuse(wrong_counts({"accumulate_grad_batches": accumulate, "val_check_interval": interval, **limits}))
    require_length(trainer.max_steps)
    check_trainer(trainer)  # before the callbacks' own setup, which some need what a SALTModule lacks
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping):  # Lightning would take an interval of one micro-batch for one epoch
            callback._check_on_train_epoch_end = False
    trainer.fit_loop.min_epochs = 0  # else min_steps means one epoch, the whole run: nothing could end it early
    trainer.accumulate_grad_batches = accumulation
    if interval is not None:
        steps = min(interval_steps(interval, trainer.max_steps), trainer.max_steps)
        trainer.val_check_interval = int(steps) * accumulation  # int: Lightning takes a number of numpy for a share


_REFUSED: dict[type[Callback], str] = {
    LearningRateFinder: "it sets the learning rate, which follows from --model.optim.*; compare several runs instead",
    StochasticWeightAveraging: "it counts epochs, and a run has only one, so it would average nothing",
    GradientAccumulationScheduler: "accumulation follows from --data.global_batch_size",
    OnExceptionCheckpoint: "any later run would start from its file; use --checkpoint.every_n_steps to save, and "
    "--ckpt_path last to resume",
    BaseFinetuning: "it thaws parts at later epochs, and a run has only one; freeze what shall stay as it is with "
    "requires_grad_(False) in extend_student (docs/extending.md)",
    ModelPruning: "it collects what to prune before the student is built; prune an exported model",
    BatchSizeFinder: "the verb check reports which --data.micro_batch_size fits",
}


def check_trainer(trainer: Trainer, one_epoch: bool = True, parts: Sequence[str] | None = None) -> None:
    """Raises ConfigError for features of Lightning that would do nothing here, or something else than they say.

    `one_epoch`: the run is one epoch for Lightning, as with a SALTDataModule. `parts`: the sources and thirds with a
    validation loss of their own, once they are known.
    """
    wrong = wrong_clipping(trainer.gradient_clip_val)
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        wrong.append("--trainer.val_check_interval: a time is not supported; give optimizer steps")
    if (algorithm := trainer.gradient_clip_algorithm) == GradClipAlgorithmType.VALUE:
        wrong.append(f"--trainer.gradient_clip_algorithm {algorithm.value} is not supported; use norm")
    if any(timer._duration is not None and timer._duration <= 0 for timer in timers(trainer)):
        wrong.append("--trainer.max_time 0 leaves no time to train; give more, or leave it out")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        why = _why_refused(callback, trainer.max_steps, one_epoch)
        wrong += [f"--trainer.callbacks {type(callback).__name__} is not supported: {each}" for each in why]
    losses = "val/ce/SOURCE" if parts is None else few([f"val/ce/{part}" for part in parts])
    for callback, name in _monitors(trainer):
        kind = type(callback).__name__
        others = [*([losses] if losses else ()), *_MONITORED[1:]]
        if isinstance(callback, ModelCheckpoint):
            others += _OF_CHECKPOINTS
        of_part = name.startswith("val/ce/") and (parts is None or name.removeprefix("val/ce/") in parts)
        if name not in ("val/ce", *others) and not of_part:
            wrong.append(
                f"--trainer.callbacks {kind}: monitor {name} is never logged; use val/ce or one of {', '.join(others)}"
            )
        elif trainer.limit_val_batches == 0 and name not in _OF_CHECKPOINTS:
            turned_off = "but --trainer.limit_val_batches 0 turns them off; leave one of them out"
            wrong.append(f"--trainer.callbacks {kind} acts at validations, {turned_off}")
    refuse(wrong)


def _why_refused(callback: Callback, max_steps: int, one_epoch: bool) -> list[str]:
    why = [why for kind, why in _REFUSED.items() if isinstance(callback, kind)]
    if type(callback) is SpikeDetection:  # a subclass may have mended it
        why.append(
            "Lightning cannot load its state, so no checkpoint of the run could be resumed; a loss that is not finite "
            "ends a run anyway"
        )
    if one_epoch and _counts_epochs(callback):
        why.append("it acts at the ends of epochs, and a run has only one; give it an interval in steps")
    if isinstance(callback, EMAWeightAveraging) and (callback.update_starting_at_step or 0) >= max_steps > 0:
        why.append("update_starting_at_step is not before --trainer.max_steps, so nothing would be averaged")
    return why


def _counts_epochs(callback: Callback) -> bool:
    """Whether a callback acts only at ends of epochs, or between epochs."""
    if isinstance(callback, Timer):
        return callback._interval == "epoch"
    if isinstance(callback, EarlyStopping):
        return bool(callback._check_on_train_epoch_end)
    if isinstance(callback, EMAWeightAveraging):
        return callback.update_starting_at_epoch is not None
    return isinstance(callback, ModelCheckpoint) and callback._every_n_epochs > 1


def _monitors(trainer: Trainer) -> list[tuple[Callback, str]]:
    """The callbacks that monitor a metric, and its name. None if a subclass or a user's own callback may log others."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    module = trainer.lightning_module or trainer  # None before a fit of the command, which has no subclass
    if not all(type(each).__module__.startswith(_KNOWN) for each in (*callbacks, module)):
        return []
    found = ((callback, getattr(callback, "monitor", None)) for callback in callbacks)
    return [(callback, name) for callback, name in found if name is not None]


_KNOWN = ("lightning.", "salt_lightning.")
_MONITORED = ("val/ce", "val/perplexity", "val/accuracy", "val/tokens", "val/bits_per_byte", "val/step")
_OF_CHECKPOINTS = ("step", "epoch")  # which ModelCheckpoint adds itself


def plan_validation(trainer: Trainer) -> None:
    """Cuts a validation interval in micro-batches to the run, as `set_cadence` does with one in steps."""
    interval = getattr(trainer, "val_check_interval", None)
    steps = trainer.max_steps * trainer.accumulate_grad_batches
    if isinstance(interval, int) and interval > steps:
        trainer.val_check_interval = steps
    elif isinstance(interval, int) and steps % interval:
        rank_zero_info(f"validation every {interval * trainer.max_steps // steps} steps leaves out the last step")


def phase1_steps(trainer: Trainer) -> int:
    """The steps before --kd.steps, even if --kd.weight is 0 (selection without KD); all steps if it is null."""
    steps = next((kd.schedule.steps for kd in kd_callbacks(trainer)), None)
    return trainer.max_steps if steps is None else min(steps, trainer.max_steps)


def place(trainer: Trainer | None) -> tuple[int, int]:
    """This process's data-parallel rank, and the number of ranks; also before the processes exist."""
    kwargs = (trainer.distributed_sampler_kwargs if trainer else None) or {}
    return int(kwargs.get("rank", 0)), int(kwargs.get("num_replicas", 1))


def accumulation(global_batch: int, micro_batch: int, world: int) -> int:
    """Micro-batches that one device accumulates for an optimizer step.

    Raises:
        ConfigError: the sizes do not divide; names the nearest that do.
    """
    per_pass = micro_batch * world
    if global_batch % per_pass == 0:
        return global_batch // per_pass
    below, above = global_batch // per_pass * per_pass, -(-global_batch // per_pass) * per_pass
    sizes = " or ".join(str(size) for size in (below, above) if size)
    share = global_batch // world if global_batch % world == 0 else 0  # rows of one device in a step
    nearest = sorted(divisors(share), key=lambda size: (abs(size - micro_batch), size))[:2]
    other = f", or --data.micro_batch_size {' or '.join(map(str, sorted(nearest)))}" if nearest else ""
    raise ConfigError(
        f"--data.global_batch_size: {global_batch} rows do not divide into micro-batches of {micro_batch} "
        f"(--data.micro_batch_size) on {world} devices; use {sizes}{other}"
    )


def divisors(number: int) -> list[int]:
    """In order; none for 0."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def timers(trainer: Trainer) -> list[Timer]:
    return [c for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]


def require_time_left(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Raises ConfigError if no time is left: Lightning resumes the checkpoint's timer and ends the run silently."""
    for timer in timers(trainer):
        state, limit_s = checkpoint["callbacks"].get(timer.state_key, {}), timer._duration
        used_s = state.get("time_elapsed", {}).get(RunningStage.TRAINING, 0.0)
        if limit_s is not None and used_s >= limit_s:
            raise ConfigError(
                f"--trainer.max_time {timedelta(seconds=limit_s)} counts over all starts of a run, and this run has "
                f"already trained for {timedelta(seconds=round(used_s))}; give more, or leave it out"
            )
