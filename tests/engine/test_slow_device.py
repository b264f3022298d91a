"""A GPU that is always behind its host computes what one computes for which the host always waits.

The host fills buffers that the device will read, and reads what the device has written. In other tests small models are
done before anybody could notice that it was too early.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from qinfer.engine.draft_model import DraftModel
from qinfer.engine.generator import Generator
from qinfer.engine.job import Completion
from qinfer.engine.sampling import SamplingParams
from qinfer.engine.steps import StepRunner
from qinfer.models.model import Model
from tests.models import adapters, tiny

pytestmark = pytest.mark.gpu
BEHIND = 1 << 22  # cycles, two milliseconds, in front of every step and every choice

KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.9},
    {"temperature": 1, "top_k": 20, "top_p": 0.8},
    {"temperature": 0.7, "presence_penalty": 0.5, "typical": 0.9},
    {"temperature": 0, "logprobs": 3},
    {"temperature": 0.5, "prompt_logprobs": 2},
    {"temperature": 1, "mirostat_tau": 3.0},
    {"temperature": 0, "guidance_scale": 1.5, "negative_prompt": [3, 4, 5]},
]
PLAIN = KINDS[:3]  # whose choices are recorded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("slow")
    tiny.save(path / "model", "llama", dtype=torch.bfloat16)
    tiny.save(path / "draft", "llama", dtype=torch.bfloat16, num_hidden_layers=1)
    adapters.save(path / "lora", path / "model")
    return path


def texts(folder: Path, kinds: list[dict[str, Any]], prompt: int, options: dict[str, Any]) -> list[Completion]:
    """Serve requests that arrive while others run, with prompts of one to `prompt` tokens, by a new generator."""
    model = Model.load(folder / "model", device="cuda")
    loras = [None, model.load_lora(folder / "lora")] if options.pop("adapters", False) else [None]
    if options.get("draft") == "model":
        options["draft"] = DraftModel(Model.load(folder / "draft", device="cuda"), 3)
    sizes = {"max_tokens": 1024, "page_size": 16, "max_batch": 4, "max_step_tokens": 24}
    generator = Generator(model, **(sizes | options))
    random, jobs = Random(0), []
    for number, kind, lora in zip(range(10), cycle(kinds), cycle(loras), strict=False):
        # Some repeat themselves, so that there is something to guess, and some begin alike.
        ids = tiny.prompt(random.randrange(1, prompt // 2), seed=number % 4) * random.choice((1, 2))
        params = SamplingParams(seed=number, max_new_tokens=random.randrange(1, 30), ignore_eos=True, **kind)
        jobs.append(generator.submit(ids, params, lora=lora))
        for _ in range(random.randrange(8)):
            generator.step()
    while not all(job.finished for job in jobs):
        generator.step()
    assert all(job.completion.finish_reason == "length" for job in jobs)
    return [job.completion for job in jobs]


def interrupt(patch: pytest.MonkeyPatch, pause: Callable[[], None]) -> None:
    """Do something in front of every step and every choice."""
    for name in ("launch", "sample"):
        body = getattr(StepRunner, name)

        def paused(*given: Any, body: Callable[..., Any] = body) -> Any:
            pause()
            return body(*given)

        patch.setattr(StepRunner, name, paused)


@pytest.mark.parametrize(
    ("kinds", "prompt", "options"),
    [
        pytest.param(PLAIN, 200, {}, id="long prompts"),
        pytest.param(KINDS, 60, {}, id="all ways of sampling"),
        pytest.param(PLAIN[:1], 60, {"draft": 4}, id="drafts of the text"),
        pytest.param(PLAIN, 100, {"draft": "model"}, id="drafts of a model"),
        pytest.param(PLAIN, 100, {"max_tokens": 160}, id="few pages"),
        pytest.param(PLAIN, 100, {"adapters": True}, id="adapters"),
        pytest.param(PLAIN, 100, {"kv_format": "q4"}, id="coded pages"),
    ],
)
def test_a_device_that_is_behind_says_the_same(
    folder: Path, kinds: list[dict[str, Any]], prompt: int, options: dict[str, Any]
) -> None:
    pauses = torch.cuda.synchronize, lambda: torch.cuda._sleep(BEHIND)
    said = []
    for pause in pauses:
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, pause)
            said.append(texts(folder, kinds, prompt, dict(options)))
    assert said[0] == said[1]
