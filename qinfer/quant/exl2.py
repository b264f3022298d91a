"""EXL2: rows of 8, 6, 5, 4, 3 and 2 bits in one matrix, as ExLlamaV2 stores them.

    W[q_perm[r], n] = fp16((code[r, n] - 2^(b-1)) * s[g, n]),   q_perm = argsort(q_invperm)
    s[g, n] = fp16(i^2 * fp16(q_scale_max[g] / 256)),            i = (nibble n of q_scale[g]) + 1, from 1 to 16

    q_weight     int32 [words, N]   the groups one after another; in each a little-endian bit stream down each column
    q_scale      int32 [G, N / 8]   i - 1, eight columns per word, the first lowest
    q_scale_max  fp16 [G]           the largest scale of a group, but for the two roundings
    q_groups     int16 [2 G]        (bits b, first row in q_weight) per group, to be read as unsigned; b never rises
    q_invperm    int32 [K]          row r of the codes that an input feature has
    bias         [N]                optional

Both roundings of the scale are part of the format: q_scale_max / 256 is often subnormal in fp16, which loses up to
0.2 %, and the writer chose the codes for what comes out. `dequantize` gives ExLlamaV2's fp16 matrix bit for bit. The
operand holds the exact scales s and leaves out only the last rounding, that of the product to fp16.

N is stored as a multiple of 32. A matrix with fewer outputs has more columns of zeros in the file, which says nothing
about it: `without_padding` drops them. A file may hold a `q_perm`; like ExLlamaV2, this reader ignores it.

Source: exllamav2 (ext.py, conversion/adaptivegptq.py, the CUDA sources of its dequantization).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from math import ceil
from typing import Any, Self

import torch
from torch import Tensor

from qinfer.kernels.operand import PlaneOperand, SegmentedOperand
from qinfer.kernels.packing import pack_planes, pack_stream, unpack_stream
from qinfer.quant.rtn import RATIOS, SMALLEST_SCALE
from qinfer.quant.weight import Dim, Source, check_cut, check_matrix, take, take_bias

BITS = (8, 6, 5, 4, 3, 2)
COLUMNS_STEP = 32  # N is stored as a multiple of it
LARGEST_ROW = 0xFFFF  # of q_weight that q_groups can name
LARGEST_VALUE = torch.finfo(torch.float16).max
# Codes of 3 and 5 bits come in steps of K so long that the fastest tiles have no room for them, and one launch has the
# registers of its longest step. Where they are few, products read them as codes of 4 and 6 bits of the same value.
WIDER = {3: 4, 5: 6}
MOST_GROWTH = 0.05  # of a matrix
# What operands take of memory, at most and but for what fills up a last step of K, for each byte of a tensor in a file;
# scales are indices of 4 bits there.
HELD_PER_STORED = {"q_weight": 1 + MOST_GROWTH, "q_scale": 4.0}


@dataclass(frozen=True)
class Group:
    """Consecutive rows of one width that share a scale per column."""

    index: int  # row of the scales
    bits: int
    num_rows: int


@dataclass(frozen=True)
class EXL2Weight:
    """A matrix in EXL2's layout."""

    q_weight: Tensor  # [words, N_stored] int32
    q_scale: Tensor  # [groups, N_stored / 8] int32
    q_scale_max: Tensor  # [groups] fp16
    q_groups: Tensor  # [2 * groups] int16
    q_invperm: Tensor  # [K] int32
    stored_bias: Tensor | None  # [N_stored]
    out_features: int  # N; columns behind it are padding

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        return self.q_invperm.shape[0], self.out_features

    @property
    def bias(self) -> Tensor | None:
        """[N], added after the product."""
        return None if self.stored_bias is None else self.stored_bias[: self.out_features]

    @property
    def quant_config(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint that holds this weight: its tensors say everything else."""
        return {"quant_method": "exl2"}

    @property
    def q_perm(self) -> Tensor:
        """[K] int64, the input feature of each row of codes."""
        return torch.argsort(self.q_invperm)

    @classmethod
    def read(cls, source: Source, name: str) -> Self:
        """Take `name.q_weight`, `.q_scale`, `.q_scale_max`, `.q_groups`, `.q_invperm` and, if it is there, `.bias`.

        Raises:
            CheckpointError: a tensor is missing, has a wrong shape or dtype, or holds impossible values.
        """
        q_weight = take(source, f"{name}.q_weight", (None, None), (torch.int32,))
        num_words, columns = q_weight.shape
        if columns % COLUMNS_STEP:
            raise source.error(f"{name}.q_weight", f"must have a multiple of {COLUMNS_STEP} columns, got {columns}")
        q_groups = take(source, f"{name}.q_groups", (None,), (torch.int16,))
        problem = _problem_of(q_groups, num_words)
        if problem is not None:
            raise source.error(f"{name}.q_groups", problem)
        groups = _groups(q_groups, num_words)
        q_scale = take(source, f"{name}.q_scale", (len(groups), columns // 8), (torch.int32,))
        q_scale_max = take(source, f"{name}.q_scale_max", (len(groups),), (torch.float16,), finite=True)
        in_features = sum(group.num_rows for group in groups)
        q_invperm = take(source, f"{name}.q_invperm", (in_features,), (torch.int32,))
        if not _is_permutation(q_invperm):
            raise source.error(f"{name}.q_invperm", f"must hold each of 0 to {in_features - 1} once")
        weight = cls(q_weight, q_scale, q_scale_max, q_groups, q_invperm, take_bias(source, name, columns), columns)
        steps = torch.tensor([1 << (group.bits - 1) for group in groups], device=q_scale_max.device)[:, None]
        # The largest index bounds the others, and is quickly looked at.
        bound = _scales(torch.full_like(q_scale_max, 16), q_scale_max).float().abs() * steps[:, 0]
        if (
            columns
            and not q_scale.is_meta
            and float(bound.max()) > LARGEST_VALUE
            and (float((weight.scales().float().abs() * steps).max()) > LARGEST_VALUE)
        ):
            raise source.error(f"{name}.q_scale_max", f"the scales allow for weights beyond fp16's {LARGEST_VALUE:g}")
        if f"{name}.q_perm" in source:
            source.read(f"{name}.q_perm")  # or it would count as a tensor that nothing uses
        return weight

    def without_padding(self, out_features: int) -> Self:
        """Return the same tensors for a matrix of `out_features` columns, or itself where they are not its padding."""
        stored = self.q_weight.shape[1]
        return replace(self, out_features=out_features) if _padded(out_features) == stored else self

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by suffix, with their padding."""
        stored = {
            "q_weight": self.q_weight,
            "q_scale": self.q_scale,
            "q_scale_max": self.q_scale_max,
            "q_groups": self.q_groups,
            "q_invperm": self.q_invperm,
        }
        return stored | ({} if self.stored_bias is None else {"bias": self.stored_bias})

    @classmethod
    def quantize(
        cls,
        w: Tensor,
        *,
        bits: int | dict[int, float] = 4,
        group_size: int | dict[int, int] = 32,
        permutation: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Self:
        """Round a matrix to nearest, with a small search for the scales of each group.

        Columns of zeros fill N up to a multiple of 32.

        Args:
            w: [K, N] floating point, K a positive multiple of 32.
            bits: the width of all rows, or the share of the rows that each width gets, the widest rows first. Shares
                are rounded up to whole groups; the narrowest width gets what is left.
            group_size: rows per group, a multiple of 32, for all widths or for each; a last group may be shorter.
            permutation: [K] the input feature of each row; None keeps them as they are.
            bias: [N], kept as it is but for the padding.

        Raises:
            ValueError: a shape, an option or a value is out of range.
            TypeError: `w` is not floating point.
        """
        check_matrix(w)
        in_features, out_features = w.shape
        if in_features < 1 or in_features % 32:
            raise ValueError(f"w must be [K, N] with K a positive multiple of 32, got shape {list(w.shape)}")
        # A scale can be up to a third larger than the largest weight asks for.
        if w.numel() and float(w.abs().max()) > LARGEST_VALUE / 2:
            raise ValueError(f"w must stay within {LARGEST_VALUE / 2:g}, got {float(w.abs().max()):g}")
        order = torch.arange(in_features, device=w.device) if permutation is None else permutation.long()
        if order.shape != (in_features,) or not _is_permutation(order):
            got = list(order.shape)
            raise ValueError(f"permutation must hold each of {in_features} features once, got shape {got}")
        rows = torch.zeros(in_features, _padded(out_features), dtype=torch.float32, device=w.device)
        rows[:, :out_features] = w[order]
        words, indices, largest, heads = [], [], [], []
        first_row = first_word = 0
        for width, num_rows in _plan(in_features, bits, group_size):
            group = rows[first_row : first_row + num_rows]
            codes, index, scale_max = _round_group(group, width)
            words.append(pack_stream(codes, width, 0))
            indices.append(index - 1)
            largest.append(scale_max)
            heads += [width, first_word]
            first_row, first_word = first_row + num_rows, first_word + words[-1].shape[0]
        if first_word > LARGEST_ROW:
            raise ValueError(f"q_groups can point to {LARGEST_ROW} rows of words, got {first_word}")
        stored_bias = None if bias is None else torch.cat([bias, bias.new_zeros(rows.shape[1] - out_features)])
        return cls(
            q_weight=torch.cat(words),
            q_scale=pack_stream(torch.stack(indices), 4, 1),
            q_scale_max=torch.stack(largest),
            q_groups=torch.tensor(heads, device=w.device).to(torch.int16),
            q_invperm=torch.argsort(order).to(torch.int32),
            stored_bias=stored_bias,
            out_features=out_features,
        )

    def scales(self) -> Tensor:
        """Return s [G, N_stored] fp16, rounded as ExLlamaV2 rounds it."""
        return _scales(unpack_stream(self.q_scale, 4, self.q_weight.shape[1], 1) + 1, self.q_scale_max[:, None])

    def dequantize(self) -> Tensor:
        """Return W [K, N] in fp32, input features in their original order; every value is one of fp16."""
        scales = self.scales()[:, : self.out_features].float()
        blocks = []
        for groups, codes in self._blocks(self.q_weight.device):
            rows = torch.tensor([group.num_rows for group in groups], device=codes.device)
            first = groups[0].index
            steps = scales[first : first + len(groups)].repeat_interleave(rows, dim=0)
            # The product is exact in fp32, so it is rounded once.
            blocks.append(((codes.float() - _middle(groups[0].bits)) * steps).half())
        return torch.cat(blocks)[self.q_invperm.long()].float()

    def cuts(self, dim: Dim) -> Sequence[int]:
        """Return every 32 columns (out), as files hold them; nothing (in), because the rows are permuted."""
        return () if dim == "in" else (*range(0, self.out_features, COLUMNS_STEP), self.out_features)

    def slice(self, dim: Dim, start: int, stop: int) -> Self:
        """Return the part between two cuts."""
        check_cut(self.cuts(dim), dim, start, stop)
        end = _padded(stop) if stop > start else start
        return replace(
            self,
            q_weight=self.q_weight[:, start:end].contiguous(),
            q_scale=self.q_scale[:, start // 8 : end // 8].contiguous(),
            stored_bias=None if self.stored_bias is None else self.stored_bias[start:end],
            out_features=stop - start,
        )

    def operand(self, device: torch.device, dtype: torch.dtype) -> PlaneOperand | SegmentedOperand:
        """Return the codes in planes, a segment per width of `kept_widths`.

        Scales are s in fp16, whatever the activations.
        The product (code - 2^(b-1)) * s is not rounded to fp16, as it is by `dequantize`.
        """
        scales = self.scales().to(device)[:, : self.out_features]
        stored = _groups(self.q_groups, self.q_weight.shape[0])
        kept = kept_widths({bits: sum(g.num_rows for g in stored if g.bits == bits) for bits in BITS})
        segments = []
        for width, same in groupby(self._blocks(device), key=lambda block: kept[block[0][0].bits]):
            blocks = list(same)
            groups = [group for members, _ in blocks for group in members]
            codes = torch.cat([block + (_middle(width) - _middle(members[0].bits)) for members, block in blocks])
            first = 0
            for run in _runs(groups):
                last = first + sum(group.num_rows for group in run)
                segment = PlaneOperand(
                    planes=pack_planes(codes[first:last], bits=width),
                    scales=scales[[group.index for group in run]].contiguous(),
                    offsets=None,
                    bits=width,
                    group_size=run[0].num_rows,
                    in_features=last - first,
                )
                segments.append(segment)
                first = last
        is_identity = torch.equal(self.q_invperm, torch.arange(self.shape[0], device=self.q_invperm.device))
        order = None if is_identity else self.q_perm.to(device=device, dtype=torch.int32)
        return replace(segments[0], order=order) if len(segments) == 1 else SegmentedOperand(tuple(segments), order)

    def _blocks(self, device: torch.device) -> Iterator[tuple[list[Group], Tensor]]:
        """Yield the groups of each width, and their codes [rows, N] uint8 in stored order."""
        first = 0
        for bits, same in groupby(_groups(self.q_groups, self.q_weight.shape[0]), key=lambda group: group.bits):
            groups = list(same)
            num_rows = sum(group.num_rows for group in groups)
            # Groups are whole words, so the streams of neighbours of one width are one stream.
            words = self.q_weight[first : first + num_rows * bits // 32].to(device)
            first += words.shape[0]
            yield groups, unpack_stream(words, bits, num_rows, 0)[:, : self.out_features]


def kept_widths(rows: Mapping[int, int]) -> dict[int, int]:
    """Return the width at which an operand keeps the codes of each width of a matrix.

    Args:
        rows: rows of each width.

    Returns:
        Width in bits -> its own, or the next one of `WIDER` where the matrix grows by at most `MOST_GROWTH`.
    """
    kept = {bits: WIDER.get(bits, bits) for bits in rows}
    growth = sum((kept[bits] - bits) * count for bits, count in rows.items())
    is_little = growth <= MOST_GROWTH * sum(bits * count for bits, count in rows.items())
    return kept if is_little else {bits: bits for bits in rows}


def _middle(bits: int) -> int:
    """Return the code that stands for zero."""
    return 1 << (bits - 1)


def _padded(out_features: int) -> int:
    return -(-out_features // COLUMNS_STEP) * COLUMNS_STEP


def _is_permutation(order: Tensor) -> bool:
    positions = torch.arange(order.shape[0], dtype=order.dtype, device=order.device)
    return torch.equal(order.sort().values, positions)


def _scales(indices: Tensor, scale_max: Tensor) -> Tensor:
    """Return fp16 scales of indices 1 to 16 under the largest scale, fp16; both roundings are part of the format."""
    return (indices.float().square() * (scale_max.float() / 256).half().float()).half()


def _heads(q_groups: Tensor) -> list[tuple[int, int]]:
    """Return bits and first word of every group."""
    values = [value & 0xFFFF for value in q_groups.tolist()]
    return list(zip(values[::2], values[1::2], strict=True))


def _groups(q_groups: Tensor, num_words: int) -> list[Group]:
    heads = _heads(q_groups)
    ends = [*(first for _, first in heads[1:]), num_words]
    rows = [(bits, (end - first) * 32 // bits) for (bits, first), end in zip(heads, ends, strict=True)]
    return [Group(index, bits, num_rows) for index, (bits, num_rows) in enumerate(rows)]


def _problem_of(q_groups: Tensor, num_words: int) -> str | None:
    """Say what is impossible about groups over so many words; None: nothing."""
    if q_groups.shape[0] < 2 or q_groups.shape[0] % 2:
        return f"must hold a pair (bits, first row) per group, got {q_groups.shape[0]} numbers"
    heads = _heads(q_groups)
    if heads[0][1]:
        return f"the first group must start at row 0 of q_weight, got {heads[0][1]}"
    ends = [*(first for _, first in heads[1:]), num_words]
    for index, ((bits, first), end) in enumerate(zip(heads, ends, strict=True)):
        if bits not in BITS:
            return f"group {index} must have one of {list(BITS)} bits, got {bits}"
        if end <= first:
            return f"group {index} starts at row {first} of q_weight and ends at row {end}"
    for index, ((bits, first), end) in enumerate(zip(heads, ends, strict=True)):
        step = 16 if bits == 2 else 32
        if (end - first) * 32 % (bits * step):
            return f"group {index} must have a multiple of {step} rows of {bits} bits, got {end - first} rows of words"
    for index, ((bits, _), (following, _)) in enumerate(pairwise(heads)):
        if following > bits:
            return f"bits must not rise, got {bits} in group {index} and {following} in the next"
    return None


def _runs(groups: list[Group]) -> list[list[Group]]:
    """Split groups of one width into runs of equal sizes, the last of a run possibly shorter."""
    if any(group.num_rows % 32 for group in groups):
        # Kernels know groups of 16 and of multiples of 32 rows; a word of 2-bit codes is 16 rows.
        groups = [replace(group, num_rows=16) for group in groups for _ in range(group.num_rows // 16)]
    runs: list[list[Group]] = []
    for group in groups:
        if runs and runs[-1][-1].num_rows == runs[-1][0].num_rows >= group.num_rows:
            runs[-1].append(group)
        else:
            runs.append([group])
    return runs


def _plan(in_features: int, bits: int | dict[int, float], group_size: int | dict[int, int]) -> list[tuple[int, int]]:
    """Return bits and rows of every group, the widest first."""
    shares = {bits: 1.0} if isinstance(bits, int) else bits
    sizes = dict.fromkeys(shares, group_size) if isinstance(group_size, int) else group_size
    if not shares or any(width not in BITS for width in shares):
        raise ValueError(f"bits must be among {list(BITS)}, got {list(shares)}")
    if min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"the shares of the widths must be positive and sum to 1, got {shares}")
    if any(sizes.get(width, 0) < 32 or sizes[width] % 32 for width in shares):
        raise ValueError(f"group_size must be a positive multiple of 32 for each of {list(shares)}, got {group_size}")
    plan, left = [], in_features
    for width in sorted(shares, reverse=True):
        size = sizes[width]
        # Less a trifle, so that shares that are whole groups but for fp64 stay whole groups.
        num_rows = left if width == min(shares) else min(left, ceil(in_features * shares[width] / size - 1e-6) * size)
        plan += [(width, min(size, num_rows - start)) for start in range(0, num_rows, size)]
        left -= num_rows
    return plan


def _round_group(group: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the rows of one group.

    First the index of every column follows from its largest weight, and the largest scale is the one out of RATIOS that
    gives the least squared error over all columns; then every column takes its best index under that scale.

    Args:
        group: [rows, N] fp32.
        bits: width of the codes.

    Returns:
        codes [rows, N] uint8; indices [N] int64, 1 to 16; the largest scale, fp16.
    """
    middle = 1 << (bits - 1)

    def steps(scale: Tensor) -> Tensor:
        return (group / scale.clamp_min(SMALLEST_SCALE)).round().clamp(-middle, middle - 1)

    def errors(indices: Tensor, scale_max: Tensor) -> Tensor:
        scale = _scales(indices, scale_max).float()
        return (steps(scale) * scale - group).square().sum(dim=0)

    widest = group.abs().amax(dim=0) / (middle - 0.5)
    top = widest.max() if widest.numel() else widest.new_zeros(())
    indices = (16 * (widest / top.clamp_min(SMALLEST_SCALE)).sqrt()).round().clamp(1, 16)
    tried = [(top * ratio).half() for ratio in RATIOS]
    scale_max = tried[int(torch.stack([errors(indices, scale).sum() for scale in tried]).argmin())]
    every = torch.arange(1, 17, device=group.device)
    indices = every[torch.stack([errors(index, scale_max) for index in every]).argmin(dim=0)]
    return (steps(_scales(indices, scale_max).float()) + middle).to(torch.uint8), indices, scale_max
