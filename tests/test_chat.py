"""The chat program: driven through standard input, on a tiny model that answers noise."""

from __future__ import annotations

import io
import json
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qinfer import Generator, Model, SamplingParams
from qinfer.__main__ import main
from qinfer.assets import STORYTELLER
from qinfer.programs.answers import PlainDisplay, RichDisplay, display_for, split_blocks
from qinfer.programs.chat import Chat
from qinfer.programs.conversation import Conversation, Message
from tests.engine.mock import TOKENIZER, VOCAB
from tests.models import tiny

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}{% if enable_thinking is false %}{{ '-' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "model"
    tiny.save(path, "llama", vocab_size=VOCAB, max_position_embeddings=1024)
    TOKENIZER.tokenizer.save(str(path / "tokenizer.json"))
    config = {"eos_token": "<eos>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return Model.load(folder, device="cpu")


def rendered(messages: list[Message]) -> str:
    return "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]"


def answer(model: Model, messages: list[Message], new: int = 9) -> str:
    """What the model says greedily."""
    ids = model.tokenizer.encode(rendered(messages), add_special_tokens=False)
    return Generator(model).generate(ids, SamplingParams(temperature=0, max_new_tokens=new)).text


def shown(text: str) -> str:
    """What of a text reaches a terminal."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", printed)
        PlainDisplay().show(text)
    return printed.getvalue()


def talk(folder: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], *arguments: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return main(["chat", str(folder), "-t", "0", "-n", "9", "--device", "cpu", *arguments])


def test_a_conversation(
    folder: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "talk.json"
    lines = ["hello", "", '"""one', 'two"""', f"/save {saved}", "//slash", "/undo", "/retry", "/system Be", "last"]
    assert talk(folder, monkeypatch, [*lines, "/reset", "after", "/quit", "never"], "--stats", "--system", "Sys") == 0
    said: list[Message] = [{"role": "system", "content": "Sys"}]
    wanted = []

    def ask(question: str) -> None:
        said.append({"role": "user", "content": question})
        wanted.append(answer(model, said))
        said.append({"role": "assistant", "content": wanted[-1]})

    ask("hello")
    ask("one\ntwo")
    assert json.loads(saved.read_text()) == {"messages": said}
    ask("/slash")
    del said[-2:]
    del said[-2:]
    ask("one\ntwo")
    assert wanted[-1] == wanted[1]
    said[0] = {"role": "system", "content": "Be"}
    ask("last")
    del said[1:]
    ask("after")
    captured = capsys.readouterr()
    assert captured.out == "".join(shown(text) + "\n" for text in wanted)
    stats = [line for line in captured.err.splitlines() if line.startswith("[") and "prompt tokens" in line]
    assert len(stats) == 6
    # /retry comes after its own prompt was computed.
    assert "64 of them cached" in stats[3] or "128 of them cached" in stats[3]
    assert captured.err.count("[cut after 9 tokens]") == sum(line.endswith("length]") for line in stats)


def test_goes_on_where_it_was_saved(
    folder: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [{"role": "user", "content": "größer"}, {"role": "assistant", "content": "ja"}]
    file = tmp_path / "talk.json"
    file.write_text(json.dumps(said))
    more = [*said, {"role": "user", "content": "and"}]
    assert talk(folder, monkeypatch, ["and"], "--load", str(file)) == 0
    assert capsys.readouterr().out == shown(answer(model, more)) + "\n"
    # A command that fails leaves everything as it was.
    lines = [f"/load {file}", f"/load {file}x", f"/load {folder / 'model.safetensors'}", "/load", "/sing", "and"]
    (tmp_path / "bad.json").write_text('{"messages": [{"role": "user", "content": [1]}]}')
    lines[1:1] = [f"/load {tmp_path / 'bad.json'}", f"/save {tmp_path / 'no' / 'file'}"]
    assert talk(folder, monkeypatch, lines) == 0
    captured = capsys.readouterr()
    assert captured.out == shown(answer(model, more)) + "\n"
    problems = ["must hold a list of messages", "No such file", "No such file", "is not valid JSON", "needs the name"]
    notes = captured.err.splitlines()
    assert all(problem in note for problem, note in zip([*problems, "/sing is no command"], notes, strict=False)), notes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "talk.json"]


def test_drafts_tell_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(folder, monkeypatch, ["hello", "again"]) == 0
    plain = capsys.readouterr().out
    assert talk(folder, monkeypatch, ["hello", "again"], "--stats", "--draft", str(folder)) == 0
    captured = capsys.readouterr()
    assert captured.out == plain
    assert captured.err.count("drafted tokens accepted") == 2


def test_a_conversation_that_is_too_long_says_so(
    folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/undo", "/retry", "x" * 300, "x" * 58, "/retry", "/help"]
    assert talk(folder, monkeypatch, lines, "--context", "80", "-n", "50") == 0
    captured = capsys.readouterr()
    for note in (
        "there is nothing to take back",
        "there is no question to answer again",
        "there is room for 80: /undo or /reset",
        "/system TEXT",
    ):
        assert note in captured.err
    first, second = captured.out.splitlines()[0], captured.out.splitlines()[-1]
    room = 80 - len(model.tokenizer.encode(rendered([{"role": "user", "content": "x" * 58}]), add_special_tokens=False))
    text = answer(model, [{"role": "user", "content": "x" * 58}], room)
    assert captured.out == 2 * (shown(text) + "\n"), (first, second)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([str(STORYTELLER)], "has no chat template: give one with --template FILE, or let it continue a text with"),
        ([str(STORYTELLER), "--template", "/nowhere"], "--template /nowhere cannot be read"),
        ([str(STORYTELLER), "--load", "/nowhere"], "/nowhere cannot be read"),
        ([str(STORYTELLER), "--context", "0"], "--context must be at least 1"),
        (["/nowhere"], "a checkpoint must be a folder"),
    ],
)
def test_mistakes_end_the_program(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", *arguments, "--device", "cpu"]) == 1
    assert problem in capsys.readouterr().err


def test_a_template_of_ones_own(
    folder: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.jinja").write_text("{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}Q:")
    own = ["--template", str(tmp_path / "own.jinja")]
    assert talk(folder, monkeypatch, ["hello", "again", "/reset", "third"], *own) == 0
    captured = capsys.readouterr()
    ids = model.tokenizer.encode("Q:", add_special_tokens=False)
    text = Generator(model).generate(ids, SamplingParams(temperature=0, max_new_tokens=9)).text
    assert captured.out == 2 * (shown(text) + "\n")
    assert "the chat template refuses these messages: one only" in captured.err
    assert talk(folder, monkeypatch, ["hello"], "--no-thinking") == 0
    ids = model.tokenizer.encode("[user]hello[assistant]-", add_special_tokens=False)
    text = Generator(model).generate(ids, SamplingParams(temperature=0, max_new_tokens=9)).text
    assert capsys.readouterr().out == shown(text) + "\n"


class Recorder:
    """A display that presses Ctrl-C in the middle of the first answer."""

    def __init__(self) -> None:
        self.answers: list[str] = []
        self.notes: list[str] = []
        self.is_pressed = False

    def begin(self) -> None:
        self.answers.append("")

    def show(self, text: str) -> None:
        self.answers[-1] += text
        if len(self.answers[0]) > 3 and not self.is_pressed:
            self.is_pressed = True
            signal.raise_signal(signal.SIGINT)

    def end(self) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_ctrl_c_stops_the_answer_and_not_the_program(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nmore\n"))
    generator = Generator(model, max_tokens=512, page_size=64)
    display, conversation = Recorder(), Conversation()

    def write(messages: list[Message]) -> list[int]:
        return model.tokenizer.encode(rendered(messages), add_special_tokens=False)

    params = SamplingParams(temperature=0, max_new_tokens=60)
    before = signal.getsignal(signal.SIGINT)
    Chat(generator, write, params, conversation, display, context=512).talk()
    assert signal.getsignal(signal.SIGINT) is before
    whole = answer(model, conversation.messages[:1], 60)
    assert 3 < len(display.answers[0]) < len(whole)
    assert whole.startswith(display.answers[0].rstrip("\ufffd"))
    # What was said stays, and is what the next turn follows.
    assert [m["content"] for m in conversation.messages] == ["hello", display.answers[0], "more", display.answers[1]]
    assert display.answers[1] == answer(model, conversation.messages[:3], 60)
    assert generator.pages.num_used == 0
    assert not generator.scheduler.has_work


blocks = st.lists(st.sampled_from(["a", "\n", "\n\n", "```\n", "    b", "- c\n", " ", "~~~"]), max_size=14).map("".join)


@given(blocks, st.lists(st.integers(0, 40), max_size=6))
def test_blocks_are_finished_once_and_for_good(text: str, cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    printed, rest = [], ""
    for first, last in pairwise(places):
        finished, rest = split_blocks(rest + text[first:last])
        printed.append(finished)
    finished, left = split_blocks(text)
    assert ("".join(printed), rest) == (finished, left)
    assert finished + left == text


def test_blocks() -> None:
    code = "```py\nx = 1\n\ny = 2\n```\n\n"
    assert split_blocks("one\ntwo\n\nthree") == ("one\ntwo\n\n", "three")
    assert split_blocks(code + "end") == (code, "end")
    assert split_blocks(code[:-5]) == ("", code[:-5])
    assert split_blocks("1. a\n\n   b\n\nc") == ("1. a\n\n   b\n\n", "c")


def test_markdown_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    display: Any = RichDisplay(console)
    display.begin()
    for piece in ("# Ti", "tle\n\nA <div> and **bo", "ld**\x1b[2J.\n\n```\nx <", "b>\n\n", "y\n```\n", "\n- item"):
        display.show(piece)
    display.end()
    display.note("[note]")
    out = console.file.getvalue()
    final = [line.strip() for line in out.split("Title")[-1].splitlines() if line.strip()]
    assert "A <div> and bold␛[2J." in out
    assert "**" not in out.replace("**bo", "")
    assert "x <b>" in out
    assert any("• item" in line for line in final)
    assert final[-1] == "[note]"
    assert out.count("bold") == 1


def test_where_markdown_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for variables, plain, kind in (
        ({"FORCE_COLOR": "1"}, False, RichDisplay),
        ({"FORCE_COLOR": "1"}, True, PlainDisplay),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, PlainDisplay),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, False, PlainDisplay),
        ({}, False, PlainDisplay),
    ):
        with monkeypatch.context() as patch:
            for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            assert type(display_for(plain=plain)) is kind
