"""The benchmarks run from end to end at tiny sizes; their figures mean nothing here."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(name: str, *options: str) -> str:
    command = [sys.executable, ROOT / "benchmarks" / name, "--tiny", *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # several threads of one process would wait for each other
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_head_loss():
    out = run("head_loss.py")
    times = re.findall(r"^\| (.+?) \| +([\d.]+) \(", out, re.M)
    assert [name for name, _ in times[:6]] == [
        "floor", "ours, accurate", "ours, fast", "ours, accurate, 0.5 GiB", "ours, fast, 0.5 GiB", "naive fp32",
    ]  # fmt: skip
    errors = re.findall(r"^\| ours, accurate \| (far|near) \|.*\| ([\d.]+) \|$", out, re.M)
    assert [teacher for teacher, _ in errors] == ["far", "near"]
    assert all(float(ratio) <= 1.2 for _, ratio in errors)


def test_step():
    row = next(line for line in run("step.py").splitlines() if line.startswith("| tiny"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == 13
    assert float(cells[4]) > 1  # the teacher's forward costs FLOPs
    full, chunks, _ = map(float, cells[8].split(", "))  # that all compute the same loss the script asserts
    assert full > 0
    assert chunks > 0


def test_step_after_the_boundary():
    row = next(line for line in run("step.py", "--boundary").splitlines() if line.startswith("| tiny"))
    after_ms, baseline_ms = (float(cell) for cell in row.split("|")[2:4])
    assert after_ms > 0
    assert baseline_ms > 0


def test_scoring():
    out = run("scoring.py")
    assert re.search(r"^\| tiny \| [\d.]+ \(.*\| [\d.]+% \|$", out, re.M)
    assert re.search(r"^\| tiny, `cli.py predict` \|", out, re.M)
    assert re.search(r"^\| tiny, default \| [\d.]+ \(.*\| [+-][\d.]+% \|$", out, re.M)


def test_memory():
    """Known but for what the kernels of a CPU take themselves: blocks of the row pass, 1 MiB each, of some 60 MiB."""
    row = next(line for line in run("memory.py").splitlines() if line.startswith("| tiny"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert all(0.95 < float(ratio) < 1.05 for ratio in (cells[3], cells[6])), row
    assert float(cells[5].replace(",", "")) < float(cells[2].replace(",", ""))  # the teacher has left
