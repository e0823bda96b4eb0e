"""The head loss against its floor and its rivals: time, memory, and error to float64, all in one process.

    python benchmarks/head_loss.py             one GPU, under 9 minutes
    python benchmarks/head_loss.py --tiny      any CPU, seconds: shows that it runs

The floor is the matrix products alone (four with a teacher, three without). Times are medians of rounds in which
all variants take turns, so that drift of the card cancels; ratios to the floor are the claim.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, softmax

sys.path.insert(0, str(Path(__file__).parents[1]))
from salt_lightning.losses import salt_loss

WEIGHT = 0.667
SIZES = ((768, 512, 50304), (2048, 1024, 50304), (2560, 2048, 256000))  # student width, teacher width, vocabulary


@dataclass
class Case:
    hidden_ND: Tensor
    head_VD: Tensor
    labels_N: Tensor
    teacher_hidden_NE: Tensor
    teacher_head_VE: Tensor

    @classmethod
    def make(cls, num_rows: int, sizes: tuple[int, int, int], device: str, dtype: torch.dtype, near: bool) -> Case:
        """Logits of standard deviation 3. near: a teacher that is the student but for 3% of noise."""
        d, e, vocab = sizes
        make = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
        hidden, head = make(num_rows, d), make(vocab, d) * 3 / math.sqrt(d)
        teacher_hidden, teacher_head = make(num_rows, e), make(vocab, e) * 3 / math.sqrt(e)
        if near:
            teacher_hidden, teacher_head = hidden + 0.03 * make(num_rows, d), head + 0.03 * head.std() * make(vocab, d)
        labels = torch.randint(vocab, (num_rows,), device=device, generator=torch.Generator(device).manual_seed(1))
        cast = (t.to(dtype) for t in (hidden, head, teacher_hidden, teacher_head))
        hidden, head, teacher_hidden, teacher_head = cast
        return cls(hidden.requires_grad_(), head.requires_grad_(), labels, teacher_hidden, teacher_head)


def ours(case: Case, teacher: bool = True, **options: object) -> Tensor:
    taught = (case.teacher_hidden_NE, case.teacher_head_VE, WEIGHT) if teacher else ()
    return salt_loss(case.hidden_ND, case.head_VD, case.labels_N, *taught, **options).loss


def naive(case: Case, teacher: bool = True) -> Tensor:
    """Hugging Face style: all logits, in fp32."""
    logits_NV = (case.hidden_ND @ case.head_VD.T).float()
    ce = cross_entropy(logits_NV, case.labels_N)
    if not teacher:
        return ce
    q_NV = softmax((case.teacher_hidden_NE @ case.teacher_head_VE.T).float(), -1)
    return (1 - WEIGHT) * ce - WEIGHT * (q_NV * log_softmax(logits_NV, -1)).sum(-1).mean()


def liger() -> Callable[[Case], Tensor] | None:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        return None
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=1 - WEIGHT, weight_soft_loss=WEIGHT, beta=0.0)
    return lambda c: loss(c.hidden_ND, c.head_VD, c.teacher_hidden_NE, c.teacher_head_VE, c.labels_N)


def floor(case: Case, teacher: bool = True) -> None:
    """The products alone: logits of both models, the gradients of hidden states and head."""
    with torch.no_grad():
        logits_NV = case.hidden_ND @ case.head_VD.T
        if teacher:
            case.teacher_hidden_NE @ case.teacher_head_VE.T
        logits_NV @ case.head_VD
        logits_NV.T @ case.hidden_ND


def variants(on_gpu: bool, teacher: bool) -> dict[str, Callable[[Case], Tensor]]:
    found: dict[str, Callable[[Case], Tensor]] = {
        "ours, accurate": partial(ours, teacher=teacher),
        "ours, fast": partial(ours, teacher=teacher, accuracy="fast"),
        "ours, accurate, 0.5 GiB": partial(ours, teacher=teacher, logits_budget_gib=0.5),
        "ours, fast, 0.5 GiB": partial(ours, teacher=teacher, accuracy="fast", logits_budget_gib=0.5),
        "naive fp32": partial(naive, teacher=teacher),
    }
    if on_gpu:
        found["naive, torch.compile"] = torch.compile(partial(naive, teacher=teacher))
        if teacher and (rival := liger()) is not None:
            found["Liger FusedLinearJSD"] = rival
    return found


def timed(call: Callable[[], object], on_gpu: bool) -> float:
    if not on_gpu:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def forward_backward(loss: Callable[[Case], Tensor], case: Case) -> None:
    case.hidden_ND.grad = case.head_VD.grad = None
    loss(case).backward()


def peak_gib(call: Callable[[], object], on_gpu: bool) -> float:
    """Memory above the inputs, the gradients included."""
    if not on_gpu:
        return math.nan
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def speed_table(case: Case, teacher: bool, rounds: int, on_gpu: bool) -> list[str]:
    calls = {"floor": partial(floor, case, teacher)}
    calls |= {name: partial(forward_backward, v, case) for name, v in variants(on_gpu, teacher).items()}
    peaks, rows = {}, []
    for name in list(calls):
        try:
            calls[name]()  # compiles, fills caches
            case.hidden_ND.grad = case.head_VD.grad = None
            peaks[name] = peak_gib(calls[name], on_gpu)
        except torch.OutOfMemoryError:
            del calls[name]
            rows.append(f"| {name} | out of memory | | |")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call, on_gpu))
    base = statistics.median(times["floor"])
    for name, values in times.items():
        low, middle, high = (statistics.quantiles(values, n=10, method="inclusive")[i] for i in (0, 4, 8))
        rows.append(f"| {name} | {middle:.2f} ({low:.2f} to {high:.2f}) | {middle / base:.2f} | {peaks[name]:.2f} |")
    return ["| variant | ms, median (10% to 90%) | x floor | GiB |", "|---|---:|---:|---:|", *rows]


def error_table(device: str, dtype: torch.dtype, tiny: bool) -> list[str]:
    """Relative errors of loss, hidden gradient and head gradient to float64, and to the naive loss's own errors."""
    rows = ["| variant | teacher | loss | d hidden | d head | d head / naive fp32's |", "|---|---|---:|---:|---:|---:|"]
    for near in (False, True):
        sizes = (64, 48, 500) if tiny else (256, 192, 8000)
        case = Case.make(512, sizes, device, dtype, near)
        truth = results(naive_with(torch.float64), case)
        reference = errors(results(naive, case), truth)
        for name, loss in {
            "naive fp32": naive,
            "ours, accurate": partial(ours, chunk_tokens=128),
            "ours, fast": partial(ours, chunk_tokens=128, accuracy="fast"),
        }.items():
            got = errors(results(loss, case), truth)
            shown = " | ".join(f"{value:.1e}" for value in got)
            rows.append(f"| {name} | {'near' if near else 'far'} | {shown} | {got[2] / reference[2]:.2f} |")
    return rows


def naive_with(dtype: torch.dtype) -> Callable[[Case], Tensor]:
    def loss(case: Case) -> Tensor:
        logits_NV = case.hidden_ND.to(dtype) @ case.head_VD.to(dtype).T
        q_NV = softmax(case.teacher_hidden_NE.to(dtype) @ case.teacher_head_VE.to(dtype).T, -1)
        soft = -(q_NV * log_softmax(logits_NV, -1)).sum(-1).mean()
        return (1 - WEIGHT) * cross_entropy(logits_NV, case.labels_N) + WEIGHT * soft

    return loss


def results(loss: Callable[[Case], Tensor], case: Case) -> list[Tensor]:
    case.hidden_ND.grad = case.head_VD.grad = None
    value = loss(case)
    value.backward()
    assert case.hidden_ND.grad is not None
    assert case.head_VD.grad is not None
    return [value.detach().double(), case.hidden_ND.grad.double(), case.head_VD.grad.double()]


def errors(got: list[Tensor], truth: list[Tensor]) -> list[float]:
    found = [((a - b).norm() / b.norm()).item() for a, b in zip(got, truth, strict=True)]
    assert all(math.isfinite(value) for value in found[1:])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available() and not args.tiny
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    sizes = SIZES if on_gpu else ((64, 48, 1000),)
    rows, rounds = (args.rows, args.rounds) if on_gpu else (256, 3)
    print(f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, torch {torch.__version__}, {rows} rows, {dtype}\n")
    for size in sizes:
        for teacher in (True, False):
            case = Case.make(rows, size, device, dtype, near=False)
            print(f"Student width, teacher width, vocabulary {size}; {'KD' if teacher else 'plain phase'}\n")
            print("\n".join(speed_table(case, teacher, rounds, on_gpu)), "\n", flush=True)
            del case
    print("Errors to float64\n\n" + "\n".join(error_table(device, dtype, args.tiny)))


if __name__ == "__main__":
    main()
