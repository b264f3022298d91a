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
    generated: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0  # tokens whose keys and values are in the pages
    state: State = State.WAITING
    finish_reason: str | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens so far."""
        return len(self.prompt) + len(self.generated)

    @property
    def num_pending(self) -> int:
        """Tokens that are known and not yet computed: the rest of the prompt, or the token sampled last."""
        return self.num_tokens - self.num_computed

    @property
    def max_tokens(self) -> int:
        """The most tokens the sequence can grow to; pages are reserved for these."""
        return len(self.prompt) + self.params.max_new_tokens

    def pending(self, count: int) -> Ids[int]:
        """Return the next `count` tokens to compute."""
        start = self.num_computed - len(self.prompt)
        if start >= 0:
            return self.generated[start : start + count]
        return (*self.prompt[self.num_computed : self.num_computed + count], *self.generated[: max(0, start + count)])

    def row(self) -> Row:
        """Return what the next token is sampled with; its random number depends on the seed and the step alone."""
        greedy = self.params.temperature == 0
        return Row(self.params, 0.0 if greedy else self.uniforms.at(len(self.generated)))
