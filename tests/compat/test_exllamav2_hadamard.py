"""The Hadamard functions of `qinfer.compat.exllamav2_ext` against shared vectors, and the law that defines them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qinfer.compat import exllamav2_ext as ext
from tests.compat.vectors import EVERYWHERE, vectors


def made(make: Callable[[Tensor], None], size: int, where: str = "cpu") -> Tensor:
    matrix = torch.full((size, size), 7.0, dtype=torch.float16, device=where)
    make(matrix)
    return matrix.cpu()


@EVERYWHERE
def test_had_paley(where: str) -> None:
    assert torch.equal(made(ext.had_paley, 12, where), vectors("small_kernels")["paley12"].half())


@EVERYWHERE
def test_had_paley2(where: str) -> None:
    for size in (12, 28):
        assert torch.equal(made(ext.had_paley2, size, where), vectors("small_kernels")[f"paley2_{size}"].half())


@pytest.mark.parametrize(
    ("make", "expected"),
    [(ext.had_paley, [4, 8, 12, 20, 24, 32, 44, 48, 60, 68, 72]), (ext.had_paley2, [12, 28, 36, 60, 76])],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_size_is_orthogonal_or_refused(make: Callable[[Tensor], None], expected: list[int]) -> None:
    for size in range(77):
        if size in expected:
            matrix = made(make, size).float()
            assert torch.equal(matrix @ matrix.T, size * torch.eye(size))
        else:
            with pytest.raises(RuntimeError, match=f"got n = {size}$") as caught:
                made(make, size)
            assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("make", [ext.had_paley, ext.had_paley2], ids=lambda make: make.__name__)
def test_only_a_square_of_fp16_will_do(make: Callable[[Tensor], None]) -> None:
    with pytest.raises(RuntimeError, match=r"h must be \[12, 12\], got \[12, 13\]"):
        make(torch.zeros(12, 13).half())
    with pytest.raises(TypeError, match="h must be float16"):
        make(torch.zeros(12, 12))
    with pytest.raises(RuntimeError, match="meta device"):
        make(torch.zeros(12, 12, device="meta", dtype=torch.float16))
