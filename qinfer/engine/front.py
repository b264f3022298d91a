"""Streams for asyncio: one task steps the generator in a thread while any number of tasks read their events.

The generator belongs to whoever steps it. So new requests and cancellations wait for the gap between two steps; there
the events of the last step are handed out as well. The event loop itself never waits for the model.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from qinfer.engine.job import Event, Job

T = TypeVar("T")
Start: TypeAlias = Callable[[list[Event]], Job]


@dataclass(eq=False)
class _Reader:
    """One stream: how its request starts, where its events arrive, and whether anybody still listens."""

    start: Start
    events: list[Event] = field(default_factory=list)
    queue: asyncio.Queue[Event | BaseException] = field(default_factory=asyncio.Queue)
    job: Job | None = None
    closed: bool = False


class AsyncFront:
    """Runs the steps of a generator for the tasks of an event loop."""

    def __init__(self, advance: Callable[[], None]) -> None:
        """Step by calling `advance`."""
        self._advance = advance
        self._readers: list[_Reader] = []
        self._driver: asyncio.Task[None] | None = None
        self._thread: int | None = None  # that steps
        self._actions: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []

    async def stream(self, start: Start) -> AsyncIterator[Event]:
        """Start a request and yield its events; closing the iterator, or cancelling its task, cancels the request.

        Args:
            start: Submits the request to the generator, given the list for its events.
        """
        reader = _Reader(start)
        self._readers.append(reader)
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        try:
            while True:
                event = await reader.queue.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if event.completion is not None:
                    return
        finally:
            reader.closed = True

    def refuse_others(self) -> None:
        """Let a call pass where no stream is open, and in the thread that steps.

        Raises:
            RuntimeError: Somebody else's call would run between steps that the streams wait for.
        """
        if self._readers and threading.get_ident() != self._thread:
            raise RuntimeError(
                "streams of astream are open on this generator: use astream, or between_steps for other calls"
            )

    async def between_steps(self, action: Callable[[], T]) -> T:
        """Call something between two steps, in the thread that steps, and return what it returns."""
        if self._driver is None or self._driver.done():
            return action()
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._actions.append((action, done))
        return await done

    async def _drive(self) -> None:
        """Step until nobody waits for anything."""
        loop = asyncio.get_running_loop()
        try:
            with ThreadPoolExecutor(max_workers=1, thread_name_prefix="qinfer") as thread:
                error: BaseException | None = None
                self._thread = await loop.run_in_executor(thread, threading.get_ident)
                while self._serve(error) or self._actions:
                    while self._actions:
                        await self._act(thread, *self._actions.pop(0))
                    step = loop.run_in_executor(thread, self._advance)
                    # Requests that a failed step ended have the error in their last event.
                    [error] = await asyncio.gather(step, return_exceptions=True)
        finally:
            for reader in self._readers:
                if reader.job is not None:
                    reader.job.cancel()
            self._readers.clear()
            for _, done in self._actions:
                done.cancel()
            self._actions.clear()

    async def _act(self, thread: ThreadPoolExecutor, action: Callable[[], Any], done: asyncio.Future[Any]) -> None:
        """Call what somebody wants called between two steps, and tell what came of it."""
        called = asyncio.get_running_loop().run_in_executor(thread, action)
        result: Any = (await asyncio.gather(called, return_exceptions=True))[0]
        if done.cancelled():
            return
        if isinstance(result, BaseException):
            done.set_exception(result)
        else:
            done.set_result(result)

    def _serve(self, error: BaseException | None) -> bool:
        """Hand out events, start and cancel requests between two steps; say whether anybody is left."""
        told = False
        for reader in tuple(self._readers):
            for event in reader.events:
                reader.queue.put_nowait(event)
                told = True
            reader.events.clear()
            if reader.job is None and not reader.closed:
                reader.job = reader.start(reader.events)
            if reader.job is not None and reader.closed:
                reader.job.cancel()
            if reader.closed or (reader.job is not None and reader.job.finished):
                self._readers.remove(reader)
        if error is not None and not told:
            # No request ended by it, so the next step would meet it again.
            for reader in self._readers:
                reader.queue.put_nowait(error)
        return bool(self._readers)
