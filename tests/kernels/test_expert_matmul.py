"""Products with one matrix per expert, and the ops around them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qinfer.errors import UnsupportedError
from qinfer.kernels import expert_matmul as module
from qinfer.kernels.combine import combine
from qinfer.kernels.expert_gather import gather_expert_columns
from qinfer.kernels.expert_matmul import Routing, expert_matmul, expert_tile
from qinfer.kernels.expert_operand import ExpertOperand, stack
from qinfer.kernels.matmul import matmul
from qinfer.kernels.operand import DenseOperand, Operand
from qinfer.kernels.parts import add_up
from qinfer.kernels.route import sort_by_expert
from qinfer.kernels.tiles import Tile
from tests.compare import assert_close
from tests.kernels.operands import plane_operand, segmented_operand
from tests.strategies import random_tensor

pytestmark = pytest.mark.kernel


def routing_of(experts: list[list[int]], num_experts: int, device: torch.device, *, block_rows: int = 16) -> Routing:
    chosen = torch.tensor(experts, dtype=torch.int32, device=device)
    weights = random_tensor(*chosen.shape, seed=5).to(device)
    blocks = sort_by_expert.reference(chosen, num_experts=num_experts, block_rows=block_rows)
    return Routing(chosen, weights, *blocks)


def by_hand(x: Tensor, matrices: list[Operand], routing: Routing) -> Tensor:
    """Multiply one pair after the other: [P, N] fp32."""
    top_k = routing.num_pairs // x.shape[0]
    rows = [
        matmul.reference(x[pair // top_k, None], matrices[expert], out_dtype=torch.float32)
        for pair, expert in enumerate(routing.experts.flatten().tolist())
    ]
    return torch.cat(rows)


# Expert 1 is never taken, expert 3 by every token.
CHOSEN = [[3, 0], [2, 3], [3, 4], [0, 3]]


@pytest.mark.parametrize(
    ("dtype", "shared_rows", "bits", "k", "symmetric", "split_k"),
    [
        (torch.float16, True, 4, 160, False, 1),
        (torch.bfloat16, False, 4, 256, True, 2),
        (torch.float16, False, 8, 128, True, 1),
    ],
)
def test_planes(
    device: torch.device, dtype: torch.dtype, shared_rows: bool, bits: int, k: int, symmetric: bool, split_k: int
) -> None:
    options = {"bits": bits, "group_size": 32, "symmetric": symmetric, "device": device}
    matrices: list[Operand] = [plane_operand(k, 40, **options, seed=e) for e in range(5)]
    routing = routing_of(CHOSEN, 5, device)
    x = random_tensor(4 if shared_rows else 8, k, seed=1, dtype=dtype).to(device)
    expected = by_hand(x, matrices, routing)
    assert_close(expert_matmul.reference(x, stack(matrices), routing, out_dtype=torch.float32)[0], expected)
    actual = expert_matmul.launch(x, stack(matrices), routing, tile=Tile(16, 64, split_k, 4, 2))
    assert actual.shape == (split_k, 8, 40)
    assert actual.dtype == (dtype if split_k == 1 else torch.float32)
    assert_close(add_up(actual), expected, dtype)


def test_codes_in_two_planes(device: torch.device) -> None:
    """Both planes of an expert begin at a distance of their own."""
    matrices: list[Operand] = [plane_operand(544, 8, bits=3, group_size=32, seed=e, device=device) for e in range(3)]
    routing = routing_of([[2]], 3, device)
    x = random_tensor(1, 544, seed=1, dtype=torch.float16).to(device)
    actual = expert_matmul.launch(x, stack(matrices), routing, tile=Tile(16, 64, 1, 4, 2))
    assert_close(actual[0], by_hand(x, matrices, routing), torch.float16)


@pytest.mark.parametrize(("k", "split_k"), [(128, 1), (80, 2)])
def test_dense_matrices(device: torch.device, k: int, split_k: int) -> None:
    weights = random_tensor(5, 72, k, seed=2, dtype=torch.float16).to(device)
    matrices: list[Operand] = [DenseOperand(weight) for weight in weights]
    routing = routing_of(CHOSEN, 5, device)
    x = random_tensor(4, k, seed=1, dtype=torch.float16).to(device)
    actual = expert_matmul.launch(x, stack(matrices), routing, tile=Tile(16, 64, split_k, 4, 2))
    assert_close(add_up(actual), by_hand(x, matrices, routing), torch.float16)


def test_segments_of_mixed_widths(device: torch.device) -> None:
    sizes = [(8, 32), (4, 160)]
    matrices: list[Operand] = [segmented_operand(sizes, 40, device=device) for _ in range(3)]
    # Equal but for their scales.
    matrices = [
        replace(m, segments=tuple(replace(s, scales=s.scales * (1 + e)) for s in m.segments))
        for e, m in enumerate(matrices)
    ]
    routing = routing_of([[2], [0], [2]], 3, device)
    x = random_tensor(3, 192, seed=1, dtype=torch.float16).to(device)
    for split_k in (1, 2):
        actual = expert_matmul.launch(x, stack(matrices), routing, tile=Tile(16, 64, split_k, 4, 2))
        assert_close(add_up(actual), by_hand(x, matrices, routing), torch.float16)


def test_experts_may_differ_in_layout(device: torch.device) -> None:
    """Two operands share the experts out and write into columns of one result."""
    matrices: list[Operand] = [
        plane_operand(128, 40, group_size=64 if e % 2 else 128, seed=e, device=device) for e in range(5)
    ]
    operands = [stack(matrices[::2], [0, -1, 1, -1, 2]), stack(matrices[1::2], [-1, 0, -1, 1, -1])]
    routing = routing_of(CHOSEN, 5, device)
    x = random_tensor(4, 128, seed=1, dtype=torch.float16).to(device)
    expected = by_hand(x, matrices, routing)
    for body in (expert_matmul.launch, expert_matmul.reference):
        wide = torch.full((2, 8, 100), 7.0, device=device)
        for operand in operands:
            result = body(x, operand, routing, out=wide[:, :, 30:70])
            assert result.data_ptr() == wide[:, :, 30:70].data_ptr()
        assert_close(add_up(wide[:, :, 30:70]), expected, torch.float16)
        assert bool((wide[:, :, :30] == 7).all())
        assert bool((wide[:, :, 70:] == 7).all())


def test_more_rows_than_a_block(device: torch.device) -> None:
    matrices: list[Operand] = [plane_operand(128, 16, seed=e, device=device) for e in range(3)]
    chosen = [[0, 2] if t % 3 else [2, 1] for t in range(34)]
    x = random_tensor(34, 128, seed=1, dtype=torch.float16).to(device)
    expected = by_hand(x, matrices, routing_of(chosen, 3, device))
    routing = routing_of(chosen, 3, device, block_rows=32)
    actual = expert_matmul.launch(x, stack(matrices), routing)
    assert_close(add_up(actual), expected, torch.float16)
    assert torch.equal(expert_matmul.launch(x, stack(matrices), routing), actual), "two runs must agree bit for bit"


def test_experts_are_weighted_and_added(device: torch.device) -> None:
    parts, weights = random_tensor(3, 8, 300, seed=1).to(device), random_tensor(4, 2, seed=2).to(device)
    expected = (parts.double().sum(0).view(4, 2, 300) * weights.double()[:, :, None]).sum(1)
    assert_close(combine.reference(parts, weights), expected, torch.float32)
    assert_close(combine.launch(parts, weights), expected, torch.float32)
    assert combine.launch(parts[:, :0], weights[:0]).shape == (0, 300)


@pytest.mark.parametrize("num_rows", [4, 8])
def test_rows_are_put_in_the_order_of_their_expert(device: torch.device, num_rows: int) -> None:
    x = random_tensor(num_rows, 40, seed=1, dtype=torch.float16).to(device)
    order = torch.stack([torch.randperm(40) for _ in range(5)]).to(device=device, dtype=torch.int32)
    experts = torch.tensor(CHOSEN, dtype=torch.int32, device=device)
    expected = gather_expert_columns.reference(x, order, experts)
    assert torch.equal(expected[5], x[5 * num_rows // 8][order[4].long()])
    assert torch.equal(gather_expert_columns.launch(x, order, experts), expected)


def test_no_rows(device: torch.device) -> None:
    operand = stack([plane_operand(128, 16, device=device)])
    routing = routing_of([[0]], 1, device)
    none = Routing(routing.experts[:0], routing.weights[:0], routing.block_experts[:0], routing.block_pairs[:0])
    x = torch.zeros(0, 128, dtype=torch.float16, device=device)
    assert expert_matmul.launch(x, operand, none).shape == (1, 0, 16)


def test_wrong_arguments_are_named(device: torch.device) -> None:
    first, other = plane_operand(128, 16, device=device), plane_operand(128, 16, bits=8, device=device)
    with pytest.raises(ValueError, match="matrices of one layout, got 2 layouts"):
        stack([first, other])
    with pytest.raises(ValueError, match=r"scales of experts must be an even number, .* got \[1, 15\]"):
        stack([plane_operand(128, 15), plane_operand(128, 15)])
    routing, x = routing_of(CHOSEN, 5, device), torch.zeros(4, 128, dtype=torch.float16, device=device)
    operand = stack([first], [-1, -1, -1, 0, -1])
    with pytest.raises(ValueError, match="out must be given where an operand does not hold all experts"):
        expert_matmul(x, operand, routing)
    with pytest.raises(ValueError, match=r"out must be \[S, 8, 16\] .* got \[1, 8, 17\]"):
        expert_matmul(x, operand, routing, out=torch.zeros(1, 8, 17, device=device))
    with pytest.raises(ValueError, match="x must have rows for 8 pairs, one each or shared, got 3 rows"):
        expert_matmul(x[:3], operand, routing)
    with pytest.raises(ValueError, match="experts must hold a multiple of 3"):
        gather_expert_columns(x[:3], torch.zeros(5, 128, dtype=torch.int32, device=device), routing.experts)


def test_the_tile_follows_the_rows_of_an_expert(device: torch.device) -> None:
    operand: ExpertOperand = stack([plane_operand(512, 64, device=device) for _ in range(4)])
    assert expert_tile(device, 8, operand).block_m == 16
    assert expert_tile(device, 4 * 30, operand).block_m == 32


def test_experts_whose_sums_exceed_the_tensor_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def experts(bits: int, group_size: int) -> ExpertOperand:
        return stack([plane_operand(512, 16, bits=bits, group_size=group_size, seed=e) for e in range(2)])

    device = torch.device("cpu")
    assert expert_tile(device, 4, experts(3, 16)).block_m == 16
    monkeypatch.setattr(module, "arch", lambda _: "sm_100")
    for bits, group_size in ((3, 32), (4, 16), (6, 16)):
        assert expert_tile(device, 256, experts(bits, group_size)).block_m == 16
    with pytest.raises(UnsupportedError, match=r"groups of 16 do not work on sm_100.*groups of 32 and more do"):
        expert_tile(device, 4, experts(3, 16))
