"""Sessions on disk: the pages of a text, as they stand in the pool, and what they belong to.

A file holds the ids of whole pages, the codes and scales of all layers, and a description of the model, the format and
the page size. Pages that were read are known to the prefix cache afterwards, so a prompt that begins with the text
computes the rest only. Nothing is converted: a file of another model or format is refused, and the refusal says what
differs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qinfer.cache.paged import PagedKVCache
from qinfer.engine.pages import PageTable
from qinfer.engine.prefix import keys
from qinfer.engine.sampling import SamplerState, SamplingParams
from qinfer.engine.sequence import Sequence
from qinfer.errors import CheckpointError, OutOfPages, UnsupportedError
from qinfer.models.model import Model
from qinfer.tensor_file import TensorFile, write_tensors

_VERSION = "1"
_SAMPLES = 64  # numbers of each tensor that tell one model's weights from another's
_SIDES = ("keys", "values")
_PLAIN = SamplingParams()


def save(path: Path, token_ids: Ids[int], model: Model, cache: PagedKVCache, pages: PageTable) -> int:
    """Write the pages with which a text begins, as far as they are known.

    Returns:
        The number of tokens that the file holds, a multiple of the page size.

    Raises:
        ValueError: no page of the text is in the pool.
        UnsupportedError: this process holds a part of the model only.
        OSError: the file cannot be written.
    """
    _check_alone(model)
    found = [pages.find(key) for key in _keys(token_ids, pages.page_size)]
    # Where some layer sees everything, what stands behind a page that is gone is of no use.
    if None in model.config.windows and None in found:
        del found[found.index(None) :]
    places = [place for place, page in enumerate(found) if page is not None]
    if not places:
        raise ValueError(
            f"no page of these {len(token_ids)} tokens is in the pool: that takes prefix_cache=True and "
            f"{pages.page_size} tokens at the least, computed, and not displaced by others since"
        )
    count = (places[-1] + 1) * pages.page_size
    tensors = {"token_ids": torch.tensor(token_ids[:count], dtype=torch.int32), "places": torch.tensor(places)}
    index = torch.tensor([page for page in found if page is not None], device=cache.device)
    for name, stored in _stored(model, cache):
        tensors[name] = stored[index].cpu()
    write_tensors(path, tensors, _description(model, cache))
    return count


@dataclass(frozen=True)
class Text:
    """What a file held, and where it stands now."""

    token_ids: list[int]
    pages: list[int]  # by their place in the text, -1 where there is none
    num_known: int  # tokens at the beginning whose pages were in the pool before


def load(path: Path, model: Model, cache: PagedKVCache, pages: PageTable) -> Text:
    """Read a file into free pages and make them known; pages that are known already stay as they are.

    Raises:
        CheckpointError: the file is damaged, or of another model, format or page size.
        OutOfPages: there are not enough free pages.
    """
    _check_alone(model)
    file = TensorFile(path)
    _check_description(file, _description(model, cache))
    token_ids, places = _check_tensors(file, model, cache)
    text_keys = _keys(token_ids, pages.page_size)
    found = {place: pages.find(text_keys[place]) for place in places}
    known = {place: page for place, page in found.items() if page is not None}
    new = [row for row, place in enumerate(places) if place not in known]
    # Shared meanwhile, so that making room for the others does not displace them.
    for page in known.values():
        pages.share(page)
    try:
        fresh = pages.allocate(len(new))
    except OutOfPages as problem:
        pages.free(known.values())
        raise OutOfPages(f"{path} needs {len(new)} pages: {problem}") from problem
    target, source = torch.tensor(fresh, dtype=torch.int64, device=cache.device), torch.tensor(new, dtype=torch.int64)
    for name, stored in _stored(model, cache) if new else ():
        stored[target] = file.read(name)[source].to(cache.device)
    for row, page in zip(new, fresh, strict=True):
        pages.publish(page, text_keys[places[row]])
    standing = {**known, **dict(zip((places[row] for row in new), fresh, strict=True))}
    # In the order of the text: its end is then displaced before its beginning.
    pages.free(standing[place] for place in places)
    first = next((place for place in range(len(text_keys)) if place not in known), len(text_keys))
    where = [standing.get(place, -1) for place in range(len(text_keys))]
    return Text(token_ids, where, first * pages.page_size)


def _check_alone(model: Model) -> None:
    if model.comm.size > 1:
        raise UnsupportedError("sessions are saved and loaded where one process holds the whole model")


def _keys(token_ids: Ids[int], page_size: int) -> list[bytes]:
    """Return the keys of the whole pages of a text."""
    text = Sequence(-1, tuple(token_ids), _PLAIN, SamplerState(_PLAIN, ()))
    return keys(text, len(token_ids) // page_size, page_size)


def _stored(model: Model, cache: PagedKVCache) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of all layers, [P, ...], with their names in a file."""
    for layer in range(model.config.num_layers):
        for side, stored in zip(_SIDES, cache.pages(layer), strict=True):
            for kind, tensor in zip(("codes", "scales"), stored.tensors(), strict=False):
                yield f"{layer}.{side}.{kind}", tensor


def _description(model: Model, cache: PagedKVCache) -> dict[str, str]:
    """Say what pages belong to: everything that keys and values follow from besides the ids."""
    config = dataclasses.asdict(model.config)
    formats = [[side.codec.name for side in cache.pages(layer)] for layer in range(model.config.num_layers)]
    return {
        "qinfer session": _VERSION,
        "config": json.dumps(config, default=sorted, sort_keys=True),
        "dtype": str(model.dtype),
        "weights": _digest(model),
        "KV formats": json.dumps(formats),
        "page size": str(cache.page_size),
    }


def _digest(model: Model) -> str:
    """Return a hash of the weights as the kernels read them: shapes, dtypes, and a few numbers of each tensor."""
    told, samples = [], []
    for part in [*model.decoder.tensors(), *((linear.operand, linear.bias) for linear in model.decoder.linears())]:
        for tensor in _tensors(part):
            told.append(f"{tensor.dtype} {list(tensor.shape)}")
            # Numbers all over the tensor, with other strides in each dimension, without a copy of the rest.
            steps = torch.arange(_SAMPLES, device=tensor.device)
            index = [(steps * (2 * place + 1) * 7919) % size for place, size in enumerate(tensor.shape)]
            samples.append(tensor[tuple(index)].contiguous().view(torch.uint8))
    content = torch.cat(samples).cpu().numpy().tobytes()
    return hashlib.blake2b(json.dumps(told).encode() + content, digest_size=16).hexdigest()


def _tensors(value: Any) -> Iterator[Tensor]:  # noqa: ANN401
    """Yield the tensors of an operand, in the order of its fields; empty ones say nothing."""
    if isinstance(value, Tensor):
        if value.numel():
            yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


def _check_description(file: TensorFile, here: dict[str, str]) -> None:
    """Refuse a file whose pages belong to something else."""
    if "qinfer session" not in file.about:
        raise CheckpointError(file.path, None, "is no session that qinfer has saved")
    differing = [name for name in here if file.about.get(name) != here[name]]
    if not differing:
        return
    name, there = differing[0], file.about.get(differing[0])
    if name == "config":
        problem = "another model: " + _differing_fields(there, here[name])
    elif name == "weights":
        problem = "another model: the sizes are the same, the weights are not"
    else:
        problem = f"{name} {there}, here it is {here[name]}"
    raise CheckpointError(file.path, None, f"was saved with {problem}")


def _differing_fields(there: str | None, here: str) -> str:
    """Name the fields of two configs that differ."""
    try:
        old, new = json.loads(there or ""), json.loads(here)
        fields = [name for name in new if name not in old or old[name] != new[name]]
        return ", ".join(f"{name} {old.get(name)!r}, here {new[name]!r}" for name in fields) or "fewer fields here"
    except (ValueError, TypeError, AttributeError):
        return "its config cannot be read"


def _check_tensors(file: TensorFile, model: Model, cache: PagedKVCache) -> tuple[list[int], list[int]]:
    """Check names, shapes and dtypes of everything in a file, and return its ids and the places of its pages."""
    expected = {name: (stored.shape[1:], stored.dtype) for name, stored in _stored(model, cache)}
    if missing := sorted({"token_ids", "places", *expected} ^ file.names):
        raise CheckpointError(file.path, missing[0], "is missing, or of no use here")
    ids, places = file.read("token_ids"), file.read("places")
    for name, tensor in (("token_ids", ids), ("places", places)):
        if tensor.dim() != 1 or tensor.is_floating_point() or not len(tensor):
            raise CheckpointError(
                file.path, name, f"must be a list of integers, got {list(tensor.shape)} {tensor.dtype}"
            )
    for name, (shape, dtype) in expected.items():
        tensor, wanted = file.read(name), [len(places), *shape]
        if list(tensor.shape) != wanted or tensor.dtype != dtype:
            problem = f"must be {wanted} {dtype}, got {list(tensor.shape)} {tensor.dtype}"
            raise CheckpointError(file.path, name, problem)
    num_pages, rest = divmod(len(ids), cache.page_size)
    if rest or not 0 <= int(ids.min()) <= int(ids.max()) < model.config.vocab_size:
        problem = f"must be whole pages of {cache.page_size} ids below {model.config.vocab_size}, got {len(ids)} ids"
        raise CheckpointError(file.path, "token_ids", problem)
    listed: list[int] = places.tolist()
    if sorted({*listed} & {*range(num_pages)}) != listed:
        raise CheckpointError(file.path, "places", f"must ascend within [0, {num_pages}), got {listed[:8]}")
    return ids.tolist(), listed
