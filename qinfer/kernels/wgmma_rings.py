"""The rings of `wgmma.py`: what a step of its product reads, fetched into shared memory some steps ahead.

A step has one tile of a plane of 4 bits and two of 8 bits; of a plane of 2 or 1 bits two or four steps share a tile,
which is fetched once and shifted to the slices of the step. The rings of tiles, x, scales and offsets are allocations
of their own, and so is each half of x: Triton keeps accesses to one allocation in order by barriers, whatever part of
it they touch.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from qinfer.kernels.operand import FIELDS

# The older name is that of Triton 3.6.
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.constexpr_function
def width_of(bits, plane):
    """Return the bits of a field of the first or second plane, 0 for none; 8 bits have their second tile for one."""
    return 8 if bits == 8 else (*FIELDS[bits], 0)[plane]


@gluon.constexpr_function
def _share(width):
    """Return how many steps have a tile of a plane in common."""
    return max(1, 4 // width)


@gluon.constexpr_function
def lines_of(group):
    """Return how many groups a step has."""
    return 128 // group if 0 < group < 128 else 1


@gluon.constexpr_function
def slots_of(width, stages):
    """Return the tiles of a plane from the one of the step at work to the one that is fetched."""
    return -(-(stages - 1) // _share(width)) + 1


@gluon.jit
def _slot_of(slot, i_step, WIDTH: gl.constexpr, STAGES: gl.constexpr):
    """Return where in its ring the tile of a step is; `slot` is that of the step in a ring without shared tiles."""
    if _share(WIDTH) == 1:
        return slot
    else:
        return i_step // _share(WIDTH) % slots_of(WIDTH, STAGES)


@gluon.jit
def _fetch_tile(
    s_plane, p_plane, m_words, slot, i_step, first, last, step_words, N64, WIDTH: gl.constexpr, STAGES: gl.constexpr
):
    """Send the tile of a plane that a step reads on its way, unless a step before has."""
    SHARE: gl.constexpr = _share(WIDTH)
    if SHARE == 1:
        copy_to_shared(s_plane.index(slot), p_plane + step_words, mask=m_words & (i_step < last))
    else:
        # A branch and no mask, which would fill the tile with zeros.
        if (i_step < last) & ((i_step % SHARE == 0) | (i_step == first)):
            p_tile = p_plane + i_step // SHARE * (N64 * 32)
            copy_to_shared(s_plane.index(_slot_of(slot, i_step, WIDTH, STAGES)), p_tile, mask=m_words)


@gluon.jit
def _load_tile(s_plane, slot, i_step, WIDTH: gl.constexpr, STAGES: gl.constexpr, WEIGHTS: gl.constexpr):
    """Load the words of a step, its first slice in the lowest bits."""
    b_words = s_plane.index(_slot_of(slot, i_step, WIDTH, STAGES)).load(WEIGHTS)
    if _share(WIDTH) > 1:
        b_amount = gl.full(b_words.shape, i_step % _share(WIDTH) * (4 * WIDTH), gl.int32, WEIGHTS)
        # What crosses from one word of a pair to the other is masked away later.
        b_words = gl.inline_asm_elementwise(
            "shr.u32 $0, $1, $2;", "=r,r,r,r", [b_words, b_amount], dtype=gl.int16, is_pure=True, pack=2
        )  # fmt: skip
    return b_words


@gluon.jit
def _fetch_lines(
    s_lines, p_lines, m_lines, k_lines, slot, i_step, last, N64, K, group_size,
    GROUP: gl.constexpr, EVEN_K: gl.constexpr,
):  # fmt: skip
    """Send the scales or offsets of a step's groups on their way; k_lines: where in the step their groups begin."""
    first = (i_step * 128 // (group_size if GROUP == 0 else GROUP)) * N64
    m_lines = m_lines & (i_step < last)
    if not EVEN_K:
        m_lines = m_lines & (i_step * 128 + k_lines < K)
    copy_to_shared(s_lines.index(slot), p_lines + first, mask=m_lines)


@gluon.jit
def load_words(rings, slot, i_step, BITS: gl.constexpr, STAGES: gl.constexpr, WEIGHTS: gl.constexpr):
    """Load the words of a step's planes, as `codes.py` wants them."""
    b_high = _load_tile(rings[0], slot, i_step, width_of(BITS, 0), STAGES, WEIGHTS)
    b_low = b_high
    if width_of(BITS, 1) > 0:
        b_low = _load_tile(rings[1], slot, i_step, width_of(BITS, 1), STAGES, WEIGHTS)
    return b_high, b_low, b_high, b_high, b_low


@gluon.jit
def load_line(s_lines, slot, LINE: gl.constexpr, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """Load the scales or offsets of one of a step's groups: [BLOCK_N] fp32."""
    return s_lines.index(slot).slice(LINE * BLOCK_N, BLOCK_N).load(LAYOUT).to(gl.float32)


@gluon.jit
def fetch_weights(
    rings, pointers, masks, slot, i_step, first, last, step_words, N64, K, group_size,
    BITS: gl.constexpr, GROUP: gl.constexpr, HAS_OFFSETS: gl.constexpr, EVEN_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Send the words, scales and offsets of a step on their way."""
    HIGH: gl.constexpr = width_of(BITS, 0)
    LOW: gl.constexpr = width_of(BITS, 1)
    _fetch_tile(rings[0], pointers[0], masks[0], slot, i_step, first, last, step_words, N64, HIGH, STAGES)
    if LOW > 0:
        m_words = masks[0]
        if BITS == 8 and not EVEN_K:
            m_words = m_words & (i_step * 128 + 64 < K)  # half a step has no second tile
        _fetch_tile(rings[1], pointers[1], m_words, slot, i_step, first, last, step_words, N64, LOW, STAGES)
    _fetch_lines(rings[2], pointers[2], masks[1], masks[2], slot, i_step, last, N64, K, group_size, GROUP, EVEN_K)
    if HAS_OFFSETS:
        _fetch_lines(rings[3], pointers[3], masks[3], masks[4], slot, i_step, last, N64, K, group_size, GROUP, EVEN_K)


@gluon.jit
def fetch_x(s_x0, s_x1, p_x, m_x, k_x, slot, i_step, last, K, EVEN_K: gl.constexpr):
    """Send both halves of a step's x on their way; what is behind the end of the segment is 0."""
    m_0 = m_x & (i_step < last)
    m_1 = m_0
    if not EVEN_K:
        m_0, m_1 = m_0 & (i_step * 128 + k_x < K), m_1 & (i_step * 128 + 64 + k_x < K)
    copy_to_shared(s_x0.index(slot), p_x + i_step * 128, mask=m_0)
    copy_to_shared(s_x1.index(slot), p_x + (i_step * 128 + 64), mask=m_1)


@gluon.jit
def next_slot(slot, NUM_SLOTS: gl.constexpr):
    """Return the slot behind one."""
    return gl.where(slot == NUM_SLOTS - 1, 0, slot + 1)
