"""Several threads, and asyncio beside them, on one generator."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from qinfer.assets import STORYTELLER
from qinfer.engine.generator import Generator
from qinfer.engine.sampling import SamplingParams
from qinfer.engine.steps import Sampled
from qinfer.models.model import Model

PROMPTS = ["Once upon a time", "One day", "There was", "The old man"]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.load(STORYTELLER, device="cpu")


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Switch between threads as often as Python can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def params(seed: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=16, seed=seed, ignore_eos=True)


def test_threads_get_the_texts_that_they_get_alone(model: Model, hasty_threads: None) -> None:
    generator = Generator(model, max_tokens=2048, max_batch=3)
    alone = [generator.generate(prompt, params(seed)).text for seed, prompt in enumerate(PROMPTS)]

    def complete(seed: int) -> str:
        return generator.generate(PROMPTS[seed], params(seed)).text

    def read(seed: int) -> str:
        return "".join(event.text for event in generator.stream(PROMPTS[seed], params(seed)))

    with ThreadPoolExecutor(8) as pool:
        completed, streamed = pool.map(complete, range(4)), pool.map(read, range(4))
        assert [*completed] == alone
        assert [*streamed] == alone
    assert generator.pages.num_used == 0
    assert not generator.scheduler.has_work


def test_other_methods_are_refused_beside_a_stream_of_asyncio(model: Model) -> None:
    generator = Generator(model, max_tokens=2048)
    alone = generator.generate(PROMPTS[0], params(0)).text

    async def read() -> str:
        text = ""
        async for event in generator.astream(PROMPTS[0], params(0)):
            text += event.text
            if event.completion is None:
                for other in (
                    lambda: generator.generate("One day"),
                    lambda: next(generator.stream("One day")),
                    generator.step,
                ):
                    with pytest.raises(RuntimeError, match="between_steps"):
                        other()
                if len(text) < 12:
                    job = await generator.between_steps(lambda: generator.submit("One day", params(1)))
                    await generator.between_steps(job.cancel)
        return text

    assert asyncio.run(read()) == alone
    assert generator.generate(PROMPTS[0], params(0)).text == alone, "nobody reads any more"
    assert generator.pages.num_used == 0


def test_the_error_of_a_step_is_the_one_that_is_raised(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes when the next step is launched already, whose requests have then ended."""
    generator = Generator(model, max_tokens=2048)
    stream = generator.stream(PROMPTS[0], params(0))
    next(stream)

    def lost(_: Sampled) -> list[int]:
        raise ConnectionError("rank 1 is gone")

    monkeypatch.setattr(Sampled, "ids", lost)
    with pytest.raises(ConnectionError, match="rank 1 is gone"):
        list(stream)
    assert generator.pages.num_used == 0
