"""`qinfer doctor MODEL`: what a folder contains, what of it is honoured, and what would be refused.

Nothing is decided here. The folder goes through the code that loads it, with three differences: matrices are stood in
for by tensors of their shape and dtype without values, a refusal is written down instead of ending the visit, and the
settings remember which of their fields somebody asked for. Vectors (norms, biases, group and order lists) are read, so
what is wrong with them shows; values of matrices are not looked at.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qinfer.cache.formats import KV_FORMATS
from qinfer.checkpoint import Checkpoint
from qinfer.errors import QinferError
from qinfer.kernels.operand import DenseOperand
from qinfer.models.architectures import name_map, read_config
from qinfer.models.config import ModelConfig
from qinfer.models.decoder import Decoder, root
from qinfer.models.layers import Linear
from qinfer.models.model import load_tokenizer, resolve_dtype
from qinfer.models.parameters import CheckpointParameters
from qinfer.parallel.comm import Alone
from qinfer.quant import FORMATS, DenseWeight, Weight
from qinfer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from argparse import _SubParsersAction

CPU, META = torch.device("cpu"), torch.device("meta")
SMALL_BYTES = 64 << 10  # matrices up to this size are read too: some formats keep lists in them
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SHOWN = 20  # findings of a kind that are listed
FACTS = (  # in the order in which they are shown
    *("model", "parameters", "attention", "context", "traits", "dtype", "end of text", "KV cache"),
    *("files", "quantization", "tokenizer"),
)


def add_parser(programs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command line of this program."""
    parser = programs.add_parser(
        "doctor",
        help="say what a checkpoint contains and whether it can be loaded",
        description="Say what a checkpoint contains, what of it is honoured and what would be refused. "
        "Weights are not loaded. The exit status is 0 if the checkpoint can be loaded and 1 if not.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Examine, print, and return 0 if the model can be loaded."""
    report = examine(options.model)
    console = Console(highlight=False, markup=False)
    show(report, console)
    return 1 if report.refused else 0


@dataclass(frozen=True)
class Kind:
    """What modules that are stored alike have in common."""

    format: str  # a key of FORMATS
    bits: str
    group_size: str
    act_order: bool


@dataclass
class Report:
    """What there is to say about a folder."""

    path: Path
    facts: list[tuple[str, str]] = field(default_factory=list)
    kinds: Counter[Kind] = field(default_factory=Counter)  # number of modules
    nbytes: Counter[Kind] = field(default_factory=Counter)  # bytes of these modules
    num_weights: Counter[Kind] = field(default_factory=Counter)  # logical weights of these modules
    unused: list[str] = field(default_factory=list)  # what is there and has no effect
    refused: list[str] = field(default_factory=list)  # why the folder cannot be loaded
    warnings: list[str] = field(default_factory=list)  # what will not work although the folder can be loaded

    def refuse(self, problem: Exception) -> None:
        """Write down a refusal, once however many modules share it."""
        if str(problem) not in self.refused:
            self.refused.append(str(problem))


def examine(path: str | Path) -> Report:
    """Look through a checkpoint folder without reading its matrices.

    Args:
        path: the folder.

    Raises:
        ValueError: `path` is not a folder.
    """
    report = Report(Path(path))
    try:
        checkpoint = _Headers(path)
    except QinferError as problem:
        report.refuse(problem)
        return report
    _describe_files(report, checkpoint)
    try:
        config = read_config(checkpoint)
    except QinferError as problem:
        report.refuse(problem)
        return report
    _describe_config(report, config)
    tokenizer = None
    try:
        tokenizer = load_tokenizer(checkpoint, config)
    except QinferError as problem:
        report.refuse(problem)
    else:
        _describe_tokenizer(report, tokenizer)
    _examine_weights(report, checkpoint, config)
    _list_unused(report, checkpoint)
    return report


class _Asked(dict[str, Any]):
    """Settings that remember which fields somebody asked for."""

    def __init__(self, values: dict[str, Any], *asked: str) -> None:
        super().__init__(values)
        self.asked = set(asked)

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:  # noqa: ANN401
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    # Whoever copies the settings may ask the copy for anything; without this a copy would not pass __getitem__.
    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def ignored(self) -> list[str]:
        """Return the fields that nobody asked for."""
        return sorted(set(super().__iter__()) - self.asked)


class _Headers(Checkpoint):
    """A checkpoint whose matrices have shapes and dtypes, but no values."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.config = _Asked(self.config, "quantization_config")
        self.generation_config = _Asked(self.generation_config)
        if self.quant_config is not None:
            self.quant_config = _Asked(self.quant_config)
        # Codes of all matrices; zeros that nobody looks at take no memory.
        self._zeros = np.zeros(0, np.uint8)

    def nbytes(self, name: str) -> int:
        """Return the bytes of a tensor."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def read(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """Read a small tensor; for another one return a stand-in, whatever the device."""
        shape, dtype = self.shape(name), self.dtype(name)
        if len(shape) < 2 or self.nbytes(name) <= SMALL_BYTES:
            return super().read(name)
        if dtype.is_floating_point:
            return torch.empty(shape, dtype=dtype, device=META)
        if self._zeros.size < self.nbytes(name):
            self._zeros = np.zeros(self.nbytes(name), np.uint8)
        return torch.from_numpy(self._zeros[: self.nbytes(name)]).view(dtype).view(shape)


class _Visit(CheckpointParameters):
    """Parameters that are asked for as in loading; refusals go to a report and stand-ins to the decoder."""

    def __init__(self, checkpoint: _Headers, report: Report) -> None:
        super().__init__(checkpoint, device=META, dtype=torch.float32)
        self._checkpoint = checkpoint
        self._report = report
        self._refused: list[str] = []
        self.num_parameters = 0

    def linear(self, name: str, shape: tuple[int, int], *, has_bias: bool) -> Linear:
        """Write down how a matrix is stored, or why it is refused."""
        self.num_parameters += shape[0] * shape[1]
        try:
            weight, _ = self.weight(name, shape, has_bias=has_bias)
        except QinferError as problem:
            self._report.refuse(problem)
            self._refused.append(f"{name}.")
        else:
            self._count(name, weight, shape[0] * shape[1])
        # Of no input features, so that it costs nothing to join with its neighbours.
        return Linear(DenseOperand(torch.empty(shape[1], 0)), torch.empty(shape[1]) if has_bias else None)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Check a tensor that is no matrix."""
        self.num_parameters += math.prod(shape)
        try:
            super().tensor(name, shape)
        except QinferError as problem:
            self._report.refuse(problem)
            self._refused.append(name)
        return torch.empty(0)

    def leftovers(self, prefix: str) -> list[str]:
        """Leave out the tensors of what was refused, which was not read to its end."""
        return [name for name in super().leftovers(prefix) if not name.startswith(tuple(self._refused))]

    def _count(self, name: str, weight: Weight, num_weights: int) -> None:
        kind = _kind_of(weight)
        self._report.kinds[kind] += 1
        self._report.num_weights[kind] += num_weights
        stored = [f"{name}.{suffix}" for suffix in weight.tensors() if suffix != "bias"]
        self._report.nbytes[kind] += sum(self._checkpoint.nbytes(tensor) for tensor in stored)


def _kind_of(weight: Weight) -> Kind:
    """Say how a matrix is stored, in the words that most formats have an attribute for."""
    name = next(name for name, form in FORMATS.items() if isinstance(weight, form))
    if isinstance(weight, DenseWeight):
        return Kind(name, str(weight.weight.dtype).removeprefix("torch."), "", act_order=False)
    group_size = getattr(weight, "group_size", None)
    # A list of groups that are not one after the other, or of rows that are not in their place.
    lists = (getattr(weight, name, None) for name in ("g_idx", "weight_g_idx", "q_invperm"))
    index = next((found for found in lists if found is not None), None)
    act_order = index is not None and bool((index[1:] < index[:-1]).any())
    return Kind(
        name,
        str(getattr(weight, "bits", "mixed")),
        "" if group_size is None else "all of K" if group_size == -1 else str(group_size),
        act_order=act_order,
    )


def _describe_files(report: Report, checkpoint: _Headers) -> None:
    """Say what is stored."""
    names = checkpoint.names()
    files = {checkpoint.file(name) for name in names}
    total = sum(file.stat().st_size for file in files)
    report.facts.append(("files", f"{len(files)} safetensors, {_bytes(total)}, {len(names)} tensors"))
    settings = checkpoint.quant_config
    method = "none" if settings is None else str(settings.get("quant_method"))
    report.facts.append(("quantization", method))


def _describe_config(report: Report, config: ModelConfig) -> None:
    """Say what the model is and what of its config is honoured."""
    rope, windows = config.rope, {window for window in config.windows if window is not None}
    heads = f"{config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} for keys and values"
    sizes = f"{config.num_layers} layers, hidden {config.hidden_size}"
    stretched = "" if rope.kind == "default" else f", {rope.kind} rope by {rope.factor:g}"
    window = f", windows of {', '.join(map(str, sorted(windows)))}" if windows else ""
    mlps = f"MLP {config.mlp_size}"
    if (experts := config.experts) is not None:
        mlps = f"{experts.num_experts} experts of {experts.mlp_size}, {experts.per_token} per token"
        num_dense = config.num_layers - sum(experts.layers)
        mlps += f" (in {num_dense} of the layers one MLP of {config.mlp_size})" if num_dense else ""
    traits = {
        "biases on q, k, v": config.qkv_bias,
        "bias on o": config.o_bias,
        "biases in the MLP": config.mlp_bias,
        "norms of q and k": config.qk_norm,
        "head tied to the embedding": config.tied_embeddings,
        "experts weighted to a sum of one": experts is not None and experts.normalized,
    }
    cache = KV_FORMATS["fp16"].nbytes_per_token(config.num_kv_heads, config.head_dim) * config.num_layers
    gpu, cpu = (_short(resolve_dtype(None, torch.device(device), config)) for device in ("cuda", "cpu"))
    report.facts += [
        ("model", f"{config.model_type}, {sizes}, {mlps}, vocabulary {config.vocab_size}"),
        ("attention", heads),
        ("context", f"{config.max_positions} positions, rope theta {rope.theta:g}{stretched}{window}"),
        ("traits", ", ".join(trait for trait, given in traits.items() if given) or "none"),
        ("dtype", f"{config.dtype}; runs in {gpu} on a GPU, in {cpu} on a CPU"),
        ("KV cache", f"{_bytes(cache)} per token in fp16"),
        ("end of text", ", ".join(map(str, sorted(config.eos_ids))) or "no token id of the config"),
    ]


def _describe_tokenizer(report: Report, tokenizer: Tokenizer | None) -> None:
    """Say whether there are a tokenizer and a chat template, and try the template."""
    if tokenizer is None:
        report.facts.append(("tokenizer", "none: there is no tokenizer.json, so the model takes token ids only"))
        return
    has_template = "with" if tokenizer.chat_template is not None else "no"
    report.facts.append(("tokenizer", f"{tokenizer.vocab_size} tokens, {has_template} chat template"))
    if tokenizer.chat_template is not None:
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
        except (QinferError, ValueError) as problem:
            report.warnings.append(f"a message of the user alone: {problem}")


def _examine_weights(report: Report, checkpoint: _Headers, config: ModelConfig) -> None:
    """Let a decoder ask for all its parameters, then see what nobody asked for."""
    visit = _Visit(checkpoint, report)
    # The table of angles is not part of the checkpoint, and may be large.
    Decoder.build(replace(config, max_positions=1), visit, device=CPU, dtype=torch.float32, comm=Alone())
    report.facts.append(("parameters", f"{visit.num_parameters / 1e6:,.1f} million"))
    prefix = root(config)
    for name in visit.leftovers(prefix):
        report.refuse(checkpoint.error(name, "nothing in this architecture uses the tensor"))
    head = name_map(config).head + "."
    outside = [name for name in sorted(checkpoint.names()) if not name.startswith((prefix, head))]
    if outside:
        report.unused.append(f"{len(outside)} tensors outside of {prefix} and {head}: {_some(outside)}")


def _list_unused(report: Report, checkpoint: _Headers) -> None:
    """Name fields and files that have no effect."""
    settings = {
        "config.json": checkpoint.config,
        "quantization_config (the tensors decide)": checkpoint.quant_config,
        "generation_config.json": checkpoint.generation_config,
    }
    for name, values in settings.items():
        if isinstance(values, _Asked) and (ignored := values.ignored()):
            report.unused.append(f"{name}: {', '.join(ignored)}")
    used = {checkpoint.file(name).name for name in checkpoint.names()}
    weights = {path.name for path in report.path.iterdir() if path.suffix in WEIGHT_SUFFIXES}
    if weights - used:
        report.unused.append(f"files: {_some(sorted(weights - used))}")


def show(report: Report, console: Console) -> None:
    """Print a report: facts, a table of the stored formats, findings, the verdict."""

    def line(text: str, style: str = "") -> None:
        console.print(printable(text), style=style, soft_wrap=True)

    line(str(report.path), "bold")
    width = max((len(name) for name, _ in report.facts), default=0)
    for name, value in sorted(report.facts, key=lambda fact: FACTS.index(fact[0])):
        line(f"  {name:<{width}}  {value}")
    if report.kinds:
        console.print(_table(report))
    sections = (
        ("not used", report.unused, "dim"),
        ("will not work", report.warnings, "yellow"),
        ("refused", report.refused, "red"),
    )
    for title, findings, style in sections:
        for finding in findings[:SHOWN]:
            line(f"{title}: {finding}", style)
        if len(findings) > SHOWN:
            line(f"{title}: {len(findings) - SHOWN} more", style)
    count = len(report.refused)
    problems = f"{count} problem{'s' if count > 1 else ''}"
    line(f"cannot be loaded: {problems}" if count else "can be loaded", "bold red" if count else "bold green")


def _table(report: Report) -> Table:
    """Lay out how the matrices are stored, a row for each kind."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("matrices", "format", "bits", "group size", "act-order", "bits per weight", "size"):
        table.add_column(column, justify="left" if column in ("format", "act-order") else "right")
    for kind, count in report.kinds.most_common():
        nbytes = report.nbytes[kind]
        average = f"{8 * nbytes / max(report.num_weights[kind], 1):.2f}"
        act_order = "yes" if kind.act_order else ""
        table.add_row(str(count), kind.format, kind.bits, kind.group_size, act_order, average, _bytes(nbytes))
    return table


def printable(text: str) -> str:
    """Spell out characters of a file that could move a terminal's cursor or that no encoding can write."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(count: float) -> str:
    """Render a number of bytes with three digits."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB" if count < 1000 else f"{count:,.0f} GB"


def _some(names: Iterable[str], limit: int = 8) -> str:
    """List names, cut after `limit`."""
    listed = list(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
