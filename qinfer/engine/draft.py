"""Drafts, and those from the text itself: what followed the last ids before may follow them again (prompt look-up).

A draft is computed behind the newest token in one step, and every position is sampled with the random number that it
would have had anyway. As long as the sampled id is the drafted one, the next position was computed for the right
history; the first other id is kept, and the rest is thrown away. So the ids are those that the request would have had
without drafts, whatever the sampler, and a bad draft costs time only.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from typing import Protocol

# Lengths of the runs of ids that are looked up, the longest first.
_LENGTHS = (4, 3)
# Ids without a draft after a bad one; twice as many after each further one.
_FIRST_PAUSE, _LONGEST_PAUSE = 4, 64


class Drafter(Protocol):
    """Where the drafts of one sequence come from."""

    num_ids: int  # of the sequence that it has seen
    num_drafted: int
    num_accepted: int

    def extend(self, ids: Ids[int]) -> None:
        """Look at the next ids of the sequence."""
        ...

    def propose(self, limit: int) -> list[int]:
        """Return a guess of at most so many ids at what comes next, often nothing."""
        ...

    def judge(self, num_drafted: int, num_accepted: int) -> None:
        """Learn how many ids of the last guess were right."""
        ...

    def rewind(self, num_ids: int) -> None:
        """Forget all ids after the first `num_ids`."""
        ...


class NgramDraft:
    """The ids of one sequence, and where each short run of them was last followed by something."""

    def __init__(self, max_tokens: int) -> None:
        """Draft at most so many ids at a time."""
        self.max_tokens = max_tokens
        self.num_ids = 0
        self.num_drafted = 0
        self.num_accepted = 0
        self._ids: list[int] = []
        self._followed: dict[tuple[int, ...], int] = {}
        self._pause = _FIRST_PAUSE
        self._resume_at = 0

    def extend(self, ids: Ids[int]) -> None:
        """Look at the next ids of the sequence."""
        for token_id in ids:
            for length in _LENGTHS:
                if len(self._ids) >= length:
                    self._followed[tuple(self._ids[-length:])] = len(self._ids)
            self._ids.append(token_id)
        self.num_ids = len(self._ids)

    def propose(self, limit: int) -> list[int]:
        """Return a guess of at most so many ids at what comes next, often nothing."""
        limit = min(limit, self.max_tokens)
        if limit < 1 or len(self._ids) < self._resume_at:
            return []
        for length in _LENGTHS:
            place = self._followed.get(tuple(self._ids[-length:]))
            if place is not None:
                # A run that reaches the end goes on with the guess itself, as a period does.
                guess = self._ids[place : place + limit]
                while len(guess) < limit:
                    guess.append(guess[len(guess) - (len(self._ids) - place)])
                return guess
        return []

    def judge(self, num_drafted: int, num_accepted: int) -> None:
        """Learn how many ids of the last guess were right; after a bad one, leave it for a while."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        if 2 * num_accepted >= num_drafted:
            self._pause = _FIRST_PAUSE
        else:
            self._resume_at = len(self._ids) + num_accepted + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def rewind(self, num_ids: int) -> None:
        """Forget all ids after the first `num_ids`; runs that were followed by a forgotten one are unknown again."""
        del self._ids[num_ids:]
        self.num_ids = len(self._ids)
        self._followed = {run: place for run, place in self._followed.items() if place < num_ids}
        self._resume_at = min(self._resume_at, num_ids)
