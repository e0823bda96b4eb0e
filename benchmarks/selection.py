"""The cost of SALT_DS's selection on a large corpus: S(x) from the shards, a rank's start, its steps, the report.

    python benchmarks/selection.py --rows 1000000 10000000 100000000     any CPU, 1 GB of disk, about four minutes
    python benchmarks/selection.py --tiny                                seconds: shows that it runs

Scores are random, without a teacher: rows of --tokens tokens, a third of them outside the top ten. Each line runs in a
separate process. Memory is the peak of the resident set above its value before, and what remains afterwards, including
about 60 MiB of libraries; the pickle is what a worker process receives if it is not forked.
"""

from __future__ import annotations

import argparse
import multiprocessing
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from salt_lightning.batches.mixture import Shares
from salt_lightning.selection import KeepRule, plan, row_scores
from salt_lightning.teacher import score_report
from salt_lightning.teacher.scores import Scored, Scores

STEP_ROWS = 512
Found = TypeVar("Found")


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def write(run: Path, rows: int, tokens: int) -> None:
    scores = Scores.create(run, Scored("rows", "tokenizer", rows, tokens, True, "t", "p"), {})
    for shard in scores.missing():
        rng = np.random.default_rng(shard)
        size = len(scores.rows(shard)), tokens
        scores.write(shard, rng.standard_exponential(size, np.float32), rng.integers(0, 15, size))


def ms_a_step(order: Any, first: int) -> float:
    began = time.perf_counter()
    for step in range(10):
        order(first + step * STEP_ROWS + np.arange(STEP_ROWS))
    return (time.perf_counter() - began) * 100


def start(scores: Scores, rule: KeepRule, shares: Shares | None = None) -> dict[str, Any]:
    rows = scores.scored.num_rows
    phase1 = rows // 4
    order = plan(scores, rule, 1, phase1, shares).order
    order.fingerprint  # noqa: B018 (a fit computes it too)
    found: dict[str, Any] = {"ms per step, phase 1": ms_a_step(order, 0), "phase 2": ms_a_step(order, phase1)}
    found["pickle, MiB"] = len(pickle.dumps(order, protocol=5)) / 2**20
    return found | {"order": order}


def parts(scores: Scores) -> dict[str, Callable[[], Any]]:
    rows = scores.scored.num_rows
    halves = Shares(("a", "b"), (0.3, 0.7), (0, rows // 2, rows))
    return {
        "S(x) from the shards": lambda: row_scores(scores, 10, "zero"),
        "start: highest half": lambda: start(scores, KeepRule()),
        "start: middle, without the top 1%": lambda: start(scores, KeepRule(order="middle", drop_top=0.01)),
        "start: random": lambda: start(scores, KeepRule(order="random")),
        "start: two sources": lambda: start(scores, KeepRule(), halves),
        "report": lambda: score_report.write(scores, KeepRule(), str),
    }


def forked(work: Callable[[], Found]) -> Found:
    """Returns the result of `work` in a forked process, which starts after the imports."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(work).result()


def measure(run: Path, name: str) -> dict[str, Any]:
    work = parts(Scores(run, "--run"))[name]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, began = resident("VmRSS"), time.perf_counter()
    found = work()
    seconds, peak, after = time.perf_counter() - began, resident("VmHWM"), resident("VmRSS")
    more = {key: value for key, value in found.items() if key != "order"} if isinstance(found, dict) else {}
    return {"s": seconds, "peak, MiB": (peak - before) / 2**20, "remains, MiB": (after - before) / 2**20, **more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    columns = "s", "peak, MiB", "remains, MiB", "ms per step, phase 1", "phase 2", "pickle, MiB"
    print("| rows | |", " | ".join(columns), "|\n|--:|---|" + "--:|" * len(columns))
    for rows in [20_000] if args.tiny else args.rows:
        with tempfile.TemporaryDirectory() as folder:
            forked(partial(write, Path(folder), rows, args.tokens))
            for name in list(parts(Scores(folder, "--run")))[:: 5 if args.tiny else 1]:
                found = forked(partial(measure, Path(folder), name))
                cells = (f"{found[column]:,.1f}" if column in found else "" for column in columns)
                print(f"| {rows:,} | {name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
