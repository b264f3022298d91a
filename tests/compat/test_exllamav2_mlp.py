"""exllamav2_ext: MLP layers and experts, against their formulas in fp32."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from qinfer.compat import exllamav2_ext as ext_c
from qinfer.compat.ext_matrix import _matrices
from qinfer.compat.matrices import QMatrix
from qinfer.kernels.operand import DenseOperand
from tests.compare import assert_close
from tests.compat.linears import EPS, HALF, HIDDEN, KINDS, LORAS, NO_ADAPTERS, Linear, half, linear, norm
from tests.compat.vectors import EVERYWHERE, NOTHING


def mlp(kind: str, where: str = "cpu", **changes: Any) -> tuple[int, list[Linear], dict[str, Any]]:
    """Make an MLP layer of gate, up and down; return its handle, its matrices and its arguments."""
    hidden = HIDDEN[kind]
    parts = [linear(kind, 100 * (i + 5), hidden, where) for i in range(3)]
    given: dict[str, Any] = {
        "layernorm": half(hidden, seed=1, where=where),
        "layernorm_bias": NOTHING,
        "layernorm_is_rms": True,
        "norm_epsilon": EPS,
        "gate": parts[0].handle,
        "up": parts[1].handle,
        "down": parts[2].handle,
        "temp_state": NOTHING,
        "temp_a": NOTHING,
        "temp_b": NOTHING,
        "temp_dq": None,
        "max_rows": 8,
        "act_gelu": False,
        "has_residual": True,
        "post_layernorm": NOTHING,
        "post_layernorm_bias": NOTHING,
        "residual_fp32": False,
        "use_graphs": True,
    }
    assert set(changes) <= set(given)
    given |= changes
    return ext_c.make_q_mlp(*given.values()), parts, given


def activated(x: Tensor, *, act_gelu: bool) -> Tensor:
    """Apply gelu, as its tanh approximation, or silu."""
    return gelu(x, approximate="tanh") if act_gelu else silu(x)


@EVERYWHERE
@KINDS
@LORAS
@pytest.mark.parametrize("act_gelu", [False, True])
@pytest.mark.parametrize("options", ["plain", "ungated", "post", "fp32", "replace"])
def test_q_mlp_forward(kind: str, loras: tuple[int, ...], act_gelu: bool, options: str, where: str) -> None:
    hidden, is_rms = HIDDEN[kind], options != "ungated"
    bias = half(hidden, seed=4, where=where)
    post, post_bias = half(hidden, seed=6, where=where), half(hidden, seed=7, where=where)
    changes: dict[str, Any] = {
        "plain": {},
        "ungated": {"gate": 0, "layernorm_is_rms": False, "layernorm_bias": bias, "post_layernorm": post}
        | {"post_layernorm_bias": post_bias},
        "post": {"post_layernorm": post},
        "fp32": {"post_layernorm": post, "residual_fp32": True},
        "replace": {"has_residual": False, "layernorm": NOTHING},
    }[options]
    handle, (gate, up, down), given = mlp(kind, where, act_gelu=act_gelu, **changes)
    adapters = [NO_ADAPTERS, NO_ADAPTERS] if options == "ungated" else [gate.a, gate.b]
    assert ext_c.q_mlp_set_loras(handle, *adapters, up.a, up.b, down.a, down.b) == 4
    x = half(2, 3, hidden, seed=8, where=where).to(torch.float32 if options == "fp32" else HALF)
    n = x.float()
    if options != "replace":
        n = norm(n, given["layernorm"], bias if options == "ungated" else None, is_rms=is_rms)
    if options == "ungated":
        expected = down(activated(up(n, loras), act_gelu=act_gelu), loras)
    else:
        expected = down(activated(gate(n, loras), act_gelu=act_gelu) * up(n, loras), loras)
    if "post_layernorm" in changes:
        expected = norm(expected, post, changes.get("post_layernorm_bias"), is_rms=is_rms)
    if options != "replace":
        expected = x.float() + expected
    ext_c.q_mlp_forward_(handle, x, list(loras), torch.empty(24, dtype=HALF, device=where))
    assert_close(x.float(), expected, HALF)


def test_silu_does_not_overflow() -> None:
    # e^12 leaves fp16: the compiled module's silu of -12 is -0.
    zero, one = torch.zeros(64, 64, dtype=HALF), torch.eye(64, dtype=HALF)
    handles = {
        name: _matrices.add(QMatrix(DenseOperand(weight), torch.full((64,), bias, dtype=HALF), torch.device("cpu")))
        for name, weight, bias in (("gate", zero, -12.0), ("up", zero, 10000.0), ("down", one, 0.0))
    }
    handle, *_ = mlp("dense", has_residual=False, **handles)
    x = half(2, 64, seed=8)
    ext_c.q_mlp_forward_(handle, x, [], None)
    assert_close(x.float(), torch.full((2, 64), -12 / (1 + math.exp(12)) * 10000), HALF)


def test_q_mlp_set_loras() -> None:
    handle, (gate, up, down), _ = mlp("dense")
    six = [gate.a, gate.b, up.a, up.b, down.a, down.b]
    assert ext_c.q_mlp_set_loras(handle, *six) == 4
    assert ext_c.q_mlp_set_loras(handle, *[NO_ADAPTERS] * 4, {8: down.a[8]}, {8: down.b[8]}) == 2
    with pytest.raises(RuntimeError, match="q_down must have A and B of the same adapters"):
        ext_c.q_mlp_set_loras(handle, *[NO_ADAPTERS] * 4, down.a, {8: down.b[8]})
    ungated, *_ = mlp("dense", gate=0)
    with pytest.raises(RuntimeError, match=r"matrices that the layer has, got \[7, 8\] for another one"):
        ext_c.q_mlp_set_loras(ungated, *six)
    assert ext_c.q_mlp_set_loras(ungated, *[NO_ADAPTERS] * 2, *six[2:]) == 4
    with pytest.raises(RuntimeError, match="must hold 12 fp16 numbers, got 11"):
        ext_c.q_mlp_forward_(ungated, half(3, 64, seed=1), [7], torch.zeros(11, dtype=HALF))
    ext_c.q_mlp_forward_(ungated, half(3, 64, seed=1), [99], torch.zeros(1, dtype=HALF))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up": 0}, "handle 0 is no q_matrix"),
        ({"gate": linear("dense", 900, 32).handle}, r"q_gate must be a matrix \[64, 64\], got \[64, 32\]"),
        ({"up": linear("dense", 900, 32).handle}, r"q_down must be a matrix \[32, 64\], got \[64, 64\]"),
        ({"layernorm": torch.zeros(63, dtype=HALF)}, r"layernorm must be \[64\]"),
        ({"post_layernorm": torch.zeros(64)}, "post_layernorm must be float16"),
        ({"post_layernorm_bias": torch.zeros(64, dtype=HALF)}, "got it alone"),
        ({"temp_b": torch.zeros(8)}, "temp_b must be float16"),
    ],
)
def test_make_q_mlp(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        mlp("dense", **changes)


def test_mlp_refuses() -> None:
    handle, *_ = mlp("dense")
    for x, message in (
        (torch.zeros(2, 64), "x must be float16"),
        (torch.zeros(64, dtype=HALF), r"x must be \[\.\.\., 64\], got \[64\]"),
        (torch.zeros(2, 32, dtype=HALF), r"x must be \[\.\.\., 64\]"),
        (torch.zeros(9, 64, dtype=HALF), "max_rows = 8 rows, got 9"),
        (torch.zeros(2, 64, dtype=HALF, device="meta"), "x must be on cpu"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ext_c.q_mlp_forward_(handle, x, [], None)
    fp32, *_ = mlp("dense", residual_fp32=True)
    with pytest.raises(RuntimeError, match="x must be float32"):
        ext_c.q_mlp_forward_(fp32, torch.zeros(2, 64, dtype=HALF), [], None)


def test_free_q_mlp() -> None:
    handle, *_ = mlp("dense")
    ext_c.free_q_mlp(handle)
    for use in (
        lambda: ext_c.free_q_mlp(handle),
        lambda: ext_c.q_mlp_forward_(handle, half(3, 64, seed=1), [], None),
        lambda: ext_c.q_mlp_set_loras(handle, *[NO_ADAPTERS] * 6),
    ):
        with pytest.raises(RuntimeError, match=f"handle {handle} is no q_mlp"):
            use()


def moe(
    kind: str, num_experts: int, where: str = "cpu", **changes: Any
) -> tuple[int, list[list[Linear]], Tensor, Tensor]:
    """Make a layer of experts with two each; return its handle, w1, w2 and w3, its norm and its router."""
    hidden = HIDDEN[kind]
    # Few different matrices, in another order for every expert.
    parts = [
        [linear(kind, 1000 + 100 * ((2 * i + j) % 5), hidden, where) for i in range(num_experts)] for j in range(3)
    ]
    weight = half(hidden, seed=1, where=where)
    router = half(num_experts, hidden, seed=2, scale=2 * hidden**-0.5, where=where)
    given: dict[str, Any] = {
        "norm": weight,
        "norm_bias": NOTHING,
        "is_rms": True,
        "eps": EPS,
        "gate": router,
        "num_experts": num_experts,
        "top_k": 2,
        "w1": [part.handle for part in parts[0]],
        "w2": [part.handle for part in parts[1]],
        "w3": [part.handle for part in parts[2]],
        "temp_state": NOTHING,
        "temp_gathered_state": NOTHING,
        "temp_a": NOTHING,
        "temp_b": NOTHING,
        "temp_logits": NOTHING,
        "temp_dq": NOTHING,
        "max_rows": 8,
        "act_gelu": False,
    }
    assert set(changes) <= set(given)
    return ext_c.make_q_moe_mlp(*(given | changes).values()), parts, weight, router


@EVERYWHERE
@KINDS
@pytest.mark.parametrize(
    ("num_experts", "rows", "act_gelu"), [(4, 1, True), (4, 6, False), (128, 4, False), (5, 0, True)]
)
def test_q_moe_mlp_forward(kind: str, num_experts: int, rows: int, act_gelu: bool, where: str) -> None:
    handle, (w1, w2, w3), weight, router = moe(kind, num_experts, where, act_gelu=act_gelu)
    x = half(rows, HIDDEN[kind], seed=3, where=where)
    n = norm(x.float(), weight, None, is_rms=True)
    shares = (n @ router.float().t()).softmax(1)
    expected = x.float()
    for row in range(rows):
        top = shares[row].topk(2)
        for share, expert in zip(top.values / top.values.sum(), top.indices.tolist(), strict=True):
            inner = activated(w1[expert](n[row]), act_gelu=act_gelu) * w3[expert](n[row])
            expected[row] += share * w2[expert](inner)
    if rows == 4:
        # What the compiled module would not compute: experts that the first row did not choose.
        assert len(set(shares.topk(2).indices.flatten().tolist())) > 4
    ext_c.q_moe_mlp_forward_(handle, x)
    assert_close(x.float(), expected, HALF)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w2": []}, "w1, w2 and w3 must be 4 matrices each, got 4, 0 and 4"),
        ({"w3": [0] * 4}, "handle 0 is no q_matrix"),
        ({"top_k": 5}, "from 1 to the number of experts, and these at most 1024, got 5 of 4"),
        ({"top_k": 0}, "got 0 of 4"),
        ({"gate": torch.zeros(3, 64, dtype=HALF)}, r"gate must be \[4, 64\]"),
        ({"gate": torch.zeros(4, 64)}, "gate must be float16"),
        ({"gate": NOTHING.new_empty(4, 64, dtype=HALF)}, "gate must be on cpu"),
        ({"w1": [linear("dense", 900, 32).handle] * 4}, r"w1\[0\] must be a matrix \[64, 64\], got \[64, 32\]"),
        ({"norm": torch.zeros(3, dtype=HALF)}, r"layernorm must be \[64\]"),
        ({"temp_logits": torch.zeros(3)}, "temp_logits must be float16"),
    ],
)
def test_make_q_moe_mlp(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        moe("dense", 4, **changes)


def test_free_q_moe_mlp() -> None:
    handle, *_ = moe("dense", 4)
    with pytest.raises(RuntimeError, match="max_rows = 8 rows, got 9"):
        ext_c.q_moe_mlp_forward_(handle, torch.zeros(9, 64, dtype=HALF))
    ext_c.free_q_moe_mlp(handle)
    for use in (
        lambda: ext_c.free_q_moe_mlp(handle),
        lambda: ext_c.q_moe_mlp_forward_(handle, torch.zeros(1, 64, dtype=HALF)),
    ):
        with pytest.raises(RuntimeError, match=f"handle {handle} is no q_moe_mlp"):
            use()
