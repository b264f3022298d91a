"""`qinfer generate PROMPT`: stream a completion to the terminal as its text appears."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qinfer.assets import STORYTELLER
from qinfer.engine.follow import follow
from qinfer.engine.generator import Generator
from qinfer.engine.grammar import Grammar, grammar, json_schema, regex
from qinfer.engine.job import Completion
from qinfer.engine.sampling import SamplingParams
from qinfer.models.model import Model
from qinfer.parallel.spawn import join
from qinfer.programs import drafting, flags
from qinfer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from argparse import _SubParsersAction

DEFAULT_PROMPT = "Once upon a time"


def add_parser(programs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command line of this program."""
    parser = programs.add_parser(
        "generate",
        help="stream a completion of a prompt",
        description="Stream a completion of a prompt. Without --model the package's small story-telling model runs.",
    )
    parser.add_argument("text", nargs="?", metavar="PROMPT", help=f"text to continue (default: {DEFAULT_PROMPT!r})")
    parser.add_argument("-p", "--prompt", help="the same as the argument PROMPT")
    parser.add_argument("-m", "--model", metavar="DIR", help="folder of a checkpoint")
    flags.add_sampling(parser, max_new_tokens=256, seed="the same seed gives the same text")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated")
    constraints = parser.add_mutually_exclusive_group()
    constraints.add_argument("--json-schema", metavar="FILE", help="write a JSON value of the schema in FILE")
    constraints.add_argument("--regex", metavar="REGEX", help="write a text that REGEX matches as a whole")
    constraints.add_argument("--grammar", metavar="FILE", help="write a text of the Lark grammar in FILE")
    parser.add_argument("--lora", metavar="DIR", help="folder of an adapter, as PEFT saves them, to run with")
    flags.add_loading(parser)
    parser.add_argument("--tp", action="store_true", help="be one of the ranks that torchrun has started")
    drafting.add_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Load, stream, and report the speed on standard error."""
    if options.text is not None and options.prompt is not None:
        raise ValueError("give the prompt either as the argument or with --prompt, not both")
    prompt = next((text for text in (options.text, options.prompt) if text is not None), DEFAULT_PROMPT)
    params = replace(flags.sampling(options), stop=tuple(options.stop))
    drafting.check(options)
    group = join() if options.tp else None
    # A token has a character at the least, as a rule.
    room = len(prompt) + params.max_new_tokens
    model = flags.load(options, options.model or STORYTELLER, cache_tokens=room, group=group)
    if group is not None and group.rank:
        follow(model, group)
        return 0
    try:
        return _stream(model, prompt, params, options)
    finally:
        model.close()


def _stream(model: Model, prompt: str, params: SamplingParams, options: argparse.Namespace) -> int:
    """Print the completion as it comes."""
    if model.tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer.json, which a text prompt needs")
    params = replace(params, constraint=_constraint(options, model.tokenizer))
    max_tokens = len(model.tokenizer.encode(prompt)) + params.max_new_tokens
    lora = None if options.lora is None else model.load_lora(options.lora)
    draft = drafting.load(options, model)
    generator = Generator(model, kv_format=options.kv_format, max_tokens=max_tokens, max_batch=1, draft=draft)
    # What is asked is checked here: a request that is refused prints nothing.
    events = generator.stream(prompt, params, lora=lora)
    print(prompt, end="", flush=True)
    start = time.perf_counter()
    told, completion = [], None
    for event in events:
        told.append((time.perf_counter() - start, len(event.token_ids)))
        print(event.text, end="", flush=True)
        completion = event.completion
    print(flush=True)
    assert completion is not None
    print(summary(completion, told), file=sys.stderr)
    if completion.error is not None:
        raise completion.error
    return 0


def _constraint(options: argparse.Namespace, tokenizer: Tokenizer) -> Grammar | None:
    """Compile what the text has to look like."""
    if options.json_schema is not None:
        return json_schema(_read(options.json_schema), tokenizer)
    if options.grammar is not None:
        return grammar(_read(options.grammar), tokenizer)
    return None if options.regex is None else regex(options.regex, tokenizer)


def _read(file: str) -> str:
    """Return the text of a file that was named on the command line."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"{file} cannot be read: {problem}") from problem


def summary(completion: Completion, told: Sequence[tuple[float, int]]) -> str:
    """Say how many tokens came how fast.

    Args:
        completion: What was generated.
        told: When each event came, in seconds, and with how many tokens.
    """
    # The first event belongs to the prompt. No step is launched ahead of the last, so its time is not that of a step.
    seconds, tokens = (told[-2][0] - told[0][0], sum(count for _, count in told[1:-1])) if len(told) > 2 else (0.0, 0)
    decode = f", {tokens / seconds:.1f} tokens/s" if seconds > 0 and tokens else ""
    drafts = f"{completion.accepted_tokens} of {completion.drafted_tokens} drafted tokens accepted; "
    return (
        f"[{completion.prompt_tokens} prompt tokens, first token after {told[0][0] * 1e3:.0f} ms; "
        f"{len(completion.token_ids)} new tokens{decode}; {drafts if completion.drafted_tokens else ''}"
        f"finished: {completion.finish_reason}]"
    )
