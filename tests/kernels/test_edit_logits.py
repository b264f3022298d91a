"""Changes of single logits."""

from __future__ import annotations

import math

import pytest
import torch

from qinfer.kernels.edit_logits import edit_logits


def arguments() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, and 300 changes in more than one block of the kernel."""
    logits = torch.randn(5, 97) * 3
    logits[2, :4] = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    places = torch.randperm(5 * 97)[:300]
    places[:4] = 2 * 97 + torch.arange(4)
    places = torch.stack([places.unique() // 97, places.unique() % 97], dim=1).int()
    changes = torch.randn(len(places), 3)
    changes[::7, 2] = -math.inf
    return logits, places, changes


def test_by_hand() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0], [0.0, 5.0, 5.0]])
    places = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 2]], dtype=torch.int32)
    changes = torch.tensor([[0.5, 2.0, 0.0], [0.5, 2.0, -1.0], [3.0, 4.0, 0.25], [1.0, 1.0, -math.inf]])
    out = logits.clone()
    edit_logits.reference(logits, out, places, changes)
    assert out.tolist() == [[1.0, -5.0, 1.0], [0.25, 5.0, -math.inf]]


@pytest.mark.kernel
def test_kernel_equals_reference(device: torch.device) -> None:
    logits, places, changes = arguments()
    expected = torch.zeros_like(logits)
    edit_logits.reference(logits, expected, places, changes)
    wide = torch.zeros(5, 120, device=device)
    edit_logits.launch(logits.to(device), wide[:, :97], places.to(device), changes.to(device))
    assert torch.equal(wide[:, :97].cpu().nan_to_num(7.0), expected.nan_to_num(7.0))
    assert (wide[:, 97:] == 0).all()
    # In place, and nothing to do.
    edit_logits.launch(logits.to(device), wide[:, :97], places.to(device)[:0], changes.to(device)[:0])
    inplace = logits.to(device)
    edit_logits.launch(inplace, inplace, places.to(device), changes.to(device))
    edit_logits.reference(logits, logits, places, changes)
    assert torch.equal(inplace.cpu().nan_to_num(7.0), logits.nan_to_num(7.0))


def test_refusals() -> None:
    logits, places, changes = arguments()
    with pytest.raises(TypeError, match="places must be int32"):
        edit_logits(logits, logits, places.long(), changes)
    with pytest.raises(ValueError, match=r"changes must be \[\d+, 3\]"):
        edit_logits(logits, logits, places, changes[1:])
    with pytest.raises(ValueError, match="places must be contiguous"):
        edit_logits(logits, logits, places.repeat(1, 2)[:, :2], changes)
    places[3] = torch.tensor([1, 97])
    with pytest.raises(ValueError, match=r"places must lie in logits of shape \[5, 97\], got \[1, 97\]"):
        edit_logits(logits, logits, places, changes)
