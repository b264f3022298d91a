"""The rotation and the image positions of `qinfer.compat.exllamav2_ext` against shared vectors and direct formulas."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qinfer.compat import exllamav2_ext as ext
from tests.compat.vectors import EVERYWHERE, NOTHING, VECTORS, vectors
from tests.strategies import random_tensor, seeds

STYLES = pytest.mark.parametrize("neox", [True, False])


def call(x: Tensor, sin: Tensor, cos: Tensor, past_len: int, offsets: Any = NOTHING, neox: bool = True) -> None:
    """Rotate x [B, T, H, D]."""
    ext.rope_(x, sin, cos, past_len, x.shape[-2], x.shape[-1], offsets, neox)


def tables(length: int, width: int, where: str = "cpu") -> tuple[Tensor, Tensor]:
    """Sines and cosines whose entries are all different."""
    return tuple(random_tensor(length, width, seed=i, dtype=torch.float16).to(where) for i in range(2))


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a · b + c as numpy rounds it, which goes from fp64 to fp16 directly."""
    product = a.double().numpy() * b.double().numpy() + c.double().numpy()
    return torch.from_numpy(product.astype(np.float16))


@EVERYWHERE
@STYLES
def test_rope_(where: str, neox: bool) -> None:
    golden = vectors("small_kernels", where)
    style = "neox" if neox else "gptj"
    sin, cos, expected = (golden[f"rope_{style}_{name}"] for name in ("sin", "cos", "y"))
    x = golden["rope_x"][None].clone()
    call(x, sin, cos, int(golden["rope_past_len"]), neox=neox)
    assert torch.equal(x[0], expected)
    # The same tokens as one flat row, and tables as ExLlamaV2 keeps them.
    flat = golden["rope_x"].reshape(1, -1).clone()
    ext.rope_(flat, sin[None, None], cos[None, None], 9, 3, 16, None, neox)
    assert torch.equal(flat.view_as(expected), expected)


@STYLES
@settings(max_examples=15)
@given(seed=seeds, rest=st.integers(0, 3))
def test_rope_rounds_as_fused_multiply_adds_do(seed: int, rest: int, neox: bool) -> None:
    sin, cos = tables(1, 8)
    x = random_tensor(1, 1, 2, 8 + rest, seed=seed, dtype=torch.float16)
    before = x.clone()
    call(x, sin, cos, 0, neox=neox)
    if neox:
        left, right = before[..., :4], before[..., 4:8]
        expected = torch.cat(
            [fused(left, cos[:, :4], -sin[:, :4] * right), fused(right, cos[:, :4], sin[:, :4] * left)], -1
        )
    else:
        left, right = before[..., 0:8:2], before[..., 1:8:2]
        first = fused(right, -sin[:, 0::2], left * cos[:, 0::2])
        expected = torch.stack([first, fused(left, sin[:, 1::2], right * cos[:, 1::2])], -1).flatten(-2)
    assert torch.equal(x, torch.cat([expected, before[..., 8:]], -1))


@pytest.mark.parametrize(
    ("left", "cos", "right", "expected"),
    [
        (1 + 2.0**-10, 2.0**-11 - 2.0**-21, 1 + 2.0**-10, 1 + 2.0**-10),  # just below the middle to 1 + 2^-9
        (1041 * 2.0**-10, 2015 * 2.0**-22, 1.0, 1 + 2.0**-10),  # just above the middle between 1 and this
    ],
    ids=["below", "above"],
)
def test_rope_rounds_once(left: float, cos: float, right: float, expected: float) -> None:
    # left * cos + right is on that middle once it is fp32, and would be rounded to the even neighbour.
    x = torch.tensor([left, right]).half().view(1, 1, 1, 2)
    call(x, torch.full((1, 2), -1.0).half(), torch.full((1, 2), cos).half(), 0)
    assert float(x[0, 0, 0, 0]) == expected


@EVERYWHERE
def test_rope_positions(where: str) -> None:
    sin, cos = tables(9, 4, where)
    x = random_tensor(2, 3, 1, 4, seed=1, dtype=torch.float16).to(where)
    offsets = torch.tensor([-4, 2], dtype=torch.int32, device=where)
    for past_len, given_offsets, expected in (
        (3, None, [[3, 4, 5], [3, 4, 5]]),
        (3, offsets, [[0, 0, 1], [5, 6, 7]]),
        (-1, offsets, [[0, 1, 2], [2, 3, 4]]),
        (-2, None, [[0, 0, 0], [0, 0, 0]]),
    ):
        rotated = x.clone()
        call(rotated, sin, cos, past_len, given_offsets)
        for row in range(2):
            for token in range(3):
                alone = x[row : row + 1, token : token + 1].clone()
                call(alone, sin, cos, expected[row][token])
                assert torch.equal(rotated[row, token], alone[0, 0]), (past_len, row, token)


def test_rope_refuses() -> None:
    sin, cos = tables(4, 4)
    x = random_tensor(2, 2, 3, 4, seed=1, dtype=torch.float16)
    lens = torch.tensor([0, 3], dtype=torch.int32)
    before = x.clone()
    for error, arguments, match in (
        (ValueError, (x, sin, cos, -1, 3, 4, None, True), "offsets must be given"),
        (ValueError, (x, sin, cos, 3, 3, 4, None, True), "must reach position 4, got 4 positions"),
        (ValueError, (x, sin, cos, 0, 3, 4, lens, True), "must reach position 4"),
        (ValueError, (x, sin, cos, 0, 5, 4, None, True), "tokens with 5 heads of 4 features"),
        (ValueError, (x.transpose(1, 2), sin, cos, 0, 3, 4, None, True), "x must be contiguous"),
        (ValueError, (x, sin, cos, 0, 6, 2, None, True), "even S from 2 to 2"),
        (ValueError, (x, sin, cos[:3], 0, 3, 4, None, True), "sin and cos must agree"),
        (ValueError, (x, sin, cos, 0, 3, 4, lens[:1], True), r"offsets must be \[2\]"),
        (TypeError, (x, sin.float(), cos, 0, 3, 4, None, True), "sin must be float16"),
        (TypeError, (x, sin, cos, 0, 3, 4, lens.long(), True), "offsets must be int32"),
    ):
        with pytest.raises(error, match=match) as caught:
            ext.rope_(*arguments)
        assert isinstance(caught.value, RuntimeError)
    assert torch.equal(x, before)


@EVERYWHERE
def test_gen_mrope_pos_ids(where: str) -> None:
    golden = json.loads((VECTORS / "mrope_pos_ids.json").read_text())
    positions = torch.full((3, golden["max_length"]), -1, dtype=torch.int64, device=where)
    ids = torch.tensor(golden["ids"], device=where)
    behind = ext.gen_mrope_pos_ids(positions, ids, golden["merge_size"], golden["spans"], golden["grids_thw"])
    assert behind == golden["returned"]
    assert positions.tolist() == [golden["t"], golden["h"], golden["w"]]


def test_gen_mrope_pos_ids_of_films_and_neighbours() -> None:
    # Three pictures of one token each; text, and ids that do not fit, go on behind the largest number.
    positions = torch.empty(3, 5, dtype=torch.int64)
    spans, grids = [(100, 102), (200, 201)], [(1, 1, 2), (1, 1, 1)]
    ids = torch.tensor([100, 101, 102, 7, 8, 100])
    assert ext.gen_mrope_pos_ids(positions, ids, 1, [(100, 103)], [(3, 1, 1)]) == 5
    assert positions.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 3, 4], [0, 0, 0, 3, 4]]
    # A small picture right behind a large one begins where that began; text goes on behind the large one.
    assert ext.gen_mrope_pos_ids(positions, torch.tensor([100, 101, 200, 7]), 1, spans, grids) == 4
    assert positions.tolist() == [[0, 0, 0, 2, 3], [0, 0, 0, 2, 3], [0, 1, 0, 2, 3]]
    assert ext.gen_mrope_pos_ids(positions[:, :0], ids, 1, [], []) == 0
    with pytest.raises(RuntimeError, match="got 0 grids and 1 spans"):
        ext.gen_mrope_pos_ids(positions, ids, 1, [(100, 103)], [])
    with pytest.raises(RuntimeError, match="token of 4 x 4 patches"):
        ext.gen_mrope_pos_ids(positions, ids, 4, [(100, 103)], [(1, 3, 8)])
    with pytest.raises(RuntimeError, match="merge_size must be at least 1"):
        ext.gen_mrope_pos_ids(positions, ids, 0, [], [])
    with pytest.raises(TypeError, match="ids must be int64"):
        ext.gen_mrope_pos_ids(positions, ids.int(), 1, [], [])
