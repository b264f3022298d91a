"""Model: a decoder with its config and its tokenizer, loaded from a folder."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qinfer.cache.paged import PagedKVCache
from qinfer.checkpoint import Checkpoint
from qinfer.errors import CheckpointError, UnsupportedError
from qinfer.kernels.device import default_device
from qinfer.models.architectures import name_map, read_config
from qinfer.models.batch import Batch, Piece
from qinfer.models.config import ModelConfig
from qinfer.models.decoder import Decoder
from qinfer.models.invariant import check_invariant
from qinfer.models.lora import Lora, Loras
from qinfer.models.placement import place, sizes_of
from qinfer.parallel.comm import Alone, Communicator, Group
from qinfer.parallel.plan import Plan
from qinfer.parallel.spawn import lead
from qinfer.tokenizer import Tokenizer

CHUNK = 2048  # tokens per step of `Model.logits`

DTYPES = {
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "float32": torch.float32,
}
_KV_FORMATS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


class Model:
    """A language model that is ready to run.

    Attributes:
        config: what the model is.
        decoder: batches and a cache in, logits out; another one where adapters are loaded.
        device: where it runs.
        dtype: dtype of its activations; the residual stream is fp32 whatever it is.
        tokenizer: text to token ids and back; None when the model has none.
        eos_ids: token ids that end a text, of the config and of the tokenizer.
        plan: what each rank holds; None when this process holds everything.
    """

    def __init__(
        self,
        config: ModelConfig,
        decoder: Decoder,
        *,
        device: torch.device,
        dtype: torch.dtype,
        tokenizer: Tokenizer | None = None,
        plan: Plan | None = None,
    ) -> None:
        """Put the parts together."""
        self.config = config
        self.decoder = decoder
        self.device = device
        self.dtype = dtype
        self.tokenizer = tokenizer
        self.plan = plan
        share = None if plan is None else plan.shares[decoder.comm.rank]
        self._loras = Loras(config, decoder, share, dtype)
        self.eos_ids = config.eos_ids | (frozenset() if tokenizer is None else tokenizer.eos_ids)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        gpus: Sequence[float] | None = None,
        cache_tokens: int = 8192,
        parallel: Group | None = None,
        invariant: bool = False,
    ) -> Model:
        """Load a checkpoint.

        Args:
            path: folder with config.json and safetensors files; without a tokenizer.json the model takes ids only.
            device: where to run, "cuda" or "cpu"; None takes CUDA if there is one.
            dtype: of the activations, as torch's or as "fp16", "bf16", "fp32"; None takes fp32 on a CPU, and on a GPU
                the checkpoint's, or bf16 if that is fp32.
            gpus: GB to use of each GPU, 0 to leave one out; divides the model among them, one process each, which are
                started here and end with the model. On a CPU: GB for each of so many processes.
            cache_tokens: tokens that the division leaves room for in the cache; with `gpus` or `parallel` only.
            parallel: this process is a rank of a group, all of which load the model; with `gpus`, one entry per rank,
                or else the memory that is free.
            invariant: a text's logits do not depend on who else is in the batch, to the last bit, nor, with a plain
                cache, on the chunks of its prompt; costs speed, most of it in prompts. Not on a CPU.

        Raises:
            CheckpointError: a file is missing, damaged or contradicts another.
            UnsupportedError: the model, its format, the device or the dtype is not served.
            PlanError: the model cannot be divided like that.
            GroupError: a rank is gone.
        """
        checkpoint = Checkpoint(path)
        config = read_config(checkpoint)
        found = _resolve_device(device) if parallel is None else parallel.device
        resolved = resolve_dtype(dtype, found, config)
        if invariant:
            check_invariant(found, config)
        tokenizer = load_tokenizer(checkpoint, config)
        kind: dict[str, Any] = {"dtype": resolved, "invariant": invariant}
        if gpus is None and parallel is None:
            decoder = Decoder.load(checkpoint, config, device=found, comm=Alone(), **kind)
            return cls(config, decoder, device=found, dtype=resolved, tokenizer=tokenizer)
        plan = place(sizes_of(checkpoint, config), gpus, parallel, cache_tokens)
        if plan.size == 1 and parallel is None:
            found = torch.device("cuda", plan.shares[0].gpu) if found.type == "cuda" else found
            decoder = Decoder.load(checkpoint, config, device=found, comm=Alone(), **kind)
            return cls(config, decoder, device=found, dtype=resolved, tokenizer=tokenizer)
        if parallel is None:
            name = str(resolved).removeprefix("torch.")
            options = {"path": str(path), "dtype": name, "gpus": list(gpus or ()), "cache_tokens": cache_tokens}
            options["invariant"] = invariant
            devices = [f"cuda:{share.gpu}" if found.type == "cuda" else "cpu" for share in plan.shares]
            parallel = lead("qinfer.engine.follow:run", options, devices)
        try:
            found = parallel.device
            decoder = Decoder.load(checkpoint, config, device=found, comm=parallel, plan=plan, **kind)
            parallel.barrier()
        except BaseException as problem:
            parallel.fail(f"{type(problem).__name__}: {problem}")
            parallel.close()
            raise
        model = cls(config, decoder, device=found, dtype=resolved, tokenizer=tokenizer, plan=plan)
        # Also at the end of the process.
        weakref.finalize(model, parallel.close)
        return model

    @property
    def comm(self) -> Communicator:
        """The ranks that share the model."""
        return self.decoder.comm

    def close(self) -> None:
        """End the processes that share the model, which cannot run any more; nothing happens if there are none."""
        self.comm.close()

    @property
    def loras(self) -> tuple[Lora, ...]:
        """The adapters that are loaded, the oldest first."""
        return self._loras.loaded

    def load_lora(self, path: str | Path, *, name: str | None = None) -> Lora:
        """Load a LoRA adapter beside those that are loaded already; requests choose theirs.

        Between two steps of a generator, or before the first, and in its thread.

        Args:
            path: folder with adapter_config.json and adapter_model.safetensors, as PEFT saves them.
            name: what errors call it; None takes the name of the folder.

        Returns:
            What `Generator.submit(..., lora=...)` and its like take.

        Raises:
            CheckpointError: a file is missing, damaged, or does not fit the model.
            UnsupportedError: the adapter does something that is not done here, or the model is invariant.
        """
        if any(linear.invariant for linear in self.decoder.linears()):
            raise UnsupportedError(
                "adapters add in an order that depends on the rows of a step: load without invariant"
            )
        if self.config.experts is not None and self.comm.size > 1:
            raise UnsupportedError("adapters of a mixture of experts work where one process holds the whole model")
        lora, self.decoder = self._loras.load(path, name, self.decoder)
        # What rank 0 can read and place, the others can, if they see the same files.
        self.comm.tell({"load_lora": {"path": str(Path(path).resolve()), "name": lora.name}})
        return lora

    def unload_lora(self, lora: Lora) -> None:
        """Forget an adapter; its place is taken by the next one.

        Raises:
            ValueError: it is not loaded, or a request that uses it has not finished.
        """
        self._loras.unload(lora)
        self.comm.tell({"unload_lora": lora.id})

    def forget_lora(self, number: int) -> None:
        """Forget an adapter because rank 0 has: requests that it has cancelled may not be known as such here yet."""
        self._loras.forget(number)

    def find_lora(self, number: int | None) -> Lora | None:
        """Return the loaded adapter of an id; None for None."""
        return None if number is None else self._loras.find(number)

    def check_lora(self, lora: Lora) -> None:
        """Raise TypeError unless it is an adapter, and ValueError unless this model has loaded it."""
        self._loras.check(lora)

    def logits(self, token_ids: Sequence[int] | Tensor, *, lora: Lora | None = None) -> Tensor:
        """Score a text: the logits behind every one of its tokens.

        Args:
            token_ids: [T] ids, from 1 to config.max_positions of them.
            lora: the adapter to run with.

        Returns:
            [T, V] fp32 on the model's device; row t holds the logits of the token that follows token t.

        Raises:
            ValueError: there are no ids or too many, one is out of range, or the adapter is not loaded.
            TypeError: the ids are not integers.
        """
        ids = self._check_text(token_ids, lora)
        self.comm.tell({"token_ids": ids, "lora": None if lora is None else lora.id})
        logits = torch.empty(len(ids), self.config.vocab_size, dtype=torch.float32, device=self.device)
        for rows, batch, cache in self._chunks(ids, lora):
            logits[rows] = self.decoder(batch, cache)
        return logits

    def hidden_states(
        self, token_ids: Sequence[int] | Tensor, layers: Sequence[int], *, lora: Lora | None = None
    ) -> dict[int, Tensor]:
        """Return the residual stream of a text between blocks.

        Layer i is what the first i blocks leave: 0 is the embedding and config.num_layers the input of the last norm.
        That is `hidden_states[i]` of transformers, except for its last entry, which it normalizes and this does not.
        Blocks behind the last layer asked for do not run.

        Args:
            token_ids: [T] ids, from 1 to config.max_positions of them.
            layers: numbers of blocks, each from 0 to config.num_layers.
            lora: the adapter to run with.

        Returns:
            Layer -> [T, C] fp32 on the model's device.

        Raises:
            ValueError: there are no ids or too many, one is out of range, a layer is, or the adapter is not loaded.
            TypeError: the ids or the layers are not integers.
        """
        ids, wanted = self._check_text(token_ids, lora), sorted({index(layer) for layer in layers})
        if not wanted or not 0 <= wanted[0] <= wanted[-1] <= self.config.num_layers:
            raise ValueError(f"layers must be from 0 to {self.config.num_layers}, at least one, got {list(layers)}")
        self.comm.tell({"token_ids": ids, "lora": None if lora is None else lora.id, "layers": wanted})
        shape = (len(ids), self.config.hidden_size)
        states = {layer: torch.empty(shape, dtype=torch.float32, device=self.device) for layer in wanted}
        for rows, batch, cache in self._chunks(ids, lora):
            for layer, state in self.decoder.residuals(batch, cache, wanted).items():
                states[layer][rows] = state
        return states

    def _check_text(self, token_ids: Sequence[int] | Tensor, lora: Lora | None) -> list[int]:
        """Return the ids of a text as a list, after checking them, their number and the adapter."""
        ids = self.check_token_ids(token_ids)
        if lora is not None:
            self.check_lora(lora)
        if len(ids) > self.config.max_positions:
            raise ValueError(f"token_ids must be at most {self.config.max_positions} for this model, got {len(ids)}")
        return ids

    def _chunks(self, ids: Sequence[int], lora: Lora | None) -> Iterator[tuple[slice, Batch, PagedKVCache]]:
        """Yield a text as steps over a cache of its own, with their rows."""
        page_size, adapter = 256, -1 if lora is None else lora.slot
        cache = self.new_cache(-(-len(ids) // page_size), page_size=page_size)
        for start in range(0, len(ids), CHUNK):
            piece = Piece(ids[start : start + CHUNK], start, range(cache.num_pages), "all", adapter)
            yield slice(start, start + CHUNK), Batch.build([piece], page_size=page_size, device=self.device), cache

    def check_token_ids(self, token_ids: Sequence[int] | Tensor) -> list[int]:
        """Return the ids as a list of integers, after checking that the model knows each of them.

        Args:
            token_ids: [T] ids.

        Raises:
            ValueError: there are no ids, they are no vector, or one is not in [0, config.vocab_size).
            TypeError: the ids are not integers.
        """
        if isinstance(token_ids, Tensor):
            if token_ids.dim() != 1:
                raise ValueError(f"token_ids must be [T], got {list(token_ids.shape)}")
            token_ids = token_ids.tolist()
        ids = [index(token) for token in token_ids]
        if not ids:
            raise ValueError("token_ids must hold at least one id, got none")
        for position, token in enumerate(ids):
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(
                    f"token ids must be in [0, {self.config.vocab_size}), got {token} at position {position}"
                )
        return ids

    def new_cache(self, num_pages: int, *, page_size: int = 256, kv_format: str | None = None) -> PagedKVCache:
        """Make an empty cache for this model.

        Args:
            num_pages: pages per layer.
            page_size: tokens per page.
            kv_format: how keys and values are stored, the same in all layers as "q4" or not, as "q4,0-1:q8,-1:fp16";
                None stores them in the dtype of the activations.

        Raises:
            UnsupportedError: there is no such format.
            ValueError: there is no such layer.
        """
        kv_format = _KV_FORMATS[self.dtype] if kv_format is None else kv_format
        num_layers, num_kv_heads = self.config.num_layers, self.config.num_kv_heads
        if self.plan is not None:
            start, stop = self.plan.shares[self.comm.rank].kv_heads
            num_kv_heads = stop - start
            if not num_kv_heads:
                # A rank without heads keeps the pages' numbers, but nobody reads or writes them.
                num_layers, num_kv_heads, kv_format = 1, 1, kv_format.partition(",")[0]
        return PagedKVCache(
            num_layers=num_layers,
            num_pages=num_pages,
            num_kv_heads=num_kv_heads,
            head_dim=self.config.head_dim,
            device=self.device,
            page_size=page_size,
            kv_format=kv_format,
        )

    def __repr__(self) -> str:
        size = f"{self.decoder.num_parameters / 1e6:,.1f} M parameters in {self.decoder.nbytes / 1e6:,.1f} MB"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Model({self.config.model_type}, {size}, {dtype} on {self.device})"


def load_tokenizer(checkpoint: Checkpoint, config: ModelConfig) -> Tokenizer | None:
    """Load the tokenizer beside a model; None where there is none.

    Raises:
        CheckpointError: it is damaged, or has more tokens than the model.
    """
    file = checkpoint.path / "tokenizer.json"
    if not file.is_file():
        return None
    tokenizer = Tokenizer.load(checkpoint.path)
    if tokenizer.vocab_size > config.vocab_size:
        rows = f"{name_map(config).embed}.weight only {config.vocab_size} rows"
        raise CheckpointError(file, None, f"has {tokenizer.vocab_size} tokens, but {rows}")
    return tokenizer


def _resolve_device(device: torch.device | str | None) -> torch.device:
    """Return the device to run on, after checking that there is one of its kind."""
    found = default_device()
    if device is None:
        return found
    try:
        device = torch.device(device)
    except RuntimeError as problem:
        raise ValueError(f"device must be 'cuda' or 'cpu', got {device!r}") from problem
    if device.type not in ("cuda", "cpu"):
        raise UnsupportedError(f"models do not run on {device.type!r}; 'cuda' and 'cpu' work")
    if device.type == "cuda" and found.type != "cuda":
        raise UnsupportedError(f"torch finds no GPU for device {str(device)!r}; 'cpu' works")
    return device


def resolve_dtype(dtype: torch.dtype | str | None, device: torch.device, config: ModelConfig) -> torch.dtype:
    """Return the dtype of the activations, after checking that the device serves it."""
    if dtype is None:
        if device.type == "cpu":
            return torch.float32
        stored = DTYPES[config.dtype]
        return torch.bfloat16 if stored == torch.float32 else stored
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved not in _KV_FORMATS:
        raise UnsupportedError(f"models do not run in {dtype}; fp16 and bf16 work, and fp32 on a CPU")
    if resolved == torch.float32 and device.type == "cuda":
        raise UnsupportedError("models do not run in fp32 on a GPU; fp16 and bf16 work")
    return resolved
