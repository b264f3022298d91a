"""Codes to numbers: the device functions, and the whole matrix."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from qinfer.kernels.dequant import dequantize, plane4
from qinfer.kernels.device import is_ptx_target
from qinfer.kernels.packing import unpack_planes
from tests.kernels.operands import plane_operand


def test_reference_follows_the_formula_code_by_code() -> None:
    operand = plane_operand(96, 8, group_size=32, symmetric=False)
    codes = unpack_planes.reference(operand.planes[0], bits=4, in_features=96)
    weight = dequantize.reference(operand.planes[0], operand, dtype=torch.float32)
    assert operand.offsets is not None
    for k, n in ((0, 0), (31, 7), (32, 3), (95, 5)):
        expected = (int(codes[k, n]) - 8 - int(operand.offsets[k // 32, n])) * float(operand.scales[k // 32, n])
        assert float(weight[n, k]) == pytest.approx(expected, rel=1e-6)


@triton.jit
def _planes_kernel(p_words, p_out, PTX: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_0, b_1, b_2, b_3 = plane4(tl.load(p_words + o), p_out.dtype.element_ty, PTX)
    tl.store(p_out + o * 4, b_0)
    tl.store(p_out + o * 4 + 1, b_1)
    tl.store(p_out + o * 4 + 2, b_2)
    tl.store(p_out + o * 4 + 3, b_3)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_word_gives_its_four_codes(device: torch.device, dtype: torch.dtype) -> None:
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).to(device)
    shifts = torch.arange(0, 16, 4, device=device)
    expected = ((words.int()[:, None] >> shifts) & 15) - 8
    for ptx in {False, is_ptx_target(words)}:
        out = torch.empty(2**16, 4, dtype=dtype, device=device)
        _planes_kernel[(16,)](words, out, PTX=ptx, BLOCK=4096)
        assert torch.equal(out.int(), expected.int()), f"PTX={ptx}"


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("k", "n", "group_size", "symmetric"),
    [(128, 64, 128, True), (256, 72, 32, False), (96, 8, 32, True), (320, 40, 64, False), (160, 24, -1, False)],
)
def test_matches_reference(
    device: torch.device, dtype: torch.dtype, k: int, n: int, group_size: int, symmetric: bool
) -> None:
    operand = plane_operand(k, n, group_size=group_size, symmetric=symmetric, device=device)
    actual = dequantize.launch(operand.planes[0], operand, dtype=dtype)
    # One rounding of the same fp32 product on both sides: equal to the bit.
    assert torch.equal(actual, dequantize.reference(operand.planes[0], operand, dtype=dtype))


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("planes", (torch.zeros(1, 8, 32, dtype=torch.int32),), r"planes\[0\] must be contiguous int16 \[1, 8, 32\]"),
        ("scales", torch.zeros(2, 8, dtype=torch.float16), r"scales must be contiguous \[1, 8\], got \[2, 8\]"),
        ("offsets", torch.zeros(1, 8, dtype=torch.int16), r"offsets must be contiguous int8 \[1, 8\]"),
        ("group_size", 48, "group_size must be 32, 64 or a multiple of 128, got 48"),
        ("bits", 3, "bits must be 4"),
    ],
)
def test_contradicting_operands_are_refused(field: str, value: object, problem: str) -> None:
    operand = dataclasses.replace(plane_operand(128, 8), **{field: value})
    with pytest.raises(ValueError, match=problem):
        dequantize(operand.planes[0], operand, dtype=torch.float16)


def test_empty_matrices_have_the_right_shape() -> None:
    operand = plane_operand(0, 8, group_size=128)
    assert dequantize.launch(operand.planes[0], operand, dtype=torch.float16).shape == (8, 0)
