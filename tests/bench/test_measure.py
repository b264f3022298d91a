"""The clock: graphs long enough that their start does not count, and a GPU that has reached its pace."""

from __future__ import annotations

from functools import partial
from itertools import chain, repeat

import pytest
import torch

from qinfer.bench import measure
from qinfer.bench.measure import BURST, GRAPH_MS, MAX_BURSTS, broken, burst, settled, time_graph


def test_a_burst_is_followed_by_a_pause_that_is_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pauses = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(measure.time, "sleep", pauses.append)

    def replay() -> float:
        clock[0] += milliseconds / 1e3
        return milliseconds

    for milliseconds in (0.5, 8.0):
        assert burst(replay) == [milliseconds] * BURST
    assert pauses == pytest.approx([0.01, 0.008 * (BURST + 1)])


def test_a_gpu_at_its_pace_is_looked_at_twice() -> None:
    times = iter([5.0, 5.0])
    assert settled(lambda: [next(times)]) == 5.0


def test_what_becomes_faster_is_waited_for() -> None:
    times = chain([10.0, 9.0, 8.0], repeat(7.0))
    assert settled(lambda: [1.0, next(times), 99.0]) == 7.0
    # Noise that is not a fall ends it as well.
    times = chain([10.0, 9.95], repeat(1.0))
    assert settled(lambda: [next(times)]) == 9.95


def test_chains_have_an_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CHAIN", 3)
    called: list[int | str] = []
    for call in broken([partial(called.append, i) for i in range(5)], partial(called.append, "pause")):
        call()
    assert called == [0, 1, 2, "pause", 3, 4, "pause"]


def test_there_is_an_end() -> None:
    times = iter([0.9**i for i in range(MAX_BURSTS)])
    assert settled(lambda: [next(times)]) == 0.9 ** (MAX_BURSTS - 1)


@pytest.mark.gpu
def test_a_short_chain_is_repeated_and_every_function_counts_as_one(device: torch.device) -> None:
    x = torch.randn(1024, 1024, device=device)
    calls = []

    def double() -> None:
        calls.append(1)
        torch.mul(x, 2)

    one, three = time_graph([double], device, repeats=8), time_graph([double] * 3, device, repeats=8)
    assert len(one.samples) == len(three.samples) == 8
    # A graph was captured for each that takes as long as it should; a few calls were before that.
    assert len(calls) > GRAPH_MS / one.median + GRAPH_MS / three.median


def test_bandwidth_is_that_of_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "READ_BYTES_CPU", 4 << 20)
    monkeypatch.setattr(measure, "time_calls", lambda run, device, *, repeats: measure.Times((2.0,)))
    assert measure.read_bandwidth(torch.device("cpu")) == (4 << 20) / 2e6
