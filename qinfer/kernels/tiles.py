"""Which tile an op uses for a shape: a table per GPU, and a written rule behind it. Nothing tunes at run time.

`tile_tables/<arch>.json` holds rows with named fields, written by `python -m qinfer.bench tune` on that GPU and
reviewed as a diff. A shape that no row covers, and a GPU without a table, use the rule: correct everywhere and merely
slower.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TABLES = Path(__file__).parent / "tile_tables"


@dataclass(frozen=True)
class Tile:
    """How a matmul is cut: rows and columns of the output per program, parts of K, warps and pipeline stages."""

    block_m: int
    block_n: int
    split_k: int
    warps: int
    stages: int


def bucket(m: int) -> int:
    """Return the largest M of the bucket that m belongs to: 1, 4, 16, 32, 64, then powers of two."""
    for limit in (1, 4, 16, 32, 64):
        if m <= limit:
            return limit
    return 1 << (m - 1).bit_length()


@cache
def _table(arch: str) -> dict[tuple[str, int, int, int], Tile]:
    """Read the table of one GPU; an empty one if none was measured."""
    path = TABLES / f"{arch}.json"
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["rows"]
    return {
        (row["op"], row["m_max"], row["n"], row["k"]): Tile(**{field: row[field] for field in Tile.__annotations__})
        for row in rows
    }


@cache
def lookup(arch: str, num_sms: int, m: int, n: int, k: int) -> Tile:
    """Return the tile of a plane matmul of an [m, k] input and a [k, n] matrix."""
    return _table(arch).get(("matmul", bucket(m), n, k)) or rule(num_sms, m, n, k)


def rule(num_sms: int, m: int, n: int, k: int) -> Tile:
    """Return a reasonable tile for any shape.

    Few rows are bound by reading the weights, and what counts there is bytes in flight: about four programs per
    multiprocessor, each with a short pipeline, beat fewer programs with long ones (benchmarks/LOG.md). So K is split
    until the grid is that large, while every program keeps two tiles of K.
    """
    block_m = min(max(16, 1 << (m - 1).bit_length()), 64)
    block_n = 64 if n <= 64 * num_sms else 128
    programs = -(-n // block_n) * -(-m // block_m)
    tiles_k = -(-k // 128)
    split_k = max(1, min(round(4 * num_sms / programs), tiles_k // 2, 16))
    return Tile(block_m, block_n, split_k, 4, 4 if block_m <= 32 else 3)
