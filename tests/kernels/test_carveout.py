"""All kernels of the package ask for the same division of a multiprocessor's memory, and no others do."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from triton import knobs

from qinfer.kernels import carveout
from qinfer.kernels.overlap import overlap
from qinfer.kernels.silu_mul import silu_mul


class FakeDriver:
    """Keeps what it is asked for, and answers with one status."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.asked: list[tuple[int | None, int, int]] = []

    def cuFuncSetAttribute(self, function: ctypes.c_void_p, attribute: int, value: int) -> int:
        self.asked.append((function.value, attribute, value))
        return self.status


@pytest.fixture
def hooked() -> Iterator[None]:
    """Install the hook, and leave Triton's list of hooks as it was."""
    hooks = knobs.runtime.kernel_load_end_hook
    before = list(hooks.calls)
    carveout.share_alike.cache_clear()
    carveout.share_alike()
    yield
    hooks.calls[:] = before
    carveout.share_alike.cache_clear()


def load(name: str, function: int = 7) -> None:
    """Say what Triton says behind loading a kernel."""
    knobs.runtime.kernel_load_end_hook(1, function, name, {}, "0123")


@pytest.mark.usefixtures("hooked")
def test_only_kernels_of_the_package_are_asked_to_prefer_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDriver(0)
    monkeypatch.setattr(carveout, "driver", lambda: fake)
    load("_matmul_kernel", 5)
    load("triton_poi_fused_add_0", 6)
    load("_silu_mul_kernel", 7)
    assert fake.asked == [(5, 9, 100), (7, 9, 100)]


@pytest.mark.usefixtures("hooked")
def test_the_hook_is_installed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDriver(0)
    monkeypatch.setattr(carveout, "driver", lambda: fake)
    carveout.share_alike.cache_clear()
    carveout.share_alike()
    load("_rmsnorm_kernel")
    assert len(fake.asked) == 1


@pytest.mark.usefixtures("hooked")
def test_a_refusal_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carveout, "driver", lambda: FakeDriver(801))
    with pytest.warns(UserWarning, match="_rmsnorm_kernel a preference for shared memory: CUresult 801"):
        load("_rmsnorm_kernel")


@pytest.mark.gpu
def test_a_loaded_kernel_has_the_preference() -> None:
    x = torch.ones(2, 2 * 1234, device="cuda")  # a width of its own, so that the kernel is not loaded yet
    if not overlap(x)["OVERLAP"]:
        pytest.skip("on this GPU no kernels overlap, and none is asked")
    loaded: list[tuple[str, int]] = []

    def note(module: int, function: int, name: str, metadata_group: dict[str, str], key: str) -> None:
        loaded.append((name, function))

    knobs.runtime.kernel_load_end_hook.add(note)
    try:
        silu_mul(x)
    finally:
        knobs.runtime.kernel_load_end_hook.remove(note)
    assert [name for name, _ in loaded] == ["_silu_mul_kernel"]
    value = ctypes.c_int(-2)
    status = carveout.driver().cuFuncGetAttribute(ctypes.byref(value), 9, ctypes.c_void_p(loaded[0][1]))
    assert (status, value.value) == (0, carveout.ALL_SHARED)
