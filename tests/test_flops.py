"""The compute meter compared with torch's counter, and with arithmetic by hand."""

import math

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from salt_lightning.flops import (
    attention_span,
    forward_flops_per_token,
    peak_flops,
    peak_of,
    student_flops,
)

VOCAB, BLOCK = 100, 24
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
MLP = {"intermediate_size": 48}
GROUPED = {"num_key_value_heads": 2}
HEAD_DIM = {"head_dim": 12}  # heads * head_dim is not hidden_size
# a token is sent to 2 of 5 experts
MLA = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
    "moe_intermediate_size": 20, "first_k_dense_replace": 1, "kv_lora_rank": 10, "q_lora_rank": 14,
    "num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 5, "num_local_experts": 5, "moe_intermediate_size": 20}
ERNIE = {"moe_num_experts": 5, "moe_k": 2, "moe_intermediate_size": 20, "moe_layer_start_index": 1}
GEMMA4 = {  # layers with full attention have heads of another width
    "enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 20,
    "global_head_dim": 16, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0, "sliding_window": BLOCK,
}  # fmt: skip

# name -> (config, width of the attention = heads * head_dim)
FAMILIES = {
    "llama": (lambda: transformers.LlamaConfig(**SIZES, **MLP, **GROUPED), 32),
    "llama_tied": (lambda: transformers.LlamaConfig(**SIZES, **MLP, tie_word_embeddings=True), 32),
    "gpt2": (lambda: transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4), 32),
    "gpt_neox": (lambda: transformers.GPTNeoXConfig(**SIZES, **MLP), 32),
    "qwen3": (lambda: transformers.Qwen3Config(**SIZES, **MLP, **GROUPED, **HEAD_DIM), 48),
    "gemma2": (lambda: transformers.Gemma2Config(**SIZES, **MLP, **GROUPED, **HEAD_DIM), 48),
    "gemma3": (lambda: transformers.Gemma3TextConfig(**SIZES, **MLP, **GROUPED, **HEAD_DIM), 48),
    "phi": (lambda: transformers.PhiConfig(**SIZES, **MLP), 32),
    "cohere": (lambda: transformers.CohereConfig(**SIZES, **MLP, **GROUPED), 32),
    "opt": (lambda: transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16), 32),
    "qwen3_moe": (lambda: transformers.Qwen3MoeConfig(**SIZES, **MLP, **GROUPED, **HEAD_DIM, **EXPERTS), 48),
    "gpt_oss": (lambda: transformers.GptOssConfig(**SIZES, **MLP, **GROUPED, **HEAD_DIM, **EXPERTS), 48),
    "deepseek_v3": (lambda: transformers.DeepseekV3Config(**SIZES, **MLP, **MLA), 4 * (8 + 4 + 6) / 2),
    "mixtral": (lambda: transformers.MixtralConfig(**SIZES, **MLP, **GROUPED, **EXPERTS), 32),
    "ernie4_5_moe": (lambda: transformers.Ernie4_5_MoeConfig(**SIZES, **MLP, **GROUPED, **ERNIE), 32),
    "gemma4": (
        lambda: transformers.Gemma4TextConfig(**SIZES, **MLP, **GROUPED, **HEAD_DIM, **GEMMA4),
        (48 + 48 + 64) / 3,
    ),
}


def build(config, device="meta"):
    # eager attention: the counter must see its two products on every device
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    # torch does not count grouped products
    if hasattr(config, "num_experts_per_tok") or hasattr(config, "top_k_experts"):
        model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_torchs_count_less_the_acausal_half(family):
    make_config, width = FAMILIES[family]
    config = make_config()
    if hasattr(config, "sliding_window"):
        config.sliding_window = None if "qwen3" in family else BLOCK  # as wide as the row, so that nothing is cut off
    model = build(config, "cpu")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, BLOCK, dtype=torch.long), use_cache=False)
    # torch counts all T x T scores: 2 products * 2 FLOPs * width * T per token and layer; we count half
    acausal_half = 3 * 2 * 2 * width * BLOCK / 2
    # torch also counts the angles of rotary positions, a product with inner dimension 1; we do not: it has no weights
    rotary = sum(
        flops
        for name, ops in counter.get_flop_counts().items()
        if "rotary_emb" in name.split(".")[-1]
        for flops in ops.values()
    )
    expected = (counter.get_total_flops() - rotary) / BLOCK - acausal_half
    assert forward_flops_per_token(model, BLOCK) == expected
    assert forward_flops_per_token(build(config), BLOCK) == expected  # the same on the meta device


def test_a_span_is_the_mean_of_the_pairs_with_and_without_the_diagonal():
    for block, window in [(24, None), (24, 24), (24, 100), (24, 5), (7, 1), (1, 1)]:
        w = block if window is None else window
        pairs = sum(min(i + 1, w) + min(i, w) for i in range(block)) / 2
        assert attention_span(block, window) == pytest.approx(pairs / block, rel=1e-12)
    assert attention_span(24) == 12  # T / 2


def test_windows_count_by_layer():
    config = transformers.Gemma3TextConfig(**SIZES, **MLP, **GROUPED, **HEAD_DIM, sliding_window=6)
    config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    full = transformers.Gemma3TextConfig(**SIZES, **MLP, **GROUPED, **HEAD_DIM, sliding_window=BLOCK)
    saved = forward_flops_per_token(build(full), BLOCK) - forward_flops_per_token(build(config), BLOCK)
    span = 6 - 6 * 6 / (2 * 24)  # 5.25 keys instead of 12
    assert saved == pytest.approx(2 * 4 * 48 * (12 - span))  # two layers, 2 products * 2 FLOPs * width


def test_a_window_without_layer_types_holds_for_every_layer():
    wide, narrow = (transformers.MistralConfig(**SIZES, **MLP, sliding_window=w) for w in (None, 6))
    saved = forward_flops_per_token(build(wide), BLOCK) - forward_flops_per_token(build(narrow), BLOCK)
    assert saved == pytest.approx(3 * 4 * 32 * (12 - 5.25))


def test_gpt2_small_by_hand():
    d, layers, vocab, block = 768, 12, 50257, 1024
    weights = layers * (d * 3 * d + d * d + 2 * d * 4 * d) + d * vocab
    attention = layers * 2 * 2 * d * block / 2
    assert forward_flops_per_token(build(transformers.GPT2Config()), block) == 2 * weights + attention


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_the_head_that_pad_it_do_not_count(tied):
    model = build(transformers.LlamaConfig(**SIZES, **MLP, tie_word_embeddings=tied))
    padding = 2 * 5 * model.config.hidden_size
    whole = forward_flops_per_token(model, BLOCK)
    assert forward_flops_per_token(model, BLOCK, VOCAB - 5) == whole - padding
    assert forward_flops_per_token(model, BLOCK, VOCAB) == forward_flops_per_token(model, BLOCK, VOCAB + 5) == whole


def test_a_module_reached_by_two_names_counts_once():
    model = build(transformers.LlamaConfig(**SIZES, **MLP))
    before = forward_flops_per_token(model, BLOCK)
    model.alias = model.lm_head
    assert forward_flops_per_token(model, BLOCK) == before


def test_what_cannot_be_counted_is_nan():
    state_space = build(transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1))
    assert math.isnan(forward_flops_per_token(state_space, BLOCK))
    experts = build(transformers.MixtralConfig(**SIZES, **MLP, **EXPERTS))
    experts.config = transformers.LlamaConfig(**SIZES, **MLP)  # without the number of experts that a token is sent to
    assert math.isnan(forward_flops_per_token(experts, BLOCK))
    own = build(transformers.LlamaConfig(**SIZES, **MLP))
    own.config = transformers.PreTrainedConfig(hidden_size=64, num_hidden_layers=1)  # of a family without heads
    assert math.isnan(forward_flops_per_token(own, BLOCK))


@pytest.mark.parametrize("family", ["hrm_text", "diffllama"])
def test_weights_and_heads_that_work_several_times_are_nan(family):
    """By the same formula they were 0.26 and 0.5 of what torch counts."""
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip("this version of transformers does not have it")
    sizes = {**SIZES, **MLP, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2}
    assert math.isnan(forward_flops_per_token(build(transformers.AutoConfig.for_model(family, **sizes)), BLOCK))


def test_local_layers_of_gpt_neo_count_their_window():
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48}
    full, half = (
        build(transformers.GPTNeoConfig(**sizes, attention_types=[[kinds, 1]], window_size=6), "cpu")
        for kinds in (["global", "global"], ["global", "local"])
    )
    saved = forward_flops_per_token(full, BLOCK) - forward_flops_per_token(half, BLOCK)
    assert saved == pytest.approx(4 * 32 * (12 - 5.25))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        full(input_ids=torch.zeros(1, BLOCK, dtype=torch.long), use_cache=False)
    assert forward_flops_per_token(full, BLOCK) == counter.get_total_flops() / BLOCK - 2 * 4 * 32 * BLOCK / 2


def test_an_unknown_kind_of_layer_is_nan():
    config = transformers.LlamaConfig(**SIZES, **MLP)
    model = build(config)
    model.config.layer_types = ["full_attention", "odd_attention", "full_attention"]
    assert math.isnan(forward_flops_per_token(model, BLOCK))


def test_backward_is_twice_the_forward():
    layer = nn.Linear(8, 16, bias=False)
    with FlopCounterMode(display=False) as counter:
        layer(torch.ones(5, 8, requires_grad=True)).sum().backward()
    assert student_flops(2 * 8 * 16, tokens=5) == counter.get_total_flops()


bf16, fp32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", bf16, 989.4),
        ("NVIDIA H100 80GB HBM3", fp32, 66.9),
        ("NVIDIA H100 PCIe", bf16, 756),
        ("NVIDIA H100 NVL", bf16, 835.5),
        ("NVIDIA H200", bf16, 989.4),
        ("NVIDIA B200", bf16, 2250),
        ("NVIDIA A100-SXM4-80GB", bf16, 312),
        ("NVIDIA A100 80GB PCIe", fp32, 19.5),
        ("A100-PCIE-40GB", bf16, 312),
        ("NVIDIA L4", bf16, 121),
        ("NVIDIA L40S", bf16, 362.1),
        ("NVIDIA A10G", bf16, 70),
        ("NVIDIA GeForce RTX 3090", bf16, 71),
        ("NVIDIA GeForce RTX 4090", bf16, 165.2),
        ("NVIDIA GeForce RTX 5090", bf16, 209.5),
        ("Tesla T4", fp32, 8.1),
        ("Tesla V100-SXM2-16GB", fp32, 15.7),
        ("AMD Instinct MI300X", bf16, 1307.4),
        ("AMD Instinct MI250X / MI250", bf16, 191.5),
    ],
)
def test_peaks_of_known_cards(name, dtype, tflops):
    assert peak_flops(name, dtype) == pytest.approx(tflops * 1e12, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("cpu", fp32),
        ("", bf16),
        ("NVIDIA A100", bf16),  # unknown name: a guess would hide it
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", bf16),
        ("NVIDIA GeForce RTX 3090 Ti", bf16),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", bf16),
        ("NVIDIA GeForce RTX 4090 D", bf16),
        ("NVIDIA L40", bf16),
        ("Tesla T4", bf16),  # emulated there
        ("Tesla V100-SXM2-16GB", bf16),
        ("NVIDIA H100 80GB HBM3", torch.float64),
    ],
)
def test_an_unknown_peak_is_none(name, dtype):
    assert peak_flops(name, dtype) is None


def test_devices_add_up_and_a_cpu_has_no_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: ["NVIDIA L4", "another"][device.index])
    assert peak_of(torch.device("cuda", 0), bf16, 4) == 4 * 121e12
    assert peak_of(torch.device("cuda", 1), bf16, 4) is None
    assert peak_of(torch.device("cpu"), bf16, 4) is peak_of(torch.device("mps"), bf16, 4) is None
