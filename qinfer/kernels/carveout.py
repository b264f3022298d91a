"""One division of a multiprocessor's memory for all kernels that overlap (NVIDIA, from sm_90 on).

L1 cache and shared memory are cut from one memory, and a multiprocessor cuts it anew only when it is empty. Left alone,
the driver gives a kernel that needs no shared memory, a norm or an activation, nearly all of it as cache. Programs of
the product behind it, which may start while it still runs, then stay off its multiprocessors and double up on others,
and the product takes as long as the fullest one (benchmarks/LOG.md). So all kernels of this package ask for as much
shared memory as there is. It is a preference, and changes nothing else about them; kernels of others keep theirs.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from functools import cache

from triton import knobs
from triton.runtime.jit import JITFunction

PREFERRED_CARVEOUT, ALL_SHARED = 9, 100  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, and percent
_names: set[str] = set()


@cache
def share_alike() -> None:
    """From now on, let every kernel of this package that Triton loads prefer shared memory to cache."""
    knobs.runtime.kernel_load_end_hook.add(_prefer_shared)


@cache
def driver() -> ctypes.CDLL:
    """Return the CUDA driver's library, which torch has loaded."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def is_ours(name: str) -> bool:
    """Say whether a kernel of that name is in this package."""
    if name not in _names:  # modules may have come since the last time
        modules = [module for title, module in list(sys.modules.items()) if title.startswith("qinfer.")]
        found = (value for module in modules for value in vars(module).values() if isinstance(value, JITFunction))
        _names.update(value.__name__ for value in found)
    return name in _names


def _prefer_shared(module: int, function: int, name: str, metadata_group: dict[str, str], key: str) -> None:
    """Set the preference of a kernel that was just loaded; the arguments are those of Triton's hook."""
    if is_ours(name):
        status = driver().cuFuncSetAttribute(ctypes.c_void_p(function), PREFERRED_CARVEOUT, ALL_SHARED)
        if status:
            warnings.warn(f"the driver refuses {name} a preference for shared memory: CUresult {status}", stacklevel=2)
