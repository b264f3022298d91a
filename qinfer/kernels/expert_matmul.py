"""Products of rows with the matrices of their experts, all experts in one launch.

    y[p] = x[p // (P / R)] · W[expert of pair p],   x [R, K], y [P, N]

Rows come sorted (`route.py`): a program takes one block of pairs of one expert, a tile of outputs and a part of K, and
finds its matrix at a distance from the first. Which experts are hit, and how often, is known to the GPU alone: the grid
is that of the worst case and depends on T, k and E; programs of blocks that are not needed end at once.

- Planes: the loop of `matmul.py`, with rows of x looked up in the block; one launch per segment. Nothing is dequantized
  in front of it, however many rows there are: experts see few of them.
- Dense matrices: a plain tile loop on tensor cores.

Accumulation is fp32. With K split over programs each part has a sum of its own, which the reader adds in the order of
K (`silu_mul`, `combine`). How many parts there are follows from the number of pairs, so two runs agree bit for bit.
Pairs whose expert the operand does not hold are left as they are in `out`.

Limits: x is fp16 or bf16 on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.errors import UnsupportedError
from qinfer.kernels.checks import check_device, check_float
from qinfer.kernels.codes import constants_of, num_steps
from qinfer.kernels.device import arch, is_ptx_target, num_sms, op
from qinfer.kernels.expert_operand import ExpertOperand
from qinfer.kernels.matmul import matmul_reference, segments_of
from qinfer.kernels.operand import DenseOperand, PlaneOperand, step_k
from qinfer.kernels.overlap import let_next_start, overlap, wait_for_inputs
from qinfer.kernels.plane_part import accumulate_part
from qinfer.kernels.tiles import FEW_ROWS, MAX_ROWS, Tile, cuts, registers, rule, shapes_of, tensor_rows

DENSE_BLOCK_N, DENSE_BLOCK_K = 64, 64
LONG_STEP, MIN_ROWS, SMALL_GROUP = 256, 32, 128
DENSE_WIDTHS = (8,)  # the rule for codes of 8 bits is nearest to that of dense matrices

# Experts and pairs of blocks, slots, and what kernels are compiled for.
Tables: TypeAlias = tuple[Tensor, Tensor, Tensor, dict[str, int | bool]]


@dataclass(frozen=True)
class Routing:
    """Which experts the tokens of a step take, and their pairs sorted by expert."""

    experts: Tensor  # [T, k] int32
    weights: Tensor  # [T, k] fp32
    block_experts: Tensor  # [B] int32, -1: not needed
    block_pairs: Tensor  # [B, M] int32, -1: no row

    @property
    def num_pairs(self) -> int:
        """P = T k."""
        return self.experts.numel()

    @property
    def block_rows(self) -> int:
        """M, rows of a block."""
        return self.block_pairs.shape[1]


def expert_tile(device: torch.device, num_pairs: int, operand: ExpertOperand) -> Tile:
    """Return the tile of a product: the rule for the rows that one expert has, on its share of the GPU.

    Args:
        device: where it runs.
        num_pairs: P.
        operand: the matrices.

    Raises:
        UnsupportedError: Triton makes a kernel that only traps of such groups on sm_100.
    """
    matrix, hit = operand.first, max(1, min(num_pairs, operand.num_experts))
    shapes = () if isinstance(matrix, DenseOperand) else shapes_of(segments_of(matrix))
    widths = tuple(shape.bits for shape in shapes) or DENSE_WIDTHS
    sms, rows = max(1, num_sms(device) // hit), max(1, -(-num_pairs // operand.num_experts))
    # Rows that are looked up take registers of their own: with long steps, half as many fit as in `matmul`.
    has_long_steps = max(step_k(bits) for bits in widths) > LONG_STEP
    max_rows = MIN_ROWS if has_long_steps else MAX_ROWS.get(arch(device), MIN_ROWS)
    groups = cuts(shapes)
    if tensor_rows(arch(device), groups) < FEW_ROWS:
        raise UnsupportedError(
            "experts of 3 or 5 bits in groups of 16 do not work on sm_100, for which Triton makes a kernel that only "
            "traps; groups of 32 and more do, and groups of 16 with 2, 4, 6 or 8 bits"
        )
    return rule(sms, rows, matrix.out_features, matrix.in_features, widths, max_rows=max_rows, cuts=groups)


def expert_matmul_reference(
    x: Tensor,
    operand: ExpertOperand,
    routing: Routing,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Multiply the rows of each expert that is hit; `tile` has no meaning here."""
    pairs, width = routing.experts.flatten(), operand.first.out_features
    y = x.new_empty(1, pairs.numel(), width, dtype=out_dtype or x.dtype) if out is None else out
    per_row = pairs.numel() // max(x.shape[0], 1)
    slots = range(operand.num_experts) if operand.slots is None else operand.slots.tolist()
    for expert in pairs.unique().tolist():
        if slots[expert] >= 0:
            mine = (pairs == expert).nonzero().flatten()
            y[0, mine] = matmul_reference(x[mine // per_row], operand.matrices[slots[expert]], out_dtype=y.dtype)
            y[1:, mine] = 0
    return y


@triton.jit
def _load_block(p_blocks, p_pairs, p_slots, HAS_SLOTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Load whose block this is: the matrix, 0 where there is none, whether there is one, and pairs [BLOCK_M]."""
    i_block = tl.program_id(2)
    i_slot = tl.load(p_blocks + i_block)
    if HAS_SLOTS:
        i_slot = tl.load(p_slots + i_slot, mask=i_slot >= 0, other=-1)
    b_pairs = tl.load(p_pairs + i_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))
    is_used = i_slot >= 0
    return tl.maximum(i_slot, 0).to(tl.int64), is_used, tl.where(is_used, b_pairs, -1)


# Parts and their distance differ from step to step and from matrix to matrix; a kernel per divisibility of any of these
# would be compiled in the middle of serving.
@triton.jit(do_not_specialize=["num_pairs", "part_steps", "long_parts", "num_groups", "num_high"])
def _expert_matmul_kernel(
    p_x, p_high, p_low, p_scales, p_offsets, p_blocks, p_pairs, p_slots,
    p_out,  # [parts of K, P, N]
    num_pairs, part_steps, long_parts, N, K, x_stride, out_stride, num_high, num_groups, group_size,
    BITS: tl.constexpr, HIGH_TILES: tl.constexpr, HAS_LOW: tl.constexpr, SLICES: tl.constexpr, RUN: tl.constexpr,
    GROUP: tl.constexpr, HAS_OFFSETS: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PTX: tl.constexpr,
    PER_ROW: tl.constexpr, HAS_SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    i_slot, is_used, b_pairs = _load_block(p_blocks, p_pairs, p_slots, HAS_SLOTS, BLOCK_M)
    i_n, i_k = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n, m_m = (o_n < N) | EVEN_N, b_pairs[None, :] >= 0
    N64 = tl.cast(N, tl.int64)
    # A step of K has one tile of the low plane.
    o_low = i_slot * tl.cdiv(K, SLICES * 32) * N64 * 32 if HAS_LOW else 0
    o_group = i_slot * num_groups * N64
    b_acc = accumulate_part(
        p_x, p_high + i_slot * num_high * N64 * 32, p_low + o_low, p_scales + o_group, p_offsets + o_group,
        i_k, tl.where(is_used, part_steps, 0), tl.where(is_used, long_parts, 0), b_pairs // PER_ROW, m_m,
        i_n * BLOCK_N, N, K, x_stride, num_high, num_groups, group_size,
        BITS, HIGH_TILES, HAS_LOW, SLICES, RUN, GROUP, HAS_OFFSETS, EVEN_K, EVEN_N, PTX, BLOCK_M, BLOCK_N, STAGES,
        False,  # it has waited already
    )  # fmt: skip
    let_next_start(OVERLAP)
    p_y = p_out + (i_k.to(tl.int64) * num_pairs + b_pairs[None, :]) * out_stride + o_n[:, None]
    tl.store(p_y, b_acc.to(p_out.dtype.element_ty), mask=m_n[:, None] & m_m)


@triton.jit(do_not_specialize=["num_pairs", "num_parts"])
def _dense_expert_matmul_kernel(
    p_x, p_weights, p_blocks, p_pairs, p_slots, p_out, num_pairs, num_parts, N, K, x_stride, out_stride,
    PER_ROW: tl.constexpr, HAS_SLOTS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    i_slot, is_used, b_pairs = _load_block(p_blocks, p_pairs, p_slots, HAS_SLOTS, BLOCK_M)
    i_n, i_k = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.arange(0, BLOCK_K)
    m_n, m_m = o_n[:, None] < N, b_pairs[None, :] >= 0
    num_steps = tl.where(is_used, tl.cdiv(K, BLOCK_K), 0)
    p_w = p_weights + (i_slot * N + o_n)[:, None] * K + o_c[None, :]
    p_xs = p_x + (b_pairs // PER_ROW).to(tl.int64)[None, :] * x_stride + o_c[:, None]
    b_acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for i_step in tl.range(i_k * num_steps // num_parts, (i_k + 1) * num_steps // num_parts, num_stages=STAGES):
        first = i_step * BLOCK_K
        m_w = m_n if EVEN_K else m_n & (first + o_c[None, :] < K)
        m_x = m_m if EVEN_K else m_m & (first + o_c[:, None] < K)
        b_w = tl.load(p_w + first, mask=m_w, other=0.0)
        b_x = tl.load(p_xs + first, mask=m_x, other=0.0)
        b_acc = tl.dot(b_w, b_x, b_acc, input_precision="ieee")
    let_next_start(OVERLAP)
    p_y = p_out + (i_k.to(tl.int64) * num_pairs + b_pairs[None, :]) * out_stride + o_n[:, None]
    tl.store(p_y, b_acc.to(p_out.dtype.element_ty), mask=m_n & m_m)


def _check_expert_matmul(
    x: Tensor,
    operand: ExpertOperand,
    routing: Routing,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> None:
    n, k, num_pairs = operand.first.out_features, operand.first.in_features, routing.num_pairs
    if x.dim() != 2 or x.shape[1] != k or x.stride(1) != 1:
        raise ValueError(f"x must be [R, {k}] with rows contiguous, got {list(x.shape)} with strides {x.stride()}")
    if num_pairs % x.shape[0] if x.shape[0] else num_pairs:
        raise ValueError(f"x must have rows for {num_pairs} pairs, one each or shared, got {x.shape[0]} rows")
    check_float("x", x.dtype)
    check_device(x, experts=routing.experts, blocks=routing.block_experts, pairs=routing.block_pairs)
    if isinstance(operand.first, DenseOperand) and x.is_cuda and x.dtype != operand.first.weight.dtype:
        raise TypeError(f"x must have the weights' dtype {operand.first.weight.dtype}, got {x.dtype}")
    if out is not None and (out.dim() != 3 or tuple(out.shape[1:]) != (num_pairs, n) or out.stride(2) != 1):
        raise ValueError(f"out must be [S, {num_pairs}, {n}] with rows contiguous, got {list(out.shape)}")
    if out is not None and out.shape[0] > 1 and out.stride(0) != num_pairs * out.stride(1):
        raise ValueError(f"the parts of out must follow each other row by row, got strides {list(out.stride())}")
    if out is not None and out_dtype not in (None, out.dtype):
        raise TypeError(f"out_dtype must be that of out, {out.dtype}, got {out_dtype}")
    if out is not None and out.shape[0] < operand.num_segments:
        raise ValueError(f"out must have a part for each of {operand.num_segments} segments, got {out.shape[0]}")
    if out is None and operand.slots is not None:
        raise ValueError("out must be given where an operand does not hold all experts, got None")


def _dense(x: Tensor, matrix: DenseOperand, tables: Tables, out: Tensor, tile: Tile) -> None:
    """Write the parts of a dense product to out [S, P, N]."""
    parts, num_pairs, n = out.shape
    k, (blocks, pairs, slots, constants) = matrix.in_features, tables
    _dense_expert_matmul_kernel[(triton.cdiv(n, DENSE_BLOCK_N), parts, blocks.shape[0])](
        x, matrix.weight, blocks, pairs, slots, out, num_pairs, parts, n, k, x.stride(0), out.stride(1),
        **constants, EVEN_K=k % DENSE_BLOCK_K == 0, BLOCK_M=tile.block_m, BLOCK_N=DENSE_BLOCK_N,
        BLOCK_K=DENSE_BLOCK_K, STAGES=tile.stages, num_warps=4, **overlap(x),
    )  # fmt: skip


def _planes(x: Tensor, matrix: PlaneOperand, tables: Tables, out: Tensor, tile: Tile) -> None:
    """Write the parts of a product with planes to out [S, P, N]."""
    parts, num_pairs, n = out.shape
    blocks, pairs, slots, constants = tables
    offsets = matrix.scales if matrix.offsets is None else matrix.offsets
    if step_k(matrix.bits) > LONG_STEP and matrix.group_size < SMALL_GROUP and is_ptx_target(x):
        # NVIDIA: sixteen slices of a step, unrolled, do not fit the registers of four warps where groups are small.
        tile = replace(tile, warps=8)
    names = ("BITS", "HIGH_TILES", "HAS_LOW", "SLICES", "RUN", "GROUP", "HAS_OFFSETS", "EVEN_K")
    _expert_matmul_kernel[(triton.cdiv(n, tile.block_n), parts, blocks.shape[0])](
        x, matrix.planes[0], matrix.planes[-1], matrix.scales, offsets, blocks, pairs, slots, out,
        num_pairs, *divmod(num_steps(matrix), parts), n, matrix.in_features, x.stride(0), out.stride(1),
        matrix.planes[0].shape[0], matrix.scales.shape[0], matrix.group_size,
        **dict(zip(names, constants_of(matrix), strict=True)), **constants,
        EVEN_N=n % tile.block_n == 0, PTX=is_ptx_target(x),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.stages, num_warps=tile.warps,
        **registers(arch(x.device), (matrix.bits,), tile), **overlap(x),
    )  # fmt: skip


def _shares(parts: int, segments: Sequence[PlaneOperand]) -> list[int]:
    """Share parts out over segments by their bytes, at least one to each."""
    shares = [1] * len(segments)
    for _ in range(parts - len(segments)):
        heaviest = max(range(len(segments)), key=lambda index: segments[index].nbytes / shares[index])
        shares[heaviest] += 1
    return shares


@op(reference=expert_matmul_reference, check=_check_expert_matmul)
def expert_matmul(
    x: Tensor,
    operand: ExpertOperand,
    routing: Routing,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Multiply every pair's row by the matrix of its expert; the last addition, over parts of K, is left to the reader.

    Args:
        x: [R, K] fp16 or bf16, rows contiguous, features as the matrices store them; R tokens or R pairs.
        operand: the matrices, K to N.
        routing: P pairs.
        out: [S, P, N] to write to, rows contiguous, with as many parts as are wanted, at least one per segment; a new
            tensor by default.
        out_dtype: element type of a new result of one part, x's by default; several parts are fp32.
        tile: forces a tile, whose block_m is that of the routing; by default the rule decides.

    Returns:
        [S, P, N], whose sum over S, in that order, is the product; `out` if that was given.

    Raises:
        ValueError: a shape does not fit, or `out` is missing for an operand that does not hold all experts.
        TypeError: a dtype does not fit.
    """
    matrix, num_pairs = operand.first, routing.num_pairs
    tile = replace(tile or expert_tile(x.device, num_pairs, operand), block_m=routing.block_rows)
    if out is None:
        parts = max(tile.split_k, operand.num_segments)
        dtype = torch.float32 if parts > 1 else out_dtype or x.dtype
        out = torch.empty(parts, num_pairs, matrix.out_features, dtype=dtype, device=x.device)
    if not out.numel():
        return out
    slots = routing.block_experts if operand.slots is None else operand.slots
    constants = {"PER_ROW": num_pairs // x.shape[0], "HAS_SLOTS": operand.slots is not None}
    tables = (routing.block_experts, routing.block_pairs, slots, constants)
    if isinstance(matrix, DenseOperand):
        _dense(x, matrix, tables, out, tile)
        return out
    first_part = first_feature = 0
    segments = segments_of(matrix)
    for segment, parts in zip(segments, _shares(out.shape[0], segments), strict=True):
        columns = x[:, first_feature : first_feature + segment.in_features]
        _planes(columns, segment, tables, out[first_part : first_part + parts], tile)
        first_part, first_feature = first_part + parts, first_feature + segment.in_features
    return out
