from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loopmux_launcher import workercode

ROOT = Path(__file__).resolve().parents[2]


def test_the_folder_holds_the_two_packages_and_nothing_else(tmp_path: Path) -> None:
    folder = workercode.install(tmp_path / "code")
    assert sorted(p.name for p in folder.iterdir()) == ["loopmux", "loopmux_worker"]
    assert (folder / "loopmux" / "wire.py").read_bytes() == (ROOT / "client" / "loopmux" / "wire.py").read_bytes()
    assert not list(folder.rglob("__pycache__"))
    slots = Path("loopmux_worker/engine/slots")  # the worker compiles what it finds there
    in_c = sorted(path.name for path in (ROOT / "worker" / slots).glob("*.c"))
    assert sorted(path.name for path in (folder / slots).glob("*.c")) == in_c == ["attention.c", "norm.c"]
    assert workercode.install(tmp_path / "code") == folder
    assert sorted(p.name for p in (tmp_path / "code").iterdir()) == [".lock", folder.name]


def test_a_damaged_copy_is_made_anew(tmp_path: Path) -> None:
    folder = workercode.install(tmp_path / "code")
    (folder / "loopmux" / "wire.py").write_text("broken")
    assert workercode.install(tmp_path / "code") == folder
    assert (folder / "loopmux" / "wire.py").read_text() != "broken"
    assert sorted(p.name for p in (tmp_path / "code").iterdir()) == [".lock", folder.name]


def test_launchers_that_start_at_once_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: workercode.install(tmp_path / "code"), range(8)))
    assert len(folders) == 1
    assert len(list((tmp_path / "code").iterdir())) == 2  # with the lock file


def test_a_worker_imports_the_copy_and_neither_its_folder_nor_the_applications_path(tmp_path: Path) -> None:
    code = workercode.install(tmp_path / "code")
    here = tmp_path / "here"
    here.mkdir()
    (here / "planted.py").write_text("raise SystemExit('imported')")
    from loopmux_launcher.probe import worker_command, worker_variables

    command = worker_command(sys.executable)[:-2]
    script = "import importlib.util as u, loopmux; print(loopmux.__file__, u.find_spec('planted'))"
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = str(here)
    try:
        variables = worker_variables(code, {})
    finally:
        os.environ.clear()
        os.environ.update(before)
    done = subprocess.run([*command, "-c", script], cwd=here, env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(code / "loopmux" / "__init__.py"), "None"]


def test_the_ranges_are_those_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    worker = [line for line in project["optional-dependencies"]["worker"] if line.startswith("structlog")]
    assert list(workercode.REQUIREMENTS) == project["dependencies"] + worker
