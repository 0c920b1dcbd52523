"""The test of the tester: each patch in ``planted`` puts a bug into a copy of the cores, for the simulation to find.

``python -m simulation.planting --seeds 1000`` prints what was caught, what was missed, and what no longer applies.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent
_ROOT = _HERE.parent.parent
_PACKAGES = ("client", "broker", "worker", "launcher")
_MISSES = 30
"""One bug in so many may be missed."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one patch."""

    patch: str
    result: str
    detail: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.patch:<44} {self.result:<18} {self.seconds:5.1f} s  {self.detail}"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="simulation.planting", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="seeds after which a bug counts as missed (1000)")
    parser.add_argument("--patches", type=Path, default=_HERE / "planted", help="the folder of *.patch files")
    parser.add_argument("--jobs", type=int, default=1, help="patches tried side by side (1)")
    options = parser.parse_args()
    patches = sorted(options.patches.glob("*.patch"))
    with ThreadPoolExecutor(options.jobs) as pool:
        verdicts = []
        for verdict in pool.map(lambda patch: judge(patch, options.seeds), patches):
            verdicts.append(verdict)
            print(verdict, flush=True)
    caught = sum(verdict.result == "caught" for verdict in verdicts)
    stale = sum(verdict.result not in ("caught", "MISSED") for verdict in verdicts)
    print(f"{caught} of {len(verdicts)} planted bugs caught within {options.seeds} seeds; {stale} could not be tried")
    missed = len(verdicts) - caught - stale
    return 1 if stale or missed > len(verdicts) // _MISSES else 0


def judge(patch: Path, seeds: int) -> Verdict:
    """Plant one bug in a copy and run seeds until it shows."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for package in _PACKAGES:
            shutil.copytree(_ROOT / package, copy / package)
        shutil.copytree(_HERE, copy / "tests" / _HERE.name, ignore=shutil.ignore_patterns("planted"))
        applied = _run(["git", "apply", "--whitespace=nowarn", str(patch.resolve())], copy)
        if applied.returncode:
            result, detail = "NO LONGER APPLIES", applied.stderr.strip().partition("\n")[0]
        else:
            result, detail = _outcome(_run([sys.executable, "-m", "simulation", "--seeds", str(seeds)], copy))
    return Verdict(patch.stem, result, detail, time.monotonic() - began)


def _outcome(run: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    if run.returncode == 0:
        return "MISSED", ""
    broken = next((line for line in run.stdout.splitlines() if " BROKEN " in line), None)
    if broken is None:
        return "DOES NOT RUN", run.stderr.strip().rpartition("\n")[2]
    return "caught", broken.replace("BROKEN ", "")[:120]


def _run(command: list[str], copy: Path) -> subprocess.CompletedProcess[str]:
    folders = [str(copy / package) for package in (*_PACKAGES, "tests")]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "PYTHONHASHSEED": "0"}
    variables["GIT_CEILING_DIRECTORIES"] = str(
        copy.parent
    )  # inside a repository `git apply` would leave the copy alone
    return subprocess.run(command, cwd=copy, env=variables, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
