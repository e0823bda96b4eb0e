"""mixture.py: sources in fixed shares, through the data module and real runs too."""

import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import arguments, run, write_corpus
from hypothesis import given
from hypothesis import strategies as st

from salt_lightning.batches.mixture import CYCLE, Mixture, Shares, make_order, shares_of
from salt_lightning.batches.order import Order
from salt_lightning.data import SALTDataModule
from salt_lightning.errors import ConfigError

SIZES = (13, 500, 70)
WEIGHTS = (0.5, 0.2, 0.3)
STARTS = (0, 13, 513, 583)


def mixture(weights=WEIGHTS, starts=STARTS, seed=0, **selection) -> Mixture:
    names = tuple(f"source {s}" for s in range(len(weights)))
    return Mixture(Shares(names, tuple(weights), tuple(starts)), seed, **selection)


def by_source(rows: np.ndarray) -> list[list[int]]:
    """What was read of each source, in order."""
    return [[int(row) for row in rows if start <= row < end] for start, end in pairwise(STARTS)]


@pytest.mark.parametrize(
    ("weights", "turns"),
    [
        ((7, 3), [7000, 3000]),
        ((0.7, 0.3), [7000, 3000]),
        ((1e-3, 3e-3), [2500, 7500]),
        ((1, 1, 1), [3334, 3333, 3333]),
        ((2, 2, 2, 1), [2857, 2857, 2857, 1429]),  # 2857.14 and 1428.57
        ((1e9, 1), [9999, 1]),
        ((1, *[1e-9] * 500), [9500, *[1] * 500]),
        ((*[20.0] * 500, *[1e-9] * 500), [*[19] * 500, *[1] * 500]),  # 9,500 turns for 500 sources
        ((1e308, 1e308), [5000, 5000]),
    ],
)
def test_turns_of_a_cycle(weights, turns):
    shares = Shares(tuple(map(str, weights)), weights, tuple(range(len(weights) + 1)))
    assert shares.turns_S.tolist() == turns
    assert shares.turns_S.sum() == CYCLE


@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=60))
def test_shares_are_as_fine_as_a_cycle(weights):
    turns_S = Shares(tuple(map(str, weights)), tuple(weights), tuple(range(len(weights) + 1))).turns_S
    assert turns_S.sum() == CYCLE
    assert turns_S.min() >= 1
    exact = [weight / math.fsum(weights) * CYCLE for weight in weights]
    raised = sum(1 - want for want in exact if want < 1)  # what those below one have got the others have given
    for have, want in zip(turns_S, exact, strict=True):
        assert -raised - 1 < have - want < 1 + (want < 1)


@pytest.mark.parametrize("weights", [(5, 2, 5), (0.05, 0.02, 0.05), (500.0, 200.0, 500.0)])
def test_the_unit_does_not_matter_where_remainders_are_equal(weights):
    assert Shares(("a", "b", "c"), weights, (0, 1, 2, 3)).turns_S.tolist() == [4167, 1667, 4166]  # 4166.67, 1666.67


def test_every_source_is_read_pass_by_pass_in_an_order_of_its_own():
    rows = mixture()(np.arange(2 * CYCLE))
    passes = []
    for read, start, size in zip(by_source(rows), STARTS, SIZES, strict=False):
        whole = [read[i : i + size] for i in range(0, len(read) - size + 1, size)]
        assert len(whole) >= 8
        for one in whole:
            assert sorted(one) == list(range(start, start + size))
        assert len(set(map(tuple, whole))) == len(whole)
        passes.append(np.array(whole[0]) - start)
    same = mixture((1, 1), (0, 70, 140))(np.arange(140))
    first, second = same[same < 70], same[same >= 70] - 70
    assert first.tolist() != second.tolist()  # of one length, in one seed


@pytest.mark.parametrize(
    "weights",
    [WEIGHTS, (50, *[1] * 50), (80, *[1] * 20), (1, *[1e-9] * 500), (1, 1), (9999, 1), (*range(1, 40),)],
    ids=str,
)
def test_no_source_is_ever_a_row_ahead_or_behind(weights):
    """So each step has the shares, to less than two rows."""
    shares = Shares(tuple(map(str, range(len(weights)))), weights, tuple(range(len(weights) + 1)))
    source_P, number_P = shares.cycle
    read_PS = np.cumsum(source_P[:, None] == np.arange(len(weights)), axis=0)
    assert read_PS[-1].tolist() == shares.turns_S.tolist()
    ahead_PS = read_PS * CYCLE - shares.turns_S * np.arange(1, CYCLE + 1)[:, None]  # in 1 / CYCLE of a row
    assert np.abs(ahead_PS).max() < CYCLE
    assert number_P.tolist() == (np.take_along_axis(read_PS, source_P[:, None], 1)[:, 0] - 1).tolist()


def test_what_a_stretch_reads_of_each_source():
    order = mixture()
    source = np.searchsorted(STARTS, order(np.arange(3 * CYCLE)), side="right") - 1
    for count in (0, 1, 63, CYCLE - 1, CYCLE, 2 * CYCLE + 7):
        assert order.shares.reads(count).tolist() == np.bincount(source[:count], minlength=3).tolist()


def test_a_row_depends_on_nothing_but_its_position():
    order, positions = mixture(seed=5), np.random.default_rng(0).integers(0, 10**12, 300)
    together = order(positions)
    assert [int(order(np.array([position]))[0]) for position in positions] == together.tolist()
    assert mixture(seed=5)(positions).tolist() == together.tolist()
    assert mixture(seed=6)(positions).tolist() != together.tolist()
    first = [0, 566, 4, 29, 6, 534, 8, 326]
    assert order(np.arange(8)).tolist() == first  # a release that moved this would spoil every resume


KEPT = np.array([3, 4, 9, *range(20, 200, 3), *range(513, 540)])


def test_phase_1_reads_the_kept_rows_of_each_source_and_the_shares_stay():
    order = mixture(kept=KEPT, phase1=100)
    rows = order(np.arange(100))
    assert set(rows.tolist()) <= set(KEPT.tolist())
    assert [len(read) for read in by_source(rows)] == order.shares.reads(100).tolist()
    for read, kept in zip(by_source(rows), by_source(KEPT), strict=True):
        times = np.unique(read, return_counts=True)[1]
        assert times.max() - (times.min() if len(times) == len(kept) else 0) <= 1  # pass by pass
    assert [part.repeats for part in order.orders] == pytest.approx([50 / 3, 20 / 60, 30 / 27])


def test_phase_2_reads_the_unread_rows_of_each_source_first():
    order = mixture(kept=KEPT, phase1=100)
    before, after = order(np.arange(100)), order(np.arange(100, 2 * CYCLE))
    assert sum(part.num_unread for part in order.orders) == 583 - len(set(before.tolist()))
    for s, (read, late) in enumerate(zip(by_source(before), by_source(after), strict=True)):
        unread = set(range(STARTS[s], STARTS[s + 1])) - set(read)
        assert set(late[: len(unread)]) == unread
    again = mixture(kept=KEPT, phase1=100, unread_first=False)
    plain = mixture()
    assert again(np.arange(100, 400)).tolist() == plain(np.arange(100, 400)).tolist()


def test_the_fingerprint_tells_other_shares_and_other_kept_rows():
    changed = [{}, {"weights": (0.4, 0.3, 0.3)}, {"starts": (0, 12, 513, 583)}, {"kept": KEPT},
               {"kept": KEPT[1:]}, {"kept": KEPT, "phase1": 9}]  # fmt: skip
    assert len({mixture(**change).fingerprint for change in changed}) == len(changed)
    assert mixture(weights=(5, 2, 3)).fingerprint == mixture().fingerprint  # the unit does not matter
    assert mixture(seed=1).fingerprint == mixture().fingerprint  # the seed is compared apart


def test_without_weights_all_rows_are_read_alike():
    order = make_order(None, 3, 100)
    assert order(np.arange(300)).tolist() == Order(3, 100)(np.arange(300)).tolist()
    assert order.fingerprint == "none"


# --- the data module ---


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("sources")
    return [str(write_corpus(folder / name, documents, seed)) for name, documents, seed in
            (("web.jsonl", 200, 1), ("code.jsonl", 40, 2))]  # fmt: skip


@pytest.fixture
def data(sources, tmp_path) -> SALTDataModule:
    def make(**changes) -> SALTDataModule:
        given = {"source": sources, "vocab_size": 300, "block_size": 32, "global_batch_size": 10, "val_fraction": 0.1,
                 "micro_batch_size": 5, "prepare_workers": 1, "cache_dir": str(tmp_path)}  # fmt: skip
        return SALTDataModule(**{**given, **changes})

    return make


def test_rows_of_a_source_are_those_that_begin_in_it(data):
    made = data(source_weights=[1, 1])
    made.prepare_data()
    made.setup("fit")
    rows, files = np.arange(made.num_train_rows), made._train.files
    begins = files.doc_sources[np.searchsorted(files.doc_ends, rows * 32, side="right")]
    assert 0 < (begins == 1).sum() < (begins == 0).sum()
    assert made._shares().starts == (0, (begins == 0).sum(), len(rows))
    tokens = made._train.source_tokens(["web", "code"])
    assert tokens[1] == files.doc_ends[np.flatnonzero(files.doc_sources == 0)[-1]]
    assert tokens[::2] == [0, files.num_tokens]
    assert made._train.source_tokens(["web", "none", "code"]) == [0, tokens[1], *tokens[1:]]
    batch = np.concatenate([made.train_dataloader().batches[i]["rows"] for i in range(20)])
    assert (begins[batch] == 1).sum() == 50


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"source_weights": [1]},
            r"--data.source_weights \[1\] must be a number above 0 for each of the 2 entries .* null$",
        ),
        ({"source_weights": ["1", "2"]}, r"\['1', '2'\] must be a list \(each entry a number\)"),
        ({"source_weights": [True, True]}, r"must be a list \(each entry a number\)"),
        ({"source_weights": 2.0}, r"2.0 must be a list \(each entry a number\)"),
        ({"source_weights": {"web": 1, "code": 1}}, r"must be a list \(each entry a number\)"),
        ({"source_weights": [1, 0]}, r"\[1, 0\] must be a number above 0"),
        ({"source_weights": [1, math.nan]}, r"must be a number above 0"),
        ({"source_weights": [1, math.inf]}, r"must be a number above 0"),
        ({"source_weights": []}, r"--data.source_weights \[\] must be a number"),
        ({"source_weights": [1, 1], "source_column": "kind"}, r"leave out --data.source_column, or the weights"),
        ({"source_weights": [1, 1], "source_per_file": True}, r"leave out --data.source_per_file, or the w"),
    ],
)
def test_weights_that_cannot_be_meant(data, changes, said):
    with pytest.raises(ConfigError, match=said):
        data(**changes)


def test_an_entry_named_twice_has_one_weight(data, sources):
    with pytest.raises(ConfigError, match="an entry of --data.source twice: name it once"):
        data(source=[sources[0], sources[0]], source_weights=[1, 2])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_source_no_longer_than_a_row_is_named(place, data, sources, tmp_path):
    """Wherever it lies: rows that begin in it would be mostly other text."""
    (tmp_path / "word.txt").write_text("word")
    named = [*sources[:place], str(tmp_path / "word.txt"), *sources[place:]]
    made = data(source=named, source_weights=[1, 1, 1])
    made.prepare_data()
    said = r"--data.source_weights: 'word' has \d training tokens, .* no more than a row of --data.block_size 32; give"
    with pytest.raises(ConfigError, match=said):
        made.setup("fit")


def test_a_source_that_is_all_held_out_is_told_so(data, sources, tmp_path):
    one = write_corpus(tmp_path / "one.jsonl", 1, seed=1)  # the lot of this text falls on validation
    made = data(source=[*sources, str(one)], source_weights=[1, 1, 1], val_fraction=0.5)
    made.prepare_data()
    with pytest.raises(
        ConfigError, match="'one' has 0 training tokens, what is held out aside, .* lower --data.val_frac"
    ):
        made.setup("fit")


@pytest.mark.parametrize(("tokens", "fits"), [(33, True), (32, False)])
@pytest.mark.parametrize("before", range(32))
def test_a_source_longer_than_a_row_has_one_that_begins_in_it(before, tokens, fits):
    ends = [0, 64 + before, 64 + before + tokens]
    if not fits:
        with pytest.raises(ConfigError, match="'code' has 32 training tokens"):
            shares_of(["web", "code"], [1.0, 1.0], ends, 32)
        return
    starts = shares_of(["web", "code"], [1.0, 1.0], ends, 32).starts
    assert starts[2] == -(-(ends[2] - 1) // 32)  # as many rows as the stream has
    assert starts[1] < starts[2]


def test_entries_that_end_up_with_one_name_are_refused():
    with pytest.raises(ConfigError, match="entries of --data.source have one name among web; rename a folder"):
        shares_of(["web"], [1.0, 1.0], [0, 64], 32)


# --- through the command line ---


@pytest.fixture
def weighted(settings, sources, tmp_path) -> dict[str, object]:
    return {**settings, "data.source": sources, "data.source_weights": [1, 3], "kd.weight": 0.0,
            "run": str(tmp_path / "run"), "data.cache_dir": str(tmp_path / "cache")}  # fmt: skip


def test_a_run_says_how_often_it_reads_each_source(weighted, capsys, caplog, tmp_path):
    long = {"trainer.max_steps": 80, "trainer.val_check_interval": 80}
    assert run(["fit", *arguments(weighted, long)]) == 0
    assert "80 steps read 640 rows: web 25.0% (" in caplog.text
    assert "(beyond 4 epochs text teaches ever less: add to code, or lower its weight)" in caplog.text
    assert run(["check", *arguments(weighted, long, {"run": str(tmp_path / "other")})]) == 0
    out = capsys.readouterr().out
    assert "WARNING  rows           80 steps read 640 rows: web 25.0% (" in out
    (tmp_path / "word.txt").write_text("word")
    source = [weighted["data.source"][0], str(tmp_path / "word.txt")]
    assert run(["check", *arguments(weighted, {"data.source": source, "run": str(tmp_path / "other")})]) == 1
    assert "--data.source_weights: 'word' has 5 training tokens" in " ".join(capsys.readouterr().out.split())


def test_a_selection_keeps_the_shares(weighted, teacher, tmp_path, caplog):
    scored = {"run": str(tmp_path / "scores"), "model.teacher.path": teacher, "data.micro_batch_size": 8}
    own = {key: value for key, value in weighted.items() if key.startswith(("data.", "trainer.acc"))}
    own["data.tokenizer"] = str(Path(teacher).parents[1] / "tokenizer")
    assert run(["predict", *arguments(own, scored)]) == 0
    taught = {
        "data.selection": str(tmp_path / "scores"),
        "kd.weight": 0.5,
        "kd.steps": 6,
        "model.teacher.path": teacher,
    }
    assert run(["fit", *arguments(weighted, own, taught)]) == 0
    web, code = (
        rf"{name}: \d+ of \d+ rows, phase 1 reads {n}, each kept row" for name, n in (("web", 12), ("code", 36))
    )
    assert re.search(f"{web} .*; {code} ", caplog.text)
    step_12 = str(tmp_path / "run/checkpoints/step-00000012.ckpt")
    assert run(["export", step_12, str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf/README.md").read_text()
    assert re.search(r"web.jsonl 25.0%, \S*code.jsonl 75.0%", card)
    assert "times the text" not in card
