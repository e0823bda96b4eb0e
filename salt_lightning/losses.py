"""The SALT head loss: hidden states and head weights in, loss and gradients out, logits in chunks.

    CE   = -log p(y)                                   p = softmax(z_student)
    KD   = -sum_v q(v) log p(v)                        q = softmax(z_teacher / T)
    loss = ((1 - w) sum CE + w sum KD) / num_tokens    Rawat et al., arXiv 2410.18779; KD is not the KL

    d loss / d z_student = (p - (1 - w) e_y - w q) / num_tokens

T softens only the teacher, so one student softmax serves both terms. One pass over chunks of tokens
computes both models' logits, all sums and the gradients (in forward); phase 2 is the same code without a
teacher.

Shapes: N tokens, V vocabulary, D student width, E teacher width, C rows of a chunk.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from numbers import Integral
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from salt_lightning.errors import ConfigError
from salt_lightning.head.chunked_head import (
    Plan,
    Side,
    cast_side,
    chunked_label_stats,
    chunked_pass,
    compute_dtype,
    scale_and_cast,
)
from salt_lightning.head.row_pass import IGNORE, Mix, math_dtype


class SaltLoss(NamedTuple):
    """`loss` is differentiable; the sums over valid tokens are detached 0-dim fp32 tensors."""

    loss: Tensor
    ce_sum: Tensor
    kd_sum: Tensor
    teacher_ce_sum: Tensor  # at temperature 1
    teacher_entropy_sum: Tensor  # at the teacher's temperature, so KL = kd_sum - teacher_entropy_sum
    agree_sum: Tensor  # tokens where the two models share a top token
    correct_sum: Tensor  # tokens where no logit is above the label's
    student_better_sum: Tensor  # tokens where the student's nll is below the teacher's
    tokens: Tensor


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _eager(function: _Function) -> _Function:
    """torch.compiler.disable that keeps the function's type for type checkers."""
    return cast(_Function, torch.compiler.disable(function))


@_eager
def salt_loss(  # noqa: PLR0913
    student_hidden_ND: Tensor,
    student_head_VD: Tensor,
    labels_N: Tensor,
    teacher_hidden_NE: Tensor | None = None,
    teacher_head_VE: Tensor | None = None,
    kd_weight: float | Tensor = 0.0,
    teacher_temperature: float = 1.0,
    num_tokens: float | Tensor | None = None,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
    accuracy: str = "accurate",
    logits_budget_gib: float = 2.0,
    chunk_tokens: int | None = None,
) -> SaltLoss:
    """Cross-entropy and distillation loss of a linear head, chunked over tokens (arXiv 2410.18779).

    Nothing is read from the device, so the call can be captured in a CUDA graph. The products run in the
    autocast dtype if autocast is on, otherwise in the dtype of each model's hidden states (on a CPU in fp32
    instead of bf16). Only the student's hidden states, head and bias get gradients, in the dtype of each input.
    They are computed in forward: a second backward through one call, torch.func and second derivatives raise
    errors.

    Args:
        student_hidden_ND: (N, D) last hidden states, fp32 or bf16.
        student_head_VD: (V, D) output embedding.
        labels_N: (N,) int64 next tokens, -100 = ignored.
        teacher_hidden_NE: (N, E) of the teacher, any width; fp32 or bf16; needs `teacher_head_VE`.
        teacher_head_VE: (V, E), or fewer rows: missing ids have probability 0.
        kd_weight: w in 0..1; a 0-dim tensor is never read on the host (without a teacher it counts as 0).
        teacher_temperature: T > 0 of the teacher's softmax; the student stays at 1, there is no T^2 factor.
        num_tokens: the denominator, by default the number of valid labels. If it is 0, divides by 1.
        student_bias_V: (V,) added to the student's logits.
        teacher_bias_V: (V,) added to the teacher's logits.
        accuracy: "accurate" keeps the rounding of logits out of the gradients, even where student and
            teacher are close; "fast" may store logits in bf16.
        logits_budget_gib: memory in GiB for both models' logits and their gradient at a time. Enough for 2,048
            rows, or for the gradient of 4,096 rows with the logits of 1,024, is always granted.
        chunk_tokens: rows of a chunk, instead of the budget.

    Returns:
        SaltLoss; without a teacher, all sums except ce_sum and correct_sum are zeros.

    Raises:
        ConfigError: shapes, dtypes or options that do not fit together.
    """
    _check_options(accuracy, teacher_temperature, logits_budget_gib, chunk_tokens)
    _check_side("student", student_hidden_ND, student_head_VD, student_bias_V)
    _check_labels(labels_N, student_hidden_ND, student_head_VD)
    _check_teacher(student_hidden_ND, student_head_VD, teacher_hidden_NE, teacher_head_VE, kd_weight)
    teacher = None
    if teacher_hidden_NE is not None and teacher_head_VE is not None:
        _check_side("teacher", teacher_hidden_NE, teacher_head_VE, teacher_bias_V)
        teacher = cast_side(teacher_hidden_NE, teacher_head_VE, teacher_bias_V, compute_dtype(teacher_hidden_NE))
    student_dtype = compute_dtype(student_hidden_ND)
    plan = Plan(accuracy, logits_budget_gib, chunk_tokens, student_dtype, torch.is_grad_enabled())
    tokens = (labels_N != IGNORE).sum().to(math_dtype(student_dtype))
    if not isinstance(num_tokens, Tensor | None) and not 0 <= num_tokens < math.inf:
        raise ConfigError(f"num_tokens={num_tokens} must be at least 0, and finite")
    denominator = tokens if num_tokens is None else _scalar(num_tokens, tokens)
    mix = Mix(
        kd_weight=_scalar(kd_weight if teacher else 0.0, tokens),
        scale=torch.where(denominator > 0, denominator, 1.0).reciprocal(),
        temperature=float(teacher_temperature),
    )
    student = student_hidden_ND, student_head_VD, student_bias_V
    with torch.autocast(labels_N.device.type, enabled=False):
        loss, sums = _HeadLoss.apply(*student, teacher, labels_N, mix, plan)
    return SaltLoss._make([loss, *sums.unbind(), tokens])


@_eager
@torch.no_grad()
def token_stats(
    hidden_NE: Tensor,
    head_VE: Tensor,
    labels_N: Tensor,
    bias_V: Tensor | None = None,
    logits_budget_gib: float = 2.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood and rank of every label, without gradient.

    Args:
        hidden_NE: (N, E) last hidden states.
        head_VE: (V, E) output embedding.
        labels_N: (N,) int64, -100 = ignored.
        bias_V: (V,) added to the logits.
        logits_budget_gib: memory for the logits of one chunk, in GiB.
        chunk_tokens: rows of a chunk, instead of the budget.

    Returns:
        nll_N (fp32; 0 if ignored) and rank_N (int64: the number of logits strictly larger than the label's;
        -1 if ignored).

    Raises:
        ConfigError: shapes, dtypes or options that do not fit together.
    """
    _check_options("accurate", 1.0, logits_budget_gib, chunk_tokens)
    _check_side("", hidden_NE, head_VE, bias_V)
    _check_labels(labels_N, hidden_NE, head_VE)
    side = cast_side(hidden_NE, head_VE, bias_V, compute_dtype(hidden_NE))
    with torch.autocast(labels_N.device.type, enabled=False):
        return chunked_label_stats(side, labels_N, logits_budget_gib, chunk_tokens)


class _HeadLoss(torch.autograd.Function):
    """Loss, sums and gradients in one pass; backward only scales."""

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        teacher: Side | None,
        labels_N: Tensor,
        mix: Mix,
        plan: Plan,
    ) -> tuple[Tensor, Tensor]:
        student = cast_side(hidden_ND, head_VD, bias_V, plan.student_dtype)
        needs = tuple(plan.with_grad and need for need in ctx.needs_input_grad[:3])
        plan = replace(plan, with_grad=any(needs))
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden_ND, head_VD, bias_V)]
        sums_7N, ctx.grads = chunked_pass(student, teacher, labels_N, mix, plan, (needs, ctx.dtypes))
        sums = sums_7N.sum(1)
        loss = torch.lerp(sums[0], sums[1], mix.kd_weight) * mix.scale
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # not once_differentiable: it raises only where grad_loss has a graph, and otherwise drops the second derivative
        if torch.is_grad_enabled():
            raise RuntimeError("salt_loss has no second derivatives, so its backward cannot create a graph")
        if ctx.grads is None:
            raise RuntimeError("backward ran twice through one salt_loss call; it returns its gradients only once")
        grads, ctx.grads = ctx.grads, None  # scaled in place: a second head gradient would not fit
        scaled = (scale_and_cast(g, grad_loss, dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return (*scaled, None, None, None, None)


# ---- checks ------------------------------------------------------------------------------


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """A 0-dim tensor with the dtype and device of `like`; numbers are filled in there, as a copy would wait."""
    if isinstance(value, Tensor):
        return value.detach().to(like).reshape(())
    return torch.full_like(like, value)


def _check_options(accuracy: str, temperature: float, budget_gib: float, chunk_tokens: int | None) -> None:
    if accuracy not in ("accurate", "fast"):
        raise ConfigError(f"accuracy={accuracy!r} is unknown; use 'accurate' or 'fast'")
    if not 0 < temperature < math.inf:
        raise ConfigError(f"teacher_temperature={temperature} must be above 0, and finite")
    if not 0 < budget_gib < math.inf:
        raise ConfigError(f"logits_budget_gib={budget_gib} must be above 0, and finite")
    if chunk_tokens is not None and not (isinstance(chunk_tokens, Integral) and chunk_tokens >= 1):
        raise ConfigError(f"chunk_tokens={chunk_tokens} must be a whole number of at least 1, or None for the budget")


def _check_side(name: str, hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None) -> None:
    prefix = f"{name}_" if name else ""
    hidden, head = tuple(hidden_ND.shape), tuple(head_VD.shape)
    if hasattr(head_VD, "full_tensor"):
        raise ConfigError(
            f"{prefix}head is a sharded DTensor; call the loss inside the forward of the module that has it"
        )
    if len(hidden) != 2 or len(head) != 2 or hidden[1] != head[1]:
        raise ConfigError(f"{prefix}hidden {hidden} and {prefix}head {head} do not fit; use (N, D) and (V, D)")
    if bias_V is not None and tuple(bias_V.shape) != head[:1]:
        raise ConfigError(f"{prefix}bias {tuple(bias_V.shape)} does not fit {prefix}head {head}; use (V,)")


def _check_labels(labels_N: Tensor, hidden_ND: Tensor, head_VD: Tensor) -> None:
    if labels_N.dtype != torch.int64 or tuple(labels_N.shape) != tuple(hidden_ND.shape[:1]):
        raise ConfigError(
            f"labels {tuple(labels_N.shape)} {labels_N.dtype} do not fit "
            f"hidden states {tuple(hidden_ND.shape)}; use (N,) torch.int64"
        )
    if labels_N.device.type == "cpu" and labels_N.numel():  # reading a CUDA tensor would wait for the device
        low, high = labels_N.masked_fill(labels_N == IGNORE, 0).aminmax()
        if low < 0 or high >= head_VD.shape[0]:
            raise ConfigError(
                f"labels range from {int(low)} to {int(high)}, the head has {head_VD.shape[0]} rows; "
                f"use 0..{head_VD.shape[0] - 1}, or {IGNORE} to ignore a token"
            )


def _check_teacher(
    student_hidden_ND: Tensor,
    student_head_VD: Tensor,
    teacher_hidden_NE: Tensor | None,
    teacher_head_VE: Tensor | None,
    kd_weight: float | Tensor,
) -> None:
    if isinstance(kd_weight, Tensor):
        if kd_weight.dim():
            raise ConfigError(f"kd_weight has shape {tuple(kd_weight.shape)}; use a float or a 0-dim tensor")
    elif not 0 <= kd_weight <= 1:
        raise ConfigError(f"kd_weight={kd_weight} must be in 0..1")
    if teacher_hidden_NE is None and teacher_head_VE is None:
        if not isinstance(kd_weight, Tensor) and kd_weight > 0:
            raise ConfigError(
                f"kd_weight={kd_weight} needs a teacher; pass teacher hidden states and head, or weight 0"
            )
        return
    if teacher_hidden_NE is None or teacher_head_VE is None:
        missing = "teacher_hidden_NE" if teacher_hidden_NE is None else "teacher_head_VE"
        raise ConfigError(f"{missing} is missing; pass the teacher's hidden states and head, or neither")
    student, teacher = tuple(student_head_VD.shape), tuple(teacher_head_VE.shape)
    if student[0] < teacher[0]:
        raise ConfigError(
            f"teacher head {teacher} has more rows than student head {student}; cut it to the ids of the student"
        )
    student, teacher = tuple(student_hidden_ND.shape), tuple(teacher_hidden_NE.shape)
    if student[0] != teacher[0]:
        raise ConfigError(
            f"student hidden {student} and teacher hidden {teacher} differ in tokens; use the same tokens for both"
        )
