"""The GPTQ functions of ExLlama v1's compiled extension `exllama_kernels`: same names, argument orders and checks.

    from qinfer.compat.exllama_kernels import make_q4, prepare_buffers, q4_matmul, set_tuning_params

Tensors may live on a CPU or on a GPU; a GPU must have an index. Every mistake is reported as an error that is both
RuntimeError, as in the compiled module, and ValueError or TypeError (`binding.py`). Products accumulate in fp32 and are
repeatable bit by bit. State is one per process, as in the compiled module: the tuning parameters and the matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qinfer.compat.binding import Handles, check_tensor, check_together, extension, optional
from qinfer.compat.matrices import QMatrix, gptq_weight
from qinfer.kernels.checks import check_index
from qinfer.kernels.gather import gather_columns

__all__ = ["cleanup", "column_remap", "make_q4", "prepare_buffers", "q4_matmul", "set_tuning_params"]


@dataclass
class Tuning:
    """What `set_tuning_params` sets."""

    matmul_recons_thd: int = 8  # the default of ExLlama's Python code


_tuning = Tuning()
_matrices: Handles[QMatrix] = Handles("Q4 matrix")


@extension
def set_tuning_params(matmul_recons_thd: int, matmul_fused_remap: bool, matmul_no_half2: bool) -> None:
    """Set from how many rows on `q4_matmul` dequantizes the matrix and uses a dense product.

    Args:
        matmul_recons_thd: fewer rows use the kernel that reads packed weights; 0 means that all do.
        matmul_fused_remap: unused; the columns of an act-order input are always gathered before the product.
        matmul_no_half2: unused; products accumulate in fp32.

    Raises:
        RuntimeError: the threshold is negative or no integer.
    """
    if not isinstance(matmul_recons_thd, int):
        raise TypeError(f"matmul_recons_thd must be an integer, got {matmul_recons_thd!r}")
    if matmul_recons_thd < 0:
        raise ValueError(f"matmul_recons_thd must not be negative, got {matmul_recons_thd}")
    _tuning.matmul_recons_thd = matmul_recons_thd


@extension
def prepare_buffers(device: torch.device | str, temp_state: Tensor, temp_dq: Tensor) -> None:
    """Accept scratch memory for a device: it is checked, and neither kept nor used, because qinfer allocates its own.

    Args:
        device: where the buffers are; a GPU with its index.
        temp_state: fp16, any size.
        temp_dq: fp16, any size.

    Raises:
        RuntimeError: the device has no index, or a buffer is on another device or not fp16.
    """
    device = torch.device(device)
    if device.type != "cpu" and device.index is None:
        raise ValueError(f"device must have an index, got {device}")
    for name, buffer in (("temp_state", temp_state), ("temp_dq", temp_dq)):
        check_tensor(name, buffer, torch.float16, ("any",) * buffer.dim())
        if (buffer.device.type, buffer.device.index or 0) != (device.type, device.index or 0):
            raise ValueError(f"{name} must be on {device}, got {buffer.device}")


@extension
def cleanup() -> None:
    """Free all matrices of `make_q4`; their handles raise from then on."""
    _matrices.clear()


@extension
def make_q4(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, device: int | None) -> int:
    """Make a 4-bit GPTQ matrix, W[k, n] = (code[k, n] - zero[g, n] - 1) * scales[g, n], and return its handle.

    The group of feature k is g_idx[k], or k // (K / G) without g_idx. The tensors are not changed, and need not outlive
    the handle.

    Args:
        qweight: [K / 8, N] int32, eight rows per word, the first one lowest.
        qzeros: [G, N / 8] int32, eight columns per word, stored minus one.
        scales: [G, N] fp16.
        g_idx: [K] int32 on any device; None, on the meta device, or all zero: groups follow each other.
        device: the index of the GPU that holds qweight; -1 or None for a CPU.

    Returns:
        A handle for `q4_matmul`.

    Raises:
        RuntimeError: a dtype, a shape, a device or a value does not fit.
    """
    check_tensor("qweight", qweight, torch.int32, ("K / 8", "N"))
    check_tensor("qzeros", qzeros, torch.int32, ("G", qweight.shape[1] // 8))
    check_tensor("scales", scales, torch.float16, (qzeros.shape[0], qweight.shape[1]))
    check_together(qweight, qzeros=qzeros, scales=scales)
    expected = qweight.device.index
    if device != expected and not (expected is None and device == -1):
        raise ValueError(f"device must be {expected}, the index of the device of qweight, got {device}")
    in_features, num_groups = qweight.shape[0] * 8, qzeros.shape[0]
    if num_groups < 1 or in_features % num_groups:
        raise ValueError(f"qzeros must have rows that divide {in_features} features, got {num_groups}")
    g_idx = optional(g_idx)
    if g_idx is not None:
        check_tensor("g_idx", g_idx, torch.int32, (in_features,))
        g_idx = g_idx.to(qweight.device)
    group_size = -1 if num_groups == 1 else in_features // num_groups
    weight = gptq_weight("make_q4", group_size, qweight=qweight, qzeros=qzeros, scales=scales, g_idx=g_idx)
    return _matrices.add(QMatrix.of(weight, qweight.device))


@extension
def q4_matmul(x: Tensor, w: int, out: Tensor) -> None:
    """Multiply by a matrix: out = x · W.

    Fewer rows than the threshold of `set_tuning_params` go through the kernel that reads packed weights, others through
    the dequantized matrix and a dense product.

    Args:
        x: [M, K] fp16.
        w: the handle of W, from `make_q4`.
        out: [M, N] fp16, written.

    Raises:
        RuntimeError: the handle is none, or a dtype, a shape or a device does not fit.
    """
    matrix = _matrices.find(w)
    in_features, out_features = matrix.shape
    check_tensor("x", x, torch.float16, ("M", in_features))
    check_tensor("out", out, torch.float16, (x.shape[0], out_features))
    matrix.check_device(x=x, out=out)
    threshold = _tuning.matmul_recons_thd
    matrix.multiply(x, out, route="packed" if threshold == 0 or x.shape[0] < threshold else "dense")


@extension
def column_remap(x: Tensor, x_new: Tensor, x_map: Tensor) -> None:
    """Gather columns: x_new[m, k] = x[m, x_map[k]].

    Args:
        x: [M, K] fp16.
        x_new: fp16, contiguous, any shape with at least M * K numbers, of which the first M * K are written.
        x_map: [K] int32 in [0, K).

    Raises:
        RuntimeError: a dtype, a shape, a device or (CPU tensors only) an index does not fit.
    """
    check_tensor("x", x, torch.float16, ("M", "K"))
    check_tensor("x_new", x_new, torch.float16, ("any",) * x_new.dim())
    check_tensor("x_map", x_map, torch.int32, (x.shape[1],))
    check_together(x, x_new=x_new, x_map=x_map)
    check_index("x_map", x_map, x.shape[1], stop=x.shape[1])
    if x_new.numel() < x.numel() or not x_new.is_contiguous():
        raise ValueError(f"x_new must hold {x.numel()} numbers in one piece, got {list(x_new.shape)}")
    x_new.view(-1)[: x.numel()].view(x.shape).copy_(gather_columns(x, x_map))
