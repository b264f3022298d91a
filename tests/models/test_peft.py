"""Adapter folders that cannot be served are refused by name, before anything of the model changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qinfer.errors import CheckpointError, UnsupportedError
from qinfer.models.model import Model
from tests.models import adapters, tiny

Q = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peft")
    tiny.save(path / "model", "llama")
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return Model.load(folder / "model", device="cpu")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"use_dora": True}, "use_dora=True is not supported: DoRA"),
        (
            {"modules_to_save": ["lm_head"]},
            "modules_to_save=.* is not supported: it replaces whole modules",
        ),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported.*'none' is"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True is not supported: its matrices are stored transposed"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' is not supported.*path_initial_model_for_weight"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; 'LORA' is"),
        ({"use_qalora": True}, "the option use_qalora=True is not known here"),
        ({"rank_pattern": {"(q|k)_proj": 4}}, "rank_pattern: '.q.k._proj' is not supported"),
    ],
)
def test_options_that_change_the_result(
    model: Model, folder: Path, tmp_path: Path, config: dict[str, Any], text: str
) -> None:
    adapters.save(tmp_path / "lora", folder / "model", **config)
    with pytest.raises(UnsupportedError, match=text):
        model.load_lora(tmp_path / "lora")
    assert model.loras == ()


def put(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.ones(*shape)})


@pytest.mark.parametrize(
    ("change", "named", "text"),
    [
        (put(f"{Q}.lora_A.weight", 5, 64), f"{Q}.lora_A.weight", r"must be \[4, 64\], got \[5, 64\]"),
        (put(f"{Q}.lora_B.weight", 32, 4), f"{Q}.lora_B.weight", r"must be \[64, 4\], got \[32, 4\]"),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), f"{Q}.lora_A.weight", "has no lora_B"),
        (lambda t: t.pop(f"{Q}.lora_A.weight"), f"{Q}.lora_B.weight", "has no lora_A"),
        (lambda t: t[f"{Q}.lora_A.weight"].fill_(float("nan")), f"{Q}.lora_A.weight", "NaN"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 64).int()}), f"{Q}.lora_A.weight", "got torch.int32"),
        (
            put("base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight", 4, 64),
            "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight",
            "no module model.layers.2.self_attn.q_proj that an adapter may change",
        ),
        (put("base_model.model.lm_head.lora_A.weight", 4, 64), "base_model.model.lm_head.lora_A.weight", "lm_head"),
        (put(f"{Q}.lora_magnitude_vector", 64), f"{Q}.lora_magnitude_vector", "nothing else is read"),
        (lambda t: t.clear(), None, "holds no adapter"),
    ],
)
def test_tensors_that_do_not_fit(
    model: Model, folder: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], named: str, text: str
) -> None:
    adapters.save(tmp_path / "lora", folder / "model", targets=("q_proj",))
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=text) as caught:
        model.load_lora(tmp_path / "lora")
    assert caught.value.tensor == named


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"r": 0}, "rank r of model.layers.0.self_attn.q_proj must be 1 to 512, got 0"),
        ({"lora_alpha": "16"}, "lora_alpha of .* must be a number, got '16'"),
        ({"rank_pattern": [4]}, r"rank_pattern must be an object, got \[4\]"),
    ],
)
def test_numbers_that_do_not_fit(model: Model, folder: Path, tmp_path: Path, config: dict[str, Any], text: str) -> None:
    adapters.save(tmp_path / "lora", folder / "model", targets=("q_proj",))
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    with pytest.raises(CheckpointError, match=text):
        model.load_lora(tmp_path / "lora")


def test_embeddings_and_missing_or_damaged_files(model: Model, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: is missing"):
        model.load_lora(tmp_path)
    adapters.save(tmp_path / "lora", folder / "model", targets=("q_proj",))
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 199)}, file)
    with pytest.raises(UnsupportedError, match="adapters of embeddings are not supported"):
        model.load_lora(tmp_path / "lora")
    file.write_bytes(b"no header")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        model.load_lora(tmp_path / "lora")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: is missing"):
        model.load_lora(tmp_path / "lora")
