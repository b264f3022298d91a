"""Round to nearest: half a step, the best of the ratios, exact special cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qinfer.quant.rtn import RATIOS, round_to_nearest
from tests.strategies import random_tensor, seeds


def restored(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the matrix, and per element its step and its zero point."""
    group = torch.arange(codes.shape[0]) // (codes.shape[0] if group_size == -1 else group_size)
    step, zero = scales.float()[group], zeros.float()[group]
    return (codes.float() - zero) * step, step, zero


@given(
    seed=seeds,
    bits=st.integers(2, 8),
    shape=st.sampled_from([(1, 1), (5, 2), (32, 3), (96, 4), (130, 2)]),
    group_size=st.sampled_from([-1, 16, 32, 128]),
    symmetric=st.booleans(),
    lowest_zero=st.integers(0, 1),
    shift=st.sampled_from([0.0, 2.0, -2.0]),
    scale=st.sampled_from([1e-9, 1e-3, 1.0, 100.0]),
)
def test_every_value_gets_the_nearest_code(
    seed: int,
    bits: int,
    shape: tuple[int, int],
    group_size: int,
    symmetric: bool,
    lowest_zero: int,
    shift: float,
    scale: float,
) -> None:
    w = (random_tensor(*shape, seed=seed) + shift) * scale
    codes, scales, zeros = round_to_nearest(
        w, bits=bits, group_size=group_size, symmetric=symmetric, lowest_zero=lowest_zero
    )
    assert (codes.dtype, scales.dtype, zeros.dtype) == (torch.uint8, torch.float16, torch.uint8)
    last = (1 << bits) - 1
    assert int(codes.max()) <= last
    assert int(zeros.max()) <= last
    assert torch.isfinite(scales).all()
    if symmetric:
        assert (zeros == 1 << (bits - 1)).all()
    else:
        assert int(zeros.min()) >= lowest_zero
    got, step, zero = restored(codes, scales, zeros, group_size)
    # Inside the range of the codes the error is half a step at most; beyond it the code is the outermost one.
    slack = 1 + 1e-5
    low, high = -zero * step, (last - zero) * step
    inside = (w >= low) & (w <= high)
    assert ((got - w).abs()[inside] <= (step * 0.5 * slack)[inside]).all()
    assert (codes[w < low] == 0).all()
    assert (codes[w > high] == last).all()


@given(seed=seeds, symmetric=st.booleans(), lowest_zero=st.integers(0, 1), shift=st.sampled_from([0.0, 3.0, -3.0]))
def test_the_search_is_no_worse_than_any_ratio(seed: int, symmetric: bool, lowest_zero: int, shift: float) -> None:
    w = random_tensor(64, 3, seed=seed) + shift
    codes, scales, zeros = round_to_nearest(w, bits=4, group_size=32, symmetric=symmetric, lowest_zero=lowest_zero)
    error = (restored(codes, scales, zeros, 32)[0] - w).square().view(2, 32, 3).sum(dim=1)
    groups = w.view(2, 32, 3)
    low, high = groups.amin(1), groups.amax(1)
    if symmetric:
        widest = torch.maximum(-low / 8, high / 7)
    else:
        high = high.clamp_min(0)
        widest = (high - torch.minimum(low.clamp_max(0), -high * lowest_zero / (15 - lowest_zero))) / 15
    zero = zeros.float()[:, None]
    for ratio in RATIOS:
        step = (widest * ratio).half().float()[:, None]
        rounded = (((groups / step).round() + zero).clamp(0, 15) - zero) * step
        assert (error <= (rounded - groups).square().sum(dim=1) * (1 + 1e-6)).all()


def test_ratios_run_from_no_clipping_to_seven_tenths() -> None:
    assert len(RATIOS) == 20
    assert RATIOS[0] == 1.0
    assert RATIOS[-1] == pytest.approx(0.7)


def test_an_outlier_is_clipped_where_that_pays() -> None:
    w = random_tensor(128, 1, seed=0) * 0.1
    w[7] = 0.5
    scales = round_to_nearest(w, bits=4, group_size=-1, symmetric=True)[1]
    assert float(scales[0, 0]) < 0.5 / 7 * 0.95


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_matrix_on_the_grid_comes_back_exactly(symmetric: bool) -> None:
    codes = torch.randint(0, 16, (64, 8))
    codes[0], codes[1] = 0, 15
    w = (codes - 8).float() * 0.25
    got_codes, scales, zeros = round_to_nearest(w, bits=4, group_size=64, symmetric=symmetric)
    assert torch.equal(got_codes.long(), codes)
    assert (scales == 0.25).all()
    assert (zeros == 8).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_matrix_of_zeros_stays_zero(symmetric: bool) -> None:
    result = round_to_nearest(torch.zeros(64, 4), bits=4, group_size=32, symmetric=symmetric, lowest_zero=1)
    assert torch.equal(restored(*result, 32)[0], torch.zeros(64, 4))


def test_an_empty_matrix_has_no_groups() -> None:
    codes, scales, zeros = round_to_nearest(torch.zeros(0, 4), bits=4, group_size=32, symmetric=False)
    assert (codes.shape, scales.shape, zeros.shape) == ((0, 4), (0, 4), (0, 4))


def test_a_group_larger_than_the_matrix_is_one_group() -> None:
    w = random_tensor(48, 4, seed=1)
    one = round_to_nearest(w, bits=4, group_size=-1, symmetric=False)
    for group_size in (48, 2**50):
        again = round_to_nearest(w, bits=4, group_size=group_size, symmetric=False)
        assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))


def test_options_out_of_range() -> None:
    w = torch.ones(32, 2)
    with pytest.raises(ValueError, match="bits must be 2 to 8, got 1"):
        round_to_nearest(w, bits=1, group_size=32, symmetric=True)
    with pytest.raises(ValueError, match="group_size must be positive or -1, got 0"):
        round_to_nearest(w, bits=4, group_size=0, symmetric=True)
    with pytest.raises(ValueError, match="small enough for fp16 scales"):
        round_to_nearest(w * 1e6, bits=4, group_size=32, symmetric=True)
