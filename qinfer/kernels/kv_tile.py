"""Device functions of the KV codecs (`kv_codec.py`): rows in registers to pages, pages to tiles in registers.

Attention reads codes as 16-bit words, each of P features: word w holds features P w to P w + P - 1, the first one
lowest. Plane j of a tile of words is the tile of their features P w + j. It has the words' own layout, so decoding
moves nothing between threads, and a row falls into P products that share the words: a product over features takes any
order of them, and sums over tokens stay apart. P is 4 for codes of four and six bits (whose upper two bits are bytes
of their own, one for each word) and 2 for bytes.

On NVIDIA two words share a register and become two packed halves: a field moved under the exponent of 1024 is the
mantissa's integer part, from which one addition takes 1024 and the middle of the codes. Elsewhere and in the
interpreter integer arithmetic gives the same numbers.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from qinfer.kernels.kv_codec import E4M3_MAX, E5M2_MAX, NUM_PLANES, SMALLEST_SCALE

_GRIDS = tl.constexpr({"q8": (1, 128, 127), "q6": (4, 126, 126), "q4": (16, 120, 120)})
_E5M2_MAX = tl.constexpr(E5M2_MAX)
_E4M3_MAX = tl.constexpr(E4M3_MAX)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_NUM_PLANES = tl.constexpr(NUM_PLANES)
_ROUND = tl.constexpr(1.5 * 2.0**23)  # adding and subtracting it rounds an fp32 number to the nearest integer


@triton.constexpr_function
def grid_of(scheme, what):
    """Return g (0), z (1) or r (2) of a scheme."""
    return _GRIDS.value[scheme][what]


@triton.constexpr_function
def is_rotated(scheme):
    """Say whether rows are rotated."""
    return scheme in ("q8", "q6", "q4")


@triton.constexpr_function
def num_planes(scheme):
    """Return P, how many features a word holds."""
    return _NUM_PLANES.value[scheme]


@triton.constexpr_function
def has_scales(scheme):
    """Say whether a row has a scale."""
    return scheme not in ("plain", "e5m2")


@triton.jit
def rotate(b_x, RUN: tl.constexpr):
    """Rotate runs of RUN features of [M, D], D a multiple of RUN: fp32. The signs of the matrix are exact anywhere."""
    ROWS: tl.constexpr = b_x.shape[0] * b_x.shape[1] // RUN
    o_run = tl.arange(0, RUN)
    b_parity = o_run[:, None] & o_run[None, :]
    b_parity ^= b_parity >> 4
    b_parity ^= b_parity >> 2
    b_parity ^= b_parity >> 1
    b_signs = (1 - 2 * (b_parity & 1)).to(b_x.dtype)
    b_y = tl.dot(tl.reshape(b_x, (ROWS, RUN)), b_signs, input_precision="ieee")
    return tl.reshape(b_y * (RUN**-0.5), b_x.shape)


@triton.jit
def split_pairs(b_x):
    """Split [M, D] into its even and its odd columns."""
    return tl.split(tl.reshape(b_x, (b_x.shape[0], b_x.shape[1] // 2, 2)))


@triton.jit
def join_pairs(b_even, b_odd):
    """Undo `split_pairs`."""
    return tl.reshape(tl.join(b_even, b_odd), (b_even.shape[0], b_even.shape[1] * 2))


@triton.jit
def _scaled(b_x, LARGEST: tl.constexpr):
    """Return the scale of each row, rounded as it is stored, and the row over it."""
    b_scale = (tl.max(tl.abs(b_x), axis=1) / LARGEST).to(tl.bfloat16).to(tl.float32)
    m_scale = b_scale > _SMALLEST_SCALE
    b_inverse = 1.0 / tl.where(m_scale, b_scale, 1.0)
    return b_scale, b_x * tl.where(m_scale, b_inverse, 0.0)[:, None]


@triton.jit
def store_rows(
    b_x, p_codes, p_scales, o_codes, o_scales, m_row, HEAD_DIM: tl.constexpr, RUN: tl.constexpr, SCHEME: tl.constexpr
):
    """Encode rows [M, D], zero from HEAD_DIM on, and store them.

    Args:
        b_x: [M, D], in a float dtype.
        p_codes: codes.
        p_scales: scales, not touched where the scheme has none.
        o_codes: [M] where each row of codes begins.
        o_scales: [M] where each scale lies.
        m_row: [M] rows that are stored.
        HEAD_DIM: features of a row.
        RUN: features that are rotated together.
        SCHEME: of the codec.
    """
    WIDTH: tl.constexpr = b_x.shape[1]
    p_row = p_codes + o_codes[:, None]
    o_d = tl.arange(0, WIDTH)[None, :]
    m_x = m_row[:, None] & (o_d < HEAD_DIM)
    if SCHEME == "plain":
        tl.store(p_row + o_d, b_x.to(p_codes.dtype.element_ty), mask=m_x)
    elif SCHEME == "e5m2":
        b_half = tl.minimum(tl.maximum(b_x.to(tl.float32), -_E5M2_MAX), _E5M2_MAX).to(tl.float16)
        b_bits = b_half.to(tl.uint16, bitcast=True).to(tl.uint32)
        tl.store(p_row + o_d, ((b_bits + 0x80) >> 8).to(tl.uint8), mask=m_x)
    elif SCHEME == "e4m3":
        b_scale, b_y = _scaled(b_x.to(tl.float32), _E4M3_MAX)
        tl.store(p_scales + o_scales, b_scale.to(tl.bfloat16), mask=m_row)
        b_size = tl.minimum(tl.abs(b_y), _E4M3_MAX)
        # The step at this size: three bits below its exponent, which ends where fp16's does, at 2^-14.
        b_exponent = tl.maximum(b_size.to(tl.int32, bitcast=True) >> 23, 127 - 14)
        b_step = ((b_exponent - 3) << 23).to(tl.float32, bitcast=True)
        b_size = (b_size / b_step + _ROUND - _ROUND) * b_step
        b_bits = b_size.to(tl.float16).to(tl.uint16, bitcast=True) >> 7
        tl.store(p_row + o_d, tl.where(b_y < 0, b_bits | 0x80, b_bits).to(tl.uint8), mask=m_x)
    else:
        STEP: tl.constexpr = grid_of(SCHEME, 0)
        ZERO: tl.constexpr = grid_of(SCHEME, 1)
        b_scale, b_y = _scaled(rotate(b_x, RUN), grid_of(SCHEME, 2))
        tl.store(p_scales + o_scales, b_scale.to(tl.bfloat16), mask=m_row)
        b_codes = tl.floor(b_y * (1.0 / STEP) + (ZERO / STEP + 0.5))
        b_codes = tl.minimum(tl.maximum(b_codes, 0.0), 256.0 / STEP - 1.0).to(tl.int32)
        if SCHEME == "q8":
            tl.store(p_row + o_d, b_codes.to(tl.uint8), mask=m_x)
        else:
            b_even, b_odd = split_pairs(b_codes)
            o_half = tl.arange(0, WIDTH // 2)[None, :]
            m_half = m_row[:, None] & (o_half < HEAD_DIM // 2)
            tl.store(p_row + o_half, ((b_even & 15) | (b_odd & 15) << 4).to(tl.uint8), mask=m_half)
            if SCHEME == "q6":
                b_first, b_second = split_pairs(b_even >> 4 | (b_odd >> 4) << 2)
                o_quarter = tl.arange(0, WIDTH // 4)[None, :]
                m_quarter = m_row[:, None] & (o_quarter < HEAD_DIM // 4)
                tl.store(p_row + HEAD_DIM // 2 + o_quarter, (b_first | b_second << 4).to(tl.uint8), mask=m_quarter)


def _moved(source: str, amount: int) -> str:
    """Write the assembly that moves words left by an amount, or right by a negative one; masks take the spill away."""
    shift = "shl.b32" if amount > 0 else "shr.u32"
    return f"{shift} t, {source}, {abs(amount)};" if amount else f"mov.b32 t, {source};"


def _centring(value: int) -> str:
    """Write the assembly that takes a number from both halves of a word."""
    code = struct.unpack("<H", struct.pack("<e", -value))[0]
    return f"mov.b32 c, 0x{code:04x}{code:04x}; add.rn.f16x2 $0, t, c;"


def _assembly(scheme: str, index: int) -> str:
    """Write the assembly that turns a pair of words ($1; their upper bits $2) into the numbers of one plane."""
    under = "lop3.b32 t, t, 0x{0}{0}, 0x64006400, 0xea;"
    if scheme == "q4":
        body = [_moved("$1", 4 - 4 * index), under.format("00f0"), _centring(1024 + 120)]
    elif scheme == "q6":
        body = [_moved("$1", 2 - 4 * index), under.format("003c"), "mov.b32 c, t;", _moved("$2", 6 - 2 * index)]
        body += ["lop3.b32 t, t, 0x00c000c0, c, 0xea;", _centring(1024 + 126)]
    elif scheme == "q8":
        body = [_moved("$1", -8 * index), under.format("00ff"), _centring(1024 + 128)]
    else:
        body = ["and.b32 t, $1, 0xff00ff00;" if index else "prmt.b32 t, $1, 0, 0x2404;"]
        if scheme == "e4m3":
            body += ["shr.u32 c, t, 1;", "and.b32 c, c, 0x3f803f80;", "lop3.b32 t, t, 0x80008000, c, 0xea;"]
        body.append("mov.b32 $0, t;")
    return " ".join(["{", ".reg .b32 t, c;", *body, "}"])


# A tl.constexpr: Triton makes the value of such a global, and of no other, part of the key under which it caches.
_ASSEMBLY = tl.constexpr(
    {(scheme, index): _assembly(scheme, index) for scheme, n in NUM_PLANES.items() if n > 1 for index in range(n)}
)


@triton.constexpr_function
def _plane_asm(scheme, index):
    return _ASSEMBLY.value[scheme, index]


@triton.jit
def plane(b_words, b_upper, INDEX: tl.constexpr, DTYPE: tl.constexpr, SCHEME: tl.constexpr, PTX: tl.constexpr):
    """Return one plane of a tile of words, without the scales, in fp16 or fp32.

    Args:
        b_words: int16.
        b_upper: int16 of the same shape, the upper bits of "q6"; other schemes do not look at it.
        INDEX: which plane.
        DTYPE: of the result, exact in either.
        SCHEME: of the codec, not "plain".
        PTX: whether the target takes NVIDIA assembly.
    """
    if PTX:
        b_plane = tl.inline_asm_elementwise(
            _plane_asm(SCHEME, INDEX), "=r,r,r", [b_words, b_upper], dtype=tl.float16, is_pure=True, pack=2
        )
    elif SCHEME == "e5m2" or SCHEME == "e4m3":
        b_high = b_words & -256 if INDEX else b_words << 8
        if SCHEME == "e4m3":
            b_high = (b_high & -32768) | (b_high >> 1 & 0x3F80)
        b_plane = b_high.to(tl.float16, bitcast=True)
    else:
        PLANES: tl.constexpr = num_planes(SCHEME)
        b_code = b_words.to(tl.int32) >> (16 // PLANES * INDEX) & ((1 << 16 // PLANES) - 1)
        if SCHEME == "q6":
            b_code |= (b_upper.to(tl.int32) >> (2 * INDEX) & 3) << 4
        b_plane = (b_code * grid_of(SCHEME, 0) - grid_of(SCHEME, 1)).to(tl.float16)
    return b_plane.to(DTYPE)


@triton.jit
def load_scales(p_scales, o_scale, m_scale):
    """Load scales in fp32, zero where masked; o_scale begins at an even number and ascends by one.

    As 32-bit words of two, because Triton's pipeline fetches nothing narrower ahead of its use.
    """
    p_pairs = p_scales.to(tl.pointer_type(tl.int32), bitcast=True) + (o_scale >> 1)
    b_pair = tl.load(p_pairs, mask=m_scale, other=0)
    return tl.where(o_scale & 1 != 0, b_pair & -65536, b_pair << 16).to(tl.float32, bitcast=True)
