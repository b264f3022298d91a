"""From logits to token ids: penalties and bans, temperature, filters, one draw.

The order is that of `docs/sampling.md`. Temperature, top-k, top-p, min-p and the draw are one op
(`kernels/sample.py`); rows that ask for anything else are sorted and go through `engine/filters.py`, in torch, on the
same device. A row's id depends on its logits and its `Row` alone, so a request gets the same tokens in any company.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qinfer.engine import filters
from qinfer.engine.choices import GREEDY_NUMBERS, check_table, choice_of, choose
from qinfer.engine.constraints import Words, keep_allowed
from qinfer.engine.params import SamplingParams
from qinfer.engine.penalties import Changes, Edits
from qinfer.kernels.edit_logits import edit_logits
from qinfer.kernels.greedy import greedy
from qinfer.kernels.token_weights import ONE, draw, keep_top_k, keep_top_p, token_weights

__all__ = [
    "Logprobs",
    "Row",
    "SamplerState",
    "SamplingParams",
    "UniformStream",
    "guide",
    "logprobs",
    "sample",
]

_LOG2_E = math.log2(math.e)
_WORDS = 8  # of 64 bits in a digest


class UniformStream:
    """Random numbers of one request, addressed by a counter: number i depends on the seed and on i alone."""

    def __init__(self, seed: int | None) -> None:
        """Take the seed, or a fresh one from the operating system when it is None."""
        self.seed = secrets.randbits(64) if seed is None else seed
        self._key = self.seed.to_bytes(8, "little")
        self._block, self._numbers = -1, (0.0,)

    def at(self, step: int) -> float:
        """Return number `step`, uniform over the multiples of 2^-53 in [0, 1): word step % 8 of digest step // 8."""
        block, place = divmod(step, _WORDS)
        if block != self._block:
            digest = hashlib.blake2b(block.to_bytes(8, "little"), key=self._key).digest()
            self._numbers = tuple((word >> 11) * 2.0**-53 for word in struct.unpack(f"<{_WORDS}Q", digest))
            self._block = block
        return self._numbers[place]


class Mirostat:
    """Mirostat's bound on the surprise of a token, in bits, before each step of one request.

    It follows from the tokens that were drawn, so it lives where they are drawn: on the device, without a transfer.
    """

    def __init__(self, tau: float) -> None:
        """Begin with twice the surprise that is aimed at."""
        self._bounds: list[float | Tensor] = [2 * tau]

    def bound(self, step: int, device: torch.device) -> Tensor:
        """Return the bound of a step, [] fp64."""
        return torch.as_tensor(self._bounds[step], dtype=torch.float64, device=device)

    def set_next(self, step: int, bound: Tensor) -> None:
        """Keep the bound of the step after `step`; what was kept for later steps is gone."""
        self._bounds[step + 1 :] = [bound]


class Row(NamedTuple):
    """What one row of logits is sampled with."""

    params: SamplingParams
    uniform: float  # the random number of this step
    edits: Edits | None = None
    mask: Tensor | None = None  # [V] bool on the device of the logits, True where a token may be drawn
    mirostat: tuple[Mirostat, int] | None = None  # with the number of the step
    words: Words | None = None  # bits of the only ids that a constraint lets be drawn


class SamplerState:
    """What sampling remembers of one request: its random numbers, the ids that penalties look at, mirostat's bound."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        """Begin after the prompt."""
        self.params = params
        self.uniforms = UniformStream(params.seed)
        self.is_fixed = params.is_fixed
        self.numbers = _plain_numbers(params, 0.0) if self.is_fixed else ()
        self._changes = Changes(params, prompt)
        self._mirostat = Mirostat(params.mirostat_tau) if params.mirostat_tau and params.temperature else None

    def row(
        self,
        generated: Sequence[int],
        *,
        banned: Sequence[int] = (),
        mask: Tensor | None = None,
        words: Words | None = None,
    ) -> Row:
        """Return what the next token is sampled with.

        Args:
            generated: The ids after the prompt. It may only have grown since the last call, `rewind` aside. Where
                `params.uses_history` is False, only its length matters.
            banned: Ids that may not be drawn in this step.
            mask: [V] bool on the device of the logits, True where a token may be drawn in this step; None allows all.
            words: [ceil(V / 32)] bits of the ids that may be drawn in this step; None allows all.
        """
        step = len(generated)
        uniform = self.uniforms.at(step) if self.params.temperature else 0.0
        mirostat = None if self._mirostat is None else (self._mirostat, step)
        return Row(self.params, uniform, self._changes.at(generated, banned), mask, mirostat, words)

    def rewind(self, num_generated: int) -> None:
        """Forget all generated ids after the first `num_generated`."""
        self._changes.rewind(num_generated)


def sample(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Choose one token per row, each row by its own parameters.

    A row with NaN, with +inf or without any finite logit gets the id -1 and leaves the other rows alone; -inf is a
    token that cannot be drawn. Everything stays on the device of the logits, flags included, so that reading the
    result is the only transfer back in a step.

    Args:
        logits: [R, V] fp32; not changed.
        rows: R parameters and uniform numbers.

    Returns:
        [R] int64 ids, -1 where the logits are not finite or no token may be drawn.
    """
    if logits.ndim != 2 or logits.shape[0] != len(rows):
        raise ValueError(f"logits must be [{len(rows)}, V], one row per request, got {list(logits.shape)}")
    logits = _edited(logits, rows)
    if all(row.params.temperature == 0 for row in rows):
        return greedy(logits)
    plain = [i for i, row in enumerate(rows) if row.params.is_plain]
    if len(plain) == len(rows):
        return _sample_plain(logits, rows)
    if not plain:
        return _sample_sorted(logits, rows)
    special = [i for i, row in enumerate(rows) if not row.params.is_plain]
    ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for part, body in ((plain, _sample_plain), (special, _sample_sorted)):
        (index,) = _to_device(logits.device, np.array(part))
        ids[index] = body(logits[index], [rows[i] for i in part])
    return ids


class Logprobs(NamedTuple):
    """Natural logarithms of probabilities, on the device."""

    chosen: Tensor  # [R] fp32
    top_ids: Tensor  # [R, n] int64, likeliest first, ties to the lower id
    top: Tensor  # [R, n] fp32


def logprobs(logits: Tensor, ids: Tensor, top_n: int) -> Logprobs:
    """Return log softmax(logits) of chosen tokens and of the likeliest ones: what the model says, before any option.

    Args:
        logits: [R, V] fp32.
        ids: [R] int64; -1 gives NaN.
        top_n: How many of the likeliest tokens, 0 to V.

    Returns:
        Logprobs of R rows.
    """
    vocabulary = logits.shape[-1]
    if ids.shape != logits.shape[:1] or not 0 <= top_n <= vocabulary:
        asked = f"ids {list(ids.shape)} and top_n={top_n}"
        raise ValueError(f"logits {list(logits.shape)} need ids [R] and top_n between 0 and V, got {asked}")
    exact = logits.double()
    below = exact - exact.amax(-1, keepdim=True)
    logs = below - below.exp().sum(-1, keepdim=True).log()
    chosen = logs.gather(-1, ids.clamp(min=0)[:, None]).squeeze(-1)
    # Integers in the order wanted, all different: larger logit first, then lower id.
    bits = (logits + 0.0).contiguous().view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() * (1 << 20)
    top_ids = (keys - torch.arange(vocabulary, device=logits.device)).topk(top_n, dim=-1).indices
    return Logprobs(torch.where(ids < 0, math.nan, chosen).float(), top_ids, logs.gather(-1, top_ids).float())


def guide(positive: Tensor, negative: Tensor, scale: float | Tensor) -> Tensor:
    """Return negative + scale * (positive - negative): classifier-free guidance, see engine/guidance.py.

    Args:
        positive: [R, V] fp32, logits after the prompt that is wanted.
        negative: [R, V] fp32, logits after the prompt that is not.
        scale: 1 gives the positive distribution, more than 1 moves away from the negative one; [R, 1], or one for all.

    Returns:
        [R, V] fp32; -inf where either gives a token no chance.
    """
    if positive.shape != negative.shape:
        raise ValueError(f"negative must be {list(positive.shape)} as positive is, got {list(negative.shape)}")
    if not isinstance(scale, Tensor) and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    mixed = negative + scale * (positive - negative)
    return torch.where((positive == -math.inf) | (negative == -math.inf), -math.inf, mixed)


def _sample_plain(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Draw by temperature, top-k, top-p and min-p: one op."""
    return sample_table(logits, _plain_table([(row.params, row.uniform) for row in rows]))


def sample_table(logits: Tensor, table: NDArray[np.float64]) -> Tensor:
    """Choose one token per row by numbers on the host.

    Args:
        logits: [R, V] fp32; not changed.
        table: [R, 5] of `sample_rows`; it may change once this returns.

    Returns:
        [R] int64 ids, -1 where the logits are not finite.

    Raises:
        ValueError: The table has other rows than the logits.
    """
    check_table(logits, table)
    choice = choice_of(table)
    return choose(choice, logits, None if choice == "greedy" else _to_device(logits.device, table)[0])


def _plain_table(rows: Sequence[tuple[SamplingParams, float]]) -> NDArray[np.float64]:
    """Return the table of `sample_rows` for parameters and uniform numbers."""
    return np.array([_plain_numbers(params, uniform) for params, uniform in rows], np.float64)


def _plain_numbers(params: SamplingParams, uniform: float) -> tuple[float, ...]:
    """Return a row of `sample_rows`' table."""
    if params.temperature == 0:
        return GREEDY_NUMBERS
    return _rate(params.temperature), params.top_k, params.top_p, max(1, math.ceil(params.min_p * ONE)), uniform


def _rate(temperature: float) -> float:
    """Return how many factors of two a logit is worth; below the largest double, so that 0 times it is 0."""
    return _LOG2_E / max(temperature, 1e-300)


def _sample_sorted(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Draw with every option that a row may have; uniform numbers walk tokens from the likeliest."""
    params = [row.params for row in rows]
    late = [p.temperature_last or p.max_temperature > 0 for p in params]
    numbers = [
        (1.0 if is_late else p.temperature, filters.skewed(row.uniform, p.skew), p.smoothing_factor, p.mirostat_eta)
        for row, p, is_late in zip(rows, params, late, strict=True)
    ]
    (table,) = _to_device(logits.device, np.array(numbers))
    temperature, uniform, smoothing, eta = table[:, :, None].unbind(1)
    ordered = (logits + 0.0).sort(dim=-1, descending=True, stable=True)
    below = (ordered.values[:, :1] - ordered.values).double()
    # inf * 0 is NaN, and rows that are not finite are replaced at the end.
    below = torch.where(smoothing > 0, below * below * smoothing, below)
    weights = _filtered(token_weights(below, _LOG2_E / temperature.clamp(min=1e-300)), params)
    bounds = _mirostat_bounds(rows, logits.device)
    if bounds is not None:
        weights = filters.keep_surprise(weights, bounds)
    if any(late):
        weights = _retempered(weights, below, params)
    weights = _excluded(weights, ordered.indices, params)
    place = draw(weights, uniform)[:, None]
    if bounds is not None:
        _follow_surprise(rows, bounds, eta, filters.surprises(weights)[0].gather(-1, place))
    finite = torch.isfinite(logits.amax(-1, keepdim=True))
    ids = ordered.indices.gather(-1, place.clamp(max=logits.shape[-1] - 1))
    # A greedy row is plain, and never comes here.
    return torch.where(finite, ids, -1).squeeze(-1)


def _filtered(weights: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Apply the filters that any row has, in their order; the others of its neighbours change nothing for a row."""
    stages = (
        (keep_top_k, "top_k", 0),
        (keep_top_p, "top_p", 1),
        (filters.keep_top_a, "top_a", 0),
        (filters.keep_min_p, "min_p", 0),
        (filters.keep_tail_free, "tfs", 1),
        (filters.keep_typical, "typical", 1),
    )
    for keep, field, off in stages:
        values = [getattr(p, field) for p in params]
        if any(value != off for value in values):
            (column,) = _to_device(weights.device, np.array(values, np.float64))
            weights = keep(weights, column[:, None])
    return weights


def _retempered(weights: Tensor, below: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Weigh what is left by the temperature of rows whose temperature comes last or follows the entropy."""
    numbers = [(p.temperature_last, p.temperature, p.min_temperature, p.max_temperature, p.temperature_exponent)
               for p in params]  # fmt: skip
    (table,) = _to_device(weights.device, np.array(numbers, np.float64))
    last, fixed, low, high, exponent = table[:, :, None].unbind(1)
    moving = filters.entropy_temperature(weights, low, high, exponent)
    temperature = torch.where(high > 0, moving, fixed).clamp(min=1e-300)
    kept = weights > 0
    nearest = torch.where(kept, below, math.inf).amin(-1, keepdim=True)
    changed = torch.where(kept, token_weights((below - nearest).clamp(min=0), _LOG2_E / temperature), 0)
    return torch.where((last > 0) | (high > 0), changed, weights)


def _excluded(weights: Tensor, ids: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Apply XTC if any row wants it."""
    if all(p.xtc_probability == 0 for p in params):
        return weights
    pairs = [(i, token) for i, p in enumerate(params) for token in p.xtc_protected]
    numbers = np.array([(p.xtc_probability, p.xtc_threshold) for p in params])
    table, places = _to_device(weights.device, numbers, np.array(pairs, np.int64).reshape(-1, 2))
    protected = None
    if pairs:
        protected = torch.zeros_like(weights, dtype=torch.bool)
        protected[places[:, 0], places[:, 1]] = True
        protected = protected.gather(-1, ids)
    probability, threshold = table[:, :, None].unbind(1)
    return filters.exclude_top_choices(weights, probability, threshold, protected)


def _mirostat_bounds(rows: Sequence[Row], device: torch.device) -> Tensor | None:
    """Return [R, 1] fp64, inf for rows without mirostat, or None when no row has it."""
    if all(row.mirostat is None for row in rows):
        return None
    free = torch.full((), math.inf, dtype=torch.float64, device=device)
    bounds = [free if row.mirostat is None else row.mirostat[0].bound(row.mirostat[1], device) for row in rows]
    return torch.stack(bounds)[:, None]


def _follow_surprise(rows: Sequence[Row], bounds: Tensor, eta: Tensor, surprise: Tensor) -> None:
    """Move the bounds of rows with mirostat towards the surprise that they aim at."""
    for i, row in enumerate(rows):
        if row.mirostat is not None:
            state, step = row.mirostat
            state.set_next(step, bounds[i, 0] + eta[i, 0] * (row.params.mirostat_tau - surprise[i, 0]))


def _edited(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Return the logits with every row's changes and mask; the given ones when there are none."""
    edits = [(i, row.edits) for i, row in enumerate(rows) if row.edits is not None]
    masks = [(i, row.mask) for i, row in enumerate(rows) if row.mask is not None]
    words = [(i, row.words) for i, row in enumerate(rows) if row.words is not None]
    if not edits and not masks and not words:
        return logits
    out = logits.clone()
    if edits:
        lengths = [len(edit.ids) for _, edit in edits]
        ids = np.concatenate([edit.ids for _, edit in edits])
        # On a GPU nobody else looks: a wrong id would write into another row.
        if len(ids) and not 0 <= ids.min() <= ids.max() < logits.shape[1]:
            raise ValueError(f"ids must be below {logits.shape[1]}, the vocabulary, got {ids.min()} to {ids.max()}")
        places = np.stack([np.repeat([i for i, _ in edits], lengths), ids], axis=1).astype(np.int32)
        columns = [np.concatenate([edit[column] for _, edit in edits]) for column in (1, 2, 3)]
        changes = np.stack(columns, axis=1).astype(np.float32)
        closed = np.array([row.edits is not None and row.edits.exclusive for row in rows])
        flags, *changed = _to_device(logits.device, closed, places, changes)
        if closed.any():
            out.masked_fill_(flags[:, None], -math.inf)
        edit_logits(logits, out, *changed)
    for i, mask in masks:
        out[i].masked_fill_(~mask, -math.inf)
    if words:
        bits = np.stack([own for _, own in words])
        keep_allowed(out, *_to_device(logits.device, np.array([i for i, _ in words]), bits))
    return out


def _to_device(device: torch.device, *arrays: NDArray[np.generic]) -> list[Tensor]:
    """Bring arrays to a device in one copy."""
    starts = np.cumsum([0, *(-(-array.nbytes // 8) * 8 for array in arrays)]).tolist()
    buffer = np.zeros(starts[-1], np.uint8)
    for start, array in zip(starts, arrays, strict=False):
        buffer[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    moved = torch.from_numpy(buffer).to(device, non_blocking=True)
    return [
        moved[start : start + array.nbytes].view(_TORCH_DTYPES[array.dtype.name]).view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]


_TORCH_DTYPES = {
    "bool": torch.bool,
    "int32": torch.int32,
    "int64": torch.int64,
    "float32": torch.float32,
    "float64": torch.float64,
}
