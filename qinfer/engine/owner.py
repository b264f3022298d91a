"""Who is inside a generator: one thread at a time, and nobody else between the steps that asyncio streams wait for."""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock
from types import TracebackType


class Owner:
    """Holds a generator for the thread that enters; it may enter again, others wait.

    Attributes:
        lock: What they wait for; cancelling takes it alone, because a request may be cancelled at any time.
    """

    def __init__(self, refuse: Callable[[], None]) -> None:
        """Ask `refuse` first, which raises where a call must not wait but go another way."""
        self._refuse = refuse
        self.lock = RLock()

    def __enter__(self) -> None:
        """Wait until no other thread is inside."""
        self._refuse()
        self.lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let the next one in."""
        self.lock.release()
