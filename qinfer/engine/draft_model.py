"""Drafts from a smaller model of the same vocabulary (speculative decoding).

The small model answers the same request with the same options and the same random numbers. What it would say next is
the draft; the large model then computes the whole draft in one step, and its ids are kept up to the first that differs,
as with any draft (draft.py). So greedy text is that of the large model alone, and a seed draws the ids that it draws
without a draft: nothing has to be corrected. Sharing the random number is what makes the two agree often where
temperature is above 0; a guess of the likeliest id would be right less often.

The small model has a cache of its own under the same page numbers: what stands in a page of the one stands in the same
page of the other. Whatever the large model computes without a draft, prompts above all, the small one computes too, and
of a draft it computes every id, so shared, freed and rewound pages need no second bookkeeping.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qinfer.engine.sampling import SamplerState, SamplingParams, sample
from qinfer.engine.sequence import Sequence
from qinfer.engine.steps import Step, StepRunner
from qinfer.errors import UnsupportedError
from qinfer.models.model import Model

_GREEDY = SamplingParams(temperature=0)
_NOBODY = -(1 << 62)  # id of a sequence that no request has


@dataclass(frozen=True)
class DraftModel:
    """A small model, and how many ids it drafts at a time."""

    model: Model
    num_tokens: int = 4

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens of a draft model must be at least 1, got {self.num_tokens}")

    @classmethod
    def load(cls, path: str | Path, target: Model, *, num_tokens: int = 4) -> DraftModel:
        """Load a checkpoint beside the model that it drafts for: on the same device, in the same dtype."""
        return cls(Model.load(path, device=target.device, dtype=target.dtype), num_tokens)

    def check(self, target: Model) -> None:
        """Raise unless this model can draft for `target`.

        Raises:
            ValueError: they have different vocabularies or devices.
            UnsupportedError: one of them is divided among processes.
        """
        if target.comm.size > 1 or self.model.comm.size > 1:
            raise UnsupportedError(
                "a draft model works where one process holds each model; drafts from the text (draft=8) work everywhere"
            )
        if self.model.device != target.device:
            raise ValueError(f"the draft model must be on {target.device} as its target is, got {self.model.device}")
        ours, theirs = self.model.tokenizer, target.tokenizer
        if ours is None or theirs is None:
            sizes = self.model.config.vocab_size, target.config.vocab_size
            if sizes[0] != sizes[1]:
                raise ValueError(f"a draft model must have its target's vocabulary of {sizes[1]} ids, got {sizes[0]}")
        # Models of one family pad the same vocabulary to different sizes.
        elif (token := ours.first_difference(theirs)) is not None:
            raise ValueError(
                f"a draft model must have its target's vocabulary; token {token!r} is not the same in both"
            )


def longest_window(target: Model, draft: int | DraftModel) -> int | None:
    """Return how many positions are looked at, by a model or by what drafts for it; None if that is all of them."""
    window = target.config.longest_window
    if window is None or isinstance(draft, int):
        return window
    seen = draft.model.config.longest_window
    return None if seen is None else max(window, seen)


class Reservation:
    """The drafts of one sequence as the scheduler sees them: how many there will be, the ids come later."""

    def __init__(self, draft: DraftModel) -> None:
        """Reserve as many ids as a draft model guesses at a time."""
        self.num_drafted = 0
        self.num_accepted = 0
        self.num_ids = 0
        self._most = draft.num_tokens
        self._max_positions = draft.model.config.max_positions
        self._vocab_size = draft.model.config.vocab_size

    def extend(self, ids: Ids[int]) -> None:
        """Count the next ids of the sequence; where the draft model has no such id, it drafts no more."""
        self.num_ids += len(ids)
        if any(token_id >= self._vocab_size for token_id in ids):
            self._most = 0

    def propose(self, limit: int) -> list[int]:
        """Return a placeholder for each id that is to be drafted."""
        return [0] * max(0, min(limit, self._most, self._max_positions - self.num_ids))

    def judge(self, num_drafted: int, num_accepted: int) -> None:
        """Count how many ids of the last draft were right."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted

    def rewind(self, num_ids: int) -> None:
        """Forget all ids after the first `num_ids`."""
        self.num_ids = min(self.num_ids, num_ids)


class DraftRunner:
    """Runs a draft model beside a generator."""

    def __init__(
        self, draft: DraftModel, target: Model, *, num_pages: int, kv_format: str, sizes: dict[str, int]
    ) -> None:
        """Allocate the pages of the draft model.

        Args:
            draft: the model.
            target: the one it drafts for.
            num_pages: as many as the target has.
            kv_format: how its keys and values are stored.
            sizes: of the target's `StepRunner`.
        """
        draft.check(target)
        self._config = draft.model.config
        self._vocab_size = target.config.vocab_size
        self.cache = draft.model.new_cache(num_pages, page_size=sizes["page_size"], kv_format=kv_format)
        self._runner = StepRunner(draft.model, self.cache, **sizes)

    def warm_up(self) -> None:
        """Compile and record what steps can ask for."""
        self._runner.warm_up()

    def fill(self, step: Step) -> Step:
        """Put ids in the place of the reserved ones, and compute what the target will compute without a draft.

        Args:
            step: sequences with their number of tokens, reserved drafts included.

        Returns:
            The step with as many drafts as could be guessed.
        """
        self._follow([(sequence, count) for sequence, count in step if not sequence.drafts])
        drafting = [sequence for sequence, _ in step if sequence.drafts]
        if not drafting:
            return step
        self._guess(drafting)
        return [(one, 1 + len(one.drafts) if one.num_pending == 1 else count) for one, count in step]

    def read(self, token_ids: Ids[int], pages: list[int], start: int, chunk: int) -> None:
        """Compute a text that stands in the target's pages already.

        Args:
            token_ids: of whole pages.
            pages: by their place in the text; where one is missing, nothing is computed, and drafts will be poor.
            start: tokens that this model has computed before.
            chunk: tokens in a step.
        """
        if -1 in pages:
            return
        reader = Sequence(_NOBODY, tuple(token_ids), _GREEDY, SamplerState(_GREEDY, ()), pages=pages)
        reader.num_computed = start
        while (count := self._readable(reader, min(chunk, reader.num_pending))) > 0:
            self._runner.launch([(reader, count)])

    def _follow(self, step: Step) -> None:
        """Compute the same tokens as the target, as far as this model has positions and ids for them."""
        counted = [(_seen(sequence), self._readable(sequence, count)) for sequence, count in step]
        if readable := [(one, count) for one, count in counted if count > 0]:
            self._runner.launch(readable)

    def _readable(self, sequence: Sequence, count: int) -> int:
        """Return how many of the next `count` tokens this model can compute."""
        count = min(count, self._config.max_positions - sequence.num_computed)
        if count > 0 and self._config.vocab_size < self._vocab_size:
            ids = sequence.pending(count)
            return next((place for place, token_id in enumerate(ids) if token_id >= self._config.vocab_size), count)
        return count

    def _guess(self, sequences: list[Sequence]) -> None:
        """Draft ids one by one: to this model they are generated, until they are taken back for the target to judge."""
        known = {sequence.id: len(sequence.generated) for sequence in sequences}
        wanted = {sequence.id: len(sequence.drafts) for sequence in sequences}
        active = [(sequence, _seen(sequence)) for sequence in sequences]
        for sequence in sequences:
            sequence.drafts = []
        try:
            # The last id is computed as well, so that its keys are there if the target agrees.
            for place in range(1 + max(wanted.values())):
                logits = self._runner.launch([(seen, 1) for _, seen in active]).logits
                rows = [row for row, (sequence, _) in enumerate(active) if wanted[sequence.id] > place]
                active = [active[row] for row in rows]
                if not active:
                    break
                ids = self._choose(logits, rows, [sequence for sequence, _ in active])
                for (sequence, _), token_id in zip(active, ids, strict=True):
                    if token_id >= 0:
                        sequence.generated.append(token_id)
                active = [pair for pair, token_id in zip(active, ids, strict=True) if token_id >= 0]
                if not active:
                    break
        finally:
            for sequence in sequences:
                drafts = sequence.generated[known[sequence.id] :]
                sequence.rewind(known[sequence.id])
                sequence.drafts = drafts

    def _choose(self, logits: Tensor, rows: list[int], sequences: list[Sequence]) -> list[int]:
        """Return the next id of each sequence, drawn from its row as the target will draw; -1 where none can be."""
        if len(rows) < len(logits):
            logits = logits[torch.tensor(rows, device=logits.device)]
        missing = self._vocab_size - logits.shape[1]
        if missing > 0:
            logits = torch.nn.functional.pad(logits, (0, missing), value=-math.inf)
        elif missing < 0:
            logits = logits[:, : self._vocab_size].contiguous()
        ids: list[int] = sample(logits, [row for sequence in sequences for row in sequence.rows()]).tolist()
        return ids


def _seen(sequence: Sequence) -> Sequence:
    """Return a sequence as the draft model sees it: the same ids and pages, with nothing that is the target's alone."""
    return Sequence(
        sequence.id,
        sequence.prompt,
        _GREEDY,
        sequence.sampler,
        generated=sequence.generated,
        pages=sequence.pages,
        allocation=sequence.allocation,
        num_computed=sequence.num_computed,
    )
