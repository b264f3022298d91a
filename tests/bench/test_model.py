"""What `bench model` says when there is nothing to time."""

from __future__ import annotations

import pytest
from torch import Tensor

from qinfer.assets import STORYTELLER
from qinfer.bench.model import time_prompt, time_steps
from qinfer.cache.paged import PagedKVCache
from qinfer.engine.generator import Generator
from qinfer.engine.sampling import SamplingParams
from qinfer.engine.steps import Sampled, StepRunner
from qinfer.errors import NonFiniteLogits
from qinfer.models.batch import Batch
from qinfer.models.model import Model


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.load(STORYTELLER, device="cpu")


def test_a_request_that_ends_before_it_is_timed_is_named(model: Model) -> None:
    generator = Generator(model, max_tokens=512)
    job = generator.submit([1, 2], SamplingParams(max_new_tokens=2, ignore_eos=True))
    with pytest.raises(RuntimeError, match=r"request 0 ended after 2 tokens behind a prompt of 2, .*: length"):
        time_steps(generator, [job], most=4)


def test_the_error_of_a_request_is_the_cause(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(model, max_tokens=512)
    job = generator.submit([1, 2], SamplingParams(max_new_tokens=20, ignore_eos=True))
    monkeypatch.setattr(Sampled, "ids", lambda self: [-1])
    with pytest.raises(RuntimeError, match="before it was timed: error") as raised:
        time_steps(generator, [job], most=4)
    assert isinstance(raised.value.__cause__, NonFiniteLogits)


def test_prompts_are_timed_whole_in_the_steps_of_serving(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(model, max_tokens=512, max_step_tokens=16, max_batch=1, prefix_cache=False)
    computed: list[int] = []
    forward = StepRunner._forward

    def counting(self: StepRunner, batch: Batch, cache: PagedKVCache) -> Tensor:
        computed.append(len(batch.token_ids))
        return forward(self, batch, cache)

    monkeypatch.setattr(StepRunner, "_forward", counting)
    times = time_prompt(generator, [3] * 40, repeats=2)
    assert len(times.samples) == 2
    assert computed == [16, 16, 8] * 5  # three of them to warm up


def test_a_prompt_that_fails_is_not_timed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampled, "ids", lambda self: [-1])
    with pytest.raises(RuntimeError, match="prompt of 2 tokens ended: error") as raised:
        time_prompt(Generator(model, max_tokens=512), [1, 2], repeats=1)
    assert isinstance(raised.value.__cause__, NonFiniteLogits)
