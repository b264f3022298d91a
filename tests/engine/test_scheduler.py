from random import Random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from qinfer.engine.pages import PageTable
from qinfer.engine.scheduler import Scheduler
from qinfer.engine.sequence import State
from tests.engine.world import World, continued, random_events, sequence


def test_prompt_is_cut_into_chunks_beside_running_sequences() -> None:
    world = World(num_pages=100, max_mixed_tokens=99, prefix_cache=False)
    for prompt in (3, 9, 2):
        world.submit(range(prompt), 4)
    assert [world.step() for _ in range(5)] == [
        [(0, 3), (1, 2)],
        [(0, 1), (1, 4)],
        [(0, 1), (1, 3), (2, 1)],
        [(0, 1), (1, 1), (2, 1)],
        [(1, 1), (2, 1)],
    ]


@pytest.mark.parametrize(("num_streams", "chunk"), [(1, 33), (3, 20), (5, 7)])
def test_streams_do_not_wait_for_a_long_prompt(num_streams: int, chunk: int) -> None:
    """It gets the share of the step that they leave of the batch, seven tokens in any case, and all without streams."""
    world = World(num_pages=100, max_batch=6, max_step_tokens=40, max_mixed_tokens=7)
    for number in range(num_streams):
        world.submit([number], 60)
    world.step()
    world.submit(range(100), 2)
    assert [world.step()[-1][1] for _ in range(3)] == [chunk] * 3
    other = World(num_pages=100, max_step_tokens=50, max_mixed_tokens=7)
    other.submit(range(40), 2)
    assert other.step() == [(0, 40)]


class Anew(World):
    """The same world, whose scheduler makes every step anew."""

    def step(self) -> list[tuple[int, int]]:
        self.scheduler._num_quiet = 0
        return super().step()


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_steps_that_are_the_last_one_again_are_those_made_anew(prefix_cache: bool, window: int | None) -> None:
    pages, options = 40, {"page_size": 4, "window": window, "prefix_cache": prefix_cache, "max_step_tokens": 9}
    worlds = [kind(num_pages=pages, **options) for kind in (World, Anew)]
    randoms = [Random(5) for _ in worlds]
    repeats = 0
    for _ in range(400):
        steps = []
        for world, random in zip(worlds, randoms, strict=True):
            if random.random() < 0.1 and len(world.live) < 6:
                world.submit([random.randrange(3) for _ in range(random.randrange(1, 9))], random.randrange(1, 30))
            if random.random() < 0.02:
                world.defragment()
            before = world.scheduler._step
            steps.append(world.step())
            repeats += world.scheduler._step is before
            world.pages_belong_to_the_running()
        assert steps[0] == steps[1]
    assert (repeats > 50) == (window is None), "steps were repeated"


def test_sequence_takes_the_pages_it_needs_and_no_more() -> None:
    world = World(num_pages=5)
    one = world.submit(range(4), 9)
    counts = []
    while world.live:
        world.step()
        counts.append(len(one.pages))
    # 4 prompt tokens and 8 of the 9 that follow; the last is never computed.
    assert counts == [1, 2, 2, 2, 2, 3, 3, 3, 3, 0]


def test_pool_for_the_worst_case_admits_everybody_at_once() -> None:
    world = World(num_pages=20, max_batch=10, max_step_tokens=99)
    for number in range(10):
        world.submit([number, 1, 2, 3, 4, 5], 2)
    assert len(world.step()) == 10
    # Where sequences will grow, some room is left to them.
    other = World(num_pages=20, max_batch=10, max_step_tokens=99)
    for number in range(10):
        other.submit([number, 1, 2, 3, 4, 5], 9)
    assert len(other.step()) == 9
    other.drain()


def test_last_in_order_gives_way_and_comes_back() -> None:
    world = World(num_pages=4, max_batch=2, max_step_tokens=20)
    first, second = world.submit([1, 2, 1], 12), world.submit([2, 2], 12)
    while second.num_preempted == 0:
        world.step()
    assert (second.state, second.pages, first.state) == (State.WAITING, [], State.RUNNING)
    done = len(second.generated)
    assert done >= 4
    world.drain()
    assert first.num_preempted == 0
    assert second.generated == continued([2, 2], 12)


def test_priority_goes_first_and_gives_way_last() -> None:
    world = World(num_pages=4, max_batch=2, max_step_tokens=20)
    low, lower, high = world.submit([1, 2, 1], 12), world.submit([2, 2], 12, -1), world.submit([0], 9, 1)
    assert [one.id for one in world.scheduler.waiting] == [high.id, low.id, lower.id]
    assert [number for number, _ in world.step()] == [high.id, low.id]
    world.drain()
    assert high.num_preempted == 0


def test_beginning_is_shared_with_running_and_finished_sequences() -> None:
    world = World(num_pages=20, max_step_tokens=40)
    text = [5, 6, 7, 8, 9, 10, 11, 12]
    first = world.submit([*text, 1], 6)
    world.step()
    second = world.submit([*text, 2], 3)
    world.step()
    assert (first.cached_tokens, second.cached_tokens) == (0, 8)
    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] != first.pages[2]
    world.drain()
    # All but one token may come from the pool: somebody has to give the logits.
    assert world.pages.num_idle >= 2
    third, fourth = world.submit(text, 1), world.submit([*text[:7], 1, 1], 1)
    world.step()
    assert (third.cached_tokens, fourth.cached_tokens) == (4, 4)


def test_generated_text_is_shared_too() -> None:
    world = World(num_pages=20, max_step_tokens=40)
    first = world.submit([1, 2], 7)
    world.drain()
    second = world.submit([1, 2, *first.generated, 2], 1)
    world.step()
    assert second.cached_tokens == 8


def test_rewound_sequence_leaves_its_pages_to_others() -> None:
    world = World(num_pages=20, max_step_tokens=40)
    one = world.submit([1, 2], 14)
    while one.num_published < 2:
        world.step()
    text = (*one.prompt, *one.generated)[:8]
    sharing = world.submit([*text, 1], 8)
    world.step()
    assert sharing.pages[:2] == one.pages[:2]
    # From the fifth token on everything is another.
    world.turned.add(text[:4])
    world.scheduler.rewind(one, 2)
    world.drain()
    assert (*one.prompt, *one.generated)[:5] == (*text[:4], text[4] + 3)
    # What is known under the keys of both texts is what their pages hold.
    for ids in (text, (*one.prompt, *one.generated)[:12]):
        reader = world.submit([*ids, 2], 1)
        world.step()
        assert reader.cached_tokens == len(ids)
        world.drain()


def test_failure_leaves_nothing_behind() -> None:
    world = World(num_pages=20, max_step_tokens=40)
    first = world.submit(range(10), 4)
    world.step()
    world.step()
    assert world.pages.find(first.page_keys[0]) == first.pages[0]
    world.end(first, "error")
    assert world.pages.find(first.page_keys[0]) is None
    assert world.pages.num_idle == 0


def test_without_a_prefix_cache_nothing_is_shared() -> None:
    world = World(num_pages=20, max_step_tokens=40, prefix_cache=False)
    for _ in range(2):
        one = world.submit(range(10), 4)
        world.drain()
        assert one.cached_tokens == 0
    assert world.pages.num_idle == 0


def test_batch_is_limited() -> None:
    world = World(num_pages=100, max_batch=2, max_step_tokens=64)
    for number in range(3):
        world.submit([number], 4)
    assert world.step() == [(0, 1), (1, 1)]
    world.end(world.live[0], "stop")
    assert world.step() == [(1, 1), (2, 1)]


def test_what_can_never_run_is_refused() -> None:
    scheduler = Scheduler(PageTable(2, 4), max_batch=2, max_step_tokens=64)
    scheduler.add(sequence(0, 4, new=4))
    with pytest.raises(ValueError, match="needs 3 pages, the pool has 2"):
        scheduler.add(sequence(1, 5, new=4))


def test_finishing_twice_is_refused() -> None:
    scheduler = Scheduler(PageTable(2, 4), max_batch=2, max_step_tokens=64)
    one = sequence(0, 2)
    scheduler.add(one)
    scheduler.finish(one, "cancelled")
    assert not scheduler.has_work
    with pytest.raises(ValueError, match=r"finished already \(cancelled\)"):
        scheduler.finish(one, "stop")


@pytest.mark.parametrize("limits", [(0, 4, 4), (5, 4, 4), (2, 4, 0)])
def test_bad_limits(limits: tuple[int, int, int]) -> None:
    batch, step, mixed = limits
    with pytest.raises(ValueError, match="at least"):
        Scheduler(PageTable(2, 4), max_batch=batch, max_step_tokens=step, max_mixed_tokens=mixed)


def test_pending_ids_across_the_end_of_the_prompt() -> None:
    one = sequence(0, 3)
    one.generated = [7, 8]
    one.num_computed = 1
    assert list(one.pending(3)) == [1, 2, 7]
    one.num_computed = 4
    assert (list(one.pending(1)), one.num_pending) == ([8], 1)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_ten_thousand_random_events(prefix_cache: bool) -> None:
    world = World(prefix_cache=prefix_cache)
    random_events(world, Random(3), 10_000)
    # What the test is about did happen.
    assert world.num_preempted > 100
    assert (world.num_cached > 500) is prefix_cache
    world.drain()


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=20)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, end, fail and are cancelled in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20), new=st.integers(1, 12), priority=st.integers(0, 1)
    )
    def submit(self, prompt: list[int], new: int, priority: int) -> None:
        self.world.submit(prompt, new, priority)

    @rule(data=st.data(), reason=st.sampled_from(["cancelled", "stop", "error"]))
    def end(self, data: st.DataObject, reason: str) -> None:
        if self.world.live:
            self.world.end(data.draw(st.sampled_from(self.world.live)), reason)

    @rule()
    def step(self) -> None:
        self.world.step()

    @rule()
    def defragment(self) -> None:
        self.world.defragment()

    @invariant()
    def pages_have_owners(self) -> None:
        self.world.pages_belong_to_the_running()

    def teardown(self) -> None:
        self.world.drain()


TestSchedulerMachine = SchedulerMachine.TestCase
