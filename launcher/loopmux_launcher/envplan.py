"""Which environment a declaration means, and which of those on disk are of no more use. Pure.

An environment's folder is named by the hash of what it is made from; one that is built again beside a damaged one of
the same hash gets a number behind it (``<hash>-2``).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

_FOLDER = re.compile(r"([0-9a-f]{16})(?:-(\d+))?")


@dataclass(frozen=True, slots=True)
class State:
    """What is remembered of a name besides its folders.

    Attributes:
        history: folders in the order in which they were last switched to, the newest last.
        instead: by hash, the folder that it was rolled back to.
    """

    history: tuple[str, ...] = ()
    instead: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Found:
    """A folder on disk.

    Attributes:
        good: it was built to its end.
        configurations: files that declared it when it was last made ready.
        processes: ids of those that run in it.
    """

    name: str
    folder: str
    good: bool
    configurations: tuple[str, ...] = ()
    processes: tuple[int, ...] = ()


def identity(parts: Sequence[str], lines: Sequence[str]) -> str:
    """The hash of everything that an environment is made from."""
    return hashlib.sha256(json.dumps([list(parts), list(lines)]).encode()).hexdigest()[:16]


def choose(digest: str, good: Collection[str], state: State) -> str | None:
    """The folder that serves a declaration: what it was rolled back to, else the latest build of its hash."""
    instead = state.instead.get(digest)
    if instead in good:
        return instead
    builds = [(number, folder) for folder in good if (number := _generation(folder, digest))]
    return max(builds)[1] if builds else None


def next_folder(digest: str, taken: Collection[str]) -> str:
    """A folder for another build of a hash."""
    latest = max((_generation(folder, digest) for folder in taken), default=0)
    return f"{digest}-{latest + 1}" if latest else digest


def switched(state: State, folder: str) -> State:
    """The state once a folder is the current one."""
    return State((*(f for f in state.history if f != folder), folder), state.instead)


def forward(state: State, digest: str) -> State:
    """The state without the rollback of a hash."""
    return State(state.history, {d: f for d, f in state.instead.items() if d != digest})


def rolled_back(state: State, digest: str, now: str | None, folder: str) -> State:
    """The state after a rollback: what was left behind is not in the history, so the next one goes further back."""
    return State(tuple(f for f in state.history if f != now), {**state.instead, digest: folder})


def earlier(state: State, now: str | None, good: Collection[str]) -> list[str]:
    """Where a rollback may go, the best first: what was in use before the folder that is."""
    history = list(state.history)
    if now in history:
        history = history[: history.index(now)]
    return [folder for folder in reversed(history) if folder in good and folder != now]


def superfluous(
    found: Collection[Found], wanted: Collection[tuple[str, str]], unreadable: Collection[str]
) -> list[Found]:
    """What may be removed: what no configuration means any more, and no process runs in.

    Args:
        wanted: name and folder of all that configurations mean.
        unreadable: configurations of which nobody can tell what they mean.
    """
    return [
        one
        for one in found
        if not one.processes
        and (one.name, one.folder) not in wanted
        and not (one.good and any(file in unreadable for file in one.configurations))
    ]


def _generation(folder: str, digest: str) -> int:
    """Which build of a hash a folder is, from 1; 0 if it is none."""
    match = _FOLDER.fullmatch(folder)
    return int(match[2] or 1) if match and match[1] == digest else 0
