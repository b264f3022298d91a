"""Peers: what is wrong, raises or is missing is reported, and their mathematics is ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from qinfer.bench import contender, peers
from qinfer.bench.__main__ import main as bench
from qinfer.bench.attention import Step, _pages, _table, ours
from qinfer.bench.attention_peers import ATTENTION_PEERS, dense, expected, sdpa
from qinfer.bench.contender import Contender, Outcome, Peer, made, outcome
from qinfer.bench.measure import Times
from qinfer.bench.peers import MATMUL_PEERS
from qinfer.errors import UnsupportedError

CPU = torch.device("cpu")
DECODE, CHUNK, PROMPT = (Step(2, 300, queries, 4, 2, 16) for queries in (1, 5, 300))


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock for a CPU, and caches that fill no memory."""
    monkeypatch.setattr(contender, "time_graph", lambda calls, device, *, repeats: Times((float(len(calls)),)))
    monkeypatch.setattr(contender, "ROTATE_BYTES", 1)


def _contender(function: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float16) -> Contender:
    return Contender("x", [function], lambda x: x.float(), 1, dtype)


def test_a_result_has_a_time_or_a_problem() -> None:
    x = torch.randn(4, 8)
    assert outcome(_contender(lambda x: x), x) == Outcome(1.0)
    for wrong in (lambda x: x * 1.01, lambda x: x * float("nan")):
        found = outcome(_contender(wrong), x)
        assert found.ms is None
        assert str(found) == "wrong"
    # bf16 has fewer bits, but not that few.
    assert outcome(_contender(lambda x: x * 1.01, torch.bfloat16), x).ms == 1.0
    assert outcome(_contender(lambda x: x * 1.05, torch.bfloat16), x).ms is None


def test_every_copy_is_called_as_often() -> None:
    def note(x: Tensor, copy: int) -> Tensor:
        called.append(copy)
        return x

    def clock(functions: Sequence[Callable[[], Tensor]], device: torch.device, *, repeats: int) -> Times:
        called.clear()
        for function in functions:
            function()
        return Times((1.0,))

    called: list[int] = []
    functions = [partial(note, copy=copy) for copy in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contender, "time_graph", clock)
        outcome(Contender("x", functions, lambda x: x.float(), 1), torch.randn(2, 2))
    assert called == [0, 1, 2]


def test_a_peer_may_fail_and_qinfer_may_not() -> None:
    def failing(x: Tensor) -> Tensor:
        raise RuntimeError("no kernel\nfor this device")

    found = outcome(_contender(failing), torch.randn(2, 2), is_peer=True)
    assert found == Outcome(None, "raised: RuntimeError: no kernel")
    with pytest.raises(RuntimeError, match="no kernel"):
        outcome(_contender(failing), torch.randn(2, 2))


def test_a_missing_package_is_told() -> None:
    peer = Peer("x", "no_such_package_anywhere", lambda: _contender(lambda x: x))
    assert made(peer) == Outcome(None, "missing: no_such_package_anywhere is not installed")


# FlexAttention brings torch's compiler along, which takes a CPU ten seconds to import.
QUICK = [peer for peer in (*MATMUL_PEERS, *ATTENTION_PEERS) if peer.name != "torch Flex"]


@pytest.mark.parametrize("peer", QUICK, ids=lambda peer: peer.name)
def test_no_peer_is_left_out_in_silence(peer: Peer) -> None:
    """On a CPU none of the products can be made; each says so in its own way instead of raising."""
    if peer in ATTENTION_PEERS:
        arguments: tuple[Any, ...] = (DECODE, *(torch.randn(4, 2, 256, 16) for _ in range(2)), _table(DECODE, CPU))
    else:
        arguments = (64, 256, CPU)
    found = made(peer, *arguments)
    assert isinstance(found, Contender) or found.problem is not None
    assert isinstance(found, Contender) == (peer.name == "torch SDPA")


def test_torch_int4_means_what_its_contender_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed bytes and pairs, read as torch documents them, are the matrix that results are checked against."""
    packed: list[Tensor] = []
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", lambda codes, tiles: packed.append(codes) or codes)

    class Aten:
        @staticmethod
        def _weight_int4pack_mm(x: Tensor, codes: Tensor, group: int, pairs: Tensor) -> Tensor:
            numbers = torch.stack([codes >> 4, codes & 15], dim=-1).flatten(1).float() - 8
            scales, zeros = (part.t().repeat_interleave(group, 1).float() for part in pairs.unbind(-1))
            return (x.float() @ (numbers * scales + zeros).t()).to(x.dtype)

    monkeypatch.setattr(peers.torch.ops, "aten", Aten)
    assert outcome(peers.tinygemm(16, 256, CPU), torch.randn(3, 256)).ms is not None
    with pytest.raises(UnsupportedError, match="multiples of 8"):
        peers.tinygemm(12, 256, CPU)


@pytest.mark.parametrize("step", [DECODE, CHUNK, PROMPT], ids=lambda step: f"queries={step.queries}")
def test_attention_is_the_same_for_all(step: Step) -> None:
    """Ours, torch's, and the check of the peers agree on one cache."""
    q = torch.randn(step.batch * step.queries, step.heads, step.head_dim)
    table = _table(step, CPU)
    torch.manual_seed(1)
    k_pages, v_pages = (part.codes for part in _pages(step, "fp32", CPU))
    torch.manual_seed(1)
    own = ours(step, "fp32", CPU)
    keys, values = (dense(step, part, table) for part in (k_pages, v_pages))
    torch.testing.assert_close(expected(step, q, keys, values), own.reference(q), rtol=1e-4, atol=1e-4)
    if step is not CHUNK:  # torch's mask for chunks brings the compiler along
        assert outcome(sdpa(step, k_pages, v_pages, table), q).ms is not None


def test_work_of_a_step() -> None:
    assert DECODE.flops == 4 * 2 * 4 * 16 * 300
    assert PROMPT.flops == 4 * 2 * 4 * 16 * (300 * 301 // 2)
    assert DECODE.nbytes(128) == 2 * 300 * 128 + 2 * 2 * 4 * 16 * 2


@pytest.mark.parametrize("op", ["matmul", "attention"])
def test_ops_are_measured_on_a_gpu(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert bench(["op", op, "--peers"]) == 1
    assert "measures a GPU" in capsys.readouterr().err
