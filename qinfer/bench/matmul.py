"""`python -m qinfer.bench op matmul`: the matrix product at every width, beside torch's own products, on real shapes.

Each figure is the time of one product inside a CUDA graph that walks over enough copies of the matrix to exceed the
cache several times, so weights come from memory. A product whose result is wrong reports no figure.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qinfer.bench.measure import environment, read_bandwidth, time_graph
from qinfer.bench.report import append
from qinfer.bench.synthetic import PRESETS, random_planes, random_segments
from qinfer.bench.tune import ROTATE_BYTES, shapes
from qinfer.errors import UnsupportedError
from qinfer.kernels.device import default_device
from qinfer.kernels.matmul import matmul
from qinfer.kernels.operand import FIELDS, DenseOperand, Operand

if TYPE_CHECKING:
    from argparse import _SubParsersAction

GROUP = 128
TOLERANCE = 4e-3  # relative RMS against fp32; fp16 products of these sizes land near 5e-4
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to multiply by an [N, K] matrix."""

    name: str
    products: Sequence[Product]  # one per copy of the matrix
    reference: Product  # fp32 result of the first copy
    nbytes: int  # of one copy
    in_features: int
    dtype: torch.dtype = torch.float16  # of x


FORMATS: dict[str, Callable[[int, int, torch.device], Operand]] = {
    **{f"int{bits}-g{GROUP}": partial(random_planes, bits=bits, group_size=GROUP) for bits in FIELDS},
    "int4-g32": partial(random_planes, bits=4, group_size=32),
    "int4-g128-asym": partial(random_planes, bits=4, group_size=GROUP, symmetric=False),
    # What ExLlamaV2 writes at 4.0 bits per weight: some rows at 5 bits, most at 4, some at 3.
    "exl2-4.0": partial(random_segments, shares={5: 0.1, 4: 0.8, 3: 0.1}, group_size=GROUP),
}


def add_parser(programs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command line of this benchmark."""
    parser = programs.add_parser("matmul", help="the matrix product at every width")
    parser.add_argument("--formats", default="int4-g128", help=f"all, or a list of {', '.join(FORMATS)}")
    parser.add_argument("--preset", choices=PRESETS, action="append", help="whose matrices; may be repeated")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256, 2048], help="values of M")
    parser.add_argument("--peers", action="store_true", help="also torch's own int4 product")
    parser.add_argument("--json", metavar="FILE", help="append every row to FILE as a line of JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure and print one line per shape and format."""
    device = default_device()
    if device.type != "cuda":
        raise UnsupportedError("bench op matmul measures a GPU, and torch finds none here")
    names = list(FORMATS) if options.formats == "all" else options.formats.split(",")
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        raise UnsupportedError(f"there is no format {unknown[0]!r}; these work: all, {', '.join(FORMATS)}")
    bandwidth, setting = read_bandwidth(device), environment(device)
    print(f"{setting['gpu']}, reads {bandwidth:,.0f} GB/s; µs per product")
    print(f"{'N × K':<15} {'format':<15} {'MB':>6}" + "".join(f"{f'M={m}':>9}" for m in options.rows) + "  GB/s at M=1")
    for n, k in shapes(options.preset or ["llama-3.1-8b"]):
        for contender in _contenders(n, k, names, device, with_peers=options.peers):
            name, nbytes = contender.name, contender.nbytes
            times = [_time(contender, m, device) for m in options.rows]
            cells = "".join(f"{'wrong' if t is None else f'{t * 1e3:.1f}':>9}" for t in times)
            first = f"{nbytes / times[0] / 1e6:,.0f}" if times[0] else "-"
            print(f"{f'{n} × {k}':<15} {name:<15} {nbytes / 1e6:6.1f}{cells}  {first}", flush=True)
            for m, t in zip(options.rows, times, strict=True):
                row = {"bench": "op", "op": "matmul", "format": name, "m": m, "n": n, "k": k, "bytes": nbytes}
                row |= {"ms": t, "read_bandwidth_gb_s": bandwidth}
                row |= {"fraction_of_roof": None if t is None else nbytes / t / 1e6 / bandwidth}
                append({**row, **setting}, options.json)
    return 0


def _contenders(n: int, k: int, names: list[str], device: torch.device, *, with_peers: bool) -> Iterator[Contender]:
    """Yield all that take part; one at a time is in memory."""
    yield _contender("fp16 cuBLAS", lambda: DenseOperand(torch.randn(n, k, device=device).half() * k**-0.5))
    for name in names:
        yield _contender(name, partial(FORMATS[name], k, n, device))
    if with_peers and n % 8 == 0 and k % GROUP == 0:
        yield _tinygemm(n, k, device)


def _contender(name: str, make: Callable[[], Operand]) -> Contender:
    """Make enough operands of one kind to exceed the cache."""
    first = make()
    k = first.in_features
    operands = [first, *(make() for _ in range(ceil(ROTATE_BYTES / first.nbytes) - 1))]
    products = [partial(_product, operand) for operand in operands]
    return Contender(name, products, lambda x: matmul.reference(x, first, out_dtype=torch.float32), first.nbytes, k)


def _product(operand: Operand, x: Tensor) -> Tensor:
    """Multiply through the launcher, as a model does after its check."""
    return matmul.launch(x, operand)


def _tinygemm(n: int, k: int, device: torch.device) -> Contender:
    """Make torch's own int4 product (bf16 activations, asymmetric groups of 128)."""

    def make() -> tuple[Tensor, Tensor]:
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
        packed = torch._convert_weight_to_int4pack(codes, 8)
        scales_and_zeros = torch.rand(k // GROUP, n, 2, dtype=torch.bfloat16, device=device) * (k**-0.5 / 4.6)
        return packed, scales_and_zeros

    def product(matrix: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm(x, matrix[0], GROUP, matrix[1])
        return y

    first = make()
    nbytes = sum(tensor.nbytes for tensor in first)
    matrices = [first, *(make() for _ in range(ceil(ROTATE_BYTES / nbytes) - 1))]
    products = [partial(product, matrix) for matrix in matrices]
    # A peer's numbers are its own business: it is compared with itself on the first rows of a larger product.
    return Contender("torch int4", products, lambda x: products[0](x).float(), nbytes, k, torch.bfloat16)


def _time(contender: Contender, m: int, device: torch.device) -> float | None:
    """Return milliseconds per product; None where the result is wrong."""
    x = torch.randn(m, contender.in_features, device=device).to(contender.dtype)
    expected = contender.reference(x)
    error = (contender.products[0](x).float() - expected).norm() / expected.norm()
    if not float(error) < TOLERANCE:
        return None
    return time_graph([partial(product, x) for product in contender.products], device, repeats=10).median
