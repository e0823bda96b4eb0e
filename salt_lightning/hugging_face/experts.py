"""Layers of experts, under autocast and on fake tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.integrations import moe


def follow_autocast(model: PreTrainedModel) -> None:
    """Makes the experts of a transformers model compute in autocast's dtype, in place.

    Autocast does not know their grouped products: in bf16-mixed these would use the fp32 weights, at a fraction of the
    speed, while a loop over experts and every other layer compute in bf16.
    """
    for module in model.modules():
        if _is_experts(module):
            module.forward = partial(_in_autocast, module, module.forward)


def count_layers(model: nn.Module) -> int:
    """The number of layers with experts."""
    return sum(map(_is_experts, model.modules()))


def _is_experts(module: nn.Module) -> bool:
    return hasattr(module, "num_experts") and any(p.ndim == 3 for p in module.parameters(recurse=False))


def _in_autocast(module: nn.Module, forward: Callable[..., Any], hidden_ND: Tensor, *args: Any, **kwargs: Any) -> Any:
    device = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    weights = dict(module.named_parameters(recurse=False))
    if dtype is None or all(p.dtype == dtype for p in weights.values()):  # also when called again from below
        return forward(hidden_ND, *args, **kwargs)
    cast = {name: p.to(dtype) for name, p in weights.items()}
    return functional_call(module, cast, (hidden_ND.to(dtype), *args), kwargs)


@contextmanager
def on_fake_tensors() -> Iterator[None]:
    """Grouped products that allocate memory and compute nothing; those of torch and transformers read data."""
    original = moe._grouped_mm
    moe._grouped_mm = _no_grouped_mm
    try:
        yield
    finally:
        moe._grouped_mm = original


def _no_grouped_mm(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return _no_product(input.to(weight.dtype), weight)


# custom ops: a compiler treats them as kernels of a library
@torch.library.custom_op("salt_lightning::no_product", mutates_args=())
def _no_product(hidden_SD: Tensor, weight_EDF: Tensor) -> Tensor:
    return hidden_SD.new_empty(hidden_SD.shape[0], weight_EDF.shape[2])


@torch.library.custom_op("salt_lightning::no_product_backward", mutates_args=())
def _no_product_backward(grad_SF: Tensor, hidden_SD: Tensor, weight_EDF: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden_SD), torch.empty_like(weight_EDF)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


_no_product.register_fake(_no_product._init_fn)
_no_product_backward.register_fake(_no_product_backward._init_fn)
_no_product.register_autograd(lambda ctx, grad: _no_product_backward(grad, *ctx.saved_tensors), setup_context=_keep)
