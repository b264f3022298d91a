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
    assert kv_format(name).storage_dtype == dtype


def test_sizes_by_hand():
    # Llama-3.1-8B: 2 x 8 heads x 128 x 2 bytes = 4 KiB per token and layer.
    assert kv_format("fp16").nbytes_per_token(8, 128) == 4096
    assert kv_format("fp32").nbytes_per_row(80) == 320


@pytest.mark.parametrize("name", ["q8", "q6", "q4", "fp8", "FP16", ""])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(UnsupportedError) as refusal:
        kv_format(name)
    assert str(refusal.value).endswith("these are: " + ", ".join(KV_FORMATS))
