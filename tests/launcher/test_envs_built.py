"""Environments built from tiny wheels, without a network: what every ``env`` command does, and what can go wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.programs import alive, launch, program, wait_for
from launcher.wheels import write_wheel
from loopmux_launcher import envstore, places

pytestmark = pytest.mark.timeout(400)
UV = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
WITH_UV = pytest.param("uv", marks=pytest.mark.skipif(UV is None, reason="uv is not installed"))
EITHER = pytest.mark.parametrize("installer", ["pip", WITH_UV])
QUICK = "uv" if UV else "pip"
"""For what is not about the installer: an environment takes uv a quarter of a second, pip several."""


class Site:
    """A configuration ``site.yaml`` with the environment ``e``, and a folder of wheels that it is built from."""

    def __init__(self, folder: Path, needs: Path) -> None:
        self.folder, self.wheels, self.file = folder, folder / "wheels", folder / "site.yaml"
        self.needs = needs
        self.envs = places.data() / "envs"
        self.lock = folder / "site.e.lock"
        write_wheel(self.wheels, "dd", "1.0", ["cc"])
        write_wheel(self.wheels, "cc", "1.0")

    def declare(self, *requirements: str, installer: str = QUICK, **more: object) -> None:
        entry = {
            "requirements": requirements,
            "installer": installer,
            "index_options": ["--no-index", "--find-links wheels", f"--find-links {self.needs}"],
            **more,
        }
        models = {"a": {"engine": "echo", "environment": "e"}}
        self.file.write_text(json.dumps({"environments": {"e": entry}, "models": models}))

    def env(self, *words: str, ok: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        done = launch("env", *words, "--config", str(self.file), **variables)
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def build(self, *words: str, **more: bool) -> str:
        return self.env("build", "e", "--log-format", "plain", *words, **more).stdout

    def python(self) -> Path:
        return Path(self.env("path", "e").stdout.strip())

    def folders(self) -> list[str]:
        return envstore.folders(self.envs / "e")

    def version(self, package: str) -> str:
        script = f"import {package}; print({package}.__version__)"
        done = subprocess.run([self.python(), "-c", script], capture_output=True, text=True, check=True)
        return done.stdout.strip()


@pytest.fixture
def site(home: Path, tmp_path: Path, needs: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("UV_CACHE_DIR", str(needs / "uv-cache"))
    return Site(tmp_path, needs)


@pytest.mark.slow
@EITHER
def test_an_environment_is_built_locked_and_listed(site: Site, installer: str) -> None:
    site.declare("dd", installer=installer)
    text = site.build()
    assert f"and {installer}, log" in text
    assert "installing 5 packages" in text
    assert (site.version("dd"), site.version("cc")) == ("1.0", "1.0")
    assert site.build().count("\n") == 1  # it is there
    (row,) = json.loads(site.env("list", "--json").stdout)
    assert (row["name"], row["state"], row["models"], row["processes"]) == ("e", "built", ["a"], [])
    assert row["size"] > 1_000_000
    assert row["path"] == str(site.python())
    assert "good: Python" in site.env("verify").stdout


@pytest.mark.slow
@EITHER
def test_a_lock_is_used_until_the_requirements_disagree(site: Site, installer: str) -> None:
    site.declare("dd", installer=installer)
    assert "packages locked in" in site.env("lock").stdout
    assert "dd==1.0 \\\n    --hash=sha256:" in site.lock.read_text()
    write_wheel(site.wheels, "cc", "2.0")
    site.build()
    assert site.version("cc") == "1.0"
    assert "cc 1.0 → 2.0" in site.env("lock").stdout
    assert "not built" in site.env("path", "e", ok=False).stderr  # another lock, another environment

    site.declare("dd", "cc<2", installer=installer)
    for words in (["build", "e"], ["path", "e"], ["verify"]):
        said = site.env(*words, ok=False)
        assert "cc<2 is not in it: run  loopmux env lock e" in said.stdout + said.stderr


@pytest.mark.slow
@EITHER
def test_a_file_that_is_not_the_locked_one_is_refused_and_what_was_there_stays(site: Site, installer: str) -> None:
    site.declare("dd", installer=installer)
    site.build()
    before = site.folders()
    site.env("lock")
    write_wheel(site.wheels, "cc", "1.0", code="# tampered with")
    said = site.env("build", "e", ok=False, UV_CACHE_DIR=str(site.folder / "empty")).stderr
    assert "not the one that was locked" in said
    assert "cc" in said
    assert site.folders() == before
    site.lock.unlink()
    assert site.version("cc") == "1.0"


@pytest.mark.slow
@EITHER
def test_requirements_that_contradict_each_other_are_told_with_the_reason(site: Site, installer: str) -> None:
    write_wheel(site.wheels, "cc", "2.0")
    write_wheel(site.wheels, "aa", "1.0", ["cc<2"])
    write_wheel(site.wheels, "bb", "1.0", ["cc>=2"])
    site.declare("aa", "bb", installer=installer)
    for words in (["build"], ["lock"]):
        said = site.env(*words, ok=False).stderr
        assert "cc<2" in said
        assert "cc>=2" in said
        assert f"{installer} could not" in said
        assert Path(said.rsplit("full log: ")[1].strip()).is_file()
    assert (site.folders(), site.lock.exists()) == ([], False)


@pytest.mark.slow
@EITHER
def test_an_index_that_cannot_be_reached_is_told(site: Site, installer: str) -> None:
    site.declare("zz", installer=installer, index_options=["--index-url http://127.0.0.1:9/simple"])
    said = site.env("build", ok=False, PIP_RETRIES="1", UV_HTTP_RETRIES="1").stderr
    assert "could not be reached (Connection refused" in said
    assert "check the network" in said
    assert site.folders() == []


@pytest.mark.slow
@EITHER
def test_pips_settings_are_gone_by(site: Site, installer: str) -> None:
    conf, bounds = site.folder / "pip.conf", site.folder / "bounds.txt"
    links = f"find-links =\n    {site.wheels}\n    {site.needs}\n"
    conf.write_text(f"[global]\nno-index = yes\nconstraint = {bounds}\n{links}")
    bounds.write_text("cc<2\n")
    write_wheel(site.wheels, "cc", "2.0")
    site.declare("dd", installer=installer, index_options=[])
    site.env("lock", PIP_CONFIG_FILE=str(conf))
    site.env("build", PIP_CONFIG_FILE=str(conf))
    assert (site.version("dd"), site.version("cc")) == ("1.0", "1.0")


def test_uv_that_is_asked_for_and_not_there_is_named(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from loopmux_launcher import installer
    from loopmux_launcher.interpreters import EnvironmentUnusable

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert installer.choose("auto").name == installer.choose("pip").name == "pip"
    with pytest.raises(EnvironmentUnusable, match=r"found no uv on PATH.*`installer: pip`"):
        installer.choose("uv")
    (tmp_path / "uv").touch(mode=0o755)
    assert installer.choose("auto").name == "uv"
    assert installer.choose("pip").name == "pip"


@pytest.mark.slow
def test_a_damaged_environment_is_found_and_built_anew_beside(site: Site) -> None:
    site.declare("dd")
    site.build()
    first = site.python().parent.parent
    (module,) = first.glob("lib/python*/site-packages/cc.py")
    module.unlink()
    next(first.glob("lib/python*/site-packages/structlog/__init__.py")).unlink()
    said = site.env("verify", "e", ok=False).stderr
    assert "is damaged: run  loopmux env build --anew e" in said
    assert "cc-1.0: cc.py: No such file" in said
    assert "structlog/__init__.py" in said
    site.build("--anew")
    second = site.python().parent.parent
    assert second.name == f"{first.name}-2"
    site.env("verify", "e")
    assert f"removed: {first}" in site.env("prune").stdout
    assert site.folders() == [second.name]
    assert site.python().parent.parent == second


@pytest.mark.slow
def test_a_worker_in_a_damaged_environment_says_where_to_look_and_up_goes_over_to_the_next(
    site: Site, home: Path
) -> None:
    """With a model beside it, that has ``up`` go on where the other one is given up before its environment is built."""
    site.declare()
    site.build()
    declared = json.loads(site.file.read_text())
    declared["models"]["b"] = {"engine": "echo"}
    site.file.write_text(json.dumps(declared))
    shutil.rmtree(next(site.python().parent.parent.glob("lib/python*/site-packages/zmq")))
    with program("up", "--config", str(site.file), "--endpoint", f"ipc://{home}/s/client.ipc") as up:
        said = up.line("starts again in")
        assert "No module named 'zmq'" in said
        assert "`loopmux env verify` says what" in said
        assert "is damaged" in site.env("verify", "e", ok=False).stderr
        site.build("--anew")
        up.process.send_signal(signal.SIGHUP)
        up.line("a-1: ready in")
        up.process.terminate()
        assert up.wait() == 0


@pytest.mark.slow
def test_a_changed_file_is_found(site: Site) -> None:
    site.declare("dd")
    site.build()
    (module,) = site.python().parent.parent.glob("lib/python*/site-packages/cc.py")
    text = module.read_text()
    module.unlink()  # uv shares its files with its cache
    module.write_text(text.replace("1", "2"))
    assert "cc-1.0: cc.py was changed" in site.env("verify", "e", ok=False).stderr


@pytest.mark.slow
def test_a_rollback_serves_the_declaration_until_the_next_build(site: Site) -> None:
    site.declare("cc==1.0")
    assert "no earlier build" in site.env("rollback", "e", ok=False).stderr
    site.build()
    write_wheel(site.wheels, "cc", "2.0")
    site.declare("cc==2.0")
    site.build()
    assert site.version("cc") == "2.0"
    assert "rolled back to" in site.env("rollback", "e").stdout
    assert site.version("cc") == "1.0"
    assert "rolled back" in site.env("list").stdout
    assert (site.envs / "e" / "current").resolve() == site.python().parent.parent
    # the launcher's own builds leave it as it is, a person's go forward
    site.env("build", "e", "--log-format", "json")
    assert site.version("cc") == "1.0"
    site.env("prune", "--dry-run")
    assert len(site.folders()) == 2
    assert "ready at" in site.build()
    assert site.version("cc") == "2.0"
    # what does not pass its probe is passed over
    old = next(site.envs / "e" / f for f in site.folders() if f != site.python().parent.parent.name)
    shutil.rmtree(next(old.glob("lib/python*/site-packages/zmq")))
    said = site.env("rollback", "e", ok=False)
    assert f"passing over {old.name}" in said.stdout
    assert "no earlier build that works" in said.stderr
    assert site.version("cc") == "2.0"


@pytest.mark.slow
def test_prune_keeps_what_a_configuration_or_a_process_uses(site: Site, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Site(tmp_path / "other", site.needs)
    site.declare("cc")
    site.build()
    old = site.python()
    other.declare("dd")
    other.build()
    site.declare()
    site.build()
    new = site.python()
    half = site.envs / "gone" / ("f" * 16)
    half.mkdir(parents=True)
    sleeper = subprocess.Popen([old, "-c", "print(1, flush=True); import time; time.sleep(60)"], stdout=subprocess.PIPE)
    with sleeper:
        assert sleeper.stdout is not None
        sleeper.stdout.readline()
        rows = {row["path"]: row for row in json.loads(site.env("list", "--json").stdout)}
        assert rows[str(old.parent.parent)]["processes"] == [sleeper.pid]
        assert (rows[str(half)]["state"], rows[str(new)]["state"]) == ("unfinished", "built")
        assert f"would be removed: {half}" in site.env("prune", "--dry-run").stdout
        assert half.exists()
        said = site.env("prune").stdout
        assert f"removed: {half}" in said
        assert str(old.parent.parent) not in said
        assert not half.parent.exists()
        sleeper.kill()
    good = other.file.read_text()
    other.file.write_text("models: {")
    said = site.env("prune").stdout
    assert f"what {other.file} uses stays, since it cannot be read" in said
    assert f"removed: {old.parent.parent}" in said
    other.file.write_text(good)
    assert len(site.folders()) == 2
    other.file.unlink()
    site.env("prune")
    assert site.folders() == [new.parent.parent.name]
    assert "nothing to remove" in site.env("prune").stdout


@pytest.mark.slow
def test_a_build_removes_what_a_killed_one_left_and_prune_leaves_a_running_one(site: Site) -> None:
    slow = "import time; print('Downloading', flush=True); time.sleep(60)"
    fake = site.folder / "bin" / "uv"
    fake.parent.mkdir()
    fake.write_text(f"#!{sys.executable}\nimport sys, os\nos.makedirs(sys.argv[-1] + '/bin', exist_ok=True)\n{slow}\n")
    fake.chmod(0o755)
    site.declare("cc", installer="uv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(fake.parent), prepend=os.pathsep)
        with program("env", "build", "e", "--config", str(site.file), "--log-format", "plain") as build:
            build.line("building with")
            family = wait_for(lambda: build.family()[1:], "the installer")
            wait_for(site.folders, "its folder")
            assert "removed:" not in site.env("prune").stdout
            assert site.folders()
            build.process.send_signal(signal.SIGKILL)
            build.wait()
            wait_for(lambda: not alive(family), "the installer to end")
    left = site.folders()
    assert len(left) == 1
    assert "not built" in site.env("path", "e", ok=False).stderr
    site.declare("dd")
    site.build()
    assert site.folders() == [site.python().parent.parent.name] != left


def test_a_full_disk_under_the_log_is_told(site: Site) -> None:
    places.usable_logs()
    (places.logs() / "env-e.log").symlink_to("/dev/full")
    site.declare("cc")
    said = site.env("build", ok=False).stderr
    assert "the disk is full" in said
    assert "$XDG_STATE_HOME" in said
    assert site.folders() == []


def can_mount() -> bool:
    """Whether a file system of this process's own can be mounted."""
    try:
        subprocess.run(["unshare", "-m", "true"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="a small disk cannot be mounted here")
@EITHER
@pytest.mark.parametrize("room", [2, 22])
def test_a_disk_that_fills_up_leaves_nothing_half(site: Site, installer: str, room: int, home: Path) -> None:
    write_wheel(site.wheels, "big", "1.0", code="#" * (30 << 20))
    site.declare("big", installer=installer)
    data = home / "data"
    data.mkdir()
    build = f"{sys.executable} -m loopmux_launcher env build e --config {site.file} --log-format plain"
    script = f"mount -t tmpfs -o size={room}m small {data} && {build}; echo code $?; ls -A {data}/loopmux/envs/e"
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=True)
    assert "the disk is full" in done.stderr
    assert "env prune" in done.stderr
    assert done.stdout.splitlines()[-2:] == ["code 1", ".lock"]


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="a small disk cannot be mounted here")
def test_what_is_built_is_found_used_and_pruned_on_a_full_disk(site: Site, home: Path) -> None:
    site.declare("cc")
    other = site.folder / "other.yaml"
    other.write_text("environments: {e: {}}\nmodels: {a: {engine: echo, environment: e}}\n")
    data = home / "data"
    data.mkdir()
    env = f"{sys.executable} -m loopmux_launcher env"
    up = f"{sys.executable} -m loopmux_launcher up --config {site.file} --endpoint ipc://{home}/s/client.ipc"
    script = f"""
        set -e
        mount -t tmpfs -o size=100m small {data}
        {env} build e --config {site.file} --log-format plain
        dd if=/dev/zero of={data}/rest bs=64k 2>/dev/null || true
        {env} path e --config {site.file}
        {env} verify e --config {site.file}
        {env} list --config {site.file}
        XDG_STATE_HOME={data}/state {up} >{site.folder}/up 2>&1 & up=$!
        while kill -0 $up && ! grep -q "ready after" {site.folder}/up; do sleep 0.05; done
        kill $up
        wait $up
        cat {site.folder}/up
        mv {site.file} {site.file}.gone
        {env} prune --config {other}
        ls {data}/loopmux/envs
    """
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "good: Python" in done.stdout
    assert "a-1.log cannot be written: No space left on device; it goes on" in done.stdout
    assert "ready after" in done.stdout
    assert " MB freed\n" in done.stdout
    assert done.stdout.endswith("freed\n")  # nothing is left


def test_a_file_that_is_no_lock_is_named(site: Site) -> None:
    site.declare("cc")
    site.lock.write_text("cc==1.0\n")
    said = site.env("build", ok=False).stderr
    assert f"{site.lock} is no lock file" in said
    assert site.folders() == []


def test_what_is_not_built_has_no_lock_and_no_rollback(site: Site) -> None:
    site.file.write_text(
        f'{{"environments": {{"e": {{"path": "{sys.prefix}"}}}}, "models": {{"a": {{"engine": "echo"}}}}}}'
    )
    assert "has no lock file" in site.env("lock", "e", ok=False).stderr
    assert "not rolled back" in site.env("rollback", "e", ok=False).stderr
    (row,) = json.loads(site.env("list", "--json").stdout)
    assert (row["state"], row["size"]) == ("existing", None)
    assert "good" in site.env("verify", "e").stdout


def test_files_that_a_requirements_file_names_are_part_of_the_hash(site: Site) -> None:
    from loopmux_launcher import environments
    from loopmux_launcher.reader import load

    def digest() -> str:
        return environments.digest_of(load(site.file).environments["e"])

    base, more, bound = (site.folder / name for name in ("base.txt", "more.txt", "bound.txt"))
    base.write_text("-r more.txt  # and more\n-c bound.txt\n--extra-index-url https://me:secret@x/simple\n")
    more.write_text("cc \\\n  >=1\n")
    bound.write_text("cc<3\n")
    site.declare()
    entry = json.loads(site.file.read_text())
    entry["environments"]["e"]["requirements"] = "base.txt"
    site.file.write_text(json.dumps(entry))
    first = digest()
    bound.write_text("cc<2\n")
    second = digest()
    more.write_text("-r base.txt\n")
    assert first != second
    with pytest.raises(Exception, match=r"base\.txt names itself"):
        digest()
