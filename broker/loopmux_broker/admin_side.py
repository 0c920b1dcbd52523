"""What administrators say, and what comes of it."""

from __future__ import annotations

from loopmux import codec, wire
from loopmux.errors import BadRequestError, ProtocolError
from loopmux.messages import Evict, Hello
from loopmux.wire import Kind, Message
from loopmux_broker.attempts import Attempts
from loopmux_broker.ends import error_to
from loopmux_broker.events import Log, Peer, Send, say
from loopmux_broker.introductions import agree, no_common_version, welcome
from loopmux_broker.report import reported
from loopmux_broker.tables import Tables


class AdminSide:
    """Answers administrators. Who may connect to their socket is one; nothing is kept of them."""

    def __init__(self, tables: Tables, attempts: Attempts) -> None:
        self._t, self._attempts = tables, attempts

    def hear(self, peer: Peer, message: Message, now: float) -> None:
        """Handle one message.

        Raises:
            ProtocolError: it is not one that an administrator may send.
        """
        match message.kind:
            case Kind.HELLO:
                versions = codec.unpack(Hello, message.route).versions
                version = agree(versions)
                answer = (
                    welcome(self._t, peer, version, wire.WORKER_BODY_LIMIT, message.header.seq) if version else None
                )
                self._t.out.append(answer or no_common_version(peer, versions))
            case Kind.PING:
                self._t.out.append(Send(peer, say(Kind.PONG)))
            case Kind.STATUS:
                self._t.out.append(reported(self._t, peer, message.header.request, now))
            case Kind.EVICT:
                self._evict(peer, message.header.request, codec.unpack(Evict, message.route), now)
            case Kind.BYE:
                pass
            case kind:
                raise ProtocolError(f"an administrator may not send {kind.name}")

    def _evict(self, peer: Peer, question: bytes, evict: Evict, now: float) -> None:
        try:
            evict.check()
            worker = self._t.pool.worker_named(evict.worker)
        except BadRequestError as error:
            self._t.out.append(error_to(peer, error, question))
            return
        if not worker.draining:
            self._t.out.append(Log("info", "worker is drained", {"name": worker.name, "within": evict.within}))
        self._attempts.evict(worker, evict.within, now)
        self._t.out.append(reported(self._t, peer, question, now))
