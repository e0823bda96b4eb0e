"""Tiny models of the supported families, with weights large enough that a wrong formula shows."""

import torch

from salt_lightning.hugging_face.spec import ModelSpec
from salt_lightning.models import CausalLM, build_fresh

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA_LIKE = {**SIZES, **SPECIAL, "intermediate_size": 48}
FAMILIES = {
    "llama": LLAMA_LIKE,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, **SPECIAL},
    "gpt_neox": LLAMA_LIKE,
    "qwen3": {**LLAMA_LIKE, "num_key_value_heads": 2, "head_dim": 8},
    "gemma3_text": {**LLAMA_LIKE, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    "mistral": {**LLAMA_LIKE, "num_key_value_heads": 2, "sliding_window": 4},
    "olmo3": {**LLAMA_LIKE, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3},
    "phi": LLAMA_LIKE,  # a bias in the head
    "cohere": LLAMA_LIKE,  # scales its logits
    "opt": {**SIZES, **SPECIAL, "ffn_dim": 48, "word_embed_proj_dim": 16},  # projects before the head
    "qwen3_moe": {
        **LLAMA_LIKE,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "gpt_oss": {  # needs our mask, and has layers that look back over a limited distance
        **LLAMA_LIKE,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "sliding_window": 4,
    },
    "gemma2": {**LLAMA_LIKE, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": None},
}


def tiny(family: str, name: str = "student", seed: int = 0, **settings: object) -> CausalLM:
    config = {**FAMILIES[family], "max_position_embeddings": 16, **settings}
    lm = CausalLM(build_fresh(ModelSpec(family=family, config=config), None, seed), name)
    with torch.no_grad():
        for parameter in lm.parameters():  # fresh weights of size 0.02 would hide a wrong mask or bias
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return lm
