"""Random LoRA folders, and dense models with an adapter merged into their matrices."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qinfer.checkpoint import Checkpoint
from qinfer.models.architectures import read_config
from qinfer.models.parameters import CheckpointParameters
from tests.models import tiny

ALL = tiny.LINEARS


def sizes(model: Path) -> dict[str, tuple[int, int]]:
    """(K, N) of every projection of a checkpoint, by the name of its module."""
    config = read_config(Checkpoint(model))
    hidden, mlp = config.hidden_size, config.mlp_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {"q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden)}
    shapes |= {"gate_proj": (hidden, mlp), "up_proj": (hidden, mlp), "down_proj": (mlp, hidden)}
    group = {name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn" for name in shapes}
    layers = range(config.num_layers)
    return {f"model.layers.{i}.{group[name]}.{name}": shape for i in layers for name, shape in shapes.items()}


def save(
    path: Path, model: Path, *, rank: int = 4, targets: Iterable[str] = ALL, seed: int = 0, **config: Any
) -> dict[str, Tensor]:
    """Write a random adapter as PEFT does, and return what it adds to each matrix: module -> [N, K]."""
    generator = torch.Generator().manual_seed(seed)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "bias": "none", "target_modules": list(targets)}
    settings |= config
    tensors, deltas = {}, {}
    for module, (k, n) in sizes(model).items():
        kind = module.rpartition(".")[2]
        if kind in targets:
            r = settings.get("rank_pattern", {}).get(kind, rank)
            alpha = settings.get("alpha_pattern", {}).get(kind, settings["lora_alpha"])
            a = torch.randn(r, k, generator=generator) / math.sqrt(k)
            b = torch.randn(n, r, generator=generator) / 3
            tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
            deltas[module] = alpha / (math.sqrt(r) if settings.get("use_rslora") else r) * b @ a
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, path / "adapter_model.safetensors")
    return deltas


def merge(model: Path, deltas: dict[str, Tensor], path: Path) -> Path:
    """Write a dense fp32 checkpoint of a model's values, in whatever format they are stored, plus an adapter."""
    checkpoint = Checkpoint(model)
    parameters = CheckpointParameters(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    modules = {**sizes(model), "lm_head": None}
    tensors = {}
    for file in model.glob("*.safetensors"):
        tensors |= {n: t.float() for n, t in load_file(file).items() if n.rpartition(".")[0] not in modules}
    config = read_config(checkpoint)
    for module, shape in modules.items():
        shape = shape or (config.hidden_size, config.vocab_size)
        weight, _ = parameters.weight(module, shape, has_bias=False)
        tensors[f"{module}.weight"] = weight.dequantize().t() + deltas.get(module, 0.0)
    path.mkdir()
    settings = {**checkpoint.config, "tie_word_embeddings": False}
    settings.pop("quantization_config", None)
    (path / "config.json").write_text(json.dumps(settings))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path
