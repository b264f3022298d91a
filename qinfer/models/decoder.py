"""The decoder: tokens of a step in, logits of the wanted rows out, keys and values left in the cache.

The residual stream is fp32 whatever the dtype of the activations. A layer does not add its result to the residual; it
hands it on as a delta, which the next norm adds while it reads the row anyway.

    residual [T, C] fp32 · delta [S, T, C] fp32, a product in parts over K (`matmul_parts`), or bf16 (`sum_dtype`)
    normalized rows and everything between two norms in the decoder's dtype
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qinfer.cache.paged import PagedKVCache
from qinfer.checkpoint import Checkpoint
from qinfer.kernels.gather import gather_rows
from qinfer.kernels.operand import DenseOperand
from qinfer.kernels.parts import add_up
from qinfer.models.architectures import NameMap, name_map
from qinfer.models.batch import Batch
from qinfer.models.config import ModelConfig
from qinfer.models.experts import SparseMLP, build_experts
from qinfer.models.invariant import make_invariant
from qinfer.models.layers import Attention, Embedding, GatedMLP, HeadNorm, Linear, MergedLinear, RMSNorm, RopeTable
from qinfer.models.parameters import CheckpointParameters, Parameters
from qinfer.models.shards import Cutter, Idle, SomeRows
from qinfer.parallel.comm import Communicator
from qinfer.parallel.peers import ONE_SHOT_BYTES
from qinfer.parallel.plan import Plan, scaled_spans


@dataclass(frozen=True)
class Block:
    """Attention and MLP, each behind a norm of the residual and added to it."""

    attention_norm: RMSNorm
    attention: Attention | Idle
    mlp_norm: RMSNorm
    mlp: GatedMLP | SparseMLP | Idle
    comm: Communicator
    invariant: bool = False  # a row's result does not depend on the other rows

    def __call__(self, residual: Tensor, delta: Tensor | None, batch: Batch, cache: PagedKVCache) -> Tensor:
        """Run the block.

        Args:
            residual: [T, C] fp32, updated in place.
            delta: [S, T, C], what the block before has yet to add, in parts; None in front of the first.
            batch: where the tokens stand.
            cache: pages of all layers.

        Returns:
            [S, T, C], what this block has yet to add, in parts.
        """
        x = self.attention_norm(residual, delta)
        dtype = torch.float32 if self.invariant else sum_dtype(x, self.comm.size)
        mixed = self.attention(x, batch, cache, out_dtype=dtype)
        delta = self.comm.all_reduce_parts(mixed, in_order=self.invariant)
        x = self.mlp_norm(residual, delta)
        return self.comm.all_reduce_parts(self.mlp(x, batch, out_dtype=dtype), in_order=self.invariant)


@dataclass(frozen=True)
class Decoder:
    """Embedding, blocks and head; knows steps and pages, but no sequences."""

    embedding: Embedding | SomeRows
    blocks: tuple[Block, ...]
    norm: RMSNorm
    head: Linear | None  # None on a rank that computes no logits
    is_tied: bool  # the head has the embedding's values, whether or not it shares its memory
    comm: Communicator
    vocab_sizes: tuple[int, ...] | None = None  # logits that each rank computes; None: every rank all of them

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: ModelConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        comm: Communicator,
        plan: Plan | None = None,
        invariant: bool = False,
    ) -> Decoder:
        """Read a decoder, or this rank's share of one, from a checkpoint, one matrix after the other.

        Args:
            checkpoint: where the tensors are.
            config: what they must fit.
            device: where they go.
            dtype: dtype of the activations.
            comm: the ranks that share the model.
            plan: what each of them holds; None: this process holds everything.
            invariant: fix tiles and runs, so that a row does not depend on the others (models/invariant.py).

        Raises:
            CheckpointError: a tensor is missing, does not fit, or would be left over.
            UnsupportedError: a stored format is not served.
            PlanError: a matrix may not be cut where the plan says.
        """
        parameters = CheckpointParameters(checkpoint, device=device, dtype=dtype)
        decoder = cls.build(config, parameters, device=device, dtype=dtype, comm=comm, plan=plan)
        parameters.check_leftovers(root(config))
        return make_invariant(decoder) if invariant else decoder

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        parameters: Parameters,
        *,
        device: torch.device,
        dtype: torch.dtype,
        comm: Communicator,
        plan: Plan | None = None,
    ) -> Decoder:
        """Wire a decoder, or this rank's share of one, from parameters on `device` for activations of `dtype`."""
        names, cutter = name_map(config), Cutter(parameters, plan, comm)
        vocab_size, hidden = config.vocab_size, config.hidden_size
        rope = RopeTable.build(config.rope, max_positions=config.max_positions, device=device)
        vocab = cutter.spans("vocab", vocab_size)
        embedding = cutter.embedding(names.embed, (vocab_size, hidden), vocab)
        blocks = tuple(
            _build_block(config, index, cutter, rope=rope, dtype=dtype) for index in range(config.num_layers)
        )
        if config.tied_embeddings:
            table = embedding.table
            head = Linear(DenseOperand(table.to(dtype))) if table.shape[0] else None
        else:
            head = cutter.columns(names.head, (hidden, vocab_size), vocab, has_bias=False)
        weight = parameters.tensor(f"{names.final_norm}.weight", (hidden,))
        return cls(
            embedding=embedding,
            blocks=blocks,
            norm=RMSNorm(weight, config.norm_eps, dtype, None if head is None else head.order),
            head=head,
            is_tied=config.tied_embeddings,
            comm=comm,
            vocab_sizes=None if plan is None else tuple(stop - start for start, stop in vocab),
        )

    def __call__(self, batch: Batch, cache: PagedKVCache) -> Tensor:
        """Run one step.

        Args:
            batch: R of its T tokens want logits.
            cache: pages that the batch names; keys and values of the new tokens are written to them.

        Returns:
            [R, V] fp32, logits of the tokens `batch.logit_rows`.
        """
        residual = self.embedding(batch.token_ids)
        delta: Tensor | None = None
        for block in self.blocks:
            delta = block(residual, delta, batch, cache)
        num_rows = batch.logit_rows.shape[0]
        if num_rows == 0:
            return residual.new_empty(0, self._num_logits)
        # One token per sequence, and as many rows: all of them in order. Rooms of other steps repeat rows as padding.
        if num_rows != residual.shape[0] or batch.max_query_len > 1:
            residual = gather_rows(residual, batch.logit_rows)
            if delta is not None:
                delta = torch.stack([gather_rows(part, batch.logit_rows) for part in delta])
        if self.head is None:
            logits = residual.new_empty(num_rows, 0)
        else:
            logits = self.head(self.norm(residual, delta), out_dtype=torch.float32)
        return self.comm.all_gather(logits, 1, self.vocab_sizes)

    def residuals(self, batch: Batch, cache: PagedKVCache, layers: Collection[int]) -> dict[int, Tensor]:
        """Run one step as far as it is asked for, and return the residual stream instead of logits.

        Args:
            batch: T tokens.
            cache: pages that the batch names; keys and values of the blocks that run are written to them.
            layers: numbers of blocks, 0 to all.

        Returns:
            Number of blocks -> [T, C] fp32, the sum of the embedding and of what so many blocks have added to it.
        """
        residual = self.embedding(batch.token_ids)
        found = {0: residual.clone()} if 0 in layers else {}
        delta: Tensor | None = None
        for number, block in enumerate(self.blocks[: max(layers)], 1):
            delta = block(residual, delta, batch, cache)
            if number in layers:
                found[number] = residual + add_up(delta)
        return found

    def linears(self) -> Iterator[Linear]:
        """Yield every matrix that a step multiplies by, the head last."""
        for block in self.blocks:
            yield from block.attention.linears()
            yield from block.mlp.linears()
        if self.head is not None:
            yield self.head

    def tensors(self) -> Iterator[Tensor]:
        """Yield every parameter that is not part of a matrix product: the embedding and the norms."""
        yield self.embedding.table
        for block in self.blocks:
            yield from (block.attention_norm.weight, block.mlp_norm.weight)
            yield from block.attention.tensors()
        yield self.norm.weight

    @property
    def num_parameters(self) -> int:
        """Number of logical parameters on this rank; a tied head counts once."""
        total = sum(linear.num_parameters for linear in self.linears()) + sum(x.numel() for x in self.tensors())
        return total - (self.head.num_parameters if self.is_tied and self.head is not None else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters on this rank; a head that shares the embedding's memory counts once."""
        total = sum(linear.nbytes for linear in self.linears()) + sum(tensor.nbytes for tensor in self.tensors())
        operand = None if self.head is None else self.head.operand
        shares = isinstance(operand, DenseOperand) and operand.weight.data_ptr() == self.embedding.table.data_ptr()
        return total - (operand.nbytes if operand is not None and shares else 0)

    @property
    def _num_logits(self) -> int:
        """Columns of the result of a step."""
        if self.vocab_sizes is not None:
            return sum(self.vocab_sizes)
        assert self.head is not None
        return self.head.operand.out_features


def sum_dtype(x: Tensor, num_ranks: int) -> torch.dtype:
    """Return the dtype in which ranks exchange what a layer adds to the residual, for its normalized input x [T, C].

    Sums that mailboxes could take are short and stay fp32. Between activations of 16 bits, larger ones are rounded to
    bf16, which halves the time that they travel. Not to fp16, even for fp16 activations: what enters the residual
    exceeds 65504 in some models, and a sum over ranks of numbers that do not may.
    """
    is_small = num_ranks == 1 or 4 * x.numel() <= ONE_SHOT_BYTES
    return torch.float32 if is_small or x.dtype == torch.float32 else torch.bfloat16


def root(config: ModelConfig) -> str:
    """Return what the names of a decoder's tensors begin with.

    A bias or a norm below it that nobody read would change the results without a word; beside it are other things.
    """
    return name_map(config).embed.partition(".")[0] + "."


def _build_block(config: ModelConfig, index: int, cutter: Cutter, *, rope: RopeTable, dtype: torch.dtype) -> Block:
    """Wire one block: each norm writes in the order of the projection behind it."""
    names, hidden, parameters = name_map(config).layer(index), config.hidden_size, cutter.parameters
    attention, attention_order = _build_attention(config, index, names, cutter, rope)
    mlp, mlp_order = _build_mlp(config, index, names, cutter)

    def norm(name: str, order: Tensor | None) -> RMSNorm:
        return RMSNorm(parameters.tensor(f"{name}.weight", (hidden,)), config.norm_eps, dtype, order)

    return Block(
        attention_norm=norm(names.input_norm, attention_order),
        attention=attention,
        mlp_norm=norm(names.post_attention_norm, mlp_order),
        mlp=mlp,
        comm=cutter.comm,
    )


def _build_mlp(
    config: ModelConfig, index: int, names: NameMap, cutter: Cutter
) -> tuple[GatedMLP | SparseMLP | Idle, Tensor | None]:
    """Wire the MLP or the experts of one block, and return them with the order of their input."""
    hidden, width = config.hidden_size, config.mlp_size
    if config.experts is not None and config.has_experts(index):
        return build_experts(config.experts, hidden, names, cutter), None
    spans = scaled_spans(cutter.spans("mlp", config.cut_mlp_size), width)
    gate_and_up = [
        cutter.columns(name, (hidden, width), spans, has_bias=config.mlp_bias)
        for name in (names.gate_proj, names.up_proj)
    ]
    down = cutter.output(names.down_proj, (width, hidden), spans, has_bias=config.mlp_bias)
    gate_up = _merge(gate_and_up)
    return (Idle(down), None) if gate_up is None else (GatedMLP(gate_up, down), gate_up.order)


def _build_attention(
    config: ModelConfig, index: int, names: NameMap, cutter: Cutter, rope: RopeTable
) -> tuple[Attention | Idle, Tensor | None]:
    """Wire the attention of one block, and return it with the order of its input."""
    hidden, head_dim = config.hidden_size, config.head_dim
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
    q_spans = cutter.spans("q_heads", q_size, unit=head_dim)
    kv_spans = cutter.spans("kv_heads", kv_size, unit=head_dim)

    qkv = _merge(
        [
            cutter.columns(name, (hidden, width), spans, has_bias=config.qkv_bias)
            for name, width, spans in (
                (names.q_proj, q_size, q_spans),
                (names.k_proj, kv_size, kv_spans),
                (names.v_proj, kv_size, kv_spans),
            )
        ]
    )
    out = cutter.output(names.o_proj, (q_size, hidden), q_spans, has_bias=config.o_bias)
    norm = None
    if config.qk_norm:
        tensor, shape = cutter.parameters.tensor, (head_dim,)
        norm = HeadNorm(
            tensor(f"{names.q_norm}.weight", shape), tensor(f"{names.k_norm}.weight", shape), config.norm_eps
        )
    if qkv is None:
        return Idle(out), None
    attention = Attention(
        layer=index,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        window=config.windows[index],
        qkv=qkv,
        out=out,
        rope=rope,
        norm=norm,
    )
    return attention, qkv.order


def _merge(parts: Sequence[Linear | None]) -> MergedLinear | None:
    """Merge the products of one activation; None on a rank that has none of their columns."""
    held = [part for part in parts if part is not None]
    return MergedLinear.of(held) if held else None
