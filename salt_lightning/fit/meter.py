"""Values of a logged step: losses from their sums, and time, speed and compute since the previous logged step."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from salt_lightning import flops

# What a step sums over its micro-batches and ranks, in this order (fields of losses.SaltLoss).
SUMS = ("ce_sum", "kd_sum", "teacher_ce_sum", "teacher_entropy_sum", "agree_sum", "tokens")


def loss_values(sums: list[float], weight: float) -> dict[str, float]:
    """Means over the tokens of one optimizer step, nats: loss = (1 - w) CE + w KD; the teacher's only while w > 0."""
    *totals, tokens = sums
    ce, kd, teacher_ce, entropy, agreement = (total / max(tokens, 1.0) for total in totals)
    values = {"loss": (1 - weight) * ce + weight * kd, "ce": ce, "kd_weight": weight}
    if weight > 0:
        values |= {"kd": kd, "kl": kd - entropy, "teacher_ce": teacher_ce, "teacher_entropy": entropy}
        values |= {"agreement": agreement, "gap": ce - teacher_ce}
    return values


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory of tensors on a GPU since the last call; nothing on other devices."""
    if device.type != "cuda":
        return {}
    peak_bytes = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"peak_memory_gib": peak_bytes / 2**30}


def _none(steps: int) -> int:
    return 0


_SPEED_STEPS = 10  # that a speed without the teacher is measured over: single steps differ by tens of percent


@dataclass(frozen=True)
class Totals:
    """What the first `step` optimizer steps of a run have cost."""

    step: int = 0
    taught_steps: int = 0  # of them, with a teacher
    tokens: int = 0
    student_flops: float = 0.0
    teacher_flops: float = 0.0


class Meter:
    """Clock and compute meter of a run. Validation is not counted.

    Totals are a pure function of the step. If a run resumes with other settings (another batch, schedule or
    teacher), the checkpoint's totals are kept, and the function counts from there.
    """

    time_s = 0.0  # of training, over all starts of this run

    def __init__(self) -> None:
        self._watched: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.tokens_per_s = 0.0  # between the last two logged steps
        self.forward_flops = {"student": math.nan, "teacher": 0.0}  # per token
        self.forget()
        self.follow(0, None)
        self._paused_s: float | None  # when it was paused; None: it runs
        self.start(0, wait_s=0.0)

    def forget(self, step: int = 0) -> None:
        """Resets the totals for a new fit, or keeps those at `step` if its Trainer goes on."""
        if step > 0 and self.time_s > 0:
            self.keep(step)
            return
        self.time_s = 0.0
        self.teacher_time_s = 0.0  # of it, the teacher's forward, without its head, which is part of the loss
        self.before = Totals()  # counted under settings that have changed since
        self._counted = Totals()  # by the checkpoint that the run resumed from

    def keep(self, step: int) -> None:
        """Keeps the totals at `step`, the newest one: other settings apply from there on."""
        self.before = self._counted = self.totals(step)

    def totals(self, step: int) -> Totals:
        before, per_token = self.before, self.forward_flops
        steps, taught = step - before.step, self.kd_steps(step) - self.kd_steps(before.step)
        return Totals(
            step,
            before.taught_steps + taught,
            before.tokens + steps * self.step_tokens,
            before.student_flops + flops.student_flops(per_token["student"], steps * self.step_tokens),
            before.teacher_flops + per_token["teacher"] * (taught * self.step_tokens),
        )

    def state(self, step: int) -> dict[str, Any]:
        """For a checkpoint."""
        totals = {"totals": asdict(self.totals(step)), "totals_before": asdict(self.before)}
        now_s = time.perf_counter() if self._paused_s is None else self._paused_s
        since_s = now_s - self._since_s if step > self._step else 0.0  # the last logged step
        self._settle()
        times = {"time_s": self.time_s + since_s, "teacher_time_s": self.teacher_time_s}
        return {**totals, **times, "forward_flops": dict(self.forward_flops)}

    def load(self, saved: dict[str, Any]) -> None:
        self.before, self._counted = (Totals(**saved[name]) for name in ("totals_before", "totals"))
        self.time_s, self.teacher_time_s = saved["time_s"], saved["teacher_time_s"]
        self.forward_flops["teacher"] = saved["forward_flops"]["teacher"]

    def follow(self, step_tokens: int, kd_steps: Callable[[int], int] | None) -> None:
        """Sets the settings of this start; past totals stay those of the checkpoint, even if the settings differ.

        `step_tokens`: over all ranks. `kd_steps`: n -> how many of the first n steps have a teacher; None: none.
        """
        self.step_tokens, self.kd_steps = step_tokens, kd_steps or _none
        self._taught_tokens_per_s: float | None = None
        self._begin_phase()
        if self.totals(self._counted.step) != self._counted:
            self.before = self._counted

    def start(self, step: int, wait_s: float) -> None:
        """Begins the interval that the next logged step covers. `wait_s`: time waited for the loader so far."""
        self._step, self._since_s, self._wait_s, self._paused_s = step, time.perf_counter(), wait_s, None

    def pause(self) -> None:
        self._paused_s = time.perf_counter()

    def go_on(self) -> None:
        assert self._paused_s is not None
        self._since_s += time.perf_counter() - self._paused_s
        self._paused_s = None

    @contextmanager
    def teacher_runs(self, on_cuda: bool) -> Iterator[None]:
        """Counts the time of the code inside as the teacher's. A GPU records events, for which only `read` waits."""
        if on_cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._watched.append((begin, end))
        else:
            since_s = time.perf_counter()
            yield
            self.teacher_time_s += time.perf_counter() - since_s

    def _settle(self) -> None:
        """Adds the time between events that the device has reached, without waiting for others."""
        watched = [(end.query(), begin, end) for begin, end in self._watched]  # asked once: the device goes on
        self.teacher_time_s += sum(begin.elapsed_time(end) for reached, begin, end in watched if reached) / 1000
        self._watched = [(begin, end) for reached, begin, end in watched if not reached]

    def read(self, step: int, wait_s: float, peak: float | None) -> dict[str, float]:
        """Values as of optimizer step `step`; begins the next interval. The device must have finished that step.

        `wait_s`: waited for the loader since the start. `peak`: FLOP/s of all devices together, None if unknown.
        """
        seconds, steps = time.perf_counter() - self._since_s, step - self._step
        done, before = self.totals(step), self.totals(self._step)
        self.time_s += seconds
        self._settle()
        self.tokens_per_s = steps * self.step_tokens / seconds
        if self._phase_reads:
            self._phase_steps += steps
            self._phase_s += seconds
        self._phase_reads += 1
        values = {
            "time_s": self.time_s,
            "teacher_time_s": self.teacher_time_s,
            "tokens": float(done.tokens),
            "tokens_per_s": self.tokens_per_s,
            "data_wait_s": wait_s - self._wait_s,
            "flops_student_total": done.student_flops,
            "flops_teacher_total": done.teacher_flops,
        }
        spent = done.student_flops + done.teacher_flops - (before.student_flops + before.teacher_flops)
        self.start(step, wait_s)
        return values if peak is None else values | {"mfu": spent / seconds / peak}

    def _begin_phase(self) -> None:
        self._phase_reads, self._phase_steps, self._phase_s = 0, 0, 0.0

    @property
    def _phase_tokens_per_s(self) -> float | None:
        """Speed with or without the teacher, in this start. The first interval is left out.

        It includes the boundary, with its checkpoint and, for compiled models, a compile.
        """
        return self._phase_steps * self.step_tokens / self._phase_s if self._phase_s else None

    def teacher_left(self) -> None:
        """Keeps the speed with the teacher, for `what_it_brought`."""
        self._taught_tokens_per_s = self._phase_tokens_per_s
        self._begin_phase()

    def what_it_brought(self) -> str | None:
        """The speeds with and without the teacher, once, when the latter has been measured over enough steps.

        None if the teacher left within the first interval: that began with a warm-up, and often a compile.
        """
        if not self._taught_tokens_per_s or self._phase_steps < _SPEED_STEPS:
            return None
        before, self._taught_tokens_per_s = self._taught_tokens_per_s, None
        return f"{self._phase_tokens_per_s:,.0f} tokens/s without the teacher, {before:,.0f} with it"
