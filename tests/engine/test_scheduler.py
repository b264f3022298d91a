import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from qinfer.engine.pages import PageTable
from qinfer.engine.sampling import SamplingParams, UniformStream
from qinfer.engine.scheduler import Scheduler
from qinfer.engine.sequence import Sequence, State


def sequence(number: int, prompt: int, new: int = 4) -> Sequence:
    return Sequence(number, tuple(range(prompt)), SamplingParams(max_new_tokens=new), UniformStream(0))


def run(step: list[tuple[Sequence, int]]) -> list[tuple[int, int]]:
    """What a generator does with a step, without a model: every complete sequence gets a token."""
    for one, count in step:
        one.num_computed += count
        if one.num_pending == 0:
            one.generated.append(0)
    return [(one.id, count) for one, count in step]


def test_prompt_is_cut_into_chunks_beside_running_sequences() -> None:
    scheduler = Scheduler(PageTable(100, 4), max_batch=3, max_step_tokens=5)
    for one in (sequence(0, 3), sequence(1, 9), sequence(2, 2)):
        scheduler.add(one)
    assert run(scheduler.schedule()) == [(0, 3), (1, 2)]
    assert run(scheduler.schedule()) == [(0, 1), (1, 4)]
    assert run(scheduler.schedule()) == [(0, 1), (1, 3), (2, 1)]
    assert run(scheduler.schedule()) == [(0, 1), (1, 1), (2, 1)]


def test_worst_case_is_reserved_at_admission() -> None:
    pages = PageTable(4, 4)
    scheduler = Scheduler(pages, max_batch=8, max_step_tokens=8)
    first, second, third = sequence(0, 5, new=6), sequence(1, 3, new=2), sequence(2, 1, new=1)
    for one in (first, second, third):
        scheduler.add(one)
    assert run(scheduler.schedule()) == [(0, 5)]
    # 11 and 5 tokens take 3 + 2 pages of the 4. The third would fit, and still waits for its turn.
    assert (len(first.pages), pages.num_free, list(scheduler.waiting)) == (3, 1, [second, third])
    scheduler.finish(first, "stop")
    assert (first.state, first.finish_reason, first.pages) == (State.FINISHED, "stop", [])
    assert run(scheduler.schedule()) == [(1, 3), (2, 1)]


def test_batch_is_limited() -> None:
    scheduler = Scheduler(PageTable(100, 4), max_batch=2, max_step_tokens=64)
    for number in range(3):
        scheduler.add(sequence(number, 1))
    assert run(scheduler.schedule()) == [(0, 1), (1, 1)]
    scheduler.finish(scheduler.running[0], "stop")
    assert run(scheduler.schedule()) == [(1, 1), (2, 1)]


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


@pytest.mark.parametrize("limits", [(0, 4), (5, 4)])
def test_bad_limits(limits: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        Scheduler(PageTable(2, 4), max_batch=limits[0], max_step_tokens=limits[1])


def test_pending_ids_across_the_end_of_the_prompt() -> None:
    one = sequence(0, 3)
    one.generated = [7, 8]
    one.num_computed = 1
    assert list(one.pending(3)) == [1, 2, 7]
    one.num_computed = 4
    assert (list(one.pending(1)), one.num_pending) == ([8], 1)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, end and are cancelled in any order; nobody starves and no page has two owners."""

    MAX_BATCH, MAX_STEP = 3, 5

    def __init__(self) -> None:
        super().__init__()
        self.pages = PageTable(8, 4)
        self.scheduler = Scheduler(self.pages, max_batch=self.MAX_BATCH, max_step_tokens=self.MAX_STEP)
        self.live: list[Sequence] = []
        self.admitted: list[int] = []
        self.count = 0

    @rule(prompt=st.integers(1, 20), new=st.integers(1, 12))
    def submit(self, prompt: int, new: int) -> None:
        one = sequence(self.count, prompt, new)
        self.count += 1
        self.live.append(one)
        self.scheduler.add(one)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.live:
            one = data.draw(st.sampled_from(self.live))
            self.live.remove(one)
            self.scheduler.finish(one, "cancelled")

    @rule()
    def step(self) -> None:
        step = self.scheduler.schedule()
        assert bool(step) == bool(self.live)
        assert sum(count for _, count in step) <= self.MAX_STEP
        assert len(self.scheduler.running) <= self.MAX_BATCH
        assert len({one.id for one, _ in step}) == len(step)
        before = {one.id: one.num_computed for one, _ in step}
        for one, count in step:
            assert 1 <= count <= one.num_pending
            assert one.num_computed + count <= len(one.pages) * self.pages.page_size
        run(step)
        # Everybody past the prompt moves in every step, and so does the oldest prompt.
        for one in self.scheduler.running:
            if one.generated:
                assert one.id in before
        for one, _ in step:
            if len(one.generated) == one.params.max_new_tokens:
                self.live.remove(one)
                self.scheduler.finish(one, "length")

    @invariant()
    def pages_have_one_owner(self) -> None:
        held = [page for one in self.live for page in one.pages]
        assert len(held) == len(set(held)) == self.pages.num_used
        assert all(self.pages.references(page) == 1 for page in held)

    @invariant()
    def first_come_first_served(self) -> None:
        numbers = [one.id for one in [*self.scheduler.running, *self.scheduler.waiting]]
        assert numbers == sorted(numbers)

    def teardown(self) -> None:
        # Without new requests everything drains in bounded time.
        for _ in range(1 + sum(one.max_tokens for one in self.live)):
            self.step()
        assert not self.live
        assert self.pages.num_free == self.pages.num_pages


TestSchedulerMachine = SchedulerMachine.TestCase
