"""Held-out perplexity of checkpoints, computed by qinfer itself (`Model.logits`) on stories that training never saw.

python benchmarks/storyteller/evaluate.py --model DIR --model qinfer/assets/storyteller
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from grammar import HELD_OUT, story

from qinfer.models.model import Model


def perplexity(model: Model, num_stories: int) -> tuple[float, int]:
    """Return exp of the mean cross-entropy per token, ends of stories included, and the number of tokens."""
    if not 0 < num_stories <= HELD_OUT:
        raise ValueError(f"num_stories must be 1 to {HELD_OUT}, got {num_stories}")
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer")
    total, count = 0.0, 0
    for seed in range(num_stories):
        ids = [*model.tokenizer.encode(story(seed)), min(model.tokenizer.eos_ids)]
        logits = model.logits(ids[:-1])
        targets = torch.tensor(ids[1:], device=logits.device)
        total += F.cross_entropy(logits.double(), targets, reduction="sum").item()
        count += len(targets)
    return math.exp(total / count), count


def main() -> None:
    """Print one line per checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, action="append")
    parser.add_argument("--stories", type=int, default=200)
    parser.add_argument("--device", default=None)
    args = parser.parse_args()
    for path in args.model:
        model = Model.load(path, device=args.device)
        value, count = perplexity(model, args.stories)
        size = (path / "model.safetensors").stat().st_size / 1e6
        print(f"{path}: {size:.2f} MB, perplexity {value:.4f} over {count} tokens, {model.device}, {model.dtype}")


if __name__ == "__main__":
    main()
