"""How the attention kernel is cut: tiles, and runs of keys that programs share out. Plain Python."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qinfer.kernels.device import num_sms

MAX_SPLITS = 32
MIN_BLOCK_N = 16  # smallest key tile; a tile lies in one page


class Tiles(NamedTuple):
    """Compile-time choices of the attention kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_tiles(
    max_query_len: int, group: int, head_dim: int, page_size: int, itemsize: int, *, is_coded: bool
) -> Tiles:
    """Choose tiles that fit 99 KiB of shared memory and 255 registers on every NVIDIA target, 64 KiB on AMD.

    Args:
        max_query_len: Longest query of the step, in tokens.
        group: Query heads per KV head.
        head_dim: D.
        page_size: Tokens per page, a multiple of 16.
        itemsize: Bytes per number that the products take.
        is_coded: Pages are decoded in registers, which leaves fewer of them to tiles.
    """
    rows = max_query_len * group
    if itemsize == 4:  # exact fp32 products run on the plain ALUs and keep their operands in registers
        tiles = Tiles(16 if group <= 16 else 64, 16, 4 if head_dim <= 64 and group <= 16 else 8, 1)
    elif rows <= 16:
        tiles = Tiles(16, 64 if head_dim <= 128 else 32, 4, 3)
    elif head_dim > 128:
        tiles = Tiles(64, 16, 8, 3)
    elif rows <= 64 and group <= 32:
        tiles = Tiles(32, 64, 4, 3)
    else:
        tiles = Tiles(128, 64 if head_dim <= 64 else 32, 8, 3)
    if is_coded and rows > 16:
        tiles = tiles._replace(block_n=min(tiles.block_n, 32), num_stages=min(tiles.num_stages, 2))
    # Every stage but the one in registers is a buffer of keys and one of values; there is less room for them on AMD.
    # The largest power of two that divides the page size bounds a tile that lies in one page.
    num_stages = min(tiles.num_stages, 2) if torch.version.hip is not None else tiles.num_stages
    return tiles._replace(block_n=min(tiles.block_n, page_size & -page_size), num_stages=num_stages)


def choose_splits(num_programs: int, num_tiles: int, device: torch.device) -> int:
    """Return how many runs give two programs per multiprocessor, at most one per tile of keys."""
    return max(1, min(2 * num_sms(device) // num_programs, num_tiles, MAX_SPLITS))
