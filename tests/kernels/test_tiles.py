"""Tiles that the tables and the rules behind them give: legal, found by all that they depend on, within the memory."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qinfer.kernels.operand import FIELDS, step_k
from qinfer.kernels.tiles import (
    FUSED_ROWS,
    LEAN_BITS,
    LEAN_REGISTERS,
    TABLES,
    SegmentShape,
    Tile,
    bucket,
    lean_rule,
    lookup,
    registers,
    rule,
    shared_bytes,
    wide_rule,
)

SHAPES = {
    "n": st.integers(1, 200_000),
    "k": st.integers(1, 60_000),
    "num_sms": st.integers(1, 200),
    "widths": st.lists(st.sampled_from(list(FIELDS)), min_size=1).map(tuple),
}


@given(m=st.integers(1, 64), cuts=st.sampled_from([1, 2, 4, 8, 16, 32]), **SHAPES)
def test_the_rule_gives_a_legal_tile_for_every_shape(
    m: int, n: int, k: int, num_sms: int, widths: tuple[int, ...], cuts: int
) -> None:
    tile = rule(num_sms, m, n, k, widths, cuts=cuts)
    assert tile.block_m in (16, 32, 64)
    assert tile.block_n in (64, 128)
    assert 2 <= tile.stages <= 3
    assert 1 <= tile.split_k <= max(1, -(-k // 128))


@given(m=st.integers(65, 256), is_lean=st.booleans(), **SHAPES)
def test_the_rule_for_many_rows_gives_legal_tiles(
    m: int, n: int, k: int, num_sms: int, widths: tuple[int, ...], is_lean: bool
) -> None:
    tile = wide_rule(num_sms, m, n, k, widths, is_lean=is_lean)
    programs = -(-n // tile.block_n) * -(-m // tile.block_m)
    assert tile.scaled
    assert tile.split_k == 1 or programs * tile.split_k <= num_sms
    assert max(shared_bytes(bits, tile.block_m, tile.block_n, tile.stages) for bits in widths) <= 200 << 10
    assert tile.block_m * tile.block_n // tile.warps <= 128 * 32, "sums of a thread"
    assert 1 <= tile.split_k <= max(1, -(-k // 128))


@given(
    n=st.integers(1, 200_000), k=st.integers(1, 60_000), num_sms=st.integers(1, 200), bits=st.sampled_from(LEAN_BITS)
)
def test_the_rule_for_fewest_rows_gives_legal_tiles(n: int, k: int, num_sms: int, bits: int) -> None:
    tile = lean_rule(num_sms, n, k, bits)
    assert (tile.block_m, tile.block_n, tile.scaled) == (8, 64, False)
    assert shared_bytes(bits, tile.block_m, tile.block_n, tile.stages) <= 36 << 10, "six programs to a multiprocessor"
    assert 1 <= tile.split_k <= min(16, max(1, k // 256))


@given(m=st.integers(1, 5000))
def test_buckets_hold_their_members(m: int) -> None:
    assert bucket(m) >= m
    assert bucket(bucket(m)) == bucket(m)


def test_unknown_gpus_use_the_rule() -> None:
    def found(arch: str, m: int, *shapes: tuple[int, int]) -> Tile | None:
        segments = tuple(SegmentShape(4096 // len(shapes), bits, group_size) for bits, group_size in shapes)
        return lookup(arch, 100, m, 4096, segments, False)

    assert found("gfx000", 1, (4, 128)) == rule(100, 1, 4096, 4096, (4,), max_rows=32)
    assert found("sm_00", 1, (4, 128)) == found("sm_00", 1, (4, 128), (4, 128)) == lean_rule(100, 4096, 4096, 4)
    assert found("sm_00", 1, (4, 16)) == rule(100, 1, 4096, 4096, (4,), max_rows=32, cuts=8)
    assert found("sm_00", 9, (4, 128)) == rule(100, 9, 4096, 4096, (4,), max_rows=32)
    assert found("sm_00", 1, (5, 128)) == rule(100, 1, 4096, 4096, (5,), max_rows=32)
    assert found("sm_00", 1, (5, 128), (4, 128)) == rule(100, 1, 4096, 4096, (5, 4), max_rows=32)
    assert found("sm_90", 1, (5, 16), (4, 16)) == rule(100, 1, 4096, 4096, (5, 4), cuts=32)


@given(
    m=st.integers(1, FUSED_ROWS),
    n=st.integers(1, 200_000),
    bits=st.sampled_from(list(FIELDS)),
    group_size=st.sampled_from([16, 32, 64, 96, 128, 4096]),
)
def test_sums_of_all_groups_of_a_step_fit_the_tensor_memory(m: int, n: int, bits: int, group_size: int) -> None:
    """On sm_100 Triton otherwise makes a kernel that traps."""
    tile = lookup("sm_100", 148, m, n, (SegmentShape(4096, bits, group_size),), False)
    assert tile is not None
    assert tile.block_m * -(-step_k(bits) // group_size) <= 256
    assert tile.block_m in (8, 16, 32, 64)


def test_registers_are_limited_where_many_programs_share_a_multiprocessor() -> None:
    assert registers("sm_90", (4,), Tile(8, 64, 4, 2, 3)) == {"maxnreg": LEAN_REGISTERS}
    # Twice the columns for each warp, and nearly twice the sums: with as few registers it would spill.
    for tile in (Tile(8, 128, 4, 2, 3), Tile(8, 64, 4, 4, 3), Tile(16, 64, 4, 2, 3)):
        assert registers("sm_90", (4,), tile) == {}
    assert registers("sm_90", (8,), Tile(8, 64, 4, 2, 3)) == registers("gfx942", (4,), Tile(8, 64, 4, 2, 3)) == {}


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_rows_of_a_table_are_found_by_all_that_they_depend_on(path: Path) -> None:
    for row in json.loads(path.read_text())["rows"]:
        tile = Tile(**{field.name: row[field.name] for field in fields(Tile) if field.name in row})
        bits, group_size, m, n, k = (row[name] for name in ("bits", "group_size", "m_max", "n", "k"))
        assert lookup(path.stem, 132, m, n, (SegmentShape(k, bits, group_size),), False) == tile
        other = rule(132, m, n, k, (bits,), cuts=8) if m <= FUSED_ROWS else None
        if other is None and m <= 256:
            other = wide_rule(132, m, n, k, (bits,), is_lean=False)
        assert lookup(path.stem, 132, m, n, (SegmentShape(k, bits, 16),), False) == other, "another group size"
        assert bucket(m) == m
        assert tile.split_k <= -(-k // step_k(bits)), "a program without work"
