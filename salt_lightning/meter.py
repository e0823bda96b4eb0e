"""What a logged step says: losses from their sums, and time, speed and compute since the step logged before it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


class Meter:
    """Clock and compute meter of a run. Validation is not counted; FLOPs are a pure function of the step."""

    def __init__(self) -> None:
        self.time_s = 0.0  # of training, over all starts of this run
        self.teacher_time_s = 0.0  # of it, the teacher's forward; its head is computed in the loss, and not in here
        self._watched: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.tokens_per_s = 0.0  # between the last two logged steps
        self.forward_flops = {"student": math.nan, "teacher": 0.0}  # per token
        self._step = 0
        self._since_s = self._wait_s = self._paused_s = 0.0
        self._taught_tokens_per_s: float | None = None

    def start(self, step: int, wait_s: float) -> None:
        """Opens the stretch that the next logged step speaks of. `wait_s`: what the loader made us wait so far."""
        self._step, self._since_s, self._wait_s = step, time.perf_counter(), wait_s

    def pause(self) -> None:
        self._paused_s = time.perf_counter()

    def go_on(self) -> None:
        self._since_s += time.perf_counter() - self._paused_s

    @contextmanager
    def teacher_runs(self, on_cuda: bool) -> Iterator[None]:
        """Counts the seconds of what is inside as the teacher's. A GPU notes them, and is asked in `read` alone."""
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

    def read(
        self, step: int, step_tokens: int, kd_steps: Callable[[int], int], wait_s: float, peak: float | None
    ) -> dict[str, float]:
        """Values as of optimizer step `step`, and opens the next stretch. The device has to have done that step.

        Args:
            step: optimizer steps done.
            step_tokens: tokens of an optimizer step, over all ranks.
            kd_steps: how many of the first so many steps had a teacher.
            wait_s: seconds that the loader made the training wait, since its start.
            peak: FLOP/s of all devices together, None where it is not known.
        """
        seconds, steps = time.perf_counter() - self._since_s, step - self._step
        done, before = (self._flops(at, kd_steps(at), step_tokens) for at in (step, self._step))
        self.time_s += seconds
        self.teacher_time_s += sum(begin.elapsed_time(end) for begin, end in self._watched) / 1000
        self._watched.clear()
        self.tokens_per_s = steps * step_tokens / seconds
        values = {
            "time_s": self.time_s,
            "teacher_time_s": self.teacher_time_s,
            "tokens": float(step * step_tokens),
            "tokens_per_s": self.tokens_per_s,
            "data_wait_s": wait_s - self._wait_s,
            "flops_student_total": done[0],
            "flops_teacher_total": done[1],
        }
        share = flops.mfu(sum(done) - sum(before), seconds, peak)
        self.start(step, wait_s)
        return values if share is None else values | {"mfu": share}

    def teacher_left(self) -> None:
        """Keeps the speed with the teacher, for `what_it_brought`."""
        self._taught_tokens_per_s = self.tokens_per_s

    def what_it_brought(self) -> str | None:
        """Once, after the first whole stretch without the teacher: the speeds with it and without it."""
        before, self._taught_tokens_per_s = self._taught_tokens_per_s, None
        if before is None:
            return None
        return f"{self.tokens_per_s:,.0f} tokens/s without the teacher, {before:,.0f} with it"

    def _flops(self, steps: int, kd_steps: int, step_tokens: int) -> tuple[float, float]:
        per_token = self.forward_flops
        return flops.train_flops(steps, step_tokens, per_token["student"], per_token["teacher"], kd_steps)
