"""Results on the screen and in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def emit(result: dict[str, Any], path: str | None) -> None:
    """Print a result, one field per line, and append it to a file as a line of JSON if one is named."""
    width = max(len(name) for name in result)
    for name, value in result.items():
        if isinstance(value, dict):
            value = "  ".join(f"{key} {number:.4g}" for key, number in value.items())
        elif isinstance(value, float):
            value = f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
        print(f"{name:<{width}}  {value}")
    append(result, path)


def append(result: dict[str, Any], path: str | None) -> None:
    """Append a result to a file as a line of JSON, if a file is named."""
    if path is not None:
        with Path(path).open("a") as file:
            file.write(json.dumps(result) + "\n")
