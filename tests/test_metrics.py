"""TokenMetrics compared with plain Python, merged over shards, and reduced over two real processes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_lightning.metrics import TokenMetrics, sum_dtype

SOURCES = ("wiki", "code", "speech")

# nll, rank (-1: ignored), source, bytes
TOKENS = st.lists(
    st.tuples(st.floats(0, 50, width=32), st.integers(-1, 5), st.integers(0, len(SOURCES) - 1), st.integers(0, 12)),
    max_size=40,
)


def test_a_loss_that_is_not_finite_is_no_right_answer():
    """No logit is greater than NaN, so its rank is 0, which must not count as correct."""
    metrics = TokenMetrics()
    metrics.update(torch.tensor([math.nan, math.inf, 0.5]), torch.tensor([0, 0, 0]))
    assert metrics.compute()["accuracy"] == pytest.approx(1 / 3)


def update(metric, tokens):
    nll, rank, source, num_bytes = zip(*tokens, strict=True) if tokens else ((), (), (), ())
    metric.update(
        torch.tensor(nll, dtype=torch.float32),
        torch.tensor(rank, dtype=torch.int64),
        torch.tensor(source, dtype=torch.int64),
        torch.tensor(num_bytes, dtype=torch.int64),
    )


def reference(tokens):
    counted = [t for t in tokens if t[1] != -1]
    nats, num_bytes = math.fsum(t[0] for t in counted), sum(t[3] for t in counted)
    metrics = {}
    if counted:
        metrics["ce"] = nats / len(counted)
        metrics["perplexity"] = math.exp(nats / len(counted))
        metrics["accuracy"] = sum(t[1] == 0 for t in counted) / len(counted)
        metrics["tokens"] = len(counted)
    if num_bytes:
        metrics["bits_per_byte"] = nats / math.log(2) / num_bytes
    for index, name in enumerate(SOURCES):
        own = [t[0] for t in counted if t[2] == index]
        if own:
            metrics[f"ce/{name}"] = math.fsum(own) / len(own)
    return metrics


def values(metric):
    return {name: float(value) for name, value in metric.compute().items()}


@settings(deadline=None, max_examples=100)
@given(tokens=TOKENS, cut=st.integers(0, 40))
def test_equals_plain_python_and_two_shards_merge(tokens, cut):
    metric = TokenMetrics(SOURCES)
    update(metric, tokens[:cut])
    update(metric, tokens[cut:])
    # float64 sums of 40 float32 numbers; accuracy is a float32 division
    assert values(metric) == pytest.approx(reference(tokens), rel=1e-6, abs=1e-12)

    first, second = TokenMetrics(SOURCES), TokenMetrics(SOURCES)
    update(first, tokens[:cut])
    update(second, tokens[cut:])
    first.merge_state(second)
    assert values(first) == values(metric)


def test_by_hand_with_eos_and_an_ignored_position():
    metric = TokenMetrics()
    # "ab" (2 bytes, ln 2 nats), EOS (0 bytes, 3 ln 2 nats), an ignored position with garbage values
    update(metric, [(math.log(2), 0, 0, 2), (3 * math.log(2), 4, 0, 0), (math.nan, -1, 0, 99)])
    assert values(metric) == pytest.approx(
        {"ce": 2 * math.log(2), "perplexity": 4.0, "accuracy": 0.5, "tokens": 2, "bits_per_byte": 2.0}
    )


def test_thirds_stand_beside_figures_that_stay_what_they_are():
    metric = TokenMetrics(thirds=True)
    nll_N, third_N = torch.tensor([1.0, 3.0, 8.0, math.nan]), torch.tensor([0, 2, 2, 1])
    metric.update(nll_N, torch.tensor([0, 4, 1, -1]), torch.zeros_like(third_N), torch.tensor([2, 0, 4, 9]), third_N)
    assert values(metric) == pytest.approx(
        {"ce": 4.0, "perplexity": math.exp(4), "accuracy": 1 / 3, "tokens": 3, "bits_per_byte": 12 / math.log(2) / 6,
         "ce/easy": 1.0, "ce/hard": 5.5}
    )  # fmt: skip


def test_a_document_of_no_third_counts_for_its_source_alone():
    metric = TokenMetrics(SOURCES, thirds=True)
    third_N, source_N = torch.tensor([0, -1]), torch.tensor([1, 0])
    metric.update(torch.tensor([1.0, 3.0]), torch.tensor([0, 0]), source_N, torch.tensor([2, 2]), third_N)
    found = values(metric)
    assert (found["ce"], found["accuracy"], found["bits_per_byte"]) == pytest.approx((2.0, 1.0, 4 / math.log(2) / 4))
    assert {name: found[name] for name in found if name.startswith("ce/")} == {
        f"ce/{SOURCES[0]}": 3.0, f"ce/{SOURCES[1]}": 1.0, "ce/easy": 1.0}  # fmt: skip


def test_sources_appear_only_where_there_are_several_and_have_tokens():
    metric = TokenMetrics(("only",))
    update(metric, [(1.0, 0, 0, 1)])
    assert set(values(metric)) == {"ce", "perplexity", "accuracy", "tokens", "bits_per_byte"}
    metric = TokenMetrics(("full", "empty"))
    update(metric, [(1.0, 0, 0, 1), (9.0, -1, 1, 1)])
    assert set(values(metric)) == {"ce", "perplexity", "accuracy", "tokens", "bits_per_byte", "ce/full"}
    assert TokenMetrics(["easy", "wiki"]).parts == ["easy", "wiki"]  # without thirds, any names


def test_an_ignored_position_needs_no_valid_source():
    metric = TokenMetrics(SOURCES)
    update(metric, [(1.0, 0, 2, 1), (0.0, -1, -100, 0)])
    assert values(metric)["ce/speech"] == 1.0


def test_non_finite_loss_shows():
    metric = TokenMetrics()
    update(metric, [(math.nan, 0, 0, 1), (1.0, 0, 0, 1)])
    assert math.isnan(values(metric)["ce"])


def test_a_million_tokens_lose_nothing():
    metric = TokenMetrics()
    nll_N = torch.full((100_000,), 0.1)
    ones_N = torch.ones_like(nll_N, dtype=torch.int64)
    for _ in range(10):
        metric.update(nll_N, ones_N, ones_N - 1, ones_N)
    # float32 sums would be off in the 5th digit
    assert values(metric)["ce"] == pytest.approx(float(nll_N[0]), rel=1e-9)


def test_float32_sums_lose_no_token():
    """As on MPS. Above 2^24 nats float32 has only even integers, so tokens of 1 nat would vanish."""
    metric = TokenMetrics()
    metric._defaults["nll_sum_S"], metric.nll_sum_S = (torch.zeros(1, dtype=torch.float32) for _ in range(2))
    nll_N, rank_N = torch.ones(2**20), torch.ones(2**20, dtype=torch.int64)
    for _ in range(20):
        metric.update(nll_N, rank_N)
    assert values(metric)["ce"] == 1.0


def test_reset_and_moves_keep_the_states_dtypes():
    metric = TokenMetrics(SOURCES).to("cpu").half()
    update(metric, [(1.0, 0, 0, 1)])
    metric.reset()
    assert metric.nll_sum_S.dtype is torch.float64
    assert metric.tokens_S.dtype is torch.int64
    assert metric.nll_sum_S.tolist() == [0.0] * 3
    assert sum_dtype(torch.device("cuda")) is torch.float64
    assert sum_dtype(torch.device("mps")) is torch.float32


def test_update_never_reads_on_the_host():
    # reading a meta tensor's value raises
    metric = TokenMetrics(SOURCES).to("meta")
    metric.update(*(torch.zeros(4, dtype=d, device="meta") for d in (torch.bfloat16, *[torch.int64] * 3)))
    with pytest.raises(RuntimeError):
        metric.nll_sum_S.sum().item()


def test_labels_of_one_source_with_known_bytes():
    metrics = TokenMetrics()
    metrics.update(torch.tensor([1.0, 3.0]), torch.tensor([0, 2]), bytes_N=torch.tensor([3, 5]))
    assert metrics.compute()["bits_per_byte"].item() == pytest.approx(4 / math.log(2) / 8)


def test_labels_of_one_source_with_unknown_bytes():
    metrics = TokenMetrics()
    metrics.update(torch.tensor([1.0, 3.0]), torch.tensor([0, 2]))
    values = metrics.compute()
    assert values["ce"] == 2
    assert values["accuracy"] == 0.5
    assert "bits_per_byte" not in values
