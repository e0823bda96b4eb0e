"""A whole KD step of every causal language model of transformers, compared with the same step in plain transformers.

    python benchmarks/families.py                     any CPU, about 5 minutes
    python benchmarks/families.py llama gpt2:cohere   only these; the second is a gpt2 taught by a cohere

Student and teacher are tiny models of the family with every parameter perturbed, biases and norms too. A step of ours
(Lightning's trainer, packed rows, two micro-batches, gradients from `salt_loss`) is compared with one whose documents
go through transformers' own forward one by one, to full logits, with the loss written out and autograd's gradients.
"exact": the loss agrees to 1e-5, and each parameter's gradient to 1e-5 of the norm of all (fp32; 24 bits are 6e-8).
"refused": ours says why not.
"not tried": the family's smallest config has over 30M parameters, or transformers runs none of our sizes.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import random
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import Logger
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parents[1]))

from salt_lightning import KDScheduleCallback, ModelSpec, OptimSpec, SALTDataModule, SALTModule
from salt_lightning.errors import ConfigError, one_line

TOKENS, WEIGHT, TEMPERATURE, TOLERANCE = 300, 0.6, 2.0, 1e-5
# Whatever of these a config has. Windows and chunks are shorter than rows, so that they matter.
SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "head_dim": 16, "max_position_embeddings": 256, "moe_intermediate_size": 32,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "shared_expert_intermediate_size": 32,
    "sliding_window": 12, "use_sliding_window": True, "max_window_layers": 2, "attention_chunk_size": 12,
    "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256, "rotary_dim": 8, "ffn_dim": 96, "d_model": 64,
    "word_embed_proj_dim": 64, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_expand": 2,
    "mamba_n_groups": 1, "mamba_chunk_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "state_size": 16,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
# Some families derive one of these, or have no such combination.
WITHOUT = ((), ("num_key_value_heads",), ("head_dim",), ("num_key_value_heads", "head_dim"), ("sliding_window",))


class NotTriedError(Exception):
    """transformers builds no small model of the family from our sizes."""


def build(family: str, seed: int, folder: Path) -> None:
    """Writes a model of the first of our shapes that the family can be read and run with."""
    failed = ""
    for without in WITHOUT:
        try:
            shaped(family, without, seed).save_pretrained(folder)
            model = read(folder)
            packed = {"position_ids": (torch.arange(20) % 10)[None]}  # with a mask some need as many heads for keys
            takes = "position_ids" in inspect.signature(model.forward).parameters
            model(input_ids=torch.arange(20)[None], use_cache=False, **packed if takes else {})
            return
        except Exception as error:  # transformers has many kinds
            failed = failed or one_line(error, 90)
    raise NotTriedError(failed)


def shaped(family: str, without: tuple[str, ...], seed: int) -> PreTrainedModel:
    base = AutoConfig.for_model(family)
    names = set(base.to_dict()) | set(base.attribute_map)
    chance = {name: 0.0 for name in names if any(word in name for word in ("drop", "jitter"))}
    chance = {name: 0.0 for name in chance if isinstance(getattr(base, name, None), float)}
    sizes = {name: value for name, value in SIZES.items() if name in names and name not in without} | chance
    kinds = set(getattr(base, "layer_types", None) or ())
    for layers in (4, 6, 8):  # until each kind of layer is there
        counts = {name: layers for name in ("num_hidden_layers", "n_layer") if name in sizes}
        config = AutoConfig.for_model(family, **sizes | counts)
        if kinds <= set(getattr(config, "layer_types", None) or kinds):
            break
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > 30e6:
        raise NotTriedError(f"{count / 1e6:,.0f}M parameters at its smallest")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.08, 0.15)[seed] * torch.randn_like(parameter))
    return model


def read(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write_text(file: Path) -> None:
    """Documents of 20 to 120 characters, several in a row of 96 tokens, most longer than the windows."""
    drawn = random.Random(0)
    lines = [one_line(topic, drawn.choice((20, 60, 120))) for topic in topics.values()]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


class Seen(Callback, Logger):
    """The micro-batches of the step, its gradients, and what it logs."""

    name = version = "seen"

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[dict[str, torch.Tensor]] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self.logged: dict[str, float] = {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Keeps none."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged |= metrics

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append({name: tensor.clone() for name, tensor in batch.items()})

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.student.model.named_parameters()
        self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}


def ours(folder: Path, cache: Path) -> tuple[float, Seen]:
    """The loss of one step, and what it saw."""
    module = SALTModule(
        ModelSpec(path=str(folder / "student")), teacher=ModelSpec(path=str(folder / "teacher")),
        teacher_temperature=TEMPERATURE, optim=OptimSpec(lr=1e-9, warmup_steps=0),
    )  # fmt: skip
    data = SALTDataModule(
        str(cache / "text.jsonl"), cache_dir=str(cache / "prepared"), vocab_size=TOKENS, block_size=96,
        global_batch_size=4, micro_batch_size=2, val_fraction=0.2,
    )  # fmt: skip
    seen, kd = Seen(), KDScheduleCallback(weight=WEIGHT, steps=1, allow_untrained=True)
    quiet: dict[str, Any] = dict.fromkeys(
        ("enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False
    )
    trainer = Trainer(
        max_steps=1, limit_val_batches=0, num_sanity_val_steps=0, accelerator="cpu", callbacks=[kd, seen], logger=seen,
        default_root_dir=str(folder), **quiet,
    )  # fmt: skip
    trainer.fit(module, data)
    return seen.logged["train/loss"], seen


def alone(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits (N, V) of each document by itself."""
    parts = []
    for ids_T, positions_T in zip(batch["input_ids"], batch["positions"], strict=True):
        starts = (positions_T == 0).nonzero().flatten().tolist()
        for start, stop in zip(starts, [*starts[1:], len(ids_T)], strict=True):
            parts.append(model(input_ids=ids_T[None, start:stop]).logits[0].float())
    return torch.cat(parts)


def plain(folder: Path, batches: list[dict[str, torch.Tensor]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the same step by the formula: (1 - w) CE + w KD over the tokens."""
    student, teacher = read(folder / "student").train(), read(folder / "teacher")
    total, tokens = torch.zeros(()), 0
    for batch in batches:
        labels_N = batch["labels"].flatten()
        known = labels_N >= 0
        with torch.no_grad():
            q_NV = (alone(teacher, batch)[known, :TOKENS] / TEMPERATURE).softmax(-1)
        log_p_NV = alone(student, batch)[known].log_softmax(-1)
        ce = -log_p_NV.gather(1, labels_N[known, None]).sum()
        kd = -(q_NV * log_p_NV[:, :TOKENS]).sum()
        total, tokens = total + (1 - WEIGHT) * ce + WEIGHT * kd, tokens + int(known.sum())
    (total / tokens).backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return float(total / tokens), gradients


def compare(student: str, teacher: str, cache: Path) -> tuple[float, float]:
    """Relative differences of the loss and of the gradients (the worst parameter's, by the norm of all)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, (kind, family) in enumerate((("student", student), ("teacher", teacher))):
            build(family, seed, folder / kind)
        loss, seen = ours(folder, cache)
        expected, gradients = plain(folder, seen.batches)
        require_several_documents(seen.batches)
        whole = torch.stack([g.norm() for g in gradients.values()]).norm()
        nothing = torch.zeros(())
        names = {*gradients, *seen.gradients}
        apart = [(seen.gradients.get(n, nothing) - gradients.get(n, nothing)).norm() for n in names]
        return abs(loss - expected) / expected, float(torch.stack(apart).max() / whole)  # NaN if one is


def require_several_documents(batches: list[dict[str, torch.Tensor]]) -> None:
    """Positions restart after each EOS, which has ID 0 here."""
    for batch in batches:
        after_eos = batch["input_ids"][:, :-1] == 0
        assert after_eos.any(1).all()
        assert (batch["positions"][:, 1:][after_eos] == 0).all()


def verdict(student: str, teacher: str, cache: Path) -> tuple[str, str]:
    try:
        of_loss, of_gradients = compare(student, teacher, cache)
    except NotTriedError as error:
        return "not tried", str(error)
    except ConfigError as error:
        return "refused", one_line(error, 160)
    except Exception as error:
        return "error", f"{type(error).__name__}: {one_line(error, 120)}"
    said = f"loss {of_loss:.0e}, gradients {of_gradients:.0e}"
    return ("exact" if of_loss <= TOLERANCE and of_gradients <= TOLERANCE else "DIFFERS"), said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="names of transformers; STUDENT:TEACHER for two")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, fp32\n\n| family | | |\n|---|---|---|")
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as cache:
        write_text(Path(cache) / "text.jsonl")
        for pair in args.families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
            student, _, teacher = pair.partition(":")
            kind, said = verdict(student, teacher or student, Path(cache))
            found[kind] += 1
            print(f"| {pair} | {kind} | {said} |", flush=True)
    print(f"\n{', '.join(f'{count} {kind}' for kind, count in found.most_common())}")


if __name__ == "__main__":
    main()
