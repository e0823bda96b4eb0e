"""When a run is saved, how its checkpoint gets onto the disk, and which one is `last`.

A checkpoint is the state right after an optimizer step and its validation, if one is due. If a run is asked to stop,
there may be no time for a validation that nothing depends on.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from salt_lightning import preflight
from salt_lightning.errors import ConfigError, printable, refuse, wrong_kinds
from salt_lightning.export import check_target, export
from salt_lightning.fit.averaging import averages
from salt_lightning.fit.cadence import require_time_left, timers
from salt_lightning.preflight import Finding
from salt_lightning.run import endings, peers, slurm
from salt_lightning.run.run_folder import is_over, saved, step_named
from salt_lightning.schedule import in_training, kd_callbacks
from salt_lightning.storage import damage, shards
from salt_lightning.text.journal import whole

FIRST_RANK_S = 10.0  # how long other ranks wait for the first to act or report: their error may end all processes


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs and renames, so the final name has a complete file or none. Never unpickles."""

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if not Path(path).is_dir():
            # mapped: the ranks of a node share its pages; not on a CPU, where the optimizer would update them in place
            shared = torch.cuda.is_available()
            return torch.load(path, map_location=map_location or "cpu", weights_only=True, mmap=shared)
        checkpoint = shards.read(Path(path))
        if "param_groups" in checkpoint:
            checkpoint["optimizer_states"] = shards.optimizer_states(checkpoint)
        return checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(path)
        with shards.writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with whole(target) as file:
                torch.save(checkpoint, file)
            shards.sync_folder(target.parent)  # the rename must reach the disk, too


def newest(folder: str | Path, look: Callable[[Path], str | None] = damage.of) -> Path | None:
    """The checkpoint of the highest optimizer step in `folder` in which `look` finds no damage; logs the names of the
    damaged ones it skips."""
    folder = Path(os.path.expanduser(folder))
    for unfinished in sorted(folder.glob(".step-*.tmp")):
        rank_zero_info(f"{unfinished} was never finished and is skipped")
    for _, path in reversed(saved(folder)):
        reason = look(path)
        if reason is None:
            return path
        rank_zero_info(f"{path} is skipped: {printable(reason)}")
    return None


class RunCheckpoint(Checkpoint):
    """Saves the run in its folder: regularly, at the phase boundary, at the end, and when asked to stop.

    On Ctrl-C, SIGTERM or a closed terminal (SIGHUP), the run finishes its optimizer step, saves, and ends. A second
    Ctrl-C ends it at once, and so does another signal that comes again more than 10 seconds later. With several
    processes, a signal to one of them is enough: all stop after the same step, the next one that is logged. Under
    SLURM, SIGUSR1 (or Lightning's `requeue_signal`) does the same, and the job is queued again.

    Args:
        every_n_steps: Optimizer steps between two checkpoints; null saves only at the other times named here.
        keep: How many of those to keep, newest first; null keeps all. Checkpoints at the boundary, at `at_steps` and at
            the end are always kept, including those of earlier starts of the run, and all of a start that kept all.
        at_steps: Optimizer steps after which a checkpoint is saved and always kept, e.g. an early teacher for SALT_DS.
        folder: Folder of the checkpoints; null is `checkpoints` in the run's folder.
        export: A new folder for the finished run's student, as a Hugging Face model; null writes none.
    """

    def __init__(
        self,
        every_n_steps: int | None = 1000,
        keep: int | None = 1,
        at_steps: list[int] | None = None,
        folder: str | None = None,
        export: str | None = None,
    ) -> None:
        refuse(wrong_kinds(RunCheckpoint.__init__, locals(), "--checkpoint."))
        wrong = [
            f"--checkpoint.{name} {value} must be at least 1, or null"
            for name, value in (("every_n_steps", every_n_steps), ("keep", keep))
            if value is not None and value < 1
        ]
        if any(step < 1 for step in at_steps or ()):
            wrong.append(f"--checkpoint.at_steps {at_steps} must be optimizer steps, 1 or more")
        refuse(wrong)
        self.every_n_steps, self.keep, self.at_steps = every_n_steps, keep, tuple(at_steps or ())
        self.folder, self.export = folder and os.path.expanduser(folder), export and os.path.expanduser(export)
        # Steps whose checkpoints an earlier start keeps for good, and all of a start with `keep` None
        self._kept: set[int] = set()
        self._begin()

    def _begin(self) -> None:
        self.stopped_by: signal.Signals | None = None
        self._told_s: dict[int, float] = {}  # when each signal to this process itself first came
        self._trained = False  # whether training has started
        self._due = False  # whether a save waits for the validation of its step
        self._until_end: list[tuple[Any, str, Any]] = []  # attributes that a stop has changed: owner, name, old value

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._begin()
        if trainer.global_step == 0:  # else another fit of the same trainer
            self._kept = set()
        self._dir = Path(self.folder or Path(trainer.default_root_dir) / "checkpoints")
        # Outside training there is nothing to save. Lightning's own handler would broadcast between the ranks' other
        # messages, and would end a validation with exit code 0 and a first step with a traceback.
        trainer._signal_connector._sigterm_notifier_fn = _stop_at_once  # type: ignore
        # Lightning's own handler saves in the middle of a step, at another line on each rank.
        trainer._signal_connector._slurm_sigusr_handler_fn = partial(_requeue_at_once, trainer)  # type: ignore
        if late := [step for step in self.at_steps if step > trainer.max_steps > 0]:
            rank_zero_info(f"--checkpoint.at_steps {late} are after --trainer.max_steps {trainer.max_steps}: not saved")
        if self.export and stage == "fit" and not is_over(trainer.ckpt_path, trainer.max_steps):
            check_target(Path(self.export), "--checkpoint.export")
        if len(savers(trainer)) > 1:
            raise ConfigError(
                f"the Trainer has {len(savers(trainer))} RunCheckpoints, but only one can be used; use --checkpoint.*"
            )
        # After a ModelCheckpoint's hooks: the score of a validation belongs into the checkpoint of its step. In a new
        # list: Lightning is walking through the old one.
        callbacks: list[pl.Callback] = list(trainer.callbacks)  # type: ignore[attr-defined]
        places = [i for i, each in enumerate(callbacks) if isinstance(each, Checkpoint)]
        ordered = sorted((callbacks[i] for i in places), key=lambda each: each is self)
        for i, each in zip(places, ordered, strict=True):
            callbacks[i] = each
        trainer.callbacks = callbacks  # type: ignore[attr-defined]
        if stage == "fit":
            self._require_shared(trainer)

    def _require_shared(self, trainer: pl.Trainer) -> None:
        """Each process writes its part of a sharded checkpoint; without the others, the first one's are lost."""
        if (wrong := peers.not_shared(trainer, self._dir if self.folder else self._dir.parent)) is None:
            return
        setting = f"--checkpoint.folder {self._dir}" if self.folder else f"--run {self._dir.parent}"
        said = f"{setting}: {wrong}; give a folder that all nodes share"
        if getattr(trainer.strategy, "_save_distributed_checkpoint", False):
            raise ConfigError(f"{said}, since each process writes a part of every checkpoint")
        rank_zero_warn(f"{said}, or copy a checkpoint to all of them before you resume from it")

    def _for_good(self, trainer: pl.Trainer) -> set[int]:
        """Steps at which this start saves, to keep that always; a validation may have set the boundary."""
        boundaries = [steps for kd in kd_callbacks(trainer) if (steps := kd.schedule.steps) is not None]
        return {*self.at_steps, *boundaries, trainer.max_steps}

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["kept_steps"] = sorted(
            step for step in self._for_good(trainer) | self._kept if step <= trainer.global_step
        )

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # only those in this folder, not those of the run that this one branches from
        self._kept = {step for step, _ in saved(self._dir)} & set(checkpoint.get("kept_steps", ()))
        if trainer.state.fn == TrainerFn.FITTING:
            require_time_left(trainer, checkpoint)

    def space(self, trainer: pl.Trainer, weights: Iterable[Tensor]) -> Finding:
        """Whether all checkpoints that the run keeps at once fit on the disk."""
        for_good = {step for step in self._for_good(trainer) | self._kept if 0 < step <= trainer.max_steps}
        every, regular = self.every_n_steps, 0
        if every is not None:
            regular = trainer.max_steps // every - sum(step % every == 0 for step in for_good)
        kept = regular if self.keep is None else min(regular, self.keep)
        weight_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
        copies = 3 + len(averages(trainer))  # AdamW has two states
        return preflight.disk(self._dir, copies * weight_bytes, kept + len(for_good))

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._trained = True
        shards.forget()
        there = trainer.strategy.broadcast([str(path) for _, path in saved(self._dir)])
        if there and trainer.global_step == 0:
            raise ConfigError(
                f"{self._dir} contains checkpoints of a run, the newest {Path(there[-1]).name}, but this run starts at "
                f"step 0; continue from that (--ckpt_path last, in Python trainer.fit(ckpt_path={there[-1]!r})), or "
                "choose another folder"
            )
        trainer.strategy.broadcast(self.space(trainer, pl_module.parameters())).require()
        if trainer.is_global_zero:
            self._tidy(trainer.global_step)
        if threading.current_thread() is threading.main_thread():
            # Replaces Lightning's handlers; at the end Lightning restores the earlier ones.
            asked = {signal.SIGINT, signal.SIGTERM, slurm.requeue_signal(trainer) or signal.SIGTERM}
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
                asked.add(signal.SIGHUP)
            for number in asked:
                signal.signal(number, partial(self._stop_after_step, trainer))
        else:
            rank_zero_info("not in the main thread: a signal (Ctrl-C, SIGTERM) will end this run without a save")
        # Lightning's own SIGTERM broadcast makes the host wait for the device at every micro-batch.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _no_broadcast  # type: ignore[method-assign]

    def _tidy(self, step: int) -> None:
        """Deletes what a killed save left. Sets aside checkpoints after `step`: `last` must not find another branch."""
        for left in (*self._dir.glob(".step-*.tmp"), *self._dir.glob(".step-*.old")):
            shards.delete(left)
        for path in [path for number, path in saved(self._dir) if number > step]:
            aside = path.with_name(f"{path.name}.aside")
            if aside.exists():
                shards.delete(aside)
            path.rename(aside)
            rank_zero_info(f"{path} is after step {step}, where this run resumes: set aside as {aside.name}")

    def _stop_after_step(self, trainer: pl.Trainer, number: int, frame: Any) -> None:
        again = bool(self._told_s)  # not if only another rank was told: `stopped_by` is of all
        first_s = self._told_s.setdefault(number, time.monotonic())
        if self.stopped_by is None:
            self.stopped_by = signal.Signals(number)
            step = "this step" if trainer.world_size == 1 else "the next logged step"
            after = f"this validation and {step}" if trainer.validating else step
            rank_zero_info(f"{self.stopped_by.name}: saving after {after}; press Ctrl-C again to stop at once")
        # One request may come as several signals: SLURM at a job's time limit, and torchrun, send SIGTERM twice; SLURM
        # sends it after the signal to requeue.
        elif again and (number == signal.SIGINT or time.monotonic() > first_s + 10.0):
            _stop_at_once(number, frame)

    def _is_told_to_stop(self, trainer: pl.Trainer) -> bool:
        """Whether any rank got a signal; ranks agree at logged steps, where the host waits for the device anyway."""
        if trainer.world_size > 1:
            if trainer.global_step % max(1, trainer.log_every_n_steps):  # type: ignore[attr-defined]
                return False
            requeue = slurm.requeue_signal(trainer)  # SIGTERM on another rank is part of the same request
            mine = 0 if self.stopped_by is None else signal.NSIG if self.stopped_by == requeue else self.stopped_by
            number = torch.tensor(mine, device=trainer.strategy.root_device)
            highest = int(trainer.strategy.reduce(number, reduce_op="max"))
            # a signal that arrives now waits for the next agreement: no rank stops alone
            if not highest:
                return False
            self.stopped_by = requeue if highest == signal.NSIG else signal.Signals(highest)
        return self.stopped_by is not None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        step, stop = trainer.global_step, self._is_told_to_stop(trainer)
        regular = self.every_n_steps is not None and step % self.every_n_steps == 0
        if not (regular or step in self._for_good(trainer) or stop):
            return
        loop = trainer.fit_loop.epoch_loop
        follows = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
        # There may be no time for a validation. But no later start repeats one that ends the run or KD.
        decides = step >= trainer.max_steps or any(kd.looks_for_boundary for kd in kd_callbacks(trainer))
        if not follows or (stop and not decides):
            self._save(trainer, pl_module)
        self._due = follows
        if stop:
            trainer.should_stop = True
            # otherwise the run would not end
            none: list[tuple[Any, str]] = [(trainer.fit_loop, "min_epochs"), (loop, "min_steps")]
            if not follows:  # there is no time for the validation that Lightning adds before it stops
                none.append((trainer, "limit_val_batches"))
            for owner, name in none:
                self._until_end.append((owner, name, getattr(owner, name)))
                setattr(owner, name, 0)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # On resume, Lightning treats the validation of a saved step as done. It may just have found the boundary.
        if self._due or (in_training(trainer) and trainer.global_step in self._for_good(trainer)):
            self._save(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Saves before on_train_end, where WeightAveraging replaces the trained weights by their average."""
        if trainer.should_stop:
            self._save_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Saves also a run that ends early (max_time, another callback's should_stop)."""
        while self._until_end:
            setattr(*self._until_end.pop())
        self._save_end(trainer, pl_module)
        if self.stopped_by is None and trainer.global_step < trainer.max_steps:
            rank_zero_info(
                f"step {trainer.global_step} of {trainer.max_steps}: the run has ended early, by a limit of time or "
                "data or by a callback; it is saved; continue with --ckpt_path last (--trainer.max_time counts "
                "over all starts)"
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Exports here, as Lightning skips on_train_end if a start finds the training finished: an earlier start may
        have been killed between its last save and the export."""
        left_s = [timer.time_remaining() for timer in timers(trainer)]
        out_of_time = any(seconds is not None and seconds <= 0 for seconds in left_s)
        ended = trainer.global_step >= trainer.max_steps or not (self.stopped_by or out_of_time)
        if not self.export or not ended or not trainer.is_global_zero:
            return
        if not self._trained and (Path(self.export) / "config.json").exists():
            rank_zero_info(f"--checkpoint.export {self.export} exists already, from an earlier start")
            return
        checkpoint = self._path(trainer) if self._trained else Path(str(trainer.ckpt_path))
        run, words = Path(trainer.default_root_dir), None
        if not (run / "tokenizer").is_dir():  # where the command line has put it
            with suppress(Exception):  # of the user's own data
                found = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
                words = found if isinstance(found, PreTrainedTokenizerBase) else None
        with_words = partial(export, checkpoint, Path(self.export), run=run)
        try:
            written = with_words(tokenizer=words)
        except ConfigError as error:
            if words is None:
                raise
            rank_zero_warn(f"{error}; exported without a tokenizer")
            written = with_words()
        rank_zero_info(f"exported to {written}")

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Requeues last, as the scheduler may end the processes right away."""
        stopped = self.stopped_by is not None and trainer.global_step < trainer.max_steps
        if stopped and self.stopped_by == slurm.requeue_signal(trainer) and trainer.is_global_zero:
            slurm.requeue()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Ends the processes that this one started: they would wait for it, some of them forever."""
        endings.end_started(trainer.strategy.launcher)
        endings.abandon(trainer)

    def _path(self, trainer: pl.Trainer) -> Path:
        return _at(self._dir, trainer.global_step)

    def _save_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.strategy.broadcast(self._path(trainer).exists()) and trainer.global_step > 0:
            self._save(trainer, pl_module)

    def _save(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._due = False
        pl_module.require_finite()
        for logger in trainer.loggers:  # a kill right after the save must not lose the log before it
            getattr(logger, "flush", logger.save)()
        if self.keep is None:
            self._kept.add(trainer.global_step)
        trainer.save_checkpoint(self._path(trainer), weights_only=False)
        self._prove(trainer)
        if trainer.is_global_zero:
            self._forget(trainer)

    def _prove(self, trainer: pl.Trainer) -> None:
        """Reads back what was just written, before the run relies on it."""
        path = self._path(trainer)
        found = trainer.strategy.broadcast(shards.unreadable(path) if trainer.is_global_zero else None)
        if found is None:
            return
        if trainer.is_global_zero:
            shards.remove(path)
        raise ConfigError(
            f"{path} could not be read back: it contained a {found}, in a setting, or in the state of a callback or "
            "of a subclass; save only numbers, strings, lists, dictionaries and tensors"
        )

    def _forget(self, trainer: pl.Trainer) -> None:
        """Removes the oldest regular checkpoints, once the newest is safely on disk."""
        if self.keep is None:
            return
        for_good = self._for_good(trainer) | self._kept
        for old in [path for step, path in saved(self._dir) if step not in for_good][: -self.keep]:
            shards.remove(old)


def _no_broadcast() -> None:
    """A function that can be pickled along with the trainer."""


def _stop_at_once(number: int, frame: Any) -> None:
    raise KeyboardInterrupt(number)


def _requeue_at_once(trainer: pl.Trainer, number: int, frame: Any) -> None:
    if trainer.is_global_zero:
        slurm.requeue()
    else:
        time.sleep(FIRST_RANK_S)
    _stop_at_once(number, frame)


def _at(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.ckpt"


def savers(trainer: pl.Trainer) -> list[RunCheckpoint]:
    """The RunCheckpoint callbacks of a trainer."""
    return [c for c in trainer.callbacks if isinstance(c, RunCheckpoint)]  # type: ignore[attr-defined]


def done(trainer: pl.Trainer, folder: Path) -> str | None:
    """The last line of a finished run with checkpoints in `folder`; None: it has not finished."""
    step = trainer.global_step
    if step < trainer.max_steps:
        return None
    loss, at = (trainer.callback_metrics.get(f"val/{name}") for name in ("ce", "step"))
    when = "" if at is None or at == step else f" at step {at:.0f}"
    file = _at(folder, step)  # not there if the run began at its last step, from another run's checkpoint
    where = str(file) if file.exists() else "no step left to train"
    parts = [f"step {step}", None if loss is None else f"val/ce {loss:.4f}{when}", where]
    return f"done: {', '.join(filter(None, parts))}"


def how_to_go_on(trainer: pl.Trainer, failed: int) -> str:
    """How to continue a run that failed after so many optimizer steps: names its newest good checkpoint. One of as many
    steps fails again, whatever the learning rate: the loss of a step is that of the weights before it."""

    def look(path: Path) -> str | None:
        return damage.of(path) if (step_named(str(path)) or 0) < failed else "its next step fails"

    for saver in savers(trainer)[:1]:
        if (found := newest(saver._dir, look)) is not None:
            last = found == saved(found.parent)[-1][1]
            return f"{found} is good: resume from it (--ckpt_path {'last' if last else found})"
        if saved(saver._dir):
            return f"No checkpoint in {saver._dir} is from before that step: start again in another --run"
    return "There is no checkpoint: start again"
