"""Whether a model still finds what stands far back in its context, per KV cache format.

python benchmarks/quality/retrieval.py [--model DIR] [--context 2048 8192] [--count 100] [--write] [FORMAT ...]

A needle is a function with a unique name that returns a word, put at a random depth into held-out documents; behind
them stands the same function again up to the word. A model that has seen such functions in training (`train.py`), with
other names and words, copies it. The bundled storyteller copies no line it has not been trained on, but it does
remember who is in a story: for it, the documents end in a story that is cut off at a name which it has not mentioned
for a while (`--task names`).

A needle is found when every token of the answer is the likeliest one, so that greedy decoding would write it.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from kv_formats import FORMATS, scored
from needles import BORDER, WORDS, answer, numbers, question
from score import CHUNK, STORYTELLER, default_contexts, documents, results_file, save, stream, write_table

from qinfer.bench.measure import environment
from qinfer.models.model import Model

Task: TypeAlias = tuple[list[int], int]  # ids, of which so many at the end are the answer
NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+")  # not at the beginning of a sentence
SINCE = 40  # tokens since a name was last mentioned


def needles(model: Model, texts: Sequence[str], length: int, count: int) -> list[Task]:
    """Return contexts of `length` tokens that hold a function and ask for it at their end."""
    assert model.tokenizer is not None
    hay, rng, tasks, tested = stream(model, texts), random.Random(length), list[Task](), numbers(tested=True)
    for _ in range(count):
        parts = (question(rng.choice(tested)), answer(rng.choice(WORDS)), BORDER)
        asked, answered, border = (model.tokenizer.encode(part, add_special_tokens=False) for part in parts)
        room = length - 2 * len(asked) - 2 * len(answered) - 3 * len(border)
        start = rng.randrange(len(hay) - room)
        depth = rng.randrange(room // 2)
        before, after = hay[start : start + depth], hay[start + depth : start + room]
        needle = [*border, *asked, *answered]
        tasks.append(([*before, *needle, *border, *after, *needle], len(answered)))
    return tasks


def names(model: Model, texts: Sequence[str], length: int, count: int) -> list[Task]:
    """Return contexts of `length` tokens that end in a story, cut off behind a name of someone it told of before."""
    assert model.tokenizer is not None
    tasks = list[Task]()
    for number, text in enumerate(texts):
        for match in reversed(list(NAME.finditer(text))):
            before = model.tokenizer.encode(text[: match.start() - 1])
            answer = model.tokenizer.encode(f" {match[0]}", add_special_tokens=False)
            last = text.rfind(match[0], 0, match.start())
            gap = len(model.tokenizer.encode(text[max(last, 0) : match.start()], add_special_tokens=False))
            if last >= 0 and gap >= SINCE and len(before) + len(answer) <= length:
                others = stream(model, [*texts[number + 1 :], *texts[:number]])
                tasks.append(([*others, *before, *answer][-length:], len(answer)))
                break
        if len(tasks) == count:
            break
    return tasks


def is_found(model: Model, task: Task, name: str) -> bool:
    """Say whether greedy decoding would write the answer, with one of FORMATS."""
    ids, count = task
    # All of the last step is scored: the answer by itself would be one step more, of few tokens, with other kernels.
    last = max(count, (len(ids) - 2) % CHUNK + 1)
    return torch.cat(scored(model, ids[:-1], name, last=last))[-count:].argmax(dim=-1).tolist() == ids[-count:]


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", default=FORMATS, metavar="FORMAT")
    parser.add_argument("--model", type=Path, default=STORYTELLER)
    parser.add_argument("--texts", type=Path, help="held-out documents, a JSON list of texts")
    parser.add_argument("--task", choices=("needles", "names"), help="default: names for the storyteller, else needles")
    parser.add_argument("--context", type=int, nargs="+", help="tokens; default: what the model has positions for")
    parser.add_argument("--count", type=int, default=100, help="needles per length; default: 100")
    parser.add_argument("--device", default=None)
    parser.add_argument("--write", action="store_true", help="into docs/kv-cache.md and benchmarks/results/")
    args = parser.parse_args()
    model, texts = Model.load(args.model, device=args.device), documents(args.model, args.texts)
    is_names = args.task == "names" or (args.task is None and args.model.resolve() == STORYTELLER)
    lengths = args.context or default_contexts(model)
    tasks = {length: (names if is_names else needles)(model, texts, length, args.count) for length in lengths}
    titles = " | ".join(f"{length:,} tokens" for length in lengths)
    lines = [f"| format | {titles} |", "|---|" + "---|" * len(lengths)]
    measured = []
    for name in args.formats:
        hits = {length: sum(is_found(model, task, name) for task in tasks[length]) for length in lengths}
        measured.append({"format": name, "found": hits, "asked": {length: len(tasks[length]) for length in lengths}})
        lines.append(f"| `{name}` | " + " | ".join(f"{hits[n]} of {len(tasks[n])}" for n in lengths) + " |")
    print("\n".join(lines))
    if args.write:
        name = args.model.resolve().name
        facts = {"bench": "quality_retrieval", "model": name, "task": "names" if is_names else "needles"}
        result = {**facts, "formats": measured, **environment(model.device)}
        save(results_file(args.model, model.device, "quality_retrieval"), result)
        write_table(f"retrieval {name}", lines)


if __name__ == "__main__":
    main()
