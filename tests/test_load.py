"""The measurement of loading, on files of a few megabytes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qinfer.bench import load
from qinfer.bench.__main__ import main as bench
from qinfer.checkpoint import Checkpoint
from qinfer.models.parameters import CheckpointParameters
from qinfer.quant import FORMATS
from tests.models import tiny
from tests.test_doctor import write


def test_files_are_a_checkpoint_of_the_asked_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "SHARD_BYTES", 9_000_000)
    load.write_files(tmp_path, 20_000_000)
    checkpoint = Checkpoint(tmp_path)
    sizes = [checkpoint.read(name).numel() for name in checkpoint.names()]
    assert sum(sizes) == 20_000_000
    assert len(set(sizes) - set(load.TENSORS)) <= 1  # the last one is cut
    files = {checkpoint.file(name) for name in checkpoint.names()}
    assert files == set(tmp_path.glob("*.safetensors"))
    assert len(files) == 2
    # Random: bytes that repeat could be told apart from others on their way.
    assert checkpoint.read("0.0").float().std() > 70


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bench_load_writes_every_field(tmp_path: Path, capsys: pytest.CaptureFixture[str], device: str) -> None:
    file = tmp_path / "result.json"
    arguments = ["op", "load", "--size-gb", "0.05", "--device", device, "--folder", str(tmp_path), "--json", str(file)]
    assert bench(arguments) == 0
    result = json.loads(file.read_text())
    assert result["bench"] == "load"
    assert result["device"] == device
    for field in ("gpu", "torch", "triton", "python", "revision", "date", "tensors", "largest_file_mb"):
        assert result[field], field
    assert result["size_mb"] == pytest.approx(50, rel=0.01)
    assert result["load_gb_s"] == pytest.approx(result["size_mb"] / result["load_ms"]["median"])
    assert result["copy_gb_s"] == pytest.approx(result["size_mb"] / result["copy_ms"]["median"])
    assert result["fraction_of_copy"] == pytest.approx(result["load_gb_s"] / result["copy_gb_s"])
    assert result["peak_host_rss_growth_mb"] >= 0
    assert "load_gb_s" in capsys.readouterr().out
    # The large files are gone again.
    assert list(tmp_path.iterdir()) == [file]


def test_growth_of_memory_is_seen() -> None:
    with load._peak_rss() as peak:
        # Larger than what the allocator keeps for later, so that it comes from the system.
        held = torch.ones(100 << 20, dtype=torch.uint8)
        load.threading.Event().wait(0.1)
    assert peak[0] >= 0.9 * held.nbytes


def test_a_size_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["op", "load", "--size-gb", "0"]) == 1
    assert "must be positive" in capsys.readouterr().err


def parts(value: Any) -> list[Any]:
    """Take an operand apart into tensors and numbers."""
    if dataclasses.is_dataclass(value):
        return [part for field in dataclasses.fields(value) for part in parts(getattr(value, field.name))]
    return [part for item in value for part in parts(item)] if isinstance(value, tuple) else [value]


@pytest.mark.parametrize(
    "target",
    [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"],
)
@pytest.mark.parametrize("name", FORMATS)
def test_operands_do_not_depend_on_where_weights_are_read_to(tmp_path: Path, name: str, target: str) -> None:
    tiny.save(tmp_path / "dense", "llama")
    orders = {"gptq": "act_order", "compressed-tensors": "act_order", "exl2": "permutation"}
    options: dict[str, Any] = {orders[name]: torch.randperm} if name in orders else {}
    folder = write(tmp_path / "dense", tmp_path / "model", name, **options)
    module = "model.layers.0.mlp.down_proj"
    there = CheckpointParameters(Checkpoint(folder), device=torch.device(target), dtype=torch.float16)
    # The other way: read on the host, laid out on the device.
    here = CheckpointParameters(Checkpoint(folder), device=torch.device("cpu"), dtype=torch.float16)
    weight, _ = here.weight(module, (128, 64), has_bias=False)
    got = parts(there.linear(module, (128, 64), has_bias=False).operand)
    expected = parts(weight.operand(torch.device(target), torch.float16))
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert a.device.type == target
            assert torch.equal(a.cpu(), b.cpu())
        else:
            assert a == b


@pytest.mark.gpu
def test_loading_keeps_less_than_one_file_in_host_memory(tmp_path: Path, device: torch.device) -> None:
    load.write_files(tmp_path, 2_000_000_000)
    result = load.measure(tmp_path, device)
    assert result["peak_host_rss_growth_mb"] < 300 < result["largest_file_mb"]
