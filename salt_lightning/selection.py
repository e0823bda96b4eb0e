"""SALT_DS: which rows phase 1 reads, from the scores of an early teacher (arXiv 2410.18779, section 4).

    S(x) = median_i  1{rank_i < k} * nll_i          challenging (large) yet learnable (not zero), k = 10

A row x has block_size tokens; only positions with a label count. If more than half of them are outside the top k,
S is 0. Pure functions of arrays, except those that read scores: `row_scores`, which also saves S, and what uses it.
Shapes: R rows, T tokens a row.
"""

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.utilities import rank_zero_info

from salt_lightning.batches.mixture import Mixture, Shares, make_order
from salt_lightning.batches.order import Order, scatter
from salt_lightning.batches.row_set import RowSet
from salt_lightning.errors import ConfigError, program, refuse, wrong_kinds
from salt_lightning.teacher.scores import NO_LABEL as NO_LABEL
from salt_lightning.teacher.scores import RANK_CAP, Scores, write_table
from salt_lightning.text.processes import num_cores

Masked = Literal["zero", "drop"]
Which = Literal["highest", "lowest", "middle", "random"]


@dataclass(frozen=True)
class KeepRule:
    """Which of the scored rows phase 1 reads.

    Args:
        fraction: Share of the rows to keep, above 0 and at most 1.
        rows: Number of rows to keep, instead of a share.
        order: highest (SALT_DS), or a control: lowest, middle, random (other rows for another seed).
        k: A token is in the teacher's top k if fewer than k tokens are more likely.
        masked: Tokens outside the top k: zero counts their loss as 0, drop leaves them out.
        drop_top: Share of the rows, those with the highest scores, that is never kept: mostly noise.
        unread_first: Phase 2 begins with all rows that phase 1 has not read. false: it reads rows in the order of a
            run without selection.
        max_repeats: How many times phase 1 may read a kept row, on average.

    Raises:
        ConfigError: listing every setting that is out of range.
    """

    fraction: float = 0.5
    rows: int | None = None
    order: Which = "highest"
    k: int = 10
    masked: Masked = "zero"
    drop_top: float = 0.0
    unread_first: bool = True
    max_repeats: float = 4.0

    def __post_init__(self) -> None:
        refuse(wrong_kinds(KeepRule, vars(self), "--data.keep."))
        checks = (
            ("fraction", 0.0 < self.fraction <= 1.0, "must be above 0 and at most 1"),
            ("rows", self.rows is None or self.rows >= 1, "must be 1 or more, or null"),
            ("k", 1 <= self.k <= RANK_CAP, f"must be in 1..{RANK_CAP}"),
            ("drop_top", 0.0 <= self.drop_top < 1.0, "must be at least 0 and below 1"),
            ("max_repeats", self.max_repeats > 0, "must be above 0"),
        )  # fmt: skip
        refuse(f"--data.keep.{name} {getattr(self, name)} {wanted}" for name, good, wanted in checks if not good)

    def score(self, nll_RT: np.ndarray, rank_RT: np.ndarray) -> np.ndarray:
        """S of some rows, for a subclass to replace; arguments and result are those of `score_rows`."""
        return score_rows(nll_RT, rank_RT, self.k, self.masked)

    def score_all(self, scores: Scores) -> np.ndarray:
        """S of all rows, float64, in their order; computed at every start if `score` is a subclass's own."""
        if not self.is_own:
            return row_scores(scores, self.k, self.masked)
        return _of_shards(scores, self.score, type(self).__name__)

    @property
    def is_own(self) -> bool:
        """Whether a subclass scores rows."""
        return (type(self).score, type(self).score_all) != (KeepRule.score, KeepRule.score_all)

    @property
    def name(self) -> str:
        """The rule in words, for logs."""
        how = f", S of {type(self).__name__}" if self.is_own else f", k {self.k}, masked {self.masked}"
        rule = "" if self.order == "random" else how
        tail = f", without the top {self.drop_top:.3%}" if self.drop_top else ""
        return f"{self.order}{rule}{tail}"


def score_rows(nll_RT: np.ndarray, rank_RT: np.ndarray, k: int, masked: Masked) -> np.ndarray:
    """S(x) of each row, float64; the median of an even count is the mean of the two middle values.

    Args:
        nll_RT: -log p(label), nats.
        rank_RT: number of logits strictly above the label's; NO_LABEL: no label there.
        k: the top k have ranks below k.
        masked: "zero": tokens outside the top k count as 0; "drop": they are left out. No token left: 0.
    """
    within_RT = rank_RT < k
    counted_RT = within_RT if masked == "drop" else rank_RT != NO_LABEL
    counts_R, values_RT = counted_RT.sum(1), np.where(counted_RT, np.where(within_RT, nll_RT, 0), np.inf)
    values_RT = np.sort(values_RT.astype(np.float32, copy=False), axis=1)
    middle_R2 = np.maximum(np.stack([counts_R - 1, counts_R], axis=1) // 2, 0)
    medians_R = np.take_along_axis(values_RT, middle_R2, axis=1).mean(axis=1, dtype=np.float64)
    return np.where(counts_R > 0, medians_R, 0.0)


# what to do if chance decides between more of the kept rows than this share
MUCH_CHANCE = 0.5
LESS_CHANCE = "a later teacher, a larger --data.keep.k, --data.keep.masked drop, or fewer rows kept"


class Plan(NamedTuple):
    order: Order | Mixture
    chance: float  # share of the kept rows that a lot chose instead of the scores; 0 for a random subset
    said: str
    remedy: str  # what to do if chance decides much; empty if not

    def say(self) -> None:
        """Logs it; as a warning, with the remedy, if chance decides much."""
        rank_zero_info(f"warning: {self.said}; use {self.remedy}" if self.remedy else self.said)


def chance(score_R: np.ndarray, kept_R: np.ndarray) -> float:
    """Share of the kept rows (a mask) whose score is also that of a row left out: chance decided between them."""
    inside, outside = score_R[kept_R], score_R[~kept_R]
    shared = np.unique(outside[(outside >= inside.min()) & (outside <= inside.max())])  # few: a rule cuts twice at most
    return float(np.isin(inside, shared).mean())


def kept_rows(scores_R: np.ndarray, rule: KeepRule, seed: int = 0) -> np.ndarray:
    """Sorted numbers of the rows that a rule keeps, 8 bytes each; see `kept_mask`."""
    return np.flatnonzero(kept_mask(scores_R, rule, seed))


def kept_mask(scores_R: np.ndarray, rule: KeepRule, seed: int = 0) -> np.ndarray:
    """Which rows a rule keeps. Rows of equal score are taken in a fixed random order; those of the order random are
    drawn by the seed, apart from that, so that seeds of this control differ in their rows, too.

    Raises:
        ConfigError: the rule asks for more rows than there are.
    """
    num_rows = len(scores_R)
    dropped = round(rule.drop_top * num_rows)
    wanted = rule.rows or max(1, round(rule.fraction * num_rows))
    if wanted > num_rows - dropped:
        setting = f"rows {rule.rows}" if rule.rows else f"fraction {rule.fraction}"
        tail = f" minus the {dropped} of --data.keep.drop_top {rule.drop_top}" if dropped else ""
        raise ConfigError(f"--data.keep.{setting} asks for {wanted} rows, but there are {num_rows}{tail}; keep fewer")
    if rule.order == "random":
        return _of_lowest_lots(~_first(scores_R, dropped), wanted, int(scatter(np.array([seed + 1]))[0]))
    # From the highest score down, rows [begin, begin + wanted) are kept.
    begin = {"highest": dropped, "middle": dropped + (num_rows - dropped - wanted) // 2, "lowest": num_rows - wanted}
    start = begin[rule.order]
    return _first(scores_R, start + wanted) & ~_first(scores_R, start)


def _first(scores_R: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` rows with the highest scores; of equal ones, those with the lowest lots. O(R), no sort."""
    if count == 0:
        return np.zeros(len(scores_R), bool)
    level = np.partition(scores_R, len(scores_R) - count)[len(scores_R) - count]
    mask_R = scores_R > level
    return mask_R | _of_lowest_lots(scores_R == level, count - int(mask_R.sum()))


def _of_lowest_lots(mask_R: np.ndarray, count: int, draw: int = 0) -> np.ndarray:
    """Mask of the `count` > 0 rows of a mask that have the lowest lots, in one of 2^64 draws."""
    lots = scatter(np.flatnonzero(mask_R).astype(np.uint64) + np.uint64(draw))
    taken_R = np.zeros(len(mask_R), bool)
    taken_R[mask_R] = lots <= np.partition(lots, count - 1)[count - 1]  # no two lots are equal
    return taken_R


def plan(scores: Scores, rule: KeepRule, seed: int, phase1_rows: int, shares: Shares | None = None) -> Plan:
    """The order of a run whose first `phase1_rows` rows are from those that `rule` keeps, and a line for the log.

    Raises:
        ConfigError: scores are incomplete or damaged, or there are too few rows.
    """
    score_R = _checked(rule.score_all(scores), scores.scored.num_rows, type(rule).__name__)
    kept_R = kept_mask(score_R, rule, seed)
    kept, inside = RowSet(kept_R), score_R[kept_R]
    drawn = 0.0 if rule.order == "random" else chance(score_R, kept_R)
    tie = f"; {drawn:.1%} of them have the same score as rows left out: chance decides" if drawn else ""
    which = f"{rule.name}; S {inside.min():.3f} to {inside.max():.3f}{tie}"
    del score_R, kept_R, inside
    pa.default_memory_pool().release_unused()  # else Arrow keeps 20 bytes per row in each process
    order = make_order(shares, Order(seed, kept.num_rows, kept, phase1_rows, rule.unread_first))
    told = [_told(*part) for part in _parts(order).items()]  # here, so that worker processes share its memory
    said = f"selection: {len(kept)} of {kept.num_rows} rows ({which}); {'; '.join(told)}"
    remedy = "a finer score, or fewer rows kept" if rule.is_own else LESS_CHANCE
    return Plan(order, drawn, said, remedy if drawn > MUCH_CHANCE else "")


def _parts(order: Order | Mixture) -> dict[str, Order]:
    """The orders by source, if sources have weights."""
    return {"": order} if isinstance(order, Order) else dict(zip(order.shares.names, order.orders, strict=True))


def check_repeats(order: Order | Mixture, rule: KeepRule) -> None:
    """Raises ConfigError if phase 1 would read kept rows too often, in any source if these have weights."""
    name, worst = max(_parts(order).items(), key=lambda part: part[1].repeats)
    assert worst.kept is not None
    of_source = f" of {name!r}" if name else ""
    if not len(worst.kept):
        raise ConfigError(
            f"--data.keep: none of the kept rows is{of_source}, but --data.source_weights asks for {worst.phase1} of "
            "those in phase 1; keep more (--data.keep.fraction), or leave --data.source_weights out"
        )
    if worst.repeats > rule.max_repeats:
        raise ConfigError(
            f"--data.keep: phase 1 reads {worst.phase1} rows{of_source}, but {len(worst.kept)} are kept, so each is "
            f"read {worst.repeats:.1f} times; keep more (--data.keep.fraction), shorten --kd.steps, or allow it with "
            f"--data.keep.max_repeats {math.ceil(worst.repeats)}"
        )


def _told(name: str, part: Order) -> str:
    assert part.kept is not None
    kept = f"{name}: {len(part.kept)} of {part.num_rows} rows, " if name else ""
    if name and not part.phase1:
        return f"{kept}phase 1 reads none of them by this weight"
    then = "reads all rows, those read before too (--data.keep.unread_first false)"
    if part.unread_first:
        then = f"begins with the {part.num_unread} unread rows"
    return f"{kept}phase 1 reads {part.phase1}, each kept row {part.repeats:.2f} times; phase 2 {then}"


def scores_of(selection: str | None, rule: KeepRule) -> Scores | None:
    """The scores in the folder `selection`; None without one. Raises ConfigError: they are missing, but rule is set."""
    if selection:
        return Scores(selection, "--data.selection")
    usual = vars(KeepRule())
    given = [f"--data.keep.{name} {value}" for name, value in vars(rule).items() if usual.get(name, rule) != value]
    refuse(f"{setting} needs --data.selection, the folder of a run of `{program()} predict`" for setting in given)
    return None


def row_scores(scores: Scores, k: int, masked: Masked) -> np.ndarray:
    """S of all rows, float64, from a file next to the shards; computed from the shards the first time.

    Raises:
        ConfigError: shards are missing or damaged.
    """
    path = scores.run / "scores" / f"S-k{k}-{masked}.parquet"
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        found, about = _checked(table["S"], scores.scored.num_rows, path.name), table.schema.metadata or {}
        # new shards leave an old file behind; parquet's own checksums do not cover the number of rows
        if (about.get(b"scored"), about.get(b"digest")) == (scores.identity, _digest(found)):
            return found
    except (OSError, pa.ArrowException, KeyError, ValueError):
        pass  # not there, or damaged
    found = _of_shards(scores, partial(score_rows, k=k, masked=masked), "score_rows")
    with suppress(OSError):  # a read-only folder: computed again next time
        about = {"scored": scores.identity, "digest": _digest(found)}
        write_table(path, pa.table({"S": found}).replace_schema_metadata(about))
    return found


def _checked(score_R: Any, num_rows: int, of: str) -> np.ndarray:
    """The scores as float64. Raises ConfigError unless a user's own code, `of`, gives a number for each row."""
    found_R = np.asarray(score_R, dtype=np.float64)
    if found_R.shape != (num_rows,) or np.isnan(found_R).any():
        of_what = "NaN among them" if found_R.shape == (num_rows,) else f"an array {list(found_R.shape)}"
        raise ConfigError(f"{of} must give one number, not NaN, for each of {num_rows} rows, but gives {of_what}")
    return found_R


def _of_shards(scores: Scores, score: Callable[[np.ndarray, np.ndarray], np.ndarray], of: str) -> np.ndarray:
    def of_shard(number: int) -> np.ndarray:
        nll_RT, rank_RT = scores.read(number)
        return _checked(score(nll_RT, rank_RT), len(nll_RT), of)

    if missing := scores.missing():
        raise ConfigError(
            f"{scores.setting}: {scores.run} lacks {len(missing)} of {scores.scored.num_shards} shards of scores; run "
            f"the same `{program()} predict` again, it continues where it stopped"
        )
    with ThreadPoolExecutor(min(8, num_cores())) as pool:
        return np.concatenate(list(pool.map(of_shard, range(scores.scored.num_shards))))


def _digest(score_R: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(score_R).data, digest_size=16).hexdigest().encode()
