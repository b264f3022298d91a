"""A rank on a GPU of its own that is gone: the others say so soon, and no GPU waits for it for ever.

Not in `test_gpus.py`, whose group is open until its last test: a process belongs to one group at a time.
"""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from qinfer.assets import STORYTELLER
from qinfer.engine.generator import Generator
from qinfer.engine.sampling import SamplingParams
from qinfer.errors import GroupError
from qinfer.models.model import Model
from qinfer.parallel.comm import Group
from qinfer.parallel.link import Limits
from qinfer.parallel.spawn import Children, lead
from tests.parallel.test_group import OBEY, catch_children, fails

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


@pytest.mark.parametrize("kind", ["reduce", "reduce parts"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_gpu_that_waits_for_a_rank_that_is_gone_is_freed(kind: str, number: signal.Signals) -> None:
    processes: list[Children] = []
    limits = Limits(silence=2.0)
    group = lead(OBEY, {}, ["cuda:0", "cuda:1"], limits=limits, started=processes.append)
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


def test_a_rank_is_killed_while_it_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that Model.load starts itself."""
    children = catch_children(monkeypatch)
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
