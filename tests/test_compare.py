"""`compare` on synthetic runs whose numbers are all worked out by hand."""

import json
import math
import os
import re
import resource
import signal
import statistics
import struct
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from datetime import date
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from torch.utils.tensorboard import SummaryWriter

from salt_lightning.compare import compare, evaluate, first_reach, main
from salt_lightning.comparison import figure, lineage, report
from salt_lightning.errors import ConfigError
from salt_lightning.run.curves import Curve
from salt_lightning.run.event_log import EventLog
from salt_lightning.run.run_folder import changed, flat
from salt_lightning.run.runlog import read_run

STEPS = 300
# A step is 2 tokens, 0.5 s, 10 student and 5 teacher FLOPs (while it teaches). All CEs are exact in float32.
BASELINE = {100: 5.0, 200: 4.5, 300: 4.0}
SALT = {100: 4.75, 200: 4.25, 300: 3.75}
RKD = {100: 4.75, 200: 4.5, 300: 4.25}


def settings(path, teacher=None, weight=0.0, kd_steps=None, **overrides):
    flat = {
        "seed_everything": 0,
        "run": str(path),
        "trainer.max_steps": STEPS,
        "trainer.callbacks": [{"init_args": {"dirpath": f"{path}/checkpoints"}}],
        "model.teacher.path": teacher,
        "kd.weight": weight,
        "kd.steps": kd_steps,
        "kd.shape": "step",
        "data.selection": None,
    } | overrides
    tree = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def write_run(path, ce, steps=STEPS, log_every=10, student=10, after=0, **config):
    """Writes a run's log. With `after`, the run continued from another run's checkpoint of that step."""
    path.mkdir(parents=True)
    tree = settings(path, **config)
    (path / "config.yaml").write_text(yaml.safe_dump(tree))
    taught = 0 if not tree["model"]["teacher"]["path"] else tree["kd"]["steps"] or STEPS
    with SummaryWriter(str(path), filename_suffix=".start-1") as writer:
        for step in range(after + log_every, steps + 1, log_every):
            writer.add_scalar("train/tokens", 2 * step, step)
            writer.add_scalar("train/time_s", 0.5 * step, step)
            writer.add_scalar("train/teacher_time_s", 0.125 * min(step, taught), step)
            writer.add_scalar("train/flops_student_total", student * step, step)
            if step <= taught:
                writer.add_scalar("train/flops_teacher_total", 5 * step, step)
        for step, value in ce.items():
            writer.add_scalar("val/ce", value, step)
            writer.add_scalar("val/accuracy", 1 / value, step)
            writer.add_scalar("val/bits_per_byte", value / 2, step)
    return path


@pytest.fixture
def three(tmp_path):
    teacher = "elsewhere/teacher"
    return [
        write_run(tmp_path / "baseline", BASELINE),
        write_run(tmp_path / "salt", SALT, teacher=teacher, weight=0.5, kd_steps=60),
        write_run(tmp_path / "rkd", RKD, teacher=teacher, weight=0.5),
    ]


def load(paths):
    return [read_run(Path(path), Path(path).name) for path in paths]


def test_a_reader_that_has_enough_is_no_error(settings, teacher, tmp_path):
    run = Path(teacher).parents[1]
    command = [sys.executable, Path(__file__).parents[1] / "cli.py", "compare", run, "--out", tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert (tmp_path / "compare.md").exists()


def test_every_number_of_three_runs(three):
    comparison = evaluate(load(three))
    assert (comparison.reference, comparison.reference_val_ce, comparison.notes) == ("baseline", 4.0, [])
    baseline, salt, rkd = comparison.rows
    assert [row.method for row in comparison.rows] == ["BASELINE", "SALT step", "RKD"]
    assert [row.val_ce for row in comparison.rows] == [4.0, 3.75, 4.25]
    assert set(salt.last) == {"val/ce", "val/accuracy", "val/bits_per_byte"}
    assert [row.difference for row in comparison.rows] == [0.0, -0.25, 0.25]
    assert [row.bits_per_byte for row in comparison.rows] == [2.0, 1.875, 2.125]
    assert baseline.accuracy == 0.25
    assert (baseline.reached_step, baseline.reached_steps_share, baseline.reached_flops_share) == (300, 1, 1)
    assert salt.reached_step == 250  # half way from 4.25 at 200 to 3.75 at 300
    assert salt.reached_steps_share == 250 / 300
    assert salt.reached_flops_share == (250 * 10 + 60 * 5) / (300 * 10)
    assert math.isnan(rkd.reached_step)
    assert math.isnan(rkd.reached_flops_share)
    assert [row.seconds for row in comparison.rows] == [150, 150, 150]
    assert [row.student_flops for row in comparison.rows] == [3000, 3000, 3000]
    assert [row.teacher_flops for row in comparison.rows] == [0, 300, 1500]
    assert not any(row.running for row in comparison.rows)


def test_what_cannot_be_written_is_named_with_a_remedy(three, tmp_path):
    (tmp_path / "file").write_text("")
    said = r"^\S+/file/compare.\* cannot be written \(File exists\); choose another folder$"
    with pytest.raises(OSError, match=said):
        compare(three, tmp_path / "file")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match=r"/out/compare.\* cannot be written \(File too large\); fix that and try"):
            compare(three, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_equal_points_are_at_the_smallest_common_end(three):
    longer = write_run(three[0].parent / "long", {150: 5.0, 450: 3.0}, 450, **{"trainer.max_steps": 450})
    comparison = evaluate(load([*three, longer]))
    equal = comparison.equal
    assert equal["steps"] == (300, {"baseline": 4.0, "salt": 3.75, "rkd": 4.25, "long": 4.0})
    assert equal["tokens"] == (600, equal["steps"][1])
    assert equal["seconds"] == (150, equal["steps"][1])
    assert comparison.rows[3].reached_steps_share == 1  # of the reference's steps, not its own
    # 3000 FLOPs: salt is at step 270 (2700 + 300) and rkd at 200 (200 * 15)
    assert equal["FLOPs"] == (3000, {"baseline": 4.0, "salt": pytest.approx(3.9), "rkd": 4.5, "long": 4.0})


def test_a_run_that_was_stopped_does_not_draw_the_equal_point_to_its_own(three):
    stopped = write_run(three[0].parent / "stopped", {50: 6.0, 150: 5.5}, 150, seed_everything=1)
    for name, all_of_them in (("done", [*three, stopped]), ("running", [stopped])):
        where, ce = evaluate(load(all_of_them)).equal["steps"]
        assert where == (300 if name == "done" else 150)
        assert math.isnan(ce["stopped"]) == (name == "done")
    assert ce == {"stopped": 5.5}  # nothing better yet
    assert "that all finished runs have reached" in report.markdown(evaluate(load([*three, stopped])))
    assert "that all have reached" in report.markdown(evaluate(load([stopped])))


def test_what_lies_between_two_validations_is_marked(three):
    comparison = evaluate(load(three))
    assert comparison.between == {"steps": [], "tokens": [], "FLOPs": ["salt"], "seconds": []}  # rkd: at 200 exactly
    text = report.markdown(comparison).partition("## Validation CE at")[2]
    assert [*rows_of(text)[0]] == ["run", "at 300 steps", "at 600 tokens", "at 3,000.000 FLOP", "at 150 seconds"]
    assert re.search(r"\| salt +\| +3.7500 \| +3.7500 \| +~3.9000 \| +3.7500 \|", text)
    assert "mean" not in text  # of one seed
    assert "~: linear interpolation between two validations." in text
    again = write_run(three[1].parent / "salt1", SALT, teacher="elsewhere/teacher", weight=0.5, kd_steps=60,
                      seed_everything=1)  # fmt: skip
    assert "~3.9000 (0.0000)" in report.markdown(evaluate(load([*three, again])))
    assert "~" not in report.markdown(evaluate(load(three[:1])))
    large = write_run(three[0].parent / "large", {100: 5.0}, 150, student=10**7, **{"trainer.max_steps": 150})
    (row,) = rows_of(report.markdown(evaluate(load([large]))).partition("## Validation CE at")[2])
    assert [*row][3:] == ["at 1.000 GFLOP", "at 50.0 seconds"]  # after step 100
    late = write_run(three[1].parent / "salt2", {300: 3.75}, teacher="elsewhere/teacher", weight=0.5, kd_steps=60,
                     seed_everything=2)  # fmt: skip
    assert "~-" not in report.markdown(evaluate(load([*three, again, late])))


def test_the_digits_of_a_log_are_not_between_two_validations(tmp_path):
    paths = [write_run(tmp_path / f"{n}", BASELINE, log_every=n, student=0.7, seed_everything=n) for n in (10, 7)]
    assert evaluate(load(paths)).between["FLOPs"] == []


def test_an_equal_point_before_a_runs_first_validation_is_not_made_up(three):
    early = write_run(three[0].parent / "early", {50: 6.0}, 50, **{"trainer.max_steps": 50})
    where, ce = evaluate(load([three[0], early])).equal["steps"]
    assert (where, ce["early"]) == (50, 6.0)
    assert math.isnan(ce["baseline"])
    assert evaluate(load([three[0], early])).between["steps"] == []


@pytest.mark.parametrize(
    ("values", "level", "step"),
    [
        ([5, 4, 3], 3.5, 25),
        ([5, 4, 3], 4, 20),
        ([5, 4, 3], 5, 10),
        ([5, 4, 3], 6, 10),
        ([4, 5, 6], 4.5, 10),  # and worse from there on
        ([5, 4, 3], 2, math.nan),
        ([5, 4, 3 + 9e-6], 3, 30),  # the same but for rounding
        ([5, 4, 3 + 2e-5], 3, math.nan),
        ([5, 3, 4], 3.5, 17.5),  # the first time counts
        ([math.nan, 3, 2], 3.5, 20),
        ([math.inf, 3, 2], 3.5, 20),
        ([5, math.nan, 3], math.nan, math.nan),
    ],
)
def test_first_reach(values, level, step):
    got = first_reach(np.array([10, 20, 30]), np.array(values, dtype=float), level)
    assert got == pytest.approx(step, nan_ok=True)


def test_a_total_between_and_after_the_logged_steps():
    curve = Curve(np.array([10, 20]), np.array([100.0, 200.0]))
    assert curve.totals_at(np.array([0, 5, 10, 15, 20, 26])).tolist() == [0, 50, 100, 150, 200, 260]


@pytest.mark.parametrize(
    ("rows", "kd_steps"),
    [({0: 8, 24: 24}, 33), ({0: 8, 20: 32, 30: 4}, 60), ({0: 8, 45: 16}, 30), ({0: 8, 24: 2, 27: 9}, 26)],
)
def test_a_total_bends_where_a_start_or_the_teacher_ends_between_two_logged_steps(tmp_path, rows, kd_steps):
    """`rows` of a step from a step on. Steps 1, 20, 40 and 60 are logged. The teacher costs half of a student."""
    taught = {"teacher": "t", "weight": 0.5, "kd_steps": kd_steps}
    starts, sizes = list(rows), list(rows.values())
    run = write_run(tmp_path / "run", {}, steps=0, **taught, **{"data.global_batch_size": sizes[-1]})
    for until, size in zip(starts[1:], sizes, strict=False):
        earlier(run, until, **taught, **{"data.global_batch_size": size})
    of_step = [rows[max(start for start in starts if start <= n)] for n in range(60)]
    tokens = [10 * sum(of_step[:n]) for n in range(61)]
    teacher = [5 * sum(of_step[: min(n, kd_steps)]) for n in range(61)]
    with SummaryWriter(str(run), filename_suffix=".start-1") as writer:
        for step in (1, 20, 40, 60):
            writer.add_scalar("train/tokens", tokens[step], step)
            writer.add_scalar("train/flops_student_total", tokens[step], step)
            writer.add_scalar("train/flops_teacher_total", teacher[step], step)
    found = read_run(run, "run")
    for step in range(61):
        assert found.total("train/tokens", step) == pytest.approx(tokens[step])
        assert found.flops(step) == pytest.approx(tokens[step] + teacher[step])


def test_a_teacher_that_comes_back_costs_nothing_in_between(tmp_path):
    """It teaches steps 1 to 25 and, in a larger batch, 41 to 55; steps 1, 20, 40, 60 and 80 are logged."""
    taught, sizes = {"teacher": "t", "weight": 0.5}, {"data.global_batch_size": 2}
    run = write_run(tmp_path / "run", {}, steps=0, kd_steps=55, **taught, **sizes)
    earlier(run, 40, kd_steps=25, **taught, **{"data.global_batch_size": 1})
    rows = [1] * 40 + [2] * 40
    teacher = [5 * sum(rows[n] for n in range(step) if n < 25 or 40 <= n < 55) for step in range(81)]
    with SummaryWriter(str(run), filename_suffix=".start-1") as writer:
        for step in (1, 20, 40, 60, 80):
            writer.add_scalar("train/flops_student_total", 10 * sum(rows[:step]), step)
            writer.add_scalar("train/flops_teacher_total", teacher[step], step)
    found = read_run(run, "run")
    for step in range(81):
        assert found.total("train/flops_teacher_total", step) == pytest.approx(teacher[step])
        assert found.flops(step) == pytest.approx(10 * sum(rows[:step]) + teacher[step])


def test_the_teacher_stops_costing_between_two_logged_steps(tmp_path):
    run = read_run(write_run(tmp_path / "r", SALT, teacher="t", weight=0.5, kd_steps=65), "r")
    assert run.curves["train/flops_teacher_total"].steps[-1] == 60
    assert run.total("train/flops_teacher_total", 300) == 65 * 5
    assert run.flops(4) == 4 * (10 + 5)  # before the first logged step
    # gone before the schedule says so, at a boundary that the run chose: at most until the next logged step
    run.config["kd.steps"] = 200
    assert run.total("train/flops_teacher_total", 300) == 70 * 5


def test_of_a_step_logged_twice_the_later_start_wins_whatever_the_clocks_say(tmp_path, monkeypatch):
    write_run(tmp_path / "r", {}, steps=0)
    for start in range(11):  # each on a machine whose clock is behind the last one's
        monkeypatch.setattr("time.time", lambda now=2e9 - 3600.0 * start: now)
        log = EventLog(tmp_path, name="r", version="", purge_step=101)
        told = pytest.warns(UserWarning, match="clock is behind that of an earlier start of this run, so TensorBoard's")
        with told if start else nullcontext():
            assert log.experiment
        for step in (100 * (start == 0), 200):
            log.log_metrics({"val/ce": step + start}, step)
        log.finalize("success")
    ce = read_run(tmp_path / "r", "r").val_ce
    assert (ce.steps.tolist(), ce.values.tolist()) == ([0, 100, 200], [10.0, 100.0, 210.0])


def test_the_numbers_of_a_step_are_one_record(tmp_path):
    """TensorBoard would open its file for each record."""
    write_run(tmp_path / "r", {}, steps=0)
    log = EventLog(tmp_path, name="r", version="")
    log.log_metrics({"train/loss": torch.tensor(2.5), "val/ce": 3, "pair": {"a": 1.0, "b": 2.0}}, 7)
    log.finalize("success")
    files = [EventFileLoader(str(path)).Load() for path in (tmp_path / "r").glob("*tfevents*")]
    steps = [[v.tag for v in event.summary.value] for events in files for event in events if event.step == 7]
    assert steps == [["train/loss", "val/ce"]]
    assert read_run(tmp_path / "r", "r").val_ce.values.tolist() == [3.0]
    assert len(list((tmp_path / "r").glob("pair_*/*tfevents*"))) == 2  # as Lightning writes several curves in one plot


@pytest.mark.parametrize("value", [None, "high"])
def test_what_is_no_number_is_named_and_the_rest_of_the_step_is_logged(value, tmp_path):
    write_run(tmp_path / "r", {}, steps=0)
    log = EventLog(tmp_path, name="r", version="")
    with pytest.raises(ValueError, match=r"you tried to log (None|high)"):
        log.log_metrics({"mine": value, "val/ce": 3}, 7)
    log.finalize("success")
    assert read_run(tmp_path / "r", "r").val_ce.values.tolist() == [3.0]


def test_a_file_of_another_logger_belongs_to_the_start_before_it(tmp_path):
    path = write_run(tmp_path / "r", {}, steps=0)
    for start, name in enumerate(("10.a.start-1", "20.a.start-2", "30.a")):
        with SummaryWriter(str(tmp_path / "made"), purge_step=100 * start + 1) as writer:
            writer.add_scalar("val/ce", start, 100 * start + 50)
        (made,) = (tmp_path / "made").glob("*tfevents*")
        made.rename(path / f"events.out.tfevents.{name}")
    assert read_run(path, "r").val_ce.steps.tolist() == [50, 150, 250]


def test_a_part_of_an_event_file_beside_it_is_not_read(tmp_path):
    path = write_run(tmp_path / "r", BASELINE)
    (whole,) = path.glob("*tfevents*")
    for name in (f"{whole.name}.filepart", f".{whole.name}.Xy12Zw"):  # as WinSCP and rsync call it
        (path / name).write_bytes(whole.read_bytes()[:400])
    assert (read_run(path, "r").steps_done, read_run(path, "r").damaged) == (STEPS, ())


def test_a_clock_that_is_set_back_within_a_start_loses_nothing(tmp_path):
    path = write_run(tmp_path / "r", {}, steps=0)
    with SummaryWriter(str(path)) as writer:
        for step in range(100, 600, 100):
            writer.add_scalar("val/ce", step, step, walltime=2e9 - step)
    with SummaryWriter(str(path), purge_step=401) as writer:
        writer.add_scalar("val/ce", 9, 500, walltime=1e9)
    assert read_run(path, "r").val_ce.values.tolist() == [100, 200, 300, 400, 9]


@pytest.mark.parametrize("made_up", [b"\xff" * 4, 1 << 63, 1 << 64, 1 << 50], ids=["content", "2^63", "2^64", "2^50"])
def test_an_event_file_that_was_made_up_is_damaged(tmp_path, made_up):
    path = write_run(tmp_path / "r", {100: 4.0}, steps=100)
    (events,) = path.glob("*tfevents*")
    content = made_up if isinstance(made_up, bytes) else b""
    length = struct.pack("<Q", len(content) or made_up % (1 << 64) or (1 << 64) - 1)
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
    with events.open("ab") as file:
        file.write(length + sums[0] + content + sums[1])
    run = read_run(path, "r")
    assert run.last("val/ce") == 4.0
    assert [note.partition(" could be read up to step 100")[0] for note in run.damaged] == [str(events)]


BAD_SETTINGS = {
    "a number that is none": "a: !!int x",
    "an empty number": 'a: !!int ""',
    "a date that is none": "a: 2020-99-99",
    "a prefix alone": "a: 0x_",
    "a long number": "a: " + "9" * 5000,
    "a sexagesimal": "a: " + "1:" * 5000 + "1",
    "text for a step": "kd: {steps: x}",
    "text for a margin": "kd: {stop_margin: x}",
    "no path": 'model: {teacher: {path: "a\\0b"}}',
}


@pytest.mark.parametrize("text", BAD_SETTINGS.values(), ids=BAD_SETTINGS)
@pytest.mark.parametrize("name", ["config.yaml", "config.until-00000050.yaml"])
def test_settings_that_no_run_has_written_are_one_line(tmp_path, text, name):
    path = write_run(tmp_path / "r", {100: 4.0}, steps=100)
    (path / name).write_text(text)
    if name == "config.yaml":
        with pytest.raises(ConfigError, match=rf"^{path}/{name}(:| is not YAML:) ."):
            read_run(path, "r")
    else:
        assert read_run(path, "r").damaged[0].startswith(f"{path}/{name}")


def test_what_is_no_file_is_not_read(tmp_path):
    path = write_run(tmp_path / "r", {100: 4.0}, steps=100, teacher="card", weight=0.5, kd_steps=50)
    (path / "config.until-00000050.yaml").symlink_to("/dev/zero")
    (tmp_path / "card").mkdir()
    os.mkfifo(tmp_path / "card/README.md")
    assert "not a file, or larger than 16 MiB" in read_run(path, "r").damaged[0]
    assert math.isnan(evaluate([read_run(path, "r")]).rows[0].teacher_training_flops)


def test_no_name_reaches_the_terminal_as_it_is(tmp_path, capsys):
    red = "\x1b[31mred"
    paths = [write_run(tmp_path / f"{seed}{red}", {100: 4.0}, **{"kd.shape": red, "run": red}) for seed in "ab"]
    paths.append(write_run(tmp_path / "c", {100: 4.0}, teacher=red, weight=0.5, kd_steps=60, **{"kd.shape": red}))
    assert main([*map(str, paths), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "\\x1b[31mred" in said
    assert "\x1b" not in said


def test_a_seed_is_no_pattern(tmp_path):
    path = write_run(tmp_path / "r", {100: 4.0}, steps=100, seed_everything="0(")
    assert read_run(path, "r").variant


def test_a_resume_voids_what_came_after_its_checkpoint(tmp_path):
    path = write_run(tmp_path / "r", {100: 5.0, 200: 4.5, 250: 9.0})
    with SummaryWriter(str(path), purge_step=151) as writer:
        writer.add_scalar("val/ce", 4.25, 200)
    run = read_run(path, "r")
    assert dict(zip(run.val_ce.steps, run.val_ce.values, strict=True)) == {100: 5.0, 200: 4.25}
    assert run.curves["train/tokens"].steps[-1] == 150
    path = write_run(tmp_path / "all", {200: 4.5})
    with SummaryWriter(str(path), purge_step=151) as writer:
        writer.add_scalar("train/tokens", 302, 151)
    assert "val/ce" not in read_run(path, "all").curves


def test_a_running_run_with_a_half_written_record(three):
    path = write_run(three[0].parent / "more", {100: 4.75}, 150, teacher="t", weight=0.5, kd_steps=30)
    (events,) = path.glob("*tfevents*")
    events.write_bytes(events.read_bytes() + events.read_bytes()[:20])
    comparison = evaluate(load([*three, path]))
    row, group = comparison.rows[-1], comparison.groups[-1]
    assert (row.running, row.steps, row.val_ce, row.student_flops, row.teacher_flops) == (
        True,
        150,
        4.75,
        1500,
        150,
    )
    assert math.isnan(row.difference)  # a loss under way is no result
    assert group.n == 0
    assert math.isnan(group.mean)
    assert math.isnan(comparison.equal["steps"][1]["more"])
    rest = "the rest is damaged or still being written"
    assert comparison.notes == [f"{events} could be read up to step 150: {rest}", "more is at step 150 of 300"]
    assert "| 150 of 300 |" in report.markdown(comparison)


@pytest.mark.parametrize(
    "damage",
    [
        lambda log, start: log[: start + 20],
        lambda log, start: log[: start + 20] + bytes([log[start + 20] ^ 1]) + log[start + 21 :],
        lambda log, start: log[:start] + bytes([log[start] ^ 1]) + log[start + 1 :],
    ],
    ids=["cut off", "a bit of a value", "a bit of a length"],
)
def test_a_damaged_log_is_named_with_the_step_up_to_which_it_was_read(three, tmp_path, damage):
    (events,) = three[1].glob("*tfevents*")
    log, start = events.read_bytes(), 0
    for _ in range(1 + 6 * 5 + 8 * 4):  # the version, 6 steps of 5 values, 8 without a teacher's FLOPs
        start += 16 + int.from_bytes(log[start : start + 8], "little")
    events.write_bytes(damage(log, start))  # the first value of step 150
    comparison = compare(three, tmp_path / "out")
    assert comparison.rows[1].steps == 140
    assert [note for note in comparison.notes if "tfevents" in note] == [
        f"{events} could be read up to step 140: the rest is damaged or still being written"
    ]
    events.write_bytes(b"no log")
    with pytest.raises(ConfigError, match=r"RUN .*salt: no TensorBoard event file .*could be read up to step 0: the r"):
        compare([three[1]], tmp_path / "out")


def test_seeds_of_one_experiment_are_a_group(tmp_path):
    paths = []
    for seed in range(3):
        folder = tmp_path / f"seed{seed}"
        add = {"seed_everything": seed, "data.seed": seed, "trainer.enable_progress_bar": [None, True, False][seed]}
        add |= {"trainer.max_time": [None, "00:01:00:00"][seed % 2], "kd.probe_gradients": seed > 1}
        add |= {"trainer.log_every_n_steps": 10 + seed, "trainer.num_sanity_val_steps": seed}
        shift = seed / 8
        paths += [
            write_run(folder / f"baseline-s{seed}", {s: c + shift for s, c in BASELINE.items()}, **add),
            write_run(
                folder / f"salt-s{seed}",
                {s: c + shift * shift for s, c in SALT.items()},
                teacher=f"teachers/small-seed{seed}/last.ckpt",
                weight=0.5,
                kd_steps=60,
                **add,
            ),
        ]
    other = write_run(tmp_path / "seed0" / "other", SALT, teacher="t", weight=0.25, kd_steps=60)
    comparison = evaluate(load([*paths, other]))
    baseline, salt, single = comparison.groups
    assert baseline.label == "BASELINE"
    assert baseline.val_ce == [4.0, 4.125, 4.25]
    assert (baseline.n, baseline.mean, baseline.std) == (3, 4.125, 0.125)
    assert baseline.paired_differences == {}
    assert comparison.reference_val_ce == 4.125
    assert (salt.label, salt.n, salt.runs) == ("SALT step (salt-s0)", 3, ["salt-s0", "salt-s1", "salt-s2"])
    assert salt.val_ce == [3.75, 3.765625, 3.8125]
    assert salt.std == pytest.approx(statistics.stdev(salt.val_ce))
    assert salt.difference == pytest.approx(statistics.mean(salt.val_ce) - 4.125)
    assert salt.paired_differences == {"0": -0.25, "1": -0.359375, "2": -0.4375}
    # 4.125 is reached after 200 at (4.25 + shift^2 - 4.125) / 0.5 of 100 steps
    assert salt.reached_steps_share == pytest.approx([225 / 300, 228.125 / 300, 237.5 / 300])
    # 5 teacher FLOPs in each of 60 steps, 10 of the student in each step; the reference took 3000
    reached_flops = [(step * 10 + 300) / 3000 for step in (225, 228.125, 237.5)]
    assert salt.reached_flops_share == pytest.approx(reached_flops)
    assert salt.reached_seconds_share == pytest.approx(salt.reached_steps_share)  # half a second each
    assert all(math.isnan(share) for share in salt.reached_flops_share_with_teacher_training)  # not among the runs
    assert salt.equal["steps"] == salt.equal["tokens"] == salt.equal["seconds"] == salt.val_ce
    # all have 3000 FLOPs after step 270 (SALT) or 300 (BASELINE)
    assert baseline.equal["FLOPs"] == baseline.val_ce
    assert salt.equal["FLOPs"] == pytest.approx([3.9, 3.9 + 1 / 64, 3.9 + 1 / 16])
    assert (single.n, single.runs) == (1, ["other"])
    assert math.isnan(single.std)
    assert single.changed["kd.weight"] == (0.0, 0.25)
    assert set(salt.changed) == {"kd.weight", "kd.steps", "model.teacher.path"}
    text = report.markdown(comparison)
    assert "1 (no spread)" in text
    assert "4.0000 to 4.2500" in text
    assert "4.0000, 4.1250, 4.2500" in text
    shares = [100 * share for share in salt.reached_steps_share]
    each = ", ".join(f"{share:.1f}%" for share in shares)
    assert "-: -, -, -" in text  # unknown with the teacher's training
    assert f"{statistics.mean(shares):.1f}% ({statistics.stdev(shares):.1f}%): {each}" in text
    assert f"{statistics.mean(salt.val_ce):.4f} ({statistics.stdev(salt.val_ce):.4f})" in text


def rows_of(text):
    """The first table in a text, as one dict per row."""
    lines = [line for line in text.partition("\n|")[2].partition("\n\n")[0].splitlines() if "---" not in line]
    head, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_each_number_of_a_run_is_in_its_column(three):
    columns = {
        "run": ["baseline", "salt", "rkd"],
        "method": ["BASELINE", "SALT step", "RKD"],
        "step": ["300"] * 3,
        "val CE": ["4.0000", "3.7500", "4.2500"],
        "to ref.": ["+0.0000", "-0.2500", "+0.2500"],
        "accuracy": ["25.00%", "26.67%", "23.53%"],
        "bits/byte": ["2.0000", "1.8750", "2.1250"],
        "reaches ref. at": ["300 (100.0%)", "250 (83.3%)", "-"],
        "of its FLOPs": ["100.0%", "93.3%", "-"],
        "seconds": ["150"] * 3,
        "teacher s": ["0", "8", "38"],
        "student FLOP": ["3000.000"] * 3,
        "teacher FLOP": ["0.000", "300.000", "1500.000"],
    }
    rows = rows_of(report.markdown(evaluate(load(three))))
    assert {name: [row[name] for row in rows] for name in rows[0]} == columns
    large = write_run(three[0].parent / "large", RKD, student=10**7, teacher="t", weight=0.5, seed_everything=1)
    with SummaryWriter(str(large), filename_suffix=".start-2") as writer:
        writer.add_scalar("train/flops_teacher_total", 2e9, 300)
    none = {"log_every": STEPS + 1, "seed_everything": 2}  # no cost in its log
    unknown = write_run(three[0].parent / "unknown", BASELINE, **none)
    found = evaluate(load([unknown, three[0], large]))
    assert found.equal["seconds"] == (150, {"baseline": 4.0, "large": 4.25})
    rows = rows_of(report.markdown(found))
    assert [row["student GFLOP"] for row in rows] == ["-", "0.000", "3.000"]
    assert [row["teacher GFLOP"] for row in rows] == ["0.000", "0.000", "2.000"]


def test_each_number_of_the_seeds_is_in_its_column(tmp_path):
    kd = {"teacher": "t", "weight": 0.5, "kd_steps": 60}
    runs = [write_run(tmp_path / "b0", BASELINE), write_run(tmp_path / "s0", SALT, **kd)]
    runs.append(write_run(tmp_path / "b1", {100: 5.0, 200: 4.75, 300: 4.5}, seed_everything=1))
    runs.append(write_run(tmp_path / "s1", SALT | {300: 4.0}, seed_everything=1, **kd))
    runs.append(write_run(tmp_path / "r0", RKD, teacher="t", weight=0.5))
    runs.append(write_run(tmp_path / "running", {100: 4.75}, 100, **kd, **{"kd.shape": "cosine"}))
    text = report.markdown(evaluate(load(runs)))
    assert [[*row.values()] for row in rows_of(text.partition("## Seeds")[2])] == [
        ["BASELINE", "2", "4.2500", "0.3536", "4.0000 to 4.5000", "+0.0000", "4.0000, 4.5000", "-"],
        ["SALT step", "2", "3.8750", "0.1768", "3.7500 to 4.0000", "-0.3750", "3.7500, 4.0000", "-0.2500, -0.5000"],
        ["RKD", "1 (no spread)", "4.2500", "-", "-", "+0.0000", "4.2500", "+0.2500"],
        ["SALT cosine", "0", *["-"] * 6],
    ]
    share, with_kd = "66.7% (0.0%): 66.7%, 66.7%", "76.7% (0.0%): 76.7%, 76.7%"  # 4.25 at 200: of 300 steps; 2300 FLOPs
    assert [[*row.values()] for row in rows_of(text.partition("## Where the seeds")[2])] == [
        ["BASELINE", "-: 83.3%, -", "-: 83.3%, -", "-: -, -", "-: 83.3%, -"],
        ["SALT step", share, with_kd, "-: -, -", share],
        ["RKD", "100.0%", "150.0%", "-", "100.0%"],
        ["SALT cosine", *["-"] * 4],
    ]


def test_parts_are_shown_thirds_first(tmp_path):
    paths = [write_run(tmp_path / name, BASELINE) for name in ("one", "two")]
    assert "by part" not in report.markdown(evaluate(load(paths)))
    with SummaryWriter(str(paths[0])) as writer:
        for number, part in enumerate(("hard", "books", "easy", "medium")):
            writer.add_scalar(f"val/ce/{part}", 4.0 + number, 300)
    text = report.markdown(evaluate(load(paths)))
    assert re.search(
        r"run +\| +easy \| +medium \| +hard \| +books \|\n.*\n\| one \| 6.0000 \| 7.0000 \| 4.0000 \| 5", text
    )
    assert "| two |      - |" in text
    for number in range(4, report.MOST_PARTS + 1):
        assert "by part" in report.markdown(evaluate(load(paths)))
        with SummaryWriter(str(paths[1]), filename_suffix=f".start-{number}") as writer:
            writer.add_scalar(f"val/ce/{number}", 4.0, 300)
    found = evaluate(load(paths))
    assert "by part" not in report.markdown(found)  # too wide to be read
    assert f"val/ce/{report.MOST_PARTS}" in found.rows[1].last


def test_a_source_may_be_called_run(tmp_path):
    path = write_run(tmp_path / "one", BASELINE)
    with SummaryWriter(str(path)) as writer:
        for value, part in enumerate(("run", "web")):
            writer.add_scalar(f"val/ce/{part}", value, 300)
    shown = report.markdown(evaluate(load([path]))).partition("by part\n")[2]
    first, *_ = rows_of(shown)
    assert first == {"run": "one", "val/ce/run": "0.0000", "web": "1.0000"}


def test_a_boundary_found_by_a_margin_is_where_the_teacher_left(tmp_path):
    own = {"teacher": "t", "weight": 0.5, "kd_steps": 200, "kd.stop_margin": 0.05}
    paths = [write_run(tmp_path / "baseline", BASELINE), write_run(tmp_path / "salt", SALT, log_every=70, **own)]
    run = read_run(paths[1], "salt")
    assert (run.kd_steps, run.method) == (200, "SALT step, margin 0.05")  # none found: the maximum
    with SummaryWriter(str(paths[1])) as writer:
        writer.add_scalar("probe/stop_step", 75, 75)
    run = read_run(paths[1], "salt")
    assert (run.kd_steps, run.method) == (75, "SALT step, margin 0.05")
    assert replace(run, config={**run.config, "kd.steps": None}).method == "SALT step, margin 0.05"


def test_the_reference_is_the_mean_of_its_finished_seeds(tmp_path):
    done = write_run(tmp_path / "seed0", BASELINE)
    running = write_run(tmp_path / "seed1", {100: 5.0}, steps=100, seed_everything=1)
    found = evaluate(load([running, done]))
    assert (found.reference_val_ce, found.groups[0].equal["steps"]) == (4.0, [4.0])
    assert evaluate(load([running])).reference_val_ce == 5.0  # nothing better yet


def test_the_loss_and_cost_of_the_reference_are_means_over_its_seeds(tmp_path):
    seeds = [
        write_run(tmp_path / f"seed{s}", BASELINE | {300: ce}, student=student, seed_everything=s)
        for s, (ce, student) in enumerate(((4.0, 10), (4.0, 20), (4.75, 60)))
    ]
    with SummaryWriter(str(seeds[1]), filename_suffix=".start-2") as writer:
        writer.add_scalar("train/time_s", 240, 300)
    salt = write_run(tmp_path / "salt", SALT, teacher="t", weight=0.5, kd_steps=60)
    found = evaluate(load([*seeds, salt]))
    assert found.reference_val_ce == found.groups[0].mean == 4.25  # not the middle one, 4.0
    row = found.rows[3]
    assert row.reached_step == 200
    assert row.reached_flops_share == (2000 + 300) / 9000  # of 3000, 6000 and 18000
    assert row.reached_seconds_share == 100 / 180  # of 150, 240 and 150


def test_what_logs_and_shows_a_run_makes_no_other_experiment(tmp_path):
    watcher, stopper = ({"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": {"x": 1}}
                        for name in ("LearningRateMonitor", "EarlyStopping"))  # fmt: skip
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger"}
    for seed, (logs, callbacks) in enumerate(
        [(None, None), ([{**logger, "init_args": {"name": "b"}}], [watcher]), (True, []),
         (None, [watcher, stopper]), (None, [stopper, watcher])]
    ):  # fmt: skip
        extra = {"trainer.logger": logs, "trainer.callbacks": callbacks, "seed_everything": seed}
        write_run(tmp_path / f"s{seed}", BASELINE, **extra)
    runs = [read_run(tmp_path / f"s{seed}", str(seed)) for seed in range(5)]
    assert runs[0].variant == runs[1].variant == runs[2].variant
    assert runs[3].variant == runs[4].variant != runs[0].variant


def test_an_exported_seed_is_a_seed_like_the_others(tmp_path):
    runs = [
        write_run(tmp_path / f"seed{seed}", BASELINE, seed_everything=seed, **export)
        for seed, export in ((0, {}), (1, {"checkpoint.export": None}), (2, {"checkpoint.export": "models/best"}))
    ]
    assert [group.n for group in evaluate(load(runs)).groups] == [3]


@pytest.mark.parametrize(
    ("names", "key", "values"),
    [
        (("highest", "lowest"), "data.keep.order", ("highest", "lowest")),
        (("linear", "cosine"), "kd.shape", ("linear", "cosine")),
        (("A/salt", "B/salt"), "model.teacher.path", ("A/teacher/x.ckpt", "B/teacher/x.ckpt")),
    ],
)
def test_a_folder_named_after_a_setting_does_not_hide_it(names, key, values, tmp_path):
    runs = [
        write_run(
            tmp_path / name,
            SALT,
            teacher="t",
            weight=0.5,
            kd_steps=60,
            seed_everything=seed,
            **{"data.selection": "scores", key: value},
        )
        if key != "model.teacher.path"
        else write_run(tmp_path / name, SALT, teacher=value, weight=0.5, kd_steps=60, seed_everything=seed)
        for seed, (name, value) in enumerate(zip(names, values, strict=True))
    ]
    first, second = evaluate(load(runs)).groups
    assert (first.n, second.n, second.changed) == (1, 1, {key: values})


@pytest.mark.parametrize("source", ["data_s{}.jsonl", "runs/s{}/b/text.jsonl", "{}/text.jsonl"])
@pytest.mark.parametrize("key", ["data.source", "data.val_source"])
def test_two_texts_are_two_experiments_whatever_their_names(tmp_path, source, key, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [[source.format(seed)] for seed in (1, 2)]
    runs = [
        write_run(Path(f"runs/s{seed}/b"), BASELINE, seed_everything=seed, **{key: text})
        for seed, text in zip((1, 2), texts, strict=True)
    ]
    assert [group.changed for group in evaluate(load(runs)).groups] == [{}, {f"{key}.0": (texts[0][0], texts[1][0])}]


def test_a_setting_that_differs_is_shown_as_it_was_set(tmp_path):
    plain = write_run(tmp_path / "s0", BASELINE, noted=True)
    own = {"noted": date(2026, 1, 2), "data.text_column": "\u8cea\u554f"}
    salt = write_run(tmp_path / "s1", SALT, seed_everything=1, **own, **{"data.tokenizer": "runs/s1/tokenizer"})
    again = write_run(tmp_path / "s2", SALT, seed_everything=2, **own, **{"data.tokenizer": "runs/s2/tokenizer"})
    found = evaluate(load([plain, salt, again]))
    first, second = found.groups
    changes = {
        "data.text_column": (None, "\u8cea\u554f"),
        "data.tokenizer": (None, "runs/s1/tokenizer"),
        "noted": (True, date(2026, 1, 2)),
    }
    assert (first.n, second.n, second.changed) == (1, 2, changes)
    assert report.markdown(found).endswith(
        "## Settings that differ from the reference\n\n"
        '- BASELINE (s1): `data.text_column` null -> "\u8cea\u554f", '
        '`data.tokenizer` null -> "runs/s1/tokenizer", `noted` true -> "2026-01-02"\n'
    )
    assert "Settings that differ" not in report.markdown(evaluate(load([plain])))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("seed_{}", [2]), ("seed={}", [2]), ("s-{}", [2]), ("s{}", [2]), ("models{}", [1, 1]), ("s{}0", [1, 1])],
)
def test_a_path_with_a_runs_seed_in_it_is_that_of_all_seeds(tmp_path, name, sizes):
    runs = [
        write_run(tmp_path / str(s), SALT, seed_everything=s, **{"data.difficulty": f"x/{name.format(s)}/y"})
        for s in (1, 2)
    ]
    assert [group.n for group in evaluate(load(runs)).groups] == sizes


def test_seeds_may_lie_in_numbered_folders(tmp_path):
    runs = [
        write_run(tmp_path / f"{seed}" / "salt", SALT, teacher=f"runs/{seed}/teacher/x.ckpt", weight=0.5, kd_steps=60,
                  seed_everything=seed, run=f"runs/{seed}/salt")
        for seed in range(3)
    ]  # fmt: skip
    assert [group.n for group in compare(runs, tmp_path).groups] == [3]


def test_each_seed_that_differs_is_another_sample(tmp_path):
    for name in ("model.seed", "data.seed"):
        runs = [write_run(tmp_path / f"{name}{seed}", BASELINE, **{name: seed}) for seed in range(3)]
        comparison = evaluate(load(runs))
        assert (comparison.groups[0].n, comparison.notes) == (3, [])


def test_seeds_that_decide_make_the_sample_whatever_seed_everything_says(tmp_path):
    """As by `--config runs/s0/config.yaml --seed_everything 1` while config.yaml held the seeds that followed it."""
    own = {"model.seed": 0, "data.seed": 0}
    runs = [write_run(tmp_path / f"s{seed}", BASELINE, seed_everything=seed, **own) for seed in range(2)]
    comparison = evaluate(load(runs))
    assert [group.n for group in comparison.groups] == [1]
    assert comparison.notes == [
        "s1 repeats s0 (same seeds, and no setting differs that affects results), so only the latter is counted"
    ]
    unset = {"model.seed": None, "data.seed": None}  # as in config.yaml now
    runs = [write_run(tmp_path / f"u{seed}", BASELINE, seed_everything=seed, **unset) for seed in range(2)]
    assert [group.n for group in evaluate(load(runs)).groups] == [2]
    assert changed(load(runs)[0].config, {"data.seed": 0}) == {}


def test_a_run_is_set_beside_the_one_that_has_all_its_seeds(tmp_path):
    runs = [write_run(tmp_path / f"b{s}", {300: 4.0 + s / 8}, **{"model.seed": s, "data.seed": 9}) for s in range(3)]
    taught = {"teacher": "x", "weight": 0.5, "kd_steps": 60}
    runs.append(write_run(tmp_path / "salt", {300: 3.5}, **taught, **{"model.seed": 1, "data.seed": 9}))
    pairs = [group.paired_differences for group in evaluate(load(runs)).groups]
    assert pairs == [{}, {"data.seed 9, model.seed 1": -0.625}]


@pytest.mark.parametrize(
    "key", ["data.num_workers", "data.prepare_workers", "data.cache_dir", "data.micro_batch_size", "checkpoint.keep",
            "kd.allow_change", "answers.max_examples"],
)  # fmt: skip
def test_what_changes_no_result_makes_no_experiment(tmp_path, key):
    runs = [write_run(tmp_path / f"s{s}", BASELINE, seed_everything=s, **{key: min(s, 1)}) for s in range(3)]
    assert [group.n for group in evaluate(load(runs)).groups] == [3]
    runs.append(write_run(tmp_path / "block", BASELINE, **{"data.block_size": 7}))
    assert len(evaluate(load(runs)).groups) == 2


@pytest.mark.parametrize(
    ("shared", "idle"),
    [
        ({}, {"kd_steps": 60, "kd.shape": "cosine", "model.teacher_temperature": 2.0}),
        ({}, {"teacher": "t", "kd.anneal_steps": 3}),
        ({"weight": 0.5}, {"kd_steps": 60}),  # without a teacher
        ({}, {"data.keep.fraction": 0.1, "data.keep.order": "lowest"}),
        ({"data.selection": "s", "kd_steps": 60}, {"kd.shape": "cosine", "teacher": "t"}),
        ({"data.selection": "s", "data.keep.order": "random"}, {"data.keep.k": 20, "data.keep.masked": "drop"}),
    ],
)
def test_a_setting_without_effect_makes_no_experiment(shared, idle, tmp_path):
    """`salt.yaml --kd.weight 0` beside `baseline.yaml`: the mean of the reference left that seed out."""
    runs = [write_run(tmp_path / f"s{seed}", BASELINE, seed_everything=seed, **shared) for seed in range(2)]
    runs.append(write_run(tmp_path / "s2", BASELINE, seed_everything=2, **{**shared, **idle}))
    assert [group.n for group in evaluate(load(runs)).groups] == [3]


@pytest.mark.parametrize(
    ("shared", "active"),
    [
        ({"teacher": "t", "weight": 0.5, "kd_steps": 60}, {"kd.shape": "cosine"}),
        ({"teacher": "t", "weight": 0.5, "kd_steps": 60}, {"model.teacher_temperature": 2.0}),
        ({"data.selection": "s"}, {"kd_steps": 60}),  # what phase 1 reads
        ({"data.selection": "s"}, {"data.keep.k": 20}),
        ({"data.selection": "s", "data.keep.order": "random", "data.keep.drop_top": 0.1}, {"data.keep.k": 20}),
        ({"data.selection": "s", "data.keep.order": "random"}, {"data.keep.fraction": 0.1}),
    ],
)
def test_a_setting_with_effect_makes_an_experiment(shared, active, tmp_path):
    runs = [
        write_run(tmp_path / f"s{seed}", SALT, seed_everything=seed, **{**shared, **own})
        for seed, own in enumerate(({}, active))
    ]
    assert [group.n for group in evaluate(load(runs)).groups] == [1, 1]


def test_a_setting_that_had_an_effect_in_an_earlier_start_makes_an_experiment(tmp_path):
    now = {"data.selection": "s", "data.keep.order": "random"}
    runs = [write_run(tmp_path / f"k{k}", BASELINE, **now, **{"data.keep.k": k}) for k in (10, 20)]
    for run, k in zip(runs, (10, 20), strict=True):
        earlier(run, 100, **{"data.selection": "s", "data.keep.order": "highest", "data.keep.k": k})
    assert [group.n for group in evaluate(load(runs)).groups] == [1, 1]


def test_a_setting_that_an_older_version_had_not_is_null(tmp_path):
    runs = [
        write_run(tmp_path / "old", BASELINE),
        write_run(tmp_path / "new", BASELINE, **{"model.seed": 1, "data.x": None}),
    ]
    assert len(evaluate(load(runs)).groups) == 1


def test_the_default_precision_by_any_name_is_no_change(tmp_path):
    precisions = [None, "32-true", "32", 32]
    runs = [
        write_run(tmp_path / f"s{seed}", BASELINE, seed_everything=seed, **{"trainer.precision": precision})
        for seed, precision in enumerate(precisions)
    ]
    read = load(runs)
    assert [group.n for group in evaluate(read).groups] == [4]
    assert all(changed(read[0].config, run.config).keys() <= {"seed_everything"} for run in read)
    by_plugin = {"trainer.precision": None, "trainer.plugins.class_path": "HalfPrecision"}
    assert read_run(write_run(tmp_path / "p", BASELINE, **by_plugin), "p").config["trainer.precision"] is None


def test_a_name_of_bytes_that_are_no_text_is_refused():
    with pytest.raises(ConfigError, match=r"runs/\\udcff is not valid UTF-8; give another name$"):
        main(["runs/\udcff"])


def test_a_reference_seed_on_other_text_is_no_part_of_the_mean(tmp_path):
    runs = [write_run(tmp_path / f"s{s}", {300: 6.0 if s == 2 else 4.0}, seed_everything=s) for s in range(3)]
    for run, tokens in zip(runs, (100, 100, 90), strict=True):
        with SummaryWriter(str(run)) as writer:
            writer.add_scalar("val/tokens", tokens, 300)
    runs.append(write_run(tmp_path / "salt", {300: 3.75}, teacher="x", weight=0.5, kd_steps=60))
    with SummaryWriter(str(runs[-1])) as writer:
        writer.add_scalar("val/tokens", 100, 300)
    comparison = evaluate(load(runs))
    assert comparison.reference_val_ce == 4.0
    assert [(group.n, group.mean) for group in comparison.groups] == [(2, 4.0), (1, 3.75)]
    assert comparison.rows[-1].difference == -0.25
    assert comparison.notes[-1] == "the reference's loss was reached by the first validation, or earlier: salt"


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_that_diverged_is_compared(tmp_path, order, value, capsys):
    runs = [
        write_run(tmp_path / "bad", dict.fromkeys(BASELINE, value)),
        write_run(tmp_path / "b", BASELINE, **{"model.seed": 1}),
    ]
    assert main([*map(str, runs[::order]), "--out", str(tmp_path / "out")]) == 0
    assert "4.0000" in capsys.readouterr().out
    assert "4.0000" in (tmp_path / "out/compare.md").read_text()
    assert main([str(runs[0]), "--out", str(tmp_path / "out")]) == 0


def test_a_branch_without_validation_whose_trunk_is_gone_is_compared(tmp_path):
    gone = {"ckpt_path": "gone/checkpoints/step-00000100.ckpt", "teacher": "x", "weight": 0.5, "kd_steps": 60}
    runs = [write_run(tmp_path / "b", BASELINE), write_run(tmp_path / "branch", {}, steps=150, after=100, **gone)]
    assert math.isnan(evaluate(load(runs)).rows[1].val_ce)


def test_the_baseline_may_be_named_from_home(three, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for named in ("~/rkd", f"{tmp_path}/x/../rkd"):
        assert compare(three, tmp_path / "out", baseline=named).reference == "rkd"


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ({"model.optim.lr": 0.004}, {"model.optim.lr": 0.008}, ["optim.lr 0.004", "optim.lr 0.008"]),
        (
            {"model.optim.lr": 1e-3, "kd.shape": "cosine", "kd.weight": 0.5},
            {"model.optim.lr": 1e-3, "kd.shape": "cosine", "kd.weight": 0.25},
            ["kd.weight 0.5", "kd.weight 0.25"],
        ),
        (
            {"model.optim.lr": 1, "kd.weight": 0.5},
            {"model.optim.lr": 2, "kd.weight": 0.3},
            ["kd.weight 0.5, optim.lr 1", "kd.weight 0.3, optim.lr 2"],
        ),
        ({"model.optim.lr": 1, "a.b": 1, "a.c": 1}, {"model.optim.lr": 2, "a.b": 2, "a.c": 2}, ["one", "other"]),
        ({"model.optim.lr": 1}, {}, ["one", "other"]),
        ({"teacher": "at/one"}, {"teacher": "at/other"}, ["one", "other"]),
    ],
)
def test_experiments_of_one_method_are_named_by_what_differs(tmp_path, one, other, told):
    runs = [
        write_run(tmp_path / name, SALT, **{"teacher": "t", "weight": 0.5, "kd_steps": 60, **own})
        for name, own in (("one", one), ("other", other))
    ]
    labels = [group.label for group in evaluate(load([write_run(tmp_path / "b", BASELINE), *runs])).groups]
    shape = one.get("kd.shape", "step")
    assert labels == ["BASELINE", *(f"SALT {shape} ({name})" for name in told)]


def test_no_difference_is_shown_as_a_negative_zero(tmp_path):
    """The mean of the reference's own differences from their mean is a rounding error."""
    finals = (4.4043, 4.3501, 4.3769)
    runs = [write_run(tmp_path / f"s{n}", {300: ce}, seed_everything=n) for n, ce in enumerate(finals)]
    found = evaluate(load(runs))
    found.groups[0].difference = -1e-17
    assert "| +0.0000 |" in report.markdown(found)
    assert "-0.0000" not in report.markdown(found)


def test_where_a_run_and_its_text_lie_is_no_experiment(tmp_path):
    layouts = [
        ("one", {"checkpoint.folder": "/scratch/one"}), ("two", {"checkpoint.folder": "/scratch/two"}),
        ("x_2", {"run": "x_2", "data.tokenizer": "x_2/tokenizer", "data.source": "d/1/text.jsonl"}),
        ("x_3", {"run": "x_3", "data.tokenizer": "x_3/tokenizer", "data.source": "d/1/text.jsonl"}),
    ]  # fmt: skip
    runs = [write_run(tmp_path / n, SALT, **{"seed_everything": i, **c}) for i, (n, c) in enumerate(layouts)]
    assert [group.n for group in evaluate(load(runs)).groups] == [2, 2]


def test_the_named_reference_leads_and_a_run_that_had_a_teacher_is_no_baseline(tmp_path, three):
    again = write_run(tmp_path / "again", {300: 3.0})
    comparison = compare([*three, again], tmp_path / "out", baseline="again")
    assert (comparison.reference, comparison.reference_val_ce) == ("again", 3.0)
    left = write_run(tmp_path / "left", BASELINE, seed_everything=1)
    with SummaryWriter(str(left)) as writer:
        writer.add_scalar("train/flops_teacher_total", 50.0, 300)
    assert evaluate(load([left, *three])).reference == "baseline"


def test_an_early_teacher_took_its_own_steps_alone(tmp_path):
    teacher = write_run(tmp_path / "runs" / "teacher", {300: 5.0}, student=4)
    path = "runs/teacher/checkpoints/step-00000030.ckpt"
    salt = write_run(tmp_path / "runs" / "salt", SALT, teacher=path, weight=0.5, kd_steps=60)
    row = evaluate(load([teacher, salt])).rows[1]
    assert (row.teacher_training_flops, row.teacher_training_seconds) == (4 * 30, 0.5 * 30)


def test_one_seed_is_said_to_have_no_spread(three):
    assert "One seed per experiment (n = 1)" in report.markdown(evaluate(load(three)))


def test_where_no_run_has_finished_no_seed_is_counted(three, tmp_path):
    """As after EarlyStopping."""
    early = [write_run(tmp_path / f"e{seed}", {100: 4.5}, 100, seed_everything=seed) for seed in range(2)]
    text = report.markdown(evaluate(load(early)))
    assert "(n = 1)" not in text
    assert "No run has reached its last step (n = 0), so there is no mean over seeds and no spread." in text
    assert "Reference: e0, not finished, latest validation CE 4.5000." in text
    taught = write_run(tmp_path / "t", {100: 4.5}, 100, teacher="x", weight=0.5, kd_steps=9)
    text = report.markdown(evaluate(load([three[0], taught])))
    assert "One seed per experiment (n = 1), and no finished run of SALT step (n = 0): the spread between" in text
    assert "Reference: baseline, final validation CE 4.0000." in text


def test_the_teachers_own_training_stands_apart(tmp_path, monkeypatch):
    teacher = write_run(tmp_path / "runs" / "teacher", {300: 5.0}, student=4)
    salt = write_run(
        tmp_path / "runs" / "salt",
        SALT,
        teacher="runs/teacher/checkpoints/last.ckpt",
        weight=0.5,
        kd_steps=60,
    )
    baseline = write_run(tmp_path / "runs" / "baseline", BASELINE)
    monkeypatch.chdir("/")  # not where the runs were started: the path still identifies the run
    comparison = evaluate(load([teacher, baseline, salt]))
    rows = {row.run: row for row in comparison.rows}
    assert comparison.reference == "baseline"  # the teacher comes first and has no teacher, but is not a baseline
    assert rows["teacher"].method == "TEACHER"
    assert rows["salt"].teacher_training_flops == 1200
    assert rows["salt"].reached_flops_share_with_teacher_training == (2500 + 300 + 1200) / 3000
    assert (rows["salt"].teacher_seconds, rows["salt"].teacher_training_seconds) == (7.5, 150)
    assert rows["baseline"].teacher_seconds == 0
    assert rows["salt"].reached_seconds_share == 125 / 150
    assert rows["salt"].reached_seconds_share_with_teacher_training == (125 + 150) / 150
    assert [group.label for group in comparison.groups] == ["BASELINE", "SALT step"]
    assert "teacher" not in comparison.equal["steps"][1]
    text = report.markdown(comparison)
    assert "its teacher's own training 1200.000 FLOP (150 s)" in text
    assert "with that, it reaches the reference's loss at 133.3% of its FLOPs and 183.3% of its seconds" in text
    (tmp_path / "link").symlink_to(teacher)
    assert evaluate(load([tmp_path / "link", baseline, salt])).rows[0].method == "TEACHER"


def test_a_baseline_that_taught_runs_of_its_own_model_and_length_is_their_reference(tmp_path):
    """As in self-distillation, or where BASELINE's early checkpoint scored the rows; other teachers are none."""
    model = "model.student.config.hidden_size"
    kd = {"teacher": f"{tmp_path}/baseline/checkpoints/step-00000100.ckpt", "weight": 0.5, "kd_steps": 60, model: 64}
    salt = write_run(tmp_path / "salt", SALT, **kd)
    found = evaluate(load([salt, write_run(tmp_path / "baseline", BASELINE, **{model: 64})]))
    assert [row.method for row in found.rows] == ["SALT step", "BASELINE"]
    assert (found.reference, found.notes) == ("baseline", [])
    assert found.rows[0].teacher_training_flops == 1000
    seed = write_run(tmp_path / "seed", {300: 5.0}, **{model: 64}, seed_everything=1)
    found = evaluate(load([tmp_path / "baseline", salt, seed]))
    assert [row.method for row in found.rows] == ["BASELINE", "SALT step", "BASELINE"]
    assert (found.reference, found.reference_val_ce) == ("baseline", 4.5), "a seed that teaches stays in the mean"
    assert list(found.groups[1].paired_differences.values()) == [3.75 - 4.0]
    other = write_run(tmp_path / "other", BASELINE, **{model: 64, "model.optim.lr": 1}, seed_everything=1)
    found = evaluate(load([tmp_path / "baseline", salt, other]))
    assert ([row.method for row in found.rows], found.reference) == (["TEACHER", "SALT step", "BASELINE"], "other")
    for name, steps, width in (("short", 200, 64), ("small", 300, 32)):
        run = write_run(tmp_path / name / "baseline", {steps: 4.0}, steps, **{model: width})
        kd["teacher"] = f"{run}/checkpoints/step-00000100.ckpt"
        found = evaluate(load([run, write_run(tmp_path / name / "salt", SALT, **kd)]))
        assert ([row.method for row in found.rows], found.reference) == (["TEACHER", "SALT step"], "salt"), name


def test_a_teacher_that_was_validated_on_other_text_is_told(tmp_path):
    teacher = write_run(tmp_path / "teacher", {300: 5.0}, student=4)
    salt = write_run(tmp_path / "salt", SALT, teacher=f"{teacher}/checkpoints/last.ckpt", weight=0.5, kd_steps=60)
    baseline = write_run(tmp_path / "baseline", BASELINE)
    for run, tokens in ((teacher, 90), (salt, 70), (baseline, 70)):
        count(run, "val", tokens, 3 * tokens, [300])
    (note,) = (note for note in evaluate(load([teacher, baseline, salt])).notes if "validated on" in note)
    assert note.startswith("teacher was validated on other text than baseline (90 tokens, there 70): their losses")


def test_a_run_with_one_validation_is_a_point_in_the_figure(tmp_path):
    runs = [
        write_run(tmp_path / "baseline", BASELINE),
        write_run(tmp_path / "salt", {300: 5.0}, **{"model.optim.lr": 1}),
    ]
    lines = {line.get_label(): line for line in figure.draw(evaluate(load(runs))).axes[0].lines}
    assert [
        lines[f"BASELINE ({name})  {ce}"].get_marker() for name, ce in (("baseline", "4.000"), ("salt", "5.000"))
    ] == [
        "",
        ".",
    ]


def test_all_teachers_of_a_run_are_counted_each_up_to_its_furthest_checkpoint(tmp_path):
    """One teacher at steps 30 and 60, then another: (60 * 4 + 100 * 6) FLOPs, and both are students of none."""
    first, second = (write_run(tmp_path / name, {300: 5.0}, student=n) for name, n in (("first", 4), ("second", 6)))
    kd = {"weight": 0.5, "kd_steps": 200}
    salt = write_run(tmp_path / "salt", SALT, teacher="second/checkpoints/step-00000100.ckpt", **kd)
    earlier(salt, 20, teacher="first/checkpoints/step-00000060.ckpt", **kd)
    earlier(salt, 40, teacher="first/checkpoints/step-00000030.ckpt", **kd)
    baseline = write_run(tmp_path / "baseline", BASELINE)
    found = evaluate(load([first, second, salt, baseline]))
    assert [row.method for row in found.rows] == ["TEACHER", "TEACHER", "SALT step", "BASELINE"]
    row = found.rows[2]
    assert (row.teacher_training_flops, row.teacher_training_seconds) == (60 * 4 + 100 * 6, 0.5 * 160)
    gone = evaluate(load([second, salt, baseline]))  # no part of it passes for the whole
    assert math.isnan(gone.rows[1].teacher_training_flops)
    said = "is in none of these runs: the cost of its training is unknown"
    assert f"the teacher of salt, first/checkpoints/step-00000030.ckpt, {said}" in gone.notes


def test_what_branches_of_a_teacher_share_is_counted_once(tmp_path):
    """Trunk until step 200, branches of it from 100 and 150 and a branch of a branch from 250, at 4 to 7 FLOPs."""
    write_run(tmp_path / "trunk", {300: 5.0}, student=4)
    for name, start, student in (("trunk", 150, 5), ("trunk", 100, 6), ("low", 250, 7)):
        given = {"ckpt_path": f"{name}/checkpoints/step-{start:08}.ckpt", "student": student}
        write_run(tmp_path / {5: "high", 6: "low", 7: "twig"}[student], {300: 5.0}, after=start, **given)
    kd = {"weight": 0.5, "kd_steps": 200}
    salt = write_run(tmp_path / "salt", SALT, teacher="trunk/checkpoints/step-00000200.ckpt", **kd)
    for step, name in ((20, "low"), (40, "twig"), (60, "high")):
        earlier(salt, step, teacher=f"{name}/checkpoints/step-00000280.ckpt", **kd)
    runs = [lineage.whole(read_run(tmp_path / name, name)) for name in ("salt", "trunk", "low", "high", "twig")]
    found = evaluate(runs).rows[0]
    # write_run logs as a total what the newest student needs for all steps, so a part is a difference of two
    parts = 4 * 200 + (6 * 280 - 4 * 100) + (5 * 280 - 4 * 150) + (7 * 280 - 6 * 250)
    assert (found.teacher_training_flops, found.teacher_training_seconds) == (parts, 0.5 * (200 + 180 + 130 + 30))


@pytest.mark.parametrize("scored", [True, False])
def test_a_teacher_of_salt_ds_costs_its_scoring_too_and_its_own_teacher_is_mentioned(scored, tmp_path):
    (tmp_path / "score").mkdir()
    if scored:
        (tmp_path / "score" / "scores.json").write_text('{"scoring_flops": 400.0, "scoring_s": 20.0}')
    kd = {"weight": 0.5, "kd_steps": 60}
    first = write_run(tmp_path / "first", {300: 5.0}, student=2)
    own = {"teacher": "first/checkpoints/step-00000300.ckpt", "data.selection": "score", "student": 4}
    second = write_run(tmp_path / "second", {300: 4.5}, **own, **kd)
    salt = write_run(tmp_path / "salt", SALT, teacher="second/checkpoints/step-00000300.ckpt", **kd)
    again = write_run(tmp_path / "again", SALT, teacher="second/checkpoints/step-00000200.ckpt", **kd)
    earlier(again, 20, teacher="second/checkpoints/step-00000100.ckpt", **kd)
    found = evaluate(load([first, second, salt, again, write_run(tmp_path / "baseline", BASELINE)]))
    flops, seconds = found.rows[2].teacher_training_flops, found.rows[2].teacher_training_seconds
    alone = evaluate(load([second])).rows[0]  # student and own teacher
    assert (flops, seconds) == pytest.approx(
        (alone.student_flops + alone.teacher_flops + 400, 150 + 20) if scored else (math.nan, math.nan), nan_ok=True
    )
    said = "second, the teacher of salt, again, had a teacher too: the cost of training that one is not counted"
    assert [note for note in found.notes if "had a teacher too" in note] == [said]


def test_a_teacher_that_was_moved_once_it_had_left_is_known_by_its_new_place(tmp_path):
    teacher = write_run(tmp_path / "new", {300: 5.0}, student=4)
    kd = {"weight": 0.5, "kd_steps": 60}
    salt = write_run(tmp_path / "salt", SALT, teacher="new/checkpoints/step-00000300.ckpt", **kd)
    earlier(salt, 100, teacher="old/checkpoints/step-00000300.ckpt", **kd)
    found = evaluate(load([teacher, salt, write_run(tmp_path / "baseline", BASELINE)]))
    assert [row.teacher_training_flops for row in found.rows][1] == 1200
    off = write_run(tmp_path / "off", SALT)  # its settings name none any more
    earlier(off, 100, teacher="new/checkpoints/step-00000300.ckpt", **kd)
    assert evaluate(load([teacher, off])).rows[1].teacher_training_flops == 1200
    path = "new/checkpoints/step-00000300.ckpt"
    named = write_run(tmp_path / "named", {**BASELINE, 400: 4.0}, 400, teacher=path)  # only by settings
    assert evaluate(load([teacher, named])).rows[0].method == "TEACHER"


def test_the_scoring_of_a_selection_stands_apart(tmp_path):
    runs = tmp_path / "runs"
    (runs / "score").mkdir(parents=True)
    (runs / "score" / "scores.json").write_text('{"scoring_flops": 400.0, "scoring_s": 20.0}')
    shared = {"teacher": "runs/teacher/checkpoints/last.ckpt", "weight": 0.5, "kd_steps": 60}
    paths = [write_run(runs / "baseline", BASELINE), write_run(runs / "teacher", {300: 5.0}, student=4)]
    for name, selection in (("ds", "runs/score"), ("same", "runs/score/scores.json"), ("gone", "runs/lost")):
        paths.append(write_run(runs / name, SALT, **shared, **{"data.selection": selection}))
    for with_teacher in (True, False):
        comparison = evaluate(load([path for path in paths if with_teacher or path.name != "teacher"]))
        rows = {row.run: row for row in comparison.rows}
        assert rows["ds"].scoring_flops == rows["same"].scoring_flops == 400
        assert math.isnan(rows["gone"].scoring_flops)
        assert math.isnan(rows["baseline"].scoring_flops)
        assert rows["ds"].scoring_seconds == 20
        shares = (rows["ds"].reached_flops_share_with_teacher_training,
                  rows["ds"].reached_seconds_share_with_teacher_training)  # fmt: skip
        if with_teacher:
            assert shares == ((2500 + 300 + 1200 + 400) / 3000, (125 + 150 + 20) / 150)
        else:  # otherwise scoring alone would count as the total
            assert all(map(math.isnan, shares))
        assert math.isnan(rows["gone"].reached_flops_share_with_teacher_training)
        text = report.markdown(comparison)
        assert ("the scoring of its rows 400.000 FLOP (20 s); with that" in text) == with_teacher
        assert "the scoring of its rows 400.000 FLOP (20 s)" in text
        assert ("- gone: not included above" in text) == with_teacher


@pytest.mark.parametrize(("kd_step", "scored_step", "needed"), [(None, 150, 150), (60, 150, 150), (300, 150, 300)])
def test_the_teacher_that_scored_the_rows_counts(tmp_path, kd_step, scored_step, needed):
    """Also where it did not teach, and up to the later of the two checkpoints: 4 FLOPs and half a second a step."""
    runs = tmp_path / "runs"
    (runs / "score").mkdir(parents=True)
    named = {"path": f"runs/teacher/checkpoints/step-{scored_step:08d}.ckpt", "revision": None}
    told = {"scoring_flops": 400.0, "scoring_s": 20.0, "teacher": named}
    (runs / "score/scores.json").write_text(json.dumps(told))
    taught = {"teacher": f"runs/teacher/checkpoints/step-{kd_step or 0:08d}.ckpt", "weight": 0.5, "kd_steps": 60}
    own = {"data.selection": "runs/score", **(taught if kd_step else {})}
    paths = [write_run(runs / "baseline", BASELINE), write_run(runs / "ds", SALT, **own)]
    paths.append(write_run(runs / "teacher", {300: 5.0}, student=4))
    _, ds, teacher = evaluate(load(paths)).rows
    assert (teacher.method, ds.teacher_training_flops) == ("TEACHER", 4 * needed)
    with_all = 2500 + (300 if kd_step else 0) + 4 * needed + 400
    assert ds.reached_flops_share_with_teacher_training == with_all / 3000
    assert ds.reached_seconds_share_with_teacher_training == (125 + needed / 2 + 20) / 150
    assert "the teacher of ds, runs/teacher/" in " ".join(evaluate(load(paths[:2])).notes)


def test_a_scorer_that_had_a_teacher_is_told(tmp_path):
    runs = tmp_path / "runs"
    (runs / "score").mkdir(parents=True)
    named = {"path": "runs/teacher/checkpoints/step-00000300.ckpt", "revision": None}
    told = {"scoring_flops": 400.0, "scoring_s": 20.0, "teacher": named}
    (runs / "score/scores.json").write_text(json.dumps(told))
    own = {"teacher": "runs/first/checkpoints/step-00000100.ckpt", "weight": 0.5, "kd_steps": 60}
    paths = [write_run(runs / "ds", SALT, **{"data.selection": "runs/score"}),
             write_run(runs / "teacher", {300: 5.0}, student=4, **own)]  # fmt: skip
    assert "teacher, the teacher of ds, had a teacher too" in " ".join(evaluate(load(paths)).notes)


def test_a_run_that_scored_its_own_rows_needs_no_teacher(tmp_path):
    runs = tmp_path / "runs"
    (runs / "score").mkdir(parents=True)
    told = {"scoring_flops": 400.0, "scoring_s": 20.0, "teacher": {"path": "runs/ds/checkpoints/step-00000050.ckpt"}}
    (runs / "score/scores.json").write_text(json.dumps(told))
    paths = [write_run(runs / "baseline", BASELINE), write_run(runs / "ds", SALT, **{"data.selection": "runs/score"})]
    found = evaluate(load(paths))
    assert [row.method for row in found.rows] == ["BASELINE", "selection without KD"]
    assert found.rows[1].reached_flops_share_with_teacher_training == (2500 + 400) / 3000
    assert "the teacher of ds" not in " ".join(found.notes)


def test_a_teacher_under_two_names_counts_once(tmp_path):
    runs = tmp_path / "runs"
    (runs / "score").mkdir(parents=True)
    named = {"path": "./runs/teacher/checkpoints/step-00000150.ckpt"}
    (runs / "score/scores.json").write_text(json.dumps({"scoring_flops": 400.0, "scoring_s": 20.0, "teacher": named}))
    taught = {"teacher": "runs/teacher/checkpoints/step-00000150.ckpt", "weight": 0.5, "kd_steps": 60}
    ds = load([write_run(runs / "ds", SALT, **taught, **{"data.selection": "runs/score"})])[0]
    assert list(lineage.teacher_runs(ds, [])) == ["runs/teacher/checkpoints/step-00000150.ckpt"]


def test_a_teacher_that_is_better_from_its_first_validation_on_is_mentioned(tmp_path):
    taught = {"teacher": "runs/teacher/checkpoints/last.ckpt", "weight": 0.5, "kd_steps": 60}
    paths = [write_run(tmp_path / "runs/baseline", BASELINE), write_run(tmp_path / "runs/salt", SALT, **taught)]
    paths.append(write_run(tmp_path / "runs/teacher", {100: 1.0, 300: 0.5}, student=4))
    assert "by the first validation, or earlier: teacher" in " ".join(evaluate(load(paths)).notes)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({}, "BASELINE"),
        ({"teacher": "t", "weight": 0.0, "kd_steps": 60}, "BASELINE"),
        ({"teacher": "t", "weight": 0.5}, "RKD"),
        ({"teacher": "t", "weight": 0.5, "kd_steps": 300}, "RKD"),
        ({"teacher": "t", "weight": 0.5, "kd_steps": 299}, "SALT step"),
        ({"teacher": "t", "weight": 0.5, "kd_steps": 60, "trainer.max_steps": -1}, "SALT step"),
        ({"teacher": "t", "weight": 0.5, "kd_steps": 300, "kd.shape": "cosine"}, "SALT cosine"),
        ({"teacher": "t", "weight": 0.5, "kd_steps": 60, "kd.shape": "linear_ratio"}, "SALT linear-ratio"),
        ({"teacher": "t", "weight": 0.5, "kd_steps": 60, "data.selection": "scores"}, "SALT_DS step"),
        ({"teacher": "t", "weight": 0.5, "data.selection": "scores"}, "RKD on selection"),
        ({"data.selection": "scores"}, "selection without KD"),
        ({"data.selection": None, "data.keep.order": "random"}, "BASELINE"),
        ({"data.selection": "scores", "kd_steps": 0, "data.keep.unread_first": True}, "BASELINE"),  # without phase 1
        ({"data.selection": "scores", "data.keep.order": "random"}, "selection without KD, random rows"),
        (
            {"teacher": "t", "weight": 0.5, "kd_steps": 60, "data.selection": "scores", "data.keep.order": "lowest"},
            "SALT_DS step, lowest rows",
        ),
    ],
)
def test_the_method_follows_from_the_config(tmp_path, config, method):
    assert read_run(write_run(tmp_path / "r", BASELINE, **config), "r").method == method


def test_without_a_baseline_the_first_run_is_the_reference(three):
    comparison = evaluate(load(three[1:]))
    assert comparison.reference == "salt"
    assert comparison.notes == ["no BASELINE among the runs: salt, the first of the students, is the reference"]
    assert "Note: no BASELINE among the runs" in report.markdown(comparison)


def test_a_named_baseline(three):
    for name in ("rkd", str(three[2])):
        found = evaluate(load(three), baseline=name)
        assert (found.reference_val_ce, found.notes) == (4.25, [])  # no advice on BASELINEs: it is none
    with pytest.raises(ConfigError, match="--baseline other is not among .*; choose one of baseline, salt, rkd"):
        evaluate(load(three), baseline="other")


def test_runs_without_a_validation_show_a_dash(three, tmp_path):
    silent = write_run(tmp_path / "silent", {}, steps=20, seed_everything=1)
    comparison = compare([*three, silent], tmp_path / "out")
    assert comparison.notes == ["silent is at step 20 of 300", "silent has no validation yet"]
    row = next(line for line in report.markdown(comparison).splitlines() if line.startswith("| silent"))
    assert [cell.strip() for cell in row.split("|")[4:10]] == ["-"] * 6
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["rows"][3]["val_ce"] is None
    unseen = write_run(tmp_path / "unseen", {}, seed_everything=2)  # to its end
    assert evaluate(load([*three, unseen])).notes == ["unseen has no validation"]
    alone = compare([silent], tmp_path / "alone")  # nothing to compare, but not a failure
    assert math.isnan(alone.reference_val_ce)


def test_the_same_run_again_is_no_second_sample(three, tmp_path):
    """Settings and seed determine a run: counting a repetition would shrink the error bar for nothing."""
    lower = {step: ce - 0.5 for step, ce in BASELINE.items()}
    unfinished = write_run(tmp_path / "a-first-start", {100: 5.0}, steps=100)
    again = write_run(tmp_path / "again", lower)
    comparison = evaluate(load([unfinished, *three, again]))
    assert comparison.notes[-2:] == [
        f"{name} repeats baseline (same seeds, and no setting differs that affects results), so only the latter is "
        f"counted{yet}"
        for name, yet in {
            "a-first-start": "",
            "again": "; yet its val CE is 3.5000, there 4.0000: a file behind its "
            "settings (text, teacher, scores) or a library has changed, or the device rounds differently "
            "from run to run",
        }.items()
    ]
    assert [(group.label, group.n) for group in comparison.groups] == [("BASELINE", 1), ("SALT step", 1), ("RKD", 1)]
    assert comparison.reference_val_ce == BASELINE[STEPS]
    assert [row.run for row in comparison.rows] == [
        "a-first-start",
        "baseline",
        "salt",
        "rkd",
        "again",
    ]  # all are shown


def test_a_last_step_without_a_validation_is_said(three, tmp_path):
    before = {step: ce for step, ce in BASELINE.items() if step < STEPS}
    early = write_run(tmp_path / "early", before, seed_everything=1)
    found = evaluate(load([*three, early]))
    assert [row.val_step for row in found.rows] == [300, 300, 300, 200]
    (note,) = found.notes
    assert note == f"early was last validated at step {max(set(BASELINE) - {STEPS})} of 300: val CE is from that step"


def test_a_run_that_logged_nothing_is_left_out_by_name(three, tmp_path):
    (tmp_path / "empty").mkdir()
    begun = write_run(tmp_path / "begun", {}, steps=0)  # its event file holds no value
    (cut,) = write_run(tmp_path / "cut", {}, steps=0).glob("*tfevents*")
    cut.write_bytes(b"no log")
    comparison = compare([tmp_path / "empty", begun, cut.parent, *three], tmp_path / "out")
    assert comparison.notes == [
        f"{cut} could be read up to step 0: the rest is damaged or still being written",
        *(
            f"{name} is left out: no values in its own TensorBoard event files, the only ones that compare reads"
            for name in ("empty", "begun", "cut")
        ),
    ]
    assert [row.run for row in comparison.rows] == ["baseline", "salt", "rkd"]
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "Note: begun is left out: no values in its own TensorBoard event files, the only ones that " in text
    assert "| begun" not in text
    with pytest.raises(ConfigError, match=r"compare: RUN .*/empty, .*/begun: no TensorBoard event file with a value"):
        compare([tmp_path / "empty", begun], tmp_path)
    with pytest.raises(ConfigError, match=r"--baseline begun is not among the runs that logged something; choose one"):
        compare([begun, *three], tmp_path, "begun")


def test_evaluations_are_no_runs(tmp_path):
    for i in range(7):
        for verb in ("", "test", "validate"):
            folder = tmp_path / f"run{i}" / verb
            folder.mkdir()
            SummaryWriter(str(folder)).close()
    listed = " ".join(f"{tmp_path}/run{i}" for i in range(6))
    with pytest.raises(ConfigError, match=f"give a run's own folder: {listed} and 1 more$"):
        compare([tmp_path], tmp_path)


def test_folders_that_are_no_runs(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty: no TensorBoard event file with a value in it; give a run's own fo"):
        compare([tmp_path / "empty"], tmp_path)
    with pytest.raises(ConfigError, match="gone is not a folder"):
        compare([tmp_path / "gone"], tmp_path)
    path = write_run(tmp_path / "broken", BASELINE)
    (path / "config.yaml").write_text("kd: [")
    with pytest.raises(ConfigError, match=r"config\.yaml is not YAML") as error:
        compare([path], tmp_path)
    assert "\n" not in str(error.value)


def test_runs_without_config_are_no_seeds_of_one_experiment(three, tmp_path):
    """As left by a user's own scripts: nothing shows that they belong together."""
    for path in three:
        (path / "config.yaml").unlink()
    found = compare(list(map(str, three)), str(tmp_path / "out"))
    assert [group.n for group in found.groups] == [1, 1, 1]
    assert not any(group.paired_differences for group in found.groups)


def test_a_run_without_config_is_of_unknown_method(three):
    (three[1] / "config.yaml").unlink()
    comparison = evaluate(load(three))
    assert comparison.rows[1].method == "unknown"
    assert "salt has no config.yaml: its method is not known" in comparison.notes
    assert [bool(group.changed) for group in comparison.groups] == [False, False, True]
    assert all(group.changed == {} for group in evaluate(load(three), baseline="salt").groups)


def test_on_a_narrow_terminal_a_wide_table_has_a_column_per_run(three):
    text = report.markdown(evaluate(load(three)))
    wide = max(map(len, text.splitlines()))
    table = text.partition("\n\n")[2].partition("\n\n")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    shown = report.narrowed(text, 80)
    turned = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line[:1] == "|"]
    assert turned[0] == [cells[0][0], *(row[0] for row in cells[2:])]
    assert [*map(list, zip(cells[0], *cells[2:], strict=True))] == [turned[0], *turned[2 : len(cells[0]) + 1]]
    assert max(len(line) for line in shown.splitlines() if line[:1] == "|") <= 80
    assert report.narrowed(text, wide) == text
    assert report.narrowed("x\n\n" + table, 40).count("| run") == 1
    odd = "| a | b |\n|--|--|\n| x|y | 1 |\n"
    assert report.narrowed(odd, 5) == odd


def test_wide_letters_and_marks_do_not_move_a_column():
    """As a terminal shows them: a CJK character takes two columns, a vowel sign of Hindi none, nor what macOS writes
    behind the first part of a Japanese or Korean letter."""
    names = {"\u4e2d\u6587": "", "\u0915\u0941": "   ", "abcd": "", "\u30ab\u3099": "  ", "\u1112\u1161\u11ab": "  "}
    lines = report.table({"run": list(names), "n": ["1"] * 5}, text=("run",)).splitlines()
    assert lines[2:] == [f"| {name}{fill} | 1 |" for name, fill in names.items()]
    assert report.narrowed("\n".join(lines), 13) == "\n".join(lines)


def test_names_that_the_font_of_the_figure_lacks_are_no_warning(tmp_path):
    paths = [write_run(tmp_path / name, {100: 4.0}) for name in ("\u4e2d", "\u6587")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(paths, out=tmp_path)
    assert "\u4e2d" in (tmp_path / "compare.md").read_text()


def test_main_prints_the_table_and_writes_three_files(three, tmp_path, capsys):
    assert main([*map(str, three), "--baseline", "salt"]) == 0
    printed = capsys.readouterr().out
    saved_table, link = (tmp_path / "compare.md").read_text().rsplit("\n\n", 1)  # where the runs lie
    assert saved_table in printed
    assert "\n\n\n" not in saved_table
    files = [str(Path(os.path.relpath(tmp_path)) / f"compare.{end}") for end in ("md", "json", "png")]
    assert printed.endswith(f"\nwritten: {', '.join(files)}\n")
    assert link == "![Validation CE over steps and over FLOPs](compare.png)\n"
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "compare.json").read_text())
    assert saved["reference"] == "salt"
    assert "runs" not in saved  # what the figure needs
    assert saved["rows"][2]["reached_step"] is None
    assert saved["equal"]["FLOPs"][0] == 3000
    for block in printed.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(line) for line in lines}) <= 1, block
    assert plt.get_fignums() == []
    with pytest.raises(ConfigError, match="required: RUN"):
        main([])
    with pytest.raises(ConfigError, match="unrecognized arguments: --basline"):
        main([str(three[0]), "--basline=x"])


def test_the_json_has_folders_settings_and_validations(three, tmp_path):
    config = yaml.safe_load((three[1] / "config.yaml").read_text())
    config["model"]["optim"] = {"lr": 3e-3, "betas": [0.9, 0.95]}
    config["noted"] = date(2026, 1, 2)  # as YAML reads 2026-01-02
    (three[1] / "config.yaml").write_text(yaml.safe_dump(config))
    with SummaryWriter(str(three[1]), filename_suffix=".start-2") as writer:
        writer.add_scalar("val/ce/books", math.nan, 300)
    compare(three, tmp_path / "out")
    row = json.loads((tmp_path / "out/compare.json").read_text())["rows"][1]
    assert (row["run"], row["folder"]) == ("salt", str(three[1]))
    settings = [row["settings"][key] for key in ("model.optim.lr", "model.optim.betas.1", "kd.steps", "noted", "run")]
    assert settings == [3e-3, 0.95, 60, "2026-01-02", str(three[1])]
    assert set(row["curves"]) == {"val/ce", "val/accuracy", "val/bits_per_byte", "val/ce/books"}
    assert row["curves"]["val/ce"] == {"steps": [100, 200, 300], "values": [4.75, 4.25, 3.75]}
    assert row["curves"]["val/ce/books"] == {"steps": [300], "values": [None]}


def test_a_glob_takes_in_what_compare_has_written(three, tmp_path):
    """As `compare runs/*` does the second time."""
    assert main([*map(str, three)]) == 0
    everything = sorted(map(str, tmp_path.iterdir()))
    before = (tmp_path / "compare.json").read_text()
    assert main(everything) == 0
    assert [row["run"] for row in json.loads((tmp_path / "compare.json").read_text())["rows"]] == sorted(
        row["run"] for row in json.loads(before)["rows"]
    )
    (tmp_path / "notes.md").touch()
    with pytest.raises(ConfigError, match="notes.md is not a folder"):
        main([*everything, str(tmp_path / "notes.md")])
    with pytest.raises(ConfigError, match=r"compare.json is not a folder"):
        main([str(tmp_path / "compare.json")])


def test_names_are_the_ends_of_paths_that_differ(tmp_path):
    paths = [write_run(tmp_path / s / "salt", SALT) for s in ("seed0", "seed1")]
    again = Path(os.path.relpath(paths[0]))
    assert [run.name for run in compare([*paths, paths[0], again], tmp_path).runs] == ["seed0/salt", "seed1/salt"]


def test_a_test_result_gets_a_column(three):
    assert "test CE" not in report.markdown(evaluate(load(three)))
    with SummaryWriter(str(three[1] / "test")) as writer:  # as `cli.py test` does
        writer.add_scalar("test/ce", 3.5, 999)
    comparison = evaluate(load(three))
    assert (comparison.rows[1].last["test/ce"], comparison.rows[1].steps) == (3.5, 300)
    assert "test CE" in report.markdown(comparison)
    assert "3.5000" in report.markdown(comparison)
    (events,) = (three[1] / "test").glob("*tfevents*")
    events.write_bytes(events.read_bytes() + b"x")
    assert any(note.startswith(f"{events} could be read up to step 999") for note in evaluate(load(three)).notes)


def test_the_figure_shows_curves_boundary_and_the_point_of_reach(three):
    drawn = figure.draw(evaluate(load(three)))
    by_steps, by_flops = drawn.axes
    curves = {line.get_label(): line.get_xydata() for line in by_steps.lines}
    assert curves["SALT step  3.750"].tolist() == [[s, ce] for s, ce in SALT.items()]
    points = {line.get_label(): line.get_xydata() for line in by_flops.lines}
    assert points["RKD  4.250"].tolist() == [[1500, 4.75], [3000, 4.5], [4500, 4.25]]
    for ax, boundary, reached in ((by_steps, 60, 250), (by_flops, 900, 2800)):
        xs = [line.get_xdata() for line in ax.lines]
        assert [boundary, boundary] in [list(x) for x in xs if len(x) == 2]
        assert [reached] in [list(x) for x in xs if len(x) == 1]
    assert [text.get_text() for text in by_steps.texts] == ["83%"]
    assert [text.get_text() for text in by_flops.texts] == ["93%"]
    for runs, number in ((three, 1), (three[:1], 0)):
        entries = figure.draw(evaluate(load(runs))).legends[0].get_texts()
        assert [text.get_text() for text in entries].count("a teacher leaves") == number


def test_the_figure_is_scaled_to_what_it_shows(tmp_path):
    """From a quarter of the steps on, in the unit of the most FLOPs; no teacher's run and none on other text."""
    path = "teacher/checkpoints/step-00000300.ckpt"
    runs = [
        write_run(tmp_path / "teacher", {100: 8.0, 300: 1.0}, student=10**10),
        write_run(tmp_path / "baseline", {25: 9.0, 75: 6.0, **BASELINE}, student=10**7),
        write_run(tmp_path / "salt", SALT, teacher=path, weight=0.5, kd_steps=60),
        write_run(tmp_path / "other", BASELINE, student=10**10, **{"model.optim.lr": 1.0}),
    ]
    for run, tokens, ce in ((runs[1], 900, 4.0), (runs[3], 800, 0.5)):
        count(run, "val", tokens, 3000, [300], ce)
    by_steps, by_flops = figure.draw(evaluate(load(runs))).axes
    bottom, top = by_steps.get_ylim()
    assert top == 6.0
    assert 3.0 < bottom < SALT[300]
    assert by_flops.get_xlabel() == "GFLOP of student and teacher"
    lines = {line.get_label(): line for line in by_flops.lines}
    assert lines["BASELINE (baseline)  4.000"].get_xdata().tolist() == pytest.approx([0.25, 0.75, 1, 2, 3])
    assert lines["BASELINE (baseline)  4.000"].get_color() == figure.REFERENCE_COLOUR


def test_a_method_has_its_colour_whichever_runs_are_beside_it(three):
    baseline, salt, rkd = three

    def colours(runs):
        lines = figure.draw(evaluate(load(runs))).axes[0].lines
        return {line.get_label().split("  ")[0]: line.get_color() for line in lines if "  " in line.get_label()}

    all_of_them = colours([baseline, salt, rkd])
    assert len(set(all_of_them.values())) == 3
    assert colours([baseline, rkd, salt]) == all_of_them
    assert colours([baseline, rkd])["RKD"] == all_of_them["RKD"]


def test_two_experiments_of_one_method_look_different(three, tmp_path):
    write_run(tmp_path / "more", SALT, teacher="elsewhere/teacher", weight=0.9, kd_steps=60)
    lines = figure.draw(evaluate(load([*three, tmp_path / "more"]))).axes[0].lines
    looks = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in lines if "  " in line.get_label()}
    assert len(set(looks.values())) == len(looks) == 4


def test_shares_that_are_reached_close_together_cover_none_of_another(three, tmp_path):
    kd = {"teacher": "elsewhere/teacher", "weight": 0.5, "kd_steps": 60}
    runs = [*three, *(tmp_path / name for name in ("ramp", "weak", "late", "near", "same", "more"))]
    # reached at 244, 228, 200, ...
    for name, ce in zip((run.name for run in runs[3:]), (4.2, 4.1, 4.0, 4.05, 4.06, 4.07), strict=True):
        write_run(tmp_path / name, {100: 4.75, 200: ce, 300: 3.75}, **kd, **{"kd.shape": name})
    drawn = figure.draw(evaluate(load(runs)))
    FigureCanvasAgg(drawn).draw()
    for ax in drawn.axes:
        boxes = [text.get_window_extent() for text in ax.texts]
        assert len(boxes) == 7
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
        assert min(box.y0 for box in boxes) > ax.bbox.y0  # they covered the axis and its title


def test_a_run_that_diverged_early_flattens_no_other(three, tmp_path):
    diverged = write_run(tmp_path / "diverged", {25: 6.0, 50: 1e4, 300: 1e4}, **{"model.optim.lr": 1})
    alone, together = (figure.draw(evaluate(load(runs))).axes[0].get_ylim() for runs in (three, [*three, diverged]))
    assert together == alone


def test_a_run_that_ends_far_above_another_is_shown(tmp_path):
    continued = write_run(tmp_path / "continued", {100: 2.1, 200: 2.05, 300: 2.0}, **{"model.optim.lr": 1})
    worse = write_run(tmp_path / "worse", {100: 5.0, 200: 5.2, 300: 5.3}, **{"model.optim.lr": 2})  # overfits
    for runs in ([write_run(tmp_path / "b", BASELINE)], [worse]):
        bottom, top = figure.draw(evaluate(load([*runs, continued]))).axes[0].get_ylim()
        assert bottom < 2.0
        assert top >= 5.0


@pytest.mark.parametrize("finals", [[4.0], [4.0, 4.1]])
def test_points_alone_are_inside_the_figure(finals, tmp_path):
    runs = [write_run(tmp_path / f"{ce}", {300: ce}, **{"model.optim.lr": ce}) for ce in finals]
    ax = figure.draw(evaluate(load(runs))).axes[0]
    bottom, top = ax.get_ylim()
    assert bottom + 0.002 < min(finals) <= max(finals) < top - 0.002
    assert top - bottom < 0.2
    assert not ax.yaxis.get_major_formatter().get_useOffset()  # "+4" above an axis from 0.00 to 0.05


@pytest.mark.parametrize("form", ["sweep-{}-{n}", "sweep-{}-{n}-{}", "{n}-{}"])
def test_long_names_leave_room_for_the_curves(form, tmp_path):
    """And stay different: in their ends, their middles, or their beginnings."""
    names = [form.format("of-many-settings-" * 6, "and-more-of-them-" * 6, n=n) for n in range(11)]
    runs = [write_run(tmp_path / name, BASELINE, **{"model.optim": {"lr": n, "b": n, "c": n}}) for n, name in
            enumerate(names)]  # fmt: skip
    drawn = figure.draw(evaluate(load(runs)))
    FigureCanvasAgg(drawn).draw()
    shown = [text.get_text() for text in drawn.legends[0].get_texts() if text.get_text().endswith("4.000")]
    assert len(set(shown)) == len(names)
    assert drawn.axes[1].bbox.x1 > 0.5 * drawn.bbox.x1


@pytest.mark.parametrize("last", [math.nan, math.inf])
def test_a_run_that_diverged_is_told(three, last, tmp_path):
    diverged = write_run(tmp_path / "wild", {100: 5.0, 300: last}, **{"model.optim.lr": 1})
    found = evaluate(load([*three, diverged]))
    assert f"the last validation CE of wild is {last}: it diverged" in found.notes
    assert sum("diverged" in note for note in found.notes) == 1
    named = evaluate(load([diverged, three[1]]), baseline="wild")
    assert all(math.isnan(row.reached_step) for row in named.rows)
    assert math.isnan(named.rows[1].difference)
    assert "CE of the reference" not in str([line.get_label() for line in figure.draw(named).axes[0].lines])


@pytest.mark.parametrize("names", [("unknown", "salt"), ("salt", "unknown")])
def test_a_run_of_unknown_flops_leaves_the_figure_its_unit(names, tmp_path):
    """Whichever comes first; no share of unknown FLOPs is noted beside its point."""
    runs = [
        write_run(tmp_path / name, SALT, student=math.nan if name == "unknown" else 10**7, **{"model.optim.lr": name})
        for name in names
    ]
    runs.insert(1, write_run(tmp_path / "baseline", BASELINE, student=10**7))
    by_steps, by_flops = figure.draw(evaluate(load(runs), baseline="baseline")).axes
    assert by_flops.get_xlabel() == "GFLOP of student and teacher"
    assert (len(by_steps.texts), len(by_flops.texts)) == (2, 1)


def test_a_final_loss_is_not_compared_with_that_of_an_earlier_step(three, tmp_path):
    """The reference is under way: all are compared where it is."""
    running = write_run(tmp_path / "running", {100: 5.0, 200: 4.5}, steps=200)
    found = evaluate(load([running, *three[1:]]))
    assert (found.reference, found.reference_val_ce) == ("running", 4.5)
    assert all(math.isnan(each.difference) for each in (*found.rows, *found.groups))
    assert found.equal["steps"] == (200, {"running": 4.5, "salt": SALT[200], "rkd": RKD[200]})
    text = report.markdown(found)
    assert "## Validation CE at the last point that all finished runs and the reference have reached" in text
    labels = [line.get_label() for line in figure.draw(found).axes[0].lines]
    assert "latest CE of the reference" in labels


def test_a_reference_that_has_only_begun_leaves_the_others_comparable(three, tmp_path):
    begun = write_run(tmp_path / "begun", {50: 6.0}, steps=50)
    found = evaluate(load([begun, *three[1:]]))
    assert found.reference == "begun"
    assert found.equal["steps"][0] == 300
    assert found.equal["steps"][1]["salt"] == SALT[300]
    assert "## Validation CE at the last point that all finished runs have reached" in report.markdown(found)


def test_a_reference_with_a_finished_seed_is_over(three, tmp_path):
    running = write_run(tmp_path / "running", {100: 5.0, 200: 4.5}, steps=200, seed_everything=1)
    found = evaluate(load([*three, running]), baseline="running")
    assert (found.reference, found.reference_val_ce) == ("running", 4.0)
    assert [row.difference for row in found.rows] == pytest.approx([0.0, -0.25, 0.25, math.nan], nan_ok=True)
    assert "Reference: running, final validation CE 4.0000." in report.markdown(found)
    assert "final CE of the reference" in [line.get_label() for line in figure.draw(found).axes[0].lines]
    assert found.equal["steps"][0] == 300


def test_a_teacher_may_be_the_reference(three, tmp_path):
    teacher = write_run(tmp_path / "teacher", {100: 5.0, 300: 4.5}, **{"model.student.config": {"hidden_size": 8}})
    path = str(teacher / "checkpoints/step-00000300.ckpt")
    salt = write_run(tmp_path / "taught", SALT, teacher=path, weight=0.5, kd_steps=60)
    found = evaluate(load([teacher, three[0], salt]), baseline="teacher")
    assert {row.run: row.difference for row in found.rows} == {"teacher": 0.0, "baseline": -0.5, "taught": -0.75}


def test_steps_of_a_short_run_have_a_decimal(tmp_path):
    runs = [
        write_run(tmp_path / "a", {10: 5.0, 12: 4.0}, 12, 2, **{"trainer.max_steps": 12}),
        write_run(tmp_path / "b", {10: 5.0, 12: 3.0}, 12, 2, **{"trainer.max_steps": 12, "model.optim.lr": 1}),
    ]
    assert " 11.0 (91.7%) |" in report.markdown(evaluate(load(runs)))


@pytest.mark.parametrize(
    ("flops", "unit"),
    [(2e21, "ZFLOP"), (1e18, "EFLOP"), (9e17, "PFLOP"), (1e6, "MFLOP"), (10, "FLOP"), (0, "FLOP")],
)
def test_flop_unit(flops, unit):
    assert report.flop_unit(flops)[1] == unit


@pytest.fixture
def branch(tmp_path):
    """The trunk, a branch of it from step 100 on, and a branch of that branch from step 200 on."""
    trunk = {100: 5.0, 104: 3.0, 200: 4.5}  # step 104: after the branch point, before the branch's first logged step
    write_run(tmp_path / "trunk", trunk, log_every=1)  # the first step is always logged
    write_run(
        tmp_path / "branch",
        {106: 5.0, 200: 4.25, 300: 4.0},
        after=100,
        ckpt_path="trunk/checkpoints/step-00000100.ckpt",
    )
    last = "branch/checkpoints/step-00000200.ckpt"
    return write_run(tmp_path / "twig", {300: 3.5}, after=200, ckpt_path=last)


def test_a_branch_in_a_folder_of_its_own_has_the_log_of_what_it_went_on_from(branch, tmp_path):
    whole = write_run(tmp_path / "whole", {100: 5.0, 106: 5.0, 200: 4.25, 300: 3.5})
    level = write_run(tmp_path / "level", {100: 5.0, 200: 4.75, 300: 4.5})
    found = compare([level, branch, whole], tmp_path / "out")
    _, twig, never_stopped = found.rows
    assert twig.reached_step == never_stopped.reached_step == pytest.approx(106 + 94 * 0.5 / 0.75)
    assert twig.reached_flops_share == never_stopped.reached_flops_share
    assert [len(run.val_ce.steps) for run in found.runs] == [3, 4, 4]
    assert "no log before" not in str(found.notes)


def test_a_branch_that_ended_before_a_logged_step_still_comes_from_its_trunk(tmp_path):
    """It was validated at step 110, but would have logged at step 150. Its trunk had a teacher."""
    write_run(tmp_path / "a", {50: 6.0, 100: 5.0}, 100, log_every=1, teacher="t", weight=0.5, kd_steps=60)
    of_a = {"ckpt_path": str(tmp_path / "a/checkpoints/step-00000100.ckpt")}
    b = write_run(tmp_path / "b", {110: 4.5}, 120, log_every=50, after=100, **of_a)
    of_b = {"ckpt_path": str(tmp_path / "b/checkpoints/step-00000120.ckpt")}
    c = lineage.whole(*load([write_run(tmp_path / "c", {200: 4.0, 300: 3.5}, after=120, **of_b)]))
    assert (c.method, c.kd_steps, c.began, c.lost) == ("SALT step", 60, 0, "")
    assert c.val_ce.steps.tolist() == [50, 100, 110, 200, 300]
    assert [c.flops(step) for step in (30, 60, 110, 300)] == [30 * 15, 60 * 15, 60 * 15 + 50 * 10, 60 * 15 + 240 * 10]
    assert lineage.whole(*load([b])).val_ce.steps.tolist() == [50, 100, 110]
    (tmp_path / "a").rename(tmp_path / "moved")
    gone = lineage.whole(*load([b]))
    assert (gone.method, gone.began, gone.lost) == ("unknown", 100, of_a["ckpt_path"])


def test_where_a_branch_reaches_a_loss_is_not_made_up(branch, tmp_path):
    """The run that it continued is gone: at its first validation it is below the level, perhaps for long already."""
    (tmp_path / "branch").rename(tmp_path / "moved")
    level = write_run(tmp_path / "level", {100: 5.0, 200: 4.75, 300: 4.5})
    found = compare([level, branch], tmp_path / "out")
    assert math.isnan(found.rows[1].reached_step)
    assert math.isnan(found.rows[1].reached_flops_share)
    (tmp_path / "branch").mkdir()
    (tmp_path / "branch/config.yaml").write_text("a: [")
    assert math.isnan(compare([level, branch], tmp_path / "out").rows[1].reached_step)  # that folder was not given
    assert "twig has no log before step 200, and the run that it resumed from was not found" in str(found.notes)


def test_what_was_lost_before_a_branch_is_lost_to_its_branch(branch, tmp_path):
    (tmp_path / "trunk").rename(tmp_path / "moved")
    twig = lineage.whole(read_run(branch, "twig"))
    assert twig.lost == "trunk/checkpoints/step-00000100.ckpt"
    assert list(twig.val_ce.steps) == [106, 200, 300]


@pytest.mark.parametrize("gone", ["config.yaml", "*tfevents*"])
def test_a_trunk_without_settings_or_log_is_as_good_as_gone(branch, tmp_path, gone):
    for path in (tmp_path / "branch").glob(gone):
        path.unlink()
    twig = lineage.whole(read_run(branch, "twig"))
    assert twig.lost == "branch/checkpoints/step-00000200.ckpt"
    assert list(twig.val_ce.steps) == [300]


def test_a_run_whose_beginning_is_not_known_is_no_seed_of_one_from_scratch(tmp_path):
    """Its checkpoint was copied: the folder above is there, and is no run."""
    (tmp_path / "starts/x").mkdir(parents=True)
    (tmp_path / "starts/scores.json").write_text('{"scoring_flops": 400.0, "scoring_s": 20.0}')
    copied = {"ckpt_path": "starts/x/step-00000100.ckpt"}
    taught = {"teacher": "teacher/checkpoints/step-00000200.ckpt", "weight": 0.5, "kd_steps": 100}
    late = {200: 4.25, 300: 3.75}
    runs = [
        write_run(tmp_path / "copied", late, after=100, **taught, **copied),
        write_run(tmp_path / "scratch", SALT, **taught, seed_everything=1),
        write_run(tmp_path / "off", late, after=100, **copied, **{"data.selection": "starts"}),
        write_run(tmp_path / "baseline", BASELINE),
        write_run(tmp_path / "teacher", BASELINE),
    ]
    off = lineage.whole(read_run(runs[2], "off"))
    assert math.isnan(off.flops(300)), "it logs none of a teacher, which may have been there"
    assert math.isnan(off.total("train/tokens", 105)), "between the branch and its first log"
    assert off.total("train/tokens", 110) == 220
    with SummaryWriter(str(runs[2]), filename_suffix=".start-2") as writer:
        writer.add_scalar("train/flops_teacher_total", 500, 110)
    found = compare(runs, tmp_path / "out")
    assert found.reference == "baseline"
    assert [group.runs for group in found.groups] == [["copied"], ["scratch"], ["off"], ["baseline"]]
    assert [row.method for row in found.rows[:3]] == ["SALT step", "SALT step", "unknown"]
    assert found.groups[0].changed["ckpt_path"] == (None, "starts/x/step-00000100.ckpt")
    said = "and the run that it resumed from was not found (starts/x/step-00000100.ckpt): its earlier settings and loss"
    assert [note.split(", ", 1)[0] for note in found.notes if said in note] == [
        f"{name} has no log before step 100" for name in ("copied", "off")
    ]
    costs = [row.teacher_training_flops for row in found.rows]
    shares = [row.reached_flops_share_with_teacher_training for row in found.rows]
    assert [math.isnan(cost) for cost in costs] == [math.isnan(s) for s in shares] == [True, False, True, True, True]
    assert found.rows[2].scoring_flops == 400, "which is not all that it needed besides"
    assert (found.rows[2].reached_flops_share, found.rows[2].teacher_flops) == ((2500 + 500) / 3000, 500)


def test_the_trunk_of_a_branch_may_keep_its_checkpoints_apart(branch, tmp_path):
    """In a folder that its settings name; it is known if that run is given too."""
    for name in ("branch", "twig"):
        config = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        config["ckpt_path"] = config["ckpt_path"].replace("branch/checkpoints", "big/ckpt")
        config["checkpoint"] = {"folder": "big/ckpt" if name == "branch" else None}
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config))
    found = compare([tmp_path / "branch", branch], tmp_path / "out")
    assert list(found.runs[1].val_ce.steps) == [100, 106, 200, 300]
    assert "no log before" not in str(found.notes)
    assert "twig has no log before step 200" in str(compare([branch], tmp_path / "out").notes)


@pytest.mark.parametrize(
    ("checkpoint", "step"),
    [("a/checkpoints/step-00000100.ckpt", 100), ("apart/step-00000100.ckpt", 100), ("last", 109)],
)
def test_a_run_that_has_lost_a_log_of_its_own_is_known_by_its_settings(tmp_path, checkpoint, step):
    apart = {"checkpoint.folder": "apart", "ckpt_path": checkpoint}
    runs = [
        write_run(tmp_path / "a", {200: 4.5, 300: 4.0}, after=100, **apart),
        write_run(tmp_path / "b", BASELINE, seed_everything=1),
    ]
    found = compare(runs, tmp_path / "out")
    assert [group.n for group in found.groups] == [2]
    assert f"a has no log before step {step}: the step at which it reaches a loss may be unknown" in found.notes
    whole = write_run(tmp_path / "whole", BASELINE)  # of the same seed: the one that knows its beginning counts
    assert [group.runs for group in compare([*runs, whole], tmp_path / "out").groups] == [["b", "whole"]]


def earlier(run, step, **config):
    """Writes what an earlier start left beside config.yaml."""
    (run / f"config.until-{step:08d}.yaml").write_text(yaml.safe_dump(settings(run, **config)))


def test_a_start_from_weights_that_was_resumed_is_a_seed_of_the_others(tmp_path):
    """A resume writes down the sizes that the checkpoint holds; the first start has only the path of the weights."""
    start = {"model.student.path": "models/salt", "model.student.config": {}}
    sizes = {"model.student.config": {"hidden_size": 32, "attention_dropout": 0.1}}
    first = write_run(tmp_path / "s0", BASELINE, **start)
    resumed = write_run(tmp_path / "s1", BASELINE, seed_everything=1, **start | sizes)
    earlier(resumed, 100, seed_everything=1, **start)
    found = compare([first, resumed], tmp_path / "out")
    assert [(group.n, group.changed) for group in found.groups] == [(2, {})]
    assert not any("continued" in note for note in found.notes)


def test_a_run_that_went_on_under_other_settings_is_an_experiment_of_its_own(tmp_path):
    longer = write_run(tmp_path / "longer", BASELINE)
    earlier(longer, 100, **{"trainer.max_steps": 100, "trainer.devices": 2})
    whole = write_run(tmp_path / "whole", {100: 5.0, 200: 4.5, 300: 4.25})
    again = write_run(tmp_path / "again", {300: 3.0}, log_every=1, **{"trainer.enable_progress_bar": False})
    earlier(again, 200, **{"trainer.enable_progress_bar": True, "ckpt_path": "x"})
    found = evaluate(load([longer, whole, again]))
    assert (found.reference, found.reference_val_ce) == ("whole", 4.25)  # the first that is BASELINE throughout
    assert [group.n for group in found.groups] == [1, 1]
    assert found.groups[0].changed == {"until step 100: trainer.max_steps": (None, 100)}
    assert found.notes == [
        "again repeats whole (same seeds, and no setting differs that affects results), so only the latter is counted; "
        "yet its val CE is 3.0000, there 4.2500: a file behind its settings (text, teacher, scores) or a library has "
        "changed, or the device rounds differently from run to run",
        "longer continued at step 100 under other settings: trainer.max_steps 300 (before 100)",
    ]


def test_a_changed_template_is_told_on_one_line(tmp_path):
    run = write_run(tmp_path / "run", BASELINE, **{"data.examples.prompt": "Q: {q}\nA:", "data.examples.messages": ""})
    earlier(run, 100, **{"data.examples.prompt": "{q}", "data.examples.messages": "chat"})
    said = 'data.examples.messages "" (before chat), data.examples.prompt "Q: {q}\\nA:" (before {q})'
    assert evaluate(load([run])).notes[-1] == f"run continued at step 100 under other settings: {said}"


def test_callbacks_and_dtypes_that_change_are_changes(tmp_path):
    ema = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.9}}
    bar = {"class_path": "lightning.pytorch.callbacks.TQDMProgressBar", "init_args": {"leave": True}}
    timer = {"class_path": "lightning.pytorch.callbacks.Timer", "init_args": {"duration": "00:01:00:00"}}
    for callbacks in ([], None, [bar], [bar, timer]):
        plain, both, faster = (
            flat({"trainer": {"callbacks": own}, "model": {"student": {"dtype": None}}})
            for own in (callbacks, [bar, ema], [{**ema, "init_args": {"decay": 0.5}}])
        )
        assert changed(plain, both) == {"trainer.callbacks": (None, "EMAWeightAveraging decay=0.9")}
        said = "EMAWeightAveraging decay=0.9", "EMAWeightAveraging decay=0.5"
        assert changed(both, faster) == {"trainer.callbacks": said}
        assert changed(plain, plain) == changed(both, both) == {}
        assert changed(plain, plain | {"model.student.dtype": "bfloat16"}) == {
            "model.student.dtype": (None, "bfloat16")
        }


@pytest.mark.parametrize("until", [100, 150])
def test_a_branch_tells_what_its_trunk_had_set(branch, tmp_path, until):
    trunk = yaml.safe_load((tmp_path / "trunk/config.yaml").read_text())
    trunk["trainer"]["max_steps"] = 600  # of a later start of the trunk, which is not part of the branch
    (tmp_path / "trunk/config.yaml").write_text(yaml.safe_dump(trunk))
    earlier(tmp_path / "trunk", until, **{"data.source": ["a", "b"]})
    own = yaml.safe_load((tmp_path / "branch/config.yaml").read_text()) | {"data": {"source": ["c"]}}
    (tmp_path / "branch/config.yaml").write_text(yaml.safe_dump(own))
    found = compare([tmp_path / "branch"], tmp_path / "out")
    assert "branch continued at step 100 under other settings: data.source c (before ['a', 'b'])" in found.notes
    assert "max_steps" not in str(found.notes)


def test_a_branch_that_went_on_by_itself_still_comes_from_its_trunk(branch, tmp_path):
    """Its newest start names `last`, its first one the trunk; `branch` itself has neither."""
    first = yaml.safe_load((tmp_path / "branch/config.yaml").read_text())
    (tmp_path / "branch/config.until-00000200.yaml").write_text(yaml.safe_dump(first))
    (tmp_path / "branch/config.yaml").write_text(yaml.safe_dump(first | {"ckpt_path": "last"}))
    earlier(tmp_path / "trunk", 150, **{"data.seed": 5})
    earlier(tmp_path / "trunk", 50, **{"data.seed": 4})
    found = compare([tmp_path / "branch"], tmp_path / "out")
    assert list(found.runs[0].val_ce.steps) == [100, 106, 200, 300]
    assert [step for step, _ in found.runs[0].earlier] == [50, 100, 200]
    assert "no log before" not in str(found.notes)


def test_a_run_that_a_teacher_has_helped_before_is_no_baseline(tmp_path):
    """SALT until step 60; from step 100 on without KD, in a separate folder."""
    kd = {"teacher": "teacher/checkpoints/step-00000300.ckpt", "weight": 0.5, "kd_steps": 60}
    rows = {"data.selection": "rows", "data.keep.order": "lowest"}
    write_run(tmp_path / "salt", SALT, log_every=1, **kd, **{"kd.shape": "cosine"}, **rows)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/scores.json").write_text('{"scoring_flops": 400.0, "scoring_s": 20.0}')
    trunk = "salt/checkpoints/step-00000100.ckpt"
    off = write_run(tmp_path / "off", {200: 4.25, 300: 3.75}, after=100, ckpt_path=trunk, **kd | {"weight": 0.0})
    found = compare(
        [off, *(write_run(tmp_path / name, BASELINE) for name in ("baseline", "teacher"))], tmp_path / "out"
    )
    assert found.reference == "baseline"
    row = found.rows[0]
    assert (row.method, found.runs[0].kd_steps) == ("SALT_DS cosine, lowest rows", 60)
    assert (row.teacher_flops, row.teacher_training_flops, row.scoring_flops) == (60 * 5, 3000, 400)
    assert row.reached_flops_share_with_teacher_training == (2500 + 300 + 3000 + 400) / 3000


@pytest.mark.parametrize(
    ("before", "now", "method", "kd_steps"),
    [
        ({"kd_steps": 60}, {"kd_steps": 60}, "SALT step", 60),
        ({"kd_steps": 200}, {"weight": 0.0}, "SALT step", 100),
        ({}, {"weight": 0.0}, "SALT step", 100),
        ({"kd_steps": 60, "kd.shape": "linear"}, {"kd_steps": 60}, "SALT linear", 60),
        ({"kd_steps": 60, "kd.shape": "linear"}, {"kd_steps": 200}, "SALT step", 200),
        ({"kd_steps": 200}, {"kd_steps": 60}, "SALT step", 100),
        ({"weight": 0.0}, {"kd_steps": 200}, "SALT step", 200),
        ({"weight": 0.0}, {"kd_steps": 60}, "BASELINE", 0),
        ({"weight": 0.0}, {"kd_steps": 100}, "BASELINE", 0),
        (
            {"weight": 0.0, "data.selection": "a", "data.keep.order": "lowest"},
            {"weight": 0.0, "data.selection": "b", "data.keep.order": "random"},
            "selection without KD, random rows",
            0,
        ),
        ({}, {}, "RKD", math.inf),
    ],
)
def test_the_method_is_that_of_all_starts(tmp_path, before, now, method, kd_steps):
    """By the settings until step 100, and by those from there on."""
    kd = {"teacher": "t", "weight": 0.5}
    path = write_run(tmp_path / "r", SALT, **kd | now)
    earlier(path, 100, **kd | before)
    run = read_run(path, "r")
    assert (run.method, run.kd_steps) == (method, kd_steps)


def test_a_boundary_that_a_margin_found_is_known_after_it(tmp_path):
    margin = {"teacher": "t", "weight": 0.5, "kd_steps": 200, "kd.stop_margin": 0.1}
    trunk = write_run(tmp_path / "trunk", SALT, log_every=1, **margin)
    with SummaryWriter(str(trunk), filename_suffix=".start-2") as writer:
        writer.add_scalar("probe/stop_step", 75, 75)
    on = {"after": 100, "ckpt_path": "trunk/checkpoints/step-00000100.ckpt"}
    run = lineage.whole(read_run(write_run(tmp_path / "branch", {300: 4.0}, **on, **margin), "branch"))
    assert (run.method, run.kd_steps, run.last("probe/stop_step")) == ("SALT step, margin 0.1", 75, 75)
    assert "val/ce" not in lineage.whole(read_run(write_run(tmp_path / "silent", {}, **on, **margin), "silent")).curves
    anew = {"teacher": "t", "weight": 0.5, "kd_steps": 260}  # KD again, without a margin
    assert lineage.whole(read_run(write_run(tmp_path / "anew", {300: 4.0}, **on, **anew), "anew")).kd_steps == 260
    sooner = {"after": 50, "ckpt_path": "trunk/checkpoints/step-00000050.ckpt"}
    early = write_run(tmp_path / "early", {300: 4.0}, **sooner, **margin)
    assert lineage.whole(read_run(early, "early")).kd_steps == 200


def test_paths_of_the_same_thing_are_no_other_settings():
    was = {"data.source": "/a/text.jsonl", "model.teacher.path": "runs/../runs/t.ckpt", "data.tokenizer": "train"}
    now = {"data.source": "text.jsonl", "model.teacher.path": "/b/runs/t.ckpt", "data.tokenizer": "runs/x/tokenizer"}
    assert changed(was, now) == {}
    assert changed(was, {**now, "data.source": "other.jsonl"}) == {"data.source": ("/a/text.jsonl", "other.jsonl")}
    assert changed(was, {**now, "data.source": "xt.jsonl"}) != {}


def test_a_teacher_that_has_left_may_lie_elsewhere(tmp_path):
    for kd_steps, steps in ((60, []), (100, []), (200, [100])):
        path = write_run(tmp_path / f"salt{kd_steps}", SALT, teacher="there/t.ckpt", weight=0.5, kd_steps=kd_steps)
        earlier(path, 100, teacher="here/t.ckpt", weight=0.5, kd_steps=kd_steps)
        assert list(read_run(path, "salt").changes) == steps


def test_what_held_before_is_alike_for_all_seeds(tmp_path):
    runs = []
    for seed in range(2):
        runs.append(write_run(tmp_path / str(seed) / "b", BASELINE, seed_everything=seed, **{"data.selection": "z"}))
        rows = str(tmp_path / str(seed) / "rows")
        earlier(runs[-1], 100, seed_everything=seed, **{"data.selection": rows, "trainer.max_steps": 100})
    assert [group.n for group in evaluate(load(runs)).groups] == [2]


def test_earlier_settings_that_cannot_be_read_are_told(tmp_path):
    run = write_run(tmp_path / "run", BASELINE)
    (run / "config.until-00000100.yaml").write_text("a: [")
    (note,) = evaluate(load([run])).notes
    assert "config.until-00000100.yaml is not YAML" in note
    assert note.endswith("the settings before step 100 are not known")


def test_a_baseline_that_has_no_loss_yet_is_no_reference(tmp_path):
    long = write_run(tmp_path / "long", BASELINE)
    earlier(long, 100, **{"trainer.max_steps": 100})
    running = write_run(tmp_path / "running", {}, steps=20)
    assert evaluate(load([running, long])).reference == "long"


def test_a_reference_validated_before_its_first_step_alone_has_no_cost(tmp_path):
    """As after trainer.validate and the first steps of trainer.fit."""
    begun = write_run(tmp_path / "begun", {0: 6.0}, steps=50)
    salt = write_run(tmp_path / "salt", {0: 6.0, **SALT}, teacher="t", weight=0.5, kd_steps=60)
    found = evaluate(load([begun, salt]))
    assert (found.reference, found.reference_val_ce) == ("begun", 6.0)
    row = found.rows[1]
    assert row.reached_step == 0
    shares = (row.reached_steps_share, row.reached_flops_share, row.reached_seconds_share)
    assert all(map(math.isnan, shares))
    assert [[text.get_text() for text in ax.texts] for ax in figure.draw(found).axes] == [[], []]


def test_a_checkpoint_brings_sizes_that_nobody_had_given(tmp_path):
    sizes = {"model.student.config.hidden_size": 8}
    run = write_run(tmp_path / "run", BASELINE, **sizes)
    on = write_run(tmp_path / "on", BASELINE, **sizes, **{"model.student.config.head_dim": 4})
    small = write_run(tmp_path / "small", BASELINE, **{"model.student.config.hidden_size": 4})
    one, resumed, other = load([run, on, small])
    assert lineage.same_model(one, resumed)
    assert not lineage.same_model(one, other)


def count(run, kind, tokens, size, steps, ce=4.0):
    """The values that a validation (or test) of this many tokens and bytes logs."""
    folder = run if kind == "val" else run / "test"
    start = 1 + len(list(folder.glob("*tfevents*")))  # within a second, names do not show which came first
    with SummaryWriter(str(folder), filename_suffix=f".start-{start}") as writer:
        for step in steps:
            writer.add_scalar(f"{kind}/tokens", tokens, step)
            writer.add_scalar(f"{kind}/ce", ce, step)
            writer.add_scalar(f"{kind}/bits_per_byte", ce * tokens / size / math.log(2), step)


def test_losses_of_other_text_are_no_comparison(tmp_path):
    text = {"data.source": "a.jsonl"}
    names = ("first", "same", "more", "other", "moved", "coarser")
    runs = [write_run(tmp_path / name, BASELINE, **text) for name in names]
    tokens_of, bytes_of = (900, 900, 901, 900, 900, 800), (3000, 3000, 3001, 3002, 3000, 3000)
    for run, tokens, size in zip(runs, tokens_of, bytes_of, strict=True):
        count(run, "val", tokens, size, BASELINE)
    count(runs[4], "val", 800, 2700, [100])
    count(runs[4], "val", 700, 2700, [50])
    for number, run in enumerate(runs):
        tree = settings(run, **{"data.source": f"{run.name}.jsonl", "trainer.precision": f"{number}"})  # moved, perhaps
        (run / "config.yaml").write_text(yaml.safe_dump(tree))
    found = evaluate(load(runs))
    assert found.other_text == ["more", "other", "coarser"]
    assert [row.run for row in found.rows if math.isnan(row.difference)] == found.other_text
    # moved is there at its first validation on this text, and perhaps was there before
    assert [row.run for row in found.rows if math.isnan(row.reached_step)] == ["more", "other", "moved", "coarser"]
    assert found.runs[4].val_ce.steps.tolist() == [200, 300]
    assert list(found.equal["steps"][1]) == ["first", "same", "moved"]
    assert [(group.n, group.mean) for group in found.groups] == [(1, 4.0)] * 6  # each has a loss of its own
    assert [group.runs[0] for group in found.groups if group.paired_differences] == ["same", "moved"]
    shown = [line.get_label() for line in figure.draw(found).axes[0].lines]
    assert sum(name in " ".join(shown) for name in names) == 3
    assert found.notes == [
        "more was validated on other text than first (901 tokens, there 900): their losses cannot be compared",
        "other was validated on other text than first (900 tokens, there 900): their losses cannot be compared",
        "moved was validated on other text from step 200 on (900 tokens, before that 800): its losses before that are "
        "left out",
        "coarser was validated in other tokens than first (800 tokens, there 900): bits per byte can be compared, CE "
        "cannot",
        "the reference's loss was reached by the first validation, or earlier: same",
    ]


def test_two_losses_on_one_text_are_compared_whatever_digits_a_log_has(tmp_path):
    names = ("first", "same", "coarser", "perfect", "zero")  # of a CE of 0 nats, the bytes are not known
    runs = [write_run(tmp_path / name, {}, **{"model.optim.lr": n}) for n, name in enumerate(names)]
    for run, tokens, ce in zip(runs, (900, 900, 800, 900, 800), (4.1, 3.7, 3.9, 0.0, 0.0), strict=True):
        count(run, "val", tokens, 3000, [300], ce)
    found = evaluate(load(runs))
    assert found.other_text == ["coarser", "zero"]
    assert [" in other tokens " in note for note in found.notes if "was validated" in note] == [True, False]


def test_a_better_tuned_baseline_is_told(tmp_path):
    """Means over seeds; a larger, a shorter and a changed run are none."""
    low = {step: ce - 0.25 for step, ce in BASELINE.items()}
    lr = "model.optim.lr"
    first = write_run(tmp_path / "first", BASELINE, **{lr: 1e-3})
    tuned = [
        write_run(tmp_path / f"tuned{s}", {**low, 300: 3.5 + s}, **{lr: 3e-3, "seed_everything": s}) for s in (0, 1)
    ]
    lower = write_run(tmp_path / "lower", {**low, 300: 3.875}, **{lr: 2e-3})
    larger = write_run(tmp_path / "larger", low, **{"model.student.config.hidden_size": 9})
    for run, size in ((first, 8), (tuned[0], 8), (tuned[1], 8), (lower, 8)):
        tree = yaml.safe_load((run / "config.yaml").read_text())
        tree["model"] |= {"student": {"config": {"hidden_size": size}}}
        (run / "config.yaml").write_text(yaml.safe_dump(tree))
    shorter = write_run(tmp_path / "shorter", {100: 3.0}, steps=100, **{"trainer.max_steps": 100})
    salt = write_run(tmp_path / "salt", SALT, teacher="t", weight=0.5, kd_steps=60)
    found = evaluate(load([first, *tuned, lower, larger, shorter, salt]))
    assert found.reference == "first"
    said = "lower, a BASELINE of the same model that has read as much, ends 0.1250 below the reference; compare with"
    assert [note for note in found.notes if "a BASELINE of" in note] == [f"{said} the better one: --baseline lower"]
    assert "a BASELINE of" not in str(evaluate(load([first, larger, shorter, salt])).notes)
    assert "a BASELINE of" not in str(evaluate(load([first, *tuned, salt]), "tuned0").notes)  # 4.0 on the mean as first
    taught = write_run(tmp_path / "taught", low, **{lr: 4e-3})
    with SummaryWriter(str(taught), filename_suffix=".start-2") as writer:
        writer.add_scalar("train/flops_teacher_total", 300, 300)
    running = write_run(tmp_path / "running", low, **{lr: 4e-3, "trainer.max_steps": 600})
    assert "a BASELINE of" not in str(evaluate(load([first, running, salt])).notes)
    elsewhere = write_run(tmp_path / "elsewhere", low, **{"data.source": "better.jsonl"})
    assert "a BASELINE of" not in str(evaluate(load([first, taught, salt])).notes)
    assert "a BASELINE of" not in str(evaluate(load([first, elsewhere, salt])).notes)
    apart = write_run(tmp_path / "apart", low, **{lr: 4e-3})
    for run, tokens, ce in ((first, 900, 4.0), (apart, 800, 3.75)):
        count(run, "val", tokens, 3 * tokens, [300], ce)
    assert "a BASELINE of" not in str(evaluate(load([first, apart, salt])).notes)
    late = write_run(tmp_path / "late", low, after=50, ckpt_path="last", **{lr: 4e-3})  # with what before?
    assert "a BASELINE of" not in str(evaluate(load([first, late, salt])).notes)
    lost = write_run(tmp_path / "lost", {**BASELINE, 300: math.nan}, **{lr: 9.0})
    assert evaluate(load([lost, first, salt])).reference == "first"


def test_answers_have_a_table_of_their_own(three):
    shares = {"examples": 120, "choice_accuracy": 0.5546, "choice_accuracy_low": 0.4911, "choice_accuracy_high": 0.6164,
              "choice_accuracy_majority": 0.62, "choice_accuracy_chance": 0.5}  # fmt: skip
    assert "## Answers" not in report.markdown(evaluate(load(three)))
    with SummaryWriter(str(three[1] / "test")) as writer:
        for name, value in shares.items():
            writer.add_scalar(f"test/{name}", value, 300)
    shown = report.markdown(evaluate(load(three))).partition("## Answers of the test\n\n")[2]
    assert shown.splitlines()[:3] == [
        "| run  | examples |  choice accuracy (95%) | the majority's | chance |",
        "|------|---------:|-----------------------:|---------------:|-------:|",
        "| salt |      120 | 55.5% (49.1% to 61.6%) |          62.0% |  50.0% |",
    ]
    with SummaryWriter(str(three[1] / "test"), filename_suffix=".start-9") as writer:
        for name, value in shares.items():
            writer.add_scalar(f"test/{name}", value, 300)
        for end, value in (("", 0.25), ("_low", 0.125), ("_high", 0.5), ("_majority", 0.0625)):
            writer.add_scalar(f"test/exact_match{end}", value, 300)
    both = report.markdown(evaluate(load(three))).partition("## Answers of the test\n\n")[2].splitlines()[2]
    cells = [cell.strip() for cell in both.strip("|").split("|")]
    assert cells[2:] == ["25.0% (12.5% to 50.0%)", "6.2%", "55.5% (49.1% to 61.6%)", "62.0%", "50.0%"]


def test_many_experiments_are_told_apart_in_the_figure(tmp_path):
    runs = [write_run(tmp_path / f"r{i}", BASELINE, **{"model.optim.lr": i + 1.0}) for i in range(31)]
    drawn = figure.draw(evaluate(load(runs)))
    drawn.canvas.draw()
    curves = [line for line in drawn.axes[0].lines if len(line.get_xdata()) == 3]
    assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in curves[1:]}) == 30
    box = drawn.legends[0].get_window_extent()
    assert box.y0 >= 0
    assert box.y1 <= drawn.bbox.y1


def test_a_test_of_another_step_or_text_is_told(three):
    for run, steps, tokens in zip(three, ([300], [100, 200], [300]), (50, 50, 60), strict=True):
        count(run, "test", tokens, 3 * tokens, steps)
    assert evaluate(load(three)).notes == [
        "the test CE of salt is from step 200, not from step 300",
        "the test CE of rkd is from other text than that of baseline",
    ]


def test_a_test_at_the_end_of_a_run_that_is_not_over_is_of_its_last_step(tmp_path):
    run = write_run(tmp_path / "run", {100: 5.0, 200: 4.0}, steps=200)
    count(run, "test", 50, 150, [200])
    notes = evaluate(load([run])).notes
    assert any("200 of 300" in note for note in notes), notes
    assert not any("test CE" in note for note in notes)


@pytest.mark.parametrize(
    ("setting", "place", "path", "flops"),
    [
        ("checkpoint.folder", "big/teacher", "big/teacher/step-00000200.ckpt", 2000),
        ("checkpoint.export", "models/teacher", "models/teacher", 3000),
    ],
)
def test_a_teacher_apart_from_its_runs_folder_is_known_with_its_cost(tmp_path, setting, place, path, flops):
    teacher = write_run(tmp_path / "teacher", BASELINE, **{setting: place})
    salt = write_run(tmp_path / "salt", SALT, teacher=path, weight=0.5, kd_steps=60)
    rows = evaluate(load([teacher, salt, write_run(tmp_path / "baseline", BASELINE)])).rows
    assert [row.method for row in rows] == ["TEACHER", "SALT step", "BASELINE"]
    assert rows[1].teacher_training_flops == flops


def test_a_teacher_whose_run_is_not_named_is_asked_for(tmp_path):
    path = tmp_path / "teacher" / "checkpoints" / "step-00000300.ckpt"
    path.parent.mkdir(parents=True)
    path.touch()
    own = {"teacher": str(path), "weight": 0.5}
    salt, rkd = write_run(tmp_path / "salt", SALT, kd_steps=60, **own), write_run(tmp_path / "rkd", RKD, **own)
    begun = write_run(tmp_path / "begun", BASELINE, **{"model.student.path": "a", "trainer.max_steps": 200})
    unused = write_run(tmp_path / "baseline", BASELINE, teacher=str(path))  # of weight 0
    folder = write_run(tmp_path / "folder", SALT, teacher=str(tmp_path), weight=0.5, kd_steps=60)  # of no run, perhaps
    notes = evaluate(load([unused, salt, rkd, begun, folder])).notes
    assert notes[-1] == (
        f"the teacher of salt, rkd, {path}, is in none of these runs; to count its own training, name "
        f"{tmp_path}/teacher too"
    )
    assert sum("is in none" in note for note in notes) == 1


def test_a_teacher_outside_a_run_s_folder_has_no_run_to_name(tmp_path):
    (path := tmp_path / "models" / "small.ckpt").parent.mkdir()
    path.touch()
    salt = write_run(tmp_path / "salt", SALT, kd_steps=60, teacher=str(path), weight=0.5)
    assert evaluate(load([salt])).notes[-1] == (
        f"the teacher of salt, {path}, is in none of these runs: the cost of its training is unknown"
    )


def test_a_teacher_that_was_moved_is_not_taken_for_the_baseline(tmp_path):
    small, own = {"model.student.config.hidden_size": 8}, {"model.student.config.hidden_size": 16}
    path = "gone/checkpoints/step-00000300.ckpt"
    teacher = write_run(tmp_path / "moved", BASELINE, **small)
    salt = write_run(tmp_path / "salt", SALT, teacher=path, weight=0.5, kd_steps=60, **own)
    two = [
        write_run(tmp_path / name, BASELINE, **own, seed_everything=n) for n, name in enumerate(("baseline", "other"))
    ]
    begun = write_run(tmp_path / "begun", SALT, **small, **{"model.student.path": "models/small"})  # not from scratch
    found = evaluate(load([teacher, salt, *two, begun]))
    assert found.reference == "baseline"
    assert found.notes[1:] == [
        f"the teacher of salt, {path}, is in none of these runs; if it is from moved, which has another model, the "
        "cost of that run is missing here"
    ]
    assert evaluate(load([salt, *two])).notes == [
        f"the teacher of salt, {path}, is in none of these runs: the cost of its training is unknown"
    ]


def test_a_run_that_began_with_weights_is_no_baseline(tmp_path):
    on = write_run(tmp_path / "on", SALT, **{"model.student.path": "models/salt"})
    found = evaluate(load([on, write_run(tmp_path / "baseline", BASELINE)]))
    assert found.reference == "baseline"
    assert [row.method for row in found.rows] == ["CONTINUED", "BASELINE"]
    assert "on started from the weights of models/salt: the cost of training those is not counted" in found.notes


@pytest.mark.parametrize(
    ("said", "flops"),
    [
        ("- FLOPs of the student: 1.5 TFLOP\n- FLOPs of the teacher: 250 GFLOP, without its own training\n", 1.75e12),
        ("- FLOPs of the student: not known\n- FLOPs of the teacher: 0 FLOP\n", math.nan),
        ("a model\n", math.nan),
    ],
)
def test_the_card_of_an_exported_teacher_tells_its_cost(tmp_path, said, flops):
    (tmp_path / "models/teacher").mkdir(parents=True)
    (tmp_path / "models/teacher/README.md").write_text(f"# x\n{said}- FLOPs of scoring: 0 FLOP\n")
    salt = write_run(tmp_path / "salt", SALT, student=10**10, teacher="models/teacher", weight=0.5, kd_steps=60)
    found = evaluate(load([salt]))
    (row,) = found.rows
    assert row.teacher_training_flops == pytest.approx(flops, nan_ok=True)
    assert math.isnan(row.teacher_training_seconds)  # a card has none
    told = "- salt: not included above: its teacher's own training 1.750 TFLOP; with that, it reaches the reference's "
    assert re.findall("- salt: not .*", report.markdown(found)) == [
        f"{told}loss at {4.75 / 3:.1%} of its FLOPs." for _ in range(not math.isnan(flops))
    ]
    (row,) = evaluate(load([write_run(tmp_path / "models/teacher/baseline", BASELINE)])).rows  # has none
    assert math.isnan(row.teacher_training_flops)


@pytest.mark.parametrize(
    ("said", "notes"),
    [
        ("- teacher: owner/name\n", ["had a teacher too: the cost of training that one is not counted"]),
        ("- scoring", ["had a teacher too: the cost of training that one is not counted"]),
        (
            "- started from: a\\[b]/c\n",
            ["started from the weights of a[b]/c: the cost of training those is not counted"],
        ),
        ("- method: BASELINE\n", []),
    ],
)
def test_what_the_cost_in_a_card_does_not_contain_is_mentioned(tmp_path, said, notes):
    (tmp_path / "models/teacher").mkdir(parents=True)
    said, scoring = ("", "4 GFLOP") if said == "- scoring" else (said, "0 FLOP")
    costs = "- FLOPs of the student: 1.5 TFLOP\n- FLOPs of the teacher: 0 FLOP\n"
    card = tmp_path / "models/teacher/README.md"
    card.write_text(f"# x\n{said}{costs}- FLOPs of scoring: {scoring}\n")
    names = ("salt", "again")
    kd = {"teacher": "models/teacher", "weight": 0.5, "kd_steps": 60}
    runs = load([write_run(tmp_path / name, SALT, seed=seed, **kd) for seed, name in enumerate(names)])
    found = [note for note in evaluate(runs).notes if note.startswith("models/teacher")]
    assert found == [f"models/teacher, the teacher of salt, again, {note}" for note in notes]
    card.write_text(f"# x\n{said}- FLOPs of scoring: {scoring}\n")  # no cost, so nothing can be missing in it
    assert not [note for note in evaluate(runs).notes if note.startswith("models/teacher")]


def test_a_reference_of_several_seeds_is_said_to_be_a_mean(tmp_path):
    runs = [write_run(tmp_path / f"s{seed}", BASELINE, seed_everything=seed) for seed in (0, 1)]
    assert "Reference: mean of the 2 seeds of s0, final" in report.markdown(evaluate(load(runs)))
    path = "teacher/checkpoints/step-00000300.ckpt"
    runs.append(write_run(tmp_path / "salt", SALT, teacher=path, weight=0.5, kd_steps=60))
    runs.append(write_run(tmp_path / "teacher", BASELINE, **{"model.student.config.hidden_size": 9}))
    for name in ("salt", "teacher"):  # of one seed; a teacher is in no experiment
        assert f"Reference: {name}, final" in report.markdown(evaluate(load(runs), name))


def test_what_an_evaluation_found_is_read_from_top_to_bottom_and_cannot_draw():
    found = {"val/tokens": 1234.0, "val/ce/\x1b[31mred": 2.0, "val/perplexity": 3.0041660, "val/ce": 1.1, "step": 7.0,
             "val/accuracy": torch.tensor([0.25])}  # fmt: skip
    assert report.evaluation(found).splitlines() == [
        "| metric             | step 7 |",
        "|--------------------|-------:|",
        "| val/ce             | 1.1000 |",
        "| val/accuracy       | 0.2500 |",
        "| val/perplexity     | 3.0042 |",
        "| val/tokens         |  1,234 |",
        "| val/ce/\\x1b[31mred | 2.0000 |",
    ]


def test_a_source_may_be_called_tokens():
    found = report.evaluation({"val/ce": 4.25, "val/ce/tokens": 3.25, "val/tokens": 1000.0, "step": 3})
    assert [line.split("|")[2].strip() for line in found.splitlines()[2:]] == ["4.2500", "1,000", "3.2500"]


def of_test(run, step, start, **values):
    """Writes what one `test` logs: into an event file of its own."""
    with SummaryWriter(str(run / "test"), filename_suffix=f".start-{start}") as writer:
        for name, value in {"ce": 4.0, "tokens": 50, **values}.items():
            writer.add_scalar(f"test/{name}", value, step)


def test_figures_of_one_test_are_not_put_beside_those_of_another(tmp_path):
    """Of an earlier checkpoint (choices), or of other text at the same step (ce/v1)."""
    run = write_run(tmp_path / "run", BASELINE)
    choices = {"choice_accuracy": 0.25, "choice_accuracy_low": 0.125, "choice_accuracy_high": 0.5}
    of_test(run, 100, 1, examples=51, exact_match=0.5, **choices)
    of_test(run, 300, 2, examples=51, exact_match=0.75, **{"ce/v1": 5.0})
    of_test(run, 300, 3, examples=10, exact_match=0.625)
    found = evaluate(load([run]))
    last = {
        tag: value for tag, value in found.rows[0].last.items() if tag.startswith("test/") and not math.isnan(value)
    }
    assert last == {"test/ce": 4.0, "test/tokens": 50, "test/examples": 10, "test/exact_match": 0.625}
    assert "choice accuracy" not in report.markdown(found)
    of_test(run, 200, 4, **choices)  # of an earlier checkpoint again
    assert evaluate(load([run])).rows[0].last["test/exact_match"] == 0.625


def test_a_part_that_the_last_validation_had_not_is_none_of_the_final_ones(tmp_path):
    run, other = write_run(tmp_path / "run", BASELINE), write_run(tmp_path / "other", BASELINE)
    for folder, steps, part in (
        (run, (100, 200), "v1"),
        (run, (300,), "v2"),
        (other, (300,), "v2"),
        (other, (100,), "x"),
    ):
        with SummaryWriter(str(folder), filename_suffix=".start-2") as writer:
            for step in steps:
                writer.add_scalar(f"val/ce/{part}", 6.0, step)
    shown = report.markdown(evaluate(load([run, other]))).partition("by part\n\n")[2].splitlines()[:4]
    assert [line.split("|")[1:-1] for line in shown[::2]] == [[" run   ", "     v2 "], [" run   ", " 6.0000 "]]


@pytest.mark.parametrize("key", ["data.block_size", "data.isolate_documents"])
def test_a_loss_before_the_validation_changed_is_not_where_the_reference_was_reached(key, tmp_path):
    """With more context: at step 150 it seems to be where BASELINE ends."""
    baseline = write_run(tmp_path / "baseline", BASELINE, **{key: 1})
    run = write_run(tmp_path / "run", {100: 4.5, 200: 3.5, 250: 4.25, 300: 3.75}, **{key: 1})
    earlier(run, 200, **{key: 2})
    found = evaluate(load([baseline, run]))
    assert (found.rows[1].reached_step, found.rows[1].difference) == (275, -0.25)
    assert "run was validated with more or less context from step 201 on: its losses before that are" in str(
        found.notes
    )
    plain = write_run(tmp_path / "plain", BASELINE)
    (plain / "config.yaml").unlink()  # of Python
    assert "with --data" not in str(evaluate(load([baseline, plain])).notes)
    late = write_run(tmp_path / "late", {100: 4.5, 200: 3.5, 300: 3.75}, **{key: 1})
    earlier(late, 200, **{key: 2})
    assert math.isnan(evaluate(load([baseline, late])).rows[1].reached_step), "perhaps long before"
    new = write_run(tmp_path / "new", {100: 4.5, 200: 3.5}, 200, **{key: 1})
    earlier(new, 200, **{key: 2})
    assert evaluate(load([baseline, new])).runs[1].val_ce.steps.tolist() == [100, 200], "not validated since"


def test_the_text_of_a_loss_is_known_by_its_tokens_and_bytes_not_by_its_path(tmp_path):
    baseline = write_run(tmp_path / "baseline", BASELINE)
    count(baseline, "val", 900, 3000, [300])
    for name, before, reached in (("other", 3100, 275), ("moved", 3000, 150)):
        run = write_run(tmp_path / name, {}, **{"data.val_source": "new/v.jsonl"})
        earlier(run, 200, **{"data.val_source": "v.jsonl"})
        for step, ce, size in ((100, 4.5, before), (200, 3.5, before), (250, 4.25, 3000), (300, 3.75, 3000)):
            count(run, "val", 900, size, [step], ce)
        found = evaluate(load([baseline, run]))
        assert found.rows[1].reached_step == reached
        said = "was validated on other text from step 250 on (900 tokens, before that 900): its losses before that are"
        assert (said in str(found.notes)) == (name == "other")


def test_losses_with_other_context_are_told(tmp_path):
    runs = [write_run(tmp_path / f"t{size}", BASELINE, **{"data.block_size": size}) for size in (64, 32)]
    runs.append(write_run(tmp_path / "none", {}, seed_everything=1, **{"data.block_size": 32}))  # never validated
    (note,) = (note for note in evaluate(load(runs)).notes if "validated" in note)
    assert note.startswith("t32 was validated with --data.block_size 32 (there 64): the same model has another loss")


def test_words_of_another_tokenizer_on_one_text(tmp_path):
    """The first token of a document is not counted: of 200 documents, some bytes more or less."""
    runs = [write_run(tmp_path / name, {}, **{"data.tokenizer": name}) for name in ("coarse", "fine", "half")]
    for run, tokens, size in zip(runs, (800, 900, 450), (3000, 3040, 1520), strict=True):
        count(run, "val", tokens, size, [300])
    notes = [note for note in evaluate(load(runs)).notes if "was validated" in note]
    assert [" in other tokens " in note for note in notes] == [True, False]
    for run in runs:  # one tokenizer by three names: then it is the text that differs, if only by a little
        (run / "tokenizer").mkdir()
        (run / "tokenizer/tokenizer.json").write_text("{}")
    notes = [note for note in evaluate(load(runs)).notes if "was validated" in note]
    assert [" on other text " in note for note in notes] == [True, True]


def test_how_often_it_is_validated_makes_no_experiment_unless_that_may_end_something(tmp_path):
    def groups(**config):
        every = "trainer.val_check_interval"
        name = str(len(list(tmp_path.iterdir())))
        runs = [
            write_run(tmp_path / f"{name}-{n}", BASELINE, seed_everything=n, **{every: 300 // n}, **config)
            for n in (1, 2)
        ]
        found = evaluate(load(runs))
        assert all(before != now for group in found.groups for before, now in group.changed.values())
        return len(found.groups)

    alike = {"trainer.val_check_interval": 100, "trainer.callbacks": None}
    margin = {"teacher": "t", "weight": 0.5, "kd_steps": 60, "kd.stop_margin": 0.1}
    runs = [write_run(tmp_path / "all", BASELINE, **alike), write_run(tmp_path / "margin", SALT, **alike, **margin)]
    assert "trainer.val_check_interval" not in evaluate(load(runs)).groups[1].changed
    stops = [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/ce"}}]
    kd = {"teacher": "t", "weight": 0.5, "kd_steps": 60}
    none = {"trainer.callbacks": None}
    assert [groups(**none), groups(**kd, **none), groups(**{"trainer.callbacks": stops})] == [1, 1, 2]
    assert groups(**kd, **none, **{"kd.stop_margin": 0.1}) == 2
    assert [groups(**none, **{"trainer.max_steps": steps}) for steps in (300, 450, 200)] == [1, 2, 2], "not at the end"


@pytest.mark.parametrize(("every", "groups"), [(0.5, 1), (0.29, 2), (1.0, 1), (400, 1), (7, 2), ("x", 2)])
def test_losses_of_the_last_step_are_seeds_whatever_the_interval(every, groups, tmp_path):
    none = {"trainer.callbacks": None}
    runs = [write_run(tmp_path / "null", BASELINE, **none)]
    runs.append(
        write_run(tmp_path / "own", BASELINE, seed_everything=1, **none, **{"trainer.val_check_interval": every})
    )
    assert len(evaluate(load(runs)).groups) == groups


def test_a_seed_of_a_baseline_is_better_only_than_the_same_seed(tmp_path):
    """The reference is a mean of three; a tuned run of one seed is compared with that seed."""
    ends = (3.75, 4.0, 4.25)
    runs = [write_run(tmp_path / f"s{n}", {300: ce}, seed_everything=n) for n, ce in enumerate(ends)]
    for seed, ce, gain in ((0, 3.75, None), (0, 3.625, 0.125), (2, 4.0, 0.25), (7, 3.875, 0.125)):
        tuned = write_run(tmp_path / f"tuned{seed}{ce}", {300: ce}, seed_everything=seed, **{"model.optim.lr": 1})
        notes = [note for note in evaluate(load([*runs, tuned])).notes if "a BASELINE of" in note]
        assert [f"ends {gain:.4f} below" in note for note in notes] == ([] if gain is None else [True]), (seed, ce)


def test_each_selection_that_was_read_has_its_cost_and_random_rows_have_none(tmp_path):
    for name, flops, step in (("one", 400, 100), ("two", 40, 200)):
        (tmp_path / name).mkdir()
        scored = {"path": f"teacher/checkpoints/step-{step:08}.ckpt"}
        about = {"scoring_flops": flops, "scoring_s": flops / 10, "teacher": scored}
        (tmp_path / name / "scores.json").write_text(json.dumps(about))
    write_run(tmp_path / "teacher", {300: 5.0}, student=4)
    kd = {"teacher": "teacher/checkpoints/step-00000100.ckpt", "weight": 0.5, "kd_steps": 60}
    both = write_run(tmp_path / "both", SALT, **kd, **{"data.selection": "two"})
    earlier(both, 20, **kd, **{"data.selection": "one"})
    again = write_run(tmp_path / "again", SALT, **kd, **{"data.selection": "one"})
    earlier(again, 20, **kd, **{"data.selection": "one", "data.keep.share": 0.5})
    drawn = write_run(tmp_path / "drawn", SALT, **kd, **{"data.selection": "two", "data.keep.order": "random"})
    runs = load([tmp_path / "teacher", both, again, drawn, write_run(tmp_path / "baseline", BASELINE)])
    _, both, again, drawn, _ = evaluate(runs).rows
    assert (both.scoring_flops, both.scoring_seconds, both.teacher_training_flops) == (440, 44, 4 * 200)
    assert (again.scoring_flops, again.teacher_training_flops) == (400, 4 * 100)
    assert drawn.method == "SALT_DS step, random rows"
    assert (math.isnan(drawn.scoring_flops), drawn.teacher_training_flops) == (True, 4 * 100)
    assert drawn.reached_flops_share_with_teacher_training == (2500 + 300 + 400) / 3000
    top = write_run(tmp_path / "top", SALT, **kd, **{"data.selection": "two", "data.keep.order": "random",
                                                     "data.keep.drop_top": 0.1})  # fmt: skip
    assert evaluate(load([top])).rows[0].scoring_flops == 40


@pytest.mark.parametrize(("step", "unread_first", "read"), [(59, False, True), (60, False, False), (60, True, True)])
def test_a_selection_given_after_the_boundary_chooses_only_what_is_read_first(tmp_path, step, unread_first, read):
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "scores.json").write_text(json.dumps({"scoring_flops": 400, "scoring_s": 40}))
    kd = {"teacher": "teacher", "weight": 0.5, "kd_steps": 60}
    own = {"data.selection": "scores", "data.keep.unread_first": unread_first}
    run = write_run(tmp_path / "run", SALT, **kd, **own)
    earlier(run, step, **kd)
    [row] = evaluate(load([run])).rows
    assert (row.method, math.isnan(row.scoring_flops)) == ("SALT_DS step" if read else "SALT step", not read)


def test_a_predict_run_counts_once_wherever_it_is_named(tmp_path):
    """By two paths, and by the teacher too, whose rows came from the same scores."""
    (tmp_path / "score").mkdir()
    (tmp_path / "score/scores.json").write_text('{"scoring_flops": 400.0, "scoring_s": 20.0}')
    write_run(tmp_path / "teacher", {300: 5.0}, student=4, **{"data.selection": "score"})
    kd = {"teacher": "teacher/checkpoints/step-00000300.ckpt", "weight": 0.5, "kd_steps": 60}
    salt = write_run(tmp_path / "salt", SALT, **kd, **{"data.selection": str(tmp_path / "score")})
    earlier(salt, 20, **kd, **{"data.selection": "score/scores.json"})
    plain = write_run(tmp_path / "plain", SALT, **kd)
    gone = write_run(tmp_path / "gone", SALT, **kd, **{"data.selection": "score"})
    earlier(gone, 20, **kd, **{"data.selection": "lost"})
    found = evaluate(load([tmp_path / "teacher", salt, plain, gone]))
    costs = [(row.teacher_training_flops, row.scoring_flops) for row in found.rows]
    assert costs[1:3] == [(4 * 300, 400), (4 * 300 + 400, pytest.approx(math.nan, nan_ok=True))]
    assert (costs[3][0], math.isnan(costs[3][1])) == (4 * 300, True)
    said = "the scores that gone selected rows by, lost, are gone: the cost of scoring is unknown"
    assert [note for note in found.notes if "selected rows by" in note] == [said]


def test_an_exported_teacher_was_trained_for_the_steps_in_its_card(tmp_path):
    teacher = write_run(tmp_path / "teacher", BASELINE, student=4, **{"checkpoint.export": "models/teacher"})
    salt = write_run(tmp_path / "salt", SALT, teacher="models/teacher", weight=0.5, kd_steps=60)
    (tmp_path / "models/teacher").mkdir(parents=True)
    for said, steps in (("- steps: 150 of 1,300\n", 150), ("- steps: 99,999\n", 300), ("- steps: many\n", 300)):
        (tmp_path / "models/teacher/README.md").write_text(f"# x\n\n{said}- FLOPs of the student: 4 FLOP\n")
        found = evaluate(load([teacher, salt])).rows[1]
        assert (found.teacher_training_flops, found.teacher_training_seconds) == (4 * steps, 0.5 * steps)


def test_what_a_branch_shares_with_its_teacher_is_in_its_own_cost(tmp_path):
    """It started at step 100 of the run whose step 200 taught it."""
    write_run(tmp_path / "trunk", BASELINE)
    kd = {"teacher": "trunk/checkpoints/step-00000200.ckpt", "weight": 0.5, "kd_steps": 200}
    write_run(
        tmp_path / "twig", {200: 4.5, 300: 3.75}, after=100, ckpt_path="trunk/checkpoints/step-00000100.ckpt", **kd
    )
    row = evaluate([lineage.whole(read_run(tmp_path / name, name)) for name in ("trunk", "twig")]).rows[1]
    assert (row.teacher_training_flops, row.teacher_training_seconds) == (10 * 100, 0.5 * 100)


@pytest.mark.parametrize("here", ["a", "b", "."])
def test_relative_paths_begin_where_the_run_does_and_not_where_the_reader_is(here, tmp_path, monkeypatch):
    """Two people with the same layout: each run belongs to its own neighbours, whoever compares."""
    for person, cost in (("a", 1.0), ("b", 2.0)):
        trunk = write_run(tmp_path / person / "runs/base", {10: 5.0 + cost, 100: 4.0 + cost}, run="runs/base")
        write_run(tmp_path / person / "runs/teacher", {100: 3.0}, run="runs/teacher")
        on = {"run": "runs/more", "after": 50, "ckpt_path": "runs/base/checkpoints/step-00000050.ckpt"}
        taught = {"teacher": "runs/teacher/checkpoints/step-00000100.ckpt", "kd_steps": 20}
        write_run(tmp_path / person / "runs/more", {60: 4.5, 100: 4.0}, **on)
        write_run(tmp_path / person / "runs/salt", {100: 4.0}, run="runs/salt", **taught)
        (trunk / "checkpoints").mkdir()
        (tmp_path / person / "runs/teacher/checkpoints").mkdir()
    monkeypatch.chdir(tmp_path / here)
    for person, cost in (("a", 1.0), ("b", 2.0)):
        more = lineage.whole(read_run(tmp_path / person / "runs/more", "more"))
        assert more.val_ce.values.tolist() == [5.0 + cost, 4.5, 4.0]
        runs = [read_run(tmp_path / who / "runs" / name, name) for who in "ba" for name in ("teacher", "base")]
        salt = read_run(tmp_path / person / "runs/salt", "salt")
        (teacher,) = lineage.teacher_runs(salt, runs).values()
        assert teacher.path == tmp_path / person / "runs/teacher"
        others = [run for run in runs if run.path.parents[1].name != person]
        assert list(lineage.teacher_runs(salt, others).values()) == [None]  # it is there, but not given


@pytest.mark.parametrize(("resumed", "told"), [(139, False), (120, False), (140, True), (160, True)])
def test_a_damaged_end_is_told_unless_a_later_start_has_logged_it_again(resumed, told, tmp_path):
    """A kill may cut a record off; what comes after its checkpoint is logged again."""
    run = write_run(tmp_path / "salt", {100: 5.0}, steps=140)
    (file,) = run.glob("*tfevents*")
    file.write_bytes(file.read_bytes() + b"half a record")
    with SummaryWriter(str(run), filename_suffix=".start-2", purge_step=resumed + 1) as writer:
        writer.add_scalar("val/ce", 4.0, 300)
    rest = "the rest is damaged or still being written"
    assert read_run(run, "salt").damaged == ((f"{file} could be read up to step 140: {rest}",) if told else ())


def test_a_run_whose_last_validation_is_missing_is_not_finished(tmp_path):
    """It was killed in it, or it is under way: its loss is of an earlier step, and no sample beside final ones."""
    every, kd = {"trainer.val_check_interval": 100}, {"teacher": "t", "weight": 0.5, "kd_steps": 60}
    before = {step: ce for step, ce in SALT.items() if step < STEPS}
    runs = [write_run(tmp_path / f"b{seed}", BASELINE, seed_everything=seed, **every) for seed in range(2)]
    runs += [write_run(tmp_path / "s0", SALT, **kd, **every)]
    runs += [write_run(tmp_path / "s1", before, seed_everything=1, **kd, **every)]
    found = evaluate(load(runs))
    assert [(group.n, group.mean) for group in found.groups] == [(2, 4.0), (1, 3.75)]
    assert math.isnan(found.rows[3].difference)
    assert found.equal["steps"] == (300, {"b0": 4.0, "b1": 4.0, "s0": 3.75, "s1": pytest.approx(math.nan, nan_ok=True)})
    assert found.notes[0] == "s1 is at step 300 of 300, without its last validation"
    assert "that all finished runs have reached" in report.markdown(found)
    lost = write_run(tmp_path / "b2", {100: 5.0, 200: 4.5}, seed_everything=2, **every)
    assert evaluate(load([*runs, lost])).reference_val_ce == 4.0
    odd = write_run(tmp_path / "odd", {200: 4.5}, seed_everything=2, **{"trainer.val_check_interval": 200})
    assert evaluate(load([odd])).rows[0].difference == 0.0  # never validated at its end, by its settings


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_seed_that_diverged_leaves_no_range_and_no_spread(tmp_path, order, value):
    kd = {"teacher": "t", "weight": 0.5, "kd_steps": 60}
    finals = (4.0, value)[::order]
    runs = [write_run(tmp_path / f"s{n}", SALT | {300: ce}, seed_everything=n, **kd) for n, ce in enumerate(finals)]
    text = report.markdown(evaluate(load([write_run(tmp_path / "b", BASELINE), *runs])))
    (_, row) = rows_of(text.partition("## Seeds")[2])
    assert row["min to max"] == ("-" if math.isnan(value) else "4.0000 to inf")
    assert row["mean CE"] == ("-" if math.isnan(value) else "inf")
    assert not re.search(r"\bnan\b", text.partition("## Seeds")[2])


def test_a_seed_of_unknown_cost_leaves_no_mean_of_the_others(tmp_path):
    kd = {"teacher": "t", "weight": 0.5, "kd_steps": 60}
    runs = [write_run(tmp_path / "b", BASELINE), write_run(tmp_path / "s0", SALT, **kd)]
    runs.append(write_run(tmp_path / "s1", SALT, student=math.nan, seed_everything=1, **kd))
    rows = rows_of(report.markdown(evaluate(load(runs))).partition("have reached")[2])
    (mean,) = (row for row in rows if row["run"].endswith(", n = 2: mean (std)"))
    assert [cell for name, cell in mean.items() if "FLOP" in name] == ["-"]
    assert mean["at 300 steps"] == "3.7500 (0.0000)"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_baseline_that_diverged_is_no_reference_beside_another(tmp_path, value):
    wild = write_run(tmp_path / "wild", BASELINE | {300: value}, **{"model.optim.lr": 1})
    found = evaluate(load([wild, write_run(tmp_path / "b", BASELINE)]))
    assert (found.reference, found.reference_val_ce) == ("b", 4.0)


def test_a_seed_without_a_partner_keeps_its_place(tmp_path):
    kd = {"teacher": "t", "weight": 0.5, "kd_steps": 60}
    runs = [write_run(tmp_path / f"b{seed}", BASELINE, seed_everything=seed) for seed in (1, 2)]
    for seed, final in enumerate((3.75, 3.5, math.nan)):
        runs.append(write_run(tmp_path / f"s{seed}", SALT | {300: final}, seed_everything=seed, **kd))
    found = evaluate(load(runs))
    (_, row) = rows_of(report.markdown(found).partition("## Seeds")[2])
    assert row["CE of each"] == "3.7500, 3.5000, -"
    assert row["to ref. of its seed"] == "-, -0.5000, -"
    assert json.loads(report.json_text(found))["groups"][1]["paired_differences"] == {"0": None, "1": -0.5, "2": None}


def test_a_branch_of_a_branch_without_a_validation_has_the_losses_of_their_trunk(tmp_path):
    write_run(tmp_path / "a", {50: 6.0, 100: 4.25}, 100)
    write_run(tmp_path / "b", {}, 120, after=100, ckpt_path=str(tmp_path / "a/checkpoints/step-00000100.ckpt"))
    of_b = str(tmp_path / "b/checkpoints/step-00000120.ckpt")
    write_run(tmp_path / "c", {200: 4.0, 300: 3.5}, after=120, ckpt_path=of_b)
    runs = load([write_run(tmp_path / "baseline", {100: 5.0, 300: 4.25}, seed_everything=1), tmp_path / "c"])
    found = evaluate([lineage.whole(run) for run in runs], "baseline")
    assert found.runs[1].val_ce.steps.tolist() == [50, 100, 200, 300]
    (b,) = load([tmp_path / "b"])
    assert "val/ce" not in lineage.whole(b).curves  # it has no loss of its own


def test_a_loss_on_other_text_makes_no_baseline_better(tmp_path):
    runs = [write_run(tmp_path / f"b{seed}", {300: 4.0}, seed_everything=seed) for seed in range(2)]
    runs += [
        write_run(tmp_path / f"l{seed}", {300: 4.5}, seed_everything=seed, **{"model.optim.lr": 1}) for seed in range(2)
    ]
    for run, tokens, ce in zip(runs, (100, 90, 100, 90), (4.0, 8.0, 4.5, 1.0), strict=True):
        count(run, "val", tokens, 400, [300], ce=ce)
    for order in (runs, [*runs[:2], *runs[:1:-1]]):
        assert not [note for note in evaluate(load(order), "b0").notes if "compare with the better one" in note]
