from dataclasses import replace
from itertools import cycle, pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from triton import knobs

from qinfer.bench.synthetic import synthetic_model
from qinfer.cache.paged import PagedKVCache
from qinfer.engine.choices import choice_of
from qinfer.engine.generator import Generator
from qinfer.engine.graphs import GraphRunner, bucket_sizes, mixed_sizes
from qinfer.engine.sampling import SamplerState, SamplingParams, sample_table
from qinfer.engine.sequence import Sequence
from qinfer.engine.steps import StepRunner
from qinfer.models.batch import Batch, Piece, Room
from qinfer.models.decoder import Decoder
from qinfer.models.layers import Linear
from qinfer.models.lora import Lora
from qinfer.models.model import Model
from qinfer.models.rehearsal import rehearsal
from tests.compare import assert_close
from tests.engine.eager import Eager
from tests.models import adapters, tiny

WIDTH, PAGE = 3, 16


def cache_on(device: str) -> PagedKVCache:
    return PagedKVCache(num_layers=1, num_pages=4, num_kv_heads=1, head_dim=16, device=device, page_size=PAGE)


def unused(batch: Batch, cache: PagedKVCache) -> Tensor:
    raise AssertionError("the decoder must not run here")


def test_bucket_sizes() -> None:
    assert bucket_sizes(1) == (1,)
    assert bucket_sizes(8) == (1, 2, 4, 8)
    assert bucket_sizes(11) == (1, 2, 4, 8, 11)
    with pytest.raises(ValueError, match="max_batch must be at least 1, got 0"):
        bucket_sizes(0)


def test_steps_are_padded_to_the_next_bucket() -> None:
    runner = GraphRunner(unused, cache_on("cpu"), max_batch=11, table_width=WIDTH)
    assert [runner.bucket(n) for n in (1, 2, 3, 5, 9, 11)] == [1, 2, 4, 8, 11, 11]
    with pytest.raises(ValueError, match="at most 11 sequences, got 12"):
        runner.bucket(12)


def test_mixed_steps_are_padded_to_few_sizes() -> None:
    assert mixed_sizes(0) == ()
    assert mixed_sizes(1) == (1,)
    assert mixed_sizes(40) == (16, 32, 40)
    assert mixed_sizes(320) == (16, 32, 64, 128, 192, 256, 320)
    assert mixed_sizes(700) == (16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 700)
    assert mixed_sizes(1200)[-4:] == (960, 1024, 1152, 1200)
    assert [len(mixed_sizes(most)) for most in (2048, 8192, 16384)] == [26, 42, 50]


@given(st.integers(1, 20_000))
def test_sizes_grow_to_the_largest_step_and_waste_little(most: int) -> None:
    sizes = mixed_sizes(most)
    assert sizes[-1] == most
    # A step of one token more than a size is the one with most padding.
    for before, after in pairwise((0, *sizes)):
        assert 0 < after - before <= max(64, after // 8)


def test_rooms() -> None:
    runner = GraphRunner(unused, cache_on("cpu"), max_batch=4, table_width=WIDTH, max_step_tokens=320)
    assert runner.mixed_room(Room(9, 1, 9, 9)) == Room(16, 2, 16, 16), "one sequence with eight drafts"
    assert runner.mixed_room(Room(9, 2, 9, 8)) == Room(16, 5, 16, 16)
    assert runner.mixed_room(Room(20, 3, 2, 18)) == Room(32, 5, 32, 32)
    assert runner.mixed_room(Room(256, 1, 1, 256)) == Room(256, 2, 64, 256)
    assert runner.mixed_room(Room(257, 1, 0, 257)) == Room(320, 5, 64, 320)
    assert runner.mixed_room(Room(321, 2, 2, 320)) is None
    assert runner.mixed_room(Room(70, 2, 65, 69)) is None, "drafts want more logits than there are"
    padding = runner._padding(Room(32, 5, 32, 32))
    assert padding.query_starts.tolist() == [0, 1, 2, 3, 4, 32]
    assert (padding.max_query_len, padding.context_lens.tolist()) == (32, [0] * 5)


def few_or_more(most: int) -> st.SearchStrategy[int]:
    """One to most, and often so few that they have rooms of their own."""
    return st.integers(1, min(most, 3)) | st.integers(1, most)


@given(st.integers(1, 300), st.integers(0, 5000), st.data())
def test_every_step_that_the_scheduler_makes_has_a_room(max_batch: int, more: int, data: st.DataObject) -> None:
    runner = GraphRunner(
        unused, cache_on("cpu"), max_batch=max_batch, table_width=WIDTH, max_step_tokens=max_batch + more
    )
    assert len({*runner.mixed, *map(Room.of_rows, runner.buckets)}) == len(runner.mixed) + len(runner.buckets)
    sequences = data.draw(few_or_more(max_batch))
    tokens = sequences - 1 + data.draw(few_or_more(max_batch + more - sequences + 1))
    used = Room(tokens, sequences, data.draw(st.integers(0, sequences)), tokens - sequences + 1)
    room = runner.mixed_room(used)
    assert room is not None
    assert room.holds(used)
    assert room.sequences > sequences, "padding needs a sequence"
    assert room.longest == room.tokens, "padding may be one piece"


def test_recording_writes_nothing_and_reads_nothing() -> None:
    runner = GraphRunner(unused, cache_on("cpu"), max_batch=4, table_width=WIDTH)
    batch = runner._padding(Room.of_rows(4))
    assert (batch.slots.tolist(), batch.context_lens.tolist()) == ([-1] * 4, [0] * 4)
    assert (batch.query_starts.tolist(), batch.logit_rows.tolist()) == ([0, 1, 2, 3, 4], [0, 1, 2, 3])
    # A step of the same bucket fits over it.
    step = Batch.build(
        [Piece([5], 0, [1], "last")], page_size=PAGE, device="cpu", pad_to=Room.of_rows(4), table_width=WIDTH
    )
    batch.buffer.copy_(step.buffer)
    assert batch.token_ids.tolist() == [5, 0, 0, 0]


@pytest.mark.parametrize(("pad_to", "width"), [(3, WIDTH), (4, WIDTH + 4)])
def test_batches_of_another_shape_are_refused(pad_to: int, width: int) -> None:
    runner = GraphRunner(unused, cache_on("cpu"), max_batch=4, table_width=WIDTH)
    batch = Batch.build(
        [Piece([5], 0, [1], "last")], page_size=PAGE, device="cpu", pad_to=Room.of_rows(pad_to), table_width=width
    )
    with pytest.raises(ValueError, match="batch must have one token per row"):
        runner.run(batch)


LONGEST = 96  # positions of the sequences below
RATES = st.sampled_from([0, 0, 1.5])  # of `sample_rows`, 0 for the likeliest


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Lora]:
    path: Path = tmp_path_factory.mktemp("rooms")
    tiny.save(path / "model", "llama", num_hidden_layers=1)
    model = Model.load(path / "model", device="cpu")
    adapters.save(path / "lora", path / "model")
    return model, model.load_lora(path / "lora")


@st.composite
def steps(draw: st.DrawFn, max_batch: int, max_step_tokens: int) -> list[tuple[str, int, int, bool]]:
    """What each sequence of a step is, how many tokens it has computed and computes now, and if with an adapter."""
    count = draw(few_or_more(max_batch))
    extra, step = max_step_tokens - count, []
    for _ in range(count):
        kind = draw(st.sampled_from(("stream", "stream on the device", "drafts", "whole", "part")))
        more = 0 if kind.startswith("stream") else draw(st.integers(0, min(extra, LONGEST - 50)))
        extra -= more
        step.append((kind, draw(st.integers(1, 40)), 1 + more, draw(st.booleans())))
    # Whoever runs them has streams first, but for those among drafts.
    return sorted(step, key=lambda one: one[2] > 1)


def sequence(number: int, described: tuple[str, int, int, bool], lora: Lora) -> Sequence:
    kind, computed, count, is_adapted = described
    known = {"stream on the device": 0, "drafts": 1, "part": count + 3}.get(kind, count)
    width = LONGEST // PAGE
    params = SamplingParams(temperature=0)
    ids = tiny.prompt(computed + known, seed=computed)
    one = Sequence(number, tuple(ids), params, SamplerState(params, ids), lora=lora if is_adapted else None)
    one.pages, one.num_computed = [*range(number * width, (number + 1) * width)], computed
    one.drafts = tiny.prompt(count - 1, seed=count) if kind == "drafts" else []
    one.source = 0 if kind == "stream on the device" else -1
    return one


@given(st.integers(1, 33), st.integers(0, 150), st.data())
def test_a_padded_step_is_the_step(small: tuple[Model, Lora], max_batch: int, more: int, data: st.DataObject) -> None:
    model, lora = small
    width, max_step_tokens = LONGEST // PAGE, max_batch + more
    runners, caches = list[StepRunner](), list[PagedKVCache]()
    for has_rooms in (False, True):
        cache = model.new_cache(max_batch * width, page_size=PAGE, kv_format="fp32")
        for pages in cache.pages(0):
            pages.codes.normal_(generator=torch.Generator().manual_seed(0))
        sizes = {"max_batch": max_batch, "table_width": width, "max_step_tokens": max_step_tokens}
        runner = StepRunner(model, cache, page_size=PAGE, **sizes)
        runner._sampled.fill_(7)
        if has_rooms:
            runner.graphs = Eager(runner._forward, cache, **sizes)
        caches.append(cache)
        runners.append(runner)
    # Several, since a room is filled again.
    for described in data.draw(st.lists(steps(max_batch, max_step_tokens), min_size=1, max_size=3)):
        launched = []
        padded_graphs = runners[1].graphs
        for runner in runners:
            step = [(sequence(number, one, lora), one[2]) for number, one in enumerate(described)]
            launched.append(runner.launch(step))
        plain, padded = launched
        assert [one.id for one in plain.sequences] == [one.id for one in padded.sequences]
        assert_close(padded.logits, plain.logits)
        if len(padded.logits):
            table = np.array([(data.draw(RATES), 0, 1, 1, (row + 0.5) / 99) for row in range(len(padded.logits))])
            table[:, 2] = data.draw(st.sampled_from([1, 0.5]))
            ids = padded_graphs.choose(padded.logits, choice_of(table), table)
            if len(padded.logits) > len(padded_graphs.ids):
                assert ids is None, "no room has so many rows"
            else:
                assert ids.tolist() == sample_table(padded.logits, table).tolist()
            assert padded_graphs.choose(plain.logits, choice_of(table), table) is None
        for ours, theirs in zip(*(cache.pages(0) for cache in caches), strict=True):
            assert_close(ours.codes, theirs.codes)


@pytest.mark.parametrize("draft", [0, 3])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_padded_steps_say_what_steps_without_padding_say(tmp_path: Path, kind: str, draft: int) -> None:
    tiny.save(tmp_path, kind)
    model = Model.load(tmp_path, device="cpu")
    adapters.save(tmp_path / "lora", tmp_path)
    loras = [None, model.load_lora(tmp_path / "lora")]
    options = {"kv_format": "fp32", "max_tokens": 256, "page_size": PAGE, "max_batch": 3, "draft": draft}
    plain, padded = (Generator(model, max_step_tokens=24, **options) for _ in range(2))
    runner = padded.runner
    runner.graphs = Eager(
        runner._forward, padded.cache, max_batch=3, table_width=runner._table_width, max_step_tokens=24
    )
    texts = []
    for gen in (plain, padded):
        random, jobs = Random(1), []
        # Prompts of any length arrive while others stream; some repeat themselves, so that there is something to guess.
        for number in range(7):
            prompt = tiny.prompt(random.randrange(1, 30), seed=number) * random.choice((1, 2))
            params = SamplingParams(temperature=0, max_new_tokens=random.randrange(1, 12), ignore_eos=True)
            jobs.append(gen.submit(prompt, params, lora=loras[number % 2]))
            for _ in range(random.randrange(4)):
                gen.step()
        while gen.scheduler.has_work or not all(job.finished for job in jobs):
            gen.step()
        texts.append([job.completion for job in jobs])
    assert texts[0] == texts[1]
    assert all(text.finish_reason == "length" for text in texts[0])
    assert runner.graphs.rooms & set(runner.graphs.mixed), "no step was mixed"
    assert {room.tokens for room in runner.graphs.rooms} >= {1, 2, 16}


# --- on a GPU


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path: Path = tmp_path_factory.mktemp("graphs") / "llama"
    tiny.save(path, "llama", dtype=torch.bfloat16)
    return Model.load(path, device="cuda")


@pytest.mark.gpu
def test_graph_gives_the_logits_of_the_eager_step_bitwise(model: Model) -> None:
    caches = [model.new_cache(12, page_size=PAGE) for _ in range(2)]
    runners = [
        kind(model.decoder, cache, max_batch=6, table_width=WIDTH)
        for kind, cache in zip((Eager, GraphRunner), caches, strict=True)
    ]
    runners[1].capture_all()
    assert all(torch.equal(x.codes, y.codes) for x, y in zip(*(cache.pages(0) for cache in caches), strict=True))
    pages = [[2 * i, 2 * i + 1] for i in range(6)]
    texts = [tiny.prompt(11 + i, seed=i) for i in range(6)]
    for cache in caches:
        pieces = [Piece(text, 0, own, "none") for text, own in zip(texts, pages, strict=True)]
        model.decoder(Batch.build(pieces, page_size=PAGE, device=model.device), cache)
    # Numbers of sequences go up and down, so that a bucket sees rows that an earlier step left behind.
    for step, count in enumerate((1, 6, 3, 5, 2, 4, 1)):
        pieces = [Piece([7 * step + i], len(texts[i]) + step, pages[i], "last") for i in range(count)]
        results = []
        for runner in runners:
            rows = runner.bucket(count)
            batch = Batch.build(
                pieces, page_size=PAGE, device=model.device, pad_to=Room.of_rows(rows), table_width=WIDTH
            )
            results.append(runner.run(batch)[:count].clone())
        assert torch.isfinite(results[0]).all()
        assert torch.equal(*results), f"step {step}"
    for layer in range(model.config.num_layers):
        assert all(
            torch.equal(x.codes, y.codes) for x, y in zip(*(cache.pages(layer) for cache in caches), strict=True)
        )


@pytest.mark.gpu
def test_rooms_share_the_memory_of_the_largest(model: Model) -> None:
    cache = model.new_cache(12, page_size=PAGE)
    runner = GraphRunner(model.decoder, cache, max_batch=6, table_width=WIDTH, max_step_tokens=500)
    runner._find(runner.mixed[-1], has_adapters=False)
    before = torch.cuda.memory_allocated()
    runner.capture_all()
    batches = sum(-(-captured.batch.buffer.nbytes // 512) * 512 for captured in runner._captured.values())
    logits = min(captured.logits.nbytes for captured in runner._captured.values() if len(captured.logits) > 6)
    assert torch.cuda.memory_allocated() - before < batches + logits


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kinds",
    [
        [{"temperature": 0}],
        [{"temperature": 0}, {"temperature": 0.8}],
        [{"temperature": 1, "top_p": 0.8}, {"temperature": 0}, {"temperature": 2, "top_k": 5}, {"min_p": 0.1}],
        [{"temperature": 1, "presence_penalty": 1.0}, {"temperature": 1}, {"temperature": 0, "logprobs": 2}],
    ],
)
def test_generator_on_graphs_says_the_same(model: Model, kinds: list[dict[str, float]]) -> None:
    options = {"max_tokens": 512, "page_size": PAGE, "max_batch": 4, "max_step_tokens": 32, "prefix_cache": False}
    texts = [tiny.prompt(length, seed=length) for length in (1, 40, 17, 5, 9)]
    several = [
        SamplingParams(seed=3, max_new_tokens=30, ignore_eos=True, **kind) for kind, _ in zip(cycle(kinds), range(5))
    ]
    with_graphs, eager = Generator(model, **options), Generator(model, **options)
    width = with_graphs.runner.graphs.table_width
    # Padded alike, so that both take the same kernels.
    eager.runner.graphs = Eager(eager.runner._forward, eager.cache, max_batch=4, table_width=width, max_step_tokens=32)
    outs = with_graphs.generate(texts, several)
    assert outs == eager.generate(texts, several)
    assert outs == with_graphs.generate(texts, several)
    recorded = {room for room, _ in with_graphs.runner.graphs._captured}
    assert recorded & set(with_graphs.runner.graphs.mixed), "no step was mixed"
    assert [out.finish_reason for out in outs] == ["length"] * 5
    assert with_graphs.pages.num_used == 0


@pytest.mark.gpu
def test_what_a_step_reads_stays_until_the_device_comes_to_it(model: Model) -> None:
    sizes = {"page_size": PAGE, "max_batch": 2, "table_width": 12, "max_step_tokens": 16}
    caches = [model.new_cache(12, page_size=PAGE) for _ in range(2)]
    prompt, params = tiny.prompt(190, seed=5), SamplingParams(temperature=0)
    for cache, wait in zip(caches, (torch.cuda.synchronize, lambda: None), strict=True):
        runner = StepRunner(model, cache, **sizes)
        one = Sequence(0, tuple(prompt), params, SamplerState(params, prompt), pages=[*range(12)])
        runner.launch([(one, 16)])
        # The device is behind by more than the host takes for all steps.
        torch.cuda._sleep(1 << 29)
        while one.num_pending:
            wait()
            runner.launch([(one, min(16, one.num_pending))])
        torch.cuda.synchronize()
    for layer in range(model.config.num_layers):
        assert all(
            torch.equal(x.codes, y.codes) for x, y in zip(*(cache.pages(layer) for cache in caches), strict=True)
        )


@pytest.mark.gpu
def test_recording_in_between_leaves_the_ids_of_the_last_step(model: Model) -> None:
    runner = GraphRunner(model.decoder, model.new_cache(12, page_size=PAGE), max_batch=2, table_width=WIDTH)
    runner.ids.fill_(7)
    runner.host_ids.fill_(8)
    runner.capture_all()
    torch.cuda.synchronize()
    assert (runner.ids.tolist(), runner.host_ids.tolist()) == ([7, 7], [8, 8])


def with_orders(decoder: Decoder) -> Decoder:
    """Give every matrix behind attention and every down projection an order of its own, as GPTQ in act-order has it."""

    def ordered(linear: Linear, seed: int) -> Linear:
        order = torch.randperm(linear.operand.in_features, generator=torch.Generator().manual_seed(seed)).int()
        return replace(linear, operand=replace(linear.operand, order=order.cuda()))

    blocks = [
        replace(
            block,
            attention=replace(block.attention, out=ordered(block.attention.out, seed)),
            mlp=replace(block.mlp, down=ordered(block.mlp.down, seed)),
        )
        for seed, block in enumerate(decoder.blocks)
    ]
    return replace(decoder, blocks=tuple(blocks))


@pytest.mark.gpu
@pytest.mark.parametrize("warm", [False, True])
def test_recorded_steps_find_the_orders_of_layers_that_no_rehearsal_runs(warm: bool) -> None:
    model = synthetic_model("llama-3.2-1b", "gptq-4bit-g128", torch.device("cuda"), num_layers=7)
    model.decoder = with_orders(model.decoder)
    options = {"max_tokens": 512, "page_size": PAGE, "max_batch": 2, "max_step_tokens": 64, "prefix_cache": False}
    generator, eager = Generator(model, **options), Generator(model, **options)
    width = generator.runner.graphs.table_width
    eager.runner.graphs = Eager(eager.runner._forward, eager.cache, max_batch=2, table_width=width, max_step_tokens=64)
    if warm:
        generator.warm_up()
    texts = [tiny.prompt(length, seed=length) for length in (3, 20)]
    params = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
    # The first step is none of the largest room, which is recorded first.
    outs = generator.generate(texts, [params] * 2)
    assert outs == eager.generate(texts, [params] * 2)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_format", ["fp16", "q8,4:q4"])
def test_nothing_is_compiled_after_the_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_format: str) -> None:
    # More layers than the warm-up runs.
    tiny.save(tmp_path, "llama", dtype=torch.bfloat16, num_hidden_layers=6, head_dim=32)
    model = Model.load(tmp_path, device="cuda")
    gen = Generator(model, max_tokens=1024, page_size=PAGE, max_batch=6, max_step_tokens=64, kv_format=kv_format)
    gen.warm_up()
    assert len(rehearsal(model.decoder, gen.cache).blocks) < 6
    assert gen.runner.graphs is not None
    assert len(gen.runner.graphs._captured) == len(gen.runner.graphs.buckets) + len(gen.runner.graphs.mixed)
    compiled: list[object] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **told: compiled.append(told["repr"]))
    random = Random(0)
    for seed in range(40):
        options = random.choice(
            ({"temperature": 0}, {"top_k": 9}, {"min_p": 0.1}, {"top_p": 0.9, "logit_bias": {3: 1}})
        )
        params = SamplingParams(seed=seed, max_new_tokens=random.randrange(1, 40), ignore_eos=True, **options)
        gen.submit(tiny.prompt(random.randrange(1, 150), seed=seed), params)
        for _ in range(random.randrange(6)):
            gen.step()
    while gen.scheduler.has_work:
        gen.step()
    assert not compiled
