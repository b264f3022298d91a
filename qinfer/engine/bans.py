"""Strings that a text never contains: tokens are held back while they may become one, and taken back when they do.

A token is told once its text, and all text before it, can no longer belong to a banned string. When a banned string is
complete, the sequence goes back to the token with its first character, which is not tried again at that place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qinfer.engine.text import Detokenizer, overlap


@dataclass(frozen=True)
class _Held:
    """A token that may have to be taken back: its text, and the detokenizer as it was before."""

    text: str
    before: Detokenizer


def _no_text(token_id: int) -> str:
    """Return the text of a token where there is no tokenizer."""
    return ""


class TokenTexts:
    """The texts of a request's tokens, in order; no text at all without a detokenizer."""

    def __init__(self, detokenizer: Detokenizer | None, banned: Sequence[str]) -> None:
        """Hold tokens back for the sake of these strings; without any, each is free at once."""
        self._detokenizer = detokenizer
        self._banned = tuple(banned)
        self._held: list[_Held] = []
        self._free: list[str] = []  # without banned strings
        # Takes the next token, where there are no banned strings, and returns the text that became final with it.
        self.text_of: Callable[[int], str] = _no_text if detokenizer is None else detokenizer.push

    def push(self, token_id: int) -> int:
        """Take the next token and return how many of the latest have to be taken back, usually none."""
        if self._detokenizer is None or not self._banned:
            self._free.append(self.text_of(token_id))
            return 0
        before = self._detokenizer.copy()
        self._held.append(_Held(self._detokenizer.push(token_id), before))
        text = self._text()
        found = [start for banned in self._banned if (start := text.find(banned)) >= 0]
        if not found:
            return 0
        first, end = -1, 0
        while end <= min(found):
            first += 1
            end += len(self._held[first].text)
        count = len(self._held) - first
        self._detokenizer = self._held[first].before
        del self._held[first:]
        return count

    def free(self) -> list[str]:
        """Return the texts of the tokens that nothing can take back any more."""
        if not self._held:
            texts, self._free = self._free, []
            return texts
        text = self._text()
        safe = len(text) - max((overlap(text, banned) for banned in self._banned), default=0)
        count = end = 0
        for held in self._held:
            end += len(held.text)
            count += end <= safe
        return self._take(count)

    def flush(self) -> list[str]:
        """Return the texts of all tokens that are held; what the detokenizer withholds is in none of them."""
        return self._take(len(self._held)) if self._held else self.free()

    def rest(self) -> str:
        """Return what the detokenizer withheld, when no token follows."""
        return "" if self._detokenizer is None else self._detokenizer.flush()

    def _text(self) -> str:
        """Return the text of the tokens that are held."""
        return "".join(held.text for held in self._held)

    def _take(self, count: int) -> list[str]:
        """Let go of the first tokens."""
        texts = [held.text for held in self._held[:count]]
        del self._held[:count]
        return texts
