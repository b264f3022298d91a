"""Other people's 4-bit products on [N, K] matrices with groups of 128, each checked against its own codes in fp32."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from qinfer.bench.contender import Contender, Function, Peer, more
from qinfer.errors import UnsupportedError
from qinfer.quant.awq import AWQWeight

GROUP = 128


def _contender(
    name: str, make: Callable[[], tuple[Function, Sequence[Tensor], Tensor]], dtype: torch.dtype
) -> Contender:
    """Put copies together; `make` gives the product, the tensors that it reads, and the matrix [N, K] they mean."""
    function, tensors, weight = make()
    nbytes = sum(tensor.nbytes for tensor in tensors)
    others = more(lambda: make()[0], nbytes)

    def reference(x: Tensor) -> Tensor:
        return x.float() @ weight.float().t()

    return Contender(name, [function, *others], reference, nbytes, dtype)


def _codes(n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return codes [N, K] of 4 bits, and scales [N, K / 128] that keep products near one."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
    return codes, (torch.rand(n, k // GROUP, device=device) + 0.5) * (k**-0.5 / 4.6)


def _spread(per_group: Tensor) -> Tensor:
    """Repeat [N, K / 128] for every column of a group."""
    return per_group.repeat_interleave(GROUP, dim=1)


def tinygemm(n: int, k: int, device: torch.device) -> Contender:
    """Torch's own int4 product: bf16 activations, (code - 8) · scale + zero."""
    if n % 8 or k % GROUP:
        raise UnsupportedError(f"takes N in multiples of 8 and K of {GROUP}, got {n} and {k}")

    def make() -> tuple[Function, Sequence[Tensor], Tensor]:
        codes, scales = _codes(n, k, device)
        # The first of two codes is in the upper half of a byte.
        packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
        rounded = scales.bfloat16()
        pairs = torch.stack([rounded, torch.zeros_like(rounded)], dim=-1).transpose(0, 1).contiguous()

        def function(x: Tensor) -> Tensor:
            y: Tensor = torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, pairs)
            return y

        return function, (packed, pairs), (codes.float() - 8) * _spread(rounded.float())

    return _contender("torch int4", make, torch.bfloat16)


def gemlite(n: int, k: int, device: torch.device) -> Contender:
    """GemLite's Triton product: (code - zero) · scale, fp16."""
    core = importlib.import_module("gemlite.core")

    def make() -> tuple[Function, Sequence[Tensor], Tensor]:
        codes, scales = _codes(n, k, device)
        rounded = scales.half()
        half = core.DType.FP16
        layer = core.GemLiteLinear(
            4, group_size=GROUP, in_features=k, out_features=n, input_dtype=half, output_dtype=half
        )
        zeros = torch.full_like(rounded, 8)
        layer.pack(codes, rounded.view(-1, 1), zeros.view(-1, 1), None)
        weight = (codes.float() - 8) * _spread(rounded.float())
        return layer, (codes[:, : k // 2], rounded, zeros), weight

    return _contender("gemlite", make, torch.float16)


def humming(n: int, k: int, device: torch.device) -> Contender:
    """Humming's compiled product, from a matrix in AWQ's layout."""
    layers = importlib.import_module("humming.layer")

    def make() -> tuple[Function, Sequence[Tensor], Tensor]:
        words = partial(torch.randint, -(2**31), 2**31, dtype=torch.int32)
        scales = ((torch.rand(k // GROUP, n) + 0.5) * (k**-0.5 / 4.6)).half()
        stored = AWQWeight(words(size=(k, n // 8)), words(size=(k // GROUP, n // 8)), scales, None, GROUP)
        config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}
        layer = layers.HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=torch.float16)
        layer.load_from_tensors({"qweight": stored.qweight, "scales": stored.scales, "qzeros": stored.qzeros})
        layer = layer.to(device)
        layer.transform()
        return layer, tuple(stored.tensors().values()), stored.dequantize().t().to(device)

    return _contender("humming", make, torch.float16)


MATMUL_PEERS = (
    Peer("torch int4", None, tinygemm),
    Peer("gemlite", "gemlite", gemlite),
    Peer("humming", "humming", humming),
)
