"""benchmarks/study.py: the contents and order of its queue, its report, and a few real cells."""

import json
import math
import os
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import study_report  # noqa: E402
from conftest import WORDS  # noqa: E402
from study import SEEDS, SIZES, Study, model  # noqa: E402


def test_results_with_another_teacher_stay_apart(tmp_path):
    def of_seed(seed: int, state: str, work: str) -> Study:
        study = Study("tiny", tmp_path / state, tmp_path / work)
        study.size = replace(study.size, teacher_seed=seed)
        return study

    assert of_seed(17, "state", "work").run(0, "none") == 0
    assert of_seed(23, "state-23", "work-23").run(0, "none") == 0
    assert "teacher-s23" in {cell.name for cell in of_seed(23, "state-23", "work-23").cells()}
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier/results.jsonl").touch()  # of a version without this option
    for seed, state, work in ((23, "state", "work-23"), (23, "state-23", "work"), (17, "state-23", "work"),
                              (23, "earlier", "work-23")):  # fmt: skip
        with pytest.raises(SystemExit, match=f"has cells with the teacher of seed {40 - seed}; give other --state"):
            of_seed(seed, state, work).run(0, "none")


def queue(tmp_path, **losses: float) -> Study:
    """A study of size "gpu" whose cells with these names (baseline_lr0_001_s0) have these losses."""
    study = Study("gpu", tmp_path, tmp_path)
    for name, loss in losses.items():
        cell = name.replace("lr0_", "lr0.").replace("_", "-")
        study.done[cell] = {"cell": cell, "val/ce": loss, "wall_s": 1.0, "planned_s": 1.0, "part": "sweep"}
    return study


TUNED = {"baseline_lr0_001_s0": 3.4, "baseline_lr0_002_s0": 3.2, "baseline_lr0_004_s0": 3.1, "baseline_lr0_008_s0": 3.3}


def test_nothing_runs_before_the_learning_rate_is_decided(tmp_path):
    study = queue(tmp_path)
    ready = {cell.name for cell in study.cells() if not cell.needs}
    assert {name.split("-lr")[0] for name in ready} == {"baseline", "large-baseline"}
    assert len(SIZES["gpu"].rates) >= 4
    assert len(SIZES["gpu"].large_rates) >= 4
    teachers = [cell for cell in study.cells() if cell.part == "teacher"]
    for cell in study.cells():
        assert set(cell.needs) <= {other.name for other in study.cells()} | {"baseline-lr0-s0"}  # rate not chosen
        path = cell.settings.get("model.teacher.path")
        if path and cell.part != "score":  # a cell with a teacher waits for the teacher that it names
            assert {f"{t.name}" for t in teachers if path.endswith(f"/{t.row}")} <= set(cell.needs)
            assert any(path.endswith(f"/{t.row}") for t in teachers)


def test_a_best_rate_at_the_end_brings_another_and_an_inner_one_is_frozen(tmp_path):
    study = queue(tmp_path, **{**TUNED, "baseline_lr0_008_s0": 3.0})
    swept = [c for c in study.cells() if c.part == "sweep" and c.row.startswith("baseline")]
    assert [c.settings["model.optim.lr"] for c in swept] == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]
    assert all(c.settings["model.optim.lr"] == 0 for c in study.cells() if c.part == "main")  # undecided
    study = queue(tmp_path, **TUNED)
    assert {c.settings["model.optim.lr"] for c in study.cells() if c.part in ("main", "reached")} == {4e-3}


def test_the_queue_holds_the_rows_of_the_study(tmp_path):
    cells = queue(tmp_path, **TUNED).cells()
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    assert SEEDS == (0, 1, 2)
    every = ("baseline-lr0.004", "rkd", "salt", "salt-ds", "random", "large-salt", "salt-f0.7", "salt-f0.9")
    for row in (*every, "baseline-lr0.002", "half-lr-salt"):
        assert {cell.seed for cell in cells if cell.row == row} == set(SEEDS), row
    rows = {cell.row: cell for cell in cells}
    rates = {row: rows[row].settings["model.optim.lr"] for row in ("salt", "half-lr-salt", "baseline-lr0.002")}
    assert rates == {"salt": 4e-3, "half-lr-salt": 2e-3, "baseline-lr0.002": 2e-3}
    assert {"baseline-f0.7", "baseline-f0.8", "baseline-f0.9", "gap", "weak-teacher", "high-lr-baseline"} < set(rows)
    salt = rows["salt"].settings
    assert (salt["kd.weight"], salt["kd.steps"], salt["trainer.max_steps"]) == (0.667, 1000, 5000)
    changed = {
        row: {key: value for key, value in rows[row].settings.items() if value != salt.get(key)}
        for row in ("kd-10", "kd-40", "omega-0.3", "omega-0.9", "T-2", "rkd", "linear")
    }
    assert changed == {
        "kd-10": {"kd.steps": 500}, "kd-40": {"kd.steps": 2000}, "omega-0.3": {"kd.weight": 0.3},
        "omega-0.9": {"kd.weight": 0.9}, "T-2": {"model.teacher_temperature": 2.0}, "rkd": {"kd.steps": None},
        "linear": {"kd.steps": 1500, "kd.anneal_steps": 1000, "kd.shape": "linear"},
    }  # fmt: skip
    without = rows["without-kd"].settings
    assert without["kd.weight"] == 0
    assert without["data.selection"] == rows["salt-ds"].settings["data.selection"]


def test_cells_beside_the_plan(tmp_path):
    """--more: any experiment with another seed, rate, warm-up or length; cells of the plan are not repeated."""
    study = Study(
        "cpu-long", tmp_path, tmp_path, ["rkd-s5", "long-teacher-more-kd-f0.5-s1", "without-kd-s2", "salt-s0"]
    )
    cells = {cell.name: cell for cell in study.cells()}
    assert len(cells) == len(study.cells())
    assert cells["salt-s0"].part == "main"
    seed, short, chosen = (cells[name] for name in study.more[:3])
    assert (seed.row, seed.seed, seed.settings) == ("rkd", 5, cells["rkd-s0"].settings)
    assert short.row == "long-teacher-more-kd-f0.5"
    assert (short.settings["kd.steps"], short.settings["trainer.max_steps"]) == (320, 800)
    assert "long-s17" in short.needs
    assert "score-s17" not in short.needs
    assert "score-s17" in chosen.needs
    (faster,) = Study("cpu-long", tmp_path, tmp_path, ["salt@0.008-f0.5-s1"]).cells()[-1:]
    assert (faster.name, faster.row) == ("salt@0.008-f0.5-s1", "salt@0.008-f0.5")
    assert (faster.settings["model.optim.lr"], faster.settings["trainer.max_steps"]) == (0.008, 800)
    (steadier,) = Study("cpu-long", tmp_path, tmp_path, ["salt@0.008-w0.2-f0.5-s1"]).cells()[-1:]
    assert steadier.settings == {**faster.settings, "model.optim.warmup_steps": 320}
    for name in ("nothing-s0", "salt", "salt@fast-s0", "high-lr-salt-f0.5-s1", "salt-w0.6-f0.5-s1"):
        with pytest.raises(SystemExit, match=rf"--more {name}: ROW\[@RATE\].*, ROW one of base"):
            Study("cpu-long", tmp_path, tmp_path, [name]).cells()


def test_half_the_rate_and_the_larger_student_have_lengths_of_their_own(tmp_path):
    names = ["half-lr-salt-f0.7-s1", "large-salt-f0.8-s0", "large-half-lr-salt-s2", "large-half-lr-baseline-s0"]
    study = Study("cpu-long", tmp_path, tmp_path, names)
    for row, best in {"baseline": 8e-3, "large-baseline": 2e-3}.items():
        for rate in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 16e-3):
            study.done[f"{row}-lr{rate:g}-s0"] = {"val/ce": abs(rate - best), "row": row}
    cells = {cell.name: cell for cell in study.cells()}
    half, large, slow, plain = (cells[name] for name in names)
    assert (half.settings["model.optim.lr"], half.settings["trainer.max_steps"]) == (4e-3, 1120)
    assert (large.settings["model.optim.lr"], large.settings["kd.steps"]) == (2e-3, 256)
    whole = cells["large-salt-s0"].settings
    assert slow.settings == whole | {"model.optim.lr": 1e-3}
    assert plain.settings == cells["large-baseline-lr0.002-s1"].settings | {"model.optim.lr": 1e-3}
    assert {"large-teacher-s17", "teacher-s17"} <= {*large.needs, *half.needs}


def test_a_changed_learning_rate_curve_is_run_as_baseline_too(tmp_path):
    """Every SALT cell has a BASELINE with the same optimizer, steps and first part."""

    def curve(cell):
        shared = {**cell.settings, **(cell.first or {})}
        return json.dumps({k: v for k, v in shared.items() if k.startswith(("model.optim", "trainer.max_steps"))}), (
            json.dumps(cell.settings["model.student.config"])
        )

    cells = queue(tmp_path, **TUNED).cells()
    baselines = {curve(cell) for cell in cells if cell.settings.get("kd.weight") == 0 and cell.part != "teacher"}
    assert {curve(cell) for cell in cells if cell.settings.get("kd.weight")} <= baselines


def test_a_run_at_f_is_complete(tmp_path):
    cells = {cell.name: cell.settings for cell in queue(tmp_path, **TUNED).cells()}
    short, whole = cells["salt-f0.7-s1"], cells["salt-s1"]
    for key in ("trainer.max_steps", "kd.steps"):
        assert short[key] == 0.7 * whole[key]
    assert short["model.optim.warmup_steps"] == whole["model.optim.warmup_steps"]
    assert short["trainer.max_steps"] % short["trainer.val_check_interval"] == 0  # its last step is validated


def test_the_sizes_of_the_models():
    def parameters(shape, vocab):
        config = model(*shape)
        width, inner = config["hidden_size"], config["intermediate_size"]
        return vocab * width + config["num_hidden_layers"] * (4 * width**2 + 3 * width * inner)

    size = SIZES["gpu"]
    student, large = (parameters(shape, size.vocab) / 1e6 for shape in (size.student, size.large))
    assert (round(student), round(large)) == (15, 40)
    assert parameters(size.teacher, size.vocab) / 1e6 / student == pytest.approx(0.5, abs=0.03)
    assert parameters(size.large_teacher, size.vocab) / 1e6 / large == pytest.approx(0.5, abs=0.03)
    assert parameters(size.weak, size.vocab) / 1e6 / student == pytest.approx(0.25, abs=0.03)


def test_reached_at():
    shares, losses = [0.7, 0.8, 0.9, 1.0], [3.4, 3.2, 3.0, 2.9]
    assert study_report.reached_at(shares, losses, 3.1) == pytest.approx(0.85)
    assert study_report.reached_at(shares, losses, 3.5) == 0.7
    assert math.isnan(study_report.reached_at(shares, losses, 2.8))


def test_bootstrap():
    def row(*losses):
        return {seed: {"val/ce": loss} for seed, loss in enumerate(losses)}

    certain = {0.8: row(3.2, 3.2), 0.9: row(3.0, 3.0)}
    assert study_report.bootstrap(row(3.1, 3.1), certain) == (pytest.approx(0.85), pytest.approx(0.85))
    low, high = study_report.bootstrap(row(3.1, 3.1), {0.8: row(3.3, 3.1), 0.9: row(3.0, 3.2)})
    assert low == pytest.approx(0.8)
    assert math.isinf(high)  # both draws of f = 0.9 may be 3.2


def test_crossing_counts_the_teacher_while_it_was_there():
    record = {"curve": [[50, 4.0], [100, 3.0]], "steps": 100, "flops_student": 100.0, "flops_teacher": 20.0}
    record["settings"] = {"kd.steps": 20}
    assert study_report.crossing(record, 3.5, 100.0) == (0.75, pytest.approx(0.95))
    record["settings"] = {"kd.steps": None}
    assert study_report.crossing(record, 3.5, 100.0) == (0.75, pytest.approx(0.90))


# ----------------------------------------------------------------- real cells


def write_sources(folder: Path) -> Path:
    for name, count in (("train", 240), ("valid", 40)):
        rng = random.Random(count)
        with open(folder / f"{name}.jsonl", "w") as out:
            for i in range(count):
                source = ("books", "code", "speeches")[i % (3 if name == "train" else 2)]
                text = " ".join(rng.choices(WORDS[:6] if source == "books" else WORDS, k=rng.choice([10, 40, 80])))
                out.write(json.dumps({"id": f"{name}{i}", "source": source, "text": text}) + "\n")
    return folder / "train.jsonl"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """tiny(*arguments) runs study.py in a separate folder and process: it forks, and this process has threads."""
    folder = tmp_path_factory.mktemp("study")
    env = os.environ | {"CORPUS": str(write_sources(folder))}

    def run(*arguments: str) -> str:
        command = [sys.executable, str(ROOT / "benchmarks/study.py"), "run", "--size", "tiny", *arguments]
        done = forked.run(command, timeout=280, env=env, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.folder = folder
    return run


CELLS = r"^(baseline-lr.*-s0|teacher-s17|score-s17|(salt|salt-ds|salt-f0.5|high-lr-salt|half-lr-salt)-s0)$"


@pytest.fixture(scope="module")
def first_start(tiny) -> str:
    return tiny("--only", CELLS)


def records(tiny) -> dict[str, dict]:
    lines = (tiny.folder / "runs/study-tiny/results.jsonl").read_text().splitlines()
    found = {record["cell"]: record for record in map(json.loads, lines)}
    assert len(found) == len(lines)
    return found


def test_cells_of_each_kind(tiny, first_start):
    found = records(tiny)
    assert "failed: none" in first_start
    assert {"teacher-s17", "score-s17", "salt-s0", "salt-ds-s0", "salt-f0.5-s0", "high-lr-salt-s0"} < set(found)
    salt = found["salt-s0"]
    assert {"val/ce", "val/ce/books", "val/ce/code", "val/ce/ood", "flops_teacher", "seconds"} < set(salt)
    low, high = sorted((salt["val/ce/books"], salt["val/ce/code"]))
    assert low <= salt["val/ce"] <= high  # neither contains the held-out source
    assert [step for step, _ in found["salt-f0.5-s0"]["curve"]] == [1, 2, 3, 4, 5]
    assert salt["flops_student"] == found["salt-ds-s0"]["flops_student"] == 2 * found["salt-f0.5-s0"]["flops_student"]
    assert (
        0 < salt["flops_teacher"] < 0.2 * salt["flops_student"]
    )  # a smaller model's forward, for a fifth of the steps


def test_the_source_held_out_is_never_trained_on(tiny, first_start):
    corpus = tiny.folder / "cache/study-tiny/corpus"

    def sources(name):
        return {json.loads(line)["source"] for line in (corpus / f"{name}.jsonl").read_text().splitlines()}

    assert (sources("train"), sources("valid"), sources("ood")) == ({"books", "code"}, {"books", "code"}, {"speeches"})


def test_finished_cells_are_skipped_and_a_killed_one_goes_on(tiny, first_start):
    before = records(tiny)
    state, run = tiny.folder / "runs/study-tiny", tiny.folder / "cache/study-tiny/runs/high-lr-salt-s0"
    kept = [json.dumps(record) + "\n" for name, record in before.items() if name != "high-lr-salt-s0"]
    (state / "results.jsonl").write_text("".join(kept))
    for file in run.glob("checkpoints/step-00000010.ckpt*"):  # the state after a kill at the end of the first part
        file.unlink()
    out = tiny("--only", CELLS)
    assert out.count("minutes expected") == 1
    assert (
        "--ckpt_path=last" in (run / "log.txt").read_text().splitlines()[-20:][0]
        or "ckpt_path last" in (run / "log.txt").read_text()
    )
    after = records(tiny)["high-lr-salt-s0"]
    assert after["val/ce"] == before["high-lr-salt-s0"]["val/ce"]  # bit for bit on a CPU


def test_a_cell_that_the_time_stops_is_no_failure(tmp_path, monkeypatch, capsys):
    """When `study.py run --minutes 9` is repeated, each start but the last ends in the middle of a cell."""
    study = queue(tmp_path)
    monkeypatch.setattr(study, "_in_child", lambda cell, deadline: time.sleep(0.1))  # returns None, like a killed cell
    monkeypatch.setattr(study, "minutes", lambda cell: 0.0005)
    assert study.run(0.001, "") == 0
    assert capsys.readouterr().out.count("is out of time") == 1
    monkeypatch.setattr(study, "_in_child", lambda cell, deadline: None)
    assert study.run(1, "^baseline-lr0.001-s0") == 1


def test_the_report(tiny, first_start):
    state = tiny.folder / "runs/study-tiny"
    out, found = study_report.report(Study("tiny", state, tiny.folder)), records(tiny)
    assert f"{found['salt-s0']['val/ce']:.4f}" in next(line for line in out.splitlines() if line.startswith("| salt "))
    assert "### Reached at f: salt" in out
    half = found["half-lr-salt-s0"]["val/ce"] - found["baseline-lr0.015-s0"]["val/ce"]  # BASELINE at the same rate
    assert f" {half:+.4f} " in next(line for line in out.splitlines() if line.startswith("| half-lr-salt "))
    base, salt = (
        [float(line.split("|")[column]) for third in ("easy", "medium", "hard") for line in out.splitlines()
         if line.startswith(f"| val/ce/{third} ")]
        for column in (2, 3)
    )  # fmt: skip
    assert min(base) < found["baseline-lr0.03-s0"]["val/ce"] < max(base)  # val/ce is the mean over the thirds
    assert min(salt) < found["salt-s0"]["val/ce"] - found["baseline-lr0.03-s0"]["val/ce"] < max(salt)
    assert "Not run: " in out
    assert (state / "main/compare.png").exists()
