"""Fixtures and profiles for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from qinfer.env import settings as environment

if environment().interpret:
    from tests import interpreter

    interpreter.install()

from qinfer.kernels.device import arch
from qinfer.kernels.tiles import WGMMA

_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("ci", max_examples=50, derandomize=True, deadline=None, suppress_health_check=_SLOW_IS_FINE)
settings.register_profile("dev", max_examples=200, deadline=None, suppress_health_check=_SLOW_IS_FINE)
settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run: `kernel` needs a GPU or the interpreter, `gpu` needs a GPU."""
    has_gpu = torch.cuda.is_available()
    no_gpu = pytest.mark.skip(reason="needs a GPU")
    no_kernels = pytest.mark.skip(reason="needs a GPU or TRITON_INTERPRET=1")
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(no_gpu)
        if item.get_closest_marker("kernel") and not (has_gpu or environment().interpret):
            item.add_marker(no_kernels)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device on which kernels run here."""
    return torch.device("cuda" if torch.cuda.is_available() and not environment().interpret else "cpu")


@pytest.fixture(scope="session")
def hopper(device: torch.device) -> torch.device:
    """A GPU whose kernels are written in Gluon, which interpreters do not know."""
    if arch(device) not in WGMMA:
        pytest.skip(f"wgmma is an instruction of {', '.join(WGMMA)}")
    return device


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hand NaN-filled memory to kernels that ask for uninitialized memory, so that an unwritten element shows."""
    if request.node.get_closest_marker("kernel") is None:
        yield
        return

    def poison(function: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = function(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            return tensor

        return allocate

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give every test the same random stream."""
    torch.manual_seed(0)
