"""The launcher's side of the wire, as a pure core: what to send, and what an answer means."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loopmux.cadence import INTRODUCE_AGAIN, SILENT_HEARTBEATS
from loopmux.codec import BODY_LIMITS, pack, shorten, unpack
from loopmux.errors import ProtocolError
from loopmux.messages import AdapterOrder, Catalogue, Demand, Done, Failure, Heartbeat, Register, Welcome
from loopmux.wire import Header, Kind, Message
from loopmux_launcher.events import AdapterOrdered, BrokerWelcomed, DemandReported

_LONGEST = 2_000
"""Bytes of a note in HB, and of a reason in DONE: the broker reads texts of up to 4 KiB."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The broker does not want us; ``reason`` is its own words."""

    reason: str


News = BrokerWelcomed | DemandReported | AdapterOrdered | Refused


class Link:
    """One connection to a broker: REGISTER until WELCOME, then heartbeats.

    Nothing is queued here: when the broker may have missed something, it is greeted anew and then told everything.

    Attributes:
        note: what people should know of this launcher; goes out with every heartbeat.
    """

    def __init__(self, register: Register, stay: float = 0.0) -> None:
        """When it takes leave, requests for our models wait ``stay`` seconds for who may follow us."""
        self._register, self._stay = register, stay
        self._heartbeat: float | None = None
        self._next = 0.0
        self._heard = 0.0
        self._introduction = 0  # its number: it rises with each connection, and the answer has it, too
        self._left = False
        self.note = ""

    @property
    def welcome(self) -> bool:
        """Whether the broker knows us."""
        return self._heartbeat is not None

    def received(self, message: Message, now: float) -> News | None:
        """Take a message in.

        Raises:
            ProtocolError: ROUTE or BODY is malformed.
        """
        self._heard = now
        match message.kind:
            case Kind.WELCOME if message.header.seq == self._introduction:  # else it answers an older REGISTER
                welcome = unpack(Welcome, message.route)
                if welcome.heartbeat <= 0:
                    raise ProtocolError(f"WELCOME with a heartbeat of {welcome.heartbeat} s")
                self._heartbeat = welcome.heartbeat
                self._next = now + welcome.heartbeat
                return BrokerWelcomed()
            case Kind.WHO:
                self.lost()
            case Kind.SCALE:
                return DemandReported(unpack(Demand, message.body, BODY_LIMITS))
            case Kind.ERROR:
                return Refused(unpack(Failure, message.body, BODY_LIMITS).message)
            case Kind.LOAD | Kind.UNLOAD:
                order = unpack(AdapterOrder, message.route)
                return AdapterOrdered(message.header.request, order, message.kind is Kind.LOAD)
            case _:
                pass  # PONG; what a newer broker may ask is not for us
        return None

    def due(self, now: float) -> list[Message]:
        """What it is time to send."""
        if self._left:
            return []
        if self._heartbeat is not None and now - self._heard > SILENT_HEARTBEATS * self._heartbeat:
            self.lost()
        if now < self._next:
            return []
        if self._heartbeat is None:
            self._next = now + INTRODUCE_AGAIN
            return [Message(Header(Kind.REGISTER, seq=self._introduction), pack(self._register), pack({}))]
        self._next = now + self._heartbeat
        return [Message(Header(Kind.HB), pack(Heartbeat(note=shorten(self.note, _LONGEST))))]

    def next_timer(self) -> float:
        """When ``due`` has something to say."""
        return math.inf if self._left else self._next

    def report(self, catalogue: Catalogue) -> list[Message]:
        """The message for a change, if the broker is there to hear it."""
        heard = self.welcome and not self._left
        return [Message(Header(Kind.CATALOGUE), pack(catalogue))] if heard else []

    def answer(self, id_: bytes, trouble: str) -> list[Message]:
        """What came of an order; the broker repeats it until it hears this."""
        done = Done(Failure("config", shorten(trouble, _LONGEST))) if trouble else Done()
        heard = self.welcome and not self._left
        return [Message(Header(Kind.DONE, id_), body=pack(done))] if heard else []

    def bye(self) -> list[Message]:
        """Taking leave, once and for good."""
        leaves, self._left = self.welcome and not self._left, True
        return [Message(Header(Kind.BYE, arg=round(1000 * self._stay)))] if leaves else []

    def connected(self) -> None:
        """There is a new connection: introduce ourselves over it."""
        self._begin_anew()

    def lost(self) -> None:
        """The broker does not know us, or may have missed something: introduce ourselves again.

        At once the first time; while nobody is there, no sooner than REGISTER is repeated anyway.
        """
        if self._heartbeat is not None:
            self._begin_anew()

    def _begin_anew(self) -> None:
        self._introduction += 1
        self._heartbeat, self._next = None, 0.0
