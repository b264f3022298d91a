r"""Link: the lines between rank 0 and the other ranks, beside the collectives; standard library only.

Every other rank has one TCP connection to rank 0. Over it go beats, so that a rank that dies or stops is noticed while
everybody else waits in a collective that will never end; notices of why the group is over; and messages, JSON from
rank 0 to all others. Rank 0 passes notices on.

    line = "\n"                    a beat
         | {"message": …} "\n"     rank 0 to another
         | {"down": reason} "\n"   either way, the last one

A thread per rank watches. A process that ends closes its connections, which is noticed at once; one that stays silent
for `silence` seconds counts as stopped. Computation does not stop the beats: the thread is not the one that computes.
"""

from __future__ import annotations

import json
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from qinfer.errors import GroupError

CLOSED = "the model was closed"
NOTICE = 0.5  # seconds to wait for a line that another thread is sending
_TOKEN_LENGTH = 256  # a first line longer than this is no greeting


@dataclass(frozen=True)
class Limits:
    """How long what may take."""

    arrival: float = 120.0  # seconds until every rank has started; an import of torch can be slow
    silence: float = 8.0  # seconds without a beat after which a rank counts as stopped
    check: float = 10.0  # seconds for the self-test of the collectives


@dataclass(frozen=True)
class Address:
    """Where rank 0 listens, and the secret that other ranks greet it with."""

    host: str
    port: int
    token: str


class Listener:
    """Rank 0 before the others have arrived."""

    def __init__(self, host: str, size: int) -> None:
        """Listen on a free port of the interface that `host` names, for `size` - 1 ranks."""
        self.size = size
        self._socket = socket.create_server((host, 0), family=_family(host))
        self.address = Address(host, self._socket.getsockname()[1], secrets.token_hex(16))

    def accept(self, limits: Limits, check: Callable[[], None] = lambda: None) -> Link:
        """Wait for all other ranks.

        Args:
            limits: How long to wait.
            check: Called several times a second; raises when waiting makes no sense any more.

        Raises:
            GroupError: Somebody has not arrived in time; names the ranks.
        """
        peers: dict[int, socket.socket] = {}
        end = time.monotonic() + limits.arrival
        try:
            while len(peers) < self.size - 1:
                check()
                if time.monotonic() > end:
                    missing = sorted(set(range(1, self.size)) - set(peers))
                    who = ", ".join(map(str, missing))
                    raise GroupError(f"rank {who} did not start within {limits.arrival:g} s")
                self._socket.settimeout(0.1)
                try:
                    connection, _ = self._socket.accept()
                except TimeoutError:
                    continue
                rank = self._greeting(connection)
                if rank is None or rank in peers or not 0 < rank < self.size:
                    connection.close()
                else:
                    peers[rank] = connection
        except BaseException:
            for connection in peers.values():
                connection.close()
            raise
        finally:
            self._socket.close()
        return Link(0, peers, limits)

    def _greeting(self, connection: socket.socket) -> int | None:
        """Return the rank that a newcomer claims and proves with the secret; None for a stranger."""
        connection.settimeout(1.0)
        line = b""
        try:
            while not line.endswith(b"\n") and len(line) < _TOKEN_LENGTH:
                received = connection.recv(_TOKEN_LENGTH - len(line))
                if not received:
                    return None
                line += received
            token, rank = line.decode("ascii").split()
            return int(rank) if secrets.compare_digest(token, self.address.token) else None
        except (OSError, ValueError):
            return None


def connect(address: Address, rank: int, limits: Limits) -> Link:
    """Greet rank 0 and return the link to it.

    Raises:
        GroupError: It cannot be reached.
    """
    try:
        connection = socket.create_connection((address.host, address.port), timeout=limits.arrival)
        connection.sendall(f"{address.token} {rank}\n".encode("ascii"))
    except OSError as problem:
        raise GroupError(f"rank {rank} cannot reach rank 0 at {address.host}:{address.port}: {problem}") from problem
    return Link(rank, {0: connection}, limits)


class Link:
    """The connections of one rank, and the thread that watches them.

    Attributes:
        rank: This process.
        reason: Why the group is over; None while it is not.
    """

    def __init__(self, rank: int, peers: dict[int, socket.socket], limits: Limits) -> None:
        """Take connected sockets by rank; `watch` starts the thread."""
        self.rank = rank
        self.reason: str | None = None
        self._peers = peers
        self._limits = limits
        self._locks = {peer: threading.Lock() for peer in peers}
        self._inbox: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._ended = threading.Event()
        self._once = threading.Lock()
        self._on_down: Callable[[str], None] = lambda _: None
        self._thread = threading.Thread(target=self._run, name=f"qinfer-link-{rank}", daemon=True)
        for connection in peers.values():
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(limits.silence)

    def watch(self, on_down: Callable[[str], None]) -> None:
        """Start watching; `on_down` gets the reason of the end, once, in the thread that brought it about."""
        self._on_down = on_down
        self._thread.start()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message to all other ranks.

        Raises:
            GroupError: The group is over.
        """
        line = json.dumps({"message": message}).encode() + b"\n"
        for peer in self._peers:
            self.check()
            try:
                with self._locks[peer]:
                    self._peers[peer].sendall(line)
            except OSError as problem:
                self.down(f"rank {peer} ended unexpectedly ({problem})")
        self.check()

    def receive(self) -> dict[str, Any] | None:
        """Wait for the next message of rank 0; None when the model was closed.

        Raises:
            GroupError: The group is over for another reason.
        """
        message = self._inbox.get()
        if message is None and self.reason != CLOSED:
            raise GroupError(str(self.reason))
        return message

    def check(self) -> None:
        """Raise GroupError with the reason if the group is over."""
        if self.reason is not None:
            raise GroupError(self.reason)

    def wait(self, seconds: float) -> str | None:
        """Wait for the end of the group and return its reason; None if it has not come by then."""
        self._ended.wait(seconds)
        return self.reason

    def down(self, reason: str, *, but: int | None = None) -> None:
        """End the group for a reason: the first one counts, and everybody but the rank it came from is told."""
        with self._once:
            if self.reason is not None:
                return
            self.reason = reason
        notice = json.dumps({"down": reason}).encode() + b"\n"
        for peer, connection in self._peers.items():
            # Whoever holds the lock for long is stuck in front of a peer that does not read, and needs no notice.
            if peer != but and self._locks[peer].acquire(timeout=NOTICE):
                self._try_to_send(connection, notice)
                self._locks[peer].release()
        self._inbox.put(None)
        self._ended.set()
        self._on_down(reason)
        for connection in self._peers.values():
            _end_sending(connection)

    def _run(self) -> None:
        """Beat, listen, and notice who is gone."""
        beat = min(1.0, self._limits.silence / 5)
        heard = dict.fromkeys(self._peers, time.monotonic())
        rest = dict.fromkeys(self._peers, b"")
        next_beat = 0.0
        with selectors.DefaultSelector() as selector:
            for peer, connection in self._peers.items():
                selector.register(connection, selectors.EVENT_READ, peer)
            while self.reason is None:
                now = time.monotonic()
                if now >= next_beat:
                    self._beat()
                    next_beat = now + beat
                for key, _ in selector.select(max(0.0, next_beat - time.monotonic())):
                    heard[key.data] = time.monotonic()
                    rest[key.data] = self._read(key.data, rest[key.data])
                for peer, last in heard.items():
                    if time.monotonic() - last > self._limits.silence:
                        self.down(f"rank {peer} has not answered for {self._limits.silence:g} s: it has stopped")

    def _beat(self) -> None:
        """Send a sign of life to every peer that nobody is sending to."""
        for peer, connection in self._peers.items():
            if self._locks[peer].acquire(blocking=False):
                self._try_to_send(connection, b"\n")
                self._locks[peer].release()

    def _read(self, peer: int, rest: bytes) -> bytes:
        """Take what a peer has sent, act on whole lines, and return what is left."""
        try:
            received = self._peers[peer].recv(1 << 16)
        except OSError:
            received = b""
        if not received:
            self.down(f"rank {peer} ended unexpectedly", but=peer)
            return b""
        *lines, rest = (rest + received).split(b"\n")
        for line in filter(None, lines):
            content = json.loads(line)
            if "message" in content:
                self._inbox.put(content["message"])
            else:
                self.down(content["down"], but=peer)
        return rest

    @staticmethod
    def _try_to_send(connection: socket.socket, line: bytes) -> None:
        """Send without waiting; a peer that is gone or does not read is noticed elsewhere."""
        try:
            connection.send(line, socket.MSG_DONTWAIT)
        except OSError:
            return


def _end_sending(connection: socket.socket) -> None:
    """End one direction of a connection that may have ended already.

    Refusing what the peer still sends would reset the connection, and with it the notice that the peer has yet to read.
    """
    try:
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        return


def _family(host: str) -> socket.AddressFamily:
    """Return IPv4 or IPv6, whichever the host has first."""
    return socket.AddressFamily(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0])
