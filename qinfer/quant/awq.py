"""AWQ in the "gemm" layout of AutoAWQ: 4-bit codes with a scale and a zero point per group, packed along the outputs.

    W[k, n] = (code[k, n] - zero[g, n]) * scales[g, n],   g = k // group_size

    qweight  int32 [K, N/8]                  eight columns per word
    qzeros   int32 [ceil(K/group_size), N/8]  zero points, packed alike; stored as they are
    scales   fp16 or bf16 [ceil(K/group_size), N]
    bias     [N]                              optional

Bits 4 j .. 4 j + 3 of word c hold column 8 c + ORDER[j]. A file with `zero_point` false stores zero points all the
same, all of them 8. The other layouts of the family (gemv, gemv_fast, llm-awq, marlin) are refused by name, or by their
shapes.

Source: AutoAWQ's WQLinear_GEMM and its packing order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from qinfer.errors import UnsupportedError
from qinfer.kernels.operand import PlaneOperand
from qinfer.kernels.packing import pack_4bit, unpack_4bit
from qinfer.quant.grouped import (
    GROUP_SIZES,
    HALVES,
    find_runs,
    is_group_size,
    matrix,
    num_groups,
    plane_operand,
    sequential_groups,
)
from qinfer.quant.options import options_of, read_bits, read_group_size
from qinfer.quant.rtn import round_to_nearest
from qinfer.quant.weight import Dim, Source, check_cut, take, take_bias

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that each place of a word holds
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the place that each column has
WORD = 8  # columns per word
SINGLE_GROUP_STEP = 32  # features between the cuts inside a single group
SERVED = "what works: the gemm layout; AutoAWQ and GPTQModel can write a model in it"


@dataclass(frozen=True)
class AWQWeight:
    """A matrix in AWQ's gemm layout."""

    qweight: Tensor  # [K, N/8] int32
    qzeros: Tensor  # [groups, N/8] int32
    scales: Tensor  # [groups, N] fp16 or bf16
    bias: Tensor | None  # [N]
    group_size: int  # -1: one group

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        return self.qweight.shape[0], self.qweight.shape[1] * WORD

    @property
    def quant_config(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint that holds this weight."""
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": self.group_size,
            "zero_point": bool((self.zeros() != 1 << (BITS - 1)).any()),
            "version": "gemm",
        }

    @classmethod
    def read(cls, source: Source, name: str) -> Self:
        """Take `name.qweight`, `.qzeros`, `.scales` and, if it is there, `.bias`.

        Raises:
            CheckpointError: a tensor is missing, has a wrong shape or dtype, or holds NaN or infinite values.
            UnsupportedError: bits, group size or layout are not served.
        """
        options = options_of(source, name)
        if options is None:
            raise source.error(f"{name}.qweight", "quantization_config.dynamic says that this module is not quantized")
        version = options.get("version") or options.get("checkpoint_format") or options.get("format") or "gemm"
        if str(version).lower() != "gemm":
            raise UnsupportedError(f"AWQ version {version!r} cannot be read; {SERVED}")
        read_bits(source, name, options, "AWQ", (BITS,))
        group_size = read_group_size(source, name, options, "AWQ")
        _check_layout(source, name)
        qweight = take(source, f"{name}.qweight", (None, None), (torch.int32,))
        in_features, words = qweight.shape
        groups = num_groups(in_features, group_size)
        qzeros = take(source, f"{name}.qzeros", (groups, words), (torch.int32,))
        scales = take(source, f"{name}.scales", (groups, words * WORD), HALVES, finite=True)
        return cls(qweight, qzeros, scales, take_bias(source, name, words * WORD), group_size)

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by suffix."""
        stored = {"qweight": self.qweight, "qzeros": self.qzeros, "scales": self.scales}
        return stored | ({} if self.bias is None else {"bias": self.bias})

    @classmethod
    def quantize(cls, w: Tensor, *, group_size: int = 128, symmetric: bool = False, bias: Tensor | None = None) -> Self:
        """Round a matrix to nearest, with a small search for the step of each group (rtn.py).

        AWQ's own scaling of the input features, which needs calibration data, belongs to the layer before.

        Args:
            w: [K, N] floating point, N a multiple of 8.
            group_size: 16, a multiple of 32, or -1 for one group.
            symmetric: every zero point is 8.
            bias: [N], kept as it is.

        Raises:
            ValueError: a shape, an option or a value is out of range.
            TypeError: `w` is not floating point.
        """
        if not is_group_size(group_size):
            raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {group_size}")
        if w.dim() != 2 or w.shape[1] % WORD:
            raise ValueError(f"w must be [K, N] with N a multiple of {WORD}, got shape {list(w.shape)}")
        codes, scales, zeros = round_to_nearest(w, bits=BITS, group_size=group_size, symmetric=symmetric)
        return cls(_pack(codes), _pack(zeros), scales, bias, group_size)

    def codes(self) -> Tensor:
        """Return [K, N] uint8."""
        return _unpack(self.qweight)

    def zeros(self) -> Tensor:
        """Return the zero points [groups, N] uint8, 0 to 15."""
        return _unpack(self.qzeros)

    def dequantize(self) -> Tensor:
        """Return W [K, N] in fp32."""
        groups = sequential_groups(self.shape[0], self.group_size)
        return matrix(self.codes(), self.zeros(), self.scales, bits=BITS, groups=groups)

    def cuts(self, dim: Dim) -> Sequence[int]:
        """Return where words end (out) or groups end (in); a single group may be cut inside."""
        in_features, out_features = self.shape
        if dim == "out":
            return range(0, out_features + 1, WORD)
        rows = SINGLE_GROUP_STEP if self.scales.shape[0] <= 1 else self.group_size
        return (*range(0, in_features, rows), in_features)

    def slice(self, dim: Dim, start: int, stop: int) -> Self:
        """Return the part between two cuts."""
        check_cut(self.cuts(dim), dim, start, stop)
        if dim == "out":
            words = slice(start // WORD, stop // WORD)
            return replace(
                self,
                qweight=self.qweight[:, words].contiguous(),
                qzeros=self.qzeros[:, words].contiguous(),
                scales=self.scales[:, start:stop].contiguous(),
                bias=None if self.bias is None else self.bias[start:stop],
            )
        rows = max(self.shape[0], 1) if self.group_size == -1 else self.group_size
        groups = slice(start // rows, -(-stop // rows) if stop > start else start // rows)
        return replace(self, qweight=self.qweight[start:stop], qzeros=self.qzeros[groups], scales=self.scales[groups])

    def operand(self, device: torch.device, dtype: torch.dtype) -> PlaneOperand:
        """Return the codes in planes; scales stay as they are stored, whatever the activations are."""
        runs = find_runs(sequential_groups(self.shape[0], self.group_size), self.group_size)
        if runs is None:
            raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {self.group_size}")
        return plane_operand(_unpack(self.qweight.to(device)), self.zeros(), self.scales, bits=BITS, runs=runs)


def is_left_dense(source: Source, name: str) -> bool:
    """Say whether `modules_to_not_convert` names a module, by a part of its name, or `dynamic` excludes it.

    Raises:
        CheckpointError: an option is malformed.
    """
    parts = (source.quant_config or {}).get("modules_to_not_convert") or []
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise source.error(None, f"quantization_config.modules_to_not_convert must be a list of names, got {parts!r}")
    return any(part in name for part in parts) or options_of(source, name) is None


def _check_layout(source: Source, name: str) -> None:
    """Raise where dtype and shapes are those of another layout, whatever the config says."""
    qweight, scales = f"{name}.qweight", f"{name}.scales"
    if qweight not in source or scales not in source:
        return
    layout = None
    shape, scale_shape = source.shape(qweight), source.shape(scales)
    if source.dtype(qweight) == torch.int16:
        layout = "gemv_fast or llm-awq"
    elif len(shape) == len(scale_shape) == 2 and scale_shape[0] == shape[0] > 1 and scale_shape[1] != shape[1] * WORD:
        # There, both have a row per output.
        layout = "gemv"
    if layout is not None:
        raise UnsupportedError(f"{name} has AWQ weights in the layout {layout}, which cannot be read; {SERVED}")


def _pack(codes: Tensor) -> Tensor:
    """Write [m, n] uint8 as words [m, n/8]."""
    rows, columns = codes.shape
    return pack_4bit(codes.view(rows, columns // WORD, WORD)[:, :, ORDER].reshape(rows, columns))


def _unpack(words: Tensor) -> Tensor:
    """Read [m, n] uint8 from words [m, n/8]."""
    rows, columns = words.shape[0], words.shape[1] * WORD
    return unpack_4bit(words).view(rows, columns // WORD, WORD)[:, :, PLACES].reshape(rows, columns)
