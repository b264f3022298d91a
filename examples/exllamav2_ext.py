"""An EXL2 matrix on ExLlamaV2's extension functions. Only the import differs from a script for the compiled module."""

import torch

# was: from exllamav2.ext import exllamav2_ext as ext_c
from qinfer.compat import exllamav2_ext as ext_c

device = torch.device("cuda:0") if torch.accelerator.is_available() else torch.device("cpu")
none_tensor = torch.empty((1, 1), device="meta")
in_features, out_features = 256, 64
plan = [(6, 64), (4, 128), (3, 64)]  # bits and rows of each group
torch.manual_seed(0)

# Pack random codes, group after group: a scale is q_scale_max * (index / 16)^2.
codes = [torch.randint(0, 1 << bits, (rows, out_features), dtype=torch.short) for bits, rows in plan]
packed, heads, start = [], [], 0
for (bits, rows), group in zip(plan, codes, strict=True):
    words = torch.empty((rows * bits // 32, out_features), dtype=torch.int, device=device)
    ext_c.pack_columns(group.to(device), words, bits)
    packed.append(words)
    heads += [bits, start]
    start += len(words)
q_weight = torch.cat(packed)
q_groups = torch.tensor(heads, dtype=torch.short)
indices = torch.randint(1, 17, (len(plan), out_features), dtype=torch.short)
q_scale = torch.empty((len(plan), out_features // 8), dtype=torch.int, device=device)
ext_c.pack_rows_4(indices.to(device), q_scale)
q_scale_max = torch.tensor([0.005, 0.02, 0.04], dtype=torch.half, device=device)
q_scale_max *= 1 / 256  # what the extension expects of its caller
q_perm = torch.randperm(in_features)
q_invperm = torch.argsort(q_perm)
q_group_map = ext_c.make_group_map(q_groups, len(q_weight))

handle = ext_c.make_q_matrix(
    q_weight,
    q_perm.short().to(device),
    q_invperm.short().to(device),
    q_scale,
    q_scale_max,
    q_groups.to(device),
    q_group_map.to(device),
    none_tensor,
    none_tensor,
    none_tensor,
    none_tensor,
    none_tensor,
    0,
)
matrix = torch.empty((in_features, out_features), dtype=torch.half, device=device)
ext_c.reconstruct(handle, matrix)
steps = ((indices * indices).half() * q_scale_max.cpu()[:, None]).float()
stored = torch.cat([(c.float() - (1 << b - 1)) * s for c, (b, _), s in zip(codes, plan, steps, strict=True)])
print("reconstruct gives the matrix:", torch.equal(matrix.cpu(), stored.half()[q_invperm]))

for rows, force_cuda in ((1, False), (5, True), (200, False)):
    a = torch.randn(rows, in_features).half().to(device)
    c = torch.empty((rows, out_features), dtype=torch.half, device=device)
    ext_c.gemm_half_q_half(a, handle, c, force_cuda)
    expected = a.cpu().float() @ matrix.cpu().float()
    error = (c.cpu().float() - expected).norm() / expected.norm()
    print(f"{rows:4} rows on {device}: relative error {error:.1e} of the product")
    assert error < 1e-3
ext_c.free_q_matrix(handle)
