"""The MLP layers of `exllamav2_ext`, with one set of matrices or with experts.

    n = norm(x)
    gated     x += (act(n Wgate) * n Wup) Wdown
    ungated   x += act(n Wup) Wdown
    experts   x += Σ w_e (act(n W1_e) * n W3_e) W2_e,   w = softmax(n Gᵀ) of the k likeliest e, divided by their sum

act is silu, x / (1 + exp(-x)), or the tanh approximation of gelu, in fp32; the compiled module computes silu in fp16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from qinfer.compat.binding import Handles, check_tensor, extension
from qinfer.compat.layers import Projection, Residual, check_lora_temp, check_scratch, set_adapters
from qinfer.kernels.combine import combine
from qinfer.kernels.route import MAX_EXPERTS, route
from qinfer.kernels.silu_mul import silu_mul

NO_LORAS: tuple[int, ...] = ()


@dataclass(frozen=True)
class _MLP:
    """The matrices of an MLP, or of one expert."""

    gate: Projection | None
    up: Projection
    down: Projection
    act_gelu: bool

    def check(self, hidden_size: int, device: torch.device) -> None:
        """Raise ValueError unless the matrices fit together and read and write `hidden_size` features."""
        width = self.up.matrix.shape[1]
        self.up.check(hidden_size, width, device)
        self.down.check(width, hidden_size, device)
        if self.gate is not None:
            self.gate.check(hidden_size, width, device)

    @property
    def projections(self) -> tuple[Projection | None, Projection, Projection]:
        """gate, up and down."""
        return self.gate, self.up, self.down

    def inner(self, n: Tensor, loras: Sequence[int]) -> Tensor:
        """Return what the down projection reads, [M, F] fp16, for n [M, C] fp16."""
        width = self.up.matrix.shape[1]
        products = torch.empty(n.shape[0], width if self.gate is None else 2 * width, dtype=n.dtype, device=n.device)
        self.up.multiply(n, products[:, -width:], loras)
        if self.gate is None:
            activated = products.float()
            return (gelu(activated, approximate="tanh") if self.act_gelu else silu(activated)).to(n.dtype)
        self.gate.multiply(n, products[:, :width], loras)
        if not self.act_gelu:
            return silu_mul(products)
        gate, up = products.float().chunk(2, dim=1)
        return (gelu(gate, approximate="tanh") * up).to(n.dtype)


@dataclass(frozen=True)
class _MLPLayer:
    """An MLP and the residual stream that it reads and adds to."""

    residual: Residual
    mlp: _MLP


@dataclass(frozen=True)
class _MoELayer:
    """Experts, and what chooses them for every token."""

    residual: Residual
    router: Tensor  # [E, C] fp32
    top_k: int
    experts: tuple[_MLP, ...]


_mlps: Handles[_MLPLayer] = Handles("q_mlp")
_moe_mlps: Handles[_MoELayer] = Handles("q_moe_mlp")


@extension
def make_q_mlp(
    layernorm: Tensor | None,
    layernorm_bias: Tensor | None,
    layernorm_is_rms: bool,
    norm_epsilon: float,
    q_gate: int,
    q_up: int,
    q_down: int,
    temp_state: Tensor | None,
    temp_a: Tensor | None,
    temp_b: Tensor | None,
    temp_dq: Tensor | None,
    max_rows: int,
    act_gelu: bool,
    has_residual: bool,
    post_layernorm: Tensor | None,
    post_layernorm_bias: Tensor | None,
    residual_fp32: bool,
    use_graphs: bool,
) -> int:
    """Make an MLP layer of two or three matrices and its norms, and return its handle.

    Args:
        layernorm: [hidden] fp16, or None: the projections read x itself.
        layernorm_bias: [hidden] fp16 or None; RMS norms have none.
        layernorm_is_rms: whether the norms are RMS norms rather than layer norms.
        norm_epsilon: of both norms.
        q_gate: handle of a matrix [hidden, width] from `make_q_matrix`, or 0: the MLP is not gated.
        q_up: of [hidden, width].
        q_down: of [width, hidden].
        temp_state: fp16 scratch or None; unused, as is all scratch.
        temp_a: fp16 scratch or None.
        temp_b: fp16 scratch or None.
        temp_dq: fp16 scratch or None.
        max_rows: most rows that x may have.
        act_gelu: gelu rather than silu.
        has_residual: whether `q_mlp_forward_` adds to x rather than writing it. (With a post-norm the compiled module
            adds even if not.)
        post_layernorm: [hidden] fp16 or None.
        post_layernorm_bias: [hidden] fp16 or None.
        residual_fp32: whether x is fp32 rather than fp16.
        use_graphs: unused; nothing is captured.

    Returns:
        A handle for `q_mlp_forward_`, `q_mlp_set_loras` and `free_q_mlp`.

    Raises:
        RuntimeError: a handle is none, or a dtype, a shape, a device or a value does not fit.
    """
    gate = Projection.of("q_gate", q_gate) if q_gate else None
    mlp = _MLP(gate, Projection.of("q_up", q_up), Projection.of("q_down", q_down), act_gelu)
    reader = mlp.up.matrix
    mlp.check(reader.shape[0], reader.device)
    check_scratch(temp_state=temp_state, temp_a=temp_a, temp_b=temp_b, temp_dq=temp_dq)
    residual = Residual.of(
        reader,
        (layernorm, layernorm_bias),
        (post_layernorm, post_layernorm_bias),
        is_rms=layernorm_is_rms,
        eps=norm_epsilon,
        max_rows=max_rows,
        has_residual=has_residual,
        is_fp32=residual_fp32,
    )
    return _mlps.add(_MLPLayer(residual, mlp))


@extension
def free_q_mlp(handle: int) -> None:
    """Free a layer of `make_q_mlp`; its handle raises from then on, and its matrices stay.

    Raises:
        RuntimeError: the handle is none of theirs, or was freed before.
    """
    _mlps.free(handle)


@extension
def q_mlp_set_loras(
    q_mlp: int,
    gate_proj_lora_a: Mapping[int, Tensor],
    gate_proj_lora_b: Mapping[int, Tensor],
    up_proj_lora_a: Mapping[int, Tensor],
    up_proj_lora_b: Mapping[int, Tensor],
    down_proj_lora_a: Mapping[int, Tensor],
    down_proj_lora_b: Mapping[int, Tensor],
) -> int:
    """Replace the adapters of a layer: for every projection, from an adapter's number to A [K, r] and B [r, N] fp16.

    B holds the adapter's scaling. The tensors are copied, in fp32.

    Returns:
        The largest rank, 0 where there are no adapters.

    Raises:
        RuntimeError: the handle is none, a projection has an A without its B or the reverse, a tensor does not fit, or
            there is no gate to adapt; the adapters are then what they were.
    """
    gate, up = (gate_proj_lora_a, gate_proj_lora_b), (up_proj_lora_a, up_proj_lora_b)
    return set_adapters(_mlps.find(q_mlp).mlp.projections, (*gate, *up, down_proj_lora_a, down_proj_lora_b))


@extension
def q_mlp_forward_(q_mlp: int, x: Tensor, loras: Sequence[int], loras_temp: Tensor | None) -> None:
    """Add what an MLP makes of the residual stream to it, through the post-norm where there is one.

    Adapters are part of the projections and go through the post-norm with them. (The compiled module adds those of the
    down projection behind the norm, which is not what they were trained for.)

    Args:
        q_mlp: from `make_q_mlp`.
        x: [..., hidden] fp16, or fp32 for a layer with residual_fp32, changed.
        loras: adapters to apply, by number; one that does not have a projection leaves that projection alone.
        loras_temp: fp16 scratch of rows * rank numbers or None; unused.

    Raises:
        RuntimeError: the handle is none, or a dtype, a shape, a device or a value does not fit.
    """
    layer = _mlps.find(q_mlp)
    rows = layer.residual.rows(x)
    check_lora_temp(loras_temp, rows.shape[0], layer.mlp.projections, loras)
    inner = layer.mlp.inner(layer.residual.normalized(rows), loras)
    layer.residual.add_product(rows, layer.mlp.down, inner, loras)


@extension
def make_q_moe_mlp(
    layernorm: Tensor | None,
    layernorm_bias: Tensor | None,
    layernorm_is_rms: bool,
    norm_epsilon: float,
    gate: Tensor,
    num_experts: int,
    num_experts_per_token: int,
    w1: Sequence[int],
    w2: Sequence[int],
    w3: Sequence[int],
    temp_state: Tensor | None,
    temp_gathered_state: Tensor | None,
    temp_a: Tensor | None,
    temp_b: Tensor | None,
    temp_logits: Tensor | None,
    temp_dq: Tensor | None,
    max_rows: int,
    act_gelu: bool,
) -> int:
    """Make an MLP layer of experts and return its handle.

    Args:
        layernorm: [hidden] fp16, or None: the router and the experts read x itself.
        layernorm_bias: [hidden] fp16 or None; RMS norms have none.
        layernorm_is_rms: whether it is an RMS norm rather than a layer norm.
        norm_epsilon: of the norm.
        gate: [experts, hidden] fp16, the router.
        num_experts: E, any number up to 1024. (The compiled module takes 4, 8, 16 and 128.)
        num_experts_per_token: k.
        w1: handles of the experts' gates [hidden, width], from `make_q_matrix`.
        w2: of their down projections [width, hidden].
        w3: of their up projections [hidden, width].
        temp_state: fp16 scratch or None; unused, as is all scratch.
        temp_gathered_state: fp16 scratch or None.
        temp_a: fp16 scratch or None.
        temp_b: fp16 scratch or None.
        temp_logits: fp16 scratch or None.
        temp_dq: fp16 scratch or None.
        max_rows: most rows that x may have.
        act_gelu: gelu rather than silu.

    Returns:
        A handle for `q_moe_mlp_forward_` and `free_q_moe_mlp`.

    Raises:
        RuntimeError: a handle is none, or a dtype, a shape, a device or a value does not fit.
    """
    if not num_experts == len(w1) == len(w2) == len(w3):
        raise ValueError(f"w1, w2 and w3 must be {num_experts} matrices each, got {len(w1)}, {len(w2)} and {len(w3)}")
    if not 1 <= num_experts_per_token <= num_experts <= MAX_EXPERTS:
        raise ValueError(
            f"num_experts_per_token must be from 1 to the number of experts, and these at most {MAX_EXPERTS}, "
            f"got {num_experts_per_token} of {num_experts}"
        )
    experts = tuple(
        _MLP(
            Projection.of(f"w1[{i}]", gate_handle),
            Projection.of(f"w3[{i}]", up_handle),
            Projection.of(f"w2[{i}]", down_handle),
            act_gelu,
        )
        for i, (gate_handle, up_handle, down_handle) in enumerate(zip(w1, w3, w2, strict=True))
    )
    first = experts[0].up.matrix
    hidden_size = first.shape[0]
    for expert in experts:
        expert.check(hidden_size, first.device)
    check_tensor("gate", gate, torch.float16, (num_experts, hidden_size))
    first.check_device(gate=gate)
    check_scratch(temp_state=temp_state, temp_gathered_state=temp_gathered_state, temp_a=temp_a, temp_b=temp_b)
    check_scratch(temp_logits=temp_logits, temp_dq=temp_dq)
    norm = (layernorm, layernorm_bias)
    residual = Residual.of(first, norm, is_rms=layernorm_is_rms, eps=norm_epsilon, max_rows=max_rows)
    return _moe_mlps.add(_MoELayer(residual, gate.float(), num_experts_per_token, experts))


@extension
def free_q_moe_mlp(handle: int) -> None:
    """Free a layer of `make_q_moe_mlp`; its handle raises from then on, and its matrices stay.

    Raises:
        RuntimeError: the handle is none of theirs, or was freed before.
    """
    _moe_mlps.free(handle)


@extension
def q_moe_mlp_forward_(q_moe_mlp: int, x: Tensor) -> None:
    """Add what the experts of every token make of the residual stream to it.

    Every row has experts of its own, however many there are of both. (The compiled module takes up to 4 rows, and of
    128 experts computes those of the first row only.) Router and weights are fp32. Only experts that a row chose are
    computed, so on a GPU the call waits for that choice.

    Args:
        q_moe_mlp: from `make_q_moe_mlp`.
        x: [..., hidden] fp16, changed.

    Raises:
        RuntimeError: the handle is none, or a dtype, a shape, a device or a value does not fit.
    """
    layer = _moe_mlps.find(q_moe_mlp)
    rows = layer.residual.rows(x)
    n = layer.residual.normalized(rows)
    chosen, weights = route(n.float() @ layer.router.t(), top_k=layer.top_k, normalized=True)
    pairs: dict[int, list[int]] = {}
    for pair, expert in enumerate(chosen.view(-1).tolist()):
        pairs.setdefault(expert, []).append(pair)
    products = torch.empty(1, weights.numel(), rows.shape[1], dtype=torch.float32, device=rows.device)
    for expert, indices in pairs.items():
        index = torch.tensor(indices, device=rows.device)
        mlp = layer.experts[expert]
        product = torch.empty(len(indices), rows.shape[1], dtype=torch.float32, device=rows.device)
        mlp.down.multiply(mlp.inner(n[index // layer.top_k], NO_LORAS), product, NO_LORAS)
        products[0, index] = product
    layer.residual.add(rows, combine(products, weights))
