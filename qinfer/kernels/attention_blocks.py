"""Which queries a program of attention has, and which keys: blocks of queries, and runs of whole tiles of keys.

Blocks hold query tokens of one sequence. The range of keys that they see is cut into at most as many runs as the grid
is deep, from `context_lens`, so that one grid serves all lengths.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.overlap import wait_for_inputs

MAX_HEAD_DIM = 256  # of every kernel of attention

# What a sequence is to a launch: anything; one of so few queries that it is read like in a decode step; one of more;
# one of more for which no room to decode was left (`attention_decoded.py`).
EVERY, STREAM, PROMPT, LEFT_OVER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


class Places(NamedTuple):
    """Where the sequences of a step are; all int32."""

    page_table: Tensor  # [B, W] pages of each
    query_starts: Tensor  # [B + 1] first query token of each
    context_lens: Tensor  # [B] keys of each


class Wanted(NamedTuple):
    """What is asked of attention, as `paged_attention` says it."""

    max_query_len: int
    scale: float  # times log2(e), for softmax by powers of two
    window: int | None
    softcap: float | None  # times log2(e)
    order: Tensor | None  # [H * D] int32
    splits: int | None
    invariant: bool
    # Only sequences of this role take part; whoever takes the others writes their rows of the result.
    role: int = EVERY.value
    few: int = 0  # most query tokens of a stream
    roles: Tensor | None = None  # [B + 1] of `kv_decode`; None: what `few` says, without anyone left over

    def num_keys(self, places: Places, page_size: int, block_q: int) -> int:
        """Return the most keys that a block of so many query tokens sees."""
        most = places.page_table.shape[1] * page_size
        return most if self.window is None else min(most, self.window + block_q)


@triton.jit
def is_idle(p_roles, num_seqs, ROLE: tl.constexpr, OVERLAP: tl.constexpr):
    """Wait for the roles, if there are any; return whether they say at once that a launch has nothing to do."""
    if p_roles is not None:
        wait_for_inputs(OVERLAP)
        if ROLE == LEFT_OVER:
            return tl.load(p_roles + num_seqs) == 0
    return False


@triton.jit
def _find_sequence(p_starts, i_block, num_seqs, search_steps, BLOCK_Q: tl.constexpr):
    """Return the sequence of a block, and its number within the sequence.

    Sequence b owns the blocks from query_starts[b] // BLOCK_Q + b on, which is never one too few.
    """
    i_seq = i_block * 0
    b_above = i_seq + num_seqs
    for _ in range(search_steps):
        b_middle = (i_seq + b_above) // 2
        is_left = tl.load(p_starts + b_middle) // BLOCK_Q + b_middle <= i_block
        i_seq = tl.where(is_left, b_middle, i_seq)
        b_above = tl.where(is_left, b_above, b_middle)
    return i_seq, i_block - (tl.load(p_starts + i_seq) // BLOCK_Q + i_seq)


@triton.jit
def find_queries(
    p_starts,
    p_lens,
    i_block,
    num_seqs,
    search_steps,
    BLOCK_Q: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    p_roles,
    ROLE: tl.constexpr,
    FEW: tl.constexpr,
):
    """Return the sequence of a block, its first token and its length there, its first position and the one behind."""
    i_seq, i_local = i_block, 0
    if not ONE_BLOCK:
        i_seq, i_local = _find_sequence(p_starts, i_block, num_seqs, search_steps, BLOCK_Q)
    b_start = tl.load(p_starts + i_seq)
    b_query_len = tl.load(p_starts + i_seq + 1) - b_start
    b_context_len = tl.load(p_lens + i_seq)
    b_first = b_context_len - b_query_len + i_local * BLOCK_Q
    b_num = tl.minimum(b_query_len - i_local * BLOCK_Q, BLOCK_Q)
    if ROLE == STREAM:
        b_num = tl.where(b_query_len > FEW, 0, b_num)
    elif p_roles is not None:
        b_num = tl.where(tl.load(p_roles + i_seq) == ROLE, b_num, 0)
    elif ROLE == PROMPT:
        b_num = tl.where(b_query_len > FEW, b_num, 0)
    b_stop = tl.where(b_num > 0, tl.maximum(tl.minimum(b_first + BLOCK_Q, b_context_len), 0), 0)
    return i_seq, b_start + i_local * BLOCK_Q, b_num, b_first, b_stop


@triton.jit
def run_of_tiles(
    b_first,
    b_stop,
    i_split,
    num_splits,
    min_tiles,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_LOCKS: tl.constexpr,
):
    """Return the first tile of a run, the one behind its last, and how many runs the block has."""
    b_tile = tl.maximum(b_first - WINDOW + 1, 0) // BLOCK_N if WINDOW > 0 else b_stop * 0
    b_num_tiles = tl.maximum((b_stop + BLOCK_N - 1) // BLOCK_N - b_tile, 0)
    b_runs = num_splits
    if HAS_LOCKS:
        # Short contexts leave programs without work, which costs less than sharing a few tiles out.
        b_runs = tl.maximum(tl.minimum(tl.cdiv(b_num_tiles, min_tiles), num_splits), 1)
    b_tile_start = b_tile + b_num_tiles * tl.minimum(i_split, b_runs) // b_runs
    return b_tile_start, b_tile + b_num_tiles * tl.minimum(i_split + 1, b_runs) // b_runs, b_runs
