"""What holds for every test: one thread, no network, fixed seeds, poisoned uninitialised memory."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# Hundreds of small graphs are traced once each: remembering what operations give costs a quarter
# of that and is never used, and neither is it worth looking for garbage after every one.
os.environ["TORCH_FAKE_TENSOR_DISPATCH_CACHE"] = "0"
os.environ["TORCH_DYNAMO_RUN_GC_AFTER_COMPILE"] = "0"

import golden_files
import golden_forms
import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

GPU = torch.cuda.is_available()
if not GPU:
    # Read when a kernel is decorated, so it has to be set before any kernel module is imported.
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)


def _no_device(seed: int) -> None:
    """Seed no device, since there is none."""


# For each kind of device that is not there, torch.manual_seed writes down the whole stack of its
# caller, in case the device comes later: more time than most small tests take.
for _kind in (torch.cuda, torch.xpu, torch.mtia):
    if not _kind.is_available():
        _kind.manual_seed_all = _no_device

# The asserts of the shared helpers should explain themselves like those of the tests.
pytest.register_assert_rewrite("zoo.testing")
pytest_plugins = ["processor_time", "record_fixtures"]

settings.register_profile("zoo", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("zoo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is none: the one place that decides it."""
    if GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Start every test from the same random state."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries under test may use the global state)
    torch.manual_seed(0)


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate(*args: Any, **kwargs: Any) -> Tensor:
        x = make(*args, **kwargs)
        if torch.compiler.is_compiling():
            return x
        if x.is_floating_point() or x.is_complex():
            with torch.no_grad():
                x.fill_(torch.nan)
        return x

    return allocate


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised floating-point memory with NaN, so that reading it shows."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture
def golden() -> Callable[[str], golden_files.Golden]:
    """Loader of tests/golden/<name>.safetensors: (tensors, metadata with JSON values read)."""
    return golden_files.read


@pytest.fixture
def other_golden(tmp_path: Path) -> Callable[[str], golden_files.Golden]:
    """Loader of another file of the form of tests/golden/<name>.safetensors, made for the test.

    A golden test holds for any file of its form, so what it compares is compared in these too.
    """

    def load(name: str) -> golden_files.Golden:
        path = tmp_path / f"{name}.safetensors"
        golden_files.write(path, *golden_forms.make(name))
        return golden_files.load(path)

    return load


@pytest.fixture
def many_strips() -> Iterator[None]:
    """Make the engine cut even tiny passes into many strips of rows and samples."""
    from zoo.testing.subject import tiny_strips

    with tiny_strips():
        yield
