"""What a request may ask of its text beyond a choice of tokens: minimum length, logprobs, banned strings, healing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qinfer.assets import STORYTELLER
from qinfer.engine.sampling import SamplingParams
from qinfer.tokenizer import Tokenizer
from tests.engine.mock import TOKENIZER, VOCAB, MockModel, expected, generator, is_idle, logits_after


def test_end_comes_after_min_new_tokens() -> None:
    params = SamplingParams(temperature=0, max_new_tokens=12)
    plain = expected([5], params)
    eos, stop = plain[2], plain[4]
    model = MockModel(eos_ids=[eos])
    gen = generator(model)
    assert gen.generate([5], params).token_ids == tuple(plain[:3])
    out = gen.generate([5], SamplingParams(temperature=0, max_new_tokens=12, stop_ids=[stop], min_new_tokens=7))
    assert len(out.token_ids) >= 7
    assert not {eos, stop} & set(out.token_ids[:7])
    # Up to the first ban nothing changes, and each token is the likeliest of those allowed.
    history = [5]
    for place, token in enumerate(out.token_ids):
        logits = logits_after(history)
        if place < 7:
            logits[[eos, stop]] = -torch.inf
        assert token == int(logits.argmax())
        history.append(token)
    # Ids that end nothing are not banned.
    free = SamplingParams(temperature=0, max_new_tokens=12, min_new_tokens=7, ignore_eos=True)
    assert gen.generate([5], free).token_ids == tuple(plain)


def test_logprobs() -> None:
    gen = generator(MockModel(tokenizer=TOKENIZER))
    several = [SamplingParams(seed=1, max_new_tokens=5, logprobs=n) for n in (0, 3)] + [
        SamplingParams(max_new_tokens=5)
    ]
    jobs = [gen.submit([7], one) for one in several]
    events = []
    while gen.scheduler.has_work:
        events += gen.step()
    for job, count in zip(jobs, (0, 3, None), strict=True):
        out = job.completion
        assert out is not None
        assert [x for event in events if event.job == job.id for x in event.logprobs] == list(out.logprobs)
        assert len(out.logprobs) == (0 if count is None else 5)
        for place, said in enumerate(out.logprobs):
            logs = logits_after([7, *out.token_ids[:place]]).double().log_softmax(-1)
            assert said.chosen == pytest.approx(float(logs[out.token_ids[place]]), abs=1e-5)
            top = logs.topk(count or 0)
            assert [token for token, _ in said.top] == top.indices.tolist()
            assert [value for _, value in said.top] == pytest.approx(top.values.tolist(), abs=1e-5)


def reference(prompt: list[int], params: SamplingParams) -> list[int]:
    """Greedy ids of a request with banned strings, by the definition: try, look, and go back."""
    ids: list[int] = []
    tried: dict[int, set[int]] = {}
    while len(ids) < params.max_new_tokens:
        logits = logits_after([*prompt, *ids])
        logits[list(tried.get(len(ids), ()))] = -torch.inf
        ids.append(int(logits.argmax()))
        texts = [TOKENIZER.decode(ids[: i + 1]) for i in range(len(ids))]
        found = [start for banned in params.banned_strings if (start := texts[-1].find(banned)) >= 0]
        if found:
            place = next(i for i, text in enumerate(texts) if len(text.rstrip("\ufffd")) > min(found))
            tried = {i: bans for i, bans in tried.items() if i <= place}
            tried.setdefault(place, set()).add(ids[place])
            del ids[place:]
    return ids


@given(st.integers(0, 999), st.sampled_from([1, 2, 4]), st.data())
def test_banned_strings_never_appear(seed: int, page_size: int, data: st.DataObject) -> None:
    prompt = [2 + seed % 200, 9]
    plain = SamplingParams(temperature=0, max_new_tokens=14)
    text = TOKENIZER.decode(expected(prompt, plain))
    start = data.draw(st.integers(0, max(0, len(text) - 4)))
    pieces = [text[start : start + length] for length in data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))]
    banned = tuple(piece for piece in pieces if "\ufffd" not in piece and piece) or ("e",)
    params = SamplingParams(temperature=0, max_new_tokens=14, banned_strings=banned)
    gen = generator(MockModel(tokenizer=TOKENIZER), page_size=page_size, max_tokens=96)
    # Another request in the batch, which shares the prompt, and its pages, with the first.
    first, other = gen.generate([prompt, prompt], [params, plain])
    assert list(first.token_ids) == reference(prompt, params)
    assert list(other.token_ids) == expected(prompt, plain)
    assert first.text == TOKENIZER.decode(first.token_ids)
    assert not any(string in first.text for string in banned)
    assert list(gen.generate(prompt, params).token_ids) == list(first.token_ids)
    assert is_idle(gen)


def test_token_healing() -> None:
    model = MockModel(tokenizer=TOKENIZER)
    gen = generator(model)
    prompt = TOKENIZER.encode("the fox said h")
    allowed = TOKENIZER.continuations(prompt[-1])
    assert len(allowed) > 1
    params = SamplingParams(temperature=0, max_new_tokens=6, token_healing=True)
    out = gen.generate("the fox said h", params)
    logits = logits_after(prompt[:-1])
    first = max(allowed, key=lambda token: float(logits[token]))
    assert out.token_ids[0] == first
    assert list(out.token_ids[1:]) == expected([*prompt[:-1], first], SamplingParams(temperature=0, max_new_tokens=5))
    assert out.prompt_tokens == len(prompt)
    assert "the fox said h" + out.text == TOKENIZER.decode([*prompt[:-1], *out.token_ids])
    # A token that nothing else begins like stays, and so does one that is alone.
    for stays in ([5, VOCAB - 1], prompt[-1:]):
        assert gen.generate(stays, params).token_ids == tuple(expected(stays, params))


def test_continuations_of_a_real_vocabulary() -> None:
    tokenizer = Tokenizer.load(STORYTELLER)
    token = tokenizer.encode(" th", add_special_tokens=False)[-1]
    found = tokenizer.continuations(token)
    assert token in found
    assert len(found) > 1
    begins = [tokenizer.decode([other]).startswith(tokenizer.decode([token])) for other in range(tokenizer.vocab_size)]
    assert sorted(found) == [other for other, is_one in enumerate(begins) if is_one]
    (end,) = tokenizer.eos_ids
    assert tokenizer.continuations(end) == [end]


@pytest.mark.parametrize("field", ["banned_strings", "token_healing", "stop"])
def test_text_needs_a_tokenizer(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=.* needs a tokenizer"):
        generator().submit([1], SamplingParams(**{field: True if field == "token_healing" else "x"}))
    with pytest.raises(ValueError, match="banned_ids must hold ids below 340"):
        generator().submit([1], SamplingParams(banned_ids=[VOCAB]))
