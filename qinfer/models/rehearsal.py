"""A decoder of few blocks that launches every kernel that the whole one launches: to compile them in little time.

What a block launches depends on what it is made of, and, in its first norm, on the block before, whose result it adds.
So each kind of block is there behind each kind that it stands behind, the first block in front and the last one at the
end, where the final norm adds its result. A block's layer of the cache, which may be stored in a format of its own, is
part of what it is made of.

What kernels compute once and keep, the inverse of an order, is computed for all blocks.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from qinfer.cache.paged import PagedKVCache
from qinfer.kernels.gather import inverse
from qinfer.kernels.kv_codec import KVPages
from qinfer.models.decoder import Block, Decoder
from qinfer.models.layers import Attention

_PLACE = "layer"  # says which layer of the cache is a block's, not what that is
_ALIGNMENT = 16  # bytes: beyond them no kernel is compiled for where a tensor is


def rehearsal(decoder: Decoder, cache: PagedKVCache) -> Decoder:
    """Return a decoder of some of the same blocks, on every rank of the same ones, to run over the same cache."""
    for order in _orders(decoder):
        inverse(order)
    kinds = [_kind((block, _pages(block, cache))) for block in decoder.blocks]
    needed = torch.zeros(1, len(kinds), dtype=torch.int32)
    needed[0, _representatives(kinds)] = 1
    # Ranks exchange sums behind every block, so what one of them needs all of them run.
    everyone = decoder.comm.all_gather(needed.to(decoder.norm.weight.device), 0)
    return replace(decoder, blocks=tuple(decoder.blocks[i] for i in everyone.amax(0).nonzero().flatten().tolist()))


def _orders(part: object) -> Iterator[Tensor]:
    """Yield the orders in which the layers of a model take their inputs, some of them more than once."""
    if is_dataclass(part):
        for field in fields(part):
            value = getattr(part, field.name)
            if field.name == "order" and isinstance(value, Tensor):
                yield value
            else:
                yield from _orders(value)
    elif isinstance(part, tuple | list):
        for one in part:
            yield from _orders(one)


def _pages(block: Block, cache: PagedKVCache) -> tuple[KVPages, KVPages] | None:
    """Return the pages of a block's layer; a rank without heads has none."""
    return cache.pages(block.attention.layer) if isinstance(block.attention, Attention) else None


def _representatives(kinds: list[Hashable]) -> list[int]:
    """Return numbers of blocks, in order, such that every pair of kinds that follow each other does so among them."""
    chosen, seen = {0, len(kinds) - 1} if kinds else set[int](), set[tuple[Hashable, Hashable]]()
    for number, pair in enumerate(pairwise(kinds), 1):
        if pair not in seen:
            seen.add(pair)
            chosen |= {number - 1, number}
    return sorted(chosen)


def _kind(part: object) -> Hashable:
    """Return what two parts of a model have in common if they launch the same kernels."""
    if isinstance(part, Tensor):
        return tuple(part.shape), part.stride(), part.dtype, part.data_ptr() % _ALIGNMENT
    if is_dataclass(part):
        values = ((field.name, getattr(part, field.name)) for field in fields(part) if field.name != _PLACE)
        return type(part), tuple((name, _kind(value)) for name, value in values)
    if isinstance(part, tuple | list):
        return type(part), tuple(map(_kind, part))
    if part is None or isinstance(part, bool | int | float | str | torch.dtype):
        return part
    # Something else is of its own kind, and shared by all blocks if it is one thing, like the ranks.
    return id(part)
