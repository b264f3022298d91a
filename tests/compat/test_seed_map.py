"""docs/seed-map.md keeps its promises: every name imports, has a docstring, and is called by the test that it names."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "seed-map.md"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    module: str
    name: str
    foundations: tuple[str, ...]
    file: str
    test: str


def rows() -> Iterator[Row]:
    """Yield the rows; a heading names the module that holds the names of the tables below it."""
    module = ""
    for line in TABLE.read_text().splitlines():
        if heading := re.fullmatch(r"## .*\(`([\w.]+)`\)", line):
            module = heading[1]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if module and line.startswith("| `"):
            name, foundations, test = cells
            file, function = test.strip("`").split("::")
            yield Row(module, name.strip("`"), tuple(re.findall(r"`(qinfer[\w.]+)`", foundations)), file, function)


ROWS = list(rows())


def found(path: str) -> object:
    """Import what a dotted path names."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def names_used(file: Path, function: str) -> set[str]:
    """Names that a function of a test file calls or reads, also through other functions of the file."""
    tree = ast.parse(file.read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    used: set[str] = set()
    waiting, seen = [function], set()
    while waiting:
        if (current := waiting.pop()) in seen:
            continue
        seen.add(current)
        for node in ast.walk(functions[current]):
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.Name) and node.id in functions:
                waiting.append(node.id)
    return used


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row(row: Row) -> None:
    function = found(f"{row.module}.{row.name}")
    assert callable(function)
    assert function.__name__ == row.name
    assert (inspect.getdoc(function) or "").strip()
    assert row.name in names_used(ROOT / row.file, row.test), f"{row.test} does not call {row.name}"
    for foundation in row.foundations:
        found(foundation)


@pytest.mark.parametrize("module", ["qinfer.compat.exllamav2_ext", "qinfer.compat.exllama_kernels"])
def test_no_name_is_left_out(module: str) -> None:
    assert [row.name for row in ROWS if row.module == module] == import_module(module).__all__


def test_an_uncalled_name_is_noticed() -> None:
    file = ROOT / "tests" / "compat" / "test_exllamav2_packing.py"
    assert "pack_columns" not in names_used(file, "test_pack_rows_4")
