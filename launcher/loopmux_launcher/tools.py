"""The two installers, uv and pip: their command lines, and what their output means. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loopmux_launcher.lifecycle import spell_exit

_UNREACHABLE = re.compile(
    r"Retrying \(|Request failed after|Failed to establish a new connection|network was disabled|Could not fetch URL"
)
_WHY_UNREACHABLE = re.compile(
    r"\[Errno -?\d+\] ([^'\"()]+)|(?:cause|Caused by): (.*(?:refused|lookup|timed out|unreachable|certificate).*)"
    r"|(network was disabled)"
)
_UV_ERROR = re.compile(r"error: |\s*(?:× |╰─▶ |cause: |Caused by: )")
"""What uv's lines begin with when it fails, in its newer and older forms."""
_FULL = re.compile(r"No space left on device|os error 28|Disk quota exceeded|os error 122")
_LONGEST = 600
"""Characters of an installer's reason that are shown; the log has the rest."""


@dataclass(frozen=True, slots=True)
class Tool:
    """What builds an environment: uv where ``uv`` is set, else the environment's own pip."""

    uv: Path | None = None

    @property
    def name(self) -> str:
        """As people call it."""
        return "uv" if self.uv else "pip"

    def create(self, interpreter: Path, target: Path) -> list[list[str]]:
        """The commands that make an empty environment, one after the other."""
        if self.uv:
            return [[str(self.uv), "venv", "--no-project", "--allow-existing", "--python", str(interpreter),
                     str(target)]]  # fmt: skip
        return [  # venv would put pip in, too, but not say why that failed
            [str(interpreter), "-I", "-m", "venv", "--without-pip", str(target)],
            [str(target / "bin" / "python"), "-I", "-m", "ensurepip", "--upgrade", "--default-pip"],
        ]

    def install(self, python: Path, files: Sequence[Path], *, locked: bool) -> list[str]:
        """The command that installs requirements files; a locked one is whole, and each of its files has a hash."""
        command = self._command(python, "install")
        command += ["--require-hashes", "--no-deps"] if locked else []
        return command + [word for file in files for word in ("-r", str(file))]

    def resolve(self, python: Path, file: Path, answer: Path) -> list[str]:
        """The command that resolves a requirements file and writes what it found into ``answer``."""
        if self.uv:
            return [str(self.uv), "pip", "compile", "--no-progress", "--python", str(python), "--generate-hashes",
                    "--no-header", "--no-annotate", "--output-file", str(answer), str(file)]  # fmt: skip
        return [*self._command(python, "install"), "--dry-run", "--ignore-installed", "--report", str(answer),
                "-r", str(file)]  # fmt: skip

    def _command(self, python: Path, verb: str) -> list[str]:
        if self.uv:
            return [str(self.uv), "pip", verb, "--no-progress", "--python", str(python)]
        return [str(python), "-I", "-m", "pip", verb, "--no-input", "--progress-bar", "off",
                "--disable-pip-version-check"]  # fmt: skip


def reason(lines: Sequence[str], code: int, free: int, folder: Path) -> str:
    """Why an installer failed, in few words and with what to do about it.

    Args:
        lines: what it printed.
        free: bytes that were free at its end on the disk that it wrote to.
        folder: on that disk.
    """
    if free < 1 << 20 or any(_FULL.search(line) for line in lines):
        return full_disk(folder, free)
    if code < 0:
        return spell_exit(code)
    said = _said(lines) or (lines[-1] if lines else spell_exit(code))
    if any(_UNREACHABLE.search(line) for line in lines):
        whys = [next(filter(None, match.groups())) for line in lines if (match := _WHY_UNREACHABLE.search(line))]
        why = f" ({whys[-1].strip()})" if whys else ""
        return (
            f"a package index could not be reached{why}: check the network, the proxy, and the index in use "
            f"(`index_options:`, pip's configuration)\n{said}"
        )
    if any("DO NOT MATCH THE HASHES" in line or "Hash mismatch" in line for line in lines):
        return f"a file is not the one that was locked: find out why, then run `loopmux env lock` again\n{said}"
    if "ensurepip" in said or "No module named venv" in said:
        return f"{said}\ninstall the venv package of this Python (python3-venv), or uv"
    return said


def full_disk(folder: Path, free: int) -> str:
    """What to say, and what helps, when a disk is full."""
    return (
        f"the disk is full, {free / 1e6:.0f} MB are free at {folder}: make room (`loopmux env prune`), "
        "or set $XDG_DATA_HOME (environments) and $XDG_STATE_HOME (logs) to folders on another disk"
    )


def _said(lines: Sequence[str]) -> str:
    """The installer's own words: of pip what conflicts and its ERROR lines, of uv the error with its causes."""
    text: list[str] = []
    for i, line in enumerate(lines):
        if line.startswith("The conflict is caused by:"):
            block = [s.strip() for s in lines[i + 1 :]]
            text.append("; ".join(block[: block.index("")] if "" in block else block))
        elif line.startswith("ERROR: ResolutionImpossible") or "THESE PACKAGES DO NOT MATCH" in line:
            continue
        elif line.startswith(("ERROR: ", "Error: ")):
            text.append(line.split(": ", 1)[1].strip())
        elif _UV_ERROR.match(line):
            text.append(" ".join(filter(None, (_UV_ERROR.sub("", s).strip() for s in lines[i:]))))
            break
        elif re.match(r"\s+(Expected|Got) ", line) or re.match(r"\s+\S+==\S+ from ", line):
            text.append(" ".join(line.split()))
    whole = "; ".join(dict.fromkeys(text))
    return whole if len(whole) <= _LONGEST else whole[:_LONGEST] + "…"
