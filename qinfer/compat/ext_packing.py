"""The functions of `exllamav2_ext` that pack, permute, encode and read stored tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qinfer.compat import q4
from qinfer.compat.binding import check_tensor, check_together, extension
from qinfer.kernels.checks import check_index
from qinfer.kernels.packing import pack_4bit, pack_stream, unpack_4bit
from qinfer.staging import read_file

PACKED_BITS = (2, 3, 4, 5, 6, 8)
CHUNK = 64 << 20  # bytes of page-locked memory through which `stloader_read` fills a GPU


def _check_codes(name: str, codes: Tensor, first: int, last: int) -> None:
    """Raise ValueError if a code is out of range; on a GPU the values are not looked at."""
    if codes.device.type == "cpu" and codes.numel():
        low, high = (int(extreme) for extreme in torch.aminmax(codes))
        if low < first or high > last:
            raise ValueError(f"{name} must hold {first} to {last}, got {low} to {high}")


@extension
def pack_rows_4(input: Tensor, output: Tensor) -> None:
    """Pack scale indices less one, eight per word, the first one lowest: nibble i of output[r, j] = input[r, 8j+i] - 1.

    An index of 0, which stands for a padded column, becomes 15. (In the compiled module it sets the three nibbles after
    it too; where padding ends the row, as in every file, that is the same.)

    Args:
        input: [R, C] int16, 0 to 16, C a multiple of 8.
        output: [R, C / 8] int32, written.

    Raises:
        RuntimeError: a dtype, a shape, a device or (CPU tensors only) a value does not fit.
    """
    check_tensor("input", input, torch.int16, ("R", "C"))
    check_tensor("output", output, torch.int32, (input.shape[0], input.shape[1] // 8))
    check_together(input, output=output)
    _check_codes("input", input, 0, 16)
    output.copy_(pack_4bit(((input - 1) & 15).to(torch.uint8)))


@extension
def pack_columns(input: Tensor, output: Tensor, bits: int) -> None:
    """Pack codes as one little-endian stream of bits down each column.

    Args:
        input: [R, C] int16, 0 to 2^bits - 1, R * bits a multiple of 32.
        output: [R * bits / 32, C] int32, written.
        bits: 2, 3, 4, 5, 6 or 8.

    Raises:
        RuntimeError: `bits` is none of these, or a dtype, a shape, a device or (CPU tensors only) a value does not fit.
    """
    check_tensor("input", input, torch.int16, ("R", "C"))
    if bits not in PACKED_BITS:
        raise ValueError(f"bits must be one of {list(PACKED_BITS)}, got {bits}")
    if input.shape[0] * bits % 32:
        raise ValueError(f"input must have rows for whole words of {bits}-bit codes, got {input.shape[0]}")
    check_tensor("output", output, torch.int32, (input.shape[0] * bits // 32, input.shape[1]))
    check_together(input, output=output)
    _check_codes("input", input, 0, (1 << bits) - 1)
    output.copy_(pack_stream(input, bits, 0))


@extension
def tensor_remap(tensor: Tensor, index: Tensor) -> None:
    """Permute the columns of a matrix in place: new[r, c] = old[r, index[c]].

    Args:
        tensor: [R, C] int32, changed.
        index: [C] int32 in [0, C).

    Raises:
        RuntimeError: a dtype, a shape, a device or (CPU tensors only) an index does not fit.
    """
    check_tensor("tensor", tensor, torch.int32, ("R", "C"))
    check_tensor("index", index, torch.int32, (tensor.shape[1],))
    check_together(tensor, index=index)
    check_index("index", index, tensor.shape[1], stop=tensor.shape[1])
    tensor.copy_(tensor[:, index.long()])


@extension
def tensor_remap_4bit(tensor: Tensor, index: Tensor) -> None:
    """Permute the columns of a matrix in place whose words hold eight columns each, the first one lowest.

    Args:
        tensor: [R, C / 8] int32, changed.
        index: [C] int32 in [0, C).

    Raises:
        RuntimeError: a dtype, a shape, a device or (CPU tensors only) an index does not fit.
    """
    check_tensor("tensor", tensor, torch.int32, ("R", "C / 8"))
    columns = tensor.shape[1] * 8
    check_tensor("index", index, torch.int32, (columns,))
    check_together(tensor, index=index)
    check_index("index", index, columns, stop=columns)
    tensor.copy_(pack_4bit(unpack_4bit(tensor)[:, index.long()]))


@extension
def stloader_read(filename: str, offset: int, size: int, target: Tensor) -> None:
    """Read bytes of a file into a tensor.

    Args:
        filename: the file.
        offset: where to start, in bytes.
        size: how many bytes, at most those of `target`.
        target: contiguous, any dtype and shape; its first `size` bytes are written.

    Raises:
        RuntimeError: the file cannot be read or ends too early, or the target is too small or not contiguous.
    """
    if offset < 0 or size < 0:
        raise ValueError(f"offset and size must not be negative, got {offset} and {size}")
    if target.is_meta or not target.is_contiguous() or target.nbytes < size:
        got = f"{target.nbytes} on {target.device}, strides {target.stride()}"
        raise ValueError(f"target must hold {size} bytes in one piece, got {got}")
    memory = target.view(-1).view(torch.uint8)[:size]
    with Path(filename).open("rb") as file:
        fill = read_file(file.fileno(), offset)
        if target.device.type == "cpu":
            fill(memory, 0)
            return
        staged = torch.empty(min(size, CHUNK), dtype=torch.uint8, pin_memory=target.is_cuda)
        for start in range(0, size, CHUNK):
            part = staged[: min(CHUNK, size - start)]
            fill(part, start)
            memory[start : start + CHUNK].copy_(part)


@extension
def make_group_map(q_groups: Tensor, num_qrows: int) -> Tensor:
    """Say to which group each row of codes belongs, and how many rows of it are left, this one included.

    Args:
        q_groups: [2G] int16: bits of a group, its first row in q_weight.
        num_qrows: rows of q_weight.

    Returns:
        [2K] int16 on the device of q_groups: group and rows left of row 0, of row 1, and so on.

    Raises:
        RuntimeError: a dtype or shape does not fit, a width does not exist, or groups are out of order.
    """
    check_tensor("q_groups", q_groups, torch.int16, ("2 G",))
    flat = [value & 0xFFFF for value in q_groups.tolist()]
    if len(flat) % 2:
        raise ValueError(f"q_groups must hold pairs, got {len(flat)} numbers")
    bits, starts = flat[::2], [*flat[1::2], num_qrows]
    pieces = []
    for group, width in enumerate(bits):
        words = starts[group + 1] - starts[group]
        if width not in PACKED_BITS:
            raise ValueError(f"q_groups must hold bits of {list(PACKED_BITS)}, got {width} for group {group}")
        if words < 0 or starts[0] or words * 32 % width:
            problem = f"has {words} rows of words, from {starts[group]} to {starts[group + 1]}"
            raise ValueError(f"q_groups must start at 0 and cut {num_qrows} rows in order; group {group} {problem}")
        left = torch.arange(words * 32 // width, 0, -1)
        pieces.append(torch.stack([torch.full_like(left, group), left], dim=1))
    group_map = torch.cat(pieces).view(-1) if pieces else torch.zeros(0, dtype=torch.int64)
    return group_map.to(torch.int16).to(q_groups.device)


@extension
def matrix_fp16_to_q4(input: Tensor, output: Tensor, scales: Tensor) -> None:
    """Encode numbers in 4 bits, rotated by a Hadamard matrix, with one scale per 32 (`q4.py`).

    Args:
        input: fp16, contiguous, any shape with a multiple of 64 numbers. (The compiled module leaves out what follows
            the last multiple of 512.)
        output: uint8, contiguous, half as many, written.
        scales: fp16, contiguous, a 32nd as many, written.

    Raises:
        RuntimeError: a dtype, a size or a device does not fit.
    """
    _check_q4(input, output, scales)
    codes, steps = q4.encode(input)
    output.view(-1).copy_(codes)
    scales.view(-1).copy_(steps)


@extension
def matrix_q4_to_fp16(input: Tensor, scales: Tensor, output: Tensor) -> None:
    """Decode what `matrix_fp16_to_q4` encoded.

    Args:
        input: uint8, contiguous, a multiple of 32 bytes.
        scales: fp16, contiguous, a 16th as many.
        output: fp16, contiguous, twice as many, written.

    Raises:
        RuntimeError: a dtype, a size or a device does not fit.
    """
    _check_q4(output, input, scales)
    output.view(-1).copy_(q4.decode(input.view(-1), scales.view(-1)))


def _check_q4(numbers: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Raise unless these tensors hold the same matrix in fp16 and in Q4."""
    if numbers.numel() % q4.RUN:
        raise ValueError(f"the fp16 tensor must hold a multiple of {q4.RUN} numbers, got {numbers.numel()}")
    expected = {"fp16 tensor": (numbers, torch.float16, 1), "uint8 tensor": (codes, torch.uint8, 2)}
    for name, (tensor, dtype, share) in {**expected, "scales": (scales, torch.float16, q4.GROUP)}.items():
        check_tensor(f"the {name}", tensor, dtype, ("any",) * tensor.dim())
        if tensor.numel() * share != numbers.numel() or not tensor.is_contiguous():
            raise ValueError(
                f"the {name} must hold {numbers.numel() // share} numbers in one piece, got {tensor.numel()}"
            )
    check_together(numbers, codes=codes, scales=scales)
