"""What a KV cache format costs in quality: perplexity and divergence from the fp16 cache, on held-out texts.

python benchmarks/quality/kv_formats.py [--model DIR] [--context 2048 8192] [--tokens 65536] [--write] [FORMAT ...]

Held-out documents are laid end to end and cut into contexts. Every context is scored through a cache of each format, so
a token attends to keys and values as they were stored, its own included. `KL` is the mean of KL(fp16 || format) per
token in nats, `same top token` the share of tokens whose likeliest successor is that of the fp16 cache. ExLlamaV2's own
codec is measured beside ours: an fp16 cache whose rows went through the bytes of `qinfer.compat` before they are read.

A second table has the relative RMS error of each codec on rows of random numbers, beside ExLlamaV2's codec, whose bytes
`qinfer.compat` reproduces: normal ones; normal ones of which one in a hundred is ten times as large; and rows in which
two features stand out, as they do in keys.

With --write, both go into docs/kv-cache.md between their markers, and the figures into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from score import (
    PAGE_SIZE,
    STORYTELLER,
    default_contexts,
    documents,
    log_probabilities,
    results_file,
    save,
    stream,
    write_table,
)
from torch import Tensor

from qinfer.bench.measure import environment
from qinfer.cache.formats import KV_FORMATS, layer_formats, nbytes_per_token
from qinfer.compat import q4
from qinfer.kernels.attention import paged_attention
from qinfer.kernels.kv_codec import CODECS, decode, encode
from qinfer.kernels.kv_write import rope_write
from qinfer.models import layers
from qinfer.models.model import Model

MEASURE = "fp16"
EXLLAMAV2 = {"ExLlamaV2 Q8": 8, "ExLlamaV2 Q4": 4}
FORMATS = [*KV_FORMATS, "k8v4", "k4v8", "q4,0-1:q8,-1:q8", *EXLLAMAV2]


@contextmanager
def through_exllamav2(bits: int) -> Iterator[None]:
    """Let attention see what ExLlamaV2's codec makes of the new rows of an fp16 cache."""

    def attend(qkv: Tensor, *args: Any, out_dtype: torch.dtype, **options: Any) -> Tensor:  # noqa: ANN401
        *turned, k, v, slots, table, starts, lens = args
        turning = {name: options.pop(name) for name in ("interleaved", "q_weight", "k_weight", "eps")}
        q = rope_write(qkv, *turned, k, v, slots, out_dtype=out_dtype, **turning)
        new = torch.arange(int(lens[0]) - len(q), int(lens[0]), device=q.device)
        place = (table[0, new // PAGE_SIZE].long(), slice(None), new % PAGE_SIZE)
        for pages in (k, v):
            # The heads of a token lie side by side, as they do there: [T, G, D].
            rows = pages.codes[place].contiguous()
            pages.codes[place] = q4.decode(*q4.encode(rows, bits), bits).view(rows.shape)
        return paged_attention(q, k, v, table, starts, lens, **options)

    with mock.patch.object(layers, "rope_attention", attend):
        yield


def scored(model: Model, ids: list[int], name: str, *, last: int | None = None) -> list[Tensor]:
    """Return what `log_probabilities` gives with one of FORMATS; a list, so that nothing else is scored so."""
    bits = EXLLAMAV2.get(name)
    with through_exllamav2(bits) if bits else nullcontext():
        return list(log_probabilities(model, ids, MEASURE if bits else name, last=last))


def figures(model: Model, pieces: Sequence[list[int]], name: str) -> dict[str, Any]:
    """Return perplexity, divergence and agreement of one format over contexts of equal length."""
    loss = divergence = same = 0.0
    bits = EXLLAMAV2.get(name)
    for ids in pieces:
        targets, place = torch.tensor([*ids[1:], 0], device=model.device), 0
        exact = log_probabilities(model, ids, MEASURE)
        for truth, found in zip(exact, scored(model, ids, name), strict=True):
            rows = slice(place, min(place + len(found), len(ids) - 1))
            loss += F.nll_loss(found[: rows.stop - rows.start], targets[rows], reduction="sum").item()
            divergence += (truth.exp() * (truth - found)).sum().item()
            same += (truth.argmax(dim=-1) == found.argmax(dim=-1)).sum().item()
            place += len(found)
    count = sum(map(len, pieces))
    config = model.config
    if bits is None:
        per_token = nbytes_per_token(layer_formats(name, config.num_layers), 1, config.head_dim)
        stored = per_token * 8 / (2 * config.head_dim * config.num_layers)
    else:
        stored = bits + 0.5
    return {
        "format": name,
        "bits": stored,
        "perplexity": math.exp(loss / (count - len(pieces))),
        "kl": divergence / count,
        "same_top": same / count,
    }


def table_of(rows: Sequence[dict[str, Any]], length: int, count: int) -> list[str]:
    """Return one context length as lines of Markdown."""
    lines = [f"{count} contexts of {length:,} tokens:", ""]
    lines += ["| format | bits per number | perplexity | KL, nats | same top token |", "|---|---|---|---|---|"]
    for row in rows:
        kl = "0" if row["format"] == MEASURE else f"{row['kl']:.1e}"
        cells = f"{row['bits']:.2f} | {row['perplexity']:.4f} | {kl} | {100 * row['same_top']:.2f} %"
        lines.append(f"| `{row['format']}` | {cells} |")
    return lines


def rows_of(kind: str, head_dim: int) -> Tensor:
    """Return [4096, D] rows of random numbers."""
    x = torch.randn(4096, head_dim, generator=torch.Generator().manual_seed(head_dim))
    if kind == "outliers":
        x *= 1 + 9 * (torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.01)
    elif kind == "features":
        x[:, [3, head_dim // 2 + 3]] = 12 * x[:, [3, head_dim // 2 + 3]] + 4
    return x


def table_of_errors() -> list[str]:
    """Return the table of codecs."""
    columns = [(kind, head_dim) for kind in ("normal", "outliers", "features") for head_dim in (64, 128)]
    heads = " | ".join(f"{kind}, D = {head_dim}" for kind, head_dim in columns)
    lines = [f"| codec | bits, D = 128 | {heads} |", "|---|---|" + "---|" * len(columns)]
    codecs: list[tuple[str, float, Callable[[Tensor], Tensor]]] = [
        (name, codec.nbytes(128) / 16, lambda x, codec=codec: decode(*encode(x, codec), codec))
        for name, codec in CODECS.items()
        if codec.scheme != "plain"
    ]
    for name, bits in EXLLAMAV2.items():
        through = lambda x, bits=bits: q4.decode(*q4.encode(x.half(), bits), bits).view(x.shape)  # noqa: E731
        codecs.append((name, bits + 0.5, through))
    for name, width, through in codecs:
        rows = [rows_of(*column) for column in columns]
        errors = [float((through(x).float() - x).norm() / x.norm()) for x in rows]
        lines.append(f"| {name} | {width:g} | " + " | ".join(f"{100 * error:.2f} %" for error in errors) + " |")
    return lines


def main() -> None:
    """Print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", default=FORMATS, metavar="FORMAT")
    parser.add_argument("--model", type=Path, default=STORYTELLER)
    parser.add_argument("--texts", type=Path, help="held-out documents, a JSON list of texts")
    parser.add_argument("--context", type=int, nargs="+", help="tokens; default: what the model has positions for")
    parser.add_argument("--tokens", type=int, default=65536, help="at most, per length; default: 65536")
    parser.add_argument("--device", default=None)
    parser.add_argument("--write", action="store_true", help="into docs/kv-cache.md and benchmarks/results/")
    args = parser.parse_args()
    model = Model.load(args.model, device=args.device)
    ids, lines, measured = stream(model, documents(args.model, args.texts)), [], []
    for length in args.context or default_contexts(model):
        pieces = [ids[i : i + length] for i in range(0, min(len(ids), args.tokens) - length + 1, length)]
        if not pieces:
            raise ValueError(f"there are {len(ids):,} held-out tokens and --tokens {args.tokens}: too few for {length}")
        rows = [figures(model, pieces, name) for name in args.formats]
        measured.append({"context": length, "contexts": len(pieces), "formats": rows})
        lines += [*table_of(rows, length, len(pieces)), ""]
        print("\n".join(lines[-len(rows) - 5 :]), flush=True)
    errors = table_of_errors()
    print("\n".join(errors))
    if args.write:
        name = args.model.resolve().name
        facts = {"bench": "quality_kv_formats", "model": name, "dtype": str(model.dtype), "lengths": measured}
        save(results_file(args.model, model.device, "quality_kv"), facts | environment(model.device))
        write_table(f"kv_formats {name}", lines[:-1])
        write_table("codecs", errors)


if __name__ == "__main__":
    main()
