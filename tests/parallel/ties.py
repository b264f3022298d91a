"""Texts of two models that differ in their roundings: the same up to a place where rounding decides."""

from __future__ import annotations

from collections.abc import Sequence

from qinfer.engine.job import Completion
from qinfer.engine.sampling import SamplingParams
from qinfer.models.model import Model

TIE = 0.05  # between logits: what 16 bits make of a few dozen sums of numbers around ten
MASS = 0.01  # probability of the tokens between two, in the order of ids, in which the inverse of the CDF is taken


def assert_same_but_for_ties(
    model: Model,
    prompts: Sequence[str],
    params: SamplingParams,
    actual: Sequence[Completion],
    expected: Sequence[Completion],
) -> None:
    """Compare texts of the same prompts; where two part, ask what the model thinks of both tokens there.

    Args:
        model: whose logits decide.
        prompts: of the texts.
        params: greedy, or plain draws at a temperature.
        actual: a text per prompt.
        expected: the other text.
    """
    assert model.tokenizer is not None
    for prompt, one, other in zip(prompts, actual, expected, strict=True):
        pairs = enumerate(zip(one.token_ids, other.token_ids, strict=False))
        place = next((place for place, (mine, its) in pairs if mine != its), None)
        if place is None:
            assert one == other
            continue
        logits = model.logits([*model.tokenizer.encode(prompt), *other.token_ids[:place]])[-1].double()
        first, second = sorted((one.token_ids[place], other.token_ids[place]))
        where = f"{prompt!r}: texts part at token {place}, {one.token_ids[place]} and {other.token_ids[place]}"
        if params.temperature == 0:
            behind = (logits.max() - logits[[first, second]].min()).item()
            assert behind < TIE, f"{where}, of which one is {behind:.3f} behind the likeliest"
        else:
            between = (logits / params.temperature).softmax(0)[first + 1 : second].sum().item()
            assert between < MASS, f"{where}, between which lies {between:.3f} of the probability"
