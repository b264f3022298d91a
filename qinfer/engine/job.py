"""One submitted request as its caller sees it: events while it runs, a completion at the end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

from qinfer.engine.bans import TokenTexts
from qinfer.engine.sequence import Sequence, TokenLogprobs
from qinfer.engine.text import Decodes, Detokenizer, StopMatcher

# Ids of the prompt that the detokenizer sees: enough for a few words of context.
_TAIL = 8

FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Completion:
    """Everything that one request generated."""

    text: str  # empty without a tokenizer
    token_ids: tuple[int, ...]  # with the id that ended it, if one did
    finish_reason: FinishReason
    prompt_tokens: int
    error: BaseException | None = None  # why, when finish_reason is "error"
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token where SamplingParams.logprobs asks for them
    # One per token of the prompt where SamplingParams.prompt_logprobs asks for them; the first has none.
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    # How the tokens came about does not tell completions apart. These were in the pool already:
    cached_tokens: int = field(default=0, compare=False)
    drafted_tokens: int = field(default=0, compare=False)  # guesses that were checked
    accepted_tokens: int = field(default=0, compare=False)  # guesses that were right


class Event(NamedTuple):
    """What one step did for one request; the texts of a request's events join to the text of its completion."""

    job: int  # Job.id
    text: str  # text that became final; empty while a character or a stop string may be incomplete
    token_ids: tuple[int, ...]  # new ids; of a request with banned strings, those that nothing can take back
    finish_reason: FinishReason | None = None  # in the last event of the request
    error: BaseException | None = None
    completion: Completion | None = None  # in the last event of the request
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per new id where SamplingParams.logprobs asks for them


# An event of all its fields in order, made in half the time: there is one for each token.
_event: Callable[[tuple[object, ...]], Event] = partial(tuple.__new__, Event)


class Job:
    """A request that was submitted."""

    def __init__(
        self,
        sequence: Sequence,
        tokenizer: Decodes | None,
        events: list[Event],
        *,
        release: Callable[[Sequence, str], None],
        rewind: Callable[[Sequence, int], None],
        lock: AbstractContextManager[Any],
    ) -> None:
        """Start without a token.

        Args:
            sequence: its ids and limits.
            tokenizer: turns its ids into text; without one there is no text.
            events: where its events are delivered.
            release: takes the sequence out of the generator and returns its pages, given the reason.
            rewind: takes generated ids of the sequence back, given how many stay.
            lock: held while a step runs.
        """
        self.id = sequence.id
        self.sequence = sequence
        self.completion: Completion | None = None
        detokenizer = None
        if tokenizer is not None:
            detokenizer = Detokenizer(tokenizer, sequence.prompt[-_TAIL:], sequence.healed)
        self._texts = TokenTexts(detokenizer, sequence.params.banned_strings)
        self._stops = StopMatcher(sequence.params.stop)
        params = sequence.params
        self._most = params.max_new_tokens
        # Whether tokens are told as they come: nothing takes them back.
        self._is_open = not params.banned_strings and sequence.steering is None
        self._has_stops = bool(params.stop)
        self._events = events
        self._release = release
        self._rewind = rewind
        self._lock = lock
        self._told: list[str] = []
        self._num_read = 0  # ids that the detokenizer has seen
        self._num_told = 0  # ids that nothing takes back
        self._num_in_events = 0

    @property
    def finished(self) -> bool:
        """Whether the request has its completion."""
        return self.completion is not None

    def cancel(self) -> None:
        """Finish now and return the pages; the last event comes with the next step. Nothing happens when finished."""
        with self._lock:
            if not self.finished:
                self._finish("cancelled", self._tell(self._texts.flush()) + self._rest())

    def fail(self, error: BaseException) -> None:
        """End the request because of an error; text still withheld is dropped, since the tokenizer may have raised."""
        if not self.finished:
            self._finish("error", "", error)

    def deliver(self) -> None:
        """Tell in an event what is new in the sequence; end the request where one of its ids ends it."""
        sequence, place = self.sequence, self._num_read
        generated = sequence.generated
        if self._is_open and len(generated) == place + 1 < self._most and generated[place] not in sequence.ends:
            # As almost always: one id that nothing takes back and that ends nothing, unless its text does.
            token_id = generated[place]
            text = self._texts.text_of(token_id)
            self._num_read = self._num_told = place + 1
            if self._has_stops:
                text = self._stops.push(text)
                if self._stops.matched:
                    self._finish("stop", text)
                    return
            self._num_in_events = place + 1
            self._told.append(text)
            logprobs = tuple(sequence.logprobs[place:]) if sequence.logprobs else ()
            self._events.append(_event((self.id, text, (token_id,), None, None, None, logprobs)))
            return
        if sequence.steering is not None:
            sequence.steering.check()
        text, reason = "", None
        while self.completion is None and reason is None and self._num_read < len(generated):
            token_id = generated[self._num_read]
            self._num_read += 1
            new, reason = self._weigh(token_id)
            text += new
        if reason is not None:
            self._finish(reason, text + self._rest())
        elif self._num_told > self._num_in_events:
            self._told.append(text)
            told = slice(self._num_in_events, self._num_told)
            self._num_in_events = self._num_told
            logprobs = tuple(sequence.logprobs[told]) if sequence.logprobs else ()
            self._events.append(Event(self.id, text, tuple(generated[told]), None, None, None, logprobs))

    def _weigh(self, token_id: int) -> tuple[str, FinishReason | None]:
        """Read an id that may end the text or have to be taken back: what may be told now, and why the request ends."""
        sequence = self.sequence
        is_end = token_id in sequence.ends
        too_many = 0 if is_end else self._texts.push(token_id)
        if too_many:
            self._take_back(too_many)
            return "", None
        is_whole = sequence.steering is not None and sequence.steering.finished_at == self._num_read
        is_last = is_end or is_whole or self._num_read == self._most
        text = self._tell(self._texts.flush() if is_last else self._texts.free())
        if is_end and not self._stops.matched:
            self._num_told += 1
        if is_end or is_whole or self._stops.matched:
            return text, "stop"
        return text, "length" if is_last else None

    def _tell(self, texts: list[str]) -> str:
        """Count tokens as told, up to one that completes a stop string, and return their text before it."""
        text = ""
        for piece in texts:
            if not self._stops.matched:
                self._num_told += 1
                text += self._stops.push(piece)
        return text

    def _rest(self) -> str:
        """Return the text that was withheld; after a stop string there is none."""
        return self._stops.push(self._texts.rest()) + self._stops.flush()

    def _take_back(self, count: int) -> None:
        """Go back to before the latest tokens; the first of them is not tried again in its place."""
        self._num_read -= count
        self.sequence.bans.setdefault(self._num_read, set()).add(self.sequence.generated[self._num_read])
        self._rewind(self.sequence, self._num_read)

    def _finish(self, reason: FinishReason, text: str, error: BaseException | None = None) -> None:
        """Return the pages, wherever the request stands, make the completion and deliver the last event."""
        sequence = self.sequence
        self._is_open = False
        self._release(sequence, reason)
        self._told.append(text)
        token_ids, logprobs = tuple(sequence.generated[: self._num_told]), tuple(sequence.logprobs[: self._num_told])
        self.completion = Completion(
            text="".join(self._told),
            token_ids=token_ids,
            finish_reason=reason,
            prompt_tokens=len(sequence.prompt) + len(sequence.healed),
            error=error,
            logprobs=logprobs,
            prompt_logprobs=() if sequence.params.prompt_logprobs is None else (None, *sequence.prompt_logprobs),
            cached_tokens=sequence.cached_tokens,
            drafted_tokens=0 if sequence.drafter is None else sequence.drafter.num_drafted,
            accepted_tokens=0 if sequence.drafter is None else sequence.drafter.num_accepted,
        )
        first = self._num_in_events
        last = Event(self.id, text, token_ids[first:], reason, error, self.completion, logprobs[first:])
        self._events.append(last)
