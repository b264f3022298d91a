"""Damaged EXL2 matrices: each is refused with the file, the tensor and the reason, before any of it is unpacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qinfer.errors import CheckpointError
from qinfer.quant import DenseWeight, EXL2Weight, weight_class
from tests.quant.memory_source import MemorySource, stored_as
from tests.strategies import random_tensor

NAME = "model.layers.0.mlp.down_proj"


def source() -> MemorySource:
    """Groups of 8, 5, 5 and 2 bits with 32, 32, 32 and 64 rows, which start at words 0, 8, 13 and 18 of 22."""
    weight = EXL2Weight.quantize(
        random_tensor(160, 64, seed=0),
        bits={8: 0.2, 5: 0.4, 2: 0.4},
        group_size={8: 32, 5: 32, 2: 64},
        permutation=torch.arange(159, -1, -1),
        bias=torch.zeros(64),
    )
    assert weight.q_groups.tolist() == [8, 0, 5, 8, 5, 13, 2, 18]
    assert weight.q_weight.shape[0] == 22
    return stored_as(weight, NAME)


def set_to(tensor: Tensor, index: Any, value: float) -> Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


def heads(*values: int) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.tensor(values).to(torch.int16)


# suffix, what happens to it, the tensor to be named (None: itself), the reason
DAMAGE: list[tuple[str, Callable[[Tensor], Tensor], str | None, str]] = [
    ("q_weight", lambda t: t.reshape(-1), None, r"shape must be \[any, any\]"),
    ("q_weight", lambda t: t.to(torch.int64), None, "dtype must be int32, got int64"),
    ("q_weight", lambda t: t[:, :48], None, "must have a multiple of 32 columns, got 48"),
    ("q_weight", lambda t: t[:, :32], "q_scale", r"shape must be \[4, 4\], got \[4, 8\]"),
    ("q_weight", lambda t: t[:-1], "q_invperm", r"shape must be \[144\], got \[160\]"),
    ("q_weight", lambda t: t[:18], "q_groups", "group 3 starts at row 18 of q_weight and ends at row 18"),
    ("q_weight", lambda t: t[:0], "q_groups", "group 3 starts at row 18 of q_weight and ends at row 0"),
    ("q_weight", lambda t: torch.cat([t, t]), "q_invperm", r"shape must be \[512\], got \[160\]"),
    ("q_scale", lambda t: t[:3], None, r"shape must be \[4, 8\], got \[3, 8\]"),
    ("q_scale", lambda t: t.T.contiguous(), None, r"shape must be \[4, 8\], got \[8, 4\]"),
    ("q_scale", lambda t: t.to(torch.uint8), None, "dtype must be int32, got uint8"),
    ("q_scale_max", lambda t: t[:, None], None, r"shape must be \[4\], got \[4, 1\]"),
    ("q_scale_max", lambda t: t.float(), None, "dtype must be float16, got float32"),
    ("q_scale_max", lambda t: set_to(t, 2, float("nan")), None, "NaN or infinite"),
    ("q_scale_max", lambda t: set_to(t, 0, float("-inf")), None, "NaN or infinite"),
    ("q_scale_max", lambda t: set_to(t, 0, 60000.0), None, "the scales allow for weights beyond fp16's 65504"),
    ("q_scale_max", lambda t: set_to(t, 1, -60000.0), None, "the scales allow for weights beyond fp16's 65504"),
    ("q_groups", lambda t: t.to(torch.int32), None, "dtype must be int16, got int32"),
    ("q_groups", lambda t: t.view(4, 2), None, r"shape must be \[any\], got \[4, 2\]"),
    ("q_groups", lambda t: t[:7], None, r"must hold a pair \(bits, first row\) per group, got 7 numbers"),
    ("q_groups", lambda t: t[:0], None, "must hold a pair .* got 0 numbers"),
    (
        "q_groups",
        lambda t: t[:6],
        "q_groups",
        r"group 2 must have a multiple of 32 rows of 5 bits, got 9 rows of words",
    ),
    ("q_groups", heads(2, 0), "q_scale", r"shape must be \[1, 8\], got \[4, 8\]"),
    ("q_groups", heads(8, 1, 5, 8, 5, 13, 2, 18), None, "the first group must start at row 0 of q_weight, got 1"),
    ("q_groups", heads(7, 0, 5, 8, 5, 13, 2, 18), None, r"group 0 must have one of \[8, 6, 5, 4, 3, 2\] bits, got 7"),
    ("q_groups", heads(8, 0, 5, 8, 0, 13, 2, 18), None, "group 2 must have one of .* bits, got 0"),
    ("q_groups", heads(8, 0, 5, 8, 5, 13, -2, 18), None, "group 3 must have one of .* bits, got 65534"),
    ("q_groups", heads(8, 0, 5, 13, 5, 8, 2, 18), None, "group 1 starts at row 13 of q_weight and ends at row 8"),
    ("q_groups", heads(8, 0, 5, 8, 5, 8, 2, 18), None, "group 1 starts at row 8 of q_weight and ends at row 8"),
    ("q_groups", heads(8, 0, 5, 8, 5, 13, 2, 22), None, "group 3 starts at row 22 of q_weight and ends at row 22"),
    (
        "q_groups",
        heads(8, 0, 5, 8, 5, 13, 2, 32000),
        None,
        "group 3 starts at row 32000 of q_weight and ends at row 22",
    ),
    ("q_groups", heads(8, 0, 5, 8, 5, 13, 2, -1), None, "group 3 starts at row 65535 of q_weight and ends at row 22"),
    (
        "q_groups",
        heads(8, 0, 5, 7, 5, 13, 2, 18),
        None,
        "group 0 must have a multiple of 32 rows of 8 bits, got 7 rows",
    ),
    ("q_groups", heads(4, 0, 5, 8, 5, 13, 2, 18), None, "bits must not rise, got 4 in group 0 and 5 in the next"),
    ("q_groups", heads(8, 0, 5, 8, 5, 13, 8, 18), None, "group 3 must have a multiple of 32 rows of 8 bits, got 4"),
    ("q_invperm", lambda t: t[1:], None, r"shape must be \[160\], got \[159\]"),
    ("q_invperm", lambda t: t.to(torch.int16), None, "dtype must be int32, got int16"),
    ("q_invperm", lambda t: set_to(t, 3, 160), None, "must hold each of 0 to 159 once"),
    ("q_invperm", lambda t: set_to(t, 3, -1), None, "must hold each of 0 to 159 once"),
    ("q_invperm", lambda t: set_to(t, 3, 2**31 - 1), None, "must hold each of 0 to 159 once"),
    ("q_invperm", lambda t: set_to(t, 3, int(t[4])), None, "must hold each of 0 to 159 once"),
    ("bias", lambda t: t[:40], None, r"shape must be \[64\], got \[40\]"),
    ("bias", lambda t: set_to(t, 0, float("nan")), None, "NaN or infinite"),
]


@pytest.mark.parametrize(("suffix", "damage", "named", "text"), DAMAGE)
def test_a_damaged_tensor_is_named(
    suffix: str, damage: Callable[[Tensor], Tensor], named: str | None, text: str
) -> None:
    good = source()
    assert EXL2Weight.read(good, NAME).shape == (160, 64)
    bad = MemorySource({**good.stored, f"{NAME}.{suffix}": damage(good.stored[f"{NAME}.{suffix}"])})
    with pytest.raises(CheckpointError, match=text) as caught:
        EXL2Weight.read(bad, NAME)
    assert caught.value.file == "memory.safetensors"
    assert caught.value.tensor == f"{NAME}.{named or suffix}"


@pytest.mark.parametrize("suffix", ["q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm"])
def test_a_missing_tensor_is_named(suffix: str) -> None:
    rest = {name: tensor for name, tensor in source().stored.items() if name != f"{NAME}.{suffix}"}
    with pytest.raises(CheckpointError, match="missing") as caught:
        EXL2Weight.read(MemorySource(rest), NAME)
    assert caught.value.tensor == f"{NAME}.{suffix}"


@pytest.mark.parametrize("config", [None, {"quant_method": "exl2", "bits": 4.0}, {"quant_method": "unheard-of"}])
def test_the_tensors_decide_and_not_the_config(config: dict[str, Any] | None) -> None:
    assert weight_class(config, NAME, MemorySource(source().stored, config)) is EXL2Weight


def test_modules_left_dense() -> None:
    config = {"quant_method": "exl2", "bits": 4.0}
    stored = {**source().stored, "lm_head.weight": torch.ones(8, 4)}
    assert weight_class(config, "lm_head", MemorySource(stored, config)) is DenseWeight
    with pytest.raises(CheckpointError, match=r"model\.norm\.q_weight: the tensor is missing"):
        weight_class(config, "model.norm", MemorySource(stored, config))
