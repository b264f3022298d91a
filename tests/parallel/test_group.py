"""Ranks in processes of their own over gloo: collectives, whole models, and what happens when one of them fails."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import qinfer.models.model
from qinfer.__main__ import main
from qinfer.engine.generator import Generator
from qinfer.engine.sampling import SamplingParams
from qinfer.errors import GroupError, PlanError, UnsupportedError
from qinfer.models.model import Model
from qinfer.parallel.link import Limits
from qinfer.parallel.spawn import Children, join, lead
from tests.compare import assert_close, errors
from tests.models import adapters, tiny
from tests.parallel.ranks import check_collectives, check_large_sums
from tests.parallel.test_shards import write

OBEY = "tests.parallel.ranks:obey"
SHORT = Limits(silence=1.0)


@contextmanager
def fails(text: str, *, within: float) -> Iterator[None]:
    """A GroupError with this text, in bounded time."""
    start = time.monotonic()
    with pytest.raises(GroupError, match=text):
        yield
    assert time.monotonic() - start < within


def test_collectives_and_an_error_on_a_rank() -> None:
    group = lead(OBEY, {}, ["cpu"] * 3)
    try:
        group.tell({"do": "check_collectives"})
        check_collectives(group)
        group.tell({"do": "check_large_sums"})
        check_large_sums(group)
        with pytest.raises(ValueError, match="sizes must be of 3 ranks and 1 for rank 0"):
            group.all_gather(torch.zeros(1), 0, [2, 1, 1])
        with pytest.raises(UnsupportedError, match="close the other model first"):
            lead(OBEY, {}, ["cpu"])
        with fails("rank 2: ValueError: no more", within=5):
            group.tell({"do": "raise", "rank": 2, "text": "no more"})
            group.tell({"do": "reduce"})
            group.all_reduce(torch.zeros(1))
        with fails("rank 2: ValueError: no more", within=1):
            group.tell({"do": "reduce"})
    finally:
        group.close()
    assert not torch.distributed.is_initialized()


class Recording:
    """Stands for a CUDA graph: NCCL's end would wait for its own."""

    was_joined: bool | None = None

    def reset(self) -> None:
        self.was_joined = torch.distributed.is_initialized()


@pytest.mark.parametrize("reason", [None, "enough"])
def test_graphs_end_before_the_collectives(reason: str | None) -> None:
    group = lead(OBEY, {}, ["cpu"] * 2)
    graphs = [Recording(), Recording()]
    try:
        for graph in graphs:
            group.recorded(graph)
        if reason is not None:
            group.fail(reason)
    finally:
        group.close()
    assert [graph.was_joined for graph in graphs] == [True, True]
    assert not torch.distributed.is_initialized()


def test_a_stopped_rank_is_ended() -> None:
    processes: list[Children] = []
    group = lead(OBEY, {}, ["cpu"] * 2, limits=SHORT, started=processes.append)
    pids = processes[0].pids
    # Computing for longer than the silence that ends a group is no silence.
    group.tell({"do": "sleep", "seconds": 1.5})
    group.tell({"do": "reduce"})
    group.all_reduce(torch.zeros(1))
    os.kill(pids[0], signal.SIGSTOP)
    group.tell({"do": "reduce"})
    with fails("rank 1 has not answered for 1 s", within=5):
        group.all_reduce(torch.zeros(1))
    group.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("number", "text"), [(signal.SIGKILL, "rank 1 was ended by signal 9"), (signal.SIGSTOP, "rank 1 did not start")]
)
def test_a_rank_that_does_not_start(number: signal.Signals, text: str) -> None:
    def hit(children: Children) -> None:
        os.kill(children.pids[0], number)

    with fails(text, within=5):
        lead(OBEY, {}, ["cpu"] * 2, limits=Limits(arrival=1.0), started=hit)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("group"), "gptq act-order")


def catch_children(monkeypatch: pytest.MonkeyPatch) -> list[Children]:
    """Let Model.load tell which processes it starts."""
    caught: list[Children] = []

    def spy(*args: object, **options: object) -> object:
        return lead(*args, **options, started=caught.append)  # type: ignore[arg-type]

    monkeypatch.setattr(qinfer.models.model, "lead", spy)
    return caught


def test_every_rank_warms_up_also_one_without_heads(folder: Path) -> None:
    params, prompt = SamplingParams(temperature=0, max_new_tokens=3), tiny.prompt(9)
    expected = Generator(Model.load(folder, device="cpu"), max_tokens=64, page_size=16).generate(prompt, params)
    model = Model.load(folder, device="cpu", gpus=[0.02, 0.012, 0.003], cache_tokens=100)
    try:
        assert model.plan is not None
        assert any(start == stop for start, stop in (share.kv_heads for share in model.plan.shares))
        generator = Generator(model, max_tokens=64, page_size=16, max_step_tokens=16, max_batch=2)
        generator.warm_up()
        assert generator.generate(prompt, params) == expected
    finally:
        model.close()


def test_model_on_three_ranks(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, greedy and seeded text, streams left early, adapters; then a rank is killed while it decodes."""
    children = catch_children(monkeypatch)
    whole = Model.load(folder, device="cpu")
    model = Model.load(folder, device="cpu", gpus=[0.02, 0, 0.012, 0.01], cache_tokens=100)
    assert model.plan is not None
    assert [share.gpu for share in model.plan.shares] == [0, 2, 3]
    ids = tiny.prompt(40)
    assert_close(model.logits(ids), whole.logits(ids))
    for layer, state in model.hidden_states(ids, [0, 2]).items():
        assert_close(state, whole.hidden_states(ids, [layer])[layer])

    prompts = [tiny.prompt(length, seed=length) for length in (3, 30, 9, 1)]
    ours, theirs = (Generator(m, max_tokens=300, page_size=16, max_step_tokens=16, max_batch=3) for m in (model, whole))
    guidance = SamplingParams(temperature=0, max_new_tokens=6, guidance_scale=1.5, negative_prompt=prompts[0])
    for params in (guidance, SamplingParams(temperature=0, max_new_tokens=9), SamplingParams(seed=5, max_new_tokens=9)):
        assert ours.generate(prompts, params) == theirs.generate(prompts, params)
    stream = ours.stream(prompts[1], SamplingParams(max_new_tokens=20))
    next(stream)
    stream.close()
    # Every rank would draw other ids, and end its requests at other times, if those of rank 0 did not count.
    ends = tuple(range(0, tiny.VOCAB, 9))
    assert len(ours.generate(prompts * 2, SamplingParams(temperature=9.0, max_new_tokens=20, stop_ids=ends))) == 8
    del ours, stream
    again = Generator(model, max_tokens=300, page_size=16)
    assert again.generate(prompts, params) == theirs.generate(prompts, params)
    assert again.pages.num_used == 0

    adapters.save(tmp_path / "lora", folder)
    lora, same = (m.load_lora(tmp_path / "lora") for m in (model, whole))
    again.submit(prompts[0], params, lora=lora)
    again.step()
    again.submit(prompts[1], params, lora=lora)
    for sequence in [*again.scheduler.running, *again.scheduler.waiting]:
        again._jobs[sequence.id].cancel()
    # The others have not heard of it yet.
    model.unload_lora(lora)
    lora = model.load_lora(tmp_path / "lora")
    assert_close(model.logits(ids, lora=lora), whole.logits(ids, lora=same))
    loras = ([None, lora, lora, None], [None, same, same, None])
    assert again.generate(prompts, params, lora=loras[0]) == theirs.generate(prompts, params, lora=loras[1])

    os.kill(children[0].pids[1], signal.SIGKILL)
    with fails("rank 2 ended unexpectedly", within=10):
        again.generate(prompts[0], SamplingParams(temperature=0, max_new_tokens=200))
    with fails("rank 2 ended unexpectedly", within=1):
        model.logits(ids)
    model.close()
    model.close()


def test_rounded_sums_add_less_than_activations_of_16_bits(tmp_path: Path) -> None:
    """A step of 1,100 tokens, whose sums travel in bf16, and one of 1,000, whose sums do not."""
    folder = write(tmp_path, "dense", max_position_embeddings=2048)
    ids = tiny.prompt(1100)
    exact, one = (Model.load(folder, device="cpu", dtype=dtype).logits(ids) for dtype in ("fp32", "bf16"))
    model = Model.load(folder, device="cpu", dtype="bf16", gpus=[0.02, 0.012, 0.01], cache_tokens=1200)
    try:
        large, small = model.logits(ids), model.logits(ids[:1000])
    finally:
        model.close()
    # Of the RMS of logits: rounded activations cost one rank 1.96 %, and three ranks 2.09 % with rounded sums.
    assert errors(large, exact)[1] < 1.25 * errors(one, exact)[1]
    assert errors(large, one)[1] > 2 * errors(small, one[:1000])[1]


def test_an_error_in_load_names_rank_and_cause(tmp_path: Path) -> None:
    folder = write(tmp_path, "dense")

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][500, 3] = torch.nan

    tiny.edit(folder, spoil)
    with fails(r"rank 1: CheckpointError: .*up_proj.weight: the tensor holds NaN", within=30):
        Model.load(folder, device="cpu", gpus=[0.01, 0.01])
    assert not torch.distributed.is_initialized()


def test_one_gpu_is_no_group(folder: Path) -> None:
    model = Model.load(folder, device="cpu", gpus=[1])
    assert (model.plan, model.comm.size) == (None, 1)
    with pytest.raises(PlanError, match="does not fit"):
        Model.load(folder, device="cpu", gpus=[1e-4, 1e-4], cache_tokens=0)


@pytest.fixture
def machines() -> Iterator[tuple[str, list[list[str]]]]:
    """Address of the first of two machines, and commands that run a program on each.

    They are network namespaces with a cable between them where root may make such, and else this machine twice.
    """
    names = [f"qinfer{os.getpid()}{side}" for side in "ab"]
    ends = [f"q{os.getpid() % 10**8}{side}" for side in "ab"]
    commands = [f"ip netns add {name}" for name in names]
    commands.append(f"ip link add {ends[0]} netns {names[0]} type veth peer name {ends[1]} netns {names[1]}")
    for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
        within = f"ip -n {name}"
        commands += [f"{within} addr add 10.77.0.{number}/24 dev {end}", f"{within} link set lo up"]
        commands.append(f"{within} link set {end} up")
    if os.geteuid() or shutil.which("ip") is None:
        commands = ["false"]
    try:
        # Stops at the first that fails.
        if any(subprocess.run(command.split(), capture_output=True).returncode for command in commands):
            yield "127.0.0.1", [["env"], ["env"]]
        else:
            enter = [["ip", "netns", "exec", name, "env"] for name in names]
            yield "10.77.0.1", [[*line, f"GLOO_SOCKET_IFNAME={end}"] for line, end in zip(enter, ends, strict=True)]
    finally:
        for name in names if len(commands) > 1 else ():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_torchrun_on_two_machines(machines: tuple[str, list[list[str]]], capsys: pytest.CaptureFixture[str]) -> None:
    """Each machine runs torchrun with one rank; only rank 0 prints, and what it prints is what one process prints."""
    program = ["generate", "Once upon a time", "-t", "0", "-n", "8", "--device", "cpu"]
    assert main(program) == 0
    address, enter = machines
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--master-addr", address, "--master-port", "29511"]
    nodes = [
        subprocess.Popen(
            [*line, *torchrun, "--node-rank", str(number), "-m", "qinfer", *program, "--tp", "--gpus", "0.02,0.01"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, line in enumerate(enter)
    ]
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert [out for out, _ in outputs] == [capsys.readouterr().out, ""]


def test_ranks_need_torchrun() -> None:
    with pytest.raises(UnsupportedError, match="torchrun"):
        join()
