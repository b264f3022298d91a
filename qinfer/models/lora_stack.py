"""The buffers from which the kernels read the adapters of one product: one slot per adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qinfer.kernels.lora import add_lora, padded_rank
from qinfer.models.batch import Batch
from qinfer.models.peft import Pair
from qinfer.parallel.plan import Span


@dataclass(frozen=True)
class Site:
    """One product of a decoder to which adapters may add: its modules side by side, and this rank's part of them."""

    modules: tuple[str, ...]  # q, k and v, gate and up, or one
    inputs: Span  # input features of the modules that this rank has
    outputs: tuple[Span, ...]  # outputs of each module that this rank has
    order: Tensor | None  # [K] int32: feature j of the product's input is feature order[j] of these inputs


@dataclass(frozen=True)
class LoraStack:
    """What the loaded adapters add to one product; slots are written in place, so that a recorded step sees them."""

    a: Tensor  # [L, P, R, K], features in the order of the product
    b: Tensor  # [L, N, R], times the scale of the adapter
    widths: tuple[int, ...]  # outputs per module

    @classmethod
    def empty(
        cls, site: Site, num_slots: int, rank: int, *, device: torch.device, dtype: torch.dtype, old: LoraStack | None
    ) -> LoraStack:
        """Make buffers for so many adapters of at most some rank, and take over what stands in smaller ones."""
        widths = tuple(stop - start for start, stop in site.outputs)
        rank, in_features = padded_rank(rank), site.inputs[1] - site.inputs[0]
        a = torch.zeros(num_slots, len(widths), rank, in_features, device=device, dtype=dtype)
        b = torch.zeros(num_slots, sum(widths), rank, device=device, dtype=dtype)
        if old is not None:
            a[: old.a.shape[0], :, : old.a.shape[2]] = old.a
            b[: old.b.shape[0], :, : old.b.shape[2]] = old.b
        return cls(a, b, widths)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return self.a.nbytes + self.b.nbytes

    def write(self, slot: int, site: Site, pairs: Sequence[Pair | None]) -> None:
        """Put an adapter into a slot.

        Args:
            slot: where it goes.
            site: the product.
            pairs: the matrices of each module; None where the adapter leaves one as it is.
        """
        self.a[slot].zero_()
        self.b[slot].zero_()
        order = slice(None) if site.order is None else site.order.long().cpu()
        members = zip(self.a[slot], torch.split(self.b[slot], list(self.widths)), pairs, site.outputs, strict=True)
        for a, b, pair, (start, stop) in members:
            if pair is not None:
                a[: pair.rank] = pair.a[:, slice(*site.inputs)][:, order].to(a)
                b[:, : pair.rank] = (pair.b[start:stop].float() * pair.scale).to(b)

    def add(self, x: Tensor, batch: Batch, y: Tensor) -> None:
        """Add to a product [T, N] of x [T, K], in place, what the adapters of the batch add."""
        if batch.has_adapters:
            add_lora(x, self.a, self.b, batch.adapters, y, widths=self.widths)
