"""AdamW and the learning rate, a pure function of the optimizer step.

No Lightning scheduler: on resume it would replace an explicit new rate with the old one.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import nn

from salt_lightning.errors import ConfigError, refuse, require_length, wrong_kinds


@dataclass(frozen=True)
class OptimSpec:
    """AdamW with weight decay on matrices only; warm-up, then cosine or WSD (warm-up, stable, decay).

    In Python a subclass may build another optimizer (`build`, `write`) or have other rates (`lr_at`).

    Args:
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay of every parameter with two or more dimensions, except biases of experts.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the square root of the second moment.
        schedule: How the learning rate decays: cosine, or wsd (stable, then linear). So wsd is linear decay where
            decay_steps are all steps after the warm-up, and a constant rate where they are 0.
        warmup_steps: Optimizer steps of linear warm-up; the first has lr / warmup_steps, the last lr.
        decay_steps: Number of final steps over which the learning rate decays; the first of them still has all of lr.
            null: for cosine all steps after the warm-up, for wsd a fifth of the run.
        min_lr_ratio: Learning rate that the decay would reach one step after the run, as a share of lr.

    Raises:
        ConfigError: listing every setting out of range.
    """

    lr: float = 3e-4
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int | None = None
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        refuse(wrong_kinds(OptimSpec, vars(self), "--model.optim."))
        ranges = [
            ("lr", 0 < self.lr < math.inf, "must be above 0, and finite"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "must be 0 or more, and finite"),
            ("beta1", 0 <= self.beta1 < 1, "must be at least 0 and below 1"),
            ("beta2", 0 <= self.beta2 < 1, "must be at least 0 and below 1"),
            ("eps", 0 < self.eps < math.inf, "must be above 0, and finite"),
            ("warmup_steps", self.warmup_steps >= 0, "must not be negative"),
            ("decay_steps", self.decay_steps is None or self.decay_steps >= 0, "must not be negative"),
            ("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "must be in 0..1"),
        ]
        refuse(f"--model.optim.{name} {getattr(self, name)} {why}" for name, ok, why in ranges if not ok)

    @classmethod
    def of(cls, spec: "OptimSpec | dict[str, Any]") -> "OptimSpec":
        """The spec itself, or one made from a checkpoint's plain dict.

        Raises:
            ConfigError: the dict is of a subclass with other fields.
        """
        if not isinstance(spec, dict):
            return spec
        if other := sorted(spec.keys() - {field.name for field in fields(cls)}):
            raise ConfigError(
                f"model.optim has {', '.join(other)}, which {cls.__name__} has not: a wrong name, or the checkpoint "
                "was trained with a subclass; then give that, SALTModule.load_from_checkpoint(PATH, optim=...)"
            )
        return cls(**spec)

    def check(self, max_steps: int) -> None:
        """Raises ConfigError if warm-up and decay do not fit into the run, or the run has no length."""
        require_length(max_steps)
        if self.warmup_steps + (self.decay_steps or 0) <= max_steps:
            return
        shorter = f"--model.optim.warmup_steps {max_steps // 20}"
        if self.decay_steps:
            raise ConfigError(
                f"--model.optim.warmup_steps {self.warmup_steps} and decay_steps {self.decay_steps} do not fit into "
                f"--trainer.max_steps {max_steps}; for a shorter run, shorten them too, e.g. {shorter} "
                "--model.optim.decay_steps null"
            )
        raise ConfigError(
            f"--model.optim.warmup_steps {self.warmup_steps} does not fit into --trainer.max_steps {max_steps}; for a "
            f"shorter run, shorten it too, e.g. {shorter}"
        )

    def lr_at(self, step: int, max_steps: int) -> float:
        """The learning rate of optimizer step `step` (counted from 0) in a run of `max_steps`."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        decay_steps = self.decay_steps
        if decay_steps is None:
            rest = max_steps - self.warmup_steps
            decay_steps = rest if self.schedule == "cosine" else min(rest, max_steps // 5)
        done = step - (max_steps - decay_steps)  # negative while the rate is stable
        if done < 0:
            return self.lr
        left = max(0.0, 1.0 - done / decay_steps) if decay_steps else 0.0
        shape = 0.5 * (1.0 - math.cos(math.pi * left)) if self.schedule == "cosine" else left
        return self.lr * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * shape)

    def jump(self, checkpoint: dict[str, Any], max_steps: int) -> str | None:
        """A message if a resumed run gives its next step another rate than the checkpoint's settings would."""
        step, saved = checkpoint["global_step"], checkpoint["hyper_parameters"]["optim"]
        names = {field.name for field in fields(self)}
        if other := (saved.keys() ^ names) - {field.name for field in fields(OptimSpec)}:
            raise ConfigError(
                "the checkpoint was trained with another OptimSpec class, which differs in "
                f"{', '.join(sorted(other))}; resume with that class"
            )
        if (trained := checkpoint.get("optim_class", type(self).__name__)) != type(self).__name__:
            raise ConfigError(
                f"the checkpoint was trained with the OptimSpec class {trained}, not {type(self).__name__}; resume "
                "with that class"
            )
        before = type(self)(**{name: saved[name] for name in names if name in saved})
        planned = checkpoint["max_steps"]
        was, now = before.lr_at(step, planned), self.lr_at(step, max_steps)
        if f"{was:.3g}" == f"{now:.3g}":
            return None
        return (
            f"the learning rate continues from step {step} at {now:.3g} instead of {was:.3g}: --model.optim.* or "
            f"--trainer.max_steps {max_steps} (checkpoint: {planned}) has changed"
        )

    def build(
        self, named: Iterable[tuple[str, nn.Parameter]], ndim: Mapping[str, int] | None = None
    ) -> torch.optim.Optimizer:
        """AdamW over every trainable parameter, each in exactly one of two groups; fused.

        Args:
            named: parameters with their names, which the state keeps: torch's indices change with sharding.
            ndim: number of dimensions by name, where sharding has flattened matrices to vectors.
        """
        groups: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
        for name, p in named:
            if p.requires_grad:
                groups[decays(name, (ndim or {}).get(name, p.ndim))].append((name, p))
        if not any(groups.values()):
            raise ConfigError("no parameter of the student is trained: all have requires_grad False")
        fused = all(p.device.type in ("cuda", "cpu") for group in groups.values() for _, p in group)
        filled = [{"params": group, "decays": which} for which, group in groups.items() if group]
        optimizer = torch.optim.AdamW(filled, lr=self.lr, fused=fused)
        optimizer.register_load_state_dict_pre_hook(_in_its_groups)
        return optimizer

    def write(self, optimizer: torch.optim.Optimizer, step: int, max_steps: int) -> None:
        """Writes this spec's values for `step` into the optimizer, replacing those that a checkpoint restored.

        Called several times with the same step, after the one before and right before its own: depend on `step` alone.
        """
        for group in optimizer.param_groups:
            group["lr"] = self.lr_at(step, max_steps)
            if isinstance(group.get("eps"), float):  # another optimizer's may be something else
                group["eps"] = self.eps
            if "betas" in group:
                group["betas"] = (self.beta1, self.beta2)
            group["weight_decay"] = self.weight_decay if group["decays"] else 0.0


def decays(name: str, ndim: int) -> bool:
    """Whether weight decay applies: to matrices and stacks of them; experts' biases (experts x out) are vectors."""
    return ndim >= 2 and not name.endswith("bias")


def _in_its_groups(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's named state in the current groups: torch maps it by position, but families reorder modules, and an
    older version may have let others decay."""
    own = [name for group in optimizer.param_groups for name in group["param_names"]]
    saved = {name for group in state["param_groups"] for name in group["params"]}
    if not set(own) <= saved or not state["state"].keys() <= set(own):
        return state  # from another model, or without names: torch reports it
    return {**state, "param_groups": [{**group, "params": group["param_names"]} for group in optimizer.param_groups]}


def by_name(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with names instead of torch's indices, which depend on how parameters are sharded."""
    names = {n: name for g in state["param_groups"] for n, name in zip(g["params"], g["param_names"], strict=True)}
    return {
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [{**group, "params": list(group["param_names"])} for group in state["param_groups"]],
    }
