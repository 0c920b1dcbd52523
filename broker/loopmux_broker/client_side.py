"""What clients say, and what comes of it."""

from __future__ import annotations

from dataclasses import replace

from loopmux import codec, wire
from loopmux.errors import BadRequestError, ProtocolError
from loopmux.messages import Hello, SessionHint, Submit
from loopmux.wire import ID_SIZE, Header, Kind, Message
from loopmux_broker.adapters import Adapters
from loopmux_broker.clients import Client
from loopmux_broker.dispatch import session_of
from loopmux_broker.ends import Ends
from loopmux_broker.entry import Entry
from loopmux_broker.events import Peer, Send, say
from loopmux_broker.introductions import agree, another_key, no_common_version, welcome
from loopmux_broker.recovery import Recovery
from loopmux_broker.report import reported
from loopmux_broker.requests import Request, State
from loopmux_broker.streams import Streams
from loopmux_broker.tables import Alarm, Tables

_TALKING = 1.5
"""Heartbeats within which a client says something that can: one, and half of another one under way."""


class ClientSide:
    """Answers clients. Whoever has not said HELLO is asked for it."""

    def __init__(
        self, tables: Tables, entry: Entry, recovery: Recovery, ends: Ends, streams: Streams, adapters: Adapters
    ) -> None:
        self._t, self._entry, self._recovery, self._ends, self._streams = tables, entry, recovery, ends, streams
        self._adapters = adapters

    def hear(self, peer: Peer, message: Message, key: str, now: float) -> None:
        """Handle one message; ``key`` is the name of the key that a HELLO came with, empty without one.

        Raises:
            ProtocolError: it is not one that a client may send, or says what cannot be.
        """
        client = self._t.clients.by_peer.get(peer)
        if message.header.kind is Kind.HELLO:
            self._hello(peer, message, key, now)
        elif client is None:
            self._t.out.append(Send(peer, say(Kind.WHO)))
        else:
            client.heard = now
            self._known(client, peer, message, now)

    def _known(self, client: Client, peer: Peer, message: Message, now: float) -> None:
        request = self._own(client, message.header.request)
        match message.header.kind:
            case Kind.CREDIT:
                self._credit(client, request, message.header, now)
            case Kind.ENDACK:
                if request is not None and request.state is State.DONE:
                    self._ends.acknowledged(request, now)
            case Kind.SUBMIT | Kind.ATTACH:
                self._submit(client, request, message, now)
            case Kind.CANCEL:
                self._cancel(client, request, message.header.request, now)
            case Kind.PING:
                if not client.complete:
                    self._recovery.complete(client, now)
                self._t.out.append(Send(peer, say(Kind.PONG)))
            case Kind.SESSION:
                self._session(client, codec.unpack(SessionHint, message.route))
            case Kind.STATUS:
                self._t.out.append(reported(self._t, peer, message.header.request, now))
            case Kind.LOAD | Kind.UNLOAD:
                self._adapters.asked(peer, message, now)
            case Kind.BYE:
                self._ends.abandon(client, now)
            case kind:
                raise ProtocolError(f"a client may not send {kind.name}")

    def _own(self, client: Client, request_id: bytes) -> Request | None:
        request = self._t.requests.get(request_id)
        if request is None or request.client is client:
            return request
        self._t.counters["foreign_ids"] += 1
        return None

    # --- the connection

    def _hello(self, peer: Peer, message: Message, key: str, now: float) -> None:
        hello = codec.unpack(Hello, message.route)
        if len(hello.instance) != ID_SIZE:
            raise ProtocolError(f"HELLO: found an instance of {len(hello.instance)} bytes, expected {ID_SIZE}")
        version = agree(hello.versions)
        if version is None:
            self._t.out.append(no_common_version(peer, hello.versions))
            return
        known, introduction = self._t.clients.by_instance.get(hello.instance), message.header.seq
        if known is not None and known.key not in (None, key):
            self._t.out += another_key(self._t, peer, "client", hello.instance.hex(), key, str(known.key))
            return
        if known is not None and known.peer != peer and introduction < known.introduction:
            self._t.counters["outdated"] += 1  # read late: the client has left that connection for the present one
            return
        previous = self._t.clients.by_peer.get(peer)
        if previous is not None and previous.instance != hello.instance:
            self.lost(previous, now)
        client, moved = self._t.clients.introduce(hello.instance, peer, key, introduction, hello.software, now)
        if moved:
            self._streams.moved(client)
            self._t.timers.cancel((Alarm.CLIENT_GRACE, client.instance, 0))
            self._t.timers.cancel((Alarm.CLIENT_LOST, client.instance, 0))
            self._t.timers.set((Alarm.CLIENT_SILENT, peer, 0), now + self._t.patience)
        self._t.out.append(welcome(self._t, peer, version, wire.CLIENT_BODY_LIMIT, introduction))

    def silent(self, client: Client, now: float) -> None:
        """The time has come to see whether a client that is here was silent for too long."""
        assert client.peer is not None
        due = client.heard + self._t.patience
        if now < due:
            self._t.timers.set((Alarm.CLIENT_SILENT, client.peer, 0), due)
        else:
            self.lost(client, now)

    def lost(self, client: Client, now: float) -> None:
        """A client's connection is gone, or dead: its requests live on for the grace time, if they are to."""
        if client.peer is not None:
            self._t.timers.cancel((Alarm.CLIENT_SILENT, client.peer, 0))
        self._t.counters["clients_lost"] += 1
        self._t.clients.part(client)
        config = self._t.config
        fell_silent = now - client.heard > _TALKING * config.heartbeat
        grace = config.grace if fell_silent else config.closed_grace
        self._t.timers.set((Alarm.CLIENT_GRACE, client.instance, 0), now + grace)
        self._ends.detach(client, now)

    # --- requests

    def _submit(self, client: Client, request: Request | None, message: Message, now: float) -> None:
        """SUBMIT, and ATTACH, which is the same with what the client has of the output."""
        header = message.header
        if header.request == wire.NO_ID:
            raise ProtocolError(f"{header.kind.name}: found a request id of zeros, expected 16 random bytes")
        if 4 * header.seq != len(message.tokens):
            raise ProtocolError(f"{header.kind.name} at {header.seq} tokens has {len(message.tokens)} bytes of them")
        if len(message.route) > wire.SUBMIT_ROUTE_LIMIT:
            raise ProtocolError(
                f"{header.kind.name} has a ROUTE of {len(message.route)} bytes, at most {wire.SUBMIT_ROUTE_LIMIT} are "
                "accepted: shorten model, adapter, session or trace"
            )
        submit = codec.unpack(Submit, message.route)
        if request is not None and (request.state is State.DONE or request.body == message.body):
            self._known_already(request, message, now)
        elif request is not None and request.orphan:
            self._recovery.join(request, header, submit, message.body, message.tokens, now)
        elif request is not None or header.request in self._t.requests:
            self._t.counters["mismatched"] += 1
            error = BadRequestError("the request id is taken by another request, expected 16 fresh random bytes")
            self._entry.refuse(client, header.request, error, model=submit.model, received=header.seq)
        elif header.kind is Kind.ATTACH:
            self._recovery.attach(client, header, submit, message.body, message.tokens, now)
        else:
            self._entry.submit(client, header.request, submit, message.body, now)

    def _known_already(self, request: Request, message: Message, now: float) -> None:
        header, done = message.header, request.state is State.DONE
        if not done:
            self._entry.accept(request)
        if header.kind is Kind.SUBMIT:
            self._streams.repeat_terminal(request, now) if done else self._streams.resume(request, now)
            return
        request.output.pause()  # whatever was pushed before, the client names what it has
        if not done or header.seq <= request.output.total:
            self._streams.credit(request, header.arg, header.seq, now)
        if done:
            self._streams.repeat_terminal(request, now)

    def _credit(self, client: Client, request: Request | None, header: Header, now: float) -> None:
        if request is not None and request.state is State.DONE and header.arg > request.output.total:
            return  # it was cancelled before it was brought here: this broker never knew what its client has of it
        if request is not None and not request.orphan:
            self._streams.credit(request, header.seq, header.arg, now)
        elif client.peer is not None:
            # Given up while the client was away, and known again from its worker at most: its ATTACH has all it takes.
            self._t.out.append(Send(client.peer, say(Kind.WHO, header.request)))

    def _cancel(self, client: Client, request: Request | None, request_id: bytes, now: float) -> None:
        if request is not None:
            self._ends.cancel(request, now)
            self._streams.resume(request, now)  # after a reconnection it has no more to say about where it is
        elif request_id not in self._t.requests and client.principal.known < self._t.config.limits.client_queued:
            self._ends.cancel_unknown(client, request_id, now)
        else:
            # No tombstone: the id is another client's, or this client has as many as it may have requests.
            error = BadRequestError("CANCEL names no request of this client")
            self._entry.refuse(client, request_id, error, model="")

    def _session(self, client: Client, hint: SessionHint) -> None:
        """Pass a hint on to the workers that may hold the session's state."""
        named = replace(hint, session=session_of(client.instance, hint.session))
        holders = self._t.affinity.workers(client.instance, hint.session)
        for worker in self._t.pool.workers.values():
            if worker.name in holders:
                self._t.out.append(Send(worker.peer, Message(Header(Kind.SESSION), codec.pack(named))))
        if hint.state == "done":
            self._t.affinity.forget(client.instance, hint.session)
