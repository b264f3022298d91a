"""Which tile an op uses for a shape: a table per GPU, and a written rule behind it. Nothing tunes at run time.

`tile_tables/<arch>.json` holds rows with named fields, written by `python -m qinfer.bench tune` on that GPU and
reviewed as a diff. A shape that no row covers, and a GPU without a table, use the rules: correct everywhere and merely
slower. Beyond some number of rows a product has no tile: writing the matrix out in 16 bits is faster then.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from math import ceil, gcd
from pathlib import Path
from typing import NamedTuple

from qinfer.kernels.operand import FIELDS, MIN_STEP, SLICE_K, PlaneOperand, step_k, tile_k

# What a pipeline may take: with few rows so little that six or four programs fit a multiprocessor of a data-centre GPU,
# with more rows what consumer GPUs have for one program, 99 KiB.
LEAN_BYTES, FEW_ROWS_BYTES, SHARED_BYTES = 36 << 10, 56 << 10, 88 << 10
# What the pipelines of wide tiles may take: of one program, for a third stage, and of two on one multiprocessor.
WIDE_BYTES, PAIR_BYTES = 160 << 10, 224 << 10
LEAN_PART, MIN_PART = 256, 512  # features of K that a program keeps
# The smallest tile is for what NVIDIA's tensor cores multiply at once, m16n8k16; with long steps of K it spills.
LEAN_ROWS, LEAN_BITS = 8, (2, 4, 6, 8)
FEW_ROWS = 16  # the smallest tile elsewhere
FUSED_ROWS = 64  # up to here every product has a tile, on every GPU
WIDE_ROWS = 128  # of the largest tiles
# Rows of a program. Without tensor cores that read their second operand from shared memory, more than 32 rows of sums
# beside the unpacked weights do not fit the registers.
MAX_ROWS = {"sm_90": 64, "sm_100": 64}
# Where ptxas, left alone, saves registers at the price of spills: the widths and rows for which it is told how many it
# may use, by warps. That is what eight programs of two warps, three of four or two of eight may have together,
# or, on sm_86 and sm_89, all that there are. Found by compiling all cases; said to others, it makes spills.
_AMPERE_AND_ADA = ((4,), range(32, 65), {4: 255})
SAVING: dict[str, tuple[tuple[int, ...], range, dict[int, int]]] = {
    "sm_86": _AMPERE_AND_ADA,
    "sm_89": _AMPERE_AND_ADA,
    "sm_100": ((2, 3, 4), range(65), {4: 168, 8: 128}),
    "sm_120": ((4, 8), range(17), {2: 128, 4: 168}),
}
LEAN_REGISTERS = 80  # the same for twelve programs of two warps and 64 columns, with 4 bits
# GPUs that have tiles of their own for many rows: elsewhere nobody has measured them, and for sm_100 Triton 3.6 makes a
# kernel that only traps of weights that are scaled before their product.
MEASURED = ("sm_90",)
FEW_CUTS = 4  # groups of a step whose sums fit the registers in tiles of many rows
TENSOR_ROWS = 256  # rows of sums that sm_100's tensor memory has room for, those of all groups of a step together
WGMMA = ("sm_90",)  # GPUs that have `wgmma`, and its kernel
TABLES = Path(__file__).parent / "tile_tables"


@dataclass(frozen=True)
class Tile:
    """How a matmul is cut: rows and columns of the output per program, parts of K, warps and pipeline stages.

    With `scaled`, weights take their scales before they are multiplied, and not the sums of a group after it: an
    operation per weight instead of one per sum and group, and one set of sums in the registers instead of two. With
    `wgmma`, the kernel of `wgmma.py` takes it, which with `late` adds the sums of a step, where it can, while the
    weights of the next are unpacked.
    """

    block_m: int
    block_n: int
    split_k: int
    warps: int
    stages: int
    scaled: bool = False
    wgmma: bool = False
    late: bool = False


class Product(NamedTuple):
    """What a row of a table is for: a bucket of M, and a matrix [K, N] of one width and group size."""

    bits: int
    group_size: int
    m_max: int
    n: int
    k: int


class SegmentShape(NamedTuple):
    """What tiles depend on of a matrix, or of one of several on top of each other."""

    k: int
    bits: int
    group_size: int


def shapes_of(segments: Sequence[PlaneOperand]) -> tuple[SegmentShape, ...]:
    """Return the shapes of a matrix's segments."""
    return tuple(SegmentShape(one.in_features, one.bits, one.group_size) for one in segments)


def bucket(m: int) -> int:
    """Return the largest M of the bucket that m belongs to: 1, 4, 8, 16, 32, 64, then powers of two."""
    for limit in (1, 4, 8, 16, 32, 64):
        if m <= limit:
            return limit
    return 1 << (m - 1).bit_length()


@cache
def _table(arch: str) -> dict[Product, Tile]:
    """Read the table of one GPU; an empty one if none was measured."""
    path = TABLES / f"{arch}.json"
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["rows"]
    return {
        Product(**{field: row[field] for field in Product._fields}): Tile(
            **{field.name: row[field.name] for field in fields(Tile) if field.name in row}
        )
        for row in rows
        if row["op"] == "matmul"
    }


@cache
def lookup(
    arch: str, num_sms: int, m: int, n: int, segments: tuple[SegmentShape, ...], has_offsets: bool
) -> Tile | None:
    """Return the tile of a product of m rows and a plane matrix of n outputs, or several on top of each other.

    Rows of the table are for matrices of one width; a tile that fits one group size may spill with another. Tiles that
    scale weights are there for what they need of shared memory without offsets.

    Returns:
        The tile; None where writing the matrix out is faster, which it never is for up to FUSED_ROWS rows.
    """
    k, widths = sum(segment.k for segment in segments), tuple(segment.bits for segment in segments)
    whole = segments[0].group_size if len(segments) == 1 else gcd(*(gcd(one.k, one.group_size) for one in segments))
    row = _table(arch).get(Product(widths[0], whole, bucket(m), n, k)) if len(segments) == 1 else None
    if row is not None and not (row.scaled and has_offsets):
        return row
    if has_wgmma_tile(arch, m, n, segments):
        return wgmma_rule(num_sms, m, n, segments)
    if m <= LEAN_ROWS and len(set(widths)) == 1 and widths[0] in LEAN_BITS and whole >= SLICE_K and arch[:3] == "sm_":
        return lean_rule(num_sms, n, k, widths[0])
    if m <= FUSED_ROWS:
        groups = cuts(segments)
        max_rows = min(MAX_ROWS.get(arch, 32), tensor_rows(arch, groups))
        return rule(num_sms, m, n, k, widths, max_rows=max_rows, cuts=groups)
    if takes_wide_wgmma(arch, num_sms, m, n, segments, has_offsets):
        return wide_wgmma_rule(num_sms, m, n, k)
    if arch in MEASURED and m <= 2 * wide_rows(widths):
        return wide_rule(num_sms, m, n, k, widths, is_lean=whole >= MIN_STEP and not has_offsets)
    return None


@contextmanager
def trial(arch: str, tiles: Mapping[Product, Tile]) -> Iterator[None]:
    """Put tiles in front of the table while they are tried."""
    table = _table(arch)
    kept = dict(table)
    table.update(tiles)
    lookup.cache_clear()
    try:
        yield
    finally:
        table.clear()
        table.update(kept)
        lookup.cache_clear()


def registers(arch: str, widths: tuple[int, ...], tile: Tile) -> dict[str, int]:
    """Return the option of a launch that sets the limit of registers, if a tile needs one."""
    if (tile.block_m, tile.block_n, tile.warps) == (LEAN_ROWS, 64, 2) and widths == (4,) and arch.startswith("sm_"):
        return {"maxnreg": LEAN_REGISTERS}
    saving, rows, limits = SAVING.get(arch, ((), range(0), {}))
    is_saving = len(widths) == 1 and widths[0] in saving and tile.block_m in rows and tile.warps in limits
    return {"maxnreg": limits[tile.warps]} if is_saving else {}


def rule(num_sms: int, m: int, n: int, k: int, widths: tuple[int, ...], *, max_rows: int = 64, cuts: int = 1) -> Tile:
    """Return a reasonable tile for any shape.

    Few rows are bound by reading the weights, and what counts there is bytes in flight: about four programs per
    multiprocessor, each with a short pipeline, beat fewer programs with long ones; with 16 rows and more, two programs
    do (benchmarks/LOG.md). So K is split until the grid is that large, into a power of two, which cuts most matrices
    evenly, and every program keeps 512 features. Codes of 3 and 5 bits come in long steps; the pipeline is as deep as
    shared memory allows on every GPU. A program takes at most `max_rows` rows, half of that where the steps are long.

    Groups that a step is cut into (`cuts`) have sums of their own. Large tiles of many spill, or, on sm_100, take more
    tensor memory than there is, and Triton makes a kernel that only traps.
    """
    is_long, is_cut = has_long_steps(widths), cuts > 1 and (widths != (4,) or cuts > FEW_CUTS)
    few = min(FEW_ROWS, max_rows)
    most = min(max_rows, FEW_ROWS if cuts > FEW_CUTS else 32) if is_cut else max_rows
    block_m = min(max(few, 1 << (m - 1).bit_length()), max(few, most // 2 if is_long else most))
    is_narrow = is_long or is_cut or (n <= 64 * num_sms and any(bits != 4 for bits in widths))
    block_n = 64 if is_narrow else 128
    fits = [
        (rows, columns, stages)
        for rows, columns in ((block_m, block_n), (block_m, 64), (block_m // 2, 64), (16, 64))
        for stages in ((2,) if is_cut and m > FEW_ROWS else (3, 2))
        if max(shared_bytes(bits, rows, columns, stages) for bits in widths)
        <= (FEW_ROWS_BYTES if rows <= FEW_ROWS else SHARED_BYTES)
    ]
    block_m, block_n, stages = fits[0]
    programs = -(-n // block_n) * -(-m // block_m)
    wanted = (4 if m <= 8 else 2) * num_sms // programs
    split_k = max(1, min(1 << max(wanted, 1).bit_length() - 1, k // MIN_PART, 16))
    return Tile(block_m, block_n, split_k, 4 if block_m * block_n < 64 * 128 else 8, stages)


def lean_rule(num_sms: int, n: int, k: int, bits: int) -> Tile:
    """Return a reasonable tile for up to LEAN_ROWS rows and codes of LEAN_BITS.

    What counts is that some programs load while others compute: six of two warps on every multiprocessor, and with 4
    bits, of which twelve have room there, one wave of ten. With 8 rows Triton takes `mma.sync`, whose operands are
    registers: half the registers of `wgmma` with 16 rows, and no wait for the tensor cores behind every slice
    (benchmarks/LOG.md).
    """
    block_n = 64
    places, part = (10, MIN_PART) if bits == 4 else (6, LEAN_PART)
    split_k = max(1, min(round(places * num_sms / -(-n // block_n)), k // part, 16))
    return Tile(LEAN_ROWS, block_n, split_k, 2, 3 if shared_bytes(bits, LEAN_ROWS, block_n, 3) <= LEAN_BYTES else 2)


def cuts(segments: Sequence[SegmentShape]) -> int:
    """Return into how many groups a step of K is cut at most."""
    return max((ceil(step_k(one.bits) / one.group_size) for one in segments if one.group_size < MIN_STEP), default=1)


def tensor_rows(arch: str, groups: int) -> int:
    """Return how many rows of sums of so many groups tensor memory has room for, where sums are kept in it."""
    return TENSOR_ROWS // groups if arch == "sm_100" else TENSOR_ROWS


def wgmma_fits(n: int, segments: Sequence[SegmentShape]) -> bool:
    """Return whether the kernel of `wgmma.py` takes a matrix: aligned rows, groups that are steps or cut them."""
    return n % 16 == 0 and all(
        k % SLICE_K == 0 and (group_size in (SLICE_K, 2 * SLICE_K) or group_size % MIN_STEP == 0 or group_size >= k)
        for k, _, group_size in segments
    )


def has_wgmma_tile(arch: str, m: int, n: int, segments: Sequence[SegmentShape]) -> bool:
    """Return whether products take tiles of `wgmma.py`; with 2 bits and few rows those of `lean_rule` are faster."""
    is_faster = m > LEAN_ROWS or len(segments) > 1 or segments[0].bits != 2
    return arch in WGMMA and m <= FUSED_ROWS and is_faster and wgmma_fits(n, segments)


def takes_gate(tile: Tile, n: int, widths: tuple[int, ...]) -> bool:
    """Return whether a gated product of n columns fits a tile: its sums are whole, and a thread has gate and up."""
    # What it takes to find the columns of 8 bits or of several segments, the registers of the largest tile lack.
    is_full = (len(widths) > 1 or widths == (8,)) and tile.block_m * tile.block_n >= 64 * 128
    is_whole = tile.wgmma and tile.split_k == 1
    return is_whole and not is_full and tile.block_n % (32 * tile.warps) == 0 and n % 32 == 0


def wgmma_rule(num_sms: int, m: int, n: int, segments: Sequence[SegmentShape]) -> Tile:
    """Return a reasonable tile of the kernel of `wgmma.py` for up to FUSED_ROWS rows.

    Three programs to a multiprocessor, two with 64 rows and 128 columns, whose sums leave no registers for a third; of
    many rows narrow tiles, where four parts of K fill the GPU with them, for parts cost more to add there. Two programs
    that walk over all of K have a stage more.

    Few rows and codes of two fields are bound by unpacking: two parts where there are many programs, for eight rows
    where they are more than multiprocessors, so that the last ones are short. Groups smaller than a step are products
    of their own, and waited for one by one. That takes two parts for more rows, but for heads, and for eight where all
    programs run at once; six parts of narrow tiles; and registers: with groups of a slice half the rows leave none for
    a third program, and all rows, or codes of two fields, would spill.

    To add sums late takes registers and x of another step, which pays unless there are more programs than then run at
    once, and but for the smallest and the largest tile with codes of 5 or 6 bits.
    """
    k, widths = sum(segment.k for segment in segments), {segment.bits for segment in segments}
    smallest, has_two_fields = min(one.group_size for one in segments), any(len(FIELDS[bits]) > 1 for bits in widths)
    block_m, is_small = max(8, 1 << (m - 1).bit_length()), smallest < MIN_STEP
    full_rows = FUSED_ROWS // (2 if smallest == SLICE_K else 1)
    would_spill = block_m > full_rows or (block_m == FUSED_ROWS and is_small and has_two_fields)
    is_narrow = would_spill or (block_m > 16 and 4 * -(-n // 64) <= 3 * num_sms)
    block_n, is_full = (64, False) if is_narrow else (128, block_m == full_rows)
    programs, places = -(-n // block_n), (2 if is_full else 3) * num_sms
    split_k = max(1, min(places // programs, k // MIN_PART, (6 if is_small else 4) if is_narrow else 16))
    if is_small and programs > places:
        in_two = 8 < block_m < FUSED_ROWS and not is_full and programs <= 2 * places
    else:
        in_two = (is_small or has_two_fields) and block_m == 8 and programs > num_sms
        in_two = in_two or (has_two_fields and block_m == 16 and programs > places)
    split_k = 2 if in_two else split_k
    late = programs * split_k <= (2 if block_m == FUSED_ROWS else 3) * num_sms or (block_m > 16 and not is_narrow)
    late = late and not (widths in ({5}, {6}) and (is_full or block_m == 8))
    stages = 4 if block_m <= 16 and split_k == 1 and programs <= 2 * num_sms and not is_small else 3
    return Tile(block_m, block_n, split_k, 4, stages, wgmma=True, late=late)


def takes_wide_wgmma(
    arch: str, num_sms: int, m: int, n: int, segments: Sequence[SegmentShape], has_offsets: bool
) -> bool:
    """Return whether more than FUSED_ROWS rows take `wide_wgmma_rule`: of more programs others are faster.

    What else the kernel takes, other widths, offsets and small groups, nobody has measured with so many rows.
    """
    is_measured = not has_offsets and all(
        one.bits == 4 and (one.group_size % MIN_STEP == 0 or one.group_size >= one.k) for one in segments
    )
    fits = is_measured and m <= 2 * WIDE_ROWS and wgmma_fits(n, segments)
    return arch in WGMMA and fits and -(-n // 128) * -(-m // WIDE_ROWS) <= num_sms


def wide_wgmma_rule(num_sms: int, m: int, n: int, k: int) -> Tile:
    """Return a reasonable tile of the kernel of `wgmma.py` for more than FUSED_ROWS rows.

    One program of two warpgroups per multiprocessor, and K is cut until each has one.
    """
    programs = -(-n // 128) * -(-m // WIDE_ROWS)
    return Tile(WIDE_ROWS, 128, max(1, min(num_sms // programs, k // MIN_PART, 4)), 8, 3, wgmma=True, late=True)


def wide_rows(widths: tuple[int, ...]) -> int:
    """Return the rows of a wide tile: half of them where steps of K are long, for a step of x is kept."""
    return WIDE_ROWS // 2 if has_long_steps(widths) else WIDE_ROWS


def wide_rule(num_sms: int, m: int, n: int, k: int, widths: tuple[int, ...], *, is_lean: bool) -> Tile:
    """Return a reasonable tile for more than FUSED_ROWS rows, bound by the tensor cores and by unpacking weights.

    A grid that fits the GPU at once has one program of eight warps per multiprocessor, and K is split until each has
    one. Of a larger grid two programs share a multiprocessor, so that one unpacks while the other multiplies: with
    three stages and four warps if both fit, and they only just do (benchmarks/LOG.md).

    Args:
        num_sms: multiprocessors.
        m: rows, up to twice `wide_rows`.
        n: outputs.
        k: features.
        widths: of the codes, in bits.
        is_lean: whether the pipeline keeps nothing but words, x and one scale per output and step.
    """
    block_m, block_n = wide_rows(widths), 128
    need = max(shared_bytes(bits, block_m, block_n, 3) for bits in widths)
    programs = -(-n // block_n) * -(-m // block_m)
    if programs > num_sms:
        warps, stages = (4, 3) if is_lean and 2 * need <= PAIR_BYTES else (8, 2)
        return Tile(block_m, block_n, 1, warps, stages, scaled=True)
    split_k = max(1, min(num_sms // programs, k // MIN_PART, 4))
    return Tile(block_m, block_n, split_k, 8, 3 if need <= WIDE_BYTES else 2, scaled=True)


def has_long_steps(widths: tuple[int, ...]) -> bool:
    """Return whether a step of K has so many slices that sums, words and x do not fit the registers of a large tile."""
    return max(step_k(bits) for bits in widths) > 2 * MIN_STEP


def shared_bytes(bits: int, block_m: int, block_n: int, stages: int) -> int:
    """Return the shared memory of a pipeline; x takes one stage more, for wgmma reads it while the next loads come."""
    step = step_k(bits)
    words = sum(step // tile_k(width) for width in FIELDS[bits]) * SLICE_K
    return 2 * (step * block_m * stages + words * block_n * (stages - 1))
