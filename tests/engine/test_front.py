import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from qinfer.engine.generator import Generator
from qinfer.engine.job import Event
from qinfer.engine.sampling import SamplingParams
from tests.engine.mock import TOKENIZER, MockModel, expected, generator, is_idle
from tests.engine.soak import soak, soak_bundled

GREEDY = SamplingParams(temperature=0, max_new_tokens=8)


def run(task: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(task, 60))


async def read(gen: Generator, prompt: list[int] | str, params: SamplingParams) -> list[Event]:
    return [event async for event in gen.astream(prompt, params)]


def test_many_streams_at_once() -> None:
    gen = generator(MockModel(tokenizer=TOKENIZER), max_tokens=60)
    several = [SamplingParams(seed=i, max_new_tokens=3 + i % 9) for i in range(12)]

    async def main() -> list[list[Event]]:
        return await asyncio.gather(*(read(gen, [2 + i, 7], one) for i, one in enumerate(several)))

    for _ in range(2):  # each in an event loop of its own
        for i, (events, one) in enumerate(zip(run(main()), several, strict=True)):
            final = events[-1].completion
            assert final is not None
            assert list(final.token_ids) == expected([2 + i, 7], one)
            assert "".join(event.text for event in events) == final.text
            assert [event.completion for event in events[:-1]] == [None] * (len(events) - 1)
    assert is_idle(gen)


def test_request_joins_while_others_run() -> None:
    gen = generator()

    async def main() -> tuple[list[Event], list[Event]]:
        first = gen.astream([1, 2], SamplingParams(temperature=0, max_new_tokens=40))
        head = [await anext(first), await anext(first)]
        second = await read(gen, [3], GREEDY)
        return head + [event async for event in first], second

    first, second = run(main())
    assert [event.token_ids[0] for event in first] == expected([1, 2], SamplingParams(temperature=0, max_new_tokens=40))
    assert [event.token_ids[0] for event in second] == expected([3], GREEDY)


def test_closed_and_cancelled_streams_give_their_pages_back() -> None:
    gen = generator(max_tokens=400)
    long = SamplingParams(temperature=0, max_new_tokens=300)

    async def main() -> None:
        closed = gen.astream([1], long)
        await anext(closed)
        task = asyncio.create_task(read(gen, [2], long))
        await anext(closed)
        await closed.aclose()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(await read(gen, [3], GREEDY)) == 8
        # The last step ends behind the last event.
        assert gen._front._driver is not None
        await gen._front._driver

    run(main())
    assert is_idle(gen)


def test_stream_that_nobody_reads_queues_nothing() -> None:
    gen = generator()

    async def main() -> None:
        gen.astream([1], GREEDY)

    run(main())
    assert is_idle(gen)
    with pytest.raises(ValueError, match="at least one"):
        gen.astream([], GREEDY)


def test_step_that_fails_ends_its_streams_and_no_other() -> None:
    model = MockModel()
    model.fail_at = 2
    gen = generator(model, max_batch=1)

    async def main() -> list[list[Event]]:
        return await asyncio.gather(read(gen, [1], GREEDY), read(gen, [2], GREEDY))

    failed, fine = run(main())
    assert failed[-1].finish_reason == "error"
    assert "on fire" in str(failed[-1].error)
    assert [event.token_ids[0] for event in fine] == expected([2], GREEDY)
    assert is_idle(gen)


def test_failure_that_ends_no_request_reaches_every_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    gen = generator()
    monkeypatch.setattr(gen.scheduler, "schedule", lambda: 1 / 0)

    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            await read(gen, [1], GREEDY)

    run(main())
    assert is_idle(gen)


def test_soak() -> None:
    ended = soak(300)
    assert sum(ended.values()) == 300
    assert min(ended[reason] for reason in ("left", "error", "length", "stop")) >= 2


def test_soak_of_the_bundled_model() -> None:
    """The command with a count runs as many as wanted: `python -m tests.engine.soak 2000`."""
    ended = soak_bundled(60)
    assert sum(ended.values()) == 60
    assert min(ended[reason] for reason in ("left", "error", "length")) >= 1
