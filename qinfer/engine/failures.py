"""Who ends when something raises: the requests of a step, or one request alone."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from qinfer.engine.job import Job
from qinfer.parallel.comm import Communicator


class FailTogether:
    """Ends the requests of a step with "error" when an exception leaves the block, and lets the exception go on."""

    def __init__(self, comm: Communicator, jobs: Callable[[], list[Job]], settle: Callable[[], None]) -> None:
        """Guard the requests of a step, named when it fails; `settle` delivers what the step before gave."""
        self._comm = comm
        self._jobs = jobs
        self._settle = settle

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Deliver what the step before gave, then end what is not finished."""
        if error is not None:
            jobs = self._jobs()
            # Other ranks may have come further, or less far.
            self._comm.fail(f"{type(error).__name__}: {error}")
            try:
                self._settle()
            finally:
                for job in jobs:
                    job.fail(error)


class FailAlone:
    """Ends the request that it guards with "error" when an exception leaves the block, which goes no further.

    Attributes:
        job: The request; set it to guard the next one inside the same block.
    """

    job: Job

    def __enter__(self) -> FailAlone:
        """Guard whichever request is set."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """Keep the error in the completion; what is no Exception, such as a keyboard interrupt, goes on."""
        if error is not None:
            self.job.fail(error)
        return isinstance(error, Exception)
