"""docs/formats.md claims nothing that no test shows."""

from __future__ import annotations

import re

import pytest

from qinfer.kernels.operand import FIELDS
from qinfer.quant import FORMATS, awq, exl2, gptq
from tests.house import ROOT

PAGE = (ROOT / "docs" / "formats.md").read_text()
ROWS = {
    cells[1].strip().strip("`"): [cell.strip() for cell in cells[2:-1]]
    for cells in (
        line.split("|") for line in PAGE.splitlines() if line.startswith("| `") and "quant_method" not in line
    )
}
BITS = {
    "dense": [16, 32],
    "gptq": gptq.BITS,
    "awq": [awq.BITS],
    "compressed-tensors": FIELDS,
    "fp8": [8],
    "exl2": exl2.BITS,
}


def test_every_format_has_a_row() -> None:
    assert list(ROWS) == list(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_bits_are_those_of_the_code(name: str) -> None:
    assert [int(bits) for bits in ROWS[name][0].split(",")] == sorted(BITS[name])


@pytest.mark.parametrize("name", FORMATS)
def test_every_row_names_a_test(name: str) -> None:
    assert re.search(r"`tests/\S+\.py::test_\w+`", ROWS[name][3])


@pytest.mark.parametrize("reference", sorted(set(re.findall(r"`(tests/[^`]+|qinfer/[^`]+)`", PAGE))))
def test_what_is_named_exists(reference: str) -> None:
    path, _, function = reference.partition("::")
    text = (ROOT / path).read_text()
    assert not function or re.search(rf"^def {function}\(", text, re.MULTILINE)
