"""A line between two hosts: what comes to a port of its own is passed on to another one, for as long as it may.

Connections are cut, or go dead in one direction or both while they stay open; the line as a whole is slow, or lets
nobody through who comes anew.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import Iterable
from enum import Enum, auto

from loopmux.listening import Listening

_CHUNK = 64 * 1024
_TICK = 0.05
"""Seconds of a slow line's bytes that are passed on at once."""
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER under which closing is RST rather than FIN."""


class Way(Enum):
    """A direction: up is to the broker."""

    UP = auto()
    DOWN = auto()


BOTH = (Way.UP, Way.DOWN)


class Door(Enum):
    """What becomes of new connections."""

    OPEN = auto()
    MUTE = auto()
    """They are accepted and never answered."""
    SHUT = auto()
    """They are refused."""


class Wire:
    """One connection: ``near`` to who came, another one to where the line leads."""

    def __init__(self, line: Line, near: socket.socket) -> None:
        self._line, self._near, self._far = line, near, socket.socket()
        self._open = {way: asyncio.Event() for way in Way}
        self._torn = self._reset = False
        self.go()
        self.task = asyncio.create_task(self._run())
        self.task.add_done_callback(lambda _: self._close())  # even if it is cut before it began

    def _close(self) -> None:
        for one in (self._near, self._far):
            if self._reset:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            one.close()

    async def _run(self) -> None:
        """Pass on both ways until either end closes, or it is cut."""
        self._far.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(self._far, ("127.0.0.1", self._line.leads_to))
        except OSError:
            return
        for one in (self._near, self._far):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ways = [
            asyncio.create_task(self._pass(Way.UP, self._near, self._far)),
            asyncio.create_task(self._pass(Way.DOWN, self._far, self._near)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.wait(ways)

    async def _pass(self, way: Way, source: socket.socket, sink: socket.socket) -> None:
        """Until ``source`` has closed; that ``sink`` has is news that travels the other way."""
        loop, line = asyncio.get_running_loop(), self._line
        back = Way.DOWN if way is Way.UP else Way.UP
        while True:
            await self._open[way].wait()
            try:
                data = await loop.sock_recv(source, line.chunk)
            except OSError:
                data = b""
            if line.slow:
                await line.hold_back(len(data))
            await self._open[way].wait()
            if not data:
                return
            if self._torn:
                data = data[: len(data) // 2]
            try:
                await loop.sock_sendall(sink, data)
            except OSError:
                await self._open[back].wait()
                return
            if self._torn:
                return

    def cut(self, *, reset: bool = False) -> None:
        """Close it towards both ends, by RST or FIN."""
        self._reset = reset
        self.task.cancel()

    def tear(self, *, reset: bool = False) -> None:
        """Cut it in the middle of what passes next."""
        self._torn, self._reset = True, reset

    def stop(self, ways: Iterable[Way] = BOTH) -> None:
        """Pass nothing on in these directions, the news that an end has closed included."""
        for way in ways:
            self._open[way].clear()

    def go(self) -> None:
        """Pass everything on again, what has waited first."""
        for event in self._open.values():
            event.set()


class Line:
    """Leads to a port of this host.

    Attributes:
        endpoint: where to connect instead.
        wires: the connections that there are, those of which an end has closed unheard included.
        delay: seconds by which everything comes late, at most twice as many.
        rate: bytes a second of each connection and direction; None for as many as there are.
        mute: connections that were accepted and are not answered.
    """

    def __init__(self, endpoint: str) -> None:
        self.leads_to = int(endpoint.rsplit(":", 1)[1])
        self._listening = Listening("tcp://127.0.0.1:0")
        self.endpoint = self._listening.endpoint
        self.wires: list[Wire] = []
        self.delay = 0.0
        self.rate: float | None = None
        self._door = Door.OPEN
        self.mute: list[socket.socket] = []
        self._dice = random.Random(7)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Let connections through from now on."""
        self._task = asyncio.create_task(self._accept())

    async def _accept(self) -> None:
        while True:
            near, _ = await asyncio.get_running_loop().sock_accept(self._listening.socket)
            near.setblocking(False)
            if self._door is Door.MUTE:
                self.mute.append(near)
            else:
                wire = Wire(self, near)
                self.wires.append(wire)
                wire.task.add_done_callback(lambda _, wire=wire: self.wires.remove(wire))

    @property
    def chunk(self) -> int:
        """Bytes that are read at once."""
        return _CHUNK if self.rate is None else max(1, round(self.rate * _TICK))

    @property
    def slow(self) -> bool:
        """Whether anything takes time."""
        return self.delay > 0 or self.rate is not None

    async def hold_back(self, size: int) -> None:
        """Take the time that so many bytes take."""
        took = 0.0 if self.rate is None else size / self.rate
        await asyncio.sleep(self.delay * (1 + self._dice.random()) + took)

    async def turn_to(self, door: Door) -> None:
        """Have this become of new connections from now on. What was mute until now is closed."""
        if door is Door.SHUT and self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
            self._listening.close()
        elif door is not Door.SHUT and self._task is None:
            self._listening = Listening(self.endpoint)
            self.start()
        self._door = door
        for one in self.mute:
            one.close()
        self.mute.clear()

    async def go(self) -> None:
        """Pass everything on again, at once, and let everybody through."""
        for wire in self.wires:
            wire.go()
        self.delay, self.rate = 0.0, None
        await self.turn_to(Door.OPEN)

    async def close(self) -> None:
        """End it with all its connections."""
        await self.turn_to(Door.SHUT)
        ended = [wire.task for wire in self.wires]
        for task in ended:
            task.cancel()
        if ended:
            await asyncio.wait(ended)
