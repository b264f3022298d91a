"""What callers ask, checked against the model and the page pool, as sequences with all that goes along with them.

A sequence may have companions: a shadow on a negative prompt, a drafter, an adapter, a walk through a constraint, the
mask of a healed token. They are attached here, and nowhere else.
"""

from __future__ import annotations

from collections import abc
from itertools import count
from typing import TypeAlias

import torch
from torch import Tensor

from qinfer.engine.draft import NgramDraft
from qinfer.engine.draft_model import DraftModel, Reservation
from qinfer.engine.guidance import shadow_of
from qinfer.engine.pages import PageTable
from qinfer.engine.sampling import SamplerState, SamplingParams
from qinfer.engine.sequence import Sequence
from qinfer.engine.steering import Steering
from qinfer.engine.turns import Turns
from qinfer.engine.window import Window
from qinfer.models.lora import Lora
from qinfer.models.model import Model

Prompt: TypeAlias = str | abc.Sequence[int]


class Intake:
    """Makes the sequences of one generator."""

    def __init__(
        self, model: Model, *, draft: int | DraftModel, pages: PageTable, window: Window, turns: Turns
    ) -> None:
        """Check requests against these.

        Args:
            model: What runs them.
            draft: Who guesses tokens for them, as `Generator` takes it.
            pages: The pool that has to hold them.
            window: How far back any layer looks.
            turns: What other ranks can be told.
        """
        self._model = model
        self._draft = draft
        self._pages = pages
        self._window = window
        self._turns = turns
        self._ids = count()

    def sequence(
        self, prompt: Prompt, params: SamplingParams | None, lora: Lora | None, *, number: int | None = None
    ) -> Sequence:
        """Check a request against the model and the pool, and return the sequence that will run it.

        Args:
            prompt: Text, or token ids.
            params: How to sample; None means `SamplingParams()`.
            lora: The adapter to run with.
            number: The id of the request; None takes the next one.
        """
        params = SamplingParams() if params is None else params
        _check_kinds(prompt, params)
        if lora is not None:
            self._model.check_lora(lora)
        params.check_vocabulary(self._model.config.vocab_size)
        ids = tuple(self._model.check_token_ids(self.encode(prompt)))
        for name in ("stop", "banned_strings", "token_healing"):
            if getattr(params, name) and self._model.tokenizer is None:
                raise ValueError(
                    f"{name}={getattr(params, name)!r} needs a tokenizer and the model has none; "
                    "stop_ids, banned_ids and allowed_ids work without"
                )
        negative = None
        if params.is_guided and params.negative_prompt is not None:
            negative = self._model.check_token_ids(self.encode(params.negative_prompt))
            self._check_length("negative_prompt", len(negative), params)
        self._check_length("prompt", len(ids), params)
        ends = frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else self._model.eos_ids)
        healed, healing = self._healing(ids) if params.token_healing else ((), None)
        ids = ids[: len(ids) - len(healed)]
        number = next(self._ids) if number is None else number
        sequence = Sequence(number, ids, params, SamplerState(params, ids), ends, healed, healing, lora=lora)
        if params.constraint is not None:
            self._turns.check(params.constraint, self._model.tokenizer)
            sequence.steering = Steering(params.constraint, ends, self._model.config.vocab_size)
        if negative is not None:
            sequence.shadow = shadow_of(sequence, negative)
        # Mirostat has to see each id before it can judge the next; a guess would be computed for two texts.
        elif self._draft and not (params.mirostat_tau and params.temperature):
            sequence.drafter = NgramDraft(self._draft) if isinstance(self._draft, int) else Reservation(self._draft)
        return sequence

    def _check_length(self, name: str, length: int, params: SamplingParams) -> None:
        """Raise a ValueError if a prompt and what may follow it is too long."""
        total = length + params.max_new_tokens
        asked = f"{length} {name} tokens + max_new_tokens={params.max_new_tokens} are {total} tokens"
        limit = self._model.config.max_positions
        if total > limit:
            raise ValueError(f"{asked}, the model has {limit} positions; shorten the prompt or lower max_new_tokens")
        room = self._pages.num_pages * self._pages.page_size
        if self._window.most_pages(total) > self._pages.num_pages:
            raise ValueError(f"{asked}, the page pool holds {room}; raise Generator(max_tokens=...)")

    def _healing(self, prompt: tuple[int, ...]) -> tuple[tuple[int, ...], Tensor | None]:
        """Return the id to cut off a prompt, and which ids may come in its place; nothing where only one could."""
        assert self._model.tokenizer is not None
        allowed = self._model.tokenizer.continuations(prompt[-1])
        if len(prompt) == 1 or len(allowed) == 1:
            return (), None
        mask = torch.zeros(self._model.config.vocab_size, dtype=torch.bool)
        mask[allowed] = True
        return prompt[-1:], mask.to(self._model.device)

    def encode(self, prompt: Prompt) -> abc.Sequence[int]:
        """Return the ids of a prompt."""
        if not isinstance(prompt, str):
            return prompt
        if self._model.tokenizer is None:
            raise ValueError("the model has no tokenizer: the prompt must be a list of token ids, got a string")
        return self._model.tokenizer.encode(prompt)


def _check_kinds(prompt: object, params: object) -> None:
    """Raise a TypeError where an argument is of a kind that no request has."""
    if isinstance(prompt, (bytes, bytearray)):
        raise TypeError("a prompt must be text or token ids, got bytes; decode them first")
    if not isinstance(params, SamplingParams):
        raise TypeError(f"params must be SamplingParams or None, got {type(params).__name__}")
