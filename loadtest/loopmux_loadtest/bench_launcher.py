"""What the launcher costs: ``python -m loopmux_loadtest.bench_launcher`` prints one JSON line per case.

With ``--config FILE --model ID`` that model is served alone, in its environment, which is built in a folder of the
benchmark's own; otherwise the echo engine by this interpreter: what is left then is the part of launcher and broker.

- ``build``: seconds of ``env build`` from nothing, and of another one with what that left in the installer's cache;
- ``start``: seconds from the command ``up`` until it says that it is ready, and until the first token of a request made
  then; the environment is built before;
- ``loss``: seconds that a stream is silent after ``kill -9`` of its worker, with another worker there and without;
- ``rest``: MiB of launcher, its guard, broker and the broker's parent (keeper) when nothing runs: resident, and with
  shared pages divided among those who share them (RSS, PSS).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from loopmux import Client, TextDelta

CASES = ("build", "start", "loss", "rest")
_ECHO = {"engine": "echo", "echo": {"rate": 200}}
_LIMIT = 600.0
"""Seconds that a request may take."""
_BEFORE, _TOKENS = 50, 400
"""Tokens of a stream before its worker is killed, and in all: enough to be under way when that happens."""
_SETTLED = 2.0
"""Seconds after which nothing is under way any more: peers have said at their own pace what they had to say."""


@dataclass(frozen=True, slots=True)
class Running:
    """``up`` while it runs; ``ready`` is when it said so, seconds after its start."""

    process: subprocess.Popen[str]
    endpoint: str
    began: float
    ready: float

    def client(self, model: str) -> Client:
        """A client that waits for long, and asks for streams that go on."""
        return Client(
            self.endpoint, model=model, timeout=_LIMIT, idle_timeout=_LIMIT, temperature=0, ignore_eos=True,
            max_new_tokens=_TOKENS,
        )  # fmt: skip


class Site:
    """One model in a configuration of its own, with data and logs in ``folder``."""

    def __init__(self, folder: Path, given: Path | None, model: str) -> None:
        self.folder, self.model = folder, model
        self._given = given
        read: dict[str, Any] = yaml.safe_load(given.read_text()) if given else {"models": {model: _ECHO}}
        if model not in read["models"]:
            raise SystemExit(f"--model: found {model!r}, expected one of {', '.join(read['models'])} of {given}")
        entry: dict[str, Any] = read["models"][model]
        self._entry = {key: value for key, value in entry.items() if key not in ("workers", "min", "max")}
        for key in {"base_model", "adapter_dir"} & self._entry.keys():
            self._entry[key] = self._absolute(self._entry[key])
        name = entry.get("environment", "default")
        self.environments = {n: _rooted(e, given) for n, e in read.get("environments", {}).items() if n == name}
        self._variables = {**os.environ, "XDG_DATA_HOME": f"{folder}/data", "XDG_STATE_HOME": f"{folder}/state"}

    def _absolute(self, name: str | None) -> str | None:
        """A folder of the given configuration is relative to that; what is none there is a hub id."""
        there = self._given.parent / name if self._given and name else None
        return str(there.resolve()) if there and there.exists() else name

    def write(self, workers: int) -> Path:
        """The configuration with so many workers; lock files come along."""
        file = self.folder / (self._given.name if self._given else "echo.yaml")
        models = {self.model: {**self._entry, "workers": workers}}
        file.write_text(yaml.safe_dump({"environments": self.environments, "models": models}))
        for lock in self._given.parent.glob(f"{self._given.stem}.*.lock") if self._given else ():
            shutil.copy(lock, self.folder)
        return file

    def build(self, *words: str) -> float:
        """Build the environment; seconds."""
        command = [sys.executable, "-m", "loopmux", "env", "build", *words, "--config", str(self.write(1))]
        began = time.perf_counter()
        done = subprocess.run(command, env=self._variables, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return time.perf_counter() - began

    @contextlib.contextmanager
    def up(self, workers: int) -> Iterator[Running]:
        """The stack with so many workers, from when it is ready."""
        endpoint = f"ipc://{self.folder}/client.ipc"
        command = [sys.executable, "-m", "loopmux", "up", "--config", str(self.write(workers)), "--endpoint", endpoint]
        command += ["--parent-pid", str(os.getpid()), "--log-format", "plain"]
        began = time.perf_counter()
        with subprocess.Popen(
            command, env=self._variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                said.append(line)
                if line.startswith("ready"):
                    break
            else:
                raise SystemExit(f"{' '.join(command)} ended before it was ready:\n{''.join(said)}")
            try:
                yield Running(process, endpoint, began, time.perf_counter() - began)
            finally:
                process.terminate()
                process.communicate()


def _rooted(environment: dict[str, Any] | None, given: Path | None) -> dict[str, Any]:
    """An environment whose file of requirements is found from elsewhere, too."""
    entry = dict(environment or {})
    if given and isinstance(entry.get("requirements"), str):
        entry["requirements"] = str((given.parent / entry["requirements"]).resolve())
    return entry


# --- the cases --------------------------------------------------------------------------------------------------------


def build(site: Site) -> dict[str, Any]:
    """Seconds of two builds; the second one finds its packages in the installer's cache."""
    return {"first_s": round(site.build("--anew"), 2), "cached_s": round(site.build("--anew"), 2)}


def start(site: Site, runs: int) -> dict[str, Any]:
    """Medians of the seconds until ready, and until the first token."""
    ready, first = [], []
    for _ in range(runs):
        with site.up(1) as up, up.client(site.model) as client, client.stream("Hello") as stream:
            next(event for event in stream if isinstance(event, TextDelta))
            first.append(time.perf_counter() - up.began)
            ready.append(up.ready)
    return {"ready_s": _median(ready), "first_token_s": _median(first)}


def loss(site: Site, runs: int, workers: int) -> dict[str, Any]:
    """The median and the longest of the pauses of streams whose worker is killed, seconds.

    Each in a stack of its own: one whose workers crash again and again takes its time to start them.
    """
    pauses = []
    for _ in range(runs):
        with site.up(workers) as up, up.client(site.model) as client:
            pauses.append(_pause(client))
    return {"workers": workers, "pause_s": _median(pauses), "longest_s": round(max(pauses), 3)}


def _pause(client: Client) -> float:
    """Kill the worker of a stream; seconds of the longest silence since.

    What had left the worker still comes, so the next token is not the first of another worker.
    """
    seen, killed = list[float](), 0.0
    with client.stream("Tell me a story") as stream:
        for event in stream:
            seen += [time.perf_counter()] if isinstance(event, TextDelta) else []
            if not killed and len(seen) >= _BEFORE:
                [victim] = [worker.pid for worker in client.status().workers if worker.running]
                killed = time.perf_counter()
                os.kill(victim, signal.SIGKILL)
    if stream.result.attempts != 2:
        raise SystemExit(f"the stream ended after {stream.result.attempts} attempts, expected 2: it was too short")
    return max(after - max(before, killed) for before, after in pairwise(seen) if after > killed)


def rest(site: Site) -> dict[str, Any]:
    """MiB of each process but the worker."""
    with site.up(1) as up, up.client(site.model) as client:
        client.generate("Hello", max_new_tokens=8)
        broker, workers = client.status().pid, {worker.pid for worker in client.status().workers}
        time.sleep(_SETTLED)
        pid, keeper = up.process.pid, _parent(broker)
        guards = set(_children(pid)) - workers - {keeper}
        named = {"launcher": pid, "broker": broker, "keeper": keeper, **dict.fromkeys(("guard",), *guards)}
        return {name: _memory(process) for name, process in named.items()}


def _children(process: int) -> Iterator[int]:
    for task in Path(f"/proc/{process}/task").iterdir():
        yield from map(int, (task / "children").read_text().split())


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def _memory(process: int) -> dict[str, float]:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return {f"{name.lower()}_mib": round(kib[name] / 1024, 1) for name in ("Rss", "Pss")}


def _median(seconds: Sequence[float]) -> float:
    return round(statistics.median(seconds), 3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 0."""
    parser = argparse.ArgumentParser(prog="python -m loopmux_loadtest.bench_launcher", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--config", type=Path, metavar="FILE", help="whose model and environment are used")
    parser.add_argument("--model", default="default", metavar="ID", help="with --config: which one (%(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="per figure, but for builds (%(default)s)")
    given = parser.parse_args(arguments)
    if unknown := set(given.cases) - set(CASES):
        parser.error(f"found {sorted(unknown)}, expected of {', '.join(CASES)}")
    with tempfile.TemporaryDirectory(prefix="lmx-bench-") as folder:
        site = Site(Path(folder), given.config, given.model)

        def tell(case: str, found: dict[str, Any]) -> None:
            about = {"case": case, "model": given.model if given.config else "echo", "runs": given.runs}
            print(json.dumps(about | found), flush=True)

        cases = given.cases or [case for case in CASES if case != "build" or site.environments]
        if "build" in cases:
            if not site.environments:
                parser.error("build: found no environment, expected --config with one")
            tell("build", build(site))
        elif site.environments:
            site.build()
        if "start" in cases:
            tell("start", start(site, given.runs))
        if "loss" in cases:
            for workers in (2, 1):
                tell("loss", loss(site, given.runs, workers))
        if "rest" in cases:
            tell("rest", rest(site))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
