"""`python -m qinfer.bench compare`: two results side by side, or two revisions on the same GPU in turns.

    ratio = median here / median base, turned so that more than 1 is better here

The spread of a ratio reaches from the worst of one side over the best of the other to the opposite, over all rounds, or
over the 10 % and 90 % quantiles of a single run. A ratio whose spread holds 1 is called the same. Rows of different
shapes never meet, and results from different devices are refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qinfer.bench.report import append
from qinfer.bench.rows import MORE_IS_BETTER, PLACE, SETTING, SHOWN, Figure, ResultError, Row, describe, grouped, read
from qinfer.bench.trees import base_tree, here, run_in_turns

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_parser(programs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command line of this benchmark."""
    usage = "compare BASE.json HERE.json | compare --base REV BENCHMARK ... | compare --base-path DIR BENCHMARK ..."
    parser = programs.add_parser("compare", help="two results, or two revisions in turns on one GPU", usage=usage)
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--base", metavar="REV", help="revision of git to compare this tree with")
    base.add_argument("--base-path", metavar="DIR", help="folder of a source tree to compare this one with")
    parser.add_argument("--rounds", type=int, default=3, help="how often both trees run, in turns; default: 3")
    parser.add_argument("--json", metavar="FILE", help="append every ratio to FILE as a line of JSON")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="two files, or a benchmark with its options")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Ratio:
    """One figure on both sides; more than 1 is better here."""

    row: Row
    measure: str
    base: Figure | None  # None: wrong there
    here: Figure | None

    @property
    def value(self) -> float | None:
        """The ratio of the medians."""
        return None if self.base is None or self.here is None else self._of(self.here.median, self.base.median)

    @property
    def spread(self) -> tuple[float, float] | None:
        """The least and the most that the ratio may be; None if a side has but one sample."""
        if self.base is None or self.here is None:
            return None
        edges = (self.base.low, self.base.high, self.here.low, self.here.high)
        if any(edge is None for edge in edges):
            return None
        base_low, base_high, low, high = (float(edge) for edge in edges if edge is not None)
        first, second = self._of(low, base_high), self._of(high, base_low)
        return min(first, second), max(first, second)

    @property
    def verdict(self) -> str:
        """One word: better, worse, same, wrong, or unknown where nothing is known of the spread."""
        if self.base is None or self.here is None:
            return "wrong"
        if self.spread is None:
            return "unknown"
        low, high = self.spread
        return "same" if low <= 1 <= high else "better" if low > 1 else "worse"

    def _of(self, here: float, base: float) -> float:
        above, below = (here, base) if MORE_IS_BETTER[self.measure] else (base, here)
        return above / below if below else float("inf")

    def asdict(self) -> dict[str, Any]:
        """Return the fields of a result."""
        low, high = self.spread or (None, None)
        about = {k: v for k, v in self.row.items() if k not in MORE_IS_BETTER and k not in ("bench", "revision")}
        figures = {
            "base": None if self.base is None else self.base.median,
            "here": None if self.here is None else self.here.median,
        }
        measured = {"measure": self.measure, **figures, "ratio": self.value, "ratio_low": low, "ratio_high": high}
        return {"bench": "compare", "of": self.row["bench"], **about, **measured, "verdict": self.verdict}


def run(options: argparse.Namespace) -> int:
    """Compare, print and write; 1 if a row is wrong on either side."""
    arguments = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    if options.base is None and options.base_path is None:
        if len(arguments) != 2:
            raise ValueError(
                "compare wants two files, or --base REV or --base-path DIR and a benchmark; options go first"
            )
        base, new = (read(path) for path in arguments)
    else:
        if not arguments or arguments[0] not in ("op", "model", "serve"):
            raise ValueError("compare --base wants a benchmark behind it: op ..., model ... or serve ...")
        if "--json" in arguments:
            raise ValueError("put --json in front of the benchmark: it is the comparison that is written")
        if options.rounds < 1:
            raise ValueError(f"--rounds must be at least 1, got {options.rounds}")
        with base_tree(options.base, options.base_path) as tree:
            base, new = run_in_turns((tree, here()), arguments, rounds=options.rounds)
    ratios = list(compare(base, new))
    if not ratios:
        raise ResultError("nothing to compare: no row that both sides have has a figure")
    show(ratios, base, new)
    sides = {"base_revision": base[0].get("revision"), "revision": new[0].get("revision")}
    for ratio in ratios:
        append({**ratio.asdict(), **sides}, options.json)
    return 1 if any(ratio.verdict == "wrong" for ratio in ratios) else 0


def compare(base: Sequence[Row], new: Sequence[Row]) -> Iterator[Ratio]:
    """Yield the ratio of every figure of every row that both sides have.

    Raises:
        ResultError: the sides were not measured on the same device, or have no row in common.
    """
    for field in PLACE:
        places = {str(row.get(field)) for row in (*base, *new)}
        if len(places) > 1:
            raise ResultError(f"only results of one {field} can be compared, got {' and '.join(sorted(places))}")
    old, now = grouped(base), grouped(new)
    common = [key for key in old if key in now]
    if not common:
        fields = set(next(iter(old))) ^ set(next(iter(now)))
        differing = ", ".join(sorted(f"{name} {value}" for name, value in fields))
        raise ResultError(f"no row in common; {describe(base[0])!r} and {describe(new[0])!r} differ in {differing}")
    for key in common:
        for measure in SHOWN:
            left, right = ([run.get(measure) for run in rows[key] if measure in run] for rows in (old, now))
            if left and right:
                yield Ratio(now[key][0], measure, Figure.of(left), Figure.of(right))


def show(ratios: Sequence[Ratio], base: Sequence[Row], new: Sequence[Row]) -> None:
    """Print a line per figure, and what could not be compared."""
    for field in (*SETTING, "revision"):
        sides = [" ".join(sorted({str(row.get(field)) for row in rows})) for rows in (base, new)]
        if sides[0] != sides[1]:
            print(f"{field}: base {sides[0]}, here {sides[1]}")
    print(f"{new[0].get('gpu')}; a ratio above 1 is better here")
    width = max(len(describe(ratio.row)) for ratio in ratios) if ratios else 0
    print(f"{'':<{width}}  {'':<26}{'base':>11}{'here':>11}{'ratio':>8}  spread")
    for ratio in ratios:
        figures = "".join(f"{'wrong' if f is None else f'{f.median:,.4g}':>11}" for f in (ratio.base, ratio.here))
        value = "-" if ratio.value is None else f"{ratio.value:.3f}"
        spread = "" if ratio.spread is None else "{:.3f} to {:.3f}".format(*ratio.spread)
        print(f"{describe(ratio.row):<{width}}  {ratio.measure:<26}{figures}{value:>8}  {spread:<16} {ratio.verdict}")
    old, now = grouped(base), grouped(new)
    for side, mine, other in (("base", old, now), ("here", now, old)):
        for key, rows in mine.items():
            if key not in other:
                print(f"not compared, only in {side}: {describe(rows[0])}")
