"""gated_matmul: against its reference on every route, by hand, and which tiles do it in one kernel."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qinfer.kernels import gated_matmul as module
from qinfer.kernels.gated_matmul import gated_matmul
from qinfer.kernels.matmul import matmul
from qinfer.kernels.operand import FIELDS, DenseOperand, Operand
from qinfer.kernels.silu_mul import silu_mul
from qinfer.kernels.tiles import SegmentShape, Tile, lookup, takes_gate
from tests.compare import assert_close
from tests.kernels.operands import plane_operand, segmented_operand
from tests.strategies import random_tensor

BODIES = [gated_matmul.reference, pytest.param(gated_matmul.launch, marks=pytest.mark.kernel)]
TILES = [
    Tile(8, 128, 1, 4, 3, wgmma=True),
    Tile(8, 256, 1, 4, 3, wgmma=True, late=True),
    Tile(16, 128, 1, 4, 4, wgmma=True, late=True),
    Tile(32, 128, 1, 4, 3, wgmma=True),
    Tile(64, 128, 1, 4, 3, wgmma=True, late=True),
]

# The interpreter computes with NumPy, which reports that the exponential of a very negative gate is infinite: as meant.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


def operand_of(kind: str, device: torch.device) -> Operand:
    """Return a matrix of 160 features and 2 x 48 columns."""
    if kind == "dense":
        return DenseOperand(random_tensor(96, 160, seed=5, dtype=torch.float16, scale=0.2).to(device))
    if kind == "segments":
        return segmented_operand([(5, 64), (3, 96)], 96, group_size=32, device=device)
    return plane_operand(160, 96, group_size=32, device=device)


@pytest.mark.kernel
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("kind", ["plane", "segments", "dense"])
@pytest.mark.parametrize("m", [0, 1, 20])
def test_matches_reference(m: int, kind: str, ordered: bool, device: torch.device) -> None:
    operand = operand_of(kind, device)
    x, bias = random_tensor(m, 160, seed=m, dtype=torch.float16).to(device), random_tensor(96, seed=1).to(device)
    order = torch.randperm(48).int().to(device) if ordered else None
    actual = gated_matmul.launch(x, operand, bias=bias.half(), order=order)
    assert (actual.dtype, actual.shape) == (torch.float16, (m, 48))
    assert_close(actual, gated_matmul.reference(x, operand, bias=bias.half(), order=order))


@pytest.mark.parametrize("body", BODIES)
def test_by_hand(body: Any, device: torch.device) -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, -1.0]], device=device)
    x, bias = torch.tensor([[3.0, -0.5]], device=device), torch.tensor([0.0, 3.0, 0.5, 0.0], device=device)
    actual = body(x, DenseOperand(weight), bias=bias, order=torch.tensor([1, 0], dtype=torch.int32, device=device))
    # Gate 3 and -1 + 3, up 2.5 + 0.5 and 0.5.
    expected = torch.tensor([[2 / (1 + math.exp(-2)) * 0.5, 3 / (1 + math.exp(-3)) * 3]])
    assert_close(actual.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize(("dtype", "symmetric"), [(torch.float16, True), (torch.bfloat16, False)])
@pytest.mark.parametrize(
    ("tile", "bits"), [(tile, bits) for tile in TILES for bits in FIELDS if takes_gate(tile, 32, (bits,))], ids=str
)
def test_one_kernel_does_both_on_hopper(
    hopper: torch.device, tile: Tile, bits: int, dtype: torch.dtype, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "silu_mul", None)
    for k, f, group_size in ((512, 272, 128), (672, 144, 32)):
        operand = plane_operand(k, 2 * f, bits=bits, group_size=group_size, symmetric=symmetric, device=hopper)
        for m in (1, tile.block_m - 3, tile.block_m + 3):
            x, bias = random_tensor(m, k, seed=m, dtype=dtype).to(hopper), random_tensor(2 * f, seed=k).to(hopper)
            actual = gated_matmul.launch(x, operand, bias=bias, tile=tile)
            product = matmul.reference(x, operand, bias=bias, out_dtype=torch.float32)
            assert_close(actual, silu_mul.reference(product, out_dtype=dtype))
            for _ in range(3):
                assert torch.equal(gated_matmul.launch(x, operand, bias=bias, tile=tile), actual)
            order = torch.randperm(f, device=hopper, dtype=torch.int32)
            ordered = gated_matmul.launch(x, operand, bias=bias, order=order, tile=tile)
            assert torch.equal(ordered, actual.index_select(1, order))


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize(("dtype", "group_size"), [(torch.float16, 128), (torch.bfloat16, 32)])
@pytest.mark.parametrize("tile", TILES[:4], ids=str)
def test_one_kernel_walks_over_segments_on_hopper(
    hopper: torch.device, tile: Tile, dtype: torch.dtype, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "silu_mul", None)
    for sizes in ([(6, 128), (4, 896)], [(5, 352), (4, 128), (3, 672)]):
        operand = segmented_operand(sizes, 352, group_size=group_size, device=hopper)
        x = random_tensor(tile.block_m, operand.in_features, seed=3, dtype=dtype).to(hopper)
        product = matmul.reference(x, operand, out_dtype=torch.float32)
        actual = gated_matmul.launch(x, operand, tile=tile)
        assert_close(actual, silu_mul.reference(product, out_dtype=dtype))


@given(
    m=st.integers(1, 600),
    n=st.integers(1, 4096).map(lambda n: 8 * n),
    segments=st.lists(
        st.builds(
            SegmentShape,
            k=st.integers(1, 64).map(lambda k: 128 * k),
            bits=st.sampled_from(list(FIELDS)),
            group_size=st.sampled_from([32, 64, 128]),
        ),
        min_size=1,
        max_size=3,
    ).map(tuple),
)
def test_tiles_take_it_where_a_thread_has_gate_and_up(m: int, n: int, segments: tuple[SegmentShape, ...]) -> None:
    tile, widths = lookup("sm_90", 132, m, n, segments, False), tuple(one.bits for one in segments)
    if tile is not None and takes_gate(tile, n, widths):
        assert tile.wgmma
        assert tile.split_k == 1
        assert n % 32 == 0
        # Of wgmma's rows every warp has 16 in 16 times the number of warps.
        rows = torch.arange(tile.block_n)
        warps = rows // 16 % tile.warps
        assert torch.equal(*warps.chunk(2))
        assert torch.equal(*(rows % 16).chunk(2))
    elsewhere = lookup("sm_80", 108, m, n, segments, False)
    assert elsewhere is None or not takes_gate(elsewhere, n, widths)


def test_the_tiles_of_large_models_take_it() -> None:
    for n, k in ((28672, 4096), (57344, 8192), (24576, 4096)):
        for m in (1, 8, 16, 32, 64):
            tile = lookup("sm_90", 132, m, n, (SegmentShape(k, 4, 128),), False)
            assert tile is not None
            assert takes_gate(tile, n, (4,)) == (tile.split_k == 1)
            assert not takes_gate(tile, n + 16, (4,))
            for full in ((8,), (5, 4, 3)):
                assert takes_gate(tile, n, full) == (tile.split_k == 1 and m <= 32)
    whole = lookup("sm_90", 132, 1, 28672, (SegmentShape(4096, 4, 128),), False)
    assert whole is not None
    assert takes_gate(whole, 28672, (4,))


@pytest.mark.parametrize(
    ("columns", "order", "error", "text"),
    [
        (5, None, ValueError, "even number of outputs, got 5"),
        (4, torch.zeros(3, dtype=torch.int32), ValueError, "order"),
        (4, torch.tensor([0, 2], dtype=torch.int32), ValueError, "order"),
        (4, torch.zeros(2), TypeError, "order"),
    ],
)
def test_refuses(columns: int, order: torch.Tensor | None, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        gated_matmul(torch.zeros(1, 8), DenseOperand(torch.zeros(columns, 8)), order=order)
