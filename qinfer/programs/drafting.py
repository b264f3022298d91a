"""The options with which programs ask for drafts: from a small model, or from the text so far."""

from __future__ import annotations

import argparse

from qinfer.engine.draft_model import DraftModel
from qinfer.models.model import Model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.add_argument("--draft", metavar="DIR", help="folder of a small model of the same family that guesses ahead")
    parser.add_argument(
        "--draft-tokens",
        type=int,
        metavar="N",
        help="tokens to guess at a time: by --draft (default: 4), or else from the text so far (default: 0)",
    )


def check(options: argparse.Namespace) -> None:
    """Refuse, before a model is loaded, what no draft can be had with.

    Raises:
        ValueError: the draft model is asked for beside a model of several processes, or for too few tokens.
    """
    if options.draft is not None and (options.gpus or getattr(options, "tp", False)):
        raise ValueError("--draft needs a model on one device: leave --gpus and --tp away, or use --draft-tokens alone")
    least = 0 if options.draft is None else 1
    if options.draft_tokens is not None and options.draft_tokens < least:
        raise ValueError(f"--draft-tokens must be at least {least}, got {options.draft_tokens}")


def load(options: argparse.Namespace, target: Model) -> int | DraftModel:
    """Return what a generator takes as `draft`."""
    if options.draft is None:
        return options.draft_tokens or 0
    return DraftModel.load(options.draft, target, num_tokens=options.draft_tokens or 4)
