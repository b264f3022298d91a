"""Pages are all the memory that a cache takes: writing makes no second copy, and reading at most a bounded one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from qinfer.cache.formats import KV_FORMATS, layer_formats, nbytes_per_token
from qinfer.cache.paged import PagedKVCache
from qinfer.kernels.attention import paged_attention
from qinfer.kernels.attention_decoded import MAX_BYTES
from qinfer.kernels.device import arch
from qinfer.kernels.tiles import WGMMA

LAYERS, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 2, 32, 8, 128, 256
# So many rows that attention needs no parts of its own, which would count as well.
PROMPT = 2048
NBYTES = 512 * 2**20


def serve(kv_format: str, num_pages: int, prompt: int, device: torch.device) -> tuple[PagedKVCache, list[Tensor]]:
    """Make a cache, write a prompt, a token of two sequences, and a token beside a prompt, and attend to all pages.

    Returns:
        The cache, and the rows and outputs.
    """
    cache = PagedKVCache(
        num_layers=LAYERS,
        num_pages=num_pages,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        device=device,
        page_size=PAGE_SIZE,
        kv_format=kv_format,
    )
    table = torch.arange(num_pages, dtype=torch.int32, device=device)
    others = []
    for counts in ([prompt], [1, 1], [1, prompt - 1]):
        pages = table[: num_pages // len(counts) * len(counts)].view(len(counts), -1)
        places = (pages[:, :, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=device)).flatten(1)
        slots = torch.cat([own[-count:] for own, count in zip(places, counts, strict=True)])
        lens = torch.full((len(counts),), places.shape[1], dtype=torch.int32, device=device)
        starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
        q, k, v = (
            torch.randn(sum(counts), heads, HEAD_DIM, dtype=torch.float16, device=device)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        others += [q, k, v, places]
        for layer in range(LAYERS):
            cache.write(layer, k, v, slots.to(torch.int32))
            options = {"max_query_len": max(counts), "scale": HEAD_DIM**-0.5}
            others.append(paged_attention(q, *cache.pages(layer), pages, starts, lens, **options))
    return cache, others


def peak_of(work: Callable[[], tuple[PagedKVCache, list[Tensor]]]) -> tuple[int, PagedKVCache, list[Tensor]]:
    """Return by how many bytes memory grew at the most, and what the work left."""
    gc.collect()
    torch.cuda.synchronize()
    # Blocks that earlier tests have left are handed out whole where little of them would remain.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cache, others = work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, cache, others


@pytest.mark.gpu
@pytest.mark.parametrize("kv_format", [*KV_FORMATS, "k8v4", "q4,0:fp16"])
def test_memory_is_what_the_format_says(kv_format: str, device: torch.device) -> None:
    per_page = nbytes_per_token(layer_formats(kv_format, LAYERS), KV_HEADS, HEAD_DIM) * PAGE_SIZE
    num_pages = NBYTES // per_page
    peak, cache, others = peak_of(lambda: serve(kv_format, num_pages, PROMPT, device))
    assert cache.nbytes == num_pages * per_page
    assert all(torch.isfinite(x).all() for x in others)
    codecs = {pages.codec for layer in range(LAYERS) for pages in cache.pages(layer)}
    # What prompts see is decoded on Hopper, a layer at a time, as far as there is room.
    decodes = arch(device) in WGMMA and any(codec.scheme != "plain" for codec in codecs)
    room = MAX_BYTES if decodes else 0
    assert cache.nbytes <= peak <= 1.02 * cache.nbytes + sum(x.nbytes for x in others) + room
