"""kv_decode: kernel against reference, on what prompts see, whatever stands in the rest."""

from __future__ import annotations

import pytest
import torch

from qinfer.kernels.attention_blocks import LEFT_OVER, PROMPT, STREAM
from qinfer.kernels.kv_codec import CODECS, KVPages
from qinfer.kernels.kv_decode import kv_decode
from tests.compare import assert_close
from tests.kernels.coded import coded
from tests.kernels.test_attention import BATCHES, GARBAGE_PAGES, free_behind, int32, make_case

CODED = [codec for codec in CODECS.values() if codec.scheme != "plain"]
PAIRS = list(zip(CODED, CODED[1:] + CODED[:1], strict=True))
ROLES = {"stream": STREAM.value, "prompt": PROMPT.value, "left over": LEFT_OVER.value}


def assert_decoded(case, codecs, *, window=None, **options) -> list[str]:
    """Compare all that prompts see, and return the roles."""
    pages = [coded(x, codec) for x, codec in zip((case.k_pages, case.v_pages), codecs, strict=True)]
    args = (case.page_table, case.query_starts, case.context_lens, *pages)
    out, expected = (body(*args, window=window, **options) for body in (kv_decode.launch, kv_decode.reference))
    assert torch.equal(out.roles, expected.roles)
    page_size = case.k_pages.shape[2]
    for b, (query_len, length) in enumerate(zip(case.query_lens, case.context_lens.tolist(), strict=True)):
        if out.roles[b] == ROLES["prompt"]:
            seen = 0 if window is None else max(0, length - query_len - window + 1) // page_size
            places = out.page_table[b, seen : -(-length // page_size)].long()
            assert torch.equal(places, expected.page_table[b, seen : -(-length // page_size)].long())
            for x, wanted in ((out.keys, expected.keys), (out.values, expected.values)):
                assert (x.shape, x.dtype) == (wanted.shape, options["dtype"])
                rows, wanted_rows = (y[places].transpose(0, 1).flatten(1, 2) for y in (x, wanted))
                assert_close(rows[:, : length - seen * page_size], wanted_rows[:, : length - seen * page_size])
    return [next(name for name, role in ROLES.items() if role == found) for found in out.roles[:-1].tolist()]


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("codecs", PAIRS, ids=lambda codecs: f"{codecs[0].name}-{codecs[1].name}")
@pytest.mark.parametrize(("head_dim", "page_size"), [(32, 16), (80, 48), (128, 32)])
@pytest.mark.parametrize("window", [None, 18])
def test_what_is_seen_is_decoded(codecs, dtype, head_dim, page_size, window, device):
    case = make_case(
        *BATCHES["mixed with padding and a sequence without queries"], device, head_dim=head_dim, page_size=page_size
    )
    free_behind(case, window)
    roles = assert_decoded(case, codecs, dtype=dtype, max_pages=len(case.k_pages), window=window)
    assert roles == ["prompt", "stream", "prompt", "prompt"]


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("max_pages", "min_queries", "roles"),
    [
        (9, 1, "prompt prompt stream prompt prompt"),
        (8, 1, "prompt prompt stream prompt prompt"),
        (7, 1, "prompt prompt stream prompt left_over"),
        (5, 1, "prompt prompt stream left_over left_over"),
        (2, 1, "left_over left_over stream left_over left_over"),
        (5, 2, "stream prompt stream prompt prompt"),
        (4, 4, "stream stream stream prompt stream"),
        (1, 8, "stream stream stream stream stream"),
    ],
)
def test_there_is_room_for_whole_sequences_in_their_order(max_pages, min_queries, roles, device):
    # Pages of 16 tokens: 3, 2, 1, 1 and 2 are seen.
    case = make_case([1, 2, 0, 7, 3], [40, 30, 9, 16, 17], device)
    case.page_table[2] = int(GARBAGE_PAGES[0])
    if min_queries > 1:
        case.page_table[0] = int(GARBAGE_PAGES[0])
    codecs = (CODECS["q8"], CODECS["fp8"])
    found = assert_decoded(case, codecs, dtype=torch.float16, max_pages=max_pages, min_queries=min_queries)
    assert found == [role.replace("_", " ") for role in roles.split()]


@pytest.mark.kernel
def test_pages_that_are_shared_are_decoded_for_each(device):
    case = make_case([3, 3], [35, 35], device)
    case.page_table[1, :2] = case.page_table[0, :2]
    codecs = (CODECS["q4"], CODECS["q6"])
    assert assert_decoded(case, codecs, dtype=torch.float16, max_pages=6) == ["prompt"] * 2


def test_what_does_not_fit_is_refused():
    case = make_case([1], [10], torch.device("cpu"))
    tables, pages = (case.page_table, case.query_starts, case.context_lens), coded(case.k_pages, CODED[0])
    options = {"dtype": torch.float16, "max_pages": 1}
    plain, narrow = KVPages.plain(case.k_pages.half()), coded(case.k_pages[..., :16], CODED[0])
    with pytest.raises(ValueError, match="v_pages must hold codes, got format fp16"):
        kv_decode(*tables, pages, plain, **options)
    with pytest.raises(ValueError, match="v_pages"):
        kv_decode(*tables, pages, narrow, **options)
    for option in ("window", "min_queries", "max_pages"):
        with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
            kv_decode(*tables, pages, pages, **options | {option: 0})
    with pytest.raises(ValueError, match=r"context_lens must be \[1\], got \[2\]"):
        kv_decode(*tables[:2], int32([10, 10], torch.device("cpu")), pages, pages, **options)
    with pytest.raises(TypeError, match=r"context_lens must be torch\.int32"):
        kv_decode(*tables[:2], case.context_lens.long(), pages, pages, **options)
