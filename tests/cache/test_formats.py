"""KVFormat: names, sizes and the refusal of unknown names."""

from __future__ import annotations

import pytest
import torch

from qinfer.cache.formats import KV_FORMATS, kv_format
from qinfer.errors import UnsupportedError


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_a_format_stores_its_dtype(name, dtype):
    assert kv_format(name).name == name
    assert kv_format(name).keys.dtype == kv_format(name).values.dtype == dtype


@pytest.mark.parametrize(
    ("name", "nbytes"),
    # Llama-3.1-8B, one layer: 8 heads, twice 128 numbers; a scale is two bytes.
    [
        ("fp16", 8 * 2 * 256),
        ("fp8", 8 * 2 * 130),
        ("fp8_e5m2", 8 * 2 * 128),
        ("q8", 8 * 2 * 130),
        ("q6", 8 * 2 * 98),
        ("q4", 8 * 2 * 66),
        ("k8v4", 8 * (130 + 66)),
    ],
)
def test_sizes_by_hand(name, nbytes):
    assert kv_format(name).nbytes_per_token(8, 128) == nbytes


@pytest.mark.parametrize(
    ("name", "keys", "values"),
    [("q4", "q4", "q4"), ("k8v4", "q8", "q4"), ("kq8vq4", "q8", "q4"), ("kfp16vfp8_e5m2", "fp16", "fp8_e5m2")],
)
def test_a_name_may_be_a_pair(name, keys, values):
    found = kv_format(name)
    assert (found.name, found.keys.name, found.values.name) == (name, keys, values)


@pytest.mark.parametrize("name", ["q5", "k8", "v4", "k8v5", "kv", "k8v4v4", "FP16", ""])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(UnsupportedError) as refusal:
        kv_format(name)
    assert str(refusal.value).endswith("pairs such as k8v4 and these are: " + ", ".join(KV_FORMATS))
