"""The predict command, and how a fit uses its scores: real runs of the real command."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from conftest import StopAt, arguments, error_of, scalars, weights

from salt_lightning import cli, preflight
from salt_lightning.flops import forward_flops_per_token
from salt_lightning.hugging_face.spec import ModelSpec
from salt_lightning.models import CausalLM, load_pretrained
from salt_lightning.selection import KeepRule, kept_rows, row_scores
from salt_lightning.teacher import score_report
from salt_lightning.teacher.scores import NO_LABEL, Scored, Scores
from salt_lightning.teacher.scoring import weights_fingerprint
from salt_lightning.text.token_files import TokenFiles

ROOT = Path(__file__).parents[1]
SHARD_TOKENS = 512  # 16 rows of 32
_CALL = f"""
import sys
import salt_lightning.teacher.scores
salt_lightning.teacher.scores._SHARD_TOKENS = {SHARD_TOKENS}
from salt_lightning.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("salt_lightning.teacher.scores._SHARD_TOKENS", SHARD_TOKENS)


@pytest.fixture(scope="module")
def of_data(settings):
    """Settings that a predict run shares with the fits of conftest."""
    names = ("source", "vocab_size", "block_size", "val_fraction", "cache_dir", "prepare_workers")
    shared = {f"data.{name}": settings[f"data.{name}"] for name in names}
    return {**shared, "data.micro_batch_size": 8, "trainer.accelerator": "cpu", "trainer.enable_progress_bar": False}


@pytest.fixture(scope="module")
def scored(of_data, teacher, tmp_path_factory):
    """A predict run that was never interrupted."""
    run = tmp_path_factory.mktemp("score") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("salt_lightning.teacher.scores._SHARD_TOKENS", SHARD_TOKENS)
        assert cli.main(["predict", *arguments(of_data, {"run": str(run), "model.teacher.path": teacher})]) == 0
    return run


@pytest.fixture
def with_callback(monkeypatch):
    """A context in which the command's trainer has one callback more, before its own."""

    @contextmanager
    def context(callback):
        original = cli.SALTCLI.instantiate_trainer

        def with_it(self, **kwargs):
            trainer = original(self, **kwargs)
            trainer.callbacks.insert(0, callback)
            return trainer

        with monkeypatch.context() as patch:
            patch.setattr(cli.SALTCLI, "instantiate_trainer", with_it)
            yield

    return context


def read_all(run):
    scores = Scores(run, "--run")
    assert scores.missing() == []
    assert scores.scored.num_shards > 4
    return [np.concatenate(parts) for parts in zip(*map(scores.read, range(scores.scored.num_shards)), strict=True)]


# --- what is written ---


def test_scores_are_those_of_a_float64_reference(scored, settings, teacher):
    """Each document alone, with transformers' own logits in float64; only the reading uses our code."""
    wanted = json.loads((scored / "scores.json").read_text())["scored"]["rows"]
    prepared = [p.parent for p in Path(settings["data.cache_dir"]).glob("*/manifest.json")]  # other tests use it too
    folder = next(p for p in prepared if TokenFiles(p, "train").fingerprint == wanted)
    dtype = json.loads((folder / "manifest.json").read_text())["dtype"]
    tokens = np.fromfile(folder / "train" / "tokens.bin", dtype).astype(np.int64)
    ends = np.fromfile(folder / "train" / "doc_ends.bin", "int64")
    model = load_pretrained(ModelSpec(path=teacher), "teacher", torch.float64).eval()
    nll_RT, rank_RT = read_all(scored)
    width, num_documents = settings["data.block_size"], []
    for row in range(0, len(nll_RT), 7):
        start, stop = row * width, min((row + 1) * width, len(tokens))
        cuts = [start, *[int(e) for e in ends if start < e < stop], stop]
        num_documents.append(len(cuts) - 1)
        nll, rank = np.zeros(width), np.full(width, NO_LABEL)
        for begin, end in itertools.pairwise(cuts):
            ids = torch.from_numpy(tokens[begin:end])[None]
            logits = model(input_ids=ids).logits[0, :, : settings["data.vocab_size"]].detach().numpy()  # no padding
            for i, position in enumerate(range(begin, end)):
                if position + 1 >= len(tokens) or position + 1 in ends:  # nothing follows a document's EOS
                    continue
                label = tokens[position + 1]
                top = logits[i].max()
                nll[position - start] = np.log(np.exp(logits[i] - top).sum()) + top - logits[i][label]
                rank[position - start] = (logits[i] > logits[i][label]).sum()
        assert np.array_equal(rank_RT[row] == NO_LABEL, rank == NO_LABEL)
        # fp32 logits of size 10 have rounding errors of about 1e-6; a rank may change if two logits are that close
        np.testing.assert_allclose(nll_RT[row], nll, rtol=0, atol=2e-5)
        assert (rank_RT[row] != rank).mean() <= 0.02
    assert max(num_documents) >= 3


def test_the_manifest_says_what_was_scored(scored, teacher):
    manifest = json.loads((scored / "scores.json").read_text())
    lm = CausalLM(load_pretrained(ModelSpec(path=teacher), "teacher", torch.float32), "teacher")
    assert manifest["scored"]["teacher"] == weights_fingerprint(lm)
    assert manifest["scored"]["precision"] == "torch.float32, 32-true"
    assert manifest["teacher"] == {"path": teacher, "revision": None}
    per_token = forward_flops_per_token(lm.model, 32, 300)  # of 320 rows of the head
    assert manifest["scoring_flops"] == per_token * manifest["scored"]["num_rows"] * 32
    assert 0 < manifest["scoring_s"] < 60
    assert set(manifest["versions"]) == {"torch", "transformers", "lightning", "pyarrow"}


def test_the_fingerprint_follows_any_bit_of_the_weights(teacher):
    def lm():
        return CausalLM(load_pretrained(ModelSpec(path=teacher), "teacher", torch.float32), "teacher")

    first, other = lm(), lm()
    assert weights_fingerprint(first) == weights_fingerprint(other)
    weight = other.head.weight.data
    weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(9.0))
    assert weights_fingerprint(first) != weights_fingerprint(other)
    assert weights_fingerprint(first) != weights_fingerprint(first.bfloat16())
    kinds = ((2, 3), torch.bfloat16), ((3, 2), torch.bfloat16), ((2, 3), torch.float16)  # of the same bits
    zeros = [torch.nn.ParameterDict({"w": torch.zeros(size, dtype=dtype)}) for size, dtype in kinds]
    assert len({*map(weights_fingerprint, zeros)}) == 3


def test_the_report(scored):
    text = (scored / "report.md").read_text()
    score_R = row_scores(Scores(scored, "--run"), 10, "zero")
    assert f"- {len(score_R)} rows of 32 tokens, scored by " in text
    assert f"Share of rows that score 0: {np.mean(score_R == 0):.1%}." in text
    assert all(f"| k = {k} " in text for k in (5, 10, 20, 50))
    for heading in ("### Highest scores", "### Middle scores", "### Lowest scores"):
        assert heading in text
    best = int(np.argmax(score_R))
    assert f"Row {best}: S {score_R[best]:.4f}" in text
    assert " teacher" in text.split("### Highest scores")[1]  # words of the corpus: decoded text
    assert (scored / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_by_hand(tmp_path):
    scores = Scores.create(tmp_path, Scored("rows", "map", num_rows=2, block_size=4, isolate_documents=True), {})
    scores.write(0, np.array([[1, 2, 3, 0], [4, 5, 6, 7]]), np.array([[0, 10, 11, -1], [0, 1, 2, 3]]))
    text, _ = score_report.write(scores, KeepRule(rows=1, k=10), str)
    assert "Row 0: S 0.0000, mean loss 2.0000, 33% within the top 10\n" in text.read_text()
    assert "same score as rows left out" not in text.read_text().split("## Other values")[0]


def test_no_control_character_of_a_text_is_in_the_report(scored, tmp_path):
    shutil.copytree(scored, tmp_path / "run")
    text, _ = score_report.write(
        Scores(tmp_path / "run", "--run"), KeepRule(rows=2), lambda row: "a\x1b[31mb \x07\u202e\u061cc\u200d"
    )
    assert "    a\\x1b[31mb \\x07\\u202e\\u061cc\u200d\n" in text.read_text()


# --- interrupted, resumed, with other sizes ---


def test_killed_and_run_again_gives_the_same_bits(scored, of_data, teacher, tmp_path, caplog):
    run = tmp_path / "run"
    args = arguments(of_data, {"run": str(run), "model.teacher.path": teacher})
    process = forked.Popen([sys.executable, "-c", _CALL, "predict", *args], cwd=ROOT)
    end = time.monotonic() + 120
    while len(list((run / "scores").glob("*.parquet"))) < 2 and time.monotonic() < end and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in (run / "scores").glob("0*.parquet")}
    total = Scores(run, "--run").scored.num_shards
    assert 2 <= len(done) < total  # else it was not killed in time
    assert not (run / "report.md").exists()
    spent_s = json.loads((run / "scores.json").read_text())["scoring_s"]
    assert cli.main(["predict", *args]) == 0
    assert json.loads((run / "scores.json").read_text())["scoring_s"] > spent_s > 0
    assert {path: path.stat().st_mtime_ns for path in done} == done  # kept, not scored again
    for whole, again in zip(read_all(scored), read_all(run), strict=True):
        assert np.array_equal(whole, again)
    for path in (scored / "scores").glob("0*.parquet"):
        assert path.read_bytes() == (run / "scores" / path.name).read_bytes()
    assert (run / "report.md").read_text() == (scored / "report.md").read_text()
    zeros = np.mean(row_scores(Scores(run, "--run"), 10, "zero") == 0)
    assert f"{zeros:.1%} of the rows score 0; report: {run / 'report.md'}" in caplog.text


class CountBatches(cli.pl.Callback):
    def __init__(self):
        self.num_rows = []

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.num_rows.append(int((batch["rows"] >= 0).sum()))


def test_the_last_shard_alone_takes_its_own_rows_and_adds_its_own_seconds(
    scored, of_data, teacher, tmp_path, caplog, with_callback
):
    run, count = tmp_path / "run", CountBatches()
    shutil.copytree(scored, run)
    scores = Scores(run, "--run")
    last = scores.scored.num_shards - 1
    rows = len(scores.rows(last))
    assert rows <= 15, "else it takes as many batches of three as a whole shard"
    scores.path(last).unlink()
    scores.note(scoring_s=1000.0)
    began_s = time.monotonic()
    with with_callback(count):
        args = arguments(of_data, {"run": str(run), "model.teacher.path": teacher, "data.micro_batch_size": 3})
        assert cli.main(["predict", *args]) == 0
    wall_s = time.monotonic() - began_s
    assert count.num_rows == [3] * (rows // 3) + [rows % 3] * (rows % 3 > 0)
    after = json.loads((run / "scores.json").read_text())
    seconds = after["scoring_s"] - 1000
    assert 0 < seconds < wall_s
    found = re.search(r"scored ([\d,]+) tokens in ([\d.]+) s, [\d,]+ per second and device", caplog.text)
    assert int(found[1].replace(",", "")) == rows * 32
    assert float(found[2]) == pytest.approx(seconds, abs=0.06)
    assert f"all rows: {after['scoring_flops']:.3g} FLOPs, {after['scoring_s']:.1f} s; " in caplog.text


def test_unknown_flops_of_a_teacher_are_null_in_the_manifest(of_data, teacher, tmp_path, caplog, monkeypatch):
    """Some families have layers whose FLOPs are unknown; a NaN would not be JSON."""
    monkeypatch.setattr("salt_lightning.flops.forward_flops_per_token", lambda *_: math.nan)
    run = tmp_path / "run"
    assert cli.main(["predict", *arguments(of_data, {"run": str(run), "model.teacher.path": teacher})]) == 0

    def refuse(word):
        raise AssertionError(word)

    assert json.loads((run / "scores.json").read_text(), parse_constant=refuse)["scoring_flops"] is None
    assert "all rows: unknown FLOPs, " in caplog.text
    assert "; unknown FLOPs)." in (run / "report.md").read_text()


class StopScoring(StopAt):
    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_what_is_done_and_says_how_to_go_on(of_data, teacher, tmp_path, capsys, with_callback, number):
    before = signal.getsignal(number)
    args = arguments(of_data, {"run": str(tmp_path), "model.teacher.path": teacher})
    with with_callback(StopScoring(5, number)):  # 2 batches a shard: the last of the third
        assert cli.main(["predict", *args]) == 128 + number
    total = Scores(tmp_path, "--run").scored.num_shards
    expected = f"stopped by {number.name}; {total - 3} of {total} shards are left; to continue, run the same command"
    assert expected in capsys.readouterr().out
    assert signal.getsignal(number) == before
    assert cli.main(["predict", *args]) == 0
    assert Scores(tmp_path, "--run").missing() == []


def test_other_batch_sizes_and_ranks_agree(scored, of_data, teacher, tmp_path):
    """Three rows at once, on two ranks (gloo): 16 rows of a shard in 6 batches, the last one short."""
    run = tmp_path / "run"
    own = {"run": str(run), "model.teacher.path": teacher, "data.micro_batch_size": 3, "trainer.devices": 2,
           "trainer.strategy": "ddp"}  # fmt: skip
    script = tmp_path / "call.py"
    script.write_text(_CALL)
    command = [sys.executable, str(script), "predict", *arguments(of_data, own)]

    def predict() -> tuple[int, float, float]:
        """Tokens and seconds as said, and the seconds noted."""
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = forked.run(command, cwd=ROOT, env=env)
        assert done.returncode == 0, done.stderr
        tokens, seconds = re.search(r"scored ([\d,]+) tokens in ([\d.]+) s", done.stderr + done.stdout).groups()
        noted = json.loads((run / "scores.json").read_text())["scoring_s"]
        return int(tokens.replace(",", "")), float(seconds), noted

    tokens, seconds, noted = predict()
    scores = Scores(run, "--run")
    assert tokens == scores.scored.num_rows * 32
    assert noted == pytest.approx(seconds, abs=0.06)  # of the job: two devices take them at the same time
    scores.path(1).unlink()  # one shard for two ranks: one of them has none
    tokens, seconds, added = predict()
    assert tokens == 16 * 32
    assert added == pytest.approx(noted + seconds, abs=0.06)
    (nll_RT, rank_RT), (other_RT, other_rank_RT) = read_all(scored), read_all(run)
    np.testing.assert_allclose(other_RT, nll_RT, rtol=1e-5, atol=1e-6)
    assert (rank_RT != other_rank_RT).mean() < 1e-3
    mine, theirs = (row_scores(Scores(r, "--run"), 10, "drop") for r in (scored, run))
    differing = np.setxor1d(*(kept_rows(s, KeepRule(masked="drop")) for s in (mine, theirs)))
    level = np.median(mine)
    np.testing.assert_allclose(mine[differing], level, rtol=1e-5)  # only rows at the cut may change


def test_a_complete_folder_is_left_as_it_is(scored, of_data, teacher, capsys):
    before = {path: path.stat().st_mtime_ns for path in (scored / "scores").glob("0*.parquet")}
    args = arguments(of_data, {"run": str(scored), "model.teacher.path": teacher, "data.micro_batch_size": 5})
    assert cli.main(["predict", *args]) == 0
    assert {path: path.stat().st_mtime_ns for path in (scored / "scores").glob("0*.parquet")} == before


# --- bad input ---


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data.block_size": 16}, "--data.block_size"),
        ({"data.val_fraction": 0.2, "data.tokenizer": "RUN/tokenizer"}, "--data.source"),
        ({"data.isolate_documents": False}, "--data.isolate_documents"),
        ({"model.teacher.dtype": "bfloat16"}, "that do not fit --model.teacher.dtype"),
        (
            {"trainer.strategy": {"class_path": "salt_lightning.parallel.FSDP2"}},
            "FSDP2 shards models, but predict needs the whole",
        ),
        (
            {"ckpt_path": "some.ckpt"},
            "--ckpt_path some.ckpt: predict scores with the teacher; give it as --model.teacher.path, and leave out "
            "--ckpt_path (null, if a config.yaml sets it)",
        ),
        ({"model.teacher.path": None}, "--model.teacher.path is null, but predict scores with the teacher"),
        ({"model.teacher.path": "/no/such.ckpt"}, "--model.teacher.path /no/such.ckpt does not exist"),
    ],
)
def test_scores_of_something_else_are_refused(scored, of_data, teacher, capsys, change, named):
    before = (scored / "scores.json").read_bytes()
    if "data.tokenizer" in change:
        change = {**change, "data.tokenizer": str(Path(teacher).parents[1] / "tokenizer")}
    layers = of_data, {"run": str(scored), "model.teacher.path": teacher}, change
    assert cli.main(["predict", *arguments(*layers)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert named in error
    assert (scored / "scores.json").read_bytes() == before


def test_a_missing_teacher_is_refused_before_the_text_is_prepared(of_data, tmp_path, monkeypatch, capsys):
    """It took minutes of tokenizing first."""
    monkeypatch.setattr("salt_lightning.data.SALTDataModule.prepare_data", lambda _: pytest.fail("text is prepared"))
    assert cli.main(["predict", *arguments(of_data, {"run": str(tmp_path), "model.teacher.path": None})]) == 2
    assert "--model.teacher.path is null, but predict scores with the teacher" in error_of(capsys)


def test_another_teacher_is_refused(scored, of_data, teacher, fit_with, tmp_path, capsys):
    assert fit_with(tmp_path / "other", **{"trainer.max_steps": 1, "model.optim.warmup_steps": 0,
                                           "trainer.val_check_interval": 1}) == 0  # fmt: skip
    path = str(tmp_path / "other" / "checkpoints" / "step-00000001.ckpt")
    assert cli.main(["predict", *arguments(of_data, {"run": str(scored), "model.teacher.path": path})]) == 2
    said = "do not fit --model.teacher.path (other weights, config.json or code); choose another --run"
    assert said in capsys.readouterr().err
    folder = {"run": str(tmp_path / "run"), "model.teacher.path": str(tmp_path / "hf")}
    assert cli.main(["export", teacher, str(tmp_path / "hf")]) == 0
    assert cli.main(["predict", *arguments(of_data, folder)]) == 0
    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.1}))
    assert cli.main(["predict", *arguments(of_data, folder)]) == 2
    assert said in capsys.readouterr().err


def test_a_teacher_that_knows_nothing_of_the_text_scores_nothing(of_data, teacher, tmp_path, capsys, caplog):
    """As in a fit. A selection by it was random, and neither predict, fit nor check said so."""
    checkpoint = torch.load(teacher, weights_only=True)
    for tensor in checkpoint["state_dict"].values():
        tensor.normal_(std=0.02)
    path, run = str(tmp_path / "random.ckpt"), tmp_path / "run"
    torch.save(checkpoint, path)
    layers = of_data, {"run": str(run), "model.teacher.path": path}
    assert cli.main(["predict", *arguments(*layers)]) == 2
    assert f"--model.teacher.path {path} knows nothing about this text: " in capsys.readouterr().err
    assert not (run / "scores.json").exists()  # the right teacher can score into this folder
    assert cli.main(["predict", *arguments(*layers, {"kd.allow_untrained": True})]) == 0
    assert f"note: teacher CE: --model.teacher.path {path} knows nothing" in caplog.text
    assert (run / "report.md").exists()


def test_an_early_teacher_may_score(of_data, teacher, tmp_path, monkeypatch, caplog):
    """docs/salt-ds.md recommends one; a fit with it warns that it holds the student back."""
    weak = preflight.TeacherLoss(teacher=5.3, uniform=5.7, counts=5.2, tokens=1000)
    assert preflight.teacher(weak, "t", False).level == "warning"
    seen = []

    def look(*_):
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()))
        return weak

    monkeypatch.setattr("salt_lightning.teacher.probe.look", look)
    own = {"run": str(tmp_path / "run"), "model.teacher.path": teacher, "trainer.precision": "bf16-mixed"}
    assert cli.main(["predict", *arguments(of_data, own)]) == 0
    assert "teacher CE" not in caplog.text
    assert seen == [(True, True)]  # as in prediction


def test_a_teacher_that_is_not_finite_is_named(of_data, teacher, tmp_path, capsys):
    checkpoint = torch.load(teacher, weights_only=True)
    norm = next(name for name in checkpoint["state_dict"] if name.endswith("model.norm.weight"))
    checkpoint["state_dict"][norm].fill_(float("nan"))
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    layers = of_data, {"run": str(tmp_path / "run"), "model.teacher.path": str(tmp_path / "nan.ckpt")}
    assert cli.main(["predict", *arguments(*layers)]) == 2
    said = "--model.teacher.path: its weights are not finite (model.norm.weight): they are damaged"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class Poison(cli.pl.Callback):
    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 3:  # the second batch of shard 1: rows 24 to 31
            outputs["nll"][2, 5] = float("inf")


def test_a_row_whose_loss_is_not_finite_is_named(of_data, teacher, tmp_path, capsys, with_callback):
    layers = of_data, {"run": str(tmp_path), "model.teacher.path": teacher}
    with with_callback(Poison()):
        assert cli.main(["predict", *arguments(*layers)]) == 2
    assert "--model.teacher.path: the teacher's loss is not finite in row 26; is it" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["00000000.parquet"]


# --- a fit with a selection ---


@pytest.fixture
def ds(scored, teacher):
    """SALT_DS in twelve steps: six of phase 1, including a ramp."""
    return {"data.selection": str(scored), "data.keep.fraction": 0.4, "data.keep.masked": "drop", "kd.weight": 0.5,
            "kd.steps": 6, "kd.anneal_steps": 2, "kd.shape": "linear", "model.teacher.path": teacher}  # fmt: skip


class Reads(cli.pl.Callback):
    def __init__(self):
        self.rows: dict[int, list[int]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.setdefault(trainer.global_step, []).extend(batch["rows"].tolist())


def test_phase_1_reads_the_kept_rows_and_phase_2_the_rest_first(fit_with, ds, scored, tmp_path, caplog):
    reads = Reads()
    assert fit_with(tmp_path / "run", reads, **ds, **{"data.micro_batch_size": 4}) == 0
    kept = set(
        kept_rows(row_scores(Scores(scored, "--run"), 10, "drop"), KeepRule(fraction=0.4, masked="drop")).tolist()
    )
    phase1 = [row for step in range(6) for row in reads.rows[step]]
    phase2 = [row for step in range(6, 12) for row in reads.rows[step]]
    assert len(phase1) == len(phase2) == 48
    assert set(phase1) <= kept
    assert not set(phase2) & set(phase1)
    assert len(set(phase2)) == 48
    assert set(phase2) - kept
    assert "127 of 317 rows (highest, k 10, masked drop; S " in caplog.text
    assert "phase 1 reads 48, each kept row 0.38 times; phase 2 begins with the 269 unread rows" in caplog.text


@pytest.mark.parametrize("stop", [3, 6, 9])
def test_stopped_and_resumed_with_a_selection(fit_with, ds, tmp_path, stop, caplog):
    """In phase 1, at the boundary, in phase 2; changing the accumulation does not change the rows."""
    whole, cut, reads = tmp_path / "whole", tmp_path / "cut", Reads()
    assert fit_with(whole, Reads(), **ds) == 0
    assert fit_with(cut, StopAt(stop), reads, **ds) == 128 + signal.SIGTERM
    assert fit_with(cut, reads, ckpt_path="last", **ds) == 0
    assert "may come again" not in caplog.text
    straight = Reads()
    assert fit_with(tmp_path / "rows", straight, **ds) == 0
    assert reads.rows == straight.rows
    last = "checkpoints/step-00000012.ckpt"
    one, other = weights(whole / last), weights(cut / last)
    assert all(torch.equal(one[name], other[name]) for name in one)
    timing = ("time_s", "tokens_per_s", "data_wait_s")
    logged = [{k: v for k, v in scalars(run).items() if not k.endswith(timing)} for run in (whole, cut)]
    assert logged[0] == logged[1]


def test_a_resume_without_the_selection_tells_that_rows_may_be_read_again(fit_with, ds, tmp_path, caplog):
    reads = Reads()
    assert fit_with(tmp_path / "run", StopAt(6), reads, **ds) == 128 + signal.SIGTERM
    without = {name: value for name, value in ds.items() if name != "data.selection" and "data.keep." not in name}
    assert fit_with(tmp_path / "run", reads, ckpt_path="last", **without) == 0
    assert "without --data.selection the rows are in another order, so they may be read again" in caplog.text
    before, after = ({row for step in steps for row in reads.rows[step]} for steps in (range(6), range(6, 12)))
    assert before & after


def test_rows_that_were_selected_otherwise_before_a_resume_are_said_to_come_again(fit_with, ds, tmp_path, caplog):
    reads = Reads()
    assert fit_with(tmp_path / "run", StopAt(6), reads, **ds) == 128 + signal.SIGTERM
    assert fit_with(tmp_path / "run", reads, ckpt_path="last", **{**ds, "data.keep.order": "lowest"}) == 0
    assert "those that it has read under others may come again before them" in caplog.text
    before, after = ({row for step in steps for row in reads.rows[step]} for steps in (range(6), range(6, 12)))
    assert len(before) == len(after) == 48
    assert before & after


def test_a_selection_that_chance_decides_is_a_warning(fit_with, ds, tmp_path, caplog):
    assert fit_with(tmp_path, **{**ds, "data.keep.masked": "zero", "data.keep.k": 1}) == 0
    (line,) = (line for line in caplog.messages if "selection: " in line)
    assert line.startswith("warning: selection: ")
    assert line.endswith(
        "unread rows; use a later teacher, a larger --data.keep.k, --data.keep.masked drop, or fewer rows kept"
    )


def test_the_control_without_kd_reads_the_same_rows(fit_with, ds, tmp_path):
    with_kd, without = Reads(), Reads()
    assert fit_with(tmp_path / "a", with_kd, **ds) == 0
    assert fit_with(tmp_path / "b", without, **{**ds, "kd.weight": 0.0, "model.teacher.path": None}) == 0
    assert with_kd.rows == without.rows
    logged = scalars(tmp_path / "b")
    assert not logged.keys() & {"train/teacher_ce", "train/teacher_entropy", "train/kd"}
    assert set(logged["train/teacher_time_s"].values()) == {0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"data.block_size": 16},
            "--data.selection .* holds scores that do not fit --data.block_size; score this data",
        ),
        ({"data.val_fraction": 0.3, "kd.weight": 0.0}, "do not fit --data.source"),
        ({"data.vocab_size": 290}, "do not fit --data.source .* and --data.tokenizer"),
        ({"data.keep.fraction": 1.5}, "--data.keep.fraction 1.5 must be above 0 and at most 1"),
        ({"data.selection": "/nowhere"}, "--data.selection: /nowhere/scores.json does not exist; give the folder"),
        ({"data.selection": None}, "--data.keep.* needs --data.selection"),
        ({"data.keep.rows": 5}, "so each is read 9.6 times; keep more"),
        ({"data.keep.rows": 10**6}, "--data.keep.rows 1000000 asks for 1000000 rows, but there are"),
    ],
)
def test_selections_that_do_not_fit(fit_with, ds, tmp_path, capsys, change, message):
    assert fit_with(tmp_path / "run", **{**ds, **change}) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(f"error: .*{message}", error), error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_corrupt_or_missing_shard_is_named(fit_with, ds, scored, tmp_path, capsys):
    copy = tmp_path / "scores"
    shutil.copytree(scored, copy)
    for path in (copy / "scores").glob("S-*"):
        path.unlink()
    shard = copy / "scores" / "00000002.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert fit_with(tmp_path / "run", **{**ds, "data.selection": str(copy)}) == 2
    assert "00000002.parquet is damaged" in capsys.readouterr().err
    shard.unlink()
    assert fit_with(tmp_path / "run", **{**ds, "data.selection": str(copy / "scores.json")}) == 2
    assert re.search(r"lacks 1 of \d+ shards of scores", capsys.readouterr().err)
