"""How large a model is and how much memory there is: the numbers from which a Plan is made."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qinfer.checkpoint import Checkpoint
from qinfer.models.architectures import name_map
from qinfer.models.config import ModelConfig
from qinfer.models.decoder import Decoder
from qinfer.parallel.comm import Group
from qinfer.parallel.plan import Plan, Sizes
from qinfer.quant.exl2 import HELD_PER_STORED


def sizes_of(checkpoint: Checkpoint, config: ModelConfig) -> Sizes:
    """Add up the parts of a model as they are held at most, by what is stored; only headers are read.

    Raises:
        CheckpointError: a file is damaged.
        UnsupportedError: torch has no dtype for a tensor.
    """
    names = name_map(config)
    layers = [names.layer(index) for index in range(config.num_layers)]
    attention = [name for layer in layers for name in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)]
    mlp = [name for layer in layers for name in (layer.gate_proj, layer.up_proj, layer.down_proj)]
    num_experts = 0 if config.experts is None else config.experts.num_experts
    mlp += [name for layer in layers for expert in range(num_experts) for name in layer.expert(expert)]
    # Like norms, routers are on every GPU.
    norms = [name for layer in layers for name in (layer.input_norm, layer.post_attention_norm, layer.router)]
    stored: dict[str, int] = {}
    for name in checkpoint.names():
        module, _, field = name.rpartition(".")
        size = math.prod(checkpoint.shape(name)) * checkpoint.dtype(name).itemsize
        stored[module] = stored.get(module, 0) + math.ceil(size * HELD_PER_STORED.get(field, 1.0))

    def total(modules: Sequence[str]) -> int:
        return sum(stored.get(module, 0) for module in modules)

    return Sizes(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        mlp_size=config.cut_mlp_size,
        vocab_size=config.vocab_size,
        attention_bytes=total(attention),
        mlp_bytes=total(mlp),
        vocab_bytes=total([names.embed] if config.tied_embeddings else [names.embed, names.head]),
        norm_bytes=total([*norms, names.final_norm]),
    )


def loaded_sizes(config: ModelConfig, decoder: Decoder) -> Sizes:
    """Add up the parts of a decoder that one process holds, as they are in memory."""
    blocks = decoder.blocks
    head = 0 if decoder.head is None or config.tied_embeddings else decoder.head.nbytes
    return Sizes(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        mlp_size=config.cut_mlp_size,
        vocab_size=config.vocab_size,
        attention_bytes=sum(linear.nbytes for block in blocks for linear in block.attention.linears()),
        mlp_bytes=sum(linear.nbytes for block in blocks for linear in block.mlp.linears()),
        vocab_bytes=decoder.embedding.table.nbytes + head,
        norm_bytes=sum(tensor.nbytes for tensor in decoder.tensors()) - decoder.embedding.table.nbytes,
    )


def place(sizes: Sizes, gpus: Sequence[float] | None, group: Group | None, cache_tokens: int) -> Plan:
    """Make the plan for GPUs of given sizes, or of those that the group finds.

    Raises:
        PlanError: the model does not fit, or there are not as many ranks as GPUs.
    """
    found = group.free_memory() if gpus is None and group is not None else gpus or ()
    plan = Plan.make(sizes, found, cache_tokens=cache_tokens)
    plan.check_ranks(None if group is None else group.size)
    return plan
