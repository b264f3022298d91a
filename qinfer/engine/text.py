"""From token ids to text while they arrive: whole characters only, and nothing of a stop string.

A tokenizer can only decode a list of ids, and the text of an id depends on its neighbours: the bytes of a character may
be spread over several tokens, and some tokenizers drop a space at the start. So a short window of ids is decoded, and
what it adds to the text shown before is the new text. Characters U+FFFD at the end of the window may be the beginning
of a character that is still arriving; they are withheld. Where neither the last id nor the new one depends on its
neighbours, as most do not, nothing has to be decoded (`OwnTexts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Protocol

UNFINISHED = "\ufffd"

# Ids without a settled end of a character after which the window looks for a cut inside: a character has 4 bytes at
# most, so a longer run means bytes that are not text.
_LONG_RUN = 12


class Decodes(Protocol):
    """The part of a tokenizer that turns ids into text."""

    @property
    def own_texts(self) -> Mapping[int, tuple[str, str] | None]:
        """What each id adds behind another one that is here, and its text alone; None where neighbours matter."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, without special tokens."""
        ...


class Detokenizer:
    """Gives each piece of text once it is final; the pieces and `flush` join to the decoding of all ids."""

    def __init__(self, tokenizer: Decodes, prompt_tail: Sequence[int] = (), healed: Sequence[int] = ()) -> None:
        """Continue after the last ids of a prompt; a handful is enough, they tell whether a leading space belongs.

        A character that the prompt leaves unfinished belongs to the generated text. The text of `healed`, ids that
        were cut off the prompt, comes again with the generated ids and is not new.
        """
        self._decode = tokenizer.decode
        self._own_texts = tokenizer.own_texts
        self._window = list(prompt_tail)
        self._text = self._decode(self._window) if self._window else ""
        # Ids of the window whose text is out completely: they stay as context until the next ones are.
        self._num_settled = len(self._window)
        shown = self._decode([*self._window, *healed]) if healed else self._text
        self._num_shown = len(shown.rstrip(UNFINISHED))
        # The only id of the window where its text is out and is its own, as it mostly is; the window is laid out from
        # it when another id comes.
        self._single: int | None = None

    def copy(self) -> Detokenizer:
        """Return a twin that goes on by itself."""
        twin = copy(self)
        twin._window = list(self._window)
        return twin

    def push(self, token_id: int) -> str:
        """Take the next id and return the text that became final, often one word, sometimes nothing."""
        if self._single is not None:
            own = self._own_texts[token_id]
            if own is not None:
                self._single = token_id
                return own[0]
            self._lay_out()
        self._window.append(token_id)
        text = self._decode(self._window)
        if text and text == self._text and not self._decode([token_id]):
            # An id without text, such as a special token, would only make the window longer.
            self._window.pop()
            return ""
        self._text = text
        settled = text.rstrip(UNFINISHED)
        if len(settled) < len(text):
            return self._cut_run(text) if len(self._window) - self._num_settled > _LONG_RUN else self._show(settled)
        new = self._show(text)
        if new:
            self._window = self._window[self._num_settled :]
            self._num_settled = len(self._window)
            self._text = self._decode(self._window)
            self._num_shown = len(self._text)
            if self._text and self._num_settled == 1 and self._own_texts[token_id] is not None:
                self._single = token_id
        return new

    def flush(self) -> str:
        """Return what was withheld, U+FFFD for bytes that never became a character."""
        return "" if self._single is not None else self._show(self._text)

    def _lay_out(self) -> None:
        """Have the single id as a window."""
        if self._single is not None:
            self._window, self._num_settled = [self._single], 1
            self._text = self._decode(self._window)
            self._num_shown, self._single = len(self._text), None

    def _show(self, text: str) -> str:
        """Return the part of the window's text that is new."""
        new = text[self._num_shown :]
        self._num_shown += len(new)
        return new

    def _cut_run(self, text: str) -> str:
        """Settle the ids before a place where the window can be cut without changing its text.

        If the two sides decode to the same text alone as together, then no character reaches over the cut: its bytes
        would give more U+FFFD apart than together.
        """
        for cut in range(len(self._window) - 1, 0, -1):
            left, right = self._decode(self._window[:cut]), self._decode(self._window[cut:])
            if left + right == text:
                new = self._show(left)
                self._window, self._text = self._window[cut:], right
                self._num_settled = self._num_shown = 0
                return new
        return ""


class StopMatcher:
    """Passes text on except what may still become a stop string, and cuts before the first that is complete."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Look for these strings; the one that is complete first wins, the longest of several that end together."""
        self._stops = tuple(stops)
        self._firsts = frozenset(stop[0] for stop in stops)
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """Take more text and return what can no longer belong to a stop string."""
        if self.matched:
            return ""
        if not self._held and self._firsts.isdisjoint(text):
            # As almost always: no stop string begins here.
            return text
        self._held += text
        found = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            self.matched = True
            _, length = min(found)
        else:
            length = len(self._held) - max((overlap(self._held, stop) for stop in self._stops), default=0)
        passed, self._held = self._held[:length], self._held[length:]
        return passed

    def flush(self) -> str:
        """Return what was withheld, or nothing when a stop string was found."""
        rest, self._held = self._held, ""
        return "" if self.matched else rest


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if stop.startswith(text[-length:])), 0)
