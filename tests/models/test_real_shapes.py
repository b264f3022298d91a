"""One layer with the sizes of an 8B model, over every cache and weight format: kernels against their references.

Kernels have tests of their own at such sizes; here they meet in a prompt and in steps behind it, one after the other.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qinfer.bench.recipes import WEIGHTS
from qinfer.bench.synthetic import synthetic_model
from qinfer.cache.formats import KV_FORMATS
from qinfer.kernels.device import implementation
from qinfer.models.batch import Batch, Piece
from qinfer.models.model import Model
from tests.compare import assert_close
from tests.models import tiny

pytestmark = pytest.mark.gpu
PRESET, PROMPT, STEPS, PAGE = "llama-3.1-8b", 600, 3, 256


def make(weights: str, device: torch.device) -> Model:
    return synthetic_model(PRESET, weights, device, num_layers=1)


def logits(model: Model, kv_format: str | None) -> Tensor:
    """Logits behind a prompt of several pages and behind a few tokens more, in pages that held garbage."""
    cache = model.new_cache(4, page_size=PAGE, kv_format=kv_format)
    for side in cache.pages(0):
        for tensor in side.tensors():
            tensor.view(torch.uint8).fill_(255)
    ids, rows = tiny.prompt(PROMPT + STEPS), []
    for start, stop in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, PROMPT + STEPS))]:
        piece = Piece(ids[start:stop], start, [3, 0, 2], "last")
        rows.append(model.decoder(Batch.build([piece], page_size=PAGE, device=model.device), cache))
    return torch.cat(rows)


def check(model: Model, kv_format: str | None, tolerance: torch.dtype) -> None:
    got = logits(model, kv_format)
    with implementation("reference"):
        assert_close(got, logits(model, kv_format), tolerance)


@pytest.fixture(scope="module")
def model(device: torch.device) -> Model:
    return make("int4-g128", device)


@pytest.mark.parametrize("kv_format", [*KV_FORMATS, "k8v4", "kfp8vq6", "kq4vfp8", "kfp16vq6"])
def test_cache_formats(model: Model, kv_format: str) -> None:
    # A number next to a border may fall on its other side in the reference, where codes are few.
    exact = kv_format in ("fp16", "fp32")
    check(model, kv_format, torch.float16 if exact else torch.bfloat16)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weight_formats(weights: str, device: torch.device) -> None:
    check(model := make(weights, device), None, model.dtype)
