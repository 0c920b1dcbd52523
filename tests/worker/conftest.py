import sys

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    from tinymodel import make

    return make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread():
    """Colleagues and other tests share the cores."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
