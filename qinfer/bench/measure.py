"""Clocks and ceilings: how a function is timed on a device, and how fast that device reads memory."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, inf
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.env import settings
from qinfer.kernels.device import num_sms

READ_BYTES = 4 << 30  # far beyond any cache
READ_BYTES_CPU = 256 << 20
PRODUCT_SIZE = 8192
GRAPH_MS = 2.0  # of a graph at least, whose start and end, some microseconds, are then none of its functions'
CHAIN = 16  # calls from one that waits for all before it to the next
BURST = 4  # replays in a row; an H200 keeps its clock for 50 ms of the heaviest load (benchmarks/LOG.md)
PAUSE_MS = 10.0  # behind a burst, at least
MAX_BURSTS = 50  # until times stand still
STILL = 0.01  # by how much they may still fall from burst to burst


@dataclass(frozen=True)
class Times:
    """Milliseconds of repeated runs."""

    samples: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """Return the q-quantile, 0 <= q <= 1, of the samples."""
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]

    @property
    def median(self) -> float:
        """The median in milliseconds."""
        return statistics.median(self.samples)

    def asdict(self) -> dict[str, float]:
        """Return median, p10 and p90 in milliseconds."""
        return {"median": self.median, "p10": self.quantile(0.1), "p90": self.quantile(0.9)}


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(function: Callable[[], Any], device: torch.device, *, repeats: int, warmup: int = 3) -> Times:
    """Time a function from call to finished work, on the host's clock."""
    for _ in range(warmup):
        function()
    samples = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        samples.append((time.perf_counter() - start) * 1e3)
    return Times(tuple(samples))


def time_graph(functions: Sequence[Callable[[], Any]], device: torch.device, *, repeats: int = 20) -> Times:
    """Time a chain of kernels replayed as one CUDA graph, in milliseconds per function.

    The graph holds the chain as often as takes GRAPH_MS, and is replayed in bursts with pauses between them: under a
    load that does not end, a GPU lowers its clock to keep to its power. Every CHAIN calls it waits for all that it has
    started, for kernels that let the next one start at once, and are followed by themselves, as in no model, pile up.
    The functions should touch different buffers, together larger than the cache, so that none is measured from it.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for function in functions:
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    turns, replay, flag = 1, _captured(functions), torch.zeros(1, device=device)
    while (taken := settled(partial(burst, replay))) < GRAPH_MS:  # a first short graph is hardly more than its start
        turns *= ceil(GRAPH_MS / taken)
        replay = _captured(broken([*functions] * turns, flag.zero_))
    samples = [taken for _ in range(ceil(repeats / BURST)) for taken in burst(replay)]
    return Times(tuple(taken / (turns * len(functions)) for taken in samples))


def broken(calls: Sequence[Callable[[], Any]], pause: Callable[[], Any]) -> list[Callable[[], Any]]:
    """Return calls with a pause behind every CHAIN of them."""
    return [one for first in range(0, len(calls), CHAIN) for one in (*calls[first : first + CHAIN], pause)]


def _captured(functions: Sequence[Callable[[], Any]]) -> Callable[[], float]:
    """Capture calls as one graph; return what replays it, and returns the milliseconds that took."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()

    def replay() -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop))

    return replay


def burst(replay: Callable[[], float]) -> list[float]:
    """Replay a graph once unseen and BURST times seen, then pause for as long; return the milliseconds of each."""
    start = time.perf_counter()
    replay()
    taken = [replay() for _ in range(BURST)]
    time.sleep(max(PAUSE_MS / 1e3, time.perf_counter() - start))
    return taken


def settled(run: Callable[[], list[float]]) -> float:
    """Run bursts until their times no longer fall, as those of a GPU do that was idle; return the last median."""
    before = inf
    for _ in range(MAX_BURSTS):
        taken = statistics.median(run())
        if taken > (1 - STILL) * before:
            return taken
        before = taken
    return before


@triton.jit
def _read_kernel(p_x, p_out, num_blocks, BLOCK: tl.constexpr):
    i_program = tl.program_id(0)
    b_sum = tl.zeros([BLOCK], tl.int32)
    for i_block in tl.range(i_program, num_blocks, tl.num_programs(0), num_stages=4):
        b_sum += tl.load(p_x + i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(p_out + i_program, tl.sum(b_sum))


def read_bandwidth(device: torch.device) -> float:
    """Measure how fast the device reads memory, in GB/s: median time of sums over far more data than caches hold."""
    if device.type != "cuda":
        data = torch.randint(-9, 9, (READ_BYTES_CPU // 4,), dtype=torch.int32)
        return data.nbytes / time_calls(data.sum, device, repeats=10).median / 1e6
    data = torch.randint(-9, 9, (READ_BYTES // 4,), dtype=torch.int32, device=device)
    best = 0.0
    for block, per_sm in ((4096, 8), (8192, 4), (8192, 2)):
        programs = num_sms(device) * per_sm
        out = torch.empty(programs, dtype=torch.int32, device=device)

        def read(block: int = block, programs: int = programs, out: Tensor = out) -> None:
            _read_kernel[(programs,)](data, out, data.numel() // block, BLOCK=block, num_warps=8)

        best = max(best, data.nbytes / time_graph([read], device).median / 1e6)
    return best


def product_rate(device: torch.device) -> float:
    """Measure how fast torch multiplies large fp16 matrices on a GPU, in TFLOP/s."""
    x, y = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE, device=device).half()
    out = torch.empty_like(x)
    return 2 * PRODUCT_SIZE**3 / time_graph([lambda: torch.mm(x, y, out=out)], device).median / 1e9


def revision() -> str:
    """Return QINFER_REVISION, else the git revision of the code ('+': the work tree differs), else 'unknown'."""
    if given := settings().revision:
        return given
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def environment(device: torch.device) -> dict[str, str]:
    """Return what a figure depends on besides the code: device, versions, revision."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "gpu": name,
        "device": device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "revision": revision(),
        "date": time.strftime("%Y-%m-%d"),
    }
