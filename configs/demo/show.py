"""The show behind ``make demo``: everything real, started, used, measured and stopped again.

It starts ``loopmux up`` on ``configs/llm_backends.yaml`` at a socket of its own, so a running Loopmux is not disturbed,
and talks to it as any application would. usage: show.py [--config FILE]
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import loopmux

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "What is a broker?"
LONG_PROMPT = (
    "Add 12 and 30, then multiply the result by 2, then subtract 14 from the result, then add the result and 25, then "
    "multiply the result by 3, then subtract 60 from the result."
)
SHORT_PROMPTS = ("add 12 and 30, then multiply the result by 2", "add 7 and 8, then multiply the result by 3")
START_LIMIT = 900.0
"""Seconds to wait for the stack: a first start downloads and installs torch."""
CALLS = 5
"""Persistent calls of which the median is taken."""


def add(a: int, b: int) -> int:
    """Add two whole numbers."""
    return a + b


def subtract(a: int, b: int) -> int:
    """Subtract b from a."""
    return a - b


def multiply(a: int, b: int) -> int:
    """Multiply two whole numbers."""
    return a * b


def title(text: str) -> None:
    """A heading."""
    print(f"\n\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


@contextmanager
def stack(config: Path, folder: Path) -> Iterator[str]:
    """The real stack in the foreground of a child process; yields its endpoint, stops it at the end."""
    endpoint = f"ipc://{folder / 'client.ipc'}"
    command = [sys.executable, "-m", "loopmux", "up", "--config", str(config), "--endpoint", endpoint]
    print("$ loopmux " + " ".join(command[3:]))
    command += ["--parent-pid", str(os.getpid())]  # so that nothing outlives this program, however it ends
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    assert process.stdout is not None
    watchdog = threading.Timer(START_LIMIT, process.kill)
    watchdog.start()
    try:
        _wait_until_ready(process)
        watchdog.cancel()
        threading.Thread(target=_pass_on, args=(process.stdout,), daemon=True).start()
        yield endpoint
    finally:
        watchdog.cancel()
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def _wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        print("  " + line.rstrip(), flush=True)
        if line.startswith("ready"):
            return
    raise SystemExit(f"`loopmux up` ended with code {process.wait()} before it was ready")


def _pass_on(lines: Any) -> None:
    for line in lines:
        print("  " + line.rstrip(), flush=True)


def show_streams(client: loopmux.Client) -> None:
    """The same question to the base and to two adapters, side by side in one process."""
    for model in ("default", "tools", "shout"):
        started = time.perf_counter()
        first = None
        print(f"  {model:>8}: ", end="", flush=True)
        with client.stream(QUESTION, model=model, temperature=0) as stream:
            for event in stream:
                if isinstance(event, loopmux.TextDelta):
                    first = first or time.perf_counter() - started
                    print(event.text, end="", flush=True)
        result = stream.result
        took = time.perf_counter() - started
        waited = 1e3 * (first or took)
        print(f"\n{'':10}{len(result.token_ids)} tokens, first after {waited:.0f} ms, {took:.2f} s, on {result.worker}")


def run_loop(client: loopmux.Client, prompt: str) -> tuple[loopmux.ToolLoopResult, float]:
    """One whole tool loop and the seconds it took."""
    started = time.perf_counter()
    outcome = client.run_tools(prompt, model="tools", tools=[add, multiply, subtract], temperature=0)
    return outcome, time.perf_counter() - started


def show_loop(client: loopmux.Client) -> None:
    """One loop with its calls and results."""
    outcome, took = run_loop(client, LONG_PROMPT)
    print(f"  user:      {LONG_PROMPT}")
    for entry in outcome.tool_log:
        arguments = ", ".join(f"{k}={v}" for k, v in entry["args"].items())
        print(f"  call:      {entry['tool']}({arguments}) → {entry['result']}")
    print(f"  assistant: {outcome.text}")
    usage = outcome.usage
    print(
        f"  {outcome.turns} turns, {usage.prompt_tokens} prompt and {usage.completion_tokens} new tokens, {took:.2f} s"
    )


def show_two_loops(client: loopmux.Client) -> float:
    """Two loops at once; returns the seconds both took together."""
    started = time.perf_counter()
    with ThreadPoolExecutor(len(SHORT_PROMPTS)) as pool:
        outcomes = list(pool.map(lambda prompt: run_loop(client, prompt), SHORT_PROMPTS))
    both = time.perf_counter() - started
    for prompt, (outcome, took) in zip(SHORT_PROMPTS, outcomes, strict=True):
        print(f"  {prompt!r}: {outcome.text}  ({outcome.turns} turns, {took:.2f} s)")
    for worker in client.status().workers:
        if "tools" in worker.models:
            print(f"  {worker.name} (pid {worker.pid}) has served {worker.served} requests")
    return both


def persistent_call(client: loopmux.Client) -> float:
    """Median seconds of one call to the loaded model."""
    times = []
    for _ in range(CALLS):
        started = time.perf_counter()
        client.generate(QUESTION, model="shout", temperature=0)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def one_shot(config: Path) -> float:
    """Seconds of one ``run-adapter`` process with the same model, prompt and interpreter as the workers'."""
    found = subprocess.run(
        [sys.executable, "-m", "loopmux", "env", "path", "default", "--config", str(config)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    demo = ROOT / "configs" / "demo"
    command = [found.stdout.strip(), "-m", "loopmux_worker", "run-adapter", "--prompt", QUESTION, "--temperature", "0"]
    command += ["--base-model", str(demo / "base"), "--adapter-dir", str(demo / "adapters" / "shout")]
    sources = os.pathsep.join([str(ROOT / "client"), str(ROOT / "worker")])
    started = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": sources}
    )
    took = time.perf_counter() - started
    print(f"  run-adapter: {done.stdout.strip()}")
    return took


def main() -> int:
    """Run the show; 0 when everything worked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "llm_backends.yaml")
    config = parser.parse_args().config
    began = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="loopmux-demo-"))
    try:
        title("1. Broker, launcher and workers start")
        with stack(config, folder) as endpoint:
            up = time.perf_counter() - began
            with loopmux.Client(endpoint) as client:
                title(f"2. One question, three models, one base: {QUESTION}")
                show_streams(client)
                title("3. One tool loop of six calls")
                show_loop(client)
                title("4. Two tool loops at once, two workers")
                both = show_two_loops(client)
                title("5. A model that stays loaded against a process per call")
                persistent = persistent_call(client)
                single = one_shot(config)
            title("6. Everything stops")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("  stopped")
    title("Measured")
    print(f"  start, environment and model included   {up:8.2f} s")
    print(f"  two tool loops at once                  {both:8.2f} s")
    print(f"  one persistent call                     {persistent:8.3f} s")
    print(f"  one run-adapter process                 {single:8.2f} s   {single / persistent:.0f} × as long")
    print(f"  the whole show                          {time.perf_counter() - began:8.2f} s")
    return 0


def _ended(number: int, _: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, _ended)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\n  interrupted", file=sys.stderr)
        sys.exit(130)
    except loopmux.LoopmuxError as failure:
        print(f"  the show failed: {failure}", file=sys.stderr)
        sys.exit(1)
