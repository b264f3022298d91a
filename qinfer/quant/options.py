"""What `quantization_config` says about one module of a GPTQ or AWQ checkpoint."""

from __future__ import annotations

import re
from typing import Any

from qinfer.errors import UnsupportedError
from qinfer.quant.grouped import GROUP_SIZES, is_group_size
from qinfer.quant.weight import Source


def options_of(source: Source, name: str) -> dict[str, Any] | None:
    """Return the options that hold for one module, its `dynamic` overrides applied; None: it is not quantized.

    `dynamic` maps patterns to overrides. The first pattern that matches from the start of the name counts; "-:" before
    a pattern excludes the modules that match, "+:" or nothing changes their options.

    Raises:
        CheckpointError: `dynamic` is malformed.
    """
    config = source.quant_config or {}
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise source.error(None, f"quantization_config.dynamic must be an object, got {dynamic!r}")
    for key, overrides in dynamic.items():
        pattern = key[2:] if key[:2] in ("-:", "+:") else key
        if not matches(source, "dynamic", pattern, name):
            continue
        if key.startswith("-:"):
            return None
        if not isinstance(overrides, dict):
            raise source.error(None, f"quantization_config.dynamic[{key!r}] must be an object, got {overrides!r}")
        return {**config, **overrides}
    return config


def matches(source: Source, where: str, pattern: str, name: str) -> bool:
    """Say whether a regular expression of `quantization_config` matches a name from its start.

    Raises:
        CheckpointError: it is no regular expression.
    """
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        problem = f"quantization_config.{where} has the invalid pattern {pattern!r}: {error}"
        raise source.error(None, problem) from error


def read_integer(source: Source, options: dict[str, Any], key: str) -> int:
    """Return an option that must be an integer.

    Raises:
        CheckpointError: it is missing or something else.
    """
    value = options.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise source.error(None, f"quantization_config.{key} must be an integer, got {value!r}")
    return value


def read_bits(source: Source, name: str, options: dict[str, Any], method: str, served: tuple[int, ...]) -> int:
    """Return the option `bits`.

    Raises:
        CheckpointError: it is no integer.
        UnsupportedError: the width is not served.
    """
    bits = read_integer(source, options, "bits")
    if bits not in served:
        raise UnsupportedError(f"{name} has {bits}-bit {method} weights; bits that work: {', '.join(map(str, served))}")
    return bits


def read_group_size(source: Source, name: str, options: dict[str, Any], method: str) -> int:
    """Return the option `group_size`.

    Raises:
        CheckpointError: it is no integer.
        UnsupportedError: the size is not served.
    """
    group_size = read_integer(source, options, "group_size")
    if not is_group_size(group_size):
        raise UnsupportedError(f"{name} has {method} group_size {group_size}; what works: {GROUP_SIZES}")
    return group_size
