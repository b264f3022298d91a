"""Pack small unsigned integers into words, in the two arrangements that qinfer needs, and unpack them again.

Bit stream (how files store codes): the codes along one axis form one little-endian stream of bits,

    code i = bits i*b .. i*b + b-1 of the stream,    bit s of the stream = bit s % 32 of int32 word s // 32,

so 3-, 5-, 6- and 7-bit codes straddle words. `pack_stream` and `unpack_stream` are plain torch along any axis; the ops
`pack_4bit` and `unpack_4bit` are the case b = 4 along the rows of a matrix: eight codes per word, the first one lowest.

Planes (how kernels read codes): `operand.py` has the arrangement. `pack_plane` and `unpack_plane` move fields of one
width w in {1, 2, 4, 8}; `pack_planes` and `unpack_planes` cut codes of b in {2, 3, 4, 5, 6, 8} bits into their fields
and put them together again. K is padded to whole tiles with the code 2^(b-1), which is zero in a symmetric format.

All of it is integer arithmetic and exact. Words are unsigned in meaning and signed in dtype: shifts go through a wider
type or are followed by a mask, because the top code of a word reaches the sign bit.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.device import op
from qinfer.kernels.operand import FIELDS, SLICE_K, tile_k

PLANE_WIDTHS = (1, 2, 4, 8)
WORDS_PER_PROGRAM = 1024
PLANE_BLOCK_N = 128


def pack_stream(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Write codes along one axis as a little-endian bit stream in 32-bit words.

    Args:
        codes: any shape, integer dtype, values in 0 .. 2^bits - 1; higher bits are dropped.
        bits: 1 to 8.
        dim: the axis that becomes words.

    Returns:
        int32, `codes` with axis `dim` of length L replaced by ceil(L * bits / 32); bits past the last code are 0.

    Raises:
        ValueError: `bits` is out of range.
    """
    _check_stream_bits(bits)
    codes_per_unit, words_per_unit = 32 // gcd(32, bits), bits // gcd(32, bits)
    rows = codes.movedim(dim, 0)
    count, rest = rows.shape[0], rows.shape[1:]
    num_units = -(-count // codes_per_unit)
    if count % codes_per_unit:
        rows = torch.cat([rows, rows.new_zeros(num_units * codes_per_unit - count, *rest)])
    units = rows.reshape(num_units, codes_per_unit, *rest)
    words = torch.zeros(num_units, words_per_unit, *rest, dtype=torch.int64, device=codes.device)
    for i in range(codes_per_unit):
        word, shift = divmod(i * bits, 32)
        code = units[:, i].to(torch.int64) & ((1 << bits) - 1)
        words[:, word] |= (code << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, word + 1] |= code >> (32 - shift)
    packed = words.reshape(num_units * words_per_unit, *rest)[: -(-count * bits // 32)]
    return _as_signed(packed, 32).to(torch.int32).movedim(0, dim).contiguous()


def unpack_stream(words: Tensor, bits: int, count: int, dim: int) -> Tensor:
    """Read codes back from a little-endian bit stream in 32-bit words: the inverse of `pack_stream`.

    Args:
        words: int32, any shape.
        bits: 1 to 8.
        count: number of codes along the axis.
        dim: the axis that holds words.

    Returns:
        uint8, `words` with axis `dim` replaced by `count` codes.

    Raises:
        ValueError: `bits` is out of range, or the axis does not hold exactly ceil(count * bits / 32) words.
        TypeError: `words` is not int32.
    """
    _check_stream_bits(bits)
    if words.dtype != torch.int32:
        raise TypeError(f"words must be int32, got {words.dtype}")
    rows = words.movedim(dim, 0)
    num_words, rest = -(-count * bits // 32), rows.shape[1:]
    if rows.shape[0] != num_words:
        raise ValueError(f"{count} codes of {bits} bits take {num_words} words, got {rows.shape[0]}")
    codes_per_unit, words_per_unit = 32 // gcd(32, bits), bits // gcd(32, bits)
    num_units = -(-count // codes_per_unit)
    if num_words % words_per_unit:
        rows = torch.cat([rows, rows.new_zeros(num_units * words_per_unit - num_words, *rest)])
    units = rows.reshape(num_units, words_per_unit, *rest)
    codes = torch.empty(num_units, codes_per_unit, *rest, dtype=torch.uint8, device=words.device)
    for i in range(codes_per_unit):
        word, shift = divmod(i * bits, 32)
        code = (units[:, word].to(torch.int64) & 0xFFFFFFFF) >> shift
        if shift + bits > 32:
            code |= units[:, word + 1].to(torch.int64) << (32 - shift)
        codes[:, i] = (code & ((1 << bits) - 1)).to(torch.uint8)
    return codes.reshape(num_units * codes_per_unit, *rest)[:count].movedim(0, dim).contiguous()


def _check_stream_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")


def _as_signed(values: Tensor, bits: int) -> Tensor:
    """Reinterpret values of 0 .. 2^bits - 1 as two's complement, so that the narrowing cast after it loses nothing."""
    sign = 1 << (bits - 1)
    return (values ^ sign) - sign


def _check_codes(name: str, codes: Tensor, bits: int) -> None:
    """Refuse codes that are not uint8 [m, n] and, where looking costs no device sync, codes too large."""
    if codes.dtype != torch.uint8:
        raise TypeError(f"{name} must be uint8, got {codes.dtype}")
    if codes.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions, got shape {list(codes.shape)}")
    if codes.device.type == "cpu" and codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"{name} must be 0 to {(1 << bits) - 1} for {bits} bits, got {int(codes.max())}")


def pack_4bit_reference(unpacked: Tensor) -> Tensor:
    """Compute `pack_4bit` in plain torch."""
    return pack_stream(unpacked, 4, 1)


@triton.jit
def _pack_4bit_kernel(p_unpacked, p_packed, num_words, BLOCK: tl.constexpr):
    i_block = tl.program_id(0).to(tl.int64)
    o_word = i_block * BLOCK + tl.arange(0, BLOCK)
    m_word = o_word < num_words
    b_word = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(8):
        b_code = tl.load(p_unpacked + o_word * 8 + i, mask=m_word, other=0).to(tl.int32)
        b_word |= (b_code & 15) << (4 * i)
    tl.store(p_packed + o_word, b_word, mask=m_word)


def _check_pack_4bit(unpacked: Tensor) -> None:
    _check_codes("unpacked", unpacked, 4)
    if unpacked.shape[1] % 8:
        raise ValueError(f"unpacked must have a multiple of 8 columns, got shape {list(unpacked.shape)}")


@op(reference=pack_4bit_reference, check=_check_pack_4bit)
def pack_4bit(unpacked: Tensor) -> Tensor:
    """Pack eight 4-bit codes of a row into each 32-bit word, the first code in the lowest bits.

    Args:
        unpacked: [m, n] uint8, values 0 to 15, n a multiple of 8.

    Returns:
        [m, n / 8] int32.

    Raises:
        ValueError: n is not a multiple of 8, or a code is larger than 15 (looked for on CPU tensors only).
        TypeError: `unpacked` is not uint8.
    """
    rows, columns = unpacked.shape
    packed = torch.empty(rows, columns // 8, dtype=torch.int32, device=unpacked.device)
    if packed.numel():
        grid = (triton.cdiv(packed.numel(), WORDS_PER_PROGRAM),)
        _pack_4bit_kernel[grid](unpacked.contiguous(), packed, packed.numel(), BLOCK=WORDS_PER_PROGRAM)
    return packed


def unpack_4bit_reference(packed: Tensor) -> Tensor:
    """Compute `unpack_4bit` in plain torch."""
    return unpack_stream(packed, 4, packed.shape[1] * 8, 1)


@triton.jit
def _unpack_4bit_kernel(p_packed, p_unpacked, num_words, BLOCK: tl.constexpr):
    i_block = tl.program_id(0).to(tl.int64)
    o_word = i_block * BLOCK + tl.arange(0, BLOCK)
    m_word = o_word < num_words
    b_word = tl.load(p_packed + o_word, mask=m_word, other=0)
    for i in tl.static_range(8):
        b_code = ((b_word >> (4 * i)) & 15).to(tl.uint8)
        tl.store(p_unpacked + o_word * 8 + i, b_code, mask=m_word)


def _check_unpack_4bit(packed: Tensor) -> None:
    if packed.dtype != torch.int32:
        raise TypeError(f"packed must be int32, got {packed.dtype}")
    if packed.dim() != 2:
        raise ValueError(f"packed must have 2 dimensions, got shape {list(packed.shape)}")


@op(reference=unpack_4bit_reference, check=_check_unpack_4bit)
def unpack_4bit(packed: Tensor) -> Tensor:
    """Unpack each 32-bit word into eight 4-bit codes, lowest bits first: the inverse of `pack_4bit`.

    Args:
        packed: [m, n / 8] int32.

    Returns:
        [m, n] uint8, values 0 to 15.

    Raises:
        ValueError: `packed` is not a matrix.
        TypeError: `packed` is not int32.
    """
    rows, words = packed.shape
    unpacked = torch.empty(rows, words * 8, dtype=torch.uint8, device=packed.device)
    if packed.numel():
        grid = (triton.cdiv(packed.numel(), WORDS_PER_PROGRAM),)
        _unpack_4bit_kernel[grid](packed.contiguous(), unpacked, packed.numel(), BLOCK=WORDS_PER_PROGRAM)
    return unpacked


def pack_plane_reference(fields: Tensor, *, width: int, padding: int) -> Tensor:
    """Compute `pack_plane` in plain torch."""
    in_features, out_features = fields.shape
    tiles, slots = -(-in_features // tile_k(width)), 16 // width
    rows = fields.new_full((tiles * tile_k(width) - in_features, out_features), padding)
    slices = torch.cat([fields, rows]).reshape(tiles, slots, SLICE_K, out_features)
    words = torch.zeros(tiles, SLICE_K, out_features, dtype=torch.int32, device=fields.device)
    for j in range(slots):
        words |= slices[:, j].to(torch.int32) << (width * j)
    return _as_signed(words, 16).to(torch.int16).transpose(1, 2).contiguous()


@triton.jit
def _pack_plane_kernel(
    p_fields, p_plane, K, N, stride_k, stride_n, padding, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    i_tile = tl.program_id(0).to(tl.int64)
    i_n = tl.program_id(1).to(tl.int64)
    SLOTS: tl.constexpr = 16 // WIDTH
    o_c = tl.arange(0, 32)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_words = tl.zeros([BLOCK_N, 32], tl.int32)
    for j in tl.static_range(SLOTS):
        o_k = (i_tile * SLOTS + j) * 32 + o_c
        p_slot = p_fields + o_k[None, :] * stride_k + o_n[:, None] * stride_n
        b_field = tl.load(p_slot, mask=m_n[:, None] & (o_k < K)[None, :], other=0).to(tl.int32)
        b_field = tl.where((o_k < K)[None, :], b_field, padding)
        b_words |= b_field << (WIDTH * j)
    p_out = p_plane + (i_tile * N + o_n)[:, None] * 32 + o_c[None, :]
    tl.store(p_out, b_words.to(tl.int16), mask=m_n[:, None])


def _check_plane_width(width: int) -> None:
    if width not in PLANE_WIDTHS:
        raise ValueError(f"width must be one of {list(PLANE_WIDTHS)}, got {width}")


def _check_pack_plane(fields: Tensor, *, width: int, padding: int) -> None:
    _check_plane_width(width)
    _check_codes("fields", fields, width)
    if not 0 <= padding < 1 << width:
        raise ValueError(f"padding must be 0 to {(1 << width) - 1} for {width} bits, got {padding}")


@op(reference=pack_plane_reference, check=_check_pack_plane)
def pack_plane(fields: Tensor, *, width: int, padding: int) -> Tensor:
    """Arrange the fields of a matrix in the plane that matrix-product kernels read (operand.py).

    Args:
        fields: [K, N] uint8 in stored order, values 0 to 2^width - 1, any strides.
        width: bits per field, 1, 2, 4 or 8.
        padding: the field of features behind the last, up to a whole tile.

    Returns:
        [ceil(K / tile_k(width)), N, 32] int16.

    Raises:
        ValueError: `width` is another number, or a field is too large (looked for on CPU tensors only).
        TypeError: `fields` is not uint8.
    """
    in_features, out_features = fields.shape
    tiles = triton.cdiv(in_features, tile_k(width))
    plane = torch.empty(tiles, out_features, SLICE_K, dtype=torch.int16, device=fields.device)
    if plane.numel():
        _pack_plane_kernel[(tiles, triton.cdiv(out_features, PLANE_BLOCK_N))](
            fields,
            plane,
            in_features,
            out_features,
            fields.stride(0),
            fields.stride(1),
            padding,
            WIDTH=width,
            BLOCK_N=PLANE_BLOCK_N,
        )
    return plane


def unpack_plane_reference(plane: Tensor, *, width: int, in_features: int) -> Tensor:
    """Compute `unpack_plane` in plain torch."""
    tiles, out_features, _ = plane.shape
    words = plane.transpose(1, 2).to(torch.int32)
    fields = torch.empty(tiles, 16 // width, SLICE_K, out_features, dtype=torch.uint8, device=plane.device)
    for j in range(16 // width):
        fields[:, j] = ((words >> (width * j)) & ((1 << width) - 1)).to(torch.uint8)
    return fields.reshape(tiles * tile_k(width), out_features)[:in_features].contiguous()


@triton.jit
def _unpack_plane_kernel(p_plane, p_fields, K, N, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    i_tile = tl.program_id(0).to(tl.int64)
    i_n = tl.program_id(1).to(tl.int64)
    SLOTS: tl.constexpr = 16 // WIDTH
    o_c = tl.arange(0, 32)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    p_in = p_plane + (i_tile * N + o_n)[:, None] * 32 + o_c[None, :]
    b_words = tl.load(p_in, mask=m_n[:, None], other=0).to(tl.int32)
    for j in tl.static_range(SLOTS):
        o_k = (i_tile * SLOTS + j) * 32 + o_c
        b_field = ((b_words >> (WIDTH * j)) & ((1 << WIDTH) - 1)).to(tl.uint8)
        p_out = p_fields + o_k[None, :] * N + o_n[:, None]
        tl.store(p_out, b_field, mask=m_n[:, None] & (o_k < K)[None, :])


def _check_unpack_plane(plane: Tensor, *, width: int, in_features: int) -> None:
    _check_plane_width(width)
    if plane.dtype != torch.int16:
        raise TypeError(f"plane must be int16, got {plane.dtype}")
    tiles = -(-in_features // tile_k(width))
    if plane.dim() != 3 or plane.shape[0] != tiles or plane.shape[2] != SLICE_K:
        expected = f"[{tiles}, N, {SLICE_K}] for {in_features} features of {width} bits"
        raise ValueError(f"plane must be {expected}, got {list(plane.shape)}")


@op(reference=unpack_plane_reference, check=_check_unpack_plane)
def unpack_plane(plane: Tensor, *, width: int, in_features: int) -> Tensor:
    """Recover the fields of a plane: the inverse of `pack_plane`.

    Args:
        plane: [ceil(K / tile_k(width)), N, 32] int16.
        width: bits per field, 1, 2, 4 or 8.
        in_features: K.

    Returns:
        [K, N] uint8; padding is dropped.

    Raises:
        ValueError: `width` is another number, or the shape does not fit K.
        TypeError: `plane` is not int16.
    """
    out_features = plane.shape[1]
    fields = torch.empty(in_features, out_features, dtype=torch.uint8, device=plane.device)
    if fields.numel():
        _unpack_plane_kernel[(plane.shape[0], triton.cdiv(out_features, PLANE_BLOCK_N))](
            plane.contiguous(), fields, in_features, out_features, WIDTH=width, BLOCK_N=PLANE_BLOCK_N
        )
    return fields


def pack_planes(codes: Tensor, *, bits: int) -> tuple[Tensor, ...]:
    """Cut codes into fields, high bits first, and pack each field into its plane.

    Args:
        codes: [K, N] uint8 in stored order, values 0 to 2^bits - 1.
        bits: 2, 3, 4, 5, 6 or 8.

    Returns:
        One int16 plane per field of FIELDS[bits].

    Raises:
        ValueError: `bits` is another number, or a code is too large (looked for on CPU tensors only).
        TypeError: `codes` is not uint8.
    """
    _check_code_bits(bits)
    _check_codes("codes", codes, bits)
    planes, below, centre = [], bits, 1 << (bits - 1)
    for width in FIELDS[bits]:
        below -= width
        fields = codes if bits == width else (codes >> below) & ((1 << width) - 1)
        planes.append(pack_plane(fields, width=width, padding=(centre >> below) & ((1 << width) - 1)))
    return tuple(planes)


def unpack_planes(planes: tuple[Tensor, ...], *, bits: int, in_features: int) -> Tensor:
    """Put the fields of planes together again: the inverse of `pack_planes`.

    Args:
        planes: one int16 plane per field of FIELDS[bits].
        bits: 2, 3, 4, 5, 6 or 8.
        in_features: K.

    Returns:
        [K, N] uint8 codes.

    Raises:
        ValueError: `bits` is another number, or the planes do not fit it.
    """
    _check_code_bits(bits)
    if len(planes) != len(FIELDS[bits]):
        raise ValueError(f"codes of {bits} bits have {len(FIELDS[bits])} planes, got {len(planes)}")
    codes = torch.zeros(in_features, planes[0].shape[1], dtype=torch.uint8, device=planes[0].device)
    for plane, width in zip(planes, FIELDS[bits], strict=True):
        # A shift by all eight bits would be undefined, and the first field has nothing above it.
        codes = (codes << width if width < bits else codes) | unpack_plane(plane, width=width, in_features=in_features)
    return codes


def _check_code_bits(bits: int) -> None:
    if bits not in FIELDS:
        raise ValueError(f"bits must be one of {list(FIELDS)}, got {bits}")
