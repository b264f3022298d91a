"""Stories as tokens: trains the tokenizer, and turns ranges of seeds into packed rows on all CPU cores."""

from __future__ import annotations

import json
import re
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from grammar import HELD_OUT, story
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

BEGIN, END = "<|begin|>", "<|end|>"
VOCAB = 2048
CHUNK = 1000  # stories per task

# How ByteLevel cuts a text before BPE, for ASCII, which is all that the grammar emits.
PIECE = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")

_encoder: Encoder | None = None


def train_tokenizer(num_stories: int = 20_000, vocab_size: int = VOCAB) -> Tokenizer:
    """Train a byte-level BPE on training stories; id 0 begins a text and id 1 ends it."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((story(HELD_OUT + seed) for seed in range(num_stories)), trainer)
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, begin)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


class Encoder:
    """The tokenizer with a memory: a piece of text once encoded is looked up, ten times as fast on so small a world."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.begin, self.end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Return the ids of an ASCII text from BEGIN to END."""
        ids = [self.begin]
        for piece in PIECE.findall(text):
            known = self.known.get(piece)
            if known is None:
                known = self.known[piece] = self.tokenizer.encode(piece, add_special_tokens=False).ids
            ids += known
        ids.append(self.end)
        return ids


def pack(stories: list[list[int]], width: int) -> np.ndarray:
    """Fill rows [R, width] with stories one after another; a row begins with a story and cuts its last one short."""
    rows, row = [], []  # type: list[list[int]], list[int]
    for ids in stories:
        row = row + ids
        if len(row) >= width:
            rows.append(row[:width])
            row = []
    return np.array(rows, dtype=np.uint16).reshape(-1, width)


def _start(tokenizer_json: str) -> None:
    global _encoder
    _encoder = Encoder(Tokenizer.from_str(tokenizer_json))


def _work(task: tuple[int, int, int]) -> np.ndarray:
    first, last, width = task
    assert _encoder is not None
    return pack([_encoder.encode(story(seed)) for seed in range(first, last)], width)


def packed_rows(tokenizer: Tokenizer, first_seed: int, num_stories: int, *, width: int, workers: int) -> np.ndarray:
    """Tell, encode and pack the stories of a range of seeds in parallel; the rows do not depend on `workers`."""
    last_seed = first_seed + num_stories
    tasks = [(seed, min(seed + CHUNK, last_seed), width) for seed in range(first_seed, last_seed, CHUNK)]
    if workers <= 1:
        _start(tokenizer.to_str())
        return np.concatenate([_work(task) for task in tasks])
    with get_context("fork").Pool(workers, initializer=_start, initargs=(tokenizer.to_str(),)) as pool:
        return np.concatenate(pool.map(_work, tasks, chunksize=1))
