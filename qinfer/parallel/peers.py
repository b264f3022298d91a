"""Mailboxes of the ranks of one machine: GPU memory of each that all of them can write, over NVLink or PCIe.

Every rank allocates its own and opens those of the others through CUDA's handles for other processes, as torch does
when it sends tensors to one. (torch's symmetric memory would also give addresses, but its rendezvous counts per process
and not per group: a process that loads a second model would wait for ever. And it sets up NVLink multicast, which
nothing here uses.) Where a GPU cannot reach another, between machines, and on AMD there are no mailboxes, and every
size goes through NCCL.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qinfer.kernels.all_reduce import BLOCK, CHANNELS_PER_SM, Mailboxes, all_reduce, make_abort
from qinfer.kernels.device import num_sms

# Above so many bytes of a result NCCL may be faster: its ring sends each of them less than twice, whatever the number
# of ranks, a mailbox needs twice as many for every peer. On H200s mailboxes win up to 1 MiB between two, and up to
# 512 KiB between four (benchmarks/LOG.md).
ONE_SHOT_BYTES = 512 * 1024
_HANDLE_BYTES = 1024  # room for a handle as JSON
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # tells machines apart


def rehearse(device: torch.device, rank: int, size: int) -> None:
    """Compile what a rank sends through mailboxes at the start, without the others."""
    if _is_served(size):
        mail = Mailboxes.loopback(size, 1, device, rank=rank)
        for num_parts, dtype in ((1, torch.float32), (2, torch.float32), (1, torch.int32)):
            all_reduce(torch.zeros(num_parts, 1, BLOCK, dtype=dtype, device=device), mail)
        torch.cuda.synchronize(device)


def open_mailboxes(
    device: torch.device, rank: int, size: int, everyone: Callable[[Sequence[int]], list[list[int]]]
) -> Mailboxes | None:
    """Make this rank's mailboxes and open those of the others; every rank calls this.

    Args:
        device: GPU of this rank.
        rank: this process.
        size: number of ranks.
        everyone: sends some integers to all ranks and returns those of each, after what the device has yet to do.

    Returns:
        The mailboxes, once those of all ranks are empty; None on all ranks if one of them cannot reach another.
    """
    if not _is_served(size):
        return None
    facts = everyone([zlib.crc32(_BOOT.read_bytes()), device.index, num_sms(device)])
    places = [(machine, index) for machine, index, _ in facts]
    if not all(can for (can,) in everyone([int(_can_reach(places, rank))])):
        return None
    channels = min(ONE_SHOT_BYTES // 4 // BLOCK, CHANNELS_PER_SM * min(sms for *_, sms in facts))
    box = torch.zeros(channels, 2, size, BLOCK, dtype=torch.int64, device=device)
    # A peer that gets the handle gets empty mailboxes: what is sent waits for the zeros.
    handles = everyone(list(_handle(box).ljust(_HANDLE_BYTES)))
    boxes = tuple(box if peer == rank else _open(bytes(handle), box) for peer, handle in enumerate(handles))
    return Mailboxes(rank, boxes, torch.zeros(channels, dtype=torch.int32, device=device), make_abort(device))


def _is_served(size: int) -> bool:
    """Say whether ranks on such GPUs may have mailboxes at all."""
    return size > 1 and torch.version.hip is None


def _can_reach(places: Sequence[tuple[int, int]], rank: int) -> bool:
    """Say whether the GPU of a rank can write to the memory of all others, which sit on (machine, index)."""
    machine, index = places[rank]
    others = [place for other, place in enumerate(places) if other != rank]
    # Processes that see one GPU each all call it 0, and cannot ask about those of the others.
    if any(other != machine for other, _ in others) or len(set(places)) < len(places):
        return False
    count = torch.cuda.device_count()
    return all(other < count and torch.cuda.can_device_access_peer(index, other) for _, other in others)


def _handle(box: Tensor) -> bytes:
    """Return what another process needs to open a tensor that begins its storage."""
    shared = box.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
    return json.dumps([value.hex() if isinstance(value, bytes) else int(value) for value in shared]).encode()


def _open(handle: bytes, like: Tensor) -> Tensor:
    """Return a peer's tensor, which has the shape of this rank's, as one of this rank's GPU."""
    _, memory, nbytes, offset, counter, counter_offset, event, _ = json.loads(handle)
    # With this GPU's number instead of the peer's, so that the memory is mapped for kernels that run here.
    storage = torch.UntypedStorage._new_shared_cuda(
        like.device.index,
        bytes.fromhex(memory),
        nbytes,
        offset,
        bytes.fromhex(counter),
        counter_offset,
        bytes.fromhex(event),
        False,
    )
    return torch.empty(0, dtype=like.dtype, device=like.device).set_(storage, 0, like.shape, like.stride())
