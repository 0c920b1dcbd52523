"""A supervised process: started in its own session, its output read without ever waiting for it.

Workers and environment builders tell how far they are by JSON lines on stdout with a ``phase`` (and a ``detail``); the
broker by a line of its log. Everything else belongs in the log file.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from loopmux.pulse import Pulse
from loopmux_launcher import tether
from loopmux_launcher.guard import Guard
from loopmux_launcher.logfile import RotatingLog

LAST_LINES = 20
"""Lines of output kept for the message about a failure."""
_CHUNK = 64 * 1024
"""Bytes read at a time: a pipe holds no more, and a child that prints without end gets its turn and no more."""
_LAST_READS = 4
"""Chunks read after the end; a pipe holds one."""
_LONGEST_LINE = 16 * 1024
"""Bytes; a longer line is cut into pieces of this size."""
_LONGEST_SHOWN = 400


def remedy(error: OSError) -> str:
    """What helps against an error of the system, to be said behind it; nothing where that is not known."""
    return (
        ": let this process open more (`ulimit -n`, or LimitNOFILE= of a unit)" if error.errno == errno.EMFILE else ""
    )


@dataclass(frozen=True, slots=True)
class Said:
    """A phase that a child told. ``only``: the line says nothing else and is kept out of the log."""

    phase: str
    detail: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    only: bool = True


@dataclass(frozen=True, slots=True)
class Ended:
    """A child's exit code (negative for a signal), and the last phases it told."""

    code: int
    said: list[Said]


class Child:
    """One running process of ours.

    The owner polls ``descriptors()`` and calls ``read`` for the readable ones, ``write`` while ``wants_write``, and
    ``finished`` when a child may have ended. It must be closed by ``finished`` or ``kill``; both reap it.

    Args:
        handover: bytes for its stdin, which is closed after them.
        descriptors: of ours that it inherits under the same numbers.
        said: recognises the lines that tell a phase; default: those of workers and builders.
        guard: ends its group should this process be killed.
        pulse: the option that tells it the descriptor of the byte in which it gives signs of life, if it does.

    Attributes:
        pulse: its signs of life.

    Raises:
        OSError: it could not be started.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        variables: Mapping[str, str],
        log: Path,
        *,
        handover: bytes = b"",
        descriptors: tuple[int, ...] = (),
        said: Callable[[bytes], Said | None] | None = None,
        guard: Guard | None = None,
        pulse: str | None = None,
    ) -> None:
        self.name = name
        self._log = RotatingLog(log)
        with os.fdopen(os.memfd_create("pulse"), "r+b", buffering=0) as byte:
            byte.truncate(1)
            self.pulse = Pulse(byte.fileno())
            if pulse is not None:
                command, descriptors = [*command, pulse, str(byte.fileno())], (*descriptors, byte.fileno())
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(variables),
                start_new_session=True, bufsize=0, pass_fds=descriptors,
            )  # fmt: skip
        self._guard = guard
        if guard is not None:
            guard.watch(self.pid)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._stdin: IO[bytes] = self.process.stdin
        self._open: dict[int, IO[bytes]] = {s.fileno(): s for s in (self.process.stdout, self.process.stderr)}
        self._said = said or _phase_line
        self._partial: dict[int, bytes] = dict.fromkeys(self._open, b"")
        self._handover = handover
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._note(f"pid {self.pid}: {' '.join(command)}")
        for stream in (self._stdin, *self._open.values()):
            os.set_blocking(stream.fileno(), False)
        self.write()

    @property
    def pid(self) -> int:
        """Its process id, which is also its group's."""
        return self.process.pid

    @property
    def last_lines(self) -> tuple[str, ...]:
        """The end of its output."""
        return tuple(self._last)

    @property
    def log_trouble(self) -> str:
        """Why its log cannot be written at present, or nothing."""
        return self._log.trouble

    def descriptors(self) -> list[int]:
        """What to poll for reading."""
        return list(self._open)

    @property
    def wants_write(self) -> int | None:
        """What to poll for writing while part of the hand-over is still here."""
        return self._stdin.fileno() if self._handover else None

    def write(self) -> None:
        """Hand over as much as the pipe takes."""
        try:
            while self._handover:
                written = os.write(self._stdin.fileno(), self._handover[:_CHUNK])
                self._handover = self._handover[written:]
        except BlockingIOError:
            pass  # polled for
        except BrokenPipeError:
            self._handover = b""  # it died before it read; its exit tells why
        if not self._handover:
            self._stdin.close()

    def _note(self, text: str) -> None:
        """Our own line in its log."""
        self._log.write(f"--- {datetime.now(UTC).isoformat(timespec='seconds')} {self.name}: {text}\n".encode())

    def read(self, descriptor: int) -> list[Said]:
        """Read one chunk from a readable descriptor; returns the phases told in it."""
        try:
            data = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return []
        if not data:
            self._open.pop(descriptor).close()
            return self._take([self._partial.pop(descriptor)])
        whole, newline, rest = (self._partial[descriptor] + data).rpartition(b"\n")
        lines = whole.split(b"\n") if newline else []
        if len(rest) > _LONGEST_LINE:
            lines.append(rest)
            rest = b""
        self._partial[descriptor] = rest
        return self._take(lines)

    def _take(self, lines: list[bytes]) -> list[Said]:
        found, other = [], []
        for line in lines:
            said = self._said(line)
            if said is not None:
                found.append(said)
            if line and (said is None or not said.only):
                other.append(line)
        if other:
            self._log.write(b"\n".join(other) + b"\n")
            self._last.extend(line[:_LONGEST_SHOWN].decode(errors="replace") for line in other[-LAST_LINES:])
        return found

    def finished(self) -> Ended | None:
        """Its end once it has ended, None before. Ends what it may have left in its group, and closes."""
        if not tether.has_exited(self.process):
            return None
        tether.kill_group(self.process)
        if self._guard is not None:
            self._guard.forget(self.pid)
        code = self.process.wait()
        said = self._drain()
        self._note(f"ended with {code}")
        self._log.close()
        self._stdin.close()
        return Ended(code, said)

    def _drain(self) -> list[Said]:
        """What is still in the pipes. Only a process that left the group may still write, and it is not waited for."""
        found = []
        for descriptor in self.descriptors():
            for _ in range(_LAST_READS):
                if descriptor in self._open:
                    found += self.read(descriptor)
            if descriptor in self._open:
                found += self._take([self._partial.pop(descriptor)])
                self._open.pop(descriptor).close()
        return found

    def terminate(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to end; it stops its own helpers."""
        if not tether.has_exited(self.process):
            self.process.send_signal(number)

    def kill(self) -> None:
        """End it and its whole group; ``finished`` tells when it is gone."""
        tether.kill_group(self.process)


def _phase_line(line: bytes) -> Said | None:
    """``{"phase": …, "detail": …}``; other fields are kept for who knows them."""
    value = _json(line)
    if value is None or not isinstance(value.get("phase"), str):
        return None
    return Said(value["phase"], str(value.get("detail") or ""), value)


def broker_line(line: bytes) -> Said | None:
    """The lines of the broker's log that say that it listens, that one has died and is followed by another, and that
    nobody finds it any more."""
    value = _json(line) or {}
    match value.get("event"):
        case "ready":
            return Said("ready", only=False)
        case "broker died" if value.get("again"):
            return Said("replaced", f"ended by {value.get('by')}; another one serves at once", only=False)
        case "socket gone":
            return Said("unreachable", only=False)
    return None


def _json(line: bytes) -> dict[str, Any] | None:
    if not line.startswith(b"{"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
