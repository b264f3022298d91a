"""What results look like on paper: points under a roofline, and bars of one unit.

A row is a point where it tells how many bytes it moved and how many operations it did; intensity is operations per
byte. The roof is min(bytes per second × intensity, operations per second), both measured in the same run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qinfer.bench.rows import Row, describe

# Field of a result -> title and unit of its bars; the first one that a row has is shown.
BARS = {
    "fraction_of_roof": ("Share of the memory roof", "%"),
    "tokens_per_second": ("Decode", "tokens/s"),
    "output_tokens_per_second": ("Serving", "output tokens/s"),
    "load_gb_s": ("Loading", "GB/s"),
    "ratio": ("Here against base, more is better", "×"),
    "ms": ("Time", "µs"),
}
ORDER = {"op": ("fraction_of_roof", "load_gb_s", "ms"), "model": ("tokens_per_second",), "compare": ("ratio",)}
SCALE = {"%": 100.0, "µs": 1e3}


@dataclass(frozen=True)
class Point:
    """One measurement: operations per byte, and 10^12 operations per second."""

    label: str
    intensity: float
    teraflops: float


@dataclass(frozen=True)
class Roofline:
    """Points, and the two roofs over them; the flat one is None where no result tells it."""

    device: str
    bandwidth: float  # GB/s
    peak: float | None  # TFLOP/s
    points: tuple[Point, ...]

    def roof(self, intensity: float) -> float:
        """Return what the device allows at an intensity, in TFLOP/s."""
        slope = self.bandwidth * intensity / 1e3
        return slope if self.peak is None else min(slope, self.peak)


@dataclass(frozen=True)
class Bars:
    """Values of one unit."""

    title: str
    unit: str
    values: tuple[tuple[str, float], ...]


def work(row: Row) -> tuple[float, float, float] | None:
    """Return operations, bytes and seconds of a row; None where it does not tell them, or is wrong."""
    if row.get("flops") and row.get("bytes") and row.get("ms"):
        return row["flops"], row["bytes"], row["ms"] / 1e3
    if row.get("op") == "matmul" and row.get("ms"):
        m, n, k = row["m"], row["n"], row["k"]
        # The matrix, and the rows in and out in 16 bits.
        return 2.0 * m * n * k, row["bytes"] + 2.0 * m * (n + k), row["ms"] / 1e3
    if row.get("flops_per_step") and row["bench"] == "model":
        return row["flops_per_step"], row["bytes_per_step"], row["ms_per_step"]["median"] / 1e3
    return None


def rooflines(rows: Sequence[Row]) -> Iterator[Roofline]:
    """Yield a roofline per device, for the devices that have points."""
    for device in dict.fromkeys(str(row.get("gpu")) for row in rows):
        mine = [row for row in rows if str(row.get("gpu")) == device]
        points, speeds = [], []
        for row in mine:
            done = work(row)
            if done is not None:
                flops, moved, seconds = done
                points.append(Point(describe(row), flops / moved, flops / seconds / 1e12))
                if row.get("format") == "fp16 cuBLAS":
                    speeds.append(flops / seconds / 1e12)
        bandwidths = [row["read_bandwidth_gb_s"] for row in mine if row.get("read_bandwidth_gb_s")]
        measured = [row["product_tflops"] for row in mine if row.get("product_tflops")]
        # Without a measured peak, the fastest of torch's own products stands for it.
        peak = max(measured or speeds, default=None)
        if points and bandwidths:
            yield Roofline(device, max(bandwidths), peak, tuple(points))


def bar_of(row: Row) -> str | None:
    """Return the field of a row that its bar shows; None where it has none, or is wrong."""
    fields = ORDER.get(row["bench"], tuple(BARS))
    return next((name for name in fields if isinstance(row.get(name), int | float)), None)


def bars(rows: Sequence[Row]) -> Iterator[Bars]:
    """Yield the bars of every unit that the rows have; a row goes to one of them."""
    found: dict[str, list[tuple[str, float]]] = {}
    has_revisions = len({row.get("revision") for row in rows}) > 1
    for row in rows:
        field = bar_of(row)
        if field is not None:
            scaled = row[field] * SCALE.get(BARS[field][1], 1.0)
            label = f"{describe(row)} @{row.get('revision')}" if has_revisions else describe(row)
            found.setdefault(field, []).append((label, scaled))
    for field, values in found.items():
        title, unit = BARS[field]
        yield Bars(title, unit, tuple(values))
