"""Classifier-free guidance: two prompts, one stream of tokens, and pages that come and go together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qinfer.engine.generator import Generator
from qinfer.engine.sampling import SamplingParams, guide
from qinfer.models.model import Model
from tests.engine import test_options
from tests.engine.mock import TOKENIZER, MockModel, drain, expected, generator, is_idle, logits_after
from tests.models import tiny

GUIDED = SamplingParams(temperature=0, max_new_tokens=8, guidance_scale=2.0, negative_prompt=[31, 32, 33])

prompts = st.lists(st.integers(20, 22), min_size=1, max_size=24)
requests = st.tuples(
    prompts,
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.7]),
        seed=st.integers(0, 9),
        max_new_tokens=st.integers(1, 12),
        stop_ids=st.lists(st.integers(0, 99), max_size=10),
        guidance_scale=st.sampled_from([1.0, 1.7, -0.5]),
        negative_prompt=prompts,
    ),
)


@settings(max_examples=25)
@given(
    st.lists(requests, min_size=1, max_size=5),
    st.sampled_from([1, 4]),
    st.integers(4, 30),
    st.integers(2, 4),
    st.sampled_from([0, 3]),
    st.integers(1, 9),
)
def test_tokens_are_those_of_the_formula(
    asked: list[tuple[list[int], SamplingParams]],
    page_size: int,
    max_step_tokens: int,
    max_batch: int,
    draft_tokens: int,
    max_mixed_tokens: int,
) -> None:
    # Prompts of any lengths in chunks of any size, in a pool that does not hold many of them.
    gen = generator(
        page_size=page_size,
        max_step_tokens=max_step_tokens,
        max_batch=max_batch,
        draft=draft_tokens,
        max_tokens=72,
    )
    gen.scheduler.max_mixed_tokens = max_mixed_tokens
    outs = gen.generate([prompt for prompt, _ in asked], [params for _, params in asked])
    for (prompt, params), out in zip(asked, outs, strict=True):
        assert list(out.token_ids) == expected(prompt, params)
        assert out.prompt_tokens == len(prompt)
    assert all(len(step) <= max_batch for step in gen.model.steps)
    assert is_idle(gen)


@settings(max_examples=20)
@given(prompts, st.sampled_from([-3.0, 0.5, 7.0]), st.sampled_from([0.0, 0.9]), st.sampled_from([1.0, 1.3]))
def test_equal_prompts_and_scale_one_change_nothing(
    prompt: list[int], scale: float, temperature: float, penalty: float
) -> None:
    plain = SamplingParams(seed=3, temperature=temperature, repetition_penalty=penalty, max_new_tokens=6, logprobs=2)
    wanted = generator().generate(prompt, plain)
    same = replace(plain, guidance_scale=scale, negative_prompt=prompt)
    one = replace(plain, guidance_scale=1.0, negative_prompt=[5])
    gen = generator()
    assert gen.generate([prompt] * 3, [same, one, plain]) == [wanted] * 3
    assert is_idle(gen)


def test_pairs_give_way_and_come_back_together() -> None:
    # Two pairs that want the whole pool each, and a single request between them.
    gen = generator(max_tokens=40)
    params = replace(GUIDED, max_new_tokens=14, negative_prompt=[31, 32])
    jobs = [gen.submit([20 + i], params if i != 1 else replace(params, guidance_scale=1.0)) for i in range(3)]
    sequences = [job.sequence for job in jobs]
    while gen.scheduler.has_work:
        gen.step()
        for sequence in sequences:
            assert len({bool(one.pages) for one in sequence.members}) == 1
            assert len({one.num_tokens - len(one.prompt) for one in sequence.members}) == 1
    gen.step()
    assert sum(sequence.num_preempted for sequence in sequences) > 0
    assert [list(job.completion.token_ids) for job in jobs] == [expected(one.prompt, one.params) for one in sequences]
    assert is_idle(gen)


@pytest.mark.parametrize("steps", range(7))
def test_cancel_returns_the_pages_of_both(steps: int) -> None:
    gen = generator(max_step_tokens=4)
    other = gen.submit([9, 8], SamplingParams(temperature=0, max_new_tokens=12))
    job = gen.submit(list(range(20, 29)), GUIDED)
    for _ in range(steps):
        gen.step()
    held = gen.pages.num_used
    job.cancel()
    assert gen.pages.num_used == len(other.sequence.pages) <= held
    drain(gen)
    assert list(other.completion.token_ids) == expected([9, 8], other.sequence.params)
    assert is_idle(gen)


def test_failing_step_fails_the_pair() -> None:
    # Step 1 computes the negative prompt alone: the request is in it all the same.
    model = MockModel()
    gen = generator(model, max_step_tokens=4)
    job = gen.submit([20], replace(GUIDED, negative_prompt=[31] * 4))
    model.fail_at = 0
    with pytest.raises(RuntimeError, match="on fire"):
        drain(gen)
    assert model.steps == [[3]]
    assert job.completion.finish_reason == "error"
    assert is_idle(gen)


# The second goes back within a page that nobody knows yet, the first behind one that others may share.
@pytest.mark.parametrize("first", [20, 21])
def test_banned_strings_rewind_both(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def guided_after(history: list[int]) -> torch.Tensor:
        return guide(logits_after(history), logits_after([*GUIDED.negative_prompt, *history[2:]]), 2.0)

    monkeypatch.setattr(test_options, "logits_after", guided_after)
    gen = generator(MockModel(tokenizer=TOKENIZER))
    plain = gen.generate([first, 21], replace(GUIDED, max_new_tokens=20))
    banned = next(character for character in plain.text[3:] if character != "\ufffd")
    params = replace(GUIDED, max_new_tokens=20, banned_strings=banned)
    out = gen.generate([first, 21], params)
    assert banned not in out.text
    assert list(out.token_ids) == test_options.reference([first, 21], params)
    assert is_idle(gen)


def test_logprobs_are_those_of_the_prompt() -> None:
    out = generator().generate([20, 21], replace(GUIDED, logprobs=0, prompt_logprobs=0))
    for place, said in enumerate(out.logprobs):
        logs = logits_after([20, 21, *out.token_ids[:place]]).double().log_softmax(-1)
        assert said.chosen == pytest.approx(float(logs[out.token_ids[place]]), abs=1e-5)
    assert out.prompt_logprobs[1].chosen == pytest.approx(float(logits_after([20]).log_softmax(-1)[21]), abs=1e-5)


def test_a_real_model_is_guided(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama")
    model = Model.load(tmp_path, device="cpu")
    gen = Generator(model, kv_format="fp32", max_tokens=512, page_size=16)
    prompt, negative = tiny.prompt(30), tiny.prompt(17, seed=1)
    params = replace(GUIDED, negative_prompt=negative, ignore_eos=True)
    plain = replace(params, guidance_scale=1.0)
    ids: list[int] = []
    while len(ids) < 8:
        positive, other = (model.logits([*one, *ids])[-1].log_softmax(-1) for one in (prompt, negative))
        ids.append(int((2 * positive - other).argmax()))
    alone = gen.generate(prompt, params)
    assert list(alone.token_ids) == ids
    assert gen.generate([prompt, negative, prompt], [plain, plain, params])[2] == alone
    assert gen.generate(prompt, plain) != alone


def test_refusals() -> None:
    with pytest.raises(ValueError, match="guidance_scale must be 1 without negative_prompt, got 2"):
        SamplingParams(guidance_scale=2)
    with pytest.raises(ValueError, match="guidance_scale must be finite"):
        SamplingParams(guidance_scale=float("inf"), negative_prompt=[1])
    with pytest.raises(ValueError, match="token_healing must be False beside a negative_prompt"):
        SamplingParams(guidance_scale=2, negative_prompt=[1], token_healing=True)
    with pytest.raises(TypeError, match="negative_prompt must hold integers"):
        SamplingParams(negative_prompt=[1.5])
    with pytest.raises(ValueError, match=r"5 negative_prompt tokens .* page pool holds 12"):
        generator(max_tokens=12).submit([1], replace(GUIDED, negative_prompt=[1] * 5))
    with pytest.raises(ValueError, match="needs 6 pages, the pool has 4"):
        generator(max_tokens=16).submit([1], GUIDED)
    with pytest.raises(ValueError, match="max_batch must be at least 2 for a negative_prompt"):
        generator(max_batch=1).submit([1], GUIDED)
    with pytest.raises(ValueError, match="must be a list of token ids"):
        generator().submit([1], replace(GUIDED, negative_prompt="text"))
