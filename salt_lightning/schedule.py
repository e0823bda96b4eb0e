"""The KD weight w(t): a pure function of the optimizer step, and the callback that applies it.

SALT, arXiv 2410.18779: loss = (1 - w) CE + w KD with w > 0 only while t < n_KD (`steps`), omega = `weight`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from salt_lightning.errors import ConfigError

Shape = Literal["step", "linear", "linear_ratio", "cosine"]


@dataclass(frozen=True)
class KDSchedule:
    """w(step) for an integer optimizer step, counted from 0: the weight of the step about to be taken.

    Args:
        weight: omega, the KD weight before the ramp; 0 is BASELINE.
        steps: n_KD; w is exactly 0.0 from this step on. None is the whole run (RKD).
        anneal_steps: Length of the ramp, the last of the `steps`: w(steps - anneal_steps) = omega, w(steps) = 0.
        shape: step (no ramp), linear, linear_ratio (r = w / (1 - w) falls linearly) or cosine (half a period).

    Raises:
        ConfigError: listing every setting that is out of range or contradicts another.
    """

    weight: float = 0.667
    steps: int | None = None
    anneal_steps: int = 0
    shape: Shape = "step"

    def __post_init__(self) -> None:
        wrong = []
        if not 0.0 <= self.weight <= 1.0:
            wrong.append(f"--kd.weight {self.weight} must lie in 0..1")
        if self.steps is not None and self.steps < 0:
            wrong.append(f"--kd.steps {self.steps} must not be negative (null = the whole run)")
        if self.anneal_steps < 0:
            wrong.append(f"--kd.anneal_steps {self.anneal_steps} must not be negative")
        if self.shape not in ("step", "linear", "linear_ratio", "cosine"):
            wrong.append(f"--kd.shape {self.shape} must be step, linear, linear_ratio or cosine")
        elif self.shape == "step" and self.anneal_steps > 0:
            wrong.append(
                f"--kd.anneal_steps {self.anneal_steps} needs --kd.shape linear, linear_ratio or cosine: "
                "step has no ramp"
            )
        elif self.shape != "step" and self.anneal_steps == 0:
            wrong.append(f"--kd.shape {self.shape} needs --kd.anneal_steps, the length of its ramp")
        if self.anneal_steps > 0 and self.steps is None:
            wrong.append(f"--kd.anneal_steps {self.anneal_steps} needs --kd.steps, where the ramp ends")
        elif self.steps is not None and self.anneal_steps > self.steps:
            wrong.append(f"--kd.anneal_steps {self.anneal_steps} is longer than --kd.steps {self.steps}")
        if self.shape == "linear_ratio" and self.weight == 1.0:
            wrong.append("--kd.weight 1.0 has an infinite ratio w / (1 - w): --kd.shape linear_ratio needs less")
        if wrong:
            raise ConfigError("; ".join(wrong))

    def __call__(self, step: int) -> float:
        if self.steps is not None and step >= self.steps:
            return 0.0
        if self.steps is None or step <= self.steps - self.anneal_steps:
            return self.weight
        left = (self.steps - step) / self.anneal_steps  # 1 at the start of the ramp, 0 at its end
        if self.shape == "linear":
            return self.weight * left
        if self.shape == "cosine":
            return self.weight * 0.5 * (1.0 - math.cos(math.pi * left))
        ratio = self.weight / (1.0 - self.weight) * left
        return ratio / (1.0 + ratio)

    def kd_steps(self, steps_done: int) -> int:
        """How many of the first `steps_done` optimizer steps had a teacher."""
        if self.weight == 0.0:
            return 0
        return steps_done if self.steps is None else min(steps_done, self.steps)


class KDScheduleCallback(pl.Callback):
    """Sets the KD weight before each batch and lets the teacher go at the boundary.

    Holds the schedule and no mutable state: the weight follows from trainer.global_step, so accumulation, resume
    and the number of ranks cannot change it. The schedule goes into the checkpoint; resuming under another
    one is refused unless `allow_change`.

    Args:
        weight: KD weight before the ramp (omega), 0..1; 0 trains BASELINE and loads no teacher.
        steps: Optimizer steps with a teacher (n_KD); from this step on the weight is 0. null = the whole run (RKD).
        anneal_steps: Length of the ramp at the end of those steps; 0 for shape step.
        shape: How the weight falls: step, linear, linear_ratio or cosine.
        allow_change: Go on from a checkpoint that was trained under another schedule.
    """

    def __init__(
        self,
        weight: float = 0.667,
        steps: int | None = None,
        anneal_steps: int = 0,
        shape: Shape = "step",
        allow_change: bool = False,
    ) -> None:
        self.schedule = KDSchedule(weight, steps, anneal_steps, shape)
        self.allow_change = allow_change

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        steps, max_steps = self.schedule.steps, trainer.max_steps
        if self.schedule.weight > 0 and steps is not None and 0 < max_steps < steps:
            short = max(1, max_steps // 5)
            raise ConfigError(
                f"--kd.steps {steps} is larger than --trainer.max_steps {max_steps}: the teacher would never leave. "
                f"For a shorter run shorten both, e.g. --trainer.max_steps {max_steps} --kd.steps {short}"
                + (f" --kd.anneal_steps {short // 2}" if self.schedule.anneal_steps else "")
                + "; for a teacher that stays (RKD) set --kd.steps null"
            )
        if self.schedule.kd_steps(1) and not pl_module.has_teacher:
            raise ConfigError(
                f"--kd.weight {self.schedule.weight} needs a teacher: set --model.teacher.path to a checkpoint, a "
                "Hugging Face folder or a hub name, or --kd.weight 0 for BASELINE"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # Here, not earlier: global_step is restored by now, so a resume in phase 2 never loads the teacher.
        if self.schedule(trainer.global_step) > 0.0:
            pl_module.load_teacher()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.kd_weight.fill_(self.schedule(trainer.global_step))  # in place: a new float would recompile

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.teacher is not None and self.schedule(trainer.global_step) == 0.0:
            held_bytes = pl_module.release_teacher()
            rank_zero_info(f"step {trainer.global_step}: the teacher has left, {held_bytes / 2**30:.3g} GiB returned")

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["kd_schedule"] = asdict(self.schedule)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        saved, now = checkpoint.get("kd_schedule"), asdict(self.schedule)
        if trainer.state.fn != TrainerFn.FITTING or saved is None or saved == now:
            return
        changed = ", ".join(f"--kd.{k} {now[k]} (checkpoint: {saved.get(k)})" for k in now if now[k] != saved.get(k))
        if not self.allow_change:
            raise ConfigError(
                f"the KD schedule differs from the checkpoint's: {changed}. Use the checkpoint's, "
                "or --kd.allow_change true to go on with the new one"
            )
        rank_zero_info(f"going on under another KD schedule: {changed}")
