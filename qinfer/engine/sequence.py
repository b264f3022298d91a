"""One request on its way through the engine: its ids, its pages, its limits and its random numbers."""

from __future__ import annotations

import enum
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from torch import Tensor

from qinfer.engine.draft import Drafter
from qinfer.engine.sampling import Row, SamplerState, SamplingParams
from qinfer.engine.steering import Steering
from qinfer.models.lora import Lora


class State(enum.Enum):
    """Where a sequence stands with the scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class TokenLogprobs:
    """What the model thought of one generated token: natural logarithms of probabilities, before any option."""

    chosen: float
    top: tuple[tuple[int, float], ...]  # ids and their logarithms, likeliest first


@dataclass(eq=False, slots=True)
class Sequence:
    """The ids of a prompt and of what was generated after it, and where they stand."""

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    sampler: SamplerState
    ends: frozenset[int] = frozenset()  # ids that end the text
    healed: tuple[int, ...] = ()  # the id cut off the prompt, where the first generated one begins like it
    healing: Tensor | None = None  # [V] bool, the ids that begin like it
    steering: Steering | None = None  # where it stands in its constraint
    priority: int = 0  # higher ones go first
    shadow: Sequence | None = None  # the same text behind the negative prompt, see engine/guidance.py
    lora: Lora | None = None  # the adapter it runs with
    drafter: Drafter | None = None
    drafts: list[int] = field(default_factory=list)  # guesses at the next ids, to be computed in the next step
    generated: list[int] = field(default_factory=list)  # ids that are on the host
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the generated ids, if they are wanted
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the prompt from its second token on
    num_scored: int = 0  # prompt tokens whose logits have become logprobs of their followers
    bans: dict[int, set[int]] = field(default_factory=dict)  # ids that were tried and taken back, by their place
    source: int = -1  # row of the last step that samples the next token, while its id is not on the host yet
    pages: list[int] = field(default_factory=list)  # by their place in the text; -1 where one was given back
    num_freed: int = 0  # pages at the beginning that were given back, since no layer sees them any more
    allocation: int = 0  # grows whenever `pages` starts anew; appending to it does not count
    num_computed: int = 0  # tokens whose keys and values are in the pages once all launched steps are done
    page_keys: list[bytes] = field(default_factory=list)  # of the first whole pages, as far as anybody asked
    num_published: int = 0  # pages that others may share
    cached_tokens: int = 0  # tokens of the prompt that were in the pool when the sequence began
    num_preempted: int = 0  # times that it had to give its pages back
    state: State = State.WAITING
    finish_reason: str | None = None
    max_tokens: int = field(init=False)  # that it can grow to

    def __post_init__(self) -> None:
        self.max_tokens = len(self.prompt) + self.params.max_new_tokens

    @property
    def num_known(self) -> int:
        """Tokens whose ids are on the host."""
        return len(self.prompt) + len(self.generated)

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens so far, with the one that only the device knows."""
        return len(self.prompt) + len(self.generated) + (self.source >= 0)

    @property
    def num_pending(self) -> int:
        """Tokens that are not yet computed: the rest of the prompt, or the token sampled last."""
        return self.num_tokens - self.num_computed

    @property
    def adapter(self) -> int:
        """The slot of its adapter; -1 without one."""
        return -1 if self.lora is None else self.lora.slot

    @property
    def newest(self) -> int:
        """The id of the last token, or -1 - row where the device samples it."""
        if self.source >= 0:
            return -1 - self.source
        return self.generated[-1] if self.generated else self.prompt[-1]

    @property
    def held_pages(self) -> list[int]:
        """The pages that the sequence has."""
        return self.pages[self.num_freed :]

    @property
    def members(self) -> tuple[Sequence, ...]:
        """The sequence and its shadow, which have pages, wait and run together."""
        return (self,) if self.shadow is None else (self, self.shadow)

    @property
    def is_shadow(self) -> bool:
        """Whether this is another sequence's shadow."""
        return self.id < 0

    @property
    def request(self) -> int:
        """The id of the request to which it belongs."""
        return -1 - self.id if self.is_shadow else self.id

    @property
    def num_skippable(self) -> int:
        """Tokens that need not be computed where their pages are known: their logits do not matter any more."""
        return self.num_scored if self.is_scored else self.num_known - 1

    @property
    def is_scored(self) -> bool:
        """Whether logprobs of the prompt are wanted that no step has computed yet."""
        return self.params.prompt_logprobs is not None and self.num_scored < len(self.prompt) - 1

    def unscored(self, count: int) -> range:
        """Return the places of the next `count` tokens whose logits tell about a prompt token, if that is wanted."""
        if not self.is_scored:
            return range(0)
        return range(max(self.num_computed, self.num_scored), min(self.num_computed + count, len(self.prompt) - 1))

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
        self.num_computed = self.num_published = self.num_freed = 0
        self.drafts = []

    def pending(self, count: int) -> Ids[int]:
        """Return the next `count` tokens to compute; the one that only the device knows is -1 - row."""
        ids = self.ids(self.num_computed, self.num_computed + count)
        if len(ids) < count and self.source >= 0:
            ids = (*ids, self.newest)
        return (*ids, *self.drafts[: count - len(ids)])

    def guess(self) -> None:
        """Draft the next ids; all ids must be on the host, and the newest the only one to compute."""
        if self.drafter is not None and self.num_pending == 1 and self.source < 0:
            self.drafter.extend(self.ids(self.drafter.num_ids, self.num_known))
            # One more id is sampled behind the last draft.
            self.drafts = self.drafter.propose(self.max_tokens - self.num_known - 1)

    def await_sample(self, row: int) -> None:
        """Have the next token sampled by a row of the step, or with -1 by none."""
        self.source = row
        if self.shadow is not None:
            self.shadow.source = row

    def accept(self, sampled: Ids[int]) -> bool:
        """Take the ids sampled behind the newest token and behind each draft, up to the first draft that was wrong.

        Returns:
            Whether all that was to be taken was sampled; -1 is what was not.
        """
        if self.drafts:
            self.await_sample(-1)
            return self._accept_drafts(sampled)
        return self.take(sampled[0])

    def take(self, token_id: int) -> bool:
        """Take the id sampled behind the newest token, where nothing was drafted; say whether it is one."""
        self.source = -1
        if self.shadow is not None:
            self.shadow.source = -1
        if token_id < 0:
            return False
        self.generated.append(token_id)
        if self.steering is not None:
            self.steering.follow(self.generated)
        return True

    def _accept_drafts(self, sampled: Ids[int]) -> bool:
        """Take ids as `accept` does, and let the drafter know how its guess went."""
        assert self.drafter is not None
        drafts, before, is_whole = self.drafts, len(self.generated), True
        for place, token_id in enumerate(sampled):
            is_whole = token_id >= 0
            if not is_whole:
                break
            self.generated.append(token_id)
            if place < len(drafts) and token_id != drafts[place]:
                break
        if self.steering is not None:
            self.steering.follow(self.generated)
        self.drafter.judge(len(drafts), max(0, len(self.generated) - before - 1))
        self.drafts = []
        # What was computed behind the last right draft is written over.
        self.num_computed = self.num_known - 1
        return is_whole

    def rows(self) -> list[Row]:
        """Return what the next token, and the one behind each draft, is sampled with.

        A row depends on the request and on the ids before it alone.
        """
        if not self.drafts:
            return [self.row()]
        rows = [self._row([*self.generated, *self.drafts[:place]]) for place in range(len(self.drafts) + 1)]
        self.sampler.rewind(len(self.generated))
        if self.steering is not None:
            self.steering.rewind(len(self.generated))
        return rows

    def row(self) -> Row:
        """Return what the next token is sampled with, where nothing is drafted."""
        return self._row(self.generated)

    def _row(self, generated: list[int]) -> Row:
        """Return what the token after these ids is sampled with."""
        step = len(generated)
        banned: Ids[int] = ()
        if self.bans or step < self.params.min_new_tokens:
            banned = [*self.bans.get(step, ()), *(self.ends if step < self.params.min_new_tokens else ())]
        words = None if self.steering is None else self.steering.words(generated)
        return self.sampler.row(generated, banned=banned, mask=None if step else self.healing, words=words)

    def rewind(self, num_generated: int) -> None:
        """Take back all generated ids after the first `num_generated`, and the one that is on its way."""
        del self.generated[num_generated:], self.logprobs[num_generated:]
        self.await_sample(-1)
        self.bans = {place: ids for place, ids in self.bans.items() if place <= num_generated}
        for one in self.members:
            one.num_computed = min(one.num_computed, one.num_known - 1)
        self.sampler.rewind(num_generated)
        if self.steering is not None:
            self.steering.rewind(num_generated)
        if self.drafter is not None:
            self.drafter.rewind(self.num_known)
