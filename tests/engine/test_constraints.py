"""Constraints of one's own: every token is what the definition says, and nobody else in the batch notices."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qinfer.engine.constraints import Words, keep_allowed, packed
from qinfer.engine.draft import NgramDraft
from qinfer.engine.sampling import Row, SamplerState, SamplingParams, UniformStream, sample
from qinfer.engine.sequence import Sequence
from qinfer.engine.steering import Steering
from tests.engine.mock import TOKENIZER, VOCAB, MockModel, expected, generator, is_idle, logits_after

EOS = frozenset(range(7, VOCAB, 11))  # so many that the ends of texts show
LONGEST = 14


class Every:
    """Of a text, the id at each place leaves a remainder of 3 that the id before decides; it ends at a given length."""

    def __init__(self, length: int, *, complete_every: int = 2, fail: tuple[str, int] = ("", 0)) -> None:
        self.length = length
        self.complete_every = complete_every
        self.fail = fail

    def begin(self) -> EveryWalk:
        return EveryWalk(self)


class EveryWalk:
    def __init__(self, rule: Every) -> None:
        self.rule = rule
        self.ids: list[int] = []
        self._raise("begin")

    @property
    def is_complete(self) -> bool:
        return len(self.ids) % self.rule.complete_every == 0 or self.is_finished

    @property
    def is_finished(self) -> bool:
        return len(self.ids) == self.rule.length

    def may_follow(self) -> list[int]:
        return [] if self.is_finished else sorted({*range((self.ids or [0])[-1] // 3 % 3, VOCAB, 3)} - EOS)

    def allowed(self) -> Words:
        self._raise("allowed")
        return packed(self.may_follow(), VOCAB)

    def advance(self, token_id: int) -> None:
        self._raise("advance")
        assert token_id in self.may_follow()
        self.ids.append(token_id)

    def rewind(self, count: int) -> None:
        self._raise("rewind")
        assert 0 < count <= len(self.ids)
        del self.ids[-count:]

    def _raise(self, what: str) -> None:
        if self.rule.fail in ((what, len(self.ids)), (what, -1)):
            raise RuntimeError(f"{what} at {len(self.ids)}")


def by_definition(prompt: Many[int], params: SamplingParams, memory: int = 0) -> tuple[list[int], str]:
    """The ids and the finish reason of a request, one mask at a time."""
    ids: list[int] = []
    stream = UniformStream(params.seed)
    plain = replace(params, constraint=None)
    walk = params.constraint.begin()
    while len(ids) < params.max_new_tokens:
        closed = torch.ones(VOCAB, dtype=torch.bool)
        closed[walk.may_follow()] = False
        closed[sorted(EOS)] = not walk.is_complete or len(ids) < params.min_new_tokens
        logits = logits_after([*prompt, *ids][-memory:]).masked_fill(closed, -torch.inf)
        ids.append(int(sample(logits[None], [Row(plain, stream.at(len(ids)))])))
        if ids[-1] in EOS:
            return ids, "stop"
        walk.advance(ids[-1])
        if walk.is_finished:
            return ids, "stop"
    return ids, "length"


requests = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7]),
    seed=st.integers(0, 9),
    max_new_tokens=st.integers(1, LONGEST),
    min_new_tokens=st.sampled_from([0, 1]),
    constraint=st.builds(Every, st.integers(1, LONGEST), complete_every=st.integers(1, 5)),
)
free = st.builds(
    SamplingParams, temperature=st.sampled_from([0.0, 0.7]), seed=st.integers(0, 9), max_new_tokens=st.integers(1, 9)
)


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(20, 30), st.one_of(requests, free)), min_size=1, max_size=5),
    st.sampled_from([0, 3]),
    st.sampled_from([1, 4]),
    st.sampled_from([0, 2]),
)
def test_every_token_is_by_definition(
    asked: list[tuple[int, SamplingParams]], draft_tokens: int, page_size: int, memory: int
) -> None:
    # Little room, so that requests give way and come back; a short memory repeats itself, so that guesses come true.
    model = MockModel(eos_ids=sorted(EOS), memory=memory)
    gen = generator(model, draft=draft_tokens, page_size=page_size, max_tokens=40)
    outs = gen.generate([[first, 9] for first, _ in asked], [params for _, params in asked])
    for (first, params), out in zip(asked, outs, strict=True):
        if params.constraint is None:
            assert list(out.token_ids) == expected([first, 9], params, EOS, memory)
        else:
            assert (list(out.token_ids), out.finish_reason) == by_definition([first, 9], params, memory)
    assert is_idle(gen)


def test_guesses_that_the_constraint_refuses_cost_nothing_but_time() -> None:
    drafted = accepted = 0
    for seed in range(5):
        params = SamplingParams(
            temperature=0.2 * seed, seed=seed, max_new_tokens=60, constraint=Every(50, complete_every=50)
        )
        gen = generator(MockModel(eos_ids=sorted(EOS), memory=1), draft=4)
        out = gen.generate([20, 30] * 8, params)
        assert (list(out.token_ids), out.finish_reason) == by_definition([20, 30] * 8, params, memory=1)
        drafted, accepted = drafted + out.drafted_tokens, accepted + out.accepted_tokens
    # Some were right and some were not.
    assert drafted > accepted > 10


@settings(max_examples=10)
@given(st.integers(0, 99), st.sampled_from([0, 3]))
def test_banned_strings_take_the_walk_back(seed: int, draft_tokens: int) -> None:
    params = SamplingParams(temperature=0, max_new_tokens=LONGEST, constraint=Every(LONGEST, complete_every=20))
    prompt = [20 + seed, 9]
    plain = generator(MockModel(tokenizer=TOKENIZER)).generate(prompt, params)
    piece = next((character for character in plain.text[5:] if character != "\ufffd"), "e")
    gen = generator(MockModel(tokenizer=TOKENIZER), draft=draft_tokens)
    out = gen.generate(prompt, replace(params, banned_strings=piece))
    assert piece not in out.text
    assert len(out.token_ids) == LONGEST
    walk = params.constraint.begin()
    for token in out.token_ids:
        walk.advance(token)
    assert walk.is_finished
    assert is_idle(gen)


@pytest.mark.parametrize("fail", [("begin", 0), ("allowed", 0), ("advance", 3), ("allowed", 4), ("rewind", -1)])
def test_constraint_that_raises_ends_its_own_request(fail: tuple[str, int]) -> None:
    gen = generator(MockModel(tokenizer=TOKENIZER))
    bad = SamplingParams(temperature=0, max_new_tokens=30, constraint=Every(20, fail=fail))
    if fail[0] == "rewind":
        text = generator(MockModel(tokenizer=TOKENIZER)).generate([20, 9], replace(bad, constraint=Every(20))).text
        bad = replace(bad, banned_strings=next(character for character in text[3:] if character != "\ufffd"))
    good = SamplingParams(temperature=0, max_new_tokens=12)
    out, other = gen.generate([[20, 9], [21, 9]], [bad, good])
    assert out.finish_reason == "error"
    assert isinstance(out.error, RuntimeError)
    assert str(out.error).startswith(fail[0])
    assert list(other.token_ids) == expected([21, 9], good)
    assert is_idle(gen)


def test_constraint_and_bans_that_leave_nothing() -> None:
    params = SamplingParams(temperature=0, constraint=Every(5, complete_every=9), allowed_ids=[1, 4])
    out = generator(MockModel()).generate([20, 9], params)
    assert out.finish_reason == "error"
    assert "leave nothing to draw" in str(out.error)


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"constraint must have begin\(\)"):
        SamplingParams(constraint="{}")
    with pytest.raises(ValueError, match="token_healing must be False beside a constraint"):
        SamplingParams(constraint=Every(3), token_healing=True)


@pytest.mark.parametrize("num_words", [2, 4])
@pytest.mark.parametrize("is_complete", [False, True])
def test_words_of_another_vocabulary(num_words: int, is_complete: bool) -> None:
    class Walk(EveryWalk):
        is_complete = False

        def allowed(self) -> Words:
            return np.full(num_words, -1, np.int32)

    constraint = Every(9)
    constraint.begin = lambda: Walk(constraint)
    Walk.is_complete = is_complete
    words = Steering(constraint, frozenset({0, 95}), 96).words([])
    # What is left out at the end allows nothing, ids beyond the vocabulary are cut off, and ends are the request's own.
    allowed = set(range(32 * min(num_words, 3))) - {0, 95} | ({0, 95} if is_complete else set())
    assert words.tolist() == packed(allowed, 96).tolist()


def test_a_wrong_guess_that_fits_leaves_no_trace() -> None:
    params = SamplingParams(temperature=0, constraint=Every(9))
    one = Sequence(
        1, (5,), params, SamplerState(params, (5,)), steering=Steering(params.constraint, frozenset(), VOCAB)
    )
    one.drafter, one.drafts = NgramDraft(2), [3, 4]
    one.rows()
    one.accept([6, 0, 0])
    (row,) = one.rows()
    assert one.generated == [6]
    assert row.words.tolist() == packed({*range(2, VOCAB, 3)} - EOS, VOCAB).tolist()


@given(st.sets(st.integers(0, 99)), st.sampled_from([70, 96, 100]))
def test_bits_of_ids(ids: set[int], vocab_size: int) -> None:
    ids = {token for token in ids if token < vocab_size}
    words = packed(ids, vocab_size)
    assert words.dtype == np.int32
    logits = torch.randn(3, vocab_size)
    before = logits.clone()
    keep_allowed(logits, torch.tensor([2, 0]), torch.from_numpy(np.stack([words, ~words])))
    assert torch.equal(logits[1], before[1])
    is_open = torch.zeros(vocab_size, dtype=torch.bool)
    is_open[sorted(ids)] = True
    assert torch.equal(logits[2], before[2].masked_fill(~is_open, -torch.inf))
    assert torch.equal(logits[0], before[0].masked_fill(is_open, -torch.inf))
