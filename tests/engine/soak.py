"""Random requests with cancellations and failing steps: `python -m tests.engine.soak 2000` runs so many of them."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from random import Random

from qinfer.engine.sampling import SamplingParams
from tests.engine.mock import TOKENIZER, MockModel, expected, generator, is_idle


def soak(count: int) -> Counter[str]:
    """Run requests against one generator and check every id of each; return how they ended.

    Pages must all come back, and what a request has received must be what it would have received alone.
    """
    model = MockModel(tokenizer=TOKENIZER, eos_ids=[0, 1])
    gen = generator(model, max_tokens=64, max_step_tokens=12)
    random = Random(1)
    ended: Counter[str] = Counter()

    async def request(number: int) -> None:
        prompt = [20 + number % 3] * random.randrange(1, 9) + [2 + number % 97]
        guided = {"guidance_scale": 1.5, "negative_prompt": [20] * (number % 9 + 1)} if number % 4 == 0 else {}
        params = SamplingParams(seed=number, temperature=number % 2, max_new_tokens=random.randrange(1, 12), **guided)
        leave_after = random.choice((99, 99, 99, random.randrange(1, 6)))
        await asyncio.sleep(random.random() * count / 500)
        if random.random() < 0.05:
            model.fail_at = len(model.steps) + 1
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
        whole = expected(prompt, params, [0, 1])
        assert ids == whole[: len(ids)]
        assert reason in ("left", "error") or len(ids) == len(whole)
        ended[reason] += 1

    async def main() -> None:
        await asyncio.gather(*(request(number) for number in range(count)))
        assert gen._front._driver is not None
        await gen._front._driver

    asyncio.run(main())
    assert is_idle(gen)
    return ended


if __name__ == "__main__":
    sys.stdout.write(f"{dict(soak(int(sys.argv[1])))}\n")
