"""Memory and seconds of an export, from one file and from a folder of shards, compared with torch's own ways.

    python benchmarks/export_memory.py           any CPU, two minutes: 169M parameters with their optimizer state
    python benchmarks/export_memory.py --tiny    seconds: shows that it runs

The competitors: torch.load and save_pretrained for the file; for the shards, torch's dcp_to_torch_save before these.
Each runs in a separate process; memory is the peak of the resident set above its value before the call, mapped files
included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from selection import forked, resident
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoConfig, AutoModelForCausalLM

from salt_lightning.cli import main as command
from salt_lightning.export import export
from salt_lightning.hugging_face.spec import ModelSpec
from salt_lightning.models import read_checkpoint
from salt_lightning.storage.shards import STUDENT

ROOT = Path(__file__).parents[1]
FILE_BYTES = 100_000_000  # at most, per weight file


def train(work: Path, kind: str, tiny: bool) -> Path:
    """Trains one step; returns the checkpoint."""
    width, layers = (64, 2) if tiny else (1024, 10)
    student = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4,
               "intermediate_size": 4 * width}  # fmt: skip
    settings = {
        "run": work / kind, "data.source": work / "text.txt", "data.cache_dir": work / "cache", "data.vocab_size": 300,
        "data.block_size": 32, "data.global_batch_size": 1, "data.micro_batch_size": 1, "data.val_fraction": 0,
        "data.val_source": work / "text.txt", "model.student.config": json.dumps(student),
        "model.optim.warmup_steps": 0, "trainer.max_steps": 1, "trainer.limit_val_batches": 0,
        "trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.precision": "32-true",
        "trainer.enable_progress_bar": "false", "kd.weight": 0,
    }  # fmt: skip
    sharded = ["--config", str(ROOT / "configs/fsdp.yaml")] if kind == "shards" else []
    with redirect_stdout(sys.stderr):
        if code := command(["fit", *sharded, *(f"--{key}={value}" for key, value in settings.items())]):
            raise SystemExit(code)
    return work / kind / "checkpoints" / "step-00000001.ckpt"


def rival(checkpoint: Path, target: Path) -> None:
    settings = ModelSpec.of(read_checkpoint(str(checkpoint), "CKPT")["hyper_parameters"]["student"])
    whole = checkpoint
    if checkpoint.is_dir():
        whole = target.with_suffix(".pt")
        dcp_to_torch_save(checkpoint, whole)
    saved = torch.load(whole, weights_only=True)
    state = saved.get("state_dict", saved)  # shards have flat dotted names, without a "state_dict" level
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.family, **settings.config))
    weights = {k.partition(STUDENT)[2]: v for k, v in state.items() if not k.startswith("optimizer")}
    model.load_state_dict(weights)
    model.save_pretrained(target, max_shard_size=FILE_BYTES)


def measured(way: str, checkpoint: Path, target: Path) -> tuple[int, float]:
    """Peak bytes and seconds of one export."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, began = resident("VmRSS"), time.perf_counter()
    if way == "rival":
        rival(checkpoint, target)
    else:
        dtype = torch.bfloat16 if way == "ours, to bf16" else None
        export(checkpoint, target, dtype, max_file_bytes=FILE_BYTES)
    return resident("VmHWM") - before, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "text.txt").write_text(" ".join(f"word{i % 97}" for i in range(500)))
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {versions}\n")
        print("| checkpoint | way | weights written, MB | peak above the start, MB | seconds |")
        print("|---|---|--:|--:|--:|")
        for kind, theirs in (("file", "torch.load, save_pretrained"), ("shards", "dcp_to_torch_save before these")):
            checkpoint = forked(partial(train, work, kind, args.tiny))
            for way in ("ours", "ours, to bf16", "rival"):
                target = work / "exported"
                peak, seconds = forked(partial(measured, way, checkpoint, target))
                size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
                name = theirs if way == "rival" else way
                print(f"| {kind} | {name} | {size / 1e6:.0f} | {peak / 1e6:.0f} | {seconds:.1f} |", flush=True)
                shutil.rmtree(target)
            shutil.rmtree(work / kind)


if __name__ == "__main__":
    main()
