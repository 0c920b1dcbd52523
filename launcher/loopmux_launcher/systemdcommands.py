"""``loopmux systemd …``: the units of ``configs/systemd``, made for this installation, where a user's systemd looks."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path

from loopmux import folders
from loopmux.errors import ConfigError, LoopmuxError
from loopmux_launcher import atomic, config, units
from loopmux_launcher.arguments import Command
from loopmux_launcher.reader import load

_SHIPPED = Path(__file__).parent / "systemd"
"""Links to ``configs/systemd``; a wheel has the files."""


def _print(options: argparse.Namespace) -> int:
    for path, text in _wanted(options, _models(options)).items():
        print(f"# {path}\n{text}")
    return 0


def _install(options: argparse.Namespace) -> int:
    file = _models(options)
    wanted, absence = _wanted(options, file), _absence(options)
    if options.now:
        if absence:
            raise LoopmuxError(f"--now: {absence}, expected a systemd that starts the units: leave out --now")
        load(file)
    before = _present(wanted, options)
    folders.usable(_folder(options), "units", "name another with --folder")
    for path, text in wanted.items():
        if text != before.get(path):
            atomic.write(path, text)
        print(f"{'written' if text != before.get(path) else 'as it was'}: {path}")
    if not file.is_file():
        print(f"note: there is no {file} yet, which the launcher reads; --config FILE names another")
    _put_into_force(units.commands(_names(before), _names(wanted)), absence, now=options.now)
    return 0


def _uninstall(options: argparse.Namespace) -> int:
    absence = _absence(options)
    present = _present((_folder(options) / name for name in _shipped()), options)
    if not present:
        print(f"nothing to remove: {_folder(options)} has no unit of Loopmux")
        return 0
    if absence:
        print(f"neither stopped nor disabled: {absence}")
    else:
        _systemctl("disable", "--now", *_names(present))
    for path in present:
        path.unlink()
        print(f"removed: {path}")
    if not absence:
        _systemctl("daemon-reload")
    return 0


# --- files ------------------------------------------------------------------------------------------------------------


def _shipped() -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(_SHIPPED.iterdir())}


def _models(options: argparse.Namespace) -> Path:
    """The configuration file that the launcher reads: one that is named, or else the user's, there or not.

    What lies in the working folder, which ``run`` looks for as well, is another file under systemd.

    Raises:
        ConfigError: one was named that is not there.
    """
    return (config.named(options.config) or config.user_file()).absolute()


def _wanted(options: argparse.Namespace, models: Path) -> dict[Path, str]:
    """What ``install`` writes for this configuration of the launcher, by where.

    Raises:
        ConfigError: the broker's settings are not there, or no unit can name the folder of the programs.
        LoopmuxError: the programs are not installed.
    """
    broker: Path | None = options.broker_config
    if broker is not None and not broker.is_file():
        raise ConfigError(f"--broker-config: found no file {broker}, expected the broker's settings")
    named = {"loopmux-launcher": str(models)} | ({"loopmux-broker": str(broker.absolute())} if broker else {})
    programs = _programs()
    return {_folder(options) / name: units.render(text, programs, named) for name, text in _shipped().items()}


def _folder(options: argparse.Namespace) -> Path:
    folder: Path = options.folder or folders.settings() / "systemd" / "user"
    return folder.absolute()


def _programs() -> str:
    """The folder where this interpreter has the programs of a distribution, or else those that a user installed.

    Raises:
        LoopmuxError: ours are in neither.
    """
    schemes = [sysconfig.get_default_scheme()]
    if sys.prefix == sys.base_prefix:  # a virtual environment has its own
        schemes.append(sysconfig.get_preferred_scheme("user"))
    folders = [sysconfig.get_path("scripts", scheme) for scheme in schemes]
    found = shutil.which("loopmux-launcher", path=os.pathsep.join(folders))
    if found is None:
        raise LoopmuxError(
            f"found no loopmux-launcher in {' or '.join(folders)}, expected the programs that the units start: install "
            "Loopmux with its extra [server], in its source folder  pip install '.[server]'"
        )
    return str(Path(found).parent)


def _present(paths: Iterable[Path], options: argparse.Namespace) -> dict[Path, str]:
    """The units that are there.

    Raises:
        LoopmuxError: one of them is not as ``install`` wrote it, and nobody said that this does not matter.
    """
    found = {path: path.read_bytes().decode(errors="replace") for path in paths if path.exists()}
    edited = [str(path) for path, text in found.items() if not units.unedited(text)]
    if edited and not options.force:
        raise LoopmuxError(
            f"{', '.join(edited)}: found what `loopmux systemd install` did not write, or somebody has edited since; "
            "expected no unit, or one as it was written: keep what you need of it by `systemctl --user edit`, whose "
            "files stay, then go on with --force; nothing was changed"
        )
    return found


def _names(found: Mapping[Path, str]) -> dict[str, str]:
    return {path.name: text for path, text in found.items()}


# --- systemd ----------------------------------------------------------------------------------------------------------


def _absence(options: argparse.Namespace) -> str | None:
    """Why no systemd is told anything; None where this user's is there and looks into the folder."""
    if options.folder:
        return "found a folder that systemd may not know (--folder)"
    try:
        asked = subprocess.run(["systemctl", "--user", "show", "--property=Version"], capture_output=True, text=True)
    except FileNotFoundError:
        return "found no systemd: there is no program systemctl"
    # In a chroot it says that it does nothing there, and calls that a success.
    return None if asked.stdout.startswith("Version=") else f"found no systemd of this user: {asked.stderr.strip()}"


def _put_into_force(commands: list[list[str]], absence: str | None, *, now: bool) -> None:
    """Give systemd all of these commands, or only the first, which starts nothing; the others are printed."""
    given = 0 if absence else len(commands) if now else 1
    for words in commands[:given]:
        _systemctl(*words)
    if absence:
        print(f"systemd was told nothing: {absence}")
    print("next:")
    for words in commands[given:]:
        print(f"  systemctl --user {' '.join(words)}")
    print("  loopmux status")


def _systemctl(*words: str) -> None:
    """Tell this user's systemd something.

    Raises:
        LoopmuxError: it did not do it.
    """
    sys.stdout.flush()
    code = subprocess.run(["systemctl", "--user", *words]).returncode
    if code:
        raise LoopmuxError(
            f"`systemctl --user {' '.join(words)}`: found exit code {code}, expected 0: mend what it says above, then "
            "do this again"
        )


COMMANDS: dict[str, Command] = {
    "systemd print": _print,
    "systemd install": _install,
    "systemd uninstall": _uninstall,
}
