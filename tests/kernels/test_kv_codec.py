"""The codecs of the KV cache: laws that hold for all of them, for the reference and for the kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from qinfer.errors import UnsupportedError
from qinfer.kernels.attention import paged_attention
from qinfer.kernels.kv_codec import CODECS, KVPages, decode, encode, rotated, run_length
from qinfer.kernels.kv_write import kv_write, rope_write
from qinfer.kernels.rope import rope
from tests.compare import assert_close
from tests.kernels.coded import coded, loss, poisoned
from tests.kernels.test_attention import make_case, written_out
from tests.strategies import FLOAT_DTYPES, random_tensor, seeds

BODIES = [kv_write.reference, pytest.param(kv_write.launch, marks=pytest.mark.kernel)]
EVERY_CODEC = pytest.mark.parametrize("name", CODECS)
CODED = [name for name, codec in CODECS.items() if codec.scheme != "plain"]
FEW = settings(max_examples=4)
# The scale is rounded to bf16 and the sums of the rotation to fp32.
SLACK = 1.005


def ints(values: list[int], device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@EVERY_CODEC
@pytest.mark.parametrize("head_dim", [32, 80])
@pytest.mark.parametrize("body", BODIES)
@FEW
@given(seed=seeds, dtype=st.sampled_from(FLOAT_DTYPES), size=st.sampled_from([1e-3, 1.0, 300.0]), data=st.data())
def test_a_row_loses_half_a_step_and_other_rows_nothing(body, head_dim, name, seed, dtype, size, data, device):
    codec = CODECS[name]
    slots = data.draw(st.lists(st.integers(-1, 3 * 16 - 1), min_size=1, max_size=4, unique=True))
    k, v = (random_tensor(len(slots), 2, head_dim, seed=seed + i, dtype=dtype, scale=size).to(device) for i in range(2))
    k[:, :, seed % head_dim] *= 30  # an outlier
    v[0, 1] = 0.0
    sides = [poisoned(codec, 3, 2, 16, head_dim, device) for _ in "kv"]
    before = [[tensor.clone() for tensor in pages.tensors()] for pages in sides]
    body(k, v, *sides, ints(slots, device))
    kept = [slot for slot in slots if slot >= 0]
    page, offset = (torch.tensor(kept, dtype=torch.long) // 16).to(device), torch.tensor(kept, dtype=torch.long) % 16
    rows = torch.tensor([i for i, slot in enumerate(slots) if slot >= 0], dtype=torch.long, device=device)
    for x, pages, old in zip((k, v), sides, before, strict=True):
        index = (page, slice(None), offset.to(device))
        scales = None if pages.scales is None else pages.scales[index].cpu()
        assert loss(x[rows].cpu(), pages.decode(index).cpu(), scales, codec) <= SLACK
        for tensor, was in zip(pages.tensors(), old, strict=True):
            was[index] = tensor[index]
            torch.testing.assert_close(tensor, was, rtol=0, atol=0, equal_nan=True)
    if 0 in rows:
        assert not sides[1].decode((page[:1], slice(None), offset[:1].to(device)))[0, 1].any()


@pytest.mark.kernel
@EVERY_CODEC
@pytest.mark.parametrize("head_dim", [64, 96])
def test_kernel_writes_what_the_reference_writes(name, head_dim, device):
    k, v = (random_tensor(5, 3, head_dim, seed=i, dtype=torch.float16).to(device) for i in range(2))
    actual, expected = ([poisoned(CODECS[name], 2, 3, 16, head_dim, device) for _ in "kv"] for _ in range(2))
    slots = ints([3, 31, -1, 0, 16], device)
    kv_write.launch(k, v, *actual, slots)
    kv_write.reference(k, v, *expected, slots)
    for a, e in zip(actual, expected, strict=True):
        # Sums in another order may round to the neighbour of a code that lies between two.
        differ = (a.codes != e.codes) & ~(a.codes.isnan() & e.codes.isnan())
        assert int(differ.sum()) <= (1 if CODECS[name].has_scales else 0)
        for one, other in zip(a.tensors()[1:], e.tensors()[1:], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.kernel
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("names", "dtype", "head_dim", "half", "heads"),
    [
        (("fp16", "fp16"), torch.float16, 32, 16, (4, 2)),
        (("fp32", "fp8"), torch.float32, 80, 20, (9, 3)),
        (("q8", "q4"), torch.bfloat16, 64, 32, (2, 1)),
    ],
)
def test_rope_write_is_rope_and_then_kv_write(names, dtype, head_dim, half, heads, interleaved, device):
    num_heads, num_kv_heads = heads
    merged = random_tensor(3, num_heads + 2 * num_kv_heads, head_dim, seed=1, dtype=dtype).to(device)
    angles = torch.outer(torch.arange(40.0), 100.0 ** (-torch.arange(half) / half)).to(device)
    cos, sin, positions, slots = angles.cos(), angles.sin(), ints([39, 0, 7], device), ints([17, -1, 2], device)
    sizes = (2, num_kv_heads, 16, head_dim, device)
    fused, steps, plain = ([poisoned(CODECS[name], *sizes) for name in names] for _ in range(3))
    tables = cos, sin, positions
    turned = rope_write.launch(merged.flatten(1), *tables, *fused, slots, interleaved=interleaved)
    rope_write.reference(merged.flatten(1), *tables, *plain, slots, interleaved=interleaved)
    q, k, v = merged.clone().split([num_heads, num_kv_heads, num_kv_heads], 1)
    rope.launch(q, k, *tables, interleaved=interleaved)
    kv_write.launch(k, v, *steps, slots)
    # A multiply and an add may be one rounding in one kernel and two in the other, which only fp32 shows.
    assert_close(turned, q) if dtype == torch.float32 else torch.testing.assert_close(turned, q, rtol=0, atol=0)
    written = (torch.tensor([1, 0]), slice(None), torch.tensor([1, 2]))
    for one, two, three in zip(fused, steps, plain, strict=True):
        for a, b in zip(one.tensors(), two.tensors(), strict=True):
            tolerance = 1e-6 if a.dtype == torch.float32 else 0
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        assert_close(one.decode(written), three.decode(written), dtype=torch.bfloat16)


PAIRS = [*((name, name) for name in CODED), ("q8", "q4"), ("fp16", "q6"), ("q4", "fp32")]


@pytest.mark.kernel
@pytest.mark.parametrize(("keys", "values"), PAIRS)
@pytest.mark.parametrize(
    ("query_lens", "context_lens", "heads", "head_dim", "dtype", "splits"),
    [
        ([1, 1, 1], [40, 0, 17], (4, 2), 64, torch.float16, 1),
        ([1, 20], [50, 33], (7, 1), 32, torch.bfloat16, 3),
        ([1, 1], [64, 3], (2, 1), 80, torch.float32, 2),
    ],
)
def test_attention_over_codes_is_attention_over_what_they_stand_for(
    keys, values, query_lens, context_lens, heads, head_dim, dtype, splits, device
):
    case = make_case(query_lens, context_lens, device, heads=heads, head_dim=head_dim, dtype=torch.float32)
    q = case.q.to(dtype)
    # Values of a size at which probabilities times scales would vanish in fp16.
    sides = coded(case.k_pages * 3, CODECS[keys]), coded(case.v_pages * 1e-4, CODECS[values])
    options = case.options | {"window": 30}
    actual = paged_attention.launch(q, *sides, *case.args[3:], **options, splits=splits)
    assert actual.dtype == dtype
    plain = [KVPages.plain(pages.decode()) for pages in sides]
    expected = paged_attention.reference(q, *plain, *case.args[3:], **options)
    is_rounded = dtype == torch.float32 and "fp16" in (keys, values)
    assert_close(actual, expected, dtype=torch.float16 if is_rounded else dtype)


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["q8", "q6", "q4"])
@pytest.mark.parametrize(
    ("heads", "head_dim", "queries"), [((16, 1), 128, 1), ((1, 1), 128, 3), ((16, 1), 256, 1), ((1, 1), 256, 3)]
)
def test_attention_over_codes_of_large_heads(heads, head_dim, queries, name, device):
    case = make_case([queries], [35], device, heads=heads, head_dim=head_dim, page_size=32)
    sides = [coded(pages, CODECS[name]) for pages in (case.k_pages, case.v_pages)]
    q = case.q.half()
    actual = paged_attention.launch(q, *sides, *case.args[3:], **case.options)
    plain = [KVPages.plain(pages.decode()) for pages in sides]
    assert_close(actual, paged_attention.reference(q, *plain, *case.args[3:], **case.options))


@pytest.mark.kernel
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("name", CODED)
def test_values_of_zeros_only_count_as_keys(name, splits, device):
    """They have the scale 0; the first sequence begins with pages of them, the second holds nothing else."""
    case = make_case([1, 2], [60, 60], device)
    for pages in (case.page_table[0, :3], case.page_table[1, :4]):
        case.v_pages[pages.long()] = 0.0
    sides = [coded(pages, CODECS[name]) for pages in (case.k_pages, case.v_pages)]
    actual = paged_attention.launch(case.q.half(), *sides, *case.args[3:], **case.options, splits=splits)
    plain = [KVPages.plain(pages.decode()) for pages in sides]
    expected = paged_attention.reference(case.q.half(), *plain, *case.args[3:], **case.options)
    assert_close(actual[:1], expected[:1])
    assert not actual[1:].any()


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["fp8", "q6"])
def test_rows_of_codes_may_stand_apart(name, device):
    case = make_case([1], [18], device, heads=(4, 2), head_dim=32)
    dense = [coded(pages, CODECS[name]) for pages in (case.k_pages, case.v_pages)]
    # The strides of keys and of values differ from each other, and from what the head size says.
    apart = [
        KVPages(pad(pages.codes, (0, gap), value=255)[..., :-gap], pages.scales, pages.codec)
        for pages, gap in zip(dense, (2, 8), strict=True)
    ]
    actual, expected = (
        paged_attention.launch(case.q.half(), *sides, *case.args[3:], **case.options) for sides in (apart, dense)
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", CODED)
def test_reference_attends_to_decoded_rows(name):
    case = make_case([1, 4], [20, 9], "cpu")
    sides = [coded(pages, CODECS[name]) for pages in (case.k_pages, case.v_pages)]
    actual = paged_attention.reference(case.q, *sides, *case.args[3:], **case.options)
    keys, values = (
        [decode(*encode(row, CODECS[name]), CODECS[name]) for row in rows] for rows in (case.keys, case.values)
    )
    assert_close(actual, written_out(type(case)(*(vars(case) | {"keys": keys, "values": values}).values())).float())


@pytest.mark.kernel
def test_queries_beyond_fp16_meet_coded_keys(device):
    case = make_case([1], [20], device, head_dim=64)
    sides = [coded(pages, CODECS["q8"]) for pages in (case.k_pages, case.v_pages)]
    q = (case.q * 1e6).bfloat16()
    options = case.options | {"scale": 1e-7}
    actual = paged_attention.launch(q, *sides, *case.args[3:], **options)
    assert_close(actual, paged_attention.reference(q, *sides, *case.args[3:], **options))


@given(seed=seeds, head_dim=st.sampled_from([16, 80, 96, 128, 192, 256]))
def test_rotation_is_its_own_inverse_and_keeps_products(seed, head_dim):
    x, y = (random_tensor(3, head_dim, seed=seed + i) for i in range(2))
    assert_close(rotated(rotated(x)), x)
    assert_close(rotated(x) @ rotated(y).t(), x @ y.t())
    # One number spreads evenly over its run.
    one = torch.zeros(head_dim)
    one[seed % head_dim] = 1.0
    run = run_length(head_dim)
    assert head_dim % run == 0
    assert_close(rotated(one).abs().sum(), torch.tensor(run**0.5))


def test_bytes_by_hand():
    x = rotated(torch.tensor([-1.0, 1.0, 0.5, 0.05] + [0.0] * 12))
    assert torch.equal(encode(x, CODECS["q8"])[0][:5], torch.tensor([1, 255, 192, 134, 128], dtype=torch.uint8))
    codes, scales = encode(x, CODECS["q4"])
    assert torch.equal(codes[:3], torch.tensor([0xF0, 0x8B, 0x88], dtype=torch.uint8))
    assert float(scales * 120) == pytest.approx(1.0, rel=2**-8)
    codes, _ = encode(x, CODECS["q6"])
    # Codes 0, 63, 47, 33: low halves 0 and F, F and 1; upper bits 00, 11, 10, 10, the first ones lowest.
    assert torch.equal(codes[[0, 1, 8]], torch.tensor([0xF0, 0x1F, 0b10_10_11_00], dtype=torch.uint8))
    assert torch.equal(
        encode(torch.tensor([1.0, -3.3, 1e9]), CODECS["fp8_e5m2"])[0].int(), torch.tensor([60, 195, 123])
    )
    assert torch.equal(encode(torch.tensor([448.0, -1.0]), CODECS["fp8"])[0].int(), torch.tensor([0x7E, 0xB8]))


@pytest.mark.parametrize("name", ["q8", "q6", "q4"])
def test_head_sizes_that_cannot_be_rotated_are_refused(name):
    with pytest.raises(
        UnsupportedError, match="multiple of 16, got 24; fp16, bf16, fp32, fp8 and fp8_e5m2 take any even one"
    ):
        CODECS[name].width(24)


@pytest.mark.parametrize("name", ["fp8", "fp8_e5m2"])
def test_odd_head_sizes_have_no_bytes_in_pairs(name):
    assert CODECS[name].width(24) == 24
    with pytest.raises(UnsupportedError, match="even head size, got 25; fp16, bf16 and fp32 take any"):
        CODECS[name].width(25)


@pytest.mark.parametrize(
    ("pages", "error", "text"),
    [
        (KVPages(torch.zeros(2, 1, 16, 16, dtype=torch.uint8), None, CODECS["q4"]), ValueError, "must have scales"),
        (KVPages(torch.zeros(2, 1, 16, 32, dtype=torch.uint8), None, CODECS["q4"]), ValueError, r"\[2, 1, 16, 16\]"),
        (KVPages(torch.zeros(2, 1, 16, 32), None, CODECS["fp16"]), TypeError, "float16 in format fp16, got"),
        (
            KVPages(torch.zeros(2, 1, 16, 16, dtype=torch.uint8), torch.zeros(2, 1, 16), CODECS["q4"]),
            TypeError,
            "must be bfloat16 .* got torch.float32",
        ),
    ],
)
def test_pages_that_contradict_their_codec_are_refused(pages, error, text):
    with pytest.raises(error, match=text):
        pages.check("k_pages", (2, 1, 16, 32))
