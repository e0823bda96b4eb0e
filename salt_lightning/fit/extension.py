"""A user's own code around SALTModule, in Python: logs its terms, and refuses what would go wrong silently.

Checks subclasses, optimizers, and batches of a user's own loader; docs/extending.md shows how each works. Also
restores the user's train or eval modes and random numbers after a fit.
"""

import inspect
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedConfig

from salt_lightning.errors import ConfigError, few, refuse
from salt_lightning.fit import averaging
from salt_lightning.hugging_face.experts import count_layers
from salt_lightning.models import CausalLM
from salt_lightning.parallel import SHARDS_MODELS, has_finite_weights, plain_name
from salt_lightning.preflight import Finding
from salt_lightning.schedule import kd_callbacks, trained_schedule
from salt_lightning.storage import damage

_BATCH = "docs/own-data.md describes a batch"
_FREE = {  # hooks that may be replaced entirely
    "configure_model", "configure_optimizers", "validation_step", "test_step", "predict_step", "load_from_checkpoint"
}  # fmt: skip
_SHAPED = ("input_ids", "labels", "positions")


def require_super(cls: type, base: type) -> None:
    """Raises ConfigError if a subclass overrides a hook in which `base` does its work, without calling it."""
    names = sorted({*vars(base), *vars(Guarded)} - _FREE)
    hooks = [name for name in names if name[0] != "_" and hasattr(LightningModule, name)]
    above = cls.__mro__[: cls.__mro__.index(base)]
    own = [(name, inspect.unwrap(vars(c)[name])) for c in above for name in hooks if name in vars(c)]
    ours = [*vars(base).values(), *vars(Guarded).values()]
    lost = [name for name, hook in own if hook not in ours and not _calls(hook, name, base.__name__)]
    refuse(
        f"{cls.__name__}.{name} must call super().{name}(...): {base.__name__} does part of its work there"
        for name in lost
    )


def _calls(function: Any, name: str, base: str) -> bool:
    """Whether a function, or one nested in it, uses the attribute of that name of super() or of the base."""
    if not hasattr(code := getattr(function, "__code__", function), "co_names"):
        return True  # not a Python function
    spoken = {*code.co_names, *code.co_freevars}
    here = name in spoken and not spoken.isdisjoint({"super", base})
    return here or any(_calls(inner, name, base) for inner in code.co_consts if hasattr(inner, "co_names"))


def extend(module: Any, lm: torch.nn.Module) -> None:
    """Lets a subclass add its parts; their initial values follow from the module's seed, the same on all ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(module.hparams["seed"])
        module.extend_student(lm)


def count_again(module: Any) -> None:
    """Recounts the FLOPs of a student made before this fit, perhaps with rows of another length or without data."""
    if isinstance(student := getattr(module, "student", None), CausalLM):
        module.meter.forward_flops["student"] = module._count_flops(student)


def check_subclass(trainer: Trainer) -> None:
    """Raises ConfigError for parts added by a subclass of SALTModule that a step would ignore; reports experts whose
    load nothing balances."""
    module: Any = trainer.lightning_module
    if not module.automatic_optimization:
        raise ConfigError("automatic_optimization False: SALTModule needs Lightning to do the steps; leave it True")
    if trainer.lr_scheduler_configs:
        raise ConfigError("a learning-rate scheduler of your own would be overwritten; set OptimSpec(...), model.optim")
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    if any(not {"decays", "param_names"} <= group.keys() for group in groups):
        raise ConfigError(
            "an optimizer of your own (configure_optimizers) does not work with SALTModule, which sets the learning "
            "rate and weight decay of its AdamW at every step; set OptimSpec(...), model.optim, or a subclass of it "
            "that builds your optimizer from groups of named parameters, as OptimSpec.build makes them"
        )
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    kept = {name for group in groups for name in group["param_names"]}
    if forgotten := [name for name in map(plain_name, trained) if name.startswith("student.") and name not in kept]:
        raise ConfigError(
            f"{few(forgotten)}: in no group of the optimizer, so they would never be trained; build it from all that "
            f"{type(module.optim_spec).__name__}.build is given, or give them requires_grad_(False) in extend_student"
        )
    if others := [name for name in trained if not name.startswith("student.")]:
        raise ConfigError(
            f"{few(others)}: parameters outside the student would be trained, but neither clipped nor checked for NaN; "
            "add them to the student in extend_student"
        )
    may_balance = type(module).step_loss.__module__ != "salt_lightning.module"  # of a subclass
    for finding in doubts(module.student, trainer.precision, may_balance):
        finding.require()
    if not isinstance(trainer.strategy, SHARDS_MODELS):
        return
    if not module._ndim:
        raise ConfigError("a student made in configure_model is not sharded; train it on one device, or with ddp")
    wrapped = FullyShardedDataParallel if isinstance(trainer.strategy, FSDPStrategy) else FSDPModule
    if not isinstance(module.student, wrapped):
        raise ConfigError(
            "the student was made before this fit (load_from_checkpoint, validate or a fit on one device) and is not "
            "sharded, so each rank would train its own copy; make a new SALTModule, and load the weights with "
            "trainer.fit(ckpt_path=...) or ModelSpec(path=...)"
        )
    if late := [name for name in map(plain_name, trained) if name not in module._ndim]:
        raise ConfigError(
            f"{few(late)}: added after the student was sharded, so each rank would train its own copy; add it in "
            "extend_student, or use ddp"
        )


def write_rates(module: Any, step: int) -> None:
    """Writes the OptimSpec's values for `step` into the optimizer."""
    (optimizer,) = module.trainer.optimizers
    module.optim_spec.write(optimizer, step, module.trainer.max_steps)
    module._rates = rates(optimizer)


def warn_of_other_rates(module: Any) -> None:
    """Warns if something else than `write_rates`, such as a callback, has changed a rate or decay, which is lost."""
    if rates(module.trainer.optimizers[0]) != module._rates:
        rank_zero_warn(
            "lr or weight_decay in the optimizer were changed since the last step, perhaps by a callback: this has no "
            "effect, because SALTModule writes both before each step; change them with --model.optim.*, or in a "
            "subclass of OptimSpec (lr_at, write)"
        )


def rates(optimizer: Any) -> list[float]:
    """Rates and decays that are numbers: to read tensors may wait for a GPU."""
    values = [group.get(name) for group in optimizer.param_groups for name in ("lr", "weight_decay")]
    return [value for value in values if isinstance(value, float | int)]


def doubts(student: torch.nn.Module, precision: str | None, may_balance: bool = False) -> list[Finding]:
    """What may spoil the training of a student: weights in 16 bits (`precision` is the trainer's), idle experts, unless
    a loss of the user's own `may_balance` them."""
    found, in_16_bits = [], precision == "bf16-true"
    if in_16_bits or any(p.requires_grad and p.dtype == torch.bfloat16 for p in student.parameters()):
        said = "the student's weights are kept in bf16, which rounds away updates below about 1/256 of a weight"
        setting = "--trainer.precision bf16-mixed" if in_16_bits else "--model.student.dtype float32"
        found.append(Finding("warning", "precision", said, f"{setting} keeps them in fp32"))
    if (count := count_layers(student)) and not may_balance:
        said = (
            f"{count} layers of experts, but nothing balances the load of the experts: output_router_logits and "
            "router_aux_loss_coef add no loss here, and the routers' correction biases are not updated"
        )
        remedy = "a few experts may end up doing all the work; see docs/extending.md, Balancing experts"
        found.append(Finding("note", "balance", said, remedy))
    return found


def require_callbacks(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Raises ConfigError if a callback of the checkpoint's run is missing: the fit would drop the teacher, or resume
    from averaged weights with the optimizer state of the trained ones."""
    step, schedule = checkpoint["global_step"], trained_schedule(checkpoint)
    if schedule is not None and schedule(step) > 0 and not kd_callbacks(trainer):
        raise ConfigError(
            f"the checkpoint is at step {step} of a phase with a teacher (--kd.steps {schedule.steps}), but the "
            "Trainer has no KDScheduleCallback; add it, and give SALTModule the teacher; or use "
            "KDScheduleCallback(weight=0.0, allow_change=True) to continue without"
        )
    if "current_model_state" in checkpoint and not averaging.averages(trainer):
        raise ConfigError(
            "--ckpt_path: this checkpoint holds weights averaged by a WeightAveraging callback, and separately the "
            "trained ones; resume with that callback (--trainer.callbacks EMAWeightAveraging), or start a new run from "
            "the averaged weights with --model.student.path"
        )


def require_loadable(trainer: Trainer) -> None:
    """Raises ConfigError for a checkpoint that is damaged, or given to predict, which builds no student."""
    if trainer.state.fn == TrainerFn.PREDICTING and not hasattr(trainer.lightning_module, "student"):
        raise ConfigError(
            f"ckpt_path {trainer.ckpt_path}: predict scores with the teacher; give it as SALTModule(..., teacher=...)"
        )
    require_as_written(trainer.ckpt_path, "ckpt_path")


def require_as_written(path: Any, setting: str) -> None:
    """Raises ConfigError if a checkpoint that is being loaded is damaged, as Lightning and torch do not look; not again
    if the command has."""
    if not isinstance(path, str | os.PathLike) or not os.path.exists(path) or damage.is_trusted(Path(path)):
        return
    if not os.path.isdir(path) and not zipfile.is_zipfile(path):  # cut off, which torch says, or of its older format
        return
    if reason := damage.in_bytes(Path(path)):
        raise ConfigError(f"{setting} {path} is damaged ({reason}); use another one")


class Guarded(LightningModule):
    """Logs a subclass's own terms; loads only whole checkpoints; and remembers whether each part is in train or eval
    mode while an evaluation sets all to eval: Lightning loses this if an error ends the evaluation; here the next start
    restores it."""

    _modes: Sequence[tuple[torch.nn.Module, bool]] = ()
    _give_back_random: Callable[[], None]
    _loaded_step = 0  # optimizer steps that trained the weights which validate and test evaluate
    _trained_on: Mapping[str, Any] | None = None  # what their checkpoint records
    _ended = False  # this fit has had Lightning's on_train_end
    _rates: Sequence[float] = ()
    _terms: Mapping[str, torch.Tensor] = {}  # of the running step; replaced, never changed

    def log_term(self, name: str, part: torch.Tensor | float) -> None:
        """Logs a term of an own step_loss as `train/NAME`, when the loss is logged and against the same steps.

        Args:
            name: not one that is logged already.
            part: this micro-batch's part of a mean over the step's tokens, as it is added to the loss. A rank that
                gives none counts as 0.
        """
        number = torch.as_tensor(part, dtype=torch.float32, device=self.device).detach()
        if number.numel() != 1:
            raise ConfigError(f"log_term({name!r}, ...) takes one number, not a tensor {list(number.shape)}; sum it")
        self._terms = {**self._terms, name: self._terms.get(name, 0.0) + number.reshape(())}

    def with_terms(self, values: dict[str, float]) -> dict[str, float]:
        """What is logged of the step just done, with what `log_term` was given in it. Collective for a subclass."""
        names, world = sorted(self._terms), self.trainer.world_size
        if world > 1 and type(self).__module__ != "salt_lightning.module":  # ranks may have other terms
            named: list[list[str]] = [[]] * world
            torch.distributed.all_gather_object(named, names)
            names = sorted({*chain(*named)})
        if not names:
            return values
        if taken := [name for name in names if name in values]:
            raise ConfigError(f"log_term: train/{taken[0]} is already logged; choose another name")
        parts = torch.stack([self._terms.get(name, torch.zeros((), device=self.device)) for name in names])
        means = self.trainer.strategy.reduce(parts, reduce_op="sum") / world
        return values | dict(zip(names, means.tolist(), strict=True))

    @_restricted_classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        require_as_written(checkpoint_path, "load_from_checkpoint:")
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_validation_model_eval(self) -> None:
        self.give_back_modes()
        self._modes = [(part, part.training) for part in self.modules()]
        averaging.complete(self)
        super().on_validation_model_eval()

    def on_validation_model_train(self) -> None:
        self.give_back_modes()

    on_test_model_eval, on_test_model_train = on_validation_model_eval, on_validation_model_train

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        averaging.pair(self)
        warn_of_other_rates(self)
        write_rates(self, self.global_step)

    def on_train_epoch_end(self) -> None:
        averaging.complete(self)

    def on_train_end(self) -> None:
        self._loaded_step, self._ended = self.global_step, True  # the former for a later start of this module

    def on_fit_end(self) -> None:
        if not self._ended:
            averaging.finish(self)
        self._ended = False
        self._give_back_random()

    def give_back_modes(self) -> None:
        for part, training in self._modes:
            part.training = training
        self._modes = ()


def seed_random(seed: int, device: torch.device) -> None:
    """torch.manual_seed, for the host and one device only.

    For each kind of device that the machine lacks, torch's own function records where it was called, which took a
    tenth of the host's time for a micro-batch.
    """
    seed %= 2**63
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)  # of the current device, which is the process's own


def keep_random(device: torch.device) -> Callable[[], None]:
    """Returns a function that restores torch's random state as it is now."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return partial(_give_back, torch.get_rng_state(), cuda, device)


def _give_back(host: torch.Tensor, cuda: torch.Tensor | None, device: torch.device) -> None:
    torch.set_rng_state(host)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)


def check_weights(module: Any, trained_steps: int) -> None:
    """Before a fit's first step: warns about already trained weights, refuses non-finite ones. Collective.

    Raises:
        ConfigError: some are not finite.
    """
    if not has_finite_weights(module.trainer, module.student):
        raise ConfigError(
            "the student's weights are not finite before the first step, or so large that their squares are not, "
            "perhaps after an earlier fit; make a new SALTModule, or resume from a checkpoint "
            "(trainer.fit(ckpt_path=...))"
        )
    if trained_steps and not module.trainer.ckpt_path:
        rank_zero_warn(
            f"this student was already trained for {trained_steps} steps: this fit starts from its weights, counts "
            f"steps from {module.global_step}, and has a new optimizer; for a new run make a new SALTModule, or use "
            "ckpt_path to resume, with the optimizer's state"
        )


def require_schedule(module: Any) -> None:
    """Raises ConfigError if there is a teacher but no callback to set the KD weight."""
    if module.has_teacher and not kd_callbacks(module.trainer):
        raise ConfigError(
            f"SALTModule has a teacher ({module.teacher_spec.path}), but the Trainer has no KDScheduleCallback: it "
            "would silently train BASELINE; add Trainer(callbacks=[KDScheduleCallback(steps=...)])"
        )


@dataclass
class Unchecked:
    """What is yet to be checked since this start."""

    ours: bool  # the batches are a SALTDataModule's
    whole: bool = False  # a step has begun with its first micro-batch; after a resume, one may begin within it
    step_tokens: bool = True  # no step has shown that it is right

    def __post_init__(self) -> None:
        self.stages = set() if self.ours else {"train", "val"}  # until their first batch

    def look_at_step(self, step: int, said: float, counted: float, is_last: bool) -> None:
        """Raises ConfigError if `step_tokens` is not the number of labels in the first whole step that is logged: it
        would scale gradients. `is_last`: the loader ended with this step, perhaps too early."""
        if not (self.step_tokens and self.whole and (step == 1 or not is_last)):
            return
        if abs(said - counted) > 1e-3 * counted:  # fp32 sums have rounding errors
            why = "the optimizer computes the loss more than once per step, as LBFGS and SAM do, which is not supported"
            raise ConfigError(
                f"step_tokens of the batches is {said:,.0f}, but optimizer step {step} had {counted:,.0f} labels over "
                f"all micro-batches and ranks: gradients would be scaled wrongly; {why if self.ours else _BATCH}"
            )
        self.step_tokens = False


def check_first(module: Any, batch: Any, stage: str) -> None:
    """Checks the first batch of a user's own loader for a stage, train or val; waits for the device.

    Raises:
        ConfigError: it is not a dictionary of the right tensors, has ids that a model lacks, or wrong labels.
    """
    if stage not in module.unchecked.stages:
        return
    module.unchecked.stages.discard(stage)
    _check_batch(batch, (*_SHAPED, "step_tokens") if stage == "train" else _SHAPED)
    # a label that the teacher lacks has probability 0
    for name, read in (("student", ("input_ids", "labels")), ("teacher", ("input_ids",))):
        highest = max(int(batch[ids].max()) for ids in read)
        model = getattr(getattr(module, name), "model", None)
        if isinstance(config := getattr(model, "config", None), PreTrainedConfig):  # else a model of the user's own
            size = config.get_text_config().vocab_size
            if highest >= size:
                raise ConfigError(f"a batch has the id {highest}, but the {name} has only {size} ids; {_BATCH}")


def _check_batch(batch: Any, wanted: tuple[str, ...]) -> None:
    if not isinstance(batch, Mapping):
        raise ConfigError(f"a batch must be a dict with {', '.join(wanted)}, not a {type(batch).__name__}; {_BATCH}")
    if missing := [name for name in wanted if not isinstance(batch.get(name), torch.Tensor)]:
        raise ConfigError(f"a batch has no tensor {', '.join(missing)}; {_BATCH}")
    shapes = {name: list(batch[name].shape) for name in _SHAPED}
    if len(shapes["input_ids"]) != 2 or len({*map(tuple, shapes.values())}) > 1:
        raise ConfigError(f"a batch's {', '.join(_SHAPED)} must have one shape, rows x tokens, not {shapes}; {_BATCH}")
    if "step_tokens" in wanted and batch["step_tokens"].numel() != 1:
        raise ConfigError(f"a batch's step_tokens must be one number, not {list(batch['step_tokens'].shape)}; {_BATCH}")
    if bool(batch["positions"][:, 0].any()):
        raise ConfigError(f"a batch's positions must begin with 0 in each row, as a document does; {_BATCH}")
    ids_BT, labels_BT = batch["input_ids"], batch["labels"]
    # Where the next place has a label, too, and does not begin a document, its input is this place's label.
    goes_on_BT = (batch["positions"][:, 1:] != 0) & (labels_BT[:, 1:] >= 0)
    known_BT = (labels_BT >= 0) & torch.cat([goes_on_BT, torch.zeros_like(goes_on_BT[:, :1])], dim=1)
    right_N, same_N = (labels_BT == ids_BT.roll(-1, dims=1))[known_BT], (labels_BT == ids_BT)[labels_BT >= 0]
    right, enough = _share(right_N), len(right_N) > 8  # single labels may repeat their token
    if right < 0.5 and (_share(same_N) > 0.5 if enough else len(same_N) > 1 and bool(same_N.all())):
        raise ConfigError(f"a batch's labels equal its input_ids: each label must be the next token; {_BATCH}")
    if right < 0.5 and enough:
        raise ConfigError(
            f"a batch's labels are the next of its input_ids in only {right:.0%} of the places, as if they were "
            f"shifted twice: each label must be the next token; {_BATCH}"
        )


def _share(right: torch.Tensor) -> float:
    return float(right.float().mean()) if right.numel() else 0.0
