"""A device in plain Python: pages that hold token ids, and steps whose ids arrive one step late.

Every step reads the whole history of its sequences back through their pages and compares it with what they should have
read. The next token is a function of that history, so a wrong page, a lost id or a shared page that was written shows.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from random import Random

from qinfer.engine.pages import PageTable
from qinfer.engine.sampling import SamplerState, SamplingParams
from qinfer.engine.scheduler import Scheduler
from qinfer.engine.sequence import Sequence, State

SAMPLER = SamplerState(SamplingParams(), ())  # nobody draws here


def sequence(number: int, prompt: int | Ids[int], new: int = 4, priority: int = 0) -> Sequence:
    ids = tuple(range(prompt)) if isinstance(prompt, int) else tuple(prompt)
    return Sequence(number, ids, SamplingParams(max_new_tokens=new), SAMPLER, priority=priority)


def token_after(history: Ids[int]) -> int:
    """The next token of a history; few values, so that texts coincide."""
    return hash(tuple(history)) % 3


def continued(prompt: Ids[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(token_after(ids))
    return ids[len(prompt) :]


class World:
    """A scheduler, its pages, what stands in them, and the sequences that are alive."""

    def __init__(self, *, num_pages: int = 8, page_size: int = 4, window: int | None = None, **limits: int) -> None:
        self.pages = PageTable(num_pages, page_size)
        self.scheduler = Scheduler(
            self.pages, window=window, **{"max_batch": 3, "max_step_tokens": 5, "max_mixed_tokens": 4, **limits}
        )
        self.window = window  # how much of what stands before it a token reads
        self.num_freed = 0
        self.memory = [[-1] * page_size for _ in range(num_pages)]
        self.live: list[Sequence] = []
        self.in_flight: list[tuple[Sequence, int]] = []
        self.count = 0
        self.num_preempted = self.num_cached = 0
        self.turned: set[tuple[int, ...]] = set()  # histories after which another token comes than the usual one

    def submit(self, prompt: Ids[int], new: int, priority: int = 0) -> Sequence:
        one = sequence(self.count, prompt, new, priority)
        self.count += 1
        self.live.append(one)
        self.scheduler.add(one)
        return one

    def end(self, one: Sequence, reason: str) -> None:
        self.num_freed += one.num_freed
        self.live.remove(one)
        self.num_preempted += one.num_preempted
        self.num_cached += one.cached_tokens
        self.scheduler.finish(one, reason)
        assert (one.state, one.finish_reason, one.pages) == (State.FINISHED, reason, [])

    def step(self) -> list[tuple[int, int]]:
        step = self.scheduler.schedule()
        self.check(step)
        sampled = [self.compute(one, count) for one, count in step]
        for one, token in self.in_flight:
            if one.state is not State.FINISHED and one.source >= 0:
                one.source = -1
                one.generated.append(token)
        self.in_flight = []
        for one, token in sampled:
            if token is not None:
                one.source = len(self.in_flight)
                self.in_flight.append((one, token))
        for one in tuple(self.live):
            if len(one.generated) == one.params.max_new_tokens:
                assert self.turned or one.generated == continued(one.prompt, one.params.max_new_tokens)
                self.end(one, "length")
        return [(one.id, count) for one, count in step]

    def check(self, step: list[tuple[Sequence, int]]) -> None:
        scheduler = self.scheduler
        assert sum(count for _, count in step) <= scheduler.max_step_tokens
        assert len(scheduler.running) <= scheduler.max_batch
        assert len({one.id for one, _ in step}) == len(step)
        assert all(one.state is State.RUNNING and 1 <= count <= one.num_pending for one, count in step)
        num_streams = sum(one.num_pending == 1 for one, _ in step)
        if num_streams:
            share = scheduler.max_step_tokens * (scheduler.max_batch - num_streams) // scheduler.max_batch
            assert sum(count for _, count in step) - num_streams <= max(share, scheduler.max_mixed_tokens)
        assert step or self.in_flight or not self.live
        # Everybody past the prompt moves in every step, and so does the first in order.
        moving = {one.id for one, _ in step}
        for place, one in enumerate(scheduler.running):
            if place == 0 or one.num_pending == 1:
                assert one.id in moving or one.num_tokens >= one.max_tokens

    def compute(self, one: Sequence, count: int) -> tuple[Sequence, int | None]:
        """Write the tokens, read the history, and return the next token if all tokens are computed now."""
        size = self.pages.page_size
        ids = [self.in_flight[-1 - token][1] if token < 0 else token for token in one.pending(count)]
        complete = count == one.num_pending
        for position, token in enumerate(ids, start=one.num_computed):
            page = one.pages[position // size]
            assert self.pages.references(page) == 1, "a shared page is written"
            self.memory[page][position % size] = token
        one.num_computed += count
        first = 0 if self.window is None else max(0, one.num_computed - count - self.window + 1)
        seen = range(first, one.num_computed)
        assert all(one.pages[i // size] >= 0 for i in seen), "a page is read that was given back"
        read = [self.memory[one.pages[i // size]][i % size] for i in seen]
        known = [*one.prompt, *one.generated]
        if one.num_computed > len(known):
            known.append(ids[-1])
        assert read == known[first : one.num_computed]
        token = token_after(known[: one.num_computed]) + 3 * (tuple(known[: one.num_computed]) in self.turned)
        return one, token if complete else None

    def defragment(self) -> None:
        for source, target in self.scheduler.defragment().items():
            self.memory[target], self.memory[source] = self.memory[source], [-1] * self.pages.page_size
        full = self.pages.num_used + self.pages.num_idle
        assert all(page < full for one in self.scheduler.running for page in one.held_pages)

    def pages_belong_to_the_running(self) -> None:
        held = [page for one in self.scheduler.running for page in one.held_pages]
        assert min(held, default=0) >= 0
        assert all(one.pages.count(-1) == one.num_freed for one in self.scheduler.running)
        assert len(set(held)) == self.pages.num_used
        assert all(self.pages.references(page) == held.count(page) for page in set(held))
        order = [one.order() for one in self.scheduler.running], [one.order() for one in self.scheduler.waiting]
        assert all(keys == sorted(keys) for keys in order)

    def drain(self) -> None:
        """Without new requests everything ends in bounded time."""
        for _ in range(10 + 3 * sum(one.max_tokens for one in self.live)):
            self.step()
        assert not self.live
        assert self.pages.num_used == 0


def random_events(world: World, random: Random, count: int) -> None:
    """Submit, cancel, fail and step at random; prompts begin alike more often than not."""
    for _ in range(count):
        choice = random.random()
        if choice < 0.12 and len(world.live) < 12:
            prompt = [0] * random.randrange(0, 12) + [random.randrange(3) for _ in range(random.randrange(1, 9))]
            world.submit(prompt, random.randrange(1, 13), random.choice((0, 0, 0, 1)))
        elif choice < 0.13:
            world.defragment()
        elif choice < 0.15 and world.live:
            world.end(random.choice(world.live), random.choice(("cancelled", "error")))
        else:
            world.step()
        world.pages_belong_to_the_running()
