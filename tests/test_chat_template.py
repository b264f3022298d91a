"""Chat templates against transformers: our own templates, each with the features of a family that people use."""

from __future__ import annotations

import json
from collections import UserDict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from qinfer.tokenizer import Tokenizer

# System prompt first, tools described in the first user message or the system prompt, a date that may be given, calls
# as JSON with "parameters", results as JSON or text.
LIKE_LLAMA = """\
{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not tools_in_user_message is defined %}{% set tools_in_user_message = true %}{% endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|h|>system<|/h|>\\n\\nToday: " + date_string + "\\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- "\\n\\n" }}{% endfor %}
{%- endif %}
{{- system }}{{- "<|eot|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length == 0 %}{{- raise_exception("tools need a first user message") }}{%- endif %}
    {%- set first = messages[0]["content"] | trim %}
    {%- set messages = messages[1:] %}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- "\\n" }}{% endfor %}
    {{- first + "<|eot|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == "ipython" or message.role == "tool" or "tool_calls" in message) %}
        {{- "<|h|>" + message["role"] + "<|/h|>\\n\\n" + (message["content"] or "") | trim + "<|eot|>" }}
    {%- elif "tool_calls" in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception("one call at a time") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}<|eot|>" }}
    {%- else %}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}{{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|h|>assistant<|/h|>\\n\\n" }}{%- endif %}
"""
# A namespace found by walking backwards, thinking kept after the last question and cut elsewhere, calls in tags with
# arguments as text or mapping, results of several tools in one turn, thinking that may be switched off.
LIKE_QWEN = """\
{%- if tools %}
    {{- "<s>system\\n" }}
    {%- if messages[0].role == "system" %}{{- messages[0].content + "\\n\\n" }}{%- endif %}
    {{- "<tools>" }}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}{{- "\\n</tools></s>\\n" }}
{%- elif messages[0].role == "system" %}
    {{- "<s>system\\n" + messages[0].content + "</s>\\n" }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string
            and not (message.content.startswith("<r>") and message.content.endswith("</r>")) %}
        {%- set ns.searching = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else "" %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- "<s>" + message.role + "\\n" + content + "</s>\\n" }}
    {%- elif message.role == "assistant" %}
        {%- set thought = "" %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif "</think>" in content %}
            {%- set thought = content.split("</think>")[0].rstrip("\\n").split("<think>")[-1].lstrip("\\n") %}
            {%- set content = content.split("</think>")[-1].lstrip("\\n") %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or (not loop.last and thought)) %}
            {{- "<s>assistant\\n<think>\\n" + thought.strip("\\n") + "\\n</think>\\n\\n" + content.lstrip("\\n") }}
        {%- else %}
            {{- "<s>assistant\\n" + content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if (loop.first and content) or not loop.first %}{{- "\\n" }}{%- endif %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '<call>\\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}
            {%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | tojson }}{%- endif %}
            {{- "}\\n</call>" }}
        {%- endfor %}
        {{- "</s>\\n" }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{- "<s>user" }}{%- endif %}
        {{- "\\n<r>\\n" + content + "\\n</r>" }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- "</s>\\n" }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<s>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- "<think>\\n\\n</think>\\n\\n" }}{%- endif %}
{%- endif %}
"""
# Roles that must alternate, ids of calls that must have nine letters, filters with arguments, tools before the last
# question, keys sorted by hand, a macro.
LIKE_MISTRAL = """\
{%- if messages[0]["role"] == "system" %}{%- set system = messages[0]["content"] %}{%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}
{%- set users = rest | selectattr("role", "equalto", "user") | list %}
{%- macro pair(key, value) %}{{ '"' + key + '": ' }}{{ value | tojson }}{% endmacro %}
{%- set ns = namespace(index=0) %}
{%- for message in rest if message.role in ("user", "assistant") and not message.tool_calls %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in rest %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and message == users[-1] %}
            {{- "[TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}{{- '{"type": "function", "function": {' }}
                {%- for key, value in tool.items() if key != "return" %}
                    {{- pair(key, value) }}{%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}{{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}{{- "[/TOOLS]" }}
        {%- endif %}
        {{- "[INST] " }}{%- if loop.last and system is defined %}{{- system + "\\n\\n" }}{%- endif %}
        {{- message["content"] + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[CALLS] [" }}
        {%- for call in message.tool_calls %}
            {{- (call.function | tojson)[:-1] }}
            {%- if not call.id is defined or call.id | length != 9 %}
                {{- raise_exception("ids of calls should be 9 alphanumeric characters") }}
            {%- endif %}
            {{- ', "id": "' + call.id + '"}' }}{{- ", " if not loop.last else "]" + eos_token }}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] in ["tool_results", "tool"] %}
        {{- '[RESULT] {"content": ' + message.content | string }}
        {{- ', "call_id": "' + message.tool_call_id + '"}[/RESULT]' }}
    {%- else %}{{- raise_exception("only user and assistant roles are known") }}
    {%- endif %}
{%- endfor %}
"""
# Documents, loop controls, generation tag, several kinds of content parts, the other arguments of tojson.
WITH_PARTS = """\
{% for document in documents or [] %}
[{{ loop.index }}] {{ document.title }}: {{ document["text"] | e }}
{% endfor %}
{% for message in messages %}
{% if message.role == "comment" %}{% continue %}{% endif %}
{% generation %}
{% if message.content is string %}
{{ message.content }}
{% else %}
{% for part in message.content or [] %}
{% if part.type == "text" %}{{ part.text }}{% else %}<{{ part.type }}>{% endif %}
{% endfor %}
{% endif %}
{% endgeneration %}
{% if message.role == "stop" %}{% break %}{% endif %}
{% endfor %}
{{ {"b": "<é>", "a": [1, 2.5, None, True]} | tojson(sort_keys=True, separators=(",", ":"), ensure_ascii=True) }}
{{ unk_token is defined }} {{ sep_token is defined }} {{ think | default("unset") }} {{ image_token }}
"""
TEMPLATES = {"llama": LIKE_LLAMA, "qwen": LIKE_QWEN, "mistral": LIKE_MISTRAL, "parts": WITH_PARTS}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Says how it is in "Köln" & <elsewhere>',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}},
]
CALL = {"type": "function", "id": "abcdefg12", "function": {"name": "weather", "arguments": {"city": "Köln <3"}}}
TOOL_CHAT = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "How is it?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "tool_call_id": "abcdefg12", "content": '{"sky": "grey"}'},
    {"role": "assistant", "content": "<think>\nGrey, then.\n</think>\n\nGrey. "},
    {"role": "user", "content": "Thanks & bye 🙂"},
]
BACKEND = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<img>": 2}, unk_token="</s>"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """Our tokenizer and transformers', loaded from one folder, for every template."""
    found = {}
    for name, template in TEMPLATES.items():
        folder = tmp_path_factory.mktemp(name)
        BACKEND.save(str(folder / "tokenizer.json"))
        tokens = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "image_token": "<img>"}
        (folder / "tokenizer_config.json").write_text(
            json.dumps({**tokens, "tokenizer_class": "PreTrainedTokenizerFast"})
        )
        (folder / "chat_template.jinja").write_text(template)
        found[name] = Tokenizer.load(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return found


def outcome(render: Any) -> str:
    """The text, or that the template refused."""
    try:
        return str(render())
    except (ValueError, TypeError, transformers.utils.chat_template_utils.jinja2.TemplateError) as problem:
        return "refused" if "jinja2" in type(problem).__module__ or "refuses" in str(problem) else repr(problem)


def check(pair: tuple[Tokenizer, Any], messages: list[dict[str, Any]], **options: Any) -> str:
    """Both give the same text, or both refuse."""
    ours, theirs = pair
    options.setdefault("add_generation_prompt", False)
    text = outcome(lambda: ours.apply_chat_template(messages, **options))
    assert text == outcome(lambda: theirs.apply_chat_template(messages, tokenize=False, **options))
    return text


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS[:1], TOOLS])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_calls_and_results(pairs: Any, name: str, tools: Any, *, add_generation_prompt: bool) -> None:
    text = check(pairs[name], TOOL_CHAT, tools=tools, add_generation_prompt=add_generation_prompt)
    assert "Thanks" in text
    assert (name == "parts") or ("Köln <3" in text)
    # What stands behind a call is left out, one message at a time.
    for count in range(1, len(TOOL_CHAT)):
        check(pairs[name], TOOL_CHAT[:count], tools=tools, add_generation_prompt=add_generation_prompt)


def test_features_show(pairs: Any) -> None:
    def text(name: str, **options: Any) -> str:
        return check(pairs[name], TOOL_CHAT, **options)

    assert "Today: 1 May 2020" in text("llama", date_string="1 May 2020")
    assert "Today: " in text("llama")
    assert text("llama", tools=TOOLS) != text("llama", tools=TOOLS, tools_in_user_message=False)
    assert text("qwen", add_generation_prompt=True, enable_thinking=False).endswith("<think>\n\n</think>\n\n")
    assert "Grey, then." not in text("qwen")
    assert "Grey, then." in check(pairs["qwen"], TOOL_CHAT[:-1])
    assert text("mistral", tools=TOOLS).count("[TOOLS]") == 1
    assert check(pairs["mistral"], TOOL_CHAT[1:2] * 2) == "refused"
    documents = [{"title": "One", "text": "a < b"}, {"title": "Zwei", "text": "ü"}]
    assert "[2] Zwei: ü" in text("parts", documents=documents)
    assert text("parts", think=[1, {"a": None}]).endswith('"b":"<\\u00e9>"}\nFalse False [1, {\'a\': None}] <img>')
    parts = [{"type": "image"}, {"type": "text", "text": "see"}]
    chat = [{"role": "comment", "content": "no"}, {"role": "stop", "content": parts}, {"role": "user", "content": "no"}]
    assert check(pairs["parts"], chat).startswith("<image>see{")


roles = st.sampled_from(["system", "user", "user", "assistant", "assistant", "tool", "comment", "stop"])
words = st.text("abÄ🙂<>&'\"{}%\\\n ", max_size=12) | st.sampled_from(["<think>\nhm\n</think>\n\nyes", "<r>x</r>"])
calls = st.builds(
    lambda name, arguments, number: {
        "id": number,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    },
    st.sampled_from(["f", "größer"]),
    st.dictionaries(
        st.text("ab<ü", min_size=1, max_size=3), st.none() | st.integers() | words | st.lists(words, max_size=2)
    ),
    st.sampled_from(["abcdefg12", "short"]),
)
message_lists = st.lists(
    st.fixed_dictionaries(
        {"role": roles, "content": words},
        optional={
            "tool_calls": st.lists(calls, max_size=2),
            "reasoning_content": words,
            "tool_call_id": st.just("abcdefg12"),
        },
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(message_lists, st.sampled_from(list(TEMPLATES)), st.sampled_from([None, TOOLS]), st.booleans(), st.booleans())
def test_any_conversation(pairs: Any, chat: Any, name: str, tools: Any, prompt: bool, thinking: bool) -> None:
    check(pairs[name], chat, tools=tools, add_generation_prompt=prompt, enable_thinking=thinking)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("final", ["Once upon", "Once upon  ", "a\n\nb\n"])
def test_last_message_goes_on(pairs: Any, name: str, final: str) -> None:
    chat = [{"role": "user", "content": "Tell."}, {"role": "assistant", "content": final}]
    text = check(pairs[name], chat, continue_final_message=True)
    # Two of the templates strip messages.
    assert text.endswith(final.strip() if name in ("llama", "mistral") else final)
    assert pairs[name][0].apply_chat_template(chat, continue_final_message=True) == text
    parts = [chat[0], {"role": "assistant", "content": [{"type": "text", "text": final}, {"type": "image"}]}]
    if name == "parts":
        assert check(pairs[name], parts, continue_final_message=True).endswith(final)


def test_messages_that_cannot_go_on(pairs: Any) -> None:
    ours = pairs["qwen"][0]
    for chat, problem in (
        ([{"role": "tool", "content": [{"type": "image"}]}], "needs a last message with text"),
        ([{"role": "user", "content": "x"}, {"role": "comment", "content": "y"}], "does not write the last message"),
    ):
        with pytest.raises(ValueError, match=problem):
            ours.apply_chat_template(chat, continue_final_message=True)
    with pytest.raises(ValueError, match="add_generation_prompt must be off"):
        ours.apply_chat_template(TOOL_CHAT, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(ValueError, match="at least one message"):
        ours.apply_chat_template([])


def test_messages_of_clients(pairs: Any) -> None:
    """Keys without a value, thoughts under other names, objects that are nearly data; the last message is as before."""
    ours = pairs["qwen"][0]
    plain = [TOOL_CHAT[1], {"role": "assistant", "content": "Grey.", "reasoning_content": "Look."}]
    wanted = ours.apply_chat_template(plain)
    assert "<think>\nLook.\n</think>" in wanted

    @dataclass
    class Fact:
        sky: str

    for name in ("reasoning", "thinking"):
        renamed = {
            "role": "assistant",
            "content": "Grey.",
            name: "Look.",
            "tool_calls": None,
            "reasoning_content": None,
        }
        assert ours.apply_chat_template([plain[0], UserDict(renamed)]) == wanted
        assert renamed["reasoning_content"] is None
    arguments = SimpleNamespace(model_dump=lambda: {"city": Fact("grey")})
    call = {"function": {"name": "f", "arguments": arguments}}
    said = ours.apply_chat_template([plain[0], {"role": "assistant", "tool_calls": [call]}])
    assert '{"name": "f", "arguments": {"city": {"sky": "grey"}}}' in said
    with pytest.raises(TypeError, match=r"plain data only: .* got \w*Path"):
        ours.apply_chat_template([{"role": "user", "content": Path("/")}])
    for wrong in ({"tools": [print]}, {"tools": "f"}, {"documents": ["text"]}):
        with pytest.raises(TypeError, match="must be a list of"):
            ours.apply_chat_template(plain, **wrong)


def test_templates_by_name(tmp_path: Path) -> None:
    BACKEND.save(str(tmp_path / "tokenizer.json"))
    named = [{"name": "default", "template": "D{{ bos_token }}"}, {"name": "tool_use", "template": "T"}]
    config = {"bos_token": "<s>", "chat_template": named, "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    chat = TOOL_CHAT[1:2]
    for extra in (False, True):
        if extra:
            (tmp_path / "chat_template.jinja").write_text("F")
            (tmp_path / "additional_chat_templates").mkdir()
            (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R{{ documents | length }}")
            (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("U{{ (tools or []) | length }}")
        ours, theirs = Tokenizer.load(tmp_path), transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
        names = [None, "default", "tool_use", *(["rag"] if extra else []), "{{ messages[0].role }}"]
        for options in ({}, {"tools": TOOLS}):
            options["documents"] = []
            texts = [ours.apply_chat_template(chat, chat_template=name, **options) for name in names]
            assert texts == [
                theirs.apply_chat_template(chat, chat_template=name, tokenize=False, **options) for name in names
            ]
            assert texts[-1] == "user"
    assert ours.chat_template == "F"
    with pytest.raises(ValueError, match=r"no chat template 'rga'; .* one of: 'default', 'tool_use', 'rag'"):
        ours.apply_chat_template(chat, chat_template="rga")
    with pytest.raises(ValueError, match="chat_template is not a valid chat template: line 1"):
        ours.apply_chat_template(chat, chat_template="{% for %}")
