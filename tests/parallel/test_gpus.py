"""Ranks on GPUs of their own: sums through mailboxes and NCCL, and whole models.

A group takes seconds to start, so all checks of a number of ranks share one, and load their models into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from qinfer.assets import STORYTELLER
from qinfer.engine.generator import Generator
from qinfer.engine.job import Completion
from qinfer.engine.sampling import SamplingParams, UniformStream
from qinfer.models.model import Model
from qinfer.parallel.comm import Group
from qinfer.parallel.peers import ONE_SHOT_BYTES
from qinfer.parallel.spawn import lead
from tests.compare import assert_close
from tests.models import tiny
from tests.parallel.ranks import check_collectives, check_large_sums, check_sums, keep
from tests.parallel.test_group import OBEY
from tests.parallel.test_shards import write

NUM_GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")]
IDS = tiny.prompt(200)
Requests = Sequence[tuple[SamplingParams, Sequence[str]]]  # parameters, and what they are used for
PROMPTS = ["Once upon a time", "The fox", "One day a little bear", "A girl named"]
REQUESTS: Requests = (
    (SamplingParams(temperature=0, max_new_tokens=60), PROMPTS),
    (SamplingParams(seed=3, max_new_tokens=40), PROMPTS),
)
# In most texts as long as those, rounding decides some choice: after "Once upon a time" two logits are 0.0002 apart. In
# these every choice is clear.
DECIDED: Requests = (
    (SamplingParams(temperature=0, max_new_tokens=30), ["The mouse", "The cat", "Mia"]),
    (SamplingParams(seed=9, max_new_tokens=40), ["The owl", "The cat and the dog", "The bear", "A bird"]),
)


def each(requests: Requests) -> Iterator[tuple[SamplingParams, str]]:
    """Parameters and prompt of every text."""
    for params, prompts in requests:
        for prompt in prompts:
            yield params, prompt


class Ranks:
    """A group that one test after the other uses."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._group: Group | None = None

    @contextmanager
    def group(self) -> Iterator[Group]:
        """The group, started when there is none; a test that fails ends it, for its ranks may have lost step."""
        if self._group is None:
            self._group = lead(OBEY, {}, [f"cuda:{index}" for index in range(self.size)])
        try:
            yield self._group
        except BaseException:
            self._group.fail("a test failed")
            self.close()
            raise

    @contextmanager
    def model(self, folder: Path, gpus: list[float]) -> Iterator[Model]:
        """A model that the ranks share."""
        options = {"gpus": gpus, "cache_tokens": 2000}
        with self.group() as group:
            group.tell({"do": "follow", "path": str(folder), "options": options})
            model = keep(Model.load(folder, parallel=group, **options))
            yield model
            group.tell({"do": "done"})

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Groups follow each other, so those behind the first also show that it has left nothing behind."""
    if request.param > NUM_GPUS:
        pytest.skip(f"needs {request.param} GPUs")
    ranks = Ranks(request.param)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("check", [check_collectives, check_sums, check_large_sums])
def test_collectives(ranks: Ranks, check: Callable[[Group], None]) -> None:
    with ranks.group() as group:
        assert group._mail is not None, "these GPUs cannot reach each other"
        assert group._mail.fits(1, ONE_SHOT_BYTES // 4)
        group.tell({"do": check.__name__})
        check(group)


@pytest.fixture(scope="module")
def whole() -> Model:
    """The model on one GPU."""
    return Model.load(STORYTELLER)


def texts(model: Model, requests: Requests) -> list[Completion]:
    generator = Generator(model, max_tokens=4096, max_batch=4)
    return list(chain(*(generator.generate(prompts, params) for params, prompts in requests)))


def behind(model: Model, prompt: str, text: Completion) -> Tensor:
    """Logits [tokens, V] from which a model on one GPU would choose each token of a text."""
    assert model.tokenizer is not None
    before = model.tokenizer.encode(prompt)
    return model.logits([*before, *text.token_ids])[len(before) - 1 : -1].cpu()


def least_lead(logits: Tensor, text: Completion, params: SamplingParams) -> float:
    """How far a text is from another one: between logits if greedy, else between random numbers in [0, 1)."""
    if params.temperature == 0:
        return -logits.topk(2).values.diff().max().item()
    assert params.seed is not None
    ids, uniforms = torch.tensor(text.token_ids), UniformStream(params.seed)
    drawn = torch.tensor([uniforms.at(step) for step in range(len(ids))], dtype=torch.float64)
    bounds = pad(logits.double().softmax(1).cumsum(1), (1, 0)).gather(1, torch.stack([ids, ids + 1], 1))
    return torch.minimum(drawn - bounds[:, 0], bounds[:, 1] - drawn).min().item()


split = pytest.mark.parametrize("gpus", [[1.0] * 4, [0.03, 0.02, 0.03, 0.02]], ids=["equal", "unequal"])


@pytest.fixture(scope="module")
def decided(whole: Model) -> list[Completion]:
    """Texts of one GPU that rounding cannot change."""
    found = texts(whole, DECIDED)
    for (params, prompt), text in zip(each(DECIDED), found, strict=True):
        # Between one GPU and two, leads of logits change by up to 0.009, and cumulative probabilities by up to 0.002.
        clear = 0.03 if params.temperature == 0 else 0.004
        assert least_lead(behind(whole, prompt, text), text, params) > clear, f"rounding decides what {prompt!r} begins"
    return found


@split
def test_text_is_that_of_one_gpu(ranks: Ranks, gpus: list[float], decided: list[Completion]) -> None:
    with ranks.model(STORYTELLER, gpus[: ranks.size]) as model:
        assert texts(model, DECIDED) == decided


@split
def test_every_step_has_the_logits_of_one_gpu(ranks: Ranks, gpus: list[float], whole: Model) -> None:
    """Of texts that rounding decides, too: each token is judged behind the same text."""
    with ranks.model(STORYTELLER, gpus[: ranks.size]) as model:
        # A few dozen roundings to 16 bits stand between the ids and the logits.
        assert_close(model.logits(IDS), whole.logits(IDS), torch.bfloat16)
        plain = texts(model, REQUESTS)
        told = texts(model, [(replace(params, logprobs=8), prompts) for params, prompts in REQUESTS])
    assert [text.token_ids for text in plain] == [text.token_ids for text in told]
    for (params, prompt), text in zip(each(REQUESTS), told, strict=True):
        top = torch.tensor([step.top for step in text.logprobs])
        ids = top[..., 0].long()
        assert_close(top[..., 1], behind(whole, prompt, text).log_softmax(1).gather(1, ids), torch.bfloat16)
        if params.temperature == 0:
            assert tuple(ids[:, 0].tolist()) == text.token_ids


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize("kind", ["gptq act-order", "exl2", "awq", "compressed-tensors"])
def test_every_way_of_cutting(tmp_path: Path, ranks: Ranks, kind: str) -> None:
    folder = write(tmp_path, kind)
    ids = tiny.prompt(40)
    with ranks.model(folder, [0.02, 0.01]) as model:
        assert_close(model.logits(ids), Model.load(folder).logits(ids), torch.bfloat16)
