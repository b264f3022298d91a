"""Constraints by a grammar: JSON schemas, regular expressions and Lark grammars, compiled by llguidance.

    params = SamplingParams(constraint=json_schema({"type": "integer"}, model.tokenizer))

What cannot be compiled is a ValueError with the compiler's own words; nothing of a schema is left out silently. The
package llguidance is the extra `constrain`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from qinfer.engine.constraints import Words
from qinfer.errors import UnsupportedError
from qinfer.tokenizer import Tokenizer

_SPACE = "[ \\n\\r\\t]{1,64}"
# Tokenizer -> llguidance's view of it, which takes a second to make for a large vocabulary.
_VOCABULARIES: WeakKeyDictionary[Tokenizer, Any] = WeakKeyDictionary()


def json_schema(schema: str | Mapping[str, Any], tokenizer: Tokenizer, *, compact: bool = False) -> Grammar:
    """Return the constraint of texts that are JSON values of a schema.

    Args:
        schema: A JSON schema, as an object or as JSON text.
        tokenizer: The model's.
        compact: Whether to leave no whitespace between the parts of a value; otherwise there may be 64 characters of
            it, more than any layout needs and not so many that a model could go on for ever.

    Raises:
        ValueError: The schema is no JSON, contradicts itself, or uses a keyword that cannot be enforced.
        UnsupportedError: llguidance is not installed, or cannot read the tokenizer.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except json.JSONDecodeError as problem:
            raise ValueError(f"schema must be JSON: {problem}") from problem
    if not isinstance(schema, Mapping):
        raise ValueError(f"schema must be a JSON object, got {schema!r}")
    # A schema may carry options of the compiler, and may not ask it to skip what it does not know.
    space: dict[str, Any] = {"whitespace_flexible": False} if compact else {"whitespace_pattern": _SPACE}
    options = {"lenient": False, **space}
    text = _library().LLMatcher.grammar_from_json_schema(json.dumps(dict(schema)), overrides=options)
    return Grammar("schema", text, tokenizer)


def regex(pattern: str, tokenizer: Tokenizer) -> Grammar:
    """Return the constraint of texts that match a regular expression from beginning to end.

    Args:
        pattern: In the syntax of Rust's regex crate: no look-around and no back references.
        tokenizer: The model's.

    Raises:
        ValueError: The pattern is not valid.
        UnsupportedError: llguidance is not installed, or cannot read the tokenizer.
    """
    return Grammar("pattern", _library().LLMatcher.grammar_from_regex(pattern), tokenizer)


def grammar(text: str, tokenizer: Tokenizer) -> Grammar:
    """Return the constraint of texts of a context-free grammar.

    Args:
        text: A grammar in Lark's syntax, as llguidance reads it; it begins with the rule `start`.
        tokenizer: The model's.

    Raises:
        ValueError: The grammar is not valid.
        UnsupportedError: llguidance is not installed, or cannot read the tokenizer.
    """
    return Grammar("grammar", _library().LLMatcher.grammar_from_lark(text), tokenizer)


class Grammar:
    """A compiled grammar over the tokens of one vocabulary.

    Attributes:
        source: the grammar as llguidance writes it; with the tokenizer, it is all there is to know.
    """

    def __init__(self, what: str, source: str, tokenizer: Tokenizer) -> None:
        """Compile a grammar; `what` is what errors call it."""
        library = _library()
        self.source = source
        vocabulary = _vocabulary(tokenizer)
        self._matcher = library.LLMatcher(vocabulary, source, log_level=0)
        if self._matcher.is_error():
            raise ValueError(f"{what} cannot be enforced: {self._matcher.get_error().strip()}")
        self._num_words = -(-vocabulary.vocab_size // 32)

    def begin(self) -> GrammarWalk:
        """Return a walk that has taken nothing."""
        return GrammarWalk(self._matcher.deep_copy(), self._num_words)


class GrammarWalk:
    """Where one text stands in a grammar."""

    def __init__(self, matcher: Any, num_words: int) -> None:  # noqa: ANN401  llguidance's class, which may be missing
        """Walk with a matcher of one's own."""
        self._matcher = matcher
        self._num_words = num_words

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here."""
        return bool(self._matcher.is_accepting())

    @property
    def is_finished(self) -> bool:
        """Whether the text has to end here."""
        is_stopped = bool(self._matcher.is_stopped())
        self._check()
        return is_stopped

    def allowed(self) -> Words:
        """Return [ceil(V / 32)] bits of the ids that may follow."""
        words = np.zeros(self._num_words, np.int32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check()
        return words

    def advance(self, token_id: int) -> None:
        """Take the next id."""
        self._matcher.consume_token(token_id)
        self._check()

    def rewind(self, count: int) -> None:
        """Take the latest ids back."""
        self._matcher.rollback(count)
        self._check()

    def _check(self) -> None:
        """Raise a ValueError when the matcher has given up, which it does for good: a grammar too hard for it."""
        if self._matcher.is_error():
            raise ValueError(f"the grammar cannot be followed any further: {self._matcher.get_error().strip()}")


def _vocabulary(tokenizer: Tokenizer) -> Any:  # noqa: ANN401  llguidance's class, which may be missing
    """Return llguidance's view of a vocabulary, made once."""
    if tokenizer not in _VOCABULARIES:
        ends = sorted(tokenizer.eos_ids) or None
        try:
            made = _library().LLTokenizer(tokenizer.serialized(), n_vocab=tokenizer.vocab_size, eos_token=ends)
        except ValueError as problem:
            raise UnsupportedError(
                f"llguidance cannot read this tokenizer ({problem}); byte-level and SentencePiece vocabularies work"
            ) from problem
        _VOCABULARIES[tokenizer] = made
    return _VOCABULARIES[tokenizer]


def _library() -> Any:  # noqa: ANN401  a module that may be missing
    """Return llguidance.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        return importlib.import_module("llguidance")
    except ModuleNotFoundError as problem:
        raise UnsupportedError(
            "constraints by schema, regex or grammar need the package llguidance: pip install 'qinfer[constrain]'"
        ) from problem
