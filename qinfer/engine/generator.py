"""The loop: prompts in, events out.

`submit` queues a request, `step` runs the model once and returns what came of it; `generate` and `stream` are short
loops over the same step. A generator belongs to one thread.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Any, Literal, TypeAlias, overload

from torch import Tensor

from qinfer.engine.graphs import GraphRunner
from qinfer.engine.pages import PageTable
from qinfer.engine.sampling import SamplingParams, UniformStream, sample
from qinfer.engine.scheduler import Scheduler
from qinfer.engine.sequence import Sequence
from qinfer.engine.text import TextStream
from qinfer.engine.turns import Turns
from qinfer.errors import NonFiniteLogits
from qinfer.models.batch import Batch, Piece
from qinfer.models.model import Model

Prompt: TypeAlias = str | abc.Sequence[int]
FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "error"]
Step: TypeAlias = list[tuple[Sequence, int]]

# Ids of the prompt that the detokenizer sees: enough for a few words of context.
_TAIL = 8

_NON_FINITE = (
    "the model gave NaN or infinite logits. "
    'Where activations overflow float16, Model.load(path, dtype="bf16") helps; where it does not, check the weights'
)


@dataclass(frozen=True)
class Completion:
    """Everything that one request generated."""

    text: str  # empty without a tokenizer
    token_ids: tuple[int, ...]  # with the id that ended it, if one did
    finish_reason: FinishReason
    prompt_tokens: int
    error: BaseException | None = None  # why, when finish_reason is "error"


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

    def __init__(self, generator: Generator, sequence: Sequence, text: TextStream, events: list[Event]) -> None:
        """Belong to a generator; `events` is where the request's events are delivered."""
        self.id = sequence.id
        self.sequence = sequence
        self.completion: Completion | None = None
        self._generator = generator
        self._stream = text
        self._events = events
        self._texts: list[str] = []

    @property
    def finished(self) -> bool:
        """Whether the request has its completion."""
        return self.completion is not None

    def cancel(self) -> None:
        """Finish now and return the pages; the last event comes with the next step. Nothing happens when finished."""
        if not self.finished:
            self._generator.turns.cancel(self.id)
            self._generator.finish(self, "cancelled", text=self._stream.flush())

    def advance(self, token_id: int, eos_ids: abc.Set[int]) -> None:
        """Take the next id and deliver its event; end the request if that was its last."""
        sequence, params = self.sequence, self.sequence.params
        sequence.generated.append(token_id)
        text = ""
        reason: FinishReason | None = "length" if len(sequence.generated) == params.max_new_tokens else None
        if token_id in params.stop_ids or (token_id in eos_ids and not params.ignore_eos):
            reason = "stop"
        else:
            text = self._stream.push(token_id)
            reason = "stop" if self._stream.stopped else reason
        if reason is None:
            self._texts.append(text)
            self._events.append(Event(self.id, text, (token_id,)))
        else:
            self._generator.finish(self, reason, text=text + self._stream.flush(), token_ids=(token_id,))

    def fail(self, error: BaseException) -> None:
        """End the request because of an error, with the text it has."""
        self._generator.finish(self, "error", text=self._stream.flush(), error=error)

    def deliver_last(
        self, reason: FinishReason, text: str, token_ids: tuple[int, ...], error: BaseException | None
    ) -> None:
        """Make the completion and the last event."""
        self._texts.append(text)
        generated, prompt_tokens = tuple(self.sequence.generated), len(self.sequence.prompt)
        self.completion = Completion("".join(self._texts), generated, reason, prompt_tokens, error)
        self._events.append(Event(self.id, text, token_ids, reason, error, self.completion))


class _FailTogether:
    """Ends the requests of a step with "error" when an exception leaves the block, and lets the exception go on."""

    def __init__(self, generator: Generator, jobs: abc.Sequence[Job]) -> None:
        self._generator = generator
        self._jobs = jobs

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End what is not finished; text still withheld is dropped, since the tokenizer may be what raised."""
        if error is not None:
            # Other ranks may have come further, or less far.
            self._generator.model.comm.fail(f"{type(error).__name__}: {error}")
            for job in self._jobs:
                if not job.finished:
                    self._generator.finish(job, "error", error=error)


class Generator:
    """Runs any number of requests on one model, several in each step."""

    def __init__(
        self,
        model: Model,
        *,
        kv_format: str = "fp16",
        max_tokens: int = 8192,
        page_size: int = 256,
        max_batch: int = 64,
        max_step_tokens: int = 2048,
    ) -> None:
        """Allocate the page pool.

        Args:
            model: The model; several generators may share it.
            kv_format: How keys and values are stored.
            max_tokens: Tokens that the page pool holds for all running requests together, rounded up to whole pages.
            page_size: Tokens per page.
            max_batch: Most requests that run at a time.
            max_step_tokens: Most tokens in a step; longer prompts are processed in several.
        """
        if max_tokens < 1 or page_size < 1:
            raise ValueError(f"max_tokens and page_size must be at least 1, got {max_tokens} and {page_size}")
        settings = {
            "kv_format": kv_format,
            "max_tokens": max_tokens,
            "page_size": page_size,
            "max_batch": max_batch,
            "max_step_tokens": max_step_tokens,
        }
        self.model = model
        self.pages = PageTable(-(-max_tokens // page_size), page_size)
        self.scheduler = Scheduler(self.pages, max_batch=max_batch, max_step_tokens=max_step_tokens)
        self.cache = model.new_cache(self.pages.num_pages, page_size=page_size, kv_format=kv_format)
        self.graphs: GraphRunner | None = None
        if model.device.type == "cuda":
            longest = min(self.pages.num_pages, self.pages.pages_for(model.config.max_positions))
            self.graphs = GraphRunner(model.decoder, self.cache, max_batch=max_batch, table_width=longest)
        self.turns = Turns(model.comm, settings)
        self._ids = count()
        self._jobs: dict[int, Job] = {}
        self._events: list[Event] = []

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> Job:
        """Queue a request; `step` runs it and returns its events.

        Args:
            prompt: Text, or token ids.
            params: How to sample; None means `SamplingParams()`.

        Raises:
            ValueError: If the prompt is empty, holds an id that the model does not have, or is too long.
        """
        return self._enqueue(self._sequence(prompt, params), self._events)

    def step(self) -> list[Event]:
        """Run the model once, if there is anything to run, and return the events of submitted requests.

        Raises:
            Exception: Whatever the model raises; the requests of that step have then ended with "error" and their pages
                are free, and their events come with the next step.
        """
        self._advance()
        events = list(self._events)
        self._events.clear()
        return events

    @overload
    def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: list[Prompt] | list[str] | list[list[int]],
        params: SamplingParams | abc.Sequence[SamplingParams] | None = None,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: Prompt | abc.Sequence[Prompt],
        params: SamplingParams | abc.Sequence[SamplingParams] | None = None,
    ) -> Completion | list[Completion]:
        """Complete one prompt, or several at once.

        Args:
            prompt: Text or token ids, or a list of either.
            params: One for all prompts, or a list with one for each.

        Returns:
            A completion for one prompt, a list in the order of the prompts for a list.
        """
        single = isinstance(prompt, str) or not _holds_prompts(prompt)
        prompts: list[Prompt] = [prompt] if single else list(prompt)  # type: ignore[list-item, arg-type]
        several = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(several) != len(prompts):
            raise ValueError(f"params must be one or a list of {len(prompts)}, one per prompt, got {len(several)}")
        # All are checked before the first is queued.
        sequences = [self._sequence(*pair) for pair in zip(prompts, several, strict=True)]
        jobs = [self._enqueue(sequence, []) for sequence in sequences]
        try:
            while not all(job.finished for job in jobs):
                self._advance()
        finally:
            for job in jobs:
                job.cancel()
        completions = [job.completion for job in jobs if job.completion is not None]
        return completions[0] if single else completions

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Event]:
        """Complete one prompt and yield its events; closing the iterator cancels the request."""
        return self._stream(self._sequence(prompt, params))

    def repeat(self, requests: abc.Iterable[abc.Mapping[str, Any]], cancelled: abc.Iterable[int]) -> None:
        """Do on this rank what rank 0 does in a step: see engine/turns.py for what it tells."""
        for request in requests:
            params = SamplingParams(**request["params"])
            self._enqueue(Sequence(request["id"], tuple(request["prompt"]), params, UniformStream(params.seed)), [])
        for number in cancelled:
            self._jobs[number].cancel()
        self._advance()

    def finish(
        self,
        job: Job,
        reason: FinishReason,
        *,
        text: str = "",
        token_ids: tuple[int, ...] = (),
        error: BaseException | None = None,
    ) -> None:
        """Return the pages of a request that is not finished, wherever it stands, and deliver its last event."""
        self.scheduler.finish(job.sequence, reason)
        del self._jobs[job.id]
        job.deliver_last(reason, text, token_ids, error)

    def _stream(self, sequence: Sequence) -> Iterator[Event]:
        """Run a sequence once somebody asks for its first event."""
        events: list[Event] = []
        job = self._enqueue(sequence, events)
        try:
            while events or not job.finished:
                if not events:
                    self._advance()
                ready, events[:] = list(events), []
                yield from ready
        finally:
            job.cancel()

    def _sequence(self, prompt: Prompt, params: SamplingParams | None) -> Sequence:
        """Check a request against the model and the pool."""
        params = params or SamplingParams()
        ids = tuple(self.model.check_token_ids(self._encode(prompt)))
        if params.stop and self.model.tokenizer is None:
            raise ValueError(f"stop={params.stop!r} needs a tokenizer and the model has none; stop_ids works without")
        total = len(ids) + params.max_new_tokens
        asked = f"{len(ids)} prompt tokens + max_new_tokens={params.max_new_tokens} are {total} tokens"
        limit = self.model.config.max_positions
        if total > limit:
            raise ValueError(f"{asked}, the model has {limit} positions; shorten the prompt or lower max_new_tokens")
        room = self.pages.num_pages * self.pages.page_size
        if total > room:
            raise ValueError(f"{asked}, the page pool holds {room}; raise Generator(max_tokens=...)")
        return Sequence(next(self._ids), ids, params, UniformStream(params.seed))

    def _encode(self, prompt: Prompt) -> abc.Sequence[int]:
        """Return the ids of a prompt."""
        if not isinstance(prompt, str):
            return prompt
        if self.model.tokenizer is None:
            raise ValueError("the model has no tokenizer: the prompt must be a list of token ids, got a string")
        return self.model.tokenizer.encode(prompt)

    def _enqueue(self, sequence: Sequence, events: list[Event]) -> Job:
        """Queue a checked sequence whose events go to `events`."""
        text = TextStream(self.model.tokenizer, sequence.prompt[-_TAIL:], tuple(sequence.params.stop))
        job = Job(self, sequence, text, events)
        self.scheduler.add(sequence)
        self.turns.request(sequence)
        self._jobs[job.id] = job
        return job

    def _advance(self) -> None:
        """Run one step and deliver its events."""
        if not self.scheduler.has_work:
            return
        self.turns.step()
        step = self.scheduler.schedule()
        if not step:
            return
        jobs = [self._jobs[sequence.id] for sequence, _ in step]
        with _FailTogether(self, jobs):
            for sequence, token_id in self._sample(step):
                job = self._jobs[sequence.id]
                if token_id >= 0:
                    job.advance(token_id, self.model.eos_ids)
                else:
                    job.fail(NonFiniteLogits(f"request {job.id}, position {sequence.num_computed - 1}: {_NON_FINITE}"))

    def _sample(self, step: Step) -> list[tuple[Sequence, int]]:
        """Run the model and return the next id of every sequence whose tokens are all computed now, -1 for none."""
        logits = self._logits(step)
        complete = [sequence for sequence, num_tokens in step if num_tokens == sequence.num_pending]
        for sequence, num_tokens in step:
            sequence.num_computed += num_tokens
        if not complete:
            return []
        # The one transfer from the device in a step; rank 0 decides.
        ids = self.model.comm.agree(sample(logits, [sequence.row() for sequence in complete]))
        return list(zip(complete, ids, strict=True))

    def _logits(self, step: Step) -> Tensor:
        """Run the decoder: a recorded graph when every sequence has one token and wants its logits."""
        pieces = [
            Piece(
                sequence.pending(n),
                sequence.num_computed,
                sequence.pages,
                "last" if n == sequence.num_pending else "none",
            )
            for sequence, n in step
        ]
        page_size, device = self.pages.page_size, self.model.device
        if self.graphs is None or any(len(piece.token_ids) > 1 or piece.wants_logits == "none" for piece in pieces):
            return self.model.decoder(Batch.build(pieces, page_size=page_size, device=device), self.cache)
        rows, width = self.graphs.bucket(len(pieces)), self.graphs.table_width
        batch = Batch.build(pieces, page_size=page_size, device=device, pad_to=rows, table_width=width)
        return self.graphs.run(batch)[: len(pieces)]


def _holds_prompts(prompts: Prompt | abc.Sequence[Prompt]) -> bool:
    """Say whether this is a list of prompts and not one prompt of ids."""
    if len(prompts) == 0:
        raise ValueError("a prompt must hold at least one token, got none")
    return isinstance(prompts[0], (str, abc.Sequence))
