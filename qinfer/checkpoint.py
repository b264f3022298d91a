"""Checkpoint: a folder of safetensors files and their JSON, read lazily and by slice.

A checkpoint maps names to tensors on disk. It knows nothing of formats or models. The files are memory-mapped: opening
reads only headers, and a slice reads only its own bytes. On their way to a GPU tensors are not taken from the mapping:
their bytes are read into page-locked buffers (staging.py), so a model larger than the host's memory can be loaded.

What may be opened is decided here, once: files directly inside the folder, named without a path, and regular after
following links (the Hugging Face cache is made of links). A tensor's name is never used as a path.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qinfer.errors import CheckpointError, UnsupportedError
from qinfer.staging import CudaLink, Staging, from_bytes, read_file

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Args:
        file: the file.

    Returns:
        The object.

    Raises:
        CheckpointError: the file is missing, unreadable, not JSON (the text names the line), or holds no object.
    """
    if not file.is_file():
        raise CheckpointError(file, None, "is missing")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as problem:
        text = f"is not valid JSON: line {problem.lineno}, column {problem.colno}: {problem.msg}"
        raise CheckpointError(file, None, text) from problem
    except (OSError, ValueError, RecursionError) as problem:
        # ValueError covers text that is not UTF-8 and integers too long for Python, RecursionError too many brackets.
        raise CheckpointError(file, None, f"cannot be read as JSON: {problem}") from problem
    if not isinstance(value, dict):
        raise CheckpointError(file, None, f"must hold a JSON object, got {type(value).__name__}")
    return value


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of one small safetensors file to the CPU.

    Args:
        file: the file.

    Returns:
        The tensors by name; nothing of the file stays open.

    Raises:
        CheckpointError: the file is missing or damaged.
        UnsupportedError: torch has no such dtype.
    """
    if not file.is_file():
        raise CheckpointError(file, None, "is missing")
    tensors: dict[str, torch.Tensor] = {}
    try:
        with safe_open(file, framework="pt", device="cpu") as stored:
            for name in stored.keys():  # noqa: SIM118  no dictionary
                if (dtype := stored.get_slice(name).get_dtype()) not in _DTYPES:
                    known = ", ".join(_DTYPES)
                    raise UnsupportedError(f"{file}: {name}: dtype {dtype} cannot be read; these can: {known}")
                tensors[name] = stored.get_tensor(name).clone()
    except (SafetensorError, OSError) as problem:
        raise CheckpointError(file, None, f"cannot be read as safetensors: {problem}") from problem
    return tensors


class Checkpoint:
    """One folder with config.json and safetensors files.

    Attributes:
        path: the folder.
        config: config.json.
        generation_config: generation_config.json, empty if there is none.
        quant_config: the quantization settings, None if there are none; those of AutoGPTQ's side file always name their
            "quant_method".
    """

    def __init__(self, path: str | Path) -> None:
        """Open the folder at `path` and check that every tensor it promises is there.

        Args:
            path: the folder.

        Raises:
            ValueError: `path` is not a folder.
            CheckpointError: a file is missing, damaged, outside the folder, or does not hold what the index says.
        """
        self.path = Path(path)
        if not self.path.is_dir():
            found = "a file" if self.path.exists() else "nothing"
            raise ValueError(
                f"a checkpoint must be a folder with {CONFIG_FILE} and safetensors files; {path} is {found}"
            )
        self.config_file = self.path / CONFIG_FILE
        self.config = read_json(self.config_file)
        self.generation_config = _read_optional(self.path / "generation_config.json")
        self.quant_config = self._read_quant_config()
        index = self.path / INDEX_FILE
        is_indexed = index.exists() and not self._is_foreign(index)
        # Without an index the folder itself is what an error about a missing tensor can point at.
        self._source = index if is_indexed else self.path
        self._handles: dict[Path, Any] = {}
        self._shards: dict[Path, _Shard] = {}
        self._stagings: dict[torch.device, Staging] = {}
        self._files: dict[str, Path] = self._open_indexed(index) if is_indexed else self._open_unindexed()

    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""
        return frozenset(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def file(self, name: str) -> Path:
        """Return the file that holds tensor `name`.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self._files:
            raise self.error(name, "is missing")
        return self._files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of tensor `name` without reading it.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return tuple(self._stored(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of tensor `name` without reading it.

        Raises:
            CheckpointError: there is no such tensor.
            UnsupportedError: torch has no such dtype.
        """
        stored = self._stored(name).get_dtype()
        if stored not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise UnsupportedError(f"{self.file(name)}: {name}: dtype {stored} cannot be read; these can: {known}")
        return _DTYPES[stored]

    def read(self, name: str, device: str | torch.device = "cpu") -> torch.Tensor:
        """Read one tensor.

        Args:
            name: the tensor.
            device: where it goes. On the CPU it is a view of the mapped file and must not be written to.

        Returns:
            The tensor, contiguous.

        Raises:
            CheckpointError: there is no such tensor, or it cannot be read.
        """
        staging = self._staging(torch.device(device))
        if staging is not None:
            return self.upload(name, staging)
        self.dtype(name)
        try:
            tensor = self._handles[self.file(name)].get_tensor(name)
        except (SafetensorError, OSError) as problem:
            raise self.error(name, f"cannot be read: {problem}") from problem
        return _aligned(tensor).to(device)

    def upload(self, name: str, staging: Staging, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read a tensor, or the rows from `start` to `stop` of one, straight into the buffers in front of a device.

        Args:
            name: the tensor.
            staging: the way to the device.
            start: the first row, an index of dimension 0.
            stop: one past the last row; None takes all of a tensor, which may be a scalar.

        Returns:
            The tensor on the device, contiguous.

        Raises:
            CheckpointError: there is no such tensor, or it cannot be read.
        """
        shape, dtype = self.shape(name), self.dtype(name)
        row = math.prod(shape[1:]) * dtype.itemsize
        first, num_bytes = start * row, math.prod(shape) * dtype.itemsize
        file = self.file(name)
        try:
            shard = self._shards.get(file) or self._shards.setdefault(file, _Shard(file))
            offset, stored = shard.ranges[name]
            if stored != num_bytes:
                raise self.error(name, f"must take {num_bytes} bytes, got {stored}")
            if stop is not None:
                num_bytes, shape = (stop - start) * row, (stop - start, *shape[1:])
            data = staging.upload(num_bytes, read_file(shard.fd, offset + first))
        except (OSError, ValueError, KeyError) as problem:
            raise self.error(name, f"cannot be read: {problem}") from problem
        return from_bytes(data, dtype, shape)

    def read_slice(
        self, name: str, dim: int, start: int, stop: int, device: str | torch.device = "cpu"
    ) -> torch.Tensor:
        """Read rows or columns `start` to `stop` of one tensor; nothing else of it is touched.

        Args:
            name: the tensor.
            dim: the dimension to cut, counted from 0.
            start: the first index.
            stop: one past the last index.
            device: where it goes. On the CPU it may be a view of the mapped file and must not be written to.

        Returns:
            The slice, contiguous.

        Raises:
            ValueError: `dim`, `start` or `stop` is out of range.
            CheckpointError: there is no such tensor, or it cannot be read.
        """
        shape = self.shape(name)
        self.dtype(name)
        if not 0 <= dim < len(shape):
            raise ValueError(f"dim must be at least 0 and below {len(shape)} for {name}, got {dim}")
        if not 0 <= start <= stop <= shape[dim]:
            raise ValueError(f"{name} has {shape[dim]} entries in dimension {dim}, cannot take [{start}, {stop})")
        staging = self._staging(torch.device(device))
        if staging is not None and dim == 0:
            return self.upload(name, staging, start, stop)
        try:
            tensor = self._stored(name)[(slice(None),) * dim + (slice(start, stop),)]
        except (SafetensorError, OSError) as problem:
            raise self.error(name, f"cannot be read: {problem}") from problem
        tensor = _aligned(tensor.contiguous())
        # Strided in the file: gathered on the host, so that nothing but the slice crosses to the device.
        return tensor.to(device) if staging is None else staging.send(tensor)

    def error(self, name: str | None, problem: str) -> CheckpointError:
        """Return an error about tensor `name` that names its file; None means the checkpoint as a whole."""
        file = self.path if name is None else self._files.get(name, self._source)
        return CheckpointError(file, name, problem)

    def _staging(self, device: torch.device) -> Staging | None:
        """Return the way to a GPU, made when it is first needed; None for other devices, which are copied to simply."""
        if device.type != "cuda":
            return None
        if device not in self._stagings:
            self._stagings[device] = Staging(CudaLink(device))
        return self._stagings[device]

    def _stored(self, name: str) -> Any:  # noqa: ANN401  safetensors has no name for the type of its slices
        """Return the lazy view of one stored tensor."""
        return self._handles[self.file(name)].get_slice(name)

    def _read_quant_config(self) -> dict[str, Any] | None:
        """Read the quantization settings from config.json or from AutoGPTQ's side file."""
        settings = self.config.get("quantization_config")
        if settings is None:
            legacy = self.path / "quantize_config.json"
            # AutoGPTQ wrote this file before formats named themselves, so what does not name itself is GPTQ.
            return {"quant_method": "gptq", **read_json(legacy)} if legacy.exists() else None
        if not isinstance(settings, dict):
            problem = f"quantization_config must be an object, got {settings!r}"
            raise CheckpointError(self.config_file, None, problem)
        return settings

    def _is_foreign(self, index: Path) -> bool:
        """Say whether an index is of another folder: ExLlamaV2's converter copies the original's beside its output.

        It names none of the files that are here, and the files here are the converter's `output*.safetensors`.
        """
        weight_map = read_json(index).get("weight_map")
        here = {path.name for path in self.path.glob("*.safetensors")}
        if not isinstance(weight_map, dict) or not here or not all(name.startswith("output") for name in here):
            return False
        return here.isdisjoint(file for file in weight_map.values() if isinstance(file, str))

    def _open_indexed(self, index: Path) -> dict[str, Path]:
        """Open the files that the index names, and only those: other files may be leftovers or duplicates."""
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(index, None, "weight_map must be an object from tensor names to file names")
        for name, file in weight_map.items():
            if not _is_plain_name(file):
                raise CheckpointError(index, name, f"must name a file inside the folder, got {file!r}")
        files = {file: self.path / file for file in sorted(set(weight_map.values()))}
        missing = [file for file, path in files.items() if not path.is_file()]
        if missing:
            problem = f"names files that are not here: {_some(missing)}"
            if (self.path / SINGLE_FILE).is_file() and SINGLE_FILE not in weight_map.values():
                problem += f"; {SINGLE_FILE} is here, so the index may be stale: remove it if so"
            raise CheckpointError(index, None, problem)
        stored = {file: self._open(path) for file, path in files.items()}
        for name, file in weight_map.items():
            if name not in stored[file]:
                raise CheckpointError(files[file], name, f"is missing, although {INDEX_FILE} places it here")
        return {name: files[file] for name, file in weight_map.items()}

    def _open_unindexed(self) -> dict[str, Path]:
        """Open model.safetensors, or else every safetensors file of the folder if no tensor is in two of them."""
        single = self.path / SINGLE_FILE
        paths = [single] if single.is_file() else sorted(p for p in self.path.glob("*.safetensors") if p.is_file())
        if not paths:
            here = _some(sorted(entry.name for entry in self.path.iterdir()))
            raise CheckpointError(self.path, None, f"holds no safetensors file; it holds {here}")
        files: dict[str, Path] = {}
        for path in paths:
            for name in sorted(self._open(path)):
                if name in files:
                    problem = f"is also in {files[name].name}, and no {INDEX_FILE} says which one counts"
                    raise CheckpointError(path, name, problem)
                files[name] = path
        return files

    def _open(self, path: Path) -> frozenset[str]:
        """Map one file and return the names of its tensors."""
        try:
            handle: Any = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as problem:
            raise CheckpointError(path, None, f"cannot be opened as safetensors: {problem}") from problem
        self._handles[path] = handle
        return frozenset(handle.keys())


class _Shard:
    """One open file and where its tensors lie in it.

    Attributes:
        fd: the open file.
        ranges: tensor name → offset of its first byte, number of bytes.
    """

    def __init__(self, path: Path) -> None:
        """Open a file that `safe_open` has checked, and read its header."""
        file = path.open("rb")
        weakref.finalize(self, file.close)
        self.fd = file.fileno()
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        self.ranges: dict[str, tuple[int, int]] = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                self.ranges[name] = 8 + length + start, stop - start


def _read_optional(file: Path) -> dict[str, Any]:
    """Read a JSON file that may be absent."""
    return read_json(file) if file.exists() else {}


def _is_plain_name(file: object) -> bool:
    """Tell whether `file` is a bare file name: no folder, no parent, no drive, no NUL."""
    return isinstance(file, str) and file not in ("", ".", "..") and not set(file) & set("/\\:\0")


def _some(names: Iterable[str], limit: int = 8) -> str:
    """List names for a message, cut after `limit`."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return (", ".join(listed[:limit]) + more) or "nothing"


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor that starts between two elements: safetensors allows that, vectorized reads do not."""
    return tensor.clone() if tensor.data_ptr() % max(tensor.element_size(), 1) else tensor
