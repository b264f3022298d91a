"""What the functions of an extension module have in common: their errors, optional tensors, and handles.

The compiled extensions report every mistake as RuntimeError; qinfer reports ValueError and TypeError. The errors of
this package are both, so `except RuntimeError` in a program written for an extension still catches them.

An optional argument of an extension is a tensor on the "meta" device where there is nothing to pass; None is understood
too. A handle is a positive integer, unique in the process across all kinds of handles, and never used twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import count
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from qinfer.errors import QinferError
from qinfer.kernels.checks import check_device, check_rows, check_shape

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_handles = count(1)


class ExtensionValueError(ValueError, RuntimeError):
    """An argument of an extension function has a value, a shape or a device that does not fit."""


class ExtensionTypeError(TypeError, RuntimeError):
    """An argument of an extension function has the wrong type or dtype."""


class ExtensionReadError(OSError, RuntimeError):
    """An extension function could not read a file."""


def extension(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function raise the errors of this module, with the text and the cause of the original."""

    @wraps(function)
    def bound(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (ExtensionValueError, ExtensionTypeError, ExtensionReadError):
            raise
        except TypeError as error:
            raise ExtensionTypeError(str(error)) from error
        except (ValueError, QinferError) as error:
            raise ExtensionValueError(str(error)) from error
        except OSError as error:
            raise ExtensionReadError(str(error)) from error

    return bound


def optional(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor; None for a tensor on the meta device, the extensions' way to pass nothing."""
    return None if tensor is None or tensor.is_meta else tensor


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | str, ...]) -> None:
    """Raise unless a tensor has one dtype and a shape, in which a letter stands for any size.

    Raises:
        TypeError: it has another dtype, or is no tensor.
        ValueError: it has another shape, or rows that are not dense.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}")
    check_shape(name, tensor, shape)
    if tensor.dim():
        check_rows(name, tensor)


def check_together(first: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless every tensor that is given lives where the first one does, which is not "meta"."""
    if first.is_meta:
        raise ValueError("a tensor on the meta device stands for nothing and cannot be computed with")
    check_device(first, **others)


class Handles(Generic[T]):
    """Objects that callers know by a number."""

    def __init__(self, kind: str) -> None:
        """Start empty; `kind` is what errors call the objects."""
        self._kind = kind
        self._objects: dict[int, T] = {}

    def __len__(self) -> int:
        return len(self._objects)

    def add(self, item: T) -> int:
        """Keep an object and return its handle."""
        handle = next(_handles)
        self._objects[handle] = item
        return handle

    def find(self, handle: int) -> T:
        """Return the object of a handle.

        Raises:
            ValueError: the handle was freed, or belongs to something else.
        """
        if handle not in self._objects:
            raise ValueError(f"handle {handle!r} is no {self._kind}: it was freed, or never was one")
        return self._objects[handle]

    def free(self, handle: int) -> None:
        """Forget the object of a handle.

        Raises:
            ValueError: the handle was freed before, or belongs to something else.
        """
        self.find(handle)
        del self._objects[handle]

    def clear(self) -> None:
        """Forget all objects."""
        self._objects.clear()
