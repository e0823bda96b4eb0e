"""What grows in a long run: memory, open files, threads, the time of a step, and the run's folder.

    OMP_NUM_THREADS=1 python benchmarks/long_run.py        any CPU, about five minutes
    python benchmarks/long_run.py --steps 60               seconds: shows that it runs

One fit of a tiny SALT student with `cli.py`; the teacher leaves after half of the steps. Each step is logged; each 50th
is validated and saved. Anonymous memory leaves out mapped files, which the system takes back.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))  # for Sample

from salt_lightning import cli

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "tie_word_embeddings": True}
SETTINGS = {
    "data.vocab_size": 300, "data.block_size": 32, "data.global_batch_size": 4, "data.micro_batch_size": 2,
    "data.val_fraction": 0.05, "data.val_rows": 16, "model.optim.warmup_steps": 5, "trainer.accelerator": "cpu",
    "trainer.log_every_n_steps": 1, "trainer.enable_progress_bar": False, "checkpoint.every_n_steps": 50,
}  # fmt: skip


class Sample(pl.Callback):
    """Prints a row of the table ten times in a run."""

    def __init__(self) -> None:
        self._done, self._cpu_s = 0, 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, every = trainer.global_step, max(1, trainer.max_steps // 10)
        if step % every or step == self._done:
            return
        cpu_s, steps = time.process_time(), step - self._done
        took = f"{1e3 * (cpu_s - self._cpu_s) / steps:.1f}" if self._done else "-"  # the first has the start
        self._done, self._cpu_s = step, cpu_s
        anonymous = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
        memory = f"{int(anonymous[1]) / 1024:,.1f}" if anonymous else "-"
        teacher = "loaded" if pl_module.teacher else "gone"
        run = Path(trainer.default_root_dir)
        kb = [sum(file.stat().st_size for file in run.glob(part)) // 1000 for part in ("*tfevents*", "checkpoints/*")]
        found = f"{step:,}", teacher, memory, len(os.listdir("/proc/self/fd")), threading.active_count(), took, *kb
        print("|", " | ".join(map(str, found)), "|", flush=True)


def fit(run: Path, **settings: object) -> None:
    given = {**SETTINGS, "run": str(run), **settings}
    words = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in given.items()]
    if code := cli.main(["fit", *words]):
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        work, draw = Path(folder), random.Random(0)
        words = [f"word{i}" for i in range(300)]
        texts = [json.dumps({"text": " ".join(draw.choices(words, k=60))}) for _ in range(2000)]
        (work / "text.jsonl").write_text("\n".join(texts))
        text = {"data.source": str(work / "text.jsonl"), "data.cache_dir": str(work / "cache")}
        small, large = ({**SIZES, "hidden_size": width} for width in (16, 32))
        alone = {"kd.weight": 0.0, "trainer.max_steps": 20, "trainer.val_check_interval": 20}
        fit(work / "teacher", **text, **alone, **{"model.student.config": small})
        print("| step | teacher | anonymous MiB | files | threads | CPU ms per step | log, KB | checkpoints, KB |")
        print("|--:|---|--:|--:|--:|--:|--:|--:|", flush=True)
        salt = {"model.teacher.path": str(work / "teacher/checkpoints/step-00000020.ckpt"), "kd.steps": steps // 2}
        salt |= {"kd.allow_untrained": True}
        often = {
            "trainer.max_steps": steps,
            "trainer.val_check_interval": min(50, steps),
            "trainer.callbacks+": "long_run.Sample",
        }
        fit(work / "run", **text, **salt, **often, **{"model.student.config": large})


if __name__ == "__main__":
    main()
