"""From logits to token ids: temperature, then top-k, then top-p, then min-p, then one draw.

Weights instead of probabilities: w_i = round(exp((x_i − max x) / temperature) · 2^44), an int64. Integer sums do not
depend on the order in which a device adds, so a row draws the same token alone and in any batch. A probability is
w_i / Σw; a filter sets weights to zero, and what is left renormalises by its own sum. The draw is the inverse CDF, in
the order of the ids: the first i with w_0 + … + w_i > floor(u · Σw), u uniform in [0, 1).

Limits: V < 2^19, because Σw has to stay below 2^63. Tokens less likely than 2^-45 of the likeliest are never drawn.
"""

from __future__ import annotations

import hashlib
import math
import operator
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# The weight of the likeliest token.
ONE = 1 << 44


@dataclass(frozen=True)
class SamplingParams:
    """How one request chooses its tokens and when it stops.

    Args:
        temperature: Divides the logits; 0 takes the likeliest token, ties to the lowest id.
        top_k: Keeps the k likeliest tokens; 0 keeps all.
        top_p: Keeps the fewest likeliest tokens whose probabilities reach top_p together; 1 keeps all.
        min_p: Keeps tokens at least min_p times as likely as the likeliest; 0 keeps all.
        seed: Same request and seed, same tokens, alone or in a batch; None draws a fresh seed.
        max_new_tokens: Most tokens to generate.
        stop: A string, or several, that end the text; the text is cut before them.
        stop_ids: Token ids that end the text besides the model's own; their text is not emitted.
        ignore_eos: Whether to go on after the model's own end-of-sequence ids.

    Raises:
        ValueError: If a value is outside its range.
        TypeError: If a value has the wrong type.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_new_tokens: int = 256
    stop: str | Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Check every field; lists become tuples."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_ids", _integers("stop_ids", self.stop_ids))
        for field, value in (("top_k", self.top_k), ("max_new_tokens", self.max_new_tokens), ("seed", self.seed or 0)):
            _integers(field, (value,))
        if not all(isinstance(text, str) for text in stop):
            raise TypeError(f"stop must be a string or a list of strings, got {self.stop!r}")
        _require("temperature", self.temperature, 0 <= self.temperature < math.inf, "finite and at least 0")
        _require("top_k", self.top_k, self.top_k >= 0, "at least 0, where 0 keeps all tokens")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1, where 1 keeps all tokens")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1, where 0 keeps all tokens")
        _require("seed", self.seed, self.seed is None or 0 <= self.seed < 1 << 64, "None or in 0..2**64 - 1")
        _require("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1")
        _require("stop", self.stop, "" not in stop, "made of strings that are not empty")
        _require("stop_ids", self.stop_ids, all(i >= 0 for i in self.stop_ids), "made of ids that are at least 0")


def _integers(field: str, values: Iterable[object]) -> tuple[int, ...]:
    """Return the values as ints, or raise a TypeError that names the field."""
    values = tuple(values)
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{field} must hold integers, got {value!r}")
    return tuple(operator.index(value) for value in values)  # type: ignore[arg-type]


def _require(field: str, value: object, legal: bool, rule: str) -> None:
    """Raise a ValueError that names the field and what is legal."""
    if not legal:
        raise ValueError(f"{field} must be {rule}, got {value!r}")


class UniformStream:
    """Random numbers of one request, addressed by a counter: number i depends on the seed and on i alone."""

    def __init__(self, seed: int | None) -> None:
        """Take the seed, or a fresh one from the operating system when it is None."""
        self.seed = secrets.randbits(64) if seed is None else seed
        self._key = self.seed.to_bytes(8, "little")

    def at(self, step: int) -> float:
        """Return number `step`, uniform over the multiples of 2^-53 in [0, 1)."""
        digest = hashlib.blake2b(step.to_bytes(8, "little"), digest_size=8, key=self._key).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


class Row(NamedTuple):
    """What one row of logits is sampled with: the request's parameters and its uniform number of this step."""

    params: SamplingParams
    uniform: float


def keep_top_k(weights: Tensor, top_k: Tensor) -> Tensor:
    """Keep the first top_k weights of each row.

    Args:
        weights: [R, V] int64, descending.
        top_k: [R, 1]; 0 keeps all.

    Returns:
        [R, V] int64, the others zero.
    """
    position = torch.arange(weights.shape[-1], device=weights.device)
    return torch.where((position < top_k) | (top_k == 0), weights, 0)


def keep_top_p(weights: Tensor, top_p: Tensor) -> Tensor:
    """Keep the shortest prefix of each row whose share of the row's sum reaches top_p.

    Args:
        weights: [R, V] int64, descending.
        top_p: [R, 1] fp64; 1 keeps all.

    Returns:
        [R, V] int64, the others zero.
    """
    reached = weights.cumsum(-1)
    before = (reached - weights).double()
    return torch.where((before < top_p * reached[:, -1:].double()) | (top_p >= 1), weights, 0)


def keep_min_p(weights: Tensor, min_p: Tensor) -> Tensor:
    """Keep the weights of at least min_p times the largest of their row; the order does not matter.

    Args:
        weights: [R, V] int64.
        min_p: [R, 1] fp64; 0 keeps all.

    Returns:
        [R, V] int64, the others zero.
    """
    return torch.where(weights.double() >= min_p * weights.amax(-1, keepdim=True).double(), weights, 0)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return the first index whose cumulative weight exceeds floor(uniform · sum).

    Args:
        weights: [R, V] int64, in any order; each row has a positive sum.
        uniform: [R, 1] fp64, at most 1 - 2^-53.

    Returns:
        [R] int64; an index of zero weight is never drawn.
    """
    reached = weights.cumsum(-1)
    # A uniform of at most 1 - 2^-53 keeps the product below the sum, rounded as it is.
    target = (uniform * reached[:, -1:].double()).long()
    return torch.searchsorted(reached, target, right=True).squeeze(-1)


def sample(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Choose one token per row, each row by its own parameters.

    A row with NaN, with +inf or without any finite logit gets the id -1 and leaves the other rows alone; -inf is a
    token that cannot be drawn. Everything stays on the device of the logits, flags included, so that reading the
    result is the only transfer of a step.

    Args:
        logits: [R, V] fp32.
        rows: R parameters and uniform numbers.

    Returns:
        [R] int64 ids, -1 where the logits are not finite.
    """
    if logits.ndim != 2 or logits.shape[0] != len(rows):
        raise ValueError(f"logits must be [{len(rows)}, V], one row per request, got {list(logits.shape)}")
    peak, best = logits.max(dim=-1, keepdim=True)
    finite = torch.isfinite(peak)
    if all(row.params.temperature == 0 for row in rows):
        return torch.where(finite, best, -1).squeeze(-1)
    table = [(r.params.temperature, r.params.top_k, r.params.top_p, r.params.min_p, r.uniform) for r in rows]
    columns = torch.tensor(table, dtype=torch.float64).to(logits.device, non_blocking=True)
    temperature, top_k, top_p, min_p, uniform = columns[:, :, None].unbind(1)
    greedy = temperature == 0
    # A row that is not finite gets weights without meaning here, and its id is replaced at the end.
    below = (logits - peak).double() / torch.where(greedy, 1, temperature)
    weights = (below.exp() * ONE).round().long()
    # Sorting is the dear part, and only these two filters look at the order.
    if any(row.params.top_k or row.params.top_p < 1 for row in rows):
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        kept = keep_top_p(keep_top_k(weights.gather(-1, order), top_k), top_p)
        weights = torch.zeros_like(weights).scatter_(-1, order, kept)
    drawn = draw(keep_min_p(weights, min_p), uniform)
    return torch.where(finite, torch.where(greedy, best, drawn[:, None]), -1).squeeze(-1)
