"""Tiny checkpoint folders, sound and broken: each function writes or damages one and says which file it touched."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# As Llama 2 wrote it: no head_dim, no biases, no rope fields.
LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
REMOVE = object()
INDEX = "model.safetensors.index.json"


def llama_tensors() -> dict[str, torch.Tensor]:
    """Random tensors for LLAMA_CONFIG."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens": (64, 32), "lm_head": (64, 32), "model.norm": (32,)}
    for layer in range(2):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.{norm}": (32,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {
            f"{block}.self_attn.{name}_proj": (rows, 32) for name, rows in zip("qkvo", (32, 16, 16, 32), strict=True)
        }
        shapes |= {f"{block}.mlp.gate_proj": (48, 32), f"{block}.mlp.up_proj": (48, 32)}
        shapes[f"{block}.mlp.down_proj"] = (32, 48)
    return {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_llama(folder: Path, *, shards: int = 1, **changes: Any) -> Path:
    """Write a sound checkpoint; `changes` go into config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    edit_json(folder, "config.json", **changes)
    tensors = llama_tensors()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def edit_json(folder: Path, file: str, **changes: Any) -> str:
    """Set fields of a JSON file, or take them out with REMOVE."""
    values = json.loads((folder / file).read_text())
    values = {name: value for name, value in {**values, **changes}.items() if value is not REMOVE}
    (folder / file).write_text(json.dumps(values))
    return file


def first_shard(folder: Path) -> Path:
    """The first safetensors file."""
    return sorted(folder.glob("*.safetensors"))[0]


def edit_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> str:
    """Replace one stored tensor by change(tensor), or take it out if that is None."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            changed = change(tensors.pop(name).clone())
            save_file(tensors if changed is None else {**tensors, name: changed}, path)
            return path.name
    raise KeyError(name)


def remap(folder: Path, name: str, file: str) -> str:
    """Let the index place one tensor in another file."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    return edit_json(folder, INDEX, weight_map={**weight_map, name: file})


def truncate_shard(folder: Path) -> str:
    """Cut the last bytes off a file, as a broken download does."""
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[:-5])
    return path.name


def remove_shard(folder: Path) -> str:
    """Delete a file that the index names."""
    path = first_shard(folder)
    path.unlink()
    return path.name


def swell_header(folder: Path) -> str:
    """Let a file announce a header of 2^62 bytes."""
    path = first_shard(folder)
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])
    return path.name


def write_raw(folder: Path, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> str:
    """Write model.safetensors byte by byte, with one tensor that starts at an odd byte, which the format allows."""
    header = json.dumps(
        {
            "pad": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            name: {"dtype": dtype, "shape": list(shape), "data_offsets": [1, 1 + len(data)]},
        }
    ).encode()
    # Padded to an even length, so that the odd offset is what decides.
    header += b" " * (-len(header) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" + data)
    return "model.safetensors"
