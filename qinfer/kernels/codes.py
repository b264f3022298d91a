"""Codes of planes as numbers: the device functions that every kernel over packed weights unpacks with.

A step of K is as many features as make whole tiles of all planes (`operand.py`), and at least 128: 128 for 4 and 8
bits, 256 for 2 and 6, 512 for 3 and 5. It takes up to four tiles of the high plane and one of the low plane, and gives
a slice of 32 features at a time. Differences of codes are exact in fp16 and bf16; the product with the scale is taken
in fp32 and rounded once.

On NVIDIA two neighbouring int16 share a register and become two packed halves. OR-ing a field of the word under a
magic exponent, 1024 in fp16 and 128 in bf16, gives magic + field * 2^position if the field ends in the mantissa; one
fused multiply-add per field then takes the magic and the position away and adds the fields up. All intermediate values
are integers or short binary fractions, so nothing is rounded. Elsewhere and in the interpreter plain integer arithmetic
gives the same numbers (Source of the magic exponent: Kim et al. 2022, arXiv 2211.10017). Codes of one field can also be
taken as the subnormal numbers of fp16 that their bits are, with one operation for two.
"""

from __future__ import annotations

import struct
from math import gcd

import triton
import triton.language as tl

from qinfer.kernels.operand import FIELDS, SLICE_K, PlaneOperand, step_k, tile_k

MAX_CONSTANT_GROUP = 1024  # group sizes up to here are compiled in
LOW = 4  # number of the word of the low plane; 0 to 3 are of tiles of the high plane


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
    """Return the assembly that shifts a pair of words right, or left by a negative amount.

    What crosses from one half to the other is masked away later.
    """
    return f"shr.u32 $0, $1, {amount};" if amount > 0 else f"shl.b32 $0, $1, {-amount};"


@triton.jit
def _shifted(b_words, AMOUNT: tl.constexpr):
    """Shift words as packed pairs, right or by a negative amount left."""
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


@triton.constexpr_function
def subnormal_place(bits, index):
    """Return where in the ten bits of a mantissa `subnormal_codes` has the field of a slice.

    Tensor cores cut off what they add at a distance from the exponent, which subnormal numbers share. Codes of 2 bits
    stand so high that this does not show; larger ones stand where a shift serves two slices.
    """
    return (6 if bits == 2 else 0) + (bits if index % 2 == 1 and bits < 8 else 0)


@triton.constexpr_function
def subnormal_unit(bits, index):
    """Return what a code of 1 is there: 2^(place - 24)."""
    return 2.0 ** (subnormal_place(bits, index) - 24)


@triton.constexpr_function
def subnormal_shift(bits, index):
    """Return by how much a word is shifted to have the field of a slice at its place."""
    return index % (16 // bits) * bits - subnormal_place(bits, index)


@triton.constexpr_function
def subnormal_asm(bits, index):
    """Return the assembly that leaves of a pair of shifted words the field of a slice."""
    return f"and.b32 $0, $1, 0x{2 * f'{((1 << bits) - 1) << subnormal_place(bits, index):04x}'};"


@triton.jit
def subnormal_codes(b_words, BITS: tl.constexpr, INDEX: tl.constexpr):
    """Give one slice of a step as the subnormal numbers of fp16 that its bits are: an instruction for two codes.

    Returns:
        [BLOCK_N, 32] fp16, codes times `subnormal_unit`, which is one number for even slices and one for odd ones.
    """
    b_word = _shifted(b_words[slice_word(BITS, INDEX, False, 0)], subnormal_shift(BITS, INDEX))
    return tl.inline_asm_elementwise(
        subnormal_asm(BITS, INDEX), "=r,r", [b_word], dtype=tl.float16, is_pure=True, pack=2
    )  # fmt: skip


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


def constant_group(size: int) -> int:
    """Return a group size to compile in; 0 for a large one, of which there are few."""
    return size if size <= MAX_CONSTANT_GROUP else 0


def constants_of(operand: PlaneOperand) -> tuple[int | bool, ...]:
    """Return what a kernel is compiled for: BITS, HIGH_TILES, HAS_LOW, SLICES, RUN, GROUP, HAS_OFFSETS, EVEN_K."""
    bits, size = operand.bits, operand.group_size
    high, *low = FIELDS[bits]
    step = step_k(bits)
    run = gcd(size // SLICE_K, step // SLICE_K) if size >= SLICE_K else 0
    tiles, slices = step // tile_k(high), step // SLICE_K
    has_offsets, is_even = operand.offsets is not None, operand.in_features % step == 0
    return bits, tiles, bool(low), slices, run, constant_group(size), has_offsets, is_even


def num_steps(operand: PlaneOperand) -> int:
    """Return the steps of K in which a kernel walks over an operand."""
    return -(-operand.in_features // step_k(operand.bits))
