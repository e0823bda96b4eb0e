"""Measures when the teacher stops helping: student against teacher on the held-out rows of a validation.

    probe/gap             CE of the student - CE of the teacher (at temperature 1), nats a token, all held-out rows
    probe/student_better  share of their tokens where the student's nll is below the teacher's
    probe/grad_cosine     cosine between the gradients of CE and KD over the student's weights (optional), on the first
                          held-out rows, as many as an optimizer step takes

A fresh student's CE includes the padding ids of its head, which the teacher's leaves out: at first the gap is ln(rows /
tokens) larger, 0.11 nats for 400 tokens in 448 rows. This fades as it trains.

The teacher is frozen, so it reads the held-out rows once and its nll is kept: 4 bytes per token. Nothing here changes a
weight, an accumulated gradient or the random state. `cut` and `look` are for the check before the first step. Shapes: N
token positions of a batch.
"""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from salt_lightning import preflight
from salt_lightning.errors import ConfigError
from salt_lightning.hugging_face.attention import testable
from salt_lightning.losses import token_stats
from salt_lightning.metrics import sum_dtype

Gradients = list[Tensor | None]
_LOOK_FLOPS = 1.5e11  # for one look at a model: some seconds on a CPU
_LOOK_WIDTH = 4096  # tokens of a row: attention's share grows with their square, and so may its memory


class Probe:
    """Collects one validation; `read` returns its values and resets for the next. To compare `gradients` too takes two
    more forwards and backwards of an optimizer step, and memory for two more gradients."""

    def __init__(self, gradients: bool) -> None:
        self.gradients = gradients
        self.forget()

    def forget(self) -> None:
        """Discards what was added."""
        self._sums: Tensor | None = None
        self._ce: Gradients = []
        self._kd: Gradients = []

    def add(self, trainer: pl.Trainer, module: Any, student: Any, batch: Any, batch_idx: int) -> None:
        """Adds a batch of the validation; `student` has the student's nll and rank of its labels."""
        if not isinstance(student, dict) or not {"nll", "rank"} <= student.keys():
            raise ConfigError(
                f"{type(module).__name__}.validation_step must return what SALTModule's does while there is a teacher: "
                "a dict with nll and rank of each label, to compare with the teacher's"
            )
        known = module.teacher.__dict__.setdefault("held_out_nll", {})  # by batch of a validation; it leaves with it
        if batch_idx not in known or module._data is None:  # a user's own loader may shuffle
            with trainer.precision_plugin.val_step_context():
                known[batch_idx] = module.predict_step(batch, batch_idx)["nll"].flatten()
        student_N, teacher_N, valid_N = student["nll"], known[batch_idx], student["rank"] >= 0
        each_4N = torch.stack([student_N, teacher_N, student_N < teacher_N, torch.ones_like(student_N)])
        sums = torch.where(valid_N, each_4N, 0).sum(1, dtype=sum_dtype(student_N.device))
        self._sums = sums if self._sums is None else self._sums + sums
        # This many batches hold the rows of one optimizer step, the same ones for any number of ranks.
        if self.gradients and batch_idx < trainer.accumulate_grad_batches:
            self._add_gradients(trainer, module, batch)

    def read(self, trainer: pl.Trainer, module: Any) -> dict[str, float]:
        """The values over all ranks; empty if no batch was added. Collective."""
        if self._sums is None:
            return {}
        ce, teacher_ce, better, tokens = trainer.strategy.reduce(self._sums, reduce_op="sum").tolist()
        values = {"gap": (ce - teacher_ce) / max(tokens, 1), "student_better": better / max(tokens, 1)}
        if self.gradients:
            values["grad_cosine"] = _cosine(trainer, self._ce, self._kd)
        self.forget()
        return {f"probe/{name}": value for name, value in values.items()}

    def _add_gradients(self, trainer: pl.Trainer, module: Any, batch: Any) -> None:
        # The optimizer's parameters: the module's are at times unsharded, where it is sharded.
        weights = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
        with torch.inference_mode(False), trainer.precision_plugin.train_step_context():
            batch = {name: tensor.clone() for name, tensor in batch.items()}  # these were made in inference mode
            ids_BT, positions_BT, cu_seqlens = batch["input_ids"], batch["positions"], batch.get("cu_seqlens")
            with torch.no_grad():
                teacher_out = module.teacher(ids_BT, positions_BT, cu_seqlens=cu_seqlens)
            num_tokens = torch.full_like(module.kd_weight, ids_BT.numel())  # any scale: the cosine is the same
            module.kd_weight.fill_(1.0)  # until the next batch sets its own
            for gradients, taught_by in ((self._ce, None), (self._kd, teacher_out)):
                with torch.enable_grad():
                    loss = partial(module.step_loss, batch["labels"].flatten(), taught_by, num_tokens)
                    _backward(module.student(ids_BT, positions_BT, loss, cu_seqlens).loss, weights, gradients)


def _backward(loss: Tensor, weights: list[Tensor], gradients: Gradients) -> None:
    """Adds the gradient of `loss` to `gradients`; the weights themselves have no gradient before or after."""
    for p, gradient in zip(weights, gradients or [None] * len(weights), strict=True):
        p.grad = gradient
    loss.backward()
    gradients[:] = [p.grad for p in weights]
    for p in weights:
        p.grad = None


def _cosine(trainer: pl.Trainer, ce: Gradients, kd: Gradients) -> float:
    device = trainer.strategy.root_device
    dtype = sum_dtype(device)
    products = torch.zeros(3, dtype=dtype, device=device)
    for pair in zip(ce, kd, strict=True):
        a, b = (g.to_local() if isinstance(g, DTensor) else g for g in pair)
        if a is None or b is None:
            continue
        if isinstance(trainer.strategy, DDPStrategy):  # it reduces only after a forward through its wrapper
            dist.all_reduce(a)
            dist.all_reduce(b)
        products += torch.stack([(x * y).sum(dtype=dtype) for x, y in ((a, b), (a, a), (b, b))])
    # a sum over shards; whole gradients count once per rank, which cancels out
    dot, ce_square, kd_square = trainer.strategy.reduce(products, reduce_op="sum").tolist()
    return dot / (ce_square * kd_square) ** 0.5 if ce_square * kd_square > 0 else 0.0


def cut(batches: list[dict[str, Tensor]], parameters: int) -> Iterator[dict[str, Tensor]]:
    """The first tokens of each batch, together as many as a model of this size can process in seconds; at least 256,
    and enough to go past a longer prompt."""
    left = max(256, int(_LOOK_FLOPS / (2 * parameters)))
    for batch in batches:
        rows, width = batch["labels"].shape
        prompt = int((batch["labels"][0] >= 0).int().argmax())
        width = min(width, max(min(left, _LOOK_WIDTH), prompt + 64))
        rows = max(1, min(rows, left // width))
        yield {name: t[:rows, :width] for name, t in batch.items() if t.ndim == 2}
        left -= rows * width
        if left <= 0:
            return


def judged(lm: Any, trainer: Any, path: str, allowed: bool) -> preflight.Finding:
    """What preflight says of a teacher's loss on samples of the run's text, after a few forwards of a micro-batch."""
    data, device = trainer.datamodule, trainer.strategy.root_device
    batches = ({key: tensor.to(device) for key, tensor in each.items()} for each in data.samples(data.micro_batch_size))
    return preflight.teacher(look(lm, batches, data), path, allowed)


@torch.no_grad()
def look(lm: Any, batches: Iterable[dict[str, Tensor]], data: Any) -> preflight.TeacherLoss:
    """The CE of a models.CausalLM on batches of a SALTDataModule, next to losses that need no model."""
    labels: list[Tensor] = []
    nll: list[Tensor] = []
    with testable(lm):
        for batch in batches:
            labels_N = batch["labels"].flatten()
            # the same arguments as in training, so that it is compiled once
            hidden_ND, head_VD, bias_V = lm(batch["input_ids"], batch["positions"], cu_seqlens=batch.get("cu_seqlens"))
            nll.append(token_stats(hidden_ND, head_VD, labels_N, bias_V)[0].cpu())
            labels.append(labels_N.cpu())
    valid_N = torch.cat(labels) >= 0
    nll_N, labels_N = torch.cat(nll)[valid_N].double(), torch.cat(labels)[valid_N]
    error = float(nll_N.std() / len(nll_N) ** 0.5) if len(nll_N) > 1 else math.inf
    return preflight.TeacherLoss(
        float(nll_N.mean()), math.log(len(head_VD)), data.counts_nll(labels_N), len(nll_N), error=error
    )
