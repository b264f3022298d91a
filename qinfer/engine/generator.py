"""The loop: prompts in, events out.

`submit` queues a request, `step` runs the model once and returns what came of it; `generate` and `stream` are short
loops over the same step. A generator belongs to one thread.
"""

from __future__ import annotations

from collections import abc
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar, overload

from qinfer.engine import session
from qinfer.engine.draft_model import DraftModel, DraftRunner, longest_window
from qinfer.engine.failures import FailAlone, FailTogether
from qinfer.engine.front import AsyncFront
from qinfer.engine.intake import Intake, Prompt
from qinfer.engine.job import Completion, Event, Job
from qinfer.engine.owner import Owner
from qinfer.engine.pages import PageTable
from qinfer.engine.prefix import publish
from qinfer.engine.sampling import SamplingParams
from qinfer.engine.scheduler import Scheduler
from qinfer.engine.sequence import Sequence, State
from qinfer.engine.steps import Sampled, Step, StepRunner
from qinfer.engine.turns import Turns, heard
from qinfer.errors import NonFiniteLogits, UnsupportedError
from qinfer.models.lora import Lora
from qinfer.models.model import Model

T = TypeVar("T")

_NON_FINITE = (
    "the model gave NaN or infinite logits. "
    'Where activations overflow float16, Model.load(path, dtype="bf16") helps; where it does not, check the weights, '
    "or whether bans and a constraint together leave nothing to draw"
)


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
        prefix_cache: bool = True,
        draft: int | DraftModel = 0,
    ) -> None:
        """Allocate the page pool.

        Args:
            model: The model; several generators may share it.
            kv_format: How keys and values are stored, with exceptions for layers as in "q4,0-1:q8,-1:fp16".
            max_tokens: Tokens that the page pool holds for all running requests together, rounded up to whole pages. A
                request of a model whose layers all have windows takes no more than the longest of them and two pages.
            page_size: Tokens per page.
            max_batch: Most requests that run at a time.
            max_step_tokens: Most tokens in a step; longer prompts are processed in several.
            prefix_cache: Whether requests that begin alike share the pages of their beginning.
            draft: Who guesses tokens that one step then checks: a number guesses at most so many from the text so far,
                which pays where texts repeat their prompts; a `DraftModel` asks a smaller model. It changes no token.
        """
        _check_draft(draft)
        if max_tokens < 1 or page_size < 1:
            raise ValueError(f"max_tokens and page_size must be at least 1, got {max_tokens} and {page_size}")
        settings = {
            "kv_format": kv_format,
            "max_tokens": max_tokens,
            "page_size": page_size,
            "max_batch": max_batch,
            "max_step_tokens": max_step_tokens,
            "prefix_cache": prefix_cache,
            "draft": draft,
        }
        self.model = model
        self.draft = draft
        self.pages = PageTable(-(-max_tokens // page_size), page_size)
        self.scheduler = Scheduler(
            self.pages,
            max_batch=max_batch,
            max_step_tokens=max_step_tokens,
            prefix_cache=prefix_cache,
            window=longest_window(model, draft),
        )
        self.cache = model.new_cache(self.pages.num_pages, page_size=page_size, kv_format=kv_format)
        longest = self.pages.pages_for(model.config.max_positions)
        if self.scheduler.window.length is None:
            longest = min(longest, self.pages.num_pages)
        sizes = {
            "page_size": page_size,
            "max_batch": max_batch,
            "table_width": longest,
            "max_step_tokens": max_step_tokens,
        }
        self.runner = StepRunner(model, self.cache, **sizes)
        self._draft_runner: DraftRunner | None = None
        if isinstance(draft, DraftModel):
            self._draft_runner = DraftRunner(
                draft, model, num_pages=self.pages.num_pages, kv_format=kv_format, sizes=sizes
            )
        self._sampled: Sampled | None = None  # the step whose ids are not on the host yet
        self._news: list[tuple[Job, bool]] = []  # who has ids that no event has told, and whether sampling went well
        self.seconds_waited = 0.0  # for ids, while the device had work; the rest of a step is the host's
        self._front = AsyncFront(self._advance)
        self._owner = Owner(self._front.refuse_others)
        self.turns = Turns(model.comm, settings)
        self._intake = Intake(model, draft=draft, pages=self.pages, window=self.scheduler.window, turns=self.turns)
        self._jobs: dict[int, Job] = {}
        self._events: list[Event] = []

    def warm_up(self) -> None:
        """Compile and record everything that serving can ask for, so that no request waits for it later."""
        with self._owner:
            self.turns.warm_up()
            for runner in (self.runner, self._draft_runner):
                if runner is not None:
                    runner.warm_up()

    def defragment(self) -> int:
        """Move what stands in the page pool to its beginning, and return how many pages moved.

        Texts stay as they are, and so does speed: attention finds pages wherever they are. It is for whoever reads the
        pool from outside.
        """
        with self._owner:
            moves = self.scheduler.defragment()
            self.cache.move_pages(moves)
            if self._draft_runner is not None:
                self._draft_runner.cache.move_pages(moves)
        return len(moves)

    def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0, lora: Lora | None = None
    ) -> Job:
        """Queue a request; `step` runs it and returns its events.

        Args:
            prompt: Text, or token ids.
            params: How to sample; None means `SamplingParams()`.
            priority: Requests of a higher one go first, and are the last to give way when pages run out.
            lora: The adapter to run with, of `Model.load_lora`; it cannot be unloaded until the request has finished.

        Raises:
            ValueError: If the prompt is empty, holds an id that the model does not have, or is too long, or the adapter
                is not loaded.
        """
        sequence = self._intake.sequence(prompt, params, lora)
        sequence.priority = priority
        with self._owner:
            return self._enqueue(sequence, self._events)

    def step(self) -> list[Event]:
        """Launch one step, if there is anything to run, and return the events that have come of the steps before.

        Raises:
            Exception: Whatever the model raises; the requests of that step have then ended with "error" and their pages
                are free, and their events come with the next step.
        """
        with self._owner:
            self._advance()
            events = list(self._events)
            self._events.clear()
        return events

    @overload
    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, lora: Lora | None = None
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: list[Prompt] | list[str] | list[list[int]],
        params: SamplingParams | abc.Sequence[SamplingParams] | None = None,
        *,
        lora: Lora | abc.Sequence[Lora | None] | None = None,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: Prompt | abc.Sequence[Prompt],
        params: SamplingParams | abc.Sequence[SamplingParams] | None = None,
        *,
        lora: Lora | abc.Sequence[Lora | None] | None = None,
    ) -> Completion | list[Completion]:
        """Complete one prompt, or several at once.

        Args:
            prompt: Text or token ids, or a list of either.
            params: One for all prompts, or a list with one for each.
            lora: The adapter to run with, likewise.

        Returns:
            A completion for one prompt, a list in the order of the prompts for a list.
        """
        single = isinstance(prompt, str) or not _holds_prompts(prompt)
        prompts: list[Prompt] = [prompt] if single else list(prompt)  # type: ignore[list-item, arg-type]
        several = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        loras = [lora] * len(prompts) if lora is None or isinstance(lora, Lora) else list(lora)
        for name, given in (("params", several), ("lora", loras)):
            if len(given) != len(prompts):
                raise ValueError(f"{name} must be one or a list of {len(prompts)}, one per prompt, got {len(given)}")
        # All are checked before the first is queued.
        sequences = [self._intake.sequence(*given) for given in zip(prompts, several, loras, strict=True)]
        with self._owner:
            jobs = [self._enqueue(sequence, []) for sequence in sequences]
        try:
            while not all(job.finished for job in jobs):
                with self._owner:
                    self._advance()
        finally:
            for job in jobs:
                job.cancel()
        completions = [job.completion for job in jobs if job.completion is not None]
        return completions[0] if single else completions

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, lora: Lora | None = None
    ) -> Iterator[Event]:
        """Complete one prompt and yield its events; closing the iterator cancels the request."""
        return self._stream(self._intake.sequence(prompt, params, lora))

    def astream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0, lora: Lora | None = None
    ) -> AsyncIterator[Event]:
        """Complete one prompt and yield its events to an asyncio task; any number of tasks may do so at a time.

        Steps run in a thread. While a stream is open, other methods raise RuntimeError; `between_steps` calls them. A
        request that fails has the error in its last event.
        """
        sequence = self._intake.sequence(prompt, params, lora)
        sequence.priority = priority
        return self._front.stream(lambda events: self._enqueue(sequence, events))

    async def between_steps(self, action: Callable[[], T]) -> T:
        """Call something between two steps while streams of `astream` are open: to load an adapter, for one.

        Args:
            action: Called without arguments, in the thread that steps.

        Returns:
            What it returns.
        """
        return await self._front.between_steps(action)

    def _stream(self, sequence: Sequence) -> Iterator[Event]:
        """Run a sequence once somebody asks for its first event."""
        events: list[Event] = []
        with self._owner:
            job = self._enqueue(sequence, events)
        try:
            while events or not job.finished:
                with self._owner:
                    if not events:
                        self._advance()
                    ready, events[:] = list(events), []
                yield from ready
        finally:
            job.cancel()

    def save_session(self, text: Prompt | Job, path: str | Path) -> int:
        """Write the whole pages of a prompt or a request to a file; return the tokens it holds (`session.save`)."""
        with self._owner:
            if isinstance(text, Job):
                if text.sequence.lora is not None:
                    raise UnsupportedError("pages of a request with an adapter cannot be saved; submit it without lora")
                if text.sequence.state is State.RUNNING and self.scheduler.prefix_cache:
                    publish(self.pages, text.sequence)
                text = [*text.sequence.prompt, *text.sequence.generated]
            return session.save(Path(path), self._intake.encode(text), self.model, self.cache, self.pages)

    def load_session(self, path: str | Path) -> list[int]:
        """Read a file of `save_session`; return its ids, whose pages prompts find from now on (`session.load`)."""
        if not self.scheduler.prefix_cache:
            raise ValueError("load_session needs Generator(prefix_cache=True)")
        with self._owner:
            text = session.load(Path(path), self.model, self.cache, self.pages)
            if self._draft_runner is not None:
                self._draft_runner.read(text.token_ids, text.pages, text.num_known, self.scheduler.max_step_tokens)
        return text.token_ids

    def repeat(self, requests: abc.Iterable[abc.Mapping[str, Any]], cancelled: abc.Iterable[int]) -> None:
        """Do on this rank what rank 0 does in a step: see engine/turns.py for what it tells."""
        for request in requests:
            lora, params = self.model.find_lora(request["lora"]), heard(request, self.model.tokenizer)
            sequence = self._intake.sequence(request["prompt"], params, lora, number=request["id"])
            sequence.priority = request["priority"]
            self._enqueue(sequence, [])
        for number in cancelled:
            self._jobs[number].cancel()
        self._advance()

    def _enqueue(self, sequence: Sequence, events: list[Event]) -> Job:
        """Queue a checked sequence whose events go to `events`."""
        rewind = self.scheduler.rewind
        if sequence.lora is not None:
            sequence.lora.acquire()
        job = Job(sequence, self.model.tokenizer, events, release=self._release, rewind=rewind, lock=self._owner.lock)
        self.scheduler.add(sequence)
        self.turns.request(sequence)
        self._jobs[job.id] = job
        return job

    def _release(self, sequence: Sequence, reason: str) -> None:
        """Forget a request and return its pages; a step that still computes it is not listened to."""
        self.scheduler.finish(sequence, reason)
        if reason == "cancelled":
            self.turns.cancel(sequence.id)
        if sequence.lora is not None:
            sequence.lora.release()
        del self._jobs[sequence.id]

    def _advance(self) -> None:
        """Launch the next step, then read and deliver what the one before gave."""
        with self._owner.lock:
            if self._sampled is None and not self.scheduler.has_work:
                return
            self.turns.step()
            if self.draft:
                # A guess needs all ids, so a step with drafts waits for the one before.
                self._settle()
                for sequence in self.scheduler.running:
                    sequence.guess()
            step = self.scheduler.schedule()
            with FailTogether(self.model.comm, lambda: self._jobs_of(step), self._settle):
                if self._draft_runner is not None:
                    step = self._draft_runner.fill(step)
                launched = self.runner.launch(step) if step else None
                self._take()
                if launched is not None:
                    self._sampled = self.runner.sample(launched)
            self._deliver()

    def _jobs_of(self, step: Step) -> list[Job]:
        """Return the requests of a step, less those that the failure of the step before has ended already."""
        return [self._jobs[one.request] for one, _ in step if one.request in self._jobs]

    def _settle(self) -> None:
        """Read and deliver what was sampled already, so that the host knows what the device knows."""
        self._take()
        self._deliver()

    def _take(self) -> None:
        """Wait for the ids of the step before and hand them to their sequences; what has ended meanwhile gets none."""
        sampled, self._sampled = self._sampled, None
        if sampled is None:
            return
        start = perf_counter()
        with FailTogether(self.model.comm, lambda: self._alive(sampled), self._deliver):
            ids = sampled.ids()
        self.seconds_waited += perf_counter() - start
        logprobs = sampled.logprobs()
        for scores in sampled.scores:
            scores.tell()
        row, jobs = 0, self._jobs
        for sequence, num_rows in zip(sampled.sequences, sampled.counts, strict=True):
            # What has ended or was rewound meanwhile expects nothing of this step.
            if sequence.source >= 0:
                before = len(sequence.generated)
                is_whole = sequence.take(ids[row]) if num_rows == 1 else sequence.accept(ids[row : row + num_rows])
                self._news.append((jobs[sequence.id], is_whole))
                if logprobs and sequence.params.logprobs is not None:
                    sequence.logprobs += [logprobs[row + i] for i in range(len(sequence.generated) - before)]
            row += num_rows

    def _alive(self, sampled: Sampled) -> list[Job]:
        """Return the requests to which a step told something, as far as they have not ended meanwhile."""
        sequences = sampled.sequences + [scores.sequence for scores in sampled.scores]
        return [self._jobs[sequence.id] for sequence in sequences if sequence.state is not State.FINISHED]

    def _deliver(self) -> None:
        """Turn new ids into events; a request that raises ends alone."""
        news, self._news = iter(self._news), []
        is_told = False
        while not is_told:
            with FailAlone() as guard:
                for guard.job, is_whole in news:
                    guard.job.deliver()
                    if not is_whole and not guard.job.finished:
                        place = guard.job.sequence.num_known - 1
                        raise NonFiniteLogits(f"request {guard.job.id}, position {place}: {_NON_FINITE}")
                is_told = True


def _check_draft(draft: object) -> None:
    """Raise where something cannot guess tokens."""
    if isinstance(draft, bool) or not isinstance(draft, (int, DraftModel)):
        raise TypeError(f"draft must be a number or a DraftModel, got {type(draft).__name__}")
    if isinstance(draft, int) and draft < 0:
        raise ValueError(f"draft must be a DraftModel or at least 0, got {draft}")


def _holds_prompts(prompts: Prompt | abc.Sequence[Prompt]) -> bool:
    """Say whether this is a list of prompts and not one prompt of ids."""
    if len(prompts) == 0:
        raise ValueError("a prompt must hold at least one token, got none")
    return isinstance(prompts[0], (str, abc.Sequence))
