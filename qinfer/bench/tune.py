"""`python -m qinfer.bench tune`: find tiles of the plane matmul inside the decode step, and write this GPU's table.

The step is that of a few layers of a preset with its head, or of a rank's share of them, recorded as a CUDA graph. A
tile counts if its product is right by itself and the step is faster with it by more than the noise. The table is
reviewed as a diff: rows that nobody can explain are not merged.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from qinfer.bench.echo import synthetic_share
from qinfer.bench.measure import environment, time_graph
from qinfer.bench.recipes import PACKED
from qinfer.bench.search import Change, candidates, search, wgmma_candidates
from qinfer.bench.synthetic import PRESETS
from qinfer.cache.paged import PagedKVCache
from qinfer.errors import UnsupportedError
from qinfer.kernels.device import arch, default_device, num_sms
from qinfer.kernels.matmul import matmul
from qinfer.kernels.operand import PlaneOperand
from qinfer.kernels.tiles import (
    FUSED_ROWS,
    MEASURED,
    TABLES,
    WGMMA,
    Product,
    SegmentShape,
    Tile,
    bucket,
    has_wgmma_tile,
    trial,
    wgmma_fits,
)
from qinfer.models.batch import Batch, Piece, Room
from qinfer.models.model import Model

if TYPE_CHECKING:
    from argparse import _SubParsersAction

PAGE_SIZE = 256
MAX_ROWS = 512  # beyond them no tile was ever faster than writing the matrix out
TOLERANCE = 2e-3  # relative RMS of a product against its reference
FAILURES = (OutOfResources, PTXASError, CompilationError)  # too much shared memory or too many registers


def add_parser(programs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command line of this benchmark."""
    parser = programs.add_parser("tune", help="find matmul tiles inside the decode step and write this GPU's table")
    parser.add_argument("--preset", choices=PRESETS, action="append", help="may be repeated; default: llama-3.1-8b")
    told = f"integer weights: {', '.join(name for name in PACKED if name.startswith('int'))}; default: int4-g128"
    parser.add_argument("--weights", choices=PACKED, default="int4-g128", metavar="KIND", help=told)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 4, 16, 32, 64], help=f"batch sizes; {MAX_ROWS} at most"
    )
    told = "tune the share of one of so many equal GPUs, on one; default: 1"
    parser.add_argument("--ranks", type=int, default=1, help=told)
    parser.add_argument("--layers", type=int, default=4, help="of the step that is timed; default: 4")
    parser.add_argument("--context", type=int, default=512, help="tokens of every sequence; default: 512")
    parser.add_argument("--seconds", type=float, default=120, help="for each preset and batch size; default: 120")
    parser.add_argument("--out", metavar="FILE", help="default: the table in the package; rows of others are kept")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Tune every preset at every batch size, and write after each."""
    if not all(1 <= m <= MAX_ROWS for m in options.rows) or options.layers < 1 or options.ranks < 1:
        raise ValueError(f"--rows must be from 1 to {MAX_ROWS}, --layers and --ranks at least 1")
    if not options.weights.startswith("int"):
        raise UnsupportedError(f"tables have rows for one width: --weights {options.weights} mixes several")
    device = default_device()
    if device.type != "cuda":
        raise UnsupportedError("tiles are tuned on the GPU that they are for, and torch finds none here")
    path = Path(options.out) if options.out else TABLES / f"{arch(device)}.json"
    setting = environment(device)
    for preset in options.preset or ["llama-3.1-8b"]:
        model = synthetic_share(preset, options.weights, device, num_layers=options.layers, ranks=options.ranks)
        for m in dict.fromkeys(bucket(m) for m in options.rows):
            step = Step(model, m, options.context)
            stop = time.monotonic() + options.seconds
            found = search(step.keys, step.choices, step.clock, is_over=partial(_is_past, stop))
            for key, change in found.items():
                gain = change.before / change.after
                print(f"{preset} bits={key.bits} M={m} N={key.n} K={key.k}: step × {gain:.3f} with {change.tile}")
            about = {name: getattr(options, name) for name in ("ranks", "layers", "context")}
            write(path, [_row(key, change, {"preset": preset, **about, **setting}) for key, change in found.items()])
    return 0


def _is_past(moment: float) -> bool:
    return time.monotonic() > moment


@dataclass
class Step:
    """A decode step of a few layers at one batch size, which can be timed with other tiles."""

    model: Model
    m: int
    context: int
    _right: dict[tuple[Product, Tile], bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        width = -(-(self.context + 1) // PAGE_SIZE)
        rows = [Piece([7 + i], self.context, range(i * width, (i + 1) * width), "last") for i in range(self.m)]
        self._cache: PagedKVCache = self.model.new_cache(self.m * width, page_size=PAGE_SIZE)
        device = self.model.device
        self._batch = Batch.build(
            rows, page_size=PAGE_SIZE, device=device, pad_to=Room.of_rows(self.m), table_width=width
        )

    @property
    def _found(self) -> list[tuple[Product, PlaneOperand]]:
        """Every packed matrix, under the name that tables have for its shape."""
        planes = [linear.operand for linear in self.model.decoder.linears()]
        return [
            (Product(plane.bits, plane.group_size, bucket(self.m), plane.out_features, plane.in_features), plane)
            for plane in planes
            if isinstance(plane, PlaneOperand)
        ]

    @property
    def keys(self) -> list[Product]:
        """The matrices of the step, those of all layers together the largest first; the head counts once."""
        bytes_of: Counter[Product] = Counter()
        for key, operand in self._found:
            bytes_of[key] += operand.nbytes
        return sorted(bytes_of, key=lambda key: (-bytes_of[key], -key.n * key.k))

    def choices(self, key: Product) -> list[Tile]:
        """Return the tiles to try for a matrix."""
        device = self.model.device
        shape = key.m_max, key.n, key.k, num_sms(device)
        segments = [SegmentShape(key.k, key.bits, key.group_size)]
        if has_wgmma_tile(arch(device), key.m_max, key.n, segments):
            return list(wgmma_candidates(*shape))
        tiles = [tile for tile in candidates(*shape) if not tile.scaled or arch(device) in MEASURED]
        # Of many rows some products are faster by one kernel and some by the other.
        has_both = key.m_max > FUSED_ROWS and arch(device) in WGMMA and wgmma_fits(key.n, segments)
        return [*tiles, *wgmma_candidates(*shape)] if has_both else tiles

    def run(self) -> Tensor:
        """Run the step."""
        return self.model.decoder(self._batch, self._cache)

    def clock(self, tiles: Mapping[Product, Tile]) -> float:
        """Return milliseconds of the step with some tiles; infinity where one fails or gives wrong numbers."""
        device = self.model.device
        try:
            if not all(self._is_right(key, tile) for key, tile in tiles.items()):
                return inf
            with trial(arch(device), tiles):
                return time_graph([self.run], device, repeats=15).median
        except FAILURES:
            return inf

    def _is_right(self, key: Product, tile: Tile) -> bool:
        """Compare the product of one tile with the reference, once."""
        if (key, tile) not in self._right:
            operand = dict(self._found)[key]
            x = torch.randn(self.m, operand.in_features, dtype=self.model.dtype, device=self.model.device)
            expected = matmul.reference(x, operand, out_dtype=torch.float32)
            product = partial(matmul.launch, x, operand, out_dtype=torch.float32, tile=tile)
            error = (product() - expected).norm() / expected.norm()
            self._right[key, tile] = bool(error < TOLERANCE)
        return self._right[key, tile]


def _row(key: Product, change: Change, about: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a table: the shape, the tile, what it brought, and where that was measured."""
    shape = {"op": "matmul", **key._asdict()}
    figures = {"step_us_before": round(change.before * 1e3, 2), "step_us_after": round(change.after * 1e3, 2)}
    return {**shape, **dataclasses.asdict(change.tile), **figures, **about}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put rows into a table, in place of older ones of the same shapes, a row to a line; keep what else it says."""
    old = json.loads(path.read_text()) if path.exists() else {"rows": []}
    table = {(row["op"], *(row[field] for field in Product._fields)): row for row in (*old.pop("rows"), *rows)}
    lines = ",\n".join("  " + json.dumps(row) for _, row in sorted(table.items()))
    head = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in old.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{{head[1:]} "rows": [\n{lines}\n]}}\n')
