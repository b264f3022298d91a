"""Compiling ahead: what the processes run, and that their failures are seen."""

from __future__ import annotations

from typing import Any

import pytest

from qinfer.bench import ahead
from qinfer.bench.ahead import compile_ahead, run_once


def test_every_size_is_multiplied_as_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(ahead, "matmul", lambda x, operand: ran.append((x, operand)))
    run_once("exl2-4.0", [(64, 1280), (128, 256)], 3)
    assert [list(x.shape) for x, _ in ran] == [[3, 1280], [3, 256]]
    assert [operand.out_features for _, operand in ran] == [64, 128]
    assert [segment.bits for segment in ran[0][1].segments] == [6, 4]


def test_processes_run_the_products_and_tell_what_they_raise() -> None:
    compile_ahead(["int4-g128"], [(64, 256)], [1, 2], jobs=1)
    with pytest.raises(KeyError, match="int9"):
        compile_ahead(["int9"], [(64, 256)], [1], jobs=1)
