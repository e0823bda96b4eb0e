"""Model families of transformers: head, isolation of documents, a KD step; loading; what is refused."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, LLAMA_LIKE, SIZES, SPECIAL, tiny
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, log_softmax, softmax
from transformers import AutoModelForCausalLM, __version__

from salt_lightning.data import SALTDataModule
from salt_lightning.errors import ConfigError
from salt_lightning.hugging_face import own_code
from salt_lightning.hugging_face.attention import document_mask
from salt_lightning.hugging_face.folders import config_hash, sample_hash
from salt_lightning.hugging_face.spec import ModelSpec, as_config_error, family_config, fresh_config, resolved
from salt_lightning.losses import salt_loss
from salt_lightning.models import CausalLM, build, build_fresh, check_path, load_pretrained

IDS = torch.tensor([[5, 9, 3, 60, 7, 7, 22, 1, 30, 2], [4, 4, 8, 1, 9, 12, 33, 2, 0, 6]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]])
ROOT = Path(__file__).parents[1]
families = pytest.mark.parametrize("family", FAMILIES)


@families
def test_hidden_times_head_are_the_models_logits(family):
    lm = tiny(family).eval()
    lm.check()
    hidden_ND, head_VD, bias_V = lm(IDS, torch.arange(10).expand(2, -1))
    logits_NV = torch.nn.functional.linear(hidden_ND, head_VD, bias_V)
    own_NV = lm.model(input_ids=IDS, use_cache=False).logits.flatten(0, 1)
    # two ways of rounding a sum of 32 products in fp32
    assert torch.allclose(logits_NV, own_NV, rtol=0, atol=32 * 2**-23 * own_NV.abs().max().item())
    assert own_NV.std() > 0.05  # the premise: not all equal


@families
def test_a_packed_document_is_what_it_is_alone(family):
    lm = tiny(family).eval()
    lm.check()
    packed_BTD = lm(IDS, POSITIONS)[0].view(2, 10, -1)
    for row, begin, end in ((0, 0, 3), (0, 3, 10), (1, 0, 7), (1, 7, 10)):
        alone_TV = lm.model(input_ids=IDS[row : row + 1, begin:end], use_cache=False).logits[0]
        packed_TV = torch.nn.functional.linear(packed_BTD[row, begin:end], *lm(IDS, POSITIONS)[1:])
        # two orders of summation in two layers; a wrong mask moves logits by their own size
        assert torch.allclose(packed_TV, alone_TV, rtol=0, atol=1e-4 * alone_TV.abs().max().item())


def test_flex_attention_is_tested_without_its_kernels_on_a_cpu(monkeypatch):
    """They take a minute to compile, and some machines have no compiler."""
    seen = []
    monkeypatch.setattr(CausalLM, "_check", lambda lm: seen.append(lm.model.config._attn_implementation) or 0.0)
    lm = CausalLM(tiny("llama").model, "student")
    lm.model.set_attn_implementation("flex_attention")
    lm.attention = "flex_attention"
    lm.check()
    assert (seen, lm.attention, lm.model.config._attn_implementation) == (["eager"], *["flex_attention"] * 2)


@families
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(family, attention):
    if family in ("gemma2", "gpt_oss") and attention == "sdpa":
        pytest.skip("it has no sdpa")
    lm = tiny(family).eval()
    lm.model.set_attn_implementation(attention)
    lm.check()
    before = lm(IDS, POSITIONS)[0].view(2, 10, -1)
    changed = IDS.clone()
    changed[0, :3] = torch.tensor([1, 2, 3])  # document 1 of row 0
    after = lm(changed, POSITIONS)[0].view(2, 10, -1)
    if "num_experts_per_tok" in FAMILIES[family]:  # experts multiply tokens in groups, whose sums differ by rounding
        assert (after - before)[0, 3:].abs().max() <= 32 * 2**-23 * before.abs().max()
    else:
        assert torch.equal(before[0, 3:], after[0, 3:])
    assert not torch.allclose(before[0, :3], after[0, :3])
    # and a document gives the same as alone
    alone = lm(IDS[:1, 3:], POSITIONS[:1, 3:])[0]
    assert torch.allclose(before[0, 3:], alone, atol=1e-5 * alone.abs().max().item())
    # but within a document the past is visible
    changed = IDS.clone()
    changed[0, 3] = 11
    assert not torch.allclose(before[0, 9], lm(changed, POSITIONS)[0].view(2, 10, -1)[0, 9])


def test_the_token_that_a_model_pads_with_learns_as_any_other():
    """Fresh models have EOS for it, which is read between the turns of a chat. torch gives such a row no gradient."""
    ids_BT, pad = torch.tensor([[5, 3, 7, 8]]), 3
    lm = tiny("llama", pad_token_id=pad, tie_word_embeddings=False)
    assert all(m.padding_idx is None for m in lm.modules() if isinstance(m, torch.nn.Embedding))
    embedding = lm.model.get_input_embeddings().weight
    lm(ids_BT, torch.arange(4)[None])[0].square().sum().backward()
    rows_BTD = embedding.detach()[ids_BT].requires_grad_()
    lm.model.base_model(inputs_embeds=rows_BTD).last_hidden_state.square().sum().backward()
    assert rows_BTD.grad[0, 1].abs().max() > 0
    assert torch.allclose(
        embedding.grad[ids_BT], rows_BTD.grad, rtol=1e-5, atol=1e-6 * rows_BTD.grad.abs().max().item()
    )


@families
def test_a_kd_step_has_the_gradient_of_the_full_logits(family):
    student, teacher = (
        tiny(family).eval(),
        tiny("llama", "teacher", seed=1, hidden_size=16).eval().requires_grad_(False),
    )
    student.check()
    labels_N = torch.randint(0, 64, (20,), generator=torch.Generator().manual_seed(0))
    labels_N[3] = -100
    with torch.no_grad():
        hidden_NE, head_VE, _ = teacher(IDS, POSITIONS)

    def ours(hidden_ND, head_VD, bias_V):
        return salt_loss(hidden_ND, head_VD, labels_N, hidden_NE, head_VE, 0.7, student_bias_V=bias_V).loss

    student(IDS, POSITIONS, then=ours).backward()
    got = {name: p.grad.clone() for name, p in student.named_parameters()}
    assert all(p.grad is None for p in teacher.parameters())
    student.zero_grad()
    logits_NV = torch.nn.functional.linear(*student(IDS, POSITIONS))
    q_NV = softmax(hidden_NE @ head_VE.T, 1)
    valid_N = labels_N != -100
    kd = -(q_NV * log_softmax(logits_NV, 1)).sum(1)[valid_N].mean()
    (0.3 * cross_entropy(logits_NV, labels_N) + 0.7 * kd).backward()
    for name, p in student.named_parameters():
        # fp32 rounding through two small layers, relative to the largest entry of the tensor
        assert torch.allclose(got[name], p.grad, atol=1e-5 * p.grad.abs().max().item() + 1e-7), name


def test_soft_caps_are_refused_by_name():
    with pytest.raises(ConfigError, match="gemma2 caps its logits softly .final_logit_softcapping 30.0."):
        tiny("gemma2", final_logit_softcapping=30.0)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.01), (torch.bfloat16, 1.05)])
def test_logits_changed_behind_the_head_are_noticed(dtype, factor):
    lm = tiny("llama").to(dtype)
    lm.check()
    lm.model.lm_head.register_forward_hook(lambda module, args, out: out * factor)
    with pytest.raises(ConfigError, match="differ from LlamaForCausalLM's own logits"):
        lm.check()


def test_a_model_that_sees_later_tokens_is_refused():
    with pytest.raises(ConfigError, match="tokens of this Gemma3ForCausalLM see later ones"):
        tiny("gemma3_text", use_bidirectional_attention=True).check()


def test_the_proof_leaves_dropout_as_it_was():
    for training in (True, False):
        lm = tiny("gpt2").train(training)
        lm.check()
        assert {module.training for module in lm.modules()} == {training}


def test_a_leak_is_noticed_where_the_own_mask_cannot_help():
    lm = tiny("llama")
    attend = lm.backbone.layers[0].self_attn.forward
    lm.backbone.layers[0].self_attn.forward = lambda *a, **k: attend(*a, **{**k, "attention_mask": None})
    with pytest.raises(ConfigError, match="packed documents see each other"):
        lm.check()


def test_a_leak_in_a_batch_alone_is_noticed():
    """As transformers' flash attention does it: one row is taken apart, several are not."""
    lm = tiny("llama")
    attend = lm.backbone.layers[0].self_attn.forward

    def leaky(hidden_states, **k):
        return attend(hidden_states, **({**k, "attention_mask": None} if len(hidden_states) > 1 else k))

    lm.backbone.layers[0].self_attn.forward = leaky
    with pytest.raises(ConfigError, match="packed documents see each other"):
        lm.check()
    lm._one_row = True  # what CausalLM does for flash attention
    lm.check()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_rows_laid_end_to_end_give_the_same_hidden_states(family):
    """As with flash attention, here with sdpa."""
    lm = tiny(family).eval()
    expected = lm(IDS, POSITIONS)[0]
    lm._one_row = True
    # the same products in another order of rows: rounding of fp32 sums of a few dozen terms
    assert torch.allclose(lm(IDS, POSITIONS)[0], expected, atol=1e-5)
    assert not torch.allclose(lm(IDS, torch.arange(IDS.shape[1]).expand_as(IDS))[0], expected, atol=1e-3)


def test_document_mask_by_hand():
    allowed = document_mask(torch.tensor([[0, 1, 0, 1]]), torch.bool)[0, 0]
    assert allowed.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    added = document_mask(torch.tensor([[0, 1, 0, 1]]), torch.float32)[0, 0]
    assert torch.equal(added == 0, allowed)
    assert (added[~allowed] < -1e38).all()


def test_a_table_of_positions_is_cast_with_the_weights():
    sizes = {"d_model": 32, "num_layers": 1, "attention_heads": 4, "ffn_dim": 48, "vocab_size": 64, **SPECIAL}
    lm = CausalLM(build_fresh(ModelSpec(family="xglm", config=sizes), None, 0), "student").to(torch.bfloat16)
    assert lm(IDS, POSITIONS)[0].dtype == torch.bfloat16


def test_hidden_states_that_are_no_numbers_are_no_proof():
    lm = tiny("llama")
    lm.model.model.norm.weight.data[0] = float("nan")
    assert lm.sees([0], [4])


@families
def test_a_cast_leaves_the_frequencies_of_positions_in_fp32(family):
    """In bf16 they are off by 0.4%: far positions would differ in the export, and for a student taught by it."""
    lm = tiny(family)
    before = {name: buffer.clone() for name, buffer in lm.named_buffers() if name.endswith("inv_freq")}
    torch.nn.Sequential(lm).to(torch.bfloat16)  # as Lightning casts it: inside another module
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    buffers = dict(lm.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in before.items())
    assert before or family in ("gpt2", "opt")  # the premise
    assert lm(IDS, POSITIONS)[0].dtype == torch.bfloat16
    assert all(buffer.device.type == "meta" for buffer in lm.to("meta").buffers())


def test_fresh_weights_depend_on_the_seed_alone():
    weights = []
    for _ in range(2):
        torch.rand(7)  # other consumers of the global generator
        state = torch.random.get_rng_state()
        weights.append(tiny("llama", seed=3).state_dict())
        assert torch.equal(torch.random.get_rng_state(), state)  # and does not change that generator
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))
    other = tiny("llama", seed=4).state_dict()
    assert not torch.equal(weights[0]["model.lm_head.weight"], other["model.lm_head.weight"])


def test_a_hugging_face_folder_loads_from_safetensors_alone(tmp_path, caplog):
    caplog.set_level("INFO")
    lm = tiny("llama").eval()
    lm.model.save_pretrained(tmp_path / "hf")
    spec = ModelSpec(path=str(tmp_path / "hf"))
    loaded = CausalLM(load_pretrained(spec, "teacher", torch.float32), "teacher").eval()
    assert torch.equal(loaded(IDS, POSITIONS)[0], lm(IDS, POSITIONS)[0])
    assert not loaded.model.use_kernels  # transformers 5.25 fetches them from the hub, unless told not to
    half = load_pretrained(spec, "teacher", torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    weights = lm.model.state_dict()
    save_file({**weights, "visual.proj": torch.ones(2)}, tmp_path / "hf" / "model.safetensors")
    load_pretrained(spec, "teacher", torch.float32)
    assert "hf has 1 weights that its config.json ignores: visual.proj" in caplog.text
    # weights that only a pickle holds are not read
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"--model.teacher.path .* has no weights: .*, only pytorch_model.bin; "):
        load_pretrained(spec, "teacher", torch.float32)


def test_remote_code_is_not_run_unless_asked_for(tmp_path, monkeypatch):
    folder = tmp_path / "hf"
    tiny("llama").model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(
        f"from transformers import LlamaConfig, LlamaForCausalLM\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class C(LlamaConfig):\n    model_type = 'mine'\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n"
    )
    with pytest.raises(
        ConfigError, match=r"needs model code that comes with it .* --model.teacher.trust_remote_code tr"
    ):
        load_pretrained(ModelSpec(path=str(folder)), "teacher", torch.float32)
    asks = ModelSpec(path=str(folder), trust_remote_code=True)
    with pytest.raises(
        ConfigError, match=r"--model.student.path .* comes with it \('mine' .*: checkpoints hold no code;"
    ):
        check_path(asks, "student", trains=True)
    assert not (tmp_path / "ran").exists()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    check_path(asks, "teacher")
    check_path(asks, "student")  # of a validation
    assert type(load_pretrained(asks, "teacher", torch.float32)).__name__ == "M"
    assert (tmp_path / "ran").exists()


def _own_code(folder, ran):
    """A model whose code, as for transformers 4, has no generate(), and computes in `__init__` what no file holds."""
    model = tiny("llama").model
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(
        "import torch\nfrom transformers import LlamaConfig, LlamaModel, PreTrainedModel\n"
        "from transformers.modeling_outputs import CausalLMOutputWithPast\n"
        f"with open({str(ran)!r}, 'a') as file: file.write({folder.name!r} + ' ')\n"
        "class C(LlamaConfig):\n    model_type = 'mine'\n"
        "class M(PreTrainedModel):\n    config_class, base_model_prefix = C, 'model'\n"
        "    _keys_to_ignore_on_load_missing = ['thirds', 'lm_head.weight']\n"
        "    def __init__(self, config):\n        super().__init__(config)\n"
        "        self.model = LlamaModel(config)\n"
        "        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)\n"
        "        self.register_buffer('squares', torch.arange(1000.0) ** 2, persistent=False)\n"
        "        self.register_buffer('halves', torch.full((8,), 3.0), persistent=False)\n"
        "        cubes = torch.arange(8.0) ** 3\n"
        "        for shares in (self.lm_head, self.model): shares.register_buffer('cubes', cubes, persistent=False)\n"
        "        self.register_buffer('thirds', torch.arange(8.0) / 3)\n"  # not in the file, as from transformers 4
        "        self.plain, self.lm_head.held = torch.arange(8.0) ** 4, {'a': [torch.arange(8.0) ** 5], 'b': 'c'}\n"
        "        self.of_weights = [self.lm_head.weight[:2]]\n"
        "        self.post_init()\n"
        "    def _init_weights(self, module):\n"  # as for transformers 5
        "        super()._init_weights(module)\n"
        "        if module is self: self.halves.copy_(torch.arange(8.0) / 2)\n"
        "    def get_output_embeddings(self):\n        return self.lm_head\n"
        "    def forward(self, input_ids=None, position_ids=None, **kwargs):\n"
        "        hidden = self.model(input_ids, position_ids=position_ids, use_cache=False).last_hidden_state\n"
        "        return CausalLMOutputWithPast(logits=self.lm_head(hidden))\n"
    )
    return model


def test_a_model_with_its_own_code_has_all_that_this_code_computes(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    same = _own_code(tmp_path / "hf", tmp_path / "ran")
    spec = ModelSpec(path=str(tmp_path / "hf"), trust_remote_code=True)
    before = torch.get_rng_state()
    loaded = load_pretrained(spec, "teacher", torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(loaded.squares, torch.arange(1000.0) ** 2)
    assert torch.equal(loaded.halves, torch.arange(8.0) / 2)
    assert all(torch.equal(each.cubes, torch.arange(8.0) ** 3) for each in (loaded.lm_head, loaded.model))
    assert torch.equal(loaded.thirds, torch.arange(8.0) / 3)
    assert loaded.of_weights[0].is_meta  # nobody knows how to make it
    empty = build(spec, "teacher", None, torch.float32, torch.device("meta")).model  # of FSDP2's other processes
    for each in (loaded, empty):
        assert torch.equal(each.plain, torch.arange(8.0) ** 4)
        assert torch.equal(each.lm_head.held["a"][0], torch.arange(8.0) ** 5)
    assert empty.thirds.is_meta
    ids_BT = torch.arange(8)[None]
    torch.testing.assert_close(loaded.eval()(ids_BT).logits, same.eval()(ids_BT).logits)  # the cache changes a rounding
    CausalLM(loaded, "teacher").check()
    before, code = config_hash(tmp_path / "hf"), tmp_path / "hf" / "mine.py"
    code.write_text(f"{code.read_text()}# other\n")
    changed = config_hash(tmp_path / "hf")
    assert changed != before
    os.mkfifo(tmp_path / "hf" / "pipe.py")  # is not waited for
    (tmp_path / "hf" / "setup.py").write_text("")  # nothing runs it; the hub's cache may have it or not
    (tmp_path / "hf" / "part.py").write_text("A = 1")
    assert config_hash(tmp_path / "hf") == changed
    code.write_text("from .part import A\nfrom .pipe import B\n" + code.read_text())
    with_part = config_hash(tmp_path / "hf")
    (tmp_path / "hf" / "part.py").write_text("A = 2")
    assert len({changed, with_part, config_hash(tmp_path / "hf")}) == 3
    assert config_hash(tmp_path) is None


@pytest.mark.parametrize(
    ("tied", "new", "said"),
    [
        (
            False,
            ("CausalLMOutputWithPast(logits=self.lm_head(hidden))", "(self.lm_head(hidden),)"),
            "with its settings",
        ),
        (True, ("def __init__", "_tied_weights_keys = ['lm_head.weight']\n    def __init__"), "cannot be loaded"),
    ],
)
def test_an_error_of_own_code_says_that_it_may_be_for_another_transformers(tied, new, said, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    _own_code(tmp_path / "hf", tmp_path / "ran")
    config, code = tmp_path / "hf/config.json", tmp_path / "hf/mine.py"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": tied}))
    code.write_text(code.read_text().replace(*new))
    spec = ModelSpec(path=str(tmp_path / "hf"), trust_remote_code=True)
    hint = rf"{said} \(its own code may be for another transformers than {__version__}\): AttributeError: "
    with pytest.raises(ConfigError, match=hint):
        CausalLM(load_pretrained(spec, "teacher", torch.float32), "teacher").check()


def test_an_error_of_a_family_of_transformers_blames_no_own_code(tmp_path):
    """It has none, also where it may be run."""
    tiny("llama").model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "nope"}))
    with pytest.raises(ConfigError, match=r"--model.teacher.path \S+ cannot be loaded: KeyError: 'nope'"):
        load_pretrained(ModelSpec(path=str(tmp_path), trust_remote_code=True), "teacher", torch.float32)


def test_a_weight_that_own_code_lets_be_missing_is_not_left_random(tmp_path, monkeypatch):
    """transformers 4 tied it; 5 does not, for the code does not say in its way to what."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    _own_code(tmp_path / "hf", tmp_path / "ran")
    file = tmp_path / "hf" / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != "lm_head.weight"}, file)
    spec = ModelSpec(path=str(tmp_path / "hf"), trust_remote_code=True)
    with pytest.raises(ConfigError, match=r"--model.teacher.path .* lacks 1 of its weights: lm_head.weight; is the "):
        load_pretrained(spec, "teacher", torch.float32)
    code = tmp_path / "hf" / "mine.py"
    computed = "head = module.lm_head.weight; head.copy_(torch.arange(head.numel()).sin().view_as(head))"
    code.write_text(code.read_text().replace("if module is self: ", f"if module is self: {computed}; "))
    spec = replace(spec, path=str(shutil.copytree(tmp_path / "hf", tmp_path / "sines")))
    loaded = load_pretrained(spec, "teacher", torch.float32)
    head = loaded.lm_head.weight.flatten()
    assert torch.equal(head, torch.arange(len(head)).sin())
    made_anew, text = own_code._made_anew, code.read_text().replace(computed, "pass")

    def in_the_same_memory(model):  # it is 0 for both where the system has just given it
        made = made_anew(model)
        made.lm_head.weight.data.copy_(model.lm_head.weight)
        return made

    monkeypatch.setattr(own_code, "_made_anew", in_the_same_memory)
    ties = "self.lm_head.weight = self.model.embed_tokens.weight; self.post_init()"
    for name, new in {"unset": ("super()._init_weights(module)", "pass"), "tied": ("self.post_init()", ties)}.items():
        code.write_text(text.replace(*new))
        spec = replace(spec, path=str(shutil.copytree(tmp_path / "hf", tmp_path / name)))
        with pytest.raises(ConfigError, match=r"--model.teacher.path .* lacks 1 of its weights: lm_head.weight; is "):
            load_pretrained(spec, "teacher", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_ignores_position_ids_is_refused(dtype, monkeypatch):
    """With a mask alone, a packed document would have the learned positions of its place in the row."""
    lm = tiny("gpt2").to(dtype)
    with torch.no_grad():
        lm.backbone.wpe.weight.mul_(0.2)  # so that it changes the hidden states by 11 to 17%
    monkeypatch.setattr(lm.model, "__class__", type("Own", (type(lm.model),), {"__module__": "mine"}))
    lm.check()
    forward = lm.backbone.forward

    def ignoring(input_ids, position_ids, **kwargs):
        return forward(input_ids=input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **kwargs)

    monkeypatch.setattr(lm.backbone, "forward", ignoring)
    with pytest.raises(ConfigError, match=r"of Own depend on where in its row a document begins: it ignores p"):
        lm.check()


@pytest.mark.parametrize("empty", [False, True])  # empty: of FSDP2's other processes
def test_only_the_code_of_the_revision_is_run(empty, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--own"
    (repository / "refs").mkdir(parents=True)
    for ref, commit in {"main": "a" * 40, "v1": "b" * 40}.items():
        _own_code(repository / "snapshots" / commit, tmp_path / "ran")
        (repository / "refs" / ref).write_text(commit)
    spec = ModelSpec(path="owner/own", revision="v1", trust_remote_code=True)
    model = load_pretrained(spec, "teacher", torch.float32, empty=empty)
    assert model.lm_head.weight.is_meta == empty
    assert set((tmp_path / "ran").read_text().split()) == {"b" * 40}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("runs/x/checkpoints/step-00000001.ckpt", "does not exist"),
        ("./folder", "does not exist"),
        ("/folder/x", "does not exist"),
        ("a/b/c", "does not exist"),
    ],
)
def test_missing_paths_are_named_before_anything_is_built(path, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"--model.teacher.path {path} {message}"):
        check_path(ModelSpec(path=path), "teacher")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_weight_of_a_token_that_no_check_reads_is_found(value):
    lm = tiny("llama")
    lm.check()
    lm.model.get_input_embeddings().weight.data[-1, 3] = value
    with pytest.raises(ConfigError, match=r"its weights are not finite \(.*embed.*\): they are damaged"):
        lm.check()


def test_small_floating_types_of_a_quantized_model_are_left_alone():
    lm = tiny("llama")
    scale = torch.ones(4, 4).to(torch.float8_e4m3fn)
    lm.model.register_parameter("scale", torch.nn.Parameter(scale, requires_grad=False))
    lm.check()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "is a folder without config.json; give a Hugging Face folder, or a "),
        (["adapter_config.json", "adapter_model.safetensors"], "has an adapter .*merge_and_unload"),
        (["config.json", "model.safetensors", "adapter_config.json"], "has an adapter .*or give the model without"),
        (
            ["trainer_state.json", "checkpoint-500/config.json", "checkpoint-1000/config.json"],
            "without config.json; give one of its checkpoints, e.g. .*/checkpoint-1000$",  # the newest
        ),
        (["config.yaml", "checkpoints/step-00000005.ckpt"], "e.g. .*/checkpoints/step-00000005.ckpt$"),
        (["step-00000005.ckpt", "step-00000010.ckpt"], "e.g. .*/step-00000010.ckpt$"),
        (["lit_model.pth", "model_config.yaml"], "litgpt convert_from_litgpt"),
    ],
)
def test_a_folder_that_is_no_model_is_said_to_be_what_it_is(files, message, tmp_path):
    for number, file in enumerate(files):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
        os.utime(tmp_path / file, (number, number))
    with pytest.raises(ConfigError, match=rf"^--model.teacher.path {tmp_path} .*{message}"):
        check_path(ModelSpec(path=str(tmp_path)), "teacher")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ModelSpec(family="lama"), "--model.student.family lama: transformers has no such model type"),
        (
            ModelSpec(family="gemma3", config={"text_config": {"hidden_size": 8}}),
            "--model.student.family gemma3 is not a text-only model; use --model.student.family gemma3_text, its",
        ),
        (
            ModelSpec(family="musicgen"),
            "--model.student.family musicgen: (ValueError: Multiple valid text c|TypeError: Field .text_enc)",
        ),
        (
            ModelSpec(config={"hiden_size": 8}),
            "config.hiden_size: llama has no such setting; did you mean hidden_size",
        ),
        (
            ModelSpec(config={"model_type": "llama"}),
            "config.model_type: leave it out; use --model.student.family instead",
        ),
        (ModelSpec(config={"dtype": "bfloat16"}), "config.dtype: leave it out; use --model.student.dtype instead"),
        (ModelSpec(family="gpt2", config={"head_dim": 16}), "config.head_dim: gpt2 has no such setting"),
        (ModelSpec(family="falcon", config={"head_dim": 16}), "config.head_dim: falcon has no such setting"),
        (ModelSpec(family="gpt_neo", config={"head_dim": 16}), "config.head_dim: gpt_neo has no such setting"),
    ],
)
def test_misspelt_students_are_named(spec, message):
    from salt_lightning.hugging_face.spec import fresh_config

    with pytest.raises(ConfigError, match=message):
        fresh_config(spec, None)


def test_heads_of_any_width_are_built_where_the_family_does_not_list_them():
    query = tiny("qwen3_moe", head_dim=16).model.model.layers[0].self_attn.q_proj
    assert query.out_features == 4 * 16  # four heads; without the setting 32 / 4 each


def test_a_checkpoint_of_a_student_whose_folder_has_settings_of_its_own_loads_on_its_own(tmp_path):
    """GLM 4 and Qwen 3 with experts have a head_dim that their families do not list; others name their tools."""
    config = build_fresh(ModelSpec(config={**LLAMA_LIKE, "max_position_embeddings": 16}), None, 0).config
    config.unsloth_version = "2026.1"
    spec = resolved(ModelSpec(path="hub/name", revision="v1"), config)
    assert (spec.path, spec.revision) == (None, None)
    assert build_fresh(spec, None, 0).config.unsloth_version == "2026.1"


def test_the_users_own_settings_stay_as_they_are():
    """transformers completes the dict of a rope; a sweep would pass that on to its next run."""
    own = {**LLAMA_LIKE, "max_position_embeddings": 16, "rope_parameters": {"rope_type": "default"}}
    before = deepcopy(own)
    fresh_config(ModelSpec(config=own), None)
    assert own == before


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("llama4_text", {**LLAMA_LIKE, "intermediate_size_mlp": 48, "num_local_experts": 4}, "no separate backbone"),
        ("openai-gpt", SIZES, "OpenAIGPTLMHeadModel cannot be run with its settings: "),
        ("jamba", {**LLAMA_LIKE, "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4},
         "only by a mask, which its layers of other kinds .* do not use"),
    ],
)  # fmt: skip
def test_families_that_cannot_be_trained_as_they_must_be_are_refused(family, config, message):
    with pytest.raises(ConfigError, match=message):
        CausalLM(build_fresh(ModelSpec(family=family, config=config), None, 0), "student").check()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_want_of_memory_is_no_fault_of_a_setting(error):
    with pytest.raises(type(error)), as_config_error("--model.student.config"):
        raise error


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_broken_checkpoint_as_teacher_is_named(tmp_path, content):
    path = tmp_path / "step-00000001.ckpt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"is not a whole checkpoint of this project"):
        load_pretrained(ModelSpec(path=str(path)), "teacher", torch.float32)


def test_weights_are_known_by_a_hash_of_the_files_that_are_read(tmp_path):
    model = tiny("llama").model
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert sample_hash(tmp_path / "empty") is None
    for name in ("one", "shards"):
        folder = tmp_path / name
        before = sample_hash(folder)
        (folder / "consolidated.safetensors").write_bytes(b"not read")
        (folder / "optimizer.ckpt").mkdir()
        assert sample_hash(shutil.copytree(folder, tmp_path / f"{name} again")) == before
        file = max(folder.glob("model*.safetensors"))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        assert sample_hash(folder) != before
        file.unlink()
        assert sample_hash(folder) is None
    (tmp_path / "step.ckpt").mkdir()
    for rank, content in enumerate((b"some", b"more")):
        (tmp_path / f"step.ckpt/__{rank}_0.distcp").write_bytes(content)
    before = sample_hash(tmp_path / "step.ckpt")
    (tmp_path / "step.ckpt/__1_0.distcp").write_bytes(b"other")
    assert before != sample_hash(tmp_path / "step.ckpt") is not None


def test_a_hub_name_with_a_revision(tmp_path):
    """The hub's own cache layout, offline: `v1` and `main` are different commits of one repository."""
    repository = tmp_path / "models--owner--small"
    for seed, (ref, commit) in enumerate({"main": "a" * 40, "v1": "b" * 40}.items()):
        tiny("llama", seed=seed).model.save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    code = """
import sys, torch
from salt_lightning.models import check_path, load_pretrained
from salt_lightning.hugging_face.spec import ModelSpec
for revision in sys.argv[1:]:
    spec = ModelSpec(path="owner/small", revision=revision or None)
    check_path(spec, "teacher")
    print(load_pretrained(spec, "teacher", torch.float32).lm_head.weight.double().sum().item())
"""
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    revisions = {"": 0, "main": 0, "v1": 1}  # -> seed
    done = subprocess.run([sys.executable, "-c", code, *revisions, "v2"], env=env, capture_output=True, text=True)
    expected = [tiny("llama", seed=seed).model.lm_head.weight.double().sum().item() for seed in revisions.values()]
    assert list(map(float, done.stdout.split())) == expected, done.stderr
    assert "ConfigError: --model.teacher.revision v2: the hub is offline (HF_HUB_OFFLINE), and its cache" in done.stderr


def test_a_family_that_divides_its_logits_is_honoured():
    from salt_lightning.models import build_fresh

    sizes = {**FAMILIES["llama"], "max_position_embeddings": 16, "logits_scaling": 4.0}
    lm = CausalLM(build_fresh(ModelSpec(family="granite", config=sizes), None, 0), "student")
    lm.check()


def test_a_teacher_checkpoint_that_lacks_a_weight_is_refused(teacher, tmp_path):
    """Loaded without it, that weight would be random, and nobody would know."""
    checkpoint = torch.load(teacher, weights_only=True)
    del checkpoint["state_dict"]["student.model.model.norm.weight"]
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match=r"contains another model than its settings say: .*Missing key.*norm.weight"):
        load_pretrained(ModelSpec(path=str(tmp_path / "x.ckpt")), "teacher", torch.float32)


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [
        (
            "llama",
            {"rope_parameters": {"factor": 8.0}},
            "rope_type'='default': {'factor'}, so they would change nothing",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fasst": 1}},
            "{'beta_fasst'}, so they",
        ),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 5e5}}, "rope_theta 500000.0 would change nothing: gemma3_t"),
        (
            "llama",
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "_factor 0.5 would change nothing: llama rotates wh",
        ),
        (
            "olmo3",
            {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}},
            "--model.student.config.rope_parameters.full_attention.partial_rotary_factor 0.5 would change nothing",
        ),
        ("llama", {"rope_theta": 5e5}, "rope_theta: llama has no such setting; did you mean rope_parameters?"),
    ],
)
def test_what_would_leave_a_rope_as_it_is_is_refused(family, settings, says):
    data = SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=0), vocab_size=64, block_size=32)
    spec = ModelSpec(family=family, config=FAMILIES[family] | settings)
    with pytest.raises(ConfigError, match=re.escape(says)):
        fresh_config(spec, data)


@pytest.mark.parametrize(
    ("family", "ropes", "says"),
    [
        ("llama", {"rope_type": "yarnn"}, r"rope_parameters.rope_type yarnn is not known; give one of default, .*yarn"),
        ("llama", {"rope_type": ["yarn"]}, r"rope_parameters.rope_type \['yarn'\] is not known; give one of default,"),
        ("llama", {"rope_theta": 0.0}, r"rope_parameters.rope_theta 0.0 must be above 0, and finite"),
        (
            "gemma3_text",
            {"full_attention": {"rope_type": "foo"}, "sliding_attention": {"rope_theta": -1}},
            r"rope_parameters.full_attention.rope_type foo .*; --model.*sliding_attention.rope_theta -1 must be above",
        ),
    ],
)
def test_ropes_that_there_are_not_are_refused_before_any_text_is_read(family, ropes, says):
    with pytest.raises(ConfigError, match=f"^--model.student.config.{says}"):
        family_config(ModelSpec(family=family, config=FAMILIES[family] | {"rope_parameters": ropes}))


@pytest.mark.parametrize(("family", "share", "turned"), [("phi", 0.25, 1), ("gpt_neox", 0.5, 2), ("llama", 1.0, 4)])
def test_the_share_of_a_head_that_turns(family, share, turned):
    """Of heads of 8, in pairs."""
    lm = tiny(family, rope_parameters={"partial_rotary_factor": share})
    assert [len(b) for name, b in lm.named_buffers() if name.endswith("rotary_emb.inv_freq")] == [turned]


def test_a_rope_that_depends_on_the_neighbours_is_told(recwarn):
    """longrope: from a document longer than 8 tokens on, other frequencies for all that share its micro-batch."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 1e4}
    rope |= {"original_max_position_embeddings": 8}
    config = {**FAMILIES["llama"], "max_position_embeddings": 32, "rope_parameters": rope}
    lm = tiny("llama", **config)
    ids = torch.arange(4, 16)[None]
    apart, after_a_long_one = ([*range(6), *range(6)], [*range(12)])
    alone, _, _ = lm(ids[:, :6], torch.arange(6)[None])
    short = lm(ids, torch.tensor([apart]))[0][:6]
    long = lm(torch.cat([ids[:, :6], ids], 1), torch.tensor([[*range(6), *after_a_long_one]]))[0][:6]
    torch.testing.assert_close(short, alone)
    assert (long - alone).abs().max() > 1e-3
    for block_size in (8, 16):
        data = SimpleNamespace(block_size=block_size, vocab_size=20, tokenizer=SimpleNamespace(eos_token_id=0))
        fresh_config(ModelSpec(config=config), data)
        said = [str(w.message) for w in recwarn if "longrope" in str(w.message)]
        assert len(said) == (block_size > 8), said
    assert "one of its documents is longer than 8 tokens" in said[0]
    plain = {"rope_type": "default", "rope_theta": 1e4}
    kinds = {"full_attention": rope, "sliding_attention": plain}  # one for each kind of layer
    fresh_config(ModelSpec(family="gemma3_text", config={**FAMILIES["gemma3_text"], "rope_parameters": kinds}), data)
    assert len([w for w in recwarn if "longrope" in str(w.message)]) == 2


def test_a_checkpoint_does_not_say_that_its_weights_are_quantized():
    """A folder of quantized weights is trained in full precision."""
    config = tiny("llama").model.config
    config.quantization_config = {"quant_method": "fp8"}
    assert "quantization_config" not in resolved(ModelSpec(path="x"), config).config


def test_a_folder_of_quantized_weights_loads(tmp_path, monkeypatch):
    """transformers' loaders of such weights need a GPU or packages: one that leaves integers replaces them here."""
    tiny("llama").model.save_pretrained(tmp_path)
    original = AutoModelForCausalLM.from_pretrained

    def quantized(*args, **kwargs):
        model, found = original(*args, **kwargs)
        integers = torch.zeros_like(model.model.layers[0].mlp.up_proj.weight, dtype=torch.int8)
        model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(integers, requires_grad=False)
        return model, found

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", quantized)
    loaded = load_pretrained(ModelSpec(path=str(tmp_path)), "teacher", torch.float32)
    assert [name for name, p in loaded.named_parameters() if not p.requires_grad] == [
        "model.layers.0.mlp.up_proj.weight"
    ]


def test_the_attention_asked_for_is_the_one_used(teacher, tmp_path):
    from salt_lightning.models import build_fresh

    lm = tiny("llama")
    lm.model.save_pretrained(tmp_path / "hf")
    fresh = build_fresh(ModelSpec(config=FAMILIES["llama"], attention="eager"), None, 0)
    paths = (str(tmp_path / "hf"), teacher)
    loaded = [load_pretrained(ModelSpec(path=path, attention="eager"), "teacher", torch.float32) for path in paths]
    assert [model.config._attn_implementation for model in (fresh, *loaded)] == ["eager"] * 3
    assert lm.model.config._attn_implementation == "sdpa"  # the premise: not the default


def test_a_checkpoint_is_loaded_without_drawing_weights_and_tied_as_it_was(teacher):
    before = torch.random.get_rng_state()
    model = load_pretrained(ModelSpec(path=teacher), "teacher", torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    saved = torch.load(teacher, weights_only=True)["state_dict"]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, saved[f"student.model.{name}"])


def test_paths_of_python_are_paths():
    assert ModelSpec.of(Path("a/b")).path == ModelSpec(path=Path("a/b")).path == "a/b"
    assert SALTDataModule(Path("a.txt"), val_source=[Path("b.txt"), "c.txt"]).val_source == ["b.txt", "c.txt"]
