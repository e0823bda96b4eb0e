"""Packed attention: the formula, the families that it fits, when it is refused, and how often it is compiled.

torch's kernel runs on GPUs alone: here its op (its signature and place in autograd) has the formula in its place.
"""

from functools import partial

import pytest
import torch
from conftest import arguments, scalars
from families import FAMILIES, tiny
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.nn.attention import varlen
from transformers import CONFIG_MAPPING

from salt_lightning import cli
from salt_lightning.batches.rows import document_borders
from salt_lightning.hugging_face import attention
from salt_lightning.models import CausalLM, from_config

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 3, 60, 7, 7, 22, 1, 30, 2], [4, 4, 8, 1, 9, 12, 33, 2, 0, 6]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]])
BORDERS = torch.tensor([0, 3, 10, 17, 20], dtype=torch.int32)


def scores(q_NHE, k_NKE, first, end, scale):
    k_KHE = k_NKE[first:end].repeat_interleave(q_NHE.shape[1] // k_NKE.shape[1], 1).float()
    scores_HQK = torch.einsum("qhe,khe->hqk", q_NHE[first:end].float(), k_KHE) * scale
    later_QK = torch.ones(end - first, end - first, dtype=torch.bool).triu(1)
    return scores_HQK.masked_fill(later_QK, -torch.inf).softmax(-1), k_KHE


def forward(q_NHE, k_NKE, v_NKE, cu_q, cu_k, max_q, max_k, _causal, scale, window_size, *_):
    """softmax(q k^T * scale) v of each document."""
    assert torch.equal(cu_q, cu_k)
    assert (cu_q.dtype, list(window_size), max_q) == (torch.int32, [-1, 0], max_k)
    out_NHE = torch.empty_like(q_NHE)
    groups = q_NHE.shape[1] // k_NKE.shape[1]
    for first, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        assert end - first <= max_q
        p_HQK, _ = scores(q_NHE, k_NKE, first, end, scale or q_NHE.shape[2] ** -0.5)
        v_KHE = v_NKE[first:end].repeat_interleave(groups, 1).float()
        out_NHE[first:end] = torch.einsum("hqk,khe->qhe", p_HQK, v_KHE).to(q_NHE.dtype)
    return out_NHE, torch.zeros(q_NHE.shape[1], len(q_NHE)), torch.zeros(2, dtype=torch.uint64)


def backward(g_NHE, q_NHE, k_NKE, v_NKE, _out, _lse, cu_q, _cu_k, _max_q, _max_k, _causal, _rng, scale, *_):
    """ds = p (dp - sum(p dp)); the kernel is below autograd, so by hand."""
    grads = dq_NHE, dk_NKE, dv_NKE = [torch.zeros_like(x) for x in (q_NHE, k_NKE, v_NKE)]
    groups, scale = q_NHE.shape[1] // k_NKE.shape[1], scale or q_NHE.shape[2] ** -0.5
    for first, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        p_HQK, k_KHE = scores(q_NHE, k_NKE, first, end, scale)
        g_QHE, v_KHE = g_NHE[first:end].float(), v_NKE[first:end].repeat_interleave(groups, 1).float()
        dp_HQK = torch.einsum("qhe,khe->hqk", g_QHE, v_KHE)
        ds_HQK = p_HQK * (dp_HQK - (p_HQK * dp_HQK).sum(-1, keepdim=True)) * scale
        dk_KHE = torch.einsum("hqk,qhe->khe", ds_HQK, q_NHE[first:end].float())
        dv_KHE = torch.einsum("hqk,qhe->khe", p_HQK, g_QHE)
        dq_NHE[first:end] = torch.einsum("hqk,khe->qhe", ds_HQK, k_KHE).to(q_NHE.dtype)
        dk_NKE[first:end], dv_NKE[first:end] = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk_KHE, dv_KHE))
    return tuple(grads)


varlen._varlen_attn.register_kernel("cpu", forward)
varlen._varlen_attn_backward.register_kernel("cpu", backward)


@pytest.fixture
def kernel(monkeypatch):
    """kernel(function): in the place of torch's varlen_attn; and CPUs count as devices that have it."""
    monkeypatch.setattr(attention, "_WITH_KERNEL", ("cpu",))
    attention.fault.cache_clear()
    yield partial(monkeypatch.setattr, attention, "varlen_attn")
    attention.fault.cache_clear()


def test_borders_by_hand():
    assert document_borders(POSITIONS.numpy()).tolist() == BORDERS.tolist()
    assert document_borders(torch.arange(6).repeat(3, 1).numpy()).tolist() == [0, 6, 12, 18]
    cut = torch.tensor([[5, 6, 0, 1], [1, 1, 0, 1]])  # by somebody else: a row sees no other all the same
    assert document_borders(cut.numpy()).tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("takes_groups", [True, False])  # torch 2.13, and 2.11
def test_with_a_mask_and_without(monkeypatch, key_heads, takes_groups):
    """Both ways on any device, with their gradients."""
    monkeypatch.setattr(attention, "_TAKES_GROUPS", takes_groups and attention._TAKES_GROUPS)
    q, k, v = (
        torch.randn(2, heads, 10, 8, generator=torch.Generator().manual_seed(heads), requires_grad=True)
        for heads in (4, key_heads, key_heads)
    )
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // key_heads
    masked, _ = attention.packed_attention(module, q, k, v, None, scaling=0.3, cu_seq_lens_q=BORDERS)
    monkeypatch.setattr(attention, "_WITH_KERNEL", ("cpu",))
    monkeypatch.setattr(attention, "_16_BIT", (torch.float32,))
    flash, _ = attention.packed_attention(module, q, k, v, None, scaling=0.3, cu_seq_lens_q=BORDERS)
    ways = [(out, *torch.autograd.grad(out.square().sum(), (q, k, v))) for out in (masked, flash)]
    for a, b in zip(*ways, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=32 * 2**-23 * b.abs().max().item())  # sums of ten products


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_numbers_as_with_transformers_masks(family):
    """Hidden states and gradients; a family with more than causal attention in any layer stays as it is."""
    plain, packed = tiny(family).eval(), tiny(family).eval()
    plain.check()
    packed.check()
    attention.pack(packed, "packed", None)
    as_it_was = {"gemma3_text": "positions", "gemma2": "positions", "gpt_oss": "mask"}
    assert packed.apart == as_it_was.get(family, "packed")
    outs = plain(IDS, POSITIONS)[0], packed(IDS, POSITIONS, cu_seqlens=BORDERS)[0]
    # two orders of summing ten products in fp32, through two layers
    assert torch.allclose(*outs, rtol=0, atol=64 * 2**-23 * outs[0].abs().max().item())
    assert torch.equal(outs[1], packed(IDS, POSITIONS)[0])  # the borders are found where nobody gives them
    grads = [torch.autograd.grad(out.square().sum(), next(lm.parameters()))[0]
             for out, lm in zip(outs, (plain, packed), strict=True)]  # fmt: skip
    assert torch.allclose(*grads, rtol=0, atol=1e-5 * grads[0].abs().max().item())


def test_generation_goes_on_with_a_cache():
    plain, packed = tiny("llama").eval(), tiny("llama").eval()
    attention.pack(packed, "packed", None)
    told = [lm.model.generate(IDS[:, :5], max_new_tokens=6, do_sample=False) for lm in (plain, packed)]
    assert torch.equal(*told)


def broken(*args, **kwargs):
    raise RuntimeError("no kernel image is available")


def acausal(q_NHE, k_NKE, v_NKE, cu_seqlens, *_, **__):
    keys_values = (x.repeat_interleave(q_NHE.shape[1] // x.shape[1], 1) for x in (k_NKE, v_NKE))
    heads_first = (x.transpose(0, 1) for x in (q_NHE, *keys_values))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(0, 1)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (varlen.varlen_attn, None),
        (acausal, "wrong values (output)"),
        (lambda *a, **k: varlen.varlen_attn(*a, **(k | {"scale": 0.3})), "wrong values (output)"),
        (lambda *a, **k: varlen.varlen_attn(*a, **k).detach(), "RuntimeError: "),
        (broken, "RuntimeError: no kernel image is available"),
    ],
    ids=["right", "acausal", "another scale", "no gradient", "broken"],
)
def test_the_kernel_is_proved_before_it_is_used(kernel, function, reason):
    kernel(function)
    with torch.inference_mode(), torch.device("meta"):  # as where a predict loads its teacher, or a fit its student
        told = attention.fault(CPU, 4, 2, 8)
    assert told is None if reason is None else reason in told


@pytest.mark.parametrize(
    ("plugin", "apart"),
    [(MixedPrecision("bf16-mixed", "cpu"), "packed"), (HalfPrecision("bf16-true"), "packed"),
     (Precision(), "positions")],
)  # fmt: skip
def test_it_is_chosen_on_a_device_with_a_kernel_in_16_bits(kernel, caplog, plugin, apart):
    lm = tiny("llama")
    attention.pack(lm, None, SingleDeviceStrategy("cpu", precision_plugin=plugin))
    assert lm.apart == apart
    assert ("student: attention within each document alone, without a mask" in caplog.text) == (apart == "packed")
    kernel(broken)
    attention.fault.cache_clear()
    lm = tiny("llama")
    attention.pack(lm, None, SingleDeviceStrategy("cpu", precision_plugin=plugin))
    assert lm.apart == "positions"
    assert ("with a mask, which is slower: RuntimeError: no kernel" in caplog.text) == (apart == "packed")


def test_a_run_with_the_kernel_has_the_losses_of_one_with_masks(kernel, settings, teacher, tmp_path, caplog):
    """Through the command line, with a teacher, both phases and validation; in bf16, so to a few roundings of 2^-9."""
    calls = []
    kernel(lambda *a, **k: calls.append(1) or varlen.varlen_attn(*a, **k))
    base = {"model.teacher.path": teacher, "kd.steps": 6, "trainer.precision": "bf16-mixed",
            "trainer.log_every_n_steps": 1}  # fmt: skip
    found = []
    for name, asked in (
        ("masked", {"model.student.attention": "sdpa", "model.teacher.attention": "sdpa"}),
        ("flash", {}),
    ):
        assert cli.main(["fit", *arguments(settings, base, asked, {"run": str(tmp_path / name)})]) == 0
        found.append(scalars(tmp_path / name))
        assert bool(calls) == (name == "flash")
        for model in ("teacher", "student"):
            assert (f"{model}: attention within each document alone" in caplog.text) == (name == "flash")
    for tag in ("train/ce", "train/kd", "train/grad_norm", "val/ce"):
        for step, value in found[0][tag].items():
            assert found[1][tag][step] == pytest.approx(value, rel=2**-6)
    assert found[0]["train/kd"] != found[1]["train/kd"]


def test_one_graph_for_any_number_of_documents():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    lm = tiny("llama")
    attention.pack(lm, "packed", None)
    torch._dynamo.reset()
    lm.backbone.compile(dynamic=False, backend=count)
    for length in (10, 5, 3, 2, 1):
        positions_BT = torch.arange(10).remainder(length).repeat(2, 1)
        lm(IDS, positions_BT)[0].sum().backward()
    assert len(graphs) == 1


def test_dropout_of_the_attention_has_no_kernel(caplog):
    lm = tiny("gpt2")
    attention.pack(lm.train(), "packed", None)
    assert lm.apart == "positions"
    assert "gpt2's config drops 10% of the attention" in caplog.text
    attention.pack(lm.eval(), "packed", None)  # a teacher drops nothing
    assert lm.apart == "packed"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("_NOT_COMPUTED", ("position_ids",), "packed attention knows no position_ids"),
     ("_same_document", lambda document_BT: torch.ones(2, 1, 8, 8).bool().tril(), "LlamaForCausalLM computes someth")],
)  # fmt: skip
def test_what_the_kernel_does_not_compute_keeps_the_mask(caplog, monkeypatch, name, value, reason):
    """A model that hands its attention something more, as those with a soft cap do; or computes something else."""
    lm = tiny("llama").eval()
    before = lm.hidden()
    monkeypatch.setattr(attention, name, value)
    attention.pack(lm, "packed", None)
    assert reason in caplog.text
    assert lm.apart == "positions"
    assert torch.equal(lm.hidden(), before)


def test_values_narrower_than_queries_keep_the_mask():
    q, v = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 6)
    with pytest.raises(ValueError, match="not as wide"):
        attention.packed_attention(torch.nn.Module(), q, q, v, None, cu_seq_lens_q=torch.tensor([0, 4]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("key_heads", [8, 2])
def test_the_kernel_of_this_gpu(key_heads):
    assert attention.fault(torch.device("cuda", torch.cuda.current_device()), 8, key_heads, 64) is None


def test_settings_of_a_text_part_are_found():
    """As the hub has gemma3: sizes and windows are in the config of its text model."""
    sizes = FAMILIES["gemma3_text"] | {"model_type": "gemma3_text", "max_position_embeddings": 16}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    tokens = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62, "mm_tokens_per_image": 4}
    config = CONFIG_MAPPING["gemma3"](text_config=sizes, vision_config=vision, **tokens)
    lm = CausalLM(from_config(config), "teacher").eval()
    assert not hasattr(config, "num_attention_heads")
    attention.pack(lm, "packed", None)
    assert lm.apart == "positions"
