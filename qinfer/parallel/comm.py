"""How the ranks of a model exchange tensors; the decoder calls these and never asks how many ranks there are."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from qinfer.errors import GroupError, UnsupportedError
from qinfer.kernels.all_reduce import BLOCK, Mailboxes, all_reduce
from qinfer.parallel.link import CLOSED, Limits, Link
from qinfer.parallel.peers import open_mailboxes, rehearse
from qinfer.parallel.plan import GB

# A rank that computes or compiles keeps beating, so a collective may wait for long; the link finds who is gone.
PATIENCE = timedelta(hours=1)
# torch 2.13 renamed it.
_gather_equal_parts = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Graph(Protocol):
    """What a group asks of a recorded graph."""

    def reset(self) -> None:
        """Give up what was recorded."""
        ...


class Communicator(Protocol):
    """The collectives that a decoder needs; every rank calls the same ones in the same order."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0 to size - 1."""
        ...

    @property
    def size(self) -> int:
        """Number of processes that hold a share of the model."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of every rank's x; x itself may be overwritten with it."""
        ...

    def all_reduce_parts(self, parts: Tensor, *, in_order: bool = False) -> Tensor:
        """Return parts [S, T, C] whose sum over S is that of all parts of every rank; S may differ between ranks.

        With `in_order`, ranks are added in their order, so that a row's bits do not depend on its place. What was given
        may be overwritten.
        """
        ...

    def all_gather(self, x: Tensor, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
        """Return every rank's x joined along `dim` in rank order; only that dimension may differ between ranks.

        `sizes` holds that dimension of every rank, 0 where a rank has nothing; None: all are alike.
        """
        ...

    def broadcast(self, x: Tensor) -> Tensor:
        """Return rank 0's x; on the other ranks x gives shape and dtype and may be overwritten."""
        ...

    def agree(self, ids: Tensor) -> list[int]:
        """Return rank 0's ids as a list, which waits for the device; raises GroupError if a rank is gone by then."""
        ...

    def check(self) -> None:
        """Raise GroupError if a rank is gone; what a collective gave before may be anything then."""
        ...

    def tell(self, message: dict[str, Any]) -> None:
        """Send JSON from rank 0 to the others, which wait for it in `Group.receive`; nothing happens on other ranks."""
        ...

    def recorded(self, graph: Graph) -> None:
        """Note a graph with collectives in it, which is reset when the group is closed."""
        ...

    def fail(self, reason: str) -> None:
        """End the group because of something that happened on this rank, which may have lost step with the others."""
        ...

    def close(self) -> None:
        """End the group in peace; may be called again."""
        ...


class Alone:
    """The communicator of a model that one process holds entirely: every collective is the identity, without a copy."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return x, the sum over one rank."""
        return x

    def all_reduce_parts(self, parts: Tensor, *, in_order: bool = False) -> Tensor:
        """Return the parts, for whoever reads them to add."""
        return parts

    def all_gather(self, x: Tensor, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
        """Return x, the only part.

        Raises:
            IndexError: x has no such dimension.
            ValueError: `sizes` does not say what x is.
        """
        check_sizes(x, dim, sizes, rank=0, size=1)
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """Return x, which is rank 0's."""
        return x

    def agree(self, ids: Tensor) -> list[int]:
        """Return the ids as a list."""
        return list(ids.tolist())

    def check(self) -> None:
        """Nobody else can be gone."""

    def tell(self, message: dict[str, Any]) -> None:
        """Nobody listens."""

    def recorded(self, graph: Graph) -> None:
        """No graph has to end before this."""

    def fail(self, reason: str) -> None:
        """Nobody else is concerned."""

    def close(self) -> None:
        """There is nothing to end."""


class Group:
    """Ranks of several processes, over torch.distributed: NCCL between GPUs, gloo between CPUs.

    Between GPUs that reach each other's memory, what is small goes through mailboxes there instead.

    Every failure of a rank ends the group: whatever is called then or waits raises GroupError, which names rank and
    cause. There is one group per process at a time.

    Attributes:
        rank: number of this process.
        size: number of processes.
        device: where this rank computes.
    """

    def __init__(
        self,
        link: Link,
        store: Store,
        *,
        size: int,
        device: torch.device,
        limits: Limits,
        leave: Callable[[str], None],
        clean: Callable[[], None] = lambda: None,
    ) -> None:
        """Connect the ranks and test the collectives with data.

        Args:
            link: to the other ranks, not watched yet.
            store: where torch.distributed exchanges addresses.
            size: number of ranks.
            device: where this rank computes, prepared.
            limits: how long connecting and testing may take.
            leave: what to do about the processes when the group is over; called once, with the reason, from any thread.
            clean: called when the group is closed and nothing looks at the store any more.

        Raises:
            GroupError: a rank is gone, the test took too long, or a collective gave a wrong result.
            UnsupportedError: this process belongs to a torch.distributed group already.
        """
        if dist.is_initialized():
            raise UnsupportedError("this process has a torch.distributed group already; close the other model first")
        self.rank, self.size, self.device = link.rank, size, device
        self._link, self._limits, self._leave, self._clean = link, limits, leave, clean
        self._mail: Mailboxes | None = None
        self._graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        self._aborting = threading.Lock()
        self._is_joined = False  # whether there are collectives to abort
        atexit.register(self._quit)
        backend = "nccl" if device.type == "cuda" else "gloo"
        link.watch(self._fall)
        alarm = threading.Timer(limits.check, self._expire)
        alarm.daemon = True
        try:
            with self._guarded():
                if device.type == "cuda":
                    rehearse(device, self.rank, size)  # compiles, which takes seconds that the alarm shall not count
                alarm.start()
                options: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
                options["timeout"] = timedelta(seconds=limits.check)
                self._is_joined = True
                dist.init_process_group(backend, store=store, rank=self.rank, world_size=size, **options)
                if device.type == "cuda":
                    self._mail = open_mailboxes(device, self.rank, size, self._everyone)
                self._test()
                dist.distributed_c10d._set_pg_timeout(PATIENCE)
        except BaseException:
            self.close()
            raise
        finally:
            alarm.cancel()

    def all_reduce(self, x: Tensor) -> Tensor:
        """Add up every rank's x, in place; all ranks get the same bits."""
        with self._guarded():
            dist.all_reduce(x)
        return x

    def all_reduce_parts(self, parts: Tensor, *, in_order: bool = False) -> Tensor:
        """Add up the parts of all ranks.

        Args:
            parts: [S, T, C] fp32, where S may differ between ranks, or [1, T, C] fp16 or bf16, which travels and is
                added as such; may be overwritten.
            in_order: add the ranks in their order. NCCL and gloo begin with another rank in every part of a tensor.

        Returns:
            [1, T, C], or a part of every rank, the same bits on all ranks.
        """
        if parts.dtype == torch.float32 and self._mail is not None and self._mail.fits(*parts.shape[1:]):
            self._link.check()
            return all_reduce(parts, self._mail)
        mine = parts if parts.shape[0] == 1 else parts.sum(0, keepdim=True)
        return self.all_gather(mine, 0) if in_order else self.all_reduce(mine)

    def all_gather(self, x: Tensor, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
        """Join every rank's x along `dim`.

        Parts travel as wide as the widest, which one collective of equal parts serves best.

        Raises:
            IndexError: x has no such dimension.
            ValueError: `sizes` does not say what x is.
        """
        dim = check_sizes(x, dim, sizes, rank=self.rank, size=self.size)
        sizes = [x.shape[dim]] * self.size if sizes is None else sizes
        shape = list(x.shape)
        shape[dim] = max(sizes)
        part = x.contiguous()
        if list(x.shape) != shape:
            part = x.new_zeros(shape)
            part.narrow(dim, 0, x.shape[dim]).copy_(x)
        parts = x.new_empty(self.size, *shape)
        if parts.numel():
            with self._guarded():
                _gather_equal_parts(parts.view(-1), part.view(-1))
        return torch.cat([whole.narrow(dim, 0, size) for whole, size in zip(parts, sizes, strict=True)], dim)

    def broadcast(self, x: Tensor) -> Tensor:
        """Return rank 0's x, which may overwrite x."""
        x = x.contiguous()
        num_words = -(-x.nbytes // 4 // BLOCK) * BLOCK
        if self._mail is not None and x.nbytes % 4 == 0 and self._mail.fits(1, num_words):
            self._link.check()
            # The sum of rank 0's bits and of zeros. Whole channels, so that one kernel serves all lengths.
            bits = x.new_zeros(1, 1, num_words, dtype=torch.int32)
            mine = bits.view(-1)[: x.nbytes // 4]
            if self.rank == 0:
                mine.copy_(x.view(-1).view(torch.int32))
            sent = all_reduce(bits, self._mail).view(-1)[: mine.numel()]
            return sent.view(x.dtype).view(x.shape)
        with self._guarded():
            dist.broadcast(x, 0)
        return x

    def agree(self, ids: Tensor) -> list[int]:
        """Return rank 0's ids, which every rank then goes on with."""
        agreed = list(self.broadcast(ids).tolist())
        self.check()
        return agreed

    def check(self) -> None:
        """Raise GroupError if a rank is gone: a collective that was aborted on a GPU returns like any other.

        A group that was closed in peace was not aborted: rank 0 had what it needed before this rank was through.
        """
        if not self.is_closed:
            self._link.check()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.agree(self.all_reduce(torch.zeros(1, device=self.device)))

    def finish(self) -> None:
        """End the group in peace when every rank has come here."""
        self.barrier()
        while self.rank and self.receive() is not None:
            pass
        self.close()

    def free_memory(self) -> list[float]:
        """Return the GB (2^30 bytes) that each rank can use, the same list on all of them."""
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.size
        everyone = self.all_gather(torch.tensor([free], device=self.device), 0)
        return [nbytes / GB for nbytes in self.agree(everyone)]

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message from rank 0 to all others."""
        if self.rank == 0:
            self._link.send(message)

    def receive(self) -> dict[str, Any] | None:
        """Wait for the next message of rank 0, for as long as it takes; None when rank 0 has closed the group.

        Raises:
            GroupError: a rank is gone.
        """
        return self._link.receive()

    @property
    def is_closed(self) -> bool:
        """Whether the group has ended in peace; on a rank that is still busy, calls raise GroupError for this, too."""
        return self._link.reason == CLOSED

    def fail(self, reason: str) -> None:
        """End the group because of something that happened on this rank; the first reason counts."""
        self._link.down(f"rank {self.rank}: {reason}")

    def recorded(self, graph: Graph) -> None:
        """Note a graph with collectives in it."""
        self._graphs.add(graph)

    def close(self) -> None:
        """End the group in peace; may be called again."""
        if self.device.type == "cuda" and self._link.reason is None:
            torch.cuda.synchronize(self.device)
        self._link.down(CLOSED)
        self._end()
        self._clean()
        atexit.unregister(self._quit)

    def _quit(self) -> None:
        """End what would keep the program from ending; the others notice when it has."""
        if self._mail is not None:
            self._mail.abort.fill_(1)
        self._end()

    def _end(self) -> None:
        """End the graphs, then the collectives: NCCL waits for the end of all graphs that hold collectives of it."""
        while self._graphs:
            self._graphs.pop().reset()
        self._abort()

    def _abort(self) -> None:
        """End the collectives, which frees whoever waits in one; destroying them would wait for ranks that are gone."""
        with self._aborting:
            if self._is_joined and dist.is_initialized():
                dist.distributed_c10d._abort_process_group()
                self._is_joined = False

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn an error of torch.distributed into the one that says who caused it."""
        self._link.check()
        try:
            yield
        except RuntimeError as problem:
            # This rank may see the collective break before its link sees why.
            reason = self._link.wait(self._limits.silence + 2)
            if reason is None:
                reason = f"rank {self.rank}: a collective failed: {problem}"
                self._link.down(reason)
            raise GroupError(reason) from problem

    def _everyone(self, mine: Sequence[int]) -> list[list[int]]:
        """Return some integers of every rank."""
        gathered = self.all_gather(torch.tensor([list(mine)], device=self.device), 0)
        return [list(row) for row in gathered.tolist()]

    def _test(self) -> None:
        """Compare what every collective gives with what it must give, for unequal parts and an empty one as well."""
        ranks = torch.arange(self.size, device=self.device)
        mine = (self.rank + 1) * torch.arange(1, 65, dtype=torch.float32, device=self.device)
        total = self.size * (self.size + 1) // 2
        sizes = list(range(self.size))
        checks = {
            "all_reduce": (self.all_reduce(mine.clone()), total * torch.arange(1, 65, device=self.device)),
            "all_gather": (
                self.all_gather(ranks[self.rank].expand(2, self.rank), 1, sizes),
                ranks.repeat_interleave(ranks).expand(2, -1),
            ),
            "broadcast": (self.broadcast(mine.clone()), torch.arange(1, 65, device=self.device)),
        }
        # Several in a row use both buffers of the mailboxes.
        for use in range(1, 4):
            parts = mine.expand(1 + self.rank % 2, 3, 64) * use / (1 + self.rank % 2)
            expected = use * total * torch.arange(1, 65, device=self.device).expand(1, 3, 64)
            checks[f"all_reduce_parts, use {use},"] = (self.all_reduce_parts(parts.contiguous()), expected)
        for name, (got, expected) in checks.items():
            if not torch.equal(got, expected.to(got.dtype)):
                reason = f"{name} gave a wrong result in the test at the start"
                self.fail(reason)
                raise GroupError(f"rank {self.rank}: {reason}")

    def _expire(self) -> None:
        self.fail(
            f"connecting and testing the collectives took more than {self._limits.check:g} s; between machines, "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network interface to use"
        )

    def _fall(self, reason: str) -> None:
        """Free whoever waits in a collective; the link calls this when the group is over."""
        if reason != CLOSED and self._mail is not None:
            self._mail.abort.fill_(1)
        self._leave(reason)
        if reason != CLOSED and self.device.type == "cuda":
            # The end of a peer does not free a GPU that waits for it. The abort ends as soon as all recorded graphs
            # have, and the thread that must close the group for that may be this one.
            threading.Thread(target=self._abort, name="qinfer-abort", daemon=True).start()


def prepare(device: torch.device) -> None:
    """Make a GPU the current one and start it, which takes seconds that the test of the collectives shall not count."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)


def check_sizes(x: Tensor, dim: int, sizes: Sequence[int] | None, *, rank: int, size: int) -> int:
    """Return `dim` counted from 0, after checking what a rank is about to gather.

    Raises:
        IndexError: x has no such dimension.
        ValueError: `sizes` does not have one entry per rank, or another one for this rank than x.
    """
    length = x.size(dim)
    if sizes is not None and (len(sizes) != size or sizes[rank] != length):
        raise ValueError(f"sizes must be of {size} ranks and {length} for rank {rank}, got {list(sizes)}")
    return dim % x.dim()
