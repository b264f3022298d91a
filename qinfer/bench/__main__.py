"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qinfer.bench import compare, drafts, model, op, plot, serve, summary, tune
from qinfer.errors import QinferError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark and return the exit status; without arguments show the device at hand."""
    parser = argparse.ArgumentParser(prog="python -m qinfer.bench", description="Measure qinfer on this device.")
    programs = parser.add_subparsers(dest="program", metavar="BENCHMARK")
    model.add_parser(programs)
    serve.add_parser(programs)
    drafts.add_parser(programs)
    op.add_parser(programs)
    tune.add_parser(programs)
    compare.add_parser(programs)
    plot.add_parser(programs)
    parser.set_defaults(run=summary.run)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except (QinferError, ValueError) as error:
        print(f"qinfer.bench: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
