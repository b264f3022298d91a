"""`python -m qinfer.bench` without arguments: one screen about the device at hand."""

from __future__ import annotations

import argparse

import torch

from qinfer.assets import STORYTELLER
from qinfer.bench.measure import environment, read_bandwidth
from qinfer.bench.model import time_steps
from qinfer.bench.report import emit
from qinfer.bench.synthetic import PRESETS
from qinfer.engine.generator import Generator
from qinfer.engine.sampling import SamplingParams
from qinfer.kernels.device import arch, default_device, num_sms
from qinfer.models.model import Model


def run(options: argparse.Namespace) -> int:
    """Print the device, what it reads per second, what that allows, and the speed of the bundled model."""
    del options
    device = default_device()
    bandwidth = read_bandwidth(device)
    result: dict[str, object] = {**environment(device), "arch": arch(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        result["multiprocessors"] = num_sms(device)
        result["memory_gb"] = properties.total_memory / 1e9
    result["read_bandwidth_gb_s"] = bandwidth
    # 4.25 bits per weight, every weight read once per token: no engine decodes faster than this at batch 1.
    for name in ("llama-3.1-8b", "llama-3.3-70b"):
        config = PRESETS[name]
        attention = config.hidden_size * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
        block = attention + 3 * config.hidden_size * config.mlp_size
        weights = config.num_layers * block + config.vocab_size * config.hidden_size
        result[f"roof_{name}_4bit_tokens_per_second"] = bandwidth * 1e9 / (weights * 4.25 / 8)
    model = Model.load(STORYTELLER, device=device)
    generator = Generator(model, max_tokens=1024, max_batch=1)
    params = SamplingParams(temperature=0.0, max_new_tokens=64, ignore_eos=True)
    steps = time_steps(generator, [generator.submit("Once upon a time", params)], most=64)
    result["storyteller_tokens_per_second"] = 1e3 / steps.median
    emit(result, None)
    return 0
