"""Configs read by us against the modules that transformers builds from the same folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qinfer.checkpoint import Checkpoint
from qinfer.errors import CheckpointError, QinferError, UnsupportedError
from qinfer.models.architectures import ARCHITECTURES, name_map, read_config
from qinfer.models.config import ModelConfig, RopeConfig
from tests import hostile

FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 500000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e6}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 3e-5, "eos_token_id": [2, 5, 7]}),
    ("llama", {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": LLAMA3, "num_key_value_heads": 4}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 5e4}, "bos_token_id": None}),
    ("mistral", {"sliding_window": 64, "num_key_value_heads": 1}),
    ("mistral", {"sliding_window": None, "head_dim": 20, "eos_token_id": None}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0, "rope_parameters": YARN}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 1}),
    ("qwen3", {"head_dim": 24}),
    ("qwen3", {"attention_bias": True, "head_dim": 8, "rope_parameters": {**YARN, "attention_factor": 1.25}}),
    (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "tie_word_embeddings": True,
        },
    ),
]


def write(folder: Path, family: str, changes: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """Save a random model of a family and return it."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**TINY, **json.loads(json.dumps(changes))})).to(dtype)
    model.save_pretrained(folder)
    return model


def token_set(value: int | list[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_every_field_is_what_transformers_builds(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    model = write(tmp_path, family, changes)
    theirs, decoder = model.config, model.model
    attention = [layer.self_attn for layer in decoder.layers]
    ours = read_config(Checkpoint(tmp_path))
    windows = [getattr(a, "sliding_window", None) if "qwen" in family else None for a in attention]
    if family == "mistral":
        windows = [theirs.sliding_window] * 3
    assert dataclasses.replace(ours, rope=RopeConfig("default", 1e4, 2)) == ModelConfig(
        model_type=family,
        vocab_size=decoder.embed_tokens.num_embeddings,
        hidden_size=decoder.embed_tokens.embedding_dim,
        num_layers=len(decoder.layers),
        num_heads=attention[0].q_proj.out_features // attention[0].head_dim,
        num_kv_heads=attention[0].k_proj.out_features // attention[0].head_dim,
        head_dim=attention[0].head_dim,
        mlp_size=decoder.layers[0].mlp.up_proj.out_features,
        norm_eps=decoder.norm.variance_epsilon,
        rope=RopeConfig("default", 1e4, 2),
        qkv_bias=attention[0].q_proj.bias is not None,
        o_bias=attention[0].o_proj.bias is not None,
        mlp_bias=decoder.layers[0].mlp.up_proj.bias is not None,
        qk_norm=hasattr(attention[0], "q_norm"),
        tied_embeddings=model.lm_head.weight is decoder.embed_tokens.weight,
        windows=tuple(windows),
        max_positions=512,
        eos_ids=frozenset(token_set(theirs.eos_token_id)),
        dtype="float32",
        bos_id=theirs.bos_token_id,
    )
    assert ours.rope.kind == theirs.rope_parameters["rope_type"]
    assert ours.rope.rotary_dim == ours.head_dim
    assert ours.rope.attention_factor == pytest.approx(decoder.rotary_emb.attention_scaling, rel=1e-6)
    assert ours.rope.inverse_frequencies() == pytest.approx(decoder.rotary_emb.inv_freq.tolist(), rel=1e-6, abs=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_cover_every_tensor(tmp_path: Path, family: str) -> None:
    write(tmp_path, family, {})
    checkpoint = Checkpoint(tmp_path)
    config = read_config(checkpoint)
    names = name_map(config)
    ours = {getattr(names.layer(i), f.name) for i in range(config.num_layers) for f in dataclasses.fields(names)}
    if not config.qk_norm:
        ours = {name for name in ours if not name.endswith(("q_norm", "k_norm"))}
    # These families have no experts; that theirs are all read shows in the loading of a mixture.
    ours = {name for name in ours if not name.endswith("mlp.gate") and ".experts." not in name}
    assert ours == {name.rpartition(".")[0] for name in checkpoint.names()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_save_reads_the_same(tmp_path: Path, family: str) -> None:
    model = write(tmp_path / "one", family, {}, torch.bfloat16)
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    one, many = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "many")
    assert len({many.file(name) for name in many.names()}) > 1
    assert read_config(one) == read_config(many)
    assert read_config(one).dtype == "bfloat16"
    assert one.names() == many.names()
    for name in one.names():
        assert torch.equal(one.read(name), many.read(name))


ROPE_VARIANTS: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 1e6},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    LLAMA3,
    {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192, "high_freq_factor": 2.5},
    YARN,
    {**YARN, "truncate": False},
    {**YARN, "beta_fast": 16, "beta_slow": 2, "factor": 10.0},
    {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    {**YARN, "mscale": 1.0},
    {**YARN, "attention_factor": 0.9},
    {**YARN, "factor": 1.0},
    {**YARN, "original_max_position_embeddings": 4},
    {**YARN, "beta_fast": 1, "beta_slow": 1, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0},
]


@pytest.mark.parametrize("head_dim", [8, 80, 128])
@pytest.mark.parametrize("parameters", ROPE_VARIANTS)
def test_rope_is_that_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parameters: dict[str, Any], head_dim: int
) -> None:
    config = transformers.LlamaConfig(
        **{**TINY, "max_position_embeddings": 32768}, head_dim=head_dim, rope_parameters=dict(parameters)
    )
    hostile.write_llama(tmp_path)
    config.save_pretrained(tmp_path)
    function = ROPE_INIT_FUNCTIONS.get(
        parameters["rope_type"],
        transformers.models.llama.modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters,
    )
    # Transformers rounds every step to float32, which alone costs up to 1.4e-6; its formulas in float64 leave none.
    with monkeypatch.context() as patch:
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch, "float32", torch.float64)
        frequencies, factor = function(config)
    assert frequencies.dtype == torch.float64
    ours = read_config(Checkpoint(tmp_path)).rope
    assert ours.inverse_frequencies() == pytest.approx(frequencies.tolist(), rel=1e-12, abs=0)
    assert ours.attention_factor == pytest.approx(factor, rel=1e-12)


def read_changed(folder: Path, **changes: Any) -> ModelConfig:
    return read_config(Checkpoint(hostile.write_llama(folder, **changes)))


def test_a_config_as_llama_2_wrote_it(tmp_path: Path) -> None:
    config = read_changed(tmp_path)
    assert config.rope == RopeConfig("default", 10000.0, 8)
    assert (config.head_dim, config.num_kv_heads) == (8, 2)
    assert [config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm, config.tied_embeddings] == [False] * 5
    assert config.windows == (None, None)


def test_a_config_as_llama_1_wrote_it(tmp_path: Path) -> None:
    changes = {"num_key_value_heads": hostile.REMOVE, "tie_word_embeddings": hostile.REMOVE}
    assert read_changed(tmp_path, **changes).num_kv_heads == 4


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_rope_scaling_as_transformers_4_wrote_it(tmp_path: Path, key: str) -> None:
    scaling = {name: value for name, value in YARN.items() if name not in ("rope_type", "rope_theta")}
    config = read_changed(tmp_path, rope_theta=1e6, rope_scaling={key: "yarn", **scaling})
    assert config.rope == RopeConfig("yarn", 1e6, 8, 4.0, original_positions=128)
    # Written by the passage from 4 to 5: both, and they agree.
    again = read_changed(tmp_path, rope_theta=1e6, rope_scaling={key: "yarn", **scaling}, rope_parameters=YARN)
    assert again == config


def test_qwen2_as_transformers_4_wrote_it(tmp_path: Path) -> None:
    old = {"model_type": "qwen2", "sliding_window": 131072, "max_window_layers": 1, "rope_theta": 1e6}
    config = read_changed(tmp_path, **old, use_sliding_window=False)
    assert config.windows == (None, None)
    assert (config.qkv_bias, config.o_bias, config.rope.theta) == (True, False, 1e6)
    assert read_changed(tmp_path, **old, use_sliding_window=True).windows == (None, 131072)


def test_eos_is_the_union_of_both_files(tmp_path: Path) -> None:
    hostile.write_llama(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    assert read_config(Checkpoint(tmp_path)).eos_ids == {2, 9}
    hostile.edit_json(tmp_path, "generation_config.json", eos_token_id="two")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id must be a token id"):
        read_config(Checkpoint(tmp_path))


def test_a_stored_head_wins_over_the_flag(tmp_path: Path) -> None:
    hostile.write_llama(tmp_path, tie_word_embeddings=True)
    assert not read_config(Checkpoint(tmp_path)).tied_embeddings
    hostile.edit_tensor(tmp_path, "lm_head.weight", lambda tensor: None)
    assert read_config(Checkpoint(tmp_path)).tied_embeddings


def test_dtype_under_each_key(tmp_path: Path) -> None:
    assert read_changed(tmp_path, torch_dtype="float16").dtype == "float16"
    assert read_changed(tmp_path, torch_dtype=hostile.REMOVE, dtype="bfloat16").dtype == "bfloat16"
    hostile.write_llama(tmp_path, torch_dtype=hostile.REMOVE)
    hostile.edit_tensor(tmp_path, "model.norm.weight", lambda tensor: tensor.half())
    assert read_config(Checkpoint(tmp_path)).dtype == "float16"


REQUIRED = {
    "llama": "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act rms_norm_eps "
    "max_position_embeddings model_type",
    "mistral": "num_key_value_heads sliding_window rms_norm_eps",
    "qwen2": "num_key_value_heads rms_norm_eps",
    "qwen3": "num_key_value_heads head_dim rms_norm_eps",
}


@pytest.mark.parametrize(("family", "field"), [(f, field) for f, names in REQUIRED.items() for field in names.split()])
def test_a_missing_field_is_named(tmp_path: Path, family: str, field: str) -> None:
    changes = {"model_type": family, "sliding_window": None, "head_dim": 8, field: hostile.REMOVE}
    with pytest.raises(CheckpointError, match=rf"config\.json: {field} is missing"):
        read_changed(tmp_path, **changes)


ROPE = "rope_scaling"
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"num_attention_heads": 3, "head_dim": 8}, "num_heads must be a multiple of num_kv_heads 2, got 3"),
    ({"num_attention_heads": 6, "num_key_value_heads": 2}, "hidden_size must be a multiple of num_attention_heads 6"),
    ({"num_key_value_heads": 0}, "num_key_value_heads must be from 1"),
    ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers must be from 1 to 10000"),
    ({"hidden_size": 10**400}, "hidden_size must be from 1 to .* digits"),
    ({"hidden_size": True}, "hidden_size must be an integer, got True"),
    ({"hidden_size": 32.0}, "hidden_size must be an integer"),
    ({"vocab_size": None}, "vocab_size must not be null"),
    ({"head_dim": 7}, "rotary_dim must be even"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number"),
    ({"rms_norm_eps": 0.0}, "norm_eps must be positive"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number"),
    ({"attention_bias": "no"}, "attention_bias must be true or false"),
    ({"model_type": 3}, "model_type must be a string"),
    ({"eos_token_id": -1}, "eos_token_id must be a token id"),
    ({"eos_token_id": [2, None]}, "eos_token_id must be a token id"),
    ({"rope_theta": 0}, "rope theta must be above 1"),
    ({ROPE: "linear"}, "rope_scaling must be an object"),
    ({ROPE: {"type": "linear"}}, "rope_scaling.factor is missing"),
    ({ROPE: {"type": "linear", "factor": 0}}, "factor must be positive"),
    ({ROPE: {**LLAMA3, "high_freq_factor": 1.0}}, "rope high_freq_factor must be above low_freq_factor"),
    ({ROPE: {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.original_max_position_embeddings is missing"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor is missing"),
    ({ROPE: YARN, "rope_parameters": {**YARN, "factor": 2.0}}, "factor is given twice, as 4.0 and as 2.0"),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta is given twice"),
    ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types must be a list of 2"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "layer_types asks for sliding_attention"),
    ({"model_type": "mistral", "sliding_window": -1}, "sliding_window must be from 1"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_wrong_field_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        read_changed(tmp_path, **changes)


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    (
        {"model_type": "gpt2"},
        "model_type 'gpt2' is unknown; known are llama, mistral, mixtral, qwen2, qwen3, qwen3_moe",
    ),
    ({"model_type": "llava", "text_config": {"model_type": "llama"}}, "multimodal"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' cannot be computed; silu can"),
    ({"torch_dtype": "float64"}, "dtype 'float64' cannot be run; float16, bfloat16, float32 can"),
    ({ROPE: {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' .* default, linear, llama3, yarn"),
    ({ROPE: {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor below 1"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention has rotary parameters"),
    ({"model_type": "qwen3", "head_dim": 8, "layer_types": ["linear_attention"] * 2}, "'linear_attention'"),
    (
        {"model_type": "mistral", "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "mistral with different layer_types",
    ),
]


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED)
def test_what_cannot_be_run_says_what_can(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"config\.json: .*{message}"):
        read_changed(tmp_path, **changes)


@given(
    family=st.sampled_from(sorted(ARCHITECTURES)),
    field=st.sampled_from(
        [*hostile.LLAMA_CONFIG, "head_dim", "rope_theta", "rope_scaling", "sliding_window", "layer_types"]
    ),
    value=st.sampled_from(
        [None, 0, -1, 2**31, 10**400, float("nan"), float("inf"), "x", [], [None], {}, {"a": {}}, True]
    ),
)
def test_any_field_may_hold_anything(tmp_path: Path, family: str, field: str, value: Any) -> None:
    changes = {"model_type": family, "sliding_window": 8, "head_dim": 8, "use_sliding_window": True, field: value}
    hostile.write_llama(tmp_path, **{"max_window_layers": 1, **changes})
    config = problem = None
    try:
        config = read_config(Checkpoint(tmp_path))
    except QinferError as raised:
        problem = str(raised)
    if config is None:
        assert problem is not None
        assert "config.json" in problem
    else:
        # What is accepted must also be usable.
        assert len(config.rope.inverse_frequencies()) == config.head_dim // 2
        assert all(isinstance(getattr(config, name), int) for name in ("hidden_size", "mlp_size", "num_kv_heads"))


def test_configs_check_themselves() -> None:
    with pytest.raises(ValueError, match="rope kind must be one of default, linear, llama3, yarn, got 'su'"):
        RopeConfig("su", 1e4, 8)  # type: ignore[arg-type]
    assert len(dataclasses.fields(ModelConfig)) <= 30
