"""Choice of experts, and the order in which their products take the rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qinfer.kernels.route import max_blocks, route, sort_by_expert
from tests.compare import assert_close
from tests.strategies import random_tensor


def test_reference_is_the_definition() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, -1.0]])
    experts, weights = route(logits, top_k=3, normalized=False)
    # Equal logits: the lower index first.
    assert experts.tolist() == [[1, 3, 2], [0, 1, 2]]
    assert_close(weights, torch.softmax(logits, dim=1).gather(1, experts.long()))
    _, normalized = route(logits, top_k=3, normalized=True)
    assert_close(normalized, weights / weights.sum(dim=1, keepdim=True))


@pytest.mark.kernel
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(3, 8, 2), (2, 128, 8), (1, 60, 4), (2, 3, 3), (1, 1, 1)]
)
def test_route_matches_reference(
    device: torch.device, num_tokens: int, num_experts: int, top_k: int, normalized: bool
) -> None:
    logits = random_tensor(num_tokens, num_experts + 1, seed=top_k).to(device)[:, :num_experts]
    logits[0, num_experts // 2] = logits[0, 0]  # a tie
    experts, weights = route.launch(logits, top_k=top_k, normalized=normalized)
    expected, expected_weights = route.reference(logits, top_k=top_k, normalized=normalized)
    assert experts.dtype == torch.int32
    assert torch.equal(experts, expected)
    assert_close(weights, expected_weights)


@pytest.mark.kernel
def test_hostile_logits_give_experts_that_exist(device: torch.device) -> None:
    inf, nan = float("inf"), float("nan")
    rows = [[nan] * 5, [-inf] * 5, [1.0, nan, 2.0, 3.0, 0.0], [inf, 1.0, inf, 0.0, 0.0], [-inf, -inf, 1.0, 0.0, -inf]]
    logits = torch.tensor(rows, device=device)
    for normalized in (False, True):
        experts, weights = route.launch(logits, top_k=3, normalized=normalized)
        expected, expected_weights = route.reference(logits, top_k=3, normalized=normalized)
        assert torch.equal(experts, expected)
        assert torch.equal(weights.isnan(), expected_weights.isnan())
        assert weights[:4].isnan().all()
        assert_close(weights[4], expected_weights[4])


def check_blocks(experts: torch.Tensor, blocks: torch.Tensor, pairs: torch.Tensor, num_experts: int) -> None:
    """Every pair is in one block of its expert, ascending; whatever is unused says -1, and only the last rows are."""
    flat, found = experts.flatten().tolist(), []
    used = int((blocks >= 0).sum())
    assert blocks[:used].tolist() == sorted(blocks[:used].tolist())
    assert bool((blocks[used:] == -1).all())
    assert bool((pairs[used:] == -1).all())
    for expert in range(num_experts):
        rows = pairs[blocks == expert].flatten().tolist()
        held = [row for row in rows if row >= 0]
        assert rows[len(held) :] == [-1] * (len(rows) - len(held))
        assert len(rows) - len(held) < pairs.shape[1]
        assert held == [pair for pair, owner in enumerate(flat) if owner == expert]
        found += held
    assert sorted(found) == list(range(len(flat)))


@given(
    num_tokens=st.integers(1, 40),
    num_experts=st.integers(1, 12),
    seed=st.integers(0, 2**31),
    block_rows=st.sampled_from([16, 32]),
    data=st.data(),
)
def test_blocks_hold_every_pair_once(
    num_tokens: int, num_experts: int, seed: int, block_rows: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    torch.manual_seed(seed)
    # Skewed, so that some experts are never taken.
    experts = torch.rand(num_tokens, num_experts).pow(torch.arange(1, num_experts + 1)).argsort(dim=1)[:, :top_k]
    experts = experts.to(torch.int32).contiguous()
    blocks, pairs = sort_by_expert.reference(experts, num_experts=num_experts, block_rows=block_rows)
    assert blocks.shape[0] == max_blocks(experts.numel(), num_experts, block_rows)
    check_blocks(experts, blocks, pairs, num_experts)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "block_rows"), [(1, 8, 2, 16), (21, 6, 4, 16), (70, 5, 2, 32), (2, 1, 1, 16)]
)
def test_sort_matches_reference(
    device: torch.device, num_tokens: int, num_experts: int, top_k: int, block_rows: int
) -> None:
    logits = random_tensor(num_tokens, num_experts, seed=num_tokens).to(device)
    logits[:, 0] -= 9  # hardly ever taken
    experts, _ = route.reference(logits, top_k=top_k, normalized=False)
    expected = sort_by_expert.reference(experts, num_experts=num_experts, block_rows=block_rows)
    for actual, right in zip(
        sort_by_expert.launch(experts, num_experts=num_experts, block_rows=block_rows), expected, strict=True
    ):
        assert torch.equal(actual, right)


@pytest.mark.kernel
def test_one_expert_may_take_everything(device: torch.device) -> None:
    experts = torch.full((40, 1), 3, dtype=torch.int32, device=device)
    blocks, pairs = sort_by_expert.launch(experts, num_experts=8, block_rows=16)
    check_blocks(experts.cpu(), blocks.cpu(), pairs.cpu(), 8)
    assert sort_by_expert.launch(experts[:0], num_experts=8, block_rows=16)[1].shape == (0, 16)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"top_k must be from 1 to the number of experts, .* got 5 of 4"):
        route(torch.zeros(1, 4), top_k=5, normalized=True)
    with pytest.raises(TypeError, match=r"logits must be float32, got torch.float16"):
        route(torch.zeros(1, 4, dtype=torch.float16), top_k=2, normalized=True)
    with pytest.raises(ValueError, match="block_rows must be a power of two from 16 on, got 24"):
        sort_by_expert(torch.zeros(1, 2, dtype=torch.int32), num_experts=4, block_rows=24)
    with pytest.raises(ValueError, match=r"experts must be in \[0, 4\), got 4"):
        sort_by_expert(torch.tensor([[1, 4]], dtype=torch.int32), num_experts=4, block_rows=16)
