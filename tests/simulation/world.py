"""Everything together: one broker, one launcher with its workers, clients, on one clock."""

from __future__ import annotations

from simulation.broker import BrokerProcess
from simulation.client import Call, ClientProcess
from simulation.clock import Clock
from simulation.launcher import LauncherProcess
from simulation.process import Process
from simulation.profile import Profile
from simulation.promise import Promise
from simulation.story import Story
from simulation.stranger import Stranger
from simulation.worker import WorkerProcess


class World:
    """The processes, what watches them, and what has been done to them."""

    def __init__(self, seed: int, profile: Profile, *, loud: bool = False) -> None:
        self.clock = Clock(seed)
        self.profile = profile
        self.story = Story(self.clock, loud)
        self.promise = Promise(self)
        self.clock.audit = self.promise.audit
        self.broker = BrokerProcess(self)
        self.launcher = LauncherProcess(self, list(profile.groups))
        self.clients: list[ClientProcess] = []
        self.strangers: list[Stranger] = []
        for _ in range(profile.clients):
            self.new_client()

    def new_client(self) -> ClientProcess:
        client = ClientProcess(self, f"client-{len(self.clients) + 1}")
        self.clients.append(client)
        return client

    @property
    def workers(self) -> list[WorkerProcess]:
        return self.launcher.workers

    @property
    def living(self) -> list[ClientProcess]:
        return [c for c in self.clients if c.alive and not c.closing]

    @property
    def processes(self) -> list[Process]:
        return [self.broker, self.launcher, *self.workers, *self.living]

    @property
    def calls(self) -> list[Call]:
        return [call for client in self.clients for call in client.calls.values()]

    def run(self, seconds: float) -> None:
        self.clock.run(seconds)
