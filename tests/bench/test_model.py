"""What `bench model` says when there is nothing to time."""

from __future__ import annotations

import pytest

from qinfer.assets import STORYTELLER
from qinfer.bench.model import time_steps
from qinfer.engine.generator import Generator
from qinfer.engine.sampling import SamplingParams
from qinfer.engine.steps import Sampled
from qinfer.errors import NonFiniteLogits
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
