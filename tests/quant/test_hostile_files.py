"""Damaged and unknown weights: each is refused with the file, the tensor and the reason, or with what would work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qinfer.errors import CheckpointError, UnsupportedError
from qinfer.quant import DenseWeight, GPTQWeight, weight_class
from tests.quant.memory_source import MemorySource, stored_as
from tests.strategies import random_tensor

NAME = "model.layers.0.self_attn.q_proj"


def source() -> MemorySource:
    order = torch.arange(127, -1, -1)
    weight = GPTQWeight.quantize(random_tensor(128, 16, seed=0), group_size=32, act_order=order, bias=torch.zeros(16))
    return stored_as(weight, NAME)


def set_to(tensor: Tensor, index: Any, value: float) -> Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


DAMAGE: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    ("qweight", lambda t: t[:-4], "shape must be"),
    ("qweight", lambda t: t.reshape(-1), r"shape must be \[any, any\], got \[256\]"),
    ("qweight", lambda t: t.to(torch.int64), "dtype must be int32, got int64"),
    ("qzeros", lambda t: t[:-1], r"shape must be \[4, 2\], got \[3, 2\]"),
    ("qzeros", lambda t: t.repeat(1, 2), "stands for 8 bits, quantization_config says 4"),
    ("qzeros", lambda t: t.repeat(1, 3), r"shape must be \[4, 2\], got \[4, 6\]"),
    ("qzeros", lambda t: t.to(torch.int16), "dtype must be int32, got int16"),
    ("scales", lambda t: t.T.contiguous(), r"shape must be \[4, 16\], got \[16, 4\]"),
    ("scales", lambda t: t.double(), "dtype must be float16 or bfloat16 or float32, got float64"),
    ("scales", lambda t: set_to(t.float(), (1, 2), -7e4), "rounded to fp16, and one of them is beyond 65,504"),
    ("scales", lambda t: set_to(t.float(), (1, 2), float("nan")), "NaN or infinite"),
    ("g_idx", lambda t: torch.zeros_like(t), "all zero, and quantization_config says desc_act"),
    ("scales", lambda t: set_to(t, (2, 3), float("nan")), "NaN or infinite"),
    ("scales", lambda t: set_to(t, (0, 0), float("inf")), "NaN or infinite"),
    ("scales", lambda t: set_to(t, (3, 15), float("-inf")), "NaN or infinite"),
    ("g_idx", lambda t: t[8:], r"shape must be \[128\], got \[120\]"),
    ("g_idx", lambda t: t.float(), "dtype must be int32, got float32"),
    ("g_idx", lambda t: set_to(t, 5, 4), "groups must be 0 to 3, got 4"),
    ("g_idx", lambda t: set_to(t, 5, -1), "groups must be 0 to 3, got -1"),
    ("g_idx", lambda t: set_to(t, 5, 2**31 - 1), "groups must be 0 to 3, got 2147483647"),
    ("g_idx", lambda t: set_to(t, 127, 1), r"\[31, 32, 33\] features; kernels need whole runs of 16"),
    ("bias", lambda t: t[:8], r"shape must be \[16\], got \[8\]"),
    ("bias", lambda t: t.to(torch.int32), "dtype must be float16 or bfloat16 or float32"),
    ("bias", lambda t: set_to(t, 0, float("nan")), "NaN or infinite"),
]


@pytest.mark.parametrize(("suffix", "damage", "text"), DAMAGE)
def test_a_damaged_tensor_is_named(suffix: str, damage: Callable[[Tensor], Tensor], text: str) -> None:
    good = source()
    assert GPTQWeight.read(good, NAME).shape == (128, 16)
    bad = MemorySource({**good.stored, f"{NAME}.{suffix}": damage(good.stored[f"{NAME}.{suffix}"])}, good.quant_config)
    with pytest.raises(CheckpointError, match=text) as caught:
        GPTQWeight.read(bad, NAME)
    assert caught.value.file == "memory.safetensors"
    # A shorter qweight is a smaller matrix, so the first tensor that contradicts it is the one to be named.
    contradicted = ("qzeros",) if suffix == "qweight" and "any" not in text and "dtype" not in text else (suffix,)
    assert caught.value.tensor in {f"{NAME}.{name}" for name in contradicted}


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_a_missing_tensor_is_named(suffix: str) -> None:
    good = source()
    rest = {name: tensor for name, tensor in good.stored.items() if name != f"{NAME}.{suffix}"}
    with pytest.raises(CheckpointError, match="missing") as caught:
        GPTQWeight.read(MemorySource(rest, good.quant_config), NAME)
    assert caught.value.tensor == f"{NAME}.{suffix}"


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"bits": 2}, CheckpointError, "stands for 4 bits, quantization_config says 2"),
        ({"bits": 3}, CheckpointError, "3-bit codes beside a g_idx of 128 features must fill whole words, got 16 rows"),
        ({"bits": 8}, CheckpointError, r"q_proj\.qzeros: .* stands for 4 bits, quantization_config says 8"),
        ({"bits": 5}, UnsupportedError, "5-bit GPTQ weights; bits that work: 2, 3, 4, 8"),
        ({"bits": 16}, UnsupportedError, "bits that work: 2, 3, 4, 8"),
        ({"bits": "4"}, CheckpointError, "bits must be an integer, got '4'"),
        ({"bits": None}, CheckpointError, "bits must be an integer"),
        ({"bits": True}, CheckpointError, "bits must be an integer"),
        ({"group_size": None}, CheckpointError, "group_size must be an integer"),
        ({"group_size": 0}, UnsupportedError, "what works: 16, multiples of 32, -1"),
        ({"group_size": 48}, UnsupportedError, "what works: 16, multiples of 32, -1"),
        ({"group_size": -128}, UnsupportedError, "what works: 16, multiples of 32, -1"),
        ({"group_size": 64}, CheckpointError, r"qzeros: shape must be \[2, 2\], got \[4, 2\]"),
        ({"checkpoint_format": "marlin"}, UnsupportedError, "'marlin' is unknown; what works: gptq, gptq_v2"),
        ({"checkpoint_format": None, "format": "gptq_p"}, UnsupportedError, "'gptq_p' is unknown"),
        ({"pack_dtype": "int64"}, UnsupportedError, "pack_dtype 'int64' is unknown; what works: int32"),
        ({"desc_act": "yes"}, CheckpointError, "desc_act must be true or false, got 'yes'"),
        ({"dynamic": ["k_proj"]}, CheckpointError, "dynamic must be an object"),
        ({"dynamic": {"+:(": {}}}, CheckpointError, "invalid pattern"),
        ({"dynamic": {".*": 8}}, CheckpointError, "must be an object, got 8"),
        ({"dynamic": {r"+:.*\.q_proj": {"bits": 8}}}, CheckpointError, "quantization_config says 8"),
        ({"dynamic": {r"+:.*\.q_proj": {"bits": 7}}}, UnsupportedError, "7-bit GPTQ weights"),
        ({"dynamic": {r"-:.*\.q_proj": {}}}, CheckpointError, "says that this module is not quantized"),
    ],
)
def test_options_that_do_not_work(options: dict[str, Any], error: type[Exception], text: str) -> None:
    good = source()
    assert good.quant_config is not None
    with pytest.raises(error, match=text):
        GPTQWeight.read(MemorySource(good.stored, {**good.quant_config, **options}), NAME)


@pytest.mark.parametrize(("group_size", "desc_act", "works"), [(32, True, False), (32, False, True), (-1, True, True)])
def test_an_order_that_nothing_tells_is_refused(group_size: int, desc_act: bool, works: bool) -> None:
    w = random_tensor(128, 16, seed=0)
    good = stored_as(GPTQWeight.quantize(w, group_size=group_size), NAME)
    assert f"{NAME}.g_idx" not in good
    assert good.quant_config is not None
    silent = MemorySource(good.stored, {**good.quant_config, "desc_act": desc_act})
    if works:
        assert torch.equal(GPTQWeight.read(silent, NAME).dequantize(), GPTQWeight.read(good, NAME).dequantize())
        return
    with pytest.raises(CheckpointError, match=r"missing, and .* desc_act: .* only g_idx") as caught:
        GPTQWeight.read(silent, NAME)
    assert caught.value.tensor == f"{NAME}.g_idx"


def test_dynamic_overrides_reach_the_modules_that_match() -> None:
    good = source()
    assert good.quant_config is not None
    # A pattern has to match from the start of the name, and the first that does counts.
    dynamic = {
        "q_proj": {"bits": 7},
        r".*\.v_proj": {"bits": 8},
        r"+:model\.layers\.0\..*": {"group_size": 32},
        ".*": {"bits": 2},
    }
    read = GPTQWeight.read(
        MemorySource(good.stored, {**good.quant_config, "group_size": 128, "dynamic": dynamic}), NAME
    )
    assert read.group_size == 32


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda t: t[0], r"shape must be \[any, any\]"),
        (lambda t: t.to(torch.float8_e4m3fn), "got float8_e4m3fn"),
        (lambda t: set_to(t, (1, 2), float("nan")), "NaN or infinite"),
    ],
)
def test_a_damaged_dense_matrix_is_named(damage: Callable[[Tensor], Tensor], text: str) -> None:
    with pytest.raises(CheckpointError, match=text) as caught:
        DenseWeight.read(MemorySource({"lm_head.weight": damage(torch.ones(8, 4))}), "lm_head")
    assert caught.value.tensor == "lm_head.weight"


def test_a_missing_dense_matrix_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: the tensor is missing"):
        DenseWeight.read(MemorySource({}), "lm_head")


def test_weight_class_looks_at_the_method_and_at_the_tensors() -> None:
    dense, packed = torch.ones(8, 4), torch.zeros(4, 8, dtype=torch.int32)
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    assert weight_class(None, "m", MemorySource({"m.weight": dense})) is DenseWeight
    assert weight_class(gptq, "m", MemorySource({"m.weight": dense}, gptq)) is DenseWeight
    assert weight_class(gptq, "m", MemorySource({"m.qweight": packed}, gptq)) is GPTQWeight
    both = {"m.weight": dense, "m.qweight": packed}
    assert weight_class(gptq, "m", MemorySource(both, gptq)) is GPTQWeight
    excluded = {**gptq, "dynamic": {"-:m": {}}}
    assert weight_class(excluded, "m", MemorySource(both, excluded)) is DenseWeight
    assert weight_class(excluded, "n", MemorySource({"n.qweight": packed}, excluded)) is GPTQWeight
    with pytest.raises(CheckpointError, match=r"m\.qweight: the tensor is missing"):
        weight_class(gptq, "m", MemorySource({"m.scales": dense}, gptq))


@pytest.mark.parametrize("method", ["hqq", "mxfp4", "dense", None, ["gptq"]])
def test_an_unknown_method_says_what_works(method: object) -> None:
    works = "awq, compressed-tensors, exl2, fp8, gptq, or none at all"
    with pytest.raises(UnsupportedError, match=f"is not supported; what works: {works}") as caught:
        weight_class({"quant_method": method}, "m", MemorySource({}))
    assert repr(method) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "shape", "text"),
    [
        ({"bits": 5}, (64, 8), r"bits must be one of \[2, 3, 4, 8\], got 5"),
        ({"group_size": 48}, (64, 8), "group_size must be one of 16, multiples of 32, -1, got 48"),
        ({"zero_format": "v3"}, (64, 8), "zero_format must be one of"),
        ({"act_order": torch.zeros(64, dtype=torch.int64)}, (64, 8), "act_order must hold each of 64 features once"),
        ({"act_order": torch.arange(32)}, (64, 8), "act_order must hold each of 64 features once"),
    ],
)
def test_quantize_options_that_do_not_work(options: dict[str, Any], shape: tuple[int, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        GPTQWeight.quantize(torch.ones(shape), **options)
