"""Repairs of Triton's interpreter, for tests only.

Triton 3.6 to 3.9 interpret bf16 as its bit pattern (sums and dots are silently wrong), round fp8 casts wrongly, give
the result of a comparison the type of what was compared (3.9 then refuses it as a mask), and 3.6 cannot take a run-time
loop bound under NumPy 2.4. The repairs below route every conversion through torch and compute bf16 arithmetic in fp32
with one rounding at the end, which is what the hardware does.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH_DTYPE = {
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
BITS = {
    8: (torch.uint8, np.uint8),
    16: (torch.uint16, np.uint16),
    32: (torch.uint32, np.uint32),
    64: (torch.uint64, np.uint64),
}
SATURATING = (tl.float8e4nv, tl.float8e5)

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder
_convert_float = interpreter._convert_float
_binary_op, _unary_op, _ternary_op, _cast_impl = (
    Builder.binary_op,
    Builder.unary_op,
    Builder.ternary_op,
    Builder.cast_impl,
)
_patch_lang_tensor = interpreter._patch_lang_tensor


def convert(data: np.ndarray, source: Any, target: Any, rounding: Any = None) -> np.ndarray:
    """Convert bit patterns of one float type to bit patterns of another, rounding as torch does."""
    if source not in TORCH_DTYPE or target not in TORCH_DTYPE:
        return _convert_float(data, source, target, rounding)
    flat = np.ascontiguousarray(data).reshape(-1).view(BITS[source.primitive_bitwidth][1]).copy()
    values = torch.from_numpy(flat).view(TORCH_DTYPE[source])
    if target in SATURATING:
        limit = torch.finfo(TORCH_DTYPE[target]).max
        values = values.float()
        values = torch.where(values.isnan(), values, values.clamp(-limit, limit))
    bits = values.to(TORCH_DTYPE[target]).view(BITS[target.primitive_bitwidth][0])
    return bits.numpy().reshape(np.shape(data))


def widen(handle: Any) -> np.ndarray:
    """Give the values of a bf16 handle as fp32, those of any other handle as they are."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return convert(handle.data, tl.bfloat16, tl.float32).view(np.float32)


def narrow(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Round fp32 results to the bit patterns of bf16 where the result type is bf16."""
    if dtype != tl.bfloat16 or values.dtype.kind != "f":
        return values
    return convert(values.astype(np.float32), tl.float32, tl.bfloat16)


def binary_op(self: Any, left: Any, right: Any, function: Any) -> Any:
    dtype = left.dtype.scalar
    if tl.bfloat16 not in (dtype, right.dtype.scalar):
        result = _binary_op(self, left, right, function)
    else:
        result = Handle(narrow(function(widen(left), widen(right)), dtype), dtype)
    return Handle(result.data, tl.int1) if result.data.dtype == np.bool_ else result


def unary_op(self: Any, argument: Any, function: Any) -> Any:
    dtype = argument.dtype.scalar
    if dtype != tl.bfloat16:
        return _unary_op(self, argument, function)
    return Handle(narrow(function(widen(argument)), dtype), dtype)


def ternary_op(self: Any, first: Any, second: Any, third: Any, function: Any) -> Any:
    dtype = third.dtype.scalar
    if dtype != tl.bfloat16 or function is np.where:
        return _ternary_op(self, first, second, third, function)
    return Handle(narrow(function(widen(first), widen(second), widen(third)), dtype), dtype)


def cast_impl(self: Any, source: Any, target_type: Any) -> Any:
    have, want = source.dtype.scalar, target_type.scalar
    numpy_dtype = interpreter._get_np_dtype(target_type)
    if have in TORCH_DTYPE and want in TORCH_DTYPE and have != want:
        return Handle(convert(source.data, have, want).view(numpy_dtype), want)
    if have == tl.bfloat16 and want != tl.bfloat16:
        return Handle(widen(source).astype(numpy_dtype), want)
    if want == tl.bfloat16 and have != tl.bfloat16:
        return Handle(narrow(source.data.astype(np.float32), want), want)
    return _cast_impl(self, source, target_type)


def create_dot(self: Any, a: Any, b: Any, accumulator: Any, precision: Any, max_imprecise: Any) -> Any:
    def operand(handle: Any) -> np.ndarray:
        values = widen(handle)
        if handle.dtype.scalar in SATURATING:
            values = convert(handle.data, handle.dtype.scalar, tl.float32).view(np.float32)
        return values.astype(np.float32) if values.dtype == np.float16 else values

    product = np.matmul(operand(a), operand(b), dtype=accumulator.data.dtype)
    return Handle(product + accumulator.data, accumulator.dtype.scalar)


def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    dtype = z.dtype.scalar
    return Handle(narrow(widen(x) * widen(y) + widen(z), dtype), dtype)


def patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    # A loop bound is a one-element array; NumPy 2.4 no longer takes that for an index.
    scope.set_attr(tensor, "__index__", lambda value: int(value.handle.data.reshape(-1)[0]))


def install() -> None:
    """Apply all repairs; call before the first kernel runs."""
    interpreter._convert_float = convert
    Builder.binary_op, Builder.unary_op, Builder.ternary_op = binary_op, unary_op, ternary_op
    Builder.cast_impl, Builder.create_dot, Builder.create_fma = cast_impl, create_dot, create_fma
    if not hasattr(Builder, "get_bf16"):
        Builder.get_bf16 = lambda self, value: Handle(
            convert(np.array([value], np.float32), tl.float32, tl.bfloat16), tl.bfloat16
        )
    if "scope" in inspect.signature(_patch_lang_tensor).parameters:
        interpreter._patch_lang_tensor = patch_lang_tensor
