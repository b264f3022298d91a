"""Logprobs of prompts: what the model thought of each token of a prompt, computed along with the prompt.

The logits behind prompt token t tell about token t + 1, so a piece of a prompt that is scored wants the logits of all
of its tokens. They are large, V numbers for each, so such a piece has few tokens, and only what was asked for goes to
the host, with the sampled ids of the step. Pages that are in the pool already would skip the computation, so a sequence
takes none of them beyond the tokens that it has scored.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from qinfer.engine.sampling import Logprobs, logprobs
from qinfer.engine.sequence import Sequence, TokenLogprobs
from qinfer.models.batch import Piece

# Rows of logits that become fp64 at a time.
_ROWS = 32


@dataclass(frozen=True)
class Scores:
    """Logprobs of some prompt tokens of a sequence, which the device has or will have."""

    sequence: Sequence
    told: Logprobs

    def to_host(self) -> Scores:
        """Return them on their way to page-locked memory."""
        return Scores(self.sequence, Logprobs(*map(copying, self.told)))

    def tell(self) -> None:
        """Hand them to their sequence, once they are on the host."""
        for chosen, ids, top in zip(*(part.tolist() for part in self.told), strict=True):
            self.sequence.prompt_logprobs.append(TokenLogprobs(chosen, tuple(zip(ids, top, strict=True))))


def copying(tensor: Tensor) -> Tensor:
    """Return page-locked memory to which a tensor is on its way."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def take_scores(step: Many[tuple[Sequence, int]], pieces: Many[Piece], logits: Tensor) -> tuple[Tensor, list[Scores]]:
    """Score what the step computes of prompts, and return the logits from which tokens are sampled.

    Args:
        step: Sequences with their number of tokens, not counted as computed yet.
        pieces: What the step computes of each; "all" logits of those that are scored.
        logits: [R, V] of all pieces.

    Returns:
        [n, V] logits of the sequences that get a token, and scores that are on the device.
    """
    kept: list[int] = []
    scores: list[Scores] = []
    first = 0
    for (sequence, count), piece in zip(step, pieces, strict=True):
        num_rows = {"all": len(piece.token_ids), "last": 1, "none": 0}[piece.wants_logits]
        places = sequence.unscored(count)
        if places:
            start = first + places.start - piece.start
            scores.append(_score(sequence, places, logits[start : start + len(places)]))
            sequence.num_scored = places.stop
        if not places:
            kept += range(first, first + num_rows)
        elif count >= sequence.num_pending:
            kept.append(first + num_rows - 1)
        first += num_rows
    return logits[torch.tensor(kept, dtype=torch.int64).to(logits.device, non_blocking=True)], scores


def _score(sequence: Sequence, places: range, logits: Tensor) -> Scores:
    """Return the logprobs of the tokens that follow these places."""
    ids = torch.tensor(sequence.prompt[places.start + 1 : places.stop + 1]).to(logits.device, non_blocking=True)
    top_n = sequence.params.prompt_logprobs or 0
    slices = [slice(start, start + _ROWS) for start in range(0, len(ids), _ROWS)]
    parts = [logprobs(logits[rows], ids[rows], top_n) for rows in slices]
    return Scores(sequence, Logprobs(*(torch.cat(column) for column in zip(*parts, strict=True))))
