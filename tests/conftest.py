"""What all tests share: fixed randomness, no network, and the rules for tests that need a GPU or much time."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial

import hypothesis
import pytest
from command_line import Run, run_command
from ray_machines import ray_machines  # noqa: F401 - a fixture

# Before transformers is imported anywhere: nothing in a test may look for a model on the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.pop("COLUMNS", None)  # of the terminal that the tests are started from; pytest-xdist hands it on

# A script's background job ignores Ctrl-C, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, so that a failure here is a failure everywhere; a shared machine may be slow.
hypothesis.settings.register_profile("seeded", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("seeded")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the long form of checks that have a short form")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="long form; run it with --slow"))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    # Where a GPU is known to be, such as on the machine that records figures, SLLM_REQUIRE_GPU=1 lets no test skip
    # because it was not found: they fail.
    if on_gpu and os.environ.get("SLLM_REQUIRE_GPU") != "1":
        from sllm_mini.device import why_no_cuda

        reason = why_no_cuda()
        if reason is not None:
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason=f"needs a CUDA GPU: {reason}"))


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process, as the script does."""
    return partial(run_command, capfd)


@pytest.fixture(autouse=True, scope="module")
def imported_modules_are_no_garbage() -> None:
    """Hundreds of tests collect garbage before they look for what is left. What torch and transformers brought along, some
    hundred thousand objects, is gone through here once for each module, not 0.2 s long in each of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """For modules of tiny models, which lose more to waking threads than they win."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_figure_stays() -> Iterator[None]:
    yield
    if (pyplot := sys.modules.get("matplotlib.pyplot")) is not None:
        pyplot.close("all")
