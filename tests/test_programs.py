"""The command line, from end to end, on the model inside the package."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qinfer import Generator, Model, SamplingParams
from qinfer.__main__ import main
from qinfer.assets import STORYTELLER
from qinfer.bench.__main__ import main as bench
from qinfer.engine.job import Completion
from qinfer.programs.generate import summary
from tests.models import adapters

PROMPT = "Once upon a time"


def test_generate_streams_a_story(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", PROMPT, "--temperature", "0", "--max-new-tokens", "60", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    model = Model.load(STORYTELLER, device="cpu")
    completion = Generator(model).generate(PROMPT, SamplingParams(temperature=0, max_new_tokens=60))
    assert captured.out == PROMPT + completion.text + "\n"
    assert "tokens/s" in captured.err
    assert "finished: " in captured.err


@pytest.mark.parametrize("draft", [["--draft", str(STORYTELLER)], ["--draft-tokens", "3"]])
def test_drafts_tell_the_same_story(draft: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", PROMPT, "--temperature", "0", "--max-new-tokens", "30", "--device", "cpu"]
    assert main(arguments) == 0
    story = capsys.readouterr().out
    assert main([*arguments, *draft]) == 0
    captured = capsys.readouterr()
    assert captured.out == story
    if "--draft" in draft:
        # One token of the prompt's step, five steps of five with four drafts each, and one of four with three.
        assert "23 of 23 drafted tokens accepted" in captured.err


def test_the_speed_is_that_of_whole_steps(capsys: pytest.CaptureFixture[str]) -> None:
    completion = Completion("", tuple(range(12)), "length", 1)
    # Ten tokens between the first event and the last but one, which are two seconds apart.
    told = [(1.0, 1), (2.0, 5), (3.0, 5), (3.001, 1)]
    assert "first token after 1000 ms; 12 new tokens, 5.0 tokens/s; finished: length" in summary(completion, told)
    for untimed in ([(1.0, 12)], [(1.0, 8), (1.001, 4)], [(1.0, 12), (2, 0), (2, 0)], [(1.0, 1), (1.0, 11), (2, 0)]):
        assert "12 new tokens; finished: length" in summary(completion, untimed)
    arguments = ["generate", PROMPT, "-t", "0", "-n", "5", "--draft", str(STORYTELLER), "--device", "cpu"]
    assert main(arguments) == 0
    error = capsys.readouterr().err
    assert "5 new tokens; 3 of 3 drafted tokens accepted" in error


def test_a_refused_request_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", PROMPT, "--max-new-tokens", "100000", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1024 positions" in captured.err


def test_generate_with_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters.save(tmp_path / "lora", STORYTELLER)
    model = Model.load(STORYTELLER, device="cpu")
    params = SamplingParams(temperature=0, max_new_tokens=9)
    loras = (None, model.load_lora(tmp_path / "lora"))
    texts = [Generator(model).generate(PROMPT, params, lora=lora).text for lora in loras]
    assert texts[0] != texts[1]
    options = ["-t", "0", "-n", "9", "--device", "cpu", "--lora"]
    assert main(["generate", PROMPT, *options, str(tmp_path / "lora")]) == 0
    assert capsys.readouterr().out == PROMPT + texts[1] + "\n"
    assert main(["generate", PROMPT, *options, str(tmp_path)]) == 1
    assert "adapter_config.json: is missing" in capsys.readouterr().err


def test_the_same_seed_tells_the_same_story(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "-p", PROMPT, "--max-new-tokens", "20", "--device", "cpu", "--seed"]
    stories = []
    for seed in ("5", "5", "6"):
        assert main([*arguments, seed]) == 0
        stories.append(capsys.readouterr().out)
    assert stories[0] == stories[1] != stories[2]


@pytest.mark.parametrize(
    ("option", "source", "pattern"),
    [
        ("--regex", "[a-c]{5}", "[a-c]{5}"),
        ("--json-schema", '{"enum": ["abc"]}', '"abc"'),
        ("--grammar", 'start: ("ab" | "ba"){3}', "(ab|ba){3}"),
    ],
)
def test_generate_keeps_to_a_constraint(
    option: str, source: str, pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "source"
    file.write_text(source)
    argument = source if option == "--regex" else str(file)
    assert main(["generate", "x", option, argument, "--device", "cpu", "--seed", "1"]) == 0
    captured = capsys.readouterr()
    assert re.fullmatch("x" + pattern, captured.out.removesuffix("\n"))
    assert "finished: stop" in captured.err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["generate", "x", "--model", "/nowhere"], "/nowhere"),
        (["generate", "x", "--kv-format", "fp7"], "fp16"),
        (["generate", "x", "--max-new-tokens", "100000"], "1024 positions"),
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "-p", "y"], "not both"),
        (["generate", "x", "--draft", "/nowhere", "--gpus", "1,1"], "--draft needs a model on one device"),
        (["generate", "x", "--draft", "/nowhere", "--draft-tokens", "0"], "--draft-tokens must be at least 1"),
        (["generate", "x", "--draft", "/nowhere"], "/nowhere"),
        (["generate", "x", "--device", "tpu"], "'cuda' or 'cpu'"),
        (["generate", "x", "--dtype", "int3"], "fp16 and bf16 work"),
        (["generate", "x", "--json-schema", "/nowhere"], "/nowhere cannot be read"),
    ],
)
def test_mistakes_are_explained_in_one_line(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *([] if "--device" in arguments else ["--device", "cpu"])]) == 1
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


def test_bench_model_writes_every_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    arguments = ["model", "--model", str(STORYTELLER), "--batch", "2", "--context", "16", "--new-tokens", "8"]
    assert bench([*arguments, "--prefill", "32", "--device", "cpu", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert set(result["ms_per_step"]) == {"median", "p10", "p90"}
    for field in ("tokens_per_second", "bytes_per_step", "read_bandwidth_gb_s", "prefill_tokens_per_second"):
        assert result[field] > 0, field
    assert 0 < result["fraction_of_roof"] < 1
    for field in ("gpu", "torch", "triton", "python", "revision", "date", "kv_format", "weights"):
        assert result[field], field
    # Every matrix once, and the cache of both sequences in the middle of the run.
    model = Model.load(STORYTELLER, device="cpu")
    matrices = sum(linear.nbytes for linear in model.decoder.linears())
    config = model.config
    cache = 2 * config.num_layers * (16 + 4) * 2 * config.num_kv_heads * config.head_dim * 2
    assert matrices + cache < result["bytes_per_step"] < 1.01 * (matrices + cache)
    assert "tokens_per_second" in capsys.readouterr().out


@pytest.mark.parametrize("load", [["--clients", "2"], ["--rate", "50"]])
def test_bench_serve_writes_every_field(load: list[str], tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    lengths = ["--prompt-tokens", "3", "20", "--new-tokens", "4", "4", "--shared-prefix", "300"]
    arguments = ["serve", "--model", str(STORYTELLER), "--requests", "5", *lengths, *load]
    assert bench([*arguments, "--device", "cpu", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    for field in ("ttft_ms", "tpot_ms", "itl_ms", "step_ms"):
        assert 0 < result[field]["p50"] <= result[field]["p90"] <= result[field]["p99"], field
    assert result["output_tokens_per_second"] * result["wall_s"] == pytest.approx(5 * 4)
    # The first page of the prefix is computed by whoever comes first, and by those that begin at the same time.
    assert result["cached_tokens"] in (256 * n for n in (1, 2, 3, 4))
    assert (result["preemptions"], result["revision"] != "") == (0, True)
    assert 0 < result["host_ms_per_step"] <= sum(result["step_ms"].values())


def test_bench_serve_refuses_impossible_loads(capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--prompt-tokens", "9", "3"], "--prompt-tokens must be 1 <= MIN <= MAX, got 9 3"),
        (["--rate", "0"], "--rate must be above 0"),
        (["--clients", "0"], "--clients must be at least 1"),
    ):
        assert bench(["serve", "--model", str(STORYTELLER), "--device", "cpu", *options]) == 1
        assert message in capsys.readouterr().err


def test_bench_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench(["model", "--preset", "gpt-5"])
    assert "llama-3.1-8b" in capsys.readouterr().err
