"""Cases of the ops that a mixture of experts adds, at the shapes of two models."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from qinfer.bench.case import Arguments, case
from qinfer.bench.maker import Maker
from qinfer.bench.shapes import FP32, G128, HALVES, TINY, TOKENS, Matrix, Stored
from qinfer.kernels.expert_matmul import Routing
from qinfer.kernels.expert_operand import ExpertOperand, stack
from qinfer.kernels.operand import DenseOperand, Operand, SegmentedOperand
from qinfer.kernels.route import max_blocks, sort_by_expert

BLOCK_ROWS = {1: 16, 16: 16, 2048: 32}  # per number of tokens; every GPU has tiles for these


@dataclass(frozen=True)
class Experts:
    """The sizes of the experts of a model."""

    name: str
    hidden: int
    mlp: int
    num_experts: int
    per_token: int

    @property
    def matrices(self) -> tuple[Matrix, Matrix]:
        """Gate and up of an expert, merged, and its down."""
        gate_up, down = (self.hidden, 2 * self.mlp), (self.mlp, self.hidden)
        return Matrix(f"{self.name} gate_up", *gate_up), Matrix(f"{self.name} down", *down, residual=True)


MIXTRAL = Experts("mixtral-8x7b", 4096, 14336, 8, 2)
QWEN3 = Experts("qwen3-30b-a3b", 2048, 768, 128, 8)
FEW = Experts(f"{TINY.name} experts", TINY.hidden, 128, 4, 2)
DENSE, MIXED = Stored("dense"), Stored("4 and 3 bits")


def _operand(m: Maker, s: Experts, matrix: Matrix, stored: Stored, dtype: torch.dtype) -> ExpertOperand:
    """Make the matrices; uninitialized ones repeat the first, for nobody reads them."""
    half = Matrix(matrix.name, matrix.k // 2, matrix.n)
    three = Stored(stored.name, bits=3, group_size=stored.group_size)

    def make() -> Operand:
        if stored is DENSE:
            return DenseOperand(m.normal(matrix.n, matrix.k, dtype=dtype))
        if stored is MIXED:
            return SegmentedOperand((m.planes(half, stored, dtype), m.planes(half, three, dtype)))
        return m.planes(matrix, stored, dtype)

    if m.fill == "empty":
        return ExpertOperand((make(),) * s.num_experts)
    return stack([make() for _ in range(s.num_experts)])


def _experts(m: Maker, s: Experts, tokens: int) -> torch.Tensor:
    """Different experts for each token, evenly."""
    if m.fill == "empty":
        return m.integers(tokens, s.per_token, high=s.num_experts)
    return torch.rand(tokens, s.num_experts, device=m.device).topk(s.per_token).indices.to(torch.int32)


def _routing(m: Maker, s: Experts, tokens: int) -> Routing:
    experts, weights, rows = _experts(m, s, tokens), m.normal(tokens, s.per_token, dtype=FP32), BLOCK_ROWS[tokens]
    if m.fill == "random":
        return Routing(experts, weights, *sort_by_expert.reference(experts, num_experts=s.num_experts, block_rows=rows))
    blocks = max_blocks(experts.numel(), s.num_experts, rows)
    return Routing(experts, weights, m.integers(blocks, high=1), m.integers(blocks, rows, high=1))


def _matmul_case(s: Experts, tokens: int, half: str, stored: Stored, *, is_down: bool) -> None:
    matrix, d = s.matrices[is_down], HALVES[half]
    compiled = {
        MIXTRAL.name: tokens > 1 and half == "fp16" and stored is G128 and not is_down,
        QWEN3.name: tokens == 16 and half == "bf16" and stored is not G128 and is_down,
    }.get(s.name, False)

    @case("expert_matmul", f"{matrix.name} T={tokens} {half} {stored.name}", compiled=compiled)
    def _(m: Maker) -> Arguments:
        rows = tokens * s.per_token if is_down else tokens
        x, operand = m.normal(rows, matrix.k, dtype=d), _operand(m, s, matrix, stored, d)
        return (x, operand, _routing(m, s, tokens)), {"out_dtype": FP32 if is_down else None}


def _routing_cases(s: Experts, tokens: int) -> None:
    """Choice, order, order of the inputs, and the sum at the end."""
    name, compiled = f"{s.name} T={tokens}", s is QWEN3 and tokens == 16

    @case("route", name, compiled=compiled)
    def _(m: Maker) -> Arguments:
        return (m.normal(tokens, s.num_experts, dtype=FP32),), {"top_k": s.per_token, "normalized": True}

    @case("sort_by_expert", name, compiled=compiled)
    def _(m: Maker) -> Arguments:
        return (_experts(m, s, tokens),), {"num_experts": s.num_experts, "block_rows": BLOCK_ROWS[tokens]}

    @case("gather_expert_columns", name, compiled=compiled)
    def _(m: Maker) -> Arguments:
        orders = [m.permutation(s.hidden) for _ in range(s.num_experts)]
        order = torch.stack([order for order in orders if order is not None])
        return (m.normal(tokens, s.hidden, dtype=HALVES["fp16"]), order, _experts(m, s, tokens)), {}

    @case("combine", name, compiled=compiled)
    def _(m: Maker) -> Arguments:
        parts = m.normal(1 if tokens > 64 else 4, tokens * s.per_token, s.hidden, dtype=FP32)
        return (parts, m.normal(tokens, s.per_token, dtype=FP32)), {}


def register_experts() -> None:
    """Fill `CASES`."""
    for s, tokens in product((MIXTRAL, QWEN3, FEW), TOKENS):
        _routing_cases(s, tokens)
        for half, stored, is_down in product(HALVES, (G128, DENSE, MIXED), (False, True)):
            _matmul_case(s, tokens, half, stored, is_down=is_down)
