"""One rank of several without the others: it computes its share of a model and hears itself from every peer.

The kernels of a step are those of the rank in company, sums through mailboxes included; what is missing is the way
between GPUs and the wait for the slowest. So shares of large models are tuned and profiled on one GPU. The numbers
have no meaning: a sum is that of equal parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qinfer.bench.synthetic import synthetic_model, synthetic_sizes
from qinfer.kernels.all_reduce import BLOCK, CHANNELS_PER_SM, Mailboxes, all_reduce
from qinfer.kernels.device import num_sms
from qinfer.models.model import Model
from qinfer.parallel.comm import Alone, check_sizes
from qinfer.parallel.peers import ONE_SHOT_BYTES
from qinfer.parallel.plan import Plan

ENOUGH = 1 << 12  # GB of each GPU of the plan, so that nothing but equality decides


class Echo(Alone):
    """The communicator of rank 0 of `size`, which is there alone."""

    def __init__(self, size: int, device: torch.device) -> None:
        """Make mailboxes as large as those of a group."""
        self.size = size
        channels = min(ONE_SHOT_BYTES // 4 // BLOCK, CHANNELS_PER_SM * num_sms(device))
        self._mail = Mailboxes.loopback(size, channels, device)

    def all_reduce_parts(self, parts: Tensor, *, in_order: bool = False) -> Tensor:
        """Add the parts of `size` ranks alike; large sums, which NCCL would make, stay as they are."""
        fits = parts.dtype == torch.float32 and self._mail.fits(*parts.shape[1:])
        return all_reduce(parts, self._mail) if fits else parts

    def all_gather(self, x: Tensor, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
        """Join x and zeros where those of the others would be."""
        dim = check_sizes(x, dim, sizes, rank=0, size=self.size)
        shapes = [(*x.shape[:dim], length, *x.shape[dim + 1 :]) for length in sizes or [x.shape[dim]] * self.size]
        return torch.cat([x, *(x.new_zeros(shape) for shape in shapes[1:])], dim)


def synthetic_share(preset: str, weights: str, device: torch.device, *, num_layers: int, ranks: int) -> Model:
    """Make rank 0's share of a preset that so many equal GPUs divide, or all of it for one.

    Raises:
        PlanError: the model cannot be divided like that.
    """
    if ranks == 1:
        return synthetic_model(preset, weights, device, num_layers=num_layers)
    plan = Plan.make(synthetic_sizes(preset, weights), [ENOUGH] * ranks)
    return synthetic_model(preset, weights, device, num_layers=num_layers, plan=plan, comm=Echo(ranks, device))
