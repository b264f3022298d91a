"""A mixture of experts: every token goes through a few of many MLPs, which a router chooses for it.

    y[t] = sum_j weights[t, j] * MLP of expert experts[t, j] (x[t])

The matrices of all experts are read by one launch per projection (`kernels/expert_matmul.py`). An expert may store its
inputs in an order of its own (GPTQ act-order, EXL2), so rows are put in order between the ops, one copy per pair of a
token and an expert. Experts of which some are stored differently, and gate and up that differ, take a launch for each.

Ranks share experts as they share an MLP: every rank has some columns of gate and up and the rows of down that belong to
them, of all experts, and the same router.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qinfer.kernels.combine import combine
from qinfer.kernels.expert_gather import gather_expert_columns
from qinfer.kernels.expert_matmul import Routing, expert_matmul, expert_tile
from qinfer.kernels.expert_operand import ExpertOperand, layout, stack
from qinfer.kernels.gather import gather_columns
from qinfer.kernels.operand import Operand
from qinfer.kernels.route import route, sort_by_expert
from qinfer.kernels.silu_mul import silu_mul
from qinfer.models.architectures import NameMap
from qinfer.models.config import ExpertConfig
from qinfer.models.layers import Linear
from qinfer.models.shards import Cutter
from qinfer.parallel.comm import Communicator
from qinfer.parallel.plan import Span
from qinfer.quant import join


@dataclass(frozen=True)
class ExpertPiece:
    """One matrix per expert, all with the same inputs and outputs."""

    operands: tuple[ExpertOperand, ...]  # one per layout; each expert is in one of them
    order: Tensor | None  # [E, K] int32: feature j of a row for expert e must be feature order[e, j]; None: as it is

    @classmethod
    def of(cls, matrices: Sequence[Operand]) -> ExpertPiece:
        """Put the matrices of all experts into as few buffers as their layouts allow."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for expert, matrix in enumerate(matrices):
            groups.setdefault(layout(matrix), []).append(expert)
        given = [matrix.order for matrix in matrices if matrix.order is not None]
        order = None
        if given:
            plain = torch.arange(matrices[0].in_features, dtype=torch.int32, device=given[0].device)
            order = torch.stack([plain if matrix.order is None else matrix.order for matrix in matrices])
        if len(groups) == 1:
            return cls((stack(matrices),), order)
        operands = []
        for members in groups.values():
            slots = [members.index(expert) if expert in members else -1 for expert in range(len(matrices))]
            operands.append(stack([matrices[expert] for expert in members], slots))
        return cls(tuple(operands), order)

    @property
    def width(self) -> int:
        """N."""
        return self.operands[0].first.out_features


@dataclass(frozen=True)
class ExpertLinear:
    """y[p] = x[p // (P / R)] W[expert of pair p], for one or several matrices side by side."""

    pieces: tuple[ExpertPiece, ...]

    @classmethod
    def of(cls, experts: Sequence[Sequence[Linear]]) -> ExpertLinear:
        """Join the matrices of each expert, such as its gate and up, where that works for all experts."""
        joined = [join([linear.operand for linear in linears]) for linears in experts]
        whole = [operand for operand in joined if operand is not None]
        if len(whole) == len(joined):
            return cls((ExpertPiece.of(whole),))
        sides = zip(*([linear.operand for linear in linears] for linears in experts), strict=True)
        return cls(tuple(ExpertPiece.of(side) for side in sides))

    def __call__(self, x: Tensor, routing: Routing, *, out_dtype: torch.dtype | None = None) -> Tensor:
        """Multiply.

        Args:
            x: [T, K], or [P, K] with a row of its own for every pair.
            routing: P pairs.
            out_dtype: dtype of a result of one part, x's by default.

        Returns:
            [S, P, N], whose sum over S is the result.
        """
        operands = [operand for piece in self.pieces for operand in piece.operands]
        if len(operands) == 1:
            return expert_matmul(self._ordered(x, self.pieces[0], routing), operands[0], routing, out_dtype=out_dtype)
        splits = (expert_tile(x.device, routing.num_pairs, operand).split_k for operand in operands)
        parts = max(*splits, *(operand.num_segments for operand in operands))
        widths = [piece.width for piece in self.pieces]
        dtype = torch.float32 if parts > 1 else out_dtype or x.dtype
        y = x.new_empty(parts, routing.num_pairs, sum(widths), dtype=dtype)
        for piece, columns in zip(self.pieces, torch.split(y, widths, dim=2), strict=True):
            rows = self._ordered(x, piece, routing)
            for operand in piece.operands:
                expert_matmul(rows, operand, routing, out=columns)
        return y

    @staticmethod
    def _ordered(x: Tensor, piece: ExpertPiece, routing: Routing) -> Tensor:
        return x if piece.order is None else gather_expert_columns(x, piece.order, routing.experts)

    def block_rows(self, device: torch.device, num_pairs: int) -> int:
        """Return how many rows a block may have at the most."""
        operands = (operand for piece in self.pieces for operand in piece.operands)
        return min(expert_tile(device, num_pairs, operand).block_m for operand in operands)

    def linears(self) -> Iterator[Linear]:
        """Yield the matrices of all experts."""
        for piece in self.pieces:
            for operand in piece.operands:
                yield from (Linear(matrix) for matrix in operand.matrices)


@dataclass(frozen=True)
class ExpertOutput:
    """The last product of the experts, weighted and added up; the sum over the ranks is the whole."""

    linear: ExpertLinear | None  # None: nothing of it is on this rank
    columns: Span  # of the outputs that this rank computes
    out_features: int
    in_sizes: tuple[int, ...] | None  # inputs per rank where all of them are gathered first; None: they are not
    comm: Communicator

    def __call__(self, x: Tensor, routing: Routing, *, out_dtype: torch.dtype) -> Tensor:
        """Return [1, T, C] of `out_dtype` for x [P, F of this rank], zero in the columns of other ranks."""
        x = x if self.in_sizes is None else self.comm.all_gather(x, 1, self.in_sizes)
        shape = (1, routing.weights.shape[0], self.out_features)
        if self.linear is None:
            return x.new_zeros(shape, dtype=out_dtype)
        y = combine(self.linear(x, routing, out_dtype=torch.float32), routing.weights)
        if self.columns == (0, self.out_features):
            return y[None].to(out_dtype)
        whole = x.new_zeros(shape, dtype=out_dtype)
        whole[0, :, slice(*self.columns)] = y
        return whole


@dataclass(frozen=True)
class SparseMLP:
    """The experts of a layer and their router."""

    config: ExpertConfig
    router: Linear
    gate_up: ExpertLinear | None  # None on a rank that has none of the columns
    down: ExpertOutput

    def __call__(self, x: Tensor, *_: object, out_dtype: torch.dtype) -> Tensor:
        """Return [1, T, C] of `out_dtype` for x [T, C]; the sum over the ranks is the result."""
        routing = self._route(x)
        if self.gate_up is None:
            hidden = x.new_empty(routing.num_pairs, 0)
        else:
            hidden = silu_mul(self.gate_up(x, routing), out_dtype=x.dtype)
        return self.down(hidden, routing, out_dtype=out_dtype)

    def _route(self, x: Tensor) -> Routing:
        """Choose the experts of every token, without waiting for the device."""
        rows = x if self.router.order is None else gather_columns(x, self.router.order)
        logits = self.router(rows, out_dtype=torch.float32)
        experts, weights = route(logits, top_k=self.config.per_token, normalized=self.config.normalized)
        held = [linear for linear in (self.gate_up, self.down.linear) if linear is not None]
        rows_per_block = min((linear.block_rows(x.device, experts.numel()) for linear in held), default=16)
        blocks = sort_by_expert(experts, num_experts=self.config.num_experts, block_rows=rows_per_block)
        return Routing(experts, weights, *blocks)

    def linears(self) -> Iterator[Linear]:
        """Yield the matrices, those of all experts."""
        yield self.router
        yield from self.expert_linears()

    def expert_linears(self) -> Iterator[Linear]:
        """Yield the matrices of the experts, of which a token multiplies by `per_token` in `num_experts`."""
        for linear in (self.gate_up, self.down.linear):
            if linear is not None:
                yield from linear.linears()


def build_experts(config: ExpertConfig, hidden: int, names: NameMap, cutter: Cutter) -> SparseMLP:
    """Wire the experts of one layer, or this rank's share of every one.

    Args:
        config: how many, and how wide.
        hidden: C.
        names: of the layer.
        cutter: gives the matrices.
    """
    spans, width = cutter.spans("mlp", config.mlp_size), config.mlp_size
    modules = [names.expert(index) for index in range(config.num_experts)]
    gate_up = _of_all(
        [
            [cutter.columns(name, (hidden, width), spans, has_bias=False) for name in (gate, up)]
            for gate, up, _ in modules
        ]
    )
    router = cutter.parameters.linear(names.router, (hidden, config.num_experts), has_bias=False)
    # All experts are cut alike, though some could be cut in the better way.
    shape, sizes = (width, hidden), tuple(stop - start for start, stop in spans)
    columns: Span = (0, hidden)
    if all(cutter.may_cut(down, shape, spans) for *_, down in modules):
        down = _of_all([[cutter.inputs(name, shape, spans, has_bias=False)] for *_, name in modules])
        return SparseMLP(config, router, gate_up, ExpertOutput(down, columns, hidden, None, cutter.comm))
    residual = cutter.spans("residual", hidden)
    columns = cutter.mine(residual)
    down = _of_all([[cutter.columns(name, shape, residual, has_bias=False)] for *_, name in modules])
    return SparseMLP(config, router, gate_up, ExpertOutput(down, columns, hidden, sizes, cutter.comm))


def _of_all(experts: Sequence[Sequence[Linear | None]]) -> ExpertLinear | None:
    """Put the matrices of all experts together; None on a rank that has none of them."""
    held = [[linear for linear in linears if linear is not None] for linears in experts]
    return ExpertLinear.of(held) if all(held) else None
