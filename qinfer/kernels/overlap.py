"""Overlap across kernel boundaries: a kernel may start while the one before it still runs (NVIDIA, from sm_90 on).

A kernel that takes part (programmatic dependent launch) follows these rules:
- `wait_for_inputs` comes before the first access to anything that another kernel writes or reads, and every program
  runs it: it returns when the kernel before has finished, and because that one waited too, everything before it has.
  Constants (weights, scales, tables) may be read ahead of it.
- In a pipelined loop that reads both, `offset_of_inputs` is part of the address of the inputs: then the pipeline loads
  the first constants, waits, and loads the first inputs. A `wait_for_inputs` behind the loop keeps rule one for
  programs that have no step.
- `let_next_start` says that the next kernel may take the multiprocessors that this one leaves free. A kernel of few
  programs says it at once, and behind its wait where it waits for what comes from other ranks. One that fills the GPU
  says it behind its main loop: said earlier, programs of the next kernel sit where its own last programs could run
  (benchmarks/LOG.md).
- A product in parts of few rows (`starts_early`) says it first of all: the kernel that reads the parts is small, and
  sits beside its programs until it ends; attention that reads them itself comes in as they end. In return that kernel
  says it behind its wait, or the one after it, with weights of its own to fetch, would come in as early. Of more rows
  the reader's programs are so many that they gather where there is room, and stay there.
- All kernels divide a multiprocessor's memory alike (`carveout.py`), or programs of the next kernel could not start
  where one of this kernel still runs.
- The launch passes `**overlap(x)`, which holds OVERLAP for the kernel and the option for the driver.

Elsewhere OVERLAP is False and a kernel starts when the one before has finished, as always.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qinfer.env import settings
from qinfer.kernels.carveout import share_alike
from qinfer.kernels.device import arch

FIRST_ARCH = 90  # Hopper
EARLY_ROWS = 4  # measured on an H200 (benchmarks/LOG.md)


@cache
def _options(name: str) -> dict[str, bool]:
    """Return what a launch on an architecture adds to its arguments."""
    if name.startswith("sm_") and int(name[3:]) >= FIRST_ARCH:
        share_alike()
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


def overlap(tensor: Tensor) -> dict[str, bool]:
    """Return the arguments of a launch on this tensor's device that decide whether the kernel overlaps with others."""
    return _options("cpu" if settings().interpret else arch(tensor.device))


def starts_early(num_parts: int, num_rows: int) -> bool:
    """Return whether the kernel that reads a product of so many rows, in so many parts, starts together with it."""
    return num_parts > 1 and num_rows <= EARLY_ROWS


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Wait until everything that earlier kernels wrote can be read, and overwritten."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def offset_of_inputs(i_step, OVERLAP: tl.constexpr):
    """Return 0, as soon as everything that earlier kernels wrote can be read.

    Args:
        i_step: a number that differs from step to step, so that the wait stays in the loop; the second costs nothing.
        OVERLAP: whether there is anything to wait for.
    """
    if OVERLAP:
        # Pure, because Triton's pipeline moves nothing that has side effects; the address is what orders it.
        zero = tl.inline_asm_elementwise(
            "{ griddepcontrol.wait; mov.u32 $0, 0; }", "=r,r", [i_step], dtype=tl.int32, is_pure=True, pack=1
        )
        return tl.multiple_of(zero, 128)
    else:
        return 0


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):
    """Let the next kernel start as soon as every program of this one has come here or ended."""
    if OVERLAP:
        gdc_launch_dependents()
