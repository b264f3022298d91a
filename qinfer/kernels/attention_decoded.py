"""Prompts over coded pages: what they see is decoded once for a step, so that the kernel for plain pages takes them.

The kernel for prompts on Hopper (`attention_wgmma.py`) reads a key for every 128 rows of queries and wants plain
numbers. Decoding what prompts see takes a twentieth of its time (`kv_decode.py`); decoding inside attention takes more
than its time again. Streams see as many keys for one query each and read the codes, and so do prompts that see more
than there is room for.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from qinfer.kernels.attention_blocks import Places, Wanted
from qinfer.kernels.attention_wgmma import is_prompt
from qinfer.kernels.kv_codec import KVPages
from qinfer.kernels.kv_decode import kv_decode

MIN_TOKENS = 256  # of a step of several sequences; fewer may be drafts, which see much for few queries
MAX_BYTES = 256 << 20  # of decoded keys and values; layers take turns with them


class Decoded(NamedTuple):
    """What the prompts of a step see."""

    keys: KVPages  # [P, G, S, D] plain
    values: KVPages
    page_table: Tensor  # [B, W] int32 where they are
    roles: Tensor  # [B + 1] int32 of `kv_decode`
    may_be_full: bool  # whether there may be prompts that are left over


def decode_prompts(q: Tensor, k_pages: KVPages, v_pages: KVPages, places: Places, wanted: Wanted) -> Decoded | None:
    """Decode the keys and values that the prompts of a step see, or nothing if that is not worth it or not possible."""
    (num_pages, num_kv_heads, page_size), (num_seqs, width) = k_pages.codes.shape[:3], places.page_table.shape
    num_tokens, _, head_dim = q.shape
    if "plain" in (k_pages.codec.scheme, v_pages.codec.scheme) or not is_prompt(q, num_kv_heads, page_size, wanted):
        return None
    room = MAX_BYTES // (2 * num_kv_heads * page_size * head_dim * q.element_size())
    max_pages = min(room, num_pages, num_seqs * width)
    if max_pages == 0 or (num_seqs > 1 and num_tokens < MIN_TOKENS):
        return None
    seen = kv_decode.launch(
        *places, k_pages, v_pages,
        dtype=q.dtype, max_pages=max_pages, window=wanted.window, min_queries=wanted.few + 1,
    )  # fmt: skip
    numbers = (KVPages.plain(seen.keys), KVPages.plain(seen.values))
    return Decoded(*numbers, seen.page_table, seen.roles, max_pages < num_seqs * width)
