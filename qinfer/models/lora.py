"""Low-rank adapters (LoRA) of a decoder: loaded and unloaded while it runs, chosen per sequence.

Every product to which a loaded adapter adds has a `LoraStack` with a slot for each adapter. A new adapter is written
into a free slot of the buffers that are there. Where these are too few, too narrow or at another product, larger ones
take their place: the number of slots doubles, and the decoder is wired anew, around the same matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from qinfer.models.config import ModelConfig
from qinfer.models.decoder import Decoder
from qinfer.models.lora_sites import module_sizes, sites, with_stacks
from qinfer.models.lora_stack import LoraStack
from qinfer.models.peft import Pair, read_adapter
from qinfer.parallel.plan import Share


@dataclass(eq=False)
class Lora:
    """An adapter that a model has loaded; made by `Model.load_lora`."""

    id: int  # never given to another adapter of the model
    name: str
    path: Path
    slot: int
    num_modules: int
    rank: int  # the largest of any module
    is_loaded: bool = True
    num_users: int = 0  # requests that have not finished

    def acquire(self) -> None:
        """Count a request.

        Raises:
            ValueError: the adapter is not loaded any more.
        """
        if not self.is_loaded:
            raise ValueError(f"the adapter {self.name!r} was unloaded; Model.load_lora loads it again")
        self.num_users += 1

    def release(self) -> None:
        """Stop counting a request."""
        self.num_users -= 1


class Loras:
    """The adapters of one model, and the buffers that they are in."""

    def __init__(self, config: ModelConfig, decoder: Decoder, share: Share | None, dtype: torch.dtype) -> None:
        """Have none yet.

        Args:
            config: of the model.
            decoder: of the model, or this rank's share of it.
            share: what this rank holds; None if that is everything.
            dtype: of the activations.
        """
        self._device, self._dtype = decoder.norm.weight.device, dtype
        self._sites = sites(config, decoder, share)
        self._sizes = module_sizes(config, decoder)
        self._stacks: dict[tuple[int, str], LoraStack] = {}
        self._loaded: dict[int, Lora] = {}
        self._ids = count()

    @property
    def loaded(self) -> tuple[Lora, ...]:
        """The adapters that are loaded, the oldest first."""
        return tuple(self._loaded.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers on this rank."""
        return sum(stack.nbytes for stack in self._stacks.values())

    def load(self, path: str | Path, name: str | None, decoder: Decoder) -> tuple[Lora, Decoder]:
        """Read an adapter, and return it with the decoder that knows it: a new one if the buffers had to grow.

        Raises:
            CheckpointError: a file is missing, damaged, or does not fit the model.
            UnsupportedError: the adapter does something that is not done here.
        """
        pairs = read_adapter(path, self._sizes)
        used = {lora.slot for lora in self._loaded.values()}
        slot = next(slot for slot in count() if slot not in used)
        rank = max(pair.rank for pair in pairs.values())
        lora = Lora(next(self._ids), name or Path(path).resolve().name, Path(path), slot, len(pairs), rank)
        grown = self._grown(slot, pairs)
        stacks = self._stacks | grown
        for key, site in self._sites.items():
            if key in stacks:
                stacks[key].write(slot, site, [pairs.get(module) for module in site.modules])
        if grown:
            self._stacks, decoder = stacks, with_stacks(decoder, stacks)
        self._loaded[lora.id] = lora
        return lora, decoder

    def unload(self, lora: Lora) -> None:
        """Free the slot of an adapter.

        Raises:
            ValueError: the adapter is not loaded here, or a request that uses it has not finished.
        """
        self.check(lora)
        if lora.num_users:
            users = "a request uses it" if lora.num_users == 1 else f"{lora.num_users} requests use it"
            raise ValueError(f"the adapter {lora.name!r} cannot be unloaded while {users}: let them finish, or cancel")
        self.forget(lora.id)

    def forget(self, number: int) -> None:
        """Free the slot of an adapter, given its id, whoever uses it."""
        self._loaded.pop(number).is_loaded = False

    def check(self, lora: Lora) -> None:
        """Raise TypeError unless it is an adapter, and ValueError unless it is loaded here."""
        if not isinstance(lora, Lora):
            raise TypeError(f"lora must be what Model.load_lora returned, got {type(lora).__name__}")
        if self._loaded.get(lora.id) is not lora:
            problem = "belongs to another model" if lora.is_loaded else "was unloaded"
            raise ValueError(f"the adapter {lora.name!r} {problem}; Model.load_lora loads one")

    def find(self, number: int) -> Lora:
        """Return the adapter of an id."""
        return self._loaded[number]

    def _grown(self, slot: int, pairs: dict[str, Pair]) -> dict[tuple[int, str], LoraStack]:
        """Return larger buffers where a new adapter does not fit into those that are there."""
        grown = {}
        for key, site in self._sites.items():
            old = self._stacks.get(key)
            num_slots, room = (0, 0) if old is None else (old.a.shape[0], old.a.shape[2])
            rank = max((pairs[module].rank for module in site.modules if module in pairs), default=0)
            # An adapter that adds nothing here needs a slot of zeros nevertheless where others have theirs.
            if (old is not None and slot >= num_slots) or rank > room:
                num_slots = max(num_slots, 1 << slot.bit_length())
                grown[key] = LoraStack.empty(
                    site, num_slots, max(rank, room), device=self._device, dtype=self._dtype, old=old
                )
        return grown
