from typing import Any

import pytest
import torch

from qinfer.bench import drafts
from qinfer.errors import NonFiniteLogits
from qinfer.models.batch import Batch
from tests.engine.mock import VOCAB, MockModel


class Undecided(MockModel):
    """Any id is as likely as any other."""

    def decoder(self, batch: Batch, cache: Any) -> torch.Tensor:
        return torch.zeros(batch.logit_rows.shape[0], VOCAB)


def test_copies_are_drafted_up_to_the_edits() -> None:
    sizes = {"draft_tokens": 4, "prompt_tokens": 60, "batch": 2, "rounds": 1}
    whole = drafts.measure(Undecided(), **sizes, edit_every=0)
    assert whole["acceptance"] == 1.0
    assert whole["accepted_tokens"] > 2 * 40
    edited = drafts.measure(Undecided(), **sizes, edit_every=15)
    assert edited["drafted_tokens"] > edited["accepted_tokens"] > 2 * 20
    assert min(edited["plain_tokens_per_second"], edited["drafted_tokens_per_second"], edited["speed_up"]) > 0


def test_a_copy_that_is_not_the_dictated_one_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts.DictationWalk, "allowed", lambda walk: walk._words[0])
    monkeypatch.setattr(drafts.DictationWalk, "is_finished", property(lambda walk: walk._num_taken == 9))
    with pytest.raises(RuntimeError, match="dictated"):
        drafts.measure(Undecided(), draft_tokens=4, prompt_tokens=9, edit_every=0, batch=1, rounds=1)


def test_a_request_that_fails_has_no_figure() -> None:
    model = Undecided()
    model.decoder = lambda batch, cache: torch.full((batch.logit_rows.shape[0], VOCAB), torch.nan)
    with pytest.raises(NonFiniteLogits):
        drafts.measure(model, draft_tokens=4, prompt_tokens=9, edit_every=0, batch=1, rounds=1)
