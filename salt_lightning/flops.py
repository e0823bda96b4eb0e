"""The compute meter: FLOPs of models and of training, by formula, and the peak of known cards.

One multiply-add is two FLOPs. As usual, norms, activations, softmax and embedding lookups are not counted.
Backward counts as twice the forward; a recomputed forward (activation checkpointing) is not counted.
"""

import math
import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from salt_lightning.hugging_face.quantized import unpacked

# Stacks that run several times, heads that attend twice, a window in the config that the layers do not use.
_OTHERWISE = ("hrm_text", "diffllama", "moshi")
TRAIN_OVER_FORWARD = 3  # forward, gradient of the inputs, gradient of the weights


def attention_span(block_size: int, window: int | None = None) -> float:
    """Keys that a query sees, mean over a row of `block_size` T tokens: w - w^2 / (2 T), w = min(window, T).

    Without a window this is the causal half, T / 2 (half of the diagonal counts: T^2 / 2 pairs per row).
    """
    span = min(window or block_size, block_size)
    return span - span**2 / (2 * block_size)


def forward_flops_per_token(model: PreTrainedModel, block_size: int, num_ids: int | None = None) -> float:
    """FLOPs of one token's forward, mean over a row of `block_size` tokens T.

        2 * weights that multiply + sum_layers 2 * 2 * heads * head_dim * attention_span(T, window)

    The weights are those of every `nn.Linear` and `Conv1D`, including a head that is tied to the embedding, and the
    share of a layer's experts that a token is sent to. Attention has two products, scores and values. A row counts as
    one document: what document isolation saves is not subtracted.

    `model`: not yet sharded; it may be on the meta device, or quantized. `num_ids`: rows of the head that are used, as
    in CausalLM; None: all. NaN for a model with weights or layers of other kinds (state spaces), or that uses them in
    other ways (_OTHERWISE), instead of a number that is too small.
    """
    model = unpacked(model)
    if model.config.get_text_config().model_type in _OTHERWISE:
        return math.nan
    counted: set[int] = set()
    weights = 0.0
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            weights += module.weight.numel()
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            counted.add(id(module.weight))
        else:
            of_experts = _of_experts(module)
            counted.update(map(id, of_experts))
            weights += sum(_active(module, model.config, p) for p in of_experts)
    # a single row is a vector, such as the router's bias in ernie
    if any(sum(size > 1 for size in p.shape) > 1 and id(p) not in counted for p in model.parameters()):
        return math.nan
    if num_ids is not None:
        weights -= model.get_output_embeddings().weight[num_ids:].numel()
    try:
        return 2.0 * weights + _attention_flops_per_token(model.config, block_size)
    except AttributeError:  # a family of the user's own, without attention or with other names in its config
        return math.nan


def num_parameters(model: PreTrainedModel) -> int:
    """Parameters, as many as before they were quantized."""
    return sum(p.numel() for p in unpacked(model).parameters())


def millions(count: float) -> str:
    """A number of parameters, to be read."""
    return f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count:,.0f}"


def active_parameters(model: nn.Module) -> float:
    """Parameters that one token uses: of a layer's experts, those that it is sent to. NaN if that is not known."""
    pairs = [(module, p) for module in model.modules() for p in _of_experts(module) if p.ndim > 2]
    idle = sum(p.numel() - _active(module, model.config, p) for module, p in pairs)
    return num_parameters(model) - idle


def _of_experts(module: nn.Module) -> list[nn.Parameter]:
    """The module's own weights with an entry for each expert."""
    own = module.parameters(recurse=False) if hasattr(module, "num_experts") else ()
    return [p for p in own if p.ndim > 1 and len(p) == module.num_experts]


def _active(module: nn.Module, config: object, parameter: nn.Parameter) -> float:
    """How much of a router's weight (experts, width) or of the experts' (experts, in, out) multiplies one token."""
    if parameter.ndim == 2:
        return parameter.numel() if parameter is getattr(module, "weight", None) else 0.0  # else biases
    text = config.get_text_config()  # type: ignore[attr-defined]
    used: Any = getattr(text, "num_experts_per_tok", None) or getattr(text, "top_k_experts", math.nan)  # gemma 4's name
    return parameter.numel() * used / len(parameter)


def _attention_flops_per_token(config: object, block_size: int) -> float:
    text = config.get_text_config()  # type: ignore[attr-defined]  # of the language model, if there are several
    each = list(getattr(text, "per_layer_config", ())) or [text] * text.num_hidden_layers  # gemma 4: two widths
    window = getattr(text, "sliding_window", None) or getattr(text, "window_size", None)  # gpt_neo's name
    full, sliding = attention_span(block_size), attention_span(block_size, window)
    spans = {"full_attention": full, "sliding_attention": sliding, "global": full, "local": sliding}
    layers = getattr(text, "layer_types", None) or getattr(text, "attention_layers", None)
    layers = layers or ["sliding_attention"] * len(each)  # all keys if there is no window
    return 4.0 * sum(_width(own) * spans.get(layer, math.nan) for own, layer in zip(each, layers, strict=False))


def _width(layer: Any) -> float:
    """Heads times their width (mean of scores and values)."""
    head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
    if (part := getattr(layer, "qk_nope_head_dim", None)) is not None:  # MLA: head_dim is only the rotary part
        head_dim = (part + layer.qk_rope_head_dim + layer.v_head_dim) / 2  # scores and values differ in width
    return layer.num_attention_heads * head_dim


def student_flops(forward_per_token: float, tokens: int) -> float:
    """FLOPs of training on `tokens` tokens: forward, and twice that for backward. A teacher and scoring take only the
    forward."""
    return TRAIN_OVER_FORWARD * forward_per_token * tokens


# Dense TFLOP/s from the vendors' data sheets at (bf16, fp32); None if the hardware has no such unit.
# GeForce: bf16 with fp32 accumulation, as in training. MI250X: one of its two dies, each of which is a
# device. fp32 on AMD is the matrix rate. Full names must match: a laptop, Ti, D or MIG part is another card.
_PEAK_TFLOPS: tuple[tuple[str, float | None, float], ...] = (
    (r"NVIDIA B200", 2250, 75),
    (r"NVIDIA H200", 989.4, 66.9),
    (r"NVIDIA H100 (80|96)GB HBM3", 989.4, 66.9),
    (r"NVIDIA H[12]00 NVL", 835.5, 60),
    (r"NVIDIA H100 PCIe", 756, 51.2),
    (r"(NVIDIA )?A100-(SXM4|PCIE)-[48]0GB|NVIDIA A100 80GB PCIe", 312, 19.5),
    (r"NVIDIA L40S", 362.1, 91.6),
    (r"NVIDIA L4", 121, 30.3),
    (r"NVIDIA A10G", 70, 35),
    (r"NVIDIA GeForce RTX 5090", 209.5, 104.8),
    (r"NVIDIA GeForce RTX 4090", 165.2, 82.6),
    (r"(NVIDIA )?GeForce RTX 3090", 71, 35.6),
    (r"AMD Instinct MI300X.*", 1307.4, 163.4),
    (r"AMD Instinct MI250X.*", 191.5, 47.9),
    (r"Tesla V100-SXM2-(16|32)GB.*", None, 15.7),
    (r"Tesla V100-PCIE-(16|32)GB", None, 14),
    (r"(Tesla|NVIDIA) T4", None, 8.1),
)


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """The vendor's dense peak of one device, by torch's name for it, in FLOP/s, for products in bfloat16 or float32;
    None if it is not known."""
    for name, bf16, fp32 in _PEAK_TFLOPS:
        if re.fullmatch(name, device_name.strip()):
            tflops = {torch.bfloat16: bf16, torch.float32: fp32}.get(dtype)
            return None if tflops is None else tflops * 1e12
    return None


def peak_of(device: torch.device, dtype: torch.dtype, num_devices: int) -> float | None:
    """The total peak of `num_devices` devices like this one, in FLOP/s; None if it is not known, as on CPUs."""
    if device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(device), dtype)
    return None if peak is None else peak * num_devices
