"""Attention of prompts on Hopper against the reference, the other kernel and its own limits; GPUs alone run it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qinfer.kernels import attention_wgmma as module
from qinfer.kernels.attention import paged_attention
from qinfer.kernels.attention_blocks import Wanted
from qinfer.kernels.attention_wgmma import FEW_ROWS, launch_prompt, takes_prompt
from qinfer.kernels.kv_codec import CODECS, KVPages
from tests.compare import assert_close
from tests.kernels.coded import coded
from tests.kernels.test_attention import Case, free_behind, make_case

BATCHES = {
    "a prompt": ([200], [200]),
    "a prompt that ends with a tile": ([256], [256]),
    "a chunk": ([130], [700]),
    "a chunk of one block": ([32], [517]),
    "prompts, chunks, streams and padding": ([1, 77, 0, 300, 128, 5, 3], [300, 77, 0, 650, 129, 0, 3]),
}


def _prompts(batch: tuple[list[int], list[int]], device: torch.device, **options: Any) -> Case:
    options = {"heads": (8, 2), "head_dim": 64, "page_size": 256, "dtype": torch.float16} | options
    return make_case(*batch, device, **options)


def _attend(monkeypatch: pytest.MonkeyPatch, case: Case, **options: Any) -> Tensor:
    """Run the kernel for prompts, or fail."""
    launches = []

    def spy(*args: Any) -> None:
        launches.append(args)
        launch_prompt(*args)

    monkeypatch.setattr("qinfer.kernels.attention.launch_prompt", spy)
    out = paged_attention.launch(*case.args, **case.options, **options)
    assert len(launches) == 1
    return out


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("window", [None, 1, 100, 300])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_matches_reference(batch, window, splits, hopper, monkeypatch):
    case = _prompts(batch, hopper)
    free_behind(case, window)
    actual = _attend(monkeypatch, case, window=window, splits=splits)
    assert_close(actual, paged_attention.reference(*case.args, **case.options, window=window))


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("page_size", [64, 128, 192, 256])
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [
        ((4, 1), 128, torch.float16),
        ((4, 4), 128, torch.bfloat16),
        ((7, 1), 128, torch.bfloat16),
        ((14, 2), 64, torch.float16),
        ((20, 1), 32, torch.float16),
        ((64, 1), 64, torch.float16),
        ((4, 2), 80, torch.bfloat16),
        ((4, 1), 96, torch.float16),
        ((2, 1), 200, torch.float16),
        ((2, 1), 256, torch.float16),
        ((8, 1), 256, torch.bfloat16),
    ],
)
def test_head_layouts(heads, head_dim, dtype, page_size, splits, hopper, monkeypatch):
    case = _prompts(([1, 90], [270, 333]), hopper, heads=heads, head_dim=head_dim, dtype=dtype, page_size=page_size)
    actual = _attend(monkeypatch, case, splits=splits)
    assert actual.dtype == dtype
    assert_close(actual, paged_attention.reference(*case.args, **case.options))


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize("softcap", [2.0, 50.0])
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("splits", [1, 2])
def test_capped_scores(softcap, window, splits, hopper, monkeypatch):
    case = _prompts(([90, 40], [333, 40]), hopper)
    case.q.mul_(4)
    actual = _attend(monkeypatch, case, softcap=softcap, window=window, splits=splits)
    assert_close(actual, paged_attention.reference(*case.args, **case.options, softcap=softcap, window=window))


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
def test_queries_and_pages_may_differ_in_dtype_and_be_views(dtypes, hopper, monkeypatch):
    case = _prompts(([50, 70], [60, 300]), hopper, dtype=dtypes[1])
    merged = torch.zeros(120, 12, 64, dtype=dtypes[0], device=hopper)
    merged[:, 3:11] = case.q
    both = torch.stack([case.k_pages, case.v_pages], dim=1)
    strided = replace(case, q=merged[:, 3:11], k_pages=both[:, 0], v_pages=both[:, 1])
    actual = _attend(monkeypatch, strided)
    assert actual.dtype == dtypes[0]
    expected = paged_attention.reference(*strided.args, **case.options)
    assert_close(actual, expected, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize("splits", [1, 3])
def test_order_permutes_features(splits, hopper, monkeypatch):
    case = _prompts(([70, 40], [300, 40]), hopper)
    order = torch.randperm(8 * 64, generator=torch.Generator().manual_seed(0)).int().to(hopper)
    plain = _attend(monkeypatch, case, splits=splits)
    ordered = _attend(monkeypatch, case, splits=splits, order=order)
    assert torch.equal(ordered, plain[:, order.long()])


@pytest.mark.gpu
@pytest.mark.kernel
def test_large_scores_do_not_overflow(hopper, monkeypatch):
    case = _prompts(([200], [300]), hopper)
    large = replace(case, q=case.q * 1e3)
    assert torch.isfinite(_attend(monkeypatch, large, splits=2)).all()


@pytest.mark.gpu
@pytest.mark.kernel
def test_two_runs_agree_to_the_bit(hopper, monkeypatch):
    case = _prompts(([1, 600, 200], [500, 900, 200]), hopper, head_dim=128)
    runs = [_attend(monkeypatch, case) for _ in range(50)]
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.gpu
@pytest.mark.kernel
def test_a_row_does_not_depend_on_its_neighbours(hopper, monkeypatch):
    """Blocks of other sequences, and where in the batch its own stands, leave a sequence as it is."""
    case = _prompts(BATCHES["prompts, chunks, streams and padding"], hopper)
    together = _attend(monkeypatch, case, splits=1)
    for b, query_len in enumerate(case.query_lens):
        if query_len * 4 > FEW_ROWS:
            rows = slice(int(case.query_starts[b]), int(case.query_starts[b + 1]))
            alone = replace(
                case,
                q=case.q[rows],
                page_table=case.page_table[b : b + 1],
                query_starts=torch.tensor([0, query_len], dtype=torch.int32, device=hopper),
                context_lens=case.context_lens[b : b + 1],
            )
            assert torch.equal(_attend(monkeypatch, alone, splits=1), together[rows])


def test_takes_what_it_says(monkeypatch):
    case = make_case([40], [40], torch.device("cpu"), heads=(4, 2), head_dim=32, page_size=64, dtype=torch.float16)
    q, k_pages, v_pages = case.args[:3]
    wanted = Wanted(40, 0.1, None, None, None, None, False)
    assert not takes_prompt(q, k_pages, v_pages, wanted), "no interpreter does"
    monkeypatch.setattr(module, "arch", lambda _: "sm_90")
    assert takes_prompt(q, k_pages, v_pages, wanted)
    assert takes_prompt(q.bfloat16(), k_pages, v_pages, wanted)
    for other in (wanted._replace(max_query_len=32), wanted._replace(scale=-0.1), wanted._replace(invariant=True)):
        assert not takes_prompt(q, k_pages, v_pages, other)
    assert not takes_prompt(q.float(), k_pages, v_pages, wanted)
    assert not takes_prompt(q, k_pages, KVPages.plain(case.v_pages.bfloat16()), wanted)
    both = (case.k_pages, case.v_pages)
    assert not takes_prompt(q, *(KVPages.plain(x.float()) for x in both), wanted)
    assert not takes_prompt(q, *(KVPages.plain(x[:, :, :48]) for x in both), wanted)
    assert not takes_prompt(q, *(coded(x, CODECS["q8"]) for x in both), wanted)
    shifted = torch.zeros(case.k_pages.numel() + 1, dtype=torch.float16)[1:].view(case.k_pages.shape)
    assert not takes_prompt(q, KVPages.plain(shifted), v_pages, wanted)
    for head_dim in (36, 264):
        pages = [KVPages.plain(torch.zeros(1, 2, 64, head_dim).half()) for _ in range(2)]
        assert not takes_prompt(torch.zeros(40, 4, head_dim).half(), *pages, wanted)
