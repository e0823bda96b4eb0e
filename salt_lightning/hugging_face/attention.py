"""Attention within packed documents, without a mask: torch's variable-length flash attention on CUDA.

transformers keeps documents apart by a mask of T x T entries per row, which no flash kernel accepts; in compiled models
it builds one even for a single document. Here a micro-batch is one sequence of tokens, plus the places where documents
begin (flash attention's `cu_seqlens`); without these, transformers' sdpa is used. A layer with a sliding window passes
its length; `_layers` finds the families whose layers do not.

Shapes: B rows, T tokens per row, H heads, K heads of keys and values, E width of a head, S documents.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from salt_lightning.errors import ConfigError, first_line, is_out_of_memory

# What keeps packed documents apart: transformers, by the positions; our mask; this file.
Apart = Literal["positions", "mask", "packed"]
PACKED = "packed"  # as transformers' attn_implementation
_FLEX = "flex_attention"  # transformers' name for it
_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 does not
_WITH_KERNEL: tuple[str, ...] = ("cuda",)
_16_BIT = (torch.bfloat16, torch.float16)
_WIDEST = 256  # widest head that the kernel takes
_PROVED = 70  # longest window that `fault` tries: one key more or less shows, and the kernel skips whole blocks


def packed_attention(  # noqa: PLR0913 - transformers' signature
    module: nn.Module,
    query_BHTE: Tensor,
    key_BKTE: Tensor,
    value_BKTE: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers' AttentionInterface; returns B x T x H x E. A token attends to its own
    document up to itself, and to the last `sliding_window` tokens at most, including itself.

    Raises:
        ValueError: the model asks for something that is not supported here.
    """
    if cu_seq_lens_q is None:  # generation, with a cache, or documents kept apart by a mask
        _refuse_unknown(kwargs, "; leave --model.student.attention and --model.teacher.attention out")
        return sdpa_attention_forward(
            module, query_BHTE, key_BKTE, value_BKTE, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _refuse_unknown(kwargs)
    if query_BHTE.shape[-1] != value_BKTE.shape[-1]:
        raise ValueError("values and queries differ in width")
    kind = query_BHTE.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query_BHTE.dtype
    if kind in _WITH_KERNEL and dtype in _16_BIT and not dropout:
        return _flash((query_BHTE, key_BKTE, value_BKTE), cu_seq_lens_q, dtype, scaling, sliding_window), None
    mask_B1TT = _mask(cu_seq_lens_q, len(query_BHTE), query_BHTE.shape[2], sliding_window)
    return sdpa_attention_forward(module, query_BHTE, key_BKTE, value_BKTE, mask_B1TT, dropout=dropout, scaling=scaling)


def _refuse_unknown(kwargs: dict[str, Any], remedy: str = "") -> None:
    """Raises ValueError for what sdpa, too, would leave out without a word."""
    if wanted := [name for name in _NOT_COMPUTED if kwargs.get(name) is not None]:
        raise ValueError(f"packed attention does not support {', '.join(wanted)}{remedy}")


_NOT_COMPUTED = ("softcap", "s_aux", "position_bias", "head_mask")
AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def _flash(
    inputs: Sequence[Tensor], cu_seqlens: Tensor, dtype: torch.dtype, scale: float | None, window: int | None
) -> Tensor:
    query_BHTE, key_BKTE, value_BKTE = inputs
    rows, heads, width = query_BHTE.shape[:3]
    more: dict[str, Any] = {}
    if key_BKTE.shape[1] != heads and _TAKES_GROUPS:
        more["enable_gqa"] = True
    elif key_BKTE.shape[1] != heads:
        key_BKTE, value_BKTE = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key_BKTE, value_BKTE))
    query_NHE, key_NKE, value_NKE = (
        x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query_BHTE, key_BKTE, value_BKTE)
    )
    # the kernel's window does not count the token itself; a window as long as a row has no effect
    more["window_size"] = (-1 if window is None or window >= width else window - 1, 0)
    attended_NHE: Any = varlen_attn(
        query_NHE, key_NKE, value_NKE, cu_seqlens, cu_seqlens, width, width, scale=scale, **more
    )
    return attended_NHE.unflatten(0, (rows, width))


@contextmanager
def on_fake_tensors() -> Iterator[None]:
    """Uses the GPU kernel for fake tensors, which are on the CPU: it allocates memory and computes nothing."""
    global _WITH_KERNEL
    before, _WITH_KERNEL = _WITH_KERNEL, ("cuda", "cpu")
    try:
        yield
    finally:
        _WITH_KERNEL = before


def _mask(cu_seqlens: Tensor, rows: int, width: int, window: int | None = None) -> Tensor:
    places_N = torch.arange(rows * width, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return _same_document(torch.bucketize(places_N, cu_seqlens, right=True).view(rows, width), window)


def _same_document(document_BT: Tensor, window: int | None) -> Tensor:
    allowed_BTT = (document_BT[:, :, None] == document_BT[:, None, :]).tril()
    return (allowed_BTT if window is None else allowed_BTT.triu(1 - window))[:, None]


@lru_cache
@torch.inference_mode(False)  # predict runs in inference mode, which has no gradients
@torch.enable_grad()
def fault(device: torch.device, heads: int, key_heads: int, head_width: int, window: int | None = None) -> str | None:
    """Why the kernel cannot be used on a device, found by running it forward and backward; None if it can."""
    generator = torch.Generator().manual_seed(0)
    query, key = (2, heads, 320, head_width), (2, key_heads, 320, head_width)
    sizes = (query, key, key)
    inputs = [torch.randn(size, generator=generator, device="cpu").to(device, torch.bfloat16) for size in sizes]
    ends = [1, 8, 300, 320, 610, *[640] * 3]  # documents: one token, across the kernel's blocks, empty ones at the end
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=device)
    try:
        with torch.autocast(device.type, enabled=False):
            ours = _with_gradients(lambda q, k, v: _flash((q, k, v), cu_seqlens, torch.bfloat16, None, window), inputs)
            mask_B1TT = _mask(cu_seqlens, 2, 320, window)
            masked = partial(scaled_dot_product_attention, attn_mask=mask_B1TT, enable_gqa=True)
            true = _with_gradients(lambda q, k, v: masked(q, k, v).transpose(1, 2), [x.float() for x in inputs])
    except Exception as error:
        if is_out_of_memory(error):  # says nothing about the kernel
            raise
        return f"{type(error).__name__}: {first_line(error)[:200]}"
    # bf16 rounds a few times by 2^-9; a wrong border or scale changes values by their own size.
    for name, a, b in zip(("output", "query", "key", "value"), ours, true, strict=True):
        if not (a.float() - b).abs().max() <= 0.04 * b.abs().max():
            return f"wrong values ({name})"
    return None


def _with_gradients(attend: Any, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


def document_mask(positions_BT: Tensor, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """The mask [B, 1, T, T] by which a token attends to its own document up to itself, and to the last `window` tokens
    at most, including itself. Boolean, or additive with 0 and the dtype's lowest value."""
    allowed_B1TT = _same_document((positions_BT == 0).cumsum(1), window)
    if dtype == torch.bool:
        return allowed_B1TT
    return torch.zeros_like(allowed_B1TT, dtype=dtype).masked_fill_(~allowed_B1TT, torch.finfo(dtype).min)


@torch.no_grad()
def pack(lm: Any, asked: str | None, strategy: Strategy | None) -> None:
    """Switches a models.CausalLM to packed attention if its spec has `asked` for that, or if it is faster with this
    strategy's device and precision; logs which attention it has. Does nothing on the meta device."""
    training, device = lm.training, None
    if (
        strategy is not None
        and strategy.root_device.type in _WITH_KERNEL
        and "16" in strategy.precision_plugin.precision
    ):
        device = strategy.root_device  # the kernel computes only in 16 bits
    if _may_pack(lm, asked) and (asked or device) and lm.head.weight.device.type != "meta":
        reason = _hindrance(lm.model.config.get_text_config(), training) or _change_over(lm.eval(), device)
        rank_zero_info(f"{lm.name}: attention {_said(reason)}")
        lm.train(training)


def require_gpu(asked: str | None, device: str) -> None:
    """Raises ConfigError if a student is to be trained on a type of device that its attention does not work on."""
    if asked == _FLEX and device == "cpu":
        raise ConfigError(f"--model.student.attention {asked} cannot be trained on a CPU; use sdpa, or a GPU")


@contextmanager
def testable(lm: Any) -> Iterator[None]:
    """Flex attention's kernels for CPUs take a minute to compile, so a models.CausalLM is tested there without."""
    if lm.attention != _FLEX or lm.head.weight.device.type != "cpu":
        yield
        return
    lm.attention = "eager"
    lm.keep_apart(lm.apart)
    try:
        yield
    finally:
        lm.attention = _FLEX
        lm.keep_apart(lm.apart)


@torch.no_grad()
def foresee(lm: Any, asked: str | None, training: bool) -> tuple[Apart, str] | None:
    """What `pack` will do and log on a GPU in 16 bits, as far as a model on a CPU can tell; None if it does nothing.

    If this machine has a GPU, its kernel is tried.
    """
    if not _may_pack(lm, asked):
        return None
    before, device = lm.apart, torch.device("cuda") if torch.cuda.is_available() else None
    reason = _hindrance(lm.model.config.get_text_config(), training) or _change_over(lm.eval(), device)
    lm.keep_apart(before)
    return before if reason else "packed", _said(reason)


def _may_pack(lm: Any, asked: str | None) -> bool:
    """Whether packed attention is requested, or may replace sdpa because nothing is requested."""
    return asked == PACKED or (asked is None and lm.model.config._attn_implementation == "sdpa")


def _said(reason: str | None) -> str:
    return f"with a mask, which is slower: {reason}" if reason else "within each document, without a mask"


def _hindrance(config: Any, training: bool) -> str | None:
    """Why a model with these settings cannot have packed attention; None if no reason is found."""
    if training and (rate := getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0)):
        return f"{config.model_type}'s config sets {rate:.0%} attention dropout"
    if layer_kinds(config) - {"full_attention", "sliding_attention"} or getattr(config, "attention_chunk_size", None):
        return f"{config.model_type} has layers that look back over a limited distance"
    return None


def layer_kinds(config: Any) -> set[str]:
    """The kinds of layers that a model's settings name, if any."""
    return {*(getattr(config, "layer_types", None) or ())}


def limited_distance(config: Any) -> bool:
    """Whether, according to the settings, some layers do not look back over the whole document."""
    return any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))


def _change_over(lm: Any, device: torch.device | None = None) -> str | None:
    """Switches to packed attention. If the device's kernel is wrong, or hidden states change, switches back and returns
    the reason."""
    before, hidden = lm.apart, lm.hidden()
    try:
        layers = _layers(lm)
        reason = next((why for layer in layers if device and (why := fault(device, *layer))), None)
        if reason is None:
            lm.keep_apart(PACKED)
            off, near = (lm.hidden() - hidden).abs().max(), 32 * torch.finfo(hidden.dtype).eps * hidden.abs().max()
            if off <= near and not lm.sees([0, 1, 2, 3], [4, 5, 6, 7]):
                return None
            reason = f"{type(lm.model).__name__} computes something other than packed attention"
    except (ValueError, TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error)
    lm.keep_apart(before)
    return reason


def _layers(lm: Any) -> list[tuple[int, int, int, int | None]]:
    """What `fault` must check for a model's layers, read from their masks: heads, heads of keys, width, window.

    Runs rows of two documents of four tokens with every window cut to two: a longer one would not show in a mask.

    Raises:
        ValueError: a mask is not that of the documents and the window that the layer passes, or the kernel does not
            take heads of this width.
    """
    parts: Any = {id(x): x for m in lm.modules() for x in (m, getattr(m, "config", None))}.values()
    windows = [(part, part.sliding_window) for part in parts if getattr(part, "sliding_window", None)]
    if len(lengths := {window for _, window in windows}) > 1:
        raise ValueError(f"{type(lm.model).__name__} has windows of several lengths")
    seen = {}

    def follow(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        _refuse_unknown(kwargs)
        window = kwargs.pop("sliding_window", None)
        if window not in (None, 2) or not _is_mask(attention_mask, query, window):
            raise ValueError(f"{type(lm.model).__name__} has other masks than its documents and windows give")
        if query.shape[-1] > _WIDEST:
            raise ValueError(f"heads are {query.shape[-1]} wide, and the kernel takes at most {_WIDEST}")
        seen[query.shape[1], key.shape[1], query.shape[3], min(_PROVED, *lengths) if window else None] = True
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(PACKED, follow)
    try:
        for part, _ in windows:
            part.sliding_window = 2
        lm.model.set_attn_implementation(PACKED)
        lm.hidden()
    finally:
        AttentionInterface.register(PACKED, packed_attention)
        for part, window in windows:
            part.sliding_window = window
        lm.keep_apart(lm.apart)
    return list(seen)


def _is_mask(mask: Tensor | None, query_BHTE: Tensor, window: int | None) -> bool:
    """Whether a mask is that of rows with documents of four tokens."""
    rows, width = len(query_BHTE), query_BHTE.shape[2]
    true_B1TT = _mask(torch.arange(0, rows * width + 1, 4, device=query_BHTE.device), rows, width, window)
    return mask is not None and torch.equal(mask, true_B1TT)
