"""Causal language models from `transformers`: building, loading, and the split into backbone and linear head.

Shapes: B rows, T tokens a row, N = B * T, D hidden width, V vocabulary.
"""

import inspect
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from salt_lightning.batches.rows import document_borders
from salt_lightning.errors import ConfigError, few
from salt_lightning.hugging_face import folders, own_code, quantized
from salt_lightning.hugging_face.attention import PACKED, Apart, document_mask, layer_kinds, limited_distance, testable
from salt_lightning.hugging_face.experts import follow_autocast
from salt_lightning.hugging_face.spec import (
    ModelSpec,
    as_config_error,
    fresh_config,
    of_checkpoint,
    padded_vocab,
    wrong_sizes,
)
from salt_lightning.storage import damage, shards

# Without trust_remote_code, transformers asks at the terminal when a config names code.
from_config = partial(AutoModelForCausalLM.from_config, trust_remote_code=False)


def own_parts(state: Iterable[str]) -> list[str]:
    """Names in a checkpoint of what a subclass of SALTModule has added beside the student's model."""
    return [name for name in state if name.startswith("student.") and not name.startswith(shards.STUDENT)]


_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "base_model.model.")


class CausalLM(nn.Module):
    """A transformers model, called for hidden states instead of logits.

    `forward(ids_BT, positions_BT)` returns `(hidden_ND, head_VD, bias_V or None)`; hidden_ND @ head_VD.T + bias_V are
    the model's own logits (a logit scale is folded into hidden_ND). With `then`, it returns
    then(hidden_ND, head_VD, bias_V), evaluated inside this forward, where a sharded head weight is whole.
    Tokens attend to nothing before the last position 0 of their row: packed documents do not see each other.
    `cu_seqlens` (rows.document_borders) says where documents begin; without it they are found from the positions, which
    waits for a GPU. Rows of the head from `num_ids` on are padding, which no token uses: they are left out.
    """

    num_ids: int | None = None

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name  # "student" or "teacher", for messages
        if model.base_model is model or "position_ids" not in inspect.signature(model.base_model.forward).parameters:
            raise ConfigError(
                f"--model.{name}: {type(model).__name__} takes no position_ids, which keep packed documents apart, or "
                "has no separate backbone; use a family that has both, e.g. llama"
            )
        follow_autocast(model)
        # No row is padded, and as a token of the text (EOS, in fresh models) it has to learn like any other.
        for embedding in (module for module in model.modules() if isinstance(module, nn.Embedding)):
            embedding.padding_idx = None
        self._scale = logit_scale(model.config, name)
        self.attention = model.config._attn_implementation
        self.apart: Apart = "positions"
        # transformers' flash attention keeps documents apart only in a batch of one row. Each of our rows starts at
        # position 0, so they can be laid end to end.
        self._one_row = "flash" in str(model.config._attn_implementation)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CausalLM":
        """A cast keeps the dtype of rotary frequencies: in bf16 they would differ from those of the exported model."""
        buffers = [(m, name, b) for m in self.modules() for name, b in m._buffers.items() if name.endswith("inv_freq")]
        super()._apply(fn, recurse)
        for module, name, before in buffers:
            after = module._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                module._buffers[name] = before.to(after.device)
        return self

    @property
    def backbone(self) -> nn.Module:
        return self.model.base_model

    @property
    def head(self) -> nn.Linear:
        return self.model.get_output_embeddings()

    def keep_apart(self, how: Apart) -> None:
        """Keep packed documents apart in this way."""
        self.apart = how
        wanted = PACKED if how == "packed" else self.attention
        if self.model.config._attn_implementation != wanted:
            self.model.set_attn_implementation(wanted)

    def forward(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        then: Callable[..., Any] | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Any:
        # transformers finds documents in position_ids if it gets no mask and no cache; with its default use_cache=True
        # they would silently see each other. `check` finds the families that do not do this.
        if self._one_row:
            ids_BT, positions_BT = ids_BT.reshape(1, -1), positions_BT.reshape(1, -1)
        mask = self._mask(positions_BT) if self.apart == "mask" else None
        more = {}
        if self.apart == "packed":
            if cu_seqlens is None:
                cu_seqlens = torch.from_numpy(document_borders(positions_BT.cpu().numpy())).to(ids_BT.device)
            torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
            # transformers takes a mask of four dimensions as it is, and builds none
            mask, more = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=ids_BT.device), {"cu_seq_lens_q": cu_seqlens}
        hidden_BTD = self.backbone(
            input_ids=ids_BT, position_ids=positions_BT, attention_mask=mask, use_cache=False, **more
        ).last_hidden_state
        hidden_ND = hidden_BTD.flatten(0, 1)
        if self._scale != 1.0:
            hidden_ND = hidden_ND * self._scale
        head_VD, bias_V = self.head.weight, getattr(self.head, "bias", None)
        if self.num_ids is not None and self.num_ids < len(head_VD):
            head_VD, bias_V = head_VD[: self.num_ids], None if bias_V is None else bias_V[: self.num_ids]
        out = (hidden_ND, head_VD, bias_V)
        return out if then is None else then(*out)

    def _mask(self, positions_BT: Tensor) -> Any:
        """A mask that transformers takes as it is: one per kind of layer, if there are several kinds."""
        # eager attention adds its mask to the scores: a boolean one would be silently wrong
        dtype = torch.bool if self.model.config._attn_implementation in ("sdpa", PACKED) else self.model.dtype
        full, window = document_mask(positions_BT, dtype), self._window()
        if window is None:
            return full
        return {"full_attention": full, "sliding_attention": document_mask(positions_BT, dtype, window)}

    def _window(self) -> int | None:
        """How far sliding-window layers look back; None if there are none."""
        config = self.model.config.get_text_config()
        kinds = layer_kinds(config)
        if kinds == {"full_attention"} or not (kinds or limited_distance(config)):
            return None
        if kinds <= {"full_attention", "sliding_attention"} and getattr(config, "sliding_window", None):
            return int(config.sliding_window)
        others = ", ".join(sorted(kinds - {"full_attention"})) or "a limited distance"
        raise ConfigError(
            f"--model.{self.name}: {type(self.model).__name__} keeps packed documents apart only by a mask, which "
            f"its layers of other kinds ({others}) do not use; use another family, e.g. llama"
        )

    @torch.no_grad()
    def check(self) -> float:
        """Checks that the weights are finite and, on eight tokens, that hidden x head are the model's logits, no token
        sees a later one, and packed documents are isolated; returns the largest difference of a logit.

        Raises:
            ConfigError: the family does something that is not supported here; the message says what.
        """
        wrong = [name for name, p in self.model.named_parameters() if not quantized.is_finite(p)]
        if wrong:
            raise ConfigError(
                f"--model.{self.name}.path: its weights are not finite ({few(wrong)}): they are damaged, "
                f"or too large for --model.{self.name}.dtype {str(self.head.weight.dtype).removeprefix('torch.')}"
            )
        said = f"{type(self.model).__name__} cannot be run with its settings{own_code.hint(self.model)}"
        with testable(self), as_config_error(f"--model.{self.name}: {said}"):
            return self._check()

    def _check(self) -> float:
        training = self.training
        self.eval()
        off = self._check_head()
        self.keep_apart("positions")
        if self.sees([7], [0, 1, 2, 3, 4, 5, 6]):
            raise ConfigError(
                f"--model.{self.name}: tokens of this {type(self.model).__name__} see later ones, so it cannot predict "
                "them; use a causal model, without settings such as use_bidirectional_attention"
            )
        if self.sees([0, 1, 2, 3], [4, 5, 6, 7]):
            self.apart = "mask"
            if self.sees([0, 1, 2, 3], [4, 5, 6, 7]):
                raise ConfigError(
                    f"--model.{self.name}: packed documents see each other in {type(self.model).__name__} with "
                    f"--model.{self.name}.attention {self.model.config._attn_implementation}; use sdpa or eager, or, "
                    "if it is one of these already (layers with a recurrent state), another family, e.g. llama"
                )
        own_code.require_positions(self)
        self.train(training)
        return off

    def _check_head(self) -> float:
        weight = self.head.weight
        ids_BT = (torch.arange(8, device=weight.device) * 7919 % weight.shape[0])[None]
        positions_BT = torch.arange(8, device=weight.device)[None]
        own_NV = self.model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits[0].float()
        ours_NV = nn.functional.linear(*self(ids_BT, positions_BT)).float()
        off = (own_NV[:, : self.num_ids] - ours_NV).abs().max()
        if not own_NV.isfinite().all():
            raise ConfigError(
                f"--model.{self.name}.path: the {self.name}'s logits are not finite: its weights are damaged, or too "
                f"large for --model.{self.name}.dtype {str(weight.dtype).removeprefix('torch.')}"
            )
        # Either side rounds a logit up to twice in the model's dtype, by half an eps each time: together, 0.9 eps as
        # measured. In fp32, the order of the products' sums matters more: 4.7 eps as measured.
        allowed = 4 * torch.finfo(weight.dtype).eps + 32 * torch.finfo(torch.float32).eps
        if not off <= allowed * own_NV.abs().max():
            raise ConfigError(
                f"--model.{self.name}: hidden states times head differ from {type(self.model).__name__}'s own logits "
                f"by {off:.3g}; this family transforms its logits in a way the head loss does not know"
            )
        return float(off)

    def sees(self, changed: list[int], kept: list[int]) -> bool:
        """Whether other ids at the places `changed` of a row change hidden states at the places `kept`; places 4 to 7
        are its second document.

        Two rows, as some kernels treat a single row differently.
        """
        before_BTD, after_BTD = (self.hidden(ids).unflatten(0, (2, 8)) for ids in ([], changed))
        off = (after_BTD - before_BTD)[:, kept].abs().max()
        # experts multiply tokens in groups: another token in the group changes a result by a few fp32 roundings
        return not off <= 32 * torch.finfo(torch.float32).eps * before_BTD.abs().max()  # True for NaN, too

    def hidden(self, changed: list[int] | None = None) -> Tensor:
        """Hidden states (16 x D) of two rows of eight tokens, two documents each; the ids at `changed` are 0."""
        device = self.head.weight.device
        positions_BT = torch.tensor([[0, 1, 2, 3] * 2] * 2, device=device)
        ids_BT = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [2, 3, 4, 5, 6, 7, 8, 9]], device=device)
        ids_BT[:, changed or []] = 0
        return self(ids_BT, positions_BT)[0]


def logit_scale(config: PreTrainedConfig, name: str) -> float:
    """The factor between hidden x head and the model's logits. Raises ConfigError for a soft cap of the logits."""
    config = config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        raise ConfigError(
            f"--model.{name}: {config.model_type} caps its logits softly (final_logit_softcapping {cap}), which the "
            f"head loss does not compute; choose another model, or for fresh weights set "
            f"--model.{name}.config.final_logit_softcapping null"
        )
    if (scale := getattr(config, "logit_scale", None)) is not None:  # cohere multiplies
        return float(scale)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # granite divides
        return 1.0 / float(divisor)
    return 1.0


def build(spec: ModelSpec, name: str, data: Any, dtype: torch.dtype, device: torch.device, seed: int = 0) -> CausalLM:
    """The model of a spec on a device, checked to fit the head loss; sizes of a fresh one follow from the data.

    On the meta device it has no weights; it is checked where it gets them.
    """
    empty = device.type == "meta"
    if spec.path is not None:
        model = load_pretrained(spec, name, dtype, empty)
    else:
        with device if empty else nullcontext():
            model = build_fresh(spec, data, seed)
    lm = CausalLM(own_code.with_computed(model) if empty else model, name)
    if not empty:
        lm.to(device).check()
    return lm


def build_empty(spec: ModelSpec, data: Any) -> CausalLM:
    """The fresh student without weights. If the tokenizer is not trained yet, its planned size is used."""
    try:
        config = fresh_config(spec, data)
    except ConfigError:
        if data.tokenizer_name != "train" or data._train is not None:
            raise
        sizes = {"vocab_size": padded_vocab(data.trained_vocab_size), "max_position_embeddings": data.block_size}
        config = fresh_config(replace(spec, config={**sizes, **spec.config}), None)
    with torch.device("meta"), as_config_error("--model.student.config"):
        model = from_config(config, dtype=spec.dtype_or(torch.float32), attn_implementation=spec.attention)
    return CausalLM(model, "student")


def build_fresh(spec: ModelSpec, data: Any, seed: int) -> PreTrainedModel:
    """A model with random weights that depend on nothing but the spec, the data's sizes and the seed.

    `data` (None if the config is complete) has vocab_size, block_size and tokenizer, like SALTDataModule.
    """
    config = fresh_config(spec, data)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), as_config_error("--model.student.config"):
        torch.manual_seed(seed)
        return from_config(config, dtype=spec.dtype_or(torch.float32), attn_implementation=spec.attention)


def load_pretrained(spec: ModelSpec, name: str, dtype: torch.dtype, empty: bool = False) -> PreTrainedModel:
    """The model at `spec.path`: our checkpoint, a Hugging Face folder or a hub name.

    Runs no remote code unless the spec allows it. `empty`: without weights, on the meta device.
    """
    assert spec.path is not None
    if spec.is_checkpoint:
        return _load_checkpoint(spec, name, dtype, empty)
    config = read_config(spec, name)
    kwargs: dict[str, Any] = {"dtype": dtype, "attn_implementation": spec.attention}
    with loading(spec, name):
        if empty and getattr(config, "quantization_config", None) is None:  # only its own loader makes packed weights
            return own_code.without_weights(config, spec, **kwargs)
        # safetensors: never unpickle a .bin. Kernels are code from the hub, which transformers 5.25 fetches by default.
        kwargs |= {"use_safetensors": True, "use_kernels": False, "ignore_mismatched_sizes": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(spec.path, output_loading_info=True, **spec.source, **kwargs)
        model, found = loaded
        if name == "student" and (method := quantized.method(model)):
            raise ConfigError(
                f"--model.student.path {spec.path}: its weights are quantized ({method}) and cannot be trained; give "
                "the model in full precision (bitsandbytes: model.dequantize() and save_pretrained() write it)"
            )
        wrong = [f"{key} is {tuple(was)}, not {tuple(wanted)}" for key, was, wanted in sorted(found["mismatched_keys"])]
        if wrong:
            raise ConfigError(
                f"--model.{name}.path {spec.path} has {len(wrong)} weights with other sizes than its config.json says: "
                f"{few(wrong)}; do they belong together?"
            )
        if sizes := wrong_sizes(model.config.to_dict(), model.config):
            said = ", ".join(f"{size} {value}" for size, value in sizes.items())
            raise ConfigError(f"--model.{name}.path {spec.path}: its config.json says {said}; it must be 1 or more")
        # transformers would leave them at their random initial values
        if missing := sorted({*found["missing_keys"], *own_code.unread(model)}):
            why = "is the download complete, and does config.json belong to it?"
            if wrapped := sorted(key for key in found["unexpected_keys"] if key.startswith(_WRAPPERS)):
                why = f"it has {few(wrapped)}: save it again without what wraps it (torch.compile, DDP, FSDP, PEFT)"
            raise ConfigError(
                f"--model.{name}.path {spec.path} lacks {len(missing)} of its weights: {few(missing)}; {why}"
            )
        if unused := sorted(found["unexpected_keys"]):
            used = {re.sub(r"\d+", "N", key) for key in model.state_dict()}
            if layers := [key for key in unused if re.sub(r"\d+", "N", key) in used]:
                raise ConfigError(
                    f"--model.{name}.path {spec.path} has weights for more layers than its config.json says: "
                    f"{few(layers)}; do they belong together?"
                )
            rank_zero_info(f"{name}: {spec.path} has {len(unused)} weights that its config.json ignores: {few(unused)}")
        quantized.freeze_as_made(model)
        folders.keep_stops(model)
        return own_code.with_computed(model)


def loading(spec: ModelSpec, name: str) -> AbstractContextManager[None]:
    where = "" if Path(str(spec.path)).exists() else " (no such folder here, so it was looked for on the hub)"
    return as_config_error(f"--model.{name}.path {spec.path} cannot be loaded{where}{own_code.hint(spec)}")


def read_config(spec: ModelSpec, name: str) -> PreTrainedConfig:
    """The config of the model at `spec.path`, without its weights."""
    check_path(spec, name)
    if spec.is_checkpoint:
        setting = f"--model.{name}.path"
        saved = of_checkpoint(read_checkpoint(str(spec.path), setting), f"{setting} {spec.path}")
        with loading(spec, name):
            return AutoConfig.for_model(saved.family, **saved.config)
    with loading(spec, name):
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(spec.path), **spec.source)
        return config


def check_path(spec: ModelSpec, name: str, trains: bool = False) -> None:
    """Raises ConfigError unless `spec.path` is a checkpoint, or a folder or hub name of a causal language model.

    `trains`: its checkpoints must do without code of its own.
    """
    setting, trusted = f"--model.{name}.path", spec.trust_remote_code and not trains
    if spec.revision and (spec.path is None or Path(spec.path).exists()):
        other = f"leave it out for the local {setting} {spec.path}" if spec.path else f"give one as {setting}"
        raise ConfigError(f"--model.{name}.revision {spec.revision} is for hub names; {other}")
    if spec.path is None:
        return
    path = Path(spec.path)
    if path.is_file() and not spec.is_checkpoint:
        raise ConfigError(
            f"{setting} {path} is a file; give the folder with its config.json, or a .ckpt of this project; load other "
            "weights into a model of transformers and call its save_pretrained"
        )
    if spec.is_checkpoint or (spec.is_local and not path.is_dir()):
        if not path.exists():
            raise ConfigError(
                f"{setting} {spec.path} does not exist; give a .ckpt of this project, a Hugging Face folder or a hub "
                "name such as owner/name"
            )
    elif path.is_dir():
        folders.check(path, setting, trusted)
    else:
        with loading(spec, name):
            folders.check_hub(spec.path, setting, spec.revision or "main", trusted)
    if trains and spec.trust_remote_code:  # its own code would train, and that of transformers would load what it wrote
        raise ConfigError(
            "--model.student.trust_remote_code true: checkpoints hold no code, and transformers has its own for this "
            "model; leave it out"
        )


def read_checkpoint(path: str, setting: str) -> dict[str, Any]:
    """Reads a checkpoint of this project, file or folder, as plain data and tensors, without unpickling.

    What is not used stays on disk: a file is mapped, and a folder's `state_dict` reads each tensor on access.

    Raises:
        ConfigError: it is missing, cut off, lacks a file, or is not a checkpoint; the message starts with `setting`.
    """
    remedy = "give one of RUN/checkpoints/step-*.ckpt"
    if setting == "--ckpt_path":
        remedy += ", or last, which finds the newest whole one"
    if not Path(path).exists():
        raise ConfigError(f"{setting} {path} does not exist; {remedy}")
    if Path(path).is_dir() and any(Path(path).glob("checkpoints/*.ckpt")):
        raise ConfigError(f"{setting} {path} is the folder of a run; give one of {path}/checkpoints/step-*.ckpt")
    try:
        return shards.load(Path(path))
    except shards.DamageError as error:
        raise ConfigError(f"{setting} {path} is not a whole checkpoint of this project ({error}); {remedy}") from error


def require_undamaged(path: str, setting: str) -> None:
    """Raises ConfigError unless every byte of a checkpoint is as it was written."""
    if reason := damage.of(Path(path)):
        raise ConfigError(f"{setting} {path} is damaged ({reason}); use another one")


def _load_checkpoint(spec: ModelSpec, name: str, dtype: torch.dtype, empty: bool) -> PreTrainedModel:
    """The student of one of our checkpoints."""
    config, checkpoint = read_config(spec, name), read_checkpoint(str(spec.path), f"--model.{name}.path")
    with torch.device("meta") if empty else no_init_weights():  # drawing them takes longer than reading the file
        model = from_config(config, dtype=dtype, attn_implementation=spec.attention)
    model.tie_weights()  # skipped along with drawing them
    if not empty:
        require_undamaged(str(spec.path), f"--model.{name}.path")
        state = checkpoint["state_dict"]
        weights = {name.removeprefix(shards.STUDENT): state[name] for name in state if name.startswith(shards.STUDENT)}
        with as_config_error(f"--model.{name}.path {spec.path} contains another model than its settings say"):
            model.load_state_dict(weights)
    return model
