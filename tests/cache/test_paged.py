"""PagedKVCache: what is written is read back, nothing else changes, and the bytes add up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qinfer.cache.formats import KV_FORMATS
from qinfer.cache.paged import PagedKVCache
from qinfer.errors import UnsupportedError
from qinfer.kernels.device import implementation
from tests.strategies import random_tensor, seeds

SIZES = {"num_layers": 3, "num_pages": 4, "num_kv_heads": 2, "head_dim": 8, "page_size": 16}


def filled(seed: int = 0, **options) -> PagedKVCache:
    """A cache in which every number is random."""
    cache = PagedKVCache(device="cpu", **(SIZES | options))
    for layer in range(SIZES["num_layers"]):
        for i, pages in enumerate(cache.pages(layer)):
            pages.copy_(random_tensor(*pages.shape, seed=seed + 2 * layer + i))
    return cache


def everything(cache: PagedKVCache) -> torch.Tensor:
    return torch.stack([torch.stack(cache.pages(layer)) for layer in range(SIZES["num_layers"])])


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_fresh_pages_are_zero_and_of_the_format(kv_format, device):
    cache = PagedKVCache(device=device, kv_format=kv_format, **SIZES)
    assert cache.device.type == device.type
    assert (cache.num_pages, cache.page_size, cache.format.name) == (4, 16, kv_format)
    for layer in range(3):
        for pages in cache.pages(layer):
            assert pages.shape == (4, 2, 16, 8)
            assert pages.dtype == KV_FORMATS[kv_format].storage_dtype
            assert not pages.any()


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@given(
    num_layers=st.integers(1, 3),
    num_pages=st.integers(1, 5),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.integers(1, 9),
)
def test_nbytes_is_the_sum_of_the_tensors(kv_format, num_layers, num_pages, num_kv_heads, head_dim):
    cache = PagedKVCache(
        num_layers=num_layers,
        num_pages=num_pages,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        device="cpu",
        page_size=32,
        kv_format=kv_format,
    )
    assert cache.nbytes == sum(pages.nbytes for layer in range(num_layers) for pages in cache.pages(layer))
    per_token = cache.format.nbytes_per_token(num_kv_heads, head_dim)
    assert cache.nbytes == num_layers * num_pages * 32 * per_token


@given(
    seed=seeds,
    layer=st.integers(0, 2),
    kv_format=st.sampled_from(sorted(KV_FORMATS)),
    slots=st.lists(st.integers(0, 4 * 16 - 1), unique=True, max_size=9),
    num_skipped=st.integers(0, 2),
)
def test_written_rows_are_read_back_and_no_other_row_changes(seed, layer, kv_format, slots, num_skipped):
    cache = filled(kv_format=kv_format)
    expected = everything(cache).clone()
    k, v = (random_tensor(len(slots) + num_skipped, 2, 8, seed=seed + i) for i in range(2))
    for t, slot in enumerate(slots):
        expected[layer, 0, slot // 16, :, slot % 16] = k[t]
        expected[layer, 1, slot // 16, :, slot % 16] = v[t]
    with implementation("reference"):
        cache.write(layer, k, v, torch.tensor(slots + [-1] * num_skipped, dtype=torch.int32))
    assert torch.equal(everything(cache), expected)


@given(source=st.integers(0, 3), target=st.integers(0, 3))
def test_copy_page_copies_one_page_of_every_layer(source, target):
    cache = filled()
    expected = everything(cache).clone()
    expected[:, :, target] = expected[:, :, source].clone()
    cache.copy_page(source, target)
    assert torch.equal(everything(cache), expected)


@pytest.mark.parametrize(("source", "target"), [(0, 4), (-1, 0), (4, 4)])
def test_copy_page_refuses_pages_that_do_not_exist(source, target):
    cache = filled()
    before = everything(cache).clone()
    with pytest.raises(ValueError, match="a page must be from 0 to 3"):
        cache.copy_page(source, target)
    assert torch.equal(everything(cache), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 24}, "page_size must be a multiple of 16, got 24"),
        ({"page_size": 0}, "page_size must be a multiple of 16, got 0"),
        ({"num_pages": 0}, "num_pages must be at least 1, got 0"),
        ({"num_layers": -1}, "num_layers must be at least 1, got -1"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PagedKVCache(device="cpu", **(SIZES | change))


def test_an_unknown_format_is_refused():
    with pytest.raises(UnsupportedError, match="fp16, bf16, fp32"):
        PagedKVCache(device="cpu", kv_format="q8", **SIZES)
