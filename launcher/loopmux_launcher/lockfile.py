"""Lock files: every package of an environment by its exact version, with the hashes of the files it may come from.

The file is what pip and uv install with ``--require-hashes``; comments in front say what it was made from, so that a
change of the requirements is noticed. It holds for one version of Python on one platform.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MADE_FOR = "# made for: "
_FROM = "# from: "
_HEADER = "# Written by `loopmux env lock`. Change the requirements and run it again rather than this file."
_HASH = re.compile(r"--hash[= ](\w+:[0-9a-f]+)")


class Unlockable(ValueError):
    """Something that has no hash, or no lock file at all; the message says what."""


@dataclass(frozen=True, slots=True)
class Pin:
    """One package: ``name==version`` or ``name @ url``, and the hashes (``sha256:…``) of its files."""

    requirement: str
    hashes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lock:
    """What a lock file says: the Python and platform it holds for, the requirements it was made from, the packages."""

    made_for: str
    inputs: tuple[str, ...]
    pins: tuple[Pin, ...]


def render(lock: Lock) -> str:
    """The lock as text."""
    lines = [_HEADER, _MADE_FOR + lock.made_for, *(_FROM + line for line in lock.inputs), ""]
    lines += [" \\\n    ".join((pin.requirement, *(f"--hash={h}" for h in pin.hashes))) for pin in lock.pins]
    return "\n".join(lines) + "\n"


def parse(text: str) -> Lock:
    """A lock from its text.

    Raises:
        Unlockable: it is not one of ours, or a package has no hash.
    """
    comments = [line for line in text.splitlines() if line.startswith("#")]
    made_for = [line.removeprefix(_MADE_FOR) for line in comments if line.startswith(_MADE_FOR)]
    inputs = tuple(line.removeprefix(_FROM) for line in comments if line.startswith(_FROM))
    if len(made_for) != 1 or not inputs:
        raise Unlockable(f"found no lines {_MADE_FOR.strip()!r} and {_FROM.strip()!r}, expected a lock file")
    return Lock(made_for[0], inputs, pins(text))


def pins(text: str) -> tuple[Pin, ...]:
    """The packages in a requirements text, such as ``uv pip compile --generate-hashes`` writes.

    Raises:
        Unlockable: one without a hash, or without an exact version.
    """
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        requirement = line.split(" --hash", 1)[0].strip()
        if not requirement or requirement.startswith("#"):
            continue
        if "==" not in requirement and " @ " not in requirement:
            raise Unlockable(f"found {requirement!r}, expected a package with its exact version")
        hashes = tuple(_HASH.findall(line))
        if not hashes:
            raise _unhashed(requirement)
        found.append(Pin(requirement, hashes))
    if not found:
        raise Unlockable("found no package, expected at least one")
    return tuple(sorted(found, key=lambda pin: pin.requirement.lower()))


def from_report(report: Mapping[str, Any]) -> tuple[Pin, ...]:
    """The packages in what ``pip install --dry-run --report`` writes (version 1 of that format).

    Raises:
        Unlockable: another format, or a package without a hash.
    """
    if report.get("version") != "1":
        raise Unlockable(f"found version {report.get('version')!r} of pip's installation report, expected '1'")
    found = []
    for item in report["install"]:
        name, version, source = item["metadata"]["name"], item["metadata"]["version"], item["download_info"]
        requirement = f"{name} @ {source['url']}" if item["is_direct"] else f"{name}=={version}"
        digest = source.get("archive_info", {}).get("hashes", {}).get("sha256")
        if not digest:
            raise _unhashed(requirement)
        found.append(Pin(requirement, (f"sha256:{digest}",)))
    return tuple(sorted(found, key=lambda pin: pin.requirement.lower()))


def disagreement(lock: Lock, inputs: Sequence[str], made_for: str) -> str:
    """How the lock differs from what the configuration asks for today; empty if it does not."""
    if lock.made_for != made_for:
        return f"it was made for {lock.made_for}, and this is {made_for}"
    new = [line for line in inputs if line not in lock.inputs]
    gone = [line for line in lock.inputs if line not in inputs]
    parts = [f"{', '.join(new)} is not in it"] if new else []
    parts += [f"it was made for {', '.join(gone)}"] if gone else []
    return "; ".join(parts)


def changes(old: Lock, new: Lock) -> list[str]:
    """What a new lock has that the old one had not, one line for each package."""
    before = _versions(old.pins)
    after = _versions(new.pins)
    told = []
    for name in sorted({*before, *after}):
        was, now = before.get(name), after.get(name)
        if was != now:
            told.append(
                f"{name} {now}" if was is None else f"{name} removed" if now is None else f"{name} {was} → {now}"
            )
    return told


def _versions(pinned: Sequence[Pin]) -> dict[str, str]:
    split = (re.split(r"==| @ ", pin.requirement, maxsplit=1) for pin in pinned)
    # pip and uv spell names differently
    return {re.sub(r"[-_.]+", "-", name.strip()).lower(): version.split(";")[0].strip() for name, version in split}


def _unhashed(requirement: str) -> Unlockable:
    return Unlockable(
        f"{requirement} has no hash: folders and repositories cannot be locked, "
        "give a wheel or an archive, or a version from an index"
    )
