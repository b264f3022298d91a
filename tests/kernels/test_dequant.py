"""Codes to numbers: the device functions, and the whole matrix."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from qinfer.kernels.codes import offset_codes, slice_codes, subnormal_codes, subnormal_unit
from qinfer.kernels.dequant import dequantize
from qinfer.kernels.device import is_ptx_target
from qinfer.kernels.operand import FIELDS, step_k
from qinfer.kernels.packing import unpack_planes
from tests.kernels.operands import plane_operand


def test_reference_follows_the_formula_code_by_code() -> None:
    operand = plane_operand(96, 8, group_size=32, symmetric=False)
    codes = unpack_planes(operand.planes, bits=4, in_features=96)
    weight = dequantize.reference(operand.planes[0], operand, dtype=torch.float32)
    assert operand.offsets is not None
    for k, n in ((0, 0), (31, 7), (32, 3), (95, 5)):
        expected = (int(codes[k, n]) - 8 - int(operand.offsets[k // 32, n])) * float(operand.scales[k // 32, n])
        assert float(weight[n, k]) == pytest.approx(expected, rel=1e-6)


@triton.jit
def _slices_kernel(
    p_0, p_1, p_2, p_3, p_low, p_offsets, p_out,  # offsets of rows, or None
    BITS: tl.constexpr, SLICES: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None] * 32 + tl.arange(0, 32)[None, :]
    b_words = (tl.load(p_0 + o), tl.load(p_1 + o), tl.load(p_2 + o), tl.load(p_3 + o), tl.load(p_low + o))
    for s in tl.static_range(SLICES):
        if p_offsets is None:
            b_codes = slice_codes(b_words, BITS, s, p_out.dtype.element_ty, PTX)
        else:
            b_offsets = tl.load(p_offsets + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
            b_codes = offset_codes(b_words, b_offsets, BITS, s, p_out.dtype.element_ty, PTX)
        tl.store(p_out + o * SLICES + s, b_codes)


def _expected_codes(bits: int, words: list[torch.Tensor]) -> torch.Tensor:
    """Take the codes of every slice out of the words with integer arithmetic: [..., slices]."""
    high, *low = FIELDS[bits]
    slots, columns = 16 // high, []
    for index in range(step_k(bits) // 32):
        code = (words[index // slots].int() >> (index % slots * high)) & ((1 << high) - 1)
        for width in low:
            code = (code << width) | ((words[4].int() >> (index * width)) & ((1 << width) - 1))
        columns.append(code - (1 << (bits - 1)))
    return torch.stack(columns, -1)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_offsets", [False, True])
@pytest.mark.parametrize("bits", FIELDS)
def test_every_word_gives_its_codes(device: torch.device, bits: int, has_offsets: bool, dtype: torch.dtype) -> None:
    # Each plane sees every word, beside random words of the other planes.
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    shuffled = [every[torch.randperm(2**16)] for _ in range(4)]
    words = [tensor.view(-1, 32).contiguous().to(device) for tensor in (every, *shuffled)]
    slices = step_k(bits) // 32
    expected, offsets = _expected_codes(bits, words), None
    if has_offsets:
        # All that a zero point can be, from the smallest code on to one above the largest.
        offsets = (torch.arange(2048, device=device) % (2**bits + 1) - 2 ** (bits - 1)).to(torch.int16)
        expected = expected - offsets.int()[:, None, None]
    for ptx in {False, is_ptx_target(words[0])}:
        out = torch.empty(2048, 32, slices, dtype=dtype, device=device)
        _slices_kernel[(4,)](*words, offsets, out, BITS=bits, SLICES=slices, PTX=ptx, BLOCK=512)
        assert torch.equal(out.int(), expected), f"PTX={ptx}"


@triton.jit
def _subnormal_kernel(p_0, p_1, p_out, BITS: tl.constexpr, SLICES: tl.constexpr, BLOCK: tl.constexpr):
    o = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None] * 32 + tl.arange(0, 32)[None, :]
    b_words = (tl.load(p_0 + o), tl.load(p_1 + o))
    for s in tl.static_range(SLICES):
        b_codes = subnormal_codes(b_words, BITS, s).to(tl.float32) / subnormal_unit(BITS, s)
        tl.store(p_out + o * SLICES + s, b_codes)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_word_gives_its_codes_as_subnormal_numbers(device: torch.device, bits: int) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    words = [tensor.view(-1, 32).contiguous().to(device) for tensor in (every, every[torch.randperm(2**16)])]
    if not is_ptx_target(words[0]):
        pytest.skip("subnormal codes are cut out by NVIDIA assembly")
    slices = step_k(bits) // 32
    expected = _expected_codes(bits, words) + 2 ** (bits - 1)
    out = torch.empty(2048, 32, slices, device=device)
    _subnormal_kernel[(4,)](*words, out, BITS=bits, SLICES=slices, BLOCK=512)
    assert torch.equal(out.int(), expected)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("k", "n", "group_size", "symmetric"),
    [(256, 72, 128, True), (160, 24, 32, False), (320, 40, 64, False), (96, 8, -1, False), (112, 16, 16, False)],
)
@pytest.mark.parametrize("bits", FIELDS)
def test_matches_reference(
    device: torch.device, bits: int, dtype: torch.dtype, k: int, n: int, group_size: int, symmetric: bool
) -> None:
    operand = plane_operand(k, n, bits=bits, group_size=group_size, symmetric=symmetric, device=device)
    actual = dequantize.launch(operand.planes[0], operand, dtype=dtype)
    # One rounding of the same fp32 product on both sides: equal to the bit.
    assert torch.equal(actual, dequantize.reference(operand.planes[0], operand, dtype=dtype))


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("planes", (torch.zeros(1, 8, 32, dtype=torch.int32),), r"planes\[0\] must be contiguous int16 \[1, 8, 32\]"),
        ("scales", torch.zeros(2, 8, dtype=torch.float16), r"scales must be contiguous \[1, 8\], got \[2, 8\]"),
        ("offsets", torch.zeros(1, 8, dtype=torch.int32), r"offsets must be contiguous int8 or int16 \[1, 8\]"),
        ("group_size", 48, "group_size must be 16 or a multiple of 32, got 48"),
        ("bits", 7, "bits must be one of"),
    ],
)
def test_contradicting_operands_are_refused(field: str, value: object, problem: str) -> None:
    operand = dataclasses.replace(plane_operand(128, 8), **{field: value})
    with pytest.raises(ValueError, match=problem):
        dequantize(operand.planes[0], operand, dtype=torch.float16)


def test_empty_matrices_have_the_right_shape() -> None:
    operand = plane_operand(0, 8, group_size=128)
    assert dequantize.launch(operand.planes[0], operand, dtype=torch.float16).shape == (8, 0)
