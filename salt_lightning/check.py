"""The verb check: finds everything that would stop or spoil a fit with these settings, before its first step.

Text and tokenizer are prepared as in the fit, which then finds them in the cache; nothing is trained, and nothing is
written into the run's folder.
"""

import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from salt_lightning import flops, memory, models, parallel, preflight
from salt_lightning.checkpoint import savers
from salt_lightning.data import SALTDataModule
from salt_lightning.errors import ConfigError, counted, of_others, one_line, raised
from salt_lightning.export import check_target
from salt_lightning.fit import cadence, device, extension, optim
from salt_lightning.fit.restart import go_on_from, require_same
from salt_lightning.hugging_face import attention
from salt_lightning.hugging_face.little import in_little
from salt_lightning.hugging_face.spec import ModelSpec, fresh_config, resolved, unnamed_sizes
from salt_lightning.hugging_face.token_ids import check_fit
from salt_lightning.metrics import TokenMetrics
from salt_lightning.models import CausalLM
from salt_lightning.module import SALTModule
from salt_lightning.preflight import Finding, listed, once_each, size_said
from salt_lightning.run.peers import writes_elsewhere
from salt_lightning.schedule import KDScheduleCallback, kd_callbacks
from salt_lightning.selection import KeepRule
from salt_lightning.teacher import probe
from salt_lightning.teacher.difficulty import find_files
from salt_lightning.teacher.scores import Scores

_WHOLE_PARAMETERS = 5e8  # a larger fresh student is tested with few and narrow layers
_OUTSIDE_BYTES = 3 << 28  # what is not tensors: Python or CUDA's context, and libraries; 0.75 GiB
_GAPS = 0.04  # share of the memory lost between the allocator's blocks
_CARDS_GIB = (16, 24, 40, 80)


@dataclass
class Check:
    """Collects findings; a failed check is one of them and does not hide the others."""

    module: SALTModule
    data: SALTDataModule
    trainer: pl.Trainer
    accelerator: str
    memory_gib: float | None
    findings: list[Finding] = field(default_factory=list)
    _untrained: float | None = None  # CE of a student before its first step
    _unfit: set[str] = field(default_factory=set)  # models that cannot read the data's rows
    _apart: dict[str, attention.Apart] = field(default_factory=dict)  # how a GPU will separate a model's documents

    def add(self, level: preflight.Level, about: str, said: str, remedy: str = "") -> None:
        self.findings.append(Finding(level, about, said, remedy))

    def probe(self, about: str, function: Callable[..., Any], *args: Any) -> Any:
        """What `function` returns; None if it raises an error, which becomes a finding."""
        try:
            return function(*args)
        except (ConfigError, OSError) as error:
            problems = error.problems if isinstance(error, ConfigError) else [str(error)]
            self.findings += [Finding("error", about, problem) for problem in problems]
            return None

    def works(self, about: str, function: Callable[..., Any], *args: Any) -> bool:
        """Whether `function` raises no error."""
        before = len(self.findings)
        self.probe(about, function, *args)
        return len(self.findings) == before

    def run(self) -> list[Finding]:
        attach(self.module, data := self.data, self.trainer)
        self._batch()  # first: the next ones count validations in micro-batches
        self._plan()
        thirds = bool(data.difficulty)
        batches = self._text()
        metrics = self.probe("thirds", TokenMetrics, data.source_names, thirds) if data.source_names else None
        self.works("trainer", cadence.check_trainer, self.trainer, True, metrics and metrics.parts)
        student = self._student(batches)
        teacher = self._teacher(batches)
        if student is not None:
            self._weights(student)
            self._compute(student, teacher)
            try:
                self._memory(student, teacher)
            except Exception as error:  # it runs any model's code on tensors that the code was not written for
                self.add("warning", "memory", f"not estimated: {type(error).__name__}: {one_line(error, 200)}")
        return self.findings

    def resumes(self, function: Callable[..., Any], *args: Any) -> None:
        """Calls a check of the checkpoint that the fit will continue from, if there is one."""
        if self._checkpoint:
            self.probe("resume", function, self._checkpoint, *args)

    @cached_property
    def _checkpoint(self) -> dict[str, Any]:
        path = self.trainer.ckpt_path
        return models.read_checkpoint(str(path), "--ckpt_path") | {"state_dict": {}} if path else {}

    @property
    def _first_step(self) -> int:
        return int(self._checkpoint.get("global_step", 0))

    # ------------------------------------------------------------- settings

    @property
    def _kd(self) -> KDScheduleCallback:
        return kd_callbacks(self.trainer)[0]

    def _plan(self) -> None:
        """Checks the run's steps: phases, warm-up, and settings that contradict them."""
        max_steps, schedule, optim = self.trainer.max_steps, self._kd.schedule, self.module.optim_spec
        if self.works("phases", self._kd.setup, self.trainer, self.module, "fit"):
            taught = schedule.kd_steps(max_steps)
            unused = self._kd.unused(self.module.teacher_spec.path)
            self.findings.append(preflight.phases(taught, max_steps, schedule.anneal_steps, unused))
        if self.works("learning rate", optim.check, max_steps):
            said = f"{optim.lr:g} after {optim.warmup_steps} warm-up steps, then {optim.schedule}"
            self.add("ok", "learning rate", said)
        self.resumes(partial(self._kd.on_load_checkpoint, self.trainer, self.module))
        self.works("device", device.require, self.module, self._device())
        for callback in savers(self.trainer):
            self.works("export", callback.setup, self.trainer, self.module, "fit")

    def _batch(self) -> None:
        """Checks batches and validation."""
        data, trainer = self.data, self.trainer
        if not self.works("batch", data.set_trainer):
            return
        world = cadence.place(data.trainer)[1]
        on = f"{world} device{'s' if world > 1 else ''}"
        self.add("ok", "batch", f"{data.global_batch_size} rows = {data.accumulate} x {data.micro_batch_size} on {on}")
        if remark := parallel.device_remark(trainer):
            self.add("warning", "device", *remark)
        interval = getattr(trainer, "val_check_interval", None)
        if interval is None or trainer.limit_val_batches == 0:
            return
        every = interval // data.accumulate
        said = f"every {every} steps, {trainer.max_steps // every} times"
        if left := trainer.max_steps % every:
            remedy = "the final loss is missing: use a --trainer.val_check_interval that divides --trainer.max_steps"
            self.add("warning", "validation", f"{said}, not in the last {left} steps", remedy)
        else:
            self.add("ok", "validation", f"{said}, also after the last step")

    # ----------------------------------------------------------------- text

    def _text(self) -> list[dict[str, Tensor]]:
        """Checks the text and its rows; returns some validation rows to test models with, if there are any."""
        module, data, trainer = self.module, self.data, self.trainer
        # if what these settings name is missing, the text is checked without it
        if data.selection and not self.works("selection", Scores, data.selection, "--data.selection"):
            data.selection, data.keep = None, KeepRule()
        if data.difficulty and not self.works("thirds", find_files, Path(data.difficulty), "fit"):
            data.difficulty = None
        if not self.works("text", data.prepare_data):
            return []
        trains = self.works("text", data.setup, "predict")
        validates = self.works("validation text", data.setup, "validate")
        if trains:
            files = data._train.files  # type: ignore[union-attr]
            read = counted(data.text["documents"], "document")
            said = f"{data.text['tokens']} tokens of {read}, vocabulary of {data.vocab_size}"
            size = sum(file.stat().st_size for file in files.folder.parent.glob("*/*"))
            free = size_said(shutil.disk_usage(data.cache_dir).free)
            self.add("ok", "text", f"{said}; {size_said(size)} in {data.cache_dir}, {free} free")
            if validates:
                self.resumes(go_on_from, trainer, data, module.optim_spec, module.hparams)
            if reads := self.probe("rows", data.reads, trainer.max_steps):
                self.findings.append(reads)
            if data.selection and (found := self.probe("selection", data.plan_selection)):
                self.add("warning" if found.remedy else "ok", "selection", found.said, found.remedy)
        if not (trains and validates):
            return []
        self.findings += data.doubts()
        return list(data.samples(min(8, data.micro_batch_size)))  # fit judges by its micro-batches

    # --------------------------------------------------------------- models

    def _student(self, batches: list[dict[str, Tensor]]) -> CausalLM | None:
        """The student, without weights if it is fresh; checks its head and its loss on the text with real weights."""
        spec = self.module.student_spec
        if spec.path:
            lm = self._pretrained(spec, "student", spec.dtype_or(torch.float32))
        else:
            lm = self.probe("student", models.build_empty, spec, self.data)
        if lm is None:
            return None
        self.resumes(require_same, "SALTModule", asdict(resolved(spec, lm.model.config)), self.data, dict)
        small: ModelSpec | None = spec
        if not spec.path and _count(lm) > _WHOLE_PARAMETERS:
            small = in_little(spec, lm.model.config)
            said = "tested with few narrow layers" if small else f"not tested: no small {spec.family} has its settings"
            self.add("note", "student", f"{said}, to save time and memory")
        if small is None or (not spec.path and self.data._train is None):  # without a tokenizer
            return lm
        sizes = self.data if small is spec else None  # the small one has its own
        real = lm if spec.path else CausalLM(models.build_fresh(small, sizes, self.module.hparams["seed"]), "student")
        proved = self._proof(real)
        lm.apart = real.apart
        if proved and small is spec and batches and "student" not in self._unfit:
            loss = probe.look(real, probe.cut(batches, _count(real)), self.data)
            if spec.path:
                self.add("ok", "student CE", f"{loss.teacher:.2f} nats before its first step; ln(V) {loss.uniform:.2f}")
            else:
                self._untrained = loss.teacher
        return lm

    def _teacher(self, batches: list[dict[str, Tensor]]) -> CausalLM | None:
        spec, module = self.module.teacher_spec, self.module
        if not (spec.path and self._kd.schedule.is_taught(self._first_step)):
            return None  # a resume in phase 2 does not need it either
        lm = self._pretrained(spec, "teacher", spec.dtype_or(module.compute_dtype))
        if lm is None:
            return None
        lm.eval().requires_grad_(False)
        lm.num_ids = None if self.data._train is None else self.data.vocab_size  # without text maybe no tokenizer
        if self._proof(lm) and batches and "teacher" not in self._unfit:
            loss = replace(probe.look(lm, probe.cut(batches, _count(lm)), self.data), untrained=self._untrained)
            self.findings.append(preflight.teacher(loss, str(spec.path), self._kd.allow_untrained))
        return lm

    def _pretrained(self, spec: ModelSpec, name: str, dtype: torch.dtype) -> CausalLM | None:
        lm = self.probe(name, lambda: CausalLM(models.load_pretrained(spec, name, dtype), name))
        if lm is not None and self.data._train is not None:
            if fit := self.probe(f"{name} tokens", check_fit, spec, name, self.data):
                self.add("ok" if fit[0] else "warning", f"{name} tokens", fit[1])
            else:
                self._unfit.add(name)
        return lm

    def _proof(self, lm: CausalLM) -> bool:
        """Checks that the model does what the head loss needs; whether it does."""
        if (off := self.probe(f"{lm.name} head", lm.check)) is None:
            return False
        said = f"hidden states x head equal {type(lm.model).__name__}'s own logits (largest difference {off:.1g})"
        self.add("ok", f"{lm.name} head", said + ("; our own mask separates documents" if lm.apart == "mask" else ""))
        asked = (self.module.student_spec if lm.name == "student" else self.module.teacher_spec).attention
        on_gpu = self._device() == "cuda" and self.module.compute_dtype == torch.bfloat16
        if on_gpu and (foreseen := attention.foresee(lm, asked, lm.name == "student")):
            self._apart[lm.name], how = foreseen
            self.add("ok", f"{lm.name} attention", f"on a GPU {how}")
        return True

    # -------------------------------------------------- weights, time, memory

    def _weights(self, student: CausalLM) -> None:
        trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        matrices = [p for name, p in trained.items() if optim.decays(name, p.ndim)]
        frozen = _count(student) - sum(p.numel() for p in trained.values())
        active = flops.active_parameters(student.model)  # as such models are named: 30B with 3B active
        num, each, decay = map(flops.millions, (_count(student), active, sum(p.numel() for p in matrices)))
        met = f" ({each} for each token)" if active < _count(student) else ""
        said = (
            f"{type(student.model).__name__}, all {f'but {frozen} of ' if frozen else ''}{num} parameters{met} train; "
            f"{len(matrices)} matrices ({decay}) decay by {self.module.optim_spec.weight_decay:g}, "
        )
        blocks = isinstance(self.trainer.strategy, parallel.SHARDS_MODELS)
        compiled = ("its blocks" if blocks else "its backbone, whole") if self.module.hparams["compile"] else "nothing"
        self.add("ok", "student", f"{said}{len(trained) - len(matrices)} vectors do not; compiled: {compiled}")
        if rest := unnamed_sizes(self.module.student_spec, student.model.config):
            self.add("note", "student sizes", f"not given, so the family's defaults: {rest}")
        self.findings += extension.doubts(student, self.trainer.precision)
        self.findings += [saver.space(self.trainer, student.parameters()) for saver in savers(self.trainer)]

    def _compute(self, student: CausalLM, teacher: CausalLM | None) -> None:
        tokens, steps = self.data.global_batch_size * self.data.block_size, self.trainer.max_steps
        per_token = [
            flops.forward_flops_per_token(lm.model, self.data.block_size, lm.num_ids) if lm else 0.0
            for lm in (student, teacher)
        ]
        first, taught = self._first_step, self._kd.schedule.kd_steps(steps)
        plain, extra = flops.student_flops(per_token[0], tokens), per_token[1] * tokens
        known = not math.isnan(plain + extra)
        said = "the FLOPs of some layers are unknown, so log and compare leave FLOPs out"
        if known:
            said = f"{plain:.3g} FLOPs per step"
            if extra:
                said += f", {plain + extra:.3g} with the teacher (+{extra / plain:.0%})"
            whole = plain * max(0, steps - first) + extra * max(0, taught - first)
            said += f"; the {'rest of the ' if first else ''}run {whole:.3g}"
            strategy = self.trainer.strategy
            if peak := flops.peak_of(strategy.root_device, self.module.compute_dtype, self.trainer.world_size):
                said += f"; at most {peak * tokens / plain:,.0f} tokens/s without a teacher by the GPU's data sheet"
        if teacher is not None:
            said += f"; teacher: {flops.millions(flops.num_parameters(teacher.model))} parameters, frozen"
        self.add("ok" if known else "note", "compute", said)

    def _memory(self, student: CausalLM, teacher: CausalLM | None) -> None:
        data, kind = self.data, self._device()
        for lm in filter(None, (student, teacher)):
            lm.apart = self._apart.get(lm.name, lm.apart)
        fit = memory.Fit(self.module, student, teacher, kind)
        found = fit.peaks(data.micro_batch_size)
        if teacher is not None and self._kd.schedule.kd_steps(self.trainer.max_steps) == self.trainer.max_steps:
            found = found[:1]  # it never leaves
        names = ["memory, phase 1", "memory, phase 2"] if len(found) == 2 else ["memory"]
        if teacher is None and self._kd.schedule.is_taught(self._first_step):
            self.add("note", "memory", "not counting the missing teacher, which needs memory too:")
        for name, peak in zip(names, found, strict=True):
            self.add("ok", name, peak.described(data.micro_batch_size))
        given = None if self.memory_gib is None else int(self.memory_gib * 2**30)
        if (limit := given or device.memory_bytes(kind, self.trainer.num_devices)) is None:
            most = (f"{fit.largest(_usable(gib << 30), prove=False) or 'none'} on {gib} GiB" for gib in _CARDS_GIB)
            said = f"no GPU here; the largest that fits, in rows: {', '.join(most)}"
            self.add("note", "micro-batch", said, "give your GPU's memory, e.g. --check.memory_gib 24")
            return
        fitting = fit.largest(_usable(limit))
        said = f"a run can use {size_said(_usable(limit))} of {size_said(limit)}; the largest that fits: "
        all_of_step = fitting == data.global_batch_size // cadence.place(data.trainer)[1]
        said += f"{fitting or 'none'}{' (all of a step)' if all_of_step else ''}"
        if max(peak.total for peak in found) <= _usable(limit):
            self.add("ok", "micro-batch", said)
            return
        remedy = f"--data.micro_batch_size {fitting}" if fitting else "more devices, with --config configs/fsdp.yaml"
        if not fitting and fit.peaks(2)[0].total - fit.peaks(1)[0].total > _usable(limit):
            remedy = "a smaller --data.block_size"  # sharding does not divide the activations of a row
        if not self.module.hparams["activation_checkpointing"]:
            remedy += ", or --model.activation_checkpointing true"
        said = f"--data.micro_batch_size {data.micro_batch_size} does not fit: {said}"
        self.add("error", "micro-batch", said, remedy)

    def _device(self) -> str:
        """The device to estimate for: the CPU only if the user named it."""
        on_cpu = self.accelerator == "cpu" or self.trainer.strategy.root_device.type == "mps"  # shares the CPU's memory
        return "cpu" if on_cpu and self.memory_gib is None else "cuda"


# ---------------------------------------------------------------------- functions


def attach(module: SALTModule, data: SALTDataModule, trainer: pl.Trainer) -> None:
    """Connects the three as in a fit; starts no process and touches no device."""
    trainer.state.fn = TrainerFn.FITTING
    trainer.strategy.connect(module)
    module.trainer = data.trainer = trainer
    trainer._data_connector.attach_datamodule(module, data)


def _count(lm: CausalLM) -> int:
    return sum(p.numel() for p in lm.parameters())


def without_text(
    module: SALTModule, data: SALTDataModule, trainer: pl.Trainer, export_to: str | None, teaches: bool
) -> list[Callable[[], object]]:
    """The checks of a fit's settings that need no text. `teaches`: the teacher will be loaded."""
    student, teacher = module.student_spec, module.teacher_spec
    looks: list[Callable[[], object]] = [
        partial(module.optim_spec.check, trainer.max_steps),
        partial(cadence.check_trainer, trainer),
        partial(cadence.accumulation, data.global_batch_size, data.micro_batch_size, cadence.place(trainer)[1]),
        *(partial(kd.check, trainer, module.has_teacher, data) for kd in kd_callbacks(trainer)[:1]),
        *([partial(check_target, Path(export_to), "--checkpoint.export")] if export_to else ()),
        partial(models.check_path, student, "student", trains=True),
        *([] if student.path else [partial(fresh_config, student, data, before_text=True)]),
    ]
    if teaches:
        looks.append(partial(models.check_path, teacher, "teacher"))
        if teacher.is_checkpoint and Path(str(teacher.path)).exists():
            looks.append(partial(models.read_checkpoint, str(teacher.path), "--model.teacher.path"))
    return looks


def _usable(total: int) -> int:
    return int((total - _OUTSIDE_BYTES) * (1 - _GAPS))


def besides(
    instead: Iterable[str], module: SALTModule, data: SALTDataModule, trainer: pl.Trainer, teaches: bool
) -> list[str]:
    """What else is wrong, apart from the refused settings that have defaults `instead`."""
    looks = without_text(module, data, trainer, None, teaches)
    if "trainer.accelerator" in instead or "trainer.devices" in instead:  # the number of devices is not known
        looks = [look for look in looks if getattr(look, "func", None) is not cadence.accumulation]
    sizes = ["model.student.config"] if "model.student.family" in instead else []  # of another family
    return of_others(raised([*looks, partial(data.require_files, instead)]), [*instead, *sizes])


def report(check: Check, wrong: Iterable[str], refused: bool, teaches: bool) -> int:
    """Prints all findings, `wrong` settings first; returns the exit code.

    `refused`: a class refused some settings, so the sizes may not be the user's; then prepares no text and builds no
    model. `teaches`: the teacher will be loaded.
    """
    if not refused and check.trainer.max_steps < 1:  # it has no phases, and reads no rows
        wrong, refused = [*wrong, *besides((), check.module, check.data, check.trainer, teaches)], True
    check.findings += [Finding("error", "settings", said) for said in wrong]
    rest = Finding("note", "the rest", "text, models, memory and disk: checked once this is fixed")
    check.findings = [*check.findings, rest] if refused else once_each(check.run())
    if not writes_elsewhere():
        print(listed(check.findings, min(120, shutil.get_terminal_size((120, 24)).columns)))
    return int(any(finding.level == "error" for finding in check.findings))
