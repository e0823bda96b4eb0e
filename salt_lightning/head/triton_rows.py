# ruff: noqa: ANN001, ANN202, PLR0913  (a kernel's arguments are typed by the launch)
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The row pass as Triton kernels: one program processes one row of logits, in fp32 registers.

Same results as `row_pass`, without its temporaries: two loops over the row, the first for the sums, the
second for the gradient, which may overwrite the student's logits. Neither loop waits for other threads: maxima and
sums are those of runs of elements that one thread loads at once, and are combined after the loop. Import this only if
Triton is installed. Shapes: C rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from salt_lightning.head import row_pass as plain
from salt_lightning.head.row_pass import FINITE_LOW, IGNORE, NUM_SUMS, Mix

BLOCK = 4096  # elements of a row that a program holds at a time
WARPS = 8
LOAD_BYTES = 16  # that a thread loads at once: its elements are a run
SCALERS = 2048  # at most so many programs scale: usually there is nothing to do, and each costs its start
WIDE = 16  # for lengths divisible by this, Triton loads and stores 16 bytes at once

_IGNORE = tl.constexpr(IGNORE)
_NUM_SUMS = tl.constexpr(NUM_SUMS)
_LOW = tl.constexpr(FINITE_LOW)
_LOG2E = tl.constexpr(1.4426950408889634)


def fill_rows(logits: list[Tensor], labels_C: Tensor, mix: Mix, sums_7C: Tensor, grad_CV: Tensor | None) -> None:
    """Fills the sums (7, C) and, unless None, the gradient. `logits`: the student's, then the teacher's."""
    student_CV, teacher_CV = logits[0], logits[-1]
    target_CV = student_CV if grad_CV is None else grad_CV
    num_rows, vocab = student_CV.shape
    with torch.cuda.device_of(student_CV):  # Triton launches on the current device
        _row_kernel[(num_rows,)](
            student_CV,
            teacher_CV,
            target_CV,
            labels_C.contiguous(),
            sums_7C,
            mix.kd_weight,
            mix.scale,
            vocab,
            _width(student_CV, teacher_CV, target_CV),
            student_CV.stride(0),
            teacher_CV.stride(0),
            target_CV.stride(0),
            sums_7C.stride(0),
            1.0 / mix.temperature,
            TEACHER=len(logits) > 1,
            SOFTENED=mix.temperature != 1,
            GRADIENT=grad_CV is not None,
            **_block_and_run(student_CV, teacher_CV),
            num_warps=WARPS,
        )


def label_stats(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood (fp32) and rank (int64) of each label; 0 and -1 if ignored."""
    num_rows, vocab = logits_CV.shape
    nll_C = torch.empty(num_rows, dtype=torch.float32, device=logits_CV.device)
    rank_C = torch.empty(num_rows, dtype=torch.int64, device=logits_CV.device)
    with torch.cuda.device_of(logits_CV):
        _label_kernel[(num_rows,)](
            logits_CV,
            labels_C.contiguous(),
            nll_C,
            rank_C,
            vocab,
            _width(logits_CV),
            logits_CV.stride(0),
            **_block_and_run(logits_CV),
            num_warps=WARPS,
        )
    return nll_C, rank_C


@torch.no_grad()
def fault(device: torch.device) -> str | None:
    """Why the kernels cannot be used on a device, found by comparing them with the plain row pass; None if they can.

    Raises:
        Exception: of many kinds, if they cannot be compiled or launched.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None  # captured code has run before, and reading values would end the capture
    generator, fp32 = torch.Generator("cpu").manual_seed(0), torch.float32  # explicit: the default may differ
    vocab = BLOCK + WIDE + 5  # two blocks, the second with a few values
    student_CV, teacher_CV = (
        4 * torch.randn(4, vocab, generator=generator, device="cpu", dtype=fp32).to(device) for _ in range(2)
    )
    labels_C = torch.tensor([0, BLOCK + 2, IGNORE, vocab - 1], device=device)
    mix = Mix(torch.tensor(0.4, device=device, dtype=fp32), torch.tensor(0.25, device=device, dtype=fp32), 2.0)
    sums_7C, grad_CV = torch.empty(7, 4, device=device, dtype=fp32), torch.empty_like(student_CV)
    fill_rows([student_CV, teacher_CV], labels_C, mix, sums_7C, grad_CV)
    ours = [sums_7C, grad_CV, *label_stats(student_CV, labels_C)]
    true_7C, true_CV = plain.row_pass(student_CV, teacher_CV, labels_C, mix, True)
    assert true_CV is not None
    true = [true_7C, true_CV, *plain.label_stats(student_CV, labels_C)]
    # fp32 rounds in the sixth digit; missing a row, label or block changes values by their own size
    for name, a, b in zip(("sums", "gradient", "losses", "ranks"), ours, true, strict=True):
        if not (a - b).abs().max() <= 1e-3 * b.abs().max():
            return f"wrong values ({name})"
    return None


def _width(*rows: Tensor) -> int:
    """How far each row may be read and written: the vocabulary, or the padded row if wide loads do not fit that."""
    vocab = rows[0].shape[1]
    return vocab if vocab % WIDE == 0 else min(t.stride(0) for t in rows)


def _block_and_run(*rows: Tensor) -> dict[str, int]:
    """The kernels' BLOCK and RUN. The widest dtype's run is a part of one load of the other, too."""
    block = min(BLOCK, triton.next_power_of_2(rows[0].shape[1]))
    return {"BLOCK": block, "RUN": min(block, LOAD_BYTES // max(t.itemsize for t in rows))}


def scale_in_place(grad: Tensor, by: Tensor) -> Tensor:
    """grad *= by for a contiguous tensor; no memory is moved if `by` is 1, as without accumulation."""
    num_elements = grad.numel()
    with torch.cuda.device_of(grad):
        programs = min(SCALERS, triton.cdiv(num_elements, BLOCK))
        _scale_kernel[(programs,)](grad, by, num_elements, BLOCK=BLOCK, num_warps=WARPS)
    return grad


@triton.jit
def _load(row, at, vocab, width):
    values = tl.load(row + at, mask=at < width, other=float("-inf")).to(tl.float32)
    # one instruction that keeps NaN, instead of a comparison and a selection
    return tl.where(at >= vocab, _LOW, tl.maximum(values, _LOW, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _sum_exp(values, shift, soft):
    """Of each run, the sum of exp2((value - shift) * soft)."""
    return tl.sum(tl.exp2((values - shift[:, None]) * soft), 1)


@triton.jit
def _combine(totals, maxima, soft):
    """The runs' sums of exp2((value - their maximum) * soft) as one with the maximum of all, and that maximum."""
    highest = tl.max(maxima, 0)
    return tl.sum(totals * tl.exp2((maxima - highest) * soft), 0), highest


@triton.jit
def _row_kernel(
    student,
    teacher,
    grad,
    labels,
    sums,
    kd_weight,
    scale,
    vocab,
    width,
    student_stride,
    teacher_stride,
    grad_stride,
    sums_stride,
    inverse_temperature,
    TEACHER: tl.constexpr,
    SOFTENED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # rows x vocabulary can exceed 2^31
    student += row * student_stride
    teacher += row * teacher_stride
    grad += row * grad_stride
    sums += row
    label = tl.load(labels + row)
    lanes = tl.arange(0, BLOCK)
    if label == _IGNORE:
        for i in range(_NUM_SUMS):
            tl.store(sums + i * sums_stride, 0.0)
        if GRADIENT:
            for start in range(0, vocab, BLOCK):
                at = start + lanes
                tl.store(grad + at, tl.zeros([BLOCK], tl.float32).to(grad.dtype.element_ty), mask=at < width)
    else:
        known = (label >= 0) & (label < vocab)  # any other label makes the loss NaN
        column = label.to(tl.int32)
        s_label = tl.load(student + column, mask=known, other=float("nan")).to(tl.float32)
        t_label = tl.load(teacher + column, mask=known, other=float("nan")).to(tl.float32)
        soft = inverse_temperature * _LOG2E  # exp(x / T) = exp2(x * soft)
        RUNS: tl.constexpr = BLOCK // RUN
        s_max = tl.full([RUNS], _LOW, tl.float32)
        s_total = tl.zeros([RUNS], tl.float32)
        t_max = tl.full([RUNS], _LOW, tl.float32)
        t_total = tl.zeros([RUNS], tl.float32)  # of exp(teacher)
        q_total = tl.zeros([RUNS], tl.float32)  # of exp(teacher / T)
        q_student = tl.zeros([RUNS], tl.float32)  # the same weights times the student's logits minus the label's: a
        q_teacher = tl.zeros([RUNS], tl.float32)  # common offset of all logits would cost precision
        for start in range(0, vocab, BLOCK):
            at = start + lanes
            s = tl.reshape(_load(student, at, vocab, width), [RUNS, RUN])
            new_max = tl.maximum(s_max, tl.max(s, 1))
            s_total = s_total * tl.exp2((s_max - new_max) * _LOG2E) + _sum_exp(s, new_max, _LOG2E)
            s_max = new_max
            if TEACHER:
                t = tl.reshape(_load(teacher, at, vocab, width), [RUNS, RUN])
                new_max = tl.maximum(t_max, tl.max(t, 1))
                q = tl.exp2((t - new_max[:, None]) * soft)
                fade = tl.exp2((t_max - new_max) * soft)
                q_total = q_total * fade + tl.sum(q, 1)
                q_student = q_student * fade + tl.sum(q * (s - s_label), 1)
                q_teacher = q_teacher * fade + tl.sum(q * (t - t_label), 1)
                if SOFTENED:
                    t_total = t_total * tl.exp2((t_max - new_max) * _LOG2E) + _sum_exp(t, new_max, _LOG2E)
                t_max = new_max
        s_total, s_max = _combine(s_total, s_max, _LOG2E)
        if TEACHER:
            q_student, _ = _combine(q_student, t_max, soft)
            q_teacher, _ = _combine(q_teacher, t_max, soft)
            q_total, highest = _combine(q_total, t_max, soft)
            if SOFTENED:
                t_total, highest = _combine(t_total, t_max, _LOG2E)
            t_max = highest
        nll = tl.log(s_total) + (s_max - s_label)
        tl.store(sums, nll)
        tl.store(sums + 5 * sums_stride, (s_label == s_max).to(tl.float32))
        if TEACHER:
            if not SOFTENED:
                t_total = q_total
            t_nll = tl.log(t_total) + (t_max - t_label)
            tl.store(sums + sums_stride, nll - q_student / q_total)
            tl.store(sums + 2 * sums_stride, t_nll)
            tl.store(
                sums + 3 * sums_stride, tl.log(q_total) + inverse_temperature * (t_max - t_label - q_teacher / q_total)
            )
            tl.store(sums + 6 * sums_stride, (nll < t_nll).to(tl.float32))
        else:
            for i in range(1, 5):
                tl.store(sums + i * sums_stride, 0.0)
            tl.store(sums + 6 * sums_stride, 0.0)
        if TEACHER or GRADIENT:
            row_scale = tl.load(scale)
            weight = tl.load(kd_weight)
            p_scale = row_scale / s_total
            q_scale = row_scale * weight
            if TEACHER:
                q_scale /= q_total
            agree = tl.zeros([RUNS], tl.int32)
            tl.debug_barrier()  # every warp must have read the label's logit before one overwrites it
            for done in range(0, vocab, BLOCK):  # backwards: the end of the row is still in the L2 cache
                at = (vocab - 1) // BLOCK * BLOCK - done + lanes
                s = _load(student, at, vocab, width)
                d = tl.exp2((s - s_max) * _LOG2E) * p_scale - tl.where(at == column, row_scale * (1.0 - weight), 0.0)
                if TEACHER:
                    t = _load(teacher, at, vocab, width)
                    both = ((s == s_max) & (t == t_max)).to(tl.int32)
                    agree |= tl.max(tl.reshape(both, [RUNS, RUN]), 1)
                    d -= tl.exp2((t - t_max) * soft) * q_scale
                if GRADIENT:
                    tl.store(grad + at, d.to(grad.dtype.element_ty), mask=at < width)
            if TEACHER:
                tl.store(sums + 4 * sums_stride, tl.max(agree, 0).to(tl.float32))


@triton.jit
def _label_kernel(logits, labels, nll, rank, vocab, width, stride, BLOCK: tl.constexpr, RUN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    if label == _IGNORE:
        tl.store(nll + row, 0.0)
        tl.store(rank + row, -1)
    else:
        known = (label >= 0) & (label < vocab)
        at_label = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32)
        bound = tl.maximum(at_label, _LOW, propagate_nan=tl.PropagateNan.ALL)  # as _load's values
        RUNS: tl.constexpr = BLOCK // RUN
        largest = tl.full([RUNS], _LOW, tl.float32)
        total = tl.zeros([RUNS], tl.float32)
        larger = tl.zeros([RUNS], tl.int32)
        lanes = tl.arange(0, BLOCK)
        for start in range(0, vocab, BLOCK):
            x = tl.reshape(_load(logits, start + lanes, vocab, width), [RUNS, RUN])
            new_max = tl.maximum(largest, tl.max(x, 1))
            total = total * tl.exp2((largest - new_max) * _LOG2E) + _sum_exp(x, new_max, _LOG2E)
            largest = new_max
            larger += tl.sum((x > bound).to(tl.int32), 1)
        total, highest = _combine(total, largest, _LOG2E)
        tl.store(nll + row, highest + tl.log(total) - at_label)
        tl.store(rank + row, tl.sum(larger, 0).to(tl.int64))


@triton.jit
def _scale_kernel(grad, by, num_elements, BLOCK: tl.constexpr):
    factor = tl.load(by).to(tl.float32)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, num_elements, tl.num_programs(0) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < num_elements
            values = tl.load(grad + at, mask=inside).to(tl.float32) * factor
            tl.store(grad + at, values.to(grad.dtype.element_ty), mask=inside)
