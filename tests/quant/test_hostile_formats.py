"""Damaged and foreign weights of AWQ, compressed-tensors and FP8, and formats that only their tensors give away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qinfer.errors import CheckpointError, UnsupportedError
from qinfer.quant import FORMATS, AWQWeight, CompressedWeight, DenseWeight, FP8Weight, Weight, weight_class
from tests.quant.memory_source import MemorySource, stored_as
from tests.quant.test_hostile_files import set_to
from tests.strategies import random_tensor

NAME = "model.layers.0.self_attn.q_proj"
NAN, INF = float("nan"), float("inf")


def make(method: str) -> Weight:
    w, bias = random_tensor(128, 16, seed=0), torch.zeros(16)
    if method == "awq":
        return AWQWeight.quantize(w, group_size=32, bias=bias)
    if method == "fp8":
        return FP8Weight.quantize(w, block=(8, 64), bias=bias)
    order = torch.arange(127, -1, -1)
    return CompressedWeight.quantize(w, group_size=32, symmetric=False, act_order=order, bias=bias)


DAMAGE: list[tuple[str, str, Callable[[Tensor], Tensor | None], str]] = [
    ("awq", "qweight", lambda t: t.reshape(-1), r"shape must be \[any, any\]"),
    ("awq", "qweight", lambda t: t.to(torch.int64), "dtype must be int32, got int64"),
    ("awq", "qzeros", lambda t: t[:-1], r"shape must be \[4, 2\], got \[3, 2\]"),
    ("awq", "qzeros", lambda t: t.half(), "dtype must be int32, got float16"),
    ("awq", "qzeros", lambda t: None, "the tensor is missing"),
    ("awq", "scales", lambda t: t[:, :8], r"shape must be \[4, 16\], got \[4, 8\]"),
    ("awq", "scales", lambda t: t.float(), "dtype must be float16 or bfloat16"),
    ("awq", "scales", lambda t: set_to(t, (1, 2), NAN), "NaN or infinite"),
    ("awq", "scales", lambda t: set_to(t, (3, 15), -INF), "NaN or infinite"),
    ("awq", "scales", lambda t: None, "the tensor is missing"),
    ("awq", "bias", lambda t: set_to(t, 0, NAN), "NaN or infinite"),
    ("compressed-tensors", "weight_packed", lambda t: t[:, 1:], r"shape must be \[16, 16\], got \[16, 15\]"),
    ("compressed-tensors", "weight_packed", lambda t: t.to(torch.uint8), "dtype must be int32, got uint8"),
    ("compressed-tensors", "weight_scale", lambda t: t.t().contiguous(), r"must be \[16, 4\], got \[4, 16\]"),
    ("compressed-tensors", "weight_scale", lambda t: t.float(), "dtype must be float16 or bfloat16"),
    ("compressed-tensors", "weight_scale", lambda t: set_to(t, (15, 3), INF), "NaN or infinite"),
    ("compressed-tensors", "weight_scale", lambda t: None, "the tensor is missing"),
    ("compressed-tensors", "weight_shape", lambda t: t[:1], r"shape must be \[2\], got \[1\]"),
    ("compressed-tensors", "weight_shape", lambda t: t.float(), "dtype must be int32 or int64"),
    ("compressed-tensors", "weight_shape", lambda t: -t, r"must be two sizes, got \[-16, -128\]"),
    ("compressed-tensors", "weight_shape", lambda t: None, "the tensor is missing"),
    ("compressed-tensors", "weight_zero_point", lambda t: t[:1], r"shape must be \[2, 4\], got \[1, 4\]"),
    ("compressed-tensors", "weight_zero_point", lambda t: t.to(torch.int8), "dtype must be int32, got int8"),
    ("compressed-tensors", "weight_zero_point", lambda t: None, "the tensor is missing"),
    ("compressed-tensors", "weight_g_idx", lambda t: t[1:], r"shape must be \[128\], got \[127\]"),
    (
        "compressed-tensors",
        "weight_g_idx",
        lambda t: set_to(t, 5, 4),
        "groups must be 0 to 3, or all of them -1, got 4",
    ),
    ("compressed-tensors", "weight_g_idx", lambda t: set_to(t, 5, -1), "groups must be 0 to 3.* got -1"),
    ("compressed-tensors", "weight_g_idx", lambda t: set_to(t, 127, 1), r"\[31, 32, 33\] features"),
    ("compressed-tensors", "weight_g_idx", lambda t: None, "the tensor is missing, and actorder says"),
    ("fp8", "weight", lambda t: t[0], r"shape must be \[any, any\]"),
    ("fp8", "weight", lambda t: t.half(), "dtype must be float8_e4m3fn, got float16"),
    ("fp8", "weight", lambda t: set_to(t.float(), (1, 2), NAN).to(t.dtype), "NaN or infinite"),
    ("fp8", "weight_scale_inv", lambda t: t[:1], r"shape must be \[2, 2\], got \[1, 2\]"),
    ("fp8", "weight_scale_inv", lambda t: t.half(), "dtype must be float32 or bfloat16"),
    ("fp8", "weight_scale_inv", lambda t: set_to(t, (0, 0), INF), "NaN or infinite"),
    ("fp8", "weight_scale_inv", lambda t: None, "the tensor is missing"),
]


@pytest.mark.parametrize(("method", "suffix", "damage", "text"), DAMAGE)
def test_a_damaged_tensor_is_named(
    method: str, suffix: str, damage: Callable[[Tensor], Tensor | None], text: str
) -> None:
    good = stored_as(make(method), NAME)
    assert FORMATS[method].read(good, NAME).shape == (128, 16)
    changed = {**good.stored, f"{NAME}.{suffix}": damage(good.stored[f"{NAME}.{suffix}"])}
    bad = MemorySource({name: tensor for name, tensor in changed.items() if tensor is not None}, good.quant_config)
    with pytest.raises(CheckpointError, match=text) as caught:
        FORMATS[method].read(bad, NAME)
    assert caught.value.file == "memory.safetensors"
    assert caught.value.tensor == f"{NAME}.{suffix}"


@pytest.mark.parametrize(
    ("method", "options", "error", "text"),
    [
        ("awq", {"bits": 8}, UnsupportedError, "8-bit AWQ weights; bits that work: 4"),
        ("awq", {"bits": None}, CheckpointError, "bits must be an integer, got None"),
        ("awq", {"group_size": 24}, UnsupportedError, "AWQ group_size 24; what works: 16, multiples of 32, -1"),
        ("awq", {"group_size": 64}, CheckpointError, r"qzeros: shape must be \[2, 2\], got \[4, 2\]"),
        ("awq", {"version": "gemv"}, UnsupportedError, "version 'gemv' cannot be read; what works: the gemm layout"),
        ("awq", {"version": "gemv_fast"}, UnsupportedError, "'gemv_fast' cannot be read"),
        ("awq", {"version": "llm-awq"}, UnsupportedError, "'llm-awq' cannot be read"),
        ("awq", {"version": None, "format": "marlin"}, UnsupportedError, "'marlin' cannot be read"),
        ("awq", {"dynamic": {"-:.*": {}}}, CheckpointError, "says that this module is not quantized"),
        ("fp8", {"weight_block_size": None}, UnsupportedError, "without weight_block_size.*what works: dynamic"),
        ("fp8", {"weight_block_size": [8]}, CheckpointError, r"must be two sizes, got \[8\]"),
        ("fp8", {"weight_block_size": [8, 0]}, CheckpointError, "must be two sizes"),
        ("fp8", {"weight_block_size": "8"}, CheckpointError, "must be two sizes"),
        ("fp8", {"activation_scheme": "static"}, UnsupportedError, "'static'.*what works: dynamic activations"),
        ("fp8", {"fmt": "e5m2"}, UnsupportedError, "'e5m2' cannot be read"),
        ("compressed-tensors", {"transform_config": {"config_groups": {}}}, UnsupportedError, "without transforms"),
        ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}, UnsupportedError, "KV cache.*what works: null"),
        ("compressed-tensors", {"sparsity_config": {"format": "sparse-24-bitmask"}}, UnsupportedError, "works: dense"),
        ("compressed-tensors", {"sparsity_config": "x"}, UnsupportedError, "'x'; what works: dense"),
        ("compressed-tensors", {"config_groups": None}, CheckpointError, "config_groups must be an object"),
        ("compressed-tensors", {"config_groups": {"a": 1}}, CheckpointError, "config_groups.a must be an object"),
        ("compressed-tensors", {"config_groups": {}}, CheckpointError, "no target of .* matches this module"),
        ("compressed-tensors", {"ignore": "lm_head"}, CheckpointError, "ignore must be a list of strings"),
        ("compressed-tensors", {"ignore": ["re:("]}, CheckpointError, "ignore has the invalid pattern"),
        ("compressed-tensors", {"ignore": ["re:.*q_proj"]}, CheckpointError, "or `ignore` does"),
        ("compressed-tensors", {"format": "nvfp4-pack-quantized"}, UnsupportedError, "'nvfp4-pack-quantized', which"),
        ("compressed-tensors", {"format": "marlin-24"}, UnsupportedError, "'marlin-24'.*what works: pack-quantized"),
        ("compressed-tensors", {"format": None}, UnsupportedError, "the compressed-tensors format None"),
    ],
)
def test_options_that_do_not_work(method: str, options: dict[str, Any], error: type[Exception], text: str) -> None:
    good = stored_as(make(method), NAME)
    assert good.quant_config is not None
    with pytest.raises(error, match=text):
        FORMATS[method].read(MemorySource(good.stored, {**good.quant_config, **options}), NAME)


@pytest.mark.parametrize(
    ("group", "weights", "error", "text"),
    [
        ({"targets": "Linear"}, {}, CheckpointError, "targets must be a list of strings"),
        ({"targets": ["re:["]}, {}, CheckpointError, "targets has the invalid pattern"),
        ({"targets": ["Conv2d"]}, {}, CheckpointError, "no target"),
        ({"format": "float-quantized"}, {}, UnsupportedError, "'float-quantized', which cannot be read"),
        ({"input_activations": {"num_bits": 8}}, {}, UnsupportedError, "input_activations asks for quantized activ"),
        ({"output_activations": {"num_bits": 8}}, {}, UnsupportedError, "output_activations asks for"),
        ({"weights": None}, {}, CheckpointError, "weights must be an object, got None"),
        ({}, {"num_bits": "4"}, CheckpointError, "num_bits must be an integer, got '4'"),
        ({}, {"num_bits": 7}, UnsupportedError, "type 'int' with 7 bits; what works: .* 2, 3, 4, 5, 6, 8 bits"),
        ({}, {"type": "float"}, UnsupportedError, "type 'float' with 4 bits"),
        ({}, {"dynamic": True}, UnsupportedError, "what works"),
        ({}, {"symmetric": "no"}, CheckpointError, "symmetric must be true or false"),
        ({}, {"strategy": "block"}, UnsupportedError, "strategy is 'block'; what works: group, channel"),
        ({}, {"strategy": "tensor"}, UnsupportedError, "strategy is 'tensor'"),
        ({}, {"group_size": None}, CheckpointError, "group_size must be an integer, got None"),
        ({}, {"group_size": 8}, UnsupportedError, "group_size is 8; what works: 16, multiples of 32, -1"),
        ({}, {"group_size": 64}, CheckpointError, r"weight_scale: shape must be \[16, 2\], got \[16, 4\]"),
        ({}, {"actorder": "magic"}, UnsupportedError, "actorder is 'magic'; what works: group, weight"),
        ({}, {"num_bits": 8}, CheckpointError, r"weight_packed: shape must be \[16, 32\], got \[16, 16\]"),
    ],
)
def test_schemes_that_do_not_work(
    group: dict[str, Any], weights: dict[str, Any], error: type[Exception], text: str
) -> None:
    good = stored_as(make("compressed-tensors"), NAME)
    assert good.quant_config is not None
    scheme = good.quant_config["config_groups"]["group_0"]
    changed = {**scheme, "weights": {**scheme["weights"], **weights}, **group}
    quantization = {**good.quant_config, "config_groups": {"group_0": changed}}
    with pytest.raises(error, match=text):
        CompressedWeight.read(MemorySource(good.stored, quantization), NAME)


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_words_with_gaps_are_refused(bits: int) -> None:
    good = stored_as(CompressedWeight.quantize(random_tensor(96, 8, seed=0), bits=bits, group_size=32), NAME)
    gaps = torch.zeros(8, -(-96 // (32 // bits)), dtype=torch.int32)
    with pytest.raises(UnsupportedError, match="leave the rest of each word empty"):
        CompressedWeight.read(MemorySource({**good.stored, f"{NAME}.weight_packed": gaps}, good.quant_config), NAME)
    odd = {**good.stored, f"{NAME}.weight_shape": torch.tensor([8, 33])}
    with pytest.raises(UnsupportedError, match=f"33 input features; {bits}-bit .* work for multiples of 32"):
        CompressedWeight.read(MemorySource(odd, good.quant_config), NAME)
    with pytest.raises(ValueError, match=r"K a multiple of 32, got shape \[40, 8\]"):
        CompressedWeight.quantize(torch.ones(40, 8), bits=bits)


@pytest.mark.parametrize(
    ("qweight", "scales", "layout"),
    [
        (torch.zeros(16, 16, dtype=torch.int32), torch.ones(16, 8), "gemv"),
        (torch.zeros(4, 128, dtype=torch.int16), torch.ones(8, 16), "gemv_fast or llm-awq"),
    ],
)
def test_awq_layouts_are_known_by_their_shapes(qweight: Tensor, scales: Tensor, layout: str) -> None:
    stored = {f"{NAME}.qweight": qweight, f"{NAME}.scales": scales.half(), f"{NAME}.qzeros": qweight}
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 32}
    with pytest.raises(UnsupportedError, match=f"in the layout {layout}, which cannot be read; what works: the gemm"):
        AWQWeight.read(MemorySource(stored, quantization), NAME)


FOREIGN: list[tuple[dict[str, Tensor], str]] = [
    ({".trellis": torch.zeros(1)}, "EXL3"),
    ({".W_q": torch.zeros(1)}, "HQQ"),
    ({".weight": torch.zeros(8, 1, dtype=torch.uint8), ".weight.absmax": torch.ones(1)}, "bitsandbytes 4-bit"),
    ({".weight": torch.zeros(8, 4, dtype=torch.int8), ".SCB": torch.ones(8)}, "bitsandbytes 8-bit"),
    ({"_blocks": torch.zeros(1), "_scales": torch.zeros(1)}, "MXFP4 as gpt-oss stores it"),
    ({".weight_packed": torch.zeros(1, dtype=torch.uint8), ".weight_global_scale": torch.ones(1)}, "NVFP4 of compr"),
    ({".weight_packed": torch.zeros(1, dtype=torch.uint8)}, "MXFP4 of compressed-tensors"),
    ({".weight": torch.zeros(8, 4, dtype=torch.uint8), ".weight_scale_2": torch.ones(1)}, "NVFP4 of ModelOpt"),
    ({".weight": torch.zeros(8, 4, dtype=torch.int8), ".weight_scale": torch.ones(8, 1)}, r"INT8 \(W8A8\)"),
    ({".weight": torch.zeros(8, 4).to(torch.float8_e4m3fn), ".weight_scale": torch.ones(8, 1)}, "FP8 per tensor"),
    ({".weight": torch.zeros(8, 4), ".weight_scale": torch.ones(8, 1)}, "weights whose quantization was not finished"),
    ({".weight_packed": torch.zeros(1, dtype=torch.int32)}, "compressed-tensors .*names the method"),
    ({".weight": torch.zeros(1), ".weight_scale_inv": torch.ones(1)}, "FP8 in blocks .*names the method"),
    ({".qweight": torch.zeros(1, dtype=torch.int32)}, "GPTQ or AWQ .*names the method"),
]


@pytest.mark.parametrize("quantization", [None, {"quant_method": "exl2"}])
@pytest.mark.parametrize(("tensors", "label"), FOREIGN)
def test_a_format_that_only_its_tensors_show_is_named(
    tensors: dict[str, Tensor], label: str, quantization: dict[str, Any] | None
) -> None:
    source = MemorySource({f"{NAME}{suffix}": tensor for suffix, tensor in tensors.items()}, quantization)
    with pytest.raises(UnsupportedError, match=f"is stored as {label}.*what works: ") as caught:
        weight_class(quantization, NAME, source)
    assert str(caught.value).startswith(NAME)


def test_tensors_without_a_config_say_which_files_would_do() -> None:
    source = MemorySource({f"{NAME}.qweight": torch.zeros(1, dtype=torch.int32)})
    with pytest.raises(UnsupportedError, match=r"quantization_config in config\.json, or .* quantize_config\.json"):
        weight_class(None, NAME, source)


def test_tensors_of_another_format_than_the_config_says_are_refused() -> None:
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    stored = stored_as(make("compressed-tensors"), NAME).stored
    with pytest.raises(UnsupportedError, match=r"compressed-tensors .*q_proj\.weight_packed\), but .* 'gptq'"):
        weight_class(gptq, NAME, MemorySource(stored, gptq))


def test_what_concerns_the_model_is_refused_before_the_first_dense_module() -> None:
    quantization = {"quant_method": "compressed-tensors", "config_groups": {}, "transform_config": {"a": 1}}
    with pytest.raises(UnsupportedError, match="transform_config"):
        weight_class(quantization, "m", MemorySource({"m.weight": torch.ones(8, 4)}, quantization))


def test_awq_leaves_modules_dense() -> None:
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "modules_to_not_convert": ["lm_head", "visual"]}
    both = {"weight": torch.ones(8, 4), "qweight": torch.zeros(4, 1, dtype=torch.int32)}
    for name, expected in (("lm_head", DenseWeight), ("visual.blocks.0.fc", DenseWeight), ("model.fc", AWQWeight)):
        source = MemorySource({f"{name}.{suffix}": tensor for suffix, tensor in both.items()}, awq)
        assert weight_class(awq, name, source) is expected
    source = MemorySource({"model.fc.weight": torch.ones(8, 4)}, awq)
    assert weight_class(awq, "model.fc", source) is DenseWeight
    broken = {**awq, "modules_to_not_convert": "lm_head"}
    with pytest.raises(CheckpointError, match="modules_to_not_convert must be a list of names"):
        weight_class(broken, "model.fc", MemorySource({"model.fc.weight": torch.ones(8, 4)}, broken))


@pytest.mark.parametrize(
    ("method", "options", "shape", "text"),
    [
        ("awq", {"group_size": 48}, (64, 8), "group_size must be one of 16, multiples of 32, -1, got 48"),
        ("awq", {}, (64, 12), r"N a multiple of 8, got shape \[64, 12\]"),
        ("compressed-tensors", {"bits": 7}, (64, 8), r"bits must be one of \[2, 3, 4, 5, 6, 8\], got 7"),
        ("compressed-tensors", {"group_size": 0}, (64, 8), "group_size must be one of"),
        ("compressed-tensors", {"act_order": torch.zeros(64)}, (64, 8), "must hold each of 64 features once"),
        ("fp8", {"block": (0, 1)}, (64, 8), "block must be two positive sizes"),
    ],
)
def test_quantize_options_that_do_not_work(
    method: str, options: dict[str, Any], shape: tuple[int, int], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        FORMATS[method].quantize(torch.ones(shape), **options)
