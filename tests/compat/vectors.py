"""Shared vectors as tensors on a device, and the devices on which the extension functions are tested."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

VECTORS = Path(__file__).parents[1] / "vectors"
EVERYWHERE = pytest.mark.parametrize("where", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
NOTHING = torch.empty((1, 1), device="meta")


def vectors(name: str, where: str = "cpu") -> dict[str, Tensor]:
    """The arrays of a vector file."""
    return {key: torch.from_numpy(array).to(where) for key, array in np.load(VECTORS / f"{name}.npz").items()}
