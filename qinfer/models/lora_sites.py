"""Where in a decoder adapters may add: its products, this rank's part of each, and the decoder with buffers there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qinfer.models.architectures import name_map
from qinfer.models.config import ModelConfig
from qinfer.models.decoder import Block, Decoder
from qinfer.models.layers import Attention, GatedMLP
from qinfer.models.lora_stack import LoraStack, Site
from qinfer.models.shards import Idle
from qinfer.parallel.plan import Share


def module_sizes(config: ModelConfig, decoder: Decoder) -> dict[str, tuple[int, int]]:
    """Return (K, N) of every module that an adapter may change, whether or not this rank has a part of it."""
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, mlp = config.hidden_size, config.mlp_size
    sizes: dict[str, tuple[int, int]] = {}
    for index, block in enumerate(decoder.blocks):
        names = name_map(config).layer(index)
        sizes |= {names.q_proj: (hidden, q_size), names.k_proj: (hidden, kv_size), names.v_proj: (hidden, kv_size)}
        sizes |= {names.o_proj: (q_size, hidden)}
        if isinstance(block.mlp, GatedMLP | Idle):
            sizes |= {names.gate_proj: (hidden, mlp), names.up_proj: (hidden, mlp), names.down_proj: (mlp, hidden)}
    return sizes


def sites(config: ModelConfig, decoder: Decoder, share: Share | None) -> dict[tuple[int, str], Site]:
    """Return this rank's products by layer and field of the layer; a rank without heads or columns has none there."""
    blocks = enumerate(decoder.blocks)
    return dict(site for index, block in blocks for site in _block_sites(config, index, block, share))


def _block_sites(
    config: ModelConfig, index: int, block: Block, share: Share | None
) -> Iterator[tuple[tuple[int, str], Site]]:
    """Yield the products of one block."""
    names, hidden, unit = name_map(config).layer(index), (0, config.hidden_size), config.head_dim
    q_heads, kv_heads, mlp = (0, config.num_heads), (0, config.num_kv_heads), (0, config.mlp_size)
    if share is not None:
        q_heads, kv_heads, mlp = share.q_heads, share.kv_heads, share.mlp
    q, kv = ((start * unit, stop * unit) for start, stop in (q_heads, kv_heads))
    if isinstance(attention := block.attention, Attention):
        modules = names.q_proj, names.k_proj, names.v_proj
        yield (index, "qkv_lora"), Site(modules, hidden, (q, kv, kv), attention.qkv.order)
        yield (index, "out_lora"), Site((names.o_proj,), q, (hidden,), attention.out.order)
    if isinstance(gated := block.mlp, GatedMLP):
        pair = names.gate_proj, names.up_proj
        yield (index, "gate_up_lora"), Site(pair, hidden, (mlp, mlp), gated.gate_up.order)
        yield (index, "down_lora"), Site((names.down_proj,), mlp, (hidden,), gated.down.order)


def with_stacks(decoder: Decoder, stacks: dict[tuple[int, str], LoraStack]) -> Decoder:
    """Return a decoder of the same layers that add what stands in the buffers."""
    blocks = []
    for index, block in enumerate(decoder.blocks):
        fields = {name: stack for (layer, name), stack in stacks.items() if layer == index}
        attention, mlp = block.attention, block.mlp
        if isinstance(attention, Attention):
            attention = replace(attention, qkv_lora=fields.get("qkv_lora"), out_lora=fields.get("out_lora"))
        if isinstance(mlp, GatedMLP):
            mlp = replace(mlp, gate_up_lora=fields.get("gate_up_lora"), down_lora=fields.get("down_lora"))
        blocks.append(replace(block, attention=attention, mlp=mlp))
    return replace(decoder, blocks=tuple(blocks))
