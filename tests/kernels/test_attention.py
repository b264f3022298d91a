"""paged_attention: kernel against reference, reference against attention written out, and laws that hold for both."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qinfer.kernels import attention
from qinfer.kernels.attention import paged_attention
from qinfer.kernels.attention_blocks import EVERY, LEFT_OVER, PROMPT, STREAM, Places, Wanted
from qinfer.kernels.attention_reduce import locks_of
from qinfer.kernels.attention_tiles import MAX_SPLITS, choose_splits, choose_tiles
from qinfer.kernels.kv_codec import CODECS, KVPages
from tests.compare import assert_close
from tests.kernels.coded import coded
from tests.strategies import random_tensor, seeds

BODIES = [paged_attention.reference, pytest.param(paged_attention.launch, marks=pytest.mark.kernel)]
GARBAGE_PAGES = torch.tensor([-1, 2**30, -(2**31)], dtype=torch.int32)
FEW = settings(max_examples=5)


@dataclass(frozen=True)
class Case:
    """A batch whose pages hold NaN wherever no token is, with the keys and values of each sequence in order."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    query_starts: Tensor
    context_lens: Tensor
    keys: list[Tensor] = field(repr=False)
    values: list[Tensor] = field(repr=False)

    @property
    def query_lens(self) -> list[int]:
        return self.query_starts.diff().tolist()

    @property
    def args(self) -> tuple[Tensor | KVPages, ...]:
        pages = KVPages.plain(self.k_pages), KVPages.plain(self.v_pages)
        return self.q, *pages, self.page_table, self.query_starts, self.context_lens

    @property
    def options(self) -> dict[str, float]:
        return {"max_query_len": max(self.query_lens), "scale": self.q.shape[-1] ** -0.5}


def int32(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def make_case(
    query_lens, context_lens, device, *, heads=(4, 2), head_dim=32, page_size=16, dtype=torch.float32, seed=0
) -> Case:
    """Scatter random sequences over shuffled pages; the tail of the page table is garbage."""
    num_heads, num_kv_heads = heads
    keys, values = (
        [
            random_tensor(n, num_kv_heads, head_dim, seed=seed + 2 * b + i, dtype=dtype)
            for b, n in enumerate(context_lens)
        ]
        for i in (1, 2)
    )
    num_pages = [-(-n // page_size) for n in context_lens]
    width = max(num_pages) + 2
    shuffled = torch.randperm(sum(num_pages) + 3, generator=torch.Generator().manual_seed(seed)).int()
    pages = torch.full((2, len(shuffled), num_kv_heads, page_size, head_dim), float("nan"), dtype=dtype)
    table = GARBAGE_PAGES[torch.arange(len(context_lens) * width) % 3].reshape(-1, width)
    for b, (n, context_len) in enumerate(zip(num_pages, context_lens, strict=True)):
        own, shuffled = shuffled[:n], shuffled[n:]
        table[b, :n] = own
        for t in range(context_len):
            for kind, rows in enumerate((keys, values)):
                pages[kind, own[t // page_size], :, t % page_size] = rows[b][t]
    q = random_tensor(sum(query_lens), num_heads, head_dim, seed=seed, dtype=dtype)
    starts = [0, *torch.tensor(query_lens).cumsum(0).tolist()]
    return Case(
        q.to(device),
        pages[0].to(device),
        pages[1].to(device),
        table.to(device),
        int32(starts, device),
        int32(context_lens, device),
        keys,
        values,
    )


def free_behind(case: Case, window: int | None) -> None:
    """Put garbage into the page table where a window hides whole pages from every query of a sequence."""
    for b, query_len in enumerate(case.query_lens):
        first = 0 if window is None else max(0, len(case.keys[b]) - query_len - window + 1)
        case.page_table[b, : first // case.k_pages.shape[2]] = GARBAGE_PAGES[0]


def written_out(case: Case, window: int | None = None) -> Tensor:
    """Attention in float64, one query and one head at a time."""
    _, num_heads, head_dim = case.q.shape
    rows = []
    token = 0
    for b, query_len in enumerate(case.query_lens):
        context_len = len(case.keys[b])
        for i in range(query_len):
            position = context_len - query_len + i
            first = 0 if window is None else max(0, position - window + 1)
            for h in range(num_heads):
                g = h * case.k_pages.shape[1] // num_heads
                k, v = (x[b][first : position + 1, g].double() for x in (case.keys, case.values))
                weights = torch.exp(k @ case.q[token, h].cpu().double() * head_dim**-0.5)
                rows.append(weights @ v / weights.sum() if len(k) else torch.zeros(head_dim, dtype=torch.float64))
            token += 1
    return torch.stack(rows).reshape(token, num_heads * head_dim)


def wanted_of(case: Case, **changes: Any) -> Wanted:
    """What `paged_attention` asks of its kernels for a case."""
    scale = case.options["scale"] * attention.LOG2_E
    return Wanted(case.options["max_query_len"], scale, None, None, None, None, invariant=False)._replace(**changes)


BATCHES = {
    "decode, one token": ([1], [1]),
    "decode around a page": ([1, 1, 1], [15, 16, 17]),
    "decode of padding": ([1, 1], [40, 0]),
    "prefill": ([21], [21]),
    "chunk": ([5], [40]),
    "mixed": ([1, 9, 1], [33, 9, 1]),
    "mixed with padding and a sequence without queries": ([3, 0, 12, 1], [19, 16, 28, 0]),
    "padding of several tokens": ([2, 0, 5], [18, 0, 0]),
    "streams and a prompt": ([1, 1, 40, 2], [50, 1, 60, 20]),
}


@pytest.mark.parametrize("window", [None, 1, 18])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_reference_is_attention_written_out(batch, window, device):
    case = make_case(*batch, device)
    free_behind(case, window)
    actual = paged_attention.reference(*case.args, **case.options, window=window)
    assert_close(actual, written_out(case, window).float())


@pytest.mark.kernel
@pytest.mark.parametrize(("page_size", "window"), [(64, None), (256, 40)])
def test_larger_pages(page_size, window, device):
    case = make_case([1, 3], [page_size + 41, page_size], device, page_size=page_size)
    free_behind(case, window)
    actual = paged_attention.launch(*case.args, **case.options, window=window)
    assert_close(actual, written_out(case, window).float())


@pytest.mark.kernel
@pytest.mark.parametrize("codec", ["fp32", "q8"])
@pytest.mark.parametrize(("window", "splits"), [(None, None), (18, None), (None, 3)])
@pytest.mark.parametrize(
    "batch", ["mixed", "mixed with padding and a sequence without queries", "streams and a prompt"]
)
def test_streams_have_a_launch_of_their_own(batch, window, splits, codec, device, monkeypatch):
    case = make_case(*BATCHES[batch], device)
    free_behind(case, window)
    roles, rooms = [], []

    def spy(*args):
        roles.append((args[4].role, args[4].max_query_len))
        launch(*args)

    def spy_room(q, num_tokens, splits):
        rooms.append(num_tokens)
        return room(q, num_tokens, splits)

    launch, room = attention.launch_pages, attention.room_for_runs
    monkeypatch.setattr(attention, "launch_pages", spy)
    monkeypatch.setattr(attention, "room_for_runs", spy_room)
    monkeypatch.setattr(attention, "MIN_MIXED", len(case.q))
    pages = [KVPages.plain(x) if codec == "fp32" else coded(x, CODECS[codec]) for x in (case.k_pages, case.v_pages)]
    args, order = (case.q, *pages, *case.args[3:]), torch.randperm(4 * 32, generator=torch.manual_seed(1)).int()
    options = {**case.options, "window": window, "order": order.to(device)}
    actual = paged_attention.launch(*args, **options, splits=splits)
    assert_close(actual, paged_attention.reference(*args, **options))
    assert roles == [(PROMPT.value, max(case.query_lens)), (STREAM.value, 4)]
    assert rooms == [len(case.q), 4 * len(case.context_lens)], "what streams leave does not grow with the prompts"
    decode = make_case(*BATCHES["decode of padding"], device)
    for other, invariant, is_amd in ((case, True, False), (decode, False, False), (case, False, True)):
        roles.clear()
        monkeypatch.setattr(attention, "is_amd_target", lambda _, is_amd=is_amd: is_amd)
        paged_attention.launch(*other.args, **other.options, window=window, invariant=invariant)
        assert roles == [(EVERY.value, max(other.query_lens))]


@pytest.mark.kernel
@pytest.mark.parametrize(("role", "has_roles"), [(STREAM, False), (PROMPT, False), (PROMPT, True), (LEFT_OVER, True)])
@pytest.mark.parametrize("splits", [1, 3])
def test_sequences_of_other_roles_are_left_alone(role, has_roles, splits, device):
    case = make_case(*BATCHES["mixed with padding and a sequence without queries"], device)
    roles = [PROMPT.value, STREAM.value, LEFT_OVER.value, PROMPT.value, 1] if has_roles else None
    few = {"max_query_len": 2} if role == STREAM else {}
    wanted = wanted_of(case, splits=splits, role=role.value, few=2, **few)
    wanted = wanted._replace(roles=None if roles is None else int32(roles, device))
    out = torch.full_like(case.q.flatten(1), 7.0)
    attention.launch_pages(*case.args[:3], Places(*case.args[3:]), wanted, out)
    expected = paged_attention.reference(*case.args, **case.options)
    for b, query_len in enumerate(case.query_lens):
        rows = slice(int(case.query_starts[b]), int(case.query_starts[b + 1]))
        found = roles[b] if roles else (STREAM if query_len <= 2 else PROMPT).value
        if found == role.value:
            assert_close(out[rows], expected[rows])
        elif role != PROMPT:  # whose runs are added up in all rows, and which comes first
            assert torch.equal(out[rows], torch.full_like(expected[rows], 7.0))


@pytest.mark.kernel
@pytest.mark.parametrize(("window", "splits"), [(None, None), (None, 3), (18, 1), (18, 2)])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_matches_reference(batch, window, splits, device):
    case = make_case(*batch, device)
    free_behind(case, window)
    actual = paged_attention.launch(*case.args, **case.options, window=window, splits=splits)
    assert_close(actual, paged_attention.reference(*case.args, **case.options, window=window))


@pytest.mark.kernel
@pytest.mark.parametrize("query_lens", [[1, 1], [1, 19]], ids=["decode", "mixed"])
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [
        ((2, 2), 64, torch.float16),
        ((4, 2), 80, torch.bfloat16),
        ((4, 1), 96, torch.float16),
        ((7, 1), 32, torch.float32),
        ((14, 2), 64, torch.float16),
        ((7, 1), 128, torch.bfloat16),
        ((2, 1), 200, torch.float16),
        ((20, 1), 32, torch.float16),
        ((2, 1), 192, torch.bfloat16),
    ],
)
def test_head_layouts(heads, head_dim, dtype, query_lens, device):
    case = make_case(query_lens, [31, 34], device, heads=heads, head_dim=head_dim, page_size=32, dtype=dtype)
    actual = paged_attention.launch(*case.args, **case.options)
    assert actual.dtype == dtype
    assert_close(actual, paged_attention.reference(*case.args, **case.options))


@pytest.mark.parametrize("body", BODIES)
def test_queries_and_pages_may_differ_in_dtype_and_be_views(body, device):
    case = make_case([2, 4], [20, 35], device, dtype=torch.float16)
    merged = torch.zeros(6, 9, 32, device=device)
    merged[:, 2:6] = case.q
    both = torch.stack([case.k_pages, case.v_pages], dim=1)
    strided = replace(case, q=merged[:, 2:6], k_pages=both[:, 0], v_pages=both[:, 1])
    actual = body(*strided.args, **case.options)
    assert actual.dtype == torch.float32
    assert_close(actual, written_out(case).float(), dtype=torch.float16)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("splits", [1, 3])
def test_order_permutes_features(body, splits, device):
    case = make_case([1, 6], [18, 6], device)
    order = torch.randperm(4 * 32, generator=torch.Generator().manual_seed(0)).int().to(device)
    plain = body(*case.args, **case.options, splits=splits)
    ordered = body(*case.args, **case.options, splits=splits, order=order)
    assert torch.equal(ordered, plain[:, order.long()])


@pytest.mark.parametrize("body", BODIES)
def test_padding_gives_zeros(body, device):
    case = make_case([1, 1], [0, 5], device)
    for splits in (1, 4):
        out = body(*case.args, **case.options, splits=splits)
        assert torch.equal(out[0], torch.zeros_like(out[0]))
        assert (out[1] != 0).all()


@pytest.mark.kernel
def test_arrival_counters_are_left_at_zero(device):
    case = make_case([1, 1, 1], [40, 0, 17], device)
    first, second = (paged_attention.launch(*case.args, **case.options, splits=3) for _ in range(2))
    assert torch.equal(first, second)
    assert not locks_of(case.q.device).any()


@pytest.mark.parametrize("body", BODIES)
def test_large_scores_do_not_overflow(body, device):
    case = make_case([1, 9], [30, 30], device)
    out = body(case.q * 1e4, *case.args[1:], **case.options, splits=2)
    assert torch.isfinite(out).all()


@pytest.mark.kernel
@pytest.mark.gpu
def test_two_runs_agree_to_the_bit(device):
    case = make_case([1, 1, 1], [700, 33, 1], device, heads=(8, 2), head_dim=64, dtype=torch.float16)
    runs = [paged_attention.launch(*case.args, **case.options, splits=8) for _ in range(50)]
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("body", BODIES)
@FEW
@given(data=st.data(), seed=seeds, context_len=st.integers(2, 40), window=st.sampled_from([None, 7]))
def test_chunks_equal_the_whole(body, data, seed, context_len, window, device):
    whole = make_case([context_len], [context_len], device, seed=seed)
    cut = data.draw(st.integers(1, context_len - 1))
    parts = [
        body(
            whole.q[start:stop],
            *whole.args[1:4],
            int32([0, stop - start], device),
            int32([stop], device),
            max_query_len=stop - start,
            scale=whole.options["scale"],
            window=window,
        )
        for start, stop in ((0, cut), (cut, context_len))
    ]
    assert_close(torch.cat(parts), body(*whole.args, **whole.options, window=window))


@pytest.mark.parametrize("body", BODIES)
@FEW
@given(seed=seeds, context_lens=st.lists(st.integers(1, 40), min_size=1, max_size=3), splits=st.sampled_from([1, 3]))
def test_where_pages_lie_does_not_matter(body, seed, context_lens, splits, device):
    case = make_case([1] * len(context_lens), context_lens, device, seed=seed)
    permutation = torch.randperm(len(case.k_pages), generator=torch.Generator().manual_seed(seed)).to(device)
    is_page = (case.page_table >= 0) & (case.page_table < len(permutation))
    table = torch.where(is_page, permutation.argsort()[case.page_table.clamp(0, len(permutation) - 1).long()], -7).int()
    moved = replace(
        case, k_pages=case.k_pages[permutation], v_pages=case.v_pages[permutation], page_table=table.contiguous()
    )
    expected = body(*case.args, **case.options, splits=splits)
    assert torch.equal(body(*moved.args, **case.options, splits=splits), expected)


@pytest.mark.kernel
@FEW
@given(seed=seeds, context_lens=st.lists(st.integers(0, 70), min_size=1, max_size=2), data=st.data())
def test_splits_do_not_change_the_result(seed, context_lens, data, device):
    query_lens = [data.draw(st.integers(0, min(n, 9))) for n in context_lens]
    query_lens[0] = max(query_lens[0], 1)
    case = make_case(query_lens, context_lens, device, seed=seed)
    expected = paged_attention.launch(*case.args, **case.options, splits=1)
    for splits in (2, 5):
        assert_close(paged_attention.launch(*case.args, **case.options, splits=splits), expected)


@given(
    group=st.integers(1, 64),
    max_query_len=st.integers(1, 4096),
    head_dim=st.integers(1, 256),
    page_size=st.integers(1, 32).map(lambda n: 16 * n),
    itemsize=st.sampled_from([2, 4]),
    schemes=st.sampled_from([("plain", "plain"), ("q8", "q4"), ("q6", "q6")]),
    arch=st.sampled_from(["sm_80", "sm_90", "gfx942", "gfx1100"]),
    is_crowded=st.booleans(),
)
def test_tiles_hold_a_group_and_lie_in_a_page(
    group, max_query_len, head_dim, page_size, itemsize, schemes, arch, is_crowded
):
    tiles = choose_tiles(max_query_len, group, head_dim, page_size, itemsize, schemes, arch, is_crowded=is_crowded)
    assert tiles.block_m >= max(8 if tiles.keys_first else 16, group)
    assert tiles.block_n >= 16
    assert page_size % tiles.block_n == 0


def test_splits_fill_the_device_and_no_more(device):
    for residents in (2, 6):
        assert choose_splits(1, 1000, residents, device) <= MAX_SPLITS
        assert choose_splits(1, 3, residents, device) == 3
        assert choose_splits(10_000, 1000, residents, device) == 1
        assert choose_splits(1, 0, residents, device) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"v_pages": KVPages.plain(torch.zeros(9, 2, 16, 16))}, ValueError, r"v_pages must be"),
        ({"context_lens": torch.zeros(1)}, TypeError, r"context_lens must be torch.int32, got torch.float32"),
        ({"query_starts": torch.zeros(3, dtype=torch.int32)}, ValueError, r"query_starts must be \[2\], got \[3\]"),
        ({"q": torch.zeros(1, 3, 32)}, ValueError, r"multiple of KV heads, got 3 and 2"),
        ({"q": torch.zeros(1, 4, 32, dtype=torch.int32)}, TypeError, r"q must be"),
        ({"order": torch.zeros(127, dtype=torch.int32)}, ValueError, r"order must be \[128\], got \[127\]"),
        ({"window": 0}, ValueError, r"window must be at least 1, got 0"),
        ({"splits": 0}, ValueError, r"splits must be at least 1, got 0"),
        ({"splits": 33}, ValueError, r"splits must be at most 32, got 33"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    case = make_case([1], [5], torch.device("cpu"))
    names = ("q", "k_pages", "v_pages", "page_table", "query_starts", "context_lens")
    arguments = dict(zip(names, case.args, strict=True)) | case.options | change
    tensors = [arguments.pop(name) for name in names]
    with pytest.raises(error, match=message):
        paged_attention(*tensors, **arguments)


def test_pages_must_be_whole_tiles():
    case = make_case([1], [5], torch.device("cpu"), page_size=24)
    with pytest.raises(ValueError, match="multiple of 16, got 24"):
        paged_attention(*case.args, **case.options)
