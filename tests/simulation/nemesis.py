"""What is done to a world: callers who ask for things, and faults, in bursts with calm weather between them."""

from __future__ import annotations

import math
import random

from loopmux.messages import AdapterOrder, SessionHint
from loopmux.wire import Kind
from simulation.broken import hold
from simulation.broker import BrokerProcess
from simulation.census import grown
from simulation.client import Call, ClientProcess, plain_call, scripted_call
from simulation.lines import Line, Pipe
from simulation.process import Endpoint, Process
from simulation.profile import ADAPTER, ECHO, FAIL_AT, FLAKY, LOOSE, SPOILED, draw
from simulation.stranger import Stranger, StrangeWorker
from simulation.worker import WorkerProcess
from simulation.world import World

_START = 2.0
"""Seconds until everybody has joined."""
_CALM = 10.0
"""Seconds of calm between bursts, sometimes: what has to move on in calm weather gets the time to be seen stuck."""
_HEARTBEATS_MISSED = (3.0, 3.5)
"""Seconds until ØMQ closes the connection of a peer that does not answer."""
_RETRY_WITHIN = 6.0
"""Seconds in which, after the last end and the last fault, what is acknowledged has been forgotten everywhere."""
_POISON = 2
"""Requests that end workers, in one run: more of them would leave no worker to see anything with."""
_ENCORE = 16
"""Requests after the end of all faults."""
_STREAMS_WITHIN = 1.0
"""Seconds that a fault waits for a stream that it can harm."""
_ADAPTED = 0.12
"""The share of orders for adapters among what callers do, and of those they load among the ones that are named."""
_IDLE = 3.0
"""Seconds that are listened to after that."""


class Nemesis:
    """One seed's run."""

    def __init__(self, seed: int, *, loud: bool = False) -> None:
        self.dice = random.Random(f"nemesis {seed}")
        self.profile = draw(seed)
        self.world = World(seed, self.profile, loud=loud)
        self.clock, self.story, self.journal = self.world.clock, self.world.story, self.world.promise.journal
        self.asked = 0
        self.sessions = 0

    def run(self) -> None:
        """The whole run; raises at the first thing that does not hold."""
        self.world.run(_START)
        for _ in range(self.profile.bursts):
            self._burst()
            if self.dice.random() < 0.5:
                self.world.run(_CALM)
        self._end()

    def _burst(self) -> None:
        for _ in range(self.dice.randint(14, 48)):
            self.world.run(self.dice.choice((0.0, 0.02, 0.1, 0.3, 0.6)) * self.dice.random())
            if self.profile.faults and self.dice.random() < 0.3:
                self._fault(self.dice.choice(self.profile.faults))
            else:
                self._caller()

    # --- callers

    def _caller(self) -> None:
        world, dice = self.world, self.dice
        if not world.living:
            world.new_client()
        client = dice.choice(world.living)
        if self.profile.adapters and dice.random() < _ADAPTED:
            self._order(client)
            return
        match dice.choices(("ask", "turn", "flood", "cancel", "status", "hint", "stranger"), (20, 3, 1, 3, 1, 1, 1))[0]:
            case "stranger":
                self._stranger()
            case "ask":
                self._ask(client)
            case "turn":
                options = {"session": f"s{dice.randint(1, 3)}", "continues": dice.random() < 0.5}
                self.asked += 1
                client.ask(scripted_call(client, f"r{self.asked}", dice.randint(1, 3), dice.uniform(2, 20), **options))
            case "flood":
                for _ in range(dice.randint(5, 15)):
                    self._ask(client)
            case "cancel":
                open_ones = [call for call in client.calls.values() if call.open]
                if open_ones:
                    self.story.tell(client, f"cancels {(call := dice.choice(open_ones))}")
                    client.cancel(call)
            case "status":
                client.question(dice.uniform(2, 8))
            case "hint":
                name, state = f"s{dice.randint(1, 3)}", dice.choice(("waiting_on_tool", "done"))
                client.hint(SessionHint(name, state, dice.choice((None, 2.0))))

    def _ask(self, client: ClientProcess) -> Call:
        self.asked += 1
        name, dice = f"r{self.asked}", self.dice
        tokens, timeout = dice.choice((1, 8, 20, 60, 200, 600)), dice.uniform(3, 25)
        options: dict = {"priority": dice.choice((0, 0, 0, 1, -1)), "prompt_size": dice.choice((0, 4_000))}
        options["cancel_on_disconnect"] = self.asked % 5 == 0
        if dice.random() < 0.3:
            options["hashes"] = tuple(bytes([1, dice.randint(1, 2), dice.randint(1, 3)][: n + 1]) for n in range(3))
        if dice.random() < 0.3:
            options |= {"session": f"s{dice.randint(1, 3)}", "continues": dice.random() < 0.5}
        if dice.random() < 0.2:
            options |= dice.choice(({"adapter": ADAPTER}, {"model": ADAPTER}))
        elif self.profile.adapters and dice.random() < _ADAPTED:
            options |= dice.choice(({"adapter": LOOSE[0]}, {"model": LOOSE[0]}, {"model": LOOSE[1]}))
            options["may_fail"] = frozenset({"adapter_not_found", "model_not_found"})  # it may be gone, or come later
        match dice.choices(("prompt", "collect", "slow", "never", "odd", "regret"), (60, 15, 6, 3, 6, 6))[0]:
            case "collect":
                options["collect"] = True
            case "slow":
                options |= {"read_in": dice.uniform(0.2, 2.0)}
            case "never":
                options |= {"read_in": math.inf}
            case "regret":
                call = client.ask(plain_call(client, name, tokens, timeout, **options))
                client.later(dice.choice((0.0, 0.01, 0.3)) * dice.random(), lambda: client.cancel(call))
                return call
            case "odd":
                options |= self._odd(dice.choice(("model", "adapter", "priority", "flaky", "flaky", "idle", "brief")))
        timeout = options.pop("timeout", timeout)
        if options.get("model") == FLAKY and tokens <= FAIL_AT:
            options["must_fail"] = False
        return client.ask(plain_call(client, name, tokens, timeout, **options))

    def _order(self, client: ClientProcess) -> None:
        """Have an adapter loaded, or unloaded."""
        name, load = self.dice.choice((*LOOSE, *LOOSE, SPOILED)), self.dice.random() < 0.6
        order = AdapterOrder(ECHO, name, f"/adapters/{name}" if load else "")
        client.order(Kind.LOAD if load else Kind.UNLOAD, order)

    def _stranger(self) -> None:
        """Somebody who is none of ours comes, says things and leaves."""
        world, dice = self.world, self.dice
        kind = dice.choice((Stranger, StrangeWorker))
        stranger = kind(world, f"stranger-{len(world.strangers) + 1}")
        world.strangers.append(stranger)
        babbles = dice.random() < 0.5

        def speak() -> None:
            known = world.broker.core.tables.requests  # of others nobody can tell whose they are going to be
            open_ones = [call for call in world.calls if call.open and call.id in known]
            if babbles:
                stranger.babble()
            elif open_ones:
                stranger.meddle(dice.choice(open_ones))

        for _ in range(6):
            stranger.later(dice.uniform(0.1, 1.5), speak)
        self.clock.after(2.0, stranger.die)

    def _odd(self, what: str) -> dict:
        """A request with something about it that fails it, or may."""
        match what:
            case "model":
                codes = frozenset({"model_not_found", "overloaded"})
                return {"model": "nobody", "adapter": None, "may_fail": codes, "must_fail": True}
            case "adapter":
                return {
                    "model": ECHO,
                    "adapter": "nothing",
                    "may_fail": frozenset({"adapter_not_found"}),
                    "must_fail": True,
                }
            case "priority":
                return {"priority": 1000, "may_fail": frozenset({"bad_request"}), "must_fail": True}
            case "flaky":
                return {"model": FLAKY, "adapter": None, "may_fail": frozenset({"engine"}), "must_fail": True}
            case "idle":
                return {"idle_timeout": self.dice.uniform(0.05, 1.0)}
            case _:
                return {"timeout": self.dice.uniform(0.01, 0.5)}

    # --- faults

    def _fault(self, what: str) -> None:
        verb, _, whom = what.partition(" ")
        if self.dice.random() < 0.5:
            self._await_streams()
        if not whom or verb == "bad":
            (self._bad_starts if whom else self._poison)()
            return
        targets = [p for p in self._of(whom) if p.running]
        if targets:
            getattr(self, f"_{verb}")(self.dice.choice(targets))

    def _await_streams(self) -> None:
        """Harm that comes while nothing runs shows little: let a stream be under way, if one gets there soon."""
        until = self.clock.now + _STREAMS_WITHIN
        while self.clock.now < until and not any(call.open and call.tokens for call in self.world.calls):
            self.world.run(0.02)

    def _of(self, whom: str) -> list[Process]:
        world = self.world
        return {
            "worker": world.workers,
            "broker": [world.broker],
            "launcher": [world.launcher],
            "client": world.living,
            "host": [world.broker],
        }[whom]

    def _note(self, what: str, process: Process, seconds: float = 0.0) -> None:
        kind = process.name.split("-")[0]
        kind = "worker" if kind in (ECHO, FLAKY) else kind
        self.journal.note(f"{what} {kind}", self.clock.now, seconds)
        self.story.tell("✗", f"{what} {process}" + (f" for {seconds:.2f} s" if seconds else ""))

    def _kill(self, process: Process) -> None:
        away = self.dice.choice((0.05, 0.3, 1.0, 4.0)) * self.dice.random()
        again = {self.world.broker: self.world.broker.start, self.world.launcher: self.world.launcher.start}
        self._note("kill", process, away + 4.0 if process in again else 4.0)
        if isinstance(process, Endpoint) and self.dice.random() < 0.3:
            process.die(self.dice.uniform(0.5, 3.5))  # its host went down: no system is left that would tell
        else:
            process.die()
        if process in again:
            self.clock.after(away, again[process])
        if process is self.world.broker and self.dice.random() < 0.5:
            self.clock.after(away, lambda: self._slow_start(self.world.broker, self.dice.randint(1, 3)))

    def _slow_start(self, broker: BrokerProcess, times: int) -> None:
        """On a machine in trouble it stands still again and again, while others tell it what they have."""
        seconds = self.dice.uniform(0.2, 2.0)

        def stand_still() -> None:
            if broker.running:
                self._note("freeze", broker, seconds + 4.0)
                broker.freeze(seconds)
                if times > 1:
                    self.clock.after(seconds, lambda: self._slow_start(broker, times - 1))

        self.clock.after(self.dice.random() * self._introductions / 2, stand_still)

    @property
    def _introductions(self) -> float:
        """Seconds in which two ends that have just been connected tell each other who they are and what they have."""
        return 6 * self.profile.latency[1] + 0.01

    def _freeze(self, process: Process) -> None:
        seconds = self.dice.choice((0.1, 1.0, 2.5, 6.0)) * self.dice.random() + 0.02
        self._note("freeze", process, seconds + 4.0)
        process.freeze(seconds)
        lowest, highest = _HEARTBEATS_MISSED
        if seconds > highest:
            for line in self._lines(process):
                near, far = (self.dice.uniform(lowest, highest) for _ in range(2))
                self.world.broker.snap(line, near, far)

    def _stick(self, process: Process) -> None:
        """Something in it does not come back, and ØMQ's own thread goes on answering: no connection breaks."""
        seconds = self.dice.uniform(0.5, 8.0)
        self._note("freeze", process, seconds + 4.0)
        process.freeze(seconds)

    def _suspend(self, broker: BrokerProcess) -> None:
        """The host sleeps, connections and all; of its processes some get going later than others."""
        seconds = self.dice.uniform(0.5, 6.0)
        self._note("freeze", broker, seconds + 4.0)
        broker.freeze(seconds)
        for process in (*self.world.workers, *self.world.living):
            if process.running:
                longer = seconds + self.dice.choice((0.0, 0.2, 6.0)) * self.dice.random()
                self._note("freeze", process, longer + 4.0)
                process.freeze(longer)

    def _lines(self, process: Process) -> list[Line]:
        if process is self.world.broker:
            return list(self.world.broker.lines.values())
        return [process.line] if isinstance(process, Endpoint) and process.line else []

    def _snap(self, process: Endpoint) -> None:
        """A connection breaks; often one end does not see it at once."""
        near, far = (self.dice.choice((0.0, 0.0, 0.5, 3.0)) * self.dice.random() for _ in range(2))
        self._note("snap", process, max(near, far) + 4.0)
        for line in self._lines(process):
            self.world.broker.snap(line, near, far)

    def _flap(self, process: Endpoint) -> None:
        """A network that is not back for good: connections break or stand still as their ends introduce themselves."""
        seconds = self.dice.uniform(1.0, 4.0)
        self._note("snap", process, seconds + 7.0)
        until, shaking = self.clock.now + seconds, self._introductions

        def shake() -> None:
            if not process.alive or self.clock.now > until:
                return
            for line in self._lines(process):
                if self.dice.random() < 0.5:
                    line.hold(self.clock.now + self.dice.uniform(0.5, 2.5))
                else:
                    self.world.broker.snap(line, 0.0, self.dice.choice((0.0, 0.5)) * self.dice.random())
            self.clock.after(self.dice.choice((shaking, shaking, seconds)) * self.dice.random(), shake)

        shake()

    def _hold(self, process: Endpoint) -> None:
        """A partition, too short for the heartbeats or too long for them."""
        seconds = self.dice.choice((0.3, 2.0, 6.0)) * self.dice.random() + 0.02
        self._note("hold", process, seconds + 4.0)
        for line in self._lines(process):
            line.hold(self.clock.now + seconds)
            lowest, highest = _HEARTBEATS_MISSED
            if seconds > highest:
                near, far = (self.dice.uniform(lowest, highest) for _ in range(2))
                self.world.broker.snap(line, near, far)

    def _clog(self, process: Endpoint) -> None:
        """A peer reads so slowly that its pipe is full most of the time; of a client sometimes the other one, too."""
        seconds = self.dice.choice((0.3, 2.0, 5.0)) * self.dice.random() + 0.02
        self._note("clog", process, seconds + 4.0)
        both = isinstance(process, ClientProcess) and self.dice.random() < 0.5
        for line in self._lines(process):
            for pipe in (line.down, line.up) if both else (line.down,):
                pipe.room = self.dice.choice((0, 1, 3))

                def free(pipe: Pipe = pipe) -> None:
                    if pipe.room < math.inf:
                        pipe.room = 2_000

                self.clock.after(seconds, free)

    def _hang(self, process: WorkerProcess) -> None:
        seconds = self.dice.choice((0.5, 5.0, 25.0)) * self.dice.random()
        self._note("hang", process, seconds + 4.0)
        process.hang(seconds)

    def _slow(self, process: WorkerProcess) -> None:
        """It takes long and gets on: no harm, and no excuse for anything."""
        self.story.tell("✗", f"slow {process}")
        process.slow_down(self.dice.uniform(0.05, 1.2), self.dice.uniform(0.5, 5.0))

    def _stop(self, process) -> None:
        """SIGTERM. A stopped launcher is started again by hand."""
        self._note("stop", process, 12.0)
        process.stop()

    def _drain(self, worker: WorkerProcess) -> None:
        """An administrator wants it to leave."""
        within = self.dice.choice((0.0, 0.5, 3.0, 15.0)) * self.dice.random()
        self._note("drain", worker, within + 12.0)
        self.world.broker.evict(worker.name, within)

    def _close(self, client: ClientProcess) -> None:
        self._note("close", client, 4.0)
        client.close()

    def _poison(self) -> None:
        """A request that ends every worker that runs it."""
        world = self.world
        if world.living and sum(call.fuse is not None for call in world.calls) < _POISON:
            self.asked += 1
            client, fuse = self.dice.choice(world.living), self.dice.choice((0.01, 0.5)) * self.dice.random()
            fatal = {"fuse": fuse, "must_fail": True, "may_fail": frozenset({"worker_lost"})}
            client.ask(plain_call(client, f"r{self.asked}", 10_000, self.dice.uniform(5, 25), **fatal))

    def _bad_starts(self) -> None:
        seconds = self.dice.uniform(1.0, 10.0)
        self.journal.note("bad starts", self.clock.now, seconds + 4.0)
        self.story.tell("✗", f"starts fail for {seconds:.1f} s")
        self.world.launcher.fail_starts = self.dice.choice((0.5, 1.0))
        self.clock.after(seconds, self._good_starts)

    def _good_starts(self) -> None:
        self.world.launcher.fail_starts = 0.0

    # --- the end

    def _end(self) -> None:
        """Calm weather until the last deadline has passed and everything has been said; then nothing may be left."""
        self.story.tell("☀", "no more faults")
        world = self.world
        while any(call.open for call in world.calls):
            world.run(1.0)
        rest = max(self.clock.now, self.journal.calm_since()) - self.clock.now + _RETRY_WITHIN
        world.run(rest + 8 * self.profile.latency[1])
        world.promise.at_rest()
        self._encore()

    def _encore(self) -> None:
        """More of the same without faults: nothing in any core is larger after it than before."""
        world, promise = self.world, self.world.promise
        before = promise.census()
        world.living or world.new_client()
        for fate in range(_ENCORE):
            client = self.dice.choice(world.living)
            call = client.ask(
                plain_call(client, f"e{fate}", 12, 0.05 if fate % 4 == 1 else 60.0, collect=fate % 4 == 2)
            )
            if fate % 4 == 3:
                world.run(self.dice.uniform(0, 0.1))
                client.cancel(call)
        while any(call.open for call in world.calls):
            world.run(1.0)
        world.run(_RETRY_WITHIN + 8 * self.profile.latency[1])
        promise.at_rest()
        more = grown(before, promise.census(), _ENCORE // 2)
        hold(not more, "memory does not grow", more)
        promise.resting = True
        self.dice.choice(world.living).question(_IDLE)
        world.run(_IDLE)
        promise.at_rest()
