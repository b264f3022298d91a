"""Tiny mixtures of experts and their quantized versions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qinfer.quant import AWQWeight, EXL2Weight, GPTQWeight, Weight
from tests.models import tiny

MIXTRAL = {"num_local_experts": 5}
QWEN3 = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "head_dim": 32,
}


def shuffled(module: str, size: int) -> Tensor:
    """Every expert has an order of its own, which gate and up share."""
    seed = sum(map(ord, module.replace("up_proj", "gate_proj").replace("w3", "w1")))
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def some_shuffled(module: str, size: int) -> Tensor | None:
    """Experts that calibration never saw keep their order; gate and up of the others differ."""
    if ".experts.1." in module or ".experts." not in module:
        return None
    return torch.randperm(size, generator=torch.Generator().manual_seed(sum(map(ord, module))))


def exl2(module: str, w: Tensor) -> Weight:
    """Experts of one layer have one mix of widths, as ExLlamaV2 writes them; gate has another than up."""
    bits = {3: 1.0} if module.endswith(("gate_proj", "w1")) else {5: 0.5, 4: 0.5}
    return EXL2Weight.quantize(w, bits=bits, permutation=shuffled(module, w.shape[0]))


def exl2_mixed(module: str, w: Tensor) -> Weight:
    """Every second expert has other widths."""
    return EXL2Weight.quantize(w, bits={6: 0.5, 2: 0.5} if ".experts.1." in module or ".experts.3." in module else 4)


QUANTIZE: dict[str, Callable[[str, Tensor], Weight]] = {
    "gptq": lambda _, w: GPTQWeight.quantize(w, group_size=32, symmetric=False),
    "gptq act-order": lambda m, w: GPTQWeight.quantize(w, group_size=32, act_order=shuffled(m, w.shape[0])),
    "gptq some act-order": lambda m, w: GPTQWeight.quantize(w, group_size=32, act_order=some_shuffled(m, w.shape[0])),
    "awq": lambda _, w: AWQWeight.quantize(w, group_size=32),
    "exl2": exl2,
    "exl2 mixed": exl2_mixed,
}


def quantize(source: Path, path: Path, twin: Path, kind: str) -> None:
    """Write a quantized version of a dense checkpoint, routers left as they are, and a dense one of its values."""
    packed: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.endswith((*tiny.LINEARS, "w1", "w2", "w3")):
            weight = QUANTIZE[kind](module, tensor.float().t())
            packed |= {f"{module}.{suffix}": value.contiguous() for suffix, value in weight.tensors().items()}
            dense[name] = weight.dequantize().t().contiguous()
        else:
            packed[name] = dense[name] = tensor
    for folder, tensors in ((path, packed), (twin, dense)):
        folder.mkdir()
        (folder / "config.json").write_text((source / "config.json").read_text())
        save_file(tensors, folder / "model.safetensors")
    tiny.edit_config(path, quantization_config=weight.quant_config)
