"""The KD weight w(t): a pure function of the optimizer step, and the callback that applies it.

SALT, arXiv 2410.18779: loss = (1 - w) CE + w KD with w > 0 only while t < n_KD (`steps`), omega = `weight`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from salt_lightning.command.settings import as_yaml
from salt_lightning.errors import ConfigError, refuse, wrong_kinds
from salt_lightning.preflight import size_said
from salt_lightning.run.run_folder import interval_steps
from salt_lightning.teacher.probe import Probe, judged

Shape = Literal["step", "linear", "linear_ratio", "cosine"]


@dataclass(frozen=True)
class KDSchedule:
    """w(step), the KD weight of an optimizer step, counted from 0.

    For a shape of your own, override `__call__` in a subclass; weights must be in 0..1, and 0 from `steps` on.

    Args:
        weight: omega, the KD weight before the ramp; 0 is BASELINE.
        steps: n_KD; w is exactly 0.0 from this step on. None is the whole run (RKD).
        anneal_steps: Length of the ramp at the end of `steps`: w(steps - anneal_steps) = omega, w(steps) = 0.
        shape: step (no ramp), linear, linear_ratio (r = w / (1 - w) falls linearly) or cosine (half a period).

    Raises:
        ConfigError: lists every setting that is out of range or contradicts another.
    """

    weight: float = 0.667
    steps: int | None = None
    anneal_steps: int = 0
    shape: Shape = "step"

    def __post_init__(self) -> None:
        refuse(wrong_kinds(KDSchedule, vars(self), "--kd."))
        object.__setattr__(self, "weight", float(self.weight))  # numpy's, or a whole number
        wrong = []
        if not 0.0 <= self.weight <= 1.0:
            wrong.append(f"--kd.weight {self.weight} must be in 0..1")
        if self.steps is not None and self.steps < 0:
            wrong.append(f"--kd.steps {self.steps} must not be negative (null = the whole run)")
        if self.anneal_steps < 0:
            wrong.append(f"--kd.anneal_steps {self.anneal_steps} must not be negative")
        if self.shape == "step" and self.anneal_steps > 0:
            wrong.append(
                f"--kd.anneal_steps {self.anneal_steps} needs --kd.shape linear, linear_ratio or cosine: "
                "step has no ramp"
            )
        elif self.shape != "step" and self.anneal_steps == 0:
            wrong.append(f"--kd.shape {self.shape} needs --kd.anneal_steps, the length of its ramp")
        if self.anneal_steps > 0 and self.steps is None:
            wrong.append(f"--kd.anneal_steps {self.anneal_steps} needs --kd.steps, where the ramp ends")
        elif self.steps is not None and self.anneal_steps > max(0, self.steps):
            wrong.append(f"--kd.anneal_steps {self.anneal_steps} is longer than --kd.steps {self.steps}")
        if self.shape == "linear_ratio" and self.weight == 1.0:
            wrong.append("--kd.weight 1.0 makes w / (1 - w) infinite: --kd.shape linear_ratio needs a smaller weight")
        refuse(wrong)

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

    def is_taught(self, step: int) -> bool:
        """Whether `step` has a teacher, whatever its weight."""
        return self.kd_steps(step + 1) > self.kd_steps(step)

    def stop_at(self, step: int) -> KDSchedule:
        """The same schedule with its ramp starting at `step`, or where it starts now if that is earlier."""
        steps = step + self.anneal_steps
        return self if self.steps is not None and self.steps <= steps else replace(self, steps=steps)


def trained_schedule(checkpoint: dict[str, Any]) -> KDSchedule | None:
    """The schedule that a checkpoint was trained with, with the boundary that the run found; None: without one."""
    saved = checkpoint.get("kd_schedule")
    if saved is None:
        return None
    given = {field.name: saved[field.name] for field in fields(KDSchedule)}
    own = {} if saved["shape"] in get_args(Shape) else {"shape": "step", "anneal_steps": 0}  # of a subclass
    planned = KDSchedule(**given | own)
    stop_step = checkpoint.get("kd_stop_step")
    return planned if stop_step is None else replace(planned, steps=stop_step)


def kd_callbacks(trainer: pl.Trainer) -> list[KDScheduleCallback]:
    """The trainer's KDScheduleCallbacks; a fit has at most one."""
    return [c for c in trainer.callbacks if isinstance(c, KDScheduleCallback)]  # type: ignore[attr-defined]


def validation_steps(trainer: pl.Trainer) -> Iterator[int]:
    """The optimizer steps of a fit's validations, once the loaders are known; none without a length."""
    interval, epochs = trainer.val_check_batch or math.inf, trainer.check_val_every_n_epoch
    if not math.isfinite(interval):
        return
    batches = int(min(trainer.num_training_batches, 1 << 60))
    steps = -(-batches // trainer.accumulate_grad_batches)  # of an epoch: its last batch ends a step
    for epoch in range(trainer.max_steps):
        first = int(interval) - (epoch * batches % int(interval) if epochs is None else 0)
        for batch in range(first, batches + 1, int(interval)) if (epoch + 1) % (epochs or 1) == 0 else ():
            yield epoch * steps + (steps if batch == batches else batch // trainer.accumulate_grad_batches)


def in_training(trainer: pl.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


class KDScheduleCallback(pl.Callback):
    """Sets the KD weight before each batch, unloads the teacher at the boundary, and until then compares both models.

    The weight follows from the schedule and trainer.global_step, so accumulation, resume and the number of ranks cannot
    change it. The checkpoint contains the schedule; resuming with another one is refused unless `allow_change`. The run
    itself determines only `stop_step`, if there is a `stop_margin`: one integer, saved in the checkpoint too.

    For another shape in Python, write a subclass of KDSchedule and set `callback.schedule = Mine(...)`.

    Each validation while the teacher is loaded logs probe/gap and probe/student_better (probe.py).

    Args:
        weight: KD weight before the ramp (omega), 0..1; 0 trains BASELINE and loads no teacher.
        steps: Optimizer steps with a teacher (n_KD); from this step on the weight is 0. null: the whole run (RKD).
        anneal_steps: Length in steps of the ramp at the end of phase 1; 0 for shape step.
        shape: How the weight falls: step, linear, linear_ratio or cosine.
        stop_margin: End KD (begin the ramp) at the first validation where the student's CE is at most this many nats
            above the teacher's on the same held-out rows, at the latest at `steps`. null: at `steps`.
        min_steps: Validations before this step cannot end KD.
        probe_gradients: Also log probe/grad_cosine, the cosine between the gradients of CE and KD.
        allow_change: Resume from a checkpoint that was trained with another schedule.
        allow_untrained: Accept a teacher that predicts the text no better than an untrained one, as a control.
    """

    _fit: tuple[pl.Trainer, Any] | None = None  # while it trains

    def __init__(  # noqa: PLR0913 - the constructor is the command line
        self,
        weight: float = 0.667,
        steps: int | None = None,
        anneal_steps: int = 0,
        shape: Shape = "step",
        stop_margin: float | None = None,
        min_steps: int = 0,
        probe_gradients: bool = False,
        allow_change: bool = False,
        allow_untrained: bool = False,
    ) -> None:
        refuse(wrong_kinds(KDScheduleCallback.__init__, locals(), "--kd."))
        self.schedule = KDSchedule(weight, steps, anneal_steps, shape)
        if not math.isfinite(stop_margin or 0.0):
            raise ConfigError(f"--kd.stop_margin {stop_margin} must be a finite number, or null")
        if stop_margin is None and min_steps:
            raise ConfigError(f"--kd.min_steps {min_steps} needs --kd.stop_margin")
        if min_steps < 0 or (steps is not None and min_steps >= steps > 0):
            below = f", and below --kd.steps {steps}" if steps else ""
            raise ConfigError(f"--kd.min_steps {min_steps} must be 0 or more{below}")
        self.stop_margin, self.min_steps = stop_margin, min_steps
        self.allow_change, self.allow_untrained = allow_change, allow_untrained
        self.probe_gradients, self._probe = probe_gradients, Probe(probe_gradients)

    @property
    def schedule(self) -> KDSchedule:
        """The schedule in use: as planned, but ending at `stop_step` once the run has found it."""
        return self.planned if self.stop_step is None else replace(self.planned, steps=self.stop_step)

    @schedule.setter
    def schedule(self, planned: KDSchedule) -> None:
        if not isinstance(planned, KDSchedule):
            raise ConfigError(f"KDScheduleCallback.schedule must be a KDSchedule, not a {type(planned).__name__}")
        if self._fit is not None:  # of its steps so far, as many had a teacher as the schedule until now says
            self._fit[1].meter.keep(self._fit[0].global_step)
        self.planned = planned
        self.stop_step: int | None = None

    def kd_steps(self, steps_done: int) -> int:
        """How many of the first `steps_done` optimizer steps had a teacher; a validation may change this."""
        return self.schedule.kd_steps(steps_done)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that a checkpoint saves and a resume compares."""
        own = {} if type(self.planned) is KDSchedule else {"shape": type(self.planned).__name__}
        return {**asdict(self.planned), **own, "stop_margin": self.stop_margin, "min_steps": self.min_steps}

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        if not hasattr(pl_module, "load_teacher"):
            raise ConfigError(
                f"KDScheduleCallback needs a SALTModule, not a {type(pl_module).__name__}; train a SALTModule, or a "
                "subclass of it"
            )
        if trainer.global_step == 0:  # else it goes on from an earlier fit
            self.stop_step = None
        self._probe.forget()  # values from an earlier fit
        self.check(trainer, pl_module.has_teacher, trainer.datamodule)  # type: ignore[attr-defined]

    def check(self, trainer: pl.Trainer, has_teacher: bool, data: Any) -> None:
        """Raises ConfigError if the schedule does not fit the run; needs no text.

        Before `data` has been set up, a validation interval is in optimizer steps; afterwards, in micro-batches.
        """
        if (number := len(kd_callbacks(trainer))) > 1:
            raise ConfigError(f"the Trainer has {number} KDScheduleCallbacks, but only one can be used; use --kd.*")
        steps, max_steps = self.schedule.steps, trainer.max_steps
        if self.schedule.weight > 0 and steps is not None and 0 < max_steps < steps:
            short = max(1, max_steps // 5)
            raise ConfigError(
                f"--kd.steps {steps} is larger than --trainer.max_steps {max_steps}: the teacher would never leave; "
                f"for a shorter run, shorten both, e.g. --trainer.max_steps {max_steps} --kd.steps {short}"
                + (f" --kd.anneal_steps {short // 2}" if self.schedule.anneal_steps else "")
                + "; for a teacher that stays (RKD), set --kd.steps null"
            )
        if steps == 0 and getattr(data, "selection", None):
            raise ConfigError(
                f"--kd.steps 0 leaves no phase 1, whose rows --data.selection {data.selection} chooses; to read them "
                "without a teacher, use --kd.weight 0 with the --kd.steps of the run to compare with; otherwise use "
                "--data.selection null"
            )
        if self.schedule.kd_steps(1) and not has_teacher:
            raise ConfigError(
                f"--kd.weight {self.schedule.weight} needs a teacher: set --model.teacher.path to a checkpoint, a "
                "Hugging Face folder or a hub name, or --kd.weight 0 for BASELINE"
            )
        if self.schedule.kd_steps(1):
            self._check_probe(trainer, data)

    def _check_probe(self, trainer: pl.Trainer, data: Any) -> None:
        if self._probe.gradients and isinstance(trainer.strategy, FSDPStrategy):
            raise ConfigError(
                "--kd.probe_gradients true: not supported with FSDP1; use --config configs/fsdp.yaml, or ddp"
            )
        if not self.looks_for_boundary:
            return
        name, last = f"--kd.stop_margin {self.stop_margin}", self.schedule.steps or trainer.max_steps
        if getattr(data, "selection", None):
            raise ConfigError(
                f"{name} does not work with --data.selection: the rows of phase 1 are chosen before it begins, for "
                "exactly --kd.steps steps; set one of the two to null"
            )
        if trainer.limit_val_batches == 0:
            raise ConfigError(
                f"{name} acts at validations, but --trainer.limit_val_batches 0 turns them off; leave one of them out"
            )
        timed = getattr(trainer, "_val_check_time_interval", None) is not None  # refused elsewhere
        if timed or not hasattr(data, "counts_nll"):  # the user's own loaders: see on_train_start
            return
        every = getattr(trainer, "val_check_interval", None)
        share = every if isinstance(every, float) and 0 <= every <= 1 else 1.0
        steps = interval_steps(share, trainer.max_steps)
        first = every // trainer.accumulate_grad_batches if isinstance(every, int) else steps
        first *= max(1, math.ceil(self.min_steps / max(1, first)))  # 0 is refused elsewhere
        self._require_validation(first, last)

    def _require_validation(self, first: int, last: int) -> None:
        """Raises ConfigError if the `first` validation that may end KD comes only when step `last` ends it anyway."""
        if 0 < last <= first:
            after = f" from --kd.min_steps {self.min_steps} on" if self.min_steps else ""
            raise ConfigError(
                f"--kd.stop_margin {self.stop_margin}: there is no validation before step {last}{after}, where the "
                "teacher leaves anyway; set --trainer.val_check_interval to fewer steps"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._fit = trainer, pl_module
        # Not earlier: global_step is restored by now, so a resume in phase 2 never loads the teacher.
        last = self.schedule.steps or trainer.max_steps
        if self.schedule.is_taught(trainer.global_step):
            if self.looks_for_boundary:
                self._check_loaders(trainer, last)
            pl_module.load_teacher()
            self._check_teacher(trainer, pl_module)
            if self.schedule.steps is None and self.stop_margin is None:
                rank_zero_info("the teacher stays to the last step (RKD), because --kd.steps is null")
            if self.probe_gradients and trainer.enable_validation and next(validation_steps(trainer), 0) >= last:
                rank_zero_warn(
                    f"--kd.probe_gradients true logs nothing: there is no validation before step {last}, where the "
                    "teacher leaves; set --trainer.val_check_interval to fewer steps"
                )
        elif unused := self.unused(pl_module.teacher_spec.path):
            rank_zero_info(unused)

    def unused(self, teacher_path: str | None) -> str:
        """A message that names the settings without effect if no step has a teacher; empty if there are none."""
        given = {
            "--model.teacher.path": teacher_path,
            "--kd.stop_margin": self.stop_margin,
            "--kd.probe_gradients": "true" if self.probe_gradients else None,
        }
        named = [f"{name} {value}" for name, value in given.items() if value is not None]
        if not named or self.schedule.kd_steps(1):
            return ""
        return f"{' and '.join(named)} {'is' if len(named) == 1 else 'are'} not used with --kd.weight 0 or --kd.steps 0"

    def _check_loaders(self, trainer: pl.Trainer, last: int) -> None:
        """Refuses what `check` could not know: no validation loader, or none in time with a user's own loaders."""
        if not trainer.enable_validation:
            raise ConfigError(
                f"--kd.stop_margin {self.stop_margin} acts at validations, but there is no loader for them"
            )
        first, left = (  # 0: none
            next((step for step in validation_steps(trainer) if step >= self.min_steps and step > done), 0)
            for done in (0, trainer.global_step)
        )
        self._require_validation(first, last)
        if 0 < first < last and not 0 < left < last:
            rank_zero_info(
                f"--kd.stop_margin {self.stop_margin} has no effect any more: there is no validation left before step "
                f"{last}, where the teacher leaves anyway"
            )

    def _check_teacher(self, trainer: pl.Trainer, module: Any) -> None:
        """Refuses a teacher that knows nothing of this text. Collective."""
        if not hasattr(trainer.datamodule, "counts_nll"):  # type: ignore[attr-defined]  # the user's own loader
            return
        with trainer.precision_plugin.train_step_context():
            judged(module.teacher, trainer, str(module.teacher_spec.path), self.allow_untrained).require()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        schedule, step = self.schedule, trainer.global_step
        name, weight = type(schedule).__name__, schedule(step)
        if not 0 <= weight <= 1:
            raise ConfigError(f"step {step}: the schedule ({name}) gives weight {weight}, not 0..1")
        if weight > 0 and not schedule.is_taught(step):
            raise ConfigError(
                f"step {step}: the schedule ({name}) gives weight {weight} to a teacher that leaves at --kd.steps "
                f"{schedule.steps}; the weight must be 0 from there on"
            )
        if weight > 0 and pl_module.teacher is None:  # another schedule than at the start of this fit
            raise ConfigError(
                f"step {step}: the schedule ({name}) gives weight {weight} after the teacher was unloaded, or before "
                "one was loaded; set it while the teacher is loaded, or resume with it (--kd.allow_change true)"
            )
        pl_module.kd_weight.fill_(weight)  # in place: a new float would recompile

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._let_go(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        vars(self).pop("_fit", None)
        steps, step = self.schedule.steps, trainer.global_step
        if pl_module.teacher is not None and steps is not None and not trainer.should_stop and step < trainer.max_steps:
            rank_zero_warn(
                f"the run ended after {step} of {trainer.max_steps} steps, before --kd.steps {steps}: the teacher has "
                "never left; give the trainer as many epochs as its max_steps need"
            )

    def _let_go(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if pl_module.teacher is not None and not self.schedule.is_taught(trainer.global_step):
            held_bytes = pl_module.release_teacher()
            rank_zero_info(f"step {trainer.global_step}: the teacher was unloaded, {size_said(held_bytes)} freed")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if pl_module.teacher is not None and in_training(trainer):
            self._probe.add(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Runs before RunCheckpoint's hook, so that this step's checkpoint contains a boundary found here."""
        values = self._probe.read(trainer, pl_module) if in_training(trainer) else {}
        if not values:
            return
        step = trainer.global_step
        # before an early stop (max_time, a callback) Lightning adds a validation that may not be due
        added = trainer.should_stop and trainer.fit_loop._can_stop_early
        due = not added or step == next((planned for planned in validation_steps(trainer) if planned >= step), 0)
        if self.stop_margin is not None and self.stop_step is None and due:
            close = values["probe/gap"] <= self.stop_margin and step >= self.min_steps
            found = self.planned.stop_at(step) if trainer.strategy.broadcast(close) else self.planned
            if found != self.planned:
                self.stop_step = found.steps
                values["probe/stop_step"] = float(found.steps or 0)
                rank_zero_info(
                    f"step {step}: the student's CE is {values['probe/gap']:.4f} above the teacher's, within "
                    f"--kd.stop_margin {self.stop_margin}: KD ends at step {found.steps}"
                )
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        self._let_go(trainer, pl_module)

    @property
    def looks_for_boundary(self) -> bool:
        """Whether a validation may still end KD."""
        return self.stop_margin is not None and self.stop_step is None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["kd_schedule"], checkpoint["kd_stop_step"] = self.settings, self.stop_step

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        saved, now = checkpoint.get("kd_schedule") or {**self.settings, "weight": 0.0}, self.settings
        changed = ", ".join(
            f"--kd.{key} {as_yaml(now.get(key))} (checkpoint: {as_yaml(saved.get(key))})"
            for key in now | saved
            if now.get(key) != saved.get(key)
        )
        self.stop_step = None if changed else checkpoint.get("kd_stop_step")
        if not changed:
            return
        if not self.allow_change:
            raise ConfigError(
                f"the KD schedule differs from the checkpoint's: {changed}; use the checkpoint's, "
                "or --kd.allow_change true to resume with the new one"
            )
        if found := checkpoint.get("kd_stop_step"):
            changed += f"; the end of KD that was found, step {found}, no longer holds"
        rank_zero_info(f"resuming with another KD schedule: {changed}")
