"""The types of the values in a checkpoint of this project; a file from someone else may have others."""

from collections.abc import Mapping
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np
from torch import Tensor

from salt_lightning.fit.meter import Totals

_MOST_VALUES, _DEEPEST = 1 << 22, 64
_NUMBER = int | float | Tensor  # of no dimension
_SPEC: dict[Any, Any] = {
    **dict.fromkeys(("path", "revision", "dtype", "attention"), str | None),
    **{"family": str, "config": dict, "trust_remote_code": bool, ...: ()},
}
_STEPS: dict[Any, Any] = {"weight": _NUMBER, "steps": _NUMBER | None, "anneal_steps": _NUMBER}
_LOSS: dict[Any, Any] = dict.fromkeys(("teacher_temperature", "logits_budget_gib"), _NUMBER)
_TOTALS: dict[Any, Any] = {**dict.fromkeys(Totals.__dataclass_fields__, _NUMBER), ...: ()}
# Types of what is read from a checkpoint, if it is there. `...` stands for all other names, () for no type at all.
_CHECKPOINT: dict[Any, Any] = {
    **dict.fromkeys(("global_step", "max_steps"), int),
    "kept_steps": [int],
    "tokenizer": str | None,
    **dict.fromkeys(("optim_class", "module_class"), str),
    "hyper_parameters": {"student": _SPEC, "teacher": (_SPEC, type(None)), "optim": dict, **_LOSS},
    "state_dict": Mapping,
    **{name: [dict] for name in ("optimizer_states", "lr_schedulers")},
    "callbacks": dict,
    "loops": {"fit_loop": {"epoch_loop.batch_progress": dict, "epoch_loop.state_dict": dict}},
    "text": {
        **{"source": [str], "weights": ([_NUMBER], type(None)), "hub": [str]},
        **dict.fromkeys(("documents", "tokens"), int | None),
        "cuts": {...: [int]},
        "val_share": _NUMBER,
    },
    "data": dict.fromkeys(("--data.global_batch_size", "--data.block_size", "--data.num_train_tokens"), int),
    "stretches": [{"step": int, "rows": int, "block_size": int, "turns": ({...: int}, type(None)), "text": str}],
    "trainer": {"--trainer.precision": str, "--trainer.gradient_clip_val": _NUMBER | None, "torch": str},
    "kd_schedule": ({**_STEPS, "shape": str, "stop_margin": _NUMBER | None}, type(None)),
    "kd_stop_step": int | None,
    "forward_flops": {...: _NUMBER},
    **dict.fromkeys(("totals", "totals_before"), _TOTALS),
    **dict.fromkeys(("time_s", "teacher_time_s"), _NUMBER),
}


# keys that every checkpoint of a SALTModule has
_ALWAYS = {"global_step", "tokenizer", "hyper_parameters", "state_dict", "text", "data", "pytorch-lightning_version"}
VERSION = "salt_lightning_version"  # of the code that wrote it
# keys that a fit needs in addition to continue
TO_GO_ON = {"max_steps", "trainer", "stretches", "forward_flops", "totals", "totals_before", "time_s", "teacher_time_s"}


def is_checkpoint(checkpoint: Any) -> bool:
    """Whether it has a student's settings and weights, and values of the right types wherever they are read.

    Raises:
        KeyError, TypeError: it has no such settings.
    """
    settings = checkpoint["hyper_parameters"]["student"]["config"]  # empty for a student made in configure_model
    return isinstance(settings, dict) and checkpoint.keys() >= _ALWAYS and _is_like(_CHECKPOINT, checkpoint)


def plain(value: Any, depth: int = 0) -> Any:
    """Converts numpy numbers and paths, which cannot be read without unpickling, to Python's own numbers and strings;
    also inside dictionaries, lists and tuples."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, PurePath):
        return str(value)
    inside = partial(plain, depth=depth + 1)
    if type(value) not in (dict, list, tuple) or depth > _DEEPEST:  # a list may contain itself
        return value
    return {inside(k): inside(v) for k, v in value.items()} if type(value) is dict else type(value)(map(inside, value))


def is_bounded(checkpoint: dict[str, Any]) -> bool:
    """Whether walking through what is read ends soon: a list may contain itself, or another list many times over."""
    read = _CHECKPOINT.keys() - {"state_dict", "optimizer_states", "callbacks"}
    left, nodes = _MOST_VALUES, [(checkpoint[name], 0) for name in read & checkpoint.keys()]
    while nodes:
        node, depth = nodes.pop()
        if isinstance(node, dict | list | tuple | set):
            left -= len(node)
            if left < 0 or depth > _DEEPEST:
                return False
            nodes += [(each, depth + 1) for each in (node.values() if isinstance(node, dict) else node)]
    return True


def _is_like(kind: Any, value: Any) -> bool:
    """Whether a value, as far as it is there, has the types in the same places of `kind`."""
    if isinstance(kind, dict):
        rest = kind.get(..., object)
        return isinstance(value, dict) and all(_is_like(kind.get(name, rest), value[name]) for name in value)
    if isinstance(kind, list):
        return isinstance(value, list | tuple) and all(_is_like(kind[0], each) for each in value)
    if isinstance(kind, tuple):
        return any(_is_like(each, value) for each in kind)
    return isinstance(value, kind) and (kind is object or not isinstance(value, int) or abs(value) < 1 << 63)
