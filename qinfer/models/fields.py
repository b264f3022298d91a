"""Typed access to the fields of a config.json: what is absent or of the wrong type is named, never guessed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qinfer.errors import CheckpointError

# Bounds that no real model reaches: a hostile number must not make us build a tuple of a billion windows.
MAX_LAYERS = 10_000
MAX_INTEGER = 2**31 - 1


@dataclass(frozen=True)
class Fields:
    """Typed access to one JSON object; whatever is absent or of the wrong type raises and names the field."""

    values: Mapping[str, Any]
    file: Path
    within: str = ""

    def error(self, name: str, problem: str) -> CheckpointError:
        """Make the error that says what is wrong with a field."""
        return CheckpointError(self.file, None, f"{self.within}{name} {problem}")

    def has(self, name: str) -> bool:
        """Tell whether the field is there and not null."""
        return self.values.get(name) is not None

    def integer(self, name: str, *, maximum: int = MAX_INTEGER) -> int:
        """Return an integer from 1 to `maximum`."""
        value = self._required(name)
        # JSON's true is an int for Python.
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, f"must be an integer, got {value!r}")
        if not 1 <= value <= maximum:
            raise self.error(name, f"must be from 1 to {maximum}, got {short(value)}")
        return value

    def number(self, name: str, *, absent: float | None = None) -> float:
        """Return a finite number; `absent` is what null or absence stands for, None: they are an error."""
        if absent is not None and not self.has(name):
            return absent
        value = self._required(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, f"must be a number, got {value!r}")
        if not abs(value) < math.inf or abs(value) > 1e300:
            raise self.error(name, f"must be a finite number, got {short(value)}")
        return float(value)

    def flag(self, name: str, *, absent: bool | None) -> bool:
        """Return true or false; `absent` is what absence stands for, None: it is an error."""
        value = self._required(name) if absent is None else self.values.get(name, absent)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, got {value!r}")
        return value

    def text(self, name: str) -> str:
        """Return a string."""
        value = self._required(name)
        if not isinstance(value, str):
            raise self.error(name, f"must be a string, got {value!r}")
        return value

    def table(self, name: str) -> dict[str, Any]:
        """Return a nested object; absent and null are both an empty one."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, f"must be an object, got {value!r}")
        return value or {}

    def tokens(self, name: str) -> frozenset[int]:
        """Return the token ids of a field that is an id, a list of ids, null or absent."""
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= MAX_INTEGER:
                raise self.error(name, f"must be a token id or a list of them, got {short(value)}")
        return frozenset(ids)

    def indices(self, name: str, stop: int) -> frozenset[int]:
        """Return a list of integers in [0, stop), of layers for instance; null is an empty one."""
        if name not in self.values:
            raise self.error(name, "is missing; [] means none")
        values = [] if self.values[name] is None else self.values[name]
        is_list = isinstance(values, list) and all(type(value) is int and 0 <= value < stop for value in values)
        if not is_list:
            raise self.error(name, f"must be a list of numbers from 0 to {stop - 1}, got {short(values)}")
        return frozenset(values)

    def _required(self, name: str) -> Any:  # noqa: ANN401  the callers narrow it
        if name not in self.values:
            raise self.error(name, "is missing")
        if self.values[name] is None:
            raise self.error(name, "must not be null")
        return self.values[name]


def short(value: object) -> str:
    """Render a value of a file for a message, cut to a readable length."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number with more than 30 digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
