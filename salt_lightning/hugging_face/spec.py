"""ModelSpec, the settings that name a model, and the transformers config of a fresh one."""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from salt_lightning.errors import ConfigError, few, is_out_of_memory, one_line, refuse, wrong_kinds
from salt_lightning.hugging_face import folders
from salt_lightning.storage.kinds import plain

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelSpec:
    """A causal language model: pretrained from `path`, or fresh from `family` and `config`.

    Args:
        path: A checkpoint of this project (.ckpt), a Hugging Face folder (safetensors) or a hub name. null: a fresh
            student, or no teacher.
        revision: Branch, tag or commit of a hub name.
        family: transformers' model type of a fresh model: llama, gpt2, gpt_neox, qwen3, gemma3_text, phi, opt ...
        config: Settings of that family's transformers config, e.g. hidden_size. If not given, vocab_size is the
            tokenizer's number of ids, rounded up to a multiple of 64, and max_position_embeddings the block size; all
            else, dropout too, is the family's default.
        dtype: Dtype of the parameters. null: float32 for the student, the student's compute dtype for the teacher.
        attention: transformers' attention implementation (sdpa, eager, flex_attention ...), or packed: torch's
            variable-length kernel, without a mask. null: packed on a GPU in 16 bits, otherwise transformers' choice.
        trust_remote_code: Run model code that comes with `path`. Set it only if you have read that code. For a
            teacher, or a student that is measured: one that is trained has none, since checkpoints hold no code.
    """

    path: str | None = None
    revision: str | None = None
    family: str = "llama"
    config: dict[str, Any] = field(default_factory=dict)
    dtype: Literal["float32", "bfloat16"] | None = None
    attention: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.dtype, torch.dtype):
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        refuse(wrong_kinds(ModelSpec, vars(self), "ModelSpec."))
        object.__setattr__(self, "config", plain(deepcopy(dict(self.config))))  # the caller may go on to change it
        if self.path is not None:  # in Python it may be a Path, or have a ~ that no shell has expanded
            object.__setattr__(self, "path", os.path.expanduser(self.path))

    @classmethod
    def of(cls, spec: ModelSpec | dict[str, Any] | str | os.PathLike[str] | None) -> ModelSpec:
        """The spec itself, or one made from a path, from a checkpoint's plain dict (trusting no code), or from nothing.

        Raises:
            ConfigError: it is something else, e.g. a model.
        """
        if isinstance(spec, dict):
            if unknown := [name for name in spec if name not in (names := [f.name for f in fields(cls)])]:
                raise ConfigError(f"a model has no settings {few(unknown)}, only {', '.join(names)}")
            return cls(**folders.without_code(spec, "the checkpoint"))
        if isinstance(spec, str | os.PathLike):
            return cls(path=os.fspath(spec))
        if spec is not None and not isinstance(spec, ModelSpec):
            raise ConfigError(
                f"SALTModule takes a ModelSpec, or a path, not a {type(spec).__name__}; save the model "
                "with save_pretrained and give its folder, or see docs/extending.md for a model of your own"
            )
        return spec or cls()

    @property
    def is_checkpoint(self) -> bool:
        return self.path is not None and self.path.endswith(".ckpt")

    @property
    def is_local(self) -> bool:
        """Whether the path is certainly not a hub name."""
        path = self.path or ""
        return self.is_checkpoint or path.startswith(("/", ".", "~")) or path.count("/") > 1

    @property
    def source(self) -> dict[str, Any]:
        """The arguments with which transformers reads a folder or hub name, besides the name itself."""
        return {"revision": self.commit or self.revision or "main", "trust_remote_code": self.trust_remote_code}

    @property
    def commit(self) -> str | None:
        """The commit of a hub name, once it was checked (`models.check_path`)."""
        return None if self._snapshot is None else self._snapshot.name

    @property
    def folder(self) -> Path:
        """Where the files are: the path, or for a hub name that was checked, its folder in the hub's cache."""
        return self._snapshot or Path(self.path or "")

    @property
    def _snapshot(self) -> Path | None:
        return folders.SNAPSHOTS.get((self.path or "", self.revision or "main"))

    def dtype_or(self, default: torch.dtype) -> torch.dtype:
        """Dtype of the parameters; `default` if it is null."""
        return DTYPES[self.dtype] if self.dtype else default


if TYPE_CHECKING:
    ModelLike = ModelSpec | str | os.PathLike[str] | dict[str, Any]  # what ModelSpec.of takes
else:
    ModelLike = ModelSpec  # the command line derives its settings from this


@contextmanager
def as_config_error(setting: str) -> Iterator[None]:
    """Turns errors, except out of memory, into ConfigError: transformers checks settings with errors of many kinds."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        said = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        raise ConfigError(f"{setting}: {one_line(f'{type(said).__name__}: {said}')}") from error


_SIZES = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "max_position_embeddings", "n_inner", "ffn_dim"),
}


def wrong_sizes(settings: dict[str, Any], known: PreTrainedConfig) -> dict[str, Any]:
    """Sizes in the settings that no model can have. transformers accepts some: a model without layers trains."""
    names = _SIZES | {known.attribute_map.get(name, name) for name in _SIZES}
    sizes = {name: size for name, size in settings.items() if name in names and isinstance(size, int | float | str)}
    return {name: size for name, size in sizes.items() if not (isinstance(size, int) and size >= 1)}


def uneven_heads(config: PreTrainedConfig) -> str:
    """A hint for the error of a model that does not run: some families set num_key_value_heads, qwen3_moe to 4."""
    text = config.get_text_config()
    heads, of_keys = (getattr(text, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    if not (isinstance(heads, int) and isinstance(of_keys, int) and of_keys) or heads % of_keys == 0:
        return ""
    return f" (num_key_value_heads {of_keys} does not divide num_attention_heads {heads})"


def unnamed_sizes(spec: ModelSpec, config: PreTrainedConfig) -> str:
    """Sizes not given that make a fresh model large: a later --model.student.config replaces an earlier one whole."""
    if spec.path is not None:
        return ""
    typed, own = ({config.attribute_map.get(name, name): 0 for name in names} for names in (spec.config, _LARGE))
    rest = {name: getattr(config, name, None) for name in own if name not in typed}
    return ", ".join(f"{name} {size}" for name, size in rest.items() if size is not None)


_LARGE = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "moe_intermediate_size"),
    *("num_experts", "num_local_experts", "n_routed_experts"),
)


# Keys of a config.json that have a setting of their own here.
_SAID_BY = {
    "model_type": "family",
    **dict.fromkeys(("dtype", "torch_dtype"), "dtype"),
    **dict.fromkeys(("attn_implementation", "_attn_implementation"), "attention"),
}
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # every config takes them, but not all list them


def family_config(spec: ModelSpec) -> PreTrainedConfig:
    """The family's own config, the base of a fresh model; checks without data that the spec fits it.

    Raises:
        ConfigError: no such family, or settings that it does not have or that are out of range (all at once).
    """
    setting = f"--model.student.family {spec.family}"
    with as_config_error(setting):
        try:
            known = AutoConfig.for_model(spec.family)
        except ValueError:
            raise ConfigError(
                f"{setting}: transformers has no such model type; use e.g. llama, gpt2 or qwen3"
            ) from None
        text = known.get_text_config()  # refused where there are several
    if text is not known:
        raise ConfigError(
            f"{setting} is not a text-only model; use --model.student.family {text.model_type}, its text part"
        )
    if not folders.is_causal(spec.family):
        raise ConfigError(f"{setting} is not a causal language model of transformers; use e.g. llama, gpt2 or qwen3")
    names = set(known.to_dict()) | set(known.attribute_map) | set(SPECIAL_TOKENS)
    elsewhere = [key for key in _SAID_BY if key in spec.config]
    wrong = [
        f"--model.student.config.{key}: leave it out; use --model.student.{_SAID_BY[key]} instead" for key in elsewhere
    ]
    others = sorted(set(spec.config) - names - set(elsewhere))
    if others and _is_whole(spec.config):
        rank_zero_info(f"{spec.family} does not list {', '.join(others)}; used as given")
        others = []
    for key in others:
        if key == "head_dim" and not hasattr(known, key) and _reads_head_dim(spec.family):
            continue
        near = difflib.get_close_matches(key, names, 1)
        if key.startswith(("rope_", "rotary_", "partial_rotary_")) and "rope_parameters" in names:  # the old names
            near = ["rope_parameters"]
        hint = f"; did you mean {near[0]}?" if near else ""
        wrong.append(f"--model.student.config.{key}: {spec.family} has no such setting{hint}")
    for key, size in wrong_sizes(spec.config, known).items():
        wrong.append(f"--model.student.config.{key} {size} must be a whole number, 1 or more")
    for key in {"hidden_act", "hidden_activation", "activation_function"} & set(spec.config):
        if isinstance(name := spec.config[key], str) and name not in ACT2FN:
            near = difflib.get_close_matches(name, ACT2FN, 3) or ["silu", "gelu", "relu"]
            wrong.append(f"--model.student.config.{key} {name} is not known; use e.g. {', '.join(near)}")
    for key, value in spec.config.items():  # a fit would fail at its first step, or never notice
        if "drop" in key and isinstance(value, float | int) and not 0 <= value <= 1:
            wrong.append(f"--model.student.config.{key} {value} must lie in 0..1")
    refuse([*wrong, *_wrong_ropes(spec.config.get("rope_parameters"))])
    if not spec.config:
        raise ConfigError(
            f"--model.student.config is empty: {spec.family}'s own defaults are a model of billions of weights; give "
            "sizes, e.g. hidden_size and num_hidden_layers, or --model.student.path to start from pretrained weights"
        )
    return known


def _is_whole(settings: dict[str, Any]) -> bool:
    """Whether these are all settings of a model, as in a checkpoint. Then no key is misspelled: those that the family
    does not list came from a hub folder's config.json. Nobody types the keys tested here, which every config has."""
    return {"return_dict", "output_hidden_states", "is_encoder_decoder"} <= set(settings)


def _reads_head_dim(family: str) -> bool:
    """Whether a family accepts any head_dim without listing it, as transformers' qwen2, phi3 and qwen3_moe do."""
    own, numels = AutoConfig.for_model(family).attribute_map, set()
    for width in (8, 16):
        try:
            config = AutoConfig.for_model(family, **{own.get(LAYERS, LAYERS): 1, "head_dim": width})
            with torch.device("meta"):
                numels.add(sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()))
        except Exception:  # of many kinds: some families have no such model or sizes
            return False
    return len(numels) == 2


LAYERS = "num_hidden_layers"


def padded_vocab(num_ids: int) -> int:
    """Rows of a fresh model's head: the ids, rounded up to whole tiles of its matrix products."""
    return -(-num_ids // 64) * 64


def fresh_config(spec: ModelSpec, data: Any, before_text: bool = False) -> PreTrainedConfig:
    """The transformers config of a fresh model; sizes that are not given follow from the data.

    `before_text`: only to check the sizes, with stand-ins for what a tokenizer determines, before there is one.
    """
    known = family_config(spec)
    positions = known.attribute_map.get(_POSITIONS, _POSITIONS)  # gpt2's n_positions
    defaults: dict[str, Any] = {}
    if data is not None:
        eos, num_ids = (0, 0) if before_text else (data.tokenizer.eos_token_id, data.vocab_size)
        defaults = dict.fromkeys(SPECIAL_TOKENS, eos)
        defaults["vocab_size"] = padded_vocab(num_ids) or known.vocab_size
        if _POSITIONS not in spec.config:
            defaults[positions] = data.block_size
    ropes = None if _is_whole(spec.config) else spec.config.get("rope_parameters")
    if isinstance(ropes, dict):
        _refuse_flat_rope(known, ropes)
    with as_config_error("--model.student.config"), _no_idle_rope(ropes is not None):
        config = AutoConfig.for_model(spec.family, **defaults | deepcopy(spec.config))
    if ropes is not None:
        _refuse_idle_share(config)
    if data is None and "vocab_size" not in spec.config:
        raise ConfigError(
            f"--model.student.config.vocab_size is not given: without a SALTDataModule nothing else determines it, "
            f"and {spec.family} would use {config.vocab_size}; set it"
        )
    if data is not None:
        if config.vocab_size < num_ids:
            raise ConfigError(
                f"--model.student.config.vocab_size {config.vocab_size} is smaller than the tokenizer's "
                f"{num_ids}; set at least that, or leave it out"
            )
        named = positions if positions in spec.config else _POSITIONS
        check_positions(config, f"--model.student.config.{named}", data)
    return config


def _by_kind(ropes: Any) -> dict[str, dict[str, Any]]:
    """The rope parameters of a model under "", or those of each kind of layer under its name."""
    ropes = ropes if isinstance(ropes, dict) else {}
    return {kind: rope for kind, rope in ropes.items() if isinstance(rope, dict)} or {"": ropes}


def _rope_setting(kind: str) -> str:
    return f"--model.student.config.rope_parameters{kind and f'.{kind}'}"


def _wrong_ropes(ropes: Any) -> Iterator[str]:
    """Errors in rope parameters, for which transformers raises a bare KeyError or computes non-finite values."""
    types = ["default", *ROPE_INIT_FUNCTIONS]
    for kind, rope in _by_kind(ropes).items():
        setting, theta = _rope_setting(kind), rope.get("rope_theta", 1.0)
        if (name := rope.get("rope_type", "default")) not in types:
            yield f"{setting}.rope_type {name} is not known; give one of {', '.join(types)}"
        if isinstance(theta, float | int) and not 0 < theta < math.inf:
            yield f"{setting}.rope_theta {theta} must be above 0, and finite"


@contextmanager
def _no_idle_rope(typed: bool) -> Iterator[None]:
    """Raises ConfigError for `typed` rope parameters that change nothing: transformers ignores them, and logs that."""
    logger, unused = logging.getLogger("transformers.modeling_rope_utils"), list[str]()

    def listen(record: logging.LogRecord) -> bool:
        if (said := record.getMessage()).startswith("Unrecognized keys"):
            unused.append(one_line(said))
        return True

    logger.addFilter(listen)
    try:
        yield
    finally:
        logger.removeFilter(listen)
    if typed and unused:
        raise ConfigError(
            f"{_rope_setting('')}: {unused[0]}, so they would change nothing; give the rope_type "
            "(linear, yarn, llama3 ...) that they belong to, or leave them out"
        )


def _refuse_flat_rope(known: PreTrainedConfig, ropes: dict[str, Any]) -> None:
    """The same for families with a rope per kind of layer (gemma3_text); transformers 5.17 ends with an error there."""
    kinds = list(filter(None, _by_kind(getattr(known, "rope_parameters", None))))
    if kinds and (idle := sorted(set(ropes) - set(kinds))):
        raise ConfigError(
            f"{_rope_setting(idle[0])} {ropes[idle[0]]} would change nothing: "
            f"{known.model_type} has a rope for each kind of layer; set it in {' and '.join(kinds)}"
        )


_SHARE = "partial_rotary_factor"
_POSITIONS = "max_position_embeddings"


def _refuse_idle_share(config: PreTrainedConfig) -> None:
    """The same for the share of a head that is rotated: transformers accepts it in every rope, few families read it."""
    ropes = getattr(config, "rope_parameters", None) or {}
    for kind, rope in _by_kind(ropes).items():
        if (share := rope.get(_SHARE, 1.0)) == 1.0:
            continue
        whole, turned = deepcopy(config), {**rope, _SHARE: 1.0}
        whole.rope_parameters = {**ropes, kind: turned} if kind else turned
        if (own := _frequencies(config)) and own == _frequencies(whole):
            raise ConfigError(
                f"{_rope_setting(kind)}.{_SHARE} {share} would change nothing: "
                f"{config.model_type} rotates whole heads; leave it out"
            )


def _frequencies(config: PreTrainedConfig) -> list[tuple[str, int]]:
    """How many frequencies each rope of a model has; empty if that cannot be seen."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # of many kinds; reported when the model is built
        return []
    return [(name, buffer.numel()) for name, buffer in model.named_buffers() if name.endswith("inv_freq")]


def check_positions(config: PreTrainedConfig, setting: str, data: Any) -> None:
    """Raises ConfigError if the data's rows are longer than the model's positions; warns of longrope's switch."""
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    ropes = getattr(config, "rope_parameters", None) or {}
    if positions is not None and positions < data.block_size:
        remedy = f"set --data.block_size to at most {positions}"
        if ropes and ".path" in setting:
            remedy += (
                ", or raise it in the folder's config.json (for a .ckpt, in that of its export; see docs/own-data.md)"
            )
        raise ConfigError(f"{setting} {positions} is smaller than --data.block_size {data.block_size}; {remedy}")
    for rope in _by_kind(ropes).values():
        if rope.get("rope_type") == "longrope":
            short = rope.get("original_max_position_embeddings", positions)
            if short < data.block_size:
                rank_zero_warn(
                    f"{setting} {positions}: longrope uses other frequencies for a whole micro-batch as soon as one of "
                    f"its documents is longer than {short} tokens, so results depend on how rows are grouped; "
                    f"set --data.block_size {short} to avoid that"
                )


def resolved(spec: ModelSpec, config: PreTrainedConfig) -> ModelSpec:
    """The spec of a fresh model of exactly these sizes, from which a checkpoint's model can be built again."""
    settings = {k: v for k, v in config.to_dict().items() if k not in _NOT_SETTINGS}
    return replace(spec, path=None, revision=None, family=config.model_type, config=settings)


_NOT_SETTINGS = (
    *("model_type", "transformers_version", "architectures", "_name_or_path", "dtype", "torch_dtype"),
    "quantization_config",
)
DROPOUT = ("attention_dropout",)  # a run may resume with another one
_NOT_SHAPE = ("use_cache", *DROPOUT, "initializer_range", "eos_token_id")


def shape_settings(spec: dict[str, Any]) -> dict[str, Any]:
    """The settings of a spec (a plain dict) that a checkpoint's student and the configured one must share."""
    settings = {k: v for k, v in spec["config"].items() if k not in _NOT_SHAPE}
    return {"family": spec.get("family")} | {f"config.{k}": v for k, v in settings.items()}


def setting_of(key: str, value: Any, rows: int | None) -> str:
    """The setting that decides a `key` of `shape_settings`; a fresh model has one position per token of a row."""
    follows = key in ("config.max_position_embeddings", "config.n_positions") and value == rows
    return "--data.block_size" if follows else f"--model.student.{key}"


def of_checkpoint(checkpoint: dict[str, Any], setting: str) -> ModelSpec:
    """The spec of a checkpoint's student. Raises ConfigError if it is not a model of transformers."""
    spec = ModelSpec.of(checkpoint["hyper_parameters"]["student"])
    if not spec.config:
        raise ConfigError(
            f"{setting} holds a student made in configure_model; only its own class can build it, in Python"
        )
    return spec


def settings_without_code(saved: dict[str, Any], path: Path) -> dict[str, Any]:
    """A checkpoint's settings without what would run code; jsonargparse would import any class that they name."""
    specs = [saved.get(name) for name in ("student", "teacher", "optim")]
    if _names_class(saved) or not all(isinstance(spec, dict) for spec in specs):
        raise ConfigError(
            f"--ckpt_path {path} is not a whole checkpoint of this project (its settings lack a part, or name a class, "
            "which is never run); use one as it was saved"
        )
    untrusted = {name: folders.without_code(saved[name], f"--ckpt_path {path}") for name in ("student", "teacher")}
    return {**saved, **untrusted}


def _names_class(node: Any) -> bool:
    if isinstance(node, dict):
        return "class_path" in node or any(map(_names_class, node.values()))
    return isinstance(node, (list, tuple)) and any(map(_names_class, node))
