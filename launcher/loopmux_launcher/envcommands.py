"""``loopmux env …``: building, locking, looking at and removing model environments."""

from __future__ import annotations

import argparse
import json
import math
import signal
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from loopmux import exitcodes
from loopmux.errors import ConfigError, LoopmuxError
from loopmux_launcher import atomic, config, environments, envplan, envstore, lockfile, places, tether, workercode
from loopmux_launcher.arguments import Command
from loopmux_launcher.config import Configuration, Environment
from loopmux_launcher.console import Console
from loopmux_launcher.events import Announce
from loopmux_launcher.interpreters import EnvironmentUnusable
from loopmux_launcher.progress import Report
from loopmux_launcher.reader import load


def _build(options: argparse.Namespace) -> int:
    if options.parent_pid is not None:
        tether.die_with_parent(options.parent_pid)
    _stop_in_good_order()
    configuration = load(config.find(options.config))
    places.usable_data()
    if not configuration.environments:
        print("nothing to build: the configuration names no environment")
    build = _build_for_launcher if options.log_format == "json" else _build_for_people
    return max((build(configuration, one, options) for one in _wanted(configuration, options.name)), default=0)


def _build_for_people(configuration: Configuration, one: Environment, options: argparse.Namespace) -> int:
    with Console(options.log_format, farewell=math.inf) as console:
        built = _prepare(configuration, one, _progress(console, one), anew=options.anew, forward=True)
        console.announce(Announce(_subject(one), f"ready at {built.folder}: {built.summary}"))
    return 0


def _build_for_launcher(configuration: Configuration, one: Environment, options: argparse.Namespace) -> int:
    try:
        built = _prepare(configuration, one, lambda text: _tell("building", text), anew=options.anew, forward=False)
    except (LoopmuxError, OSError) as error:
        _tell("failed", str(error))
        return exitcodes.FAILURE
    _tell("ready", built.summary, python=str(built.python))
    return 0


def _prepare(
    configuration: Configuration, one: Environment, report: Report, *, anew: bool, forward: bool
) -> envstore.Built:
    code, log, torch = _code(), _log(one), _torch(configuration, one)
    return environments.prepare(one, _envs(), code, log, report, torch=torch, anew=anew, forward=forward)


def _tell(phase: str, detail: str, **more: str) -> None:
    """One line for the launcher that started this build."""
    print(json.dumps({"phase": phase, "detail": detail, **more}), flush=True)


def _lock(options: argparse.Namespace) -> int:
    _stop_in_good_order()
    configuration = load(config.find(options.config))
    with Console(options.log_format, farewell=math.inf) as console:
        for one in _wanted(configuration, options.name):
            if one.lock_file is None:
                if options.name:
                    raise ConfigError(f"environment {one.name} is {one.path}: what is not built has no lock file")
                continue
            lock = environments.resolve(one, _envs(), _log(one), _progress(console, one))
            old = _old_lock(one.lock_file)
            for text in lockfile.changes(old, lock) if old else ():
                console.announce(Announce(_subject(one), text))
            atomic.write(one.lock_file, lockfile.render(lock))
            console.announce(Announce(_subject(one), f"{len(lock.pins)} packages locked in {one.lock_file}"))
    return 0


def _old_lock(file: Path) -> lockfile.Lock | None:
    try:
        return environments.read_lock(file)
    except EnvironmentUnusable:
        return None  # it is about to be written anew


def _verify(options: argparse.Namespace) -> int:
    configuration = load(config.find(options.config))
    code, worst = _code(), 0
    with Console(options.log_format, farewell=math.inf) as console:
        for one in _wanted(configuration, options.name):
            torch = _torch(configuration, one)
            try:
                summary = environments.verify(one, _envs(), code, _progress(console, one), torch=torch)
            except EnvironmentUnusable as error:
                console.announce(Announce(_subject(one), str(error), "error"))
                worst = exitcodes.FAILURE
            else:
                console.announce(Announce(_subject(one), f"good: {summary}"))
    return worst


def _path(options: argparse.Namespace) -> int:
    configuration = load(config.find(options.config))
    (one,) = _wanted(configuration, options.name)
    print(environments.locate(one, _envs()))
    return 0


def _rollback(options: argparse.Namespace) -> int:
    configuration = load(config.find(options.config))
    (one,) = _wanted(configuration, options.name)
    with Console(options.log_format, farewell=math.inf) as console:
        torch = _torch(configuration, one)
        built = environments.rollback(one, _envs(), _code(), _progress(console, one), torch=torch)
        text = (
            f"rolled back to {built.folder}: {built.summary}; used from the next start, or SIGHUP to a `loopmux up` "
            f"that runs, until `loopmux env build {one.name}` or another declaration"
        )
        console.announce(Announce(_subject(one), text))
    return 0


# --- list and prune ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of ``env list``. ``size`` in bytes, None for what is not ours to measure."""

    name: str
    state: str
    size: int | None
    models: tuple[str, ...]
    processes: tuple[int, ...]
    path: str
    detail: str


def _list(options: argparse.Namespace) -> int:
    configuration = load(config.find(options.config))
    rows = _rows(configuration, _envs())
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return 0
    for row in rows:
        size = f"{row.size / 1e6:.0f} MB" if row.size is not None else ""
        users = [*row.models, *(f"process {pid}" for pid in row.processes)]
        print(f"{row.name:16} {row.state:12} {size:>9}  {row.path}  {row.detail}".rstrip())
        if users:
            print(f"{'':40}used by {', '.join(users)}")
    return 0


def _rows(configuration: Configuration, envs: Path) -> list[_Row]:
    found = {(one.name, one.folder): one for one in envstore.scan(envs)}
    rows = []
    for one in configuration.environments.values():
        models = tuple(m.id for m in configuration.models.values() if m.environment == one.name)
        if one.path is not None:
            rows.append(_Row(one.name, "existing", None, models, (), str(one.path), ""))
            continue
        try:
            built = environments.selected(one, envs)
        except EnvironmentUnusable as error:
            rows.append(_Row(one.name, "not ready", None, models, (), "", str(error)))
            continue
        there = found.pop((one.name, built.folder.name), envplan.Found(one.name, built.folder.name, good=True))
        size = envstore.size(built.folder)
        state = "rolled back" if environments.is_rolled_back(one, envs) else "built"
        rows.append(_Row(one.name, state, size, models, there.processes, str(built.python), built.summary))
    for (name, folder), there in found.items():
        target = envs / name / folder
        marker = envstore.read_marker(target)
        others = ", ".join(file for file in there.configurations if file != str(configuration.file.resolve()))
        detail = f"{marker.summary}; declared in {others}" if marker and others else marker.summary if marker else ""
        state = "other" if marker else "unfinished"
        rows.append(_Row(name, state, envstore.size(target), (), there.processes, str(target), detail))
    return rows


def _prune(options: argparse.Namespace) -> int:
    configuration = load(config.find(options.config))
    envs = _envs()
    found = envstore.scan(envs)
    files = {file for one in found for file in one.configurations if Path(file).is_file()}
    wanted, unreadable = set(_meant(configuration.environments.values(), envs)), []
    for file in sorted(files - {str(configuration.file.resolve())}):
        try:
            wanted |= set(_meant(load(Path(file)).environments.values(), envs))
        except LoopmuxError as error:
            unreadable.append(file)
            print(f"note: what {file} uses stays, since it cannot be read: {error}")
    doomed = envplan.superfluous(found, wanted, unreadable)
    sizes = {one: envstore.size(envs / one.name / one.folder) for one in doomed}
    left = [] if options.dry_run else environments.remove(envs, doomed)
    for one in doomed:
        said = "is being built, left alone" if one in left else "would be removed" if options.dry_run else "removed"
        print(f"{said}: {envs / one.name / one.folder}, {sizes[one] / 1e6:.0f} MB")
    freed = sum(size for one, size in sizes.items() if one not in left)
    print(f"{freed / 1e6:.0f} MB {'to free' if options.dry_run else 'freed'}" if doomed else "nothing to remove")
    return 0


def _meant(declared: Iterable[Environment], envs: Path) -> list[tuple[str, str]]:
    """Name and folder of what a configuration's environments mean, as far as they are built.

    Raises:
        EnvironmentUnusable: requirements and lock disagree, so nobody can tell.
    """
    return [
        (one.name, folder)
        for one in declared
        if one.path is None and (folder := environments.chosen_folder(one, envs)) is not None
    ]


# --- what they share --------------------------------------------------------------------------------------------------


def _stop_in_good_order() -> None:
    """Have what runs here be interrupted by what ends programs, but not by what a user of nohup has it pass over."""
    for number in tether.ENDS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupted)


def _interrupted(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature is Python's
    """Only once: cleaning up is not interrupted."""
    for each in tether.ENDS:
        signal.signal(each, lambda *_: None)  # with SIG_IGN, Python would complain of one that comes just before it
    raise KeyboardInterrupt


def _wanted(configuration: Configuration, name: str | None) -> list[Environment]:
    if name is None:
        return list(configuration.environments.values())
    environment = configuration.environments.get(name)
    if environment is None:
        known = ", ".join(configuration.environments) or "none"
        raise ConfigError(f"{configuration.file}: found no environment {name!r}, expected one of: {known}")
    return [environment]


def _torch(configuration: Configuration, one: Environment) -> bool:
    """Whether a model in it needs torch."""
    return any(m.environment == one.name and m.entry.engine != "echo" for m in configuration.models.values())


def _envs() -> Path:
    return places.data() / "envs"


def _code() -> Path:
    return workercode.install(places.data() / "code")


def _log(one: Environment) -> Path:
    return places.usable_logs() / f"env-{one.name}.log"


def _subject(one: Environment) -> str:
    return f"environment {one.name}"


def _progress(console: Console, one: Environment) -> Report:
    return lambda text: console.announce(Announce(_subject(one), text, "progress"))


COMMANDS: dict[str, Command] = {
    "env build": _build,
    "env lock": _lock,
    "env verify": _verify,
    "env list": _list,
    "env path": _path,
    "env rollback": _rollback,
    "env prune": _prune,
}
