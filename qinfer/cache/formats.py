"""The formats in which keys and values are stored: a codec for each of the two, found by one name."""

from __future__ import annotations

import re
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
