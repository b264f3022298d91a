"""Requests of several adapters in one generator give what each gives alone, and share no pages across adapters."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

from qinfer.engine.generator import Generator
from qinfer.engine.sampling import SamplingParams
from qinfer.engine.steps import StepRunner
from qinfer.errors import CheckpointError
from qinfer.models.lora import Lora
from qinfer.models.model import Model
from tests.models import adapters, tiny

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=9, ignore_eos=True)
PROMPT = tiny.prompt(21)
Texts: TypeAlias = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora")
    tiny.save(path / "model", "llama")
    for seed in (1, 2):
        adapters.save(path / f"adapter {seed}", path / "model", seed=seed)
    return path


@pytest.fixture
def model(folder: Path) -> Model:
    return Model.load(folder / "model", device="cpu")


@pytest.fixture(scope="module")
def want(folder: Path) -> Texts:
    """What the model continues the prompt with, without and with each adapter: one whole pass per token."""
    model, texts = Model.load(folder / "model", device="cpu"), []
    for lora in load(model, folder):
        ids = list(PROMPT)
        for _ in range(GREEDY.max_new_tokens):
            ids.append(int(model.logits(ids, lora=lora)[-1].argmax()))
        texts.append(tuple(ids[len(PROMPT) :]))
    assert len(set(texts)) == 3
    return texts


def load(model: Model, folder: Path) -> list[Lora | None]:
    return [None, *(model.load_lora(folder / f"adapter {seed}") for seed in (1, 2))]


def generator(model: Model, **options: int) -> Generator:
    sizes = {"max_tokens": 400, "page_size": 16, "max_batch": 8, "max_step_tokens": 16}
    return Generator(model, **{"kv_format": "fp32", **sizes, **options})


@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_a_mixed_batch_is_each_alone(model: Model, folder: Path, want: Texts, draft_tokens: int) -> None:
    loras = load(model, folder)
    gen = generator(model, draft=draft_tokens)
    chosen = [0, 1, 2, 1, 0]
    done = gen.generate([PROMPT] * 5, GREEDY, lora=[loras[i] for i in chosen])
    assert [completion.token_ids for completion in done] == [want[i] for i in chosen]
    assert all(lora is None or lora.num_users == 0 for lora in loras)


def test_pages_are_not_shared_between_adapters(model: Model, folder: Path, want: Texts) -> None:
    loras = load(model, folder)
    gen = generator(model)
    for expected in (0, 16):
        for lora, text in zip(loras, want, strict=True):
            completion = gen.generate(PROMPT, GREEDY, lora=lora)
            assert (completion.cached_tokens, completion.token_ids) == (expected, text)
    # Nor are they taken for those of an adapter that comes into the slot of another.
    model.unload_lora(loras[1])
    again = model.load_lora(folder / "adapter 2")
    assert again.slot == 0
    completion = gen.generate(PROMPT, GREEDY, lora=again)
    assert (completion.cached_tokens, completion.token_ids) == (0, want[2])


def test_loading_and_unloading_while_requests_run(model: Model, folder: Path, want: Texts) -> None:
    gen = generator(model)
    plain = gen.submit(PROMPT, GREEDY)
    for _ in range(4):
        gen.step()
    _, first, second = load(model, folder)
    with_first = gen.submit(PROMPT, GREEDY, lora=first)
    cancelled = gen.submit(PROMPT, GREEDY, lora=second)
    gen.step()
    with pytest.raises(ValueError, match=r"'adapter 1' cannot be unloaded while a request uses it: .* or cancel"):
        model.unload_lora(first)
    cancelled.cancel()
    model.unload_lora(second)
    while gen.scheduler.has_work:
        gen.step()
    gen.step()
    assert [plain.completion.token_ids, with_first.completion.token_ids] == want[:2]
    model.unload_lora(first)
    for start in (gen.submit, gen.generate, gen.stream):
        with pytest.raises(ValueError, match="'adapter 1' was unloaded"):
            start(PROMPT, GREEDY, lora=first)


def test_a_stream_holds_its_adapter_from_its_first_event_on(model: Model, folder: Path) -> None:
    _, first, second = load(model, folder)
    gen = generator(model)
    stream, late = gen.stream(PROMPT, GREEDY, lora=first), gen.stream(PROMPT, GREEDY, lora=second)
    next(stream)
    assert (first.num_users, second.num_users) == (1, 0)
    stream.close()
    assert first.num_users == 0
    model.unload_lora(second)
    with pytest.raises(ValueError, match="'adapter 2' was unloaded"):
        next(late)
    assert second.num_users == 0
    assert not gen.scheduler.has_work


def test_loading_while_asynchronous_streams_are_open(model: Model, folder: Path, want: Texts) -> None:
    gen = generator(model)

    async def ids(lora: Lora | None) -> tuple[int, ...]:
        return tuple([id async for event in gen.astream(PROMPT, GREEDY, lora=lora) for id in event.token_ids])

    async def serve() -> list[tuple[int, ...]]:
        before = await gen.between_steps(lambda: model.load_lora(folder / "adapter 1"))
        both = asyncio.gather(ids(None), ids(before))
        while not before.num_users:
            await asyncio.sleep(0)
        users, late = await gen.between_steps(lambda: (before.num_users, model.load_lora(folder / "adapter 2")))
        assert users == 1
        with pytest.raises(CheckpointError, match="is missing"):
            await gen.between_steps(lambda: model.load_lora(folder))
        return [*await both, await ids(late)]

    assert asyncio.run(serve()) == want


def test_one_adapter_per_prompt(model: Model, folder: Path) -> None:
    with pytest.raises(ValueError, match="lora must be one or a list of 1, one per prompt, got 2"):
        generator(model).generate([PROMPT], GREEDY, lora=load(model, folder)[:2])
    not_loaded: Any = "folder"
    with pytest.raises(TypeError, match=r"lora must be what Model.load_lora returned, got str"):
        generator(model).submit(PROMPT, GREEDY, lora=not_loaded)


def test_steps_without_adapters_do_without_them(model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    forward = StepRunner._forward
    monkeypatch.setattr(StepRunner, "_forward", lambda *given: (seen.append(given[1].has_adapters), forward(*given))[1])
    loras, gen = load(model, folder), generator(model)
    gen.generate(PROMPT, GREEDY)
    assert set(seen) == {False}
    seen.clear()
    gen.generate(PROMPT, GREEDY, lora=loras[1])
    assert set(seen) == {True}


@pytest.mark.gpu
def test_recorded_steps_see_adapters_that_come_and_go(folder: Path) -> None:
    model = Model.load(folder / "model", device="cuda", dtype="bf16")
    gen = generator(model, kv_format="bf16")
    loras: list[Lora | None] = [None]
    for seed in (1, 2):
        loras.append(model.load_lora(folder / f"adapter {seed}"))
        gen.warm_up()
        eager = [model.logits(PROMPT, lora=lora)[-1] for lora in loras]
        for lora, logits in zip(loras, eager, strict=True):
            first = gen.generate(PROMPT, SamplingParams(temperature=0.0, max_new_tokens=2), lora=lora).token_ids[0]
            assert logits[first] >= logits.max() - 0.1 * logits.std()
    model.unload_lora(loras[1])
    swapped = model.load_lora(folder / "adapter 2")
    together = gen.generate([PROMPT] * 2, GREEDY, lora=[swapped, loras[2]])
    assert together[0].token_ids == together[1].token_ids
    torch.cuda.synchronize()
