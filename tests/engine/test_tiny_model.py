"""The engine on a real decoder: a tiny random model."""

from pathlib import Path

import pytest
import torch

from qinfer.engine.generator import Generator
from qinfer.engine.sampling import SamplingParams
from qinfer.errors import NonFiniteLogits
from qinfer.models.model import Model
from tests.models import tiny

GREEDY = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
LENGTHS = (1, 37, 16, 5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path: Path = tmp_path_factory.mktemp("engine") / "qwen3"
    tiny.save(path, "qwen3", head_dim=16)
    return Model.load(path, device="cpu")


def by_hand(model: Model, prompt: list[int]) -> tuple[int, ...]:
    """Greedy tokens from the logits of the whole text, computed afresh for every token."""
    ids = list(prompt)
    for _ in range(GREEDY.max_new_tokens):
        ids.append(int(model.logits(ids)[-1].argmax()))
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize(("max_batch", "max_step_tokens"), [(1, 1), (4, 7), (4, 2048)])
def test_greedy_tokens_are_those_of_the_logits(model: Model, max_batch: int, max_step_tokens: int) -> None:
    gen = Generator(
        model, kv_format="fp32", max_tokens=256, page_size=16, max_batch=max_batch, max_step_tokens=max_step_tokens
    )
    texts = [tiny.prompt(length, seed=length) for length in LENGTHS]
    outs = gen.generate(texts, GREEDY)
    assert [out.token_ids for out in outs] == [by_hand(model, text) for text in texts]
    assert gen.pages.num_used == 0


def test_seeded_request_is_the_same_alone_and_in_a_batch(model: Model) -> None:
    gen = Generator(model, kv_format="fp32", max_tokens=256, page_size=16)
    texts = [tiny.prompt(length, seed=length) for length in LENGTHS]
    several = [SamplingParams(seed=i, top_p=0.95, top_k=i * 20, max_new_tokens=12) for i in range(4)]
    assert gen.generate(texts, several) == [gen.generate(text, one) for text, one in zip(texts, several, strict=True)]


@pytest.mark.parametrize("page_size", [16, 32])
def test_warm_prefix_says_the_same_as_a_cold_one(model: Model, page_size: int) -> None:
    beginning = tiny.prompt(50, seed=1)
    texts = [beginning + tiny.prompt(length, seed=length) for length in (1, 14, 40)] + [beginning[:32]]
    cold = Generator(model, kv_format="fp32", max_tokens=512, page_size=page_size, prefix_cache=False)
    warm = Generator(model, kv_format="fp32", max_tokens=512, page_size=page_size)
    wanted = [cold.generate(text, GREEDY) for text in texts]
    assert [out.cached_tokens for out in wanted] == [0] * 4
    assert [warm.generate(text, GREEDY) for text in texts] == wanted
    again = warm.generate(texts, GREEDY)
    assert again == wanted
    # All whole pages but the one with the last token.
    assert [out.cached_tokens for out in again] == [(len(text) - 1) // page_size * page_size for text in texts]
    assert warm.pages.num_used == 0


def test_pages_that_run_out_change_nothing(model: Model) -> None:
    texts = [tiny.prompt(length, seed=length) for length in (20, 3, 30, 9)]
    params = [SamplingParams(temperature=t, seed=1, max_new_tokens=40, ignore_eos=True) for t in (0, 1, 0.7, 0)]
    roomy = Generator(model, kv_format="fp32", max_tokens=512, page_size=16)
    tight = Generator(model, kv_format="fp32", max_tokens=96, page_size=16, max_step_tokens=24, max_batch=4)
    jobs = [tight.submit(text, one) for text, one in zip(texts, params, strict=True)]
    while tight.scheduler.has_work:
        tight.step()
    assert [job.completion for job in jobs] == roomy.generate(texts, params)
    assert sum(job.sequence.num_preempted for job in jobs) >= 2
    assert tight.pages.num_used == 0


def test_warm_up_leaves_everything_as_it_is(model: Model) -> None:
    sizes = {"kv_format": "fp32", "max_tokens": 96, "page_size": 16, "max_batch": 3, "max_step_tokens": 24}
    gen, cold = Generator(model, **sizes), Generator(model, **sizes)
    first, second = gen.submit(tiny.prompt(20), GREEDY), gen.submit(tiny.prompt(5), GREEDY)
    gen.step()
    gen.step()
    sides = [side for layer in range(model.config.num_layers) for side in gen.cache.pages(layer)]
    before = [tensor.clone() for side in sides for tensor in side.tensors()]
    gen.warm_up()
    after = [tensor for side in sides for tensor in side.tensors()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    while gen.scheduler.has_work:
        gen.step()
    assert [first.completion, second.completion] == cold.generate([tiny.prompt(20), tiny.prompt(5)], GREEDY)


def test_one_bad_embedding_ends_one_request(model: Model, tmp_path: Path) -> None:
    tiny.save(tmp_path / "bad", "llama")
    broken = Model.load(tmp_path / "bad", device="cpu")
    # A checkpoint with NaN does not load, so it is put in afterwards.
    broken.decoder.embedding.table[7] = torch.nan
    gen = Generator(broken, max_tokens=128, page_size=16)
    good = [8, 9, 10]
    alone = gen.generate(good, GREEDY)
    outs = gen.generate([[8, 7], good, [7]], GREEDY)
    assert [out.finish_reason for out in outs] == ["error", "length", "error"]
    assert isinstance(outs[0].error, NonFiniteLogits)
    # The pages that held NaN serve the next request.
    assert outs[1] == alone == gen.generate(good, GREEDY)
