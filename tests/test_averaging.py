"""Averaged weights: a fit, its checkpoints and every later evaluation have the same ones."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from conftest import weights
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint

from salt_lightning import ModelSpec, OptimSpec, SALTDataModule, SALTModule
from salt_lightning.checkpoint import RunCheckpoint
from salt_lightning.export import export
from salt_lightning.fit.averaging import begin

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
pytestmark = [
    pytest.mark.filterwarnings("ignore:You.re using the WeightAveraging callback"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


@pytest.fixture
def data(settings):
    return SALTDataModule(**{key[5:]: value for key, value in settings.items() if key.startswith("data.")})


def trainer(folder: Path, *callbacks: Callback, **changes) -> pl.Trainer:
    given = {"max_steps": 8, "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "devices": 1,
             "enable_model_summary": False, "num_sanity_val_steps": 0, "val_check_interval": 4}  # fmt: skip
    saves = RunCheckpoint(at_steps=[4], keep=None)
    return pl.Trainer(**{**given, **changes}, default_root_dir=folder, callbacks=[*callbacks, saves])


def student() -> SALTModule:
    return SALTModule(ModelSpec(config=SIZES), optim=OptimSpec(lr=1e-2, warmup_steps=2), seed=0)


def loss(run: pl.Trainer, module: SALTModule, data: SALTDataModule, **how) -> float:
    return run.validate(module, data, verbose=False, **how)[0]["val/ce"]


def saved(folder: Path, step: int) -> str:
    return str(folder / f"checkpoints/step-{step:08d}.ckpt")


def test_a_trainer_that_has_fitted_evaluates_what_it_is_given(data, tmp_path):
    run, module = trainer(tmp_path, EMAWeightAveraging(decay=0.9)), student()
    run.fit(module, data)
    fitted = run.callback_metrics["val/ce"].item()
    early, last = saved(tmp_path, 4), saved(tmp_path, 8)
    assert loss(run, module, data) == fitted
    assert loss(run, module, data, ckpt_path=last) == fitted
    assert run.test(module, data, ckpt_path=last, verbose=False)[0]["test/ce"] == pytest.approx(fitted, rel=1e-6)
    assert loss(run, module, data) == fitted  # what the checkpoint's loading left
    other = loss(trainer(tmp_path), student(), data, ckpt_path=early)
    assert other != fitted
    assert loss(run, SALTModule.load_from_checkpoint(early), data) == other


def test_the_card_tells_what_averaged(data, tmp_path):
    trainer(tmp_path, EMAWeightAveraging(decay=0.9)).fit(student(), data)
    export(Path(saved(tmp_path, 8)), tmp_path / "hf")
    assert "- weights averaged by: EMAWeightAveraging" in (tmp_path / "hf" / "README.md").read_text()


def test_a_callback_that_has_averaged_one_run_averages_the_next(data, tmp_path):
    averages, fresh = EMAWeightAveraging(decay=0.9), EMAWeightAveraging()
    for run in ("first", "second"):
        trainer(tmp_path / run, averages).fit(student(), data)
    begin(trainer(tmp_path, averages), fits=False)  # with another epoch, a run of several would skip its first average
    assert (averages._latest_update_step, averages._latest_update_epoch) == (
        fresh._latest_update_step,
        fresh._latest_update_epoch,
    )
    first, second = (weights(Path(saved(tmp_path / run, 8))) for run in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_resume_that_has_nothing_to_do_leaves_the_average(data, tmp_path):
    used = student()
    trainer(tmp_path, EMAWeightAveraging(decay=0.9)).fit(used, data)
    last = saved(tmp_path, 8)
    average = weights(Path(last))
    for module in (student(), used):
        trainer(tmp_path, EMAWeightAveraging(decay=0.9)).fit(module, data, ckpt_path=last)
        assert all(torch.equal(held, average[name]) for name, held in module.state_dict().items())


def test_a_file_of_weights_alone_holds_the_average(data, tmp_path):
    best = ModelCheckpoint(tmp_path, "best", monitor="val/ce", save_weights_only=True)
    run = trainer(tmp_path, EMAWeightAveraging(decay=0.9), best)
    run.fit(student(), data)
    assert best.best_model_score == run.callback_metrics["val/ce"]
    average, alone = weights(Path(saved(tmp_path, 8))), weights(tmp_path / "best.ckpt")
    assert all(torch.equal(held, average[name]) for name, held in alone.items())


def test_what_a_callback_makes_of_the_saved_weights_stays(data, tmp_path):
    class Half(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            checkpoint["state_dict"] = {name: held.half() for name, held in checkpoint["state_dict"].items()}

    trainer(tmp_path, EMAWeightAveraging(decay=0.9), Half()).fit(student(), data)
    assert {held.dtype for held in weights(Path(saved(tmp_path, 8))).values()} == {torch.float16}


def test_before_the_first_average_the_weights_are_those_of_training(data, tmp_path):
    plain, late = student(), student()
    seen = trainer(tmp_path / "plain", max_steps=8)
    seen.fit(plain, data)
    trainer(tmp_path / "late", EMAWeightAveraging(decay=0.9, update_starting_at_step=6)).fit(late, data)
    early, same = (weights(Path(saved(tmp_path / run, 4))) for run in ("plain", "late"))
    assert all(torch.equal(held, same[name]) for name, held in early.items())
    assert loss(trainer(tmp_path), student(), data, ckpt_path=saved(tmp_path / "late", 8)) != loss(seen, plain, data)


def test_after_a_fit_the_weights_in_memory_are_the_users(data, tmp_path):
    class Zero(Callback):
        def on_fit_end(self, trainer, pl_module):
            for parameter in pl_module.parameters():
                torch.nn.init.zeros_(parameter)

    module, run = student(), trainer(tmp_path, EMAWeightAveraging(decay=0.9), Zero())
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "zero.ckpt", weights_only=True)
    for name, held in weights(tmp_path / "zero.ckpt").items():
        assert not held.any(), name
        assert not module.state_dict()[name].any()


def test_buffers_of_a_part_are_averaged_only_if_they_can_be(data, tmp_path):
    """Filled, registered or resized in training, as caches are; integers, whose averages would be cut off."""

    class Part(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.arange(8))
            self.register_buffer("filled", None, persistent=False)
            self.register_buffer("kind", torch.zeros(3, dtype=torch.long), persistent=False)
            self.shared = torch.nn.Module()
            self.shared.register_buffer("grown", torch.ones(2), persistent=False)
            self.register_buffer("grown", self.shared.grown, persistent=False)
            self.register_buffer("once", torch.ones(3), persistent=False)
            self.shared.register_buffer("once", self.once, persistent=False)
            self.shared.register_buffer("scale", torch.full((3,), 5.0))

        def forward(self, module, args):
            if self.filled is None:
                self.filled, self.kind = torch.ones(3), torch.full((3,), 0.5)
                self.shared.once = self.once.clone()
                self.register_buffer("late", torch.full((2,), 0.1), persistent=False)
            if self.training:
                self.grown = self.shared.grown = torch.ones(len(self.grown) + 1)

    class Mine(SALTModule):
        def extend_student(self, lm):
            lm.part = Part()
            lm.model.get_input_embeddings().register_forward_pre_hook(lm.part.forward)

    module = Mine(ModelSpec(config=SIZES), optim=OptimSpec(lr=1e-2))
    trainer(tmp_path, EMAWeightAveraging(decay=0.9)).fit(module, data)
    part, held = module.student.part, weights(Path(saved(tmp_path, 8)))
    assert held["student.part.table"].tolist() == part.table.tolist() == list(range(8))
    assert held.keys() == module.state_dict().keys()  # or no start could load it
    scale = part.shared.scale  # after those that two modules have or had in common
    assert held["student.part.shared.scale"].tolist() == scale.tolist() == pytest.approx([5, 5, 5])
    assert (part.filled.tolist(), part.kind.tolist()) == ([1, 1, 1], [0.5, 0.5, 0.5])
    assert torch.equal(part.late, torch.full((2,), 0.1))


@pytest.mark.parametrize("val_batches", [1.0, 0])
def test_constants_are_not_averaged(data, tmp_path, val_batches):
    """0.9 a + 0.1 a is not always a: averaged rotary frequencies would move, unlike those of a resume or an export."""

    class Frozen(SALTModule):
        def extend_student(self, lm):
            lm.model.get_input_embeddings().requires_grad_(False)

    class See(Callback):
        seen = 0

        def on_fit_start(self, trainer, pl_module):
            self.module, self.first = pl_module, {name: held.clone() for name, held in constants(pl_module).items()}

        def on_validation_batch_end(self, *args):
            self.seen += 1
            assert all(torch.equal(held, self.first[name]) for name, held in constants(self.module).items())

    def constants(module: SALTModule) -> dict[str, torch.Tensor]:
        there = module.state_dict()
        frozen = {name: held for name, held in module.named_parameters() if not held.requires_grad}
        return frozen | {name: held for name, held in module.named_buffers() if name not in there}

    see = See()
    run = trainer(tmp_path, EMAWeightAveraging(decay=0.9), see, limit_val_batches=val_batches)
    run.fit(Frozen(ModelSpec(config=SIZES | {"tie_word_embeddings": False}), optim=OptimSpec(lr=1e-2)), data)
    assert see.seen > val_batches or val_batches == 0
    see.on_validation_batch_end()
    average = weights(Path(saved(tmp_path, 8)))
    assert sorted(map(str, {held.dim() for held in see.first.values()})) == ["1", "2"]
    assert all(torch.equal(held, average[name]) for name, held in see.first.items() if name in average)
