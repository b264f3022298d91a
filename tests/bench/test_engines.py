"""Models to measure: every kind of random weights, and other engines under the same clock."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qinfer.bench import model, synthetic
from qinfer.bench.__main__ import main as bench
from qinfer.bench.engines import decode
from qinfer.bench.recipes import WEIGHTS
from qinfer.bench.synthetic import synthetic_model, synthetic_sizes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset small enough for a CPU."""
    config = replace(synthetic._qwen3(512, 256, 1, (4, 2, 64), 512), max_positions=256)
    monkeypatch.setattr(model, "read_bandwidth", lambda device: 10.0)
    monkeypatch.setitem(synthetic.PRESETS, "tiny", config)
    monkeypatch.setitem(synthetic.PRESETS, "tied", replace(config, tied_embeddings=True))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_recipes_weigh_what_they_say(weights: str) -> None:
    """Bits per weight of the recipe against the bytes of the matrix that it makes."""
    recipe = WEIGHTS[weights]
    if recipe.make is None:
        assert recipe.bits == 8 * recipe.dtype.itemsize
        return
    operand = recipe.make(10240, 16, CPU)
    assert (operand.in_features, operand.out_features) == (10240, 16)
    assert 8 * operand.nbytes / (10240 * 16) == pytest.approx(recipe.bits, rel=1e-3)


def test_synthetic_models_keep_their_activations_at_unit_size() -> None:
    """All widths side by side are compared only if none of them overflows or vanishes."""
    for weights in ("gptq-4bit-g128", "int3-g128", "exl2-4.0"):
        logits = synthetic_model("tiny", weights, CPU).logits([1, 2, 3])
        assert 0.2 < float(logits.std()) < 5, weights


def test_the_head_is_stored_as_asked() -> None:
    def head_of(preset: str, head: str | None) -> Any:
        found = synthetic_model(preset, "gptq-4bit-g128", CPU, head=head).decoder.head
        assert found is not None
        return found.operand

    assert head_of("tiny", None).bits == 4
    assert head_of("tiny", "int6-g128").bits == 6
    # A tied head is the embedding, unless a head of its own is asked for.
    assert not hasattr(head_of("tied", None), "bits")
    assert head_of("tied", "int6-g128").bits == 6
    plain, wide = (synthetic_sizes("tiny", "gptq-4bit-g128", head) for head in (None, "int6-g128"))
    assert wide.vocab_bytes - plain.vocab_bytes == 512 * 256 * 2 // 8
    assert wide.mlp_bytes == plain.mlp_bytes


def test_random_weights_never_pass_through_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything large is made where it is used: each call that fills a tensor names the device."""
    made: list[int] = []

    def on_the_device(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, device: torch.device, **kwargs: Any) -> Tensor:
            assert device is CPU
            tensor = make(*args, device=device, **kwargs)
            made.append(tensor.numel())
            return tensor

        return call

    for name in ("rand", "randn", "randint"):
        monkeypatch.setattr(torch, name, on_the_device(getattr(torch, name)))
    for weights in ("exl2-4.0", "fp16"):
        synthetic_model("tiny", weights, CPU)
    assert max(made) == 512 * 256


ARGUMENTS = ["model", "--batch", "2", "--context", "8", "--new-tokens", "6", "--prefill", "16", "--device", "cpu"]


def test_engines_run_side_by_side(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    engines = ["--engine", "qinfer", "--engine", "transformers"]
    assert bench([*ARGUMENTS, "--preset", "tiny", "--weights", "fp16", *engines, "--json", str(file)]) == 0
    ours, theirs = (json.loads(line) for line in file.read_text().splitlines())
    assert (ours["engine"], theirs["engine"]) == ("qinfer", "transformers")
    assert ours["flops_per_step"] > 2 * 2 * 512 * 256
    for field in ("tokens_per_second", "prefill_tokens_per_second", "bytes_per_step", "fraction_of_roof"):
        assert theirs[field] > 0, field
    assert {field for field in ours if field not in theirs} == {"plan", "flops_per_step", "step_tokens"}


def test_decoding_feeds_back_what_it_chose() -> None:
    class Counting:
        vocab_size, max_positions, bytes_per_step = 10, 100, None

        def __init__(self) -> None:
            self.fed: list[list[list[int]]] = []

        def fill(self, ids: Tensor) -> None:
            self.fed.append(ids.tolist())

        def step(self, ids: Tensor) -> Tensor:
            self.fed.append(ids.tolist())
            return torch.nn.functional.one_hot((ids[:, 0] + 1) % 10, 10).float()

    engine = Counting()
    times = decode(engine, torch.tensor([[1, 2, 3], [4, 5, 6]]), 5, CPU)
    assert engine.fed == [[[1, 2], [4, 5]], *([[3 + i], [6 + i]] for i in range(4)), [[7], [0]]]
    assert len(times.samples) == 2


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--preset", "tiny", "--engine", "exllamav2"], "needs the package exllamav2"),
        (["--preset", "tiny", "--engine", "exllamav3"], "needs the package exllamav3"),
        (["--preset", "tiny", "--engine", "transformers"], "--weights fp16 or bf16"),
        (["--preset", "tiny", "--weights", "fp16", "--engine", "transformers", "--tp"], "leave out --tp"),
        (["--preset", "tiny", "--engine", "transformers", "--kv-format", "q4"], "takes --kv-format fp16"),
        (["--preset", "tiny", "--engine", "transformers", "--context", "1"], "--context of at least 2"),
    ],
)
def test_what_an_engine_cannot_do_is_told(options: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench([*ARGUMENTS, *options]) == 1
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("name", ["exllamav2", "exllamav3"])
def test_exllama_is_driven_by_its_public_interface(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stand-ins that take exactly the documented calls; the real packages need a GPU."""
    module, fed = ModuleType(name), []

    class Model:
        def __init__(self, config: Any = None) -> None:
            pass

        @classmethod
        def from_config(cls, config: Any) -> Any:
            return cls()

        def load(self, device: torch.device) -> None:
            assert device == CPU

        def load_autosplit(self, cache: Any) -> None:
            pass

        def prefill(self, ids: Tensor, params: dict[str, Any]) -> None:
            fed.append((ids.shape[1], params["past_len"]))

        def forward(self, ids: Tensor, state: Any, preprocess_only: bool = False) -> Tensor | None:
            past = state["past_len"] if isinstance(state, dict) else state.current_seq_len
            fed.append((ids.shape[1], past))
            if not isinstance(state, dict):
                state.current_seq_len += ids.shape[1]
            return None if preprocess_only else torch.zeros(*ids.shape, 32)

    class Config(SimpleNamespace):
        def __init__(self, path: str) -> None:
            super().__init__(vocab_size=32, max_seq_len=64, path=path)

        from_directory = classmethod(lambda cls, path: cls(path))

        def arch_compat_overrides(self) -> None:
            assert self.max_batch_size == 2

    names = {"exllamav2": ("ExLlamaV2", "ExLlamaV2Config", "ExLlamaV2Cache"), "exllamav3": ("Model", "Config", "Cache")}
    for attribute, value in zip(
        names[name], (Model, Config, lambda model, **sizes: SimpleNamespace(**sizes)), strict=True
    ):
        setattr(module, attribute, value)
    monkeypatch.setitem(sys.modules, name, module)
    assert bench([*ARGUMENTS, "--model", str(tmp_path), "--engine", name]) == 0
    assert "checkpoint" in capsys.readouterr().out
    assert fed[:7] == [(7, 0), (1, 7), (1, 8), (1, 9), (1, 10), (1, 11), (1, 12)]
    assert fed[7:9] == [(7, 0), (1, 7)]
