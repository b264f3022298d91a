"""The functions of `exllamav2_ext` that convert, compare and move what a KV cache holds. Plain torch.

Nothing of qinfer runs on them: its own cache is read in place (`qinfer.cache`). They are for programs that keep an
ExLlamaV2 cache, [batch, tokens, heads, head size] in fp16 beside codes of 8 or 4 bits.

With a page size of 0, tokens [offset, offset + width) of every row are converted. Otherwise the cache is one row of
pages; block_table says which pages belong to a sequence, cache_seqlens how many of its tokens are in the cache before
this step. Quantizing then converts the `width` tokens behind those, dequantizing all of them. Ranges are widened to
whole units of 512 numbers, as far as the row or the page goes. As in the compiled module, widths 4, 6 and 8 of `wbits`
stand for 4 bits, 8 bits for keys and 4 for values, and 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from qinfer.compat import q4
from qinfer.compat.binding import check_tensor, check_together, extension, optional

UNIT = 512  # numbers that the compiled module converts at a time
WIDTHS = {4: (4, 4), 6: (8, 4), 8: (8, 8)}  # wbits -> bits of keys, bits of values


@extension
def fp16_to_fp8(in_tensor: Tensor, out_tensor: Tensor, batch_size: int, offset: int, width: int) -> None:
    """Keep the upper byte of fp16 numbers, which cuts them to 5 bits of exponent and 2 of mantissa.

    Args:
        in_tensor: [B, S, H, D] fp16.
        out_tensor: [B, S, H, D] uint8, tokens [offset, offset + width) of the first batch_size rows written.
        batch_size: rows.
        offset: first token.
        width: tokens.

    Raises:
        RuntimeError: a dtype, a shape, a device or a range does not fit.
    """
    rows = _check_fp8(in_tensor, out_tensor, batch_size, offset, width)
    out_tensor[rows] = (in_tensor[rows].contiguous().view(torch.int16) >> 8).to(torch.uint8)


@extension
def fp8_to_fp16(in_tensor: Tensor, out_tensor: Tensor, batch_size: int, offset: int, width: int) -> None:
    """Make fp16 numbers of their upper bytes; the arguments are those of `fp16_to_fp8`.

    Args:
        in_tensor: [B, S, H, D] uint8.
        out_tensor: [B, S, H, D] fp16, written.
        batch_size: rows.
        offset: first token.
        width: tokens.

    Raises:
        RuntimeError: a dtype, a shape, a device or a range does not fit.
    """
    rows = _check_fp8(out_tensor, in_tensor, batch_size, offset, width)
    out_tensor[rows] = (in_tensor[rows].to(torch.int16) << 8).view(torch.float16)


def _check_fp8(numbers: Tensor, codes: Tensor, batch_size: int, offset: int, width: int) -> tuple[slice, slice]:
    """Return the rows and tokens to convert, once everything fits."""
    check_tensor("the fp16 tensor", numbers, torch.float16, ("B", "S", "H", "D"))
    check_tensor("the uint8 tensor", codes, torch.uint8, tuple(numbers.shape))
    check_together(numbers, codes=codes)
    _check_range(batch_size, offset, width, numbers.shape)
    return slice(batch_size), slice(offset, offset + width)


def _check_range(batch_size: int, offset: int, width: int, shape: torch.Size) -> None:
    """Raise ValueError unless rows and tokens exist."""
    if not 0 <= batch_size <= shape[0]:
        raise ValueError(f"batch_size must be from 0 to {shape[0]}, got {batch_size}")
    if offset < 0 or width < 0 or offset + width > shape[1]:
        raise ValueError(f"tokens must be in [0, {shape[1]}), got offset {offset} and width {width}")


@dataclass(frozen=True)
class _Side:
    """The keys, or the values, in both forms."""

    name: str
    numbers: Tensor  # [B, S, H, D] fp16
    codes: Tensor  # [B, S, H, D] uint8, or [B, S, H, D / 2] of 4 bits
    scales: Tensor  # [B, S, H, D / 32] fp16
    bits: int

    def check(self) -> None:
        """Raise unless the tensors hold the same cache."""
        check_tensor(f"the fp16 {self.name}", self.numbers, torch.float16, ("B", "S", "H", "D"))
        *places, head_dim = self.numbers.shape
        check_tensor(f"the codes of {self.name}", self.codes, torch.uint8, (*places, head_dim * self.bits // 8))
        check_tensor(f"the scales of {self.name}", self.scales, torch.float16, (*places, head_dim // q4.GROUP))
        check_together(self.numbers, codes=self.codes, scales=self.scales)
        for tensor in (self.numbers, self.codes, self.scales):
            if not tensor.is_contiguous():
                raise ValueError(f"the {self.name} must be contiguous, got strides {tensor.stride()}")
        if self.numbers[0].numel() % q4.RUN:
            raise ValueError(f"a row must hold a multiple of {q4.RUN} numbers, got {self.numbers[0].numel()}")

    def runs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tensors as [runs, numbers of a run]."""
        bytes_of_run = q4.RUN * self.bits // 8
        return (
            self.numbers.view(-1, q4.RUN),
            self.codes.view(-1, bytes_of_run),
            self.scales.view(-1, q4.RUN // q4.GROUP),
        )

    def quantize(self, chosen: Tensor) -> None:
        """Encode some runs."""
        numbers, codes, scales = self.runs()
        coded, steps = q4.encode(numbers[chosen], self.bits)
        codes[chosen] = coded.view(-1, codes.shape[1])
        scales[chosen] = steps.view(-1, scales.shape[1])

    def dequantize(self, chosen: Tensor) -> None:
        """Decode some runs."""
        numbers, codes, scales = self.runs()
        numbers[chosen] = q4.decode(codes[chosen].view(-1), scales[chosen].view(-1), self.bits).view(-1, q4.RUN)


def _sides(k: tuple[Tensor, Tensor, Tensor], v: tuple[Tensor, Tensor, Tensor], wbits: int) -> tuple[_Side, _Side]:
    """Return keys and values, given as numbers, codes and scales, once they fit together."""
    if wbits not in WIDTHS:
        raise ValueError(f"wbits must be 4, 6 or 8, got {wbits}")
    keys, values = (
        _Side(name, *tensors, bits)
        for name, tensors, bits in zip(("keys", "values"), (k, v), WIDTHS[wbits], strict=True)
    )
    keys.check()
    values.check()
    if keys.numbers.shape != values.numbers.shape:
        raise ValueError(f"keys and values must agree, got {list(keys.numbers.shape)}, {list(values.numbers.shape)}")
    check_together(keys.numbers, values=values.numbers)
    return keys, values


def _runs_of(first: Tensor, last: Tensor, base: Tensor, token: int, row: int) -> Tensor:
    """Return the numbers of the runs that hold tokens [first, last) of rows, widened to whole units.

    Args:
        first: [R] first token in each row.
        last: [R] the token behind the last one.
        base: [R] number of the row in the tensor.
        token: numbers of a token.
        row: numbers of a row.
    """
    o_run = torch.arange(row // q4.RUN, device=first.device) * q4.RUN
    start = first * token // UNIT * UNIT
    stop = -(-last * token // UNIT) * UNIT
    kept = (o_run >= start[:, None]) & (o_run < stop[:, None]) & (last > first)[:, None]
    return (base.long()[:, None] * (row // q4.RUN) + o_run // q4.RUN)[kept]


def _chosen(
    shape: torch.Size,
    device: torch.device,
    rows: tuple[int, int, int],
    page_size: int,
    tables: tuple[Tensor | None, Tensor | None],
    *,
    is_new: bool,
) -> Tensor:
    """Return the runs that a call converts.

    Args:
        shape: (B, S, H, D) of the cache.
        device: where it is.
        rows: batch_size, offset, width.
        page_size: tokens per page, or 0.
        tables: cache_seqlens and block_table.
        is_new: the tokens of this step, rather than those before it.
    """
    batch_size, offset, width = rows
    token = shape[2] * shape[3]
    if page_size == 0:
        _check_range(batch_size, offset, width, shape)
        base = torch.arange(batch_size, device=device)
        return _runs_of(
            torch.full_like(base, offset), torch.full_like(base, offset + width), base, token, shape[1] * token
        )
    num_tokens = shape[0] * shape[1]
    if page_size < 0 or num_tokens % page_size or page_size * token % q4.RUN:
        raise ValueError(f"page_size must divide {num_tokens} tokens into whole runs, got {page_size}")
    lens, table = (optional(tensor) for tensor in tables)
    if lens is None or table is None:
        raise ValueError("cache_seqlens and block_table must be given with a page size")
    check_tensor("cache_seqlens", lens, torch.int32, ("sequences",))
    check_tensor("block_table", table, torch.int32, (lens.shape[0], "pages"))
    check_together(lens, block_table=table)
    start = torch.arange(table.shape[1], device=table.device) * page_size
    before = lens[:, None] - start
    first, last = (before, before + width) if is_new else (torch.zeros_like(before), before)
    first, last = first.clamp(0, page_size).view(-1), last.clamp(0, page_size).view(-1)
    used = table.reshape(-1)[last > first]
    if (
        used.device.type == "cpu"
        and used.numel()
        and not 0 <= int(used.min()) <= int(used.max()) < num_tokens // page_size
    ):
        raise ValueError(f"block_table must hold pages below {num_tokens // page_size}, got {used.tolist()}")
    return _runs_of(first, last, table.reshape(-1), token, page_size * token).to(device)


@extension
def fp16_to_q_kv(
    k_in: Tensor,
    k_out: Tensor,
    k_scales: Tensor,
    v_in: Tensor,
    v_out: Tensor,
    v_scales: Tensor,
    batch_size: int,
    offset: int,
    width: int,
    page_size: int,
    cache_seqlens: Tensor | None,
    block_table: Tensor | None,
    wbits: int,
) -> None:
    """Quantize keys and values.

    Args:
        k_in: [B, S, H, D] fp16.
        k_out: [B, S, H, D] uint8, or [B, S, H, D / 2] in 4 bits, written.
        k_scales: [B, S, H, D / 32] fp16, written.
        v_in: like `k_in`.
        v_out: like `k_out`.
        v_scales: like `k_scales`.
        batch_size: rows, without pages.
        offset: first token of each row, without pages.
        width: tokens.
        page_size: tokens per page; 0: no pages.
        cache_seqlens: [sequences] int32 tokens before these, or nothing without pages.
        block_table: [sequences, pages] int32, or nothing without pages.
        wbits: 4; 6, for keys in 8 and values in 4 bits; or 8.

    Raises:
        RuntimeError: a dtype, a shape, a device, a range or (CPU tensors only) a page does not fit.
    """
    sides = _sides((k_in, k_out, k_scales), (v_in, v_out, v_scales), wbits)
    rows, tables = (batch_size, offset, width), (cache_seqlens, block_table)
    chosen = _chosen(k_in.shape, k_in.device, rows, page_size, tables, is_new=True)
    for side in sides:
        side.quantize(chosen)


@extension
def q_to_fp16_kv(
    k_in: Tensor,
    k_out: Tensor,
    k_scales: Tensor,
    v_in: Tensor,
    v_out: Tensor,
    v_scales: Tensor,
    batch_size: int,
    offset: int,
    width: int,
    page_size: int,
    cache_seqlens: Tensor | None,
    block_table: Tensor | None,
    wbits: int,
) -> None:
    """Dequantize keys and values; in pages, all tokens before this step, whatever offset and width are.

    Args:
        k_in: [B, S, H, D] uint8, or [B, S, H, D / 2] in 4 bits.
        k_out: [B, S, H, D] fp16, written.
        k_scales: [B, S, H, D / 32] fp16.
        v_in: like `k_in`.
        v_out: like `k_out`.
        v_scales: like `k_scales`.
        batch_size: rows, without pages.
        offset: first token of each row, without pages.
        width: tokens, without pages.
        page_size: tokens per page; 0: no pages.
        cache_seqlens: [sequences] int32 tokens to dequantize, or nothing without pages.
        block_table: [sequences, pages] int32, or nothing without pages.
        wbits: 4; 6, for keys in 8 and values in 4 bits; or 8.

    Raises:
        RuntimeError: a dtype, a shape, a device, a range or (CPU tensors only) a page does not fit.
    """
    sides = _sides((k_out, k_in, k_scales), (v_out, v_in, v_scales), wbits)
    rows, tables = (batch_size, offset, width), (cache_seqlens, block_table)
    chosen = _chosen(k_out.shape, k_out.device, rows, page_size, tables, is_new=False)
    for side in sides:
        side.dequantize(chosen)


@extension
def count_match(a: Tensor, b: Tensor, max_a: int) -> int:
    """Count the leading elements that two rows share.

    Args:
        a: [1, n] int64 on a CPU.
        b: [1, m] int64 on a CPU.
        max_a: elements of a that count, at most n.

    Raises:
        RuntimeError: a dtype, a shape or max_a does not fit.
    """
    check_tensor("a", a, torch.int64, (1, "n"))
    check_tensor("b", b, torch.int64, (1, "m"))
    check_together(a, b=b)
    if not 0 <= max_a <= a.shape[1]:
        raise ValueError(f"max_a must be from 0 to {a.shape[1]}, got {max_a}")
    length = min(max_a, b.shape[1])
    differ = (a[0, :length] != b[0, :length]).nonzero()
    return int(differ[0]) if differ.numel() else length


@extension
def cache_rotate(cache: Tensor, order: Tensor, temp: Tensor) -> None:
    """Move pages round in a ring: page order[i] becomes page order[i + 1], the last one what the first one was.

    Args:
        cache: [pages, ...] of any dtype, contiguous, changed.
        order: [n] int32 pages.
        temp: contiguous, as many bytes as a page, overwritten.

    Raises:
        RuntimeError: a dtype, a shape, a device or a page does not fit.
    """
    check_tensor("order", order, torch.int32, ("n",))
    check_together(cache, temp=temp)
    if not cache.dim() or not cache.is_contiguous() or not temp.is_contiguous():
        raise ValueError(f"cache and temp must be contiguous, got strides {cache.stride()} and {temp.stride()}")
    pages = order.tolist()
    for page in pages:
        if not 0 <= page < cache.shape[0]:
            raise ValueError(f"order must hold pages below {cache.shape[0]}, got {page}")
    if not pages:
        return
    if temp.nbytes * cache.shape[0] != cache.nbytes:
        raise ValueError(f"temp must hold a page of {cache.nbytes // cache.shape[0]} bytes, got {temp.nbytes}")
    kept = temp.view(-1).view(torch.uint8)
    flat = cache.view(cache.shape[0], -1).view(torch.uint8)
    kept.copy_(flat[pages[0]])
    for target, source in pairwise(pages):
        flat[target].copy_(flat[source])
    flat[pages[-1]].copy_(kept)
