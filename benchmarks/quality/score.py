"""What the quality scripts share: held-out texts of a model, and scoring a text through a cache of some format.

A model that `train.py` has made has its held-out documents beside it, in held_out.json; those of the bundled
storyteller are stories of seeds that its training left out. Any other model needs `--texts FILE`, a JSON list of texts.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qinfer.models.batch import Batch, Piece
from qinfer.models.model import Model

ROOT = Path(__file__).parents[2]
STORYTELLER = ROOT / "qinfer" / "assets" / "storyteller"
PAGE_SIZE = 256
CHUNK = 2048  # tokens per step
CONTEXTS = (2048, 8192)
TRAINED = 512  # tokens of the texts on which the storyteller was trained
NUM_STORIES = 200


def documents(model: Path, texts: Path | None) -> list[str]:
    """Return the held-out documents of a model."""
    if texts is None and model.resolve() == STORYTELLER:
        sys.path.append(str(ROOT / "benchmarks" / "storyteller"))
        story = importlib.import_module("grammar").story
        return [story(seed) for seed in range(NUM_STORIES)]
    file = texts or model / "held_out.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give held-out documents, a JSON list of texts, with --texts")
    found: list[str] = json.loads(file.read_text())
    return found


def default_contexts(model: Model) -> list[int]:
    """Return the lengths to measure at: those that the model has positions for, or else what it was trained on."""
    longest = model.config.max_positions
    return [length for length in CONTEXTS if length <= longest] or [min(TRAINED, longest)]


def stream(model: Model, texts: Sequence[str]) -> list[int]:
    """Return the ids of all documents, end to end, with an end of text behind each."""
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer")
    end = min(model.eos_ids)
    return [i for text in texts for i in (*model.tokenizer.encode(text), end)]


def log_probabilities(model: Model, ids: Sequence[int], kv_format: str, *, last: int | None = None) -> Iterator[Tensor]:
    """Score a text through a cache: every token sees keys and values as they were stored, its own included.

    Args:
        model: the model.
        ids: the text.
        kv_format: of the cache.
        last: how many tokens at the end to score; None scores all.

    Yields:
        [n, V] fp64 natural logarithms, of at most CHUNK tokens at a time, in order.
    """
    cache = model.new_cache(-(-len(ids) // PAGE_SIZE), page_size=PAGE_SIZE, kv_format=kv_format)
    scored = 0 if last is None else len(ids) - last
    borders = sorted({*range(0, len(ids), CHUNK), scored, len(ids)})
    for start, stop in pairwise(borders):
        piece = Piece(ids[start:stop], start, range(cache.num_pages), "all" if start >= scored else "none")
        logits = model.decoder(Batch.build([piece], page_size=PAGE_SIZE, device=model.device), cache)
        if start >= scored:
            yield logits.double().log_softmax(dim=-1)


def results_file(model: Path, device: torch.device, what: str) -> Path:
    """Return where the figures of a model go."""
    return ROOT / "benchmarks" / "results" / f"{device.type}_{what}_{model.resolve().name}.json"


def write_table(name: str, lines: Sequence[str]) -> None:
    """Put a table between its markers in docs/kv-cache.md; where there are none, they and the table go to its end.

    Raises:
        ValueError: the page has one of the markers without the other.
    """
    page = ROOT / "docs" / "kv-cache.md"
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    text = page.read_text()
    if begin not in text and end not in text:
        text += f"\n{begin}{end}\n"
        print(f"{page} had no table of this name: {name} is at its end now, to be moved where it belongs")
    before, found_begin, rest = text.partition(begin)
    _old, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"{page} has {begin} without {end} behind it, or the reverse")
    page.write_text("\n".join([f"{before}{begin}", "", *lines, "", f"{end}{after}"]))


def save(file: Path, result: dict[str, Any]) -> None:
    """Write figures to a file."""
    file.write_text(json.dumps(result, indent=1) + "\n")
