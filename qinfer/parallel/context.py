"""TPContext: ExLlamaV2's name for how a model is divided, over a Plan and the ranks of a Group.

There, one process drives every GPU, and a method takes or returns a list with one tensor per device of a split. Here
every GPU has a process of its own and all of them call the same methods in the same order: a list holds this rank's
tensor, or nothing where the rank has no share of the split. Spans still name GPUs, `(device, start, end)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from qinfer.cache.formats import kv_format
from qinfer.models.layers import Attention
from qinfer.models.model import Model
from qinfer.models.placement import loaded_sizes
from qinfer.parallel.plan import GB, Plan

BROADCAST_KV = 0  # key-value heads
BROADCAST_ID = 1  # intermediate columns of the MLP
BROADCAST_VC = 2  # vocabulary
BROADCAST_RS = 3  # residual stream
BROADCAST_Q = 4  # query heads
_FIELDS = ("kv_heads", "mlp", "vocab", "residual", "q_heads")  # of Share, in this order

MAX_INPUT = 2048  # rows for which the pinned buffers have room
_ALIGNMENT = 128  # bytes, of slices of the scratch
# By the ends of the names of ExLlamaV2's cache classes.
_CACHE_BYTES = {"8bit": 1.0, "Q8": 8.5 / 8, "Q6": 6.5 / 8, "Q4": 4.5 / 8}

Split: TypeAlias = tuple[int, int, int]  # device, start, end
_handles = count(1)


class TPContext:
    """Who holds what, and the exchange of tensors between those who do.

    Attributes:
        model: whose ranks take part.
        plan: the shares of all ranks.
        kv_split: spans of key-value heads, without empty ones; likewise `id_split`, `vc_split`, `rs_split`, `q_split`.
        pinned_temp: two buffers in page-locked memory, once finalized.
        ext_tp_context: a number while the context is finalized.
        all_devs: GPUs that hold heads, MLP columns or vocabulary.
        device: the first of them.
        num_devices: the last of them plus one.
        sin: this rank's table of sines in a list; likewise `cos`; None until asked for.
    """

    def __init__(
        self,
        model: Model,
        gpu_split: Sequence[float] | None,
        expect_cache_tokens: int = 0,
        expect_cache_base: str | type | None = None,
    ) -> None:
        """Divide a model; see `define_split`."""
        self.model = model
        self.pinned_temp: list[Tensor] | None = None
        self.ext_tp_context: int | None = None
        self.sin: list[Tensor] | None = None
        self.cos: list[Tensor] | None = None
        self._scratch: Tensor | None = None
        self._scratch_used = 0
        self.define_split(gpu_split, expect_cache_tokens, expect_cache_base)

    def define_split(
        self,
        gpu_split: Sequence[float] | None,
        expect_cache_tokens: int = 0,
        expect_cache_base: str | type | None = None,
    ) -> None:
        """Compute the plan and the five splits.

        Args:
            gpu_split: GB to use of each GPU; None takes the plan of a model that is divided already, and else the free
                memory of all GPUs.
            expect_cache_tokens: tokens that the cache shall hold; 0: as many as the model has positions.
            expect_cache_base: name of a KV format, or a class named like ExLlamaV2's caches (…_8bit, …_Q8, …_Q6, …_Q4);
                None: 16 bits.

        Raises:
            PlanError: the model does not fit.
            UnsupportedError: there is no such KV format.
        """
        model = self.model
        if gpu_split is None and model.plan is not None:
            self.plan = model.plan
        else:
            sizes = loaded_sizes(model.config, model.decoder) if model.plan is None else model.plan.sizes
            tokens = expect_cache_tokens or model.config.max_positions
            width = _bytes_per_element(expect_cache_base, model.config.head_dim)
            gpus = _detect(model.device) if gpu_split is None else gpu_split
            self.plan = Plan.make(sizes, gpus, cache_tokens=tokens, bytes_per_element=width)
        self.kv_split, self.id_split, self.vc_split, self.rs_split, self.q_split = map(self._spans, _FIELDS)
        self.all_devs = sorted(
            {device for split in (self.kv_split, self.id_split, self.vc_split) for device, *_ in split}
        )
        self.device = self.all_devs[0]
        self.num_devices = self.all_devs[-1] + 1

    def finalize(self) -> None:
        """Allocate the pinned buffers; nothing happens the second time.

        Raises:
            PlanError: the model does not run on as many ranks as the plan has.
        """
        self.plan.check_ranks(self.model.comm.size)
        if self.pinned_temp is None:
            config = self.model.config
            widest = max(config.vocab_size, config.mlp_size, config.cut_mlp_size, config.hidden_size)
            length = min(MAX_INPUT, config.max_positions) * widest
            is_pinned = self.model.device.type == "cuda"
            buffers = [torch.empty(length, dtype=self.model.dtype, pin_memory=is_pinned) for _ in range(2)]
            self.pinned_temp, self.ext_tp_context = buffers, next(_handles)

    def unload(self) -> None:
        """Free the buffers and the tables; `finalize` makes them again."""
        self.pinned_temp = self.ext_tp_context = self.sin = self.cos = self._scratch = None
        self._scratch_used = 0

    def all_devices(self) -> list[int]:
        """Return the GPUs that hold heads, MLP columns or vocabulary, sorted."""
        return list(self.all_devs)

    def get_split(self, broadcast_type: int) -> list[Split]:
        """Return the spans (device, start, end) of a type.

        Raises:
            ValueError: there is no such type.
        """
        splits = (self.kv_split, self.id_split, self.vc_split, self.rs_split, self.q_split)
        if broadcast_type not in range(len(splits)):
            raise ValueError(f"broadcast_type must be 0 to {len(splits) - 1}, got {broadcast_type}")
        return splits[broadcast_type]

    def get_devs(self, broadcast_type: int) -> list[int]:
        """Return the GPUs of the spans of a type."""
        return [device for device, _, _ in self.get_split(broadcast_type)]

    def broadcast(self, buffer: int, input_tensor: Tensor, broadcast_type: int, dim: int = 1) -> list[Tensor]:
        """Send rank 0's tensor to every rank of a split.

        Args:
            buffer: 0 or 1.
            input_tensor: what to send; on other ranks it gives shape and dtype.
            broadcast_type: whose split.
            dim: unit of the split; no part is taken, so it changes nothing.

        Returns:
            The tensor on this rank's device, if the rank is in the split.
        """
        self._buffer(buffer)
        received = self.model.comm.broadcast(input_tensor.to(self.model.device, copy=True))
        return [received] if self._mine(broadcast_type) else []

    def gather(self, buffer: int, inputs: Sequence[Tensor], broadcast_type: int, dim: int = 1) -> Tensor:
        """Join the parts of all ranks in page-locked memory.

        Args:
            buffer: 0 or 1, where to; the next gather there overwrites it.
            inputs: this rank's part [rows, (end - start) · dim], if it has one.
            broadcast_type: whose split.
            dim: columns per unit of the split.

        Returns:
            [rows, total · dim] in the model's dtype, on the CPU.
        """
        joined = self._join(inputs, broadcast_type, dim)
        pinned = self._buffer(buffer)
        if joined.numel() > pinned.numel():
            raise ValueError(f"the buffer has room for {pinned.numel()} elements, got {list(joined.shape)}")
        return pinned[: joined.numel()].view(joined.shape).copy_(joined)

    def allgather(
        self, buffer: int, inputs: Sequence[Tensor], broadcast_type_g: int, broadcast_type_b: int, dim: int = 1
    ) -> list[Tensor]:
        """Join the parts of all ranks on the ranks of another split; see `gather`."""
        self._buffer(buffer)
        joined = self._join(inputs, broadcast_type_g, dim)
        return [joined] if self._mine(broadcast_type_b) else []

    def add_residual(
        self, target: Sequence[Tensor], source: Tensor | Sequence[Tensor], broadcast_type: int, dim: int = 1
    ) -> None:
        """Add this rank's columns of a residual to its part, in place.

        Args:
            target: this rank's part [rows, (end - start) · dim], if it has one.
            source: [rows, total · dim], or a list of it.
            broadcast_type: whose split.
            dim: columns per unit of the split.
        """
        part = self._part(target, broadcast_type, dim)
        mine = self._mine(broadcast_type)
        if part is not None and mine is not None:
            whole = source if isinstance(source, Tensor) else source[0]
            part += whole[:, mine[1] * dim : mine[2] * dim].to(part.device)

    def wait_streams(self) -> None:
        """Wait until this rank's device has done all it was asked to."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def get_sin_cos(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return this rank's tables of sines and cosines, [positions, R/2] fp32 each; empty lists without heads."""
        if self.sin is None or self.cos is None:
            attention = self.model.decoder.blocks[0].attention
            tables = [attention.rope] if isinstance(attention, Attention) else []
            self.sin, self.cos = [table.sin for table in tables], [table.cos for table in tables]
        return self.sin, self.cos

    def get_pinned(self, buffer: int, batch_size: int, q_len: int, dim: int) -> Tensor:
        """Return the beginning of a pinned buffer as [batch_size, q_len, dim].

        Raises:
            ValueError: it is too small, or `finalize` has not been called.
        """
        pinned, shape = self._buffer(buffer), (batch_size, q_len, dim)
        if prod(shape) > pinned.numel():
            raise ValueError(f"the buffer has room for {pinned.numel()} elements, got {list(shape)}")
        return pinned[: prod(shape)].view(shape)

    def reserve_scratch(self, scratch: Sequence[int]) -> None:
        """Reserve scratch memory: bytes per rank, of which this rank takes its own."""
        if len(scratch) != self.plan.size:
            raise ValueError(f"scratch must have one entry for each of {self.plan.size} ranks, got {len(scratch)}")
        self._scratch = torch.empty(scratch[self.model.comm.rank], dtype=torch.uint8, device=self.model.device)
        self._scratch_used = 0

    def begin_scratch_alloc_tp(self) -> None:
        """Hand out the scratch from its beginning again."""
        self._scratch_used = 0

    def get_scratch_slice_tp(self, rows: int, dtype: torch.dtype, broadcast_type: int, dim: int = 1) -> list[Tensor]:
        """Return scratch [rows, (end - start) · dim] for this rank's part, if it has one."""
        mine = self._mine(broadcast_type)
        return [] if mine is None else [self._take_scratch(rows, (mine[2] - mine[1]) * dim, dtype)]

    def get_scratch_slice_tp_bc(self, rows: int, dtype: torch.dtype, broadcast_type: int, dim: int = 1) -> list[Tensor]:
        """Return scratch [rows, total · dim] for the whole, if this rank is in the split."""
        if self._mine(broadcast_type) is None:
            return []
        return [self._take_scratch(rows, self.get_split(broadcast_type)[-1][2] * dim, dtype)]

    def _spans(self, field: str) -> list[Split]:
        """Return the spans of a field of `Share` that are not empty."""
        spans = [(share.gpu, *getattr(share, field)) for share in self.plan.shares]
        return [span for span in spans if span[1] < span[2]]

    def _mine(self, broadcast_type: int) -> Split | None:
        """Return this rank's span."""
        self.plan.check_ranks(self.model.comm.size)
        gpu = self.plan.shares[self.model.comm.rank].gpu
        return next((span for span in self.get_split(broadcast_type) if span[0] == gpu), None)

    def _buffer(self, buffer: int) -> Tensor:
        if self.pinned_temp is None:
            raise ValueError("finalize() must be called before tensors are exchanged")
        if buffer not in (0, 1):
            raise ValueError(f"buffer must be 0 or 1, got {buffer}")
        return self.pinned_temp[buffer]

    def _part(self, parts: Sequence[Tensor], broadcast_type: int, dim: int) -> Tensor | None:
        """Return this rank's part out of a list, after checking it."""
        mine = self._mine(broadcast_type)
        if len(parts) != (mine is not None):
            raise ValueError(f"this rank has {int(mine is not None)} parts of the split, got {len(parts)}")
        if mine is None:
            return None
        width = (mine[2] - mine[1]) * dim
        if parts[0].dim() != 2 or parts[0].shape[1] != width:
            raise ValueError(f"a part must be [rows, {width}], got {list(parts[0].shape)}")
        return parts[0]

    def _join(self, inputs: Sequence[Tensor], broadcast_type: int, dim: int) -> Tensor:
        """Gather the parts of all ranks on every rank's device."""
        comm, device = self.model.comm, self.model.device
        part = self._part(inputs, broadcast_type, dim)
        mine = torch.tensor([-1 if part is None else part.shape[0]], device=device)
        rows = sorted(set(comm.agree(comm.all_gather(mine, 0))) - {-1})
        if len(rows) != 1:
            raise ValueError(f"parts must have the same number of rows on all ranks, got {rows}")
        field = _FIELDS[broadcast_type]
        sizes = [(stop - start) * dim for start, stop in (getattr(share, field) for share in self.plan.shares)]
        if part is None:
            part = torch.empty(rows[0], 0, device=device)
        return comm.all_gather(part.to(self.model.dtype), 1, sizes)

    def _take_scratch(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        needed = rows * width * dtype.itemsize
        room = 0 if self._scratch is None else self._scratch.numel()
        if self._scratch is None or self._scratch_used + needed > room:
            left = room - self._scratch_used
            raise ValueError(f"[{rows}, {width}] {dtype} needs {needed} bytes of scratch, {left} are left of {room}")
        taken = self._scratch[self._scratch_used : self._scratch_used + needed]
        self._scratch_used += -(-needed // _ALIGNMENT) * _ALIGNMENT
        return taken.view(dtype).view(rows, width)


def _bytes_per_element(base: str | type | None, head_dim: int) -> float:
    """Return the bytes of a number in a cache."""
    if base is None:
        return 2.0
    if isinstance(base, str):
        return kv_format(base).nbytes_per_token(1, head_dim) / 2 / head_dim
    return _CACHE_BYTES.get(base.__name__.rpartition("_")[2], 2.0)


def _detect(device: torch.device) -> list[float]:
    """Return the free GB of every GPU; on a CPU one entry for all of the memory."""
    if device.type == "cuda":
        return [torch.cuda.mem_get_info(index)[0] / GB for index in range(torch.cuda.device_count())]
    return [float(1 << 19)]
