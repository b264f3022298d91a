import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qinfer.engine.draft import NgramDraft
from qinfer.engine.job import Completion
from qinfer.engine.sampling import SamplerState, SamplingParams
from qinfer.engine.sequence import Sequence
from qinfer.errors import NonFiniteLogits
from tests.engine.mock import POISON, TOKENIZER, MockModel, expected, generator, is_idle


def test_what_followed_follows_again() -> None:
    draft = NgramDraft(5)
    draft.extend([1, 2, 3, 4, 5, 6, 9, 1, 2, 3])
    assert draft.propose(9) == [4, 5, 6, 9, 1]
    assert draft.propose(2) == [4, 5]
    assert draft.propose(0) == []
    # The longest run decides, then the latest.
    draft.extend([7, 8, 2, 3, 4, 5, 0, 1, 2, 3, 4])
    assert draft.propose(2) == [5, 6]
    draft.extend([0, 2, 3, 4])
    assert draft.propose(1) == [0]


def test_period_goes_on() -> None:
    draft = NgramDraft(8)
    draft.extend([9, 1, 2, 3, 1, 2, 3])
    assert draft.propose(8) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_bad_drafts_pause() -> None:
    draft = NgramDraft(4)
    draft.extend([1, 2, 3, 1, 2, 3])
    waits = []
    for _ in range(7):
        assert draft.propose(4)
        draft.judge(4, 1)
        waits.append(0)
        while not draft.propose(4):
            draft.extend([[1, 2, 3][draft.num_ids % 3]])
            waits[-1] += 1
    assert waits == [5, 9, 17, 33, 65, 65, 65]
    draft.judge(4, 4)
    assert draft.propose(4)
    assert (draft.num_drafted, draft.num_accepted) == (32, 11)


def test_rewind_forgets() -> None:
    draft = NgramDraft(4)
    draft.extend([1, 2, 3, 4, 5, 1, 2, 3, 7])
    draft.rewind(8)
    assert draft.propose(1) == []
    draft.rewind(3)
    draft.extend([6, 1, 2, 3])
    assert draft.propose(2) == [6, 1]


requests = st.lists(
    st.tuples(
        st.lists(st.integers(2, 5), min_size=1, max_size=12),
        st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 0.0, 0.4]),
            seed=st.integers(0, 9),
            max_new_tokens=st.integers(1, 40),
            stop_ids=st.lists(st.integers(0, 60), max_size=4),
            min_new_tokens=st.sampled_from([0, 1]),
            presence_penalty=st.sampled_from([0.0, 0.0, 0.5]),
            logprobs=st.sampled_from([None, 0]),
        ),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=30)
@given(requests, st.integers(1, 7), st.integers(0, 12), st.sampled_from([1, 4]))
def test_drafts_change_no_token(
    asked: list[tuple[list[int], SamplingParams]], draft_tokens: int, extra: int, page_size: int
) -> None:
    prompts, params = [prompt for prompt, _ in asked], [one for _, one in asked]
    outs = []
    for count in (0, draft_tokens):
        model = MockModel(memory=2)
        gen = generator(model, draft=count, max_step_tokens=4 + extra, page_size=page_size, max_tokens=56)
        outs.append(gen.generate(prompts, params))
        assert is_idle(gen)
    assert outs[0] == outs[1]


def test_repeating_text_takes_few_steps() -> None:
    params = SamplingParams(temperature=0, max_new_tokens=60)
    whole = expected([3, 4], params, memory=1)
    assert len(set(whole)) < 20
    models = [MockModel(memory=1) for _ in range(2)]
    plain, drafted = (
        generator(model, draft=count).generate([3, 4], params) for model, count in zip(models, (0, 6), strict=True)
    )
    assert list(drafted.token_ids) == whole
    assert drafted == plain
    assert len(models[1].steps) < len(models[0].steps) / 2
    assert (plain.drafted_tokens, plain.accepted_tokens) == (0, 0)
    assert 60 - len(models[1].steps) == drafted.accepted_tokens <= drafted.drafted_tokens


def test_drafts_with_banned_strings_and_stops() -> None:
    def text(count: int, **options: object) -> Completion:
        params = SamplingParams(temperature=0, max_new_tokens=60, **options)
        return generator(MockModel(tokenizer=TOKENIZER, memory=1), draft=count).generate([70, 71], params)

    plain = text(0).text
    accepted = 0
    # Bans that hit before and inside the part that repeats, and stops at any place of a draft.
    for start in range(10, 50, 4):
        for options in ({"banned_strings": [plain[start : start + 3]]}, {"stop": [plain[start : start + 9]]}):
            first, second = text(0, **options), text(5, **options)
            assert first == second
            accepted += second.accepted_tokens
    assert accepted > 20


def test_penalties_forget_wrong_drafts() -> None:
    params = SamplingParams(temperature=0, presence_penalty=0.5)
    one = Sequence(0, (1, 2), params, SamplerState(params, (1, 2)), drafter=NgramDraft(4), drafts=[7, 8])
    one.num_computed = 4
    # Every row sees the drafts before it, and the next step none of the wrong ones.
    assert [sorted(row.edits.ids.tolist()) for row in one.rows()] == [[1, 2], [1, 2, 7], [1, 2, 7, 8]]
    assert one.accept([7, 5, 6])
    assert (one.generated, one.drafts, one.num_computed) == ([7, 5], [], 3)
    assert [sorted(row.edits.ids.tolist()) for row in one.rows()] == [[1, 2, 5, 7]]
    assert (one.drafter.num_drafted, one.drafter.num_accepted) == (2, 1)
    one.drafts = [8]
    assert not one.accept([-1, 3])
    assert (one.generated, one.drafter.num_accepted) == ([7, 5], 1)


def test_bad_logits_behind_a_draft_end_the_request_where_they_are() -> None:
    # With a memory of everything, a poisoned history has NaN behind its sixth token, drafted or not.
    prompt = [POISON, 2, 2, 2]
    outs = [generator(draft=count).generate(prompt, SamplingParams(temperature=0)) for count in (0, 6)]
    assert outs[0].token_ids == outs[1].token_ids
    assert isinstance(outs[1].error, NonFiniteLogits)
    assert str(outs[0].error) == str(outs[1].error)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="draft must be a DraftModel or at least 0, got -1"):
        generator(draft=-1)
