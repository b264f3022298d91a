"""The functions of `exllamav2_ext` that move tensors between the GPUs of one process.

The compiled module stages everything in two page-locked buffers and orders the streams of the devices by events. Here
a tensor is copied from device to device through the same buffers by torch, and a copy has ended when its function
returns. Programs of several processes use `qinfer.parallel.context.TPContext` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qinfer.compat.binding import Handles, extension

Split = list[tuple[int, int, int]]
_TYPES = ("KV 0", "ID 1", "VC 2", "RS 3", "Q 4")
LEAVE_PINNED = (-1, -2)  # target types that mean: go no further than the pinned buffer


@dataclass(frozen=True)
class _Context:
    """Spans (device, start, end) by type, and the buffers."""

    splits: tuple[Split, ...]
    pinned: tuple[Tensor, ...]

    def split(self, broadcast_type: int) -> Split:
        if broadcast_type not in range(len(self.splits)):
            raise ValueError(f"broadcast_type must be one of {', '.join(_TYPES)}, got {broadcast_type}")
        return self.splits[broadcast_type]

    def staged(self, buffer: int, shape: Sequence[int]) -> Tensor:
        """Return the beginning of a buffer in a shape."""
        if buffer not in range(len(self.pinned)):
            raise ValueError(f"buffer must be 0 to {len(self.pinned) - 1}, got {buffer}")
        pinned, length = self.pinned[buffer], torch.Size(shape).numel()
        if length > pinned.numel():
            raise ValueError(f"buffer {buffer} has room for {pinned.numel()} elements, got shape {list(shape)}")
        return pinned.view(-1)[:length].view(torch.Size(shape))


contexts: Handles[_Context] = Handles("tensor-parallel context")


@extension
def make_tp_context(
    kv_split: Split,
    id_split: Split,
    vc_split: Split,
    rs_split: Split,
    q_split: Split,
    pinned_temp: list[Tensor],
    streams: list[int],
) -> int:
    """Keep how five dimensions are divided among devices, and return a handle.

    Args:
        kv_split: spans (device, start, end) of key-value heads, one after the other, the first from 0.
        id_split: likewise, of MLP columns.
        vc_split: likewise, of the vocabulary.
        rs_split: likewise, of the residual stream.
        q_split: likewise, of query heads.
        pinned_temp: fp16 buffers on the CPU.
        streams: of each device; torch's current streams are used instead.

    Raises:
        RuntimeError: spans leave gaps, or a buffer is not fp16 on the CPU.
    """
    splits = tuple(
        [(int(d), int(a), int(b)) for d, a, b in s] for s in (kv_split, id_split, vc_split, rs_split, q_split)
    )
    for name, split in zip(_TYPES, splits, strict=True):
        end = 0
        for device, start, stop in split:
            if start != end or stop <= start or device < 0:
                raise ValueError(f"the spans of {name} must follow each other from 0, got {split}")
            end = stop
    for buffer in pinned_temp:
        if buffer.dtype != torch.float16 or buffer.device.type != "cpu" or not buffer.is_contiguous():
            raise ValueError(f"pinned_temp must be contiguous fp16 on the CPU, got {buffer.dtype} on {buffer.device}")
    return contexts.add(_Context(splits, tuple(pinned_temp)))


@extension
def free_tp_context(tp_context: int) -> None:
    """Forget a context.

    Raises:
        RuntimeError: the handle is none of a context.
    """
    contexts.free(tp_context)


@extension
def tp_broadcast(
    tp_context: int,
    buffer: int,
    source: Tensor,
    broadcast_type: int,
    targets: list[Tensor],
    dim: int,
    t_device: int = -1,
) -> None:
    """Copy a tensor to every device of a split, through a buffer.

    Args:
        tp_context: handle.
        buffer: 0 or 1; holds the tensor afterwards.
        source: [rows, columns] fp16 on any device; may be the buffer itself.
        broadcast_type: whose split.
        targets: one per span, like `source`, written.
        dim: columns per unit; a whole tensor is sent, so it changes nothing.
        t_device: only the target of this device is written; -1: all.

    Raises:
        RuntimeError: a shape, a type or the number of targets does not fit.
    """
    context = contexts.find(tp_context)
    split, staged = context.split(broadcast_type), context.staged(buffer, source.shape)
    _check_count("targets", targets, split)
    for target in targets:
        _check_like("targets", target, source.shape)
    staged.copy_(source)
    _spread(staged, split, targets, t_device)


@extension
def tp_gather(
    tp_context: int,
    buffer: int,
    inputs: list[Tensor],
    broadcast_type: int,
    targets: list[Tensor],
    broadcast_type_target: int,
    dim: int,
    t_device: int = -1,
) -> None:
    """Join the parts of a split in a buffer, and copy the whole to the devices of another split.

    Args:
        tp_context: handle.
        buffer: 0 or 1; holds the whole afterwards.
        inputs: one part [rows, (end - start) * dim] fp16 per span.
        broadcast_type: whose split the inputs are.
        targets: one tensor [rows, total * dim] per span of the other split, written; not looked at without one.
        broadcast_type_target: whose split the targets are; -1 or -2: the buffer is enough.
        dim: columns per unit.
        t_device: only the input and the target of this device take part; -1: all.

    Raises:
        RuntimeError: a shape, a type or a number of tensors does not fit.
    """
    context = contexts.find(tp_context)
    split = context.split(broadcast_type)
    _check_count("inputs", inputs, split)
    rows = inputs[0].shape[0]
    for part, (_, start, stop) in zip(inputs, split, strict=True):
        _check_like("inputs", part, (rows, (stop - start) * dim))
    staged = context.staged(buffer, (rows, split[-1][2] * dim))
    for part, (device, start, stop) in zip(inputs, split, strict=True):
        if t_device in (-1, device):
            staged[:, start * dim : stop * dim].copy_(part)
    if broadcast_type_target not in LEAVE_PINNED:
        others = context.split(broadcast_type_target)
        _check_count("targets", targets, others)
        for target in targets:
            _check_like("targets", target, staged.shape)
        _spread(staged, others, targets, t_device)


@extension
def tp_cross_device_barrier(
    tp_context: int, broadcast_type: int, t_device: int = -1, stage: int = -1, next_stage: int = -1
) -> None:
    """Check the arguments; there is nothing to wait for, because every copy has ended when its function returns.

    Raises:
        RuntimeError: the handle is none of a context, or there is no such type.
    """
    contexts.find(tp_context).split(broadcast_type)


@extension
def tp_all_reduce(tp_context: int, buffer: int, tensors: list[Tensor], residuals: list[Tensor]) -> None:
    """Add every tensor to the residual: residual_i = residual_0 + tensor_0 + tensor_1 + …, in this order, in fp16.

    Args:
        tp_context: handle.
        buffer: 0 or 1; holds the sum afterwards.
        tensors: [rows, columns] fp16, one per device.
        residuals: the same residual on each of those devices, written.

    Raises:
        RuntimeError: a shape, a type or a number of tensors does not fit.
    """
    context = contexts.find(tp_context)
    if not tensors or len(tensors) != len(residuals):
        raise ValueError(f"there must be as many residuals as tensors, got {len(residuals)} and {len(tensors)}")
    for tensor in (*tensors, *residuals):
        _check_like("tensors and residuals", tensor, tensors[0].shape)
    staged = context.staged(buffer, tensors[0].shape).copy_(residuals[0])
    for tensor in tensors:
        staged += tensor.cpu()
    for residual in residuals:
        residual.copy_(staged)


def _spread(staged: Tensor, split: Split, targets: Sequence[Tensor], t_device: int) -> None:
    for target, (device, _, _) in zip(targets, split, strict=True):
        if t_device in (-1, device):
            target.copy_(staged)


def _check_count(name: str, tensors: Sequence[Tensor], split: Split) -> None:
    if len(tensors) != len(split) or not split:
        raise ValueError(f"{name} must hold one tensor for each of {len(split)} spans, got {len(tensors)}")


def _check_like(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tensor.dtype != torch.float16 or tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must be {list(shape)} fp16, got {list(tensor.shape)} {tensor.dtype}")
