"""Logprobs of prompts: those of the whole text at once, however it is cut, shared, preempted or accompanied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qinfer.engine import scheduler, scoring
from qinfer.engine.generator import Generator
from qinfer.engine.job import Completion
from qinfer.engine.sampling import SamplingParams
from qinfer.models.model import Model
from tests.engine.mock import VOCAB, MockModel, expected, generator, is_idle, logits_after
from tests.models import tiny


def check(out: Completion, prompt: Sequence[int], top_n: int, logits: torch.Tensor) -> None:
    """Compare with [T, V] logits of the whole prompt."""
    assert len(out.prompt_logprobs) == len(prompt)
    assert out.prompt_logprobs[0] is None
    logs = logits.double().log_softmax(-1)
    for place, said in enumerate(out.prompt_logprobs[1:]):
        assert said is not None
        assert said.chosen == pytest.approx(float(logs[place, prompt[place + 1]]), abs=2e-4)
        assert len(said.top) == top_n
        assert [value for _, value in said.top] == pytest.approx(logs[place].topk(top_n).values.tolist(), abs=2e-4)
        assert [float(logs[place, token]) for token, _ in said.top] == pytest.approx([v for _, v in said.top], abs=2e-4)


requests = st.tuples(
    st.integers(1, 30),
    st.integers(1, 12),
    st.sampled_from([None, 0, 2]),
)


@settings(max_examples=20)
@given(
    st.lists(requests, min_size=1, max_size=4),
    st.sampled_from([1, 4]),
    st.integers(4, 30),
    st.sampled_from([0, 3]),
    st.integers(2, 40),
)
def test_every_prompt_token_is_scored_once(
    asked: list[tuple[int, int, int | None]], page_size: int, chunk: int, draft_tokens: int, rows: int
) -> None:
    # Prompts are beginnings of one text, so pages are shared, and the pool is too small for all of them.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "_SCORED_TOKENS", 9)
        patch.setattr(scoring, "_ROWS", rows)
        model = MockModel()
        gen = generator(
            model, draft=draft_tokens, page_size=page_size, max_step_tokens=chunk, max_tokens=56, max_batch=3
        )
        prompts = [list(range(20, 20 + length)) for length, _, _ in asked]
        params = [SamplingParams(temperature=0, max_new_tokens=new, prompt_logprobs=top) for _, new, top in asked]
        for _ in range(2):
            for prompt, one, out in zip(prompts, params, gen.generate(prompts, params), strict=True):
                assert list(out.token_ids) == expected(prompt, one)
                if one.prompt_logprobs is None:
                    assert out.prompt_logprobs == ()
                    continue
                logits = torch.stack([logits_after(prompt[:end]) for end in range(1, len(prompt) + 1)])
                check(out, prompt, one.prompt_logprobs, logits)
                assert out.cached_tokens == 0 or len(prompt) == 1
            assert is_idle(gen)


def test_a_prompt_that_gives_way_half_scored_goes_on_where_it_was() -> None:
    # One prompt token beside a stream.
    gen = generator(max_tokens=40, max_batch=2, max_step_tokens=2)
    gen.scheduler.max_mixed_tokens = 1
    prompt = list(range(20, 44))
    first = gen.submit(list(range(50, 61)), SamplingParams(temperature=0, max_new_tokens=28), priority=1)
    scored = gen.submit(prompt, SamplingParams(temperature=0, max_new_tokens=3, prompt_logprobs=1))
    while not scored.sequence.num_preempted:
        gen.step()
    # In the middle of a page, so that some tokens are computed again and not scored again.
    assert scored.sequence.num_scored < 20
    assert scored.sequence.num_scored % 4
    while gen.scheduler.has_work:
        gen.step()
    assert first.completion is not None
    assert scored.completion is not None
    check(scored.completion, prompt, 1, torch.stack([logits_after(prompt[:end]) for end in range(1, 25)]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path: Path = tmp_path_factory.mktemp("scoring") / "llama"
    tiny.save(path, "llama")
    return Model.load(path, device="cpu")


def test_scores_of_a_model(model: Model) -> None:
    gen = Generator(model, kv_format="fp32", max_tokens=512, page_size=16, max_step_tokens=70)
    prompt = tiny.prompt(120)
    plain = SamplingParams(temperature=0, max_new_tokens=4)
    scored = SamplingParams(temperature=0, max_new_tokens=4, prompt_logprobs=3, logprobs=0)
    warm = gen.generate(prompt, plain)
    out, other = gen.generate([prompt, prompt[:50]], [scored, plain])
    assert (out.token_ids, out.cached_tokens) == (warm.token_ids, 0)
    assert other.cached_tokens == 48
    check(out, prompt, 3, model.logits(prompt))
    # Its own pages are there for others all the same.
    assert gen.generate(prompt, plain).cached_tokens == 112


def test_cancelled_while_it_is_scored() -> None:
    gen = generator(MockModel(), max_step_tokens=4)
    job = gen.submit(list(range(20, 40)), SamplingParams(prompt_logprobs=0))
    for _ in range(3):
        gen.step()
    job.cancel()
    assert job.completion is not None
    assert 1 < len(job.completion.prompt_logprobs) < 20
    gen.step()
    assert is_idle(gen)


def test_more_than_the_vocabulary() -> None:
    for field in ("logprobs", "prompt_logprobs"):
        with pytest.raises(ValueError, match=f"{field} must be at most {VOCAB}"):
            generator().submit([1], SamplingParams(**{field: VOCAB + 1}))
    with pytest.raises(ValueError, match="prompt_logprobs must be None or at least 0"):
        SamplingParams(prompt_logprobs=-1)
