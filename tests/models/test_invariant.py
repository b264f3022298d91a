"""Whole models: the logits of a text are the same bits alone, beside others, in chunks, and behind a reused prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qinfer import Model
from qinfer.cache.paged import PagedKVCache
from qinfer.engine.generator import Generator
from qinfer.engine.sampling import SamplingParams
from qinfer.env import settings
from qinfer.errors import UnsupportedError
from qinfer.kernels.device import default_device
from qinfer.kernels.rope_attention import rope_attention
from qinfer.models import layers
from qinfer.models.batch import Batch, Piece
from qinfer.models.invariant import make_invariant
from tests.models import tiny

PAGE = 16


def _logits(model: Model, pieces: list[Piece], cache: PagedKVCache | None = None) -> Tensor:
    batch = Batch.build(pieces, page_size=PAGE, device=model.device)
    return model.decoder(batch, cache or model.new_cache(2, page_size=PAGE))


@pytest.mark.kernel
def test_logits_are_the_same_in_any_batch_and_chunk(tmp_path: Path, device: str) -> None:
    tiny.save(tmp_path, "qwen3", head_dim=16, num_hidden_layers=1)
    model = Model.load(tmp_path, device=device, dtype="fp16", invariant=True)
    ids, others = tiny.prompt(18), tiny.prompt(3, seed=1)
    whole = _logits(model, [Piece(ids, 0, [0, 1], "all")])

    # A chunk beside a prompt, a token beside a token, and a chunk alone.
    cache = model.new_cache(4, page_size=PAGE)
    first = _logits(model, [Piece(others, 0, [2], "last"), Piece(ids[:7], 0, [3, 1], "all")], cache)[1:]
    second = _logits(model, [Piece([5], 3, [2], "last"), Piece(ids[7:8], 7, [3, 1], "all")], cache)[1:]
    third = _logits(model, [Piece(ids[8:], 8, [3, 1], "all")], cache)
    assert torch.equal(torch.cat([first, second, third]), whole)


@pytest.mark.kernel
def test_a_reused_prefix_changes_no_bit(tmp_path: Path, device: str) -> None:
    tiny.save(tmp_path, "qwen3", head_dim=16, num_hidden_layers=1)
    model = Model.load(tmp_path, device=device, dtype="fp16", invariant=True)
    params = SamplingParams(temperature=0, max_new_tokens=3, ignore_eos=True, logprobs=2)
    prompt, other = tiny.prompt(PAGE + 5), tiny.prompt(7, seed=1)
    generator = Generator(model, max_tokens=8 * PAGE, page_size=PAGE, max_batch=2)
    cold = generator.generate(prompt, params)
    assert len(cold.logprobs) == 3
    warm, _ = generator.generate([prompt, other], params)
    assert (cold.cached_tokens, warm.cached_tokens) == (0, PAGE)
    assert warm == cold  # logprobs and all


def test_every_product_is_fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pieces above cannot show of layers they do not have: nothing is left to choose anywhere."""
    tiny.save(tmp_path, "llama", tie_word_embeddings=True)
    model = Model.load(tmp_path, device="cpu")
    decoder = model.decoder
    fixed = make_invariant(decoder)
    assert not any(linear.invariant for linear in decoder.linears())
    assert all(linear.invariant for linear in fixed.linears())
    assert all(block.attention.invariant for block in fixed.blocks)
    assert len(list(fixed.linears())) == len(list(decoder.linears()))
    assert fixed.head is not None
    assert fixed.head.operand is decoder.head.operand
    assert fixed.embedding is decoder.embedding

    asked: list[bool] = []

    def attend(*args: Any, invariant: bool, **options: Any) -> Tensor:
        asked.append(invariant)
        return rope_attention.reference(*args, **options)

    monkeypatch.setattr(layers, "rope_attention", attend)
    for chosen in (decoder, fixed):
        _logits(Model(model.config, chosen, device=model.device, dtype=model.dtype), [Piece([1], 0, [0], "last")])
    decided = Model(model.config, fixed, device=model.device, dtype=model.dtype)
    with pytest.raises(UnsupportedError, match="depends on the rows of a step: load without invariant"):
        decided.load_lora(tmp_path)
    assert asked == [False] * len(decoder.blocks) + [True] * len(fixed.blocks)


@pytest.mark.skipif(default_device().type == "cuda", reason="there is a GPU")
def test_a_cpu_cannot_promise_it(tmp_path: Path) -> None:
    if settings().interpret:
        pytest.skip("interpreted kernels can")
    tiny.save(tmp_path, "llama")
    with pytest.raises(UnsupportedError, match="invariant=True needs the kernels"):
        Model.load(tmp_path, device="cpu", invariant=True)
