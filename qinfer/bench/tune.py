"""`python -m qinfer.bench tune`: measure tiles of the plane matmul on this GPU and write its table.

Every candidate is checked against the reference before it is timed; one that fails, or needs more shared memory or
registers than there are, gets no row. The table is reviewed as a diff: rows that nobody can explain are not merged.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qinfer.bench.measure import time_graph
from qinfer.bench.synthetic import PRESETS, SyntheticParameters
from qinfer.errors import UnsupportedError
from qinfer.kernels.device import arch, default_device, num_sms
from qinfer.kernels.matmul import matmul
from qinfer.kernels.operand import PlaneOperand
from qinfer.kernels.tiles import TABLES, Tile, rule

if TYPE_CHECKING:
    from argparse import _SubParsersAction

ROTATE_BYTES = 200_000_000  # several times the largest cache, so that weights come from memory
MIN_GAIN = 1.02  # a row must beat the written rule by this much, or the table stays without it


def add_parser(programs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command line of this benchmark."""
    parser = programs.add_parser("tune", help="measure matmul tiles on this GPU and write its tile table")
    parser.add_argument("--preset", choices=PRESETS, action="append", help="whose matrices; may be repeated")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 32, 64], help="values of M")
    parser.add_argument("--out", metavar="FILE", help="default: the table in the package")
    parser.set_defaults(run=run)


def shapes(presets: list[str]) -> list[tuple[int, int]]:
    """Return the (N, K) of all merged matrices of some presets, without repetition."""
    found = []
    for name in presets:
        config = PRESETS[name]
        attention = config.num_heads * config.head_dim
        found += [
            (attention + 2 * config.num_kv_heads * config.head_dim, config.hidden_size),
            (config.hidden_size, attention),
            (2 * config.mlp_size, config.hidden_size),
            (config.hidden_size, config.mlp_size),
            (config.vocab_size, config.hidden_size),
        ]
    return list(dict.fromkeys(found))


def candidates(m: int, n: int, k: int, sms: int) -> Iterator[Tile]:
    """Yield tiles worth timing for a shape."""
    block_m = max(16, min(64, 1 << (m - 1).bit_length()))
    for block_n, warps, stages in itertools.product((64, 128), (4, 8), (2, 3, 4, 5, 6)):
        if warps == 8 and block_n == 64:
            continue
        for split_k in (1, 2, 3, 4, 6, 8, 12, 16):
            programs = ceil(n / block_n) * split_k
            if split_k == 1 or (ceil(k / 128) // split_k >= 2 and programs <= 16 * sms):
                yield Tile(block_m, block_n, split_k, warps, stages)


def run(options: argparse.Namespace) -> int:
    """Time all candidates of all shapes and write the best of each."""
    device = default_device()
    if device.type != "cuda":
        raise UnsupportedError("tiles are tuned on the GPU that they are for, and torch finds none here")
    path = Path(options.out) if options.out else TABLES / f"{arch(device)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for n, k in shapes(options.preset or ["llama-3.1-8b", "llama-3.3-70b"]):
        make = SyntheticParameters(device, torch.float16, SyntheticParameters.gptq_4bit_g128).gptq_4bit_g128
        first = make(k, n)
        operands = [first, *(make(k, n) for _ in range(ceil(ROTATE_BYTES / first.nbytes) - 1))]
        for m in options.rows:
            rows += _tune_shape(operands, torch.randn(m, k, dtype=torch.float16, device=device), device)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(
        f'{{"gpu": {json.dumps(torch.cuda.get_device_name(device))}, "date": "{time.strftime("%Y-%m-%d")}",\n'
        f' "command": "python -m qinfer.bench tune",\n "rows": [\n{lines}\n]}}\n'
    )
    return 0


def _tune_shape(operands: list[PlaneOperand], x: Tensor, device: torch.device) -> list[dict[str, Any]]:
    """Return the row of one shape, or nothing where the rule is as good as the best candidate."""
    m, n, k = x.shape[0], operands[0].out_features, operands[0].in_features
    expected = matmul.reference(x, operands[0])
    bits = operands[0].bits
    written = rule(num_sms(device), m, n, k, (bits,))
    timed = {
        tile: _time(operands, x, expected, tile, device)
        for tile in dict.fromkeys([written, *candidates(m, n, k, num_sms(device))])
    }
    best = min(timed, key=lambda tile: timed[tile])
    gigabytes = operands[0].nbytes / 1e6
    print(
        f"M={m:<3} N={n:<6} K={k:<6} rule {timed[written] * 1e3:7.1f} µs  best {timed[best] * 1e3:7.1f} µs "
        f"{gigabytes / timed[best]:6.0f} GB/s  {best}",
        flush=True,
    )
    if timed[written] < timed[best] * MIN_GAIN:
        return []
    return [
        {
            "op": "matmul",
            "bits": bits,
            "group_size": operands[0].group_size,
            "m_max": m,
            "n": n,
            "k": k,
            **dataclasses.asdict(best),
            "us": round(timed[best] * 1e3, 2),
        }
    ]


def _time(operands: list[PlaneOperand], x: Tensor, expected: Tensor, tile: Tile, device: torch.device) -> float:
    """Return milliseconds per product; infinity for a tile that gives wrong numbers."""
    difference = (matmul.launch(x, operands[0], tile=tile) - expected).float()
    if not float(difference.norm() / expected.float().norm()) < 2e-3:
        return float("inf")
    calls = [partial(matmul.launch, x, operand, tile=tile) for operand in operands]
    return time_graph(calls, device, repeats=5).median
