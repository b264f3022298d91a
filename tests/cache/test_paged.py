"""PagedKVCache: what is written is read back, nothing else changes, and the bytes add up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qinfer.cache.formats import KV_FORMATS, layer_formats, nbytes_per_token
from qinfer.cache.paged import PagedKVCache
from qinfer.errors import UnsupportedError
from qinfer.kernels.device import implementation
from tests.kernels.coded import loss
from tests.strategies import random_tensor, seeds

SIZES = {"num_layers": 3, "num_pages": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": 16}
FORMATS = [*KV_FORMATS, "k8v4", "kfp16vq6", "q4,0:fp16", "k8v4,-1:q8,1:fp8"]


def filled(seed: int = 0, **options) -> PagedKVCache:
    """A cache in which every byte is random, small enough to be a number in every format."""
    cache = PagedKVCache(device="cpu", **(SIZES | options))
    for i, tensor in enumerate(everything(cache)):
        values = torch.randint(0, 0x70, tensor.shape, generator=torch.Generator().manual_seed(seed + i))
        tensor.copy_(values)
    return cache


def everything(cache: PagedKVCache) -> list[torch.Tensor]:
    """All tensors of all layers: codes and scales of keys, then of values."""
    return [x for layer in range(SIZES["num_layers"]) for pages in cache.pages(layer) for x in pages.tensors()]


@pytest.mark.parametrize("kv_format", FORMATS)
def test_fresh_pages_are_zero_and_of_the_format(kv_format, device):
    cache = PagedKVCache(device=device, kv_format=kv_format, **SIZES)
    assert cache.device.type == device.type
    assert (cache.num_pages, cache.page_size, cache.formats) == (4, 16, layer_formats(kv_format, 3))
    for layer, stored in enumerate(cache.formats):
        for pages, codec in zip(cache.pages(layer), (stored.keys, stored.values), strict=True):
            assert pages.codec == codec
            pages.check("pages", (4, 2, 16, 16))
            assert pages.head_dim == 16
            assert not pages.decode().any()


@pytest.mark.parametrize("kv_format", FORMATS)
@settings(max_examples=10)
@given(
    num_layers=st.integers(2, 4),
    num_pages=st.integers(1, 5),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.integers(1, 9).map(lambda n: 16 * n),
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
    assert cache.nbytes == num_pages * 32 * nbytes_per_token(cache.formats, num_kv_heads, head_dim)


@given(
    seed=seeds,
    layer=st.integers(0, 2),
    kv_format=st.sampled_from(FORMATS),
    slots=st.lists(st.integers(0, 4 * 16 - 1), unique=True, max_size=9),
    num_skipped=st.integers(0, 2),
)
def test_written_rows_are_read_back_and_no_other_row_changes(seed, layer, kv_format, slots, num_skipped):
    cache = filled(kv_format=kv_format)
    before = [tensor.clone() for tensor in everything(cache)]
    k, v = (random_tensor(len(slots) + num_skipped, 2, 16, seed=seed + i) for i in range(2))
    with implementation("reference"):
        cache.write(layer, k, v, torch.tensor(slots + [-1] * num_skipped, dtype=torch.int32))
    page, offset = torch.tensor(slots, dtype=torch.long) // 16, torch.tensor(slots, dtype=torch.long) % 16
    index = (page, slice(None), offset)
    for x, pages in zip((k, v), cache.pages(layer), strict=True):
        scales = None if pages.scales is None else pages.scales[index]
        assert loss(x[: len(slots)], pages.decode(index), scales, pages.codec) <= 1.005
        for tensor in pages.tensors():
            number = next(i for i, other in enumerate(everything(cache)) if other.data_ptr() == tensor.data_ptr())
            before[number][index] = tensor[index]
    assert all(torch.equal(x, y) for x, y in zip(everything(cache), before, strict=True))


@given(source=st.integers(0, 3), target=st.integers(0, 3), kv_format=st.sampled_from(FORMATS))
def test_copy_page_copies_one_page_of_every_layer(source, target, kv_format):
    cache = filled(kv_format=kv_format)
    expected = [tensor.clone() for tensor in everything(cache)]
    for tensor in expected:
        tensor[target] = tensor[source]
    cache.copy_page(source, target)
    assert all(torch.equal(x, y) for x, y in zip(everything(cache), expected, strict=True))


@pytest.mark.parametrize(("source", "target"), [(0, 4), (-1, 0), (4, 4)])
def test_copy_page_refuses_pages_that_do_not_exist(source, target):
    cache = filled()
    before = [tensor.clone() for tensor in everything(cache)]
    with pytest.raises(ValueError, match="a page must be from 0 to 3"):
        cache.copy_page(source, target)
    assert all(torch.equal(x, y) for x, y in zip(everything(cache), before, strict=True))


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


def test_a_format_that_does_not_exist_or_fit_is_refused():
    with pytest.raises(UnsupportedError, match="fp16, bf16, fp32, fp8, fp8_e5m2, q8, q6, q4"):
        PagedKVCache(device="cpu", kv_format="q5", **SIZES)
    with pytest.raises(UnsupportedError, match=r"layer 2: .*'q6' needs a head size that is a multiple of 16, got 40"):
        PagedKVCache(device="cpu", kv_format="fp16,-1:q6", **(SIZES | {"head_dim": 40}))
    with pytest.raises(ValueError, match="there is no layer 3, the model has 3"):
        PagedKVCache(device="cpu", kv_format="fp16,3:q6", **SIZES)
    with pytest.raises(UnsupportedError, match="'q8' needs a head size that is a multiple of 16, got 40"):
        PagedKVCache(device="cpu", kv_format="k8v4", **(SIZES | {"head_dim": 40}))
