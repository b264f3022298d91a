"""compressed-tensors in the format "pack-quantized": weights of 2, 3, 4, 5, 6 or 8 bits as llm-compressor writes them.

    W[k, n] = (code[k, n] - zero[g, n]) * weight_scale[n, g],   g = weight_g_idx[k], or k // group_size without it

    weight_packed      int32 [N, ceil(K*bits/32)]  codes, a little-endian bit stream along each row
    weight_scale       fp16 or bf16 [N, G]         G = ceil(K/group_size); strategy "channel": one
    weight_shape       int64 or int32 [2]          N, K
    weight_zero_point  int32 [ceil(N*bits/32), G]  asymmetric only: the same kind of stream down each column
    weight_g_idx       int32 [K]                   actorder "group" only; -1 everywhere says nothing
    bias               [N]                         optional

Codes and zero points are stored plus 2^(bits-1); without zero points that is the zero point. Where `bits` does not
divide 32, old releases left the rest of each word empty. For multiples of 32 such a file has more words per row, by
which it is known and refused; any other K is refused for these widths.

Sources: compressed-tensors 0.20 (pack_quantized, match.py); the g_idx rules of earlier releases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Any, Self

import torch
from torch import Tensor

from qinfer.errors import UnsupportedError
from qinfer.kernels.operand import FIELDS, PlaneOperand
from qinfer.kernels.packing import pack_stream, unpack_stream
from qinfer.quant.compressed_scheme import Scheme, scheme_of
from qinfer.quant.grouped import (
    GROUP_SIZES,
    HALVES,
    Runs,
    features_per_group,
    find_runs,
    group_of_feature,
    is_group_size,
    matrix,
    num_groups,
    plane_operand,
    sequential_groups,
)
from qinfer.quant.rtn import round_to_nearest
from qinfer.quant.weight import Dim, Source, check_cut, take, take_bias

INDICES = (torch.int32, torch.int64)
SINGLE_GROUP_STEP = 32  # features between the cuts inside a single group


@dataclass(frozen=True)
class CompressedWeight:
    """A matrix in the pack-quantized format."""

    weight_packed: Tensor  # [N, ceil(K * bits/32)] int32
    weight_scale: Tensor  # [N, groups] fp16 or bf16
    weight_shape: Tensor  # [2] N, K
    weight_zero_point: Tensor | None  # [ceil(N * bits/32), groups] int32
    weight_g_idx: Tensor | None  # [K] int32
    bias: Tensor | None  # [N]
    bits: int
    group_size: int  # -1: one group, strategy "channel"

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        out_features, in_features = self.weight_shape.tolist()
        return in_features, out_features

    @property
    def quant_config(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint that holds this weight."""
        is_channel = self.group_size == -1
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.weight_zero_point is None,
            "strategy": "channel" if is_channel else "group",
            "group_size": None if is_channel else self.group_size,
            "actorder": None if self.weight_g_idx is None else "group",
            "dynamic": False,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": [],
        }

    @classmethod
    def read(cls, source: Source, name: str) -> Self:
        """Take `name.weight_packed`, `.weight_scale`, `.weight_shape` and what else there is of the module's tensors.

        Raises:
            CheckpointError: a tensor is missing, has a wrong shape or dtype, or holds impossible values.
            UnsupportedError: the scheme of the module is not served.
        """
        scheme = scheme_of(source, name)
        if scheme is None:
            problem = "no target of quantization_config.config_groups matches this module, or `ignore` does"
            raise source.error(f"{name}.weight_packed", problem)
        bits = scheme.bits
        weight_shape = take(source, f"{name}.weight_shape", (2,), INDICES)
        out_features, in_features = weight_shape.tolist()
        packed = _take_packed(source, name, bits, out_features, in_features)
        groups = num_groups(in_features, scheme.group_size)
        scale = take(source, f"{name}.weight_scale", (out_features, groups), HALVES, finite=True)
        zero_point = None
        if not scheme.symmetric or f"{name}.weight_zero_point" in source:
            words = -(-out_features * bits // 32)
            zero_point = take(source, f"{name}.weight_zero_point", (words, groups), (torch.int32,))
        g_idx = _take_g_idx(source, name, scheme, in_features, groups)
        bias = take_bias(source, name, out_features)
        weight = cls(packed, scale, weight_shape, zero_point, g_idx, bias, bits, scheme.group_size)
        if weight._runs() is None:
            sizes = sorted(set(torch.bincount(weight.groups(), minlength=groups).tolist()))
            problem = f"the groups of group_size {weight.group_size} have {sizes} features; kernels need runs of 16"
            raise source.error(f"{name}.weight_g_idx", problem)
        return weight

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by suffix."""
        optional = {
            "weight_zero_point": self.weight_zero_point,
            "weight_g_idx": self.weight_g_idx,
            "bias": self.bias,
        }
        return {
            "weight_packed": self.weight_packed,
            "weight_scale": self.weight_scale,
            "weight_shape": self.weight_shape,
        } | {suffix: tensor for suffix, tensor in optional.items() if tensor is not None}

    @classmethod
    def quantize(
        cls,
        w: Tensor,
        *,
        bits: int = 4,
        group_size: int = 128,
        symmetric: bool = True,
        act_order: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Self:
        """Round a matrix to nearest, with a small search for the step of each group (rtn.py).

        Args:
            w: [K, N] floating point, K a multiple of 32 if bits is 3, 5 or 6.
            bits: 2, 3, 4, 5, 6 or 8.
            group_size: 16, a multiple of 32, or -1 for one group, the strategy "channel".
            symmetric: no zero points are stored.
            act_order: [K] a permutation of the input features; consecutive runs of it become the groups.
            bias: [N], kept as it is.

        Raises:
            ValueError: a shape, an option or a value is out of range.
            TypeError: `w` is not floating point.
        """
        if bits not in FIELDS:
            raise ValueError(f"bits must be one of {list(FIELDS)}, got {bits}")
        if not is_group_size(group_size):
            raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {group_size}")
        step = _step_of(bits) if 32 % bits else 1
        if w.dim() != 2 or w.shape[0] % step:
            raise ValueError(f"w must be [K, N] with K a multiple of {step}, got shape {list(w.shape)}")
        g_idx, grouped = None, w
        if act_order is not None:
            g_idx = group_of_feature(act_order, w.shape[0], group_size)
            grouped = w[act_order.long()]
        codes, scales, zeros = round_to_nearest(grouped, bits=bits, group_size=group_size, symmetric=symmetric)
        if act_order is not None:
            codes = torch.empty_like(codes).index_copy_(0, act_order.long(), codes)
        return cls(
            weight_packed=pack_stream(codes.t(), bits, 1),
            weight_scale=scales.t().contiguous(),
            weight_shape=torch.tensor([w.shape[1], w.shape[0]]),
            weight_zero_point=None if symmetric else pack_stream(zeros.t(), bits, 0),
            weight_g_idx=g_idx,
            bias=bias,
            bits=bits,
            group_size=group_size,
        )

    def codes(self) -> Tensor:
        """Return [K, N] uint8, input features in their original order."""
        return unpack_stream(self.weight_packed, self.bits, self.shape[0], 1).t()

    def zeros(self) -> Tensor | None:
        """Return the zero points [groups, N] uint8; None where all are 2^(bits-1)."""
        if self.weight_zero_point is None:
            return None
        return unpack_stream(self.weight_zero_point, self.bits, self.shape[1], 0).t()

    def groups(self) -> Tensor:
        """Return [K] int64, the group of each input feature."""
        if self.weight_g_idx is not None and not bool((self.weight_g_idx < 0).any()):
            return self.weight_g_idx.long()
        return sequential_groups(self.shape[0], self.group_size)

    def dequantize(self) -> Tensor:
        """Return W [K, N] in fp32, input features in their original order."""
        return matrix(self.codes(), self.zeros(), self.weight_scale.t(), bits=self.bits, groups=self.groups())

    def cuts(self, dim: Dim) -> Sequence[int]:
        """Return where words of codes and groups end (in) or words of zero points (out); none along K in act-order."""
        in_features, out_features = self.shape
        if dim == "out":
            step = 1 if self.weight_zero_point is None else _step_of(self.bits)
            return (*range(0, out_features, step), out_features)
        if not torch.equal(self.groups().cpu(), sequential_groups(in_features, self.group_size)):
            return ()
        # A single group may be cut inside, because every part keeps its one scale.
        rows = SINGLE_GROUP_STEP if self.weight_scale.shape[1] <= 1 else self.group_size
        return (*range(0, in_features, lcm(rows, _step_of(self.bits))), in_features)

    def slice(self, dim: Dim, start: int, stop: int) -> Self:
        """Return the part between two cuts."""
        check_cut(self.cuts(dim), dim, start, stop)
        in_features, out_features = self.shape
        words = slice(start * self.bits // 32, -(-stop * self.bits // 32) if stop > start else start * self.bits // 32)
        zero_point, g_idx = self.weight_zero_point, self.weight_g_idx
        if dim == "out":
            return replace(
                self,
                weight_packed=self.weight_packed[start:stop],
                weight_scale=self.weight_scale[start:stop],
                weight_shape=torch.tensor([stop - start, in_features]),
                weight_zero_point=None if zero_point is None else zero_point[words],
                bias=None if self.bias is None else self.bias[start:stop],
            )
        rows = features_per_group(in_features, self.group_size)
        first = start // rows
        groups = slice(first, -(-stop // rows) if stop > start else first)
        if g_idx is not None:
            g_idx = (g_idx[start:stop] - first).clamp_min(-1)
        return replace(
            self,
            weight_packed=self.weight_packed[:, words].contiguous(),
            weight_scale=self.weight_scale[:, groups].contiguous(),
            weight_shape=torch.tensor([out_features, stop - start]),
            weight_zero_point=None if zero_point is None else zero_point[:, groups].contiguous(),
            weight_g_idx=g_idx,
        )

    def operand(self, device: torch.device, dtype: torch.dtype) -> PlaneOperand:
        """Return the codes in planes, sorted by group; scales stay as they are stored, whatever the activations are.

        Raises:
            ValueError: the groups have no whole runs of 16 features (`read` refuses such a matrix).
        """
        runs = self._runs()
        if runs is None:
            raise ValueError("groups must be whole runs of 16 features after sorting")
        codes = unpack_stream(self.weight_packed.to(device), self.bits, self.shape[0], 1).t()
        return plane_operand(codes, self.zeros(), self.weight_scale.t().contiguous(), bits=self.bits, runs=runs)

    def _runs(self) -> Runs | None:
        return find_runs(self.groups(), self.group_size)


def _step_of(bits: int) -> int:
    """Return the features between the ends of words; 32 where codes straddle words, which tells packings apart."""
    return 32 // bits if 32 % bits == 0 else 32


def _take_packed(source: Source, name: str, bits: int, out_features: int, in_features: int) -> Tensor:
    """Read the codes and make sure that they are one stream per row."""
    key, words, straddles = f"{name}.weight_packed", -(-in_features * bits // 32), 32 % bits != 0
    if out_features < 0 or in_features < 0:
        raise source.error(f"{name}.weight_shape", f"must be two sizes, got {[out_features, in_features]}")
    if straddles and in_features % _step_of(bits):
        raise UnsupportedError(
            f"{name} has {in_features} input features; {bits}-bit compressed-tensors weights work for multiples of 32"
        )
    if straddles and key in source and source.shape(key)[1:] == (-(-in_features // (32 // bits)),) != (words,):
        raise UnsupportedError(
            f"{name} has {bits}-bit codes that leave the rest of each word empty, as old releases of "
            "compressed-tensors packed them; what works: the stream without gaps that release 0.20 writes"
        )
    return take(source, key, (out_features, words), (torch.int32,))


def _take_g_idx(source: Source, name: str, scheme: Scheme, in_features: int, groups: int) -> Tensor | None:
    """Read the group of each feature: all of them in range, or all of them -1."""
    key = f"{name}.weight_g_idx"
    if key not in source:
        if scheme.needs_g_idx:
            raise source.error(key, "the tensor is missing, and actorder says that features are not grouped in order")
        return None
    g_idx = take(source, key, (in_features,), (torch.int32,))
    if in_features and bool((g_idx != -1).any()) and (int(g_idx.min()) < 0 or int(g_idx.max()) >= groups):
        bad = int(g_idx.min()) if int(g_idx.min()) < 0 else int(g_idx.max())
        raise source.error(key, f"groups must be 0 to {groups - 1}, or all of them -1, got {bad}")
    return g_idx
