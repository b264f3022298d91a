"""The bundled model's recipe: stories that hold together, tokens, training at micro scale, export and reading back."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from qinfer.checkpoint import Checkpoint
from qinfer.models.model import Model
from qinfer.quant import GPTQWeight

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "storyteller"))

import corpus
import evaluate
import export
import grammar
import network
import train

SEEDS = range(400)
MICRO = network.Shape(vocab=400, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, mlp=96)


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.train_tokenizer(100, MICRO.vocab)


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    """A micro model after a few steps of training, its log, and its folder."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("storyteller")
    args = argparse.Namespace(
        minutes=5.0, steps=40, batch=4, width=128, lr=1e-2, weight_decay=0.1, seed=1, device="cpu", compile=False
    )
    packing = {"width": args.width + 1, "workers": 1}
    rows = torch.from_numpy(corpus.packed_rows(tokenizer, grammar.HELD_OUT, 100, **packing).astype("int16"))
    held_out = torch.from_numpy(corpus.packed_rows(tokenizer, 0, 5, **packing).astype("int16"))
    model = network.Network(MICRO)
    log = train.train(model, rows, held_out, args)
    train.save(model, tokenizer, folder)
    return log, folder


def test_a_seed_tells_one_story():
    assert grammar.story(7) == grammar.story(7)
    assert len({grammar.story(seed) for seed in SEEDS}) == len(SEEDS)


def test_every_plot_is_told():
    for plot in grammar.PLOTS:
        assert grammar.story(3, plot.__name__) != grammar.story(4, plot.__name__)


@pytest.mark.parametrize("plot", sorted({plot.__name__ for plot in grammar.PLOTS}))
def test_language(plot):
    for seed in SEEDS:
        text = grammar.story(seed, plot)
        assert text.isascii()
        assert 60 <= len(text.split()) <= 300, text
        assert text.count('"') % 2 == 0, text
        slips = r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou\W]|[{}]|\b(\w+) \1\b|(^|[.!?] |\n)[a-z]|  | [,.]|\.\.|,\.|None"
        assert not (slip := re.search(slips, text)), f"seed {seed}: {text[slip.start() - 20 : slip.end() + 20]}"


def test_the_way_home_passes_the_landmarks_backwards():
    for seed in SEEDS:
        text = grammar.story(seed, "way_home")
        there, back = text.lower().split("\n\n", 2)[1:]
        marks = [word for setting in grammar.plots_roads.words.SETTINGS for word in setting.marks]
        passed = sorted({mark for mark in marks if re.search(rf"\ban? {mark}\b", there)}, key=there.index)
        assert len(passed) >= 3, text
        assert [back.index(f"the {mark}") for mark in reversed(passed[-3:])] == sorted(
            back.index(f"the {mark}") for mark in passed[-3:]
        ), text


def test_food_is_counted_down_to_nothing():
    for seed in SEEDS:
        text = grammar.story(seed, "hungry")
        counts = re.findall(r"Now there (?:was|were) (no|one|two) ", text)
        assert counts in (["one", "no"], ["two", "one", "no"]), text


def test_memory_of_the_encoder_changes_nothing(tokenizer):
    encoder = corpus.Encoder(tokenizer)
    for seed in range(50):
        text = grammar.story(seed)
        assert encoder.encode(text) == [*tokenizer.encode(text).ids, encoder.end]
        assert tokenizer.decode(encoder.encode(text)) == text


def test_rows_begin_with_a_story(tokenizer):
    rows = corpus.packed_rows(tokenizer, 0, 30, width=300, workers=1)
    assert rows.shape[1] == 300
    assert (rows[:, 0] == tokenizer.token_to_id(corpus.BEGIN)).all()
    assert (rows == corpus.packed_rows(tokenizer, 0, 30, width=300, workers=2)).all()


def test_training_learns(trained):
    log, _ = trained
    assert log[-1]["held_out_loss"] < log[0]["held_out_loss"] - 1


def test_the_folder_is_a_llama(trained):
    _, folder = trained
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = network.Network(MICRO)
    stored = load_file(folder / "model.safetensors")
    ours.load_state_dict({name.removeprefix("model."): tensor.float() for name, tensor in stored.items()})
    ids = torch.randint(0, MICRO.vocab, (2, 100))
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4


def test_export_round_trip(trained, tmp_path):
    _, folder = trained
    out = tmp_path / "quantized"
    assert export.export(folder, out) == sum(path.stat().st_size for path in out.iterdir())
    checkpoint, dense = Checkpoint(out), load_file(folder / "model.safetensors")
    ours = network.Network(MICRO)
    state = {}
    for name, tensor in dense.items():
        state[name.removeprefix("model.")] = tensor.float()
        if name.endswith("_proj.weight"):
            read = GPTQWeight.read(checkpoint, name.removesuffix(".weight")).dequantize().T
            assert (read - tensor.float()).norm() < 0.12 * tensor.float().norm()
            state[name.removeprefix("model.")] = read
    ours.load_state_dict(state)
    model = Model.load(out, device="cpu")
    ids = torch.randint(0, MICRO.vocab, (60,))
    with torch.no_grad():
        assert (model.logits(ids) - ours(ids[None])[0]).abs().max() < 1e-3


def test_perplexity_is_that_of_the_training_loss(trained):
    _, folder = trained
    model = Model.load(folder, device="cpu")
    value, count = evaluate.perplexity(model, 2)
    assert 1 < value < MICRO.vocab
    assert count == sum(len(model.tokenizer.encode(grammar.story(seed))) for seed in range(2))
    with pytest.raises(ValueError, match="num_stories must be 1 to"):
        evaluate.perplexity(model, 0)
