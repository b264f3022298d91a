"""exllamav2_ext: matrices behind handles, and products."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from qinfer.compat import exllamav2_ext as ext_c
from qinfer.compat.matrices import QMatrix
from tests.compare import assert_close
from tests.compat.vectors import EVERYWHERE, NOTHING, vectors
from tests.strategies import random_tensor

ORDER = [
    "q_weight",
    "q_perm",
    "q_invperm",
    "q_scale",
    "q_scale_max",
    "q_groups",
    "q_group_map",
    "gptq_qzeros",
    "gptq_scales",
    "gptq_g_idx",
    "bias",
    "temp_dq",
]


def make(tensors: dict[str, Tensor], *, split: bool = False, max_dq_rows: int = 0, **others: Tensor | None) -> int:
    """Call make_q_matrix with positional arguments, meta tensors where there is nothing."""
    given = {**tensors, **others}
    assert set(given) <= set(ORDER)
    function = ext_c.make_q_matrix_split if split else ext_c.make_q_matrix
    return function(*(given.get(name, NOTHING) for name in ORDER), max_dq_rows)


def exl2(where: str = "cpu", prescale: float = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The arguments for the shared EXL2 matrix, as exllamav2's Python code prepares them, and the whole vector."""
    vector = vectors("exl2_matrix", where)
    tensors = {name: vector[name] for name in ("q_weight", "q_scale", "q_groups", "q_group_map", "bias")}
    tensors["q_scale_max"] = vector["q_scale_max"] * (prescale / 256)
    tensors |= {name: vector[name].short() for name in ("q_perm", "q_invperm")}
    return tensors, vector


def gptq(where: str = "cpu", order: str | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The arguments for the shared GPTQ matrix, and the whole vector."""
    vector = vectors("gptq_matrix", where)
    tensors = {"q_weight": vector["qweight"], "gptq_qzeros": vector["qzeros_v1"], "gptq_scales": vector["scales"]}
    if order is not None:
        tensors["gptq_g_idx"] = vector[f"g_idx_{order}"].cpu()
    return tensors, vector


def matrix_of(handle: int, like: Tensor) -> Tensor:
    output = torch.full_like(like, float("nan"))
    ext_c.reconstruct(handle, output)
    return output


def product(handle: int, a: Tensor, out_features: int, *, force_cuda: bool = False) -> Tensor:
    c = torch.full((a.shape[0], out_features), float("nan"), dtype=torch.float16, device=a.device)
    ext_c.gemm_half_q_half(a, handle, c, force_cuda)
    return c


@EVERYWHERE
@pytest.mark.parametrize("prescale", [1, 0.22])
def test_make_q_matrix_exl2(where: str, prescale: float) -> None:
    tensors, vector = exl2(where, prescale)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    handle = make(tensors)
    expected = vector["w_fp16" if prescale == 1 else "w_fp16_prescale_0p22"]
    assert torch.equal(matrix_of(handle, expected), expected)
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)
    if prescale == 1:
        assert_close(product(handle, vector["x"], 32).float(), vector["y_fp32"], torch.float16)


@EVERYWHERE
def test_reconstruct(where: str) -> None:
    for order, suffix in ((None, "seq"), ("seq", "seq"), ("act", "act")):
        tensors, vector = gptq(where, order)
        expected = vector[f"w_{suffix}_fp16"]
        assert torch.equal(matrix_of(make(tensors), expected), expected)


@EVERYWHERE
@pytest.mark.parametrize("rows", [0, 1, 3, 65, 130])
@pytest.mark.parametrize("force_cuda", [False, True])
@pytest.mark.parametrize("kind", ["exl2", "gptq"])
def test_gemm_half_q_half(kind: str, rows: int, force_cuda: bool, where: str) -> None:
    tensors, vector = exl2(where) if kind == "exl2" else gptq(where, "act")
    w = vector["w_fp16" if kind == "exl2" else "w_act_fp16"]
    bias = random_tensor(w.shape[1], seed=2, dtype=torch.float16).to(where)
    a = random_tensor(rows, w.shape[0], seed=3, dtype=torch.float16).to(where)
    handle = make(tensors, bias=bias)
    with mock.patch.object(QMatrix, "multiply", autospec=True, side_effect=QMatrix.multiply) as multiply:
        c = product(handle, a, w.shape[1], force_cuda=force_cuda)
    assert multiply.call_args.kwargs["route"] == ("packed" if force_cuda else "auto")
    assert_close(c.float(), a.float() @ w.float() + bias.float(), torch.float16)


def test_the_shared_gptq_product() -> None:
    tensors, vector = gptq(order="act")
    assert_close(product(make(tensors), vector["x"], 16).float(), vector["y_act_fp32"], torch.float16)


def test_act_order_is_reported() -> None:
    tensors, vector = gptq(order="act")
    perm, invperm = torch.zeros(128, dtype=torch.int16), torch.zeros(128, dtype=torch.int16)
    make(tensors, q_perm=perm, q_invperm=invperm)
    assert torch.equal(perm, vector["q_perm_act"])
    assert torch.equal(invperm[perm.long()], torch.arange(128, dtype=torch.int16))


def test_exl2_without_a_permutation() -> None:
    tensors, vector = exl2()
    del tensors["q_perm"], tensors["q_invperm"], tensors["q_group_map"]
    w = vector["w_fp16"]
    assert torch.equal(matrix_of(make(tensors), w), w[vector["q_perm"].long()])


def test_group_size_is_the_power_of_two_or_even() -> None:
    # 192 features in 2 groups: 128 + 64, as the extension takes it. 320 in 10: 32 covers it and is right; 288 in 3
    # groups: 128 + 128 + 32. 576 features in 6 groups of 96 cannot be groups of 128, which would be 5.
    for in_features, num_groups, size in ((192, 2, 128), (320, 10, 32), (288, 3, 128), (576, 6, 96)):
        scales = torch.arange(1, num_groups + 1).half()[:, None].repeat(1, 8)
        zeros = torch.full((num_groups, 1), 0x77777777, dtype=torch.int32)
        ones = torch.full((in_features // 8, 8), 0x99999999 - (1 << 32), dtype=torch.int32)
        handle = make({"q_weight": ones, "gptq_qzeros": zeros, "gptq_scales": scales})
        w = matrix_of(handle, torch.empty(in_features, 8, dtype=torch.float16))
        assert w[:, 0].tolist() == [1 + k // size for k in range(in_features)]


@EVERYWHERE
@pytest.mark.parametrize(("start", "stop"), [(0, 32), (8, 32), (16, 24)])
def test_make_q_matrix_split(start: int, stop: int, where: str) -> None:
    tensors, vector = exl2(where)
    sliced = {
        **tensors,
        "q_weight": tensors["q_weight"][:, start:stop].contiguous(),
        "q_scale": tensors["q_scale"][:, start // 8 : stop // 8].contiguous(),
        "bias": tensors["bias"][start:stop],
    }
    handle = make(sliced, split=True)
    expected = vector["w_fp16"][:, start:stop].contiguous()
    assert torch.equal(matrix_of(handle, expected), expected)
    y = product(handle, vector["x"], stop - start)
    assert_close(y.float(), vector["y_fp32"][:, start:stop], torch.float16)


def test_make_q_matrix_split_refuses_gptq() -> None:
    with pytest.raises(RuntimeError, match="only EXL2"):
        make(gptq()[0], split=True)


@EVERYWHERE
def test_gemm_half_q_half_tp(where: str) -> None:
    (first, vector), (second, other) = exl2(where), gptq(where)
    handles = [make(first), make(second)]
    a = [vector["x"], other["x"]]
    c = [torch.zeros(4, 32, dtype=torch.float16, device=where), torch.zeros(3, 16, dtype=torch.float16, device=where)]
    ext_c.gemm_half_q_half_tp(a, handles, c, False, 0)
    for rows, handle, out in zip(a, handles, c, strict=True):
        assert torch.equal(out, product(handle, rows, out.shape[1]))
    untouched = [torch.zeros_like(out) for out in c]
    ext_c.gemm_half_q_half_tp(a, handles, untouched, False, 0, 7)
    assert not any(out.any() for out in untouched)
    with pytest.raises(RuntimeError, match="one length"):
        ext_c.gemm_half_q_half_tp(a, handles, c[:1], False, 0)


def test_free_q_matrix() -> None:
    tensors, vector = gptq()
    handle, other = make(tensors), make(tensors)
    assert isinstance(handle, int)
    assert handle != other
    ext_c.free_q_matrix(handle)
    for use in (
        lambda: ext_c.free_q_matrix(handle),
        lambda: matrix_of(handle, vector["w_seq_fp16"]),
        lambda: product(handle, vector["x"], 16),
        lambda: ext_c.gemm_half_q_half_tp([vector["x"]], [handle], [vector["x"][:, :16]], False, 0),
    ):
        with pytest.raises(RuntimeError, match=f"handle {handle} is no q_matrix"):
            use()
    assert torch.equal(matrix_of(other, vector["w_seq_fp16"]), vector["w_seq_fp16"])
    ext_c.free_q_matrix(other)


def test_the_matrix_outlives_its_tensors() -> None:
    tensors, vector = gptq()
    handle = make(tensors)
    for tensor in tensors.values():
        tensor.zero_()
    assert torch.equal(matrix_of(handle, vector["w_seq_fp16"]), vector["w_seq_fp16"])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q_weight", lambda t: t.long(), "q_weight must be int32"),
        ("q_weight", lambda t: t[:, :24], "must be"),
        ("q_scale", lambda t: t[:, :3], r"q_scale must be \[G, 4\]"),
        ("q_scale_max", lambda t: t[:5], r"q_scale_max must be \[6\]"),
        ("q_scale_max", lambda t: t.float(), "q_scale_max must be float16"),
        ("q_scale_max", lambda t: t * float("nan"), "NaN"),
        ("q_scale_max", lambda _: NOTHING, "q_scale_max must be given"),
        ("q_groups", lambda t: t.int(), "q_groups must be int16"),
        ("q_groups", lambda t: t.flip(0), "q_groups must hold bits"),
        ("q_group_map", lambda t: t[2:], "q_group_map must be"),
        ("q_group_map", lambda t: t + 1, "what make_group_map gives"),
        ("q_perm", lambda _: NOTHING, "given together"),
        ("q_perm", lambda t: t.roll(1), "inverse"),
        ("q_invperm", lambda t: t.clamp(max=9), "q_perm must be the inverse|each of 0 to"),
        ("bias", lambda t: t[:8], r"bias must be \[32\]"),
        ("bias", lambda t: t.float(), "bias must be float16"),
        ("temp_dq", lambda _: torch.zeros(256 * 32 - 1, dtype=torch.float16), "temp_dq must hold 8192"),
    ],
)
def test_make_q_matrix_refuses_exl2(name: str, change: Any, message: str) -> None:
    tensors, _ = exl2()
    with pytest.raises(RuntimeError, match=message):
        make(tensors, max_dq_rows=512, **{name: change(tensors.get(name))})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gptq_qzeros", lambda t: t[:, :1], r"gptq_qzeros must be \[G, 2\]"),
        ("gptq_qzeros", lambda _: NOTHING, "gptq_qzeros must be given"),
        ("gptq_qzeros", lambda t: t[:0], r"gptq_scales must be \[0, 16\]"),
        ("gptq_scales", lambda t: t[:3], r"gptq_scales must be \[4, 16\]"),
        ("gptq_scales", lambda t: t.float(), "gptq_scales must be float16"),
        ("gptq_g_idx", lambda t: t[:64], r"gptq_g_idx must be \[128\]"),
        ("gptq_g_idx", lambda t: t.long(), "gptq_g_idx must be int32"),
        ("gptq_g_idx", lambda t: t + 1, "g_idx"),
    ],
)
def test_make_q_matrix_refuses_gptq(name: str, change: Any, message: str) -> None:
    tensors, _ = gptq(order="act")
    with pytest.raises(RuntimeError, match=message):
        make(tensors, **{name: change(tensors[name])})


def test_products_refuse() -> None:
    tensors, vector = gptq()
    handle, x = make(tensors), vector["x"]
    c = torch.zeros(3, 16, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="a must be float16"):
        ext_c.gemm_half_q_half(x.float(), handle, c, False)
    with pytest.raises(RuntimeError, match=r"a must be \[M, 128\]"):
        ext_c.gemm_half_q_half(x[:, :64], handle, c, False)
    with pytest.raises(RuntimeError, match=r"c must be \[3, 16\]"):
        ext_c.gemm_half_q_half(x, handle, c[:2], False)
    with pytest.raises(RuntimeError, match="c must be on cpu"):
        ext_c.gemm_half_q_half(x, handle, c.to("meta"), False)
    with pytest.raises(RuntimeError, match="last stride 1"):
        ext_c.gemm_half_q_half(x, handle, torch.zeros(16, 3, dtype=torch.float16).t(), False)
    with pytest.raises(RuntimeError, match=r"output must be \[128, 16\]"):
        ext_c.reconstruct(handle, torch.zeros(16, 128, dtype=torch.float16))
    with pytest.raises(TypeError, match="output must be float16"):
        ext_c.reconstruct(handle, torch.zeros(128, 16))


@EVERYWHERE
@pytest.mark.parametrize("force_cublas", [False, True])
def test_gemm_half_half_half(force_cublas: bool, where: str) -> None:
    a, b, c = (
        random_tensor(*shape, seed=seed, dtype=torch.float16).to(where)
        for seed, shape in enumerate(((5, 24), (24, 16), (5, 16)))
    )
    for alpha, beta in ((1.0, 0.0), (0.5, 1.0), (-1.0, 0.25)):
        out = c.clone() if beta else torch.full_like(c, float("nan"))
        ext_c.gemm_half_half_half(a, b, out, alpha, beta, force_cublas)
        assert_close(out.float(), alpha * (a.float() @ b.float()) + beta * c.float(), torch.float16)


def test_gemm_half_half_half_refuses() -> None:
    a, b, c = (torch.zeros(shape, dtype=torch.float16) for shape in ((5, 24), (24, 16), (5, 16)))
    for wrong in ((a.float(), b, c), (a, b.float(), c), (a, b, c.float())):
        with pytest.raises(RuntimeError, match="must be float16"):
            ext_c.gemm_half_half_half(*wrong, 1.0, 0.0, False)
    for wrong in ((a[:4], b, c), (a, b[:8], c), (a, b[:, :8], c)):
        with pytest.raises(RuntimeError, match="must be"):
            ext_c.gemm_half_half_half(*wrong, 1.0, 0.0, False)
