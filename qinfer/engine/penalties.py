"""Which logits a request changes in a step, and by how much: repetition, frequency, presence, DRY, biases and bans.

All of it depends on ids alone, so it is computed on the host, in numpy, and reaches the device as a short list of
changes (`kernels/edit_logits.py`). A step costs what the new id costs and a few operations on arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qinfer.engine.params import SamplingParams

Ids = NDArray[np.int32]
Floats = NDArray[np.float64]


class Edits(NamedTuple):
    """Changes of one row: x becomes x * (up if x > 0 else down) + offset; each id occurs once."""

    ids: Ids
    up: Floats
    down: Floats
    offset: Floats
    exclusive: bool = False  # whether all tokens that are not listed are banned


class History:
    """The ids of a request so far, and how often each of them occurs among the latest ones."""

    def __init__(self, ids: Sequence[int], window: int | None) -> None:
        """Begin with the ids of the prompt; `window` is how many of the latest ids are counted, None counts all."""
        self._window = window
        self._ids: Ids = np.empty(max(256, 2 * len(ids)), np.int32)
        self._length = 0
        self._slots: dict[int, int] = {}
        self._tokens: Ids = np.empty(256, np.int32)
        self._counts: Floats = np.zeros(256)
        self._num_gone = 0  # ids that were counted once and are not any more
        self.extend(ids)

    def __len__(self) -> int:
        return self._length

    @property
    def ids(self) -> Ids:
        """All ids, oldest first; a view that is valid until the next change."""
        return self._ids[: self._length]

    def extend(self, ids: Sequence[int]) -> None:
        """Append ids."""
        for token in ids:
            if self._length == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._ids[self._length] = token
            self._length += 1
            self._count(token, 1)
            if self._window is not None and self._length > self._window:
                self._count(int(self._ids[self._length - 1 - self._window]), -1)

    def truncate(self, length: int) -> None:
        """Take back all ids after the first `length`."""
        while self._length > length:
            if self._window is not None and self._length > self._window:
                self._count(int(self._ids[self._length - 1 - self._window]), 1)
            self._length -= 1
            self._count(int(self._ids[self._length]), -1)

    def counted(self) -> tuple[Ids, Floats]:
        """Return the different ids in the window and how often each occurs there.

        Where no id has left the window they are views: that of ids stays, that of counts holds until the next change.
        """
        used = len(self._slots)
        tokens, counts = self._tokens[:used], self._counts[:used]
        if not self._num_gone:
            return tokens, counts
        present = counts > 0
        return tokens[present], counts[present]

    def _count(self, token: int, change: int) -> None:
        """Correct the count of one id."""
        slot = self._slots.get(token)
        if slot is None:
            slot = self._slots[token] = len(self._slots)
            self._num_gone += 1
            if slot == len(self._tokens):
                self._tokens = np.concatenate([self._tokens, np.empty_like(self._tokens)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._tokens[slot] = token
        before = self._counts[slot]
        self._counts[slot] = before + change
        self._num_gone += int(before + change == 0) - int(before == 0)


def faded(window: int, decay: int) -> Floats:
    """Return how much each of the latest ids counts, the latest first: 1 in the window, then ever less, evenly."""
    fading = 1 - np.arange(1, decay + 1) / (decay + 1)
    return np.concatenate([np.ones(window), fading])


def weighted(ids: Ids, shares: Floats) -> tuple[Ids, Floats, Floats]:
    """Gather what the latest ids count.

    Args:
        ids: [n] ids, the latest first.
        shares: [m] what each of them counts, n or more.

    Returns:
        [k] different ids, [k] the share of the latest occurrence of each, [k] the sum of the shares of all.
    """
    tokens, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    sums: Floats = np.zeros(len(tokens))
    np.add.at(sums, inverse, shares[: len(ids)])
    return tokens.astype(np.int32), shares[first], sums


def repetition(latest: Floats, total: Floats, params: SamplingParams) -> tuple[Floats, Floats, Floats]:
    """Return the factors and the offset of tokens that were seen.

    The factor of a positive logit is 1 / q and that of another one q, with q = 1 + (repetition_penalty - 1) * latest;
    the offset is -presence_penalty * latest - frequency_penalty * total.

    Args:
        latest: [k] what the latest occurrence of each token counts, in (0, 1].
        total: [k] what all of its occurrences count together.
        params: The three penalties.

    Returns:
        [k] up, [k] down, [k] offset.
    """
    down = 1 + (params.repetition_penalty - 1) * latest
    return 1 / down, down, -params.presence_penalty * latest - params.frequency_penalty * total


def prolonged(ids: Ids, breakers: Ids) -> tuple[Ids, NDArray[np.int64]]:
    """Find which next tokens would prolong a repetition, and how long it is without them.

    A token t would prolong a repetition of n tokens where the last n ids also stand elsewhere and t follows there, if
    no breaker is among those n.

    Args:
        ids: [L] ids, oldest first.
        breakers: Ids across which a repetition does not count.

    Returns:
        [k] different ids, and [k] the longest repetition that each would prolong, at least 1.
    """
    nothing = np.empty(0, np.int32), np.empty(0, np.int64)
    if len(ids) < 2 or ids[-1] in breakers:
        return nothing
    ends = np.flatnonzero(ids[:-1] == ids[-1])
    followers, lengths = ids[ends + 1], np.ones(len(ends), np.int64)
    alive = np.arange(len(ends))
    for length in range(1, len(ids)):
        token = ids[-1 - length]
        alive = alive[ends[alive] >= length]
        alive = alive[ids[ends[alive] - length] == token]
        if not len(alive) or token in breakers:
            break
        lengths[alive] = length + 1
    tokens, inverse = np.unique(followers, return_inverse=True)
    longest = np.zeros(len(tokens), np.int64)
    np.maximum.at(longest, inverse, lengths)
    return tokens, longest


def dry_offsets(lengths: NDArray[np.int64], params: SamplingParams) -> Floats:
    """Return -dry_multiplier * dry_base^(length - dry_allowed_length), 0 for repetitions that are shorter.

    The power stops growing at 10^30, far beyond what any token survives.
    """
    excess = (lengths - params.dry_allowed_length).astype(np.float64)
    power = np.exp(np.minimum(excess * np.log(params.dry_base), 69.0))
    return np.where(excess >= 0, -params.dry_multiplier * power, 0.0)


class Changes:
    """The changes that one request makes to its logits, step by step."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        """Keep what stays the same in every step."""
        self._params = params
        self._prompt_length = len(prompt)
        self._history = History(prompt, params.repetition_range) if params.uses_history else None
        self._breakers: Ids = np.array(params.dry_breakers, np.int32)
        self._fading = faded(params.repetition_range or 0, params.repetition_decay)
        self._repeats = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (1, 0, 0)
        # Of tokens whose latest occurrence counts in full, before the frequency; for as many as there may be soon.
        self._evenly = repetition(np.ones(0), np.zeros(0), params)
        biases = dict(params.logit_bias) | dict.fromkeys(params.banned_ids, -np.inf)
        self._fixed = [_offsets(list(biases), list(biases.values()))] if biases else []
        self._allowed: Ids | None = None
        if params.allowed_ids is not None:
            self._allowed = np.unique(np.array(params.allowed_ids, np.int32))
            self._fixed.append(_offsets(self._allowed, np.zeros(len(self._allowed))))

    def at(self, generated: Sequence[int], banned: Sequence[int]) -> Edits | None:
        """Return the changes of the step after these ids, None when there are none."""
        parts = list(self._fixed)
        if self._history is not None:
            self._history.extend(generated[len(self._history) - self._prompt_length :])
            parts += self._from_history(self._history)
        if banned:
            parts.append(_offsets(np.unique(banned), np.full(len(set(banned)), -np.inf)))
        if len(parts) == 1 and self._allowed is None:
            return parts[0]
        return _merged(parts, self._allowed) if parts else None

    def rewind(self, num_generated: int) -> None:
        """Take back all generated ids after the first `num_generated`."""
        if self._history is not None:
            self._history.truncate(self._prompt_length + num_generated)

    def _from_history(self, history: History) -> list[Edits]:
        """Return the changes that depend on the ids so far."""
        params, parts = self._params, []
        if self._repeats and params.repetition_decay:
            ids, latest, total = weighted(history.ids[: -len(self._fading) - 1 : -1], self._fading)
            parts.append(Edits(ids, *repetition(latest, total, params)))
        elif self._repeats:
            ids, total = history.counted()
            if len(ids) > len(self._evenly[0]):
                self._evenly = repetition(np.ones(2 * len(ids)), np.zeros(2 * len(ids)), params)
            up, down, offset = [column[: len(ids)] for column in self._evenly]
            if params.frequency_penalty:
                offset = offset - params.frequency_penalty * total
            parts.append(Edits(ids, up, down, offset))
        if params.dry_multiplier:
            ids, lengths = prolonged(history.ids[-(params.dry_range or 0) :], self._breakers)
            parts.append(_offsets(ids, dry_offsets(lengths, params)))
        return parts


def _offsets(ids: Sequence[int] | Ids, offsets: Sequence[float] | Floats) -> Edits:
    """Return changes that only add."""
    ones = np.ones(len(ids))
    return Edits(np.asarray(ids, np.int32), ones, ones, np.asarray(offsets, np.float64))


def _merged(parts: list[Edits], allowed: Ids | None) -> Edits:
    """Join changes, of which at most one multiplies each token; a token that is not allowed is not listed."""
    ids, inverse = np.unique(np.concatenate([part.ids for part in parts]), return_inverse=True)
    up, down = np.ones(len(ids)), np.ones(len(ids))
    offset = np.zeros(len(ids))
    np.add.at(offset, inverse, np.concatenate([part.offset for part in parts]))
    np.multiply.at(up, inverse, np.concatenate([part.up for part in parts]))
    np.multiply.at(down, inverse, np.concatenate([part.down for part in parts]))
    if allowed is not None:
        kept = np.isin(ids, allowed)
        ids, up, down, offset = ids[kept], up[kept], down[kept], offset[kept]
    return Edits(ids, up, down, offset, allowed is not None)
