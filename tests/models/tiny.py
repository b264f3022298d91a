"""Tiny random checkpoints, written by transformers, and their quantized versions, for tests of many floors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from qinfer.quant import GPTQWeight, Weight

VOCAB = 199  # not a multiple of anything, as many real ones
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
}


def save(path: Path, model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Write a random model and return it, in fp32, as the oracle.

    Weights are large enough for logits of a few units that depend on every layer, and norms and biases differ from one
    and zero, so that leaving any of them out shows.

    Args:
        path: folder to make.
        model_type: key of the table above.
        seed: of the weights.
        dtype: of the stored tensors; the oracle computes with the rounded values in fp32.
        changes: fields of the config that differ from the tiny default.
    """
    config_class, model_class = _CLASSES[model_type]
    config = config_class(**{**_SIZES, "tie_word_embeddings": False, **changes}, attn_implementation="eager")
    model = model_class(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2:  # transformers holds the matrices of experts in one tensor
            value = noise * (1.5 / math.sqrt(parameter.shape[-1]))
        else:
            value = 0.3 * noise if name.endswith("bias") else 1 + 0.2 * noise
        parameter.data.copy_(value.to(dtype))
    model.to(dtype).save_pretrained(path)
    return model.float().eval()


def oracle_logits(oracle: Any, token_ids: list[int]) -> Tensor:
    """Return [T, V] fp32 logits of transformers."""
    with torch.inference_mode():
        return oracle(torch.tensor([token_ids])).logits[0].float()


def prompt(length: int, *, seed: int = 0) -> list[int]:
    """Return random token ids."""
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def edit(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite the tensors of a single-file checkpoint."""
    file = path / "model.safetensors"
    # Clones: the file must not stay mapped while it is written.
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def edit_config(path: Path, **changes: Any) -> None:
    """Set fields of config.json."""
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def quantize(
    source: Path, path: Path, twin: Path, *, order: Callable[[str, int], Tensor | None], **options: Any
) -> None:
    """Write a GPTQ version of a dense checkpoint, and a dense checkpoint of exactly its values.

    Args:
        source: dense checkpoint.
        path: folder for the quantized one.
        twin: folder for its dequantized twin.
        order: (module, K) to the act-order permutation of its input features, or None.
        options: of `GPTQWeight.quantize`.
    """
    store(source, path, twin, lambda module, w: GPTQWeight.quantize(w, act_order=order(module, len(w)), **options))


def store(source: Path, path: Path, twin: Path, make: Callable[[str, Tensor], Weight]) -> None:
    """Write a quantized version of a dense checkpoint, and a dense checkpoint of exactly its values.

    Args:
        source: dense checkpoint.
        path: folder for the quantized one.
        twin: folder for its dequantized twin.
        make: (module, [K, N] its matrix) to what is stored.
    """
    stored = load_file(source / "model.safetensors")
    packed: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    weight: Weight | None = None
    for name, tensor in stored.items():
        module = name.removesuffix(".weight")
        if not module.endswith(LINEARS):
            packed[name] = dense[name] = tensor
            continue
        weight = make(module, tensor.float().t())
        packed |= {f"{module}.{suffix}": value for suffix, value in weight.tensors().items()}
        dense[name] = weight.dequantize().t()
    assert weight is not None
    for folder, tensors in ((path, packed), (twin, dense)):
        folder.mkdir()
        (folder / "config.json").write_text((source / "config.json").read_text())
        save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors")
    edit_config(path, quantization_config=weight.quant_config)
