"""Tuning inside the step: a search against a clock that is made up, and the table that comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch

from qinfer.bench import synthetic, tune
from qinfer.bench.__main__ import main as bench
from qinfer.bench.echo import synthetic_share
from qinfer.bench.measure import Times
from qinfer.bench.search import Change, candidates, search, wgmma_candidates
from qinfer.bench.synthetic import synthetic_model
from qinfer.kernels import tiles
from qinfer.kernels.tiles import Product, SegmentShape, Tile, lookup, trial

FIRST, SECOND = Product(4, 128, 1, 512, 256), Product(4, 128, 1, 256, 256)
START, GOOD, BETTER, BROKEN = (Tile(16, 64, split, 4, 3) for split in (1, 2, 4, 8))


def _clock(
    gains: Callable[[Mapping[Product, Tile]], float],
) -> tuple[Callable[[Mapping[Product, Tile]], float], list[int]]:
    """Return a step of 1 ms less what tiles gain, with noise that changes from call to call, and its calls."""
    calls = [0]

    def clock(chosen: Mapping[Product, Tile]) -> float:
        calls[0] += 1
        return 1.0 - gains(chosen) + (0.0003 if calls[0] % 2 else 0.0)

    return clock, calls


def test_the_best_tile_of_every_matrix_is_found() -> None:
    worth = {(FIRST, GOOD): 0.02, (FIRST, BETTER): 0.05, (SECOND, GOOD): 0.03, (SECOND, BETTER): -0.1}
    clock, _ = _clock(lambda chosen: sum(worth.get(item, 0.0) for item in chosen.items()))
    found = search([FIRST, SECOND], lambda key: [START, GOOD, BETTER], clock)
    assert {key: change.tile for key, change in found.items()} == {FIRST: BETTER, SECOND: GOOD}
    assert found[FIRST].before == pytest.approx(1.0, abs=1e-3)
    assert found[FIRST].after == found[SECOND].before == pytest.approx(0.95, abs=1e-3)
    assert found[SECOND].after == pytest.approx(0.92, abs=1e-3)


def test_what_noise_could_explain_is_not_taken() -> None:
    for gain in (0.0, 0.001):
        clock, _ = _clock(lambda chosen, gain=gain: gain * len(chosen))  # type: ignore[misc]
        assert search([FIRST], lambda key: [GOOD, BETTER], clock) == {}


def test_one_lucky_run_is_not_enough() -> None:
    luck = iter([0.5])
    assert search([FIRST], lambda key: [GOOD], lambda chosen: 1.0 - (next(luck, 0.0) if chosen else 0.0)) == {}


def test_tiles_that_fail_are_passed_over() -> None:
    clock, _ = _clock(lambda chosen: -inf if BROKEN in chosen.values() else 0.1 * len(chosen))
    found = search([FIRST], lambda key: [BROKEN, GOOD], clock)
    assert found[FIRST].tile == GOOD
    assert search([FIRST], lambda key: [BROKEN], clock) == {}


def test_a_tile_that_pays_only_beside_another_is_found_in_the_second_round() -> None:
    def gains(chosen: Mapping[Product, Tile]) -> float:
        both = chosen.get(FIRST) == BETTER and chosen.get(SECOND) == GOOD
        return 0.1 if both else 0.05 if chosen.get(SECOND) == GOOD else -0.1 if FIRST in chosen else 0.0

    for rounds, expected in ((1, {SECOND: GOOD}), (2, {SECOND: GOOD, FIRST: BETTER})):
        found = search([FIRST, SECOND], lambda key: [GOOD, BETTER], _clock(gains)[0], rounds=rounds)
        assert {key: change.tile for key, change in found.items()} == expected


def test_the_search_ends_when_its_time_is_over() -> None:
    clock, calls = _clock(lambda chosen: 0.0)
    assert search([FIRST, SECOND], lambda key: [GOOD, BETTER], clock, is_over=lambda: True) == {}
    assert calls[0] == 0


def test_candidates_fit_the_matrix() -> None:
    for m, n, k in ((1, 6144, 4096), (64, 4096, 512)):
        found = list(candidates(m, n, k, 132))
        assert len(found) == len(set(found)) > 5
        assert all(tile.split_k == 1 or k // 128 // tile.split_k >= 2 for tile in found)
        assert {tile.block_m for tile in found} == {max(8, m)}
    wide = list(candidates(256, 4096, 4096, 132))
    assert {(tile.block_m, tile.scaled) for tile in wide} == {(64, False), (128, True)}
    assert all(2 * 32 * tile.split_k <= 16 * 132 for tile in wide)


def test_candidates_for_hopper_are_those_of_its_kernel() -> None:
    for m, rows in ((1, 8), (8, 8), (9, 16), (64, 64), (65, 128), (256, 128)):
        found = list(wgmma_candidates(m, 28672, 4096, 132))
        assert len(set(found)) == len(found)
        assert {tile.block_m for tile in found} == {rows}
        assert all(tile.wgmma and not tile.scaled and tile.block_n >= 16 * tile.warps for tile in found)
        assert {tile.late for tile in found} == {False, True}


def test_candidates_fill_whole_rounds_of_the_gpu() -> None:
    """20 programs of 128 columns: 26 parts are 520 programs for 528 places."""
    splits = {tile.split_k for tile in candidates(1, 2560, 8192, 132) if tile.block_n == 128}
    assert {6, 13, 19, 26} <= splits
    assert max(splits) <= 32


def test_the_share_of_a_rank_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of everything, and a head for a quarter of the vocabulary whose logits are joined."""
    config = replace(synthetic._llama(2048, 256, 3, (8, 4, 64), 2048), max_positions=256)
    monkeypatch.setitem(synthetic.PRESETS, "tiny", config)
    step = tune.Step(synthetic_share("tiny", "int4-g128", torch.device("cpu"), num_layers=2, ranks=4), 1, 8)
    qkv, out, gate_up, down, head = (256, 256), (256, 128), (1024, 256), (256, 512), (512, 256)
    assert [(key.n, key.k) for key in step.keys] == [gate_up, down, head, qkv, out]
    assert step.model.comm.size == 4
    assert step.run().shape == (1, 2048)
    whole = synthetic_share("tiny", "int4-g128", torch.device("cpu"), num_layers=2, ranks=1)
    assert whole.plan is None


def test_a_trial_is_in_front_of_the_table_and_leaves_no_trace() -> None:
    arguments = ("sm_none", 132, 3, 512, (SegmentShape(256, 4, 128),), False)
    rule = lookup(*arguments)
    with trial("sm_none", {Product(4, 128, 4, 512, 256): BROKEN}):
        assert lookup(*arguments) == BROKEN
        assert lookup("sm_none", 132, 1, 512, (SegmentShape(256, 4, 128),), False) == rule
    assert lookup(*arguments) == rule
    with pytest.raises(ZeroDivisionError), trial("sm_none", {Product(4, 128, 4, 512, 256): BROKEN}):
        _ = 1 / 0
    assert lookup(*arguments) == rule


def test_rows_replace_those_of_the_same_shape_and_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tables" / "sm_test.json"
    about = {"preset": "x", "gpu": "y", "revision": "z"}
    tune.write(path, [tune._row(key, Change(GOOD, 1.0, 0.9), about) for key in (FIRST, SECOND)])
    path.write_text(path.read_text().replace("{", '{"step": "a note",', 1))
    tune.write(path, [tune._row(SECOND, Change(BETTER, 0.9, 0.85), about)])
    assert json.loads(path.read_text())["step"] == "a note"
    rows = json.loads(path.read_text())["rows"]
    assert [(row["n"], row["split_k"], row["step_us_before"]) for row in rows] == [(256, 4, 900.0), (512, 2, 1000.0)]
    assert all(row["gpu"] == "y" and row["revision"] == "z" for row in rows)
    monkeypatch.setattr(tiles, "TABLES", path.parent)
    assert lookup("sm_test", 132, 1, 512, (SegmentShape(256, 4, 128),), False) == GOOD
    assert lookup("sm_test", 132, 1, 256, (SegmentShape(256, 4, 128),), False) == BETTER
    lookup.cache_clear()
    tiles._table.cache_clear()


def test_a_step_is_timed_with_its_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk of a real model on a CPU: only the clock and the kernel are stand-ins."""
    config = replace(synthetic._llama(512, 256, 3, (4, 2, 64), 512), max_positions=256)
    monkeypatch.setitem(synthetic.PRESETS, "tiny", config)
    step = tune.Step(synthetic_model("tiny", "int4-g128", torch.device("cpu"), num_layers=1), 2, 8)
    qkv, out, gate_up, down, head = (512, 256), (256, 256), (1024, 256), (256, 512), (512, 256)
    assert {(key.n, key.k) for key in step.keys} == {qkv, out, gate_up, down, head}
    assert (step.keys[0][3:], {key[:3] for key in step.keys}) == (gate_up, {(4, 128, 4)})
    assert step.run().shape == (2, 512)

    def launch(x: torch.Tensor, operand: Any, *, out_dtype: torch.dtype, tile: Tile) -> torch.Tensor:
        return tune.matmul.reference(x, operand, out_dtype=out_dtype) * (1.1 if tile == BROKEN else 1)

    def time_graph(functions: Any, device: torch.device, *, repeats: int) -> Times:
        return Times((float(lookup("cpu", 8, 2, gate_up[0], (SegmentShape(gate_up[1], 4, 128),), False).split_k),))

    monkeypatch.setattr(tune.matmul, "launch", launch)
    monkeypatch.setattr(tune, "time_graph", time_graph)
    key = step.keys[0]
    assert (step.clock({key: BETTER}), step.clock({key: GOOD}), step.clock({key: BROKEN})) == (4.0, 2.0, inf)
    assert not any(tile.wgmma for tile in step.choices(key))
    monkeypatch.setattr(tune, "arch", lambda _: "sm_90")
    for bits, group_size, is_wgmma in ((4, 128, True), (4, 32, True), (4, 16, False), (2, 128, False)):
        choices = step.choices(key._replace(bits=bits, group_size=group_size))
        assert {tile.wgmma for tile in choices} == {is_wgmma}
    for group_size, kinds in ((128, {True, False}), (16, {False})):
        many = step.choices(key._replace(m_max=128, group_size=group_size))
        assert {tile.wgmma for tile in many} == kinds, "many rows try both kernels, where both take the matrix"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--rows", "513"], "--rows must be from 1 to 512"),
        (["--ranks", "0"], "--ranks at least 1"),
        (["--weights", "exl2-4.0"], "--weights exl2-4.0 mixes several"),
    ],
)
def test_mistakes_are_explained(options: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["tune", *options]) == 1
    assert problem in capsys.readouterr().err
