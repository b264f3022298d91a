"""One step of a decoder as tensors: which tokens, where they stand, where their keys go and what they may see.

All fields are views of one flat int32 buffer, so a step costs one copy to the device, and a captured graph is fed by
copying the buffer of a batch of the same sizes over its own. Order of the fields in the buffer, each starting at a
multiple of 16 bytes (kernels are specialised on pointer alignment, which must not change with T):

    token_ids [T] · positions [T] · slots [T] · adapters [T] · query_starts [B + 1] · context_lens [B] · logit_rows [R]
    · page_table [B, W]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 4  # int32 elements in 16 bytes


class Room(NamedTuple):
    """How many tokens, sequences and rows of logits a step has, padding included."""

    tokens: int
    sequences: int
    logits: int

    @classmethod
    def of_rows(cls, count: int) -> Room:
        """Return the room of a step in which each sequence computes one token."""
        return cls(count, count, count)

    @classmethod
    def of_pieces(cls, pieces: Sequence[Piece]) -> Room:
        """Return what pieces take without padding."""
        return cls(sum(len(piece.token_ids) for piece in pieces), len(pieces), len(logit_rows(pieces)))


@dataclass(frozen=True)
class Piece:
    """The tokens of one sequence that a step processes."""

    token_ids: Sequence[int]  # the new tokens, at least one
    start: int  # position of the first of them = number of tokens already in the cache
    # Page i holds positions i * page_size ...; must reach the last new token, may reach further. -1 stands for one that
    # no layer sees any more.
    pages: Sequence[int]
    wants_logits: Literal["all", "last", "none"]
    adapter: int = -1  # slot of the adapter (models/lora.py) that it runs with; -1: none


def _shapes(T: int, B: int, W: int, R: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every field in buffer order."""
    return {
        "token_ids": (T,),
        "positions": (T,),
        "slots": (T,),
        "adapters": (T,),
        "query_starts": (B + 1,),
        "context_lens": (B,),
        "logit_rows": (R,),
        "page_table": (B, W),
    }


def _offsets(shapes: dict[str, tuple[int, ...]]) -> list[int]:
    """Return where each field starts in the buffer, and the length of the buffer last."""
    return list(accumulate((-(-prod(shape) // _ALIGNMENT) * _ALIGNMENT for shape in shapes.values()), initial=0))


@dataclass(frozen=True)
class Batch:
    """One step; all tensors int32 on the device of the model."""

    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    slots: Tensor  # [T] page * page_size + offset where the token's key goes; -1: nowhere
    adapters: Tensor  # [T] slot of the adapter of the token's sequence; -1: none
    query_starts: Tensor  # [B+1] sequence b owns tokens query_starts[b] ... query_starts[b+1] - 1
    context_lens: Tensor  # [B] tokens of the sequence including the new ones; 0: a padding row
    logit_rows: Tensor  # [R] tokens whose logits are wanted, ascending
    page_table: Tensor  # [B, W] entries beyond a sequence's last page, and behind its windows, are not to be read
    buffer: Tensor  # [...] everything above
    max_query_len: int  # longest piece
    has_adapters: bool = False  # whether `adapters` is looked at, as it need not be where all are -1

    @classmethod
    def views(cls, buffer: Tensor, *, T: int, B: int, W: int, R: int, max_query_len: int) -> Batch:
        """Lay the fields over a buffer without copying.

        Args:
            buffer: [`Batch.buffer_length(T=T, B=B, W=W, R=R)`] int32, on any device.
            T: number of tokens.
            B: number of sequences.
            W: pages per sequence in the page table.
            R: number of wanted logit rows.
            max_query_len: longest piece, in tokens.

        Raises:
            ValueError: the buffer has another length or dtype.
        """
        shapes = _shapes(T, B, W, R)
        offsets = _offsets(shapes)
        if buffer.dtype != torch.int32 or tuple(buffer.shape) != (offsets[-1],):
            raise ValueError(f"buffer must be [{offsets[-1]}] int32, got {list(buffer.shape)} {buffer.dtype}")
        fields = {
            name: buffer[offset : offset + prod(shape)].view(shape)
            for (name, shape), offset in zip(shapes.items(), offsets, strict=False)
        }
        return cls(**fields, buffer=buffer, max_query_len=max_query_len, has_adapters=False)

    @staticmethod
    def buffer_length(*, T: int, B: int, W: int, R: int) -> int:
        """Return how many int32 a batch of these sizes takes."""
        return _offsets(_shapes(T, B, W, R))[-1]

    @classmethod
    def build(
        cls,
        pieces: Sequence[Piece],
        *,
        page_size: int,
        device: torch.device | str,
        pad_to: Room | None = None,
        table_width: int | None = None,
    ) -> Batch:
        """Join pieces of several sequences into one step.

        Args:
            pieces: at least one, each of its own sequence.
            page_size: tokens per page of the cache.
            device: where the fields go.
            pad_to: sizes to pad to. Tokens behind those of the pieces get id 0, position 0 and slot -1; they belong to
                sequences of context length 0, one to each and the rest to the last. Rows of logits behind the wanted
                ones are of such tokens, or of the last token of all.
            table_width: W; None takes what the longest sequence needs.

        Returns:
            A batch whose T, B and R are the pieces' totals, or those of `pad_to`.

        Raises:
            ValueError: a piece is empty, starts below 0 or has too few pages, or the padding is impossible.
        """
        if len(pieces) == 0:
            raise ValueError("a batch must have at least one piece, got none")
        needed = [_num_pages(index, piece, page_size) for index, piece in enumerate(pieces)]
        lengths = [len(piece.token_ids) for piece in pieces]
        rows = logit_rows(pieces)
        if pad_to is not None:
            lengths, rows = padded(lengths, rows, pad_to)
        width = max(needed) if table_width is None else table_width
        if width < max(needed):
            raise ValueError(f"table_width must be at least {max(needed)} for these pieces, got {width}")
        sizes = {"T": sum(lengths), "B": len(lengths), "W": width, "R": len(rows)}
        device = torch.device(device)
        host = torch.empty(cls.buffer_length(**sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
        batch = cls.views(host, **sizes, max_query_len=max(lengths))
        batch.query_starts.numpy()[:] = [0, *accumulate(lengths)]
        batch.logit_rows.numpy()[:] = rows
        batch.page_table.numpy()[:] = -1
        batch.fill(pieces, page_size)
        # The caching host allocator keeps pinned memory from being reused until the copy is done.
        batch = cls.views(host.to(device, non_blocking=True), **sizes, max_query_len=max(lengths))
        return replace(batch, has_adapters=True) if any(piece.adapter >= 0 for piece in pieces) else batch

    def fill(self, pieces: Sequence[Piece], page_size: int, *, first_row: int = 0, first_token: int = 0) -> None:
        """Write tokens, positions, slots, lengths and pages of pieces into a batch on the host; the rest is padding.

        Args:
            pieces: each of its own sequence.
            page_size: tokens per page of the cache.
            first_row: sequences before the first piece, which stay as they are.
            first_token: tokens of those sequences.
        """
        token_ids, positions, slots = self.token_ids.numpy(), self.positions.numpy(), self.slots.numpy()
        context_lens, page_table, adapters = self.context_lens.numpy(), self.page_table.numpy(), self.adapters.numpy()
        first = first_token
        for row, piece in enumerate(pieces, start=first_row):
            last = first + len(piece.token_ids)
            context_lens[row] = end = piece.start + len(piece.token_ids)
            num_pages = _num_pages(row, piece, page_size)
            page_table[row, :num_pages] = piece.pages[:num_pages]
            token_ids[first:last] = piece.token_ids
            positions[first:last] = np.arange(piece.start, end)
            adapters[first:last] = piece.adapter
            page, offset = np.divmod(positions[first:last], page_size)
            slots[first:last] = page_table[row, page] * page_size + offset
            first = last
        token_ids[first:] = 0
        positions[first:] = 0
        slots[first:] = -1
        adapters[first:] = -1
        context_lens[first_row + len(pieces) :] = 0


def _num_pages(index: int, piece: Piece, page_size: int) -> int:
    """Return how many pages a piece touches or sees, after checking that it has them."""
    if len(piece.token_ids) == 0:
        raise ValueError(f"piece {index} must have at least one token, got none")
    if piece.start < 0:
        raise ValueError(f"piece {index} must start at 0 or later, got {piece.start}")
    end = piece.start + len(piece.token_ids)
    needed = -(-end // page_size)
    if len(piece.pages) < needed:
        raise ValueError(
            f"piece {index} must have {needed} pages of {page_size} tokens for {end} tokens, got {len(piece.pages)}"
        )
    written = min(piece.pages[piece.start // page_size : needed])
    if written < 0 or min(piece.pages[:needed]) < -1:
        raise ValueError(
            f"pages of piece {index} must be at least 0, or -1 before its first token, got {[*piece.pages[:needed]]}"
        )
    return needed


def padded(lengths: Sequence[int], rows: Sequence[int], room: Room) -> tuple[list[int], list[int]]:
    """Return the tokens per sequence and the rows of logits with padding up to a room, laid out as `Batch.build` says.

    Raises:
        ValueError: the room is too small, or has tokens to spare and no sequence.
    """
    used = Room(sum(lengths), len(lengths), len(rows))
    if any(has > may for has, may in zip(used, room, strict=True)):
        raise ValueError(f"pad_to must have room for {used}, got {room}")
    spare, others = room.tokens - used.tokens, room.sequences - used.sequences
    if spare and not others:
        raise ValueError(f"pad_to must have a sequence for {spare} tokens of padding, got {room}")
    padding = [1] * min(spare, others) + [0] * max(0, others - spare)
    if spare > others:
        padding[-1] += spare - others
    behind = (min(used.tokens + i, room.tokens - 1) for i in range(room.logits - used.logits))
    return [*lengths, *padding], [*rows, *behind]


def logit_rows(pieces: Sequence[Piece]) -> list[int]:
    """Return the rows of the pieces' tokens whose logits are wanted."""
    rows: list[int] = []
    first = 0
    for index, piece in enumerate(pieces):
        last = first + len(piece.token_ids)
        if piece.wants_logits not in ("all", "last", "none"):
            raise ValueError(f"piece {index} must want 'all', 'last' or 'none' logits, got {piece.wants_logits!r}")
        rows += {"all": range(first, last), "last": range(last - 1, last), "none": range(0)}[piece.wants_logits]
        first = last
    return rows
