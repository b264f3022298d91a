"""What adapter_config.json says: rank and scale of every module, and what cannot be served.

    scale = alpha / r, or alpha / sqrt(r) with use_rslora

r and alpha are those of `rank_pattern` and `alpha_pattern` where the module's name ends in one of their keys. What
would change the results and is not computed here is refused by its name, an option that nobody knew when this was
written too; what only concerns training is passed over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qinfer.checkpoint import read_json
from qinfer.errors import CheckpointError, UnsupportedError

MAX_RANK = 512

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
class AdapterConfig:
    """The config of a LoRA adapter that can be served."""

    file: Path
    values: dict[str, Any]

    @classmethod
    def read(cls, file: Path) -> AdapterConfig:
        """Read a config.

        Raises:
            CheckpointError: the file is missing or damaged.
            UnsupportedError: it asks for something that is not done here.
        """
        values = read_json(file)
        _refuse(file, values)
        return cls(file, values)

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """Return r and the scale of a module.

        Raises:
            CheckpointError: one of them is no such number.
            UnsupportedError: a pattern is more than the name of modules.
        """
        rank = self._of("rank_pattern", module, self.values.get("r"))
        alpha = self._of("alpha_pattern", module, self.values.get("lora_alpha"))
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
            problem = f"the rank r of {module} must be 1 to {MAX_RANK}, got {rank!r}"
            raise CheckpointError(self.file, None, problem)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise CheckpointError(self.file, None, f"lora_alpha of {module} must be a number, got {alpha!r}")
        return rank, alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def _of(self, option: str, module: str, default: object) -> object:
        """Return what a table of patterns says about a module; the first pattern that fits counts."""
        patterns = self.values.get(option) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(self.file, None, f"{option} must be an object, got {patterns!r}")
        for pattern, value in patterns.items():
            # PEFT takes them for regular expressions; names are what they are in practice.
            name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if not name.replace(".", "").replace("_", "").isalnum():
                problem = f"{option}: {pattern!r} is not supported: it must be a module's name or its end"
                raise UnsupportedError(f"{self.file}: {problem}")
            if module == name or (module.endswith(f".{name}") and not pattern.startswith("^")):
                return value
        return default


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
