"""LoRA adapters as PEFT saves them: a folder with adapter_config.json and adapter_model.safetensors.

    W' = W + scale B A
    base_model.model.<module>.lora_A.weight [r, K],   base_model.model.<module>.lora_B.weight [N, r]

A and B are matrices as torch keeps them; the scale follows from the config (`peft_config.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from qinfer.checkpoint import read_tensors
from qinfer.errors import CheckpointError, UnsupportedError
from qinfer.kernels.checks import FLOATS
from qinfer.models.peft_config import AdapterConfig

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Pair:
    """The two matrices of one module."""

    a: Tensor  # [r, K]
    b: Tensor  # [N, r], without the scale
    scale: float

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.a.shape[0]


def read_adapter(folder: str | Path, modules: Mapping[str, tuple[int, int]]) -> dict[str, Pair]:
    """Read an adapter and check that it fits a model.

    Args:
        folder: where PEFT's `save_pretrained` wrote it.
        modules: (K, N) of every module of the model that an adapter may change.

    Returns:
        The matrices by the name of their module, on the CPU.

    Raises:
        CheckpointError: a file is missing, damaged or contradicts the other, or a tensor does not fit the model.
        UnsupportedError: the adapter does something that is not done here; the text names it.
    """
    file, config = Path(folder) / TENSOR_FILE, AdapterConfig.read(Path(folder) / CONFIG_FILE)
    tensors = read_tensors(file)
    pairs = {}
    for name in sorted(tensors):
        module = _module(file, name)
        if module not in modules:
            raise CheckpointError(file, name, f"the model has no module {module} that an adapter may change")
        if name.endswith(_A):
            partner = tensors.get(f"{_PREFIX}{module}{_B}")
            if partner is None:
                raise CheckpointError(file, name, "has no lora_B beside it")
            rank, scale = config.rank_and_scale(module)
            in_features, out_features = modules[module]
            _check(file, name, tensors[name], (rank, in_features))
            _check(file, f"{_PREFIX}{module}{_B}", partner, (out_features, rank))
            pairs[module] = Pair(tensors[name], partner, scale)
        elif f"{_PREFIX}{module}{_A}" not in tensors:
            raise CheckpointError(file, name, "has no lora_A beside it")
    if not pairs:
        raise CheckpointError(file, None, "holds no adapter")
    return pairs


def _module(file: Path, name: str) -> str:
    """Return the module that a tensor belongs to."""
    for suffix in (_A, _B):
        if name.startswith(_PREFIX) and name.endswith(suffix):
            return name.removeprefix(_PREFIX).removesuffix(suffix)
    if "lora_embedding_" in name:
        raise UnsupportedError(f"{file}: {name}: adapters of embeddings are not supported; those of projections are")
    raise CheckpointError(file, name, f"must be {_PREFIX}<module>{_A} or {_B}: nothing else is read")


def _check(file: Path, name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    """Raise unless a tensor is a finite floating-point matrix of a shape."""
    if tuple(tensor.shape) != shape:
        raise CheckpointError(file, name, f"must be {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in FLOATS:
        raise CheckpointError(file, name, f"must be float16, bfloat16 or float32, got {tensor.dtype}")
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(file, name, "holds NaN or infinite values")
