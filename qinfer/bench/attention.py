"""`python -m qinfer.bench op attention`: paged attention of one step, beside other people's.

Each figure is the time of one call inside a CUDA graph that walks over enough caches to exceed the L2 cache several
times. Bytes are those of the keys, the values, the queries and the result, each once; operations are two products for
every query and key that see each other.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qinfer.bench.attention_peers import ATTENTION_PEERS
from qinfer.bench.contender import Contender, Outcome, made, more, outcome
from qinfer.bench.measure import environment, product_rate, read_bandwidth
from qinfer.bench.report import append
from qinfer.bench.synthetic import PRESETS
from qinfer.cache.formats import kv_format
from qinfer.cache.paged import PagedKVCache
from qinfer.errors import UnsupportedError
from qinfer.kernels.attention import paged_attention
from qinfer.kernels.device import default_device
from qinfer.kernels.kv_codec import KVPages

if TYPE_CHECKING:
    from argparse import _SubParsersAction

PAGE_SIZE = 256
FP16 = torch.float16


def add_parser(programs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command line of this benchmark."""
    parser = programs.add_parser("attention", help="paged attention of one step")
    parser.add_argument("--preset", choices=PRESETS, default="llama-3.1-8b", help="whose heads; default: llama-3.1-8b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64], help="numbers of sequences")
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 8192], help="tokens of each, the new included")
    parser.add_argument("--queries", type=int, default=1, help="new tokens of each; 1, the default, is decode")
    parser.add_argument("--kv-format", default="fp16", help="of the cache; peers take fp16 only; default: fp16")
    parser.add_argument("--peers", action="store_true", help="also torch SDPA and FlexAttention, and flashinfer")
    parser.add_argument("--json", metavar="FILE", help="append every row to FILE as a line of JSON")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Step:
    """Sequences of one length with as many new tokens each, and the sizes of their heads."""

    batch: int
    context: int
    queries: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def flops(self) -> int:
        """Multiplications and additions of both products over what is visible."""
        visible = self.queries * self.context - self.queries * (self.queries - 1) // 2
        return 4 * self.batch * self.heads * self.head_dim * visible

    def nbytes(self, per_token: int) -> int:
        """Bytes of the keys and values, and of queries and result in 16 bits."""
        rows = 2 * self.batch * self.queries * self.heads * self.head_dim * 2
        return self.batch * self.context * per_token + rows


def run(options: argparse.Namespace) -> int:
    """Measure and print one line per step and contender."""
    device = default_device()
    kv_format(options.kv_format)
    if device.type != "cuda":
        raise UnsupportedError("bench op attention measures a GPU, and torch finds none here")
    if options.queries < 1 or min(options.context) < options.queries:
        raise ValueError(f"--context must be at least --queries, got {min(options.context)} and {options.queries}")
    bandwidth, peak, setting = read_bandwidth(device), product_rate(device), environment(device)
    config = PRESETS[options.preset]
    print(f"{setting['gpu']}, reads {bandwidth:,.0f} GB/s")
    print(f"{'B':>4} {'context':>8} {'queries':>8} {'':<18}{'µs':>9}{'GB/s':>9}{'TFLOP/s':>9}")
    for batch in options.batch:
        for context in options.context:
            step = Step(batch, context, options.queries, config.num_heads, config.num_kv_heads, config.head_dim)
            for name, moved, found in measure(step, options.kv_format, device, with_peers=options.peers):
                rates = ["-", "-"]
                if found.ms is not None:
                    rates = [f"{moved / found.ms / 1e6:,.0f}", f"{step.flops / found.ms / 1e9:.1f}"]
                print(f"{batch:>4} {context:>8} {step.queries:>8} {name:<18}{found!s:>9}{rates[0]:>9}{rates[1]:>9}")
                if found.problem:
                    print(f"{'':<23}{found.problem}")
                row = {"bench": "op", "op": "attention", "format": name, "model": options.preset, "batch": batch}
                row |= {"context": context, "queries": step.queries, "bytes": moved, "flops": step.flops}
                row |= {
                    "ms": found.ms,
                    "problem": found.problem,
                    "read_bandwidth_gb_s": bandwidth,
                    "product_tflops": peak,
                }
                row |= {"fraction_of_roof": None if found.ms is None else moved / found.ms / 1e6 / bandwidth}
                append({**row, **setting}, options.json)
    return 0


def measure(step: Step, name: str, device: torch.device, *, with_peers: bool) -> Iterator[tuple[str, int, Outcome]]:
    """Yield name, bytes and outcome of qinfer and of the peers, one after the other."""
    q = torch.randn(step.batch * step.queries, step.heads, step.head_dim, device=device)
    per_token = kv_format(name).nbytes_per_token(step.kv_heads, step.head_dim)
    yield f"qinfer {name}", step.nbytes(per_token), outcome(ours(step, name, device), q)
    plain = step.nbytes(kv_format("fp16").nbytes_per_token(step.kv_heads, step.head_dim))
    for peer in ATTENTION_PEERS if with_peers else ():
        pages = _pages(step, "fp16", device)
        contender = made(peer, step, *(part.codes for part in pages), _table(step, device))
        found = contender if isinstance(contender, Outcome) else outcome(contender, q, is_peer=True)
        yield peer.name, plain, found


def _pages(step: Step, name: str, device: torch.device) -> tuple[KVPages, KVPages]:
    """Make the cache of one layer, filled with standard normal keys and values."""
    num_pages = step.batch * -(-step.context // PAGE_SIZE)
    cache = PagedKVCache(
        num_layers=1,
        num_pages=num_pages,
        num_kv_heads=step.kv_heads,
        head_dim=step.head_dim,
        device=device,
        page_size=PAGE_SIZE,
        kv_format=name,
    )
    slots = torch.arange(num_pages * PAGE_SIZE, dtype=torch.int32, device=device)
    for part in torch.split(slots, 1 << 16):
        keys, values = torch.randn(2, len(part), step.kv_heads, step.head_dim, device=device).to(FP16)
        cache.write(0, keys, values, part)
    return cache.pages(0)


def _table(step: Step, device: torch.device) -> Tensor:
    """Return the page table [B, W] int32: every sequence has its own pages, anywhere in the pool."""
    width = -(-step.context // PAGE_SIZE)
    order = torch.randperm(step.batch * width, generator=torch.Generator().manual_seed(0))
    return order.view(step.batch, width).to(torch.int32).to(device)


def ours(step: Step, name: str, device: torch.device) -> Contender:
    """Make qinfer's contender."""
    table = _table(step, device)
    starts = torch.arange(step.batch + 1, dtype=torch.int32, device=device) * step.queries
    lens = torch.full((step.batch,), step.context, dtype=torch.int32, device=device)
    keywords = {"max_query_len": step.queries, "scale": step.head_dim**-0.5}

    def call(body: object, pages: tuple[KVPages, KVPages], q: Tensor) -> Tensor:
        y: Tensor = body(q, *pages, table, starts, lens, **keywords)  # type: ignore[operator]
        return y

    first = _pages(step, name, device)
    nbytes = sum(part.codes.nbytes for part in first)
    pools = [first, *more(lambda: _pages(step, name, device), nbytes)]
    functions = [partial(call, paged_attention.launch, pages) for pages in pools]
    return Contender(f"qinfer {name}", functions, lambda q: call(paged_attention.reference, first, q).float(), nbytes)
