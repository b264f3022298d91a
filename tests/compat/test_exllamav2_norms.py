"""The norms and the soft cap of `qinfer.compat.exllamav2_ext` against shared vectors and direct formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qinfer.compat import exllamav2_ext as ext
from tests.compat.vectors import EVERYWHERE, NOTHING, vectors
from tests.strategies import random_tensor

EPS = 1e-5


def halves(*shape: int, seed: int, where: str = "cpu") -> Tensor:
    """Multiples of 1/256, so that sums of them are exact, and means of as many as a power of two."""
    return (random_tensor(*shape, seed=seed) * 256).round().div(256).half().to(where)


def formula(x: Tensor, w: Tensor, b: Tensor | None, *, rms: bool) -> Tensor:
    """Both norms in fp64; rounded to fp16 before the bias is added, and again after."""
    numbers, mean = x.double(), 0.0 if rms else x.double().mean(-1, keepdim=True)
    numbers = numbers - mean
    y = (numbers * w.double() / (numbers.square().mean(-1, keepdim=True) + EPS).sqrt()).half()
    return y if b is None else (y.double() + b.double()).half()


def same(actual: Tensor, expected: Tensor) -> bool:
    """Equal, but for neighbours where fp32 and fp64 fall on different sides of a middle: one number in a thousand."""
    steps = (actual.cpu().view(torch.int16).int() - expected.cpu().view(torch.int16).int()).abs()
    return int(steps.max()) <= 1 and int(steps.sum()) <= 1 + steps.numel() // 1000


@EVERYWHERE
def test_rms_norm(where: str) -> None:
    golden = vectors("small_kernels", where)
    x, w = golden["rms_x"], golden["rms_w"]
    y = torch.zeros_like(x)
    ext.rms_norm(x, w, y, float(golden["rms_eps"]))
    assert torch.equal(y, golden["rms_y"])
    for x_dtype in (torch.float16, torch.float32):
        wide = torch.zeros_like(x, dtype=torch.float32)
        ext.rms_norm(x.to(x_dtype), w, wide, EPS)
        assert torch.equal(wide.half(), golden["rms_y"])
        assert not torch.equal(wide.half().float(), wide)
        narrow = torch.zeros_like(x)
        ext.rms_norm(x.to(x_dtype), w, narrow, EPS)
        assert torch.equal(narrow, golden["rms_y"])


@EVERYWHERE
def test_rms_norm_(where: str) -> None:
    x, w = halves(3, 33, seed=1, where=where), halves(33, seed=2, where=where)
    y = torch.zeros_like(x)
    ext.rms_norm(x, w, y, EPS)
    ext.rms_norm_(x, w, EPS)
    assert torch.equal(x, y)
    assert same(y, formula(halves(3, 33, seed=1), halves(33, seed=2), None, rms=True))


def test_an_infinite_number_counts_as_the_largest() -> None:
    x = torch.tensor([[float("inf"), -float("inf")], [65504.0, -65504.0], [float("nan"), 1.0]]).half()
    w = torch.tensor([1.0, 1.0]).half()
    for norm in (ext.rms_norm_, lambda x, w, eps: ext.layer_norm_(x, w, None, eps)):
        y = x.clone()
        norm(y, w, EPS)
        assert y[0].tolist() == y[1].tolist() == [1.0, -1.0]
        assert y[2].isnan().all()
    wide = x[:1].float()
    ext.rms_norm_(wide, w, EPS)
    assert wide.isnan().all()


@EVERYWHERE
def test_rms_norm_tp(where: str) -> None:
    context = ext.make_tp_context([(0, 0, 1)], [(0, 0, 1)], [(0, 0, 1)], [(0, 0, 1)], [(0, 0, 1)], [], [0])
    x, w = ([halves(*shape, seed=seed, where=where) for seed in range(2)] for shape in ((3, 8), (8,)))
    y = [torch.zeros_like(rows) for rows in x]
    ext.rms_norm_tp(x, w, y, EPS, context)
    for rows, weight, actual in zip(x, w, y, strict=True):
        expected = torch.zeros_like(rows)
        ext.rms_norm(rows, weight, expected, EPS)
        assert torch.equal(actual, expected)
    with pytest.raises(RuntimeError, match="one length, got 2, 1 and 2"):
        ext.rms_norm_tp(x, w[:1], y, EPS, context)
    with pytest.raises(RuntimeError, match=r"x must be \[3, 8\], got \[2, 8\]"):
        ext.rms_norm_tp([x[0], x[1][:2]], w, y, EPS, context)
    with pytest.raises(TypeError, match="x must be float16"):
        ext.rms_norm_tp([rows.float() for rows in x], w, y, EPS, context)
    ext.free_tp_context(context)
    with pytest.raises(RuntimeError, match="is no tensor-parallel context"):
        ext.rms_norm_tp(x, w, y, EPS, context)


@EVERYWHERE
@pytest.mark.parametrize("nothing", [None, NOTHING], ids=["None", "meta"])
def test_layer_norm(where: str, nothing: Tensor | None) -> None:
    x, w, b = (halves(*shape, seed=seed) for seed, shape in enumerate([(5, 64), (64,), (64,)]))
    x += 2
    for bias in (nothing, b):
        given = bias if bias is nothing else b.to(where)
        y = torch.zeros_like(x, device=where)
        ext.layer_norm(x.to(where), w.to(where), given, y, EPS)
        assert same(y, formula(x, w, None if bias is nothing else b, rms=False))


def test_a_bias_is_added_in_fp16() -> None:
    # The root is 1/2, so the norm is 1 + 2^-9 + 2^-20. Rounded, it loses 2^-20; then the sum is a tie, and even.
    a = 1 + 2.0**-10
    x, y = torch.tensor([[a, -a]]).half(), torch.zeros(1, 2).half()
    ext.layer_norm(x, torch.tensor([2 * a, 0.0]).half(), torch.tensor([2.0**-11, 0.0]).half(), y, 4 - a * a)
    assert y.tolist() == [[1 + 2.0**-9, 0.0]]


@EVERYWHERE
def test_layer_norm_(where: str) -> None:
    x, w, b = (halves(*shape, seed=seed, where=where) for seed, shape in enumerate([(2, 7), (7,), (7,)]))
    y = torch.zeros_like(x)
    ext.layer_norm(x, w, b, y, EPS)
    ext.layer_norm_(x, w, b, EPS)
    assert torch.equal(x, y)


@EVERYWHERE
@pytest.mark.parametrize("rms", [True, False])
def test_head_norm(where: str, rms: bool) -> None:
    w, b = halves(3, 32, seed=2), halves(3, 32, seed=3)
    for places in ((4,), (2, 3), ()):
        x = halves(*places, 3, 32, seed=1) + 1
        for bias in (None, b):
            y = torch.zeros_like(x, device=where)
            ext.head_norm(x.to(where), w.to(where), None if bias is None else b.to(where), y, EPS, rms)
            assert same(y, formula(x, w, bias, rms=rms))


@EVERYWHERE
@pytest.mark.parametrize("rms", [True, False])
def test_head_norm_(where: str, rms: bool) -> None:
    x, w, b = (halves(*shape, seed=seed, where=where) for seed, shape in enumerate([(2, 3, 8), (3, 8), (3, 8)]))
    y = torch.zeros_like(x)
    ext.head_norm(x, w, b, y, EPS, rms)
    ext.head_norm_(x, w, b, EPS, rms)
    assert torch.equal(x, y)


def test_norms_refuse() -> None:
    x, w, heads = halves(3, 8, seed=1), halves(8, seed=2), halves(2, 3, 8, seed=3)
    for error, call, match in (
        (ValueError, lambda: ext.rms_norm(x, w[:7], x, EPS), r"w must be \[8\], got \[7\]"),
        (ValueError, lambda: ext.rms_norm(x, w, x[:2], EPS), r"y must be \[3, 8\]"),
        (ValueError, lambda: ext.rms_norm(heads, w, heads, EPS), r"x must be \[R, D\]"),
        (TypeError, lambda: ext.rms_norm(x.bfloat16(), w, x, EPS), "x must be float16 or float32, got torch"),
        (TypeError, lambda: ext.rms_norm(x, w.float(), x, EPS), "w must be float16"),
        (TypeError, lambda: ext.rms_norm(x, w, None, EPS), "y must be float16 or float32, got NoneType"),
        (TypeError, lambda: ext.layer_norm(x.float(), w, None, x, EPS), "x must be float16"),
        (ValueError, lambda: ext.layer_norm(x, x, None, x, EPS), r"w must be \[8\], got \[3, 8\]"),
        (ValueError, lambda: ext.layer_norm(x, w, w[:7], x, EPS), r"b must be \[8\], got \[7\]"),
        (ValueError, lambda: ext.head_norm(heads, w, None, heads, EPS, True), r"w must be \[3, 8\], got \[8\]"),
        (ValueError, lambda: ext.head_norm(w, w, None, w, EPS, True), r"x must be \[H, D\], got \[8\]"),
        (ValueError, lambda: ext.rms_norm_(NOTHING.half(), NOTHING[0].half(), EPS), "meta device"),
    ):
        with pytest.raises(error, match=match) as caught:
            call()
        assert isinstance(caught.value, RuntimeError)


@EVERYWHERE
def test_softcap_(where: str) -> None:
    golden = vectors("small_kernels", where)
    scale = float(golden["softcap_scale"])
    x = golden["softcap_x"].clone()
    ext.softcap_(x, scale)
    # numpy's tanh, which made the vectors, and torch's differ by as many as two of the last bits of fp32.
    assert (x.view(torch.int32) - golden["softcap_y"].view(torch.int32)).abs().max() <= 2
    half = golden["softcap_x"].half()
    expected = (scale * torch.tanh(half.double() / scale)).half()
    ext.softcap_(half, scale)
    assert same(half, expected)
    large = torch.tensor([1e9, -1e9, 0.0], device=where)
    ext.softcap_(large, 50.0)
    assert large.tolist() == [50.0, -50.0, 0.0]


def test_softcap_refuses() -> None:
    with pytest.raises(RuntimeError, match="scale must not be 0, got nan"):
        ext.softcap_(torch.ones(2), float("nan"))
    with pytest.raises(TypeError, match="x must be float16 or float32, got torch"):
        ext.softcap_(torch.ones(2).bfloat16(), 30.0)
