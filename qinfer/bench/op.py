"""`python -m qinfer.bench op NAME`: one op at a time."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qinfer.bench import attention, every, load, matmul, sample

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_parser(programs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the ops that can be measured."""
    parser = programs.add_parser("op", help="speed of one op")
    ops = parser.add_subparsers(dest="op", required=True, metavar="OP")
    matmul.add_parser(ops)
    attention.add_parser(ops)
    load.add_parser(ops)
    sample.add_parser(ops)
    every.add_parser(ops)
