"""Silences library messages that users cannot act on; keeps Ctrl-C working."""

import logging
import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from transformers.utils.logging import disable_progress_bar

from salt_lightning.errors import ConfigError, printable_lines
from salt_lightning.hugging_face import folders
from salt_lightning.text import documents, sources

_CHATTER = (
    "Restoring states",
    "Restored all states",
    "GPU available",
    "TPU available",
    "You are using a CUDA device",  # advises TF32 for fp32 products, for which there is no setting here
    "💡 Tip",
    "Seed set to",
)


_HUB, _LOADING = "huggingface_hub", "transformers.modeling_utils"
_LIGHTNING = (
    *("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"),
    "pytorch_lightning.utilities.rank_zero",  # if a host has imported it, messages come from there
)


def silence_libraries() -> None:
    """Hides messages that are not about this run: advertising, and deprecations within the libraries."""
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*", FutureWarning)  # lightning with torch 2.13
    warnings.filterwarnings("ignore", ".*Total length of `Loader` across ranks is zero.*")  # all rows are scored
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # torch.compile's advice, as above
    # not true here: the first and the last step are always logged
    warnings.filterwarnings("ignore", ".*is smaller than the logging interval.*")
    # max_time's; it is a limit of one start
    warnings.filterwarnings("ignore", r".*Please add the following callbacks: \['Timer'\]")
    logging.getLogger(_HUB).setLevel(logging.ERROR)  # a line for each retry without a network
    # a table of all weights that a model folder lacks or has too many: models.py says it in a line
    logging.getLogger(_LOADING).addFilter(_is_about_this)
    if getattr(rank_zero_only, "rank", 0):  # each rank reads the same weights
        disable_progress_bar()
    for name in _LIGHTNING:
        logging.getLogger(name).addFilter(_escape_and_select)


_ONE: dict[int, Any] = {}  # a lock of each process: a fork takes its parent's along


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Refuses a run while another thread of the process has one: random numbers, which make weights and dropout, belong
    to the whole process, as do signals, so two runs would mix theirs without a word."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise ConfigError(
            "main([...]) is called inside torch.autocast, which would keep casts of old weights; call it outside"
        )
    lock = _ONE.setdefault(os.getpid(), threading.RLock())
    if not lock.acquire(blocking=False):
        raise ConfigError(
            "another thread of this process is in main([...]), and two runs in one process would share random numbers "
            "and signals; start each in a process of its own"
        )
    try:
        yield
    finally:
        lock.release()


@contextmanager
def as_before() -> Iterator[None]:
    """Restores what a command changes, for a process that continues: what libraries say, threads, and the effect of
    Ctrl-C and other signals. If other processes have trained, Lightning would ignore every Ctrl-C after the first."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    hook = threading.excepthook
    threads, of_others = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    named = map(logging.getLogger, (_HUB, _LOADING, *_LIGHTNING))
    loggers = [(logger, logger.level, logger.filters[:]) for logger in named]
    try:
        _forget_hub()
        with warnings.catch_warnings():
            yield
    finally:
        _forget_hub()
        for logger, level, filters in loggers:
            logger.setLevel(level)
            logger.filters[:] = filters
        threading.excepthook = hook
        torch.set_num_threads(threads)
        os.environ.pop("OMP_NUM_THREADS", None)
        if of_others is not None:
            os.environ["OMP_NUM_THREADS"] = of_others
        if threading.current_thread() is threading.main_thread():  # others cannot set them
            for number, handler in handlers.items():
                if handler is not None:
                    signal.signal(number, handler)


def _forget_hub() -> None:
    """Which commits were found: a branch must not move within a start, but may before the next."""
    folders.SNAPSHOTS.clear()
    for looked in (folders.check_hub, documents.commit, sources.say_once):
        looked.cache_clear()


def _is_about_this(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    # advises a mask for padding, of which rows have none, where a text begins or ends with a special token
    return " LOAD REPORT" not in message and "passing in an `attention_mask`" not in message


def _escape_and_select(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    record.msg, record.args = printable_lines(message), ()  # may contain names of untrusted files and weights
    return not re.sub(r"^\[rank: \d+\] ", "", message).startswith(_CHATTER)
