"""The residual stream between blocks, against transformers' `output_hidden_states`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qinfer.models import model as model_module
from qinfer.models.model import Model
from tests.models import tiny


@pytest.mark.parametrize(("model_type", "changes"), [("llama", {}), ("qwen3", {"head_dim": 16})])
def test_states_are_those_of_transformers(
    tmp_path: Path, model_type: str, changes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = tiny.save(tmp_path, model_type, num_hidden_layers=3, **changes)
    ids = tiny.prompt(40)
    with torch.inference_mode():
        expected = oracle(torch.tensor([ids]), output_hidden_states=True).hidden_states
        normed = oracle.model.norm
    model = Model.load(tmp_path, device="cpu")
    monkeypatch.setattr(model_module, "CHUNK", 15)
    states = model.hidden_states(ids, range(4))
    assert list(states) == [0, 1, 2, 3]
    # Every block adds something that shows.
    assert all((states[i + 1] - states[i]).std() > 0.3 for i in range(3))
    for layer, state in states.items():
        assert (state.dtype, state.shape) == (torch.float32, (40, 64))
        said = normed(state) if layer == 3 else state
        assert (said - expected[layer][0]).abs().max() < 1e-4
    (only,) = model.hidden_states(torch.tensor(ids), [2, 2]).values()
    assert torch.equal(only, states[2])


def test_blocks_that_nobody_asked_for_do_not_run(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama")
    tiny.edit(tmp_path, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].mul_(1e9))
    model = Model.load(tmp_path, device="cpu")
    assert all(state.abs().max() < 1e4 for state in model.hidden_states([1, 2, 3], [0, 1]).values())
    assert model.hidden_states([1, 2, 3], [2])[2].abs().max() > 1e4


def test_refusals(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama")
    model = Model.load(tmp_path, device="cpu")
    for layers in ([], [3], [-1, 0]):
        with pytest.raises(ValueError, match="layers must be from 0 to 2, at least one"):
            model.hidden_states([1], layers)
    with pytest.raises(TypeError):
        model.hidden_states([1], [0.5])
    with pytest.raises(ValueError, match="token_ids must be at most 256"):
        model.hidden_states([1] * 257, [0])
