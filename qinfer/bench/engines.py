"""Other engines under the same measurement: prompt, then one greedy token per sequence and step, ids on the host.

Each engine is driven through its own public interface, at the level below its generator: a cache that is filled once,
and a forward pass per step. That is the least that it can take; its scheduling and sampling come on top. Caches are
fp16, for not every engine has the same others.
"""

from __future__ import annotations

import argparse
import importlib
import random
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from qinfer.bench.measure import Times, synchronize, time_calls
from qinfer.bench.recipes import WEIGHTS
from qinfer.bench.synthetic import PRESETS
from qinfer.errors import UnsupportedError

WARM_UP = 3  # steps that do not count, as many as of qinfer


class Engine(Protocol):
    """A model in another engine, with an empty cache for `batch` sequences."""

    vocab_size: int
    max_positions: int
    bytes_per_step: int | None  # of weights; None where the engine does not tell

    def fill(self, ids: Tensor) -> None:
        """Forget everything, then process ids [B, T], on the host, as far as their keys and values."""
        ...

    def step(self, ids: Tensor) -> Tensor:
        """Process one more id per sequence, [B, 1] on the host or where the last logits were: [B, V] logits."""
        ...


def load_package(name: str) -> ModuleType:
    """Import an engine.

    Raises:
        UnsupportedError: it is not installed, or does not load.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as problem:
        raise UnsupportedError(
            f"--engine {name} needs the package {name}, which does not load here ({problem}); "
            f"pip install {name}, or leave --engine out to measure qinfer alone"
        ) from problem


class Transformers:
    """Hugging Face transformers, with whatever attention it chooses."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        """Load the checkpoint, or make a preset's model with random weights on the device."""
        library = load_package("transformers")
        self._device = device
        if options.model:
            model = library.AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
        else:
            dtype = WEIGHTS[options.weights].dtype if device.type == "cuda" else torch.float32
            with device:
                model = library.AutoModelForCausalLM.from_config(_transformers_config(library, options.preset))
            model = model.to(dtype)
        self._model = model.to(device).eval()
        self._cache: Any = None
        self.vocab_size = int(self._model.config.vocab_size)
        self.max_positions = int(self._model.config.max_position_embeddings)
        table = self._model.get_input_embeddings().weight
        head = self._model.get_output_embeddings().weight
        weights = sum(tensor.nbytes for tensor in (*self._model.parameters(), *self._model.buffers()))
        self.bytes_per_step = weights - (0 if head is table else table.nbytes)

    def fill(self, ids: Tensor) -> None:
        """Process a prompt; logits are asked for its last token alone."""
        self._cache = None
        self.step(ids)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Process ids and return the logits behind the last."""
        ids = ids.to(self._device)
        out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits


def _transformers_config(library: ModuleType, preset: str) -> object:
    """Say a preset in the words of transformers."""
    config = PRESETS[preset]
    return library.AutoConfig.for_model(
        config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.mlp_size,
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=config.tied_embeddings,
    )


class ExLlamaV2:
    """ExLlamaV2 with its fp16 cache."""

    bytes_per_step: int | None = None

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        """Load the checkpoint onto the GPUs at hand."""
        library = load_package("exllamav2")
        length = max(options.context + options.new_tokens, options.prefill)
        config = library.ExLlamaV2Config(options.model)
        config.max_batch_size = options.batch
        config.arch_compat_overrides()
        self.vocab_size, self.max_positions = int(config.vocab_size), int(config.max_seq_len)
        self._model = library.ExLlamaV2(config)
        self._cache = library.ExLlamaV2Cache(self._model, batch_size=options.batch, max_seq_len=length, lazy=True)
        self._model.load_autosplit(self._cache)

    @torch.inference_mode()
    def fill(self, ids: Tensor) -> None:
        """Process a prompt without its logits."""
        self._cache.current_seq_len = 0
        self._model.forward(ids, self._cache, preprocess_only=True)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Process one id per sequence."""
        logits: Tensor = self._model.forward(ids.cpu(), self._cache)[:, -1]
        return logits


class ExLlamaV3:
    """ExLlamaV3 with its fp16 cache."""

    bytes_per_step: int | None = None
    PAGE = 256  # caches come in multiples of it

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        """Load the checkpoint onto the device."""
        library = load_package("exllamav3")
        length = max(options.context + options.new_tokens, options.prefill)
        self._length = -(-length // self.PAGE) * self.PAGE
        config = library.Config.from_directory(options.model)
        self.vocab_size, self.max_positions = int(config.vocab_size), self._length
        self._model = library.Model.from_config(config)
        self._cache = library.Cache(self._model, max_num_tokens=options.batch * self._length)
        self._model.load(device=device)
        self._past = 0

    def _parameters(self, ids: Tensor) -> dict[str, Any]:
        shape = (ids.shape[0], self._length)
        past, self._past = self._past, self._past + ids.shape[1]
        return {"attn_mode": "flash_attn", "cache": self._cache, "past_len": past, "batch_shape": shape}

    @torch.inference_mode()
    def fill(self, ids: Tensor) -> None:
        """Process a prompt without its logits."""
        self._past = 0
        self._model.prefill(ids, self._parameters(ids))

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Process one id per sequence."""
        ids = ids.cpu()
        logits: Tensor = self._model.forward(ids, self._parameters(ids))[:, -1]
        return logits


ENGINES: dict[str, Callable[[argparse.Namespace, torch.device], Engine]] = {
    "transformers": Transformers,
    "exllamav2": ExLlamaV2,
    "exllamav3": ExLlamaV3,
}


def check_engines(engines: Sequence[str], options: argparse.Namespace) -> None:
    """Refuse before anything is loaded what an engine cannot do.

    Raises:
        UnsupportedError: an engine is not installed, or cannot run this model like this.
    """
    foreign = [engine for engine in engines if engine != "qinfer"]
    if options.context < 2 or options.new_tokens <= WARM_UP:
        raise ValueError(f"--engine wants --context of at least 2 and --new-tokens of more than {WARM_UP}")
    for engine in foreign:
        load_package(engine)
        if options.tp or options.gpus:
            raise UnsupportedError(f"--engine {engine} runs in one process: leave out --tp and --gpus")
        if options.kv_format != "fp16":
            raise UnsupportedError(f"--engine {engine} takes --kv-format fp16, got {options.kv_format}")
        if engine != "transformers" and options.preset:
            raise UnsupportedError(f"--engine {engine} reads a checkpoint: give --model DIR instead of --preset")
        if options.preset and (WEIGHTS[options.weights].make is not None or options.head):
            raise UnsupportedError("--engine transformers runs a preset in fp16 or bf16: give --weights fp16 or bf16")


def measure_engine(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure decoding and the processing of a prompt, and return fields for a report."""
    engine = ENGINES[name](options, device)
    prefill_tokens = min(options.prefill, engine.max_positions)
    rng = random.Random(0)

    def prompt(batch: int, tokens: int) -> Tensor:
        return torch.tensor([[rng.randrange(engine.vocab_size) for _ in range(tokens)] for _ in range(batch)])

    steps = decode(engine, prompt(options.batch, options.context), options.new_tokens, device)
    # The cache of an engine may be made for one batch size: the prompt is as many sequences, and counts as all of them.
    ids = prompt(options.batch, max(2, prefill_tokens // options.batch))

    def prefill() -> None:
        engine.fill(ids[:, :-1])
        engine.step(ids[:, -1:])

    return {
        "ms_per_step": steps.asdict(),
        "bytes_per_step": engine.bytes_per_step,
        "prefill_tokens": ids.numel(),
        "prefill_ms": time_calls(prefill, device, repeats=10 if device.type == "cuda" else 3).asdict(),
    }


def decode(engine: Engine, ids: Tensor, new_tokens: int, device: torch.device) -> Times:
    """Time steps of greedy decoding behind a prompt [B, T], each until its ids are on the host."""
    engine.fill(ids[:, :-1])
    ids = ids[:, -1:]
    samples = []
    for number in range(new_tokens):
        synchronize(device)
        start = time.perf_counter()
        ids = engine.step(ids).argmax(-1, keepdim=True).cpu()
        if number >= WARM_UP:
            samples.append((time.perf_counter() - start) * 1e3)
    return Times(tuple(samples))
