"""An adapter beside a divided model gives the logits that it gives beside the whole one."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from qinfer.models.batch import Batch, Piece
from qinfer.models.model import Model
from tests.compare import assert_close, errors
from tests.models import adapters
from tests.parallel.test_shards import CPU, IDS, ONE_SIDED, UNEQUAL, divide, load, write
from tests.parallel.threads import ThreadRank, on_ranks


def run(model: Model, slot: int) -> Tensor:
    """Logits of the prompt in one step."""
    batch = Batch.build([Piece(IDS, 0, [0, 1], "all", slot)], page_size=16, device=CPU)
    return model.decoder(batch, model.new_cache(2, page_size=16))


@pytest.mark.parametrize("counts", [UNEQUAL, ONE_SIDED], ids=["unequal", "one-sided"])
# The second cuts o and down along their outputs, and gathers their inputs.
@pytest.mark.parametrize("kind", ["gptq", "gptq act-order"])
def test_logits_are_those_of_one_rank(tmp_path: Path, kind: str, counts: tuple[tuple[int, int, int, int], ...]) -> None:
    folder = write(tmp_path, kind)
    adapters.save(tmp_path / "lora", folder)
    whole = Model.load(folder, device="cpu")
    expected = whole.logits(IDS, lora=whole.load_lora(tmp_path / "lora"))
    assert errors(whole.logits(IDS), expected)[1] > 0.1
    plan = divide(folder, *counts)

    def share(rank: ThreadRank) -> Tensor:
        model = load(folder, plan, rank)
        # As load_lora does, without telling anybody: every rank is called here.
        lora, model.decoder = model._loras.load(tmp_path / "lora", None, model.decoder)
        return run(model, lora.slot)

    for logits in on_ranks(len(counts), share):
        assert_close(logits, expected)
