"""The functions of `exllamav2_ext` that make matrices and multiply by them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qinfer.compat.binding import Handles, check_tensor, check_together, extension, optional
from qinfer.compat.ext_packing import make_group_map
from qinfer.compat.matrices import QMatrix, exl2_weight, gptq_weight

MAX_FEATURES = 1 << 16  # q_perm and q_invperm are 16 bits wide

_matrices: Handles[QMatrix] = Handles("q_matrix")


def find_matrix(handle: int) -> QMatrix:
    """Return the matrix of a handle, for the layers that are made of some.

    Raises:
        ValueError: the handle was freed, or belongs to something else.
    """
    return _matrices.find(handle)


@extension
def make_q_matrix(
    q_weight: Tensor,
    q_perm: Tensor | None,
    q_invperm: Tensor | None,
    q_scale: Tensor | None,
    q_scale_max: Tensor | None,
    q_groups: Tensor | None,
    q_group_map: Tensor | None,
    gptq_qzeros: Tensor | None,
    gptq_scales: Tensor | None,
    gptq_g_idx: Tensor | None,
    bias: Tensor | None,
    temp_dq: Tensor | None,
    max_dq_rows: int,
) -> int:
    """Make an EXL2 matrix, if `q_scale` is given, or a 4-bit GPTQ matrix, and return its handle.

    As in the compiled module, the caller has multiplied q_scale_max by 1/256 in fp16; GPTQ's zero points are stored
    minus one; and its group size, where no gptq_g_idx says which group each feature has, is the smallest power of two
    that lets the rows of qzeros cover K. (Where that leaves rows of qzeros unused, it is K / G.) An act-order
    permutation is written to q_perm and q_invperm.

    Args:
        q_weight: EXL2 [words, N] or GPTQ [K / 8, N] int32.
        q_perm: [K] int16 (unsigned in meaning) or None; q_perm and q_invperm come together.
        q_invperm: [K] int16 or None; None is no permutation.
        q_scale: EXL2 [G, N / 8] int32, or None.
        q_scale_max: EXL2 [G] fp16, or None.
        q_groups: EXL2 [2G] int16, or None.
        q_group_map: EXL2 [2K] int16, as `make_group_map` gives it, or None.
        gptq_qzeros: GPTQ [G, N / 8] int32, or None.
        gptq_scales: GPTQ [G, N] fp16, or None.
        gptq_g_idx: GPTQ [K] int32, on any device, or None; all zero counts as None.
        bias: [N] fp16 or None.
        temp_dq: fp16 scratch of N * min(max_dq_rows, K) numbers or None; unused.
        max_dq_rows: rows that fit into the scratch; unused.

    Returns:
        A handle for `reconstruct`, `gemm_half_q_half` and `free_q_matrix`.

    Raises:
        RuntimeError: a dtype, a shape, a device or a value does not fit.
    """
    check_tensor("q_weight", q_weight, torch.int32, ("rows", "N"))
    rows, columns = q_weight.shape
    scratch, bias = optional(temp_dq), optional(bias)
    if bias is not None:
        check_tensor("bias", bias, torch.float16, (columns,))
    perms = _permutations(q_weight, optional(q_perm), optional(q_invperm))
    if (scale := optional(q_scale)) is not None:
        check_tensor("q_scale", scale, torch.int32, ("G", columns // 8))
        maxima = _required("q_scale_max", q_scale_max, torch.float16, (scale.shape[0],), q_weight)
        groups = _required("q_groups", q_groups, torch.int16, (2 * scale.shape[0],), q_weight)
        check_together(q_weight, q_scale=scale, bias=bias)
        matrix = _make_exl2(q_weight, perms, (scale, maxima, groups), optional(q_group_map), bias)
    else:
        zeros = _required("gptq_qzeros", gptq_qzeros, torch.int32, ("G", columns // 8), q_weight)
        scales = _required("gptq_scales", gptq_scales, torch.float16, (zeros.shape[0], columns), q_weight)
        g_idx = optional(gptq_g_idx)
        if g_idx is not None:
            check_tensor("gptq_g_idx", g_idx, torch.int32, (rows * 8,))
            g_idx = g_idx.to(q_weight.device)
        check_together(q_weight, bias=bias)
        matrix = _make_gptq(q_weight, perms, (zeros, scales), g_idx, bias)
    needed = columns * min(max_dq_rows, matrix.shape[0])
    if scratch is not None and (scratch.dtype != torch.float16 or scratch.numel() < needed):
        raise ValueError(f"temp_dq must hold {needed} fp16 numbers, got {scratch.numel()} of {scratch.dtype}")
    return _matrices.add(matrix)


def _required(
    name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int | str, ...], beside: Tensor
) -> Tensor:
    """Return a tensor that must be there, beside another one."""
    tensor = optional(tensor)
    if tensor is None:
        raise ValueError(f"{name} must be given, got none")
    check_tensor(name, tensor, dtype, shape)
    check_together(beside, **{name: tensor})
    return tensor


def _permutations(q_weight: Tensor, perm: Tensor | None, invperm: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Return q_perm and q_invperm [K] int16, checked; None where neither is given."""
    if perm is None and invperm is None:
        return None
    if perm is None or invperm is None:
        raise ValueError("q_perm and q_invperm must be given together, got one of them")
    check_tensor("q_perm", perm, torch.int16, ("K",))
    check_tensor("q_invperm", invperm, torch.int16, (perm.shape[0],))
    check_together(q_weight, q_perm=perm, q_invperm=invperm)
    if perm.shape[0] > MAX_FEATURES:
        raise ValueError(f"q_perm must have at most {MAX_FEATURES} features, got {perm.shape[0]}")
    return perm, invperm


def _make_exl2(
    q_weight: Tensor,
    perms: tuple[Tensor, Tensor] | None,
    scales: tuple[Tensor, Tensor, Tensor],
    group_map: Tensor | None,
    bias: Tensor | None,
) -> QMatrix:
    """Make an EXL2 matrix of checked tensors; scales are q_scale, q_scale_max / 256 and q_groups."""
    q_scale, maxima, q_groups = scales
    expected = make_group_map(q_groups, q_weight.shape[0])
    in_features = expected.shape[0] // 2
    if group_map is not None:
        check_tensor("q_group_map", group_map, torch.int16, (2 * in_features,))
        if not torch.equal(group_map.to(expected.device), expected):
            raise ValueError("q_group_map must be what make_group_map gives for q_groups, got another one")
    if perms is None:
        invperm = torch.arange(in_features, dtype=torch.int32, device=q_weight.device)
    else:
        perm, invperm = (half.to(torch.int32) & 0xFFFF for half in perms)
        if not torch.equal(torch.argsort(invperm), perm.long()):
            raise ValueError("q_perm must be the inverse of q_invperm")
    weight = exl2_weight(
        "make_q_matrix",
        q_weight=q_weight,
        q_scale=q_scale,
        # The format divides by 256 itself; what an fp16 number lost in the caller's division, this does not bring back.
        q_scale_max=maxima * 256,
        q_groups=q_groups,
        q_invperm=invperm,
        bias=bias,
    )
    return QMatrix.of(weight, q_weight.device)


def _make_gptq(
    q_weight: Tensor,
    perms: tuple[Tensor, Tensor] | None,
    scales: tuple[Tensor, Tensor],
    g_idx: Tensor | None,
    bias: Tensor | None,
) -> QMatrix:
    """Make a GPTQ matrix of checked tensors; scales are qzeros and scales."""
    zeros, steps = scales
    weight = gptq_weight(
        "make_q_matrix",
        _group_size(q_weight.shape[0] * 8, zeros.shape[0]),
        qweight=q_weight,
        qzeros=zeros,
        scales=steps,
        g_idx=g_idx,
        bias=bias,
    )
    if perms is not None and g_idx is not None:
        perm, invperm = perms
        order = torch.argsort(g_idx, stable=True)
        perm.copy_(order.to(torch.int16))
        invperm.copy_(torch.argsort(order).to(torch.int16))
    return QMatrix.of(weight, q_weight.device)


def _group_size(in_features: int, num_groups: int) -> int:
    """Return the GPTQ group size that the compiled module assumes, or the even one where that cannot be."""
    if num_groups < 1:
        raise ValueError("gptq_qzeros must have at least one row, got none")
    if num_groups == 1:
        return -1
    power = 1
    while power * num_groups < in_features:
        power *= 2
    return power if -(-in_features // power) == num_groups else max(1, in_features // num_groups)


@extension
def make_q_matrix_split(
    q_weight: Tensor,
    q_perm: Tensor | None,
    q_invperm: Tensor | None,
    q_scale: Tensor | None,
    q_scale_max: Tensor | None,
    q_groups: Tensor | None,
    q_group_map: Tensor | None,
    gptq_qzeros: Tensor | None,
    gptq_scales: Tensor | None,
    gptq_g_idx: Tensor | None,
    bias: Tensor | None,
    temp_dq: Tensor | None,
    max_dq_rows: int,
) -> int:
    """Make a matrix of a slice of an EXL2 matrix's columns, cut at multiples of 8, and return its handle.

    The arguments are those of `make_q_matrix`, with q_weight [words, n], q_scale [G, n / 8] and bias [n] sliced. (In
    the compiled module the words must have been shuffled by `make_q_matrix` before; qinfer shuffles nothing.)

    Raises:
        RuntimeError: as `make_q_matrix`; also for a GPTQ matrix, which the extension does not split.
    """
    if optional(q_scale) is None:
        raise ValueError("q_scale must be given, got none: only EXL2 matrices can be split")
    exl2 = (q_weight, q_perm, q_invperm, q_scale, q_scale_max, q_groups, q_group_map)
    return make_q_matrix(*exl2, gptq_qzeros, gptq_scales, gptq_g_idx, bias, temp_dq, max_dq_rows)


@extension
def free_q_matrix(handle: int) -> None:
    """Free a matrix of `make_q_matrix` or `make_q_matrix_split`; its handle raises from then on.

    Raises:
        RuntimeError: the handle is none of theirs, or was freed before.
    """
    _matrices.free(handle)


@extension
def reconstruct(q_handle: int, output: Tensor) -> None:
    """Dequantize a matrix, its input features in their original order.

    Args:
        q_handle: from `make_q_matrix`.
        output: [K, N] fp16, written.

    Raises:
        RuntimeError: the handle is none, or a dtype, a shape or a device does not fit.
    """
    matrix = _matrices.find(q_handle)
    check_tensor("output", output, torch.float16, matrix.shape)
    matrix.check_device(output=output)
    matrix.reconstruct(output)


@extension
def gemm_half_q_half(a: Tensor, b: int, c: Tensor, force_cuda: bool) -> None:
    """Multiply by a quantized matrix: c = a · B + bias.

    Args:
        a: [M, K] fp16.
        b: the handle of B, from `make_q_matrix`.
        c: [M, N] fp16, written.
        force_cuda: read the packed matrix however many rows there are, instead of dequantizing it for many.

    Raises:
        RuntimeError: the handle is none, or a dtype, a shape or a device does not fit.
    """
    matrix = _matrices.find(b)
    in_features, out_features = matrix.shape
    check_tensor("a", a, torch.float16, ("M", in_features))
    check_tensor("c", c, torch.float16, (a.shape[0], out_features))
    matrix.check_device(a=a, c=c)
    matrix.multiply(a, c, route="packed" if force_cuda else "auto")


@extension
def gemm_half_q_half_tp(
    a: Sequence[Tensor],
    b: Sequence[int],
    c: Sequence[Tensor],
    force_cuda: bool,
    tp_context: int,
    t_device: int = -1,
) -> None:
    """Multiply by matrices on several devices: c[i] = a[i] · B[i] + bias[i].

    Args:
        a: one [M, K_i] fp16 per matrix.
        b: the handles.
        c: one [M, N_i] fp16 per matrix, written.
        force_cuda: as in `gemm_half_q_half`.
        tp_context: unused; torch's current stream of each device is what the products run on.
        t_device: index of the only device that is to work; -1 lets all of them.

    Raises:
        RuntimeError: the lists are of different lengths, or as `gemm_half_q_half`.
    """
    if not len(a) == len(b) == len(c):
        raise ValueError(f"a, b and c must be of one length, got {len(a)}, {len(b)} and {len(c)}")
    for rows, handle, out in zip(a, b, c, strict=True):
        if t_device in (-1, _matrices.find(handle).device.index):
            gemm_half_q_half(rows, handle, out, force_cuda)


@extension
def gemm_half_half_half(a: Tensor, b: Tensor, c: Tensor, alpha: float, beta: float, force_cublas: bool) -> None:
    """Multiply dense matrices: c = alpha · a · b + beta · c.

    Args:
        a: [M, K] fp16.
        b: [K, N] fp16.
        c: [M, N] fp16, written; with beta = 0 it is not read.
        alpha: factor of the product.
        beta: factor of what c held.
        force_cublas: unused; torch's matrix product, which is cuBLAS on NVIDIA, is the only route.

    Raises:
        RuntimeError: a dtype, a shape or a device does not fit.
    """
    check_tensor("a", a, torch.float16, ("M", "K"))
    check_tensor("b", b, torch.float16, (a.shape[1], "N"))
    check_tensor("c", c, torch.float16, (a.shape[0], b.shape[1]))
    check_together(a, b=b, c=c)
    if a.is_cuda:
        c.addmm_(a, b, alpha=alpha, beta=beta)
        return
    product = alpha * (a.float() @ b.float())
    c.copy_(product if beta == 0 else product + beta * c.float())
