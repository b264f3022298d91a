"""`python -m qinfer.bench model`: decode and prefill speed of a whole model, beside the memory roof of its device."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from qinfer.bench.engines import ENGINES, check_engines, measure_engine
from qinfer.bench.measure import Times, environment, read_bandwidth, synchronize, time_calls
from qinfer.bench.report import append, emit
from qinfer.bench.shares import Shares, kernel_shares, table
from qinfer.bench.synthetic import add_source, describe_source, synthetic_model, synthetic_sizes
from qinfer.engine.generator import Generator
from qinfer.engine.job import Job
from qinfer.engine.sampling import SamplingParams
from qinfer.errors import UnsupportedError
from qinfer.kernels.device import default_device
from qinfer.models.experts import SparseMLP
from qinfer.models.layers import Linear
from qinfer.models.model import Model
from qinfer.models.placement import place
from qinfer.parallel.comm import Group
from qinfer.parallel.spawn import join
from qinfer.programs.plan import gigabytes

if TYPE_CHECKING:
    from argparse import _SubParsersAction

PROFILED = 8  # steps
ROOM = 2 * PROFILED  # tokens for them, and for those on the way when the clock starts and stops


def add_parser(programs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command line of this benchmark."""
    parser = programs.add_parser("model", help="decode and prefill speed of a whole model")
    add_source(parser)
    told = "beside or instead of qinfer, may be repeated: " + ", ".join(ENGINES)
    parser.add_argument("--engine", choices=("qinfer", *ENGINES), action="append", metavar="NAME", help=told)
    parser.add_argument("--batch", type=int, default=1, help="sequences decoded at a time; default: 1")
    parser.add_argument("--context", type=int, default=512, help="tokens in front of the first new one; default: 512")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens decoded per sequence; default: 128")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of the prompt that is timed; default: 2048")
    parser.add_argument("--step-tokens", type=int, default=2048, help="most tokens of it in a step; default: 2048")
    parser.add_argument("--kv-format", default="fp16", help="of the cache; default: fp16")
    parser.add_argument("--profile", action="store_true", help="also tell what each kernel of a decode step costs")
    parser.add_argument("--device", help="cuda or cpu")
    parser.add_argument("--tp", action="store_true", help="be one of the ranks that torchrun has started")
    parser.add_argument("--gpus", type=gigabytes, metavar="GB,GB", help="with --tp: GB of each; default: what is free")
    parser.add_argument("--json", metavar="FILE", help="append the result to FILE as a line of JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure one engine after the other, print and write."""
    engines = list(dict.fromkeys(options.engine or ["qinfer"]))
    if engines != ["qinfer"]:
        check_engines(engines, options)
    group = join() if options.tp else None
    device = torch.device(options.device) if options.device else default_device()
    device = device if group is None else group.device
    if options.profile and (device.type != "cuda" or engines != ["qinfer"]):
        raise UnsupportedError("--profile needs a GPU, and tells the kernels of qinfer alone: leave it or --engine out")
    bandwidth = read_bandwidth(device)
    for engine in engines:
        # A function's locals hold the model, so the next engine finds the device empty.
        measured = _measure(options, device, group) if engine == "qinfer" else measure_engine(engine, options, device)
        steps, prefill, moved = measured["ms_per_step"], measured["prefill_ms"], measured["bytes_per_step"]
        kernels = measured.pop("kernels", None)
        result = {
            "bench": "model",
            "engine": engine,
            **describe_source(options),
            "ranks": 1 if group is None else group.size,
            "kv_format": options.kv_format,
            "batch": options.batch,
            "context": options.context,
            "new_tokens": options.new_tokens,
            "tokens_per_second": options.batch / steps["median"] * 1e3,
            "read_bandwidth_gb_s": bandwidth,
            "fraction_of_roof": None if moved is None else moved / bandwidth / steps["median"] / 1e6,
            "prefill_tokens_per_second": measured["prefill_tokens"] / prefill["median"] * 1e3,
            **measured,
            **environment(device),
        }
        # Every rank has run the same steps, and rank 0 tells of its own share.
        if group is None or group.rank == 0:
            emit(result, None)
            if kernels is not None:
                print(table(kernels))
            append(result if kernels is None else {**result, "kernels": kernels}, options.json)
    if group is not None:
        group.finish()
    return 0


def _measure(options: argparse.Namespace, device: torch.device, group: Group | None) -> dict[str, Any]:
    """Run qinfer, and return the fields that another engine measures too."""
    model = _load(options, device, group)
    prefill_tokens = min(options.prefill, model.config.max_positions - 1)
    # Before the decode steps, whose profiler may stay in the way of what runs after it.
    prefill = _prefill(model, prefill_tokens, options)
    steps, kernels = _decode(model, options)
    measured = {
        "plan": None if model.plan is None else str(model.plan).splitlines(),
        "ms_per_step": steps.asdict(),
        "bytes_per_step": _bytes_per_step(model, options),
        "flops_per_step": _flops_per_step(model, options),
        "prefill_tokens": prefill_tokens,
        "step_tokens": options.step_tokens,
        "prefill_ms": prefill.asdict(),
    }
    return measured if kernels is None else {**measured, "kernels": kernels}


def _load(options: argparse.Namespace, device: torch.device, group: Group | None) -> Model:
    """Load or make the model, or this rank's share of it."""
    room = options.batch * _longest(options)
    if options.model:
        return Model.load(options.model, device=device, gpus=options.gpus, cache_tokens=room, parallel=group)
    if group is None:
        return synthetic_model(options.preset, options.weights, device, head=options.head)
    sizes = synthetic_sizes(options.preset, options.weights, options.head)
    plan = place(sizes, options.gpus, group, room)
    return synthetic_model(options.preset, options.weights, device, head=options.head, plan=plan, comm=group)


def _longest(options: argparse.Namespace) -> int:
    """Return the tokens of the longest sequence: the first ones decode while the prompts of the others are computed."""
    meanwhile = (options.batch - 1) * -(-options.context // 256)
    longest: int = options.context + options.new_tokens + meanwhile + (ROOM if options.profile else 0)
    return longest


def _decode(model: Model, options: argparse.Namespace) -> tuple[Times, Shares | None]:
    """Time the steps of a generator that only decodes: scheduling, sampling and the transfer of ids included.

    The kernels of further steps are profiled afterwards, if that is asked for.
    """
    longest = _longest(options)
    pages = -(-longest // 256) * options.batch
    generator = Generator(
        model, kv_format=options.kv_format, max_tokens=pages * 256, max_batch=options.batch, page_size=256
    )
    params = SamplingParams(temperature=0.0, max_new_tokens=longest - options.context, ignore_eos=True)
    rng = random.Random(0)
    jobs = [
        generator.submit([rng.randrange(model.config.vocab_size) for _ in range(options.context)], params)
        for _ in range(options.batch)
    ]
    times = time_steps(generator, jobs, most=options.new_tokens)
    if not options.profile:
        return times, None
    return times, kernel_shares(generator.step, model.device, steps=PROFILED)


def time_steps(generator: Generator, jobs: Sequence[Job], *, most: int) -> Times:
    """Time at most so many steps in which all submitted requests decode, up to the first that ends one.

    A step returns when the ids of the one before are on the host; in between, the device does not pause.

    Raises:
        RuntimeError: a request ended before the first step that counts; its own error is the cause.
    """
    # Prompts are processed, and graphs recorded, before the clock counts.
    while any(len(job.sequence.generated) < 3 for job in jobs):
        generator.step()
        _check_running(jobs)
    synchronize(generator.model.device)
    generator.step()
    _check_running(jobs)
    samples = list[float]()
    while len(samples) < most and not any(job.finished for job in jobs):
        start = time.perf_counter()
        generator.step()
        samples.append((time.perf_counter() - start) * 1e3)
    return Times(tuple(samples))


def _check_running(jobs: Sequence[Job]) -> None:
    """Raise where a request ended before it was timed."""
    for job in jobs:
        if job.completion is not None:
            made = f"{len(job.sequence.generated)} tokens behind a prompt of {len(job.sequence.prompt)}"
            ended = f"request {job.id} ended after {made}, before it was timed: {job.completion.finish_reason}"
            raise RuntimeError(ended) from job.completion.error


def _bytes_per_step(model: Model, options: argparse.Namespace) -> int:
    """Count what a decode step must read.

    Every matrix and norm once, but of experts only those that the batch takes; per sequence one row of the embedding,
    and the cache at the middle of the contexts.
    """
    decoder = model.decoder
    weights: int = sum(linear.nbytes for linear in decoder.linears()) - _untaken_bytes(model, options.batch)
    table, *norms = decoder.tensors()
    cache = model.new_cache(1, kv_format=options.kv_format)
    middle = options.context + options.new_tokens // 2
    per_sequence: int = table.shape[1] * table.itemsize + middle * (cache.nbytes // cache.page_size)
    batch: int = options.batch
    return weights + sum(norm.nbytes for norm in norms) + batch * per_sequence


def _flops_per_step(model: Model, options: argparse.Namespace) -> int:
    """Count the multiplications and additions of a decode step: all matrices, and attention in the middle."""
    config = model.config
    products = _num_weights(model.decoder.linears())
    if config.experts is not None:
        taken = config.experts.per_token / config.experts.num_experts
        products -= int((1 - taken) * sum(_num_weights(mlp.expert_linears()) for mlp in _mixtures(model)))
    middle: int = options.context + options.new_tokens // 2
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * middle
    batch: int = options.batch
    return 2 * batch * (products + attention)


def _num_weights(linears: Iterable[Linear]) -> int:
    """Count the weights of some matrices."""
    return sum(linear.operand.in_features * linear.operand.out_features for linear in linears)


def _mixtures(model: Model) -> list[SparseMLP]:
    """Return the layers that have experts."""
    return [block.mlp for block in model.decoder.blocks if isinstance(block.mlp, SparseMLP)]


def _untaken_bytes(model: Model, batch: int) -> int:
    """Count the experts that no token of a step takes, on average over tokens that choose evenly."""
    config = model.config.experts
    if config is None:
        return 0
    stored = sum(linear.nbytes for mlp in _mixtures(model) for linear in mlp.expert_linears())
    return int(stored * (1 - config.per_token / config.num_experts) ** batch)


def _prefill(model: Model, tokens: int, options: argparse.Namespace) -> Times:
    """Time requests with a prompt of so many tokens, in the steps that serving takes."""
    generator = Generator(
        model,
        kv_format=options.kv_format,
        max_tokens=tokens + 1,
        max_batch=1,
        max_step_tokens=options.step_tokens,
        prefix_cache=False,
    )
    rng = random.Random(1)
    prompt = [rng.randrange(model.config.vocab_size) for _ in range(tokens)]
    return time_prompt(generator, prompt, repeats=10 if model.device.type == "cuda" else 3)


def time_prompt(generator: Generator, prompt: list[int], *, repeats: int) -> Times:
    """Time requests for one token behind a prompt, from its ids on the host to that token on the host.

    Raises:
        RuntimeError: a request ended otherwise; its own error is the cause.
    """
    params = SamplingParams(temperature=0.0, max_new_tokens=1, ignore_eos=True)

    def request() -> None:
        completion = generator.generate(prompt, params)
        if completion.finish_reason != "length":
            ended = f"the request with a prompt of {len(prompt)} tokens ended: {completion.finish_reason}"
            raise RuntimeError(ended) from completion.error

    return time_calls(request, generator.model.device, repeats=repeats)
