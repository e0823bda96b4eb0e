"""Packed attention: the formula, the families that it fits, when it is refused, and how often it is compiled."""

from functools import partial

import pytest
import torch
from families import FAMILIES, tiny
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy

from salt_lightning import attention
from salt_lightning.rows import document_borders

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 3, 60, 7, 7, 22, 1, 30, 2], [4, 4, 8, 1, 9, 12, 33, 2, 0, 6]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]])
BORDERS = torch.tensor([0, 3, 10, 17, 20, 20, 20, 20], dtype=torch.int32)


def by_formula(q_NHE, k_NKE, v_NKE, cu_seqlens, *_, scale, window_size, enable_gqa=False, causal=True):
    """What torch's kernel computes, document by document."""
    assert window_size == (-1, 0)
    k_NHE, v_NHE = (x.repeat_interleave(q_NHE.shape[1] // x.shape[1], 1).float() for x in (k_NKE, v_NKE))
    scale = q_NHE.shape[2] ** -0.5 if scale is None else scale
    outs = []
    for first, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        scores_HQK = torch.einsum("qhe,khe->hqk", q_NHE[first:end].float(), k_NHE[first:end]) * scale
        if causal:
            later_QK = torch.ones(end - first, end - first, dtype=torch.bool).triu(1)
            scores_HQK = scores_HQK.masked_fill(later_QK, -torch.inf)
        outs.append(torch.einsum("hqk,khe->qhe", scores_HQK.softmax(-1), v_NHE[first:end]))
    return torch.cat(outs).to(q_NHE.dtype)


@pytest.fixture
def kernel(monkeypatch):
    """Puts a function in the place of torch's kernel, which runs on GPUs alone."""

    def put(function):
        attention.fault.cache_clear()
        monkeypatch.setattr(attention, "varlen_attn", function)

    yield put
    attention.fault.cache_clear()


def test_borders_by_hand():
    assert document_borders(POSITIONS.numpy()).tolist() == BORDERS.tolist()
    assert document_borders(torch.arange(6).repeat(3, 1).numpy()).tolist() == [0, 6, 12, 18]


@pytest.mark.parametrize("key_heads", [4, 2])
def test_with_a_mask_and_without(kernel, key_heads):
    """Both ways on any device, against the formula."""
    kernel(by_formula)
    q, k, v = (
        torch.randn(2, heads, 10, 8, generator=torch.Generator().manual_seed(heads))
        for heads in (4, key_heads, key_heads)
    )
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // key_heads
    true_BTHE = by_formula(
        *(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)), BORDERS, scale=0.3, window_size=(-1, 0)
    ).unflatten(0, (2, 10))
    masked, _ = attention.packed_attention(module, q, k, v, None, scaling=0.3, cu_seq_lens_q=BORDERS)
    flash = attention._flash(q, k, v, BORDERS, torch.float32, 0.3)
    for out in (masked, flash):
        assert torch.allclose(out, true_BTHE, rtol=0, atol=16 * 2**-23 * v.abs().max().item())  # ten products


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_numbers_as_with_transformers_masks(family):
    """Hidden states and gradients; a family with more than causal attention in any layer stays as it is."""
    plain, packed = tiny(family).eval(), tiny(family).eval()
    plain.check()
    packed.check()
    attention.pack(packed, "packed", None)
    assert packed.apart == ("positions" if family in ("gemma3_text", "gemma2") else "packed")
    outs = plain(IDS, POSITIONS)[0], packed(IDS, POSITIONS, cu_seqlens=BORDERS)[0]
    # two orders of summing ten products in fp32, through two layers
    assert torch.allclose(*outs, rtol=0, atol=64 * 2**-23 * outs[0].abs().max().item())
    assert torch.equal(outs[1], packed(IDS, POSITIONS)[0])  # the borders are found where nobody gives them
    grads = [torch.autograd.grad(out.square().sum(), next(lm.parameters()))[0]
             for out, lm in zip(outs, (plain, packed), strict=True)]  # fmt: skip
    assert torch.allclose(*grads, rtol=0, atol=1e-5 * grads[0].abs().max().item())


def test_generation_goes_on_with_a_cache():
    plain, packed = tiny("llama").eval(), tiny("llama").eval()
    packed.check()
    attention.pack(packed, "packed", None)
    told = [lm.model.generate(IDS[:, :5], max_new_tokens=6, do_sample=False) for lm in (plain, packed)]
    assert torch.equal(*told)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (by_formula, None),
        (
            partial(by_formula, causal=False),
            "wrong values (output)",
        ),
        (lambda *a, **k: by_formula(*a, **(k | {"scale": 0.3})), "wrong values (output)"),
        (
            lambda *a, **k: by_formula(*a, **k).detach(),
            "RuntimeError: ",
        ),
    ],
    ids=["right", "acausal", "another scale", "no gradient"],
)
def test_the_kernel_is_proved_before_it_is_used(kernel, function, reason):
    kernel(function)
    with torch.inference_mode():  # as where a predict loads its teacher
        told = attention.fault(CPU, 4, 2, 8)
    assert told is None if reason is None else reason in told


@pytest.mark.parametrize(
    ("precision", "found", "apart"),
    [("bf16-mixed", None, "packed"), ("bf16-true", "no", "positions"), ("32-true", None, "positions")],
)
def test_a_gpu_has_it_in_16_bits_where_its_kernel_is_proved(monkeypatch, caplog, precision, found, apart):
    plugin = MixedPrecision(precision, "cuda") if "mixed" in precision else Precision()
    plugin.precision = precision
    monkeypatch.setattr(attention, "fault", lambda *_: found)
    lm = tiny("llama")
    attention.pack(lm, None, SingleDeviceStrategy("cuda:0", precision_plugin=plugin))
    assert lm.apart == apart
    assert ("student: attention with a mask, which is slower: no" in caplog.text) == bool(found)


def test_one_graph_for_any_number_of_documents(kernel):
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


def test_what_the_kernel_does_not_compute_keeps_the_mask(caplog, monkeypatch):
    """A model that hands its attention something more, as those with a soft cap do."""
    monkeypatch.setattr(attention, "_NOT_COMPUTED", ("position_ids",))
    lm = tiny("llama").eval()
    before = lm.hidden()
    attention.pack(lm, "packed", None)
    assert "packed attention knows no position_ids" in caplog.text
    assert lm.apart == "positions"
    assert torch.equal(lm.hidden(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("key_heads", [8, 2])
def test_the_kernel_of_this_gpu(key_heads):
    assert attention.fault(torch.device("cuda", torch.cuda.current_device()), 8, key_heads, 64) is None
