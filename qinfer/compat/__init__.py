"""Doors for programs that were written for the compiled extensions: `exllamav2_ext` and `exllama_kernels`.

Each module has the names, the argument orders and the checks of the extension it stands for, over `qinfer.kernels` and
`qinfer.quant`. Nothing inside qinfer imports this package. `docs/seed-map.md` lists every name.
"""
