"""y = x · W + bias, such that a row of y depends on its row of x alone: not on M, nor on where in x the row stands.

    y[m, n] = sum_k x[m, k] W[n, k] + bias[n],   x [M, K], y [M, N]

`matmul` takes the route and the tile that are best for M, and with them the order in which it adds. Here both are fixed
by the matrix: packed operands always run the fused kernel with the tile of FUSED_ROWS rows, its parts of K added in
order; dense ones run the kernel below, one tile for all shapes, K in one piece. Accumulation is fp32. Few rows pay for
a tile that is too large, many rows for weights that are read and unpacked once per tile: prompts take several times as
long. A CPU's reference is torch's product, whose bits do depend on M.
"""

from __future__ import annotations

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.device import op
from qinfer.kernels.matmul import matmul, segments_of, tile_of
from qinfer.kernels.operand import DenseOperand, Operand, PlaneOperand, SegmentedOperand
from qinfer.kernels.overlap import let_next_start, overlap, wait_for_inputs
from qinfer.kernels.tiles import FUSED_ROWS, Tile

BLOCK_M, BLOCK_N, BLOCK_K = 32, 64, 64


def invariant_matmul_reference(
    x: Tensor,
    operand: Operand,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply in fp32, by torch: the same numbers up to rounding."""
    return matmul.reference(x, operand, bias=bias, out=out, out_dtype=out_dtype)


# M differs from step to step; a kernel per divisibility of it would be compiled in the middle of serving.
@triton.jit(do_not_specialize=["M"])
def _dense_kernel(
    p_x, p_weight, p_bias, p_out, M, N, K, x_stride, weight_stride, out_stride,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    o_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    m_n, m_m = o_n < N, o_m < M
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    wait_for_inputs(OVERLAP)
    for start in range(0, K, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        b_x = tl.load(p_x + o_m[:, None] * x_stride + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        p_tile = p_weight + o_n[None, :] * weight_stride + o_k[:, None]
        b_w = tl.load(p_tile, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_acc = tl.dot(b_x, b_w.to(b_x.dtype), b_acc, input_precision="ieee")
    let_next_start(OVERLAP)
    if HAS_BIAS:
        b_acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_y = p_out + o_m[:, None] * out_stride + o_n[None, :]
    tl.store(p_y, b_acc.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


def fixed_tile(operand: PlaneOperand | SegmentedOperand, device: torch.device) -> Tile:
    """Return the tile of a packed matrix for any number of rows."""
    tile = tile_of(segments_of(operand), device, FUSED_ROWS)
    return cast("Tile", tile)  # up to FUSED_ROWS rows there is one


def _check_invariant_matmul(
    x: Tensor,
    operand: Operand,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> None:
    matmul.check(x, operand, bias=bias, out=out, out_dtype=out_dtype)
    if isinstance(operand, DenseOperand) and operand.weight.stride(1) != 1:
        raise ValueError(f"the rows of the matrix must be contiguous, got strides {operand.weight.stride()}")


@op(reference=invariant_matmul_reference, check=_check_invariant_matmul)
def invariant_matmul(
    x: Tensor,
    operand: Operand,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply rows by a weight matrix, each row as if it were alone.

    Args:
        x: [M, K] fp16 or bf16 (fp32 works and is slow), rows contiguous, features in operand.order.
        operand: the matrix, K to N.
        bias: [N], added in fp32.
        out: [M, N] to write to, rows contiguous; it may be a slice of the columns of a wider tensor.
        out_dtype: element type of the result, x's by default.

    Returns:
        [M, N]; `out` if that was given.

    Raises:
        ValueError: a shape does not fit.
        TypeError: a dtype does not fit.
    """
    m, n, k = x.shape[0], operand.out_features, operand.in_features
    if not isinstance(operand, DenseOperand):
        tile = fixed_tile(operand, x.device)
        return matmul.launch(x, operand, bias=bias, out=out, out_dtype=out_dtype, tile=tile)
    if out is None:
        out = torch.empty(m, n, dtype=out_dtype or x.dtype, device=x.device)
    if m and n:
        _dense_kernel[triton.cdiv(n, BLOCK_N), triton.cdiv(m, BLOCK_M)](
            x, operand.weight, bias, out, m, n, k, x.stride(0), operand.weight.stride(0), out.stride(0),
            HAS_BIAS=bias is not None, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4, num_stages=3,
            **overlap(x),
        )  # fmt: skip
    return out
