"""PagedKVCache: the page tensors of all layers; who owns which page is decided elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qinfer.cache.formats import layer_formats, nbytes_per_token
from qinfer.kernels.kv_codec import Codec, KVPages
from qinfer.kernels.kv_write import kv_write

PAGE_SIZE_STEP = 16  # the smallest key tile of attention, which must not straddle two pages


class PagedKVCache:
    """Zero-filled pages for the keys and values of every layer.

    Attributes:
        num_pages: Pages per layer; page i of all layers belongs to the same tokens.
        page_size: Tokens per page.
        formats: How a row of each layer is stored.
        device: Where the pages are.
        nbytes: Bytes of all pages of all layers.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        page_size: int = 256,
        kv_format: str = "fp16",
    ) -> None:
        """Allocate all pages.

        Args:
            num_layers: Layers of the model.
            num_pages: Pages per layer.
            num_kv_heads: Heads that share keys and values, G.
            head_dim: Numbers per key and per value, D.
            device: Where to allocate.
            page_size: Tokens per page, S, a multiple of 16.
            kv_format: Name of a format of `KV_FORMATS`, or a pair such as "k8v4"; with exceptions for single layers,
                as in "q4,0-1:q8,-1:fp16".

        Raises:
            ValueError: A count is below 1, the page size is no multiple of 16, or there is no such layer.
            UnsupportedError: There is no such format, or it cannot store rows of `head_dim` numbers.
        """
        counts = {"num_layers": num_layers, "num_pages": num_pages, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if page_size < 1 or page_size % PAGE_SIZE_STEP != 0:
            raise ValueError(f"page_size must be a multiple of {PAGE_SIZE_STEP}, got {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self.formats = layer_formats(kv_format, num_layers)
        # Before anything is allocated, so that a refusal names the layer.
        nbytes_per_token(self.formats, num_kv_heads, head_dim)
        # One tensor per codec and kind for all layers, so that a page is copied in few launches.
        self._storage: list[Tensor] = []

        def side(codecs: list[Codec]) -> list[KVPages]:
            free = {}
            for codec in dict.fromkeys(codecs):
                places = (codecs.count(codec), num_pages, num_kv_heads, page_size)
                codes = torch.zeros(*places, codec.width(head_dim), dtype=codec.dtype, device=device)
                scales = torch.zeros(places, dtype=torch.bfloat16, device=device) if codec.has_scales else None
                self._storage += [codes] if scales is None else [codes, scales]
                free[codec] = iter(
                    [KVPages(x, None if scales is None else scales[i], codec) for i, x in enumerate(codes)]
                )
            return [next(free[codec]) for codec in codecs]

        keys, values = [stored.keys for stored in self.formats], [stored.values for stored in self.formats]
        self._pages = list(zip(side(keys), side(values), strict=True))
        self.device = self._storage[0].device
        self.nbytes = sum(tensor.nbytes for tensor in self._storage)

    def pages(self, layer: int) -> tuple[KVPages, KVPages]:
        """Return the key pages and the value pages of a layer, not copied."""
        return self._pages[layer]

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Store the keys and values of new tokens.

        Args:
            layer: Index of the layer.
            k: [T, G, D] fp16, bf16 or fp32 keys.
            v: Values, like `k`.
            slots: [T] int32, page * page_size + offset; -1 skips the row.
        """
        kv_write(k, v, *self._pages[layer], slots)

    def copy_page(self, source: int, target: int) -> None:
        """Make page `target` equal to page `source` in every layer.

        Raises:
            ValueError: There is no such page.
        """
        self._check((source, target))
        for tensor in self._storage:
            tensor[:, target] = tensor[:, source]

    def move_pages(self, moves: Mapping[int, int]) -> None:
        """Make page moves[source] what page `source` is, in every layer and for all at once: a ring of pages rotates.

        Args:
            moves: Old page to new one. A new one that is no old one loses what it held; an old one that is no new one
                keeps it.

        Raises:
            ValueError: There is no such page, or two pages would become one.
        """
        sources, targets = list(moves), list(moves.values())
        self._check((*sources, *targets))
        if len(set(targets)) < len(targets):
            raise ValueError(f"two pages cannot move to one, got {dict(moves)}")
        if moves:
            for tensor in self._storage:
                # One layer at a time, because what moves is held twice meanwhile.
                for layer in tensor:
                    layer[targets] = layer[sources]

    def _check(self, pages: Iterable[int]) -> None:
        """Refuse numbers that are not pages; a negative one would otherwise count from the end."""
        for page in pages:
            if not 0 <= page < self.num_pages:
                raise ValueError(f"a page must be from 0 to {self.num_pages - 1}, got {page}")
