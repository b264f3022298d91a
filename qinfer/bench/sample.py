"""`python -m qinfer.bench op sample`: one token per row, by the op and by its reference, which sorts.

The logits are normal with a standard deviation of 3, of which top-p 0.95 keeps some thousands of 128,256. The figure of
the op is its time inside a CUDA graph; that of the reference is torch's kernels in a graph too; that of a step is what
`engine.sampling.sample` takes of the host until everything is queued. An op that draws another token than the reference
reports no figure.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qinfer.bench.measure import environment, synchronize, time_graph
from qinfer.bench.report import append
from qinfer.engine.sampling import Row, SamplerState, SamplingParams, sample
from qinfer.errors import UnsupportedError
from qinfer.kernels.device import default_device
from qinfer.kernels.sample import sample_rows
from qinfer.kernels.token_weights import ONE

if TYPE_CHECKING:
    from argparse import _SubParsersAction

LOG2_E = 1.4426950408889634
KINDS = {
    "temperature": SamplingParams(seed=1),
    "min-p": SamplingParams(min_p=0.05, seed=1),
    "top-k": SamplingParams(top_k=50, seed=1),
    "top-p": SamplingParams(top_p=0.95, seed=1),
    "top-k top-p": SamplingParams(top_k=50, top_p=0.95, seed=1),
}


def add_parser(programs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command line of this benchmark."""
    parser = programs.add_parser("sample", help="one token per row of logits")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64], help="rows of logits")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[128256], help="columns of logits")
    parser.add_argument("--json", metavar="FILE", help="append every row to FILE as a line of JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure and print one line per shape and kind."""
    device = default_device()
    if device.type != "cuda":
        raise UnsupportedError("bench op sample measures a GPU, and torch finds none here")
    setting = environment(device)
    print(f"{setting['gpu']}; µs\n{'V':>7} {'rows':>5} {'kind':<12}{'op':>9}{'sorted':>9}{'host':>9}")
    for vocabulary in options.vocabulary:
        for rows in options.rows:
            logits = torch.randn(rows, vocabulary, device=device) * 3
            for name, params in KINDS.items():
                figures = _measure(logits, params, device)
                cells = "".join(f"{'wrong' if t is None else f'{t * 1e3:.1f}':>9}" for t in figures.values())
                print(f"{vocabulary:>7} {rows:>5} {name:<12}{cells}", flush=True)
                row = {"bench": "op", "op": "sample_rows", "kind": name, "rows": rows, "vocabulary": vocabulary}
                append({**row, **figures, **setting}, options.json)
    return 0


def _measure(logits: Tensor, params: SamplingParams, device: torch.device) -> dict[str, float | None]:
    """Return milliseconds of the op, of its reference, and of the host in a step."""
    numbers = [
        (LOG2_E / params.temperature, params.top_k, params.top_p, max(1.0, params.min_p * ONE), (i + 0.5) / len(logits))
        for i in range(len(logits))
    ]
    table = torch.tensor(numbers, dtype=torch.float64, device=device)
    filtered = params.top_k > 0 or params.top_p < 1

    def launch() -> Tensor:
        return sample_rows.launch(logits, table, filtered=filtered)

    def reference() -> Tensor:
        return sample_rows.reference(logits, table, filtered=filtered)

    wrong = not torch.equal(launch(), reference())
    rows = [SamplerState(params, []).row([]) for _ in logits]
    return {
        "ms": None if wrong else time_graph([launch], device).median,
        "ms_sorted": time_graph([reference], device).median,
        "ms_host": _host(logits, rows, device),
    }


def _host(logits: Tensor, rows: list[Row], device: torch.device) -> float:
    """Return milliseconds until a step's sampling is queued on an idle device."""
    samples = []
    for _ in range(30):
        synchronize(device)
        start = time.perf_counter()
        sample(logits, rows)
        samples.append((time.perf_counter() - start) * 1e3)
    return median(samples)
