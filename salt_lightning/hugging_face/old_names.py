"""What transformers renamed in its version 5, said in an exported folder under the old names as well.

Version 4, and tools that read its names, would take a family's own rope for that of the model, and say nothing.
"""

from contextlib import suppress
from copy import deepcopy
from typing import Any

from transformers import PreTrainedConfig

_THETA, _SHARE = "rope_theta", "partial_rotary_factor"


def config_names(config: PreTrainedConfig) -> dict[str, Any]:
    """The old keys of a config.json, and their values."""
    experts = "num_experts"  # of qwen3_moe
    return _rope_names(config) | ({experts: getattr(config, experts)} if experts in config.attribute_map else {})


def _rope_names(config: PreTrainedConfig) -> dict[str, Any]:
    """Empty if there is no rope, or if this version would not read the same rope from any old names."""
    ropes = getattr(config, "rope_parameters", None) or {}
    rope, local = ropes.get("full_attention", ropes), ropes.get("sliding_attention", {})
    theta, share = rope.get(_THETA), rope.get(_SHARE)
    scaling = {name: value for name, value in rope.items() if name not in (_THETA, _SHARE)}
    whole = config.to_dict()
    rest = {name: value for name, value in whole.items() if name != "rope_parameters"}
    for said in (
        {_THETA: theta, _SHARE: share},
        {_THETA: theta, "rope_local_base_freq": local.get(_THETA)},  # gemma3_text
        {"rotary_emb_base": theta, "rotary_pct": share},  # gpt_neox
    ):
        names = {name: value for name, value in said.items() if value is not None}
        if scaling.get("rope_type", "default") != "default":
            names["rope_scaling"] = scaling
        with suppress(Exception):  # of many kinds: the family does not know these names
            read = (type(config).from_dict(deepcopy(known | names)) for known in (rest, whole))  # changes its input
            if ropes and all(each.to_dict() == whole for each in read):
                return names
    return {}


def tokenizer_settings(new: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that both versions read alike, without what only says where it was loaded from."""
    old = {name: value for name, value in new.items() if name not in ("is_local", "local_files_only")}
    if new.get("tokenizer_class") == "TokenizersBackend":
        old["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(new.get("extra_special_tokens"), list):
        old["additional_special_tokens"] = old.pop("extra_special_tokens")
    return old
