"""`python -m qinfer.bench op matmul`: the matrix product at every width, beside torch's own products, on real shapes.

Each figure is the time of one product inside a CUDA graph of several, which walk over enough copies of the matrix to
exceed the cache several times, so weights come from memory. A product whose result is wrong reports no figure.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qinfer.bench.ahead import compile_ahead
from qinfer.bench.contender import Contender, Outcome, made, more, outcome
from qinfer.bench.measure import environment, product_rate, read_bandwidth
from qinfer.bench.peers import MATMUL_PEERS
from qinfer.bench.recipes import PACKED
from qinfer.bench.report import append
from qinfer.bench.synthetic import PRESETS, shapes
from qinfer.errors import UnsupportedError
from qinfer.kernels.device import default_device
from qinfer.kernels.matmul import matmul
from qinfer.kernels.operand import DenseOperand, Operand

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_parser(programs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command line of this benchmark."""
    parser = programs.add_parser("matmul", help="the matrix product at every width")
    parser.add_argument("--formats", default="int4-g128", help=f"all, or a list of {', '.join(PACKED)}")
    parser.add_argument("--preset", choices=PRESETS, action="append", help="whose matrices; may be repeated")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256, 2048], help="values of M")
    parser.add_argument("--peers", action="store_true", help="also torch's int4 product, gemlite and humming")
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile all kernels first; default: none")
    parser.add_argument("--json", metavar="FILE", help="append every row to FILE as a line of JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure and print one line per shape and format."""
    device = default_device()
    if device.type != "cuda":
        raise UnsupportedError("bench op matmul measures a GPU, and torch finds none here")
    names = list(PACKED) if options.formats == "all" else options.formats.split(",")
    unknown = [name for name in names if name not in PACKED]
    if unknown:
        raise UnsupportedError(f"there is no format {unknown[0]!r}; these work: all, {', '.join(PACKED)}")
    if options.jobs < 0:
        raise ValueError(f"--jobs must be at least 0, got {options.jobs}")
    sizes = shapes(options.preset or ["llama-3.1-8b"])
    if options.jobs:
        compile_ahead(names, sizes, options.rows, jobs=options.jobs)
    bandwidth, peak, setting = read_bandwidth(device), product_rate(device), environment(device)
    print(f"{setting['gpu']}, reads {bandwidth:,.0f} GB/s; µs per product")
    print(f"{'N × K':<15} {'format':<15} {'MB':>6}" + "".join(f"{f'M={m}':>9}" for m in options.rows) + "  GB/s at M=1")
    for n, k in sizes:
        for name, nbytes, found in measure(n, k, names, options.rows, device, with_peers=options.peers):
            first = f"{nbytes / found[0].ms / 1e6:,.0f}" if found[0].ms else "-"
            size = f"{nbytes / 1e6:6.1f}" if nbytes else f"{'-':>6}"
            cells = "".join(f"{one!s:>9}" for one in found)
            print(f"{f'{n} × {k}':<15} {name:<15} {size}{cells}  {first}", flush=True)
            for problem in dict.fromkeys(one.problem for one in found if one.problem):
                print(f"{'':<16}{problem}")
            for m, one in zip(options.rows, found, strict=True):
                row = {"bench": "op", "op": "matmul", "format": name, "m": m, "n": n, "k": k, "bytes": nbytes}
                row |= {"ms": one.ms, "problem": one.problem, "read_bandwidth_gb_s": bandwidth, "product_tflops": peak}
                row |= {"fraction_of_roof": None if one.ms is None else nbytes / one.ms / 1e6 / bandwidth}
                append({**row, **setting}, options.json)
    return 0


def measure(
    n: int, k: int, names: Sequence[str], rows: Sequence[int], device: torch.device, *, with_peers: bool
) -> Iterator[tuple[str, int, list[Outcome]]]:
    """Yield name, bytes and one outcome per value of M of all that take part; one at a time is in memory."""
    makes: list[tuple[str, Callable[[], Operand]]] = [
        ("fp16 cuBLAS", lambda: DenseOperand(torch.randn(n, k, dtype=torch.float16, device=device) * k**-0.5))
    ]
    for name in names:
        make = PACKED[name].make
        assert make is not None
        makes.append((name, partial(make, k, n, device)))
    inputs = [torch.randn(m, k, device=device) for m in rows]
    for name, make_operand in makes:
        contender = _contender(name, make_operand)
        yield name, contender.nbytes, [outcome(contender, x) for x in inputs]
    for peer in MATMUL_PEERS if with_peers else ():
        other = made(peer, n, k, device)
        if isinstance(other, Outcome):
            yield peer.name, 0, [other] * len(inputs)
        else:
            yield peer.name, other.nbytes, [outcome(other, x, is_peer=True) for x in inputs]


def _contender(name: str, make: Callable[[], Operand]) -> Contender:
    """Make enough operands of one kind to exceed the cache."""
    first = make()
    operands = [first, *more(make, first.nbytes)]
    functions = [partial(_product, operand) for operand in operands]
    return Contender(name, functions, lambda x: matmul.reference(x, first, out_dtype=torch.float32), first.nbytes)


def _product(operand: Operand, x: Tensor) -> Tensor:
    """Multiply through the launcher, as a model does after its check."""
    return matmul.launch(x, operand)
