"""Where tests compute, on how many threads, how properties are tried, what the last lines say of what did not run."""

import os
import signal
import sys

import pytest
import structlog
from hypothesis import settings

# No deadline per example: the machine may be busy. On CI the same examples every time, so that a red run repeats.
settings.register_profile("loopmux", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("loopmux")

NO_GPU = "NOT TESTED ON A GPU"


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Where the test computes: every test that asks for it runs on the CPU, and on a GPU if there is one."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{NO_GPU}: torch {torch.__version__} finds no CUDA device on this machine")
    return request.param


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread():
    """Tests run beside each other, one process a core; more threads than cores only wait for each other."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard():
    """A shell has what it starts in the background ignore Ctrl-C, and so would all that the tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def plain_tracebacks():
    """Where rich is installed, structlog draws the values of all variables beside a traceback: seconds for a model."""
    renderer = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[*structlog.get_config()["processors"][:-1], renderer])


def pytest_terminal_summary(terminalreporter):
    """Skipped tests are easily overlooked; that nothing ran on a GPU should not be.

    It is here because the process that reports on parallel tests reads no deeper ``conftest.py``.
    """
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", ())]
    missed = [reason for reason in reasons if NO_GPU in reason]
    if missed:
        terminalreporter.write_line(f"{len(missed)} tests {missed[0].removeprefix('Skipped: ')}", yellow=True)
