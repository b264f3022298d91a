"""compressed-tensors and FP8 against numbers spelled out by hand and against what the official packer writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qinfer.quant import CompressedWeight, DenseWeight, FP8Weight, weight_class
from tests.quant.memory_source import MemorySource
from tests.quant.operand_matrix import operand_matrix
from tests.strategies import random_tensor

CPU = torch.device("cpu")
VECTORS = Path(__file__).parents[1] / "vectors"

# Written by compressed-tensors 0.20.0 with torch 2.13: scales and zero points of random [12, 64] matrices from its
# `calculate_qparams`, then `PackedQuantizationCompressor.compress(state_dict, scheme)`; "dequantized" is what its
# `decompress` makes of that. Names: bits_symmetry_strategy, groups of 32.
OFFICIAL = np.load(VECTORS / "compressed_tensors.npz")
CASES = sorted({key.partition(".")[0] for key in OFFICIAL.files})


def config(**weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **weights}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def read(stored: dict[str, Tensor], **weights: Any) -> CompressedWeight:
    source = MemorySource({f"m.{key}": value for key, value in stored.items()}, config(**weights))
    assert weight_class(source.quant_config, "m", source) is CompressedWeight
    return CompressedWeight.read(source, "m")


def test_one_row_by_hand() -> None:
    # Codes 0 .. 7 of the first output, lowest nibble first; 8 everywhere else. The zero points are 3 and 15.
    packed = torch.full((2, 4), 0x88888888 - (1 << 32), dtype=torch.int32)
    packed[0, 0] = 0x76543210
    stored = {
        "weight_packed": packed,
        "weight_scale": torch.tensor([[0.5], [2.0]], dtype=torch.bfloat16),
        "weight_shape": torch.tensor([2, 32]),
    }
    w = read(stored).dequantize()
    assert w[:9, 0].tolist() == [-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0]
    assert (w[:, 1] == 0).all()
    stored["weight_zero_point"] = torch.tensor([[0xF3]], dtype=torch.int32)
    shifted = read(stored, symmetric=False).dequantize()
    assert shifted[:2, 0].tolist() == [-1.5, -1.0]
    assert (shifted[:, 1] == -14.0).all()


@pytest.mark.parametrize("case", CASES)
def test_what_the_official_packer_writes(case: str) -> None:
    bits, symmetry, strategy = case.split("_")
    vector = {key.partition(".")[2]: torch.from_numpy(OFFICIAL[key]) for key in OFFICIAL.files if f"{case}." in key}
    expected = vector.pop("dequantized")
    assert ("weight_zero_point" in vector) is (symmetry == "asym")
    scheme = {"num_bits": int(bits), "symmetric": symmetry == "sym", "strategy": strategy}
    weight = read(vector, **scheme, group_size=32 if strategy == "group" else None)
    assert weight.shape == (64, 12)
    assert torch.equal(weight.dequantize().t().half(), expected)
    assert torch.equal(operand_matrix(weight.operand(CPU, torch.float16)), weight.dequantize())
    assert weight.tensors().keys() == vector.keys()


def test_the_official_packer_covers_every_width() -> None:
    assert {case.partition("_")[0] for case in CASES} == {"2", "3", "4", "5", "6", "8"}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_g_idx_says_which_features_share_a_scale(bits: int) -> None:
    w, order = random_tensor(96, 8, seed=1), torch.randperm(96)
    weight = CompressedWeight.quantize(w, bits=bits, group_size=32, act_order=order, symmetric=False)
    assert weight.weight_g_idx is not None
    assert weight.weight_g_idx[order].tolist() == [k // 32 for k in range(96)]
    plain = CompressedWeight.quantize(w[order], bits=bits, group_size=32, symmetric=False)
    assert torch.equal(weight.dequantize()[order], plain.dequantize())
    assert weight.cuts("in") == ()
    again = read(weight.tensors(), num_bits=bits, symmetric=False, actorder="group")
    assert torch.equal(again.dequantize(), weight.dequantize())
    operand = again.operand(CPU, torch.float16)
    assert operand.order is not None


def test_a_g_idx_of_minus_one_says_nothing() -> None:
    weight = CompressedWeight.quantize(random_tensor(96, 8, seed=1), group_size=32)
    stored = {**weight.tensors(), "weight_g_idx": torch.full((96,), -1, dtype=torch.int32)}
    again = read(stored, actorder="group")
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert again.operand(CPU, torch.float16).order is None
    part = again.slice("in", 32, 96)
    assert torch.equal(part.dequantize(), weight.dequantize()[32:])


@pytest.mark.parametrize("actorder", ["weight", "static", None, False])
def test_actorder_of_weights_stores_nothing(actorder: object) -> None:
    weight = CompressedWeight.quantize(random_tensor(64, 8, seed=1), group_size=32)
    assert torch.equal(read(weight.tensors(), actorder=actorder).dequantize(), weight.dequantize())


def test_the_closest_target_counts() -> None:
    def scheme(bits: int, targets: list[str], **group: Any) -> dict[str, Any]:
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
        return {"targets": targets, "weights": weights, **group}

    groups = {
        "a": scheme(4, ["Linear"], format="pack-quantized"),
        "b": scheme(8, ["re:.*down_proj$", "re:.*\\.o_proj"], format="pack-quantized"),
        "c": scheme(2, ["model.layers.1.mlp.down_proj"], format="pack-quantized"),
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": groups,
        "ignore": ["lm_head", "re:.*layers\\.7\\..*"],
        "sparsity_config": {"format": "dense"},
    }
    expected = {"layers.0.mlp.up_proj": 4, "layers.0.mlp.down_proj": 8, "layers.1.mlp.down_proj": 2}
    for module, bits in expected.items():
        weight = CompressedWeight.quantize(random_tensor(32, 8, seed=1), bits=bits, group_size=-1)
        stored = {f"model.{module}.{suffix}": tensor for suffix, tensor in weight.tensors().items()}
        source = MemorySource(stored, quantization)
        assert weight_class(quantization, f"model.{module}", source) is CompressedWeight
        assert CompressedWeight.read(source, f"model.{module}").bits == bits
    for module in ("lm_head", "model.layers.7.mlp.up_proj"):
        both = {f"{module}.weight": torch.ones(8, 32), f"{module}.weight_packed": torch.zeros(8, 4, dtype=torch.int32)}
        assert weight_class(quantization, module, MemorySource(both, quantization)) is DenseWeight


def test_fp8_blocks_multiply() -> None:
    codes = torch.tensor([[1.0, -2.0, 448.0], [0.5, 0.0, 1.0], [1.0, 1.0, 1.0]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[2.0, 0.5], [4.0, 8.0]])
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [2, 2]}
    source = MemorySource({"m.weight": codes, "m.weight_scale_inv": scale}, quantization)
    assert weight_class(quantization, "m", source) is FP8Weight
    weight = FP8Weight.read(source, "m")
    expected = torch.tensor([[2.0, -4.0, 224.0], [1.0, 0.0, 0.5], [4.0, 4.0, 8.0]])
    assert torch.equal(weight.dequantize(), expected.t())
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        operand = weight.operand(CPU, dtype)
        assert operand.weight.dtype == dtype
        assert torch.equal(operand.weight.float(), expected)
    assert list(weight.cuts("in")) == [0, 2, 3]
    dense = MemorySource({"lm_head.weight": expected}, quantization)
    assert weight_class(quantization, "lm_head", dense) is DenseWeight


def test_fp8_rounds_to_three_bits_of_mantissa() -> None:
    w = random_tensor(64, 48, seed=3)
    weight = FP8Weight.quantize(w, block=(16, 32))
    # Half a unit of the last place, or half the smallest subnormal step of 2^-9 times the scale.
    scale = weight.weight_scale_inv.t().repeat_interleave(32, 0).repeat_interleave(16, 1)
    assert ((weight.dequantize() - w).abs() <= (w.abs() / 16).maximum(scale * 2.0**-10) * (1 + 1e-5)).all()
    assert weight.weight.float().abs().max() == 448
