from random import Random

from qinfer.bench.serve import Request, serve, step_summary, summary
from tests.engine.mock import MockModel, generator


def requests(count: int, prefix: int) -> list[Request]:
    random, shared = Random(1), [3] * prefix
    return [Request([*shared, *(random.randrange(9) for _ in range(5))], 6, None) for _ in range(count)]


def test_steps_of_streams_and_of_prompts_are_told_apart() -> None:
    gen = generator(MockModel(), max_tokens=200)
    traces, steps, wall_s = serve(gen, requests(6, 0), clients=2, temperature=0.0)
    told = step_summary(steps)
    assert told["decode_steps"] + told["mixed_steps"] == told["steps"] == len(steps)
    assert told["decode_steps"] > 6
    assert told["mixed_steps"] >= 3
    assert all(0 < step.host_ms <= step.ms for step in steps)
    mean = sum(step.host_ms for step in steps) / len(steps)
    assert abs(told["host_ms_per_step"] - mean) < 1e-9
    figures = summary(traces, wall_s)
    assert figures["warm_ttft_ms"] == {}
    assert figures["cold_ttft_ms"]["p50"] > 0


def test_time_to_the_first_token_is_told_with_and_without_a_known_beginning() -> None:
    gen = generator(MockModel(), max_tokens=200)
    figures = summary(*serve(gen, requests(4, 12), clients=1, temperature=0.0)[::2])
    assert figures["cached_tokens"] == 3 * 12
    assert figures["cold_ttft_ms"].keys() == figures["warm_ttft_ms"].keys() == {"p50", "p90", "p99"}
    ratio = figures["warm_ttft_ms"]["p50"] / figures["cold_ttft_ms"]["p50"]
    assert abs(figures["warm_to_cold_ttft"] - ratio) < 1e-9
