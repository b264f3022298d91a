"""Functions of ExLlamaV2's compiled extension `exllamav2_ext`: same names, argument orders and checks.

    from qinfer.compat import exllamav2_ext as ext_c

Tensors may live on a CPU or on a GPU. An argument that may be a meta tensor may be None as well. Every mistake is
reported as an error that is both RuntimeError, as in the compiled module, and ValueError, TypeError or OSError
(`binding.py`). What differs from the compiled module, always to the safe side:

- Tensors are not shuffled in place, and need not outlive the handle made of them.
- Products accumulate in fp32 and are repeatable bit by bit; adapters go through a post-norm with what they adapt.
- Values out of range, which the compiled module reads or writes past the end for, raise; on a GPU, where looking at
  values would stall it, this holds for `make_q_matrix` and `make_group_map` only.
- `temp_dq` and `max_dq_rows` are checked and otherwise unused: `qinfer.kernels.matmul` bounds its own scratch.
"""

from __future__ import annotations

from qinfer.compat.ext_attention import (
    free_q_attn,
    make_q_attn,
    q_attn_forward_1,
    q_attn_forward_2,
    q_attn_set_loras,
    set_flash_attn_func,
)
from qinfer.compat.ext_cache import (
    cache_rotate,
    count_match,
    fp8_to_fp16,
    fp16_to_fp8,
    fp16_to_q_kv,
    q_to_fp16_kv,
)
from qinfer.compat.ext_hadamard import had_paley, had_paley2
from qinfer.compat.ext_matrix import (
    free_q_matrix,
    gemm_half_half_half,
    gemm_half_q_half,
    gemm_half_q_half_tp,
    make_q_matrix,
    make_q_matrix_split,
    reconstruct,
)
from qinfer.compat.ext_mlp import (
    free_q_mlp,
    free_q_moe_mlp,
    make_q_mlp,
    make_q_moe_mlp,
    q_mlp_forward_,
    q_mlp_set_loras,
    q_moe_mlp_forward_,
)
from qinfer.compat.ext_norms import (
    head_norm,
    head_norm_,
    layer_norm,
    layer_norm_,
    rms_norm,
    rms_norm_,
    rms_norm_tp,
    softcap_,
)
from qinfer.compat.ext_packing import (
    make_group_map,
    matrix_fp16_to_q4,
    matrix_q4_to_fp16,
    pack_columns,
    pack_rows_4,
    stloader_read,
    tensor_remap,
    tensor_remap_4bit,
)
from qinfer.compat.ext_positions import gen_mrope_pos_ids, rope_
from qinfer.compat.ext_sampling import (
    apply_rep_penalty,
    dump_profile_results,
    fast_copy_cpu,
    fast_fadd_cpu,
    fast_fill_cpu_ones_bool,
    logit_filter_exclusive,
    partial_strings_match,
    sample_basic,
)
from qinfer.compat.ext_tp import (
    free_tp_context,
    make_tp_context,
    tp_all_reduce,
    tp_broadcast,
    tp_cross_device_barrier,
    tp_gather,
)
from qinfer.compat.ext_tp_layers import tp_attn_forward_, tp_attn_forward_paged_, tp_mlp_forward_

__all__ = [
    "apply_rep_penalty",
    "cache_rotate",
    "count_match",
    "dump_profile_results",
    "fast_copy_cpu",
    "fast_fadd_cpu",
    "fast_fill_cpu_ones_bool",
    "fp8_to_fp16",
    "fp16_to_fp8",
    "fp16_to_q_kv",
    "free_q_attn",
    "free_q_matrix",
    "free_q_mlp",
    "free_q_moe_mlp",
    "free_tp_context",
    "gemm_half_half_half",
    "gemm_half_q_half",
    "gemm_half_q_half_tp",
    "gen_mrope_pos_ids",
    "had_paley",
    "had_paley2",
    "head_norm",
    "head_norm_",
    "layer_norm",
    "layer_norm_",
    "logit_filter_exclusive",
    "make_group_map",
    "make_q_attn",
    "make_q_matrix",
    "make_q_matrix_split",
    "make_q_mlp",
    "make_q_moe_mlp",
    "make_tp_context",
    "matrix_fp16_to_q4",
    "matrix_q4_to_fp16",
    "pack_columns",
    "pack_rows_4",
    "partial_strings_match",
    "q_attn_forward_1",
    "q_attn_forward_2",
    "q_attn_set_loras",
    "q_mlp_forward_",
    "q_mlp_set_loras",
    "q_moe_mlp_forward_",
    "q_to_fp16_kv",
    "reconstruct",
    "rms_norm",
    "rms_norm_",
    "rms_norm_tp",
    "rope_",
    "sample_basic",
    "set_flash_attn_func",
    "softcap_",
    "stloader_read",
    "tensor_remap",
    "tensor_remap_4bit",
    "tp_all_reduce",
    "tp_attn_forward_",
    "tp_attn_forward_paged_",
    "tp_broadcast",
    "tp_cross_device_barrier",
    "tp_gather",
    "tp_mlp_forward_",
]
