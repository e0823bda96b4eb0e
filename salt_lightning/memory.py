"""The device memory of a training step, found by running it on fake tensors, which have shapes but no data.

Models, training step and backward are the real ones; a ledger follows every storage from allocation to release. A
compiled model runs as the graphs that torch.compile would pass to Inductor: what these keep for backward is exact;
apart from that, what a fused kernel makes and uses itself counts as no memory.

Not included is what only the device knows: its context, the workspaces of its libraries, gaps between blocks.
"""

import operator
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM

from salt_lightning import parallel
from salt_lightning.fit.averaging import averages
from salt_lightning.fit.cadence import divisors
from salt_lightning.fit.meter import SUMS
from salt_lightning.head.chunked_head import CPU_BLOCK_ELEMENTS, GradBuffers, Plan, Side, padded_width, rows_and_dtypes
from salt_lightning.head.row_pass import NUM_SUMS
from salt_lightning.hugging_face import attention, experts, quantized
from salt_lightning.hugging_face.attention import PACKED
from salt_lightning.losses import SaltLoss
from salt_lightning.models import CausalLM
from salt_lightning.module import SALTModule
from salt_lightning.preflight import size_said

_SURE = 0.9  # compiled peaks were 0.93 to 1.06 times what was scaled from other rows, over a factor of 4 to 32
_ROUNDING = 512  # CUDA's allocator rounds sizes up to this
_ROW_PASS_BUFFERS = {False: 6, True: 8}  # blocks alive at once in a CPU's row pass: without and with a teacher


@dataclass(frozen=True)
class Peak:
    """The peak memory of a step in bytes, and the parts that stay from step to step."""

    total: int
    weights: int
    optimizer: int
    teacher: int

    @property
    def step(self) -> int:
        """Gradients, activations, the buffers of the head loss, the batch."""
        return self.total - self.weights - self.optimizer - self.teacher

    def described(self, rows: int) -> str:
        parts = {"weights": self.weights, "AdamW": self.optimizer, "teacher": self.teacher}
        parts["gradients, activations and head loss"] = self.step
        shown = ", ".join(f"{name} {size_said(size)}" for name, size in parts.items() if size)
        return f"{size_said(self.total)} at its peak with {rows} rows per micro-batch: {shown}"


class Ledger(TorchDispatchMode):
    """Follows storages: the bytes alive now, and the peak so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: Any = WeakIdKeyDictionary()

    def count(self, made: Any) -> None:
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                size = -(-storage.nbytes() // _ROUNDING) * _ROUNDING
                self._known[storage] = size
                self.hold(size)
                weakref.finalize(storage, self.hold, -size)

    def overlook(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = 0

    def hold(self, size: int) -> None:
        """Counts memory that has no tensor here; a negative size frees it."""
        self.now += size
        self.peak = max(self.peak, self.now)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block in which ops are not followed."""
        with _pop_mode_temporarily() if _get_current_dispatch_mode() is self else nullcontext():
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.count(made)
        return made


class Fit:
    """The memory that a fit of `module` takes on each of its devices, cuda or cpu.

    The module is attached to its trainer and data, without models; student and teacher may be on the meta device.
    """

    def __init__(self, module: SALTModule, student: CausalLM, teacher: CausalLM | None, device: str) -> None:
        self.module, self.trainer = module, module.trainer
        self.data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
        self.student, self.teacher, self.device = student, teacher, device
        self.precision, strategy = str(self.trainer.precision), self.trainer.strategy
        self.sharded = isinstance(strategy, parallel.SHARDS_MODELS)
        self.shards = self.trainer.world_size // getattr(strategy, "replicas", 1) if self.sharded else 1
        self.copies = 1  # of the weights on this device
        for callback in averages(self.trainer):
            self.copies += torch.device(callback._device or device).type == device
        self._found: dict[tuple[int, bool], list[Peak]] = {}

    def peaks(self, rows: int, compiled: bool | None = None) -> list[Peak]:
        """The peaks with the teacher and without, or only without, for micro-batches of `rows` rows."""
        compiled = self.module.hparams["compile"] if compiled is None else compiled
        if (rows, compiled) not in self._found:
            self._found[rows, compiled] = [self._share(peak) for peak in _peaks(self, rows, compiled)]
        return self._found[rows, compiled]

    def largest(self, usable: int, prove: bool = True) -> int | None:
        """Rows of the largest micro-batch that divides the global batch and fits; None if not even one row fits.

        `prove`: by runs without torch.compile, and near the limit one with it, which takes a minute for 28 layers;
        otherwise scaled from the rows of the settings.
        """
        sizes = divisors(self.data.global_batch_size // self.trainer.world_size)
        fitting = bisect_right(sizes, usable, key=lambda n: self._about(n, prove))
        near = fitting and self._about(sizes[fitting - 1], prove) > _SURE * usable
        if prove and near and max(p.total for p in self.peaks(sizes[fitting - 1])) > usable:
            fitting -= 1
        return sizes[fitting - 1] if fitting else None

    def _about(self, rows: int, run: bool) -> int:
        """The peak with `rows` rows, from that of the settings, assuming that torch.compile always saves the same share
        of what grows with the rows."""
        before = self.data.micro_batch_size
        eager, twice = (max(p.total for p in self.peaks(n, compiled=False)) for n in (before, 2 * before))
        total, grows = max(p.total for p in self.peaks(before)), twice - eager
        more = grows * (rows / before - 1)
        if run:
            more = max(p.total for p in self.peaks(rows, compiled=False)) - eager
        return int(total + more * min(1.0, (total - (eager - grows)) / grows))

    def _share(self, peak: Peak) -> Peak:
        """The peak on one of several devices, computed from that on a single one: sharded models, or DDP's buckets."""
        if isinstance(self.trainer.strategy, DDPStrategy) and self.trainer.world_size > 1:
            return replace(peak, total=peak.total + peak.optimizer // 2)  # DDP's buckets hold a copy of the gradients
        if not self.sharded:
            return peak
        size, root, block = _groups(self.student)
        stored, used = _dtype(self.student).itemsize, peak.optimizer // (2 * size)  # bytes of a parameter
        # the root, two blocks, and one block's gradients before they are reduced
        whole = root * used + block * (3 * used + 4)
        teacher = peak.teacher
        shards_teacher = getattr(self.trainer.strategy, "shard_teacher", False)
        if teacher and self.teacher is not None and shards_teacher and not quantized.method(self.teacher.model):
            numel, root, block = _groups(self.teacher)
            teacher = teacher * ((numel - root) // self.shards + root + 2 * block) // numel
        weights = size * stored // self.shards
        held = peak.weights + 3 * peak.optimizer // 2 + peak.teacher  # on one device that holds all
        return Peak(peak.total - held + 4 * weights + whole + teacher, weights, 2 * weights, teacher)


def _peaks(fit: Fit, rows: int, compiled: bool) -> list[Peak]:
    """The peaks of an optimizer step: with the teacher and without, or only without.

    On one device that holds both models. Of any step after the first, in Lightning's order: the gradients of the
    previous step live until the first forward is done.
    """
    found, accumulates = [], fit.data.global_batch_size // (rows * fit.trainer.world_size) > 1
    # activation checkpointing passes on a real RNG state
    with FakeTensorMode(allow_non_fake_inputs=True), experts.on_fake_tensors(), attention.on_fake_tensors():
        ledger = Ledger()
        sim = _simulated(fit, compiled, ledger)
        student = [*sim.student.parameters(), *sim.student.buffers()]
        trained = _bytes([p for p in sim.student.parameters() if p.requires_grad])
        batch: dict[str, Tensor] = {
            name: torch.empty(rows, fit.data.block_size, dtype=torch.int64)
            for name in ("input_ids", "labels", "positions", "rows")
        }
        batch["step_tokens"] = torch.empty((), dtype=torch.int64)
        batch["cu_seqlens"] = torch.empty(rows + 1, dtype=torch.int32)
        teacher = [] if sim.teacher is None else [*sim.teacher.parameters(), *sim.teacher.buffers()]
        ledger.overlook([*student, *teacher])
        taught = _bytes(teacher)
        if fit.teacher is not None and quantized.method(fit.teacher.model):
            # `sim` has them in full precision
            taught = quantized.num_bytes([*fit.teacher.parameters(), *fit.teacher.buffers()])
        ledger.hold(fit.copies * _bytes(student) + 3 * trained)  # gradients, and AdamW's two states
        ledger.count(batch)
        while True:
            ledger.hold(taught)
            ledger.peak = ledger.now
            with ledger:
                mixed = fit.precision == "bf16-mixed"  # Lightning keeps no casts for later uses
                with torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False):
                    loss = sim.training_step(batch, 0)
                if not accumulates:
                    ledger.hold(-trained)
                _backward(sim, accumulates, loss)
            if not accumulates:
                ledger.hold(trained)
            found.append(Peak(ledger.peak, fit.copies * _bytes(student), 2 * trained, taught))
            if sim.teacher is None:
                return found
            ledger.hold(-taught)
            sim.__dict__["teacher"], taught = None, 0


def _groups(lm: CausalLM) -> tuple[int, int, int]:
    """The number of parameters: in total, outside the blocks, and in the largest block."""
    size = sum(p.numel() for p in lm.parameters())
    blocks = [sum(p.numel() for p in block.parameters()) for block in parallel.blocks(lm)]
    return size, size - sum(blocks), max(blocks)


def _dtype(lm: CausalLM) -> torch.dtype:
    return next(lm.parameters()).dtype


def _bytes(tensors: list[Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _simulated(fit: Fit, compiled: bool, ledger: Ledger) -> SALTModule:
    """The module with models of fake tensors, and a head loss that allocates memory and computes nothing."""
    sim = SALTModule(**fit.module.hparams)
    sim.trainer = fit.trainer
    in_bf16 = fit.sharded and fit.precision == "bf16-mixed"  # gathered in bf16, without casts
    sim.student = _build(fit.student, torch.bfloat16 if in_bf16 else _dtype(fit.student)).train()
    if sim.hparams["activation_checkpointing"]:
        parallel.recompute_activations(sim.student)
    if fit.teacher is not None:
        sim.__dict__["teacher"] = _build(fit.teacher, _dtype(fit.teacher)).eval().requires_grad_(False)
    if compiled:
        torch._dynamo.reset()  # dynamo stops compiling after a few shapes of the same code
        for lm in (sim.student, sim.teacher):
            if lm is not None:
                _compile(lm, ledger, fit.sharded)
    sim._sums = torch.zeros(len(SUMS))
    sim._loss = partial(_head_loss, sim, fit)
    return sim


def _build(like: CausalLM, dtype: torch.dtype) -> CausalLM:
    config = like.model.config
    implementation = PACKED if like.apart == "packed" else config._attn_implementation
    known = implementation in ("eager", "sdpa", PACKED)
    how = {"dtype": dtype, "attn_implementation": implementation if known else "sdpa"}
    lm = CausalLM(AutoModelForCausalLM.from_config(config, **how), like.name)
    lm.apart = like.apart
    if not known:  # kernels that a CPU lacks keep what sdpa keeps, without a T x T mask
        lm.apart, lm.__dict__["_mask"] = "mask", lambda _: torch.ones((1, 1, 1, 1), dtype=torch.bool)
    return lm


def _backward(sim: SALTModule, accumulates: bool, loss: Tensor) -> None:
    hooks = []
    if accumulates:  # added to the existing gradient, then freed
        trained = (p for p in sim.student.parameters() if p.requires_grad)
        hooks = [p.register_post_accumulate_grad_hook(_drop) for p in trained]
    loss.backward()
    for hook in hooks:
        hook.remove()
    for p in sim.student.parameters():
        p.grad = None
    del sim.head_gradient


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


# ------------------------------------------------------------------- the head loss


def _head_loss(sim: SALTModule, fit: Fit, hidden_ND: Tensor, head_VD: Tensor, *rest: Any, **_: Any) -> SaltLoss:
    """Replaces losses.salt_loss. `rest`: labels; with a teacher also its hidden states, its head and the KD weight."""
    loss = _HeadLoss.apply(hidden_ND, head_VD.detach(), rest[1:3], sim, fit)
    return SaltLoss(loss, *(torch.zeros(()) for _ in range(NUM_SUMS + 1)))


class _HeadLoss(torch.autograd.Function):
    """Allocates what losses.salt_loss does.

    The head's gradient is not passed to its parameter: for tied weights, autograd adds fake gradients out of place, but
    real ones in place.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, teacher: tuple[Tensor, ...], sim: SALTModule, fit: Fit
    ) -> Tensor:
        compute = [_compute_dtype(fit, hidden.dtype) for hidden in (hidden_ND, *teacher[:1])]
        num_rows, vocab = len(hidden_ND), len(head_VD)
        plan = Plan(sim.hparams["accuracy"], sim.hparams["logits_budget_gib"], None, compute[0], True)
        rows, dtypes = rows_and_dtypes(num_rows, vocab, compute, plan)
        width = padded_width(vocab, fit.device)
        held = [t.to(compute[0]) for t in (hidden_ND, head_VD)] + [t.to(compute[1]) for t in teacher]
        held += [torch.empty(rows.chunk, width, dtype=compute[0]), torch.empty(NUM_SUMS, num_rows)]
        held += [torch.empty(rows.strip, width, dtype=dtype) for dtype in dtypes]
        if fit.device == "cpu":
            held += [torch.empty(_ROW_PASS_BUFFERS[bool(teacher)], min(CPU_BLOCK_ELEMENTS, rows.strip * vocab))]
        ctx.sim, ctx.dtype, student = sim, hidden_ND.dtype, Side(held[0], held[1], None)
        needs, one_chunk = (True, True, False), rows.chunk >= num_rows
        grads: Any = GradBuffers(student, needs, [hidden_ND.dtype, head_VD.dtype], one_chunk)
        ctx.hidden_ND, sim.head_gradient = grads.hidden_ND, grads.head_VD
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        sim, head = ctx.sim, ctx.sim.student.head.weight
        sim.head_gradient = sim.head_gradient.to(head.dtype)
        hidden_ND, ctx.hidden_ND = ctx.hidden_ND.to(ctx.dtype), None
        return hidden_ND, None, None, None, None


def _compute_dtype(fit: Fit, dtype: torch.dtype) -> torch.dtype:
    if fit.device == "cpu":
        return torch.float32
    return torch.bfloat16 if fit.precision == "bf16-mixed" else dtype


# ------------------------------------------------------------------ compiled models


def _compile(lm: CausalLM, ledger: Ledger, in_blocks: bool) -> None:
    """Compiles up to the graphs that Inductor would get, and runs these node by node."""
    from torch._inductor.compile_fx import compile_fx  # takes seconds, which other commands need not wait for

    compiled = partial(
        torch.compile,
        dynamic=False,
        backend=partial(compile_fx, inner_compile=partial(_as_inductor, ledger)),
        # each shape is compiled only once here, but dynamo would see its own fake tensors as different
        options={"guard_filter_fn": lambda guards: [guard.guard_type != "TENSOR_MATCH" for guard in guards]},
    )
    for part in parallel.blocks(lm) if in_blocks else [lm.backbone]:
        part.forward = ledger.paused()(compiled(part.forward))  # dynamo compiles nothing under a dispatch mode


def _as_inductor(ledger: Ledger, graph: fx.GraphModule, inputs: Any, **_: Any) -> Callable[[list[Any]], Any]:
    interpreter = _Kernels(graph, ledger)

    def run(args: list[Any]) -> Any:
        with ledger.paused():
            made = interpreter.boxed_run(args)
        interpreter.env.clear()
        return made

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


class _Kernels(fx.Interpreter):
    """Counts what is written to memory: the output of library kernels, and what leaves a fused kernel.

    Ops between two library kernels count as fused: only what a later kernel or the caller reads is written.
    """

    def __init__(self, graph: fx.GraphModule, ledger: Ledger) -> None:
        super().__init__(graph)
        self.ledger = ledger
        self.written = _written(graph)

    def run_node(self, node: fx.Node) -> Any:
        made = super().run_node(node)
        if node in self.written:
            self.ledger.count(made)
        return made


def _written(graph: fx.GraphModule) -> set[fx.Node]:
    stretch, number = {}, 0
    for node in graph.graph.nodes:
        number += _is_kernel(node)
        stretch[node] = number
    return {node for node in stretch if _is_kernel(node) or _leaves_its_kernel(node, stretch)}


def _leaves_its_kernel(node: fx.Node, stretch: dict[fx.Node, int]) -> bool:
    if node.op != "call_function" or _is_view(node):
        return False
    return any(user.op == "output" or stretch[user] != stretch[node] for user in _readers(node))


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if _is_view(user):
            yield from _readers(user)
        else:
            yield user


def _is_kernel(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    from torch._inductor.lowering import fallbacks

    return node.target in fallbacks or node.target.overloadpacket in _PRODUCTS


def _is_view(node: fx.Node) -> bool:
    return node.target is operator.getitem or (isinstance(node.target, torch._ops.OpOverload) and node.target.is_view)


_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}
