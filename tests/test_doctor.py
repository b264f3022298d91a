"""The doctor agrees with loading: what it lets pass loads, and what it refuses is refused in the same words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from qinfer.__main__ import main
from qinfer.assets import STORYTELLER
from qinfer.errors import QinferError
from qinfer.models.model import Model
from qinfer.programs import doctor
from qinfer.programs.doctor import Kind, Report, examine
from qinfer.quant import FORMATS
from tests import hostile
from tests.models import tiny

Q = "model.layers.0.self_attn.q_proj"
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "dense": [{"dtype": torch.bfloat16}],
    "gptq": [{"bits": bits, "group_size": 32} for bits in (2, 3, 4, 8)] + [{"group_size": -1, "symmetric": False}],
    "awq": [{"group_size": 32}],
    "compressed-tensors": [{"bits": 4, "group_size": 32}, {"bits": 8, "group_size": -1}],
    "fp8": [{}],
    "exl2": [{"bits": {6: 0.5, 3: 0.5}, "group_size": 32}],
}


def write(source: Path, folder: Path, name: str, **options: Any) -> Path:
    """Write a version of a dense checkpoint whose linear layers are in one of FORMATS; functions get K."""
    packed: dict[str, Tensor] = {}
    settings = None
    for key, tensor in load_file(source / "model.safetensors").items():
        module = key.removesuffix(".weight")
        if not module.endswith(tiny.LINEARS):
            packed[key] = tensor
            continue
        chosen = {key: x(tensor.shape[1]) if callable(x) else x for key, x in options.items()}
        weight = FORMATS[name].quantize(tensor.float().t(), **chosen)
        packed |= {f"{module}.{suffix}": x.contiguous() for suffix, x in weight.tensors().items()}
        settings = weight.quant_config
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    save_file(packed, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "llama"
    tiny.save(path, "llama")
    return path


@pytest.fixture(params=[0, 64 << 10], ids=["stand-ins", "small tensors"])
def small_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tiny models have no large matrices: without this nothing would be stood in for."""
    monkeypatch.setattr(doctor, "SMALL_BYTES", request.param)
    return int(request.param)


def loading_problem(folder: Path) -> str | None:
    try:
        Model.load(folder, device="cpu")
    except (QinferError, ValueError) as problem:
        return str(problem)
    return None


def text_of(report: Report) -> str:
    console = Console(width=200, highlight=False, markup=False, no_color=True)
    with console.capture() as capture:
        doctor.show(report, console)
    return capture.get()


@pytest.mark.parametrize(("name", "options"), [(name, o) for name in FORMATS for o in OPTIONS[name]])
def test_every_format_is_described(
    tmp_path: Path, dense: Path, small_bytes: int, name: str, options: dict[str, Any]
) -> None:
    folder = write(dense, tmp_path / "model", name, **options)
    report = examine(folder)
    assert loading_problem(folder) is None
    assert report.refused == []
    assert not [line for line in report.unused if line.startswith(("1", "files"))]
    counts = {kind: count for kind, count in report.kinds.items() if kind.format == name}
    assert sum(counts.values()) == (15 if name == "dense" else 14)
    kind = next(iter(counts))
    assert kind.act_order is False
    if "bits" in options:
        assert kind.bits == ("mixed" if name == "exl2" else str(options["bits"]))
    if "group_size" in options and name != "exl2":
        assert kind.group_size == ("all of K" if options["group_size"] == -1 else str(options["group_size"]))
    stored = {key: x for key, x in load_file(folder / "model.safetensors").items() if ".layers." in key}
    expected = sum(x.nbytes for key, x in stored.items() if "norm" not in key)
    head = 199 * 64 * 4 if name == "dense" else 0
    assert sum(report.nbytes[kind] for kind in counts) == expected + head


def test_formats_are_all_covered() -> None:
    assert OPTIONS.keys() == FORMATS.keys()


@pytest.mark.parametrize(
    ("name", "option"), [("gptq", "act_order"), ("compressed-tensors", "act_order"), ("exl2", "permutation")]
)
def test_act_order_is_seen(tmp_path: Path, dense: Path, small_bytes: int, name: str, option: str) -> None:
    report = examine(write(dense, tmp_path / "model", name, group_size=32, **{option: torch.randperm}))
    assert report.refused == []
    assert sum(count for kind, count in report.kinds.items() if kind.act_order) == 14


def test_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(STORYTELLER)]) == 0
    out = capsys.readouterr().out
    for text in ("llama, 6 layers", "2048 tokens, no chat template", "gptq", "head tied", "can be loaded"):
        assert text in out
    assert "refused" not in out
    assert out.rstrip().endswith("can be loaded")
    report = examine(STORYTELLER)
    assert report.kinds == {Kind("gptq", "4", "32", act_order=False): 42}
    model = Model.load(STORYTELLER, device="cpu")
    assert f"{model.decoder.num_parameters / 1e6:,.1f} million" in dict(report.facts)["parameters"]


BREAKAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": hostile.truncate_shard,
    "missing file": hostile.remove_shard,
    "huge header": hostile.swell_header,
    "outside": lambda f: hostile.remap(f, f"{Q}.weight", "../x.safetensors"),
    "no config": lambda f: (f / "config.json").unlink(),
    "bad json": lambda f: (f / "config.json").write_text("{"),
    "family": lambda f: hostile.edit_json(f, "config.json", model_type="bert"),
    "no sizes": lambda f: hostile.edit_json(f, "config.json", hidden_size=hostile.REMOVE),
    "rope": lambda f: hostile.edit_json(f, "config.json", rope_scaling={"rope_type": "longrope"}),
    "method": lambda f: hostile.edit_json(f, "config.json", quantization_config={"quant_method": "hqq"}),
    "missing tensor": lambda f: hostile.edit_tensor(f, f"{Q}.weight", lambda x: None),
    "missing norm": lambda f: hostile.edit_tensor(f, "model.norm.weight", lambda x: None),
    "shape": lambda f: hostile.edit_tensor(f, f"{Q}.weight", lambda x: x[:-1].clone()),
    "dtype": lambda f: hostile.edit_tensor(f, "model.embed_tokens.weight", lambda x: x.to(torch.int32)),
    "norm of NaN": lambda f: hostile.edit_tensor(f, "model.norm.weight", lambda x: x * float("nan")),
    "tokenizer": lambda f: (f / "tokenizer.json").write_text("{}"),
    "wider": lambda f: hostile.edit_json(f, "config.json", intermediate_size=64),
    "fewer layers": lambda f: hostile.edit_json(f, "config.json", num_hidden_layers=1),
    "biases": lambda f: hostile.edit_json(f, "config.json", attention_bias=True),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_what_loading_refuses_the_doctor_refuses(tmp_path: Path, name: str, small_bytes: int) -> None:
    folder = hostile.write_llama(tmp_path, shards=2)
    assert loading_problem(folder) is None
    assert examine(folder).refused == []
    BREAKAGES[name](folder)
    problem, report = loading_problem(folder), examine(folder)
    assert problem is not None
    # Loading stops at the first leftover and counts the others.
    assert problem.split("; 8 more are left over")[0] in report.refused
    assert "cannot be loaded" in text_of(report)
    assert main(["doctor", str(folder)]) == 1


def settings(**changes: Any) -> Callable[[Path], None]:
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32, **changes}
    return lambda folder: tiny.edit_config(folder, quantization_config=quantization)


QUANTIZED: dict[str, Callable[[Path], Any]] = {
    "bits": settings(bits=7),
    "other bits": settings(bits=8),
    "group size": settings(group_size=7),
    "layout": settings(checkpoint_format="marlin"),
    "overrides": settings(dynamic={"(": {"bits": 4}}),
    "no config": lambda f: tiny.edit_config(f, quantization_config=None),
    "no zeros": lambda f: tiny.edit(f, lambda t: dict.pop(t, f"{Q}.qzeros")),
    "scales": lambda f: tiny.edit(f, lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].double()})),
    "no order": lambda f: tiny.edit(f, lambda t: dict.pop(t, f"{Q}.g_idx")),
    "groups": lambda f: tiny.edit(f, lambda t: t[f"{Q}.g_idx"].fill_(77)),
    "bias": lambda f: tiny.edit(f, lambda t: t.update({f"{Q}.bias": torch.ones(64)})),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_what_loading_refuses_of_a_quantized_model(tmp_path: Path, dense: Path, name: str, small_bytes: int) -> None:
    folder = write(dense, tmp_path / "model", "gptq", group_size=32, act_order=torch.randperm)
    assert examine(folder).refused == []
    QUANTIZED[name](folder)
    problem = loading_problem(folder)
    assert problem is not None
    assert problem in examine(folder).refused


def test_everything_that_is_wrong_is_named(tmp_path: Path) -> None:
    folder = hostile.write_llama(tmp_path)
    hostile.edit_tensor(folder, f"{Q}.weight", lambda x: None)
    hostile.edit_tensor(folder, "model.norm.weight", lambda x: x[:5].clone())
    tiny.edit(folder, lambda tensors: tensors.update({"model.layers.0.odd.weight": torch.zeros(3)}))
    (folder / "tokenizer.json").write_text("{}")
    report = examine(folder)
    assert len(report.refused) == 4
    for text in (f"{Q}.weight", "model.norm.weight", "model.layers.0.odd.weight", "tokenizer.json"):
        assert sum(text in problem for problem in report.refused) == 1, text
    assert "cannot be loaded: 4 problems" in text_of(report)


def test_one_unknown_method_is_one_problem(tmp_path: Path) -> None:
    folder = hostile.write_llama(tmp_path, quantization_config={"quant_method": "hqq", "nbits": 4})
    assert len(examine(folder).refused) == 1


def test_many_problems_are_cut(tmp_path: Path) -> None:
    folder = hostile.write_llama(tmp_path)
    tiny.edit(folder, lambda t: t.update({f"model.odd.{i}": torch.zeros(3) for i in range(30)}))
    text = text_of(examine(folder))
    assert text.count("refused:") == doctor.SHOWN + 1
    assert "refused: 10 more" in text
    assert "cannot be loaded: 30 problems" in text


def test_what_has_no_effect_is_listed(tmp_path: Path) -> None:
    folder = hostile.write_llama(tmp_path, use_cache=True, attention_dropout=0.0, rope_theta=5e5)
    tiny.edit(folder, lambda t: t.update({"vision.weight": torch.zeros(3)}))
    (folder / "pytorch_model.bin").write_bytes(b"")
    report = examine(folder)
    assert report.refused == []
    fields, tensors, files = sorted(report.unused, key=lambda line: ["config", "1 tens", "files:"].index(line[:6]))
    assert fields == "config.json: architectures, attention_dropout, use_cache"
    assert "vision.weight" in tensors
    assert files == "files: pytorch_model.bin"


def test_what_changes_the_model_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "qwen3"
    tiny.save(folder, "qwen3", head_dim=32, use_sliding_window=True, sliding_window=64, max_window_layers=1)
    facts = dict(examine(folder).facts)
    assert "windows of 64" in facts["context"]
    assert facts["traits"] == "norms of q and k"
    assert facts["attention"] == "4 heads of 32, 2 for keys and values"
    tiny.save(tmp_path / "qwen2", "qwen2", tie_word_embeddings=True)
    assert dict(examine(tmp_path / "qwen2").facts)["traits"] == "biases on q, k, v, head tied to the embedding"
    tiny.save(tmp_path / "yarn", "llama", rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert "linear rope by 4" in dict(examine(tmp_path / "yarn").facts)["context"]


def test_a_template_that_refuses_is_a_warning(tmp_path: Path) -> None:
    folder = hostile.write_llama(tmp_path, vocab_size=2048)
    hostile.edit_tensor(folder, "model.embed_tokens.weight", lambda x: torch.zeros(2048, 32))
    hostile.edit_tensor(folder, "lm_head.weight", lambda x: torch.zeros(2048, 32))
    (folder / "tokenizer.json").write_bytes((STORYTELLER / "tokenizer.json").read_bytes())
    template = "{{ raise_exception('no system message') }}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    report = examine(folder)
    assert report.refused == []
    assert "with chat template" in dict(report.facts)["tokenizer"]
    assert "no system message" in report.warnings[0]
    assert "will not work: " in text_of(report)


def test_matrices_are_not_read(tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(dense, tmp_path / "model", "gptq", group_size=32)
    monkeypatch.setattr(doctor, "SMALL_BYTES", 0)
    read: list[tuple[int, ...]] = []
    plain = doctor.Checkpoint.read

    def recorded(self: Any, name: str, device: Any = "cpu") -> Tensor:
        read.append(self.shape(name))
        return plain(self, name, device)

    monkeypatch.setattr(doctor.Checkpoint, "read", recorded)
    assert examine(folder).refused == []
    assert read
    assert all(len(shape) < 2 for shape in read)


def test_a_huge_context_costs_nothing(tmp_path: Path) -> None:
    folder = hostile.write_llama(tmp_path, max_position_embeddings=2**31 - 1)
    assert examine(folder).refused == []


def test_names_from_files_cannot_steer_the_terminal(tmp_path: Path) -> None:
    folder = hostile.write_llama(tmp_path)
    tiny.edit(folder, lambda t: t.update({"model.\x1b[2J\r": torch.zeros(3)}))
    text = text_of(examine(folder))
    assert "model.\\x1b[2J\\r" in text
    assert "\x1b" not in text


def test_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "/nowhere"]) == 1
    assert "must be a folder" in capsys.readouterr().err
