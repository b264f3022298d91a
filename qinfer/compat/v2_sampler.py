"""The stages of ExLlamaV2's sampler, as it defines them; qinfer's own are in `qinfer/engine/filters.py`.

They differ on purpose: a program written for `sample_basic` expects its meaning of each number. `docs/sampling.md`
lists what differs between the two. What is an accident of the original, such as an index past the end, is not repeated:
min-p and top-a keep no token below their limit, XTC spares the least likely of the likely tokens in any order, and
smoothing does not accumulate over the rows of a batch.

A stage takes and returns candidates: token ids and probabilities that sum to one. It runs where more than one is left.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

# What the original writes into the logits of tokens that a filter excludes.
_EXCLUDED = np.float32(-1e38)


@dataclass(frozen=True)
class Stages:
    """The numbers of `sample_basic`, under its names."""

    temperature: float
    top_k: int
    top_p: float
    top_a: float
    min_p: float
    tfs: float
    typical: float
    mirostat: bool
    mirostat_tau: float
    mirostat_eta: float
    post_temperature: float
    xtc_probability: float
    xtc_threshold: float
    min_temp: float
    max_temp: float
    temp_exponent: float
    smoothing_factor: float
    skew: float


@dataclass(frozen=True)
class Candidates:
    """Tokens that may still be drawn."""

    tokens: NDArray[np.int64]
    probabilities: Floats

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, index: NDArray[np.intp]) -> Candidates:
        """Keep some, in the order of the index, with probabilities that sum to one again."""
        kept = self.probabilities[index]
        total = kept.sum(dtype=np.float32)
        return Candidates(self.tokens[index], kept / total if total > 0 else kept)

    def reweighted(self, weights: Floats) -> Candidates:
        """Give the same tokens other probabilities."""
        return Candidates(self.tokens, (weights / weights.sum(dtype=np.float32)).astype(np.float32))

    def descending(self) -> Candidates:
        """Sort them, equal ones by falling id."""
        index = np.lexsort((-self.tokens, -self.probabilities))
        return Candidates(self.tokens[index], self.probabilities[index])


def first(logits: Floats, allowed: Bools | None, temperature: float, smoothing: float) -> Candidates:
    """Return every token with its probability at a temperature, after quadratic smoothing if that is not 0."""
    values = logits if allowed is None else np.where(allowed, logits, _EXCLUDED)
    below = (values - values.max()).astype(np.float32)
    with np.errstate(over="ignore"):
        exponent = -(below * below) * np.float32(smoothing) if smoothing > 0 else below
        weights = np.exp(exponent / np.float32(temperature))
    return Candidates(np.arange(len(logits)), weights).reweighted(weights)


def keep_top_k(c: Candidates, top_k: int) -> Candidates:
    """Keep the k likeliest, sorted; of equal ones the larger ids, except that one alone is the first likeliest."""
    if top_k == 1:
        return c.take(np.array([c.probabilities.argmax()]))
    return c.take(np.lexsort((-c.tokens, -c.probabilities))[:top_k])


def keep_top_p(c: Candidates, top_p: float) -> Candidates:
    """Fill a knapsack of size top_p in the order of the candidates.

    A candidate is put in unless the knapsack is too full already and it is less likely than all in it; while it is too
    full and holds more than one, the least likely is taken out. What is left sums to at most top_p, or is one token.
    """
    knapsack: list[tuple[np.float32, int]] = []
    total, size = np.float32(0), np.float32(top_p)
    for i in np.flatnonzero(c.probabilities >= np.float32(1e-6)).tolist():
        probability = c.probabilities[i]
        if total > size and probability < knapsack[0][0]:
            continue
        heapq.heappush(knapsack, (probability, i))
        total = np.float32(total + probability)
        while total > size and len(knapsack) > 1:
            total = np.float32(total - heapq.heappop(knapsack)[0])
    return c.take(np.array([i for _, i in sorted(knapsack, reverse=True)]))


def keep_above(c: Candidates, limit: float) -> Candidates:
    """Keep candidates of at least this probability: top-a and min-p."""
    return c.take(np.flatnonzero(c.probabilities >= np.float32(limit)))


def keep_tail_free(c: Candidates, tfs: float) -> Candidates:
    """Keep one more than there are leading second differences whose share stays within tfs."""
    if len(c) < 3:
        return c
    c = c.descending()
    c = Candidates(c.tokens, c.probabilities[c.probabilities >= 1e-8])
    p = c.probabilities
    curvature = np.abs(p[:-2] - 2 * p[1:-1] + p[2:])
    total = curvature.sum()
    if not len(curvature) or total == 0:
        return c.take(np.arange(len(p)))
    kept = int((np.cumsum(curvature / total) <= tfs).sum())
    return c.take(np.arange(kept + 1))


def keep_typical(c: Candidates, typical: float) -> Candidates:
    """Keep the most typical while their sum stays below `typical`; one at least.

    Typical means near to the mean of y = p + log(p + 1e-10): the original adds p to its own logarithm.
    """
    possible = np.flatnonzero(c.probabilities >= 1e-8)
    p = c.probabilities[possible].astype(np.float64)
    y = p + np.log(p + 1e-10)
    order = np.argsort(np.abs(y - (p * y).sum()), kind="stable")
    kept = int((np.cumsum(p[order]) < typical).sum())
    return c.take(possible[order[: max(1, kept)]])


def keep_surprise(c: Candidates, most: float) -> Candidates:
    """Keep candidates of at most this surprise in bits, sorted; one at least."""
    c = c.descending()
    return c.take(np.arange(max(1, int((c.probabilities >= 2.0**-most).sum()))))


def retempered(c: Candidates, s: Stages) -> Candidates:
    """Apply the temperature that comes last, or the one that follows the entropy."""
    temperature = s.post_temperature
    if s.max_temp > s.min_temp:
        p = c.probabilities[c.probabilities > 0].astype(np.float64)
        share = float(-(p * np.log(p)).sum()) / (math.log(len(c)) or 1.0)
        temperature = s.min_temp + (s.max_temp - s.min_temp) * max(share, 0.0) ** s.temp_exponent
    # Relative to the likeliest, so that a low temperature leaves something.
    relative = c.probabilities / c.probabilities.max()
    return c.reweighted((relative ** np.float32(1 / max(temperature, 1e-6))).astype(np.float32))


def without_top_choices(c: Candidates, probability: float, threshold: float, unprotected: Bools | None) -> Candidates:
    """Apply the expectation of XTC: the likely candidates but the least likely of them lose, all others gain."""
    likely = c.probabilities >= np.float32(threshold)
    if unprotected is not None:
        likely &= unprotected[c.tokens]
    index = np.flatnonzero(likely)
    if len(index) < 2:
        return c
    order = index[np.lexsort((-c.tokens[index], -c.probabilities[index]))]
    excluded = np.zeros(len(c), np.bool_)
    excluded[order[:-1]] = True
    mass = float(c.probabilities[excluded].sum())
    if mass >= 1:
        return c
    raised = 1 + probability * mass / (1 - mass)
    return c.reweighted((c.probabilities * np.where(excluded, 1 - probability, raised)).astype(np.float32))


def candidates(logits: Floats, s: Stages, allowed: Bools | None, unprotected: Bools | None, most: float) -> Candidates:
    """Run all stages before the draw; `most` is mirostat's bound in bits."""
    temperature, top_k = (1.0, 1) if s.temperature < 0.01 else (s.temperature, s.top_k)
    c = first(logits, allowed, temperature, s.smoothing_factor)
    if 0 < top_k < len(c):
        c = keep_top_k(c, top_k)
    if 0 < s.top_p < 1 and len(c) > 1:
        c = keep_top_p(c, s.top_p)
    if s.top_a > 0 and len(c) > 1:
        c = keep_above(c, s.top_a * float(c.probabilities.max()) ** 2)
    if 0 < s.min_p < 1 and len(c) > 1:
        c = keep_above(c, s.min_p * float(c.probabilities.max()))
    if 0 < s.tfs < 1 and len(c) > 1:
        c = keep_tail_free(c, s.tfs)
    if 0 < s.typical < 1 and len(c) > 1:
        c = keep_typical(c, s.typical)
    if s.mirostat and len(c) > 1:
        c = keep_surprise(c, most)
    if (s.post_temperature != 1 or s.max_temp > s.min_temp) and len(c) > 1:
        c = retempered(c, s)
    if s.xtc_probability > 0 and len(c) > 1:
        c = without_top_choices(c, s.xtc_probability, s.xtc_threshold, unprotected)
    return c


def place(c: Candidates, random: float, skew: float) -> int:
    """Walk the candidates until their sum reaches random^exp(-skew) * 0.9998; never end on a probability of zero."""
    target = np.float32(random ** math.exp(-skew) * 0.9998)
    reached = int(np.searchsorted(np.cumsum(c.probabilities, dtype=np.float32), target))
    possible = np.flatnonzero(c.probabilities > 0)
    return int(possible[min(int(np.searchsorted(possible, reached)), len(possible) - 1)])


def next_random(random: float) -> float:
    """Return the random number of the next row of a batch."""
    value, step = np.float32(random), np.float32(np.float32(1.337) + np.float32(random))
    for _ in range(10):
        value = np.float32(value + step)
        value = np.float32(value * value)
        value = np.float32(value - np.floor(value))
    return float(value)
