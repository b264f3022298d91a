"""A GPTQ layer on ExLlama v1's extension functions. Only the import differs from a script for the compiled module."""

import torch

# was: from exllama_kernels import cleanup, make_q4, prepare_buffers, q4_matmul, set_tuning_params
from qinfer.compat.exllama_kernels import cleanup, make_q4, prepare_buffers, q4_matmul, set_tuning_params

device = torch.device("cuda:0") if torch.accelerator.is_available() else torch.device("cpu")
in_features, out_features, group_size = 512, 256, 128
torch.manual_seed(0)

# Round a random matrix to 4 bits: codes 0 to 15, zero point 8, one scale per 128 inputs and output.
weight = torch.randn(in_features, out_features) * 0.02
groups = weight.view(-1, group_size, out_features)
scales = (groups.abs().amax(dim=1) / 7).half()
codes = (groups / scales[:, None]).round().clamp(-8, 7).view_as(weight).int() + 8
shifts = torch.arange(0, 32, 4, dtype=torch.int32)
qweight = (codes.view(-1, 8, out_features) << shifts[:, None]).sum(dim=1, dtype=torch.int32)
qzeros = torch.full((len(scales), out_features // 8), 0x77777777, dtype=torch.int32)
qweight, qzeros, scales = (tensor.to(device) for tensor in (qweight, qzeros, scales))

none_tensor = torch.empty((1, 1), device="meta")
temp_state = torch.zeros((2048, in_features), dtype=torch.float16, device=device)
temp_dq = torch.zeros((1, in_features * out_features), dtype=torch.float16, device=device)
prepare_buffers(device, temp_state, temp_dq)
set_tuning_params(8, False, False)
q4 = make_q4(qweight, qzeros, scales, none_tensor, qweight.get_device())

exact = (codes.float() - 8) * scales.cpu().float().repeat_interleave(group_size, dim=0)
for rows in (1, 7, 8, 200):
    x = torch.randn(rows, in_features).half().to(device)
    out = torch.empty((rows, out_features), dtype=torch.float16, device=device)
    q4_matmul(x, q4, out)
    expected = x.cpu().float() @ exact
    error = (out.cpu().float() - expected).norm() / expected.norm()
    print(f"{rows:4} rows on {device}: relative error {error:.1e} of the product, beside the matrix that was stored")
    assert error < 1e-3

cleanup()
try:
    q4_matmul(x, q4, out)
except RuntimeError as problem:
    print(f"after cleanup: {problem}")
