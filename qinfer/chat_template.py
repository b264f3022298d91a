"""Chat templates: a conversation becomes the text that a model was trained on.

Templates are programs of strangers. They run in jinja2's immutable sandbox, away from the process and from files, and
see plain data only: everything given to them is rebuilt from dicts, lists, strings and numbers. What they write is
bounded here; how long they loop is not.

The names and the environment are those that templates are written for, which transformers defines: `messages`, `tools`,
`documents`, `add_generation_prompt`, the special tokens, `raise_exception`, `strftime_now`, `tojson` without HTML
escapes, loop controls and the `generation` tag.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qinfer.errors import CheckpointError

DEFAULT, TOOL_USE = "default", "tool_use"  # names of templates; the second one is taken where there are tools
# No real template comes near it; a template that doubles a string in a loop does.
_MAX_CHARACTERS = 2**24
# Under which a message may carry what the model thought before it answered; templates read the first or the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# The blank shows whether a template keeps the blanks at the end of a message.
_MARK = "\ue000the message goes on here\ue000 "


class ChatTemplates:
    """The chat templates of one checkpoint, by name."""

    def __init__(self, sources: Mapping[str, tuple[str, Path]], special_tokens: Mapping[str, str]) -> None:
        """Take templates, each with the file it comes from, and the special tokens that they may name."""
        self.sources = dict(sources)
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, object],
    ) -> str:
        """Write a conversation; see `Tokenizer.apply_chat_template`."""
        if isinstance(messages, str | Mapping) or not all(isinstance(message, Mapping) for message in messages):
            raise TypeError("messages must be a sequence of mappings with role and content")
        if not messages:
            raise ValueError("messages must hold at least one message, got none")
        if add_generation_prompt and continue_final_message:
            raise ValueError("continue_final_message goes on with the last message: add_generation_prompt must be off")
        _check_mappings(variables)
        template = self._template(chat_template, has_tools=variables.get("tools") is not None)
        chat = [_message(message) for message in messages]
        final = _mark_end(chat[-1]) if continue_final_message else ""
        named = {"tools": None, "documents": None, **self._special_tokens, **_plain(variables)}
        text = _run(template, {**named, "messages": chat, "add_generation_prompt": add_generation_prompt})
        return _cut_at_mark(text, final) if continue_final_message else text

    def _template(self, asked: str | None, *, has_tools: bool) -> jinja2.Template:
        """Return the template of a name or a source, or else the one for the case."""
        names = [asked] if asked is not None else [TOOL_USE, DEFAULT] if has_tools else [DEFAULT]
        name = next((name for name in names if name in self.sources), None)
        # A text without a brace says the same whatever the messages are: it is the name of something that is not here.
        if name is None and (asked is None or "{" not in asked):
            wanted = DEFAULT if asked is None else asked
            there = ", ".join(map(repr, self.sources)) or "none"
            raise ValueError(
                f"there is no chat template {wanted!r}; chat_template= may be a template or one of: {there}"
            )
        source, file = (asked or "", None) if name is None else self.sources[name]
        try:
            return _compiled(source)
        except jinja2.TemplateSyntaxError as problem:
            text = f"is not a valid chat template: line {problem.lineno}: {problem.message}"
            if file is None:
                raise ValueError(f"chat_template {text}") from problem
            raise CheckpointError(file, None, text) from problem


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as templates expect it: without keys that are None, its reasoning under all usual names."""
    found: dict[str, Any] = _plain({key: value for key, value in message.items() if value is not None})
    reasoning = next((found[name] for name in _REASONING if name in found), None)
    if reasoning is not None:
        found = {"thinking": reasoning, **found, "reasoning_content": reasoning}
    return found


def _check_mappings(variables: Mapping[str, object]) -> None:
    """Refuse tools and documents that templates cannot read."""
    for name, what in (("tools", "JSON schemas"), ("documents", "mappings with title and text")):
        given = variables.get(name)
        if given is not None and (
            not isinstance(given, Sequence) or isinstance(given, str) or not all(isinstance(x, Mapping) for x in given)
        ):
            raise TypeError(f"{name} must be a list of {what}")


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Rebuild a value from plain types: other objects have methods that the sandbox knows nothing about."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else list(map(_plain, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return _plain(value.model_dump())
    raise TypeError(f"chat templates see plain data only: lists, mappings, text, numbers; got {type(value).__name__}")


def _mark_end(message: dict[str, Any]) -> str:
    """Put a mark behind the text of a message, in its last part that has text, and return the text."""
    content = message.get("content")
    parts = [part for part in content if isinstance(part, dict) and "text" in part] if isinstance(content, list) else []
    place, key = (parts[-1], "text") if parts else (message, "content")
    text = place.get(key)
    if not isinstance(text, str):
        raise ValueError("continue_final_message needs a last message with text, to go on with")
    place[key] = text + _MARK
    return text


def _cut_at_mark(text: str, final: str) -> str:
    """Return what a template wrote before the mark; where it strips messages, without the blanks before it."""
    place = text.rfind(_MARK.rstrip())
    if place < 0 or final.strip() not in text:
        raise ValueError("continue_final_message: the template does not write the last message as it is")
    return text[:place] if text.startswith(_MARK, place) else text[:place].rstrip()


def _run(template: jinja2.Template, names: Mapping[str, object]) -> str:
    """Run a template, and stop it when it writes too much."""
    pieces: list[str] = []
    room = _MAX_CHARACTERS
    try:
        for piece in template.generate(names):
            pieces.append(piece)
            room -= len(piece)
            if room < 0:
                raise ValueError(f"the chat template wrote more than {_MAX_CHARACTERS} characters")
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


class _GenerationTag(Extension):
    """Accept {% generation %} around the assistant's words; it marks them for training and changes no text."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it as a plain class attribute

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the tag as a scope around its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    """Compile a template in the environment that chat templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    # Each of these hands a template a Python object that it has no use for, or a cheap way to burn time.
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(name)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.filters["tojson"] = _to_json
    return environment.from_string(source)


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
