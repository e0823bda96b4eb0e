"""The learning rate at corner cases, and which parameters decay."""

import pytest
import torch
from torch import nn

from salt_lightning.errors import ConfigError
from salt_lightning.fit.optim import OptimSpec, by_name


def test_cosine_corners():
    spec = OptimSpec(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    rate = [spec.lr_at(step, 14) for step in range(16)]
    assert rate[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rate[4] == 1.0  # the cosine starts at its top ...
    assert rate[9] == pytest.approx(0.1 + 0.9 * 0.5)  # ... is half way down in the middle of its 10 steps ...
    assert rate[14] == rate[15] == pytest.approx(0.1)  # ... and at the floor from the end on


def test_wsd_is_stable_then_linear():
    spec = OptimSpec(lr=2.0, schedule="wsd", warmup_steps=2, decay_steps=4, min_lr_ratio=0.0)
    assert [spec.lr_at(step, 10) for step in range(11)] == [1, 2, 2, 2, 2, 2, 2, 1.5, 1.0, 0.5, 0.0]


def test_a_jump_is_said_where_it_shows():
    spec = OptimSpec(lr=3e-3, warmup_steps=2)
    saved = {"global_step": 500, "hyper_parameters": {"optim": vars(spec)}, "max_steps": 300_000}
    assert spec.jump(saved, 300_000) is None
    assert spec.jump(saved, 100_000_000) is None  # both are 0.003
    assert "continues from step 500 at 0.0003 instead of 0.003" in spec.jump(saved, 500)
    assert spec.jump({**saved, "max_steps": 500}, 500) is None


def test_wsd_after_a_long_warm_up_decays_over_what_is_left():
    spec = OptimSpec(lr=1.0, schedule="wsd", warmup_steps=9, min_lr_ratio=0.0)  # a fifth would be 2 of 10
    assert [spec.lr_at(step, 10) for step in (7, 8, 9, 10)] == [8 / 9, 1.0, 1.0, 0.0]


def test_wsd_is_also_constant_or_linear():
    constant = OptimSpec(lr=2.0, schedule="wsd", warmup_steps=2, decay_steps=0)
    assert [constant.lr_at(step, 6) for step in range(6)] == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    linear = OptimSpec(lr=2.0, schedule="wsd", warmup_steps=2, decay_steps=4, min_lr_ratio=0.0)
    assert [linear.lr_at(step, 6) for step in range(6)] == [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]


def test_wsd_decays_over_a_fifth_by_default():
    spec = OptimSpec(lr=1.0, schedule="wsd", min_lr_ratio=0.0)
    assert [spec.lr_at(step, 10) for step in range(8, 11)] == [1.0, 0.5, 0.0]


def test_cosine_may_start_late():
    spec = OptimSpec(lr=1.0, decay_steps=2, min_lr_ratio=0.0)
    assert [spec.lr_at(step, 10) for step in (0, 8, 9, 10)] == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_only_matrices_decay_and_all_are_trained():
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    net[1].weight.requires_grad_(False)
    spec = OptimSpec(weight_decay=0.3, lr=0.5, beta1=0.8, beta2=0.9, eps=1e-6)
    optimizer = spec.build(net.named_parameters())
    for group in optimizer.param_groups:  # as if restored from a checkpoint
        group["lr"], group["weight_decay"] = 99.0, 99.0
    spec.write(optimizer, step=0, max_steps=10)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay == {
        id(net[0].weight): 0.3,
        id(net[1].bias): 0.0,
        id(net[2].weight): 0.0,
        id(net[2].bias): 0.0,
    }
    assert all((g["lr"], g["betas"], g["eps"]) == (0.5, (0.8, 0.9), 1e-6) for g in optimizer.param_groups)
    flat = spec.build([("matrix", nn.Parameter(torch.ones(6)))], ndim={"matrix": 2})  # as FSDP1 holds it
    assert [group["decays"] for group in flat.param_groups] == [True]


def test_a_step_follows_the_formula():
    """One AdamW step from zero moments moves weights by lr * sign(g), after a decay by lr * weight_decay."""
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    spec = OptimSpec(lr=0.1, weight_decay=0.5, eps=1e-12)
    optimizer = spec.build([("weight", weight)])
    weight.grad = torch.tensor([[0.3, -0.7]])
    spec.write(optimizer, 0, 1000)
    optimizer.step()
    expected = torch.tensor([[1.0, -2.0]]) * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([[1.0, -1.0]])
    assert torch.allclose(weight.data, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0}, "--model.optim.lr 0 must be above 0"),
        ({"beta1": 1.0, "beta2": 1.0}, "--model.optim.beta1 1.0 .*--model.optim.beta2 1.0"),
        ({"eps": 0, "weight_decay": -0.1}, "weight_decay -0.1 .*--model.optim.eps 0"),
        ({"decay_steps": -1, "min_lr_ratio": -0.1}, "decay_steps -1 .*--model.optim.min_lr_ratio -0.1"),
        ({"schedule": "linear"}, "--model.optim.schedule 'linear' must be cosine or wsd"),
        ({"warmup_steps": -1, "min_lr_ratio": 2}, "warmup_steps -1.*min_lr_ratio 2"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        OptimSpec(**settings)


def test_the_least_and_the_largest_values_are_taken():
    least = dict.fromkeys(("beta1", "beta2", "weight_decay", "min_lr_ratio", "warmup_steps", "decay_steps"), 0)
    assert OptimSpec(lr=1.0, **least).lr_at(9, 10) == 1.0  # no decay at all
    assert OptimSpec(lr=1.0, min_lr_ratio=1).lr_at(10, 10) == 1.0
    OptimSpec(warmup_steps=100).check(100)


def test_warmup_longer_than_the_run_says_how_to_shorten():
    said = r"--model.optim.warmup_steps 300 does not fit into --trainer.max_steps 100; .* --model.optim.warmup_steps 5"
    with pytest.raises(ConfigError, match=f"^{said}$"):
        OptimSpec(warmup_steps=300).check(100)


def test_warmup_and_decay_must_fit_together():
    OptimSpec(schedule="wsd", warmup_steps=50, decay_steps=50).check(100)
    with pytest.raises(ConfigError, match=r"warmup_steps 51 and decay_steps 50 do not fit into"):
        OptimSpec(schedule="wsd", warmup_steps=51, decay_steps=50).check(100)


def test_a_run_of_fewer_than_five_steps_has_no_decay_by_default():
    spec = OptimSpec(lr=1.0, schedule="wsd", min_lr_ratio=0.1)
    assert [spec.lr_at(step, 4) for step in range(5)] == [1.0, 1.0, 1.0, 1.0, 0.1]


def test_a_run_without_a_length_is_refused():
    with pytest.raises(ConfigError, match=r"--trainer.max_steps: -1 is not a valid run length"):
        OptimSpec().check(-1)


def test_biases_of_experts_do_not_decay_also_where_a_checkpoint_had_them_among_the_matrices():
    net = nn.ParameterDict({name: torch.ones(2, 3) for name in ("up_proj", "up_proj_bias", "frozen_bias")})
    was = torch.optim.AdamW([{"params": list(net.named_parameters()), "decays": True}], lr=1.0)  # as all with two
    for name in ("up_proj", "up_proj_bias"):
        net[name].grad = torch.full((2, 3), float(len(name)))
    was.step()
    net["frozen_bias"].requires_grad_(False)
    optimizer = OptimSpec().build(net.named_parameters())
    names = {group["decays"]: group["param_names"] for group in optimizer.param_groups}
    assert names == {True: ["up_proj"], False: ["up_proj_bias"]}
    optimizer.load_state_dict(by_name(was.state_dict()))
    for name in ("up_proj", "up_proj_bias"):
        assert torch.equal(optimizer.state[net[name]]["exp_avg"], was.state[net[name]]["exp_avg"])
    for names in (("up_proj",), ("up_proj", "up_proj_bias", "another", "a fourth")):  # one has stepped, or is new
        other = OptimSpec().build([(name, nn.Parameter(torch.ones(2, 3))) for name in names])
        with pytest.raises(ValueError, match="doesn't match the size|different number of parameter groups"):
            other.load_state_dict(by_name(was.state_dict()))
