"""`python -m qinfer.bench drafts`: how much faster drafts from the text make a copy, beside the same run without them.

The task is to copy the prompt, but for one id after every `--edit-every`. Random weights do not copy, so a constraint
leaves one id at each place; steps, drafts and their checks are those of a model that would write the same text unasked.
That makes acceptance a property of the task: a draft is right up to the next edit, and after an edit nothing is drafted
until three ids agree with the prompt again.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from qinfer.bench.measure import environment
from qinfer.bench.report import emit
from qinfer.bench.synthetic import add_source, describe_source, synthetic_model
from qinfer.engine.constraints import Words, packed
from qinfer.engine.generator import Generator
from qinfer.engine.job import Completion
from qinfer.engine.sampling import SamplingParams
from qinfer.kernels.device import default_device
from qinfer.models.model import Model

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_SIZES = (
    ("--draft-tokens", 8, "guessed from the text per step"),
    ("--prompt-tokens", 512, "of the text to copy"),
    ("--edit-every", 64, "ids in front of one that is not copied; 0: none"),
    ("--batch", 1, "requests at a time"),
    ("--rounds", 3, "runs of each kind, of which the fastest counts"),
)


class Dictation:
    """A constraint that leaves one text."""

    def __init__(self, text: Sequence[int], vocab_size: int) -> None:
        """Have every walk say this text."""
        self.words = [packed([token], vocab_size) for token in text]

    def begin(self) -> DictationWalk:
        """Return a walk that has taken nothing."""
        return DictationWalk(self.words)


class DictationWalk:
    """How far the text is said."""

    def __init__(self, words: list[Words]) -> None:
        """Begin; `words` are the bits of each id."""
        self._words = words
        self._num_taken = 0

    @property
    def is_complete(self) -> bool:
        """Whether everything is said."""
        return self._num_taken == len(self._words)

    is_finished = is_complete

    def allowed(self) -> Words:
        """Return the bits of the next id."""
        return self._words[self._num_taken]

    def advance(self, token_id: int) -> None:
        """Take the next id."""
        self._num_taken += 1

    def rewind(self, count: int) -> None:
        """Take the latest ids back."""
        self._num_taken -= count


def add_parser(programs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command line of this benchmark."""
    parser = programs.add_parser("drafts", help="speed of a copy with and without drafts from the text")
    add_source(parser)
    for name, default, told in _SIZES:
        parser.add_argument(name, type=int, default=default, help=f"{told}; default: {default}")
    parser.add_argument("--kv-format", default="fp16", help="of the cache; default: fp16")
    parser.add_argument("--device", help="cuda or cpu")
    parser.add_argument("--json", metavar="FILE", help="append the result to FILE as a line of JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure, print and write."""
    sizes = {name[2:].replace("-", "_"): getattr(options, name[2:].replace("-", "_")) for name, _, _ in _SIZES}
    if min(value for name, value in sizes.items() if name != "edit_every") < 1 or options.edit_every < 0:
        raise ValueError(f"sizes must be at least 1, and --edit-every at least 0, got {sizes}")
    device = torch.device(options.device) if options.device else default_device()
    if options.model:
        model = Model.load(options.model, device=device)
    else:
        model = synthetic_model(options.preset, options.weights, device, head=options.head)
    result = {
        "bench": "drafts",
        **describe_source(options),
        "kv_format": options.kv_format,
        **sizes,
        **measure(model, **sizes, kv_format=options.kv_format),
        **environment(device),
    }
    emit(result, options.json)
    return 0


def measure(
    model: Model,
    *,
    draft_tokens: int,
    prompt_tokens: int,
    edit_every: int,
    batch: int,
    rounds: int,
    kv_format: str = "fp16",
) -> dict[str, Any]:
    """Time the copy without and with drafts.

    Args:
        model: what copies.
        draft_tokens: guessed per step.
        prompt_tokens: of the text to copy.
        edit_every: ids in front of one that is not copied; 0: none.
        batch: requests at a time, each with a text of its own.
        rounds: runs of each kind, of which the fastest counts.
        kv_format: of the cache.

    Returns:
        Fields for a report: tokens per second of both, their ratio, and what became of the drafts.

    Raises:
        Exception: whatever a request failed with.
        RuntimeError: the copies are not what they have to be.
    """
    tasks = [_task(number, prompt_tokens, edit_every, model.config.vocab_size) for number in range(batch)]
    figures: dict[str, Any] = {}
    for name, draft in (("plain", 0), ("drafted", draft_tokens)):
        room = batch * (-(-(2 * prompt_tokens + 1) // 256) * 256)
        generator = Generator(
            model, kv_format=kv_format, max_tokens=room, max_batch=batch, prefix_cache=False, draft=draft
        )
        if model.device.type == "cuda":
            generator.warm_up()
        seconds, outs = min((_copy(generator, tasks) for _ in range(rounds)), key=lambda timed: timed[0])
        figures[f"{name}_tokens_per_second"] = batch * (prompt_tokens - 1) / seconds
        figures |= {f"{field}_tokens": sum(getattr(out, f"{field}_tokens") for out in outs) for field in _COUNTS}
    figures["acceptance"] = figures["accepted_tokens"] / max(1, figures["drafted_tokens"])
    figures["speed_up"] = figures["drafted_tokens_per_second"] / figures["plain_tokens_per_second"]
    return figures


_COUNTS = ("drafted", "accepted")


def _task(number: int, length: int, edit_every: int, vocab_size: int) -> tuple[list[int], list[int]]:
    """Return a text and its copy with edits."""
    rng = random.Random(number)
    text = [rng.randrange(vocab_size) for _ in range(length)]
    copy = list(text)
    if edit_every:
        for place in range(edit_every, length, edit_every + 1):
            copy[place] = rng.randrange(vocab_size)
    return text, copy


def _copy(generator: Generator, tasks: Sequence[tuple[list[int], list[int]]]) -> tuple[float, list[Completion]]:
    """Have all texts copied, and return the seconds between the first ids and the last ones."""
    vocab_size = generator.model.config.vocab_size
    jobs = [
        generator.submit(
            text,
            SamplingParams(
                temperature=0,
                max_new_tokens=len(copy),
                ignore_eos=True,
                constraint=Dictation(copy, vocab_size),
            ),
        )
        for text, copy in tasks
    ]
    while not all(job.sequence.generated or job.finished for job in jobs):
        generator.step()
    start = time.perf_counter()
    while not all(job.finished for job in jobs):
        generator.step()
    seconds = time.perf_counter() - start
    outs = [job.completion for job in jobs if job.completion is not None]
    for out in outs:
        if out.error is not None:
            raise out.error
    if [list(out.token_ids) for out in outs] != [copy for _, copy in tasks]:
        raise RuntimeError("the copies are not those that were dictated")
    return seconds, outs
