"""What the kernels of a step cost: a profile of some steps, and the part of their time that each kernel accounts for.

Kernels overlap: on Hopper one starts while the one before drains, and waits for it inside, so that their durations add
up to more than the step. What counts here is how far a kernel moves the end of all work: its own end less the latest
end before it. These parts and the time in which nothing ran add up to the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.profiler import ProfilerActivity, profile

from qinfer.bench.measure import synchronize
from qinfer.errors import UnsupportedError

NOTHING = "(nothing runs)"
WIDTH = 60  # characters of a name

Shares: TypeAlias = dict[str, dict[str, float]]


class Span(NamedTuple):
    """One kernel, or one copy, as it ran; in microseconds."""

    start: float
    end: float
    name: str


def kernel_shares(step: Callable[[], Any], device: torch.device, *, steps: int) -> Shares:
    """Run a step so many times under torch's profiler, and return what `shares` makes of it.

    Raises:
        UnsupportedError: the profiler saw no kernel, as where the driver keeps its counters from users.
    """
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            step()
        synchronize(device)
    spans = [
        Span(event.time_range.start, event.time_range.end, event.name)
        for event in recorded.events()
        if event.device_type.name == "CUDA"
    ]
    if not spans:
        raise UnsupportedError("torch's profiler saw no kernel on this GPU: it has no share to tell")
    return shares(spans, steps)


def shares(spans: Iterable[Span], steps: int) -> Shares:
    """Return launches and microseconds per step and the share of the time, by kernel, the largest first.

    Args:
        spans: all that ran during the steps, in any order.
        steps: how many there were.
    """
    ordered = sorted(spans)
    found: Shares = {NOTHING: {"launches": 0.0, "us": 0.0}}
    done = ordered[0].start
    for span in ordered:
        row = found.setdefault(short(span.name), {"launches": 0.0, "us": 0.0})
        row["launches"] += 1 / steps
        found[NOTHING]["us"] += max(0.0, span.start - done) / steps
        row["us"] += max(0.0, span.end - max(done, span.start)) / steps
        done = max(done, span.end)
    total = (done - ordered[0].start) / steps
    for row in found.values():
        row["share"] = row["us"] / total
    return dict(sorted(found.items(), key=lambda item: -item[1]["us"]))


def short(name: str) -> str:
    """Return the name of a kernel without the types of C++."""
    return name.removeprefix("void ").split("<")[0].split("(")[0].strip()[:WIDTH] or name[:WIDTH]


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Return shares as lines of text."""
    lines = [f"{'kernel':<{WIDTH}} {'launches':>8} {'µs':>9}  share of the step"]
    for name, row in found.items():
        lines.append(f"{name:<{WIDTH}} {row['launches']:8.1f} {row['us']:9.1f}  {100 * row['share']:.1f} %")
    return "\n".join(lines)
