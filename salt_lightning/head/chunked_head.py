"""The matrix products of the head around the row pass, in chunks of tokens.

A chunk is the rows of one product for the head's gradient (each costs a pass over an fp32 gradient as large as the
head). A strip is a part of it whose logits are in memory at a time. Shapes as in `losses`; G rows of a chunk.
"""

import dataclasses
import functools
import importlib.util
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from salt_lightning.errors import ConfigError, first_line, is_out_of_memory
from salt_lightning.head.row_pass import NUM_SUMS, Mix, label_stats, math_dtype, row_pass

# Always granted, whatever the budget, as less costs speed: MIN_ROWS rows with all their logits, and a gradient of
# MIN_CHUNK_ROWS rows (each chunk costs a pass over the head's fp32 gradient) with the logits of one strip.
MIN_ROWS = 2048
MIN_CHUNK_ROWS = 4096
MIN_STRIP_ROWS = 1024  # below this the products of the logits lose speed
NO_LOGIT = -3e4  # logit of an id that a head lacks: probability 0 in fp32 up to a temperature of 280
TILE_ROWS = 128  # a matrix unit's tile
CPU_BLOCK_ELEMENTS = 2**18  # rows x vocabulary of one eager pass, so that its temporaries stay in cache
GPU_BLOCK_ELEMENTS = 2**26


@dataclasses.dataclass(frozen=True)
class Side:
    """One model's inputs of the product, in its compute dtype."""

    hidden_ND: Tensor
    head_VD: Tensor
    bias_V: Tensor | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to process the tokens."""

    accuracy: str
    budget_gib: float
    chunk_tokens: int | None
    student_dtype: torch.dtype
    with_grad: bool


def chunked_pass(
    student: Side,
    teacher: Side | None,
    labels_N: Tensor,
    mix: Mix,
    plan: Plan,
    wanted: tuple[tuple[bool, ...], list[torch.dtype | None]],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Per-token sums (7, N) and the gradients of the student's hidden states, head and bias, where wanted."""
    num_rows, vocab = labels_N.numel(), student.head_VD.shape[0]
    sides = [student] if teacher is None else [student, teacher]
    rows_of, dtypes = rows_and_dtypes(num_rows, vocab, [side.hidden_ND.dtype for side in sides], plan)
    in_place = len(dtypes) < len(sides)  # the gradient uses the memory of the student's logits
    grad_GV = _buffer(rows_of.chunk if plan.with_grad else 0, vocab, plan.student_dtype, labels_N.device)
    buffers = [_buffer(rows_of.strip, vocab, dtype, labels_N.device) for dtype in dtypes]
    if teacher is not None:
        buffers[-1][:, teacher.head_VD.shape[0] :] = NO_LOGIT  # stays: the products write only their own columns
    sums_7N = mix.scale.new_empty(NUM_SUMS, num_rows)
    grads = GradBuffers(student, *wanted, one_chunk=rows_of.chunk >= num_rows)
    for chunk in _slices(0, num_rows, rows_of.chunk):
        for strip in _slices(chunk.start, chunk.stop, rows_of.strip):
            held = slice(0, strip.stop - strip.start)
            grad_CV = grad_GV[strip.start - chunk.start : strip.stop - chunk.start]
            logits = [grad_CV, *(b[held] for b in buffers)] if in_place else [b[held] for b in buffers]
            for side, logits_CV in zip(sides, logits, strict=True):
                _write_logits(side, strip, logits_CV)
            _fill_rows(logits, labels_N[strip], mix, sums_7N[:, strip], grad_CV if plan.with_grad else None)
        if plan.with_grad:
            grads.add(chunk, grad_GV[: chunk.stop - chunk.start])
    return sums_7N, (grads.hidden_ND, grads.head_VD, grads.bias_V)


def chunked_label_stats(
    side: Side, labels_N: Tensor, budget_gib: float, chunk_tokens: int | None
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood (N,) and rank (N,) of every label."""
    num_rows, vocab = labels_N.numel(), side.head_VD.shape[0]
    logits_dtype = math_dtype(side.hidden_ND.dtype)
    strip_rows = chunk_and_strip_rows(num_rows, 0, vocab * logits_dtype.itemsize, budget_gib, chunk_tokens).strip
    if labels_N.device.type == "cpu" and chunk_tokens is None:  # so that a strip's logits stay in cache
        strip_rows = min(strip_rows, max(64, CPU_BLOCK_ELEMENTS // vocab))
    buffer_CV = _buffer(strip_rows, vocab, logits_dtype, labels_N.device)
    nll_N = torch.empty(num_rows, dtype=torch.float32, device=labels_N.device)
    rank_N = torch.empty(num_rows, dtype=torch.int64, device=labels_N.device)
    for strip in _slices(0, num_rows, strip_rows):
        logits_CV = buffer_CV[: strip.stop - strip.start]
        _write_logits(side, strip, logits_CV)
        nll_N[strip], rank_N[strip] = _label_stats(logits_CV, labels_N[strip])
    return nll_N, rank_N


class ChunkRows(NamedTuple):
    chunk: int
    strip: int


def rows_and_dtypes(
    num_rows: int, vocab: int, compute_dtypes: list[torch.dtype], plan: Plan
) -> tuple[ChunkRows, list[torch.dtype]]:
    """How many rows are in memory at a time, and the dtypes of the logits' buffers (the gradient's not included).

    One buffer for each side; none for the student if the gradient uses the memory of its logits.
    """
    dtypes = [dtype if plan.accuracy == "fast" else math_dtype(dtype) for dtype in compute_dtypes]
    if plan.with_grad and dtypes[0] == plan.student_dtype:
        del dtypes[0]
    grad_bytes = vocab * plan.student_dtype.itemsize if plan.with_grad else 0
    strip_bytes = vocab * sum(dtype.itemsize for dtype in dtypes)
    return chunk_and_strip_rows(num_rows, grad_bytes, strip_bytes, plan.budget_gib, plan.chunk_tokens), dtypes


def chunk_and_strip_rows(
    num_rows: int, grad_row_bytes: int, strip_row_bytes: int, budget_gib: float, chunk_tokens: int | None
) -> ChunkRows:
    """The fewest equal chunks whose gradient fits the budget together with the logits of a strip.

    Each chunk costs a pass over the head's fp32 gradient, each strip only kernel launches. So memory goes to chunks
    first, and the rest to strips.
    """
    if num_rows == 0 or chunk_tokens is not None:
        rows = max(1, min(chunk_tokens or 1, num_rows))
        return ChunkRows(rows, rows)
    strip_bytes = min(num_rows, MIN_STRIP_ROWS) * strip_row_bytes
    least = min(num_rows, MIN_ROWS) * (grad_row_bytes + strip_row_bytes)
    least_with_grad = min(num_rows, MIN_CHUNK_ROWS) * grad_row_bytes + strip_bytes
    budget = max(int(budget_gib * 2**30), least, least_with_grad)
    chunk = num_rows
    if grad_row_bytes > 0:
        chunk = _equal_rows(num_rows, (budget - strip_bytes) // grad_row_bytes)
    if strip_row_bytes == 0:
        return ChunkRows(chunk, chunk)
    return ChunkRows(chunk, _equal_rows(chunk, (budget - chunk * grad_row_bytes) // strip_row_bytes))


def _equal_rows(num_rows: int, fitting_rows: int) -> int:
    """Rows of the fewest equal parts that fit; several parts have whole tiles of the matrix unit."""
    parts = -(-num_rows // max(1, fitting_rows))
    rows = -(-num_rows // parts)
    return rows if parts == 1 else min(-(-rows // TILE_ROWS) * TILE_ROWS, max(1, fitting_rows))


def _slices(start: int, stop: int, rows: int) -> Iterator[slice]:
    return (slice(at, min(at + rows, stop)) for at in range(start, stop, rows))


def _buffer(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(rows, padded_width(vocab, device.type), dtype=dtype, device=device)[:, :vocab]


def padded_width(vocab: int, device: str) -> int:
    """The length of a row of logits in memory, aligned for the matrix units."""
    return vocab if device == "cpu" else -(-vocab // TILE_ROWS) * TILE_ROWS


class GradBuffers:
    """Gradients of one call. The head's is summed over chunks in fp32, as sums in bf16 bias training."""

    def __init__(
        self, student: Side, needs: tuple[bool, ...], dtypes: list[torch.dtype | None], one_chunk: bool
    ) -> None:
        self.student = student
        compute = student.hidden_ND.dtype
        exact = math_dtype(compute)
        # The products can write their inputs' dtype or fp32; backward casts to any other dtype.
        own = [dtype if dtype in (compute, exact) else compute for dtype in dtypes]
        self.hidden_ND = torch.empty_like(student.hidden_ND, dtype=own[0]) if needs[0] else None
        head_dtype = own[1] if one_chunk else exact
        self.head_VD = torch.empty_like(student.head_VD, dtype=head_dtype) if needs[1] else None
        self.bias_V = student.head_VD.new_zeros(student.head_VD.shape[0], dtype=exact) if needs[2] else None
        if student.hidden_ND.shape[0] == 0 and self.head_VD is not None:
            self.head_VD.zero_()  # no chunk will write it

    def add(self, rows: slice, grad_GV: Tensor) -> None:
        hidden_GD = self.student.hidden_ND[rows]
        if self.hidden_ND is not None:
            _mm(grad_GV, self.student.head_VD, self.hidden_ND[rows])
        if self.head_VD is not None and rows.start == 0:
            _mm(grad_GV.t(), hidden_GD, self.head_VD)
        elif self.head_VD is not None:
            _addmm(grad_GV.t(), hidden_GD, self.head_VD)
        if self.bias_V is not None:
            self.bias_V += grad_GV.sum(0, dtype=self.bias_V.dtype)


def cast_side(hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None, dtype: torch.dtype) -> Side:
    bias_V = None if bias_V is None else bias_V.detach().to(math_dtype(dtype))
    return Side(hidden_ND.detach().to(dtype), head_VD.detach().to(dtype), bias_V)


def compute_dtype(hidden_ND: Tensor) -> torch.dtype:
    """The dtype of the products' inputs. Devices other than GPUs upcast bf16: their bf16 products cannot write fp32."""
    device = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ConfigError(
            f"the loss computes in fp32 or bf16, not {dtype}; use --trainer.precision bf16-mixed, or 32-true on a card "
            "without bf16 (called directly: cast the hidden states)"
        )
    return torch.float32 if device not in ("cuda", "xpu") and dtype == torch.bfloat16 else dtype


def _write_logits(side: Side, rows: slice, logits_CV: Tensor) -> None:
    logits_CV = logits_CV[:, : side.head_VD.shape[0]]
    _mm(side.hidden_ND[rows], side.head_VD.t(), logits_CV)
    if side.bias_V is not None:
        logits_CV += side.bias_V


def _mm(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor) -> None:
    if a_MK.dtype == out_MN.dtype:
        torch.mm(a_MK, b_KN, out=out_MN)
    else:
        torch.mm(a_MK, b_KN, out_dtype=out_MN.dtype, out=out_MN)


def _addmm(a_MK: Tensor, b_KN: Tensor, sum_MN: Tensor) -> None:
    if a_MK.dtype == sum_MN.dtype:
        sum_MN.addmm_(a_MK, b_KN)
    else:
        torch.addmm(sum_MN, a_MK, b_KN, out_dtype=sum_MN.dtype, out=sum_MN)


def scale_and_cast(grad: Tensor | None, by: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    if grad is None:
        return None
    if grad.dtype != dtype:
        return torch.mul(grad, by, out=torch.empty_like(grad, dtype=dtype))  # scales and casts in one pass
    kernels = _kernels(grad)
    return grad.mul_(by) if kernels is None else kernels.scale_in_place(grad, by)


# ---- which row pass ----------------------------------------------------------------------


def _fill_rows(logits: list[Tensor], labels_C: Tensor, mix: Mix, sums_7C: Tensor, grad_CV: Tensor | None) -> None:
    """Fills the sums and, unless None, the gradient, which may share memory with the student's logits."""
    kernels = _kernels(*logits)
    if kernels is not None:
        return kernels.fill_rows(logits, labels_C, mix, sums_7C, grad_CV)
    for block in _blocks(logits[0]):
        teacher_CV = logits[1][block] if len(logits) > 1 else None
        sums, grad = row_pass(logits[0][block], teacher_CV, labels_C[block], mix, grad_CV is not None)
        sums_7C[:, block] = sums
        if grad_CV is not None and grad is not None:
            grad_CV[block] = grad


def _label_stats(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    kernels = _kernels(logits_CV)
    if kernels is not None:
        return kernels.label_stats(logits_CV, labels_C)
    blocks = [label_stats(logits_CV[block], labels_C[block]) for block in _blocks(logits_CV)]
    nlls, ranks = zip(*blocks, strict=True)
    return torch.cat(nlls), torch.cat(ranks)


def _kernels(*tensors: Tensor) -> ModuleType | None:
    """The Triton kernels, if they can handle these tensors; they compute in fp32."""
    fitting = all(t.device.type == "cuda" and t.dtype in (torch.float32, torch.bfloat16) for t in tensors)
    return _triton_rows() if fitting else None


@functools.cache
def _triton_rows() -> ModuleType | None:
    """The kernels' module; None, with a warning, if they do not run here or compute wrong values."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        kernels = importlib.import_module("salt_lightning.head.triton_rows")
        reason = kernels.fault(torch.device("cuda"))
    except Exception as error:  # Triton does not fit this torch or card, or finds no C compiler
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {first_line(error)[:200]}"
    if reason is None:
        return kernels
    warnings.warn(f"the loss runs without its Triton kernels, which is slower: {reason}", stacklevel=2)
    return None


def _blocks(logits_CV: Tensor) -> Iterator[slice]:
    """Rows for one eager pass: its temporaries stay in a CPU's cache, or small compared with the chunk."""
    num_rows, vocab = logits_CV.shape
    elements = CPU_BLOCK_ELEMENTS if logits_CV.device.type == "cpu" else GPU_BLOCK_ELEMENTS
    return _slices(0, num_rows, max(1, elements // vocab))
