"""The launcher's side of the wire, as a pure core: what to send, and what an answer means."""

from __future__ import annotations

from dataclasses import dataclass

from loopmux.codec import BODY_LIMITS, pack, shorten, unpack
from loopmux.messages import AdapterOrder, Catalogue, Demand, Done, Failure, Heartbeat, Register, Welcome
from loopmux.presence import Presence, State
from loopmux.wire import Header, Kind, Message
from loopmux_launcher.events import AdapterOrdered, BrokerWelcomed, DemandReported

_LONGEST = 2_000
"""Bytes of a note in HB, and of a reason in DONE: the broker reads texts of up to 4 KiB."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The broker does not want us; ``reason`` is its own words."""

    reason: str


News = BrokerWelcomed | DemandReported | AdapterOrdered | Refused


class Link(Presence):
    """One connection to a broker, on which REGISTER introduces us, and HB says that we are there.

    Nothing is queued here: when the broker may have missed something, it is greeted anew and then told everything.

    Attributes:
        note: what people should know of this launcher; goes out with every heartbeat.
    """

    def __init__(self, register: Register, stay: float = 0.0) -> None:
        """When it takes leave, requests for our models wait ``stay`` seconds for who may follow us."""
        super().__init__()
        self._register, self._stay = register, stay
        self.note = ""
        self.introduce()

    def received(self, message: Message, now: float) -> News | None:
        """Take a message in.

        Raises:
            ProtocolError: ROUTE or BODY is malformed.
        """
        self.turn(now)
        self.heard = now
        match message.kind:
            case Kind.WELCOME | Kind.ERROR:
                answer = self.answered(message, now)
                if isinstance(answer, Welcome):
                    return BrokerWelcomed()
                return None if answer is None else Refused(answer.message)
            case Kind.WHO:
                self.lost()
            case Kind.SCALE:
                return DemandReported(unpack(Demand, message.body, BODY_LIMITS))
            case Kind.LOAD | Kind.UNLOAD:
                order = unpack(AdapterOrder, message.route)
                return AdapterOrdered(message.header.request, order, message.kind is Kind.LOAD)
            case _:
                pass  # PONG; what a newer broker may ask is not for us
        return None

    def due(self, now: float) -> list[Message]:
        """What it is time to send."""
        self.turn(now)
        if self.silent(now):
            self.lost()
        if not self.speaks(now):
            return []
        if self.ready:
            return [Message(Header(Kind.HB), pack(Heartbeat(note=shorten(self.note, _LONGEST))))]
        return [Message(Header(Kind.REGISTER, seq=self.introduction), pack(self._register), pack({}))]

    def report(self, catalogue: Catalogue) -> list[Message]:
        """The message for a change, if the broker is there to hear it."""
        return [Message(Header(Kind.CATALOGUE), pack(catalogue))] if self.ready else []

    def answer(self, id_: bytes, trouble: str) -> list[Message]:
        """What came of an order; the broker repeats it until it hears this."""
        done = Done(Failure("config", shorten(trouble, _LONGEST))) if trouble else Done()
        return [Message(Header(Kind.DONE, id_), body=pack(done))] if self.ready else []

    def bye(self) -> list[Message]:
        """Taking leave, once and for good."""
        leaves = self.ready
        self.enter(State.CLOSED)
        return [Message(Header(Kind.BYE, arg=round(1000 * self._stay)))] if leaves else []

    def lost(self) -> None:
        """The broker does not know us, or may have missed something: introduce ourselves again, if it did know us."""
        if self.ready:
            self.disconnected()
