"""Prompts over coded pages: who is decoded for, what comes out, and when; GPUs alone run the kernel that wants it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qinfer.kernels import attention, attention_decoded, attention_wgmma
from qinfer.kernels.attention import paged_attention
from qinfer.kernels.attention_blocks import LEFT_OVER, PROMPT, STREAM, Places
from qinfer.kernels.attention_decoded import decode_prompts
from qinfer.kernels.attention_wgmma import launch_prompt, takes_prompt
from qinfer.kernels.kv_codec import CODECS, KVPages
from qinfer.kernels.kv_decode import kv_decode
from tests.compare import assert_close
from tests.kernels.coded import coded
from tests.kernels.test_attention import free_behind, make_case, wanted_of

FORMATS = [("q4", "q4"), ("q6", "q6"), ("q8", "q4"), ("fp8", "fp8"), ("fp8_e5m2", "q6")]
STEPS = {
    "a prompt": ([512], [512]),
    "a chunk": ([600], [900]),
    "streams, prompts, drafts and padding": ([1, 1, 500, 4, 5, 0, 40, 3], [300, 1, 900, 270, 5, 0, 40, 0]),
    "padding beside a stream": ([1, 600], [300, 0]),
}


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize(("window", "splits"), [(None, None), (300, None), (None, 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
@pytest.mark.parametrize("batch", STEPS.values(), ids=STEPS)
def test_matches_reference(batch, formats, dtype, window, splits, hopper, monkeypatch):
    case = make_case(*batch, hopper, heads=(8, 2), head_dim=128, page_size=256, dtype=dtype)
    free_behind(case, window)
    pages = [coded(x, CODECS[name]) for x, name in zip((case.k_pages, case.v_pages), formats, strict=True)]
    args = (case.q, *pages, case.page_table, case.query_starts, case.context_lens)
    launches = []

    def spy(*args: Any) -> None:
        launches.append(args)
        launch_prompt(*args)

    monkeypatch.setattr(attention, "launch_prompt", spy)
    actual = paged_attention.launch(*args, **case.options, window=window, splits=splits)
    assert len(launches) == 1
    assert_close(actual, paged_attention.reference(*args, **case.options, window=window))


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize("heads", [(3, 3), (24, 1), (64, 1)], ids=str)
def test_groups_of_any_size(heads, hopper):
    case = make_case(*STEPS["streams, prompts, drafts and padding"], hopper, heads=heads, page_size=64)
    pages = [coded(x, CODECS["q8"]) for x in (case.k_pages, case.v_pages)]
    args = (case.q.half(), *pages, case.page_table, case.query_starts, case.context_lens)
    actual = paged_attention.launch(*args, **case.options)
    assert_close(actual, paged_attention.reference(*args, **case.options))


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize("room", [2, 5, 7])
def test_prompts_that_find_no_room_read_the_codes(room, hopper, monkeypatch):
    batch = STEPS["streams, prompts, drafts and padding"]
    case = make_case(*batch, hopper, heads=(8, 2), head_dim=128, page_size=256, dtype=torch.float16)
    pages = [coded(x, CODECS["q4"]) for x in (case.k_pages, case.v_pages)]
    args = (case.q, *pages, case.page_table, case.query_starts, case.context_lens)
    monkeypatch.setattr(attention_decoded, "MAX_BYTES", room * 2 * case.k_pages[0].nbytes)
    actual = paged_attention.launch(*args, **case.options)
    assert_close(actual, paged_attention.reference(*args, **case.options))


def test_decodes_what_it_says(monkeypatch):
    case = make_case([1, 520], [9, 520], torch.device("cpu"), heads=(4, 2), page_size=64, dtype=torch.float16)
    pages = tuple(coded(x, CODECS["q8"]) for x in (case.k_pages, case.v_pages))
    wanted, places = wanted_of(case, few=4), Places(*case.args[3:])
    assert decode_prompts(case.q, *pages, places, wanted) is None, "no interpreter does"
    monkeypatch.setattr(attention_wgmma, "arch", lambda _: "sm_90")
    monkeypatch.setattr(kv_decode, "launch", kv_decode.reference)
    decoded = decode_prompts(case.q, *pages, places, wanted)
    assert decoded.keys.codec.name == decoded.values.codec.name == "fp16"
    assert takes_prompt(case.q, decoded.keys, decoded.values, wanted)
    assert decoded.roles.tolist() == [STREAM.value, PROMPT.value, 0]
    assert len(decoded.keys.codes) == len(case.k_pages)
    assert decoded.may_be_full, "two sequences may share pages, and both see all"
    assert decode_prompts(case.q.bfloat16(), *pages, places, wanted).keys.codec.name == "bf16"
    lone = Places(places.page_table[1:], places.query_starts[1:] - 1, places.context_lens[1:])
    decoded = decode_prompts(case.q[1:], *pages, lone, wanted._replace(few=0))
    assert (decoded.roles.tolist(), decoded.may_be_full) == ([PROMPT.value, 0], False)
    plain = KVPages.plain(case.k_pages)
    for sides in ((plain, plain), (plain, pages[1]), (pages[0], plain)):
        assert decode_prompts(case.q, *sides, places, wanted) is None
    for changes in ({"invariant": True}, {"max_query_len": 1}):
        assert decode_prompts(case.q, *pages, places, wanted._replace(**changes)) is None
    monkeypatch.setattr(attention_decoded, "MIN_TOKENS", 522)
    assert decode_prompts(case.q, *pages, places, wanted) is None
    assert decode_prompts(case.q[1:], *pages, lone, wanted) is not None
    monkeypatch.setattr(attention_decoded, "MAX_BYTES", 9 * 2 * case.k_pages[0].nbytes - 1)
    decoded = decode_prompts(case.q[1:], *pages, lone, wanted)
    assert decoded.may_be_full
    assert len(decoded.keys.codes) == 8
    assert decoded.roles.tolist() == [LEFT_OVER.value, 1]
    monkeypatch.setattr(attention_decoded, "MAX_BYTES", 2 * case.k_pages[0].nbytes - 1)
    assert decode_prompts(case.q[1:], *pages, lone, wanted) is None
