"""Models of known shapes with random weights, made on the device: what a benchmark needs and no download gives."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qinfer.bench.recipes import WEIGHTS, Recipe
from qinfer.errors import UnsupportedError
from qinfer.kernels.operand import DenseOperand
from qinfer.models.architectures import name_map
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


def shapes(presets: Sequence[str]) -> list[tuple[int, int]]:
    """Return the (N, K) of all merged matrices of some presets, without repetition."""
    found = []
    for name in presets:
        config = PRESETS[name]
        attention = config.num_heads * config.head_dim
        found += [
            (attention + 2 * config.num_kv_heads * config.head_dim, config.hidden_size),
            (config.hidden_size, attention),
            (2 * config.mlp_size, config.hidden_size),
            (config.hidden_size, config.mlp_size),
            (config.vocab_size, config.hidden_size),
        ]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class SyntheticParameters:
    """Random parameters, made on the device, whose activations keep about unit size, as a trained model's do."""

    device: torch.device
    dtype: torch.dtype
    body: Recipe
    head: Recipe
    head_name: str

    def linear(self, name: str, shape: tuple[int, int], *, has_bias: bool) -> Linear:
        """Make a random matrix (K, N)."""
        bias = torch.zeros(shape[1], dtype=self.dtype, device=self.device) if has_bias else None
        make = (self.head if name == self.head_name else self.body).make
        return Linear(self.dense(*shape) if make is None else make(*shape, self.device), bias)

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


LIKE_THE_REST = "like the rest"


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model is measured."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="DIR", help="folder of a checkpoint")
    source.add_argument("--preset", choices=PRESETS, help="shapes of a known model, with random weights")
    told = f"of a preset: {', '.join(WEIGHTS)}; default: gptq-4bit-g128"
    parser.add_argument("--weights", choices=WEIGHTS, default="gptq-4bit-g128", metavar="KIND", help=told)
    told = f"of a preset's head, one of the same kinds, e.g. int6-g128; default: {LIKE_THE_REST}"
    parser.add_argument("--head", choices=WEIGHTS, metavar="KIND", help=told)


def describe_source(options: argparse.Namespace) -> dict[str, str]:
    """Return the fields of a result that say which model was measured."""
    if options.model:
        return {"model": options.model, "weights": "checkpoint", "head": LIKE_THE_REST}
    return {"model": options.preset, "weights": options.weights, "head": options.head or LIKE_THE_REST}


def preset_config(preset: str, *, has_own_head: bool) -> ModelConfig:
    """Return the config of a preset; a head that is stored by itself is not tied to the embedding."""
    config = PRESETS[preset]
    return replace(config, tied_embeddings=False) if has_own_head else config


def synthetic_sizes(preset: str, weights: str, head: str | None = None) -> Sizes:
    """Return the sizes of a preset with weights of a kind, from which a plan is made."""
    config, recipe = preset_config(preset, has_own_head=head is not None), WEIGHTS[weights]
    width, head_width = recipe.bits / 8, WEIGHTS[head or weights].bits / 8
    itemsize, hidden, layers = recipe.dtype.itemsize, config.hidden_size, config.num_layers
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
        vocab_bytes=table * itemsize + (0 if config.tied_embeddings else int(table * head_width)),
        norm_bytes=(2 * layers + 1) * hidden * itemsize,
    )


def synthetic_model(
    preset: str,
    weights: str,
    device: torch.device,
    *,
    head: str | None = None,
    num_layers: int | None = None,
    plan: Plan | None = None,
    comm: Communicator | None = None,
) -> Model:
    """Make a model of a preset's shapes with random weights, or a rank's share of one.

    Args:
        preset: a name in PRESETS.
        weights: a name in WEIGHTS; the embedding is never quantized.
        device: where the model is made; nothing passes through the host's memory.
        head: a name in WEIGHTS; None: like the rest.
        num_layers: the first so many layers; None: all.
        plan: what each rank holds; None: this process holds everything.
        comm: the ranks.

    Raises:
        UnsupportedError: there is no such preset, or no such kind of weights.
    """
    if preset not in PRESETS:
        raise UnsupportedError(f"there is no preset {preset!r}; these work: {', '.join(PRESETS)}")
    for kind in (weights, head or weights):
        if kind not in WEIGHTS:
            raise UnsupportedError(f"there are no synthetic weights {kind!r}; these work: {', '.join(WEIGHTS)}")
    config, body = preset_config(preset, has_own_head=head is not None), WEIGHTS[weights]
    if num_layers is not None:
        experts = config.experts
        if experts is not None:
            experts = replace(experts, layers=experts.layers[:num_layers])
        config = replace(config, num_layers=num_layers, windows=config.windows[:num_layers], experts=experts)
    dtype = body.dtype if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    parameters = SyntheticParameters(device, dtype, body, WEIGHTS[head or weights], name_map(config).head)
    comm = comm or Alone()
    decoder = Decoder.build(config, parameters, device=device, dtype=dtype, comm=comm, plan=plan)
    return Model(config, decoder, device=device, dtype=dtype, plan=plan)
