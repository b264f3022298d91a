"""The functions of `exllamav2_ext` that normalize rows, and the soft cap of logits. Plain torch.

    rms     y = x · w · rsqrt(mean(x²) + eps)
    layer   y = (x - µ) · w · rsqrt(mean((x - µ)²) + eps)

In fp32, multiplied in this order and rounded once; a bias is added after that, in fp16, and rounded again. As in the
compiled module, an infinite fp16 number counts as the largest finite one. NaN stays NaN, and rows may have any width:
the compiled module replaces NaN by 65504, and leaves out the last number of an odd row and all beyond 32768.

(`qinfer.kernels.rmsnorm` multiplies by the weight last, which differs in the last bit of fp32.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qinfer.compat.binding import check_tensor, check_together, extension, optional
from qinfer.compat.ext_tp import contexts

MAX_FP16 = 65504.0


@extension
def rms_norm(x: Tensor, w: Tensor, y: Tensor, epsilon: float) -> None:
    """Normalize rows to a root mean square of one.

    Args:
        x: [R, D] fp16 or fp32.
        w: [D] fp16.
        y: [R, D] fp16 or fp32, written; it may be x.
        epsilon: added to the mean square.

    Raises:
        RuntimeError: a dtype, a shape or a device does not fit.
    """
    check_tensor("x", x, _float("x", x), ("R", "D"))
    check_tensor("w", w, torch.float16, (x.shape[1],))
    check_tensor("y", y, _float("y", y), tuple(x.shape))
    check_together(x, w=w, y=y)
    y.copy_(_normalized(x, w, epsilon, is_rms=True))


@extension
def rms_norm_(x: Tensor, w: Tensor, epsilon: float) -> None:
    """Normalize rows to a root mean square of one, in place; the arguments are those of `rms_norm`.

    Raises:
        RuntimeError: as `rms_norm`.
    """
    rms_norm(x, w, x, epsilon)


@extension
def rms_norm_tp(x: Sequence[Tensor], w: Sequence[Tensor], y: Sequence[Tensor], epsilon: float, tp_context: int) -> None:
    """Normalize rows to a root mean square of one on several devices, each with a weight of its own.

    Args:
        x: one [R, D] fp16 per device.
        w: one [D] fp16 per device.
        y: one [R, D] fp16 per device, written.
        epsilon: added to the mean square.
        tp_context: from `make_tp_context`; torch's current stream of each device is what does the work.

    Raises:
        RuntimeError: the handle is none of a context, the lists are of different lengths, or as `rms_norm`.
    """
    contexts.find(tp_context)
    if not len(x) == len(w) == len(y):
        raise ValueError(f"x, w and y must be of one length, got {len(x)}, {len(w)} and {len(y)}")
    for rows, weight, out in zip(x, w, y, strict=True):
        check_tensor("x", rows, torch.float16, tuple(x[0].shape))
        check_tensor("y", out, torch.float16, tuple(x[0].shape))
        rms_norm(rows, weight, out, epsilon)


@extension
def layer_norm(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, epsilon: float) -> None:
    """Normalize rows to a mean of zero and a variance of one.

    Args:
        x: [R, D] fp16.
        w: [D] fp16.
        b: [D] fp16, or None.
        y: [R, D] fp16, written; it may be x.
        epsilon: added to the variance.

    Raises:
        RuntimeError: a dtype, a shape or a device does not fit.
    """
    check_tensor("x", x, torch.float16, ("R", "D"))
    _norm(x, w, b, y, epsilon, shape=tuple(x.shape[-1:]), is_rms=False)


@extension
def layer_norm_(x: Tensor, w: Tensor, b: Tensor | None, epsilon: float) -> None:
    """Normalize rows to a mean of zero and a variance of one, in place; the arguments are those of `layer_norm`.

    Raises:
        RuntimeError: as `layer_norm`.
    """
    layer_norm(x, w, b, x, epsilon)


@extension
def head_norm(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, epsilon: float, rms: bool) -> None:
    """Normalize every head by itself, each with a weight of its own.

    Args:
        x: [..., H, D] fp16.
        w: [H, D] fp16.
        b: [H, D] fp16, or None.
        y: [..., H, D] fp16, written; it may be x.
        epsilon: added to the mean square, or the variance.
        rms: to a root mean square of one, rather than a mean of zero and a variance of one.

    Raises:
        RuntimeError: a dtype, a shape or a device does not fit.
    """
    check_tensor("x", x, torch.float16, (*("…" for _ in x.shape[:-2]), "H", "D"))
    _norm(x, w, b, y, epsilon, shape=tuple(x.shape[-2:]), is_rms=rms)


@extension
def head_norm_(x: Tensor, w: Tensor, b: Tensor | None, epsilon: float, rms: bool) -> None:
    """Normalize every head by itself, in place; the arguments are those of `head_norm`.

    Raises:
        RuntimeError: as `head_norm`.
    """
    head_norm(x, w, b, x, epsilon, rms)


@extension
def softcap_(x: Tensor, scale: float) -> None:
    """Cap numbers smoothly, in place: x = scale · tanh(x / scale), in fp32.

    Args:
        x: fp16 or fp32 of any shape.
        scale: what no number exceeds; not 0.

    Raises:
        RuntimeError: x has another dtype, or scale is 0 or no number.
    """
    _float("x", x)
    if not abs(scale) > 0:
        raise ValueError(f"scale must not be 0, got {scale}")
    check_together(x)
    # A tensor, because torch multiplies by the reciprocal where a CUDA tensor is divided by a number.
    cap = torch.full((), scale, dtype=torch.float32, device=x.device)
    x.copy_(torch.tanh(x.float() / cap) * cap)


def _float(name: str, tensor: Tensor) -> torch.dtype:
    """Return the dtype of a tensor, or raise TypeError unless it is fp16 or fp32."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.float16, torch.float32):
        raise TypeError(f"{name} must be float16 or float32, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
    return tensor.dtype


def _norm(
    x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, epsilon: float, *, shape: tuple[int, ...], is_rms: bool
) -> None:
    """Normalize x into y, with a weight, and a bias if there is one, of a shape."""
    check_tensor("w", w, torch.float16, shape)
    bias = optional(b)
    if bias is not None:
        check_tensor("b", bias, torch.float16, shape)
    check_tensor("y", y, torch.float16, tuple(x.shape))
    check_together(x, w=w, b=bias, y=y)
    normalized = _normalized(x, w, epsilon, is_rms=is_rms).half()
    y.copy_(normalized if bias is None else normalized + bias)


def _normalized(x: Tensor, w: Tensor, epsilon: float, *, is_rms: bool) -> Tensor:
    """Return the normalized rows of x in fp32."""
    numbers = x.float()
    if x.dtype == torch.float16:
        numbers = numbers.clamp(-MAX_FP16, MAX_FP16)
    if not is_rms:
        numbers = numbers - numbers.mean(-1, keepdim=True)
    return numbers * w.float() * torch.rsqrt(numbers.square().mean(-1, keepdim=True) + epsilon)
