"""What the package is made of, read from its source: `python -m tests.house` prints the table of lines."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Floor:
    """A part of the package: its modules, the parts and the distributions it may import."""

    modules: tuple[str, ...]
    parts: frozenset[str]
    packages: frozenset[str]


def _floor(modules: str, parts: str, packages: str) -> Floor:
    return Floor(tuple(modules.split()), frozenset(parts.split()), frozenset(packages.split()))


# Imports go down only. The longest matching prefix decides to which part a module belongs.
FLOORS: dict[str, Floor] = {
    "base": _floor("errors env", "base", ""),
    "shares": _floor("parallel.split parallel.plan parallel.link engine.pages", "base shares", ""),
    "kernels": _floor("kernels", "base kernels", "torch triton"),
    "files": _floor("checkpoint staging tensor_file", "base shares files", "torch safetensors"),
    "ranks": _floor("parallel.comm parallel.peers parallel.spawn", "base shares kernels ranks", "torch"),
    "text": _floor("tokenizer chat_template", "base files text", "tokenizers jinja2"),
    "memory": _floor("memory", "base memory", "torch"),
    "quant": _floor("quant", "base shares kernels files quant", "torch"),
    "cache": _floor("cache", "base shares kernels files cache", "torch"),
    "models": _floor(
        "models parallel.context", "base shares kernels files ranks text memory quant cache models", "torch numpy"
    ),
    "engine": _floor("engine", "base shares kernels files ranks text memory quant cache models engine", "torch numpy"),
    "assets": _floor("assets", "base assets", ""),
    "top": _floor(
        "programs bench compat util __main__ __init__",
        "base shares kernels files ranks text memory quant cache models engine assets top",
        "torch triton numpy rich markdown_it safetensors tokenizers jinja2",
    ),
}
# Packages that only hold modules of other parts: their __init__ may import nothing.
SHELVES = ("parallel",)


@dataclass(frozen=True)
class Module:
    """One source file."""

    path: Path

    @property
    def name(self) -> str:
        """Dotted name; a package's is that of its folder."""
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def source(self) -> str:
        return self.path.read_text()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def lines(self) -> int:
        return len(self.source.splitlines())

    @cached_property
    def functions(self) -> list[Function]:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        return [Function(self, node) for node in ast.walk(self.tree) if isinstance(node, kinds)]

    def imports(self) -> Iterator[str]:
        """Yield the dotted name of everything imported anywhere in the file, TYPE_CHECKING blocks included."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name}: relative import in line {node.lineno}"
                assert node.module is not None
                # `from package import module` imports the module; whether a name is one shows in the tree of files.
                for alias in node.names:
                    inner = ROOT.joinpath(*node.module.split("."), alias.name)
                    is_module = inner.with_suffix(".py").exists() or (inner / "__init__.py").exists()
                    yield f"{node.module}.{alias.name}" if is_module else node.module


@dataclass(frozen=True)
class Function:
    """One function or method."""

    module: Module
    node: ast.FunctionDef | ast.AsyncFunctionDef

    @property
    def where(self) -> str:
        return f"{self.module.path.relative_to(ROOT)}:{self.node.lineno} {self.node.name}"

    @property
    def lines(self) -> int:
        """Lines of code: the docstring, which has to be there, is not counted."""
        assert self.node.end_lineno is not None
        total = self.node.end_lineno - self.node.lineno + 1
        first = self.node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            assert first.end_lineno is not None
            total -= first.end_lineno - first.lineno + 1
        return total

    @property
    def decorators(self) -> list[str]:
        """Source of the decorators without their arguments."""
        return [ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in self.node.decorator_list]

    @property
    def is_kernel(self) -> bool:
        return bool({"triton.jit", "gluon.jit"} & set(self.decorators))

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters, without self and cls."""
        a = self.node.args
        names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
        return [name for name in names if name not in ("self", "cls")]


def modules(folder: str = "qinfer") -> list[Module]:
    """Return every source file below a folder of the repository."""
    return [Module(path) for path in sorted((ROOT / folder).rglob("*.py"))]


def part_of(name: str) -> str | None:
    """Return the part to which a dotted module name of the package belongs; None if the table forgot it."""
    inner = name.removeprefix("qinfer").removeprefix(".") or "__init__"
    fits = [
        (len(prefix), part)
        for part, floor in FLOORS.items()
        for prefix in floor.modules
        if inner == prefix or inner.startswith(f"{prefix}.")
    ]
    return max(fits)[1] if fits else None


def table() -> str:
    """Return the lines of code of every file and folder of the package, largest folder first."""
    folders: dict[str, list[Module]] = {}
    for module in modules():
        folders.setdefault(str(module.path.parent.relative_to(ROOT)), []).append(module)
    lines = []
    for folder, files in sorted(folders.items(), key=lambda item: -sum(m.lines for m in item[1])):
        lines.append(f"{sum(m.lines for m in files):6}  {folder}/")
        lines += [f"{m.lines:6}    {m.path.name}" for m in sorted(files, key=lambda m: -m.lines)]
    lines.append(f"{sum(m.lines for m in modules()):6}  in {len(modules())} files")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
