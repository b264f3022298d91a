"""Staging: how the bytes of a model get from files to a device.

    file ──read──► buffer 0 ──copy──► tensor on the device
         ──read──► buffer 1 ──copy──►
         …

A device copies at full speed only from page-locked host memory, which is scarce. So the bytes go in chunks through a
ring of page-locked buffers: threads fill the buffers ahead, the calling thread starts the copies in order on the
device's current stream, and no buffer is filled again before the copy out of it has finished. The host memory in use
is that of the ring, however large the model is.

The ring knows nothing of CUDA: a `Link` allocates and copies. Kernels of the same stream see a tensor complete, and
nothing here waits for the device except for a free buffer.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor

# Eight reads at a time keep a fast disk, or the memory bus of the page cache, busy; chunks of 8 MiB make the cost of
# starting one small beside the 0.2 ms that its copy takes.
NUM_BUFFERS = 8
BUFFER_BYTES = 8 << 20
SMALLEST_CHUNK = 1 << 20  # shorter reads are not worth a thread

Fill = Callable[[Tensor, int], None]  # (uint8 [n] to write, index of its first byte): put these bytes there


class Ticket(Protocol):
    """A copy that has been started."""

    def synchronize(self) -> None:
        """Wait until it has finished."""
        ...


class Link(Protocol):
    """The way from the host to one device."""

    def buffer(self, num_bytes: int) -> Tensor:
        """Return host memory to copy from, uint8 [num_bytes]."""
        ...

    def target(self, num_bytes: int) -> Tensor:
        """Return device memory to copy to, uint8 [num_bytes]."""
        ...

    def copy(self, source: Tensor, target: Tensor) -> Ticket:
        """Start a copy; `source` must not change before its ticket says that it has finished."""
        ...


@dataclass(frozen=True)
class CudaLink:
    """The link to a CUDA device: page-locked buffers and copies on the current stream."""

    device: torch.device

    def buffer(self, num_bytes: int) -> Tensor:
        """Return page-locked memory."""
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def target(self, num_bytes: int) -> Tensor:
        """Return memory of the device."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def copy(self, source: Tensor, target: Tensor) -> Ticket:
        """Start a copy on the device's current stream."""
        target.copy_(source, non_blocking=True)
        # A blocking event lets the thread that waits sleep; others are busy with reading.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event


class Staging:
    """A ring of buffers in front of one device."""

    def __init__(self, link: Link, *, num_buffers: int = NUM_BUFFERS, buffer_bytes: int = BUFFER_BYTES) -> None:
        """Prepare a ring; its memory is allocated by the first upload.

        Args:
            link: the way to the device.
            num_buffers: chunks on their way at the same time, each filled by a thread of its own.
            buffer_bytes: size of a buffer, and largest size of a chunk.

        Raises:
            ValueError: a number is not positive.
        """
        if num_buffers < 1 or buffer_bytes < 1:
            raise ValueError(f"num_buffers and buffer_bytes must be positive, got {num_buffers} and {buffer_bytes}")
        self._link = link
        self._buffer_bytes = buffer_bytes
        self._buffers: list[Tensor] = []
        self._tickets: list[Ticket | None] = [None] * num_buffers  # of the last copy out of each buffer
        self._next = 0  # the buffer whose turn it is
        self._pool = ThreadPoolExecutor(max_workers=num_buffers, thread_name_prefix="qinfer-staging")
        self._lock = Lock()

    def upload(self, num_bytes: int, fill: Fill) -> Tensor:
        """Bring bytes to the device.

        Args:
            num_bytes: how many.
            fill: writes some of them into host memory; it is called from several threads, on disjoint ranges.

        Returns:
            uint8 [num_bytes] on the device, complete for whatever is launched on the same stream later.

        Raises:
            Exception: whatever `fill` raises; the ring can be used again.
        """
        with self._lock:
            target = self._link.target(num_bytes)
            if num_bytes:
                self._upload(target, fill)
            return target

    def send(self, tensor: Tensor) -> Tensor:
        """Bring a host tensor, which may be a strided view, to the device.

        Returns:
            The same values, contiguous, on the device.
        """
        source = as_bytes(tensor.contiguous())
        data = self.upload(len(source), lambda part, start: _copy(source, part, start))
        return from_bytes(data, tensor.dtype, tensor.shape)

    def _upload(self, target: Tensor, fill: Fill) -> None:
        """Fill and copy chunk by chunk, `num_buffers` of them at a time."""
        num_buffers = len(self._tickets)
        self._buffers = self._buffers or [self._link.buffer(self._buffer_bytes) for _ in range(num_buffers)]
        even = -(-len(target) // num_buffers)
        chunk = min(self._buffer_bytes, max(even, SMALLEST_CHUNK))
        pending: deque[tuple[int, Tensor, Future[Tensor]]] = deque()
        try:
            for start in range(0, len(target), chunk):
                if len(pending) == num_buffers:
                    self._copy(*pending.popleft())
                part, slot = target[start : start + chunk], self._next
                self._next = (slot + 1) % num_buffers
                pending.append((slot, part, self._start(slot, len(part), start, fill, alone=chunk >= len(target))))
            while pending:
                self._copy(*pending.popleft())
        finally:
            # After an error some threads may still be writing to their buffers; the next upload must not meet them.
            wait([future for _, _, future in pending])

    def _start(self, slot: int, length: int, start: int, fill: Fill, *, alone: bool) -> Future[Tensor]:
        """Fill a buffer once the last copy out of it has finished; a chunk that is alone needs no thread."""
        if not alone:
            return self._pool.submit(self._filled, slot, length, start, fill)
        done: Future[Tensor] = Future()
        done.set_result(self._filled(slot, length, start, fill))
        return done

    def _filled(self, slot: int, length: int, start: int, fill: Fill) -> Tensor:
        ticket = self._tickets[slot]
        if ticket is not None:
            ticket.synchronize()
        part = self._buffers[slot][:length]
        fill(part, start)
        return part

    def _copy(self, slot: int, target: Tensor, filled: Future[Tensor]) -> None:
        self._tickets[slot] = self._link.copy(filled.result(), target)


def read_file(fd: int, offset: int) -> Fill:
    """Return a `Fill` that reads an open file from byte `offset` on.

    Reading leaves no pages in this process, unlike a mapping, whose pages count as its memory once they are touched;
    and a file that got shorter is an error, not a signal.

    Raises:
        OSError: (the `Fill`) the file cannot be read, or ends early.
    """

    def fill(part: Tensor, start: int) -> None:
        view = part.numpy().data
        done = 0
        while done < len(view):
            got = os.preadv(fd, [view[done:]], offset + start + done)
            if got == 0:
                raise OSError(f"the file ends at byte {offset + start + done}, in the middle of a tensor")
            done += got

    return fill


def as_bytes(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as uint8 [n]."""
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


def from_bytes(data: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """View uint8 [n] in a dtype and a shape."""
    return data.view(dtype).view(tuple(shape))


def _copy(source: Tensor, part: Tensor, start: int) -> None:
    part.copy_(source[start : start + len(part)])
