"""The formats in which keys and values are stored: a codec for each of the two, found by one name.

Layers may differ: "q4,0-1:q8,-1:fp16" stores all in q4, but layers 0 and 1 in q8 and the last one in fp16.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qinfer.errors import UnsupportedError
from qinfer.kernels.kv_codec import CODECS, Codec


@dataclass(frozen=True)
class KVFormat:
    """How keys and how values lie in pages."""

    name: str
    keys: Codec
    values: Codec

    def nbytes_per_token(self, num_kv_heads: int, head_dim: int) -> int:
        """Return the bytes that one token takes in one layer, its keys and its values together.

        Raises:
            UnsupportedError: rows of this size cannot be stored so.
        """
        return num_kv_heads * (self.keys.nbytes(head_dim) + self.values.nbytes(head_dim))


KV_FORMATS: dict[str, KVFormat] = {name: KVFormat(name, codec, codec) for name, codec in CODECS.items()}


def kv_format(name: str) -> KVFormat:
    """Return the format of this name: a codec for both, as "q4", or one for each, as "k8v4" or "kfp16vq4".

    Behind k and v stands the name of a codec, or the bits of one that starts with q. ExLlamaV2's "Q6" is k8v4.

    Raises:
        UnsupportedError: There is none; the message lists those there are.
    """
    if name in KV_FORMATS:
        return KV_FORMATS[name]
    # Names of codecs hold no v, so what stands behind k ends at the first one.
    pair = re.fullmatch(r"k([^v]+)v([^v]+)", name)
    if pair is not None:
        codecs = [CODECS.get(side) or CODECS.get(f"q{side}") for side in pair.groups()]
        if codecs[0] is not None and codecs[1] is not None:
            return KVFormat(name, codecs[0], codecs[1])
    raise UnsupportedError(
        f"KV cache format {name!r} is not available; pairs such as k8v4 and these are: {', '.join(KV_FORMATS)}"
    )


def layer_formats(text: str, num_layers: int) -> tuple[KVFormat, ...]:
    """Return the format of every layer.

    Args:
        text: The format of all layers, then, behind commas, what differs: LAYER:FORMAT or FIRST-LAST:FORMAT, the last
            layer included. Layers count from 0, and from -1 backwards. What comes later counts.
        num_layers: Layers of the model.

    Raises:
        UnsupportedError: There is no such format.
        ValueError: A part cannot be read, or there is no such layer.
    """
    first, *rest = text.split(",")
    formats = [kv_format(first.strip())] * num_layers
    for part in rest:
        layers, _, name = part.strip().partition(":")
        span = re.fullmatch(r"(-?\d+)(?:-(-?\d+))?", layers)
        if span is None or not name:
            raise ValueError(
                f"KV cache format {text!r}: behind the first comma, layers must stand as 3:q8 or 0-1:q8, got {part!r}"
            )
        start, stop = (int(number) for number in (span[1], span[2] or span[1]))
        for layer in (start, stop):
            if not -num_layers <= layer < num_layers:
                raise ValueError(f"KV cache format {text!r}: there is no layer {layer}, the model has {num_layers}")
        chosen = range(start % num_layers, stop % num_layers + 1)
        if not chosen:
            raise ValueError(f"KV cache format {text!r}: layers {layers} of {num_layers} are none")
        try:
            formats[chosen.start : chosen.stop] = [kv_format(name)] * len(chosen)
        except UnsupportedError as problem:
            raise UnsupportedError(f"layers {layers}: {problem}") from problem
    return tuple(formats)


def nbytes_per_token(formats: Sequence[KVFormat], num_kv_heads: int, head_dim: int) -> int:
    """Return the bytes that one token takes in all layers together, given the format of each.

    Raises:
        UnsupportedError: A layer cannot store rows of this size so; the message names it where layers differ.
    """
    total = 0
    for layer, stored in enumerate(formats):
        try:
            total += stored.nbytes_per_token(num_kv_heads, head_dim)
        except UnsupportedError as problem:
            where = f"layer {layer}: " if len(set(formats)) > 1 else ""
            raise UnsupportedError(f"{where}{problem}") from problem
    return total
