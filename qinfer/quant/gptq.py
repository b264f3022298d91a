"""GPTQ: integer codes with a scale and a zero point per group, as AutoGPTQ, GPTQModel and transformers store them.

    W[k, n] = (code[k, n] - zero[g, n]) * scales[g, n],   g = g_idx[k], or k // group_size where there is no g_idx

    qweight  int32 [K * bits/32, N]               codes, a little-endian bit stream down each column
    qzeros   int32 [ceil(K/group_size), N*bits/32]  zero points, the same kind of stream along each row
    scales   fp16 or bf16 [ceil(K/group_size), N]
    g_idx    int32 [K]                             optional; one that is all zero beside several groups says nothing
    bias     [N]                                   optional

`checkpoint_format` "gptq" (also when absent) stores zero - 1, "gptq_v2" stores zero. Zero points are decoded one by
one, so a stored 15 of the first kind means 16, as ExLlama reads it, and nothing carries into a neighbour.

Act-order means a g_idx that is not k // group_size. The operand then holds the input features sorted by group, stably,
and its `order` says which feature each one is. Groups of unequal sizes are served as long as the sorted features fall
into whole runs of 32, 64 or a multiple of 128 per group; any other g_idx is refused when it is read.

Sources: the quantize_config.json of AutoGPTQ and GPTQModel; ExLlamaV2's reading of g_idx and of the zero points.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, Self

import torch
from torch import Tensor

from qinfer.errors import UnsupportedError
from qinfer.kernels.operand import TILE_K, PlaneOperand
from qinfer.kernels.packing import pack_planes, pack_stream, unpack_stream
from qinfer.quant.rtn import round_to_nearest
from qinfer.quant.weight import Dim, Source, check_cut, take, take_bias

BITS = (4,)
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format -> what to add to a stored zero point
FEATURES_STEP = 32  # K is a multiple of it in every width, and so are the cuts along K


@dataclass(frozen=True)
class GPTQWeight:
    """A matrix in GPTQ's layout."""

    qweight: Tensor  # [K * bits/32, N] int32
    qzeros: Tensor  # [groups, N * bits/32] int32
    scales: Tensor  # [groups, N] fp16 or bf16
    g_idx: Tensor | None  # [K] int32
    bias: Tensor | None  # [N]
    bits: int
    group_size: int  # -1: one group
    zero_offset: int  # 1: stored zero points are one too small; 0: they are what they are

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        return self.qweight.shape[0] * 32 // self.bits, self.qweight.shape[1]

    @property
    def quant_config(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint that holds this weight."""
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": not self._is_sequential(),
            "sym": bool((self.zeros() == 1 << (self.bits - 1)).all()),
            "checkpoint_format": next(name for name, offset in ZERO_OFFSETS.items() if offset == self.zero_offset),
            "pack_dtype": "int32",
        }

    @classmethod
    def read(cls, source: Source, name: str) -> Self:
        """Take `name.qweight`, `.qzeros`, `.scales` and, if they are there, `.g_idx` and `.bias`.

        Raises:
            CheckpointError: a tensor is missing, has a wrong shape or dtype, or holds impossible values.
            UnsupportedError: bits, group size, checkpoint_format or pack_dtype are not served.
        """
        bits, group_size, zero_offset = _read_options(source, name)
        qweight = take(source, f"{name}.qweight", (None, None), (torch.int32,))
        in_features, out_features = qweight.shape[0] * 32 // bits, qweight.shape[1]
        if in_features % FEATURES_STEP or out_features % _step_of(bits):
            raise UnsupportedError(
                f"{name} maps {in_features} to {out_features} features; {bits}-bit GPTQ works for a multiple of "
                f"{FEATURES_STEP} to a multiple of {_step_of(bits)}"
            )
        num_groups = _num_groups(in_features, group_size)
        qzeros = take(source, f"{name}.qzeros", (num_groups, out_features * bits // 32), (torch.int32,))
        halves = (torch.float16, torch.bfloat16)
        scales = take(source, f"{name}.scales", (num_groups, out_features), halves, finite=True)
        g_idx = None
        if f"{name}.g_idx" in source:
            g_idx = take(source, f"{name}.g_idx", (in_features,), (torch.int32,))
            if in_features and (int(g_idx.min()) < 0 or int(g_idx.max()) >= num_groups):
                bad = int(g_idx.min()) if int(g_idx.min()) < 0 else int(g_idx.max())
                raise source.error(f"{name}.g_idx", f"groups must be 0 to {num_groups - 1}, got {bad}")
        bias = take_bias(source, name, out_features)
        weight = cls(qweight, qzeros, scales, g_idx, bias, bits, group_size, zero_offset)
        if weight._runs() is None:
            sizes = sorted(set(torch.bincount(weight.groups(), minlength=num_groups).tolist()))
            problem = f"the groups of group_size {group_size} have {sizes} features; kernels need whole runs of 32"
            raise source.error(f"{name}.g_idx", problem)
        return weight

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by suffix."""
        stored = {"qweight": self.qweight, "qzeros": self.qzeros, "scales": self.scales}
        optional = {"g_idx": self.g_idx, "bias": self.bias}
        return stored | {suffix: tensor for suffix, tensor in optional.items() if tensor is not None}

    @classmethod
    def quantize(
        cls,
        w: Tensor,
        *,
        bits: int = 4,
        group_size: int = 128,
        symmetric: bool = True,
        act_order: Tensor | None = None,
        zero_format: str = "gptq",
        bias: Tensor | None = None,
    ) -> Self:
        """Round a matrix to nearest, with a small search for the step of each group (rtn.py).

        Args:
            w: [K, N] floating point, K a multiple of 32, N a multiple of 8.
            bits: 4.
            group_size: 32, 64, a multiple of 128, or -1 for one group.
            symmetric: every zero point is the middle code.
            act_order: [K] a permutation of the input features; consecutive runs of it become the groups.
            zero_format: "gptq" or "gptq_v2", see the module; "gptq" avoids the zero point 0, which it cannot store.
            bias: [N], kept as it is.

        Raises:
            ValueError: a shape, an option or a value is out of range.
            TypeError: `w` is not floating point.
        """
        if bits not in BITS:
            raise ValueError(f"bits must be one of {list(BITS)}, got {bits}")
        if zero_format not in ZERO_OFFSETS:
            raise ValueError(f"zero_format must be one of {list(ZERO_OFFSETS)}, got {zero_format!r}")
        if not _is_group_size(group_size):
            raise ValueError(f"group_size must be 32, 64, a multiple of 128 or -1, got {group_size}")
        if w.dim() != 2 or w.shape[0] % FEATURES_STEP or w.shape[1] % _step_of(bits):
            steps = f"multiples of {FEATURES_STEP} and {_step_of(bits)}"
            raise ValueError(f"w must be [K, N] with {steps}, got shape {list(w.shape)}")
        zero_offset, g_idx = ZERO_OFFSETS[zero_format], None
        grouped = w
        if act_order is not None:
            g_idx = _group_of_feature(act_order, w.shape[0], group_size)
            grouped = w[act_order.long()]
        codes, scales, zeros = round_to_nearest(
            grouped, bits=bits, group_size=group_size, symmetric=symmetric, lowest_zero=zero_offset
        )
        if act_order is not None:
            codes = torch.empty_like(codes).index_copy_(0, act_order.long(), codes)
        qweight, qzeros = pack_stream(codes, bits, 0), pack_stream(zeros - zero_offset, bits, 1)
        return cls(qweight, qzeros, scales, g_idx, bias, bits, group_size, zero_offset)

    def codes(self) -> Tensor:
        """Return [K, N] uint8, input features in their original order."""
        return unpack_stream(self.qweight, self.bits, self.shape[0], 0)

    def zeros(self) -> Tensor:
        """Return the zero points [groups, N] int16, 0 to 2^bits."""
        return unpack_stream(self.qzeros, self.bits, self.shape[1], 1).to(torch.int16) + self.zero_offset

    def groups(self) -> Tensor:
        """Return [K] int64, the group of each input feature."""
        in_features = self.shape[0]
        if self.g_idx is not None and (self.scales.shape[0] <= 1 or bool(self.g_idx.any())):
            return self.g_idx.long()
        return torch.arange(in_features, device=self.qweight.device) // self._features_per_group()

    def dequantize(self) -> Tensor:
        """Return W [K, N] in fp32, input features in their original order."""
        groups = self.groups()
        return (self.codes().float() - self.zeros().float()[groups]) * self.scales.float()[groups]

    def cuts(self, dim: Dim) -> Sequence[int]:
        """Return where words end (out) or groups end (in); a matrix in act-order may not be cut along its input."""
        in_features, out_features = self.shape
        if dim == "out":
            return range(0, out_features + 1, _step_of(self.bits))
        if not self._is_sequential():
            return ()
        # A single group may be cut inside, because every part keeps its one scale.
        step = FEATURES_STEP if self.scales.shape[0] <= 1 else self._features_per_group()
        return (*range(0, in_features, step), in_features)

    def slice(self, dim: Dim, start: int, stop: int) -> Self:
        """Return the part between two cuts."""
        check_cut(self.cuts(dim), dim, start, stop)
        words = slice(start * self.bits // 32, stop * self.bits // 32)
        if dim == "out":
            return replace(
                self,
                qweight=self.qweight[:, start:stop].contiguous(),
                qzeros=self.qzeros[:, words].contiguous(),
                scales=self.scales[:, start:stop].contiguous(),
                bias=None if self.bias is None else self.bias[start:stop],
            )
        rows = self._features_per_group()
        first = start // rows
        last = -(-stop // rows) if stop > start else first
        g_idx = None if self.g_idx is None else self.g_idx[start:stop]
        if g_idx is not None and bool(g_idx.any()):
            g_idx = g_idx - first
        return replace(
            self,
            qweight=self.qweight[words],
            qzeros=self.qzeros[first:last],
            scales=self.scales[first:last],
            g_idx=g_idx,
        )

    def operand(self, device: torch.device, dtype: torch.dtype) -> PlaneOperand:
        """Return the codes in planes, sorted by group; scales stay as they are stored, whatever the activations are.

        Raises:
            ValueError: the groups of g_idx have no whole runs of 32 features (`read` refuses such a matrix).
        """
        runs = self._runs()
        if runs is None:
            raise ValueError("groups must be whole runs of 32, 64 or a multiple of 128 features after sorting")
        order, run, groups = runs
        codes = unpack_stream(self.qweight.to(device), self.bits, self.shape[0], 0)
        if order is not None:
            order = order.to(device)
            codes = codes[order]
        offsets = (self.zeros() - (1 << (self.bits - 1))).to(torch.int8)
        return PlaneOperand(
            planes=(pack_planes(codes, bits=self.bits),),
            scales=self.scales[groups].to(device),
            offsets=offsets[groups].to(device) if bool(offsets.any()) else None,
            bits=self.bits,
            group_size=run,
            in_features=self.shape[0],
            order=None if order is None else order.to(torch.int32),
        )

    def _features_per_group(self) -> int:
        return max(self.shape[0], 1) if self.group_size == -1 else self.group_size

    def _is_sequential(self) -> bool:
        """Say whether feature k belongs to group k // group_size."""
        groups = self.groups()
        return torch.equal(groups, torch.arange(self.shape[0], device=groups.device) // self._features_per_group())

    def _runs(self) -> tuple[Tensor | None, int, Tensor] | None:
        """Sort the features by group and cut them into equal runs, each within one group.

        Returns:
            The order [K] int64, None where sorting changes nothing; the length of a run, which is the operand's
            group_size; the group of each run [ceil(K/run)] int64. None where not even runs of 32 do.
        """
        in_features, groups = self.shape[0], self.groups()
        by_group, order = torch.sort(groups, stable=True)
        longest = -(-max(in_features, 1) // TILE_K) * TILE_K if self.group_size == -1 else self.group_size
        for run in (longest, *(size for size in (128, 64, 32) if size < longest)):
            starts = by_group[::run]
            if torch.equal(starts.repeat_interleave(run)[:in_features], by_group):
                is_identity = torch.equal(order, torch.arange(in_features, device=order.device))
                return None if is_identity else order, run, starts
        return None


def _step_of(bits: int) -> int:
    """Return how many codes fill whole words."""
    return 32 // gcd(32, bits)


def _num_groups(in_features: int, group_size: int) -> int:
    return min(in_features, 1) if group_size == -1 else -(-in_features // group_size)


def _is_group_size(group_size: int) -> bool:
    return group_size in (-1, 32, 64) or (group_size > 0 and group_size % TILE_K == 0)


def _group_of_feature(act_order: Tensor, in_features: int, group_size: int) -> Tensor:
    """Return g_idx [K] int32 for features that were grouped in the order act_order."""
    positions = torch.arange(in_features, device=act_order.device)
    if act_order.shape != (in_features,) or not torch.equal(act_order.long().sort().values, positions):
        raise ValueError(f"act_order must hold each of {in_features} features once, got shape {list(act_order.shape)}")
    groups = positions // (max(in_features, 1) if group_size == -1 else group_size)
    return torch.empty_like(groups).index_copy_(0, act_order.long(), groups).to(torch.int32)


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
        try:
            matches = re.match(pattern, name) is not None
        except re.error as error:
            problem = f"quantization_config.dynamic has the invalid pattern {key!r}: {error}"
            raise source.error(None, problem) from error
        if matches and key.startswith("-:"):
            return None
        if matches:
            if not isinstance(overrides, dict):
                raise source.error(None, f"quantization_config.dynamic[{key!r}] must be an object, got {overrides!r}")
            return {**config, **overrides}
    return config


def _read_options(source: Source, name: str) -> tuple[int, int, int]:
    """Return bits, group_size and zero_offset of a module."""
    options = options_of(source, name)
    if options is None:
        raise source.error(f"{name}.qweight", "quantization_config.dynamic says that this module is not quantized")
    values = []
    for key in ("bits", "group_size"):
        value = options.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise source.error(None, f"quantization_config.{key} must be an integer for GPTQ, got {value!r}")
        values.append(value)
    bits, group_size = values
    if bits not in BITS:
        raise UnsupportedError(f"{name} has {bits}-bit GPTQ weights; bits that work: {', '.join(map(str, BITS))}")
    if not _is_group_size(group_size):
        raise UnsupportedError(f"{name} has GPTQ group_size {group_size}; what works: 32, 64, multiples of 128, -1")
    layout = options.get("checkpoint_format") or options.get("format") or "gptq"
    if layout not in ZERO_OFFSETS:
        raise UnsupportedError(f"GPTQ checkpoint_format {layout!r} is unknown; what works: {', '.join(ZERO_OFFSETS)}")
    pack_dtype = options.get("pack_dtype") or "int32"
    if pack_dtype not in ("int32", "torch.int32"):
        raise UnsupportedError(f"GPTQ pack_dtype {pack_dtype!r} is unknown; what works: int32")
    return bits, group_size, ZERO_OFFSETS[layout]
