"""Tokenizer: text to token ids and back, special tokens, chat templates.

The work is done by the `tokenizers` library on tokenizer.json. What this file adds is that a damaged folder raises a
CheckpointError: the library raises bare Exception for a damaged file, and a Rust panic, which is not even an Exception,
for a regular expression that runs away. Chat templates are run by chat_template.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

from qinfer.chat_template import DEFAULT, ChatTemplates
from qinfer.checkpoint import read_json
from qinfer.errors import CheckpointError

_UNFINISHED = "\ufffd"  # what decoders give for bytes that are no character
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """The tokenizer of one checkpoint.

    Attributes:
        vocab_size: the largest token id plus one; a model must have at least as many embedding rows.
        eos_ids: the end-of-text ids that the tokenizer's own files name.
        chat_template: the source of the default chat template, None if the checkpoint has none.
        special_tokens: names such as "bos_token" to their text, as chat templates see them.
        own_texts: the texts of ids that do not depend on their neighbours.
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
        self.own_texts = OwnTexts(backend, self.decode)
        self._templates = ChatTemplates(_chat_templates(config, folder), self.special_tokens)
        self.chat_template = self._templates.sources.get(DEFAULT, (None, folder))[0]

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

    def first_difference(self, other: Tokenizer) -> str | None:
        """Return a token that has not the same id in two tokenizers; None if they agree."""
        ours, theirs = (one._backend.get_vocab(with_added_tokens=True) for one in (self, other))
        return min((token for token, _ in ours.items() ^ theirs.items()), default=None)

    @cached_property
    def _spellings(self) -> dict[int, str]:
        """How the vocabulary spells its tokens, which is not their text but begins alike where the text does."""
        return {token_id: text for text, token_id in self._backend.get_vocab(with_added_tokens=False).items()}

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        **variables: object,
    ) -> str:
        """Write a conversation as the text that the model was trained on.

        The text usually holds the special tokens already, so encode it with `add_special_tokens=False`.

        Args:
            messages: the conversation, each message a mapping with at least "role".
            chat_template: the name of one of the checkpoint's templates, or a template; None takes "tool_use" where
                there are tools and a template of that name, and "default" otherwise.
            add_generation_prompt: whether to end with the opening of the assistant's answer; None does so unless the
                last message goes on.
            continue_final_message: whether the text ends inside the last message, for the model to go on with it.
            variables: more names for the template, such as `tools` (JSON schemas), `documents` or `enable_thinking`.

        Returns:
            The text.

        Raises:
            TypeError: `messages`, `tools` or `documents` is not a sequence of mappings, or something is no plain data.
            ValueError: the checkpoint has no chat template, or the template refuses these messages.
            CheckpointError: the template itself is not valid.
        """
        if chat_template is None and not self._templates.sources:
            raise ValueError(f"{self._folder} has no chat template; give chat_template=, or plain text to the model")
        return self._templates.render(
            messages,
            chat_template=chat_template,
            add_generation_prompt=not continue_final_message
            if add_generation_prompt is None
            else add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )

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


class OwnTexts(dict[int, tuple[str, str] | None]):
    """What each id adds to a text behind another id that is here, and its text alone; None where neighbours matter.

    Most decoders join what stands for each token, but for a space that they drop at the start of the whole text, and
    for tokens whose bytes are no whole characters. An entry is made when it is first asked for.
    """

    def __init__(self, backend: tokenizers.Tokenizer, decode: Callable[[list[int]], str]) -> None:
        """Ask for texts by `decode`, where the decoder of `backend` joins."""
        super().__init__()
        self._decode = decode
        self._joins = _joins(backend.decoder)
        # Newer releases of the library decode them apart from the others.
        self._added = frozenset(backend.get_added_tokens_decoder())

    def __missing__(self, token_id: int) -> tuple[str, str] | None:
        self[token_id] = text = self._find(token_id)
        return text

    def _find(self, token_id: int) -> tuple[str, str] | None:
        if not self._joins or token_id in self._added:
            return None
        alone, twice = self._decode([token_id]), self._decode([token_id] * 2)
        return None if not alone or _UNFINISHED in twice else (twice[len(alone) :], alone)


def _joins(decoder: tokenizers.decoders.Decoder | None) -> bool:
    """Say whether a decoder joins the texts of tokens, but for the start of the text and bytes of a character."""
    if decoder is None:
        return False
    # The library offers no other way to read what a decoder is.
    stages = json.loads(decoder.__getstate__())
    is_fused = False
    for stage in stages["decoders"] if stages["type"] == "Sequence" else [stages]:
        is_strip_of_start = stage["type"] == "Strip" and stage["stop"] == 0
        joins = stage["type"] in ("ByteLevel", "Replace", "ByteFallback", "Fuse", "Metaspace") and not is_fused
        if not (joins or is_strip_of_start):
            return False
        is_fused |= stage["type"] == "Fuse"
    return True


def _special_tokens(config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Return the special tokens of tokenizer_config.json: strings, or objects with the text under "content".

    Besides the usual ones these are what a checkpoint names itself, as "image_token" or in an object of its own.
    """
    tokens: dict[str, str] = {}
    own = [config.get(name) for name in ("model_specific_special_tokens", "extra_special_tokens")]
    named = {name: value for values in own if isinstance(values, dict) for name, value in values.items()}
    for name, value in {**named, **config}.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name in _SPECIAL_TOKENS and value is not None and not isinstance(text, str):
            problem = f"{name} must be a string or an object with content, got {value!r}"
            raise CheckpointError(folder / "tokenizer_config.json", None, problem)
        if isinstance(text, str) and (name in named or name.endswith("_token")):
            tokens[name] = text
    return tokens


def _chat_templates(config: Mapping[str, Any], folder: Path) -> dict[str, tuple[str, Path]]:
    """Return the sources of the chat templates by name, each with the file it comes from; files of their own win."""
    file = folder / "tokenizer_config.json"
    template = config.get("chat_template")
    if isinstance(template, list):
        if not all(isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in template):
            raise CheckpointError(
                file, None, "chat_template must be a string or a list of objects with name and template"
            )
        found = {entry["name"]: entry["template"] for entry in template}
    else:
        found = {} if template is None else {DEFAULT: template}
    for source in found.values():
        if not isinstance(source, str):
            raise CheckpointError(file, None, f"chat_template must be a string, got {type(source).__name__}")
    sources = {name: (source, file) for name, source in found.items()}
    # Where models also see pictures, older folders keep the template beside the settings of the pictures.
    file = folder / "chat_template.json"
    if DEFAULT not in sources and file.exists():
        template = read_json(file).get("chat_template")
        if not isinstance(template, str):
            raise CheckpointError(file, None, f"chat_template must be a string, got {type(template).__name__}")
        sources[DEFAULT] = template, file
    own = {DEFAULT: folder / "chat_template.jinja"}
    own |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    for name, path in own.items():
        if path.exists():
            try:
                sources[name] = path.read_text(encoding="utf-8"), path
            except (OSError, UnicodeDecodeError) as problem:
                raise CheckpointError(path, None, f"cannot be read: {problem}") from problem
    return sources


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
