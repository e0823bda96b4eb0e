"""A run's loggers: its own TensorBoard files, whose write errors are one line, and other trackers."""

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from salt_lightning.errors import one_line
from salt_lightning.run.curves import start_number
from salt_lightning.storage.shards import writing


@contextmanager
def ending_wandb() -> Iterator[list[int]]:
    """Ends the wandb run that a command has begun, with the exit code in the list: its next run, or that of the next
    command in this process, would go on in it, and wandb learns of no failure otherwise."""
    before, codes = getattr(sys.modules.get("wandb"), "run", None), list[int]()
    try:
        yield codes
    finally:
        wandb: Any = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None and wandb.run is not before:
            wandb.finish(exit_code=codes[0] if codes else 1)


class _Writer(SummaryWriter):
    """Opens its file at the first value: a refused start leaves no file, and no mark that voids earlier values."""

    _built = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._built = True

    def _get_file_writer(self) -> Any:
        return super()._get_file_writer() if self._built else None


class EventLog(TensorBoardLogger):
    """The run's TensorBoard log. Its thread writes; an error there shows only at the next call.

    Raises:
        OSError: names the folder, from whichever call hits the error.
    """

    @property
    def log_dir(self) -> str:
        """Lightning's would replace `$NAME` and `~` in it, which may be a part of the run's name."""
        return os.path.join(self.root_dir, str(self.version))

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        if self._experiment is None:
            files = list(Path(self.log_dir).glob("*tfevents*"))
            number = 1 + max(map(start_number, files), default=0)
            stamps = (re.match(r"events\.out\.tfevents\.(\d+)\.", file.name) for file in files)
            if any(stamp and int(stamp[1]) > time.time() for stamp in stamps):  # TensorBoard orders files by name
                rank_zero_warn(
                    "this machine's clock is behind that of an earlier start of this run, so TensorBoard's page will "
                    "leave out what this start logs (compare shows it); set the clock"
                )
            self._experiment = _Writer(self.log_dir, **{"filename_suffix": f".start-{number}", **self._kwargs})
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Writes all numbers of a step as one record: TensorBoard opens its file for each, perhaps over a network."""
        numbers = {tag: value for tag, value in metrics.items() if _is_number(value)}
        with writing(Path(self.log_dir)):
            record = Summary(value=[Summary.Value(tag=tag, simple_value=float(n)) for tag, n in numbers.items()])
            self.experiment._get_file_writer().add_summary(record, step)
            super().log_metrics({tag: value for tag, value in metrics.items() if tag not in numbers}, step)

    def flush(self) -> None:
        """Writes everything logged so far to disk."""
        with writing(Path(self.log_dir)):
            self.experiment.flush()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Logs the settings for the HPARAMS page, with val/ce; Lightning's own method would log a made-up val/ce."""
        with writing(Path(self.log_dir)):
            for summary in hparams({k: v for k, v in params.items() if v is not None}, {"val/ce": 0.0}):
                self.experiment._get_file_writer().add_summary(summary)

    def save(self) -> None:
        """Does nothing: Lightning would write an empty hparams.yaml; the settings are in config.yaml."""

    def finalize(self, status: str) -> None:
        with writing(Path(self.log_dir)):
            super().finalize(status)


def trackers(given: list[Logger], run: Path, verb: str, steps: int) -> list[Logger]:
    """The loggers of a verb: the run's own event files, which compare reads, then the user's loggers.

    A TensorBoard logger among the user's replaces the run's own. A fit removes from the page what a killed start
    logged after the checkpoint at `steps`.
    """
    boards = [logger for logger in given if isinstance(logger, TensorBoardLogger)]
    if not boards:
        # version "": the run's folder itself, so that a resumed run continues there; evaluations get a subfolder
        boards = [EventLog(run.parent, run.name, "") if verb == "fit" else EventLog(run, verb, "")]
        given = [*boards, *given]
    for board in boards if verb == "fit" else ():
        if board._kwargs.get("purge_step") is None:  # the command line sets None
            board._kwargs["purge_step"] = steps + 1
    return given


def void_tests(folder: Path, steps: int) -> None:
    """Marks the results of tests after step `steps` as void: a run that resumes there trains other weights to them."""
    if numbers := [start_number(file) for file in folder.glob("*tfevents*")]:
        try:
            SummaryWriter(str(folder), purge_step=steps + 1, filename_suffix=f".start-{1 + max(numbers)}").close()
        except OSError as error:
            rank_zero_warn(f"{folder} cannot be written ({error.strerror}): its tests after step {steps} are void")


def log_settings(trackers: Iterable[Logger], settings: Mapping[str, Any]) -> None:
    """Logs the run's settings. A tracker that refuses them, e.g. for a changed value, does not end the run."""
    for tracker in trackers:
        try:
            tracker.log_hyperparams(dict(settings))
        except OSError:
            raise
        except Exception as error:  # each tracker has its own errors
            rank_zero_warn(f"{type(tracker).__name__} did not accept the settings: {one_line(error)}")


def _is_number(value: Any) -> bool:
    """Whether it is one number; Lightning handles other values, or names them in its error."""
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)


def quiet_threads() -> None:
    """Hides the tracebacks of TensorBoard's threads on a full disk: the next call raises the error anyway."""
    threading.excepthook = partial(_unless_full, threading.excepthook)


def _unless_full(show: Callable[[Any], object], args: Any) -> None:
    if not (isinstance(args.exc_value, OSError) and type(args.thread).__name__ == "_AsyncWriterThread"):
        show(args)
