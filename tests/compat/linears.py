"""Matrices behind handles for the layers of exllamav2_ext, in three formats, with adapters; and what they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from qinfer.compat import exllamav2_ext as ext_c
from qinfer.compat.ext_matrix import _matrices
from qinfer.compat.matrices import QMatrix
from qinfer.kernels.operand import DenseOperand
from tests.compat.test_exllamav2_matrix import exl2, gptq, make
from tests.strategies import random_tensor

EPS = 1e-5
HALF = torch.float16
HIDDEN = {"dense": 64, "gptq": 128, "exl2": 256}  # what the shared matrices read
KINDS = pytest.mark.parametrize("kind", list(HIDDEN))
LORAS = pytest.mark.parametrize("loras", [(), (7, 8, 99)], ids=["plain", "loras"])
NO_ADAPTERS: dict[int, Tensor] = {}


def half(*shape: int, seed: int, scale: float = 1.0, where: str = "cpu") -> Tensor:
    """Random fp16 numbers on a device."""
    return random_tensor(*shape, seed=seed, scale=scale, dtype=HALF).to(where)


@dataclass(frozen=True)
class Linear:
    """A matrix behind a handle, what it stands for, and adapters 7 and 8 of two ranks."""

    handle: int
    w: Tensor  # [K, N] fp32
    bias: Tensor  # [N] fp16
    a: dict[int, Tensor]
    b: dict[int, Tensor]

    def __call__(self, x: Tensor, loras: Sequence[int] = ()) -> Tensor:
        """Multiply in fp32."""
        deltas = (x @ self.a[i].float() @ self.b[i].float() for i in loras if i in self.a)
        return sum(deltas, x @ self.w + self.bias.float())


@cache
def linear(kind: str, seed: int, out_features: int, where: str = "cpu", *, adapted: bool = True) -> Linear:
    """Make a matrix from HIDDEN[kind] features: random, or a shared one, repeated sideways under other scales."""
    k, n = HIDDEN[kind], out_features
    bias = half(n, seed=seed, scale=0.3, where=where)
    if kind == "dense":
        stored = half(n, k, seed=seed + 1, scale=k**-0.5, where=where)
        handle, w = _matrices.add(QMatrix(DenseOperand(stored), bias, torch.device(where))), stored.t()
    else:
        tensors, _ = exl2(where) if kind == "exl2" else gptq(where, "act")
        for name in ("q_weight", "gptq_qzeros", "gptq_scales"):
            if name in tensors:
                tensors[name] = tensors[name].repeat(1, n // (32 if kind == "exl2" else 16))
        if kind == "exl2":
            codes = torch.randint(-(2**31), 2**31, (6, n // 8), generator=torch.Generator().manual_seed(seed))
            tensors["q_scale"] = codes.int().to(where)
        else:
            factors = half(n, seed=seed + 1, where=where).abs() + 0.2
            tensors["gptq_scales"] = tensors["gptq_scales"] * factors
        handle, w = make(tensors, bias=bias), torch.empty(k, n, dtype=HALF, device=where)
        ext_c.reconstruct(handle, w)
    ranks = {7: 4, 8: 2} if adapted else {}
    a = {i: half(k, r, seed=seed + i, scale=k**-0.5, where=where) for i, r in ranks.items()}
    b = {i: half(r, n, seed=seed + 20 + i, scale=0.5, where=where) for i, r in ranks.items()}
    return Linear(handle, w.float(), bias, a, b)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, is_rms: bool) -> Tensor:
    """Normalize in fp32, by weights of one head or of several."""
    if is_rms:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.float()
    y = layer_norm(x, x.shape[-1:], eps=EPS) * weight.float()
    return y if bias is None else y + bias.float()
