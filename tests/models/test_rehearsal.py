"""Rehearsals: few blocks, all kernels."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qinfer.kernels import gather
from qinfer.models.model import Model
from qinfer.models.rehearsal import _kind, _representatives, rehearsal
from qinfer.parallel.comm import Alone
from tests.models import tiny


class OtherRank(Alone):
    """A second rank that needs one more block."""

    def __init__(self, needed: int) -> None:
        self.needed = needed

    def all_gather(self, x, dim, sizes=None):
        other = torch.zeros_like(x)
        other[0, self.needed] = 1
        return torch.cat([x, other], dim)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("llama")
    tiny.save(folder, "llama", num_hidden_layers=6)
    return Model.load(folder, device="cpu")


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_every_pair_of_kinds_is_there(kinds: list[int]) -> None:
    numbers = _representatives(kinds)
    assert numbers == sorted(set(numbers))
    assert (numbers[0], numbers[-1]) == (0, len(kinds) - 1)
    chosen = [kinds[number] for number in numbers]
    assert set(pairwise(kinds)) <= set(pairwise(chosen))
    assert len(numbers) <= 2 * 4 * 4 + 2


def test_no_blocks_need_no_rehearsal() -> None:
    assert _representatives([]) == []


def test_blocks_that_differ_in_their_place_alone_are_of_a_kind(model: Model) -> None:
    decoder = model.decoder
    assert len({_kind(block) for block in decoder.blocks}) == 1
    few = rehearsal(decoder, model.new_cache(2))
    assert few.blocks == tuple(decoder.blocks[number] for number in (0, 1, 5))
    assert few.head is decoder.head


def test_blocks_that_launch_other_kernels_are_of_another_kind(model: Model) -> None:
    decoder = model.decoder
    block = decoder.blocks[0]
    attention, norm = block.attention, block.mlp_norm
    others = [
        replace(block, attention=replace(attention, window=8)),
        replace(block, invariant=True),
        replace(block, mlp_norm=replace(norm, dtype=torch.bfloat16)),
        replace(block, mlp_norm=replace(norm, weight=norm.weight.double())),
        replace(block, mlp_norm=replace(norm, order=torch.arange(len(norm.weight), dtype=torch.int32))),
        # Kernels are compiled for addresses that 16 divides, and for others.
        replace(block, mlp_norm=replace(norm, weight=torch.cat([norm.weight, norm.weight])[1 : 1 + len(norm.weight)])),
    ]
    assert len({_kind(one) for one in (block, *others)}) == 1 + len(others)
    assert _kind(replace(block, attention=replace(attention, layer=7))) == _kind(block)


def test_inverses_of_the_orders_of_all_blocks_are_known_afterwards(model: Model) -> None:
    decoder = model.decoder

    def ordered(seed: int) -> Tensor:
        return torch.randperm(64, generator=torch.Generator().manual_seed(seed)).int()

    orders = [ordered(seed) for seed in range(len(decoder.blocks))]
    blocks = tuple(
        replace(block, mlp_norm=replace(block.mlp_norm, order=order))
        for block, order in zip(decoder.blocks, orders, strict=True)
    )
    assert not any(order in gather._inverses for order in orders)
    few = rehearsal(replace(decoder, blocks=blocks), model.new_cache(2))
    assert len(few.blocks) < len(orders)
    for order in orders:
        assert order in gather._inverses
        assert torch.equal(order[gather.inverse(order).long()], torch.arange(64, dtype=torch.int32))


def test_all_ranks_run_what_one_of_them_needs(model: Model) -> None:
    decoder = model.decoder
    few = rehearsal(replace(decoder, comm=OtherRank(3)), model.new_cache(2))
    assert few.blocks == tuple(decoder.blocks[number] for number in (0, 1, 3, 5))


def test_layers_of_another_format_are_of_another_kind(model: Model) -> None:
    few = rehearsal(model.decoder, model.new_cache(2, kv_format="q4,3:q8"))
    assert few.blocks == tuple(model.decoder.blocks[number] for number in (0, 1, 2, 3, 4, 5))
    few = rehearsal(model.decoder, model.new_cache(2, kv_format="q4,-1:fp16"))
    assert few.blocks == tuple(model.decoder.blocks[number] for number in (0, 1, 4, 5))
