"""all_reduce where one process plays every rank: what arrives, for how long, and what waiting ends with."""

from __future__ import annotations

import pytest
import torch

from qinfer.kernels.all_reduce import BLOCK, Mailboxes, all_reduce, make_abort
from tests.strategies import random_tensor

BODIES = [all_reduce.reference, pytest.param(all_reduce.launch, marks=pytest.mark.kernel)]


@pytest.fixture(autouse=True)
def _soon_at_abort(device, monkeypatch):
    """Interpreted programs look at `abort` after a few looks for words."""
    if device.type == "cpu":
        monkeypatch.setattr("qinfer.kernels.all_reduce.PATIENCE", 2)


def mailboxes(size: int, channels: int, device: torch.device) -> list[Mailboxes]:
    """Mailboxes of all ranks in one memory, aborted: a test in which words are missing shall fail, not wait."""
    boxes = tuple(torch.zeros(channels, 2, size, BLOCK, dtype=torch.int64, device=device) for _ in range(size))
    uses = [torch.zeros(channels, dtype=torch.int32, device=device) for _ in range(size)]
    return [Mailboxes(rank, boxes, uses[rank], make_abort(device).fill_(1)) for rank in range(size)]


def in_order(parts: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(parts[0])
    for part in parts:
        total = total + part
    return total


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(
    ("size", "num_parts", "rows", "columns"),
    [(2, (1, 1), 1, 256), (2, (3, 1), 2, 200), (3, (1, 2, 5), 3, 130), (4, (2, 2, 2, 2), 1, 77), (2, (1, 1), 0, 8)],
)
def test_all_ranks_get_the_same_sum(body, size, num_parts, rows, columns, device):
    """Five uses one after the other, of more and fewer rows, so that both buffers are overwritten."""
    mails = mailboxes(size, max(rows, 1) * -(-columns // BLOCK), device)
    for use in range(5):
        shape = (rows if use % 2 == 0 else min(rows, 1), columns)
        given = [random_tensor(s, *shape, seed=10 * use + r).to(device) for r, s in enumerate(num_parts)]
        for mail, parts in zip(mails, given, strict=True):
            body(parts, mail, phase="push")
        expected = in_order(torch.stack([in_order(parts) for parts in given]))
        for mail, parts in zip(mails, given, strict=True):
            assert torch.equal(body(parts, mail, phase="collect")[0], expected)


@pytest.mark.parametrize("body", BODIES)
def test_both_phases_in_one_call(body, device):
    mails = mailboxes(3, 2, device)
    given = [random_tensor(2, 1, 150, seed=rank).to(device) for rank in range(3)]
    for mail, parts in zip(mails[1:], given[1:], strict=True):
        body(parts, mail, phase="push")
    expected = in_order(torch.stack([in_order(parts) for parts in given]))
    assert torch.equal(body(given[0], mails[0])[0], expected)
    # Rank 0 has pushed as well, so that the others need not wait.
    assert torch.equal(body(given[2], mails[2], phase="collect")[0], expected)


@pytest.mark.parametrize("body", BODIES)
def test_a_rank_may_be_one_use_ahead(body, device):
    """Rank 0 collects and pushes its next words before rank 1 has read the last ones."""
    first, second = mailboxes(2, 1, device)
    x = [torch.full((1, 1, 4), float(2**i), device=device) for i in range(4)]
    body(x[0], first, phase="push")
    body(x[1], second, phase="push")
    assert body(x[0], first, phase="collect").tolist() == [[[3.0] * 4]]
    body(x[2], first, phase="push")
    assert body(x[1], second, phase="collect").tolist() == [[[3.0] * 4]]
    body(x[3], second, phase="push")
    assert body(x[2], first, phase="collect").tolist() == [[[12.0] * 4]]
    assert body(x[3], second, phase="collect").tolist() == [[[12.0] * 4]]


@pytest.mark.parametrize("body", BODIES)
def test_moves_any_bits(body, device):
    """Integers of one rank and zeros of the others."""
    bits = torch.tensor([-1, -(2**31), 2**31 - 1, 0, 0x7FC00001, 1], dtype=torch.int32, device=device)[None, None]
    mails = mailboxes(2, 1, device)
    for use in range(3):
        given = [bits + use, torch.zeros_like(bits)]
        for mail, parts in zip(mails, given, strict=True):
            body(parts, mail, phase="push")
        for mail, parts in zip(mails, given, strict=True):
            assert torch.equal(body(parts, mail, phase="collect"), bits + use)


@pytest.mark.parametrize("body", BODIES)
def test_the_number_of_uses_wraps(body, device):
    mails = mailboxes(2, 1, device)
    for mail in mails:
        mail.uses.fill_(2**31 - 2)
    x = torch.tensor([[[1.5, -3.0]]], device=device)
    for _ in range(4):
        for mail in mails:
            body(x, mail, phase="push")
        for mail in mails:
            assert torch.equal(body(x, mail, phase="collect"), 2 * x)
    assert mails[0].uses.tolist() == [-(2**31) + 2]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 1), (4, 0), (4, 2)])
def test_loopback_hears_itself(body, size, rank, device):
    mail = Mailboxes.loopback(size, 3, device, rank=rank)
    for use in range(3):
        x = torch.arange(300.0, device=device).view(1, 1, 300) + use
        assert torch.equal(body(x, mail), size * x)


@pytest.mark.parametrize("body", BODIES)
def test_rows_may_lie_apart(body, device):
    wide = random_tensor(2, 3, 40, seed=1).to(device)
    mail = Mailboxes.loopback(2, 3, device)
    assert torch.equal(body(wide[:, :, 8:32], mail)[0], 2 * (wide[0] + wide[1])[:, 8:32])


@pytest.mark.kernel
def test_an_abort_ends_the_waiting(device):
    """The peer has never pushed; without the abort this would not return."""
    mail = mailboxes(2, 1, device)[0]
    assert all_reduce.launch(torch.ones(1, 1, 3, device=device), mail).shape == (1, 1, 3)


@pytest.mark.gpu
def test_replays_of_a_graph_are_uses(device):
    mail = Mailboxes.loopback(2, 64, device)
    x = torch.randn(4, 1, 8192, device=device)
    out = all_reduce(x, mail)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            out = all_reduce(x, mail)
    for _ in range(5):
        x.normal_()
        graph.replay()
        assert torch.equal(out[0], 2 * in_order(x))
    assert mail.uses.tolist() == [16] * 64


@pytest.mark.parametrize(
    ("parts", "error", "text"),
    [
        (torch.zeros(1, 1, 4).half(), TypeError, "parts must be float32 or int32, got torch.float16"),
        (torch.zeros(1, 4), ValueError, r"parts must be \[S, T, C\], got \[1, 4\]"),
        (torch.zeros(2, 1, 4).int(), ValueError, r"parts must be \[1, T, C\], got \[2, 1, 4\]"),
        (torch.zeros(1, 1, 8)[:, :, ::2], ValueError, "last stride 1"),
        (torch.zeros(1, 2, BLOCK + 1), ValueError, r"\[1, 2, 129\] needs more than the 3 channels"),
    ],
)
def test_refuses(parts, error, text):
    with pytest.raises(error, match=text):
        all_reduce(parts, Mailboxes.loopback(2, 3, torch.device("cpu")))


def test_refuses_a_rank_that_is_not_there():
    mail = Mailboxes.loopback(2, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        all_reduce(torch.zeros(1, 1, 1), Mailboxes(2, mail.boxes, mail.uses, mail.abort))


def test_reference_knows_who_is_missing():
    mail = mailboxes(3, 1, torch.device("cpu"))[1]
    with pytest.raises(ValueError, match="rank 0 has not pushed"):
        all_reduce.reference(torch.ones(1, 1, 3), mail)
