"""What scoring costs beside the teacher's bare forward pass, and document isolation beside plain causal attention.

    python benchmarks/scoring.py                one GPU, under 9 minutes
    python benchmarks/scoring.py --tiny         any CPU, seconds: shows that it runs

The ways alternate, one batch each in turn; figures are medians with the quartiles. Ratios are the claim, not times.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from step import mark, sizes, spans, write_text

from salt_lightning import cli
from salt_lightning.losses import token_stats
from salt_lightning.models import CausalLM, build_fresh
from salt_lightning.scores import Scores
from salt_lightning.spec import ModelSpec


@dataclass(frozen=True)
class Size:
    """A teacher (width, layers), its vocabulary, rows of a batch and tokens of a row."""

    model: tuple[int, int]
    vocab: int = 50304
    rows: int = 32
    block: int = 1024


SIZES = {
    "51m": Size((512, 8)),
    "350m": Size((1024, 24)),
    "1.5b 256K": Size((2048, 24), vocab=256000, rows=8),
    "tiny": Size((32, 2), vocab=512, rows=2, block=64),
}


def in_turn(ways: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each way, measured one after the other in every round; the first fifth warms up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        marks = [mark(device)]
        for way in ways.values():
            way()
            marks.append(mark(device))
        for name, ms in zip(ways, spans(marks), strict=True):
            found[name].append(ms)
    return {name: ms[rounds // 5 :] for name, ms in found.items()}


def model_of(size: Size, device: torch.device, attention: str | None = None) -> CausalLM:
    config = sizes(*size.model, size.vocab) | {"max_position_embeddings": size.block}
    on_gpu = device.type == "cuda"
    spec = ModelSpec(config=config, attention=attention, dtype="bfloat16" if on_gpu else "float32")
    lm = CausalLM(build_fresh(spec, None, 0).to(device), "teacher")
    lm.check()
    if on_gpu:
        lm.backbone.compile(dynamic=False)
    return lm


def batch_of(size: Size, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, positions that start anew about every 400 tokens, labels."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(size.vocab, (size.rows, size.block), generator=generator)
    starts_BT = torch.rand(ids_BT.shape, generator=generator) < 1 / 400
    starts_BT[:, 0] = True
    index_BT = torch.arange(size.block).expand_as(ids_BT)
    positions_BT = index_BT - torch.where(starts_BT, index_BT, 0).cummax(1).values
    return ids_BT.to(device), positions_BT.to(device), ids_BT.flatten().roll(-1).to(device)


@torch.inference_mode()
def scoring(size: Size, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """A forward pass to the logits, in chunks and whole, and ours with loss and rank of every label."""
    lm = model_of(size, device).eval()
    ids_BT, positions_BT, labels_N = batch_of(size, device)
    plain_BT = torch.arange(size.block, device=device).expand_as(ids_BT)

    def chunks(hidden_ND: torch.Tensor, head_VD: torch.Tensor, bias_V: torch.Tensor | None) -> None:
        for hidden_CD in hidden_ND.split(4096):
            torch.nn.functional.linear(hidden_CD, head_VD, bias_V)

    return in_turn(
        {
            "bare": lambda: lm(ids_BT, plain_BT, then=chunks),
            "score": lambda: lm(ids_BT, positions_BT, then=lambda h, w, b: token_stats(h, w, labels_N, b)),
        },
        rounds, device,
    )  # fmt: skip


def predict_rate(size: Size, folder: Path) -> float:
    """Tokens a second of `cli.py predict`, reading and writing included."""
    on_gpu = torch.cuda.is_available()
    text = folder / "text.jsonl"
    write_text(text, 25 if size.vocab == 512 else 8000)
    common = {
        "data.source": text, "data.cache_dir": folder / "cache", "data.vocab_size": min(8192, size.vocab),
        "data.block_size": size.block, "data.micro_batch_size": size.rows, "model.compile": json.dumps(on_gpu),
        "trainer.precision": "bf16-mixed" if on_gpu else "32-true", "trainer.enable_progress_bar": "false",
        "trainer.accelerator": "gpu" if on_gpu else "cpu",
    }  # fmt: skip
    teacher = {"run": folder / "teacher", "kd.weight": 0, "trainer.max_steps": 1, "trainer.limit_val_batches": 0,
               "data.global_batch_size": size.rows, "model.optim.warmup_steps": 0,
               "model.student.config": json.dumps(sizes(*size.model, size.vocab))}  # fmt: skip
    score = {"run": folder / "score", "model.teacher.path": folder / "teacher/checkpoints/step-00000001.ckpt"}
    for verb, own in (("fit", teacher), ("predict", score)):
        if cli.main([verb, *(f"--{key}={value}" for key, value in {**common, **own}.items())]) != 0:
            raise SystemExit(1)
    scores = Scores(folder / "score", "--run")
    times = sorted(scores.path(shard).stat().st_mtime for shard in range(scores.scored.num_shards))
    shards = len(times) - 1  # from the end of the first shard, which compiles, to the end of the last
    rows = scores.scored.num_rows - scores.scored.shard_rows
    return rows * size.block / (times[-1] - times[0]) if shards else math.nan


def isolation(size: Size, attention: str | None, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Forward and backward of a training micro-batch with documents apart, and as one plain causal row."""
    lm = model_of(size, device, attention).train()
    ids_BT, positions_BT, _ = batch_of(size, device)
    plain_BT = torch.arange(size.block, device=device).expand_as(ids_BT)

    def step(positions: torch.Tensor) -> None:
        lm(ids_BT, positions)[0].float().square().mean().backward()

    def bare() -> None:  # positions not given: transformers takes the plain causal kernel
        lm.backbone(input_ids=ids_BT, use_cache=False).last_hidden_state.float().square().mean().backward()

    return in_turn({"plain": bare, "one document": lambda: step(plain_BT), "apart": lambda: step(positions_BT)},
                   rounds, device)  # fmt: skip


def cell(ms: list[float]) -> str:
    low, middle, high = statistics.quantiles(ms, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights, on any machine")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names, rounds = (["tiny"], 10) if args.tiny else (["51m", "350m", "1.5b 256K"], 25)
    print("| teacher | bare forward, ms | with loss and rank, ms | speed of bare |\n|---|---:|---:|---:|")
    for name in names:
        ms = scoring(SIZES[name], rounds, device)
        share = statistics.median(ms["bare"]) / statistics.median(ms["score"])
        print(f"| {name} | {cell(ms['bare'])} | {cell(ms['score'])} | {share:.1%} |", flush=True)
        bare_rate = SIZES[name].rows * SIZES[name].block / statistics.median(ms["bare"]) * 1e3
        if name == names[0]:
            with tempfile.TemporaryDirectory() as folder:
                rate = predict_rate(SIZES[name], Path(folder))
            print(f"| {name}, `cli.py predict` | | {rate:,.0f} tokens/s | {rate / bare_rate:.1%} |", flush=True)
    print("\n| student, attention | plain causal, ms | documents apart, ms | cost |\n|---|---:|---:|---:|")
    on_gpu_alone = ("flex_attention", "flash_attention_2") if device.type == "cuda" else ()
    for attention in (None, *on_gpu_alone):
        for name in names[:2]:
            label = f"{name}, {attention or 'sdpa'}"
            try:
                ms = isolation(SIZES[name], attention, rounds, device)
            except Exception as error:  # not installed, or not for this device: said, not hidden
                print(f"| {label} | | not run: {str(error).splitlines()[0][:80]} | |", flush=True)
                continue
            cost = statistics.median(ms["apart"]) / statistics.median(ms["plain"]) - 1
            print(f"| {label} | {cell(ms['plain'])} | {cell(ms['apart'])} | {cost:+.1%} |", flush=True)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"\n{card}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
