"""What kernels add to a step: spans that overlap, time in which nothing runs, and the profile in a benchmark's row."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType

from qinfer.assets import STORYTELLER
from qinfer.bench import model
from qinfer.bench.__main__ import main as bench
from qinfer.bench.rows import identity
from qinfer.bench.shares import NOTHING, Span, kernel_shares, shares, short, table
from qinfer.errors import UnsupportedError


def test_a_kernel_counts_with_what_it_adds_to_the_step() -> None:
    # b waits for a inside, c hides behind b, and 2 µs are idle before the second a.
    step = [Span(0, 10, "a"), Span(4, 16, "b"), Span(5, 15, "c")]
    again = [Span(start + 18, end + 18, name) for start, end, name in step]
    found = shares([*again, *step], 2)
    assert {name: row["us"] for name, row in found.items()} == {"a": 10, "b": 6, NOTHING: 1, "c": 0}
    assert list(found) == ["a", "b", NOTHING, "c"]
    assert [found[name]["launches"] for name in "abc"] == [1, 1, 1]
    assert sum(row["share"] for row in found.values()) == pytest.approx(1)
    assert found["b"]["share"] == pytest.approx(6 / 17)
    lines = table(found).splitlines()
    assert lines[1].split() == ["a", "1.0", "10.0", "58.8", "%"]
    assert len(lines) == 5


def test_the_same_kernel_of_several_launches_is_one_row() -> None:
    found = shares([Span(0, 2, "void f<float>(int)"), Span(2, 5, "void f<half>(int)")], 1)
    assert found["f"] == {"launches": 2, "us": 5, "share": 1}
    assert short("_kv_write_kernel") == "_kv_write_kernel"
    assert short("<lambda>") == "<lambda>"


ARGUMENTS = ["model", "--model", str(STORYTELLER), "--batch", "2", "--context", "16", "--new-tokens", "8", "--profile"]


def test_without_a_gpu_there_is_no_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench([*ARGUMENTS, "--device", "cpu"]) == 1
    assert "--profile needs a GPU" in capsys.readouterr().err


class Recorded:
    """A profile of some events."""

    def __init__(self, *events: tuple[str, str, int, int]) -> None:
        self.seen = [
            SimpleNamespace(
                name=name, device_type=getattr(DeviceType, kind), time_range=SimpleNamespace(start=start, end=end)
            )
            for kind, name, start, end in events
        ]

    def __enter__(self) -> Recorded:
        return self

    def __exit__(self, *_: object) -> None: ...

    def events(self) -> list[SimpleNamespace]:
        return self.seen


def test_what_runs_on_the_device_is_read_from_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(("CPU", "launch", 0, 50), ("CUDA", "a", 3, 7), ("CUDA", "b", 7, 8))
    monkeypatch.setattr("qinfer.bench.shares.profile", lambda **_: recorded)
    calls = []
    found = kernel_shares(lambda: calls.append(1), torch.device("cpu"), steps=2)
    assert len(calls) == 2
    assert found == shares([Span(3, 7, "a"), Span(7, 8, "b")], 2)
    recorded.seen = recorded.seen[:1]
    with pytest.raises(UnsupportedError, match="saw no kernel"):
        kernel_shares(lambda: None, torch.device("cpu"), steps=1)


def test_steps_are_profiled_in_which_everybody_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = shares([Span(0, 3, "_kv_write_kernel"), Span(3, 12, "_matmul_kernel")], 1)
    ran = []

    def profiled(step: Any, device: torch.device, *, steps: int) -> Any:
        generator = step.__self__
        for _ in range(steps):
            step()
            ran.append(sum(one.num_tokens for one in generator.scheduler.running))
        return found

    options = model.argparse.ArgumentParser()
    model.add_parser(options.add_subparsers())
    parsed = options.parse_args([*ARGUMENTS, "--device", "cpu", "--prefill", "32"])
    monkeypatch.setattr(model, "kernel_shares", profiled)
    measured = model._measure(parsed, torch.device("cpu"), None)
    assert measured["kernels"] is found
    # Every profiled step gave both sequences a token.
    assert len(ran) == model.PROFILED
    assert all(after - before == 2 for before, after in pairwise(ran)), ran


def test_a_row_with_a_profile_is_about_the_same_as_one_without() -> None:
    row = {"bench": "model", "batch": 1}
    assert identity(row) == identity({**row, "kernels": {}})


@pytest.mark.gpu
def test_kernels_of_a_gpu_are_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    assert bench([*ARGUMENTS, "--json", str(file)]) == 0
    kernels = json.loads(file.read_text())["kernels"]
    assert sum(row["share"] for row in kernels.values()) == pytest.approx(1)
    assert kernels["_paged_attention_kernel"]["launches"] == 6
    assert "_paged_attention_kernel" in capsys.readouterr().out
