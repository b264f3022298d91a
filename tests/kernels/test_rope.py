"""rope against its reference, golden numbers of both styles, and the laws of a rotation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qinfer.kernels.rope import rope
from tests.compare import assert_close
from tests.strategies import FLOAT_DTYPES, random_tensor, seeds

VECTORS = Path(__file__).parents[1] / "vectors" / "small_kernels.npz"
BODIES = [rope.reference, pytest.param(rope.launch, marks=pytest.mark.kernel)]
STYLES = pytest.mark.parametrize("interleaved", [False, True])


def tables(length: int, half: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, half] of the usual frequencies."""
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    return angles.cos().to(device), angles.sin().to(device)


@pytest.mark.kernel
@STYLES
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "rotated"),
    [(3, 4, 2, 32, 32), (1, 9, 3, 64, 16), (2, 10, 1, 80, 40), (1, 1, 1, 6, 6), (0, 4, 2, 32, 32)],
)
def test_matches_reference(num_tokens, num_heads, num_kv_heads, head_dim, rotated, dtype, interleaved, device):
    # q and k are views of merged rows that also hold v.
    merged = random_tensor(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, seed=1, dtype=dtype).to(device)
    expected = merged.clone()
    cos, sin = tables(50, rotated // 2, device)
    positions = torch.randint(50, (num_tokens,), dtype=torch.int32).to(device)
    for body, rows in ((rope.launch, merged), (rope.reference, expected)):
        heads = rows.unflatten(1, (-1, head_dim))
        body(heads[:, :num_heads], heads[:, num_heads:-num_kv_heads], cos, sin, positions, interleaved=interleaved)
    assert_close(merged, expected)


@STYLES
@pytest.mark.parametrize("body", BODIES)
def test_golden(body, interleaved, device):
    style = "gptj" if interleaved else "neox"
    with np.load(VECTORS) as file:
        x, expected = (torch.from_numpy(file[name]).to(device) for name in ("rope_x", f"rope_{style}_y"))
        cos, sin = (torch.from_numpy(file[f"rope_{style}_{name}"]).float().to(device) for name in ("cos", "sin"))
        past_len = int(file["rope_past_len"])
    # The file gives every feature its own column; a pair shares one angle.
    cos, sin = (table[:, ::2] if interleaved else table[:, : table.shape[1] // 2] for table in (cos, sin))
    positions = torch.arange(past_len, past_len + x.shape[0], dtype=torch.int32, device=device)
    k = x[:, :1].clone()
    body(x, k, cos.contiguous(), sin.contiguous(), positions, interleaved=interleaved)
    assert_close(x, expected)
    assert_close(k, expected[:, :1])


@STYLES
@pytest.mark.parametrize("body", BODIES)
def test_only_the_first_features_of_q_and_k_change(body, interleaved, device):
    merged = random_tensor(3, 5 * 16, seed=2).to(device)
    before = merged.clone()
    heads = merged.unflatten(1, (5, 16))
    cos, sin = tables(9, 3, device)
    positions = torch.tensor([8, 1, 5], dtype=torch.int32, device=device)
    body(heads[:, :2], heads[:, 2:4], cos, sin, positions, interleaved=interleaved)
    changed = (merged != before).unflatten(1, (5, 16))
    assert changed[:, :4, :6].all()
    assert not changed[:, :4, 6:].any()
    assert not changed[:, 4].any()


@STYLES
@pytest.mark.parametrize("body", BODIES)
@settings(max_examples=15)
@given(seed=seeds, half=st.integers(1, 9), rest=st.integers(0, 3))
def test_keeps_norms_and_is_undone_by_the_negative_angle(body, seed, half, rest, interleaved, device):
    q, k = (random_tensor(2, heads, 2 * half + rest, seed=seed + heads).to(device) for heads in (3, 1))
    q_before, k_before = q.clone(), k.clone()
    cos, sin = tables(100, half, device)
    positions = torch.tensor([seed % 100, 99], dtype=torch.int32, device=device)
    body(q, k, cos, sin, positions, interleaved=interleaved)
    assert_close(q.norm(dim=-1), q_before.norm(dim=-1))
    assert_close(k.norm(dim=-1), k_before.norm(dim=-1))
    body(q, k, cos, -sin, positions, interleaved=interleaved)
    assert_close(q, q_before)
    assert_close(k, k_before)


@STYLES
@pytest.mark.parametrize("body", BODIES)
@settings(max_examples=15)
@given(seed=seeds, shift=st.integers(0, 50))
def test_scores_depend_on_the_distance_alone(body, seed, shift, interleaved, device):
    q, k = (random_tensor(1, 1, 16, seed=seed + i).to(device) for i in range(2))
    cos, sin = tables(100, 8, device)
    scores = []
    for offset in (0, shift):
        # One head as the query at position 20, one as the key at position 3.
        pair = torch.cat([q, k]), torch.cat([q, k])
        positions = torch.tensor([20 + offset, 3 + offset], dtype=torch.int32, device=device)
        body(*pair, cos, sin, positions, interleaved=interleaved)
        scores.append(pair[0][0, 0] @ pair[1][1, 0] / (q.norm() * k.norm()))
    assert abs(scores[0] - scores[1]) < 2e-5


def arguments() -> dict[str, Tensor]:
    """A call that is in order."""
    cos, sin = tables(10, 4, torch.device("cpu"))
    positions = torch.tensor([0, 9], dtype=torch.int32)
    return {"q": torch.ones(2, 3, 8), "k": torch.ones(2, 1, 8), "cos": cos, "sin": sin, "positions": positions}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"q": torch.ones(2, 24)}, ValueError, r"q must be \[T, H, D\], got \[2, 24\]"),
        ({"k": torch.ones(2, 1, 6)}, ValueError, r"k must be \[2, G, 8\], got \[2, 1, 6\]"),
        ({"k": torch.ones(2, 8, 3).transpose(1, 2)}, ValueError, "k must have last stride 1"),
        ({"q": torch.ones(2, 3, 8).double()}, TypeError, "q must be .* got torch.float64"),
        ({"cos": torch.ones(10, 4).half()}, TypeError, "cos must be float32, got torch.float16"),
        ({"sin": torch.ones(9, 4)}, ValueError, r"sin must be \[10, 4\], got \[9, 4\]"),
        ({"cos": torch.ones(9, 5), "sin": torch.ones(9, 5)}, ValueError, r"2 <= R <= 8, got \[9, 5\]"),
        ({"cos": torch.ones(9, 0), "sin": torch.ones(9, 0)}, ValueError, r"2 <= R <= 8, got \[9, 0\]"),
        ({"positions": torch.tensor([0, 10])}, ValueError, r"positions must be in \[0, 10\), got 10"),
        ({"positions": torch.tensor([-1, 0])}, ValueError, r"positions must be in \[0, 10\), got -1"),
        ({"positions": torch.tensor([0])}, ValueError, r"positions must be \[2\], got \[1\]"),
        ({"positions": torch.tensor([0.0, 1.0])}, TypeError, "positions must be int32 or int64"),
    ],
)
def test_refuses(change, error, text):
    with pytest.raises(error, match=text):
        rope(*(arguments() | change).values(), interleaved=False)
