"""`python -m qinfer.bench op case`: any op, at the shapes of real models, as its cases (`cases.py`) call it.

A case is checked against the reference of its op, on the same random arguments, and then timed in a CUDA graph of
several calls with arguments of their own, until these exceed the cache or are COPIES. What is smaller comes from the
cache, as in a model, where another kernel has just written it, and may be read faster than memory is.

Bytes are what the op cannot help to move: every argument and every result once, what it changes twice, and of tables,
pages, adapters and experts the rows that it takes. Operations are those of the products in the reference, which torch
counts; where it has none, there is no such figure. On a CPU the figure is that of the reference, which runs there.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from qinfer.bench.case import Arguments, Case
from qinfer.bench.cases import CASES
from qinfer.bench.contender import COARSE, ROTATE_BYTES, TOLERANCE, relative_error
from qinfer.bench.measure import environment, product_rate, read_bandwidth, time_calls, time_graph
from qinfer.bench.report import append
from qinfer.errors import UnsupportedError
from qinfer.kernels.device import OPS, default_device

if TYPE_CHECKING:
    from argparse import _SubParsersAction

COPIES = 32
Values = Mapping[str, Any]
Rows = Callable[[Values, str], int]


def add_parser(programs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command line of this benchmark."""
    parser = programs.add_parser("case", help="any op at the shapes of real models")
    parser.add_argument("ops", nargs="*", metavar="NAME", help=f"{', '.join(sorted(OPS))}; default: all")
    told = "only cases whose name has this text; may be repeated, then all of them"
    parser.add_argument("--match", action="append", default=[], metavar="TEXT", help=told)
    parser.add_argument("--json", metavar="FILE", help="append every row to FILE as a line of JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure and print one line per case; 1 if one is wrong."""
    unknown = [name for name in options.ops if name not in OPS]
    if unknown:
        raise UnsupportedError(f"there is no op {unknown[0]!r}; these work: {', '.join(sorted(OPS))}")
    wanted = [case for case in CASES if not options.ops or case.op in options.ops]
    cases = [case for case in wanted if all(text in case.name for text in options.match)]
    if not cases:
        examples = ", ".join(repr(case.name) for case in wanted[:: ceil(len(wanted) / 3)])
        raise UnsupportedError(
            f"no case has {' and '.join(map(repr, options.match))} in its name; names are {examples}"
        )
    device = default_device()
    bandwidth, setting = read_bandwidth(device), environment(device)
    ceilings = {"read_bandwidth_gb_s": bandwidth}
    if device.type == "cuda":
        ceilings["product_tflops"] = product_rate(device)
    print(f"{setting['gpu'] or setting['device']}, reads {bandwidth:,.0f} GB/s")
    print(f"{'op':<22} {'case':<44} {'µs':>9} {'MB':>9} {'GFLOP':>9} {'roof':>6}")
    is_wrong = False
    for case in cases:
        row = {"bench": "op", "op": case.op, "case": case.name, **measure(case, device)}
        is_wrong |= row["problem"] is not None
        row["fraction_of_roof"] = None if row["ms"] is None else row["bytes"] / row["ms"] / 1e6 / bandwidth
        time = f"{row['ms'] * 1e3:9.1f}" if row["ms"] is not None else f"{'wrong':>9}"
        share = f"{row['fraction_of_roof']:6.0%}" if row["ms"] is not None else f"{'-':>6}"
        work = f"{row['flops'] / 1e9:9.3f}" if row["flops"] else f"{'-':>9}"
        print(f"{case.op:<22} {case.name:<44} {time} {row['bytes'] / 1e6:9.3f} {work} {share}", flush=True)
        if row["problem"]:
            print(f"{'':<22} {row['problem']}")
        append({**row, **ceilings, **setting}, options.json)
    return int(is_wrong)


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """Check one case, count what it moves and computes, and time it if it is right."""
    op, is_gpu = OPS[case.op], device.type == "cuda"
    body = op.launch if is_gpu else op.reference
    args, kwargs = _arguments(case, device)
    versions = [(tensor, tensor._version) for tensor in tensors((args, kwargs))]
    with FlopCounterMode(display=False) as counter:
        expected = op.reference(*args, **kwargs)
    changed = [number for number, (tensor, version) in enumerate(versions) if tensor._version != version]
    row = {
        "ms": None,
        "bytes": moved(case.op, (args, kwargs), expected, [versions[number][0] for number in changed]),
        "flops": counter.get_total_flops() or None,
    }
    others, keywords = _arguments(case, device)
    actual = body(*others, **keywords)
    mine, theirs = list(tensors((others, keywords))), [tensor for tensor, _ in versions]
    pairs = list(zip(tensors(actual), tensors(expected), strict=True))
    pairs += [(mine[number], theirs[number]) for number in changed]
    is_coarse = any(tensor.dtype == torch.bfloat16 for tensor in (*mine, *tensors(actual)))
    for number, pair in enumerate(pairs):
        if (found := difference(*pair)) > (COARSE if is_coarse else TOLERANCE):
            return {**row, "problem": f"wrong: result {number} differs by {found:.2g}"}
    del expected, actual, pairs
    if not is_gpu:
        return {**row, "ms": time_calls(partial(body, *args, **kwargs), device, repeats=5).median, "problem": None}
    held = sum(tensor.nbytes for tensor in tensors((args, kwargs)))
    copies = min(COPIES, ceil(ROTATE_BYTES / held))
    made = [(args, kwargs), (others, keywords), *(_arguments(case, device) for _ in range(copies - 2))]
    calls = [partial(body, *arguments, **named) for arguments, named in made[:copies]]
    return {**row, "ms": time_graph(calls, device).median, "problem": None}


def _arguments(case: Case, device: torch.device) -> Arguments:
    """Make a case's arguments, the same every time."""
    torch.manual_seed(0)
    return case.make(device, "random")


def difference(actual: Tensor, expected: Tensor) -> float:
    """Return the relative RMS error of numbers, and which share of the others differs."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if torch.equal(actual, expected):
        return 0.0
    if not expected.dtype.is_floating_point:
        return float((actual != expected).float().mean())
    found = relative_error(actual, expected.float())
    return found if found == found else float("inf")


def tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors inside arguments or results, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        yield from tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for one in value:
            yield from tensors(one)


def moved(name: str, arguments: Arguments, result: object, changed: list[Tensor]) -> int:
    """Count the bytes that an op cannot help to read or write."""
    args, kwargs = arguments
    values = inspect.signature(OPS[name].launch).bind(*args, **kwargs).arguments
    partly, total, seen = _PARTLY.get(name, {}), 0, set[int]()
    for argument, value in values.items():
        if argument in partly:
            total += partly[argument](values, argument)
            seen |= {tensor.data_ptr() for tensor in tensors(value)}
    for tensor in (*tensors(list(values.values())), *tensors(result)):
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            total += tensor.nbytes * (1 + any(tensor is other for other in changed))
    return total


def _rows_of(index: str) -> Rows:
    """One row of a table for every element of another argument."""
    return lambda values, name: values[index].numel() * values[name][0].nbytes


def _tokens_of(count: Callable[[Values], int]) -> Rows:
    """Keys or values of so many tokens."""
    return lambda values, name: count(values) * (values[name].nbytes // values[name].codes[:, 0, :, 0].numel())


def _slots_of(index: str) -> Rows:
    """What belongs to the numbers in another argument, each once; negative ones have nothing."""
    return lambda values, name: sum(values[name][0].nbytes for slot in values[index].unique().tolist() if slot >= 0)


def _experts(values: Values, name: str) -> int:
    """Count the matrices of the experts that somebody takes, each once."""
    held, num_experts = sum(tensor.nbytes for tensor in tensors(values[name])), int(values[name].num_experts)
    return held * len(values["routing"].experts.unique()) // num_experts


def _mail(values: Values, name: str) -> int:
    """Count the words of 64 bits that are sent to every peer and received from it."""
    peers, sums = len(values[name].boxes) - 1, values["parts"][0].numel()
    return 2 * peers * int(sums) * 8


_WRITTEN = dict.fromkeys(("k_pages", "v_pages"), _tokens_of(lambda values: values["slots"].numel()))
_SEEN = dict.fromkeys(("k_pages", "v_pages"), _tokens_of(lambda values: int(values["context_lens"].sum())))
_TURNED = dict.fromkeys(("cos", "sin"), _rows_of("positions"))
# Arguments of which an op takes a part, and how many bytes of them.
_PARTLY: dict[str, dict[str, Rows]] = {
    "gather_rows": {"table": _rows_of("ids")},
    "rope": _TURNED,
    "kv_write": _WRITTEN,
    "rope_write": _TURNED | _WRITTEN,
    "paged_attention": _SEEN,
    "rope_attention": _TURNED | _SEEN,
    "add_lora": dict.fromkeys(("a", "b"), _slots_of("slots")),
    "edit_logits": dict.fromkeys(("logits", "out"), lambda values, name: 4 * len(values["places"])),
    "expert_matmul": {"operand": _experts},
    "all_reduce": {"mail": _mail},
}
