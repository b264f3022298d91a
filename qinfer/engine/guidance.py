"""Classifier-free guidance: two texts that differ in their prompt alone, and one stream of tokens for both.

    logits = negative + scale * (positive - negative)

A guided request is a sequence with a `shadow`: another sequence, of the negative prompt, with pages of its own and the
same list of generated ids. The scheduler treats both as one; a token is sampled in steps that compute the newest token
of both. The formula is that of Sanchez et al. 2023, "Stay on topic with classifier-free guidance", equation 7, which
has log softmax in the place of logits. That differs by a constant for each row, so probabilities are the same; without
it, equal prompts give the logits of one of them bit by bit, which penalties need that look at the sign of a logit.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import replace

import torch
from torch import Tensor

from qinfer.engine.sampling import guide
from qinfer.engine.sequence import Sequence


def shadow_of(sequence: Sequence, negative: Many[int]) -> Sequence:
    """Return what goes along with a sequence on the negative prompt; it never samples and is never told about."""
    params = replace(sequence.params, prompt_logprobs=None)
    return Sequence(
        -1 - sequence.id,
        tuple(negative),
        params,
        sequence.sampler,
        lora=sequence.lora,
        generated=sequence.generated,
    )


def guided(sequences: Many[Sequence], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Join the logits of shadows with those of the sequences right before them.

    Args:
        sequences: Those of a step that get a token, with their shadows.
        logits: [R, V] theirs; a sequence with drafts has one row for each of them and one more.

    Returns:
        [n, V] what the model says to the sequences themselves, and [n, V] what their tokens are sampled from.
    """
    if all(sequence.shadow is None for sequence in sequences):
        return logits, logits
    own: list[int] = []
    pairs: list[tuple[int, int]] = []  # row of the result, row of the shadow
    scales: list[float] = []
    row = 0
    for sequence in sequences:
        if sequence.is_shadow:
            pairs.append((len(own) - 1, row))
            scales.append(sequence.params.guidance_scale)
        else:
            own += range(row, row + 1 + len(sequence.drafts))
        row += 1 + len(sequence.drafts)
    device = logits.device
    places, shadows = torch.tensor(pairs).to(device, non_blocking=True).unbind(1)
    said = logits[torch.tensor(own).to(device, non_blocking=True)]
    scale = torch.tensor(scales, dtype=torch.float32).to(device, non_blocking=True)[:, None]
    mixed = said.clone()
    mixed[places] = guide(said[places], logits[shadows], scale)
    return said, mixed
