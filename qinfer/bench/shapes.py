"""The sizes at which ops are compiled, tested and timed: models, steps of them, and how matrices are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qinfer.kernels.operand import FIELDS

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
HALVES = {"fp16": FP16, "bf16": BF16}


@dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int

    @property
    def qkv(self) -> int:
        """Columns of the merged query, key and value projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


LLAMA = Shape("llama-3.1-8b", 4096, 32, 8, 128, 14336, 128256)
QWEN = Shape("qwen2-7b", 3584, 28, 4, 128, 18944, 152064)
TINY = Shape("storyteller", 256, 8, 2, 32, 768, 2048)
SHAPES = (LLAMA, QWEN, TINY)
# Head sizes and groups of other models, for decode over codes: padded heads, sixteen rows, and both large.
HEADS = (
    (Shape("phi-2", 2560, 32, 32, 80, 10240, 51200), "q8"),
    (Shape("phi-3-mini", 3072, 32, 32, 96, 8192, 32064), "q4"),
    (Shape("qwen3-235b", 4096, 64, 4, 128, 12288, 151936), "q6"),
    (Shape("recurrentgemma-2b", 2560, 10, 1, 256, 7680, 256000), "q4"),
)
TOKENS = (1, 16, 2048)  # one token, a decode batch, a chunk of a prompt


@dataclass(frozen=True)
class Run:
    """A number of tokens through a model in one element type."""

    shape: Shape
    tokens: int
    half: str

    @property
    def name(self) -> str:
        """The name of the cases."""
        return f"{self.shape.name} T={self.tokens} {self.half}"

    @property
    def dtype(self) -> torch.dtype:
        """The element type of activations and weights."""
        return HALVES[self.half]

    @property
    def compiled(self) -> bool:
        """One element type of a wide model and the other of a narrow one are enough for CI, and several tokens."""
        return self.tokens > 1 and (self.shape.name, self.half) in ((LLAMA.name, "fp16"), (TINY.name, "bf16"))

    @property
    def compiled_early(self) -> bool:
        """The same for products in parts and what reads them, which have other kernels for few rows (`overlap.py`)."""
        return self.compiled or (self.tokens == 1 and (self.shape.name, self.half) == (LLAMA.name, "fp16"))


@dataclass(frozen=True)
class Step:
    """What a step does: the new tokens of each sequence, and the context length of all of them."""

    name: str
    queries: tuple[int, ...]
    context: int
    compiled: bool = True


STEPS = (
    Step("decode B=1 context=512", (1,), 512),
    Step("decode B=1 context=8192", (1,), 8192, compiled=False),
    Step("decode B=16 context=1024", (1,) * 16, 1024, compiled=False),
    Step("draft B=4 context=1024", (5,) * 4, 1024),
    Step("prefill T=2048", (2048,), 2048),
    Step("chunk T=64 context=8192", (64,), 8192, compiled=False),
    Step("mixed T=519", (512, *(1,) * 7), 4096, compiled=False),
)


@dataclass(frozen=True)
class Variant:
    """What may be asked of attention beside a step."""

    window: int | None = None
    order: bool = False
    codecs: tuple[str, str] | None = None  # None: the pages have the element type of the queries
    softcap: float | None = None

    @property
    def name(self) -> str:
        """What the names of cases end in."""
        window, order = f" window={self.window}" if self.window else "", " order" if self.order else ""
        cap = f" softcap={self.softcap:g}" if self.softcap else ""
        return f"{window}{order}{cap}{'' if self.codecs is None else ' k' + self.codecs[0] + ' v' + self.codecs[1]}"


VARIANTS = (Variant(), Variant(order=True), Variant(window=512), Variant(softcap=50.0))
CODED = tuple(Variant(codecs=pair) for pair in (("fp8", "fp8"), ("q8", "q8"), ("q8", "q4"), ("q6", "q6"), ("q4", "q4")))


@dataclass(frozen=True)
class Stored:
    """How an integer matrix is stored."""

    name: str
    bits: int = 4
    group_size: int = 128
    sym: bool = True
    order: bool = False


G128 = Stored("g128")
OTHERS = (
    Stored("g128 asym", sym=False),
    Stored("g16", group_size=16),
    Stored("g32", group_size=32),
    Stored("6 bits g32", bits=6, group_size=32),
    Stored("g64 asym", group_size=64, sym=False),
    Stored("one group", group_size=-1),
    Stored("g128 order", order=True),
)
WIDTHS = tuple(Stored(f"{bits} bits", bits=bits, sym=bits != 3) for bits in FIELDS if bits != 4)


@dataclass(frozen=True)
class Matrix:
    """A projection of a model: its sizes, and whether it writes into the fp32 residual stream or adds a bias."""

    name: str
    k: int
    n: int
    residual: bool = False
    bias: bool = False


def matrices(s: Shape) -> tuple[Matrix, ...]:
    """Return the four merged projections of a block."""
    return (
        Matrix(f"{s.name} qkv", s.hidden, s.qkv, bias=s is QWEN),
        Matrix(f"{s.name} o", s.heads * s.head_dim, s.hidden, residual=True),
        Matrix(f"{s.name} gate_up", s.hidden, 2 * s.mlp),
        Matrix(f"{s.name} down", s.mlp, s.hidden, residual=True),
    )
