"""What happens around a step while it is recorded: garbage collection, other threads, errors."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest
import torch
from torch import Tensor

from qinfer.cache.paged import PagedKVCache
from qinfer.engine.graphs import GraphRunner, _recording
from qinfer.models.batch import Batch


class Recorder:
    """Stands for a CUDA graph: what it was told, and whether the garbage collector was on then."""

    def __init__(self) -> None:
        self.told: list[tuple[str, bool]] = []

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        self.told.append((capture_error_mode, gc.isenabled()))

    def capture_end(self) -> None:
        self.told.append(("end", gc.isenabled()))


@pytest.mark.parametrize("collects", [False, True])
def test_the_garbage_collector_waits(collects: bool) -> None:
    before, graph = gc.isenabled(), Recorder()
    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(ZeroDivisionError), _recording(cast("torch.cuda.CUDAGraph", graph), None):
            raise ZeroDivisionError
        assert graph.told == [("thread_local", False), ("end", False)]
        assert gc.isenabled() is collects
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.gpu
def test_neither_garbage_nor_another_thread_spoils_it() -> None:
    cache = PagedKVCache(num_layers=1, num_pages=4, num_kv_heads=1, head_dim=16, device="cuda", page_size=16)

    def decode(batch: Batch, cache: PagedKVCache) -> Tensor:
        return torch.zeros(len(batch.logit_rows), 64, device="cuda")

    def decode_beside(batch: Batch, cache: PagedKVCache) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            garbage: list[object] = [olds.pop()]
            garbage.append(garbage)
            del garbage
            [[] for _ in range(10_000)]  # a reason to collect
            with ThreadPoolExecutor() as pool:
                # More than the allocator has at hand, so that it asks the device.
                pool.submit(lambda: torch.empty(1 << 30, dtype=torch.uint8, device="cuda")).result()
            seen.append(gone() is not None)
        return decode(batch, cache)

    olds = [GraphRunner(decode, cache, max_batch=1, table_width=3)]
    olds[0].capture_all()
    gone, seen = weakref.ref(olds[0]), list[bool]()
    GraphRunner(decode_beside, cache, max_batch=1, table_width=3).capture_all()
    assert seen == [True]
    gc.collect()
    assert gone() is None
