"""Probes of student and teacher compared with full logits in float64, and the boundary that they find."""

import copy
import itertools
import math
import signal

import lightning.pytorch as pl
import pytest
import torch
from conftest import StopAt, arguments, scalars, weights
from lightning.pytorch.callbacks import Callback
from reference import log_softmax

from salt_lightning import KDScheduleCallback, SALTDataModule, cli
from salt_lightning.errors import ConfigError
from salt_lightning.hugging_face.spec import ModelSpec
from salt_lightning.models import CausalLM, load_pretrained, read_checkpoint
from salt_lightning.schedule import KDSchedule, trained_schedule
from salt_lightning.teacher import probe

KD = {"kd.weight": 0.667, "kd.steps": 10, "trainer.val_check_interval": 2, "data.micro_batch_size": 4}


class Look(Callback):
    """Records both models and the held-out rows at the first validation, before anything is computed."""

    def on_validation_start(self, trainer, pl_module):
        if not hasattr(self, "student"):
            self.student = copy.deepcopy(pl_module.student).double()
            self.teacher = copy.deepcopy(pl_module.teacher).double()
            self.batches = list(trainer.datamodule.val_dataloader())
            self.accumulate = trainer.accumulate_grad_batches


def full_logits(model, batch):
    hidden_ND, head_VD, _ = model(batch["input_ids"], batch["positions"])
    return hidden_ND @ head_VD.T


def test_values_are_those_of_full_logits_in_float64(fit_with, teacher, tmp_path):
    look = Look()
    own = {**KD, "model.teacher.path": teacher, "kd.probe_gradients": True, "model.teacher_temperature": 2.0}
    assert fit_with(tmp_path / "run", look, **own) == 0
    with torch.inference_mode(False), torch.enable_grad():
        student = look.student.eval().requires_grad_(True)
        gap = better = tokens = 0
        ce = kd = torch.zeros((), dtype=torch.float64)
        for number, batch in enumerate(look.batches):
            labels_N = batch["labels"].flatten()
            valid_N = labels_N != -100
            log_p, teacher_logits = log_softmax(full_logits(student, batch)), full_logits(look.teacher, batch).detach()
            teacher_logits = torch.nn.functional.pad(teacher_logits, (0, 20), value=-torch.inf)  # 300 of 320 ids
            nll, teacher_nll = (
                -x[valid_N].gather(1, labels_N[valid_N, None]) for x in (log_p, log_softmax(teacher_logits))
            )
            gap += (nll - teacher_nll).sum().item()
            better += (nll < teacher_nll).sum().item()
            tokens += valid_N.sum().item()
            if number < look.accumulate:  # rows of one optimizer step
                ce = ce + nll.sum()
                kd = kd - (torch.softmax(teacher_logits / 2.0, 1) * log_p)[valid_N].sum()
        ce_grads, kd_grads = (
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, student.parameters(), retain_graph=True)])
            for loss in (ce, kd)
        )
    logged = scalars(tmp_path / "run", ("probe/", "val/"))
    assert look.accumulate == 2
    assert logged["probe/gap"][2] == pytest.approx(gap / tokens, abs=1e-6)
    assert logged["probe/student_better"][2] == pytest.approx(better / tokens, abs=1.5 / tokens)
    cosine = torch.nn.functional.cosine_similarity(ce_grads, kd_grads, dim=0).item()
    assert logged["probe/grad_cosine"][2] == pytest.approx(cosine, abs=1e-5)
    assert 0 < cosine < 0.9999
    for tag in ("probe/gap", "probe/student_better", "probe/grad_cosine"):
        assert sorted(logged[tag]) == [2, 4, 6, 8], tag  # as long as the teacher is there


def test_the_look_before_the_first_step_leaves_ignored_labels_out(settings, teacher):
    """Ignored like the prompts in fine-tuning."""
    data = SALTDataModule(**{k.removeprefix("data."): v for k, v in settings.items() if k.startswith("data.")})
    data.prepare_data()
    data.setup("fit")
    batch = next(data.samples(4))
    batch["labels"][:, :20] = -100
    batch["labels"][:, 20] = 0  # an id like others
    lm = CausalLM(load_pretrained(ModelSpec(path=teacher), "teacher", torch.float32), "teacher")
    found = probe.look(lm.eval(), [batch], data)
    labels_N = batch["labels"].flatten()
    valid_N = labels_N != -100
    nll = torch.nn.functional.cross_entropy(full_logits(lm.double(), batch)[valid_N], labels_N[valid_N])
    assert found.tokens == valid_N.sum() == 4 * 12
    assert found.teacher == pytest.approx(nll.item(), abs=1e-5)
    assert (found.uniform, found.counts) == (math.log(320), data.counts_nll(labels_N))


def test_the_look_is_at_as_many_tokens_as_take_seconds_but_goes_past_a_prompt():
    def sizes(parameters, rows, width, prompt=0):
        labels = torch.zeros(rows, width, dtype=torch.long)
        labels[:, :prompt] = -100
        batches = 3 * [{"labels": labels, "positions": labels, "cu_seqlens": torch.arange(rows + 1)}]
        found = list(probe.cut(batches, parameters))
        # without cu_seqlens, the borders of whole rows, which are wrong now
        assert all(batch.keys() == {"labels", "positions"} for batch in found)
        assert all(batch["labels"].shape == batch["positions"].shape for batch in found)
        return [tuple(batch["labels"].shape) for batch in found]

    assert sizes(10**7, 4, 100) == 3 * [(4, 100)]  # 7,500 tokens of 10M parameters
    assert sizes(10**9, 4, 100) == [(2, 100), (1, 64)]  # 256 at least: 200, and 56 of a row or 64
    assert sizes(75 * 10**6, 4, 250) == [(4, 250)]  # 1,000: just these
    assert sizes(10**9, 4, 400, prompt=300) == [(1, 364)]
    assert sizes(10**9, 4, 320, prompt=300) == [(1, 320)]
    assert sizes(10**6, 1, 100_000) == 3 * [(1, 4096)]  # not 75,000: their attention would take tens of GB


class NoGradients(Callback):
    """Checks that Lightning removes the gradients before a validation, and that the validation leaves none."""

    looks = 0

    def on_validation_start(self, trainer, pl_module):
        assert all(p.grad is None for p in pl_module.parameters())

    def on_validation_end(self, trainer, pl_module):
        self.on_validation_start(trainer, pl_module)
        self.looks += 1


def test_probes_change_nothing(fit_with, teacher, tmp_path):
    """Neither gradients, random numbers nor weights, with accumulation and dropout, also after a resume."""
    own = {**KD, "model.teacher.path": teacher, "model.student.family": "gpt2",
           "model.student.config": {"n_embd": 32, "n_layer": 2, "n_head": 4}}  # fmt: skip
    assert fit_with(tmp_path / "without", **own) == 0
    own["kd.probe_gradients"] = True
    look = NoGradients()
    assert fit_with(tmp_path / "with", look, **own) == 0
    assert look.looks == 6
    assert fit_with(tmp_path / "broken", StopAt(5), **own) == 128 + signal.SIGTERM
    assert fit_with(tmp_path / "broken", **own, ckpt_path="last") == 0
    last = "checkpoints/step-00000012.ckpt"
    for name, tensor in weights(tmp_path / "with" / last).items():
        assert torch.equal(tensor, weights(tmp_path / "without" / last)[name]), name
        assert torch.equal(tensor, weights(tmp_path / "broken" / last)[name]), name
    probes = [scalars(tmp_path / run, ("probe/",)) for run in ("with", "broken")]
    assert probes[0] == probes[1]


class Taught(Callback):
    """Records the steps, counted from 0, that begin with a teacher."""

    def __init__(self):
        self.steps = set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.teacher is not None:
            self.steps.add(trainer.global_step)


@pytest.mark.parametrize("anneal", [0, 3])
def test_the_boundary_is_found_and_every_resume_agrees(fit_with, teacher, tmp_path, anneal):
    """The second validation (step 4) meets the margin; from then on the schedule is that of a run given this step."""
    ramp = {"kd.anneal_steps": anneal, "kd.shape": "linear"} if anneal else {}
    own = {**KD, "model.teacher.path": teacher, **ramp}
    assert fit_with(tmp_path / "plain", **own) == 0
    gaps = scalars(tmp_path / "plain", ("probe/",))["probe/gap"]
    assert gaps[2] > gaps[4]  # the premise
    found = {**own, "kd.stop_margin": (gaps[2] + gaps[4]) / 2}
    taught = Taught()
    assert fit_with(tmp_path / "found", taught, **found) == 0
    stop = 4 + anneal
    assert taught.steps == set(range(stop))
    assert scalars(tmp_path / "found", ("probe/",))["probe/stop_step"] == {4: stop}
    assert fit_with(tmp_path / "told", **{**own, "kd.steps": stop}) == 0
    for number, step in enumerate([2, 4, 5, 9]):  # before, at, right after and long after it
        resumed = {"ckpt_path": "last"} if number else {}
        assert fit_with(tmp_path / "broken", StopAt(step), **found, **resumed) == 128 + signal.SIGTERM
    assert fit_with(tmp_path / "broken", **found, ckpt_path="last") == 0
    last = "checkpoints/step-00000012.ckpt"
    expected = weights(tmp_path / "told" / last)
    for run in ("found", "broken"):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / run / last).items()), run
        for tag in ("train/loss", "train/kd_weight", "train/kd", "train/flops_teacher_total", "val/ce"):
            assert scalars(tmp_path / run)[tag] == scalars(tmp_path / "told")[tag], (run, tag)
    assert (tmp_path / f"found/checkpoints/step-{stop:08d}.ckpt").exists()
    checkpoint = read_checkpoint(str(tmp_path / "found" / last), "x")
    assert (checkpoint["kd_stop_step"], checkpoint["kd_schedule"]["steps"]) == (stop, 10)
    shape = {"anneal_steps": anneal, "shape": "linear" if anneal else "step"}
    assert trained_schedule(checkpoint) == KDSchedule(0.667, stop, **shape)
    assert fit_with(tmp_path / "found", **{**found, "kd.stop_margin": 9.0}, ckpt_path="last") == 2  # another schedule
    assert cli.main(["export", str(tmp_path / "found" / last), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"in the first {stop} steps" in card
    assert "then 0, ended by a validation within a margin of " in card
    assert f"{stop} of them with the teacher" in card
    assert "- method: SALT " + ("linear" if anneal else "step") + ", margin " in card


def test_min_and_max_steps_bound_it(fit_with, teacher, tmp_path):
    at_once = {**KD, "model.teacher.path": teacher, "kd.stop_margin": 99.0}
    assert fit_with(tmp_path / "min", **at_once, **{"kd.min_steps": 6}) == 0
    assert scalars(tmp_path / "min", ("probe/",))["probe/stop_step"] == {6: 6}
    never = {**at_once, "kd.stop_margin": -99.0, "data.micro_batch_size": 4, "trainer.val_check_interval": 6}
    assert fit_with(tmp_path / "max", **never) == 0
    logged = scalars(tmp_path / "max", ("probe/", "train/kd_weight"))
    assert "probe/stop_step" not in logged
    assert [logged["train/kd_weight"][step] > 0 for step in (10, 11)] == [True, False]


def test_a_ramp_cut_short_by_the_maximum_is_the_ramp_of_the_maximum():
    planned = KDSchedule(0.5, 100, 20, "cosine")
    for step, other in itertools.product((80, 90, 100), range(0, 120)):
        assert planned.stop_at(step)(other) == planned(other)
    found = planned.stop_at(40)
    assert [found(step) for step in (39, 40, 60)] == [0.5, 0.5, 0.0]
    assert found(50) == planned(90) == pytest.approx(0.25)
    assert KDSchedule(0.5, None).stop_at(7) == KDSchedule(0.5, 7)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"kd.min_steps": 3}, "--kd.min_steps 3 needs --kd.stop_margin"),
        (
            {"kd.stop_margin": 0.1, "kd.min_steps": 10},
            "--kd.min_steps 10 must be 0 or more, and below --kd.steps 10",
        ),
        ({"kd.stop_margin": 0.1, "trainer.val_check_interval": 10}, "there is no validation before step 10"),
        (
            {"kd.stop_margin": 0.1, "trainer.limit_val_batches": 0},
            "--kd.stop_margin 0.1 acts at validations, but --trainer.limit_val_batches 0 turns them off",
        ),
        (
            {"kd.stop_margin": 0.1, "kd.min_steps": 6, "trainer.val_check_interval": 5},
            "there is no validation before step 10 from --kd.min_steps 6 on",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(fit_with, teacher, tmp_path, capsys, own, message):
    assert fit_with(tmp_path / "run", **{**KD, "model.teacher.path": teacher, **own}) == 2
    assert message in capsys.readouterr().err


def test_a_boundary_that_cannot_come_in_time_is_refused_before_text_is_read():
    kd = KDScheduleCallback(0.5, 10, stop_margin=0.1, min_steps=6)
    trainer = pl.Trainer(max_steps=20, val_check_interval=5, callbacks=[kd], accelerator="cpu", logger=False)
    with pytest.raises(ConfigError, match="there is no validation before step 10 from --kd.min_steps 6 on"):
        kd.check(trainer, True, SALTDataModule("x"))


def test_a_selection_needs_a_boundary_that_is_known(settings, teacher, tmp_path, capsys):
    run = tmp_path / "score"
    shared = {k: v for k, v in settings.items() if k.startswith("data.") and "global" not in k}
    score = {**shared, "trainer.accelerator": "cpu", "trainer.enable_progress_bar": False}
    assert cli.main(["predict", *arguments(score, {"run": str(run), "model.teacher.path": teacher})]) == 0
    own = {**KD, "model.teacher.path": teacher, "run": str(tmp_path / "run"), "data.selection": str(run)}
    assert cli.main(["fit", *arguments(settings, own, {"kd.stop_margin": 0.1})]) == 2
    assert "--kd.stop_margin 0.1 does not work with --data.selection" in capsys.readouterr().err
    for weight in (0.0, 0.5):
        assert cli.main(["fit", *arguments(settings, own, {"kd.steps": 0, "kd.weight": weight})]) == 2
        assert f"--kd.steps 0 leaves no phase 1, whose rows --data.selection {run} chooses" in capsys.readouterr().err
