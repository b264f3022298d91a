"""TPContext: every name of the seed, on ranks that are threads, against a single process that sees all parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qinfer import TPContext
from qinfer.errors import PlanError, UnsupportedError
from qinfer.models.model import Model
from qinfer.parallel.context import BROADCAST_ID, BROADCAST_KV, BROADCAST_Q, BROADCAST_RS, BROADCAST_VC
from tests.models import tiny
from tests.parallel.test_shards import UNEQUAL, divide, load, write
from tests.parallel.threads import on_ranks

TYPES = (BROADCAST_KV, BROADCAST_ID, BROADCAST_VC, BROADCAST_RS, BROADCAST_Q)
TOTALS = {BROADCAST_KV: 4, BROADCAST_ID: 512, BROADCAST_VC: tiny.VOCAB, BROADCAST_RS: 128, BROADCAST_Q: 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("context"), "dense")


def on_contexts(folder: Path, function: Callable[[TPContext], Any]) -> list[Any]:
    """Call a function with the finalized context of each of three ranks; the second has no heads."""
    plan = divide(folder, *UNEQUAL)

    def call(rank: Any) -> Any:
        context = TPContext(load(folder, plan, rank), None)
        context.finalize()
        return function(context)

    return on_ranks(3, call)


def columns(context: TPContext, whole: Tensor, kind: int, dim: int) -> list[Tensor]:
    """This rank's part of a tensor that all ranks know."""
    rank = context.model.comm.rank
    return [whole[:, a * dim : b * dim].clone() for device, a, b in context.get_split(kind) if device == rank]


def test_splits_of_a_divided_model(folder: Path) -> None:
    context = on_contexts(folder, lambda c: c)[0]
    assert context.kv_split == context.get_split(BROADCAST_KV) == [(0, 0, 3), (2, 3, 4)]
    assert context.q_split == [(0, 0, 6), (2, 6, 8)]
    assert context.id_split == [(0, 0, 288), (1, 288, 352), (2, 352, 512)]
    assert context.vc_split == [(0, 0, 32), (1, 32, 199)]
    assert context.rs_split == [(0, 0, 32), (1, 32, 128)]
    assert context.get_devs(BROADCAST_VC) == [0, 1]
    assert context.all_devices() == context.all_devs == [0, 1, 2]
    assert (context.device, context.num_devices) == (0, 3)
    with pytest.raises(ValueError, match="broadcast_type must be 0 to 4"):
        context.get_split(5)


def test_splits_of_a_whole_model(folder: Path) -> None:
    """Planning needs no ranks; exchanging tensors does."""
    model = Model.load(folder, device="cpu")
    context = TPContext(model, [0.01, 0, 0.005], expect_cache_tokens=50, expect_cache_base="fp32")
    assert context.get_devs(BROADCAST_KV) == [0, 2]
    assert (context.all_devices(), context.num_devices) == ([0, 2], 3)
    caches = [share.cache_bytes for share in context.plan.shares]
    assert sum(caches) == model.new_cache(1, page_size=16).nbytes // 16 * 50
    context.define_split([0.01, 0.01], 50, type("ExLlamaV2Cache_Q4", (), {}))
    assert sum(share.cache_bytes for share in context.plan.shares) == sum(caches) * 4.5 / 32
    assert TPContext(model, None).plan.size == 1
    with pytest.raises(PlanError, match="2 ranks, but 1 were started"):
        context.finalize()
    with pytest.raises(PlanError, match="leave no room for the MLP"):
        TPContext(model, [1e-4, 1e-4], 1)
    with pytest.raises(UnsupportedError, match="fp17"):
        TPContext(model, [1, 1], 1, "fp17")


@pytest.mark.parametrize("kind", TYPES)
def test_gather_and_allgather(folder: Path, kind: int) -> None:
    whole = torch.randn(3, TOTALS[kind] * 2)

    def check(context: TPContext) -> None:
        parts = columns(context, whole, kind, 2)
        gathered = context.gather(1, parts, kind, 2)
        assert torch.equal(gathered, whole)
        assert context.pinned_temp is not None
        assert gathered.data_ptr() == context.pinned_temp[1].data_ptr() == context.get_pinned(1, 1, 3, 4).data_ptr()
        for other in TYPES:
            received = context.allgather(0, parts, kind, other, 2)
            assert len(received) == (context.model.comm.rank in context.get_devs(other))
            assert all(torch.equal(tensor, whole) for tensor in received)

    on_contexts(folder, check)


def test_broadcast_and_add_residual(folder: Path) -> None:
    whole, residual = torch.randn(4, 128), torch.randn(4, 128)

    def check(context: TPContext) -> None:
        rank = context.model.comm.rank
        mine = whole.clone() if rank == 0 else torch.full_like(whole, rank)
        received = context.broadcast(0, mine, BROADCAST_RS)
        assert [torch.equal(tensor, whole) for tensor in received] == ([True] if rank < 2 else [])
        parts = columns(context, whole, BROADCAST_RS, 1)
        context.add_residual(parts, residual, BROADCAST_RS)
        sums = columns(context, whole + residual, BROADCAST_RS, 1)
        assert all(torch.equal(*pair) for pair in zip(parts, sums, strict=True))
        context.add_residual(parts, [residual], BROADCAST_RS)
        assert torch.equal(context.gather(0, parts, BROADCAST_RS), whole + residual + residual)
        context.wait_streams()

    on_contexts(folder, check)


def test_tables_scratch_and_unload(folder: Path) -> None:
    def check(context: TPContext) -> None:
        rank = context.model.comm.rank
        sin, cos = context.get_sin_cos()
        assert [tuple(table.shape) for table in (*sin, *cos)] == ([(256, 16)] * 2 if rank != 1 else [])
        context.reserve_scratch([4096, 4096, 1152])
        context.begin_scratch_alloc_tp()
        widths = [3, 0, 1]
        first = context.get_scratch_slice_tp(2, torch.float16, BROADCAST_KV, 32)
        second = context.get_scratch_slice_tp_bc(2, torch.float32, BROADCAST_KV, 32)
        assert [tuple(tensor.shape) for tensor in first] == ([(2, widths[rank] * 32)] if rank != 1 else [])
        assert [tuple(tensor.shape) for tensor in second] == ([(2, 128)] if rank != 1 else [])
        if rank != 1:
            first[0].fill_(1)
            second[0].fill_(2)
            assert bool((first[0] == 1).all())
        if rank == 2:
            with pytest.raises(ValueError, match=r"needs 1024 bytes of scratch, 0 are left of 1152"):
                context.get_scratch_slice_tp_bc(2, torch.float32, BROADCAST_KV, 32)
        context.begin_scratch_alloc_tp()
        again = context.get_scratch_slice_tp(2, torch.float16, BROADCAST_KV, 32)
        assert [tensor.data_ptr() for tensor in again] == [tensor.data_ptr() for tensor in first]
        assert context.ext_tp_context is not None
        context.unload()
        assert (context.pinned_temp, context.ext_tp_context, context.sin, context.cos) == (None,) * 4
        with pytest.raises(ValueError, match="finalize"):
            context.get_pinned(0, 1, 1, 1)
        context.finalize()
        context.get_pinned(0, 1, 1, 1)

    on_contexts(folder, check)


def test_wrong_parts_are_refused(folder: Path) -> None:
    def check(context: TPContext) -> None:
        with pytest.raises(ValueError, match=r"this rank has \d parts of the split, got 2"):
            context.gather(0, [torch.zeros(1, 3)] * 2, BROADCAST_KV)
        with pytest.raises(ValueError, match="buffer must be 0 or 1"):
            context.get_pinned(2, 1, 1, 1)
        with pytest.raises(ValueError, match="has room for"):
            context.get_pinned(0, 1000, 1000, 1000)
        if context.model.comm.rank == 0:
            with pytest.raises(ValueError, match=r"a part must be \[rows, 6\], got \[1, 3\]"):
                context.gather(0, [torch.zeros(1, 3)], BROADCAST_KV, 2)

    on_contexts(folder, check)
