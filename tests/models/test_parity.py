"""Whole models against transformers, and against themselves when the same tokens arrive in other pieces."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qinfer.kernels.device import implementation
from qinfer.models.batch import Batch, Piece, Room
from qinfer.models.model import Model
from qinfer.quant import FORMATS, Weight
from tests.compare import assert_close, errors
from tests.models import tiny

ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ROPE}
YARN = {"rope_type": "yarn", "factor": 8.0, **ROPE}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
FAMILIES = [
    pytest.param("llama", {}, id="llama"),
    pytest.param("llama", {"rope_parameters": LLAMA3}, id="llama-llama3"),
    pytest.param("llama", {"rope_parameters": LINEAR}, id="llama-linear"),
    pytest.param("llama", {"rope_parameters": YARN}, id="llama-yarn"),
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama-biases"),
    pytest.param("llama", {"head_dim": 32, "num_key_value_heads": 4}, id="llama-head-dim"),
    pytest.param("mistral", {"sliding_window": 8}, id="mistral-window"),
    pytest.param("qwen2", {}, id="qwen2"),
    pytest.param("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, id="qwen2-window"),
    pytest.param("qwen3", {"head_dim": 32, "tie_word_embeddings": True}, id="qwen3-tied"),
]


def steps(model: Model, steps: Sequence[Sequence[Piece]], *, page_size: int = 16, num_pages: int = 16) -> list[Tensor]:
    """Run several steps over one cache and return the logits of each."""
    cache = model.new_cache(num_pages, page_size=page_size)
    return [model.decoder(Batch.build(s, page_size=page_size, device=model.device), cache) for s in steps]


@pytest.mark.parametrize(("model_type", "changes"), FAMILIES)
def test_logits_are_those_of_transformers(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    oracle = tiny.save(tmp_path, model_type, **changes)
    ids = tiny.prompt(48)
    expected = tiny.oracle_logits(oracle, ids)
    # An error must be able to show: logits of a few units that differ from token to token and depend on the context.
    assert expected.std() > 0.5
    assert (expected - tiny.oracle_logits(oracle, [ids[0] ^ 1, *ids[1:]]))[5].abs().max() > 0.05
    actual = Model.load(tmp_path, device="cpu").logits(ids)
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().max() <= 1e-3


def test_window_matters(tmp_path: Path) -> None:
    """The parity test of Mistral would not notice a lost window if the tiny model did not look that far back."""
    tiny.save(tmp_path, "mistral", sliding_window=8)
    windowed = Model.load(tmp_path, device="cpu").logits(tiny.prompt(48))
    tiny.edit_config(tmp_path, sliding_window=None)
    full = Model.load(tmp_path, device="cpu").logits(tiny.prompt(48))
    assert (windowed - full)[:8].abs().max() <= 1e-5
    assert (windowed - full)[8:].abs().max() > 0.1


def reverse(module: str, size: int) -> Tensor:
    return torch.arange(size - 1, -1, -1)


def shuffled(module: str, size: int) -> Tensor:
    """An order per kind of input, as GPTQ gives: q, k and v share one, gate and up share one."""
    seed = {"o": 1, "d": 2, "g": 3, "u": 3}.get(module.rpartition(".")[2][0], 0)
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def all_different(module: str, size: int) -> Tensor:
    """An order for every matrix: k of q, k, v stays as it is."""
    if module.endswith("k_proj"):
        return torch.arange(size)
    return torch.randperm(size, generator=torch.Generator().manual_seed(sum(module.encode())))


@pytest.mark.parametrize(
    ("order", "num_parts"),
    [
        pytest.param(lambda module, size: None, (1, 1), id="sequential"),
        pytest.param(shuffled, (1, 1), id="act-order-shared"),
        pytest.param(all_different, (3, 2), id="act-order-different"),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_gptq_is_its_dequantized_twin(tmp_path: Path, model_type: str, order: Any, num_parts: tuple[int, int]) -> None:
    tiny.save(tmp_path / "source", model_type)
    quantized, twin = tmp_path / "gptq", tmp_path / "twin"
    tiny.quantize(tmp_path / "source", quantized, twin, order=order, group_size=32, symmetric=False)
    model = Model.load(quantized, device="cpu")
    for block in model.decoder.blocks:
        assert (len(block.attention.qkv.parts), len(block.mlp.gate_up.parts)) == num_parts
    ids = tiny.prompt(40)
    expected = Model.load(twin, device="cpu").logits(ids)
    assert_close(model.logits(ids), expected)
    # Rounding to 4 bits must show, or the twin would prove nothing.
    assert errors(expected, Model.load(tmp_path / "source", device="cpu").logits(ids))[1] > 0.01


@pytest.mark.parametrize(
    ("name", "options", "is_ordered"),
    [
        *[("gptq", {"bits": bits, "group_size": 32, "symmetric": bits == 3}, bits == 8) for bits in (2, 3, 8)],
        ("awq", {"group_size": 32}, False),
        ("awq", {"group_size": -1, "symmetric": True}, False),
        *[("compressed-tensors", {"bits": bits, "group_size": 32}, bits == 6) for bits in (2, 3, 4, 5, 6, 8)],
        ("compressed-tensors", {"bits": 4, "group_size": -1, "symmetric": False}, False),
        ("fp8", {"block": (24, 32)}, False),
    ],
)
def test_every_format_is_its_dequantized_twin(
    tmp_path: Path, name: str, options: dict[str, Any], is_ordered: bool
) -> None:
    def make(module: str, w: Tensor) -> Weight:
        return FORMATS[name].quantize(w, **options, **({"act_order": shuffled(module, len(w))} if is_ordered else {}))

    tiny.save(tmp_path / "source", "qwen2")
    tiny.store(tmp_path / "source", tmp_path / "stored", tmp_path / "twin", make)
    model, twin, source = (Model.load(tmp_path / folder, device="cpu") for folder in ("stored", "twin", "source"))
    ids = tiny.prompt(40)
    expected = twin.logits(ids)
    assert_close(model.logits(ids), expected)
    assert errors(expected, source.logits(ids))[1] > 1e-3


def test_chunks_give_the_logits_of_the_whole(tmp_path: Path) -> None:
    tiny.save(tmp_path, "mistral", sliding_window=20)
    model, ids, pages = Model.load(tmp_path, device="cpu"), tiny.prompt(45), [5, 0, 9]
    cuts = [0, 1, 7, 8, 30, 45]
    chunks = [[Piece(ids[a:b], a, pages, "all")] for a, b in pairwise(cuts)]
    assert_close(torch.cat(steps(model, chunks)), model.logits(ids))


def test_logits_runs_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(tmp_path, "llama")
    model, ids = Model.load(tmp_path, device="cpu"), tiny.prompt(45)
    whole = model.logits(ids)
    monkeypatch.setattr("qinfer.models.model.CHUNK", 16)
    assert_close(model.logits(torch.tensor(ids)), whole)


def test_sequences_of_a_batch_do_not_disturb_each_other(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama", num_key_value_heads=1)
    model = Model.load(tmp_path, device="cpu")
    a, b, c = tiny.prompt(33, seed=1), tiny.prompt(18, seed=2), tiny.prompt(5, seed=3)
    first = [Piece(a[:32], 0, [3, 1], "none"), Piece(b[:4], 0, [8], "last")]
    second = [Piece(c, 0, [2], "all"), Piece(b[4:], 4, [8, 6], "last"), Piece(a[32:], 32, [3, 1, 7], "last")]
    early, late = steps(model, [first, second])
    alone = {name: model.logits(ids) for name, ids in (("a", a), ("b", b), ("c", c))}
    assert_close(early, alone["b"][3:4])
    assert_close(late, torch.cat([alone["c"], alone["b"][-1:], alone["a"][-1:]]))


def test_padding_changes_nothing(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen2")
    model, ids = Model.load(tmp_path, device="cpu"), tiny.prompt(21)
    cache = model.new_cache(4, page_size=16)
    prefill = Batch.build([Piece(ids[:20], 0, [2, 0], "none")], page_size=16, device="cpu")
    assert model.decoder(prefill, cache).shape == (0, tiny.VOCAB)
    before = [page.codes.clone() for page in cache.pages(0)]
    step = [Piece(ids[20:], 20, [2, 0], "last")]
    padded = Batch.build(step, page_size=16, device="cpu", pad_to=Room.of_rows(4), table_width=4)
    logits = model.decoder(padded, cache)
    assert logits.shape == (4, tiny.VOCAB)
    assert torch.isfinite(logits).all()
    assert_close(logits[:1], model.logits(ids)[-1:])
    for page, old in zip(cache.pages(0), before, strict=True):
        changed = (page.codes != old).any(dim=3).any(dim=1).nonzero().tolist()
        assert changed == [[0, 4]], "only the slot of token 20, the second page's fifth, may change"


def test_a_mixed_step_may_be_padded(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama")
    model, first, second = Model.load(tmp_path, device="cpu"), tiny.prompt(21, seed=1), tiny.prompt(9, seed=2)
    logits = []
    for room in (None, Room(32, 5, 4, 32), Room(12, 4, 4, 12)):
        cache = model.new_cache(5, page_size=16)
        start = Batch.build([Piece(first[:20], 0, [2, 0], "none")], page_size=16, device="cpu")
        model.decoder(start, cache)
        step = [Piece(first[20:], 20, [2, 0], "last"), Piece(second, 0, [4], "last")]
        batch = Batch.build(step, page_size=16, device="cpu", pad_to=room, table_width=None if room is None else 4)
        logits.append(model.decoder(batch, cache)[:2])
        assert not cache.pages(0)[0].codes[[1, 3]].any(), "padding writes nothing"
    for padded in logits[1:]:
        assert_close(padded, logits[0])
    assert_close(logits[0], torch.stack([model.logits(ids)[-1] for ids in (first, second)]))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_low_precision_stays_near_fp32(tmp_path: Path, dtype: str) -> None:
    tiny.save(tmp_path, "llama", dtype=torch.float16)
    ids = tiny.prompt(40)
    expected = Model.load(tmp_path, device="cpu", dtype="fp32").logits(ids)
    largest, rms = errors(Model.load(tmp_path, device="cpu", dtype=dtype).logits(ids), expected)
    # Two blocks with a dozen roundings each, in units of the last place: 2^-11 for fp16, 2^-8 for bf16.
    assert rms < 12 * 2.0 ** (-11 if dtype == "fp16" else -8)
    assert largest < 30 * 2.0 ** (-11 if dtype == "fp16" else -8)


def blow_up(tensors: dict[str, Tensor]) -> None:
    """Scale what writes into the residual until it reaches 2e5, three times what fp16 holds."""
    tensors["model.embed_tokens.weight"] *= 1000
    tensors["model.layers.0.mlp.down_proj.weight"] *= 2e4
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 4e4


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    tiny.save(tmp_path, "llama", dtype=torch.float16)
    tiny.edit(tmp_path, blow_up)
    return tmp_path


def largest_residual(model: Model, ids: list[int]) -> float:
    """Run the blocks by hand and return the largest magnitude between them."""
    batch = Batch.build([Piece(ids, 0, range(4), "all")], page_size=16, device=model.device)
    cache, residual, delta = model.new_cache(4, page_size=16), model.decoder.embedding(batch.token_ids), None
    largest = 0.0
    for block in model.decoder.blocks:
        delta = block(residual, delta, batch, cache)
        largest = max(largest, float((residual + delta).abs().max()))
    return largest


def test_residual_beyond_fp16_stays_finite_and_right(huge: Path) -> None:
    ids = tiny.prompt(40)
    model = Model.load(huge, device="cpu", dtype="fp16")
    assert largest_residual(model, ids) > 2e5
    expected = Model.load(huge, device="cpu", dtype="fp32").logits(ids)
    actual = model.logits(ids)
    assert torch.isfinite(actual).all()
    largest, rms = errors(actual, expected)
    assert (largest < 30 * 2.0**-11, rms < 12 * 2.0**-11) == (True, True), (largest, rms)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_kernels_agree_with_references(tmp_path: Path, device: torch.device, dtype: str) -> None:
    """Kernels round between ops exactly where references do, so they differ by the order of sums alone."""
    tiny.save(tmp_path / "source", "qwen3", dtype=torch.float16, head_dim=32, num_hidden_layers=1)
    tiny.quantize(tmp_path / "source", tmp_path / "gptq", tmp_path / "twin", order=all_different, group_size=32)
    ids = tiny.prompt(12)
    model = Model.load(tmp_path / "gptq", device=device, dtype=dtype)
    chunks = [[Piece(ids[:11], 0, [1], "all")], [Piece(ids[11:], 11, [1], "last")]]
    actual = torch.cat(steps(model, chunks, num_pages=2)).cpu()
    with implementation("reference"):
        expected = Model.load(tmp_path / "gptq", device="cpu", dtype=dtype).logits(ids)
    # One unit in the last place of an activation, gained or lost anywhere, runs through all that follows.
    largest, rms = errors(actual, expected)
    unit = 2.0 ** (-11 if dtype == "fp16" else -8)
    assert rms < 6 * unit
    assert largest < 15 * unit


@pytest.mark.kernel
def test_kernels_keep_a_residual_beyond_fp16(huge: Path, device: torch.device) -> None:
    ids = tiny.prompt(10)
    actual = Model.load(huge, device=device, dtype="fp16").logits(ids).cpu()
    with implementation("reference"):
        expected = Model.load(huge, device="cpu", dtype="fp32").logits(ids)
    assert torch.isfinite(actual).all()
    largest, rms = errors(actual, expected)
    assert (largest < 30 * 2.0**-11, rms < 12 * 2.0**-11) == (True, True), (largest, rms)
