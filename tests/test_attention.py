"""Packed attention: the formula, the families that can use it, when it is refused, and how often it is compiled.

torch's kernel runs only on GPUs: here the formula replaces it in its op (with its signature and place in autograd).
"""

import copy
from functools import partial

import pytest
import torch
from conftest import arguments, scalars
from families import FAMILIES, LLAMA_LIKE, tiny
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.nn.attention import varlen
from transformers import CONFIG_MAPPING, AttentionMaskInterface
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from salt_lightning import cli
from salt_lightning.batches.rows import document_borders
from salt_lightning.errors import ConfigError
from salt_lightning.hugging_face import attention
from salt_lightning.models import CausalLM, from_config

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 3, 60, 7, 7, 22, 1, 30, 2], [4, 4, 8, 1, 9, 12, 33, 2, 0, 6]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]])
BORDERS = torch.tensor([0, 3, 10, 17, 20], dtype=torch.int32)
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}
WINDOWED = [  # in documents of up to seven tokens
    ("mistral", {}),
    ("gemma3_text", TWO_KINDS),
    ("olmo3", {}),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4}),
    ("gemma2", {"attn_logit_softcapping": None, "sliding_window": 2}),
]
windowed, with_llama = (
    pytest.mark.parametrize(("family", "sizes"), pairs, ids=[family for family, _ in pairs])
    for pairs in (WINDOWED, [("llama", {}), *WINDOWED[:4]])
)


def reached(length, window_size):
    """[Q, K]: the keys of a document that a query attends to, as torch's varlen_attn defines it; -1: all."""
    left, right = (length if size == -1 else size for size in window_size)
    back_QK = torch.arange(length)[:, None] - torch.arange(length)
    return (back_QK <= left) & (back_QK >= -right)


def scores(q_NHE, k_NKE, first, end, scale, window_size):
    k_KHE = k_NKE[first:end].repeat_interleave(q_NHE.shape[1] // k_NKE.shape[1], 1).float()
    scores_HQK = torch.einsum("qhe,khe->hqk", q_NHE[first:end].float(), k_KHE) * scale
    return scores_HQK.masked_fill(~reached(end - first, window_size), -torch.inf).softmax(-1), k_KHE


def forward(q_NHE, k_NKE, v_NKE, cu_q, cu_k, max_q, max_k, _causal, scale, window_size, *_):
    """softmax(q k^T * scale) v of each document."""
    assert torch.equal(cu_q, cu_k)
    assert (cu_q.dtype, window_size[1], max_q) == (torch.int32, 0, max_k)
    out_NHE = torch.empty_like(q_NHE)
    groups = q_NHE.shape[1] // k_NKE.shape[1]
    for first, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        assert end - first <= max_q
        p_HQK, _ = scores(q_NHE, k_NKE, first, end, scale or q_NHE.shape[2] ** -0.5, window_size)
        v_KHE = v_NKE[first:end].repeat_interleave(groups, 1).float()
        out_NHE[first:end] = torch.einsum("hqk,khe->qhe", p_HQK, v_KHE).to(q_NHE.dtype)
    return out_NHE, torch.zeros(q_NHE.shape[1], len(q_NHE)), torch.zeros(2, dtype=torch.uint64)


def backward(g_NHE, q_NHE, k_NKE, v_NKE, _out, _lse, cu_q, _cu_k, _max_q, _max_k, _causal, _rng, scale, window_size):
    """ds = p (dp - sum(p dp)), by hand because the kernel is below autograd."""
    grads = dq_NHE, dk_NKE, dv_NKE = [torch.zeros_like(x) for x in (q_NHE, k_NKE, v_NKE)]
    groups, scale = q_NHE.shape[1] // k_NKE.shape[1], scale or q_NHE.shape[2] ** -0.5
    for first, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        p_HQK, k_KHE = scores(q_NHE, k_NKE, first, end, scale, window_size)
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
    """kernel(function) replaces torch's varlen_attn, and lets CPUs count as devices that have it."""
    monkeypatch.setattr(attention, "_WITH_KERNEL", ("cpu",))
    attention.fault.cache_clear()
    yield partial(monkeypatch.setattr, attention, "varlen_attn")
    attention.fault.cache_clear()


def test_borders_by_hand():
    assert document_borders(POSITIONS.numpy()).tolist() == BORDERS.tolist()
    assert document_borders(torch.arange(6).repeat(3, 1).numpy()).tolist() == [0, 6, 12, 18]
    cut = torch.tensor([[5, 6, 0, 1], [1, 1, 0, 1]])  # by somebody else: a row sees no other all the same
    assert document_borders(cut.numpy()).tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("window", [1, 2, 3, 6, 7, 9, 10, 50])  # documents of 3 and 7 tokens, rows of 10
def test_a_window_reaches_as_far_as_in_transformers_masks(monkeypatch, window):
    config = copy.deepcopy(tiny("mistral").model.config)
    config.sliding_window, config._attn_implementation = window, "sdpa"
    embeds_BTD, q = torch.zeros(2, 10, 32), torch.zeros(2, 4, 10, 8, dtype=torch.bfloat16)
    for make, handed in ((create_sliding_window_causal_mask, window), (create_causal_mask, None)):
        true_B1TT = make(config, embeds_BTD, None, None, POSITIONS)
        assert torch.equal(attention._mask(BORDERS, 2, 10, handed), true_B1TT)
        sizes = []
        monkeypatch.setattr(attention, "_WITH_KERNEL", ("cpu",))
        monkeypatch.setattr(attention, "varlen_attn", lambda q, *_, window_size, **__: sizes.append(window_size) or q)  # noqa: B023
        attention.packed_attention(torch.nn.Module(), q, q, q, None, cu_seq_lens_q=BORDERS, sliding_window=handed)
        ours_NN = torch.block_diag(*(reached(n, sizes[0]) for n in BORDERS.diff().tolist()))
        assert torch.equal(torch.block_diag(*true_B1TT[:, 0]), ours_NN)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("takes_groups", [True, False])  # torch 2.13, and 2.11
def test_with_a_mask_and_without(monkeypatch, key_heads, takes_groups, window):
    """Both give the same on any device, with gradients."""
    monkeypatch.setattr(attention, "_TAKES_GROUPS", takes_groups and attention._TAKES_GROUPS)
    # one generator: keys that equal the queries would give gradients by cancellation, whose error no maximum bounds
    random = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 10, 8, generator=random, requires_grad=True) for heads in (4, key_heads, key_heads)
    )
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // key_heads
    attend = partial(attention.packed_attention, module, q, k, v, None, cu_seq_lens_q=BORDERS, sliding_window=window)
    masked, _ = attend(scaling=0.3)
    monkeypatch.setattr(attention, "_WITH_KERNEL", ("cpu",))
    monkeypatch.setattr(attention, "_16_BIT", (torch.float32,))
    flash, _ = attend(scaling=0.3)
    ways = [(out, *torch.autograd.grad(out.square().sum(), (q, k, v))) for out in (masked, flash)]
    for a, b in zip(*ways, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=32 * 2**-23 * b.abs().max().item())  # sums of ten products


def same_numbers(plain, packed):
    outs = plain(IDS, POSITIONS)[0], packed(IDS, POSITIONS, cu_seqlens=BORDERS)[0]
    # two orders of summing ten products in fp32, through two layers
    assert torch.allclose(*outs, rtol=0, atol=64 * 2**-23 * outs[0].abs().max().item())
    assert torch.equal(outs[1], packed(IDS, POSITIONS)[0])  # borders are found if they are not given
    grads = [torch.autograd.grad(out.square().sum(), list(lm.backbone.parameters()), materialize_grads=True)
             for out, lm in zip(outs, (plain, packed), strict=True)]  # fmt: skip
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5 * a.abs().max().item())


def test_what_is_foreseen_takes_no_graph():
    seen, lm = [], tiny("llama")
    lm.register_forward_hook(lambda *args: seen.append(args[-1][0].requires_grad))
    attention.foresee(lm, None, True)
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_numbers_as_with_transformers_masks(family):
    """Hidden states and gradients; a family with capped scores or attention sinks keeps its masks."""
    plain, packed = tiny(family).eval(), tiny(family).eval()
    plain.check()
    packed.check()
    attention.pack(packed, "packed", None)
    assert packed.apart == {"gemma2": "positions", "gpt_oss": "mask"}.get(family, "packed")
    same_numbers(plain, packed)


@windowed
@pytest.mark.parametrize("with_kernel", [False, True])
def test_windows_without_masks(monkeypatch, caplog, family, sizes, with_kernel):
    """By the plain way and the kernel's; of transformers' masks none is made, and shorter windows are others."""
    plain, packed = tiny(family, **sizes).eval(), tiny(family, **sizes).eval()
    settings = copy.deepcopy(packed.model.config)
    if with_kernel:
        monkeypatch.setattr(attention, "_WITH_KERNEL", ("cpu",))
        monkeypatch.setattr(attention, "_16_BIT", (torch.float32,))
    attention.pack(packed, "packed", None)
    assert "within each document, without a mask" in caplog.text
    settings._attn_implementation = "packed"
    assert packed.model.config.to_dict() == settings.to_dict()  # the windows are as they were
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "packed", broken)
    same_numbers(plain, packed)
    full = tiny(family, **sizes | {"sliding_window": 10}).eval()(IDS, POSITIONS)[0]
    assert (packed(IDS, POSITIONS)[0] - full).abs().max() > 1e-2 * full.abs().max()


@pytest.mark.parametrize(
    ("family", "sizes", "handed", "reason"),
    [("gemma3_text", TWO_KINDS, None, "other masks than its documents and windows give"),
     ("gemma3_text", TWO_KINDS, 99, "windows of several lengths"),
     ("llama", {"head_dim": 264}, None, "heads are 264 wide, and the kernel takes at most 256")],
)  # fmt: skip
def test_what_the_kernel_would_not_know_keeps_the_mask(caplog, family, sizes, handed, reason):
    """A layer whose window is in its mask alone: eight tokens tell, whatever its length; two lengths; wide heads."""
    lm = tiny(family, **sizes | ({"sliding_window": 100} if sizes is TWO_KINDS else {})).eval()
    lm.backbone.layers[0].self_attn.sliding_window = handed
    before = lm(IDS, POSITIONS)[0]
    attention.pack(lm, "packed", None)
    assert reason in caplog.text
    assert lm.apart == "positions"
    assert torch.equal(lm(IDS, POSITIONS)[0], before)


def test_masks_of_a_family_s_own_making_stay(caplog):
    """doge's layers add to the mask what they learn, which is zero in a fresh model."""
    lm = CausalLM(from_config(CONFIG_MAPPING["doge"](**LLAMA_LIKE)), "student").eval()
    lm.check()
    attention.pack(lm, "packed", None)
    assert lm.apart == "positions"
    assert "DogeForCausalLM has other masks than its documents and windows give" in caplog.text


def test_windows_beside_our_mask(monkeypatch):
    """A family that accepts only our mask, and passes it on by name."""
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "num_dense_layers": 2}
    monkeypatch.setitem(FAMILIES, "afmoe", {**LLAMA_LIKE, **sizes})
    plain, packed = tiny("afmoe").eval(), tiny("afmoe").eval()
    plain.check()
    packed.check()
    assert packed.apart == "mask"
    attention.pack(packed, "packed", None)
    assert packed.apart == "packed"
    same_numbers(plain, packed)


def test_layers_of_chunks_keep_their_masks():
    config = CONFIG_MAPPING["llama4_text"](attention_chunk_size=4)
    assert attention._hindrance(config, False) == "llama4_text has layers that look back over a limited distance"


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


def another_window(by):
    def attend(*args, window_size, **kwargs):
        longer = (window_size[0] + by, 0) if window_size[0] > 0 and by else (-1, 0)
        return varlen.varlen_attn(*args, window_size=longer, **kwargs)

    return attend


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
    with torch.inference_mode(), torch.device("meta"):  # as when predict loads its teacher, or fit its student
        told = attention.fault(CPU, 4, 2, 8)
    assert told is None if reason is None else reason in told


@pytest.mark.parametrize("window", [3, 70])
@pytest.mark.parametrize("by", [-1, 1, None])  # the last: none at all, as a kernel that knows no windows has it
def test_a_window_is_proved_before_it_is_used(kernel, caplog, by, window):
    kernel(varlen.varlen_attn)
    assert attention.fault(CPU, 4, 2, 8, window) is None
    kernel(another_window(by))
    attention.fault.cache_clear()
    assert attention.fault(CPU, 4, 2, 8, None) is None
    assert attention.fault(CPU, 4, 2, 8, window) == "wrong values (output)"
    lm = tiny("olmo3", sliding_window=window)
    attention.pack(lm, None, SingleDeviceStrategy("cpu", precision_plugin=MixedPrecision("bf16-mixed", "cpu")))
    assert lm.apart == "positions"
    assert "with a mask, which is slower: wrong values (output)" in caplog.text


def test_what_is_proved_is_what_layers_have(kernel, monkeypatch):
    """Each is checked once: full layers and windows; a long window as one that cuts the check's documents."""
    asked = []
    monkeypatch.setattr(attention, "fault", lambda device, *layer: asked.append(layer))
    monkeypatch.setattr(attention.fault, "cache_clear", lambda: None, raising=False)
    for lm in (tiny("olmo3"), tiny("olmo3", sliding_window=4096), tiny("mistral", sliding_window=4096), tiny("llama")):
        attention.pack(lm, None, SingleDeviceStrategy("cpu", precision_plugin=MixedPrecision("bf16-mixed", "cpu")))
        assert lm.apart == "packed"
    assert asked == [(4, 4, 8, 3), (4, 4, 8, None), (4, 4, 8, 70), (4, 4, 8, None), (4, 2, 8, 70), (4, 4, 8, None)]


@pytest.mark.parametrize(
    ("plugin", "apart"),
    [(MixedPrecision("bf16-mixed", "cpu"), "packed"), (HalfPrecision("bf16-true"), "packed"),
     (Precision(), "positions")],
)  # fmt: skip
def test_it_is_chosen_on_a_device_with_a_kernel_in_16_bits(kernel, caplog, plugin, apart):
    lm = tiny("llama")
    attention.pack(lm, None, SingleDeviceStrategy("cpu", precision_plugin=plugin))
    assert lm.apart == apart
    assert ("student: attention within each document, without a mask" in caplog.text) == (apart == "packed")
    kernel(broken)
    attention.fault.cache_clear()
    lm = tiny("llama")
    attention.pack(lm, None, SingleDeviceStrategy("cpu", precision_plugin=plugin))
    assert lm.apart == "positions"
    assert ("with a mask, which is slower: RuntimeError: no kernel" in caplog.text) == (apart == "packed")


@with_llama
def test_a_run_with_the_kernel_has_the_losses_of_one_with_masks(
    kernel, settings, teacher, tmp_path, caplog, family, sizes
):
    """Through the command line, with a teacher, both phases and validation; in bf16, so to a few roundings of 2^-9."""
    calls = set()
    kernel(lambda *a, **k: calls.add(k["window_size"]) or varlen.varlen_attn(*a, **k))
    if family != "llama":
        teacher = str(tmp_path / "teacher")
        tiny(family, seed=1, **sizes, vocab_size=300, max_position_embeddings=32).model.save_pretrained(teacher)
    base = {"model.teacher.path": teacher, "kd.steps": 6, "trainer.precision": "bf16-mixed",
            "trainer.log_every_n_steps": 1, "kd.allow_untrained": True}  # fmt: skip
    student = {name: value for name, value in {**FAMILIES[family], **sizes}.items() if name != "vocab_size"}
    length, kinds = student.get("sliding_window"), {"llama": "full", "mistral": "sliding"}.get(family, "full sliding")
    asked_for = {{"full": (-1, 0), "sliding": (length and length - 1, 0)}[kind] for kind in kinds.split()}
    base |= {"model.student.family": family, "model.student.config": student}
    found = []
    for name, asked in (
        ("masked", {"model.student.attention": "sdpa", "model.teacher.attention": "sdpa"}),
        ("flash", {}),
    ):
        assert cli.main(["fit", *arguments(settings, base, asked, {"run": str(tmp_path / name)})]) == 0
        found.append(scalars(tmp_path / name))
        assert calls == (set() if name == "masked" else asked_for)
        for model in ("teacher", "student"):
            assert (f"{model}: attention within each document, without" in caplog.text) == (name == "flash")
    for tag in ("train/ce", "train/kd", "train/grad_norm", "val/ce"):
        for step, value in found[0][tag].items():
            assert found[1][tag][step] == pytest.approx(value, rel=2**-6)
    assert found[0]["train/kd"] != found[1]["train/kd"]


@with_llama
def test_one_graph_for_any_number_of_documents(family, sizes):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    lm = tiny(family, **sizes)
    attention.pack(lm, "packed", None)
    torch._dynamo.reset()
    lm.backbone.compile(dynamic=False, backend=count)
    for length in (10, 5, 3, 2, 1):
        positions_BT = torch.arange(10).remainder(length).repeat(2, 1)
        lm(IDS, positions_BT)[0].sum().backward()
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("family", "sizes", "named"), [("gpt_oss", {}, "s_aux"), ("gemma2", {"attn_logit_softcapping": 30.0}, "softcap")]
)
def test_no_model_runs_without_what_it_asks_of_its_attention(family, sizes, named):
    """A typed "packed" was replaced by sdpa, which left the sinks out: the loss was another, and nothing said so."""
    model = tiny(family, **sizes).model
    model.set_attn_implementation("packed")
    said = f"cannot be run .*: packed attention does not support {named}; leave --model.student.attention and"
    with pytest.raises(ConfigError, match=said):
        CausalLM(model, "student").check()


def test_dropout_of_the_attention_has_no_kernel(caplog):
    lm = tiny("gpt2")
    attention.pack(lm.train(), "packed", None)
    assert lm.apart == "positions"
    assert "gpt2's config sets 10% attention dropout" in caplog.text
    attention.pack(lm.eval(), "packed", None)  # a teacher drops nothing
    assert lm.apart == "packed"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("_NOT_COMPUTED", ("position_ids",), "packed attention does not support position_ids"),
     ("_same_document", lambda *_: torch.ones(2, 1, 8, 8).bool().tril(), "LlamaForCausalLM has other masks"),
     ("sdpa_attention_forward", lambda _, q, *a, **k: (q.transpose(1, 2), None), "LlamaForCausalLM computes somethi")],
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
    with pytest.raises(ValueError, match="differ in width"):
        attention.packed_attention(torch.nn.Module(), q, q, v, None, cu_seq_lens_q=torch.tensor([0, 4]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 3, 70])
@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("key_heads", [8, 2])
def test_the_kernel_of_this_gpu(key_heads, width, window):
    assert attention.fault(torch.device("cuda", torch.cuda.current_device()), 8, key_heads, width, window) is None


def test_settings_of_a_text_part_are_found():
    """Like gemma3 on the hub: sizes and windows are in the config of its text model."""
    sizes = FAMILIES["gemma3_text"] | {"model_type": "gemma3_text", "max_position_embeddings": 16}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    tokens = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62, "mm_tokens_per_image": 4}
    config = CONFIG_MAPPING["gemma3"](text_config=sizes, vision_config=vision, **tokens)
    lm = CausalLM(from_config(config), "teacher").eval()
    assert not hasattr(config, "num_attention_heads")
    masked = lm(IDS, POSITIONS)[0]
    attention.pack(lm, "packed", None)
    assert lm.apart == "packed"
    assert torch.allclose(lm(IDS, POSITIONS)[0], masked, rtol=0, atol=64 * 2**-23 * masked.abs().max().item())


def test_flex_attention_is_trained_on_a_gpu():
    attention.require_gpu("flex_attention", "cuda")
    with pytest.raises(ConfigError, match="flex_attention cannot be trained on a CPU; use sdpa, or a GPU"):
        attention.require_gpu("flex_attention", "cpu")
