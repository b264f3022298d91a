"""What a launch is told, without the launch."""

from __future__ import annotations

from typing import Any

import pytest


def record_constants(monkeypatch: pytest.MonkeyPatch, module: Any, kernel: str, launched: dict[str, Any]) -> None:
    """Put something in the place of a kernel that keeps the keywords of its launches in `launched`."""

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **constants: launched.update(constants)

    monkeypatch.setattr(module, kernel, Kernel())
