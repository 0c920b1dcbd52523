"""A client process: the real connection core, and callers who read fast, slowly or not at all, and cancel."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from loopmux import codec, events, messages, wire
from loopmux.connection import Connection
from loopmux.errors import LoopmuxError
from loopmux.outbox import Outbox
from loopmux.results import Result, ToolCall
from simulation.broken import broken
from simulation.process import Endpoint
from simulation.profile import ECHO

if TYPE_CHECKING:
    from simulation.world import World

CONNECT_TIMEOUT = 5.0
_PATIENCE = 16.0
"""Seconds for loading an adapter: more than its workers and then its launcher get."""


@dataclass
class Call:
    """What a caller asked, and what came of it.

    Attributes:
        wanted: how many tokens the answer has; None for a turn of a tool loop, which makes so many calls of ``tools``.
        may_fail: codes of errors that need no other cause than what was asked; ``must_fail`` if it cannot succeed.
        fuse: seconds after its start in which it ends the process that runs it.
        read_in: seconds the reader takes over what it reports on; infinite for one that never reads.
        attempt: of the token that came last.
        attached: it was brought to a broker that was started again.
        meddled: another client, which cannot know its id, has cancelled it.
        moved, came: when anything, and when a token, came last.
        dealt: when it last came to a worker's turn, on its way there or there, or was over for the broker; of one that
            collects, also when its worker or its client last had more of it than before.
        granted: the most tokens that the broker was ever allowed to send.
        acknowledged: the most tokens that its client ever said to have.
    """

    name: str
    client: ClientProcess
    id: bytes
    submit: messages.Submit
    body: bytes
    submitted: float
    deadline: float
    wanted: int | None
    tools: int = 0
    may_fail: frozenset[str] = frozenset()
    must_fail: bool = False
    read_in: float = 0.001
    collect: bool = False
    idle_timeout: float | None = None
    fuse: float | None = None
    cancelled: float = math.inf
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    outcome: Result | LoopmuxError | None = None
    ended: float = math.inf
    attempt: int = 0
    attached: bool = False
    meddled: bool = False
    moved: float = 0.0
    came: float = 0.0
    dealt: float = 0.0
    granted: int = 0
    acknowledged: int = 0
    read: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def plain(self) -> bool:
        return self.wanted is not None

    @property
    def slow(self) -> bool:
        return self.read_in > 0.1

    @property
    def about(self) -> str:
        submit = self.submit
        what = f"{self.wanted} tokens" if self.plain else f"{self.tools} calls"
        adapter = f"+{submit.adapter}" if submit.adapter else ""
        session = f", {submit.session}{' on' if submit.continues else ''}" if submit.session else ""
        fatal = "" if self.fuse is None else f", ends its workers after {self.fuse:.3f} s"
        reader = ", collects" if self.collect else f", reads in {self.read_in:g} s" if self.slow else ""
        return f"{submit.model}{adapter}, {what} in {submit.timeout:.1f} s{session}{reader}{fatal}"

    @property
    def open(self) -> bool:
        return self.outcome is None and self.client.alive and not self.client.closing


class ClientProcess(Endpoint):
    """One client of the broker."""

    from_worker = False

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.calls: dict[bytes, Call] = {}
        self.questions: dict[bytes, float] = {}
        self.closing = False
        self.gone = math.inf
        """When it left or died."""
        self._said: list[wire.Message] = []
        self._outbox = Outbox()
        self.core = Connection("sim://broker", self.clock.random.randbytes(16), CONNECT_TIMEOUT)
        self.wake_by(lambda: self.core.next_timer(), lambda: self.handle(events.TimePassed()))
        self.connect()

    # --- what callers do

    def ask(self, call: Call) -> Call:
        self.calls[call.id] = self.world.promise.calls[call.id] = call
        self.world.story.names[call.id] = call.name
        self.world.story.tell(self, f"{call} asks: {call.about}")
        request = events.Request(call.id, call.submit, call.body, call.deadline, call.idle_timeout, call.collect)
        self.act(lambda: self.handle(events.Submitted(request)))
        return call

    def cancel(self, call: Call) -> None:
        if call.open and self.running:
            call.cancelled = self.clock.now
            self.handle(events.CancelAsked(call.id))

    def hint(self, hint: messages.SessionHint) -> None:
        self.act(lambda: self.handle(events.Hinted(hint)))

    def question(self, patience: float) -> None:
        id_ = self.clock.random.randbytes(16)
        self.questions[id_] = self.clock.now + patience
        self.act(lambda: self.handle(events.Asked(id_, self.questions[id_])))

    def order(self, kind: wire.Kind, order: messages.AdapterOrder) -> None:
        """Have an adapter loaded or unloaded."""
        id_ = self.clock.random.randbytes(16)
        self.questions[id_] = self.clock.now + _PATIENCE
        self.world.promise.adapters.asked(self, id_, order, kind is wire.Kind.LOAD)
        asked = events.Asked(id_, self.questions[id_], kind, codec.pack(order), _PATIENCE)
        self.act(lambda: self.handle(asked))

    def close(self) -> None:
        """The program leaves properly."""
        if self.running:
            self.gone = self.clock.now
            self.handle(events.Closed())
            self.closing = True
            self.flush()
            if self.line is not None:
                self.clock.at(self.line.up.last, self.die)
            else:
                self.die()

    def die(self, news: float = 0.0) -> None:
        self.gone = min(self.gone, self.clock.now)
        super().die(news)

    # --- its socket

    def put(self, message: wire.Message, *, lasting: bool = True) -> bool:
        if self._outbox or not self._send(wire.to_bytes(message)):
            self._outbox.extend([message])
            self._flush_later()
        return True

    def unsend(self) -> None:
        self._outbox.clear()

    def flush(self) -> None:
        self._outbox.drop(sum(1 for _ in takewhile(self._send, map(wire.to_bytes, self._outbox))))
        if self._outbox:
            self._flush_later()

    # --- the core

    def connected(self) -> None:
        if self.watches:
            self.handle(events.Connected())

    def disconnected(self) -> None:
        if self.watches:
            self.handle(events.Disconnected())

    def receive(self, data: bytes) -> None:
        promise, message = self.world.promise, wire.from_bytes(data)
        promise.talk.client_heard(self, message)
        owed, self._said = promise.answers.of_client(self, message.header), []
        self.handle(events.Received(data))
        promise.answers.check(self, message.header, owed, self._said)
        if self.core.malformed:
            broken("no message of ours is malformed", f"{self} could not read what the broker sent")

    def handle(self, event: events.ConnectionEvent) -> None:
        if self.closing:
            return
        for action in self.core.handle(event, self.clock.now):
            self._do(action)
        self.look()

    def _read(self, call: Call, total: int) -> None:
        call.read = max(call.read, total)
        self.handle(events.Consumed(call.id, total))

    def _do(self, action: events.Action) -> None:
        promise = self.world.promise
        match action:
            case events.Introduce(message):
                self.unsend()
                self._said.append(message)
                self.put(message)
            case events.Send(message):
                promise.talk.client_said(self, message)
                self._said.append(message)
                self.put(message)
            case events.Deliver(id_, event, report):
                call = self.calls[id_]
                promise.callers.delivered(call, event)
                if report and not math.isinf(call.read_in):
                    self.later(call.read_in, lambda: self._read(call, report))
            case events.Finish(id_, outcome) | events.Fail(id_, outcome) if id_ in self.calls:
                promise.callers.ended(self.calls[id_], outcome)
            case events.Answer(id_, outcome) | events.Fail(id_, outcome) if promise.adapters.known(id_):
                self.questions.pop(id_, None)
                promise.adapters.answered(self, id_, outcome)
            case events.Answer(id_) | events.Fail(id_):
                promise.callers.answered(self, id_, action.status if isinstance(action, events.Answer) else None)


def plain_call(client: ClientProcess, name: str, tokens: int, timeout: float, **options: Any) -> Call:
    """A request for so many tokens; options are fields of SUBMIT, or of the call."""
    now = client.clock.now
    of_call = {k: options.pop(k) for k in tuple(options) if k in Call.__dataclass_fields__}
    body = codec.pack(messages.Generate(prompt="x", max_new_tokens=tokens))
    submit = messages.Submit(options.pop("model", ECHO), timeout=timeout, max_new_tokens=tokens, **options)
    id_ = client.clock.random.randbytes(16)
    return Call(name, client, id_, submit, body, now, now + timeout, tokens, **of_call)


def scripted_call(client: ClientProcess, name: str, tools: int, timeout: float, **options: Any) -> Call:
    """A turn of a tool loop in which the model makes so many calls."""
    call = plain_call(client, name, 10_000, timeout, **options)
    script = "\n".join(f'{"+" if i else "!"}call add {{"a": {i}}}' for i in range(tools))
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call.body = codec.pack(messages.Generate(prompt=script, max_new_tokens=10_000, tools=(tool,)))
    call.wanted, call.tools = None, tools
    return call
