from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qinfer.checkpoint import Checkpoint
from qinfer.errors import CheckpointError, UnsupportedError
from tests import hostile

Q = "model.layers.0.self_attn.q_proj.weight"
TENSORS = hostile.llama_tensors()


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_comes_back(tmp_path: Path, shards: int) -> None:
    checkpoint = Checkpoint(hostile.write_llama(tmp_path, shards=shards))
    assert checkpoint.names() == set(TENSORS)
    assert len({checkpoint.file(name) for name in TENSORS}) == shards
    for name, tensor in TENSORS.items():
        assert name in checkpoint
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
        assert torch.equal(checkpoint.read(name), tensor)
    assert "model.norm.bias" not in checkpoint


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(hostile.write_llama(tmp_path_factory.mktemp("sound")))


@given(cut=st.tuples(st.integers(0, 32), st.integers(0, 32)).map(sorted), dim=st.sampled_from([0, 1]))
def test_a_slice_is_that_part_of_the_whole(sound: Checkpoint, cut: list[int], dim: int) -> None:
    part = sound.read_slice(Q, dim, *cut)
    assert torch.equal(part, TENSORS[Q].narrow(dim, cut[0], cut[1] - cut[0]))
    assert part.is_contiguous()


@pytest.mark.parametrize(("dim", "start", "stop"), [(2, 0, 1), (-1, 0, 1), (0, -1, 2), (0, 3, 2), (0, 0, 33)])
def test_a_slice_out_of_range_is_the_callers_mistake(sound: Checkpoint, dim: int, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(Q)}"):
        sound.read_slice(Q, dim, start, stop)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32, torch.int16, torch.uint8])
def test_dtypes_are_read_without_the_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    hostile.write_llama(tmp_path)
    hostile.edit_tensor(tmp_path, Q, lambda tensor: tensor.to(dtype))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.dtype(Q) == checkpoint.read(Q).dtype == dtype


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    hostile.write_llama(tmp_path)
    save_file({"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.shape("scalar") == ()
    assert checkpoint.read("scalar").item() == 3.0
    assert checkpoint.read("empty").shape == checkpoint.read_slice("empty", 0, 0, 0).shape == (0, 4)


def test_a_tensor_at_an_odd_byte_is_copied_to_an_even_one(tmp_path: Path) -> None:
    hostile.write_llama(tmp_path)
    values = torch.arange(12.0).reshape(3, 4)
    hostile.write_raw(tmp_path, "odd", "F32", (3, 4), values.numpy().tobytes())
    checkpoint = Checkpoint(tmp_path)
    for tensor in (checkpoint.read("odd"), checkpoint.read_slice("odd", 0, 0, 3)):
        assert torch.equal(tensor, values)
        assert tensor.data_ptr() % 4 == 0


def test_generation_and_quantization_settings(tmp_path: Path) -> None:
    checkpoint = Checkpoint(hostile.write_llama(tmp_path))
    assert checkpoint.generation_config == {}
    assert checkpoint.quant_config is None
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 128, "desc_act": false, "sym": true}')
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.generation_config == {"eos_token_id": [2, 3]}
    legacy = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    assert checkpoint.quant_config == legacy
    # What config.json says about itself wins over the side file.
    hostile.edit_json(tmp_path, "config.json", quantization_config={"quant_method": "exl2", "bits": 4.0})
    assert Checkpoint(tmp_path).quant_config == {"quant_method": "exl2", "bits": 4.0}
    hostile.edit_json(tmp_path, "config.json", quantization_config=[4])
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config must be an object"):
        Checkpoint(tmp_path)


def test_files_without_an_index(tmp_path: Path) -> None:
    hostile.write_llama(tmp_path, shards=3)
    (tmp_path / hostile.INDEX).unlink()
    assert Checkpoint(tmp_path).names() == set(TENSORS)
    save_file({Q: TENSORS[Q]}, tmp_path / "zz-again.safetensors")
    with pytest.raises(CheckpointError, match=rf"zz-again\.safetensors: {re.escape(Q)}: is also in model-0000"):
        Checkpoint(tmp_path)


def test_leftovers_beside_an_index_or_a_single_file_are_not_read(tmp_path: Path) -> None:
    single, indexed = hostile.write_llama(tmp_path / "single"), hostile.write_llama(tmp_path / "indexed", shards=2)
    for folder in (single, indexed):
        save_file({Q: torch.zeros(1), "extra": torch.zeros(1)}, folder / "consolidated.safetensors")
        checkpoint = Checkpoint(folder)
        assert "extra" not in checkpoint
        assert torch.equal(checkpoint.read(Q), TENSORS[Q])


def test_links_are_followed(tmp_path: Path) -> None:
    # The Hugging Face cache keeps files as links into a store of blobs.
    hostile.write_llama(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert torch.equal(Checkpoint(tmp_path / "snapshot").read(Q), TENSORS[Q])


BREAKAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (hostile.truncate_shard, r"model-00001-of-00002\.safetensors: cannot be opened"),
    "missing": (hostile.remove_shard, r"index\.json: names files that are not here: model-00001-of-00002"),
    "huge header": (hostile.swell_header, r"model-00001-of-00002\.safetensors: cannot be opened.*header"),
    "parent": (lambda f: hostile.remap(f, Q, "../other.safetensors"), rf"index\.json: {Q}: .*inside the folder"),
    "absolute": (lambda f: hostile.remap(f, Q, "/etc/passwd"), rf"index\.json: {Q}: .*inside the folder"),
    "dots": (lambda f: hostile.remap(f, Q, ".."), rf"index\.json: {Q}: .*inside the folder"),
    "not a name": (lambda f: hostile.edit_json(f, hostile.INDEX, weight_map={Q: 3}), r"inside the folder, got 3"),
    "no map": (lambda f: hostile.edit_json(f, hostile.INDEX, weight_map=[]), r"index\.json: weight_map must be"),
    "absent tensor": (
        lambda f: hostile.remap(f, "model.norm.bias", "model-00002-of-00002.safetensors"),
        r"model-00002-of-00002\.safetensors: model\.norm\.bias: is missing",
    ),
    "not safetensors": (lambda f: hostile.remap(f, Q, "config.json"), r"config\.json: cannot be opened"),
    "folder": (lambda f: ((f / "d").mkdir(), hostile.remap(f, Q, "d")), r"index\.json: names files that are not here"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: is missing"),
    "bad json": (lambda f: (f / "config.json").write_text('{\n"a": 1,\n"b" 2}'), r"config\.json: .*line 3, column 5"),
    "not text": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'), r"config\.json: cannot be read as JSON"),
    "not an object": (lambda f: (f / "config.json").write_text("[]"), r"config\.json: must hold a JSON object"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 100_000), r"config\.json: cannot be read as JSON"),
    "long number": (lambda f: (f / "config.json").write_text("9" * 10_000), r"config\.json: cannot be read as JSON"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_folder_is_refused_by_name(tmp_path: Path, name: str) -> None:
    breakage, message = BREAKAGES[name]
    breakage(hostile.write_llama(tmp_path, shards=2))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_a_stale_index_is_suspected(tmp_path: Path) -> None:
    hostile.write_llama(tmp_path)
    (tmp_path / hostile.INDEX).write_text(json.dumps({"weight_map": {Q: "gone.safetensors"}}))
    with pytest.raises(
        CheckpointError, match=r"gone\.safetensors; model\.safetensors is here, so the index may be stale"
    ):
        Checkpoint(tmp_path)


def test_a_folder_without_weights_lists_what_it_has(tmp_path: Path) -> None:
    hostile.write_llama(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no safetensors file; it holds config\.json, pytorch_model\.bin"):
        Checkpoint(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a folder.*nowhere is nothing"):
        Checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"must be a folder.*is a file"):
        Checkpoint(str(tmp_path / "file"))


def test_a_missing_tensor_is_named(tmp_path: Path, sound: Checkpoint) -> None:
    for ask in (sound.read, sound.shape, sound.dtype, sound.file, lambda name: sound.read_slice(name, 0, 0, 1)):
        with pytest.raises(CheckpointError, match=r"nowhere\.weight: is missing") as caught:
            ask("nowhere.weight")
        assert caught.value.tensor == "nowhere.weight"
        assert caught.value.file == str(sound.path)
    sharded = Checkpoint(hostile.write_llama(tmp_path, shards=2))
    with pytest.raises(CheckpointError) as caught:
        sharded.read("nowhere.weight")
    assert caught.value.file == str(tmp_path / hostile.INDEX)


def test_errors_name_the_file_of_the_tensor(sound: Checkpoint) -> None:
    assert str(sound.error(Q, "is odd")) == f"{sound.path / 'model.safetensors'}: {Q}: is odd"
    assert str(sound.error(None, "is odd")) == f"{sound.path}: is odd"


def test_a_dtype_that_is_not_known(tmp_path: Path) -> None:
    hostile.write_llama(tmp_path)
    hostile.write_raw(tmp_path, "odd", "F8_E8M0", (4,), bytes(4))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.shape("odd") == (4,)
    for ask in (checkpoint.dtype, checkpoint.read, lambda name: checkpoint.read_slice(name, 0, 0, 1)):
        with pytest.raises(UnsupportedError, match=r"model\.safetensors: odd: dtype F8_E8M0 cannot be read"):
            ask("odd")


def test_the_index_of_the_original_beside_converted_files_is_left_alone(tmp_path: Path) -> None:
    hostile.write_llama(tmp_path, shards=2)
    names = Checkpoint(tmp_path).names()
    for number, file in enumerate(sorted(tmp_path.glob("model-*.safetensors"))):
        file.rename(tmp_path / f"output-{number}.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names() == names
    assert checkpoint.error("nothing", "is missing").file == str(tmp_path)
