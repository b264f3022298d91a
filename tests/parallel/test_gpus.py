"""Ranks on GPUs of their own: sums through mailboxes and NCCL, whole models, and a rank that is gone."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from qinfer.assets import STORYTELLER
from qinfer.engine.generator import Generator
from qinfer.engine.sampling import SamplingParams
from qinfer.errors import GroupError
from qinfer.models.model import Model
from qinfer.parallel.comm import Group
from qinfer.parallel.link import Limits
from qinfer.parallel.peers import ONE_SHOT_BYTES
from qinfer.parallel.spawn import Children, lead
from tests.compare import assert_close
from tests.models import tiny
from tests.parallel.ranks import check_collectives, check_sums
from tests.parallel.test_group import OBEY, catch_children, fails
from tests.parallel.test_shards import write

NUM_GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")]


def devices(size: int) -> list[str]:
    if size > NUM_GPUS:
        pytest.skip(f"needs {size} GPUs")
    return [f"cuda:{index}" for index in range(size)]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_collectives(size: int) -> None:
    """Twice, because the second group of a process must not meet what the first one left."""
    for _ in range(2):
        group = lead(OBEY, {}, devices(size))
        try:
            assert group._mail is not None, "these GPUs cannot reach each other"
            assert group._mail.fits(1, ONE_SHOT_BYTES // 4)
            group.tell({"do": "collectives"})
            check_collectives(group)
            group.tell({"do": "sums"})
            check_sums(group)
        finally:
            group.close()


@pytest.mark.parametrize("kind", ["reduce", "reduce parts"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_gpu_that_waits_for_a_rank_that_is_gone_is_freed(kind: str, number: signal.Signals) -> None:
    processes: list[Children] = []
    group = lead(OBEY, {}, devices(2), limits=Limits(silence=2.0), started=processes.append)
    try:
        call(group, kind)
        torch.cuda.synchronize()
        os.kill(processes[0].pids[0], number)
        time.sleep(0.05)
        with fails("rank 1 (ended unexpectedly|has not answered for 2 s)", within=10):
            call(group, kind)
            torch.cuda.synchronize()
            time.sleep(0.5)
            group.check()
    finally:
        group.close()


def call(group: Group, kind: str) -> None:
    try:
        group.tell({"do": kind})
    finally:
        if kind == "reduce":
            group.all_reduce(torch.zeros(1, device=group.device))
        else:
            group.all_reduce_parts(torch.zeros(1, 1, 8, device=group.device))


@pytest.mark.parametrize("gpus", [[1.0, 1.0], [0.03, 0.02], [1.0] * 3, [1.0] * 4], ids=str)
def test_text_is_that_of_one_gpu(gpus: list[float]) -> None:
    devices(len(gpus))
    whole = Model.load(STORYTELLER)
    model = Model.load(STORYTELLER, gpus=gpus, cache_tokens=2000)
    try:
        ids = tiny.prompt(200)
        # A few dozen roundings to 16 bits stand between the ids and the logits.
        assert_close(model.logits(ids), whole.logits(ids), torch.bfloat16)
        ours, theirs = (Generator(m, max_tokens=4096, max_batch=4) for m in (model, whole))
        prompts = ["Once upon a time", "The fox", "One day a little bear", "A girl named"]
        for params in (SamplingParams(temperature=0, max_new_tokens=60), SamplingParams(seed=3, max_new_tokens=40)):
            assert ours.generate(prompts, params) == theirs.generate(prompts, params)
    finally:
        model.close()


@pytest.mark.parametrize("kind", ["gptq act-order", "exl2", "awq", "compressed-tensors"])
def test_every_way_of_cutting(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path, kind)
    whole, model = Model.load(folder), Model.load(folder, gpus=[0.02, 0.01], cache_tokens=100)
    try:
        ids = tiny.prompt(40)
        assert_close(model.logits(ids), whole.logits(ids), torch.bfloat16)
    finally:
        model.close()


def test_a_rank_is_killed_while_it_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    children = catch_children(monkeypatch)
    devices(2)
    model = Model.load(STORYTELLER, gpus=[1.0, 1.0])
    generator = Generator(model, max_tokens=2048)
    stream = generator.stream("Once upon a time", SamplingParams(temperature=0, max_new_tokens=900, ignore_eos=True))
    for _ in range(20):
        next(stream)
    start = time.monotonic()
    os.kill(children[0].pids[0], signal.SIGKILL)
    with pytest.raises(GroupError, match="rank 1 ended unexpectedly"):
        list(stream)
    assert time.monotonic() - start < 10
    model.close()
