"""Requests with any option: exact distributions, masks and bans, state from step to step, company, logprobs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qinfer.engine.choices import FixedRows
from qinfer.engine.sampling import (
    Row,
    SamplerState,
    SamplingParams,
    UniformStream,
    guide,
    logprobs,
    sample,
    sample_table,
)

INF = math.inf
Floats = np.ndarray

# --- parameters


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_temperature", -0.5),
        ("max_temperature", INF),
        ("temperature_exponent", 0.0),
        ("smoothing_factor", -1.0),
        ("top_a", 1.5),
        ("tfs", 0.0),
        ("typical", 1.1),
        ("mirostat_tau", math.nan),
        ("mirostat_eta", 1.5),
        ("xtc_probability", -0.1),
        ("xtc_threshold", 0.0),
        ("xtc_protected", [-1]),
        ("skew", 21.0),
        ("repetition_penalty", 0.0),
        ("repetition_range", -1),
        ("repetition_decay", 5),
        ("frequency_penalty", INF),
        ("presence_penalty", math.nan),
        ("dry_multiplier", -1.0),
        ("dry_base", 0.5),
        ("dry_allowed_length", 0),
        ("dry_range", 1),
        ("dry_breakers", [-3]),
        ("logit_bias", {-1: 0.5}),
        ("logit_bias", {1: INF}),
        ("banned_ids", [-1]),
        ("allowed_ids", []),
        ("logprobs", -1),
        ("min_new_tokens", -1),
        ("min_new_tokens", 257),
        ("banned_strings", ["a", ""]),
    ],
)
def test_values_out_of_range_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be .*got"):
        SamplingParams(**{field: value})


def test_fields_that_contradict() -> None:
    with pytest.raises(ValueError, match=r"max_temperature must be above min_temperature=0.5"):
        SamplingParams(min_temperature=0.5, max_temperature=0.5)
    with pytest.raises(ValueError, match="banned_ids must be without at least one of allowed_ids"):
        SamplingParams(allowed_ids=[1, 2], banned_ids=[2, 1])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tfs", "1"),
        ("top_a", True),
        ("logit_bias", {1: "x"}),
        ("logprobs", 1.5),
        ("allowed_ids", [0.5]),
        ("banned_strings", [1]),
    ],
)
def test_wrong_types_name_the_field(field: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"^{field} must "):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    "field", ["stop_ids", "banned_ids", "allowed_ids", "xtc_protected", "dry_breakers", "logit_bias"]
)
def test_ids_beyond_the_vocabulary_name_the_field(field: str) -> None:
    params = SamplingParams(**{field: {10: 1.0} if field == "logit_bias" else [3, 10]})
    params.check_vocabulary(11)
    with pytest.raises(ValueError, match=f"^{field} must hold ids below 10, .* got 10"):
        params.check_vocabulary(10)


def test_values_become_tuples() -> None:
    params = SamplingParams(logit_bias={5: 1, 2: -INF}, banned_strings="x", allowed_ids=[4, np.int64(2)])
    assert params.logit_bias == ((2, -INF), (5, 1.0))
    assert (params.banned_strings, params.allowed_ids) == (("x",), (4, 2))
    assert hash(params) == hash(
        SamplingParams(logit_bias=[(2, -INF), (5, 1)], banned_strings=["x"], allowed_ids=(4, 2))
    )


def test_every_option_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
    missing = [
        field.name
        for field in fields(SamplingParams)
        if f"`{field.name}" not in page and f"`{field.name.split('_')[0]}_*`" not in page
    ]
    assert not missing
    docstring = SamplingParams.__doc__ or ""
    assert [field.name for field in fields(SamplingParams) if f"        {field.name}: " not in docstring] == []


# --- exact distributions


def softmax(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def top_p_then_cold(logits: Floats) -> Floats:
    """Temperature 0.5 after top-p 0.8 of the probabilities at temperature 1."""
    p = softmax(logits)
    order = np.argsort(-p)
    cut = np.searchsorted(p[order].cumsum(), 0.8) + 1
    out = np.full_like(logits, -INF)
    out[order[:cut]] = logits[order[:cut]] / 0.5
    return softmax(out)


def smoothed(logits: Floats) -> Floats:
    return softmax(-((logits.max() - logits) ** 2) * 0.3 / 1.5)


def dynamic(logits: Floats) -> Floats:
    p = softmax(logits)
    entropy = -(p * np.log(p)).sum()
    return softmax(logits / (0.5 + 1.5 * (entropy / math.log(len(p))) ** 2))


def without_top_choices(logits: Floats) -> Floats:
    """Both sides of the coin, the protected likeliest token kept."""
    p = softmax(logits)
    likely = [i for i in np.argsort(-p) if p[i] >= 0.08 and i != int(p.argmax())]
    without = p.copy()
    without[likely[:-1]] = 0
    return 0.4 * p + 0.6 * without / without.sum()


def leaning(logits: Floats) -> Floats:
    p = softmax(logits)
    order = np.argsort(-p)
    reached = np.concatenate([[0.0], p[order].cumsum()]).clip(max=1) ** math.exp(-0.7)
    out = np.zeros_like(p)
    out[order] = np.diff(reached)
    return out


def typical_then_cut(logits: Floats) -> Floats:
    """Typical 0.7 of what min-p 0.02 leaves."""
    p = softmax(logits)
    p[p < 0.02 * p.max()] = 0
    p /= p.sum()
    kept = np.flatnonzero(p)
    entropy = -(p[kept] * np.log(p[kept])).sum()
    order = kept[np.argsort(np.abs(-np.log(p[kept]) - entropy))]
    cut = np.searchsorted(p[order].cumsum(), 0.7) + 1
    out = np.zeros_like(p)
    out[order[:cut]] = p[order[:cut]]
    return out / out.sum()


LOGITS = torch.randn(24, generator=torch.Generator().manual_seed(5)) * 1.5
KINDS: dict[str, tuple[SamplingParams, Callable[[Floats], Floats]]] = {
    "temperature_last": (SamplingParams(temperature=0.5, temperature_last=True, top_p=0.8), top_p_then_cold),
    "smoothing": (SamplingParams(temperature=1.5, smoothing_factor=0.3), smoothed),
    "dynamic": (SamplingParams(min_temperature=0.5, max_temperature=2.0, temperature_exponent=2.0), dynamic),
    "xtc": (
        SamplingParams(xtc_probability=0.6, xtc_threshold=0.08, xtc_protected=[int(LOGITS.argmax())]),
        without_top_choices,
    ),
    "skew": (SamplingParams(skew=-0.7), leaning),
    "typical": (SamplingParams(typical=0.7, min_p=0.02), typical_then_cut),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_match_the_exact_distribution(kind: str, device: str) -> None:
    """Chi-square of 20,000 draws with a fixed seed; the limit is exceeded by chance once in 10,000 seeds."""
    params, law = KINDS[kind]
    expected = law(LOGITS.double().numpy())
    count, stream = 20_000, UniformStream(11)
    ids = sample(LOGITS.to(device).expand(count, -1), [Row(params, stream.at(step)) for step in range(count)])
    observed = np.bincount(ids.cpu().numpy(), minlength=24)
    assert observed[expected == 0].sum() == 0
    # Cells of few expected draws are joined, as the statistic demands.
    rare = expected * count < 5
    cells = np.append(expected[~rare], expected[rare].sum()) * count
    counts = np.append(observed[~rare], observed[rare].sum())
    counts, cells = counts[cells > 0], cells[cells > 0]
    degrees = len(cells) - 1
    limit = degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3
    assert ((counts - cells) ** 2 / cells).sum() < limit


# --- company, masks, bans

MIXED = (
    *(params for params, _ in KINDS.values()),
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.8, top_k=7, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.2),
    SamplingParams(top_a=0.3, tfs=0.9, logit_bias={3: 2.0}),
    SamplingParams(temperature=0, dry_multiplier=1.0, dry_allowed_length=1, banned_ids=[0, 1]),
    SamplingParams(mirostat_tau=2.0, allowed_ids=list(range(40))),
)


def continued(choices: list[tuple[int, int]], steps: int) -> list[list[int]]:
    """Generate with a model whose logits depend on the last id alone."""
    model = torch.randn(67, 67, generator=torch.Generator().manual_seed(3)) * 3
    model[:, 40:] = model[:, :27]
    states = [SamplerState(MIXED[kind], [seed % 67]) for kind, seed in choices]
    for state, (_, seed) in zip(states, choices, strict=True):
        state.uniforms = UniformStream(seed)
    texts: list[list[int]] = [[] for _ in choices]
    for _ in range(steps):
        last = [text[-1] if text else seed % 67 for text, (_, seed) in zip(texts, choices, strict=True)]
        rows = [state.row(text) for state, text in zip(states, texts, strict=True)]
        for text, token in zip(texts, sample(model[last], rows).tolist(), strict=True):
            text.append(token)
    return texts


@given(st.lists(st.tuples(st.integers(0, len(MIXED) - 1), st.integers(0, 2**31)), min_size=1, max_size=6))
def test_request_gets_the_same_ids_alone_and_in_any_company(choices: list[tuple[int, int]]) -> None:
    together = continued(choices, 4)
    assert together == continued(choices[::-1], 4)[::-1]
    assert together[0] == continued(choices[:1], 4)[0]
    assert all(0 <= token < 67 for text in together for token in text)


def test_masks_and_bans() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(4, -1).contiguous()
    before = logits.clone()
    mask = torch.tensor([False, False, True, True])
    state = SamplerState(SamplingParams(temperature=0), [])
    rows = [
        state.row([], banned=[0]),
        state.row([], mask=mask),
        state.row([], banned=[2], mask=mask),
        state.row([], banned=[2, 3], mask=mask),
    ]
    assert sample(logits, rows).tolist() == [1, 2, 3, -1]
    assert torch.equal(logits, before)
    draws = [SamplerState(SamplingParams(seed=i, tfs=0.99), []).row([], mask=mask) for i in range(40)]
    assert set(sample(logits[:1].expand(40, -1), draws).tolist()) == {2, 3}


def test_repetition_penalty_reaches_the_draw() -> None:
    state = SamplerState(SamplingParams(temperature=0, repetition_penalty=2.0), [0])
    assert sample(torch.tensor([[3.0, 2.0, -1.0]]), [state.row([])]).tolist() == [1]
    assert sample(torch.tensor([[3.0, 2.0, 1.8]]), [state.row([1])]).tolist() == [2]


def test_id_beyond_the_logits_is_refused() -> None:
    row = SamplerState(SamplingParams(banned_ids=[4]), []).row([])
    with pytest.raises(ValueError, match="ids must be below 4, the vocabulary, got 4 to 4"):
        sample(torch.zeros(1, 4), [row])


@pytest.mark.parametrize("bad", [[math.nan, 0, 0, 0], [0, INF, 0, 0], [-INF] * 4])
@pytest.mark.parametrize("kind", KINDS)
def test_bad_row_leaves_the_others_alone(bad: list[float], kind: str) -> None:
    params = SamplingParams(**{**vars(KINDS[kind][0]), "xtc_protected": ()})
    good = torch.randn(2, 4)
    rows = [Row(params, uniform) for uniform in (0.3, 0.6, 0.9)]
    expected = sample(good, [rows[0], rows[2]]).tolist()
    assert sample(torch.stack([good[0], torch.tensor(bad), good[1]]), rows).tolist() == [expected[0], -1, expected[1]]


# --- mirostat


def test_mirostat_holds_the_surprise() -> None:
    logits = torch.randn(1, 400, generator=torch.Generator().manual_seed(2)) * 2
    p = logits.double().softmax(-1)[0]
    free = float(-(p * p.log2()).sum())
    for tau in (2.0, 4.0):
        assert tau < free - 0.5
        state, ids = SamplerState(SamplingParams(mirostat_tau=tau, mirostat_eta=0.2, seed=1), []), []
        bounds = []
        for _ in range(300):
            row = state.row(ids)
            assert row.mirostat is not None
            bounds.append(float(row.mirostat[0].bound(len(ids), logits.device)))
            ids.append(int(sample(logits, [row])))
        # The observed surprises average to tau where the bound has settled: what it moved in total is bounded.
        moved = (bounds[100] - bounds[-1]) / 0.2 / (len(bounds) - 101)
        assert abs(moved) < 0.1
        allowed = p >= 2.0 ** -(np.mean(bounds[100:]) + 1)
        assert allowed[ids[100:]].all()


def test_mirostat_forgets_what_was_rewound() -> None:
    """After a rewind that leads elsewhere, it goes on as if it had gone there at once."""
    logits = torch.randn(1, 100) * 2
    params = SamplingParams(mirostat_tau=2.0, mirostat_eta=0.5, seed=4)

    def go(state: SamplerState, ids: list[int], banned: dict[int, list[int]]) -> list[int]:
        while len(ids) < 12:
            ids = [*ids, int(sample(logits, [state.row(ids, banned=banned.get(len(ids), ()))]))]
        return ids

    state = SamplerState(params, [])
    first = go(state, [], {})
    state.rewind(5)
    banned = {5: [first[5]]}
    second = go(state, first[:5], banned)
    assert second[5] != first[5]
    assert second == go(SamplerState(params, []), [], banned)


def test_late_temperature_when_the_likeliest_token_is_gone() -> None:
    """Typical keeps the second token alone; at a hundredth of the temperature it still has its weight."""
    logits = torch.tensor([[0.4, 0.25, 0.15, 0.1, 0.06, 0.04]]).log()
    params = SamplingParams(typical=0.2, temperature=0.005, temperature_last=True)
    assert [int(sample(logits, [Row(params, uniform)])) for uniform in (0.0, 0.5, 0.999)] == [1, 1, 1]


# --- logprobs and guidance


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_logprobs(device: str) -> None:
    logits = torch.randn(3, 50, device=device) * 4
    logits[:, 20:30] = logits[:, :10]
    logits[0, 3] = -INF
    logits[1, 4], logits[1, 5] = 0.0, -0.0
    ids = torch.tensor([3, -1, 7], device=device)
    found = logprobs(logits, ids, 50)
    expected = logits.double().log_softmax(-1)
    order = (logits + 0.0).sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(found.top_ids, order)
    assert torch.allclose(found.top, expected.gather(-1, order).float(), rtol=2e-7, atol=0)
    assert found.chosen[0] == -INF
    assert found.chosen[1].isnan()
    assert torch.allclose(found.chosen[2], expected[2, 7].float(), rtol=2e-7, atol=0)
    assert torch.equal(logprobs(logits, ids, 2).top_ids, order[:, :2])
    assert logprobs(logits, ids, 0).top.shape == (3, 0)


def test_logprobs_refuses() -> None:
    with pytest.raises(ValueError, match=r"top_n between 0 and V, got .* top_n=5"):
        logprobs(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), 5)
    with pytest.raises(ValueError, match=r"got ids \[3\]"):
        logprobs(torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64), 1)


@given(st.floats(-3, 5))
def test_guide(scale: float) -> None:
    positive, negative = torch.randn(2, 30), torch.randn(2, 30)
    mixed = guide(positive, negative, scale)
    # The published formula gives the same probabilities.
    expected = scale * positive.log_softmax(-1) + (1 - scale) * negative.log_softmax(-1)
    assert torch.allclose(mixed.softmax(-1), expected.softmax(-1), atol=1e-5)
    # Only differences between logits count.
    assert torch.allclose(guide(positive + 3, negative - 7, scale).softmax(-1), mixed.softmax(-1), atol=1e-4)
    assert torch.equal(guide(positive, positive, scale), positive)
    both = guide(positive, negative, torch.tensor([[scale], [1.0]]))
    assert torch.equal(both[0], mixed[0])
    assert torch.allclose(both[1], positive[1], atol=1e-5)


def test_guide_keeps_bans() -> None:
    mixed = guide(torch.tensor([[0.0, -INF, 1.0]]), torch.tensor([[-INF, 0.0, 1.0]]), 3.0)
    assert mixed[0, :2].tolist() == [-INF, -INF]
    assert mixed[0, 2] > -INF
    with pytest.raises(ValueError, match=r"negative must be \[1, 3\]"):
        guide(torch.zeros(1, 3), torch.zeros(1, 4), 2.0)
    with pytest.raises(ValueError, match="scale must be finite"):
        guide(torch.zeros(1, 3), torch.zeros(1, 3), INF)


@pytest.mark.parametrize("temperatures", [(0.0, 0.0, 0.0), (0.0, 0.7, 1.3)])
def test_fixed_rows_draw_what_rows_draw(temperatures: tuple[float, ...]) -> None:
    filters = ({}, {"top_k": 3}, {"top_p": 0.6, "min_p": 0.1})
    asked = [SamplingParams(temperature=t, seed=i, **filters[i]) for i, t in enumerate(temperatures)]
    states = [SamplerState(params, [1]) for params in asked]
    fixed = FixedRows(states)
    for step in range(20):
        logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(step))
        logits[step % 3, 7] = (0.0, math.nan, math.inf, -math.inf)[step % 4]
        steps = [step, step + 9, 2 * step]
        rows = [state.row(range(number)) for state, number in zip(states, steps, strict=True)]
        assert torch.equal(sample_table(logits, fixed.table(steps)), sample(logits, rows))
    assert fixed.choice == ("filtered draw" if any(temperatures) else "greedy")
    with pytest.raises(ValueError, match="table must have 2 rows, one per row of logits, got 3"):
        sample_table(logits[:2], fixed.table(steps))


def test_rows_are_fixed_where_nothing_but_a_random_number_changes() -> None:
    assert SamplingParams(temperature=0.5, top_k=4, top_p=0.5, min_p=0.1, seed=1).is_fixed
    for changed in (
        {"repetition_penalty": 1.1}, {"frequency_penalty": 0.1}, {"presence_penalty": 0.1}, {"dry_multiplier": 0.5},
        {"logit_bias": {3: 1.0}}, {"banned_ids": [3]}, {"allowed_ids": [3]}, {"min_new_tokens": 2}, {"logprobs": 0},
        {"banned_strings": ["x"]}, {"token_healing": True}, {"mirostat_tau": 3.0}, {"xtc_probability": 0.5},
        {"temperature_last": True}, {"guidance_scale": 2.0, "negative_prompt": [1]}, {"skew": 0.1},
    ):  # fmt: skip
        assert not SamplingParams(temperature=0.5, **changed).is_fixed, changed
