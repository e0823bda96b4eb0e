"""The benchmarks run from end to end at tiny sizes; their figures mean nothing here."""

import importlib.util
import json
import math
import os
import re
import runpy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from conftest import built

from salt_lightning import models

# from importing Inductor
pytestmark = pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")
ROOT = Path(__file__).parents[1]


LIGER = """
import torch

class LigerFusedLinearJSDLoss:  # beta 0: forward KL
    def __init__(self, weight_hard_loss, weight_soft_loss, beta):
        self.hard, self.soft = weight_hard_loss, weight_soft_loss

    def __call__(self, s, w, t, v, labels):
        logits, target = (s @ w.T).float(), (t @ v.T).float().log_softmax(-1)
        kl = torch.nn.functional.kl_div(logits.log_softmax(-1), target, reduction="batchmean", log_target=True)
        return self.hard * torch.nn.functional.cross_entropy(logits, labels) + self.soft * kl
"""


@pytest.fixture
def run_apart(monkeypatch, capfd):
    """run_apart(name, *options) -> the output of a benchmark that only starts other processes: here, forked ones.

    `own`: words that follow each of their commands.
    """

    def run_here(name: str, *options: str, own: tuple[str, ...] = ()) -> str:
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        monkeypatch.setattr(subprocess, "Popen", lambda command, **how: forked.Popen([*command, *own], **how))
        monkeypatch.setattr(sys, "argv", [name, *options])
        capfd.readouterr()
        runpy.run_path(str(ROOT / "benchmarks" / name), run_name="__main__")
        return capfd.readouterr().out

    return run_here


def run(name: str, *options: str, **variables: str) -> str:
    command = [sys.executable, ROOT / "benchmarks" / name, *(options or ["--tiny"])]
    done = forked.run(command, env=os.environ | variables)
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


@pytest.mark.filterwarnings("ignore")  # as the script does
def test_a_family_whose_gradients_are_no_numbers_is_not_exact(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    spec = importlib.util.spec_from_file_location("families_of_benchmarks", ROOT / "benchmarks/families.py")
    families = importlib.util.module_from_spec(spec)  # the tests have a module of that name
    spec.loader.exec_module(families)
    families.write_text(tmp_path / "text.jsonl")
    plain = families.plain

    def spoiled(*args):
        loss, gradients = plain(*args)
        return loss, gradients | {list(gradients)[3]: torch.tensor(math.nan)}

    monkeypatch.setattr(families, "plain", spoiled)
    kind, said = families.verdict("llama", "llama", tmp_path)
    assert kind == "DIFFERS", said


def test_families():
    rows = re.findall(r"^\| (\S+) \| (\w[\w ]*) \|", run("families.py", "llama", "gpt2:cohere", "gemma2", "emu3"), re.M)
    assert rows == [("llama", "exact"), ("gpt2:cohere", "exact"), ("gemma2", "refused"), ("emu3", "not tried")]


def test_step(tmp_path, run_apart, monkeypatch):
    (tmp_path / "liger_kernel").mkdir()
    (tmp_path / "liger_kernel" / "chunked_loss.py").write_text(LIGER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = run_apart("step.py", "--tiny")
    row = next(line for line in out.splitlines() if line.startswith("| tiny"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == 15
    assert all(0 < float(ms) < 10_000 for ms in cells[13].split(" / "))  # of the host
    assert float(cells[4]) > 1  # the teacher's forward costs FLOPs
    plain = [cell.split(" ± ") for cell in cells[6:9]]  # hand-written loop, full logits, transformers
    assert all(float(ratio) > 0 and float(width) >= 0 for ratio, width in plain)  # NaN if one computes another loss
    assert all(float(rival) > 0 for rival in cells[9].split(", "))


def test_a_loop_that_compiles_for_minutes_does_not_cost_those_before_it(monkeypatch):
    """The deadline may stop the first turn, in which the loops compile: what is measured by then has been saved."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    step = importlib.import_module("step")
    plugin = SimpleNamespace(train_step_context=nullcontext)
    module = SimpleNamespace(
        student=None, teacher=None, device=torch.device("cpu"), kd_weight=torch.zeros(()),
        trainer=SimpleNamespace(precision_plugin=plugin),
    )  # fmt: skip
    monkeypatch.setattr(step.Loops, "_check", lambda self, kind: 0.0)
    monkeypatch.setattr(step.Loops, "_run", lambda self, kind, steps: 1.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    loops, saved = step.Loops(module, optimizer, [], ["transformers", "hand"]), []
    for _ in range(2):
        loops.take_turn(3, lambda: saved.append({kind: len(ms) for kind, ms in loops.milliseconds.items()}))
    once, twice = ({"hand": n, "transformers": n} for n in (1, 2))
    assert saved == [once | {"transformers": 0}, once, once, twice]


def test_only_some_of_the_loops(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    step, commands = importlib.import_module("step"), []
    monkeypatch.setattr(step.subprocess, "run", lambda command, **_: commands.append(command))
    names = ["kd_ms", "plain_ms", "flop_ratio", "student_flops", "steady", "burst", "peak", "plain_to_hand"]
    (tmp_path / "tiny.json").write_text(json.dumps({"size": "tiny", **dict.fromkeys(names, 2.0)}))
    row = step.line_of("tiny", tmp_path, 9.0, False, ["hand"]).split(" | ")
    assert commands[0][-2:] == ["--loops", "hand"]
    assert [cell.split()[0] for cell in row[6:9]] == ["2.000", "nan", "nan"]


@pytest.mark.filterwarnings("ignore")  # as the script does
def test_logit_tiles_start_no_table_after_the_deadline():
    assert run("logit_tiles.py", "--tiny", "--deadline", "0").count("skipped: the deadline has passed") == 2


@pytest.mark.parametrize("name", ["124m", "350m", "1.3b", "2.8b", "paper"])
def test_the_sizes_for_a_gpu_are_what_they_are_called(name, tmp_path, monkeypatch):
    """Builds a fit of each size, without weights."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    step = importlib.import_module("step")
    for written in ("write_text", "save_model"):
        monkeypatch.setattr(step, written, lambda *_: None)
    settings = step.settings_of(name, tmp_path) | {
        "run": tmp_path,
        "trainer.max_steps": step.PAIRS[name].steps * step.BLOCKS,
    }
    command = built(*(f"--{key}={value}" for key, value in settings.items()))
    command.model.optim_spec.check(command.trainer.max_steps)
    command.datamodule.tokenizer_name = "train"
    student = models.build_empty(command.model.student_spec, command.datamodule)
    millions = sum(p.numel() for p in student.parameters()) / 1e6
    assert millions == pytest.approx({"124m": 124, "350m": 350, "1.3b": 1300}.get(name, 2800), rel=0.1)


def test_step_after_the_boundary(run_apart):
    row = next(line for line in run_apart("step.py", "--tiny", "--boundary").splitlines() if line.startswith("| tiny"))
    after_ms, baseline_ms = (float(cell) for cell in row.split("|")[2:4])
    assert after_ms > 0
    assert baseline_ms > 0


def test_selection():
    lines = [line.split("|")[2:] for line in run("selection.py").splitlines() if line.startswith("| 20,000")]
    assert [line[0].strip() for line in lines] == ["S(x) from the shards", "report"]
    assert all(float(cell) > 0 for line in lines for cell in line[1:4])


class Repeats(torch.nn.Module):
    """Knows nothing of a first reading, and gives the right token e**2 times the weight of any other in the second."""

    def forward(self, ids_BT):
        rows, width = ids_BT.shape
        logits_BTV = torch.zeros(rows, width, 300)
        again = torch.arange(width // 2, width - 1)
        logits_BTV[:, again] += 2.0 * torch.nn.functional.one_hot(ids_BT[:, again + 1], 300)
        return SimpleNamespace(logits=logits_BTV)


def test_copying(teacher, corpus, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    copying = importlib.import_module("copying")
    gained = math.log(300) + 2 - math.log(math.e**2 + 299)
    ids_RT = torch.arange(40 * 16).view(40, 16) % 300
    assert copying.gain(Repeats(), ids_RT) == pytest.approx(gained, rel=1e-5)
    monkeypatch.setattr(sys, "argv", ["copying.py", str(corpus), str(teacher)])
    copying.main()
    row = capsys.readouterr().out.splitlines()[-1]
    assert (
        abs(float(row.removeprefix(f"| {teacher} |").strip(" |"))) < 0.2
    )  # trained for a few steps, it copies nothing


def test_scoring():
    out = run("scoring.py")
    assert re.search(r"^\| tiny \| [\d.]+ \(.*\| [\d.]+% \|$", out, re.M)
    assert re.search(r"^\| tiny, `cli.py predict` \|", out, re.M)
    assert re.search(r"^\| tiny, default \| [\d.]+ \(.*\| [+-][\d.]+% \|$", out, re.M)


def test_memory():
    """The estimate holds except for memory of CPU kernels: row pass blocks of 1 MiB each, in about 60 MiB."""
    row = next(line for line in run("memory.py").splitlines() if line.startswith("| tiny"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert all(0.95 < float(ratio) < 1.05 for ratio in (cells[3], cells[6])), row
    assert float(cells[5].replace(",", "")) < float(cells[2].replace(",", ""))  # the teacher has left


def test_export_memory():
    out = run("export_memory.py")
    rows = re.findall(r"^\| (file|shards) \| (.+?) \| (\d+) \| (\d+) \| [\d.]+ \|$", out, re.M)
    assert [way for _, way, *_ in rows] == [
        *("ours", "ours, to bf16", "torch.load, save_pretrained"),
        *("ours", "ours, to bf16", "dcp_to_torch_save before these"),
    ]
    assert all(int(peak) < 200 for *_, peak in rows)


def test_strategies_are_compared(run_apart):
    """With one process each, so in fewer micro-batches than four would take; tests/test_parallel.py uses several."""
    out = run_apart("parallel.py", "--processes", "4", "--only", "FSDP2 1", own=("--data.micro_batch_size=8",))
    (row,) = re.findall(r"^\| FSDP2 1 \| 1 to 20 \| (.+) \| - / - \|$", out, re.M)
    assert [float(difference) for difference in row.split("|")] == [0, 0, 0, 0]


def test_what_stopped_a_node_is_not_lost_behind_torchruns_traceback(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    reason = importlib.import_module("parallel").reason
    own = "[rank0]:   File cli.py\n[rank0]: RuntimeError: the mesh is torn\nerror: --data.source: none\n"
    said = reason(own + "Traceback of torchrun\n" * 200)
    assert said.startswith("[rank0]: RuntimeError: the mesh is torn\nerror: --data.source: none\n")
    assert len(said) < 1700


def test_a_long_run_in_short(run_apart):
    rows = re.findall(
        r"^\| \d+ \| (loaded|gone) \| [\d.]+ \| (\d+) \| \d+ \| .+ \|$", run_apart("long_run.py", "--steps", "60"), re.M
    )
    assert [teacher for teacher, _ in rows] == ["loaded"] * 5 + ["gone"] * 5
    assert int(rows[-1][1]) < int(rows[0][1])  # the teacher's file is closed


def test_data_path(run_apart):
    out = run_apart("data_path.py", "--tiny")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[:2] == "| "]
    assert [row[0] for row in rows[:3]] == ["tokenizing", "ours", "run_clm.py's way"]
    tokens = [int(row[4].replace(",", "")) for row in rows[1:3]]
    assert tokens[0] == pytest.approx(tokens[1], rel=0.03)  # 1% is held out, and theirs drops the last incomplete block
    assert [row[1] for row in rows[4:6]] == ["0", "2"]
    assert all(float(row[-1]) > 0 for row in rows[4:6])
    assert rows[6][0] == "60 steps of 16 rows of 1024 from 0.0625 GiB not in memory"
    assert [row[0] for row in rows[7:]] == ["read when they are needed", "rows known a step ahead"] * 2
