"""The cost of text before a step: preparation and its memory, opening and checking files, the loader alone, and
text that is not in memory.

    python benchmarks/data_path.py --source corpus/train.jsonl.xz     any CPU, about ten minutes on two cores
    python benchmarks/data_path.py --tiny                             seconds, on made-up text: shows that it runs

The competitor works like transformers' own example (run_clm.py): datasets' `map` of the tokenizer, then of blocks, and
a DataLoader over them. Both use the same tokenizer, trained beforehand, and the same number of processes; they run
alternately in separate processes. The text is the first --megabytes of the source, as plain jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes share the cores

import datasets
import numpy as np
import tokenizers
import torch
from torch.utils.data import DataLoader
from transformers import default_data_collator

from salt_lightning.batches.order import Order
from salt_lightning.batches.rows import PackedRows, TrainBatches
from salt_lightning.data import SALTDataModule
from salt_lightning.text.token_files import Block, SplitWriter, TokenFiles, no_counts, sealed, verify

BLOCK, ROWS = 1024, 8


def excerpt(source: str, megabytes: float, file: Path) -> int:
    """Writes the first `megabytes` of a source as jsonl; returns the bytes of its text."""
    size = 0
    with file.open("w", encoding="utf-8") as out:
        for row in datasets.load_dataset("json", data_files=source, split="train", streaming=True):
            out.write(json.dumps({"text": row["text"]}) + "\n")
            size += len(row["text"].encode())
            if size >= megabytes * 1e6:
                break
    return size


def made_up(file: Path) -> int:
    words, draw = [f"word{i}" for i in range(500)], random.Random(0)
    texts = [" ".join(draw.choices(words, k=200)) for _ in range(400)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return sum(map(len, texts))


def module(work: Path, cache: str, **changes: Any) -> SALTDataModule:
    sizes = {"block_size": BLOCK, "global_batch_size": 8 * ROWS, "micro_batch_size": ROWS, "val_fraction": 0.01}
    return SALTDataModule(str(work / "text.jsonl"), cache_dir=str(work / cache), **{**sizes, **changes})


def ours(work: Path, workers: int) -> dict[str, float]:
    shutil.rmtree(work / "ours", ignore_errors=True)
    data = module(work, "ours", tokenizer=str(work / "tokenizer"), prepare_workers=workers)
    began = time.perf_counter()
    data.prepare_data()
    seconds = time.perf_counter() - began
    data.setup("fit")
    return {"s": seconds, "tokens": data.num_train_tokens}


def rival(work: Path, workers: int) -> dict[str, float]:
    """Tokenizes as run_clm.py does, into a separate cache."""
    shutil.rmtree(work / "rival", ignore_errors=True)
    tokenizer = module(work, "none", tokenizer=str(work / "tokenizer")).tokenizer

    def group(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(chain(*values)) for name, values in examples.items()}
        total = len(joined["input_ids"]) // BLOCK * BLOCK
        blocks = {name: [ids[i : i + BLOCK] for i in range(0, total, BLOCK)] for name, ids in joined.items()}
        return {**blocks, "labels": blocks["input_ids"].copy()}

    began = time.perf_counter()
    cache = str(work / "rival")
    text = datasets.load_dataset("json", data_files=str(work / "text.jsonl"), split="train", cache_dir=cache)
    how: dict[str, Any] = {"batched": True, "num_proc": workers if workers > 1 else None}
    tokens = text.map(lambda rows: tokenizer(rows["text"]), remove_columns=text.column_names, **how)
    blocks = tokens.map(group, **how)
    seconds = time.perf_counter() - began
    blocks.save_to_disk(str(work / "blocks"))
    return {"s": seconds, "tokens": blocks.num_rows * BLOCK}


def in_a_process(script: str, *words: object) -> Any:
    """Runs `script --do WORDS` in a separate process; returns the last line that it prints, parsed as JSON."""
    command = [sys.executable, script, "--do", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise SystemExit(1)
    return json.loads(done.stdout.splitlines()[-1])


def prepare(work: Path, size: int, cores: list[int], rounds: int) -> None:
    print("| tokenizing | processes | MB of text per second | per core | tokens | GiB, parent and largest worker |")
    print("|---|--:|--:|--:|--:|--:|")
    for workers in cores:
        found: dict[str, list[dict[str, float]]] = {"ours": [], "run_clm.py's way": []}
        for _ in range(rounds):
            for name, way in zip(found, ("ours", "rival"), strict=True):
                found[name].append(in_a_process(__file__, way, work, workers))
        for name, runs in found.items():
            rates = sorted(size / 1e6 / each["s"] for each in runs)
            middle, (first, *_) = statistics.median(rates), runs
            gib = ", ".join(f"{max(each[of] for each in runs) / 2**30:.2f}" for of in ("parent", "worker"))
            print(
                f"| {name} | {workers} | {middle:.2f} ({rates[0]:.2f} to {rates[-1]:.2f}) | {middle / workers:.2f} | "
                f"{first['tokens']:,.0f} | {gib} |",
                flush=True,
            )


def rate(batches: Any, seconds: float) -> float:
    """Tokens per second of a loader, after the first eight batches."""
    began, tokens = 0.0, 0
    for number, batch in enumerate(batches):
        if number == 8:
            began, tokens = time.perf_counter(), 0
        tokens += batch["input_ids"].numel()
        if began and time.perf_counter() - began > seconds:
            break
    return tokens / (time.perf_counter() - began)


def loader(work: Path, workers: list[int], seconds: float) -> None:
    print("\n| loader alone, 8 rows of 1024, M tokens per second | workers | ours | DataLoader over blocks | ratio |")
    print("|---|--:|--:|--:|--:|")
    blocks = datasets.load_from_disk(str(work / "blocks")).with_format("torch")
    for number in workers:
        data = module(work, "ours", tokenizer=str(work / "tokenizer"), num_workers=number)
        data.setup("fit")
        mine = data.train_dataloader()
        mine.length = 1 << 40
        plain = DataLoader(blocks, ROWS, shuffle=True, num_workers=number, collate_fn=default_data_collator)
        found = rate(mine, seconds), rate(chain.from_iterable(plain for _ in range(1 << 20)), seconds)
        print(f"| | {number} | {found[0] / 1e6:.2f} | {found[1] / 1e6:.2f} | {found[0] / found[1]:.1f} |", flush=True)


def files(work: Path) -> None:
    """Times opening a prepared folder, and reading all of it to verify its checksums."""
    folder = next(path for path in (work / "ours").iterdir() if (path / "manifest.json").exists())
    ms = []
    for _ in range(20):
        began = time.perf_counter()
        TokenFiles(folder, "train")
        ms.append(1e3 * (time.perf_counter() - began))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    began = time.process_time()
    verify(folder)
    print(
        f"\nOpening a prepared folder: {statistics.median(ms):.1f} ms; all checksums of its {size / 1e6:.0f} MB: ",
        end="",
    )
    print(f"{size / 1e6 / (time.process_time() - began):.0f} MB per CPU second.")


def cold(work: Path, pieces: int) -> None:
    """Time and bytes read from the disk of steps whose text is not in memory, with and without PackedRows.expect."""
    folder, steps = work / "cold", 60
    folder.mkdir()
    writer = SplitWriter(folder / "train", "uint16", no_counts())
    ids, lengths = np.random.default_rng(0).integers(0, 300, 1 << 25, np.uint16), np.full(1 << 15, 1 << 10)
    for _ in range(pieces):  # of 64 MiB
        writer.add(Block(ids, lengths, [], np.zeros(len(lengths)), None), [0] * len(lengths))
    writer.sync()
    manifest = {"dtype": "uint16", "tokenizer": {"eos_id": 0}, "sources": ["x"], "splits": {"train": writer.entry()}}
    writer.close()
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))

    def read_bytes() -> int:
        return int(re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.M)[1])

    def measure(told: bool) -> str:
        packed, ms = PackedRows(TokenFiles(folder, "train"), BLOCK, True), []
        if not told:
            packed.expect = lambda rows: None
        for path in (folder / "train").iterdir():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        batches = TrainBatches(packed, Order(0, packed.num_rows), (2 * ROWS, 2 * ROWS), (0, 1), (2 * ROWS).__mul__)
        before = read_bytes()
        for step in range(steps):
            time.sleep(0.05)  # of training
            began = time.perf_counter()
            batches[step]
            ms.append(1e3 * (time.perf_counter() - began))
        return f"{(read_bytes() - before) / 2**20:,.0f} | {statistics.median(ms):.1f} ({min(ms):.1f} to {max(ms):.1f})"

    print(f"\n| {steps} steps of {2 * ROWS} rows of {BLOCK} from {pieces / 16:g} GiB not in memory | MiB read | ms |")
    print("|---|--:|--:|")
    for told in (False, True, False, True):
        print(f"| {'rows known a step ahead' if told else 'read when they are needed'} | {measure(told)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="a .jsonl file, compressed or not, with texts under `text`")
    parser.add_argument("--megabytes", type=float, default=60.0)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--do", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    if args.do:
        name, work, workers = args.do
        found = {"ours": ours, "rival": rival}[name](Path(work), int(workers))
        for of, who in (("parent", resource.RUSAGE_SELF), ("worker", resource.RUSAGE_CHILDREN)):
            found[of] = resource.getrusage(who).ru_maxrss * 1024
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if args.tiny:
            size, cores, rounds, seconds = made_up(work / "text.jsonl"), [1], 1, 0.2
        elif args.source is None:
            parser.error("--source is missing; give it, or use --tiny")
        else:
            size, cores, rounds = excerpt(args.source, args.megabytes, work / "text.jsonl"), [1, 2], args.rounds
            seconds = 5.0
        trained = module(work, "ours", vocab_size=300 if args.tiny else args.vocab_size)
        trained.prepare_data()
        trained.tokenizer.save_pretrained(work / "tokenizer")
        versions = f"torch {torch.__version__}, tokenizers {tokenizers.__version__}, datasets {datasets.__version__}"
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {versions}; {size / 1e6:.1f} MB of text\n")
        prepare(work, size, cores, rounds)
        loader(work, [0, 2] if args.tiny else [0, 2, 4], seconds)
        files(work)
        cold(work, 1 if args.tiny else 48)


if __name__ == "__main__":
    main()
