"""`python -m qinfer.bench serve`: many requests on one generator, as their clients feel it."""

from __future__ import annotations

import argparse
import random
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING

import torch

from qinfer.bench.measure import Times, environment
from qinfer.bench.report import emit
from qinfer.bench.synthetic import add_source, describe_source, synthetic_model
from qinfer.engine.generator import Generator
from qinfer.engine.job import Event, Job
from qinfer.engine.sampling import SamplingParams
from qinfer.kernels.device import default_device
from qinfer.models.model import Model

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_parser(programs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command line of this benchmark."""
    parser = programs.add_parser("serve", help="latency and throughput of many requests at once")
    add_source(parser)
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--clients", type=int, default=16, help="clients that each ask again when answered; default: 16")
    load.add_argument("--rate", type=float, help="requests per second, at random times, instead of clients")
    parser.add_argument("--requests", type=int, default=128, help="requests in all; default: 128")
    for name, low, high in (("--prompt-tokens", 64, 1024), ("--new-tokens", 32, 256)):
        told = f"drawn evenly; default: {low} {high}"
        parser.add_argument(name, type=int, nargs=2, metavar=("MIN", "MAX"), default=(low, high), help=told)
    parser.add_argument("--shared-prefix", type=int, default=0, help="tokens with which all prompts begin; default: 0")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0")
    parser.add_argument("--max-batch", type=int, default=64, help="requests that run at a time; default: 64")
    parser.add_argument("--max-tokens", type=int, help="tokens in the page pool; default: what max-batch may need")
    parser.add_argument("--draft-tokens", type=int, default=0, help="guessed from the text per step; default: 0, none")
    parser.add_argument("--kv-format", default="fp16", help="of the cache; default: fp16")
    parser.add_argument("--device", help="cuda or cpu")
    parser.add_argument("--json", metavar="FILE", help="append the result to FILE as a line of JSON")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Request:
    """What one client asks, and when: seconds after the start, or None as soon as a client is free."""

    prompt: list[int]
    new_tokens: int
    arrival: float | None


@dataclass
class Trace:
    """When the tokens of one request came, in seconds after the start."""

    arrival: float
    job: Job
    times: list[float] = field(default_factory=list)
    num_tokens: int = 0

    def record(self, event: Event, now: float) -> None:
        """Note what an event brought."""
        if event.token_ids:
            self.times.append(now)
            self.num_tokens += len(event.token_ids)

    @property
    def first_ms(self) -> float:
        """Milliseconds from the arrival to the first token."""
        return (self.times[0] - self.arrival) * 1e3

    @property
    def per_token_ms(self) -> float:
        """Milliseconds per token after the first."""
        return (self.times[-1] - self.times[0]) / (self.num_tokens - 1) * 1e3

    @property
    def gaps_ms(self) -> list[float]:
        """Milliseconds between one event with tokens and the next."""
        return [(after - before) * 1e3 for before, after in zip(self.times, self.times[1:], strict=False)]


@dataclass(frozen=True)
class Step:
    """How long a step took, and how much of that the host worked instead of waiting for the device."""

    ms: float
    host_ms: float
    is_mixed: bool  # with pieces of prompts or drafts beside streams, or alone


def run(options: argparse.Namespace) -> int:
    """Measure, print and write."""
    device = torch.device(options.device) if options.device else default_device()
    if options.model:
        model = Model.load(options.model, device=device)
    else:
        model = synthetic_model(options.preset, options.weights, device, head=options.head)
    plan = _plan(options, model.config.vocab_size)
    longest = max(len(request.prompt) + request.new_tokens for request in plan)
    generator = Generator(
        model,
        kv_format=options.kv_format,
        max_tokens=options.max_tokens or options.max_batch * (-(-longest // 256) * 256),
        max_batch=options.max_batch,
        draft=options.draft_tokens,
    )
    start = time.perf_counter()
    if device.type == "cuda":
        generator.warm_up()
    warm_up_s = time.perf_counter() - start
    clients = None if options.rate else options.clients
    traces, steps, wall_s = serve(generator, plan, clients=clients, temperature=options.temperature)
    result = {
        "bench": "serve",
        **describe_source(options),
        "kv_format": options.kv_format,
        "clients": clients,
        "rate": options.rate,
        "requests": options.requests,
        "prompt_tokens": list(options.prompt_tokens),
        "new_tokens": list(options.new_tokens),
        "shared_prefix": options.shared_prefix,
        "temperature": options.temperature,
        "max_batch": options.max_batch,
        "draft_tokens": options.draft_tokens,
        "max_tokens": generator.pages.num_pages * generator.pages.page_size,
        "warm_up_s": warm_up_s,
        **step_summary(steps),
        **summary(traces, wall_s),
        **environment(device),
    }
    emit(result, options.json)
    return 0


def _plan(options: argparse.Namespace, vocab_size: int) -> list[Request]:
    """Draw the requests: the same ones for the same options."""
    for name in ("prompt_tokens", "new_tokens"):
        low, high = getattr(options, name)
        if not 1 <= low <= high:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 <= MIN <= MAX, got {low} {high}")
    for name in ("clients", "requests", "max_batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.rate is not None and options.rate <= 0:
        raise ValueError(f"--rate must be above 0, got {options.rate}")
    rng = random.Random(0)
    prefix = [rng.randrange(vocab_size) for _ in range(options.shared_prefix)]
    plan, now = [], 0.0
    for _ in range(options.requests):
        if options.rate is not None:
            now += rng.expovariate(options.rate)
        prompt = prefix + [rng.randrange(vocab_size) for _ in range(rng.randint(*options.prompt_tokens))]
        arrival = None if options.rate is None else now
        plan.append(Request(prompt, rng.randint(*options.new_tokens), arrival))
    return plan


def serve(
    generator: Generator, plan: Iterable[Request], *, clients: int | None, temperature: float
) -> tuple[list[Trace], list[Step], float]:
    """Run a plan and return what each request met, every step, and the seconds of all."""
    waiting = deque(plan)
    open_traces: dict[int, Trace] = {}
    traces: list[Trace] = []
    steps: list[Step] = []
    start = time.perf_counter()
    while waiting or open_traces:
        now = time.perf_counter() - start
        while waiting and (len(open_traces) < (clients or 0) if clients else (waiting[0].arrival or 0.0) <= now):
            request = waiting.popleft()
            params = SamplingParams(
                temperature=temperature, seed=len(traces), max_new_tokens=request.new_tokens, ignore_eos=True
            )
            job = generator.submit(request.prompt, params)
            open_traces[job.id] = trace = Trace(now if request.arrival is None else request.arrival, job)
            traces.append(trace)
        if not open_traces:
            time.sleep(max(0.0, (waiting[0].arrival or 0.0) - now))
            continue
        waited, began = generator.seconds_waited, time.perf_counter()
        events = generator.step()
        ended = time.perf_counter()
        worked = ended - began - (generator.seconds_waited - waited)
        steps.append(Step((ended - began) * 1e3, worked * 1e3, generator.runner.is_mixed))
        for event in events:
            open_traces[event.job].record(event, ended - start)
            if event.error is not None:
                raise event.error
            if event.completion is not None:
                del open_traces[event.job]
    return traces, steps, time.perf_counter() - start


def step_summary(steps: Sequence[Step]) -> dict[str, object]:
    """Return the figures of steps in milliseconds, those of streams alone and those with pieces of prompts apart."""
    figures: dict[str, object] = {
        "steps": len(steps),
        "step_ms": quantiles([step.ms for step in steps]),
        "host_ms_per_step": fmean(step.host_ms for step in steps),
    }
    for name, is_mixed in (("decode", False), ("mixed", True)):
        some = [step for step in steps if step.is_mixed == is_mixed]
        if some:
            figures[f"{name}_steps"] = len(some)
            figures[f"{name}_step_ms"] = quantiles([step.ms for step in some])
            figures[f"host_ms_per_{name}_step"] = fmean(step.host_ms for step in some)
            figures[f"{name}_host_ms"] = quantiles([step.host_ms for step in some])
    return figures


def summary(traces: Sequence[Trace], wall_s: float) -> dict[str, object]:
    """Return the figures of a run: TTFT, TPOT and ITL are in milliseconds."""
    completions = [trace.job.completion for trace in traces if trace.job.completion is not None]
    tokens = sum(trace.num_tokens for trace in traces)
    return {
        "wall_s": wall_s,
        "output_tokens_per_second": tokens / wall_s,
        "total_tokens_per_second": (tokens + sum(out.prompt_tokens for out in completions)) / wall_s,
        "requests_per_second": len(traces) / wall_s,
        "ttft_ms": quantiles([trace.first_ms for trace in traces]),
        "tpot_ms": quantiles([trace.per_token_ms for trace in traces if trace.num_tokens > 1]),
        "itl_ms": quantiles([gap for trace in traces for gap in trace.gaps_ms]),
        **_prefix_summary(traces),
        "cached_tokens": sum(out.cached_tokens for out in completions),
        "drafted_tokens": sum(out.drafted_tokens for out in completions),
        "accepted_tokens": sum(out.accepted_tokens for out in completions),
        "preemptions": sum(trace.job.sequence.num_preempted for trace in traces),
    }


def _prefix_summary(traces: Sequence[Trace]) -> dict[str, object]:
    """Return TTFT of requests that found nothing in the pool and of those that found their beginning, milliseconds."""
    warm, cold = ([t.first_ms for t in traces if bool(t.job.sequence.cached_tokens) == w] for w in (True, False))
    figures: dict[str, object] = {"cold_ttft_ms": quantiles(cold), "warm_ttft_ms": quantiles(warm)}
    if cold and warm:
        figures["warm_to_cold_ttft"] = median(warm) / median(cold)
    return figures


def quantiles(milliseconds: Sequence[float]) -> dict[str, float]:
    """Return p50, p90 and p99; nothing of nothing."""
    times = Times(tuple(milliseconds))
    return {f"p{q}": times.quantile(q / 100) for q in (50, 90, 99)} if milliseconds else {}
