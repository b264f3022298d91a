"""How a key or a value, a row of D numbers, becomes bytes of a page and numbers again.

    plain   the row in a float dtype
    e5m2    the upper byte of the fp16 number, rounded; no scale
    e4m3    sign, 4 bits of exponent, 3 of mantissa, of x / scale with scale = max |x| / 448
    qN      code_i = floor(w_i / (scale g) + z / g + 1/2),   decoded (g code_i - z) scale,
            with w = H x and scale = max |w| / r

for N = 8, 6 or 4 bits, g = 2^(8-N), z = 128, 126, 120 and r = 127, 126, 120: whatever N is, a code moved to the top of
a byte decodes as byte - z, which is exact in fp16. For N < 8 all 2^N codes are used, half of them on each side of zero;
a row of zeros has the scale 0. H rotates runs of L features by Sylvester's Hadamard matrix over sqrt(L), L being the
largest power of two that divides D, at most 64: it spreads outliers over the run. H is its own inverse, so attention
rotates a query once, not every key, and what it has summed up over rotated values once, not every value.

One scale per row and not per run is what lets attention multiply it into scores and probabilities instead of into
every number. Scales are bf16, which has the range of fp32; a code is chosen for the scale as stored.

Memory: codes [P, G, S, bytes of a row], scales [P, G, S]. In 4 bits, byte i holds feature 2i in its low half and 2i + 1
in its high half. In 6 bits, D / 2 such bytes hold the low four bits, and D / 4 bytes the upper two of features 4i to
4i + 3, the first one lowest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qinfer.errors import UnsupportedError
from qinfer.kernels.checks import check_float, check_rows, check_shape

MAX_RUN = 64
MIN_RUN = 16  # the smallest product that tensor cores take
NUM_PLANES = {"plain": 1, "e5m2": 2, "e4m3": 2, "q8": 2, "q6": 4, "q4": 4}  # features per 16-bit word, by scheme
SMALLEST_SCALE = 1e-30  # below it a row counts as zero: the scale's reciprocal would not be finite
E5M2_MAX = 57344.0
E4M3_MAX = 1.75  # 448 / 256: a code's bits, taken for those of an fp16 number, stand for a 256th


@dataclass(frozen=True)
class Codec:
    """One way to store a row."""

    name: str
    scheme: str  # "plain", "e5m2", "e4m3", "q8", "q6" or "q4"
    bits: int  # per number, without the scale
    dtype: torch.dtype  # of the page tensor

    @property
    def has_scales(self) -> bool:
        """Whether a row has a scale beside its codes."""
        return self.scheme not in ("plain", "e5m2")

    @property
    def is_rotated(self) -> bool:
        """Whether a row is rotated before it is coded."""
        return self.scheme.startswith("q")

    def width(self, head_dim: int) -> int:
        """Return the elements of the page tensor that a row takes.

        Raises:
            UnsupportedError: rows of this size cannot be stored so.
        """
        if self.is_rotated and head_dim % MIN_RUN:
            raise UnsupportedError(
                f"KV cache format {self.name!r} needs a head size that is a multiple of {MIN_RUN}, got {head_dim}; "
                "fp16, bf16, fp32, fp8 and fp8_e5m2 take any even one"
            )
        if self.scheme != "plain" and head_dim % 2:
            raise UnsupportedError(
                f"KV cache format {self.name!r} needs an even head size, got {head_dim}; fp16, bf16 and fp32 take any"
            )
        return head_dim * self.bits // (8 * self.dtype.itemsize)

    def nbytes(self, head_dim: int) -> int:
        """Return the bytes of a row, its scale included."""
        return self.width(head_dim) * self.dtype.itemsize + 2 * self.has_scales


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("fp16", "plain", 16, torch.float16),
        Codec("bf16", "plain", 16, torch.bfloat16),
        Codec("fp32", "plain", 32, torch.float32),
        Codec("fp8", "e4m3", 8, torch.uint8),
        Codec("fp8_e5m2", "e5m2", 8, torch.uint8),
        Codec("q8", "q8", 8, torch.uint8),
        Codec("q6", "q6", 6, torch.uint8),
        Codec("q4", "q4", 4, torch.uint8),
    )
}
_PLAIN = {codec.dtype: codec for codec in CODECS.values() if codec.scheme == "plain"}


@dataclass(frozen=True)
class KVPages:
    """The keys, or the values, of one layer."""

    codes: Tensor  # [P, G, S, width]
    scales: Tensor | None  # [P, G, S] bf16
    codec: Codec

    @classmethod
    def plain(cls, pages: Tensor) -> KVPages:
        """Wrap pages [P, G, S, D] of fp16, bf16 or fp32 numbers."""
        check_float("pages", pages.dtype)
        return cls(pages, None, _PLAIN[pages.dtype])

    @property
    def head_dim(self) -> int:
        """D."""
        return self.codes.shape[3] * self.codes.element_size() * 8 // self.codec.bits

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of a page and a head of words, and of a page of scales."""
        s_page, s_head = self.words.stride()[:2]
        return s_page, s_head, 0 if self.scales is None else self.scales.stride(0)

    @property
    def words(self) -> Tensor:
        """Plain numbers as they are, codes as 16-bit words of NUM_PLANES features: [P, G, S, row]."""
        return self.codes if self.codec.scheme == "plain" else self.codes.view(torch.int16)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the codes and, where there are any, the scales."""
        return (self.codes,) if self.scales is None else (self.codes, self.scales)

    def decode(self, index: object = ...) -> Tensor:
        """Return the rows that an index of [P, G, S] picks, [..., D] fp32."""
        scales = None if self.scales is None else self.scales[index]  # type: ignore[index]
        return decode(self.codes[index], scales, self.codec)  # type: ignore[index]

    def check(self, name: str, shape: tuple[int | str, int | str, int | str, int]) -> None:
        """Raise unless these are pages [P, G, S, D] of that shape, in which a letter stands for any size."""
        *places, head_dim = shape
        check_shape(name, self.codes, (*places, self.codec.width(head_dim)))
        check_rows(name, self.codes)
        if self.codes.dtype != self.codec.dtype:
            raise TypeError(f"{name} must be {self.codec.dtype} in format {self.codec.name}, got {self.codes.dtype}")
        if (self.scales is not None) != self.codec.has_scales:
            raise ValueError(f"{name} must have scales in the formats that need them, not so in {self.codec.name}")
        if self.scales is not None:
            check_shape(f"scales of {name}", self.scales, tuple(self.codes.shape[:3]))
            if self.scales.dtype != torch.bfloat16 or not self.scales[0].is_contiguous():
                raise TypeError(f"scales of {name} must be bfloat16 and dense within a page, got {self.scales.dtype}")


def run_length(head_dim: int) -> int:
    """Return L, how many features are rotated together."""
    return min(head_dim & -head_dim, MAX_RUN)


def _grid(bits: int) -> tuple[int, int, int]:
    """Return g, z and r of a width."""
    step = 1 << (8 - bits)
    return (step, 128, 127) if bits == 8 else (step, 128 - step // 2, 128 - step // 2)


def rotated(x: Tensor) -> Tensor:
    """Return H x of rows [..., D] in fp32; H is its own inverse."""
    x = x.float()
    run = run_length(x.shape[-1])
    index = torch.arange(run, device=x.device)
    shared = index[:, None] & index
    parity: Tensor = torch.stack([shared >> bit & 1 for bit in range(run.bit_length())]).sum(dim=0) % 2
    runs: Tensor = x.unflatten(-1, (-1, run)) @ (1 - 2 * parity).float()
    return runs.flatten(-2).mul(run**-0.5)


def _scales(x: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Return the scale of each row [..., D] as it is stored, [...], and x over it."""
    scales = (x.abs().amax(dim=-1) / largest).to(torch.bfloat16)
    divisor = scales.float()[..., None]
    return scales, torch.where(divisor > SMALLEST_SCALE, x / divisor, 0.0)


def encode(x: Tensor, codec: Codec) -> tuple[Tensor, Tensor | None]:
    """Encode rows.

    Args:
        x: [..., D] of any float dtype.
        codec: how.

    Returns:
        Codes [..., width] and scales [...] bf16 or None, as in a page.
    """
    if codec.scheme == "plain":
        return x.to(codec.dtype), None
    x = x.float()
    if codec.scheme == "e5m2":
        bits = x.clamp(-E5M2_MAX, E5M2_MAX).half().view(torch.int16).int() & 0xFFFF
        return ((bits & 0x8000) + (bits & 0x7FFF) + 0x80 >> 8).to(torch.uint8), None
    if codec.scheme == "e4m3":
        scales, ratio = _scales(x, E4M3_MAX)
        return (ratio * 256).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8), scales
    step, zero, reach = _grid(codec.bits)
    scales, ratio = _scales(rotated(x), reach)
    codes = (ratio / step + (zero / step + 0.5)).floor().clamp(0, (1 << codec.bits) - 1).to(torch.uint8)
    if codec.bits == 8:
        return codes, scales
    pairs = codes.unflatten(-1, (-1, 2))
    low = pairs[..., 0] & 15 | (pairs[..., 1] & 15) << 4
    if codec.bits == 4:
        return low, scales
    high = codes.unflatten(-1, (-1, 4)) >> 4
    high = high[..., 0] | high[..., 1] << 2 | high[..., 2] << 4 | high[..., 3] << 6
    return torch.cat([low, high], dim=-1), scales


def decode(codes: Tensor, scales: Tensor | None, codec: Codec) -> Tensor:
    """Decode rows: codes [..., width] and scales [...] give [..., D] fp32."""
    if codec.scheme == "plain":
        return codes.float()
    if codec.scheme == "e5m2":
        return (codes.to(torch.int16) << 8).view(torch.float16).float()
    if scales is None:
        raise ValueError(f"rows in format {codec.name} need their scales")
    if codec.scheme == "e4m3":
        return codes.view(torch.float8_e4m3fn).float() * (scales.float()[..., None] / 256)
    step, zero, _ = _grid(codec.bits)
    if codec.bits < 8:
        half = codes.shape[-1] * 4 // codec.bits
        low, high = codes[..., :half], codes[..., half:]
        codes = torch.stack((low & 15, low >> 4), dim=-1).flatten(-2)
        if codec.bits == 6:
            codes = codes | torch.stack([high >> 2 * i & 3 for i in range(4)], dim=-1).flatten(-2) << 4
    return rotated((codes.float() * step - zero) * scales.float()[..., None])
