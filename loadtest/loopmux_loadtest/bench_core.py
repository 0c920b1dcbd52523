"""What the broker's core costs alone: processor time per event, in this process, without sockets.

``python -m loopmux_loadtest.bench_core`` prints one JSON line, which is also a case of ``bench_broker``.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from loopmux import codec, wire
from loopmux.messages import End, Hello, Register, ServedModel, Submit, Tok
from loopmux.results import Timing, Usage
from loopmux.wire import Header, Kind, Message
from loopmux_broker.broker import Broker
from loopmux_broker.config import BrokerConfig
from loopmux_broker.events import ClientSent, Event, WorkerSent

CLIENTS = 64
"""Clients of their own, each with a stream: so many attempts are with the worker at once."""
CHUNKS = 32
WIDTH = 8
"""Tokens of a chunk."""
_WORKER = b"worker"
_BATCH = 12
"""Streams of each client in one round: some tenths of a second."""
_TOK = (b"", codec.pack(Tok("some words of text, as eight tokens are ")), wire.pack_tokens(list(range(WIDTH))))
_END = (b"", codec.pack(End("stop", Usage(10, CHUNKS * WIDTH), Timing(), "echo", "bench")))
_SUBMIT = (codec.pack(Submit("echo")), codec.pack({"prompt": "hello"}))


class Core:
    """A broker's core that is told of streams from their beginning to their end."""

    def __init__(self) -> None:
        self._broker = Broker(BrokerConfig(), epoch=bytes(8), now=0.0)
        self._now = 0.0
        self.spent: dict[Kind, int] = defaultdict(int)
        self.events: dict[Kind, int] = defaultdict(int)
        served = (ServedModel("echo", "f"),)
        register = Register("worker", "bench", bytes(16), wire.VERSIONS, models=served, slots=CLIENTS)
        self._clients = [number.to_bytes(2, "big") for number in range(CLIENTS)]
        joins: list[Event] = [WorkerSent(_WORKER, _said(Header(Kind.REGISTER), codec.pack(register), codec.pack({})))]
        for peer in self._clients:
            joins.append(ClientSent(peer, _said(Header(Kind.HELLO), codec.pack(Hello(wire.VERSIONS, peer * 8)))))
        self._tell(Kind.HELLO, joins)

    def run(self) -> None:
        """One stream for each client, all at once."""
        ids = [wire.new_id() for _ in self._clients]
        each = list(zip(self._clients, ids, strict=True))
        total = CHUNKS * WIDTH
        self._tell(Kind.SUBMIT, [ClientSent(peer, _said(Header(Kind.SUBMIT, id_), *_SUBMIT)) for peer, id_ in each])
        for seq in range(0, total, WIDTH):
            self._tell(
                Kind.TOK, [WorkerSent(_WORKER, _said(Header(Kind.TOK, id_, seq, WIDTH, 1), *_TOK)) for id_ in ids]
            )
        self._tell(
            Kind.CREDIT, [ClientSent(peer, _said(Header(Kind.CREDIT, id_, 2 * total, total))) for peer, id_ in each]
        )
        self._tell(Kind.END, [WorkerSent(_WORKER, _said(Header(Kind.END, id_, total, 0, 1), *_END)) for id_ in ids])
        self._tell(Kind.ENDACK, [ClientSent(peer, _said(Header(Kind.ENDACK, id_))) for peer, id_ in each])

    def _tell(self, kind: Kind, events: Iterable[Event]) -> None:
        """Hand the events over, and make the bytes of all that is to be sent, as the shell does."""
        begun, count = time.process_time_ns(), 0
        for event in events:
            self._now += 1e-5
            for action in self._broker.handle(event, self._now):
                getattr(action, "data", None)
            count += 1
        self.spent[kind] += time.process_time_ns() - begun
        self.events[kind] += count

    def wrong(self) -> bool:
        """Whether the core did not take some event for what it was to be."""
        counted = self._broker.tables.counters
        return bool(counted["internal_errors"] or counted["strikes"] or counted["submitted"] != counted["finished"])


def _said(header: Header, *parts: bytes) -> bytes:
    return wire.to_bytes(Message(header, *parts))


def core(rounds: int) -> dict[str, Any]:
    """Microseconds per event of each kind, and for a stream's beginning and end together; medians of the rounds."""
    costs: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        one = Core()
        gc.disable()  # the broker, whose objects are let go without the collector, hardly ever runs it
        for _ in range(_BATCH):
            one.run()
        gc.enable()
        if one.wrong():
            raise SystemExit("the core refused what the benchmark told it: the two no longer speak alike")
        for kind in (Kind.SUBMIT, Kind.TOK, Kind.CREDIT, Kind.END, Kind.ENDACK):
            costs[kind.name].append(one.spent[kind] / one.events[kind] / 1000)
    medians = {name: round(statistics.median(values), 2) for name, values in costs.items()}
    request = round(medians["SUBMIT"] + medians["END"] + medians["ENDACK"], 2)
    return {"case": "core", "unit": "us", "clients": CLIENTS, **medians, "request": request}


if __name__ == "__main__":
    print(json.dumps(core(5)))
