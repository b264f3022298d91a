"""`python -m qinfer PROGRAM …`, also installed as the command `qinfer`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qinfer.errors import QinferError
from qinfer.programs import chat, doctor, generate, plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a program and return the exit status: 0, 1 for an error that qinfer explains, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(prog="qinfer", description="Run quantized language models.")
    programs = parser.add_subparsers(dest="program", required=True, metavar="PROGRAM")
    generate.add_parser(programs)
    chat.add_parser(programs)
    doctor.add_parser(programs)
    plan.add_parser(programs)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except (QinferError, ValueError) as error:
        print(f"qinfer {options.program}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
