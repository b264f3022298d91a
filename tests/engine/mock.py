"""A model without weights whose next token depends on every token before it, as the pages tell them.

Its cache stores the token ids themselves, one per slot. The decoder writes the new ones, reads the whole history of
each sequence back through its page table, and derives the logits from that history. A wrong page, slot, position or
length therefore changes the tokens that come out, and `expected` says what they should be.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qinfer.engine.generator import Generator
from qinfer.engine.job import Event
from qinfer.engine.sampling import Row, SamplingParams, UniformStream, guide, sample
from qinfer.models.batch import Batch
from qinfer.models.model import Model
from qinfer.parallel.comm import Alone
from qinfer.tokenizer import OwnTexts

VOCAB = 340
EMPTY = -7  # in slots that were never written
POISON = 13  # never generated; a history that holds it and has more than 6 tokens has NaN for logits


class Adapter:
    """What the engine sees of a tokenizer, and how many ids it is asked to decode at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.longest = 0
        self.vocab_size = tokenizer.get_vocab_size()
        self.eos_ids = frozenset({0})
        self.own_texts = OwnTexts(tokenizer, self.decode)

    def decode(self, ids: Sequence[int]) -> str:
        self.longest = max(self.longest, len(ids))
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def serialized(self) -> str:
        return self.tokenizer.to_str()

    def continuations(self, token_id: int) -> list[int]:
        spelling = self.tokenizer.id_to_token(token_id) or "no token"
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=False)
        return [token for text, token in vocabulary.items() if text.startswith(spelling)] or [token_id]


def byte_level(corpus: Sequence[str]) -> Adapter:
    """A byte-level BPE tokenizer: ids 0 and 1 are special, 2 to 257 are the bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet, special_tokens=["<eos>", "<pad>"])
    tokenizer.train_from_iterator(corpus, trainer)
    return Adapter(tokenizer)


TOKENIZER = byte_level(["the fox said hello to the owl", "🦊 und 🦉 und größere Tiere"])


def logits_after(history: Sequence[int]) -> torch.Tensor:
    """[V] logits that depend on the whole history."""
    if POISON in history and len(history) > 6:
        return torch.full((VOCAB,), float("nan"))
    generator = torch.Generator().manual_seed(hash(tuple(history)) % 2**63)
    logits = torch.randn(VOCAB, generator=generator) * 3
    logits[POISON] = -torch.inf
    return logits


class MockCache:
    def __init__(self, num_pages: int, page_size: int) -> None:
        self.slots = torch.full((num_pages, page_size), EMPTY)

    def move_pages(self, moves: dict[int, int]) -> None:
        for source, target in moves.items():
            self.slots[target] = self.slots[source]
            self.slots[source] = EMPTY


class MockModel:
    """The part of a model that the generator uses."""

    def __init__(
        self, *, tokenizer: Any = None, eos_ids: Sequence[int] = (), max_positions: int = 1000, memory: int = 0
    ) -> None:
        window = memory or None
        self.config = SimpleNamespace(vocab_size=VOCAB, max_positions=max_positions, longest_window=window)
        self.tokenizer = tokenizer
        self.eos_ids = frozenset(eos_ids)
        self.device = torch.device("cpu")
        self.comm = Alone()
        self.memory = memory
        self.steps: list[list[int]] = []  # tokens per sequence of each step
        self.fail_at: int | None = None  # number of the step that raises

    check_token_ids = Model.check_token_ids

    def new_cache(self, num_pages: int, *, page_size: int, kv_format: str) -> MockCache:
        assert kv_format == "fp16"
        return MockCache(num_pages, page_size)

    def decoder(self, batch: Batch, cache: MockCache) -> torch.Tensor:
        starts = batch.query_starts.tolist()
        self.steps.append([last - first for first, last in pairwise(starts)])
        if len(self.steps) - 1 == self.fail_at:
            raise RuntimeError("the device is on fire")
        cache.slots.view(-1)[batch.slots.long()] = batch.token_ids.long()
        histories = []
        for row, (first, last) in enumerate(pairwise(starts)):
            length = int(batch.context_lens[row])
            assert batch.positions[first:last].tolist() == list(range(length - last + first, length))
            pages = batch.page_table[row, : -(-length // cache.slots.shape[1])].long()
            tokens = cache.slots[pages].flatten()[:length].tolist()
            histories += [tokens[: length - last + token + 1] for token in range(first, last)]
        wanted = [logits_after(histories[row][-self.memory :]) for row in batch.logit_rows.tolist()]
        return torch.stack(wanted) if wanted else torch.empty(0, VOCAB)


def expected(prompt: Sequence[int], params: SamplingParams, eos_ids: Sequence[int] = (), memory: int = 0) -> list[int]:
    """The ids that a request must generate, one full history at a time; stop strings are not looked at.

    A model with a short memory repeats itself.
    """
    ids: list[int] = []
    stream = UniformStream(params.seed)
    ends = {*params.stop_ids, *(() if params.ignore_eos else eos_ids)}
    while len(ids) < params.max_new_tokens and not (ids and ids[-1] in ends):
        logits = logits_after([*prompt, *ids][-memory:])[None]
        if params.is_guided:
            negative = logits_after([*params.negative_prompt, *ids][-memory:])[None]
            logits = guide(logits, negative, params.guidance_scale)
        token = int(sample(logits, [Row(params, stream.at(len(ids)))]))
        if token < 0:
            break
        ids.append(token)
    return ids


def generator(model: MockModel | None = None, **options: int) -> Generator:
    sizes = {"max_tokens": 400, "page_size": 4, "max_batch": 4, "max_step_tokens": 16, **options}
    return Generator(model or MockModel(), **sizes)


def is_idle(gen: Generator) -> bool:
    """Nothing is queued and every page is back."""
    return not gen.scheduler.has_work and gen.pages.num_used == 0


def drain(gen: Generator) -> list[Event]:
    events = []
    while gen.scheduler.has_work:
        events += gen.step()
    return events + gen.step()


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5]),
    top_k=st.sampled_from([0, 4]),
    seed=st.integers(0, 9),
    max_new_tokens=st.integers(1, 9),
    stop_ids=st.lists(st.integers(0, 99), max_size=60),
)
