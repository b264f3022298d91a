"""The comparison of texts accepts what rounding may decide, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qinfer.assets import STORYTELLER
from qinfer.engine.generator import Generator
from qinfer.engine.job import Completion
from qinfer.engine.sampling import SamplingParams
from qinfer.models.model import Model
from tests.parallel.ties import MASS, TIE, assert_same_but_for_ties

PROMPTS = ["Once upon a time", "The fox"]
GREEDY, DRAWN = SamplingParams(temperature=0, max_new_tokens=6), SamplingParams(seed=3, max_new_tokens=6)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.load(STORYTELLER, device="cpu")


@pytest.fixture(scope="module")
def texts(model: Model) -> list[Completion]:
    return Generator(model, max_tokens=512, max_batch=2).generate(PROMPTS, GREEDY)


def with_token(text: Completion, place: int, token: int) -> Completion:
    return replace(text, token_ids=(*text.token_ids[:place], token, *text.token_ids[place + 1 :]))


def probabilities(model: Model, text: Completion, place: int) -> torch.Tensor:
    assert model.tokenizer is not None
    return model.logits([*model.tokenizer.encode(PROMPTS[1]), *text.token_ids[:place]])[-1].double()


def test_the_same_texts_agree(model: Model, texts: list[Completion]) -> None:
    for params in (GREEDY, DRAWN):
        assert_same_but_for_ties(model, PROMPTS, params, texts, texts)


def test_what_no_tie_decides_has_to_agree(model: Model, texts: list[Completion]) -> None:
    for changed in ({"finish_reason": "stop"}, {"text": ""}, {"token_ids": texts[0].token_ids[:-1]}):
        with pytest.raises(AssertionError):
            assert_same_but_for_ties(model, PROMPTS, GREEDY, [replace(texts[0], **changed), texts[1]], texts)


@pytest.mark.parametrize("place", [0, 5])
def test_greedy_texts_may_part_at_a_tie(
    model: Model, texts: list[Completion], place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = probabilities(model, texts[1], place)
    second = int(logits.topk(2).indices[1])
    other = with_token(texts[1], place, second)
    for behind, is_tie in ((TIE / 2, True), (2 * TIE, False)):
        tied = logits.clone()
        tied[second] = tied.max() - behind
        monkeypatch.setattr(model, "logits", lambda ids, tied=tied: tied[None])
        if is_tie:
            assert_same_but_for_ties(model, PROMPTS, GREEDY, [texts[0], other], texts)
        else:
            with pytest.raises(AssertionError, match=rf"'The fox': texts part at token {place}.*0\.100 behind"):
                assert_same_but_for_ties(model, PROMPTS, GREEDY, [texts[0], other], texts)


def test_drawn_texts_may_part_where_little_lies_between(
    model: Model, texts: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    token = texts[1].token_ids[2]
    other = with_token(texts[1], 2, token + 2 if token + 2 < model.config.vocab_size else token - 2)
    first = min(token, other.token_ids[2])
    for between, may in ((MASS / 2, True), (2 * MASS, False)):
        chances = torch.full((model.config.vocab_size,), 1e-9, dtype=torch.float64)
        chances[[first, first + 2]] = (1 - between) / 2
        chances[first + 1] = between
        monkeypatch.setattr(model, "logits", lambda ids, chances=chances: chances.log()[None])
        if may:
            assert_same_but_for_ties(model, PROMPTS, DRAWN, [texts[0], other], texts)
        else:
            with pytest.raises(AssertionError, match=r"part at token 2.*between which lies 0\.020"):
                assert_same_but_for_ties(model, PROMPTS, DRAWN, [texts[0], other], texts)
