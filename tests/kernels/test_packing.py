"""Packing is exact: hand-made words, the shared vectors, the inverse laws, and kernel against reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qinfer.kernels.operand import FIELDS, tile_k
from qinfer.kernels.packing import (
    pack_4bit,
    pack_plane,
    pack_planes,
    pack_stream,
    unpack_4bit,
    unpack_plane,
    unpack_planes,
    unpack_stream,
)

VECTORS = Path(__file__).parents[1] / "vectors"


def random_codes(*shape: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)


def unsigned(words: Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in words.reshape(-1).tolist()]


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (2, [0x1B1B1B1B]),
        (3, [0x53977053, 0x70539770, 0x97705397]),
        (4, [0x4D6F81A3]),
        (5, [0x4DFC4543, 0x78245BA3, 0x0753617D, 0x4B276CF4, 0xE55C7066]),
        (6, [0x9F611283, 0x90BBD2D9, 0xB2579740]),
        (8, [0x18110A03]),
    ],
)
def test_stream_words_of_a_known_sequence(bits: int, words: list[int]) -> None:
    # Code r is (7 r + 3) mod 2^bits. At 4 bits: 3 a 1 8 f 6 d 4, so the word reads 4d6f81a3 from its top nibble down.
    count = len(words) * 32 // bits
    codes = (7 * torch.arange(count) + 3) % (1 << bits)
    packed = pack_stream(codes, bits, 0)
    assert unsigned(packed) == words
    assert unpack_stream(packed, bits, count, 0).tolist() == codes.tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_stream_agrees_with_the_vectors(bits: int) -> None:
    vector = np.load(VECTORS / f"exl2_pack_{bits}b.npz")
    codes, packed = torch.from_numpy(vector["q"]), torch.from_numpy(vector["packed"])
    assert torch.equal(pack_stream(codes, bits, 0), packed)
    assert torch.equal(unpack_stream(packed, bits, codes.shape[0], 0), codes.to(torch.uint8))
    assert torch.equal(pack_stream(codes.T, bits, 1), packed.T)
    assert torch.equal(unpack_stream(packed.T, bits, codes.shape[0], 1), codes.T.to(torch.uint8))


def test_pack_4bit_agrees_with_the_vectors() -> None:
    vector = np.load(VECTORS / "pack_remap.npz")
    codes = torch.from_numpy(vector["rows4_in"] - 1).to(torch.uint8)  # stored minus one, as EXL2 stores scales
    packed = torch.from_numpy(vector["rows4_out"])
    assert torch.equal(pack_4bit.reference(codes), packed)
    assert torch.equal(unpack_4bit.reference(packed), codes)


@given(
    bits=st.integers(1, 8), count=st.integers(0, 70), other=st.integers(0, 3), dim=st.integers(0, 1), seed=st.integers()
)
def test_unpack_stream_inverts_pack_stream(bits: int, count: int, other: int, dim: int, seed: int) -> None:
    codes = random_codes(count, other, bits=bits, seed=seed % 2**31)
    codes = codes.movedim(0, dim)
    packed = pack_stream(codes, bits, dim)
    assert packed.dtype == torch.int32
    assert packed.shape[dim] == -(-count * bits // 32)
    assert torch.equal(unpack_stream(packed, bits, count, dim), codes)


def test_stream_works_along_the_middle_of_three_axes() -> None:
    codes = random_codes(2, 32, 3, bits=3)
    packed = pack_stream(codes, 3, 1)
    assert packed.shape == (2, 3, 3)
    assert torch.equal(packed[1, :, 2], pack_stream(codes[1, :, 2], 3, 0))
    assert torch.equal(unpack_stream(packed, 3, 32, 1), codes)


def test_stream_refuses_what_it_cannot_mean() -> None:
    words = torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="bits must be 1 to 8, got 9"):
        pack_stream(words, 9, 0)
    with pytest.raises(ValueError, match="32 codes of 4 bits take 4 words, got 3"):
        unpack_stream(words, 4, 32, 0)
    with pytest.raises(TypeError, match="int32"):
        unpack_stream(words.to(torch.int64), 4, 24, 0)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_planes_follow_the_rule_element_by_element(width: int) -> None:
    in_features, out_features, tile = 160, 3, 512 // width
    fields = random_codes(in_features, out_features, bits=width)
    plane = pack_plane.reference(fields, width=width, padding=1)
    assert plane.shape == (-(-in_features // tile), out_features, 32)
    for t, n, c in np.ndindex(*plane.shape):
        word = 0
        for j in range(16 // width):
            k = tile * t + 32 * j + c
            word |= (int(fields[k, n]) if k < in_features else 1) << (width * j)
        assert int(plane[t, n, c]) & 0xFFFF == word


def test_planes_of_one_spelled_out_element() -> None:
    # Features 5, 37, 69 and 101 of a tile share element 5: codes 1, 2, 3 and 15 make the word f321, which is -3295.
    codes = torch.full((128, 1), 8, dtype=torch.uint8)
    codes[[5, 37, 69, 101], 0] = torch.tensor([1, 2, 3, 15], dtype=torch.uint8)
    (plane,) = pack_planes(codes, bits=4)
    assert int(plane[0, 0, 5]) == 0xF321 - 0x10000
    assert int(plane[0, 0, 6]) == 0x8888 - 0x10000


def test_planes_of_one_spelled_out_six_bit_code() -> None:
    # 45 is 101101 in binary: 1011 goes to the plane of four bits, 01 to that of two. Padding is 32: 1000 and 00.
    codes = torch.full((1, 1), 45, dtype=torch.uint8)
    high, low = pack_planes(codes, bits=6)
    assert int(high[0, 0, 0]) & 0xFFFF == 0x888B
    assert int(low[0, 0, 0]) & 0xFFFF == 0x0001
    assert int(high[0, 0, 1]) & 0xFFFF == 0x8888


@given(
    bits=st.sampled_from(list(FIELDS)),
    in_features=st.integers(0, 600),
    out_features=st.integers(0, 5),
    seed=st.integers(),
)
def test_unpack_planes_inverts_pack_planes(bits: int, in_features: int, out_features: int, seed: int) -> None:
    codes = random_codes(in_features, out_features, bits=bits, seed=seed % 2**31)
    planes = pack_planes(codes, bits=bits)
    assert [plane.shape[0] for plane in planes] == [-(-in_features // tile_k(width)) for width in FIELDS[bits]]
    assert torch.equal(unpack_planes(planes, bits=bits, in_features=in_features), codes)


@pytest.mark.kernel
@pytest.mark.parametrize("shape", [(1, 8), (3, 16), (5, 40), (2, 16384), (0, 8), (4, 0)])
def test_4bit_kernels_match_their_references(device: torch.device, shape: tuple[int, int]) -> None:
    codes = random_codes(*shape, bits=4).to(device)
    packed = pack_4bit.launch(codes)
    assert packed.dtype == torch.int32
    assert torch.equal(packed, pack_4bit.reference(codes))
    assert torch.equal(unpack_4bit.launch(packed), codes)


@pytest.mark.kernel
def test_4bit_kernels_take_views(device: torch.device) -> None:
    codes = random_codes(16, 24, bits=4).to(device).T
    packed = pack_4bit.launch(codes)
    assert torch.equal(packed, pack_4bit.reference(codes))
    assert torch.equal(unpack_4bit.launch(packed[:, 1:]), codes[:, 8:])


@pytest.mark.kernel
@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(128, 16), (32, 1), (160, 130), (544, 7), (0, 8), (64, 0)])
def test_plane_kernels_match_their_references(device: torch.device, width: int, shape: tuple[int, int]) -> None:
    fields = random_codes(*shape, bits=width).to(device)
    plane = pack_plane.launch(fields, width=width, padding=1)
    assert plane.dtype == torch.int16
    assert torch.equal(plane, pack_plane.reference(fields, width=width, padding=1))
    assert torch.equal(unpack_plane.launch(plane, width=width, in_features=shape[0]), fields)


@pytest.mark.kernel
def test_plane_kernels_take_views(device: torch.device) -> None:
    codes = random_codes(20, 160, bits=4).to(device).T
    plane = pack_plane.launch(codes, width=4, padding=8)
    assert torch.equal(plane, pack_plane.reference(codes, width=4, padding=8))
    assert torch.equal(unpack_plane.launch(plane[:, 3:9], width=4, in_features=160), codes[:, 3:9])


def test_ops_refuse_bad_arguments() -> None:
    codes = random_codes(4, 16, bits=4)
    with pytest.raises(TypeError, match="unpacked must be uint8"):
        pack_4bit(codes.to(torch.int32))
    with pytest.raises(ValueError, match="a multiple of 8 columns"):
        pack_4bit(codes[:, :12])
    with pytest.raises(ValueError, match="unpacked must be 0 to 15 for 4 bits, got 16"):
        pack_4bit(torch.full((1, 8), 16, dtype=torch.uint8))
    with pytest.raises(TypeError, match="packed must be int32"):
        unpack_4bit(codes)
    with pytest.raises(ValueError, match="packed must have 2 dimensions"):
        unpack_4bit(torch.zeros(8, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"bits must be one of"):
        pack_planes(codes, bits=7)
    with pytest.raises(ValueError, match="codes must be 0 to 3"):
        pack_planes(torch.full((128, 1), 4, dtype=torch.uint8), bits=2)
    with pytest.raises(ValueError, match="width must be one of"):
        pack_plane(codes, width=3, padding=0)
    with pytest.raises(ValueError, match="padding must be 0 to 15 for 4 bits, got 16"):
        pack_plane(codes, width=4, padding=16)
    with pytest.raises(TypeError, match="plane must be int16"):
        unpack_plane(torch.zeros(1, 4, 32), width=4, in_features=128)
    with pytest.raises(ValueError, match=r"plane must be \[2, N, 32\]"):
        unpack_plane(torch.zeros(1, 4, 32, dtype=torch.int16), width=4, in_features=129)
    with pytest.raises(ValueError, match="codes of 6 bits have 2 planes, got 1"):
        unpack_planes((torch.zeros(1, 4, 32, dtype=torch.int16),), bits=6, in_features=128)
