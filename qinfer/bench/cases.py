"""Arguments for every op at the shapes of real models: what is compiled ahead of time, tested on GPUs and timed.

A case makes its arguments on demand. `fill="empty"` leaves tensors uninitialized, so that on a CPU no page of memory
is touched and shapes of any size are free; `fill="random"` makes valid data (permutations, page tables, codes).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, product, starmap
from typing import Any

import torch

from qinfer.bench.case import CASES, Arguments, case
from qinfer.bench.expert_cases import register_experts
from qinfer.bench.maker import PAGE_SIZE, Maker
from qinfer.bench.shapes import (
    CODED,
    FP16,
    FP32,
    G128,
    HALVES,
    HEADS,
    LLAMA,
    OTHERS,
    QWEN,
    SHAPES,
    STEPS,
    TINY,
    TOKENS,
    VARIANTS,
    WIDTHS,
    Matrix,
    Run,
    Shape,
    Step,
    Stored,
    Variant,
    matrices,
)
from qinfer.kernels.all_reduce import BLOCK, Mailboxes
from qinfer.kernels.operand import DenseOperand, SegmentedOperand

__all__ = ["CASES"]


def _norm_cases(run: Run, *, order: bool) -> None:
    """RMSNorm of the residual, alone and fused with the addition."""
    name, s, d = f"{run.name}{' order' if order else ''}", run.shape, run.dtype

    @case("rmsnorm", name, compiled=run.compiled)
    def _(m: Maker) -> Arguments:
        x, weight = m.normal(run.tokens, s.hidden, dtype=FP32), m.normal(s.hidden, dtype=d)
        return (x, weight), {"eps": 1e-5, "out_dtype": d, "order": m.permutation(s.hidden, wanted=order)}

    @case("add_rmsnorm", name, compiled=run.compiled_early)
    def _(m: Maker) -> Arguments:
        residual, delta = m.normal(run.tokens, s.hidden, dtype=FP32), m.parts(run, s.hidden)
        keywords = {"eps": 1e-5, "out_dtype": d, "order": m.permutation(s.hidden, wanted=order)}
        return (residual, delta, m.normal(s.hidden, dtype=d)), keywords


def _head_cases(run: Run) -> None:
    """Normalization of heads inside a merged projection."""
    s, d = run.shape, run.dtype

    @case("rmsnorm", f"{run.name} query heads", compiled=run.compiled)
    def _(m: Maker) -> Arguments:
        return (m.heads(s, run.tokens, d)[0], m.normal(s.head_dim, dtype=d)), {"eps": 1e-6}


def _norm_of_heads(m: Maker, run: Run) -> dict[str, Any]:
    """Keywords that normalize query and key heads."""
    return {f"{side}_weight": m.normal(run.shape.head_dim, dtype=run.dtype) for side in "qk"} | {"eps": 1e-6}


def _write_cases(run: Run, codec: str) -> None:
    """The write to the cache, alone, fused with the rotation, and with the norm of heads before it."""
    s, d = run.shape, run.dtype
    name = run.name if codec == run.half else f"{run.name} {codec}"

    @case("kv_write", name, compiled=run.compiled and codec in (run.half, "q4"))
    def _(m: Maker) -> Arguments:
        _q, k, v = m.heads(s, run.tokens, d)
        slots = m.permutation(16 * PAGE_SIZE)
        assert slots is not None
        return (k, v, m.pages(s, 16, codec), m.pages(s, 16, codec), slots[: run.tokens]), {}

    def turned(m: Maker) -> Arguments:
        cos, sin = (m.normal(8192, s.head_dim // 2, dtype=FP32) for _ in range(2))
        positions, slots = m.integers(run.tokens, high=8192), m.permutation(16 * PAGE_SIZE)
        assert slots is not None
        pages = m.pages(s, 16, codec), m.pages(s, 16, codec)
        args = m.parts(run, s.qkv), cos, sin, positions, *pages, slots[: run.tokens]
        return args, {"interleaved": False, "out_dtype": d}

    case("rope_write", name, compiled=run.compiled_early and codec in (run.half, "q4", "fp8"))(turned)

    @case("rope_write", f"{name} norm", compiled=run.compiled and s is LLAMA and codec in (run.half, "q4"))
    def _(m: Maker) -> Arguments:
        args, keywords = turned(m)
        return args, keywords | _norm_of_heads(m, run)


def _rope_case(run: Run, *, interleaved: bool, part: int) -> None:
    """Rotation of one part of every head: 1 all of it, 2 half of it."""
    style = f"{'interleaved' if interleaved else 'halves'}{' partial' if part > 1 else ''}"

    @case("rope", f"{run.name} {style}", compiled=run.compiled)
    def _(m: Maker) -> Arguments:
        q, k, _v = m.heads(run.shape, run.tokens, run.dtype)
        cos, sin = (m.normal(8192, run.shape.head_dim // part // 2, dtype=FP32) for _ in range(2))
        return (q, k, cos, sin, m.integers(run.tokens, high=8192)), {"interleaved": interleaved}


def _gather_cases(run: Run) -> None:
    """Embedding rows and reordered columns."""
    s, d = run.shape, run.dtype

    @case("gather_rows", run.name, compiled=run.compiled)
    def _(m: Maker) -> Arguments:
        table, ids = m.normal(s.vocabulary, s.hidden, dtype=d), m.integers(run.tokens, high=s.vocabulary)
        return (table, ids), {"out_dtype": FP32}

    @case("feed", run.name, compiled=run.compiled and s is LLAMA)
    def _(m: Maker) -> Arguments:
        return (
            m.integers(run.tokens, low=-16, high=s.vocabulary),
            m.integers(16, low=-1, high=s.vocabulary, dtype=torch.int64),
        ), {}

    @case("gather_columns", run.name, compiled=run.compiled)
    def _(m: Maker) -> Arguments:
        return (m.normal(run.tokens, s.hidden, dtype=d), m.permutation(s.hidden)), {}


def _silu_mul_case(run: Run, *, order: bool) -> None:
    @case("silu_mul", f"{run.name}{' order' if order else ''}", compiled=run.compiled_early)
    def _(m: Maker) -> Arguments:
        keywords = {"order": m.permutation(run.shape.mlp, wanted=order), "out_dtype": run.dtype}
        return (m.parts(run, 2 * run.shape.mlp),), keywords


def _lora_case(run: Run) -> None:
    """The merged query, key and value projection; four adapters, and rows of none."""
    s, d, rank, slots = run.shape, run.dtype, 16, 4
    widths = (s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim)

    # The narrow model differs from the wide one in its element type alone.
    @case("add_lora", run.name, compiled=run.compiled and (s is LLAMA or run.tokens == 16))
    def _(m: Maker) -> Arguments:
        a, b = m.normal(slots, len(widths), rank, s.hidden, dtype=d), m.normal(slots, s.qkv, rank, dtype=d)
        x, y = m.normal(run.tokens, s.hidden, dtype=d), m.normal(run.tokens, s.qkv, dtype=d)
        return (x, a, b, m.integers(run.tokens, low=-1, high=slots), y), {"widths": widths}


def _attention_case(s: Shape, half: str, step: Step, variant: Variant) -> None:
    """Attention of one step; every sequence has pages of its own, anywhere in the pool."""
    name, window, order = f"{s.name} {step.name} {half}{variant.name}", variant.window, variant.order
    d, width, batch = HALVES[half], -(-step.context // PAGE_SIZE), len(step.queries)
    in_fp16 = s not in (QWEN, TINY)  # which stand for bf16
    compiled = step.compiled and (half == "fp16") == in_fp16 and (window is None or s is LLAMA)
    # A window is the same for a few queries as for many, and an order or a cap for all heads.
    compiled = compiled and (window is None or "draft" not in step.name)
    compiled = compiled and ((not order and variant.softcap is None) or (s is LLAMA and step is STEPS[0]))
    # One pair of codecs has one of each kind; the others differ little from it outside of decode.
    # Heads of other models are compiled by hand, as `--all`.
    if variant.codecs is not None:
        compiled = compiled and s is LLAMA and (step is STEPS[0] or variant.codecs == ("q8", "q4"))
    keys, values = variant.codecs or (half, half)

    @case("paged_attention", name, compiled=compiled)
    def _(m: Maker) -> Arguments:
        table = m.permutation(width * batch)
        assert table is not None
        starts = [0, *accumulate(step.queries)]
        q = m.normal(starts[-1], s.heads, s.head_dim, dtype=d)
        k_pages, v_pages = m.pages(s, width * batch, keys), m.pages(s, width * batch, values)
        tables = (table.view(batch, width), m.steps(starts), m.steps([step.context] * batch))
        keywords = {"max_query_len": max(step.queries), "scale": s.head_dim**-0.5}
        keywords |= {"window": window, "softcap": variant.softcap}
        return (q, k_pages, v_pages, *tables), {**keywords, "order": m.permutation(q[0].numel(), wanted=order)}


def _rope_attention_case(run: Run, context: int, *, has_norm: bool) -> None:
    """Rotation, write and attention of a step of decode, over plain pages."""
    s, d, batch, width = run.shape, run.dtype, run.tokens, -(-context // PAGE_SIZE)
    name = f"{s.name} decode B={batch} context={context} {run.half}{' norm' if has_norm else ''}"

    @case("rope_attention", name, compiled=run.compiled and batch == 16)
    def _(m: Maker) -> Arguments:
        table = m.permutation(width * batch)
        assert table is not None
        table = table.view(batch, width)
        cos, sin = (m.normal(8192, s.head_dim // 2, dtype=FP32) for _ in range(2))
        # The last position of each sequence.
        slots = table[:, (context - 1) // PAGE_SIZE] * PAGE_SIZE + (context - 1) % PAGE_SIZE
        positions, lens = (m.steps([at] * batch) for at in (context - 1, context))
        pages = m.pages(s, width * batch, run.half), m.pages(s, width * batch, run.half)
        places = table, m.steps(list(range(batch + 1))), lens
        keywords = {"interleaved": False, "max_query_len": 1, "scale": s.head_dim**-0.5, "out_dtype": d}
        norm = _norm_of_heads(m, run) if has_norm else {}
        return (m.parts(run, s.qkv), cos, sin, positions, *pages, slots, *places), keywords | norm


def _kv_decode_case(s: Shape, k_codec: str, v_codec: str) -> None:
    """All that a prompt of 8,192 tokens sees."""
    width = 8192 // PAGE_SIZE

    @case("kv_decode", f"{s.name} context=8192 k{k_codec} v{v_codec}", compiled=s is LLAMA)
    def _(m: Maker) -> Arguments:
        table = m.permutation(width)
        assert table is not None
        tables = (table.view(1, width), m.steps([0, 2048]), m.steps([8192]))
        pages = (m.pages(s, width, codec) for codec in (k_codec, v_codec))
        return (*tables, *pages), {"dtype": FP16, "max_pages": width}


def _matmul_case(matrix: Matrix, stored: Stored, t: int, half: str, *, compiled: bool) -> None:
    name = f"{matrix.name} T={t} {half} {stored.name}{' bias' if matrix.bias else ''}"

    @case("matmul", name, compiled=compiled)
    def _(m: Maker) -> Arguments:
        d = HALVES[half]
        bias = m.normal(matrix.n, dtype=d) if matrix.bias else None
        keywords = {"bias": bias, "out_dtype": FP32 if matrix.residual else None}
        return (m.normal(t, matrix.k, dtype=d), m.planes(matrix, stored, d)), keywords


def _mixture_case(matrix: Matrix, t: int, half: str, *, compiled: bool) -> None:
    """An EXL2 matrix of 4 bits on average: segments of three widths, a tenth of the features above and below."""

    @case("matmul", f"{matrix.name} T={t} {half} 5, 4 and 3 bits", compiled=compiled)
    def _(m: Maker) -> Arguments:
        d, few = HALVES[half], matrix.k // 10 // 128 * 128
        sizes = {5: few, 4: matrix.k - 2 * few, 3: few}
        planes = (m.planes(replace(matrix, k=k), Stored("", bits=bits), d) for bits, k in sizes.items())
        return (m.normal(t, matrix.k, dtype=d), SegmentedOperand(tuple(planes))), {}


def _matmul_parts_case(run: Run) -> None:
    """The output projection of attention, which the next norm adds up."""
    matrix = matrices(run.shape)[1]

    @case("matmul_parts", f"{matrix.name} T={run.tokens} {run.half} {G128.name}", compiled=run.compiled_early)
    def _(m: Maker) -> Arguments:
        x, operand = m.normal(run.tokens, matrix.k, dtype=run.dtype), m.planes(matrix, G128, run.dtype)
        return (x, operand), {"out_dtype": FP32}


def _gated_matmul_case(run: Run, *, order: bool) -> None:
    """Gate and up of the MLP, with what its down projection reads behind them."""
    matrix = matrices(run.shape)[2]
    name = f"{matrix.name} T={run.tokens} {run.half} {G128.name}{' order' if order else ''}"

    @case("gated_matmul", name, compiled=run.compiled)
    def _(m: Maker) -> Arguments:
        x, operand = m.normal(run.tokens, matrix.k, dtype=run.dtype), m.planes(matrix, G128, run.dtype)
        return (x, operand), {"order": m.permutation(run.shape.mlp, wanted=order)}


def _all_reduce_case(run: Run, size: int) -> None:
    """The output projection of attention, in parts, and a rank that hears itself from every peer."""
    channels = run.tokens * -(-run.shape.hidden // BLOCK)

    @case("all_reduce", f"{run.name} R={size}", compiled=run.compiled and size == 4)
    def _(m: Maker) -> Arguments:
        return (m.parts(run, run.shape.hidden), Mailboxes.loopback(size, channels, m.device)), {}


def _dense_head_case(run: Run) -> None:
    s, d = run.shape, run.dtype

    @case("invariant_matmul", f"{run.name} dense head", compiled=run.compiled and run.tokens == 16)
    def _(m: Maker) -> Arguments:
        operand = DenseOperand(m.normal(s.vocabulary, s.hidden, dtype=d))
        return (m.normal(run.tokens, s.hidden, dtype=d), operand), {"out_dtype": FP32}

    @case("matmul", f"{run.name} dense head", compiled=False)  # a library's product
    def _(m: Maker) -> Arguments:
        operand = DenseOperand(m.normal(s.vocabulary, s.hidden, dtype=d))
        return (m.normal(run.tokens, s.hidden, dtype=d), operand), {"out_dtype": FP32}


def _dequantize_case(matrix: Matrix, stored: Stored, half: str) -> None:
    @case("dequantize", f"{matrix.name} {half} {stored.name}")
    def _(m: Maker) -> Arguments:
        operand = m.planes(matrix, stored, HALVES[half])
        return (operand.planes[0], operand), {"dtype": HALVES[half]}


def _packing_cases(matrix: Matrix) -> None:
    """Codes to stored words and back, as a checkpoint is loaded."""
    k, n = matrix.k, matrix.n

    for width in (1, 2, 4, 8):

        @case("pack_plane", f"{matrix.name} {width} bits")
        def _(m: Maker, width: int = width) -> Arguments:
            return (m.integers(k, n, high=1 << width, dtype=torch.uint8),), {"width": width, "padding": 0}

        @case("unpack_plane", f"{matrix.name} {width} bits")
        def _(m: Maker, width: int = width) -> Arguments:
            return (m.words(k, n, width),), {"width": width, "in_features": k}

    @case("pack_4bit", matrix.name)
    def _(m: Maker) -> Arguments:
        return (m.integers(k, n, high=16, dtype=torch.uint8),), {}

    @case("unpack_4bit", matrix.name)
    def _(m: Maker) -> Arguments:
        return (m.integers(k, n // 8, low=-(2**31), high=2**31 - 1),), {}


FILTERS = {"temperature": (0, 1.0), "top-p": (0, 0.95), "top-k top-p": (50, 0.95)}


def _sample_cases(s: Shape, rows: int) -> None:
    """The draw with and without filters, the likeliest tokens, and penalties of 1,000 tokens per row."""
    for name, (top_k, top_p) in FILTERS.items():
        compiled = s is LLAMA and rows == 16 and name != "top-p"  # what the filters are is not known at compile time

        @case("sample_rows", f"{s.name} R={rows} {name}", compiled=compiled)
        def _(m: Maker, top_k: int = top_k, top_p: float = top_p) -> Arguments:
            logits = m.normal(rows, s.vocabulary, dtype=FP32)
            # As if logits had a standard deviation of 3: the likeliest of 100,000 tokens gets a few percent.
            table = m.numbers([[4.3, top_k, top_p, 1.0, (row + 0.5) / rows] for row in range(rows)])
            return (logits, table), {"filtered": top_k > 0 or top_p < 1, "host": m.host_ids(rows)}

    @case("greedy", f"{s.name} R={rows}", compiled=s is LLAMA and rows == 16)
    def _(m: Maker) -> Arguments:
        return (m.normal(rows, s.vocabulary, dtype=FP32),), {"host": m.host_ids(rows)}

    @case("edit_logits", f"{s.name} R={rows}", compiled=s is LLAMA and rows == 16)
    def _(m: Maker) -> Arguments:
        logits, per_row = m.normal(rows, s.vocabulary, dtype=FP32), min(1000, s.vocabulary)
        places = m.integers(rows * per_row, 2, high=rows)
        if m.fill == "random":
            places[:, 1] = torch.arange(per_row, device=m.device).repeat(rows)
            places[:, 0] = torch.arange(rows, device=m.device).repeat_interleave(per_row)
        return (logits, logits, places, m.normal(rows * per_row, 3, dtype=FP32)), {}


# Of the wide tiles, one with long steps and one with long words.
WIDE = ((128, "fp16", 5), (128, "bf16", 8))


def _register() -> None:
    """Fill `CASES`."""
    for run in starmap(Run, product(SHAPES, TOKENS, HALVES)):
        for make in (_head_cases, _gather_cases, _dense_head_case, _matmul_parts_case, _lora_case):
            make(run)
        for codec in (run.half, "fp8", "q8", "q6", "q4"):
            _write_cases(run, codec)
        for order in (False, True):
            _norm_cases(run, order=order)
            _silu_mul_case(run, order=order)
            _gated_matmul_case(run, order=order)
        for interleaved, part in ((False, 1), (True, 1), (False, 2)):
            _rope_case(run, interleaved=interleaved, part=part)
    for s, t, size in product((LLAMA, TINY), (1, 16), (2, 4)):
        _all_reduce_case(Run(s, t, "fp16"), size)
    for s, rows in product(SHAPES, (1, 16, 64)):
        _sample_cases(s, rows)
    for s, half, step in product(SHAPES, HALVES, STEPS):
        for variant in VARIANTS:
            _attention_case(s, half, step, variant)
    for s, half, step, variant in product((LLAMA, TINY), HALVES, STEPS, CODED):
        _attention_case(s, half, step, variant)
    for s, t, half, has_norm in product((LLAMA, TINY), (1, 4, 16, 64), HALVES, (False, True)):
        _rope_attention_case(Run(s, t, half), 512, has_norm=has_norm)
    for s, variant in product((LLAMA, TINY), CODED):
        assert variant.codecs is not None
        _kv_decode_case(s, *variant.codecs)
    for s, codec in HEADS:
        _attention_case(s, "fp16", STEPS[0], Variant(codecs=(codec, codec)))
    for s, t, half in product(SHAPES, (1, 4, 16, 64, 256, 2048), HALVES):
        for matrix in matrices(s):
            compiled = matrix.bias and half == "bf16" if s is QWEN else Run(s, t, half).compiled and t <= s.hidden // 16
            _matmul_case(matrix, G128, t, half, compiled=compiled)
    qkv, _o, gate_up, down = matrices(LLAMA)
    for stored, half, t in product(OTHERS, HALVES, (*TOKENS, 64, 128)):
        _matmul_case(qkv, stored, t, half, compiled=t == 16 and half == "fp16")
        # An order is the gather's business; for few rows it is compiled once, to show that.
        wanted = (t == 64 and not stored.order) or (t == 128 and stored.group_size == 64)
        _matmul_case(gate_up, stored, t, half, compiled=wanted and half == "bf16")
    for stored, half, t in product(WIDTHS, HALVES, (*TOKENS, 64, 128)):
        wanted = (t, half) in ((1, "fp16"), (64, "bf16")) or (t, half, stored.bits) in WIDE
        _matmul_case(qkv, stored, t, half, compiled=wanted)
    # Compiled by hand, for that takes half a minute for a target.
    for half, t in product(HALVES, (*TOKENS, 64, 128)):
        _mixture_case(qkv, t, half, compiled=False)
    for stored, half in product((G128, *OTHERS, *WIDTHS), HALVES):
        _dequantize_case(down, stored, half)
    _packing_cases(matrices(LLAMA)[-1])
    register_experts()


_register()
