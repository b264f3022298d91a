"""Plots: points under a roof, bars, their text, and a picture where matplotlib is there."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from qinfer.bench import plot
from qinfer.bench.__main__ import main as bench
from qinfer.bench.points import bars, rooflines, work
from qinfer.bench.rows import Row

GPU = {"gpu": "A", "read_bandwidth_gb_s": 1000.0}
# 2 · 4 · 1000 · 500 operations over 1,000,000 + 2 · 4 · 1500 bytes in 10 µs.
MATMUL: Row = {"bench": "op", "op": "matmul", "m": 4, "n": 1000, "k": 500, "bytes": 1_000_000, "ms": 0.01, **GPU}
MODEL: Row = {"bench": "model", "model": "x", "tokens_per_second": 250.0, "bytes_per_step": 10**9, **GPU}
MODEL |= {"flops_per_step": 10**10, "ms_per_step": {"median": 4.0}}


def test_a_point_is_work_over_bytes_and_time() -> None:
    (roof,) = rooflines([MATMUL, MODEL])
    product, model = roof.points
    assert product.intensity == pytest.approx(4e6 / 1_012_000)
    assert product.teraflops == pytest.approx(0.4)
    assert (model.intensity, model.teraflops) == (pytest.approx(10.0), pytest.approx(2.5))
    assert work({**MATMUL, "ms": None}) is None


def test_the_roof_has_a_slope_and_a_flat_part() -> None:
    (roof,) = rooflines([MATMUL])
    assert roof.peak is None
    assert roof.roof(10_000) == pytest.approx(10_000)
    (roof,) = rooflines([MATMUL, {**MATMUL, "format": "fp16 cuBLAS", "ms": 0.005}])
    assert roof.peak == pytest.approx(0.8)
    assert (roof.roof(0.5), roof.roof(1000)) == (pytest.approx(0.5), pytest.approx(0.8))
    (roof,) = rooflines([{**MATMUL, "product_tflops": 700.0}])
    assert roof.peak == 700.0


def test_devices_do_not_share_a_roof() -> None:
    roofs = list(rooflines([MATMUL, {**MATMUL, "gpu": "B", "read_bandwidth_gb_s": 2000.0}]))
    assert [(roof.device, roof.bandwidth, len(roof.points)) for roof in roofs] == [("A", 1000.0, 1), ("B", 2000.0, 1)]


def test_every_row_goes_to_the_bars_of_one_unit() -> None:
    ratio = {"bench": "compare", "of": "op", "op": "matmul", "ratio": 1.5, "ms": 3.0}
    charts = {chart.unit: chart.values for chart in bars([MATMUL, MODEL, ratio, {**MATMUL, "fraction_of_roof": 0.5}])}
    assert charts["µs"] == (("matmul n=1000 k=500 m=4", 10.0),)
    assert charts["%"] == (("matmul n=1000 k=500 m=4", 50.0),)
    assert [value for _, value in charts["tokens/s"]] == [250.0]
    assert [value for _, value in charts["×"]] == [1.5]
    (chart,) = bars([{**MODEL, "revision": "a"}, {**MODEL, "revision": "b"}])
    assert [label[-2:] for label, _ in chart.values] == ["@a", "@b"]


def test_text_shows_shares_and_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    file.write_text("\n".join(json.dumps(row) for row in (MATMUL, MODEL, {**MODEL, "tokens_per_second": 125.0})))
    assert bench(["plot", str(file), "--text"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Roofline of A: 1,000 GB/s" in lines
    assert any(line.startswith("matmul") and " 10% ████" in line for line in lines)
    full, half = (line for line in lines if line.startswith("model x") and "█" in line and "%" not in line)
    assert full.count("█") == 2 * half.count("█") == plot.WIDTH


QUALITY = {"bench": "quality_kv_formats", "model": "x", "lengths": [{"context": 512, "formats": []}]}


def test_rows_without_a_figure_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speed, quality = tmp_path / "speed.json", tmp_path / "quality.json"
    speed.write_text("\n".join(json.dumps(row) for row in (MATMUL, {**MATMUL, "m": 8, "ms": None})))
    quality.write_text(json.dumps(QUALITY, indent=1) + "\n")
    assert bench(["plot", str(speed), str(quality)]) == 0
    captured = capsys.readouterr()
    assert "Roofline of A: 1,000 GB/s" in captured.out
    assert "quality" not in captured.out
    assert captured.err.splitlines() == [
        f"left out: 1 of 2 rows of {speed} have no figure to plot",
        f"left out: 1 of 1 rows of {quality} have no figure to plot",
    ]
    assert bench(["compare", str(quality), str(quality)]) == 1
    assert "nothing to compare" in capsys.readouterr().err
    # A file that was cut off is an error, however it is laid out.
    quality.write_text(json.dumps(QUALITY, indent=1)[:-20])
    assert bench(["plot", str(speed), str(quality)]) == 1
    assert f"{quality}:7: is no JSON: " in capsys.readouterr().err


def test_a_point_above_its_roof_is_marked() -> None:
    (roof,) = rooflines([{**MATMUL, "ms": 0.0001}])
    assert any(line.endswith("→") for line in plot.text([roof], []))


def test_mistakes_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, wrong = tmp_path / "rows.json", tmp_path / "wrong.json"
    file.write_text(json.dumps(MATMUL))
    wrong.write_text(json.dumps({**MATMUL, "ms": None}))
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    for arguments, problem in (
        ([str(file), "--out", "x.png"], 'pip install "qinfer[plot]"'),
        ([str(file), "--out", "x.png", "--text"], "give one of them"),
        ([str(wrong)], "nothing to plot"),
    ):
        assert bench(["plot", *arguments]) == 1
        assert problem in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is an extra")
def test_a_picture_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "rows.json", tmp_path / "out.png"
    file.write_text("\n".join(json.dumps(row) for row in (MATMUL, MODEL)))
    assert bench(["plot", str(file), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert bench(["plot", str(file), "--out", str(tmp_path / "out.xyz")]) == 1
    assert "out.xyz" in capsys.readouterr().err
