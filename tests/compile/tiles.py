"""The rows of a GPU's tile table as cases, for most of them belong to matrices that no other case has."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from functools import partial

import torch

from qinfer.bench.case import Arguments, Case
from qinfer.bench.maker import Fill, Maker
from qinfer.bench.shapes import HALVES, Matrix, Stored
from qinfer.kernels.tiles import TABLES, Tile
from tests.compile.targets import Target

MATRIX = Matrix("table", 4096, 2048)  # what it is besides even, no kernel knows


def tile_cases(target: Target) -> list[Case]:
    """Return a case per kernel that the table asks for; how often K is cut does not make another, but for once."""
    path = TABLES / f"{target.name}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    wanted = {
        (
            Stored(f"{row['bits']} bits g{row['group_size']}", row["bits"], row["group_size"]),
            replace(tile, split_k=cuts),
        )
        for row in rows
        for tile in [Tile(**{field.name: row[field.name] for field in fields(Tile) if field.name in row})]
        for cuts in [min(tile.split_k, 2)]
    }
    return [
        Case("matmul", f"{stored.name} {half} {tile}", partial(_arguments, stored, tile, half))
        for stored, tile in sorted(wanted, key=str)
        for half in HALVES
    ]


def _arguments(stored: Stored, tile: Tile, half: str, device: torch.device, fill: Fill) -> Arguments:
    m = Maker(device, fill)
    x = m.normal(tile.block_m, MATRIX.k, dtype=HALVES[half])
    return (x, m.planes(MATRIX, stored, HALVES[half])), {"tile": tile}
