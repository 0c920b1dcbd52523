"""Workers run in environments that were built for their models, of packages that exclude each other, under one broker;
and see nothing of the application's.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

import loopmux
from e2e import stacks
from e2e.conftest import DEMO, ROOT

CONFIG = f"""
environments:
  own:
    python: "{sys.version_info.major}.{sys.version_info.minor}"
    requirements: [torch==2.13.0, transformers==4.57.6, peft==0.18.1]
  newer:
    python: "{sys.version_info.major}.{sys.version_info.minor}"
    requirements: [torch==2.13.0, transformers==5.23.0, peft==0.21.2]
models:
  shout: {{base_model: "{DEMO}/base", adapter_dir: "{DEMO}/adapters/shout", environment: own}}
  tools: {{base_model: "{DEMO}/base", adapter_dir: "{DEMO}/adapters/tools", environment: own}}
  louder: {{base_model: "{DEMO}/base", adapter_dir: "{DEMO}/adapters/shout", environment: newer}}
"""

EXPECTED = {
    "own": ("4.57.6", "0.18.1", "plain", "transformers 4.57.6 is older than 5"),
    "newer": ("5.23.0", "0.21.2", "slots", "the model and every adapter can share a forward"),
}
"""Versions of transformers and peft, the engine that serves, and why."""


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@pytest.fixture
def planted() -> Iterator[str]:
    """A module that only the application's environment has."""
    path = Path(sysconfig.get_paths()["purelib"]) / "loopmux_planted_by_test.py"
    path.write_text("present = True\n")
    yield path.stem
    path.unlink()


@pytest.mark.slow
@pytest.mark.timeout(900)  # torch and transformers are installed for real, on whatever machine this is
def test_workers_live_in_environments_of_their_own(
    home: Path, tmp_path: Path, planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_COMPILE", "0")  # bytecode of thousands of modules, of which a worker imports a few
    config = tmp_path / "llm_backends.yaml"
    config.write_text(CONFIG)
    stack = stacks.start(config, home, folder=home / "own", limit=800)
    try:
        with loopmux.Client(stack.endpoint) as client:
            text = client.generate("What is a broker?", model="shout", temperature=0).text
            assert text == text.upper()
            other = client.generate("What is a broker?", model="tools", temperature=0).text
            assert other != other.upper()
            assert client.generate("What is a broker?", model="louder", temperature=0).text == text
            loop = client.run_tools("add 12 and 30", model="tools", tools=[add], temperature=0)
            assert [(entry["args"], entry["result"]) for entry in loop.tool_log] == [({"a": 12, "b": 30}, 42)]
            assert "42" in loop.text
            reports = [worker.report for worker in client.status().workers]
        assert len(reports) == len(EXPECTED)
        for name, expected in EXPECTED.items():
            environment = home / "data" / "loopmux" / "envs" / name
            [report] = [one for one in reports if one["executable"].startswith(f"{environment}/")]
            assert report["prefix"] != sys.prefix
            assert tuple(report[key] for key in ("transformers", "peft", "engine", "why")) == expected
            outside = [p for p in report["sys_path"] if sys.prefix in p or str(ROOT) in p]
            assert outside == [], "the worker looks for packages in the application's places"
            probe = subprocess.run(
                [report["executable"], "-c", f"import {planted}"],
                capture_output=True,
                text=True,
                env=stacks.environment(home),
            )
            assert "ModuleNotFoundError" in probe.stderr
    finally:
        assert stack.stop() == 0
    again = stacks.start(config, home, folder=home / "own", limit=60)  # built once, used again
    assert again.stop() == 0


def test_the_application_has_none_of_the_models_packages() -> None:
    code = "import sys, loopmux; loopmux.Client('ipc:///nowhere').close(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "peft", "yaml", "structlog"} & set(loaded)
