"""Codes of a PlaneOperand to numbers: the device functions that the matmul uses, and the whole matrix at once.

    W[n, k] = (code[k, n] - 2^(bits-1) - offset[g, n]) * scale[g, n],   g = k // group_size

Layout of the planes: `operand.py`. A step of K is as many features as make whole tiles of all planes, and at least 128:
128 for 4 and 8 bits, 256 for 2 and 6, 512 for 3 and 5. It takes up to four tiles of the high plane and one of the low
plane, and gives a slice of 32 features at a time. Differences of codes are exact in fp16 and bf16; the product with
the scale is taken in fp32 and rounded once.

On NVIDIA two neighbouring int16 share a register and become two packed halves. OR-ing a field of the word under a
magic exponent, 1024 in fp16 and 128 in bf16, gives magic + field * 2^position if the field ends in the mantissa; one
fused multiply-add per field then takes the magic and the position away and adds the fields up. All intermediate values
are integers or short binary fractions, so nothing is rounded. Elsewhere and in the interpreter plain integer arithmetic
gives the same numbers (Source of the magic exponent: Kim et al. 2022, arXiv 2211.10017).
"""

from __future__ import annotations

import struct
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.device import is_ptx_target, op
from qinfer.kernels.operand import FIELDS, SLICE_K, PlaneOperand, step_k, tile_k
from qinfer.kernels.packing import unpack_planes

BLOCK_N = 32
MAX_CONSTANT_GROUP = 1024  # group sizes up to here are compiled in
LOW = 4  # number of the word of the low plane; 0 to 3 are of tiles of the high plane


def dequantize_reference(
    planes: Tensor, operand: PlaneOperand, *, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Compute the matrix in fp32 and round it once."""
    codes = unpack_planes(operand.planes, bits=operand.bits, in_features=operand.in_features)
    group = torch.arange(operand.in_features, device=planes.device) // operand.group_size
    centred = codes.float() - 2.0 ** (operand.bits - 1)
    if operand.offsets is not None:
        centred -= operand.offsets.float()[group]
    weight = (centred * operand.scales.float()[group]).t().to(dtype).contiguous()
    return weight if out is None else out.copy_(weight)


def _fields(bits: int, index: int, *, is_bf16: bool) -> list[tuple[int, int, int, int]]:
    """Return where the fields of a slice are: (word, position, width, bits below), high bits first.

    Word w is of tile w of the high plane in the step; word LOW is of the tile of the low plane.
    """
    high, *low = FIELDS[bits]
    slots = 16 // high
    word, position = index // slots, index % slots * high
    if bits == 8 and is_bf16:
        # The mantissa of bf16 holds seven bits: two nibbles instead of a byte.
        return [(word, position + 4, 4, 4), (word, position, 4, 0)]
    return [(word, position, high, bits - high), *((LOW, index * width, width, 0) for width in low)]


def _shift(position: int, width: int, *, is_bf16: bool) -> int:
    """Return by how much a word is shifted so that a field ends inside the mantissa; few shifts serve all fields."""
    reach = (7 if is_bf16 else 10) // width * width
    return position // reach * reach


def _pair(value: float, *, is_bf16: bool) -> str:
    """Return a number twice, as a packed pair of halves in hexadecimal."""
    code = struct.pack("<f", value)[2:] if is_bf16 else struct.pack("<e", value)
    return "0x" + 2 * f"{int.from_bytes(code, 'little'):04x}"


def _assembly(bits: int, index: int, *, is_bf16: bool, has_offset: bool = False) -> tuple[str, float]:
    """Write the assembly that turns shifted int16 words, one per field, into a packed pair of centred codes.

    Returns:
        The assembly, and what it adds to the fields in the end. With an offset that is a pair of its second operand.
    """
    magic, kind = (128.0, "bf16x2") if is_bf16 else (1024.0, "f16x2")
    lines, scales = ["{", ".reg .b32 t0, t1, s0, s1, c;"], []
    for number, (_, position, width, below) in enumerate(_fields(bits, index, is_bf16=is_bf16)):
        place = position - _shift(position, width, is_bf16=is_bf16)
        mask = 2 * f"{((1 << width) - 1) << place:04x}"
        scales.append(2.0 ** (below - place))
        lines.append(f"lop3.b32 t{number}, ${number + 1}, 0x{mask}, {_pair(magic, is_bf16=is_bf16)}, 0xea;")
        lines.append(f"mov.b32 s{number}, {_pair(scales[-1], is_bf16=is_bf16)};")
    addend = -(magic * sum(scales) + 2.0 ** (bits - 1))
    lines.append(f"mov.b32 c, {'$2' if has_offset else _pair(addend, is_bf16=is_bf16)};")
    for number in range(len(scales)):
        result = "$0" if number + 1 == len(scales) else "c"
        lines.append(f"fma.rn.{kind} {result}, t{number}, s{number}, c;")
    return " ".join([*lines, "}"]), addend


# Per width, slice and element type: words, shifts, places (position, mask, bits below), code; the same with offsets.
# A tl.constexpr: Triton makes the value of such a global, and of no other, part of the key under which it caches.
_SLICES = tl.constexpr(
    {
        (bits, index, is_bf16): (
            tuple(word for word, *_ in fields),
            tuple(_shift(position, width, is_bf16=is_bf16) for _, position, width, _ in fields),
            tuple((position, (1 << width) - 1, below) for _, position, width, below in fields),
            _assembly(bits, index, is_bf16=is_bf16)[0],
            _assembly(bits, index, is_bf16=is_bf16, has_offset=True),
        )
        for bits in FIELDS
        for index in range(step_k(bits) // SLICE_K)
        for is_bf16 in (False, True)
        for fields in [_fields(bits, index, is_bf16=is_bf16)]
    }
)


@triton.constexpr_function
def slice_num_fields(bits, index, is_bf16):
    """Return how many words the code of a slice is spread over."""
    return len(_SLICES.value[bits, index, is_bf16][0])


@triton.constexpr_function
def slice_word(bits, index, is_bf16, field):
    """Return which word a field of a slice is in."""
    return _SLICES.value[bits, index, is_bf16][0][field]


@triton.constexpr_function
def slice_shift(bits, index, is_bf16, field):
    """Return by how much the packed path shifts that word."""
    return _SLICES.value[bits, index, is_bf16][1][field]


@triton.constexpr_function
def slice_place(bits, index, field, what):
    """Return position (0), mask (1) or bits below (2) of a field for the portable path."""
    return _SLICES.value[bits, index, False][2][field][what]


@triton.constexpr_function
def slice_asm(bits, index, is_bf16):
    """Return the assembly of a slice."""
    return _SLICES.value[bits, index, is_bf16][3]


@triton.constexpr_function
def offset_asm(bits, index, is_bf16, what):
    """Return the assembly of a slice with offsets (0), or what the codes want added besides (1)."""
    return _SLICES.value[bits, index, is_bf16][4][what]


@triton.constexpr_function
def shift_asm(amount):
    """Return the assembly that shifts a pair of words; what crosses from one half to the other is masked away later."""
    return f"shr.u32 $0, $1, {amount};"


@triton.jit
def _shifted(b_words, AMOUNT: tl.constexpr):
    """Shift words right as packed pairs."""
    if AMOUNT == 0:
        return b_words
    else:
        return tl.inline_asm_elementwise(
            shift_asm(AMOUNT), "=r,r", [b_words], dtype=tl.int16, is_pure=True, pack=2
        )  # fmt: skip


@triton.jit
def slice_codes(b_words, BITS: tl.constexpr, INDEX: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Give one slice of a step: codes minus 2^(bits-1).

    Args:
        b_words: five int16 [BLOCK_N, 32], as `load_step` gives them.
        BITS: of the codes.
        INDEX: of the slice in the step.
        DTYPE: the element type of the result, the activations' own.
        PTX: whether the target takes NVIDIA assembly.

    Returns:
        [BLOCK_N, 32] in DTYPE.
    """
    BF16: tl.constexpr = tl.bfloat16 == DTYPE
    if PTX and DTYPE.primitive_bitwidth == 16:
        b_first = b_words[slice_word(BITS, INDEX, BF16, 0)]
        b_first = _shifted(b_first, slice_shift(BITS, INDEX, BF16, 0))
        b_second = b_first
        if slice_num_fields(BITS, INDEX, BF16) == 2:
            b_second = b_words[slice_word(BITS, INDEX, BF16, 1)]
            b_second = _shifted(b_second, slice_shift(BITS, INDEX, BF16, 1))
        # The element type of the result must stand there as itself. Code of one field does not read its second word.
        if BF16:
            return tl.inline_asm_elementwise(
                slice_asm(BITS, INDEX, True), "=r,r,r", [b_first, b_second], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                slice_asm(BITS, INDEX, False), "=r,r,r", [b_first, b_second], dtype=tl.float16, is_pure=True, pack=2
            )
    else:
        b_code = b_words[slice_word(BITS, INDEX, False, 0)].to(tl.int32)
        b_code = (b_code >> slice_place(BITS, INDEX, 0, 0)) & slice_place(BITS, INDEX, 0, 1)
        b_code = b_code << slice_place(BITS, INDEX, 0, 2)
        if slice_num_fields(BITS, INDEX, False) == 2:
            b_code |= (b_words[4].to(tl.int32) >> slice_place(BITS, INDEX, 1, 0)) & slice_place(BITS, INDEX, 1, 1)
        return (b_code - (1 << (BITS - 1))).to(tl.float32).to(DTYPE)


@triton.jit
def offset_codes(b_words, b_offsets, BITS: tl.constexpr, INDEX: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Give one slice of a step: codes minus 2^(bits-1) and minus the offset of their output, [BLOCK_N] fp32.

    Differences of small integers, exact in either type: also where a code has one field and the offset goes into what
    is added to it anyway.
    """
    BF16: tl.constexpr = tl.bfloat16 == DTYPE
    if PTX and DTYPE.primitive_bitwidth == 16 and slice_num_fields(BITS, INDEX, BF16) == 1:
        b_word = _shifted(b_words[slice_word(BITS, INDEX, BF16, 0)], slice_shift(BITS, INDEX, BF16, 0))
        b_addend = (offset_asm(BITS, INDEX, BF16, 1) - b_offsets).to(DTYPE)[:, None]
        if BF16:
            return tl.inline_asm_elementwise(
                offset_asm(BITS, INDEX, True, 0), "=r,r,r", [b_word, b_addend], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                offset_asm(BITS, INDEX, False, 0), "=r,r,r", [b_word, b_addend], dtype=tl.float16, is_pure=True, pack=2
            )
    else:
        return slice_codes(b_words, BITS, INDEX, DTYPE, PTX) - b_offsets.to(DTYPE)[:, None]


@triton.jit
def spread(b_values):
    """Repeat values [BLOCK_N, COPIES] along a slice: [BLOCK_N, 32]."""
    COPIES: tl.constexpr = b_values.shape[1]
    b_copies = tl.broadcast_to(b_values[:, :, None], [b_values.shape[0], COPIES, 32 // COPIES])
    return tl.reshape(b_copies, [b_values.shape[0], 32])


@triton.jit
def scaled_codes(b_codes, b_scales, SCALE: tl.constexpr, PTX: tl.constexpr):
    """Multiply the codes of a slice by their scales, rounded once to the codes' type, as `dequantize` gives them.

    Args:
        b_codes: [BLOCK_N, 32], minus their offsets, in the activations' type.
        b_scales: [BLOCK_N, 32] fp32.
        SCALE: the type in which scales are stored.
        PTX: whether the target takes NVIDIA assembly.
    """
    DTYPE: tl.constexpr = b_codes.dtype
    if PTX and SCALE == DTYPE and DTYPE.primitive_bitwidth == 16:
        # The product of two numbers of a type, rounded to that type: what fp32, which holds it exactly, rounds to.
        b_factors = b_scales.to(DTYPE)
        if tl.bfloat16 == DTYPE:
            # Adding -0.0 changes nothing; sm_80 has no packed product in bf16 without an addition.
            return tl.inline_asm_elementwise(
                "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }",
                "=r,r,r", [b_codes, b_factors], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [b_codes, b_factors], dtype=tl.float16, is_pure=True, pack=2
            )
    else:
        return (b_codes.to(tl.float32) * b_scales).to(DTYPE)


@triton.jit
def _load_tile(p_plane, i_tile, first_n, m_n, N64, num_tiles, MASKED: tl.constexpr):
    """Load one tile of a plane, int16 [BLOCK_N, 32]; a tile behind the last gives zeros."""
    # Where the block begins is one number; behind it, threads are at distances known to the compiler.
    p_block = p_plane + (i_tile * N64 + first_n) * 32
    o_words = tl.arange(0, m_n.shape[0])[:, None] * 32 + tl.arange(0, 32)[None, :]
    m_words = m_n & (i_tile < num_tiles) if MASKED else m_n
    return tl.load(p_block + o_words, mask=m_words[:, None], other=0, cache_modifier=".cg")


@triton.jit
def load_step(p_high, p_low, i_step, first_n, m_n, N64, num_high, HIGH_TILES: tl.constexpr, HAS_LOW: tl.constexpr):
    """Load the words of one step: one, two or four tiles of the high plane and one of the low plane.

    Args:
        p_high: the high plane.
        p_low: the low plane; anything where there is none.
        i_step: which step.
        first_n: the first of BLOCK_N outputs.
        m_n: [BLOCK_N] which of them there are.
        N64: number of outputs, int64.
        num_high: tiles of the high plane; the last step may want some that do not exist.
        HIGH_TILES: tiles of the high plane per step.
        HAS_LOW: whether there is a low plane.

    Returns:
        Five int16 [BLOCK_N, 32] for `slice_codes`; those that a step does not have repeat the first.
    """
    i_high = i_step * HIGH_TILES
    b_high0 = _load_tile(p_high, i_high, first_n, m_n, N64, num_high, False)
    b_high1, b_high2, b_high3, b_low = b_high0, b_high0, b_high0, b_high0
    if HIGH_TILES >= 2:
        b_high1 = _load_tile(p_high, i_high + 1, first_n, m_n, N64, num_high, True)
    if HIGH_TILES == 4:
        b_high2 = _load_tile(p_high, i_high + 2, first_n, m_n, N64, num_high, True)
        b_high3 = _load_tile(p_high, i_high + 3, first_n, m_n, N64, num_high, True)
    if HAS_LOW:
        b_low = _load_tile(p_low, i_step, first_n, m_n, N64, num_high, False)
    return b_high0, b_high1, b_high2, b_high3, b_low


def constants_of(operand: PlaneOperand) -> tuple[int | bool, ...]:
    """Return what a kernel is compiled for: BITS, HIGH_TILES, HAS_LOW, SLICES, RUN, GROUP, HAS_OFFSETS, EVEN_K."""
    bits, size = operand.bits, operand.group_size
    high, *low = FIELDS[bits]
    step = step_k(bits)
    run = gcd(size // SLICE_K, step // SLICE_K) if size >= SLICE_K else 0
    group = size if size <= MAX_CONSTANT_GROUP else 0
    tiles, slices = step // tile_k(high), step // SLICE_K
    return bits, tiles, bool(low), slices, run, group, operand.offsets is not None, operand.in_features % step == 0


def num_steps(operand: PlaneOperand) -> int:
    """Return the steps of K in which a kernel walks over an operand."""
    return -(-operand.in_features // step_k(operand.bits))


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
