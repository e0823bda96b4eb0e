"""Expert layers: autocast reaches them, nothing else changes, and their memory can be estimated without data."""

import copy

import pytest
import torch
import transformers
from conftest import arguments
from lightning.pytorch.callbacks import Callback
from transformers import AutoModelForCausalLM
from transformers.integrations import moe

from salt_lightning import cli
from salt_lightning.hugging_face.experts import follow_autocast
from salt_lightning.models import read_checkpoint

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "num_local_experts": 4,
}  # fmt: skip
FAMILIES = {
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SIZES, num_experts=4),
    "gpt_oss": lambda: transformers.GptOssConfig(**SIZES, head_dim=8),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES),
}
IDS = torch.arange(32).view(2, 16)


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[request.param]()).eval()


def outcome(model, autocast=True):
    """Logits, gradients of the experts, and dtypes of the weights in the grouped products."""
    used, original = set(), moe._grouped_mm

    def spy(hidden, weight, offs):
        used.add(weight.dtype)
        return original(hidden, weight, offs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "_grouped_mm", spy)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(IDS).logits.float()
        logits.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3}
    assert len(gradients) == 4
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    return logits.detach(), gradients, used


def test_in_autocast_they_compute_as_a_loop_over_experts_does(model):
    ours, loop = copy.deepcopy(model), copy.deepcopy(model)
    follow_autocast(ours)
    loop.set_experts_implementation("eager")
    assert outcome(copy.deepcopy(model))[2] == {torch.float32}  # the premise: transformers' own do not
    logits, gradients, used = outcome(ours)
    assert used == {torch.bfloat16}
    expected, expected_gradients, _ = outcome(loop)
    # both round each product to bf16 (2^-9), summed in another order
    assert torch.allclose(logits, expected, atol=2**-7 * expected.abs().max())
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).norm() <= 2**-6 * expected_gradients[name].norm(), name


def test_without_autocast_nothing_changes(model):
    ours = copy.deepcopy(model)
    follow_autocast(ours)
    assert ours.state_dict().keys() == model.state_dict().keys()
    logits, gradients, used = outcome(ours, autocast=False)
    expected, expected_gradients, _ = outcome(model, autocast=False)
    assert used == {torch.float32}
    assert torch.equal(logits, expected)
    assert all(torch.equal(gradient, expected_gradients[name]) for name, gradient in gradients.items())


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache.")  # of transformers
def test_they_compile_into_one_graph(model):
    follow_autocast(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.allclose(compiled(IDS).logits, model(IDS).logits, atol=1e-2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_check_tells_their_memory(settings, tmp_path, capsys, precision):
    typed = ("vocab_size", "num_local_experts", "moe_intermediate_size")
    config = {key: value for key, value in SIZES.items() if key not in typed}
    own = {
        "run": str(tmp_path / "run"), "kd.weight": 0.0, "model.student.family": "qwen3_moe",
        "model.student.config": {**config, "num_experts": 4}, "trainer.precision": precision,
    }  # fmt: skip
    original = moe._grouped_mm
    assert cli.main(["check", *arguments(settings, own)]) == 0
    out = capsys.readouterr().out
    assert "iB at its peak with 8 rows per micro-batch" in " ".join(out.split())
    assert "not estimated" not in out
    assert " ".join(out.split()).count("layers of experts, but nothing balances the load of the experts") == 1
    assert "not given, so the family's defaults: moe_intermediate_size 768" in " ".join(out.split())
    assert moe._grouped_mm is original


ERNIE = {  # freezes a bias in its routers, which gets no gradient
    **{key: SIZES[key] for key in SIZES if key not in ("vocab_size", "num_experts_per_tok", "num_local_experts")},
    **{"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
}


class AllHaveGradients(Callback):
    """As DDP needs it of all that trains."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = dict(pl_module.named_parameters())
        assert [name for name, p in named.items() if p.requires_grad and p.grad is None] == []
        assert [name for name, p in named.items() if not p.requires_grad] == [
            "student.model.model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"
        ]


def test_what_a_family_freezes_is_not_trained(fit_with, tmp_path, capsys):
    fresh = {"model.student.family": "ernie4_5_moe", "model.student.config": ERNIE, "trainer.max_steps": 2}
    assert fit_with(tmp_path / "fresh", AllHaveGradients(), **fresh) == 0
    saved = tmp_path / "fresh/checkpoints/step-00000002.ckpt"
    groups = read_checkpoint(str(saved), "--ckpt_path")["optimizer_states"][0]["param_groups"]
    assert not any("e_score_correction_bias" in name for group in groups for name in group["param_names"])
    folder = str(tmp_path / "exported")
    assert cli.main(["export", str(saved), folder]) == 0
    longer = {"model.student.path": folder, "data.tokenizer": folder, "trainer.max_steps": 2}
    assert fit_with(tmp_path / "longer", AllHaveGradients(), **{"model.student.config": {}, **longer}) == 0
    assert fit_with(tmp_path / "looked at", verb="check", **fresh) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "all but 4 of 28,964 parameters (25,892 for each token) train" in out
    assert "iB at its peak with 8 rows per micro-batch" in out
