"""The draw: kernel and reference agree bit for bit, and the reference does what its formulas say."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qinfer.kernels.sample import MAX_VOCABULARY, NUM_BUCKETS, sample_rows
from qinfer.kernels.token_weights import ONE, token_weights, weights_below
from tests.strategies import random_tensor

INF, NAN = math.inf, math.nan
LOG2_E = math.log2(math.e)
kernel = pytest.mark.kernel


def table(*rows: tuple[float, ...]) -> Tensor:
    """Rows of temperature, top_k, top_p, min_p and uniform number as the op takes them."""
    numbers = [
        (0.0 if t == 0 else LOG2_E / t, k, p, max(1, math.ceil(min_p * ONE)), uniform)
        for t, k, p, min_p, uniform in rows
    ]
    return torch.tensor(numbers, dtype=torch.float64)


def agree(logits: Tensor, columns: Tensor, device: torch.device, *, filtered: bool = True) -> list[int]:
    """Run both bodies and return the ids that both give."""
    expected = sample_rows.reference(logits, columns, filtered=filtered)
    ids = sample_rows.launch(logits.to(device), columns.to(device), filtered=filtered)
    assert ids.dtype == expected.dtype == torch.int64
    assert ids.tolist() == expected.tolist()
    return ids.tolist()


@kernel
def test_every_kind_of_row_at_once(device: torch.device) -> None:
    """Two chunks and a rest; ties, filters of all widths, greedy and broken rows side by side."""
    logits = torch.randn(12, 8300) * 4
    logits[:, 8200:] = logits[:, :100]
    logits[1, 8299] = logits[1].max() + 1
    logits[3, 8250] = NAN
    logits[4] = -INF
    logits[5, 4000:] = -INF
    logits[8, 77] = INF
    columns = table(
        (0.7, 5, 1.0, 0.0, 0.9),
        (0.0, 3, 0.5, 0.0, 0.3),
        (1.0, 0, 0.9, 0.0, 0.8),
        (1.0, 5, 0.9, 0.0, 0.1),
        (1.0, 5, 0.9, 0.0, 0.1),
        (1.5, 40, 0.8, 0.05, 0.999),
        (3.0, 0, 1.0, 0.01, 0.77),
        (2.0, 9000, 0.99, 0.0, 0.6),
        (0.0, 0, 1.0, 0.0, 0.0),
        (1e-9, 7, 0.3, 1.0, 0.5),
        (4.0, 0, 0.9, 0.0, 0.6),  # more tokens before the cut than registers hold
        (1.5, 40, 1.0, 0.4, 0.999),  # min-p cuts what top-k has left
    )
    ids = agree(logits, columns, device)
    assert [i for i, token in enumerate(ids) if token == -1] == [3, 4, 8]
    assert ids[1] == 8299
    assert ids[9] == logits[9].argmax().item()


@kernel
def test_equal_tokens_fill_more_than_a_block(device: torch.device) -> None:
    """All candidates are tied and more than registers hold, so ids decide, and zeros have no sign."""
    logits = torch.zeros(1, 3000)
    logits[:, ::3] = -0.0
    assert agree(logits, table((1.0, 2900, 0.8, 0.0, 1 - 2**-53)), device) == [2319]


@kernel
def test_target_at_a_border(device: torch.device) -> None:
    """The first token whose sum exceeds the target, not the one that reaches it."""
    logits = torch.zeros(2, 40)
    logits[:, 5::5] = 3.0
    columns = table((1.0, 4, 1.0, 0.0, 0.0), (1.0, 4, 1.0, 0.0, 0.5))
    assert agree(logits, columns, device) == [5, 15]
    assert agree(logits, table((1.0, 0, 1.0, 1.0, 0.0), (1.0, 0, 1.0, 1.0, 2 / 7)), device, filtered=False) == [5, 15]


@kernel
def test_without_filters(device: torch.device) -> None:
    logits = torch.randn(3, 4100) * 2
    columns = table((1.0, 0, 1.0, 0.0, 0.4), (0.5, 0, 1.0, 0.1, 0.999), (0.0, 0, 1.0, 0.0, 0.0))
    ids = agree(logits, columns, device, filtered=False)
    assert ids[2] == logits[2].argmax().item()
    assert ids == sample_rows.reference(logits, columns, filtered=True).tolist()


@kernel
def test_rows_may_be_strided(device: torch.device) -> None:
    wide = torch.randn(3, 200)
    columns = table(*[(1.0, 4, 0.9, 0.0, 0.6)] * 3)
    ids = sample_rows.launch(wide.to(device)[:, :150], columns.to(device), filtered=True)
    assert ids.tolist() == sample_rows.reference(wide[:, :150].clone(), columns, filtered=True).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [2048, 128256, 151936, 262144])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_agrees_on_real_vocabularies(vocabulary: int, scale: float) -> None:
    kinds = [(0, 1.0), (1, 1.0), (50, 0.95), (0, 0.9), (0, 0.999), (1000, 1.0), (20000, 0.5)]
    rows = [(0.6 + 0.2 * (i % 5), *kinds[i % 7], 0.02 * (i % 3), (i + 0.5) / 35) for i in range(35)]
    agree(torch.randn(35, vocabulary) * scale, table(*rows), torch.device("cuda"))


@pytest.mark.gpu
def test_repeats_bit_for_bit() -> None:
    logits = torch.randn(16, 128256, device="cuda") * 2
    columns = table(*[(1.0, 50, 0.95, 0.0, (i + 0.5) / 16) for i in range(16)]).cuda()
    first = sample_rows(logits, columns, filtered=True)
    assert all(torch.equal(first, sample_rows(logits, columns, filtered=True)) for _ in range(20))


@given(st.floats(0, 50), st.floats(0.01, 30))
def test_weights_are_powers(below: float, rate: float) -> None:
    """Within one of 2^44 * 2^-t, and exactly 2^44 for the likeliest."""
    weights = token_weights(
        torch.tensor([[0.0, below]], dtype=torch.float64), torch.tensor([[rate]], dtype=torch.float64)
    )
    assert int(weights[0, 0]) == ONE
    assert abs(int(weights[0, 1]) - ONE * 2.0 ** -min(below * rate, 64)) <= 0.51


@triton.jit
def _read_and_store_weights(p_x, p_weights, p_buckets, p_peak, p_rate, BLOCK: tl.constexpr):
    o_x = tl.arange(0, BLOCK)
    b_w, b_bucket = weights_below(tl.load(p_x + o_x), tl.load(p_peak), tl.load(p_rate))
    tl.store(p_weights + o_x, b_w)
    tl.store(p_buckets + o_x, b_bucket)


@kernel
@pytest.mark.parametrize("rate", [0.1, LOG2_E, 17.3, 1e300])
def test_weights_of_the_kernel_are_those_of_the_reference(rate: float, device: torch.device) -> None:
    """All bits, over the whole range of weights; buckets follow the logits."""
    logits = (8 - torch.rand(1024) * 50 / rate).sort(descending=True).values
    logits[0], logits[-1] = 8, -INF
    expected = token_weights((8 - logits[None]).double(), torch.tensor([[rate]], dtype=torch.float64))[0]
    columns = torch.tensor([8.0], device=device), torch.tensor([rate], dtype=torch.float64, device=device)
    weights, buckets = torch.empty_like(expected, device=device), torch.empty(1024, dtype=torch.int32, device=device)
    _read_and_store_weights[(1,)](logits.to(device), weights, buckets, *columns, BLOCK=1024, enable_fp_fusion=False)
    assert torch.equal(weights.cpu(), expected)
    assert (buckets.diff() >= 0).all()
    assert 0 <= buckets.min() <= buckets.max() < NUM_BUCKETS


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3, dtype=torch.float16)}, TypeError, "logits must be float32"),
        ({"logits": torch.zeros(3)}, ValueError, r"logits must be \[R, V\]"),
        ({"logits": torch.zeros(3, 2).T}, ValueError, "logits must have last stride 1"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "logits must have 1 to 524287 columns, got 0"),
        ({"table": torch.zeros(2, 5)}, TypeError, "table must be float64"),
        ({"table": torch.zeros(2, 4, dtype=torch.float64)}, ValueError, r"table must be \[2, 5\]"),
        ({"filtered": False}, ValueError, "filtered must be True"),
    ],
)
def test_refusals(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"logits": torch.zeros(2, 3), "table": table(*[(1.0, 2, 1.0, 0.0, 0.5)] * 2), "filtered": True}
    arguments |= change
    with pytest.raises(error, match=message):
        sample_rows(arguments["logits"], arguments["table"], filtered=arguments["filtered"])


def test_sums_have_room() -> None:
    """As many equal tokens as a vocabulary may have do not overflow."""
    assert MAX_VOCABULARY * ONE < 2**63
    assert sample_rows.reference(torch.zeros(0, 7), torch.zeros(0, 5).double(), filtered=True).tolist() == []


@pytest.mark.parametrize("body", [sample_rows.reference, pytest.param(sample_rows.launch, marks=pytest.mark.kernel)])
@pytest.mark.parametrize("filtered", [False, True])
def test_ids_go_where_they_are_wanted(body, filtered, device) -> None:
    logits, rows = random_tensor(3, 500, seed=4), torch.tensor([[2.0, 0, 0.9 if filtered else 1, 1, 0.3]] * 3).double()
    rows[1, 0] = 0
    logits[2, 7] = NAN
    expected = sample_rows.reference(logits, rows, filtered=filtered).tolist()
    kept = torch.full((6,), 77, device=device)
    host = torch.full((6,), 77, pin_memory=device.type == "cuda")
    ids = body(logits.to(device), rows.to(device), filtered=filtered, out=kept[2:5], host=host[1:4])
    assert ids.data_ptr() == kept[2:].data_ptr()
    assert kept.tolist() == [77, 77, *expected, 77]
    assert host.tolist() == [77, *expected, 77, 77]


@pytest.mark.parametrize("name", ["out", "host"])
def test_refuses_other_places(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be \[2\], got \[3\]"):
        sample_rows(torch.zeros(2, 7), torch.zeros(2, 5).double(), filtered=True, **{name: torch.zeros(3).long()})
    logits = torch.zeros(1, MAX_VOCABULARY)
    assert sample_rows.reference(logits, table((1.0, 0, 1.0, 0.0, 1 - 2**-53)), filtered=False).item() == 524286


@kernel
@pytest.mark.parametrize("listed", [1, 31, 32, 33, 255, 256, 257, 300])
@pytest.mark.parametrize("tied", [False, True])
def test_lists_around_the_size_of_short_ones(listed: int, tied: bool, device: torch.device) -> None:
    logits = torch.full((7, 320), -60.0)  # beyond the last bucket
    places = torch.randperm(320)[:listed]
    logits[:, places] = 0.25 * torch.arange(listed).remainder(9) if tied else torch.randn(listed) * 2
    half = max(1, listed // 2)
    columns = table(
        (1.0, half, 1.0, 0.0, 0.999),
        (1.0, listed, 1.0, 0.0, 0.5),
        (1.0, listed + 5, 0.99, 0.0, 0.7),
        (1.0, 0, 0.5, 0.0, 0.9),
        (0.7, half, 0.7, 0.0, 0.3),
        (2.0, listed, 0.9, 0.1, 0.999),
        (1.0, 0, 1e-9, 0.0, 0.5),
    )
    assert set(agree(logits, columns, device)) <= set(places.tolist())


@kernel
@pytest.mark.parametrize("scale", [0.02, 0.5, 2.0, 8.0])
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_cuts_anywhere_in_several_chunks(scale: float, uniform: float, device: torch.device) -> None:
    """Flat and steep rows: lists are short, long, at the beginning, and behind tokens that are not listed."""
    wide = [(0, 0.3), (0, 0.97), (0, 1 - 1e-9), (2500, 1.0), (2500, 0.6), (4000, 0.999), (7, 0.9), (300, 0.5)]
    rows = [(t, k, p, floor, uniform) for k, p in wide for t, floor in ((1.0, 0.0), (0.6, 0.2))]
    agree(torch.randn(len(rows), 6300) * scale, table(*rows), device)


@kernel
def test_cuts_among_the_least_weights(device: torch.device) -> None:
    """Weights of a few units, which rounding moves by half of themselves."""
    logits = torch.full((4, 2500), -30.0) - torch.rand(4, 2500)
    logits[:, 7] = 0.0
    columns = table(
        *[(1.0, 0, p, 0.0, 1 - 2**-53) for p in (1 - 1e-12, 1 - 2e-10, 1 - 1e-13)], (1.0, 2000, 1.0, 0.0, 0.9)
    )
    agree(logits, columns, device)
