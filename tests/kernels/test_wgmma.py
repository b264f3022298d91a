"""The product for Hopper against the reference and against the weights that `dequantize` writes; only a GPU runs it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qinfer.errors import UnsupportedError
from qinfer.kernels import matmul as module
from qinfer.kernels import wgmma
from qinfer.kernels.codes import num_steps
from qinfer.kernels.dequant import dequantize
from qinfer.kernels.matmul import matmul, matmul_parts
from qinfer.kernels.operand import FIELDS
from qinfer.kernels.tiles import (
    FUSED_ROWS,
    LEAN_ROWS,
    TABLES,
    SegmentShape,
    Tile,
    has_wgmma_tile,
    lookup,
    takes_wide_wgmma,
    wgmma_fits,
    wgmma_rule,
)
from tests.compare import assert_close
from tests.kernels.launches import record_constants
from tests.kernels.operands import plane_operand, segmented_operand
from tests.strategies import random_tensor

DTYPES = (torch.float16, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", FIELDS)
@pytest.mark.parametrize(
    "tile",
    [
        Tile(8, 128, 1, 4, 3, wgmma=True),
        Tile(8, 256, 3, 4, 3, wgmma=True, late=True),
        Tile(8, 64, 2, 4, 5, wgmma=True, late=True),
        Tile(16, 128, 1, 4, 3, wgmma=True),
        Tile(16, 128, 3, 4, 2, wgmma=True),
        Tile(16, 256, 2, 4, 3, wgmma=True),
        Tile(16, 64, 5, 4, 5, wgmma=True),
        Tile(32, 128, 2, 4, 4, wgmma=True),
        Tile(64, 128, 1, 4, 3, wgmma=True),
        Tile(16, 128, 2, 4, 3, wgmma=True, late=True),
        Tile(32, 128, 1, 8, 3, wgmma=True, late=True),
        Tile(64, 128, 2, 4, 3, wgmma=True, late=True),
        Tile(64, 64, 4, 4, 4, wgmma=True, late=True),
        Tile(128, 128, 2, 8, 3, wgmma=True, late=True),
        Tile(128, 64, 1, 4, 3, wgmma=True),
    ],
    ids=str,
)
def test_every_tile_gives_the_product(
    hopper: torch.device, tile: Tile, bits: int, dtype: torch.dtype, symmetric: bool
) -> None:
    shapes = ((640, 272, 128), (512, 128, 256), (2048, 16, 2048), (672, 272, 32), (352, 144, 64), (160, 48, 160))
    for k, n, group_size in shapes:
        operand = plane_operand(k, n, bits=bits, group_size=group_size, symmetric=symmetric, device=hopper)
        for m in (1, tile.block_m - 3, tile.block_m + 3):
            x, bias = random_tensor(m, k, seed=m, dtype=dtype).to(hopper), random_tensor(n, seed=k).to(hopper)
            expected = matmul.reference(x, operand, bias=bias)
            first = matmul(x, operand, bias=bias, tile=tile)
            assert_close(first, expected)
            for _ in range(5):
                assert torch.equal(matmul(x, operand, bias=bias, tile=tile), first), "two runs must agree bit for bit"
            parts = matmul_parts(x, operand, bias=bias, tile=tile)
            assert parts.shape[0] == min(tile.split_k, num_steps(operand))
            assert_close(parts.sum(0).to(dtype), expected)


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", FIELDS)
@pytest.mark.parametrize(("late", "group_size"), [(False, 128), (True, 128), (False, 64), (False, 32)])
def test_each_weight_is_that_of_dequantize(
    hopper: torch.device, bits: int, dtype: torch.dtype, late: bool, group_size: int
) -> None:
    for k in (384, 416, 480):
        operand = plane_operand(k, 80, bits=bits, group_size=group_size, device=hopper, scale_dtype=dtype)
        # One feature per row of x, so a product is one weight, and no sum hides how it was rounded.
        weights = matmul(
            torch.eye(k, dtype=dtype, device=hopper), operand, tile=Tile(64, 128, 1, 4, 3, wgmma=True, late=late)
        )
        assert torch.equal(weights, dequantize(operand.planes[0], operand, dtype=dtype).t())


@pytest.mark.gpu
@pytest.mark.kernel
def test_x_and_the_result_may_be_parts_of_wider_tensors(hopper: torch.device) -> None:
    operand, tile = plane_operand(256, 128, device=hopper), Tile(16, 128, 1, 4, 3, wgmma=True)
    wide = random_tensor(9, 300, seed=0, dtype=torch.float16).to(hopper)
    for x in (wide[:, 3:259], wide[:, 16:272], wide[2:, :256]):
        out = torch.zeros(x.shape[0], 200, dtype=torch.float16, device=hopper)
        matmul(x, operand, out=out[:, 5:133], tile=tile)
        assert_close(out[:, 5:133], matmul.reference(x, operand))
        assert not out[:, :5].any()
        assert not out[:, 133:].any()


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize("m", [1, 4, 8, 9, 16, 17, 33, FUSED_ROWS])
def test_it_is_the_route_of_these_rows(hopper: torch.device, m: int) -> None:
    kinds = ((4, True, 128), (4, False, 128), (8, True, 128), (3, False, 64), (6, True, 32))
    for bits, symmetric, group_size in kinds:
        operand = plane_operand(1024, 400, bits=bits, group_size=group_size, symmetric=symmetric, device=hopper)
        tile = module.tile_of((operand,), hopper, m)
        assert tile is not None
        assert tile.wgmma
        for dtype in (*DTYPES, torch.float32):
            x = random_tensor(m, 1024, seed=m, dtype=dtype).to(hopper)
            assert_close(matmul(x, operand), matmul.reference(x, operand))


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize("m", [1, 16, 40, FUSED_ROWS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_segments_of_several_widths_are_one_product(hopper: torch.device, m: int, dtype: torch.dtype) -> None:
    mixtures = ([(6, 128), (4, 896)], [(5, 352), (4, 128), (3, 672)], [(8, 256), (2, 128)], [(8, 32), (6, 96), (3, 64)])
    for sizes, group_size in itertools.product(mixtures, (128, 64, 32)):
        operand = segmented_operand(sizes, 400, group_size=group_size, device=hopper)
        x = random_tensor(m, operand.in_features, seed=m, dtype=dtype).to(hopper)
        own = module.tile_of(operand.segments, hopper, m)
        assert own is not None
        assert own.wgmma
        whole = Tile(16, 128, 1, 4, 3, wgmma=True, late=True)  # a program walks over all segments
        assert matmul_parts(x, operand, tile=whole).shape[0] == 1
        others = (Tile(16, 128, 4, 4, 3, wgmma=True, late=True), Tile(64, 64, 5, 4, 3, wgmma=True), whole)
        for tile in (own, *others, replace(whole, block_n=64, stages=4, late=False)):
            first = matmul(x, operand, tile=tile)
            assert_close(first, matmul.reference(x, operand))
            assert torch.equal(matmul(x, operand, tile=tile), first)


@given(
    m=st.integers(1, FUSED_ROWS),
    n=st.integers(1, 4096).map(lambda n: 8 * n),
    segments=st.lists(
        st.builds(
            SegmentShape,
            k=st.integers(1, 1024).map(lambda k: 16 * k) | st.integers(1, 128).map(lambda k: 128 * k),
            bits=st.sampled_from(list(FIELDS)),
            group_size=st.sampled_from([16, 32, 48, 64, 96, 128, 192, 256, 1024]),
        ),
        min_size=1,
        max_size=3,
    ).map(tuple),
    has_offsets=st.booleans(),
)
def test_the_tables_ask_for_it_only_where_it_fits(
    m: int, n: int, segments: tuple[SegmentShape, ...], has_offsets: bool
) -> None:
    fits = wgmma_fits(n, segments)
    of_groups = all(one.group_size in (32, 64, 128, 256, 1024) or one.group_size >= one.k for one in segments)
    assert fits == (n % 16 == 0 and of_groups and all(one.k % 32 == 0 for one in segments))
    tile = lookup("sm_90", 132, m, n, segments, has_offsets)
    assert tile is not None
    # The few bits of one row are faster where they are taken as the subnormal numbers that they are.
    is_faster = m > LEAN_ROWS or [one.bits for one in segments] != [2]
    assert tile.wgmma == (fits and is_faster) == has_wgmma_tile("sm_90", m, n, segments)
    elsewhere = lookup("sm_80", 108, m, n, segments, has_offsets)
    assert elsewhere is not None
    assert not elsewhere.wgmma
    if tile.wgmma:
        assert tile.block_m >= m


@pytest.mark.parametrize(
    ("m", "n", "k", "split_k"),
    [
        (65, 4096, 4096, 4),
        (128, 6144, 4096, 2),
        (128, 10240, 8192, 1),
        (128, 16896, 4096, 1),
        (128, 16912, 4096, None),
        (129, 8192, 28672, 1),
        (256, 4096, 14336, 2),
        (256, 10240, 8192, None),
        (257, 4096, 4096, None),
    ],
)
def test_many_rows_take_it_where_all_programs_run_at_once(m: int, n: int, k: int, split_k: int | None) -> None:
    segments = (SegmentShape(k, 4, 128),)
    tile = lookup("sm_90", 132, m, n, segments, False)
    assert takes_wide_wgmma("sm_90", 132, m, n, segments, False) == (split_k is not None)
    if split_k is None:
        assert tile is None or not tile.wgmma
    else:
        assert tile == Tile(128, 128, split_k, 8, 3, wgmma=True, late=True)
        assert -(-n // 128) * -(-m // 128) * split_k <= 132
    others: list[tuple[tuple[SegmentShape, ...], bool]] = [
        (segments, True),
        ((SegmentShape(k, 6, 128),), False),
        ((SegmentShape(k, 4, 64),), False),
        ((SegmentShape(k // 2, 4, 128), SegmentShape(k // 2, 3, 128)), False),
    ]
    for unmeasured, has_offsets in others:
        other = lookup("sm_90", 132, m, n, unmeasured, has_offsets)
        assert other is None or not other.wgmma
    elsewhere = lookup("sm_80", 108, m, n, segments, False)
    assert elsewhere is None


@pytest.mark.parametrize(
    ("sizes", "group_size", "fits"),
    [
        ([(6, 128), (4, 256)], 128, True),
        ([(6, 128), (4, 256)], 32, True),
        ([(6, 96), (4, 160)], 32, True),
        ([(6, 64), (4, 192)], 64, True),
        ([(6, 64), (4, 192)], 96, False),
        ([(6, 64), (4, 192)], 16, False),
    ],
)
def test_every_segment_has_to_fit(
    monkeypatch: pytest.MonkeyPatch, sizes: list[tuple[int, int]], group_size: int, fits: bool
) -> None:
    monkeypatch.setattr(module, "arch", lambda _: "sm_90")
    tile = module.tile_of(segmented_operand(sizes, 64, group_size=group_size).segments, torch.device("cpu"), 16)
    assert tile is not None
    assert tile.wgmma == fits


@pytest.mark.parametrize(
    ("group_size", "symmetric", "late"), [(128, True, True), (128, False, False), (64, True, False), (32, True, False)]
)
def test_sums_are_added_late_only_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, group_size: int, symmetric: bool, late: bool
) -> None:
    launched: dict[str, Any] = {}
    record_constants(monkeypatch, wgmma, "_wgmma_kernel", launched)
    operand, tile = plane_operand(256, 16, group_size=group_size, symmetric=symmetric), Tile(16, 64, 1, 4, 3, late=True)
    wgmma.launch_wgmma(torch.zeros(1, 256).half(), [operand], [1], None, torch.empty(1, 1, 16), tile)
    assert launched["LATE"] == late
    assert launched["SEGMENTS"] == ((4, group_size, not symmetric, True),)


def test_programs_are_as_many_as_run_at_once() -> None:
    for n, k in ((4096, 4096), (6144, 4096), (8192, 28672), (28672, 4096), (128256, 4096)):
        for m in (1, 8, 16, 32, 64):
            tile = wgmma_rule(132, m, n, [SegmentShape(k, 4, 128)])
            programs = -(-n // tile.block_n) * tile.split_k
            places = (2 if tile.block_m * tile.block_n == 64 * 128 else 3) * 132
            assert programs <= places or tile.split_k == 1
            assert tile.split_k * 512 <= k
            assert tile.block_n == (64 if m > 16 and n <= 6144 else 128)
            six = wgmma_rule(132, m, n, [SegmentShape(k, 6, 128)])
            assert not (six.late and (m <= 8 or six.block_m * six.block_n == 64 * 128))
            in_two = (m <= 16 and n == 128256) or (m <= 8 and n == 28672)
            assert six.split_k == (2 if in_two else tile.split_k)
            small = wgmma_rule(132, m, n, [SegmentShape(k // 2, 4, 128), SegmentShape(k // 2, 4, 32)])
            assert (small.block_m, small.stages) == (tile.block_m, 3)
            assert small.block_m * small.block_n < 64 * 128, "it would spill"


@pytest.mark.parametrize(
    ("m", "n", "group_size", "block_n", "split_k"),
    [
        (1, 28672, 64, 128, 2),
        (1, 57344, 32, 128, 1),
        (16, 28672, 32, 128, 1),
        (16, 57344, 32, 128, 2),
        (16, 128256, 32, 128, 1),
        (32, 57344, 64, 128, 2),
        (32, 57344, 32, 128, 1),
        (32, 8192, 64, 128, 6),
        (32, 8192, 32, 128, 4),
        (64, 57344, 64, 128, 1),
        (64, 57344, 32, 64, 1),
        (64, 4096, 64, 64, 6),
    ],
)
def test_groups_smaller_than_a_step_have_tiles_that_fit_the_registers(
    m: int, n: int, group_size: int, block_n: int, split_k: int
) -> None:
    tile = wgmma_rule(132, m, n, [SegmentShape(8192, 4, group_size)])
    assert (tile.block_n, tile.split_k) == (block_n, split_k)
    six = wgmma_rule(132, m, n, [SegmentShape(8192, 6, group_size)])
    assert six.block_n == (block_n if m < 64 else 64)


@pytest.mark.parametrize(
    ("m", "n", "late"),
    [
        (1, 28672, True),
        (1, 57344, False),
        (16, 57344, False),
        (32, 57344, True),
        (64, 57344, True),
        (64, 4096, True),
        (64, 6144, False),
        (32, 6144, True),
    ],
)
def test_sums_are_added_late_where_no_program_has_to_wait_for_that(m: int, n: int, late: bool) -> None:
    assert wgmma_rule(132, m, n, [SegmentShape(4096, 4, 128)]).late == late


def test_rows_of_the_table_fit_and_say_what_the_rule_does_not() -> None:
    rows = [row for row in json.loads((TABLES / "sm_90.json").read_text())["rows"] if row.get("wgmma")]
    assert rows
    for row in rows:
        m, n, k = row["m_max"], row["n"], row["k"]
        segments = (SegmentShape(k, row["bits"], row["group_size"]),)
        tile = lookup("sm_90", 132, m, n, segments, False)
        assert tile is not None
        assert (tile.wgmma, tile.late, tile.split_k) == (True, row["late"], row["split_k"])
        assert m <= tile.block_m <= FUSED_ROWS
        assert wgmma_fits(n, segments)
        assert tile != wgmma_rule(132, m, n, segments)


def test_what_it_does_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tile, x, operand = Tile(16, 128, 1, 4, 3, wgmma=True), torch.zeros(1, 256), plane_operand(256, 16)
    with pytest.raises(UnsupportedError, match="tiles with wgmma work on sm_90, not on cpu"):
        matmul(x, operand, tile=tile)
    monkeypatch.setattr(wgmma, "arch", lambda _: "sm_90")
    assert matmul(x, operand, tile=tile).shape == (1, 16)
    for wrong in (
        plane_operand(256, 16, group_size=16),
        plane_operand(384, 16, group_size=96),
        plane_operand(256, 24),
        plane_operand(208, 16, group_size=128),
        segmented_operand([(4, 128), (2, 128)], 16, group_size=16),
        segmented_operand([(4, 96), (2, 160)], 16, group_size=96),
    ):
        with pytest.raises(UnsupportedError, match=r"K of every segment a multiple of 32.*wgmma=False take"):
            matmul(torch.zeros(1, wrong.in_features), wrong, tile=tile)
