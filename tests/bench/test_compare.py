"""Comparisons: what may be compared, what a ratio says, and two trees in turns."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qinfer.bench import trees
from qinfer.bench.__main__ import main as bench
from qinfer.bench.compare import compare
from qinfer.bench.rows import Figure, ResultError, Row, grouped, identity, read

ROW: Row = {"bench": "op", "op": "matmul", "format": "int4-g128", "m": 1, "n": 64, "k": 32, "ms": 0.02}
PLACE = {"gpu": "NVIDIA H200", "device": "cuda", "torch": "2.11", "triton": "3.6.0", "revision": "aaa"}


def _row(**changes: Any) -> Row:
    return {**ROW, **PLACE, **changes}


def _write(path: Path, *rows: Row) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_times_and_rates_point_the_same_way() -> None:
    (ratio,) = compare([_row(ms=0.03)], [_row(ms=0.02)])
    assert ratio.value == pytest.approx(1.5)
    serve = {"bench": "serve", **PLACE}
    (ratio,) = compare([{**serve, "output_tokens_per_second": 10}], [{**serve, "output_tokens_per_second": 5}])
    assert ratio.value == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("base", "here", "verdict", "spread"),
    [
        ((4.0, 5.0, 6.0), (2.0, 2.5, 3.0), "better", (4 / 3, 3.0)),
        ((4.0, 5.0, 6.0), (5.0, 5.5, 7.0), "same", (4 / 7, 6 / 5)),
        ((1.0, 1.1), (2.0, 2.1), "worse", (1 / 2.1, 1.1 / 2)),
        ((1.0,), (2.0,), "unknown", None),
        ((1.0, None), (2.0, 3.0), "wrong", None),
    ],
)
def test_the_verdict_follows_the_spread(
    base: tuple[float | None, ...], here: tuple[float, ...], verdict: str, spread: tuple[float, float] | None
) -> None:
    (ratio,) = compare([_row(ms=ms) for ms in base], [_row(ms=ms) for ms in here])
    assert ratio.verdict == verdict
    assert ratio.spread == (None if spread is None else pytest.approx(spread))


def test_one_run_brings_its_quantiles() -> None:
    assert Figure.of([{"median": 2.0, "p10": 1.5, "p90": 4.0}]) == Figure(2.0, 1.5, 4.0)
    assert Figure.of([{"p50": 2.0, "p90": 4.0, "p99": 5.0}]) == Figure(2.0, None, 4.0)
    assert Figure.of([3.0, 1.0]) == Figure(2.0, 1.0, 3.0)


def test_identity_leaves_out_figures_and_provenance() -> None:
    assert identity(_row()) == identity(_row(ms=9.0, revision="bbb", torch="2.13", engine="qinfer"))
    for field, other in (("m", 2), ("n", 65), ("format", "int3-g128"), ("engine", "transformers"), ("bench", "model")):
        assert identity(_row()) != identity(_row(**{field: other})), field


def test_different_hardware_and_shapes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = _write(tmp_path / "1", _row()), _write(tmp_path / "2", _row(gpu="NVIDIA H100"))
    assert bench(["compare", one, other]) == 1
    assert "NVIDIA H100 and NVIDIA H200" in capsys.readouterr().err
    wider = _write(tmp_path / "3", _row(n=128))
    assert bench(["compare", one, wider]) == 1
    assert "differ in n 128, n 64" in capsys.readouterr().err


def test_two_files_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = _write(tmp_path / "1", _row(), _row(m=4))
    other = _write(tmp_path / "2", _row(ms=0.01, revision="bbb"), _row(m=16, revision="bbb"))
    out = tmp_path / "ratios.json"
    assert bench(["compare", "--json", str(out), one, other]) == 0
    told = capsys.readouterr().out
    assert "revision: base aaa, here bbb" in told
    assert "not compared, only in base: matmul int4-g128 n=64 k=32 m=4" in told
    assert "not compared, only in here: matmul int4-g128 n=64 k=32 m=16" in told
    (row,) = read(out)
    assert (row["of"], row["measure"], row["ratio"], row["verdict"]) == ("op", "ms", 2.0, "unknown")
    assert (row["base_revision"], row["revision"]) == ("aaa", "bbb")


def test_a_wrong_result_is_told_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["compare", _write(tmp_path / "1", _row()), _write(tmp_path / "2", _row(ms=None))]) == 1
    assert "wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["one.json"], "two files"),
        (["--base", "HEAD"], "op ..., model ... or serve ..."),
        (["--base", "HEAD", "tune"], "op ..., model ... or serve ..."),
        (["--base", "HEAD", "model", "--json", "x"], "put --json in front"),
        (["--base", "HEAD", "--rounds", "0", "op"], "--rounds must be at least 1"),
        (["--base-path", "/nowhere", "op"], "no qinfer/bench in it"),
        (["/nowhere.json", "/nowhere.json"], "/nowhere.json"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["compare", *arguments]) == 1
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[1]\n", "{}\n", "{\n"])
def test_what_is_no_result_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(ResultError):
        read(tmp_path / "x")


_FAKE = """
import json, sys
def main():
    arguments = sys.argv[1:]
    if "fail" in arguments:
        print("no such op", file=sys.stderr)
        return 1
    with open(arguments[arguments.index("--json") + 1], "a") as file:
        file.write(json.dumps({"bench": "op", "gpu": "x", "device": "cpu", "ms": SPEED}) + "\\n")
    with open(arguments[1], "a") as log:
        log.write("SPEED ")
    return 0
"""


def _fake_tree(folder: Path, speed: str) -> Path:
    package = folder / "qinfer" / "bench"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(_FAKE.replace("SPEED", speed))
    return folder


def test_two_trees_run_in_turns(tmp_path: Path) -> None:
    first, second = _fake_tree(tmp_path / "a", "4.0"), _fake_tree(tmp_path / "b", "2.0")
    base, here = trees.run_in_turns((first, second), ["op", str(tmp_path / "log")], rounds=2)
    assert (tmp_path / "log").read_text() == "4.0 2.0 4.0 2.0 "
    (ratio,) = compare(base, here)
    assert (ratio.value, len(next(iter(grouped(here).values())))) == (2.0, 2)
    with pytest.raises(ResultError, match="no such op"):
        trees.run_in_turns((first,), ["op", "fail"], rounds=1)


def test_a_revision_is_checked_out_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=x", "-c", "user.email=x@x")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("old")
    git("add", "file")
    git("commit", "-m", "one")
    (tmp_path / "file").write_text("new")
    monkeypatch.setattr(trees, "here", lambda: tmp_path)
    with trees.base_tree("HEAD", None) as tree:
        assert (tree / "file").read_text() == "old"
    assert not tree.exists()
    with pytest.raises(trees.UnsupportedError, match="no-such-revision"), trees.base_tree("no-such-revision", None):
        pass


def test_a_copy_without_git_is_told_what_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "here", lambda: tmp_path)
    with pytest.raises(trees.UnsupportedError, match="--base-path"), trees.base_tree("HEAD", None):
        pass
