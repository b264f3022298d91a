"""rope_attention: one launch against two, the reference, and when it takes which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qinfer.kernels.attention_reduce import locks_of
from qinfer.kernels.kv_codec import CODECS, KVPages
from qinfer.kernels.kv_write import kv_write, rope_write
from qinfer.kernels.rope_attention import rope_attention
from tests.compare import assert_close
from tests.kernels.coded import poisoned
from tests.strategies import random_tensor, seeds

FEW = settings(max_examples=8)
POSITIONS = 2100
FP16 = ("fp16", "fp16")


@dataclass(frozen=True)
class Step:
    """Arguments of a step of decode; pages hold NaN but for what came before."""

    args: list[Any]
    options: dict[str, Any]

    def pages(self) -> tuple[KVPages, KVPages]:
        return self.args[4], self.args[5]

    def copy(self) -> Step:
        """The same step over pages of its own."""
        copies = [
            KVPages(p.codes.clone(), None if p.scales is None else p.scales.clone(), p.codec) for p in self.pages()
        ]
        return Step([*self.args[:4], *copies, *self.args[6:]], self.options)


def make(
    lens: list[int],
    device: torch.device,
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 32,
    page_size: int = 16,
    parts: int = 2,
    dtype: torch.dtype = torch.float16,
    codecs: tuple[str, str] = FP16,
    has_norm: bool = False,
    interleaved: bool = False,
    turning: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Step:
    """Sequences of these lengths, the new token included; 0 is padding."""
    num_heads, num_kv_heads = heads
    counts = [-(-n // page_size) for n in lens]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(seed)).int()
    table = torch.full((len(lens), max(counts) + 1), 2**30, dtype=torch.int32)
    slots, first = [-1] * len(lens), 0
    pages = [poisoned(CODECS[name], len(order), num_kv_heads, page_size, head_dim, "cpu") for name in codecs]
    for row, (length, count) in enumerate(zip(lens, counts, strict=True)):
        table[row, :count] = order[first : first + count]
        first += count
        if length:
            places = [int(table[row, i // page_size]) * page_size + i % page_size for i in range(length)]
            slots[row] = places[-1]
            old = [random_tensor(length - 1, num_kv_heads, head_dim, seed=seed + 7 * row + i) for i in range(2)]
            kv_write.reference(*old, *pages, torch.tensor(places[:-1], dtype=torch.int32))
    width = (num_heads + 2 * num_kv_heads) * head_dim
    half = (turning or head_dim) // 2
    angles = torch.outer(torch.arange(float(POSITIONS)), 100.0 ** (-torch.arange(half) / half))
    weights = {
        f"{side}_weight": 1 + random_tensor(head_dim, seed=s, dtype=dtype) / 2 for side, s in (("q", 2), ("k", 3))
    }
    index = [[max(length - 1, 0) for length in lens], slots]
    positions, slot = (torch.tensor(x, dtype=torch.int32) for x in index)
    starts, context = torch.arange(len(lens) + 1, dtype=torch.int32), torch.tensor(lens, dtype=torch.int32)
    qkv = random_tensor(parts, len(lens), width, seed=seed + 1)
    moved = [x.to(device) for x in (qkv, angles.cos(), angles.sin(), positions)]
    own = [KVPages(p.codes.to(device), None if p.scales is None else p.scales.to(device), p.codec) for p in pages]
    args = [*moved, *own, slot.to(device), table.to(device), starts.to(device), context.to(device)]
    norm = {name: weight.to(device) for name, weight in weights.items()} | {"eps": 1e-3} if has_norm else {}
    wanted = {"interleaved": interleaved, "max_query_len": 1, "scale": head_dim**-0.5, "out_dtype": dtype}
    return Step(args, {**wanted, **norm, **options})


def assert_same(actual: Step, expected: Step, results: tuple[Tensor, Tensor]) -> None:
    """Results agree, and so does what stands in the pages; they hold NaN where nobody wrote."""
    dtype = expected.options["out_dtype"]
    assert results[0].dtype == dtype
    assert_close(*results)
    for one, other in zip(actual.pages(), expected.pages(), strict=True):
        assert torch.equal(one.codes.isnan(), other.codes.isnan())
        assert_close(one.codes.nan_to_num(), other.codes.nan_to_num(), dtype)


def run_both(step: Step) -> None:
    own, other = step.copy(), step.copy()
    assert_same(
        own,
        other,
        (rope_attention.launch(*own.args, **own.options), rope_attention.reference(*other.args, **other.options)),
    )


@pytest.mark.kernel
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"heads": (1, 1), "parts": 1},
        {"heads": (8, 1), "head_dim": 64, "parts": 5},
        {"heads": (16, 1), "head_dim": 16},
        {"heads": (6, 2), "has_norm": True},
        {"interleaved": True, "has_norm": True},
        {"dtype": torch.bfloat16, "codecs": ("bf16", "bf16")},
        {"head_dim": 128, "page_size": 64, "codecs": ("fp16", "bf16")},
        {"window": 1},
        {"window": 20},
        {"invariant": True},
        {"turning": 16},
    ],
    ids=str,
)
def test_matches_reference(changes: dict[str, Any], device: torch.device) -> None:
    run_both(make([37, 0, 1, 16, 17], device, **changes))


@pytest.mark.kernel
def test_order_permutes_features(device: torch.device) -> None:
    order = torch.randperm(4 * 32, generator=torch.Generator().manual_seed(5)).int().to(device)
    run_both(make([37, 5], device, order=order))


@pytest.mark.kernel
@FEW
@given(seed=seeds, lens=st.lists(st.integers(0, 90), min_size=1, max_size=4), num_parts=st.integers(1, 4))
def test_any_lengths(seed: int, lens: list[int], num_parts: int, device: torch.device) -> None:
    run_both(make(lens, device, parts=num_parts, seed=seed))


@pytest.mark.kernel
def test_one_launch_where_it_can(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[int]()
    launch = rope_write.launch
    monkeypatch.setattr(rope_write, "launch", lambda *args, **options: calls.append(1) or launch(*args, **options))
    for is_one, lens, changes in (
        (True, [20, 3], {}),
        (True, [20], {"head_dim": 64}),
        (False, [20], {"head_dim": 128}),
        (True, [1] * 64, {"heads": (1, 1)}),
        (False, [1] * 65, {"heads": (1, 1)}),
        (False, [20, 3], {"codecs": ("q4", "q4")}),
        (False, [20, 3], {"codecs": ("fp16", "fp8")}),
        (False, [20, 3], {"turning": 16}),
        (False, [20, 3], {"head_dim": 48}),
        (False, [20, 3], {"heads": (17, 1)}),
        (False, [20, 3], {"invariant": True}),
        (False, [20, 3], {"dtype": torch.float32, "codecs": ("fp32", "fp32")}),
    ):
        calls.clear()
        step = make(lens, device, **changes)
        rope_attention.launch(*step.args, **step.options)
        assert calls == ([] if is_one else [1]), (lens, changes)


@pytest.mark.kernel
def test_sequences_of_several_tokens_take_two(device: torch.device) -> None:
    """As many tokens as sequences do not make a step in which every sequence has one."""
    step = make([18, 33, 0], device)
    args = [*step.args]
    qkv = random_tensor(2, 3, args[0].shape[2], seed=3).to(device)
    args[0] = qkv
    # The second sequence computes its last two tokens.
    args[3] = torch.tensor([17, 31, 32], dtype=torch.int32, device=device)
    table = args[7].cpu()
    slots = [int(table[row, at // 16]) * 16 + at % 16 for row, at in ((0, 17), (1, 31), (1, 32))]
    args[6] = torch.tensor(slots, dtype=torch.int32, device=device)
    args[8] = torch.tensor([0, 1, 3, 3], dtype=torch.int32, device=device)
    run_both(Step(args, {**step.options, "max_query_len": 2}))


@pytest.mark.gpu
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("heads", "head_dim"), [((32, 8), 128), ((32, 8), 64), ((64, 8), 128)])
def test_real_shapes(heads: tuple[int, int], head_dim: int, has_norm: bool) -> None:
    sizes = {"heads": heads, "head_dim": head_dim, "page_size": 256, "parts": 8, "has_norm": has_norm}
    for lens in ([2000, 1], [513] * 16, [700, 0, 1, 64, 65] * 12):
        step = make(lens, torch.device("cuda"), **sizes)
        run_both(step)
        once, again = step.copy(), step.copy()
        results = [rope_attention.launch(*one.args, **one.options) for one in (once, again)]
        assert torch.equal(*results), "two runs differ"


def test_the_check_is_that_of_both() -> None:
    step = make([20, 3], torch.device("cpu"))
    with pytest.raises(ValueError, match="k_weight must both be given"):
        rope_attention(*step.args, **step.options, q_weight=torch.ones(32))
    with pytest.raises(ValueError, match="context_lens"):
        rope_attention(*step.args[:-1], step.args[-1][:1, None], **step.options)


@pytest.mark.kernel
def test_arrival_counters_are_left_at_zero(device: torch.device) -> None:
    step = make([90, 33], device)
    rope_attention.launch(*step.args, **step.options)
    assert not locks_of(device).any()
