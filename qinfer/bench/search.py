"""Searching tiles inside a step: one matrix after the other, the others fixed, and only what beats the noise is taken.

A tile that is best alone is not the best in a step, where other kernels hold the caches and the multiprocessors. So the
clock is that of the whole step, and the walk goes over the matrices again until a round changes nothing.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf

from qinfer.kernels.tiles import WIDE_ROWS, Product, Tile

# Tiles that differ from the table -> milliseconds of the step, or infinity.
Clock = Callable[[Mapping[Product, Tile]], float]

MIN_GAIN = 0.002  # of the step: less is noise, whatever the samples say
MAX_PARTS = 32  # the readers of a product are compiled for each number of them
CONFIRMATIONS = 5  # pairs of runs, old and new in turns
_COLUMNS_AND_WARPS = {  # of tiles with so many rows
    8: ((64, 2), (64, 4), (128, 2), (128, 4), (256, 4)),
    16: ((64, 2), (64, 4), (128, 2), (128, 4), (128, 8), (256, 4)),
    32: ((64, 4), (128, 4), (128, 8), (256, 8)),
    64: ((64, 4), (64, 8), (128, 4), (128, 8), (256, 8)),
}
_WGMMA_COLUMNS_AND_WARPS = ((64, 4), (128, 4), (128, 8), (256, 4), (256, 8))
_WIDE_WGMMA_COLUMNS_AND_WARPS = ((64, 4), (128, 8))  # more sums do not fit the registers


@dataclass(frozen=True)
class Change:
    """A tile that was taken, and milliseconds of the step before and after it."""

    tile: Tile
    before: float
    after: float


def candidates(m: int, n: int, k: int, sms: int) -> Iterator[Tile]:
    """Yield tiles worth timing for a product of m rows with a matrix [K, N] on so many multiprocessors."""
    block_m = max(8, min(64, 1 << (m - 1).bit_length()))
    for (block_n, warps), stages in itertools.product(_COLUMNS_AND_WARPS[block_m], (2, 3, 4, 5, 6)):
        for split_k in _splits(block_m, block_n, m, n, k, sms):
            yield Tile(block_m, block_n, split_k, warps, stages)
    for warps, stages in itertools.product((4, 8), (2, 3)) if m > 64 else ():
        for split_k in _splits(128, 128, m, n, k, sms):
            yield Tile(128, 128, split_k, warps, stages, scaled=True)


def wgmma_candidates(m: int, n: int, k: int, sms: int) -> Iterator[Tile]:
    """Yield tiles of the kernel for Hopper: where `has_wgmma_tile`, no other was ever faster (benchmarks/LOG.md)."""
    block_m = max(8, min(WIDE_ROWS, 1 << (m - 1).bit_length()))
    shapes = _WIDE_WGMMA_COLUMNS_AND_WARPS if block_m == WIDE_ROWS else _WGMMA_COLUMNS_AND_WARPS
    for (block_n, warps), stages, late in itertools.product(shapes, (3, 4, 5), (True, False)):
        for split_k in _splits(block_m, block_n, m, n, k, sms):
            yield Tile(block_m, block_n, split_k, warps, stages, wgmma=True, late=late)


def _splits(block_m: int, block_n: int, m: int, n: int, k: int, sms: int) -> list[int]:
    """Return into how many parts K may be cut: two steps to each, and no more programs than keep a GPU busy.

    Among them are those that give every multiprocessor up to four programs, and as few as possible of them a place
    that stays empty.
    """
    programs = ceil(n / block_n) * ceil(m / block_m)
    most = min(ceil(k / 128) // 2, 16 * sms // programs, MAX_PARTS)
    even = {places * sms // programs for places in (1, 2, 3, 4, 6, 12)}
    return [split_k for split_k in sorted({2, 3, 4, 6, 8, 12, 16} | even | {1}) if split_k == 1 or 1 < split_k <= most]


def search(
    products: Sequence[Product],
    choices: Callable[[Product], Sequence[Tile]],
    clock: Clock,
    *,
    rounds: int = 2,
    is_over: Callable[[], bool] = lambda: False,
) -> dict[Product, Change]:
    """Find tiles that make the step faster.

    Args:
        products: those of the step, the ones that take longest first.
        choices: tiles to try for a matrix.
        clock: times the step with some tiles; infinity for tiles that do not work.
        rounds: how often all matrices are walked over at most.
        is_over: asked before every trial; what was found until it says yes counts.

    Returns:
        The tiles that differ from those at the start.
    """
    found: dict[Product, Change] = {}
    for _ in range(rounds):
        has_changed = False
        for key in products:
            change = _walk(key, choices(key), {other: kept.tile for other, kept in found.items()}, clock, is_over)
            if change is not None:
                found[key] = Change(change.tile, found[key].before if key in found else change.before, change.after)
                has_changed = True
        if not has_changed or is_over():
            break
    return found


def _walk(
    key: Product, choices: Sequence[Tile], tiles: Mapping[Product, Tile], clock: Clock, is_over: Callable[[], bool]
) -> Change | None:
    """Try all tiles of one matrix; return the best if it beats the present one in turns."""
    times = {}
    for tile in choices:
        if is_over():
            break
        if tile != tiles.get(key):
            times[tile] = clock({**tiles, key: tile})
    best = min(times, key=lambda tile: times[tile], default=None)
    if best is None or times[best] == inf:
        return None
    olds, news = [], []
    for _ in range(CONFIRMATIONS):
        olds.append(clock(tiles))
        news.append(clock({**tiles, key: best}))
    before, after = statistics.median(olds), statistics.median(news)
    # Every pair has to agree: one lucky run among many candidates is what a minimum finds first.
    is_faster = all(new < old for old, new in zip(olds, news, strict=True)) and after < before * (1 - MIN_GAIN)
    return Change(best, before, after) if is_faster else None
