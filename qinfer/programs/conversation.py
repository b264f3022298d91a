"""The messages of a chat: what was said, how to take it back, and the JSON file that keeps it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

Message = dict[str, str]


class Conversation:
    """Messages with roles, a system prompt first if there is one."""

    def __init__(self, system: str = "") -> None:
        """Begin with nothing but a system prompt; without text there is none."""
        self.messages: list[Message] = []
        self.set_system(system)

    @property
    def num_turns(self) -> int:
        """Answers so far."""
        return sum(message["role"] == "assistant" for message in self.messages)

    def set_system(self, text: str) -> None:
        """Set the system prompt, or take it away; what was said stays."""
        if self.messages and self.messages[0]["role"] == "system":
            del self.messages[0]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def asking(self, question: str) -> list[Message]:
        """Return the messages with one more of the user, which is not kept yet."""
        return [*self.messages, {"role": "user", "content": question}]

    def keep(self, question: str, answer: str) -> None:
        """Add a question and its answer."""
        self.messages = [*self.asking(question), {"role": "assistant", "content": answer}]

    def undo(self) -> str | None:
        """Take the last question back with all that followed, and return it; None where there is none."""
        for place in reversed(range(len(self.messages))):
            if self.messages[place]["role"] == "user":
                question = self.messages[place]["content"]
                del self.messages[place:]
                return question
        return None

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    def save(self, file: Path) -> None:
        """Write the messages as JSON; a file of this name is replaced, and stays whole if that fails."""
        text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2)
        unfinished = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        try:
            unfinished.write_text(text + "\n", encoding="utf-8")
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)

    def load(self, file: Path) -> None:
        """Take the messages of a file that `save` wrote, or of any JSON with messages of text.

        Raises:
            ValueError: it holds something else; the messages are as before.
        """
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as problem:
            raise ValueError(f"{file} is not valid JSON: {problem}") from problem
        messages = content.get("messages") if isinstance(content, dict) else content
        if not isinstance(messages, Sequence) or not all(map(_is_message, messages)):
            raise ValueError(f"{file} must hold a list of messages, each with role and content as text")
        self.messages = [dict(message) for message in messages]


def _is_message(message: object) -> bool:
    """Say whether something read from a file is a message of text."""
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
