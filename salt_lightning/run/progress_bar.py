"""Lightning's progress bar, but counting optimizer steps."""

import logging
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.trainer.states import TrainerFn

from salt_lightning.text.progress import is_terminal


def keep_off_bars() -> None:
    """Prints log messages on their own lines: a bar is cleared for them, and drawn again below."""
    for handler in logging.getLogger("lightning.pytorch").handlers:
        if not isinstance(handler.emit, partial):
            handler.emit = partial(_above_bars, handler.emit)  # type: ignore[method-assign]


def _above_bars(emit: Callable[[logging.LogRecord], None], record: logging.LogRecord) -> None:
    with Tqdm.external_write_mode():
        emit(record)


def close_bars() -> None:
    """Closes all bars; called before the last message, so that no bar is drawn after it."""
    for bar in list(getattr(Tqdm, "_instances", ())):
        bar.close()


def _is_in_place() -> bool:
    """Whether a drawing replaces the one before."""
    return is_terminal(sys.stdout) or _is_widget()


def _is_widget() -> bool:
    """Whether bars are notebook widgets, which are drawn in place."""
    return any(base.__module__ == "tqdm.notebook" for base in Tqdm.__mro__)


class _Lines(Tqdm):
    """A bar in a log: each drawing is a line, as a collector of logs passes on whole lines only."""

    disable: bool
    values: Callable[[], dict[str, Any]] = dict  # read when it is drawn, e.g. for a log message
    _shown: tuple[Any, ...] = (0, None)

    def display(self, *args: Any, **kwargs: Any) -> bool:
        """Writes a line if something has changed; also called where a bar is drawn again."""
        if values := self.values():
            self.set_postfix(values, refresh=False)
        if (self.n, self.postfix) != self._shown:
            self._shown = self.n, self.postfix
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return True

    def clear(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: what is in a log stays."""

    def close(self) -> None:
        """Writes nothing: the end is already drawn."""
        if not self.disable:  # as in other processes than the first
            self.disable = True
            self._decr_instances(self)


class ProgressBar(TQDMProgressBar):
    """Counts optimizer steps, from 0 even after a resume, and shows the values of the last logged step.

    Reading the device at every step would slow it down. Lightning counts micro-batches against the remaining steps
    and draws each: a log file of a long run would contain little else.
    """

    TERMINAL_S, LOG_S = 0.1, 30.0  # seconds between two drawings
    # What matters comes first: a narrow terminal cuts off the end. A log has no room for art.
    TRAIN_FORMAT = "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}] {percentage:3.0f}%"
    _drawn_s = -math.inf

    def _should_update(self, current: int, total: int) -> bool:
        now_s, every_s = time.monotonic(), self.TERMINAL_S if _is_in_place() else self.LOG_S
        if not self.is_enabled or (now_s - self._drawn_s < every_s and current != total):
            return False
        self._drawn_s = now_s
        return True

    def get_metrics(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, Any]:
        """The loss and what follows from it first; a subclass's own values last."""
        shown: dict[str, Any] = pl_module.progress
        return {name: shown[name] for name in ("loss", "val_ce", "tok/s", *shown) if name in shown}

    @property
    def train_description(self) -> str:
        return "step"

    def init_train_tqdm(self) -> Any:
        bar = self._bar(super().init_train_tqdm, self.train_description)
        bar.unit, bar.total = " steps", self.trainer.max_steps
        if isinstance(bar, _Lines):
            bar.bar_format = self.TRAIN_FORMAT
            bar.values = partial(self.get_metrics, self.trainer, self.trainer.lightning_module)
        else:
            bar.bar_format = self.TRAIN_FORMAT + "|{bar}|"
        if _is_widget():  # a widget takes its length only from reset
            bar.reset(bar.total)
        bar.initial = bar.n = self.trainer.global_step
        return bar

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Does nothing: Lightning would count from 0 again and show the epoch, of which a run has only one."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        bar = self.train_progress_bar
        bar.n = trainer.global_step  # drawn or not: a log message draws it, too
        if self._should_update(bar.n, bar.total):
            bar.set_postfix(self.get_metrics(trainer, pl_module))

    def init_validation_tqdm(self) -> Any:
        in_a_log = self.trainer.state.fn == TrainerFn.FITTING and not is_terminal(sys.stdout)  # each would leave a line
        return Tqdm(disable=True) if in_a_log else self._bar(super().init_validation_tqdm, self.validation_description)

    def init_sanity_tqdm(self) -> Any:
        return self._bar(super().init_sanity_tqdm, self.sanity_check_description)

    def init_test_tqdm(self) -> Any:
        return self._bar(super().init_test_tqdm, self.test_description)

    def init_predict_tqdm(self) -> Any:
        return self._bar(super().init_predict_tqdm, self.predict_description)

    def _bar(self, in_place: Callable[[], Tqdm], description: str) -> Tqdm:
        """The bar that `in_place` makes, or one for a log."""
        if _is_in_place():
            return in_place()
        return _Lines(
            desc=description, disable=self.is_disabled, file=sys.stdout, smoothing=0, bar_format=self.BAR_FORMAT
        )

    def on_predict_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, *args: Any) -> None:
        super().on_predict_batch_start(trainer, pl_module, batch, *args)
        bar = self.predict_progress_bar
        bar.set_description("Scoring", refresh=False)
        bar.unit, bar.unit_scale = " tokens", batch["labels"].numel()  # of this rank
