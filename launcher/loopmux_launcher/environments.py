"""Model environments: virtual environments that are built, or existing ones that are probed and used as they are.

An environment lives under ``envs/<name>/<hash>``, the hash taken over all that it is made from. One process builds,
others wait at the lock; ``current`` is switched by renaming a link, and workers that run keep what they have.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from loopmux import folders
from loopmux_launcher import envplan, envstore, installer, integrity, interpreters, lockfile, requirements, tools
from loopmux_launcher.config import Environment
from loopmux_launcher.envstore import Built
from loopmux_launcher.installer import Installation, Log
from loopmux_launcher.interpreters import EnvironmentUnusable, Interpreter
from loopmux_launcher.lock import locked
from loopmux_launcher.probe import probe
from loopmux_launcher.progress import Report


def prepare(
    environment: Environment,
    folder: Path,
    code: Path,
    log: Path,
    report: Report,
    *,
    torch: bool,
    anew: bool = False,
    forward: bool = False,
) -> Built:
    """Make an environment ready for workers: build it if need be, probe it.

    Args:
        folder: where environments are kept (``envs``).
        code: the folder with the workers' code.
        log: file for the full output of the installer.
        torch: whether workers in it need torch, transformers and peft (all but the echo engine do).
        anew: build it beside the one that is there.
        forward: give up an earlier rollback.

    Raises:
        EnvironmentUnusable: with the reason and what to do about it.
    """
    if environment.path is not None:
        report(f"probing {environment.path}")
        return Built(environment.path, probe(environment.path, code, environment.variables, torch=torch, ours=False))
    interpreter = interpreters.find(environment.python)
    digest = identity(environment, interpreter)
    home = folder / environment.name
    with _full_disk_told(home), _held(home, report):
        state = envstore.read_state(home)
        if forward or anew:
            state = envplan.forward(state, digest)
        chosen = None if anew else envplan.choose(digest, envstore.good(home), state)
        built = envstore.read_marker(home / chosen) if chosen else None
        if built is None:
            envstore.remove_unfinished(home)
            target = home / envplan.next_folder(digest, envstore.folders(home))
            built = _build(environment, interpreter, target, code, log, report, torch=torch)
        elif (torch and not built.torch) or built.code != code.name:
            report("probing")
            built = _probed(built, code, environment, torch=torch or built.torch)
        if state.instead.get(digest) == built.folder.name:
            report(f"rolled back to {built.folder.name}; `loopmux env build {environment.name}` goes forward again")
        _use(environment, home, built, state)
    return built


def identity(environment: Environment, interpreter: Interpreter) -> str:
    """The hash of everything an environment is made from.

    Raises:
        EnvironmentUnusable: requirements and lock file disagree, or one of them cannot be read.
    """
    parts = [str(interpreter.executable), interpreter.version, interpreter.implementation, interpreter.platform]
    lock = agreed_lock(environment, interpreter)
    if lock is not None:
        return envplan.identity(parts, [f"{pin.requirement} {' '.join(pin.hashes)}" for pin in lock.pins])
    own = [f"{name}={value}" for name, value in sorted(environment.variables.items()) if name[:4] in ("PIP_", "UV_")]
    return envplan.identity(parts, [*environment.index_options, *requirements.declared(environment), *own])


def locate(environment: Environment, folder: Path) -> Path:
    """The interpreter of an environment that is ready to be used.

    Raises:
        EnvironmentUnusable: it is not built yet, or cannot be told.
    """
    if environment.path is not None:
        return environment.path
    return selected(environment, folder).python


def selected(environment: Environment, folder: Path) -> Built:
    """The built environment that a declaration means.

    Raises:
        EnvironmentUnusable: it is not built yet, or cannot be told.
    """
    chosen = chosen_folder(environment, folder)
    built = envstore.read_marker(folder / environment.name / chosen) if chosen else None
    if built is None:
        raise EnvironmentUnusable(
            f"environment {environment.name} is not built: run  loopmux env build {environment.name}  "
            "(with the same --config)"
        )
    return built


def chosen_folder(environment: Environment, folder: Path) -> str | None:
    """The name of that one's folder; None if it is not built.

    Raises:
        EnvironmentUnusable: it cannot be told.
    """
    home = folder / environment.name
    return envplan.choose(digest_of(environment), envstore.good(home), envstore.read_state(home))


def digest_of(environment: Environment) -> str:
    """The hash of everything it is made from, its interpreter looked for.

    Raises:
        EnvironmentUnusable: it cannot be told.
    """
    return identity(environment, interpreters.find(environment.python))


def is_rolled_back(environment: Environment, folder: Path) -> bool:
    """Whether a declaration is served by an earlier build than its own.

    Raises:
        EnvironmentUnusable: it cannot be told.
    """
    instead = envstore.read_state(folder / environment.name).instead
    digest = digest_of(environment)
    return digest in instead and instead[digest] == chosen_folder(environment, folder)


# --- lock files -------------------------------------------------------------------------------------------------------


def agreed_lock(environment: Environment, interpreter: Interpreter) -> lockfile.Lock | None:
    """The lock of an environment, None if it has none.

    Raises:
        EnvironmentUnusable: it cannot be read, or disagrees with the requirements.
    """
    file = environment.lock_file
    lock = read_lock(file) if file else None
    if lock is None:
        return None
    difference = lockfile.disagreement(lock, requirements.packages(environment), _made_for(interpreter))
    if difference:
        raise EnvironmentUnusable(
            f"{file} disagrees with the requirements: {difference}: run  loopmux env lock {environment.name}  "
            "(with the same --config), or remove that file"
        )
    return lock


def read_lock(file: Path) -> lockfile.Lock | None:
    """A lock file; None if it is not there.

    Raises:
        EnvironmentUnusable: it cannot be read.
    """
    try:
        return lockfile.parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, lockfile.Unlockable) as error:
        raise EnvironmentUnusable(f"{file} is no lock file: {error}: remove it, or write it anew") from error


def resolve(environment: Environment, folder: Path, log: Path, report: Report) -> lockfile.Lock:
    """What the requirements mean today.

    Raises:
        EnvironmentUnusable: with the reason.
    """
    interpreter = interpreters.find(environment.python)
    tool = installer.choose(environment.installer)
    report(f"resolving with {tool.name} for {_made_for(interpreter)}, log {log}")
    home = folder / environment.name
    with (
        _full_disk_told(home), _held(home, report), Log(log) as record,
        tempfile.TemporaryDirectory(prefix=".resolving-", dir=home, ignore_cleanup_errors=True) as scratch,
    ):  # fmt: skip
        found = Installation(environment, tool, Path(scratch), record, report).resolve(interpreter)
    return lockfile.Lock(_made_for(interpreter), requirements.packages(environment), found)


def _made_for(interpreter: Interpreter) -> str:
    minor = ".".join(interpreter.version.split(".")[:2])
    return f"{interpreter.implementation} {minor} on {interpreter.platform}"


# --- verify, rollback, prune ------------------------------------------------------------------------------------------


def verify(environment: Environment, folder: Path, code: Path, report: Report, *, torch: bool) -> str:
    """Look at every file of an environment and probe it; returns the probe's summary.

    Raises:
        EnvironmentUnusable: it is not built, damaged, or fails its probe.
    """
    if environment.path is not None:
        report(f"probing {environment.path}")
        return probe(environment.path, code, environment.variables, torch=torch, ours=False)
    built = selected(environment, folder)
    report(f"reading the files of {built.folder}")
    found = integrity.damage(built.folder)
    rebuild = f"run  loopmux env build --anew {environment.name}"
    if found:
        shown = "".join(f"\n    {text}" for text in found[:5]) + (
            f"\n    and {len(found) - 5} more" if found[5:] else ""
        )
        raise EnvironmentUnusable(f"{built.folder} is damaged: {rebuild}{shown}")
    report("probing")
    try:
        return probe(built.python, code, environment.variables, torch=torch, ours=True)
    except EnvironmentUnusable as error:
        raise EnvironmentUnusable(f"{error}\nif it did before: {rebuild}") from error


def rollback(environment: Environment, folder: Path, code: Path, report: Report, *, torch: bool) -> Built:
    """Let a declaration be served by what was in use before, the last one that passes its probe.

    Raises:
        EnvironmentUnusable: there is none.
    """
    if environment.path is not None:
        raise EnvironmentUnusable(
            f"environment {environment.name} is {environment.path}: what is not built is not rolled back"
        )
    home = folder / environment.name
    digest = digest_of(environment)
    with _held(home, report):
        state, good = envstore.read_state(home), envstore.good(home)
        now = envplan.choose(digest, good, state)
        ours = [f for f in good if str(environment.file) in envstore.configurations(home / f)]
        for candidate in envplan.earlier(state, now, ours):
            built = envstore.read_marker(home / candidate)
            assert built is not None  # it is a good one, and nobody else removes any now
            report(f"probing {candidate}")
            try:
                built = _probed(built, code, environment, torch=torch)
            except EnvironmentUnusable as error:
                report(f"passing over {candidate}: {error}")
                continue
            _use(environment, home, built, envplan.rolled_back(state, digest, now, candidate))
            return built
    raise EnvironmentUnusable(
        f"environment {environment.name} has no earlier build that works: `loopmux env list` shows what there is"
    )


class BeingBuilt(Exception):
    """Somebody builds in a name's folder."""


def remove(folder: Path, found: list[envplan.Found]) -> list[envplan.Found]:
    """Remove environments, and the folders of names of which none is left; returns those that are being built.

    What a process has begun to use meanwhile stays.
    """
    left = []
    for name in dict.fromkeys(one.name for one in found):
        home = folder / name
        mine = [one for one in found if one.name == name]
        try:
            with locked(home / envstore.LOCK, _refuse_to_wait):
                used = envstore.processes(folder)
                for one in mine:
                    if (name, one.folder) not in used:
                        envstore.remove(home / one.folder)
                if not envstore.folders(home):
                    shutil.rmtree(home)
        except BeingBuilt:
            left += mine
    return left


def _refuse_to_wait(pid: str) -> None:
    raise BeingBuilt(pid)


# --- building ---------------------------------------------------------------------------------------------------------


def _build(
    environment: Environment,
    interpreter: Interpreter,
    target: Path,
    code: Path,
    log: Path,
    report: Report,
    *,
    torch: bool,
) -> Built:
    tool = installer.choose(environment.installer)
    lock = environment.lock_file if agreed_lock(environment, interpreter) else None
    report(f"building with Python {interpreter.version} and {tool.name}, log {log}")
    try:
        with Log(log) as record:
            installation = Installation(environment, tool, target, record, report)
            installation.create(interpreter)
            installation.install(lock)
        report("probing")
        begun = Built(target / "bin" / "python", "", interpreter.version, when=time.time())
        return _probed(begun, code, environment, torch=torch)
    except BaseException:  # a failure or Ctrl-C alike: nothing half is left
        envstore.remove(target)
        raise


def _probed(built: Built, code: Path, environment: Environment, *, torch: bool) -> Built:
    """Probe what was built, and mark it as good."""
    summary = probe(built.python, code, environment.variables, torch=torch, ours=True)
    built = replace(built, summary=summary, torch=torch, code=code.name)
    envstore.write_marker(built)
    return built


def _use(environment: Environment, home: Path, built: Built, state: envplan.State) -> None:
    envstore.note_user(built.folder, environment.file)
    envstore.switch(home, built.folder.name)
    envstore.write_state(home, envplan.switched(state, built.folder.name))


def _held(home: Path, report: Report) -> AbstractContextManager[None]:
    """The lock of a name, which builders, resolvers and removers of its environments take in turn."""
    return locked(home / envstore.LOCK, lambda pid: report(f"waiting for process {pid}, which is building it"))


@contextmanager
def _full_disk_told(folder: Path) -> Iterator[None]:
    """Say what helps where the system says that a disk is full; pip's own message is seen to elsewhere."""
    try:
        yield
    except OSError as error:
        if error.errno not in folders.FULL:
            raise
        at = Path(error.filename) if error.filename else folder
        place = next(p for p in (at, *at.parents) if p.exists())
        raise EnvironmentUnusable(tools.full_disk(place, shutil.disk_usage(place).free)) from error
