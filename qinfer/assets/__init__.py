"""Files inside the package: the small story-telling model that makes the first command work."""

from __future__ import annotations

from pathlib import Path

STORYTELLER = Path(__file__).parent / "storyteller"
