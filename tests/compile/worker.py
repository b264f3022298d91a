"""Compiles every kernel that the cases launch, for one target: `python -m tests.compile.worker sm_90 OUT.jsonl`.

The launchers run for real on CPU tensors that no one ever reads: Triton's driver is a stub, so a launch ends where the
binary is ready, specialized on the real arguments. One process serves one target, because Triton 3.6 keeps static
state between targets and because LLVM aborts the process on some invalid kernels.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler.compiler import make_backend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import qinfer.kernels
from qinfer.bench.case import Case
from qinfer.bench.cases import CASES
from qinfer.kernels import device
from tests.compile.sass import disturbed, is_serialized, unwritten
from tests.compile.targets import TARGETS, Target, followers
from tests.compile.tiles import gated_cases, odd_cases, prompt_cases, tile_cases

aten = torch.ops.aten
ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.zeros}
NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class StubDriver(DriverBase):
    """Answers the compiler's questions for a target that is not there."""

    def __init__(self, target: Target) -> None:
        self.target = GPUTarget(target.backend, target.arch, target.warp_size)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("kernels are compiled here, not timed")


class NoArithmetic(TorchDispatchMode):
    """Run what allocates or views, and give everything else an uninitialized result of the right shape.

    Launchers leave dense products to cuBLAS and copy slices; here the operands hold nothing and may have gigabytes.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view or func.overloadpacket in ALLOCATIONS:
            return func(*args, **kwargs)
        if func._schema.is_mutable:  # the result is the argument written to
            return kwargs.get("out", args[0] if args else None)
        args, kwargs = tree_map_only(torch.Tensor, on_meta, (args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        return tree_map_only(torch.Tensor, lambda meta: torch.empty_like(meta, device="cpu"), func(*args, **kwargs))


def on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without memory that has the same shape, strides and dtype."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def pretend(target: Target) -> None:
    """Make qinfer and Triton answer as on the target; modules hold these functions by name, so rebind all of them."""
    driver.set_active(StubDriver(target))
    torch.version.hip = "7.0" if target.backend == "hip" else None
    answers = {device.arch: lambda _: target.name, device.num_sms: lambda _: target.num_sms}
    for name, module in list(sys.modules.items()):
        if name.startswith("qinfer"):
            for attribute, value in list(vars(module).items()):
                if any(value is function for function in answers):
                    setattr(module, attribute, answers[value])


@contextmanager
def launches_only_compile(made: list[Any]) -> Iterator[None]:
    """Make every kernel launch stop after compilation and append the compiled kernel to `made`."""
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        made.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return made[-1]

    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run


def nvidia_resources(binary: bytes, ptx: str) -> dict[str, Any]:
    """Read registers and spilled bytes from a cubin, and instructions that `sass.py` finds wrong.

    Spills live in the stack frame. So do local arrays that the compiler cannot index at compile time; they cost as much
    and count as spills. A frame that no instruction touches counts as none: ptxas of Triton 3.9 leaves such behind.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary)
        text = _output(NVIDIA_BIN / "cuobjdump", "-res-usage", cubin)
        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
        if usage is None:
            raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
        registers, stack, local = (int(value) for value in usage.groups())
        spills = stack + local
        is_described = "wgmma." in ptx  # the products that find an operand by uniform registers
        listing = _output(NVIDIA_BIN / "cuobjdump", "-sass", cubin) if spills or is_described else ""
        if spills and re.search(r"\b(STL|LDL)\b", listing) is None:
            spills = 0
    return {
        "registers": registers,
        "spills": spills,
        "unwritten": unwritten(listing) if is_described else [],
        "disturbed": disturbed(listing) if is_described else [],
        "serialized": is_serialized(listing),
    }


def amd_resources(kernel: Any) -> dict[str, int]:
    """Read vector registers and spilled vector registers from the metadata in the assembly."""
    text = kernel.asm["amdgcn"]
    found = {key: re.search(rf"\.{key}:\s+(\d+)", text) for key in ("vgpr_count", "vgpr_spill_count")}
    values = {key: int(match.group(1)) for key, match in found.items() if match is not None}
    return {"registers": values["vgpr_count"], "spills": values["vgpr_spill_count"]}


def assembled(kernel: Any, target: Target) -> bytes:
    """Let Triton assemble the PTX of a compiled kernel for another target; return the cubin."""
    backend = make_backend(GPUTarget(target.backend, target.arch, target.warp_size))
    return backend.make_cubin(kernel.asm["ptx"], {}, kernel.metadata, target.arch)


def _output(program: Path, *arguments: str | Path) -> str:
    """Run a program and return what it prints; raise with that text when it fails."""
    done = subprocess.run([program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{program.name} failed: {done.stdout}")
    return done.stdout


def compile_case(case: Case, target: Target, seen: set[str]) -> Iterator[dict[str, Any]]:
    """Launch one case; for each kernel that no earlier case made, yield a row of every target that its PTX is for."""
    made: list[Any] = []
    launched = device.OPS[case.op]
    row: dict[str, Any] = {"op": case.op, "case": case.name, "target": target.name}
    args, kwargs = case.make(torch.device("cpu"), "empty")
    try:
        with launches_only_compile(made), device.implementation("launch"), NoArithmetic():
            launched.launch(*args, **kwargs)
    except Exception as error:  # a kernel that does not compile is a row of the report, not the end of it
        yield {**row, "error": f"{type(error).__name__}: {error}"}
    yield {**row, "launches": len(made)}
    for kernel in made:
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            is_hip = target.backend == "hip"
            row |= {"kernel": kernel.name, "shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
            if is_hip:
                yield row | amd_resources(kernel)
                continue
            ptx = kernel.asm["ptx"]
            yield row | nvidia_resources(kernel.asm["cubin"], ptx)
            for other in followers(target.name):
                yield row | {"target": other.name} | nvidia_resources(assembled(kernel, other), ptx)


def main(target: Target, cases: Iterable[Case], out: TextIO) -> None:
    """Write one JSON line per case begun and per kernel made, flushed, so that an abort names its case."""
    for module in pkgutil.iter_modules(qinfer.kernels.__path__, "qinfer.kernels."):
        importlib.import_module(module.name)
    pretend(target)
    seen: set[str] = set()
    for case in cases:
        for row in ({"begin": f"{case.op} {case.name}"}, *compile_case(case, target, seen)):
            out.write(json.dumps(row) + "\n")
            out.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("out")
    parser.add_argument("--all", action="store_true", help="also compile the cases that CI leaves out")
    options = parser.parse_args()
    with open(options.out, "w") as stream:
        target = TARGETS[options.target]
        shared = (case for case in CASES if case.compiled or options.all)
        own = (*tile_cases(target), *odd_cases(target), *gated_cases(target), *prompt_cases(target))
        main(target, [*shared, *own], stream)
