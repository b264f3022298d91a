"""exllama_kernels: GPTQ matrices behind handles."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from qinfer.compat import exllama_kernels, exllamav2_ext
from qinfer.compat.matrices import QMatrix
from tests.compare import assert_close
from tests.compat.vectors import EVERYWHERE, NOTHING, vectors
from tests.strategies import random_tensor


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    yield
    exllama_kernels.cleanup()
    exllama_kernels.set_tuning_params(8, False, False)


def make(vector: dict[str, Tensor], order: str | None = None) -> int:
    g_idx = NOTHING if order is None else vector[f"g_idx_{order}"].cpu()
    device = vector["qweight"].get_device()
    return exllama_kernels.make_q4(vector["qweight"], vector["qzeros_v1"], vector["scales"], g_idx, device)


def product(handle: int, x: Tensor) -> Tensor:
    out = torch.full((x.shape[0], 16), float("nan"), dtype=torch.float16, device=x.device)
    exllama_kernels.q4_matmul(x, handle, out)
    return out


@EVERYWHERE
@pytest.mark.parametrize("order", [None, "seq", "act"])
def test_make_q4(order: str | None, where: str) -> None:
    vector = vectors("gptq_matrix", where)
    kept = {name: tensor.clone() for name, tensor in vector.items()}
    w = vector["w_act_fp16" if order == "act" else "w_seq_fp16"]
    out = product(make(vector, order), vector["x"])
    assert_close(out.float(), vector["x"].float() @ w.float(), torch.float16)
    if order == "act":
        assert_close(out.float(), vector["y_act_fp32"], torch.float16)
    assert all(torch.equal(vector[name], kept[name]) for name in kept)


@EVERYWHERE
@pytest.mark.parametrize("threshold", [0, 1, 8])
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 70])
def test_q4_matmul(rows: int, threshold: int, where: str) -> None:
    vector = vectors("gptq_matrix", where)
    handle, x = make(vector, "act"), random_tensor(rows, 128, seed=5, dtype=torch.float16).to(where)
    exllama_kernels.set_tuning_params(threshold, False, False)
    with mock.patch.object(QMatrix, "dense", autospec=True, side_effect=QMatrix.dense) as dense:
        out = product(handle, x)
    assert dense.called == (threshold != 0 and rows >= threshold)
    assert_close(out.float(), x.float() @ vector["w_act_fp16"].float(), torch.float16)


def test_set_tuning_params() -> None:
    exllama_kernels.set_tuning_params(matmul_recons_thd=3, matmul_fused_remap=True, matmul_no_half2=True)
    vector = vectors("gptq_matrix")
    handle = make(vector)
    for rows, is_dense in ((2, False), (3, True)):
        with mock.patch.object(QMatrix, "multiply", autospec=True) as multiply:
            exllama_kernels.q4_matmul(vector["x"][:rows], handle, torch.zeros(rows, 16, dtype=torch.float16))
        assert multiply.call_args.kwargs["route"] == ("dense" if is_dense else "packed")
    with pytest.raises(RuntimeError, match="must not be negative"):
        exllama_kernels.set_tuning_params(-1, False, False)
    with pytest.raises(RuntimeError, match="must be an integer"):
        exllama_kernels.set_tuning_params(2.5, False, False)  # type: ignore[arg-type]


@EVERYWHERE
def test_prepare_buffers(where: str) -> None:
    device = torch.device(where)
    state = torch.zeros(2048, 128, dtype=torch.float16, device=device)
    dq = torch.zeros(1, 128 * 16, dtype=torch.float16, device=device)
    exllama_kernels.prepare_buffers(device, state, dq)
    with pytest.raises(RuntimeError, match="temp_state must be float16"):
        exllama_kernels.prepare_buffers(device, state.float(), dq)
    with pytest.raises(RuntimeError, match="temp_dq must be float16"):
        exllama_kernels.prepare_buffers(device, state, dq.float())
    with pytest.raises(RuntimeError, match="temp_dq must be on"):
        exllama_kernels.prepare_buffers(device, state, dq.to("meta"))
    with pytest.raises(RuntimeError, match="must have an index"):
        exllama_kernels.prepare_buffers("cuda", state, dq)


def test_cleanup() -> None:
    vector = vectors("gptq_matrix")
    handles = [make(vector), make(vector)]
    tensors = (vector["qweight"], *[NOTHING] * 6, vector["qzeros_v1"], vector["scales"], *[NOTHING] * 3)
    other = exllamav2_ext.make_q_matrix(*tensors, 0)
    exllama_kernels.cleanup()
    for handle in handles:
        with pytest.raises(RuntimeError, match=f"handle {handle} is no Q4 matrix"):
            product(handle, vector["x"])
    with pytest.raises(RuntimeError, match="is no Q4 matrix"):
        product(other, vector["x"])
    exllamav2_ext.free_q_matrix(other)  # matrices of the other module stay


def test_make_q4_refuses() -> None:
    vector = vectors("gptq_matrix")
    qweight, qzeros, scales, g_idx = (vector[name] for name in ("qweight", "qzeros_v1", "scales", "g_idx_act"))
    for arguments, message in (
        ((qweight.long(), qzeros, scales, g_idx), "qweight must be int32"),
        ((qweight, qzeros.short(), scales, g_idx), "qzeros must be int32"),
        ((qweight, qzeros, scales.float(), g_idx), "scales must be float16"),
        ((qweight, qzeros, scales, g_idx.long()), "g_idx must be int32"),
        ((qweight, qzeros[:, :1], scales, g_idx), r"qzeros must be \[G, 2\]"),
        ((qweight, qzeros, scales[:, :8], g_idx), r"scales must be \[4, 16\]"),
        ((qweight, qzeros, scales[:3], g_idx), r"scales must be \[4, 16\]"),
        ((qweight, qzeros, scales, g_idx[:8]), r"g_idx must be \[128\]"),
        ((qweight, qzeros, scales, g_idx - 1), "make_q4: g_idx: groups must be 0 to 3"),
        ((qweight, qzeros[:3], scales[:3], NOTHING), "divide 128 features"),
        ((qweight, qzeros, scales * float("inf"), NOTHING), "NaN or infinite"),
        ((qweight, qzeros.to("meta"), scales, NOTHING), "qzeros must be on cpu"),
    ):
        with pytest.raises(RuntimeError, match=message):
            exllama_kernels.make_q4(*arguments, None)
    with pytest.raises(RuntimeError, match="device must be None"):
        exllama_kernels.make_q4(qweight, qzeros, scales, NOTHING, 0)


def test_q4_matmul_refuses() -> None:
    vector = vectors("gptq_matrix")
    handle, x, out = make(vector), vector["x"], torch.zeros(3, 16, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="x must be float16"):
        exllama_kernels.q4_matmul(x.float(), handle, out)
    with pytest.raises(RuntimeError, match="out must be float16"):
        exllama_kernels.q4_matmul(x, handle, out.float())
    with pytest.raises(RuntimeError, match=r"x must be \[M, 128\]"):
        exllama_kernels.q4_matmul(x[:, :120], handle, out)
    with pytest.raises(RuntimeError, match=r"out must be \[3, 16\]"):
        exllama_kernels.q4_matmul(x, handle, out[:2])
    with pytest.raises(RuntimeError, match="x must be on cpu"):
        exllama_kernels.q4_matmul(x.to("meta"), handle, out)


@EVERYWHERE
def test_column_remap(where: str) -> None:
    x = random_tensor(3, 20, seed=1, dtype=torch.float16).to(where)
    x_map = torch.randperm(20).to(torch.int32).to(where)
    x_new = torch.full((5, 16), 7, dtype=torch.float16, device=where)
    exllama_kernels.column_remap(x, x_new, x_map)
    assert torch.equal(x_new.view(-1)[:60].view(3, 20), x[:, x_map.long()])
    assert (x_new.view(-1)[60:] == 7).all()


def test_column_remap_refuses() -> None:
    x, x_map = torch.zeros(3, 20, dtype=torch.float16), torch.arange(20, dtype=torch.int32)
    for arguments, message in (
        ((x.float(), x.clone(), x_map), "x must be float16"),
        ((x, x.float(), x_map), "x_new must be float16"),
        ((x, x.clone(), x_map.long()), "x_map must be int32"),
        ((x, x.clone(), x_map[:9]), r"x_map must be \[20\]"),
        ((x, x.clone(), x_map + 1), r"x_map must be in \[0, 20\)"),
        ((x, torch.zeros(59, dtype=torch.float16), x_map), "x_new must hold 60"),
        ((x, torch.zeros(4, 30, dtype=torch.float16)[:, :20], x_map), "in one piece"),
    ):
        with pytest.raises(RuntimeError, match=message):
            exllama_kernels.column_remap(*arguments)
