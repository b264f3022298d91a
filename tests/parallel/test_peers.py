"""Who may write to whose memory; that it works is for tests on GPUs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from qinfer.parallel.peers import open_mailboxes


def refused(facts: Sequence[Sequence[int]], monkeypatch: pytest.MonkeyPatch, *, reach: bool = True) -> list[list[int]]:
    """Open mailboxes as rank 0 of ranks on (machine, index), where nobody gets any; return what rank 0 sent."""
    sent: list[list[int]] = []

    def everyone(mine: Sequence[int]) -> list[list[int]]:
        sent.append(list(mine))
        if len(sent) == 1:
            machine = mine[0]
            return [[machine + other, index, 132] for other, index in facts]
        return [list(mine)] * len(facts)

    monkeypatch.setattr("qinfer.parallel.peers.num_sms", lambda _: 132)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: reach)
    assert open_mailboxes(torch.device("cuda", facts[0][1]), 0, len(facts), everyone) is None
    return sent


@pytest.mark.parametrize(
    ("facts", "reach"),
    [
        ([(0, 0), (1, 1)], True),  # another machine
        ([(0, 0), (0, 0)], True),  # each sees one GPU
        ([(0, 0), (0, 5)], True),  # one that this process does not see
        ([(0, 0), (0, 1), (0, 2)], False),
    ],
)
def test_gpus_out_of_reach(facts: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, *, reach: bool) -> None:
    assert refused(facts, monkeypatch, reach=reach)[1:] == [[0]]


def test_gpus_in_reach_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the memory of a GPU, which is not there."""
    monkeypatch.setattr(torch, "zeros", lambda *_, **options: pytest.fail(f"allocates on {options['device']}"))
    with pytest.raises(pytest.fail.Exception, match="allocates on cuda:2"):
        refused([(0, 2), (0, 0), (0, 1)], monkeypatch)


def test_one_rank_and_amd_ask_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = pytest.fail
    assert open_mailboxes(torch.device("cuda", 0), 0, 1, nobody) is None  # type: ignore[arg-type]
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert open_mailboxes(torch.device("cuda", 0), 0, 2, nobody) is None  # type: ignore[arg-type]
