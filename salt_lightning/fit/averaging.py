"""Averaged weights: what Lightning's WeightAveraging leaves out.

With this, all that a run measures, saves or leaves in memory is the average that its checkpoints hold.
"""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging


def averages(trainer: Trainer) -> list[WeightAveraging]:
    """The trainer's callbacks that average weights."""
    return [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]


def begin(trainer: Trainer, fits: bool) -> None:
    """Forgets what an earlier use left in the callbacks: which steps they have averaged, and, unless this start `fits`,
    the average, which they would put into any module."""
    for callback in averages(trainer):
        callback._latest_update_step, callback._latest_update_epoch = 0, -1
        callback._average_model = callback._average_model if fits else None


def pair(module: Any) -> None:
    """Gives the averages the student's buffers, in its order, before these are averaged.

    torch pairs both by position, and a forward in training may fill, register or resize buffers, as caches do.
    """
    for callback in _averaging(module):
        average = callback._average_model.module.student
        paired: dict[int, torch.Tensor] = {}
        for part, of_average in zip(module.student.modules(), average.modules(), strict=True):
            of_average._non_persistent_buffers_set |= part._non_persistent_buffers_set
            of_average._buffers = {
                name: _like(of_average._buffers.get(name), buffer, paired) for name, buffer in part._buffers.items()
            }


def _like(
    held: torch.Tensor | None, buffer: torch.Tensor | None, paired: dict[int, torch.Tensor]
) -> torch.Tensor | None:
    """What the average holds for a buffer: `held`, if that is alike. `paired`: id of each one so far -> the average's;
    parts may share a buffer, which torch then lists once."""
    if buffer is not None and id(buffer) not in paired:
        alike = held is not None and (held.shape, held.dtype) == (buffer.shape, buffer.dtype)
        free = all(held is not other for other in paired.values())
        paired[id(buffer)] = held if alike and free else buffer.detach().clone()  # type: ignore[assignment]
    return paired.get(id(buffer))


@torch.no_grad()
def complete(module: Any) -> None:
    """Copies what is constant from the student into its averages, before these are used.

    These are frozen parameters, and buffers that no checkpoint holds, such as rotary frequencies, or of integers.
    Averaged, they move by rounding, which accumulates: with a decay of 0.9999, angles at position 8,192 by 0.5 rad in
    20,000 steps. Before the first average everything is copied, or the first weights would be measured and saved.
    """
    pair(module)
    for callback in _averaging(module):
        average = callback._average_model
        started = bool(average.n_averaged)
        for part, of_average in zip(module.student.modules(), average.module.student.modules(), strict=True):
            for name, parameter in part._parameters.items():
                if parameter is not None and not (started and parameter.requires_grad):
                    of_average._parameters[name].copy_(parameter)
            unsaved = part._non_persistent_buffers_set
            for name, buffer in part._buffers.items():
                if buffer is not None and not (started and buffer.is_floating_point() and name not in unsaved):
                    of_average._buffers[name].copy_(buffer)


def put_into(checkpoint: dict[str, Any], module: Any) -> None:
    """For `on_save_checkpoint` in a fit: puts the average into one of weights only, too, which callbacks are not shown.
    After a fit the module has the average, or whatever else its user has put there."""
    if module.trainer.state.finished:
        return
    complete(module)
    for callback in _averaging(module):
        if "current_model_state" not in checkpoint:
            checkpoint["state_dict"] = callback._average_model.module.state_dict()


def finish(module: Any) -> None:
    """For `on_fit_end`: leaves the average in a module that had no step to train, as Lightning does in others."""
    for callback in _averaging(module):
        callback._copy_average_to_current(module)


def _averaging(module: Any) -> Iterator[Any]:
    return (each for each in averages(module.trainer) if each._average_model is not None)
