"""Peers that mean no good: a client that names other clients' requests, a worker that answers what it was not given.

They get through the handshake and say HELLO or REGISTER as they should; then they say things. Whatever it is, nobody
else must notice, and they must learn nothing but that they were refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopmux import codec, messages, wire
from loopmux.wire import Header, Kind, Message
from loopmux_broker.events import ClientSent
from simulation.broken import hold
from simulation.client import Call
from simulation.process import Endpoint

if TYPE_CHECKING:
    from simulation.world import World

STRIKES = 3
"""Malformed messages within a minute, after which a peer is not listened to."""


class Stranger(Endpoint):
    """Says one thing after the other, then leaves."""

    from_worker = False
    stranger = True

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.refusals = 0
        self.connect()

    def connected(self) -> None:
        instance = self.clock.random.randbytes(16)
        self.put(Message(Header(Kind.HELLO), route=codec.pack(messages.Hello(wire.VERSIONS, instance))))

    def receive(self, data: bytes) -> None:
        message = wire.from_bytes(data)
        if message.kind is Kind.ERROR:
            self.refusals += 1
            return
        harmless = (Kind.WELCOME, Kind.WHO, Kind.PONG, Kind.CANCELLED, Kind.RESET)
        hold(message.kind in harmless, "P7 nobody sees another's traffic", lambda: f"{self} got {message.header}")
        if message.kind is Kind.CANCELLED:
            self.put(Message(Header(Kind.ENDACK, message.header.request)))

    def meddle(self, call: Call) -> None:
        """Say something about another client's request."""
        dice = self.clock.random
        have = len(call.tokens)
        if dice.random() < 0.3:
            self._usurp(call)
            return
        submit = codec.pack(messages.Submit("echo", priority=1_000))  # refused even where the request has just ended
        told = dice.choice(
            (
                Message(Header(Kind.CREDIT, call.id, seq=have + 5_000, arg=have)),
                Message(Header(Kind.CANCEL, call.id)),
                Message(Header(Kind.ENDACK, call.id)),
                Message(Header(Kind.SUBMIT, call.id), submit, call.body),
            )
        )
        call.meddled |= told.kind is Kind.CANCEL
        self.world.story.tell(self, f"says {told.kind.name} about {call}")
        self.put(told)

    def _usurp(self, call: Call) -> None:
        """Ask for something under the id of a request that runs, at this very moment: later it may have ended."""
        broker, line = self.world.broker, self.line
        if line is None or not line.far or not broker.running:
            return
        submit = codec.pack(messages.Submit(call.submit.model, timeout=5.0, max_new_tokens=5))
        message = Message(Header(Kind.SUBMIT, call.id), submit, call.body)
        self.world.story.tell(self, f"says SUBMIT about {call}")
        broker.handle(ClientSent(line.peer, wire.to_bytes(message)))

    def babble(self) -> None:
        """Say what is no message."""
        dice = self.clock.random
        ping, id_ = wire.to_bytes(Message(Header(Kind.PING))), dice.randbytes(16)
        nested = b"\x81\xa1a" * 500 + b"\xc0"
        self._send(
            dice.choice(
                (
                    b"junk",
                    ping + b"more",
                    ping[:-1],
                    b"XX" + ping[2:],
                    ping[:3] + b"\xff" + ping[4:],
                    wire.to_bytes(Message(Header(Kind.SUBMIT, id_), nested)),
                    wire.to_bytes(Message(Header(Kind.TOK, id_), tokens=b"abcd"))[:-1],
                    wire.to_bytes(Message(Header(Kind.RUN), tokens=bytes(4))),
                    wire.to_bytes(Message(Header(Kind.SUBMIT, id_), b"\xc1")),
                )
            )
        )


class StrangeWorker(Stranger):
    """A worker of a model that nobody asks for."""

    from_worker = True

    def connected(self) -> None:
        served = (messages.ServedModel("strange", "strange"),)
        boot = self.clock.random.randbytes(16)
        register = messages.Register("worker", self.name, boot, wire.VERSIONS, models=served, slots=1)
        self.put(Message(Header(Kind.REGISTER), codec.pack(register), codec.pack({})))

    def meddle(self, call: Call) -> None:
        """Answer a request that another worker has."""
        dice, have = self.clock.random, len(call.tokens)
        attempt = max(call.attempt, 1)
        end = messages.End("stop", messages.Usage(1, have), messages.Timing(), "echo", self.name)
        told = dice.choice(
            (
                Message(Header(Kind.RUNACK, call.id, attempt=attempt)),
                Message(
                    Header(Kind.TOK, call.id, have, 1, attempt), body=codec.pack(messages.Tok("0.0 ")), tokens=bytes(4)
                ),
                Message(Header(Kind.END, call.id, have, attempt=attempt), body=codec.pack(end)),
                Message(
                    Header(Kind.CANCELLED, call.id, have, attempt=attempt),
                    body=codec.pack(messages.Failure("engine", "no")),
                ),
            )
        )
        self.world.story.tell(self, f"says {told.kind.name} about {call}")
        self.put(told)
