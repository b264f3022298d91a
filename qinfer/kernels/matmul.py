"""y = x · W + bias, for a weight matrix in any operand layout.

    y[m, n] = sum_k x[m, k] W[n, k] + bias[n],   x [M, K], y [M, N]

Routes, chosen by the operand and by M alone:
- DenseOperand: torch's matrix product (cuBLAS, hipBLAS).
- PlaneOperand, M up to where `tiles.lookup` has a tile, 64 rows anywhere and up to 512 on a GPU where that was
  measured: one kernel that unpacks weights in registers (`plane_part.py`), once for as many rows as a tile has. Tiles
  for few rows scale sums, tiles for many rows scale weights.
- SegmentedOperand, as many rows: the same kernel once per segment; their sums meet like the parts of a split K.
- Both, where a tile has `wgmma`, on Hopper for up to 64 rows: the kernel of `wgmma.py`, which can walk over segments.
- Both, more rows: the matrix is dequantized into a scratch of at most MAX_SCRATCH elements, then multiplied by torch;
  the cost of writing it is paid back by the rows.

Accumulation is fp32 everywhere. With K split over programs, each part has a sum of its own, and whoever reads the
product adds the parts in the order of K: a kernel that makes one sum of them (`matmul`), or the next op of the model
while it reads its input anyway (`matmul_parts`). No floating-point atomics, so two runs agree bit for bit, and no
program waits for another.

Limits: x is fp16 or bf16 on a GPU (fp32 works and is slow); x is already in `operand.order`.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from itertools import accumulate
from threading import Lock

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qinfer.errors import UnsupportedError
from qinfer.kernels.codes import constants_of, num_steps
from qinfer.kernels.dequant import check_plane_operand, dequantize
from qinfer.kernels.device import arch, is_ptx_target, num_sms, op
from qinfer.kernels.operand import SLICE_K, DenseOperand, Operand, PlaneOperand, SegmentedOperand
from qinfer.kernels.overlap import let_next_start, overlap, starts_early, wait_for_inputs
from qinfer.kernels.parts import load_sum
from qinfer.kernels.plane_part import accumulate_part
from qinfer.kernels.tiles import FEW_ROWS, FUSED_ROWS, Tile, lookup, registers, rule, shapes_of, shared_bytes
from qinfer.kernels.wgmma import check_wgmma, launch_wgmma

MAX_SCRATCH = 512 * 2**20  # elements, the max_dq_size of ExLlamaV2
SUM_COLUMNS = 256
WARP = 32
MAX_STAGES = 6

# Matrices that the reference has dequantized on a CPU, as long as their planes live.
_kept: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
_keeping = Lock()


def segments_of(operand: PlaneOperand | SegmentedOperand) -> tuple[PlaneOperand, ...]:
    """Return the matrices that lie on top of each other; most operands are one."""
    return operand.segments if isinstance(operand, SegmentedOperand) else (operand,)


def _dequantized(operand: PlaneOperand) -> Tensor:
    """Return the matrix in fp32; on a CPU keep it, up to MAX_SCRATCH elements in all.

    A CPU has no other way to multiply, and unpacking costs it a hundred times the product with one row.
    """
    planes = operand.planes[0]
    if planes in _kept:
        return _kept[planes]
    weight = dequantize.reference(planes, operand, dtype=torch.float32)
    with _keeping:
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
    if isinstance(operand, DenseOperand):
        weight = operand.weight.float()
    else:
        weight = torch.cat([_dequantized(segment) for segment in segments_of(operand)], dim=1)
    y = x.float() @ weight.t()
    if bias is not None:
        y += bias.float()
    if out is None:
        return y.to(out_dtype or x.dtype)
    return out.copy_(y)


# M differs from step to step and the parts from matrix to matrix; a kernel per divisibility of either would be compiled
# in the middle of serving.
@triton.jit(
    do_not_specialize=["M", "first_features", "first_parts", "part_steps", "long_parts", "num_groups", "num_highs"]
)
def _matmul_kernel(
    p_x, p_highs, p_lows, p_scales, p_offsets, p_bias,
    p_out,  # [parts of K, M, N], rows out_stride apart
    M, N, x_stride, out_stride, first_features, first_parts, part_steps, long_parts, num_highs, num_groups, group_sizes,
    SEGMENTS: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_N: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, COPIES: tl.constexpr, OVERLAP: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        let_next_start(OVERLAP)
    # Programs that share a part of x sit next to each other; parts of K are the slow axis, so a wave reads few K steps.
    i_n, i_k, i_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_n, m_m = (o_n < N) | EVEN_N, o_m[None, :] < M
    b_acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for g in tl.static_range(len(SEGMENTS)):
        # A program belongs to one segment, and walks over its part of it; with one segment there is nothing to ask.
        is_mine = True if len(SEGMENTS) == 1 else (i_k >= first_parts[g]) & (i_k < first_parts[g + 1])
        if is_mine:
            b_acc = accumulate_part(
                p_x + first_features[g], p_highs[g], p_lows[g], p_scales[g], p_offsets[g],
                i_k - first_parts[g], part_steps[g], long_parts[g], o_m, m_m, i_n * BLOCK_N, N,
                first_features[g + 1] - first_features[g], x_stride, num_highs[g], num_groups[g], group_sizes[g],
                SEGMENTS[g][0], SEGMENTS[g][1], SEGMENTS[g][2], SEGMENTS[g][3], SEGMENTS[g][4], SEGMENTS[g][5],
                SEGMENTS[g][6], SEGMENTS[g][7], EVEN_N, PTX, BLOCK_M, BLOCK_N, STAGES[g], OVERLAP, COPIES,
            )  # fmt: skip
    let_next_start(OVERLAP)
    if HAS_BIAS:
        # Once, whatever the number of parts.
        m_bias = m_n & (i_k == 0)
        b_acc += tl.load(p_bias + o_n, mask=m_bias, other=0.0).to(tl.float32)[:, None]
    p_y = p_out + (i_k.to(tl.int64) * M + o_m[None, :]) * out_stride + o_n[:, None]
    tl.store(p_y, b_acc.to(p_out.dtype.element_ty), mask=m_n[:, None] & m_m)


@triton.jit(do_not_specialize=["M"])
def _sum_kernel(
    p_parts, p_out, M, N, out_stride,
    NUM_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if not EARLY:
        let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    let_next_start(OVERLAP)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    o_m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    m_out = (o_m < M) & (o_n < N)
    b_sum = load_sum(p_parts + o_m * N + o_n, M * tl.cast(N, tl.int64), m_out, NUM_PARTS)
    tl.store(p_out + o_m * out_stride + o_n, b_sum.to(p_out.dtype.element_ty), mask=m_out)


def _check_segments(segments: Sequence[PlaneOperand]) -> None:
    for number, segment in enumerate(segments):
        check_plane_operand(segment)
        if segment.out_features != segments[0].out_features:
            raise ValueError(
                f"segments[{number}] must have {segments[0].out_features} outputs, got {segment.out_features}"
            )
        if number + 1 < len(segments) and segment.in_features % SLICE_K:
            raise ValueError(f"segments[{number}] must have a multiple of {SLICE_K} inputs, got {segment.in_features}")


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
    if not isinstance(operand, DenseOperand):
        _check_segments(segments_of(operand))
    elif x.is_cuda and x.dtype != operand.weight.dtype:
        raise TypeError(f"x must have the weight's dtype {operand.weight.dtype}, got {x.dtype}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias must be [{n}], got {list(bias.shape)}")
    if out is not None and (tuple(out.shape) != (x.shape[0], n) or out.stride(1) != 1):
        raise ValueError(f"out must be {[x.shape[0], n]} with rows contiguous, got {list(out.shape)}")
    if out is not None and out_dtype not in (None, out.dtype):
        raise TypeError(f"out_dtype must be that of out, {out.dtype}, got {out_dtype}")
    if tile is not None and tile.wgmma and not isinstance(operand, DenseOperand):
        check_wgmma(x, segments_of(operand))
    if tile is not None and tile.scaled and arch(x.device) == "sm_100":
        raise UnsupportedError("Triton miscompiles tiles that scale weights for sm_100; tiles with scaled=False work")


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Multiply by a dense matrix; torch keeps the fp32 accumulator when out is fp32 and x is not."""
    if out.dtype not in (x.dtype, torch.float32):
        # No library multiplies fp16 to bf16: the fp32 sums are rounded by themselves.
        wide = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        _dense(x, weight, bias, wide)
        out.copy_(wide)
        return
    if x.dtype != out.dtype and x.is_cuda:
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
    elif x.dtype == out.dtype:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.mm(x.to(out.dtype), weight.t().to(out.dtype), out=out)
    if bias is not None:
        out += bias


def _columns(operand: PlaneOperand, start: int, stop: int) -> PlaneOperand:
    """Return the part of an operand that makes some of the outputs."""
    return replace(
        operand,
        planes=tuple(plane[:, start:stop].contiguous() for plane in operand.planes),
        scales=operand.scales[:, start:stop].contiguous(),
        offsets=None if operand.offsets is None else operand.offsets[:, start:stop].contiguous(),
    )


def _dequantized_part(segments: Sequence[PlaneOperand], start: int, stop: int, scratch: Tensor) -> Tensor:
    """Dequantize some of the outputs of all segments, side by side along K, into the scratch: [stop - start, K]."""
    whole, first = stop - start == segments[0].out_features, 0
    for segment in segments:
        part = segment if whole else _columns(segment, start, stop)
        columns = scratch[: stop - start, first : first + segment.in_features]
        dequantize.launch(part.planes[0], part, dtype=scratch.dtype, out=columns)
        first += segment.in_features
    return scratch[: stop - start]


def _by_dequantizing(x: Tensor, segments: Sequence[PlaneOperand], bias: Tensor | None, out: Tensor) -> None:
    """Dequantize as many columns as fit into the scratch, multiply, repeat."""
    n, step = segments[0].out_features, max(1, MAX_SCRATCH // max(1, x.shape[1]))
    scratch = torch.empty(min(n, step), x.shape[1], dtype=x.dtype, device=x.device)
    for start in range(0, n, step):
        stop = min(start + step, n)
        weight = _dequantized_part(segments, start, stop, scratch)
        _dense(x, weight, None if bias is None else bias[start:stop], out[:, start:stop])


def _fused(
    x: Tensor, segments: Sequence[PlaneOperand], bias: Tensor | None, out: Tensor | None, dtype: torch.dtype, tile: Tile
) -> Tensor:
    """Launch the kernel that reads packed weights, once for all segments, whose sums are parts like those of one.

    Returns:
        [parts, M, N]: one part in `out` or in dtype, or several in fp32.
    """
    m, n = x.shape[0], segments[0].out_features
    splits = [_splits(tile.split_k, segment, segments) for segment in segments]
    parts = 1 if tile.wgmma and tile.split_k == 1 else sum(splits)
    if out is None or parts > 1:
        y = torch.empty(parts, m, n, dtype=dtype if parts == 1 else torch.float32, device=x.device)
    else:
        y = out[None]
    if tile.wgmma:
        launch_wgmma(x, segments, splits, bias, y, tile)
        return y
    # Scales with fewer elements than a program has threads would be loaded by some of them and handed around.
    copies = max(1, WARP * tile.warps // tile.block_n) if tile.scaled else 0
    _matmul_kernel[(triton.cdiv(n, tile.block_n), parts, triton.cdiv(m, tile.block_m))](
        x, tuple(s.planes[0] for s in segments), tuple(s.planes[-1] for s in segments),
        tuple(s.scales for s in segments), tuple(s.scales if s.offsets is None else s.offsets for s in segments),
        bias, y, m, n, x.stride(0), y.stride(1),
        tuple(accumulate((s.in_features for s in segments), initial=0)), tuple(accumulate(splits, initial=0)),
        *zip(*(divmod(num_steps(s), split) for s, split in zip(segments, splits, strict=True)), strict=True),
        tuple(s.planes[0].shape[0] for s in segments), tuple(s.scales.shape[0] for s in segments),
        tuple(s.group_size for s in segments),
        SEGMENTS=tuple(constants_of(segment) for segment in segments), HAS_BIAS=bias is not None,
        EVEN_N=n % tile.block_n == 0, PTX=is_ptx_target(x),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=_stages(tile, segments), COPIES=copies,
        EARLY=starts_early(parts, m), num_warps=tile.warps,
        **registers(arch(x.device), tuple(s.bits for s in segments), tile), **overlap(x),
    )  # fmt: skip
    return y


def _stages(tile: Tile, segments: Sequence[PlaneOperand]) -> tuple[int, ...]:
    """Return the pipeline stages of every segment: what the widest needs of shared memory, the others may have too."""
    if len(segments) == 1:
        return (tile.stages,)
    depths = range(tile.stages, MAX_STAGES + 1)
    needs = [
        [shared_bytes(segment.bits, tile.block_m, tile.block_n, depth) for depth in depths] for segment in segments
    ]
    limit = max(need[0] for need in needs)
    return tuple(tile.stages + sum(bytes_there <= limit for bytes_there in need[1:]) for need in needs)


def _add_up(parts: Tensor, out: Tensor) -> None:
    """Write the sum of [S, M, N] fp32 parts to out [M, N]."""
    num_parts, m, n = parts.shape
    # Few rows are spread over many small programs, which all run at once: each waits for memory only once.
    rows = 1 if m <= FEW_ROWS else 4
    _sum_kernel[triton.cdiv(n, SUM_COLUMNS), triton.cdiv(m, rows)](
        parts, out, m, n, out.stride(0),
        NUM_PARTS=num_parts, BLOCK_M=rows, BLOCK_N=SUM_COLUMNS, EARLY=starts_early(num_parts, m), num_warps=rows,
        **overlap(out),
    )  # fmt: skip


def _splits(split_k: int, segment: PlaneOperand, segments: Sequence[PlaneOperand]) -> int:
    """Share the parts of K out over segments by their bytes; each gets at least one, and no more than it has steps."""
    share = split_k * segment.nbytes / sum(other.nbytes for other in segments)
    return max(1, min(round(share), num_steps(segment)))


def tile_of(segments: Sequence[PlaneOperand], device: torch.device, m: int) -> Tile | None:
    """Return the tile of a packed matrix for m rows; None if they are so many that it is dequantized for them."""
    has_offsets = any(segment.offsets is not None for segment in segments)
    return lookup(arch(device), num_sms(device), m, segments[0].out_features, shapes_of(segments), has_offsets)


def _product(
    x: Tensor, operand: Operand, bias: Tensor | None, out: Tensor | None, dtype: torch.dtype, tile: Tile | None
) -> Tensor:
    """Take the route of an operand and M; return [S, M, N], which is `out` if S is 1 and one was given."""
    segments: Sequence[PlaneOperand] = () if isinstance(operand, DenseOperand) else segments_of(operand)
    if segments:
        tile = tile or tile_of(segments, x.device, x.shape[0])
        if tile is not None and tile.wgmma and x.element_size() > 2:
            widths = tuple(segment.bits for segment in segments)  # one tile, so that a row's bits do not depend on M
            tile = rule(num_sms(x.device), FUSED_ROWS, operand.out_features, x.shape[1], widths, max_rows=32)
        if tile is not None:
            return _fused(x, segments, bias, out, dtype, tile)
    y = torch.empty(x.shape[0], operand.out_features, dtype=dtype, device=x.device) if out is None else out
    if isinstance(operand, DenseOperand):
        _dense(x, operand.weight, bias, y)
    else:
        _by_dequantizing(x, segments, bias, y)
    return y[None]


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
        UnsupportedError: the tile does not work on this GPU.
    """
    m, n = x.shape[0], operand.out_features
    if out is None:
        out = torch.empty(m, n, dtype=out_dtype or x.dtype, device=x.device)
    if m == 0 or n == 0:
        return out
    parts = _product(x, operand, bias, out, out.dtype, tile)
    if parts.shape[0] > 1:
        _add_up(parts, out)
    return out


def matmul_parts_reference(
    x: Tensor,
    operand: Operand,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Compute the product as one part."""
    return matmul_reference(x, operand, bias=bias, out_dtype=out_dtype)[None]


def _check_matmul_parts(
    x: Tensor,
    operand: Operand,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> None:
    _check_matmul(x, operand, bias=bias, out_dtype=out_dtype, tile=tile)


@op(reference=matmul_parts_reference, check=_check_matmul_parts)
def matmul_parts(
    x: Tensor,
    operand: Operand,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Multiply rows by a weight matrix and leave the last addition, over parts of K, to the reader.

    Args:
        x: [M, K] fp16 or bf16, rows contiguous, features in operand.order.
        operand: the matrix, K to N.
        bias: [N], in the first part.
        out_dtype: element type of a result of one part, x's by default; several parts are fp32.
        tile: forces a tile of the fused kernel, whatever M; by default the tile table decides.

    Returns:
        [S, M, N], whose sum over S, in that order, is the product.

    Raises:
        ValueError: a shape does not fit.
        TypeError: a dtype does not fit.
        UnsupportedError: the tile does not work on this GPU.
    """
    dtype = out_dtype or x.dtype
    if x.shape[0] == 0 or operand.out_features == 0:
        return torch.empty(1, x.shape[0], operand.out_features, dtype=dtype, device=x.device)
    return _product(x, operand, bias, None, dtype, tile)
