"""Windows that free the pages behind them: the same tokens from fewer pages."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qinfer.engine.generator import Generator
from qinfer.engine.prefix import keys
from qinfer.engine.sampling import SamplingParams
from qinfer.engine.scheduler import Scheduler
from qinfer.engine.sequence import State
from qinfer.engine.window import Window
from qinfer.models.model import Model
from tests.engine.mock import TOKENIZER, MockModel, drain, expected, generator, is_idle
from tests.engine.world import World, continued, random_events, sequence
from tests.models import tiny


@given(length=st.integers(1, 40), page_size=st.integers(1, 9), position=st.integers(0, 90))
def test_first_page_holds_the_first_position_that_is_seen(length: int, page_size: int, position: int) -> None:
    window = Window(length, page_size)
    seen = {place // page_size for place in range(position + 1) if place > position - length}
    assert window.first_page(position) == min(seen)
    # What is seen, and a whole page of tokens behind it, fits in what a sequence is promised.
    step = {place // page_size for place in range(max(0, position - length + 1), position + 1 + page_size)}
    assert len(step) <= window.most_pages(10**6) <= -(-length // page_size) + 2
    assert Window(None, page_size).first_page(position) == 0
    assert Window(None, page_size).most_pages(position) == -(-position // page_size)


@pytest.mark.parametrize(("window", "prefix_cache"), [(1, True), (4, True), (6, False), (13, True)])
def test_random_events_with_a_window(window: int, prefix_cache: bool) -> None:
    world = World(window=window, prefix_cache=prefix_cache)
    random_events(world, Random(window), 2500)
    assert world.num_freed > 100
    assert (world.num_cached > 100) is prefix_cache
    world.drain()


def test_small_pool_serves_long_texts() -> None:
    # Five positions behind the next one touch two pages of four, and two more make room for steps.
    world = World(num_pages=4, window=6, max_step_tokens=16, max_mixed_tokens=16, prefix_cache=False)
    one = world.submit(range(50), 60)
    held = []
    while world.live:
        world.step()
        held.append(len(one.held_pages))
    assert one.generated == continued(range(50), 60)
    assert max(held) == 4
    # Decoding, it has what it sees and the page it writes.
    assert max(held[-50:]) == 3
    with pytest.raises(ValueError, match="needs 4 pages, the pool has 3"):
        World(num_pages=3, window=6).submit(range(50), 60)


def test_long_prompt_takes_whole_steps_where_there_is_room() -> None:
    world = World(num_pages=20, window=6, max_step_tokens=16)
    world.submit(range(50), 4)
    assert [world.step() for _ in range(4)] == [[(0, 16)], [(0, 16)], [(0, 16)], [(0, 2)]]


def test_prompts_in_a_tight_pool_take_turns_by_order() -> None:
    world = World(num_pages=5, window=6, max_step_tokens=16, prefix_cache=False)
    first, second = world.submit(range(40), 9), world.submit(range(40), 9)
    world.drain()
    assert first.num_preempted == 0
    assert second.generated == continued(range(40), 9)


def test_given_back_page_loses_one_reference() -> None:
    world = World(num_pages=20, window=5, max_step_tokens=40)
    text = [5, 6, 7, 8, 9, 10, 11, 12]
    first = world.submit([*text, 1], 30)
    world.step()
    second = world.submit([*text, 2], 3)
    world.step()
    # The first page is behind the window of position 8, so the second sequence does without.
    shared = first.pages[1]
    assert (second.pages[:2], second.cached_tokens, world.pages.references(shared)) == ([-1, shared], 8, 2)
    while second in world.live:
        world.step()
    assert world.pages.references(shared) == (shared in first.pages)
    world.drain()


def test_beginning_is_shared_without_what_lies_behind_the_window() -> None:
    world = World(num_pages=4, window=5, max_step_tokens=40)
    text = [*range(20)]
    world.submit(text, 1)
    world.drain()
    # Four pages held five, so part of the beginning is gone; the end is known.
    known = [world.pages.find(key) for key in keys(sequence(9, text), 5, 4)]
    assert None in known[:3]
    assert known[-1] is not None
    again = world.submit([*text, 1, 2], 2)
    world.step()
    assert (again.cached_tokens, again.num_freed) == (20, 4)
    world.drain()


def test_rewound_sequence_comes_back_for_pages_it_gave_away() -> None:
    world = World(num_pages=9, window=3, max_step_tokens=40, prefix_cache=False)
    one = world.submit([1, 2], 24)
    while len(one.generated) < 17:
        world.step()
    assert one.num_freed >= 3
    world.scheduler.rewind(one, 2)
    assert (one.state, one.num_preempted) == (State.WAITING, 1)
    world.drain()
    assert one.generated == continued([1, 2], 24)


@pytest.mark.parametrize("options", [{}, {"prefix_cache": False}, {"draft": 3}])
def test_generator_holds_a_window_of_pages(options: dict[str, int]) -> None:
    model = MockModel(memory=6)
    gen = generator(model, max_tokens=16, max_batch=2, max_step_tokens=8, **options)
    params = SamplingParams(max_new_tokens=90, temperature=0.5, seed=4)
    job = gen.submit([3, 5] * 20, params)
    while gen.scheduler.has_work:
        gen.step()
        assert len(job.sequence.held_pages) <= 4
    drain(gen)
    assert list(job.completion.token_ids) == expected([3, 5] * 20, params, memory=6)
    assert is_idle(gen)
    with pytest.raises(ValueError, match="the page pool holds 12"):
        generator(MockModel(memory=6), max_tokens=12).submit([3] * 20, params)


def test_defragmentation_changes_no_token() -> None:
    params = SamplingParams(max_new_tokens=20, temperature=0.5, seed=4)
    prompts = [[3, 5] * 9, [7] * 5, [3, 5] * 9 + [1], [8] * 30]
    gen = generator(MockModel(memory=9), prefix_cache=False)
    jobs = [gen.submit(prompt, params) for prompt in prompts]
    num_moved = 0
    while gen.scheduler.has_work:
        gen.step()
        if len(jobs[1].sequence.generated) == 8:
            jobs[1].cancel()
        num_moved += gen.defragment()
    drain(gen)
    assert num_moved > 4
    for job, prompt in zip(jobs, prompts, strict=True):
        whole = expected(prompt, params, memory=9)
        assert list(job.completion.token_ids) == whole[: len(job.completion.token_ids)]
        assert len(job.completion.token_ids) == 20 or job is jobs[1]


def test_banned_strings_reach_back_behind_the_window() -> None:
    def tokens(memory_is_told: bool) -> tuple[int, ...]:
        model = MockModel(tokenizer=TOKENIZER, memory=2)
        if not memory_is_told:
            model.config.longest_window = None
        texts = [TOKENIZER.decode([one]) for one in plain]
        banned = ("".join(texts[4:11]), "".join(texts[7:16]))
        return generator(model).generate([70, 71], SamplingParams(**options, banned_strings=banned)).token_ids

    options = {"max_new_tokens": 40, "seed": 1, "allowed_ids": tuple(range(35, 90))}
    plain = expected([70, 71], SamplingParams(**options), memory=2)
    assert list(tokens(True)) == list(tokens(False)) != plain


def test_model_with_windows_never_reads_what_it_gave_back(tmp_path: Path) -> None:
    tiny.save(tmp_path / "m", "mistral", sliding_window=20)
    model = Model.load(tmp_path / "m", device="cpu")
    assert model.config.longest_window == 20
    prompts, params = [tiny.prompt(70), tiny.prompt(9, seed=1)], SamplingParams(max_new_tokens=70, temperature=0)
    whole = Generator(model, max_tokens=512, page_size=16)
    whole.scheduler = Scheduler(whole.pages, max_batch=64, max_step_tokens=2048)
    freeing = Generator(model, max_tokens=160, page_size=16, max_batch=2, max_step_tokens=48, prefix_cache=False)
    jobs = [freeing.submit(prompt, params) for prompt in prompts]
    while freeing.scheduler.has_work:
        freeing.step()
        free = [page for page in range(freeing.pages.num_pages) if freeing.pages.references(page) == 0]
        for pages in (pages for layer in range(2) for pages in freeing.cache.pages(layer)):
            pages.codes[free] = torch.nan
    told = [completion.token_ids for completion in whole.generate(prompts, params)]
    assert [job.completion.token_ids for job in jobs] == told
    # The window of this model matters: without it other tokens come.
    tiny.edit_config(tmp_path / "m", sliding_window=None)
    wide = Generator(Model.load(tmp_path / "m", device="cpu"), max_tokens=512, page_size=16)
    assert [completion.token_ids for completion in wide.generate(prompts, params)] != told


def test_one_layer_that_sees_all_keeps_all_pages(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"]
    tiny.save(tmp_path / "m", "qwen3", head_dim=16, use_sliding_window=True, sliding_window=20, layer_types=kinds)
    model = Model.load(tmp_path / "m", device="cpu")
    assert (model.config.windows, model.config.longest_window) == ((None, 20), None)
