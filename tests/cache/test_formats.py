"""KVFormat: names, sizes and the refusal of unknown names."""

from __future__ import annotations

import pytest
import torch

from qinfer.cache.formats import KV_FORMATS, kv_format, layer_formats, nbytes_per_token
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


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("q4", ["q4"] * 5),
        ("q4,0-1:q8,-1:fp16", ["q8", "q8", "q4", "q4", "fp16"]),
        ("fp8, -2--1:k8v4 , 4:q6", ["fp8", "fp8", "fp8", "k8v4", "q6"]),
        ("q4,0--1:q8", ["q8"] * 5),
        ("q4,-5:q8,3-3:bf16", ["q8", "q4", "q4", "bf16", "q4"]),
    ],
)
def test_layers_may_differ(text, names):
    assert [stored.name for stored in layer_formats(text, 5)] == names


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("q4,5:q8", ValueError, "there is no layer 5, the model has 5"),
        ("q4,-6-1:q8", ValueError, "there is no layer -6, the model has 5"),
        ("q4,3-1:q8", ValueError, "layers 3-1 of 5 are none"),
        ("q4,q8", ValueError, "3:q8 or 0-1:q8, got 'q8'"),
        ("q4,1:", ValueError, "3:q8 or 0-1:q8, got '1:'"),
        ("q4,", ValueError, "3:q8 or 0-1:q8, got ''"),
        ("0:q8", UnsupportedError, "KV cache format '0:q8' is not available"),
        ("q4,0-1:q5", UnsupportedError, "layers 0-1: KV cache format 'q5' is not available"),
    ],
)
def test_bad_layers_are_refused(text, error, message):
    with pytest.raises(error, match=message):
        layer_formats(text, 5)


def test_bytes_of_all_layers():
    assert nbytes_per_token(layer_formats("q4,0-1:fp16", 4), 8, 128) == 2 * 8 * 2 * (256 + 66)
    with pytest.raises(UnsupportedError, match=r"layer 1: .*'q8' needs a head size"):
        nbytes_per_token(layer_formats("fp8,1:k8v4", 4), 8, 40)
    with pytest.raises(UnsupportedError, match=r"^KV cache format 'q4' needs a head size"):
        nbytes_per_token(layer_formats("q4", 4), 8, 40)
