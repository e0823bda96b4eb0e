"""Validation and test metrics: sums per source and per third, the same for any number of batches and ranks.

Shape suffixes: N token positions of a batch, S sources, followed by the three thirds if there are any.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from salt_lightning.errors import ConfigError
from salt_lightning.run.curves import THIRDS


def sum_dtype(device: torch.device) -> torch.dtype:
    """Dtype in which nats are summed: float64, except on MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


class TokenMetrics(Metric):
    """Cross-entropy, next-token accuracy and bits per byte over one or more sources, weighted by token.

        ce            = sum_i nll_i / tokens                     nats per token
        perplexity    = exp(ce)
        accuracy      = |{i: rank_i = 0}| / tokens
        tokens        = number of tokens                         a different number means different text
        bits_per_byte = sum_i nll_i / ln 2 / sum_i bytes_i       an EOS adds nats and no bytes
        ce/SOURCE     = ce over the tokens of SOURCE             only if there is more than one source
        ce/THIRD      = ce over the easy, medium or hard third of the documents (difficulty.py), if they are known

    The states are sums, so ranks and shards merge by addition; `update` reads nothing on the host. `sources`: names in
    the order of their numbers; `thirds`: whether `update` gets the third of each token.
    """

    full_state_update = False

    nll_sum_S: Tensor
    correct_S: Tensor
    tokens_S: Tensor
    bytes_S: Tensor

    def __init__(self, sources: Sequence[str] = ("all",), thirds: bool = False) -> None:
        super().__init__()
        self.sources, self.thirds = tuple(sources), thirds
        if thirds and (taken := sorted({*THIRDS} & {*sources})):
            raise ConfigError(f"--data.difficulty: a source has the name of a third, {taken[0]!r}; rename it")
        zeros_S = torch.zeros(len(self.sources) + (len(THIRDS) if thirds else 0), dtype=torch.int64)
        self.add_state("nll_sum_S", zeros_S.double(), dist_reduce_fx="sum")
        self.add_state("correct_S", zeros_S.clone(), dist_reduce_fx="sum")
        self.add_state("tokens_S", zeros_S.clone(), dist_reduce_fx="sum")
        self.add_state("bytes_S", zeros_S.clone(), dist_reduce_fx="sum")

    @property
    def parts(self) -> list[str]:
        """The sources, if there are several, and thirds that have a loss of their own."""
        return [*(self.sources if len(self.sources) > 1 else ()), *(THIRDS if self.thirds else ())]

    def update(
        self,
        nll_N: Tensor,
        rank_N: Tensor,
        sources_N: Tensor | None = None,
        bytes_N: Tensor | None = None,
        thirds_N: Tensor | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            nll_N: -log p(label), nats (`losses.token_stats`).
            rank_N: number of logits strictly above the label's; -1 marks an ignored position.
            sources_N: int64, the number of each position's source. None: the first.
            bytes_N: int64, UTF-8 bytes of each position's label; 0 for special tokens. None: not known.
            thirds_N: int64, 0 easy, 1 medium, 2 hard, -1 not known; only if the metric has thirds.
        """
        sources_N = torch.zeros_like(rank_N) if sources_N is None else sources_N
        bytes_N = torch.zeros_like(rank_N) if bytes_N is None else bytes_N
        groups = [(sources_N, 0)] if thirds_N is None else [(sources_N, 0), (thirds_N, len(self.sources))]
        for group_N, first in groups:
            valid_N = (rank_N >= 0) & (group_N >= 0)
            index_N = torch.where(valid_N, group_N + first, 0)
            # Sum the batch first: on MPS, in float32, single tokens would be lost in a large sum.
            nll_S = torch.zeros_like(self.nll_sum_S)
            self.nll_sum_S += nll_S.index_add_(0, index_N, torch.where(valid_N, nll_N, 0).to(nll_S.dtype))
            self.correct_S.index_add_(0, index_N, (valid_N & (rank_N == 0) & nll_N.isfinite()).long())
            self.tokens_S.index_add_(0, index_N, valid_N.long())
            self.bytes_S.index_add_(0, index_N, torch.where(valid_N, bytes_N, 0).long())

    def compute(self) -> dict[str, Tensor]:
        """The metrics as 0-dim tensors, without those that would divide by zero tokens or bytes."""
        sources = slice(len(self.sources))
        nll_sum, tokens = self.nll_sum_S[sources].sum(), self.tokens_S[sources].sum()
        num_bytes = self.bytes_S[sources].sum()
        metrics = {}
        if tokens > 0:
            metrics["ce"] = nll_sum / tokens
            metrics["perplexity"] = metrics["ce"].exp()
            metrics["accuracy"] = self.correct_S[sources].sum() / tokens
            metrics["tokens"] = tokens
        if num_bytes > 0:
            metrics["bits_per_byte"] = nll_sum / (math.log(2) * num_bytes)
        first = 0 if len(self.sources) > 1 else 1
        for name, nll, count in zip(self.parts, self.nll_sum_S[first:], self.tokens_S[first:], strict=True):
            if count > 0:
                metrics[f"ce/{name}"] = nll / count
        return metrics

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> "TokenMetrics":
        # MPS has no float64: the dtype must change before the device does.
        dtype = sum_dtype(fn(torch.empty(0)).device)
        self._defaults["nll_sum_S"] = self._defaults["nll_sum_S"].to(dtype)  # type: ignore[union-attr]
        self.nll_sum_S = self.nll_sum_S.to(dtype)
        return super()._apply(fn, exclude_state)  # type: ignore[return-value]
