"""Pure functions on tensors: one op per file, each with its mathematics, reference, kernel, check and wrapper.

Import an op from the file that bears its name: `from qinfer.kernels.matmul import matmul`. Nothing is re-exported here,
because a function of the same name would hide the module.
"""
