"""Which environment is used, kept and removed, with an installer that makes nothing but an interpreter."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from loopmux_launcher import environments, envstore, lockfile, requirements
from loopmux_launcher.config import Environment
from loopmux_launcher.envplan import State
from loopmux_launcher.envstore import Built
from loopmux_launcher.interpreters import EnvironmentUnusable, Interpreter
from loopmux_launcher.lock import locked
from loopmux_launcher.lockfile import Lock, Pin

PIN = Pin("a==1", ("sha256:" + "1" * 64,))


class Installation:
    """An installer whose interpreters do nothing but sleep."""

    def __init__(self, environment: Environment, tool: object, target: Path, log: object, report: object) -> None:
        self.target = target

    def create(self, interpreter: Interpreter) -> None:
        (self.target / "bin").mkdir(parents=True)
        (self.target / "bin" / "python").symlink_to("/bin/sleep")

    def install(self, lock: Path | None) -> None:
        (self.target / "installed").write_text(str(lock))

    def resolve(self, interpreter: Interpreter) -> tuple[Pin, ...]:
        assert self.target.is_dir()
        return (PIN,)


class Disk:
    """A folder of environments, what was said while they were made, and which of them fail their probe."""

    def __init__(self, folder: Path) -> None:
        self.root, self.envs, self.home = folder, folder / "envs", folder / "envs" / "e"
        self.told: list[str] = []
        self.broken: set[str] = set()

    def declare(self, *requirements: str, file: str = "site") -> Environment:
        return Environment("e", self.root, "3.11", requirements, file=self.root / f"{file}.yaml")

    def prepare(self, environment: Environment, *, torch: bool = False, code: str = "c1", **how: bool) -> str:
        """The name of the folder that serves it."""
        self.told.clear()
        built = environments.prepare(environment, self.envs, Path(code), self.root / "log", self.told.append,
                                     torch=torch, **how)  # fmt: skip
        assert built.folder == (self.home / "current").resolve()
        assert built == envstore.read_marker(built.folder)
        assert environments.locate(environment, self.envs) == built.python
        assert (built.code, built.torch or not torch) == (code, True)
        assert (built.version, built.summary, built.when > 0) == ("3.11.1", "works", True)
        assert str(environment.file) in envstore.configurations(built.folder)
        return built.folder.name

    def rollback(self, environment: Environment) -> str:
        self.told.clear()
        built = environments.rollback(environment, self.envs, Path("c1"), self.told.append, torch=False)
        return built.folder.name

    def probe(self, python: Path, *rest: object, torch: bool, ours: bool) -> str:
        assert ours
        if python.parent.parent.name in self.broken:
            raise EnvironmentUnusable("it is broken")
        return "works"

    @property
    def folders(self) -> list[str]:
        return envstore.folders(self.home)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk(tmp_path)
    interpreter = Interpreter(Path("/p"), "3.11.1", "cpython", "linux")
    monkeypatch.setattr(environments.interpreters, "find", lambda wanted: interpreter)
    monkeypatch.setattr(environments.installer, "choose", lambda wanted: SimpleNamespace(name="pip"))
    monkeypatch.setattr(environments, "Installation", Installation)
    monkeypatch.setattr(environments, "probe", disk.probe)
    return disk


# --- which one is used ------------------------------------------------------------------------------------------------


def test_what_is_built_is_used_as_it_is_and_probed_only_where_something_else_is_asked_of_it(disk: Disk) -> None:
    one = disk.declare("a==1")
    with pytest.raises(EnvironmentUnusable, match="environment e is not built"):
        environments.locate(one, disk.envs)
    first = disk.prepare(one)
    assert disk.told == [f"building with Python 3.11.1 and pip, log {disk.root / 'log'}", "probing"]
    assert (disk.prepare(one), disk.told) == (first, [])
    assert (disk.prepare(one, torch=True), disk.told) == (first, ["probing"])
    assert (disk.prepare(one), disk.told) == (first, [])
    assert (disk.prepare(one, code="c2"), disk.told) == (first, ["probing"])
    assert (disk.prepare(one, torch=True, code="c2"), disk.told) == (first, [])  # it was looked for, too
    assert disk.prepare(one, anew=True) == f"{first}-2"
    assert (disk.prepare(one), disk.told) == (f"{first}-2", [])
    other = disk.prepare(disk.declare("a==2"))
    assert disk.prepare(one) == f"{first}-2"
    assert envstore.read_state(disk.home).history == (first, other, f"{first}-2")


def test_a_build_that_fails_leaves_what_was_there(disk: Disk) -> None:
    one, two = disk.declare("a==1"), disk.declare("a==2")
    first = disk.prepare(one)
    disk.broken.add(f"{first}-2")
    with pytest.raises(EnvironmentUnusable, match="it is broken"):
        disk.prepare(one, anew=True)
    assert (disk.folders, disk.prepare(one)) == ([first], first)
    (disk.home / "half" / "bin").mkdir(parents=True)  # a build that was killed
    assert disk.prepare(one) == first
    assert "half" in disk.folders
    second = disk.prepare(two)
    assert disk.folders == sorted([first, second])


def test_a_rollback_holds_until_somebody_builds_and_goes_through_what_works_and_is_the_configurations(
    disk: Disk,
) -> None:
    one, two, three = (disk.declare(f"a=={n}") for n in (1, 2, 3))
    first, second = disk.prepare(one), disk.prepare(two)
    anothers = disk.prepare(disk.declare("b", file="other"))
    third = disk.prepare(three)
    disk.broken.add(second)
    assert not environments.is_rolled_back(three, disk.envs)
    assert disk.rollback(three) == first
    assert disk.told == [f"probing {second}", f"passing over {second}: it is broken", f"probing {first}"]
    assert environments.is_rolled_back(three, disk.envs)
    assert not environments.is_rolled_back(one, disk.envs)
    assert disk.prepare(three) == first
    assert disk.told == [f"rolled back to {first}; `loopmux env build e` goes forward again"]
    with pytest.raises(EnvironmentUnusable, match="no earlier build that works"):
        disk.rollback(three)
    assert (disk.prepare(three, forward=True), disk.told) == (third, [])
    assert disk.rollback(three) == first
    assert disk.prepare(three, anew=True) == f"{third}-2"
    assert not environments.is_rolled_back(three, disk.envs)
    assert disk.folders == sorted([first, second, anothers, third, f"{third}-2"])


def test_what_is_locked_is_what_is_built_as_long_as_the_requirements_agree(disk: Disk) -> None:
    one, file = disk.declare("a==1"), disk.root / "site.e.lock"
    first = disk.prepare(one)
    lock = environments.resolve(one, disk.envs, disk.root / "log", disk.told.append)
    assert lock == Lock("cpython 3.11 on linux", requirements.packages(one), (PIN,))
    assert disk.told[-1] == f"resolving with pip for cpython 3.11 on linux, log {disk.root / 'log'}"
    assert {path.name for path in disk.home.iterdir()} == {".lock", "current", "state.json", first}
    found = {first}
    for pin in (PIN, replace(PIN, hashes=("sha256:" + "2" * 64,))):
        file.write_text(lockfile.render(replace(lock, pins=(pin,))))
        found.add(folder := disk.prepare(one))
        assert (disk.home / folder / "installed").read_text() == str(file)
    assert len(found) == 3
    with pytest.raises(EnvironmentUnusable, match="disagrees with the requirements: a==2 is not in it"):
        disk.prepare(disk.declare("a==2"))
    file.write_text("a==1")
    with pytest.raises(EnvironmentUnusable, match=r"site\.e\.lock is no lock file"):
        disk.prepare(one)
    file.unlink()
    assert disk.prepare(one) == first
    assert (disk.home / first / "installed").read_text() == "None"


# --- what is removed --------------------------------------------------------------------------------------------------


def test_what_a_process_has_begun_to_use_stays(disk: Disk) -> None:
    first, second = disk.prepare(disk.declare("a==1")), disk.prepare(disk.declare("a==2"))
    found = envstore.scan(disk.envs)
    assert [(one.name, one.folder, one.good, one.processes) for one in found] == [
        ("e", folder, True, ()) for folder in sorted([first, second])
    ]
    assert {one.configurations for one in found} == {(str(disk.root / "site.yaml"),)}
    of_first = [one for one in found if one.folder == first]
    for way, used, asked, left in ((first, first, of_first, [first, second]), ("current", second, found, [second])):
        with subprocess.Popen([disk.home / way / "bin" / "python", "60"]) as sleeper:
            try:
                assert envstore.processes(disk.envs) == {("e", used): [sleeper.pid]}
                assert [one.folder for one in envstore.scan(disk.envs) if one.processes] == [used]
                assert environments.remove(disk.envs, asked) == []
            finally:
                sleeper.kill()
        assert disk.folders == sorted(left)
    assert environments.remove(disk.envs, found) == []
    assert not disk.home.exists()
    assert envstore.scan(disk.envs) == []


def test_where_somebody_builds_nothing_is_removed(disk: Disk) -> None:
    disk.prepare(disk.declare("a==1"))
    found = envstore.scan(disk.envs)
    with locked(disk.home / envstore.LOCK):
        assert environments.remove(disk.envs, found) == found
    assert disk.folders == [found[0].folder]


# --- what is written down ---------------------------------------------------------------------------------------------


def test_a_folder_counts_only_with_its_marker_and_its_interpreter(tmp_path: Path) -> None:
    target = tmp_path / "e" / "f"
    (target / "bin").mkdir(parents=True)
    python = target / "bin" / "python"
    assert envstore.read_marker(target) is None
    built = Built(python, "works", "3.11.1", torch=False, code="c", when=7.0)
    envstore.write_marker(built)
    assert (envstore.read_marker(target), envstore.good(target.parent)) == (None, [])
    python.touch()
    assert (envstore.read_marker(target), envstore.good(target.parent)) == (built, ["f"])
    for text in ("", "[]", '{"python": 1}', "{}"):
        (target / envstore.MARKER).write_text(text)
        assert envstore.read_marker(target) is None
    envstore.remove_unfinished(target.parent)  # damaged, but it was finished
    assert target.exists()
    (target / envstore.MARKER).unlink()
    envstore.remove_unfinished(target.parent)
    assert not target.exists()
    envstore.remove(target)  # it is gone


def test_what_is_remembered_of_a_name_is_read_again_or_nothing(tmp_path: Path) -> None:
    state = State(("a", "b"), {"x": "a"})
    envstore.write_state(tmp_path, state)
    assert envstore.read_state(tmp_path) == state
    [file] = tmp_path.iterdir()
    os.utime(file, (1, 1))
    envstore.write_state(tmp_path, state)
    assert file.stat().st_mtime == 1, "what is as it was is not written again: the disk may be full"
    for text in ("", "[]", "{}", json.dumps({"history": [], "instead": 1})):
        file.write_text(text)
        assert envstore.read_state(tmp_path) == State()


def test_a_name_leads_to_the_folder_in_use(tmp_path: Path) -> None:
    for folder in ("b", "a", "a"):
        (tmp_path / folder).mkdir(exist_ok=True)
        envstore.switch(tmp_path, folder)
        assert (tmp_path / "current").readlink() == Path(folder)
    (tmp_path / "file").touch()
    assert envstore.folders(tmp_path) == ["a", "b"]
    assert envstore.folders(tmp_path / "file") == envstore.folders(tmp_path / "gone") == []
    for file in (None, tmp_path / "x.yaml", tmp_path / "y.yaml", tmp_path / "x.yaml"):
        envstore.note_user(tmp_path / "a", file)
    assert envstore.configurations(tmp_path / "a") == (str(tmp_path / "x.yaml"), str(tmp_path / "y.yaml"))


def test_a_size_is_that_on_disk(tmp_path: Path) -> None:
    before = envstore.size(tmp_path)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file").write_bytes(os.urandom(100_000))
    (tmp_path / "link").symlink_to("nowhere")
    assert before == 0
    assert 100_000 <= envstore.size(tmp_path) < 200_000
