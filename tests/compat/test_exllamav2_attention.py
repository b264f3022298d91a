"""exllamav2_ext: attention layers, against their formulas in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from qinfer.compat import exllamav2_ext as ext_c
from tests.compare import assert_close
from tests.compat.linears import EPS, HALF, HIDDEN, KINDS, LORAS, NO_ADAPTERS, Linear, half, linear, norm
from tests.compat.vectors import EVERYWHERE, NOTHING

HEADS, KV_HEADS = 4, 2


@dataclass(frozen=True)
class Attention:
    """An attention layer, whatever it is made of."""

    handle: int
    hidden: int
    parts: list[Linear]
    given: dict[str, Any]

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.hidden // HEADS


def attention(kind: str, where: str = "cpu", **changes: Any) -> Attention:
    """Make an attention layer with every option that `changes` does not turn off."""
    hidden, head_dim = HIDDEN[kind], HIDDEN[kind] // HEADS
    widths = (hidden, KV_HEADS * head_dim, KV_HEADS * head_dim, hidden)
    parts = [linear(kind, 100 * (i + 1), width, where, adapted=i != 1) for i, width in enumerate(widths)]
    given: dict[str, Any] = {
        "layernorm": half(hidden, seed=1, where=where),
        "layernorm_bias": NOTHING,
        "layernorm_is_rms": True,
        "headnorm_is_rms": True,
        "norm_epsilon": EPS,
        "q_proj": parts[0].handle,
        "k_proj": parts[1].handle,
        "v_proj": parts[2].handle,
        "o_proj": parts[3].handle,
        "temp_state": NOTHING,
        "temp_dq": None,
        "max_rows": 8,
        "hidden_size": hidden,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": head_dim,
        "max_seq_len": 32,
        "has_residual": True,
        "rope_style": 2,
        "sincos_size": head_dim // 2,
        "q_norm": half(HEADS, head_dim, seed=2, where=where),
        "k_norm": half(KV_HEADS, head_dim, seed=3, where=where),
        "post_layernorm": NOTHING,
        "post_layernorm_bias": NOTHING,
        "residual_fp32": False,
        "use_graphs": True,
    }
    assert set(changes) <= set(given)
    given |= changes
    return Attention(ext_c.make_q_attn(*given.values()), hidden, parts, given)


def adapt(layer: Attention) -> int:
    """Give the projections their adapters, of which k has none."""
    pairs = [pair for part in layer.parts for pair in (part.a, part.b)]
    return ext_c.q_attn_set_loras(layer.handle, *pairs)


def rotated(x: Tensor, sin: Tensor, cos: Tensor, positions: Tensor, style: int) -> Tensor:
    """Rotate x [M, heads, D] as rope_style says; tables [L, R]."""
    width = sin.shape[-1]
    s, c = (table.float()[positions][:, None] for table in (sin, cos))
    head, rest = x[..., :width], x[..., width:]
    if style == 2:
        first, second = head.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        turned = torch.stack([-head[..., 1::2], head[..., ::2]], -1).flatten(-2)
    return torch.cat([head * c + turned * s, rest], -1)


def tables(width: int, style: int, where: str = "cpu", length: int = 32) -> tuple[Tensor, Tensor]:
    """The tables of sines and cosines [1, 1, L, R] that exllamav2's Python code makes."""
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.cat([angles, angles], -1) if style == 2 else angles.repeat_interleave(2, -1)
    return angles.sin().half()[None, None].to(where), angles.cos().half()[None, None].to(where)


def forward_1(layer: Attention, x: Tensor, past_len: int, past_lens: Tensor | None, **changes: Any) -> list[Tensor]:
    """Call q_attn_forward_1 for 2 sequences of 3 tokens and return q, k and v."""
    width, where = layer.given["sincos_size"], str(x.device)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    out = [torch.full((2, 3, n, layer.head_dim), float("nan"), dtype=HALF, device=where) for n in heads]
    sin, cos = tables(width, layer.given["rope_style"], where)
    given = {"q": out[0], "k": out[1], "v": out[2], "sin": sin, "cos": cos, "loras": [], "temp": NOTHING} | changes
    ext_c.q_attn_forward_1(layer.handle, x, 2, 3, past_len, past_lens, *given.values())
    return out


@EVERYWHERE
@KINDS
@LORAS
@pytest.mark.parametrize("style", [0, 1, 2])
def test_q_attn_forward_1(kind: str, loras: tuple[int, ...], style: int, where: str) -> None:
    # Each style with other options, so that all options meet all matrices.
    is_rms, fp32 = style != 1, style == 0
    biased = {"layernorm_bias": half(HIDDEN[kind], seed=4, where=where)} if not is_rms else {}
    norms = {"q_norm": NOTHING, "k_norm": NOTHING} if style == 0 else {}
    layer = attention(
        kind,
        where,
        rope_style=style,
        layernorm_is_rms=is_rms,
        headnorm_is_rms=is_rms,
        residual_fp32=fp32,
        **biased,
        **norms,
    )
    adapt(layer)
    x = half(2, 3, layer.hidden, seed=5, where=where).to(torch.float32 if fp32 else HALF)
    kept = x.clone()
    past_lens = torch.tensor([9, -2], dtype=torch.int32, device=where)
    actual = forward_1(layer, x, 3, past_lens, loras=list(loras))
    assert torch.equal(x, kept)
    positions = torch.tensor([12, 13, 14, 1, 2, 3], device=where)
    n = norm(x.float(), layer.given["layernorm"], biased.get("layernorm_bias"), is_rms=is_rms).view(6, -1)
    sin, cos = (table[0, 0] for table in tables(layer.given["sincos_size"], style, where))
    for i, name in enumerate(("q_norm", "k_norm", None)):
        expected = layer.parts[i](n, loras).view(6, -1, layer.head_dim)
        if name and style != 0:
            expected = norm(expected, layer.given[name], None, is_rms=is_rms)
            expected = rotated(expected, sin, cos, positions, style)
        assert_close(actual[i].view(expected.shape).float(), expected, HALF)


@pytest.mark.parametrize(
    ("past_len", "past_lens", "expected"),
    [
        (5, None, [5, 6, 7, 5, 6, 7]),
        (5, [0, 2], [5, 6, 7, 7, 8, 9]),
        (0, [0, -2], [0, 1, 2, 0, 0, 0]),
        (-1, [4, -2], [4, 5, 6, 0, 1, 2]),
    ],
)
def test_positions(past_len: int, past_lens: list[int] | None, expected: list[int]) -> None:
    layer = attention("dense", q_norm=None, k_norm=None)
    lens = NOTHING if past_lens is None else torch.tensor(past_lens, dtype=torch.int32)
    x = half(2, 3, 64, seed=5)
    actual = forward_1(layer, x, past_len, lens)[0].view(6, HEADS, -1)
    n = norm(x.float(), layer.given["layernorm"], None, is_rms=True).view(6, -1)
    sin, cos = (table[0, 0] for table in tables(8, 2))
    q = layer.parts[0](n).view(6, HEADS, -1)
    assert_close(actual.float(), rotated(q, sin, cos, torch.tensor(expected), 2), HALF)


def test_an_overflowed_row_counts_as_the_largest_number() -> None:
    x = half(2, 3, 64, seed=5)
    x[0, 1, 7] = float("inf")
    finite = x.clamp(-65504, 65504)
    layer = attention("dense")
    for actual, expected in zip(forward_1(layer, x, 0, None), forward_1(layer, finite, 0, None), strict=True):
        assert actual.isfinite().all()
        assert torch.equal(actual, expected)


def test_no_tokens() -> None:
    layer, (sin, cos) = attention("dense"), tables(8, 2)
    x, q, k, v = (torch.zeros(2, 0, n, dtype=HALF) for n in (64, 64, 32, 32))
    ext_c.q_attn_forward_1(layer.handle, x, 2, 0, 5, None, q, k, v, sin, cos, [], None)
    ext_c.q_attn_forward_2(layer.handle, x, q, 2, 0, [], None)


@EVERYWHERE
@KINDS
@LORAS
@pytest.mark.parametrize("post", ["none", "rms", "layer"])
@pytest.mark.parametrize("has_residual", [True, False])
def test_q_attn_forward_2(kind: str, loras: tuple[int, ...], post: str, has_residual: bool, where: str) -> None:
    hidden, fp32 = HIDDEN[kind], has_residual and post != "none"
    weight = {} if post == "none" else {"post_layernorm": half(hidden, seed=6, where=where)}
    bias = {"post_layernorm_bias": half(hidden, seed=7, where=where)} if post == "layer" else {}
    is_rms = post != "layer"
    options = {**weight, **bias, "layernorm_is_rms": is_rms, "has_residual": has_residual, "residual_fp32": fp32}
    layer = attention(kind, where, **options)
    adapt(layer)
    dtype = torch.float32 if fp32 else HALF
    x = half(2, 3, hidden, seed=8, where=where).to(dtype)
    attn = half(2, 3, HEADS, layer.head_dim, seed=9, where=where)
    expected = layer.parts[3](attn.float().view(2, 3, -1), loras)
    if weight:
        expected = norm(expected, weight["post_layernorm"], bias.get("post_layernorm_bias"), is_rms=is_rms)
    if has_residual:
        expected = x.float() + expected
    temp = torch.empty(6 * 4, dtype=HALF, device=where)
    ext_c.q_attn_forward_2(layer.handle, x, attn, 2, 3, list(loras), temp)
    # The expectation knows packed weights rounded to fp16, and a GPU's products are those of fp16 numbers.
    assert_close(x.float(), expected, dtype if kind == "dense" and where == "cpu" else HALF)


def test_q_attn_set_loras() -> None:
    layer = attention("dense")
    q, *_, o = layer.parts
    assert adapt(layer) == 4
    with_adapters = forward_1(layer, half(2, 3, 64, seed=5), 0, None, loras=[7])
    for bad, message in (
        ([q.a, NO_ADAPTERS, *[NO_ADAPTERS] * 6], "A and B of the same adapters"),
        ([q.a, {7: q.b[7], 8: q.b[7]}, *[NO_ADAPTERS] * 6], r"B of q_q_proj in adapter 8 must be \[2, 64\]"),
        (
            [NO_ADAPTERS] * 6 + [{7: o.a[7].t().contiguous()}, {7: o.b[7]}],
            r"A of q_o_proj in adapter 7 must be \[64, rank\]",
        ),
        ([{7: q.a[7].float()}, {7: q.b[7]}, *[NO_ADAPTERS] * 6], "must be float16"),
        ([{7: q.a[7].to("meta")}, {7: q.b[7]}, *[NO_ADAPTERS] * 6], "must be on cpu"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ext_c.q_attn_set_loras(layer.handle, *bad)
    again = forward_1(layer, half(2, 3, 64, seed=5), 0, None, loras=[7])
    assert torch.equal(again[0], with_adapters[0])
    assert ext_c.q_attn_set_loras(layer.handle, {8: q.a[8]}, {8: q.b[8]}, *[NO_ADAPTERS] * 6) == 2
    assert ext_c.q_attn_set_loras(layer.handle, *[NO_ADAPTERS] * 8) == 0
    assert not torch.equal(forward_1(layer, half(2, 3, 64, seed=5), 0, None, loras=[7])[0], with_adapters[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layernorm": torch.zeros(63, dtype=HALF)}, r"layernorm must be \[64\]"),
        ({"layernorm": torch.zeros(64)}, "layernorm must be float16"),
        ({"layernorm_bias": torch.zeros(64, dtype=HALF)}, "layernorm_bias must be nothing for an RMS norm"),
        ({"layernorm": None, "layernorm_bias": torch.zeros(64, dtype=HALF)}, "got it alone"),
        ({"post_layernorm": torch.zeros(8, dtype=HALF)}, r"post_layernorm must be \[64\]"),
        ({"q_norm": torch.zeros(16, dtype=HALF)}, r"q_norm must be \[4, 16\]"),
        ({"k_norm": torch.zeros(4, 16, dtype=HALF)}, r"k_norm must be \[2, 16\]"),
        ({"o_proj": 0}, "handle 0 is no q_matrix"),
        ({"hidden_size": 32}, r"q_q_proj must be a matrix \[32, 64\], got \[64, 64\]"),
        ({"num_kv_heads": 4}, r"q_k_proj must be a matrix \[64, 64\], got \[64, 32\]"),
        ({"temp_dq": torch.zeros(8)}, "temp_dq must be float16"),
        ({"rope_style": 3}, "rope_style must be 0"),
        ({"sincos_size": 7}, "sincos_size must be even"),
        ({"sincos_size": 18}, "to head_dim = 16, got 18"),
    ],
)
def test_make_q_attn(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        attention("dense", **changes)


def test_attention_refuses() -> None:
    layer, x, lens = attention("dense"), half(2, 3, 64, seed=5), torch.tensor([0, 30], dtype=torch.int32)
    short, long = tables(8, 2, length=5), torch.zeros(9, 64, dtype=HALF)
    adapt(layer)
    for rows, past_len, past_lens, changes, message in (
        (x.float(), 0, None, {}, "x must be float16"),
        (x[..., :32], 0, None, {}, r"x must be \[\.\.\., \.\.\., 64\]"),
        (x[:1], 0, None, {}, "batch_size . q_len = 6 rows, got 3"),
        (long, 0, None, {}, "at most max_rows = 8 rows, got 9"),
        (x.transpose(0, 1), 0, None, {}, "x must be contiguous"),
        (x, -1, None, {}, "past_len must be at least 0 without past_lens"),
        (x, -2, lens, {}, "past_len must be at least 0, or -1"),
        (x, 0, lens.long(), {}, "past_lens must be int32"),
        (x, 0, lens[:1], {}, r"past_lens must be \[2\]"),
        (x, 0, lens, {}, "sin must reach position 32, got 32 positions"),
        (x, 3, None, {"sin": short[0], "cos": short[1]}, "sin must reach position 5, got 5 positions"),
        (x, 0, None, {"cos": NOTHING}, "sin and cos must be given for rope_style 2"),
        (x, 0, None, {"sin": short[0].float()}, "sin must be float16"),
        (x, 0, None, {"k": x}, "k_temp must be contiguous and hold 6 rows of 32"),
        (x, 0, None, {"v": torch.zeros(6, 32)}, "v_temp must be float16"),
        (x, 0, None, {"loras": [7, 8], "temp": torch.zeros(23, dtype=HALF)}, "must hold 24 fp16 numbers, got 23"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward_1(layer, rows, past_len, past_lens, **changes)
    with pytest.raises(RuntimeError, match="attn_output must be contiguous and hold 6 rows of 64"):
        ext_c.q_attn_forward_2(layer.handle, x, x[:1], 2, 3, [], None)


def test_free_q_attn() -> None:
    linear.cache_clear()
    layer = attention("dense")
    for part in layer.parts:
        ext_c.free_q_matrix(part.handle)
    assert forward_1(layer, half(2, 3, 64, seed=5), 0, None)[0].isfinite().all()
    ext_c.free_q_attn(layer.handle)
    for use in (lambda: ext_c.free_q_attn(layer.handle), lambda: forward_1(layer, half(2, 3, 64, seed=5), 0, None)):
        with pytest.raises(RuntimeError, match=f"handle {layer.handle} is no q_attn"):
            use()
    linear.cache_clear()


def test_set_flash_attn_func() -> None:
    assert ext_c.set_flash_attn_func() is None
