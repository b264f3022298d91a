"""What kernels take of a target: `python -m tests.compile.report sm_90 [--op matmul] [--all] [--json FILE]`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.compile.targets import TARGETS, Target

ROOT = Path(__file__).parents[2]
MIN_REGISTERS = 6
ASYNCHRONOUS = ("_wgmma_kernel",)  # kernels that are there so as not to wait for every product


@dataclass(frozen=True)
class Report:
    """What one worker found."""

    # op, case, kernel, target, registers, spills [bytes; AMD: registers], shared [bytes], warps; NVIDIA: unwritten,
    # disturbed and serialized
    kernels: list[dict[str, Any]]
    launches: dict[str, int]  # op -> kernel launches over all of its cases
    errors: list[str]

    def offenders(self) -> list[str]:
        """Name every kernel that does not compile, takes more shared memory than there is, or spills on NVIDIA.

        And one that reads registers that nothing wrote, disturbs a product or waits for each where it should not
        (`sass.py`), and one of fewer registers than addresses take on NVIDIA: Triton makes such a kernel, which only
        traps, of what it cannot compile. (On AMD scalar registers, which do not count here, hold the addresses.)
        """
        found = list(self.errors)
        for row in self.kernels:
            where = f"{row['kernel']} on {row['target']} ({row['op']} {row['case']})"
            target = TARGETS[row["target"]]
            if row["shared"] > target.shared_limit:
                found.append(f"{where}: {row['shared']} bytes of shared memory, {target.shared_limit} allowed")
            if row["spills"] and target.backend == "cuda":
                found.append(f"{where}: {row['spills']} bytes spilled, {row['registers']} registers")
            found += [f"{where}: reads a register that nothing wrote: {line}" for line in row.get("unwritten", ())]
            found += [
                f"{where}: disturbs a product that may not have ended: {line}" for line in row.get("disturbed", ())
            ]
            if row.get("serialized") and row["kernel"] in ASYNCHRONOUS:
                found.append(f"{where}: waits for every product by itself")
            if row["registers"] < MIN_REGISTERS and target.backend == "cuda":
                found.append(f"{where}: {row['registers']} registers, so it does nothing")
        return found

    def table(self, op: str | None = None) -> str:
        """Return the kernels as lines of text."""
        lines = [f"{'kernel':28}{'target':>8}{'registers':>10}{'spills':>8}{'shared':>8}{'warps':>7}  case"]
        for row in self.kernels:
            if op in (None, row["op"]):
                numbers = f"{row['registers']:10}{row['spills']:8}{row['shared']:8}{row['warps']:7}"
                lines.append(f"{row['kernel']:28}{row['target']:>8}{numbers}  {row['op']} {row['case']}")
        return "\n".join(lines)


def compile_for(target: Target, *, everything: bool = False) -> Report:
    """Compile in a process of its own, with an empty Triton cache, so that nothing stale passes.

    Without the numbers of lines, which are for debuggers and take time.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rows.jsonl")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        environment |= {"TRITON_CACHE_DIR": f"{folder}/cache", "OMP_NUM_THREADS": "1", "TRITON_DISABLE_LINE_INFO": "1"}
        command = [
            sys.executable,
            "-m",
            "tests.compile.worker",
            target.name,
            str(out),
            *(["--all"] if everything else []),
        ]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    errors = [f"{row['op']} {row['case']} on {target.name}: {row['error']}" for row in rows if "error" in row]
    if done.returncode != 0:
        last = next((row["begin"] for row in reversed(rows) if "begin" in row), "the start")
        errors.append(f"the process ended with {done.returncode} in {last}: {done.stderr[-2000:]}")
    launches: dict[str, int] = {}
    for row in rows:
        if "launches" in row:
            launches[row["op"]] = launches.get(row["op"], 0) + row["launches"]
    return Report([row for row in rows if "kernel" in row], launches, errors)


def main() -> int:
    """Print the table of one target and what is wrong with it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--op", help="show the cases of one op only")
    parser.add_argument("--all", action="store_true", help="also compile the cases that CI leaves out")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    options = parser.parse_args()
    report = compile_for(TARGETS[options.target], everything=options.all)
    verdict = "\n".join(report.offenders()) or "no kernel spills or takes too much shared memory"
    sys.stdout.write(f"{report.table(options.op)}\n{verdict}\n")
    if options.json:
        options.json.write_text(json.dumps(report.kernels, indent=1) + "\n")
    return 1 if report.offenders() else 0


if __name__ == "__main__":
    raise SystemExit(main())
