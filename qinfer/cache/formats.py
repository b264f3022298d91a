"""The formats in which keys and values are stored: one row per format, found by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qinfer.errors import UnsupportedError


@dataclass(frozen=True)
class KVFormat:
    """How one key or value, a row of D numbers, lies in a page."""

    name: str
    storage_dtype: torch.dtype  # of the page tensors

    def nbytes_per_row(self, head_dim: int) -> int:
        """Return the bytes of one key, or of one value, of one head."""
        return head_dim * self.storage_dtype.itemsize

    def nbytes_per_token(self, num_kv_heads: int, head_dim: int) -> int:
        """Return the bytes that one token takes in one layer, its keys and its values together."""
        return 2 * num_kv_heads * self.nbytes_per_row(head_dim)


KV_FORMATS: dict[str, KVFormat] = {
    kv_format.name: kv_format
    for kv_format in (
        KVFormat("fp16", torch.float16),
        KVFormat("bf16", torch.bfloat16),
        KVFormat("fp32", torch.float32),
    )
}


def kv_format(name: str) -> KVFormat:
    """Return the format of this name.

    Raises:
        UnsupportedError: There is none; the message lists those there are.
    """
    if name not in KV_FORMATS:
        raise UnsupportedError(f"KV cache format {name!r} is not available; these are: {', '.join(KV_FORMATS)}")
    return KV_FORMATS[name]
