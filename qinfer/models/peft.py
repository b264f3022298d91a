"""LoRA adapters as PEFT saves them: a folder with adapter_config.json and adapter_model.safetensors.

    W' = W + scale B A,   scale = alpha / r, or alpha / sqrt(r) with use_rslora
    base_model.model.<module>.lora_A.weight [r, K],   base_model.model.<module>.lora_B.weight [N, r]

r and alpha are those of `rank_pattern` and `alpha_pattern` where the module's name ends in one of their keys. What
would change the results and is not computed here is refused by its name, an option that nobody knew when this was
written too; what only concerns training is passed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qinfer.checkpoint import read_json, read_tensors
from qinfer.errors import CheckpointError, UnsupportedError
from qinfer.kernels.checks import FLOATS

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 512

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"}
# Which modules were trained shows in the tensors; the others concern training, or say where the file comes from.
_IDLE = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type", "velora_config",
}  # fmt: skip
_REFUSED = {
    "use_dora": "DoRA rescales the merged matrix, which a quantized one is not",
    "modules_to_save": "it replaces whole modules of the model",
    "lora_bias": "biases of adapters are not added",
    "fan_in_fan_out": "its matrices are stored transposed, as no matrix of the models here is",
    "trainable_token_indices": "it replaces rows of the embedding",
    "alora_invocation_tokens": "it starts to act in the middle of a prompt",
    "layer_replication": "it repeats layers of the model",
    "target_parameters": "it changes parameters that are no modules of their own",
}
# These begin with a part of the model's matrices, so the adapter is one of another model than the one it names.
_FOREIGN_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
    file, config_file = Path(folder) / TENSOR_FILE, Path(folder) / CONFIG_FILE
    config = read_json(config_file)
    _refuse(config_file, config)
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
            rank, scale = _rank_and_scale(config_file, config, module)
            in_features, out_features = modules[module]
            _check(file, name, tensors[name], (rank, in_features))
            _check(file, f"{_PREFIX}{module}{_B}", partner, (out_features, rank))
            pairs[module] = Pair(tensors[name], partner, scale)
        elif f"{_PREFIX}{module}{_A}" not in tensors:
            raise CheckpointError(file, name, "has no lora_A beside it")
    if not pairs:
        raise CheckpointError(file, None, "holds no adapter")
    return pairs


def _refuse(file: Path, config: dict[str, Any]) -> None:
    """Raise where the config asks for something that is not done here."""
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(f"{file}: peft_type {config.get('peft_type')!r} is not supported; 'LORA' is")
    if config.get("bias", "none") != "none":
        raise UnsupportedError(f"{file}: bias={config['bias']!r} is not supported: it changes biases; 'none' is")
    for name, reason in _REFUSED.items():
        if config.get(name):
            raise UnsupportedError(f"{file}: {name}={config[name]!r} is not supported: {reason}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_FOREIGN_STARTS):
        raise UnsupportedError(
            f"{file}: init_lora_weights={start!r} is not supported: the adapter belongs to a model whose matrices were "
            "changed when training began; PEFT converts it if save_pretrained is given "
            "path_initial_model_for_weight_conversion"
        )
    for name, value in config.items():
        if name not in _READ | _IDLE | _REFUSED.keys() | {"bias", "megatron_config"} and value:
            raise UnsupportedError(f"{file}: the option {name}={value!r} is not known here; null or false would do")


def _module(file: Path, name: str) -> str:
    """Return the module that a tensor belongs to."""
    for suffix in (_A, _B):
        if name.startswith(_PREFIX) and name.endswith(suffix):
            return name.removeprefix(_PREFIX).removesuffix(suffix)
    if "lora_embedding_" in name:
        raise UnsupportedError(f"{file}: {name}: adapters of embeddings are not supported; those of projections are")
    raise CheckpointError(file, name, f"must be {_PREFIX}<module>{_A} or {_B}: nothing else is read")


def _rank_and_scale(file: Path, config: dict[str, Any], module: str) -> tuple[int, float]:
    """Return r and the scale of a module."""
    rank = _patterned(file, config, "rank_pattern", module, config.get("r"))
    alpha = _patterned(file, config, "alpha_pattern", module, config.get("lora_alpha"))
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise CheckpointError(file, None, f"the rank r of {module} must be 1 to {MAX_RANK}, got {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(file, None, f"lora_alpha of {module} must be a number, got {alpha!r}")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _patterned(file: Path, config: dict[str, Any], option: str, module: str, default: object) -> object:
    """Return what a table of patterns says about a module; the first pattern that fits counts."""
    patterns = config.get(option) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(file, None, f"{option} must be an object, got {patterns!r}")
    for pattern, value in patterns.items():
        # PEFT takes them for regular expressions; names are what they are in practice.
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not name.replace(".", "").replace("_", "").isalnum():
            problem = f"{option}: {pattern!r} is not supported: it must be a module's name or its end"
            raise UnsupportedError(f"{file}: {problem}")
        if module == name or (module.endswith(f".{name}") and not pattern.startswith("^")):
            return value
    return default


def _check(file: Path, name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    """Raise unless a tensor is a finite floating-point matrix of a shape."""
    if tuple(tensor.shape) != shape:
        raise CheckpointError(file, name, f"must be {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in FLOATS:
        raise CheckpointError(file, name, f"must be float16, bfloat16 or float32, got {tensor.dtype}")
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(file, name, "holds NaN or infinite values")
