"""TensorBoard's event file of a run: where it cannot be written, that is one line that says so."""

import threading
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from salt_lightning.runlog import start_number
from salt_lightning.shards import writing


class _Writer(SummaryWriter):
    """Opens its file for the first value: a start that is refused leaves none, nor a mark that voids earlier values."""

    _built = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._built = True

    def _get_file_writer(self) -> Any:
        return super()._get_file_writer() if self._built else None


class EventLog(TensorBoardLogger):
    """TensorBoard writes in a thread, which keeps what it met to itself until the next call.

    Raises:
        OSError: naming the folder, whichever call meets it.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        if self._experiment is None:
            number = 1 + max(map(start_number, Path(self.log_dir).glob("*tfevents*")), default=0)
            self._experiment = _Writer(self.log_dir, **{"filename_suffix": f".start-{number}", **self._kwargs})
        return self._experiment

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        with writing(Path(self.log_dir)):
            super().log_metrics(*args, **kwargs)

    def flush(self) -> None:
        """Has all that was logged on the disk."""
        with writing(Path(self.log_dir)):
            self.experiment.flush()

    def save(self) -> None:
        """Nothing: Lightning would write an empty hparams.yaml; the settings are in config.yaml."""

    def finalize(self, status: str) -> None:
        with writing(Path(self.log_dir)):
            super().finalize(status)


_show = threading.excepthook


def quiet_threads() -> None:
    """What a thread meets of a full disk is raised by the call that comes after: no traceback of the thread besides."""
    threading.excepthook = _unless_full


def _unless_full(args: Any) -> None:
    if not (isinstance(args.exc_value, OSError) and type(args.thread).__name__ == "_AsyncWriterThread"):
        _show(args)
