"""The unit files in configs/systemd/: what they name exists, and the broker serves the sockets that they make."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest

from brokerwire import PATIENCE, Peer
from loopmux import exitcodes
from loopmux.endpoints import default_endpoint, worker_endpoint
from loopmux.listening import Listening
from loopmux_broker import program
from loopmux_launcher.arguments import parser
from loopmux_launcher.commands import COMMANDS

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "configs" / "systemd"
SERVICES, SOCKETS = sorted(UNITS.glob("*.service")), sorted(UNITS.glob("*.socket"))
PARSERS = {"loopmux-broker": program._parser(), "loopmux-launcher": parser(COMMANDS)}


def unit(path: Path) -> ConfigParser:
    found = ConfigParser(interpolation=None, strict=True)
    found.optionxform = str  # type: ignore[assignment,method-assign]
    found.read_string(path.read_text())
    return found


def command(path: Path) -> list[str]:
    return shlex.split(unit(path)["Service"]["ExecStart"])


def test_there_are_units() -> None:
    assert [path.name for path in (*SERVICES, *SOCKETS)] == [
        "loopmux-broker.service",
        "loopmux-launcher.service",
        "loopmux-clients.socket",
        "loopmux-workers.socket",
    ]


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_commands_are_programs_of_ours_with_arguments_that_they_take(path: Path) -> None:
    name, *rest = command(path)
    assert name in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    PARSERS[name].parse_args(rest)  # ends the test with its usage where it does not take them


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_what_would_fail_again_is_not_started_again(path: Path) -> None:
    codes = unit(path)["Service"]["RestartPreventExitStatus"].split()
    assert codes == [str(exitcodes.USAGE), str(exitcodes.CONFIG)]


def test_what_a_reload_ends_in_its_first_moments_is_started_again() -> None:
    reloaded = [unit(path)["Service"] for path in SERVICES if "ExecReload" in unit(path)["Service"]]
    assert [one["RestartForceExitStatus"] for one in reloaded] == ["SIGHUP"]


@pytest.mark.parametrize("path", [*SERVICES, *SOCKETS], ids=lambda path: path.name)
def test_units_that_are_named_exist(path: Path) -> None:
    words = " ".join(value for section in unit(path).values() for value in section.values()).split()
    named = {word for word in words if word.endswith((".service", ".socket"))}
    assert named <= {other.name for other in (*SERVICES, *SOCKETS)}


def paths(runtime: Path) -> dict[str, str]:
    """Where the socket units listen, by what they call their descriptors."""
    found = [unit(path)["Socket"] for path in SOCKETS]
    return {one["FileDescriptorName"]: one["ListenStream"].replace("%t", str(runtime)) for one in found}


def test_they_listen_where_clients_and_workers_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("LOOPMUX_ENDPOINT", raising=False)
    clients, workers = default_endpoint(), worker_endpoint(default_endpoint())
    listened = {name: f"ipc://{path}" for name, path in paths(tmp_path).items()}
    assert listened == {"clients": clients, "workers": workers}


def start(sockets: dict[str, Listening]) -> subprocess.Popen[str]:
    """The broker as systemd starts it: its own process id in LISTEN_PID, its sockets from descriptor 3 on."""
    _, *rest = command(UNITS / "loopmux-broker.service")
    given = " ".join(f"{n}<&{one.fileno()}" for n, one in enumerate(sockets.values(), 3))
    script = f"export LISTEN_PID=$$; exec {shlex.join([sys.executable, '-m', 'loopmux_broker', *rest])} {given}"
    variables = {"LISTEN_FDS": str(len(sockets)), "LISTEN_FDNAMES": ":".join(sockets)}
    descriptors = [one.fileno() for one in sockets.values()]
    process = subprocess.Popen(
        ["bash", "-c", script], stderr=subprocess.PIPE, text=True, env=os.environ | variables, pass_fds=descriptors
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    assert '"ready"' in line, line + process.stderr.read()
    return process


def test_the_broker_takes_their_sockets_over_again_and_again(tmp_path: Path) -> None:
    sockets = {name: Listening(f"ipc://{path}") for name, path in paths(tmp_path).items()}
    process = None
    try:
        with Peer(sockets["clients"].endpoint) as client, Peer(sockets["workers"].endpoint) as worker:
            for _ in range(3):  # systemd starts it again whenever it is killed
                process = start(sockets)
                client.hello()
                worker.register()
                assert [one.name for one in client.status().workers] == ["w1"]
                process.send_signal(signal.SIGKILL)
                process.communicate(timeout=PATIENCE)
            process = start(sockets)
            client.hello()
            process.terminate()
            _, written = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, written
    finally:
        if process is not None and process.poll() is None:
            process.kill()
            process.communicate()
        for one in reversed(sockets.values()):
            one.close()
    assert list(tmp_path.iterdir()) == []
