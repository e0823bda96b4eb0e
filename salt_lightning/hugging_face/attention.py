"""Attention within packed documents, without a mask: torch's variable-length flash attention on CUDA.

transformers keeps documents apart by a mask of T x T entries a row, which no flash kernel takes, and in compiled models
it makes one even where there is a single document. Here a micro-batch is one sequence of tokens with the places where
documents begin (`cu_seqlens`, as flash attention calls them); whoever passes none has transformers' sdpa. A layer that
looks back over a window of tokens hands its length over; `_layers` finds the families whose layers do not.

Shapes: B rows, T tokens a row, H heads, K heads of keys and values, E width of a head, S documents.
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

from salt_lightning.errors import is_out_of_memory

# What keeps packed documents apart: transformers, which finds them in the positions; our mask; this file.
Apart = Literal["positions", "mask", "packed"]
PACKED = "packed"  # as transformers' attn_implementation
_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 does not
_WITH_KERNEL: tuple[str, ...] = ("cuda",)
_16_BIT = (torch.bfloat16, torch.float16)
_WIDEST = 256  # head of the kernel
_PROVED = 70  # longest window that `fault` tries: a key more or less shows, and the kernel leaves out whole blocks


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
    """transformers' AttentionInterface: B x T x H x E. A token attends to its own document up to itself, and no further
    back than `sliding_window` tokens with itself.

    Raises:
        ValueError: the model wants something that is not computed here.
    """
    if cu_seq_lens_q is None:  # generation, with a cache
        return sdpa_attention_forward(
            module, query_BHTE, key_BKTE, value_BKTE, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _refuse_unknown(kwargs)
    if query_BHTE.shape[-1] != value_BKTE.shape[-1]:
        raise ValueError("values are not as wide as queries")
    kind = query_BHTE.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query_BHTE.dtype
    if kind in _WITH_KERNEL and dtype in _16_BIT and not dropout:
        return _flash((query_BHTE, key_BKTE, value_BKTE), cu_seq_lens_q, dtype, scaling, sliding_window), None
    mask_B1TT = _mask(cu_seq_lens_q, len(query_BHTE), query_BHTE.shape[2], sliding_window)
    return sdpa_attention_forward(module, query_BHTE, key_BKTE, value_BKTE, mask_B1TT, dropout=dropout, scaling=scaling)


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    if wanted := [name for name in _NOT_COMPUTED if kwargs.get(name) is not None]:
        raise ValueError(f"packed attention knows no {', '.join(wanted)}")


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
    # the kernel counts the keys before a token's own; a window that no document of a row fills is none
    more["window_size"] = (-1 if window is None or window >= width else window - 1, 0)
    attended_NHE: Any = varlen_attn(
        query_NHE, key_NKE, value_NKE, cu_seqlens, cu_seqlens, width, width, scale=scale, **more
    )
    return attended_NHE.unflatten(0, (rows, width))


@contextmanager
def on_fake_tensors() -> Iterator[None]:
    """Tensors without data, which are a CPU's, have the kernel of a GPU: it takes its memory and computes nothing."""
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
@torch.inference_mode(False)  # in which a predict is; it has no gradients
@torch.enable_grad()
def fault(device: torch.device, heads: int, key_heads: int, head_width: int, window: int | None = None) -> str | None:
    """Why the kernel cannot be used on a device, found by running it there, forward and backward; None if it can."""
    generator = torch.Generator().manual_seed(0)
    query, key = (2, heads, 320, head_width), (2, key_heads, 320, head_width)
    sizes = (query, key, key)
    inputs = [torch.randn(size, generator=generator, device="cpu").to(device, torch.bfloat16) for size in sizes]
    ends = [1, 8, 300, 320, 610, *[640] * 3]  # of documents: one token, across the kernel's blocks, empty ones behind
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=device)
    try:
        with torch.autocast(device.type, enabled=False):
            ours = _with_gradients(lambda q, k, v: _flash((q, k, v), cu_seqlens, torch.bfloat16, None, window), inputs)
            mask_B1TT = _mask(cu_seqlens, 2, 320, window)
            masked = partial(scaled_dot_product_attention, attn_mask=mask_B1TT, enable_gqa=True)
            true = _with_gradients(lambda q, k, v: masked(q, k, v).transpose(1, 2), [x.float() for x in inputs])
    except Exception as error:
        if is_out_of_memory(error):  # tells nothing of the kernel
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    # bf16 rounds a few times by 2^-9; a border or a scale that is wrong moves values by their own size.
    for name, a, b in zip(("output", "query", "key", "value"), ours, true, strict=True):
        if not (a.float() - b).abs().max() <= 0.04 * b.abs().max():
            return f"wrong values ({name})"
    return None


def _with_gradients(attend: Any, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


def document_mask(positions_BT: Tensor, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """[B, 1, T, T]: a token attends to its own document up to itself, and no further back than `window` tokens with
    itself. Boolean, or 0 / lowest to be added."""
    allowed_B1TT = _same_document((positions_BT == 0).cumsum(1), window)
    if dtype == torch.bool:
        return allowed_B1TT
    return torch.zeros_like(allowed_B1TT, dtype=dtype).masked_fill_(~allowed_B1TT, torch.finfo(dtype).min)


@torch.no_grad()
def pack(lm: Any, asked: str | None, strategy: Strategy | None) -> None:
    """Change a models.CausalLM over to packed attention if that is asked for, or faster; says which it is.

    Args:
        lm: where it has its weights; on the meta device nothing is done.
        asked: the attention of the model's spec.
        strategy: where and in which precision the model will run.
    """
    training, device = lm.training, None
    if (
        strategy is not None
        and strategy.root_device.type in _WITH_KERNEL
        and "16" in strategy.precision_plugin.precision
    ):
        device = strategy.root_device  # its kernel computes in 16 bits alone
    if _may_pack(lm, asked) and (asked or device) and lm.head.weight.device.type != "meta":
        reason = _hindrance(lm.model.config.get_text_config(), training) or _change_over(lm.eval(), device)
        rank_zero_info(f"{lm.name}: attention {_said(reason)}")
        lm.train(training)


@torch.no_grad()
def foresee(lm: Any, asked: str | None, training: bool) -> tuple[Apart, str] | None:
    """What `pack` will do on a GPU in 16 bits, and say, of a model that is on a CPU now, as far as that can tell; None:
    nothing.

    A kernel that this machine's own GPU has is tried.
    """
    if not _may_pack(lm, asked):
        return None
    before, device = lm.apart, torch.device("cuda") if torch.cuda.is_available() else None
    reason = _hindrance(lm.model.config.get_text_config(), training) or _change_over(lm.eval(), device)
    lm.keep_apart(before)
    return before if reason else "packed", _said(reason)


def _may_pack(lm: Any, asked: str | None) -> bool:
    """Packed attention is asked for, or nothing is, and it would stand in for sdpa."""
    return asked == PACKED or (asked is None and lm.model.config._attn_implementation == "sdpa")


def _said(reason: str | None) -> str:
    return f"with a mask, which is slower: {reason}" if reason else "within each document alone, without a mask"


def _hindrance(config: Any, training: bool) -> str | None:
    """Why a model of these settings cannot have packed attention; None: none is seen."""
    if training and (rate := getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0)):
        return f"{config.model_type}'s config drops {rate:.0%} of the attention"
    if layer_kinds(config) - {"full_attention", "sliding_attention"} or getattr(config, "attention_chunk_size", None):
        return f"{config.model_type} has layers that look back over a limited distance"
    return None


def layer_kinds(config: Any) -> set[str]:
    """The kinds of layers that a model's settings name; none where they name none."""
    return {*(getattr(config, "layer_types", None) or ())}


def limited_distance(config: Any) -> bool:
    """Whether some layers of the model do not look back over the whole document, as far as its settings say."""
    return any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))


def _change_over(lm: Any, device: torch.device | None = None) -> str | None:
    """Changes over, where a device's kernel is right; back again, with the reason, where it is not, or hidden states
    are not what they were."""
    before, hidden = lm.apart, lm.hidden()
    try:
        layers = _layers(lm)
        reason = next((why for layer in layers if device and (why := fault(device, *layer))), None)
        if reason is None:
            lm.keep_apart(PACKED)
            off, near = (lm.hidden() - hidden).abs().max(), 32 * torch.finfo(hidden.dtype).eps * hidden.abs().max()
            if off <= near and not lm.sees([0, 1, 2, 3], [4, 5, 6, 7]):
                return None
            reason = f"{type(lm.model).__name__} computes something else than packed attention"
    except (ValueError, TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error)
    lm.keep_apart(before)
    return reason


def _layers(lm: Any) -> list[tuple[int, int, int, int | None]]:
    """What `fault` is to prove for the layers of a model, as its masks have it: heads, heads of keys, width, window.

    Two documents of four tokens a row go through with every window cut to two: a longer one would show in no mask.

    Raises:
        ValueError: a mask is not the layer's documents and the window that it hands over, or the kernel takes no such
            heads.
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
            raise ValueError(f"{type(lm.model).__name__} has other masks than its documents and windows make")
        if query.shape[-1] > _WIDEST:
            raise ValueError(f"heads are {query.shape[-1]} wide, and the kernel takes {_WIDEST}")
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
    """Whether a mask is that of rows of documents of four tokens."""
    rows, width = len(query_BHTE), query_BHTE.shape[2]
    true_B1TT = _mask(torch.arange(0, rows * width + 1, 4, device=query_BHTE.device), rows, width, window)
    return mask is not None and torch.equal(mask, true_B1TT)
