"""The shell around the core: sockets, poller, timers. One thread."""

from __future__ import annotations

import math
import os
import struct
import time
from collections import deque
from collections.abc import Iterable

import zmq

import loopmux
from loopmux import endpoints
from loopmux.cadence import ABSENT_HEARTBEATS
from loopmux.listening import SocketFile
from loopmux.pulse import Pulse
from loopmux_broker.broker import Broker
from loopmux_broker.config import BrokerConfig
from loopmux_broker.doors import Door, Side
from loopmux_broker.events import (
    ConnectionLost,
    ConnectionsRefused,
    Event,
    Log,
    LoopStalled,
    Peer,
    Push,
    PushBlocked,
    Send,
    SendFailed,
    Sent,
    TimerDue,
)
from loopmux_broker.inherited import Listener
from loopmux_broker.lifeline import Lifeline
from loopmux_broker.logs import Logger
from loopmux_broker.zap import Gate, listed

_SLICE = 0.0015
"""Seconds for which one socket is read in one turn: a turn is to take about 5 ms, so that no socket waits longer for
another. What is said to one peer meanwhile shares frames."""
_LONGEST_POLL = 1.0
"""Seconds between two signs of life, and two looks at a parent whose death does not wake the poller."""
_LOOK, _SAY_AGAIN = 10.0, 60.0
"""Seconds between two looks whether the files of sockets are there, and until it is said again that they are not."""
_ASKED = 64
"""Questions about keys that are answered in one turn."""
_PATIENCE = 0.05
"""Seconds that the news of a lost connection waits for its last messages, at most 1 000 frames (RCVHWM), where others
have the socket busy."""


class Server:
    """Serves listening sockets, running the core until the lifeline says why to end."""

    def __init__(
        self,
        config: BrokerConfig,
        log: Logger,
        lifeline: Lifeline,
        listeners: Iterable[Listener],
        pulse: Pulse,
        secret: str = "",
    ) -> None:
        """``listeners`` has the one for administrators last, ``secret`` is that part of the settings' key."""
        self._config, self._log, self._lifeline, self._pulse = config, log, lifeline, pulse
        self.doors: list[Door] = []
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._unread: list[deque[Sent]] = []  # by door: what is left of a frame that its last turn had no time for
        self._said: dict[Peer, list[Send | Push]] = {}
        self._leaving: dict[Peer, float] = {}
        names = listed(clients=config.listed_clients, workers=config.worker_keys)
        self._gate = Gate(self._context, names) if secret else None
        for one in listeners:
            keyed = secret if endpoints.ipc_path(one.endpoint) is None else ""
            door = Door(self._context, len(self.doors), one.side, config.window, keyed)
            self.doors.append(door)
            self._unread.append(deque())
            door.serve(one.endpoint, one.descriptor)
        self._files = {door.endpoint: SocketFile(door.endpoint) for door in self.doors}
        self._look_at = time.monotonic()
        self._epoch = os.urandom(8)
        software = f"loopmux-broker {loopmux.__version__}"
        self._broker = Broker(
            config,
            epoch=self._epoch,
            now=time.monotonic(),
            pid=os.getpid(),
            software=software,
            traced=log.says("debug"),
        )
        self._poller = zmq.Poller()
        for door in self.doors:
            self._poller.register(door.socket, zmq.POLLIN)
            self._poller.register(door.monitor, zmq.POLLIN)
        if self._gate is not None:
            self._poller.register(self._gate.socket, zmq.POLLIN)
        for descriptor in lifeline.descriptors():
            self._poller.register(descriptor, zmq.POLLIN)

    def run(self) -> str:
        """Serve until there is a reason to end, and return it."""
        self._log.say(
            "info",
            "ready",
            endpoints=[d.endpoint for d in self.doors if d.side is Side.CLIENTS],
            worker_endpoints=[d.endpoint for d in self.doors if d.side is Side.WORKERS],
            admin_endpoint=self.doors[-1].endpoint,
            pid=os.getpid(),
            epoch=self._epoch.hex(),
        )
        while True:
            self._pulse.beat()
            self._log.pass_on()
            readable = self._wait()
            reason = self._lifeline.check(readable)
            if reason is not None:
                self._log.say("info", "stopping", reason=reason)
                return reason
            self._turn(readable)

    def close(self) -> None:
        """Close the sockets. The core's state is gone."""
        for door in self.doors:
            door.close()
        if self._gate is not None:
            self._gate.socket.close(0)
        self._context.term()
        self.doors = []

    # --- one turn

    def _wait(self) -> set[zmq.Socket[bytes] | int]:
        """Sleep until something comes in or a timer is due; what is readable then."""
        before = time.monotonic()
        timeout = self._timeout(before)
        readable = {source for source, _ in self._poller.poll(math.ceil(1000 * timeout))}
        self._note_gap(before + timeout)
        return readable

    def _timeout(self, now: float) -> float:
        if self._leaving or any(self._unread):
            return 0.0
        due = self._broker.next_timer()
        # At most half a heartbeat: a longer sleep would hide how long this process was stopped during it.
        longest = min(_LONGEST_POLL, self._config.heartbeat / 2)
        return longest if due is None else min(max(due - now, 0.0), longest)

    def _note_gap(self, expected: float) -> float:
        """If this process was stopped or starved, peers were not silent in that time. Returns what time it is."""
        now = time.monotonic()
        if now - expected > ABSENT_HEARTBEATS * self._config.heartbeat:
            self._log.say("warning", "loop stalled", seconds=round(now - expected, 3))
            self._handle(LoopStalled(now - expected), now)
        return now

    def _turn(self, readable: set[zmq.Socket[bytes] | int]) -> None:
        begun = time.monotonic()
        if begun >= self._look_at:
            self._look_for_files(begun)
        gone: list[Peer] = []
        if self._gate is not None and self._gate.socket in readable:
            self._answer(self._gate, begun)
        for door in self.doors:
            if door.monitor in readable:
                door.watch()
            if door.turned_away:
                self._handle(ConnectionsRefused(door.side.value, door.turned_away), begun)
                door.turned_away = 0
            if door.lost:
                self._leaving.update(dict.fromkeys(door.lost, begun + _PATIENCE))
                door.lost.clear()
            if door.socket in readable or self._unread[door.number] or self._leaving:
                gone += self._drain(door)
                self._flush()
        # Before what judges peers by closed connections and by silence: both may come of this process's own absence.
        now = self._note_gap(begun)
        for peer in gone:
            self._handle(ConnectionLost(peer), now)
        due = self._broker.next_timer()
        if due is not None and due <= now:
            self._handle(TimerDue(), now)
            self._note_gap(now)
        self._flush()

    def _look_for_files(self, now: float) -> None:
        """Say which of our sockets nobody finds any more. Who is connected stays so."""
        gone = [endpoint for endpoint, file in self._files.items() if file.gone]
        self._look_at = now + (_SAY_AGAIN if gone else _LOOK)
        if gone:
            found = "somebody removed its file, perhaps with the folder: nobody new can connect"
            self._log.say(
                "error", "socket gone", endpoints=gone, found=found, remedy="stop the broker and start it again"
            )

    def _answer(self, gate: Gate, now: float) -> None:
        """Let in whose keys are listed; what there is no time for keeps the poller awake."""
        for _ in range(_ASKED):
            verdict = gate.answer()
            if verdict is None:
                return
            if verdict.refused is not None:
                self._handle(verdict.refused, now)

    def _drain(self, door: Door) -> list[Peer]:
        """Hand over what came in. Returns the connections that are gone and whose last message that was."""
        begun = now = time.monotonic()
        unread, more = self._unread[door.number], True
        while more and now < begun + _SLICE:
            if not unread:
                unread.extend(door.receive())
            if unread:
                self._handle(unread.popleft(), now)
                # Mostly it is one frame that comes, and asking costs less than to be refused.
                more = bool(unread) or door.readable
            else:
                more = door.amid is not None
            now = time.monotonic()
        here = [peer for peer in self._leaving if peer[-1] == door.number] if self._leaving else []
        leaving = [peer for peer in here if not more or self._leaving[peer] <= now]
        for peer in leaving:
            del self._leaving[peer]
        return leaving

    def _handle(self, event: Event, now: float) -> None:
        for action in self._broker.handle(event, now):
            if isinstance(action, Log):
                self._log.say(action.level, action.event, **action.fields)
            elif action.peer in self._said:
                self._said[action.peer].append(action)
            else:
                self._said[action.peer] = [action]

    def _flush(self) -> None:
        """Send what the core said since the last time, to each peer in as few frames as it takes."""
        while self._said:  # that a push was refused may have the core say more
            said, self._said = self._said, {}
            for peer, actions in said.items():
                try:
                    taken = self.doors[peer[-1]].send(peer, [action.data for action in actions])
                except LookupError:
                    self._leaving.setdefault(peer, time.monotonic() + _PATIENCE)
                except struct.error as error:  # a number too large for its place; what matters is said again
                    self._handle(SendFailed(error), time.monotonic())
                    self._refused(peer, actions)
                else:
                    self._refused(peer, actions[taken:])

    def _refused(self, peer: Peer, actions: list[Send | Push]) -> None:
        """A pipe is full: of each request the core takes back what follows the first push that was not sent.

        That is the lowest one: a client that asked for something again may be sent it behind what comes later.
        """
        first: dict[bytes, int] = {}
        for action in actions:
            if isinstance(action, Push):
                first[action.request] = min(action.seq, first.get(action.request, action.seq))
        for request, seq in first.items():
            self._handle(PushBlocked(peer, request, seq), time.monotonic())
