"""Which sequences run how many tokens in a step: the order is priority, then arrival, and everything follows it.

A sequence is admitted when pages for the tokens it has can be allocated, less those that stand in the pool already
(`prefix`). It grows by a page when it needs one. When there is none, the last sequence in the order gives its pages
back and waits to be computed again, so the first always runs to its end. Ids are never lost: they are on the host, or
on their way to it.

Where every layer of the model has a window, a sequence gives the pages behind it back while it runs, and takes those of
a long prompt piece by piece (`window`), so that it never holds more than the window and what a step adds.

A step serves one token to every sequence that is past its prompt, then prompt tokens in order, up to max_step_tokens.
Streams wait for the step, so beside them prompts get the share of it that streams leave of the batch, and
max_mixed_tokens in any case: one stream does not hold up the prompts of 63 others, and 60 wait no longer than needed.

Most steps are the one before, a token later: nobody came or left, filled a page or reached a limit. How many such steps
follow is known when a step is made (`_quiet_steps`), and until then, or until somebody calls anything else, `schedule`
returns the same list again, by which others know that nothing but positions has changed.
"""

from __future__ import annotations

from bisect import insort
from itertools import chain

from qinfer.engine.pages import PageTable
from qinfer.engine.prefix import match, publish
from qinfer.engine.sequence import Sequence, State
from qinfer.engine.window import Window
from qinfer.errors import OutOfPages

# One page per so many running sequences stays free at an admission: soon each of them will want one.
_SEQUENCES_PER_SPARE_PAGE = 4
# Prompt tokens in a step of a sequence that wants logprobs of its prompt, and so the logits of all of them.
_SCORED_TOKENS = 256


class Scheduler:
    """Holds the waiting and the running sequences, both in order."""

    def __init__(
        self,
        pages: PageTable,
        *,
        max_batch: int,
        max_step_tokens: int,
        max_mixed_tokens: int = 256,
        prefix_cache: bool = True,
        window: int | None = None,
    ) -> None:
        """Start empty.

        Args:
            pages: The pool from which sequences take their pages.
            max_batch: Most sequences that run at a time.
            max_step_tokens: Most tokens in a step, prompts and generated ones together.
            max_mixed_tokens: Most prompt tokens in a step in which as many other sequences decode as may run.
            prefix_cache: Whether sequences share pages with the same beginning, running or finished.
            window: Most positions that any layer sees; None where one sees all.
        """
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        if max_step_tokens < max_batch:
            raise ValueError(f"max_step_tokens must be at least max_batch={max_batch}, got {max_step_tokens}")
        if max_mixed_tokens < 1:
            raise ValueError(f"max_mixed_tokens must be at least 1, got {max_mixed_tokens}")
        self.pages = pages
        self.max_batch = max_batch
        self.max_step_tokens = max_step_tokens
        self.max_mixed_tokens = max_mixed_tokens
        self.prefix_cache = prefix_cache
        self.window = Window(window, pages.page_size)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._step: list[tuple[Sequence, int]] = []
        self._num_quiet = 0  # steps to come that are the last one again

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind those of its priority.

        Raises:
            ValueError: If the whole pool could not hold it.
        """
        needed = sum(self.window.most_pages(one.max_tokens) for one in sequence.members)
        if needed > self.pages.num_pages:
            raise ValueError(f"sequence needs {needed} pages, the pool has {self.pages.num_pages}")
        if len(sequence.members) > self.max_batch:
            raise ValueError(f"max_batch must be at least 2 for a negative_prompt, got {self.max_batch}")
        insort(self.waiting, sequence, key=Sequence.order)
        self._num_quiet = 0

    def schedule(self) -> list[tuple[Sequence, int]]:
        """Admit what fits and return the step: sequences with their number of tokens, single tokens first.

        The same list as before means the same sequences with one token each, and no page more or less.
        """
        if self._num_quiet:
            self._num_quiet -= 1
            return self._step
        self._settle_pages()
        self._admit()
        self._step = self._next_step()
        self._num_quiet = self._quiet_steps(self._step)
        return self._step

    def _settle_pages(self) -> None:
        """Let others find the pages that are whole now, and give back those that no layer sees any more."""
        page_size, prefix_cache, window = self.pages.page_size, self.prefix_cache, self.window.length
        for sequence in self.running:
            is_due = sequence.num_computed >= (sequence.num_published + 1) * page_size
            if prefix_cache and (is_due or sequence.shadow is not None):
                for one in sequence.members:
                    publish(self.pages, one)
            if window is not None:
                for one in sequence.members:
                    self._free_behind(one)

    def _next_step(self) -> list[tuple[Sequence, int]]:
        """Return a token for everybody past the prompt, with drafts, and prompt tokens in order."""
        step: list[tuple[Sequence, int]] = []
        prompts: list[Sequence] = []
        page_size = self.pages.page_size
        for sequence in tuple(self.running):
            num_tokens, shadow = sequence.num_tokens, sequence.shadow
            is_prompt = num_tokens - sequence.num_computed > 1 or (shadow is not None and shadow.num_pending > 1)
            if sequence.state is State.RUNNING and (is_prompt or num_tokens < sequence.max_tokens):
                is_full = sequence.num_computed >= len(sequence.pages) * page_size or shadow is not None
                # Whoever has to give way comes later in the order, and is in no step yet.
                if is_full and not self._grow(sequence):
                    continue
                if is_prompt:
                    prompts.append(sequence)
                    continue
                step.append((sequence, 1))
                if shadow is not None:
                    step.append((shadow, 1))
        if any(sequence.drafts for sequence, _ in step):
            step = self._with_drafts(step)
        budget = self.max_step_tokens - sum(count for _, count in step)
        if step:
            share = self.max_step_tokens * (self.max_batch - len(step)) // self.max_batch
            budget = min(budget, max(share, self.max_mixed_tokens))
        for sequence in prompts:
            if budget and sequence.state is State.RUNNING:
                chunks = self._chunks(sequence, budget)
                step += chunks
                budget -= sum(count for _, count in chunks)
        return step

    def _quiet_steps(self, step: list[tuple[Sequence, int]]) -> int:
        """Return how many times a step can be made again, a token later, as `schedule` would make it anew.

        Who waits cannot be admitted before somebody ends or gives pages back, and neither happens by itself.
        """
        # Pieces of prompts come last. Who runs and is not in the step waits for room, or for the id that ends it.
        if not step or step[-1][1] > 1 or len(step) < len(self.running) or self.window.length is not None:
            return 0
        page_size, quiet = self.pages.page_size, self.pages.page_size
        for sequence, _ in step:
            num_tokens, num_computed = sequence.num_tokens, sequence.num_computed
            if num_tokens - num_computed > 1 or sequence.drafter is not None or sequence.shadow is not None:
                return 0
            num_pages = len(sequence.pages)
            if self.prefix_cache:
                num_pages = min(num_pages, sequence.num_published + 1)
            quiet = min(quiet, num_pages * page_size - num_computed - 1, sequence.max_tokens - num_tokens - 1)
        return max(0, quiet)

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Take a sequence out, wherever it is, and return its pages."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        else:
            raise ValueError(f"sequence {sequence.id} is finished already ({sequence.finish_reason})")
        self._num_quiet = 0
        # After an error nobody shall meet what it may have left behind.
        self._drop(sequence, known=reason != "error")
        sequence.await_sample(-1)
        sequence.state = State.FINISHED
        sequence.finish_reason = reason

    def rewind(self, sequence: Sequence, num_generated: int) -> None:
        """Take generated ids of a sequence back; pages that others may share are left to them.

        A sequence that would have to see pages which it gave back is computed again.
        """
        sequence.rewind(num_generated)
        self._num_quiet = 0
        is_lost = False
        for one in sequence.members:
            del one.page_keys[one.num_known // self.pages.page_size :]
            is_freed = self.window.first_page(one.num_computed) < one.num_freed
            is_lost |= is_freed or one.num_computed < one.num_published * self.pages.page_size
        if is_lost:
            self._preempt(sequence)

    def defragment(self) -> dict[int, int]:
        """Give the lowest numbers to the pages that hold something; return old to new numbers of what has to move."""
        moves = self.pages.defragment()
        self._num_quiet = 0
        for one in (one for sequence in self.running for one in sequence.members):
            if not moves.keys().isdisjoint(one.pages):
                one.pages = [moves.get(page, page) for page in one.pages]
                one.allocation += 1
        return moves

    def _admit(self) -> None:
        """Move sequences from the queue while there is room; one that does not fit holds back those behind it."""
        while self.waiting:
            sequence = self.waiting[0]
            members = sequence.members
            if sum(len(one.members) for one in self.running) + len(members) > self.max_batch:
                return
            found = [match(self.pages, one, self.window) if self.prefix_cache else [] for one in members]
            known = [[page for page in pages if page >= 0] for pages in found]
            needed = [
                min(self.pages.pages_for(num) - len(pages), self.window.most_pages(num) - len(shared))
                for num, pages, shared in zip((one.num_known for one in members), found, known, strict=True)
            ]
            idle = sum(self.pages.references(page) == 0 for page in set().union(*known))
            if sum(needed) + self._spare_pages() > self.pages.num_free - idle:
                return
            for page in chain(*known):
                self.pages.share(page)
            for one, pages, shared, count in zip(members, found, known, needed, strict=True):
                one.pages = pages + self.pages.allocate(count)
                one.num_freed = len(pages) - len(shared)
                one.num_computed = len(pages) * self.pages.page_size
                one.num_published = len(pages)
            if not sequence.num_preempted:
                sequence.cached_tokens = sequence.num_computed
            del self.waiting[0]
            sequence.state = State.RUNNING
            insort(self.running, sequence, key=Sequence.order)

    def _spare_pages(self) -> int:
        """Return how many pages an admission leaves to the sequences that run: never more than they could fill."""
        most = len(self.running) // _SEQUENCES_PER_SPARE_PAGE
        wanted = 0
        for sequence in self.running:
            if wanted >= most:
                break
            for one in sequence.members:
                wanted += max(0, self.window.most_pages(one.max_tokens) - len(one.held_pages))
        return min(most, wanted)

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for the next token; say whether the sequence still runs, or had to give way itself."""
        page_size = self.pages.page_size
        for one in sequence.members:
            while one.num_computed >= len(one.pages) * page_size:
                try:
                    one.pages += self.pages.allocate(1)
                except OutOfPages:
                    last = self.running[-1]
                    self._preempt(last)
                    if last is sequence:
                        return False
        return True

    def _extend(self, sequence: Sequence, count: int) -> int:
        """Make room for `count` tokens of a prompt, as far as nobody else wants it; return for how many there is."""
        missing = self.pages.pages_for(sequence.num_computed + count) - len(sequence.pages)
        if missing > 0:
            room = max(0, self.pages.num_free - self._spare_pages())
            sequence.pages += self.pages.allocate(min(missing, room))
        return min(count, len(sequence.pages) * self.pages.page_size - sequence.num_computed)

    def _free_behind(self, sequence: Sequence) -> None:
        """Give back the pages that no token of a sequence will see again."""
        first = self.window.first_page(sequence.num_computed)
        behind = slice(sequence.num_freed, first)
        if first > sequence.num_freed:
            self.pages.free(sequence.pages[behind])
            sequence.pages[behind] = [-1] * (first - sequence.num_freed)
            sequence.num_freed = first

    def _with_drafts(self, step: list[tuple[Sequence, int]]) -> list[tuple[Sequence, int]]:
        """Add drafts to decoding sequences, as far as there is room that nobody else wants."""
        budget = self.max_step_tokens - len(step)
        drafted = []
        for sequence, count in step:
            if sequence.drafts:
                wanted = self.pages.pages_for(sequence.num_computed + 1 + len(sequence.drafts)) - len(sequence.pages)
                if len(sequence.drafts) > budget or wanted > self.pages.num_free:
                    sequence.drafts = []
                else:
                    sequence.pages += self.pages.allocate(max(0, wanted))
            budget -= len(sequence.drafts)
            drafted.append((sequence, count + len(sequence.drafts)))
        return drafted

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the queue; what it has published may still be there when it returns."""
        self.running.remove(sequence)
        self._drop(sequence, known=True)
        sequence.num_preempted += 1
        sequence.state = State.WAITING
        insort(self.waiting, sequence, key=Sequence.order)

    def _drop(self, sequence: Sequence, *, known: bool) -> None:
        """Take the pages of a sequence back; the whole ones can be found again, or are forgotten."""
        for one in sequence.members:
            if not known:
                for page in one.held_pages:
                    self.pages.forget(page)
            elif self.prefix_cache:
                publish(self.pages, one)
            self.pages.free(one.held_pages)
            one.drop_pages()

    def _chunks(self, sequence: Sequence, budget: int) -> list[tuple[Sequence, int]]:
        """Return what a sequence that has several tokens to compute computes in a step, at most so many of them."""
        most = min(budget, _SCORED_TOKENS) if sequence.is_scored else budget
        if sequence.shadow is None:
            return [(sequence, self._extend(sequence, min(sequence.num_pending, most)))]
        if sequence.num_pending <= most and sequence.num_pending + sequence.shadow.num_pending <= budget:
            whole = [(one, one.num_pending) for one in sequence.members]
            if all(self._extend(one, count) == count for one, count in whole):
                return whole
        # The last tokens of both come in one step, whose logits belong together.
        own = self._extend(sequence, min(sequence.num_pending - 1, most))
        other = self._extend(sequence.shadow, min(sequence.shadow.num_pending - 1, budget - own))
        return [(one, count) for one, count in ((sequence, own), (sequence.shadow, other)) if count]
