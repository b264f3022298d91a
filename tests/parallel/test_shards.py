"""A decoder that several ranks share gives the logits of the whole one, in every weight format, for every division.

Partial products meet in a sum, which adds in another order than one rank does: logits may differ by rounding, and stay
within the tolerance of fp32. Matrices cut along their outputs do not even differ by that.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qinfer.checkpoint import Checkpoint
from qinfer.errors import PlanError
from qinfer.models.architectures import read_config
from qinfer.models.batch import Batch, Piece
from qinfer.models.decoder import Decoder
from qinfer.models.invariant import make_invariant
from qinfer.models.model import Model
from qinfer.models.placement import sizes_of
from qinfer.models.rehearsal import rehearsal
from qinfer.models.shards import Idle, Nothing, SomeColumns, SomeInputs
from qinfer.parallel.plan import Plan, Share
from qinfer.quant import AWQWeight, CompressedWeight, EXL2Weight, FP8Weight, GPTQWeight, Weight
from tests.compare import assert_close
from tests.models import tiny
from tests.parallel.threads import ThreadRank, on_ranks

CPU = torch.device("cpu")
IDS = tiny.prompt(21)
# Eight query heads of 32 over four KV heads; everything divides by the groups of 32 of the quantized formats.
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}


def shuffled(module: str, size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(sum(map(ord, module))))


FORMATS: dict[str, Callable[[str, Tensor], Weight]] = {
    "gptq": lambda _, w: GPTQWeight.quantize(w, group_size=32),
    "gptq act-order": lambda name, w: GPTQWeight.quantize(w, group_size=32, act_order=shuffled(name, w.shape[0])),
    "gptq groups of 128": lambda _, w: GPTQWeight.quantize(w, group_size=128),
    "awq": lambda _, w: AWQWeight.quantize(w, group_size=32),
    "compressed-tensors": lambda _, w: CompressedWeight.quantize(w, group_size=32, symmetric=False),
    "fp8": lambda _, w: FP8Weight.quantize(w, block=(32, 32)),
    "exl2": lambda name, w: EXL2Weight.quantize(w, bits={4: 0.5, 3: 0.5}, permutation=shuffled(name, w.shape[0])),
}


def write(path: Path, kind: str, **changes: Any) -> Path:
    """Write a tiny model in a format; the head is quantized in EXL2 alone, as its converter does."""
    tiny.save(path / "dense", **{"model_type": "llama", **SHAPE, **changes})
    if kind == "dense":
        return path / "dense"
    stored: dict[str, Tensor] = {}
    modules = (*tiny.LINEARS, *(("lm_head",) if kind == "exl2" else ()))
    for name, tensor in load_file(path / "dense" / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.endswith(modules):
            weight = FORMATS[kind](module, tensor.float().t())
            stored |= {f"{module}.{suffix}": value.contiguous() for suffix, value in weight.tensors().items()}
        else:
            stored[name] = tensor
    folder = path / "quantized"
    folder.mkdir()
    config = json.loads((path / "dense" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": weight.quant_config}))
    save_file(stored, folder / "model.safetensors")
    return folder


def divide(folder: Path, *counts: tuple[int, int, int, int]) -> Plan:
    """A plan of so many KV heads, blocks of 32 MLP columns, of residual columns and of vocabulary per rank."""
    checkpoint = Checkpoint(folder)
    sizes = sizes_of(checkpoint, read_config(checkpoint))
    shares: list[Share] = []
    begin = [0, 0, 0, 0]
    groups = sizes.num_heads // sizes.num_kv_heads
    ends = (sizes.num_kv_heads, sizes.mlp_size, sizes.hidden_size, sizes.vocab_size)
    for rank, row in enumerate(counts):
        end = [min(b + c * u, e) for b, c, u, e in zip(begin, row, (1, 32, 32, 32), ends, strict=True)]
        kv, mlp, residual, vocab = zip(begin, end, strict=True)
        shares.append(Share(rank, kv, (kv[0] * groups, kv[1] * groups), mlp, residual, vocab, 0, 0, 0))
        begin = end
    assert begin == list(ends)
    return Plan(sizes, tuple(shares))


def load(folder: Path, plan: Plan | None, comm: Any, dtype: torch.dtype = torch.float32) -> Model:
    checkpoint = Checkpoint(folder)
    config = read_config(checkpoint)
    options = {"device": CPU, "dtype": dtype}
    decoder = Decoder.load(checkpoint, config, **options, comm=comm, plan=plan)
    return Model(config, decoder, **options, plan=plan)


def run(model: Model) -> Tensor:
    """Logits of a prompt in two chunks and three single tokens."""
    cache = model.new_cache(2, page_size=16)
    logits = []
    for start, stop in ((0, 11), (11, 18), (18, 19), (19, 20), (20, 21)):
        piece = Piece(IDS[start:stop], start, [1, 0], "all")
        logits.append(model.decoder(Batch.build([piece], page_size=16, device=CPU), cache))
    return torch.cat(logits)


EQUAL = ((2, 8, 2, 4), (2, 8, 2, 3))
UNEQUAL = ((3, 9, 1, 1), (0, 2, 3, 6), (1, 5, 0, 0))  # the second has no heads, the third no vocabulary
ONE_SIDED = ((4, 0, 2, 0), (0, 16, 2, 7))  # attention here, MLP there


@pytest.mark.parametrize("counts", [EQUAL, UNEQUAL, ONE_SIDED], ids=["equal", "unequal", "one-sided"])
@pytest.mark.parametrize("kind", ["dense", *FORMATS])
def test_logits_are_those_of_one_rank(tmp_path: Path, kind: str, counts: tuple[tuple[int, int, int, int], ...]) -> None:
    folder = write(tmp_path, kind)
    expected = run(Model.load(folder, device="cpu"))
    plan = divide(folder, *counts)
    results = on_ranks(len(counts), lambda rank: run(load(folder, plan, rank)))
    for logits in results:
        assert_close(logits, expected)
        assert torch.equal(logits.argmax(1), expected.argmax(1))
        assert torch.equal(logits, results[0])


class Listening:
    """A rank that notes of how many rows, in which dtype and how sums are asked for."""

    def __init__(self, rank: ThreadRank) -> None:
        self.inner = rank
        self.heard: set[tuple[int, torch.dtype, bool]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def all_reduce_parts(self, parts: Tensor, *, in_order: bool = False) -> Tensor:
        self.heard.add((parts.shape[1], parts.dtype, in_order))
        return self.inner.all_reduce_parts(parts, in_order=in_order)


@pytest.mark.parametrize("kind", ["gptq", "exl2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_how_sums_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype) -> None:
    """Steps of 11, 7 and single rows, of which the first are large; that of the embedding adds one number to zeros."""
    monkeypatch.setattr("qinfer.models.decoder.ONE_SHOT_BYTES", 8 * 4 * SHAPE["hidden_size"])
    folder = write(tmp_path, kind)
    plan = divide(folder, *UNEQUAL)
    plain = {(rows, torch.float32, False) for rows in (11, 7, 1)}
    wanted = {
        False: plain | {(11, torch.float32 if dtype == torch.float32 else torch.bfloat16, False)},
        True: plain | {(rows, torch.float32, True) for rows in (11, 7, 1)},
    }
    for invariant, sums in wanted.items():

        def listen(rank: ThreadRank, invariant: bool = invariant) -> set[tuple[int, torch.dtype, bool]]:
            comm = Listening(rank)
            model = load(folder, plan, comm, dtype)
            model.decoder = make_invariant(model.decoder) if invariant else model.decoder
            run(model)
            return comm.heard

        assert on_ranks(3, listen) == [sums] * 3


@pytest.mark.parametrize("counts", [EQUAL, UNEQUAL, ONE_SIDED], ids=["equal", "unequal", "one-sided"])
@pytest.mark.parametrize(("kv_format", "numbers"), [("fp16", [0, 1, 5]), ("q8,3:fp16", [0, 1, 2, 3, 4, 5])])
def test_ranks_rehearse_the_same_blocks(
    tmp_path: Path, kv_format: str, numbers: list[int], counts: tuple[tuple[int, int, int, int], ...]
) -> None:
    """Also one without heads, whose cache has a single layer that nobody reads."""
    folder = write(tmp_path, "gptq", num_hidden_layers=6)
    plan = divide(folder, *counts)

    def rehearse(rank: ThreadRank) -> tuple[list[int], Tensor]:
        model = load(folder, plan, rank)
        cache = model.new_cache(2, page_size=16, kv_format=kv_format)
        few = rehearsal(model.decoder, cache)
        batch = Batch.build([Piece(IDS[:11], 0, [1, 0], "all")], page_size=16, device=CPU)
        places = {id(block): number for number, block in enumerate(model.decoder.blocks)}
        return [places[id(block)] for block in few.blocks], few(batch, cache)

    results = on_ranks(len(counts), rehearse)
    assert [found for found, _ in results] == [numbers] * len(counts)
    assert all(torch.equal(logits, results[0][1]) for _, logits in results)


def test_five_ranks_share_four_heads(tmp_path: Path) -> None:
    folder = write(tmp_path, "gptq")
    plan = divide(folder, (1, 4, 0, 2), (1, 4, 1, 1), (0, 4, 1, 2), (1, 0, 1, 1), (1, 4, 1, 1))
    expected = run(Model.load(folder, device="cpu"))
    for logits in on_ranks(5, lambda rank: run(load(folder, plan, rank))):
        assert_close(logits, expected)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 8}),
    ],
)
def test_biases_norms_and_tied_heads(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    options = {**changes, "model_type": model_type}
    if model_type == "qwen2":
        options["head_dim"] = 16  # qwen2 knows no other than hidden_size / heads
    folder = write(tmp_path, "dense", **options)
    expected = run(Model.load(folder, device="cpu"))
    scale = 2 if changes.get("num_key_value_heads") == 8 else 1
    plan = divide(folder, *((kv * scale, *rest) for kv, *rest in UNEQUAL))
    for logits in on_ranks(3, lambda rank: run(load(folder, plan, rank))):
        assert_close(logits, expected)


def outputs(model: Model) -> list[type]:
    block = model.decoder.blocks[0]
    return [type(block.attention.out), type(block.mlp.out if isinstance(block.mlp, Idle) else block.mlp.down)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gptq", [SomeInputs, SomeInputs]),
        ("gptq act-order", [SomeColumns, SomeColumns]),
        # Two heads of KV and their four queries are 128 features, half of them are not.
        ("gptq groups of 128", [SomeColumns, SomeColumns]),
        ("exl2", [SomeColumns, SomeColumns]),
    ],
)
def test_how_outputs_are_cut(tmp_path: Path, kind: str, expected: list[type]) -> None:
    folder = write(tmp_path, kind)
    plan = divide(folder, *UNEQUAL)
    models = on_ranks(3, lambda rank: load(folder, plan, rank))
    assert outputs(models[0]) == expected
    assert isinstance(models[1].decoder.blocks[0].attention, Idle)
    assert outputs(models[1])[0] is (Nothing if expected[0] is SomeInputs else SomeColumns)
    assert models[2].decoder.head is None
    whole = Model.load(folder, device="cpu")
    matrices = sum(linear.num_parameters for linear in whole.decoder.linears())
    assert sum(linear.num_parameters for model in models for linear in model.decoder.linears()) == matrices
    assert [model.new_cache(3).nbytes for model in models[::2]] == [whole.new_cache(3).nbytes // 4 * n for n in (3, 1)]


def test_every_rank_reads_its_part_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, "gptq")
    plan = divide(folder, *EQUAL)
    read: dict[int, int] = {}

    class Counting(Checkpoint):
        total = 0

        def read(self, name: str, device: Any = "cpu") -> Tensor:
            return self.count(super().read(name, device))

        def read_slice(self, *where: Any) -> Tensor:
            return self.count(super().read_slice(*where))

        def count(self, tensor: Tensor) -> Tensor:
            self.total += tensor.nbytes if tensor.dim() > 1 else 0
            return tensor

    def load_and_count(rank: ThreadRank) -> None:
        checkpoint = Counting(folder)
        config = read_config(checkpoint)
        Decoder.load(checkpoint, config, device=CPU, dtype=torch.float32, comm=rank, plan=plan)
        read[rank.rank] = checkpoint.total

    on_ranks(2, load_and_count)
    stored = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values() if tensor.dim() > 1)
    assert sum(read.values()) == stored


def test_plan_that_cuts_inside_a_word_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "gptq")
    plan = divide(folder, *EQUAL)
    first, second = plan.shares
    broken = replace(plan, shares=(replace(first, mlp=(0, 100)), replace(second, mlp=(100, 512))))
    with pytest.raises(PlanError, match=r"gate_proj would be cut at 0 and 100 of its outputs.*multiples of 8 only"):
        on_ranks(2, lambda rank: load(folder, broken, rank))


def test_a_plan_for_a_real_file(tmp_path: Path) -> None:
    folder = write(tmp_path, "exl2")
    checkpoint = Checkpoint(folder)
    sizes = sizes_of(checkpoint, read_config(checkpoint))
    stored = load_file(folder / "model.safetensors")
    # Codes may be kept in more bits, and scales are kept in 16 instead of 4.
    held = {"q_weight": 1.05, "q_scale": 4.0}
    total = sum(ceil(t.nbytes * held.get(name.rpartition(".")[2], 1.0)) for name, t in stored.items())
    assert sizes.attention_bytes + sizes.mlp_bytes + sizes.vocab_bytes + sizes.norm_bytes == total
    plan = Plan.make(sizes, [0.002, 0.001], cache_tokens=16)
    expected = run(Model.load(folder, device="cpu"))
    for logits in on_ranks(2, lambda rank: run(load(folder, plan, rank))):
        assert_close(logits, expected)
