"""What transformers leaves undone for a model whose code is not its own: code that came with it, or is registered."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, __version__
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.initialization import no_init_weights

from salt_lightning.errors import ConfigError
from salt_lightning.hugging_face import folders, quantized
from salt_lightning.hugging_face.spec import ModelSpec, uneven_heads


def without_weights(config: PreTrainedConfig, spec: ModelSpec, **kwargs: Any) -> PreTrainedModel:
    """The pretrained model of a spec, on the meta device.

    transformers' `from_config` knows no revision: it would run the code of main, which nobody may have read.
    """
    named = (getattr(config, "auto_map", None) or {}).get(AutoModelForCausalLM.__name__)
    with torch.device("meta"):
        # "transformers_modules." is such code; another module is a class that the user has registered, which wins
        if named and spec.trust_remote_code and type(config).__module__.startswith("transformers"):
            made: Any = get_class_from_dynamic_module(named, str(spec.path), revision=spec.source["revision"])
            model: PreTrainedModel = made._from_config(config, **kwargs)
            return model
        return AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code, **kwargs)


def _is_own(model: PreTrainedModel) -> bool:
    """Whether its code is not that of transformers, whose families benchmarks/families.py tries."""
    return not type(model).__module__.startswith("transformers.")


def hint(of: ModelSpec | PreTrainedModel) -> str:
    """What may be wrong with a model that cannot be loaded, or cannot be run."""
    if isinstance(of, PreTrainedModel) and (uneven := uneven_heads(of.config)):
        return uneven
    own = of.trust_remote_code and folders.names_code(of.folder) if isinstance(of, ModelSpec) else _is_own(of)
    return f" (its own code may be for another transformers than {__version__})" if own else ""


def require_positions(lm: Any) -> None:
    """Raises ConfigError if documents that change places within their rows change their hidden states by more than
    roundings: a models.CausalLM whose code ignores position_ids."""
    if not _is_own(lm.model):
        return
    ids_BT = torch.arange(1, 9, device=lm.head.weight.device)[None]
    positions_BT = (ids_BT - 1) % 4
    before_2TD, after_2TD = (lm(ids, positions_BT)[0].unflatten(0, (2, 4)) for ids in (ids_BT, ids_BT.roll(4, 1)))
    off = (after_2TD.flip(0) - before_2TD).abs().max()
    # of the families of transformers it is 0 on a CPU, in 16 bits, too; some roundings, as kernels may sum otherwise
    if not off <= max(1e-3, 8 * torch.finfo(before_2TD.dtype).eps) * before_2TD.abs().max():
        raise ConfigError(
            f"--model.{lm.name}: hidden states of {type(lm.model).__name__} depend on where in its row a document "
            "begins: it ignores position_ids; use a family that does not, e.g. llama"
        )


def unread(model: PreTrainedModel) -> list[str]:
    """Weights that loading has left at random values though own code lets them be missing, so that transformers does
    not report them: it does not tie them as transformers 4 did, or the file is not whole. Not those that its
    `_init_weights` computes, such as a table of sines: they are the same at any seed."""
    if not _is_own(model) or quantized.method(model):
        return []
    missing = {name: p for name, p in model.named_parameters() if not _is_read(p)}
    if missing:
        made, parts = _made_anew(model), [name.split(".") for name in missing]
        owners = {".".join(each[:i]) for each in parts for i in range(len(each))}
        for seed in range(2):
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(seed)
                before = dict(made.named_parameters(remove_duplicate=False))
                for name, p in missing.items():
                    before[name].copy_(p == 0)  # nowhere the same: memory that nobody has set is often 0 in both
                for owner in sorted(owners, key=len, reverse=True):  # as transformers: the whole after its parts
                    made._init_weights(made.get_submodule(owner))
            again = dict(made.named_parameters(remove_duplicate=False))  # the code may tie them itself
            missing = {name: p for name, p in missing.items() if not torch.equal(p, again[name])}
    return [*missing]


def _made_anew(model: PreTrainedModel) -> PreTrainedModel:
    """The same model on the CPU as its `__init__` makes it; its weights are not touched, and so take no memory."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), no_init_weights():
        made: PreTrainedModel = type(model)._from_config(deepcopy(model.config), dtype=model.dtype)
    return made


@torch.no_grad()
def with_computed(model: PreTrainedModel) -> PreTrainedModel:
    """The model with what its code computes and no file holds, such as rotary frequencies: buffers, unless the model is
    on the meta device, and tensors that modules keep as plain attributes.

    transformers 5 builds a pretrained model without memory, and then leaves these buffers as the memory happens to be,
    unless `_init_weights` sets them, and these attributes without memory. That of its own families sets all; code for
    transformers 4 does it in `__init__`.
    """
    if not _is_own(model):
        return model
    buffers = [] if model.device.type == "meta" else _unread_buffers(model)
    plain = [(path, key) for path, module in model.named_modules() for key in _plain_tensors(module, on_meta=True)]
    if not buffers and not plain:
        return model
    owners = {name.rpartition(".")[0] for name in buffers}
    made = _made_anew(model)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        for path, module in made.named_modules(remove_duplicate=False):
            if path in owners:
                made._init_weights(module)
    computed, weights = dict(made.named_buffers(remove_duplicate=False)), {*map(_place, made.parameters())}
    for name in buffers:
        parent, _, last = name.rpartition(".")
        if name in computed:  # else of a quantized layer, whose loader has made it
            # not its own device: transformers leaves one that several modules share on meta in all but the first
            model.get_submodule(parent)._buffers[last] = computed[name].to(model.device)
    modules = dict(made.named_modules())
    for path, key in plain:
        found = _plain_tensors(modules[path]).get(key) if path in modules else None
        of_weights = not weights.isdisjoint(map(_place, _tensors(found)))  # which `made` lacks
        if found is not None and not of_weights:
            vars(model.get_submodule(path))[key] = found
    return model


def _is_read(tensor: Tensor) -> bool:
    """Whether loading has read the weight or buffer from a file, or tied it: transformers marks it so."""
    return bool(getattr(tensor, "_is_hf_initialized", False))


def _unread_buffers(model: PreTrainedModel) -> list[str]:
    """Names of buffers that no file holds. Of others, code may say that they can be missing; quantizers make some."""
    names = [name for name, _ in model.named_non_persistent_buffers(remove_duplicate=False)]
    if quantized.method(model):
        return names
    read = {name for name, buffer in model.named_buffers(remove_duplicate=False) if _is_read(buffer)}
    return [name for name, _ in model.named_buffers(remove_duplicate=False) if name in names or name not in read]


def _plain_tensors(module: nn.Module, on_meta: bool = False) -> dict[str, Any]:
    """The attributes of a module that are tensors, or lists or dicts of some, but no weights or buffers of it."""
    own = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")}
    return {key: v for key, v in own.items() if any(tensor.is_meta or not on_meta for tensor in _tensors(v))}


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
