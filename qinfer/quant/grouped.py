"""Integer codes with one scale and one zero point per group of input features: what many stored formats come down to.

    W[k, n] = (code[k, n] - zero[g, n]) * scale[g, n],   g = the group of feature k

    codes uint8 [K, N] · zeros integer [G, N], None: all 2^(bits-1) · scales fp16 or bf16 [G, N] · groups int64 [K]

Features of one group need not be neighbours. `find_runs` sorts them by group, stably, and cuts the sorted features into
equal runs that each lie in one group; a run is what the operand calls a group. Groups of unequal sizes are served as
long as they fall into whole runs of 16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qinfer.kernels.operand import SLICE_K, PlaneOperand
from qinfer.kernels.packing import pack_planes

HALVES = (torch.float16, torch.bfloat16)
SMALLEST_RUN = 16
RUNS = (128, 64, 32, SMALLEST_RUN)  # tried in turn where the group size itself does not fit the groups
WIDEST_STEP = 256  # the most features that a kernel unpacks at a time
GROUP_SIZES = "16, multiples of 32, -1"


@dataclass(frozen=True)
class Runs:
    """Input features sorted by group and cut into equal runs."""

    order: Tensor | None  # [K] int64, the feature at each place; None: sorting changes nothing
    length: int  # features per run, the last may be shorter
    groups: Tensor  # [ceil(K / length)] int64, the group of each run


def is_group_size(group_size: int) -> bool:
    """Say whether groups of this many features are served; -1 is one group."""
    return group_size in (-1, SMALLEST_RUN) or (group_size > 0 and group_size % SLICE_K == 0)


def num_groups(in_features: int, group_size: int) -> int:
    """Return how many groups `in_features` make."""
    return min(in_features, 1) if group_size == -1 else -(-in_features // group_size)


def features_per_group(in_features: int, group_size: int) -> int:
    """Return the size of every group but the last, at least 1."""
    return max(in_features, 1) if group_size == -1 else group_size


def sequential_groups(in_features: int, group_size: int) -> Tensor:
    """Return [K] int64, k // group_size for each feature k."""
    return torch.arange(in_features) // features_per_group(in_features, group_size)


def group_of_feature(act_order: Tensor, in_features: int, group_size: int) -> Tensor:
    """Return the groups [K] int32 of features that were grouped in the order `act_order`.

    Raises:
        ValueError: `act_order` is not a permutation of the features.
    """
    order, positions = act_order.long().cpu(), torch.arange(in_features)
    if act_order.shape != (in_features,) or not torch.equal(order.sort().values, positions):
        raise ValueError(f"act_order must hold each of {in_features} features once, got shape {list(act_order.shape)}")
    groups = sequential_groups(in_features, group_size)
    return torch.empty_like(groups).index_copy_(0, order, groups).to(torch.int32)


def find_runs(groups: Tensor, group_size: int) -> Runs | None:
    """Sort features by group and cut them into the longest runs that lie in one group each.

    Args:
        groups: [K] integer, the group of each feature.
        group_size: what a group is said to hold, one that `is_group_size` accepts.

    Returns:
        The runs; None where not even runs of 16 lie in one group each.
    """
    in_features = groups.shape[0]
    by_group, order = torch.sort(groups, stable=True)
    positions = torch.arange(in_features, device=groups.device)
    # One group for all of K ends where K does, so it may be as long as the kernels like best, not as a file likes.
    whole = max(-(-in_features // WIDEST_STEP), 1) * WIDEST_STEP
    longest = whole if group_size == -1 else min(group_size, whole)
    for length in (longest, *(length for length in RUNS if length < longest)):
        starts = by_group[::length]
        if torch.equal(starts[positions // length], by_group):
            is_identity = torch.equal(order, positions)
            return Runs(None if is_identity else order, length, starts.long())
    return None


def plane_operand(codes: Tensor, zeros: Tensor | None, scales: Tensor, *, bits: int, runs: Runs) -> PlaneOperand:
    """Arrange a matrix for the kernels on the device of its codes; scales keep their dtype.

    Args:
        codes: [K, N] uint8, input features in their original order.
        zeros: [G, N] integer; None where all are 2^(bits-1).
        scales: [G, N].
        bits: 2, 3, 4, 5, 6 or 8.
        runs: from `find_runs`.
    """
    device = codes.device
    order = None if runs.order is None else runs.order.to(device)
    offsets = None
    if zeros is not None:
        wide = zeros.to(torch.int16) - (1 << (bits - 1))
        # A zero point of 256 beside 8-bit codes is the one offset that int8 cannot hold.
        is_narrow = not wide.numel() or int(wide.max()) <= torch.iinfo(torch.int8).max
        offsets = wide.to(torch.int8 if is_narrow else torch.int16) if bool(wide.any()) else None
    return PlaneOperand(
        planes=pack_planes(codes if order is None else codes[order], bits=bits),
        scales=scales[runs.groups].to(device),
        offsets=None if offsets is None else offsets[runs.groups].to(device),
        bits=bits,
        group_size=runs.length,
        in_features=codes.shape[0],
        order=None if order is None else order.to(torch.int32),
    )


def matrix(codes: Tensor, zeros: Tensor | None, scales: Tensor, *, bits: int, groups: Tensor) -> Tensor:
    """Return W [K, N] in fp32: the product is rounded once, everything before it is exact.

    Args:
        codes: [K, N] uint8.
        zeros: [G, N] integer; None where all are 2^(bits-1).
        scales: [G, N].
        bits: width of the codes.
        groups: [K] int64.
    """
    centred = codes.float() - (float(1 << (bits - 1)) if zeros is None else zeros.float()[groups])
    return centred * scales.float()[groups]
