"""What keeps the house standing: floors, budgets, completeness, and no device at import."""

from __future__ import annotations

import ast
import inspect
import re
import statistics
import subprocess
import sys

import pytest
import torch

from qinfer.bench.case import Case
from qinfer.bench.cases import CASES
from qinfer.bench.shapes import TINY
from qinfer.kernels.device import OPS
from tests.house import FLOORS, ROOT, SHELVES, Function, Module, modules, part_of

MAX_FILE, MAX_MEDIAN, MAX_FUNCTION, MAX_KERNEL, MAX_PARAMETERS = 450, 160, 60, 120, 8
BANNED_NAMES = {"utils", "helpers", "common", "misc"}
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"torch.load", "numpy.load", "np.load", "eval", "exec"}

PACKAGE = modules()
BY_NAME = pytest.mark.parametrize("module", PACKAGE, ids=lambda module: module.name)


@BY_NAME
def test_floors(module: Module) -> None:
    if module.name.removeprefix("qinfer.") in SHELVES:
        assert not list(module.imports()), f"{module.name} holds modules of several floors and may import nothing"
        return
    part = part_of(module.name)
    assert part is not None, f"{module.name} belongs to no floor; add it to FLOORS in tests/house.py"
    floor = FLOORS[part]
    for name in module.imports():
        package = name.split(".")[0]
        if package == "qinfer":
            target = part_of(name)
            assert target in floor.parts, f"{module.name} ({part}) imports {name} ({target})"
        else:
            allowed = package in sys.stdlib_module_names or package in floor.packages
            assert allowed, f"{module.name} ({part}) imports {name}; allowed: {sorted(floor.packages)}"


def test_floors_go_down() -> None:
    parts = list(FLOORS)
    for part, floor in FLOORS.items():
        above = {other for other in floor.parts if parts.index(other) > parts.index(part)}
        assert not above, f"{part} may not import what stands above it: {sorted(above)}"
        assert part == "top" or not {"top", "assets"} & floor.parts - {part}


@pytest.mark.parametrize("module", [*PACKAGE, *modules("tests")], ids=lambda module: module.name)
def test_file_and_function_lengths(module: Module) -> None:
    assert module.lines <= MAX_FILE, f"{module.path}: {module.lines} lines, {MAX_FILE} allowed"
    for function in module.functions:
        limit = MAX_KERNEL if function.is_kernel else MAX_FUNCTION
        assert function.lines <= limit, f"{function.where}: {function.lines} lines of code, {limit} allowed"


def test_median_file_length() -> None:
    lines = [module.lines for module in PACKAGE if module.path.name != "__init__.py"]
    assert statistics.median(lines) <= MAX_MEDIAN


def _is_part_of_an_op(function: Function) -> bool:
    """Say whether this is a launcher, its reference or its check: they take what the mathematics takes."""
    name = function.node.name.removeprefix("_check_").removesuffix("_reference")
    return function.module.name.startswith("qinfer.kernels.") and name in OPS


@BY_NAME
def test_parameter_counts(module: Module) -> None:
    # The functions of qinfer.compat take what the originals took.
    functions = () if module.name.startswith("qinfer.compat.") else module.functions
    for function in functions:
        if not function.is_kernel and not _is_part_of_an_op(function):
            count = len(function.parameters)
            assert count <= MAX_PARAMETERS, f"{function.where}: {count} parameters, {MAX_PARAMETERS} allowed"


def test_no_module_for_leftovers() -> None:
    leftovers = [module.name for module in PACKAGE if BANNED_NAMES & set(module.name.split("."))]
    assert not leftovers


@BY_NAME
def test_nothing_executes_what_it_reads(module: Module) -> None:
    used = {name.split(".")[0] for name in module.imports()}
    used |= {ast.unparse(node.func) for node in ast.walk(module.tree) if isinstance(node, ast.Call)}
    assert not used & (UNSAFE_MODULES | UNSAFE_CALLS)


_IMPORT_EVERYTHING = """
import importlib, sys, types
import torch, triton
from triton.runtime.driver import driver

class NoDriver:
    def __getattribute__(self, name):
        raise AssertionError(f"Triton's driver was asked for {name} at import")

def refuse(name):
    def call(*args, **kwargs):
        raise AssertionError(f"torch.cuda.{name} was called at import")
    return call

driver.set_active(NoDriver())
was_initialized = torch.cuda.is_initialized
for name, value in list(vars(torch.cuda).items()):
    if isinstance(value, types.FunctionType):
        setattr(torch.cuda, name, refuse(name))
for name in sys.argv[1:]:
    importlib.import_module(name)
assert not was_initialized()
"""


def test_no_device_at_import() -> None:
    names = [module.name for module in PACKAGE]
    done = subprocess.run([sys.executable, "-c", _IMPORT_EVERYTHING, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_device_at_import_is_noticed() -> None:
    script = _IMPORT_EVERYTHING.replace("importlib.import_module(name)", "torch.cuda.is_available()")
    done = subprocess.run([sys.executable, "-c", script, "one"], cwd=ROOT, capture_output=True, text=True)
    assert "torch.cuda.is_available was called at import" in done.stderr


@pytest.mark.parametrize("name", OPS)
def test_op_is_complete(name: str) -> None:
    op = OPS[name]
    launch, reference, check = (inspect.signature(body) for body in (op.launch, op.reference, op.check))
    assert reference == launch, f"{name}: the reference takes {reference}, the launcher {launch}"
    assert check.parameters == launch.parameters, f"{name}: the check takes {check}, the launcher {launch}"
    assert any(case.op == name for case in CASES), f"{name}: no case in qinfer/bench/cases.py"
    tests = [path.read_text() for path in (ROOT / "tests" / "kernels").glob("test_*.py")]
    assert any(re.search(rf"\b{name}\b", text) for text in tests), f"{name}: no file in tests/kernels mentions it"


def test_cases_belong_to_ops() -> None:
    assert {case.op for case in CASES} == set(OPS)
    names = [(case.op, case.name) for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", [case for case in CASES if TINY.name in case.name], ids=lambda c: f"{c.op} {c.name}")
def test_cases_are_valid(case: Case) -> None:
    args, kwargs = case.make(torch.device("cpu"), "random")
    OPS[case.op].check(*args, **kwargs)
