"""Folders that look like models and adapters, and a home of their own for what the launcher writes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fakemodels import write_adapter, write_model
from launcher.wheels import write_workers_needs


@pytest.fixture(scope="session")
def needs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheels of what the worker needs."""
    folder = tmp_path_factory.mktemp("needs")
    write_workers_needs(folder)
    return folder


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with a model ``base`` and an adapter ``lora``."""
    write_model(tmp_path / "base")
    write_adapter(tmp_path / "lora")
    return tmp_path


@pytest.fixture
def write(models: Path) -> Callable[[str], Path]:
    """Writes a configuration beside the folders of ``models``."""

    def writer(text: str) -> Path:
        file = models / "llm_backends.yaml"
        file.write_text(text)
        return file

    return writer


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """User folders of this test's own, short because socket paths are limited."""
    folder = Path(tempfile.mkdtemp(prefix="lmxl-"))
    for variable in ("XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(folder / variable.split("_")[1].lower()))
    (folder / "runtime").mkdir(mode=0o700)
    monkeypatch.delenv("LOOPMUX_ENDPOINT", raising=False)
    monkeypatch.delenv("LOOPMUX_CONFIG", raising=False)
    yield folder
    shutil.rmtree(folder)
