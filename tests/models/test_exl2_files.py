"""Whole EXL2 checkpoints as the converter leaves them: padded head, stored although tied, repeated head norms."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qinfer.errors import CheckpointError
from qinfer.kernels.operand import SegmentedOperand
from qinfer.models.model import Model
from qinfer.quant import EXL2Weight
from tests.compare import assert_close
from tests.models import tiny

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
WIDTHS: dict[str, dict[int, float]] = {
    "q_proj": {4: 0.5, 3: 0.5},
    "k_proj": {4: 0.5, 3: 0.5},
    "v_proj": {6: 0.5, 4: 0.5},  # another layout in the order of q and k
    "o_proj": {5: 1.0},
    "gate_proj": {3: 0.5, 2: 0.5},
    "up_proj": {3: 0.5, 2: 0.5},
    "down_proj": {8: 0.25, 3: 0.25, 2: 0.5},
    "lm_head": {6: 1.0},
}
# Projections of one input share its permutation, as in the converter's files.
SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def convert(source: Path, path: Path, twin: Path) -> None:
    """Write an EXL2 version of a dense checkpoint without any index, and a dense checkpoint of exactly its values."""
    stored = load_file(source / "model.safetensors")
    stored.setdefault("lm_head.weight", stored["model.embed_tokens.weight"])
    packed: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        module = name.removesuffix(".weight")
        kind = module.split(".")[-1]
        if kind in WIDTHS:
            seed = sum(map(ord, module.replace(kind, SHARED.get(kind, kind))))
            order = torch.randperm(tensor.shape[1], generator=torch.Generator().manual_seed(seed))
            weight = EXL2Weight.quantize(tensor.float().t(), bits=WIDTHS[kind], permutation=order)
            packed |= {f"{module}.{suffix}": value for suffix, value in weight.tensors().items()}
            dense[name] = weight.dequantize().t()
        elif kind in ("q_norm", "k_norm"):
            packed[name], dense[name] = tensor.half().expand(4 if kind == "q_norm" else 2, -1), tensor.half()
        else:
            packed[name] = dense[name] = tensor.half() if tensor.is_floating_point() else tensor
    config = json.loads((source / "config.json").read_text())
    quantized = {**config, "quantization_config": {"quant_method": "exl2", "version": "0.3.2", "bits": 4.0}}
    for folder, tensors, settings in (
        (path, packed, quantized),
        (twin, dense, {**config, "tie_word_embeddings": False}),
    ):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(settings))
        file = "output.safetensors" if folder == path else "model.safetensors"
        save_file({name: x.contiguous() for name, x in tensors.items()}, folder / file)


def edit(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path / "output.safetensors").items()}
    change(tensors)
    save_file(tensors, path / "output.safetensors")


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("qwen3", {"head_dim": 32, "tie_word_embeddings": True}), ("llama", {}), ("qwen2", {})],
)
def test_logits_are_those_of_the_dequantized_twin(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    tiny.save(tmp_path / "dense", model_type, **changes)
    convert(tmp_path / "dense", tmp_path / "exl2", tmp_path / "twin")
    model, twin = (Model.load(tmp_path / name, device="cpu", dtype="fp32") for name in ("exl2", "twin"))
    block = model.decoder.blocks[0]
    assert len(block.attention.qkv.parts) == 3
    assert len(block.mlp.gate_up.parts) == 1
    assert isinstance(block.mlp.down.operand, SegmentedOperand)
    assert model.decoder.head.operand.out_features == tiny.VOCAB
    assert not model.decoder.is_tied
    assert model.decoder.embedding.table.dtype == torch.float16
    ids = tiny.prompt(12)
    # The twin holds fp16 products of code and scale, the operand exact ones.
    assert_close(model.logits(ids), twin.logits(ids), torch.float16)


def test_a_model_without_quantization_config(tmp_path: Path) -> None:
    tiny.save(tmp_path / "dense", "llama")
    convert(tmp_path / "dense", tmp_path / "exl2", tmp_path / "twin")
    expected = Model.load(tmp_path / "exl2", device="cpu").logits(tiny.prompt(4))
    tiny.edit_config(tmp_path / "exl2", quantization_config=None)
    assert torch.equal(Model.load(tmp_path / "exl2", device="cpu").logits(tiny.prompt(4)), expected)
    edit(tmp_path / "exl2", lambda tensors: tensors.update({f"{MLP}.up_proj.q_perm": torch.arange(64)}))
    assert torch.equal(Model.load(tmp_path / "exl2", device="cpu").logits(tiny.prompt(4)), expected)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    tiny.save(path / "dense", "qwen3", head_dim=32)
    convert(path / "dense", path / "exl2", path / "twin")
    return path / "exl2"


def change_one(name: str, index: tuple[int, ...], value: float) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors[name].__setitem__(index, value)


@pytest.mark.parametrize(
    ("change", "named", "text"),
    [
        (change_one(f"{ATTENTION}.q_norm.weight", (1, 3), 7.0), f"{ATTENTION}.q_norm.weight", "or copies of one"),
        (change_one(f"{ATTENTION}.k_norm.weight", (0, 0), float("nan")), f"{ATTENTION}.k_norm.weight", "NaN"),
        (lambda t: t.update({f"{MLP}.up_proj.q_extra": torch.ones(1)}), f"{MLP}.up_proj.q_extra", "nothing in this"),
        (lambda t: t.update({f"{MLP}.up_proj.weight": torch.ones(1)}), f"{MLP}.up_proj.weight", "nothing in this"),
        (
            lambda t: t.update(_narrow_head()),
            "lm_head.q_weight",
            "must map 64 features to 199, got 64 to 192",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    qwen3: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], named: str, text: str
) -> None:
    path = shutil.copytree(qwen3, tmp_path / "exl2")
    edit(path, change)
    with pytest.raises(CheckpointError, match=text) as caught:
        Model.load(path, device="cpu")
    assert caught.value.tensor == named


def _narrow_head() -> dict[str, Tensor]:
    weight = EXL2Weight.quantize(torch.ones(64, 192), bits=6)
    return {f"lm_head.{suffix}": tensor for suffix, tensor in weight.tensors().items()}
