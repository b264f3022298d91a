"""The GPUs that every kernel is compiled for, and what a block may use there."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Target:
    """One GPU architecture as Triton names it."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int  # bytes of shared memory that one block can ask for
    num_sms: int  # of a typical card, because launchers size their grids by it
    # The target whose PTX is assembled for this one too: Triton makes the same of a launch for both (but for products
    # of fp8, which no kernel has), so the assembler is all that is left to run.
    ptx_of: str | None = None


# pytest-xdist gives two workers two tests each and then one at a time: in this order they end together.
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("gfx1100", "hip", "gfx1100", 32, 64 * KIB, 96),
        Target("sm_86", "cuda", 86, 32, 99 * KIB, 84),
        Target("sm_90", "cuda", 90, 32, 227 * KIB, 132),
        Target("sm_120", "cuda", 120, 32, 99 * KIB, 170),
        Target("sm_80", "cuda", 80, 32, 163 * KIB, 108),
        Target("sm_100", "cuda", 100, 32, 227 * KIB, 148),
        Target("gfx942", "hip", "gfx942", 64, 64 * KIB, 304),
        Target("sm_89", "cuda", 89, 32, 99 * KIB, 128, ptx_of="sm_86"),
    )
}


def followers(name: str) -> list[Target]:
    """Return the targets for which the PTX of one is assembled."""
    return [target for target in TARGETS.values() if target.ptx_of == name]
