"""Scoring compared with the teacher's bare forward pass, and separated documents with plain causal attention.

    python benchmarks/scoring.py                one GPU, under 9 minutes
    python benchmarks/scoring.py --tiny         any CPU, seconds: shows that it runs

"Bare" and "plain causal" are sdpa without a mask (compiled transformers creates one even for a single document), in a
separate model. The variants alternate, one batch each; figures are medians with quartiles. The claim is the ratios,
not the times.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from transformers.models.llama import modeling_llama

sys.path.insert(0, str(Path(__file__).parents[1]))
from head_loss import named
from step import mark, save_model, sizes, spans, whole_heads, write_text

from salt_lightning import cli
from salt_lightning.batches.rows import document_borders
from salt_lightning.hugging_face.attention import pack
from salt_lightning.hugging_face.spec import ModelSpec
from salt_lightning.losses import token_stats
from salt_lightning.models import CausalLM, build_fresh
from salt_lightning.teacher.scores import Scores


@dataclass(frozen=True)
class Size:
    """A teacher (width, layers), its vocabulary, rows per batch and tokens per row."""

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
    """Milliseconds of each variant, measured one after the other in every round; the first fifth warms up."""
    marks = [mark(device)]
    for way in [*ways.values()] * rounds:
        way()
        marks.append(mark(device))
    ms = spans(marks)  # only once: if the GPU waited for the host each round, only the first variant would look slower
    return {name: ms[i :: len(ways)][rounds // 5 :] for i, name in enumerate(ways)}


def model_of(size: Size, device: torch.device, attention: str | None = None) -> CausalLM:
    torch.compiler.reset()  # after eight graphs of one function dynamo stops compiling
    gc.collect()  # a compiled model is in a cycle
    config = sizes(*size.model, size.vocab) | {"max_position_embeddings": size.block}
    on_gpu = device.type == "cuda"
    spec = ModelSpec(config=config, attention=attention, dtype="bfloat16" if on_gpu else "float32")
    with device:
        lm = CausalLM(build_fresh(spec, None, 0), "teacher")
    lm.check()
    pack(lm, attention, SingleDeviceStrategy(device, precision_plugin=HalfPrecision("bf16-true")))
    if on_gpu:
        lm.backbone.compile(dynamic=False)
    return lm


def no_mask(*args: Any, **kwargs: Any) -> None:
    """Returns no mask, so that sdpa is causal by itself. A single function, because dynamo recompiles for another."""


def bare_hidden(lm: CausalLM, ids_BT: torch.Tensor) -> torch.Tensor:
    with patch.object(modeling_llama, "create_causal_mask", no_mask):
        return lm.backbone(input_ids=ids_BT, use_cache=False).last_hidden_state.flatten(0, 1)


def batch_of(size: Size, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, positions that restart about every 400 tokens, labels, and where documents begin."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(size.vocab, (size.rows, size.block), generator=generator)
    starts_BT = torch.rand(ids_BT.shape, generator=generator) < 1 / 400
    starts_BT[:, 0] = True
    index_BT = torch.arange(size.block).expand_as(ids_BT)
    positions_BT = index_BT - torch.where(starts_BT, index_BT, 0).cummax(1).values
    cu_seqlens = torch.from_numpy(document_borders(positions_BT.numpy()))
    return ids_BT.to(device), positions_BT.to(device), ids_BT.flatten().roll(-1).to(device), cu_seqlens.to(device)


def scoring(size: Size, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Times a forward pass to the logits, in chunks, and ours with loss and rank of every label."""
    plain, lm = model_of(size, device, "sdpa").eval(), model_of(size, device).eval()
    ids_BT, positions_BT, labels_N, cu_seqlens = batch_of(size, device)

    def bare() -> None:
        for hidden_CD in bare_hidden(plain, ids_BT).split(4096):
            torch.nn.functional.linear(hidden_CD, plain.head.weight)

    def score() -> None:
        lm(ids_BT, positions_BT, lambda h, w, b: token_stats(h, w, labels_N, b), cu_seqlens)

    with torch.inference_mode():
        return in_turn({"bare": bare, "score": score}, rounds, device)


def predict_rate(size: Size, folder: Path) -> float:
    """Tokens per second of `cli.py predict`, including reading and writing."""
    on_gpu = torch.cuda.is_available()
    text = folder / "text.jsonl"
    write_text(text, 25 if size.vocab == 512 else 8000)
    settings = {
        "data.source": text, "data.cache_dir": folder / "cache", "data.vocab_size": min(8192, size.vocab),
        "data.block_size": size.block, "data.micro_batch_size": size.rows, "model.compile": json.dumps(on_gpu),
        "trainer.precision": "bf16-mixed" if on_gpu else "32-true", "trainer.enable_progress_bar": "false",
        "trainer.accelerator": "gpu" if on_gpu else "cpu", "run": folder / "score", "kd.allow_untrained": "true",
        "model.teacher.path": folder / "teacher",
    }  # fmt: skip
    save_model(size.model, size.vocab, size.block, folder / "teacher")
    with whole_heads():
        code = cli.main(["predict", *(f"--{key}={value}" for key, value in settings.items())])
    if code != 0:
        raise RuntimeError("predict failed")
    scores = Scores(folder / "score", "--run")
    times = sorted(scores.path(shard).stat().st_mtime for shard in range(scores.scored.num_shards))
    shards = len(times) - 1  # from the end of the first shard, which compiles, to the end of the last
    rows = scores.scored.num_rows - scores.scored.shard_rows
    return rows * size.block / (times[-1] - times[0]) if shards else math.nan


def isolation(size: Size, attention: str | None, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Times forward and backward of a training micro-batch with documents separated, and with plain causal rows."""
    plain, lm = model_of(size, device, "sdpa").train(), model_of(size, device, attention).train()
    ids_BT, positions_BT, _, cu_seqlens = batch_of(size, device)

    def backward(hidden_ND: torch.Tensor) -> None:
        hidden_ND.float().square().mean().backward()

    return in_turn(
        {
            "plain": lambda: backward(bare_hidden(plain, ids_BT)),
            "apart": lambda: backward(lm(ids_BT, positions_BT, cu_seqlens=cu_seqlens)[0]),
        },
        rounds, device,
    )  # fmt: skip


def cell(ms: list[float]) -> str:
    low, middle, high = statistics.quantiles(ms, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def scoring_rows(name: str, rounds: int, device: torch.device, predict: bool) -> Iterator[str]:
    size = SIZES[name]
    ms = scoring(size, rounds, device)
    share = statistics.median(ms["bare"]) / statistics.median(ms["score"])
    yield f"| {name} | {cell(ms['bare'])} | {cell(ms['score'])} | {share:.1%} |"
    if predict:
        bare_rate = size.rows * size.block / statistics.median(ms["bare"]) * 1e3
        with tempfile.TemporaryDirectory() as folder:
            rate = predict_rate(size, Path(folder))
        yield f"| {name}, `cli.py predict` | | {rate:,.0f} tokens/s | {rate / bare_rate:.1%} |"


def isolation_rows(label: str, *measured: Any) -> Iterator[str]:
    ms = isolation(*measured)
    cost = statistics.median(ms["apart"]) / statistics.median(ms["plain"]) - 1
    yield f"| {label} | {cell(ms['plain'])} | {cell(ms['apart'])} | {cost:+.1%} |"


def show(label: str, rows: Iterator[str], deadline_s: float) -> None:
    """Prints rows as they are ready; reports one that fails (not installed, not for this device) and continues."""
    if time.monotonic() > deadline_s:
        print(f"| {label} | skipped: the deadline has passed | | |", flush=True)
        return
    try:
        for row in rows:
            print(row, flush=True)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        print(f"| {label} | not run: {named(error)} | | |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights, on any machine")
    parser.add_argument("--deadline", type=float, default=420, help="seconds after which no further row is started")
    args = parser.parse_args()
    deadline_s = time.monotonic() + args.deadline
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names, rounds = (["tiny"], 10) if args.tiny else (["51m", "350m", "1.5b 256K"], 25)
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}\n")
    print("| teacher | bare forward, ms | with loss and rank, ms | speed of bare |\n|---|---:|---:|---:|")
    for name in names:
        show(name, scoring_rows(name, rounds, device, predict=name == names[0]), deadline_s)
    print("\n| student, attention | plain causal, ms | documents separated, ms | cost |\n|---|---:|---:|---:|")
    on_gpu_alone = ("sdpa", "flex_attention", "flash_attention_2") if device.type == "cuda" else ()
    for attention in (None, *on_gpu_alone):
        for name in names[: 2 if attention is None else 1]:
            label = f"{name}, {attention or 'default'}"
            show(label, isolation_rows(label, SIZES[name], attention, rounds, device), deadline_s)


if __name__ == "__main__":
    main()
