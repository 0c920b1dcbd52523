"""What a line does to the connections that lead through it: one that does nothing would leave every stream unharmed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import socketserver
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Self

import pytest

from chaos.house import until
from chaos.line import Door, Line, Way


class Echo(socketserver.BaseRequestHandler):
    """Says again what it hears."""

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.request.recv(1000):
                self.request.sendall(data)


@contextlib.contextmanager
def echoes() -> Iterator[int]:
    """The port where it is."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


class Caller:
    """A connection through a line."""

    def __init__(self, line: Line) -> None:
        self._to = ("127.0.0.1", int(line.endpoint.rsplit(":", 1)[1]))
        self._socket = socket.socket()
        self._socket.setblocking(False)

    async def __aenter__(self) -> Self:
        await asyncio.get_running_loop().sock_connect(self._socket, self._to)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    async def say(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def hear(self, size: int = 1000) -> bytes:
        """So many bytes, or what comes before the end."""
        heard = b""
        while len(heard) < size and (data := await asyncio.get_running_loop().sock_recv(self._socket, size)):
            heard += data
        return heard

    async def passes(self) -> None:
        await self.say(b"hello")
        assert await self.hear(5) == b"hello"


@contextlib.asynccontextmanager
async def lined(to: int) -> AsyncIterator[Line]:
    line = Line(f"tcp://127.0.0.1:{to}")
    line.start()
    try:
        yield line
    finally:
        await line.close()


async def others_pass(line: Line) -> None:
    async with Caller(line) as another:
        await another.passes()


async def fin(line: Line, caller: Caller) -> None:
    line.wires[0].cut()
    assert await caller.hear() == b""


async def rst(line: Line, caller: Caller) -> None:
    line.wires[0].cut(reset=True)
    with pytest.raises(ConnectionResetError):
        await caller.hear()


async def torn(line: Line, caller: Caller) -> None:
    [wire] = line.wires
    wire.stop([Way.DOWN])
    await caller.say(b"12345678")
    wire.tear()
    wire.go()
    heard = await caller.hear()
    assert b"12345678".startswith(heard)
    assert len(heard) < 8
    await asyncio.wait([wire.task])
    assert not line.wires


async def dead(line: Line, caller: Caller) -> None:
    [wire] = line.wires
    for way in Way:
        wire.stop([way])
        await caller.say(b"again")
        heard = asyncio.create_task(caller.hear(5))
        await others_pass(line)
        assert not heard.done()
        wire.go()
        assert await heard == b"again"


async def closed_unheard(line: Line, caller: Caller) -> None:
    [wire] = line.wires
    wire.stop()
    caller.close()
    await others_pass(line)
    assert wire in line.wires
    wire.go()
    await asyncio.wait([wire.task])


async def shut(line: Line, caller: Caller) -> None:
    await line.turn_to(Door.SHUT)
    another = Caller(line)
    with pytest.raises(ConnectionRefusedError):
        await another.__aenter__()
    another.close()
    await caller.passes()
    await line.go()
    await others_pass(line)


async def mute(line: Line, caller: Caller) -> None:
    await line.turn_to(Door.MUTE)
    async with Caller(line) as unheard:

        async def taken() -> bool:
            return len(line.mute) == 1

        await until(taken, "it is taken", 10.0)
        await caller.passes()
        assert len(line.wires) == 1
        await line.go()
        assert await unheard.hear() == b""


async def slow(line: Line, caller: Caller) -> None:
    now = asyncio.get_running_loop().time
    for line.rate, line.delay in ((1000, 0.0), (None, 0.2)):
        begun = now()
        await caller.say(bytes(200))
        await caller.hear(200)
        assert now() - begun >= 0.2


@pytest.mark.parametrize("story", [fin, rst, torn, dead, closed_unheard, shut, mute, slow])
def test_a_line_does_what_it_is_told(story: Callable[[Line, Caller], Awaitable[None]]) -> None:
    async def told(to: int) -> None:
        async with asyncio.timeout(20), lined(to) as line, Caller(line) as caller:
            await caller.passes()
            await story(line, caller)

    with echoes() as to:
        asyncio.run(told(to))
