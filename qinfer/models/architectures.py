"""One function per model family: config.json → ModelConfig, and where the family keeps its tensors.

No field that changes the mathematics has a silent default. A field may be absent only where the file format gives its
absence a meaning; every such case is named below with its reason. Sizes are always required.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from qinfer.checkpoint import Checkpoint
from qinfer.errors import CheckpointError, UnsupportedError
from qinfer.models.config import DTYPES, ExpertConfig, ModelConfig, RopeConfig
from qinfer.models.fields import MAX_LAYERS, Fields, short

_ROPE_KINDS = ("default", "linear", "llama3", "yarn")
# Transformers 4 and 5 both define 10000 for files older than the field (Llama 1 and 2).
_ROPE_THETA = 10_000.0


@dataclass(frozen=True)
class NameMap:
    """Names of the modules of a model, without ".weight"; "{i}" stands for the layer, "{{e}}" for the expert."""

    embed: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    input_norm: str = "model.layers.{i}.input_layernorm"
    post_attention_norm: str = "model.layers.{i}.post_attention_layernorm"
    q_proj: str = "model.layers.{i}.self_attn.q_proj"
    k_proj: str = "model.layers.{i}.self_attn.k_proj"
    v_proj: str = "model.layers.{i}.self_attn.v_proj"
    o_proj: str = "model.layers.{i}.self_attn.o_proj"
    q_norm: str = "model.layers.{i}.self_attn.q_norm"
    k_norm: str = "model.layers.{i}.self_attn.k_norm"
    gate_proj: str = "model.layers.{i}.mlp.gate_proj"
    up_proj: str = "model.layers.{i}.mlp.up_proj"
    down_proj: str = "model.layers.{i}.mlp.down_proj"
    router: str = "model.layers.{i}.mlp.gate"
    expert_gate: str = "model.layers.{i}.mlp.experts.{{e}}.gate_proj"
    expert_up: str = "model.layers.{i}.mlp.experts.{{e}}.up_proj"
    expert_down: str = "model.layers.{i}.mlp.experts.{{e}}.down_proj"

    def layer(self, index: int) -> NameMap:
        """Return the names with layer `index` filled in; those of experts then have "{e}" for the expert."""
        return NameMap(**{field.name: getattr(self, field.name).format(i=index) for field in fields(self)})

    def expert(self, index: int) -> tuple[str, str, str]:
        """Return gate, up and down of an expert of a layer, whose names these are."""
        gate, up, down = (name.format(e=index) for name in (self.expert_gate, self.expert_up, self.expert_down))
        return gate, up, down


@dataclass(frozen=True)
class Architecture:
    """One row of the table of families."""

    read: Callable[[Checkpoint], ModelConfig]
    names: NameMap


def read_config(checkpoint: Checkpoint) -> ModelConfig:
    """Describe the model in a checkpoint.

    Args:
        checkpoint: the folder; its config.json, its generation_config.json and the names of its tensors are used.

    Returns:
        The description.

    Raises:
        CheckpointError: a field is missing, has the wrong type, or contradicts another.
        UnsupportedError: the family or one of its options is not known here; the text lists what is.
    """
    config, file = checkpoint.config, checkpoint.config_file
    known = ", ".join(sorted(ARCHITECTURES))
    if "text_config" in config:
        raise UnsupportedError(f"{file}: multimodal checkpoints cannot be read; these model types can: {known}")
    model_type = Fields(config, file).text("model_type")
    if model_type not in ARCHITECTURES:
        raise UnsupportedError(f"{file}: model_type {model_type!r} is unknown; known are {known}")
    try:
        return ARCHITECTURES[model_type].read(checkpoint)
    except ValueError as problem:
        raise CheckpointError(file, None, str(problem)) from problem


def name_map(config: ModelConfig) -> NameMap:
    """Return where the family of `config` keeps its tensors."""
    return ARCHITECTURES[config.model_type].names


def _read_llama(checkpoint: Checkpoint) -> ModelConfig:
    """Llama 1 to 3.x, and what shares its layout."""
    config = Fields(checkpoint.config, checkpoint.config_file)
    num_heads = config.integer("num_attention_heads")
    return _model(
        checkpoint,
        # Llama 1 is older than grouped heads; the format defines absence as one KV head for each query head.
        num_kv_heads=config.integer("num_key_value_heads") if config.has("num_key_value_heads") else num_heads,
        head_dim=_head_dim(config),
        # Both flags are younger than Llama 2; absence means that there are no biases.
        qkv_bias=config.flag("attention_bias", absent=False),
        o_bias=config.flag("attention_bias", absent=False),
        mlp_bias=config.flag("mlp_bias", absent=False),
    )


def _read_mistral(checkpoint: Checkpoint) -> ModelConfig:
    """Mistral: Llama with one sliding window for all layers, or none."""
    config = Fields(checkpoint.config, checkpoint.config_file)
    return _model(
        checkpoint,
        num_kv_heads=config.integer("num_key_value_heads"),
        head_dim=_head_dim(config),
        windows=_mistral_windows(config),
    )


def _read_mixtral(checkpoint: Checkpoint) -> ModelConfig:
    """Mixtral: Mistral with experts in every layer."""
    config = Fields(checkpoint.config, checkpoint.config_file)
    num_layers = config.integer("num_hidden_layers", maximum=MAX_LAYERS)
    # The router's weights always sum to one; the format has no field for it.
    experts = _experts(config, mlp_size="intermediate_size", normalized=True, layers=(True,) * num_layers)
    return replace(_read_mistral(checkpoint), experts=experts)


def _mistral_windows(config: Fields) -> tuple[int | None, ...]:
    """Return the one window of all layers, for each."""
    num_layers = config.integer("num_hidden_layers", maximum=MAX_LAYERS)
    # Null means no window (Mistral 7B v0.2 and later); the field itself is always written, so absence is an error.
    if "sliding_window" not in config.values:
        raise config.error("sliding_window", "is missing; null means that every layer sees everything")
    window = config.integer("sliding_window") if config.has("sliding_window") else None
    if window is not None and "full_attention" in (_layer_kinds(config, num_layers) or ()):
        text = "mistral with different layer_types cannot be read; one sliding_window for all layers can"
        raise UnsupportedError(f"{config.file}: {text}")
    return (window,) * num_layers


def _read_qwen2(checkpoint: Checkpoint) -> ModelConfig:
    """Qwen 2 and 2.5: Llama with biases on q, k and v, and windows on the later layers if asked for."""
    config = Fields(checkpoint.config, checkpoint.config_file)
    return _model(
        checkpoint,
        num_kv_heads=config.integer("num_key_value_heads"),
        head_dim=_head_dim(config),
        qkv_bias=True,
        windows=_qwen_windows(config),
    )


def _read_qwen3(checkpoint: Checkpoint) -> ModelConfig:
    """Qwen 3, dense: Qwen 2 with q/k-norm instead of biases, and a head size of its own."""
    config = Fields(checkpoint.config, checkpoint.config_file)
    return _model(
        checkpoint,
        num_kv_heads=config.integer("num_key_value_heads"),
        # Never hidden_size / heads: the format sets it apart and always writes it.
        head_dim=config.integer("head_dim"),
        # Every file written by transformers has it; absence means that there are no biases.
        qkv_bias=config.flag("attention_bias", absent=False),
        o_bias=config.flag("attention_bias", absent=False),
        qk_norm=True,
        windows=_qwen_windows(config),
    )


def _read_qwen3_moe(checkpoint: Checkpoint) -> ModelConfig:
    """Qwen 3 with experts, in all layers or in some; a window, where it is on, is that of all layers."""
    config = Fields(checkpoint.config, checkpoint.config_file)
    num_layers = config.integer("num_hidden_layers", maximum=MAX_LAYERS)
    step, dense = config.integer("decoder_sparse_step"), config.indices("mlp_only_layers", num_layers)
    layers = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))
    normalized = config.flag("norm_topk_prob", absent=None)
    # The format's switch is off when absent.
    is_windowed = config.flag("use_sliding_window", absent=False) and config.has("sliding_window")
    model = _model(
        checkpoint,
        num_kv_heads=config.integer("num_key_value_heads"),
        # Never hidden_size / heads: the format sets it apart and always writes it.
        head_dim=config.integer("head_dim"),
        # As in Qwen 3.
        qkv_bias=config.flag("attention_bias", absent=False),
        o_bias=config.flag("attention_bias", absent=False),
        qk_norm=True,
        windows=(config.integer("sliding_window") if is_windowed else None,) * num_layers,
    )
    experts = _experts(config, mlp_size="moe_intermediate_size", normalized=normalized, layers=layers)
    return replace(model, experts=experts)


def _experts(config: Fields, *, mlp_size: str, normalized: bool, layers: tuple[bool, ...]) -> ExpertConfig | None:
    """Read how many experts there are, and how wide one is; None if no layer has any."""
    if not any(layers):
        return None
    # Qwen's own files say num_experts, Mixtral's and those that transformers 5 writes num_local_experts.
    given = [config.integer(name) for name in ("num_experts", "num_local_experts") if config.has(name)]
    if len(set(given)) != 1:
        problem = f"is given twice, as {given[0]} and as {given[1]}" if given else "is missing, num_experts as well"
        raise config.error("num_local_experts", problem)
    return ExpertConfig(
        num_experts=given[0],
        per_token=config.integer("num_experts_per_tok"),
        mlp_size=config.integer(mlp_size),
        normalized=normalized,
        layers=layers,
    )


def _model(
    checkpoint: Checkpoint,
    *,
    num_kv_heads: int,
    head_dim: int,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    windows: tuple[int | None, ...] | None = None,
) -> ModelConfig:
    """Read the fields that all families share and add those that a family reads in its own way; see ModelConfig."""
    config = Fields(checkpoint.config, checkpoint.config_file)
    generation = Fields(checkpoint.generation_config, checkpoint.path / "generation_config.json")
    num_layers = config.integer("num_hidden_layers", maximum=MAX_LAYERS)
    if (activation := config.text("hidden_act")) not in ("silu", "swish"):
        raise UnsupportedError(f"{config.file}: hidden_act {activation!r} cannot be computed; silu can")
    max_positions = config.integer("max_position_embeddings")
    return ModelConfig(
        model_type=config.text("model_type"),
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        num_layers=num_layers,
        num_heads=config.integer("num_attention_heads"),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_size=config.integer("intermediate_size"),
        norm_eps=config.number("rms_norm_eps"),
        rope=_rope(config, head_dim=head_dim, max_positions=max_positions),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        tied_embeddings=_is_tied(checkpoint, config),
        windows=windows or (None,) * num_layers,
        max_positions=max_positions,
        eos_ids=config.tokens("eos_token_id") | generation.tokens("eos_token_id"),
        dtype=_dtype(checkpoint, config),
        bos_id=min(config.tokens("bos_token_id"), default=None),
    )


def _head_dim(config: Fields) -> int:
    """Return head_dim; files without it (Llama 2, Qwen 2) mean hidden_size / heads."""
    if config.has("head_dim"):
        return config.integer("head_dim")
    hidden_size, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if hidden_size % num_heads:
        problem = f"must be a multiple of num_attention_heads {num_heads} when there is no head_dim, got {hidden_size}"
        raise config.error("hidden_size", problem)
    return hidden_size // num_heads


def _is_tied(checkpoint: Checkpoint, config: Fields) -> bool:
    """Tell whether the head reads the embedding.

    A stored head wins over the flag: some quantizers store a head of its own although the file calls it tied.
    """
    # Absence means untied in all families; transformers writes the flag whenever it is true.
    tied = config.flag("tie_word_embeddings", absent=False)
    head = ARCHITECTURES[config.text("model_type")].names.head
    return tied and not any(name.startswith(f"{head}.") for name in checkpoint.names())


def _dtype(checkpoint: Checkpoint, config: Fields) -> str:
    """Return the dtype that the file names, under its new or old key, or else the one of the final norm."""
    name = next((config.text(key) for key in ("dtype", "torch_dtype") if config.has(key)), None)
    if name is None:
        # The file leaves it to the tensors; norms are never quantized.
        norm = ARCHITECTURES[config.text("model_type")].names.final_norm
        name = str(checkpoint.dtype(f"{norm}.weight"))
    name = name.removeprefix("torch.")
    if name not in DTYPES:
        raise UnsupportedError(f"{config.file}: dtype {name!r} cannot be run; {', '.join(DTYPES)} can")
    return name


def _qwen_windows(config: Fields) -> tuple[int | None, ...]:
    """Return the window of each layer; layer_types decides, and files older than it have max_window_layers."""
    num_layers = config.integer("num_hidden_layers", maximum=MAX_LAYERS)
    # The format's switch is off when absent; a window that is written but switched off does not count.
    is_on = config.flag("use_sliding_window", absent=False) and config.has("sliding_window")
    kinds = _layer_kinds(config, num_layers)
    if kinds is None:
        if not is_on:
            return (None,) * num_layers
        # May be zero, unlike a size: then every layer has a window.
        first = 0 if config.values.get("max_window_layers") == 0 else config.integer("max_window_layers")
        kinds = ["full_attention" if layer < first else "sliding_attention" for layer in range(num_layers)]
    if "sliding_attention" not in kinds:
        return (None,) * num_layers
    if not is_on:
        raise config.error("layer_types", "asks for sliding_attention, but use_sliding_window or sliding_window is off")
    window = config.integer("sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _layer_kinds(config: Fields, num_layers: int) -> list[str] | None:
    """Return the layer_types of newer files, full_attention or sliding_attention for each layer."""
    kinds = config.values.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise config.error("layer_types", f"must be a list of {num_layers} names, got {short(kinds)}")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            text = f"layer type {kind!r} cannot be computed; full_attention and sliding_attention can"
            raise UnsupportedError(f"{config.file}: {text}")
    return kinds


def _rope(config: Fields, *, head_dim: int, max_positions: int) -> RopeConfig:
    """Read the rotary embedding from rope_parameters (transformers 5) or rope_scaling and rope_theta (before)."""
    rope = _rope_fields(config)
    kind = rope.text("rope_type") if rope.has("rope_type") else "default"
    if kind not in _ROPE_KINDS:
        known = ", ".join(_ROPE_KINDS)
        raise UnsupportedError(f"{config.file}: rope_type {kind!r} cannot be computed; these can: {known}")
    if rope.number("partial_rotary_factor", absent=1.0) != 1.0:
        text = "partial_rotary_factor below 1 is not part of this model type; only 1 can be computed"
        raise UnsupportedError(f"{config.file}: {text}")
    theta = rope.number("rope_theta", absent=_ROPE_THETA)
    if kind == "default":
        return RopeConfig("default", theta, head_dim)
    factor = rope.number("factor")
    if kind == "linear":
        return RopeConfig("linear", theta, head_dim, factor)
    if kind == "llama3":
        return RopeConfig(
            "llama3",
            theta,
            head_dim,
            factor,
            original_positions=rope.integer("original_max_position_embeddings"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    # The format defines what absence means: the paper's 32 and 1, rounding on, the model's own length as the original.
    has_original = rope.has("original_max_position_embeddings")
    return RopeConfig(
        "yarn",
        theta,
        head_dim,
        factor,
        original_positions=rope.integer("original_max_position_embeddings") if has_original else max_positions,
        beta_fast=rope.number("beta_fast", absent=32.0),
        beta_slow=rope.number("beta_slow", absent=1.0),
        truncate=rope.flag("truncate", absent=True),
        mscale=rope.number("mscale") if rope.has("mscale") else None,
        mscale_all_dim=rope.number("mscale_all_dim") if rope.has("mscale_all_dim") else None,
        fixed_attention_factor=rope.number("attention_factor") if rope.has("attention_factor") else None,
    )


def _rope_fields(config: Fields) -> Fields:
    """Merge every place where a file may keep rotary parameters; two places that disagree are an error."""
    merged: dict[str, Any] = {}
    loose = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    places = [{key: config.values.get(key) for key in loose}]
    places += [config.table(name) for name in ("rope_scaling", "rope_parameters")]
    for place in places:
        # Old files call it "type"; files of the passage have both.
        for key, value in {**place, "rope_type": place.get("rope_type", place.get("type"))}.items():
            if isinstance(value, dict):
                text = f"{key} has rotary parameters of its own; only one set for all layers can be computed"
                raise UnsupportedError(f"{config.file}: {text}")
            if value is None:
                continue
            if key in merged and merged[key] != value:
                raise config.error(key, f"is given twice, as {merged[key]!r} and as {value!r}")
            merged[key] = value
    name = "rope_parameters" if config.table("rope_parameters") else "rope_scaling"
    return Fields(merged, config.file, within=f"{name}.")


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_read_llama, NameMap()),
    "mistral": Architecture(_read_mistral, NameMap()),
    "qwen2": Architecture(_read_qwen2, NameMap()),
    "qwen3": Architecture(_read_qwen3, NameMap()),
    "mixtral": Architecture(
        _read_mixtral,
        NameMap(
            router="model.layers.{i}.block_sparse_moe.gate",
            expert_gate="model.layers.{i}.block_sparse_moe.experts.{{e}}.w1",
            expert_up="model.layers.{i}.block_sparse_moe.experts.{{e}}.w3",
            expert_down="model.layers.{i}.block_sparse_moe.experts.{{e}}.w2",
        ),
    ),
    "qwen3_moe": Architecture(_read_qwen3_moe, NameMap()),
}
