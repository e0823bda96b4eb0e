"""What loading makes of a model: weights that are quantized by bitsandbytes, torchao or another of transformers'
quantizers. The frozen teacher may have them. They are packed, so only their own layers know what is in them."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel


def method(model: PreTrainedModel) -> str | None:
    """What has quantized the model's weights, e.g. bitsandbytes; None if they are as its config makes them."""
    if not getattr(model, "is_quantized", False):  # also if transformers has dequantized them in loading
        return None
    name = model.quantization_method
    return str(getattr(name, "value", name))


def stored(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors of this process that a tensor consists of: itself, a DTensor's shard, or e.g. the integers and
    the scales of torchao's."""
    if isinstance(tensor, DTensor):
        yield from stored(tensor.to_local())
    elif is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from stored(getattr(tensor, name))
    else:
        yield tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers in it are, as far as torch can tell: it cannot for the small types of quantized models."""
    parts = (part for part in stored(tensor) if part.is_floating_point() and part.element_size() > 1 and part.numel())
    ends = (part.aminmax() for part in parts)  # takes no memory, and is NaN if a value is
    return all(bool(low.isfinite() & high.isfinite()) for low, high in ends)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """What the tensors take in this process."""
    return sum(part.nbytes for tensor in tensors for part in stored(tensor))


def as_made(model: PreTrainedModel) -> PreTrainedModel:
    """The model as its config makes it, without weights (on the meta device) and never quantized."""
    with torch.device("meta"):
        return type(model)(model.config)


def unpacked(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, or `as_made` if its weights are quantized: to count parameters, of which packed ones have another
    number."""
    return as_made(model) if method(model) else model


def freeze_as_made(model: PreTrainedModel) -> None:
    """Freezes again what a family does not train, e.g. router biases: loading made all weights trainable except
    integers."""
    frozen = {name for name, p in as_made(model).named_parameters() if not p.requires_grad}
    for name, p in model.named_parameters():
        if name in frozen:
            p.requires_grad_(False)
