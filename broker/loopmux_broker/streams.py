"""What clients are sent of their requests' output: pushed within credit, held back by a full pipe, pushed again."""

from __future__ import annotations

from loopmux.errors import ProtocolError
from loopmux.wire import Kind
from loopmux_broker.clients import Client
from loopmux_broker.events import Push, Send, say
from loopmux_broker.requests import Request
from loopmux_broker.tables import PAUSE, Alarm, Tables

_BURST = 64
"""Chunks that are pushed to a client in one go. A stream may have thousands that nobody has read, a connection a
thousand streams, and most of what goes into a full pipe comes back."""


class Streams:
    """The way from a request's output to its client's connection."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def push(self, request: Request, now: float) -> int:
        """Send the client what it may have, some now and the rest soon, and the terminal once that is all there is.

        Returns the number of chunks.
        """
        client, output, out = request.client, request.output, self._tables.out
        if client.peer is None:
            return 0
        if client.blocked:
            client.waiting[request.id] = request
            return 0
        chunks = output.take(_BURST)
        for chunk in chunks:
            out.append(Push(client.peer, chunk.data, request.id, chunk.seq))
        if len(chunks) == _BURST:
            client.waiting[request.id] = request
            self._tables.timers.set((Alarm.CLIENT_BLOCKED, client.instance, 0), now + PAUSE)
        if request.terminal is not None and not request.told and output.drained():
            request.told = True
            out.append(Push(client.peer, request.terminal, request.id, output.total))
            self._tables.timers.set((Alarm.TERMINAL, request.id, 0), now + self._tables.config.resend)
        return len(chunks)

    def credit(self, request: Request, credit: int, received: int, now: float) -> None:
        """A client may be sent tokens below ``credit`` and has ``received``.

        Raises:
            ProtocolError: it says it has more than there is.
        """
        output = request.output
        if received > output.total:
            raise ProtocolError(f"CREDIT acknowledges {received} tokens, {output.total} were sent at most")
        known, held = output.acknowledged, output.held
        if output.grant(credit, received):
            request.told = False
        self._tables.admission.output -= held - output.held
        lease = request.lease
        if lease is not None and received > known:
            relayed = say(Kind.TOKACK, request.id, arg=received, seq=received, attempt=lease.attempt)
            self._tables.out.append(Send(lease.worker.peer, relayed))
        self.push(request, now)

    def resume(self, request: Request, now: float) -> None:
        """Go on after a reconnection from what the client acknowledged before it: it says no more than SUBMIT."""
        if request.output.paused:
            request.output.rewind()
            self.push(request, now)

    def repeat_terminal(self, request: Request, now: float) -> None:
        """The terminal was not acknowledged for a while: say it again, and everything that is missing before it."""
        request.told = False
        if request.output.paused:
            request.output.rewind()
        self._tables.timers.set((Alarm.TERMINAL, request.id, 0), now + self._tables.config.resend)
        self.push(request, now)

    def moved(self, client: Client) -> None:
        """A client came back over a new connection: it will say from where each stream goes on."""
        for request in client.requests.values():
            request.output.pause()
            request.told = False

    def block(self, client: Client, request: Request, seq: int, now: float) -> None:
        """A push failed because the client's pipe is full: wait a moment with everything for it."""
        request.told = False  # the terminal goes behind all chunks
        request.output.block(seq)
        client.blocked = True
        client.waiting[request.id] = request
        self._tables.counters["blocked"] += 1
        self._tables.timers.set((Alarm.CLIENT_BLOCKED, client.instance, 0), now + self._tables.config.retry)

    def unblock(self, client: Client, now: float) -> None:
        """Try a full pipe again, or go on with what was too much for one go."""
        client.blocked = False
        pushed = 0
        while client.waiting and pushed < _BURST:
            request = client.waiting.pop(next(iter(client.waiting)))
            pushed += max(1, self.push(request, now))
        if client.waiting:
            self._tables.timers.set((Alarm.CLIENT_BLOCKED, client.instance, 0), now + PAUSE)
