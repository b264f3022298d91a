"""The matrix product of gate and up with the activation behind it, as an MLP begins.

    y[m, f] = silu(p[m, f]) * p[m, F + f],   p = x W + bias,   W [K, 2 F] the gate's columns in front of up's
    out[m, j] = y[m, order[j]]

Where the tile of the product keeps its sums whole on Hopper, its kernel does both (`wgmma.py`): the sums stay in fp32,
and nobody writes or reads the twice as wide product. Elsewhere `silu_mul` reads the product of `matmul_parts`, which is
rounded to x's dtype in between if it is a single part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qinfer.kernels.checks import check_device, check_index
from qinfer.kernels.device import op
from qinfer.kernels.matmul import matmul, matmul_parts, segments_of, tile_of
from qinfer.kernels.operand import DenseOperand, Operand
from qinfer.kernels.silu_mul import silu_mul
from qinfer.kernels.tiles import Tile, takes_gate
from qinfer.kernels.wgmma import launch_wgmma


def gated_matmul_reference(
    x: Tensor, operand: Operand, *, bias: Tensor | None = None, order: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """Compute `gated_matmul` in plain torch; `tile` has no meaning here."""
    product = matmul.reference(x, operand, bias=bias, out_dtype=torch.float32)
    return silu_mul.reference(product, order=order, out_dtype=x.dtype)


def _check_gated_matmul(
    x: Tensor, operand: Operand, *, bias: Tensor | None = None, order: Tensor | None = None, tile: Tile | None = None
) -> None:
    matmul.check(x, operand, bias=bias, tile=tile)
    width = operand.out_features
    if width % 2:
        raise ValueError(f"operand must have an even number of outputs, got {width}")
    if order is not None:
        check_device(x, order=order)
        check_index("order", order, width // 2, stop=width // 2)


@op(reference=gated_matmul_reference, check=_check_gated_matmul)
def gated_matmul(
    x: Tensor, operand: Operand, *, bias: Tensor | None = None, order: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """Multiply rows by a matrix, then silu of its first half of columns with the second half.

    Args:
        x: [M, K] fp16 or bf16, rows contiguous, features in operand.order.
        operand: the matrix, K to 2 F: gate, then up.
        bias: [2 F], added in fp32.
        order: [F] int32 (or int64) in [0, F), the input order of the next projection; None: 0, 1, 2 …
        tile: forces a tile of the fused kernel, whatever M; by default the tile table decides.

    Returns:
        [M, F] in x's dtype, contiguous.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape or a device does not fit, or (CPU tensors only) an index is out of range.
        UnsupportedError: the tile does not work on this GPU.
    """
    (m, _), n = x.shape, operand.out_features
    if m and n and x.element_size() == 2 and not isinstance(operand, DenseOperand):
        segments = segments_of(operand)
        tile = tile or tile_of(segments, x.device, m)
        if tile is not None and takes_gate(tile, n, tuple(segment.bits for segment in segments)):
            out = torch.empty(m, n // 2, dtype=x.dtype, device=x.device)
            launch_wgmma(x, segments, [1] * len(segments), bias, out[None], tile, is_gated=True, order=order)
            return out
    parts = matmul_parts.launch(x, operand, bias=bias, tile=tile)
    return silu_mul.launch(parts, order=order, out_dtype=x.dtype)
