"""What the ops demand of their tensors: every refusal names the argument, the expectation and what came."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INDICES = (torch.int32, torch.int64)


def check_float(name: str, dtype: torch.dtype) -> None:
    """Raise TypeError unless `dtype` is one that the kernels load and store."""
    if dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16 or float32, got {dtype}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """Raise ValueError unless the shape is `expected`, in which a letter stands for any size."""
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(
        want != got for want, got in zip(expected, shape, strict=True) if not isinstance(want, str)
    ):
        raise ValueError(f"{name} must be [{', '.join(map(str, expected))}], got {list(shape)}")


def check_rows(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the last dimension is dense; the others may be strided."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must have last stride 1, got strides {list(tensor.stride())}")


def check_int32(**tensors: Tensor) -> None:
    """Raise TypeError or ValueError unless every tensor is of int32 and dense in its last dimension."""
    for name, tensor in tensors.items():
        check_rows(name, tensor)
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be torch.int32, got {tensor.dtype}")


def check_device(first: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless every tensor lives where the first one does."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{name} must be on {first.device}, got {tensor.device}")


def check_chosen(logits: Tensor, out: Tensor | None, host: Tensor | None) -> None:
    """Raise unless the ids that are chosen from logits [R, V] can be written to `out` and `host`, where there are such.

    Raises:
        TypeError: one is not int64.
        ValueError: a shape or a stride is wrong, or the memory is not where the device can write it.
    """
    for name, ids in (("out", out), ("host", host)):
        if ids is not None:
            check_shape(name, ids, (logits.shape[0],))
            check_rows(name, ids)
            if ids.dtype != torch.int64:
                raise TypeError(f"{name} must be int64, got {ids.dtype}")
    check_device(logits, out=out)
    if host is not None and (host.is_cuda or (logits.is_cuda and not host.is_pinned())):
        raise ValueError(f"host must be in page-locked memory of the host, got memory of {host.device}")


def check_index(name: str, index: Tensor, length: int | str, *, start: int = 0, stop: int) -> None:
    """Raise unless `index` is a dense vector of integers in [start, stop); on a GPU the values are not looked at.

    Args:
        name: what the caller calls the vector.
        index: [length] int32 or int64.
        length: its expected length, or the letter that stands for any length.
        start: smallest value allowed.
        stop: smallest value that is too large.

    Raises:
        TypeError: the dtype is no index dtype.
        ValueError: wrong shape or stride, or, on a CPU tensor, a value out of range.
    """
    if index.dtype not in INDICES:
        raise TypeError(f"{name} must be int32 or int64, got {index.dtype}")
    check_shape(name, index, (length,))
    check_rows(name, index)
    # Looking at values on a GPU would stall it.
    if not index.is_cuda:
        bad = index[(index < start) | (index >= stop)]
        if bad.numel():
            raise ValueError(f"{name} must be in [{start}, {stop}), got {int(bad[0])}")
