"""Real virtual environments, made with a real pip, and everything that can go wrong with them."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from launcher.programs import BUILD_LIMIT, Program, alive, launch, program, wait_for
from loopmux_launcher import environments, envstore, interpreters, places, workercode
from loopmux_launcher.config import Environment
from loopmux_launcher.interpreters import EnvironmentUnusable
from loopmux_launcher.probe import probe, worker_command, worker_variables
from loopmux_launcher.reader import load

pytestmark = pytest.mark.timeout(400)
TINY = """
environments: {tiny: {python: "%s", installer: pip, index_options: [--no-index, "--find-links %s"]}}
models: {echo: {engine: echo, environment: tiny}}
"""
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def tiny(home: Path, needs: Path) -> Path:
    file = home / "tiny.yaml"
    file.write_text(TINY % (VERSION, needs))
    return file


@pytest.fixture(scope="module")
def built(needs: Path) -> Iterator[tuple[Path, list[Program]]]:
    """A folder for user data with the environment ``tiny``, which two processes wanted to build at once."""
    with tempfile.TemporaryDirectory(prefix="lmxb-") as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        patch.setenv("XDG_DATA_HOME", str(folder))
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        file = folder / "tiny.yaml"
        file.write_text(TINY % (VERSION, needs))
        words = ("env", "build", "--config", str(file), "--log-format", "plain")
        with program(*words) as first, program(*words) as second:
            assert (first.wait(BUILD_LIMIT), second.wait(BUILD_LIMIT)) == (0, 0), first.text + second.text
        yield folder, [first, second]


@pytest.mark.slow
def test_of_two_builders_one_builds_and_the_other_waits(built: tuple[Path, list[Program]]) -> None:
    folder, both = built
    building = [p for p in both if "building with Python" in p.text]
    waiting = [p for p in both if "waiting for process" in p.text]
    assert len(building) == len(waiting) == 1
    assert building != waiting
    assert f"waiting for process {building[0].process.pid}" in waiting[0].text
    home = folder / "loopmux" / "envs" / "tiny"
    (made,) = [p for p in home.iterdir() if p.is_dir() and not p.is_symlink()]
    assert (home / "current").resolve() == made
    assert envstore.read_marker(made) is not None
    assert not (made / "tmp").exists()


@pytest.mark.slow
def test_a_built_environment_is_found_again_listed_and_used_at_once(
    built: tuple[Path, list[Program]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = built
    monkeypatch.setenv("XDG_DATA_HOME", str(folder))
    config = ("--config", str(folder / "tiny.yaml"))
    again = launch("env", "build", *config, "--log-format", "json")
    assert [json.loads(line)["phase"] for line in again.stdout.splitlines()] == ["ready"]
    python = json.loads(again.stdout)["python"]
    assert launch("env", "path", "tiny", *config).stdout.strip() == python
    assert "pyzmq" in (listed := launch("env", "list", *config).stdout)
    assert python in listed


@pytest.mark.slow
def test_the_worker_sees_its_environment_and_nothing_of_the_applications(
    built: tuple[Path, list[Program]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = built
    python = folder / "loopmux" / "envs" / "tiny" / "current" / "bin" / "python"
    packages = Path(sysconfig.get_paths()["purelib"])
    planted = packages / f"loopmux_planted_{os.getpid()}.py"
    on_path = tmp_path / "applications_module.py"
    on_path.write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    command = worker_command(python)[:-2]
    variables = worker_variables(workercode.install(tmp_path / "code"), {"OWN": "1"})
    monkeypatch.delenv("PYTHONHOME")
    names = [planted.stem, on_path.stem, "yaml", "pytest", "torch", "loopmux_launcher", "zmq", "loopmux_worker"]
    script = (
        f"import importlib.util as u, json, sys; print(json.dumps([bool(u.find_spec(n)) for n in {names}]), sys.prefix)"
    )
    planted.write_text("")
    try:
        ours = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        theirs = subprocess.run([*command, "-c", script], env=variables, capture_output=True, text=True, check=True)
    finally:
        planted.unlink()
    visible, prefix = theirs.stdout.rsplit(maxsplit=1)
    assert json.loads(ours.stdout.rsplit(maxsplit=1)[0])[:3] == [True, True, True]
    assert json.loads(visible) == [False] * 6 + [True, True]
    assert Path(prefix).resolve() == python.parent.parent.resolve()
    assert variables["OWN"] == "1"


@pytest.mark.slow
def test_what_lacks_torch_is_refused_for_a_model_that_needs_it(
    built: tuple[Path, list[Program]], tmp_path: Path
) -> None:
    folder, _ = built
    environment = load(folder / "tiny.yaml").environments["tiny"]
    with pytest.raises(EnvironmentUnusable) as caught:
        environments.prepare(
            environment,
            folder / "loopmux" / "envs",
            workercode.install(tmp_path / "code"),
            tmp_path / "log",
            lambda _: None,
            torch=True,
        )
    assert "torch" in caught.value.message
    assert "add torch to its requirements" in caught.value.message


@pytest.mark.slow
def test_other_workers_code_is_probed_and_nothing_is_built_for_it(
    built: tuple[Path, list[Program]], tmp_path: Path
) -> None:
    folder, _ = built
    environment = load(folder / "tiny.yaml").environments["tiny"]
    code, told = workercode.install(tmp_path / "code").rename(tmp_path / "other"), list[str]()
    for _ in range(2):
        found = environments.prepare(
            environment, folder / "loopmux" / "envs", code, tmp_path / "log", told.append, torch=False
        )
    assert (told, found.code) == (["probing"], "other")


@pytest.mark.slow
def test_a_requirement_that_cannot_be_had_leaves_nothing_and_says_why(tiny: Path) -> None:
    text = tiny.read_text().replace("{python", '{requirements: ["msgpack==0.0.0"], python')
    tiny.write_text(text)
    done = launch("env", "build", "--config", str(tiny))
    assert done.returncode == 1
    assert "msgpack==0.0.0" in done.stderr
    assert "Traceback" not in done.stderr
    log = Path(done.stderr.rsplit("full log: ")[1].strip())
    assert "msgpack==0.0.0" in log.read_text()
    left = sorted(p.name for p in (places.data() / "envs" / "tiny").iterdir())
    assert left == [".lock"]


def _environment_folders() -> list[Path]:
    home = places.data() / "envs" / "tiny"
    return [p for p in home.iterdir() if p.is_dir()] if home.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGTERM, "resolving"), (signal.SIGHUP, "resolving"), (signal.SIGKILL, "building with")],
)
def test_an_interrupted_build_is_never_taken_for_an_environment(
    tiny: Path, number: signal.Signals, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    words = ("env", "build", "--config", str(tiny), "--log-format", "plain")
    with program(*words) as build:
        build.line(moment, BUILD_LIMIT)
        installer = wait_for(lambda: build.family()[1:], "the installer")
        build.process.send_signal(number)
        code = build.wait()
        wait_for(lambda: not alive(installer[:1]), "the installer to end")
    assert list(temporary.iterdir()) == []
    config = ("--config", str(tiny))
    assert launch("env", "path", "tiny", *config).returncode == 1
    if number != signal.SIGKILL:
        assert code == 130
        assert _environment_folders() == []
    else:
        assert code == -signal.SIGKILL
        wait_for(lambda: not alive(installer), "its helpers to end")
        again = launch(*words)
        assert again.returncode == 0, again.stderr
        assert len([p for p in _environment_folders() if not p.is_symlink()]) == 1


def test_an_interpreter_that_is_not_there_is_named_with_what_is(tiny: Path) -> None:
    tiny.write_text(TINY % ("3.99", tiny.parent))
    done = launch("env", "build", "--config", str(tiny))
    assert done.returncode == 78  # the configuration is wrong here, and nothing is begun
    assert "Python 3.99" in done.stderr
    assert re.search(rf"found only .*\b{VERSION}", done.stderr)  # whatever else PATH has
    assert "Traceback" not in done.stderr


def test_a_program_that_is_no_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnusable, match="does not run as Python"):
        interpreters.find("/bin/ls")


def test_an_old_python_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\necho \'["3.9.1", "cpython", "/usr/bin/python3.9", "linux"]\'\n')
    old.chmod(0o755)
    with pytest.raises(EnvironmentUnusable, match=r"3\.9\.1, expected 3\.11 or newer"):
        interpreters.find(str(old))


def test_a_wrong_version_behind_the_right_name_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / f"python{VERSION}"
    fake.write_text('#!/bin/sh\necho \'["3.0.0", "cpython", "/x", "linux"]\'\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert interpreters.find(VERSION).version.startswith(VERSION)


def test_the_base_interpreter_is_taken_not_the_applications_environment() -> None:
    found = interpreters.find(sys.executable)
    assert found.executable == Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    assert not found.executable.is_relative_to(sys.prefix) or sys.prefix == sys.base_prefix


def test_everything_an_environment_is_made_from_is_in_its_hash(tmp_path: Path) -> None:
    python = interpreters.Interpreter(Path("/p"), "3.11.1", "cpython", "linux")
    plain = environments.identity(Environment("e", tmp_path, "3.11", ("a==1",)), python)
    assert plain == environments.identity(Environment("other", tmp_path / "x", "3.11", ("a==1",)), python)
    newer = interpreters.Interpreter(Path("/p"), "3.11.2", "cpython", "linux")
    assert plain != environments.identity(Environment("e", tmp_path, "3.11", ("a==2",)), python)
    assert plain != environments.identity(Environment("e", tmp_path, "3.11", ("a==1",)), newer)
    file = tmp_path / "needs.txt"
    file.write_text("a==1\n")
    filed = Environment("e", tmp_path, requirements_file=file)
    before = environments.identity(filed, python)
    file.write_text("a==2\n")
    assert environments.identity(filed, python) != before


def test_a_path_is_probed_and_used_as_it_is(home: Path, tmp_path: Path) -> None:
    python = Path(sys.prefix) / "bin" / "python"
    told: list[str] = []
    environment = Environment("own", tmp_path, path=python)
    code = workercode.install(tmp_path / "code")
    gc.collect()  # what earlier tests have left would be closed meanwhile
    before = psutil.Process().num_fds()
    found = environments.prepare(environment, home / "envs", code, home / "log", told.append, torch=False)
    assert (found.python, told) == (python, [f"probing {python}"])
    assert "pyzmq" in found.summary
    assert not (home / "envs").exists()
    assert environments.locate(environment, home / "envs") == python
    assert psutil.Process().num_fds() == before


def test_a_probe_names_what_is_missing_and_the_command_that_adds_it(
    tmp_path: Path, make_venv: Callable[[], Path]
) -> None:
    python = make_venv()
    with pytest.raises(EnvironmentUnusable) as caught:
        probe(python, workercode.install(tmp_path / "code"), {}, torch=True, ours=False)
    for package in ("msgpack", "torch", "transformers", "peft"):
        assert f"-m pip install '{package}" in caught.value.message
    assert str(python) in caught.value.message


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ('echo \'{"ok": false, "missing": [], "out_of_memory": "ImportError: failed to map segment"}\'',
         "out of memory while its packages were imported (ImportError: failed to map segment); stop other programs"),
        ("kill -9 $$", "its probe failed: it was ended by SIGKILL (out of memory, or killed by hand)"),
    ],
)  # fmt: skip
def test_a_probe_that_ran_out_of_memory_names_no_package(tmp_path: Path, script: str, says: str) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *probe*) {script};; *) exec {sys.executable} "$@";; esac\n')
    python.chmod(0o755)
    with pytest.raises(EnvironmentUnusable) as caught:
        probe(python, workercode.install(tmp_path / "code"), {}, torch=True, ours=False)
    assert says in caught.value.message
    assert "pip install" not in caught.value.message


@pytest.fixture
def make_venv(tmp_path: Path) -> Callable[[], Path]:
    """Makes an empty virtual environment without pip, which takes a moment."""

    def make() -> Path:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "empty")], check=True)
        return tmp_path / "empty" / "bin" / "python"

    return make


def test_packages_are_compiled_once_whatever_the_application_wants_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (tmp_path / "package.py").write_text("")
    subprocess.run([sys.executable, "-c", "import package"], env=worker_variables(tmp_path, {}), check=True)
    assert list(tmp_path.glob("__pycache__/package.*.pyc"))
