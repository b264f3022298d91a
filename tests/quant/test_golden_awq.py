"""AWQ against a word spelled out by hand and against what AutoAWQ packs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qinfer.quant import AWQWeight
from tests.quant.memory_source import MemorySource
from tests.quant.operand_matrix import operand_matrix
from tests.strategies import random_tensor

CPU = torch.device("cpu")
VECTORS = Path(__file__).parents[1] / "vectors"

# Written by AutoAWQ 0.2.9 (source distribution; awq, awq.modules, awq.modules.linear and awq.utils registered as bare
# packages, because its own import fails with transformers 5): weights on the grid of random asymmetric scales and zero
# points through `WQLinear_GEMM.from_linear(linear, 4, group_size, scales=..., zeros=...)`; "dequantized" is its
# `dequantize_gemm(qweight, qzeros, scales, 4, group_size)`.
AUTOAWQ = np.load(VECTORS / "awq_gemm.npz")


def read(stored: dict[str, Tensor], **options: Any) -> AWQWeight:
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", **options}
    return AWQWeight.read(MemorySource({f"m.{key}": value for key, value in stored.items()}, config), "m")


def test_one_word_by_hand() -> None:
    # From the lowest nibble up a word holds columns 0 2 4 6 1 3 5 7, here with codes 0 2 4 6 1 3 5 7.
    stored = {
        "qweight": torch.full((32, 1), 0x75316420, dtype=torch.int32),
        "qzeros": torch.full((1, 1), 0x00000003, dtype=torch.int32),
        "scales": torch.full((1, 8), 0.5, dtype=torch.float16),
    }
    weight = read(stored)
    assert weight.zeros().tolist() == [[3, 0, 0, 0, 0, 0, 0, 0]]
    assert weight.dequantize()[5].tolist() == [-1.5, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    # A zero point of 0 in column 1 stays 0: nothing is added, unlike in GPTQ.
    assert torch.equal(operand_matrix(weight.operand(CPU, torch.float32)), weight.dequantize())


@pytest.mark.parametrize("group_size", [32, 64])
def test_what_autoawq_writes(group_size: int) -> None:
    vector = {
        key.partition(".")[2]: torch.from_numpy(AUTOAWQ[key]) for key in AUTOAWQ.files if f"g{group_size}." in key
    }
    expected = vector.pop("dequantized")
    weight = read(vector, group_size=group_size)
    assert weight.shape == (128, 32)
    assert torch.equal(weight.dequantize().half(), expected)
    assert weight.tensors().keys() == vector.keys()
    operand = weight.operand(CPU, torch.float16)
    assert operand.offsets is not None
    assert (operand.bits, operand.group_size, operand.order) == (4, group_size, None)
    assert torch.equal(operand_matrix(operand), weight.dequantize())


def test_quantize_writes_what_autoawq_writes() -> None:
    # The matrix lies on the grid of the file, so the same codes come out, up to the search for the step.
    dequantized = torch.from_numpy(AUTOAWQ["g32.dequantized"]).float()
    again = AWQWeight.quantize(dequantized, group_size=32)
    step = torch.from_numpy(AUTOAWQ["g32.scales"]).float().repeat_interleave(32, 0)
    assert ((again.dequantize() - dequantized).abs() <= step * 0.6).all()
    stored = again.quant_config | {"version": "GEMM"}
    assert torch.equal(read(again.tensors(), **stored).dequantize(), again.dequantize())


def test_symmetric_files_store_zero_points_of_eight() -> None:
    weight = AWQWeight.quantize(random_tensor(64, 16, seed=1), group_size=16, symmetric=True)
    assert (weight.qzeros == torch.tensor(0x88888888 - (1 << 32), dtype=torch.int32)).all()
    assert weight.quant_config["zero_point"] is False
    assert weight.operand(CPU, torch.float16).offsets is None
    assert torch.equal(read(weight.tensors(), group_size=16, zero_point=False).dequantize(), weight.dequantize())


@pytest.mark.parametrize("key", ["version", "checkpoint_format", "format"])
def test_the_layout_may_be_named_in_three_places(key: str) -> None:
    weight = AWQWeight.quantize(random_tensor(64, 16, seed=1), group_size=32)
    options = {"version": None, key: "gemm"}
    assert torch.equal(read(weight.tensors(), **options).dequantize(), weight.dequantize())


def test_scales_in_bf16_stay_what_they_are() -> None:
    weight = AWQWeight.quantize(random_tensor(64, 16, seed=1), group_size=32)
    tensors = {**weight.tensors(), "scales": weight.scales.bfloat16()}
    operand = read(tensors).operand(CPU, torch.float16)
    assert operand.scales.dtype == torch.bfloat16
    assert torch.equal(operand_matrix(operand), read(tensors).dequantize())
