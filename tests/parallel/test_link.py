"""The lines between ranks, with sockets of one process: who is missing, silent, gone or a stranger is noticed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from qinfer.errors import GroupError
from qinfer.parallel.link import CLOSED, Limits, Link, Listener, connect

SHORT = Limits(arrival=2.0, silence=0.5, check=2.0)


class Ranks:
    """Links of several ranks in one process, and the reasons that they were told."""

    def __init__(self, size: int) -> None:
        listener = Listener("127.0.0.1", size)
        made: list[Link] = []
        arrive = threading.Thread(target=lambda: made.append(listener.accept(SHORT)))
        arrive.start()
        others = [connect(listener.address, rank, SHORT) for rank in range(1, size)]
        arrive.join()
        self.links = [*made, *others]
        self.reasons: dict[int, str] = {}
        for link in self.links:
            link.watch(lambda reason, rank=link.rank: self.reasons.update({rank: reason}))  # type: ignore[misc]

    def wait(self) -> None:
        for link in self.links:
            assert link.wait(5) is not None


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    made = Ranks(3)
    yield made
    for link in made.links:
        link.down(CLOSED)


def test_messages_arrive_in_order(ranks: Ranks) -> None:
    lead, *others = ranks.links
    messages = [{"number": number, "text": "ä\n" * number} for number in range(50)]
    for message in messages:
        lead.send(message)
    for link in others:
        assert [link.receive() for _ in messages] == messages
    time.sleep(3 * SHORT.silence)  # beats keep the group alive
    assert [link.reason for link in ranks.links] == [None] * 3


def test_closing_ends_every_rank_in_peace(ranks: Ranks) -> None:
    lead, *others = ranks.links
    lead.down(CLOSED)
    ranks.wait()
    assert [link.receive() for link in others] == [None, None]
    assert ranks.reasons == dict.fromkeys(range(3), CLOSED)
    with pytest.raises(GroupError, match="closed"):
        lead.send({})


def test_a_reason_reaches_every_rank(ranks: Ranks) -> None:
    ranks.links[2].down("rank 2: ValueError: no")
    ranks.links[2].down("a later one")
    ranks.wait()
    assert ranks.reasons == dict.fromkeys(range(3), "rank 2: ValueError: no")
    with pytest.raises(GroupError, match="rank 2: ValueError: no"):
        ranks.links[1].receive()
    with pytest.raises(GroupError, match="rank 2: ValueError: no"):
        ranks.links[0].check()


def test_an_end_without_a_word_is_noticed_at_once(ranks: Ranks) -> None:
    start = time.monotonic()
    ranks.links[1]._peers[0].shutdown(socket.SHUT_RDWR)
    assert ranks.links[2].wait(5) == "rank 1 ended unexpectedly"
    assert time.monotonic() - start < SHORT.silence


def test_silence_is_noticed_in_time() -> None:
    """A rank that is connected and says nothing: its process is stopped."""
    listener = Listener("127.0.0.1", 2)
    silent = socket.create_connection((listener.address.host, listener.address.port))
    silent.sendall(f"{listener.address.token} 1\n".encode())
    link = listener.accept(SHORT)
    start = time.monotonic()
    reasons: list[str] = []
    link.watch(reasons.append)
    assert link.wait(5) == "rank 1 has not answered for 0.5 s: it has stopped"
    assert SHORT.silence <= time.monotonic() - start < 3 * SHORT.silence
    silent.close()


def test_a_rank_that_never_comes_is_named() -> None:
    listener = Listener("127.0.0.1", 3)
    connect(listener.address, 2, SHORT)
    with pytest.raises(GroupError, match=r"rank 1 did not start within 0.3 s"):
        listener.accept(replace(SHORT, arrival=0.3))


def test_strangers_are_refused() -> None:
    """A wrong secret, an endless greeting, a rank that is taken or impossible: none of them takes a place."""
    listener = Listener("127.0.0.1", 2)
    place, token = (listener.address.host, listener.address.port), listener.address.token
    greetings = [b"0" * 32 + b" 1\n", b"x" * 1000, f"{token} 2\n".encode(), f"{token} 0\n".encode(), b"\xff\n"]
    strangers = [socket.create_connection(place) for _ in greetings]
    for stranger, greeting in zip(strangers, greetings, strict=True):
        stranger.sendall(greeting)
    with pytest.raises(GroupError, match="rank 1 did not start"):
        listener.accept(replace(SHORT, arrival=0.5))
    for stranger in strangers:
        stranger.close()


def test_nobody_listens() -> None:
    listener = Listener("127.0.0.1", 2)
    listener._socket.close()
    with pytest.raises(GroupError, match="rank 1 cannot reach rank 0"):
        connect(listener.address, 1, SHORT)
