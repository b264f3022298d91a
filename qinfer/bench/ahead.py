"""Compiling in parallel before anything is timed: processes that run every product once and fill Triton's cache.

Triton compiles a kernel when it is first launched, a few seconds on one core, and a sweep over formats and rows has
hundreds of them. What these processes leave on the disk, the one that takes the times only loads.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from qinfer.bench.measure import synchronize
from qinfer.bench.recipes import PACKED
from qinfer.kernels.device import default_device
from qinfer.kernels.matmul import matmul


def compile_ahead(names: Sequence[str], sizes: Sequence[tuple[int, int]], rows: Sequence[int], *, jobs: int) -> None:
    """Run the products of all formats with matrices (N, K), in so many processes, on the GPU of this one.

    Whatever a product raises is raised here.
    """
    # The last formats are the mixtures, which take longest.
    tasks = list(itertools.product(reversed(names), rows))
    start = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=start) as pool:
        for done in [pool.submit(run_once, name, sizes, m) for name, m in tasks]:
            done.result()


def run_once(name: str, sizes: Sequence[tuple[int, int]], m: int) -> None:
    """Multiply m rows by a random matrix of every size (N, K)."""
    device, make = default_device(), PACKED[name].make
    assert make is not None
    for n, k in sizes:
        matmul(torch.randn(m, k, dtype=torch.float16, device=device), make(k, n, device))
    synchronize(device)
