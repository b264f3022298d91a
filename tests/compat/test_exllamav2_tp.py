"""The tensor-parallel functions of exllamav2_ext, on spans of devices whose tensors all live on one device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qinfer.compat import exllamav2_ext as ext
from tests.compat.vectors import EVERYWHERE

KV, ID, VC, RS, Q = range(5)
SPANS = {
    "kv_split": [(0, 0, 1), (2, 1, 2)],
    "id_split": [(0, 0, 5), (1, 5, 6), (2, 6, 8)],
    "vc_split": [(1, 0, 10)],
    "rs_split": [(0, 0, 4), (2, 4, 8)],
    "q_split": [(0, 0, 2), (2, 2, 4)],
}


def make(pinned: list[Tensor] | None = None) -> tuple[int, list[Tensor]]:
    buffers = [torch.zeros(64, dtype=torch.float16) for _ in range(2)] if pinned is None else pinned
    return ext.make_tp_context(**SPANS, pinned_temp=buffers, streams=[0, 0, 0]), buffers


def halves(*shape: int, where: str) -> Tensor:
    return torch.randn(*shape).half().to(where)


def test_make_tp_context() -> None:
    first, _ = make()
    second, _ = make()
    assert first != second
    with pytest.raises(RuntimeError, match="RS 3 must follow each other from 0"):
        ext.make_tp_context(**{**SPANS, "rs_split": [(0, 0, 4), (1, 5, 8)]}, pinned_temp=[], streams=[])
    with pytest.raises(RuntimeError, match="contiguous fp16 on the CPU"):
        make([torch.zeros(4)])


def test_free_tp_context() -> None:
    context, _ = make()
    ext.free_tp_context(context)
    with pytest.raises(RuntimeError, match="was freed"):
        ext.free_tp_context(context)


@EVERYWHERE
def test_tp_broadcast(where: str) -> None:
    context, buffers = make()
    source = halves(2, 8, where=where)
    targets = [torch.zeros_like(source) for _ in range(3)]
    ext.tp_broadcast(context, 1, source, ID, targets, 1, -1)
    assert all(torch.equal(target, source) for target in targets)
    assert torch.equal(buffers[1][:16].view(2, 8), source.cpu())
    assert not buffers[0].any()
    other = halves(2, 8, where=where)
    ext.tp_broadcast(context, 0, other, ID, targets, 1, 1)
    assert [torch.equal(target, other) for target in targets] == [False, True, False]
    with pytest.raises(RuntimeError, match="one tensor for each of 3 spans, got 2"):
        ext.tp_broadcast(context, 0, source, ID, targets[:2], 1, -1)
    with pytest.raises(RuntimeError, match="room for 64 elements"):
        ext.tp_broadcast(context, 0, halves(9, 8, where=where), ID, targets, 1, -1)


@EVERYWHERE
def test_tp_gather(where: str) -> None:
    context, buffers = make()
    whole = halves(2, 16, where=where)
    parts = [part.contiguous() for part in whole.split([10, 2, 4], dim=1)]
    targets = [torch.zeros_like(whole) for _ in range(2)]
    ext.tp_gather(context, 0, parts, ID, targets, KV, 2, -1)
    assert all(torch.equal(target, whole) for target in targets)
    assert torch.equal(buffers[0][:32].view(2, 16), whole.cpu())
    for end in (-1, -2):
        buffers[0].zero_()
        ext.tp_gather(context, 0, parts, ID, [], end, 2, -1)
        assert torch.equal(buffers[0][:32].view(2, 16), whole.cpu())
    buffers[0].zero_()
    ext.tp_gather(context, 0, parts, ID, [], -1, 2, 1)
    mine = torch.zeros(2, 16, dtype=torch.float16)
    mine[:, 10:12] = whole[:, 10:12].cpu()
    assert torch.equal(buffers[0][:32].view(2, 16), mine)
    with pytest.raises(RuntimeError, match=r"inputs must be \[2, 5\] fp16"):
        ext.tp_gather(context, 0, parts, ID, targets, KV, 1, -1)


def test_tp_cross_device_barrier() -> None:
    context, _ = make()
    ext.tp_cross_device_barrier(context, Q, -1, -1, -1)
    with pytest.raises(RuntimeError, match="broadcast_type must be one of KV 0"):
        ext.tp_cross_device_barrier(context, 5, -1, -1, -1)


@EVERYWHERE
def test_tp_all_reduce(where: str) -> None:
    context, buffers = make()
    residual = halves(3, 4, where=where)
    tensors = [halves(3, 4, where=where) for _ in range(3)]
    residuals = [residual.clone() for _ in tensors]
    expected = ((residual.cpu() + tensors[0].cpu()) + tensors[1].cpu()) + tensors[2].cpu()
    ext.tp_all_reduce(context, 0, tensors, residuals)
    assert all(torch.equal(got.cpu(), expected) for got in residuals)
    assert torch.equal(buffers[0][:12].view(3, 4), expected)
    with pytest.raises(RuntimeError, match="as many residuals as tensors, got 2 and 3"):
        ext.tp_all_reduce(context, 0, tensors, residuals[:2])
