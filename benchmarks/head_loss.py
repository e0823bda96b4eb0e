"""The head loss compared with its floor and its competitors: time, memory and error, all in one process.

    python benchmarks/head_loss.py             one GPU, under 9 minutes; without one the first size on the CPU, in fp32
    python benchmarks/head_loss.py --tiny      any CPU, seconds: shows that it runs

The tables include Liger's and TRL's losses if liger-kernel and trl are installed.

The floor is the matrix products alone (four with a teacher, three without). Times are medians of rounds in which
all variants alternate, so that drift of the GPU cancels; the claim is the ratios to the floor. "Without the row
pass" is our own products in our own chunks: a row's excess over it is the row pass, and its own excess over the floor
is chunking. Errors are relative to float64, in memory that was filled with NaN before.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, softmax

sys.path.insert(0, str(Path(__file__).parents[1]))
from salt_lightning.head import chunked_head
from salt_lightning.losses import salt_loss

WEIGHT = 0.667
BUFFER = chunked_head._buffer
SIZES = ((768, 512, 50304), (2048, 1024, 50304), (2560, 2048, 256000))  # student width, teacher width, vocabulary


@dataclass
class Case:
    hidden_ND: Tensor
    head_VD: Tensor
    labels_N: Tensor
    teacher_hidden_NE: Tensor
    teacher_head_VE: Tensor
    kd_weight: float

    @classmethod
    def make(cls, num_rows: int, sizes: tuple[int, int, int], device: str, dtype: torch.dtype) -> Case:
        """Two unrelated models, logits of standard deviation 3, every label valid."""
        d, e, vocab = sizes
        draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
        hidden_ND, head_VD = draw(num_rows, d).to(dtype), (draw(vocab, d) * 3 / math.sqrt(d)).to(dtype)
        taught = draw(num_rows, e).to(dtype), (draw(vocab, e) * 3 / math.sqrt(e)).to(dtype)
        labels_N = torch.randint(vocab, (num_rows,), generator=torch.Generator().manual_seed(1)).to(device)
        return cls(hidden_ND.requires_grad_(), head_VD.requires_grad_(), labels_N, *taught, WEIGHT)

    def masked(self) -> Case:
        """Ignores every tenth label."""
        self.labels_N[::10] = -100
        return self

    def wide(self) -> Case:
        """The same in float64: the gradient of a 16-bit tensor would be rounded to 16 bits, whatever computed it."""
        hidden_ND, head_VD = (t.detach().double().requires_grad_() for t in (self.hidden_ND, self.head_VD))
        return replace(self, hidden_ND=hidden_ND, head_VD=head_VD)

    def near(self) -> Case:
        """Makes the teacher a copy of the student with 3% noise, and the loss KD alone."""

        def shaken(t: Tensor) -> Tensor:
            noise = torch.randn(t.shape, generator=torch.Generator().manual_seed(2)).to(t.device)
            return (t.detach().float() + 0.03 * t.detach().float().std() * noise).to(t.dtype)

        self.teacher_hidden_NE, self.teacher_head_VE = shaken(self.hidden_ND), shaken(self.head_VD)
        self.kd_weight = 1.0
        return self


Loss = Callable[[Case], Tensor]


# ---- the variants


def ours(case: Case, teacher: bool = True, **options: Any) -> Tensor:
    taught = (case.teacher_hidden_NE, case.teacher_head_VE, case.kd_weight) if teacher else ()
    return salt_loss(case.hidden_ND, case.head_VD, case.labels_N, *taught, **options).loss


def with_plain_rows(case: Case, compiled: bool = False, **options: Any) -> Tensor:
    """Our loss without the Triton kernels: eager, or one compiled graph for all rows of a strip."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(chunked_head, "_triton_rows", lambda: None))
        if compiled:
            stack.enter_context(patch.object(chunked_head, "_fill_rows", compiled_fill))
        return ours(case, **options)


def without_rows(case: Case, grad_buffer: Callable[..., Tensor] = BUFFER, **options: Any) -> Tensor:
    """Our loss without the row pass. `grad_buffer` makes the gradient, as a product's time depends on its values."""

    def buffer(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return (grad_buffer if dtype == case.head_VD.dtype else BUFFER)(rows, vocab, dtype, device)

    with patch.multiple(chunked_head, _fill_rows=lambda *_: None, _buffer=buffer):
        return ours(case, **options)


@functools.partial(torch.compile, dynamic=False)
def compiled_fill(logits: list[Tensor], labels_C: Tensor, mix: Any, sums_7C: Tensor, grad_CV: Tensor | None) -> None:
    """As chunked_head's, but one graph: it also casts the gradient and writes it where it belongs."""
    teacher_CV = logits[1] if len(logits) > 1 else None
    sums, grad = chunked_head.row_pass(logits[0], teacher_CV, labels_C, mix, grad_CV is not None)
    sums_7C.copy_(sums)
    if grad_CV is not None:
        grad_CV.copy_(grad)


class Fp32Logits(torch.autograd.Function):
    """fp32 logits of 16-bit inputs; their gradient is rounded for the products, as in any 16-bit training."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_ND, head_VD)
        if hidden_ND.dtype == torch.float32:
            return hidden_ND @ head_VD.T
        return torch.mm(hidden_ND, head_VD.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_NV: Tensor) -> tuple[Tensor, Tensor]:
        hidden_ND, head_VD = ctx.saved_tensors
        grad_NV = grad_NV.to(hidden_ND.dtype)
        return grad_NV @ head_VD, grad_NV.T @ hidden_ND


def full_loss(logits_NV: Tensor, teacher_NV: Tensor | None, case: Case) -> Tensor:
    ce = cross_entropy(logits_NV, case.labels_N)
    if teacher_NV is None:
        return ce
    q_NV = softmax(teacher_NV, -1)
    kd_N = -(q_NV * log_softmax(logits_NV, -1)).sum(-1)
    valid_N = case.labels_N != -100
    return (1 - case.kd_weight) * ce + case.kd_weight * (kd_N * valid_N).sum() / valid_N.sum()


def naive(case: Case, teacher: bool = True) -> Tensor:
    """Hugging Face style: all logits in the model's dtype, then upcast."""
    teacher_NV = (case.teacher_hidden_NE @ case.teacher_head_VE.T).float() if teacher else None
    return full_loss((case.hidden_ND @ case.head_VD.T).float(), teacher_NV, case)


def naive_fp32_logits(case: Case) -> Tensor:
    """All logits in fp32 from the product on: the reference for "accurate"."""
    teacher_NV = Fp32Logits.apply(case.teacher_hidden_NE, case.teacher_head_VE)
    return full_loss(Fp32Logits.apply(case.hidden_ND, case.head_VD), teacher_NV, case)


def truth(case: Case) -> Tensor:
    teacher_NV = case.teacher_hidden_NE.double() @ case.teacher_head_VE.double().T
    return full_loss(case.hidden_ND.double() @ case.head_VD.double().T, teacher_NV, case)


def liger(c: Case) -> Tensor:
    """Liger's loss, hard and soft terms in one call; its soft term is the KL, which has the same gradient."""
    return _liger()(c.hidden_ND, c.head_VD, c.teacher_hidden_NE, c.teacher_head_VE, c.labels_N)


@functools.cache
def _liger() -> Any:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(weight_hard_loss=1 - WEIGHT, weight_soft_loss=WEIGHT, beta=0.0)


def trl(case: Case) -> Tensor:
    """TRL's function on all logits, plus the cross-entropy that its GKDTrainer leaves out."""
    teacher_NV = case.teacher_hidden_NE @ case.teacher_head_VE.T
    logits_NV = case.hidden_ND @ case.head_VD.T
    kl = _trl()(logits_NV, teacher_NV, case.labels_N, beta=0)  # forward KL
    return (1 - case.kd_weight) * cross_entropy(logits_NV.float(), case.labels_N) + case.kd_weight * kl


@functools.cache
def _trl() -> Any:
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss


def trl_chunked(case: Case) -> Tensor:
    """What its DistillationTrainer computes, forward KL without all logits, plus TRL's own chunked cross-entropy."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    student = case.hidden_ND, case.head_VD, None
    kl_N, _ = ChunkedDivergenceFunction.apply(*student, case.teacher_hidden_NE, case.teacher_head_VE, None, 0.0)
    ce_N = -ChunkedLogProbFunction.apply(*student, case.labels_N, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())[0]
    return (1 - case.kd_weight) * ce_N.mean() + case.kd_weight * kl_N.mean()


def floor(case: Case, teacher: bool = True) -> None:
    """The products alone: logits of both models, the gradients of hidden states and head."""
    with torch.no_grad():
        logits_NV = case.hidden_ND @ case.head_VD.T
        if teacher:
            _ = case.teacher_hidden_NE @ case.teacher_head_VE.T
        _ = logits_NV @ case.head_VD
        _ = logits_NV.T @ case.hidden_ND


def variants(on_gpu: bool, teacher: bool) -> dict[str, Loss]:
    accurate, fast = {"teacher": teacher}, {"teacher": teacher, "accuracy": "fast"}
    filled_once = functools.cache(lambda *size: BUFFER(*size).normal_())  # the table does not count its memory
    found: dict[str, Loss] = {
        "ours, accurate": partial(ours, **accurate),
        "ours, fast": partial(ours, **fast),
        "ours, accurate, 0.5 GiB": partial(ours, **accurate, logits_budget_gib=0.5),
        "ours, fast, 0.5 GiB": partial(ours, **fast, logits_budget_gib=0.5),
        "naive fp32": partial(naive, teacher=teacher),
        "ours, accurate, without the row pass": partial(without_rows, grad_buffer=filled_once, **accurate),
        "ours, fast, without the row pass": partial(without_rows, **fast),
    }
    if on_gpu:
        found["ours, accurate, eager row pass"] = partial(with_plain_rows, **accurate)
        found["ours, accurate, compiled row pass"] = partial(with_plain_rows, **accurate, compiled=True)
        found["ours, fast, compiled row pass"] = partial(with_plain_rows, **fast, compiled=True)
        found["naive, torch.compile"] = torch.compile(partial(naive, teacher=teacher), dynamic=False)
    if teacher:
        found |= {"Liger FusedLinearJSD": liger, "TRL generalized_jsd_loss": trl, "TRL chunked": trl_chunked}
    return found


# ---- measuring


def timed(call: Callable[[], object], on_gpu: bool) -> float:
    if not on_gpu:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):  # repeat if the driver had to allocate: a competitor of 60 GiB has emptied the cache
        asked = torch.cuda.memory_stats().get("num_device_alloc", 0)
        torch.cuda._sleep(
            20_000_000
        )  # cycles, about 10 ms: the host runs ahead, as in a step, so its time does not count
        begin.record()
        call()
        end.record()
        end.synchronize()
        if torch.cuda.memory_stats().get("num_device_alloc", 0) == asked:
            break
    return begin.elapsed_time(end)


def forward_backward(loss: Loss, case: Case) -> None:
    torch.autograd.grad(
        loss(case), [case.hidden_ND, case.head_VD]
    )  # does not keep them: a later peak would include them


def peak_gib(call: Callable[[], object], on_gpu: bool) -> float:
    """Peak memory above the inputs, including the gradients."""
    if not on_gpu:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
        return max(held for _, held in allocated(profile)) / 2**30
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def allocated(profile: Any) -> Iterator[tuple[int, int]]:
    """Allocations that a CPU profile recorded: nanoseconds, and bytes held from then on."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        yield event.start_ns(), held


def first_calls(calls: dict[str, Callable[[], object]], peaks: dict[str, float], on_gpu: bool) -> Iterator[str]:
    """Compiles, fills caches and finds the peaks. Removes and reports a variant that fails, unless it is the first."""
    for name in list(calls):
        try:
            calls[name]()
            peaks[name] = peak_gib(calls[name], on_gpu)
        except Exception as error:
            if not peaks:  # all others are compared with the first
                raise
            del calls[name]
            yield f"| {name} | {named(error)} | | |"
        if on_gpu:
            torch.cuda.empty_cache()  # one variant must not inherit another's cache


def named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:80]


def speed_table(case: Case, teacher: bool, rounds: int, on_gpu: bool) -> Iterator[str]:
    torch.compiler.reset()  # otherwise the second size counts as a dynamic shape and gets a slower graph
    calls: dict[str, Callable[[], object]] = {"floor": partial(floor, case, teacher)}
    calls |= {name: partial(forward_backward, v, case) for name, v in variants(on_gpu, teacher).items()}
    peaks: dict[str, float] = {}
    yield "| variant | ms, median (10% to 90%) | x floor | GiB |\n|---|---:|---:|---:|"
    yield from first_calls(calls, peaks, on_gpu)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call, on_gpu))
    base = statistics.median(times["floor"])
    for name, values in times.items():
        low, middle, high = (statistics.quantiles(values, n=10, method="inclusive")[i] for i in (0, 4, 8))
        yield f"| {name} | {middle:.2f} ({low:.2f} to {high:.2f}) | {middle / base:.2f} | {peaks[name]:.2f} |"


def error_table(device: str, dtype: torch.dtype, tiny: bool) -> Iterator[str]:
    yield (
        "| variant | teacher | loss | d hidden | d head | larger gradient error / naive fp32 logits |\n"
        "|---|---|---:|---:|---:|---:|"
    )
    sizes = (64, 48, 500) if tiny else (256, 192, 8000)
    for teacher in ("far", "near"):
        case = Case.make(512, sizes, device, dtype).masked()
        if teacher == "near":
            case = case.near()
        exact = results(truth, case.wide())
        reference = errors(results(naive_fp32_logits, case), exact)
        for name, loss in {
            "naive fp32 logits": naive_fp32_logits,
            "naive, upcast": naive,
            "ours, accurate": partial(ours, chunk_tokens=128),
            "ours, fast": partial(ours, chunk_tokens=128, accuracy="fast"),
        }.items():
            try:
                got = errors(results(loss, case), exact)
            except Exception as error:
                yield f"| {name} | {teacher} | {named(error)} | | | |"
                continue
            shown = " | ".join(f"{value:.1e}" for value in got)
            ratio = max(g / r for g, r in zip(got[1:], reference[1:], strict=True))
            yield f"| {name} | {teacher} | {shown} | {ratio:.2f} |"


def results(loss: Loss, case: Case) -> list[Tensor]:
    case.hidden_ND.grad = case.head_VD.grad = None
    leftover = torch.full((2**25,), math.nan, device=case.hidden_ND.device)
    del leftover  # memory that is allocated next and not written holds NaN
    value = loss(case)
    value.backward()
    assert case.hidden_ND.grad is not None
    assert case.head_VD.grad is not None
    return [value.detach().double(), case.hidden_ND.grad.double(), case.head_VD.grad.double()]


def errors(got: list[Tensor], exact: list[Tensor]) -> list[float]:
    found = [((a - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)]
    assert all(math.isfinite(value) for value in found)
    return found


def versions() -> str:
    named = []
    for package in ("torch", "triton", "liger-kernel", "trl"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            named.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(named)


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rows", type=int, help="default: 8192 on a GPU, 512 on a CPU")
    parser.add_argument("--rounds", type=int, help="default: 20 on a GPU, 7 on a CPU")
    parser.add_argument("--deadline", type=float, default=400, help="seconds after which no further table is started")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available() and not args.tiny
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    sizes, rows, rounds = (SIZES, 8192, 20) if on_gpu else (SIZES[:1], 512, 7)
    if args.tiny:
        sizes, rows, rounds = ((64, 48, 1000),), 256, 3
    rows, rounds = args.rows or rows, args.rounds or rounds
    card = (
        f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
        if on_gpu
        else f"CPU, threads: {torch.get_num_threads()}"
    )
    print(f"{card}, {versions()}; {rows} rows, {dtype}, {rounds} rounds\n\nErrors relative to float64\n")
    for line in error_table(device, dtype, args.tiny):
        print(line, flush=True)
    for teacher in (True, False):
        for size in sizes:
            print(f"\nStudent width, teacher width, vocabulary {size}; {'KD' if teacher else 'plain phase'}\n")
            if time.perf_counter() - start > args.deadline:
                print("skipped: the deadline has passed")
                continue
            case = Case.make(rows, size, device, dtype)
            try:
                for line in speed_table(case, teacher, rounds, on_gpu):
                    print(line, flush=True)
            except Exception:  # a variant that failed only now; the other tables are still worth having
                traceback.print_exc()
            del case
            if on_gpu:
                torch.cuda.empty_cache()
    print(f"\n{time.perf_counter() - start:.0f} s in total")


if __name__ == "__main__":
    main()
