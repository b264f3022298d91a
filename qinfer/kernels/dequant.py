"""Codes of a PlaneOperand to numbers: the device functions that the matmul uses, and the whole matrix at once.

    W[n, k] = (code[k, n] - 2^(bits-1) - offset[g, n]) * scale[g, n],   g = k // group_size

Layout of the planes: `operand.py`. One int16 of a 4-bit plane holds four codes, which belong to four K slices of the
tile, so one element gives one element of each slice and no data moves between threads. Differences of codes are exact
in fp16 and bf16; the product with the scale is taken in fp32 and rounded once.

On NVIDIA two neighbouring int16 share a register and are turned into packed halves by OR-ing the code under a magic
exponent: in fp16 0x6400 is 1024, whose last mantissa bit counts ones; in bf16 0x4300 is 128, likewise. Elsewhere and in
the interpreter plain integer arithmetic gives the same numbers (Source: FasterTransformer's interleaved int4 layout;
Kim et al. 2022, arXiv 2211.10017).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.device import is_ptx_target, op
from qinfer.kernels.operand import TILE_K, PlaneOperand
from qinfer.kernels.packing import unpack_planes

BLOCK_N = 64


def dequantize_reference(planes: Tensor, operand: PlaneOperand, *, dtype: torch.dtype) -> Tensor:
    """Compute the matrix in fp32 and round it once."""
    codes = unpack_planes.reference(planes, bits=operand.bits, in_features=operand.in_features)
    group = torch.arange(operand.in_features, device=planes.device) // operand.group_size
    centred = codes.float() - 2.0 ** (operand.bits - 1)
    if operand.offsets is not None:
        centred -= operand.offsets.float()[group]
    return (centred * operand.scales.float()[group]).t().to(dtype).contiguous()


@triton.jit
def plane4_fp16(b_words):
    """Give the four centred codes of int16 words as fp16 through NVIDIA assembly."""
    return tl.inline_asm_elementwise(
        asm="""
        {
        .reg .b32 high, t0, t1, t2, t3, minus1032, sixteenth, minus72;
        mov.b32 minus1032, 0xe408e408;
        mov.b32 sixteenth, 0x2c002c00;
        mov.b32 minus72, 0xd480d480;
        shr.u32 high, $4, 8;
        lop3.b32 t0, $4, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 t1, $4, 0x00f000f0, 0x64006400, 0xea;
        lop3.b32 t2, high, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 t3, high, 0x00f000f0, 0x64006400, 0xea;
        add.rn.f16x2 $0, t0, minus1032;
        fma.rn.f16x2 $1, t1, sixteenth, minus72;
        add.rn.f16x2 $2, t2, minus1032;
        fma.rn.f16x2 $3, t3, sixteenth, minus72;
        }
        """,
        constraints="=r,=r,=r,=r,r",
        args=[b_words],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def plane4_bf16(b_words):
    """Give the four centred codes of int16 words as bf16 through NVIDIA assembly."""
    return tl.inline_asm_elementwise(
        asm="""
        {
        .reg .b32 s1, s2, s3, t0, t1, t2, t3, one, minus136;
        mov.b32 one, 0x3f803f80;
        mov.b32 minus136, 0xc308c308;
        shr.u32 s1, $4, 4;
        shr.u32 s2, $4, 8;
        shr.u32 s3, $4, 12;
        lop3.b32 t0, $4, 0x000f000f, 0x43004300, 0xea;
        lop3.b32 t1, s1, 0x000f000f, 0x43004300, 0xea;
        lop3.b32 t2, s2, 0x000f000f, 0x43004300, 0xea;
        lop3.b32 t3, s3, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 $0, t0, one, minus136;
        fma.rn.bf16x2 $1, t1, one, minus136;
        fma.rn.bf16x2 $2, t2, one, minus136;
        fma.rn.bf16x2 $3, t3, one, minus136;
        }
        """,
        constraints="=r,=r,=r,=r,r",
        args=[b_words],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def plane4_portable(b_words, DTYPE: tl.constexpr):
    """Give the four centred codes of int16 words in DTYPE with plain integer arithmetic."""
    b_0 = ((b_words & 15) - 8).to(tl.float32).to(DTYPE)
    b_1 = (((b_words >> 4) & 15) - 8).to(tl.float32).to(DTYPE)
    b_2 = (((b_words >> 8) & 15) - 8).to(tl.float32).to(DTYPE)
    b_3 = (((b_words >> 12) & 15) - 8).to(tl.float32).to(DTYPE)
    return b_0, b_1, b_2, b_3


@triton.jit
def plane4(b_words, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Give the codes of a 4-bit plane minus 8, slice by slice of the K tile.

    Args:
        b_words: int16 [BLOCK_N, 32].
        DTYPE: the element type of the results, the activations' own.
        PTX: whether the target takes NVIDIA assembly.

    Returns:
        Four tensors of b_words' shape.
    """
    if PTX and tl.float16 == DTYPE:
        return plane4_fp16(b_words)
    elif PTX and tl.bfloat16 == DTYPE:
        return plane4_bf16(b_words)
    else:
        return plane4_portable(b_words, DTYPE)


@triton.jit
def _store_slice(b_codes, p_offsets, p_scales, p_out, o_n, o_k, m_n, N, K, GROUP, HAS_OFFSETS: tl.constexpr):
    """Scale one K slice of a tile and store it."""
    # A slice that is all padding takes the last group's scale, and none of it is stored.
    o_group = (tl.minimum(tl.min(o_k, 0), K - 1) // GROUP).to(tl.int64) * N
    b_values = b_codes.to(tl.float32)
    if HAS_OFFSETS:
        b_values -= tl.load(p_offsets + o_group + o_n, mask=m_n, other=0).to(tl.float32)[:, None]
    b_values *= tl.load(p_scales + o_group + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    p_row = p_out + o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    tl.store(p_row, b_values.to(p_out.dtype.element_ty), mask=m_n[:, None] & (o_k[None, :] < K))


@triton.jit
def _dequantize_kernel(
    p_planes, p_scales, p_offsets, p_out, N, K, GROUP,
    HAS_OFFSETS: tl.constexpr, PTX: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_n, i_tile = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.arange(0, 32)
    m_n = o_n < N
    p_words = p_planes + (i_tile.to(tl.int64) * N + o_n)[:, None] * 32 + o_c[None, :]
    b_words = tl.load(p_words, mask=m_n[:, None], other=0)
    b_0, b_1, b_2, b_3 = plane4(b_words, p_out.dtype.element_ty, PTX)
    o_k = i_tile * 128 + o_c
    _store_slice(b_0, p_offsets, p_scales, p_out, o_n, o_k, m_n, N, K, GROUP, HAS_OFFSETS)
    _store_slice(b_1, p_offsets, p_scales, p_out, o_n, o_k + 32, m_n, N, K, GROUP, HAS_OFFSETS)
    _store_slice(b_2, p_offsets, p_scales, p_out, o_n, o_k + 64, m_n, N, K, GROUP, HAS_OFFSETS)
    _store_slice(b_3, p_offsets, p_scales, p_out, o_n, o_k + 96, m_n, N, K, GROUP, HAS_OFFSETS)


def check_plane_operand(operand: PlaneOperand) -> None:
    """Raise ValueError or TypeError if the tensors of an operand contradict each other."""
    if operand.bits != 4 or len(operand.planes) != 1:
        raise ValueError(f"operand.bits must be 4 with one plane, got {operand.bits} with {len(operand.planes)}")
    tiles, n = -(-operand.in_features // TILE_K), operand.out_features
    if operand.group_size not in (32, 64) and operand.group_size % TILE_K:
        raise ValueError(f"operand.group_size must be 32, 64 or a multiple of {TILE_K}, got {operand.group_size}")
    groups = -(-operand.in_features // operand.group_size)
    plane = operand.planes[0]
    if plane.dtype != torch.int16 or tuple(plane.shape) != (tiles, n, 32) or not plane.is_contiguous():
        raise ValueError(f"planes[0] must be contiguous int16 {[tiles, n, 32]}, got {plane.dtype} {list(plane.shape)}")
    if tuple(operand.scales.shape) != (groups, n) or not operand.scales.is_contiguous():
        raise ValueError(f"scales must be contiguous {[groups, n]}, got {list(operand.scales.shape)}")
    offsets = operand.offsets
    if offsets is None:
        return
    if offsets.dtype != torch.int8 or offsets.shape != operand.scales.shape or not offsets.is_contiguous():
        raise ValueError(f"offsets must be contiguous int8 {[groups, n]}, got {offsets.dtype} {list(offsets.shape)}")


def _check_dequantize(planes: Tensor, operand: PlaneOperand, *, dtype: torch.dtype) -> None:
    check_plane_operand(operand)
    if planes is not operand.planes[0]:
        raise ValueError("planes must be operand.planes[0]")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point type, got {dtype}")


@op(reference=dequantize_reference, check=_check_dequantize)
def dequantize(planes: Tensor, operand: PlaneOperand, *, dtype: torch.dtype) -> Tensor:
    """Give the matrix of an operand, its input features in stored order.

    Args:
        planes: operand.planes[0]; it decides on the device.
        operand: a 4-bit PlaneOperand with in_features K and out_features N.
        dtype: element type of the result.

    Returns:
        [N, K] in dtype, row-major.

    Raises:
        ValueError: the operand's tensors contradict each other.
    """
    n, k = operand.out_features, operand.in_features
    out = torch.empty(n, k, dtype=dtype, device=planes.device)
    grid = (triton.cdiv(n, BLOCK_N), triton.cdiv(k, TILE_K))
    if n and k:
        _dequantize_kernel[grid](
            planes, operand.scales, operand.offsets, out, n, k, operand.group_size,
            HAS_OFFSETS=operand.offsets is not None, PTX=is_ptx_target(planes), BLOCK_N=BLOCK_N, num_warps=4,
        )  # fmt: skip
    return out
