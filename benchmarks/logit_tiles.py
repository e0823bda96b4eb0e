"""Candidates for the head: a loss over 16-bit logits with the gradient error of 32 bits, and scores without logits.

    python benchmarks/logit_tiles.py             one GPU, under 4 minutes: errors, rate of the product, time of both
    python benchmarks/logit_tiles.py --tiny      any CPU: only errors, of the same code under Triton's interpreter
    python benchmarks/logit_tiles.py --errors    any CPU: errors of formats for logits, in plain PyTorch

bf16 and fp16 spend their digits on a logit's distance from 0, but the softmax needs its distance from the largest
logit. A tile of the product knows the largest logit of each of its rows, so it stores how far each logit is below it,
without a sign: 5 bits of exponent, 11 of fraction. Where a probability is large, the distance and its error are small.
The tile also stores the sum of its exponentials, so the row pass reads 2 x 2 bytes per token and entry once, and
writes the gradient in their place: it moves 10 bytes instead of 26 with fp32 logits, or 14 with bf16.

For scoring no logit is stored: with the label's logit known beforehand, a tile leaves three numbers for each row, its
largest logit, its sum of exponentials, and how many logits are above the label's (among equal rows of the head, as in
padding, rounding decides which are).

This is not part of the library: it is to be compared with `salt_loss` and `token_stats` on a GPU, and replaces what it
beats.
Shapes: C rows, V vocabulary, D width, S tiles of the vocabulary.
"""
# ruff: noqa: ANN001, ANN202, PLR0913  (the launch gives a kernel's arguments their types)

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import head_loss

from salt_lightning.losses import token_stats

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

IGNORE, IGNORED_RANK = -100, -1
BLOCK, WARPS = 2048, 8  # row pass: 62 registers per thread on sm_90 (Triton 3.6), so four rows share a multiprocessor
LOG2E = 1.4426950408889634
DOWN, UP = 2.0**-112, 2.0**112  # 5 bits of exponent out of 8, and back


@dataclass(frozen=True)
class Tiling:
    """Tile size of the product: rows, vocabulary entries, width; `group`: row tiles that share the L2 cache."""

    rows: int
    columns: int
    width: int
    group: int
    warps: int
    stages: int


# Under Triton 3.6 all but the first spill registers on sm_90: 80, 96 and 216 bytes per thread.
TILINGS = (
    Tiling(128, 128, 64, 8, 8, 4),
    Tiling(128, 128, 64, 8, 4, 4),
    Tiling(256, 128, 64, 8, 8, 3),
    Tiling(128, 256, 64, 8, 8, 3),
    Tiling(128, 256, 64, 8, 8, 4),
    Tiling(128, 256, 64, 16, 8, 4),
)


@dataclass
class Side:
    """One model's logits as the product stores them."""

    code_CV: Tensor  # uint16: distance below the tile's largest logit
    max_CS: Tensor
    sum_CS: Tensor  # of exp(logit - max)
    soft_CS: Tensor  # of exp((logit - max) / T); the same tensor if T is 1
    label_C: Tensor  # the label's logit


if triton is not None:

    @triton.jit
    def _encode(distance):
        """A distance >= 0 as 5 bits of exponent and 11 of fraction, rounded to nearest; too large ones saturate."""
        bits = (distance * 1.925929944387236e-34).to(tl.uint32, bitcast=True)  # 2^-112
        return tl.minimum((bits + 0x7FF + ((bits >> 12) & 1)) >> 12, 0xFFFF).to(tl.uint16)

    @triton.jit
    def _decode(code):
        return (code.to(tl.uint32) << 12).to(tl.float32, bitcast=True) * 5.192296858534828e33  # 2^112

    @triton.jit
    def _product_kernel(
        hidden, head, labels, code, maxima, sums, softs, label_logits, above,
        num_rows, vocab, width, hidden_stride, head_stride, code_stride, tile_stride, soft,
        RANK: tl.constexpr, SOFTENED: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        # RANK: reads label_logits and counts the logits above them, in place of code. Otherwise it writes both.
        # Neighboring programs share rows and columns, which then come from the L2 cache.
        program = tl.program_id(0)
        row_tiles, column_tiles = tl.cdiv(num_rows, ROWS), tl.cdiv(vocab, COLUMNS)
        group = program // (GROUP * column_tiles)
        group_rows = tl.minimum(row_tiles - group * GROUP, GROUP)
        within = program % (GROUP * column_tiles)
        row_tile, column_tile = group * GROUP + within % group_rows, within // group_rows
        at_row = row_tile * ROWS + tl.arange(0, ROWS)
        at_column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        lanes = tl.arange(0, WIDTH)
        rows = tl.where(at_row < num_rows, at_row, 0).to(tl.int64)  # reading any row is cheaper than masking every load
        columns = tl.where(at_column < vocab, at_column, 0).to(tl.int64)
        left = hidden + rows[:, None] * hidden_stride + lanes[None, :]
        right = head + columns[None, :] * head_stride + lanes[:, None]
        logits = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, width, WIDTH):
            rest = width - start
            a = tl.load(left, mask=lanes[None, :] < rest, other=0.0)
            b = tl.load(right, mask=lanes[:, None] < rest, other=0.0)
            logits = tl.dot(a, b, logits)
            left += WIDTH
            right += WIDTH
        inside = at_row < num_rows
        known = at_column < vocab
        label = tl.load(labels + at_row, mask=inside, other=-1)
        found = at_column[None, :] == label[:, None]
        if not RANK:
            label_logit = tl.sum(tl.where(found, logits, 0.0), 1)
            here = (label >= column_tile * COLUMNS) & (label < (column_tile + 1) * COLUMNS) & (label < vocab)
            tl.store(label_logits + at_row, label_logit, mask=inside & here)
        logits = tl.where(known[None, :], logits, -1.0e30)
        largest = tl.max(logits, 1)
        distance = largest[:, None] - logits
        at_tile = column_tile.to(tl.int64) * tile_stride + at_row
        tl.store(maxima + at_tile, largest, mask=inside)
        tl.store(sums + at_tile, tl.sum(tl.exp2(distance * -1.4426950408889634), 1), mask=inside)
        if SOFTENED:
            tl.store(softs + at_tile, tl.sum(tl.exp2(distance * -soft), 1), mask=inside)
        if RANK:  # the label's own logit was summed in another order
            label_logit = tl.load(label_logits + at_row, mask=inside, other=0.0)
            higher = (logits > label_logit[:, None]) & (at_column[None, :] != label[:, None])
            tl.store(above + at_tile, tl.sum(higher.to(tl.int32), 1), mask=inside)
        else:
            target = code + at_row.to(tl.int64)[:, None] * code_stride + at_column[None, :]
            tl.store(target, _encode(distance), mask=inside[:, None] & known[None, :])

    @triton.jit
    def _row_kernel(
        s_code, s_maxima, s_sums, s_label, t_code, t_maxima, t_sums, t_softs, t_label, labels, out, kd_weight, scale,
        vocab, code_stride, tile_stride, out_stride, inverse_temperature,
        TEACHER: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        label = tl.load(labels + row)
        lanes = tl.arange(0, BLOCK)
        s_code += row * code_stride
        t_code += row * code_stride
        grad = s_code.to(tl.pointer_type(tl.bfloat16))  # overwrites the student's codes
        out += row
        if label == -100:
            for i in range(7):
                tl.store(out + i * out_stride, 0.0)
            for start in range(0, vocab, BLOCK):
                tl.store(grad + start + lanes, tl.zeros([BLOCK], tl.bfloat16), mask=start + lanes < vocab)
        else:
            tiles = tl.arange(0, TILES)
            real = tiles < tl.cdiv(vocab, COLUMNS)
            at_tile = tiles.to(tl.int64) * tile_stride + row
            weight, row_scale, label_logit = tl.load(kd_weight), tl.load(scale), tl.load(s_label + row)
            maxima = tl.load(s_maxima + at_tile, mask=real, other=-1.0e30)
            s_max = tl.max(maxima, 0)
            total = tl.load(s_sums + at_tile, mask=real, other=0.0) * tl.exp2((maxima - s_max) * 1.4426950408889634)
            s_lse = s_max + tl.log(tl.sum(total, 0))
            nll = s_lse - label_logit
            tl.store(out, nll)
            tl.store(out + 5 * out_stride, (label_logit >= s_max).to(tl.float32))
            t_max = 0.0
            t_lse = 0.0
            if TEACHER:
                maxima = tl.load(t_maxima + at_tile, mask=real, other=-1.0e30)
                t_max = tl.max(maxima, 0)
                fade = (maxima - t_max) * 1.4426950408889634
                total = tl.sum(tl.load(t_sums + at_tile, mask=real, other=0.0) * tl.exp2(fade), 0)
                t_nll = t_max + tl.log(total) - tl.load(t_label + row)
                soft = tl.load(t_softs + at_tile, mask=real, other=0.0) * tl.exp2(fade * inverse_temperature)
                t_lse = t_max * inverse_temperature + tl.log(tl.sum(soft, 0))
                tl.store(out + 2 * out_stride, t_nll)
                tl.store(out + 6 * out_stride, (nll < t_nll).to(tl.float32))
            cross = 0.0
            entropy = 0.0
            agree = tl.zeros([BLOCK], tl.int32)
            for start in range(0, vocab, BLOCK):
                at = start + lanes
                inside = at < vocab
                tile = (at // COLUMNS).to(tl.int64) * tile_stride + row
                s = tl.load(s_maxima + tile, mask=inside, other=-1.0e30) - _decode(
                    tl.load(s_code + at, mask=inside, other=0)
                )
                d = tl.exp2((s - s_lse) * 1.4426950408889634) * row_scale
                d -= tl.where(at == label, row_scale * (1.0 - weight), 0.0)
                if TEACHER:
                    t = tl.load(t_maxima + tile, mask=inside, other=-1.0e30) - _decode(
                        tl.load(t_code + at, mask=inside, other=0)
                    )
                    log_q = t * inverse_temperature - t_lse
                    q = tl.exp2(log_q * 1.4426950408889634)
                    cross += tl.sum(q * (s_lse - s), 0)
                    entropy -= tl.sum(q * log_q, 0)
                    agree |= (inside & (s == s_max) & (t == t_max)).to(tl.int32)
                    d -= q * (row_scale * weight)
                tl.store(grad + at, d.to(tl.bfloat16), mask=inside)
            tl.store(out + out_stride, cross)
            tl.store(out + 3 * out_stride, entropy)
            tl.store(out + 4 * out_stride, tl.max(agree, 0).to(tl.float32))
            if not TEACHER:
                tl.store(out + 2 * out_stride, 0.0)
                tl.store(out + 6 * out_stride, 0.0)


def product(hidden_CD: Tensor, head_VD: Tensor, labels_C: Tensor, temperature: float, tiling: Tiling) -> Side:
    num_rows, vocab = hidden_CD.shape[0], head_VD.shape[0]
    empty = {"device": hidden_CD.device, "dtype": torch.float32}
    max_SC, sum_SC = (torch.empty(-(-vocab // tiling.columns), num_rows, **empty) for _ in range(2))
    soft_SC = sum_SC if temperature == 1 else torch.empty_like(sum_SC)
    # bf16 products on CPUs with AMX read beyond the end of a row, where a NaN would spoil them.
    padded = vocab if hidden_CD.device.type == "cpu" else -(-vocab // 128) * 128
    code_CV = torch.empty(num_rows, padded, dtype=torch.uint16, device=hidden_CD.device)[:, :vocab]
    label_C = torch.empty(num_rows, **empty)
    _launch(hidden_CD, head_VD, labels_C, code_CV, (max_SC, sum_SC, soft_SC, label_C, None), temperature, tiling)
    return Side(code_CV, max_SC, sum_SC, soft_SC, label_C)


def _launch(
    hidden_CD: Tensor, head_VD: Tensor, labels_C: Tensor, code_CV: Tensor | None, tile_sums: tuple[Tensor | None, ...],
    temperature: float, tiling: Tiling,
) -> None:  # fmt: skip
    (num_rows, width), vocab = hidden_CD.shape, head_VD.shape[0]
    if hidden_CD.device.type == "cpu":  # the interpreter multiplies bf16 values as if they were integers
        hidden_CD, head_VD = hidden_CD.float(), head_VD.float()
    _product_kernel[(-(-num_rows // tiling.rows) * -(-vocab // tiling.columns),)](
        hidden_CD, head_VD, labels_C, code_CV, *tile_sums,
        num_rows, vocab, width, hidden_CD.stride(0), head_VD.stride(0), 0 if code_CV is None else code_CV.stride(0),
        num_rows, LOG2E / temperature, RANK=code_CV is None, SOFTENED=temperature != 1, ROWS=tiling.rows,
        COLUMNS=tiling.columns, WIDTH=tiling.width, GROUP=tiling.group, num_warps=tiling.warps,
        num_stages=tiling.stages,
    )  # fmt: skip


def label_stats(hidden_CD: Tensor, head_VD: Tensor, labels_C: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """What `token_stats` returns, negative log-likelihood and rank of every label, without storing a logit."""
    known_C = labels_C != IGNORE
    label_C = (hidden_CD.float() * head_VD[labels_C.where(known_C, 0)].float()).sum(1)
    empty = {"device": hidden_CD.device, "dtype": torch.float32}
    max_SC, sum_SC = (torch.empty(-(-len(head_VD) // tiling.columns), len(label_C), **empty) for _ in range(2))
    above_SC = torch.empty_like(sum_SC, dtype=torch.int32)
    _launch(hidden_CD, head_VD, labels_C, None, (max_SC, sum_SC, sum_SC, label_C, above_SC), 1.0, tiling)
    max_C = max_SC.amax(0)
    nll_C = max_C + (sum_SC * (max_SC - max_C).exp()).sum(0).log() - label_C
    return nll_C.where(known_C, 0.0), above_SC.sum(0).where(known_C, IGNORED_RANK)


def row_pass(
    student: Side, teacher: Side | None, labels_C: Tensor, kd_weight: Tensor, scale: Tensor, temperature: float,
    tiling: Tiling,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums (7, C) in the order of SaltLoss, and the gradient (C, V), which overwrites the student's codes."""
    other, (num_rows, vocab) = teacher or student, student.code_CV.shape
    sums_7C = torch.empty(7, num_rows, device=labels_C.device)
    _row_kernel[(num_rows,)](
        student.code_CV, student.max_CS, student.sum_CS, student.label_C,
        other.code_CV, other.max_CS, other.sum_CS, other.soft_CS, other.label_C, labels_C, sums_7C, kd_weight, scale,
        vocab, student.code_CV.stride(0), num_rows, num_rows, 1 / temperature,
        TEACHER=teacher is not None, TILES=triton.next_power_of_2(-(-vocab // tiling.columns)), COLUMNS=tiling.columns,
        BLOCK=min(BLOCK, triton.next_power_of_2(vocab)), num_warps=WARPS,
    )  # fmt: skip
    return sums_7C, student.code_CV.view(torch.bfloat16)


# ---- the loss from these


def candidate(case: head_loss.Case, temperature: float, tiling: Tiling, budget_gib: float = 2.0) -> list[Tensor]:
    """Returns loss, gradients of hidden states and head, and the seven sums, without autograd."""
    hidden_ND, head_VD = case.hidden_ND.detach(), case.head_VD.detach()
    (num_rows, _), vocab = hidden_ND.shape, head_VD.shape[0]
    scale = (case.labels_N != IGNORE).sum().float().reciprocal()
    kd_weight = torch.full_like(scale, case.kd_weight)
    chunks = -(-num_rows * vocab * 4 // int(budget_gib * 2**30))
    size = min(num_rows, max(2048, -(-num_rows // chunks // 128) * 128))
    d_hidden_ND = torch.empty_like(hidden_ND)
    exact = {} if size == num_rows else {"dtype": torch.float32}
    d_head_VD, sums_7N = torch.empty_like(head_VD, **exact), torch.empty(7, num_rows, device=hidden_ND.device)
    for at in range(0, num_rows, size):
        part = slice(at, at + size)
        labels_C = case.labels_N[part]
        student = product(hidden_ND[part], head_VD, labels_C, 1.0, tiling)
        teacher = product(case.teacher_hidden_NE[part], case.teacher_head_VE, labels_C, temperature, tiling)
        sums_7N[:, part], grad_CV = row_pass(student, teacher, labels_C, kd_weight, scale, temperature, tiling)
        torch.mm(grad_CV, head_VD, out=d_hidden_ND[part])
        if d_head_VD.dtype == grad_CV.dtype:
            torch.mm(grad_CV.t(), hidden_ND[part], out=d_head_VD)
        elif at == 0:
            torch.mm(grad_CV.t(), hidden_ND[part], out_dtype=torch.float32, out=d_head_VD)
        else:
            torch.addmm(d_head_VD, grad_CV.t(), hidden_ND[part], out_dtype=torch.float32, out=d_head_VD)
    sums_7 = sums_7N.sum(1)
    loss = ((1 - kd_weight) * sums_7[0] + kd_weight * sums_7[1]) * scale
    return [loss, d_hidden_ND, d_head_VD, sums_7]


# ---- errors of formats, without a GPU


def coded(logits_CV: Tensor, columns: int, unsigned: bool) -> Tensor:
    """Logits after storing them in 16 bits as distances from their tile's largest."""
    tiles_CST = torch.nn.functional.pad(logits_CV, (0, -logits_CV.shape[1] % columns), value=-math.inf)
    tiles_CST = tiles_CST.unflatten(1, (-1, columns))
    max_CS1 = tiles_CST.amax(2, keepdim=True)
    distance = max_CS1 - tiles_CST
    if unsigned:
        bits = (distance.clamp(max=1e5).float() * DOWN).view(torch.int32)
        distance = (((bits + 0x7FF + ((bits >> 12) & 1)) >> 12 << 12).view(torch.float32) * UP).to(distance.dtype)
    else:
        distance = distance.half().to(distance.dtype)
    return (max_CS1.float() - distance).flatten(1)[:, : logits_CV.shape[1]]


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "fp32": lambda z: z.float().double(),
    "bf16": lambda z: z.bfloat16().double(),
    "fp16": lambda z: z.half().double(),
}
TILED: dict[str, Callable[[Tensor], Tensor]] = {
    "fp16, distance to the largest of a row": lambda z: coded(z, z.shape[1], unsigned=False),
    "fp16, distance to the largest of 256 entries": lambda z: coded(z, 256, unsigned=False),
    "5 + 11 bits without a sign, the same": lambda z: coded(z, 256, unsigned=True),
}


def logit_gradient(logits: list[Tensor], summed: list[Tensor], case: head_loss.Case, temperature: float) -> Tensor:
    """Gradient of the loss by the student's logits (C, V), with the softmax sums taken from `summed`."""
    s_lse_C1, t_lse_C1 = summed[0].logsumexp(1, keepdim=True), (summed[1] / temperature).logsumexp(1, keepdim=True)
    w, labels_C1 = case.kd_weight, case.labels_N[:, None]
    grad_CV = (logits[0] - s_lse_C1).exp() - w * (logits[1] / temperature - t_lse_C1).exp()
    grad_CV.scatter_add_(1, labels_C1, torch.full_like(grad_CV[:, :1], w - 1))
    return grad_CV / len(grad_CV)


def format_table() -> Iterator[str]:
    """Table of errors relative to those of fp32 logits; the logits' gradient and the results are rounded to bf16.

    Softmax sums come from the stored logits for a plain format, and from the unrounded product for a tiled one.
    """
    yield "| logits stored as | " + " | ".join(f"{n}, T {t:g}" for n, t in CASES) + " |"
    yield "|---|" + "---:|" * len(CASES)
    rows: dict[str, list[str]] = {name: [] for name in PLAIN | TILED}
    for noise, temperature in CASES:
        case = shaken(head_loss.Case.make(512, (256, 192, 8000), "cpu", torch.bfloat16), noise)
        hidden_ND, head_VD = case.hidden_ND.detach().double(), case.head_VD.detach().double()
        exact = [hidden_ND @ head_VD.T, case.teacher_hidden_NE.double() @ case.teacher_head_VE.double().T]
        true_CV = logit_gradient(exact, exact, case, temperature)
        true = true_CV @ head_VD, true_CV.T @ hidden_ND
        base: list[float] = []
        for name, stored in (PLAIN | TILED).items():
            kept = [stored(z) for z in exact]
            summed = kept if name in PLAIN else exact
            rounded_CV = logit_gradient(kept, summed, case, temperature).bfloat16().double()
            got = rounded_CV @ head_VD, rounded_CV.T @ hidden_ND
            errors = head_loss.errors([g.bfloat16().double() for g in got], list(true))
            base = base or errors
            rows[name].append(f"{max(e / b for e, b in zip(errors, base, strict=True)):.2f}")
    for name, values in rows.items():
        yield f"| {name} | " + " | ".join(values) + " |"


CASES = (("unrelated", 1.0), ("unrelated", 0.25), ("30%", 1.0), ("3%", 1.0), ("3%", 0.25), ("1%", 1.0))


def shaken(case: head_loss.Case, noise: str) -> head_loss.Case:
    """Makes the teacher a copy of the student with this much noise in hidden states and head."""
    if noise == "unrelated":
        return case
    part = float(noise.rstrip("%")) / 100

    def with_noise(t: Tensor, seed: int) -> Tensor:
        drawn = torch.randn(t.shape, generator=torch.Generator().manual_seed(seed)).to(t.device)
        return (t.detach().float() + part * t.detach().float().std() * drawn).to(t.dtype)

    case.teacher_hidden_NE, case.teacher_head_VE = with_noise(case.hidden_ND, 2), with_noise(case.head_VD, 3)
    case.kd_weight = 1.0
    return case


# ---- on a GPU


def check(device: str, num_rows: int, sizes: tuple[int, int, int], tiling: Tiling) -> Iterator[str]:
    """Table of errors of loss, sums and gradients relative to `salt_loss` in float64 on the same values."""
    for noise, temperature in (("unrelated", 1.0), ("unrelated", 2.0), ("3%", 1.0)):
        case = shaken(head_loss.Case.make(num_rows, sizes, device, torch.bfloat16).masked(), noise)
        exact = [t.double() for t in reference(case, temperature, torch.float64)]
        got = [t.double() for t in candidate(case, temperature, tiling)]
        errors = head_loss.errors(got[:3], exact[:3])
        sums = ((got[3] - exact[3]).abs() / exact[3].abs().clamp(min=1)).max()
        ratio = math.nan
        if temperature == 1 and device == "cuda":  # CPUs have no bf16 product with fp32 output
            naive = head_loss.errors(head_loss.results(head_loss.naive_fp32_logits, case)[1:], exact[1:3])
            ratio = max(e / n for e, n in zip(errors[1:], naive, strict=True))
        shown = " | ".join(f"{e:.1e}" for e in (*errors, sums))
        yield f"| {noise}, T {temperature:g} | {shown} | {ratio:.2f} |"
        assert max(errors) < 2e-2, errors
        assert sums < 1e-3, (got[3], exact[3])


def reference(case: head_loss.Case, temperature: float, dtype: torch.dtype) -> list[Tensor]:
    hidden_ND, head_VD = (t.detach().to(dtype).requires_grad_() for t in (case.hidden_ND, case.head_VD))
    out = head_loss.salt_loss(
        hidden_ND, head_VD, case.labels_N, case.teacher_hidden_NE.to(dtype), case.teacher_head_VE.to(dtype),
        case.kd_weight, temperature,
    )  # fmt: skip
    out.loss.backward()
    assert hidden_ND.grad is not None
    assert head_VD.grad is not None
    return [out.loss.detach(), hidden_ND.grad, head_VD.grad, torch.stack(out[1:8])]


def check_stats(device: str, num_rows: int, sizes: tuple[int, int, int], tiling: Tiling) -> Iterator[str]:
    """A row of errors of loss and rank relative to `token_stats` in float64 on the same values."""
    case = head_loss.Case.make(num_rows, sizes, device, torch.bfloat16).masked()
    hidden_ND, head_VD, labels_N = case.hidden_ND.detach(), case.head_VD.detach(), case.labels_N
    labels_N[1::3] = (hidden_ND.double() @ head_VD.double().T).argmax(1)[1::3]  # as after training
    nll_N, rank_N = label_stats(hidden_ND, head_VD, labels_N, tiling)
    exact_N, exact_rank_N = token_stats(hidden_ND.double(), head_VD.double(), labels_N)
    error, wrong = (nll_N - exact_N).abs().max().item(), (rank_N != exact_rank_N).double().mean().item()
    yield f"\nScores: largest error of a loss {error:.1e} nats; {wrong:.2%} of the ranks differ"
    assert error < 1e-4, (nll_N, exact_N)
    assert wrong < 0.01, (rank_N, exact_rank_N)  # fp32 cannot tell apart about 0.2% at 8,000 entries


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call; the calls alternate."""
    times = [{name: head_loss.timed(call, True) for name, call in calls.items()} for _ in range(rounds)]
    return {name: statistics.median(t[name] for t in times) for name in calls}


def speed(num_rows: int, sizes: tuple[int, int, int], rounds: int) -> Iterator[str]:
    case = head_loss.Case.make(num_rows, sizes, "cuda", torch.bfloat16)
    hidden_ND, head_VD, labels_N = case.hidden_ND.detach(), case.head_VD.detach(), case.labels_N
    part = slice(0, 2048 if sizes[2] > 100_000 else num_rows)
    calls: dict[str, Callable[[], object]] = {"cuBLAS, bf16 logits": lambda: hidden_ND[part] @ head_VD.T}
    for tiling in TILINGS:
        calls[str(tiling)] = lambda tiling=tiling: product(hidden_ND[part], head_VD, labels_N[part], 1.0, tiling)
    flops = 2 * len(hidden_ND[part]) * head_VD.numel()
    yield f"\nStudent width, teacher width, vocabulary {sizes}; {num_rows} rows, products of {len(hidden_ND[part])}\n"
    yield "| the student's product | ms | TFLOP/s | GiB |\n|---|---:|---:|---:|"
    peaks: dict[str, float] = {}
    yield from head_loss.first_calls(calls, peaks, True)
    times = medians(calls, rounds)
    for name, ms in times.items():
        yield f"| {name} | {ms:.3f} | {flops / ms / 1e9:.0f} | {peaks[name]:.2f} |"
    best = min((t for t in TILINGS if str(t) in times), key=lambda t: times[str(t)], default=TILINGS[0])
    calls = {
        "floor": lambda: head_loss.floor(case),
        "salt_loss, accurate": lambda: head_loss.forward_backward(head_loss.ours, case),
        "salt_loss, fast": lambda: head_loss.forward_backward(lambda c: head_loss.ours(c, accuracy="fast"), case),
        "candidate": lambda: candidate(case, 1.0, best),
    }
    yield "\n| loss and gradients | ms | x floor | GiB |\n|---|---:|---:|---:|"
    peaks = {}
    yield from head_loss.first_calls(calls, peaks, True)
    times = medians(calls, rounds)
    for name, ms in times.items():
        yield f"| {name} | {ms:.2f} | {ms / times['floor']:.2f} | {peaks[name]:.2f} |"


def stats_speed(num_rows: int, width: int, vocab: int, rounds: int) -> Iterator[str]:
    """Time of scoring: the bf16 logits alone, which any forward pass makes, and what adds loss and rank to them."""
    case = head_loss.Case.make(num_rows, (width, 8, vocab), "cuda", torch.bfloat16)
    hidden_ND, head_VD, labels_N = case.hidden_ND.detach(), case.head_VD.detach(), case.labels_N
    calls: dict[str, Callable[[], object]] = {
        "bf16 logits": lambda: [part_CD @ head_VD.T for part_CD in hidden_ND.split(4096)],
        "token_stats": lambda: token_stats(hidden_ND, head_VD, labels_N),
    }
    for tiling in TILINGS[:4]:
        calls[str(tiling)] = lambda tiling=tiling: label_stats(hidden_ND, head_VD, labels_N, tiling)
    yield f"\n| scoring {num_rows} rows, width {width}, {vocab} entries | ms | x logits | GiB |\n|---|---:|---:|---:|"
    peaks: dict[str, float] = {}
    yield from head_loss.first_calls(calls, peaks, True)
    times = medians(calls, rounds)
    for name, ms in times.items():
        yield f"| {name} | {ms:.2f} | {ms / times['bf16 logits']:.2f} | {peaks[name]:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="check errors under Triton's interpreter, on a CPU")
    parser.add_argument("--errors", action="store_true", help="print only the errors of formats for logits")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--deadline", type=float, default=240, help="seconds after which no further table is started")
    args = parser.parse_args()
    deadline_s = time.monotonic() + args.deadline
    if args.errors:
        print("\n".join(format_table()))
        return
    print(f"{'CPU' if args.tiny else torch.cuda.get_device_name()}, {head_loss.versions()}\n")
    print("| teacher | loss | d hidden | d head | sums | larger gradient error / naive fp32 logits |")
    print("|---|---:|---:|---:|---:|---:|")
    tiny = "cpu", 40, (64, 48, 500), Tiling(16, 64, 32, 2, 4, 1)
    tables = [check(*tiny), check_stats(*tiny)]
    if not args.tiny:
        at = "cuda", 512, (256, 192, 8000), TILINGS[0]
        tables = [check(*at), check_stats(*at)]
        tables += [speed(args.rows, sizes, args.rounds) for sizes in head_loss.SIZES]
        tables += [stats_speed(*size, args.rounds) for size in ((32768, 512, 50304), (8192, 2048, 256000))]
    for table in tables:
        if time.monotonic() > deadline_s:
            print("\nskipped: the deadline has passed", flush=True)
            continue
        try:
            for line in table:
                print(line, flush=True)
        except Exception:
            if args.tiny:
                raise
            traceback.print_exc()  # continue with the next table


if __name__ == "__main__":
    main()
