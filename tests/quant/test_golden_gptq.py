"""GPTQ against bytes spelled out by hand and against the shared vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qinfer.errors import CheckpointError
from qinfer.quant import GPTQWeight, join
from tests.quant.memory_source import MemorySource
from tests.quant.operand_matrix import operand_matrix as matrix_of
from tests.strategies import random_tensor

CPU = torch.device("cpu")
VECTORS = Path(__file__).parents[1] / "vectors"


def word(value: int) -> int:
    """Return the int32 with these 32 bits."""
    return value - (1 << 32) if value >> 31 else value


def config(**options: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, **options}


def read(stored: dict[str, Tensor], **options: Any) -> GPTQWeight:
    return GPTQWeight.read(MemorySource({f"m.{k}": v for k, v in stored.items()}, config(**options)), "m")


def test_one_group_by_hand() -> None:
    # Column 0: rows 0..7 hold codes 0..7, first row lowest, so the word reads 76543210. Rows 8..15 hold f edcba98 from
    # row 15 down: fedcba98, a negative int32. Rows 16..31 hold 8. All other columns hold 8 everywhere.
    qweight = torch.full((4, 8), word(0x88888888), dtype=torch.int32)
    qweight[0, 0], qweight[1, 0] = 0x76543210, word(0xFEDCBA98)
    # Stored zero points of columns 0..7 are 7 f 0 7 7 7 7 7, one too small: they mean 8 16 1 8 8 8 8 8.
    qzeros = torch.tensor([[0x777770F7]], dtype=torch.int32)
    scales = torch.full((1, 8), 0.01, dtype=torch.float16)  # 0.0100021
    w = read({"qweight": qweight, "qzeros": qzeros, "scales": scales}).dequantize()
    step = float(torch.tensor(0.01, dtype=torch.float16))
    assert w[[0, 3, 7, 8, 15], 0].tolist() == pytest.approx([-8 * step, -5 * step, -step, 0.0, 7 * step], rel=1e-7)
    assert w[0, 0].item() == pytest.approx(-0.0800171, abs=5e-8)
    assert w[:, 1].tolist() == pytest.approx([-8 * step] * 32)  # code 8, zero point 16
    assert w[:, 2].tolist() == pytest.approx([7 * step] * 32)  # code 8, zero point 1
    assert (w[16:, 0] == 0).all()
    assert (w[:, 3:] == 0).all()


def test_quantize_writes_the_words_it_should() -> None:
    # Values -8 .. 7 of step 0.5, twice: codes 0 .. 15, zero point 8, stored as 7.
    w = ((torch.arange(32) % 16 - 8) * 0.5)[:, None].repeat(1, 8)
    weight = GPTQWeight.quantize(w, group_size=32)
    assert [int(v) for v in weight.qweight[:, 5]] == [0x76543210, word(0xFEDCBA98)] * 2
    assert weight.qzeros.tolist() == [[0x77777777]]
    assert GPTQWeight.quantize(w, group_size=32, zero_format="gptq_v2").qzeros.tolist() == [[word(0x88888888)]]
    assert (weight.scales == 0.5).all()
    assert torch.equal(weight.dequantize(), w)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("order", ["seq", "act"])
def test_the_shared_matrix(checkpoint_format: str | None, order: str) -> None:
    vector = {key: torch.from_numpy(value) for key, value in np.load(VECTORS / "gptq_matrix.npz").items()}
    stored = {
        "qweight": vector["qweight"],
        "qzeros": vector["qzeros_v2" if checkpoint_format == "gptq_v2" else "qzeros_v1"],
        "scales": vector["scales"],
        "g_idx": vector[f"g_idx_{order}"],
    }
    options = {} if checkpoint_format is None else {"checkpoint_format": checkpoint_format}
    weight = read(stored, desc_act=order == "act", **options)
    w = weight.dequantize()
    assert torch.equal(w.half(), vector[f"w_{order}_fp16"])
    operand = weight.operand(CPU, torch.float32)
    assert torch.equal(matrix_of(operand), w)
    if order == "seq":
        assert operand.order is None
        return
    assert operand.order is not None
    assert operand.order.dtype == torch.int32
    assert torch.equal(operand.order.long(), vector["q_perm_act"].long())
    y = vector["x"].float() @ w
    assert (y - vector["y_act_fp32"]).abs().max() < 2e-3 * vector["y_act_fp32"].abs().max()


def test_scales_of_32_bits_are_rounded_to_16() -> None:
    w = random_tensor(64, 8, seed=3)
    narrow = GPTQWeight.quantize(w, group_size=32)
    # An eighth of the distance to the next fp16 number at most, up or down.
    shift = 1 + 2.0**-14 * torch.tensor([1.0, -1.0]).repeat(4)
    wide = {**narrow.tensors(), "scales": narrow.scales.float() * shift}
    assert not torch.equal(wide["scales"], narrow.scales.float())
    weight = read(wide)
    assert weight.scales.dtype == torch.float16
    assert torch.equal(weight.scales, narrow.scales)
    assert torch.equal(matrix_of(weight.operand(CPU, torch.float32)), narrow.dequantize())


def test_zero_points_do_not_borrow_from_each_other() -> None:
    # ExLlamaV2 subtracts 0x11111111 from the whole word and so reads 16 7 8 8 8 8 8 8 here.
    borrow = json.loads((VECTORS / "gptq_v2_borrow.json").read_text())
    qzeros = torch.tensor([[word(int(borrow["v2_word"], 16))]], dtype=torch.int32)
    stored = {
        "qweight": torch.zeros(4, 8, dtype=torch.int32),
        "qzeros": qzeros,
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    weight = read(stored, checkpoint_format="gptq_v2")
    assert weight.zeros().tolist() == [borrow["true_zeros"]]
    assert (-weight.dequantize()[0]).tolist() == borrow["true_zeros"]
    # In the first format the word after the subtraction means what ExLlamaV2's kernel saw.
    stored["qzeros"] = torch.tensor([[word(int(borrow["after_subtract"], 16))]], dtype=torch.int32)
    assert read(stored).zeros().tolist() == [borrow["zeros_seen_by_kernel"]]


def test_a_zero_g_idx_means_no_act_order() -> None:
    weight = GPTQWeight.quantize(random_tensor(96, 8, seed=3), group_size=32)
    again = read({**weight.tensors(), "g_idx": torch.zeros(96, dtype=torch.int32)})
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert again.operand(CPU, torch.float32).order is None
    assert list(again.cuts("in")) == [0, 32, 64, 96]
    assert torch.equal(again.slice("in", 32, 96).dequantize(), weight.dequantize()[32:])


@pytest.mark.parametrize("given_g_idx", [True, False])
def test_a_sequential_g_idx_can_be_cut(given_g_idx: bool) -> None:
    weight = GPTQWeight.quantize(random_tensor(160, 8, seed=3), group_size=64)
    tensors = weight.tensors()
    if given_g_idx:
        tensors["g_idx"] = torch.arange(160, dtype=torch.int32) // 64
    again = read(tensors, group_size=64)
    assert list(again.cuts("in")) == [0, 64, 128, 160]
    part = again.slice("in", 64, 160)
    assert part.scales.shape == (2, 8)
    assert torch.equal(part.dequantize(), weight.dequantize()[64:])


def test_act_order_forbids_cuts_along_the_input() -> None:
    order = torch.arange(127, -1, -1)
    weight = GPTQWeight.quantize(random_tensor(128, 8, seed=3), group_size=32, act_order=order)
    assert weight.g_idx is not None
    assert weight.g_idx.tolist() == [3 - k // 32 for k in range(128)]
    assert weight.cuts("in") == ()
    with pytest.raises(ValueError, match="a slice along 'in'"):
        weight.slice("in", 0, 128)
    # One group has no order to speak of.
    assert GPTQWeight.quantize(random_tensor(128, 8, seed=3), group_size=-1, act_order=order).cuts("in")


@pytest.mark.parametrize(
    ("sizes", "group_size", "run"),
    [
        ((48, 16, 32), 32, 16),
        ((64, 64, 32), 64, 64),  # the last group is short, as in every file whose K is no multiple of the group
        ((32, 96), 64, 32),
        ((128, 0, 256), 128, 128),
        ((64, 192), 128, 64),
        ((96, 64), 128, 32),
        ((96,), 1024, 256),  # no run is longer than K needs, whatever a file says
        ((160, 160), 160, 160),
    ],
)
def test_groups_of_unequal_sizes_in_whole_runs_are_exact(sizes: tuple[int, ...], group_size: int, run: int) -> None:
    in_features = sum(sizes) // 32 * 32
    g_idx = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[:in_features]
    g_idx = g_idx[torch.randperm(in_features)].to(torch.int32)
    stored = {
        "qweight": torch.randint(-(2**31), 2**31 - 1, (in_features // 8, 8), dtype=torch.int32),
        "qzeros": torch.randint(-(2**31), 2**31 - 1, (len(sizes), 1), dtype=torch.int32),
        "scales": torch.rand(len(sizes), 8).half(),
        "g_idx": g_idx,
    }
    weight = read(stored, group_size=group_size)
    operand = weight.operand(CPU, torch.float32)
    assert operand.group_size == run
    assert operand.scales.shape[0] == -(-in_features // run)
    assert torch.equal(matrix_of(operand), weight.dequantize())


@pytest.mark.parametrize(
    ("in_features", "group_size", "expected"),
    [(96, -1, 256), (256, -1, 256), (288, -1, 512), (64, 128, 128), (64, 2**40, 256)],
)
def test_one_group_covers_the_padding(in_features: int, group_size: int, expected: int) -> None:
    weight = GPTQWeight.quantize(random_tensor(in_features, 8, seed=4), group_size=group_size)
    operand = weight.operand(CPU, torch.float32)
    assert operand.group_size == expected
    assert operand.scales.shape == (1, 8)
    assert list(weight.cuts("in")) == list(range(0, in_features + 1, 32))


def test_symmetry_is_seen_in_the_values() -> None:
    w = random_tensor(64, 8, seed=5)
    symmetric = GPTQWeight.quantize(w, group_size=32)
    assert symmetric.operand(CPU, torch.float32).offsets is None
    assert symmetric.quant_config["sym"] is True
    shifted = GPTQWeight.quantize(w + 0.7, group_size=32, symmetric=False)
    offsets = shifted.operand(CPU, torch.float32).offsets
    assert offsets is not None
    assert torch.equal(offsets.to(torch.int16) + 8, shifted.zeros())
    assert shifted.quant_config["sym"] is False


def test_the_first_format_avoids_the_zero_point_it_cannot_store() -> None:
    w = random_tensor(64, 8, seed=6).abs() + 0.1
    assert int(GPTQWeight.quantize(w, group_size=32, symmetric=False).zeros().min()) == 1
    assert int(GPTQWeight.quantize(w, group_size=32, symmetric=False, zero_format="gptq_v2").zeros().max()) == 0


def test_act_order_groups_the_features_it_names() -> None:
    w, order = random_tensor(96, 8, seed=7), torch.randperm(96)
    ordered = GPTQWeight.quantize(w, group_size=32, act_order=order)
    assert torch.equal(ordered.dequantize()[order], GPTQWeight.quantize(w[order], group_size=32).dequantize())
    assert not torch.equal(ordered.dequantize(), GPTQWeight.quantize(w, group_size=32).dequantize())


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (2, [3, 0, 1, 2] * 4, [word(0b10_01_00_11_10_01_00_11_10_01_00_11_10_01_00_11)]),
        # Codes 10 and 21 straddle: 7 at bits 30 .. 32 and again at bits 63 .. 65.
        (3, [0] * 10 + [7] + [0] * 10 + [7] + [0] * 10, [word(0b11 << 30), word(1 << 31 | 1), 0b11]),
        (8, [0x12, 0x34, 0x56, 0xF8], [word(0xF8563412)]),
    ],
)
def test_the_stream_of_each_width_by_hand(bits: int, codes: list[int], words: list[int]) -> None:
    stored = {
        "qweight": torch.tensor(words, dtype=torch.int32)[:, None].repeat(1, 32),
        "qzeros": torch.zeros(1, bits, dtype=torch.int32),
        "scales": torch.ones(1, 32, dtype=torch.float16),
    }
    for layout, zero in (("gptq_v2", 0), ("gptq", 1)):
        weight = read(stored, bits=bits, group_size=-1, checkpoint_format=layout)
        assert weight.dequantize()[:, 7].tolist() == [code - zero for code in codes]
        assert torch.equal(matrix_of(weight.operand(CPU, torch.float32)), weight.dequantize())


# Written by GPTQModel 7.6.0 on a CPU: for random codes, zero points (1 .. 2^b - 1) and scales, in an environment with
# torch 2.13, `TorchLinear(bits, group_size, sym, desc_act, ..., pack_dtype=torch.int32).pack_original(linear, scales,
# zeros, g_idx)` gives qweight, scales, g_idx and qzeros_v2; `convert_gptq_v2_to_v1_format_module` turns those into
# qzeros_v1; `dequantize_weight()` is its own reading.
GPTQMODEL = np.load(VECTORS / "gptqmodel.npz")
CASES = sorted({key.partition(".")[0] for key in GPTQMODEL.files})


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("case", CASES)
def test_what_gptqmodel_writes(case: str, checkpoint_format: str) -> None:
    bits, group_size, symmetry, order = case.split("_")
    vector = {key.partition(".")[2]: torch.from_numpy(GPTQMODEL[key]) for key in GPTQMODEL.files if f"{case}." in key}
    qzeros = vector["qzeros_v1" if checkpoint_format == "gptq" else "qzeros_v2"]
    stored = {"qweight": vector["qweight"], "qzeros": qzeros, "scales": vector["scales"], "g_idx": vector["g_idx"]}
    options = {"bits": int(bits), "group_size": int(group_size), "checkpoint_format": checkpoint_format}
    weight = read(stored, **options)
    assert torch.equal(weight.dequantize().half(), vector["dequantized"])
    assert weight.quant_config["sym"] is (symmetry == "sym")
    assert weight.quant_config["desc_act"] is (order == "act")
    operand = weight.operand(CPU, torch.float32)
    assert operand.group_size == (256 if group_size == "-1" else int(group_size))
    assert (operand.order is not None) is (order == "act")
    assert torch.equal(matrix_of(operand), weight.dequantize())


def test_gptqmodel_covers_every_width() -> None:
    assert {case.partition("_")[0] for case in CASES} == {"2", "3", "4", "8"}


def test_an_offset_of_128_takes_wider_integers() -> None:
    # A stored 255 of the first format means 256, that is 128 more than the middle.
    stored = {
        "qweight": torch.zeros(8, 4, dtype=torch.int32),
        "qzeros": torch.tensor([[word(0xFF7F00FF)]], dtype=torch.int32),
        "scales": torch.ones(1, 4, dtype=torch.float16),
    }
    weight = read(stored, bits=8)
    assert weight.zeros().tolist() == [[256, 1, 128, 256]]
    wide = weight.operand(CPU, torch.float32)
    assert wide.offsets is not None
    assert (wide.offsets.dtype, wide.offsets.tolist()) == (torch.int16, [[128, -127, 0, 128]])
    assert torch.equal(matrix_of(wide), weight.dequantize())
    narrow = read({**stored, "qzeros": torch.tensor([[word(0xFE7F00FE)]], dtype=torch.int32)}, bits=8)
    narrow_operand = narrow.operand(CPU, torch.float32)
    assert narrow_operand.offsets is not None
    assert narrow_operand.offsets.dtype == torch.int8
    both = join([narrow_operand, wide])
    assert both is not None
    assert torch.equal(matrix_of(both), torch.cat([narrow.dequantize(), weight.dequantize()], dim=1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_that_end_inside_a_word_need_g_idx(bits: int) -> None:
    weight = GPTQWeight.quantize(random_tensor(67, 8, seed=1), bits=bits, group_size=32)
    assert weight.qweight.shape[0] == -(-67 * bits // 32)
    assert weight.shape == (67, 8)
    tensors = weight.tensors()
    assert torch.equal(read(tensors, bits=bits).dequantize(), weight.dequantize())
    del tensors["g_idx"]
    if bits == 3:
        with pytest.raises(CheckpointError, match="without g_idx must fill whole words, got 7 rows"):
            read(tensors, bits=bits)
    else:
        # Nothing contradicts the features that the words have room for.
        assert read(tensors, bits=bits).shape[0] == weight.qweight.shape[0] * 32 // bits


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_more_bits_err_less(bits: int) -> None:
    w = random_tensor(64, 16, seed=8)
    error = (GPTQWeight.quantize(w, bits=bits, group_size=32).dequantize() - w).square().mean().sqrt()
    assert error < {2: 0.6, 3: 0.25, 4: 0.11, 8: 0.006}[bits]
