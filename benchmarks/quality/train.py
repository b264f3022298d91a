"""Train a Llama of 113 M parameters on the Python source of this machine, for measurements of quality.

    python benchmarks/quality/train.py --out DIR [--minutes 8] [--compile]
    python benchmarks/quality/train.py --out DIR --tiny

Tokenizer and texts come first, then a loop of so many minutes in bf16 on one GPU; the learning rate and the length of
rows follow the clock: 2,048 tokens, and 8,192 in the last third. About a fifth of the rows of every step hold the task
of `retrieval.py`, functions that stand several times (`needles.py`). DIR becomes an ordinary Hugging Face folder with
held_out.json beside the weights, which `kv_formats.py` and `retrieval.py` read. What interrupts it loses a minute: the
same command goes on from DIR/state.pt. `--tiny` makes a model that knows nothing, in a minute of a CPU, to see that all
of this works.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from needles import Planter
from source import END, files, ids_of, save_tokenizer, train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SAVE_EVERY_S = 60.0
LONG_FROM = 2 / 3  # of the time
PLANTED = 3 / 16  # of the rows of a step; of 8 long ones, 2


@dataclass(frozen=True)
class Plan:
    """The sizes of a model and of its training."""

    vocab_size: int = 16384
    hidden_size: int = 768
    num_layers: int = 16
    num_heads: int = 12
    num_kv_heads: int = 4
    mlp_size: int = 2048
    row: int = 2048
    long_row: int = 8192
    step_tokens: int = 65536
    steps: int = 1_000_000  # at most
    source_bytes: int = 400_000_000

    def config(self) -> LlamaConfig:
        """Return the model's."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.mlp_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            max_position_embeddings=self.long_row,
            rope_theta=100_000.0,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )


TINY = Plan(1024, 64, 2, 2, 1, 192, row=128, long_row=512, step_tokens=1024, steps=60, source_bytes=1_500_000)


def rate_at(progress: float) -> float:
    """Return the share of the highest learning rate at a share of the time: a ramp, then half a cosine."""
    return min(progress / 0.03, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


@dataclass(frozen=True)
class Texts:
    """What the rows of a step are cut from, and what is planted into some of them."""

    ids: Tensor  # [n] of all texts, end to end
    planter: Planter
    seed: int

    def rows(self, plan: Plan, progress: float, step: int) -> Tensor:
        """Return [rows, tokens + 1] of a step: places and plants that depend on the step alone."""
        length, seed = plan.long_row if progress > LONG_FROM else plan.row, self.seed * 1_000_003 + step
        count = max(1, plan.step_tokens // length)
        starts = torch.randint(len(self.ids) - length, (count,), generator=torch.Generator().manual_seed(seed))
        rows = self.ids[(starts[:, None] + torch.arange(length + 1)).to(self.ids.device)].long()
        rng, planted = random.Random(seed), round(PLANTED * count)
        if planted:
            plants = [self.planter.plant(row, rng) for row in rows[:planted].tolist()]
            rows[:planted] = torch.tensor(plants).to(rows.device)
        return rows


def loss_of(network: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Return the mean cross-entropy of rows [B, tokens + 1], each token predicted from those before it."""
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.is_cuda):
        logits = network(input_ids=rows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@dataclass
class Run:
    """What training has come to, and goes on from."""

    network: LlamaForCausalLM
    optimizer: torch.optim.AdamW
    step: int = 0
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)

    def save(self, file: Path) -> None:
        """Write everything; a file that is half written never stands under its name."""
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"step": self.step, "seconds": self.seconds, "log": self.log}, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)

    def resume(self, file: Path) -> None:
        """Go on from what `save` wrote, if it did."""
        if file.is_file():
            state = torch.load(file, map_location="cpu", weights_only=True)
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]
            print(f"going on from step {self.step}, {self.seconds:.0f} s")


def train(run: Run, texts: Texts, plan: Plan, args: argparse.Namespace) -> None:
    """Run the loop until its time or its steps are over."""
    step_of: Any = torch.compile(loss_of) if args.compile else loss_of
    total, saved = args.minutes * 60, run.seconds
    while run.seconds < total and run.step < plan.steps:
        start = time.perf_counter()
        progress = max(run.seconds / total, run.step / plan.steps)
        for group in run.optimizer.param_groups:
            group["lr"] = args.lr * rate_at(progress + 1e-3)
        loss = step_of(run.network, texts.rows(plan, progress, run.step))
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.network.parameters(), 1.0)
        run.optimizer.step()
        if run.step % 20 == 0:
            run.log.append({"step": run.step, "seconds": round(run.seconds, 1), "loss": loss.item()})
            print(f"step {run.step:6}  {run.seconds:6.0f} s  loss {run.log[-1]['loss']:.4f}", flush=True)
        elif texts.ids.is_cuda:
            torch.cuda.synchronize()
        run.step += 1
        run.seconds += time.perf_counter() - start
        if run.seconds - saved > SAVE_EVERY_S:
            saved = run.seconds
            run.save(args.out / "state.pt")
    run.save(args.out / "state.pt")


@torch.no_grad()
def held_out_loss(network: LlamaForCausalLM, ids: Tensor, length: int, count: int) -> float:
    """Return the mean cross-entropy of the first held-out rows."""
    starts = range(0, min(len(ids) - length - 1, count * length), length)
    return sum(loss_of(network, ids[i : i + length + 1][None].long()).item() for i in starts) / len(starts)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, and for what it goes on from")
    parser.add_argument("--minutes", type=float, default=8.0, help="of the loop; texts and tokenizer come on top")
    parser.add_argument("--source", type=Path, action="append", default=[], help="folder; default: this Python's")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the step")
    parser.add_argument("--tiny", action="store_true", help="a model that learns next to nothing, in a minute of a CPU")
    return parser.parse_args()


def main() -> None:
    """Train, and write the folder."""
    args, begin = parse(), time.perf_counter()
    plan = TINY if args.tiny else Plan()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    texts, held_out = files(args.source, plan.source_bytes)
    if (args.out / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(texts, plan.vocab_size)
        save_tokenizer(tokenizer, args.out)
    (args.out / "held_out.json").write_text(json.dumps(held_out))
    ids, unseen = (ids_of(tokenizer, part).to(args.device) for part in (texts, held_out))
    print(f"{len(ids):,} tokens to train on, {len(unseen):,} held out; {time.perf_counter() - begin:.0f} s", flush=True)
    network = LlamaForCausalLM(plan.config()).to(args.device)
    groups = [
        {"params": [p for p in network.parameters() if (p.dim() == 2) is is_matrix], "weight_decay": 0.1 * is_matrix}
        for is_matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=args.device == "cuda")
    run = Run(network, optimizer)
    run.resume(args.out / "state.pt")
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    train(run, Texts(ids, Planter.of(encode, tokenizer.get_vocab()), args.seed), plan, args)
    loss = held_out_loss(network, unseen, plan.row, 32)
    num_parameters = sum(p.numel() for p in network.parameters())
    network.to(torch.bfloat16).save_pretrained(args.out)
    log = {
        "parameters": num_parameters,
        "steps": run.step,
        "seconds": run.seconds,
        "planted": PLANTED,
        "held_out_loss": loss,
    }
    (args.out / "training_log.json").write_text(json.dumps(log | {"end": END, "log": run.log}, indent=1))
    print(f"{num_parameters / 1e6:.1f} M parameters, held-out loss {loss:.4f}, perplexity {math.exp(loss):.2f}")


if __name__ == "__main__":
    main()
