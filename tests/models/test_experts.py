"""Mixtures of experts against transformers, and quantized ones against their dequantized twins."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qinfer.__main__ import main
from qinfer.bench.model import _untaken_bytes
from qinfer.bench.synthetic import synthetic_sizes
from qinfer.checkpoint import Checkpoint
from qinfer.engine.generator import Generator
from qinfer.engine.sampling import SamplingParams
from qinfer.errors import CheckpointError, UnsupportedError
from qinfer.kernels.device import implementation
from qinfer.models.architectures import read_config
from qinfer.models.config import ExpertConfig
from qinfer.models.experts import SparseMLP
from qinfer.models.layers import GatedMLP
from qinfer.models.model import Model
from qinfer.programs.doctor import examine
from tests.compare import assert_close, errors
from tests.models import tiny
from tests.models.tiny_experts import MIXTRAL, QUANTIZE, QWEN3, quantize

FAMILIES = [
    pytest.param("mixtral", MIXTRAL, id="mixtral"),
    pytest.param("mixtral", {**MIXTRAL, "sliding_window": 8}, id="mixtral-window"),
    pytest.param("qwen3_moe", QWEN3, id="qwen3"),
    pytest.param("qwen3_moe", {**QWEN3, "norm_topk_prob": False, "mlp_only_layers": [0]}, id="qwen3-some-dense"),
    pytest.param("qwen3_moe", {**QWEN3, "decoder_sparse_step": 2, "num_hidden_layers": 3}, id="qwen3-every-second"),
]


@pytest.mark.parametrize(("model_type", "changes"), FAMILIES)
def test_logits_and_greedy_text_are_those_of_transformers(
    tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    oracle = tiny.save(tmp_path, model_type, **changes)
    ids = tiny.prompt(40)
    model = Model.load(tmp_path, device="cpu")
    assert (model.logits(ids) - tiny.oracle_logits(oracle, ids)).abs().max() <= 1e-3
    greedy = ids[:7]
    for _ in range(6):
        greedy.append(int(tiny.oracle_logits(oracle, greedy)[-1].argmax()))
    params = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)
    done = Generator(model, kv_format="fp32", max_tokens=256, page_size=16, max_batch=2).generate(ids[:7], params)
    assert list(done.token_ids) == greedy[7:]


def test_normalization_matters(tmp_path: Path) -> None:
    """Parity would not notice a lost `norm_topk_prob` if the weights of the chosen summed to one anyway."""
    tiny.save(tmp_path, "qwen3_moe", **QWEN3)
    normalized = Model.load(tmp_path, device="cpu").logits(tiny.prompt(8))
    tiny.edit_config(tmp_path, norm_topk_prob=False)
    assert (Model.load(tmp_path, device="cpu").logits(tiny.prompt(8)) - normalized).abs().max() > 0.1


@pytest.mark.parametrize("kind", QUANTIZE)
def test_quantized_experts_are_their_dequantized_twins(tmp_path: Path, kind: str) -> None:
    is_mixtral = kind in ("gptq", "exl2")
    changes = {**(MIXTRAL if is_mixtral else QWEN3), "num_hidden_layers": 1}
    tiny.save(tmp_path / "source", "mixtral" if is_mixtral else "qwen3_moe", **changes)
    quantize(tmp_path / "source", tmp_path / "quantized", tmp_path / "twin", kind)
    model, twin = (Model.load(tmp_path / name, device="cpu") for name in ("quantized", "twin"))
    mlp = model.decoder.blocks[0].mlp
    assert isinstance(mlp, SparseMLP)
    assert mlp.gate_up is not None
    layouts = [len(piece.operands) for piece in mlp.gate_up.pieces]
    assert layouts == {"gptq some act-order": [1, 1], "exl2": [1, 1], "exl2 mixed": [2]}.get(kind, [1])
    ids = tiny.prompt(20)
    expected = twin.logits(ids)
    # EXL2's twin holds fp16 products of code and scale, the operand exact ones.
    assert_close(model.logits(ids), expected, torch.float16 if "exl2" in kind else None)
    # Rounding must show, or the twin would prove nothing.
    assert errors(expected, Model.load(tmp_path / "source", device="cpu").logits(ids))[1] > 0.01


def test_padding_and_neighbours_change_nothing(tmp_path: Path) -> None:
    """A token's experts do not depend on the other tokens of a step."""
    tiny.save(tmp_path, "qwen3_moe", **QWEN3)
    model = Model.load(tmp_path, device="cpu")
    ids = tiny.prompt(12)
    assert_close(model.logits(ids)[:5], model.logits(ids[:5]))


@pytest.mark.kernel
def test_kernels_agree_with_references(tmp_path: Path, device: torch.device) -> None:
    """The whole path on kernels: rounding between ops is the same, so only the order of sums differs."""
    tiny.save(tmp_path / "source", "qwen3_moe", dtype=torch.float16, num_hidden_layers=1, **QWEN3)
    quantize(tmp_path / "source", tmp_path / "quantized", tmp_path / "twin", "gptq act-order")
    model = Model.load(tmp_path / "quantized", device=device, dtype="fp16")
    mlp = model.decoder.blocks[0].mlp
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).to(device=device, dtype=torch.float16)
    with implementation("launch"):
        actual = mlp(x, out_dtype=torch.float32)
    with implementation("reference"):
        expected = mlp(x, out_dtype=torch.float32)
    assert_close(actual, expected, torch.float16)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("mixtral", MIXTRAL, ExpertConfig(5, 2, 128, normalized=True, layers=(True, True))),
        ("qwen3_moe", QWEN3, ExpertConfig(6, 3, 32, normalized=True, layers=(True, True))),
        (
            "qwen3_moe",
            {
                **QWEN3,
                "norm_topk_prob": False,
                "num_hidden_layers": 4,
                "decoder_sparse_step": 2,
                "mlp_only_layers": [3],
            },
            ExpertConfig(6, 3, 32, normalized=False, layers=(False, True, False, False)),
        ),
    ],
)
def test_fields_are_read(tmp_path: Path, family: str, changes: dict[str, Any], expected: ExpertConfig) -> None:
    tiny.save(tmp_path, family, **changes)
    config = read_config(Checkpoint(tmp_path))
    assert config.experts == expected
    mlps = [type(block.mlp) for block in Model.load(tmp_path, device="cpu").decoder.blocks]
    assert mlps == [SparseMLP if sparse else GatedMLP for sparse in expected.layers]


def test_both_names_of_a_number_are_read(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe", **QWEN3)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["num_experts"] = settings.pop("num_local_experts")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert read_config(Checkpoint(tmp_path)).experts is not None
    tiny.edit_config(tmp_path, num_local_experts=7)
    with pytest.raises(CheckpointError, match="num_local_experts is given twice, as 6 and as 7"):
        read_config(Checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"norm_topk_prob": None}, "norm_topk_prob must not be null"),
        ({"num_experts_per_tok": 7}, "experts per token must be at most 6, got 7"),
        ({"num_local_experts": None}, "num_local_experts is missing, num_experts as well"),
        ({"mlp_only_layers": [2]}, r"mlp_only_layers must be a list of numbers from 0 to 1, got \[2\]"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be from 1"),
    ],
)
def test_impossible_fields_are_named(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    tiny.save(tmp_path, "qwen3_moe", **QWEN3)
    tiny.edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=text):
        Model.load(tmp_path, device="cpu")


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    tiny.save(tmp_path, "mixtral", **MIXTRAL)
    name = "model.layers.1.block_sparse_moe.experts.4.w3.weight"
    tiny.edit(tmp_path, lambda tensors: tensors.update({name: torch.ones(96, 64)}))
    with pytest.raises(CheckpointError, match="must map 64 features to 128, got 64 to 96") as caught:
        Model.load(tmp_path, device="cpu")
    assert caught.value.tensor == name


@pytest.mark.parametrize(("model_type", "changes"), [FAMILIES[0], FAMILIES[2]])
def test_experts_in_one_tensor_are_refused_by_name(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    model = tiny.save(tmp_path, model_type, **changes)
    model.save_pretrained(tmp_path, save_original_format=False)
    with pytest.raises(UnsupportedError, match=r"mlp\.experts\.gate_up_proj.*save_original_format=True"):
        Model.load(tmp_path, device="cpu")


def test_the_doctor_and_the_plan_know_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save(tmp_path / "source", "qwen3_moe", **{**QWEN3, "mlp_only_layers": [0]})
    quantize(tmp_path / "source", tmp_path / "quantized", tmp_path / "twin", "gptq")
    report = examine(tmp_path / "quantized")
    assert report.refused == []
    facts = dict(report.facts)
    assert "6 experts of 32, 3 per token (in 1 of the layers one MLP of 128)" in facts["model"]
    assert "experts weighted to a sum of one" in facts["traits"]
    assert not {"norm_topk_prob", "num_experts_per_tok", "mlp_only_layers"} & set(" ".join(report.unused).split(", "))
    # Two layers of attention, six experts of three matrices, an MLP of three; a router and a head that are dense.
    assert {kind.format: count for kind, count in report.kinds.items()} == {"gptq": 8 + 18 + 3, "dense": 2}
    assert main(["plan", str(tmp_path / "quantized"), "--gpus", "1"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert row.split()[header.split("  ").index("MLP")] != "0"


def test_presets_have_the_sizes_of_their_models() -> None:
    totals = {"mixtral-8x7b": 46.7, "qwen3-30b-a3b": 30.5}  # billions, as their cards say
    for name, total in totals.items():
        sizes = synthetic_sizes(name, "fp16")
        stored = sizes.attention_bytes + sizes.mlp_bytes + sizes.vocab_bytes + sizes.norm_bytes
        assert stored / 2e9 == pytest.approx(total, abs=0.05)


def test_a_step_reads_the_experts_that_it_takes(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe", **QWEN3)
    model = Model.load(tmp_path, device="cpu")
    stored = 2 * 6 * 3 * 64 * 32 * 4
    assert _untaken_bytes(model, 1) == stored // 2
    assert _untaken_bytes(model, 2) == stored // 4


def test_what_experts_cannot_do_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(tmp_path / "mixtral", "mixtral", **MIXTRAL)
    with pytest.raises(UnsupportedError, match="invariant=True works for models without experts"):
        Model.load(tmp_path / "mixtral", device="cpu", invariant=True)
    model = Model.load(tmp_path / "mixtral", device="cpu")
    monkeypatch.setattr(Model, "comm", SimpleNamespace(size=2))
    with pytest.raises(UnsupportedError, match="mixture of experts work where one process holds the whole model"):
        model.load_lora(tmp_path)
