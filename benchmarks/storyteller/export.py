"""Quantize a trained storyteller with the project itself: GPTQ layout, 4 bits in groups of 32, rounded to nearest.

    python benchmarks/storyteller/export.py --model DIR --out qinfer/assets/storyteller

Embeddings (tied to the output layer) and norms stay fp16.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qinfer.quant import GPTQWeight

QUANTIZATION = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "desc_act": False,
    "sym": True,
    "checkpoint_format": "gptq",
}
COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def quantize_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace every projection [N, K] by its GPTQ tensors and keep the rest."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            stored[name] = tensor
            continue
        weight = GPTQWeight.quantize(tensor.T.float(), bits=4, group_size=QUANTIZATION["group_size"])
        stored |= {f"{module}.{suffix}": part.contiguous() for suffix, part in weight.tensors().items()}
    return stored


def export(model: Path, out: Path) -> int:
    """Write the quantized folder and return its size in bytes."""
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = QUANTIZATION
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in COPIED:
        shutil.copyfile(model / name, out / name)
    file = out / "model.safetensors"
    save_file(quantize_tensors(load_file(model / "model.safetensors")), file, metadata={"format": "pt"})
    file.chmod(0o644)
    return sum(path.stat().st_size for path in out.iterdir())


def main() -> None:
    """Export and say how large the result is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that train.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    print(f"{args.out}: {export(args.model, args.out) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
