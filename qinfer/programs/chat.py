"""`qinfer chat MODEL`: a conversation in the terminal.

A line is a message; one that begins with three quotes goes on over several lines, up to three quotes. A line that
begins with a slash is a command. Ctrl-C stops an answer, Ctrl-D ends the program. The generator keeps the pages of what
was said, so a turn computes only what is new.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from qinfer.engine.generator import Generator
from qinfer.engine.job import Completion
from qinfer.engine.sampling import SamplingParams
from qinfer.errors import QinferError
from qinfer.models.model import Model
from qinfer.programs import drafting, flags
from qinfer.programs.answers import Display, display_for
from qinfer.programs.conversation import Conversation, Message
from qinfer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from argparse import _SubParsersAction

CONTEXT = 8192  # tokens, where the model has more and nobody asks for them
PAGE_SIZE = 64  # a turn computes what is new and less than a page of what is not
QUOTES = '"""'
HELP = """\
/help           this list
/reset          forget what was said, but not the system prompt
/undo           take the last question and its answer back
/retry          answer the last question once more
/system TEXT    set the system prompt; without TEXT there is none
/save FILE      write the conversation as JSON
/load FILE      go on with a saved conversation
/quit           leave, as does Ctrl-D
\"\"\"             begins and ends a message of several lines
//…             a message that begins with a slash
Ctrl-C          stops an answer; what was said of it stays"""


def add_parser(programs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command line of this program."""
    parser = programs.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a model in the terminal. Type /help there for its commands.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint")
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    parser.add_argument("--load", type=Path, metavar="FILE", help="go on with a saved conversation")
    parser.add_argument("--template", metavar="FILE", help="chat template (default: the model's own)")
    parser.add_argument("--no-thinking", action="store_true", help="tell the template enable_thinking=false")
    parser.add_argument("--context", type=int, metavar="N", help=f"tokens of a conversation (default: up to {CONTEXT})")
    flags.add_sampling(parser, max_new_tokens=2048, seed="of the first answer; the next ones count up")
    flags.add_loading(parser)
    drafting.add_arguments(parser)
    parser.add_argument("--stats", action="store_true", help="tell tokens and speed behind each answer")
    parser.add_argument("--plain", action="store_true", help="plain text, also on a terminal")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Load, and talk until the input ends."""
    if options.context is not None and options.context < 1:
        raise ValueError(f"--context must be at least 1, got {options.context}")
    params = flags.sampling(options)
    variables: dict[str, Any] = {"enable_thinking": False} if options.no_thinking else {}
    if options.template is not None:
        variables["chat_template"] = _read(Path(options.template))
    drafting.check(options)
    conversation = Conversation(options.system)
    if options.load is not None:
        _load(conversation, options.load)
    model = flags.load(options, options.model, cache_tokens=options.context or CONTEXT)
    try:
        tokenizer = _tokenizer(model, options)
        context = min(options.context or CONTEXT, model.config.max_positions)
        generator = Generator(
            model,
            kv_format=options.kv_format,
            max_tokens=context,
            page_size=PAGE_SIZE,
            max_batch=1,
            draft=drafting.load(options, model),
        )
        write = _Writer(tokenizer, variables)
        chat = Chat(generator, write, params, conversation, display_for(plain=options.plain), context=context)
        chat.tells_stats = options.stats
        chat.talk()
    finally:
        model.close()
    return 0


def _tokenizer(model: Model, options: argparse.Namespace) -> Tokenizer:
    """Return the tokenizer of a model that can chat."""
    if model.tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer.json, which a chat needs")
    if model.tokenizer.chat_template is None and options.template is None:
        raise ValueError(
            f"{options.model} has no chat template: give one with --template FILE, "
            f"or let it continue a text with qinfer generate -m {options.model}"
        )
    return model.tokenizer


def _read(file: Path) -> str:
    """Read a template."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"--template {file} cannot be read: {problem}") from problem


def _load(conversation: Conversation, file: Path) -> None:
    """Load a conversation; whatever is wrong with the file is a ValueError."""
    try:
        conversation.load(file)
    except OSError as problem:
        raise ValueError(f"{file} cannot be read: {problem}") from problem


class _Writer:
    """Turns messages into the ids of a prompt."""

    def __init__(self, tokenizer: Tokenizer, variables: dict[str, Any]) -> None:
        """Write with these variables of the template."""
        self._tokenizer = tokenizer
        self._variables = variables

    def __call__(self, messages: list[Message]) -> list[int]:
        """Return the ids of a conversation that the model is to answer; the template writes the special tokens."""
        text = self._tokenizer.apply_chat_template(messages, **self._variables)
        return self._tokenizer.encode(text, add_special_tokens=False)


class StopKey:
    """Makes Ctrl-C a wish to stop while its block runs: a step is never torn. A second one means it."""

    def __enter__(self) -> StopKey:
        """Take the signal."""
        self.is_pressed = False
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def _press(self, number: int, frame: FrameType | None) -> None:
        """Note the wish."""
        if self.is_pressed:
            raise KeyboardInterrupt
        self.is_pressed = True

    def __exit__(self, *error: object) -> None:
        """Give the signal back."""
        signal.signal(signal.SIGINT, self._before)


class Chat:
    """One conversation between standard input and a generator."""

    def __init__(
        self,
        generator: Generator,
        write: Callable[[list[Message]], list[int]],
        params: SamplingParams,
        conversation: Conversation,
        display: Display,
        *,
        context: int,
    ) -> None:
        """Get ready to talk.

        Args:
            generator: answers.
            write: gives the prompt that asks for an answer to messages.
            params: how to sample; its seed is that of the first answer.
            conversation: what was said before.
            display: where answers go.
            context: tokens of a conversation, prompt and answer together.
        """
        self.conversation = conversation
        self.tells_stats = False
        self._generator = generator
        self._write = write
        self._params = params
        self._display = display
        self._context = context
        self._num_answers = 0
        self._is_typed = sys.stdin.isatty()
        if self._is_typed:
            # Arrow keys and history, where Python has them.
            with suppress(ImportError):
                importlib.import_module("readline")

    def talk(self) -> None:
        """Answer messages and obey commands until the input ends; mistakes are told and change nothing."""
        if self._is_typed:
            self._display.note("/help lists the commands")
        while (line := self._next_message()) is not None and line.strip() != "/quit":
            try:
                self.take(line)
            except (QinferError, ValueError, OSError) as problem:
                self._display.note(f"{problem}")

    def take(self, line: str) -> None:
        """Answer one message, or obey one command."""
        if not line.startswith("/") or line.startswith("//"):
            if line.strip():
                self._answer(line[1:] if line.startswith("//") else line)
            return
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        commands: dict[str, Callable[[], object]] = {
            "/help": lambda: self._display.note(HELP),
            "/reset": self.conversation.reset,
            "/undo": self._undo,
            "/retry": self._retry,
            "/system": lambda: self.conversation.set_system(rest),
            "/save": lambda: self.conversation.save(_file(name, rest)),
            "/load": lambda: self.conversation.load(_file(name, rest)),
        }
        if name not in commands:
            raise ValueError(f"{name} is no command; /help lists them, and // begins a message with a slash")
        commands[name]()

    def _next_message(self) -> str | None:
        """Read a message of one line or several; None at the end of the input."""
        line = self._next_line(">>> ")
        if line is None or not line.lstrip().startswith(QUOTES):
            return line
        text = line.lstrip().removeprefix(QUOTES)
        while not text.rstrip().endswith(QUOTES):
            more = self._next_line("... ")
            if more is None:
                return text
            text += "\n" + more
        return text.rstrip().removesuffix(QUOTES)

    def _next_line(self, prompt: str) -> str | None:
        """Read a line; Ctrl-C drops what was typed of it."""
        while True:
            try:
                return input(prompt if self._is_typed else "")
            except EOFError:
                if self._is_typed:
                    self._display.note("")
                return None
            except KeyboardInterrupt:
                self._display.note("\nCtrl-D or /quit leaves")

    def _undo(self) -> None:
        if self.conversation.undo() is None:
            raise ValueError("there is nothing to take back")

    def _retry(self) -> None:
        """Answer the last question again; it stays answered as it was if that fails."""
        before = list(self.conversation.messages)
        question = self.conversation.undo()
        if question is None:
            raise ValueError("there is no question to answer again")
        is_kept = False
        try:
            is_kept = self._answer(question)
        finally:
            if not is_kept:
                self.conversation.messages = before

    def _answer(self, question: str) -> bool:
        """Stream an answer, and keep it with its question unless it has no text; say whether it was kept."""
        prompt = self._write(self.conversation.asking(question))
        room = self._context - len(prompt)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens, and there is room for {self._context}: "
                "/undo or /reset, or start with a larger --context"
            )
        seed = None if self._params.seed is None else self._params.seed + self._num_answers
        params = replace(self._params, seed=seed, max_new_tokens=min(room, self._params.max_new_tokens))
        start = time.perf_counter()
        completion = self._stream(prompt, params)
        self._num_answers += 1
        if self.tells_stats:
            self._display.note(_stats(completion, time.perf_counter() - start))
        if completion.error is not None:
            raise completion.error
        if completion.finish_reason == "length":
            self._display.note(f"[cut after {len(completion.token_ids)} tokens]")
        if completion.text:
            self.conversation.keep(question, completion.text)
        return bool(completion.text)

    def _stream(self, prompt: list[int], params: SamplingParams) -> Completion:
        """Show an answer as it comes; Ctrl-C ends it between two steps."""
        with StopKey() as key:
            self._display.begin()
            try:
                job = self._generator.submit(prompt, params)
                while job.completion is None:
                    for event in self._generator.step():
                        self._display.show(event.text)
                    if key.is_pressed:
                        job.cancel()
                # What a cancelled request still had to say comes with the next step.
                for event in self._generator.step():
                    self._display.show(event.text)
            finally:
                self._display.end()
        return job.completion


def _file(command: str, name: str) -> Path:
    """Return the file that a command names."""
    if not name:
        raise ValueError(f"{command} needs the name of a file")
    return Path(name).expanduser()


def _stats(completion: Completion, seconds: float) -> str:
    """Say how many tokens there were, how many of them were known, and how fast it went."""
    new = len(completion.token_ids)
    drafts = f"{completion.accepted_tokens} of {completion.drafted_tokens} drafted tokens accepted; "
    return (
        f"[{completion.prompt_tokens} prompt tokens, {completion.cached_tokens} of them cached; {new} new tokens "
        f"in {seconds:.1f} s, {new / max(seconds, 1e-9):.1f} tokens/s; {drafts if completion.drafted_tokens else ''}"
        f"finished: {completion.finish_reason}]"
    )
