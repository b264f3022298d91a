"""Loading: what is accepted, what is refused and how the refusal names it; the edges of `Model`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor

from qinfer.errors import CheckpointError, UnsupportedError
from qinfer.kernels.device import default_device
from qinfer.kernels.operand import DenseOperand
from qinfer.models import model as model_module
from qinfer.models.architectures import read_config
from qinfer.models.config import ModelConfig
from qinfer.models.decoder import Decoder
from qinfer.models.layers import Linear
from qinfer.models.model import Model
from qinfer.parallel.comm import Alone
from tests.compare import assert_close
from tests.models import tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("llama")
    tiny.save(path, "llama")
    return Model.load(path, device="cpu")


def with_tokenizer(path: Path, num_tokens: int) -> None:
    """Add a tokenizer of so many words."""
    vocab = {f"w{i}": i for i in range(num_tokens)}
    tokenizer = RustTokenizer(WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"eos_token": "w7"}')


def test_attributes(llama: Model) -> None:
    assert (llama.device.type, llama.dtype, llama.tokenizer) == ("cpu", torch.float32, None)
    assert llama.eos_ids == {2}
    hidden, mlp, kv = 64, 128, 32
    block = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * mlp + 2 * hidden
    num_parameters = 2 * tiny.VOCAB * hidden + 2 * block + hidden
    assert llama.decoder.num_parameters == num_parameters
    assert llama.decoder.nbytes == 4 * num_parameters
    assert repr(llama) == "Model(llama, 0.1 M parameters in 0.4 MB, float32 on cpu)"


def test_tied_head_shares_the_embedding(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3", head_dim=16, tie_word_embeddings=True)
    decoder = Model.load(tmp_path, device="cpu").decoder
    assert isinstance(decoder.head.operand, DenseOperand)
    assert decoder.head.operand.weight.data_ptr() == decoder.embedding.table.data_ptr()
    assert decoder.nbytes == 4 * decoder.num_parameters
    # In another dtype the head needs a matrix of its own, which is still the same parameters.
    half = Model.load(tmp_path, device="cpu", dtype="bf16").decoder
    assert half.num_parameters == decoder.num_parameters
    assert half.embedding.table.dtype == torch.float32


def test_stored_head_wins_over_the_tied_flag(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama")
    expected = Model.load(tmp_path, device="cpu").logits(tiny.prompt(5))
    tiny.edit_config(tmp_path, tie_word_embeddings=True)
    assert torch.equal(Model.load(tmp_path, device="cpu").logits(tiny.prompt(5)), expected)


def test_tokenizer_and_its_end_token(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama")
    with_tokenizer(tmp_path, tiny.VOCAB)
    model = Model.load(tmp_path, device="cpu")
    assert model.tokenizer is not None
    assert model.eos_ids == {2, 7}


def test_tokenizer_with_more_tokens_than_rows(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama")
    with_tokenizer(tmp_path, tiny.VOCAB + 1)
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json: has 200 tokens, but model\.embed_tokens\.weight only 199"
    ):
        Model.load(tmp_path, device="cpu")


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: value})


LAYER = "model.layers.1"
DAMAGES = [
    (drop(f"{LAYER}.mlp.up_proj.weight"), f"{LAYER}.mlp.up_proj.weight", "missing"),
    (drop(f"{LAYER}.input_layernorm.weight"), f"{LAYER}.input_layernorm.weight", "missing"),
    (drop("model.embed_tokens.weight"), "model.embed_tokens.weight", "missing"),
    (drop("lm_head.weight"), "lm_head.weight", "missing"),
    (drop(f"{LAYER}.self_attn.q_proj.bias"), f"{LAYER}.self_attn.q_proj.bias", "missing"),
    (put(f"{LAYER}.self_attn.o_proj.weight", torch.ones(64, 32)), f"{LAYER}.self_attn.o_proj.weight",
     "must map 64 features to 64, got 32 to 64"),
    (put("model.norm.weight", torch.ones(32)), "model.norm.weight", "must be [64], got [32]"),
    (put("model.embed_tokens.weight", torch.ones(198, 64)), "model.embed_tokens.weight",
     "must be [199, 64], got [198, 64]"),
    (put("model.norm.weight", torch.full((64,), torch.nan)), "model.norm.weight", "NaN"),
    (put(f"{LAYER}.mlp.up_proj.bias", torch.ones(128)), f"{LAYER}.mlp.up_proj.bias", "must be absent or zero"),
    (put(f"{LAYER}.self_attn.q_norm.weight", torch.ones(16)), f"{LAYER}.self_attn.q_norm.weight", "nothing"),
    (put("model.layers.2.input_layernorm.weight", torch.ones(64)), "model.layers.2.input_layernorm.weight", "nothing"),
    (put(f"{LAYER}.mlp.up_proj.temperature", torch.ones(1)), f"{LAYER}.mlp.up_proj.temperature", "nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "tensor", "problem"), DAMAGES)
def test_damaged_checkpoints(
    tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], tensor: str, problem: str
) -> None:
    tiny.save(tmp_path, "qwen2")
    tiny.edit(tmp_path, damage)
    with pytest.raises(CheckpointError) as caught:
        Model.load(tmp_path, device="cpu")
    assert caught.value.tensor == tensor
    assert problem in caught.value.problem
    assert caught.value.file.startswith(str(tmp_path))


def test_harmless_extras(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama")
    expected = Model.load(tmp_path, device="cpu").logits(tiny.prompt(5))
    tiny.edit(tmp_path, put(f"{LAYER}.self_attn.rotary_emb.inv_freq", torch.ones(8)))
    tiny.edit(tmp_path, put(f"{LAYER}.mlp.up_proj.bias", torch.zeros(128)))
    assert torch.equal(Model.load(tmp_path, device="cpu").logits(tiny.prompt(5)), expected)


@pytest.mark.parametrize(
    ("token_ids", "error", "message"),
    [
        ([], ValueError, "at least one id, got none"),
        ([3, 199], ValueError, r"\[0, 199\), got 199 at position 1"),
        ([-1], ValueError, r"\[0, 199\), got -1 at position 0"),
        (torch.tensor([[1, 2]]), ValueError, r"must be \[T\], got \[1, 2\]"),
        (torch.tensor([1.0]), TypeError, "float"),
        (["1"], TypeError, "str"),
        ([1] * 257, ValueError, "at most 256 for this model, got 257"),
    ],
)
def test_bad_token_ids(llama: Model, token_ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        llama.logits(token_ids)


def test_token_ids_of_any_kind(llama: Model) -> None:
    ids = tiny.prompt(5)
    expected = llama.logits(ids)
    for same in (torch.tensor(ids), torch.tensor(ids, dtype=torch.int32), np.array(ids), tuple(ids)):
        assert torch.equal(llama.logits(same), expected)


@pytest.mark.parametrize(
    ("device", "stored", "asked", "dtype"),
    [
        ("cpu", "bfloat16", None, torch.float32),
        ("cpu", "float32", "fp16", torch.float16),
        ("cpu", "float32", "bfloat16", torch.bfloat16),
        ("cuda", "float16", None, torch.float16),
        ("cuda", "bfloat16", None, torch.bfloat16),
        ("cuda", "float32", None, torch.bfloat16),
        ("cuda", "bfloat16", torch.float16, torch.float16),
    ],
)
def test_dtype(llama: Model, device: str, stored: str, asked: Any, dtype: torch.dtype) -> None:
    config = replace_dtype(llama.config, stored)
    assert model_module.resolve_dtype(asked, torch.device(device), config) == dtype


def replace_dtype(config: ModelConfig, dtype: str) -> ModelConfig:
    return type(config)(**{**vars(config), "dtype": dtype})


@pytest.mark.parametrize(
    ("device", "asked", "message"),
    [
        ("cuda", "fp32", "fp32 on a GPU; fp16 and bf16 work"),
        ("cpu", "int8", "do not run in int8; fp16 and bf16 work"),
        ("cpu", torch.float64, "do not run in torch.float64; fp16 and bf16 work"),
    ],
)
def test_unsupported_dtype(llama: Model, device: str, asked: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        model_module.resolve_dtype(asked, torch.device(device), llama.config)


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [("meta", UnsupportedError, "do not run on 'meta'; 'cuda' and 'cpu' work"), ("gpu", ValueError, "got 'gpu'")],
)
def test_bad_device(tmp_path: Path, device: str, error: type[Exception], message: str) -> None:
    tiny.save(tmp_path, "llama")
    with pytest.raises(error, match=message):
        Model.load(tmp_path, device=device)


@pytest.mark.skipif(default_device().type == "cuda", reason="there is a GPU")
def test_no_gpu(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama")
    with pytest.raises(UnsupportedError, match="no GPU for device 'cuda'; 'cpu' works"):
        Model.load(tmp_path, device="cuda")


def test_decoder_from_synthetic_parameters(tmp_path: Path) -> None:
    """What the benchmark does: the same wiring with parameters that no file holds."""
    oracle = tiny.save(tmp_path, "qwen3", head_dim=16)
    stored = dict(oracle.named_parameters())
    asked: list[str] = []

    class Stored:
        def linear(self, name: str, shape: tuple[int, int], *, has_bias: bool) -> Linear:
            asked.append(name)
            weight = stored[f"{name}.weight"].detach()
            assert (tuple(weight.shape), has_bias) == (shape[::-1], False)
            return Linear(DenseOperand(weight))

        def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
            assert tuple(stored[name].shape) == shape
            return stored[name].detach()

    loaded = Model.load(tmp_path, device="cpu")
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    decoder = Decoder.build(loaded.config, Stored(), **options, comm=Alone())
    assert len(asked) == len(set(asked)) == 2 * 7 + 1
    ids = tiny.prompt(9)
    assert_close(Model(loaded.config, decoder, **options).logits(ids), tiny.oracle_logits(oracle, ids))


class Doubling(Alone):
    """Two ranks that hold the same: sums double, joins repeat."""

    size = 2

    def __init__(self) -> None:
        self.calls: list[str] = []

    def all_reduce(self, x: Tensor) -> Tensor:
        self.calls.append("reduce")
        return x * 2

    def all_reduce_parts(self, parts: Tensor, *, in_order: bool = False) -> Tensor:
        return self.all_reduce(parts)

    def all_gather(self, x: Tensor, dim: int, sizes: Any = None) -> Tensor:
        assert sizes is None
        self.calls.append(f"gather {dim}")
        return torch.cat([x, x], dim)


def test_decoder_goes_through_its_communicator(tmp_path: Path) -> None:
    """Doubling every partial sum is the same model with o_proj and down_proj twice as large."""
    tiny.save(tmp_path, "llama")
    model, comm = Model.load(tmp_path, device="cpu"), Doubling()
    checkpoint = model_module.Checkpoint(tmp_path)
    decoder = Decoder.load(checkpoint, read_config(checkpoint), device=model.device, dtype=model.dtype, comm=comm)
    ids = tiny.prompt(6)
    batch = model_module.Batch.build([model_module.Piece(ids, 0, [0], "all")], page_size=256, device="cpu")
    logits = decoder(batch, model.new_cache(1))
    assert comm.calls == ["reduce"] * 4 + ["gather 1"]

    def double(tensors: dict[str, Tensor]) -> None:
        for layer in range(2):
            tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] *= 2
            tensors[f"model.layers.{layer}.mlp.down_proj.weight"] *= 2

    tiny.edit(tmp_path, double)
    expected = Model.load(tmp_path, device="cpu").logits(ids)
    assert_close(logits, torch.cat([expected, expected], 1))
