"""The exceptions of qinfer. Callers' mistakes are plain ValueError and TypeError; everything else is a QinferError."""

from __future__ import annotations

from pathlib import Path


class QinferError(Exception):
    """Base class of every error that qinfer raises on purpose, apart from ValueError and TypeError."""


class CheckpointError(QinferError):
    """A file of a checkpoint is missing, damaged or contradicts itself."""

    def __init__(self, file: str | Path, tensor: str | None, problem: str) -> None:
        """Name the file, the tensor (None when the file as a whole is meant) and what is wrong with it."""
        self.file = str(file)
        self.tensor = tensor
        self.problem = problem
        where = f"{file}: {tensor}" if tensor else f"{file}"
        super().__init__(f"{where}: {problem}")


class UnsupportedError(QinferError):
    """The request is well formed, but this hardware or this version cannot honour it; the text says what would work."""


class PlanError(QinferError):
    """A model cannot be placed on the devices at hand."""


class GroupError(QinferError):
    """The processes that share a model are no longer all there and well; the text names the rank and the cause."""


class OutOfPages(QinferError):
    """The page pool cannot serve an allocation now; the scheduler catches it."""


class NonFiniteLogits(QinferError):
    """A forward pass gave NaN or infinite logits for a request."""
