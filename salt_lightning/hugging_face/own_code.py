"""What transformers leaves undone for a model whose code is not its own: code that came with it, or is registered."""

from copy import deepcopy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.initialization import no_init_weights

from salt_lightning.hugging_face.spec import ModelSpec


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


@torch.no_grad()
def with_buffers(model: PreTrainedModel) -> PreTrainedModel:
    """The model, its buffers that no file holds, such as rotary frequencies, as its code computes them.

    transformers 5 builds a pretrained model without memory, and then leaves these buffers as the memory happens to be,
    unless `_init_weights` sets them. That of its own families does; code for transformers 4 does it in `__init__`.
    Here, another such model is built, whose weights are never touched and so take no memory.
    """
    names = [name for name, _ in model.named_non_persistent_buffers(remove_duplicate=False)]
    if not names or type(model).__module__.startswith("transformers."):
        return model
    with torch.random.fork_rng(devices=[]):
        with no_init_weights():
            made = type(model)._from_config(deepcopy(model.config), dtype=model.dtype)
        for module in made.modules():
            if module._non_persistent_buffers_set:
                made._init_weights(module)
    computed = dict(made.named_buffers(remove_duplicate=False))
    for name in names:
        parent, _, last = name.rpartition(".")
        if name in computed:  # else of a quantized layer, whose loader has made it
            # not its own device: transformers leaves one that several modules share on meta in all but the first
            model.get_submodule(parent)._buffers[last] = computed[name].to(model.device)
    return model
