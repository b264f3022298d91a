"""feed: the ids of the last step stand where the host left their places, and other ids stay."""

from __future__ import annotations

import pytest
import torch

from qinfer.kernels.feed import feed

BODIES = [feed.reference, pytest.param(feed.launch, marks=pytest.mark.kernel)]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_by_hand(body, dtype, device):
    ids = torch.tensor([5, -1, -3, 0, -2, -1], dtype=torch.int32, device=device)
    body(ids, torch.tensor([70, -1, 90], dtype=dtype, device=device))
    assert ids.tolist() == [5, 70, 90, 0, 0, 70]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("count", [0, 1, 128, 300])
def test_every_place_of_any_number(body, count, device):
    buffer = torch.arange(count + 7, dtype=torch.int32) * 1000
    buffer[3 : 3 + count : 3] = -1 - torch.arange(count)[::3].int() % 50
    sampled = torch.randperm(50, generator=torch.Generator().manual_seed(0)).int()
    ids = buffer[3 : 3 + count].tolist()
    expected = [x if x >= 0 else int(sampled[-1 - x]) for x in ids]
    whole = buffer.to(device)
    body(whole[3 : 3 + count], sampled.to(device))
    assert whole[3 : 3 + count].tolist() == expected
    assert torch.equal(whole[:3].cpu(), buffer[:3])
    assert torch.equal(whole[3 + count :].cpu(), buffer[3 + count :])


@pytest.mark.parametrize(
    ("token_ids", "sampled", "error", "text"),
    [
        (torch.tensor([-4]), torch.tensor([1, 2, 3]), ValueError, r"token_ids must be in \[-3, .* got -4"),
        (torch.tensor([1]), torch.tensor([-2]), ValueError, r"sampled must be in \[-1, .* got -2"),
        (torch.tensor([1.0]), torch.tensor([1]), TypeError, "token_ids must be int32 or int64"),
        (torch.tensor([[1]]), torch.tensor([1]), ValueError, r"token_ids must be \[T\], got \[1, 1\]"),
        (torch.tensor([1]), torch.tensor([]).int(), ValueError, "sampled must have rows, got none"),
    ],
)
def test_refuses(token_ids, sampled, error, text):
    with pytest.raises(error, match=text):
        feed(token_ids, sampled)
