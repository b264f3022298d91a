from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs

from qinfer.cache.paged import PagedKVCache
from qinfer.engine.generator import Generator
from qinfer.engine.graphs import GraphRunner, bucket_sizes, mixed_sizes
from qinfer.engine.sampling import SamplingParams
from qinfer.models.batch import Batch, Piece, Room
from qinfer.models.model import Model
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
    assert mixed_sizes(40) == (16, 32, 64)
    assert mixed_sizes(320) == (16, 32, 64, 128, 192, 256, 320)
    assert mixed_sizes(1200) == (16, 32, 64, 192, 384, 576, 768, 960, 1152, 1344)
    runner = GraphRunner(unused, cache_on("cpu"), max_batch=4, table_width=WIDTH, max_mixed_tokens=70)
    assert runner.mixed_room(Room(9, 2, 9)) == Room(16, 5, 16), "one sequence with eight drafts"
    assert runner.mixed_room(Room(20, 3, 2)) == Room(32, 5, 32)
    assert runner.mixed_room(Room(65, 4, 4)) == Room(128, 5, 64)
    assert runner.mixed_room(Room(129, 2, 2)) is None
    assert runner.mixed_room(Room(70, 2, 65)) is None, "drafts want more logits than there are"
    padding = runner._padding(Room(32, 5, 32))
    assert padding.query_starts.tolist() == [0, 1, 2, 3, 4, 32]
    assert (padding.max_query_len, padding.context_lens.tolist()) == (32, [0] * 5)


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


class Eager(GraphRunner):
    """The same padded steps without a graph, and the rooms that they had."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rooms: set[Room] = set()

    def run(self, batch: Batch) -> Tensor:
        (rows, width), tokens = batch.page_table.shape, batch.token_ids.shape[0]
        self.rooms.add(Room(tokens, rows, batch.logit_rows.shape[0]))
        sizes = {"T": tokens, "B": rows, "W": width, "R": batch.logit_rows.shape[0]}
        on_device = Batch.views(batch.buffer.to(self._device), **sizes, max_query_len=1 if tokens == rows else tokens)
        return self._decoder(replace(on_device, has_adapters=batch.has_adapters), self._cache)


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
        runner._forward, padded.cache, max_batch=3, table_width=runner._table_width, max_mixed_tokens=24
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
def test_generator_on_graphs_says_the_same(model: Model) -> None:
    options = {"max_tokens": 512, "page_size": PAGE, "max_batch": 4, "max_step_tokens": 32, "prefix_cache": False}
    texts = [tiny.prompt(length, seed=length) for length in (1, 40, 17, 5, 9)]
    several = [SamplingParams(temperature=t, seed=3, max_new_tokens=30, ignore_eos=True) for t in (0, 0.8, 0, 1, 0)]
    with_graphs, eager = Generator(model, **options), Generator(model, **options)
    width = with_graphs.runner.graphs.table_width
    # Padded alike, so that both take the same kernels.
    most = eager.scheduler.max_mixed_tokens + 4
    eager.runner.graphs = Eager(
        eager.runner._forward, eager.cache, max_batch=4, table_width=width, max_mixed_tokens=most
    )
    outs = with_graphs.generate(texts, several)
    assert outs == eager.generate(texts, several)
    assert outs == with_graphs.generate(texts, several)
    recorded = {room for room, _ in with_graphs.runner.graphs._captured}
    assert recorded & set(with_graphs.runner.graphs.mixed), "no step was mixed"
    assert [out.finish_reason for out in outs] == ["length"] * 5
    assert with_graphs.pages.num_used == 0


@pytest.mark.gpu
def test_nothing_is_compiled_after_the_warm_up(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    gen = Generator(model, max_tokens=1024, page_size=PAGE, max_batch=6, max_step_tokens=64)
    gen.warm_up()
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
