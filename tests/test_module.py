"""SALTModule in a real Trainer: loading and unloading the teacher, one division, what is logged, what is refused."""

import gc
import math
import re
import signal
import weakref
from contextlib import nullcontext

import lightning.pytorch as pl
import pytest
import torch
from conftest import StopAt, arguments, scalars, weights
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    SpikeDetection,
)
from lightning.pytorch.tuner import Tuner
from reference import salt_reference
from torch._dynamo.utils import counters

from salt_lightning import KDScheduleCallback, ModelSpec, OptimSpec, SALTDataModule, SALTModule, cli, losses
from salt_lightning.checkpoint import RunCheckpoint
from salt_lightning.errors import ConfigError, NonFiniteLossError
from salt_lightning.fit.cadence import check_trainer, phase1_steps, plan_validation, set_cadence
from salt_lightning.fit.watch import NEVER, Watch, problem
from salt_lightning.models import read_checkpoint
from salt_lightning.teacher import probe

CONFIG = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


class Spy(Callback):
    """Records each micro-batch and each optimizer step."""

    def __init__(self):
        self.rows, self.gradients, self.weights_of_kd, self.teachers = [], [], [], []
        self.initial, self.batches = None, []

    def on_train_start(self, trainer, pl_module):
        self.initial = {k: v.clone() for k, v in pl_module.student.state_dict().items()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append(batch["rows"].tolist())
        self.batches.append({key: value.clone() for key, value in batch.items()})
        self.weights_of_kd.append(pl_module.kd_weight.item())
        teacher = pl_module.teacher
        if teacher is not None:
            assert not teacher.training
            assert not any(p.requires_grad for p in teacher.parameters())
            assert not any(module.training for module in teacher.modules())
            if not self.teachers:
                self.teachers = [weakref.ref(teacher), *map(weakref.ref, teacher.parameters())]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        assert pl_module.teacher is None or all(p.grad is None for p in pl_module.teacher.parameters())
        self.gradients.append({k: p.grad.clone() for k, p in pl_module.student.named_parameters()})


@pytest.fixture
def train(settings, tmp_path):
    """train(teacher path, steps, spy, module settings ..., data settings ...) -> module, with the Python interface."""

    def run(teacher=None, kd=None, steps=4, spy=None, data=None, **module_settings):
        module = SALTModule(
            ModelSpec(config=module_settings.pop("config", CONFIG)),
            ModelSpec(path=teacher),
            optim=OptimSpec(lr=1e-2),
            **module_settings,
        )
        own = {key.removeprefix("data."): value for key, value in settings.items() if key.startswith("data.")}
        callbacks = [c for c in (kd, spy) if c is not None]
        trainer = pl.Trainer(
            max_steps=steps, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False,
            use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False,
            val_check_interval=steps, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(module, SALTDataModule(**{**own, **(data or {})}))
        return module

    return run


def test_the_teacher_lives_for_phase_1_alone(train, teacher):
    spy = Spy()
    module = train(teacher, KDScheduleCallback(0.5, steps=2), 4, spy)
    assert spy.weights_of_kd == [0.5, 0.5, 0.0, 0.0]
    assert len(spy.teachers) > 5
    gc.collect()
    assert [ref() for ref in spy.teachers if ref() is not None] == []
    assert module.teacher is None


def test_a_validate_after_a_fit_is_of_its_last_step(train, settings):
    module = train(steps=3)
    own = {key[5:]: value for key, value in settings.items() if key.startswith("data.")}
    (found,) = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(
        module, SALTDataModule(**own), verbose=False
    )
    assert found["step"] == 3.0
    assert "val/ce" in found


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_no_pass_scales_the_gradients_of_the_loss(train, teacher, monkeypatch, accumulate):
    """The head's gradients are as large as the head, and are made in the forward of every micro-batch."""
    came_back = []
    original = losses.scale_and_cast

    def spy(grad, by, dtype):
        came_back.append(by.item())
        return original(grad, by, dtype)

    monkeypatch.setattr(losses, "scale_and_cast", spy)
    train(teacher, KDScheduleCallback(0.5, steps=1), 2, data={"micro_batch_size": 8 // accumulate})
    assert len(came_back) >= 4 * accumulate
    assert set(came_back) == {1.0}


def test_two_schedules_are_refused(train, teacher):
    with pytest.raises(ConfigError, match="the Trainer has 2 KDScheduleCallbacks"):
        train(teacher, KDScheduleCallback(0.5), 2, KDScheduleCallback(0.5, 1))


def test_the_student_is_drawn_on_the_cpu_wherever_it_trains():
    """Lightning makes the training device the default one, whose random numbers are others."""
    students = []
    for context in (nullcontext(), torch.device("meta")):
        module = SALTModule(ModelSpec(config={**CONFIG, "vocab_size": 64, "max_position_embeddings": 16}))
        with context:
            module.configure_model()
        students.append(module.student.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(student.values() for student in students), strict=True))


def test_in_bf16_the_tokens_of_a_step_are_counted_exactly(fit_with, tmp_path, caplog):
    """Lightning makes bf16 the default dtype there: dividing two integers would give 8 bits of precision."""

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            loss = type(pl_module).step_loss

            def step_loss(labels_N, teacher_out, num_tokens, *rest):
                counts.append((num_tokens.item(), int(batch["step_tokens"])))
                return loss(pl_module, labels_N, teacher_out, num_tokens, *rest)

            pl_module.step_loss = step_loss

    counts = []
    own = {"trainer.precision": "bf16-true", "trainer.max_steps": 2, "trainer.val_check_interval": 2,
           "data.block_size": 35}  # fmt: skip
    assert fit_with(tmp_path / "run", Look(), **own) == 0
    said = "the student's weights are kept in bf16, which rounds away updates below about 1/256 of a weight"
    assert f"warning: precision: {said}; --trainer.precision bf16-mixed keeps them in fp32" in caplog.text
    assert all(divided == tokens for divided, tokens in counts)
    assert any(tokens != float(torch.tensor(tokens, dtype=torch.bfloat16)) for _, tokens in counts)  # the premise


def test_a_stop_is_of_one_fit_alone(settings, tmp_path):
    """From Python: a signal, then another fit with the same objects."""
    saver, own = RunCheckpoint(folder=str(tmp_path)), {k[5:]: v for k, v in settings.items() if k.startswith("data.")}
    trainer = pl.Trainer(
        max_steps=6, callbacks=[saver, StopAt(2)], accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, val_check_interval=6, num_sanity_val_steps=0,
    )  # fmt: skip
    module = SALTModule(ModelSpec(config=CONFIG))
    trainer.fit(module, SALTDataModule(**own))
    assert (saver.stopped_by, trainer.global_step, "val/ce" in trainer.callback_metrics) == (signal.SIGTERM, 2, False)
    (tmp_path / ".step-00000003.ckpt.tmp").write_bytes(b"a save that was killed")
    trainer.should_stop = False  # Lightning's flag, not ours
    trainer.fit(module, SALTDataModule(**own), ckpt_path=str(tmp_path / "step-00000002.ckpt"))
    assert (saver.stopped_by, trainer.global_step, "val/ce" in trainer.callback_metrics) == (None, 6, True)
    saver._kept.add(2)  # as where an earlier start keeps it for good
    saver.setup(trainer, module, "fit")  # a third fit, which goes on
    assert saver._kept == {2}
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_accumulation_does_not_change_the_weight(train, teacher):
    spy = Spy()
    train(teacher, KDScheduleCallback(0.8, 4, 2, "linear"), 4, spy, data={"micro_batch_size": 4})
    assert spy.weights_of_kd == pytest.approx([0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.4, 0.4])


def test_the_teacher_is_in_no_parameter_and_no_checkpoint(train, teacher, tmp_path):
    spy = Spy()
    module = train(teacher, KDScheduleCallback(0.5), 2, spy)
    assert module.teacher is not None
    own = {id(p) for p in module.teacher.parameters()}
    assert own
    assert not own & {id(p) for p in module.parameters()}
    module.trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    assert all(key.startswith("student.") for key in weights(tmp_path / "x.ckpt"))
    optimizer = read_checkpoint(str(tmp_path / "x.ckpt"), "x")["optimizer_states"][0]
    assert sum(len(g["params"]) for g in optimizer["param_groups"]) == len(list(module.student.parameters()))


def test_a_lost_student_key_is_not_accepted(train, tmp_path):
    module = train()
    module.trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    del checkpoint["state_dict"]["student.model.model.norm.weight"]
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(RuntimeError, match=r"student.model.model.norm.weight"):
        SALTModule.load_from_checkpoint(tmp_path / "x.ckpt")


def test_a_checkpoint_loads_on_its_own(train, teacher, tmp_path):
    module = train(teacher, KDScheduleCallback(0.5, 1), 2)
    module.trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    loaded = SALTModule.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    for key, tensor in module.student.state_dict().items():
        assert torch.equal(tensor, loaded.student.state_dict()[key])
    assert loaded.teacher is None


def test_a_teacher_changes_neither_initial_weights_nor_data(train, teacher):
    without, with_teacher = Spy(), Spy()
    train(None, None, 3, without)
    train(teacher, KDScheduleCallback(0.5), 3, with_teacher)
    assert without.rows == with_teacher.rows
    assert without.initial.keys() == with_teacher.initial.keys()
    assert all(torch.equal(t, with_teacher.initial[k]) for k, t in without.initial.items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("micro", [8, 2, 1])
def test_one_division_whatever_the_micro_batch(train, teacher, micro, tied):
    """The gradient of one step equals the formula in float64, for 1x8, 4x2 and 8x1 rows with uneven label counts."""
    spy = Spy()
    module = train(
        teacher, KDScheduleCallback(0.7), 1, spy, data={"micro_batch_size": micro},
        config={**CONFIG, "tie_word_embeddings": tied}, teacher_temperature=1.5,
    )  # fmt: skip
    assert len(spy.batches) == 8 // micro
    counts = [(batch["labels"] != -100).sum().item() for batch in spy.batches]
    assert len(set(counts)) > 1 or micro == 8  # the premise: uneven masks
    assert sum(counts) == spy.batches[0]["step_tokens"].item()
    student, teacher = module.student.double(), module.teacher.double()
    student.load_state_dict(spy.initial)
    student.zero_grad()
    ids, positions, labels = (torch.cat([b[k] for b in spy.batches]) for k in ("input_ids", "positions", "labels"))
    hidden, head, _ = student(ids, positions)
    teacher_hidden, teacher_head, _ = teacher(ids, positions)
    salt_reference(hidden, head, labels.flatten(), teacher_hidden, teacher_head, 0.7, 1.5)["loss"].backward()
    for key, parameter in student.named_parameters():
        # fp32 forward and backward of a two-layer model against float64
        gradient, atol = spy.gradients[0][key].double(), 2e-5 * parameter.grad.abs().max().item()
        assert torch.allclose(gradient, parameter.grad, atol=atol), key


def test_a_teacher_without_callback_is_refused(train, teacher):
    with pytest.raises(ConfigError, match="no KDScheduleCallback: it would silently train BASELINE"):
        train(teacher)


def test_a_weight_without_teacher_is_refused(train):
    with pytest.raises(ConfigError, match=r"--kd.weight 0.667 needs a teacher: set --model.teacher.path"):
        train(None, KDScheduleCallback(steps=2))


def test_a_phase_longer_than_the_run_says_how_to_shorten_both(train, teacher):
    with pytest.raises(ConfigError, match=r"--kd.steps 50 .*--trainer.max_steps 10: .* 10 --kd.steps 2;"):
        train(teacher, KDScheduleCallback(steps=50), 10)


def test_another_tokenizer_is_noticed_by_its_token_ids(train, teacher, settings, corpus):
    """Same size, other ids: sizes alone would let it pass."""
    data = {"source": str(corpus), "val_fraction": 0.5}  # another training text: other merges
    with pytest.raises(ConfigError, match="trained with another tokenizer than --data.tokenizer"):
        train(teacher, KDScheduleCallback(steps=1), 2, data=data)


def test_a_smaller_vocabulary_is_named_with_both_sizes(train, teacher):
    with pytest.raises(ConfigError, match=r"has a vocabulary of 320, --data.tokenizer 329"):
        train(teacher, KDScheduleCallback(steps=1), 2, data={"vocab_size": 400})


@pytest.mark.parametrize("rows", [384, 300])
def test_heads_may_have_different_sizes(train, teacher, rows):
    """The teacher's has 320 rows and the tokenizer 300 ids: the student's may have more rows, or exactly 300."""
    module = train(teacher, KDScheduleCallback(0.5), 2, config={**CONFIG, "vocab_size": rows})
    assert len(module.student.head.weight) == rows
    assert len(module.teacher.head.weight) == 320


@pytest.mark.parametrize("teacher_size", [40, 48])
@pytest.mark.parametrize("bias", [False, True])
def test_the_students_loss_is_over_all_its_ids_whatever_the_teacher_has(teacher_size, bias):
    """By the formula: an id that the teacher lacks has probability 0 in it."""
    torch.manual_seed(0)
    module = SALTModule(ModelSpec(config=CONFIG))
    module.kd_weight = torch.tensor(0.4)
    hidden_ND, head_VD = torch.randn(6, 32).requires_grad_(), torch.randn(48, 32).requires_grad_()
    teacher_hidden_NE, teacher_head_VE = torch.randn(6, 16), torch.randn(teacher_size, 16)
    teacher_bias_V = torch.randn(teacher_size) if bias else None
    labels_N = torch.tensor([3, 39, -100, 0, 7, 7])
    out = module.step_loss(
        labels_N, (teacher_hidden_NE, teacher_head_VE, teacher_bias_V), torch.tensor(5.0), hidden_ND, head_VD, None
    )
    logp_NV = torch.log_softmax(hidden_ND.double() @ head_VD.double().T, -1)
    logits_NV = torch.nn.functional.linear(teacher_hidden_NE.double(), teacher_head_VE.double())
    logits_NV = logits_NV + (0 if teacher_bias_V is None else teacher_bias_V.double())
    q_NV = torch.softmax(logits_NV, -1)
    q_NV = torch.nn.functional.pad(q_NV, (0, 48 - q_NV.shape[1]))
    kept = labels_N >= 0
    ce = -logp_NV[kept, labels_N[kept]].sum() / 5
    kd = -(q_NV * logp_NV)[kept].sum() / 5
    expected = 0.6 * ce + 0.4 * kd
    # fp32: sums of 48 terms of size up to 40
    assert abs(out.loss.item() - expected.item()) < 48 * 2**-24 * 40
    for a, b in zip(
        torch.autograd.grad(out.loss, (hidden_ND, head_VD)),
        torch.autograd.grad(expected, (hidden_ND, head_VD)),
        strict=True,
    ):
        assert (a - b).abs().max() < 48 * 2**-24 * b.abs().max()


class Rows(Callback):
    """Records the rows of every micro-batch; `do` runs before it."""

    def __init__(self, do) -> None:
        self.do, self.rows = do, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append(batch["rows"].tolist())
        self.do(pl_module, batch_idx)


def numbers(message: str) -> list[int]:
    """The row numbers that an error names."""
    shown = message.partition("which read rows ")[2].partition("; nothing was saved")[0]
    return [int(number) for number in re.findall(r"(?:^|, )(\d+)(?= \(|, |$)", shown)]


def test_a_loss_that_is_not_finite_ends_the_run_and_names_its_rows(train, tmp_path):
    """Logged, so read, only three steps later; the second of two micro-batches is the one."""

    def spoil(module, batch_idx):
        if batch_idx == 5:
            module.student.head.weight.data[3] = float("inf")

    rows = Rows(spoil)
    with pytest.raises(NonFiniteLossError, match="^train/loss is not finite at step 3, which read rows ") as caught:
        train(steps=6, data={"micro_batch_size": 4}, spy=rows)
    assert numbers(str(caught.value)) == rows.rows[5]
    assert len(rows.rows) == 12  # nothing was read before the last step, which is always logged
    assert "There is no checkpoint: start again, with a lower --model.optim.lr" in str(caught.value)


def test_a_gradient_that_is_not_finite_is_named_before_the_loss_that_it_spoils(train):
    class Spoil(Rows):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 1:
                pl_module.student.head.weight.grad[3] = float("nan")

    rows = Spoil(lambda *_: None)
    with pytest.raises(NonFiniteLossError, match="^train/grad_norm is not finite at step 2, which read rows") as caught:
        train(steps=4, data={"micro_batch_size": 4}, spy=rows)
    assert numbers(str(caught.value)) == rows.rows[2] + rows.rows[3]


@pytest.mark.parametrize(
    ("loss", "gradient", "expected"),
    [
        (NEVER, NEVER, None),
        (6, NEVER, "train/loss is not finite at step 2, which read rows 6, 1"),  # 4 micro-batches per step
        (6, 4, "train/loss is not finite at step 2, which read rows 6, 1"),  # the loss made the gradient
        (8, 4, "train/grad_norm is not finite at step 2, which read rows 4, 4"),  # the gradient made the next loss
        (NEVER, 4, "train/grad_norm is not finite at step 2, which read rows 4, 4"),
    ],
)
def test_the_first_that_went_wrong(loss, gradient, expected):
    assert problem([loss, gradient], True, 9, 4, "{}, {}".format) == expected


def test_the_watch_keeps_the_smallest_number():
    watch = Watch()
    for number, value in enumerate([1.0, 2.0, math.inf, 3.0, math.nan]):
        watch.see(0, torch.tensor(value), number)
        watch.see(1, torch.tensor(1.0), number)
    assert watch.first.tolist() == [2, NEVER]
    assert float(watch.is_bad()) == 1.0


def test_what_is_logged(settings, teacher, tmp_path):
    """Every documented tag, on the optimizer-step axis, and the relations between them."""
    own = {"run": str(tmp_path / "run"), "model.teacher.path": teacher, "kd.weight": 0.6, "kd.steps": 6,
           "model.teacher_temperature": 2.0, "data.micro_batch_size": 4}  # fmt: skip
    assert cli.main(["fit", *arguments(settings, own)]) == 0
    values = scalars(tmp_path / "run")
    always = "loss ce kd_weight grad_norm lr tokens tokens_per_s data_wait_s time_s teacher_time_s flops_student_total"
    always += " flops_teacher_total"
    while_taught = "kd kl teacher_ce teacher_entropy agreement gap"
    assert {f"train/{name}" for name in (always + " " + while_taught).split()} == {t for t in values if "train/" in t}
    for name in always.split():
        assert sorted(values[f"train/{name}"]) == list(range(1, 13)), name
    for name in while_taught.split():
        assert sorted(values[f"train/{name}"]) == list(range(1, 7)), name
    names = ("ce", "perplexity", "accuracy", "tokens", "bits_per_byte")
    assert {t for t in values if "val/" in t} == {f"val/{name}" for name in names}
    v = {tag.removeprefix("train/"): steps for tag, steps in values.items()}
    for step in range(1, 7):
        assert v["loss"][step] == pytest.approx(0.4 * v["ce"][step] + 0.6 * v["kd"][step], rel=1e-6)
        # TensorBoard keeps fp32
        assert v["kl"][step] == pytest.approx(v["kd"][step] - v["teacher_entropy"][step], abs=2e-6)
        assert v["gap"][step] == pytest.approx(v["ce"][step] - v["teacher_ce"][step], abs=1e-6)
        assert v["kl"][step] > 0
        assert 0 <= v["agreement"][step] <= 1
    for step in range(7, 13):
        assert v["loss"][step] == v["ce"][step]
    assert [v["tokens"][step] for step in (1, 12)] == [8 * 32, 12 * 8 * 32]
    assert v["flops_teacher_total"][12] == v["flops_teacher_total"][6] > 0
    assert v["flops_student_total"][12] == pytest.approx(2 * v["flops_student_total"][6])
    assert v["ce"][1] == pytest.approx(torch.log(torch.tensor(320.0)).item(), abs=0.1)  # knows nothing yet


def test_validate_and_test_agree_with_the_formula(settings, teacher, tmp_path, capsys):
    """val/ce, accuracy and bits per byte of a checkpoint, recomputed from its weights and the text."""
    run = tmp_path / "run"
    own = {"run": str(run), "model.teacher.path": teacher, "kd.steps": 6}
    assert cli.main(["fit", *arguments(settings, own)]) == 0
    for verb in ("validate", "test"):
        fewer = {k: v for k, v in settings.items() if not k.startswith(("checkpoint.", "model."))}
        assert cli.main([verb, *arguments(fewer, {"run": str(run), "ckpt_path": "last"})]) == 0
        assert {"validate": "val/ce", "test": "test/ce"}[verb] in capsys.readouterr().out
    assert not any(step not in (6, 12) for step in scalars(run)["val/ce"])  # the run's own curve is left alone
    values = {**scalars(run / "validate"), **scalars(run / "test", ("test/",))}
    module = SALTModule.load_from_checkpoint(run / "checkpoints/step-00000012.ckpt", weights_only=True).double()
    data = SALTDataModule(**{k.removeprefix("data."): v for k, v in settings.items() if k.startswith("data.")})
    data.prepare_data()
    data.setup("validate")
    nats = tokens = right = num_bytes = 0
    for batch in data.val_dataloader():
        with torch.no_grad():
            hidden, head, _ = module.student.eval()(batch["input_ids"], batch["positions"])
        labels = batch["labels"].flatten()
        valid = labels != -100
        log_p = torch.log_softmax((hidden @ head.T)[valid], 1)
        nats -= log_p.gather(1, labels[valid][:, None]).sum().item()
        right += (log_p.argmax(1) == labels[valid]).sum().item()
        tokens += valid.sum().item()
        num_bytes += batch["bytes"].sum().item()
    for prefix in ("val", "test"):
        assert values[f"{prefix}/ce"][12] == pytest.approx(nats / tokens, rel=1e-5)
        assert values[f"{prefix}/accuracy"][12] == pytest.approx(right / tokens, abs=2 / tokens)
        expected = nats / 0.6931471805599453 / num_bytes
        assert values[f"{prefix}/bits_per_byte"][12] == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def shallow(settings, tmp_path_factory) -> dict[str, object]:
    """A student of one layer and a similar teacher: compiling each different kernel takes a second or two."""
    config = {**settings["model.student.config"], "num_hidden_layers": 1}
    own = {"run": str(tmp_path_factory.mktemp("shallow") / "run"), "model.student.config": config, "kd.weight": 0.0}
    assert cli.main(["fit", *arguments(settings, own)]) == 0
    return {"model.student.config": config, "model.teacher.path": f"{own['run']}/checkpoints/step-00000012.ckpt"}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # inside torch's compiler
def test_compiled_models_train_the_same(settings, shallow, tmp_path):
    losses = {}
    for compiled in (False, True):
        run = tmp_path / str(compiled)
        own = {**shallow, "run": str(run), "kd.steps": 2, "trainer.max_steps": 3, "trainer.val_check_interval": 3,
               "model.compile": compiled}  # fmt: skip
        counters.clear()
        assert cli.main(["fit", *arguments(settings, own)]) == 0
        # student and teacher for training, the student for validation
        assert counters["stats"]["unique_graphs"] == 3 * compiled
        losses[compiled] = scalars(run)["train/loss"]
        assert all("_orig_mod" not in key for key in weights(run / "checkpoints/step-00000003.ckpt"))
    assert losses[True] == pytest.approx(losses[False], abs=1e-4)  # fp32, fused and unfused


def test_bf16_mixed_on_cpu_trains_towards_the_same(settings, teacher, tmp_path):
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        own = {"run": str(tmp_path / precision), "model.teacher.path": teacher, "kd.steps": 4,
               "trainer.precision": precision}  # fmt: skip
        assert cli.main(["fit", *arguments(settings, own)]) == 0
        losses[precision] = scalars(tmp_path / precision)["train/loss"]
    # bf16 rounds to 2^-9; the losses are near 5 and the models drift apart over 12 steps
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], abs=0.05)
    assert losses["bf16-mixed"] != losses["32-true"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # inside torch's compiler
def test_a_compiled_teacher_leaves_as_well(train, shallow):
    spy, config = Spy(), shallow["model.student.config"]
    train(shallow["model.teacher.path"], KDScheduleCallback(0.5, steps=1), 2, spy, config=config, compile=True)
    assert len(spy.teachers) > 5
    gc.collect()
    assert [ref() for ref in spy.teachers if ref() is not None] == []


def test_the_callback_holds_no_state(train, teacher):
    kd = KDScheduleCallback(0.5, 2, 1, "linear")
    before = dict(vars(kd))
    train(teacher, kd, 3)
    assert {key: value for key, value in vars(kd).items() if key in before} == before
    assert set(vars(kd)) - set(before) <= {"log", "log_dict"}  # put there by Lightning
    assert kd.state_dict() == {}


def test_the_optimizer_steps_at_the_scheduled_rate(train):
    rates = []

    class Rates(Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.optimizers[0].register_step_pre_hook(self.before_step)

        def before_step(self, optimizer, *_):
            rates.append([group["lr"] for group in optimizer.param_groups])
            assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}

    train(spy=Rates())  # lr 1e-2, no warm-up: a cosine from its top over 4 steps to a tenth
    expected = [1e-2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 4))) for step in range(4)]
    assert rates == [[pytest.approx(rate)] * 2 for rate in expected]


def test_the_teacher_builds_no_graph_and_stays_in_eval(train, teacher):
    """Regardless of what happens to the module around it."""
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.train()
            if not seen:
                pl_module.teacher.register_forward_hook(
                    lambda module, args, out: seen.append((torch.is_grad_enabled(), module.training))
                )
                pl_module.teacher.requires_grad_(True)  # even so

    module = train(teacher, KDScheduleCallback(0.5), 2, Watch())
    assert seen == [(False, False)] * (2 + 4)  # two steps, and the four batches of the validation after them
    assert all(p.grad is None for p in module.teacher.parameters())


def test_the_first_and_the_last_step_are_logged_as_well(settings, tmp_path):
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "trainer.log_every_n_steps": 5}
    assert cli.main(["fit", *arguments(settings, own)]) == 0
    assert sorted(scalars(tmp_path / "run")["train/loss"]) == [1, 5, 10, 12]


def test_a_hugging_face_teacher_of_other_token_ids_is_refused(train, settings, tmp_path):
    """Same size, two tokens exchanged: the tokenizer files beside the model tell."""
    from families import tiny

    own = {key.removeprefix("data."): value for key, value in settings.items() if key.startswith("data.")}
    data = SALTDataModule(**own)
    data.prepare_data()
    folder = tmp_path / "teacher"
    tiny("llama", vocab_size=320, max_position_embeddings=32).model.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    train(str(folder), KDScheduleCallback(0.5, 1, allow_untrained=True), 2)  # its own tokenizer: accepted
    files = (folder / "tokenizer.json").read_text()
    swapped = re.sub(r'"(\w)": (\d+)', lambda m: f'"{m[1]}": {({65: 66, 66: 65}).get(int(m[2]), int(m[2]))}', files)
    assert swapped != files
    (folder / "tokenizer.json").write_text(swapped)
    with pytest.raises(ConfigError, match=r"name 2 token ids differently: id 65 is '\w' here and '\w' there"):
        train(str(folder), KDScheduleCallback(0.5, 1), 2)


def test_a_plain_step_has_no_teacher(train, teacher):
    """The first step with weight 0 already runs without it."""

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((pl_module.kd_weight.item(), pl_module.teacher is not None))

    seen = []
    train(teacher, KDScheduleCallback(0.5, steps=2), 4, Look(), data={"micro_batch_size": 4})
    assert seen == [(0.5, True)] * 4 + [(0.0, False)] * 4


def test_a_baseline_ignores_a_phase_longer_than_the_run(train):
    train(None, KDScheduleCallback(0.0, steps=99), 2)


def test_the_logged_rate_is_that_of_the_step(fit_with, tmp_path):
    assert fit_with(tmp_path / "run") == 0
    cosine = [3e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * i / 10))) for i in range(10)]
    logged = scalars(tmp_path / "run")["train/lr"]
    assert [logged[step] for step in range(1, 13)] == pytest.approx([1.5e-3, 3e-3, *cosine])  # TensorBoard keeps fp32


@pytest.mark.parametrize(
    ("own", "limit"),
    [({}, 1.0), ({"trainer.gradient_clip_val": 0.01}, 0.01), ({"trainer.gradient_clip_val": 0}, math.inf)],
)
def test_gradients_are_clipped_and_their_norm_before_that_is_logged(fit_with, tmp_path, own, limit):
    class Norms(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            before.append(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()]).item())

        def on_train_batch_end(self, trainer, pl_module, *_):
            after.append(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()]).item())

    before, after = [], []
    assert fit_with(tmp_path / "run", Norms(), **own) == 0
    assert max(before) > limit or limit == math.inf  # the premise
    assert after == pytest.approx([min(norm, limit) for norm in before], rel=1e-3)
    logged = scalars(tmp_path / "run")["train/grad_norm"]
    assert [logged[step] for step in range(1, 13)] == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("with_bias", [False, True])
def test_logged_losses_are_the_formula(fit_with, teacher, tmp_path, with_bias):
    """A step with KD, one without and a validation, recomputed in float64 from the weights and batches of the run."""
    import copy

    from families import tiny

    class Keep(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx % 2 == 0:
                students.append(copy.deepcopy(pl_module.student).double())
                teachers.append(copy.deepcopy(pl_module.teacher))
            batches.append(batch)

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                students.append(copy.deepcopy(pl_module.student).eval().double())
            val_batches.append(batch)

    def formula(student, batches, taught_by=None):
        ids, positions, labels = (torch.cat([b[k] for b in batches]) for k in ("input_ids", "positions", "labels"))
        with torch.no_grad():
            hidden, head, bias = student(ids, positions)
            if taught_by is None:
                return salt_reference(hidden, head, labels.flatten(), student_bias_V=bias)
            t_hidden, t_head, t_bias = taught_by.double()(ids, positions)
            return salt_reference(hidden, head, labels.flatten(), t_hidden, t_head, 0.6, 2.0, None, bias, t_bias)

    students, teachers, batches, val_batches = [], [], [], []
    own = {"kd.weight": 0.6, "kd.steps": 1, "model.teacher.path": teacher, "model.teacher_temperature": 2.0,
           "data.micro_batch_size": 4, "trainer.max_steps": 2, "trainer.val_check_interval": 2,
           "kd.allow_untrained": True}  # fmt: skip
    if with_bias:  # and biases large enough to show
        for seed, role in enumerate(("student", "teacher")):
            tiny("phi", seed=seed, vocab_size=320, max_position_embeddings=64).model.save_pretrained(tmp_path / role)
            own[f"model.{role}.path"] = str(tmp_path / role)
    assert fit_with(tmp_path / "run", Keep(), **own) == 0
    v = {tag.removeprefix("train/"): steps for tag, steps in scalars(tmp_path / "run").items()}
    taught, plain = formula(students[0], batches[:2], teachers[0]), formula(students[1], batches[2:])
    means = {name.removesuffix("_sum"): (total / taught["tokens"]).item() for name, total in taught.items()}
    expected = {"loss": taught["loss"].item(), "ce": means["ce"], "kd": means["kd"], "agreement": means["agree"]}
    expected |= {"teacher_ce": means["teacher_ce"], "teacher_entropy": means["teacher_entropy"]}
    expected |= {"kl": means["kd"] - means["teacher_entropy"], "gap": means["ce"] - means["teacher_ce"]}
    assert {name: v[name][1] for name in expected} == pytest.approx(expected, rel=1e-4)  # fp32 models
    assert v["loss"][2] == v["ce"][2] == pytest.approx(plain["loss"].item(), rel=1e-5)
    assert v["val/ce"][2] == pytest.approx(formula(students[2], val_batches)["loss"].item(), rel=1e-5)


@pytest.mark.parametrize("padding", [0.0, 5.0])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_the_padding_of_a_teachers_head_is_no_token(train, tmp_path, family, padding):
    """300 tokens, 384 rows, as in exported models: neither loss, probe, score nor cost sees the other 84."""
    from families import tiny

    torch.manual_seed(0)
    model = tiny(family, vocab_size=300, max_position_embeddings=64).model
    model.save_pretrained(tmp_path / "cut")
    model.resize_token_embeddings(384, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[300:] = padding * torch.randn(84, model.config.hidden_size)
    model.save_pretrained(tmp_path / "padded")
    seen = []
    for name in ("cut", "padded"):
        module = train(str(tmp_path / name), KDScheduleCallback(0.5, allow_untrained=True), 2)
        assert len(module.teacher.head.weight) == (300 if name == "cut" else 384)
        module.teacher.check()  # as after sharding
        batch = next(module._data.samples(2))
        scores = module.predict_step(batch, 0)
        look = torch.tensor(probe.look(module.teacher, [batch], module._data).teacher)
        costs = torch.tensor(module.meter.forward_flops["teacher"])
        seen.append({**module.student.state_dict(), **scores, "look": look, "costs": costs})
    for key, value in seen[0].items():
        assert torch.equal(value, seen[1][key]), key


def test_a_pretrained_student_of_other_token_ids_is_refused(fit_with, settings, tmp_path, capsys):
    """Same size, other ids; with the data's own tokenizer beside it the same model is taken."""
    from families import tiny

    data = {key.removeprefix("data."): value for key, value in settings.items() if key.startswith("data.")}
    own = {"model.student.path": str(tmp_path / "hf"), "trainer.max_steps": 2, "trainer.val_check_interval": 2}
    tiny("llama", vocab_size=300, max_position_embeddings=64).model.save_pretrained(tmp_path / "hf")
    codes = []
    for val_fraction in (0.5, settings["data.val_fraction"]):  # another training text: other merges
        module = SALTDataModule(**{**data, "val_fraction": val_fraction})
        module.prepare_data()
        module.setup("validate")
        module.tokenizer.save_pretrained(tmp_path / "hf")
        codes.append(fit_with(tmp_path / "run", **own))
    assert codes == [2, 0]
    assert re.search(r"error: --model.student.path .* token ids differently: id \d+ is", capsys.readouterr().err)


def test_a_teacher_of_shorter_rows_is_refused(train, teacher):
    """Rotary positions can be given a longer reach; a table of learned ones ends (tests/test_check.py)."""
    remedy = r"set --data.block_size to at most 32"
    remedy += r", or raise it in the folder's config.json \(for a .ckpt, in that of its export"
    with pytest.raises(ConfigError, match=f"max_position_embeddings 32 is smaller than --data.block_size 64; {remedy}"):
        train(teacher, KDScheduleCallback(steps=1), 2, data={"block_size": 64})


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_both_models_are_proved_before_they_are_used(train, teacher, role, monkeypatch):
    monkeypatch.setattr("salt_lightning.models.logit_scale", lambda config, name: 2.0 if name == role else 1.0)
    with pytest.raises(ConfigError, match=f"--model.{role}: hidden states times head differ"):
        train(teacher, KDScheduleCallback(0.5), 2)


@pytest.mark.parametrize(
    ("own", "dtype"),
    [
        ({}, torch.float32),
        ({"trainer.precision": "bf16-mixed"}, torch.bfloat16),
        ({"trainer.precision": "bf16-mixed", "model.teacher.dtype": "float32"}, torch.float32),
    ],
)
def test_the_teacher_has_the_students_compute_dtype_unless_told_another(fit_with, teacher, tmp_path, own, dtype):
    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.update(p.dtype for p in pl_module.teacher.parameters())

    seen = set()
    own = {**own, "kd.weight": 0.5, "kd.steps": 2, "model.teacher.path": teacher, "trainer.max_steps": 2,
           "trainer.val_check_interval": 2}  # fmt: skip
    assert fit_with(tmp_path / "run", Look(), **own) == 0
    assert seen == {dtype}


def test_a_pretrained_student_trains_and_its_checkpoint_needs_the_folder_no_more(fit_with, tmp_path):
    import shutil

    from families import tiny

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert all(module.training for module in pl_module.student.modules())  # dropout, if it has any

    tiny("llama", vocab_size=320, max_position_embeddings=64).model.save_pretrained(tmp_path / "hf")
    own = {"model.student.path": str(tmp_path / "hf"), "trainer.max_steps": 2, "trainer.val_check_interval": 1}
    assert fit_with(tmp_path / "run", Look(), **own) == 0
    shutil.rmtree(tmp_path / "hf")
    path = tmp_path / "run/checkpoints/step-00000002.ckpt"
    loaded = SALTModule.load_from_checkpoint(path, weights_only=True)
    assert all(torch.equal(t, weights(path)[f"student.{k}"]) for k, t in loaded.student.state_dict().items())


def test_every_micro_batch_has_random_numbers_of_its_own(train):
    class Seeds(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            seeds.append(torch.initial_seed())

    seeds = []
    for seed in (0, 1):
        train(None, None, 3, Seeds(), data={"micro_batch_size": 4}, seed=seed)
    assert len(set(seeds)) == 2 * 3 * 2


def test_the_log_says_that_the_teacher_left_and_what_it_brought_or_that_it_stays(fit_with, teacher, tmp_path, caplog):
    own = {"kd.weight": 0.5, "kd.steps": 6, "model.teacher.path": teacher}
    assert fit_with(tmp_path / "run", **own, **{"trainer.max_steps": 18}) == 0
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if line.startswith("step 6: the teacher was unloaded, ")]) == 1
    assert len([line for line in said if "tokens/s without the teacher" in line]) == 1
    assert "stays to the last step" not in caplog.text
    assert fit_with(tmp_path / "rkd", **{**own, "kd.steps": None}) == 0
    assert caplog.text.count("the teacher stays to the last step (RKD), because --kd.steps is null") == 1
    assert "is not used" not in caplog.text
    assert fit_with(tmp_path / "baseline", **{**own, "kd.weight": 0.0}) == 0
    assert caplog.text.count(f"--model.teacher.path {teacher} is not used with --kd.weight 0") == 1
    more = {"kd.weight": 0.0, "kd.stop_margin": 0.5, "kd.probe_gradients": True, "model.teacher.path": None}
    assert fit_with(tmp_path / "margin", **own | more) == 0
    assert caplog.text.count("--kd.stop_margin 0.5 and --kd.probe_gradients true are not used with --kd.weight 0") == 1


@pytest.mark.parametrize("every", [5, 6, 12])
def test_a_gradient_probe_that_no_validation_makes_is_said(fit_with, teacher, tmp_path, every):
    """Phase 1 has 6 steps; a validation after the last of them finds no teacher."""
    own = {"kd.weight": 0.5, "kd.steps": 6, "model.teacher.path": teacher, "kd.probe_gradients": True,
           "trainer.val_check_interval": every}  # fmt: skip
    said = "--kd.probe_gradients true logs nothing: there is no validation before step 6"
    with pytest.warns(UserWarning, match=said) if every > 5 else nullcontext():
        assert fit_with(tmp_path / "run", **own) == 0
    assert bool(scalars(tmp_path / "run", ("probe/grad_cosine",))) == (every == 5)


def test_the_last_line_says_of_which_step_its_loss_is(fit_with, tmp_path, capsys):
    own = {"kd.weight": 0.0, "trainer.max_steps": 12}
    assert fit_with(tmp_path / "run", **own, **{"trainer.val_check_interval": 5}) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"done: step 12, val/ce \d\.\d{4} at step 10, \S+", last)
    loss = scalars(tmp_path / "run")["val/ce"][10]
    assert f"val/ce {loss:.4f} at step 10" in last


def test_the_time_of_a_run_leaves_validation_out_and_goes_on_after_a_resume(fit_with, tmp_path):
    import time

    class Slow(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            time.sleep(0.5 if batch_idx == 0 else 0)

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx):
            time.sleep(2)

    short = {"data.val_rows": 1, "trainer.val_check_interval": 2}
    assert fit_with(tmp_path / "run", Slow(), **short, **{"trainer.max_steps": 4}) == 0
    assert fit_with(tmp_path / "run", **short, **{"trainer.max_steps": 6, "ckpt_path": "last"}) == 0
    time_s = [seconds for _, seconds in sorted(scalars(tmp_path / "run")["train/time_s"].items())]
    assert len(time_s) == 6
    assert time_s[0] >= 0.5
    assert 0 < time_s[2] - time_s[1] < 2  # the validation of step 2 is in between
    assert time_s == sorted(time_s)


def test_a_schedule_on_another_module_is_refused(teacher):
    class Mine(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = SALTModule(ModelSpec(config=CONFIG), teacher=teacher)
            self.training_step, self.configure_optimizers = self.inner.training_step, self.inner.configure_optimizers

    trainer = pl.Trainer(max_steps=1, callbacks=[KDScheduleCallback(0.5, 1)], accelerator="cpu", logger=False)
    with pytest.raises(ConfigError, match="KDScheduleCallback needs a SALTModule, not a Mine"):
        trainer.fit(Mine(), torch.utils.data.DataLoader([]))


@pytest.mark.parametrize(
    ("interval", "planned", "said"),
    [
        (4, 8, False),
        (12, 24, False),
        (100, 24, False),
        (5, 10, True),
        (0.25, 6, False),
        (0.4, 8, False),
        (1.0, 24, False),
    ],
)
def test_an_interval_that_leaves_out_the_last_step_is_said(interval, planned, said, caplog):
    trainer = pl.Trainer(max_steps=12, val_check_interval=interval, accelerator="cpu", logger=False)
    for _ in range(2):  # as in a second fit
        set_cadence(trainer, 2)
    with caplog.at_level("INFO"):
        plan_validation(trainer)
    assert trainer.val_check_interval == planned
    assert ("validation every 5 steps leaves out the last step" in caplog.text) == said
    assert ("leaves out" in caplog.text) == said
    trainer.val_check_interval = 25  # micro-batches, as with a user's own loader
    plan_validation(trainer)
    assert trainer.val_check_interval == 24


@pytest.mark.parametrize("monitor", ["val/ce", "val/ce/books", "val/tokens"])
def test_what_a_validation_logs_may_be_monitored(monitor):
    trainer = pl.Trainer(callbacks=[EarlyStopping(monitor)], accelerator="cpu", logger=False)
    trainer.strategy._lightning_module = SALTModule(ModelSpec(config=CONFIG))
    check_trainer(trainer)


def test_monitors_of_checkpoints_and_names_that_another_may_log():
    class Mine(SALTModule):
        """May log others."""

    class Mended(SpikeDetection):
        """May have a state that can be loaded."""

    for kind, callbacks in (
        (SALTModule, [ModelCheckpoint(monitor="step")]),
        (SALTModule, [Mended()]),
        (SALTModule, [EarlyStopping("mine"), Spy()]),
        (Mine, [EarlyStopping("mine")]),
    ):
        trainer = pl.Trainer(callbacks=callbacks, accelerator="cpu", logger=False, limit_val_batches=0)
        trainer.strategy._lightning_module = kind(ModelSpec(config=CONFIG))
        check_trainer(trainer)


@pytest.mark.parametrize(("steps", "expected"), [(0, 0), (4, 4), (20, 9), (None, 9)])
def test_phase_1_may_be_empty_or_all_of_a_run(steps, expected):
    trainer = pl.Trainer(max_steps=9, callbacks=[KDScheduleCallback(0.667, steps)], accelerator="cpu", logger=False)
    assert phase1_steps(trainer) == expected


@pytest.mark.parametrize(
    "callback",
    [GradientAccumulationScheduler({0: 2}), BatchSizeFinder(), LearningRateFinder(), BackboneFinetuning()],
)
def test_callbacks_that_set_what_follows_from_elsewhere(callback):
    trainer = pl.Trainer(callbacks=[callback], accelerator="cpu", logger=False)
    with pytest.raises(ConfigError, match=f"--trainer.callbacks {type(callback).__name__} is not supported: "):
        check_trainer(trainer)


def test_a_tuner_is_refused(settings):
    own = {k[5:]: v for k, v in settings.items() if k.startswith("data.")}
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, use_distributed_sampler=False)
    with pytest.raises(ConfigError, match="LearningRateFinder is not supported: it sets the learning rate, which foll"):
        Tuner(trainer).lr_find(SALTModule(ModelSpec(config=CONFIG)), datamodule=SALTDataModule(**own))


def test_batches_of_ones_own_with_a_teacher(teacher):
    """The probe evaluates the teacher in each validation of phase 1."""
    batch = {"input_ids": torch.arange(32).view(2, 16), "labels": torch.arange(1, 33).view(2, 16),
             "positions": torch.arange(16).repeat(2, 1), "step_tokens": torch.tensor(32)}  # fmt: skip
    loader = torch.utils.data.DataLoader([batch] * 3, batch_size=None)
    vocab = read_checkpoint(teacher, "test")["hyper_parameters"]["student"]["config"]["vocab_size"]
    module = SALTModule(ModelSpec(config={**CONFIG, "vocab_size": vocab, "max_position_embeddings": 16}), teacher)
    trainer = pl.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=1,
        callbacks=[KDScheduleCallback(0.5, 2)],
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    assert (trainer.global_step, module.teacher, module.meter.totals(3).taught_steps) == (3, None, 2)


class OwnData(pl.LightningDataModule):
    def __init__(self, loader):
        super().__init__()
        self.train_dataloader = self.val_dataloader = lambda: loader


@pytest.mark.parametrize("in_a_module", [False, True])
def test_batches_of_ones_own_are_enough(in_a_module):
    """docs/own-data.md: the loss of the first step and of validation equals that of full logits."""
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(64, (4, 17), generator=generator)
    batch = {"input_ids": tokens_BT[:, :-1], "labels": tokens_BT[:, 1:], "positions": torch.arange(16).repeat(4, 1),
             "bytes": torch.full((4, 16), 3), "sources": torch.full((4, 16), 7)}  # fmt: skip
    loader = torch.utils.data.DataLoader([{**batch, "step_tokens": torch.tensor(64)}], batch_size=None)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    spec = ModelSpec(config={**sizes, "vocab_size": 64, "max_position_embeddings": 16})
    module = SALTModule(spec, optim=OptimSpec(lr=1e-9))
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=1, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, *([OwnData(loader)] if in_a_module else [loader, loader]))
    logits_BTV = module.student.model(input_ids=batch["input_ids"]).logits
    true = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch["labels"].flatten()).item()
    assert trainer.callback_metrics["val/ce"].item() == pytest.approx(true, rel=1e-6)
    bits = true / math.log(2) / 3
    assert trainer.callback_metrics["val/bits_per_byte"].item() == pytest.approx(bits, rel=1e-6)
    assert float(module.progress["loss"]) == pytest.approx(true, abs=1e-3)


class Loader:
    """Five batches per epoch; saves its position and continues from it."""

    def __init__(self) -> None:
        self.next, self.resumed = 0, False

    def __len__(self) -> int:
        return 5

    def __iter__(self):
        if not self.resumed:
            self.next = 0
        self.resumed = False
        while self.next < 5:
            self.next += 1
            ids_BT = torch.arange(16).repeat(2, 1) * (self.next + 1) % 64
            yield {"input_ids": ids_BT, "labels": ids_BT.roll(-1, 1), "positions": torch.arange(16).repeat(2, 1),
                   "step_tokens": torch.tensor(64)}  # fmt: skip

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next, self.resumed = state["next"], True


def test_a_loader_of_ones_own_that_knows_its_place_goes_on_there(tmp_path):
    sizes = {**CONFIG, "vocab_size": 64, "max_position_embeddings": 16}

    def weights_after(steps: int, folder: str, start: str | None = None) -> dict[str, torch.Tensor]:
        module = SALTModule(ModelSpec(config=sizes), optim=OptimSpec(lr=1e-2))
        trainer = pl.Trainer(
            max_steps=12, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            num_sanity_val_steps=0, accumulate_grad_batches=2, default_root_dir=tmp_path / folder,
            callbacks=[RunCheckpoint(None, at_steps=[8]), StopAt(steps)],
        )  # fmt: skip
        trainer.fit(module, Loader(), Loader(), ckpt_path=start)
        return module.student.state_dict()

    whole = weights_after(99, "whole")
    weights_after(8, "cut")
    resumed = weights_after(99, "cut", str(tmp_path / "cut/checkpoints/step-00000008.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), resumed.values(), strict=True))


def test_validation_by_epochs_is_refused(settings):
    own = {key[5:]: value for key, value in settings.items() if key.startswith("data.")}
    trainer = pl.Trainer(max_steps=2, accelerator="cpu", logger=False, check_val_every_n_epoch=2)
    with pytest.raises(ConfigError, match="--trainer.check_val_every_n_epoch 2: a run is one Lightning epoch"):
        trainer.fit(SALTModule(ModelSpec(config=CONFIG)), SALTDataModule(**own))
