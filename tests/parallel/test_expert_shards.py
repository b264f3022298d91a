"""Ranks that share experts give the logits of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qinfer.models.experts import SparseMLP
from qinfer.models.model import Model
from qinfer.parallel.plan import Plan, scaled_spans
from tests.compare import assert_close
from tests.models import tiny
from tests.models.tiny_experts import QWEN3, quantize
from tests.parallel.test_shards import divide, load, run
from tests.parallel.threads import on_ranks

# Three groups of 32 per expert; the first layer has none, and twice the width.
SHAPE = {**QWEN3, "moe_intermediate_size": 96, "intermediate_size": 192, "mlp_only_layers": [0]}
TWO = ((1, 2, 1, 4), (1, 1, 1, 3))
THREE = ((1, 1, 1, 2), (1, 2, 0, 2), (0, 0, 1, 3))  # the third has neither heads nor columns of experts


@pytest.mark.parametrize(
    ("kind", "counts"),
    [("dense", THREE), ("gptq", THREE), ("gptq some act-order", THREE), ("gptq", TWO), ("exl2", TWO)],
)
def test_logits_are_those_of_one_rank(tmp_path: Path, kind: str, counts: tuple[tuple[int, int, int, int], ...]) -> None:
    folder = tmp_path / "dense"
    tiny.save(folder, "qwen3_moe", **SHAPE)
    if kind != "dense":
        quantize(folder, tmp_path / "quantized", tmp_path / "twin", kind)
        folder = tmp_path / "quantized"
    expected = run(Model.load(folder, device="cpu"))
    plan = divide(folder, *counts)
    models = on_ranks(len(counts), lambda rank: load(folder, plan, rank))
    sparse = [model.decoder.blocks[1].mlp for model in models]
    is_gathered = [mlp.down.in_sizes is not None for mlp in sparse if isinstance(mlp, SparseMLP)]
    assert is_gathered == [kind in ("gptq some act-order", "exl2")] * len(counts)
    for logits in on_ranks(len(counts), lambda rank: run(load(folder, plan, rank))):
        assert_close(logits, expected)
        assert torch.equal(logits.argmax(1), expected.argmax(1))


def test_every_matrix_is_on_one_rank(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe", **SHAPE)
    plan = divide(tmp_path, *TWO)
    models = on_ranks(2, lambda rank: load(tmp_path, plan, rank))
    whole = Model.load(tmp_path, device="cpu")
    counts = [sum(linear.num_parameters for linear in model.decoder.linears()) for model in (*models, whole)]
    router = QWEN3["num_experts"] * 64
    assert counts[0] + counts[1] == counts[2] + router, "all but the router is held once"


def test_a_plan_counts_experts(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe", **SHAPE)
    plan = divide(tmp_path, *TWO)
    sizes = plan.sizes
    stored = (tmp_path / "model.safetensors").stat().st_size
    counted = sizes.attention_bytes + sizes.mlp_bytes + sizes.vocab_bytes + sizes.norm_bytes
    assert sizes.mlp_size == 96
    # But for the header of the file and the norms of heads, which nobody counts.
    assert 0 < stored - counted < 16384
    assert sizes.mlp_bytes == 4 * 64 * 3 * (6 * 96 + 192)
    made = Plan.make(sizes, [1.0, 1.0])
    assert sum(share.weight_bytes for share in made.shares) == counted + sizes.norm_bytes


def test_layers_of_another_width_are_cut_in_the_same_shares() -> None:
    assert scaled_spans([(0, 256), (256, 768)], 6144) == [(0, 2048), (2048, 6144)]
    assert scaled_spans([(0, 64), (64, 64), (64, 96)], 192) == [(0, 128), (128, 128), (128, 192)]
    assert scaled_spans([(0, 96)], 96) == [(0, 96)]
