import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qinfer.engine.filters import keep_min_p
from qinfer.engine.sampling import Row, SamplingParams, UniformStream, sample
from qinfer.kernels.token_weights import ONE, draw, keep_top_k, keep_top_p

on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
NAN, INF = math.nan, math.inf


def kept(weights: Tensor) -> list[int]:
    return weights[0].nonzero().flatten().tolist()


def column(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


# --- parameters


def test_stops_become_tuples() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)
    params = SamplingParams(stop=["ab", "c"], stop_ids=[3, np.int64(4)])
    assert (params.stop, params.stop_ids) == (("ab", "c"), (3, 4))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", NAN),
        ("temperature", INF),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", NAN),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("seed", -1),
        ("seed", 1 << 64),
        ("max_new_tokens", 0),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop_ids", [-1]),
    ],
)
def test_values_out_of_range_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be .*got"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("top_k", 1.5), ("seed", "7"), ("max_new_tokens", True), ("stop", [3]), ("stop_ids", ["a"])]
)
def test_wrong_types_name_the_field(field: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"^{field} must "):
        SamplingParams(**{field: value})


# --- filters


def test_filters_by_hand() -> None:
    weights = torch.tensor([[8, 4, 2, 1, 1]])
    assert kept(keep_top_k(weights, column(2))) == [0, 1]
    assert kept(keep_top_k(weights, column(0))) == [0, 1, 2, 3, 4]
    # 8/16 reaches 0.5 alone; a little more needs the second.
    assert kept(keep_top_p(weights, column(0.5))) == [0]
    assert kept(keep_top_p(weights, column(0.51))) == [0, 1]
    assert kept(keep_top_p(weights, column(1.0))) == [0, 1, 2, 3, 4]
    # Off means off, even for weights that an fp64 sum does not feel.
    assert kept(keep_top_p(torch.tensor([[1 << 60, 1, 1]]), column(1.0))) == [0, 1, 2]
    assert kept(keep_min_p(weights, column(0.25))) == [0, 1, 2]
    assert kept(keep_min_p(weights, column(0.0))) == [0, 1, 2, 3, 4]


def test_golden_vectors() -> None:
    """The cases of an independent implementation in which top-p and min-p mean the same as here."""
    path = Path(__file__).parent.parent / "vectors" / "sampler.json"
    filters = {"min_p": keep_min_p, "top_p": keep_top_p}
    cases = 0
    for case in json.loads(path.read_text())["filters"]:
        # Its top-p fills a knapsack below p; it agrees with "the fewest that reach p" where a prefix sums to p.
        if case["stage"] == "min_p" or case["params"] == {"top_p": 0.9}:
            # The inputs are whole percents, so the weights are exact.
            weights = torch.tensor([[round(100 * probability) for probability in case["input"]]])
            assert kept(filters[case["stage"]](weights, column(case["params"][case["stage"]]))) == case["kept"]
            cases += 1
    assert cases == 2


def oracle(probabilities: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Probabilities after the filters, in their documented order, one token at a time."""
    order = sorted(range(len(probabilities)), key=lambda i: (-probabilities[i], i))
    if top_k:
        order = order[:top_k]
    total, reached, prefix = sum(probabilities[i] for i in order), 0.0, []
    for i in order:
        if top_p < 1 and reached >= top_p * total:
            break
        prefix.append(i)
        reached += probabilities[i]
    prefix = [i for i in prefix if probabilities[i] >= min_p * probabilities[order[0]]]
    out = np.zeros_like(probabilities)
    out[prefix] = probabilities[prefix]
    return out / out.sum()


rows_of_counts = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@given(rows_of_counts, st.integers(0, 14), st.sampled_from([0.05, 0.3, 0.77, 1.0]), st.sampled_from([0.0, 0.21, 1.0]))
def test_filters_against_oracle(counts: list[int], top_k: int, top_p: float, min_p: float) -> None:
    ordered = torch.tensor([sorted(counts, reverse=True)])
    result = keep_min_p(keep_top_p(keep_top_k(ordered, column(top_k)), column(top_p)), column(min_p))
    expected = oracle(ordered[0].double().numpy(), top_k, top_p, min_p)
    assert np.allclose(result[0].double().numpy() / result.sum().item(), expected, rtol=1e-12, atol=0)
    # The kept set is a prefix, and what is kept keeps its weight.
    length = int((result > 0).sum())
    assert length >= 1
    assert torch.equal(result[:, :length], ordered[:, :length])


@on_devices
def test_ties_are_kept_from_the_lowest_id(device: str) -> None:
    logits = torch.zeros(60, 5000, device=device)
    for params in (SamplingParams(top_k=3), SamplingParams(top_p=3 / 5000)):
        rows = [Row(params, step / 60) for step in range(60)]
        assert set(sample(logits, rows).tolist()) == {0, 1, 2}


# --- the draw


def test_draw_by_hand() -> None:
    weights = torch.tensor([[0, 1, 0, 2, 1, 0]])
    drawn = [int(draw(weights, column(u))) for u in (0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53)]
    assert drawn == [1, 1, 3, 3, 4, 4]


@given(st.lists(st.sampled_from([0, 1, 3, ONE - 1, ONE]), min_size=1, max_size=30), st.floats(0, 1 - 2**-53))
def test_weight_zero_is_never_drawn(row: list[int], uniform: float) -> None:
    weights = torch.tensor([[*row, 1, 0]])
    assert int(weights[0, int(draw(weights, column(uniform)))]) > 0


@pytest.mark.parametrize("total", [1, 3, 2**44 + 1, 2**53 - 1, 2**53 + 1, 2**54 + 3, 2**62 - 1, 2**62])
def test_draw_stays_below_any_sum(total: int) -> None:
    assert int(draw(torch.tensor([[0, total, 0]]), column(1 - 2**-53))) == 1


def test_uniform_stream_is_addressed_by_step() -> None:
    stream = UniformStream(7)
    values = [stream.at(step) for step in range(2000)]
    assert values == [UniformStream(7).at(step) for step in reversed(range(2000))][::-1]
    assert all(0 <= value < 1 for value in values)
    assert values != [UniformStream(8).at(step) for step in range(2000)]
    # Mean 1/2 with a standard error of 1/sqrt(12 · 2000) = 0.0065; four of them.
    assert abs(np.mean(values) - 0.5) < 0.026
    assert UniformStream(None).seed != UniformStream(None).seed


# --- sample


@on_devices
def test_greedy_takes_the_lowest_of_equals(device: str) -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [5.0, -INF, 5.0, 0.0]], device=device)
    greedy = Row(SamplingParams(temperature=0), 0.0)
    assert sample(logits, [greedy] * 2).tolist() == [1, 0]
    # The same beside a row that draws.
    assert sample(logits[[0, 1, 0]], [greedy, greedy, Row(SamplingParams(), 0.5)]).tolist()[:2] == [1, 0]


@on_devices
@pytest.mark.parametrize("bad", [[NAN, 0, 0, 0], [0, INF, 0, 0], [-INF] * 4, [NAN] * 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_k", [0, 3])
def test_bad_row_leaves_the_others_alone(bad: list[float], temperature: float, top_k: int, device: str) -> None:
    good = torch.randn(2, 4, device=device)
    rows = [Row(SamplingParams(temperature=temperature, top_k=top_k), uniform) for uniform in (0.3, 0.9)]
    expected = sample(good, rows).tolist()
    mixed = torch.stack([good[0], torch.tensor(bad, device=device), good[1]])
    assert sample(mixed, [rows[0], rows[1], rows[1]]).tolist() == [expected[0], -1, expected[1]]


@on_devices
def test_masked_tokens_are_not_drawn(device: str) -> None:
    logits = torch.tensor([[-INF, 0.0, -INF, 0.0, -INF]], device=device)
    rows = [Row(SamplingParams(), step / 100) for step in range(100)]
    assert set(sample(logits.expand(100, -1), rows).tolist()) == {1, 3}


@on_devices
@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 1e9])
def test_extreme_temperatures(temperature: float, device: str) -> None:
    logits = torch.tensor([[1.0, 3.0, -1e30, 2.0]], device=device).expand(50, -1)
    rows = [Row(SamplingParams(temperature=temperature), step / 50) for step in range(50)]
    assert set(sample(logits, rows).tolist()) == ({1} if temperature < 1 else {0, 1, 3})


PARAMS = (
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.3, top_p=0.8),
    SamplingParams(min_p=0.1),
    SamplingParams(temperature=2.0, top_k=9, top_p=0.9, min_p=0.05),
)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2**31)), min_size=1, max_size=9))
def test_row_draws_the_same_alone_and_in_any_batch(choices: list[tuple[int, int]]) -> None:
    logits = torch.stack([torch.randn(67, generator=torch.Generator().manual_seed(seed)) * 3 for _, seed in choices])
    # A third of the ids share their logit with another one.
    logits[:, 40:] = logits[:, :27]
    rows = [Row(PARAMS[kind], UniformStream(seed).at(0)) for kind, seed in choices]
    together = sample(logits, rows).tolist()
    assert together == [int(sample(logits[i : i + 1], [row])) for i, row in enumerate(rows)]
    assert together[::-1] == sample(logits.flip(0), rows[::-1]).tolist()


@on_devices
@pytest.mark.parametrize("params", PARAMS[1:], ids=["plain", "top_k", "top_p", "min_p", "all"])
def test_frequencies_match_the_exact_distribution(params: SamplingParams, device: str) -> None:
    """Chi-square of 20,000 draws with a fixed seed; the limit is exceeded by chance once in 10,000 seeds."""
    logits = torch.randn(24, generator=torch.Generator().manual_seed(5)) * 1.5
    scaled = logits.double().numpy() / params.temperature
    softmax = np.exp(scaled - scaled.max())
    expected = oracle(softmax / softmax.sum(), params.top_k, params.top_p, params.min_p)
    count, stream = 20_000, UniformStream(11)
    rows = [Row(params, stream.at(step)) for step in range(count)]
    ids = sample(logits.to(device).expand(count, -1), rows).cpu().numpy()
    observed = np.bincount(ids, minlength=24)
    possible = expected > 0
    assert observed[~possible].sum() == 0
    statistic = ((observed - count * expected)[possible] ** 2 / (count * expected[possible])).sum()
    # Wilson-Hilferty: the cube root of chi-square over its degrees is nearly normal; 3.72 deviations are 1 in 10,000.
    degrees = possible.sum() - 1
    limit = degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3
    assert statistic < limit


def test_rows_must_match() -> None:
    with pytest.raises(ValueError, match=r"logits must be \[1, V\], one row per request, got \[2, 4\]"):
        sample(torch.zeros(2, 4), [Row(SamplingParams(), 0.5)])
