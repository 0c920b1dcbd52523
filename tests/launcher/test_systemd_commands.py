"""``loopmux systemd``: what it writes and says, with real files, and systemd's own judgement where it is installed."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from loopmux import exitcodes
from loopmux.errors import ConfigError
from loopmux_broker import program
from loopmux_launcher import systemdcommands, units
from loopmux_launcher.arguments import parser
from loopmux_launcher.commands import COMMANDS, main

SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "systemd"
TEXTS = {path.name: path.read_text() for path in sorted(SHIPPED.iterdir())}
SERVICES = [name for name in TEXTS if name.endswith(".service")]
ENABLE = "enable --now loopmux-clients.socket loopmux-launcher.service loopmux-workers.socket"
RESTART = "try-restart loopmux-broker.service loopmux-launcher.service"
MODELS = "models: {echo: {engine: echo}}\n"


def rendered(programs: str = "/opt/loopmux/bin", **configs: str) -> dict[str, str]:
    named = {f"loopmux-{program}": config for program, config in configs.items()}
    return {name: units.render(text, programs, named) for name, text in TEXTS.items()}


# --- the core ---------------------------------------------------------------------------------------------------------


def test_a_unit_is_the_shipped_one_with_what_this_installation_needs() -> None:
    changed = {
        "loopmux-broker.service": [
            'ExecStart="/opt/loopmux/bin/loopmux-broker" --log-format json --config "/etc/broker.yaml"'
        ],
        "loopmux-launcher.service": [
            'ExecStart="/opt/loopmux/bin/loopmux-launcher" run --log-format json --config "/etc/models.yaml"'
        ],
    }
    for name, text in rendered(launcher="/etc/models.yaml", broker="/etc/broker.yaml").items():
        first, *rest = text.splitlines()
        assert first.startswith("# Written by `loopmux systemd install`")
        lines = zip(TEXTS[name].splitlines(), rest, strict=True)
        assert [new for old, new in lines if old != new] == changed.get(name, [])


def test_any_edit_is_noticed() -> None:
    for name, text in rendered().items():
        assert units.unedited(text)
        lines = text.splitlines(keepends=True)
        for at in range(len(lines)):
            assert not units.unedited("".join([*lines[:at], *lines[at + 1 :]]))
        assert not units.unedited(text + "LimitNOFILE=1\n")
        assert not units.unedited(TEXTS[name])
    assert not units.unedited("")  # a unit that is masked


def test_units_that_were_installed_before_count_as_unedited() -> None:
    first = "# Written by `loopmux systemd install` (ae6c63cff33bcfa3). Changes belong in `systemctl --user edit`."
    assert units.unedited(f"{first}\n[Unit]\n")


def test_systemd_is_told_what_there_is_to_do() -> None:
    after, enable = rendered(), ENABLE.split()
    assert units.commands({}, after) == [["daemon-reload"], enable]
    assert units.commands(after, after) == [["daemon-reload"], ["try-restart", *SERVICES], enable]


@pytest.mark.parametrize("folder", ['/opt/a"b/bin', "/opt/a'b/bin", "/opt/a\\b/bin", "/opt/a\nb/bin"])
def test_a_folder_that_systemd_starts_nothing_from_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="expected a folder that systemd starts programs from"):
        units.render(TEXTS["loopmux-broker.service"], folder, {})


def test_the_package_has_the_units_of_the_configs_folder() -> None:
    assert systemdcommands._shipped() == TEXTS


# --- the program ------------------------------------------------------------------------------------------------------


class Systemctl:
    """A program of that name, the only one on PATH, that writes down what it is told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._said = folder / "said"
        folder.mkdir()
        self.does("echo Version=252.1")

    def does(self, script: str) -> None:
        self._said.write_text("")
        file = self.folder / "systemctl"
        file.write_text(f'#!/bin/sh\necho "$*" >> {self._said}\n{script}\n')
        file.chmod(0o755)

    def told(self) -> list[str]:
        """What it was told since the last look, all of it about this user's units."""
        lines = self._said.read_text().splitlines()
        self._said.write_text("")
        assert all(line.startswith("--user ") for line in lines)
        return [line.removeprefix("--user ") for line in lines]


ASKED = "show --property=Version"


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systemctl:
    one = Systemctl(tmp_path / "path")
    monkeypatch.setenv("PATH", str(one.folder))
    return one


@pytest.fixture
def place(home: Path) -> Path:
    return home / "config" / "systemd" / "user"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    file = tmp_path / "models.yaml"
    file.write_text(MODELS)
    return file


def run(*words: str) -> int:
    return main(["systemd", *words])


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()} if folder.is_dir() else {}


def command(folder: Path, service: str) -> list[str]:
    """The words of a service's command, as systemd reads those of ours."""
    [line] = [line for line in (folder / service).read_text().splitlines() if line.startswith("ExecStart=")]
    return [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(line.removeprefix("ExecStart="))]


def test_install_writes_what_print_shows(place: Path, systemctl: Systemctl, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("print") == 0
    shown = capsys.readouterr().out
    assert systemctl.told() == []
    assert not place.exists()
    assert run("install") == 0
    assert systemctl.told() == [ASKED, "daemon-reload"]
    assert sorted(content(place)) == sorted(TEXTS)
    assert shown == "".join(f"# {place / name}\n{text}\n" for name, text in sorted(content(place).items()))
    said = capsys.readouterr().out
    assert f"\n  systemctl --user {ENABLE}\n" in said
    assert "daemon-reload" not in said  # it is done
    assert f"there is no {place.parents[1] / 'loopmux' / 'llm_backends.yaml'} yet" in said


def test_the_services_start_the_programs_of_this_interpreter(place: Path, systemctl: Systemctl) -> None:
    assert run("install") == 0
    for service in SERVICES:
        started, *_ = command(place, service)
        assert started == str(Path(sys.executable).parent / service.removesuffix(".service"))
        assert os.access(started, os.X_OK)


def test_the_broker_has_the_settings_that_are_named(
    place: Path, systemctl: Systemctl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "broker.yaml"
    assert run("install", "--broker-config", str(settings)) == exitcodes.CONFIG
    assert f"--broker-config: found no file {settings}" in capsys.readouterr().err
    settings.write_text("window: 512\n")
    assert run("install", "--broker-config", str(settings)) == 0
    _, *words = command(place, "loopmux-broker.service")
    assert program._parser().parse_args(words).config == settings


def test_installed_again_it_is_as_it_was(
    place: Path, systemctl: Systemctl, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("install", "--now", "--config", str(models)) == 0
    assert systemctl.told() == [ASKED, "daemon-reload", ENABLE]
    before = {path: path.stat().st_mtime_ns for path in place.iterdir()}
    capsys.readouterr()
    assert run("install", "--now", "--config", str(models)) == 0
    assert systemctl.told() == [ASKED, "daemon-reload", RESTART, ENABLE]
    assert capsys.readouterr().out.count("as it was: ") == len(TEXTS)
    assert {path: path.stat().st_mtime_ns for path in place.iterdir()} == before


def test_what_runs_is_started_again(
    place: Path, systemctl: Systemctl, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("install") == 0
    systemctl.told()
    capsys.readouterr()
    assert run("install", "--config", str(models)) == 0
    assert systemctl.told() == [ASKED, "daemon-reload"]
    said = capsys.readouterr().out
    assert said.count("written: ") == 1
    assert f"\n  systemctl --user {RESTART}\n  systemctl --user {ENABLE}\n" in said
    models.with_name("more.yaml").write_text(MODELS)
    assert run("install", "--now", "--config", str(models.with_name("more.yaml"))) == 0
    assert systemctl.told() == [ASKED, "daemon-reload", RESTART, ENABLE]


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        (None, "found no systemd: there is no program systemctl"),
        ("echo Failed to connect to bus >&2; exit 1", "found no systemd of this user: Failed to connect to bus"),
        ("echo Running in chroot, ignoring command >&2", "found no systemd of this user: Running in chroot"),
    ],
)
def test_without_systemd_the_files_are_written_and_what_was_not_done_is_said(
    does: str | None, reason: str, place: Path, systemctl: Systemctl, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if does is None:
        (systemctl.folder / "systemctl").unlink()
    else:
        systemctl.does(does)
    assert run("install", "--now", "--config", str(models)) == exitcodes.FAILURE
    assert reason in capsys.readouterr().err
    assert not place.exists()
    assert run("install", "--config", str(models)) == 0
    assert sorted(content(place)) == sorted(TEXTS)
    said = capsys.readouterr().out
    assert f"systemd was told nothing: {reason}" in said
    assert f"\n  systemctl --user daemon-reload\n  systemctl --user {ENABLE}\n" in said
    assert run("uninstall") == 0
    assert content(place) == {}
    said = capsys.readouterr().out
    assert "neither stopped nor disabled: " in said
    assert reason in said
    assert set(systemctl.told()) <= {ASKED}


def test_another_folder_is_none_of_systemds(tmp_path: Path, place: Path, systemctl: Systemctl) -> None:
    folder = tmp_path / "units"
    assert run("install", "--folder", str(folder)) == 0
    assert sorted(content(folder)) == sorted(TEXTS)
    assert run("uninstall", "--folder", str(folder)) == 0
    assert content(folder) == {}
    assert systemctl.told() == []
    assert not place.exists()


def test_an_edited_unit_is_left_alone_and_so_are_the_others(
    place: Path, systemctl: Systemctl, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("install") == 0
    edited = place / "loopmux-broker.service"
    edited.write_text(edited.read_text().replace("LimitNOFILE=65536", "LimitNOFILE=1024"))
    (place / "loopmux-clients.socket").unlink()
    before = content(place)
    systemctl.told()
    for words in (["install"], ["install", "--now", "--config", str(models)], ["uninstall"]):
        assert run(*words) == exitcodes.FAILURE
        error = capsys.readouterr().err
        assert f"{edited}: found what" in error
        assert "--force" in error
        assert content(place) == before
        assert systemctl.told() == [ASKED]
    assert run("install", "--force") == 0
    assert sorted(content(place)) == sorted(TEXTS)
    assert all(units.unedited(text) for text in content(place).values())
    edited.write_text("[Service]\n")
    assert run("uninstall", "--force") == 0
    assert content(place) == {}


def test_uninstall_stops_disables_and_removes_what_install_wrote_and_nothing_else(
    place: Path, systemctl: Systemctl, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("install") == 0
    (place / "loopmux-broker.service.d").mkdir()
    others = [place / "other.service", place / "loopmux-broker.service.d" / "override.conf"]
    for other in others:
        other.write_text("[Service]\n")
    unit = place / "loopmux-broker.service"  # there as long as systemd is to stop it, gone when it is to look again
    systemctl.does(f"case $2 in disable) test -e {unit};; daemon-reload) test ! -e {unit};; *) echo Version=252;; esac")
    assert run("uninstall") == 0
    assert systemctl.told() == [ASKED, f"disable --now {' '.join(TEXTS)}", "daemon-reload"]
    assert sorted(path for path in place.rglob("*") if path.is_file()) == sorted(others)
    capsys.readouterr()
    assert run("uninstall") == 0
    assert "nothing to remove" in capsys.readouterr().out
    assert systemctl.told() == [ASKED]


@pytest.mark.parametrize("words", [["install"], ["uninstall"]])
def test_what_systemd_does_not_do_is_a_failure(
    words: list[str], place: Path, systemctl: Systemctl, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("install") == 0
    systemctl.does("case $2 in show) echo Version=252;; *) exit 4;; esac")
    assert run(*words) == exitcodes.FAILURE
    assert "found exit code 4, expected 0" in capsys.readouterr().err
    assert sorted(content(place)) == sorted(TEXTS)


def test_the_launcher_gets_the_configuration_that_was_named(
    place: Path, systemctl: Systemctl, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsers = {"loopmux-broker": program._parser(), "loopmux-launcher": parser(COMMANDS)}
    monkeypatch.chdir(models.parent)
    odd = models.rename(models.with_name("""my 100% "$HOME" \\n'models'.yaml"""))
    for named, expected in (([], place.parents[1] / "loopmux" / "llm_backends.yaml"), (["--config", odd.name], odd)):
        assert run("install", *named) == 0
        for service in SERVICES:
            started, *words = command(place, service)
            name = Path(started).name
            options = parsers[name].parse_args(words)
            assert options.config == (expected if name == "loopmux-launcher" else None)
    written = content(place)
    monkeypatch.setenv("LOOPMUX_CONFIG", odd.name)
    assert run("install") == 0
    assert content(place) == written


def test_a_configuration_that_cannot_be_used_is_refused(
    place: Path, systemctl: Systemctl, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("install", "--config", "nowhere.yaml") == exitcodes.CONFIG
    assert "--config: found no file nowhere.yaml" in capsys.readouterr().err
    models.write_text("modells: {}\n")
    assert run("install", "--now", "--config", str(models)) == exitcodes.CONFIG
    assert "modells" in capsys.readouterr().err
    assert run("install", "--now") == exitcodes.CONFIG  # the launcher would end at once
    assert "llm_backends.yaml: found No such file" in capsys.readouterr().err
    assert not place.exists()


# --- a virtual environment --------------------------------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path: Path, home: Path) -> Path:
    """A virtual environment in a folder that needs quotes, without a program of ours."""
    folder = tmp_path / "my 100% $env"
    venv.create(folder, symlinks=True)
    return folder / "bin"


def installed(environment: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [environment / "python", "-m", "loopmux", "systemd", "install", "--folder", folder, *words]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)


def test_programs_that_are_not_installed_are_asked_for(environment: Path, tmp_path: Path) -> None:
    done = installed(environment, tmp_path / "units")
    assert done.returncode == exitcodes.FAILURE
    assert f"found no loopmux-launcher in {environment}" in done.stderr
    assert "pip install '.[server]'" in done.stderr
    assert not (tmp_path / "units").exists()


def test_systemd_finds_the_units_of_a_virtual_environment_good(environment: Path, models: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed, so nobody here can tell what systemd thinks of the units")
    programs = [environment / command(SHIPPED, service)[0] for service in SERVICES]
    for file in programs:
        file.write_text("#!/bin/sh\n")
        file.chmod(0o755)
    folder = tmp_path / "units"
    models = models.rename(models.with_name('my "$models" 50%.yaml'))
    done = installed(environment, folder, "--config", str(models))
    assert done.returncode == 0, done.stderr

    def verify() -> subprocess.CompletedProcess[str]:
        command = ["systemd-analyze", "--user", "verify", *folder.iterdir()]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    good = verify()
    assert (good.returncode, good.stderr) == (0, "")
    programs[0].unlink()
    assert f"{programs[0]} is not executable" in verify().stderr
