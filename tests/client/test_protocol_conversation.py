"""The conversation in docs/protocol.md is what the cores of client and broker say to each other."""

from __future__ import annotations

import re
from collections.abc import Iterator

from loopmux import codec, events, wire
from loopmux.connection import Connection
from loopmux.messages import End, Generate, Register, ServedModel, Submit, Tok, Welcome
from loopmux.results import Timing, Usage
from loopmux.wire import Header, Kind, Message, pack_tokens
from loopmux_broker.broker import Broker
from loopmux_broker.config import BrokerConfig
from loopmux_broker.events import Action, ClientSent, Push, Send, TimerDue, WorkerSent, say
from protocolpages import CLIENT as PAGE

CLIENT, WORKER = b"c", b"w"
REQUEST, INSTANCE = bytes(range(16)), bytes(range(16, 32))
SOFTWARE = "loopmux 0.1.0"
Line = tuple[str, bytes]


class Table:
    """A client and a broker at one table, a worker beside it, and everything that the first two say."""

    def __init__(self) -> None:
        self.now = 0.0
        self.client = Connection("ipc:///b", INSTANCE, 10.0, SOFTWARE)
        self.said: list[Line] = []

    def new_broker(self, epoch: bytes) -> None:
        self.broker = Broker(BrokerConfig(window=4), epoch=epoch, now=self.now, software=SOFTWARE)
        served = (ServedModel("default", "f"),)
        register = Register("worker", "w0", bytes(16), wire.VERSIONS, models=served, slots=1)
        self.worker(Message(Header(Kind.REGISTER), codec.pack(register), codec.pack({})))

    def caller(self, event: events.ConnectionEvent) -> None:
        for action in self.client.handle(event, self.now):
            if isinstance(action, (events.Send, events.Introduce)):
                data = wire.to_bytes(action.message)
                self.said.append(("C", data))
                self.heard(self.broker.handle(ClientSent(CLIENT, data), self.now))

    def worker(self, message: Message) -> None:
        self.heard(self.broker.handle(WorkerSent(WORKER, wire.to_bytes(message)), self.now))

    def heard(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, (Send, Push)) and action.peer == CLIENT:
                self.said.append(("B", action.data))
                self.caller(events.Received(action.data))

    def produce(self, text: str, *ids: int, at: int, attempt: int) -> None:
        header = Header(Kind.TOK, REQUEST, at, len(ids), attempt)
        self.worker(Message(header, body=codec.pack(Tok(text)), tokens=pack_tokens(ids)))


def conversation() -> list[Line]:
    table = Table()
    table.new_broker(bytes.fromhex("00112233445566ff"))
    submit = Submit("default", timeout=60.0, max_new_tokens=8, prompt_size=5)
    body = codec.pack(Generate(prompt="Hello", max_new_tokens=8))
    table.caller(events.Submitted(events.Request(REQUEST, submit, body, deadline=60.0, collect=True)))
    table.produce("Good ", 7, at=0, attempt=1)
    table.produce("morning", 70000, 4095, at=1, attempt=1)
    table.now = 2.0
    table.new_broker(bytes.fromhex("8899aabbccddee00"))
    table.caller(events.Disconnected())
    table.now += 0.25
    table.heard(table.broker.handle(TimerDue(), table.now))
    table.worker(say(Kind.RUNACK, REQUEST, attempt=2))
    table.produce(".", 12, at=3, attempt=2)
    end = End("stop", Usage(1, 4), Timing(0.0, 0.25, 0.5, 0.25), "default", "w0")
    table.worker(Message(Header(Kind.END, REQUEST, 4, attempt=2), body=codec.pack(end)))
    table.caller(events.Closed())
    return table.said


def written() -> Iterator[Line]:
    """The conversation of the page: who, kind and a remark in one line, its parts in the next."""
    block = re.search(r"^```text\n(.*?)^```", PAGE.read_text().split("## A conversation")[1], flags=re.M | re.S)
    assert block
    for message in re.split(r"^(?=[CB] )", block[1], flags=re.M)[1:]:
        first, *rest = message.split("\n  ")
        who, kind, *_ = first.split()
        data = bytes.fromhex("".join(rest))
        assert wire.from_bytes(data).kind.name == kind
        yield who, data


def parts(data: bytes) -> list[str]:
    """A message as the page shows it: header, ROUTE, TOKENS and BODY, each in a line if it is there."""
    message = wire.from_bytes(data)
    found = data[: wire.HEADER_SIZE], message.route, message.tokens, message.body
    return [f"  {part.hex()}" for part in found if part]


def test_the_conversation_of_the_page_is_that_of_the_cores() -> None:
    said = conversation()
    shown = "\n".join(f"{who} {wire.from_bytes(data).kind.name}\n" + "\n".join(parts(data)) for who, data in said)
    assert list(written()) == said, f"the page should have:\n{shown}"


def test_it_shows_what_a_client_needs() -> None:
    kinds = [wire.from_bytes(data).kind for _, data in conversation()]
    assert {Kind.HELLO, Kind.SUBMIT, Kind.CREDIT, Kind.ATTACH, Kind.TOK, Kind.END, Kind.ENDACK, Kind.BYE} <= set(kinds)
    assert codec.unpack(Welcome, wire.from_bytes(conversation()[1][1]).route).window == 4
