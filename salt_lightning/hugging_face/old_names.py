"""Saved settings as version 4 of transformers, too, reads them, with what the saving of version 5 forgets.

Version 4, and tools that read its names, would take a family's own rope for that of the model, and say nothing.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_THETA, _SHARE, _LENGTH = "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"


def config_names(config: PreTrainedConfig) -> dict[str, Any]:
    """The old keys of a config.json, and their values."""
    experts = {"num_experts": config.num_experts} if "num_experts" in config.attribute_map else {}  # of qwen3_moe
    return _rope_names(config) | experts


def _rope_names(config: PreTrainedConfig) -> dict[str, Any]:
    """Empty if there is no rope, or if this version would not read the same rope from any old names."""
    ropes = getattr(config, "rope_parameters", None)
    if not ropes:
        return {}
    rope, local = ropes.get("full_attention", ropes) or {}, ropes.get("sliding_attention") or {}
    theta, share = rope.get(_THETA), rope.get(_SHARE)
    if config.model_type == "olmo3" and local != {"rope_type": "default", _THETA: theta}:
        return {}  # version 4 has one theta, and scales layers without a window only
    scaling = {name: value for name, value in rope.items() if name not in (_THETA, _SHARE)}
    for said in (
        {_THETA: theta, _SHARE: share},
        {_THETA: theta, "rope_local_base_freq": local.get(_THETA)},  # gemma3_text
        {"rotary_emb_base": theta, "rotary_pct": share},  # gpt_neox
        {_THETA: theta, _SHARE: share, "rope_scaling": {"rope_type": "default"}},  # gpt_oss, apertus: else scaled
    ):
        names = {name: value for name, value in said.items() if value is not None}
        if scaling.get("rope_type", "default") != "default":
            names["rope_scaling"] = scaling
        if scaling.get("rope_type") == "longrope":
            names[_LENGTH] = scaling.get(_LENGTH)
        if _are_read(names, config):
            return names
    return {}


def _are_read(names: dict[str, Any], config: PreTrainedConfig) -> bool:
    """Whether this version reads the same settings with `names`, both beside rope_parameters and in place of it."""
    whole = config.to_dict()
    rest = {name: value for name, value in whole.items() if name != "rope_parameters"}
    if config.model_type == "olmo3":  # for which this version takes an old theta for some layers only
        rest = whole
    with suppress(Exception):  # of many kinds: the family does not know these names
        # what to_dict says may change when it is read
        read = [type(config).from_dict(deepcopy(known)).to_dict() for known in (whole, rest | names, whole | names)]
        new, *others = ({name: value for name, value in each.items() if name not in names} for each in read)
        return all(new == each for each in others)
    return False


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes its files so that this version and the old one read the same tokenizer from them."""
    tokenizer.save_pretrained(folder)
    rewrite(folder / "tokenizer_config.json", lambda settings: _tokenizer_settings(settings) | _forgotten(tokenizer))


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Changes the settings in a JSON file, in the layout of transformers."""
    settings = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


# Whatever tokenizer.json says, version 4 begins each text with a BOS, and ends none with an EOS.
_BEGIN_WITH_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer", "CohereTokenizer", "GemmaTokenizer")


def _forgotten(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What save_pretrained leaves out: without it, Llama 2's reads the word after a special token as another id."""
    kept = {} if (legacy := getattr(tokenizer, "legacy", None)) is None else {"legacy": legacy}
    begins = type(tokenizer).__name__ in _BEGIN_WITH_BOS
    if begins and (ends := tokenizer("")["input_ids"]) != [tokenizer.bos_token_id]:
        kept["add_bos_token"] = ends[:1] == [tokenizer.bos_token_id]
        kept["add_eos_token"] = ends[-1:] == [tokenizer.eos_token_id]
    return kept


def _tokenizer_settings(new: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that both versions read alike, without what only says where it was loaded from."""
    old = {name: value for name, value in new.items() if name not in ("is_local", "local_files_only")}
    if new.get("tokenizer_class") == "TokenizersBackend":
        old["tokenizer_class"] = "PreTrainedTokenizerFast"
        old.setdefault("model_input_names", ["input_ids", "attention_mask"])  # version 4's has token_type_ids, too
    if isinstance(new.get("extra_special_tokens"), list):
        old["additional_special_tokens"] = old.pop("extra_special_tokens")
    return old
