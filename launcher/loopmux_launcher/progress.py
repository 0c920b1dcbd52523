"""What an installer is doing and how far it is: from the lines that it prints, and between them from its files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

Report = Callable[[str], None]
"""Told what is being done, one line at a time."""
_PIP = re.compile(r"(Collecting|Processing|Downloading|Using cached|Installing|Building wheel for) (.*)")
_UV = re.compile(r"(Resolved|Prepared|Downloading|Downloaded|Building) (.*)")
_SIZE = re.compile(r"\((\d+(?:\.\d+)?) ?([MG])i?B\)")


class Progress:
    """Follows one run of an installer."""

    def __init__(self, target: Path, scratch: Path, report: Report) -> None:
        self._target, self._scratch, self._report = target, scratch, report
        self._looked_at = self._resolved = 0
        self._file, self._megabytes = "", 0.0
        self._total, self._before = 0, 0

    def line(self, text: str) -> None:
        """A line of output: pass on what takes time."""
        text = text.strip()
        if text.startswith(("Resolved ", "Prepared ", "Downloaded ")) or text.endswith("iB)"):
            self._uv(text)
        elif step := _PIP.match(text):
            self._pip(step[1], step[2])

    def tick(self) -> None:
        """It has printed nothing for a moment: say how far the download or the installation is."""
        try:
            if self._total:
                done = self._installed() - self._before
                self._report(f"installing {min(done, self._total)} of {self._total} packages")
            elif self._file and (there := self._downloaded()):
                self._report(f"downloading {self._file}, {there / 1e6:.0f} of {self._megabytes:.0f} MB")
        except FileNotFoundError:
            pass  # moved or removed while it was looked at

    def _pip(self, verb: str, rest: str) -> None:
        what = rest.split()[0].rsplit("/", 1)[-1]
        size = _SIZE.search(rest)
        self._file = ""
        if verb in ("Collecting", "Processing"):
            self._looked_at += 1
            self._report(f"resolving {what} ({self._looked_at} so far)")
        elif verb == "Installing":
            self._total, self._before = rest.count(",") + 1, self._installed()
            self._report(f"installing {self._total} packages")
        elif verb.startswith("Building"):
            self._report(f"building {what} from source")
        elif size and verb == "Downloading":
            self._file, self._megabytes = what, float(size[1]) * (1000 if size[2] == "G" else 1)
            self._report(f"downloading {what}, {size[1]} {size[2]}B")

    def _uv(self, text: str) -> None:
        step = _UV.match(text)
        if step is None:
            return
        verb, rest = step.groups()
        what = rest.split()[0]
        size = _SIZE.search(rest)
        if verb == "Resolved":
            self._resolved = int(what)
            self._report(f"resolved {what} packages")
        elif verb == "Prepared":
            self._total, self._before = self._resolved, self._installed()  # more than those that had to be prepared
            self._report(f"installing {self._total} packages")
        elif verb == "Downloading" and size:
            self._report(f"downloading {what}, {size[1]} {size[2]}B")
        elif verb == "Downloaded":
            self._report(f"downloaded {what}")

    def _downloaded(self) -> int:
        return sum(path.stat().st_size for path in self._scratch.rglob(self._file) if path.is_file())

    def _installed(self) -> int:
        return sum(1 for _ in self._target.glob("lib/python*/site-packages/*.dist-info"))
