"""The command line: LightningCLI with fit, validate, test and predict, and the verbs that need no trainer."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveFloat
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from salt_lightning import answers, check, compare, errors, export, parallel
from salt_lightning.answers import AnswerTest
from salt_lightning.checkpoint import FIRST_RANK_S, AtomicCheckpointIO, RunCheckpoint, done, savers
from salt_lightning.command import settings
from salt_lightning.command.parser import Parser, named, parse, readable, reword, to_defaults
from salt_lightning.command.quiet import as_before, one_at_a_time, silence_libraries
from salt_lightning.command.resume import resolve, settings_held
from salt_lightning.command.streams import steady_streams
from salt_lightning.comparison.report import evaluation
from salt_lightning.data import SALTDataModule
from salt_lightning.errors import ConfigError, NonFiniteLossError, Stopped, printable, raised, refuse, say
from salt_lightning.fit import device
from salt_lightning.fit.restart import check_evaluated, replace_lost_start
from salt_lightning.models import check_path, read_checkpoint
from salt_lightning.module import SALTModule
from salt_lightning.run import endings, meeting, peers, run_lock, slurm
from salt_lightning.run.event_log import ending_wandb, quiet_threads, trackers
from salt_lightning.run.peers import rank, say_once
from salt_lightning.run.progress_bar import ProgressBar, close_bars, keep_off_bars
from salt_lightning.run.run_config import SaveRunConfig, taken
from salt_lightning.run.run_folder import flat, is_over
from salt_lightning.schedule import KDScheduleCallback
from salt_lightning.teacher.difficulty import DocumentLossWriter
from salt_lightning.teacher.scoring import ScoreWriter, check_start

# Lightning 2.6 uses names that jsonargparse has deprecated; our users cannot fix that.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

_HELD = ExitStack()  # the lock on the run's folder, until main() returns
_WRITERS = {"predict": ScoreWriter, "validate": DocumentLossWriter, "test": DocumentLossWriter}


class SALTCLI(LightningCLI):
    """LightningCLI plus --kd, --checkpoint, --answers and --run; refuses settings that contradict each other."""

    holds = False  # whether this process has locked its run
    verb = ""  # the only verb whose settings are needed; "": all verbs

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(KDScheduleCallback, "kd")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(AnswerTest, "answers")
        parser.add_argument(
            "--run", type=str, default="runs/default", help="Folder of the run: config, logs, checkpoints."
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        verbs = LightningCLI.subcommands()
        return {verb: verbs[verb] for verb in ("fit", "validate", "test", "predict")}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if self.verb in ("", subcommand):
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        return Parser(**kwargs)  # only to be listed: adding its settings is slow

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        assert parser._subcommands_action is not None
        reword(parser._subcommands_action, self._subcommand_parsers)
        for name, (_, text) in VERBS.items():  # listed here; main() runs them
            parser._subcommands_action.add_subcommand(name, Parser(description=text), help=text)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Not super(): it warns about arguments given from Python. `wrong` settings get their defaults."""
        parsers = (parser, *getattr(self, "_subcommand_parsers", {}).values())  # none with run=False
        self.config, self._explicit, self.wrong = parse(parsers, sys.argv[1:] if args is None else args)
        for config in map(self._settings, (self._explicit, self.config)):
            wrong = settings.local_paths(config)
            parallel.name_class(config)
        self.wrong += wrong + settings.wrong_seed(config)
        self.instead = named(self.wrong)
        if config.get("ckpt_path") or "config" in self.instead:  # --cofnig FILE: all of the file is missing
            refuse(self.wrong)
        to_defaults(self.wrong, config, self._parser(self.config.get("subcommand")))

    def _settings(self, config: Namespace) -> Namespace:
        subcommand = config.get("subcommand")
        return config[subcommand] if subcommand else config

    def _add_instantiators(self) -> None:
        """Does nothing: instantiators would put class paths into the checkpoint, which holds one class's settings."""

    def _parse_ckpt_path(self) -> None:
        """Precedence: defaults < checkpoint < the user's settings. Lightning silently lets the checkpoint win."""
        config = self._settings(self.config)
        path, subcommand = config.get("ckpt_path"), self.config.get("subcommand")
        self.hold()  # before anything is read from it
        if path is None or subcommand is None:
            return
        chosen, path = path, resolve(path, config, subcommand)
        config["ckpt_path"] = None if path is None else str(path)
        if path is None:
            return
        given = self._settings(self._explicit).get("model") or Namespace()
        held = settings_held(path, subcommand, given, config.seed_everything, proved=chosen == "last")
        if subcommand != "fit" and given:
            given.pop("student", None)  # the student is always the checkpoint's
        with readable():
            merged = self.parser.parse_object({subcommand: {"model": held}}, self.config)
            if given:
                merged = self.parser.parse_object({subcommand: {"model": given.as_dict()}}, merged)
        self.config = merged

    def hold(self) -> None:
        meeting.tell(self._settings(self.config).get("trainer"))
        if not self.wrong and not self.holds and peers.seems_first():
            for setting, folder in settings.held(self._settings(self.config), self.config.get("subcommand")):
                _HELD.enter_context(run_lock.held(folder, setting))
            self.holds = True

    def before_instantiate_classes(self) -> None:
        config = self._settings(self.config)
        if groups := settings.wrong_groups(config):
            refuse(self.wrong + groups)
        absent, verb = settings.wrong_accelerator(config.trainer), self.subcommand or "fit"
        wrong = absent + settings.wrong_trainer_settings(config.trainer, verb)  # reported with what the classes refuse
        wrong += settings.wrong_folders(config, verb) + settings.wrong_teacher(config)
        if self.subcommand == "fit" and not config.get("ckpt_path"):
            wrong += taken(Path(config.run), settings.checkpoints(config), flat(config.as_dict()))
        if self.subcommand in ("validate", "test") and not config.get("ckpt_path") and not config.model.student.path:
            wrong += [f"{self.subcommand} needs --ckpt_path (a .ckpt file, or last): a new student is untrained"]
        self.wrong += errors.of_others(wrong, self.instead)
        # the trainer would look for the devices, and some strategies need them
        reset = [*absent, "--trainer.devices", "--trainer.strategy"] if absent else []
        if config.trainer.fast_dev_run:  # it would set max_steps, for which other settings are then too long
            reset.append("--trainer.fast_dev_run")
        self.instead |= to_defaults(reset, config, self._parser(self.subcommand))

    def refuse(self) -> None:
        if self.wrong and not self.instead and self.subcommand == "fit":
            self.wrong += check.besides((), self.model, self.datamodule, self.trainer, self._teaches())
        refuse(errors.once(self.wrong))

    def say_device(self) -> None:
        """Reports the device where it may be a surprise."""
        asked = self._settings(self.config).trainer.accelerator
        if self.trainer.strategy.root_device.type == "cpu" and asked == "auto":
            say_once(
                f"device: the CPU, since torch {torch.__version__} finds no GPU (--trainer.accelerator auto); for "
                "sizes that fit a CPU, add --config configs/cpu.yaml"
            )
        if remark := parallel.device_remark(self.trainer):
            say_once(f"device: {'; '.join(remark)}")

    def _teaches(self) -> bool:
        """Whether the teacher must exist; not when resuming, since in phase 2 it may be gone."""
        config = self._settings(self.config)
        return bool(config.kd.weight > 0 and not config.get("ckpt_path"))

    def before_fit(self) -> None:
        """Reports all problems that need no text at once, before the text is prepared, which takes minutes."""
        self.say_device()
        config, given = self._settings(self.config), self._settings(self._explicit)  # not the checkpoint's
        if path := given.get("model.student.path"):
            unused = {"family": "model type comes", "config": "sizes come"}
            for name in (name for name in unused if given.get(f"model.student.{name}") not in (None, {}, "llama")):
                say_once(f"--model.student.{name} is not used: the {unused[name]} from --model.student.path {path}")
        target = None if is_over(config.ckpt_path, self.trainer.max_steps) else config.checkpoint.export
        looks = check.without_text(self.model, self.datamodule, self.trainer, target, self._teaches())
        looks.append(partial(device.require, self.model, self.trainer.strategy.root_device.type))
        if wrong := raised(looks):
            refuse([*wrong, *raised([self.datamodule.require_files])])  # finding files takes seconds

    def before_predict(self) -> None:
        self.say_device()
        check_start(self.trainer, self.model)
        check_path(self.model.teacher_spec, "teacher")

    def predict(self, **kwargs: Any) -> None:
        """Scores without returning predictions: they are already in files."""
        self.trainer.predict(**{**kwargs, "return_predictions": False})

    def validate(self, **kwargs: Any) -> None:
        self._evaluate(self.trainer.validate, **kwargs)

    def test(self, **kwargs: Any) -> None:
        self._evaluate(self.trainer.test, **kwargs)

    def _evaluate(self, verb: Callable[..., object], verbose: bool, **kwargs: Any) -> None:
        looks = [partial(check_evaluated, self.model, self.datamodule, self._settings(self.config).get("ckpt_path"))]
        if self.subcommand == "test":
            looks.append(partial(answers.check_start, self.trainer, self.datamodule))
        refuse(raised(looks))
        verb(**kwargs, verbose=False)  # Lightning's own table prints 17 digits
        if verbose and self.trainer.is_global_zero:
            print(evaluation(self.trainer.callback_metrics))

    def instantiate_classes(self) -> None:
        """Resets each setting that a class refuses to its default, so that all problems are reported at once."""
        while True:
            try:
                self._instantiate()
                break
            except ConfigError as error:
                self.wrong += errors.of_others(error.problems, self.instead)
                settled = to_defaults(error.problems, self._settings(self.config), self._parser(self.subcommand))
                if not settled:
                    refuse(errors.once(self.wrong))
                self.instead |= settled
            except Exception:  # from Lightning, perhaps due to a problem found before
                refuse(errors.once(self.wrong))
                raise
        replace_lost_start(self.model, self._settings(self.config).get("ckpt_path"))
        if self.instead and self.subcommand == "fit":
            self.wrong += check.besides(self.instead, self.model, self.datamodule, self.trainer, self._teaches())
        self.refuse()

    def _instantiate(self) -> None:
        parallel.require_supported(self._settings(self.config).trainer.strategy)
        try:
            with readable():
                super().instantiate_classes()
        except ConfigError:
            raise
        except (ValueError, ImportError) as error:
            raise ConfigError(*settings.of_classes(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self._settings(self.config)
        run, given = Path(config.run), config.trainer
        slurm.require_place()
        logs = [] if given.get("logger") in (None, True) else self._instances("logger")
        if self.subcommand == "predict" and not logs:
            kwargs["logger"] = False
        elif given.get("logger") is not False:
            path = config.get("ckpt_path")
            steps = int(read_checkpoint(path, "--ckpt_path")["global_step"]) if path else 0
            kwargs["logger"] = trackers(logs, run, self.subcommand or "fit", steps)
        kwargs["default_root_dir"] = str(run)
        kwargs["plugins"] = [*self._instances("plugins"), AtomicCheckpointIO()]
        own: list[pl.Callback] = [_WRITERS[self.subcommand]()] if self.subcommand in _WRITERS else []
        others = self._instances("callbacks")
        has_bar = any(isinstance(callback, pl.callbacks.ProgressBar) for callback in others)
        if given.get("enable_progress_bar") is not False and not has_bar:
            own.append(ProgressBar())
        kwargs["callbacks"] = [*others, *own]
        try:
            trainer = super().instantiate_trainer(**kwargs)
            # Lightning's own is known only after prepare_data
            trainer._checkpoint_connector._ckpt_path = trainer.command_ckpt_path = config.get("ckpt_path")  # type: ignore[attr-defined]
            parallel.check(trainer, config.get("ckpt_path"))
            peers.expect_others(trainer, self.subcommand)
            self.hold()  # if it was not clear before that this process is the first
            return trainer
        except ConfigError:
            raise
        except (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError) as error:
            raise ConfigError(settings.of_lightning(error, given, self.wrong)) from error

    def _instances(self, name: str) -> list[Any]:
        """The user's objects for a --trainer setting that takes one object or a list."""
        found = self._get(self.config_init, "trainer").get(name) or []
        return found if isinstance(found, list) else [found]


class CheckCLI(SALTCLI):
    """The command line of fit, which `check` examines instead of running it."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        told = "Memory of the GPU that will run it, GiB."
        parser.add_argument("--check.memory_gib", type=PositiveFloat | None, default=None, help=told)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        shown = self._subcommand_parsers["fit"]
        shown.prog, shown.description = shown.prog.replace(" fit", " check"), VERBS["check"][1]

    def hold(self) -> None:
        """Does nothing: check may run while another process trains."""

    def refuse(self) -> None:
        """Does nothing: the problems are among the findings."""

    def before_fit(self) -> None:
        """Does nothing: the findings include what it would refuse."""

    def fit(self, **kwargs: Any) -> None:
        config = self._settings(self.config)
        looked = check.Check(
            self.model, self.datamodule, self.trainer, str(config.trainer.accelerator), config.check.memory_gib
        )
        self.code = check.report(looked, errors.once(self.wrong), bool(self.instead), self._teaches())


TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,  # a run is one Lightning epoch of max_steps; the data's order handles its own epochs
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "enable_model_summary": False,
}


def _start(kind: type[SALTCLI], args: list[str]) -> Any:
    kind.verb = args[0] if args and args[0] in kind.subcommands() else ""
    return kind(
        SALTModule,
        SALTDataModule,
        args=args,
        parser_class=Parser,
        save_config_callback=SaveRunConfig,
        trainer_defaults=TRAINER_DEFAULTS,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={"description": "Pretrain a student with SALT; see README.md."},
    )


def _check(args: list[str]) -> int:
    try:
        return _start(CheckCLI, ["fit", *args]).code
    except ConfigError as error:
        say(error)
    return 1


VERBS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "compare": (compare.main, "Compares runs in a table and a plot: where each reaches BASELINE's loss, at what cost."),
    "export": (export.main, "Writes a checkpoint's student as a Hugging Face folder, with tokenizer and model card."),
    "check": (_check, "Reports what would stop or spoil a fit: teacher, text, memory, disk. Same settings as fit."),
}


@steady_streams()
def main(args: Sequence[object] | None = None) -> int:
    """Runs one command line; returns its exit code: 0, 1 for a failed run, 2 for wrong settings, 128 + signal.

    Args:
        args: the words of the command line: strings, paths, numbers, lists, mappings, None (null). None: those of this
            process.
    """
    try:
        with nullcontext() if args is None else as_before(), ending_wandb() as codes:
            code = _main(sys.argv[1:] if args is None else list(map(settings.typed, args)), args is not None)
            codes.append(code)
    except BaseException as error:
        endings.end_abandoned(error)
        raise
    endings.end_abandoned(code)
    return code


def _main(args: list[str], in_python: bool) -> int:
    first = args[:1]
    peers.limit_threads()
    silence_libraries()
    quiet_threads()
    keep_off_bars()
    try:
        if first and first[0] in VERBS:
            return VERBS[first[0]][0](args[1:])
        with one_at_a_time(), _HELD:
            cli = _start(SALTCLI, args)
    except Stopped as stopped:
        print(f"\n{stopped}")
        return 128 + stopped.number
    except (KeyboardInterrupt, SystemExit) as stop:
        return errors.exit_code(stop, in_python)
    except (ConfigError, NonFiniteLossError, OSError, MisconfigurationException, ModuleNotFoundError) as error:
        close_bars()
        if rank():  # the first rank reports the same error, and its end ends this one too; else report it here
            with suppress(KeyboardInterrupt):
                time.sleep(FIRST_RANK_S)
        code = say(error)
        return 2 if isinstance(error, MisconfigurationException) else code
    except (MemoryError, RuntimeError) as error:
        said = errors.of_machine(error, *first)
        if said is None and not peers.has_lost_others(error):
            raise
        close_bars()
        print(f"\nerror: {said}" if said else peers.loss_of_others(rank(), str(error), *first), file=sys.stderr)
        return 1
    endings.leave_at_exit()
    trainer = cli.trainer
    line, code = None, 0
    if cli.subcommand == "fit":
        line = done(trainer, settings.checkpoints(cli._settings(cli.config)))
    if not line and (sent := next((saver.stopped_by for saver in savers(trainer) if saver.stopped_by), None)):
        line = f"stopped by {sent.name} at step {trainer.global_step}, saved; continue with --ckpt_path last"
        code = 128 + sent
    if line and trainer.is_global_zero:
        print(printable(line))
    # Another pod or node has a code of its own. Of ranks that a launcher or srun watches, it would look like a crash.
    alone = trainer.local_rank == 0 and not slurm.has_started(trainer)
    return code if alone or trainer.is_global_zero else 0
