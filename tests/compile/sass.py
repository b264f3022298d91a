"""What the assembly of a kernel shows that numbers on a CPU cannot: products that read from nowhere.

Tensor cores of sm_90 find an operand in shared memory by a description of 64 bits in two uniform registers. ptxas 12.8
(Triton 3.6) leaves out the first half of one where two descriptions of the same place differ in their form; such a
kernel reads what it finds. It shows as a uniform register that is read and that no instruction above has written.

They also work while the program goes on: until a wait says that they have ended, their sums may not be touched, nor the
registers overwritten from which they take their first operand. A kernel that has its waits in the wrong places shows as
an instruction that does either.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*([^;]*);")
_UNIFORM = re.compile(r"\bUR(\d+)")
_WRITERS = ("U", "R2UR", "S2UR", "VOTEU", "LDCU", "REDUX", "CREDUX")
_COMPARISONS = ("UISETP", "UPLOP", "UFSETP", "UTMA", "UBLK", "UCGABAR", "USETMAXREG")
_REGISTER = re.compile(r"\bR(\d+)\b")
_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x\d+\.F(32|16)")
_WITHOUT_RESULT = ("ST", "LDGSTS", "RED", "BAR", "BRA", "EXIT", "MEMBAR", "UBLK", "SYNCS", "WARPGROUP", "LDGDEPBAR")


def unwritten(listing: str) -> list[str]:
    """Return the instructions that read a uniform register that no instruction above them has written.

    Args:
        listing: what `cuobjdump -sass` prints of one kernel, in the order of addresses.
    """
    written: set[int] = set()
    found = []
    for _, operation, text in _LINE.findall(listing):
        operands = [operand.strip() for operand in text.split(",")]
        if operation.startswith("ULOP3") and operands[0].startswith("UP"):
            operands = operands[1:]  # a predicate that it writes as well
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


@dataclass(frozen=True)
class _Product:
    """A product of the tensor cores: the registers of its sums and those of its first operand, and its place."""

    sums: range
    weights: range
    group: int


def disturbed(listing: str) -> list[str]:
    """Return the instructions that touch registers of a product of the tensor cores that may not have ended.

    The listing is followed from top to bottom, and every loop that ends with products under way twice.

    Args:
        listing: what `cuobjdump -sass` prints of one kernel, in the order of addresses.
    """
    lines = [(int(address, 16), operation, text.strip()) for address, operation, text in _LINE.findall(listing)]
    places = {address: number for number, (address, *_) in enumerate(lines)}
    flying: list[_Product] = []
    groups, at, repeated = 0, 0, set[int]()
    found: dict[str, None] = {}
    while at < len(lines):
        _, operation, text = lines[at]
        at += 1
        kind = _PRODUCT.match(operation)
        if kind is not None:
            flying.append(_product(kind, text, groups))
            groups += "gsb0" in text
        elif operation.startswith("WARPGROUP.DEPBAR"):
            flying = [product for product in flying if product.group >= groups - int(text.rsplit(",", 1)[1], 16)]
        elif operation == "BRA" and flying and at not in repeated:
            target = places.get(int(text.split()[-1].strip("`()"), 16) if "0x" in text else -1, at)
            repeated.add(at)
            at = min(at, target)
        elif flying and _touches(operation, text, flying):
            found[f"{operation} {text}"] = None
    return list(found)


def is_serialized(listing: str) -> bool:
    """Return whether every product is waited for by itself: ptxas does that where it cannot follow who reads what."""
    operations = [operation for _, operation, _ in _LINE.findall(listing)]
    products = sum(operation.startswith("HGMMA") for operation in operations)
    return 0 < products <= sum(operation.startswith("WARPGROUP.ARRIVE") for operation in operations)


def _product(kind: re.Match[str], text: str, group: int) -> _Product:
    operands = [operand.strip() for operand in text.split(",")]
    sums, weights = (int(match[1]) if (match := _REGISTER.match(operand)) else -1 for operand in operands[:2])
    size = int(kind[1]) // (2 if kind[2] == "32" else 4)
    return _Product(range(sums, sums + size), range(weights, weights + 4) if weights >= 0 else range(0), group)


def _touches(operation: str, text: str, flying: list[_Product]) -> bool:
    """Return whether an instruction reads or writes sums of a product, or writes its first operand."""
    operands = text.split(",")
    first = None if operation.startswith(_WITHOUT_RESULT) else _REGISTER.match(operands[0].strip())
    count = 4 if ".M88.4" in operation else 2 if ".M88.2" in operation or ".MT88.2" in operation else _width(operation)
    written = range(int(first[1]), int(first[1]) + count) if first is not None else range(0)
    named = {int(number) for number in _REGISTER.findall(text)} | set(written)
    return any(not named.isdisjoint(product.sums) or any(r in product.weights for r in written) for product in flying)
