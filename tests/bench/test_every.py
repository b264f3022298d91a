"""Cases as benchmarks: what they move and compute, that wrong ones have no time, and their command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qinfer.bench import every
from qinfer.bench.__main__ import main as bench
from qinfer.bench.case import Case
from qinfer.bench.cases import CASES
from qinfer.bench.every import difference, measure, tensors
from qinfer.bench.points import bar_of, work
from qinfer.bench.rows import read
from qinfer.bench.shapes import TINY
from qinfer.kernels.device import OPS

CPU = torch.device("cpu")
HIDDEN, QKV, D, G = TINY.hidden, TINY.qkv, TINY.head_dim, TINY.kv_heads


def find(op: str, name: str) -> Case:
    return next(case for case in CASES if (case.op, case.name) == (op, name))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock and a roof that cost nothing."""

    class Times:
        median = 0.5

    monkeypatch.setattr(every, "time_calls", lambda function, device, *, repeats: Times())
    monkeypatch.setattr(every, "read_bandwidth", lambda device: 100.0)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_case_that_can_be_measured(op: str) -> None:
    cases = [case for case in CASES if case.op == op]
    case = next((case for case in cases if TINY.name in case.name), cases[0])
    row = measure(case, CPU)
    assert (row["ms"], row["problem"]) == (0.5, None)
    assert row["bytes"] > 0


@pytest.mark.parametrize(
    ("op", "name", "expected"),
    [
        # x, weight, result.
        ("rmsnorm", f"{TINY.name} T=16 fp16", 16 * HIDDEN * 4 + HIDDEN * 2 + 16 * HIDDEN * 2),
        # The residual twice, eight parts, weight, result.
        ("add_rmsnorm", f"{TINY.name} T=16 fp16", (2 + 8) * 16 * HIDDEN * 4 + HIDDEN * 2 + 16 * HIDDEN * 2),
        # 16 rows of the table, their ids, result.
        ("gather_rows", f"{TINY.name} T=16 fp16", 16 * HIDDEN * 2 + 16 * 4 + 16 * HIDDEN * 4),
        # Keys and values read and written, slots.
        ("kv_write", f"{TINY.name} T=16 fp16", 4 * 16 * G * D * 2 + 16 * 4),
        # Four bits and a scale of 16 per head.
        ("kv_write", f"{TINY.name} T=16 fp16 q4", 2 * 16 * G * D * 2 + 2 * 16 * G * (D // 2 + 2) + 16 * 4),
        # Eight parts, rows of cosines and sines, keys and values, queries, positions and slots.
        (
            "rope_write",
            f"{TINY.name} T=16 fp16",
            8 * 16 * QKV * 4 + 2 * 16 * D // 2 * 4 + 16 * QKV * 2 + 2 * 16 * 4,
        ),
    ],
)
def test_bytes_are_what_is_read_and_written(op: str, name: str, expected: int) -> None:
    assert measure(find(op, name), CPU)["bytes"] == expected


def test_experts_and_adapters_count_once_if_somebody_takes_them() -> None:
    case = next(case for case in CASES if case.op == "expert_matmul" and "experts gate_up T=1 fp16 dense" in case.name)
    args, _ = every._arguments(case, CPU)
    x, operand, routing = args
    taken = len(routing.experts.unique())
    assert taken < operand.num_experts
    one = operand.first.weight.nbytes
    beside = sum(tensor.nbytes for tensor in tensors(routing)) + x.nbytes + 2 * operand.first.out_features * 2
    assert measure(case, CPU)["bytes"] == taken * one + beside


def test_operations_are_those_of_the_products() -> None:
    case = next(case for case in CASES if case.op == "matmul" and case.name.startswith(f"{TINY.name} qkv T=16 fp16"))
    (x, operand), _ = every._arguments(case, CPU)
    row = measure(case, CPU)
    assert row["flops"] == 2 * 16 * x.shape[1] * operand.out_features
    assert measure(find("silu_mul", f"{TINY.name} T=16 fp16"), CPU)["flops"] is None


def broken(op: str, change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second call on, let the reference of an op, which is what runs here, do something else."""
    right, calls = OPS[op].reference, iter(range(10))

    def reference(*args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        return change(result) if next(calls) else result

    monkeypatch.setattr(OPS[op], "reference", reference)


@pytest.mark.parametrize("change", [lambda y: y * 1.01, lambda y: y * float("nan"), lambda y: y[:-1]])
def test_a_wrong_result_has_no_time(change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    broken("silu_mul", change, monkeypatch)
    row = measure(find("silu_mul", f"{TINY.name} T=16 fp16"), CPU)
    assert row["ms"] is None
    assert row["problem"].startswith("wrong: result 0 differs by ")


def test_what_an_op_changes_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    right = OPS["add_rmsnorm"].reference
    calls = iter(range(10))

    def reference(residual: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = right(residual, *args, **kwargs)
        if next(calls):
            residual += 1
        return y

    monkeypatch.setattr(OPS["add_rmsnorm"], "reference", reference)
    assert measure(find("add_rmsnorm", f"{TINY.name} T=16 fp16"), CPU)["problem"].startswith("wrong: result 1 ")


def test_differences() -> None:
    ones = torch.ones(8)
    assert difference(ones, ones) == 0
    assert difference(ones * 1.5, ones) == pytest.approx(0.5)
    assert difference(torch.zeros(2), torch.zeros(2)) == 0
    assert difference(torch.ones(2), torch.zeros(2)) == float("inf")
    assert difference(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25
    assert difference(ones, ones.half()) == float("inf")


def test_the_command_writes_rows_that_can_be_read_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    assert (
        bench(["op", "case", "silu_mul", "matmul", "--match", TINY.name, "--match", "T=16 fp16", "--json", str(path)])
        == 0
    )
    rows = read(path)
    assert {row["op"] for row in rows} == {"silu_mul", "matmul"}
    assert all(bar_of(row) is not None for row in rows)
    assert all((work(row) is None) == (row["op"] == "silu_mul") for row in rows)
    printed = capsys.readouterr().out
    assert all(row["case"] in printed for row in rows)
    first = rows[0]
    assert first["fraction_of_roof"] == pytest.approx(first["bytes"] / 0.5 / 1e6 / 100)


def test_a_wrong_case_makes_the_command_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken("silu_mul", lambda y: y * 2, monkeypatch)
    path = tmp_path / "rows.json"
    assert bench(["op", "case", "silu_mul", "--match", f"{TINY.name} T=1 fp16", "--json", str(path)]) == 1
    assert json.loads(path.read_text().splitlines()[0])["ms"] is None
    assert "wrong: result 0 differs by 1" in capsys.readouterr().out, "twice as much is all of it too much"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nothing"], "no op 'nothing'; these work: add_lora"),
        (["rope", "--match", "T=5"], "no case has 'T=5' in its name"),
    ],
)
def test_what_does_not_exist_is_told(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["op", "case", *words]) != 0
    assert told in capsys.readouterr().err
