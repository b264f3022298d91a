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
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGNMENT = 4  # int32 elements in 16 bytes

Ints: TypeAlias = npt.NDArray[np.int32]


class Room(NamedTuple):
    """How many tokens, sequences and rows of logits a step has, padding included, and how long its pieces may be."""

    tokens: int
    sequences: int
    logits: int
    longest: int  # tokens of a piece

    @classmethod
    def of_rows(cls, count: int) -> Room:
        """Return the room of a step in which each sequence computes one token."""
        return cls(count, count, count, 1)

    @classmethod
    def of_pieces(cls, pieces: Sequence[Piece], *, num_streams: int = 0) -> Room:
        """Return what pieces take without padding, behind so many sequences with one token and its logits."""
        lengths = [len(piece.token_ids) for piece in pieces]
        rows = len(logit_rows(pieces))
        return cls(num_streams + sum(lengths), num_streams + len(pieces), num_streams + rows, max(lengths, default=1))

    def holds(self, used: Room) -> bool:
        """Whether there is as much of everything as a step uses."""
        return all(has <= may for has, may in zip(used, self, strict=True))


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
        needed = max(_num_pages(index, piece, page_size) for index, piece in enumerate(pieces))
        used = Room.of_pieces(pieces)
        room = used if pad_to is None else pad_to
        if not room.holds(used):
            raise ValueError(f"pad_to must have room for {used}, got {room}")
        if room.tokens > used.tokens and room.sequences == used.sequences:
            raise ValueError(
                f"pad_to must have a sequence for {room.tokens - used.tokens} tokens of padding, got {room}"
            )
        width = needed if table_width is None else table_width
        if width < needed:
            raise ValueError(f"table_width must be at least {needed} for these pieces, got {width}")
        sizes = {"T": room.tokens, "B": room.sequences, "W": width, "R": room.logits}
        device = torch.device(device)
        host = torch.empty(cls.buffer_length(**sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
        arrays = Arrays(cls.views(host, **sizes, max_query_len=1))
        arrays.page_table[:] = -1
        arrays.fill(pieces, page_size)
        # The caching host allocator keeps pinned memory from being reused until the copy is done.
        batch = cls.views(host.to(device, non_blocking=True), **sizes, max_query_len=room.longest)
        return replace(batch, has_adapters=True) if any(piece.adapter >= 0 for piece in pieces) else batch


class Arrays:
    """The fields of a batch on the host as arrays over the same memory."""

    def __init__(self, batch: Batch) -> None:
        """Look at a batch, whose buffer must be on the host."""
        self.token_ids: Ints = batch.token_ids.numpy()
        self.positions: Ints = batch.positions.numpy()
        self.slots: Ints = batch.slots.numpy()
        self.adapters: Ints = batch.adapters.numpy()
        self.query_starts: Ints = batch.query_starts.numpy()
        self.context_lens: Ints = batch.context_lens.numpy()
        self.logit_rows: Ints = batch.logit_rows.numpy()
        self.page_table: Ints = batch.page_table.numpy()
        self._counting = np.arange(max(len(self.token_ids), len(self.context_lens)) + 1, dtype=np.int32)

    def fill(self, pieces: Sequence[Piece], page_size: int, *, num_streams: int = 0) -> None:
        """Write everything but what belongs to streams, and what lies behind the pages of pieces.

        Args:
            pieces: each of its own sequence; they must fit.
            page_size: tokens per page of the cache.
            num_streams: sequences before the first piece with one token each, whose logits are wanted.
        """
        counting = self._counting
        self.query_starts[: num_streams + 1] = counting[: num_streams + 1]
        self.logit_rows[:num_streams] = counting[:num_streams]
        first = num_streams
        for row, piece in enumerate(pieces, start=num_streams):
            last = first + len(piece.token_ids)
            self.query_starts[row + 1] = last
            self.context_lens[row] = end = piece.start + len(piece.token_ids)
            num_pages = _num_pages(row, piece, page_size)
            self.page_table[row, :num_pages] = piece.pages[:num_pages]
            self.token_ids[first:last] = piece.token_ids
            self.positions[first:last] = positions = np.arange(piece.start, end)
            self.adapters[first:last] = piece.adapter
            page, offset = np.divmod(positions, page_size)
            self.slots[first:last] = self.page_table[row, page] * page_size + offset
            first = last
        rows = logit_rows(pieces)
        num_rows, num_sequences = num_streams + len(rows), num_streams + len(pieces)
        self.logit_rows[num_streams:num_rows] = rows
        self.logit_rows[num_streams:num_rows] += num_streams
        self._pad(first, num_sequences, num_rows)

    def _pad(self, num_tokens: int, num_sequences: int, num_rows: int) -> None:
        """Write padding behind so many tokens, sequences and rows of logits."""
        room = len(self.token_ids)
        starts, rows = self.query_starts[num_sequences + 1 :], self.logit_rows[num_rows:]
        if len(starts):
            np.minimum(self._counting[: len(starts)] + (num_tokens + 1), room, out=starts)
            starts[-1] = room
        np.minimum(np.arange(num_tokens, num_tokens + len(rows)), room - 1, out=rows, casting="unsafe")
        self.token_ids[num_tokens:] = 0
        self.positions[num_tokens:] = 0
        self.slots[num_tokens:] = -1
        self.adapters[num_tokens:] = -1
        self.context_lens[num_sequences:] = 0


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
