"""Train the storyteller from nothing: stories, tokenizer, network, and a Hugging Face folder in fp16 at the end.

    python benchmarks/storyteller/train.py --minutes 3 --out DIR

The learning rate follows the clock (or --steps), so training ends on time on any machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from corpus import BEGIN, END, packed_rows, save_tokenizer, train_tokenizer
from grammar import HELD_OUT
from network import Network, Shape
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the log")
    parser.add_argument("--minutes", type=float, default=3.0, help="time for the training loop; stories come on top")
    parser.add_argument("--steps", type=int, default=1_000_000, help="stop after so many steps, should time be left")
    parser.add_argument("--stories", type=int, default=1_200_000)
    parser.add_argument("--eval-stories", type=int, default=1000)
    parser.add_argument("--tokenizer-stories", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=128, help="rows per step")
    parser.add_argument("--width", type=int, default=512, help="tokens per row")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    return parser.parse_args()


def rate_at(progress: float) -> float:
    """Return the share of the peak learning rate at a share of the time: a ramp, a plateau, a half-cosine down."""
    ramp, plateau = 0.02, 0.4
    if progress < ramp:
        return max(progress / ramp, 0.01)
    if progress < plateau:
        return 1.0
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min((progress - plateau) / (1 - plateau), 1.0)))


def optimizer_for(network: Network, args: argparse.Namespace) -> torch.optim.AdamW:
    """Make AdamW with weight decay on matrices only."""
    matrices = [p for p in network.parameters() if p.dim() == 2]
    vectors = [p for p in network.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=args.device == "cuda")


def loss_of(network: torch.nn.Module, rows: Tensor) -> Tensor:
    """Return the mean cross-entropy of rows [B, width + 1] of ids, each token predicted from those before it."""
    rows = rows.long()
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.is_cuda):
        logits = network(rows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(network: torch.nn.Module, rows: Tensor, batch: int) -> float:
    """Return the mean cross-entropy over the held-out rows."""
    parts = rows.split(batch)
    return sum(loss_of(network, part).item() * len(part) for part in parts) / len(rows)


def to_device(rows: np.ndarray, device: str) -> Tensor:
    """Move packed rows to the device as int16, which holds every id of a small vocabulary."""
    return torch.from_numpy(rows.astype(np.int16)).to(device)


def train(network: Network, rows: Tensor, held_out: Tensor, args: argparse.Namespace) -> list[dict[str, float]]:
    """Run the training loop until the time is up and return its log."""
    run = torch.compile(network) if args.compile else network
    optimizer = optimizer_for(network, args)
    generator = torch.Generator().manual_seed(args.seed)
    log: list[dict[str, float]] = []
    loss_of(run, rows[: args.batch]).backward()  # one step outside the clock: library start-up, compilation
    optimizer.zero_grad(set_to_none=True)
    budget, step, tokens, next_eval = args.minutes * 60, 0, 0, 0.0
    order, place = torch.empty(0, dtype=torch.long), 0
    start = time.perf_counter()
    while True:
        if step % 10 == 0 and args.device == "cuda":
            torch.cuda.synchronize()  # keeps the clock honest: the CPU must not run far ahead
        progress = max((time.perf_counter() - start) / budget, step / args.steps)
        if progress >= next_eval or progress >= 1.0:
            loss = held_out_loss(run, held_out, args.batch)
            seconds = time.perf_counter() - start
            entry = {"step": step, "tokens": tokens, "seconds": round(seconds, 1), "held_out_loss": round(loss, 4)}
            log.append({**entry, "held_out_perplexity": round(math.exp(loss), 4)})
            print(log[-1], flush=True)
            next_eval += 0.1 if progress >= 0.1 else 0.02
        if progress >= 1.0:
            return log
        if place + args.batch > len(order):
            order, place = torch.randperm(len(rows), generator=generator).to(args.device), 0
        picked = rows[order[place : place + args.batch]]
        place += args.batch
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate_at(progress)
        loss_of(run, picked).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + picked.shape[0] * (picked.shape[1] - 1)


def save(network: Network, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the network as a Hugging Face folder in fp16."""
    save_tokenizer(tokenizer, folder)
    begin, end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
    config = network.shape.config(begin, end)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": begin, "eos_token_id": end, "do_sample": True, "temperature": 0.8, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {f"model.{name}": value.detach().to("cpu", torch.float16) for name, value in network.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def sample(network: Network, tokenizer: Tokenizer, prompt: str, *, seed: int, temperature: float = 0.8) -> str:
    """Continue a prompt, recomputing everything for each token: a first look, not how one would serve it."""
    ids = tokenizer.encode(prompt).ids
    device = network.embed_tokens.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    end = tokenizer.token_to_id(END)
    for _ in range(320):
        logits = network(torch.tensor([ids], device=device))[0, -1].float() / temperature
        following = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        if following == end:
            break
        ids.append(following)
    return tokenizer.decode(ids)


def main() -> None:
    """Make the stories, train, save, and tell a few."""
    args = parse()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    tokenizer = train_tokenizer(args.tokenizer_stories)
    times = {"tokenizer": time.perf_counter() - begun}
    packing = {"width": args.width + 1, "workers": args.workers}
    rows = packed_rows(tokenizer, HELD_OUT, args.stories, **packing)
    held_out = packed_rows(tokenizer, 0, args.eval_stories, **packing)
    times["stories"] = time.perf_counter() - begun - times["tokenizer"]
    print(f"{rows.size:,} training tokens, {held_out.size:,} held out, seconds: {times}", flush=True)
    network = Network(Shape(vocab=tokenizer.get_vocab_size())).to(args.device)
    num_parameters = sum(p.numel() for p in network.parameters())
    log = train(network, to_device(rows, args.device), to_device(held_out, args.device), args)
    times["training"] = log[-1]["seconds"]
    save(network, tokenizer, args.out)
    told = {prompt: sample(network, tokenizer, prompt, seed=args.seed) for prompt in (
        "", "Once upon a time", "One day, a little fox", "There was once a girl named Mia")}  # fmt: skip
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    report = {"arguments": {k: str(v) for k, v in vars(args).items()}, "device": device, "torch": torch.__version__,
              "parameters": num_parameters, "training_tokens_made": int(rows.size), "seconds": times, "log": log,
              "samples": told}  # fmt: skip
    (args.out / "training_log.json").write_text(json.dumps(report, indent=2) + "\n")
    for text in told.values():
        print(f"\n{text}\n----")
    print(f"total {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
