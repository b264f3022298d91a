"""What one GPU alone compiles, as cases: the rows of its tile table, and odd sizes for kernels of its own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import torch

from qinfer.bench.case import Arguments, Case
from qinfer.bench.maker import PAGE_SIZE, Fill, Maker
from qinfer.bench.shapes import HALVES, HEADS, LLAMA, Matrix, Shape, Stored, Variant
from qinfer.kernels.operand import FIELDS, PlaneOperand, SegmentedOperand
from qinfer.kernels.tiles import WGMMA, Tile, _table, takes_gate
from tests.compile.targets import Target

MATRIX = Matrix("table", 4096, 2048)  # what it is besides even, no kernel knows
ODD_K = 4096 + 32  # features that are slices, but no whole steps


def tile_cases(target: Target) -> list[Case]:
    """Return a case per kernel that the table asks for; how often K is cut does not make another, but for once."""
    wanted = {
        (Stored(f"{product.bits} bits g{product.group_size}", product.bits, product.group_size), once_cut(tile))
        for product, tile in _table(target.name).items()
    }
    return [
        Case("matmul", f"{stored.name} {half} {tile}", partial(_arguments, stored, tile, half))
        for stored, tile in sorted(wanted, key=str)
        for half in HALVES
    ]


def odd_cases(target: Target) -> list[Case]:
    """Return cases of `wgmma.py` that no model of the others has: each width with half a step, and a mixture of two."""
    if target.name not in WGMMA:
        return []
    kinds = [*((bits,) for bits in FIELDS), (6, 4)]
    return [
        Case("matmul", f"odd {widths} bits M={m} g{size}", partial(_odd, widths, m, size))
        for widths, (m, size) in product(kinds, ((16, 32), (64, 128)))
    ]


def gated_cases(target: Target) -> list[Case]:
    """Return cases of gated products in one kernel: each width, and two mixtures, at the rows of each tile."""
    if target.name not in WGMMA:
        return []
    tiles = (Tile(8, 128, 1, 4, 4), Tile(16, 128, 1, 4, 4), Tile(32, 128, 1, 4, 3), Tile(64, 128, 1, 4, 3))
    late = [replace(tile, wgmma=True, late=True) for tile in tiles]
    widths = [*((bits,) for bits in FIELDS), (6, 4), (5, 3)]
    return [
        Case("gated_matmul", f"{one} bits M={tile.block_m}", partial(_gated, one, tile))
        for one, tile in product(widths, late)
        if takes_gate(tile, MATRIX.n, one)
    ]


def prompt_cases(target: Target) -> list[Case]:
    """Return cases of `attention_wgmma.py` that no model of the others has: runs of keys, padded heads, all options."""
    if target.name not in WGMMA:
        return []
    shapes = (LLAMA, *(shape for shape, _ in HEADS if shape.head_dim < 128))
    wanted = [(shape, tokens, Variant()) for shape, tokens in product(shapes, (100, 4096))]
    wanted += [(LLAMA, 4096, Variant(order=True)), (LLAMA, 4096, Variant(window=1000, softcap=50.0))]
    wanted += [(LLAMA, 4096, Variant(codecs=(codec, codec))) for codec in ("q4", "q6", "q8", "fp8")]
    return [
        Case("paged_attention", f"{one[0].name} T={one[1]} of 4096{one[2].name}", partial(_prompt, *one))
        for one in wanted
    ]


def once_cut(tile: Tile) -> Tile:
    """Return the tile with at most two parts of K."""
    return replace(tile, split_k=min(tile.split_k, 2))


def _arguments(stored: Stored, tile: Tile, half: str, device: torch.device, fill: Fill) -> Arguments:
    m = Maker(device, fill)
    x = m.normal(tile.block_m, MATRIX.k, dtype=HALVES[half])
    return (x, m.planes(MATRIX, stored, HALVES[half])), {"tile": tile}


def _stacked(planes: list[PlaneOperand]) -> PlaneOperand | SegmentedOperand:
    return planes[0] if len(planes) == 1 else SegmentedOperand(tuple(planes))


def _gated(widths: tuple[int, ...], tile: Tile, device: torch.device, fill: Fill) -> Arguments:
    m = Maker(device, fill)
    # Where there are offsets, sums are not added late.
    stored = [Stored("", bits=bits, group_size=128, sym=bits % 2 == 0) for bits in widths]
    planes = [m.planes(MATRIX, one, torch.bfloat16) for one in stored]
    x = m.normal(tile.block_m, MATRIX.k * len(planes), dtype=torch.bfloat16)
    return (x, _stacked(planes)), {"tile": tile, "order": m.permutation(MATRIX.n // 2, wanted=len(planes) > 1)}


def _odd(widths: tuple[int, ...], rows: int, group_size: int, device: torch.device, fill: Fill) -> Arguments:
    m = Maker(device, fill)
    stored = [Stored("", bits=bits, group_size=group_size, sym=bits != 8) for bits in widths]
    planes = [m.planes(replace(MATRIX, k=ODD_K), one, torch.float16) for one in stored]
    return (m.normal(rows, ODD_K * len(planes), dtype=torch.float16), _stacked(planes)), {}


def _prompt(shape: Shape, tokens: int, variant: Variant, device: torch.device, fill: Fill) -> Arguments:
    m, width = Maker(device, fill), 4096 // PAGE_SIZE
    q = m.normal(tokens, shape.heads, shape.head_dim, dtype=torch.float16)
    table = m.permutation(width)
    assert table is not None
    keys, values = (m.pages(shape, width, codec) for codec in variant.codecs or ("fp16", "fp16"))
    # A stream and a prompt that share their pages, so that there may be no room to decode for both.
    places = (table.repeat(2, 1), m.steps([0, 1, tokens]), m.steps([4096, 4096]))
    options = {"window": variant.window, "softcap": variant.softcap}
    options["order"] = m.permutation(shape.heads * shape.head_dim, wanted=variant.order)
    return (q, keys, values, *places), {"max_query_len": tokens, "scale": shape.head_dim**-0.5, **options}
