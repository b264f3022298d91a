"""Needles of benchmarks/quality: the rows that a model is trained on, and the contexts in which it is asked."""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from qinfer.assets import STORYTELLER
from qinfer.models.model import Model

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "quality"))

import kv_formats
import needles
import retrieval
import score

FUNCTION = re.compile(r'\n\n\ndef name_(\d+)\(\):\n    return "(\w+)"\n\n\n')
VOCABULARY = ["alpha", "beta", "Gamma", "delta", "ep", "candle", "x1y", "zeta"]
LENGTH = 4000


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.load(STORYTELLER, device="cpu")


@pytest.mark.parametrize("seed", range(8))
def test_planted_rows_hold_functions_several_times_and_hay_between(seed: int) -> None:
    planter = needles.Planter.of(lambda text: list(text.encode()), VOCABULARY)
    hay = [random.Random(seed).choice(b"0123456789 ") for _ in range(LENGTH)]
    row = planter.plant(hay, random.Random(seed))
    assert len(row) == LENGTH
    text = bytes(row).decode()
    found = Counter(FUNCTION.findall(text))
    # What is planted fills less than the row here, so nothing is cut off.
    assert len({number for number, _word in found}) == len(found) > 0
    assert len(set(found.values())) == 1
    assert needles.STANDS[0] <= min(found.values()) <= needles.STANDS[1]
    rest = FUNCTION.sub("", text).encode()
    assert list(rest) == hay[: len(rest)]
    tested = set(map(str, needles.numbers(tested=True)))
    assert not tested & {number for number, _word in found}
    assert not set(needles.WORDS) & {word for _number, word in found}
    assert row == planter.plant(hay, random.Random(seed)) != planter.plant(hay, random.Random(seed + 100))


def test_a_row_shorter_than_its_functions_is_cut() -> None:
    planter = needles.Planter.of(lambda text: list(text.encode()), VOCABULARY)
    for seed in range(8):
        assert len(planter.plant([32] * 50, random.Random(seed))) == 50


def test_every_number_is_tested_or_trained_on() -> None:
    tested, trained = (needles.numbers(tested=tested) for tested in (True, False))
    assert sorted(tested + trained) == list(range(1000, 10000))
    assert len(tested) > 1000


def test_a_context_holds_its_needle_and_asks_for_it_at_the_end(model: Model) -> None:
    texts = score.documents(STORYTELLER, None)[:20]
    for ids, count in retrieval.needles(model, texts, 400, 5):
        assert len(ids) == 400
        text = model.tokenizer.decode(ids)
        (number, word), *others = FUNCTION.findall(text)
        assert not others
        assert word in needles.WORDS
        assert int(number) in needles.numbers(tested=True)
        assert text.endswith(needles.BORDER + needles.question(int(number)) + needles.answer(word))
        assert model.tokenizer.decode(ids[-count:]) == needles.answer(word)


@pytest.mark.parametrize("name", ["q8", *kv_formats.EXLLAMAV2])
def test_formats_of_others_are_asked_too(model: Model, name: str) -> None:
    ids = model.tokenizer.encode("Once there was a fox. The fox had a red")
    likeliest = int(score_exactly(model, ids).argmax())
    task = [*ids, likeliest], 1
    assert retrieval.is_found(model, task, name)
    wrong = [*ids, (likeliest + 1) % model.config.vocab_size], 1
    assert not retrieval.is_found(model, wrong, name)


def score_exactly(model: Model, ids: list[int]) -> torch.Tensor:
    return torch.cat(kv_formats.scored(model, ids, "fp32", last=1))


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(score, "ROOT", tmp_path)
    return tmp_path / "docs" / "kv-cache.md"


def test_a_table_goes_between_its_markers_or_to_the_end(page: Path) -> None:
    page.write_text("# Title\n\n<!-- begin a -->\nold\n<!-- end a -->\n\ntext\n")
    score.write_table("a", ["| new |"])
    assert page.read_text() == "# Title\n\n<!-- begin a -->\n\n| new |\n\n<!-- end a -->\n\ntext\n"
    score.write_table("b", ["| b |"])
    score.write_table("b", ["| c |"])
    assert page.read_text().endswith("text\n\n<!-- begin b -->\n\n| c |\n\n<!-- end b -->\n")


def test_one_marker_without_the_other_is_an_error(page: Path) -> None:
    page.write_text("<!-- begin a -->\n")
    with pytest.raises(ValueError, match="<!-- begin a --> without <!-- end a -->"):
        score.write_table("a", ["| new |"])
    assert page.read_text() == "<!-- begin a -->\n"
