"""`qinfer plan MODEL --gpus 24,24,12`: how a model would be divided among GPUs; reads headers only, needs no GPU."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qinfer.cache.formats import KV_FORMATS, layer_formats, nbytes_per_token
from qinfer.checkpoint import Checkpoint
from qinfer.models.architectures import read_config
from qinfer.models.placement import sizes_of
from qinfer.parallel.plan import Plan

if TYPE_CHECKING:
    from argparse import _SubParsersAction

KV_FORMAT_HELP = f"of the cache: {', '.join(KV_FORMATS)}, k8v4; some layers otherwise: q4,0-1:q8,-1:fp16"


def add_parser(programs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command line of this program."""
    parser = programs.add_parser(
        "plan",
        help="show how a model would be divided among GPUs",
        description="Show which heads, columns and bytes of a model each GPU would hold. Reads headers only.",
    )
    parser.add_argument("model", metavar="DIR", help="folder of a checkpoint")
    parser.add_argument("--gpus", type=gigabytes, required=True, metavar="GB,GB", help="to use of each GPU; 0: none")
    parser.add_argument("--cache-tokens", type=int, default=8192, metavar="N", help="room in the cache; default: 8192")
    parser.add_argument("--kv-format", default="fp16", metavar="FORMAT", help=KV_FORMAT_HELP)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the plan."""
    checkpoint = Checkpoint(options.model)
    config = read_config(checkpoint)
    if options.cache_tokens < 0:
        raise ValueError(f"--cache-tokens must be at least 0, got {options.cache_tokens}")
    formats = layer_formats(options.kv_format, config.num_layers)
    per_token = nbytes_per_token(formats, config.num_kv_heads, config.head_dim)
    width = per_token / (2 * config.num_layers * config.num_kv_heads * config.head_dim)
    sizes = sizes_of(checkpoint, config)
    print(Plan.make(sizes, options.gpus, cache_tokens=options.cache_tokens, bytes_per_element=width))
    return 0


def gigabytes(text: str) -> list[float]:
    """Read a list of numbers with commas, such as 24,24,12.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as problem:
        raise argparse.ArgumentTypeError(f"must be numbers with commas, such as 24,24,12, got {text!r}") from problem
