"""Other people's attention over the same keys and values; each is checked against torch's mathematics in fp32."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qinfer.bench.contender import Contender, Function, Peer, more

WORKSPACE_BYTES = 256 << 20


class Step(Protocol):
    """Sequences of one length with as many new tokens each, and the sizes of their heads."""

    batch: int
    context: int
    queries: int
    heads: int
    kv_heads: int
    head_dim: int


def dense(step: Step, pages: Tensor, table: Tensor) -> Tensor:
    """Return [B, G, context, D], the rows of pages [P, G, S, D] in the order of the sequences."""
    rows = pages[table.long()].transpose(1, 2).flatten(2, 3)
    return rows[:, :, : step.context].contiguous()


def expected(step: Step, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Compute [T, H * D] in fp32, one sequence at a time; the last query sees all keys, each before it one less."""
    group = step.heads // step.kv_heads
    own = torch.arange(step.context - step.queries, step.context, device=q.device)[:, None]
    hidden = torch.arange(step.context, device=q.device) > own
    out = []
    for sequence, k, v in zip(
        q.float().view(step.batch, step.queries, step.heads, step.head_dim), keys.float(), values.float(), strict=True
    ):
        scores = sequence.transpose(0, 1) @ k.repeat_interleave(group, 0).transpose(1, 2) * step.head_dim**-0.5
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
        out.append((weights @ v.repeat_interleave(group, 0)).transpose(0, 1).flatten(1))
    return torch.cat(out)


def _contender(
    name: str, step: Step, parts: tuple[Tensor, Tensor], table: Tensor, make: Callable[[Tensor, Tensor], Function]
) -> Contender:
    """Put copies of keys and values together; `make` gives the function of queries [T, H, D] for one of them."""
    keys, values = (dense(step, part, table) for part in parts)
    nbytes = keys.nbytes + values.nbytes
    pools = [parts, *more(lambda: (parts[0].clone(), parts[1].clone()), nbytes)]
    functions = [make(*pool) for pool in pools]
    return Contender(name, functions, lambda q: expected(step, q, keys, values), nbytes, parts[0].dtype)


def sdpa(step: Step, k_pages: Tensor, v_pages: Tensor, table: Tensor) -> Contender:
    """Torch's scaled_dot_product_attention, which has no pages: it gets its keys in one piece."""

    def make(k_pool: Tensor, v_pool: Tensor) -> Function:
        keys, values = dense(step, k_pool, table), dense(step, v_pool, table)
        is_whole = step.queries == step.context
        mask: Any = None
        if 1 < step.queries < step.context:
            # The import brings the compiler along, which takes seconds.
            mask = importlib.import_module("torch.nn.attention.bias").causal_lower_right(step.queries, step.context)

        def function(q: Tensor) -> Tensor:
            heads = q.view(step.batch, step.queries, step.heads, step.head_dim).transpose(1, 2)
            causal = is_whole and step.queries > 1
            y = scaled_dot_product_attention(heads, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=True)
            return y.transpose(1, 2).reshape(len(q), -1)

        return function

    return _contender("torch SDPA", step, (k_pages, v_pages), table, make)


def flex(step: Step, k_pages: Tensor, v_pages: Tensor, table: Tensor) -> Contender:
    """Torch's FlexAttention, compiled for the step, on keys in one piece."""
    library = importlib.import_module("torch.nn.attention.flex_attention")
    attend: Callable[..., Tensor] = torch.compile(library.flex_attention, dynamic=False)
    shift = step.context - step.queries

    def is_seen(b: Tensor, h: Tensor, i_query: Tensor, i_key: Tensor) -> Tensor:
        return i_key <= i_query + shift

    mask = library.create_block_mask(is_seen, None, None, step.queries, step.context, device=table.device)

    def make(k_pool: Tensor, v_pool: Tensor) -> Function:
        keys, values = dense(step, k_pool, table), dense(step, v_pool, table)

        def function(q: Tensor) -> Tensor:
            heads = q.view(step.batch, step.queries, step.heads, step.head_dim).transpose(1, 2)
            y = attend(heads, keys, values, block_mask=mask, enable_gqa=True)
            return y.transpose(1, 2).reshape(len(q), -1)

        return function

    return _contender("torch Flex", step, (k_pages, v_pages), table, make)


def flashinfer(step: Step, k_pages: Tensor, v_pages: Tensor, table: Tensor) -> Contender:
    """FlashInfer on the same pages: its decode kernel for one new token, its prefill kernel for more."""
    library = importlib.import_module("flashinfer")
    device, width, page_size = table.device, table.shape[1], k_pages.shape[2]
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    starts = torch.arange(step.batch + 1, dtype=torch.int32, device=device)
    last = torch.full((step.batch,), (step.context - 1) % page_size + 1, dtype=torch.int32, device=device)
    pages, sizes = (starts * width, table.flatten(), last), (step.heads, step.kv_heads, step.head_dim, page_size)
    if step.queries == 1:
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(*pages, *sizes, q_data_type=k_pages.dtype, kv_data_type=k_pages.dtype)
    else:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        keywords = {"causal": True, "q_data_type": k_pages.dtype, "kv_data_type": k_pages.dtype}
        wrapper.plan(starts * step.queries, *pages, *sizes, **keywords)

    def make(k_pool: Tensor, v_pool: Tensor) -> Function:
        def function(q: Tensor) -> Tensor:
            y: Tensor = wrapper.run(q, (k_pool, v_pool))
            return y.flatten(1)

        return function

    return _contender("flashinfer", step, (k_pages, v_pages), table, make)


ATTENTION_PEERS = (
    Peer("torch SDPA", None, sdpa),
    Peer("torch Flex", None, flex),
    Peer("flashinfer", "flashinfer", flashinfer),
)
