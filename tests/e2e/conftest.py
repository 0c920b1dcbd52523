"""Stacks shared by the end-to-end tests: echo workers without weights, and the demo model in this environment."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e import stacks

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "demo"

ECHO = """
models:
  echo: {engine: echo, workers: 2, slots: 8}
  slow: {engine: echo, slots: 8, echo: {rate: 50, tokens: 100000}}
"""

DEMO_MODELS = f"""
environments:
  here: {{path: "{sys.prefix}"}}
models:
  default: {{base_model: "{DEMO}/base", environment: here, workers: 2, torch_threads: 1}}
  tools: {{base_model: "{DEMO}/base", adapter_dir: "{DEMO}/adapters/tools", environment: here, torch_threads: 1}}
  shout: {{base_model: "{DEMO}/base", adapter_dir: "{DEMO}/adapters/shout", environment: here, torch_threads: 1}}
"""


@pytest.fixture(scope="session")
def home() -> Iterator[Path]:
    """A short folder (socket paths are limited) for everything the stacks write."""
    folder = Path(tempfile.mkdtemp(prefix="lmx-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def echo_config(tmp_path: Path) -> Path:
    path = tmp_path / "llm_backends.yaml"
    path.write_text(ECHO)
    return path


@pytest.fixture(scope="session")
def echo_stack(home: Path) -> Iterator[stacks.Stack]:
    config = home / "echo.yaml"
    config.write_text(ECHO)
    stack = stacks.start(config, home, folder=home / "echo")
    yield stack
    assert stack.stop() == 0


@pytest.fixture(scope="session")
def demo_stack(home: Path) -> Iterator[stacks.Stack]:
    config = home / "demo.yaml"
    config.write_text(DEMO_MODELS)
    stack = stacks.start(config, home, folder=home / "demo")
    yield stack
    assert stack.stop() == 0


@pytest.fixture(scope="session")
def examples() -> dict[str, Any]:
    """What the demo model is known to do: ``loops`` with their calls and results, ``chats`` with their answers."""
    return json.loads((DEMO / "train" / "examples.json").read_text())
