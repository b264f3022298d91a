"""The ring of buffers, with a device that copies as late as it may."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from qinfer import staging as module
from qinfer.checkpoint import Checkpoint
from qinfer.errors import CheckpointError
from qinfer.staging import CudaLink, Staging, as_bytes, read_file
from tests import hostile


class LateTicket:
    def __init__(self, link: LateLink, number: int) -> None:
        self.link, self.number = link, number

    def synchronize(self) -> None:
        self.link.finish(self.number + 1)


class LateLink:
    """A stream that carries out copies in order, and none before somebody waits for it.

    A buffer that is filled again too early therefore always spoils the copy out of it.
    """

    def __init__(self) -> None:
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.done = 0
        self.buffers: list[Tensor] = []
        self.lock = threading.Lock()

    def buffer(self, num_bytes: int) -> Tensor:
        self.buffers.append(torch.zeros(num_bytes, dtype=torch.uint8))
        return self.buffers[-1]

    def target(self, num_bytes: int) -> Tensor:
        return torch.full((num_bytes,), 0xEE, dtype=torch.uint8)

    def copy(self, source: Tensor, target: Tensor) -> LateTicket:
        with self.lock:
            self.copies.append((source, target))
            return LateTicket(self, len(self.copies) - 1)

    def finish(self, count: int | None = None) -> None:
        """Carry out the first `count` copies, or all of them."""
        with self.lock:
            for source, target in self.copies[self.done : count]:
                target.copy_(source)
                self.done += 1


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALLEST_CHUNK", 3)


def some_bytes(length: int, *, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (length,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    num_buffers=st.integers(1, 4),
    buffer_bytes=st.integers(1, 20),
)
def test_every_byte_arrives(sizes: list[int], num_buffers: int, buffer_bytes: int) -> None:
    link = LateLink()
    ring = Staging(link, num_buffers=num_buffers, buffer_bytes=buffer_bytes)
    sources = [some_bytes(size, seed=seed) for seed, size in enumerate(sizes)]
    targets = [ring.send(source) for source in sources]
    link.finish()
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(source, target)
    assert len(link.buffers) in (0, num_buffers)
    assert all(len(buffer) == buffer_bytes for buffer in link.buffers)


def test_copies_start_in_order_whatever_order_reads_end_in() -> None:
    link = LateLink()
    ring = Staging(link, num_buffers=4, buffer_bytes=10)
    source = some_bytes(100)

    def fill(part: Tensor, start: int) -> None:
        time.sleep(0.004 if start // 10 % 2 == 0 else 0)
        part.copy_(source[start : start + len(part)])

    target = ring.upload(100, fill)
    link.finish()
    assert torch.equal(source, target)
    offsets = [part.data_ptr() - target.data_ptr() for _, part in link.copies]
    assert offsets == list(range(0, 100, 10))


def test_all_buffers_are_filled_at_the_same_time() -> None:
    barrier = threading.Barrier(4, timeout=20)
    ring = Staging(LateLink(), num_buffers=4, buffer_bytes=10)
    # Each fill ends only when four of them run.
    ring.upload(40, lambda part, start: barrier.wait() and None)
    assert not barrier.broken


def test_a_failed_read_leaves_a_ring_that_works() -> None:
    link = LateLink()
    ring = Staging(link, num_buffers=3, buffer_bytes=10)
    late = []

    def fill(part: Tensor, start: int) -> None:
        if start == 10:
            raise OSError("the disk is gone")
        time.sleep(0.02)
        part.fill_(9)
        late.append(start)

    with pytest.raises(OSError, match="the disk is gone"):
        ring.upload(60, fill)
    written = len(late)
    source = some_bytes(64)
    target = ring.send(source)
    link.finish()
    assert torch.equal(source, target)
    assert len(late) == written  # nobody was still writing when the error came out


def test_numbers_of_the_ring_are_checked() -> None:
    for numbers in ({"num_buffers": 0}, {"buffer_bytes": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            Staging(LateLink(), **numbers)


DTYPES = [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16]
DTYPES += [torch.float32, torch.float64, torch.float8_e4m3fn]


def stored() -> dict[str, Tensor]:
    """One tensor of every dtype, and some odd shapes."""
    bits = some_bytes(9 * 8 * 8).view(9, 64)
    tensors = {str(dtype): bits.clone().view(dtype) for dtype in DTYPES[1:]}
    return {
        **tensors,
        "bool": some_bytes(9, seed=1) > 99,
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "large": some_bytes(1000).view(torch.int32).view(50, 5),
    }


def check_folder(folder: Path, ring: Staging, finish: threading.Event | LateLink) -> None:
    hostile.write_llama(folder)
    save_file(stored(), folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    got = {name: checkpoint.upload(name, ring) for name in stored()}
    part = checkpoint.upload("large", ring, 7, 31)
    if isinstance(finish, LateLink):
        finish.finish()
    for name, tensor in stored().items():
        assert got[name].dtype == tensor.dtype
        assert got[name].shape == tensor.shape
        assert torch.equal(as_bytes(got[name].cpu()), as_bytes(tensor)), name
    assert torch.equal(part.cpu(), stored()["large"][7:31])


def test_tensors_of_a_file_arrive_bit_for_bit(tmp_path: Path) -> None:
    link = LateLink()
    check_folder(tmp_path, Staging(link, num_buffers=3, buffer_bytes=64), link)
    # Larger than the ring, so that buffers were used more than once.
    assert len(link.copies) > 3 * len(stored())


def test_a_tensor_at_an_odd_byte_arrives(tmp_path: Path) -> None:
    hostile.write_llama(tmp_path)
    values = torch.arange(120.0).reshape(12, 10)
    hostile.write_raw(tmp_path, "odd", "F32", (12, 10), values.numpy().tobytes())
    checkpoint, link = Checkpoint(tmp_path), LateLink()
    ring = Staging(link, num_buffers=2, buffer_bytes=64)
    whole, part = checkpoint.upload("odd", ring), checkpoint.upload("odd", ring, 3, 5)
    link.finish()
    assert torch.equal(whole, values)
    assert torch.equal(part, values[3:5])


def test_a_file_that_shrinks_after_opening_is_an_error(tmp_path: Path) -> None:
    checkpoint = Checkpoint(hostile.write_llama(tmp_path))
    # Reads of a mapping that lost its file would end the process instead.
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 4000)
    ring = Staging(LateLink())
    last = max(checkpoint.names(), key=lambda name: hostile_offset(tmp_path, name))
    with pytest.raises(CheckpointError, match=r"cannot be read: the file ends at byte") as caught:
        checkpoint.upload(last, ring)
    assert caught.value.tensor == last


def hostile_offset(folder: Path, name: str) -> int:
    import json  # noqa: PLC0415

    data = (folder / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return int(header[name]["data_offsets"][0])


def test_a_strided_view_is_sent(tmp_path: Path) -> None:
    link = LateLink()
    matrix = torch.randn(40, 30)
    target = Staging(link, num_buffers=2, buffer_bytes=100).send(matrix[:, 3:17])
    link.finish()
    assert torch.equal(target, matrix[:, 3:17])


def test_reading_goes_on_after_a_short_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    preadv = module.os.preadv
    monkeypatch.setattr(module.os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:7]], offset))
    part = torch.zeros(50, dtype=torch.uint8)
    with (tmp_path / "file").open("rb") as file:
        read_file(file.fileno(), 20)(part, 10)
    assert part.tolist() == list(range(30, 80))


@pytest.mark.gpu
@pytest.mark.parametrize("buffer_bytes", [64, 1 << 20])
def test_on_a_gpu(tmp_path: Path, device: torch.device, buffer_bytes: int) -> None:
    ring = Staging(CudaLink(device), num_buffers=3, buffer_bytes=buffer_bytes)
    check_folder(tmp_path / "a", ring, threading.Event())
    matrix = torch.randn(400, 300)
    assert torch.equal(ring.send(matrix[:, 3:170]).cpu(), matrix[:, 3:170])


@pytest.mark.gpu
def test_checkpoint_reads_to_a_gpu(tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALLEST_CHUNK", 1 << 20)
    hostile.write_llama(tmp_path)
    # More than all buffers hold, so that each is used several times.
    large = torch.randint(-(2**31), 2**31, (50_000, 1000), dtype=torch.int32)
    odd = {"large": large, **hostile.llama_tensors()}
    save_file(odd, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in odd.items():
        got = checkpoint.read(name, device)
        assert got.is_cuda
        assert torch.equal(got.cpu(), tensor)
    for dim, start, stop in ((0, 17, 49_000), (1, 3, 998), (0, 5, 5)):
        got = checkpoint.read_slice("large", dim, start, stop, device)
        assert got.is_cuda
        assert got.is_contiguous()
        assert torch.equal(got.cpu(), large.narrow(dim, start, stop - start))
