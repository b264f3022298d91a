"""Which sequences run how many tokens in a step: first come, first served, and nobody runs out of pages.

A sequence is admitted when the pages of its worst case, prompt + max_new_tokens, can be reserved at once, so no running
sequence ever waits for a page. A step serves one token to every sequence that is past its prompt, then fills up to
max_step_tokens with prompt tokens, oldest sequence first. Since max_step_tokens >= max_batch, some prompt moves in
every step in which one is running, and the head of the queue waits only for the sequences before it.
"""

from __future__ import annotations

from collections import deque

from qinfer.engine.pages import PageTable
from qinfer.engine.sequence import Sequence, State
from qinfer.errors import OutOfPages


class Scheduler:
    """Holds the waiting and the running sequences."""

    def __init__(self, pages: PageTable, *, max_batch: int, max_step_tokens: int) -> None:
        """Start empty.

        Args:
            pages: The pool from which admitted sequences reserve.
            max_batch: Most sequences that run at a time.
            max_step_tokens: Most tokens in a step, prompts and generated ones together.
        """
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        if max_step_tokens < max_batch:
            raise ValueError(f"max_step_tokens must be at least max_batch={max_batch}, got {max_step_tokens}")
        self.pages = pages
        self.max_batch = max_batch
        self.max_step_tokens = max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue.

        Raises:
            ValueError: If the whole pool could not hold it, so that it would block the queue for ever.
        """
        needed = self.pages.pages_for(sequence.max_tokens)
        if needed > self.pages.num_pages:
            raise ValueError(f"sequence needs {needed} pages, the pool has {self.pages.num_pages}")
        self.waiting.append(sequence)

    def schedule(self) -> list[tuple[Sequence, int]]:
        """Admit what fits and return the step: sequences with their number of tokens, single tokens first."""
        self._admit()
        decoding = [sequence for sequence in self.running if sequence.num_tokens > len(sequence.prompt)]
        step = [(sequence, 1) for sequence in decoding if sequence.wants_more]
        budget = self.max_step_tokens - len(step)
        for sequence in self.running:
            if budget and sequence.num_tokens == len(sequence.prompt):
                count = min(sequence.num_pending, budget)
                step.append((sequence, count))
                budget -= count
        return step

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Take a sequence out, wherever it is, and return its pages."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        else:
            raise ValueError(f"sequence {sequence.id} is finished already ({sequence.finish_reason})")
        self.pages.free(sequence.pages)
        sequence.pages = []
        sequence.state = State.FINISHED
        sequence.finish_reason = reason

    def _admit(self) -> None:
        """Move sequences from the queue while there is room; one that does not fit holds back those behind it."""
        while self.waiting and len(self.running) < self.max_batch:
            sequence = self.waiting[0]
            try:
                sequence.pages = self.pages.allocate(self.pages.pages_for(sequence.max_tokens))
            except OutOfPages:
                return
            self.waiting.popleft()
            sequence.state = State.RUNNING
            self.running.append(sequence)
