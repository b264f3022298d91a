"""The attention layers of `exllamav2_ext`: everything around attention itself, which the caller computes between them.

q_attn_forward_1   n = norm(x);  q, k, v = n Wq, n Wk, n Wv (+ biases, adapters);  head norms;  RoPE of q and k
q_attn_forward_2   x += attn Wo (+ bias, adapters), through the post-norm where there is one
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap

import torch
from torch import Tensor

from qinfer.compat.binding import Handles, check_tensor, extension, optional
from qinfer.compat.layers import Projection, Residual, check_lora_temp, check_scratch, set_adapters
from qinfer.kernels.rope import rope

NO_ROPE, NEIGHBOURS, HALVES = range(3)  # rope_style: nothing is rotated, as in GPT-J, as in NeoX


@dataclass(frozen=True)
class HeadNorm:
    """A normalization of every head by itself, with a weight per head."""

    weight: Tensor  # [heads, D] fp32
    is_rms: bool
    eps: float

    def normalize(self, x: Tensor) -> None:
        """Normalize x [M, heads, D] fp16 in place."""
        b = x.float()
        b = b if self.is_rms else b - b.mean(-1, keepdim=True)
        x.copy_(b * torch.rsqrt(b.square().mean(-1, keepdim=True) + self.eps) * self.weight)


@dataclass(frozen=True)
class _Attention:
    """An attention layer, without attention."""

    residual: Residual
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    head_dim: int
    norms: tuple[HeadNorm | None, HeadNorm | None]
    rope_style: int
    rope_width: int

    @property
    def projections(self) -> tuple[Projection, ...]:
        """q, k, v and o."""
        return self.q, self.k, self.v, self.o

    def angles(self, table: Tensor, positions: Tensor) -> Tensor:
        """Return one number per pair [M, R/2] fp32 from a table of angles that has two."""
        rows = table.reshape(-1, self.rope_width).index_select(0, positions)
        pairs = rows[:, ::2] if self.rope_style == NEIGHBOURS else rows[:, : self.rope_width // 2]
        return pairs.float().contiguous()


_attentions: Handles[_Attention] = Handles("q_attn")


@extension
def make_q_attn(
    layernorm: Tensor | None,
    layernorm_bias: Tensor | None,
    layernorm_is_rms: bool,
    headnorm_is_rms: bool,
    norm_epsilon: float,
    q_q_proj: int,
    q_k_proj: int,
    q_v_proj: int,
    q_o_proj: int,
    temp_state: Tensor | None,
    temp_dq: Tensor | None,
    max_rows: int,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_seq_len: int,
    has_residual: bool,
    rope_style: int,
    sincos_size: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    post_layernorm: Tensor | None,
    post_layernorm_bias: Tensor | None,
    residual_fp32: bool,
    use_graphs: bool,
) -> int:
    """Make an attention layer of four matrices and its norms, and return its handle.

    Args:
        layernorm: [hidden] fp16, or None: the projections read x itself.
        layernorm_bias: [hidden] fp16 or None; RMS norms have none.
        layernorm_is_rms: whether layernorm and post_layernorm are RMS norms rather than layer norms.
        headnorm_is_rms: the same of q_norm and k_norm.
        norm_epsilon: of all norms.
        q_q_proj: handle of a matrix [hidden, heads * head_dim] from `make_q_matrix`.
        q_k_proj: of [hidden, kv_heads * head_dim].
        q_v_proj: of [hidden, kv_heads * head_dim].
        q_o_proj: of [heads * head_dim, hidden].
        temp_state: fp16 scratch or None; unused.
        temp_dq: fp16 scratch or None; unused.
        max_rows: most rows that x may have.
        hidden_size: features of x.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: features of a head.
        max_seq_len: unused; the tables of angles say how far positions go.
        has_residual: whether `q_attn_forward_2` adds to x rather than writing it. (With a post-norm the compiled
            module adds even if not.)
        rope_style: 0 rotates nothing; 1 rotates neighbouring features, 2 the halves.
        sincos_size: features of a head that rotate, and numbers of a row of the tables.
        q_norm: [heads, head_dim] fp16 or None.
        k_norm: [kv_heads, head_dim] fp16 or None.
        post_layernorm: [hidden] fp16 or None.
        post_layernorm_bias: [hidden] fp16 or None.
        residual_fp32: whether x is fp32 rather than fp16.
        use_graphs: unused; nothing is captured.

    Returns:
        A handle for the other functions of this module.

    Raises:
        RuntimeError: a handle is none, or a dtype, a shape, a device or a value does not fit.
    """
    handles = {"q_q_proj": q_q_proj, "q_k_proj": q_k_proj, "q_v_proj": q_v_proj, "q_o_proj": q_o_proj}
    q, k, v, o = starmap(Projection.of, handles.items())
    device = q.matrix.device
    q.check(hidden_size, num_heads * head_dim, device)
    k.check(hidden_size, num_kv_heads * head_dim, device)
    v.check(hidden_size, num_kv_heads * head_dim, device)
    o.check(num_heads * head_dim, hidden_size, device)
    check_scratch(temp_state=temp_state, temp_dq=temp_dq)
    if rope_style not in (NO_ROPE, NEIGHBOURS, HALVES):
        raise ValueError(f"rope_style must be 0 (none), 1 (neighbours) or 2 (halves), got {rope_style}")
    if rope_style != NO_ROPE and not (0 < sincos_size <= head_dim and sincos_size % 2 == 0):
        raise ValueError(f"sincos_size must be even and from 2 to head_dim = {head_dim}, got {sincos_size}")
    residual = Residual.of(
        q.matrix,
        (layernorm, layernorm_bias),
        (post_layernorm, post_layernorm_bias),
        is_rms=layernorm_is_rms,
        eps=norm_epsilon,
        max_rows=max_rows,
        has_residual=has_residual,
        is_fp32=residual_fp32,
    )
    norms = (
        _head_norm("q_norm", q_norm, q, head_dim, is_rms=headnorm_is_rms, eps=norm_epsilon),
        _head_norm("k_norm", k_norm, k, head_dim, is_rms=headnorm_is_rms, eps=norm_epsilon),
    )
    return _attentions.add(_Attention(residual, q, k, v, o, head_dim, norms, rope_style, sincos_size))


def _head_norm(
    name: str, weight: Tensor | None, projection: Projection, head_dim: int, *, is_rms: bool, eps: float
) -> HeadNorm | None:
    """Copy the weight [heads, D] fp16 of a head norm; None where none is given."""
    if (weight := optional(weight)) is None:
        return None
    check_tensor(name, weight, torch.float16, (projection.matrix.shape[1] // head_dim, head_dim))
    projection.matrix.check_device(**{name: weight})
    return HeadNorm(weight.float(), is_rms, eps)


@extension
def free_q_attn(handle: int) -> None:
    """Free a layer of `make_q_attn`; its handle raises from then on, and its matrices stay.

    Raises:
        RuntimeError: the handle is none of theirs, or was freed before.
    """
    _attentions.free(handle)


@extension
def q_attn_set_loras(
    q_attn: int,
    q_proj_lora_a: Mapping[int, Tensor],
    q_proj_lora_b: Mapping[int, Tensor],
    k_proj_lora_a: Mapping[int, Tensor],
    k_proj_lora_b: Mapping[int, Tensor],
    v_proj_lora_a: Mapping[int, Tensor],
    v_proj_lora_b: Mapping[int, Tensor],
    o_proj_lora_a: Mapping[int, Tensor],
    o_proj_lora_b: Mapping[int, Tensor],
) -> int:
    """Replace the adapters of a layer: for every projection, from an adapter's number to A [K, r] and B [r, N] fp16.

    B holds the adapter's scaling. The tensors are copied, in fp32.

    Returns:
        The largest rank, 0 where there are no adapters.

    Raises:
        RuntimeError: the handle is none, a projection has an A without its B or the reverse, or a tensor does not fit;
            the adapters are then what they were.
    """
    tensors = (
        *(q_proj_lora_a, q_proj_lora_b, k_proj_lora_a, k_proj_lora_b),
        *(v_proj_lora_a, v_proj_lora_b, o_proj_lora_a, o_proj_lora_b),
    )
    return set_adapters(_attentions.find(q_attn).projections, tensors)


@extension
def q_attn_forward_1(
    q_attn: int,
    x: Tensor,
    batch_size: int,
    q_len: int,
    past_len: int,
    past_lens: Tensor | None,
    q_temp: Tensor,
    k_temp: Tensor,
    v_temp: Tensor,
    sin: Tensor | None,
    cos: Tensor | None,
    loras: Sequence[int],
    loras_temp: Tensor | None,
) -> None:
    """Make queries, keys and values of the residual stream, ready for attention.

    Token i of sequence b is at position past_len + past_lens[b] + i, or at 0 where that is negative, as for padding on
    the left. Where past_len is -1, it is at max(past_lens[b], 0) + i.

    Args:
        q_attn: from `make_q_attn`.
        x: [batch, q_len, hidden] (or any shape of those rows) fp16, or fp32 for a layer with residual_fp32.
        batch_size: sequences.
        q_len: tokens of each.
        past_len: tokens before these, or -1: past_lens alone says it.
        past_lens: [batch] int32 or None.
        q_temp: batch * q_len * heads * head_dim fp16 numbers, contiguous, written.
        k_temp: batch * q_len * kv_heads * head_dim fp16 numbers, contiguous, written.
        v_temp: like `k_temp`.
        sin: [..., positions, sincos_size] fp16; None for rope_style 0.
        cos: like `sin`.
        loras: adapters to apply, by number; one that does not have a projection leaves that projection alone.
        loras_temp: fp16 scratch of rows * rank numbers or None; unused.

    Raises:
        RuntimeError: the handle is none, or a dtype, a shape, a device or a value does not fit; also, unless past_lens
            is on a GPU, where torch reports it later, a position lies behind the tables.
    """
    layer = _attentions.find(q_attn)
    rows = layer.residual.rows(x)
    _check_rows(rows, batch_size, q_len)
    outputs = [
        _flat(name, tensor, rows, projection.matrix.shape[1])
        for name, tensor, projection in zip(
            ("q_temp", "k_temp", "v_temp"), (q_temp, k_temp, v_temp), layer.projections, strict=False
        )
    ]
    check_lora_temp(loras_temp, rows.shape[0], layer.projections[:3], loras)
    positions = _positions(rows, (batch_size, q_len), past_len, optional(past_lens))
    angles = None
    if layer.rope_style != NO_ROPE:
        on_host = torch.arange(past_len, past_len + q_len) if optional(past_lens) is None else positions
        angles = _angles(layer, (sin, cos), positions, on_host)
    n = layer.residual.normalized(rows)
    for projection, out in zip(layer.projections, outputs, strict=False):
        projection.multiply(n, out, loras)
    q, k = (out.view(rows.shape[0], out.shape[1] // layer.head_dim, layer.head_dim) for out in outputs[:2])
    for norm, heads in zip(layer.norms, (q, k), strict=True):
        if norm is not None:
            norm.normalize(heads)
    if angles is not None:
        steps = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
        rope(q, k, angles[1], angles[0], steps, interleaved=layer.rope_style == NEIGHBOURS)


def _check_rows(rows: Tensor, batch_size: int, q_len: int) -> None:
    """Raise ValueError unless x has the rows that a call speaks of."""
    if rows.shape[0] != batch_size * q_len:
        raise ValueError(f"x must have batch_size * q_len = {batch_size * q_len} rows, got {rows.shape[0]}")


def _flat(name: str, tensor: Tensor, rows: Tensor, width: int) -> Tensor:
    """Return a contiguous fp16 tensor as [M, width], once it holds as many numbers and lives where the rows do."""
    check_tensor(name, tensor, torch.float16, ("...",) * tensor.dim())
    if tensor.device != rows.device:
        raise ValueError(f"{name} must be on {rows.device} like x, got {tensor.device}")
    if not tensor.is_contiguous() or tensor.numel() != rows.shape[0] * width:
        raise ValueError(
            f"{name} must be contiguous and hold {rows.shape[0]} rows of {width}, "
            f"got {list(tensor.shape)} with strides {tensor.stride()}"
        )
    return tensor.view(rows.shape[0], width)


def _positions(rows: Tensor, shape: tuple[int, int], past_len: int, past_lens: Tensor | None) -> Tensor:
    """Return the position of every row: [M] int64."""
    batch_size, q_len = shape
    if past_lens is None:
        if past_len < 0:
            raise ValueError(f"past_len must be at least 0 without past_lens, got {past_len}")
        starts = torch.full((batch_size,), past_len, device=rows.device)
    else:
        if past_len < -1:
            raise ValueError(f"past_len must be at least 0, or -1 for past_lens alone, got {past_len}")
        check_tensor("past_lens", past_lens, torch.int32, (batch_size,))
        if past_lens.device != rows.device:
            raise ValueError(f"past_lens must be on {rows.device} like x, got {past_lens.device}")
        starts = past_lens.long().clamp_min(0) if past_len == -1 else past_lens.long() + past_len
    return (starts[:, None] + torch.arange(q_len, device=rows.device)).clamp_min(0).view(-1)


def _angles(
    layer: _Attention, tables: tuple[Tensor | None, Tensor | None], positions: Tensor, seen: Tensor
) -> tuple[Tensor, Tensor]:
    """Return sines and cosines [M, R/2] fp32 of rows, `seen` being their positions too, on the host if known there."""
    sin, cos = (optional(table) for table in tables)
    if sin is None or cos is None:
        raise ValueError(f"sin and cos must be given for rope_style {layer.rope_style}")
    for name, table in (("sin", sin), ("cos", cos)):
        check_tensor(name, table, torch.float16, (*("...",) * (max(table.dim(), 2) - 1), layer.rope_width))
        if table.device != positions.device:
            raise ValueError(f"{name} must be on {positions.device} like x, got {table.device}")
        length = table.numel() // layer.rope_width
        if not seen.is_cuda and seen.numel() and int(seen.max()) >= length:
            raise ValueError(f"{name} must reach position {int(seen.max())}, got {length} positions")
    return layer.angles(sin, positions), layer.angles(cos, positions)


@extension
def q_attn_forward_2(
    q_attn: int,
    x: Tensor,
    attn_output: Tensor,
    batch_size: int,
    q_len: int,
    loras: Sequence[int],
    loras_temp: Tensor | None,
) -> None:
    """Project what attention gave and add it to the residual stream: x += attn Wo, or x += norm(attn Wo).

    Adapters are part of the projection and go through the post-norm with it. (The compiled module adds their product
    behind the norm, which is not what they were trained for.)

    Args:
        q_attn: from `make_q_attn`.
        x: as in `q_attn_forward_1`, changed.
        attn_output: batch * q_len * heads * head_dim fp16 numbers, contiguous.
        batch_size: sequences.
        q_len: tokens of each.
        loras: as in `q_attn_forward_1`.
        loras_temp: as in `q_attn_forward_1`.

    Raises:
        RuntimeError: the handle is none, or a dtype, a shape, a device or a value does not fit.
    """
    layer = _attentions.find(q_attn)
    rows = layer.residual.rows(x)
    _check_rows(rows, batch_size, q_len)
    attention = _flat("attn_output", attn_output, rows, layer.o.matrix.shape[0])
    check_lora_temp(loras_temp, rows.shape[0], (layer.o,), loras)
    layer.residual.add_product(rows, layer.o, attention, loras)


@extension
def set_flash_attn_func() -> None:
    """Do nothing, as in the compiled module: no function of this one computes attention."""
