"""What a stored weight matrix can do, and how its tensors are taken from a checkpoint and checked on the way.

The logical matrix is always W [K, N] with y = x W. How it lies in the file is the format's own business. `read` takes
everything from its source: the tensors under `name.`, and from `source.quant_config` the options that the file states
once for all matrices.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from qinfer.errors import CheckpointError
from qinfer.kernels.operand import Operand

Dim = Literal["in", "out"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Source(Protocol):
    """Where stored tensors come from: a Checkpoint, or anything that answers like one."""

    @property
    def quant_config(self) -> dict[str, Any] | None:
        """`quantization_config` of the model; None when it has none."""
        ...

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Element type of a tensor, without reading it."""
        ...

    def read(self, name: str) -> Tensor:
        """Read a tensor."""
        ...

    def error(self, name: str | None, problem: str) -> CheckpointError:
        """Make the error that says what is wrong with a tensor, or with the checkpoint, and in which file."""
        ...


class Weight(Protocol):
    """One stored matrix, immutable."""

    @property
    def shape(self) -> tuple[int, int]:
        """(in_features K, out_features N)."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """[N], added after the product."""
        ...

    @property
    def quant_config(self) -> dict[str, Any] | None:
        """The `quantization_config` under which `read` understands `tensors()`."""
        ...

    @classmethod
    def read(cls, source: Source, name: str) -> Self:
        """Take the tensors under a module's name, without a trailing dot, and validate them.

        Raises:
            CheckpointError: a tensor is missing, has a wrong shape or dtype, or holds impossible values.
            UnsupportedError: the options are well formed, but not served.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by suffix, bit for bit what `read` took."""
        ...

    @classmethod
    def quantize(cls, w: Tensor, *args: Any, **options: Any) -> Self:  # noqa: ANN401 -- every format has its own options
        """Make a weight of w [K, N] by rounding to nearest."""
        ...

    def dequantize(self) -> Tensor:
        """Return W [K, N] in fp32, input features in their original order: slow and exact."""
        ...

    def cuts(self, dim: Dim) -> Sequence[int]:
        """Return the positions, ends included, at which the matrix may be cut; empty: it may not be cut at all."""
        ...

    def slice(self, dim: Dim, start: int, stop: int) -> Self:
        """Return the part between two cuts; an input slice keeps the whole bias.

        Raises:
            ValueError: `start` or `stop` is no cut, or they are in the wrong order.
        """
        ...

    def operand(self, device: torch.device, dtype: torch.dtype) -> Operand:
        """Return what kernels read, on a device, for activations of a dtype."""
        ...


def take(
    source: Source, name: str, shape: Sequence[int | None], dtypes: Collection[torch.dtype], *, finite: bool = False
) -> Tensor:
    """Read a tensor that must have a shape and one of some dtypes.

    Args:
        source: where it is.
        name: its full name.
        shape: expected sizes; None stands for any.
        dtypes: allowed element types.
        finite: refuse NaN and infinite values.

    Returns:
        The tensor, contiguous.

    Raises:
        CheckpointError: it is missing or is not what it must be.
    """
    if name not in source:
        raise source.error(name, "the tensor is missing")
    got, dtype = source.shape(name), source.dtype(name)
    if len(got) != len(shape) or any(want not in (None, size) for want, size in zip(shape, got, strict=True)):
        expected = ", ".join("any" if want is None else str(want) for want in shape)
        raise source.error(name, f"shape must be [{expected}], got {list(got)}")
    if dtype not in dtypes:
        allowed = " or ".join(str(allowed).removeprefix("torch.") for allowed in dtypes)
        raise source.error(name, f"dtype must be {allowed}, got {str(dtype).removeprefix('torch.')}")
    tensor = source.read(name).contiguous()
    if finite and not is_finite(tensor):
        raise source.error(name, "the tensor holds NaN or infinite values")
    return tensor


def take_bias(source: Source, name: str, out_features: int) -> Tensor | None:
    """Read the bias of a module, [N] in any float dtype; None when the module has none."""
    key = f"{name}.bias"
    return take(source, key, (out_features,), FLOATS, finite=True) if key in source else None


def is_finite(tensor: Tensor) -> bool:
    """Say whether every element is a number; looks at the extremes only, which costs one pass and no memory."""
    # A meta tensor stands for one whose values nobody reads, as when only headers are looked at.
    if not tensor.numel() or tensor.is_meta:
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def check_cut(cuts: Sequence[int], dim: Dim, start: int, stop: int) -> None:
    """Raise ValueError unless a matrix with these cuts may be sliced from start to stop."""
    if start not in cuts or stop not in cuts or start > stop:
        raise ValueError(f"a slice along {dim!r} must lie between two of the cuts {list(cuts)}, got {start}:{stop}")


def check_matrix(w: Tensor) -> None:
    """Raise unless w can be quantized: a floating-point matrix of finite numbers."""
    if w.dim() != 2:
        raise ValueError(f"w must be [K, N], got shape {list(w.shape)}")
    if not w.is_floating_point():
        raise TypeError(f"w must be a floating-point tensor, got {w.dtype}")
    if not is_finite(w):
        raise ValueError("w must be finite, got NaN or infinite values")
