"""The matrix product over every operand and route."""

from __future__ import annotations

import gc

import pytest
import torch

from qinfer.errors import UnsupportedError
from qinfer.kernels import matmul as module
from qinfer.kernels.dequant import dequantize
from qinfer.kernels.matmul import matmul, matmul_parts
from qinfer.kernels.operand import FIELDS, DenseOperand
from qinfer.kernels.parts import add_up
from qinfer.kernels.tiles import (
    FUSED_ROWS,
    Product,
    Tile,
    shared_bytes,
    trial,
)
from tests.compare import assert_close
from tests.kernels.operands import plane_operand, segmented_operand
from tests.strategies import random_tensor

MANY_ROWS = 513  # more than any tile is for


def test_reference_is_the_product_with_the_dequantized_matrix() -> None:
    operand = plane_operand(256, 24, group_size=64, symmetric=False)
    x, bias = random_tensor(5, 256, seed=1), random_tensor(24, seed=2)
    weight = dequantize.reference(operand.planes[0], operand, dtype=torch.float32).double()
    assert_close(matmul.reference(x, operand, bias=bias), x.double() @ weight.t() + bias.double(), torch.float32)


def test_reference_keeps_dequantized_matrices_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(module._kept)
    x, first, second = random_tensor(1, 128, seed=0), plane_operand(128, 8, seed=1), plane_operand(128, 8, seed=2)
    monkeypatch.setattr(module, "MAX_SCRATCH", 128 * 8 + sum(weight.numel() for weight in module._kept.values()))
    expected = [matmul.reference(x, operand) for operand in (first, second)]
    assert len(module._kept) == before + 1, "only the first fits"
    assert torch.equal(matmul.reference(x, first), expected[0])
    assert not torch.equal(*expected)
    del first
    gc.collect()
    assert len(module._kept) == before, "a matrix must not outlive its planes"


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("m", "k", "n", "group_size", "symmetric"),
    [
        (1, 256, 128, 128, True),
        (1, 128, 72, 32, True),
        (3, 384, 64, 64, False),
        (17, 256, 40, 128, False),
        (2, 160, 136, -1, True),
        (16, 96, 8, 32, False),
        (33, 512, 64, 256, True),
        (1, 160, 16, 32, False),
        (1, 192, 16, 64, False),
        (64, 128, 64, 128, True),
    ],
)
def test_matches_reference(
    device: torch.device, dtype: torch.dtype, m: int, k: int, n: int, group_size: int, symmetric: bool
) -> None:
    operand = plane_operand(k, n, group_size=group_size, symmetric=symmetric, device=device)
    x = random_tensor(m, k, seed=m, dtype=dtype).to(device)
    bias = random_tensor(n, seed=n, dtype=dtype).to(device)
    assert_close(matmul.launch(x, operand), matmul.reference(x, operand))
    actual = matmul.launch(x, operand, bias=bias, out_dtype=torch.float32)
    assert actual.dtype == torch.float32
    assert_close(actual, matmul.reference(x, operand, bias=bias, out_dtype=torch.float32))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", FIELDS)
@pytest.mark.parametrize(("k", "group_size"), [(256, 128), (416, 32), (192, 16), (352, 96)])
def test_every_width_matches_reference(
    device: torch.device, bits: int, dtype: torch.dtype, k: int, group_size: int
) -> None:
    operand = plane_operand(k, 40, bits=bits, group_size=group_size, symmetric=bits % 2 == 0, device=device)
    x = random_tensor(3, k, seed=bits, dtype=dtype).to(device)
    for tile in (None, Tile(16, 64, 2, 4, 2), Tile(8, 64, 2, 4, 2)):
        assert_close(matmul.launch(x, operand, tile=tile), matmul.reference(x, operand))


@pytest.mark.kernel
@pytest.mark.parametrize("m", [1, 20, FUSED_ROWS + 1])
@pytest.mark.parametrize("split_k", [None, 1, 5])
def test_segments_of_mixed_widths_match_reference(device: torch.device, m: int, split_k: int | None) -> None:
    operand = segmented_operand([(8, 32), (6, 64), (5, 32), (4, 160), (3, 96), (2, 48)], 40, device=device)
    x = random_tensor(m, operand.in_features, seed=m, dtype=torch.float16).to(device)
    bias = random_tensor(40, seed=1, dtype=torch.float16).to(device)
    tile = None if split_k is None else Tile(32, 64, split_k, 4, 2)
    expected = matmul.reference(x, operand, bias=bias)
    first = matmul.launch(x, operand, bias=bias, tile=tile)
    assert_close(first, expected)
    assert torch.equal(matmul.launch(x, operand, bias=bias, tile=tile), first)


@pytest.mark.kernel
@pytest.mark.parametrize("split_k", [1, 3])
def test_parts_add_up_to_the_product(device: torch.device, split_k: int) -> None:
    operand = plane_operand(512, 72, device=device)
    x = random_tensor(19, 512, seed=0, dtype=torch.float16).to(device)
    bias = random_tensor(72, seed=1, dtype=torch.float16).to(device)
    tile = Tile(16, 64, split_k, 4, 3)
    parts = matmul_parts.launch(x, operand, bias=bias, out_dtype=torch.float32, tile=tile)
    assert parts.shape == (split_k, 19, 72)
    assert parts.dtype == torch.float32
    product = matmul.launch(x, operand, bias=bias, out_dtype=torch.float32, tile=tile)
    assert torch.equal(add_up(parts), product)
    assert_close(product, matmul_parts.reference(x, operand, bias=bias, out_dtype=torch.float32)[0], torch.float16)


@pytest.mark.kernel
def test_one_part_has_the_dtype_of_the_result(device: torch.device) -> None:
    operand = plane_operand(256, 64, device=device)
    x = random_tensor(3, 256, seed=0, dtype=torch.float16).to(device)
    tile = Tile(16, 64, 1, 4, 3)
    assert matmul_parts.launch(x, operand, tile=tile).dtype == torch.float16
    assert matmul_parts.launch(x[:0], operand).shape == (1, 0, 64)


def test_segments_must_fit_each_other() -> None:
    operand = segmented_operand([(4, 48), (2, 32)], 8)
    with pytest.raises(ValueError, match=r"segments\[0\] must have a multiple of 32 inputs, got 48"):
        matmul(torch.zeros(1, 80), operand)


@pytest.mark.kernel
@pytest.mark.parametrize(
    "tile",
    [
        Tile(8, 64, 3, 2, 3),
        Tile(8, 128, 1, 4, 4),
        Tile(16, 64, 1, 4, 3),
        Tile(16, 64, 2, 2, 3),
        Tile(16, 128, 2, 4, 4),
        Tile(32, 64, 3, 4, 3),
        Tile(64, 128, 2, 8, 3),
        Tile(16, 64, 5, 4, 5),
    ],
    ids=str,
)
def test_every_tile_gives_the_same_product(device: torch.device, tile: Tile) -> None:
    operand = plane_operand(4 * 128, 72, group_size=128, symmetric=False, device=device)
    x = random_tensor(19, 512, seed=0, dtype=torch.float16).to(device)
    first = matmul.launch(x, operand, tile=tile)
    assert_close(first, matmul.reference(x, operand))
    for _ in range(1 if device.type == "cpu" else 20):
        assert torch.equal(matmul.launch(x, operand, tile=tile), first), "two runs must agree bit for bit"


def _on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "arch", lambda _: "sm_90")
    monkeypatch.setattr(module, "num_sms", lambda _: 132)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", FIELDS)
def test_scaled_weights_are_exactly_those_of_dequantize(device: torch.device, bits: int, dtype: torch.dtype) -> None:
    k, group_size = (96, 16) if bits in (4, 5) else (96, 32)
    scale_dtype = torch.bfloat16 if bits in (3, 8) else torch.float16
    # One feature per row of x, so a product is one weight, and no sum hides how it was rounded.
    operand = plane_operand(
        k, 40, bits=bits, group_size=group_size, symmetric=bits % 2 == 0, device=device, scale_dtype=scale_dtype
    )
    x = torch.eye(k, dtype=dtype, device=device)
    tile = Tile(32 if bits in (3, 5) else 128, 64, 1, 4, 2, scaled=True)  # steps of 512 features take much of x
    weights = matmul.launch(x, operand, out_dtype=torch.float32, tile=tile)
    expected = dequantize.launch(operand.planes[0], operand, dtype=dtype)
    assert torch.equal(weights, expected.t().float())


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tile", [Tile(128, 128, 2, 8, 3, scaled=True), Tile(64, 128, 1, 4, 2, scaled=True)], ids=str)
def test_products_of_scaled_weights_are_those_of_the_dequantized_matrix(
    device: torch.device, dtype: torch.dtype, tile: Tile
) -> None:
    operand = plane_operand(640, 136, group_size=64, symmetric=False, device=device)
    x = random_tensor(70, 640, seed=0, dtype=dtype).to(device)
    weight = dequantize.launch(operand.planes[0], operand, dtype=dtype)
    expected = x.double() @ weight.t().double()
    # Both multiply the same rounded weights; only the order of fp32 sums differs.
    assert_close(matmul.launch(x, operand, out_dtype=torch.float32, tile=tile), expected, torch.float32)
    assert_close(matmul.launch(x, operand, tile=tile), matmul.reference(x, operand))


@pytest.mark.kernel
@pytest.mark.parametrize("m", [16, 64, 65, 128, 256, 257])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_routes_of_all_rows_agree(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, m: int, mixed: bool
) -> None:
    _on_hopper(monkeypatch)
    operand = (
        segmented_operand([(5, 64), (4, 160), (3, 32)], 40, device=device)
        if mixed
        else plane_operand(256, 40, symmetric=False, device=device)
    )
    x = random_tensor(m, 256, seed=m, dtype=torch.float16).to(device)
    assert_close(matmul.launch(x, operand), matmul.reference(x, operand))


@pytest.mark.parametrize(("bits", "last"), [(2, 256), (3, 128), (4, 256), (5, 128), (6, 256), (8, 256)])
def test_many_rows_have_a_tile_where_that_was_measured(monkeypatch: pytest.MonkeyPatch, bits: int, last: int) -> None:
    segments = (plane_operand(256, 40, bits=bits),)
    device = torch.device("cpu")
    assert module.tile_of(segments, device, FUSED_ROWS) is not None
    assert module.tile_of(segments, device, FUSED_ROWS + 1) is None
    _on_hopper(monkeypatch)
    tile = module.tile_of(segments, device, last)
    assert tile is not None
    assert tile.scaled
    assert module.tile_of(segments, device, last + 1) is None
    key = Product(bits, 128, 512, 40, 256)
    with trial("sm_90", {key: tile}):
        assert module.tile_of(segments, device, last + 1) == (tile if last == 256 else None)
        assert module.tile_of((plane_operand(256, 40, bits=bits, symmetric=False),), device, 512) is None
    with trial("sm_90", {key: Tile(64, 128, 1, 4, 3)}):
        assert module.tile_of((plane_operand(256, 40, bits=bits, symmetric=False),), device, 512) is not None


def test_a_tile_that_is_miscompiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "arch", lambda _: "sm_100")
    operand, x = plane_operand(128, 8), torch.zeros(1, 128)
    for product in (matmul, matmul_parts):
        with pytest.raises(UnsupportedError, match="scaled=False work"):
            product(x, operand, tile=Tile(64, 128, 1, 4, 2, scaled=True))
        assert product(x, operand, tile=Tile(64, 128, 1, 4, 2)).shape[-1] == 8


def test_short_segments_are_as_deep_as_the_longest_allows() -> None:
    tile, single = Tile(16, 128, 4, 4, 2), plane_operand(128, 8)
    assert module._stages(tile, (single,)) == (2,)
    operand = segmented_operand([(5, 512), (4, 512), (3, 512)], 8)
    stages = module._stages(tile, operand.segments)
    most = shared_bytes(5, 16, 128, 2)
    assert stages[0] == 2 < stages[1]
    assert all(shared_bytes(s.bits, 16, 128, d) <= most for s, d in zip(operand.segments, stages, strict=True))
    assert stages[1] == module.MAX_STAGES or shared_bytes(4, 16, 128, stages[1] + 1) > most


@pytest.mark.kernel
def test_large_m_route_agrees_with_the_fused_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    operand = plane_operand(256, 72, group_size=32, symmetric=False, device=device)
    x = random_tensor(MANY_ROWS, 256, seed=0, dtype=torch.float16).to(device)
    bias = random_tensor(72, seed=2, dtype=torch.float16).to(device)
    expected = matmul.reference(x, operand, bias=bias)
    assert_close(matmul.launch(x, operand, bias=bias), expected)
    assert_close(matmul.launch(x, operand, bias=bias, tile=Tile(64, 128, 1, 4, 3)), expected)
    monkeypatch.setattr(module, "MAX_SCRATCH", 256 * 20)
    assert_close(matmul.launch(x, operand, bias=bias), expected)


@pytest.mark.kernel
@pytest.mark.parametrize("m", [1, MANY_ROWS])
def test_out_may_be_a_slice_of_columns(device: torch.device, m: int) -> None:
    operand = plane_operand(128, 40, device=device)
    x = random_tensor(m, 128, seed=0, dtype=torch.float16).to(device)
    wide = torch.full((m, 100), 7.0, dtype=torch.float16, device=device)
    result = matmul.launch(x, operand, out=wide[:, 30:70])
    assert result.data_ptr() == wide[:, 30:70].data_ptr()
    assert_close(wide[:, 30:70], matmul.reference(x, operand))
    assert bool((wide[:, :30] == 7).all())
    assert bool((wide[:, 70:] == 7).all())


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_dense_matches_reference(device: torch.device, dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    operand = DenseOperand(random_tensor(48, 64, seed=1, dtype=dtype).to(device))
    x = random_tensor(5, 64, seed=2, dtype=dtype).to(device)
    bias = random_tensor(48, seed=3, dtype=dtype).to(device)
    actual = matmul.launch(x, operand, bias=bias, out_dtype=out_dtype)
    # The bias is added to an already rounded product, hence two roundings.
    assert_close(actual, matmul.reference(x, operand, bias=bias, out_dtype=out_dtype))


@pytest.mark.kernel
@pytest.mark.parametrize("m", [1, MANY_ROWS])
@pytest.mark.parametrize("is_packed", [False, True])
def test_fp16_rows_give_bf16_by_one_rounding(device: torch.device, m: int, is_packed: bool) -> None:
    """Numbers of more bits than bf16 has add up to what is too large for fp16; sums of four are exact in fp32."""
    plain = torch.eye(64).repeat(1, 4)
    operand = plane_operand(256, 64, device=device) if is_packed else DenseOperand(plain.half().to(device))
    x = (torch.randint(1024, 2048, (m, 256)) * 32 - 32).half().to(device)
    actual = matmul.launch(x, operand, out_dtype=torch.bfloat16)
    exact = matmul.reference(x, operand, out_dtype=torch.float32)
    assert float(exact.abs().max()) > 65504
    if is_packed:
        assert_close(actual, exact)
    else:
        assert torch.equal(actual, exact.bfloat16())
        assert not torch.equal(actual, matmul.reference(x.bfloat16(), operand))


@pytest.mark.kernel
def test_results_beyond_fp16_are_kept_in_fp32(device: torch.device) -> None:
    operand = plane_operand(256, 16, device=device)
    for m in (1, MANY_ROWS):
        x = torch.full((m, 256), 3e4, dtype=torch.float16, device=device)
        expected = matmul.reference(x, operand, out_dtype=torch.float32)
        assert float(expected.abs().max()) > 65504
        assert_close(matmul.launch(x, operand, out_dtype=torch.float32), expected, torch.float16)


def test_empty_inputs_have_the_right_shape() -> None:
    assert matmul(torch.zeros(0, 128), plane_operand(128, 8)).shape == (0, 8)
    assert matmul.launch(torch.zeros(0, 128), plane_operand(128, 8)).shape == (0, 8)
    assert matmul.launch(torch.zeros(3, 128), plane_operand(128, 0)).shape == (3, 0)


def test_wrong_arguments_are_named() -> None:
    operand = plane_operand(128, 8)
    with pytest.raises(ValueError, match=r"x must be \[M, 128\] .* got \[2, 64\]"):
        matmul(torch.zeros(2, 64), operand)
    with pytest.raises(TypeError, match=r"x must be floating point, got torch.int32"):
        matmul(torch.zeros(2, 128, dtype=torch.int32), operand)
    with pytest.raises(ValueError, match=r"bias must be \[8\], got \[9\]"):
        matmul(torch.zeros(2, 128), operand, bias=torch.zeros(9))
    with pytest.raises(ValueError, match=r"out must be \[2, 8\] .* got \[2, 9\]"):
        matmul(torch.zeros(2, 128), operand, out=torch.zeros(2, 9))
    with pytest.raises(TypeError, match="out_dtype must be that of out"):
        matmul(torch.zeros(2, 128), operand, out=torch.zeros(2, 8), out_dtype=torch.float16)
