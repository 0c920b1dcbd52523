"""A worker process: the real session core and echo engine, the engine's thread turned by the simulated clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopmux import wire
from loopmux.errors import ConfigError, LoopmuxError, ProtocolError
from loopmux.messages import Register, ServedModel, SessionHint, WorkerSpec
from loopmux_worker import events, session
from loopmux_worker.driver import Driver
from loopmux_worker.engine.base import Job, Key, Load, Output, Produced
from loopmux_worker.engine.echo import EchoEngine
from simulation.broken import broken
from simulation.process import Endpoint
from simulation.profile import SPOILED

if TYPE_CHECKING:
    from simulation.launcher import LauncherProcess
    from simulation.world import World

STEP = 0.004
"""Seconds an engine step takes."""


class MarkedEcho(EchoEngine):
    """The text of a token names token and attempt, so that what a superseded attempt wrote shows.

    Its progress moves whenever it runs, as that of an engine that reads a long prompt does.
    """

    def __init__(self, worker: WorkerProcess, spec: WorkerSpec) -> None:
        super().__init__(spec, clock=lambda: worker.clock.now)
        self._worker = worker
        self._turns = 0

    def submit(self, job: Job) -> None:
        worker = self._worker
        if worker.world.promise.engines.took(worker, job):
            worker.plain.add(job.key)
        super().submit(job)
        fuse = worker.world.promise.calls[job.key.request].fuse
        if fuse is not None:
            worker.later(fuse, lambda: worker.end_by(job.key))

    def hint(self, hint: SessionHint) -> None:
        self._worker.world.promise.engines.hinted(self._worker, hint)

    def load_adapter(self, name: str, directory: str, like: str = "") -> ServedModel:
        if directory.endswith(SPOILED):
            raise ConfigError(f"adapter {name!r} does not fit")
        return super().load_adapter(name, directory, like)

    def unload_adapter(self, name: str) -> None:
        self._worker.world.promise.adapters.unloads(self._worker, name)
        super().unload_adapter(name)

    def step(self) -> list[Output]:
        self._turns += 1
        return [self._marked(output) for output in super().step()]

    def _marked(self, output: Output) -> Output:
        if not isinstance(output, Produced) or output.key not in self._worker.plain:
            return output
        text = "".join(f"{token}.{output.key.attempt} " for token in output.ids)
        return Produced(output.key, output.position, output.ids, text, output.calls, output.logprobs)

    def load(self) -> Load:
        load = super().load()
        return Load(load.running, load.queued, load.progress + self._turns, load.cached, load.computed)


class WorkerProcess(Endpoint):
    """One worker. ``launcher`` hears of its end."""

    from_worker = True

    def __init__(self, world: World, launcher: LauncherProcess, spec: WorkerSpec) -> None:
        super().__init__(world, spec.name)
        self.launcher, self.spec = launcher, spec
        self.plain: set[Key] = set()
        self.hung_until = 0.0
        self.step = STEP
        self.engine = MarkedEcho(self, spec)
        about = self.engine.describe()
        register = Register(
            "worker",
            spec.name,
            self.clock.random.randbytes(16),
            wire.VERSIONS,
            models=about.models,
            adapters=about.adapters,
            slots=about.slots,
        )
        self.driver = Driver(self.engine, lambda: None)
        self.core = session.Session(register, {}, self.clock.now)
        self.wake_by(lambda: self.core.next_timer(), lambda: self.handle(events.Woke()))
        self._turning = False
        self._commanded = False
        self._said: list[wire.Message] = []
        self.connect()
        self.look()

    def connected(self) -> None:
        self.handle(events.Connected())

    def disconnected(self) -> None:
        self.handle(events.Disconnected())

    def receive(self, data: bytes) -> None:
        message = wire.from_bytes(data)
        promise = self.world.promise
        promise.talk.worker_heard(self, message)
        owed, self._said = promise.answers.of_worker(self, message.header), []
        self.handle(events.Received(message))
        promise.answers.check(self, message.header, owed, self._said)

    def stop(self) -> None:
        """SIGTERM."""
        self.act(lambda: self.handle(events.Asked()))

    def handle(self, event: events.Event) -> None:
        if not self.alive:
            return
        for action in self.core.handle(event, self.clock.now):
            match action:
                case events.Send(message, lasting):
                    self.world.promise.talk.worker_said(self, message)
                    self._said.append(message)
                    self.put(message, lasting=lasting)
                case events.Unsend():
                    self.unsend()
                case events.Submit() | events.Cancel() | events.Hint() | events.Adapt():
                    self.driver.put(action)
                    self._commanded = True
                case events.Leave(error):
                    self._leave(error)
                    return
        self.look()
        self._turn_later()

    def _leave(self, error: LoopmuxError | None) -> None:
        refused = isinstance(error, ProtocolError)  # else its engine hung
        if refused and not self.world.promise.talk.may_be_refused(self):
            broken("no worker is refused without a reason", f"{self}: {error}")
        code = 0 if error is None else 1
        end = self.clock.now if self.line is None else self.line.up.last
        self.core = None
        self.alive = False
        self.clock.at(end, lambda: self._gone(code))

    def _gone(self, code: int, news: float = 0.0) -> None:
        super().die(news)
        self.launcher.child_ended(self.name, self, code)

    def die(self, news: float = 0.0) -> None:
        if self.alive:
            self.world.promise.engines.killed(self)
            self._gone(-9, news)

    def end_by(self, key: Key) -> None:
        """Whatever a request does to the process that runs it, if it still does."""
        if key in self.engine._running:
            promise, call = self.world.promise, self.world.promise.calls[key.request]
            promise.journal.note("kill worker", self.clock.now, 4.0)
            self.world.story.tell("✗", f"{call} ends {self}")
            self.die()

    # --- the engine's thread

    def hang(self, seconds: float) -> None:
        """The engine does not come back from a step for a while."""
        self.hung_until = self.clock.now + seconds

    def slow_down(self, step: float, seconds: float) -> None:
        """Steps take long for a while, and get on."""
        self.step = step
        self.clock.after(seconds, lambda: setattr(self, "step", STEP))

    def _turn_later(self) -> None:
        due = 0.0 if self._commanded else self.engine.due()
        if due is not None and not self._turning:
            self._turning = True
            when = max(self.clock.now + max(due, self.step), self.hung_until)
            self.clock.at(when, lambda: self.act(self._turn))

    def _turn(self) -> None:
        if self.clock.now < self.hung_until:
            self.clock.at(self.hung_until, lambda: self.act(self._turn))
            return
        self._turning = False
        if self._commanded or self.engine.due() == 0.0:
            self._commanded = False
            self.driver._turn()
        if not self.core.full:
            for event in self.driver.drain():
                self.handle(event)
        self._turn_later()
