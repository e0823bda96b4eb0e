"""Validation and test metrics: sums per source, the same for any number of batches and ranks.

Shape suffixes: N token positions of a batch, S sources.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


def sum_dtype(device: torch.device) -> torch.dtype:
    """Dtype in which nats are summed: float64, except on MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


class TokenMetrics(Metric):
    """Cross-entropy, next-token accuracy and bits per byte over one or more sources, weighted by token.

        ce            = sum_i nll_i / tokens                     nats a token
        accuracy      = |{i: rank_i = 0}| / tokens
        bits_per_byte = sum_i nll_i / ln 2 / sum_i bytes_i       an EOS adds nats and no bytes
        ce/SOURCE     = ce over the tokens of SOURCE             only where there is more than one source

    The states are sums, so ranks and shards merge by addition; `update` reads nothing on the host.

    Args:
        sources: names in the order of their numbers.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    nll_sum_S: Tensor
    correct_S: Tensor
    tokens_S: Tensor
    bytes_S: Tensor

    def __init__(self, sources: Sequence[str] = ("all",)) -> None:
        super().__init__()
        self.sources = tuple(sources)
        zeros_S = torch.zeros(len(self.sources), dtype=torch.int64)
        self.add_state("nll_sum_S", zeros_S.double(), dist_reduce_fx="sum")
        self.add_state("correct_S", zeros_S.clone(), dist_reduce_fx="sum")
        self.add_state("tokens_S", zeros_S.clone(), dist_reduce_fx="sum")
        self.add_state("bytes_S", zeros_S.clone(), dist_reduce_fx="sum")

    def update(self, nll_N: Tensor, rank_N: Tensor, sources_N: Tensor, bytes_N: Tensor) -> None:
        """Add a batch.

        Args:
            nll_N: -log p(label), nats (`losses.token_stats`).
            rank_N: number of logits strictly above the label's; -1 marks an ignored position.
            sources_N: int64, the number of each position's source.
            bytes_N: int64, UTF-8 bytes of each position's label; 0 for special tokens.
        """
        valid_N = rank_N >= 0
        index_N = torch.where(valid_N, sources_N, 0)
        self.nll_sum_S.index_add_(0, index_N, torch.where(valid_N, nll_N, 0).to(self.nll_sum_S.dtype))
        self.correct_S.index_add_(0, index_N, (rank_N == 0).long())
        self.tokens_S.index_add_(0, index_N, valid_N.long())
        self.bytes_S.index_add_(0, index_N, torch.where(valid_N, bytes_N, 0).long())

    def compute(self) -> dict[str, Tensor]:
        """The metrics as 0-dim tensors. What has no tokens (or no bytes) to be divided by is left out."""
        nll_sum, tokens, num_bytes = self.nll_sum_S.sum(), self.tokens_S.sum(), self.bytes_S.sum()
        metrics = {}
        if tokens > 0:
            metrics["ce"] = nll_sum / tokens
            metrics["accuracy"] = self.correct_S.sum() / tokens
        if num_bytes > 0:
            metrics["bits_per_byte"] = nll_sum / (math.log(2) * num_bytes)
        if len(self.sources) > 1:
            for source, nll, count in zip(self.sources, self.nll_sum_S, self.tokens_S, strict=True):
                if count > 0:
                    metrics[f"ce/{source}"] = nll / count
        return metrics

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> "TokenMetrics":
        # A move to MPS fails on a float64 state; the dtype has to change before the device does.
        dtype = sum_dtype(fn(torch.empty(0)).device)
        self._defaults["nll_sum_S"] = self._defaults["nll_sum_S"].to(dtype)  # type: ignore[union-attr]
        self.nll_sum_S = self.nll_sum_S.to(dtype)
        return super()._apply(fn, exclude_state)  # type: ignore[return-value]
