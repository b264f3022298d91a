"""Plan: which heads, columns and rows of a model each GPU holds; made of numbers, before anything is loaded.

The order of the decisions is ExLlamaV2's. Key-value heads go by memory, and query heads follow their key-value head.
What cache and attention take is subtracted. By the memory that is left go the MLP's columns (whole blocks of 128), the
columns of the residual stream that a matrix cut along its outputs computes, and the rows of vocabulary (both by 32).
A GPU may own no heads and still own MLP columns, so any number of GPUs serves any number of heads.

Memory is counted in bytes, where ExLlamaV2 rounds down to MiB per layer, and heads that do not fit move on: while the
heads of a GPU need more than it has, the one with the most room takes over one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeAlias

from qinfer.errors import PlanError
from qinfer.parallel.split import integer_split

GB = 1 << 30
MLP_STEP = 128  # the largest common group size, so that parts keep whole groups
COLUMN_STEP = 32  # EXL2 packs columns of outputs in words of up to 32
MLP_MINIMUM, RESIDUAL_MINIMUM, VOCAB_MINIMUM = 2, 8, 16  # in steps; less is not worth a kernel launch

Span: TypeAlias = tuple[int, int]  # from, to


@dataclass(frozen=True)
class Sizes:
    """The numbers of a model that decide how it may be cut, and the bytes of its parts."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    mlp_size: int
    vocab_size: int
    attention_bytes: int  # q, k, v, o of all layers
    mlp_bytes: int  # gate, up, down of all layers
    vocab_bytes: int  # embedding and head
    norm_bytes: int = 0  # on every GPU

    def cache_bytes(self, tokens: int, bytes_per_element: float) -> int:
        """Return what keys and values of so many tokens take in all layers."""
        return int(2 * self.num_layers * self.num_kv_heads * self.head_dim * tokens * bytes_per_element)


@dataclass(frozen=True)
class Share:
    """What one rank holds."""

    gpu: int  # index in the list of memory sizes
    kv_heads: Span
    q_heads: Span
    mlp: Span  # columns of gate and up, rows of down
    residual: Span  # columns of o and down where these are cut along their outputs
    vocab: Span  # rows of the embedding, columns of the head
    weight_bytes: int
    cache_bytes: int
    budget: int  # bytes

    @property
    def nbytes(self) -> int:
        """Weights and cache together."""
        return self.weight_bytes + self.cache_bytes


@dataclass(frozen=True)
class Plan:
    """The shares of all ranks, in the order of the ranks."""

    sizes: Sizes
    shares: tuple[Share, ...]

    @classmethod
    def make(
        cls, sizes: Sizes, gpus: Sequence[float], *, cache_tokens: int = 0, bytes_per_element: float = 2.0
    ) -> Plan:
        """Divide a model among GPUs.

        Args:
            sizes: The model.
            gpus: GB (2^30 bytes) that may be used of each GPU; one of 0 is left out and is no rank.
            cache_tokens: Tokens that the cache shall hold.
            bytes_per_element: Bytes of a number in the cache, 2 for fp16.

        Raises:
            PlanError: No GPU has memory, or the model does not fit; the text says by how much.
        """
        if not gpus or not all(0 <= gb < 1 << 20 for gb in gpus) or not any(gpus):
            raise PlanError(f"gpus must be GB per GPU, at least 0 and not all 0, got {list(gpus)}")
        ranks = [gpu for gpu, gb in enumerate(gpus) if gb]
        budgets = [int(gpus[gpu] * GB) for gpu in ranks]
        cache = sizes.cache_bytes(cache_tokens, bytes_per_element)
        heads = _place_heads(sizes, budgets, cache + sizes.attention_bytes)
        used = [(cache + sizes.attention_bytes) * count // sizes.num_kv_heads for count in heads]
        left = [max(0, budget - needed) for budget, needed in zip(budgets, used, strict=True)]
        if not any(left):
            raise PlanError(
                f"attention and cache take {_gb(sum(used))} of {_gb(sum(budgets))} and leave no room for the MLP; "
                "more memory or a shorter cache would help"
            )
        spans = (
            _spans(heads),
            _spans([count * (sizes.num_heads // sizes.num_kv_heads) for count in heads]),
            _columns(sizes.mlp_size, left, MLP_STEP, MLP_MINIMUM),
            _columns(sizes.hidden_size, left, COLUMN_STEP, RESIDUAL_MINIMUM),
            _columns(sizes.vocab_size, left, COLUMN_STEP, VOCAB_MINIMUM),
        )
        shares = []
        for rank, (kv, q, mlp, residual, vocab) in enumerate(zip(*spans, strict=True)):
            weights = sizes.norm_bytes + _part(sizes.attention_bytes, kv, sizes.num_kv_heads)
            weights += _part(sizes.mlp_bytes, mlp, sizes.mlp_size) + _part(sizes.vocab_bytes, vocab, sizes.vocab_size)
            held = _part(cache, kv, sizes.num_kv_heads)
            shares.append(Share(ranks[rank], kv, q, mlp, residual, vocab, weights, held, budgets[rank]))
        plan = cls(sizes, tuple(shares))
        plan.check_memory()
        return plan

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.shares)

    def check_memory(self) -> None:
        """Raise PlanError if a GPU is to hold more than it may."""
        over = [share for share in self.shares if share.nbytes > share.budget]
        if over:
            texts = (f"GPU {share.gpu} would hold {_gb(share.nbytes)} of {_gb(share.budget)}" for share in over)
            total = f"{_gb(sum(s.nbytes for s in self.shares))} of {_gb(sum(s.budget for s in self.shares))}"
            raise PlanError(f"the model does not fit: {', '.join(texts)}; all GPUs together {total}")

    def check_ranks(self, size: int | None) -> None:
        """Raise PlanError unless there is one process per rank; None: they are yet to be started."""
        if size not in (None, self.size):
            raise PlanError(f"gpus gives memory to {self.size} ranks, but {size} were started; both must be the same")

    def __str__(self) -> str:
        head = ("GPU", "KV heads", "Q heads", "MLP", "residual", "vocabulary", "weights", "cache", "of")
        rows = [
            (
                str(share.gpu),
                *map(_width, (share.kv_heads, share.q_heads, share.mlp, share.residual, share.vocab)),
                *map(_gb, (share.weight_bytes, share.cache_bytes, share.budget)),
            )
            for share in self.shares
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
        return "\n".join(lines)


def _place_heads(sizes: Sizes, budgets: Sequence[int], total: int) -> list[int]:
    """Give KV heads by memory, then move single heads away from where they do not fit."""
    heads = integer_split(sizes.num_kv_heads, budgets)

    def room(rank: int) -> int:
        """Bytes that are left; below zero: that are missing."""
        return budgets[rank] - total * heads[rank] // sizes.num_kv_heads

    # A move only ever goes where it fits, so that it never has to be taken back.
    for _ in range(sizes.num_kv_heads * len(budgets)):
        tightest = min((rank for rank in range(len(budgets)) if heads[rank]), key=room)
        widest = max(range(len(budgets)), key=room)
        if room(tightest) >= 0 or room(widest) < -(-total // sizes.num_kv_heads):
            break
        heads[tightest] -= 1
        heads[widest] += 1
    return heads


def _columns(total: int, memory: Sequence[int], step: int, minimum: int) -> list[Span]:
    """Divide columns by memory in whole steps; the last step may be a shorter one."""
    units = -(-total // step)
    spans = _spans(integer_split(units, memory, min(minimum, units)))
    return [(min(start * step, total), min(stop * step, total)) for start, stop in spans]


def scaled_spans(spans: Sequence[Span], total: int) -> list[Span]:
    """Divide other columns in about the same shares: cuts move to the next whole block of MLP_STEP below."""
    whole = spans[-1][1]
    if whole == total:
        return list(spans)

    def scaled(cut: int) -> int:
        return total if cut == whole else cut * total // whole // MLP_STEP * MLP_STEP

    return [(scaled(start), scaled(stop)) for start, stop in spans]


def _spans(counts: Sequence[int]) -> list[Span]:
    return list(pairwise(accumulate(counts, initial=0)))


def _part(nbytes: int, span: Span, total: int) -> int:
    """Return the bytes of a span, so that those of neighbours sum to those of both."""
    start, stop = span
    return nbytes * stop // total - nbytes * start // total


def _width(span: Span) -> str:
    return str(span[1] - span[0])


def _gb(nbytes: int) -> str:
    return f"{nbytes / GB:.2f} GB" if nbytes >= GB else f"{nbytes / (1 << 20):.2f} MB"
