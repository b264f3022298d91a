"""The clock: graphs long enough that their start does not count, and a GPU that has reached its pace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, repeat

import pytest
import torch

from qinfer.bench import measure
from qinfer.bench.measure import GRAPH_MS, MAX_WARM, WARM_MS, settled, time_graph


def _runs(times: Iterator[float]) -> tuple[Callable[[], float], list[float]]:
    """Return what takes these times, one after the other, and what it has taken so far."""
    taken: list[float] = []

    def run() -> float:
        taken.append(next(times))
        return taken[-1]

    return run, taken


def test_a_gpu_at_its_pace_is_looked_at_twice() -> None:
    run, taken = _runs(repeat(5.0))
    assert settled(run) == 5.0
    assert sum(taken) == 2 * WARM_MS


def test_what_becomes_faster_is_waited_for() -> None:
    slow = [10.0] * 2 + [9.0] * 3 + [8.0] * 3  # three looks at a GPU that wakes up
    run, taken = _runs(chain(slow, repeat(7.0)))
    assert settled(run) == 7.0
    assert len(taken) == len(slow) + 2 * 3
    # Noise that is not a fall ends it as well.
    run, taken = _runs(chain([10.0] * 2, [9.95] * 3, repeat(1.0)))
    assert settled(run) == 9.95


def test_a_long_run_is_a_look_of_its_own_and_there_is_an_end() -> None:
    run, taken = _runs(repeat(300.0))
    assert settled(run) == 300.0
    assert len(taken) == 2
    run, taken = _runs(iter(1e6 * 0.9**i for i in range(MAX_WARM + 1)))
    settled(run)
    assert len(taken) == MAX_WARM


@pytest.mark.gpu
def test_a_short_chain_is_repeated_and_every_function_counts_as_one(device: torch.device) -> None:
    x = torch.randn(1024, 1024, device=device)
    calls = []

    def double() -> None:
        calls.append(1)
        torch.mul(x, 2)

    one, three = time_graph([double], device, repeats=5), time_graph([double] * 3, device, repeats=5)
    assert len(one.samples) == len(three.samples) == 5
    # A graph was captured for each that takes as long as it should; a few calls were before that.
    assert len(calls) > GRAPH_MS / one.median + GRAPH_MS / three.median


def test_bandwidth_is_that_of_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "READ_BYTES_CPU", 4 << 20)
    monkeypatch.setattr(measure, "time_calls", lambda run, device, *, repeats: measure.Times((2.0,)))
    assert measure.read_bandwidth(torch.device("cpu")) == (4 << 20) / 2e6
