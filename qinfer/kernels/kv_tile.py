"""Device functions of the KV codecs (`kv_codec.py`): rows in registers to pages, pages to tiles in registers.

Attention reads codes as 16-bit words, each of P features: word w holds features P w to P w + P - 1, the first one
lowest. Plane j of a tile of words is the tile of their features P w + j. It has the words' own layout, so decoding
moves nothing between threads, and a row falls into P products that share the words: a product over features takes any
order of them, and sums over tokens stay apart. P is 4 for codes of four and six bits (whose upper two bits are bytes
of their own, one for each word) and 2 for bytes.

On NVIDIA two words share a register and become two packed halves. A code in the lowest bits of a half, with nothing
above it, is a subnormal number, code 2^-24, which tensor cores multiply exactly: decoding is cutting it out. Two things
are left for the products to put right (`attention_products.py`). Odd planes of four leave the code where it is, four
bits higher, so their numbers are sixteen times those of even ones (`weight_of`). And codes are not centred: a row is

    decoded_d = (step weight_j number_d - zero) scale,    d in plane j,

of which zero stands outside of a sum over d or over rows, times the sum of what the numbers were multiplied with. In
the interpreter and on other GPUs integer arithmetic gives the same numbers, times 2^24 (`step_of`).
"""

from __future__ import annotations

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
    """Say whether rows are rotated; those are the ones whose codes are integers around a middle."""
    return scheme in ("q8", "q6", "q4")


@triton.constexpr_function
def weight_of(scheme, index):
    """Return what the numbers of a plane are to be multiplied with, beside those of other planes."""
    return 16 if _NUM_PLANES.value[scheme] == 4 and index % 2 == 0 else 1


@triton.constexpr_function
def step_of(scheme, ptx):
    """Return what all numbers of a row are to be multiplied with."""
    if scheme not in _GRIDS.value:
        return 1.0
    return _GRIDS.value[scheme][0] / (16 if _NUM_PLANES.value[scheme] == 4 else 1) * (2.0**24 if ptx else 1.0)


@triton.constexpr_function
def zero_of(scheme):
    """Return the middle of the codes, which is to be taken from numbers times weight and step."""
    return float(_GRIDS.value[scheme][1]) if scheme in _GRIDS.value else 0.0


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


def _assembly(scheme: str, index: int) -> str:
    """Write the assembly that turns a pair of words ($1; their upper bits $2) into the numbers of one plane."""
    half, is_odd = divmod(index, 2)
    if scheme in ("e5m2", "e4m3"):
        body = ["and.b32 t, $1, 0xff00ff00;" if index else "prmt.b32 t, $1, 0, 0x2404;"]
        if scheme == "e4m3":
            body += ["shr.u32 c, t, 1;", "and.b32 c, c, 0x3f803f80;", "lop3.b32 t, t, 0x80008000, c, 0xea;"]
        body.append("mov.b32 $0, t;")
    elif scheme == "q8":
        body = ["shr.u32 t, $1, 8;" if index else "mov.b32 t, $1;", "and.b32 $0, t, 0x00ff00ff;"]
    else:
        # What a shift moves from one half into the other falls outside the masks.
        body = ["shr.u32 t, $1, 8;" if half else "mov.b32 t, $1;"]
        mask = "0x00f000f0" if is_odd else "0x000f000f"
        if scheme == "q4":
            body.append(f"and.b32 $0, t, {mask};")
        else:
            body.append(f"shl.b32 c, $2, {4 + 4 * is_odd - 2 * index};")
            body.append(f"and.b32 c, c, {'0x03000300' if is_odd else '0x00300030'};")
            body.append(f"lop3.b32 $0, t, {mask}, c, 0xea;")
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
    """Return the numbers of one plane of a tile of words, in fp16 or fp32.

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
        PLACE: tl.constexpr = 4 * (INDEX % 2) if PLANES == 4 else 0
        b_code = b_words.to(tl.int32) >> (8 * (INDEX // 2) if PLANES == 4 else 8 * INDEX)
        b_code &= 15 << PLACE if PLANES == 4 else 255
        if SCHEME == "q6":
            b_code |= (b_upper.to(tl.int32) >> (2 * INDEX) & 3) << (4 + PLACE)
        b_plane = b_code.to(tl.float16)
    return b_plane.to(DTYPE)


@triton.jit
def load_scales(p_scales, o_first, o_row, m_row):
    """Load the scales of a tile of rows in fp32, zero where masked.

    As 32-bit words of two, because Triton's pipeline fetches nothing narrower ahead of its use.

    Args:
        p_scales: bf16.
        o_first: where the first row of the page has its scale, an even number.
        o_row: [N] rows of the page, from an even one on, one after the other.
        m_row: [N] rows whose scales are wanted.
    """
    p_pairs = p_scales.to(tl.pointer_type(tl.int32), bitcast=True) + (o_first >> 1)
    b_pair = tl.load(p_pairs + (o_row >> 1), mask=m_row, other=0)
    # Not from o_row: a thread's own rows are all even or all odd, and the compiler sees it here.
    b_left = 16 - 16 * (tl.arange(0, o_row.shape[0]) & 1)
    return (b_pair << b_left & -65536).to(tl.float32, bitcast=True)


@triton.jit
def log2_of(b_scale):
    """Return the logarithm of positive numbers, at most 0.09 too small: the bits of a float are almost that already."""
    return tl.fma(b_scale.to(tl.int32, bitcast=True).to(tl.float32), 2.0**-23, -127.0)
