"""mixture.py: sources in fixed shares, also through the data module and real runs."""

import math
import re
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import arguments, run, write_corpus
from hypothesis import given
from hypothesis import strategies as st

from salt_lightning.batches.mixture import CYCLE, Mixture, Shares, make_order, shares_of
from salt_lightning.batches.order import Order
from salt_lightning.batches.row_set import RowSet
from salt_lightning.batches.stretches import (
    Stretch,
    Stretches,
    go_on,
    one_stretch,
    rows_before,
    steps_of,
    where,
    with_past,
)
from salt_lightning.data import SALTDataModule
from salt_lightning.errors import ConfigError
from salt_lightning.models import read_checkpoint
from salt_lightning.module import SALTModule
from salt_lightning.preflight import shares
from salt_lightning.selection import _told

SIZES = (13, 500, 70)
WEIGHTS = (0.5, 0.2, 0.3)
STARTS = (0, 13, 513, 583)


def mixture(weights=WEIGHTS, starts=STARTS, seed=0, **selection) -> Mixture:
    names = tuple(f"source {s}" for s in range(len(weights)))
    return Mixture(Shares(names, tuple(weights), tuple(starts)), Order(seed, starts[-1], **selection))


def by_source(rows: np.ndarray) -> list[list[int]]:
    """The rows read from each source, in order."""
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
    raised = sum(1 - want for want in exact if want < 1)  # sources below one row got it from the others
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
    """So each step has the shares, to within two rows."""
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
    first = [12, 572, 4, 440, 8, 522, 7, 35]
    assert order(np.arange(8)).tolist() == first  # a release that changed this would break every resume


ROWS = np.array([3, 4, 9, *range(20, 200, 3), *range(513, 540)])
KEPT = RowSet(np.isin(np.arange(583), ROWS))


def test_phase_1_reads_the_kept_rows_of_each_source_and_the_shares_stay():
    order = mixture(kept=KEPT, phase1=100)
    rows = order(np.arange(100))
    assert set(rows.tolist()) <= set(ROWS.tolist())
    assert [len(read) for read in by_source(rows)] == order.shares.reads(100).tolist()
    for read, kept in zip(by_source(rows), by_source(ROWS), strict=True):
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


def test_a_source_that_phase_1_does_not_come_to_needs_no_kept_row():
    order = mixture((1, 500, 500), kept=RowSet(np.isin(np.arange(583), ROWS[ROWS >= 13])), phase1=100)
    assert order.orders[0].repeats == 0
    rows = order(np.arange(2 * CYCLE))
    assert set(rows[:100].tolist()) <= set(ROWS.tolist())
    assert sorted(by_source(rows)[0][:13]) == list(range(13))


# three stretches of steps: first step, rows per step, weights
HISTORY = ((0, 10, WEIGHTS), (7, 40, (0.1, 0.8, 0.1)), (12, 25, WEIGHTS), (13, 25, WEIGHTS))
NAMES = ("source 0", "source 1", "source 2")


def parts(history=HISTORY) -> list[tuple[Stretches, Shares]]:
    """The stretches so far, and the shares, for each part of the run."""
    found, stretches = [], ()
    for step, rows, weights in history:
        begun = one_stretch(rows, 32, Shares(NAMES, weights, STARTS))
        stretches = go_on({"data": {}, "global_step": step, "stretches": [asdict(part) for part in stretches]}, begun)
        found.append((stretches, with_past(Shares(NAMES, weights, STARTS), stretches)))
    return found


def rows_of(**selection) -> list[np.ndarray]:
    """The rows that each part of the run reads, up to step 40."""
    ends = [step for step, *_ in HISTORY[1:]] + [40]
    whole = Order(0, STARTS[-1], **selection)
    return [
        Mixture(shares, whole)(np.arange(rows_before(stretches, begin), rows_before(stretches, end)))
        for (stretches, shares), (begin, *_), end in zip(parts(), HISTORY, ends, strict=True)
    ]


def test_under_other_shares_each_source_goes_on_in_its_order():
    found = rows_of()
    assert [len(rows) for rows in found] == [7 * 10, 5 * 40, 25, 27 * 25]
    assert [len(stretches) for stretches, _ in parts()] == [1, 2, 3, 3]  # the last one continues as before
    for s, read in enumerate(by_source(np.concatenate(found))):
        own = STARTS[s] + mixture().orders[s](np.arange(len(read)))
        assert read == own.tolist()
    for rows, (*_, weights) in zip(found, HISTORY, strict=True):
        for read, weight in zip(by_source(rows), weights, strict=True):
            assert abs(len(read) - weight * len(rows)) < 2
    _, last = parts()[-1]
    assert last.reads(970).tolist() == [len(read) for read in by_source(np.concatenate(found))]
    assert last.reads(150).tolist() == [len(read) for read in by_source(np.concatenate(found)[:150])]


def test_under_other_shares_phase_2_reads_what_phase_1_has_not():
    """KD ends within the second stretch, which the third and the fourth must take into account."""
    phase1 = 150
    found = np.concatenate(rows_of(kept=KEPT, phase1=phase1))
    assert set(found[:phase1].tolist()) <= set(ROWS.tolist())
    for s, (read, late) in enumerate(zip(by_source(found[:phase1]), by_source(found[phase1:]), strict=True)):
        unread = set(range(STARTS[s], STARTS[s + 1])) - set(read)
        assert len(set(late[: len(unread)])) == min(len(late), len(unread))
        assert set(late[: len(unread)]) <= unread


def test_a_source_that_comes_later_begins_at_its_first_row_and_one_that_left_is_not_forgotten():
    stretches = (Stretch(0, 10, 32, {"a": 5000, "b": 5000}), Stretch(2, 10, 32, {"a": 5000, "c": 5000}))
    shares = with_past(Shares(("a", "c"), (1, 1), (0, 40, 80)), stretches)
    assert shares.reads(30).tolist() == [15, 5]
    again = Stretch(4, 10, 32, {"a": 5000, "b": 5000})
    back = with_past(Shares(("a", "b"), (1, 1), (0, 40, 80)), (*stretches, again))
    assert back.reads(60).tolist() == [30, 20]
    turns, ab = {"a": 5000, "b": 5000}, Shares(("a", "b"), (1, 1), (0, 40, 80))
    assert (
        with_past(ab, (Stretch(0, 10, 32, turns), Stretch(3, 20, 32, turns))) == ab
    )  # larger steps do not change the shares
    # until step 3 no source had an order of its own, and from 5 to 6 neither
    parts = (Stretch(0, 10, 32, None), Stretch(3, 10, 32, turns), Stretch(5, 30, 32, None), Stretch(6, 10, 32, turns))
    assert with_past(ab, parts).reads(50).tolist() == [10, 10]
    assert with_past(ab, parts).reads(80).tolist() == [10, 10]
    assert with_past(ab, parts).reads(100).tolist() == [20, 20]
    assert with_past(ab, parts).alike == 60
    larger, longer = (Stretch(3, 20, 32, turns), Stretch(3, 10, 64, turns))
    for stretches, told in (
        (parts, "with and without --data.source_weights"),
        (parts[:1], None),
        ((Stretch(0, 10, 32, turns), larger), None),
        ((Stretch(0, 10, 32, turns), longer), "of another --data.block_size"),
    ):
        said = where(stretches, {"global_step": 7, "text": {"cuts": {"a": [0, 9]}}}, {"a": [0, 9]})
        assert ("may be read again" in said, (told or "continues with row") in said) == (told is not None, True)


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ({"cuts": {"a": [0, 9], "b": [3, 9]}}, "row 71 of the order"),
        ({"cuts": {"a": (0, 9), "b": (3, 9)}}, "row 71 of the order"),
        ({"cuts": {"a": [0, 9]}}, "row 71 of the order"),  # b is new
        ({"cuts": {"a": [0, 9], "b": [4, 9]}}, "; b: in other rows than before, .* so text may be read again"),
        ({"cuts": {"a": [0, 9], "x/b": [3, 9]}}, "; b: new or renamed, so it begins with its first row"),
    ],
)
def test_a_resume_says_which_sources_are_not_as_before(before, said):
    stretches, checkpoint = (Stretch(0, 10, 32, {"a": 5000, "b": 5000}),), {"global_step": 7, "text": before}
    assert re.fullmatch(f"step 8 continues with .*{said}", where(stretches, checkpoint, {"a": [0, 9], "b": [3, 9]}))


def test_a_source_that_is_back_is_not_called_new():
    """It is not read from its first row again: what it gave before is counted."""
    turns = [dict.fromkeys(names, 5000) for names in ("ab", "ac", "ab", "db")]
    first, second, third, other = (Stretch(10 * n, 10, 32, each) for n, each in enumerate(turns))
    checkpoint = {"global_step": 20, "text": {"cuts": {"a": [0, 9], "c": [3, 9]}}}
    said = where((first, second, third), checkpoint, {"a": [0, 9], "b": [3, 9]})
    assert said.endswith("; b: back, so it continues after its rows that were read before; if it has changed since "
                         "then, text may be read again")  # fmt: skip
    assert "new or renamed" in where((first, second), checkpoint | {"global_step": 10}, {"a": [0, 9], "d": [3, 9]})
    both = where((first, second, other), checkpoint, {"d": [0, 9], "b": [3, 9]})
    assert re.search("; b: back, .*; d: new or renamed, so it begins with its first row$", both)


def test_rows_of_another_length_count_by_their_tokens():
    stretches = (Stretch(0, 8, 128, None), Stretch(30, 8, 256, None), Stretch(35, 3, 96, None))
    assert [rows_before(stretches[:1], step) for step in (0, 30)] == [0, 240]
    assert [rows_before(stretches[:2], step) for step in (15, 30, 31)] == [60, 120, 128]
    assert rows_before(stretches, 40) == (30 * 8 * 128 + 5 * 8 * 256 + 5 * 3 * 96) // 96


def test_a_source_keeps_its_order_wherever_it_stands_in_the_list():
    def orders(*names):
        shares = Shares(names, (1.0,) * len(names), tuple(range(0, 50 * len(names) + 1, 50)))
        found = Mixture(shares, Order(3, shares.starts[-1])).orders
        return dict(zip(names, ([*order(np.arange(50))] for order in found), strict=True))

    two, three = orders("a", "b"), orders("c", "b", "a")
    assert two == {name: three[name] for name in ("a", "b")}
    assert len({tuple(order) for order in three.values()}) == 3


GOOD = {"step": 0, "rows": 8, "block_size": 32, "turns": {"a": 4000, "b": 6000}}


@pytest.mark.parametrize(
    "stretches",
    [
        [{"step": 0}], [{**GOOD, "more": 1}], [{**GOOD, "step": 1}], [GOOD, GOOD], [GOOD, {**GOOD, "step": 10}],
        [{**GOOD, "rows": 0}], [{**GOOD, "rows": 1 << 40}], [{**GOOD, "block_size": 0}], [{**GOOD, "turns": {}}],
        [{**GOOD, "turns": {"a": 10_001, "b": -1}}], [{**GOOD, "turns": {"a": 4000, "b": 6001}}],
    ],
)  # fmt: skip
def test_stretches_that_no_run_has(stretches):
    begun = one_stretch(8, 32, None)
    for more in ([], [{**GOOD, "step": 9}]):  # one that has begun, but was stopped before its first step
        assert go_on({"data": {}, "global_step": 9, "stretches": [GOOD, *more]}, begun) == (
            Stretch(**GOOD),
            Stretch(9, 8, 32, None),
        )
    with pytest.raises(
        ConfigError,
        match=r"^the checkpoint's record of the rows read is impossible: it is damaged, or of another",
    ):
        go_on({"data": {}, "global_step": 9, "stretches": stretches}, begun)


def test_rows_of_other_text_do_not_count_unless_sources_have_their_own_places():
    first, other, shared = (Stretch(0, 8, 32, None, "a"), Stretch(9, 8, 32, None, "b"), Stretch(**GOOD))
    saved = {"data": {"--data.train_fingerprint": "a"}, "global_step": 9, "stretches": [asdict(first)]}
    now = replace(other, step=0)
    assert go_on(saved, (now,)) == (first, other)
    assert go_on(saved, (replace(now, text="a"),)) == (first,)
    assert [rows_before((first, other), step) for step in (9, 11)] == [0, 16]
    assert steps_of((first, other), 12) == (3, 12)
    back = (first, other, Stretch(11, 4, 64, None, "a"))
    assert (
        go_on({**saved, "global_step": 11, "stretches": [*map(asdict, back[:2])]}, (replace(back[2], step=0),)) == back
    )
    assert rows_before(back, 12) == 9 * 8 * 32 // 64 + 4
    assert steps_of(back, 12) == (10, 12)
    del saved["stretches"][0]["text"]  # by an older version
    assert go_on(saved, (now,)) == (first, other)
    assert go_on(saved, (replace(shared, step=0),)) == (replace(first, text=""), replace(shared, step=9))
    assert rows_before((first, replace(shared, step=9)), 10) == 80
    assert rows_before((shared, other), 10) == 80


def test_a_checkpoint_of_a_user_s_own_loader_is_of_one_stretch():
    begun = one_stretch(8, 32, None)
    assert go_on({"data": {}, "global_step": 9, "stretches": []}, begun) == begun


def test_the_fingerprint_tells_other_shares_and_other_kept_rows():
    changed = [{}, {"weights": (0.4, 0.3, 0.3)}, {"starts": (0, 12, 513, 583)}, {"kept": KEPT},
               {"kept": RowSet(np.isin(np.arange(583), ROWS[1:]))}, {"kept": KEPT, "phase1": 9}]  # fmt: skip
    assert len({mixture(**change).fingerprint for change in changed}) == len(changed)
    assert mixture(weights=(5, 2, 3)).fingerprint == mixture().fingerprint  # the unit does not matter
    assert mixture(seed=1).fingerprint == mixture().fingerprint  # the seed is compared separately
    after_each = {Mixture(shares, Order(3, STARTS[-1])).fingerprint for _, shares in parts()}
    assert len(after_each) == 3  # of four stretches: the last one changes the rows of a step alone


def test_without_weights_all_rows_are_read_alike():
    order = make_order(None, Order(3, 100))
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
    with pytest.raises(ConfigError, match="an entry of --data.source twice; name it once"):
        data(source=[sources[0], sources[0]], source_weights=[1, 2])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_source_no_longer_than_a_row_is_named(place, data, sources, tmp_path):
    """Wherever it lies: rows that begin in it would be mostly other text."""
    (tmp_path / "word.txt").write_text("word")
    named = [*sources[:place], str(tmp_path / "word.txt"), *sources[place:]]
    made = data(source=named, source_weights=[1, 1, 1])
    made.prepare_data()
    said = r"--data.source_weights: 'word' has \d training tokens .* not more than one row of --data.block_size 32; add"
    with pytest.raises(ConfigError, match=said):
        made.setup("fit")


def test_a_source_that_is_all_held_out_is_told_so(data, sources, tmp_path):
    one = write_corpus(tmp_path / "one.jsonl", 1, seed=1)  # the lot of this text falls on validation
    made = data(source=[*sources, str(one)], source_weights=[1, 1, 1], val_fraction=0.5)
    made.prepare_data()
    with pytest.raises(
        ConfigError, match=r"'one' has 0 training tokens \(held-out text excluded\), .* lower --data.val_frac"
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
    with pytest.raises(
        ConfigError, match=r"entries of --data.source share a name \(distinct ones: web\); rename a folder"
    ):
        shares_of(["web"], [1.0, 1.0], [0, 64], 32)


def test_rows_read_without_weights_count_as_epochs_of_the_whole_text():
    read_S, rows_S = np.array([1, 1]), np.array([10, 10])
    assert shares(["a", "b"], read_S, rows_S, (5, 80, 78)).level == "ok"
    found = shares(["a", "b"], read_S, rows_S, (5, 81, 79))
    assert (found.level, found.remedy) == ("warning", "beyond 4 epochs text teaches less and less: add text")
    assert shares(["a", "b"], 0 * read_S, rows_S, (5, 40, 40)).said.endswith(
        "a 0.0% (0.00 epochs of 10 rows), b 0.0% (0.00 epochs of 10 rows)"
    )


def test_of_many_sources_the_most_repeated_are_named():
    names, read_S = [f"s{number}" for number in range(1000)], np.arange(1000)
    said = shares(names, read_S, np.full(1000, 500), (5, int(read_S.sum()), 0)).said
    assert "rows: s999 0.2% (2.00 epochs of 500 rows), s998 " in said
    assert said.endswith("s980 0.2% (1.96 epochs of 500 rows), 980 others (0.00 to 1.96 epochs)")
    assert len(said) < 1000
    assert "others" not in shares(names[:20], read_S[:20], np.full(20, 500), (5, 190, 0)).said


# --- through the command line ---


@pytest.fixture
def weighted(settings, sources, tmp_path) -> dict[str, object]:
    return {**settings, "data.source": sources, "data.source_weights": [1, 3], "kd.weight": 0.0,
            "run": str(tmp_path / "run"), "data.cache_dir": str(tmp_path / "cache")}  # fmt: skip


def test_a_run_says_how_often_it_reads_each_source(weighted, capsys, caplog, tmp_path):
    long = {"trainer.max_steps": 80, "trainer.val_check_interval": 80}
    assert run(["fit", *arguments(weighted, long)]) == 0
    assert "80 steps read 640 rows: web 25.0% (" in caplog.text
    assert "(beyond 4 epochs text teaches less and less: add to code, or lower its weight)" in caplog.text
    assert run(["check", *arguments(weighted, long, {"run": str(tmp_path / "other")})]) == 0
    out = capsys.readouterr().out
    assert "WARNING  rows           80 steps read 640 rows: web 25.0% (" in out
    (tmp_path / "word.txt").write_text("word")
    source = [weighted["data.source"][0], str(tmp_path / "word.txt")]
    assert run(["check", *arguments(weighted, {"data.source": source, "run": str(tmp_path / "other")})]) == 1
    assert "--data.source_weights: 'word' has 5 training tokens" in " ".join(capsys.readouterr().out.split())


def test_weights_that_begin_after_phase_1_say_that_they_bring_no_row_into_it():
    kept = RowSet(np.arange(9) < 4)
    assert _told("web", Order(0, 9, kept, 0)) == "web: 4 of 9 rows, phase 1 reads none of them by this weight"
    assert _told("", Order(0, 9, kept, 8)).startswith("phase 1 reads 8, each kept row 2.00 times")


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


def test_a_run_goes_on_in_other_shares_and_batches_with_what_is_unread(weighted, tmp_path, caplog, monkeypatch):
    """Three starts, the last interrupted once more, against what each source's own order says."""
    read: list[int] = []
    plain = SALTModule.training_step

    def training_step(self, batch, batch_idx):
        read.extend(batch["rows"].tolist())
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(SALTModule, "training_step", training_step)
    own = {**weighted, "checkpoint.at_steps": [4, 9], "trainer.val_check_interval": 12}
    assert run(["fit", *arguments(own)]) == 0
    del read[4 * 8 :]  # of 8 rows; the others are of the branch that is left

    def go_on(step, last, changes):
        ckpt = str(tmp_path / f"run/checkpoints/step-{step:08d}.ckpt")
        assert run(["fit", *arguments(own, changes, {"ckpt_path": ckpt, "trainer.max_steps": last})]) == 0

    more_code = {"data.source_weights": [1, 7], "data.global_batch_size": 16}
    go_on(4, 9, more_code)
    assert "data: step 5 continues with row 33 of the order" in caplog.text
    assert "data: 9 steps read 112 rows: web 16.1% (" in caplog.text  # 8 + 10
    assert "code 83.9% (" in caplog.text  # 24 + 70
    go_on(9, 10, {"data.source_weights": [1, 1]})
    saved = read_checkpoint(str(tmp_path / "run/checkpoints/step-00000010.ckpt"), "--ckpt_path")
    assert [(part["step"], part["rows"]) for part in saved["stretches"]] == [(0, 8), (4, 16), (9, 8)]
    go_on(10, 12, {"data.source_weights": [2, 2]})  # another unit, no other shares
    assert len(read) == 4 * 8 + 5 * 16 + 3 * 8
    made = SALTDataModule(**{key[5:]: value for key, value in own.items() if key.startswith("data.")})
    made.setup("fit")
    for order, (begin, end) in zip(made._order.orders, pairwise(made._shares().starts), strict=True):
        of_source = [row - begin for row in read if begin <= row < end]
        assert of_source == order(np.arange(len(of_source))).tolist()
    made.source_weights = [1, 1]
    made.go_on_from(saved)
    shown = made.describe_batches(9, 1)  # of 8 rows, as a step
    assert [int(row) for row in re.findall(r"(\d+) \(", shown)] == read[112:116]


def test_phase_1_is_over_whatever_the_batch_is_now(weighted, teacher, tmp_path, caplog, capsys):
    """Ten steps of 8 rows; at 64 a step they would have read each kept row too often."""
    scored = {"run": str(tmp_path / "scores"), "model.teacher.path": teacher, "data.micro_batch_size": 8}
    own = {key: value for key, value in weighted.items() if key.startswith(("data.", "trainer.acc"))}
    own = {key: value for key, value in own.items() if key != "data.source_weights"}
    own["data.tokenizer"] = str(Path(teacher).parents[1] / "tokenizer")
    assert run(["predict", *arguments(own, scored)]) == 0
    taught = {**weighted, **own, "data.source_weights": None, "data.selection": str(tmp_path / "scores"),
              "kd.weight": 0.5, "kd.steps": 4, "model.teacher.path": teacher, "checkpoint.at_steps": [6]}  # fmt: skip
    assert run(["fit", *arguments(taught)]) == 0
    step_6 = str(tmp_path / "run/checkpoints/step-00000006.ckpt")
    larger = {"data.global_batch_size": 256, "ckpt_path": step_6, "trainer.max_steps": 7, "data.keep.max_repeats": 1.5}
    caplog.clear()
    assert run(["fit", *arguments(taught, larger)]) == 0, capsys.readouterr().err
    said = [record.message for record in caplog.records if record.message.startswith("selection:")]
    assert len(said) == 1
    assert "phase 1 reads 32, each kept row" in said[0]
    begun = {"ckpt_path": None, "run": str(tmp_path / "anew")}
    assert run(["fit", *arguments(taught, larger, begun)]) == 2
    assert "--data.keep: phase 1 reads 1024 rows" in capsys.readouterr().err
