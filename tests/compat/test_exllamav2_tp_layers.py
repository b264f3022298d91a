"""The tensor-parallel layers of exllamav2_ext against whole layers in fp32, on spans whose tensors share one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qinfer.compat import exllamav2_ext as ext
from tests.compare import assert_close
from tests.compat.vectors import EVERYWHERE, NOTHING
from tests.strategies import random_tensor

C, F, HEAD_DIM, EPS = 96, 64, 16, 1e-5  # 6 query heads, 3 key-value heads
ID, RS = [(0, 0, 40), (1, 40, F)], [(0, 0, 32), (1, 32, C)]
KV, Q = [(0, 0, 1), (1, 1, 3)], [(0, 0, 2), (1, 2, 6)]
Cuts = list[tuple[int, int, int]]


def half(*shape: int, seed: int, where: str, scale: float = 1.0) -> Tensor:
    return (random_tensor(*shape, seed=seed) * scale).half().to(where)


def slices(rows: int, cuts: Cuts, dim: int, seed: int, where: str) -> tuple[list[int], Tensor]:
    """Handles of GPTQ matrices with `rows` input features, one per span, and what they are side by side, in fp32."""
    handles, parts = [], []
    for device, start, stop in cuts:
        columns = (stop - start) * dim
        generator = torch.Generator().manual_seed(seed + device)
        words, zeros = (
            torch.randint(-(2**31), 2**31, shape, generator=generator).int().to(where)
            for shape in ((rows // 8, columns), (rows // 32, columns // 8))
        )
        scales = half(rows // 32, columns, seed=seed + device, where=where, scale=0.02)
        nothing = [NOTHING] * 6
        handles.append(ext.make_q_matrix(words, *nothing, zeros, scales, NOTHING, NOTHING, NOTHING, 0))
        parts.append(torch.empty(rows, columns, dtype=torch.float16, device=where))
        ext.reconstruct(handles[-1], parts[-1])
    return handles, torch.cat(parts, dim=1).float()


def scratch(rows: int, widths: list[int], where: str) -> list[Tensor]:
    """One tensor of NaN per width, with more rows than the layer has."""
    return [torch.full((rows + 2, width), float("nan"), dtype=torch.float16, device=where) for width in widths]


def context() -> tuple[int, list[Tensor]]:
    buffers = [torch.zeros(16 * C, dtype=torch.float16) for _ in range(2)]
    return ext.make_tp_context(KV, ID, [(0, 0, 8)], RS, Q, buffers, [0, 0]), buffers


def normed(x: Tensor, w: Tensor) -> Tensor:
    return (x.float() * w.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)).half().float()


@EVERYWHERE
@pytest.mark.parametrize("act_gelu", [False, True])
def test_tp_mlp_forward_(where: str, act_gelu: bool) -> None:
    handle, buffers = context()
    x, w = half(3, C, seed=1, where=where), half(C, seed=2, where=where)
    gate, whole_gate = slices(C, ID, 1, 10, where)
    up, whole_up = slices(C, ID, 1, 20, where)
    down, whole_down = slices(F, RS, 1, 30, where)
    widths = [[C, C], [C, C], [F, F], [40, 24], [40, 24], [32, 64]]
    temps = [scratch(3, both, where) for both in widths]
    ext.tp_mlp_forward_(handle, x, *temps, [w, w], EPS, gate, up, down, act_gelu)
    n = normed(x, w)
    act = torch.nn.functional.gelu if act_gelu else torch.nn.functional.silu
    options = {"approximate": "tanh"} if act_gelu else {}
    m = (act((n @ whole_gate).half().float(), **options) * (n @ whole_up).half().float()).half().float()
    expected = (m @ whole_down).half() + x
    assert_close(buffers[0][: 3 * C].view(3, C), expected.cpu())
    # Again from the buffer, where it is on its way from layer to layer.
    buffers[0][: 3 * C].view(3, C).copy_(x)
    ext.tp_mlp_forward_(handle, buffers[0][: 3 * C].view(3, C), *temps, [w, w], EPS, gate, up, down, act_gelu)
    assert_close(buffers[0][: 3 * C].view(3, C), expected.cpu())
    with pytest.raises(RuntimeError, match="norms must hold one entry for each of 2 spans, got 1"):
        ext.tp_mlp_forward_(handle, x, *temps, [w], EPS, gate, up, down, act_gelu)
    with pytest.raises(RuntimeError, match="scratch must be contiguous with 6 rows or more"):
        ext.tp_mlp_forward_(handle, torch.cat([x, x]), *temps, [w, w], EPS, gate, up, down, act_gelu)


def attended(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention [T, H · D] of the last queries [T, H, D] to keys and values [L, G, D]."""
    tokens, heads, _ = q.shape
    k, v = (x.float().repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("thd,lhd->htl", q.float(), k) * scale
    seen = torch.ones(tokens, len(k), dtype=torch.bool, device=q.device).tril(len(k) - tokens)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("htl,lhd->thd", weights, v).flatten(1).half().float()


def layer(where: str, pages: int, page_size: int) -> dict[str, Any]:
    """What both attention functions take: two sequences of three new tokens behind 5 and 18."""
    parts = {name: slices(C, cuts, HEAD_DIM, seed, where) for name, cuts, seed in (
        ("q", Q, 40), ("k", KV, 50), ("v", KV, 60), ("o", Q, 70))}  # fmt: skip
    widths = [[C, C], [C, C], [C, C], [32, 64], [16, 32], [16, 32], [32, 64]]
    return {
        "x": half(6, C, seed=3, where=where),
        "w": half(C, seed=4, where=where),
        "temps": [scratch(6, both, where) for both in widths],
        "caches": [[half(pages, page_size, g, HEAD_DIM, seed=s + g, where=where) for g in (1, 2)] for s in (5, 8)],
        "handles": [parts[name][0] for name in "qkvo"],
        "whole": {name: parts[name][1] for name in "qkvo"},
        "tables": [[half(32, HEAD_DIM, seed=s, where=where)] * 2 for s in (11, 12)],
        "past": [torch.tensor([5, 18], dtype=torch.int32, device=where)] * 2,
    }  # fmt: skip


def expected(given: dict[str, Any], stored: list[Tensor], style: int, scale: float) -> tuple[Tensor, list[Tensor]]:
    """The layer's output, and the tokens [2, L, G, D] of keys and values that are stored afterwards.

    Args:
        given: of `layer`.
        stored: the same before, [2, L, G, D] in the order of the sequences.
        style: of the rotation.
        scale: of scores.
    """
    n = normed(given["x"], given["w"])
    q, k, v = ((n @ given["whole"][name]).half().view(2, 3, -1, HEAD_DIM) for name in "qkv")
    past = given["past"][0]
    if style:
        for heads in (q, k):
            ext.rope_(heads, *(t[0] for t in given["tables"]), 0, heads.shape[2], HEAD_DIM, past, style == 2)
    stored = [tokens.clone() for tokens in stored]
    rows = []
    for i, start in enumerate(past.tolist()):
        for tokens, new in zip(stored, (k, v), strict=True):
            tokens[i, start : start + 3] = new[i]
        rows.append(attended(q[i], *(tokens[i, : start + 3] for tokens in stored), scale))
    return (torch.cat(rows) @ given["whole"]["o"]).half() + given["x"], stored


@EVERYWHERE
@pytest.mark.parametrize("style", [0, 1, 2])
def test_tp_attn_forward_paged_(where: str, style: int) -> None:
    handle, buffers = context()
    given = layer(where, 5, 16)
    table = torch.tensor([[3, 0], [4, 1]], dtype=torch.int32, device=where)
    stored = [torch.cat(cache, dim=2)[table.long()].flatten(1, 2) for cache in given["caches"]]
    untouched = [cache[2].clone() for caches in given["caches"] for cache in caches]
    output, after = expected(given, stored, style, 0.3)

    def call(past: list[Tensor] | None = None, style: int = style, q_len: int = 3) -> None:
        ext.tp_attn_forward_paged_(
            handle, given["x"], *given["temps"], *given["caches"], [given["w"]] * 2, EPS, *given["handles"], HEAD_DIM,
            style, 2, q_len, *given["tables"], past or given["past"], [table] * 2, 0.3,
        )  # fmt: skip

    call()
    assert_close(buffers[0][: 6 * C].view(6, C), output.cpu())
    for cache, tokens in zip(given["caches"], after, strict=True):
        assert_close(torch.cat(cache, dim=2)[table.long()].flatten(1, 2), tokens)
    kept = [cache[2] for caches in given["caches"] for cache in caches]
    assert all(torch.equal(a, b) for a, b in zip(kept, untouched, strict=True))
    with pytest.raises(RuntimeError, match="rope_style must be 0, 1 or 2, got 3"):
        call(style=3)
    with pytest.raises(RuntimeError, match=r"hidden_states must be \[4, 96\], got \[6, 96\]"):
        call(q_len=2)
    with pytest.raises(RuntimeError, match="past_lens must hold one entry for each of 2 spans, got 1"):
        call(past=given["past"][:1])
    if where == "cpu":
        with pytest.raises(RuntimeError, match=r"past_lens must be in \[0, 29\] for 3 new tokens in 2 pages of 16"):
            call(past=[torch.tensor([5, 30], dtype=torch.int32)] * 2, style=0)


@EVERYWHERE
def test_tp_attn_forward_(where: str) -> None:
    handle, buffers = context()
    given = layer(where, 3, 32)
    stored = [torch.cat(cache, dim=2)[:2] for cache in given["caches"]]
    output, after = expected(given, stored, 2, 0.25)
    ext.tp_attn_forward_(
        handle, given["x"], *given["temps"], *given["caches"], [given["w"]] * 2, EPS, *given["handles"], HEAD_DIM,
        2, 2, 3, *given["tables"], given["past"], 0.25,
    )  # fmt: skip
    assert_close(buffers[0][: 6 * C].view(6, C), output.cpu())
    for cache, tokens in zip(given["caches"], after, strict=True):
        assert_close(torch.cat(cache, dim=2)[:2], tokens)
