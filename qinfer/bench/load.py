"""`python -m qinfer.bench op load`: how fast tensors get from safetensors files to the device, beside a bare copy.

The files hold random bytes in tensors of the sizes of a 4-bit Llama-3.1-8B and lie in the page cache, so what is
measured is the way through the process, not the disk. The ceiling is one page-locked buffer copied to the device over
and over until as many bytes have crossed. On a CPU a loaded tensor is a view of the mapped file; there both sides copy
memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qinfer.bench.measure import Times, environment, synchronize
from qinfer.bench.report import emit
from qinfer.checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint
from qinfer.kernels.device import default_device

if TYPE_CHECKING:
    from argparse import _SubParsersAction

# Bytes of the tensors of one matrix after the other: codes, zero points, scales; now and then a norm.
MATRICES = [4096 * 4096, 4096 * 1024, 4096 * 1024, 4096 * 4096, 4096 * 14336, 4096 * 14336, 14336 * 4096]
TENSORS = [size for n in MATRICES for size in (n // 2, n // 128 // 2, n // 128 * 2)] + [8192, 8192]
SHARD_BYTES = 1 << 30
BLOCK_BYTES = 64 << 20
COPY_BYTES = 256 << 20
REPEATS = 3


def add_parser(programs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command line of this benchmark."""
    parser = programs.add_parser("load", help="GB/s from safetensors files to the device, and host memory on the way")
    parser.add_argument("--size-gb", type=float, default=4.0, metavar="N", help="of all files; default: 4")
    parser.add_argument("--folder", metavar="DIR", help="where the files are written, and deleted (default: /tmp)")
    parser.add_argument("--device", help="cuda or cpu")
    parser.add_argument("--json", metavar="FILE", help="append the result to FILE as a line of JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write files, measure, print, delete."""
    if not options.size_gb > 0:
        raise ValueError(f"--size-gb must be positive, got {options.size_gb}")
    device = torch.device(options.device) if options.device else default_device()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="qinfer-load-") as folder:
        write_files(Path(folder), round(options.size_gb * 1e9))
        emit({"bench": "load", **measure(Path(folder), device), **environment(device)}, options.json)
    return 0


def measure(folder: Path, device: torch.device) -> dict[str, Any]:
    """Load a folder of safetensors files several times and time it.

    Args:
        folder: of a checkpoint.
        device: where the tensors go; each is dropped when the next one comes.

    Returns:
        Fields for a report: rates in GB/s, times in ms, sizes in MB.
    """
    checkpoint = Checkpoint(folder)
    names = sorted(checkpoint.names(), key=lambda name: (checkpoint.file(name), name))
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    copies = _timed(lambda: _copy(total, device), device)

    def load() -> None:
        fresh = Checkpoint(folder)
        for name in names:
            tensor = fresh.read(name, device)
            if device.type == "cpu":
                tensor.clone()

    with _peak_rss() as peak:
        loads = _timed(load, device)
    rates = [total / times.median / 1e6 for times in (loads, copies)]
    return {
        "tensors": len(names),
        "size_mb": total / 1e6,
        "largest_file_mb": largest / 1e6,
        "load_gb_s": rates[0],
        "copy_gb_s": rates[1],
        "fraction_of_copy": rates[0] / rates[1],
        "load_ms": loads.asdict(),
        "copy_ms": copies.asdict(),
        "peak_host_rss_growth_mb": peak[0] / 1e6,
    }


def write_files(folder: Path, num_bytes: int) -> None:
    """Write a checkpoint of random uint8 tensors with about `num_bytes` bytes, in files of at most about 1 GB."""
    (folder / CONFIG_FILE).write_text("{}")
    block = torch.randint(0, 256, (min(BLOCK_BYTES, num_bytes),), dtype=torch.uint8).numpy().data
    weight_map: dict[str, str] = {}
    sizes = _tensor_sizes(num_bytes)
    for shard in itertools.count():
        header: dict[str, Any] = {}
        end = 0
        while end < SHARD_BYTES and (size := next(sizes, 0)):
            header[f"{shard}.{len(header)}"] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
            end += size
        if not header:
            break
        file = f"model-{shard:05d}.safetensors"
        weight_map |= dict.fromkeys(header, file)
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for start in range(0, end, len(block)):
                out.write(block[: min(len(block), end - start)])
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def _tensor_sizes(num_bytes: int) -> Iterator[int]:
    for size in itertools.cycle(TENSORS):
        if num_bytes <= 0:
            return
        yield min(size, num_bytes)
        num_bytes -= size


def _copy(num_bytes: int, device: torch.device) -> None:
    """Copy as many bytes from page-locked memory to the device, with nothing between the copies."""
    is_cuda = device.type == "cuda"
    source = torch.empty(min(COPY_BYTES, num_bytes), dtype=torch.uint8, pin_memory=is_cuda)
    target = torch.empty_like(source, device=device)
    for start in range(0, num_bytes, len(source)):
        length = min(len(source), num_bytes - start)
        target[:length].copy_(source[:length], non_blocking=True)


def _timed(function: Callable[[], None], device: torch.device) -> Times:
    """Time a function that is long, after one run that allocates what later ones use again."""
    samples = []
    for _ in range(1 + REPEATS):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        samples.append((time.perf_counter() - start) * 1e3)
    return Times(tuple(samples[1:]))


@contextmanager
def _peak_rss() -> Iterator[list[int]]:
    """Watch the resident memory of this process, mapped files included; yield a list with its growth so far."""
    start, growth, done = _rss(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            growth[0] = max(growth[0], _rss() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield growth
    finally:
        done.set()
        thread.join()


def _rss() -> int:
    """Return the bytes of this process that are in memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
