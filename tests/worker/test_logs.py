"""The worker's log, in a process of its own: what is imported and configured stays so."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import sys
from loopmux_worker import logs, server

logs.set_up("warning")
assert not {"structlog", "rich"} & set(sys.modules), "not before the first line"
logs.warning("first", number=1)
try:
    raise ValueError("a bug")
except ValueError:
    logs.exception("second")
"""


def test_lines_are_json_and_what_writes_them_is_imported_with_the_first() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    first, second = map(json.loads, done.stderr.splitlines())
    assert {**first, "timestamp": ""} == {"event": "first", "level": "warning", "number": 1, "timestamp": ""}
    assert (second["event"], second["level"]) == ("second", "error")
    assert "ValueError: a bug" in second["exception"]


UNREAD = """
import os
from loopmux_worker import logs

out, into = os.pipe()
os.dup2(into, 2)
logs.set_up("warning")
for _ in range(2000):
    logs.warning("much", text="x" * 1000)
found = b""
while b"lost" not in found:
    found += os.read(out, 65536)
    logs.warning("more")
print(next(line for line in found.decode().splitlines() if "lost" in line))
"""


def test_how_many_lines_were_lost_is_a_field_of_the_line_that_says_so() -> None:
    done = subprocess.run([sys.executable, "-c", UNREAD], capture_output=True, text=True, timeout=60, check=True)
    line = json.loads(done.stdout)
    assert line.pop("count") > 0
    assert line == {"event": "log lines lost", "level": "warning"}
