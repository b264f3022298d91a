"""y = x · W + bias, for a weight matrix in any operand layout.

    y[m, n] = sum_k x[m, k] W[n, k] + bias[n],   x [M, K], y [M, N]

Routes, chosen by the operand and by M alone:
- DenseOperand: torch's matrix product (cuBLAS, hipBLAS).
- PlaneOperand, M <= FUSED_ROWS: one kernel that reads each packed weight once. The problem is transposed,
  Yᵀ = W · Xᵀ, so that the tensor cores take weights, unpacked in registers, as their first operand, and a handful of
  rows of x as their second. A plane of a tile is a K slice of 32 features (`operand.py`), so the tile is four dots
  against four slices of x; scales multiply the fp32 accumulator once per group.
- PlaneOperand, more rows: the matrix is dequantized into a scratch of at most MAX_SCRATCH elements, then multiplied by
  torch; the cost of writing it is paid back by the rows.

Accumulation is fp32 everywhere. With K split over programs, partial sums go to a workspace and the program that arrives
last adds them in the order of K: no floating-point atomics, so two runs agree bit for bit.

Limits: x is fp16 or bf16 on a GPU (fp32 works and is slow); x is already in `operand.order`.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qinfer.kernels.dequant import check_plane_operand, dequantize, plane4
from qinfer.kernels.device import arch, is_ptx_target, num_sms, op
from qinfer.kernels.operand import TILE_K, DenseOperand, Operand, PlaneOperand
from qinfer.kernels.tiles import Tile, lookup

FUSED_ROWS = 64
MAX_SCRATCH = 512 * 2**20  # elements, the max_dq_size of ExLlamaV2
MAX_LOCKS = 1 << 16


# Matrices that the reference has dequantized on a CPU, as long as their planes live.
_kept: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()


def _dequantized(operand: PlaneOperand) -> Tensor:
    """Return the matrix in fp32; on a CPU keep it, up to MAX_SCRATCH elements in all.

    A CPU has no other way to multiply, and unpacking costs it a hundred times the product with one row.
    """
    planes = operand.planes[0]
    if planes in _kept:
        return _kept[planes]
    weight = dequantize.reference(planes, operand, dtype=torch.float32)
    if planes.device.type == "cpu" and weight.numel() + sum(w.numel() for w in _kept.values()) <= MAX_SCRATCH:
        _kept[planes] = weight
    return weight


def matmul_reference(
    x: Tensor,
    operand: Operand,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Dequantize the matrix and multiply in fp32; `tile` has no meaning here."""
    weight = operand.weight.float() if isinstance(operand, DenseOperand) else _dequantized(operand)
    y = x.float() @ weight.t()
    if bias is not None:
        y += bias.float()
    if out is None:
        return y.to(out_dtype or x.dtype)
    return out.copy_(y)


@triton.jit
def _scaled(b_part, p_scales, o_group, o_n, m_n):
    """Multiply the sum over one group, [BLOCK_N, BLOCK_M], by the scales of that group."""
    return b_part * tl.load(p_scales + o_group + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _load_x(p_x, m_m, o_k, K, EVEN_K: tl.constexpr):
    """Load one K slice of x, transposed: [32, BLOCK_M]."""
    return tl.load(p_x, mask=m_m if EVEN_K else m_m & (o_k[:, None] < K), other=0.0)


@triton.jit
def _shift(b_codes, p_offsets, o_group, o_n, m_n, HAS_OFFSETS: tl.constexpr):
    """Subtract the offsets of one group from its codes; differences of small integers are exact."""
    if HAS_OFFSETS:
        b_offsets = tl.load(p_offsets + o_group + o_n, mask=m_n, other=0).to(tl.float32)
        b_codes -= b_offsets.to(b_codes.dtype)[:, None]
    return b_codes


@triton.jit
def _finish(b_acc, p_bias, p_out, o_m, o_n, m_n, m_out, out_stride, HAS_BIAS: tl.constexpr):
    """Add the bias and store y, [BLOCK_N, BLOCK_M] transposed."""
    if HAS_BIAS:
        b_acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    p_y = p_out + o_m.to(tl.int64)[None, :] * out_stride + o_n[:, None]
    tl.store(p_y, b_acc.to(p_out.dtype.element_ty), mask=m_out)


# M differs from step to step; a kernel per divisibility of M would be compiled in the middle of serving.
@triton.jit(do_not_specialize=["M"])
def _matmul_kernel(
    p_x, p_planes, p_scales, p_offsets, p_bias, p_out, p_partial, p_locks,
    M, N, K, x_stride, out_stride, group_tiles, num_groups,
    HAS_OFFSETS: tl.constexpr, HAS_BIAS: tl.constexpr, SUBGROUPS: tl.constexpr, EVEN_K: tl.constexpr, PTX: tl.constexpr,
    IS_SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Programs that share a part of x sit next to each other; parts of K are the slow axis, so a wave reads few K tiles.
    i_n, i_k, i_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.arange(0, 32)
    m_n, m_m = o_n < N, o_m[None, :] < M
    num_tiles = tl.cdiv(K, 128)
    num_parts = tl.num_programs(1)
    first, last = i_k * num_tiles // num_parts, (i_k + 1) * num_tiles // num_parts
    p_w = p_planes + (first.to(tl.int64) * N + o_n)[:, None] * 32 + o_c[None, :]
    p_xs = p_x + o_m.to(tl.int64)[None, :] * x_stride + first * 128 + o_c[:, None]
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    N64 = tl.cast(N, tl.int64)
    b_acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for i_tile in tl.range(first, last, num_stages=STAGES):
        b_words = tl.load(p_w, mask=m_n[:, None], other=0, cache_modifier=".cg")
        o_k = i_tile * 128 + o_c
        b_x0 = _load_x(p_xs, m_m, o_k, K, EVEN_K)
        b_x1 = _load_x(p_xs + 32, m_m, o_k + 32, K, EVEN_K)
        b_x2 = _load_x(p_xs + 64, m_m, o_k + 64, K, EVEN_K)
        b_x3 = _load_x(p_xs + 96, m_m, o_k + 96, K, EVEN_K)
        b_0, b_1, b_2, b_3 = plane4(b_words, DTYPE, PTX)
        if SUBGROUPS == 1:
            o_g = (i_tile // group_tiles) * N64
            b_part = tl.dot(_shift(b_0, p_offsets, o_g, o_n, m_n, HAS_OFFSETS), b_x0, input_precision="ieee")
            b_part = tl.dot(_shift(b_1, p_offsets, o_g, o_n, m_n, HAS_OFFSETS), b_x1, b_part, input_precision="ieee")
            b_part = tl.dot(_shift(b_2, p_offsets, o_g, o_n, m_n, HAS_OFFSETS), b_x2, b_part, input_precision="ieee")
            b_part = tl.dot(_shift(b_3, p_offsets, o_g, o_n, m_n, HAS_OFFSETS), b_x3, b_part, input_precision="ieee")
            b_acc += _scaled(b_part, p_scales, o_g, o_n, m_n)
        else:
            # Groups of 64 take two slices each, groups of 32 one.
            # The last tile may hold fewer groups than the others; its padding repeats the last group, times x = 0.
            i_g0, i_last = i_tile * SUBGROUPS, num_groups - 1
            o_g0 = i_g0 * N64
            o_g1 = tl.minimum(i_g0 + SUBGROUPS // 4, i_last) * N64
            o_g2 = tl.minimum(i_g0 + SUBGROUPS // 2, i_last) * N64
            o_g3 = tl.minimum(i_g0 + SUBGROUPS // 2 + SUBGROUPS // 4, i_last) * N64
            b_part = tl.dot(_shift(b_0, p_offsets, o_g0, o_n, m_n, HAS_OFFSETS), b_x0, input_precision="ieee")
            if SUBGROUPS == 4:
                b_acc += _scaled(b_part, p_scales, o_g0, o_n, m_n)
                b_part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            b_part = tl.dot(_shift(b_1, p_offsets, o_g1, o_n, m_n, HAS_OFFSETS), b_x1, b_part, input_precision="ieee")
            b_acc += _scaled(b_part, p_scales, o_g1, o_n, m_n)
            b_part = tl.dot(_shift(b_2, p_offsets, o_g2, o_n, m_n, HAS_OFFSETS), b_x2, input_precision="ieee")
            if SUBGROUPS == 4:
                b_acc += _scaled(b_part, p_scales, o_g2, o_n, m_n)
                b_part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            b_part = tl.dot(_shift(b_3, p_offsets, o_g3, o_n, m_n, HAS_OFFSETS), b_x3, b_part, input_precision="ieee")
            b_acc += _scaled(b_part, p_scales, o_g3, o_n, m_n)
        p_w += N64 * 32
        p_xs += 128
    m_out = m_n[:, None] & m_m
    if not IS_SPLIT:
        _finish(b_acc, p_bias, p_out, o_m, o_n, m_n, m_out, out_stride, HAS_BIAS)
    else:
        p_tile = p_partial + o_m.to(tl.int64)[None, :] * N + o_n[:, None]
        part_stride = M * N64
        tl.store(p_tile + i_k * part_stride, b_acc, mask=m_out)
        # All threads' stores come before the one thread's release; its acquire comes before all threads' loads.
        tl.debug_barrier()
        p_lock = p_locks + i_m * tl.num_programs(0) + i_n
        arrived = tl.atomic_add(p_lock, 1, sem="acq_rel")
        if arrived == num_parts - 1:
            b_sum = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for i_part in range(num_parts):
                b_sum += tl.load(p_tile + i_part * part_stride, mask=m_out, other=0.0, cache_modifier=".cg")
            _finish(b_sum, p_bias, p_out, o_m, o_n, m_n, m_out, out_stride, HAS_BIAS)
            tl.store(p_lock, 0)


@cache
def _locks(device: torch.device) -> Tensor:
    """Return the arrival counters of a device; every launch leaves them at zero.

    Launches share them, so all matmuls of a device must run on one stream at a time.
    """
    return torch.zeros(MAX_LOCKS, dtype=torch.int32, device=device)


def _check_matmul(
    x: Tensor,
    operand: Operand,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> None:
    n, k = operand.out_features, operand.in_features
    if x.dim() != 2 or x.shape[1] != k or x.stride(1) != 1:
        raise ValueError(f"x must be [M, {k}] with rows contiguous, got {list(x.shape)} with strides {x.stride()}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if isinstance(operand, PlaneOperand):
        check_plane_operand(operand)
    elif x.is_cuda and x.dtype != operand.weight.dtype:
        raise TypeError(f"x must have the weight's dtype {operand.weight.dtype}, got {x.dtype}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias must be [{n}], got {list(bias.shape)}")
    if out is not None and (tuple(out.shape) != (x.shape[0], n) or out.stride(1) != 1):
        raise ValueError(f"out must be {[x.shape[0], n]} with rows contiguous, got {list(out.shape)}")
    if out is not None and out_dtype not in (None, out.dtype):
        raise TypeError(f"out_dtype must be that of out, {out.dtype}, got {out_dtype}")


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Multiply by a dense matrix; torch keeps the fp32 accumulator when out is fp32 and x is not."""
    if x.dtype != out.dtype and x.is_cuda:
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
    elif x.dtype == out.dtype:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.mm(x.to(out.dtype), weight.t().to(out.dtype), out=out)
    if bias is not None:
        out += bias


def _by_dequantizing(x: Tensor, operand: PlaneOperand, bias: Tensor | None, out: Tensor) -> None:
    """Dequantize as many columns as fit into the scratch, multiply, repeat."""
    n, step = operand.out_features, max(1, MAX_SCRATCH // operand.in_features)
    if n <= step:
        return _dense(x, dequantize.launch(operand.planes[0], operand, dtype=x.dtype), bias, out)
    for start in range(0, n, step):
        stop = min(start + step, n)
        part = PlaneOperand(
            planes=(operand.planes[0][:, start:stop].contiguous(),),
            scales=operand.scales[:, start:stop].contiguous(),
            offsets=None if operand.offsets is None else operand.offsets[:, start:stop].contiguous(),
            bits=operand.bits,
            group_size=operand.group_size,
            in_features=operand.in_features,
        )
        weight = dequantize.launch(part.planes[0], part, dtype=x.dtype)
        _dense(x, weight, None if bias is None else bias[start:stop], out[:, start:stop])
    return None


def _fused(x: Tensor, operand: PlaneOperand, bias: Tensor | None, out: Tensor, tile: Tile) -> None:
    """Launch the kernel that reads packed weights."""
    m, n, k = x.shape[0], operand.out_features, operand.in_features
    grid = (triton.cdiv(n, tile.block_n), tile.split_k, triton.cdiv(m, tile.block_m))
    partial = locks = out
    if tile.split_k > 1:
        if grid[0] * grid[2] > MAX_LOCKS:
            raise ValueError(
                f"a matmul with split_k > 1 takes at most {MAX_LOCKS} output tiles, got {grid[0] * grid[2]}"
            )
        partial = torch.empty(tile.split_k, m, n, dtype=torch.float32, device=x.device)
        locks = _locks(x.device)
    _matmul_kernel[grid](
        x, operand.planes[0], operand.scales, operand.offsets, bias, out, partial, locks,
        m, n, k, x.stride(0), out.stride(0), max(1, operand.group_size // TILE_K),
        operand.scales.shape[0],
        HAS_OFFSETS=operand.offsets is not None, HAS_BIAS=bias is not None,
        SUBGROUPS=max(1, TILE_K // operand.group_size), EVEN_K=k % TILE_K == 0, PTX=is_ptx_target(x),
        IS_SPLIT=tile.split_k > 1, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.stages,
        num_warps=tile.warps,
    )  # fmt: skip


@op(reference=matmul_reference, check=_check_matmul)
def matmul(
    x: Tensor,
    operand: Operand,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Multiply rows by a weight matrix.

    Args:
        x: [M, K] fp16 or bf16, rows contiguous, features in operand.order.
        operand: the matrix, K to N.
        bias: [N], added in fp32 (by torch in out's dtype on the dense routes).
        out: [M, N] to write to, rows contiguous; it may be a slice of the columns of a wider tensor.
        out_dtype: element type of the result, x's by default.
        tile: forces a tile of the fused kernel, whatever M; by default the tile table decides.

    Returns:
        [M, N]; `out` if that was given.

    Raises:
        ValueError: a shape does not fit.
        TypeError: a dtype does not fit.
    """
    m, n, k = x.shape[0], operand.out_features, operand.in_features
    if out is None:
        out = torch.empty(m, n, dtype=out_dtype or x.dtype, device=x.device)
    if m == 0 or n == 0:
        return out
    if isinstance(operand, DenseOperand):
        _dense(x, operand.weight, bias, out)
    elif tile is None and m > FUSED_ROWS:
        _by_dequantizing(x, operand, bias, out)
    else:
        _fused(x, operand, bias, out, tile or lookup(arch(x.device), num_sms(x.device), m, n, k))
    return out
