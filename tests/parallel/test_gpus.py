"""Ranks on GPUs of their own: sums through mailboxes and NCCL, and whole models.

A group takes seconds to start, so all checks of a number of ranks share one, and load their models into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qinfer.assets import STORYTELLER
from qinfer.engine.generator import Generator
from qinfer.engine.job import Completion
from qinfer.engine.sampling import SamplingParams
from qinfer.models.model import Model
from qinfer.parallel.comm import Group
from qinfer.parallel.peers import ONE_SHOT_BYTES
from qinfer.parallel.spawn import lead
from tests.compare import assert_close
from tests.models import tiny
from tests.parallel.ranks import check_collectives, check_large_sums, check_sums, keep
from tests.parallel.test_group import OBEY
from tests.parallel.test_shards import write

NUM_GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")]
IDS = tiny.prompt(200)
PROMPTS = ["Once upon a time", "The fox", "One day a little bear", "A girl named"]
PARAMS = (SamplingParams(temperature=0, max_new_tokens=60), SamplingParams(seed=3, max_new_tokens=40))


class Ranks:
    """A group that one test after the other uses."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._group: Group | None = None

    @contextmanager
    def group(self) -> Iterator[Group]:
        """The group, started when there is none; a test that fails ends it, for its ranks may have lost step."""
        if self._group is None:
            self._group = lead(OBEY, {}, [f"cuda:{index}" for index in range(self.size)])
        try:
            yield self._group
        except BaseException:
            self._group.fail("a test failed")
            self.close()
            raise

    @contextmanager
    def model(self, folder: Path, gpus: list[float]) -> Iterator[Model]:
        """A model that the ranks share."""
        options = {"gpus": gpus, "cache_tokens": 2000}
        with self.group() as group:
            group.tell({"do": "follow", "path": str(folder), "options": options})
            model = keep(Model.load(folder, parallel=group, **options))
            yield model
            group.tell({"do": "done"})

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Groups follow each other, so those behind the first also show that it has left nothing behind."""
    if request.param > NUM_GPUS:
        pytest.skip(f"needs {request.param} GPUs")
    ranks = Ranks(request.param)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("check", [check_collectives, check_sums, check_large_sums])
def test_collectives(ranks: Ranks, check: Callable[[Group], None]) -> None:
    with ranks.group() as group:
        assert group._mail is not None, "these GPUs cannot reach each other"
        assert group._mail.fits(1, ONE_SHOT_BYTES // 4)
        group.tell({"do": check.__name__})
        check(group)


@pytest.fixture(scope="module")
def expected() -> tuple[Tensor, list[list[Completion]]]:
    """Logits and texts of one GPU."""
    whole = Model.load(STORYTELLER)
    return whole.logits(IDS), texts(whole)


def texts(model: Model) -> list[list[Completion]]:
    generator = Generator(model, max_tokens=4096, max_batch=4)
    return [generator.generate(PROMPTS, params) for params in PARAMS]


@pytest.mark.parametrize("gpus", [[1.0] * 4, [0.03, 0.02, 0.03, 0.02]], ids=["equal", "unequal"])
def test_text_is_that_of_one_gpu(
    ranks: Ranks, gpus: list[float], expected: tuple[Tensor, list[list[Completion]]]
) -> None:
    with ranks.model(STORYTELLER, gpus[: ranks.size]) as model:
        # A few dozen roundings to 16 bits stand between the ids and the logits.
        assert_close(model.logits(IDS), expected[0], torch.bfloat16)
        assert texts(model) == expected[1]


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize("kind", ["gptq act-order", "exl2", "awq", "compressed-tensors"])
def test_every_way_of_cutting(tmp_path: Path, ranks: Ranks, kind: str) -> None:
    folder = write(tmp_path, kind)
    ids = tiny.prompt(40)
    with ranks.model(folder, [0.02, 0.01]) as model:
        assert_close(model.logits(ids), Model.load(folder).logits(ids), torch.bfloat16)
