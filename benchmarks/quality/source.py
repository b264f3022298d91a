"""Python source as training text: the files of this machine, a part of them held out, and a tokenizer of their own."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END = "<|end|>"  # id 0, behind every file
SMALLEST, LARGEST = 200, 200_000  # bytes of a file
HELD_OUT_EVERY = 50
TOKENIZER_BYTES = 40_000_000
BATCH = 256  # files that are encoded at a time


def files(folders: list[Path], limit: int) -> tuple[list[str], list[str]]:
    """Return the texts of Python files, to train on and held out, in an order that their contents decide.

    Args:
        folders: where to look, at any depth; none means the installed packages and the standard library.
        limit: bytes to take at most.
    """
    paths = sysconfig.get_paths()
    folders = folders or [Path(paths["purelib"]), Path(paths["stdlib"])]
    found: dict[int, str] = {}
    for file in sorted({file for folder in folders for file in folder.rglob("*.py")}):
        if not file.is_file() or not SMALLEST <= file.stat().st_size <= LARGEST:
            continue
        data = file.read_bytes()
        try:
            # Copies of a file, as in vendored packages, are one text, and so on one side.
            found.setdefault(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()), data.decode())
        except UnicodeDecodeError:
            continue
    trained, held_out, taken = list[str](), list[str](), 0
    for key in sorted(found):
        taken += len(found[key])
        if taken > limit:
            break
        (held_out if key % HELD_OUT_EVERY == 0 else trained).append(found[key])
    return trained, held_out


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on as many of the texts as it needs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END],
        show_progress=False,
    )
    ends = np.cumsum([len(text) for text in texts])
    tokenizer.train_from_iterator(texts[: int(np.searchsorted(ends, TOKENIZER_BYTES)) + 1], trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write what a Hugging Face folder has of a tokenizer."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def ids_of(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Return [n] int32 ids of all texts, end to end, each with an end behind it."""
    end = tokenizer.token_to_id(END)
    parts = [
        np.array([*encoding.ids, end], dtype=np.int32)
        for start in range(0, len(texts), BATCH)
        for encoding in tokenizer.encode_batch(texts[start : start + BATCH], add_special_tokens=False)
    ]
    return torch.from_numpy(np.concatenate(parts))
