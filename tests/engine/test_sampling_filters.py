"""The filters: each against a plain Python account of its formula, and the laws that all of them obey."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qinfer.engine import filters
from qinfer.kernels.token_weights import keep_top_k, keep_top_p

Keep = Callable[[Tensor, Tensor], Tensor]

counts = st.lists(st.integers(1, 60), min_size=1, max_size=12).map(lambda row: sorted(row, reverse=True))
shares = st.sampled_from([0.05, 0.3, 0.5, 0.77, 0.9])


def column(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def kept(keep: Keep, row: list[int], value: float) -> list[int]:
    """Positions that a filter keeps in a row, which is followed by tokens that have no weight."""
    weights = torch.tensor([[*row, 0, 0, 0]])
    result = keep(weights, column(value))
    positions = result[0].nonzero().flatten().tolist()
    assert positions, "at least one token is kept"
    assert all(result[0, i] == weights[0, i] for i in positions), "what is kept keeps its weight"
    return positions


# Filter, value that keeps all, values in between from the loosest to the strictest.
FILTERS: dict[str, tuple[Keep, float, tuple[float, ...]]] = {
    "top_k": (keep_top_k, 0, (9, 5, 2, 1)),
    "top_p": (keep_top_p, 1, (0.9, 0.5, 0.1)),
    "top_a": (filters.keep_top_a, 0, (0.1, 0.5, 1.0)),
    "min_p": (filters.keep_min_p, 0, (0.05, 0.4, 1.0)),
    "tfs": (filters.keep_tail_free, 1, (0.95, 0.5, 0.05)),
    "typical": (filters.keep_typical, 1, (0.95, 0.5, 0.05)),
    "surprise": (filters.keep_surprise, math.inf, (6.0, 2.5, 0.0)),
}


@pytest.mark.parametrize("name", FILTERS)
@given(row=counts)
def test_laws_of_filters(name: str, row: list[int]) -> None:
    """The neutral value keeps all, a stricter value keeps a subset, and scaling all weights changes nothing."""
    keep, off, values = FILTERS[name]
    previous = kept(keep, row, off)
    assert previous == list(range(len(row)))
    for value in values:
        now = kept(keep, row, value)
        assert set(now) <= set(previous)
        assert now == kept(keep, [64 * weight for weight in row], value)
        previous = now


@given(row=counts, top_a=shares)
def test_top_a(row: list[int], top_a: float) -> None:
    total, largest = sum(row), max(row)
    least = top_a * largest * largest / total
    # Half a count away from a border, so that rounding cannot decide.
    if all(abs(weight - least) > 1e-9 for weight in row):
        assert kept(filters.keep_top_a, row, top_a) == [i for i, weight in enumerate(row) if weight >= least]


@given(row=counts, tfs=shares)
def test_tail_free(row: list[int], tfs: float) -> None:
    curvature = [abs(a - 2 * b + c) for a, b, c in zip(row, row[1:], row[2:], strict=False)]
    expected, seen = 1, 0
    for value in curvature:
        seen += value
        expected += seen <= tfs * sum(curvature)
    everything = len(row) < 3 or sum(curvature) == 0
    assert kept(filters.keep_tail_free, row, tfs) == list(range(len(row) if everything else expected))


@given(row=counts, typical=shares)
def test_typical(row: list[int], typical: float) -> None:
    p = [weight / sum(row) for weight in row]
    entropy = -sum(x * math.log2(x) for x in p)
    order = sorted(range(len(p)), key=lambda i: (round(abs(-math.log2(p[i]) - entropy), 9), i))
    expected, reached = [], 0
    for i in order:
        if reached >= typical * sum(row):
            break
        expected.append(i)
        reached += row[i]
    # Where two tokens are equally typical up to rounding, either may come first.
    result = kept(filters.keep_typical, row, typical)
    assert sorted(row[i] for i in result) == sorted(row[i] for i in expected) or len(set(row)) < len(row)


@given(row=counts, most=st.floats(0, 7))
def test_surprise_and_entropy(row: list[int], most: float) -> None:
    p = [weight / sum(row) for weight in row]
    surprise, entropy = filters.surprises(torch.tensor([[*row, 0]]))
    assert entropy.item() == pytest.approx(-sum(x * math.log2(x) for x in p), abs=1e-9)
    assert surprise[0].tolist() == pytest.approx([*(-math.log2(x) for x in p), math.inf])
    bound = max(most, -math.log2(p[0]))
    assert kept(filters.keep_surprise, row, most) == [i for i, x in enumerate(p) if -math.log2(x) <= bound + 1e-12]


@given(row=counts, low=st.floats(0, 2), span=st.floats(0, 3), exponent=st.sampled_from([0.5, 1.0, 2.0]))
def test_entropy_temperature(row: list[int], low: float, span: float, exponent: float) -> None:
    weights = torch.tensor([[*row, 0]])
    numbers = [column(value) for value in (low, low + span, exponent)]
    temperature = filters.entropy_temperature(weights, *numbers).item()
    p = [weight / sum(row) for weight in row]
    share = 0.0 if len(row) == 1 else -sum(x * math.log(x) for x in p) / math.log(len(row))
    assert temperature == pytest.approx(low + span * max(share, 0.0) ** exponent, abs=1e-6)


@given(row=counts, probability=st.sampled_from([0.0, 0.3, 1.0]), threshold=st.sampled_from([0.02, 0.1, 0.3, 1.0]),
       protected=st.sets(st.integers(0, 11), max_size=3))  # fmt: skip
def test_exclude_top_choices(row: list[int], probability: float, threshold: float, protected: set[int]) -> None:
    """The weights are the expectation over the coin: excluded and renormalized, or left alone."""
    scale = 1 << 36
    p = [weight / sum(row) for weight in row]
    likely = [i for i in range(len(row)) if row[i] >= threshold * sum(row) and i not in protected]
    excluded = set(likely[:-1])
    left = 1 - sum(p[i] for i in excluded)
    expected = [(1 - probability) * x + (0 if i in excluded else probability * x / left) for i, x in enumerate(p)]
    mask = torch.tensor([[i in protected for i in range(len(row) + 1)]])
    weights = torch.tensor([[*(weight * scale for weight in row), 0]])
    result = filters.exclude_top_choices(weights, column(probability), column(threshold), mask)
    assert result[0, -1] == 0
    assert (result[0, :-1].double() / (sum(row) * scale)).tolist() == pytest.approx(expected, abs=1e-9)
    if not protected:
        without = filters.exclude_top_choices(weights, column(probability), column(threshold), None)
        assert torch.equal(without, result)


@pytest.mark.parametrize("name", FILTERS)
def test_rows_do_not_touch_each_other(name: str) -> None:
    keep, off, values = FILTERS[name]
    weights = torch.randint(0, 1 << 40, (5, 40)).sort(-1, descending=True).values
    weights[2, 7:] = 0
    numbers = torch.tensor([[value] for value in (*values, off, values[0])[:5]] * 2, dtype=torch.float64)[:5]
    together = keep(weights, numbers)
    for i in range(5):
        assert torch.equal(together[i], keep(weights[i : i + 1], numbers[i : i + 1])[0])


def test_tail_of_equal_tokens_is_one_choice() -> None:
    """Weights near 2^63 in sum: integer sums neither overflow nor lose the last bit."""
    weights = torch.full((1, 100_000), 1 << 44)
    surprise, entropy = filters.surprises(weights)
    assert entropy.item() == pytest.approx(math.log2(100_000), rel=1e-9)
    assert filters.keep_tail_free(weights, column(0.5)).count_nonzero() == 100_000
    assert surprise[0, 0].item() == pytest.approx(math.log2(100_000))


def test_golden_vectors() -> None:
    """The cases of an independent implementation in which a filter means the same as here."""
    path = Path(__file__).parent.parent / "vectors" / "sampler.json"
    names = {"tfs": "tfs", "top_a": "top_a", "min_p": "min_p"}
    cases = [case for case in json.loads(path.read_text())["filters"] if case["stage"] in names]
    for case in cases:
        keep = FILTERS[case["stage"]][0]
        row = [round(100 * probability) for probability in case["input"]]
        assert kept(keep, row, case["params"][case["stage"]]) == case["kept"]
    assert len(cases) == 4


def test_skewed() -> None:
    assert filters.skewed(0.3, 0.0) == 0.3
    assert filters.skewed(0.3, -1.0) < 0.3 < filters.skewed(0.3, 1.0)
    assert filters.skewed(0.0, 5.0) == 0.0
    assert filters.skewed(1 - 2**-53, 20.0) < 1
