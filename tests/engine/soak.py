"""Random requests with cancellations and failing steps: `python -m tests.engine.soak 2000` runs so many of them.

On a model of arithmetic, whose texts are known, and on the bundled one, whose texts are those that requests get alone.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from qinfer.assets import STORYTELLER
from qinfer.engine.generator import Generator
from qinfer.engine.sampling import SamplingParams
from qinfer.models.model import Model
from tests.engine.mock import TOKENIZER, MockModel, expected, generator, is_idle

# A prompt, how it is sampled, and every id that it gives.
Request = tuple[Sequence[int], SamplingParams, Sequence[int]]


class Failing:
    """A decoder that raises once when it is told to."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._fails = False

    def fail(self) -> None:
        """Raise in the next step."""
        self._fails = True

    def __call__(self, *args: Any) -> Any:
        if self._fails:
            self._fails = False
            raise RuntimeError("a step that fails")
        return self._decoder(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


def soak(count: int) -> Counter[str]:
    """Run requests of the model of arithmetic."""
    model = MockModel(tokenizer=TOKENIZER, eos_ids=[0, 1])
    random = Random(2)

    def request(number: int) -> Request:
        prompt = [20 + number % 3] * random.randrange(1, 9) + [2 + number % 97]
        guided = {"guidance_scale": 1.5, "negative_prompt": [20] * (number % 9 + 1)} if number % 4 == 0 else {}
        params = SamplingParams(seed=number, temperature=number % 2, max_new_tokens=random.randrange(1, 12), **guided)
        return prompt, params, expected(prompt, params, [0, 1])

    def fail() -> None:
        model.fail_at = len(model.steps) + 1

    return run(generator(model, max_tokens=64, max_step_tokens=12), request, fail, count)


def soak_bundled(count: int) -> Counter[str]:
    """Run requests of the bundled model: each is one of 24, in a pool with room for a few of them."""
    model, random = Model.load(STORYTELLER, device="cpu"), Random(2)
    # Pages in fp32, because sums of other shapes differ in their last bits, which fp16 now and then makes larger.
    alone = Generator(model, kv_format="fp32", max_tokens=256, prefix_cache=False)
    known: list[Request] = []
    for number in range(24):
        prompt = [random.randrange(2, model.config.vocab_size) for _ in range(random.randrange(1, 40))]
        params = SamplingParams(seed=number, temperature=number % 3 / 2, max_new_tokens=random.randrange(1, 20))
        known.append((prompt, params, alone.generate(prompt, params).token_ids))
    decoder: Any = Failing(model.decoder)
    model.decoder = decoder
    gen = Generator(model, kv_format="fp32", max_tokens=256, page_size=16, max_batch=8, max_step_tokens=32)
    return run(gen, lambda number: known[number % len(known)], decoder.fail, count)


def run(gen: Generator, request: Callable[[int], Request], fail: Callable[[], None], count: int) -> Counter[str]:
    """Run requests against one generator and check every id of each; return how they ended.

    Pages must all come back, and what a request has received must be what it would have received alone.
    """
    random = Random(1)
    ended: Counter[str] = Counter()

    async def one(number: int) -> None:
        prompt, params, whole = request(number)
        leave_after = random.choice((99, 99, 99, random.randrange(1, 6)))
        await asyncio.sleep(random.random() * count / 500)
        if random.random() < 0.05:
            fail()
        ids: list[int] = []
        reason = "left"
        stream = gen.astream(prompt, params, priority=number % 2)
        async for event in stream:
            ids += event.token_ids
            if event.completion is not None:
                reason = event.completion.finish_reason
                assert list(event.completion.token_ids) == ids
            elif len(ids) == leave_after:
                await stream.aclose()
                break
        assert ids == list(whole[: len(ids)]), (number, len(prompt), params.temperature, ids, whole)
        assert reason in ("left", "error") or len(ids) == len(whole)
        ended[reason] += 1

    async def main() -> None:
        await asyncio.gather(*(one(number) for number in range(count)))
        assert gen._front._driver is not None
        await gen._front._driver

    asyncio.run(main())
    assert is_idle(gen)
    return ended


if __name__ == "__main__":
    for kind in (soak, soak_bundled):
        sys.stdout.write(f"{kind.__name__}: {dict(kind(int(sys.argv[1])))}\n")
