import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    from tinymodel import make

    return make(tmp_path_factory.mktemp("tiny"))
