"""Schemas, regular expressions and grammars: whatever the model says, the text is what they describe."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import WordLevel

from qinfer.assets import STORYTELLER
from qinfer.engine.generator import Generator
from qinfer.engine.grammar import grammar, json_schema, regex
from qinfer.engine.sampling import SamplerState, SamplingParams
from qinfer.engine.sequence import Sequence
from qinfer.engine.turns import Turns, heard
from qinfer.errors import UnsupportedError
from qinfer.models.model import Model
from tests.engine import mock
from tests.engine.mock import TOKENIZER, VOCAB, Adapter, MockModel, expected, generator, is_idle

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog", "größer"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
PATTERNS = (
    r"[A-Z][a-z]{2,6}( and [A-Z][a-z]{2,6})?\.",
    r"\d{3}-\d{4}",
    r"(yes|no|perhaps)",
    r"a/b{1,5}|[äöü]{2,4}",
    r"🦊+x",
)
ARITHMETIC = 'start: sum\nsum: term ("+" term){0,3}\nterm: NUMBER | "(" sum ")"\nNUMBER: /[1-9][0-9]{0,2}/\n'


def is_person(text: str) -> bool:
    value = json.loads(text)
    pets = value.get("pets", [])
    assert set(value) <= {"name", "age", "pets"}
    assert len(value["name"]) <= 9
    return 0 <= value["age"] <= 120 and len(pets) <= 2 and set(pets) <= {"cat", "dog", "größer"}


@pytest.fixture(scope="module")
def storyteller() -> Model:
    return Model.load(STORYTELLER, device="cpu")


@pytest.mark.parametrize(("seed", "temperature", "draft_tokens"), [(1, 1.0, 0), (2, 0.0, 4), (3, 1.0, 4), (4, 2.0, 0)])
def test_random_logits_say_what_is_asked(
    seed: int, temperature: float, draft_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The id that the model never says is a comma otherwise.
    monkeypatch.setattr(mock, "POISON", VOCAB - 1)
    options = {"temperature": temperature, "seed": seed, "max_new_tokens": 250}
    free = SamplingParams(temperature=temperature, seed=seed, max_new_tokens=20)
    constraints = [json_schema(PERSON, TOKENIZER, compact=True), *(regex(one, TOKENIZER) for one in PATTERNS)]
    gen = generator(MockModel(tokenizer=TOKENIZER, eos_ids=[0]), draft=draft_tokens, max_tokens=1200)
    prompt = [20 + seed, 9]
    params = [SamplingParams(constraint=one, **options) for one in constraints]
    person, *texts, plain = gen.generate([prompt] * (len(params) + 1), [*params, free])
    assert list(plain.token_ids) == expected(prompt, free, [0])
    for out in (person, *texts[:-1]):
        assert out.finish_reason == "stop", out
    assert is_person(person.text)
    for pattern, out in zip(PATTERNS, texts, strict=True):
        # The last one never has to end.
        assert re.fullmatch(pattern, out.text) or out.finish_reason == "length"
    assert is_idle(gen)


def test_a_real_model_says_what_is_asked(storyteller: Model) -> None:
    gen = Generator(storyteller, max_tokens=2048)
    tokenizer = storyteller.tokenizer
    assert tokenizer is not None
    schema = json_schema(json.dumps(PERSON), tokenizer, compact=True)
    constraints = [schema, regex(PATTERNS[0], tokenizer), grammar(ARITHMETIC, tokenizer)]
    free = SamplingParams(seed=3, max_new_tokens=20)
    params = [SamplingParams(seed=i, max_new_tokens=120, constraint=one) for i, one in enumerate(constraints)]
    outs = gen.generate(["Once upon a time"] * 4, [free, *params])
    assert outs[0] == gen.generate("Once upon a time", free)
    assert [out.finish_reason for out in outs] == ["length", "stop", "stop", "stop"]
    assert is_person(outs[1].text)
    assert re.fullmatch(PATTERNS[0], outs[2].text)
    assert re.fullmatch(r"[1-9()][0-9+()]*", outs[3].text)
    assert gen.generate("Once upon a time", params[1]) == outs[2]


def test_whitespace_is_bounded() -> None:
    def is_allowed(text: str, *, compact: bool) -> bool:
        walk = json_schema(PERSON, TOKENIZER, compact=compact).begin()
        for token in TOKENIZER.encode(text):
            if not walk.allowed()[token // 32] >> (token % 32) & 1:
                return False
            walk.advance(token)
        return True

    assert is_allowed('{ "name":\n\t"x"' + " " * 64, compact=False)
    assert not is_allowed('{"name":"x"' + " " * 65, compact=False)
    assert is_allowed('{"name":"x"', compact=True)
    assert not is_allowed('{"name": ', compact=True)


def test_the_end_of_the_limit_is_not_the_end_of_the_text(storyteller: Model) -> None:
    gen = Generator(storyteller, max_tokens=512)
    constraint = regex("[0-9]{4}", storyteller.tokenizer)
    short, exact = (
        gen.generate("x", SamplingParams(seed=1, max_new_tokens=count, constraint=constraint)) for count in (1, 4)
    )
    assert (short.finish_reason, exact.finish_reason) == ("length", "stop")
    assert exact.text.startswith(short.text)


@pytest.mark.parametrize(
    ("make", "text", "problem"),
    [
        (json_schema, "{not JSON", "schema must be JSON: .*line 1"),
        (json_schema, "[1]", "schema must be a JSON object"),
        (json_schema, {"type": "objekt"}, "schema cannot be enforced: Invalid type: objekt"),
        (json_schema, {"$ref": "#/nowhere"}, "'/nowhere' does not exist"),
        (json_schema, {"type": "string", "minLength": 5, "maxLength": 2}, "minLength .5. is greater than maxLength"),
        (json_schema, {"type": "array", "uniqueItems": True}, 'Unimplemented keys: \\["uniqueItems"\\]'),
        (json_schema, {"not": {}, "x-guidance": {"lenient": True}}, 'Unimplemented keys: \\["not"\\]'),
        (regex, "[", "pattern cannot be enforced: .*unclosed character class"),
        (regex, "a(?=b)", "look-around"),
        (grammar, "start: nothing", 'grammar cannot be enforced: .*unknown name: "nothing"'),
    ],
)
def test_what_cannot_be_compiled_is_an_error(make: Any, text: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){problem}"):
        make(text, TOKENIZER)


def test_grammar_that_is_too_hard_ends_its_own_request() -> None:
    constraint = regex("[a-c]{9}", TOKENIZER)
    walk = constraint.begin()
    with pytest.raises(ValueError, match=r"cannot be followed any further: .*doesn't satisfy"):
        walk.advance(TOKENIZER.encode("x")[0])


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    for make in (json_schema, regex, grammar):
        with pytest.raises(UnsupportedError, match=r"pip install 'qinfer\[constrain\]'"):
            make("{}", TOKENIZER)


def test_tokenizer_that_cannot_be_read() -> None:
    words = Adapter(RustTokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")))
    with pytest.raises(UnsupportedError, match=r"cannot read this tokenizer .*decoder"):
        regex("a", words)


class TwoRanks:
    """Rank 0 of two, and what it tells the other."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def tell(self, message: dict[str, Any]) -> None:
        self.told.append(json.loads(json.dumps(message)))


def test_other_ranks_make_it_anew() -> None:
    comm = TwoRanks()
    turns = Turns(comm, {})
    params = SamplingParams(seed=1, stop_ids=[9], constraint=json_schema(PERSON, TOKENIZER))
    turns.check(params.constraint, TOKENIZER)
    turns.request(Sequence(3, (5, 6), params, SamplerState(params, ())))
    turns.request(Sequence(4, (5, 6), replace(params, constraint=None), SamplerState(params, ())))
    turns.step()
    first, second = comm.told[-1]["requests"]
    assert heard(second, None) == replace(params, constraint=None)
    again = heard(first, TOKENIZER)
    assert replace(again, constraint=None) == heard(second, None)
    walks = [one.constraint.begin() for one in (params, again)]
    for token in TOKENIZER.encode('{"name":"'):
        assert (walks[0].allowed() == walks[1].allowed()).all()
        for walk in walks:
            walk.advance(token)
    for constraint, tokenizer in ((object(), TOKENIZER), (params.constraint, None)):
        with pytest.raises(UnsupportedError, match="with several ranks, a model takes a schema"):
            turns.check(constraint, tokenizer)
