"""Drafts of a smaller model: they change no token, and a model that drafts for itself is always right."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qinfer.engine.draft_model import DraftModel
from qinfer.engine.generator import Generator
from qinfer.engine.job import Completion
from qinfer.engine.sampling import SamplingParams
from qinfer.errors import NonFiniteLogits, UnsupportedError
from qinfer.models.batch import Batch
from qinfer.models.model import Model
from tests.engine.mock import (
    POISON,
    TOKENIZER,
    VOCAB,
    MockCache,
    MockModel,
    drain,
    expected,
    generator,
    is_idle,
    logits_after,
)
from tests.models import tiny


class Biased(MockModel):
    """A model that is nearly another one, with a vocabulary of its own size."""

    def __init__(self, bias: float = 0.0, vocab: int = VOCAB, **options: Any) -> None:
        super().__init__(**options)
        self.config = SimpleNamespace(
            vocab_size=vocab, max_positions=self.config.max_positions, longest_window=options.get("memory") or None
        )
        self.bias = bias * torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))

    def decoder(self, batch: Batch, cache: MockCache) -> torch.Tensor:
        logits = super().decoder(batch, cache) + self.bias
        more = self.config.vocab_size - VOCAB
        return logits[:, : VOCAB + more] if more <= 0 else torch.nn.functional.pad(logits, (0, more), value=50.0)


def drafted(draft: MockModel, num_tokens: int = 4, target: MockModel | None = None, **options: Any) -> Generator:
    return generator(target, draft=DraftModel(draft, num_tokens), **options)


requests = st.lists(
    st.tuples(
        st.lists(st.integers(2, 5), min_size=1, max_size=14),
        st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 0.4, 1.0]),
            seed=st.integers(0, 9),
            max_new_tokens=st.integers(1, 16),
            stop_ids=st.lists(st.integers(0, 60), max_size=4),
            presence_penalty=st.sampled_from([0.0, 0.5]),
            top_k=st.sampled_from([0, 3]),
            mirostat_tau=st.sampled_from([0.0, 0.0, 2.0]),
            logprobs=st.sampled_from([None, 0]),
        ),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=8, deadline=None)
@given(requests, st.integers(1, 6), st.integers(0, 12), st.sampled_from([1, 4]), st.sampled_from([0.0, 1.5]))
def test_drafts_change_no_token(
    asked: list[tuple[list[int], SamplingParams]], num_tokens: int, extra: int, page_size: int, bias: float
) -> None:
    prompts, params = [prompt for prompt, _ in asked], [one for _, one in asked]
    sizes = {"max_step_tokens": 4 + extra, "page_size": page_size, "max_tokens": 56}
    wanted = generator(MockModel(memory=2), **sizes).generate(prompts, params)
    gen = drafted(Biased(bias, memory=2), num_tokens, MockModel(memory=2), **sizes)
    # The second time most of the prompts are in the pool.
    for _ in range(2):
        outs = gen.generate(prompts, params)
        assert outs == wanted
        assert is_idle(gen)
        if bias == 0:
            assert all(out.accepted_tokens == out.drafted_tokens for out in outs)


def test_own_drafts_are_right_whatever_happens_to_pages() -> None:
    """The mock's logits follow from all that its pages hold: one id missing there, and the guess is another."""
    gen = drafted(Biased(), target=MockModel(), max_tokens=64, max_step_tokens=12)
    params = [SamplingParams(temperature=t, seed=3, max_new_tokens=30) for t in (0, 1, 0.7, 0)]
    beginning = list(range(20, 40))
    jobs = [gen.submit([*beginning[: 5 * i + 5], i], one) for i, one in enumerate(params)]
    for _ in range(4):
        gen.step()
    jobs[2].cancel()
    drain(gen)
    late = gen.submit([*beginning, 3], params[1])
    drain(gen)
    outs: list[Completion] = [job.completion for job in (*jobs, late)]
    for job, out in zip([*jobs, late], outs, strict=True):
        if job is not jobs[2]:
            assert list(out.token_ids) == expected(job.sequence.prompt, job.sequence.params)
        assert out.accepted_tokens == out.drafted_tokens
    assert sum(out.drafted_tokens for out in outs) > 50
    assert sum(job.sequence.num_preempted for job in jobs) > 0
    assert late.completion.cached_tokens > 0
    assert is_idle(gen)


def test_good_drafts_take_few_steps() -> None:
    params = SamplingParams(temperature=1, seed=0, max_new_tokens=40)
    target, draft = MockModel(), Biased()
    out = drafted(draft, 4, target).generate([3, 4], params)
    assert list(out.token_ids) == expected([3, 4], params)
    # One step for the prompt, then five ids a step, and less at the end.
    assert len(target.steps) == 1 + math.ceil(39 / 5)
    assert (out.drafted_tokens, out.accepted_tokens) == (31, 31)
    for temperature in (0, 1):
        asked = [replace(params, seed=seed, temperature=temperature) for seed in range(4)]
        outs = drafted(Biased(0.5), 3, MockModel()).generate([[3, seed] for seed in range(4)], asked)
        assert sum(out.accepted_tokens for out in outs) > 30


def test_banned_strings_and_healing() -> None:
    def outs(**options: Any) -> list[Completion]:
        gen = generator(MockModel(tokenizer=TOKENIZER, memory=1), **options)
        params = SamplingParams(temperature=0, max_new_tokens=40)
        plain = gen.generate([70, 71], params)
        asked = [{"banned_strings": [plain.text[i : i + 3]]} for i in (4, 12, 20)] + [{"token_healing": True}]
        return [plain, *(gen.generate([70, 71], replace(params, **options)) for options in asked)]

    wanted = outs()
    draft = Biased(memory=1)
    target = MockModel(tokenizer=TOKENIZER, memory=1)
    draft.tokenizer = SimpleNamespace(first_difference=lambda other: None if other is TOKENIZER else "x")
    assert outs(draft=DraftModel(draft)) == wanted
    draft.tokenizer = SimpleNamespace(first_difference=lambda other: "<pad>")
    with pytest.raises(ValueError, match="must have its target's vocabulary; token '<pad>' is not the same in both"):
        drafted(draft, target=target)


def test_ids_and_positions_that_the_draft_model_has_not() -> None:
    params = SamplingParams(temperature=1, seed=1, max_new_tokens=30)
    for vocab in (VOCAB - 60, VOCAB, VOCAB + 12):
        draft = Biased(vocab=vocab, max_positions=20)
        texts = {"decode": lambda ids: "", "own_texts": defaultdict(lambda: None)}
        tokenizer = SimpleNamespace(first_difference=lambda other: None, encode=None, **texts)
        draft.tokenizer = tokenizer
        prompts = [[3, 4], [5, VOCAB - 1, 6], list(range(2, 40))]
        wanted = [expected(prompt, params) for prompt in prompts]
        outs = drafted(draft, target=MockModel(tokenizer=tokenizer)).generate(prompts, params)
        assert [list(out.token_ids) for out in outs] == wanted
        # Nobody drafts behind position 20, or behind an id that the draft model does not know.
        unknown = any(token >= vocab for token in (3, 4, *wanted[0]))
        assert 8 < outs[0].drafted_tokens < 18 or unknown
        assert (outs[1].drafted_tokens > 0) == (vocab >= VOCAB)
        assert outs[2].drafted_tokens == 0


def test_a_broken_draft_model_costs_nothing_but_time() -> None:
    class Broken(Biased):
        def decoder(self, batch: Batch, cache: MockCache) -> torch.Tensor:
            return super().decoder(batch, cache) * torch.nan

    params = SamplingParams(temperature=0, max_new_tokens=12)
    out = drafted(Broken()).generate([3, 4], params)
    assert (list(out.token_ids), out.drafted_tokens) == (expected([3, 4], params), 0)
    # The target's own failure is told as ever.
    out = drafted(Biased()).generate([POISON, 2, 2, 2], params)
    assert isinstance(out.error, NonFiniteLogits)
    failing = Biased()
    failing.fail_at = 3
    gen = drafted(failing)
    with pytest.raises(RuntimeError, match="on fire"):
        gen.generate([3, 4], params)
    assert is_idle(gen)
    assert list(gen.generate([3, 4], params).token_ids) == expected([3, 4], params)


def test_distribution_of_two_tokens() -> None:
    """Frequencies against the exact probabilities of all pairs: chi-squared, for a draft that is often wrong."""
    count, k = 700, 3
    gen = drafted(Biased(1.0, memory=1), 2, MockModel(memory=1), max_batch=50, max_tokens=800, max_step_tokens=200)
    params = [SamplingParams(temperature=1.5, top_k=k, seed=seed, max_new_tokens=3) for seed in range(count)]
    outs = [out for i in range(0, count, 50) for out in gen.generate([[7]] * 50, params[i : i + 50])]
    seen = Counter(out.token_ids[:2] for out in outs)

    def chances(last: int) -> dict[int, float]:
        top = (logits_after([last]) / 1.5).topk(k)
        return dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))

    exact = {(a, b): p * q for a, p in chances(7).items() for b, q in chances(a).items()}
    assert set(seen) <= set(exact)
    statistic = sum((seen[pair] - count * p) ** 2 / (count * p) for pair, p in exact.items())
    assert statistic < 27.9  # 8 degrees of freedom: 0.05 % of fair generators are above; seeds are fixed
    accepted, drafts = sum(out.accepted_tokens for out in outs), sum(out.drafted_tokens for out in outs)
    assert 0.1 < accepted / drafts < 0.9


@pytest.mark.parametrize(("target", "draft", "both"), [(8, None, None), (8, 20, 20), (None, 8, None), (9, 4, 9)])
def test_pages_stay_as_long_as_either_model_looks_at_them(
    target: int | None, draft: int | None, both: int | None
) -> None:
    gen = drafted(Biased(memory=draft or 0), target=MockModel(memory=target or 0))
    assert gen.scheduler.window.length == both


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="num_tokens of a draft model must be at least 1, got 0"):
        DraftModel(MockModel(), 0)
    with pytest.raises(ValueError, match=r"vocabulary of 340 ids, got 300"):
        drafted(Biased(vocab=300))
    split = Biased()
    split.comm = SimpleNamespace(size=2)
    with pytest.raises(UnsupportedError, match=r"drafts from the text \(draft=8\) work everywhere"):
        drafted(split)
    far = Biased()
    far.device = torch.device("meta")
    with pytest.raises(ValueError, match="must be on cpu as its target is, got meta"):
        drafted(far)


def write(path: Path, kind: str, vocab: int, **changes: Any) -> Model:
    """A tiny model with the mock's tokenizer and a vocabulary that is padded to its own size."""
    tiny.save(path, kind, vocab_size=vocab, eos_token_id=0, **changes)
    TOKENIZER.tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return Model.load(path, device="cpu")


def test_real_models(tmp_path: Path) -> None:
    target = write(tmp_path / "target", "qwen3", 352, head_dim=16)
    other = write(tmp_path / "other", "llama", VOCAB, num_hidden_layers=1, max_position_embeddings=64)
    texts = [[*tiny.prompt(length, seed=length)] for length in (1, 37, 16)]
    params = [SamplingParams(temperature=t, seed=1, max_new_tokens=14, ignore_eos=True) for t in (0, 1, 0.6)]
    sizes = {"max_tokens": 96, "page_size": 16, "max_step_tokens": 24, "max_batch": 3}
    for kv_format, drafts in (("fp32", target), ("q4", other)):
        plain = Generator(target, kv_format=kv_format, **sizes)
        wanted = plain.generate(texts, params)
        gen = Generator(target, kv_format=kv_format, draft=DraftModel(drafts, 3), **sizes)
        for _ in range(2):
            outs = gen.generate(texts, params)
            assert outs == wanted
            assert all(out.drafted_tokens > 5 for out in outs)
            if drafts is target:
                assert all(out.accepted_tokens == out.drafted_tokens for out in outs)
        assert gen.pages.num_used == 0
    loaded = DraftModel.load(tmp_path / "other", target)
    assert (loaded.model.dtype, loaded.num_tokens) == (torch.float32, 4)
