"""How the answers of a chat appear: as plain text, or as Markdown on a terminal.

Markdown is printed block by block, each once it is finished and for good; of the block that is still arriving the last
lines are shown as they come. So the text scrolls like any other, and nothing is drawn twice.
"""

from __future__ import annotations

import sys
from typing import Protocol

from markdown_it import MarkdownIt
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

# What a model writes must not move the cursor or speak to the terminal: control characters are shown as pictures.
_PICTURES: dict[int, int | None] = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD), ord("\r"): None}
_FENCES = ("```", "~~~")
_REDRAWS_PER_SECOND = 10


class Display(Protocol):
    """Where answers and remarks go."""

    def begin(self) -> None:
        """Get ready for an answer."""
        ...

    def show(self, text: str) -> None:
        """Show the next piece of an answer."""
        ...

    def end(self) -> None:
        """Finish an answer."""
        ...

    def note(self, text: str) -> None:
        """Say something that no model has said."""
        ...


class PlainDisplay:
    """Text to standard output as it comes, remarks to standard error."""

    def begin(self) -> None:
        """Nothing to get ready."""

    def show(self, text: str) -> None:
        """Print a piece."""
        print(text.translate(_PICTURES), end="", flush=True)

    def end(self) -> None:
        """End the line."""
        print(flush=True)

    def note(self, text: str) -> None:
        """Print a remark."""
        print(text, file=sys.stderr, flush=True)


class RichDisplay:
    """Markdown on a terminal."""

    def __init__(self, console: Console) -> None:
        """Print to a console."""
        self._console = console
        self._rest = ""
        self._live: Live | None = None

    def begin(self) -> None:
        """Start to redraw the unfinished block."""
        self._rest = ""
        self._live = Live(console=self._console, transient=True, refresh_per_second=_REDRAWS_PER_SECOND)
        self._live.start()

    def show(self, text: str) -> None:
        """Print the blocks that are finished now, and show the end of the one that is not."""
        finished, self._rest = split_blocks(self._rest + text.translate(_PICTURES))
        if finished.strip():
            self._console.print(_markdown(finished), end="\n\n")
        if self._live is not None:
            lines = self._rest.splitlines()[-max(1, self._console.height // 2) :]
            self._live.update(Text("\n".join(lines)))

    def end(self) -> None:
        """Print the last block."""
        if self._live is not None:
            self._live.update(Text(""))
            self._live.stop()
            self._live = None
        if self._rest.strip():
            self._console.print(_markdown(self._rest))
        self._rest = ""

    def note(self, text: str) -> None:
        """Print a remark in a quiet colour."""
        self._console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def display_for(*, plain: bool) -> Display:
    """Return Markdown for a terminal with colours, plain text otherwise, or where it is asked for."""
    console = Console()
    if plain or not console.is_terminal or console.is_dumb_terminal or console.no_color:
        return PlainDisplay()
    return RichDisplay(console)


def split_blocks(text: str) -> tuple[str, str]:
    """Cut a text behind its last finished block: before a line that follows an empty one and is not indented.

    Inside fenced code nothing is finished before the closing fence.
    """
    place = cut = 0
    is_code = was_empty = False
    for line in text.splitlines(keepends=True):
        if was_empty and not is_code and not line[0].isspace():
            cut = place
        place += len(line)
        if line.lstrip().startswith(_FENCES):
            is_code = not is_code
        was_empty = not line.strip()
    return text[:cut], text[cut:]


def _markdown(text: str) -> Markdown:
    """Read Markdown in which tags are text: an answer about HTML is not HTML."""
    markdown = Markdown(text.strip("\n"), hyperlinks=False)
    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    markdown.parsed = parser.parse(markdown.markup)
    return markdown
