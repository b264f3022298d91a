"""EXL2 against the shared vectors, against numbers spelled out by hand, and its writer against what it should find."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qinfer.kernels.matmul import matmul
from qinfer.kernels.operand import PlaneOperand, SegmentedOperand
from qinfer.kernels.packing import pack_stream, unpack_planes
from qinfer.quant import EXL2Weight, without_padding
from tests.compare import assert_close
from tests.quant.memory_source import MemorySource, stored_as
from tests.quant.operand_matrix import operand_matrix
from tests.strategies import random_tensor

VECTORS = Path(__file__).parents[1] / "vectors"
CPU = torch.device("cpu")
SUFFIXES = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm", "bias")


def read(stored: dict[str, Tensor]) -> EXL2Weight:
    return EXL2Weight.read(MemorySource({f"m.{key}": value for key, value in stored.items()}), "m")


def vector() -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in np.load(VECTORS / "exl2_matrix.npz").items()}


def build(groups: list[tuple[int, int]], *, columns: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """Stored tensors of random codes and scales for groups of (bits, rows)."""
    generator = torch.Generator().manual_seed(seed)
    words, heads, first = [], [], 0
    for bits, rows in groups:
        codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
        words.append(pack_stream(codes, bits, 0))
        heads += [bits, first]
        first += words[-1].shape[0]
    nibbles = torch.randint(0, 16, (len(groups), columns), generator=generator, dtype=torch.uint8)
    in_features = sum(rows for _, rows in groups)
    return {
        "q_weight": torch.cat(words),
        "q_scale": pack_stream(nibbles, 4, 1),
        "q_scale_max": (torch.rand(len(groups), generator=generator) * 0.03 + 0.002).half(),
        "q_groups": torch.tensor(heads).to(torch.int16),
        "q_invperm": torch.randperm(in_features, generator=generator).to(torch.int32),
    }


def test_the_shared_matrix() -> None:
    expected = vector()
    weight = read({suffix: expected[suffix] for suffix in SUFFIXES})
    assert weight.shape == (256, 32)
    assert torch.equal(weight.scales(), expected["scales_fp16"])
    assert torch.equal(weight.q_perm, expected["q_perm"].long())
    w = weight.dequantize()
    assert w.dtype == torch.float32
    assert torch.equal(w.half(), expected["w_fp16"])
    assert torch.equal(w.half().float(), w)
    assert_close(expected["x"].float() @ w + expected["bias"].float(), expected["y_fp32"])
    for suffix, tensor in weight.tensors().items():
        assert torch.equal(tensor, expected[suffix])
    assert weight.tensors().keys() == set(SUFFIXES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_operand_of_the_shared_matrix(dtype: torch.dtype) -> None:
    expected = vector()
    weight = read({suffix: expected[suffix] for suffix in SUFFIXES})
    operand = weight.operand(CPU, dtype)
    assert isinstance(operand, SegmentedOperand)
    layout = [(segment.bits, segment.group_size, segment.in_features) for segment in operand.segments]
    assert layout == [(8, 32, 32), (6, 32, 32), (5, 32, 32), (4, 64, 64), (3, 64, 64), (2, 32, 32)]
    assert torch.equal(torch.cat([segment.scales for segment in operand.segments]), expected["scales_fp16"])
    codes = [unpack_planes(s.planes, bits=s.bits, in_features=s.in_features) for s in operand.segments]
    assert torch.equal(torch.cat(codes).to(torch.int16), expected["q_stored"])
    assert operand.order is not None
    assert operand.order.dtype == torch.int32
    assert torch.equal(operand.order, expected["q_perm"])
    assert torch.equal(operand_matrix(operand).half(), expected["w_fp16"])
    # The product is not rounded to fp16 in the operand: where rounding changes it, it is the exact one.
    exact = (
        expected["q_stored"].double()
        - torch.cat([torch.full((s.in_features, 1), 2.0 ** (s.bits - 1)) for s in operand.segments])
    ) * expected["scales_fp16"].double()[expected["q_group_map"][::2].long()]
    assert torch.equal(operand_matrix(operand).double(), exact[expected["q_invperm"].long()])
    y = matmul(expected["x"][:, operand.order.long()].float(), operand, bias=expected["bias"])
    assert_close(y, expected["y_fp32"], torch.float16)


def test_the_scale_is_rounded_twice() -> None:
    for case in json.loads((VECTORS / "exl2_scale_rounding.json").read_text()):
        stored = build([(4, 32)])
        stored["q_scale"] = pack_stream(torch.full((1, 32), case["nibble"], dtype=torch.uint8), 4, 1)
        stored["q_scale_max"] = torch.tensor([case["scale_max"]], dtype=torch.float16)
        scales = read(stored).scales()
        assert scales.dtype == torch.float16
        assert scales.tolist() == [[case["runtime_fp16"]] * 32]


@pytest.mark.parametrize(
    ("code", "bits", "nibble", "scale_max", "scale", "value"),
    [
        (5, 4, 9, 0.0123, 0.0048027, -0.0144043),
        (0, 4, 15, 0.0123, 0.0122986, -0.0983887),
        (15, 4, 0, 0.0123, 4.80413e-05, 3.36170e-04),
        (7, 3, 6, 0.031, 0.00593567, 0.0178070),
        (200, 8, 11, 0.0021, 0.00118446, 0.0852661),
        (1, 2, 3, 0.044, 0.00275040, -0.00275040),
        (8, 4, 15, 0.0123, 0.0122986, 0.0),  # what converters fill padded columns with
    ],
)
def test_single_weights(code: int, bits: int, nibble: int, scale_max: float, scale: float, value: float) -> None:
    stored = build([(bits, 32)])
    stored["q_weight"] = pack_stream(torch.full((32, 32), code, dtype=torch.uint8), bits, 0)
    stored["q_scale"] = pack_stream(torch.full((1, 32), nibble, dtype=torch.uint8), 4, 1)
    stored["q_scale_max"] = torch.tensor([scale_max], dtype=torch.float16)
    weight = read(stored)
    assert float(weight.scales()[0, 0]) == pytest.approx(scale, rel=5e-6)  # six digits
    assert weight.dequantize().unique().tolist() == pytest.approx([value], rel=5e-6)


def test_columns_and_rows_by_hand() -> None:
    # Two groups of 4 bits: the word 76543210 is rows 0..7 of its column, the nibble 3 of q_scale its column 3.
    q_weight = torch.full((8, 32), 0x88888888 - (1 << 32), dtype=torch.int32)
    q_weight[0, 3], q_weight[4, 20] = 0x76543210, 0x000000F0
    q_scale = torch.zeros(2, 4, dtype=torch.int32)
    q_scale[0, 0], q_scale[1, 2] = 0x00001000, 0x00070000  # indices 2 for column 3, 8 for column 20
    order = torch.arange(63, -1, -1)
    stored = {
        "q_weight": q_weight,
        "q_scale": q_scale,
        "q_scale_max": torch.tensor([256.0, 64.0], dtype=torch.float16),  # scales i^2 and i^2 / 4
        "q_groups": torch.tensor([4, 0, 4, 4], dtype=torch.int16),
        "q_invperm": order.to(torch.int32),
    }
    w = read(stored).dequantize()
    expected = torch.zeros(64, 32)
    expected[63 - torch.arange(8), 3] = 4 * (torch.arange(8) - 8.0)
    # Row 32 holds code 0, row 33 code 15, rows 34..39 code 0, all others 8.
    expected[63 - torch.arange(32, 40), 20] = -8 * 16.0
    expected[63 - 33, 20] = 7 * 16.0
    assert torch.equal(w, expected)


def test_a_stored_q_perm_is_not_looked_at() -> None:
    expected = vector()
    stored = {suffix: expected[suffix] for suffix in SUFFIXES}
    weight = read({**stored, "q_perm": torch.zeros(3)})
    assert torch.equal(weight.dequantize().half(), expected["w_fp16"])
    assert "q_perm" not in weight.tensors()


@pytest.mark.parametrize(
    ("groups", "layout"),
    [
        ([(4, 128), (4, 128), (4, 32)], [(4, 128, 288)]),  # the last one is shorter
        ([(4, 128), (4, 32), (4, 32)], [(4, 128, 160), (4, 32, 32)]),
        ([(5, 32), (5, 96), (5, 96), (5, 64), (5, 64)], [(5, 32, 32), (5, 96, 256), (5, 64, 64)]),
        ([(8, 32), (3, 64), (3, 32)], [(8, 32, 32), (3, 64, 96)]),
        ([(6, 32), (2, 16), (2, 16), (2, 16)], [(6, 32, 32), (2, 16, 48)]),  # a word of 2-bit codes is 16 rows
        ([(3, 32), (2, 48), (2, 64), (2, 32)], [(3, 32, 32), (2, 16, 144)]),
        ([(2, 64), (2, 16)], [(2, 16, 80)]),
    ],
)
def test_groups_of_any_sizes_become_segments(groups: list[tuple[int, int]], layout: list[tuple[int, int, int]]) -> None:
    weight = read(build(groups, columns=64))
    operand = weight.operand(CPU, torch.float16)
    segments = operand.segments if isinstance(operand, SegmentedOperand) else (operand,)
    assert [(s.bits, s.group_size, s.in_features) for s in segments] == layout
    assert isinstance(operand, PlaneOperand) == (len(layout) == 1)
    assert operand.order is not None
    assert torch.equal(operand_matrix(operand).half().float(), weight.dequantize())


def test_rows_without_permutation_have_no_order() -> None:
    stored = build([(5, 32), (4, 32)])
    stored["q_invperm"] = torch.arange(64, dtype=torch.int32)
    operand = read(stored).operand(CPU, torch.float16)
    assert operand.order is None
    assert read(build([(5, 32), (4, 32)])).cuts("in") == ()
    assert read(stored).cuts("in") == ()


def test_first_rows_are_unsigned() -> None:
    num_words = 40960
    stored = {
        "q_weight": torch.zeros(num_words, 32, dtype=torch.int32),
        "q_scale": torch.zeros(2, 4, dtype=torch.int32),
        "q_scale_max": torch.ones(2, dtype=torch.float16),
        "q_groups": torch.tensor([8, 0, 8, 32776 - 65536], dtype=torch.int16),
        "q_invperm": torch.arange(num_words * 4, dtype=torch.int32),
    }
    assert read(stored).shape == (num_words * 4, 32)


@pytest.mark.parametrize(("out_features", "stored"), [(40, 64), (300, 320), (64, 64), (1, 32)])
def test_padded_columns(out_features: int, stored: int) -> None:
    w, bias = random_tensor(64, out_features, seed=0), random_tensor(out_features, seed=1, dtype=torch.float16)
    weight = EXL2Weight.quantize(w, bits={5: 0.5, 3: 0.5}, bias=bias)
    assert weight.shape == (64, out_features)
    source = stored_as(weight, "m")
    assert source.shape("m.q_weight") == (8, stored)
    assert source.shape("m.bias") == (stored,)
    whole = EXL2Weight.read(source, "m")
    assert whole.shape == (64, stored)
    assert not whole.dequantize()[:, out_features:].any()
    again = without_padding(whole, out_features)
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert torch.equal(again.dequantize(), whole.dequantize()[:, :out_features])
    assert again.bias is not None
    assert torch.equal(again.bias, bias)
    operand = again.operand(CPU, torch.float16)
    assert operand.out_features == out_features
    assert torch.equal(operand_matrix(operand).half().float(), weight.dequantize())
    assert all(torch.equal(a, b) for a, b in zip(again.tensors().values(), source.stored.values(), strict=True))
    cuts = again.cuts("out")
    assert cuts[-1] == out_features
    part = again.slice("out", cuts[-2], cuts[-1])
    assert torch.equal(part.dequantize(), weight.dequantize()[:, cuts[-2] :])
    assert part.bias is not None
    assert torch.equal(part.bias, bias[cuts[-2] :])
    assert again.slice("out", out_features, out_features).shape == (64, 0)


def test_only_padding_is_dropped() -> None:
    weight = EXL2Weight.quantize(random_tensor(32, 96, seed=0))
    for out_features in (32, 64, 97, 128):
        assert without_padding(weight, out_features) is weight
    assert without_padding(weight, 65).shape == (32, 65)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.0065), (6, 0.025), (5, 0.05), (4, 0.095), (3, 0.2), (2, 0.39)])
def test_the_writer_is_as_close_as_its_bits_allow(bits: int, error: float) -> None:
    w = random_tensor(256, 64, seed=bits) * (torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.02)
    difference = EXL2Weight.quantize(w, bits=bits).dequantize() - w
    # Every column by itself: small columns must not suffer from the large ones that share their q_scale_max.
    assert float((difference.norm(dim=0) / w.norm(dim=0)).max()) < error * 1.45
    assert float(difference.norm() / w.norm()) < error


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        ({"bits": 4, "group_size": 128}, [4, 0, 4, 16, 4, 32]),
        ({"bits": {5: 0.1, 4: 0.9}, "group_size": {5: 32, 4: 128}}, [5, 0, 4, 5, 4, 21, 4, 37]),
        (
            {"bits": {2: 0.75, 6: 0.05, 3: 0.2}, "group_size": {6: 32, 3: 64, 2: 64}},
            [6, 0, 3, 6, 2, 12, 2, 16, 2, 20, 2, 24],
        ),
        ({"bits": {8: 1.0, 2: 0.0}, "group_size": 320}, [8, 0]),
        ({"bits": {3: 0.3, 2: 0.7}, "group_size": {3: 96, 2: 320}}, [3, 0, 2, 9]),
    ],
)
def test_the_writer_places_its_groups(options: dict[str, Any], heads: list[int]) -> None:
    weight = EXL2Weight.quantize(random_tensor(320, 32, seed=0), **options)
    assert weight.q_groups.tolist() == heads
    assert weight.quant_config == {"quant_method": "exl2"}


def test_the_writer_gives_the_first_rows_the_most_bits() -> None:
    w, order = random_tensor(128, 32, seed=0), torch.randperm(128, generator=torch.Generator().manual_seed(0))
    weight = EXL2Weight.quantize(w, bits={8: 0.25, 2: 0.75}, permutation=order)
    errors = (weight.dequantize() - w).abs().amax(dim=1)
    assert float(errors[order[:32]].max()) < float(errors[order[32:]].min())
    assert torch.equal(weight.q_perm, order)
    assert torch.equal(weight.q_invperm[order], torch.arange(128, dtype=torch.int32))


@pytest.mark.parametrize(
    ("bits", "kept"),
    [
        ({5: 0.1, 4: 0.8, 3: 0.1}, [6, 4]),  # 4.8 % more, and the two narrower segments become one
        ({8: 0.1, 6: 0.8, 5: 0.1}, [8, 6]),
        ({5: 0.2, 4: 0.6, 3: 0.2}, [5, 4, 3]),  # 9.6 % more would be too much
        ({3: 1.0}, [3]),
    ],
)
def test_an_operand_keeps_few_rows_of_long_steps_in_a_bit_more(bits: dict[int, float], kept: list[int]) -> None:
    order = torch.randperm(640, generator=torch.Generator().manual_seed(0))
    weight = EXL2Weight.quantize(random_tensor(640, 64, seed=0), bits=bits, group_size=64, permutation=order)
    operand = weight.operand(torch.device("cpu"), torch.float16)
    segments = (operand,) if isinstance(operand, PlaneOperand) else operand.segments
    assert [segment.bits for segment in segments] == kept
    assert sum(segment.in_features for segment in segments) == 640
    assert torch.equal(operand_matrix(operand).half().float(), weight.dequantize())


def test_zeros_stay_zeros() -> None:
    weight = EXL2Weight.quantize(torch.zeros(64, 32), bits={6: 0.5, 3: 0.5})
    assert not weight.dequantize().any()
    mixed = random_tensor(64, 32, seed=0)
    mixed[:, 5] = 0
    mixed[:32] = 0
    dequantized = EXL2Weight.quantize(mixed, bits=3).dequantize()
    assert not dequantized[:, 5].any()
    assert not dequantized[:32].any()
    assert EXL2Weight.quantize(torch.zeros(32, 0)).dequantize().shape == (32, 0)


@pytest.mark.parametrize(
    ("options", "shape", "text"),
    [
        ({}, (48, 32), "K a positive multiple of 32"),
        ({}, (0, 32), "K a positive multiple of 32"),
        ({"bits": 7}, (64, 32), r"bits must be among \[8, 6, 5, 4, 3, 2\], got \[7\]"),
        ({"bits": {}}, (64, 32), r"bits must be among"),
        ({"bits": {4: 0.5, 3: 0.4}}, (64, 32), "positive and sum to 1"),
        ({"bits": {4: 1.5, 3: -0.5}}, (64, 32), "positive and sum to 1"),
        ({"group_size": 48}, (64, 32), "group_size must be a positive multiple of 32"),
        ({"group_size": 0}, (64, 32), "group_size must be a positive multiple of 32"),
        ({"bits": {4: 0.5, 3: 0.5}, "group_size": {4: 32}}, (64, 32), "for each of"),
        ({"permutation": torch.zeros(64, dtype=torch.int64)}, (64, 32), "permutation must hold each of 64 features"),
        ({"permutation": torch.arange(32)}, (64, 32), "permutation must hold each of 64 features once"),
    ],
)
def test_writer_options_that_do_not_work(options: dict[str, Any], shape: tuple[int, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        EXL2Weight.quantize(torch.ones(shape), **options)
