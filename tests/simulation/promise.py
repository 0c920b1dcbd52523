"""What is promised to callers, watched as it happens: exact streams, one end each, in time, for a reason, for nobody else.

``wirerules`` watches what processes say to each other, ``books`` whether the broker's tables agree.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from loopmux import codec, messages, wire
from loopmux.errors import LoopmuxError
from loopmux.results import Result, StreamEvent, TextDelta, ToolCall
from loopmux.wire import Kind, Message
from loopmux_worker.engine.base import Job
from loopmux_worker.engine.echo import echo_token
from simulation import books
from simulation.broken import broken, hold
from simulation.census import census
from simulation.journal import Journal
from simulation.wirerules import Dispatches, WorkerTalk

if TYPE_CHECKING:
    from simulation.client import Call, ClientProcess
    from simulation.launcher import LauncherProcess
    from simulation.process import Endpoint
    from simulation.worker import WorkerProcess
    from simulation.world import World

LATE = 2.0
"""P3: seconds after the deadline by which a terminal is there."""
TICK = 0.01
"""Seconds within which two clocks of a run may differ over one moment (polls are rounded up)."""
STALLED = 6.0
"""Seconds without a token, in calm, after which a running request is stuck."""
GHOST = 4.0
"""Seconds after its end, in calm, by which an engine has let a request go: two resends and a while."""
MOST_ATTEMPTS = 3
IDLE = frozenset({Kind.PING, Kind.PONG, Kind.HB, Kind.REGISTER, Kind.WELCOME, Kind.CATALOGUE})
"""What is said where nothing runs; processes may still be started again."""


class Promise:
    """Watches one world."""

    def __init__(self, world: World) -> None:
        self.world, self.clock = world, world.clock
        self.journal = Journal()
        self.calls: dict[bytes, Call] = {}
        self.asked: dict[bytes, bool] = {}
        self.taken: dict[tuple[bytes, int], tuple[object, str]] = {}
        self.talk = WorkerTalk(world)
        self.dispatches = Dispatches(world)
        self.children: dict[str, list[float]] = {}
        self.resting = False
        """Nobody has anything to say any more."""

    def hit(self, call: Call, *kinds: str, before: float = 0.0) -> int:
        """How many faults of these kinds were at work during a call, or shortly ``before`` it."""
        return self.journal.count(kinds, call.submitted - before, self.clock.now)

    # --- what callers see

    def delivered(self, call: Call, event: StreamEvent) -> None:
        """An event goes to the reader."""
        hold(call.outcome is None, "P2 nothing follows the end", lambda: f"{call} got {event} after {call.outcome}")
        hold(not call.collect, "no events for who does not read along", lambda: f"{call} got {event}")
        call.moved = self.clock.now
        if isinstance(event, TextDelta):
            self._tokens(call, event.position, event.token_ids, event.text)
        elif isinstance(event, ToolCall):
            known = {c.id for c in call.calls}
            hold(event.id not in known, "P5 each tool call comes once", lambda: f"{call} got {event} again")
            call.calls.append(event)

    def _tokens(self, call: Call, position: int, ids: tuple[int, ...], text: str) -> None:
        have = len(call.tokens)
        hold(position == have, "P1 no gap, no repetition", lambda: f"{call} got position {position} having {have}")
        hold(bool(ids), "P1 a delta has tokens", lambda: f"{call} at {position}")
        right = tuple(echo_token(call.id, position + i) for i in range(len(ids)))
        hold(ids == right, "P1 token i is f(request, i)", lambda: f"{call} at {position}: {ids}, expected {right}")
        call.tokens += ids
        call.text += text
        if call.plain:
            self._fenced(call, text, ids)

    def _fenced(self, call: Call, text: str, ids: tuple[int, ...]) -> None:
        """Each token's text names the attempt it is of: they never go back."""
        marks = [mark.partition(".") for mark in text.split()]
        found = tuple(int(token) for token, _, _ in marks)
        hold(found == ids, "P1 text and tokens belong together", lambda: f"{call}: {text!r} came with {ids}")
        for _, _, attempt in marks:
            hold(int(attempt) >= call.attempt, "P4 superseded output is fenced off", lambda: f"{call}: {text!r}")
            call.attempt = int(attempt)

    def ended(self, call: Call, outcome: Result | LoopmuxError) -> None:
        """A caller gets its outcome."""
        hold(call.outcome is None, "P2 one end", lambda: f"{call}: {call.outcome!r}, then {outcome!r}")
        call.outcome, call.ended = outcome, self.clock.now
        told = f"{len(call.tokens)} tokens" if isinstance(outcome, Result) else f"{outcome.code}: {outcome}"
        self.world.story.tell(call.client, f"{call} ends: {told}")
        self._in_time(call)
        if isinstance(outcome, Result):
            self._whole(call, outcome)
        else:
            hold(
                call.collect or outcome.partial_text == call.text,
                "P1 an error has the text so far",
                lambda: f"{call}: {outcome.partial_text!r}, seen {call.text!r}",
            )
            hold(outcome.request_id == call.id.hex(), "an error names its request", lambda: f"{call}: {outcome!r}")
            if not self.excused(call, outcome):
                broken("P6 nothing is lost without a cause", f"{call} ({call.about}) ended with {outcome.code}: {outcome}")

    def _in_time(self, call: Call) -> None:
        limit = max(call.deadline, call.client.thawed_at) + LATE + TICK
        hold(self.clock.now <= limit, "P3 ends in time", lambda: f"{call} ended, deadline {call.deadline:.3f}")

    def _whole(self, call: Call, result: Result) -> None:
        n = len(result.token_ids)
        right = tuple(echo_token(call.id, i) for i in range(n))
        hold(result.token_ids == right, "P1 token i is f(request, i)", lambda: f"the result of {call}")
        hold(not call.must_fail, "a bad request is refused", lambda: f"{call} ({call.about}) succeeded")
        hold(result.usage.completion_tokens == n, "usage counts tokens", lambda: f"{call}: {result.usage}, {n} tokens")
        hold(
            (result.model, result.adapter) == (call.submit.model, call.submit.adapter),
            "a request runs with the model and adapter that it names",
            lambda: f"{call}: {result.model}, {result.adapter}",
        )
        hold(result.attempts == max(call.attempt, result.attempts), "attempts are counted", lambda: f"{call}")
        if not call.collect:
            hold(list(result.token_ids) == call.tokens, "P1 a result is what was streamed", lambda: f"{call}")
            hold(result.text == call.text, "P1 a result is what was streamed", lambda: f"the text of {call}")
            hold(list(result.tool_calls) == call.calls, "P5 each tool call comes once", lambda: f"{call}")
        if call.plain:
            hold(
                (n, result.finish_reason) == (call.wanted, "length"),
                "P1 a result is whole",
                lambda: f"{call}: {n} tokens ({result.finish_reason}), asked for {call.wanted}",
            )
        else:
            hold(len({c.id for c in result.tool_calls}) == call.tools, "P5 each tool call comes once", lambda: f"{call}")

    def answered(self, client: ClientProcess, question: bytes, ok: bool) -> None:
        """A question for the broker's status has its answer, or none."""
        deadline = client.questions.pop(question, None)
        hold(deadline is not None, "P2 one answer", f"{client} got another one")
        if not ok and not self.journal.count(("kill broker", "freeze", "snap client", "hold client", "clog"), 0, math.inf):
            broken("a question is answered", f"that of {client} was not, and nothing stood in the way")

    # --- reasons

    def excused(self, call: Call, error: LoopmuxError) -> bool:
        """Whether an error has a cause in the request or in what was done to the world."""
        away = ("kill broker", "freeze client", "freeze broker", "snap client", "hold client", "clog client")
        if error.code in call.may_fail:
            return True
        match error.code:
            case "cancelled":
                late = ("freeze", "snap", "hold", "clog", "kill broker")  # then output, or credit, comes in one lump
                slow = "slow_client" in error.message and (call.slow or self.hit(call, *late) > 0)
                return min(call.cancelled, call.client.gone) <= self.clock.now or slow
            case "bad_request":  # who may queue no more requests may cancel no unknown ones either
                return call.cancelled <= self.clock.now and self.world.profile.narrow
            case "deadline":
                quiet = call.idle_timeout is not None and self.clock.now >= call.moved + call.idle_timeout - TICK
                return quiet or self.clock.now >= call.deadline - TICK
            case "connection_lost":
                return self.hit(call, *away, before=5.0) > 0
            case "worker_lost":
                hurt = ("kill worker", "kill launcher", "snap worker", "hold worker", "freeze", "stop", "clog worker")
                return self.hit(call, *hurt, before=5.0) > 0
            case "overloaded":
                return self.world.profile.narrow
            case "engine":
                return self.hit(call, "kill", "bad starts", before=60.0) >= 5 and "start" in error.message
            case "model_not_found":
                return self.hit(call, "kill launcher", "stop launcher", "kill broker", "freeze", before=15.0) > 0
        return False

    # --- what processes say

    def _rested(self, who: object, message: Message) -> None:
        hold(not self.resting or message.kind in IDLE, "who has nothing to say is silent", lambda: f"{who}: {message.header}")

    def client_heard(self, client: ClientProcess, message: Message) -> None:
        """A message came to a client."""
        header = message.header
        if header.kind is Kind.ERROR:
            failure = codec.unpack(messages.Failure, message.body, codec.BODY_LIMITS)
            hold(failure.code != "protocol", "no peer of ours breaks the protocol", lambda: f"{client}: {failure}")
        if header.request == wire.NO_ID or header.request in client.questions:
            return
        call = client.calls.get(header.request)
        hold(call is not None or header.kind is Kind.REPORT, "P7 nobody sees another's traffic", lambda: f"{client} got {header}")
        if header.kind is Kind.TOK:
            hold(header.seq < call.granted, "credit is kept", lambda: f"{call} may have {call.granted}, got {header}")

    def client_said(self, client: ClientProcess, message: Message) -> None:
        """A client sends a message."""
        self._rested(client, message)
        header = message.header
        call = client.calls.get(header.request)
        if message.kind is Kind.CREDIT:
            call.granted = max(call.granted, header.seq)
            window = self.world.profile.config.window
            if not call.collect:
                hold(header.arg == len(call.tokens), "what came is acknowledged", lambda: f"{call}: {header}, {len(call.tokens)} came")
                hold(header.seq <= call.read + window, "credit is what a reader has room for", lambda: f"{call}: {header}, read {call.read}")
        elif message.kind is Kind.SUBMIT:
            call.granted = max(call.granted, self.world.profile.config.window)

    def broker_said(self, owner: Endpoint, message: Message, sent: bool) -> None:
        """The broker sends a message; not ``sent`` where the pipe is full."""
        self._rested("broker", message)
        match message.kind:
            case Kind.RUN:
                self.dispatches.run(owner, message)
            case Kind.ACCEPTED:
                self.dispatches.accepted(message)
            case Kind.ERROR:
                self.dispatches.refused(owner, message)

    def worker_heard(self, worker: WorkerProcess, message: Message) -> None:
        """A message came to a worker."""
        if message.kind is Kind.WELCOME:
            self.talk.welcomed(worker)
        elif message.kind is Kind.TOKACK:
            self.talk.acknowledged(worker, message.header)
        if message.kind is Kind.ERROR and not self.may_be_refused(worker):
            failure = codec.unpack(messages.Failure, message.body)
            broken("no peer of ours breaks the protocol", f"{worker}: {failure}")

    def worker_said(self, worker: WorkerProcess, message: Message) -> None:
        """A worker sends a message."""
        self._rested(worker, message)
        self.talk.said(worker, message)

    def may_be_refused(self, worker: WorkerProcess) -> bool:
        """Whether another process of the name may still be around: that of a launcher that was killed."""
        return self.journal.count(("kill launcher", "stop launcher", "hold", "freeze", "snap"), self.clock.now - 8, self.clock.now) > 0

    def engine_took(self, worker: WorkerProcess, job: Job) -> bool:
        """An engine is given a request; whether it is a plain one, whose text is marked."""
        key = (job.key.request, job.key.attempt)
        call = self.calls.get(job.key.request)
        hold(call is not None, "only what was submitted runs", lambda: f"{worker} was given {job}")
        record = self.world.broker.core.tables.requests.get(key[0])
        known, other = self.taken.get(key, (None, ""))
        again = record is not None and known is record  # a broker that has forgotten the request counts from the start
        hold(not again, "P4 no attempt runs twice", lambda: f"attempt {key[1]} of {call} on {other}, now on {worker}")
        self.taken[key] = (record, worker.name)
        hold(1 <= key[1] <= MOST_ATTEMPTS, "P4 at most three attempts", lambda: f"{call} has attempt {key[1]}")
        call.moved = self.clock.now
        self.talk.begins(worker, key)
        self._as_asked(call, worker, job)
        return call.plain

    def _as_asked(self, call: Call, worker: WorkerProcess, job: Job) -> None:
        submit, run = call.submit, job.run
        hold(
            (run.model, run.adapter, run.deterministic) == (submit.model, submit.adapter, submit.deterministic),
            "a request runs as it was asked",
            lambda: f"{call} on {worker}: {run}",
        )
        asked = codec.unpack(messages.Generate, call.body, codec.BODY_LIMITS)
        hold(job.generate == asked, "a request runs as it was asked", lambda: f"{call} on {worker}: {job.generate}")
        right = tuple(echo_token(call.id, i) for i in range(len(job.prefix)))
        hold(job.prefix == right, "P1 a prefix is what was produced", lambda: f"{call} on {worker}")

    # --- processes

    def process_started(self, launcher: LauncherProcess, name: str) -> None:
        """A launcher starts a process."""
        hold(name not in launcher.children, "one process of a name", f"{name} runs already")
        recent = [end for end in self.children.get(name, []) if end > self.clock.now - 60 and end > launcher.born]
        if recent:
            pause = self.clock.now - recent[-1]
            hold(pause >= 0.2, "a crashed process is not started at once", f"{name} after {pause} s")
        hold(len(recent) < 5, "a crash loop is given up", f"{name} crashed {len(recent)} times in 60 s")

    def process_ended(self, launcher: LauncherProcess, name: str) -> None:
        """A launcher's child is gone."""
        self.children.setdefault(name, []).append(self.clock.now)

    # --- from time to time

    def audit(self) -> None:
        """Look at everything."""
        world, now = self.world, self.clock.now
        if world.broker.alive:
            books.audit(world)
        calm = now - self.journal.calm_since()
        for call in self.calls.values():
            if call.open:
                limit = max(call.deadline, call.client.thawed_at) + LATE + TICK
                hold(now <= limit or not call.client.running, "P3 ends in time", lambda: f"{call} has no end, deadline {call.deadline:.3f}")
        if calm > GHOST:
            self._no_ghosts(calm)
        if calm > STALLED:
            self._no_stall(calm)

    def _no_ghosts(self, calm: float) -> None:
        now = self.clock.now
        for worker in self.world.workers:
            for key in worker.engine._running:
                call = self.calls[key.request]
                over = min(call.ended, now if call.client.alive and not call.client.closing else call.client.gone + 3)
                hold(
                    now - over < GHOST + self.world.profile.latency[1] * 4,
                    "what ended does not go on running",
                    lambda: f"{call} attempt {key.attempt} on {worker}, {now - over:.1f} s after its end",
                )

    def _no_stall(self, calm: float) -> None:
        """In calm weather a request that has a slot moves on."""
        now = self.clock.now
        running = {key.request for worker in self.world.workers for key in worker.engine._running}
        for call in self.calls.values():
            if not call.open or call.slow or call.collect or call.id not in running:
                continue
            quiet = now - max(call.moved, call.submitted)
            if min(quiet, calm) > STALLED + 4 * self.world.profile.latency[1]:
                broken("what runs moves on", f"{call} has {len(call.tokens)} tokens, the last {quiet:.1f} s ago")

    # --- at the end

    def census(self) -> Counter[str]:
        """How much every core remembers."""
        world = self.world
        cores = [world.broker.core.tables, world.launcher.plan, world.launcher.link]
        return census(*cores, *(w.core for w in world.workers), *(c.core for c in world.living))

    def at_rest(self) -> None:
        """After the last request: nothing is left anywhere, and nobody talks but to say that they are there."""
        for call in self.calls.values():
            hold(not call.open, "P2 every request ends", f"{call} ({call.about})")
        for client in self.world.living:
            hold(not client.questions, "P2 every question is answered", f"{client}")
        books.at_rest(self.world)
        for worker in self.world.workers:
            hold(worker.core.requests == 0, "nothing is left in a worker", f"{worker} has {worker.core.requests} requests")
            hold(not worker.engine._running, "nothing is left in an engine", f"{worker}")


