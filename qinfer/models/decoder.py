"""The decoder: tokens of a step in, logits of the wanted rows out, keys and values left in the cache.

The residual stream is fp32 whatever the dtype of the activations. A layer does not add its result to the residual; it
hands it on as a delta, which the next norm adds while it reads the row anyway.

    residual [T, C] fp32 · delta [S, T, C] fp32, a product in parts over K (`matmul_parts`)
    normalized rows and everything between two norms in the decoder's dtype
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qinfer.cache.paged import PagedKVCache
from qinfer.checkpoint import Checkpoint
from qinfer.errors import CheckpointError
from qinfer.kernels.gather import gather_rows
from qinfer.kernels.operand import DenseOperand
from qinfer.models.architectures import NameMap, name_map
from qinfer.models.batch import Batch
from qinfer.models.config import ModelConfig
from qinfer.models.layers import Attention, Embedding, GatedMLP, HeadNorm, Linear, MergedLinear, RMSNorm, RopeTable
from qinfer.parallel.comm import Communicator
from qinfer.quant import weight_class, without_padding
from qinfer.quant.weight import FLOATS, Weight, take

# Tables that old files store although they follow from the config.
_IGNORED = "rotary_emb.inv_freq"


class Parameters(Protocol):
    """Where a decoder gets its parameters: a checkpoint, or a generator of synthetic ones."""

    def linear(self, name: str, shape: tuple[int, int], *, has_bias: bool) -> Linear:
        """Return the matrix (K, N) of a module, ready to multiply."""
        ...

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a floating-point tensor that no matrix product reads: a norm's weight, the embedding."""
        ...


@dataclass(frozen=True)
class Block:
    """Attention and MLP, each behind a norm of the residual and added to it."""

    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP
    comm: Communicator

    def __call__(self, residual: Tensor, delta: Tensor | None, batch: Batch, cache: PagedKVCache) -> Tensor:
        """Run the block.

        Args:
            residual: [T, C] fp32, updated in place.
            delta: [S, T, C] fp32, what the block before has yet to add, in parts; None in front of the first.
            batch: where the tokens stand.
            cache: pages of all layers.

        Returns:
            [S, T, C] fp32, what this block has yet to add, in parts.
        """
        x = self.attention_norm(residual, delta)
        delta = self.comm.all_reduce(self.attention(x, batch, cache))
        x = self.mlp_norm(residual, delta)
        return self.comm.all_reduce(self.mlp(x))


@dataclass(frozen=True)
class Decoder:
    """Embedding, blocks and head; knows steps and pages, but no sequences."""

    embedding: Embedding
    blocks: tuple[Block, ...]
    norm: RMSNorm
    head: Linear
    is_tied: bool  # the head has the embedding's values, whether or not it shares its memory
    comm: Communicator

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: ModelConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        comm: Communicator,
    ) -> Decoder:
        """Read a decoder from a checkpoint, one matrix after the other.

        Args:
            checkpoint: where the tensors are.
            config: what they must fit.
            device: where they go.
            dtype: dtype of the activations.
            comm: the ranks that share the model.

        Raises:
            CheckpointError: a tensor is missing, does not fit, or would be left over.
            UnsupportedError: a stored format is not served.
        """
        parameters = CheckpointParameters(checkpoint, device=device, dtype=dtype)
        decoder = cls.build(config, parameters, device=device, dtype=dtype, comm=comm)
        parameters.check_leftovers(root(config))
        return decoder

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        parameters: Parameters,
        *,
        device: torch.device,
        dtype: torch.dtype,
        comm: Communicator,
    ) -> Decoder:
        """Wire a decoder from parameters on `device` for activations of `dtype`."""
        names = name_map(config)
        rope = RopeTable.build(config.rope, max_positions=config.max_positions, device=device)
        table = parameters.tensor(f"{names.embed}.weight", (config.vocab_size, config.hidden_size))
        blocks = tuple(
            _build_block(config, index, parameters, rope=rope, dtype=dtype, comm=comm)
            for index in range(config.num_layers)
        )
        if config.tied_embeddings:
            head = Linear(DenseOperand(table.to(dtype)))
        else:
            head = parameters.linear(names.head, (config.hidden_size, config.vocab_size), has_bias=False)
        weight = parameters.tensor(f"{names.final_norm}.weight", (config.hidden_size,))
        return cls(
            embedding=Embedding(table),
            blocks=blocks,
            norm=RMSNorm(weight, config.norm_eps, dtype, head.order),
            head=head,
            is_tied=config.tied_embeddings,
            comm=comm,
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
            return residual.new_empty(0, self.head.operand.out_features)
        # Rows ascend without repetition, so as many rows as tokens are all of them in order.
        if num_rows < residual.shape[0]:
            residual = gather_rows(residual, batch.logit_rows)
            if delta is not None:
                delta = torch.stack([gather_rows(part, batch.logit_rows) for part in delta])
        logits = self.head(self.norm(residual, delta), out_dtype=torch.float32)
        return self.comm.all_gather(logits, dim=1)

    def linears(self) -> Iterator[Linear]:
        """Yield every matrix that a step multiplies by, the head last."""
        for block in self.blocks:
            yield from block.attention.qkv.parts
            yield block.attention.out
            yield from block.mlp.gate_up.parts
            yield block.mlp.down
        yield self.head

    def tensors(self) -> Iterator[Tensor]:
        """Yield every parameter that is not part of a matrix product: the embedding and the norms."""
        yield self.embedding.table
        for block in self.blocks:
            head_norms = (block.attention.q_norm, block.attention.k_norm)
            yield from (block.attention_norm.weight, block.mlp_norm.weight)
            yield from (norm.weight for norm in head_norms if norm is not None)
        yield self.norm.weight

    @property
    def num_parameters(self) -> int:
        """Number of logical parameters on this rank; a tied head counts once."""
        total = sum(linear.num_parameters for linear in self.linears()) + sum(x.numel() for x in self.tensors())
        return total - (self.head.num_parameters if self.is_tied else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters on this rank; a head that shares the embedding's memory counts once."""
        operand = self.head.operand
        shares = isinstance(operand, DenseOperand) and operand.weight.data_ptr() == self.embedding.table.data_ptr()
        total = sum(linear.nbytes for linear in self.linears()) + sum(tensor.nbytes for tensor in self.tensors())
        return total - (operand.nbytes if shares else 0)


def root(config: ModelConfig) -> str:
    """Return what the names of a decoder's tensors begin with.

    A bias or a norm below it that nobody read would change the results without a word; beside it are other things.
    """
    return name_map(config).embed.partition(".")[0] + "."


def _build_block(
    config: ModelConfig,
    index: int,
    parameters: Parameters,
    *,
    rope: RopeTable,
    dtype: torch.dtype,
    comm: Communicator,
) -> Block:
    """Wire one block: each norm writes in the order of the projection behind it."""
    names, hidden = name_map(config).layer(index), config.hidden_size
    attention = _build_attention(config, index, names, parameters, rope)
    gate_up = MergedLinear.of(
        [
            parameters.linear(name, (hidden, config.mlp_size), has_bias=config.mlp_bias)
            for name in (names.gate_proj, names.up_proj)
        ]
    )
    down = parameters.linear(names.down_proj, (config.mlp_size, hidden), has_bias=config.mlp_bias)

    def norm(name: str, order: Tensor | None) -> RMSNorm:
        return RMSNorm(parameters.tensor(f"{name}.weight", (hidden,)), config.norm_eps, dtype, order)

    return Block(
        attention_norm=norm(names.input_norm, attention.qkv.order),
        attention=attention,
        mlp_norm=norm(names.post_attention_norm, gate_up.order),
        mlp=GatedMLP(gate_up, down),
        comm=comm,
    )


def _build_attention(
    config: ModelConfig, index: int, names: NameMap, parameters: Parameters, rope: RopeTable
) -> Attention:
    """Wire the attention of one block."""
    hidden, head_dim = config.hidden_size, config.head_dim
    widths = {
        names.q_proj: config.num_heads * head_dim,
        names.k_proj: config.num_kv_heads * head_dim,
        names.v_proj: config.num_kv_heads * head_dim,
    }

    def head_norm(name: str) -> HeadNorm | None:
        if not config.qk_norm:
            return None
        return HeadNorm(parameters.tensor(f"{name}.weight", (head_dim,)), config.norm_eps)

    return Attention(
        layer=index,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        window=config.windows[index],
        qkv=MergedLinear.of(
            [parameters.linear(name, (hidden, width), has_bias=config.qkv_bias) for name, width in widths.items()]
        ),
        out=parameters.linear(names.o_proj, (config.num_heads * head_dim, hidden), has_bias=config.o_bias),
        rope=rope,
        q_norm=head_norm(names.q_norm),
        k_norm=head_norm(names.k_norm),
    )


class _ReadRecorder:
    """A checkpoint that reads to one device and remembers which tensors were read.

    Weights are checked and repacked there: a GPU looks through a tensor faster than a host can.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._read: set[str] = set()

    @property
    def quant_config(self) -> dict[str, Any] | None:
        return self._checkpoint.quant_config

    def __contains__(self, name: str) -> bool:
        return name in self._checkpoint

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._checkpoint.dtype(name)

    def read(self, name: str) -> Tensor:
        self._read.add(name)
        return self._checkpoint.read(name, self._device)

    def error(self, name: str | None, problem: str) -> CheckpointError:
        return self._checkpoint.error(name, problem)

    def unread(self) -> list[str]:
        return sorted(self._checkpoint.names() - self._read)


class CheckpointParameters:
    """The parameters of a checkpoint, converted for a device and a dtype as they are asked for."""

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> None:
        """Read from `checkpoint`, put on `device`, prepare for activations of `dtype`."""
        self._source = _ReadRecorder(checkpoint, device)
        self._device = device
        self._dtype = dtype

    def linear(self, name: str, shape: tuple[int, int], *, has_bias: bool) -> Linear:
        """Read a matrix in whatever format it is stored, and lay it out for the kernels; see `weight`."""
        weight, bias = self.weight(name, shape, has_bias=has_bias)
        operand = weight.operand(self._device, self._dtype)
        return Linear(operand, None if bias is None else bias.to(self._device))

    def weight(self, name: str, shape: tuple[int, int], *, has_bias: bool) -> tuple[Weight, Tensor | None]:
        """Read a matrix in whatever format it is stored, and its bias.

        A bias of zeros that the config knows nothing of is dropped: old GPTQ files have one beside every matrix.

        Args:
            name: the module.
            shape: (K, N) that it must have.
            has_bias: whether it must have a bias.

        Raises:
            CheckpointError: something is missing or does not fit.
            UnsupportedError: the format is not served.
        """
        weight = weight_class(self._source.quant_config, name, self._source).read(self._source, name)
        weight = without_padding(weight, shape[1])
        stored = f"{name}.{next(iter(weight.tensors()))}"
        if tuple(weight.shape) != shape:
            raise self._source.error(
                stored, f"must map {shape[0]} features to {shape[1]}, got {weight.shape[0]} to {weight.shape[1]}"
            )
        bias = weight.bias
        if has_bias and bias is None:
            raise self._source.error(f"{name}.bias", "the tensor is missing")
        if not has_bias and bias is not None:
            if bias.count_nonzero():
                raise self._source.error(f"{name}.bias", "must be absent or zero: the config says there is no bias")
            bias = None
        return weight, bias

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read a norm's weight or an embedding, in its stored dtype.

        EXL2 files repeat the weight of a norm over heads once per head; such copies count as the one that they are.

        Raises:
            CheckpointError: the tensor is missing, does not fit, or is not finite.
        """
        if name in self._source and len(shape) == 1 and self._source.shape(name)[1:] == shape:
            copies = take(self._source, name, (None, *shape), FLOATS, finite=True)
            if not copies.shape[0] or bool((copies != copies[0]).any()):
                raise self._source.error(name, f"must be one weight of shape {list(shape)} or copies of one")
            return copies[0].to(self._device)
        return take(self._source, name, shape, FLOATS, finite=True).to(self._device)

    def leftovers(self, prefix: str) -> list[str]:
        """Return the tensors below `prefix` that were not read and should have been."""
        return [name for name in self._source.unread() if name.startswith(prefix) and not name.endswith(_IGNORED)]

    def check_leftovers(self, prefix: str) -> None:
        """Raise if a tensor below `prefix` was not read.

        Raises:
            CheckpointError: names the first such tensor.
        """
        left = self.leftovers(prefix)
        if left:
            more = f"; {len(left) - 1} more are left over" if len(left) > 1 else ""
            raise self._source.error(left[0], f"nothing in this architecture uses the tensor{more}")
