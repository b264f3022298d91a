"""Formats that are known by the names of their tensors, and refused by name."""

from __future__ import annotations

import torch

from qinfer.errors import UnsupportedError
from qinfer.quant.weight import FLOATS, Source

WHAT_WORKS = "what works: EXL2, GPTQ, AWQ (gemm), compressed-tensors (pack-quantized), FP8 in blocks, and dense weights"
CONFIG_WORKS = (
    "what works: quantization_config in config.json, or AutoGPTQ's quantize_config.json beside it, "
    "that says how it was quantized"
)

# Suffix of a module's tensor -> the format that has it; the first that is there counts.
SUFFIXES = {
    ".trellis": "EXL3",
    ".W_q": "HQQ",
    ".weight.absmax": "bitsandbytes 4-bit",
    ".weight.quant_state.bitsandbytes__nf4": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes 8-bit",
    ".weight_SCB": "bitsandbytes 8-bit",
    "_blocks": "MXFP4 as gpt-oss stores it",
    ".weight_scale_2": "NVFP4 of ModelOpt",
    ".weight_global_scale": "NVFP4 of compressed-tensors",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "FP8 in blocks",
    ".weight_scale": "8-bit weights with a weight_scale",
    ".qweight": "GPTQ or AWQ",
}
# These can be read where `quantization_config` says how.
NEED_CONFIG = (".weight_packed", ".weight_scale_inv", ".qweight")


def refuse_foreign(source: Source, name: str) -> None:
    """Raise if a module's tensors are those of a format that is not served, or not without a config that fits.

    Raises:
        UnsupportedError: names the format, the tensor, and what works.
    """
    layer = name.partition(".experts.")[0].rpartition(".")[0]
    if layer and f"{layer}.mlp.experts.gate_up_proj" in source:
        raise UnsupportedError(
            f"the experts of {layer} are stored as one tensor, {layer}.mlp.experts.gate_up_proj, which cannot be read; "
            "what works: one tensor per expert, as transformers writes with save_pretrained(save_original_format=True)"
        )
    for suffix, label in SUFFIXES.items():
        tensor = f"{name}{suffix}"
        if tensor not in source:
            continue
        found = f"{name} is stored as {_detail(source, name, suffix) or label} (it has {tensor})"
        method = (source.quant_config or {}).get("quant_method")
        if suffix in NEED_CONFIG and source.dtype(tensor) != torch.uint8:
            problem = f"but quantization_config names the method {method!r}"
            raise UnsupportedError(f"{found}, {problem}; {CONFIG_WORKS}")
        raise UnsupportedError(f"{found}, which cannot be read; {WHAT_WORKS}")


def _detail(source: Source, name: str, suffix: str) -> str | None:
    """Tell apart formats that share a suffix, by the dtypes beside it."""
    if suffix == ".weight_packed" and source.dtype(f"{name}.weight_packed") == torch.uint8:
        return "MXFP4 of compressed-tensors"
    if suffix != ".weight_scale" or f"{name}.weight" not in source:
        return None
    dtype = source.dtype(f"{name}.weight")
    if dtype in FLOATS:
        return "weights whose quantization was not finished (status frozen)"
    names = {torch.int8: "INT8 (W8A8)", torch.float8_e4m3fn: "FP8 per tensor, channel or block of compressed-tensors"}
    return names.get(dtype)
