"""Environments as they lie on disk: ``envs/<name>/<hash>``, each with a marker that is written last.

Without its marker a folder counts for nothing, so an interrupted build is never mistaken for an environment.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from loopmux_launcher import atomic
from loopmux_launcher.envplan import Found, State

MARKER = "loopmux.json"
LOCK = ".lock"
_USERS = "configurations"
_STATE = "state.json"


@dataclass(frozen=True, slots=True)
class Built:
    """An environment that works.

    Attributes:
        python: its interpreter.
        summary: what the probe found in it.
        version: of the Python that it was made with.
        torch: whether the probe looked for torch.
        code: the hash of the workers' code that the probe ran.
        when: seconds since the epoch.
    """

    python: Path
    summary: str
    version: str = ""
    torch: bool = True
    code: str = ""
    when: float = 0.0

    @property
    def folder(self) -> Path:
        """The virtual environment."""
        return self.python.parent.parent


def read_marker(target: Path) -> Built | None:
    """The finished environment in a folder, or None."""
    try:
        built = Built(**json.loads((target / MARKER).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    built = replace(built, python=Path(built.python))
    return built if built.python.exists() else None


def write_marker(built: Built) -> None:
    """Mark an environment as finished."""
    atomic.write(built.folder / MARKER, json.dumps({**asdict(built), "python": str(built.python)}, indent=2) + "\n")


def good(home: Path) -> list[str]:
    """The folders of a name that hold a finished environment."""
    return [folder for folder in folders(home) if read_marker(home / folder)]


def folders(home: Path) -> list[str]:
    """All folders of a name, finished or not."""
    try:
        return sorted(p.name for p in home.iterdir() if p.is_dir() and not p.is_symlink())
    except (FileNotFoundError, NotADirectoryError):  # whoever builds there says what is in the way
        return []


def read_state(home: Path) -> State:
    """What is remembered of a name; nothing where it cannot be read."""
    try:
        values = json.loads((home / _STATE).read_bytes())
        return State(tuple(values["history"]), dict(values["instead"]))
    except (OSError, ValueError, KeyError, TypeError):
        return State()


def write_state(home: Path, state: State) -> None:
    """Remember it."""
    if state != read_state(home):
        values = {"history": list(state.history), "instead": dict(state.instead)}
        atomic.write(home / _STATE, json.dumps(values, indent=2) + "\n")


def switch(home: Path, folder: str) -> None:
    """Let ``current`` lead to a folder, in one step. Only for the holder of the lock."""
    link = home / "current"
    if link.is_symlink() and link.readlink() == Path(folder):
        return
    beside = home / ".current"
    beside.unlink(missing_ok=True)  # who had the lock before may have been killed
    beside.symlink_to(folder)
    beside.rename(link)


def configurations(target: Path) -> tuple[str, ...]:
    """The configuration files that declared an environment when it was made ready."""
    try:
        return tuple((target / _USERS).read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError):
        return ()


def note_user(target: Path, file: Path | None) -> None:
    """Remember that a configuration file declares it."""
    known = configurations(target)
    if file is not None and str(file) not in known:
        atomic.write(target / _USERS, "".join(f"{line}\n" for line in (*known, file)))


def remove(target: Path) -> None:
    """Remove a folder; its marker first, so that a removal that is cut short leaves nothing that counts."""
    (target / MARKER).unlink(missing_ok=True)
    if target.exists():
        shutil.rmtree(target)


def remove_unfinished(home: Path) -> None:
    """Remove what builds that were killed have left. Only for the holder of the lock: others may be building."""
    for folder in folders(home):
        if not (home / folder / MARKER).exists():
            remove(home / folder)


def size(target: Path) -> int:
    """Bytes on disk. A file with several links counts whole: uv shares files with its cache."""
    total = 0
    for parent, _, files in os.walk(target):
        for file in files:
            try:
                total += os.lstat(os.path.join(parent, file)).st_blocks * 512  # noqa: PTH118 - tens of thousands
            except FileNotFoundError:
                pass  # it is being built or removed
    return total


def scan(envs: Path) -> list[Found]:
    """Everything below ``envs``, with the processes that run in it."""
    running = processes(envs)
    return [
        Found(home.name, folder, read_marker(home / folder) is not None, configurations(home / folder),
              tuple(running.get((home.name, folder), ())))
        for home in sorted(envs.iterdir() if envs.is_dir() else ())
        if home.is_dir()
        for folder in folders(home)
    ]  # fmt: skip


def processes(envs: Path) -> Mapping[tuple[str, str], list[int]]:
    """By name and folder, the processes that were started in an environment or have loaded a library of it."""
    within = re.compile(re.escape(os.fsencode(envs)) + rb"/([^/\0\n]+)/([^/\0\n ]+)")
    found: dict[tuple[str, str], set[int]] = defaultdict(set)
    for pid, text in _running():
        for name, folder in set(within.findall(text)):
            target = envs / os.fsdecode(name) / os.fsdecode(folder)
            found[target.parent.name, target.resolve().name].add(pid)
    return {key: sorted(pids) for key, pids in found.items()}


def _running() -> Iterator[tuple[int, bytes]]:
    """Every process but this one, with its command line and where the system tells the files that it has mapped."""
    if sys.platform != "linux":
        listing = subprocess.run(["ps", "-axww", "-o", "pid=,command="], capture_output=True, check=True).stdout
        for line in listing.splitlines():
            pid, _, command = line.strip().partition(b" ")
            if int(pid) != os.getpid():
                yield int(pid), command
        return
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                yield int(entry.name), (entry / "cmdline").read_bytes() + b"\0" + (entry / "maps").read_bytes()
            except OSError:
                pass  # it has ended, or is another user's, who has environments of his own
