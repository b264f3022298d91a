"""Reading a part of a matrix: of every large tensor only the rows or columns that belong to it leave the disk.

A format knows how to slice a matrix that it has read; nothing else has to be said about where a part lies in the file.
A skeleton of the matrix is read first, whose large tensors are on the meta device: shapes without values. What `slice`
makes of it has the shapes of the part, and its slice up to the part has the shapes of what lies in front of the part;
the difference is where to read. What is read is then checked like any other matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qinfer.errors import CheckpointError
from qinfer.quant.weight import FLOATS, Dim, Source, Weight, take

META = torch.device("meta")


class SlicedSource(Source, Protocol):
    """A source that can read some rows or columns of a tensor and nothing else of it."""

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Read the entries from start to stop of one dimension."""
        ...


def skeleton(kind: type[Weight], source: Source, name: str) -> Weight:
    """Read a matrix without the values of its large tensors; vectors, such as the groups of features, have theirs.

    Raises:
        CheckpointError: a tensor is missing, has a wrong shape or dtype, or a vector holds impossible values.
        UnsupportedError: the options are well formed, but not served.
    """
    return kind.read(_Skeleton(source), name)


def read_part(source: SlicedSource, name: str, bones: Weight, dim: Dim, start: int, stop: int) -> Weight:
    """Read the part of a matrix between two of its cuts.

    Args:
        source: the checkpoint.
        name: the module.
        bones: its skeleton.
        dim: along which the matrix is cut.
        start: first input or output feature.
        stop: one past the last, above `start`.

    Returns:
        What `slice(dim, start, stop)` of the whole matrix would be.

    Raises:
        ValueError: `start` or `stop` is no cut, or the part is empty.
        CheckpointError: the part holds impossible values.
    """
    if stop <= start:
        raise ValueError(f"a part must hold at least one feature, got {start}:{stop}")
    part, before = bones.slice(dim, start, stop).tensors(), bones.slice(dim, 0, start).tensors()
    tensors = {f"{name}.{suffix}": tensor for suffix, tensor in part.items()}
    starts = {f"{name}.{suffix}": tuple(tensor.shape) for suffix, tensor in before.items()}
    return type(bones).read(_Part(source, tensors, starts), name)


def take_rows(source: SlicedSource, name: str, shape: tuple[int, int], start: int, stop: int) -> Tensor:
    """Read rows of a floating-point table, [stop - start, C] of [V, C], and check them as `take` does.

    Raises:
        CheckpointError: the table is missing or has another shape, or the rows hold NaN or infinite values.
    """
    table = take(_Skeleton(source), name, shape, FLOATS)
    rows = _Part(source, {name: table[start:stop]}, {name: (start, 0)})
    return take(rows, name, (stop - start, shape[1]), FLOATS, finite=True)


@dataclass(frozen=True)
class _Skeleton:
    """A source whose matrices have shapes but no values."""

    source: Source

    @property
    def quant_config(self) -> dict[str, Any] | None:
        return self.source.quant_config

    def __contains__(self, name: str) -> bool:
        return name in self.source

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(name)

    def read(self, name: str) -> Tensor:
        shape = self.shape(name)
        return self.source.read(name) if len(shape) < 2 else torch.empty(shape, dtype=self.dtype(name), device=META)

    def error(self, name: str | None, problem: str) -> CheckpointError:
        return self.source.error(name, problem)


@dataclass(frozen=True)
class _Part:
    """A source that holds parts of the tensors of another one."""

    source: SlicedSource
    tensors: dict[str, Tensor]  # by full name; those on the meta device are still to be read
    starts: dict[str, tuple[int, ...]]  # where they begin in the stored tensor, per dimension

    @property
    def quant_config(self) -> dict[str, Any] | None:
        return self.source.quant_config

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        if not tensor.is_meta:
            return tensor
        whole, part = self.source.shape(name), self.shape(name)
        cut = [dim for dim in range(len(part)) if part[dim] != whole[dim]]
        if not cut:
            return self.source.read(name)
        (dim,), start = cut, self.starts[name]
        return self.source.read_slice(name, dim, start[dim], start[dim] + part[dim])

    def error(self, name: str | None, problem: str) -> CheckpointError:
        return self.source.error(name, problem)
