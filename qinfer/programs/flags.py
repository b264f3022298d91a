"""The options that programs share: how a text is sampled, where the model runs, and how its cache is stored."""

from __future__ import annotations

import argparse
from pathlib import Path

from qinfer.engine.sampling import SamplingParams
from qinfer.models.model import Model
from qinfer.parallel.comm import Group
from qinfer.programs.plan import KV_FORMAT_HELP, gigabytes


def add_sampling(parser: argparse.ArgumentParser, *, max_new_tokens: int, seed: str) -> None:
    """Describe the options of `sampling`; seed says what a seed is good for."""
    told = f"tokens to write at most; default: {max_new_tokens}"
    parser.add_argument("-n", "--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=told)
    parser.add_argument("-t", "--temperature", type=float, default=0.7, metavar="X", help="0 is greedy; default: 0.7")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest tokens of mass P")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help="keep tokens above P times the likeliest")
    parser.add_argument("--seed", type=int, metavar="N", help=seed)


def sampling(options: argparse.Namespace) -> SamplingParams:
    """Return what was asked for, once it is valid."""
    return SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
    )


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Describe the options of `load`, and the format of the cache."""
    parser.add_argument("--kv-format", default="fp16", metavar="FORMAT", help=KV_FORMAT_HELP)
    parser.add_argument("--device", metavar="DEVICE", help="cuda or cpu (default: cuda if there is a GPU)")
    parser.add_argument("--dtype", metavar="DTYPE", help="of the activations: fp16, bf16, fp32 (default: the model's)")
    parser.add_argument("--gpus", type=gigabytes, metavar="GB,GB", help="divide the model: GB to use of each GPU")


def load(options: argparse.Namespace, folder: str | Path, *, cache_tokens: int, group: Group | None = None) -> Model:
    """Load a model, or this rank's share of it, with room for so many tokens beside it."""
    return Model.load(
        folder,
        device=options.device,
        dtype=options.dtype,
        gpus=options.gpus,
        cache_tokens=cache_tokens,
        parallel=group,
    )
