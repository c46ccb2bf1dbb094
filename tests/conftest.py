"""Settings for every test: no network, one thread a worker, and what is skipped or marked by where it lives."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

# Before torch and transformers are imported anywhere; subprocesses of the tests inherit it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# Threads that wait for each other sleep: spinning makes two workers on two cores many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "integrations" and item.path.name.startswith("test_transformers"):
            item.add_marker("transformers")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Commands set variables for the libraries they load, and silence our log; the next test, and its subprocesses,
    must not see that."""
    before, level = dict(os.environ), logging.getLogger("kbit").level
    yield
    logging.getLogger("kbit").setLevel(level)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers whatever ran before, so that a failure can be repeated alone."""
    torch.manual_seed(0)
