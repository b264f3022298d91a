"""The only reader of environment variables: typed, read once, a bad value raises."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache


def _flag(name: str) -> bool:
    """Read a boolean variable; unset and empty mean False."""
    text = os.environ.get(name, "").strip().lower()
    if text in ("", "0", "false", "off", "no"):
        return False
    if text in ("1", "true", "on", "yes"):
        return True
    raise ValueError(f"{name} must be 0 or 1, got {text!r}")


@dataclass(frozen=True)
class Settings:
    """Everything that qinfer takes from the environment."""

    # Triton decides when a kernel is decorated whether it is interpreted: for the command line, not for code.
    interpret: bool
    # What the benchmarks record as the code's revision where there is no git checkout to ask.
    revision: str | None


@cache
def settings() -> Settings:
    """Return the settings of this process, read on the first call."""
    return Settings(interpret=_flag("TRITON_INTERPRET"), revision=os.environ.get("QINFER_REVISION") or None)


@dataclass(frozen=True)
class Place:
    """Where torchrun has put this process."""

    master: str  # host of rank 0
    local_rank: int  # among the processes of this machine


def rank_of_torchrun() -> Place:
    """Return what torchrun says, or a place on a machine of one process."""
    return Place(os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("LOCAL_RANK", "0")))
