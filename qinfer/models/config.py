"""ModelConfig and RopeConfig: what a model is, as frozen numbers, checked when they are made.

A field selects a value or a pure function; it never changes the order of operations. Nothing here needs torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

RopeKind = Literal["default", "linear", "llama3", "yarn"]
DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: which frequencies, and by how much cos and sin are scaled.

    Feature pair i of `rotary_dim`/2 turns by position · frequency i; unscaled, frequency i = theta^(−2i/rotary_dim).

    Source: RoFormer (arXiv 2104.09864); position interpolation (2306.15595); YaRN (2309.00071); Llama 3.1 model card.
    """

    kind: RopeKind  # everyone
    theta: float  # everyone
    rotary_dim: int  # everyone: the first features of a head that turn
    factor: float = 1.0  # linear, llama3, yarn: how much longer the context gets
    original_positions: int | None = None  # llama3, yarn: the context length before scaling
    low_freq_factor: float | None = None  # llama3: fewer turns than this over the original context are slowed down
    high_freq_factor: float | None = None  # llama3: more turns than this stay as they are
    beta_fast: float = 32.0  # yarn: more turns than this stay as they are
    beta_slow: float = 1.0  # yarn: fewer turns than this are slowed down
    truncate: bool = True  # yarn: whether the borders between the two are rounded outwards to whole pairs
    mscale: float | None = None  # yarn in DeepSeek's form
    mscale_all_dim: float | None = None  # yarn in DeepSeek's form
    fixed_attention_factor: float | None = None  # yarn: given instead of computed
    interleaved: bool = False  # GLM, Cohere, DeepSeek: pairs are neighbours, not halves of the head

    def __post_init__(self) -> None:
        if self.kind not in get_args(RopeKind):
            raise ValueError(f"rope kind must be one of {', '.join(get_args(RopeKind))}, got {self.kind!r}")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even and positive, got {self.rotary_dim}")
        if not (math.isfinite(self.theta) and self.theta > 1):
            raise ValueError(f"rope theta must be above 1, got {self.theta}")
        for name in ("factor", "beta_fast", "beta_slow"):
            _require_positive(name, getattr(self, name))
        if self.fixed_attention_factor is not None:
            _require_positive("fixed_attention_factor", self.fixed_attention_factor)
        for name in ("mscale", "mscale_all_dim"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"rope {name} must be at least 0, got {value}")
        if self.kind in ("llama3", "yarn"):
            _require_positive("original_positions", self.original_positions)
        if self.kind == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            _require_positive("low_freq_factor", low)
            if high is None or low is None or not (math.isfinite(high) and high > low):
                raise ValueError(f"rope high_freq_factor must be above low_freq_factor {low}, got {high}")

    def inverse_frequencies(self) -> list[float]:
        """Return the angle per position of every feature pair, rotary_dim/2 numbers in radians."""
        plain = [self.theta ** (-pair / self.rotary_dim) for pair in range(0, self.rotary_dim, 2)]
        match self.kind:
            case "default":
                return plain
            case "linear":
                return [frequency / self.factor for frequency in plain]
            case "llama3":
                return [self._llama3(frequency) for frequency in plain]
            case "yarn":
                return self._yarn(plain)

    @property
    def attention_factor(self) -> float:
        """The number that cos and sin are multiplied by: 1 for all kinds but yarn."""
        if self.kind != "yarn":
            return 1.0
        if self.fixed_attention_factor is not None:
            return self.fixed_attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._yarn_mscale(self.mscale) / self._yarn_mscale(self.mscale_all_dim)
        return self._yarn_mscale(1.0)

    def _yarn_mscale(self, scale: float) -> float:
        """Temperature of yarn: 1 + scale · ln(factor) / 10, and 1 where nothing is stretched."""
        return 1.0 if self.factor <= 1 else 1.0 + 0.1 * scale * math.log(self.factor)

    def _llama3(self, frequency: float) -> float:
        """Slow down the frequencies that turn rarely within the original context, with a linear passage between."""
        assert self.original_positions is not None
        assert self.low_freq_factor is not None
        assert self.high_freq_factor is not None
        turns = self.original_positions * frequency / (2 * math.pi)
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = min(max(share, 0.0), 1.0)
        return frequency * (kept + (1 - kept) / self.factor)

    def _yarn(self, plain: list[float]) -> list[float]:
        """Slow down the pairs behind the border of `beta_slow`, keep those before `beta_fast`, blend between."""
        first, last = self._yarn_border(self.beta_fast), self._yarn_border(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.rotary_dim - 1)
        # Equal borders mean a step; the published code widens it by this much, and the step must fall on the same pair.
        width = last - first if last != first else 0.001
        slowed = [min(max((pair - first) / width, 0.0), 1.0) for pair in range(len(plain))]
        return [f * (1 - share + share / self.factor) for f, share in zip(plain, slowed, strict=True)]

    def _yarn_border(self, turns: float) -> float:
        """Return the pair index, as a real number, that makes `turns` turns within the original context."""
        assert self.original_positions is not None
        return self.rotary_dim * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(self.theta))


@dataclass(frozen=True)
class ExpertConfig:
    """Mixture of experts: MLPs of which every token takes a few, and the layers that have them instead of one MLP.

    The router's logits become probabilities over all experts; the likeliest `per_token` multiply what their experts
    give, as they are or divided by their sum.

    Source: Mixtral of Experts (arXiv 2401.04088); Qwen3 technical report (2505.09388).
    """

    num_experts: int  # E
    per_token: int  # experts that a token takes
    mlp_size: int  # width of one expert
    normalized: bool  # whether the weights of the chosen experts sum to one
    layers: tuple[bool, ...]  # whether each layer has experts

    def __post_init__(self) -> None:
        for name in ("num_experts", "per_token", "mlp_size"):
            _require_positive(name, getattr(self, name))
        if self.per_token > self.num_experts:
            raise ValueError(f"experts per token must be at most {self.num_experts}, got {self.per_token}")
        if not any(self.layers):
            raise ValueError("a model with experts must have at least one layer of them, got none")


@dataclass(frozen=True)
class ModelConfig:
    """What a decoder-only model is; where it lives, how it is stored and how it runs are not its business."""

    model_type: str  # architectures: the row of the table
    vocab_size: int  # embedding and head: rows
    hidden_size: int  # everyone
    num_layers: int  # decoder, cache
    num_heads: int  # attention: query heads
    num_kv_heads: int  # attention, cache
    head_dim: int  # attention, cache
    mlp_size: int  # gated MLP of the layers without experts
    norm_eps: float  # every RMSNorm
    rope: RopeConfig  # attention
    qkv_bias: bool  # Qwen2, and Llama and Qwen3 with attention_bias
    o_bias: bool  # Llama and Qwen3 with attention_bias
    mlp_bias: bool  # Llama with mlp_bias
    qk_norm: bool  # Qwen3: RMSNorm of each head before the rotation
    tied_embeddings: bool  # head: reads the embedding's rows
    windows: tuple[int | None, ...]  # Mistral, Qwen: how many positions each layer sees, None for all
    max_positions: int  # rope tables, generator
    eos_ids: frozenset[int]  # generator; of config.json and generation_config.json
    dtype: str  # Model.load: the dtype to run in when nobody asks for another
    bos_id: int | None = None  # generator: the start of a prompt without text
    experts: ExpertConfig | None = None  # Mixtral, Qwen3 MoE

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_size")
        for name in (*sizes, "max_positions", "norm_eps"):
            _require_positive(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads {self.num_kv_heads}, got {self.num_heads}")
        if self.rope.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim must be at most head_dim {self.head_dim}, got {self.rope.rotary_dim}")
        if len(self.windows) != self.num_layers:
            raise ValueError(
                f"windows must have one entry for each of {self.num_layers} layers, got {len(self.windows)}"
            )
        if self.experts is not None and len(self.experts.layers) != self.num_layers:
            raise ValueError(
                f"layers of experts must have one entry for each of {self.num_layers}, got {len(self.experts.layers)}"
            )
        for window in set(self.windows) - {None}:
            _require_positive("window", window)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for token in self.eos_ids | ({self.bos_id} - {None}):
            if token is None or token < 0:
                raise ValueError(f"token ids must be at least 0, got {token}")

    @property
    def longest_window(self) -> int | None:
        """How many positions the layer sees that sees most, None if that is all."""
        windows = [window for window in self.windows if window is not None]
        return max(windows) if len(windows) == self.num_layers else None

    def has_experts(self, layer: int) -> bool:
        """Say whether a layer has experts instead of one MLP."""
        return self.experts is not None and self.experts.layers[layer]

    @property
    def num_mlp_weights(self) -> int:
        """Weights of gate, up and down of all layers and experts."""
        experts = self.experts
        num_sparse = 0 if experts is None else sum(experts.layers)
        width = (self.num_layers - num_sparse) * self.mlp_size
        width += 0 if experts is None else num_sparse * experts.num_experts * experts.mlp_size
        return 3 * self.hidden_size * width

    @property
    def cut_mlp_size(self) -> int:
        """Width of the MLPs that decide how a model is divided: of its experts if it has any."""
        return self.mlp_size if self.experts is None else self.experts.mlp_size


def _require_positive(name: str, value: float | None) -> None:
    """Raise ValueError unless `value` is a finite number above zero."""
    if value is None or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive, got {value}")
