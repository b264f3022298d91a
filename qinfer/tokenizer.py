"""Tokenizer: text to token ids and back, special tokens, chat templates.

The work is done by the `tokenizers` library on tokenizer.json. What this file adds is that a damaged folder raises a
CheckpointError: the library raises bare Exception for a damaged file, and a Rust panic, which is not even an Exception,
for a regular expression that runs away. Chat templates are programs; they run in jinja2's immutable sandbox, away from
the process and from files. What they write is bounded here; how long they loop is not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Self

import jinja2
import tokenizers
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qinfer.checkpoint import read_json
from qinfer.errors import CheckpointError

# No real template comes near it; a template that doubles a string in a loop does.
_MAX_CHAT_CHARACTERS = 2**24
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """The tokenizer of one checkpoint.

    Attributes:
        vocab_size: the largest token id plus one; a model must have at least as many embedding rows.
        eos_ids: the end-of-text ids that the tokenizer's own files name.
        chat_template: the source of the chat template, None if the checkpoint has none.
        special_tokens: names such as "bos_token" to their text, as chat templates see them.
    """

    vocab_size: int
    eos_ids: frozenset[int]
    chat_template: str | None
    special_tokens: dict[str, str]

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any], folder: Path) -> None:
        """Wrap a loaded `backend`; `config` is the content of tokenizer_config.json, `folder` where both come from."""
        # Limits for training batches are sometimes saved along; a prompt must never be cut or padded silently.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._folder = folder
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.special_tokens = _special_tokens(config, folder)
        self.eos_ids = self._eos_ids()
        self.chat_template, self._template_file = _chat_template(config, folder)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load the tokenizer of the checkpoint folder `path`.

        Raises:
            CheckpointError: tokenizer.json is missing, or one of the tokenizer's files is damaged.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        # Read as JSON first: the library's own message has no file and sometimes no line.
        read_json(file)
        with _translated(lambda problem: CheckpointError(file, None, f"is not a tokenizer: {problem}")):
            backend = tokenizers.Tokenizer.from_file(str(file))
        config: dict[str, Any] = {}
        # Older checkpoints keep some special tokens in a file of their own; the newer file wins.
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).exists():
                config |= read_json(folder / name)
        return cls(backend, config, folder)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: any text that UTF-8 can write.
            add_special_tokens: whether to add what tokenizer.json's post-processor adds, such as a begin-of-text token.

        Returns:
            The ids.

        Raises:
            TypeError: `text` is not a string.
            ValueError: `text` holds half a surrogate pair, or the tokenizer gives up on it.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as problem:
            found = f"{text[problem.start]!r} at character {problem.start}"
            raise ValueError(f"text must not hold half a surrogate pair, got {found}") from problem
        with _translated(lambda problem: ValueError(f"the tokenizer gives up on this text: {problem}")):
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens; ids that no token has add nothing.

        Raises:
            ValueError: an id is negative or does not fit 32 bits.
        """
        listed = [int(token) for token in ids]
        if listed and not 0 <= min(listed) <= max(listed) < 2**32:
            raise ValueError(f"token ids must be from 0 to 2**32 - 1, got {min(listed)} to {max(listed)}")
        with _translated(lambda problem: ValueError(f"the tokenizer cannot decode these ids: {problem}")):
            text: str = self._backend.decode(listed, skip_special_tokens=True)
        return text

    def serialized(self) -> str:
        """Return what tokenizer.json would hold, for libraries that make a tokenizer of their own."""
        return str(self._backend.to_str())

    def continuations(self, token_id: int) -> list[int]:
        """Return the ids of all tokens whose spelling begins with that of a token, itself included.

        Special tokens begin like nothing else.
        """
        spelling = self._spellings.get(token_id)
        if spelling is None:
            return [token_id]
        return [other for other, text in self._spellings.items() if text.startswith(spelling)]

    @cached_property
    def _spellings(self) -> dict[int, str]:
        """How the vocabulary spells its tokens, which is not their text but begins alike where the text does."""
        return {token_id: text for text, token_id in self._backend.get_vocab(with_added_tokens=False).items()}

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: object
    ) -> str:
        """Write a conversation as the text that the model was trained on.

        The text usually holds the special tokens already, so encode it with `add_special_tokens=False`.

        Args:
            messages: the conversation, each message a mapping with at least "role".
            add_generation_prompt: whether to end with the opening of the assistant's answer.
            variables: more names for the template, such as `tools`, `documents` or `enable_thinking`.

        Returns:
            The text.

        Raises:
            TypeError: `messages` is not a sequence of mappings.
            ValueError: the checkpoint has no chat template, or the template refuses these messages.
            CheckpointError: the template itself is not valid.
        """
        if isinstance(messages, str | Mapping) or not all(isinstance(message, Mapping) for message in messages):
            raise TypeError("messages must be a sequence of mappings with role and content")
        named = {"tools": None, "documents": None, **self.special_tokens, **variables}
        pieces: list[str] = []
        room = _MAX_CHAT_CHARACTERS
        try:
            for piece in self._compiled.generate(
                messages=messages, add_generation_prompt=add_generation_prompt, **named
            ):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    raise ValueError(f"the chat template wrote more than {_MAX_CHAT_CHARACTERS} characters")
        except (
            jinja2.TemplateError,
            TypeError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RecursionError,
        ) as problem:
            # A template is a program and fails like one; what it raises on purpose is a TemplateError too.
            raise ValueError(f"the chat template refuses these messages: {problem}") from problem
        return "".join(pieces)

    @cached_property
    def _compiled(self) -> jinja2.Template:
        """The compiled template; made on first use, so that a broken one does not keep a model from completing text."""
        if self.chat_template is None:
            raise ValueError(f"{self._folder} has no chat template; give the model plain text instead")
        try:
            return _environment().from_string(self.chat_template)
        except jinja2.TemplateSyntaxError as problem:
            text = f"is not a valid chat template: line {problem.lineno}: {problem.message}"
            raise CheckpointError(self._template_file, None, text) from problem

    def _eos_ids(self) -> frozenset[int]:
        """Look up the end-of-text token."""
        token = self.special_tokens.get("eos_token")
        if token is None:
            return frozenset()
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            file = self._folder / "tokenizer_config.json"
            raise CheckpointError(file, None, f"eos_token {token!r} is not in tokenizer.json")
        return frozenset({token_id})


class _GenerationTag(Extension):
    """Accept {% generation %} around the assistant's words; it marks them for training and changes no text."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it as a plain class attribute

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the tag as a scope around its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    """Return the environment that chat templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    # Each of these hands a template a Python object that it has no use for, or a cheap way to burn time.
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(name)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.filters["tojson"] = _to_json
    return environment


def _raise_exception(message: str) -> NoReturn:
    """Let a template refuse its input."""
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    """Tell a template the local time."""
    return datetime.now().strftime(pattern)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON without the HTML escapes of jinja2's own filter; templates may pass the arguments by position."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _special_tokens(config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Return the special tokens of tokenizer_config.json: strings, or objects with the text under "content"."""
    tokens: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        value = config.get(name)
        if value is None:
            continue
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str):
            problem = f"{name} must be a string or an object with content, got {value!r}"
            raise CheckpointError(folder / "tokenizer_config.json", None, problem)
        tokens[name] = text
    return tokens


def _chat_template(config: Mapping[str, Any], folder: Path) -> tuple[str | None, Path]:
    """Return the source of the chat template and the file it comes from; a file of its own wins."""
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8"), file
        except (OSError, UnicodeDecodeError) as problem:
            raise CheckpointError(file, None, f"cannot be read: {problem}") from problem
    file = folder / "tokenizer_config.json"
    template = config.get("chat_template")
    if isinstance(template, list):
        if not all(isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in template):
            raise CheckpointError(
                file, None, "chat_template must be a string or a list of objects with name and template"
            )
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(file, None, f"chat_template must be a string, got {type(template).__name__}")
    return template, file


@contextmanager
def _translated(error: Callable[[BaseException], Exception]) -> Iterator[None]:
    """Raise `error(problem)` for the two failures of `tokenizers` that have no class to name.

    The library raises plain Exception, and a Rust panic arrives as PanicException, which derives from BaseException and
    cannot be imported. Everything else, subclasses of Exception among them, passes.
    """
    try:
        yield
    except BaseException as problem:
        if type(problem) is Exception or type(problem).__name__ == "PanicException":
            raise error(problem) from problem
        raise
