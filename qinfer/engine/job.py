"""One submitted request as its caller sees it: events while it runs, a completion at the end."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from qinfer.engine.sequence import Sequence
from qinfer.engine.text import TextStream

FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Completion:
    """Everything that one request generated."""

    text: str  # empty without a tokenizer
    token_ids: tuple[int, ...]  # with the id that ended it, if one did
    finish_reason: FinishReason
    prompt_tokens: int
    error: BaseException | None = None  # why, when finish_reason is "error"
    # Tokens of the prompt that were in the pool already; two completions that differ in this are equal.
    cached_tokens: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Event:
    """What one step did for one request; the texts of a request's events join to the text of its completion."""

    job: int  # Job.id
    text: str  # text that became final; empty while a character or a stop string may be incomplete
    token_ids: tuple[int, ...]  # new ids
    finish_reason: FinishReason | None = None  # in the last event of the request
    error: BaseException | None = None
    completion: Completion | None = None  # in the last event of the request


class Job:
    """A request that was submitted."""

    def __init__(
        self,
        sequence: Sequence,
        text: TextStream,
        events: list[Event],
        release: Callable[[Sequence, str], None],
    ) -> None:
        """Start without a token.

        Args:
            sequence: its ids and limits.
            text: turns its ids into text.
            events: where its events are delivered.
            release: takes the sequence out of the generator and returns its pages, given the reason.
        """
        self.id = sequence.id
        self.sequence = sequence
        self.completion: Completion | None = None
        self._stream = text
        self._events = events
        self._release = release
        self._texts: list[str] = []
        self._num_delivered = 0

    @property
    def finished(self) -> bool:
        """Whether the request has its completion."""
        return self.completion is not None

    def cancel(self) -> None:
        """Finish now and return the pages; the last event comes with the next step. Nothing happens when finished."""
        if not self.finished:
            self.finish("cancelled", text=self._stream.flush())

    def deliver(self, eos_ids: abc.Set[int]) -> None:
        """Deliver an event for every id that is new in the sequence; end the request where one of them ends it."""
        sequence, params = self.sequence, self.sequence.params
        while not self.finished and self._num_delivered < len(sequence.generated):
            token_id = sequence.generated[self._num_delivered]
            self._num_delivered += 1
            text = ""
            reason: FinishReason | None = "length" if self._num_delivered == params.max_new_tokens else None
            if token_id in params.stop_ids or (token_id in eos_ids and not params.ignore_eos):
                reason = "stop"
            else:
                text = self._stream.push(token_id)
                reason = "stop" if self._stream.stopped else reason
            if reason is None:
                self._texts.append(text)
                self._events.append(Event(self.id, text, (token_id,)))
            else:
                self.finish(reason, text=text + self._stream.flush(), token_ids=(token_id,))

    def fail(self, error: BaseException) -> None:
        """End the request because of an error; text still withheld is dropped, since the tokenizer may have raised."""
        if not self.finished:
            self.finish("error", error=error)

    def finish(
        self,
        reason: FinishReason,
        *,
        text: str = "",
        token_ids: tuple[int, ...] = (),
        error: BaseException | None = None,
    ) -> None:
        """Return the pages, wherever the request stands, make the completion and deliver the last event."""
        self._release(self.sequence, reason)
        self._texts.append(text)
        sequence = self.sequence
        self.completion = Completion(
            text="".join(self._texts),
            token_ids=tuple(sequence.generated[: self._num_delivered]),
            finish_reason=reason,
            prompt_tokens=len(sequence.prompt),
            cached_tokens=sequence.cached_tokens,
            error=error,
        )
        self._events.append(Event(self.id, text, token_ids, reason, error, self.completion))
