"""Parameters: where a decoder gets its matrices and tables, whole or in parts, from a checkpoint or from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from qinfer.checkpoint import Checkpoint
from qinfer.errors import CheckpointError, PlanError
from qinfer.models.layers import Linear
from qinfer.parallel.plan import Span
from qinfer.quant import weight_class, without_padding
from qinfer.quant.part import read_part, skeleton, take_rows
from qinfer.quant.weight import FLOATS, Dim, Weight, take

# Tables that old files store although they follow from the config.
_IGNORED = "rotary_emb.inv_freq"


class Parameters(Protocol):
    """Where a decoder gets its parameters: a checkpoint, or a generator of synthetic ones."""

    def linear(self, name: str, shape: tuple[int, int], *, has_bias: bool) -> Linear:
        """Return the matrix (K, N) of a module, ready to multiply."""
        ...

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a floating-point tensor that no matrix product reads: a norm's weight, the embedding."""
        ...

    def part(self, name: str, shape: tuple[int, int], dim: Dim, span: Span, *, has_bias: bool) -> Linear:
        """Return a part of the matrix (K, N) of a module; one along the input keeps the whole bias."""
        ...

    def rows(self, name: str, shape: tuple[int, int], span: Span) -> Tensor:
        """Return some rows of a table."""
        ...

    def may_cut(self, name: str, shape: tuple[int, int], positions: Sequence[int]) -> bool:
        """Say whether the matrix (K, N) of a module may be cut along its input at all of some positions."""
        ...

    def leave(self, name: str) -> None:
        """Leave a module to other ranks."""
        ...


class _ReadRecorder:
    """A checkpoint that reads to one device and remembers which tensors were read.

    Weights are checked and repacked there: a GPU looks through a tensor faster than a host can.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._read: set[str] = set()

    @property
    def quant_config(self) -> dict[str, Any] | None:
        return self._checkpoint.quant_config

    def __contains__(self, name: str) -> bool:
        return name in self._checkpoint

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._checkpoint.dtype(name)

    def read(self, name: str) -> Tensor:
        self._read.add(name)
        return self._checkpoint.read(name, self._device)

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        self._read.add(name)
        return self._checkpoint.read_slice(name, dim, start, stop, self._device)

    def leave(self, prefix: str) -> None:
        """Count the tensors below a prefix as read: another rank reads them."""
        self._read.update(name for name in self._checkpoint.names() if name.startswith(prefix))

    def error(self, name: str | None, problem: str) -> CheckpointError:
        return self._checkpoint.error(name, problem)

    def unread(self) -> list[str]:
        return sorted(self._checkpoint.names() - self._read)


class CheckpointParameters:
    """The parameters of a checkpoint, converted for a device and a dtype as they are asked for."""

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> None:
        """Read from `checkpoint`, put on `device`, prepare for activations of `dtype`."""
        self._source = _ReadRecorder(checkpoint, device)
        self._device = device
        self._dtype = dtype

    def linear(self, name: str, shape: tuple[int, int], *, has_bias: bool) -> Linear:
        """Read a matrix in whatever format it is stored, and lay it out for the kernels; see `weight`."""
        weight, bias = self.weight(name, shape, has_bias=has_bias)
        operand = weight.operand(self._device, self._dtype)
        return Linear(operand, None if bias is None else bias.to(self._device))

    def weight(self, name: str, shape: tuple[int, int], *, has_bias: bool) -> tuple[Weight, Tensor | None]:
        """Read a matrix in whatever format it is stored, and its bias.

        A bias of zeros that the config knows nothing of is dropped: old GPTQ files have one beside every matrix.

        Args:
            name: the module.
            shape: (K, N) that it must have.
            has_bias: whether it must have a bias.

        Raises:
            CheckpointError: something is missing or does not fit.
            UnsupportedError: the format is not served.
        """
        weight = weight_class(self._source.quant_config, name, self._source).read(self._source, name)
        return self._checked(name, without_padding(weight, shape[1]), shape, has_bias=has_bias)

    def part(self, name: str, shape: tuple[int, int], dim: Dim, span: Span, *, has_bias: bool) -> Linear:
        """Read a part of the matrix (K, N) of a module; one along the input keeps the whole bias.

        Raises:
            CheckpointError: something is missing or does not fit.
            UnsupportedError: the format is not served.
            PlanError: the format cannot be cut there.
        """
        bones = self._skeleton(name, shape)
        cuts = bones.cuts(dim)
        if not set(span) <= set(cuts):
            step = f"multiples of {cuts[1]}" if len(cuts) > 1 else "nowhere"
            raise PlanError(
                f"{name} would be cut at {span[0]} and {span[1]} of its {dim}puts, but as it is stored it can be cut "
                f"at {step} only; fewer GPUs, or a split of other ratios, would help"
            )
        part = read_part(self._source, name, bones, dim, *span)
        length = span[1] - span[0]
        cut_shape = (length, shape[1]) if dim == "in" else (shape[0], length)
        weight, bias = self._checked(name, without_padding(part, cut_shape[1]), cut_shape, has_bias=has_bias)
        return Linear(weight.operand(self._device, self._dtype), None if bias is None else bias.to(self._device))

    def may_cut(self, name: str, shape: tuple[int, int], positions: Sequence[int]) -> bool:
        """Say whether a matrix (K, N) may be cut along its input at all of some positions."""
        return set(positions) <= set(self._skeleton(name, shape).cuts("in"))

    def leave(self, name: str) -> None:
        """Leave a module to other ranks, who check it."""
        self._source.leave(f"{name}.")

    def rows(self, name: str, shape: tuple[int, int], span: Span) -> Tensor:
        """Read some rows of a table, in its stored dtype."""
        if span[0] == span[1]:
            self._source.leave(name)
            return torch.empty(0, shape[1], dtype=self._source.dtype(name), device=self._device)
        return take_rows(self._source, name, shape, *span).to(self._device)

    def _skeleton(self, name: str, shape: tuple[int, int]) -> Weight:
        """Read a matrix without its values."""
        bones = skeleton(weight_class(self._source.quant_config, name, self._source), self._source, name)
        bones = without_padding(bones, shape[1])
        self._check_shape(name, bones, shape)
        return bones

    def _checked(
        self, name: str, weight: Weight, shape: tuple[int, int], *, has_bias: bool
    ) -> tuple[Weight, Tensor | None]:
        """Return a matrix and the bias that it shall have, after checking both."""
        self._check_shape(name, weight, shape)
        bias = weight.bias
        if has_bias and bias is None:
            raise self._source.error(f"{name}.bias", "the tensor is missing")
        if not has_bias and bias is not None:
            if bias.count_nonzero():
                raise self._source.error(f"{name}.bias", "must be absent or zero: the config says there is no bias")
            bias = None
        return weight, bias

    def _check_shape(self, name: str, weight: Weight, shape: tuple[int, int]) -> None:
        stored = f"{name}.{next(iter(weight.tensors()))}"
        if tuple(weight.shape) != shape:
            raise self._source.error(
                stored, f"must map {shape[0]} features to {shape[1]}, got {weight.shape[0]} to {weight.shape[1]}"
            )

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read a norm's weight or an embedding, in its stored dtype.

        EXL2 files repeat the weight of a norm over heads once per head; such copies count as the one that they are.

        Raises:
            CheckpointError: the tensor is missing, does not fit, or is not finite.
        """
        if name in self._source and len(shape) == 1 and self._source.shape(name)[1:] == shape:
            copies = take(self._source, name, (None, *shape), FLOATS, finite=True)
            if not copies.shape[0] or bool((copies != copies[0]).any()):
                raise self._source.error(name, f"must be one weight of shape {list(shape)} or copies of one")
            return copies[0].to(self._device)
        return take(self._source, name, shape, FLOATS, finite=True).to(self._device)

    def leftovers(self, prefix: str) -> list[str]:
        """Return the tensors below `prefix` that were not read and should have been."""
        return [name for name in self._source.unread() if name.startswith(prefix) and not name.endswith(_IGNORED)]

    def check_leftovers(self, prefix: str) -> None:
        """Raise if a tensor below `prefix` was not read.

        Raises:
            CheckpointError: names the first such tensor.
        """
        left = self.leftovers(prefix)
        if left:
            more = f"; {len(left) - 1} more are left over" if len(left) > 1 else ""
            raise self._source.error(left[0], f"nothing in this architecture uses the tensor{more}")
