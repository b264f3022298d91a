"""The rows of a GPU's tile table as cases, for most of them belong to matrices that no other case has."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from qinfer.bench.case import Arguments, Case
from qinfer.bench.maker import Fill, Maker
from qinfer.bench.shapes import HALVES, Matrix, Stored
from qinfer.kernels.tiles import Tile, _table
from tests.compile.targets import Target

MATRIX = Matrix("table", 4096, 2048)  # what it is besides even, no kernel knows


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


def once_cut(tile: Tile) -> Tile:
    """Return the tile with at most two parts of K."""
    return replace(tile, split_k=min(tile.split_k, 2))


def _arguments(stored: Stored, tile: Tile, half: str, device: torch.device, fill: Fill) -> Arguments:
    m = Maker(device, fill)
    x = m.normal(tile.block_m, MATRIX.k, dtype=HALVES[half])
    return (x, m.planes(MATRIX, stored, HALVES[half])), {"tile": tile}
