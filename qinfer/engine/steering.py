"""Where a request stands in its constraint: a walk that keeps up with its ids, goes back with them, and fails no step.

The ids of a step are on the host before the next one is sampled, so the bits are computed while the device runs the
next forward pass. A constraint that raises ends its own request, at the next delivery of its ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import numpy as np

from qinfer.engine.constraints import Constraint, Words, packed


class _KeepError:
    """Keeps an exception that leaves the block, so that the step goes on for the other requests."""

    def __init__(self, steering: Steering) -> None:
        self._steering = steering

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """Keep the error; what is no Exception, such as a keyboard interrupt, goes on."""
        if isinstance(error, Exception):
            self._steering.error = error
        return isinstance(error, Exception)


class Steering:
    """One request's walk beside its generated ids, drafts included for as long as they are looked at.

    Attributes:
        finished_at: number of generated ids with which the text has to end; None as long as it may go on.
        error: what the constraint raised; the request ends with it, and its ids no longer matter.
    """

    def __init__(self, constraint: Constraint, ends: frozenset[int], vocab_size: int) -> None:
        """Begin before the first generated id; `ends` are the ids that end the text."""
        self.finished_at: int | None = None
        self.error: Exception | None = None
        self._ends = ends
        self._ends_words = packed(ends, vocab_size)
        self._num_taken = 0
        self._words: Words | None = None  # of the next id, once somebody asked
        with _KeepError(self):
            self._walk = constraint.begin()

    def follow(self, generated: Sequence[int]) -> None:
        """Take the generated ids that are new, up to one that ends the text or may not stand there."""
        while self.error is None and self.finished_at is None and self._num_taken < len(generated):
            token_id = generated[self._num_taken]
            if token_id in self._ends or not self._allows(token_id):
                return
            with _KeepError(self):
                self._walk.advance(token_id)
                self._num_taken += 1
                self._words = None
                if self._walk.is_finished:
                    self.finished_at = self._num_taken

    def words(self, generated: Sequence[int]) -> Words | None:
        """Return the bits of the ids that may follow these, [ceil(V / 32)]; None where no draw will be used."""
        self.follow(generated)
        if self._num_taken < len(generated) or self.finished_at is not None:
            return None
        return self._next_words()

    def rewind(self, num_generated: int) -> None:
        """Forget all generated ids after the first `num_generated`."""
        count = self._num_taken - num_generated
        if count > 0 and self.error is None:
            with _KeepError(self):
                self._walk.rewind(count)
            self._num_taken, self._words, self.finished_at = num_generated, None, None

    def check(self) -> None:
        """Raise what the constraint raised."""
        if self.error is not None:
            raise self.error

    def _allows(self, token_id: int) -> bool:
        """Say whether an id may come next."""
        words = self._next_words()
        return words is not None and bool(words[token_id // 32] >> (token_id % 32) & 1)

    def _next_words(self) -> Words | None:
        """Return the bits of the next id with those of the ids that end the text; None after an error."""
        if self._words is None and self.error is None:
            with _KeepError(self):
                words = np.zeros_like(self._ends_words)
                allowed = np.asarray(self._walk.allowed(), np.int32)[: len(words)]
                words[: len(allowed)] = allowed
                words &= ~self._ends_words
                if self._walk.is_complete:
                    words |= self._ends_words
                self._words = words
        return self._words
