"""One request on its way through the engine: its ids, its pages, its limits and its random numbers."""

from __future__ import annotations

import enum
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from qinfer.engine.sampling import Row, SamplingParams, UniformStream


class State(enum.Enum):
    """Where a sequence stands with the scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """The ids of a prompt and of what was generated after it; host bookkeeping, no tensors."""

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    uniforms: UniformStream
    priority: int = 0  # higher ones go first
    generated: list[int] = field(default_factory=list)  # ids that are on the host
    source: int = -1  # row of the last step that samples the next token, while its id is not on the host yet
    pages: list[int] = field(default_factory=list)
    allocation: int = 0  # grows whenever `pages` starts anew; appending to it does not count
    num_computed: int = 0  # tokens whose keys and values are in the pages once all launched steps are done
    page_keys: list[bytes] = field(default_factory=list)  # of the first whole pages, as far as anybody asked
    num_published: int = 0  # pages that others may share
    cached_tokens: int = 0  # tokens of the prompt that were in the pool when the sequence began
    num_preempted: int = 0  # times that it had to give its pages back
    state: State = State.WAITING
    finish_reason: str | None = None

    @property
    def num_known(self) -> int:
        """Tokens whose ids are on the host."""
        return len(self.prompt) + len(self.generated)

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens so far, with the one that only the device knows."""
        return self.num_known + (self.source >= 0)

    @property
    def num_pending(self) -> int:
        """Tokens that are not yet computed: the rest of the prompt, or the token sampled last."""
        return self.num_tokens - self.num_computed

    @property
    def max_tokens(self) -> int:
        """The most tokens the sequence can grow to."""
        return len(self.prompt) + self.params.max_new_tokens

    @property
    def wants_more(self) -> bool:
        """Whether another token would still be within the limit."""
        return self.num_tokens < self.max_tokens

    @property
    def newest(self) -> int:
        """The id of the last token, or -1 - row where the device samples it."""
        if self.source >= 0:
            return -1 - self.source
        return self.generated[-1] if self.generated else self.prompt[-1]

    def order(self) -> tuple[int, int]:
        """Return what sequences are sorted by: priority, then arrival."""
        return (-self.priority, self.id)

    def ids(self, first: int, last: int) -> Ids[int]:
        """Return the tokens from position `first` up to, not including, `last`, as far as they are on the host."""
        skipped = len(self.prompt)
        if last <= skipped:
            return self.prompt[first:last]
        return (*self.prompt[first:], *self.generated[max(0, first - skipped) : last - skipped])

    def drop_pages(self) -> None:
        """Have no pages and nothing computed."""
        self.pages = []
        self.allocation += 1
        self.num_computed = self.num_published = 0

    def pending(self, count: int) -> Ids[int]:
        """Return the next `count` tokens to compute; the one that only the device knows is -1 - row."""
        start, end = self.num_computed - len(self.prompt), self.num_computed + count - len(self.prompt)
        ids = (
            *self.prompt[self.num_computed : self.num_computed + count],
            *self.generated[max(0, start) : max(0, end)],
        )
        return ids if len(ids) == count else (*ids, self.newest)

    def row(self) -> Row:
        """Return what the next token is sampled with; its random number depends on the seed and the step alone."""
        greedy = self.params.temperature == 0
        return Row(self.params, 0.0 if greedy else self.uniforms.at(len(self.generated)))
