"""SALTModule: the trainable student, the frozen teacher beside it, and the glue to Lightning.

One batch: input_ids_BT, labels_BT, positions_BT -> student hidden_ND, teacher hidden_NE (only while w > 0) -> salt_loss
-> sums -> one division by the tokens of the whole optimizer step. B rows, T tokens a row, N = B * T, D and E widths.
"""

import gc
import math
import time
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from salt_lightning import flops, models, parallel
from salt_lightning.checkpoint import how_to_go_on
from salt_lightning.command.settings import seed_or_global
from salt_lightning.data import SALTDataModule
from salt_lightning.errors import ConfigError, NonFiniteLossError, refuse, wrong_kinds
from salt_lightning.fit import alike, averaging, buckets, cadence, extension
from salt_lightning.fit.meter import SUMS, Meter, loss_values, peak_memory
from salt_lightning.fit.optim import OptimSpec, by_name
from salt_lightning.fit.restart import about_start, about_training, go_on_from, require_fitting, require_same
from salt_lightning.fit.watch import Watch, problem
from salt_lightning.hugging_face import attention, quantized, token_ids
from salt_lightning.hugging_face.spec import ModelLike, ModelSpec, resolved
from salt_lightning.losses import salt_loss, token_stats
from salt_lightning.metrics import TokenMetrics
from salt_lightning.models import CausalLM
from salt_lightning.run.event_log import log_settings
from salt_lightning.schedule import kd_callbacks
from salt_lightning.storage.kinds import plain

Batch = dict[str, Tensor]


class SALTModule(extension.Guarded):
    """Trains a student, with the help of a teacher for as long as the KD weight is above 0.

    The teacher is not a submodule: it is in no checkpoint, not in parameters(), not affected by train(), and not
    needed for validation. KDScheduleCallback loads it, sets the weight and unloads it.

    Args:
        student: The model to train.
        teacher: The model to learn from; path null is BASELINE.
        teacher_temperature: Temperature T of the teacher's softmax; the student's stays 1, and there is no factor T^2.
        optim: Optimizer and learning rate.
        compile: Compile student and teacher with torch.compile, in place.
        activation_checkpointing: Store only each block's input and recompute the block in backward: saves most
            activation memory for a third more compute of the student.
        accuracy: How the head loss stores logits: accurate, or fast (bf16).
        logits_budget_gib: Memory in GiB that the head loss may use for logits; a few thousand rows always fit.
        seed: Seed of the student's initial weights and of dropout. null: that of seed_everything.

    Raises:
        ConfigError: for a setting out of range, a teacher that does not fit, a checkpoint of another student.
    """

    student: CausalLM
    teacher: CausalLM | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        extension.require_super(cls, SALTModule)

    def __init__(  # noqa: PLR0913 - the constructor is the command line
        self,
        student: ModelLike,
        teacher: ModelLike = ModelSpec(),  # noqa: B008 - frozen
        teacher_temperature: float = 1.0,
        optim: OptimSpec = OptimSpec(),  # noqa: B008 - frozen
        compile: bool = False,
        activation_checkpointing: bool = False,
        accuracy: Literal["accurate", "fast"] = "accurate",
        logits_budget_gib: float = 2.0,
        seed: int | None = None,
    ) -> None:
        student, teacher, optim = ModelSpec.of(student), ModelSpec.of(teacher), OptimSpec.of(optim)
        refuse(wrong_kinds(SALTModule.__init__, locals(), "--model."))
        super().__init__()
        self.student_spec, self.teacher_spec, self.optim_spec = student, teacher, optim
        self._unset_seed = seed_or_global(None) if seed is None else None
        positive = {"teacher_temperature": teacher_temperature, "logits_budget_gib": logits_budget_gib}
        refuse(f"--model.{k} {x} must be above 0, and finite" for k, x in positive.items() if not 0 < x < math.inf)
        self._loss = partial(
            salt_loss, teacher_temperature=teacher_temperature, accuracy=accuracy, logits_budget_gib=logits_budget_gib
        )
        # Plain data only: such checkpoints load with weights_only=True.
        self.save_hyperparameters(
            {
                "student": asdict(self.student_spec),
                "teacher": asdict(self.teacher_spec),
                "teacher_temperature": teacher_temperature,
                "optim": asdict(self.optim_spec),
                "compile": compile,
                "activation_checkpointing": activation_checkpointing,
                "accuracy": accuracy,
                "logits_budget_gib": logits_budget_gib,
                "seed": seed_or_global(seed),
            },
            logger=False,
        )
        self.__dict__["teacher"] = None  # bypasses nn.Module's registration, here and in load_teacher
        self._teacher_weights: dict[str, str] = {}  # which ones, once loaded
        self.kd_weight = torch.zeros((), dtype=torch.float32)  # of the current step; KDScheduleCallback sets it
        self.progress: dict[str, str] = {}  # what the progress bar shows, as of the last logged step
        self._grad_norm = torch.zeros(())
        self._watch = Watch()
        self.meter = Meter()
        self._ndim: dict[str, int] = {}  # of the student's parameters before sharding

    # ---------------------------------------------------------------- models

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher is configured, loaded or not."""
        return self.teacher_spec.path is not None

    def setup(self, stage: str) -> None:
        sources = getattr(self._data, "source_names", None) or ("all",)
        self.eval_metrics = TokenMetrics(sources, thirds=bool(getattr(self._data, "difficulty", None)))
        if stage == "fit":
            self.hparams["seed"] = seed_or_global(self.hparams["seed"], self._unset_seed)
            self._settings = alike.of_fit(self, self._data)
            alike.require(self.trainer, self._settings)
            self.__dict__["teacher"] = None  # left by an earlier fit that was stopped, or by RKD
            self.optim_spec.check(self.trainer.max_steps)
            extension.require_schedule(self)
            attention.require_gpu(self.student_spec.attention, self.trainer.strategy.root_device.type)
            parallel.check(self.trainer)
            cadence.check_trainer(self.trainer, self._data is not None, self.eval_metrics.parts)
            models.check_path(self.student_spec, "student", trains=True)
            cadence.plan_validation(self.trainer)
            self.meter.forget(self.global_step)
            extension.count_again(self)
        parallel.peers.refuse_forks(self.trainer)
        averaging.begin(self.trainer, stage == "fit")
        self.unchecked = extension.Unchecked(ours=self._data is not None)

    def check_token_ids(self) -> None:
        """Refuses pretrained models that do not fit the tokenizer; the data calls this as soon as it has one."""
        if self._data is not None:
            token_ids.check_models(self.trainer, self.student_spec, self.teacher_spec)

    def configure_model(self) -> None:
        if hasattr(self, "student") or (self._trainer and self._trainer.state.fn == TrainerFn.PREDICTING):
            return  # only the teacher scores
        # Lightning calls this in the context of the training device, which has other random numbers
        with torch.device("cpu"):
            self._build_student()

    def _build_student(self) -> None:
        spec, strategy = self.student_spec, self.trainer.strategy if self._trainer is not None else None
        # not only in setup: WeightAveraging calls this earlier
        self.hparams["seed"] = seed_or_global(self.hparams["seed"], self._unset_seed)
        token_ids.tell_fit(spec, "student", self._data)
        dtype, device = spec.dtype_or(torch.float32), parallel.build_device(strategy, torch.device("cpu"))
        lm = models.build(spec, "student", self._data, dtype, device, self.hparams["seed"])
        self._trained_on = about_start(spec)
        self.meter.forward_flops["student"], self._num_ids = self._count_flops(lm), len(lm.head.weight)
        extension.extend(self, lm.train())  # frozen parts stay so: some families freeze router biases
        # So that a checkpoint can be loaded on its own: no path, all sizes.
        self.hparams["student"] = asdict(resolved(spec, lm.model.config))
        attention.pack(lm, spec.attention, strategy)
        self._ndim = {f"student.{name}": p.ndim for name, p in lm.named_parameters()}
        if self.hparams["activation_checkpointing"]:
            parallel.recompute_activations(lm)
        self.student = parallel.distribute(lm, strategy, self.hparams["compile"])  # type: ignore[assignment]

    def extend_student(self, lm: CausalLM) -> None:
        """For a subclass: adds its own parts (`lm.NAME = ...`) before the student is moved and sharded."""

    def _count_flops(self, lm: CausalLM) -> float:
        data = self._data
        return 0.0 if data is None else flops.forward_flops_per_token(lm.model, data.block_size, lm.num_ids)

    def load_teacher(self) -> None:
        """Loads, freezes, casts and places the teacher; checks that it has the student's vocabulary."""
        spec, strategy, start_s = self.teacher_spec, self.trainer.strategy, time.perf_counter()
        dtype = spec.dtype_or(self.compute_dtype)
        root = strategy.root_device  # self.device is still the CPU in setup
        device = parallel.build_device(strategy, root)
        token_ids.tell_fit(spec, "teacher", self._data)
        with torch.random.fork_rng(devices=[root] if root.type == "cuda" else []):
            lm = models.build(spec, "teacher", self._data, dtype, device).eval().requires_grad_(False)
        lm.num_ids = self._num_ids if self._data is None else self._data.vocab_size
        attention.pack(lm, spec.attention, strategy)
        self.meter.forward_flops["teacher"] = self._count_flops(lm)
        size, method = flops.num_parameters(lm.model), quantized.method(lm.model)
        self._teacher_weights = alike.of_teacher(spec)
        alike.require(self.trainer, self._teacher_weights)
        self.__dict__["teacher"] = parallel.distribute_teacher(lm, strategy, self.hparams["compile"])
        rank_zero_info(
            f"teacher: {spec.path}, {flops.millions(size)} parameters in {dtype}, "
            f"{f'quantized ({method}), ' if method else ''}loaded in {time.perf_counter() - start_s:.1f} s"
        )

    def release_teacher(self) -> int:
        """Unloads the teacher and frees its memory; returns the bytes that its weights took on this device."""
        held_bytes = quantized.num_bytes(self.teacher.parameters()) if self.teacher else 0
        self.__dict__["teacher"] = None
        gc.collect()  # compiled modules are in reference cycles
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).empty_cache()
        self.meter.teacher_left()
        return held_bytes

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if "bf16" in str(self.trainer.precision) else torch.float32

    # -------------------------------------------------------------- training

    def on_fit_start(self) -> None:
        require_fitting(self)
        extension.check_subclass(self.trainer)
        self.give_back_modes()
        self._give_back_random = extension.keep_random(self.device)  # every micro-batch sets a seed
        self.kd_weight = self.kd_weight.to(self.device)
        self._watch = Watch(self.device)
        self._sums, self._step_tokens = torch.zeros(len(SUMS), device=self.device), torch.zeros((), device=self.device)
        buckets.settle(self)

    def on_train_start(self) -> None:
        data, kd = self._data, kd_callbacks(self.trainer)
        step_tokens = data.global_batch_size * data.block_size if data is not None else 0
        self.meter.follow(step_tokens, kd[0].kd_steps if kd else None)
        extension.check_weights(self, self._loaded_step)
        self._trained_on = about_training(alike.about(data, self.trainer, self.optim_spec))
        log_settings(self.trainer.loggers, alike.told(self._settings, data))
        self.meter.start(self.global_step, self._wait_s)
        extension.write_rates(self, self.global_step)  # for callbacks that look before the first step

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Lightning does not restore RNG state. With this, dropout after a resume equals that of an uninterrupted run.
        micro = batch_idx % self.trainer.accumulate_grad_batches
        extension.seed_random(hash((self.hparams["seed"], self.global_step, micro, self.global_rank)), self.device)
        if micro == 0:
            self._sums.zero_()
            self._terms = {}
            self.unchecked.whole = True
        extension.check_first(self, batch, "train")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        ids_BT, positions_BT = batch["input_ids"], batch["positions"]
        teacher_out = None
        if self.teacher is not None:
            with torch.no_grad(), self.meter.teacher_runs(ids_BT.is_cuda):
                teacher_out = self.teacher(ids_BT, positions_BT, cu_seqlens=batch.get("cu_seqlens"))
        self._step_tokens = batch["step_tokens"].float().reshape(())
        # DDP divides by the ranks: this leaves one division by the tokens of the whole optimizer step.
        loss = partial(
            self.step_loss, batch["labels"].flatten(), teacher_out, self._step_tokens / self.trainer.world_size
        )
        out = self.student(ids_BT, positions_BT, loss, batch.get("cu_seqlens"))
        with torch.no_grad():
            self._sums += torch.stack([getattr(out, name).float() for name in SUMS])
        micro = batch_idx % self.trainer.accumulate_grad_batches
        self._watch.see(0, out.loss, self._batch_number(micro) + self.global_rank)
        # Lightning divides by the number of accumulated micro-batches. So the gradient that reaches out.loss is 1 (for
        # some numbers 1 up to rounding), and the gradients computed in its forward need no scaling pass.
        return out.loss * self.trainer.accumulate_grad_batches

    def _batch_number(self, micro: int) -> int:
        """Micro-batches of all ranks before micro-batch `micro` of the running step."""
        return (self.global_step * self.trainer.accumulate_grad_batches + micro) * self.trainer.world_size

    def step_loss(
        self,
        labels_N: Tensor,
        teacher_out: tuple[Tensor, Tensor, Tensor | None] | None,
        num_tokens: Tensor,
        hidden_ND: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
    ) -> Any:
        """The loss at KD weight `kd_weight`; plain CE if `teacher_out` is None. Called in the student's forward.

        A subclass can add its own loss to the result: `out._replace(loss=out.loss + mine)`, where `mine` is one
        micro-batch's part of a mean over the step's tokens: a sum over labels, divided by `num_tokens`. `log_term` logs
        it. A gradient probe calls this, too.
        """
        loss = partial(self._loss, hidden_ND, head_VD, labels_N, num_tokens=num_tokens, student_bias_V=bias_V)
        if teacher_out is None:
            return loss()
        teacher_hidden_NE, teacher_head_VE, teacher_bias_V = teacher_out
        return loss(teacher_hidden_NE, teacher_head_VE, self.kd_weight, teacher_bias_V=teacher_bias_V)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        named = ((parallel.plain_name(name), p) for name, p in self.named_parameters())
        return self.optim_spec.build(named, self._ndim)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self._grad_norm = parallel.clip_gradients(self.student, gradient_clip_val).float()
        self._watch.see(1, self._grad_norm, self._batch_number(0))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Not in on_train_batch_end: callbacks run before that, and a step must be logged before it is saved.
        step, every = self.global_step + 1, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step == 1 or (every and step % every == 0) or step == self.trainer.max_steps:
            self._log_step(step)
        # when a scheduler would: callbacks may look before the next step
        extension.write_rates(self, min(step, self.trainer.max_steps - 1))

    # --------------------------------------------------------------- logging

    def _log_step(self, step: int) -> None:
        """Reads the device once and logs the optimizer step just done, `step`; kd_weight still has its weight."""
        sums = self.trainer.strategy.reduce(torch.cat([self._sums, self._watch.is_bad()[None]]), reduce_op="sum")
        on_all = torch.stack([self.kd_weight, self._grad_norm, self._step_tokens])
        *read, not_finite, weight, grad_norm, step_tokens = torch.cat([sums, on_all]).tolist()
        if not_finite:
            self.require_finite()
        self.unchecked.look_at_step(step, step_tokens, read[SUMS.index("tokens")], self.trainer.is_last_batch)
        values = loss_values(read, weight) | {"grad_norm": grad_norm}
        values["lr"] = float(self.trainer.optimizers[0].param_groups[0]["lr"])
        peak = flops.peak_of(self.device, self.compute_dtype, self.trainer.world_size)
        values |= peak_memory(self.device) | self.meter.read(step, self._wait_s, peak)
        if weight == 0 and (brought := self.meter.what_it_brought()):
            rank_zero_info(f"step {step}: {brought}")
        self._write({f"train/{name}": value for name, value in self.with_terms(values).items()}, step)
        self.progress |= {"loss": f"{values['loss']:.3f}", "kd_weight": f"{weight:.3g}"}
        self.progress["tok/s"] = f"{values['tokens_per_s']:,.0f}"

    @property
    def _wait_s(self) -> float:
        return getattr(self._data, "data_wait_s", 0.0)

    def require_finite(self) -> None:
        """Checks losses, gradients and weights before each save; reads the device.

        Raises:
            NonFiniteLossError: names the first step of any rank whose loss or gradient was not finite, and its rows;
                or the weights are not finite, or so large that their squares are not.
        """
        weights = parallel.has_finite_weights(self.trainer, self.student)
        first = self.trainer.strategy.reduce(self._watch.first, reduce_op="min")
        rows = getattr(self._data, "describe_batches", lambda *_: "unknown")
        per_step = self.trainer.accumulate_grad_batches * self.trainer.world_size
        if what := problem(first.tolist(), weights, self.global_step, per_step, rows):
            go_on = how_to_go_on(self.trainer, min(first.tolist()) // per_step)  # above any step if nothing was seen
            raise NonFiniteLossError(
                f"{what}; nothing was saved since. {go_on}, with a lower --model.optim.lr (it is "
                f"{self.optim_spec.lr:g}) or --trainer.gradient_clip_val (it is {self.trainer.gradient_clip_val})"
            )

    def _write(self, values: dict[str, float], step: int) -> None:
        for logger in self.trainer.loggers:  # self.log would count steps from 0 and read the device every step
            logger.log_metrics(values, step=step)

    # ------------------------------------------------------------ evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> Batch:
        extension.check_first(self, batch, "val")
        stats = partial(self._label_stats, batch["labels"].flatten())
        nll_N, rank_N = self.student(batch["input_ids"], batch["positions"], stats, batch.get("cu_seqlens"))
        told = ("sources", "bytes", "thirds") if self._data is not None else ("bytes",)
        known = {f"{name}_N": batch[name].flatten() for name in told if name in batch}
        self.eval_metrics.update(nll_N, rank_N, **known)
        return {"nll": nll_N, "rank": rank_N}

    def _label_stats(
        self, labels_N: Tensor, hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return token_stats(hidden_ND, head_VD, labels_N, bias_V, self.hparams["logits_budget_gib"])

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """The teacher's loss and rank of every label, B x T; the rank is -1 where there is no label."""
        if self.teacher is None:
            raise ConfigError("predict needs a teacher; add the callback salt_lightning.teacher.scoring.ScoreWriter")
        labels_BT = batch["labels"]
        stats = partial(self._label_stats, labels_BT.flatten())
        nll_N, rank_N = self.teacher(batch["input_ids"], batch["positions"], stats, batch.get("cu_seqlens"))
        return {"nll": nll_N.view_as(labels_BT), "rank": rank_N.view_as(labels_BT)}

    def on_validation_start(self) -> None:
        if self.trainer.state.fn != TrainerFn.FITTING:
            require_fitting(self)
        self.meter.pause()

    def on_test_start(self) -> None:
        require_fitting(self)

    def on_validation_end(self) -> None:
        self.meter.go_on()

    def on_validation_epoch_end(self) -> None:
        prefix = "test" if self.trainer.testing else "val"
        values = {f"{prefix}/{name}": float(value) for name, value in self.eval_metrics.compute().items()}
        self.eval_metrics.reset()
        if self.trainer.sanity_checking:
            return
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._write(values, self.global_step)
            self.progress["val_ce"] = f"{values.get('val/ce', math.nan):.3f}"
            self.log_dict({**values, "val/step": float(self.global_step)}, logger=False, sync_dist=True)
        else:  # Lightning also prints and returns these
            self.log_dict({**values, "step": float(self._loaded_step)}, sync_dist=True)

    on_test_epoch_end = on_validation_epoch_end

    # ----------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        averaging.put_into(checkpoint, self)
        if states := checkpoint.get("optimizer_states"):
            checkpoint["optimizer_states"] = [by_name(state) if state else state for state in states]
        checkpoint |= alike.about(self._data, self.trainer, self.optim_spec) | self.meter.state(self.global_step)
        checkpoint |= plain(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None:  # Lightning tells the path no earlier
            extension.require_loadable(self.trainer)
        student = self.hparams["student"] | {"path": self.student_spec.path}
        require_same(checkpoint, type(self).__name__, student, self._data, self.state_dict)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            extension.require_callbacks(self.trainer, checkpoint)
            go_on_from(checkpoint, self.trainer, self._data, self.optim_spec, self.hparams)
            self.meter.load(checkpoint)
        self._loaded_step, self._trained_on = checkpoint["global_step"], about_training(checkpoint)

    # ------------------------------------------------------------------ data

    @property
    def _data(self) -> SALTDataModule | None:
        """The run's SALTDataModule, if it has one."""
        found = self.trainer.datamodule if self._trainer is not None else None  # type: ignore[attr-defined]
        return found if isinstance(found, SALTDataModule) else None
