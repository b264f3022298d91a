"""What the assembly of a kernel shows that numbers on a CPU cannot: products that read from nowhere.

Tensor cores of sm_90 find an operand in shared memory by a description of 64 bits in two uniform registers. ptxas 12.8
(Triton 3.6) leaves out the first half of one where two descriptions of the same place differ in their form; such a
kernel reads what it finds. It shows as a uniform register that is read and that no instruction above has written.
"""

from __future__ import annotations

import re

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*([^;]*);")
_UNIFORM = re.compile(r"\bUR(\d+)")
_WRITERS = ("U", "R2UR", "S2UR", "VOTEU", "LDCU", "REDUX", "CREDUX")
_COMPARISONS = ("UISETP", "UPLOP", "UFSETP", "UTMA", "UBLK", "UCGABAR", "USETMAXREG")


def unwritten(listing: str) -> list[str]:
    """Return the instructions that read a uniform register that no instruction above them has written.

    Args:
        listing: what `cuobjdump -sass` prints of one kernel, in the order of addresses.
    """
    written: set[int] = set()
    found = []
    for operation, text in _INSTRUCTION.findall(listing):
        operands = [operand.strip() for operand in text.split(",")]
        target = _UNIFORM.fullmatch(operands[0])
        is_writer = operation.startswith(_WRITERS) and not operation.startswith(_COMPARISONS)
        if target is not None and is_writer:
            operands = operands[1:]
        read = {register for operand in operands for register in _read(operation, operand)}
        if not read <= written:
            found.append(f"{operation} {text.strip()}")
        if target is not None and is_writer:
            written |= set(range(int(target[1]), int(target[1]) + _width(operation)))
    return found


def _width(operation: str) -> int:
    """Return how many registers an operation writes."""
    return 4 if ".128" in operation else 2 if ".64" in operation or "WIDE" in operation else 1


def _read(operation: str, operand: str) -> list[int]:
    """Return the uniform registers that an operand names, or names the first of."""
    named = [int(number) for number in _UNIFORM.findall(operand)]
    if "gdesc[" in operand:  # of two descriptions the second; the first is there where both operands are in memory
        return [number + half for number in named for half in (2, 3)]
    if "desc[" in operand or operation.startswith("UIADD3.64"):
        return [number + half for number in named for half in (0, 1)]
    return named
