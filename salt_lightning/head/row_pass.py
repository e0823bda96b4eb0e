"""The sums and the gradient of each row of logits, in plain PyTorch.

This is the reference and the CPU path, and `torch.compile` can compile it; `triton_rows` does the same in one
kernel. Shapes: C rows, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100  # a label that does not count
NUM_SUMS = 7  # the fields of SaltLoss between loss and tokens, in this order
FINITE_LOW = -1e30  # replaces -inf in shifted logits: 0 x -1e30 is 0, 0 x -inf is NaN


class Mix(NamedTuple):
    """The inputs of the loss besides logits and labels."""

    kd_weight: Tensor  # 0-dim, on the device
    scale: Tensor  # 0-dim, 1 / num_tokens
    temperature: float  # of the teacher


def row_pass(
    student_CV: Tensor, teacher_CV: Tensor | None, labels_C: Tensor, mix: Mix, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The row pass in plain PyTorch; writes nothing in place.

    Returns sums (7, C) in the order of SaltLoss (zeros if ignored) and d loss / d student logits (C, V).
    """
    valid_C = labels_C != IGNORE
    labels_C1 = torch.where(valid_C, labels_C, 0)[:, None]
    x_CV, exp_CV, total_C1 = _shifted_softmax(student_CV)
    label_x_C1 = x_CV.gather(1, labels_C1)
    nll_C1 = total_C1.log() - label_x_C1
    zero_C1 = torch.zeros_like(nll_C1)
    sums = [nll_C1, zero_C1, zero_C1, zero_C1, zero_C1, label_x_C1 == 0, zero_C1]
    row_scale_C1 = torch.where(valid_C, mix.scale, 0.0)[:, None].to(x_CV.dtype)
    if teacher_CV is not None:
        t_CV, soft_exp_CV, soft_total_C1 = _shifted_softmax(teacher_CV)
        teacher_total_C1 = soft_total_C1
        top_CV = (t_CV == 0) & (x_CV == 0)
        teacher_nll_C1 = -t_CV.gather(1, labels_C1)
        if mix.temperature != 1:
            t_CV = t_CV / mix.temperature
            soft_exp_CV = t_CV.exp()
            soft_total_C1 = soft_exp_CV.sum(1, keepdim=True)
        q_CV = (soft_exp_CV / soft_total_C1).to(x_CV.dtype)  # a teacher may be in float64 beside an fp32 student
        sums[1] = total_C1.log() - (q_CV * x_CV).sum(1, keepdim=True)
        sums[2] = teacher_nll_C1 + teacher_total_C1.log()
        sums[3] = soft_total_C1.log() - (q_CV * t_CV).sum(1, keepdim=True)
        sums[4] = top_CV.any(1, keepdim=True)
        sums[6] = nll_C1 < sums[2]
    sums_7C = torch.where(valid_C, torch.cat([s.to(x_CV.dtype) for s in sums], 1).t(), 0.0)
    if not with_grad:
        return sums_7C, None
    grad_CV = exp_CV * (row_scale_C1 / total_C1)
    if teacher_CV is not None:
        grad_CV = grad_CV - q_CV * (row_scale_C1 * mix.kd_weight)
    return sums_7C, grad_CV.scatter_add(1, labels_C1, -row_scale_C1 * (1 - mix.kd_weight))


def _shifted_softmax(logits_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits minus the row's maximum, their exponentials, and the sum of these."""
    math_CV = logits_CV.to(math_dtype(logits_CV.dtype))
    shifted_CV = (math_CV - math_CV.amax(1, keepdim=True)).clamp(min=FINITE_LOW)
    exp_CV = shifted_CV.exp()
    return shifted_CV, exp_CV, exp_CV.sum(1, keepdim=True)


def label_stats(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    valid_C = labels_C != IGNORE
    label_logits_C1 = logits_CV.gather(1, torch.where(valid_C, labels_C, 0)[:, None])
    nll_C = logits_CV.logsumexp(1) - label_logits_C1[:, 0]
    # Counting in the logits' dtype is exact for V < 2^24, and on a CPU five times as fast as summing booleans.
    rank_C = torch.gt(logits_CV, label_logits_C1, out=torch.empty_like(logits_CV)).sum(1).long()
    return torch.where(valid_C, nll_C, 0.0).float(), torch.where(valid_C, rank_C, -1)


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
