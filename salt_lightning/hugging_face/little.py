"""A large fresh model in little: of its kind, but narrow, to look at its code without the memory of its weights."""

from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from salt_lightning.hugging_face.spec import LAYERS, SPECIAL_TOKENS, ModelSpec, fresh_config

_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner")  # ends of the names of an MLP's or an expert's width
_NARROW = 64


def in_little(spec: ModelSpec, full: PreTrainedConfig) -> ModelSpec | None:
    """The spec of a fresh model with only the first and last layer of `full`, the config of `spec`, the first of each
    other kind, and their settings; MLPs, experts and head are narrow, attention is whole. None: the family takes no
    such sizes."""
    derived = full.to_dict().get("layer_types") or []  # by an interval, or from indices that few layers lack
    if "layer_types" not in spec.config and len(set(derived)) > 1:
        named = replace(spec, config={**spec.config, "layer_types": list(derived)})
        if small := _of_ends(named, full):
            return small
    return _of_ends(spec, full)


def _of_ends(spec: ModelSpec, full: PreTrainedConfig) -> ModelSpec | None:
    """The same, of the layers that the lists of `spec` tell apart."""
    layers, wide = getattr(full, LAYERS, 0), full.to_dict()
    each = {key: value for key, value in spec.config.items() if isinstance(value, list) and len(value) == layers}
    # numbers may differ in all layers
    kinds = [value.index(kind) for value in each.values() for kind in value if isinstance(kind, str)]
    chosen = sorted({0, layers - 1, *kinds})
    own = {key: [value[i] for i in chosen] for key, value in each.items()}
    names = [key for key, width in wide.items() if key.endswith((*_WIDTHS, "vocab_size")) and isinstance(width, int)]
    narrow = {key: min(wide[key], _NARROW) for key in names} | dict.fromkeys(SPECIAL_TOKENS, 0)
    small = replace(spec, config={**spec.config, **own, **narrow, LAYERS: len(chosen)})
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(fresh_config(small, None))
    except Exception:  # of many kinds, as families tie some of their sizes to others
        return None
    return small
