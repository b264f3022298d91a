"""Models of known shapes with random weights, made on the device: what a benchmark needs and no download gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from qinfer.errors import UnsupportedError
from qinfer.kernels.operand import FIELDS, SLICE_K, DenseOperand, PlaneOperand, SegmentedOperand, tile_k
from qinfer.models.config import ExpertConfig, ModelConfig, RopeConfig
from qinfer.models.decoder import Decoder
from qinfer.models.layers import Linear
from qinfer.models.model import Model
from qinfer.parallel.comm import Alone, Communicator
from qinfer.parallel.plan import Plan, Sizes, Span
from qinfer.quant.weight import Dim


def _llama(vocab: int, hidden: int, layers: int, heads: tuple[int, int, int], mlp: int) -> ModelConfig:
    """Spell out a Llama config from its sizes; heads are (query, key-value, features)."""
    num_heads, num_kv_heads, head_dim = heads
    return ModelConfig(
        model_type="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_size=mlp,
        norm_eps=1e-5,
        rope=RopeConfig(kind="default", theta=5e5, rotary_dim=head_dim),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tied_embeddings=False,
        windows=(None,) * layers,
        max_positions=131072,
        eos_ids=frozenset(),
        dtype="float16",
    )


def _qwen3(vocab: int, hidden: int, layers: int, heads: tuple[int, int, int], mlp: int) -> ModelConfig:
    """Spell out a Qwen3 config from its sizes."""
    rope = RopeConfig(kind="default", theta=1e6, rotary_dim=heads[2])
    return replace(_llama(vocab, hidden, layers, heads, mlp), model_type="qwen3", qk_norm=True, rope=rope)


def _sparse(config: ModelConfig, model_type: str, num_experts: int, per_token: int, mlp: int) -> ModelConfig:
    """Put experts into all layers of a config, with weights that sum to one."""
    experts = ExpertConfig(num_experts, per_token, mlp, normalized=True, layers=(True,) * config.num_layers)
    rope = RopeConfig(kind="default", theta=1e6, rotary_dim=config.head_dim)
    return replace(config, model_type=model_type, experts=experts, rope=rope, max_positions=32768)


PRESETS: dict[str, ModelConfig] = {
    "llama-3.2-1b": replace(_llama(128256, 2048, 16, (32, 8, 64), 8192), tied_embeddings=True),
    "llama-3.1-8b": _llama(128256, 4096, 32, (32, 8, 128), 14336),
    "qwen3-8b": _qwen3(151936, 4096, 36, (32, 8, 128), 12288),
    "qwen3-32b": _qwen3(151936, 5120, 64, (64, 8, 128), 25600),
    "llama-3.3-70b": _llama(128256, 8192, 80, (64, 8, 128), 28672),
    "mixtral-8x7b": _sparse(_llama(32000, 4096, 32, (32, 8, 128), 14336), "mixtral", 8, 2, 14336),
    "qwen3-30b-a3b": _sparse(_qwen3(151936, 2048, 48, (32, 4, 128), 6144), "qwen3_moe", 128, 8, 768),
}


@dataclass(frozen=True)
class SyntheticParameters:
    """Random parameters whose activations keep about unit size, as those of a trained model do."""

    device: torch.device
    dtype: torch.dtype
    matrix: Callable[[SyntheticParameters, int, int], DenseOperand | PlaneOperand]

    def linear(self, name: str, shape: tuple[int, int], *, has_bias: bool) -> Linear:
        """Make a random matrix (K, N)."""
        bias = torch.zeros(shape[1], dtype=self.dtype, device=self.device) if has_bias else None
        return Linear(self.matrix(self, *shape), bias)

    def part(self, name: str, shape: tuple[int, int], dim: Dim, span: Span, *, has_bias: bool) -> Linear:
        """Make a random part of a matrix (K, N)."""
        length = span[1] - span[0]
        return self.linear(name, (length, shape[1]) if dim == "in" else (shape[0], length), has_bias=has_bias)

    def rows(self, name: str, shape: tuple[int, int], span: Span) -> Tensor:
        """Make some rows of a table."""
        return self.tensor(name, (span[1] - span[0], shape[1]))

    def may_cut(self, name: str, shape: tuple[int, int], positions: Sequence[int]) -> bool:
        """Say whether the positions lie between two groups."""
        return all(position % 128 == 0 or position == shape[0] for position in positions)

    def leave(self, name: str) -> None:
        """Nothing has to be read."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Make a norm's weight of ones, or a random embedding."""
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def dense(self, k: int, n: int) -> DenseOperand:
        """Make a matrix in the dtype of the activations."""
        return DenseOperand(torch.randn(n, k, dtype=self.dtype, device=self.device) * k**-0.5)

    def gptq_4bit_g128(self, k: int, n: int) -> PlaneOperand:
        """Make a symmetric 4-bit matrix with fp16 scales per 128 inputs."""
        return random_planes(k, n, self.device, bits=4, group_size=128)


def random_planes(
    k: int, n: int, device: torch.device, *, bits: int, group_size: int, symmetric: bool = True
) -> PlaneOperand:
    """Make an integer matrix [K, N] of random codes whose product with unit activations has unit size."""
    planes = tuple(
        torch.randint(-(2**15), 2**15, (ceil(k / tile_k(width)), n, SLICE_K), dtype=torch.int16, device=device)
        for width in FIELDS[bits]
    )
    groups = ceil(k / group_size)
    # Uniform codes of b bits have a standard deviation of 2^b / sqrt(12).
    scales = (torch.rand(groups, n, device=device) * 0.5 + 0.75) * (12 / k) ** 0.5 / 2**bits
    offsets = None if symmetric else torch.randint(-2, 3, (groups, n), dtype=torch.int8, device=device)
    return PlaneOperand(planes, scales.half(), offsets, bits=bits, group_size=group_size, in_features=k)


def random_segments(
    k: int, n: int, device: torch.device, *, shares: dict[int, float], group_size: int
) -> SegmentedOperand:
    """Make an EXL2-like matrix: bits -> share of the rows, in whole groups; the last one takes the rest."""
    segments: list[PlaneOperand] = []
    left = k
    for bits, share in shares.items():
        is_last = len(segments) + 1 == len(shares)
        rows = left if is_last else round(k * share / group_size) * group_size
        segments.append(random_planes(rows, n, device, bits=bits, group_size=group_size))
        left -= rows
    return SegmentedOperand(tuple(segments))


WEIGHTS: dict[str, tuple[torch.dtype, Callable[[SyntheticParameters, int, int], DenseOperand | PlaneOperand]]] = {
    "gptq-4bit-g128": (torch.float16, SyntheticParameters.gptq_4bit_g128),
    "fp16": (torch.float16, SyntheticParameters.dense),
    "bf16": (torch.bfloat16, SyntheticParameters.dense),
}


def synthetic_sizes(preset: str, weights: str) -> Sizes:
    """Return the sizes of a preset with weights of a kind, from which a plan is made."""
    config, (dtype, matrix) = PRESETS[preset], WEIGHTS[weights]
    is_packed = matrix is SyntheticParameters.gptq_4bit_g128
    width = 0.5 + dtype.itemsize / 128 if is_packed else dtype.itemsize
    hidden, layers = config.hidden_size, config.num_layers
    attention = 2 * layers * hidden * config.head_dim * (config.num_heads + config.num_kv_heads)
    table = config.vocab_size * hidden
    return Sizes(
        num_layers=layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        hidden_size=hidden,
        mlp_size=config.cut_mlp_size,
        vocab_size=config.vocab_size,
        attention_bytes=int(attention * width),
        mlp_bytes=int(config.num_mlp_weights * width),
        vocab_bytes=table * dtype.itemsize + (0 if config.tied_embeddings else int(table * width)),
        norm_bytes=(2 * layers + 1) * hidden * dtype.itemsize,
    )


def synthetic_model(
    preset: str, weights: str, device: torch.device, *, plan: Plan | None = None, comm: Communicator | None = None
) -> Model:
    """Make a model of a preset's shapes with random weights, or a rank's share of one.

    Args:
        preset: a name in PRESETS.
        weights: a name in WEIGHTS; the head is quantized like the rest, the embedding is not.
        device: where the model is made.
        plan: what each rank holds; None: this process holds everything.
        comm: the ranks.

    Raises:
        UnsupportedError: there is no such preset, or no such kind of weights.
    """
    if preset not in PRESETS:
        raise UnsupportedError(f"there is no preset {preset!r}; these work: {', '.join(PRESETS)}")
    if weights not in WEIGHTS:
        raise UnsupportedError(f"there are no synthetic weights {weights!r}; these work: {', '.join(WEIGHTS)}")
    config, (dtype, matrix) = PRESETS[preset], WEIGHTS[weights]
    dtype = dtype if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    parameters = SyntheticParameters(device, dtype, matrix)
    comm = comm or Alone()
    decoder = Decoder.build(config, parameters, device=device, dtype=dtype, comm=comm, plan=plan)
    return Model(config, decoder, device=device, dtype=dtype, plan=plan)
