"""`python -m qinfer.bench plot`: results as a picture (a roofline per device, and bars), or as text."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qinfer.bench.points import Bars, Roofline, bar_of, bars, rooflines, work
from qinfer.bench.rows import ResultError, Row, read
from qinfer.errors import UnsupportedError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

EXTRA = 'pip install "qinfer[plot]"'
WIDTH = 40  # characters of the longest bar
MOST_BARS = 60  # in one chart of a picture
NAMED = 12  # points of a picture that are named beside it; more are told apart by what they begin with


def add_parser(programs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command line of this benchmark."""
    parser = programs.add_parser("plot", help="results as a picture or as text")
    parser.add_argument("results", nargs="+", metavar="FILE", help="files that --json has written")
    parser.add_argument("--out", metavar="FILE", help="picture to write, .png, .svg or .pdf")
    parser.add_argument("--text", action="store_true", help="print text; without --out this is what happens anyway")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Read the results, then print or draw them."""
    if options.text and options.out:
        raise ValueError("--text prints and --out draws: give one of them")
    rows = [row for path in options.results for row in _with_speed(path)]
    roofs, charts = tuple(rooflines(rows)), tuple(bars(rows))
    if not charts and not roofs:
        raise ResultError("nothing to plot: no row has a figure that is not wrong")
    if options.out is None:
        print("\n".join(text(roofs, charts)))
        return 0
    if find_spec("matplotlib") is None:
        raise UnsupportedError(f"--out needs matplotlib: {EXTRA}; --text prints the same as text")
    shown = tuple(chart for chart in charts if len(chart.values) <= MOST_BARS)
    for chart in charts:
        if chart not in shown:
            print(f"not in the picture: {chart.title}, {len(chart.values)} bars; --text has them", file=sys.stderr)
    if not shown and not roofs:
        raise ResultError(f"nothing is left to draw: a chart may have {MOST_BARS} bars")
    draw(roofs, shown, Path(options.out))
    print(f"wrote {options.out}", file=sys.stderr)
    return 0


def _with_speed(path: str) -> list[Row]:
    """Return the rows of a file that can be drawn, and say how many others there are: of quality, say, or wrong."""
    rows = read(path)
    drawn = [row for row in rows if bar_of(row) is not None or work(row) is not None]
    others = len(rows) - len(drawn)
    if others:
        print(f"left out: {others} of {len(rows)} rows of {path} have no figure to plot", file=sys.stderr)
    return drawn


def text(roofs: Sequence[Roofline], charts: Sequence[Bars]) -> Iterator[str]:
    """Yield the lines of a report: for every roofline its points as shares of the roof, then the bars."""
    for roof in roofs:
        peak = "" if roof.peak is None else f" and {roof.peak:,.0f} TFLOP/s"
        yield f"Roofline of {roof.device}: {roof.bandwidth:,.0f} GB/s{peak}"
        width = max(len(point.label) for point in roof.points)
        yield f"{'':<{width}} {'FLOP/B':>8} {'TFLOP/s':>8} {'roof':>8}"
        for point in roof.points:
            limit = roof.roof(point.intensity)
            share = point.teraflops / limit
            numbers = f"{point.intensity:8.2f} {point.teraflops:8.2f} {limit:8.2f}"
            yield f"{point.label:<{width}} {numbers} {share:5.0%} {_bar(share)}".rstrip()
        yield ""
    for chart in charts:
        width, longest = max(len(label) for label, _ in chart.values), max(value for _, value in chart.values)
        yield f"{chart.title}, {chart.unit}"
        for label, value in chart.values:
            number = f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
            yield f"{label:<{width}} {number:>10} {_bar(value / longest if longest > 0 else 0.0)}".rstrip()
        yield ""


def _bar(share: float) -> str:
    """Return a bar in eighths of a character; a share above one ends in an arrow."""
    eighths = round(min(max(share, 0.0), 1.0) * WIDTH * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip() + ("→" if share > 1 else "")


def draw(roofs: Sequence[Roofline], charts: Sequence[Bars], path: Path) -> None:
    """Draw every roofline and every chart below each other and write them to a file."""
    # No window system is asked for: the picture goes to a file.
    figures = importlib.import_module("matplotlib.figure")
    heights = [6.0] * len(roofs) + [1.2 + 0.25 * len(chart.values) for chart in charts]
    figure = figures.Figure(figsize=(10, sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, roof in zip(axes, roofs, strict=False):
        _draw_roofline(axis, roof)
    for axis, chart in zip(axes[len(roofs) :], charts, strict=True):
        labels, values = zip(*chart.values, strict=True)
        positions = range(len(values))
        axis.barh(positions, values, color="#4477aa")
        axis.set_yticks(positions, labels, fontsize=7)
        axis.invert_yaxis()
        axis.set_title(chart.title)
        axis.set_xlabel(chart.unit)
        axis.grid(axis="x", alpha=0.3)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as problem:
        raise ResultError(f"{path}: {problem}") from problem


def _draw_roofline(axis: Any, roof: Roofline) -> None:  # noqa: ANN401 - matplotlib may be missing where types are read
    """Draw points below the two roofs, both axes logarithmic; points whose names begin alike share a colour."""
    low = min(point.intensity for point in roof.points) / 2
    high = max(point.intensity for point in roof.points) * 2
    corner = high if roof.peak is None else min(max(roof.peak * 1e3 / roof.bandwidth, low), high)
    line = sorted({low, corner, high})
    axis.plot(line, [roof.roof(x) for x in line], color="black", linewidth=1.5)
    groups: dict[str, list[tuple[float, float]]] = {}
    for point in roof.points:
        name = point.label if len(roof.points) <= NAMED else " ".join(point.label.split(" n=")[0].split()[:3])
        groups.setdefault(name, []).append((point.intensity, point.teraflops))
    for name, places in groups.items():
        axis.plot(*zip(*places, strict=True), "o", markersize=5, label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations per byte")
    axis.set_ylabel("TFLOP/s")
    peak = "" if roof.peak is None else f", {roof.peak:,.0f} TFLOP/s"
    axis.set_title(f"{roof.device}: {roof.bandwidth:,.0f} GB/s{peak}")
    axis.legend(fontsize=7)
    axis.grid(which="both", alpha=0.2)
