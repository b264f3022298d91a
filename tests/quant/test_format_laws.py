"""The laws of every stored format. A new format brings a row of `OPTIONS`, not a new file."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qinfer.kernels.operand import Operand, PlaneOperand, SegmentedOperand
from qinfer.quant import FORMATS, EXL2Weight, Weight, join, weight_class
from tests.quant.memory_source import stored_as
from tests.quant.operand_matrix import operand_matrix as matrix_of
from tests.strategies import random_tensor, seeds

CPU = torch.device("cpu")
# Files do not say which columns of EXL2 are padding, so the laws about files take none.
COLUMNS = {"awq": [8, 16, 24], "exl2": [32, 64, 96]}
ANY_LENGTH = ("dense", "fp8", "gptq")
GROUP_SIZES = [16, 32, 64, 96, 128, 256, 1024, -1]


def orders(in_features: int) -> st.SearchStrategy[Tensor]:
    """Permutations of the input features; drawn element by element they would take longer than the laws."""
    return seeds.map(lambda seed: torch.randperm(in_features, generator=torch.Generator().manual_seed(seed)))


@st.composite
def gptq_options(draw: st.DrawFn, in_features: int) -> dict[str, Any]:
    order = draw(orders(in_features)) if draw(st.booleans()) else None
    return {
        "bits": draw(st.sampled_from([2, 3, 4, 8])),
        "group_size": draw(st.sampled_from(GROUP_SIZES)),
        "symmetric": draw(st.booleans()),
        "zero_format": draw(st.sampled_from(["gptq", "gptq_v2"])),
        "act_order": order,
    }


@st.composite
def awq_options(draw: st.DrawFn, in_features: int) -> dict[str, Any]:
    return {"group_size": draw(st.sampled_from(GROUP_SIZES)), "symmetric": draw(st.booleans())}


@st.composite
def compressed_options(draw: st.DrawFn, in_features: int) -> dict[str, Any]:
    order = draw(orders(in_features)) if draw(st.booleans()) else None
    return {
        "bits": draw(st.sampled_from([2, 3, 4, 5, 6, 8])),
        "group_size": draw(st.sampled_from(GROUP_SIZES)),
        "symmetric": draw(st.booleans()),
        "act_order": order,
    }


@st.composite
def fp8_options(draw: st.DrawFn, in_features: int) -> dict[str, Any]:
    return {"block": draw(st.sampled_from([(128, 128), (16, 32), (7, 50), (1, 256)]))}


@st.composite
def dense_options(draw: st.DrawFn, in_features: int) -> dict[str, Any]:
    return {"dtype": draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))}


@st.composite
def exl2_options(draw: st.DrawFn, in_features: int) -> dict[str, Any]:
    widths = draw(st.lists(st.sampled_from([8, 6, 5, 4, 3, 2]), min_size=1, max_size=4, unique=True))
    parts = draw(st.lists(st.integers(1, 8), min_size=len(widths), max_size=len(widths)))
    sizes = draw(st.lists(st.sampled_from([32, 64, 96, 128]), min_size=len(widths), max_size=len(widths)))
    order = draw(orders(in_features)) if draw(st.booleans()) else None
    return {
        "bits": {bits: part / sum(parts) for bits, part in zip(widths, parts, strict=True)},
        "group_size": dict(zip(widths, sizes, strict=True)),
        "permutation": order,
    }


OPTIONS = {
    "awq": awq_options,
    "compressed-tensors": compressed_options,
    "dense": dense_options,
    "exl2": exl2_options,
    "fp8": fp8_options,
    "gptq": gptq_options,
}


@st.composite
def weights(draw: st.DrawFn) -> Weight:
    """A weight of any format, with any of its options, of a few hundred elements to a few thousand."""
    name = draw(st.sampled_from(sorted(FORMATS)))
    in_features = draw(st.sampled_from([32, 64, 96, 160, 256, *([50] if name in ANY_LENGTH else [])]))
    out_features = draw(st.sampled_from(COLUMNS.get(name, [8, 20, 24])))
    seed = draw(seeds)
    bias = random_tensor(out_features, seed=seed + 1, dtype=torch.float16) if draw(st.booleans()) else None
    w = random_tensor(in_features, out_features, seed=seed, scale=0.1) + draw(st.sampled_from([0.0, 0.05, -0.3]))
    return FORMATS[name].quantize(w, bias=bias, **draw(OPTIONS[name](in_features)))


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for suffix, tensor in a.items():
        assert tensor.dtype == b[suffix].dtype
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), b[suffix].reshape(-1).view(torch.uint8))


def assert_means(operand: Operand, weight: Weight) -> None:
    matrix = matrix_of(operand)
    # EXL2 defines the fp16 rounding of code times scale, the one thing that its operands leave out.
    assert torch.equal(matrix.half().float() if isinstance(weight, EXL2Weight) else matrix, weight.dequantize())


def test_every_format_has_options() -> None:
    assert OPTIONS.keys() == FORMATS.keys()


@given(weight=weights())
def test_read_takes_back_what_tensors_gives(weight: Weight) -> None:
    source = stored_as(weight, "model.layers.3.mlp.up_proj")
    chosen = weight_class(source.quant_config, "model.layers.3.mlp.up_proj", source)
    assert chosen is type(weight)
    again = chosen.read(source, "model.layers.3.mlp.up_proj")
    assert_same(again.tensors(), weight.tensors())
    assert again.shape == weight.shape
    assert again.quant_config == weight.quant_config
    assert torch.equal(again.dequantize(), weight.dequantize())


@given(weight=weights())
def test_operand_means_the_same_matrix(weight: Weight) -> None:
    operand = weight.operand(CPU, torch.float32)
    assert (operand.in_features, operand.out_features) == weight.shape
    assert_means(operand, weight)


@given(weight=weights(), data=st.data())
def test_slices_commute_with_dequantize(weight: Weight, data: st.DataObject) -> None:
    dim = data.draw(st.sampled_from(["in", "out"]))
    cuts = weight.cuts(dim)
    if not cuts:
        return
    axis = 0 if dim == "in" else 1
    start, stop = sorted((data.draw(st.sampled_from(cuts)), data.draw(st.sampled_from(cuts))))
    part = weight.slice(dim, start, stop)
    assert part.shape[axis] == stop - start
    assert torch.equal(part.dequantize(), weight.dequantize().narrow(axis, start, stop - start))
    assert_means(part.operand(CPU, torch.float32), part)
    if weight.bias is not None:
        assert part.bias is not None
        assert torch.equal(part.bias, weight.bias if dim == "in" else weight.bias[start:stop])


@given(weight=weights(), dim=st.sampled_from(["in", "out"]), data=st.data())
def test_an_empty_slice_is_an_empty_matrix(weight: Weight, dim: str, data: st.DataObject) -> None:
    cuts = weight.cuts(dim)
    if not cuts:
        return
    at = data.draw(st.sampled_from(cuts))
    part = weight.slice(dim, at, at)
    in_features, out_features = weight.shape
    assert part.shape == ((0, out_features) if dim == "in" else (in_features, 0))
    assert part.dequantize().shape == part.shape
    assert matrix_of(part.operand(CPU, torch.float32)).shape == part.shape


@given(weight=weights(), dim=st.sampled_from(["in", "out"]))
def test_the_slices_join_to_the_whole(weight: Weight, dim: str) -> None:
    cuts = weight.cuts(dim)
    if not cuts:
        return
    length = weight.shape[0 if dim == "in" else 1]
    assert list(cuts) == sorted(set(cuts))
    assert (cuts[0], cuts[-1]) == (0, length)
    parts = [weight.slice(dim, start, stop) for start, stop in pairwise(cuts)]
    assert torch.equal(
        torch.cat([part.dequantize() for part in parts], dim=0 if dim == "in" else 1), weight.dequantize()
    )
    if dim == "out":
        whole = join([part.operand(CPU, torch.float32) for part in parts])
        assert whole is not None
        assert_means(whole, weight)


@given(weight=weights(), dim=st.sampled_from(["in", "out"]), data=st.data())
def test_a_slice_reads_back_from_a_file(weight: Weight, dim: str, data: st.DataObject) -> None:
    cuts = weight.cuts(dim)
    if not cuts:
        return
    start, stop = sorted((data.draw(st.sampled_from(cuts)), data.draw(st.sampled_from(cuts))))
    part = weight.slice(dim, start, stop)
    again = type(part).read(stored_as(part, "part"), "part")
    assert torch.equal(again.dequantize(), part.dequantize())


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_cuts_are_respected(name: str) -> None:
    weight = FORMATS[name].quantize(random_tensor(256, 16, seed=0))
    for start, stop in ((1, -1), (8, 0), (0, 300)):
        with pytest.raises(ValueError, match="a slice along 'out' must lie between two of the cuts"):
            weight.slice("out", start, stop)


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize(
    ("w", "error", "text"),
    [
        (torch.full((256, 16), float("nan")), ValueError, "must be finite"),
        (torch.full((256, 16), 1e30), ValueError, "w must"),
        (torch.zeros(256, 16, dtype=torch.int32), TypeError, "must be a floating-point tensor"),
        (torch.zeros(256), ValueError, "w must be"),
    ],
)
def test_quantize_refuses_impossible_matrices(name: str, w: Tensor, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        FORMATS[name].quantize(w)


def test_join_agrees_or_declines() -> None:
    def planes(out_features: int = 8, seed: int = 0, **options: Any) -> PlaneOperand:
        operand = FORMATS["gptq"].quantize(random_tensor(128, out_features, seed=seed) + 0.5, **options)
        made = operand.operand(CPU, torch.float32)
        assert isinstance(made, PlaneOperand)
        return made

    def dense(dtype: torch.dtype) -> Operand:
        return FORMATS["dense"].quantize(random_tensor(128, 8, seed=1)).operand(CPU, dtype)

    symmetric, asymmetric = planes(seed=1), planes(16, seed=2, symmetric=False)
    assert symmetric.offsets is None
    assert asymmetric.offsets is not None
    mixed = join([symmetric, asymmetric, symmetric])
    assert mixed is not None
    assert mixed.out_features == 32
    assert torch.equal(matrix_of(mixed), torch.cat([matrix_of(o) for o in (symmetric, asymmetric, symmetric)], dim=1))
    assert join([symmetric]) is symmetric
    assert join([symmetric, planes(group_size=64)]) is None
    assert join([symmetric, dense(torch.float16)]) is None
    assert join([dense(torch.float16), dense(torch.float32)]) is None
    assert join([dense(torch.float16), dense(torch.float16)]) is not None

    order = torch.randperm(128)
    ordered = planes(group_size=32, act_order=order)
    assert join([ordered, planes(group_size=32)]) is None
    assert join([ordered, planes(group_size=32, act_order=order.flip(0))]) is None
    together = join([ordered, planes(group_size=32, seed=5, act_order=order)])
    assert together is not None
    assert together.order is ordered.order
    with pytest.raises(ValueError, match="operands must hold at least one"):
        join([])


def test_join_of_segments_agrees_or_declines() -> None:
    def segments(seed: int, *, group_size: int = 32, flip: bool = False, **bits: float) -> SegmentedOperand:
        widths = {int(name[1:]): share for name, share in bits.items()} or {5: 0.25, 3: 0.75}
        order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
        w = random_tensor(256, 32, seed=seed)
        weight = EXL2Weight.quantize(
            w, bits=widths, group_size=group_size, permutation=order.flip(0) if flip else order
        )
        operand = weight.operand(CPU, torch.float16)
        assert isinstance(operand, SegmentedOperand)
        return operand

    parts = [segments(0), segments(1), segments(2)]
    whole = join(parts)
    assert isinstance(whole, SegmentedOperand)
    assert (whole.in_features, whole.out_features) == (256, 96)
    assert [segment.bits for segment in whole.segments] == [5, 3]
    assert whole.order is parts[0].order
    assert torch.equal(matrix_of(whole), torch.cat([matrix_of(part) for part in parts], dim=1))
    assert whole.nbytes == sum(part.nbytes for part in parts)
    assert join([parts[0], segments(1, flip=True)]) is None
    assert join([parts[0], segments(1, group_size=64)]) is None
    assert join([parts[0], segments(1, b5=0.5, b3=0.5)]) is None
    assert join([parts[0], segments(1, b5=0.25, b2=0.75)]) is None
    assert join([parts[0], segments(1, b6=0.25, b5=0.25, b3=0.5)]) is None
    assert join([parts[0], parts[0].segments[0]]) is None
