"""Tensors for the arguments of ops: uninitialized, so that shapes of any size are free, or valid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qinfer.bench.shapes import FP32, Matrix, Run, Shape, Stored
from qinfer.kernels.kv_codec import CODECS, KVPages
from qinfer.kernels.operand import FIELDS, SLICE_K, PlaneOperand, tile_k

Fill = Literal["empty", "random"]
PAGE_SIZE = 256
NUM_PARTS = 8


@dataclass(frozen=True)
class Maker:
    """Makes tensors on one device, all uninitialized or all valid."""

    device: torch.device
    fill: Fill

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Standard normal numbers."""
        tensor = self._empty(*shape, dtype=dtype)
        return tensor.normal_() if self.fill == "random" else tensor

    def parts(self, run: Run, width: int) -> Tensor:
        """A product of the run's tokens in as many parts as it has there: one where tokens are many."""
        return self.normal(1 if run.tokens > 64 else NUM_PARTS, run.tokens, width, dtype=FP32)

    def integers(self, *shape: int, low: int = 0, high: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Integers in [low, high)."""
        tensor = self._empty(*shape, dtype=dtype)
        return tensor.random_(low, high) if self.fill == "random" else tensor

    def permutation(self, n: int, *, wanted: bool = True) -> Tensor | None:
        """A random order of n features as int32; None when none is wanted."""
        if not wanted:
            return None
        if self.fill == "empty":
            return self._empty(n, dtype=torch.int32)
        return torch.randperm(n, device=self.device, dtype=torch.int32)

    def steps(self, values: list[int]) -> Tensor:
        """Given int32 values."""
        if self.fill == "empty":
            return self._empty(len(values), dtype=torch.int32)
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def numbers(self, rows: list[list[float]]) -> Tensor:
        """A table of given fp64 numbers."""
        if self.fill == "empty":
            return self._empty(len(rows), len(rows[0]), dtype=torch.float64)
        return torch.tensor(rows, dtype=torch.float64, device=self.device)

    def host_ids(self, rows: int) -> Tensor:
        """Memory of the host for ids, to which the device can write."""
        return torch.zeros(rows, dtype=torch.int64, pin_memory=self.device.type == "cuda")

    def heads(self, shape: Shape, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as strided views of a merged projection."""
        qkv = self.normal(tokens, shape.heads + 2 * shape.kv_heads, shape.head_dim, dtype=dtype)
        q, k, v = torch.split(qkv, [shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        return q, k, v

    def pages(self, shape: Shape, num_pages: int, name: str) -> KVPages:
        """One layer's page pool for keys or for values, in some codec."""
        codec, places = CODECS[name], (num_pages, shape.kv_heads, PAGE_SIZE)
        if codec.scheme == "plain":
            return KVPages.plain(self.normal(*places, shape.head_dim, dtype=codec.dtype))
        scales = self.normal(*places, dtype=torch.bfloat16).abs() if codec.has_scales else None
        # Codes below 0x70 are numbers in every codec.
        return KVPages(self.integers(*places, codec.width(shape.head_dim), high=0x70, dtype=codec.dtype), scales, codec)

    def planes(self, matrix: Matrix, stored: Stored, dtype: torch.dtype) -> PlaneOperand:
        """An integer matrix with scales in dtype."""
        k, n = matrix.k, matrix.n
        group_size = -(-k // SLICE_K) * SLICE_K if stored.group_size == -1 else stored.group_size
        groups = -(-k // group_size)
        planes = tuple(self.words(k, n, width) for width in FIELDS[stored.bits])
        offsets = None if stored.sym else self.integers(groups, n, low=-2, high=2, dtype=torch.int8)
        scales = self.normal(groups, n, dtype=dtype)
        if self.fill == "random":
            scales.abs_().mul_(k**-0.5 * 4 / 2**stored.bits)  # products of standard normal inputs stay near one
        order = self.permutation(k, wanted=stored.order)
        return PlaneOperand(planes, scales, offsets, stored.bits, group_size, k, order)

    def words(self, k: int, n: int, width: int) -> Tensor:
        """A plane of fields of some width."""
        return self.integers(-(-k // tile_k(width)), n, SLICE_K, low=-(2**15), high=2**15, dtype=torch.int16)
