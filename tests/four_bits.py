"""A quantizer for transformers, as bitsandbytes brings one: linear layers keep two weights in a byte and a scale per
row. `from_pretrained` finds it in any process that has imported this file."""

from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin


class Packed(nn.Parameter):
    """A weight that only its layer understands, like those of bitsandbytes."""


class Linear4(nn.Linear):
    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, like.bias is not None, device="meta")
        whole = torch.empty(like.out_features, like.in_features // 2, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.scale = nn.Parameter(torch.empty(like.out_features, 1, device="meta"), requires_grad=False)

    @property
    def unpacked(self) -> torch.Tensor:
        pairs = torch.stack([self.weight & 15, self.weight >> 4], -1).flatten(1)
        return (pairs.to(self.scale.dtype) - 8) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert type(self.weight) is Packed
        return nn.functional.linear(x, self.unpacked.to(x.dtype), self.bias)


def packed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 7
    pairs = ((weight / scale).round() + 8).to(torch.uint8)
    return pairs[:, ::2] | pairs[:, 1::2] << 4, scale


@register_quantization_config("four_bits")
class Config(QuantizationConfigMixin):
    def __init__(self, **kwargs) -> None:
        self.quant_method = "four_bits"


@register_quantizer("four_bits")
class Quantizer(HfQuantizer):
    is_trainable = False

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model, **kwargs):
        for name, linear in linears(model):
            model.set_submodule(name, Linear4(linear))

    def _process_model_after_weight_loading(self, model, **kwargs):
        for module in model.modules():
            if isinstance(module, Linear4):
                module.weight = Packed(module.weight.data, requires_grad=False)


class Registered(Callback):
    """Named in a run's settings, it makes each of its processes import this file."""


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """All but the head, as for transformers' own quantizers."""
    kinds = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [(name, module) for name, module in kinds if module is not model.get_output_embeddings()]


def quantize(source: str | Path, target: Path) -> Path:
    """Writes the model in the folder `source` with packed weights, as a hub has them."""
    model = AutoModelForCausalLM.from_pretrained(source)
    for name, linear in linears(model):
        small = Linear4(linear)
        weight, scale = packed(linear.weight.data)
        small.weight, small.scale = nn.Parameter(weight, requires_grad=False), nn.Parameter(scale, requires_grad=False)
        model.set_submodule(name, small)
    model.config.quantization_config = Config()
    model.save_pretrained(target)
    return target
