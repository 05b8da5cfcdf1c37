"""Settings of every test: fixed seeds, no autotuning, and who runs where (``gpu``, ``interpreter``)."""

import os
from collections.abc import Iterator

# Before univid is imported: kernels run in their default configuration, and nothing outside chooses a backend.
os.environ["UNIVID_AUTOTUNE"] = "0"
os.environ.pop("UNIVID_BACKEND", None)

import pytest
import torch
from hypothesis import settings

settings.load_profile("ci")  # without deadlines, and with the same examples every time

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it as its kernels are decorated


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist's
def pytest_cmdline_main(config: pytest.Config) -> None:
    """``pytest -m gpu`` runs in several processes: most of its time goes to compiling kernels, on one core each."""
    if hasattr(config, "workerinput"):  # one of them
        return
    if config.option.markexpr != "gpu" or not config.pluginmanager.has_plugin("xdist") or not torch.cuda.is_available():
        return
    if config.option.numprocesses is None and not config.option.usepdb:
        config.option.numprocesses = min(8, (os.cpu_count() or 2) // 2)
    if config.option.numprocesses and config.option.dist == "no":
        config.option.dist = "loadgroup"


def pytest_configure(config: pytest.Config) -> None:
    # The tensors are small: on a busy machine threads that wait for each other cost more than they save.
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "xdist_group(name): tests that one process runs, for they need much memory")
    config.addinivalue_line("markers", "interpreter: needs TRITON_INTERPRET=1 (test_triton_interpreter.py sets it)")


@pytest.hookimpl(trylast=True)  # once -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = [item for item in items if bool(item.get_closest_marker("interpreter")) != INTERPRETED]
    if others:
        items[:] = [item for item in items if item not in set(others)]
        config.hook.pytest_deselected(items=others)
    needing = sum(item.get_closest_marker("gpu") is not None for item in items)
    if needing and not torch.cuda.is_available():
        raise pytest.UsageError(f"{needing} of the selected tests need an NVIDIA GPU, and torch finds none here")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _shared_card(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test is done with, other processes may need."""
    yield
    if request.node.get_closest_marker("gpu") is not None:
        torch.cuda.empty_cache()
