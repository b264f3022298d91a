from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qinfer.engine.constraints import packed
from qinfer.engine.guidance import guided, shadow_of
from qinfer.engine.job import Completion, Job
from qinfer.engine.sampling import Row, SamplerState, SamplingParams, sample
from qinfer.engine.scoring import take_scores
from qinfer.engine.sequence import Sequence
from qinfer.errors import NonFiniteLogits
from qinfer.models.batch import Batch, Piece
from tests.engine.mock import (
    POISON,
    TOKENIZER,
    VOCAB,
    MockModel,
    drain,
    expected,
    generator,
    is_idle,
    logits_after,
    params,
)

GREEDY = SamplingParams(temperature=0, max_new_tokens=8)


# --- what comes out


def test_one_prompt() -> None:
    gen = generator()
    out = gen.generate([5, 6, 7], GREEDY)
    assert out == Completion("", tuple(expected([5, 6, 7], GREEDY)), "length", 3)
    assert is_idle(gen)


prompts = st.lists(
    st.lists(st.integers(0, VOCAB - 1) | st.integers(POISON - 5, POISON + 5), min_size=1, max_size=30),
    min_size=1,
    max_size=6,
)


@given(prompts, st.data(), st.integers(1, 4), st.integers(0, 20), st.sampled_from([1, 4, 16]))
def test_chunks_batches_and_pages_change_nothing(
    texts: list[list[int]], data: st.DataObject, max_batch: int, extra: int, page_size: int
) -> None:
    several = [data.draw(params) for _ in texts]
    gen = generator(page_size=page_size, max_tokens=96, max_batch=max_batch, max_step_tokens=max_batch + extra)
    outs = gen.generate(texts, several)
    for text, one, out in zip(texts, several, outs, strict=True):
        ids = expected(text, one)
        ended = ids and ids[-1] in one.stop_ids
        reason = "stop" if ended else "length" if len(ids) == one.max_new_tokens else "error"
        assert (list(out.token_ids), out.finish_reason, out.prompt_tokens) == (ids, reason, len(text))
    assert is_idle(gen)


def test_same_seed_same_tokens_and_fresh_ones_without() -> None:
    gen = generator()
    first, again, other = (
        gen.generate([1, 2], SamplingParams(seed=seed, max_new_tokens=20)).token_ids for seed in (3, 3, 4)
    )
    assert first == again != other
    free = [gen.generate([1, 2], SamplingParams(max_new_tokens=20)).token_ids for _ in range(2)]
    assert free[0] != free[1]


def test_prompt_is_cut_and_runs_beside_others() -> None:
    model = MockModel()
    gen = generator(model, max_step_tokens=5)
    gen.submit([1, 2, 3], GREEDY)
    gen.submit(list(range(20, 29)), GREEDY)
    drain(gen)
    assert model.steps[:4] == [[3, 2], [1, 4], [1, 3], [1, 1]]


# --- text


def test_stream_joins_to_the_completion() -> None:
    gen = generator(MockModel(tokenizer=TOKENIZER))
    for seed in range(20):
        events = list(gen.stream("the 🦊", SamplingParams(seed=seed, max_new_tokens=30)))
        final = events[-1].completion
        assert final is not None
        assert "".join(event.text for event in events) == final.text == TOKENIZER.decode(final.token_ids)
        assert [token for event in events for token in event.token_ids] == list(final.token_ids)
        assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
        assert final.finish_reason == events[-1].finish_reason == "length"
    assert is_idle(gen)


def test_stop_string_cuts_the_text() -> None:
    gen = generator(MockModel(tokenizer=TOKENIZER))
    whole = gen.generate("owl", SamplingParams(seed=1, max_new_tokens=30))
    stop = next(whole.text[i : i + 3] for i in range(5, 30) if "\ufffd" not in whole.text[i : i + 3])
    out = gen.generate("owl", SamplingParams(seed=1, max_new_tokens=30, stop=stop))
    assert (out.text, out.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert out.token_ids == whole.token_ids[: len(out.token_ids)]
    assert len(out.token_ids) < 30


def test_end_of_sequence() -> None:
    plain = generator(MockModel(tokenizer=TOKENIZER)).generate("owl", SamplingParams(seed=1, max_new_tokens=30))
    last = plain.token_ids[9]
    assert plain.token_ids.index(last) == 9
    gen = generator(MockModel(tokenizer=TOKENIZER, eos_ids=[VOCAB - 1, last]))
    stopped = gen.generate("owl", SamplingParams(seed=1, max_new_tokens=30))
    assert (stopped.token_ids, stopped.finish_reason) == (plain.token_ids[:10], "stop")
    # The text ends before the token that ended it.
    assert stopped.text == TOKENIZER.decode(plain.token_ids[:9])
    ignoring = SamplingParams(seed=1, max_new_tokens=30, ignore_eos=True)
    assert gen.generate("owl", ignoring) == plain
    own = SamplingParams(seed=1, max_new_tokens=30, ignore_eos=True, stop_ids=[last])
    assert gen.generate("owl", own) == stopped


# --- lists


def test_lists_keep_their_order() -> None:
    gen = generator(MockModel(tokenizer=TOKENIZER), max_batch=2)
    texts = ["owl", "the fox", "🦊", "a", "hello to"]
    several = [SamplingParams(seed=i, max_new_tokens=9 - i) for i in range(5)]
    alone = [gen.generate(text, one) for text, one in zip(texts, several, strict=True)]
    assert gen.generate(texts, several) == alone
    assert gen.generate([TOKENIZER.encode(text) for text in texts], several) == alone
    assert gen.generate(["owl"], several[:1]) == alone[:1]


def test_list_with_a_mistake_queues_nothing() -> None:
    gen = generator()
    with pytest.raises(ValueError, match="list of 2, one per prompt, got 1"):
        gen.generate([[1], [2]], [GREEDY])
    with pytest.raises(ValueError, match="got 340"):
        gen.generate([[1], [340]], GREEDY)
    assert is_idle(gen)


# --- mistakes


def test_mistakes_at_submit() -> None:
    gen = generator(max_tokens=40)
    for prompt, message in (
        ([], "at least one"),
        ([1, -1], "got -1"),
        ([VOCAB], f"got {VOCAB}"),
        ("text", "no tokenizer"),
        (
            [1] * 33,
            r"33 prompt tokens \+ max_new_tokens=8 are 41 tokens, the page pool holds 40; raise Generator\(max_",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            gen.submit(prompt, GREEDY)
        with pytest.raises(ValueError, match=message):
            gen.stream(prompt, GREEDY)
        with pytest.raises(ValueError, match=message):
            gen.generate(prompt, GREEDY)
    with pytest.raises(ValueError, match=r"stop=.* needs a tokenizer"):
        gen.submit([1], SamplingParams(stop="x"))
    with pytest.raises(ValueError, match=r"are 11 tokens, the model has 10 positions; .* lower max_new_tokens"):
        generator(MockModel(max_positions=10)).submit([1, 2, 3], GREEDY)
    assert is_idle(gen)
    assert gen.generate([1] * 32, GREEDY).finish_reason == "length"


def test_sizes_are_checked() -> None:
    for sizes, name in (
        ({"max_tokens": 0}, "max_tokens"),
        ({"page_size": 0}, "page_size"),
        ({"max_batch": 0}, "max_b"),
    ):
        with pytest.raises(ValueError, match=name):
            generator(**sizes)
    assert generator(max_tokens=5, page_size=4).pages.num_pages == 2


# --- failures


def test_bad_logits_end_one_request_and_no_other() -> None:
    gen = generator()
    outs = gen.generate([[1, 2], [3, POISON], [4]], GREEDY)
    assert [out.finish_reason for out in outs] == ["length", "error", "length"]
    assert [list(outs[i].token_ids) for i in (0, 2)] == [expected([1, 2], GREEDY), expected([4], GREEDY)]
    assert list(outs[1].token_ids) == expected([3, POISON], GREEDY)
    assert len(outs[1].token_ids) == 5
    assert isinstance(outs[1].error, NonFiniteLogits)
    assert 'dtype="bf16"' in str(outs[1].error)
    assert is_idle(gen)


def test_decoder_that_raises_ends_its_step_only() -> None:
    model = MockModel()
    model.fail_at = 2
    gen = generator(model, max_batch=2)
    first, second, third = (gen.submit([number], GREEDY) for number in (1, 2, 3))
    gen.step()
    gen.step()
    with pytest.raises(RuntimeError, match="on fire"):
        gen.step()
    assert (first.finished, second.finished, third.finished) == (True, True, False)
    assert gen.pages.num_used == 0
    events = drain(gen)
    # What the step before had given is told first: the ids of one step were on their way when the next one failed.
    assert [(event.job, event.finish_reason) for event in events[:4]] == [
        (first.id, None),
        (second.id, None),
        (first.id, "error"),
        (second.id, "error"),
    ]
    assert "on fire" in str(events[2].error)
    assert first.completion is not None
    assert list(first.completion.token_ids) == expected([1], GREEDY)[:2]
    assert third.completion is not None
    assert list(third.completion.token_ids) == expected([3], GREEDY)
    assert is_idle(gen)


@pytest.mark.parametrize("step", range(6))
def test_generate_and_stream_clean_up_when_the_decoder_raises(step: int) -> None:
    model = MockModel()
    model.fail_at = step
    gen = generator(model, max_batch=2, max_step_tokens=3)
    with pytest.raises(RuntimeError, match="on fire"):
        gen.generate([[1, 2, 3, 4], [5], [6]], GREEDY)
    assert is_idle(gen)
    model.fail_at = len(model.steps) + step
    with pytest.raises(RuntimeError, match="on fire"):
        list(gen.stream([1, 2, 3, 4], GREEDY))
    assert is_idle(gen)


def test_tokenizer_that_raises_ends_one_request() -> None:
    class Broken(type(TOKENIZER)):
        def decode(self, ids: list[int]) -> str:
            if bad in ids:
                raise OverflowError("no such id")
            return super().decode(ids)

    fine, broken = expected([1, 2], GREEDY), expected([3, 4], GREEDY)
    bad = next(token for token in broken if token not in fine)
    gen = generator(MockModel(tokenizer=Broken(TOKENIZER.tokenizer)))
    outs = gen.generate([[1, 2], [3, 4]], GREEDY)
    assert [out.finish_reason for out in outs] == ["length", "error"]
    assert isinstance(outs[1].error, OverflowError)
    assert list(outs[0].token_ids) == fine
    assert list(outs[1].token_ids) == broken[: broken.index(bad)]
    assert is_idle(gen)


# --- steps ahead of their ids


class LateModel(MockModel):
    """Notes, for every step, how many ids the host had when the step was launched."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.known: list[list[int]] = []
        self.jobs: list[Job] = []

    def decoder(self, batch: Batch, cache: Any) -> Tensor:
        self.known.append([len(job.sequence.generated) for job in self.jobs])
        return super().decoder(batch, cache)


def test_next_step_is_launched_before_the_ids_are_known() -> None:
    model = LateModel()
    gen = generator(model)
    model.jobs = [gen.submit([number], GREEDY) for number in (1, 2)]
    events = [len(gen.step()) for _ in range(9)]
    # Step n is launched while the host has n - 1 ids; no step follows the one that gives the last.
    assert model.known == [[0, 0], *[[n, n] for n in range(7)]]
    assert events == [0, *[2] * 8]
    assert [list(job.completion.token_ids) for job in model.jobs] == [expected([n], GREEDY) for n in (1, 2)]


def test_step_after_the_end_is_thrown_away() -> None:
    ids = expected([1], GREEDY)
    model = MockModel(eos_ids=[ids[2]])
    gen = generator(model)
    out = gen.generate([1], GREEDY)
    assert (list(out.token_ids), out.finish_reason) == (ids[:3], "stop")
    assert [len(step) for step in model.steps] == [1] * 4
    # The pages of the step that was too many serve the next request.
    model.eos_ids = frozenset()
    assert list(gen.generate([2, 3], GREEDY).token_ids) == expected([2, 3], GREEDY)
    assert is_idle(gen)


# --- cancelling


def test_cancel_in_every_state() -> None:
    gen = generator(MockModel(tokenizer=TOKENIZER), max_batch=2, max_step_tokens=6)
    jobs = [gen.submit(ids, GREEDY) for ids in ([1, 2], [3] * 19, [4])]
    events = gen.step() + gen.step()
    decoding, prompting, waiting = jobs
    for job in jobs:
        job.cancel()
        job.cancel()
        assert job.finished
    assert is_idle(gen)
    events += gen.step()
    for job, tokens in ((decoding, 1), (prompting, 0), (waiting, 0)):
        assert job.completion is not None
        assert (job.completion.finish_reason, len(job.completion.token_ids)) == ("cancelled", tokens)
        own = [event for event in events if event.job == job.id]
        assert own[-1].completion is job.completion
        assert "".join(event.text for event in own) == job.completion.text
    assert gen.step() == []


def test_closing_a_stream_cancels() -> None:
    gen = generator()
    stream = gen.stream([1, 2], GREEDY)
    next(stream)
    assert gen.pages.num_used > 0
    stream.close()
    assert is_idle(gen)


def test_stream_that_nobody_reads_queues_nothing() -> None:
    gen = generator()
    gen.stream([1, 2], GREEDY)
    assert is_idle(gen)


def test_events_reach_the_loop_that_asked() -> None:
    gen = generator()
    job = gen.submit([1], SamplingParams(temperature=0, max_new_tokens=3))
    first, second = gen.stream([2], GREEDY), gen.stream([3], GREEDY)
    next(first)
    assert [list(event.token_ids) for event in second] == [[token] for token in expected([3], GREEDY)]
    assert gen.generate([4], GREEDY).token_ids == tuple(expected([4], GREEDY))
    assert len(list(first)) == 7
    # The submitted job ran along, and its events waited for `step`.
    events = gen.step()
    assert [event.job for event in events] == [job.id] * 3
    assert is_idle(gen)


# --- one transfer


def test_sampling_never_reads_a_tensor() -> None:
    """On the meta device there is nothing to read: an item(), a tolist() or an `if` on a tensor raises."""
    rows = [Row(SamplingParams(temperature=t, top_k=3, top_p=0.9, min_p=0.1), 0.5) for t in (0.0, 0.7)]
    rows += [row._replace(words=packed([1, 3], 7)) for row in rows]
    for chosen in ([rows[0]], rows[:2], rows):
        ids = sample(torch.empty(len(chosen), 7, device="meta"), chosen)
        assert (ids.shape, ids.device.type) == ((len(chosen),), "meta")
    scored = Sequence(1, (1, 2, 3), SamplingParams(prompt_logprobs=2), SamplerState(SamplingParams(), ()))
    scored.shadow = shadow_of(scored, [4, 5, 6])
    step = [(one, 3) for one in scored.members]
    logits, (scores,) = take_scores(
        step, [Piece([1, 2, 3], 0, [0], "all"), Piece([4, 5, 6], 0, [1], "last")], torch.empty(4, 7, device="meta")
    )
    assert [tuple(part.shape) for part in scores.told] == [(2,), (2, 2), (2, 2)]
    assert [tuple(part.shape) for part in guided([one for one, _ in step], logits)] == [(1, 7)] * 2


def test_mock_depends_on_the_whole_history() -> None:
    assert not torch.equal(logits_after([1, 2]), logits_after([2, 2]))
    assert torch.equal(logits_after([1, 2]), logits_after((1, 2)))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((b"bytes", None), "text or token ids, got bytes"),
        (("text", {"temperature": 0}), "params must be SamplingParams or None, got dict"),
        (("text", {}), "params must be SamplingParams or None, got dict"),
        (("text", "more text"), "params must be SamplingParams or None, got str"),
    ],
)
def test_arguments_of_no_kind_are_named(arguments: Any, text: str) -> None:
    gen = generator()
    with pytest.raises(TypeError, match=text):
        gen.submit(*arguments)
    assert is_idle(gen)


@pytest.mark.parametrize("draft", ["small", True, 2.0])
def test_a_draft_of_no_kind_is_named(draft: Any) -> None:
    with pytest.raises(TypeError, match="draft must be a number or a DraftModel"):
        generator(draft=draft)
