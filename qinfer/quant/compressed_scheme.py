"""Which scheme of a compressed-tensors config holds for a module, and whether it is one that is served.

`config_groups` maps names of groups to schemes with `targets`; `targets` and `ignore` are lists of names of modules, of
"re:" and a regular expression that matches from the start of a name, and of names of classes. Of several groups that
match, a name counts before an expression and an expression before a class. Every module that is asked about here is a
Linear.

Source: compressed-tensors 0.20 (match.py, quant_config.py, quant_args.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qinfer.errors import UnsupportedError
from qinfer.kernels.operand import FIELDS
from qinfer.quant.grouped import GROUP_SIZES, is_group_size
from qinfer.quant.options import matches
from qinfer.quant.weight import Source

CLASSES = ("Linear", "Module")  # the classes that a projection is an instance of
SERVED = f"what works: pack-quantized weights of {', '.join(map(str, FIELDS))} bits (W4A16, W8A16, ...)"
CONFIG = "quantization_config"


@dataclass(frozen=True)
class Scheme:
    """How the weight of a module is quantized."""

    bits: int
    symmetric: bool
    group_size: int  # -1: strategy "channel"
    needs_g_idx: bool  # actorder "group"


def group_of(source: Source, name: str) -> tuple[str, dict[str, Any]] | None:
    """Return the group of `config_groups` that holds for a module, with its name; None: the module is not quantized.

    Raises:
        CheckpointError: the config is malformed.
        UnsupportedError: the config asks for something that concerns the whole model and is not served.
    """
    config = source.quant_config or {}
    _check_model(config)
    if any(_rank(source, "ignore", pattern, name) for pattern in _strings(source, "ignore", config.get("ignore"))):
        return None
    groups = config.get("config_groups")
    if not isinstance(groups, dict):
        raise source.error(None, f"{CONFIG}.config_groups must be an object, got {groups!r}")
    best_rank, best = 0, None
    for key, group in groups.items():
        where = f"config_groups.{key}"
        if not isinstance(group, dict):
            raise source.error(None, f"{CONFIG}.{where} must be an object, got {group!r}")
        targets = _strings(source, f"{where}.targets", group.get("targets"))
        rank = max((_rank(source, f"{where}.targets", target, name) for target in targets), default=0)
        if rank > best_rank:
            best_rank, best = rank, (key, group)
    return best


def scheme_of(source: Source, name: str) -> Scheme | None:
    """Return the scheme of a module; None: it is not quantized.

    Raises:
        CheckpointError: the config is malformed.
        UnsupportedError: the scheme is not served.
    """
    found = group_of(source, name)
    if found is None:
        return None
    key, group = found
    where = f"{CONFIG}.config_groups.{key}"
    layout = group.get("format") or (source.quant_config or {}).get("format")
    if layout != "pack-quantized":
        raise UnsupportedError(f"{name} has the compressed-tensors format {layout!r}, which cannot be read; {SERVED}")
    for activations in ("input_activations", "output_activations"):
        if group.get(activations) is not None:
            raise UnsupportedError(f"{where}.{activations} asks for quantized activations; {SERVED} without them")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise source.error(None, f"{where}.weights must be an object, got {weights!r}")
    bits, kind, symmetric = weights.get("num_bits"), weights.get("type", "int"), weights.get("symmetric", True)
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise source.error(None, f"{where}.weights.num_bits must be an integer, got {bits!r}")
    if not isinstance(symmetric, bool):
        raise source.error(None, f"{where}.weights.symmetric must be true or false, got {symmetric!r}")
    if kind != "int" or bits not in FIELDS or weights.get("dynamic"):
        raise UnsupportedError(f"{name} has weights of type {kind!r} with {bits} bits; {SERVED}")
    actorder = weights.get("actorder")
    if actorder not in (None, False, "group", "dynamic", "weight", "static"):
        raise UnsupportedError(f"{where}.weights.actorder is {actorder!r}; what works: group, weight, null")
    return Scheme(bits, symmetric, _group_size(source, where, weights), actorder in ("group", "dynamic"))


def _group_size(source: Source, where: str, weights: dict[str, Any]) -> int:
    """Return the features per group, -1 for the strategy "channel"."""
    group_size = weights.get("group_size")
    strategy = weights.get("strategy") or ("channel" if group_size in (None, -1) else "group")
    if strategy == "channel":
        return -1
    if strategy != "group":
        raise UnsupportedError(f"{where}.weights.strategy is {strategy!r}; what works: group, channel")
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise source.error(None, f"{where}.weights.group_size must be an integer, got {group_size!r}")
    if not is_group_size(group_size):
        raise UnsupportedError(f"{where}.weights.group_size is {group_size}; what works: {GROUP_SIZES}")
    return group_size


def _check_model(config: dict[str, Any]) -> None:
    """Raise where the config asks for what no matrix on its own can tell."""
    if config.get("transform_config"):
        raise UnsupportedError(
            f"{CONFIG}.transform_config asks for rotations of activations (QuIP, SpinQuant), which are not applied; "
            "what works: checkpoints without transforms"
        )
    if config.get("kv_cache_scheme"):
        raise UnsupportedError(
            f"{CONFIG}.kv_cache_scheme asks for a quantized KV cache with stored scales; what works: null"
        )
    sparsity = config.get("sparsity_config") or {}
    layout = sparsity.get("format") if isinstance(sparsity, dict) else sparsity
    if layout not in (None, "dense"):
        raise UnsupportedError(f"{CONFIG}.sparsity_config has the format {layout!r}; what works: dense, or none")


def _strings(source: Source, where: str, values: object) -> list[str]:
    """Return a list of strings, empty where there is none."""
    if values is None:
        return []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise source.error(None, f"{CONFIG}.{where} must be a list of strings, got {values!r}")
    return values


def _rank(source: Source, where: str, target: str, name: str) -> int:
    """Say how closely a target means a module: 3 by name, 2 by expression, 1 by class, 0 not at all."""
    if target == name:
        return 3
    if target.startswith("re:"):
        return 2 if matches(source, where, target.removeprefix("re:"), name) else 0
    return 1 if target in CLASSES else 0
