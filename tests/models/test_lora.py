"""Adapters beside a model in every weight format against the dense model that they are merged into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qinfer.models.batch import Batch, Piece
from qinfer.models.model import Model
from tests.compare import assert_close, errors
from tests.models import adapters, test_exl2_files, test_parity, tiny
from tests.parallel import test_shards

IDS = tiny.prompt(19)


def dense(path: Path) -> Path:
    tiny.save(path / "dense", "llama")
    return path / "dense"


def gptq(path: Path, order: Any) -> Path:
    tiny.quantize(dense(path), path / "gptq", path / "twin", order=order, group_size=32, symmetric=False)
    return path / "gptq"


def exl2(path: Path) -> Path:
    test_exl2_files.convert(dense(path), path / "exl2", path / "twin")
    return path / "exl2"


FORMATS = {
    "dense": dense,
    "awq": lambda path: test_shards.write(path, "awq"),
    "gptq-shared-order": lambda path: gptq(path, test_parity.shuffled),
    "gptq-different-orders": lambda path: gptq(path, test_parity.all_different),
    "exl2": exl2,
}


@pytest.mark.parametrize("kind", FORMATS)
def test_logits_are_those_of_the_merged_model(tmp_path: Path, kind: str) -> None:
    folder = FORMATS[kind](tmp_path)
    deltas = adapters.save(tmp_path / "lora", folder, rank=4)
    model = Model.load(folder, device="cpu", dtype="fp32")
    before = model.logits(IDS)
    lora = model.load_lora(tmp_path / "lora")
    merged = Model.load(adapters.merge(folder, deltas, tmp_path / "merged"), device="cpu", dtype="fp32").logits(IDS)
    # A dequantized EXL2 matrix holds fp16 products of code and scale, the operand exact ones.
    assert_close(model.logits(IDS, lora=lora), merged, torch.float16 if kind == "exl2" else torch.float32)
    # What the adapter adds must show, and nothing of it without it.
    assert errors(before, merged)[1] > 0.1
    assert torch.equal(model.logits(IDS), before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense(tmp_path_factory.mktemp("lora"))


def expected(folder: Path, deltas: dict[str, torch.Tensor], path: Path) -> torch.Tensor:
    return Model.load(adapters.merge(folder, deltas, path), device="cpu").logits(IDS)


OPTIONS = {
    "rslora": {"rank": 3, "use_rslora": True, "lora_alpha": 2.5},
    "patterns": {"rank_pattern": {"q_proj": 18, "down_proj": 1}, "alpha_pattern": {"v_proj": 1, "down_proj": 2}},
    "some-members": {"targets": ("k_proj", "up_proj")},
    "training": {"init_lora_weights": "gaussian", "lora_dropout": 0.1, "unheard_of": None},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    deltas = adapters.save(tmp_path / "lora", llama, **options)
    model = Model.load(llama, device="cpu")
    lora = model.load_lora(tmp_path / "lora")
    assert_close(model.logits(IDS, lora=lora), expected(llama, deltas, tmp_path / "merged"))


def test_adapters_come_and_go(llama: Path, tmp_path: Path) -> None:
    options = {"a": {"rank": 4}, "b": {"rank": 20, "targets": ("v_proj", "o_proj")}, "c": {"targets": ("q_proj",)}}
    merged = {}
    for seed, (name, choice) in enumerate(options.items()):
        deltas = adapters.save(tmp_path / name, llama, seed=seed, **choice)
        merged[name] = expected(llama, deltas, tmp_path / f"merged {name}")
    model = Model.load(llama, device="cpu")
    plain, first = model.logits(IDS), model.decoder
    a = model.load_lora(tmp_path / "a")
    b = model.load_lora(tmp_path / "b", name="second")
    assert (a.name, b.name, a.slot, b.slot, a.num_modules, b.rank) == ("a", "second", 0, 1, 14, 20)
    assert model.loras == (a, b)
    # What stood in the smaller buffers stands in the larger ones.
    assert_close(model.logits(IDS, lora=a), merged["a"])
    assert_close(model.logits(IDS, lora=b), merged["b"])
    model.unload_lora(a)
    decoder = model.decoder
    assert decoder is not first
    c = model.load_lora(tmp_path / "c")
    # It took the free slot, in place, and nothing of the adapter before is left there.
    assert (c.slot, model.decoder is decoder) == (0, True)
    assert c.id not in (a.id, b.id)
    assert_close(model.logits(IDS, lora=c), merged["c"])
    assert_close(model.logits(IDS, lora=b), merged["b"])
    assert torch.equal(model.logits(IDS), plain)
    for wrong, text in (
        (a, "'a' was unloaded"),
        (Model.load(llama, device="cpu").load_lora(tmp_path / "b"), "another"),
    ):
        with pytest.raises(ValueError, match=text):
            model.logits(IDS, lora=wrong)
        with pytest.raises(ValueError, match=text):
            model.unload_lora(wrong)
    folder: Any = "folder"
    for use in (lambda: model.logits(IDS, lora=folder), lambda: model.unload_lora(folder)):
        with pytest.raises(TypeError, match=r"lora must be what Model.load_lora returned, got str"):
            use()


def test_rows_of_one_step_have_adapters_of_their_own(llama: Path, tmp_path: Path) -> None:
    model = Model.load(llama, device="cpu")
    loras = [None]
    for seed in (1, 2):
        adapters.save(tmp_path / str(seed), llama, seed=seed)
        loras.append(model.load_lora(tmp_path / str(seed)))
    chosen = [loras[i] for i in (1, 0, 2, 1)]
    pieces = [
        Piece(IDS[: 5 + row], 0, [row], "last", -1 if lora is None else lora.slot) for row, lora in enumerate(chosen)
    ]
    batch = Batch.build(pieces, page_size=16, device="cpu")
    together = model.decoder(batch, model.new_cache(4, page_size=16))
    for row, lora in enumerate(chosen):
        mine, other = (model.logits(IDS[: 5 + row], lora=one)[-1] for one in (lora, loras[0 if lora else 1]))
        assert_close(together[row], mine)
        assert errors(other, mine)[1] > 0.1
