"""Every kernel compiles for every target, without spills and within the shared memory of a block; no GPU is needed."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from qinfer.bench.cases import CASES
from qinfer.env import settings
from qinfer.kernels import attention_wgmma
from qinfer.kernels.attention_blocks import Places, Wanted
from qinfer.kernels.attention_decoded import decode_prompts
from qinfer.kernels.kv_decode import _room, kv_decode
from qinfer.kernels.matmul import segments_of
from qinfer.kernels.operand import FIELDS, MIN_STEP
from qinfer.kernels.tiles import TABLES, Tile, has_wgmma_tile, shapes_of, takes_gate
from tests.compile.report import Report, compile_for
from tests.compile.targets import KIB, TARGETS, followers
from tests.compile.tiles import gated_cases, odd_cases, prompt_cases, tile_cases

pytestmark = [pytest.mark.compile, pytest.mark.slow]


@pytest.mark.skipif(settings().interpret, reason="interpreted kernels cannot be compiled")
@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.ptx_of is None])
def test_kernels_compile(name: str) -> None:
    report = compile_for(TARGETS[name])
    offenders = report.offenders()
    assert not offenders, "\n".join(offenders)
    assert {row["target"] for row in report.kernels} == {name, *(other.name for other in followers(name))}
    idle = {case.op for case in CASES} - {op for op, launches in report.launches.items() if launches}
    assert not idle, f"no case of these ops launches a kernel: {sorted(idle)}"


def test_every_tile_of_a_table_is_a_case() -> None:
    cases = tile_cases(TARGETS["sm_90"])
    asked = {case.make(torch.device("cpu"), "empty")[1]["tile"] for case in cases}
    for row in json.loads((TABLES / "sm_90.json").read_text())["rows"]:
        tile = Tile(**{field.name: row[field.name] for field in fields(Tile) if field.name in row})
        assert replace(tile, split_k=min(tile.split_k, 2)) in asked
    assert len({case.name for case in cases}) == len(cases)
    assert tile_cases(TARGETS["sm_80"]) == []


def test_odd_sizes_are_cases_of_the_kernel_for_hopper() -> None:
    cases = odd_cases(TARGETS["sm_90"])
    assert len({case.name for case in cases}) == len(cases) == 2 * (len(FIELDS) + 1)
    for case in cases:
        (x, operand), _ = case.make(torch.device("cpu"), "empty")
        assert has_wgmma_tile("sm_90", x.shape[0], operand.out_features, shapes_of(segments_of(operand)))
        assert all(segment.in_features % MIN_STEP for segment in segments_of(operand))
    assert odd_cases(TARGETS["sm_80"]) == []


def test_gated_products_of_all_widths_are_cases_of_the_kernel_for_hopper() -> None:
    cases = gated_cases(TARGETS["sm_90"])
    assert len({case.name for case in cases}) == len(cases) == 4 * (len(FIELDS) + 2) - 3
    for case in cases:
        (_, operand), options = case.make(torch.device("cpu"), "empty")
        widths = tuple(segment.bits for segment in segments_of(operand))
        assert takes_gate(options["tile"], operand.out_features, widths)
    assert gated_cases(TARGETS["sm_80"]) == []


def test_prompts_of_all_kinds_are_cases_of_the_kernel_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_wgmma, "arch", lambda _: "sm_90")
    monkeypatch.setattr(
        kv_decode, "launch", lambda *args, dtype, max_pages, **_: _room(args[0], args[3], dtype, max_pages)
    )
    cases = prompt_cases(TARGETS["sm_90"])
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        (q, keys, values, *places), options = case.make(torch.device("cpu"), "empty")
        wanted = Wanted(**options, splits=None, invariant=False)
        decoded = decode_prompts(q, keys, values, Places(*places), wanted)
        if keys.codec.scheme == "plain":
            assert attention_wgmma.takes_prompt(q, keys, values, wanted)
        else:
            assert decoded is not None
            assert decoded.may_be_full
    assert prompt_cases(TARGETS["sm_80"]) == []


def _report(target: str, **changes: Any) -> Report:
    row = {
        "kernel": "k",
        "op": "o",
        "case": "c",
        "target": target,
        "registers": 255,
        "spills": 0,
        "shared": 0,
        "warps": 4,
    }
    return Report([row | changes], {"o": 1}, [])


@pytest.mark.parametrize(
    ("target", "changes", "complaint"),
    [
        ("sm_90", {"spills": 8}, "8 bytes spilled"),
        ("sm_86", {"shared": 99 * KIB + 1}, "shared memory"),
        ("gfx942", {"shared": 64 * KIB + 1}, "shared memory"),
        ("sm_100", {"registers": 4}, "does nothing"),
        ("sm_90", {"unwritten": ["UIADD3 UR26, UP0, UR26, 0x40, URZ"]}, "nothing wrote: UIADD3 UR26"),
        ("sm_90", {"disturbed": ["LOP3.LUT R96, R10"]}, "may not have ended: LOP3.LUT R96"),
        ("sm_90", {"serialized": True, "kernel": "_wgmma_kernel"}, "waits for every product"),
    ],
)
def test_offenders_are_named(target: str, changes: dict[str, Any], complaint: str) -> None:
    assert _report(target).offenders() == []
    (offender,) = _report(target, **changes).offenders()
    assert complaint in offender
