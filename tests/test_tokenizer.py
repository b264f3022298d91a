from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from qinfer.errors import CheckpointError
from qinfer.tokenizer import Tokenizer

SPECIAL = ["<s>", "</s>", "<|user|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
WITH_TOOLS = """\
{%- if tools is not none %}
    {{- tools | tojson(indent=2) }}
{%- else %}
    {{- "no tools <&>" }}
{%- endif %}
{% set ns = namespace(count=0) %}
{% for message in messages %}
    {% if message.role == "system" %}{% continue %}{% endif %}
    {% set ns.count = ns.count + 1 %}
    {% generation %}
{{ message.content | trim }}{{ unk_token }}{{ {"<a>": "é"} | tojson }}
    {% endgeneration %}
    {% if ns.count == 2 %}{% break %}{% endif %}
{% endfor %}
{{ strftime_now("%Y") }} {{ enable_thinking }} {{ bos_token }}
"""
CHAT = [
    {"role": "user", "content": " Hello, <b>you</b> & 'me' "},
    {"role": "assistant", "content": "Grüße 🙂"},
    {"role": "user", "content": "bye"},
]


def backend() -> tokenizers.Tokenizer:
    """A byte-level BPE with a begin-of-text token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat", "hello hello you"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


BACKEND = backend()


def write(folder: Path, **config: Any) -> Path:
    """Write tokenizer.json and tokenizer_config.json."""
    BACKEND.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write(tmp_path_factory.mktemp("tokenizer")))


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<")))
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == 0
    assert ids[1:] == tokenizer.encode(text, add_special_tokens=False)
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_encoded_and_dropped_again(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|user|>cat</s>", add_special_tokens=False)
    assert ids[0] == 2
    assert ids[-1] == 1
    assert tokenizer.decode(ids) == "cat"
    assert tokenizer.decode([]) == ""


def test_sizes_and_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == BACKEND.get_vocab_size()
    assert tokenizer.eos_ids == {1}
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_vocab_size_counts_ids_not_tokens(tmp_path: Path) -> None:
    write(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["gap"] = 4000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).vocab_size == 4001


@pytest.mark.parametrize("eos", ["</s>", {"__type": "AddedToken", "content": "</s>", "lstrip": False}])
def test_eos_as_text_or_object(tmp_path: Path, eos: Any) -> None:
    assert Tokenizer.load(write(tmp_path, eos_token=eos)).eos_ids == {1}


def test_eos_may_be_absent_or_in_the_older_file(tmp_path: Path) -> None:
    BACKEND.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).eos_ids == frozenset()
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|user|>"}')
    assert Tokenizer.load(tmp_path).eos_ids == {2}
    write(tmp_path)
    assert Tokenizer.load(tmp_path).eos_ids == {1}


def test_saved_limits_do_not_cut_or_pad_a_prompt(tmp_path: Path) -> None:
    write(tmp_path)
    limited = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    limited.enable_truncation(4)
    limited.enable_padding(length=4)
    limited.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.decode(loaded.encode("the cat sat on the mat")) == "the cat sat on the mat"
    assert len(loaded.encode("", add_special_tokens=False)) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"tokenizer\.json: is missing"),
        ("{", r"tokenizer\.json: is not valid JSON: line 1"),
        ("{}", r"tokenizer\.json: is not a tokenizer"),
        ('{"model": {"type": "Nonsense"}}', r"tokenizer\.json: is not a tokenizer"),
    ],
)
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token": "<nowhere>"}, "eos_token '<nowhere>' is not in tokenizer.json"),
        ({"eos_token": 3}, "eos_token must be a string"),
        ({"bos_token": {"text": "<s>"}}, "bos_token must be a string"),
        ({"chat_template": 3}, "chat_template must be a string, got int"),
        ({"chat_template": [{"name": "default"}]}, "chat_template must be a string or a list"),
    ],
)
def test_a_damaged_tokenizer_config_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: {message}"):
        Tokenizer.load(write(tmp_path, **config))


def test_a_panic_of_the_library_is_a_value_error(tmp_path: Path) -> None:
    write(tmp_path)
    runaway = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    runaway.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated")
    runaway.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer gives up on this text"):
        loaded.encode("a" * 40 + "b")
    assert loaded.encode("b", add_special_tokens=False)


def test_text_and_ids_that_cannot_be(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"half a surrogate pair, got '\\ud800' at character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(TypeError, match="text must be a str, got bytes"):
        tokenizer.encode(b"ab")  # type: ignore[arg-type]
    for ids in ([-1], [3, 2**32]):
        with pytest.raises(ValueError, match="token ids must be from 0"):
            tokenizer.decode(ids)
    assert tokenizer.decode([2**31]) == ""


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("template", [CHATML, MISTRAL, WITH_TOOLS])
@pytest.mark.parametrize("tools", [None, [{"type": "function", "name": "<f>", "description": "größer & 'so'"}]])
def test_templates_render_as_in_transformers(
    tmp_path: Path, template: str, tools: list[dict[str, str]] | None, *, add_generation_prompt: bool
) -> None:
    ours = Tokenizer.load(write(tmp_path, chat_template=template, unk_token="<|user|>"))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=BACKEND, bos_token="<s>", eos_token="</s>", unk_token="<|user|>", chat_template=template
    )
    options = {"tools": tools, "add_generation_prompt": add_generation_prompt, "enable_thinking": False}
    year = datetime.now().year
    text = ours.apply_chat_template(CHAT, **options)
    assert text == theirs.apply_chat_template(CHAT, tokenize=False, **options)
    if template is WITH_TOOLS:
        assert str(year) in text


def test_where_a_template_is_looked_up(tmp_path: Path) -> None:
    assert Tokenizer.load(write(tmp_path)).chat_template is None
    (tmp_path / "chat_template.json").write_text('{"chat_template": ["p"]}')
    with pytest.raises(CheckpointError, match=r"chat_template\.json: chat_template must be a string, got list"):
        Tokenizer.load(tmp_path)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "p"}')
    assert Tokenizer.load(tmp_path).chat_template == "p"
    assert Tokenizer.load(write(tmp_path, chat_template="s")).chat_template == "s"
    (tmp_path / "chat_template.json").unlink()
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    assert Tokenizer.load(write(tmp_path, chat_template=named)).chat_template == "d"
    assert Tokenizer.load(write(tmp_path, chat_template=named[:1])).chat_template is None
    assert Tokenizer.load(write(tmp_path, chat_template="s")).chat_template == "s"
    (tmp_path / "chat_template.jinja").write_text("f")
    assert Tokenizer.load(tmp_path).chat_template == "f"


def test_a_file_saved_by_transformers(tmp_path: Path) -> None:
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=BACKEND, bos_token="<s>", eos_token="</s>", chat_template=CHATML
    )
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert ours.apply_chat_template(CHAT) == theirs.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )
    assert ours.eos_ids == {theirs.eos_token_id}
    text = "the cat <|user|> sat, grüße 🙂\n\n"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)


def test_a_template_may_refuse(tmp_path: Path) -> None:
    ours = Tokenizer.load(write(tmp_path, chat_template=MISTRAL))
    with pytest.raises(ValueError, match="refuses these messages: roles must alternate"):
        ours.apply_chat_template(CHAT[1:])
    with pytest.raises(ValueError, match=r"refuses these messages: .*content"):
        ours.apply_chat_template([{"role": "user"}])
    for wrong in ("hello", {"role": "user"}, ["hello"]):
        with pytest.raises(TypeError, match="messages must be a sequence of mappings"):
            ours.apply_chat_template(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no chat template"):
        Tokenizer.load(write(tmp_path)).apply_chat_template(CHAT)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ lipsum(n=5) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ joiner('a')() }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{% include '/etc/passwd' %}",
        "{{ range(1000000) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 // 0 }}",
        "{% for i in range(40000) %}{{ 'abcdefghijklmnopqrstuvwxyz' * 40 }}{% endfor %}",
    ],
)
def test_a_hostile_template_gets_nothing(tmp_path: Path, template: str) -> None:
    ours = Tokenizer.load(write(tmp_path, chat_template=template))
    with pytest.raises(ValueError, match=r"the chat template (refuses|wrote more than)"):
        ours.apply_chat_template(CHAT)


def test_a_template_with_a_mistake_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("\n\n{% for %}")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("cat")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: is not a valid chat template: line 3"):
        loaded.apply_chat_template(CHAT)
