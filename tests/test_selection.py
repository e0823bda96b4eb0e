"""S(x), the rows that a rule keeps, and the order of a run that reads them first."""

import pickle
import statistics
import tracemalloc
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from salt_lightning.batches.mixture import Shares, make_order
from salt_lightning.batches.order import Order, row_at, scatter
from salt_lightning.batches.row_set import RowSet, _find
from salt_lightning.errors import ConfigError
from salt_lightning.fit import alike
from salt_lightning.selection import (
    KeepRule,
    _digest,
    chance,
    check_repeats,
    kept_rows,
    plan,
    row_scores,
    score_rows,
)
from salt_lightning.teacher.score_report import _overlap
from salt_lightning.teacher.scores import NO_LABEL, RANK_CAP, Scored, Scores, write_table

# --- S(x) ---


def by_definition(nll_T, rank_T, k, masked):
    """The median by the formula, written with the standard library."""
    tokens = [(x, r) for x, r in zip(nll_T, rank_T, strict=True) if r != NO_LABEL]
    values = [float(x) if r < k else 0.0 for x, r in tokens if masked == "zero" or r < k]
    return statistics.median(values) if values else 0.0


def test_by_hand():
    """Five tokens: losses 1 2 3 4 5, ranks 0 9 10 11 3; losses within the top ten: 1, 2, 5."""
    nll = np.array([[1, 2, 3, 4, 5]], np.float32)
    rank = np.array([[0, 9, 10, 11, 3]], np.uint16)
    assert score_rows(nll, rank, 10, "zero") == [1.0]  # 0 0 1 2 5
    assert score_rows(nll, rank, 10, "drop") == [2.0]  # 1 2 5
    assert score_rows(nll, rank, 11, "zero") == [2.0]  # 0 1 2 3 5
    assert score_rows(nll, rank, 1, "zero") == [0.0]  # 1 and four zeros
    assert score_rows(nll, rank, 1, "drop") == [1.0]
    assert score_rows(nll, rank, 12, "zero") == [3.0]


def test_even_counts_take_the_mean_of_the_middle():
    nll = np.array([[1, 2, 4, 8]], np.float32)
    assert score_rows(nll, np.zeros((1, 4), np.uint16), 10, "zero") == [3.0]
    assert score_rows(nll, np.array([[0, 0, 0, 50]], np.uint16), 10, "drop") == [2.0]
    assert score_rows(nll, np.array([[0, 0, 50, 50]], np.uint16), 10, "zero") == [0.5]  # 0 0 1 2


def test_positions_without_label_do_not_count():
    nll = np.array([[5, 0, 7, 0, 0]], np.float32)
    rank = np.array([[0, NO_LABEL, 0, NO_LABEL, NO_LABEL]], np.uint16)
    assert score_rows(nll, rank, 10, "zero") == [6.0]  # counted as zeros they would make it 0
    assert score_rows(nll, rank, 10, "drop") == [6.0]


def test_rows_without_any_label_score_zero():
    nll, rank = np.zeros((2, 3), np.float32), np.full((2, 3), NO_LABEL, np.uint16)
    for masked in ("zero", "drop"):
        assert score_rows(nll, rank, RANK_CAP, masked).tolist() == [0.0, 0.0]
    rank[:, 0] = RANK_CAP  # a label, but far from the top
    for masked in ("zero", "drop"):
        assert score_rows(nll + 3, rank, 10, masked).tolist() == [0.0, 0.0]


ranks = st.sampled_from([0, 1, 4, 5, 9, 10, 19, 20, 300, RANK_CAP, NO_LABEL])


@given(
    st.integers(1, 9).flatmap(
        lambda t: st.lists(
            st.lists(st.tuples(st.integers(0, 12), ranks), min_size=t, max_size=t), min_size=1, max_size=5
        )
    ),
    st.sampled_from([1, 5, 10, 20, RANK_CAP]),
    st.sampled_from(["zero", "drop"]),
)
def test_the_score_is_the_median_of_the_formula(rows, k, masked):
    nll = np.array([[t[0] / 4 for t in row] for row in rows], np.float32)  # quarters: exact in both
    rank = np.array([[t[1] for t in row] for row in rows], np.uint16)
    expected = [by_definition(x, r, k, masked) for x, r in zip(nll, rank, strict=True)]
    assert score_rows(nll, rank, k, masked).tolist() == expected


# --- what is kept ---

SCORES = np.array([0.3, 0.0, 2.0, 0.5, 0.0, 1.0, 0.0, 0.1, 9.0, 0.0])


@pytest.mark.parametrize(
    ("rule", "rows"),
    [
        (KeepRule(rows=3), [2, 5, 8]),
        (KeepRule(fraction=0.3), [2, 5, 8]),
        (KeepRule(rows=3, drop_top=0.1), [2, 3, 5]),
        (KeepRule(rows=2, drop_top=0.2), [3, 5]),
        (KeepRule(rows=2, order="middle"), [0, 7]),  # ranks 5 and 6 of ten
        (KeepRule(rows=4, order="middle", drop_top=0.2), [0, 7, "two of the zeros"]),  # ranks 5 to 8
        (KeepRule(fraction=1.0), list(range(10))),
        (KeepRule(rows=9, drop_top=0.1), [0, 1, 2, 3, 4, 5, 6, 7, 9]),
        (KeepRule(fraction=1e-9), [8]),  # at least one
        (KeepRule(rows=1, k=RANK_CAP, max_repeats=0.5), [8]),  # at the ends of what is allowed
    ],
)
def test_which_rows_a_rule_keeps(rule, rows):
    kept = kept_rows(SCORES, rule)
    if rows[-1] == "two of the zeros":
        rows = sorted([0, 7, *sorted([1, 4, 6, 9], key=lambda row: scatter(np.array([row]))[0])[:2]])
    assert kept.tolist() == rows


def test_a_share_is_rounded_and_not_cut():
    """0.29 * 100 is 28.999..."""
    assert kept_rows(np.arange(100.0), KeepRule(fraction=0.5, drop_top=0.29)).max() == 70


def test_lowest_rows_are_drawn_among_the_zeros():
    kept = kept_rows(SCORES, KeepRule(rows=2, order="lowest"))
    assert set(kept.tolist()) < {1, 4, 6, 9}
    assert kept_rows(SCORES, KeepRule(rows=5, order="lowest")).tolist() == [1, 4, 6, 7, 9]


def test_equal_scores_are_drawn_alike_for_all_counts_and_over_the_whole_corpus():
    zeros = np.zeros(10_000)
    few, more = (kept_rows(zeros, KeepRule(rows=n)) for n in (1000, 2000))
    assert set(few) < set(more)
    assert abs(few.mean() - 5000) < 4 * 10_000 / np.sqrt(12 * 1000)  # four standard errors of a uniform draw
    together = np.concatenate([kept_rows(zeros, KeepRule(rows=3000, order=o)) for o in ("highest", "middle", "lowest")])
    assert len(np.unique(together)) == 9000


def test_random_rows_do_not_follow_the_scores():
    scores = np.arange(10_000.0)
    kept = kept_rows(scores, KeepRule(rows=5000, order="random"))
    assert len(kept) == len(np.unique(kept)) == 5000
    assert abs(scores[kept].mean() - 5000) < 4 * 10_000 / np.sqrt(12 * 5000)
    tail = kept_rows(scores, KeepRule(rows=9000, order="random", drop_top=0.1))
    assert tail.tolist() == list(range(9000))


def test_each_seed_draws_its_random_rows_apart_from_those_of_equal_score(scores):
    """It was one half for all seeds, and nearly that of a rule whose scores are mostly equal: a control of itself."""
    zeros, random = np.zeros(10_000), KeepRule(rows=5000, order="random")
    draws = [kept_rows(zeros, random, seed) for seed in (0, 1, 2**32 - 1)]
    draws.append(kept_rows(zeros, KeepRule(rows=5000), seed=1))
    assert np.array_equal(draws[-1], kept_rows(zeros, KeepRule(rows=5000)))  # as in runs of earlier versions
    for one, other in combinations(draws, 2):  # hypergeometric: mean 2500, standard deviation 25
        assert abs(len(np.intersect1d(one, other)) - 2500) < 5 * 25
    orders = [plan(scores, KeepRule(rows=5, order="random"), seed, 6).order for seed in (0, 1)]
    assert not np.array_equal(*(order.kept.mask_R for order in orders))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 1.5}, "--data.keep.fraction 1.5 must be above 0 and at most 1"),
        ({"fraction": 0.0}, "--data.keep.fraction 0.0 must"),
        ({"fraction": -0.1}, "--data.keep.fraction -0.1 must"),
        ({"rows": 0}, "--data.keep.rows 0 must be 1 or more"),
        ({"k": 0}, "--data.keep.k 0 must be in 1..65534"),
        ({"k": 65535}, "--data.keep.k 65535"),
        ({"masked": "x"}, "--data.keep.masked 'x' must be zero or drop"),
        ({"order": "best"}, "--data.keep.order 'best' must be highest or lowest or middle or random"),
        ({"drop_top": 1.0}, "--data.keep.drop_top 1.0"),
        ({"max_repeats": 0}, "--data.keep.max_repeats 0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        KeepRule(**settings)


def test_all_wrong_settings_at_once():
    with pytest.raises(ConfigError, match="fraction 2.*; --data.keep.k 0"):
        KeepRule(fraction=2, k=0)


def test_more_rows_than_there_are():
    with pytest.raises(ConfigError, match=r"--data.keep.rows 11 asks for 11 rows, but there are 10; keep fewer"):
        kept_rows(SCORES, KeepRule(rows=11))
    with pytest.raises(ConfigError, match=r"fraction 0.95 asks for 10 rows.* minus the 1 of --data.keep.drop_top 0.1"):
        kept_rows(SCORES, KeepRule(fraction=0.95, drop_top=0.1))


# --- the order of a run ---


@example(600_000, 0.1, 0)  # read in three chunks
@given(st.integers(1, 3000), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_a_set_of_rows_is_the_list_of_them(num_rows, share, seed):
    mask_R = np.random.default_rng(seed).random(num_rows) < share
    rows, others, found = np.flatnonzero(mask_R), np.flatnonzero(~mask_R), RowSet(mask_R)
    assert len(found) == len(rows)
    assert found.nth(np.arange(len(rows))).tolist() == rows.tolist()
    assert found.nth_other(np.arange(len(others))).tolist() == others.tolist()
    assert np.flatnonzero(found.mask_R).tolist() == np.concatenate([*found.chunks()]).tolist() == rows.tolist()
    start, end = sorted(np.random.default_rng(seed).integers(0, num_rows + 1, 2).tolist())
    part = RowSet(found.mask_R[start:end])
    assert part.nth(np.arange(len(part))).tolist() == [row - start for row in rows.tolist() if start <= row < end]


def test_a_row_past_2_to_the_31_is_found():
    """In blocks of 128 rows that are all in the set: they share one block's memory."""
    blocks = (9 << 28) // 128
    bits, before = np.broadcast_to(np.full(16, 0xFF, np.uint8), (blocks, 16)), np.arange(blocks + 1) * 128
    rows = np.array([(1 << 31) + 5, (9 << 28) - 1])
    assert _find(bits, before, rows).tolist() == rows.tolist()


def test_without_a_selection_nothing_changes():
    positions = np.arange(500)
    assert np.array_equal(Order(7, 100)(positions), row_at(positions, 7, 100))


ROWS = np.sort(np.random.default_rng(0).choice(1000, 400, replace=False))
KEPT = RowSet(np.isin(np.arange(1000), ROWS))


def test_phase_1_reads_the_kept_rows_once_each_before_any_twice():
    order = Order(3, 1000, KEPT, phase1=900)
    rows = order(np.arange(900))
    assert sorted(rows[:400]) == sorted(rows[400:800]) == ROWS.tolist()
    assert rows[:400].tolist() != rows[400:800].tolist()
    assert set(rows[800:]) < set(ROWS)


@pytest.mark.parametrize("phase1", [0, 1, 250, 399, 400, 900])
def test_phase_2_begins_with_all_that_phase_1_has_not_read(phase1):
    order = Order(3, 1000, KEPT, phase1)
    first = set(order(np.arange(phase1)).tolist())
    unread = 1000 - len(first)
    assert len(first) == min(phase1, 400)
    fresh = order(phase1 + np.arange(unread))
    assert sorted(fresh) == sorted(set(range(1000)) - first)
    assert fresh.tolist() != sorted(fresh)
    again = order(phase1 + unread + np.arange(2000))
    assert sorted(again[:1000]) == sorted(again[1000:]) == list(range(1000))


def test_phase_2_may_go_on_as_a_run_without_selection():
    order = Order(3, 1000, KEPT, 250, unread_first=False)
    assert np.array_equal(order(250 + np.arange(3000)), row_at(250 + np.arange(3000), 3, 1000))


@given(st.integers(0, 3000), st.integers(1, 300), st.sampled_from([True, False]))
def test_the_order_has_no_memory(start, count, unread_first):
    whole = Order(5, 1000, KEPT, 777, unread_first)(np.arange(4000))
    piece = Order(5, 1000, KEPT, 777, unread_first)(start + np.arange(count))
    assert np.array_equal(piece, whole[start : start + count])


def test_all_rows_kept_and_read():
    everything = RowSet(np.ones(50, bool))
    rows = Order(1, 50, everything, 75)(np.arange(175))
    assert sorted(rows[:50]) == sorted(rows[75:125]) == sorted(rows[125:]) == list(range(50))


@pytest.mark.parametrize(
    ("phase1", "rows", "fingerprint"),
    [
        (250, [908, 452, 300, 294, 806, 432, 829], "2d1fc6df94f4143ad74c"),
        (900, [908, 452, 300, 634, 756, 919, 131], "bb952cfb8827603c65a2"),
    ],
)
def test_an_order_stays_what_it_was_in_checkpoints(phase1, rows, fingerprint):
    """A release that changed this would break every resume."""
    order = Order(3, 1000, KEPT, phase1)
    assert order(np.array([0, 1, 249, phase1, phase1 + 1, phase1 + 599, phase1 + 1999])).tolist() == rows
    assert order.fingerprint == fingerprint


def test_a_fingerprint_of_what_decides_the_order():
    orders = [
        Order(1, 1000),
        Order(1, 1000, KEPT, 10),
        Order(1, 1000, KEPT, 20),
        Order(1, 1000, RowSet(np.isin(np.arange(1000), ROWS[1:])), 10),
    ]
    prints = [order.fingerprint for order in [*orders, Order(1, 1000, KEPT, 10, False)]]
    assert prints[0] == "none"
    assert len(set(prints)) == 5
    assert Order(2, 1000, KEPT, 10).fingerprint == prints[1]  # the seed is compared separately


# --- from a folder of scores ---

SCORED = Scored("rows", "tokens", num_rows=10, block_size=4, isolate_documents=True, teacher="t", precision="p")


@pytest.fixture
def scores(tmp_path, monkeypatch):
    monkeypatch.setattr("salt_lightning.teacher.scores._SHARD_TOKENS", 16)  # 4 rows per shard: 4 + 4 + 2
    scores = Scores.create(tmp_path / "run", SCORED, {"scoring_flops": 1.0})
    rng = np.random.default_rng(1)
    for shard in scores.missing():
        size = (len(scores.rows(shard)), 4)
        scores.write(shard, rng.random(size, np.float32) * 9, rng.integers(-1, 20, size))
    scores.setting = "--data.selection"
    return scores


def test_row_scores_of_all_shards_are_kept_beside_them(scores):
    expected = [
        by_definition(nll, rank, 10, "zero")
        for shard in range(3)
        for nll, rank in zip(*scores.read(shard), strict=True)
    ]
    found = row_scores(scores, 10, "zero")
    assert found.tolist() == pytest.approx(expected, rel=1e-7)  # one float32 rounding in the mean of two
    path = scores.run / "scores" / "S-k10-zero.parquet"
    about = pq.read_schema(path).metadata
    # of earlier shards; cut off by a damaged footer; without a word on what it is
    other = {b"scored": b"x", b"digest": _digest(found + 1)}
    for values, said in ((found + 1, other), (found + 1, about), (found[:-1], about), (found + 1, None)):
        write_table(path, pa.table({"S": values}).replace_schema_metadata(said))
        assert row_scores(scores, 10, "zero").tolist() == found.tolist()
    scores.path(1).unlink()
    assert row_scores(scores, 10, "zero").tolist() == found.tolist()  # from the file
    with pytest.raises(ConfigError, match="lacks 1 of 3 shards of scores; run the same"):
        row_scores(scores, 5, "zero")
    (scores.run / "scores" / "S-k10-zero.parquet").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="shards of scores; run the same"):
        row_scores(scores, 10, "zero")


def test_a_start_takes_a_few_bytes_a_row_and_keeps_a_fraction_of_one(tmp_path, monkeypatch):
    """Per rank, with eight on a node and 10^9 rows. A worker process that is not forked gets a copy."""
    monkeypatch.setattr("salt_lightning.batches.order._AT_ONCE", 1 << 12)
    num_rows = 1 << 20
    scores = Scores.create(tmp_path, Scored("rows", "tokens", num_rows, 1, True), {})
    for shard in scores.missing():
        nll_RT = np.random.default_rng(shard).random((len(scores.rows(shard)), 1), np.float32)
        scores.write(shard, nll_RT, np.zeros_like(nll_RT))
    row_scores(scores, 10, "zero")  # the node's first process has done it
    tracemalloc.start()
    order = plan(scores, KeepRule(), 0, num_rows // 4).order
    assert len(order.fingerprint) == 20
    order(num_rows // 4 + np.arange(64))
    held, peak = (size / num_rows for size in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    assert peak < 20  # bytes: S and a copy to find its level, or the kept rows and the others; masks
    assert held < 0.5  # two sets of a bit and a half per row, and for one how many others come before
    assert len(pickle.dumps(order)) / num_rows < 0.5


def test_the_plan_says_what_it_does(scores):
    order, _, message, _ = plan(scores, KeepRule(rows=4), 0, 6)
    assert order.phase1 == 6
    assert len(order.kept) == 4
    assert "4 of 10 rows (highest, k 10, masked zero; S " in message
    assert "phase 1 reads 6, each kept row 1.50 times; phase 2 begins with the 6 unread rows" in message
    message = plan(scores, KeepRule(rows=4, unread_first=False), 0, 6).said
    assert "phase 2 reads all rows, those read before too (--data.keep.unread_first false)" in message
    order, by_chance, message, _ = plan(scores, KeepRule(rows=9, k=1), 0, 6)
    assert by_chance == chance(row_scores(scores, 1, "zero"), order.kept.mask_R) > 0
    assert f"; {by_chance:.1%} of them have the same score as rows left out: chance decides)" in message
    _, by_chance, message, _ = plan(scores, KeepRule(rows=9, k=1, order="random"), 0, 6)
    assert by_chance == 0
    assert "chance" not in message


def test_reading_the_kept_rows_too_often_is_refused(scores):
    with pytest.raises(
        ConfigError,
        match="reads 40 rows, but 4 are kept, so each is read 10.0 times; keep more.*--data.keep.max_repeats 10$",
    ):
        check_repeats(plan(scores, KeepRule(rows=4), 0, 40).order, KeepRule(rows=4))
    order, allowed = plan(scores, KeepRule(rows=4), 0, 40).order, KeepRule(rows=4, max_repeats=10.0)
    check_repeats(order, allowed)
    assert order.phase1 == 40


def test_a_selection_of_sources_with_weights(scores):
    """Of `web` one row of the four is kept, of `code` three: it has to serve three quarters of phase 1."""
    kept = kept_rows(row_scores(scores, 10, "zero"), KeepRule(rows=4)).tolist()
    shares = Shares(("web", "code"), (3.0, 1.0), (0, kept[0] + 1, 10))
    with pytest.raises(
        ConfigError, match="reads 6 rows of 'web', but 1 are kept, so each is read 6.0 times; .*repeats 6$"
    ):
        check_repeats(plan(scores, KeepRule(rows=4), 0, 8, shares).order, KeepRule(rows=4))
    order, _, message, _ = plan(scores, KeepRule(rows=4, max_repeats=6.0), 0, 8, shares)
    rows = order(np.arange(8)).tolist()
    assert rows.count(kept[0]) == 6
    assert len({*rows} - {kept[0]}) == 2
    assert {*rows} <= {*kept}
    assert f"; web: 1 of {kept[0] + 1} rows, phase 1 reads 6, each kept row 6.00 times; phase 2 begins with" in message
    assert f"; code: 3 of {9 - kept[0]} rows, phase 1 reads 2, each kept row 0.67 times; phase 2 begins" in message
    apart = Shares(("web", "code"), (1.0, 1.0), (0, kept[0], 10))
    with pytest.raises(ConfigError, match="none of the kept rows is of 'web', but --data.source_weights asks for 4 of"):
        check_repeats(plan(scores, KeepRule(rows=4), 0, 8, apart).order, KeepRule(rows=4))


@pytest.mark.parametrize("shares", [None, Shares(("web", "code"), (1.0, 1.0), (0, 5, 10))])
def test_the_rule_says_how_phase_2_goes_on(scores, shares):
    first, later = (
        plan(scores, KeepRule(rows=8, unread_first=first), 0, 4, shares).order(np.arange(4, 40)).tolist()
        for first in (True, False)
    )
    assert first != later
    assert later == make_order(shares, Order(0, 10))(np.arange(4, 40)).tolist()


def test_chance_is_the_share_of_kept_rows_that_tie_with_rows_left_out():
    score_R = np.array([0.0, 0.0, 1.0, 1.0, 2.0])
    assert chance(score_R, np.isin(np.arange(5), [4, 2])) == 0.5  # row 3 scores like row 2
    assert chance(score_R, np.isin(np.arange(5), [2, 3, 4])) == 0
    assert chance(np.zeros(6), np.isin(np.arange(6), [1, 5])) == 1


def test_the_report_shows_no_overlap_where_chance_has_chosen():
    """The same random draw for every k would make it 100%."""
    clear, zeros = np.arange(6.0), np.zeros(6)
    kept = {5: clear >= 3, 10: clear >= 3, 20: clear < 3}
    of_k = {5: clear, 10: clear, 20: zeros}
    rows = [line.split("|")[2:-1] for line in _overlap(kept, of_k, KeepRule()).splitlines() if line.startswith("| k =")]
    assert [[cell.strip() for cell in row] for row in rows] == [["100.0%", "100.0%", "-"]] * 2 + [["-"] * 3]


def test_runs_can_be_sorted_by_how_their_rows_were_chosen():
    told = alike.told({}, SimpleNamespace(selection=Path("runs/score"), keep=KeepRule(k=7)))
    assert (told["data.selection"], told["data.keep.k"], told["data.keep.order"]) == ("runs/score", 7, "highest")
    assert list(alike.told({}, SimpleNamespace(selection=None, keep=KeepRule()))) == ["data.source"]
