"""What a KV cache format costs in quality: perplexity, and divergence from the exact cache, of the bundled model.

python benchmarks/storyteller/kv_formats.py [--stories 40] [--context 512] [FORMAT ...]

Held-out stories are laid end to end and cut into contexts. Every context is scored through a cache of each format, so a
token attends to keys and values as they were stored, its own included; fp32 is the measure. `kl` is the mean of
KL(exact || format) per token in nats, `top` the share of tokens whose likeliest successor stays the same.

A second table has the relative RMS error of each codec on rows of random numbers, beside ExLlamaV2's codec, whose bytes
`qinfer.compat` reproduces: normal ones; normal ones of which one in a hundred is ten times as large; and rows in which
two features stand out, as they do in keys.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from grammar import HELD_OUT, story
from torch import Tensor

from qinfer.cache.formats import KV_FORMATS, kv_format
from qinfer.compat import q4
from qinfer.kernels.kv_codec import CODECS, decode, encode
from qinfer.models.batch import Batch, Piece
from qinfer.models.model import Model

ASSET = Path(__file__).parents[2] / "qinfer" / "assets" / "storyteller"
PAGE_SIZE = 256


def contexts(model: Model, num_stories: int, length: int) -> list[list[int]]:
    """Return held-out stories, laid end to end, in pieces of `length` tokens; what is left over is dropped."""
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer")
    eos = min(model.tokenizer.eos_ids)
    ids = [i for seed in range(num_stories) for i in (*model.tokenizer.encode(story(seed)), eos)]
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


def log_probabilities(model: Model, ids: list[int], name: str) -> Tensor:
    """Return [T, V] float64 of a text that is scored through a cache of a format."""
    cache = model.new_cache(-(-len(ids) // PAGE_SIZE), page_size=PAGE_SIZE, kv_format=name)
    batch = Batch.build([Piece(ids, 0, range(cache.num_pages), "all")], page_size=PAGE_SIZE, device=model.device)
    return model.decoder(batch, cache).double().log_softmax(dim=-1)


def rows_of(kind: str, head_dim: int) -> Tensor:
    """Return [4096, D] rows of random numbers."""
    x = torch.randn(4096, head_dim, generator=torch.Generator().manual_seed(head_dim))
    if kind == "outliers":
        x *= 1 + 9 * (torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.01)
    elif kind == "features":
        x[:, [3, head_dim // 2 + 3]] = 12 * x[:, [3, head_dim // 2 + 3]] + 4
    return x


def print_errors() -> None:
    """Print the table of codecs."""
    columns = [(kind, head_dim) for kind in ("normal", "outliers", "features") for head_dim in (64, 128)]
    print("\n| codec | " + " | ".join(f"{kind}, D = {head_dim}" for kind, head_dim in columns) + " |")
    print("|---|" + "---|" * len(columns))
    codecs: dict[str, Callable[[Tensor], Tensor]] = {
        name: lambda x, codec=codec: decode(*encode(x, codec), codec)
        for name, codec in CODECS.items()
        if codec.scheme != "plain"
    }
    for bits in (8, 4):
        codecs[f"ExLlamaV2, {bits} bits"] = lambda x, bits=bits: q4.decode(*q4.encode(x.half(), bits), bits).view(
            x.shape
        )
    for name, through in codecs.items():
        rows = [rows_of(*column) for column in columns]
        errors = [float((through(x).float() - x).norm() / x.norm()) for x in rows]
        print(f"| {name} | " + " | ".join(f"{100 * error:.2f} %" for error in errors) + " |")


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", default=[*KV_FORMATS, "k8v4", "k4v8"], metavar="FORMAT")
    parser.add_argument("--model", type=Path, default=ASSET)
    parser.add_argument("--stories", type=int, default=40, help=f"at most {HELD_OUT}; default: 40")
    parser.add_argument("--context", type=int, default=512, help="tokens; default: 512")
    parser.add_argument("--device", default=None)
    args = parser.parse_args()
    model = Model.load(args.model, device=args.device)
    pieces = contexts(model, args.stories, args.context)
    exact = [log_probabilities(model, ids, "fp32") for ids in pieces]
    config = model.config
    print(
        f"{len(pieces)} contexts of {args.context} tokens, head size {config.head_dim}, {model.device}, {model.dtype}\n"
    )
    print("\n| format | bits per number | perplexity | kl, nats | top, % |\n|---|---|---|---|---|")
    for name in args.formats:
        loss = divergence = same = 0.0
        for ids, truth in zip(pieces, exact, strict=True):
            scored = log_probabilities(model, ids, name)
            targets = torch.tensor(ids[1:], device=scored.device)
            loss += F.nll_loss(scored[:-1], targets).item()
            divergence += (truth.exp() * (truth - scored)).sum(dim=-1).mean().item()
            same += (truth.argmax(dim=-1) == scored.argmax(dim=-1)).double().mean().item()
        n = len(pieces)
        bits = kv_format(name).nbytes_per_token(1, config.head_dim) * 8 / (2 * config.head_dim)
        perplexity = torch.tensor(loss / n).exp().item()
        print(f"| {name} | {bits:.2f} | {perplexity:.4f} | {divergence / n:.2e} | {100 * same / n:.2f} |")
    print_errors()


if __name__ == "__main__":
    main()
