import sys

import pytest

NO_GPU = "NOT TESTED ON A GPU"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    from tinymodel import make

    return make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Where the test computes: every test that asks for it runs on the CPU, and on a GPU if there is one."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{NO_GPU}: torch {torch.__version__} finds no CUDA device on this machine")
    return request.param


def pytest_terminal_summary(terminalreporter):
    """Skipped tests are easily overlooked; that nothing ran on a GPU should not be."""
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", ())]
    missed = [reason for reason in reasons if NO_GPU in reason]
    if missed:
        terminalreporter.write_line(f"{len(missed)} tests {missed[0].removeprefix('Skipped: ')}", yellow=True)


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread():
    """Colleagues and other tests share the cores."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
