"""KDSchedule: corner cases by literal values, and a property over all settings."""

import itertools
import math
from dataclasses import asdict

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from salt_lightning.errors import ConfigError
from salt_lightning.schedule import KDSchedule, interval_steps, trained_schedule, validation_steps

RAMP = {"weight": 0.8, "steps": 10, "anneal_steps": 4}  # constant up to step 6, ramp 6..10


@pytest.mark.parametrize(
    ("shape", "expected"),
    [  # w(6) = omega, then quarters of the ramp, w(10) = 0
        ("linear", [0.8, 0.6, 0.4, 0.2, 0.0]),
        # half a cosine: omega / 2 (1 + cos(pi x)) for x = 0, 1/4, 1/2, 3/4, 1
        ("cosine", [0.8, 0.4 * (1 + math.sqrt(0.5)), 0.4, 0.4 * (1 - math.sqrt(0.5)), 0.0]),
        # r = w / (1 - w): 4, 3, 2, 1, 0 -> w = r / (1 + r)
        ("linear_ratio", [4 / 5, 3 / 4, 2 / 3, 1 / 2, 0.0]),
    ],
)
def test_ramp_corners(shape, expected):
    w = KDSchedule(**RAMP, shape=shape)
    assert [w(step) for step in (0, 5)] == [0.8, 0.8]
    assert [w(step) for step in range(6, 11)] == pytest.approx(expected, abs=1e-15)
    assert w(6) == 0.8
    assert (w(10), w(11), w(10**9)) == (0.0, 0.0, 0.0)
    assert math.copysign(1, w(10)) == 1


def test_step_shape_falls_in_one_step():
    w = KDSchedule(0.667, 36_000)
    assert (w(0), w(35_999), w(36_000), w(208_000)) == (0.667, 0.667, 0.0, 0.0)


@pytest.mark.parametrize("weight", [1, np.float32(0.5), np.float64(0.5)])
@pytest.mark.parametrize("shape", ["step", "linear", "cosine"])
def test_the_weight_is_a_python_float(weight, shape):
    w = KDSchedule(weight, 10, 0 if shape == "step" else 4, shape)
    assert {type(w(step)) for step in range(12)} == {float}


def test_no_steps_is_the_whole_run():
    w = KDSchedule(0.5)
    assert (w(0), w(10**12)) == (0.5, 0.5)
    assert w.kd_steps(7) == 7


def test_zero_steps_and_zero_weight_have_no_phase_1():
    assert KDSchedule(0.667, 0)(0) == 0.0
    assert KDSchedule(0.0)(0) == 0.0
    assert KDSchedule(0.0).kd_steps(9) == 0
    assert KDSchedule(0.667, 4).kd_steps(9) == 4
    assert KDSchedule(0.667, 0).kd_steps(9) == 0
    assert KDSchedule(0.667, 4).kd_steps(3) == 3


def test_whole_phase_as_ramp():
    w = KDSchedule(0.6, 3, 3, "linear")
    assert [w(step) for step in range(4)] == pytest.approx([0.6, 0.4, 0.2, 0.0], abs=1e-15)
    assert w(0) == 0.6


@given(
    weight=st.floats(0, 1),
    steps=st.integers(1, 1000),
    share=st.floats(0.001, 1),
    shape=st.sampled_from(["linear", "linear_ratio", "cosine"]),
)
def test_never_rises_never_leaves_its_range(weight, steps, share, shape):
    if shape == "linear_ratio" and weight == 1:
        return
    w = KDSchedule(weight, steps, max(1, int(share * steps)), shape)
    values = [w(step) for step in range(steps + 2)]
    # omega itself is reproduced only to rounding by w = r / (1 + r) with 1 - w near 0
    assert all(0.0 <= value <= weight * (1 + 1e-12) for value in values)
    assert all(a >= b - 1e-15 for a, b in itertools.pairwise(values))
    assert values[steps:] == [0.0, 0.0]
    if weight > 1e-300:
        assert all(value > 0 for value in values[:steps])  # positive until the boundary: the teacher is in use


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 1.5}, r"--kd.weight 1.5 must be in 0..1"),
        ({"weight": -0.1}, r"--kd.weight -0.1"),
        ({"weight": float("nan")}, r"--kd.weight nan"),
        ({"steps": -1}, r"--kd.steps -1 must not be negative"),
        (
            {"steps": 5, "anneal_steps": 6, "shape": "linear"},
            r"--kd.anneal_steps 6 is longer than --kd.steps 5",
        ),
        ({"anneal_steps": 6, "shape": "linear"}, r"--kd.anneal_steps 6 needs --kd.steps"),
        ({"steps": 5, "anneal_steps": 2}, r"needs --kd.shape linear"),
        ({"steps": 5, "shape": "cosine"}, r"--kd.shape cosine needs --kd.anneal_steps"),
        (
            {"steps": 5, "anneal_steps": 2, "shape": "linear_ratio", "weight": 1.0},
            r"infinite: --kd.shape linear_ratio needs a smaller weight",
        ),
        ({"shape": "sqrt"}, r"--kd.shape 'sqrt' must be step or linear or linear_ratio or cosine"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        KDSchedule(**settings)


def test_all_problems_at_once():
    with pytest.raises(ConfigError, match=r"kd.weight 2.*kd.steps -3.*kd.anneal_steps -1"):
        KDSchedule(2, -3, -1)


@pytest.mark.parametrize("shape", ["linear", "Mine"])
def test_a_checkpoint_tells_where_its_schedule_ended(shape):
    """A subclass is known by its name alone; what it did with its ramp, nobody knows."""
    saved = {"kd_schedule": {**asdict(KDSchedule(0.5, 9, 4, "linear")), "shape": shape}}
    ramp = (4, "linear") if shape == "linear" else (0, "step")
    assert trained_schedule({}) is None
    assert trained_schedule(saved) == KDSchedule(0.5, 9, *ramp)
    assert trained_schedule({**saved, "kd_stop_step": 6}) == KDSchedule(0.5, 6, *ramp)


@pytest.mark.parametrize(
    ("share", "max_steps", "steps"),
    [(0.29, 100, 29), (0.57, 10_000, 5_700), (0.33, 5, 1), (0.999, 1_000, 999), (0.01, 10, 1), (1.0, 7, 7)],
)
def test_a_share_of_the_run_is_whole_steps(share, max_steps, steps):
    """0.29 * 100 is a little below 29 in floating point."""
    assert interval_steps(share, max_steps) == steps


@pytest.mark.filterwarnings("ignore")  # Lightning's advice about loaders
@pytest.mark.parametrize(
    ("batches", "accumulate", "interval", "epochs"),
    [
        (10, 1, 1.0, 1),
        (10, 4, 0.4, 1),
        (10, 4, 7, 1),
        (10, 3, 7, None),
        (10, 3, 14, None),
        (6, 4, 0.5, 2),
        (4, 1, 4, 3),
    ],
)
def test_the_steps_of_validations_are_those_of_lightning(batches, accumulate, interval, epochs, tmp_path):
    class Model(BoringModel):
        def train_dataloader(self):
            return DataLoader([torch.ones(32)] * batches)

        def on_train_start(self):
            self.planned, self.found = list(validation_steps(self.trainer)), []

        def on_validation_epoch_end(self):
            self.found.append(self.trainer.global_step)

    model, quiet = Model(), dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = pl.Trainer(
        max_steps=31,
        accumulate_grad_batches=accumulate,
        val_check_interval=interval,
        check_val_every_n_epoch=epochs,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_model_summary=False,
        **quiet,
    )
    trainer.fit(model)
    assert [step for step in model.found if step < 31] == [step for step in model.planned if step < 31]
