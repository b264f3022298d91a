"""Cuts and draws over a list of tokens, by one program: what `sample_rows` ends with.

A list holds the ids of the tokens among which a cut lies. Their order is that of their ranks: larger logit first, then
lower id. Short lists are compared token by token; in others a cut and an id are found bit by bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qinfer.kernels.token_weights import weights_below

SHORT = tl.constexpr(256)  # listed tokens that are compared with each other
OTHERS = tl.constexpr(32)  # with so many at a time
ID_BITS = tl.constexpr(19)
LAST_ID = tl.constexpr((1 << 19) - 1)
TOP_ID_BIT = tl.constexpr(1 << 18)
LOWEST_KEY = tl.constexpr(-(1 << 31))
RANK_BITS = tl.constexpr(32 + 19)
TOP_RANK_BIT = tl.constexpr(1 << 50)


@triton.jit
def rank_of(b_x, o_v):
    """Return integers in the order of the tokens. The sign of a zero does not count."""
    b_bits = tl.where(b_x == 0.0, 0.0, b_x).to(tl.int32, bitcast=True)
    b_key = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    return ((b_key.to(tl.int64) - LOWEST_KEY) << ID_BITS) + (LAST_ID - o_v)


@triton.jit
def _candidates(p_logits, p_list, o_n, b_num, b_peak, b_rate):
    # Ranks and weights of listed tokens; rank -1 behind the end of the list.
    m_n = o_n < b_num
    o_v = tl.load(p_list + o_n, mask=m_n, other=0)
    b_x = tl.load(p_logits + o_v, mask=m_n, other=float("-inf"))
    b_w, _ = weights_below(b_x, b_peak, b_rate)
    return tl.where(m_n, rank_of(b_x, o_v), -1), b_w


@triton.jit
def mass_of(
    p_logits, p_list, b_num, b_peak, b_rate, b_cut, WEIGHTED: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr
):
    """Return count or weight of the tokens of a list, from its place START on, whose rank is at least b_cut."""
    b_mass = b_cut * 0
    for o_start in range(START, b_num, BLOCK):
        b_rank, b_w = _candidates(p_logits, p_list, o_start + tl.arange(0, BLOCK), b_num, b_peak, b_rate)
        b_mass += tl.sum(tl.where(b_rank >= b_cut, b_w if WEIGHTED else 1, 0).to(tl.int64), 0)
    return b_mass


@triton.jit
def find_cut(p_logits, p_list, b_num, b_peak, b_rate, b_needed, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """Return the rank of the first token with which the tokens before it have the count or weight that is needed.

    Together with it, they have at least that; it is 0 where all of them have less.
    """
    if b_num <= SHORT:
        b_cut = _cut_of_few(p_logits, p_list, b_num, b_peak, b_rate, b_needed, WEIGHTED)
    else:
        b_cut = _cut_of_many(p_logits, p_list, b_num, b_peak, b_rate, b_needed, WEIGHTED, BLOCK)
    return b_cut


@triton.jit
def _cut_of_few(p_logits, p_list, b_num, b_peak, b_rate, b_needed, WEIGHTED: tl.constexpr):
    # Every token is compared with every other one, which takes fewer sums than there are bits.
    b_rank, _w = _candidates(p_logits, p_list, tl.arange(0, SHORT), b_num, b_peak, b_rate)
    b_mass = tl.zeros([SHORT], tl.int64)
    for o_start in range(0, b_num, OTHERS):
        o_n = o_start + tl.arange(0, OTHERS)
        b_other, b_w = _candidates(p_logits, p_list, o_n, b_num, b_peak, b_rate)
        b_w = tl.where(o_n < b_num, b_w if WEIGHTED else tl.full([OTHERS], 1, tl.int64), 0)
        b_mass += tl.sum(tl.where(b_other[None, :] >= b_rank[:, None], b_w[None, :], 0), 1)
    return tl.max(tl.where((b_rank >= 0) & (b_mass >= b_needed), b_rank, 0), 0)


@triton.jit
def _cut_of_many(p_logits, p_list, b_num, b_peak, b_rate, b_needed, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    # The largest rank from which on there is enough, bit by bit. Nearly always the first block, which stays in
    # registers, is the whole list.
    b_rank, b_w = _candidates(p_logits, p_list, tl.arange(0, BLOCK), b_num, b_peak, b_rate)
    b_w = b_w if WEIGHTED else tl.full([BLOCK], 1, tl.int64)
    b_cut = b_needed * 0
    b_bit = b_cut + TOP_RANK_BIT
    for _ in range(RANK_BITS):
        b_trial = b_cut + b_bit
        b_mass = tl.sum(tl.where(b_rank >= b_trial, b_w, 0), 0)
        if b_num > BLOCK:
            b_mass += mass_of(p_logits, p_list, b_num, b_peak, b_rate, b_trial, WEIGHTED, BLOCK, BLOCK)
        b_cut = tl.where(b_mass >= b_needed, b_trial, b_cut)
        b_bit = b_bit >> 1
    return b_cut


@triton.jit
def draw_listed(p_logits, p_list, b_num, b_peak, b_rate, b_cut, b_floor, b_uniform, BLOCK: tl.constexpr):
    """Return the drawn id where a list of at most BLOCK tokens is all there is: before it lies at most the target."""
    if b_num <= SHORT:
        b_id = _draw_of_few(p_logits, p_list, b_num, b_peak, b_rate, b_cut, b_floor, b_uniform)
    else:
        b_id = _draw_of_many(p_logits, p_list, b_num, b_peak, b_rate, b_cut, b_floor, b_uniform, BLOCK)
    return b_id


@triton.jit
def kept_of(p_logits, p_list, o_n, b_num, b_peak, b_rate, b_cut, b_floor):
    """Return ids of listed tokens, and their weights where they are kept, 0 elsewhere."""
    b_rank, b_w = _candidates(p_logits, p_list, o_n, b_num, b_peak, b_rate)
    b_kept = tl.where((b_rank >= b_cut) & (b_w.to(tl.float64) >= b_floor), b_w, 0)
    return tl.load(p_list + o_n, mask=o_n < b_num, other=0), b_kept


@triton.jit
def _draw_of_few(p_logits, p_list, b_num, b_peak, b_rate, b_cut, b_floor, b_uniform):
    # The last kept token before which at most the target lies; every token is compared with every other one.
    o_v, b_kept = kept_of(p_logits, p_list, tl.arange(0, SHORT), b_num, b_peak, b_rate, b_cut, b_floor)
    b_target = (b_uniform * tl.sum(b_kept, 0).to(tl.float64)).to(tl.int64)
    b_before = tl.zeros([SHORT], tl.int64)
    for o_start in range(0, b_num, OTHERS):
        o_n = o_start + tl.arange(0, OTHERS)
        o_other, b_other = kept_of(p_logits, p_list, o_n, b_num, b_peak, b_rate, b_cut, b_floor)
        b_before += tl.sum(tl.where(o_other[None, :] < o_v[:, None], b_other[None, :], 0), 1)
    return tl.max(tl.where((b_kept > 0) & (b_before <= b_target), o_v, 0), 0)


@triton.jit
def _draw_of_many(p_logits, p_list, b_num, b_peak, b_rate, b_cut, b_floor, b_uniform, BLOCK: tl.constexpr):
    # The largest id before which at most the target lies, bit by bit.
    o_v, b_kept = kept_of(p_logits, p_list, tl.arange(0, BLOCK), b_num, b_peak, b_rate, b_cut, b_floor)
    b_target = (b_uniform * tl.sum(b_kept, 0).to(tl.float64)).to(tl.int64)
    b_id = b_num * 0
    b_bit = b_id + TOP_ID_BIT
    for _ in range(ID_BITS):
        b_before = tl.sum(tl.where(o_v < b_id + b_bit, b_kept, 0), 0)
        b_id = tl.where(b_before <= b_target, b_id + b_bit, b_id)
        b_bit = b_bit >> 1
    return b_id
