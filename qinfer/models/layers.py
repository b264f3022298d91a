"""The parts of a decoder block: plain classes over kernels, immutable, called with tensors.

An operand may store its input features in an order of its own (GPTQ act-order). The activation is never reordered in
front of the matrix product: whatever produces it writes it in the consumer's order. So every layer that feeds another
is built with that other one's `order`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qinfer.cache.paged import PagedKVCache
from qinfer.kernels.gated_matmul import gated_matmul
from qinfer.kernels.gather import gather_columns, gather_rows
from qinfer.kernels.invariant import invariant_matmul
from qinfer.kernels.matmul import matmul, matmul_parts
from qinfer.kernels.operand import Operand
from qinfer.kernels.rmsnorm import add_rmsnorm, rmsnorm
from qinfer.kernels.rope_attention import rope_attention
from qinfer.kernels.silu_mul import silu_mul
from qinfer.models.batch import Batch
from qinfer.models.config import RopeConfig
from qinfer.models.lora_stack import LoraStack
from qinfer.quant import join


@dataclass(frozen=True)
class Linear:
    """y = x W + bias; x comes in the operand's order."""

    operand: Operand
    bias: Tensor | None = None  # [N]
    invariant: bool = False  # a row's result does not depend on the other rows

    @property
    def order(self) -> Tensor | None:
        """[K] int32: feature j of the input must be feature order[j] of the unordered activation; None: as it is."""
        return self.operand.order

    @property
    def num_parameters(self) -> int:
        """Number of logical weights, the bias included."""
        return self.operand.in_features * self.operand.out_features + (0 if self.bias is None else self.bias.numel())

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads."""
        return self.operand.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor, *, out: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
        """Multiply.

        Args:
            x: [T, K] in `order`.
            out: [T, N] where the result goes; None makes a new tensor.
            out_dtype: dtype of a new result; None takes x's.

        Returns:
            [T, N].
        """
        product = invariant_matmul if self.invariant else matmul
        return product(x, self.operand, bias=self.bias, out=out, out_dtype=out_dtype)

    def in_parts(self, x: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        """Multiply x [T, K] for an op that adds parts while it reads them: [S, T, N], see `matmul_parts`."""
        if self.invariant:
            return self(x, out_dtype=out_dtype)[None]
        return matmul_parts(x, self.operand, bias=self.bias, out_dtype=out_dtype)

    def linears(self) -> Iterator[Linear]:
        """Yield the matrices that a call multiplies by: this one."""
        yield self


class Output(Protocol):
    """What attention and MLP end with: a Linear, or what a rank does of one."""

    @property
    def order(self) -> Tensor | None:
        """[K] int32: feature j of the input must be feature order[j] of the unordered activation; None: as it is."""
        ...

    def in_parts(self, x: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        """Return [S, T, N] of `out_dtype`, whose sum over S is the result, for x [T, K] in `order`."""
        ...

    def linears(self) -> Iterator[Linear]:
        """Yield the matrices that a call multiplies by."""
        ...


@dataclass(frozen=True)
class MergedLinear:
    """Several products of the same activation, side by side in one output: q, k and v, or gate and up.

    One matrix product where the stored layouts could be joined, one per part otherwise.
    """

    parts: tuple[Linear, ...]
    widths: tuple[int, ...]  # columns of the output per matrix that went in
    order: (
        Tensor | None
    )  # [K] int32, of the input; None where those of the parts differ, which then reorder it themselves

    @classmethod
    def of(cls, parts: Sequence[Linear]) -> MergedLinear:
        """Join what can be joined: all parts or none."""
        widths = tuple(part.operand.out_features for part in parts)
        joined = join([part.operand for part in parts])
        merged = tuple(parts) if joined is None else (Linear(joined, _join_biases(parts)),)
        return cls(merged, widths, _shared_order(merged))

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply.

        Args:
            x: [T, K] in `order`.

        Returns:
            [T, sum of widths] in x's dtype.
        """
        if len(self.parts) == 1:
            return self.parts[0](x)
        y = x.new_empty(x.shape[0], sum(self.widths))
        for part, columns in zip(self.parts, self.split(y), strict=True):
            order = part.order if self.order is None else None
            part(x if order is None else gather_columns(x, order), out=columns)
        return y

    def in_parts(self, x: Tensor) -> Tensor:
        """Multiply x [T, K] for an op that adds parts while it reads them: [S, T, sum of widths]."""
        return self.parts[0].in_parts(x) if len(self.parts) == 1 else self(x)[None]

    def gated(self, x: Tensor, *, order: Tensor | None) -> Tensor:
        """Multiply x [T, K] by gate and up: silu of the one times the other, [T, N / 2] in x's dtype and `order`."""
        first = self.parts[0]
        if len(self.parts) == 1 and not first.invariant:
            return gated_matmul(x, first.operand, bias=first.bias, order=order)
        return silu_mul(self.in_parts(x), order=order, out_dtype=x.dtype)

    def split(self, y: Tensor) -> Sequence[Tensor]:
        """Cut an output [T, sum of widths] into one view per matrix that went in."""
        return torch.split(y, list(self.widths), dim=1)


def _shared_order(parts: Sequence[Linear]) -> Tensor | None:
    """Return the order of the input if all parts have the same one."""
    first = parts[0].order
    if first is None or not all(part.order is not None and torch.equal(part.order, first) for part in parts):
        return None
    return first


def _join_biases(parts: Sequence[Linear]) -> Tensor | None:
    """Put the biases of joined parts side by side, zeros where a part has none; None where none has one."""
    given = [part.bias for part in parts if part.bias is not None]
    if not given:
        return None
    return torch.cat(
        [given[0].new_zeros(part.operand.out_features) if part.bias is None else part.bias for part in parts]
    )


@dataclass(frozen=True)
class Embedding:
    """Token ids to the first residual."""

    table: Tensor  # [V, C]

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Return [T, C] fp32 rows of the table for token_ids [T]."""
        return gather_rows(self.table, token_ids, out_dtype=torch.float32)


@dataclass(frozen=True)
class RMSNorm:
    """Root-mean-square norm of the residual, written for the layer that reads it."""

    weight: Tensor  # [C]
    eps: float
    dtype: torch.dtype  # of the output
    order: Tensor | None  # [C] int32, the consumer's

    def __call__(self, residual: Tensor, delta: Tensor | None = None) -> Tensor:
        """Add what the last layer left to the residual, then normalize.

        Args:
            residual: [T, C] fp32; changed in place where there is a delta.
            delta: [S, T, C] fp32 or bf16, parts of what is pending, or None where nothing is.

        Returns:
            [T, C] in `dtype` and `order`.
        """
        if delta is None:
            return rmsnorm(residual, self.weight, eps=self.eps, out_dtype=self.dtype, order=self.order)
        return add_rmsnorm(residual, delta, self.weight, eps=self.eps, out_dtype=self.dtype, order=self.order)


@dataclass(frozen=True)
class HeadNorm:
    """Root-mean-square norm of every query head, and of every key head, by itself; the write of keys computes it."""

    q_weight: Tensor  # [D]
    k_weight: Tensor  # [D]
    eps: float


@dataclass(frozen=True)
class RopeTable:
    """Cosines and sines of every position, shared by all layers that rotate alike."""

    cos: Tensor  # [L, R/2] fp32
    sin: Tensor  # [L, R/2] fp32
    interleaved: bool

    @classmethod
    def build(cls, config: RopeConfig, *, max_positions: int, device: torch.device) -> RopeTable:
        """Compute the table in float64: cos(p f_i) and sin(p f_i), both times the attention factor.

        Args:
            config: frequencies f_i in radians per position, and the attention factor.
            max_positions: L, number of positions.
            device: where the table goes.
        """
        frequencies = torch.tensor(config.inverse_frequencies(), dtype=torch.float64, device=device)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float64, device=device), frequencies)
        cos, sin = angles.cos() * config.attention_factor, angles.sin() * config.attention_factor
        return cls(cos.float(), sin.float(), config.interleaved)


@dataclass(frozen=True)
class Attention:
    """Causal attention of the new tokens over the pages of their sequences."""

    layer: int  # whose pages of the cache
    head_dim: int
    scale: float
    window: int | None  # positions that a query sees, itself included; None: all before it
    qkv: MergedLinear
    out: Output
    rope: RopeTable
    norm: HeadNorm | None = None
    qkv_lora: LoraStack | None = None
    out_lora: LoraStack | None = None
    invariant: bool = False  # a row's result does not depend on the other rows

    def __call__(self, x: Tensor, batch: Batch, cache: PagedKVCache, *, out_dtype: torch.dtype) -> Tensor:
        """Write keys and values of the new tokens, then attend.

        Args:
            x: [T, C] in the order of `qkv`.
            batch: where the tokens stand.
            cache: pages of all layers; those of this one are written.
            out_dtype: dtype of the result.

        Returns:
            [S, T, C], whose sum over S is the result.
        """
        qkv = self.qkv.in_parts(x)
        if self.qkv_lora is not None:
            self.qkv_lora.add(x, batch, qkv[0])
        pages, rope, norm = cache.pages(self.layer), self.rope, self.norm
        mixed = rope_attention(
            qkv,
            rope.cos,
            rope.sin,
            batch.positions,
            *pages,
            batch.slots,
            batch.page_table,
            batch.query_starts,
            batch.context_lens,
            interleaved=rope.interleaved,
            max_query_len=batch.max_query_len,
            scale=self.scale,
            q_weight=None if norm is None else norm.q_weight,
            k_weight=None if norm is None else norm.k_weight,
            eps=0.0 if norm is None else norm.eps,
            window=self.window,
            order=self.out.order,
            invariant=self.invariant,
            out_dtype=x.dtype,
        )
        parts = self.out.in_parts(mixed, out_dtype=out_dtype)
        if self.out_lora is not None:
            self.out_lora.add(mixed, batch, parts[0])
        return parts

    def linears(self) -> Iterator[Linear]:
        """Yield the matrices."""
        yield from self.qkv.parts
        yield from self.out.linears()

    def tensors(self) -> Iterator[Tensor]:
        """Yield the other parameters."""
        if self.norm is not None:
            yield from (self.norm.q_weight, self.norm.k_weight)


@dataclass(frozen=True)
class GatedMLP:
    """down(silu(gate(x)) * up(x))."""

    gate_up: MergedLinear
    down: Output
    gate_up_lora: LoraStack | None = None
    down_lora: LoraStack | None = None

    def __call__(self, x: Tensor, batch: Batch, *, out_dtype: torch.dtype) -> Tensor:
        """Return [S, T, C] of `out_dtype` for x [T, C] in the order of `gate_up`; the sum over S is the result."""
        if self.gate_up_lora is None:
            hidden = self.gate_up.gated(x, order=self.down.order)
        else:
            gate_up = self.gate_up.in_parts(x)
            self.gate_up_lora.add(x, batch, gate_up[0])
            hidden = silu_mul(gate_up, order=self.down.order, out_dtype=x.dtype)
        parts = self.down.in_parts(hidden, out_dtype=out_dtype)
        if self.down_lora is not None:
            self.down_lora.add(hidden, batch, parts[0])
        return parts

    def linears(self) -> Iterator[Linear]:
        """Yield the matrices."""
        yield from self.gate_up.parts
        yield from self.down.linears()
