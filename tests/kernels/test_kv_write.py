"""kv_write: every row lands in its slot and nowhere else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qinfer.kernels.kv_codec import CODECS, KVPages
from qinfer.kernels.kv_write import kv_write
from tests.strategies import FLOAT_DTYPES, random_tensor, seeds

BODIES = [kv_write.reference, pytest.param(kv_write.launch, marks=pytest.mark.kernel)]


def nan_pages(num_pages: int, heads: int, page_size: int, head_dim: int, dtype: torch.dtype, device) -> list[Tensor]:
    """Pages for K and V that hold nothing but NaN."""
    return [torch.full((num_pages, heads, page_size, head_dim), float("nan"), dtype=dtype).to(device) for _ in "kv"]


@pytest.mark.kernel
@pytest.mark.parametrize("page_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "heads", "page_size", "head_dim"), [(3, 2, 16, 32), (1, 9, 4, 80), (5, 1, 256, 7), (0, 2, 16, 32)]
)
def test_matches_reference(num_tokens, heads, page_size, head_dim, dtype, page_dtype, device):
    rows = random_tensor(num_tokens, 3 * heads, head_dim, seed=1, dtype=dtype).to(device)
    # Views into merged rows that start with the queries.
    k, v = rows[:, heads : 2 * heads], rows[:, 2 * heads :]
    slots = torch.randperm(3 * page_size)[:num_tokens].int()
    slots[2::4] = -1
    slots = slots.to(device)
    actual = nan_pages(3, heads, page_size, head_dim, page_dtype, device)
    expected = nan_pages(3, heads, page_size, head_dim, page_dtype, device)
    kv_write.launch(k, v, *map(KVPages.plain, actual), slots)
    kv_write.reference(k, v, *map(KVPages.plain, expected), slots)
    for a, e in zip(actual, expected, strict=True):
        assert int((~a.isnan()).sum()) == int((slots >= 0).sum()) * heads * head_dim
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("body", BODIES)
def test_by_hand(body, device):
    k = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]], device=device)
    k_pages, v_pages = (torch.zeros(2, 2, 3, 2, dtype=torch.float16, device=device) for _ in "kv")
    body(k, -k, KVPages.plain(k_pages), KVPages.plain(v_pages), torch.tensor([4, 0], dtype=torch.int32, device=device))
    expected = torch.zeros(2, 2, 3, 2)
    expected[1, 0, 1], expected[1, 1, 1] = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    expected[0, 0, 0], expected[0, 1, 0] = torch.tensor([5.0, 6.0]), torch.tensor([7.0, 8.0])
    assert torch.equal(k_pages.cpu().float(), expected)
    assert torch.equal(v_pages.cpu().float(), -expected)


@pytest.mark.parametrize("body", BODIES)
@given(data=st.data(), seed=seeds, page_size=st.integers(1, 9), heads=st.integers(1, 3))
def test_writes_the_slots_and_leaves_the_rest(body, data, seed, page_size, heads, device):
    num_slots = 3 * page_size
    chosen = data.draw(st.lists(st.integers(0, num_slots - 1), unique=True, max_size=5))
    # Padding rows may stand anywhere.
    for place in data.draw(st.lists(st.integers(0, 5), max_size=2)):
        chosen.insert(place, -1)
    slots = torch.tensor(chosen, dtype=torch.int32, device=device)
    k, v = (random_tensor(len(chosen), heads, 5, seed=seed + i).to(device) for i in range(2))
    pages = [random_tensor(3, heads, page_size, 5, seed=seed + 2 + i).to(device) for i in range(2)]
    before = [p.clone() for p in pages]
    body(k, v, *map(KVPages.plain, pages), slots)
    for x, after, old in zip((k, v), pages, before, strict=True):
        flat = old.transpose(1, 2).flatten(0, 1)
        for row, slot in enumerate(chosen):
            if slot >= 0:
                flat[slot] = x[row]
        assert torch.equal(after.transpose(1, 2).flatten(0, 1), flat)


@pytest.mark.parametrize("body", BODIES)
def test_pages_may_be_a_layer_of_a_larger_cache(body, device):
    cache = torch.zeros(2, 4, 2, 3, 5, device=device)
    k_pages, v_pages = cache[:, 1:3].transpose(0, 1)[0], cache[:, 1:3].transpose(0, 1)[1]
    k = random_tensor(1, 2, 5, seed=3).to(device)
    slots = torch.tensor([5], dtype=torch.int32, device=device)
    body(k, 2 * k, KVPages.plain(k_pages), KVPages.plain(v_pages), slots)
    assert torch.equal(cache[1, 1, :, 2], k[0])
    assert torch.equal(cache[1, 2, :, 2], 2 * k[0])
    assert int((cache != 0).sum()) == 2 * k.numel()


@pytest.mark.gpu
def test_pages_beyond_two_to_the_31_elements():
    k_pages, v_pages = (torch.zeros(70_000, 2, 128, 128, dtype=torch.float16, device="cuda") for _ in "kv")
    k = torch.ones(1, 2, 128, dtype=torch.float16, device="cuda")
    slots = torch.tensor([70_000 * 128 - 1], dtype=torch.int32, device="cuda")
    kv_write(k, k, KVPages.plain(k_pages), KVPages.plain(v_pages), slots)
    for pages in (k_pages, v_pages):
        assert pages[-1, :, -1].eq(1).all()
        assert int(pages[-1].sum(dtype=torch.float32)) == 256


def arguments() -> dict[str, Tensor]:
    """A call that is in order."""
    pages = torch.zeros(3, 2, 4, 8)
    rows = torch.ones(2, 2, 8)
    slots = torch.tensor([-1, 11], dtype=torch.int32)
    return {"k": rows, "v": rows, "k_pages": pages, "v_pages": pages.clone(), "slots": slots}


def write(call: dict[str, Tensor]) -> None:
    """Make the call."""
    pages = [call[name] for name in ("k_pages", "v_pages")]
    kv_write(call["k"], call["v"], *[KVPages(p, None, CODECS["fp32"]) for p in pages], call["slots"])


def test_the_last_slot_is_accepted():
    call = arguments()
    write(call)
    assert call["v_pages"][2, :, 3].eq(1).all()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"slots": torch.tensor([0, 12])}, ValueError, r"slots must be in \[-1, 12\), got 12"),
        ({"slots": torch.tensor([0, -2])}, ValueError, r"slots must be in \[-1, 12\), got -2"),
        ({"slots": torch.tensor([0])}, ValueError, r"slots must be \[2\], got \[1\]"),
        ({"slots": torch.tensor([0.0, 1.0])}, TypeError, "slots must be int32 or int64"),
        ({"k": torch.ones(2, 16)}, ValueError, r"k must be \[T, G, D\], got \[2, 16\]"),
        ({"v": torch.ones(2, 2, 7)}, ValueError, r"v must be \[2, 2, 8\], got \[2, 2, 7\]"),
        ({"v": torch.ones(2, 8, 2).transpose(1, 2)}, ValueError, "v must have last stride 1"),
        ({"k_pages": torch.zeros(3, 4, 2, 8)}, ValueError, r"k_pages must be \[P, 2, S, 8\], got \[3, 4, 2, 8\]"),
        ({"v_pages": torch.zeros(4, 2, 4, 8)}, ValueError, r"v_pages must be \[3, 2, 4, 8\], got \[4, 2, 4, 8\]"),
        ({"k_pages": torch.zeros(3, 2, 4, 8).int()}, TypeError, "k_pages must be .* got torch.int32"),
    ],
)
def test_refuses(change, error, text):
    with pytest.raises(error, match=text):
        write(arguments() | change)
