"""The whole matrix of a PlaneOperand, codes to numbers.

    W[n, k] = (code[k, n] - 2^(bits-1) - offset[g, n]) * scale[g, n],   g = k // group_size

Layout of the planes: `operand.py`. How codes become numbers: `codes.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.codes import constants_of, load_step, num_steps, scaled_codes, slice_codes, spread
from qinfer.kernels.device import is_ptx_target, op
from qinfer.kernels.operand import FIELDS, SLICE_K, PlaneOperand, tile_k
from qinfer.kernels.packing import unpack_planes

BLOCK_N = 32


def dequantize_reference(
    planes: Tensor, operand: PlaneOperand, *, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Compute the matrix in fp32 and round it once."""
    codes = unpack_planes(operand.planes, bits=operand.bits, in_features=operand.in_features)
    weight = codes.float().sub_(2.0 ** (operand.bits - 1))
    # In place, by whole groups and what is left: the head of a model takes gigabytes in fp32.
    whole = operand.in_features // operand.group_size
    first = whole * operand.group_size
    for rows, groups in (
        (weight[:first].unflatten(0, (whole, operand.group_size)), slice(whole)),
        (weight[first:], slice(whole, None)),
    ):
        of_rows = (groups, None) if rows.ndim == 3 else groups
        if operand.offsets is not None:
            rows -= operand.offsets[of_rows].float()
        rows *= operand.scales[of_rows].float()
    if out is None:
        out = torch.empty(operand.out_features, operand.in_features, dtype=dtype, device=planes.device)
    return out.copy_(weight.t())


@triton.jit
def _of_groups(p_table, o_k, o_n, m_n, N64, num_groups, divisor, RUN: tl.constexpr):
    """Load what the groups of a slice from feature o_k on have in a table [groups, N]: [BLOCK_N, 1], or 2 groups."""
    o_half = tl.arange(0, 2 if RUN == 0 else 1)[None, :] * 16
    # What lies behind K takes the last group's, and is not stored.
    o_group = tl.minimum((o_k + o_half) // divisor, num_groups - 1) * N64
    return tl.load(p_table + o_group + o_n[:, None], mask=m_n[:, None], other=0).to(tl.float32)


@triton.jit
def _dequantize_kernel(
    p_high, p_low, p_scales, p_offsets, p_out, N, K, out_stride, num_high, num_groups, group_size,
    BITS: tl.constexpr, HIGH_TILES: tl.constexpr, HAS_LOW: tl.constexpr, SLICES: tl.constexpr, RUN: tl.constexpr,
    GROUP: tl.constexpr, HAS_OFFSETS: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PTX: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Programs that write the same rows sit next to each other, so rows are written from end to end.
    i_step, i_n = tl.program_id(0), tl.program_id(1)
    DTYPE: tl.constexpr = p_out.dtype.element_ty
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.arange(0, 32)[None, :]
    m_n = (o_n < N) | EVEN_N
    N64 = tl.cast(N, tl.int64)
    divisor = group_size if GROUP == 0 else GROUP
    b_words = load_step(p_high, p_low, i_step, i_n * BLOCK_N, m_n, N64, num_high, HIGH_TILES, HAS_LOW)
    p_rows = p_out + o_n.to(tl.int64)[:, None] * out_stride + o_c
    for s in tl.static_range(SLICES):
        o_k = (i_step * SLICES + s) * 32
        if RUN == 0 or s % RUN == 0:
            b_scales = _of_groups(p_scales, o_k, o_n, m_n, N64, num_groups, divisor, RUN)
            if HAS_OFFSETS:
                b_offsets = _of_groups(p_offsets, o_k, o_n, m_n, N64, num_groups, divisor, RUN)
        b_codes = slice_codes(b_words, BITS, s, DTYPE, PTX)
        if HAS_OFFSETS:
            b_codes -= spread(b_offsets).to(DTYPE)
        m_out = m_n[:, None] if EVEN_K else m_n[:, None] & (o_k + o_c < K)
        tl.store(p_rows + o_k, scaled_codes(b_codes, spread(b_scales), p_scales.dtype.element_ty, PTX), mask=m_out)


def check_plane_operand(operand: PlaneOperand) -> None:
    """Raise ValueError if the tensors of an operand contradict each other."""
    bits, k, n = operand.bits, operand.in_features, operand.out_features
    if bits not in FIELDS or len(operand.planes) != len(FIELDS[bits]):
        raise ValueError(
            f"operand.bits must be one of {list(FIELDS)} with a plane per field, got {bits} and {len(operand.planes)}"
        )
    if operand.group_size < 1 or (operand.group_size % SLICE_K and operand.group_size != 16):
        raise ValueError(f"operand.group_size must be 16 or a multiple of {SLICE_K}, got {operand.group_size}")
    for number, (plane, width) in enumerate(zip(operand.planes, FIELDS[bits], strict=True)):
        shape = [-(-k // tile_k(width)), n, SLICE_K]
        if plane.dtype != torch.int16 or list(plane.shape) != shape or not plane.is_contiguous():
            raise ValueError(
                f"planes[{number}] must be contiguous int16 {shape}, got {plane.dtype} {list(plane.shape)}"
            )
    groups = [-(-k // operand.group_size), n]
    if list(operand.scales.shape) != groups or not operand.scales.is_contiguous():
        raise ValueError(f"scales must be contiguous {groups}, got {list(operand.scales.shape)}")
    offsets = operand.offsets
    if offsets is None:
        return
    if (
        offsets.dtype not in (torch.int8, torch.int16)
        or list(offsets.shape) != groups
        or not offsets.is_contiguous()
    ):  # fmt: skip
        raise ValueError(
            f"offsets must be contiguous int8 or int16 {groups}, got {offsets.dtype} {list(offsets.shape)}"
        )


def _check_dequantize(planes: Tensor, operand: PlaneOperand, *, dtype: torch.dtype, out: Tensor | None = None) -> None:
    check_plane_operand(operand)
    if planes is not operand.planes[0]:
        raise ValueError("planes must be operand.planes[0]")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point type, got {dtype}")
    shape = (operand.out_features, operand.in_features)
    if out is not None and (tuple(out.shape) != shape or out.dtype != dtype or (out.numel() and out.stride(1) != 1)):
        raise ValueError(f"out must be {dtype} {list(shape)} with rows contiguous, got {out.dtype} {list(out.shape)}")


@op(reference=dequantize_reference, check=_check_dequantize)
def dequantize(planes: Tensor, operand: PlaneOperand, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Give the matrix of an operand, its input features in stored order.

    Args:
        planes: operand.planes[0]; it decides on the device.
        operand: a PlaneOperand with in_features K and out_features N.
        dtype: element type of the result.
        out: [N, K] to write to, rows contiguous; a new tensor by default.

    Returns:
        [N, K] in dtype.

    Raises:
        ValueError: the operand's tensors contradict each other.
    """
    n, k = operand.out_features, operand.in_features
    if out is None:
        out = torch.empty(n, k, dtype=dtype, device=planes.device)
    if n and k:
        _dequantize_kernel[(num_steps(operand), triton.cdiv(n, BLOCK_N))](
            planes, operand.planes[-1], operand.scales, operand.scales if operand.offsets is None else operand.offsets,
            out, n, k, out.stride(0), planes.shape[0], operand.scales.shape[0], operand.group_size,
            *constants_of(operand), EVEN_N=n % BLOCK_N == 0, PTX=is_ptx_target(planes), BLOCK_N=BLOCK_N, num_warps=4,
        )  # fmt: skip
    return out
