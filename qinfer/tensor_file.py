"""Files of tensors that qinfer writes and reads back itself: safetensors with a few texts about them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qinfer.errors import CheckpointError


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write a file whole or not at all; one of this name is replaced.

    Args:
        path: the file.
        tensors: what it holds, on a CPU and contiguous.
        about: texts beside the tensors.

    Raises:
        OSError: it cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(dict(tensors), unfinished, metadata=dict(about))
        unfinished.replace(path)
    except SafetensorError as problem:
        raise OSError(f"{path} cannot be written: {problem}") from problem
    finally:
        unfinished.unlink(missing_ok=True)


class TensorFile:
    """A file of tensors, read one by one.

    Attributes:
        path: the file.
        about: the texts beside the tensors.
        names: of the tensors.
    """

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            CheckpointError: it is missing, cut short, or something else.
        """
        self.path = path
        if not path.is_file():
            raise CheckpointError(path, None, "is missing")
        try:
            handle: Any = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as problem:
            raise CheckpointError(path, None, f"cannot be opened as safetensors: {problem}") from problem
        self._file = handle
        self.about: dict[str, str] = handle.metadata() or {}
        self.names: frozenset[str] = frozenset(handle.keys())

    def read(self, name: str) -> Tensor:
        """Map a tensor that `names` has; its bytes are read when they are used."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor
