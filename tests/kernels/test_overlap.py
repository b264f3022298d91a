"""Who lets the next kernel in, and when: a product and the kernel that reads it have to agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qinfer.kernels import kv_write, matmul, rmsnorm, silu_mul, wgmma
from qinfer.kernels.kv_codec import CODECS
from qinfer.kernels.overlap import EARLY_ROWS, starts_early
from qinfer.kernels.tiles import Tile
from tests.kernels.coded import poisoned
from tests.kernels.launches import record_constants
from tests.kernels.operands import plane_operand

COLUMNS = 256


def _add_up(parts: torch.Tensor) -> None:
    matmul._add_up(parts, parts.new_empty(parts.shape[1:]))


def _normalize(parts: torch.Tensor) -> None:
    rmsnorm.add_rmsnorm.launch(torch.zeros(parts.shape[1:]), parts, torch.ones(COLUMNS), eps=1e-6)


def _activate(parts: torch.Tensor) -> None:
    silu_mul.silu_mul.launch(parts)


def _write(parts: torch.Tensor) -> None:
    num_rows = parts.shape[1]
    pages = [poisoned(CODECS["fp16"], 1, 1, 16, 64, torch.device("cpu")) for _ in range(2)]
    angles, places = torch.zeros(16, 32), torch.zeros(num_rows, dtype=torch.int32)
    kv_write.rope_write.launch(parts, angles, angles, places, *pages, places, interleaved=False)


def _multiply(tile: Tile, parts: torch.Tensor) -> None:
    x = torch.zeros(parts.shape[1], 512, dtype=torch.float16)
    matmul.matmul_parts.launch(x, plane_operand(512, COLUMNS), tile=tile)


@pytest.mark.parametrize("num_rows", [1, EARLY_ROWS, EARLY_ROWS + 1])
@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize(
    ("module", "kernel", "launch"),
    [
        (matmul, "_sum_kernel", _add_up),
        (rmsnorm, "_shared_rmsnorm_kernel", _normalize),
        (silu_mul, "_silu_mul_kernel", _activate),
        (kv_write, "_kv_write_kernel", _write),
        (matmul, "_matmul_kernel", None),
        (wgmma, "_wgmma_kernel", None),
    ],
)
def test_products_in_parts_and_their_readers_agree(
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    kernel: str,
    launch: Callable[[torch.Tensor], None] | None,
    num_parts: int,
    num_rows: int,
) -> None:
    launched: dict[str, Any] = {}

    record_constants(monkeypatch, module, kernel, launched)
    monkeypatch.setattr(rmsnorm, "is_ptx_target", lambda _: True)
    if kernel == "_shared_rmsnorm_kernel" and num_parts == 1:
        record_constants(monkeypatch, rmsnorm, "_add_rmsnorm_kernel", launched)
    parts = torch.zeros(num_parts, num_rows, COLUMNS)
    if launch is None:
        _multiply(Tile(16, 64, num_parts, 4, 3, wgmma=module is wgmma), parts)
    else:
        launch(parts)
    # A whole product has a kernel of its own to normalize it, which always says it behind its wait.
    is_early = launched.get("EARLY", False)
    assert is_early == starts_early(num_parts, num_rows) == (num_parts > 1 and num_rows <= EARLY_ROWS)
