"""Builds the wheel and looks at what is in it: `python -m tests.package`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def problems(names: set[str], metadata: str) -> list[str]:
    """Say what a wheel with these files and this metadata lacks or has too much of."""
    tracked = {str(path.relative_to(ROOT)) for path in (ROOT / "qinfer").rglob("*") if path.is_file()}
    wanted = {name for name in tracked if "__pycache__" not in name}
    foreign = {name for name in names if not name.startswith("qinfer/") and ".dist-info/" not in name}
    requirements = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    capped = [
        line for line in requirements if "extra ==" not in line and any(sign in line for sign in ("<", "==", "~="))
    ]
    found = [f"{name} is missing" for name in sorted(wanted - names)]
    found += [f"{name} does not belong there" for name in sorted(foreign)]
    found += [f"{line} is not a lower bound" for line in capped if "platform_system" not in line]
    return found


def main() -> int:
    """Build, list, report."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, str(ROOT)]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
            (path,) = (name for name in names if name.endswith(".dist-info/METADATA"))
            found = problems(names, archive.read(path).decode())
            size = wheel.stat().st_size
    if not wheel.name.endswith("-py3-none-any.whl"):
        found.append(f"{wheel.name} is not pure Python")
    verdict = "\n".join(found) or f"{wheel.name}: {len(names)} files, {size / 1e6:.1f} MB"
    sys.stdout.write(verdict + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
