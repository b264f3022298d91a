"""Reading results: which fields of a row say what was measured, which are measurements, and which way is better."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qinfer.errors import QinferError

Row = dict[str, Any]
Identity = tuple[tuple[str, str], ...]


class ResultError(QinferError):
    """A file of results cannot be read, or its rows cannot be put beside those of another."""


# Fields that are figures, and whether more is better. Some are groups: quantiles of milliseconds.
RATES = (
    "tokens_per_second prefill_tokens_per_second output_tokens_per_second total_tokens_per_second requests_per_second "
    "load_gb_s copy_gb_s fraction_of_copy fraction_of_roof teraflops"
)
TIMES = (
    "ms ms_sorted ms_host ms_per_step prefill_ms load_ms copy_ms ttft_ms tpot_ms itl_ms step_ms host_ms_per_step "
    "first_request_ttft_ms wall_s warm_up_s peak_host_rss_growth_mb"
)
MORE_IS_BETTER = {**dict.fromkeys(RATES.split(), True), **dict.fromkeys(TIMES.split(), False)}
# What a comparison shows: one figure where several say the same, the one that brings its quantiles.
SHOWN = (
    *("ms", "ms_per_step", "prefill_ms", "output_tokens_per_second", "ttft_ms", "tpot_ms", "itl_ms"),
    *("load_gb_s", "ms_host", "host_ms_per_step"),
)
# What follows from the run and is no figure of merit.
CONSEQUENCES = (
    "read_bandwidth_gb_s product_tflops bytes bytes_per_step flops flops_per_step plan steps cached_tokens "
    "drafted_tokens accepted_tokens preemptions problem tensors size_mb largest_file_mb "
    "kernels"
)
BESIDE = frozenset(CONSEQUENCES.split())
PLACE = ("gpu", "device")  # must agree
SETTING = ("torch", "triton", "python")  # may differ, and is told
PROVENANCE = frozenset((*SETTING, "revision", "date"))
# What rows from before an option existed mean by not having it.
DEFAULTS = {"engine": "qinfer", "head": "like the rest", "ranks": 1}


@dataclass(frozen=True)
class Figure:
    """One measurement: its median, and where the samples lie if they are known."""

    median: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[Any]) -> Figure | None:
        """Sum up the runs of one row: several by their range, one by the quantiles that it brings; None if wrong."""
        centres = [_centre(value) for value in values]
        numbers = sorted(number for number in centres if number is not None)
        if not numbers or len(numbers) < len(centres):
            return None
        middle = (numbers[(len(numbers) - 1) // 2] + numbers[len(numbers) // 2]) / 2
        if len(numbers) > 1:
            return cls(middle, numbers[0], numbers[-1])
        first = values[0]
        return cls(middle, first.get("p10"), first.get("p90")) if isinstance(first, dict) else cls(middle)


def _centre(value: object) -> float | None:
    """Return the number that stands for a field: itself, or the middle of its quantiles; None if there is none."""
    if isinstance(value, dict):
        value = value.get("median", value.get("p50"))
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def identity(row: Row) -> Identity:
    """Return what a row is about: every field that is no figure, no place and no provenance."""
    left = {**DEFAULTS, **row}
    skipped = MORE_IS_BETTER.keys() | BESIDE | PROVENANCE | set(PLACE)
    return tuple((name, json.dumps(value)) for name, value in sorted(left.items()) if name not in skipped)


def describe(row: Row) -> str:
    """Name a row in words: what it is about, as short as possible."""
    names = ("op", "model", "engine", "weights", "head", "format", "case", "kind", "n", "k", "m", "rows", "vocabulary")
    words = [str(row["bench"]) if "op" not in row else ""]
    for name in (*names, "batch", "context", "queries", "clients", "rate", "kv_format"):
        value = row.get(name)
        if value is not None and value != DEFAULTS.get(name):
            is_word = name in ("op", "model", "engine", "weights", "format", "case", "kind")
            words.append(str(value) if is_word else f"{name}={value}")
    return " ".join(word for word in words if word)


def read(path: str | Path) -> list[Row]:
    """Read a file of JSON objects one behind the other, each on a line of its own or on several.

    Raises:
        ResultError: it cannot be read, or what it holds is no result.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as problem:
        raise ResultError(f"{path}: {problem.strerror}") from problem
    except UnicodeDecodeError as problem:
        raise ResultError(f"{path}: is no text: {problem}") from problem
    rows, decoder, end = [], json.JSONDecoder(), len(text.rstrip())
    place = end - len(text[:end].lstrip())
    while place < end:
        try:
            row, after = decoder.raw_decode(text, place)
        except json.JSONDecodeError as problem:
            raise ResultError(f"{path}:{problem.lineno}: is no JSON: {problem.msg}") from problem
        if not isinstance(row, dict) or "bench" not in row:
            line = text.count("\n", 0, place) + 1
            raise ResultError(f'{path}:{line}: is no result of qinfer.bench, which has a field "bench"')
        rows.append(row)
        place = end - len(text[after:end].lstrip())
    if not rows:
        raise ResultError(f"{path}: holds no results")
    return rows


def grouped(rows: Iterable[Row]) -> dict[Identity, list[Row]]:
    """Put the runs of the same thing together, in their order."""
    groups: dict[Identity, list[Row]] = {}
    for row in rows:
        groups.setdefault(identity(row), []).append(row)
    return groups
