"""exllamav2_ext: what packs, permutes, encodes and reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qinfer.compat import exllamav2_ext as ext_c
from qinfer.compat import ext_packing
from tests.compare import errors
from tests.compat.vectors import EVERYWHERE, NOTHING, vectors
from tests.strategies import random_tensor


@EVERYWHERE
def test_pack_rows_4(where: str) -> None:
    vector = vectors("pack_remap", where)
    output = torch.full_like(vector["rows4_out"], -1)
    ext_c.pack_rows_4(vector["rows4_in"], output)
    assert torch.equal(output, vector["rows4_out"])
    padded = torch.tensor([[1, 2, 3, 4, 5, 6, 0, 0]], dtype=torch.int16, device=where)
    output = torch.zeros(1, 1, dtype=torch.int32, device=where)
    ext_c.pack_rows_4(padded, output)
    assert output.item() & 0xFFFFFFFF == 0xFF543210


def test_pack_rows_4_refuses() -> None:
    indices, output = torch.ones(2, 16, dtype=torch.int16), torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="input must be int16"):
        ext_c.pack_rows_4(indices.int(), output)
    with pytest.raises(TypeError, match="output must be int32"):
        ext_c.pack_rows_4(indices, output.long())
    for wrong in (output[:1], output[:, :1]):
        with pytest.raises(ValueError, match=r"output must be \[2, 2\]"):
            ext_c.pack_rows_4(indices, wrong)
    with pytest.raises(RuntimeError, match="multiple of 8 columns"):
        ext_c.pack_rows_4(indices[:, :15], output[:, :1])
    for bad in (-1, 17):
        indices[1, 3] = bad
        with pytest.raises(RuntimeError, match="must hold 0 to 16"):
            ext_c.pack_rows_4(indices, output)


@EVERYWHERE
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_pack_columns(bits: int, where: str) -> None:
    vector = vectors(f"exl2_pack_{bits}b", where)
    output = torch.full_like(vector["packed"], -1)
    ext_c.pack_columns(vector["q"], output, bits)
    assert torch.equal(output, vector["packed"])


def test_pack_columns_refuses() -> None:
    codes, output = torch.zeros(32, 8, dtype=torch.int16), torch.zeros(3, 8, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="bits must be one of"):
        ext_c.pack_columns(codes, output, 7)
    with pytest.raises(RuntimeError, match=r"output must be \[3, 8\]"):
        ext_c.pack_columns(codes, output[:2], 3)
    with pytest.raises(RuntimeError, match="whole words"):
        ext_c.pack_columns(codes[:16], output[:1], 3)
    with pytest.raises(RuntimeError, match="input must be int16"):
        ext_c.pack_columns(codes.int(), output, 3)
    codes[5, 5] = 8
    with pytest.raises(RuntimeError, match="must hold 0 to 7"):
        ext_c.pack_columns(codes, output, 3)


@EVERYWHERE
def test_tensor_remap(where: str) -> None:
    vector = vectors("pack_remap", where)
    ext_c.tensor_remap(vector["remap_in"], vector["remap_index"])
    assert torch.equal(vector["remap_in"], vector["remap_out"])


@EVERYWHERE
def test_tensor_remap_4bit(where: str) -> None:
    vector = vectors("pack_remap", where)
    ext_c.tensor_remap_4bit(vector["remap4_in"], vector["remap_index"])
    assert torch.equal(vector["remap4_in"], vector["remap4_out"])


def test_remaps_refuse_and_leave_the_tensor_alone() -> None:
    tensor = torch.arange(32, dtype=torch.int32).view(2, 16)
    kept, index = tensor.clone(), torch.arange(16, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"index must be \[16\]"):
        ext_c.tensor_remap(tensor, index[:15])
    with pytest.raises(RuntimeError, match="index must be int32"):
        ext_c.tensor_remap(tensor, index.long())
    with pytest.raises(RuntimeError, match=r"index must be in \[0, 16\)"):
        ext_c.tensor_remap(tensor, index + 1)
    with pytest.raises(RuntimeError, match=r"index must be \[128\]"):
        ext_c.tensor_remap_4bit(tensor, index)
    with pytest.raises(RuntimeError, match="tensor must be int32"):
        ext_c.tensor_remap_4bit(tensor.long(), index)
    assert torch.equal(tensor, kept)


@EVERYWHERE
@pytest.mark.parametrize("chunk", [1 << 20, 7])
def test_stloader_read(where: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ext_packing, "CHUNK", chunk)
    numbers, file = random_tensor(5, 9, seed=1, dtype=torch.bfloat16), tmp_path / "file"
    file.write_bytes(b"head" + numbers.view(torch.uint8).numpy().tobytes() + b"tail")
    target = torch.zeros(5, 9, dtype=torch.bfloat16, device=where)
    ext_c.stloader_read(str(file), 4, target.nbytes, target)
    assert torch.equal(target.cpu(), numbers)
    ext_c.stloader_read(str(file), 4 + 90, 4, target)  # its first two numbers only
    assert target[0, :2].view(torch.uint8).cpu().numpy().tobytes() == b"tail"
    assert torch.equal(target.cpu().view(-1)[2:], numbers.view(-1)[2:])


def test_stloader_read_refuses(tmp_path: Path) -> None:
    file, target = tmp_path / "file", torch.zeros(4, 4)
    file.write_bytes(bytes(64))
    with pytest.raises(RuntimeError, match="ends"):
        ext_c.stloader_read(str(file), 1, 64, target)
    with pytest.raises(RuntimeError, match="No such file"):
        ext_c.stloader_read(str(tmp_path / "none"), 0, 64, target)
    with pytest.raises(OSError, match="No such file"):
        ext_c.stloader_read(str(tmp_path / "none"), 0, 64, target)
    with pytest.raises(RuntimeError, match="must not be negative"):
        ext_c.stloader_read(str(file), -1, 64, target)
    for wrong in (target[:2], target.t(), NOTHING):
        with pytest.raises(RuntimeError, match="target must hold 64 bytes"):
            ext_c.stloader_read(str(file), 0, 64, wrong)


@EVERYWHERE
def test_make_group_map(where: str) -> None:
    vector = vectors("exl2_matrix", where)
    group_map = ext_c.make_group_map(vector["q_groups"], vector["q_weight"].shape[0])
    assert group_map.device == vector["q_groups"].device
    assert group_map.dtype == torch.int16
    assert torch.equal(group_map, vector["q_group_map"])


def test_make_group_map_refuses() -> None:
    groups = torch.tensor([4, 0, 2, 8], dtype=torch.int16)
    assert ext_c.make_group_map(groups, 10).view(-1, 2)[[0, 63, 64, 95]].tolist() == [[0, 64], [0, 1], [1, 32], [1, 1]]
    with pytest.raises(RuntimeError, match="in order"):
        ext_c.make_group_map(groups, 7)
    with pytest.raises(RuntimeError, match="got 7 for group 1"):
        ext_c.make_group_map(torch.tensor([4, 0, 7, 8], dtype=torch.int16), 10)
    with pytest.raises(RuntimeError, match="start at 0"):
        ext_c.make_group_map(torch.tensor([4, 1, 2, 8], dtype=torch.int16), 10)
    with pytest.raises(RuntimeError, match="pairs"):
        ext_c.make_group_map(groups[:3], 10)
    with pytest.raises(RuntimeError, match="q_groups must be int16"):
        ext_c.make_group_map(groups.int(), 10)


@EVERYWHERE
def test_matrix_fp16_to_q4(where: str) -> None:
    vector = vectors("kv_cache_quant", where)
    output = torch.zeros(32, 32, dtype=torch.uint8, device=where)
    scales = torch.zeros(32, 2, dtype=torch.float16, device=where)
    ext_c.matrix_fp16_to_q4(vector["x"].view(32, 64), output, scales)
    assert torch.equal(output.view(-1), vector["q4_bytes"])
    assert torch.equal(scales.view(-1), vector["q4_scales"])


@EVERYWHERE
def test_matrix_q4_to_fp16(where: str) -> None:
    vector = vectors("kv_cache_quant", where)
    output = torch.zeros(32, 64, dtype=torch.float16, device=where)
    ext_c.matrix_q4_to_fp16(vector["q4_bytes"].view(32, 32), vector["q4_scales"], output)
    assert torch.equal(output.view(-1), vector["q4_dequant"])
    assert errors(output.view(-1), vector["x"])[1] < 0.1


def test_q4_of_a_run_by_hand() -> None:
    # One 1 at the start: all even numbers of the rotated run are 1, all odd ones 0; 1 is the clipped extreme.
    x = torch.zeros(192, dtype=torch.float16)
    x[0], x[64] = 1, -1
    codes, scales = torch.zeros(96, dtype=torch.uint8), torch.ones(6, dtype=torch.float16)
    ext_c.matrix_fp16_to_q4(x, codes, scales)
    assert codes.tolist() == [0x8F] * 32 + [0x80] * 32 + [0] * 32
    assert scales.tolist() == [0.125] * 4 + [0, 0]
    y = torch.ones_like(x)
    ext_c.matrix_q4_to_fp16(codes, scales, y)
    assert y.nonzero().view(-1).tolist() == [0, 64]
    assert y[[0, 64]].tolist() == [0.875, -1]


def test_q4_refuses() -> None:
    x = torch.zeros(2, 64, dtype=torch.float16)
    codes, scales = torch.zeros(64, dtype=torch.uint8), torch.zeros(4, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="multiple of 64"):
        ext_c.matrix_fp16_to_q4(x[:, :48], codes, scales)
    with pytest.raises(RuntimeError, match="uint8 tensor must hold 64"):
        ext_c.matrix_fp16_to_q4(x, codes[:32], scales)
    with pytest.raises(RuntimeError, match="scales must hold 4"):
        ext_c.matrix_q4_to_fp16(codes, scales[:3], x)
    with pytest.raises(RuntimeError, match="fp16 tensor must be float16"):
        ext_c.matrix_q4_to_fp16(codes, scales, x.float())
    with pytest.raises(RuntimeError, match="one piece"):
        ext_c.matrix_q4_to_fp16(codes, scales, torch.zeros(2, 128, dtype=torch.float16)[:, :64])
