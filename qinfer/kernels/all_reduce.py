"""The sum of every rank's product, in one kernel over memory that all ranks can write: for messages too small for NCCL.

    out[0, t, c] = sum_r x_r[t, c],    x_r[t, c] = sum_s parts[s, t, c] on rank r;    both in fp32, in ascending order

Parts [S, T, C] differ in S between ranks at will. All ranks add in the order of the ranks and get the same bits. int32
is added as it is, which moves any 32 bits from one rank to all where the others bring zeros.

Layout. A program owns a channel: BLOCK columns of one row. Every rank has a mailbox [channels, 2, R, BLOCK] of 64-bit
words, into which its peers write: value in the low half, number of the use in the high half. A store of 64 bits arrives
whole, so a word that carries the number carries the value of that use, and no fence or flag stands between them.

    push     write my words for use n of the channel to every peer, at [channel, n % 2, my rank]
    collect  read my own mailbox again and again until the words of all peers carry n, then add

Why two buffers are enough. Words of use n replace those of use n - 2. A rank pushes n after it has collected n - 1,
because kernels of a stream follow each other. Words n - 1 of a peer were there by then, and that peer had collected
n - 2 before it pushed them. So nobody still reads what is overwritten, and nobody gets more than one use ahead. One
buffer would not do: having pushed n - 1, a peer may still be reading them from the others. The number of uses lives on
the device, per channel, and grows with every run, so a replay of a recorded graph is a run like any other; it wraps
after 2^32 uses, when all words of the channel are young.

Why it cannot lock up. Programs wait for other ranks alone, and for none of their own; all programs of a launch fit on
the GPU together (CHANNELS_PER_SM), so the partner of a waiting program runs or will. A rank that is gone never pushes:
then somebody on the host writes to `abort`, which programs look at now and then, and the result is anything.

It takes part in the overlap of kernels: the next one may start at once, since all programs are resident by then; what
it fetches ahead is fetched while this one waits for the peers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.checks import check_device, check_rows, check_shape
from qinfer.kernels.device import op
from qinfer.kernels.overlap import let_next_start, overlap, wait_for_inputs
from qinfer.kernels.parts import add_up, load_sum

BLOCK = 128  # columns of a channel, by one warp
CHANNELS_PER_SM = 8  # a quarter or half of the programs of one warp that a multiprocessor takes
PATIENCE = tl.constexpr(4096)  # looks into the mailbox before one at `abort`, which is beyond the bus

Phase = Literal["both", "push", "collect"]


@dataclass(frozen=True)
class Mailboxes:
    """What a rank exchanges words through.

    Attributes:
        rank: this one.
        boxes: [channels, 2, R, BLOCK] int64 of every rank, in that rank's memory, zeros at first.
        uses: [channels] int32, how often each channel was used; zeros at first, this rank's own.
        abort: [1] int32 in memory of the host that the device can read; not 0 ends all waiting.
    """

    rank: int
    boxes: tuple[Tensor, ...]
    uses: Tensor
    abort: Tensor

    @classmethod
    def loopback(cls, size: int, channels: int, device: torch.device, *, rank: int = 0) -> Mailboxes:
        """Make mailboxes by which one of `size` ranks hears itself from every peer: for tests, and to compile ahead."""
        words = torch.zeros((2 * channels + 1) * size * BLOCK, dtype=torch.int64, device=device)
        shape = (channels, 2, size, BLOCK)
        strides = (2 * size * BLOCK, size * BLOCK, BLOCK, 1)
        # The place of rank i in box j is that of rank j in box i.
        boxes = tuple(words.as_strided(shape, strides, peer * BLOCK) for peer in range(size))
        return cls(rank, boxes, torch.zeros(channels, dtype=torch.int32, device=device), make_abort(device))

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.uses.shape[0]

    def fits(self, rows: int, columns: int) -> bool:
        """Say whether a result of so many rows and columns has a channel for each of its programs."""
        return rows * -(-columns // BLOCK) <= self.channels


def make_abort(device: torch.device) -> Tensor:
    """Return a zero that the host can change while the device looks at it."""
    return torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")


def all_reduce_reference(parts: Tensor, mail: Mailboxes, *, phase: Phase = "both") -> Tensor:
    """Compute `all_reduce` in plain torch: words come and go as in the kernel, but nobody waits for them."""
    mine = add_up(parts) if parts.is_floating_point() else parts[0]
    rows, columns = mine.shape
    chunks = triton.cdiv(columns, BLOCK)
    used = mail.uses[: rows * chunks]
    number, side = used + 1, (used + 1) & 1
    channel = torch.arange(rows * chunks, device=parts.device)
    if phase != "collect":
        padded = torch.nn.functional.pad(mine, (0, chunks * BLOCK - columns)).view(-1, BLOCK)
        words = number.long()[:, None] << 32 | padded.view(torch.int32).long() & 0xFFFFFFFF
        for rank, box in enumerate(mail.boxes):
            if rank != mail.rank:
                box[channel, side.long(), mail.rank] = words
    if phase == "push":
        return torch.empty_like(mine)[None]
    used += 1
    words = mail.boxes[mail.rank][channel, side.long()]
    total = torch.zeros_like(mine)
    for rank in range(len(mail.boxes)):
        if rank == mail.rank:
            total += mine
        else:
            if not (words[:, rank] >> 32).eq(number[:, None]).all():
                raise ValueError(f"rank {rank} has not pushed")
            total += words[:, rank].int().view(mine.dtype).view(rows, chunks * BLOCK)[:, :columns]
    return total[None]


# The distance of parts in rows, not in elements: that it is a multiple of 16 bytes shows in the stride of rows alone.
@triton.jit(do_not_specialize=["rows_apart"])
def _all_reduce_kernel(
    p_parts, boxes, p_uses, p_abort, p_out, rows_apart, stride_row, C, NUM_PARTS: tl.constexpr, RANK: tl.constexpr,
    NUM_RANKS: tl.constexpr, BLOCK: tl.constexpr, PUSH: tl.constexpr, COLLECT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    i_row, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_channel = i_row * tl.num_programs(1) + i_chunk
    o_block = tl.arange(0, BLOCK)
    o_c = i_chunk * BLOCK + o_block
    m_c = o_c < C
    p_mine = p_parts + i_row * stride_row + o_c
    wait_for_inputs(OVERLAP)
    number = tl.load(p_uses + i_channel) + 1
    if p_parts.dtype.element_ty == tl.int32:
        b_mine = tl.load(p_mine, mask=m_c, other=0)
    else:
        b_mine = load_sum(p_mine, rows_apart.to(tl.int64) * stride_row, m_c, NUM_PARTS)
    o_word = (i_channel * 2 + (number & 1)) * (NUM_RANKS * BLOCK) + o_block
    if PUSH:
        b_word = (number.to(tl.int64) << 32) | b_mine.to(tl.uint32, bitcast=True).to(tl.int64)
        for i in tl.static_range(1, NUM_RANKS):
            tl.store(boxes[(RANK + i) % NUM_RANKS] + o_word + RANK * BLOCK, b_word, mask=m_c)
    if COLLECT:
        b_sum = tl.zeros([BLOCK], dtype=b_mine.dtype)
        is_waiting = 1
        num_looks = 0
        while is_waiting != 0:
            # A look adds whatever it finds: when all has come, the sum is there without another load.
            b_sum = tl.zeros([BLOCK], dtype=b_mine.dtype)
            b_missing = tl.zeros([BLOCK], dtype=tl.int32)
            for i_rank in tl.static_range(NUM_RANKS):
                if i_rank == RANK:
                    b_sum += b_mine
                else:
                    b_word = tl.load(boxes[RANK] + o_word + i_rank * BLOCK, mask=m_c, other=0, volatile=True)
                    b_missing |= (b_word >> 32).to(tl.int32) ^ number
                    b_sum += b_word.to(tl.int32).to(b_mine.dtype, bitcast=True)
            is_waiting = tl.max((m_c & (b_missing != 0)).to(tl.int32), axis=0)
            num_looks += 1
            if num_looks % PATIENCE == 0:
                is_waiting = tl.where(tl.load(p_abort, volatile=True) == 0, is_waiting, 0)
        tl.store(p_out + i_row * C + o_c, b_sum, mask=m_c)
        tl.store(p_uses + i_channel, number)


def _check_all_reduce(parts: Tensor, mail: Mailboxes, *, phase: Phase = "both") -> None:
    if parts.dtype not in (torch.float32, torch.int32):
        raise TypeError(f"parts must be float32 or int32, got {parts.dtype}")
    check_shape("parts", parts, ("S" if parts.is_floating_point() else 1, "T", "C"))
    check_rows("parts", parts)
    if parts.shape[0] > 1 and parts.stride(0) % max(parts.stride(1), 1):
        raise ValueError(f"parts must be whole rows apart, got strides {list(parts.stride())}")
    shape = (mail.channels, 2, len(mail.boxes), BLOCK)
    for box in mail.boxes:
        check_shape("boxes", box, shape)
    check_device(parts, uses=mail.uses, **{f"boxes[{rank}]": box for rank, box in enumerate(mail.boxes)})
    if not 0 <= mail.rank < len(mail.boxes):
        raise ValueError(f"rank must be in [0, {len(mail.boxes)}), got {mail.rank}")
    if not mail.fits(*parts.shape[1:]):
        raise ValueError(f"{list(parts.shape)} needs more than the {mail.channels} channels of the mailboxes")


@op(reference=all_reduce_reference, check=_check_all_reduce)
def all_reduce(parts: Tensor, mail: Mailboxes, *, phase: Phase = "both") -> Tensor:
    """Add the products of all ranks, each in parts over K; every rank calls this with its own parts, in the same order.

    Args:
        parts: [S, T, C] fp32, last stride 1, whole rows apart, of which S may differ between ranks; or [1, T, C] int32.
        mail: this rank's mailboxes; the result must fit.
        phase: what to do of it; where one process plays several ranks, all of them push before the first collects.

    Returns:
        [1, T, C] of the dtype of parts, contiguous, the same bits on all ranks; anything after a push alone, and after
        an abort.

    Raises:
        TypeError: parts are neither fp32 nor int32.
        ValueError: a shape, a stride or a device does not fit, or there are too few channels.
    """
    num_parts, rows, columns = parts.shape
    out = torch.empty((1, rows, columns), dtype=parts.dtype, device=parts.device)
    if out.numel():
        _all_reduce_kernel[(rows, triton.cdiv(columns, BLOCK))](
            parts, mail.boxes, mail.uses, mail.abort, out, parts.stride(0) // parts.stride(1), parts.stride(1), columns,
            NUM_PARTS=num_parts, RANK=mail.rank, NUM_RANKS=len(mail.boxes), BLOCK=BLOCK,
            PUSH=phase != "collect", COLLECT=phase != "push", num_warps=1, **overlap(parts),
        )  # fmt: skip
    return out
