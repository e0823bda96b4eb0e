"""The command line: LightningCLI with fit, validate, test and predict, and the verbs that need no trainer."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from salt_lightning import compare
from salt_lightning.checkpoint import AtomicCheckpointIO, RunCheckpoint, newest
from salt_lightning.data import SALTDataModule
from salt_lightning.errors import ConfigError, NonFiniteLossError
from salt_lightning.models import check_path, read_checkpoint
from salt_lightning.module import SALTModule
from salt_lightning.schedule import KDScheduleCallback

# Lightning 2.6 calls jsonargparse by names that it deprecates: nothing a user of ours could mend.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

VERBS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "compare": (
        compare.main,
        "Table and plot of several runs: where each reaches the baseline's loss, and its cost.",
    ),
}


class Parser(LightningArgumentParser):
    """Errors are one line: the usage text of some 70 lines would bury them."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        sys.stderr.write(f"error: {' '.join(message.split())}\n")
        raise SystemExit(2)


class ProgressBar(TQDMProgressBar):
    """Shows the values of the last logged step: reading the device at every step would hold it up."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, Any]:
        return pl_module.progress


class SaveRunConfig(SaveConfigCallback):
    """Writes the whole config into the run's folder, for `fit` alone."""

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class SALTCLI(LightningCLI):
    """LightningCLI plus --kd, --checkpoint and --run; settings that contradict each other are refused."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(KDScheduleCallback, "kd")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_argument(
            "--run", type=str, default="runs/default", help="Folder of the run: config, logs, checkpoints."
        )

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for name, (_, text) in VERBS.items():  # listed here; main() runs them
            assert parser._subcommands_action is not None
            parser._subcommands_action.add_subcommand(name, Parser(description=text), help=text)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)  # not super(): it warns of arguments given from Python
        self._explicit = parser.parse_args(args, defaults=False)

    def _settings(self, config: Namespace) -> Namespace:
        subcommand = config.get("subcommand")
        return config[subcommand] if subcommand else config

    def _add_instantiators(self) -> None:
        """Nothing: they would put class paths into the checkpoint, which holds plain settings of one class."""

    def _parse_ckpt_path(self) -> None:
        """Defaults < checkpoint < what the user gave. Lightning's own order lets the checkpoint win, silently."""
        config = self._settings(self.config)
        path = config.get("ckpt_path")
        subcommand = self.config.get("subcommand")
        if path is None or subcommand is None:
            return
        path = _resolve(path, Path(config.run), subcommand)
        config["ckpt_path"] = None if path is None else str(path)
        if path is None:
            return
        saved = dict(read_checkpoint(str(path), "--ckpt_path")["hyper_parameters"])
        given = self._settings(self._explicit).get("model") or Namespace()
        for key, now in sorted(vars(given.as_flat()).items() if given else []):
            before = _lookup(saved, key)
            if before is not _MISSING and now != before and not isinstance(now, dict) and key != "student.path":
                print(f"--model.{key} {now} (checkpoint: {before}): the given value is used", file=sys.stderr)
        saved.pop("seed", None)  # follows --seed_everything
        merged = self.parser.parse_object({subcommand: {"model": saved}}, self.config)
        if given:
            merged = self.parser.parse_object({subcommand: {"model": given.as_dict()}}, merged)
        self.config = merged

    def before_instantiate_classes(self) -> None:
        config, given = self._settings(self.config), self._settings(self._explicit)
        for part in ("model", "data"):  # one seed for all, unless given apart
            if (given.get(part) or Namespace()).get("seed") is None:
                config[part]["seed"] = config.seed_everything
        if config.trainer.get("accumulate_grad_batches") not in (None, 1):
            raise ConfigError(
                f"--trainer.accumulate_grad_batches {config.trainer.accumulate_grad_batches} follows from "
                "--data.global_batch_size, --data.micro_batch_size and the number of ranks; leave it out"
            )
        if self.subcommand == "fit" and not config.get("ckpt_path") and newest(Path(config.run) / "checkpoints"):
            raise ConfigError(
                f"--run {config.run} holds a run already: go on with it by --ckpt_path last, or choose another folder"
            )

    def before_fit(self) -> None:
        config = self._settings(self.config)
        if config.kd.weight > 0 and not config.get("ckpt_path"):  # phase 2 goes on where the teacher is gone
            check_path(self.model.teacher_spec, "teacher")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config, run = self._settings(self.config), Path(self._settings(self.config).run)
        if config.trainer.get("logger") in (None, True):
            purge_step = _step_of(config.get("ckpt_path")) + 1 if self.subcommand == "fit" else None
            # version "": the run's folder itself, so that a resumed run goes on in it; what a killed start had logged
            # after the checkpoint is purged from the TensorBoard page
            kwargs["logger"] = TensorBoardLogger(run.parent, name=run.name, version="", purge_step=purge_step)
        kwargs["plugins"] = [*(config.trainer.get("plugins") or []), AtomicCheckpointIO()]
        if config.trainer.get("enable_progress_bar") is not False and not config.trainer.get("barebones"):
            kwargs["callbacks"] = [
                *(self._get(self.config_init, "trainer").get("callbacks") or []),
                ProgressBar(),
            ]
        return super().instantiate_trainer(**kwargs)


def _resolve(path: str, run: Path, subcommand: str) -> Path | None:
    """`last` is the newest checkpoint of the run's folder; without one a fit starts at step 0, and says so."""
    if path != "last":
        return Path(path)
    found = newest(run / "checkpoints")
    if found is None and subcommand != "fit":
        raise ConfigError(f"--ckpt_path last: no checkpoint in {run / 'checkpoints'}; is --run {run} right?")
    print(f"--ckpt_path last: {found or f'no checkpoint in {run}, starting at step 0'}", file=sys.stderr)
    return found


_MISSING = object()


def _lookup(tree: dict[str, Any], dotted: str) -> Any:
    node: Any = tree
    for part in dotted.split("."):
        if not isinstance(node, dict) or part not in node:
            return _MISSING
        node = node[part]
    return node


def _step_of(path: str | None) -> int:
    return int(read_checkpoint(path, "--ckpt_path")["global_step"]) if path else 0


TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,  # the run is one Lightning epoch of max_steps; epochs of the data live in its order
    "use_distributed_sampler": False,  # would shuffle our order again
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "enable_model_summary": False,
}


_CHATTER = ("GPU available", "TPU available", "HPU available", "💡 Tip", "Seed set to", "Using default `Model")


def _silence_libraries() -> None:
    """Keeps out what is not about this run: advertising, and deprecations inside the libraries."""
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*", FutureWarning)  # lightning with torch 2.13
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_is_about_the_run)


def _is_about_the_run(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_CHATTER)


def main(args: list[str] | None = None) -> int:
    """Runs one command line; returns its exit code: 0, 1 for an error of the run, 2 for one of the settings."""
    first = (sys.argv[1:] if args is None else args)[:1]
    _silence_libraries()
    try:
        if first and first[0] in VERBS:
            return VERBS[first[0]][0](sys.argv[2:] if args is None else args[1:])
        cli = SALTCLI(
            SALTModule,
            SALTDataModule,
            args=args,
            parser_class=Parser,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            auto_configure_optimizers=False,
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    stopped = [c.stopped_by for c in cli.trainer.callbacks if isinstance(c, RunCheckpoint)]  # type: ignore[attr-defined]
    if stopped and stopped[0] is not None:
        print(f"stopped by {stopped[0].name} at step {cli.trainer.global_step}, saved; go on with --ckpt_path last")
        return 128 + stopped[0]
    return 0
