"""Device functions of the KV codecs (`kv_codec.py`): rows in registers to pages, pages to tiles in registers.

A scheme that packs two features into a byte ("q4", "q6") gives two tiles, of the even and of the odd features. That
needs no movement between threads: a product over features takes any order of them, and sums over tokens stay apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qinfer.kernels.kv_codec import E4M3_MAX, E5M2_MAX, SMALLEST_SCALE

_GRIDS = tl.constexpr({"q8": (1, 128, 127), "q6": (4, 126, 126), "q4": (16, 120, 120)})
_E5M2_MAX = tl.constexpr(E5M2_MAX)
_E4M3_MAX = tl.constexpr(E4M3_MAX)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
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
def is_packed(scheme):
    """Say whether a byte holds two features."""
    return scheme in ("q6", "q4")


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


@triton.jit
def _centred(b_byte, ZERO: tl.constexpr):
    """Return byte - ZERO in fp16: under the exponent of 1024, a byte is the mantissa's integer part."""
    return ((b_byte.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)) - (1024 + ZERO)


@triton.jit
def load_rows(p_row, m_row, DTYPE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SCHEME: tl.constexpr):
    """Load coded rows and return them without their scales.

    Args:
        p_row: [N] where each row of codes begins.
        m_row: [N] rows that are loaded; others give finite numbers without meaning.
        DTYPE: fp16 or fp32, of the result.
        HEAD_DIM: features of a row.
        BLOCK_D: features of the result, a power of two.
        SCHEME: of the codec, not "plain".

    Returns:
        [N, BLOCK_D], twice; or for packed schemes [N, BLOCK_D / 2] of the even and of the odd features.
    """
    if is_packed(SCHEME):
        o_half = tl.arange(0, BLOCK_D // 2)[None, :]
        m_half = m_row[:, None] & (o_half < HEAD_DIM // 2)
        b_low = tl.load(p_row[:, None] + o_half, mask=m_half, other=0)
        if SCHEME == "q4":
            b_even = _centred(b_low << 4, 120)
            b_odd = _centred(b_low & 0xF0, 120)
        else:
            # Each byte of the high plane serves two of the low plane, and is loaded twice: joining its halves in
            # registers gives wrong operands of a product with 16 keys on Hopper (Triton 3.6).
            b_high = tl.load(p_row[:, None] + HEAD_DIM // 2 + o_half // 2, mask=m_half, other=0)
            b_high = b_high >> (o_half % 2 * 4).to(tl.uint8)
            b_even = _centred((b_low & 15) << 2 | (b_high & 3) << 6, 126)
            b_odd = _centred((b_low >> 4) << 2 | (b_high >> 2 & 3) << 6, 126)
    else:
        o_d = tl.arange(0, BLOCK_D)[None, :]
        b_byte = tl.load(p_row[:, None] + o_d, mask=m_row[:, None] & (o_d < HEAD_DIM), other=0)
        if SCHEME == "q8":
            b_even = _centred(b_byte, 128)
        elif SCHEME == "e5m2":
            b_even = (b_byte.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
        else:
            b_wide = b_byte.to(tl.uint16)
            b_even = ((b_wide & 0x80) << 8 | (b_wide & 0x7F) << 7).to(tl.float16, bitcast=True)
        b_odd = b_even
    return b_even.to(DTYPE), b_odd.to(DTYPE)
