"""GPTQ: integer codes with a scale and a zero point per group, as AutoGPTQ, GPTQModel and transformers store them.

    W[k, n] = (code[k, n] - zero[g, n]) * scales[g, n],   g = g_idx[k], or k // group_size where there is no g_idx

    qweight  int32 [ceil(K * bits/32), N]                 codes, a little-endian bit stream down each column
    qzeros   int32 [ceil(K/group_size), ceil(N*bits/32)]  zero points, the same kind of stream along each row
    scales   fp16, bf16 or fp32 [ceil(K/group_size), N]   fp32 is rounded to fp16 when it is read, as ExLlamaV2 does
    g_idx    int32 [K]                                    optional; all zero beside several groups says nothing
    bias     [N]                                          optional

with 2, 3, 4 or 8 bits; 3-bit codes straddle words. Where codes end inside a word, K is the length of g_idx.

`checkpoint_format` "gptq" (also when absent) stores zero - 1,
"gptq_v2" stores zero. Zero points are decoded one by one, so the largest stored one of the first kind means 2^bits, as
ExLlama reads it, and nothing carries into a neighbour.

Act-order means a g_idx that is not k // group_size. The operand then holds the input features sorted by group, stably,
and its `order` says which feature each one is. Groups of unequal sizes are served as far as grouped.py can; any other
g_idx is refused when it is read. What `desc_act` and `sym` say is not looked at where g_idx and the zero points say it;
`desc_act` without a g_idx that tells several groups apart is refused, because nothing else knows the order.

Sources: the quantize_config.json of AutoGPTQ and GPTQModel; ExLlamaV2's reading of g_idx and of the zero points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd, lcm
from typing import Any, Self

import torch
from torch import Tensor

from qinfer.errors import UnsupportedError
from qinfer.kernels.operand import PlaneOperand
from qinfer.kernels.packing import pack_stream, unpack_stream
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
from qinfer.quant.options import options_of, read_bits, read_group_size
from qinfer.quant.rtn import round_to_nearest
from qinfer.quant.weight import Dim, Source, check_cut, check_matrix, is_finite, take, take_bias

BITS = (2, 3, 4, 8)
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format -> what to add to a stored zero point
SINGLE_GROUP_STEP = 32  # features between the cuts inside a single group


@dataclass(frozen=True)
class GPTQWeight:
    """A matrix in GPTQ's layout."""

    qweight: Tensor  # [ceil(K * bits/32), N] int32
    qzeros: Tensor  # [groups, ceil(N * bits/32)] int32
    scales: Tensor  # [groups, N] fp16 or bf16
    g_idx: Tensor | None  # [K] int32
    bias: Tensor | None  # [N]
    bits: int
    group_size: int  # -1: one group
    zero_offset: int  # 1: stored zero points are one too small; 0: they are what they are

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        rows, out_features = self.qweight.shape
        return rows * 32 // self.bits if self.g_idx is None else self.g_idx.shape[0], out_features

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
        bits, group_size, zero_offset, is_ordered = _read_options(source, name)
        _check_bits(source, name, bits)
        qweight = take(source, f"{name}.qweight", (None, None), (torch.int32,))
        rows, out_features = qweight.shape
        in_features = _in_features(source, name, bits, rows)
        groups = num_groups(in_features, group_size)
        qzeros = take(source, f"{name}.qzeros", (groups, -(-out_features * bits // 32)), (torch.int32,))
        scales = _take_scales(source, name, groups, out_features)
        g_idx = _take_g_idx(source, name, in_features, groups)
        if is_ordered and groups > 1 and (g_idx is None or not bool(g_idx.any())):
            found = "the tensor is missing" if g_idx is None else "the tensor is all zero"
            problem = "quantization_config says desc_act: features were grouped in an order that only g_idx can tell"
            raise source.error(f"{name}.g_idx", f"{found}, and {problem}; desc_act false means consecutive groups")
        bias = take_bias(source, name, out_features)
        weight = cls(qweight, qzeros, scales, g_idx, bias, bits, group_size, zero_offset)
        if weight._runs() is None:
            sizes = sorted(set(torch.bincount(weight.groups(), minlength=groups).tolist()))
            problem = f"the groups of group_size {group_size} have {sizes} features; kernels need whole runs of 16"
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
            w: [K, N] floating point.
            bits: 2, 3, 4 or 8.
            group_size: 16, a multiple of 32, or -1 for one group.
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
        if not is_group_size(group_size):
            raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {group_size}")
        check_matrix(w)
        zero_offset, g_idx = ZERO_OFFSETS[zero_format], None
        grouped = w
        if act_order is None and w.shape[0] % _step_of(bits):
            # Only g_idx can tell where the codes end.
            act_order = torch.arange(w.shape[0])
        if act_order is not None:
            g_idx = group_of_feature(act_order, w.shape[0], group_size)
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
        if self.g_idx is not None and (self.scales.shape[0] <= 1 or bool(self.g_idx.any())):
            return self.g_idx.long()
        return sequential_groups(self.shape[0], self.group_size)

    def dequantize(self) -> Tensor:
        """Return W [K, N] in fp32, input features in their original order."""
        return matrix(self.codes(), self.zeros(), self.scales, bits=self.bits, groups=self.groups())

    def cuts(self, dim: Dim) -> Sequence[int]:
        """Return where words end (out) or groups end (in); a matrix in act-order may not be cut along its input."""
        in_features, out_features = self.shape
        if dim == "out":
            return (*range(0, out_features, _step_of(self.bits)), out_features)
        if not self._is_sequential():
            return ()
        # A single group may be cut inside, because every part keeps its one scale.
        rows = SINGLE_GROUP_STEP if self.scales.shape[0] <= 1 else self.group_size
        return (*range(0, in_features, lcm(rows, _step_of(self.bits))), in_features)

    def slice(self, dim: Dim, start: int, stop: int) -> Self:
        """Return the part between two cuts."""
        check_cut(self.cuts(dim), dim, start, stop)
        words = slice(start * self.bits // 32, -(-stop * self.bits // 32))
        if dim == "out":
            return replace(
                self,
                qweight=self.qweight[:, start:stop].contiguous(),
                qzeros=self.qzeros[:, words if stop > start else slice(0, 0)].contiguous(),
                scales=self.scales[:, start:stop].contiguous(),
                bias=None if self.bias is None else self.bias[start:stop],
            )
        rows = features_per_group(self.shape[0], self.group_size)
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
            ValueError: the groups of g_idx have no whole runs of 16 features (`read` refuses such a matrix).
        """
        runs = self._runs()
        if runs is None:
            raise ValueError("groups must be whole runs of 16 features after sorting")
        codes = unpack_stream(self.qweight.to(device), self.bits, self.shape[0], 0)
        return plane_operand(codes, self.zeros(), self.scales, bits=self.bits, runs=runs)

    def _is_sequential(self) -> bool:
        """Say whether feature k belongs to group k // group_size."""
        return torch.equal(self.groups().cpu(), sequential_groups(self.shape[0], self.group_size))

    def _runs(self) -> Runs | None:
        return find_runs(self.groups(), self.group_size)


def _step_of(bits: int) -> int:
    """Return how many codes fill whole words."""
    return 32 // gcd(32, bits)


def _in_features(source: Source, name: str, bits: int, rows: int) -> int:
    """Return K: the length of g_idx if there is one, else what the rows of qweight hold."""
    g_idx, unit = f"{name}.g_idx", bits // gcd(32, bits)
    length = source.shape(g_idx)[0] if g_idx in source and len(source.shape(g_idx)) == 1 else None
    if length is not None and -(-length * bits // 32) == rows:
        return length
    if rows % unit:
        known = "without g_idx" if length is None else f"beside a g_idx of {length} features"
        raise source.error(f"{name}.qweight", f"{bits}-bit codes {known} must fill whole words, got {rows} rows")
    return rows * 32 // bits


def _take_scales(source: Source, name: str, groups: int, out_features: int) -> Tensor:
    """Read the scales, and bring fp32 to the fp16 that products take: nearest, as ExLlamaV2 does."""
    key = f"{name}.scales"
    scales = take(source, key, (groups, out_features), (*HALVES, torch.float32), finite=True)
    if scales.dtype != torch.float32:
        return scales
    rounded = scales.half()
    if not is_finite(rounded):
        raise source.error(key, "fp32 scales are rounded to fp16, and one of them is beyond 65,504")
    return rounded


def _take_g_idx(source: Source, name: str, in_features: int, groups: int) -> Tensor | None:
    """Read the group of each feature, if the file says."""
    key = f"{name}.g_idx"
    if key not in source:
        return None
    g_idx = take(source, key, (in_features,), (torch.int32,))
    if in_features and (int(g_idx.min()) < 0 or int(g_idx.max()) >= groups):
        bad = int(g_idx.min()) if int(g_idx.min()) < 0 else int(g_idx.max())
        raise source.error(key, f"groups must be 0 to {groups - 1}, got {bad}")
    return g_idx


def _check_bits(source: Source, name: str, bits: int) -> None:
    """Raise where the zero points beside the scales have another width than the options say.

    Raises:
        CheckpointError: names the width that the shapes stand for.
    """
    zeros, scales = f"{name}.qzeros", f"{name}.scales"
    if zeros not in source or scales not in source:
        return
    if len(source.shape(zeros)) != 2 or len(source.shape(scales)) != 2:
        return
    words, out_features = source.shape(zeros)[1], source.shape(scales)[1]
    # Few columns fill as many words in several widths; then the one that fills them entirely is the likely one.
    stored = [width for width in BITS if words == -(-out_features * width // 32)]
    if stored and bits not in stored:
        likely = next((width for width in stored if words * 32 == out_features * width), stored[0])
        problem = f"its shape beside that of the scales stands for {likely} bits, quantization_config says {bits}"
        raise source.error(zeros, problem)


def _read_options(source: Source, name: str) -> tuple[int, int, int, bool]:
    """Return bits, group_size and zero_offset of a module, and whether features were put in an order first."""
    options = options_of(source, name)
    if options is None:
        raise source.error(f"{name}.qweight", "quantization_config.dynamic says that this module is not quantized")
    layout = options.get("checkpoint_format") or options.get("format") or "gptq"
    if layout not in ZERO_OFFSETS:
        raise UnsupportedError(f"GPTQ checkpoint_format {layout!r} is unknown; what works: {', '.join(ZERO_OFFSETS)}")
    pack_dtype = options.get("pack_dtype") or "int32"
    if pack_dtype not in ("int32", "torch.int32"):
        raise UnsupportedError(f"GPTQ pack_dtype {pack_dtype!r} is unknown; what works: int32")
    bits = read_bits(source, name, options, "GPTQ", BITS)
    is_ordered = options.get("desc_act") or False
    if not isinstance(is_ordered, bool):
        raise source.error(None, f"quantization_config.desc_act must be true or false, got {is_ordered!r}")
    return bits, read_group_size(source, name, options, "GPTQ"), ZERO_OFFSETS[layout], is_ordered
