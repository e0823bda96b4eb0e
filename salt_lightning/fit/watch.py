"""Remembers the first loss or gradient that is not finite, on the device, without waiting for it.

Micro-batches are numbered over the whole run and all ranks: (step * accumulation + micro) * ranks + rank, steps from 0.
So the smallest number is the first bad micro-batch, and its rows follow from the data's order.
"""

from collections.abc import Callable

import torch
from torch import Tensor

NEVER = torch.iinfo(torch.int64).max


class Watch:
    """`first`: int64 [2], the first micro-batch with a bad loss, the first of the first step with a bad gradient."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.first = torch.full((2,), NEVER, device=device)

    def see(self, kind: int, value: Tensor, number: int) -> None:
        """Checks the loss (kind 0) or gradient norm (kind 1) of micro-batch `number`, without reading the device."""
        first = self.first[kind]
        first.copy_(torch.where(value.detach().isfinite(), first, first.clamp(max=number)))

    def is_bad(self) -> Tensor:
        """Float 0-dim, 1 once anything was bad."""
        return (self.first < NEVER).any().float()


def problem(
    first: list[int], weights_finite: bool, step: int, per_step: int, rows_of: Callable[[int, int], str]
) -> str | None:
    """What stopped being finite, and the rows that were read then; None if nothing did.

    Args:
        first: `Watch.first`, the minimum over ranks.
        weights_finite: whether the student's weights are finite now.
        step: optimizer steps done.
        per_step: micro-batches of an optimizer step, over all ranks.
        rows_of: (number of the first micro-batch, how many) -> the rows that they read.
    """
    loss, gradient = first
    at, name, number, count = loss // per_step, "train/loss", loss, 1
    if gradient // per_step < at:  # else the bad loss caused the bad gradient
        at, name, number, count = gradient // per_step, "train/grad_norm", gradient, per_step
    if number < NEVER:
        return f"{name} is not finite at step {at + 1}, which read rows {rows_of(number, count)}"
    return None if weights_finite else f"the weights after step {step} are not finite, or too large"
