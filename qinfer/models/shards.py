"""How one rank gets its share of a decoder's layers; a process alone gets all of them, by the same calls.

q, k and v, gate and up, and the head are cut along their outputs. o and down are cut along their inputs, so that each
rank multiplies what it has computed itself and the block adds up the products. A matrix whose storage forbids that
(EXL2 and GPTQ in act-order permute their inputs; a group of inputs may straddle two ranks) is cut along its outputs
instead: its input is gathered, each rank computes some columns, and zeros elsewhere make the block's sum join them. The
plan and the headers of the file decide which, so all ranks decide alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qinfer.kernels.gather import gather_columns, gather_rows
from qinfer.models.layers import Embedding, Linear, Output
from qinfer.models.parameters import Parameters
from qinfer.parallel.comm import Communicator
from qinfer.parallel.plan import Plan, Span


@dataclass(frozen=True)
class SomeInputs:
    """A product of the inputs that this rank has; the sum over the ranks is the whole.

    The number of parts may differ between ranks: it depends on K.
    """

    linear: Linear

    @property
    def order(self) -> Tensor | None:
        """[K] int32 of this rank's inputs, as in Linear."""
        return self.linear.order

    def in_parts(self, x: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        """Return [S, T, N] of `out_dtype` for this rank's x [T, K]; one part unless that is fp32."""
        if out_dtype == torch.float32:
            return self.linear.in_parts(x, out_dtype=out_dtype)
        return self.linear(x, out_dtype=out_dtype)[None]

    def linears(self) -> Iterator[Linear]:
        """Yield the matrices."""
        yield self.linear


@dataclass(frozen=True)
class Nothing:
    """The product of no inputs: zeros."""

    out_features: int
    order: Tensor | None = None

    def in_parts(self, x: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        """Return [1, T, N] zeros for x [T, 0]."""
        return x.new_zeros(1, x.shape[0], self.out_features, dtype=out_dtype)

    def linears(self) -> Iterator[Linear]:
        """Yield the matrices: none."""
        return iter(())


@dataclass(frozen=True)
class SomeColumns:
    """A product of which this rank computes some columns, from the inputs of all ranks."""

    linear: Linear | None  # None: no columns at all
    columns: Span
    out_features: int
    in_sizes: tuple[int, ...]  # input features per rank
    comm: Communicator
    order: Tensor | None = None  # of the part of the input that this rank brings along

    def in_parts(self, x: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        """Gather and multiply.

        Args:
            x: [T, in_sizes[rank]], unordered.
            out_dtype: dtype of the result; None takes x's.

        Returns:
            [1, T, N], zero in the columns of the other ranks.
        """
        gathered = self.comm.all_gather(x, 1, self.in_sizes)
        y = x.new_zeros(1, x.shape[0], self.out_features, dtype=out_dtype)
        if self.linear is not None:
            order = self.linear.order
            ordered = gathered if order is None else gather_columns(gathered, order)
            y[0, :, slice(*self.columns)] = self.linear(ordered, out_dtype=out_dtype)
        return y

    def linears(self) -> Iterator[Linear]:
        """Yield the matrices."""
        if self.linear is not None:
            yield self.linear


@dataclass(frozen=True)
class Idle:
    """Attention or MLP of a rank that owns no heads or columns, but takes part in what follows them."""

    out: Output

    def __call__(self, x: Tensor, *_: object, out_dtype: torch.dtype) -> Tensor:
        """Return [1, T, C] of `out_dtype` for x [T, C], without looking at it."""
        return self.out.in_parts(x.new_empty(x.shape[0], 0), out_dtype=out_dtype)

    def linears(self) -> Iterator[Linear]:
        """Yield the matrices."""
        return self.out.linears()

    def tensors(self) -> Iterator[Tensor]:
        """Yield the other parameters: none."""
        return iter(())


@dataclass(frozen=True)
class SomeRows:
    """An embedding of which this rank holds some rows; the sum over the ranks is the whole."""

    table: Tensor  # [rows, C]
    start: int
    comm: Communicator

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Return [T, C] fp32 rows of the whole table for token_ids [T]."""
        num_rows, width = self.table.shape
        if num_rows == 0:
            mine = torch.zeros(token_ids.shape[0], width, dtype=torch.float32, device=token_ids.device)
        else:
            rows = token_ids - self.start
            is_elsewhere = (rows < 0) | (rows >= num_rows)
            mine = gather_rows(self.table, rows.masked_fill(is_elsewhere, 0), out_dtype=torch.float32)
            mine.masked_fill_(is_elsewhere[:, None], 0.0)
        return self.comm.all_reduce_parts(mine[None])[0]


@dataclass(frozen=True)
class Cutter:
    """Hands out this rank's part of every layer."""

    parameters: Parameters
    plan: Plan | None  # None: this process holds everything
    comm: Communicator

    def spans(self, field: str, total: int, *, unit: int = 1) -> list[Span]:
        """Return every rank's span of a field of `Share`, times `unit`; [(0, total)] without a plan."""
        if self.plan is None:
            return [(0, total)]
        return [(start * unit, stop * unit) for start, stop in (getattr(s, field) for s in self.plan.shares)]

    def mine(self, spans: Sequence[Span]) -> Span:
        """Return this rank's span."""
        return spans[0] if self.plan is None else spans[self.comm.rank]

    def columns(self, name: str, shape: tuple[int, int], spans: Sequence[Span], *, has_bias: bool) -> Linear | None:
        """Return the columns of a matrix (K, N) in this rank's span; None if there are none."""
        start, stop = self.mine(spans)
        if (start, stop) == (0, shape[1]):
            return self.parameters.linear(name, shape, has_bias=has_bias)
        if start == stop:
            self.parameters.leave(name)
            return None
        return self.parameters.part(name, shape, "out", (start, stop), has_bias=has_bias)

    def may_cut(self, name: str, shape: tuple[int, int], in_spans: Sequence[Span]) -> bool:
        """Say whether a matrix (K, N) may be cut along its inputs into every rank's span."""
        cuts = sorted({cut for span in in_spans for cut in span})
        # With all inputs on one rank there is nothing to cut.
        return cuts == [0, shape[0]] or self.parameters.may_cut(name, shape, cuts)

    def inputs(self, name: str, shape: tuple[int, int], in_spans: Sequence[Span], *, has_bias: bool) -> Linear | None:
        """Return the rows of a matrix (K, N) in this rank's span; None if there are none. One rank has the bias."""
        start, stop = self.mine(in_spans)
        if start == stop:
            self.parameters.leave(name)
            return None
        if (start, stop) == (0, shape[0]):
            return self.parameters.linear(name, shape, has_bias=has_bias)
        linear = self.parameters.part(name, shape, "in", (start, stop), has_bias=has_bias)
        return linear if start == 0 else replace(linear, bias=None)

    def output(self, name: str, shape: tuple[int, int], in_spans: Sequence[Span], *, has_bias: bool) -> Output:
        """Return what this rank does of a product whose sum over the ranks is the whole.

        Args:
            name: the module.
            shape: (K, N).
            in_spans: the input features that each rank has.
            has_bias: whether there is a bias; one rank adds it.
        """
        if self.may_cut(name, shape, in_spans):
            linear = self.inputs(name, shape, in_spans, has_bias=has_bias)
            if linear is None:
                return Nothing(shape[1])
            return linear if self.plan is None else SomeInputs(linear)
        spans = self.spans("residual", shape[1])
        sizes = tuple(stop - start for start, stop in in_spans)
        linear_or_none = self.columns(name, shape, spans, has_bias=has_bias)
        return SomeColumns(linear_or_none, self.mine(spans), shape[1], sizes, self.comm)

    def embedding(self, name: str, shape: tuple[int, int], spans: Sequence[Span]) -> Embedding | SomeRows:
        """Return the rows of the table [V, C] in this rank's span."""
        if self.plan is None:
            return Embedding(self.parameters.tensor(f"{name}.weight", shape))
        start, stop = self.mine(spans)
        return SomeRows(self.parameters.rows(f"{name}.weight", shape, (start, stop)), start, self.comm)
