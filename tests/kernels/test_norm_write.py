"""rope_write: the sum of parts, the norm of every head, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qinfer.kernels.kv_codec import CODECS
from qinfer.kernels.kv_write import rope_write
from qinfer.kernels.parts import add_up
from tests.compare import assert_close
from tests.kernels.coded import loss, poisoned
from tests.strategies import random_tensor

BODIES = [rope_write.reference, pytest.param(rope_write.launch, marks=pytest.mark.kernel)]
EPS = 1e-3  # large enough to show in rows of small numbers
# A key is rounded to its dtype before it is encoded, which adds a little to half a step.
SLACK = 1.2


def written_out(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """The norm, then the rotation of the first features in float64: x [T, H, D], cos and sin [T, R/2]."""
    x = x.double()
    x = x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight.double()
    half, result = cos.shape[1], x.clone()
    for i in range(half):
        one, two = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        c, s = (table[:, i, None].double() for table in (cos, sin))
        result[..., one] = x[..., one] * c - x[..., two] * s
        result[..., two] = x[..., two] * c + x[..., one] * s
    return result


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("names", "dtype", "head_dim", "half", "heads"),
    [
        (("fp16", "fp16"), torch.float16, 32, 16, (4, 2)),
        (("fp32", "fp8"), torch.float32, 80, 20, (9, 3)),
        (("q8", "q4"), torch.float16, 64, 32, (2, 1)),
        (("q4", "bf16"), torch.bfloat16, 96, 48, (3, 1)),
    ],
)
def test_norm_then_turn_then_write(body, names, dtype, head_dim, half, heads, interleaved, device):
    num_heads, num_kv_heads = heads
    merged = random_tensor(3, num_heads + 2 * num_kv_heads, head_dim, seed=1, dtype=dtype)
    merged[0, 0] = 0.0
    merged[1, 1] *= 0.01
    merged[2, num_heads] *= 300
    weights = [1 + random_tensor(head_dim, seed=seed, dtype=dtype) / 2 for seed in (2, 3)]
    angles = torch.outer(torch.arange(40.0), 100.0 ** (-torch.arange(half) / half))
    positions, slots = (torch.tensor(x, dtype=torch.int32) for x in ([39, 0, 7], [17, -1, 2]))
    parts = [num_heads, num_kv_heads, num_kv_heads]
    before = merged.split(parts, 1)
    tables = angles.cos()[positions.long()], angles.sin()[positions.long()]
    q, k = (written_out(before[i], weights[i], *tables, interleaved=interleaved) for i in range(2))
    pages = [poisoned(CODECS[name], 2, num_kv_heads, 16, head_dim, device) for name in names]
    product = merged.flatten(1).to(device)
    turned = body(
        product,
        angles.cos().to(device),
        angles.sin().to(device),
        positions.to(device),
        *pages,
        slots.to(device),
        interleaved=interleaved,
        q_weight=weights[0].to(device),
        k_weight=weights[1].to(device),
        eps=EPS,
    )
    assert turned.dtype == dtype
    assert_close(turned, q.to(dtype).to(device))
    assert torch.equal(product.cpu(), merged.flatten(1))
    index = (torch.tensor([1, 0]), slice(None), torch.tensor([1, 2]))
    for x, side in zip((k[[0, 2]], before[2][[0, 2]]), pages, strict=True):
        scales = None if side.scales is None else side.scales.cpu()[index]
        decoded = side.decode().cpu()[index]
        if side.codec.scheme == "plain":
            assert_close(decoded, x.float(), dtype=dtype)
        else:
            assert loss(x.float(), decoded, scales, side.codec) <= SLACK
        # The skipped row left nothing: all but two tokens of each head are as they were.
        empty = poisoned(CODECS[side.codec.name], 2, num_kv_heads, 16, head_dim, "cpu")
        empty.codes[index] = side.codes.cpu()[index]
        torch.testing.assert_close(side.codes.cpu(), empty.codes, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(
    ("names", "num_parts", "heads"),
    [(("fp32", "fp16"), 3, (5, 2)), (("q4", "q8"), 2, (3, 1)), (("fp8", "q6"), 1, (1, 3))],
)
def test_takes_a_product_in_parts(body, names, num_parts, heads, has_norm, device):
    head_dim, (num_heads, num_kv_heads) = 32, heads
    parts = random_tensor(num_parts, 2, (num_heads + 2 * num_kv_heads) * head_dim, seed=4).to(device)
    angles = torch.outer(torch.arange(9.0), 10.0 ** (-torch.arange(12) / 12)).to(device)
    positions, slots = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([8, 3], [5, 18]))
    weights = (
        {f"{side}_weight": 1 + random_tensor(head_dim, seed=5).to(device) / 2 for side in "qk"} if has_norm else {}
    )
    pages = [[poisoned(CODECS[name], 2, num_kv_heads, 16, head_dim, device) for name in names] for _ in range(2)]
    # Columns beside the product are not its own.
    wide = torch.full((num_parts, 2, parts.shape[2] + 7), float("nan"), device=device)
    wide[..., : parts.shape[2]] = parts
    options = {"interleaved": False, "out_dtype": torch.float16, "eps": EPS, **weights}
    tables = angles.cos(), angles.sin(), positions
    turned = body(wide[..., : parts.shape[2]], *tables, *pages[0], slots, **options)
    assert turned.dtype == torch.float16
    assert turned.shape == (2, num_heads, head_dim)
    assert torch.equal(turned, body(add_up(parts), *tables, *pages[1], slots, **options))
    for one, other in zip(*pages, strict=True):
        for a, b in zip(one.tensors(), other.tensors(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert one.decode()[[0, 1], :, [5, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("width", "message"),
    [(65, r"columns for these pages, got 65"), (32, r"qkv must have \(H \+ 2 · 1\) · 16 columns"), (0, "columns")],
)
def test_refuses_a_product_that_is_not_heads(width, message):
    table, index = torch.ones(9, 8), torch.tensor([0, 1], dtype=torch.int32)
    pages = [poisoned(CODECS["fp32"], 1, 1, 16, 16, "cpu") for _ in "kv"]
    with pytest.raises(ValueError, match=message):
        rope_write(torch.zeros(2, width), table, table, index, *pages, index, interleaved=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_weight": None}, "q_weight and k_weight must both be given, or neither"),
        ({"q_weight": torch.ones(8)}, r"weight must be \[16\], got \[8\]"),
        ({"eps": -1.0}, "eps must be at least 0, got -1.0"),
    ],
)
def test_refuses(change, message):
    qkv = random_tensor(2, 4 * 16, seed=0)
    table, index = torch.ones(9, 8), torch.tensor([0, 1], dtype=torch.int32)
    pages = [poisoned(CODECS["fp32"], 1, 1, 16, 16, "cpu") for _ in "kv"]
    norm = {"q_weight": torch.ones(16), "k_weight": torch.ones(16), "eps": 1e-6} | change
    with pytest.raises(ValueError, match=message):
        rope_write(qkv, table, table, index, *pages, index, interleaved=False, **norm)
