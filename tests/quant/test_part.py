"""Parts read from disk are the parts that `slice` gives, in every format, and nothing else is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from qinfer.errors import CheckpointError
from qinfer.quant import FORMATS, AWQWeight, CompressedWeight, DenseWeight, EXL2Weight, FP8Weight, GPTQWeight, Weight
from qinfer.quant.part import read_part, skeleton, take_rows
from tests.quant.memory_source import MemorySource, stored_as
from tests.strategies import random_tensor

K, N = 256, 192
ORDER = torch.randperm(K, generator=torch.Generator().manual_seed(1))


def weights() -> dict[str, Weight]:
    w, bias = random_tensor(K, N, seed=0), random_tensor(N, seed=1, dtype=torch.float16)
    return {
        "dense": DenseWeight.quantize(w, bias=bias),
        "gptq 4": GPTQWeight.quantize(w, group_size=64, symmetric=False, bias=bias),
        "gptq 3 act-order": GPTQWeight.quantize(w, bits=3, group_size=32, act_order=ORDER),
        "gptq one group": GPTQWeight.quantize(w, bits=8, group_size=-1),
        "gptq g_idx": GPTQWeight.quantize(w, group_size=32, act_order=torch.arange(K)),
        "awq": AWQWeight.quantize(w, group_size=64, bias=bias),
        "compressed-tensors": CompressedWeight.quantize(w, bits=4, group_size=32, symmetric=False, bias=bias),
        "compressed-tensors channel": CompressedWeight.quantize(w, bits=8, group_size=-1),
        "fp8": FP8Weight.quantize(w, block=(32, 64), bias=bias),
        "exl2": EXL2Weight.quantize(w, bits={4: 0.5, 2: 0.5}, permutation=ORDER, bias=bias),
    }


WEIGHTS = weights()


@dataclass(frozen=True)
class Counted:
    """A source that counts the elements that leave it."""

    inner: MemorySource
    read_elements: dict[str, int] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __contains__(self, name: str) -> bool:
        return name in self.inner

    def read(self, name: str) -> Tensor:
        return self._count(name, self.inner.read(name))

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        return self._count(name, self.inner.read(name).narrow(dim, start, stop - start).contiguous())

    def _count(self, name: str, tensor: Tensor) -> Tensor:
        self.read_elements[name] = self.read_elements.get(name, 0) + tensor.numel()
        return tensor


@pytest.mark.parametrize("dim", ["in", "out"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_part_is_what_slice_gives(kind: str, dim: Any) -> None:
    weight = WEIGHTS[kind]
    source = Counted(stored_as(weight, "m"))
    bones = skeleton(type(weight), source, "m")
    assert list(bones.cuts(dim)) == list(weight.cuts(dim))
    cuts = list(weight.cuts(dim))
    if not cuts:
        assert (kind, dim) in {("gptq 3 act-order", "in"), ("exl2", "in")}
        return
    for start, stop in ((cuts[0], cuts[len(cuts) // 2]), (cuts[len(cuts) // 3], cuts[-1]), (cuts[1], cuts[2])):
        source.read_elements.clear()
        part = read_part(source, "m", bones, dim, start, stop)
        expected = weight.slice(dim, start, stop)
        assert part.shape == expected.shape
        assert part.tensors().keys() == expected.tensors().keys()
        for suffix, tensor in expected.tensors().items():
            got = part.tensors()[suffix]
            assert (got.shape, got.dtype) == (tensor.shape, tensor.dtype), suffix
            assert got.tolist() == tensor.tolist(), suffix
        assert torch.equal(part.dequantize(), expected.dequantize())
        largest = max(weight.tensors(), key=lambda suffix: weight.tensors()[suffix].numel())
        share = (stop - start) / weight.shape[0 if dim == "in" else 1]
        assert source.read_elements[f"m.{largest}"] == prod(weight.tensors()[largest].shape) * share


def test_every_format_is_tried() -> None:
    assert {type(weight) for weight in WEIGHTS.values()} == set(FORMATS.values())


def test_rows_of_a_table() -> None:
    table = random_tensor(50, 8, seed=3)
    source = Counted(MemorySource({"table": table}))
    assert torch.equal(take_rows(source, "table", (50, 8), 32, 50), table[32:])
    assert source.read_elements == {"table": 18 * 8}
    with pytest.raises(CheckpointError, match=r"shape must be \[51, 8\]"):
        take_rows(source, "table", (51, 8), 32, 50)
    table[40, 3] = torch.inf
    take_rows(source, "table", (50, 8), 0, 40)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        take_rows(source, "table", (50, 8), 32, 50)


def test_no_part_is_empty() -> None:
    source = Counted(stored_as(WEIGHTS["dense"], "m"))
    with pytest.raises(ValueError, match="at least one feature, got 8:8"):
        read_part(source, "m", skeleton(DenseWeight, source, "m"), "out", 8, 8)
