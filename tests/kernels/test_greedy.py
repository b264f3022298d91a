"""greedy: the likeliest token, the lower id of two, and -1 where a row is spoiled."""

from __future__ import annotations

import math

import pytest
import torch

from qinfer.kernels.greedy import CHUNK, greedy
from tests.strategies import random_tensor

BODIES = [greedy.reference, pytest.param(greedy.launch, marks=pytest.mark.kernel)]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("vocab_size", [1, 7, CHUNK, 3 * CHUNK + 5])
def test_rows_of_any_length_and_distance(body, vocab_size, device):
    wide = random_tensor(5, vocab_size + 3, seed=vocab_size)
    expected = [row[:vocab_size].tolist().index(row[:vocab_size].max()) for row in wide]
    logits = wide.to(device)[:, :vocab_size]
    assert body(logits).tolist() == expected
    assert body(logits[:0]).tolist() == []


@pytest.mark.parametrize("body", BODIES)
def test_the_lower_id_of_two(body, device):
    logits = torch.zeros(2, 2 * CHUNK + 9)
    logits[1, CHUNK + 4] = logits[1, 2 * CHUNK + 1] = 1.0
    assert body(logits.to(device)).tolist() == [0, CHUNK + 4]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("place", [3, CHUNK + 1])
def test_spoiled_rows_and_no_others(body, place, device):
    logits = random_tensor(5, CHUNK + 20, seed=1)
    logits[0, place], logits[1, place] = math.nan, math.inf
    logits[2] = -math.inf
    logits[3] = -math.inf
    logits[3, place] = -5.0
    assert body(logits.to(device)).tolist() == [-1, -1, -1, place, int(logits[4].argmax())]


@pytest.mark.parametrize("body", BODIES)
def test_ids_go_where_they_are_wanted(body, device):
    logits, kept = random_tensor(3, CHUNK + 1, seed=4).to(device), torch.full((6,), 77, device=device)
    ids = body(logits, out=kept[2:5])
    assert ids.data_ptr() == kept[2:].data_ptr()
    assert kept.tolist() == [77, 77, *logits.argmax(1).tolist(), 77]


@pytest.mark.parametrize("body", BODIES)
def test_ids_go_to_the_host_as_well(body, device):
    logits = random_tensor(3, CHUNK + 1, seed=4)
    logits[1, 5] = math.nan
    kept = torch.full((6,), 77, pin_memory=device.type == "cuda")
    ids = body(logits.to(device), host=kept[2:5])
    # Reading these waits for the device.
    expected = [int(logits[0].argmax()), -1, int(logits[2].argmax())]
    assert ids.tolist() == expected
    assert kept.tolist() == [77, 77, *expected, 77]


@pytest.mark.parametrize("name", ["out", "host"])
@pytest.mark.parametrize(
    ("ids", "error", "text"),
    [
        (torch.zeros(2, dtype=torch.int32), TypeError, "must be int64, got torch.int32"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"must be \[2\]"),
        (torch.zeros(4, dtype=torch.int64)[::2], ValueError, "must have last stride 1"),
    ],
)
def test_refuses_other_places(name, ids, error, text):
    with pytest.raises(error, match=f"{name} {text}"):
        greedy(torch.zeros(2, 3), **{name: ids})


@pytest.mark.gpu
def test_refuses_memory_that_the_device_cannot_write(device):
    for host in (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64, device=device)):
        with pytest.raises(ValueError, match="host must be in page-locked memory of the host"):
            greedy(torch.zeros(2, 3, device=device), host=host)


@pytest.mark.parametrize(
    ("logits", "error", "text"),
    [
        (torch.zeros(2, 3).half(), TypeError, "logits must be float32"),
        (torch.zeros(3), ValueError, "logits must be"),
        (torch.zeros(2, 0), ValueError, "logits must have a vocabulary"),
    ],
)
def test_refuses(logits, error, text):
    with pytest.raises(error, match=text):
        greedy(logits)
