"""How the attention kernel is cut: tiles, and runs of keys that programs share out. Plain Python."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qinfer.kernels.device import num_sms
from qinfer.kernels.kv_codec import NUM_PLANES

MAX_SPLITS = 32
MIN_BLOCK_N = 16  # smallest key tile; a tile lies in one page
# Said aloud, the hardware's own limit keeps ptxas from saving registers at the price of spills. Where it is said was
# found by compiling all cases: elsewhere it costs spills, or programs per multiprocessor.
REGISTERS = {"maxnreg": 255}
# Decode over codes, in an order, or of padded heads: as many programs per multiprocessor as go without spills, six of
# two warps over four bits. By scheme, and for the others. Masks and sixteen rows over codes want all registers.
_DATA_CENTRE: tuple[dict[str, int], int] = ({"plain": 168, "q4": 168}, 255)
LEAN = {"sm_90": _DATA_CENTRE, "sm_100": _DATA_CENTRE, "sm_120": ({}, 255)}
RDNA = ("gfx10", "gfx11", "gfx12")
SAVES_ALWAYS, SAVES_FOR_CODES = ("sm_80", "sm_86", "sm_89"), ("sm_90", "sm_100")


class Tiles(NamedTuple):
    """Compile-time choices of the attention kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    keys_first: bool = False  # scores are [keys, queries]
    residents: int = 2  # programs that a multiprocessor holds at a time


def choose_tiles(
    max_query_len: int,
    group: int,
    head_dim: int,
    page_size: int,
    itemsize: int,
    schemes: tuple[str, str],
    arch: str,
    *,
    is_crowded: bool = False,
) -> Tiles:
    """Choose tiles that fit 99 KiB of shared memory and 255 registers on every NVIDIA target, 64 KiB on AMD.

    Hopper's are measured (benchmarks/LOG.md), and may take more.

    Args:
        max_query_len: Longest query of the step, in tokens.
        group: Query heads per KV head.
        head_dim: D.
        page_size: Tokens per page, a multiple of 16.
        itemsize: Bytes per number that the products take.
        schemes: How keys and values are coded; codes are decoded in registers, which leaves fewer of them to tiles.
        arch: Of the device.
        is_crowded: There are more programs than a multiprocessor holds with deep pipelines.
    """
    rows, is_coded, is_hip = max_query_len * group, schemes != ("plain", "plain"), torch.version.hip is not None
    if itemsize == 4:  # exact fp32 products run on the plain ALUs and keep their operands in registers
        tiles = Tiles(16 if group <= 16 else 64, 16, 4 if head_dim <= 64 and group <= 16 else 8, 1)
    elif arch.startswith(RDNA):
        tiles = _rdna_tiles(rows, group, head_dim, schemes)
    elif rows <= 16 and is_hip:
        tiles = Tiles(16, 64 if head_dim <= 128 else 32, 4, 3)
    elif rows <= 16:
        is_wide, is_few, is_padded = head_dim > 128, rows <= 8, head_dim & (head_dim - 1) != 0
        block_m, block_n = 8 if is_few else 16, 32 if is_wide or "q6" in schemes else 64
        # Two warps decode each code once, and one those of six bits, which want the most registers. Sixteen rows fill
        # more of them, and with large heads those of four warps.
        if is_wide and not is_few:
            num_warps, residents = 4, 2
        elif "q6" in schemes and is_few and not is_wide:
            num_warps, residents = 1, 8
        elif is_coded or is_wide:
            num_warps, residents = 2, 6 if is_few and not is_padded and schemes == ("q4", "q4") else 4
        else:
            num_warps, residents = 4, 3
        num_stages = 2 if is_crowded and not is_coded else 3
        tiles = Tiles(block_m, block_n, num_warps, num_stages, keys_first=True, residents=residents)
    elif head_dim > 128:
        tiles = Tiles(64, 16, 8, 3)
    elif rows <= 64 and group <= 32:
        tiles = Tiles(32, 64, 4, 3)
    elif is_coded and is_hip:  # its matrix units want every plane's operands in registers
        tiles = Tiles(64, 16, 4, 2)
    elif head_dim <= 64:
        tiles = Tiles(128, 64, 8, 3)
    elif arch == "sm_90":
        tiles = Tiles(64, 64, 4, 2) if is_coded else Tiles(128, 64, 8, 3)
    else:
        tiles = Tiles(128, 32, 8, 3)
    if is_coded and rows > 16:
        # Of planes of 64 keys by 64 features and 64 by 32 in one place, ptxas 12.8 makes a product that reads anywhere.
        is_safe = NUM_PLANES[schemes[0]] != 2 or NUM_PLANES[schemes[1]] != 4
        block_n = tiles.block_n if arch == "sm_90" and tiles.block_m == 64 and is_safe else min(tiles.block_n, 32)
        tiles = tiles._replace(block_n=block_n, num_stages=min(tiles.num_stages, 2))
    # Every stage but the one in registers is a buffer of keys and one of values; there is less room for them on AMD.
    # The largest power of two that divides the page size bounds a tile that lies in one page.
    num_stages = min(tiles.num_stages, 2) if is_hip else tiles.num_stages
    return tiles._replace(block_n=min(tiles.block_n, page_size & -page_size), num_stages=num_stages)


def _rdna_tiles(rows: int, group: int, head_dim: int, schemes: tuple[str, str]) -> Tiles:
    """Choose tiles for RDNA, whose matrix units take operands that every half of a wave holds.

    A stage beyond the first keeps a tile of keys and one of values in registers; without them few kernels spill.
    """
    is_coded = schemes != ("plain", "plain")
    if rows <= 16:
        return Tiles(16, 16 if is_coded or head_dim > 128 else 32, 2 if "q6" in schemes else 4, 1)
    return Tiles(32 if rows <= 64 and group <= 32 else 64, 16 if head_dim > 128 else 32, 8, 1)


def choose_splits(num_programs: int, num_tiles: int, residents: int, device: torch.device) -> int:
    """Return how many runs fill every multiprocessor with its residents, at most one per tile of keys."""
    return max(1, min(residents * num_sms(device) // num_programs, num_tiles, MAX_SPLITS))


def registers(arch: str, tiles: Tiles, schemes: tuple[str, str], *, has_order: bool, is_padded: bool) -> dict[str, int]:
    """Return the option of a launch that sets the limit of registers, if it needs one."""
    is_coded = schemes != ("plain", "plain")
    if is_coded and tiles.keys_first and (is_padded or tiles.block_m > 8):
        return REGISTERS
    if tiles.keys_first and arch in LEAN and (is_coded or ((has_order or is_padded) and tiles.num_warps == 4)):
        by_scheme, others = LEAN[arch]
        return {"maxnreg": max(by_scheme.get(scheme, others) for scheme in schemes)}
    return REGISTERS if arch in SAVES_ALWAYS or (is_coded and arch in SAVES_FOR_CODES) else {}
