"""A user's own code around SALTModule: the code in docs/extending.md works; silent errors are refused."""

import copy
import csv
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import socket
import statistics
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import forked
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from conftest import arguments, error_of
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    ModelPruning,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BatchEncoding, LlamaConfig, LlamaForCausalLM

import salt_lightning
from salt_lightning import (
    AnswerTest,
    Examples,
    KDSchedule,
    KDScheduleCallback,
    ModelSpec,
    OptimSpec,
    SALTDataModule,
    SALTModule,
    cli,
)
from salt_lightning.checkpoint import AtomicCheckpointIO, RunCheckpoint, newest
from salt_lightning.errors import ConfigError
from salt_lightning.export import export
from salt_lightning.fit.extension import Unchecked, doubts, seed_random
from salt_lightning.models import build_fresh, read_checkpoint
from salt_lightning.schedule import kd_callbacks
from salt_lightning.selection import KeepRule
from salt_lightning.teacher.scores import NO_LABEL, Scores
from salt_lightning.teacher.scoring import ScoreWriter

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"^## ([^\n]+)\n(?:(?!^##).)*?```python\n(.*?)```", PAGE, re.S | re.M)
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


def block(title: str, **names) -> dict:
    scope = dict(names)
    exec(dict(BLOCKS)[title], scope)
    return scope


@pytest.fixture
def data(settings, teacher):
    own = {key[5:]: value for key, value in settings.items() if key.startswith("data.")}
    return SALTDataModule(**{**own, "tokenizer": str(Path(teacher).parents[1] / "tokenizer"), "micro_batch_size": 4})


def trainer(folder: Path, *callbacks, **changes) -> pl.Trainer:
    given = {"max_steps": 6, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
             "enable_model_summary": False, "num_sanity_val_steps": 0, "val_check_interval": 6,
             "default_root_dir": folder, "enable_checkpointing": bool(callbacks and callbacks[-1] is SAVE)}  # fmt: skip
    own = [RunCheckpoint(every_n_steps=3, keep=None) if callback is SAVE else callback for callback in callbacks]
    return pl.Trainer(**{**given, **changes}, callbacks=own)


SAVE = object()
T = TypeVar("T")


def test_the_page_has_a_block_for_each_part():
    assert [title for title, _ in BLOCKS] == [
        "The loss alone", "Another course of the KD weight", "Another loss beside it", "Another loss in place of KD",
        "Balancing experts", "Another selection", "Another optimizer", "A model of your own", "A sweep in one process",
    ]  # fmt: skip


def test_a_sweep_in_one_process(settings, tmp_path):
    """And that the second overlay of callbacks appends to the first."""
    section = PAGE.partition("## A sweep in one process")[2].partition("\n## ")[0]
    prune, sweep = re.findall(r"```python\n(.*?)```", section, re.S)
    tree: dict = {}
    for key, value in (settings | {"kd.weight": 0.0}).items():
        group, *inner, leaf = key.split(".")
        node = tree.setdefault(group, {})
        for name in inner:
            node = node.setdefault(name, {})
        node[leaf] = value
    tree["trainer"]["callbacks"] = [{"class_path": "LearningRateMonitor"}]
    for name, text in (("prune.py", prune), ("sweep.py", sweep), ("base.yaml", yaml.safe_dump(tree))):
        (tmp_path / name).write_text(text)
    done = forked.run([sys.executable, "sweep.py"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "lr_1e-9 is at step 6 of 12" in done.stdout, done.stderr
    rows = {row["run"]: row for row in json.loads((tmp_path / "runs/compare.json").read_text())["rows"]}
    assert [rows[f"lr_{lr}"]["settings"]["model.optim.lr"] for lr in ("1e-9", "1e-2")] == [1e-9, 1e-2]
    assert [rows[f"lr_{lr}"]["steps"] for lr in ("1e-9", "1e-2")] == [6, 12]
    names = [str(rows["lr_1e-2"]["settings"][f"trainer.callbacks.{i}.class_path"]) for i in range(2)]
    assert [name.rpartition(".")[2] for name in names] == ["LearningRateMonitor", "Prune"]


def test_the_loss_alone():
    out = block("The loss alone")["out"]
    assert out.tokens == 128
    assert out.loss == out.ce_sum / 128  # the last step has no teacher


def test_in_python_too_paths_begin_at_home(data, settings, teacher, tmp_path, monkeypatch):
    """No shell expands them there: weights used to go into a folder named ~."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for name in ("checkpoints", "tokenizer"):
        (tmp_path / "home" / name).symlink_to(Path(teacher).parents[1] / name)
    of_teacher = f"~/checkpoints/{Path(teacher).name}"
    own = {key[5:]: value for key, value in settings.items() if key.startswith("data.")}
    there = SALTDataModule(**{**own, "tokenizer": "~/tokenizer"})
    saver = RunCheckpoint(folder="~/mine", export="~/exported")
    trainer(tmp_path, KDScheduleCallback(steps=2), saver, enable_checkpointing=True).fit(
        SALTModule(ModelSpec(config=SIZES), of_teacher), there
    )
    export(newest(tmp_path / "home/mine"), "~/again", tokenizer="~/tokenizer")
    assert (tmp_path / "home/exported/config.json").is_file()
    assert (tmp_path / "home/again/config.json").is_file()
    assert not (tmp_path / "~").exists()
    named = SALTDataModule(**own, selection="~/scores", difficulty="~/teacher")
    assert (named.selection, named.difficulty) == (f"{tmp_path}/home/scores", f"{tmp_path}/home/teacher")
    assert SALTDataModule(**own, selection="~nobody-here/scores").selection == "~nobody-here/scores"


# --- schedules ---


class Halving(KDSchedule):
    def __call__(self, step):
        return self.weight * 0.5**step if step < self.steps else 0.0


def following(schedule: KDSchedule) -> KDScheduleCallback:
    callback = KDScheduleCallback(allow_untrained=True)
    callback.schedule = schedule
    return callback


class Weights(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[float, bool]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((round(pl_module.kd_weight.item(), 6), pl_module.teacher is not None))


def test_the_schedule_of_the_page():
    schedule = block("Another course of the KD weight")["callback"].schedule
    assert [schedule(step) for step in (0, 99, 100, 999, 1000)] == [0.8, 0.8, 0.4, 0.8 / 512, 0]


def test_a_schedule_of_ones_own_trains_and_is_known_to_checkpoint_and_card(data, teacher, tmp_path, capsys):
    weights = Weights()
    run = trainer(tmp_path, following(Halving(0.8, 3)), weights, SAVE)
    run.fit(SALTModule(ModelSpec(config=SIZES), teacher), data)
    assert weights.seen == [(w, step < 2 or (w == 0.2 and i == 0)) for step, w in enumerate((0.8, 0.4, 0.2, 0, 0, 0))
                            for i in range(2)]  # fmt: skip
    saved = read_checkpoint(str(newest(tmp_path / "checkpoints")), "test")
    assert (saved["kd_schedule"]["shape"], saved["totals"]["taught_steps"]) == ("Halving", 3)
    middle = str(tmp_path / "checkpoints/step-00000003.ckpt")

    def resume(callback):
        trainer(tmp_path, callback).fit(SALTModule(ModelSpec(config=SIZES), teacher), data, ckpt_path=middle)

    resume(following(Halving(0.8, 3)))
    with pytest.raises(ConfigError, match=r"--kd.shape step \(checkpoint: Halving\)"):
        resume(KDScheduleCallback(0.8, 3))
    data.tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert cli.main(["export", str(newest(tmp_path / "checkpoints")), str(tmp_path / "hf")]) == 0
    assert (
        "weight 0.8 in the first 3 steps, then 0, by a custom schedule (Halving)"
        in (tmp_path / "hf/README.md").read_text()
    )


def test_a_weight_of_0_on_the_way_keeps_the_teacher(data, teacher, tmp_path):
    """With a warm-up from 0, and a periodic weight: the teacher stays until `steps`, whatever its weight."""
    rhythm = type("Rhythm", (KDSchedule,), {"__call__": lambda self, step: (step % 2) * 0.5 if step < 4 else 0.0})
    weights = Weights()
    module = SALTModule(ModelSpec(config=SIZES), teacher)
    trainer(tmp_path, following(rhythm(0.5, 4)), weights).fit(module, data)
    assert [w for w, _ in weights.seen[::2]] == [0, 0.5, 0, 0.5, 0, 0]
    assert [there for _, there in weights.seen[::2]] == [True] * 4 + [False] * 2
    assert module.meter.totals(6).taught_steps == 4


@pytest.mark.parametrize("weight", [2.5, -0.5, float("nan")])
def test_a_weight_outside_0_to_1_is_refused(weight, data, teacher, tmp_path):
    loud = type("Loud", (KDSchedule,), {"__call__": lambda self, step: weight if step < 3 else 0.0})
    with pytest.raises(ConfigError, match=r"step 0: the schedule \(Loud\) gives weight (2.5|-0.5|nan), not 0..1"):
        trainer(tmp_path, following(loud(0.5, 3))).fit(SALTModule(ModelSpec(config=SIZES), teacher), data)


def test_a_weight_without_its_teacher_is_refused(data, teacher, tmp_path):
    late = type("Late", (KDSchedule,), {"__call__": lambda self, step: 0.5})
    with pytest.raises(
        ConfigError, match=r"step 3: the schedule \(Late\) gives weight 0.5 to a teacher that leaves at"
    ):
        trainer(tmp_path, following(late(0.5, 3))).fit(SALTModule(ModelSpec(config=SIZES), teacher), data)


class SetAt(pl.Callback):
    """Replaces the schedule at the validation of a step, as docs/extending.md says."""

    def __init__(self, step: int, schedule: KDSchedule) -> None:
        self.step, self.new = step, schedule

    def on_validation_end(self, trainer, pl_module):
        if trainer.global_step == self.step:
            kd_callbacks(trainer)[0].schedule = self.new


@pytest.mark.parametrize(
    ("new", "taught"),
    [(KDSchedule(0.0), 3), (KDSchedule(0.5, 2), 3), (KDSchedule(0.5, 3), 3), (KDSchedule(0.25, 5), 5)],
)
def test_a_schedule_that_is_set_in_training_leaves_the_past_as_it_was(new, taught, data, teacher, tmp_path):
    module, weights = SALTModule(ModelSpec(config=SIZES), teacher), Weights()
    callbacks = KDScheduleCallback(0.5, 4, allow_untrained=True), SetAt(3, new), weights, SAVE
    trainer(tmp_path, *callbacks, val_check_interval=3).fit(module, data)
    assert [w for w, _ in weights.seen[::2]] == [0.5] * 3 + [new(step) for step in range(3, 6)]
    assert [there for _, there in weights.seen[1::2]] == [step < taught or step == 3 for step in range(1, 7)]
    for step in (3, 6):
        totals = read_checkpoint(str(tmp_path / f"checkpoints/step-{step:08d}.ckpt"), "test")["totals"]
        steps = min(step, taught)
        assert (totals["taught_steps"], totals["step"]) == (steps, step)
        assert totals["teacher_flops"] == steps * module.meter.forward_flops["teacher"] * module.meter.step_tokens > 0


@pytest.mark.parametrize("before", [KDSchedule(0.5, 3), KDSchedule(0.0)])
def test_a_schedule_that_goes_on_after_the_teacher_is_refused(before, data, teacher, tmp_path):
    """It would train plain CE, and log the weight, a KD of 0 and the teacher's FLOPs."""
    module = SALTModule(ModelSpec(config=SIZES), teacher)
    run = trainer(tmp_path, following(before), SetAt(3, KDSchedule(0.5, 5)), val_check_interval=3)
    with pytest.raises(
        ConfigError, match=r"^step 3: the schedule \(KDSchedule\) gives weight 0.5 after the teacher was"
    ):
        run.fit(module, data)


# --- subclasses ---

HOOKS = ["on_before_optimizer_step", "on_train_batch_start", "configure_gradient_clipping", "on_train_start", "setup",
         "training_step", "on_save_checkpoint", "on_load_checkpoint", "optimizer_step", "on_fit_start",
         "on_validation_epoch_end", "on_train_epoch_end", "on_fit_end"]  # fmt: skip


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_does_not_call_super_is_refused(hook):
    with pytest.raises(ConfigError, match=rf"^Mine.{hook} must call super\(\).{hook}\(...\)"):
        type("Mine", (SALTModule,), {hook: lambda self, *args, **kwargs: None})
    mixin = type("Mixin", (), {hook: lambda self, *args, **kwargs: None})
    with pytest.raises(ConfigError, match=rf"^Mine.{hook} must"):
        type("Mine", (mixin, SALTModule), {})


def test_hooks_that_call_super_and_those_that_are_free_are_taken():
    class Mine(SALTModule):
        def setup(self, stage):
            super().setup(stage)

        @torch.no_grad()
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)

        def training_step(self, batch, batch_idx):
            return SALTModule.training_step(self, batch, batch_idx)

        def on_train_start(self):
            def inside():
                super(Mine, self).on_train_start()

            inside()

        on_test_epoch_end = SALTModule.on_validation_epoch_end

        def configure_model(self):
            pass

        def on_train_epoch_start(self):
            pass


def test_the_loss_of_the_page_trains_a_projection_that_decays_and_resumes(data, teacher, tmp_path, capsys):
    own = block("Another loss beside it", sizes=SIZES)["HiddenStates"]

    def fit(folder, *callbacks, **more):
        module = own(ModelSpec(config=SIZES), teacher, optim=OptimSpec(lr=1e-2))
        run = trainer(tmp_path / folder, KDScheduleCallback(0.5, 4, allow_untrained=True), *callbacks, SAVE)
        run.fit(module, data, **more)
        return module, run

    module, run = fit("whole")
    groups = run.optimizers[0].param_groups
    assert "student.projection.weight" in groups[0]["param_names"]
    assert groups[0]["weight_decay"] == 0.1
    plain = SALTModule(ModelSpec(config=SIZES), teacher, optim=OptimSpec(lr=1e-2))
    trainer(tmp_path, KDScheduleCallback(0.5, 4, allow_untrained=True)).fit(plain, data)
    theirs = plain.student.state_dict()
    assert any(
        not torch.equal(value, theirs[key]) for key, value in module.student.state_dict().items() if key in theirs
    )
    data.tokenizer.save_pretrained(tmp_path / "whole/tokenizer")
    last = str(tmp_path / "whole/checkpoints/step-00000006.ckpt")
    assert cli.main(["export", last, str(tmp_path / "hf")]) == 0
    assert "left out, not part of the model: student.projection.weight" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"parts that a subclass .* added \(student.projection.weight\); resume"):
        trainer(tmp_path).validate(SALTModule(ModelSpec(config=SIZES)), data, ckpt_path=last)
    resumed, _ = fit("resumed", ckpt_path=str(tmp_path / "whole/checkpoints/step-00000003.ckpt"))
    for key, value in module.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[key]), key


def logged(run: pl.Trainer, name: str) -> dict[int, float]:
    with open(next(Path(run.logger.root_dir).rglob("metrics.csv"))) as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


# Python 3.12 warns of forks beside threads
FORKED = "ignore:.*multi-threaded, use of fork.*:DeprecationWarning"


def in_ranks(count, work) -> None:
    """Calls `work` in `count` processes, as if a launcher had started them."""
    fork = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def begin(rank: int) -> None:
        os.environ.update(place, LOCAL_RANK=str(rank))
        work()

    ranks = [fork.Process(target=begin, args=(rank,)) for rank in range(count)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0] * count


@pytest.mark.filterwarnings(FORKED)
def test_a_term_is_logged_whole_however_its_step_is_cut(data, teacher, tmp_path):
    """By accumulation or, in a mean, by processes."""
    own, found = block("Another loss beside it", sizes=SIZES)["HiddenStates"], []
    for rows, more in ((8, {}), (2, {}), (2, {"strategy": "ddp_find_unused_parameters_true", "devices": 2})):
        data.micro_batch_size = rows
        module = own(ModelSpec(config=SIZES), teacher, optim=OptimSpec(lr=1e-2), seed=0)
        folder, kd = tmp_path / f"{rows}{len(more)}", KDScheduleCallback(0.5, 4, allow_untrained=True)
        made = partial(trainer, folder, kd, logger=CSVLogger(folder), log_every_n_steps=1, **more)
        fit = partial(lambda made, module: made().fit(module, data), made, module)
        in_ranks(2, fit) if more else fit()
        found.append((logged(made(), "train/hidden"), logged(made(), "train/loss")))
    (whole, loss), *cut = found
    assert list(whole) == [1, 2, 3, 4]  # only while there is a teacher
    for hidden, other_loss in cut:
        # sums of fp32 in another order, carried on by up to 4 steps; a part of a term would be off by half
        assert hidden == pytest.approx(whole, rel=1e-4)
        assert other_loss == pytest.approx(loss, rel=1e-4)


class Seen(pl.Callback):
    def __init__(self) -> None:
        self.batches = []

    def on_train_batch_start(self, run, module, batch, batch_idx):
        self.batches.append(batch)


class Uneven(SALTModule):
    """Rank 1 logs a term more, and in another order."""

    def step_loss(self, *args):
        out = super().step_loss(*args)
        terms = {"one": torch.ones(1), "hundred": 100.0} | ({"rare": 8.0} if self.global_rank else {})
        for name in terms if self.global_rank else reversed(terms):
            self.log_term(name, terms[name])
        return out


@pytest.mark.filterwarnings(FORKED)
def test_ranks_may_log_other_terms_in_another_order(data, tmp_path):
    log = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1}
    in_ranks(2, lambda: trainer(tmp_path, strategy="ddp", devices=2, **log).fit(Uneven(ModelSpec(config=SIZES)), data))
    run = trainer(tmp_path, **log)
    means = {"one": 1.0, "hundred": 100.0, "rare": 4.0}  # of the ranks
    for name, mean in means.items():
        assert logged(run, f"train/{name}") == dict.fromkeys(range(1, 7), mean)


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("loss", 1.0, "log_term: train/loss is already logged; choose another name"),
        ("mine", torch.ones(2), r"log_term\('mine', ...\) takes one number, not a tensor \[2\]; sum it"),
    ],
)
def test_a_term_that_cannot_be_logged_is_refused(data, tmp_path, name, part, message):
    class Mine(SALTModule):
        def step_loss(self, *args):
            self.log_term(name, part)
            return super().step_loss(*args)

    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path).fit(Mine(ModelSpec(config=SIZES)), data)


def test_the_loss_of_the_page_in_place_of_kd(data, teacher, tmp_path):
    own = block("Another loss in place of KD")["ReverseKL"]
    module = own(ModelSpec(config=SIZES), teacher, optim=OptimSpec(lr=1e-2), seed=0)
    fresh = own(ModelSpec(config=SIZES), teacher, seed=0)
    kd = KDScheduleCallback(0.5, 4, allow_untrained=True)
    first = Seen()
    run = trainer(tmp_path, kd, first, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    run.fit(module, data)
    kl, ce, loss = (logged(run, f"train/{name}") for name in ("kd", "ce", "loss"))
    assert list(kl) == [1, 2, 3, 4]
    assert kl[4] < kl[1]
    assert loss[1] == pytest.approx(0.5 * ce[1] + 0.5 * kl[1])
    fresh.trainer = run  # for the sizes that follow from the data
    fresh.configure_model()
    fresh.load_teacher()
    total, tokens = 0.0, 0
    for batch in first.batches[:2]:  # the micro-batches of a step
        with torch.no_grad():
            mine, theirs = (m(batch["input_ids"], batch["positions"]) for m in (fresh.student, fresh.teacher))
            p, q = ((h.double() @ head[:300].double().T).softmax(-1) for h, head, _ in (mine, theirs))
        known = batch["labels"].flatten() >= 0
        total += float((p * (p / q).log())[known].sum())
        tokens += int(known.sum())
    assert kl[1] == pytest.approx(total / tokens, rel=1e-4)


def test_the_balance_of_the_page_is_a_loss_that_a_plain_student_lacks(data, teacher, tmp_path, caplog):
    caplog.set_level("INFO")
    names = block("Balancing experts", sizes=SIZES, teacher=teacher)
    strong = replace(names["student"], config={**names["student"].config, "router_aux_loss_coef": 0.5})
    logits, said = {}, {}
    for cls in (SALTModule, names["Balanced"]):
        module = cls(strong, optim=OptimSpec(lr=1e-2))
        run = trainer(tmp_path / cls.__name__, logger=CSVLogger(tmp_path / cls.__name__), log_every_n_steps=1)
        run.fit(module, data)
        said[cls] = caplog.text
        caplog.clear()
        lm = module.student.eval()
        ids = next(iter(data.val_dataloader()))["input_ids"]
        with torch.no_grad():
            logits[cls] = lm.model.model(input_ids=ids, use_cache=False).router_logits
    share = {}  # of Switch's equations 4 to 6, by hand: experts x sum of (share of tokens x mean probability)
    for cls, routed in logits.items():
        probability = torch.cat(routed).softmax(-1)
        chosen = torch.zeros_like(probability).scatter(1, probability.topk(2).indices, 1.0)
        share[cls] = float(4 * (chosen.mean(0) * probability.mean(0)).sum())
    assert share[names["Balanced"]] < share[SALTModule]
    assert logged(run, "train/balance")[6] == pytest.approx(share[names["Balanced"]], rel=0.1)
    assert "note: balance: 1 layers of experts, but nothing balances the load" in said[SALTModule]
    assert "note: balance" not in said[names["Balanced"]]


def test_a_loss_of_ones_own_may_balance_experts_but_keeps_no_weights_in_fp32():
    experts = block("Balancing experts", sizes=SIZES, teacher=None)["student"]
    student = build_fresh(replace(experts, config={**experts.config, "vocab_size": 64}), None, 0)
    for may_balance, told in ((True, ["precision"]), (False, ["precision", "balance"])):
        assert [found.about for found in doubts(student, "bf16-true", may_balance)] == told
    frozen = student.to(torch.bfloat16).requires_grad_(False)  # which no update would change
    assert doubts(frozen, "bf16-mixed", may_balance=True) == []


def test_first_values_of_a_part_follow_from_the_seed_of_the_module_alone():
    own = block("Another loss beside it", sizes=SIZES)["HiddenStates"]
    made = [own(ModelSpec(config={**SIZES, "vocab_size": 64}), seed=seed) for seed in (0, 0, 1)]
    for module in made:
        torch.rand(1)
        module.configure_model()
    first, same, other = (module.student.projection.weight for module in made)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_matrix_that_was_added_after_all_decays_too(data, tmp_path):
    class Late(SALTModule):
        def configure_model(self):
            super().configure_model()
            self.student.late = torch.nn.Linear(4, 4)

    run = trainer(tmp_path)
    run.fit(Late(ModelSpec(config=SIZES)), data)
    decays, others = (group["param_names"] for group in run.optimizers[0].param_groups)
    assert "student.late.weight" in decays
    assert "student.late.bias" in others


def test_what_a_subclass_freezes_stays_frozen(data, tmp_path):
    class Adapter(SALTModule):
        def extend_student(self, lm):
            lm.requires_grad_(False)
            lm.model.model.norm.requires_grad_(True)

    module = Adapter(ModelSpec(config=SIZES))
    trainer(tmp_path).fit(module, data)
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["student.model.model.norm.weight"]


def test_the_selection_of_the_page(data, settings, teacher, tmp_path, caplog):
    caplog.set_level("INFO")
    own = {"run": str(tmp_path / "score"), "model.teacher.path": teacher, "data.tokenizer": data.tokenizer_name}
    assert cli.main(["predict", *arguments(settings, own)]) == 0
    keep = block("Another selection")["keep"]
    rule = replace(keep, target=3.5)
    usual = {key[5:]: value for key, value in settings.items() if key.startswith("data.")}
    given = {"selection": str(tmp_path / "score"), "tokenizer": data.tokenizer_name, "micro_batch_size": 4}
    chosen = SALTDataModule(**{**usual, **given}, keep=rule)
    seen = Seen()
    trainer(tmp_path / "run", KDScheduleCallback(0.0, 3), seen).fit(SALTModule(ModelSpec(config=SIZES)), chosen)
    assert f"{len(chosen._order.kept)} of {chosen.num_train_rows} rows (highest, S of ByLoss; S -" in caplog.text
    scores = Scores(tmp_path / "score", "--run")
    losses = {}  # by another way: one row at a time
    for shard in range(scores.scored.num_shards):
        for nll_T, rank_T in zip(*scores.read(shard), strict=True):
            losses[len(losses)] = statistics.fmean(nll_T[rank_T != NO_LABEL].tolist())
    nearest = sorted(losses, key=lambda row: abs(losses[row] - 3.5))[: round(0.3 * len(losses))]
    assert sorted(np.flatnonzero(chosen._order.kept.mask_R)) == sorted(nearest)
    assert {int(row) for batch in seen.batches[:6] for row in batch["rows"]} <= set(nearest)  # 3 steps of 2


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"score_all": lambda self, scores: np.arange(100.0)}, r"for each of 317 rows, but gives an array \[100\]$"),
        ({"score": lambda self, nll_RT, rank_RT: nll_RT}, r"for each of \d+ rows, but gives an array \[\d+, 32\]$"),
        ({"score": lambda self, nll_RT, rank_RT: nll_RT[:, 0] * np.nan}, "rows, but gives NaN among them$"),
        ({"score_all": lambda self, scores: [1.0] * 317}, None),
    ],
)
def test_scores_of_ones_own_are_one_for_each_row(data, settings, teacher, tmp_path, own, message):
    run = {"run": str(tmp_path / "score"), "model.teacher.path": teacher, "data.tokenizer": data.tokenizer_name}
    assert cli.main(["predict", *arguments(settings, run)]) == 0
    data.selection, data.keep = str(tmp_path / "score"), type("Mine", (KeepRule,), own)()
    fit = partial(trainer(tmp_path / "run", KDScheduleCallback(0.0, 3)).fit, SALTModule(ModelSpec(config=SIZES)), data)
    if message is None:
        return fit()
    with pytest.raises(ConfigError, match=f"^Mine must give one number, not NaN, {message}|^Mine must .*{message}"):
        fit()


def test_a_rule_of_ones_own_needs_scores(data, tmp_path):
    data.keep = block("Another selection")["ByLoss"]()
    with pytest.raises(ConfigError, match=r"^--data.keep.target 3.0 needs --data.selection, the folder of a run"):
        trainer(tmp_path).fit(SALTModule(ModelSpec(config=SIZES)), data)


def test_the_optimizer_of_the_page(data, tmp_path):
    optim = block("Another optimizer")["optim"]
    module = SALTModule(ModelSpec(config=SIZES), optim=optim)
    run = trainer(tmp_path, SAVE, max_steps=12)
    run.fit(module, data)
    assert type(run.optimizers[0]) is torch.optim.SGD
    assert [group["weight_decay"] for group in run.optimizers[0].param_groups] == [0.1, 0.0]
    assert run.optimizers[0].param_groups[0]["lr"] == optim.lr_at(11, 12)
    again = SALTModule(ModelSpec(config=SIZES), optim=optim)
    middle = str(tmp_path / "checkpoints/step-00000003.ckpt")
    trainer(tmp_path, max_steps=12).fit(again, data, ckpt_path=middle)
    for key, value in module.student.state_dict().items():
        assert torch.equal(value, again.student.state_dict()[key]), key
    slow = SALTModule(ModelSpec(config=SIZES), optim=replace(optim, momentum=0.1))
    run = trainer(tmp_path, max_steps=12)
    run.fit(slow, data, ckpt_path=middle)
    assert {group["momentum"] for group in run.optimizers[0].param_groups} == {0.1}  # not the checkpoint's
    with pytest.raises(ConfigError, match="another OptimSpec class, which differs in momentum; resume with that class"):
        trainer(tmp_path, max_steps=12).fit(SALTModule(ModelSpec(config=SIZES)), data, ckpt_path=middle)
    with pytest.raises(
        ConfigError, match=r"has momentum, which OptimSpec has not: .*load_from_checkpoint\(PATH, optim="
    ):
        SALTModule.load_from_checkpoint(middle)
    assert SALTModule.load_from_checkpoint(middle, optim=optim).optim_spec == optim


def test_another_class_of_rates_is_refused(data, tmp_path):
    @dataclass(frozen=True)
    class Constant(OptimSpec):
        def lr_at(self, step, max_steps):
            return self.lr

    trainer(tmp_path, SAVE).fit(SALTModule(ModelSpec(config=SIZES), optim=Constant()), data)
    middle = str(tmp_path / "checkpoints/step-00000003.ckpt")
    with pytest.raises(ConfigError, match="trained with the OptimSpec class Constant, not OptimSpec; resume with that"):
        trainer(tmp_path).fit(SALTModule(ModelSpec(config=SIZES)), data, ckpt_path=middle)


@dataclass(frozen=True)
class Factored(OptimSpec):
    def build(self, named, ndim=None):
        groups = super().build(named, ndim).param_groups
        kept = [
            {"params": list(zip(g["param_names"], g["params"], strict=True)), "decays": g["decays"]} for g in groups
        ]
        return torch.optim.Adafactor(kept, lr=self.lr)


def test_an_optimizer_without_betas_keeps_its_own_eps(data, tmp_path):
    run = trainer(tmp_path)
    run.fit(SALTModule(ModelSpec(config=SIZES), optim=Factored(lr=1e-2)), data)
    assert [group["eps"] for group in run.optimizers[0].param_groups] == [(None, 1e-3)] * 2  # a pair, of other meaning
    assert [group["weight_decay"] for group in run.optimizers[0].param_groups] == [0.1, 0.0]


def test_an_optimizer_that_forgets_parameters_is_refused(data, tmp_path):
    @dataclass(frozen=True)
    class Matrices(OptimSpec):
        def build(self, named, ndim=None):
            return super().build([(name, p) for name, p in named if p.ndim == 2], ndim)

    message = (
        r"^student.model.lm_head.weight.*|^student.model.model.layers.0.input_layernorm.weight, .* never be trained"
    )
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path).fit(SALTModule(ModelSpec(config=SIZES), optim=Matrices()), data)


class Sets(pl.Callback):
    def __init__(self, hook: str, name: str) -> None:
        setattr(self, hook, partial(self._set, name))

    def _set(self, name, run, *args, **kwargs):
        if run.global_step == 2:
            run.optimizers[0].param_groups[0][name] = 0.5


@pytest.mark.parametrize("hook", ["on_before_optimizer_step", "on_train_batch_start"])
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_rate_that_a_callback_sets_is_not_silently_overwritten(data, tmp_path, hook, name):
    with pytest.warns(UserWarning, match="lr or weight_decay in the optimizer were changed since the last step"):
        trainer(tmp_path, Sets(hook, name)).fit(SALTModule(ModelSpec(config=SIZES)), data)


class Exchange(pl.Callback):
    """Another optimizer in the run, or the state of an earlier step."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_batch_start(self, run, module, batch, batch_idx):
        if run.global_step == 2:
            self.kept = copy.deepcopy(run.optimizers[0].state_dict())
        elif run.global_step == 4 and self.what == "new":
            run.strategy.setup_optimizers(run)
        elif run.global_step == 4:
            run.optimizers[0].load_state_dict(self.kept)


@pytest.mark.parametrize("what", ["new", "earlier"])
@pytest.mark.filterwarnings("ignore:lr or weight_decay in the optimizer were changed")
def test_an_optimizer_may_be_exchanged_in_the_run(data, tmp_path, what):
    run = trainer(tmp_path, Exchange(what))
    run.fit(SALTModule(ModelSpec(config=SIZES)), data)
    assert run.global_step == 6
    assert run.optimizers[0].param_groups[0]["lr"] == OptimSpec().lr_at(5, 6)


class ReadsRates(pl.Callback):
    def __init__(self) -> None:
        self.read = {}

    def _read(self, run, *_):
        self.read.setdefault(run.global_step, set()).add(run.optimizers[0].param_groups[0]["lr"])

    on_train_batch_start = on_before_optimizer_step = _read  # LearningRateMonitor reads in the first


@pytest.mark.filterwarnings("error:lr or weight_decay in the optimizer were changed")
def test_before_each_step_the_optimizer_has_its_rate(data, tmp_path):
    reads = ReadsRates()
    run = trainer(tmp_path, reads)
    run.fit(SALTModule(ModelSpec(config=SIZES)), data)
    assert run.accumulate_grad_batches == 2
    assert reads.read == {step: {OptimSpec().lr_at(step, 6)} for step in range(6)}


class Stops(pl.Callback):
    """Ends a run early, as Timer does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, run, *_):
        run.should_stop = run.should_stop or run.global_step == self.step


@pytest.mark.parametrize(("step", "min_steps", "found"), [(3, None, None), (4, None, 4), (3, 5, 4)])
def test_a_validation_that_an_early_stop_adds_does_not_end_kd(data, teacher, tmp_path, step, min_steps, found):
    """At step 2 --kd.min_steps is not reached, so the planned validation at 4 is the first that may end KD."""
    kd = KDScheduleCallback(0.5, 6, stop_margin=100.0, min_steps=3)
    run = trainer(tmp_path, kd, Stops(step), max_steps=10, val_check_interval=2, min_steps=min_steps)
    run.fit(SALTModule(ModelSpec(config=SIZES), teacher=teacher), data)
    assert (run.global_step, kd.stop_step) == (min_steps or step, found)


class Wrapper:
    """What Lightning asks of an optimizer, and no more."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner, self.defaults = optimizer, optimizer.defaults
        self.step, self.zero_grad = optimizer.step, optimizer.zero_grad
        self.state_dict, self.load_state_dict = optimizer.state_dict, optimizer.load_state_dict

    param_groups = property(lambda self: self.inner.param_groups)
    state = property(lambda self: self.inner.state)


def test_an_optimizer_may_be_wrapped(data, tmp_path):
    @dataclass(frozen=True)
    class Wrapped(OptimSpec):
        def build(self, named, ndim=None):
            return Wrapper(super().build(named, ndim))

    run = trainer(tmp_path, SAVE)
    run.fit(SALTModule(ModelSpec(config=SIZES), optim=Wrapped()), data)
    assert type(run.optimizers[0]) is Wrapper
    assert run.optimizers[0].param_groups[0]["lr"] == OptimSpec().lr_at(5, 6)


def test_a_subclass_may_change_the_rate_last_and_the_log_shows_it(data, tmp_path):
    class Slower(SALTModule):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            for group in optimizer.param_groups:
                group["lr"] *= 0.25

    rates = {}
    for cls in (SALTModule, Slower):
        folder = tmp_path / cls.__name__
        run = trainer(folder, logger=CSVLogger(folder), log_every_n_steps=1)
        run.fit(cls(ModelSpec(config=SIZES)), data)
        rates[cls] = logged(run, "train/lr")
    assert rates[SALTModule] == {step: OptimSpec().lr_at(step - 1, 6) for step in range(1, 7)}
    assert rates[Slower] == {step: rate / 4 for step, rate in rates[SALTModule].items()}


def test_an_optimizer_spec_with_a_setting_of_its_own_resumes(data, tmp_path):
    @dataclass(frozen=True)
    class Heavy(OptimSpec):
        momentum: float = 0.5

    trainer(tmp_path, SAVE).fit(SALTModule(ModelSpec(config=SIZES), optim=Heavy(warmup_steps=2)), data)
    middle = str(tmp_path / "checkpoints/step-00000003.ckpt")
    trainer(tmp_path).fit(SALTModule(ModelSpec(config=SIZES), optim=Heavy(warmup_steps=2)), data, ckpt_path=middle)


IN_SHARDS = """
import faulthandler
import sys
faulthandler.dump_traceback_later(240)
from pathlib import Path
import torch
import yaml
sys.path[:0] = [{tests!r}, {root!r}]
import lightning.pytorch as pl
from test_extension import SAVE, SIZES, block, trainer
from salt_lightning import ModelSpec, OptimSpec, SALTDataModule, SALTModule
from salt_lightning.checkpoint import AtomicCheckpointIO
from salt_lightning.errors import ConfigError
from salt_lightning.models import read_checkpoint
from salt_lightning.parallel import FSDP2


class Unused(SALTModule):
    def extend_student(self, lm):
        lm.extra = torch.nn.Linear(32, 4, bias=False)


def fit(folder, module, as_folder, ckpt_path=None, **own):
    strategy = FSDP2(save_distributed_checkpoint=as_folder)
    fitting = trainer(folder, SAVE, strategy=strategy, devices=1, plugins=[AtomicCheckpointIO()], max_steps=12,
                      **own)
    fitting.fit(module, SALTDataModule(**{data!r}), ckpt_path=ckpt_path)
    return dict(read_checkpoint(str(folder / "checkpoints" / "step-00000012.ckpt"), "x")["state_dict"])


for as_folder in (True, False):
    for make in (
        lambda: SALTModule(ModelSpec(config=SIZES), optim=block("Another optimizer")["optim"], seed=1),
        lambda: Unused(ModelSpec(config=SIZES), optim=OptimSpec(lr=3e-3), seed=1),
    ):
        folder = Path({folder!r}) / make().__class__.__name__ / str(as_folder) / make().optim_spec.__class__.__name__
        whole = fit(folder, make(), as_folder)
        path = folder / "checkpoints" / "step-00000003.ckpt"
        again = fit(folder / "again", make(), as_folder, ckpt_path=str(path))
        assert whole.keys() == again.keys()
        assert all(torch.equal(whole[name], again[name]) for name in whole), folder
make = lambda: SALTModule(ModelSpec(config=SIZES), optim=OptimSpec(lr=3e-3), seed=1)
fit(folder / "p", make(), True)
fit(folder / "q", make(), True, str(folder / "p" / "checkpoints" / "step-00000003.ckpt"), precision="bf16-true")
made = SALTModule(ModelSpec(config={{**SIZES, "vocab_size": 300}}), seed=1)
made.configure_model()


class Late(SALTModule):
    def setup(self, stage):
        super().setup(stage)
        if hasattr(self, "student"):
            self.student.extra = torch.nn.Linear(32, 4, bias=False)

    def configure_optimizers(self):
        self.student.extra = torch.nn.Linear(32, 4, bias=False)
        return super().configure_optimizers()


late = Late(ModelSpec(config=SIZES), seed=1)
own = block("A model of your own", teacher=None)["Own"](ModelSpec())
for name, module in {{"made": made, "own": own, "late": late}}.items():
    try:
        fit(Path({folder!r}) / name, module, True)
    except ConfigError as error:
        print(error)
"""


def test_in_shards_any_optimizer_goes_on_and_a_student_that_is_none_is_refused(data, settings, tmp_path):
    """FSDP2 of one process. A weight that never had a gradient has no state to go on from."""
    own = {key[5:]: value for key, value in settings.items() if key.startswith("data.")}
    script = IN_SHARDS.format(
        tests=str(Path(__file__).parent), root=str(Path(__file__).parents[1]), folder=str(tmp_path),
        data={**own, "tokenizer": data.tokenizer_name, "micro_batch_size": 4},
    )  # fmt: skip
    places = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # that Lightning leaves behind
    env = {name: value for name, value in os.environ.items() if name not in places}
    done = forked.run([sys.executable, "-c", script], env=env)
    assert done.returncode == 0, done.stderr
    assert "the student was made before this fit" in done.stdout
    assert "a student made in configure_model is not sharded; train it on one device, or with ddp" in done.stdout
    assert "student.extra.weight: added after the student was sharded, so each rank would train" in done.stdout


def test_what_is_frozen_in_extend_student_stays_as_it_is(data, tmp_path):
    class Frozen(SALTModule):
        def extend_student(self, lm):
            lm.get_submodule("model.model.layers.0").requires_grad_(False)

    before, after = {}, {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            before.update({name: weight.detach().clone() for name, weight in pl_module.student.named_parameters()})

        def on_train_end(self, trainer, pl_module):
            after.update(pl_module.student.named_parameters())

    module = Frozen(ModelSpec(config={**SIZES, "num_hidden_layers": 2}), optim=OptimSpec(lr=1e-2), seed=1)
    trainer(tmp_path, Look()).fit(module, data)
    kept = {name for name, weight in after.items() if torch.equal(weight, before[name])}
    assert kept == {name for name in after if name.startswith("model.model.layers.0.")} != set()


def own_optimizer(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


def unnamed(module):
    return torch.optim.SGD([{"params": list(module.parameters()), "decays": True}], lr=0.1)


def own_scheduler(module):
    optimizer = SALTModule.configure_optimizers(module)
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer)}


def frozen(module):
    module.student.requires_grad_(False)
    return SALTModule.configure_optimizers(module)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"configure_optimizers": own_optimizer}, "an optimizer of your own .* does not work with SALTModule"),
        (
            {"configure_optimizers": unnamed},
            "from groups of named parameters, as OptimSpec.build",
        ),
        ({"configure_optimizers": own_scheduler}, "a learning-rate scheduler of your own would be overwritten"),
        ({"configure_optimizers": frozen}, "no parameter of the student is trained: all have requires_grad False"),
        ({"scale": torch.nn.Parameter(torch.ones(3))}, "^scale: parameters outside the student .* in extend_student$"),
        ({"automatic_optimization": False}, "automatic_optimization False: SALTModule needs Lightning to do"),
    ],
)
def test_parts_of_a_subclass_that_a_step_would_pass_over_are_refused(parts, message, data, tmp_path):
    own = {name: part for name, part in parts.items() if callable(part)}
    module = type("Own", (SALTModule,), own)(ModelSpec(config=SIZES))
    for name in parts.keys() - own.keys():
        setattr(module, name, parts[name])
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path).fit(module, data)


def test_a_call_of_the_name_on_something_else_is_not_enough():
    with pytest.raises(ConfigError, match=r"^Mine.setup must call super\(\).setup"):

        class Mine(SALTModule):
            def setup(self, stage):
                self.mine.setup(stage)


def test_a_subclass_may_be_generic_and_take_keywords_of_its_class():
    class Named:
        def __init_subclass__(cls, name=None, **kwargs):
            super().__init_subclass__(**kwargs)
            cls.given = name

    class Mine(SALTModule, Named, Generic[T], name="x"):
        pass

    assert (Mine.given, Mine[int].__origin__) == ("x", Mine)


# --- models ---


def test_the_model_of_the_page_learns_and_resumes(data, teacher, tmp_path, capsys):
    own = block("A model of your own", teacher=teacher)["Own"]

    def fit(**more):
        module = own(ModelSpec(), teacher, optim=OptimSpec(lr=1e-2))
        trainer(tmp_path, KDScheduleCallback(0.5, 4, allow_untrained=True), SAVE).fit(module, data, **more)
        return module.student.state_dict()

    whole = fit()
    middle = str(tmp_path / "checkpoints/step-00000003.ckpt")
    resumed = fit(ckpt_path=middle)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    assert newest(tmp_path / "checkpoints") == tmp_path / "checkpoints/step-00000006.ckpt"
    assert cli.main(["export", middle, str(tmp_path / "hf")]) == 2
    said = f"{middle} holds a student made in configure_model; only its own class can build it, in Python"
    assert said in error_of(capsys)
    with pytest.raises(ConfigError, match="teacher.path .* holds a student made in configure_model; only its own"):
        trainer(tmp_path / "b", KDScheduleCallback(0.5, 4)).fit(SALTModule(ModelSpec(config=SIZES), middle), data)
    with pytest.raises(ConfigError, match=r"by the class Own, not SALTModule, and its student has other weights \(stu"):
        trainer(tmp_path / "c").fit(SALTModule(ModelSpec(config=SIZES)), data, ckpt_path=middle)


class Counting(SALTModule):
    """Counts in a buffer how often its student runs in training, by a hook that needs what a step has set."""

    def configure_model(self):
        block("A model of your own", teacher=None)["Own"].configure_model(self)
        if not hasattr(self.student, "runs"):
            self.student.register_buffer("runs", torch.zeros(()))
            self.student.register_forward_hook(self._count)

    def _count(self, *_):
        self.student.runs += self.training * self.rows / 2

    def training_step(self, batch, batch_idx):
        self.rows = len(batch["input_ids"])
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings(FORKED)
def test_ddp_with_three_processes_goes_on_with_any_student_as_if_it_had_not_stopped(data, tmp_path):
    """Its buckets were settled by a forward of the student, for which one of another kind lacked what that needs."""
    data.global_batch_size, data.micro_batch_size = 6, 2

    def fit(folder, **more):
        made = partial(trainer, tmp_path / folder, SAVE, strategy="ddp", devices=3)
        in_ranks(3, lambda: made().fit(Counting(ModelSpec()), data, **more))
        return read_checkpoint(str(tmp_path / folder / "checkpoints/step-00000006.ckpt"), "")["state_dict"]

    whole = fit("whole")
    resumed = fit("resumed", ckpt_path=str(tmp_path / "whole/checkpoints/step-00000003.ckpt"))
    assert whole["student.runs"] == 6
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


class Rectified(SALTModule):
    """Computes something else with the same weights."""

    def __init__(self, *args, slope: float = 0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.save_hyperparameters({"slope": slope})

    def extend_student(self, lm):
        for layer in lm.model.model.layers:
            layer.mlp.act_fn = torch.nn.LeakyReLU(self.hparams["slope"])


def test_a_checkpoint_tells_which_class_trained_it(data, teacher, tmp_path, caplog, capsys):
    caplog.set_level("INFO")
    trainer(tmp_path, SAVE).fit(Rectified(ModelSpec(config=SIZES)), data)
    middle = str(tmp_path / "checkpoints/step-00000003.ckpt")
    told = (
        "the checkpoint was trained by the class Rectified, not SALTModule: the loss of its own, or what it changes in"
    )
    plain = SALTModule(ModelSpec(config=SIZES))
    for start in (
        lambda: trainer(tmp_path / "fit").fit(plain, data, ckpt_path=middle),
        lambda: trainer(tmp_path / "val").validate(SALTModule(ModelSpec(config=SIZES)), data, ckpt_path=middle),
        lambda: SALTModule.load_from_checkpoint(middle),
    ):
        caplog.clear()
        start()
        assert caplog.text.count(told) == 1
    caplog.clear()
    trainer(tmp_path / "own").fit(Rectified(ModelSpec(config=SIZES), slope=0.5), data, ckpt_path=middle)
    assert "trained by the class" not in caplog.text
    assert (
        "continuing with hyperparameter slope 0.5 (checkpoint: 0.0): the steps that follow are computed" in caplog.text
    )
    data.tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert cli.main(["export", middle, str(tmp_path / "hf")]) == 0
    assert "; what Rectified changes inside the model is not exported" in capsys.readouterr().out
    assert "\n- trained by: the class Rectified; what it does" in (tmp_path / "hf/README.md").read_text()


def test_a_registered_model_is_one_of_transformers(data, teacher, tmp_path, monkeypatch):
    class MineConfig(LlamaConfig):
        model_type = "mine_of_the_test"

    class MineForCausalLM(LlamaForCausalLM):
        config_class = MineConfig

    with pytest.raises(ConfigError, match="transformers has no such model type"):
        SALTModule(ModelSpec(family="mine_of_the_test", config=SIZES)).configure_model()
    AutoConfig.register("mine_of_the_test", MineConfig)
    AutoModelForCausalLM.register(MineConfig, MineForCausalLM)
    module = SALTModule(ModelSpec(family="mine_of_the_test", config=SIZES), teacher)
    trainer(tmp_path, KDScheduleCallback(0.5, 4, allow_untrained=True), SAVE).fit(module, data)
    data.tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert cli.main(["export", str(newest(tmp_path / "checkpoints")), str(tmp_path / "hf")]) == 0
    again = SALTModule(ModelSpec(path=str(tmp_path / "hf")))
    trainer(tmp_path / "again").fit(again, data)
    assert type(again.student.model) is MineForCausalLM


@pytest.mark.parametrize("given", [torch.nn.Linear(2, 2), 3])
def test_a_model_where_a_spec_is_wanted(given):
    for specs in ((given,), (ModelSpec(config=SIZES), given)):
        with pytest.raises(ConfigError, match=f"takes a ModelSpec, or a path, not a {type(given).__name__}; save"):
            SALTModule(*specs)
    assert not SALTModule(ModelSpec(config=SIZES), None).has_teacher


# --- batches ---

IDS = torch.arange(32).view(2, 16)
BATCH = {"input_ids": IDS, "labels": IDS + 1, "positions": torch.arange(16).repeat(2, 1),
         "step_tokens": torch.tensor(32)}  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([BATCH["input_ids"], BATCH["labels"]], "a batch must be a dict with input_ids, labels, .* not a list"),
        ({k: v for k, v in BATCH.items() if k not in ("positions", "step_tokens")}, "no tensor positions, step_tokens"),
        ({**BATCH, "step_tokens": 32}, "a batch has no tensor step_tokens"),
        ({**BATCH, "labels": BATCH["labels"][:, 1:]}, "must have one shape, rows x tokens, not {'input_ids': "),
        ({k: v.flatten() if v.ndim else v for k, v in BATCH.items()}, "must have one shape, rows x tokens"),
        ({**BATCH, "labels": IDS}, "labels equal its input_ids: each label must be the next token"),
        ({**BATCH, "labels": torch.where(IDS % 3 > 0, IDS, -100)}, "labels equal its input_ids"),
        ({**BATCH, "labels": torch.where(IDS == 9, 10, IDS)}, "labels equal its input_ids"),
        ({**BATCH, "labels": torch.where(IDS % 16 < 14, IDS + 2, -100)}, "the next of its input_ids in only 0% of the"),
        ({**BATCH, "input_ids": IDS + 32, "labels": IDS + 33}, "has the id 64, but the student has only 64 ids; docs"),
        ({**BATCH, "step_tokens": torch.tensor([32, 32])}, r"step_tokens must be one number, not \[2\]"),
        (
            {**BATCH, "step_tokens": torch.tensor(1)},
            "step_tokens of the batches is 1, but optimizer step 1 had 32 labels",
        ),
        ({**BATCH, "step_tokens": torch.tensor(64)}, "step_tokens of the batches is 64, but .* describes a batch$"),
        ({**BATCH, "positions": IDS % 16 + 1}, "a batch's positions must begin with 0 in each row, as a document does"),
    ],
)
def test_batches_that_would_train_something_else_are_refused(batch, message, tmp_path):
    loader = DataLoader([batch] * 4, batch_size=None)
    module = SALTModule(ModelSpec(config={**SIZES, "vocab_size": 64, "max_position_embeddings": 16}))
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, limit_val_batches=0).fit(module, loader, loader)


ONE_LABEL = torch.where(IDS == 5, IDS, -100)  # may well repeat its token
PLACE = torch.arange(16).repeat(16, 1)
ANSWERS = PLACE + torch.arange(16)[:, None]


@pytest.mark.parametrize(
    "batch",
    [
        BatchEncoding(BATCH),
        {**BATCH, "step_tokens": torch.tensor([32])},
        {**BATCH, "labels": ONE_LABEL, "step_tokens": torch.tensor(1)},
        {**BATCH, "labels": torch.full_like(IDS, 40), "positions": torch.zeros_like(IDS)},  # documents of one token
        # an answer of one token in each row, then padding
        {
            "input_ids": torch.where(PLACE < 8, ANSWERS, 0),
            "labels": torch.where(PLACE == 7, ANSWERS + 1, -100),
            "positions": PLACE,
            "step_tokens": torch.tensor(16),
        },
    ],
)
def test_other_kinds_of_batches_that_say_the_same_are_taken(batch, tmp_path):
    loader = DataLoader([batch] * 6, batch_size=None)
    module = SALTModule(ModelSpec(config={**SIZES, "vocab_size": 64, "max_position_embeddings": 16}))
    run = trainer(tmp_path)
    run.fit(module, loader, loader)
    assert run.global_step == 6


def test_sums_of_fp32_may_round():
    unchecked = partial(Unchecked, ours=False, whole=True)
    unchecked().look_at_step(1, 33_550_336.0, 33_548_324.0, False)  # 6e-5, as 4,096 micro-batches of 8,191 labels sum
    with pytest.raises(ConfigError, match="step_tokens of the batches is 64, but optimizer step 1 had 32"):
        unchecked().look_at_step(1, 64.0, 32.0, False)
    with pytest.raises(ConfigError, match="step_tokens of the batches is 33, but optimizer step 1 had 32"):
        unchecked().look_at_step(1, 33.0, 32.0, True)  # a run of one step
    unchecked().look_at_step(2, 64.0, 32.0, True)  # the loader has ended too early


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([IDS, IDS + 1], "a batch must be a dict with input_ids, labels, positions, not a list"),
        ({k: v for k, v in BATCH.items() if k != "positions"}, "a batch has no tensor positions"),
        ({**BATCH, "labels": IDS}, "labels equal its input_ids: each label must be the next token"),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_batches_that_would_measure_something_else_are_refused(verb, batch, message, tmp_path):
    good = {name: BATCH[name] for name in ("input_ids", "labels", "positions")}  # step_tokens are of training only
    module = SALTModule(ModelSpec(config={**SIZES, "vocab_size": 64, "max_position_embeddings": 16}))
    loaders = [DataLoader([one] * 4, batch_size=None) for one in (good, batch)]
    trained = DataLoader([BATCH] * 6, batch_size=None)
    getattr(trainer(tmp_path), "validate" if verb == "fit" else verb)(module, loaders[0])
    run = trainer(tmp_path)
    call = partial(run.fit, module, trained) if verb == "fit" else partial(getattr(run, verb), module)
    with pytest.raises(ConfigError, match=message):
        call(loaders[1])


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("every", [1, 2, 50])
def test_step_tokens_are_looked_at_again_after_a_resume(every, tmp_path):
    """In a whole step: with another accumulation, the first one may begin in its middle."""

    def start(said=32, **own):
        module = SALTModule(ModelSpec(config={**SIZES, "vocab_size": 64, "max_position_embeddings": 16}))
        run = trainer(tmp_path, SAVE, limit_val_batches=0, max_steps=8 if own else 6, log_every_n_steps=every, **own)
        path = str(tmp_path / "first/step-00000003.ckpt") if own else None
        loader = DataLoader([{**BATCH, "step_tokens": torch.tensor(said)}] * 30, batch_size=None)
        run.fit(module, loader, loader, ckpt_path=path)

    start()
    (tmp_path / "checkpoints").rename(tmp_path / "first")
    with pytest.raises(ConfigError, match=r"step_tokens of the batches is 32, but optimizer step \d+ had 64 labels"):
        start(accumulate_grad_batches=2)
    start(64, accumulate_grad_batches=2)


SMALL = {**SIZES, "vocab_size": 64, "max_position_embeddings": 16}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a model for BATCH, to be a teacher."""
    folder = tmp_path_factory.mktemp("small")
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL)).save_pretrained(folder)
    return folder


class Loaders(pl.LightningDataModule):
    def __init__(self, loader):
        super().__init__()
        self.train_dataloader = self.val_dataloader = lambda: loader


def test_a_boundary_found_at_validations_needs_some(small, tmp_path):
    loader = DataLoader([BATCH] * 4, batch_size=None)
    kd = KDScheduleCallback(0.5, 10, stop_margin=100.0)
    run = pl.Trainer(max_steps=12, callbacks=[kd], logger=False, accelerator="cpu", enable_checkpointing=False)
    with (
        pytest.warns(UserWarning, match="no `val_dataloader`"),
        pytest.raises(ConfigError, match="--kd.stop_margin 100.0 acts at validations, but there is no loader for them"),
    ):
        run.fit(SALTModule(ModelSpec(config=SMALL), small), loader)
    # Lightning validates at the end of each epoch of a user's own loader, here after 4 steps
    for data in ((loader, loader), (Loaders(loader),)):
        run = pl.Trainer(max_steps=12, callbacks=[kd], logger=False, accelerator="cpu", enable_checkpointing=False)
        run.fit(SALTModule(ModelSpec(config=SMALL), small), *data)
        assert kd.stop_step == 4
    for last, least, said in ((4, 0, "4, where the"), (7, 5, "7 from --kd.min_steps 5 on, where the")):
        late = KDScheduleCallback(0.5, last, stop_margin=100.0, min_steps=least)
        run = pl.Trainer(max_steps=12, callbacks=[late], logger=False, accelerator="cpu", enable_checkpointing=False)
        with pytest.raises(ConfigError, match=f"--kd.stop_margin 100.0: there is no validation before step {said}"):
            run.fit(SALTModule(ModelSpec(config=SMALL), small), loader, loader)
    # an interval that does not divide an epoch of 4 steps: validations at steps 3, 7, 11
    between = KDScheduleCallback(0.5, 8, stop_margin=100.0, min_steps=7)
    trainer(tmp_path, between, max_steps=12, val_check_interval=3).fit(
        SALTModule(ModelSpec(config=SMALL), small), loader, loader
    )
    assert between.stop_step == 7


class Unknown(IterableDataset):
    """So many equal micro-batches, in a loader without a length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self):
        return itertools.repeat(BATCH, self.count)


@pytest.mark.parametrize("interval", [None, 7])
def test_kd_ends_at_a_validation_of_a_loader_without_a_length(small, tmp_path, interval):
    """Told to stop at step 1, but not before step 5. Lightning then adds a validation; one was due as the data ended at
    step 3, where the run could not end yet."""
    kd = KDScheduleCallback(0.5, 8, stop_margin=100.0, min_steps=2)
    run = trainer(tmp_path, kd, Stops(1), max_steps=10, min_steps=5, min_epochs=0, val_check_interval=interval or 1.0)
    loaders = DataLoader(Unknown(9 if interval else 3), batch_size=None), DataLoader([BATCH], batch_size=None)
    run.fit(SALTModule(ModelSpec(config=SMALL), small), *loaders)
    assert run.global_step == 5
    assert kd.stop_step == (None if interval else 3)


def test_with_loaders_of_several_epochs_callbacks_may_act_between_them(tmp_path):
    loader = DataLoader([BATCH] * 4, batch_size=None)
    stops = EarlyStopping("val/ce", mode="max", patience=1, check_on_train_epoch_end=True)
    run = trainer(tmp_path, stops, max_steps=20, max_epochs=5, val_check_interval=4)
    run.fit(SALTModule(ModelSpec(config=SMALL)), loader, loader)
    assert run.global_step == 8


@pytest.mark.parametrize("epochs", [1, None])
def test_a_run_that_ends_before_the_teacher_leaves_says_so(epochs, small, tmp_path):
    loader = DataLoader([BATCH] * 4, batch_size=None)
    module, kd = SALTModule(ModelSpec(config=SMALL), small), KDScheduleCallback(0.5, 6)
    run = trainer(tmp_path, kd, max_steps=8, max_epochs=epochs, val_check_interval=4)
    said = "the run ended after 4 of 8 steps, before --kd.steps 6: the teacher has never left"
    with pytest.warns(UserWarning, match=said) if epochs else nullcontext():
        run.fit(module, loader, loader)
    assert (module.teacher is not None) == bool(epochs)


def test_the_teacher_may_lack_a_label(small, tmp_path):
    """Its probability is 0; only inputs index the teacher."""
    batch = {**BATCH, "labels": torch.where(IDS == 31, 70, IDS + 1)}
    loader = DataLoader([batch] * 4, batch_size=None)
    module = SALTModule(ModelSpec(config={**SMALL, "vocab_size": 80}), small)
    run = trainer(tmp_path, KDScheduleCallback(0.5, 4), max_steps=6, val_check_interval=4)
    run.fit(module, loader, loader)
    assert run.global_step == 6


def test_a_schedule_must_be_one():
    with pytest.raises(ConfigError, match="KDScheduleCallback.schedule must be a KDSchedule, not a function"):
        KDScheduleCallback().schedule = lambda step: 0.5


def test_the_rate_is_right_before_the_first_step(tmp_path):
    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append([(group["lr"], group["weight_decay"]) for group in trainer.optimizers[0].param_groups])

    seen: list[list[tuple[float, float]]] = []
    module = SALTModule(
        ModelSpec(config={**SIZES, "vocab_size": 64, "max_position_embeddings": 16}),
        optim=OptimSpec(lr=1e-2, warmup_steps=4),
    )
    loader = DataLoader([BATCH] * 6, batch_size=None)
    trainer(tmp_path, Look(), limit_val_batches=0).fit(module, loader, loader)
    assert seen[0] == [(0.0025, 0.1), (0.0025, 0.0)]


def test_a_limit_of_gradients_below_0_is_refused(tmp_path):
    module = SALTModule(ModelSpec(config={**SIZES, "vocab_size": 64, "max_position_embeddings": 16}))
    loader = DataLoader([BATCH] * 6, batch_size=None)
    for limit in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match=rf"--trainer.gradient_clip_val {limit} must be 0 or more"):
            trainer(tmp_path, gradient_clip_val=limit).fit(module, loader, loader)


def test_a_spec_keeps_the_sizes_that_it_was_made_with():
    sizes = {**SIZES}
    spec = ModelSpec(config=sizes)
    sizes["hidden_size"] = 7
    assert spec.config == SIZES


def test_the_loader_of_a_data_module_without_it_has_another_accumulation(data, tmp_path):
    """It gives half of a step at a time, and the trainer does not know."""
    data.prepare_data()
    data.setup("fit")
    module = SALTModule(ModelSpec(config={**SIZES, "vocab_size": 320, "max_position_embeddings": 32}))
    with pytest.raises(ConfigError, match="step_tokens of the batches is "):
        trainer(tmp_path, limit_val_batches=0).fit(module, data.train_dataloader(), data.val_dataloader())


class Batches(torch.utils.data.Dataset):
    def __init__(self, count: int, accumulate: int = 1) -> None:
        self.count, self.accumulate = count, accumulate

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        ids = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(index))
        window = min(self.accumulate, self.count - index // self.accumulate * self.accumulate)
        return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "positions": torch.arange(16).expand(2, 16),
                "step_tokens": torch.tensor(32 * window)}  # fmt: skip


def fit_batches(run, count, accumulate=1):
    spec = ModelSpec(config={**SIZES, "vocab_size": 64, "max_position_embeddings": 16})
    loaders = [DataLoader(Batches(n, k), batch_size=None) for n, k in ((count, accumulate), (2, 1))]
    run.fit(SALTModule(spec, optim=OptimSpec(lr=1e-3)), *loaders)


@pytest.mark.parametrize(
    ("saver", "own", "accumulate", "steps"),
    [
        ({"at_steps": [1, 2, 3, 5, 6, 8], "every_n_steps": None},
         {"max_steps": 9, "val_check_interval": 1.0, "limit_val_batches": 0}, 2, [1, 2, 3, 5, 6, 8, 9]),
        ({"at_steps": list(range(1, 12)), "every_n_steps": None},
         {"max_steps": 12, "val_check_interval": 4, "check_val_every_n_epoch": None}, 1, list(range(1, 13))),
        ({"every_n_steps": 5, "keep": None},
         {"max_steps": 20, "val_check_interval": 1.0, "check_val_every_n_epoch": 2}, 1, [5, 10, 15, 20]),
        ({"every_n_steps": 5, "keep": None},
         {"max_steps": 18, "val_check_interval": 1.0, "check_val_every_n_epoch": 9}, 1, [5, 10, 15, 18]),
    ],
    ids=["an epoch ends within a step", "interval over epochs", "every other epoch", "no validation yet"],
)  # fmt: skip
def test_every_save_is_made_whatever_epochs_and_validations_a_loader_has(saver, own, accumulate, steps, tmp_path):
    """Epochs of 5 batches."""
    run = trainer(tmp_path, RunCheckpoint(**saver), enable_checkpointing=True, max_epochs=-1,
                  accumulate_grad_batches=accumulate, plugins=[AtomicCheckpointIO()], **own)  # fmt: skip
    fit_batches(run, 5, accumulate)
    assert [int(path.name[5:13]) for path in sorted((tmp_path / "checkpoints").glob("*.ckpt"))] == steps


def test_a_time_between_validations_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--trainer.val_check_interval: a time is not supported; give optimizer"):
        fit_batches(trainer(tmp_path / "a", SAVE, val_check_interval="00:00:00:01", max_epochs=-1), 5)


@pytest.mark.filterwarnings("ignore:Your .val_dataloader")
def test_a_loader_that_shuffles_is_compared_with_the_teacher_row_by_row(data, teacher, tmp_path):
    shares = []
    for shuffle in (False, True):
        spec = ModelSpec(config={**SIZES, "vocab_size": 300})
        kd = KDScheduleCallback(0.5, steps=None, allow_untrained=True)
        run = trainer(tmp_path, kd, max_epochs=-1, val_check_interval=3,
                      logger=CSVLogger(tmp_path / str(shuffle)), log_every_n_steps=1)  # fmt: skip
        torch.manual_seed(0)
        own = torch.Generator().manual_seed(0)  # torch's global generator is restored, and would shuffle the same way
        loaders = DataLoader(Batches(9), batch_size=None), DataLoader(Batches(6), None, shuffle, generator=own)
        run.fit(SALTModule(spec, teacher, optim=OptimSpec(lr=1e-2), seed=0), *loaders)
        with open(Path(run.logger.log_dir) / "metrics.csv") as file:
            shares.append([float(r["probe/student_better"]) for r in csv.DictReader(file) if r.get("probe/gap")])
    assert len(shares[0]) == 2
    assert shares[0] == shares[1]


def test_a_vocabulary_that_nobody_knows_is_asked_for(tmp_path):
    loader = DataLoader([BATCH], batch_size=None)
    with pytest.raises(
        ConfigError, match="vocab_size is not given: without a SALTDataModule .* would use 32000; set it"
    ):
        trainer(tmp_path).fit(SALTModule(ModelSpec(config=SIZES)), loader, loader)


# --- checkpoints ---


def test_a_start_in_the_folder_of_a_run_is_refused_in_python_too(data, tmp_path):
    trainer(tmp_path, SAVE).fit(SALTModule(ModelSpec(config=SIZES)), data)
    there = sorted((tmp_path / "checkpoints").iterdir())
    assert newest(str(tmp_path / "checkpoints")) == tmp_path / "checkpoints/step-00000006.ckpt"
    with pytest.raises(ConfigError, match=r"contains checkpoints of a run, the newest step-00000006.ckpt, but"):
        trainer(tmp_path, SAVE).fit(SALTModule(ModelSpec(config=SIZES)), data)
    assert sorted((tmp_path / "checkpoints").iterdir()) == there


def test_a_home_is_one_in_python(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "step-00000006.ckpt").touch()
    assert newest("~", look=lambda path: None) == tmp_path / "step-00000006.ckpt"


def test_a_checkpoint_for_predict_in_python_is_refused_as_by_the_command(data, teacher, tmp_path):
    with pytest.raises(ConfigError, match=r"^ckpt_path \S+: predict scores with the teacher; give it as SALTModule"):
        trainer(tmp_path, ScoreWriter()).predict(SALTModule(ModelSpec(config=SIZES), teacher), data, ckpt_path=teacher)


def test_predict_without_a_teacher_asks_for_what_scores(data, tmp_path):
    with pytest.raises(ConfigError, match=r"^predict needs a teacher; add the callback salt_lightning.teacher.scoring"):
        trainer(tmp_path).predict(SALTModule(ModelSpec(config=SIZES)), data)


def test_predict_of_ones_own_may_load_a_checkpoint(data, tmp_path):
    class Hidden(SALTModule):
        def predict_step(self, batch, batch_idx):
            return self.student.model(batch["input_ids"]).logits.shape

    run = trainer(tmp_path, SAVE)
    run.fit(module := Hidden(ModelSpec(config=SIZES)), data)
    data.setup("fit")
    found = run.predict(module, data.val_dataloader(), ckpt_path=str(newest(tmp_path / "checkpoints")))
    assert found[0][:2] == (4, 32)


class Words(pl.LightningDataModule):
    """Data of the user's own, with a tokenizer that was changed after it was read."""

    def __init__(self, data: SALTDataModule, words):
        super().__init__()
        self.data, self._words = data, words

    @property
    def tokenizer(self):
        if self._words is None:
            raise RuntimeError("not yet")
        return self._words

    def train_dataloader(self):
        return self.data.train_dataloader()


@pytest.mark.parametrize(
    ("kind", "vocab", "there"), [("more", 303, True), ("too many", 300, False), ("none", 300, False)]
)
def test_an_export_at_the_end_takes_what_tokenizer_it_can(data, kind, vocab, there, tmp_path, recwarn):
    """No run fails at its end for a tokenizer; and it is the one in use, not the one of its folder."""
    data.prepare_data()
    data.setup("fit")
    words = AutoTokenizer.from_pretrained(data.tokenizer_name)
    words.add_tokens(["<x1>", "<x2>", "<x3>"])
    save = RunCheckpoint(every_n_steps=None, export=str(tmp_path / "out"))
    own = Words(data, None if kind == "none" else words)
    spec = ModelSpec(config={**SIZES, "vocab_size": vocab})
    run = trainer(
        tmp_path,
        save,
        max_steps=2,
        accumulate_grad_batches=2,
        limit_val_batches=0,
        val_check_interval=None,
        enable_checkpointing=True,
    )
    run.fit(SALTModule(spec), own)
    assert (tmp_path / "out/config.json").exists()
    assert (tmp_path / "out/tokenizer.json").exists() == there
    if there:
        assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 303
    warned = [str(w.message) for w in recwarn if "exported without a tokenizer" in str(w.message)]
    assert len(warned) == (kind == "too many")


@pytest.mark.parametrize("trains", [True, False])
def test_an_export_at_the_end_has_the_tokenizer_in_python_too(data, settings, trains, tmp_path):
    """The command keeps it in the run's folder; here there is none."""
    own = {key[5:]: value for key, value in settings.items() if key.startswith("data.")}
    text = SALTDataModule(**own) if trains else data
    save = RunCheckpoint(every_n_steps=None, export=str(tmp_path / "out"))
    trainer(tmp_path, save, enable_checkpointing=True).fit(SALTModule(ModelSpec(config=SIZES)), text)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == text.tokenizer.get_vocab()


# ---- numbers and kinds of values that Python gives ----------------------------------------------


def test_numbers_of_numpy_leave_checkpoints_that_can_be_read(teacher, data, tmp_path):
    kd = KDScheduleCallback(weight=np.float32(0.5), steps=np.int64(3))
    module = SALTModule(
        ModelSpec(config=SIZES), teacher, np.float64(2), OptimSpec(lr=np.float64(1e-3)), seed=np.int64(3)
    )
    trainer(tmp_path, kd, SAVE, max_steps=np.int64(6)).fit(module, data)
    path = newest(tmp_path / "checkpoints")
    assert path.name == "step-00000006.ckpt"
    assert read_checkpoint(str(path), "")["hyper_parameters"]["optim"]["lr"] == 1e-3
    assert "parameters in float32" in export(str(path), str(tmp_path / "out"), tokenizer=data.tokenizer_name)


def test_numbers_of_numpy_are_those_of_python_in_the_data_too(settings, tmp_path):
    """With one of numpy, Lightning would take the interval of validations for a share, and never validate."""

    class Seen(pl.Callback):
        def __init__(self):
            self.ce = []

        def on_validation_end(self, trainer, *_):
            self.ce.append((trainer.global_step, float(trainer.callback_metrics["val/ce"])))

    def fit(kind, share, every=3):
        own = {key[5:]: kind(value) if type(value) is int else value for key, value in settings.items()
               if key.startswith("data.")}  # fmt: skip
        own |= {"val_fraction": share(0.25), "val_rows": kind(20), "seed": kind(5)}
        spec = ModelSpec(config={name: kind(size) for name, size in SIZES.items()})
        run = trainer(tmp_path, seen := Seen(), max_steps=kind(6), val_check_interval=kind(every))
        run.fit(SALTModule(spec, seed=kind(1)), SALTDataModule(**own))
        return seen.ce

    assert fit(np.int64, np.float32) == fit(int, float)
    assert [step for step, _ in fit(np.int32, np.float64)] == [3, 6]
    assert [step for step, _ in fit(np.int64, np.float64, every=9)] == [6]
    run = trainer(tmp_path, val_check_interval=np.float32(0.5))
    run.fit(
        SALTModule(ModelSpec(config=SIZES)),
        SALTDataModule(**{k[5:]: v for k, v in settings.items() if k[:5] == "data."}),
    )
    assert run.val_check_interval == 3


class Counts(pl.Callback):
    def __init__(self, first_step: int) -> None:
        self.first_step, self.mean = first_step, None

    def on_train_batch_end(self, trainer, *_):
        self.mean = np.ones(2) if trainer.global_step >= self.first_step else None

    def state_dict(self):
        return {"mean": self.mean}


def test_a_state_that_cannot_be_read_back_ends_a_run_at_its_first_checkpoint(data, tmp_path):
    with pytest.raises(ConfigError, match=r"step-00000003.ckpt could not be read back: it contained a numpy"):
        trainer(tmp_path, Counts(0), SAVE).fit(SALTModule(ModelSpec(config=SIZES)), data)
    assert not list((tmp_path / "checkpoints").glob("*"))
    with pytest.raises(ConfigError, match=r"step-00000006.ckpt could not be read back"):
        trainer(tmp_path, Counts(4), SAVE).fit(SALTModule(ModelSpec(config=SIZES)), data)
    assert newest(tmp_path / "checkpoints").name == "step-00000003.ckpt"


def test_a_checkpoint_that_is_written_later_is_no_error(data, tmp_path):
    later = AsyncCheckpointIO(AtomicCheckpointIO())
    trainer(tmp_path, SAVE, plugins=[later]).fit(SALTModule(ModelSpec(config=SIZES)), data)
    assert newest(tmp_path / "checkpoints").name == "step-00000006.ckpt"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KDScheduleCallback(steps=9, stop_margin=math.nan), "--kd.stop_margin nan must be a finite number, or"),
        (
            lambda: SALTModule({"configs": SIZES}),
            "a model has no settings configs, only path, revision, family, config, ",
        ),
        (lambda: ModelSpec(SIZES), r"ModelSpec.path {.*} must be a string or None"),
        (lambda: ModelSpec(dtype=torch.float16), "ModelSpec.dtype 'float16' must be float32 or bfloat16 or None"),
        (lambda: SALTDataModule("x", keep={}), "--data.keep {} must be of class KeepRule"),
        (lambda: SALTDataModule("x", block_size=32.0), "--data.block_size 32.0 must be a whole number"),
        (lambda: SALTDataModule("x", source_weights=3), r"source_weights 3 must be a list \(each entry a number\) or "),
        (lambda: KDScheduleCallback("0.5"), "--kd.weight '0.5' must be a number"),
        (lambda: KDScheduleCallback(steps=2.5), "--kd.steps 2.5 must be a whole number or None"),
        (lambda: KDScheduleCallback(True), "--kd.weight True must be a number"),
        (lambda: OptimSpec(lr="1e-3"), "--model.optim.lr '1e-3' must be a number"),
        (lambda: KeepRule(k=None), "--data.keep.k None must be a whole number"),
        (lambda: Examples(prompt=1), "--data.examples.prompt 1 must be a string"),
        (lambda: AnswerTest(max_new_tokens="5"), "--answers.max_new_tokens '5' must be a whole number"),
        (lambda: RunCheckpoint(at_steps=5), "--checkpoint.at_steps 5 must be a list"),
        (lambda: KDSchedule(shape=np.array(["step", "linear"])), "--kd.shape .* must be step or linear or"),
        (lambda: SALTModule(ModelSpec(), optim=torch.optim.AdamW), "--model.optim .* must be of class OptimSpec"),
        (lambda: SALTModule(ModelSpec(), compile=1), "--model.compile 1 must be True or False"),
        (lambda: OptimSpec().check(20.0), "--trainer.max_steps: 20.0 is not a valid run length"),
    ],
)
def test_values_of_another_kind_are_named_where_they_are_given(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_values_of_a_kind_that_does_are_taken():
    assert ModelSpec(Path("x"), dtype=torch.bfloat16) == ModelSpec("x", dtype="bfloat16")
    assert RunCheckpoint(at_steps=range(2, 8, 2)).at_steps == (2, 4, 6)
    assert SALTModule(ModelSpec(), compile=np.bool_(False)).hparams["compile"] == 0
    assert SALTDataModule(["a", "b"], source_weights=(1, 2), cache_dir=Path("c")).source == ["a", "b"]


def test_the_tokenizer_that_is_yet_to_be_trained(settings, tmp_path):
    with pytest.raises(ConfigError, match=r"trained by prepare_data\(\); call that first"):
        _ = SALTDataModule(settings["data.source"], cache_dir=tmp_path).tokenizer


# ---- one process, several fits ------------------------------------------------------------------


class Boom(pl.Callback):
    def __init__(self, during: str) -> None:
        setattr(self, during, self._end)

    def _end(self, trainer, *_):
        if trainer.global_step >= 3:
            raise RuntimeError("boom")


def test_a_teacher_that_a_broken_fit_left_is_not_met_by_the_next(data, teacher, tmp_path):
    module = SALTModule(ModelSpec(config=SIZES), teacher)
    with pytest.raises(RuntimeError, match="boom"):
        trainer(tmp_path, KDScheduleCallback(), Boom("on_train_batch_end")).fit(module, data)
    assert module.teacher is not None
    kd = KDScheduleCallback(steps=6, stop_margin=10.0)
    kd._probe._sums = torch.tensor(math.nan)  # of a validation that an error has ended
    pl.Trainer(accelerator="cpu", callbacks=[kd], logger=False, enable_progress_bar=False).validate(module, data)
    assert kd.stop_step is None
    met = []
    look = pl.callbacks.LambdaCallback(on_sanity_check_start=lambda _, module: met.append(module.teacher))
    trainer(tmp_path, kd, look, num_sanity_val_steps=1, val_check_interval=2).fit(module, data)
    assert met == [None]
    assert kd.stop_step == 2


def test_a_fit_that_ended_within_a_validation_goes_on_with_dropout(data, tmp_path):
    def module():
        dropping = {"n_embd": 32, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
        return SALTModule(ModelSpec(family="gpt2", config=dropping))

    broken, whole, often = module(), module(), {"val_check_interval": 3}
    with pytest.raises(RuntimeError, match="boom"):
        trainer(tmp_path / "broken", Boom("on_validation_batch_end"), **often).fit(broken, data)
    trainer(tmp_path / "whole", SAVE, **often).fit(whole, data)
    path = tmp_path / "whole" / "checkpoints" / "step-00000003.ckpt"
    trainer(tmp_path / "again", **often).fit(broken, data, ckpt_path=path)
    assert all(torch.equal(broken.state_dict()[name], weight) for name, weight in whole.state_dict().items())


class HalfFrozen(SALTModule):
    def extend_student(self, lm):
        lm.frozen = torch.nn.Dropout(0.5).eval()


class BrokenTest(pl.Callback):
    def on_test_start(self, trainer, pl_module):
        raise RuntimeError("boom")

    on_validation_start = on_test_start


@pytest.mark.parametrize("verb", ["test", "validate"])
def test_a_fit_after_a_broken_evaluation_trains(verb, data, tmp_path):
    module, seen = SALTModule(ModelSpec(config=SIZES)), []
    with pytest.raises(RuntimeError, match="boom"):
        getattr(trainer(tmp_path, BrokenTest()), verb)(module, data)
    look = pl.callbacks.LambdaCallback(on_train_batch_start=lambda *_: seen.append(module.student.training))
    trainer(tmp_path, look).fit(module, data)
    assert seen
    assert all(seen)


@pytest.mark.filterwarnings("ignore:Found 1 module", "ignore:this student was already trained")
def test_what_a_user_has_set_to_eval_stays_so(data, tmp_path):
    module, seen, often = HalfFrozen(ModelSpec(config=SIZES)), [], {"val_check_interval": 3}
    look = pl.callbacks.LambdaCallback(on_train_batch_start=lambda *_: seen.append(module.student.frozen.training))
    trainer(tmp_path, look, **often).fit(module, data)
    with pytest.raises(RuntimeError, match="boom"):
        trainer(tmp_path, look, Boom("on_validation_batch_end"), **often).fit(module, data)
    trainer(tmp_path, look).fit(module, data)
    assert seen
    assert not any(seen)


def test_a_fit_leaves_torchs_random_numbers_where_they_were(data, tmp_path):
    before = torch.get_rng_state()
    trainer(tmp_path).fit(SALTModule(ModelSpec(config=SIZES)), data)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_that_of_seed_everything_counts(data, tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert SALTModule(ModelSpec()).hparams["seed"] == SALTDataModule("x").seed == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")  # as seed_everything does
    assert SALTModule(ModelSpec()).hparams["seed"] == SALTDataModule("x").seed == 7
    assert SALTModule(ModelSpec(), seed=0).hparams["seed"] == SALTDataModule("x", seed=0).seed == 0
    module = SALTModule(ModelSpec(config=SIZES))
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")  # in processes that Lightning starts it is set from the beginning
    trainer(tmp_path).fit(module, data)
    assert (module.hparams["seed"], data.seed) == (8, 8)
    data.seed = 5  # by hand
    data.setup("fit")
    assert data.seed == 5


@pytest.mark.parametrize("fails", [True, False])
def test_workers_end_with_a_fit_however_it_ends(data, settings, tmp_path, fails):
    """As with Optuna's TrialPruned: they were left for ever, and a later trial waited for each."""
    loads = changed(settings, data, num_workers=2)
    before = set(multiprocessing.active_children())
    callbacks = [Boom("on_train_batch_end")] if fails else []
    with pytest.raises(RuntimeError, match="boom") if fails else nullcontext():
        trainer(tmp_path, *callbacks).fit(SALTModule(ModelSpec(config=SIZES)), loads)
    assert set(multiprocessing.active_children()) == before


@pytest.fixture
def trained(data, tmp_path):
    """Students of one run that a later start finds in memory, or builds from its checkpoint."""
    module = SALTModule(ModelSpec(config=SIZES))
    trainer(tmp_path, SAVE).fit(module, data)
    saved = str(newest(tmp_path / "checkpoints"))
    loaded, started = SALTModule.load_from_checkpoint(saved), SALTModule(ModelSpec(path=saved))
    return {"after its fit": module, "load_from_checkpoint": loaded, "path": started}


OF_RUN = ["after its fit", "load_from_checkpoint", "path"]


def changed(settings: dict, data: SALTDataModule, **other) -> SALTDataModule:
    own = {key[5:]: value for key, value in settings.items() if key.startswith("data.")}
    return SALTDataModule(**{**own, "tokenizer": data.tokenizer_name, **other})


@pytest.mark.parametrize("how", OF_RUN)
@pytest.mark.parametrize("verb", ["validate", "fit"])
def test_a_trained_student_reads_no_other_ids_and_no_longer_rows(trained, data, settings, tmp_path, how, verb):
    other = changed(settings, data, tokenizer="train", vocab_size=290)
    with pytest.raises(ConfigError, match="was trained with another tokenizer than --data.tokenizer"):
        getattr(trainer(tmp_path / "a"), verb)(trained[how], other)
    with pytest.raises(ConfigError, match="max_position_embeddings 32 is smaller than --data.block_size 64"):
        getattr(trainer(tmp_path / "b"), verb)(trained[how], changed(settings, data, block_size=64))


@pytest.mark.parametrize("how", OF_RUN)
def test_an_evaluation_of_text_that_the_run_has_trained_on_is_told(trained, data, settings, tmp_path, how, caplog):
    told = "this share of --data.source is not the one that the run held out, so the run has trained on it"
    trainer(tmp_path).validate(trained[how], changed(settings, data), verbose=False)
    assert told not in caplog.text
    for evaluate in (trainer(tmp_path).validate, trainer(tmp_path).test):
        evaluate(trained[how], changed(settings, data, val_fraction=0.4), verbose=False)
    assert caplog.text.count(told) == 2


def test_another_checkpoint_replaces_what_is_in_memory(trained, data, settings, tmp_path):
    other, fresh = changed(settings, data, tokenizer="train", vocab_size=290), SALTModule(ModelSpec(config=SIZES))
    trainer(tmp_path / "other", SAVE).fit(fresh, other)
    last = str(newest(tmp_path / "other/checkpoints"))
    trainer(tmp_path).validate(SALTModule(ModelSpec(config=SIZES)), other, ckpt_path=last, verbose=False)
    trainer(tmp_path).validate(fresh, data, ckpt_path=str(newest(tmp_path / "checkpoints")), verbose=False)


def test_a_second_fit_of_one_module_is_told(data, tmp_path):
    module = SALTModule(ModelSpec(config=SIZES))
    trainer(tmp_path).fit(module, data)
    with pytest.warns(UserWarning, match="this student was already trained for 6 steps: this fit starts from its weig"):
        trainer(tmp_path).fit(module, data)


def test_a_second_fit_of_one_trainer_is_told(data, tmp_path):
    module, run = SALTModule(ModelSpec(config=SIZES)), trainer(tmp_path, Stops(3))
    run.fit(module, data)
    run.should_stop = False
    with pytest.warns(UserWarning, match="trained for 3 steps: .* counts steps from 3, and has a new optimizer"):
        run.fit(module, data)


@pytest.mark.filterwarnings("ignore:this student was already trained")
def test_a_second_fit_of_one_trainer_goes_on_with_its_totals_and_boundary(data, teacher, tmp_path):
    """KD ends at the first validation here. The teacher, which then left, does not come back, and is charged once."""
    kd = KDScheduleCallback(0.5, None, stop_margin=50.0, allow_untrained=True)
    module, weights = SALTModule(ModelSpec(config=SIZES), teacher), Weights()
    run = trainer(tmp_path, kd, weights, val_check_interval=2)
    run.fit(module, data)
    first, taken_s = module.meter.totals(6), module.meter.time_s
    assert kd.stop_step == 2
    run.fit_loop.epoch_loop.max_steps = 9
    run.fit(module, data)
    assert weights.seen[2 * 2 :: 2] == [(0.0, False)] * 7
    last = module.meter.totals(9)
    assert last.taught_steps == first.taught_steps == 2
    assert last.teacher_flops == first.teacher_flops
    assert last.tokens == 1.5 * first.tokens
    assert module.meter.time_s > taken_s
    kd.setup(trainer(tmp_path, kd), module, "fit")  # of another trainer: the boundary is yet to be found
    assert kd.stop_step is None


def test_a_second_fit_counts_the_flops_and_time_of_its_own_rows(data, settings, tmp_path):
    longer = changed(settings, data, block_size=64)
    module, fresh = (SALTModule(ModelSpec(config={**SIZES, "max_position_embeddings": 64}), seed=1) for _ in range(2))
    trainer(tmp_path / "a").fit(module, data)
    short = module.meter.forward_flops["student"]
    module.meter.time_s = 1e6
    with pytest.warns(UserWarning, match="already trained for 6 steps"):
        trainer(tmp_path / "b").fit(module, longer)
    trainer(tmp_path / "c").fit(fresh, longer)
    assert short < module.meter.forward_flops["student"] == fresh.meter.forward_flops["student"]
    assert module.meter.time_s < 1e6


@pytest.mark.filterwarnings("ignore:You.re using the WeightAveraging callback")
def test_averaging_changes_no_seed(data, tmp_path, monkeypatch):
    firsts = []

    class First(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            firsts.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})

    for callbacks in ([], [EMAWeightAveraging(decay=0.9)]):
        monkeypatch.setenv("PL_GLOBAL_SEED", "1")
        module = SALTModule(ModelSpec(config=SIZES))
        monkeypatch.setenv("PL_GLOBAL_SEED", "7")
        trainer(tmp_path, First(), *callbacks, max_steps=1, val_check_interval=1).fit(module, data)
    assert all(torch.equal(firsts[0][name], firsts[1][name]) for name in firsts[0])


def test_the_weight_of_kd_is_not_rounded_where_bf16_is_the_default(monkeypatch):
    monkeypatch.setattr(torch, "get_default_dtype", torch.get_default_dtype)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert SALTModule(ModelSpec(config=SIZES)).kd_weight.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


class StopAfter(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *_):
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


def test_without_the_callback_of_the_checkpoint_no_teacher_is_dropped_or_taken_up(data, teacher, tmp_path):
    kd, spec = KDScheduleCallback(0.5, steps=4, allow_untrained=True), ModelSpec(config=SIZES)
    taught = {"teacher": ModelSpec(path=teacher), "seed": 1}
    trainer(tmp_path / "a", kd, StopAfter(2), SAVE).fit(SALTModule(spec, **taught), data)
    path = str(tmp_path / "a" / "checkpoints" / "step-00000002.ckpt")
    with pytest.raises(ConfigError, match=r"at step 2 of a phase with a teacher \(--kd.steps 4\), but the Trainer"):
        trainer(tmp_path / "b", SAVE).fit(SALTModule(spec, seed=1), data, ckpt_path=path)
    trainer(tmp_path / "c", SAVE).fit(SALTModule(spec, seed=1), data)
    path = str(tmp_path / "c" / "checkpoints" / "step-00000003.ckpt")
    again = KDScheduleCallback(0.5, steps=4, allow_untrained=True)
    with pytest.raises(ConfigError, match=r"differs from the checkpoint's: --kd.weight 0.5 \(checkpoint: 0.0\)"):
        trainer(tmp_path / "d", again, SAVE).fit(SALTModule(spec, **taught), data, ckpt_path=path)
    path = str(tmp_path / "c" / "checkpoints" / "step-00000006.ckpt")  # where none teaches, none is missing
    trainer(tmp_path / "e", SAVE, max_steps=7).fit(SALTModule(spec, seed=1), data, ckpt_path=path)


def test_ruined_weights_are_refused_before_the_first_step(data, tmp_path):
    module = SALTModule(ModelSpec(config=SIZES))
    trainer(tmp_path).fit(module, data)
    with torch.no_grad():
        module.student.head.weight[0, 0] = math.nan
    with pytest.raises(ConfigError, match="are not finite before the first step, or so large"):
        trainer(tmp_path).fit(module, data)


def pickles() -> bool:
    """Whether transformers' own models can be pickled: with kernels, which 5.25 requires, they may not (0.17 tried)."""
    try:
        pickle.dumps(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL)))
    except AttributeError:
        return False
    return True


PICKLES = pytest.mark.skipif(not pickles(), reason="transformers' own models cannot be pickled with this kernels")


@PICKLES
@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_data_that_was_used_can_be_pickled(settings, tmp_path, verb):
    """Loading workers that are spawned need that."""
    own = {key[5:]: value for key, value in settings.items() if key.startswith("data.")}
    module, used = SALTModule(ModelSpec(config=SIZES)), SALTDataModule(**own)
    getattr(trainer(tmp_path, SAVE), verb)(module, used)
    again = pickle.loads(pickle.dumps(used))
    assert len(again.val_dataloader()) == len(used.val_dataloader())
    assert verb == "validate" or len(again.train_dataloader()) == 6


@PICKLES
def test_a_module_that_was_trained_can_be_pickled(data, teacher, tmp_path):
    module = SALTModule(ModelSpec(config=SIZES), teacher)
    trainer(tmp_path, KDScheduleCallback(steps=3)).fit(module, data)
    module.trainer = None
    assert torch.equal(pickle.loads(pickle.dumps(module)).student.head.weight, module.student.head.weight)


def test_the_package_names_what_it_has():
    assert {"SALTModule", "salt_loss"} <= set(dir(salt_lightning))
    assert "import_module" not in dir(salt_lightning)


def test_a_micro_batch_is_seeded_as_by_torch_but_writes_down_no_stack(monkeypatch):
    torch.manual_seed(2**63 - 5)
    expected = torch.rand(3)
    monkeypatch.setattr("traceback.format_stack", lambda *args, **kwargs: pytest.fail("a stack was written down"))
    seed_random(2**63 - 5, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)


class Again(torch.optim.AdamW):
    """Computes its loss twice, as LBFGS and SAM do."""

    def step(self, closure=None):
        closure()
        return torch.optim.AdamW.step(self, closure)


def test_an_optimizer_that_computes_its_loss_twice_is_called_what_it_is(data, tmp_path):
    @dataclass(frozen=True)
    class Twice(OptimSpec):
        def build(self, named, ndim=None):
            made = super().build(named, ndim)
            made.__class__ = Again
            return made

    with pytest.raises(ConfigError, match="scaled wrongly; the optimizer computes the loss more than once per"):
        trainer(tmp_path).fit(SALTModule(ModelSpec(config=SIZES), optim=Twice()), data)


def test_a_validation_step_that_keeps_its_losses_for_itself(data, teacher, tmp_path):
    class Mine(SALTModule):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)

    message = "^Mine.validation_step must return what SALTModule's does while there is a teacher: a dict with nll and"
    run = trainer(tmp_path, KDScheduleCallback(0.5, 4, allow_untrained=True), val_check_interval=2)
    with pytest.raises(ConfigError, match=message):
        run.fit(Mine(ModelSpec(config=SIZES), teacher), data)
    trainer(tmp_path / "without").fit(Mine(ModelSpec(config=SIZES)), data)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: ModelPruning("l1_unstructured"), "ModelPruning is not supported: it collects what to prune before"),
        (BatchSizeFinder, "BatchSizeFinder is not supported: the verb check reports"),
        (BackboneFinetuning, "BackboneFinetuning is not supported: it thaws parts"),
    ],
)
def test_callbacks_that_look_at_the_module_first_are_refused_before_they_do(data, tmp_path, callback, message):
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, callback()).fit(SALTModule(ModelSpec(config=SIZES)), data)


def test_a_teacher_that_changes_is_read_anew_on_held_out_text(data, teacher, tmp_path):
    """A gap of the first teacher's losses could end KD by --kd.stop_margin."""

    class Spoil(pl.Callback):
        def on_train_batch_start(self, run, module, batch, batch_idx):
            if run.global_step == 2:
                module.release_teacher()
                module.load_teacher()
                module.teacher.head.weight.data.zero_()

    gaps = {}
    for callbacks in ((), (Spoil(),)):
        folder = tmp_path / str(len(callbacks))
        kd = KDScheduleCallback(0.5, 6, allow_untrained=True)
        run = trainer(folder, kd, *callbacks, logger=CSVLogger(folder), val_check_interval=2, log_every_n_steps=1)
        run.fit(SALTModule(ModelSpec(config=SIZES), teacher, seed=0), data)
        ce, gap = logged(run, "val/ce"), logged(run, "probe/gap")
        gaps[len(callbacks)] = {step: ce[step] - gap[step] for step in gap}  # the teacher's
    assert list(gaps[1]) == [2, 4]
    assert gaps[1][2] == gaps[0][2]
    assert gaps[1][4] == pytest.approx(math.log(data.vocab_size), rel=1e-6)  # all logits are 0
