"""Sessions on disk: what was saved goes on as if nothing had happened, and nothing else is taken for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qinfer.engine.draft_model import DraftModel
from qinfer.engine.generator import Generator
from qinfer.engine.sampling import SamplingParams
from qinfer.errors import CheckpointError, OutOfPages, UnsupportedError
from qinfer.models.model import Model
from qinfer.tensor_file import TensorFile
from tests.models import tiny

PARAMS = SamplingParams(temperature=0.8, seed=4, max_new_tokens=20, ignore_eos=True)
PROMPT = tiny.prompt(45, seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path: Path = tmp_path_factory.mktemp("session") / "qwen3"
    tiny.save(path, "qwen3", head_dim=16)
    return Model.load(path, device="cpu")


def generator(model: Model, **options: object) -> Generator:
    sizes = {"kv_format": "fp32", "max_tokens": 256, "page_size": 16, "max_step_tokens": 64}
    return Generator(model, **{**sizes, **options})


def tensors_of(gen: Generator) -> list[torch.Tensor]:
    sides = [side for layer in range(gen.model.config.num_layers) for side in gen.cache.pages(layer)]
    return [tensor for side in sides for tensor in side.tensors()]


@pytest.mark.parametrize("kv_format", ["fp32", "q6", "kfp8v4"])
def test_goes_on_as_if_nothing_had_happened(model: Model, tmp_path: Path, kv_format: str) -> None:
    file = tmp_path / "session"
    first = generator(model, kv_format=kv_format)
    text = [*PROMPT, *first.generate(PROMPT, PARAMS).token_ids]
    # The last id was never computed.
    assert first.save_session(text, file) == 64
    more = [*text, 5, 6, 7]
    wanted = first.generate(more, PARAMS)
    assert wanted.cached_tokens == 64
    second = generator(model, kv_format=kv_format)
    second.generate(tiny.prompt(50, seed=9), PARAMS)
    assert second.load_session(file) == text[:64]
    assert second.pages.num_used == 0
    out = second.generate(more, PARAMS)
    assert (out, out.cached_tokens) == (wanted, 64)
    # And saved again it holds the same.
    assert second.save_session(more, tmp_path / "again") == 64
    old, new = (TensorFile(tmp_path / name) for name in ("session", "again"))
    assert (old.about, old.names) == (new.about, new.names)
    assert all(torch.equal(old.read(name), new.read(name)) for name in old.names)
    assert {path.name for path in tmp_path.iterdir()} == {"session", "again"}


def test_running_requests_and_pages_that_are_there_already(model: Model, tmp_path: Path) -> None:
    first = generator(model)
    job = first.submit(PROMPT, PARAMS)
    while len(job.sequence.generated) < 6:
        first.step()
    assert first.save_session(job, tmp_path / "running") == 48
    assert first.save_session([*PROMPT, 1], tmp_path / "prompt") == 32
    while not job.finished:
        first.step()
    assert first.save_session(job, tmp_path / "finished") == 64
    second = generator(model, max_tokens=80)
    second.load_session(tmp_path / "prompt")
    before = [tensor[:2].clone() for tensor in tensors_of(second)]  # the lowest pages are taken first
    assert second.pages.num_idle == 2
    # Two pages are there and stay where they are; one page is empty, and another text gives one.
    second.generate(tiny.prompt(40, seed=8), SamplingParams(max_new_tokens=1))
    assert (second.pages.num_idle, second.pages.num_free) == (4, 5)
    assert second.load_session(tmp_path / "finished") == [*PROMPT, *job.completion.token_ids][:64]
    assert second.pages.num_idle == 5
    assert all(torch.equal(x, y[:2]) for x, y in zip(before, tensors_of(second), strict=True))
    assert second.generate(PROMPT, PARAMS) == job.completion
    # The end of a text is displaced before its beginning.
    second.load_session(tmp_path / "finished")
    second.generate(tiny.prompt(20, seed=8), SamplingParams(max_new_tokens=1))
    assert second.generate(PROMPT, PARAMS).cached_tokens == 32


def test_a_draft_model_reads_the_text_as_well(model: Model, tmp_path: Path) -> None:
    first = generator(model)
    first.generate(PROMPT, PARAMS)
    first.save_session(PROMPT, tmp_path / "session")
    second = generator(model, draft=DraftModel(model, 4), max_step_tokens=64)
    second.load_session(tmp_path / "session")
    out = second.generate(PROMPT, PARAMS)
    assert out == first.generate(PROMPT, PARAMS)
    assert out.cached_tokens == 32
    assert out.accepted_tokens == out.drafted_tokens > 10


def test_what_cannot_be_saved_or_loaded(model: Model, tmp_path: Path) -> None:
    gen = generator(model)
    gen.generate(PROMPT, PARAMS)
    with pytest.raises(ValueError, match="no page of these 45 tokens is in the pool"):
        gen.save_session(PROMPT[::-1], tmp_path / "session")
    with pytest.raises(OSError, match="cannot be written"):
        gen.save_session(PROMPT, tmp_path / "nowhere" / "session")
    gen.save_session(PROMPT, tmp_path / "session")
    small = generator(model, max_tokens=16)
    with pytest.raises(OutOfPages, match="session needs 2 pages: 2 pages wanted, 1 of 1 are free"):
        small.load_session(tmp_path / "session")
    assert small.pages.num_free == 1
    with pytest.raises(ValueError, match="needs Generator"):
        generator(model, prefix_cache=False).load_session(tmp_path / "session")
    gen.model = SimpleNamespace(comm=SimpleNamespace(size=2))
    with pytest.raises(UnsupportedError, match="one process holds the whole model"):
        gen.load_session(tmp_path / "session")


def test_another_model_format_or_page_size(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "session"
    generator(model).generate(PROMPT, PARAMS)
    gen = generator(model)
    gen.generate(PROMPT, PARAMS)
    gen.save_session(PROMPT, file)

    def refused(other: Generator) -> str:
        with pytest.raises(CheckpointError) as caught:
            other.load_session(file)
        assert other.pages.num_idle == 0
        assert str(file) in str(caught.value)
        return caught.value.problem

    assert "KV formats" in refused(generator(model, kv_format="q8"))
    assert refused(generator(model, page_size=32)) == "was saved with page size 16, here it is 32"
    tiny.save(tmp_path / "deep", "qwen3", head_dim=16, num_hidden_layers=3)
    deep = Model.load(tmp_path / "deep", device="cpu")
    assert "another model: num_layers 2, here 3" in refused(generator(deep))
    tiny.save(tmp_path / "twin", "qwen3", head_dim=16)
    twin = Model.load(tmp_path / "twin", device="cpu")
    assert generator(twin).load_session(file) == PROMPT[:32]
    tiny.edit(tmp_path / "twin", lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].mul_(1.001))
    other = Model.load(tmp_path / "twin", device="cpu")
    assert refused(generator(other)) == "was saved with another model: the sizes are the same, the weights are not"
    half = Model.load(tmp_path / "deep", device="cpu", dtype="bf16")
    assert "here" in refused(generator(half))


def damage(change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> Callable[[Path], None]:
    """Rewrite a file with other tensors or texts."""

    def rewrite(file: Path) -> None:
        with safe_open(file, framework="pt") as content:
            about = content.metadata()
            tensors = {name: content.get_tensor(name).clone() for name in content.keys()}  # noqa: SIM118
        change(tensors, about)
        save_file(tensors, file, metadata=about)

    return rewrite


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (Path.unlink, "is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "cannot be opened as safetensors"),
        (lambda file: file.write_bytes(b""), "cannot be opened as safetensors"),
        (lambda file: save_file({"x": torch.zeros(1)}, file), "is no session"),
        (damage(lambda tensors, _: tensors.pop("1.keys.codes")), "1.keys.codes: is missing, or of no use here"),
        (damage(lambda tensors, _: tensors.update(x=torch.zeros(1))), "x: is missing, or of no use here"),
        (
            damage(lambda tensors, _: tensors.update({"0.values.codes": tensors["0.values.codes"][:1].clone()})),
            r"0.values.codes: must be \[2, 2, 16, 16\] torch.float32, got \[1, 2",
        ),
        (
            damage(lambda tensors, _: tensors.update({"0.values.codes": tensors["0.values.codes"].half()})),
            r"got \[2, 2, 16, 16\] torch.float16",
        ),
        (damage(lambda tensors, _: tensors["token_ids"].fill_(199)), "must be whole pages of 16 ids below 199"),
        (damage(lambda tensors, _: tensors["token_ids"].fill_(-1)), "must be whole pages of 16 ids below 199"),
        (damage(lambda tensors, _: tensors.update(token_ids=tensors["token_ids"][:31].clone())), "got 31 ids"),
        (damage(lambda tensors, _: tensors.update(token_ids=torch.zeros(()))), "token_ids: must be a list of integers"),
        (damage(lambda tensors, _: tensors["places"].fill_(1)), r"must ascend within \[0, 2\), got \[1, 1\]"),
        (damage(lambda tensors, _: tensors["places"].add_(1)), r"must ascend within \[0, 2\), got \[1, 2\]"),
        (damage(lambda _, about: about.update(config="{")), "its config cannot be read"),
        (
            damage(lambda _, about: about.update({"qinfer session": "9"})),
            "was saved with qinfer session 9, here it is 1",
        ),
    ],
)
def test_damaged_files_are_refused(model: Model, tmp_path: Path, harm: Callable[[Path], object], problem: str) -> None:
    file = tmp_path / "session"
    gen = generator(model)
    gen.generate(PROMPT, SamplingParams(max_new_tokens=1))
    gen.save_session(PROMPT, file)
    harm(file)
    fresh = generator(model)
    with pytest.raises(CheckpointError, match=problem):
        fresh.load_session(file)
    assert (fresh.pages.num_idle, fresh.pages.num_used) == (0, 0)


def test_the_file_describes_itself(model: Model, tmp_path: Path) -> None:
    gen = generator(model, kv_format="q4")
    gen.generate(PROMPT, PARAMS)
    gen.save_session(PROMPT, tmp_path / "session")
    with safe_open(tmp_path / "session", framework="pt") as content:
        about = content.metadata()
        assert content.get_tensor("token_ids").tolist() == PROMPT[:32]
        assert list(content.get_tensor("1.keys.scales").shape) == [2, 2, 16]
    assert json.loads(about["config"])["num_layers"] == 2
    assert json.loads(about["KV formats"]) == [["q4", "q4"]] * 2
