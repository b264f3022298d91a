"""Changes of logits: every one against a loop over the ids, and the same whatever the way there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qinfer.engine.penalties import Changes, Edits, History, dry_offsets, faded, prolonged, repetition, weighted
from qinfer.engine.sampling import SamplingParams

VOCABULARY = 9
ids = st.lists(st.integers(0, VOCABULARY - 1), max_size=25)


def changed(logits: list[float], edits: Edits | None) -> list[float]:
    """Apply changes to a row."""
    if edits is None:
        return logits
    assert len(set(edits.ids.tolist())) == len(edits.ids)
    out = [-math.inf] * len(logits) if edits.exclusive else list(logits)
    for token, up, down, offset in zip(*(column.tolist() for column in edits[:4]), strict=True):
        out[token] = logits[token] * (up if logits[token] > 0 else down) + offset
    return out


LOGITS = [0.5, -1.0, 2.0, 0.0, -0.25, 3.0, 1.0, -2.0, 0.125]


def account(seen: list[int], params: SamplingParams) -> list[float]:
    """Logits after repetition, frequency and presence penalties, one token at a time from the last one."""
    out, window = list(LOGITS), params.repetition_range
    latest: dict[int, float] = {}
    total: dict[int, float] = {}
    for distance, token in enumerate(reversed(seen)):
        share = 1.0
        if window is not None and distance >= window:
            share = 1 - (distance - window + 1) / (params.repetition_decay + 1)
        if share > 1e-12:
            latest.setdefault(token, share)
            total[token] = total.get(token, 0) + share
    for token, share in latest.items():
        factor = 1 + (params.repetition_penalty - 1) * share
        out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
        out[token] -= params.presence_penalty * share + params.frequency_penalty * total[token]
    return out


@given(prompt=ids, generated=ids, window=st.sampled_from([None, 0, 1, 3, 7]), decay=st.sampled_from([0, 1, 5]),
       penalty=st.sampled_from([1.0, 0.8, 1.3]), frequency=st.sampled_from([0.0, 0.25]))  # fmt: skip
def test_repetition(
    prompt: list[int], generated: list[int], window: int | None, decay: int, penalty: float, frequency: float
) -> None:
    fields = {"repetition_range": window, "repetition_decay": 0 if window is None else decay}
    params = SamplingParams(repetition_penalty=penalty, frequency_penalty=frequency, presence_penalty=0.5, **fields)
    changes = Changes(params, prompt)
    for step in range(len(generated) + 1):
        expected = account([*prompt, *generated[:step]], params)
        assert changed(LOGITS, changes.at(generated[:step], ())) == pytest.approx(expected)


@given(prompt=ids, first=ids, second=ids, window=st.sampled_from([None, 4]), data=st.data())
def test_rewinding_leaves_no_trace(
    prompt: list[int], first: list[int], second: list[int], window: int | None, data: st.DataObject
) -> None:
    params = SamplingParams(repetition_penalty=1.2, repetition_range=window, dry_multiplier=0.8, dry_allowed_length=1)
    length = data.draw(st.integers(0, len(first)))
    changes = Changes(params, prompt)
    changes.at(first, ())
    changes.rewind(length)
    final = [*first[:length], *second]
    fresh = Changes(params, prompt).at(final, ())
    assert changed(LOGITS, changes.at(final, ())) == changed(LOGITS, fresh)


@given(first=ids, window=st.sampled_from([None, 1, 5]))
def test_history_counts(first: list[int], window: int | None) -> None:
    history = History(first, window)
    tokens, counts = history.counted()
    recent = first if window is None else first[-window:]
    assert dict(zip(tokens.tolist(), counts.tolist(), strict=True)) == {t: recent.count(t) for t in recent}
    assert history.ids.tolist() == first


def test_history_grows() -> None:
    many = list(range(3000))
    history = History([], None)
    history.extend(many)
    history.extend(many)
    assert history.ids.tolist() == many * 2
    tokens, counts = history.counted()
    assert sorted(tokens.tolist()) == many
    assert set(counts.tolist()) == {2.0}


@given(seen=ids, breakers=st.sets(st.integers(0, VOCABULARY - 1), max_size=2), base=st.sampled_from([1.0, 1.75]),
       allowed=st.integers(1, 3), window=st.sampled_from([None, 6]))  # fmt: skip
def test_dry(seen: list[int], breakers: set[int], base: float, allowed: int, window: int | None) -> None:
    recent = seen if window is None else seen[-window:]
    longest: dict[int, int] = {}
    for token in range(VOCABULARY):
        for end in range(len(recent) - 1):
            if recent[end + 1] != token:
                continue
            length = 0
            while length <= end and recent[end - length] == recent[-1 - length] not in breakers:
                length += 1
            longest[token] = max(longest.get(token, 0), length)
    expected = [
        logit - (0.5 * base ** (longest[t] - allowed) if longest.get(t, 0) >= allowed else 0)
        for t, logit in enumerate(LOGITS)
    ]
    params = SamplingParams(
        dry_multiplier=0.5, dry_base=base, dry_allowed_length=allowed, dry_range=window, dry_breakers=tuple(breakers)
    )
    assert changed(LOGITS, Changes(params, seen).at([], ())) == pytest.approx(expected)


def test_dry_by_hand() -> None:
    # "1 2 3" came before and was followed by 4; "3" alone was followed by 7.
    tokens, lengths = prolonged(np.array([5, 1, 2, 3, 4, 3, 7, 1, 2, 3], np.int32), np.array([], np.int32))
    assert dict(zip(tokens.tolist(), lengths.tolist(), strict=True)) == {4: 3, 7: 1}
    tokens, lengths = prolonged(np.array([5, 1, 2, 3, 4, 3, 7, 1, 2, 3], np.int32), np.array([2], np.int32))
    assert dict(zip(tokens.tolist(), lengths.tolist(), strict=True)) == {4: 1, 7: 1}
    # A very long repetition stays a number.
    assert np.isfinite(dry_offsets(np.array([100_000]), SamplingParams(dry_multiplier=1.0))).all()


@given(seen=ids, generated=ids)
def test_biases_and_bans_join(seen: list[int], generated: list[int]) -> None:
    """Everything on the same tokens: factors apply first, offsets add up, -inf wins."""
    params = SamplingParams(
        repetition_penalty=1.5, logit_bias={2: 1.0, 5: -0.5, 7: -math.inf}, banned_ids=[5], presence_penalty=0.25
    )
    expected = account([*seen, *generated], params)
    expected[2] += 1.0
    for token in (5, 7, 8):
        expected[token] = -math.inf
    assert changed(LOGITS, Changes(params, seen).at(generated, [8])) == pytest.approx(expected)


def test_only_allowed_tokens_remain() -> None:
    params = SamplingParams(allowed_ids=[3, 6, 6], logit_bias={6: 1.0, 2: 9.0})
    expected = [-math.inf] * VOCABULARY
    expected[3], expected[6] = LOGITS[3], LOGITS[6] + 1
    assert changed(LOGITS, Changes(params, [1, 2]).at([], ())) == expected
    expected[3] = -math.inf
    assert changed(LOGITS, Changes(params, [1, 2]).at([], [3])) == expected


def test_nothing_asked_changes_nothing() -> None:
    assert Changes(SamplingParams(), [1, 2, 3]).at([4, 5], ()) is None


def cases() -> list[dict[str, Any]]:
    path = Path(__file__).parent.parent / "vectors" / "sampler.json"
    return json.loads(path.read_text())["rep_penalty"]


@pytest.mark.parametrize("case", [case for case in cases() if case["decay"] == 0], ids=lambda case: case["sustain"])
def test_golden_vectors(case: dict[str, Any]) -> None:
    """An independent implementation, where it means the same as here: without decay."""
    window = None if case["sustain"] < 0 else case["sustain"]
    params = SamplingParams(repetition_penalty=case["penalty"], repetition_range=window)
    seen = [token for token in case["sequence"] if window is not None or token < len(case["logits"])]
    edits = Changes(params, seen).at([], ())
    inside = [token for token in edits.ids.tolist() if token < len(case["logits"])]
    padded = [*case["logits"], *[0.0] * (64 - len(case["logits"]))]
    assert changed(padded, edits)[: len(case["logits"])] == pytest.approx(case["out"], rel=1e-6)
    assert inside


def test_faded_and_weighted_by_hand() -> None:
    assert faded(2, 3).tolist() == [1, 1, 0.75, 0.5, 0.25]
    tokens, latest, total = weighted(np.array([4, 7, 4], np.int32), faded(2, 3))
    assert (tokens.tolist(), latest.tolist(), total.tolist()) == ([4, 7], [1, 1], [1.75, 1])
    params = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=2.0)
    up, down, offset = repetition(np.array([0.5]), np.array([1.25]), params)
    assert (up.tolist(), down.tolist(), offset.tolist()) == ([0.8], [1.25], [-1.625])
