"""Start the ranks of a group: from one process, which becomes rank 0, or where torchrun has started them all.

`lead` starts a Python process for each other rank of this machine. What it is to do comes as one JSON line on its
standard input: the name of a function and its arguments. So a program that starts ranks needs no
`if __name__ == "__main__"`, and nothing is unpickled. A started rank ends with rank 0, whatever ends that one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore, PrefixStore, rendezvous  # type: ignore[attr-defined]

from qinfer.env import rank_of_torchrun
from qinfer.errors import GroupError, UnsupportedError
from qinfer.parallel.comm import Group, prepare
from qinfer.parallel.link import CLOSED, Address, Limits, Link, Listener, connect

GRACE = 1.0  # seconds that a rank has to say what happened before it is ended
LOCAL = "127.0.0.1"
_FOLLOW = "from qinfer.parallel.spawn import follow; follow()"


class Children:
    """The processes that rank 0 has started."""

    def __init__(self, orders: list[dict[str, Any]]) -> None:
        """Start one process for each order."""
        self._processes: list[subprocess.Popen[bytes]] = []
        # A session of their own keeps Ctrl-C for rank 0, which then ends them.
        for order in orders:
            process = subprocess.Popen([sys.executable, "-c", _FOLLOW], stdin=subprocess.PIPE, start_new_session=True)
            self._processes.append(process)
            assert process.stdin is not None
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()

    @property
    def pids(self) -> list[int]:
        """Process ids of ranks 1, 2 and so on."""
        return [process.pid for process in self._processes]

    def check(self) -> None:
        """Raise GroupError if one has ended."""
        for rank, process in enumerate(self._processes, 1):
            if process.poll() is not None:
                raise GroupError(f"rank {rank} {_ending(process.returncode)} before it joined the others")

    def end(self, *, grace: float = GRACE) -> None:
        """Wait for them to end, for `grace` seconds together, then end them, even those that are stopped."""
        last = time.monotonic() + grace
        while time.monotonic() < last and any(process.poll() is None for process in self._processes):
            time.sleep(0.01)
        for process in self._processes:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def lead(
    entry: str,
    arguments: Mapping[str, Any],
    devices: Sequence[str],
    *,
    limits: Limits | None = None,
    started: Callable[[Children], None] = lambda _: None,
) -> Group:
    """Become rank 0 of a group whose other ranks run a function.

    Args:
        entry: "module:function"; every other rank calls function(group, **arguments).
        arguments: what JSON can say.
        devices: where each rank computes, this process on the first.
        limits: how long what may take.
        started: called as soon as the processes run; for tests, which stop some of them.

    Returns:
        The group; closing it, or the end of this process, ends the ranks.

    Raises:
        GroupError: a rank did not come up; names it and the cause.
    """
    limits, size = limits or Limits(), len(devices)
    listener = Listener(LOCAL, size)
    folder = tempfile.TemporaryDirectory(prefix="qinfer-")
    store = f"{folder.name}/store"
    common = {"entry": entry, "arguments": dict(arguments), "size": size, "store": store}
    common |= {"address": asdict(listener.address), "limits": asdict(limits)}
    children = Children([{**common, "rank": rank, "device": devices[rank]} for rank in range(1, size)])

    device = torch.device(devices[0])
    try:
        started(children)
        prepare(device)
        link = listener.accept(limits, children.check)
    except BaseException:
        children.end(grace=0)
        folder.cleanup()
        raise
    # The file stays as long as the collectives: a thread of NCCL's looks into it now and then, and would wait for it.
    return Group(
        link,
        FileStore(store, size),
        size=size,
        device=device,
        limits=limits,
        leave=lambda _: children.end(),
        clean=folder.cleanup,
    )


def follow() -> None:
    """Do what rank 0 ordered on standard input: join it and call a function, then end."""
    order = json.loads(sys.stdin.buffer.readline())
    rank, limits = order["rank"], Limits(**order["limits"])
    prepare(torch.device(order["device"]))
    link = connect(Address(**order["address"]), rank, limits)
    _run(link, order, limits)


def _run(link: Link, order: Mapping[str, Any], limits: Limits) -> None:
    """Join the group and call the ordered function; whatever goes wrong is what rank 0 gets to hear."""
    try:
        store = FileStore(order["store"], order["size"])
        device = torch.device(order["device"])
        group = Group(link, store, size=order["size"], device=device, limits=limits, leave=_leave)
        module, _, function = order["entry"].partition(":")
        getattr(import_module(module), function)(group, **order["arguments"])
    except GroupError as problem:
        # Somebody else's failure, which everybody knows.
        link.down(str(problem))
        sys.exit(1)
    except BaseException as problem:
        link.down(f"rank {link.rank}: {type(problem).__name__}: {problem}")
        raise


def join(*, limits: Limits | None = None) -> Group:
    """Become the rank as which torchrun has started this process.

    Raises:
        UnsupportedError: torchrun has not started it.
        GroupError: a rank did not come up; names it and the cause.
    """
    if not dist.is_torchelastic_launched():
        raise UnsupportedError("ranks of their own are started by torchrun --nproc-per-node N -m qinfer …")
    limits, place = limits or Limits(), rank_of_torchrun()
    device = torch.device("cuda", place.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    prepare(device)
    stored, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=limits.arrival)))
    store = PrefixStore("qinfer", stored)
    if rank == 0:
        listener = Listener(place.master, size)
        store.set("link", json.dumps(asdict(listener.address)))
        link = listener.accept(limits)
    else:
        link = connect(Address(**json.loads(store.get("link"))), rank, limits)
    return Group(link, store, size=size, device=device, limits=limits, leave=_leave)


def _leave(reason: str) -> None:
    """End this process, which may be stuck in a collective, unless it ends by itself first."""
    if reason == CLOSED:
        return
    timer = threading.Timer(GRACE, _exit, [reason])
    timer.daemon = True
    timer.start()


def _exit(reason: str) -> None:
    sys.stderr.write(f"qinfer: {reason}\n")
    sys.stderr.flush()
    os._exit(1)


def _ending(status: int) -> str:
    """Say how a process ended."""
    return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
