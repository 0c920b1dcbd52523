"""The shell around the core: sockets, poller, timers. One thread."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable

import zmq

import loopmux
from loopmux_broker.broker import Broker
from loopmux_broker.config import BrokerConfig
from loopmux_broker.doors import Door, SendOutcome, Side
from loopmux_broker.events import (
    ConnectionLost,
    Event,
    Log,
    LoopStalled,
    Peer,
    Push,
    PushBlocked,
    Send,
    TimerDue,
)
from loopmux_broker.inherited import Listener
from loopmux_broker.keeper import Pulse
from loopmux_broker.lifeline import Lifeline
from loopmux_broker.logs import Logger

_DRAIN = 64
"""Messages taken from one socket in one turn: about 5 ms of work at most, so no socket waits longer for another."""
_LONGEST_POLL = 1.0
"""Seconds between two signs of life, and two looks at a parent whose death does not wake the poller."""
_PATIENCE = 16
"""Turns that the news of a lost connection waits for its last messages: they are at most 1 000 (RCVHWM), 64 a turn."""


class Server:
    """Serves listening sockets, running the core until the lifeline says why to end."""

    def __init__(
        self, config: BrokerConfig, log: Logger, lifeline: Lifeline, listeners: Iterable[Listener], pulse: Pulse
    ) -> None:
        """``listeners`` has the one for administrators last."""
        self._config, self._log, self._lifeline, self._pulse = config, log, lifeline, pulse
        self.doors: list[Door] = []
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._full: set[Peer] = set()
        self._leaving: dict[Peer, int] = {}
        for one in listeners:
            door = Door(self._context, len(self.doors), one.side, config.window)
            self.doors.append(door)
            door.serve(one.endpoint, one.descriptor)
        self._epoch = os.urandom(8)
        software = f"loopmux-broker {loopmux.__version__}"
        self._broker = Broker(config, epoch=self._epoch, now=time.monotonic(), pid=os.getpid(), software=software)
        self._poller = zmq.Poller()
        for door in self.doors:
            self._poller.register(door.socket, zmq.POLLIN)
            self._poller.register(door.monitor, zmq.POLLIN)
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
        if self._leaving:
            return 0.0
        due = self._broker.next_timer()
        # At most half a heartbeat: a longer sleep would hide how long this process was stopped during it.
        longest = min(_LONGEST_POLL, self._config.heartbeat / 2)
        return longest if due is None else min(max(due - now, 0.0), longest)

    def _note_gap(self, expected: float) -> float:
        """If this process was stopped or starved, peers were not silent in that time. Returns what time it is."""
        now = time.monotonic()
        if now - expected > 2 * self._config.heartbeat:
            self._log.say("warning", "loop stalled", seconds=round(now - expected, 3))
            self._handle(LoopStalled(now - expected), now)
        return now

    def _turn(self, readable: set[zmq.Socket[bytes] | int]) -> None:
        begun = time.monotonic()
        gone: list[Peer] = []
        self._full.clear()
        for door in self.doors:
            if door.monitor in readable:
                door.watch()
            if door.lost:
                self._leaving.update(dict.fromkeys(door.lost, _PATIENCE))
                door.lost.clear()
            if door.socket in readable or self._leaving:
                gone += self._drain(door)
        # Before what judges peers by closed connections and by silence: both may come of this process's own absence.
        now = self._note_gap(begun)
        for peer in gone:
            self._handle(ConnectionLost(peer), now)
        due = self._broker.next_timer()
        if due is not None and due <= now:
            self._handle(TimerDue(), now)
            self._note_gap(now)

    def _drain(self, door: Door) -> list[Peer]:
        """Hand over what came in. Returns the connections that are gone and whose last message that was."""
        leaving = [peer for peer in self._leaving if peer[-1] == door.number] if self._leaving else []
        for taken in range(_DRAIN):
            if taken == 1 and not door.readable:
                break  # mostly it is one message that comes, and asking costs less than to be refused
            received = door.receive()
            if received is not None:
                self._handle(received, time.monotonic())
            elif door.amid is None:
                break
        else:
            for peer in leaving:
                self._leaving[peer] -= 1
            leaving = [peer for peer in leaving if self._leaving[peer] <= 0]
        for peer in leaving:
            del self._leaving[peer]
        return leaving

    def _handle(self, event: Event, now: float) -> None:
        refused = b""  # the request of the last push that was: the core takes back what follows for it with that one
        for action in self._broker.handle(event, now):
            match action:
                case Push(peer, data, request, seq):
                    if request != refused and (peer in self._full or self._send(peer, data) is SendOutcome.FULL):
                        self._full.add(peer)
                        refused = request
                        self._handle(PushBlocked(peer, request, seq), time.monotonic())
                case Send(peer, _):
                    self._send(peer, action.data)
                case Log(level, what, fields):
                    self._log.say(level, what, **fields)

    def _send(self, peer: Peer, data: bytes) -> SendOutcome:
        outcome = self.doors[peer[-1]].send(peer, data)
        if outcome is SendOutcome.GONE:
            self._leaving.setdefault(peer, _PATIENCE)
        return outcome
